from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metquay_proxy.exchange.body import HIGH_WATER, ReplayBudget, RequestBody, Stream
from metquay_proxy.rules.errors import ProxyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@pytest.fixture
def source() -> Stream:
    """Return what a client sends; the test feeds it."""
    return Stream()


def fed(source: Stream, *chunks: bytes, ended: bool = True) -> Stream:
    """Let chunks arrive, and the end after them."""
    for chunk in chunks:
        source.feed(chunk)
    if ended:
        source.end()
    return source


def body_of(
    source: Stream, *, limit: int = 10, budget: ReplayBudget | None = None, timeout: float = 60.0
) -> RequestBody:
    """Return a body with small bounds."""
    return RequestBody(source, chunked=False, limit=limit, budget=budget or ReplayBudget(100), timeout=timeout)


async def sent(body: RequestBody) -> list[bytes]:
    """Send the body once."""
    return [chunk async for chunk in body.chunks()]


class TestWhole:
    async def test_no_body(self) -> None:
        """A request without a body is complete from the start, and can be sent any number of times."""
        budget = ReplayBudget(0)
        body = body_of(Stream.of(), limit=0, budget=budget)
        await body.prefetch()
        assert (True, True) == (body.ended, body.arrived)
        assert [b"", b""] == [body.whole(), body.whole()]
        assert [] == await sent(body)
        assert body.replayable
        assert 0 == budget.left

    async def test_a_body_that_has_arrived(self, source: Stream) -> None:
        """It is sent in one piece, again and again."""
        body = body_of(fed(source, b"ab", b"cd"))
        assert (True, False) == (body.arrived, body.ended)
        assert [b"abcd", b"abcd"] == [body.whole(), body.whole()]
        assert (True, True) == (body.ended, body.replayable)
        assert [b"abcd"] == await sent(body)
        assert body.replayable

    async def test_a_body_on_its_way(self, source: Stream) -> None:
        """Nothing is awaited and nothing lost: what has not arrived is streamed."""
        body = body_of(fed(source, b"ab", ended=False))
        assert body.whole() is None
        assert not body.arrived
        fed(source, b"cd")
        assert body.arrived
        assert b"abcd" == body.whole()

    async def test_an_empty_body(self, source: Stream) -> None:
        """An announced body may turn out empty: no empty piece is sent, which would end a chunked body twice."""
        body = body_of(source)
        fed(source)
        assert [b"", b""] == [body.whole(), body.whole()]
        assert [] == await sent(body)

    async def test_a_body_beyond_the_limit(self, source: Stream) -> None:
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

    async def test_a_body_at_the_limit(self, source: Stream) -> None:
        """The limit itself is within it."""
        budget = ReplayBudget(10)
        body = body_of(fed(source, b"x" * 10), budget=budget)
        assert [b"x" * 10] * 2 == [body.whole(), body.whole()]
        assert (True, 0) == (body.replayable, budget.left)

    async def test_what_others_keep_counts(self, source: Stream) -> None:
        """Where all bodies together hold too much, this one is sent once and not kept."""
        budget = ReplayBudget(3)
        body = body_of(fed(source, b"abcd"), budget=budget)
        assert b"abcd" == body.whole()
        assert (False, 3) == (body.replayable, budget.left)

    async def test_what_was_read_ahead_comes_first(self, source: Stream) -> None:
        """Bytes that were read while the request waited are a part of the body like any other."""
        body = body_of(fed(source, b"ab", ended=False), limit=2)
        reading = asyncio.ensure_future(body.prefetch())
        await asyncio.sleep(0)
        fed(source, b"cd")
        await reading
        assert b"abcd" == body.whole()


