"""The pool: which connection carries a request, and how long one is kept. What goes over it is in test_connection."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.exchange.body import Stream
from metquay_proxy.rules.errors import UpstreamFailure
from metquay_proxy.upstream.dial import Dialer, OutboundProxy
from metquay_proxy.upstream.pool import Pool
from tests.upstream.peers import GET, body_of, no_body, pool_to, send, speaking
from tests.wire import OK, answered, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from metquay_proxy.exchange.body import RequestBody
    from metquay_proxy.upstream.connection import Connection
    from tests.wire import Upstream


@pytest.fixture
async def pool(far: Upstream) -> AsyncIterator[Pool]:
    """A pool of connections to the upstream that says OK."""
    made = pool_to(far.url)
    yield made
    made.close()
    await eventually(lambda: (0, 0) == made.connections)


async def test_warm(far: Upstream, pool: Pool) -> None:
    """A connection that was opened ahead serves the next request, and not one that must have a new one."""
    await pool.warm()
    assert (0, 1) == pool.connections
    await send(pool, "GET")
    assert 1 == len(far.peers)
    await send(pool, "GET", fresh=True)
    assert 2 == len(far.peers)


async def test_a_sender_that_leaves_as_its_answer_comes(far: Upstream, pool: Pool) -> None:
    """Its connection is free from the last byte on: whoever gets that gets nothing of the first answer."""
    far.plays(answered(body=b"first"), OK)
    await pool.warm()
    for body in (b"first", b"ok"):
        leaving = asyncio.ensure_future(send(pool, "GET"))
        await asyncio.sleep(0)
        while (0, 1) != pool.connections:
            await asyncio.sleep(0)
        left = leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert leaving.cancelled() if left else body == await leaving.result().read()
    response = await send(pool, "GET")
    assert b"ok" == await response.read()
    assert 1 == len(far.peers)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("left_over", [b"x", b""])
async def test_who_looks_before(far: Upstream, pool: Pool, method: str, left_over: bytes) -> None:
    """What must not be repeated goes out on no connection to which something has come; other requests may be told."""
    await send(pool, "GET")
    await asyncio.sleep(0.001)
    writer = far.peers[0].writer
    with contextlib.suppress(BlockingIOError):
        handle = writer.get_extra_info("socket").dup()
        with handle:
            handle.send(left_over) if left_over else handle.shutdown(1)
    if method == "GET":
        with pytest.raises(UpstreamFailure) as caught:
            await send(pool, method)
        assert (True, True) == (caught.value.stale, caught.value.repeatable)
        response = await send(pool, method, fresh=True)
    else:
        response = await send(pool, method)
    assert b"ok" == await response.read()
    assert 2 == len(far.peers)


async def test_one_that_closes(far: Upstream, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It carries nothing, and its socket, which may be gone, is not asked."""
    await (await send(pool, "GET")).read()
    connection = pool.take("GET")
    assert connection is not None
    assert b"ok" == await connection.send("GET", GET, no_body()).read()
    assert (0, 1) == pool.connections
    monkeypatch.setattr(connection, "has_unread", lambda: 1 / 0)
    connection.abort()
    assert pool.take("POST") is None
    assert far.peers


