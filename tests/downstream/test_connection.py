"""One connection, with a made-up server behind it: order, back-pressure, bounds of time."""

from __future__ import annotations

import asyncio
import contextlib
import select
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.downstream.connection import Bounds, ClientConnection, remote
from metquay_proxy.exchange.body import HIGH_WATER
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.http1 import RequestsMemory
from tests.wire import Broken, Client, eventually, get, head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from metquay_proxy.exchange.body import Stream
    from metquay_proxy.rules.http1 import RequestHead

    Answer = Callable[[ClientConnection, RequestHead, Stream], Awaitable[bool]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
REFUSAL = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


async def ok(client: ClientConnection, _head: RequestHead, body: Stream) -> bool:
    """Read the body, and answer."""
    while await body.read():
        pass
    client.write(OK)
    return True


class Made:
    """Serves connections with an answer of the test's; knows what was asked, and which connections there are."""

    def __init__(self, answer: Answer = ok) -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.clients: set[ClientConnection] = set()

    async def serve(self, client: ClientConnection, head: RequestHead, body: Stream) -> None:
        """Serve."""
        self.asked.append(head.target)
        keep = False
        try:
            keep = await self.answer(client, head, body)
        finally:
            client.served(keep=keep)

    def left(self, _client: ClientConnection, task: asyncio.Task[None]) -> None:
        """Give up."""
        task.cancel()

    def refuse(self, client: ClientConnection, error: ProxyError) -> None:
        """Refuse."""
        self.refused.append(error.slug)
        client.write(REFUSAL)

    @property
    def client(self) -> ClientConnection:
        """The one connection that there is."""
        [client] = self.clients
        return client

    def look(self, seconds: float) -> None:
        """Let so many seconds have passed for every connection."""
        for client in tuple(self.clients):
            client.look(asyncio.get_running_loop().time() + seconds)


@contextlib.asynccontextmanager
async def served(answer: Answer = ok) -> AsyncIterator[tuple[Made, Client]]:
    """Run a made-up server, and a client that is connected to it."""
    made, memory = Made(answer), RequestsMemory()

    def accept() -> ClientConnection:
        return ClientConnection(made, Bounds(), memory, asyncio.Protocol, made.clients.add, made.clients.discard)

    listener = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", 0)
    client = Client(*await asyncio.open_connection(*listener.sockets[0].getsockname()))
    await eventually(lambda: made.clients)
    try:
        yield made, client
    finally:
        client.writer.transport.abort()
        listener.close()
        for each in tuple(made.clients):
            each.abort()
        await eventually(lambda: not made.clients)


async def test_what_waits_is_bounded_while_it_is_served() -> None:
    """A client that sends faster than it is served stays held up: each answer lets in no more than it took away."""
    most = 0

    async def counting(client: ClientConnection, head: RequestHead, body: Stream) -> bool:
        nonlocal most
        most = max(most, tracemalloc.get_traced_memory()[0] - before)
        return await ok(client, head, body)

    async with served(counting) as (made, client):
        requests = head("GET /x HTTP/1.1", "X-Long: " + "x" * 8000) * 200
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            reading = asyncio.ensure_future(client.exactly(len(OK) * 2000))
            for _ in range(10):
                client.writer.write(requests)
                await client.writer.drain()
            await reading
        finally:
            tracemalloc.stop()
        assert 2000 == len(made.asked)
    assert most < 4_000_000


@pytest.mark.parametrize("whole", [True, False])
async def test_a_client_that_leaves_ends_what_is_done_for_it(whole: bool) -> None:  # noqa: FBT001 - a column
    """Whoever serves it is cancelled, and sees that it is gone."""
    ended: list[bool] = []

    async def endless(client: ClientConnection, _head: RequestHead, _body: Stream) -> bool:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(client.gone)
        return True

    async with served(endless) as (made, client):
        await client.send(get() if whole else head("POST /x HTTP/1.1", "Content-Length: 9"))
        await eventually(lambda: made.asked)
        client.reset()
        await eventually(lambda: [True] == ended)
        assert not made.clients


@pytest.mark.parametrize(
    ("sent", "seconds", "slugs"),
    [
        (b"", 15.1, []),
        (b"GET /x HTTP/1.1\r\n", 15.1, ["request-timeout"]),
        (get(), 120.1, []),
        (get() + b"GET", 15.1, ["request-timeout"]),
    ],
)
async def test_bounds_of_time(sent: bytes, seconds: float, slugs: list[str]) -> None:
    """For the first byte, for a head, and between requests; it is not ended sooner."""
    async with served() as (made, client):
        if sent:
            await client.send(sent)
            if sent.startswith(get()):
                await client.answer()
            await asyncio.sleep(0.01)
        made.look(0.0)  # from which on it rests
        made.look(seconds - 0.5)
        assert made.clients
        assert not made.client.transport.is_closing()
        made.look(seconds)
        if slugs:
            await client.answer()
        await client.ended()
        assert slugs == made.refused


async def test_a_body_comes_piece_by_piece() -> None:
    """It is read while it comes; what follows it belongs to the next request."""
    async with served() as (made, client):
        await client.send(head("POST /a HTTP/1.1", "Content-Length: 4"), b"ab", b"cd" + get("/b"), pause=0.01)
        assert [200, 200] == [(await client.answer()).status for _ in range(2)]
        assert ["/a", "/b"] == made.asked


@pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="only Linux tells of it")
@pytest.mark.parametrize("how", ["finish", "reset"])
async def test_a_client_that_leaves_while_nobody_reads(how: str) -> None:
    """It is noticed at the next look, though what it sent has not been read to the end."""
    ended: list[bool] = []

    async def endless(client: ClientConnection, _head: RequestHead, _body: Stream) -> bool:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(client.gone)
        return True

    async with served(endless) as (made, client):
        await client.send(head("PUT /x HTTP/1.1", "Content-Length: 3000000") + bytes(HIGH_WATER + 1))
        await eventually(lambda: made.asked and not made.client.transport.is_reading())
        made.look(0.0)
        assert made.clients
        getattr(client, how)()
        await asyncio.sleep(0.01)
        made.look(0.0)
        await eventually(lambda: [True] == ended)


