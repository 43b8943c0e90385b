"""The only HTTP client: a lean HTTP/1.1 transport to Metquay, the login, and the table of what can go wrong on the way.

Owns connections, their pool, TLS, the way through a corporate proxy and the time-outs. Must not decide whether a
request is repeated (the forwarder does) and must not change a byte of it (``rewrite`` did).

Facts: a loop whose write fails closes the connection without reading what had come before, such as the 413 to an upload
that the server does not want and then resets (RFC 9112 section 9.5); Linux and BSD keep that for whoever reads on.
Windows's own TLS (truststore) accepts an issuing CA without its root only where it is in the system's store.
RFC 9112 section 9.3 (a server may close an idle connection at any moment; a client that reuses it can't know
whether its request was read) and 9.5. Prism closes idle connections after 5 s, Tomcat after 20 s. RFC 9110 section
9.3.6 (CONNECT). RFC 9112 section 6.3: bytes that nobody asked for belong to no answer, so that such a connection is
thrown away. Section 9.8: over TLS an answer that lasts until the connection closes is whole only where the peer said
so.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import functools
import json
import math
import re
import select
import socket
import ssl
import sys
import time
from collections import deque
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urljoin

import truststore
from aiohappyeyeballs import start_connection

from metquay_proxy.exchange.body import ReplayBudget, RequestBody
from metquay_proxy.exchange.tokens import (
    AccessToken,
    Credentials,
    CredentialsRejected,
    LoginFailed,
    UpstreamDistrusted,
    parse_login,
)
from metquay_proxy.rules.errors import ProxyError, Sent, UpstreamFailure, shortage
from metquay_proxy.rules.http1 import ProtocolError, ResponseHead, ResponseReader
from metquay_proxy.rules.quota import retry_after_seconds
from metquay_proxy.threads import in_thread

if sys.platform == "linux":
    import fcntl
    import termios

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aiohappyeyeballs import AddrInfoType

    from metquay_proxy.rules.target import BaseURL

MAX_IDLE: Final = 4.0
"""Seconds that a connection may have idled before it is reused; below Prism's 5."""
MAX_IDLE_UNSAFE: Final = 2.0
"""The same for requests that must not be repeated."""
_MAX_IDLE_CONNECTIONS: Final = 512
_WARM: Final = 60.0
"""Seconds after a tool's last request in which a connection is kept ready for the next one."""
_CA_FILES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
)
_MAX_AGE: Final = 300.0
"""Seconds from its opening in which a connection is used, so that a changed DNS answer is followed under load too."""
_MARGIN: Final = 1.0
"""Seconds, or half the time if that is less, before the end of what the upstream's Keep-Alive says."""
_HIGH_WATER: Final = 256 * 1024
_PIECE: Final = 64 * 1024
_NO_MORE: Final = 300
"""An answer with this status or a higher one says that the rest of the request's body is not wanted."""
_LOGIN_BODY_LIMIT: Final = 64 * 1024
KEYS_TIMEOUT: Final = 5.0
"""Seconds that reading the files of keys may take."""
_HEAD_START: Final = 0.25
"""Seconds that one address of a host is ahead of the next one (RFC 8305 section 5)."""
_LOOK_UP_SHARED: Final = 1.0
"""Seconds after which a look-up that has no answer yet is no longer shared: the network may be back."""
_SUCCESS: Final = range(200, 300)
"""Any of these opens a tunnel (RFC 9110 section 9.3.6)."""
_GATEWAY_FAULTS: Final = frozenset({502, 503, 504})
_REFUSALS: Final = {
    **dict.fromkeys(
        (400, 404, 405, 501),
        "It seems to be a web server, or a proxy that opens no tunnels: check METQUAY_OUTBOUND_PROXY (or the system's "
        "proxy setting) and its port.",
    ),
    **dict.fromkeys(
        _GATEWAY_FAULTS,
        "The fault lies behind it: check METQUAY_HOST for a typing mistake, then ask whoever runs the proxy.",
    ),
    **dict.fromkeys(
        (301, 302, 303, 307, 308, 511),
        "It wants you to log in by a browser first: open any page in one, then try again.",
    ),
}
"""What to do about a corporate proxy's status."""
_SCHEME: Final = re.compile(rb"(?:\A|,)[ \t]*(basic|digest|negotiate|ntlm|kerberos|bearer)(?=[ \t,]|\Z)")
_TOO_MANY: Final = 429
_REPEATABLE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


