"""The composition root, and the client's side of every exchange.

Owns the listeners, the adapter between aiohttp's low-level server and the program's own types, the pump of answer bodies,
the drain and the signals. Must not hold a rule that ``target``, ``gate``, ``rewrite`` or ``forwarder`` could hold.

Facts about aiohttp's server (each has a test): its flags go to ``web.Server``; errors of its parser never reach a handler
but ``handle_error``; it accepts Transfer-Encoding on HTTP/1.0 and other than ``chunked``; an answer that is written past
its own writer leaves that at zero bytes, so that nothing may escape from the handler once a head was written; after
``close()`` a connection ignores the rest of a body that is still arriving. RFC 9112 sections 6.1, 9.3, 9.6; RFC 9110
section 10.1.1 (Expect).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import signal
import socket
import ssl
import stat
import struct
import sys
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.request import getproxies, proxy_bypass

import aiohttp.http_parser
import structlog
import truststore
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMethod, InvalidURLError, LineTooLong
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from aiohttp.streams import EMPTY_PAYLOAD

from metquay_proxy import __version__
from metquay_proxy import sandbox as sandbox_module
from metquay_proxy.address import Address
from metquay_proxy.admin import Admin, Answer
from metquay_proxy.auth import Credentials, TokenCache, suspend_aware_clock
from metquay_proxy.body import ReplayBudget, RequestBody
from metquay_proxy.errors import ProxyError
from metquay_proxy.forwarder import READING, Forwarder, Line, Request
from metquay_proxy.gate import PLACEHOLDER_LIFETIME, Admission, Gate
from metquay_proxy.quota import Quota
from metquay_proxy.rewrite import BaseURL, RequestHead, inbound
from metquay_proxy.settings import last_four, parse_outbound_proxy
from metquay_proxy.target import Target, TargetRules
from metquay_proxy.telemetry import Exchange, Telemetry, configure_logging
from metquay_proxy.upstream import Login, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader

    from metquay_proxy.forwarder import Response
    from metquay_proxy.settings import Settings
    from metquay_proxy.upstream import OutboundProxy

MAX_LINE: Final = 64 * 1024
MAX_HEAD: Final = 128 * 1024
MAX_FIELDS: Final = 128
HEAD_TIMEOUT: Final = 15.0
IDLE_TIMEOUT: Final = 120.0
_LINGER: Final = 2.0
_REPLAY_TOTAL: Final = 64 * 1024 * 1024
_LOGIN_LIMIT: Final = 64 * 1024
_BACKLOG: Final = 1024
_CHUNK_END: Final = b"\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"

log = structlog.get_logger("metquay_proxy")


class _Done:
    """What a handler returns to aiohttp when the answer has been written already."""

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, _request: web.BaseRequest) -> None:
        """Write nothing."""

    async def write_eof(self) -> None:
        """Write nothing."""


_KEEP: Final = _Done(keep_alive=True)
_CLOSE: Final = _Done(keep_alive=False)


class ClientConnection(RequestHandler):
    """One client's connection: bounds the size and the time of request heads, and makes the parser's errors ours."""

    __slots__ = ("_deaf", "_head_bytes", "_head_timer", "_last_payload", "_server", "exchange", "head_suspect")

    def __init__(self, server: Server, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's own
        super().__init__(server, **kwargs)
        self._server = server
        self._deaf = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._last_payload: StreamReader | None = None
        self.head_suspect = False
        self.exchange: Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head_timer = self._loop.call_later(self._server.head_timeout, self._head_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        in_body = self._last_payload is not None and not self._last_payload.is_eof()
        heads = self._request_count
        size = self._head_bytes + len(data)
        super().data_received(data)
        if self._request_count != heads:
            self._stop_head_timer()
            self._head_bytes = 0
            if size > MAX_HEAD:
                self.head_suspect = True
            self._last_payload = self._messages[-1][1] if self._messages else None
            if self._last_payload is EMPTY_PAYLOAD and not data.endswith(b"\r\n\r\n") and not self._upgraded:
                self._begin_head(len(data) - data.rfind(b"\r\n\r\n") - 4)
        elif not in_body and data and not self._buffer_paused:
            self._begin_head(size)

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
        del request
        exchange = Exchange("-", "-")
        self._server.telemetry.opened()
        write_error(self, exchange, _parser_error(status, exc, message), keep=False, with_body=True)
        self._server.telemetry.closed(exchange)
        return cast("web.StreamResponse", _CLOSE)

    @property
    def idle(self) -> bool:
        """Whether no request is being served, waits or has begun to arrive."""
        return self._current_request is None and not self._messages and not self._head_bytes

    def _begin_head(self, size: int) -> None:
        if size > MAX_HEAD:
            self._refuse(431, LineTooLong(b"", MAX_HEAD))
        elif size > 0:
            if not self._head_bytes:
                self._stop_head_timer()
                self._head_timer = self._loop.call_later(self._server.head_timeout, self._head_late)
            self._head_bytes = size

    def _head_late(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse(408, None)
        elif self._current_request is None:
            self.force_close()

    def _refuse(self, status: int, exc: BaseException | None) -> None:
        """Queue a refusal behind the requests that came before it, and read no more."""
        self._deaf = True
        self._stop_head_timer()
        self._messages.append((_ErrInfo(status=status, exc=exc, message=""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _parser_error(status: int, exc: BaseException | None, message: str | None) -> ProxyError:
    if status == HTTPStatus.REQUEST_TIMEOUT:
        return ProxyError("request-timeout", f"The head of this request was not complete {HEAD_TIMEOUT:g} seconds after its first byte.")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return ProxyError("internal-error", "The proxy made a mistake with this request. Its log says more.", sent="unknown")
    if isinstance(exc, LineTooLong) or (message or "").startswith("Too many"):
        return _head_too_large()
    if isinstance(exc, BadHttpMethod):
        return ProxyError("not-supported", "The method of this request is none that HTTP knows, so that it was not sent.")
    if isinstance(exc, InvalidURLError):
        return ProxyError("bad-target", "The address of this request is not valid. Correct it in the tool; nothing was sent.")
    return ProxyError(
        "bad-request", "This is not a valid HTTP/1.1 request, so that nothing was sent. (Does the tool speak https to a clear-text port?)"
    )


def _head_too_large() -> ProxyError:
    return ProxyError(
        "head-too-large",
        "The head of this request is too large: 64 KiB for the first line, 128 KiB and 128 fields in all. Nothing was sent.",
    )


def abort(connection: ClientConnection) -> None:
    """Break the client's connection so that it can't take what it got for a complete answer.

    A plain close looks like a clean end where the body lasts until the connection closes, so that the connection is reset.
    """
    transport = connection.transport
    if transport is None:
        return
    handle = transport.get_extra_info("socket")
    if handle is not None and handle.family != getattr(socket, "AF_UNIX", None):
        with contextlib.suppress(OSError):  # the peer may have closed already, which is what we want
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0))
    transport.abort()


def write(connection: ClientConnection, data: bytes) -> None:
    """Write to the client; raise ``ConnectionResetError`` where it has gone."""
    transport = connection.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError
    transport.write(data)


def write_error(connection: ClientConnection, exchange: Exchange, error: ProxyError, *, keep: bool, with_body: bool) -> None:
    """Write one of the proxy's own errors (part 8 of the contract)."""
    exchange.note_sent(error.sent)
    exchange.error = error.slug
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
    body: bytes,
    *,
    keep: bool,
    with_body: bool,
) -> None:
    """Write an answer of the proxy's own."""
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
    if status != HTTPStatus.NO_CONTENT:
        fields.append(("Content-Length", str(len(body))))
    lines += [f"{name}: {value}" for name, value in fields]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    write(connection, head + body if with_body else head)


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
        replay_limit: int,
        read_timeout: float,
        head_timeout: float = HEAD_TIMEOUT,
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
            lingering_time=_LINGER,
            keepalive_timeout=IDLE_TIMEOUT,
        )
        self._rules = rules
        self._gate = gate
        self._forwarder = forwarder
        self._admin = admin
        self.telemetry = telemetry
        self._base = base
        self._origin = f"{scheme}://".encode()
        self._replay_limit = replay_limit
        self._budget = ReplayBudget(_REPLAY_TOTAL)
        self._read_timeout = read_timeout
        self.head_timeout = head_timeout
        self._detached: set[asyncio.Task[None]] = set()
        self.draining = False
        self.stopping = False
        self.quit = asyncio.Event()

    def cancel_detached(self) -> None:
        """End the writes that run on without their client: the drain is over."""
        for task in self._detached:
            task.cancel()

    def __call__(self) -> ClientConnection:
        """Make the protocol of one connection."""
        return ClientConnection(self, loop=self._loop, **self._kwargs)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one request; whatever happens, exactly one answer or one broken connection comes of it."""
        connection = cast("ClientConnection", request.protocol)
        message = request._message  # noqa: SLF001 - the raw target, which no public property gives
        exchange = connection.exchange = Exchange(message.method, message.path)
        self.telemetry.opened()
        body = self._body(request, message)
        detached = False
        keep = False
        try:
            keep = await self._serve(connection, message, exchange, body)
        except _Detached:
            detached = True
            raise asyncio.CancelledError from None
        except asyncio.CancelledError:
            if exchange.head_sent:
                abort(connection)
            if not self.stopping or exchange.head_sent or connection.transport is None:
                exchange.error = "client-left"
                raise
            exchange.note_sent("unknown" if body.sent else "no")
            self._answer_error(connection, exchange, _shutting_down(), message, body)
        except ProxyError as error:
            if exchange.head_sent:
                exchange.error = error.slug
                abort(connection)
            else:
                keep = self._answer_error(connection, exchange, error, message, body)
        except (ConnectionError, web.RequestPayloadError):
            exchange.error = "client-left"
            if not exchange.head_sent and connection.transport is not None:
                error = ProxyError("bad-request", "The body of this request ended early or was not valid HTTP.", sent=exchange.sent)
                self._answer_error(connection, exchange, error, message, body)
        except Exception:
            log.exception("internal error", id=exchange.id)
            if exchange.head_sent:
                abort(connection)
            else:
                msg = f"The proxy made a mistake with this request; its log says more under id {exchange.id}."
                self._answer_error(connection, exchange, ProxyError("internal-error", msg, sent="unknown"), message, body)
        finally:
            if not detached:
                body.close()
                self.telemetry.closed(exchange)
        return cast("web.StreamResponse", _KEEP if keep and not self.draining else _CLOSE)

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
        self, connection: ClientConnection, exchange: Exchange, error: ProxyError, message: RawRequestMessage, body: RequestBody
    ) -> bool:
        """Write the error; return whether the connection can serve another request."""
        keep = not (message.should_close or message.upgrade or self.draining or "Expect" in message.headers) and body.arrived
        with contextlib.suppress(ConnectionResetError):  # the client left: the exchange is logged all the same
            write_error(connection, exchange, error, keep=keep, with_body=message.method != "HEAD")
        return keep

    async def _serve(
        self, connection: ClientConnection, message: RawRequestMessage, exchange: Exchange, body: RequestBody
    ) -> bool:
        """Judge the request and answer it; return whether the connection may stay open."""
        method = message.method
        head = RequestHead(message.raw_headers)
        if connection.head_suspect:
            connection.head_suspect = False
            _check_size(message)
        _check_framing(message, head)
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
        if target.own:
            answer = self._admin.answer(method, target.local)
            return self._own(connection, exchange, answer, keep=keep and body.arrived, with_body=method != "HEAD")
        if b"expect" in head.judged and not body.arrived:
            self._continue(connection, message, head)
        if method == "POST" and target.local == "/authenticate":
            answer = await self._authenticate(admission, body, now)
            return self._own(connection, exchange, answer, keep=keep, with_body=True)
        request = Request(
            method,
            target,
            head,
            body,
            admission.client or head.text(b"user-agent") or "",
            admission.read_only,
            target.pass_through and not self._gate.is_ours(head.text(b"authorization"), now),
        )
        if method in READING:
            response = await self._forwarder.forward(request, exchange)
        else:
            response = await self._write(request, exchange)
        try:
            return await self._relay(connection, message, head, target, exchange, body, response, keep=keep)
        finally:
            response.close()

    async def _write(self, request: Request, exchange: Exchange) -> Response:
        """Forward a write in a task of its own: it runs on without its client once its body was sent whole."""
        task = asyncio.ensure_future(self._forwarder.forward(request, exchange))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self.stopping or not request.body.sent:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
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
            exchange.answered_by = "metquay"
            response.close()
        except TimeoutError:
            exchange.note_sent("unknown")
        except ProxyError as error:
            exchange.note_sent(error.sent)
            exchange.error = error.slug
        except Exception:
            exchange.note_sent("unknown")
            log.exception("internal error", id=exchange.id)
        finally:
            request.body.close()
            self.telemetry.closed(exchange)

    async def _relay(  # noqa: PLR0913 - both sides of one answer
        self,
        connection: ClientConnection,
        message: RawRequestMessage,
        request_head: RequestHead,
        target: Target,
        exchange: Exchange,
        body: RequestBody,
        response: Response,
        *,
        keep: bool,
    ) -> bool:
        """Pass the answer on: head and what is there of the body in one write, then piece by piece."""
        head = response.head
        exchange.status = head.status
        exchange.answered_by = "metquay"
        modern = message.version.minor == 1
        chunked = head.length is None and modern
        if (head.length is None and not modern) or self.draining or not body.arrived:
            keep = False
        added = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        if not keep:
            added += b"Connection: close\r\n"
        elif not modern:
            added += b"Connection: keep-alive\r\n"
        if exchange.cors:
            added += "".join(f"{name}: {value}\r\n" for name, value in exchange.cors).encode("latin-1")
        if exchange.note is not None:
            added += b"X-Metquay-Proxy-Note: %b\r\n" % exchange.note.encode()
        host = request_head.judged.get(b"host")
        data = inbound(
            head,
            base=self._base,
            origin=None if target.absolute or host is None else self._origin + host,
            request_id=exchange.id.encode(),
            added=added,
            hide_challenge=exchange.hide_challenge,
            cors=bool(exchange.cors),
        )
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

    def _own(self, connection: ClientConnection, exchange: Exchange, answer: Answer, *, keep: bool, with_body: bool) -> bool:
        fields = [("Content-Type", answer.content_type), ("X-Content-Type-Options", "nosniff")]
        write_own(connection, exchange, answer.status, fields, answer.body, keep=keep, with_body=with_body)
        if answer.quit:
            self.quit.set()
        return keep

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
        data = await body.all(_LOGIN_LIMIT)
        key = self._gate.key_of(admission.client)
        placeholder = self._gate.placeholder(key, now) if key is not None else self._gate.login(_secret_key(data), now)
        if placeholder is None:
            msg = "This proxy takes its own client keys for a login: put one into secretKey (any accessKey will do)."
            raise ProxyError("client-key-required", msg)
        return _login_answer(placeholder)


class _Detached(Exception):  # noqa: N818 - no error: the exchange goes on without its client
    """The exchange was handed to a task of its own."""


def _check_size(message: RawRequestMessage) -> None:
    size = len(message.method) + len(message.path) + sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
    if size > MAX_HEAD:
        raise _head_too_large()


def _check_framing(message: RawRequestMessage, head: RequestHead) -> None:
    """Refuse what the parser lets pass and another server might read differently."""
    judged = head.judged
    if message.version not in {(1, 0), (1, 1)}:
        raise ProxyError("bad-request", "This proxy speaks HTTP/1.0 and HTTP/1.1 only, so that nothing was sent.")
    if b"transfer-encoding" in judged:
        if message.version.minor == 0:
            raise ProxyError("bad-request", "An HTTP/1.0 request can't have a Transfer-Encoding, so that nothing was sent.")
        if (judged[b"transfer-encoding"] or b"").lower() != b"chunked":
            raise ProxyError("not-supported", "Only the transfer encoding chunked is supported, so that nothing was sent.")
    if judged.get(b"host", b"" if message.version.minor == 0 else None) is None:
        raise ProxyError("bad-request", "The request must name its host exactly once (Host), so that nothing was sent.")
    if message.method == "CONNECT":
        msg = "This proxy makes no tunnels. Send plain http:// requests to it; it speaks TLS to Metquay by itself."
        raise ProxyError("not-supported", msg)


def _shutting_down() -> ProxyError:
    return ProxyError("shutting-down", "The proxy is being stopped. Send the request again when it runs again.", retry_after=5)


def _secret_key(data: bytes) -> str:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    secret = answer.get("secretKey") if isinstance(answer, dict) else None
    return secret if isinstance(secret, str) else ""


def _login_answer(placeholder: str) -> Answer:
    body = {"accessToken": placeholder, "tokenType": "bearer", "expiresIn": PLACEHOLDER_LIFETIME}
    return Answer(200, "application/json", json.dumps(body).encode())


class Proxy:
    """The running program: everything that was built from the settings, its listeners and its end."""

    def __init__(
        self,
        settings: Settings,
        base: BaseURL,
        credentials: Callable[[], Credentials],
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Build everything; nothing is opened yet. ``credentials`` is asked at each login; ``clock`` counts seconds."""
        self.base = base
        self._settings = settings
        clock = clock or suspend_aware_clock()
        self.telemetry = Telemetry()
        scheme = "https" if settings.tls_cert else "http"
        self._transport = Transport(
            base,
            ssl_context=upstream_tls(settings.ca_bundle) if base.scheme == "https" else None,
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            outbound_proxy=_outbound_proxy(base, settings),
        )
        self.tokens = TokenCache(
            Login(self._transport, base, credentials, clock), clock=clock, observer=self.telemetry.token_event
        )
        rate = settings.rate_limit
        self._line = None if rate is None else Line(Quota(rate.limit, rate.window), clock)
        self._own_authorities: set[tuple[str, int]] = set()
        self.server = Server(
            rules=TargetRules(base.prefix, self._own_authorities, pass_through=settings.pass_through),
            gate=Gate(
                upstream_host=base.host,
                keys=settings.keys,
                read_only=settings.read_only,
                allowed_hosts=settings.allowed_hosts,
                allowed_origins=settings.allowed_origins,
                scheme=scheme,
            ),
            forwarder=Forwarder(
                self._transport,
                self.tokens,
                self._line,
                base,
                max_wait=settings.max_wait,
                retries=settings.retries,
                clock=clock,
            ),
            admin=Admin(ready=self.ready, status=self.status, allow_quit=settings.allow_quit),
            telemetry=self.telemetry,
            base=base,
            scheme=scheme,
            replay_limit=settings.replay_limit,
            read_timeout=settings.read_timeout,
        )
        self.scheme = scheme
        self._listeners: list[asyncio.AbstractServer] = []
        self._unix_paths: list[str] = []
        self.addresses: list[str] = []

    def ready(self) -> bool:
        """Whether a request would find a token now."""
        return self.tokens.state.ready and not self.server.draining

    def status(self) -> dict[str, Any]:
        """Return the figures for ``/-/status``; nothing secret among them."""
        token = self.tokens.state
        busy, idle = self._transport.connections
        return {
            "version": __version__,
            "upstream": str(self.base),
            "ready": self.ready(),
            "token": dataclasses.asdict(token),
            "quota": None if self._line is None else self._line.snapshot()._asdict(),
            "requests": {"active": self.telemetry.active, "finished": self.telemetry.finished},
            "connections": {"busy": busy, "idle": idle},
        }

    async def start(self) -> None:
        """Listen, then log in; raise ``OSError`` where an address can't be had."""
        tls = None
        if self._settings.tls_cert and self._settings.tls_key:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self._settings.tls_cert, self._settings.tls_key)
        loop = asyncio.get_running_loop()
        self._own_authorities |= self.base.authorities
        for address in self._settings.listen:
            for sock in bind(address):
                if address.path:
                    self._unix_paths.append(address.path)
                    self.addresses.append(str(address))
                    listener = await loop.create_unix_server(self.server, sock=sock, ssl=tls, backlog=_BACKLOG)
                else:
                    port = sock.getsockname()[1]
                    self.addresses.append(f"{self.scheme}://{Address(address.host, port)}")
                    self._own_authorities |= {(host, port) for host in ("localhost", "127.0.0.1", "::1", address.host)}
                    listener = await loop.create_server(self.server, sock=sock, ssl=tls, backlog=_BACKLOG)
                self._listeners.append(listener)
        self.addresses = list(dict.fromkeys(self.addresses))
        self.tokens.start()

    async def stop(self, timeout: float) -> None:
        """Drain and end: requests in flight have ``timeout`` seconds in all, uploads and detached writes included."""
        server = self.server
        server.draining = True
        for listener in self._listeners:
            listener.close()
        for connection in server.connections:
            if cast("ClientConnection", connection).idle:
                connection.close()
        deadline = asyncio.get_running_loop().time() + timeout
        while self.telemetry.active and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        server.stopping = True
        for connection in server.connections:
            if connection._task_handler is not None:  # noqa: SLF001 - aiohttp has no public way to end a handler
                connection._task_handler.cancel()  # noqa: SLF001
        server.cancel_detached()
        await asyncio.sleep(0)
        await server.shutdown(0.1)
        await self.tokens.close()
        self._transport.close()
        for path in self._unix_paths:
            with contextlib.suppress(FileNotFoundError):
                pathlib.Path(path).unlink()


