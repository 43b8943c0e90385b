"""The connections to Metquay: which one carries a request, which are kept for the next one, and for how long.

Owns reuse, the connection that is kept ready while tools are active, and the one sweep that ends what is silent or has
idled too long. Must not decide whether a request is repeated (the forwarder does) and must not change a byte of it
(``headers`` did).

Facts: RFC 9112 section 9.3 (a server may close an idle connection at any moment; a client that reuses it can't know
whether its request was read). Prism closes idle connections after 5 s, Tomcat after 20 s. asyncio's clock may stand
still while the machine is suspended.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Final

from metquay_proxy.rules.errors import UpstreamFailure
from metquay_proxy.rules.http1 import AnswersMemory
from metquay_proxy.upstream.connection import Connection
from metquay_proxy.upstream.dial import Dialer, OutboundProxy

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from metquay_proxy.rules.target import BaseURL

MAX_IDLE: Final = 4.0
"""Seconds that a connection may have idled before it is reused; below Prism's 5."""
MAX_IDLE_UNSAFE: Final = 2.0
"""The same for requests that must not be repeated."""
MAX_IDLE_CONNECTIONS: Final = 512
"""So many are kept at most, further ones are closed as they become free."""
_WARM: Final = 60.0
"""Seconds after a tool's last request in which a connection is kept ready for the next one."""
_MAX_AGE: Final = 300.0
"""Seconds from its opening in which a connection is used, so that a changed DNS answer is followed under load too."""
_MARGIN: Final = 1.0
"""Seconds, or half the time if that is less, before the end of what the upstream's Keep-Alive says."""
_REPEATABLE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


class Pool:
    """Hands over connections to one upstream, pooled or new."""

    def __init__(  # noqa: PLR0913 - where to, and every time-out
        self,
        base: BaseURL,
        *,
        ssl_context: ssl.SSLContext | None,
        connect_timeout: float,
        read_timeout: float,
        outbound_proxy: OutboundProxy | None = None,
        max_idle: tuple[float, float] = (MAX_IDLE, MAX_IDLE_UNSAFE),
        max_idle_connections: int = MAX_IDLE_CONNECTIONS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Time-outs are in seconds; ``read_timeout`` is silence between bytes, in either direction.

        ``clock`` tells how long a connection has idled, and should count the time in which the machine is suspended.

        ``max_idle``: how long a connection may have idled before it is reused, by requests that may be repeated and by
        others.
        """
        self._loop = asyncio.get_running_loop()
        self.clock = clock or self._loop.time
        self._dialer = Dialer(base, outbound_proxy, connect_timeout, ssl_context)
        self._read_timeout = read_timeout
        self._memory = AnswersMemory()
        self._max_idle, self._max_idle_unsafe = max_idle
        self._room = max_idle_connections
        self._idle: list[Connection] = []
        """The latest comes last."""
        self._connections: set[Connection] = set()
        """All that are open, idle or busy."""
        self._opening: set[asyncio.Task[Connection]] = set()
        self._tick = max(0.01, min(1.0, read_timeout / 10))
        self._sweeping: asyncio.TimerHandle | None = None
        self._pace = max(self._max_idle - self._tick, self._max_idle / 2)
        """Seconds from one connection that is kept ready to the next: before the last one is too old to be used."""
        self._warm_for = _WARM
        self._warm_until = self._opened_ahead = -math.inf

    @property
    def connections(self) -> tuple[int, int]:
        """Return how many connections are (busy, idle)."""
        return len(self._connections) - len(self._idle), len(self._idle)

    def trust(self, context: ssl.SSLContext) -> None:
        """Verify new connections by ``context``."""
        self._dialer.ssl_context = context

    def take(self, method: str, now: float | None = None) -> Connection | None:
        """Return a connection that has idled and on which such a request may be sent, if there is one.

        ``now`` is when a tool asks, on the pool's clock. Without it the program asks for itself, which is no reason to
        keep a connection ready.
        """
        if now is None:
            now = self.clock()
        else:
            self._warm_until = now + self._warm_for
        idle, careful = self._idle, method not in _REPEATABLE_METHODS
        while idle:
            connection = idle[-1]
            if careful and connection.idle_since < now - self._max_idle_unsafe:
                return None
            idle.pop()
            good = now < connection.good_until and not connection.transport.is_closing()
            if good and not (careful and (connection.bodiless or connection.has_unread())):
                return connection
            connection.abort()
        return None

    async def open(self) -> Connection:
        """Return a new connection; raise ``UpstreamFailure``.

        One whose request is given up meanwhile is opened all the same, for the next one.
        """
        task = self._start_opening()
        try:
            connection = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._opened)
            raise
        if connection.transport.is_closing():
            message = "Metquay closed the connection before the request could be sent. Try again."
            raise UpstreamFailure("upstream-closed", message, repeatable=True)
        return connection

    async def warm(self) -> None:
        """Open a connection for the next request; raise ``UpstreamFailure``."""
        self._put_by(await self.open())

    def keep_warm(self) -> None:
        """Keep a connection ready from now on as though a tool had just asked for something."""
        self._warm_until = self.clock() + self._warm_for
        self._sweep_later()

    def let_cool(self) -> None:
        """Keep no connection ready any more, whatever is still sent."""
        self._warm_for = self._warm_until = -math.inf

    def close(self) -> None:
        """Close every connection at once; none is kept any more."""
        self.let_cool()
        self._room = 0
        for task in self._opening:
            task.cancel()
        for connection in tuple(self._connections):
            connection.abort()

    def _make(self) -> Connection:
        connection = Connection(self._memory, self._keep, self._lost)
        connection.too_old = self.clock() + _MAX_AGE
        self._connections.add(connection)
        self._sweep_later()
        return connection

    def _keep(self, connection: Connection, kept_for: float | None = None) -> None:
        """Take a connection that is free, for the next request."""
        if len(self._idle) >= self._room:
            connection.abort()
            return
        connection.idle_since = now = self.clock()
        good_for = self._max_idle
        if kept_for is not None:
            good_for = min(good_for, kept_for - min(_MARGIN, kept_for / 2))
        until = now + good_for
        connection.good_until = until if until < connection.too_old else connection.too_old  # noqa: FURB136 - see ``quota``
        self._idle.append(connection)

    def _put_by(self, connection: Connection) -> None:
        """Keep one that nobody has used yet, unless it has closed meanwhile."""
        if connection in self._connections:
            self._keep(connection)

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def _sweep_later(self) -> None:
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(self._tick, self._sweep)

    def _sweep(self) -> None:
        """End what the upstream has been silent on for too long, and what has idled too long; open what is wanted."""
        self._sweeping = None
        for connection in tuple(self._connections):
            connection.watch(self._read_timeout, self._tick)
        now = self.clock()
        for connection in tuple(self._idle):
            if connection.good_until <= now:
                connection.abort()
        warm = now < self._warm_until
        latest = max([self._opened_ahead, *(connection.idle_since for connection in self._idle)])
        if warm and not self._opening and len(self._idle) == len(self._connections) and now - latest >= self._pace:
            self._opened_ahead = now
            self._start_opening().add_done_callback(self._opened)
        if warm or self._connections:
            self._sweep_later()

    def _start_opening(self) -> asyncio.Task[Connection]:
        task = self._loop.create_task(self._dialer.open(self._make))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return task

    def _opened(self, task: asyncio.Task[Connection]) -> None:
        """Keep what nobody waits for; where that fails, wait for the next request, which will be told why."""
        if task.cancelled() or task.exception() is not None:
            self._warm_until = -math.inf
        else:
            self._put_by(task.result())