@dataclass(frozen=True, slots=True)
class OutboundProxy:
    """A corporate proxy, asked for a tunnel by CONNECT; ``authorization`` is a whole header value or None."""

    host: str
    port: int
    authorization: str | None = None

    @classmethod
    def of(cls, host: str, port: int, user: str | None, password: str | None) -> OutboundProxy:
        """Make one from the parts of a proxy URL."""
        if user is None:
            return cls(host, port)
        pair = f"{user}:{password or ''}".encode()
        return cls(host, port, "Basic " + base64.b64encode(pair).decode("ascii"))

    def __repr__(self) -> str:
        """Leave out the password."""
        return f"OutboundProxy({self.host}:{self.port})"


class Response:
    """One answer that is arriving: first its head, then its body as a stream of pieces."""

    __slots__ = ("_body", "_connection", "_error", "_size", "_waiter", "notify", "paused", "reader", "upload")

    def __init__(self, connection: Connection, method: str) -> None:
        self.reader = ResponseReader(method)
        self.upload: asyncio.Task[None] | None = None
        self.notify: Callable[[], None] | None = None
        """Called once, at the next news, in place of waking who waits."""
        self._connection = connection
        self._body: deque[bytes] = deque()
        self._size = 0
        self.paused = False
        self._error: ProxyError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def head(self) -> ResponseHead:
        """The final head; only after ``started``."""
        return cast("ResponseHead", self.reader.head)

    @property
    def ended(self) -> bool:
        """Whether the whole body was read."""
        return self.reader.complete and not self._body

    @property
    def whole(self) -> bool:
        """Whether all of it has arrived, read or not."""
        return self.reader.complete

    async def started(self) -> None:
        """Wait for the head; raise ``UpstreamFailure``."""
        while self.reader.head is None:
            await self._wait()

    async def read(self) -> bytes:
        """Return the next piece of the body, empty at its clean end; raise ``UpstreamFailure`` where it breaks off."""
        while not self._body:
            if self.reader.complete:
                return b""
            await self._wait()
        return self.read_nowait()

    def read_nowait(self) -> bytes:
        """Return a piece that has arrived, or nothing."""
        if not self._body:
            return b""
        piece = self._body.popleft()
        self._size -= len(piece)
        if self._size < _HIGH_WATER:
            self.let_go()
        return piece

    def let_go(self) -> None:
        """Stop slowing the connection down: it has nothing more to do with this answer."""
        if self.paused:
            self.paused = False
            self._connection.resume_reading()

    def close(self) -> None:
        """Give the answer up; a connection in mid-answer can't be used again."""
        if self.upload is not None:
            self.upload.cancel()
        self._connection.abandon(self)

    def feed(self, data: bytes) -> None:
        """Take bytes from the connection; raise ``ProtocolError``."""
        piece = self.reader.feed(data)
        if piece:
            self._body.append(piece)
            self._size += len(piece)
            if self._size >= _HIGH_WATER and not self.paused and not self.reader.complete:
                self.paused = True
                self._connection.pause_reading()

    def fail(self, error: ProxyError) -> None:
        """End the answer with an error, the first of which counts."""
        if self._error is None and not self.reader.complete:
            self._error = error
        self.wake()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def wake(self) -> None:
        """Tell whoever waits that there is news."""
        notify, self.notify = self.notify, None
        if notify is not None:
            notify()
            return
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)


