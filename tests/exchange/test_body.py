from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import pytest
from aiohttp import EMPTY_PAYLOAD, StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given, settings
from hypothesis import strategies as st

from metquay_proxy.exchange.body import HIGH_WATER, ReplayBudget, RequestBody, Stream
from metquay_proxy.rules.errors import ProxyError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


@pytest.fixture
async def source() -> AsyncIterator[StreamReader]:
    """Yield aiohttp's own reader, on a connection that stays open; the test feeds it."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    transport, protocol = await loop.create_connection(lambda: BaseProtocol(loop), sock=ours)
    with theirs:
        yield StreamReader(protocol, 2**16, loop=loop)
        transport.close()


def fed(source: StreamReader, *chunks: bytes, ended: bool = True) -> StreamReader:
    """Let chunks arrive, and the end after them."""
    for chunk in chunks:
        source.feed_data(chunk)
    if ended:
        source.feed_eof()
    return source


def body_of(
    source: StreamReader, *, limit: int = 10, budget: ReplayBudget | None = None, timeout: float = 60.0
) -> RequestBody:
    """Return a body with small bounds."""
    return RequestBody(
        source, present=True, chunked=False, limit=limit, budget=budget or ReplayBudget(100), timeout=timeout
    )


async def sent(body: RequestBody) -> list[bytes]:
    """Send the body once."""
    return [chunk async for chunk in body.chunks()]


class TestWhole:
    async def test_no_body(self) -> None:
        """A request without a body is complete from the start, and can be sent any number of times."""
        budget = ReplayBudget(-1)
        body = RequestBody(EMPTY_PAYLOAD, present=False, chunked=False, limit=0, budget=budget, timeout=1.0)
        await body.prefetch()
        assert (True, True) == (body.ended, body.arrived)
        assert [b"", b""] == [body.whole(), body.whole()]
        assert [] == await sent(body)
        assert body.replayable
        assert -1 == budget.left

    async def test_no_body_while_more_may_come(self, source: StreamReader) -> None:
        """What the head does not announce is not waited for."""
        body = RequestBody(source, present=False, chunked=False, limit=9, budget=ReplayBudget(9), timeout=0)
        await body.prefetch()
        assert (True, b"", []) == (body.arrived, body.whole(), await sent(body))

    async def test_a_body_that_has_arrived(self, source: StreamReader) -> None:
        """It is sent in one piece, again and again."""
        body = body_of(fed(source, b"ab", b"cd"))
        assert (True, False) == (body.arrived, body.ended)
        assert [b"abcd", b"abcd"] == [body.whole(), body.whole()]
        assert (True, True) == (body.ended, body.replayable)
        assert [b"abcd"] == await sent(body)
        assert body.replayable

    async def test_a_body_on_its_way(self, source: StreamReader) -> None:
        """Nothing is awaited and nothing lost: what has not arrived is streamed."""
        body = body_of(fed(source, b"ab", ended=False))
        assert body.whole() is None
        assert not body.arrived
        fed(source, b"cd")
        assert body.arrived
        assert b"abcd" == body.whole()

    async def test_an_empty_body(self, source: StreamReader) -> None:
        """An announced body may turn out empty: no empty piece is sent, which would end a chunked body twice."""
        body = body_of(fed(source))
        assert [b"", b""] == [body.whole(), body.whole()]
        assert [] == await sent(body)

    async def test_a_body_beyond_the_limit(self, source: StreamReader) -> None:
        """It is sent once and not kept; no second attempt can send less than all of it unnoticed."""
        budget = ReplayBudget(100)
        body = body_of(fed(source, b"x" * 11), budget=budget)
        assert b"x" * 11 == body.whole()
        assert not body.replayable
        assert 100 == budget.left
        with pytest.raises(RuntimeError, match="not kept"):
            body.whole()
        with pytest.raises(RuntimeError, match="not kept"):
            await sent(body)

    async def test_a_body_at_the_limit(self, source: StreamReader) -> None:
        """The limit itself is within it."""
        budget = ReplayBudget(10)
        body = body_of(fed(source, b"x" * 10), budget=budget)
        assert [b"x" * 10] * 2 == [body.whole(), body.whole()]
        assert (True, 0) == (body.replayable, budget.left)

    async def test_what_others_keep_counts(self, source: StreamReader) -> None:
        """Where all bodies together hold too much, this one is sent once and not kept."""
        budget = ReplayBudget(3)
        body = body_of(fed(source, b"abcd"), budget=budget)
        assert b"abcd" == body.whole()
        assert (False, 3) == (body.replayable, budget.left)

    async def test_what_was_read_ahead_comes_first(self, source: StreamReader) -> None:
        """Bytes that were read while the request waited are a part of the body like any other."""
        body = body_of(fed(source, b"ab", ended=False), limit=2)
        await body.prefetch()
        fed(source, b"cd")
        assert b"abcd" == body.whole()


class TestChunks:
    async def test_every_attempt_begins_at_the_beginning(self, source: StreamReader) -> None:
        """What an attempt that failed in mid-body has read is sent by the next one, and the rest after it."""
        body = body_of(fed(source, b"ab", ended=False))
        first = body.chunks()
        assert b"ab" == await anext(first)
        fed(source, b"cd", ended=False)
        assert b"cd" == await anext(first)
        await first.aclose()
        fed(source, b"ef")
        assert [b"ab", b"cd", b"ef"] == await sent(body)
        assert body.ended
        assert body.replayable

    async def test_a_cancelled_attempt_loses_nothing(self, source: StreamReader) -> None:
        """Bytes that arrive while the attempt that waits for them is cancelled go to the next one."""
        body = body_of(source)
        attempt = asyncio.ensure_future(anext(body.chunks()))
        await asyncio.sleep(0)
        fed(source, b"ab")
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        assert [b"ab"] == await sent(body)

    async def test_the_end_may_come_by_itself(self, source: StreamReader) -> None:
        """A last read that brings only the end adds no empty piece."""
        body = body_of(fed(source, b"ab", ended=False))
        chunks = body.chunks()
        assert b"ab" == await anext(chunks)
        assert not body.ended
        fed(source)
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        assert body.ended

    async def test_beyond_the_limit(self, source: StreamReader) -> None:
        """From the piece on that passes the limit nothing is kept, and the body goes on to its end."""
        budget = ReplayBudget(100)
        body = body_of(fed(source, b"x" * 10, ended=False), budget=budget)
        chunks = body.chunks()
        assert b"x" * 10 == await anext(chunks)
        assert (True, 90) == (body.replayable, budget.left)
        fed(source, b"y", ended=False)
        assert b"y" == await anext(chunks)
        assert (False, 100) == (body.replayable, budget.left)
        fed(source, b"z" * 50)
        assert [b"z" * 50] == [chunk async for chunk in chunks]
        assert 100 == budget.left

    async def test_beyond_what_all_may_keep(self, source: StreamReader) -> None:
        """The budget of all bodies ends the keeping as the limit does, and gets its bytes back."""
        budget = ReplayBudget(3)
        body = body_of(fed(source, b"ab", b"cd"), budget=budget)
        assert b"abcd" == b"".join(await sent(body))
        assert (False, 3) == (body.replayable, budget.left)

    async def test_a_limit_of_zero(self, source: StreamReader) -> None:
        """Nothing is kept, nothing is read ahead, and everything is sent."""
        body = body_of(fed(source, b"ab"), limit=0)
        await body.prefetch()
        assert not body.ended
        assert [b"ab"] == await sent(body)
        assert not body.replayable

    async def test_once_given_away(self, source: StreamReader) -> None:
        """A body that was closed is not sent from its middle."""
        body = body_of(fed(source, b"ab", ended=False))
        assert b"ab" == await anext(body.chunks())
        body.close()
        fed(source, b"cd")
        with pytest.raises(RuntimeError, match="only a part"):
            await sent(body)
        with pytest.raises(RuntimeError, match="only a part"):
            await body.all(100)

    async def test_closed_in_mid_attempt(self, source: StreamReader) -> None:
        """The attempt that runs goes on, and no byte is kept that nobody would give back."""
        budget = ReplayBudget(100)
        body = body_of(fed(source, b"ab", ended=False), budget=budget)
        chunks = body.chunks()
        assert b"ab" == await anext(chunks)
        body.close()
        fed(source, b"cd")
        assert [b"cd"] == [chunk async for chunk in chunks]
        assert 100 == budget.left

    async def test_a_client_that_breaks_off(self, source: StreamReader) -> None:
        """What the server found wrong with the body is raised as it is, never taken for its end."""
        body = body_of(fed(source, b"ab", ended=False))
        chunks = body.chunks()
        assert b"ab" == await anext(chunks)
        source.set_exception(web.RequestPayloadError("broken"))
        with pytest.raises(web.RequestPayloadError, match="broken"):
            await anext(chunks)
        assert not body.ended


class TestSilence:
    @pytest.mark.parametrize("way", ["chunks", "prefetch", "all"])
    async def test_a_silent_client(self, source: StreamReader, way: str) -> None:
        """A client that announces a body and sends nothing is told so; nothing complete was sent."""
        body = body_of(fed(source, b"ab", ended=False), timeout=0)
        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "chunks": lambda: sent(body),
            "prefetch": body.prefetch,
            "all": lambda: body.all(100),
        }
        with pytest.raises(ProxyError, match="nothing for 0 seconds") as caught:
            await ways[way]()
        assert (408, "request-timeout", "no") == (caught.value.status, caught.value.slug, caught.value.sent)

    async def test_the_time_begins_anew_with_each_byte(self, source: StreamReader) -> None:
        """A slow client is not a silent one: what is there is taken, however short the time."""
        body = body_of(source, timeout=0)
        chunks = body.chunks()
        for chunk in (b"a", b"b", b"c"):
            fed(source, chunk, ended=False)
            assert chunk == await anext(chunks)


class TestPrefetch:
    async def test_it_stops_at_the_limit(self, source: StreamReader) -> None:
        """No more is read ahead than may be kept, so that the client feels the back-pressure."""
        body = body_of(fed(source, b"x" * 9, ended=False))
        task = asyncio.ensure_future(body.prefetch())
        await asyncio.sleep(0)
        assert not task.done()
        fed(source, b"y" * 5, ended=False)
        await task
        fed(source, b"z")
        assert not body.ended
        assert [b"x" * 9, b"y" * 5, b"z"] == await sent(body)
        assert not body.replayable

    async def test_it_stops_at_what_all_may_keep(self, source: StreamReader) -> None:
        """An exhausted budget ends the reading ahead; what was read is still sent."""
        budget = ReplayBudget(2)
        body = body_of(fed(source, b"ab", ended=False), budget=budget)
        await body.prefetch()
        assert 0 == budget.left
        fed(source, b"cd")
        await body.prefetch()
        assert not body.ended
        assert [b"ab", b"cd"] == await sent(body)

    async def test_it_stops_at_the_end(self, source: StreamReader) -> None:
        """A body that was read whole can be sent whole."""
        body = body_of(fed(source, b"ab", b"cd"))
        await body.prefetch()
        assert body.ended
        assert b"abcd" == body.whole()

    async def test_it_takes_nothing_from_a_body_that_is_not_kept(self, source: StreamReader) -> None:
        """Bytes that can't be kept are left for the attempt that runs."""
        body = body_of(fed(source, b"x" * 11, ended=False))
        chunks = body.chunks()
        assert b"x" * 11 == await anext(chunks)
        fed(source, b"y")
        await body.prefetch()
        assert [b"y"] == [chunk async for chunk in chunks]