def upstream_tls(ca_bundle: pathlib.Path | None) -> ssl.SSLContext:
    """Return a context that verifies names and certificates by the operating system's store and ``ca_bundle``."""
    context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    if ca_bundle is not None:
        context.load_verify_locations(ca_bundle)
    return context


def _outbound_proxy(base: BaseURL, settings: Settings) -> OutboundProxy | None:
    """Return the corporate proxy on the way to ``base``: the setting's, else the system's; none to this machine itself."""
    if base.scheme != "https":
        return None
    if settings.outbound_proxy is not None:
        return settings.outbound_proxy
    url = "" if proxy_bypass(base.host) else getproxies().get("https", "")
    try:
        return parse_outbound_proxy(url) if url else None
    except ValueError as error:
        log.warning("the system's proxy setting (HTTPS_PROXY) is ignored", reason=str(error))
        return None


def bind(address: Address) -> list[socket.socket]:
    """Return bound sockets for one address; raise ``OSError`` with a text for people.

    ``localhost`` means both loopback addresses on one port: Windows spends seconds on a missing ``::1``. A family that the
    machine lacks is skipped; a port that is taken on either is an error.
    """
    if address.path:
        return [_bind_unix(address.path)]
    if address.host != "localhost":
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        if ":" not in address.host and not address.host.replace(".", "").isdigit():
            family = socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM)[0][0]
        return [_bind_tcp(family, address.host, address.port)]
    for attempt in range(10):
        sockets: list[socket.socket] = []
        port = address.port
        try:
            for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                try:
                    sockets.append(_bind_tcp(family, host, port))
                except OSError as error:
                    if error.errno in _NO_FAMILY:
                        continue
                    raise
                port = sockets[0].getsockname()[1]
        except OSError:
            for sock in sockets:
                sock.close()
            if address.port == 0 and attempt < 9:  # noqa: PLR2004 - the last attempt; a free port on one family may be taken on the other
                continue
            raise
        if sockets:
            return sockets
    msg = "this machine has no loopback address"
    raise OSError(msg)


