"""Bounds of size and time: what goes beyond is refused, memory stays bounded, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.downstream.connection import Bounds
from tests.wire import BLANK, OK, Broken, Peer, answered, eventually, get, head, post, rule

if TYPE_CHECKING:
    from tests.wire import Bench, Client

QUICK = Bounds(head=0.15, idle=0.3, linger=0.3)


def sized(size: int) -> bytes:
    """Return a GET of so many bytes in all, with fields of 2 KiB."""
    field = b"X: " + b"a" * 2043 + b"\r\n"
    start = b"GET /x HTTP/1.1\r\nHost: localhost\r\n"
    count = (size - len(start) - 200) // len(field)
    rest = size - len(start) - count * len(field) - 2
    return start + field * count + b"Y: " + b"b" * (rest - 5) + b"\r\n\r\n"


@rule("contract 6")
async def test_head_size(bench: Bench) -> None:
    """A head of 128 KiB is taken, one byte more is refused with 431, in one segment or many."""
    for cut in (0, 70_000):
        client = await bench.client()
        bench.upstream.plays(OK)
        data = sized(128 * 1024)
        assert 128 * 1024 == len(data)
        await client.send(data[:cut], data[cut:], pause=0.01)
        assert 200 == (await client.answer()).status
        client = await bench.client()
        data = sized(128 * 1024 + 1)
        await client.send(data[:cut], data[cut:], pause=0.01)
        answer = await client.answer()
        assert (431, "head-too-large") == (answer.status, answer.slug)
        await client.ended()


@rule("contract 6")
async def test_head_size_on_a_used_connection(bench: Bench) -> None:
    """The bound is for each head, not for the connection; pipelined heads are counted apart."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(sized(100_000) + sized(100_000) + sized(140_000))
    assert [200, 200, 431] == [(await client.answer()).status for _ in range(3)]


@rule("contract 6")
async def test_line_size(bench: Bench) -> None:
    """A request line of 64 KiB is taken, a longer one is refused with 431."""
    longest = 64 * 1024 - len("GET  HTTP/1.1")
    assert 200 == (await bench.ask(get("/" + "a" * (longest - 1)))).status
    for size in (longest, longest + 20_000):
        client = await bench.client()
        await client.send(get("/" + "a" * size))
        assert (431, "head-too-large") == ((answer := await client.answer()).status, answer.slug)


@rule("contract 6")
async def test_field_size(bench: Bench) -> None:
    """One field may be as large as the head."""
    request = await bench.forwarded(get("/x", b"Cookie: " + b"a" * 100_000))
    assert 100_000 == len(request.value(b"Cookie") or b"")


@rule("contract 6")
async def test_field_count(bench: Bench) -> None:
    """128 fields are taken, 129 are refused with 431."""
    request = await bench.forwarded(get("/x", *[f"X{number}: y" for number in range(127)]))
    assert 129 == len(request.fields)
    bench.upstream.peers.clear()
    await bench.refused(get("/x", *[f"X{number}: y" for number in range(128)]), 431, "head-too-large")


@rule("contract 6")
@pytest.mark.parametrize("piece", [b"X: " + b"a" * 5000 + b"\r\n", b"a" * 5000, b"X: y\r\n"])
async def test_endless_head(bench: Bench, piece: bytes) -> None:
    """An endless head is refused with 431, which reaches a client that is still sending; others are served."""
    client = await bench.client()
    async with client.pouring(b"GET /x HTTP/1.1\r\nHost: localhost\r\nX: ", piece):
        answer = await client.answer()
        assert (431, "head-too-large") == (answer.status, answer.slug)
        await bench.healthy()


@rule("contract 6")
async def test_endless_target(bench: Bench) -> None:
    """An endless request line is refused with 431."""
    client = await bench.client()
    async with client.pouring(b"GET /", b"a" * 5000):
        assert 431 == (await client.answer()).status