class TestAll:
    async def test_it_can_still_be_sent(self, source: StreamReader) -> None:
        """Who looks at the body first takes nothing from it, whatever other bodies keep."""
        budget = ReplayBudget(0)
        body = body_of(fed(source, b"ab", b"cd"), budget=budget)
        assert b"abcd" == await body.all(4)
        assert b"abcd" == await body.all(4)
        assert b"abcd" == body.whole()
        body.close()
        assert 0 == budget.left

    async def test_it_is_empty_without_a_body(self) -> None:
        """No body is an empty one."""
        body = RequestBody(EMPTY_PAYLOAD, present=False, chunked=False, limit=9, budget=ReplayBudget(9), timeout=1.0)
        assert b"" == await body.all(0)

    async def test_it_includes_what_an_attempt_has_read(self, source: StreamReader) -> None:
        """It begins at the beginning, as every attempt does."""
        body = body_of(fed(source, b"ab", ended=False))
        assert b"ab" == await anext(body.chunks())
        fed(source, b"cd")
        assert b"abcd" == await body.all(10)

    @pytest.mark.parametrize("more", [b"", b"e"])
    async def test_the_limit_is_not_the_end(self, source: StreamReader, more: bytes) -> None:
        """A body that has reached the bound is complete only once its end has come."""
        body = body_of(fed(source, b"abcd", ended=False))
        reading = asyncio.ensure_future(body.all(4))
        await asyncio.sleep(0)
        assert not reading.done()
        fed(source, *([more] if more else []))
        with pytest.raises(ProxyError) if more else contextlib.nullcontext():
            assert b"abcd" == await reading

    async def test_too_large(self, source: StreamReader) -> None:
        """The refusal comes as soon as the bound is passed: an endless body is not awaited."""
        body = body_of(fed(source, b"abc", ended=False))
        with pytest.raises(ProxyError, match="the 2 bytes") as caught:
            await body.all(2)
        assert (413, "body-too-large", "no") == (caught.value.status, caught.value.slug, caught.value.sent)


