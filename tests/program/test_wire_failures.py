"""The truth about failure: nothing broken looks whole, and nothing that may have been executed is sent twice."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from tests.wire import BLANK, OK, Broken, Peer, answered, chunked, eventually, get, head, post, rule

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.wire import Bench

VERSIONS = ["1.1", "1.0"]
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\n\r\nabc"


def sending(data: bytes, *, reset: bool = False) -> Callable[[Peer], Awaitable[None]]:
    """Return an answer after which the upstream goes."""

    async def play(peer: Peer) -> None:
        await peer.send(data)
        await asyncio.sleep(0.02)  # a reset overtakes what was sent just before it
        peer.reset() if reset else peer.close()

    return play


async def broken(bench: Bench, version: str, play: Callable[[Peer], Awaitable[None]]) -> bytes:
    """Assert that the answer breaks off for the client; return what had come."""
    bench.upstream.plays(play)
    client = await bench.client()
    await client.send(head(f"GET /x HTTP/{version}"))
    with pytest.raises(Broken) as caught:
        await client.answer()
    assert 1 == len(bench.upstream.requests)
    return caught.value.got


@rule("9112 8")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("reset", [False, True])
async def test_length_cut(bench: Bench, version: str, reset: bool) -> None:  # noqa: FBT001 - a column
    """An answer that ends before its length is a broken transfer, and what came is passed on."""
    assert (await broken(bench, version, sending(LENGTH, reset=reset))).endswith(b"abc")


@rule("9112 8")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cut", [b"", b"5", b"5\r\nab", b"3\r\nabc\r\n0\r\n", b"3\r\nabc\r\n0\r\nX: y\r\n"])
async def test_chunks_cut(bench: Bench, version: str, cut: bytes) -> None:
    """A chunked answer that ends before its last chunk, or in the trailers, is a broken transfer, for HTTP/1.0 too."""
    await broken(bench, version, sending(CHUNKS + cut))


@rule("9112 8")
@pytest.mark.parametrize("version", VERSIONS)
async def test_close_delimited_reset(bench: Bench, version: str) -> None:
    """An answer that lasts until the connection closes is broken by a reset."""
    await broken(bench, version, sending(TO_THE_END, reset=True))


@rule("9112 8")
@pytest.mark.parametrize("version", VERSIONS)
async def test_close_delimited_end(bench: Bench, version: str) -> None:
    """The same answer is whole where the connection closes in order."""
    bench.upstream.plays(sending(TO_THE_END))
    client = await bench.client()
    await client.send(head(f"GET /x HTTP/{version}"))
    assert b"abc" == (await client.answer()).body


@rule("9112 7.1")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "chunk", [b"zz\r\n", b"-1\r\n", b"3\r\nabcd\r\n", b"3\nabc\r\n", b"\r\n", b"ffffffffffffffffff\r\n"]
)
async def test_bad_chunk(bench: Bench, version: str, chunk: bytes) -> None:
    """A malformed chunk breaks the transfer, and its connection is closed."""
    bench.upstream.plays(CHUNKS + chunk + bytes(50))
    client = await bench.client()
    await client.send(head(f"GET /x HTTP/{version}"))
    with pytest.raises(Broken):
        await client.answer()
    await bench.upstream.peers[0].gone()


@rule("9112 6.3")
async def test_more_than_the_length(bench: Bench) -> None:
    """Bytes beyond the length are no part of the answer, nor of the next one."""
    bench.upstream.plays(answered(body=b"abc") + answered(body=b"poison"), OK)
    client = await bench.client()
    for body in (b"abc", b"ok"):
        await client.send(get())
        assert body == (await client.answer()).body
    assert 2 == len(bench.upstream.peers)


@rule("9112 9.3.1", retries="0")
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "data", [b"", b"HTTP/1.1 20", b"HTTP/1.1 200 OK\r\nX: y\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"]
)
async def test_no_answer(bench: Bench, data: bytes, reset: bool) -> None:  # noqa: FBT001 - a column
    """A connection that ends before the head of an answer is whole gives 502, and says that the outcome is unknown."""
    answer = await bench.ask(post(b"abc"), sending(data, reset=reset))  # type: ignore[arg-type]
    assert (502, "upstream-closed", b"unknown") == (answer.status, answer.slug, answer.value(b"X-Metquay-Proxy-Sent"))
    assert 1 == len(bench.upstream.requests)


@rule("9110 9.2.2")
@pytest.mark.parametrize("method", ["POST", "PATCH", "LOCK", "MKCOL"])
@pytest.mark.parametrize("request_", ["length", "chunked", "none"])
async def test_writes_never_repeated(bench: Bench, method: str, request_: str) -> None:
    """What is not idempotent is never sent twice once it may have been executed, reused connection or not."""
    data = {"length": post(b"abc", method=method), "chunked": chunked(b"abc"), "none": head(f"{method} /x HTTP/1.1")}[
        request_
    ]
    for before in ([], [OK]):
        bench.upstream.plays(*before, sending(b""))
        client = await bench.client()
        if before:
            await client.send(get("/before"))
            assert 200 == (await client.answer()).status
        count = len(bench.upstream.requests)
        await client.send(data)
        assert 502 == (await client.answer()).status
        await asyncio.sleep(0.05)
        assert count + 1 == len(bench.upstream.requests)


@rule("9110 9.2.2")
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_begun_answers_never_repeated(bench: Bench, method: str) -> None:
    """Once the head of an answer has come not even an idempotent request is repeated."""
    bench.upstream.plays(sending(LENGTH), OK)
    client = await bench.client()
    await client.send(head(f"{method} /x HTTP/1.1"))
    with pytest.raises(Broken):
        await client.answer()
    await asyncio.sleep(0.05)
    assert 1 == len(bench.upstream.requests)


@rule("contract 5")
async def test_reads_repeated(bench: Bench) -> None:
    """A read whose connection breaks before an answer is repeated, unseen by the client."""
    assert b"ok" == (await bench.ask(get(), sending(b""), OK)).body  # type: ignore[arg-type]
    assert 2 == len(bench.upstream.requests)


@rule("contract 8")
async def test_unreachable(bench: Bench) -> None:
    """Where nothing listens the answer is 502, and says that nothing was sent."""
    await bench.healthy()
    bench.upstream.refuse()
    bench.upstream.peers[0].close()
    client = await bench.client()
    await client.send(post(b"abc"))
    answer = await client.answer()
    assert (502, "upstream-unreachable", b"no") == (answer.status, answer.slug, answer.value(b"X-Metquay-Proxy-Sent"))


@rule("9112 8")
@pytest.mark.parametrize("end", ["close", "reset", "finish"])
@pytest.mark.parametrize("framing", ["Content-Length: 10", "Transfer-Encoding: chunked"])
async def test_client_ends_early(bench: Bench, framing: str, end: str) -> None:
    """An upload that its client does not finish is never seen by the upstream as a complete request."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", framing), b"3\r\nabc\r\n", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    await peer.some()
    getattr(client, end)()
    rest = await peer.gone()
    assert b"" == rest