_NO_FAMILY: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT, errno.EINVAL})


def _bind_tcp(family: int, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(path: str) -> socket.socket:
    """Bind a socket that only this user may open; a stale one is replaced, a live one is not."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "a file that is no socket is in the way", path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError(errno.EADDRINUSE, "another program listens there", path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


def run(settings: Settings, *, sandbox: bool) -> int:
    """Run the proxy until it is told to stop; return the exit code. ``sandbox``: the simulator is the upstream."""
    configure_logging(settings.log_level, settings.log_format)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(settings, sandbox=sandbox))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - an optional extra
    except ImportError:
        return None
    return uvloop.new_event_loop  # type: ignore[no-any-return]


async def _run(settings: Settings, *, sandbox: bool) -> int:
    for warning in settings.warnings:
        log.warning(warning)
    if not aiohttp.http_parser.HttpRequestParser.__module__.endswith("_http_parser"):
        log.warning("aiohttp's compiled parser is missing: its slower one in pure Python has had holes. Reinstall aiohttp.")
    simulator = None
    if sandbox:
        simulator = sandbox_module.Sandbox(rate_limit=settings.rate_limit)
        await simulator.start()
        base = BaseURL.parse(simulator.url)
        proxy = Proxy(settings, base, lambda: Credentials(sandbox_module.ACCESS_KEY, sandbox_module.SECRET_KEY))
    else:
        proxy = Proxy(settings, cast("BaseURL", settings.host), settings.credentials)
    stop = asyncio.Event()
    signals = _Signals(stop)
    try:
        try:
            await proxy.start()
        except OSError as error:
            sys.stderr.write(f"metquay-proxy: cannot listen: {_why_not_listening(error)}\n")
            return 1
        sys.stdout.write(_welcome(proxy, settings, sandbox=sandbox))
        sys.stdout.flush()
        log.info("listening", addresses=proxy.addresses, upstream=str(proxy.base))
        await signals.wait(proxy.server.quit)
        log.info("stopping", requests_in_flight=proxy.telemetry.active)
        await signals.unless_repeated(proxy.stop(settings.drain_timeout))
        log.info("stopped")
    finally:
        if simulator is not None:
            await simulator.stop()
    return 0


class _Signals:
    """SIGTERM and SIGINT (Windows: Ctrl-C and Ctrl-Break): the first ends the program in order, the second at once."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._again = asyncio.Event()
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGBREAK if sys.platform == "win32" else signal.SIGTERM]
        for number in numbers:
            try:
                loop.add_signal_handler(number, self._received)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(self._received))

    def _received(self) -> None:
        (self._again if self._stop.is_set() else self._stop).set()

    async def wait(self, other: asyncio.Event) -> None:
        """Return at the first signal, or when ``other`` is set."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._stop, other)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._stop.set()

    async def unless_repeated(self, ending: Coroutine[None, None, None]) -> None:
        """Await ``ending``; a further signal cuts it short."""
        task = asyncio.ensure_future(ending)
        again = asyncio.ensure_future(self._again.wait())
        await asyncio.wait([task, again], return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _welcome(proxy: Proxy, settings: Settings, *, sandbox: bool) -> str:
    where = ", ".join(proxy.addresses)
    key = "" if sandbox or settings.access_key is None else f" with key {last_four(settings.access_key.get_secret_value())}"
    whom = "the built-in sandbox (made-up data, no account needed)" if sandbox else f"{proxy.base.authority}{key}"
    page = next((address for address in proxy.addresses if not address.startswith("unix:")), None)
    lines = [f"metquay-proxy {__version__} listens on {where}", f"for {whom}"]
    if page is not None:
        lines += [f"status page: {page}/-/status", f"try: curl '{page}/customers?limit=2'"]
    return "\n".join(lines) + "\n"


def _why_not_listening(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            "the address of METQUAY_LISTEN is taken by another program (another metquay-proxy?). Stop that one, or choose "
            "another port: --listen localhost:0 takes any free one."
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return "this user may not listen on the address of METQUAY_LISTEN. Choose a port above 1023."
    return f"{error.strerror or error}. Check METQUAY_LISTEN."