async def test_a_broken_body_is_told_to_its_reader() -> None:
    """Malformed chunks are an error where the body is read, and the last of the connection."""
    errors: list[str] = []

    async def reading(client: ClientConnection, _head: RequestHead, body: Stream) -> bool:
        try:
            while await body.read():
                pass
        except ProxyError as error:
            errors.append(error.slug)
        client.write(OK)
        return True

    async with served(reading) as (_, client):
        await client.send(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked") + b"2\r\nab\r\n", b"x\r\n", pause=0.01)
        await client.answer()
        await client.ended()
        assert ["bad-request"] == errors


async def test_what_is_no_request_is_refused_in_its_turn() -> None:
    """The requests before it are answered; nothing after it is read."""
    async with served() as (made, client):
        await client.send(get() + b"nonsense\r\n\r\n" + get("/after"))
        assert [200, 400] == [(await client.answer()).status for _ in range(2)]
        await client.ended()
        assert ["/x"] == made.asked
        assert ["not-supported"] == made.refused


async def test_a_client_that_reads_nothing_gets_no_more_answers() -> None:
    """The next request is served when the answers before it have been taken up to the high-water mark."""

    async def large(client: ClientConnection, _head: RequestHead, _body: Stream) -> bool:
        client.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(1_000_000))
        return True

    async with served(large) as (made, client):
        await client.send(get() * 25)
        await eventually(lambda: made.client.full)
        before = len(made.asked)
        await asyncio.sleep(0.05)
        assert before == len(made.asked) < 20
        assert 1_000_000 == len((await client.answer()).body)
        for _ in range(24):
            await client.answer()
        assert 25 == len(made.asked)


async def test_a_client_that_goes_on_sending_is_held_up() -> None:
    """What waits behind a request that is being served is bounded."""
    may_answer = asyncio.Event()

    async def late(client: ClientConnection, head: RequestHead, body: Stream) -> bool:
        await may_answer.wait()
        return await ok(client, head, body)

    async with served(late) as (made, client):
        await client.send(get(), get(), pause=0.01)
        client.writer.write(get() * 200_000)
        await eventually(lambda: made.clients and not made.client.transport.is_reading())
        may_answer.set()
        for _ in range(100):
            await client.answer()


async def test_a_refused_client_may_finish_sending() -> None:
    """It finds time to read why; then the connection closes, and nothing that it sent was read as a request."""

    async def early(client: ClientConnection, _head: RequestHead, _body: Stream) -> bool:
        client.write(REFUSAL)
        return False

    async with served(early) as (made, client):
        await client.send(head("POST /x HTTP/1.1", "Content-Length: 10000000"))
        assert 400 == (await client.answer()).status
        for _ in range(10):
            client.writer.write(get() * 1000)
            await client.writer.drain()
        made.look(1.9)
        assert not made.client.transport.is_closing()
        made.look(2.1)
        await eventually(lambda: not made.clients)
        assert ["/x"] == made.asked


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    """Of an answer no byte was taken for as long as silence may last; progress begins that anew."""

    async def large(client: ClientConnection, _head: RequestHead, _body: Stream) -> bool:
        client.write(b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n" + bytes(20_000_000))
        return True

    async with served(large) as (made, client):
        await client.send(get())
        await eventually(lambda: made.client.full)
        await asyncio.sleep(0.05)
        for seconds in (0.0, 59.0):
            made.look(seconds)
        await client.exactly(10_000_000)
        await asyncio.sleep(0.05)
        for seconds in (61.0, 120.0):
            made.look(seconds)
        assert made.clients
        made.look(122.0)
        with pytest.raises(Broken):
            await client.to_the_end()


async def test_writing_to_who_has_left() -> None:
    """It raises, whether the loop has noticed already or not."""
    errors: list[type[Exception]] = []

    async def late(client: ClientConnection, _head: RequestHead, _body: Stream) -> bool:
        client.abort()
        for call in (lambda: client.write(OK), lambda: client.write(OK)):
            try:
                call()
            except ConnectionResetError as error:
                errors.append(type(error))
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        with pytest.raises(ConnectionResetError):
            await client.drained()
        return True

    async with served(late) as (_, client):
        await client.send(get())
        await client.gone()
        await eventually(lambda: [ConnectionResetError] * 2 == errors)


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("192.0.2.7", ("192.0.2.7", 50000)),
        ("192.0.2.7", ("::ffff:192.0.2.7", 50000, 0, 0)),
        ("2001:db8::7", ("2001:db8::7", 50000, 0, 0)),
        ("fe80::7%eth0", ("fe80::7%eth0", 50000, 0, 2)),
        (None, ("127.0.0.1", 50000)),
        (None, ("127.8.8.8", 50000)),
        (None, ("::1", 50000, 0, 0)),
        (None, ("::ffff:127.0.0.1", 50000, 0, 0)),
        (None, ""),
        (None, None),
    ],
)
def test_what_is_an_address(address: str | None, peer: object) -> None:
    """Loopback and unix sockets are this machine; IPv4 in IPv6 is IPv4."""
    assert address == remote(peer)