@rule("9112 8")
@pytest.mark.parametrize("end", ["close", "reset", "finish"])
@pytest.mark.parametrize("framing", ["Content-Length: 10", "Transfer-Encoding: chunked"])
async def test_client_ends_before_its_body(bench: Bench, framing: str, end: str) -> None:
    """A client that leaves right after its head, or in mid-head, causes no complete request upstream."""
    bench.upstream.plays(OK)
    for data in (head("POST /x HTTP/1.1", framing), b"POST /x HTTP/1.1\r\nHost: loc"):
        client = await bench.client()
        await client.send(data)
        getattr(client, end)()
        await client.gone()
    await asyncio.sleep(0.02)
    assert [] == bench.upstream.requests


@rule("9112 7.1")
@pytest.mark.parametrize("bad", [b"zz\r\n", b"3\r\nabcd\r\n", b"0\r\nX : y\r\n\r\n", b"3\nabc\r\n"])
async def test_bad_chunk_of_the_client(bench: Bench, bad: bytes) -> None:
    """A malformed chunk in mid-body is answered 400, and the upstream never sees the request as complete."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked"), b"3\r\nabc\r\n", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    assert b"3\r\nabc\r\n" == await peer.exactly(8)
    await client.send(bad)
    answer = await client.answer()
    assert (400, "bad-request", b"close") == (answer.status, answer.slug, answer.value(b"Connection"))
    assert b"" == await peer.gone()
    await client.ended()


@rule("9112 7.1")
async def test_bad_chunk_after_the_answer_began(bench: Bench) -> None:
    """Where the answer has begun already a malformed chunk breaks the transfer: no second answer inside the first."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked"), b"3\r\nabc\r\n", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    await peer.send(LENGTH)
    assert b"200 OK" in await client.until(b"\nabc")
    await client.send(b"zz\r\n")
    assert b"" == await client.gone()
    await peer.gone()