class TestChunks:
    async def test_every_attempt_begins_at_the_beginning(self, source: Stream) -> None:
        """What an attempt that failed in mid-body has read is sent by the next one, and the rest after it."""
        body = body_of(fed(source, b"ab", ended=False))
        first = body.chunks()
        assert b"ab" == await anext(first)
        fed(source, b"cd", ended=False)
        assert b"cd" == await anext(first)
        await first.aclose()
        fed(source, b"ef")
        assert [b"abcd", b"ef"] == await sent(body)
        assert body.ended
        assert body.replayable

    async def test_a_cancelled_attempt_loses_nothing(self, source: Stream) -> None:
        """Bytes that arrive while the attempt that waits for them is cancelled go to the next one."""
        body = body_of(source)
        attempt = asyncio.ensure_future(anext(body.chunks()))
        await asyncio.sleep(0)
        fed(source, b"ab")
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        assert [b"ab"] == await sent(body)

    async def test_the_end_may_come_by_itself(self, source: Stream) -> None:
        """A last read that brings only the end adds no empty piece."""
        body = body_of(fed(source, b"ab", ended=False))
        chunks = body.chunks()
        assert b"ab" == await anext(chunks)
        assert not body.ended
        fed(source)
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        assert body.ended

    async def test_beyond_the_limit(self, source: Stream) -> None:
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

    async def test_beyond_what_all_may_keep(self, source: Stream) -> None:
        """The budget of all bodies ends the keeping as the limit does, and gets its bytes back."""
        budget = ReplayBudget(3)
        body = body_of(fed(source, b"ab", b"cd"), budget=budget)
        assert b"abcd" == b"".join(await sent(body))
        assert (False, 3) == (body.replayable, budget.left)

    async def test_a_limit_of_zero(self, source: Stream) -> None:
        """Nothing is kept, nothing is read ahead, and everything is sent."""
        body = body_of(fed(source, b"ab"), limit=0)
        await body.prefetch()
        assert not body.ended
        assert [b"ab"] == await sent(body)
        assert not body.replayable

    async def test_once_given_away(self, source: Stream) -> None:
        """A body that was closed is not sent from its middle."""
        body = body_of(fed(source, b"ab", ended=False))
        assert b"ab" == await anext(body.chunks())
        body.close()
        fed(source, b"cd")
        with pytest.raises(RuntimeError, match="only a part"):
            await sent(body)
        with pytest.raises(RuntimeError, match="only a part"):
            body.whole()

    async def test_closed_in_mid_attempt(self, source: Stream) -> None:
        """The attempt that runs goes on, and no byte is kept that nobody would give back."""
        budget = ReplayBudget(100)
        body = body_of(fed(source, b"ab", ended=False), budget=budget)
        chunks = body.chunks()
        assert b"ab" == await anext(chunks)
        body.close()
        fed(source, b"cd")
        assert [b"cd"] == [chunk async for chunk in chunks]
        assert 100 == budget.left

    async def test_a_client_that_breaks_off(self, source: Stream) -> None:
        """What the server found wrong with the body is raised as it is, never taken for its end."""
        body = body_of(fed(source, b"ab", ended=False))
        chunks = body.chunks()
        assert b"ab" == await anext(chunks)
        source.fail(ConnectionResetError("broken"))
        with pytest.raises(ConnectionResetError, match="broken"):
            await anext(chunks)
        assert not body.ended


class TestSilence:
    @pytest.mark.parametrize("way", ["chunks", "prefetch", "keep", "all"])
    async def test_a_silent_client(self, source: Stream, way: str) -> None:
        """A client that announces a body and sends nothing is told so; nothing complete was sent."""
        body = body_of(fed(source, b"ab", ended=False), timeout=0)
        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "chunks": lambda: sent(body),
            "prefetch": body.prefetch,
            "keep": body.keep,
            "all": lambda: body.all(100),
        }
        with pytest.raises(ProxyError, match="nothing came for 0 s") as caught:
            await ways[way]()
        assert (408, "request-timeout", "no") == (caught.value.status, caught.value.slug, caught.value.sent)

    async def test_the_time_begins_anew_with_each_byte(self, source: Stream) -> None:
        """A slow client is not a silent one: what is there is taken, however short the time."""
        body = body_of(source, timeout=0)
        chunks = body.chunks()
        for chunk in (b"a", b"b", b"c"):
            fed(source, chunk, ended=False)
            assert chunk == await anext(chunks)