class Connection(asyncio.Protocol):
    """One connection to the upstream: carries one exchange at a time and knows how long it idled."""

    def __init__(self, owner: Transport) -> None:
        self._owner = owner
        self._loop = owner.loop
        self._transport: asyncio.Transport | None = None
        self._drained: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._poll: Callable[[], bool] | None = None
        self._unsent: Callable[[], int] = int
        self._unsent_before = 0
        self._tls: ssl.SSLObject | None = None
        self._truncated = False
        self._stray = False
        self.response: Response | None = None
        self.body: RequestBody | None = None
        self.used = False
        self.waits_for_client = False
        self.active_at = 0.0
        self.oldest = self.good_until = owner.clock() + _MAX_AGE
        """When it is too old, or has idled for longer than the upstream keeps it: a reading of the owner's clock."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: the connection is open, over TLS where that is asked for."""
        self._transport = cast("asyncio.Transport", transport)
        self._tls = transport.get_extra_info("ssl_object")
        self._truncated = self._tls is not None  # until the peer has said otherwise (RFC 9112 section 9.8)
        handle = transport.get_extra_info("socket")
        if handle is not None:
            self._poll = _poller(handle.fileno())
            self._unsent = _outgoing(handle.fileno())
        if self._stray:
            self.abort()

    def data_received(self, data: bytes) -> None:
        """Take a piece of the answer, or close where nobody waits for one."""
        response = self.response
        if response is None:
            self._stray = True
            self.abort()
            return
        self.active_at = self._loop.time()
        try:
            response.feed(data)
        except ProtocolError as error:
            message = (
                f"Metquay's answer was not valid HTTP ({error}), so that it was not passed on. "
                "Try again; if it stays, tell your administrator."
            )
            self._fail(UpstreamFailure("upstream-protocol", message, sent=self._sent()))
            return
        if response.reader.complete:
            self._finish(response)
        elif response.upload is not None and response.reader.head is not None and response.head.status >= _NO_MORE:
            response.upload.cancel()
        response.wake()

    def eof_received(self) -> bool:
        """Note whether the peer ended in order; over TLS it says so (RFC 8446 section 6.1)."""
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):  # it wants more: the alert that TLS ends with has not come
                self._truncated = self._tls.read(1) != b""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End: an answer that lasts until the connection closes is whole now, any other is broken."""
        if exc is not None and self._transport is not None and self._tls is None:
            for data in _left_behind(self._transport):
                self.data_received(data)
        self._transport = None
        self._owner.forget(self)
        response = self.response
        if response is not None:
            self.response = None
            if self._truncated:
                exc = ConnectionResetError()
            if exc is None:
                try:
                    response.reader.eof()
                except ProtocolError:
                    exc = ConnectionResetError()
            if exc is not None:
                response.fail(self._closed(response))
            else:
                response.wake()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def pause_writing(self) -> None:
        """Note that the upstream is slower than the client."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """Note that it takes bytes again."""
        self._writing_paused = False
        self.active_at = self._loop.time()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def pause_reading(self) -> None:
        """Stop reading: the client is slower than the upstream."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on. The time that the client took is not the upstream's silence."""
        self.active_at = self._loop.time()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    @property
    def stalled(self) -> bool:
        """Whether it waits for the client rather than for the upstream."""
        return self.waits_for_client or (self.response is not None and self.response.paused)

    def usable(self) -> bool:
        """Whether it is open and silent: neither closed by the peer nor holding bytes that belong to no request."""
        return self._transport is not None and not self._transport.is_closing() and not (self._poll and self._poll())

    def moved(self, now: float) -> bool:
        """Whether bytes of the request left since this was last asked, which is no silence."""
        if self._transport is None or self._transport.is_closing():
            return False
        unsent = self._transport.get_write_buffer_size() + self._unsent()
        moved = unsent != self._unsent_before
        if moved:
            self._unsent_before = unsent
            self.active_at = now
        return moved

    def begin(self, method: str, head: bytes, body: RequestBody) -> Response:
        """Send one request; a body that is not there yet follows by a task of its own."""
        if self._transport is None or self._transport.is_closing():
            message = "Metquay closed the connection before the request could be sent. Try again."
            raise UpstreamFailure("upstream-closed", message, repeatable=True)
        self.response = response = Response(self, method)
        self.body = body
        self.active_at = self._loop.time()
        transport = self._transport
        data = body.whole()
        if data is None:
            transport.write(head)
            response.upload = self._loop.create_task(self._upload(response, body))
        else:
            transport.write(_framed_whole(head, data, chunked=body.chunked))
            body.sent = True
        return response

    def abandon(self, response: Response) -> None:
        """Drop the exchange if it is still this connection's."""
        if self.response is response:
            self.response = None
            self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def time_out(self, seconds: float) -> None:
        """End the exchange because the upstream was silent for too long."""
        message = (
            f"Metquay did not answer: nothing came for {seconds:g} seconds. "
            "A read can simply be repeated; before you repeat a change, look whether it was made."
        )
        self._fail(UpstreamFailure("upstream-timeout", message, sent=self._sent()))

    def _finish(self, response: Response) -> None:
        self.response = None
        response.let_go()
        reader, head = response.reader, response.head
        if self.body is not None and self.body.sent and head.keep_alive and not reader.surplus:
            self.body = None
            self._owner.put_back(self, head.kept_for)
        else:
            if response.upload is not None:
                response.upload.cancel()
            self.abort()

    def _fail(self, error: ProxyError) -> None:
        response = self.response
        self.response = None
        if response is not None:
            if response.upload is not None:
                response.upload.cancel()
            response.fail(error)
        self.abort()

    def _sent(self) -> Sent:
        return "unknown" if self.body is not None and self.body.sent else "no"

    def _closed(self, response: Response) -> UpstreamFailure:
        if response.reader.head is not None:
            return UpstreamFailure(
                "upstream-closed", "Metquay broke the connection in the middle of its answer.", sent="yes"
            )
        message = (
            "Metquay closed the connection without an answer. "
            "A read can simply be repeated; before you repeat a change, look whether it was made."
        )
        stale = self.used and not response.reader.started
        return UpstreamFailure("upstream-closed", message, sent=self._sent(), repeatable=True, stale=stale)

    async def _upload(self, response: Response, body: RequestBody) -> None:
        chunks = body.chunks()
        while self._transport is not None and self.response is response:
            self.waits_for_client = True
            try:
                chunk = await anext(chunks, None)
            except ProxyError as error:
                self._fail(error)
                return
            except Exception as error:  # noqa: BLE001 - whatever the client's side raised, the upstream is not to blame
                self._fail(ClientBroke(error))
                return
            finally:
                self.waits_for_client = False
                self.active_at = self._loop.time()
            if self._transport is None or self.response is not response:
                return
            if chunk is None:
                if body.chunked:
                    self._transport.write(b"0\r\n\r\n")
                body.sent = True
                return
            self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if body.chunked else chunk)
            if self._writing_paused:
                self._drained = self._loop.create_future()
                await self._drained