@rule("contract 3")
@pytest.mark.parametrize("end", ["close", "reset", "finish"])
async def test_reads_cancelled(bench: Bench, end: str) -> None:
    """A read whose client leaves, or half-closes, is cancelled upstream."""
    client = await bench.client()
    await client.send(get())
    peer = await bench.upstream.peer()
    await peer.request()
    getattr(client, end)()
    assert b"" == await peer.gone()


@rule("contract 3")
@pytest.mark.parametrize("request_", [get(), post(b"abc")])
async def test_client_leaves_in_mid_answer(bench: Bench, request_: bytes) -> None:
    """A client that leaves in mid-answer ends the transfer upstream, and nobody else's; also that of a write."""
    client, other = await bench.client(), await bench.client()
    peers = []
    for each in (client, other):
        await each.send(request_)
        peers.append(await bench.upstream.peer())
        await peers[-1].request()
        await peers[-1].send(LENGTH)
    await client.until(b"\nabc")
    client.reset()
    assert b"" == await peers[0].gone()
    await peers[1].send(b"defghij")
    assert b"abcdefghij" == (await other.answer()).body


@rule("contract 3")
@pytest.mark.parametrize("end", ["close", "reset", "finish"])
@pytest.mark.parametrize("request_", [post(b"abc"), chunked(b"abc"), head("DELETE /x HTTP/1.1")])
async def test_writes_run_on(bench: Bench, request_: bytes, end: str) -> None:
    """A write that was sent whole runs on without its client, and its connection serves the next one."""
    client = await bench.client()
    await client.send(request_)
    peer = await bench.upstream.peer()
    await peer.request()
    getattr(client, end)()
    await client.gone()
    await peer.silent(0.02)
    await peer.send(OK)
    other = await bench.client()
    await eventually(lambda: bench.proxy.telemetry.active == 0)
    await other.send(get())
    await peer.request()
    await peer.send(OK)
    assert 200 == (await other.answer()).status


@rule("contract 3", rate_limit="2/second")
async def test_queued_never_sent(bench: Bench) -> None:
    """A request whose client leaves while it waits for the quota is never sent."""
    client = await bench.client()
    assert 200 == (await bench.ask(get("/first"))).status
    await client.send(get("/second"))
    await eventually(lambda: bench.proxy.telemetry.active == 1)
    client.close()
    await eventually(lambda: bench.proxy.telemetry.active == 0)
    assert 200 == (await bench.ask(get("/third"))).status
    assert [b"first", b"third"] == [request.line[12:17] for request in bench.upstream.requests]


@rule("contract 2", read_timeout="0.2")
@pytest.mark.parametrize("request_", [get(), post(b"abc")])
async def test_silent_upstream(bench: Bench, request_: bytes) -> None:
    """An upstream that is silent for the read time-out gives 504, once: our own time-out is not repeated."""
    client = await bench.client()
    await client.send(request_)
    peer = await bench.upstream.peer()
    answer = await client.answer()
    assert (504, "upstream-timeout", b"unknown") == (answer.status, answer.slug, answer.value(b"X-Metquay-Proxy-Sent"))
    await peer.gone()
    assert 1 == len(bench.upstream.peers)


@rule("contract 2", read_timeout="0.2")
@pytest.mark.parametrize("version", VERSIONS)
async def test_silent_in_mid_answer(bench: Bench, version: str) -> None:
    """An upstream that falls silent in mid-answer is a broken transfer."""

    async def play(peer: Peer) -> None:
        await peer.send(CHUNKS)
        await asyncio.sleep(1)

    await broken(bench, version, play)


@rule("contract 2", read_timeout="0.2")
async def test_slow_answer(bench: Bench) -> None:
    """The read time-out measures silence: an answer that takes longer but moves is whole."""

    async def play(peer: Peer) -> None:
        await peer.send(LENGTH, *[b"x"] * 7, pause=0.06)

    bench.upstream.plays(play)
    client = await bench.client()
    await client.send(get())
    assert b"abcxxxxxxx" == (await client.answer()).body