async def test_close_gives_back_once(source: StreamReader) -> None:
    """What was kept is given back to the others exactly once."""
    budget = ReplayBudget(100)
    body = body_of(fed(source, b"ab", ended=False), budget=budget)
    await anext(body.chunks())
    assert 98 == budget.left
    body.close()
    body.close()
    assert 100 == budget.left


def test_what_the_head_said() -> None:
    """Whether it came chunked is at hand for whoever frames it; sent is the sender's to set."""
    for chunked in (True, False):
        body = RequestBody(EMPTY_PAYLOAD, present=True, chunked=chunked, limit=1, budget=ReplayBudget(1), timeout=1.0)
        assert (chunked, False) == (body.chunked, body.sent)


class Pieces:
    """A source whose bytes are all there, and come one piece a read."""

    def __init__(self, pieces: list[bytes], *, marked: bool) -> None:
        """``marked``: the end comes with the last piece, else by itself."""
        self._pieces = pieces if marked else [*pieces, b""]
        self._next = 0

    def is_eof(self) -> bool:
        """Whether the last byte has arrived: it is not told before the last piece."""
        return self._next >= len(self._pieces) - 1

    def at_eof(self) -> bool:
        """Whether the last byte was read."""
        return self._next >= len(self._pieces)

    def read_nowait(self, _n: int = -1, /) -> bytes:
        """Return all that is left."""
        rest = b"".join(self._pieces[self._next :])
        self._next = len(self._pieces)
        return rest

    async def readany(self) -> bytes:
        """Return the next piece."""
        piece = b"".join(self._pieces[self._next : self._next + 1])
        self._next += 1
        return piece


