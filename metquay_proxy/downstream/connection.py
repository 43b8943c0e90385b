"""The client's side of every exchange.

Owns the adapter between aiohttp's low-level server and the program's own types, the pump of answer bodies and the
drain. Must not hold a rule that ``target``, ``gate``, ``rewrite`` or ``forwarder`` could hold.

Facts about aiohttp's server (each has a test): its flags go to ``web.Server``; errors of its parser never reach a
handler but ``handle_error``, those in mid-body not even the reader of that body, and they take along the requests
before them in the same segment; the last trailer field becomes a field of the next request; it accepts
Transfer-Encoding on HTTP/1.0 and other than ``chunked``, RTSP and ICE for HTTP/1.0, and 2^64-1 for no length; an answer
that is written past its own writer leaves that at zero bytes, so that nothing may escape from the handler once a head
was written; after ``close()`` a connection ignores the rest of a body that is still arriving. RFC 9112 sections 6.1,
9.3, 9.6; RFC 9110 section 10.1.1 (Expect).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import re
import socket
import struct
import sys
import time
from datetime import UTC, datetime
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import BadStatusLine
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from metquay_proxy.downstream.pages import Admin, Answer, wrong_method
from metquay_proxy.exchange.body import ReplayBudget, RequestBody
from metquay_proxy.exchange.exchange import Exchange
from metquay_proxy.exchange.forwarder import READING, Forwarder, Request
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.gate import PLACEHOLDER_LIFETIME, PROBES, Admission, Gate
from metquay_proxy.rules.headers import RequestHead, inbound
from metquay_proxy.rules.http1 import (
    MAX_FIELDS,
    MAX_HEAD,
    MAX_LINE,
    ChunkTracker,
    ProtocolError,
    head_fault,
    plain_fields,
    read_plain,
    request_fault,
)
from metquay_proxy.rules.target import LOGIN_PATH, BaseURL
from metquay_proxy.telemetry import Telemetry, masked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader

    from metquay_proxy.audit import AuditLog
    from metquay_proxy.exchange.forwarder import Begun, Response
    from metquay_proxy.rules.http1 import ResponseHead
    from metquay_proxy.rules.target import TargetRules

    _Plain = tuple[RequestHead, bool, str]

_REPLAY_TOTAL: Final = 64 * 1024 * 1024
_LOGIN_LIMIT: Final = 64 * 1024
_PATIENCE: Final = 0.1
"""Seconds for the last answers of a drain to be written; shorter waits are not worth telling."""
_FLUSH: Final = 1.0
"""Seconds for the last lines of the audit log to be written."""
_LONGEST_AGENT: Final = 200
_CRLF: Final = b"\r\n"
_BLANK_LINE: Final = b"\r\n\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"
_REQUEST_LINE: Final = re.compile(rb"(?=.{,%d}\r)[A-Z-]++ [\x21-\x7e]++ HTTP/1\.[01]\r\n" % MAX_LINE)
_NOT_PLAIN: Final = frozenset(
    {b"content-length", b"transfer-encoding", b"upgrade", b"expect", b"te", b"trailer", b"origin", b"http2-settings"}
)
_SECRETS: Final = frozenset({b"authorization", b"proxy-authorization", b"x-proxy-key", b"cookie"})
_QUIET: Final = PROBES | {"/-/metrics", "/-/events"}
_REMEMBERED: Final = 64
_LONGEST_REMEMBERED: Final = 2048
_PERSISTENCE: Final[dict[bytes | None, bool]] = {b"keep-alive": True, b"Keep-Alive": True, b"close": False}

log = structlog.get_logger("metquay_proxy")


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may take of time, in seconds.

    ``head``: for a request's head, from its first byte, and for a new connection's first byte; ``idle``: between
    requests; ``linger``: how long a refused client may go on sending, so that it finds time to read the refusal.
    """

    head: float = 15.0
    idle: float = 120.0
    linger: float = 2.0


class _Done:
    """What a handler returns to aiohttp when the answer has been written already."""

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, _request: web.BaseRequest) -> None:
        """Write nothing."""

    async def write_eof(self) -> None:
        """Write nothing."""


class _Refused(_Done):
    """The answer went to a client that may still be sending."""

    def __init__(self, connection: ClientConnection) -> None:
        super().__init__(keep_alive=False)
        self._connection = connection

    async def write_eof(self) -> None:
        """Wait for the client."""
        await self._connection.linger()


_KEEP: Final = _Done(keep_alive=True)
_CLOSE: Final = _Done(keep_alive=False)


