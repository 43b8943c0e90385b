"""One connection by itself, with a peer that knows bytes alone."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.exchange.body import HIGH_WATER, Stream
from metquay_proxy.rules.errors import ProxyError, UpstreamFailure
from metquay_proxy.rules.http1 import AnswersMemory
from metquay_proxy.upstream.connection import Connection
from tests.upstream.peers import GET, body_of, no_body
from tests.wire import OK, answered, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from metquay_proxy.exchange.body import RequestBody
    from metquay_proxy.exchange.exchange import Response

UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nabc"
POST = b"POST /x HTTP/1.1\r\nHost: x\r\n\r\n"


class Bench:
    """A connection and the socket at its other end; ``kept`` is what was said of it each time that it became free."""

    def __init__(self, peer: socket.socket) -> None:
        """Begin without the connection."""
        self.peer = peer
        self.kept: list[float | None] = []
        self.lost = 0
        self.connection = Connection(AnswersMemory(), lambda _, kept_for: self.kept.append(kept_for), self._count)

    def _count(self, _: Connection) -> None:
        self.lost += 1

    async def ask(
        self, *answer: bytes, body: RequestBody | None = None, method: str = "GET", reused: bool = False
    ) -> Response:
        """Send a request, let the peer answer, and return the response once its head is there."""
        self.connection.idle_since = 1.0 if reused else -math.inf
        response = self.connection.send(method, POST if body else GET, body or no_body())
        for piece in answer:
            await asyncio.get_running_loop().sock_sendall(self.peer, piece)
        return await begun(response)

    async def fails(
        self, *answer: bytes, end: str = "", method: str = "GET", reused: bool = False, body: RequestBody | None = None
    ) -> UpstreamFailure:
        """Send a request that gets no answer; return why."""
        self.connection.idle_since = 1.0 if reused else -math.inf
        response = self.connection.send(method, GET, body or no_body())
        for piece in answer:
            await asyncio.get_running_loop().sock_sendall(self.peer, piece)
        if end:
            await asyncio.sleep(0.005)  # a reset overtakes what was sent just before it
            self.end(end)
        with pytest.raises(UpstreamFailure) as caught:
            await begun(response)
        return caught.value

    def end(self, how: str) -> None:
        """Let the peer go; one that has not read everything would reset the connection in any case."""
        with contextlib.suppress(BlockingIOError):
            self.peer.recv(1 << 16)
        if how == "reset":
            self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.peer.close()

    async def got(self, size: int) -> bytes:
        """Return what the peer got."""
        data = b""
        async with asyncio.timeout(5.0):
            while len(data) < size:
                data += await asyncio.get_running_loop().sock_recv(self.peer, size - len(data))
        return data


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Connect the two."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    peer.setblocking(False)  # noqa: FBT003 - the standard library's own
    ours.setblocking(False)  # noqa: FBT003 - the standard library's own
    made = Bench(peer)
    await asyncio.get_running_loop().create_connection(lambda: made.connection, sock=ours)
    with peer:
        yield made
        made.connection.abort()
        await eventually(lambda: made.lost)
    assert 1 == made.lost


async def begun(response: Response) -> Response:
    """Wait for the head."""
    async with asyncio.timeout(5.0):
        while not response.begun:
            await response.news()
    return response


async def whole(response: Response) -> bytes:
    """Read a body to its end."""
    data = b""
    async with asyncio.timeout(5.0):
        while piece := await response.read():
            data += piece
    return data


class TestWhoseBytesTheyAre:
    """An answer belongs to the request before it, or to nobody."""

    @pytest.mark.parametrize("sent", [b"x", b""])
    async def test_what_the_loop_has_not_read_yet(self, bench: Bench, sent: bytes) -> None:
        """Bytes, and an end, that have come to the system are seen at once by who asks."""
        assert not bench.connection.has_unread()
        bench.peer.send(sent) if sent else bench.peer.shutdown(socket.SHUT_WR)
        assert bench.connection.has_unread()

    @pytest.mark.parametrize("reused", [False, True])
    async def test_no_answer_to_the_first_request(self, bench: Bench, reused: bool) -> None:  # noqa: FBT001 - a column
        """Nothing can be left over on a connection that has carried nothing, whether it waited in the pool or not."""
        failure = await bench.fails(b"poison", reused=reused)
        assert ("upstream-protocol", "unknown") == (failure.slug, failure.sent)
        assert (False, False) == (failure.stale, failure.repeatable)

    async def test_a_bad_body_behind_a_good_head(self, bench: Bench) -> None:
        """It breaks the transfer; the head has been an answer, even where both came at once and were expected."""
        await whole(await bench.ask(OK))
        response = await bench.ask(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", reused=True)
        with pytest.raises(UpstreamFailure) as caught:
            await response.read()
        assert ("upstream-protocol", "yes", False) == (caught.value.slug, caught.value.sent, caught.value.repeatable)


class TestTheEnd:
    """What the end of a connection means for the answer that was on its way."""

    @pytest.mark.parametrize("end", ["close", "reset"])
    @pytest.mark.parametrize("reused", [False, True])
    @pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 20", b"HTTP/1.1 100 Continue\r\n\r\n"])
    async def test_before_the_head(self, bench: Bench, begun: bytes, reused: bool, end: str) -> None:  # noqa: FBT001 - a column
        """A request may have been executed; that an idle connection closes says nothing against another attempt."""
        failure = await bench.fails(begun, end=end, reused=reused)
        assert ("upstream-closed", "unknown", True) == (failure.slug, failure.sent, failure.repeatable)
        assert (reused and not begun) is failure.stale

    @pytest.mark.parametrize("end", ["close", "reset", "abort"])
    @pytest.mark.parametrize("answer", [UNTIL_CLOSE, answered(body=b"abcd")[:-1]])
    async def test_in_mid_answer(self, bench: Bench, answer: bytes, end: str) -> None:
        """What came is passed on, then the break; where no length was said, an end in order by the peer is none."""
        response = await bench.ask(answer)
        assert b"abc" == await response.read()
        bench.connection.abort() if end == "abort" else bench.end(end)
        if (answer, end) == (UNTIL_CLOSE, "close"):
            assert b"" == await response.read()
        else:
            with pytest.raises(UpstreamFailure) as caught:
                await response.read()
            assert ("upstream-closed", "yes", False) == (caught.value.slug, caught.value.sent, caught.value.repeatable)
        assert [] == bench.kept


class TestGivenUp:
    """A sender that leaves ends what is still under way, and nothing else."""

    async def test_in_mid_exchange(self, bench: Bench) -> None:
        """The connection closes; giving up again does nothing."""
        response = bench.connection.send("GET", GET, no_body())
        response.close()
        await eventually(lambda: bench.lost)
        response.close()
        assert [] == bench.kept

    async def test_after_the_last_byte(self, bench: Bench) -> None:
        """One that leaves before it has woken costs the next request nothing: that gets its own answer, and all of it.

        The first answer ended while too much of it waited, so that its sender had been held up.
        """
        body = bytes(HIGH_WATER * 4)
        response = bench.connection.send("GET", GET, no_body())
        sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(bench.peer, answered(body=body)))
        await eventually(lambda: response.held_up)
        taken = b""
        while not bench.kept:
            taken += response.read_nowait()
            await asyncio.sleep(0)
        await sending
        response.close()
        assert not response.held_up
        assert b"ok" == await whole(await bench.ask(OK, reused=True))
        assert body == taken + response.read_nowait()
        assert [None, None] == bench.kept

    async def test_before_it_began(self, bench: Bench) -> None:
        """A body that can't be sent leaves no connection behind."""
        body = body_of(Stream.of(b"abc"))
        assert b"abc" == body.whole()
        with pytest.raises(RuntimeError, match="not kept"):
            bench.connection.send("PUT", GET, body)
        bench.connection.give_up(None)
        await eventually(lambda: bench.lost)