@given(
    st.lists(st.binary(min_size=1, max_size=6), max_size=8),
    st.booleans(),
    st.integers(0, 20),
    st.integers(-5, 40),
    st.lists(st.tuples(st.sampled_from(["prefetch", "part", "whole", "all"]), st.integers(0, 5)), max_size=6),
)
@settings(deadline=None)
def test_whatever_is_tried_the_body_is_sent_whole_or_not_at_all(
    pieces: list[bytes],
    marked: bool,  # noqa: FBT001 - drawn, not passed by people
    limit: int,
    left: int,
    steps: list[tuple[str, int]],
) -> None:
    """After any attempts every further one sends the same bytes, or is refused; the bounds hold, the books balance."""
    complete = b"".join(pieces)
    budget = ReplayBudget(left)
    body = RequestBody(
        Pieces(pieces, marked=marked), present=True, chunked=True, limit=limit, budget=budget, timeout=60.0
    )

    async def attempts() -> None:
        for step, count in steps:
            if not body.replayable:
                break
            if step == "prefetch":
                await body.prefetch()
            elif step == "whole":
                assert body.whole() in {None, complete}
            elif step == "all":
                with contextlib.suppress(ProxyError):
                    assert complete == await body.all(10 * count)
            else:
                chunks = body.chunks()
                part = b"".join([await anext(chunks, b"") for _ in range(count)])
                assert complete.startswith(part)
                await chunks.aclose()
        if body.replayable:
            assert complete == b"".join(await sent(body))
            assert body.ended
            assert not body.replayable or len(complete) <= limit
        else:
            with pytest.raises(RuntimeError):
                body.whole()

    asyncio.run(attempts())
    body.close()
    assert left == budget.left