class ClientConnection(RequestHandler):
    """One client's connection: bounds the size and the time of request heads, and makes the parser's errors ours.

    It finds the end of each message itself and hands the parser one at a time, without trailers: what the parser would
    do otherwise is among the facts above.
    """

    __slots__ = (
        "_begun",
        "_body",
        "_chunks",
        "_deaf",
        "_head",
        "_head_timer",
        "_last",
        "_left",
        "_refused",
        "_server",
        "_unread",
        "address",
        "exchange",
        "lane",
    )

    def __init__(self, server: Server, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's own
        super().__init__(server, **kwargs)
        self._server = server
        self._begun = False
        self._deaf = False
        self._head = bytearray()
        self._head_timer: asyncio.TimerHandle | None = None
        self._body: StreamReader | None = None
        self._chunks: ChunkTracker | None = None
        self._left = 0
        self._last = False
        self._unread = b""
        self._refused = b""
        self.address: str | None = None
        """The client's, where that is another machine."""
        self.exchange: Exchange | None = None
        self.lane: Lane | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, and give the client its time for the first byte.

        aiohttp's own would begin a task here, which a connection of plain reads never needs.
        """
        self.transport = cast("asyncio.Transport", transport)
        self.address = remote(transport.get_extra_info("peername"))
        self._server.connection_made(self, self.transport)
        self._start_head_timer()

    def _begin_task(self) -> None:
        """Let aiohttp serve what comes from here on."""
        if not self._begun:
            self._begun = True
            self._task_handler = self._loop.create_task(self.start())

    def connection_lost(self, exc: BaseException | None) -> None:
        """End; aiohttp cancels the handler."""
        self._stop_head_timer()
        if self.lane is not None:
            self.lane.drop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came; nothing is meant by ``b""`` but that the parser may go on."""
        if self._deaf:
            return
        if self.lane is not None and not self.lane.left:
            self._unread += data
            if len(self._unread) > MAX_HEAD:
                self._pause_transport_reading()
            return
        if self._body is None and not self._head and not self._unread and self._taken_whole(data):
            return
        if not data:
            super().data_received(data)  # what the parser held back while it was paused
        if self._unread:
            data = self._unread + data
        elif type(data) is not bytes:
            data = bytes(data)
        start = 0
        while start < len(data) and not (
            self._deaf or self._reading_paused or len(self._messages) >= self._max_msg_queue_size
        ):
            start = self._take_head(data, start) if self._body is None else self._take_body(self._body, data, start)
        self._unread = b"" if self._deaf else data[start:]

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what the parser refused, in the form of every other error."""
        if self.exchange is not None and self.exchange.head_sent:
            abort(self)
            raise ConnectionResetError
        del request, exc, message
        if status == HTTPStatus.REQUEST_TIMEOUT:
            seconds = self._server.bounds.head
            why = f"The head of this request was not complete {seconds:g} seconds after its first byte."
            error = ProxyError("request-timeout", why)
        elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            why = "The proxy made a mistake with this request. Its log says more."
            error = ProxyError("internal-error", why, sent="unknown")
        else:
            error = request_fault(self._refused)
        exchange = Exchange("-", "-")
        exchange.address = self.address
        self._server.telemetry.opened()
        try:
            write_error(self, exchange, error, keep=False, with_body=True)
        finally:
            self._server.telemetry.closed(exchange)
        return cast("web.StreamResponse", _Refused(self))

    async def linger(self) -> None:
        """Let the client read its answer before the connection closes (RFC 9112 section 9.6).

        To close while it is still sending would reset the connection, and the reset could overtake the answer.
        """
        self._deaf = True
        self._unread = b""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if transport.can_write_eof():
            with contextlib.suppress(OSError):  # it was reset, which its loss will tell
                transport.write_eof()
        self._resume_transport_reading()
        await asyncio.sleep(self._server.bounds.linger)

    def _taken_whole(self, data: bytes) -> bool:
        """Take what is one whole head and nothing else; return whether it was."""
        if len(data) > MAX_LINE or type(data) is not bytes:
            return False
        if not (self._messages or self._force_close) and (not self._begun or self._waits):
            self.lane = self._server.send_at_once(self, data)
            if self.lane is not None:
                self._stop_head_timer()
                return True
        end = data.find(_BLANK_LINE)
        if end < 0 or end + 4 != len(data) or not _REQUEST_LINE.match(data):
            return False
        self._take_message(data, data)
        return True

    def take_over(self, data: bytes) -> None:
        """Let aiohttp's server go on with a request that was sent at once; ``data`` is its head."""
        self._take_message(data, data)
        self._go_on()

    def served_at_once(self, *, keep: bool) -> None:
        """Be ready for the next request, or close."""
        self.lane = None
        transport = self.transport
        if transport is None:
            return
        if not keep:
            transport.close()
            return
        self._next_keepalive_close_time = self._loop.time() + self._server.bounds.idle
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        if self._unread:
            self._go_on()

    def _go_on(self) -> None:
        data, self._unread = self._unread, b""
        if data:
            self._resume_transport_reading()
            self.data_received(data)

    @property
    def _waits(self) -> bool:
        """Whether aiohttp's task waits for a request; in a request's time there are gaps in all else."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def serving(self) -> bool:
        """Whether a request is being served or waits for that, or a refused client may still be reading why."""
        if self.lane is not None:
            return True
        if self._task_handler is None or self._task_handler.done():
            return False
        return bool(self._messages) or not self._waits

    @property
    def unsent(self) -> bool:
        """Whether the client has not yet taken all of what it was answered."""
        return self.transport is not None and self.transport.get_write_buffer_size() > 0

    @property
    def idle(self) -> bool:
        """Whether nothing is under way, not even the head of a request."""
        return not (self.serving or self.unsent or self._head)

    def _take_head(self, data: bytes, start: int) -> int:
        """Take a head, or what is there of it; return where it ends in ``data``."""
        head = self._head
        held = len(head)
        if held:
            head += data[start : start + MAX_HEAD - held]
            size = head.find(_BLANK_LINE, max(0, held - 3)) + 4
        else:
            while start < len(data) and data[start] in _CRLF:  # RFC 9112 section 2.2: empty lines before a request
                start += 1
            size = data.find(_BLANK_LINE, start, start + MAX_HEAD) + 4 - start
            if size < 4:  # noqa: PLR2004 - the blank line's own length: it was not found
                head += data[start : start + MAX_HEAD]
        if size >= 4:  # noqa: PLR2004 - as above
            stop = start + size - held
            whole = bytes(head[:size]) if held else data[start:stop]
            head.clear()
            self._take_message(data[start:stop], whole)
            return stop
        if len(head) >= MAX_HEAD:
            self._refuse(head)
        elif head:
            if not held:
                self._start_head_timer()
            if self._feed(data[start:]):
                self._deaf, self._refused = True, bytes(head)
                self._stop_head_timer()
        return len(data)

    def _take_message(self, data: bytes, whole: bytes) -> None:
        """Hand the parser the (rest of the) bytes of one head; ``whole`` is all of it."""
        if self._head_timer is not None:
            self._stop_head_timer()
        self._begin_task()
        count = self._request_count
        RequestHandler.data_received(self, data)
        if self._request_count == count:
            self._refuse(whole)  # the parser waits for more, as after HTTP/2's preface
            return
        message, payload = self._messages[-1]
        if isinstance(message, _ErrInfo):
            self._deaf, self._refused = True, whole
        elif not _REQUEST_LINE.match(whole):
            self._messages.pop()
            self._refuse(whole)
        elif payload is EMPTY_PAYLOAD or self._upgraded:
            self._deaf = message.should_close or message.upgrade
        else:
            self._body = payload
            self._last = message.should_close or message.upgrade
            if message.chunked:
                self._chunks = ChunkTracker(max_trailers=MAX_HEAD, max_fields=MAX_FIELDS)
            else:
                self._left = int(message.headers["Content-Length"])

    def _take_body(self, body: StreamReader, data: bytes, start: int) -> int:
        """Take a part of a body; return where it ends in ``data``."""
        if self._chunks is None:
            stop = min(start + self._left, len(data))
            self._left -= stop - start
            ended = not self._left
            broken = self._feed(data[start:stop])
        else:
            try:
                upto, stop = self._chunks.scan(data, start)
            except ProtocolError:
                ended, stop, broken = False, len(data), True
            else:
                ended = self._chunks.ended
                # trailers stop here, as RFC 9110 section 6.5.1 allows
                broken = self._feed(data[start:upto] + _CRLF if ended else data[start:upto])
        if broken:
            self._deaf = True
            body.set_exception(web.RequestPayloadError("malformed body"))
        elif ended:
            self._body = self._chunks = None
            self._deaf = self._last
        return stop

    def _feed(self, data: bytes) -> bool:
        """Hand bytes to the parser; in a body, or in a part of a head, return whether it refused them."""
        self._begin_task()
        count = self._request_count
        super().data_received(data)
        if self._request_count == count:
            return False
        if self._body is not None:
            self._messages.pop()
        return True

    def _head_late(self) -> None:
        self._head_timer = None
        if self._head:
            self._refuse()
        elif self._current_request is None:
            self.force_close()

    def _process_keepalive(self) -> None:
        if self._head or self.lane is not None:  # the head's own timer sees to it, or what comes after the answer
            self._keepalive_handle = None
        else:
            super()._process_keepalive()
            if self._keepalive_handle is None and not self._begun:  # aiohttp looks whether its task waits
                self.force_close()

    def _refuse(self, head: bytes | bytearray = b"") -> None:
        """Queue a refusal of a head behind the requests that came before it, and read no more; none came in time."""
        self._deaf, self._refused = True, bytes(head)
        self._stop_head_timer()
        self._begin_task()
        status, exc = (400, BadStatusLine()) if head else (408, TimeoutError())
        self._messages.append((_ErrInfo(status=status, exc=exc, message=""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self._loop.call_later(self._server.bounds.head, self._head_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Lane:
    """A plain read that went to Metquay in the moment in which it came, without a task of its own.

    Nothing is decided here. A whole answer that is to be passed on is written in the moment in which it comes, too;
    whatever else happens, the request leaves the lane for ``Server.handle``, which takes it up where it is.
    """

    __slots__ = ("_connection", "_data", "_server", "begun", "exchange", "keep", "left", "request")

    def __init__(  # noqa: PLR0913 - one request, and where it is
        self,
        server: Server,
        connection: ClientConnection,
        data: bytes,
        request: Request,
        exchange: Exchange,
        begun: Begun,
        *,
        keep: bool,
    ) -> None:
        self._server = server
        self._connection = connection
        self._data = data
        self.request = request
        self.exchange = exchange
        self.begun = begun
        self.keep = keep
        self.left = False
        begun.response.notify = self._news

    def leave(self) -> None:
        """Go on in a task."""
        self.left = True
        self.request.body = self._server.no_body(sent=True)
        self.begun.response.notify = None
        self._connection.take_over(self._data)

    def drop(self) -> None:
        """End, because the client has left."""
        self._connection.lane = None
        self.begun.response.notify = None
        self.begun.response.close()
        self._server.drop_at_once(self)

    def _news(self) -> None:
        connection = self._connection
        transport = connection.transport
        if transport is None or transport.is_closing():
            return  # the connection's loss, which comes next, ends it
        if connection.writing_paused or self._server.draining:
            self.leave()
            return
        try:
            data = self._server.answer_at_once(self)
        except Exception as failure:  # noqa: BLE001 - whatever it is, it must not reach the other connection's protocol
            _as_error(failure, self.exchange)
            abort(connection)
            return
        if data is None:
            self.leave()
            return
        self.exchange.head_sent = True
        transport.write(data)
        self._server.telemetry.closed(self.exchange)
        connection.served_at_once(keep=self.keep)


def remote(peer: object) -> str | None:
    """Return the address of a peer's name, if that is another machine's; an IPv4 address is one in IPv6 too."""
    if not isinstance(peer, tuple):
        return None  # a unix socket's
    address = ipaddress.ip_address(peer[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return None if address.is_loopback else str(address)


def abort(connection: ClientConnection) -> None:
    """Break the client's connection so that it can't take what it got for a complete answer.

    A plain close looks like a clean end where the body lasts until the connection closes, so that this one is reset.
    """
    transport = connection.transport
    if transport is None:
        return
    handle = transport.get_extra_info("socket")
    if handle is not None and handle.family != getattr(socket, "AF_UNIX", None):
        with contextlib.suppress(OSError):  # the peer may have closed already, which is what we want
            handle.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
            )
    transport.abort()


def write(connection: ClientConnection, data: bytes) -> None:
    """Write to the client; raise ``ConnectionResetError`` where it has gone."""
    transport = connection.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError
    transport.write(data)


def write_error(
    connection: ClientConnection, exchange: Exchange, error: ProxyError, *, keep: bool, with_body: bool
) -> None:
    """Write one of the proxy's own errors (part 8 of the contract)."""
    exchange.note_sent(error.sent)
    exchange.error = error.slug
    if exchange.path == "-":
        exchange.reason = error.message
    fields = [
        ("Content-Type", "application/json"),
        ("X-Metquay-Proxy-Error", error.slug),
        ("X-Metquay-Proxy-Sent", exchange.sent),
        ("X-Metquay-Proxy-Attempts", str(exchange.attempts)),
        *error.headers,
    ]
    if error.retry_after is not None:
        fields.append(("Retry-After", str(error.retry_after)))
    write_own(connection, exchange, error.status, fields, error.body(), keep=keep, with_body=with_body)


def write_own(  # noqa: PLR0913 - the parts of one answer
    connection: ClientConnection,
    exchange: Exchange,
    status: int,
    fields: list[tuple[str, str]],
    body: bytes | None,
    *,
    keep: bool,
    with_body: bool,
) -> None:
    """Write an answer of the proxy's own; ``body`` is None where it follows."""
    exchange.status = status
    exchange.head_sent = True
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    fields += [
        *exchange.cors,
        ("Cache-Control", "no-store"),
        ("Date", formatdate(usegmt=True)),
        ("X-Request-Id", exchange.id),
        ("Connection", "keep-alive" if keep else "close"),
    ]
    if body is not None and status != HTTPStatus.NO_CONTENT:
        fields.append(("Content-Length", str(len(body))))
    lines += [f"{name}: {value}" for name, value in fields]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    write(connection, head + body if body and with_body else head)


class Server(web.Server):
    """The aiohttp server with our connections, and the one handler of every request."""

    def __init__(  # noqa: PLR0913 - the collaborators of one exchange
        self,
        *,
        rules: TargetRules,
        gate: Gate,
        forwarder: Forwarder,
        admin: Admin,
        telemetry: Telemetry,
        base: BaseURL,
        scheme: str,
        audit: AuditLog | None,
        replay_limit: int,
        read_timeout: float,
        bounds: Bounds,
    ) -> None:
        """``scheme`` is what clients speak to us; sizes in bytes, times in seconds."""
        super().__init__(
            self.handle,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=MAX_LINE,
            max_field_size=MAX_HEAD,
            max_headers=MAX_FIELDS,
            lingering_time=0,  # our own linger() takes its place
            keepalive_timeout=bounds.idle,
        )
        self._rules = rules
        self._gate = gate
        self._forwarder = forwarder
        self._admin = admin
        self.telemetry = telemetry
        self._base = base
        self._origin = f"{scheme}://".encode()
        self._audit = audit
        self._replay_limit = replay_limit
        self._budget = ReplayBudget(_REPLAY_TOTAL)
        self._read_timeout = read_timeout
        self._nothing = self.no_body(sent=True)
        """The body of every read that is sent at once, until it leaves its lane."""
        self.bounds = bounds
        self._plain_heads: dict[bytes, _Plain] = {}
        self._detached: set[asyncio.Task[None]] = set()
        self.draining = False
        self.stopping = False
        self.quit = asyncio.Event()

    def drain(self) -> None:
        """Begin the end; what was sent at once goes on in tasks, which can be told of it."""
        self.draining = True
        for connection in cast("list[ClientConnection]", self.connections):
            if connection.lane is not None and not connection.lane.left:
                connection.lane.leave()

    def busy(self) -> bool:
        """Close the connections on which nothing is under way; return whether anything still is."""
        connections = cast("list[ClientConnection]", self.connections)
        for connection in connections:
            if connection.idle:
                connection.force_close()
        return bool(self.telemetry.active) or any(each.serving or each.unsent for each in connections)

    async def end(self) -> None:
        """Give up what is still under way: each client is told so, or sees that its transfer is broken."""
        self.stopping = True
        for connection in cast("list[ClientConnection]", self.connections):
            if connection.serving and connection._task_handler is not None:  # noqa: SLF001 - aiohttp has no public way
                connection._task_handler.cancel()  # noqa: SLF001 - as above
            elif connection.unsent:
                abort(connection)
        for task in self._detached:
            task.cancel()
        if self._detached:
            await asyncio.wait(self._detached, timeout=_PATIENCE)
        await self.shutdown(_PATIENCE)
        if self._audit is not None:
            await asyncio.to_thread(self._audit.close, _FLUSH)

    def __call__(self) -> ClientConnection:
        """Make the protocol of one connection."""
        return ClientConnection(self, loop=self._loop, **self._kwargs)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one request; whatever happens, exactly one answer or one broken connection comes of it."""
        connection = cast("ClientConnection", request.protocol)
        message = request._message  # noqa: SLF001 - the raw target, which no public property gives
        lane, connection.lane = connection.lane, None
        exchange = connection.exchange = self._open(connection, message) if lane is None else lane.exchange
        body = self._body(request, message) if lane is None else lane.request.body
        detached = False
        keep = False
        try:
            keep = await (
                self._serve(connection, message, exchange, body)
                if lane is None
                else self._forward(connection, message, lane.request, exchange, lane.begun, keep=lane.keep)
            )
        except _Detached:
            detached = True
            raise asyncio.CancelledError from None
        except asyncio.CancelledError:
            if exchange.head_sent:
                abort(connection)
            left = not self.stopping or connection.transport is None
            if left or exchange.head_sent:
                exchange.error = "client-left" if left else "shutting-down"
                raise
            exchange.note_sent("unknown" if body.sent else "no")
            doubtful = exchange.sent != "no" and message.method not in READING
            self._answer_error(connection, exchange, _shutting_down(doubtful=doubtful), message, body)
        except Exception as failure:  # noqa: BLE001 - whatever it is, it must not leave the handler
            error = _as_error(failure, exchange)
            if exchange.head_sent:
                abort(connection)
            elif connection.transport is not None:
                keep = self._answer_error(connection, exchange, error, message, body)
        finally:
            if not detached:
                self._close(exchange, body)
        connection.exchange = None
        if keep and not self.draining:
            return cast("web.StreamResponse", _KEEP)
        return cast("web.StreamResponse", _CLOSE if body.arrived else _Refused(connection))

    def send_at_once(self, connection: ClientConnection, data: bytes) -> Lane | None:
        """Send a plain read that nothing speaks against and that need not wait; None for every other request.

        ``handle`` judges those anew, and tells their tools what speaks against them.
        """
        if self.draining or connection.writing_paused:
            return None
        plain = read_plain(data)
        if plain is None:
            return None
        method, target, lines = plain
        known = self._plain_heads.get(lines) or self._plain_head(lines)
        return None if known is None else self._send_at_once(connection, data, method, target, known)

    def _send_at_once(
        self, connection: ClientConnection, data: bytes, method: str, raw_target: str, known: _Plain
    ) -> Lane | None:
        head, keep, agent = known
        try:
            target = self._rules.parse(method, raw_target)
            admission = self._gate.check(method, target, head, time.time())
        except ProxyError:
            return None
        if target.own or target.pass_through:
            return None
        exchange = Exchange(method, target.sent)
        exchange.client = admission.client
        exchange.agent, exchange.address = agent, connection.address
        exchange.caller = admission.client or agent
        request = Request(method, target, head, self._nothing, exchange.caller, admission.read_only)
        begun = self._forwarder.begin(request, exchange)
        if begun is None:
            return None
        self.telemetry.opened()
        return Lane(self, connection, data, request, exchange, begun, keep=keep)

    def _plain_head(self, lines: bytes) -> _Plain | None:
        """Return the head of these field lines, whether the connection stays, and the User-Agent, if they are plain.

        A tool sends the same lines with each request, so that a few heads are remembered, but none that holds a secret.
        """
        fields = plain_fields(lines, MAX_FIELDS)
        head = None if fields is None else RequestHead(fields)
        keep = None if head is None else _persists(head)
        if fields is None or head is None or keep is None:
            return None
        known = head, keep, head.text(b"user-agent") or ""
        if len(lines) <= _LONGEST_REMEMBERED and _SECRETS.isdisjoint([name.lower() for name, _ in fields]):
            if len(self._plain_heads) >= _REMEMBERED:
                self._plain_heads.clear()
            self._plain_heads[lines] = known
        return known

    def answer_at_once(self, lane: Lane) -> bytes | None:
        """Return the answer's bytes for the client; None where it is no plain one, or not all there."""
        exchange = lane.exchange
        if not self._forwarder.passes(lane.begun, exchange):
            return None
        response = lane.begun.response
        chunked = response.head.length is None
        head = self._answer_head(lane.request, exchange, response.head, keep=lane.keep, chunked=chunked, modern=True)
        body = response.read_nowait()
        if not chunked:
            return head + body
        return b"%b%x\r\n%b\r\n%b" % (head, len(body), body, _LAST_CHUNK) if body else head + _LAST_CHUNK

    def drop_at_once(self, lane: Lane) -> None:
        """End an exchange whose client has left."""
        self._forwarder.leave(lane.begun)
        lane.exchange.error = lane.exchange.error or "client-left"
        self.telemetry.closed(lane.exchange)

    def _open(self, connection: ClientConnection, message: RawRequestMessage) -> Exchange:
        self.telemetry.opened()
        exchange = Exchange(message.method, "-")
        exchange.address = connection.address
        return exchange

    def no_body(self, *, sent: bool = False) -> RequestBody:
        """Return the body of a request that has none; ``sent``: an attempt has been made already."""
        body = RequestBody(
            EMPTY_PAYLOAD, present=False, chunked=False, limit=0, budget=self._budget, timeout=self._read_timeout
        )
        body.sent = sent
        return body

    def _body(self, request: web.BaseRequest, message: RawRequestMessage) -> RequestBody:
        return RequestBody(
            request.content,
            present=request.content is not EMPTY_PAYLOAD,
            chunked=message.chunked,
            limit=self._replay_limit,
            budget=self._budget,
            timeout=self._read_timeout,
        )

    def _answer_error(
        self,
        connection: ClientConnection,
        exchange: Exchange,
        error: ProxyError,
        message: RawRequestMessage,
        body: RequestBody,
    ) -> bool:
        """Write the error; return whether the connection can serve another request."""
        keep = (
            not (message.should_close or message.upgrade or self.draining or "Expect" in message.headers)
            and body.arrived
        )
        with contextlib.suppress(ConnectionResetError):  # the client left: the exchange is logged all the same
            write_error(connection, exchange, error, keep=keep, with_body=message.method != "HEAD")
        return keep

    async def _serve(
        self, connection: ClientConnection, message: RawRequestMessage, exchange: Exchange, body: RequestBody
    ) -> bool:
        """Judge the request and answer it; return whether the connection may stay open."""
        method = message.method
        head = RequestHead(message.raw_headers)
        exchange.agent = head.text(b"user-agent") or ""
        if (fault := head_fault(method, message.version.minor, head.judged)) is not None:
            raise fault
        exchange.cors = self._gate.cors(head)
        if self.draining:
            raise _shutting_down()
        target = self._rules.parse(method, message.path)
        exchange.path = target.sent if not target.own else target.local
        now = time.time()
        admission = self._gate.check(method, target, head, now)
        exchange.client = admission.client
        keep = not (message.should_close or message.upgrade)
        if admission.preflight:
            return self._preflight(connection, exchange, head, keep=keep and body.arrived)
        if message.upgrade and (head.text(b"upgrade") or "").lower() == "websocket":
            raise ProxyError("not-supported", "Metquay has no websockets, and this proxy forwards none.")
        login = target.local == LOGIN_PATH
        if login and method != "POST":
            raise wrong_method(method, LOGIN_PATH, "POST")
        if target.own and not login:
            exchange.quiet = target.unasked or target.local in _QUIET
            answer = self._admin.answer(method, target.local)
            if answer.stream is not None and method != "HEAD":
                return await self._stream(connection, message, exchange, answer, answer.stream(admission.client))
            return self._own(connection, exchange, answer, keep=keep and body.arrived, with_body=method != "HEAD")
        if b"expect" in head.judged and not body.arrived:
            self._continue(connection, message, head)
        if login:
            answer = await self._authenticate(admission, body, now)
            return self._own(connection, exchange, answer, keep=keep, with_body=True)
        request = Request(
            method,
            target,
            head,
            body,
            admission.client or exchange.agent,
            admission.read_only,
            target.pass_through and not self._gate.is_ours(head.text(b"authorization"), now),
            self._gate.scope(admission.client) if b"idempotency-key" in head.judged else None,
        )
        exchange.caller = request.caller
        return await self._forward(connection, message, request, exchange, None, keep=keep)

    async def _forward(  # noqa: PLR0913 - one exchange, and whether the connection stays
        self,
        connection: ClientConnection,
        message: RawRequestMessage,
        request: Request,
        exchange: Exchange,
        begun: Begun | None,
        *,
        keep: bool,
    ) -> bool:
        if request.method in READING:
            response = await self._forwarder.forward(request, exchange, begun)
        else:
            response = await self._write(request, exchange)
        try:
            modern = message.version.minor == 1
            return await self._relay(connection, request, exchange, response, keep=keep, modern=modern)
        finally:
            response.close()

    async def test(self) -> dict[str, Any]:
        """Read one customer as a tool would; return whether that went well (``ok``) and a ``text`` for people."""
        target = self._rules.parse("GET", "/customers?limit=1")
        exchange = Exchange("GET", target.sent)
        exchange.caller = "test of the connection"
        head = RequestHead([(b"Accept", b"application/json")])
        request = Request("GET", target, head, self.no_body(), exchange.caller)
        self.telemetry.opened()
        try:
            response = await self._forwarder.forward(request, exchange)
            exchange.head_at = time.perf_counter()
            exchange.status = response.head.status
            exchange.answered_by = "metquay"
            response.close()
        except ProxyError as error:
            exchange.status = error.status
            exchange.error = error.slug
            return {"ok": False, "text": error.message}
        finally:
            self.telemetry.closed(exchange)
        if exchange.status != HTTPStatus.OK:
            why = "`metquay-proxy check` says more."
            return {"ok": False, "text": f"Metquay answered, but not with customers (status {exchange.status}): {why}"}
        waited = f", after {exchange.waited:.1f} s in which the request waited" if exchange.waited >= _PATIENCE else ""
        return {"ok": True, "text": f"Metquay answered in {exchange.upstream * 1000:.0f} ms{waited}."}

    async def _write(self, request: Request, exchange: Exchange) -> Response:
        """Forward a write in a task of its own: it runs on without its client once its body was sent whole."""
        exchange.audited = True
        task = asyncio.ensure_future(self._forwarder.forward(request, exchange))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self.stopping or not request.body.sent:
                task.cancel()
                [result] = await asyncio.gather(task, return_exceptions=True)
                if not isinstance(result, BaseException):
                    result.close()
                raise
            exchange.client_left = True
            finisher = asyncio.ensure_future(self._finish_detached(task, request, exchange))
            self._detached.add(finisher)
            finisher.add_done_callback(self._detached.discard)
            raise _Detached from None

    async def _finish_detached(self, task: asyncio.Future[Response], request: Request, exchange: Exchange) -> None:
        """See a write to its end whose client left, so that its outcome is known."""
        exchange.error = "client-left"
        try:
            async with asyncio.timeout(self._read_timeout):
                response = await task
            exchange.status = response.head.status
            exchange.answered_by = "proxy" if exchange.replayed else "metquay"
            response.close()
        except (TimeoutError, asyncio.CancelledError):
            exchange.note_sent("unknown")
        except ProxyError as error:
            exchange.note_sent(error.sent)
            exchange.error = error.slug
        except Exception:
            exchange.note_sent("unknown")
            log.exception("internal error", id=exchange.id)
        finally:
            self._close(exchange, request.body)

    def _close(self, exchange: Exchange, body: RequestBody) -> None:
        """End an exchange: one log line, one metrics update, and one line of the audit log where it was a write."""
        body.close()
        self.telemetry.closed(exchange)
        if self._audit is not None and exchange.audited:
            self._audit.write(
                {
                    "time": datetime.fromtimestamp(exchange.ended, UTC).isoformat(timespec="milliseconds"),
                    "client": exchange.client,
                    "user_agent": exchange.agent[:_LONGEST_AGENT] or None,
                    "address": exchange.address,
                    "method": exchange.method,
                    "path": masked(exchange.path),
                    "status": exchange.status or None,
                    "error": exchange.error,
                    "sent": "yes" if exchange.answered_by == "metquay" else exchange.sent,
                    "id": exchange.id,
                }
                | ({"replayed": True} if exchange.replayed else {})
            )

    async def _relay(  # noqa: PLR0913 - both sides of one exchange
        self,
        connection: ClientConnection,
        request: Request,
        exchange: Exchange,
        response: Response,
        *,
        keep: bool,
        modern: bool,
    ) -> bool:
        """Pass the answer on: head and what is there of the body in one write, then piece by piece."""
        head = response.head
        chunked = head.length is None and modern
        if (head.length is None and not modern) or self.draining or not request.body.arrived:
            keep = False
        data = self._answer_head(request, exchange, head, keep=keep, chunked=chunked, modern=modern)
        piece = response.read_nowait()
        while True:
            if piece:
                data += b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
            ended = response.ended
            if ended and chunked:
                data += _LAST_CHUNK
            if data:
                exchange.head_sent = True
                write(connection, data)
            if ended:
                return keep
            if connection.writing_paused:
                await connection._drain_helper()  # noqa: SLF001 - aiohttp's own way to wait for the client
            data = b""
            piece = await response.read()

    def _answer_head(  # noqa: PLR0913 - what the head of an answer depends on
        self,
        request: Request,
        exchange: Exchange,
        head: ResponseHead,
        *,
        keep: bool,
        chunked: bool,
        modern: bool,
    ) -> bytes:
        """Return the head of Metquay's answer as the client gets it, and note that it is there."""
        exchange.head_at = time.perf_counter()
        exchange.status = head.status
        exchange.answered_by = "proxy" if exchange.replayed else "metquay"
        added = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        if not keep:
            added += b"Connection: close\r\n"
        elif not modern:
            added += b"Connection: keep-alive\r\n"
        if exchange.cors:
            added += "".join(f"{name}: {value}\r\n" for name, value in exchange.cors).encode("latin-1")
        if exchange.note is not None:
            added += b"X-Metquay-Proxy-Note: %b\r\n" % exchange.note.encode()
        host = request.head.judged.get(b"host")
        return inbound(
            head,
            base=self._base,
            origin=None if request.target.absolute or host is None else self._origin + host,
            request_id=exchange.id.encode(),
            added=added,
            hide_challenge=exchange.hide_challenge,
            cors=bool(exchange.cors),
        )

    def _own(
        self, connection: ClientConnection, exchange: Exchange, answer: Answer, *, keep: bool, with_body: bool
    ) -> bool:
        body = None if answer.stream is not None else answer.body
        write_own(connection, exchange, answer.status, _fields(answer), body, keep=keep, with_body=with_body)
        if answer.quit:
            self.quit.set()
        return keep

    async def _stream(
        self,
        connection: ClientConnection,
        message: RawRequestMessage,
        exchange: Exchange,
        answer: Answer,
        pieces: AsyncIterator[bytes],
    ) -> bool:
        """Send an answer of the proxy's own that comes piece by piece; the connection ends with it."""
        chunked = message.version.minor == 1
        fields = _fields(answer)
        if chunked:
            fields.append(("Transfer-Encoding", "chunked"))
        write_own(connection, exchange, answer.status, fields, None, keep=False, with_body=False)
        async with contextlib.aclosing(cast("AsyncGenerator[bytes]", pieces)):
            async for piece in pieces:
                write(connection, b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                if connection.writing_paused:
                    await connection._drain_helper()  # noqa: SLF001 - aiohttp's own way to wait for the client
        if chunked:
            write(connection, _LAST_CHUNK)
        return False

    def _preflight(self, connection: ClientConnection, exchange: Exchange, head: RequestHead, *, keep: bool) -> bool:
        fields = [
            ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH"),
            ("Access-Control-Max-Age", "600"),
        ]
        asked = head.text(b"access-control-request-headers")
        if asked is not None:
            fields.append(("Access-Control-Allow-Headers", asked))
        write_own(connection, exchange, 204, fields, b"", keep=keep, with_body=False)
        return keep

    def _continue(self, connection: ClientConnection, message: RawRequestMessage, head: RequestHead) -> None:
        """Answer Expect: 100-continue here: the gate has admitted the request, and its body is wanted."""
        if message.version.minor == 1 and (head.text(b"expect") or "").lower() == "100-continue":
            write(connection, b"HTTP/1.1 100 Continue\r\n\r\n")

    async def _authenticate(self, admission: Admission, body: RequestBody, now: float) -> Answer:
        """Answer a login here, with a placeholder: SDKs that insist on logging in work with any keys."""
        secret = _secret_key(await body.all(_LOGIN_LIMIT))
        key = self._gate.key_of(admission.client)
        placeholder = self._gate.placeholder(key, now) if key is not None else self._gate.login(secret or "", now)
        if placeholder is None:
            msg = "This proxy takes its own client keys for a login: put one into secretKey (any accessKey will do)."
            raise ProxyError("client-key-required", msg)
        if secret is None:
            msg = 'A login is a JSON object with two texts, {"accessKey": "...", "secretKey": "..."}; here any will do.'
            raise ProxyError("bad-request", msg)
        return _login_answer(placeholder)


def _fields(answer: Answer) -> list[tuple[str, str]]:
    return [("Content-Type", answer.content_type), ("X-Content-Type-Options", "nosniff"), *answer.headers]


class _Detached(Exception):
    """The exchange was handed to a task of its own."""


def _persists(head: RequestHead) -> bool | None:
    """Return whether a connection stays after a plain request; None where the request is not plain after all."""
    judged = head.judged
    if b"host" not in judged or None in judged.values() or not _NOT_PLAIN.isdisjoint(judged):
        return None
    return _PERSISTENCE.get(judged.get(b"connection", b"keep-alive"))


def _as_error(failure: Exception, exchange: Exchange) -> ProxyError:
    """Return what to tell a client about a failure, and note it."""
    if isinstance(failure, ProxyError):
        exchange.error = failure.slug
        return failure
    if isinstance(failure, (ConnectionError, web.RequestPayloadError)):
        exchange.error = "client-left"
        why = (
            "The body of this request broke off, or its chunks were not valid HTTP. Correct the tool, or send it again."
        )
        return ProxyError("bad-request", why, sent=exchange.sent)
    exchange.error = "internal-error"
    log.error("internal error", id=exchange.id, exc_info=failure)
    why = f"The proxy made a mistake with this request; its log says more under id {exchange.id}."
    return ProxyError("internal-error", why, sent="unknown")


def _shutting_down(*, doubtful: bool = False) -> ProxyError:
    what_to_do = "Send the request again when it runs again."
    if doubtful:
        what_to_do = "Nobody knows whether Metquay carried this request out: look there before you send it again."
    return ProxyError("shutting-down", f"The proxy is being stopped. {what_to_do}", retry_after=5)


def _secret_key(data: bytes) -> str | None:
    """Return the secret key of a login's body; None where that is not of the vendor's form."""
    try:
        login = json.loads(data)
    except (ValueError, RecursionError):
        return None
    match login:
        case {"accessKey": str(), "secretKey": str() as secret}:
            return secret
    return None


def _login_answer(placeholder: str) -> Answer:
    body = {"accessToken": placeholder, "tokenType": "bearer", "expiresIn": PLACEHOLDER_LIFETIME}
    return Answer(200, "application/json", json.dumps(body).encode())