class TestPrefetch:
    @pytest.mark.parametrize(("limit", "left"), [(10, 100), (100, 10), (10, 10)])
    async def test_it_takes_what_may_be_kept(self, source: Stream, limit: int, left: int) -> None:
        """A piece for which there is no room is left where it is, so that the client feels the back-pressure."""
        budget = ReplayBudget(left)
        body = body_of(fed(source, b"x" * 9, ended=False), limit=limit, budget=budget)
        task = asyncio.ensure_future(body.prefetch())
        await asyncio.sleep(0)
        assert not task.done()
        fed(source, b"y" * 2)
        await task
        await body.prefetch()
        assert (False, left - 9) == (body.ended, budget.left)
        assert [b"x" * 9, b"y" * 2] == await sent(body)
        assert (False, left) == (body.replayable, budget.left)

    async def test_it_stops_at_the_end(self, source: Stream) -> None:
        """A body that was read whole can be sent whole."""
        body = body_of(fed(source, b"ab", b"cd"))
        await body.prefetch()
        assert body.ended
        assert b"abcd" == body.whole()

    async def test_it_takes_nothing_from_a_body_that_is_not_kept(self, source: Stream) -> None:
        """Bytes that can't be kept are left for the attempt that runs."""
        body = body_of(fed(source, b"x" * 11, ended=False))
        chunks = body.chunks()
        assert b"x" * 11 == await anext(chunks)
        fed(source, b"y")
        await body.prefetch()
        assert [b"y"] == [chunk async for chunk in chunks]


class TestKeep:
    async def test_it_can_still_be_sent(self, source: Stream) -> None:
        """Who looks at the body first takes nothing from it; no byte of the bounds is left unused."""
        budget = ReplayBudget(4)
        body = body_of(fed(source, b"ab", ended=False), limit=4, budget=budget)
        assert b"ab" == await anext(body.chunks())
        fed(source, b"cd")
        await body.keep()
        await body.keep()
        assert [b"abcd"] * 2 == [body.whole(), body.whole()]
        assert 0 == budget.left
        body.close()
        assert 4 == budget.left

    @pytest.mark.parametrize(
        ("limit", "left", "slug"),
        [(3, 100, "body-too-large"), (3, 3, "body-too-large"), (10, 3, "idempotency-full"), (4, 3, "idempotency-full")],
    )
    async def test_no_room(self, source: Stream, limit: int, left: int, slug: str) -> None:
        """It is refused as soon as a bound would be passed; nothing stays taken from the others."""
        budget = ReplayBudget(left)
        body = body_of(fed(source, b"ab", b"cd", ended=False), limit=limit, budget=budget)
        with pytest.raises(ProxyError) as caught:
            await body.keep()
        assert (slug, "no") == (caught.value.slug, caught.value.sent)
        body.close()
        assert left == budget.left


class TestAll:
    async def test_it_counts_by_itself(self, source: Stream) -> None:
        """Who answers here gets the body whatever may be kept for a replay, and whatever others keep."""
        budget = ReplayBudget(0)
        body = body_of(fed(source, b"ab", b"cd"), limit=0, budget=budget)
        assert b"abcd" == await body.all(4)
        body.close()
        assert 0 == budget.left

    async def test_it_is_empty_without_a_body(self) -> None:
        """No body is an empty one."""
        assert b"" == await body_of(Stream.of()).all(0)


@pytest.mark.parametrize("way", ["keep", "all"])
@pytest.mark.parametrize("more", [b"", b"e"])
async def test_the_limit_is_not_the_end(source: Stream, way: str, more: bytes) -> None:
    """A body that has reached the bound is complete only once its end has come; an endless one is not awaited."""
    body = body_of(fed(source, b"abcd", ended=False), limit=4)
    reading: asyncio.Future[bytes | None] = asyncio.ensure_future(body.keep() if way == "keep" else body.all(4))
    await asyncio.sleep(0)
    assert not reading.done()
    fed(source, *([more] if more else []), ended=not more)
    if more:
        with pytest.raises(ProxyError, match="larger than 4 bytes") as caught:
            await reading
        assert (413, "body-too-large", "no") == (caught.value.status, caught.value.slug, caught.value.sent)
    else:
        assert b"abcd" == (await reading or body.whole())