class ClientBroke(ProxyError):
    """The client's own body ended early or was malformed; nothing complete was sent upstream."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            "bad-request", "The body of this request ended early or was not valid HTTP; nothing was sent to Metquay."
        )
        self.__cause__ = cause


def _framed_whole(head: bytes, data: bytes, *, chunked: bool) -> bytes:
    if not chunked:
        return head + data if data else head
    if not data:
        return head + b"0\r\n\r\n"
    return b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(data), data)


def _poller(fd: int) -> Callable[[], bool]:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return lambda: bool(poll.poll(0))
    return lambda: bool(select.select([fd], [], [], 0)[0])


def _outgoing(fd: int) -> Callable[[], int]:
    """Return what counts the bytes that the kernel has not yet brought to the peer, where it can be asked."""
    if sys.platform != "linux":
        return int
    return lambda: int.from_bytes(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _left_behind(transport: asyncio.BaseTransport) -> Iterator[bytes]:
    """Yield what a peer sent before it reset the connection: a loop whose write fails does not look for it."""
    handle = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if handle is not None:
            with handle.dup() as sock:
                while data := sock.recv(_PIECE):
                    yield data


class _LastWords(asyncio.BufferedProtocol):
    """Stands before the loop's TLS, and hands it what was left behind where a write fails."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._tls = cast("asyncio.BufferedProtocol", transport.get_protocol())
        for name in ("get_buffer", "buffer_updated", "eof_received", "pause_writing"):
            setattr(self, name, getattr(self._tls, name))  # with no call of ours between

    def resume_writing(self) -> None:
        # Where a write fails inside of this call, asyncio ends the connection twice, and at first without the error.
        asyncio.get_running_loop().call_soon(self._tls.resume_writing)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            for data in _left_behind(self._transport):
                cast("memoryview", self._tls.get_buffer(len(data)))[: len(data)] = data
                self._tls.buffer_updated(len(data))
        self._tls.connection_lost(exc)