@rule("contract 2", read_timeout="0.25")
async def test_slow_upload(bench: Bench) -> None:
    """A client that sends slowly is no silent upstream."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Content-Length: 8"))
    peer = await bench.upstream.peer()
    await peer.begun()
    began = time.monotonic()
    for _ in range(8):
        await asyncio.sleep(0.06)
        await client.send(b"x")
        assert b"x" == await peer.exactly(1)
    assert time.monotonic() - began > 0.4
    await peer.send(OK)
    assert 200 == (await client.answer()).status


@rule("contract 2", read_timeout="0.25", receive_buffer=4096)
async def test_slow_drain(bench: Bench) -> None:
    """An upstream that takes a whole body slowly is not silent: bytes move, though nothing is written any more."""
    client = await bench.client()
    await client.send(post(bytes(600_000)))
    peer = await bench.upstream.peer()
    began = time.monotonic()
    message = await peer.begun()
    assert b"600000" == message.value(b"Content-Length")
    left = 600_000
    while left:
        left -= len(await peer.exactly(min(left, 60_000)))
        await asyncio.sleep(0.06)
    assert time.monotonic() - began > 0.5
    await peer.send(OK)
    assert 200 == (await client.answer()).status


@rule("contract 2", read_timeout="0.3")
async def test_slow_client(bench: Bench) -> None:
    """A client that reads slowly is no silent upstream."""
    client = await bench.mute()
    await client.send(get())
    peer = await bench.upstream.peer()
    await peer.request()
    size = 16_000_000
    pieces = [bytes(200_000)] * (size // 200_000)
    writing = asyncio.ensure_future(peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d" % size + BLANK, *pieces))
    await asyncio.sleep(0.6)
    assert not writing.done()
    client.resume()
    assert size == len((await client.answer()).body)
    await writing


@rule("contract 2", read_timeout="0.2")
async def test_upstream_stops_reading(bench: Bench) -> None:
    """An upstream that stops taking the body for the read time-out gives 504, and the request stays incomplete."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Content-Length: 100000000"))
    await bench.upstream.peer()

    async def pour() -> None:
        while True:
            await client.send(bytes(1 << 18))

    task = asyncio.ensure_future(pour())
    answer = await client.answer()
    task.cancel()
    assert (504, "upstream-timeout") == (answer.status, answer.slug)


@rule("8446 6.1", tls=True)
@pytest.mark.parametrize("version", VERSIONS)
async def test_tls_truncated(bench: Bench, version: str) -> None:
    """Over TLS an end without close_notify is no end: an answer that lasts until then is broken."""

    async def play(peer: Peer) -> None:
        await peer.send(TO_THE_END)
        await asyncio.sleep(0.02)
        peer.writer.transport.abort()

    await broken(bench, version, play)


@rule("8446 6.1", tls=True)
@pytest.mark.parametrize("version", VERSIONS)
async def test_tls_ended(bench: Bench, version: str) -> None:
    """Over TLS an end with close_notify is one."""
    bench.upstream.plays(sending(TO_THE_END))
    client = await bench.client()
    await client.send(head(f"GET /x HTTP/{version}"))
    assert b"abc" == (await client.answer()).body


@rule("9112 9.8", client_tls=True)
@pytest.mark.parametrize("version", VERSIONS)
async def test_broken_to_a_tls_client(bench: Bench, version: str) -> None:
    """A TLS client sees a broken transfer as one, by a reset where it reads until the end."""
    await broken(bench, version, sending(CHUNKS))


@rule("9112 9.6", client_tls=True)
async def test_refusal_to_a_tls_client(bench: Bench) -> None:
    """A TLS client gets refusals and their end."""
    client = await bench.client()
    await client.send(b"nonsense" + BLANK)
    assert 501 == (await client.answer()).status


@rule("9112 6.3", tls=True)
async def test_tls_upload_and_download(bench: Bench) -> None:
    """Large bodies pass through TLS in both directions."""

    async def echo(peer: Peer) -> None:
        await peer.send(answered(body=bench.upstream.requests[-1].body))

    bench.upstream.plays(echo)
    client = await bench.client()
    body = bytes(range(256)) * 8000
    for _ in range(2):
        await client.send(post(body))
        assert body == (await client.answer()).body
    assert 1 == len(bench.upstream.peers)