async def test_close_gives_back_once(source: Stream) -> None:
    """What was kept is given back to the others exactly once."""
    budget = ReplayBudget(100)
    body = body_of(fed(source, b"ab", ended=False), budget=budget)
    await anext(body.chunks())
    assert 98 == budget.left
    body.close()
    body.close()
    assert 100 == budget.left


def test_what_the_head_said() -> None:
    """Whether it came chunked is at hand for whoever frames it."""
    for chunked in (True, False):
        body = RequestBody(Stream(), chunked=chunked, limit=1, budget=ReplayBudget(1), timeout=1.0)
        assert chunked == body.chunked


class Pieces(Stream):
    """A stream whose bytes come one piece a read."""

    __slots__ = ("_left",)

    def __init__(self, pieces: list[bytes], *, marked: bool) -> None:
        """``marked``: the end comes with the last piece, else by itself."""
        super().__init__()
        self._left = [*pieces] if marked else [*pieces, b""]
        if not self._left:
            self.end()

    async def read(self) -> bytes:
        """Let the next piece arrive, and return it."""
        piece = self._left.pop(0) if self._left else b""
        if piece:
            self.feed(piece)
        if not self._left:
            self.end()
        return self.read_nowait()


@given(
    st.lists(st.binary(min_size=1, max_size=6), max_size=8),
    st.booleans(),
    st.integers(0, 20),
    st.integers(0, 40),
    st.lists(st.tuples(st.sampled_from(["prefetch", "part", "whole", "keep"]), st.integers(0, 5)), max_size=6),
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
    body = RequestBody(Pieces(pieces, marked=marked), chunked=True, limit=limit, budget=budget, timeout=60.0)

    async def attempts() -> None:
        for step, count in steps:
            if not body.replayable:
                break
            if step == "prefetch":
                await body.prefetch()
            elif step == "whole":
                assert body.whole() in {None, complete}
            elif step == "keep":
                with contextlib.suppress(ProxyError):
                    await body.keep()
                    assert complete == body.whole()
            else:
                chunks = body.chunks()
                part = b"".join([await anext(chunks, b"") for _ in range(count)])
                assert complete.startswith(part)
                await chunks.aclose()
            assert 0 <= budget.left
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

    @pytest.mark.slow
    async def test_tiny_pieces_cost_little_more_than_their_bytes(self) -> None:
        """A sender of single bytes gets nowhere near 40 bytes of memory for each: neither while they wait, nor kept."""
        stream = Stream()
        body = RequestBody(stream, chunked=True, limit=100_000, budget=ReplayBudget(100_000), timeout=1.0)
        tracemalloc.start()
        try:
            for _ in range(HIGH_WATER):
                stream.feed(bytes(1))
            waiting = tracemalloc.get_traced_memory()[0]
            reading = asyncio.ensure_future(body.prefetch())
            for _ in range(HIGH_WATER):
                await asyncio.sleep(0)
                stream.feed(bytes(1))
            stream.end()
            await reading
            kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert 1.5 * HIGH_WATER > waiting
        assert 3 * HIGH_WATER > kept
        assert bytes(2 * HIGH_WATER) == body.whole()

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
        stream.fail(ConnectionResetError())
        assert [True, False, True, False] == told

    def test_what_is_put_back_waits_too(self) -> None:
        """It holds the sender up where it is too much, unless nothing more will come."""
        told: list[bool] = []
        stream = Stream(told.append)
        stream.unread(bytes(HIGH_WATER + 1))
        stream.unread(b"a")
        assert [True] == told
        stream.end()
        stream.unread(bytes(HIGH_WATER + 1))
        assert [True, False] == told

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