def looks(bench: Bench, count: int) -> None:
    """Look at the connection so many seconds in a row, with a time-out of 3 s."""
    for _ in range(count):
        bench.connection.watch(3.0, 1.0)


class TestSilence:
    """Time counts only while it is the upstream's turn and nothing moves."""

    async def test_an_upstream_that_is_silent(self, bench: Bench) -> None:
        """It is told after the time-out; the request may have been executed, whatever became of its body since."""
        body = body_of(Stream.of(b"abc"))
        response = bench.connection.send("PUT", GET, body)
        await bench.got(len(GET) + 3)
        looks(bench, 2)
        response.news()
        looks(bench, 2)
        with pytest.raises(UpstreamFailure, match="nothing came for 3 s") as caught:
            await begun(response)
        assert ("upstream-timeout", "unknown", False) == (caught.value.slug, caught.value.sent, caught.value.repeatable)

    async def test_bytes_that_leave(self, bench: Bench) -> None:
        """An upstream that takes a body slowly is not silent; one that takes nothing any more is."""
        data = bytes(40_000_000)  # some is left, whatever the kernel holds
        response = bench.connection.send("PUT", b"", body_of(Stream.of(data)))
        for _ in range(10):
            looks(bench, 1)
            await bench.got(2_000_000 - 100)
            await asyncio.sleep(0.005)
        response.news()
        looks(bench, 6)
        with pytest.raises(UpstreamFailure):
            response.news()

    async def test_an_idle_connection(self, bench: Bench) -> None:
        """Nothing is expected of it."""
        await whole(await bench.ask(OK))
        looks(bench, 9)
        assert not bench.connection.transport.is_closing()