class Transport:
    """Sends one request and returns one response, on a pooled or new connection to one upstream."""

    def __init__(  # noqa: PLR0913 - where to, and every time-out
        self,
        base: BaseURL,
        *,
        ssl_context: ssl.SSLContext | None,
        connect_timeout: float,
        read_timeout: float,
        outbound_proxy: OutboundProxy | None = None,
        max_idle: tuple[float, float] = (MAX_IDLE, MAX_IDLE_UNSAFE),
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Time-outs are in seconds; ``read_timeout`` is silence between bytes, in either direction.

        ``clock`` tells how long a connection has idled, and should count the time in which the machine is suspended.

        ``max_idle``: how long a connection may have idled before it is reused, by requests that may be repeated and by
        others.
        """
        self.loop = asyncio.get_running_loop()
        self.clock = clock or self.loop.time
        self._base = base
        self._ssl = ssl_context
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._proxy = outbound_proxy
        self._max_idle, self._max_idle_unsafe = max_idle
        self._idle: list[tuple[float, Connection]] = []
        self._busy: set[Connection] = set()
        self._opening: set[asyncio.Task[Connection]] = set()
        self._looking: tuple[float, asyncio.Future[Sequence[AddrInfoType]]] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._tick = max(0.01, min(1.0, read_timeout / 10))
        self._pace = max(self._max_idle - self._tick, self._max_idle / 2)
        """Seconds from one connection that is kept ready to the next: before the last one is too old to be used."""
        self._warm_until = self._opened_ahead = -math.inf
        self._cold = self._closed = False

    @property
    def connections(self) -> tuple[int, int]:
        """Return how many connections are (busy, idle)."""
        return len(self._busy), len(self._idle)

    def trust(self, context: ssl.SSLContext) -> None:
        """Verify new connections by ``context``."""
        self._ssl = context

    async def send(
        self, method: str, head: bytes, body: RequestBody, *, fresh: bool = False, on_sent: Callable[[], object] = int
    ) -> Response:
        """Send a tool's request and wait for the head of its answer; raise ``UpstreamFailure``.

        ``fresh``: on a new connection, because a pooled one has just failed. ``on_sent`` is called when the first byte
        has been handed to a connection that is finished (TCP, CONNECT and TLS).
        """
        self._warm_until = self.clock() + _WARM
        return await self.send_own(method, head, body, fresh=fresh, on_sent=on_sent)

    async def send_own(
        self, method: str, head: bytes, body: RequestBody, *, fresh: bool = False, on_sent: Callable[[], object] = int
    ) -> Response:
        """Send a request of the program's own, after which no connection is kept ready; otherwise like ``send``."""
        body.sent = False
        max_idle = self._max_idle if method in _REPEATABLE_METHODS else self._max_idle_unsafe
        connection = None if fresh else self._take(self.clock(), max_idle)
        if connection is None:
            connection = await self._connect()
        try:
            response = self._begin(connection, method, head, body)
        except BaseException:  # the client left with its body unread: nothing was sent, and nobody owns the connection
            connection.abort()
            raise
        on_sent()
        try:
            await response.started()
        except BaseException:
            response.close()
            raise
        return response

    def begin(self, method: str, head: bytes, body: RequestBody) -> Response | None:
        """Send a tool's request that may be repeated, if a connection is there; its answer has yet to start."""
        now = self.clock()
        self._warm_until = now + _WARM
        connection = self._take(now, self._max_idle)
        return None if connection is None else self._begin(connection, method, head, body)

    def _begin(self, connection: Connection, method: str, head: bytes, body: RequestBody) -> Response:
        response = connection.begin(method, head, body)
        self._busy.add(connection)
        if self._watchdog is None:
            self._start_watchdog()
        return response

    async def warm(self) -> None:
        """Open a connection for the next request."""
        self.put_back(await self._connect())

    def keep_warm(self) -> None:
        """Keep a connection ready from now on as though a tool had just asked for something."""
        self._warm_until = self.clock() + _WARM
        self._start_watchdog()

    def let_cool(self) -> None:
        """Keep no connection ready any more, whatever is still sent."""
        self._cold = True

    def put_back(self, connection: Connection, kept_for: float | None = None) -> None:
        """Take a connection that has finished its exchange, or has not had one yet.

        ``kept_for``: the seconds for which the upstream says that it keeps it, if it does.
        """
        self._busy.discard(connection)
        if self._closed or len(self._idle) >= _MAX_IDLE_CONNECTIONS:
            connection.abort()
            return
        connection.used = True
        now = self.clock()
        if kept_for is not None:
            connection.good_until = min(connection.oldest, now + kept_for - min(_MARGIN, kept_for / 2))
        self._idle.append((now, connection))
        if self._watchdog is None:
            self._start_watchdog()

    def forget(self, connection: Connection) -> None:
        """Drop a connection that was lost."""
        self._busy.discard(connection)
        if connection.response is None:
            self._idle = [pair for pair in self._idle if pair[1] is not connection]

    def close(self) -> None:
        """Close every connection at once; none is opened any more."""
        self._closed = self._cold = True
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        for task in self._opening:
            task.cancel()
        for connection in [*self._busy, *(connection for _, connection in self._idle)]:
            connection.abort()
        self._idle.clear()

    def _take(self, now: float, max_idle: float) -> Connection | None:
        while self._idle:
            since, connection = self._idle[-1]
            if since < now - max_idle:
                return None
            self._idle.pop()
            if now < connection.good_until and connection.usable():
                return connection
            connection.abort()
        return None

    def _watch(self) -> None:
        now = self.loop.time()
        for connection in tuple(self._busy):
            if not (connection.stalled or connection.moved(now)) and now - connection.active_at > self._read_timeout:
                connection.time_out(self._read_timeout)
        self._watchdog = None
        idled = self.clock()
        oldest = idled - self._max_idle
        pairs, self._idle = self._idle, []
        for since, connection in pairs:
            if since < oldest or connection.good_until <= idled:
                connection.abort()
            else:
                self._idle.append((since, connection))
        warm = not self._cold and idled < self._warm_until
        if warm and not self._busy:
            self._open_ahead(idled)
        if warm or self._busy or self._idle:
            self._start_watchdog()

    def _start_watchdog(self) -> None:
        if self._watchdog is None and not self._closed:
            self._watchdog = self.loop.call_later(self._tick, self._watch)

    def _open_ahead(self, now: float) -> None:
        """Open a connection for the next request, where none is young enough and none was just opened in vain."""
        latest = max(self._opened_ahead, self._idle[-1][0] if self._idle else -math.inf)
        if not self._opening and now - latest >= self._pace:
            self._opened_ahead = now
            self._start_opening().add_done_callback(self._opened)

    async def _connect(self) -> Connection:
        """Return a new connection. One whose request is given up meanwhile is opened all the same, for the next one."""
        task = self._start_opening()
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._opened)
            raise

    def _start_opening(self) -> asyncio.Task[Connection]:
        task = self.loop.create_task(self._open())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return task

    def _opened(self, task: asyncio.Task[Connection]) -> None:
        """Keep what nobody waits for; where that fails, wait for the next request, which will be told why."""
        if task.cancelled():
            return
        if task.exception() is None:
            self.put_back(task.result())
        else:
            self._warm_until = -math.inf

    async def _open(self) -> Connection:
        base, proxy = self._base, self._proxy
        try:
            async with asyncio.timeout(self._connect_timeout):
                sock = await (
                    self._reach(base.name, base.port) if proxy is None else self._reach(proxy.host, proxy.port)
                )
                if self._ssl is None:
                    _, connection = await self.loop.create_connection(lambda: Connection(self), sock=sock)
                    return connection
                transport, before = await self.loop.create_connection(_BeforeTLS, sock=sock)
                try:
                    if proxy is not None:
                        await _make_tunnel(transport, before, base, proxy)
                    elif before.answer.done():
                        await before.answer
                    return await self._secure(transport, self._ssl)
                except BaseException:
                    transport.abort()
                    raise
        except TimeoutError:
            message = (
                f"{base.authority} could not be reached within {self._connect_timeout:g} seconds. "
                "Check the network (VPN, firewall, corporate proxy), then try again."
            )
            raise UpstreamFailure("upstream-unreachable", message, repeatable=True) from None
        except OSError as error:
            raise _connect_failure(error, base, self._proxy) from None

    async def _reach(self, host: str, port: int) -> socket.socket:
        """Return a socket that is connected to whichever address of a host answers first; raise ``OSError``."""
        return await start_connection(await self._look_up(host, port), happy_eyeballs_delay=_HEAD_START)

    async def _look_up(self, host: str, port: int) -> Sequence[AddrInfoType]:
        """Return a host's addresses; raise ``socket.gaierror``. Who asks while another asks shares its answer.

        Nothing can cut a look-up short.
        """
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        now = self.loop.time()
        if self._looking is None or self._looking[1].done() or now - self._looking[0] > _LOOK_UP_SHARED:
            found: asyncio.Future[Any] = in_thread(
                functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
            )
            found.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to see it
            self._looking = now, found
        return await asyncio.shield(self._looking[1])

    async def _secure(self, transport: asyncio.Transport, context: ssl.SSLContext) -> Connection:
        connection = Connection(self)
        secured = await self.loop.start_tls(transport, connection, context, server_hostname=self._base.host)
        if secured is None or secured.is_closing():
            raise ConnectionResetError
        if not transport.is_closing():
            transport.set_protocol(_LastWords(transport))
        connection.connection_made(secured)
        return connection