EARLY = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\n\r\ntoo big"
UPLOADS = {"length": "Content-Length: 2000000", "chunked": "Transfer-Encoding: chunked"}


async def refused_early(bench: Bench, framing: str) -> None:
    """Assert that what the upstream answers in mid-upload reaches the client, though it then resets the connection."""
    piece = bytes(50_000) if framing == "length" else b"c350\r\n" + bytes(50_000) + b"\r\n"
    for _ in range(10):
        client = await bench.client()
        await client.send(head("POST /x HTTP/1.1", UPLOADS[framing]))
        pouring = asyncio.ensure_future(client.send(*[piece] * 40))
        peer = await bench.upstream.peer()
        await peer.begun()
        await peer.send(EARLY)
        peer.reset()
        answer = await client.answer()
        assert (413, b"too big", b"close") == (answer.status, answer.body, answer.value(b"Connection"))
        await pouring
        client.close()


@rule("9112 9.5")
@pytest.mark.parametrize("framing", UPLOADS)
async def test_refused_early(bench: Bench, framing: str) -> None:
    """An answer in mid-upload is passed on, even where the upstream resets the connection right behind it."""
    await refused_early(bench, framing)


@rule("9112 9.5", tls=True)
@pytest.mark.parametrize("framing", UPLOADS)
async def test_refused_early_over_tls(bench: Bench, framing: str) -> None:
    """The same holds over TLS."""
    await refused_early(bench, framing)


@rule("9112 9.5")
@pytest.mark.parametrize(("status", "goes_on"), [(b"413", False), (b"303", False), (b"200", True)])
async def test_rest_of_an_upload(bench: Bench, status: bytes, goes_on: bool) -> None:  # noqa: FBT001 - a column
    """Once an answer begins that is no success, no more of the body is sent; a success may want it."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Content-Length: 6"), b"abc", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    assert b"abc" == await peer.exactly(3)
    await peer.send(LENGTH.replace(b"200", status))
    await client.until(b"\nabc")
    await client.send(b"def")
    if goes_on:
        assert b"def" == await peer.exactly(3)
    else:
        await peer.silent()
    await peer.send(b"defghij")
    assert b"defghij" == await client.exactly(7)


@rule("contract 4")
async def test_token_refused_early(bench: Bench) -> None:
    """A 401 in mid-upload is replayed with a new token, body and all, though the upstream resets the connection."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Content-Length: 6"), b"abc", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    assert b"abc" == await peer.exactly(3)
    await peer.send(answered(status="401 Unauthorized"))
    peer.reset()
    peer = await bench.upstream.peer()
    await client.send(b"def")
    assert b"abcdef" == (await peer.request()).body
    await peer.send(OK)
    assert 200 == (await client.answer()).status


@rule("contract 4", replay_limit="2")
async def test_token_refused_early_and_body_gone(bench: Bench) -> None:
    """The same with a body that was not kept: 503, and the tool sends it again."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Content-Length: 6"), b"abc", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    assert b"abc" == await peer.exactly(3)
    await peer.send(answered(status="401 Unauthorized"))
    peer.reset()
    answer = await client.answer()
    assert (503, "retry-with-new-token", b"no") == (answer.status, answer.slug, answer.value(b"X-Metquay-Proxy-Sent"))


@rule("9112 7.1.1")
@pytest.mark.parametrize("version", VERSIONS)
async def test_padded_chunk_sizes(bench: Bench, version: str) -> None:
    """Blanks after a chunk's size, as old servers write them, are read."""
    bench.upstream.plays(CHUNKS + b"4   \r\ndefg\r\n0     \r\n\r\n")
    client = await bench.client()
    await client.send(head(f"GET /x HTTP/{version}"))
    assert b"abcdefg" == (await client.answer()).body


@rule("9112 7.1.1")
async def test_padded_chunk_sizes_of_the_client(bench: Bench) -> None:
    """Of a client they are refused: another server may read them differently."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked") + b"3 \r\nabc\r\n0\r\n\r\n")
    assert 400 == (await client.answer()).status
    await asyncio.sleep(0.02)
    assert [] == bench.upstream.requests