@rule("contract 6", bounds=QUICK)
@pytest.mark.parametrize(
    "before",
    [
        b"",
        get("/1"),
        post(b"abc"),
        post(b"a\r\n\r\nb"),
        head("POST /x HTTP/1.1", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("begun", [b"G", b"GET /x HTTP/1.1\r\nHost: loc", b"GET /x HTTP/1.1\r\nHost: localhost\r\n"])
async def test_late_head(bench: Bench, begun: bytes, before: bytes) -> None:
    """A head that is not complete in time is refused with 408, behind a request in the same segment too."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(before + begun)
    if before:
        assert 200 == (await client.answer()).status
    began = time.monotonic()
    answer = await client.answer()
    assert (408, "request-timeout", b"close") == (answer.status, answer.slug, answer.value(b"Connection"))
    assert time.monotonic() - began > 0.05
    await client.ended()


@rule("contract 6", bounds=QUICK)
async def test_dripping_head(bench: Bench) -> None:
    """The time of a head counts from its first byte: single bytes don't extend it."""
    client = await bench.client()
    await client.send(b"GET /x HTTP/1.1\r\nX: ")
    task = asyncio.ensure_future(client.send(*[b"a"] * 50, pause=0.02))
    assert 408 == (await client.answer()).status
    task.cancel()


@rule("contract 6", bounds=QUICK)
@pytest.mark.parametrize("bytes_", [b"", b"\r\n"])
async def test_silent_connection(bench: Bench, bytes_: bytes) -> None:
    """A new connection that begins no request in time is closed."""
    client = await bench.client()
    await client.send(bytes_)
    await client.ended()
    await bench.healthy()


@rule("contract 6", bounds=QUICK)
async def test_idle_connection(bench: Bench) -> None:
    """A connection that idles after a request is closed after the idle time."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(get())
    assert 200 == (await client.answer()).status
    began = time.monotonic()
    await client.ended()
    assert time.monotonic() - began > 0.25


@rule("contract 6", bounds=QUICK)
async def test_idle_time_spares_a_begun_head(bench: Bench) -> None:
    """A head that begins late in the idle time has its whole time, and is answered 408 rather than cut."""
    client = await bench.client()
    bench.upstream.plays(OK)
    for end in (b"\r\n\r\n", None):
        await client.send(get())
        assert 200 == (await client.answer()).status
        await asyncio.sleep(0.24)
        await client.send(b"GET /x HTTP/1.1\r\nHost: localhost")
        await asyncio.sleep(0.1)
        if end is not None:
            await client.send(end)
            assert 200 == (await client.answer()).status
        else:
            assert 408 == (await client.answer()).status


@rule("contract 6", bounds=QUICK)
async def test_times_spare_a_running_request(bench: Bench) -> None:
    """Neither time runs while a request is served, however long that takes."""
    client = await bench.client()
    await client.send(get())
    peer = await bench.upstream.peer()
    await peer.request()
    await asyncio.sleep(0.45)
    await peer.send(OK)
    assert 200 == (await client.answer()).status
    await client.send(get())
    await peer.request()
    await peer.send(OK)
    assert 200 == (await client.answer()).status


@rule("contract 6", read_timeout="0.15", bounds=Bounds(linger=0.2))
@pytest.mark.parametrize("framing", ["Content-Length: 10", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("part", [b"", b"3\r\nabc\r\n"])
async def test_silent_body(bench: Bench, framing: str, part: bytes) -> None:
    """A body that brings no byte for the read time-out is answered 408, and never becomes complete upstream."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", framing), part, pause=0.01)
    answer = await client.answer()
    assert (408, "request-timeout", b"close") == (answer.status, answer.slug, answer.value(b"Connection"))
    await client.ended()
    assert [] == bench.upstream.requests
    await bench.healthy()


@rule("contract 6", bounds=QUICK)
async def test_refused_and_still_sending(bench: Bench) -> None:
    """A refused client that goes on sending is cut off after a while."""
    client = await bench.client()
    async with client.pouring(b"NONSENSE\r\n\r\n", bytes(50_000)):
        assert 501 == (await client.answer()).status
        await client.ended()
        await eventually(lambda: client.writer.transport.is_closing() or client.reader.exception() is not None)


@rule("9112 7.1.1")
async def test_endless_extension(bench: Bench) -> None:
    """An endless chunk extension of a client is refused."""
    client = await bench.client()
    async with client.pouring(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked"), b"1;", b"a" * 500):
        assert (400, "bad-request") == ((answer := await client.answer()).status, answer.slug)
        await bench.healthy()


@rule("9112 7.1.2")
@pytest.mark.parametrize("piece", [b"X: y\r\n", b"a" * 500, b"X: " + b"a" * 5000 + b"\r\n"])
async def test_endless_trailers(bench: Bench, piece: bytes) -> None:
    """Endless trailers of a client are refused."""
    client = await bench.client()
    async with client.pouring(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked"), b"0\r\nX: ", piece):
        assert (400, "bad-request") == ((answer := await client.answer()).status, answer.slug)


@rule("9112 7.1")
async def test_tiny_chunks(bench: Bench) -> None:
    """A body in twenty thousand chunks of one byte is taken in time that grows with its size only."""
    client = await bench.client()
    bench.upstream.plays(OK)
    count = 20_000
    await client.send(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked"), b"1\r\na\r\n" * count, b"0\r\n\r\n")
    assert 200 == (await client.answer()).status
    assert count == len(bench.upstream.requests[0].body)


@rule("9112 9.3.2")
async def test_endless_pipeline(bench: Bench) -> None:
    """A client that pipelines without reading is held up, and memory stays bounded."""
    client = await bench.client()
    assert await client.pour_until_held_up(get() * 1000) < 400_000 * len(get())
    peer = await bench.upstream.peer()
    assert 1 == bench.proxy.telemetry.active
    await bench.healthy()
    await peer.request()


@rule("9110 15.2", retries="0")
async def test_endless_interim(bench: Bench) -> None:
    """Endless interim answers give 502."""

    async def play(peer: Peer) -> None:
        await peer.pour(b"HTTP/1.1 102 Processing\r\n\r\n")

    bench.upstream.plays(play)
    client = await bench.client()
    await client.send(get())
    assert (502, "upstream-protocol") == ((answer := await client.answer()).status, answer.slug)
    await bench.healthy()


@rule("contract 6", retries="0")
@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"a" * 5000),
        (b"HTTP/1.1 200 ", b"a" * 5000),
        (b"a" * 5000,),
        (b"HTTP/1.1 200 OK\r\nX: y\r\n" * 300 + BLANK, OK),
    ],
)
async def test_endless_head_of_an_answer(bench: Bench, pieces: tuple[bytes, ...]) -> None:
    """An endless head of an answer gives 502, and its connection is closed."""

    async def play(peer: Peer) -> None:
        await peer.pour(*pieces)

    bench.upstream.plays(play)
    client = await bench.client()
    await client.send(get())
    assert (502, "upstream-protocol") == ((answer := await client.answer()).status, answer.slug)
    await bench.healthy()


@rule("contract 6", retries="0", read_timeout="0.2")
async def test_dripping_answer(bench: Bench) -> None:
    """A head that stops in the middle is silence."""

    async def play(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n")
        await asyncio.sleep(1)

    answer = await bench.ask(get(), play)  # type: ignore[arg-type]
    assert (504, "upstream-timeout") == (answer.status, answer.slug)


@rule("9112 7.1.1")
@pytest.mark.parametrize(
    "pieces", [(b"1;", b"a" * 500), (b"0\r\nX: ", b"a" * 500), (b"0\r\n", b"X: y\r\n"), (b"0" * 500,)]
)
async def test_endless_chunk_lines_of_an_answer(bench: Bench, pieces: tuple[bytes, ...]) -> None:
    """Endless chunk extensions, sizes and trailers of an answer break the transfer."""

    async def play(peer: Peer) -> None:
        await peer.pour(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n", *pieces)

    bench.upstream.plays(play)
    client = await bench.client()
    await client.send(get())
    with pytest.raises(Broken):
        await client.answer()
    await bench.healthy()


@rule("contract 6", bounds=QUICK)
async def test_many_slow_clients(bench: Bench) -> None:
    """A hundred clients that dawdle in every way do not hold up another."""
    slow: list[Client] = []
    for data in (b"", b"GET /x HT", head("POST /x HTTP/1.1", "Content-Length: 9"), get()):
        for _ in range(25):
            slow.append(await bench.client())
            await slow[-1].send(data)
    fast = await bench.client()
    await fast.send(get("/-/live"))
    assert 200 == (await fast.answer()).status


@rule("contract 3")
async def test_constant_memory_up(bench: Bench) -> None:
    """A body of 40 MB passes without ever being held."""
    client = await bench.client()
    size, block = 40_000_000, 200_000
    await client.send(head("POST /x HTTP/1.1", f"Content-Length: {size}"))
    peer = await bench.upstream.peer()
    await peer.begun()

    async def upload() -> None:
        for _ in range(size // block):
            await client.send(bytes(block))

    tracemalloc.start()
    try:
        task = asyncio.ensure_future(upload())
        for _ in range(size // block):
            await peer.exactly(block)
            peer.got = b""
        await task
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    await peer.send(OK)
    assert 200 == (await client.answer()).status
    assert most < 8_000_000, "what client and upstream hold is a part of it"


@rule("contract 6")
@pytest.mark.parametrize(
    "request_",
    [
        *(get(), get("/../x"), post(b"{}", target="/authenticate")),
        *(pytest.param(get(path), marks=pytest.mark.slow) for path in ("/-/status", "/favicon.ico")),
    ],
)
async def test_answers_that_nobody_takes(bench: Bench, request_: bytes) -> None:
    """A client that asks again and again and reads nothing is held up, whoever answers: it costs less than 4 MiB."""
    bench.upstream.plays(answered(body=bytes(30_000)))
    client = await bench.mute()
    tracemalloc.start()
    try:
        await client.pour_until_held_up(request_ * 100)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{most / 2**20:.1f} MiB")  # noqa: T201 - shown where it fails
    assert most < 4 << 20
    await bench.healthy()


@rule("contract 6")
async def test_the_heads_of_all_requests(bench: Bench) -> None:
    """Beyond 8 MiB of large heads under way another one is refused and nothing is sent; small ones and pages go on."""
    large = head("GET /x HTTP/1.1", *(f"X-{number}: {'v' * 1000}" for number in range(120)))
    clients = [await bench.client() for _ in range((8 << 20) // len(large))]
    for client in clients:
        await client.send(large)
    peers = [await bench.upstream.peer() for _ in clients]
    refused = await bench.client()
    await refused.send(large)
    answer = await refused.answer()
    assert (431, "head-too-large", b"no") == (answer.status, answer.slug, answer.value(b"X-Metquay-Proxy-Sent"))
    await refused.gone()
    probe = await bench.client()
    await probe.send(get("/-/live"))
    assert 200 == (await probe.answer()).status
    small = await bench.client()
    await small.send(get())
    clients.append(small)
    peers.append(await bench.upstream.peer())
    for peer in peers:
        await peer.request()
        await peer.send(OK)
    assert [200] * len(clients) == [(await client.answer()).status for client in clients]
    await clients[0].send(large)
    once_more = [asyncio.ensure_future(peer.request()) for peer in peers]
    done, others = await asyncio.wait(once_more, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert 1 == len(done)
    for other in others:
        other.cancel()


@rule("contract 6", bounds=Bounds(silence=0.2))
@pytest.mark.parametrize(
    "request_",
    [
        get(),
        *(
            pytest.param(others, marks=pytest.mark.slow)
            for others in (get("/../x") * 1000, get("/-/status"), get("/-/events"))
        ),
    ],
)
async def test_a_client_that_stops_reading(bench: Bench, request_: bytes) -> None:
    """An answer of which no byte is taken for the read time-out is broken off: Metquay's, a refusal, pages, events."""
    await asyncio.gather(*[bench.ask(get("/" + "a" * 900), answered(body=bytes(1_000_000))) for _ in range(50)])
    client = await bench.mute()
    await client.send(request_)
    await eventually(lambda: not bench.proxy.server.clients)
    await eventually(lambda: not bench.proxy.telemetry.active)
    client.resume()
    with pytest.raises(Broken):
        await client.to_the_end()


@rule("9112 2.2")
@pytest.mark.parametrize("before", [b"", get()])
async def test_endless_empty_lines(bench: Bench, before: bytes) -> None:
    """A few empty lines before a request are skipped, more are refused with 400."""
    client = await bench.client()
    bench.upstream.plays(OK)
    async with client.pouring(before, b"\r\n"):
        if before:
            assert 200 == (await client.answer()).status
        answer = await client.answer()
        assert (400, "bad-request") == (answer.status, answer.slug)
        await client.ended()


@rule("contract 9")
async def test_completed_at_the_end_of_a_drain(bench: Bench) -> None:
    """A request that is completed late in a drain is told that the proxy stops, however short before the end."""
    busy = await bench.client()
    await busy.send(get())
    await bench.upstream.peer()
    clients = [await bench.client() for _ in range(24)]
    for client in clients:
        await client.send(get()[:-2])
    await asyncio.sleep(0.05)

    async def complete(client: Client, seconds: float) -> str | None:
        await asyncio.sleep(seconds)
        await client.send(b"\r\n")
        return (await client.answer()).slug

    completing = [complete(client, 0.1 + number / 200) for number, client in enumerate(clients)]
    *_, slugs = await asyncio.gather(bench.proxy.stop(0.3), asyncio.gather(*completing))
    assert {"shutting-down"} == set(slugs)


@rule("contract 6", bounds=None, read_timeout="7")
async def test_figures(bench: Bench) -> None:
    """The times of the contract are the defaults; silence is the read time-out in both directions."""
    assert Bounds(head=15, idle=120, linger=2, silence=7) == bench.proxy.server.bounds


@rule("contract 3")
async def test_nothing_is_left_behind(bench: Bench) -> None:
    """After any mix of good, bad and broken exchanges no exchange, task or connection is left."""
    bench.upstream.plays(OK)
    for data in (
        get(),
        b"NONSENSE\r\n\r\n",
        post(b"abc"),
        b"GET /x",
        head("POST /x HTTP/1.1", "Content-Length: 9") + b"a",
        answered(),
    ):
        client = await bench.client()
        await client.send(data)
        await asyncio.sleep(0.01)
        client.reset()
    await eventually(lambda: not bench.proxy.server.clients)
    assert (0, 0) == (bench.proxy.telemetry.active, bench.proxy.status()["connections"]["busy"])