class _BeforeTLS(asyncio.Protocol):
    """What comes before TLS begins: the corporate proxy's answer to CONNECT, or nothing.

    ``answer`` raises ``ConnectionResetError``, and ``SSLError`` where somebody speaks who was not asked, which no TLS
    server does.
    """

    def __init__(self) -> None:
        self.answer: asyncio.Future[ResponseHead] = asyncio.get_running_loop().create_future()
        self.reader: ResponseReader | None = None

    def data_received(self, data: bytes) -> None:
        if self.answer.done():
            return
        if self.reader is None:
            self.answer.set_exception(ssl.SSLError())
            return
        try:
            self.reader.feed(data)
        except ProtocolError:
            self.answer.set_exception(ConnectionResetError("the corporate proxy's answer was not valid HTTP"))
            return
        if self.reader.head is not None:
            self.answer.set_result(self.reader.head)

    def connection_lost(self, _exc: Exception | None, /) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionResetError("the corporate proxy closed the connection"))


async def _make_tunnel(transport: asyncio.Transport, before: _BeforeTLS, base: BaseURL, proxy: OutboundProxy) -> None:
    authority = f"[{base.host}]:{base.port}" if ":" in base.host else f"{base.host}:{base.port}"
    head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
    if proxy.authorization is not None:
        head += f"Proxy-Authorization: {proxy.authorization}\r\n"
    before.reader = ResponseReader("CONNECT")
    transport.write(head.encode("ascii") + b"\r\n")
    answer = await before.answer
    status = answer.status
    if status in _SUCCESS:
        return
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        cure = _what_it_wants(answer, given=proxy.authorization is not None)
    else:
        cure = _REFUSALS.get(status, "Ask whoever runs it to allow this address.")
    did = "found no way to" if status in _GATEWAY_FAULTS else "refused the way to"
    message = f"The corporate proxy {proxy.host}:{proxy.port} {did} {authority} (status {status}). {cure}"
    raise UpstreamFailure("upstream-unreachable", message, repeatable=status in _GATEWAY_FAULTS)


