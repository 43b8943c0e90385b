"""Random bytes from both sides through the running proxy: no crash, no hang, no request upstream with two readings.

The oracle is ``tests/readings.py``: whatever the upstream saw must be among what it read, in order, with the same
method and body.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_seeds import ANSWERS, REQUESTS
from tests.readings import readings
from tests.wire import OK, Bench, Broken, Peer, eventually, get, patiently, running

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

FRAGMENTS = [
    b"GET /x HTTP/1.1\r\n",
    b"POST /x HTTP/1.1\r\n",
    b"PUT /y HTTP/1.0\r\n",
    b"OPTIONS * HTTP/1.1\r\n",
    b"Host: a\r\n",
    b"Host: a\r\n\r\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"\x00",
    b":",
    b"Content-Length: 3\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length: +3\r\n",
    b"Content-Length : 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"transfer-encoding:\tCHUNKED\r\n",
    b"Transfer-Encoding\x0b: chunked\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive, host\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"X: a\r\n b\r\n",
    b"abc",
    b"3\r\nabc\r\n",
    b"0\r\n\r\n",
    b"0\r\nX: y\r\n\r\n",
    b"3;a=b\r\nabc\r\n",
    b"0x3\r\nabc\r\n",
    b"3 \r\nabc\r\n",
    b"ffffffffffffffff\r\n",
    b"HTTP/1.1",
]
ANSWER_FRAGMENTS = [
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.0 200 OK\r\n",
    b"HTTP/1.1 204 No Content\r\n",
    b"HTTP/1.1 304 \r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching\r\n",
    b"Set-Cookie: poison\r\n",
    b"Content-Length: 6\r\n\r\npoison",
    *FRAGMENTS[4:],
]


WHOLE = [
    b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /y?z HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
    b"PUT /x HTTP/1.1\r\nHost: a\r\nX: y\r\nContent-Length: 0\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n",
    b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: a\r\n\r\n0\r\nX: y\r\n\r\n",
    b"DELETE /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n0",
]
WHOLE_ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a\r\nabc\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nX: y\r\n\r\nabc",
    b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
]


def broken(whole: list[bytes], fragments: list[bytes]) -> st.SearchStrategy[list[bytes]]:
    """Return segments of whole messages, in which a few places were damaged."""
    piece = st.sampled_from(fragments) | st.binary(max_size=3)
    place = st.floats(0, 1)
    damage = st.lists(st.tuples(place, st.integers(0, 12), piece), max_size=2)

    def make(messages: list[bytes], damages: list[tuple[float, int, bytes]], cuts: list[float]) -> list[bytes]:
        data = b"".join(messages)
        for where, lost, new in damages:
            start = int(where * len(data))
            data = data[:start] + new + data[start + lost :]
        ends = sorted({int(cut * len(data)) for cut in cuts} | {0, len(data)})
        return [data[start:end] for start, end in itertools.pairwise(ends)]

    return st.builds(
        make, st.lists(st.sampled_from(whole), min_size=1, max_size=4), damage, st.lists(place, max_size=3)
    )


async def at_rest(bench: Bench) -> None:
    """Wait until nothing is under way on either side, writes that outlived their client included."""
    proxy = bench.proxy
    await eventually(lambda: not proxy.server.clients and not proxy.telemetry.active)
    await eventually(lambda: bench.upstream.connections <= sum(proxy.pool.connections))


async def try_request(bench: Bench, segments: list[bytes]) -> None:
    """Send the segments and look what became of them."""
    upstream = bench.upstream
    upstream.plays(OK)
    upstream.requests.clear()
    client = await bench.client()
    for segment in segments:
        with contextlib.suppress(ConnectionError):
            client.writer.write(segment)
            for _ in range(3):
                await asyncio.sleep(0)
    for _ in range(50):  # a body that was cut short never comes to its end
        await asyncio.sleep(0)
        if not bench.proxy.telemetry.active:
            break
    got = bytes(client.reader._buffer)  # type: ignore[attr-defined]
    client.writer.transport.abort()
    await at_rest(bench)
    assert re.match(rb"HTTP/1\.1 [1-5]|$", got)
    assert b"HTTP/1.1 500" not in got
    expected = iter(readings(b"".join(segments)))
    for request in upstream.requests:
        seen = (request.line.split()[0], request.body)
        assert seen in expected, (segments, request.head)
    assert [] == upstream.faults == bench.crashes


async def try_answer(bench: Bench, data: bytes) -> None:
    """Let the upstream answer with the bytes and look what became of them."""
    ended = asyncio.Event()

    async def play(peer: Peer) -> None:
        peer.writer.write(data)
        await asyncio.sleep(0)
        peer.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await peer.reader.read()
        ended.set()  # the next one would not be repeated on this connection

    bench.upstream.plays(play)
    client = await bench.client()
    await client.send(get())
    with contextlib.suppress(Broken):
        await client.answer()
    client.writer.transport.abort()
    await patiently(ended.wait())
    await bench.healthy()
    await at_rest(bench)
    assert [] == bench.upstream.faults == bench.crashes


def through(
    attempt: Callable[[Bench, Any], Coroutine[Any, Any, None]],
    strategy: st.SearchStrategy[Any],
    seeds: list[Any],
    examples: int,
) -> None:
    """Try the seeds, then as many examples, all through one proxy."""
    manager = running(retries="0")
    with asyncio.Runner() as runner:
        bench = runner.run(enter(manager))

        @settings(
            max_examples=examples,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(strategy)
        def each(value: Any) -> None:  # noqa: ANN401 - of the strategy
            runner.run(attempt(bench, value))

        try:
            for seed in seeds:
                runner.run(attempt(bench, seed))
            each()
        finally:
            runner.run(leave(manager))


async def enter(manager: AbstractAsyncContextManager[Bench]) -> Bench:
    """Open a bench that outlives one run of the loop."""
    return await manager.__aenter__()


async def leave(manager: AbstractAsyncContextManager[Bench]) -> None:
    """Close it."""
    await manager.__aexit__(None, None, None)


def test_random_requests() -> None:
    """Whatever a client sends, the upstream sees whole, plain requests that were in it, or nothing."""
    through(try_request, broken(WHOLE, FRAGMENTS), REQUESTS, 200)


def test_random_answers() -> None:
    """Whatever the upstream answers, the client gets a strict answer or a broken one, and the next client its own."""
    through(try_answer, broken(WHOLE_ANSWERS, ANSWER_FRAGMENTS).map(b"".join), ANSWERS, 100)


@pytest.mark.slow
def test_many_random_requests() -> None:
    """The same for longer."""
    through(try_request, broken(WHOLE, FRAGMENTS), REQUESTS, 3000)


@pytest.mark.slow
def test_many_random_answers() -> None:
    """The same for longer."""
    through(try_answer, broken(WHOLE_ANSWERS, ANSWER_FRAGMENTS).map(b"".join), ANSWERS, 1200)


async def outcomes(bench: Bench, tries: list[tuple[list[bytes], bytes]]) -> list[tuple[bytes, list[bytes]]]:
    """Return of each try what the client got and the upstream saw, but for ids, dates and ports."""
    found = []
    for segments, answer in tries:

        async def play(peer: Peer, answer: bytes = answer) -> None:
            peer.writer.write(answer)
            peer.writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await peer.reader.read()

        bench.upstream.plays(play)
        bench.upstream.requests.clear()
        client = await bench.client()
        client.writer.write(b"".join([*segments, get("/last", "Connection: close")]))
        got = b""
        with contextlib.suppress(Broken):
            while piece := await client.some():
                got += piece
        client.writer.transport.abort()
        await at_rest(bench)
        got = re.sub(rb"(X-Request-Id|Date): [^\r]*|id [0-9a-f]{16}", b"", got)
        seen = [re.sub(rb"127.0.0.1:[0-9]+", b"", request.head) + request.body for request in bench.upstream.requests]
        found.append((got, seen))
    return found


@pytest.mark.slow
async def test_what_is_remembered_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever either side sends comes to the same for the first time, for the second, and without any memory."""
    chance = random.Random(16)  # noqa: S311 - not for secrets
    fields = [b"A: b\r\n", b"Connection: close\r\n", b"Authorization: Basic x\r\n", b"Cookie: a\r\n", *FRAGMENTS]
    tries = []
    for _ in range(150):
        asked = chance.choice(WHOLE).replace(b"Host: a\r\n", b"Host: localhost\r\n" + chance.choice(fields), 1)
        whole = chance.choice(WHOLE_ANSWERS).replace(b"X: y\r\n", chance.choice(ANSWER_FRAGMENTS), 1)
        tries.append(([asked, *chance.choices(WHOLE, k=chance.randrange(2))], whole))
    async with running(retries="0") as bench:
        remembering = [await outcomes(bench, tries) for _ in range(2)]
    for bound in ("http1.LONGEST_REMEMBERED", "target._LONGEST_REMEMBERED", "gate._REMEMBERED"):
        monkeypatch.setattr(f"metquay_proxy.rules.{bound}", -1)
    monkeypatch.setattr("metquay_proxy.downstream.handler.LONGEST_REMEMBERED", -1)
    async with running(retries="0") as bench:
        assert remembering == [await outcomes(bench, tries)] * 2
