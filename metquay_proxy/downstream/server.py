"""The server of the tools' side: makes a protocol for each client, looks after their time, and ends them.

Owns the set of connections. An ``aiohttp.web.Server``: what answers the proxy's own pages is aiohttp's handler, to
which a connection is handed over once its request was judged. Must not know a rule.

Facts: aiohttp's flags go to ``web.Server``, and one name that it does not know drops them all; its own handlers are
made by calling it, and told of in ``connections``.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Final

from aiohttp import web

from metquay_proxy.downstream.connection import Bounds, ClientConnection, Serving
from metquay_proxy.rules.http1 import RequestsMemory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

_LONGEST_TICK: Final = 1.0
_PATIENCE: Final = 0.1
"""Seconds for the last answers of a drain to be written."""


class Server(web.Server):
    """All connections of one proxy; ``accept`` makes the protocol of a client."""

    def __init__(
        self,
        serving: Serving,
        pages: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        bounds: Bounds,
        most: float = math.inf,
    ) -> None:
        """``serving`` answers requests, ``pages`` those that are handed over to aiohttp.

        Where ``most`` clients are connected, the one that has been there longest is closed for the next one.
        """
        super().__init__(pages, handler_cancellation=True, access_log=None, lingering_time=0)
        self._serving = serving
        self.clients: dict[ClientConnection, None] = {}
        """All that are open, those on which an own page is being sent included; the latest comes last."""
        self._memory = RequestsMemory()
        self._tick = min(_LONGEST_TICK, bounds.head / 4, bounds.idle / 4, bounds.linger / 4, bounds.silence / 4)
        self._look_after: asyncio.TimerHandle | None = None
        self.bounds = bounds
        self._most = most

    def accept(self) -> ClientConnection:
        """Make the protocol of one client."""
        return ClientConnection(self._serving, self.bounds, self._memory, self, self._made, self._gone)

    def busy(self) -> bool:
        """Close the connections on which nothing is under way; return whether anything still is on others."""
        for client in tuple(self.clients):
            if client.idle:
                client.close()
        return any(client.busy or client.unsent for client in self.clients)

    async def end(self, alone: Iterable[asyncio.Task[None]] = ()) -> None:
        """Give up what is still under way: each client is told so, or sees that its transfer is broken.

        ``alone`` are cancelled tasks whose clients have left.
        """
        tasks = [*alone, *[task for client in tuple(self.clients) if (task := client.cancel()) is not None]]
        if tasks:
            await asyncio.wait(tasks, timeout=_PATIENCE)
        await self.shutdown(_PATIENCE)
        for client in tuple(self.clients):
            client.close()
        if self._look_after is not None:
            self._look_after.cancel()

    def _made(self, client: ClientConnection) -> None:
        if len(self.clients) >= self._most:
            next(iter(self.clients)).abort()
        self.clients[client] = None
        if self._look_after is None:
            self._sweep()

    def _gone(self, client: ClientConnection) -> None:
        self.clients.pop(client, None)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._look_after = loop.call_later(self._tick, self._sweep) if self.clients else None
        for client in tuple(self.clients):
            client.look(loop.time())