def _what_it_wants(answer: ResponseHead, *, given: bool) -> str:
    """Return what to do about a corporate proxy's 407; ``given``: it got a user name and password."""
    asked = b",".join(value for name, value in answer.noted if name == b"proxy-authenticate")
    schemes = dict.fromkeys(scheme.decode() for scheme in _SCHEME.findall(asked))
    if schemes and "basic" not in schemes:
        wanted = " or ".join("NTLM" if scheme == "ntlm" else scheme.title() for scheme in schemes)
        return (
            f"It wants a login by {wanted}, which metquay-proxy does not speak. px (or cntlm, for NTLM) does: let one "
            "of them run on this computer, and set METQUAY_OUTBOUND_PROXY=http://127.0.0.1:3128."
        )
    if given:
        return (
            "It does not accept the user name and password in METQUAY_OUTBOUND_PROXY (or in the system's proxy "
            "setting): check both. A % in them is written %25."
        )
    return "It wants a user name and password: put them into METQUAY_OUTBOUND_PROXY (http://user:password@host:port)."


def _connect_failure(error: OSError, base: BaseURL, proxy: OutboundProxy | None) -> UpstreamFailure:
    place = (
        base.authority if proxy is None else f"{base.authority} (through the corporate proxy {proxy.host}:{proxy.port})"
    )
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or "it can't be verified"
        message = (
            f"The certificate of {place} was not accepted: {why}. Nothing was sent. If your company inspects TLS or "
            "Metquay runs on a server of your own, put the issuing CA's certificate (PEM) into METQUAY_CA_BUNDLE."
        )
        return UpstreamFailure("upstream-tls", message)
    if isinstance(error, ssl.SSLError):
        why = getattr(error, "reason", None) or "TLS failed"
        message = (
            f"No secure connection to {place} could be made ({why}). Nothing was sent. Check "
            "that the address is right and speaks TLS on that port; an intercepting firewall needs its CA in "
            "METQUAY_CA_BUNDLE."
        )
        return UpstreamFailure("upstream-tls", message, repeatable=True)
    setting = "METQUAY_HOST"
    if proxy is not None and not isinstance(error, ConnectionResetError):  # what lies behind it was not asked for yet
        place, setting = f"The corporate proxy {proxy.host}:{proxy.port}", "METQUAY_OUTBOUND_PROXY (or the system's)"
    if (short := _shortage(error)) is not None:
        why, cure = short[0], short[1].removesuffix(".")
    elif isinstance(error, socket.gaierror):
        why, cure = "its name could not be looked up", f"Check {setting} and the network's name server (DNS)"
    elif isinstance(error, ConnectionRefusedError) or error.errno == errno.ECONNREFUSED:
        why, cure = "nothing listens there", f"Check {setting} and its port"
    elif isinstance(error, ConnectionResetError):
        told = proxy is not None and error.errno is None and error.args
        why, cure = str(error) if told else "the connection was closed at once", "Try again"
    else:
        why, cure = "the network gives no way to it", "Check the network (VPN, firewall, corporate proxy)"
    message = f"{place} could not be reached: {why}. {cure}."
    return UpstreamFailure("upstream-unreachable", message, repeatable=True)


