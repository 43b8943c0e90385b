"""The set of connections: what ends them, and what aiohttp is told."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from metquay_proxy.downstream.connection import Bounds, ClientConnection
from metquay_proxy.downstream.server import Server
from tests.wire import Broken, Client, eventually, get, head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from metquay_proxy.exchange.body import Stream
    from metquay_proxy.rules.errors import ProxyError
    from metquay_proxy.rules.http1 import RequestHead

    Connect = Callable[[], Awaitable[Client]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Made:
    """Answers ``/page`` by aiohttp, ``/large`` with more than is taken, ``/never`` never, all else at once."""

    def __init__(self) -> None:
        self.requests: list[web.BaseRequest] = []
        self.told: list[str] = []

    async def serve(self, client: ClientConnection, head: RequestHead, _body: Stream) -> None:
        """Serve."""
        keep = False
        try:
            keep = await self._serve(client, head)
        finally:
            client.served(keep=keep)

    async def _serve(self, client: ClientConnection, head: RequestHead) -> bool:
        if head.target == "/never":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                client.write(b"HTTP/1.1 503 Ending\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self.told.append(head.target)
                return False
        if head.target == "/page":
            client.hand_over(get("/handed", "Connection: close"))
            await asyncio.Event().wait()
        client.write(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(20_000_000) if head.target == "/large" else OK)
        return True

    def left(self, _client: ClientConnection, task: asyncio.Task[None]) -> None:
        """Give up."""
        task.cancel()

    def refuse(self, _client: ClientConnection, error: ProxyError) -> None:
        """Note it."""
        self.told.append(error.slug)

    async def respond(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer for aiohttp."""
        self.requests.append(request)
        return web.Response(text="page")


@contextlib.asynccontextmanager
async def serving(bounds: Bounds = Bounds()) -> AsyncIterator[tuple[Made, Server, Connect]]:  # noqa: B008 - it is frozen
    """Run a server; yields what connects another client to it, too."""
    clients: list[Client] = []

    async def connect() -> Client:
        clients.append(Client(*await asyncio.open_connection(*listener.sockets[0].getsockname())))
        return clients[-1]

    made = Made()
    server = Server(made, made.respond, bounds)
    listener = await asyncio.get_running_loop().create_server(server.accept, "127.0.0.1", 0)
    try:
        yield made, server, connect
    finally:
        for client in clients:
            client.writer.transport.abort()
        listener.close()
        await server.end()
        await eventually(lambda: not server.clients)


async def test_aiohttp_gets_its_flags() -> None:
    """They are in force on a live connection: aiohttp's server drops all of them at one misspelling."""
    async with serving() as (made, server, connect):
        client = await connect()
        await client.send(get("/page"))
        assert b"page" == (await client.answer()).body
        assert server.handler_cancellation
        assert "/handed" == made.requests[0].path
        assert made.requests[0].protocol.access_logger is None


async def test_what_is_idle_is_closed_and_what_is_not_is_waited_for() -> None:
    """A drain asks again and again; a head that has begun is not idle."""
    async with serving() as (_, server, connect):
        idle, begun, busy = [await connect() for _ in range(3)]
        await begun.send(b"GET /x HT")
        await busy.send(get("/never"))
        await idle.send(get())
        await idle.answer()
        await eventually(lambda: 3 == len(server.clients))
        await asyncio.sleep(0.01)
        assert server.busy()
        await idle.ended()
        await begun.send(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        assert 200 == (await begun.answer()).status
        assert server.busy()
        await begun.ended()
        busy.writer.transport.abort()
        await eventually(lambda: not server.busy())


async def test_the_end() -> None:
    """Who waits for an answer is told, who has a part of one sees it break, whoever else is there is closed."""
    async with serving() as (made, server, connect):
        waiting, reading, silent = [await connect() for _ in range(3)]
        await waiting.send(get("/never"))
        await reading.send(get("/large"))
        await reading.until(b"\r\n\r\n")
        await eventually(lambda: 3 == len(server.clients))
        await server.end()
        assert 503 == (await waiting.answer()).status
        with pytest.raises(Broken):
            await reading.to_the_end()
        await silent.ended()
        assert ["/never"] == made.told


@pytest.mark.slow
async def test_time_is_looked_after() -> None:
    """Clients that take too long are ended without anybody asking, and none is looked after once all have left."""
    async with serving(Bounds(head=0.05)) as (made, server, connect):
        silent, slow = await connect(), await connect()
        await slow.send(head("GET /x HTTP/1.1")[:-2])
        await silent.ended()
        await slow.gone()
        assert ["request-timeout"] == made.told
        await eventually(lambda: not server.clients)
        again = await connect()
        await again.ended()