async def test_one_that_closes_as_it_is_opened(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets it, so that nothing is sent on it, and that is said."""
    connect = Dialer.open

    async def and_close(dialer: Dialer, make: Callable[[], Connection]) -> Connection:
        connection = await connect(dialer, make)
        connection.abort()
        return connection

    monkeypatch.setattr(Dialer, "open", and_close)
    with pytest.raises(UpstreamFailure, match="before the request could be sent") as caught:
        await pool.open()
    assert ("no", True) == (caught.value.sent, caught.value.repeatable)
    await eventually(lambda: (0, 0) == pool.connections)


class Warmth:
    """A pool on a clock that stands still, and the connections that its upstream has accepted so far."""

    def __init__(self, *, answers: bool = True, answer: bytes = OK, tls: ssl.SSLContext | None = None) -> None:
        self.now = 1000.0
        self.accepted: list[asyncio.StreamWriter] = []
        self._answers = answers
        self._answer = answer
        self._tls = tls

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.append(writer)
        while self._answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self._answer)
        writer.transport.abort()

    @contextlib.asynccontextmanager
    async def pool(self) -> AsyncIterator[Pool]:
        """Yield the pool; it looks after its connections a hundred times a second."""
        async with speaking(self._play) as port:
            url = f"http{'s' if self._tls else ''}://127.0.0.1:{port}"
            made = pool_to(url, self._tls, read_timeout=0.1, clock=lambda: self.now)
            yield made
            made.close()

    async def passes(self, seconds: float) -> int:
        """Let time pass at once, and the pool look several times; return how many connections were accepted."""
        self.now += seconds
        await asyncio.sleep(0.06)
        return len(self.accepted)


class TestHowLongAConnectionIsUsed:
    """A pooled connection is used while it is young, and while the upstream keeps it."""

    async def test_five_minutes(self) -> None:
        """Under load too a new one is opened after that, so that a changed DNS answer is followed."""
        warmth = Warmth()
        async with warmth.pool() as pool:
            accepted = []
            for _ in range(400):
                await (await send(pool, "GET")).read()
                accepted.append(len(warmth.accepted))
                warmth.now += 2.0
        assert [1] * 150 + [2] * 150 + [3] * 100 == accepted

    @pytest.mark.parametrize("method", ["GET", "POST"])
    @pytest.mark.parametrize(
        ("said", "idle", "accepted"),
        [
            (b"timeout=1", 0.4, 1),
            (b"timeout=1", 0.6, 2),
            (b"timeout=1", 1.5, 2),
            (b"timeout=2, max=99", 0.9, 1),
            (b"timeout=2, max=99", 1.1, 2),
            (b"timeout=0", 0.0, 2),
            (b"timeout=60", 1.9, 1),
            (b"max=99", 1.9, 1),
        ],
    )
    async def test_the_upstreams_own_word(self, method: str, said: bytes, idle: float, accepted: int) -> None:
        """Keep-Alive is believed where it says less than our own bounds, a second or half the time before its end."""
        warmth = Warmth(answer=answered(b"Keep-Alive: " + said, body=b"ok"))
        async with warmth.pool() as pool:
            await (await send(pool, method)).read()
            warmth.now += idle
            await (await send(pool, method)).read()
        assert accepted == len(warmth.accepted)

    @pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
    async def test_after_an_answer_that_has_no_body(self, status: str) -> None:
        """Bytes may still follow it: reads go on there, and what must not be repeated closes it. So none pile up."""
        warmth = Warmth(answer=answered(status=status))
        async with warmth.pool() as pool:
            for _ in range(20):
                await (await send(pool, "GET")).read()
                await (await send(pool, "GET")).read()
                await (await send(pool, "POST")).read()
            assert (21, (0, 1)) == (len(warmth.accepted), pool.connections)

    async def test_what_is_no_longer_kept_is_closed(self) -> None:
        """It does not wait for a request that could not use it."""
        warmth = Warmth(answer=answered("Keep-Alive: timeout=1", body=b"ok"))
        async with warmth.pool() as pool:
            await (await send(pool, "GET", own=True)).read()
            assert (1, (0, 1)) == (await warmth.passes(0.4), pool.connections)
            assert (1, (0, 0)) == (await warmth.passes(0.2), pool.connections)


class TestKeptWarm:
    """For a while after a tool's request a connection is ready for the next one."""

    @pytest.mark.parametrize("begins", ["request", "start"])
    @pytest.mark.slow
    async def test_while_tools_are_active(self, begins: str) -> None:
        """It is replaced before it is too old, for a minute; the next request uses it."""
        warmth = Warmth()
        async with warmth.pool() as pool:
            if begins == "start":
                pool.keep_warm()
                await eventually(lambda: (0, 1) == pool.connections)
            else:
                await (await send(pool, "GET")).read()
            for opened in range(2, 18):
                if opened == 16:
                    await (await send(pool, "GET")).read()
                warmth.now += 3.995
                await eventually(lambda opened=opened: (opened, (0, 2)) == (len(warmth.accepted), pool.connections))
            assert [17, 17] == [await warmth.passes(60.0), await warmth.passes(60.0)]
            assert (0, 0) == pool.connections

    async def test_not_for_ourselves(self) -> None:
        """A login keeps nothing warm."""
        warmth = Warmth()
        async with warmth.pool() as pool:
            await (await send(pool, "POST", own=True)).read()
            assert [1, 1] == [await warmth.passes(3.995), await warmth.passes(3.995)]
            assert (0, 0) == pool.connections

    async def test_closed_by_the_upstream(self) -> None:
        """A connection that the upstream closes is replaced, no sooner than it would have been anyway."""
        warmth = Warmth(answers=False)
        async with warmth.pool() as pool:
            pool.keep_warm()
            await eventually(lambda: warmth.accepted)
            assert [1, 1, 2, 2] == [await warmth.passes(seconds) for seconds in (0.0, 3.0, 1.0, 0.0)]

    async def test_out_of_reach(self) -> None:
        """Where none can be opened, none is tried again before the next request."""
        warmth = Warmth(answers=False, tls=ssl.create_default_context())
        async with warmth.pool() as pool:
            pool.keep_warm()
            await eventually(lambda: warmth.accepted)
            assert [1, 1, 1] == [await warmth.passes(seconds) for seconds in (0.0, 4.0, 8.0)]
            with pytest.raises(UpstreamFailure):
                await send(pool, "GET")
            assert [2, 2] == [await warmth.passes(0.0), await warmth.passes(4.0)]

    @pytest.mark.parametrize("end", [Pool.let_cool, Pool.close])
    async def test_not_in_a_drain(self, end: Callable[[Pool], None]) -> None:
        """From a drain on, and after the end, none is opened, whatever is still sent."""
        warmth = Warmth()
        async with warmth.pool() as pool:
            await (await send(pool, "GET")).read()
            end(pool)
            pool.keep_warm()
            assert [1, 1] == [await warmth.passes(3.995), await warmth.passes(3.995)]
            assert (0, 0) == pool.connections

    async def test_stale(self) -> None:
        """One that the upstream closes in the moment in which it is first used is stale like any that idled."""
        warmth = Warmth()
        async with warmth.pool() as pool:
            await pool.warm()
            await eventually(lambda: warmth.accepted)
            with pytest.raises(UpstreamFailure) as caught:
                await send(pool, "GET", on_sent=warmth.accepted[0].transport.abort)
            assert caught.value.stale


@pytest.mark.parametrize("failing", ["tcp", "tls", "tunnel", "body", None])
async def test_the_moment_of_sending(far: Upstream, failing: str | None) -> None:
    """It is told once a connection is finished, TCP, tunnel and TLS, and never where none was."""

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with speaking(close) as port:
        secure = failing in {"tls", "tunnel"}
        url, tls = (f"https://localhost:{port}", ssl.create_default_context()) if secure else (far.url, None)
        proxy = OutboundProxy("127.0.0.1", port) if failing == "tunnel" else None
        pool = pool_to(url, tls, outbound_proxy=proxy)
        if failing == "tcp":
            far.refuse()
        told: list[int] = []
        body = spent() if failing == "body" else no_body()
        sending = send(pool, "GET", body, on_sent=lambda: told.append(len(far.requests)))
        if failing is None:
            assert b"ok" == await (await sending).read()
        else:
            with pytest.raises(RuntimeError if failing == "body" else UpstreamFailure):
                await sending
            await eventually(lambda: (0, 0) == pool.connections)
        assert ([0] if failing is None else []) == told
        pool.close()


def spent() -> RequestBody:
    """Return a body that was sent and not kept."""
    body = body_of(Stream.of(b"abc"))
    body.whole()
    return body


async def test_cancelled_while_connecting(far: Upstream, pool: Pool) -> None:
    """A connection whose request is given up while it opens is finished, and serves the next one."""
    task = asyncio.ensure_future(send(pool, "GET"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: (0, 1) == pool.connections)
    assert [] == far.requests


async def test_closed_while_connecting(pool: Pool) -> None:
    """The end of the program ends what is being opened."""
    task = asyncio.ensure_future(send(pool, "GET"))
    await asyncio.sleep(0)
    pool.close()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.001)
    assert (0, 0) == pool.connections


async def test_it_is_bounded(far: Upstream) -> None:
    """More idle connections than the pool holds are closed."""
    pool = pool_to(far.url, max_idle_connections=1)
    for _ in range(2):
        await pool.warm()
    await eventually(lambda: (0, 1) == pool.connections)
    pool.close()