def _shortage(error: OSError) -> tuple[str, str] | None:
    """Return what the system ran out of; of a look-up, which does not say why it failed, another attempt tells."""
    if isinstance(error, socket.gaierror):
        try:
            socket.socket().close()
        except OSError as reason:
            error = reason
    return shortage(error)


def tls_context(ca_bundle: Path | None) -> ssl.SSLContext:
    """Return a context that verifies names and certificates by the operating system's store and ``ca_bundle``."""
    if sys.platform in {"win32", "darwin"}:
        context: ssl.SSLContext = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    else:
        # truststore would read the whole store again at each connection, 50 ms in which nobody else is served
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_default_certs()
        paths = ssl.get_default_verify_paths()
        known = [Path(file) for file in _CA_FILES if Path(file).is_file()]
        if paths.cafile is None and paths.capath is None and known:  # an OpenSSL that was built for another system
            context.load_verify_locations(known[0])
    context.set_alpn_protocols(["http/1.1"])
    # as curl does: the CA that issued the server's certificate will do, without the root above it
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if ca_bundle is not None:
        context.load_verify_locations(ca_bundle)
    return context


class Login:
    """The source of tokens: one ``POST {base}/authenticate``, with the keys read anew each time.

    Where they can't be read any more, those that were read before are used.
    """

    def __init__(
        self, transport: Transport, base: BaseURL, credentials: Callable[[], Credentials], clock: Callable[[], float]
    ) -> None:
        """``credentials`` may read files and raise ``OSError`` or ``ValueError``; ``clock`` is the token cache's."""
        self._transport = transport
        self._base = base
        self._credentials = credentials
        self._keys: Credentials | None = None
        self._clock = clock

    async def token(self) -> AccessToken:
        """Log in; raise ``LoginFailed``."""
        try:
            async with asyncio.timeout(KEYS_TIMEOUT):
                self._keys = await in_thread(self._credentials)
        except (OSError, ValueError) as error:
            if self._keys is None:
                msg = f"The keys could not be read: {error}" if str(error) else "The keys could not be read in time."
                raise LoginFailed(msg) from None
        keys = self._keys
        data = json.dumps({"accessKey": keys.access_key, "secretKey": keys.secret_key}).encode()
        head = (
            f"POST {self._base.prefix}/authenticate HTTP/1.1\r\nHost: {self._base.authority}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nAccept: application/json\r\n\r\n"
        )
        began = self._clock()
        try:
            said, answer = await self._exchange(head.encode("ascii"), data)
        except ProxyError as error:
            failure = UpstreamDistrusted if error.slug == "upstream-tls" else LoginFailed
            raise failure(error.message) from None
        pause = retry_after_seconds(said.headers, answer if said.status == _TOO_MANY else b"", time.time())
        location = b"".join(value for name, value in said.headers if name.lower() == b"location").decode("latin-1")
        with contextlib.suppress(ValueError):  # it is judged as it came
            location = location and urljoin(f"{self._base}/authenticate", location)
        try:
            return parse_login(said.status, answer, began, pause=pause, location=location)
        except CredentialsRejected as refusal:
            raise CredentialsRejected(" ".join([str(refusal), *(f"{doubt}." for doubt in keys.doubts())])) from None

    async def _exchange(self, head: bytes, data: bytes) -> tuple[ResponseHead, bytes]:
        # the keys' own bytes are never kept for a replay: the body is a stream that has already ended
        body = RequestBody(
            _Ready(data), present=True, chunked=False, limit=len(data), budget=ReplayBudget(len(data)), timeout=1.0
        )
        response = await self._transport.send_own("POST", head, body)
        answer = b""
        try:
            while piece := await response.read():
                answer += piece
                if len(answer) > _LOGIN_BODY_LIMIT:
                    msg = "the answer to the login is far too long; is METQUAY_HOST right?"
                    raise LoginFailed(msg)
        finally:
            body.close()
            response.close()
        return response.head, answer


class _Ready:
    """A body that is complete from the start."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def is_eof(self) -> bool:
        return True

    def at_eof(self) -> bool:
        return not self._data

    def read_nowait(self, _n: int = -1, /) -> bytes:
        data, self._data = self._data, b""
        return data

    async def readany(self) -> bytes:
        return self.read_nowait()