class TestBodies:
    """How a request's body is sent, and what ends that."""

    @pytest.mark.parametrize(
        ("data", "chunked", "framed"),
        [
            (b"", False, b""),
            (b"abc", False, b"abc"),
            (b"", True, b"0\r\n\r\n"),
            (b"abc", True, b"3\r\nabc\r\n0\r\n\r\n"),
        ],
    )
    @pytest.mark.parametrize("there", [True, False])
    async def test_framing(self, bench: Bench, data: bytes, chunked: bool, framed: bytes, there: bool) -> None:  # noqa: FBT001 - columns
        """It is the same whether the body is there already or comes piece by piece."""
        source = Stream.of(data) if there else Stream()
        body = body_of(source, chunked=chunked)
        response = bench.connection.send("POST", POST, body)
        if not there:
            assert not response.sent
            if data:
                source.feed(data)
            source.end()
        assert POST + framed == await bench.got(len(POST) + len(framed))
        await eventually(lambda: response.sent)
        bench.peer.send(OK)
        await begun(response)
        assert [None] == bench.kept

    @pytest.mark.parametrize(
        ("error", "slug"),
        [(ProxyError("request-timeout", "x"), "request-timeout"), (ConnectionResetError(), "bad-request")],
    )
    async def test_a_client_that_breaks_off(self, bench: Bench, error: Exception, slug: str) -> None:
        """Its fault is told as its own, and the upstream sees no complete request."""
        source = Stream()
        response = bench.connection.send("POST", POST, body_of(source, chunked=True))
        source.feed(b"abc")
        await bench.got(len(POST) + 8)
        source.fail(error)
        with pytest.raises(ProxyError) as caught:
            await begun(response)
        assert (slug, "no") == (caught.value.slug, caught.value.sent)
        await eventually(lambda: bench.lost)

    @pytest.mark.parametrize("end", ["close", "reset"])
    async def test_an_end_before_its_own(self, bench: Bench, end: str) -> None:
        """A request that was not sent whole was not executed."""
        source = Stream()
        source.feed(b"abc")
        failure = await bench.fails(end=end, body=body_of(source), method="POST")
        assert ("upstream-closed", "no") == (failure.slug, failure.sent)