async def test_on_a_real_connection() -> None:
    """Fed by aiohttp's server: a body in two halves is sent twice, its end is seen, and a broken one is no end."""
    results: asyncio.Queue[list[bytes] | BaseException] = asyncio.Queue()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        body = body_of(request.content, limit=100)
        try:
            await results.put([b"".join(await sent(body)), b"".join(await sent(body))])
        except (web.RequestPayloadError, ConnectionError) as error:
            await results.put(error)
        return web.Response()

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\nabcd")
        await writer.drain()
        writer.write(b"efgh")
        assert [b"abcdefgh", b"abcdefgh"] == await results.get()
        assert b"HTTP/1.1 200 OK\r\n" == await reader.readline()
        writer.close()
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n")
        writer.write_eof()
        assert isinstance(await results.get(), Exception)
        writer.close()
    finally:
        await runner.cleanup()


class TestStream:
    def test_pieces_come_out_as_they_came(self) -> None:
        """Whoever reads late gets all that waits at once; the end is what says that no more comes."""
        stream = Stream()
        assert b"" == stream.read_nowait()
        stream.feed(b"ab")
        stream.feed(b"cd")
        assert b"abcd" == stream.read_nowait()
        assert not stream.ended
        stream.feed(b"e")
        stream.end()
        assert (True, False) == (stream.arrived, stream.ended)
        assert b"e" == stream.read_nowait()
        assert stream.ended

    async def test_a_reader_is_woken_by_each_kind_of_news(self) -> None:
        """A piece, the end and a failure end its waiting."""
        stream = Stream()
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        stream.feed(b"a")
        assert b"a" == await reading
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        stream.end()
        assert b"" == await reading

    async def test_what_came_before_a_failure_is_read_first(self) -> None:
        """The first failure counts; one after the end is none."""
        stream = Stream()
        stream.feed(b"a")
        stream.fail(ConnectionResetError("first"))
        stream.fail(ConnectionResetError("second"))
        assert b"a" == await stream.read()
        with pytest.raises(ConnectionResetError, match="first"):
            await stream.read()
        whole = Stream.of(b"b")
        whole.fail(ConnectionResetError())
        assert b"b" == await whole.read()
        assert b"" == await whole.read()

    async def test_a_reader_that_left_is_not_woken(self) -> None:
        """Its future was cancelled, and news of the stream do it no harm."""
        stream = Stream()
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        reading.cancel()
        stream.feed(b"a")
        await asyncio.gather(reading, return_exceptions=True)
        assert b"a" == await stream.read()

    def test_the_sender_is_held_up_while_too_much_waits(self) -> None:
        """It is told once, and told again when the reader has taken it, or nothing more will come."""
        told: list[bool] = []
        stream = Stream(told.append)
        stream.feed(bytes(HIGH_WATER))
        assert [] == told
        stream.feed(b"a")
        stream.feed(b"a")
        assert [True] == told
        stream.read_nowait()
        assert [True, False] == told
        stream.feed(bytes(HIGH_WATER + 1))
        stream.end()
        assert [True, False, True, False] == told

    def test_what_was_read_can_be_put_back(self) -> None:
        """It comes first again, even after the end."""
        stream = Stream.of(b"cd")
        stream.read_nowait()
        stream.unread(b"")
        assert stream.ended
        stream.unread(b"cd")
        stream.unread(b"ab")
        assert not stream.ended
        assert b"abcd" == stream.read_nowait()

    def test_no_body(self) -> None:
        """It has arrived and ended."""
        assert Stream.of().ended
