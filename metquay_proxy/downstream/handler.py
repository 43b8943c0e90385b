"""What is done with one request of a tool: judge it, answer it, relay Metquay's answer.

Owns the order in which the rules are asked, what becomes of a client that leaves, and the pump of answer bodies. Must
not hold a rule that ``target``, ``gate``, ``headers`` or the forwarder could hold.

Facts: RFC 9112 section 6.1 and 9.6. Once a byte of an answer was written, a failure breaks the connection: a second
answer in its place would be taken for a part of the first one's body.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import structlog

from metquay_proxy.audit import entry
from metquay_proxy.downstream.answers import OwnAnswers, preflight, write_error
from metquay_proxy.downstream.lists import Lists
from metquay_proxy.exchange.body import NO_BODY, ReplayBudget, RequestBody
from metquay_proxy.exchange.exchange import Exchange, Response
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.headers import RequestFields, adapted, inbound, specially
from metquay_proxy.rules.http1 import LONGEST_REMEMBERED, REMEMBERED
from metquay_proxy.rules.lists import MAX_PAGE
from metquay_proxy.rules.quota import Callers
from metquay_proxy.rules.retries import READING

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine

    from metquay_proxy.audit import AuditLog
    from metquay_proxy.downstream.connection import ClientConnection
    from metquay_proxy.downstream.pages import Pages
    from metquay_proxy.exchange.body import Stream
    from metquay_proxy.exchange.forwarder import Forwarder
    from metquay_proxy.rules.gate import Admission, Gate
    from metquay_proxy.rules.headers import ResponseHead
    from metquay_proxy.rules.http1 import RequestHead
    from metquay_proxy.rules.target import BaseURL, Target, TargetRules
    from metquay_proxy.telemetry import Telemetry

_REPLAY_TOTAL: Final = 64 * 1024 * 1024
_HEADS_TOTAL: Final = 8 * 1024 * 1024
"""Bytes of the large heads of all requests under way, from which on no other is taken; large are those"""
_LARGE_HEAD: Final = 4096
"""of more bytes than these."""

log = structlog.get_logger("metquay_proxy")


class Handler:
    """Serves the requests of all connections."""

    def __init__(  # noqa: PLR0913 - the collaborators of one exchange
        self,
        *,
        rules: TargetRules,
        gate: Gate,
        forwarder: Forwarder,
        paced: Forwarder,
        pages: Pages,
        telemetry: Telemetry,
        base: BaseURL,
        scheme: str,
        audit: AuditLog | None,
        replay_limit: int,
        read_timeout: float,
        only: Collection[str] | None = None,
    ) -> None:
        """``paced`` sends the pages of whole lists; ``scheme`` is what clients speak to us; sizes are in bytes.

        ``only``: the paths of our own that may be asked for here, each on a connection of its own, and no others; None:
        everything.
        """
        self._rules = rules
        self._gate = gate
        self._forwarder = forwarder
        self._own = OwnAnswers(gate, pages, Lists(partial(self._ask, paced)))
        self._telemetry = telemetry
        self._base = base
        self._host = base.authority.encode()
        self._origin = f"{scheme}://".encode()
        self._audit = audit
        self._read_timeout = read_timeout
        self._only = only
        self._body = partial(RequestBody, limit=replay_limit, budget=ReplayBudget(_REPLAY_TOTAL), timeout=read_timeout)
        self._callers = Callers()
        self._writes: dict[ClientConnection, Exchange] = {}
        """Those under way,"""
        self._alone: set[asyncio.Task[None]] = set()
        """and the tasks of those that run on without their clients."""
        self._admitted: dict[RequestHead, tuple[Target, Admission, bytes]] = {}
        self.draining = False
        self._stopping = False
        self._heads = 0

    def drain(self) -> None:
        """Take no new requests; those that are under way are the last of their connections."""
        self.draining = True

    def stop(self) -> tuple[asyncio.Task[None], ...]:
        """Tell whoever is cancelled from now on that the proxy is being stopped; cancel, and return, what is alone."""
        self._stopping = True
        for task in self._alone:
            task.cancel()
        return tuple(self._alone)

    async def serve(self, client: ClientConnection, head: RequestHead, stream: Stream) -> None:
        """Serve one request; whatever happens, exactly one answer or one broken connection comes of it."""
        fields = head.fields
        exchange = Exchange(head.method, client.address, fields.agent, fields.keep_alive)
        if self._only is not None:
            exchange.keep, exchange.quiet = False, True
        exchange.fields = fields
        exchange.body = NO_BODY if fields.length == 0 else self._body(stream, chunked=fields.length is None)
        self._telemetry.opened()
        large = head.size > _LARGE_HEAD
        if large:
            self._heads += head.size
        try:
            if large and self._heads > _HEADS_TOTAL:
                exchange.keep = False
                msg = "The requests in progress have too many bytes of headers in all. Nothing was sent."
                raise ProxyError("head-too-large", f"{msg} Send shorter ones, or try again in a few seconds.")
            response = await self._judge(client, exchange, head)
            if response is not None and not self._begin(client, exchange, response):
                await self._pass_on(client, exchange, response)
        except asyncio.CancelledError:
            self._cancelled(client, exchange)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the client gets an answer or sees it break
            self._failed(client, exchange, failure)
        finally:
            if large:
                self._heads -= head.size
            try:
                exchange.body.close()
                exchange.let_go()
                self._telemetry.closed(exchange)
                if exchange.audited:
                    del self._writes[client]
                    if self._audit is not None:
                        self._audit.write(entry(exchange))
            finally:
                client.served(keep=exchange.keep and exchange.head_sent and not self.draining)

    def left(self, client: ClientConnection, task: asyncio.Task[None]) -> None:
        """Cancel what a client has left; a write that was sent whole goes on, so that its outcome is known."""
        exchange = self._writes.get(client)
        if exchange is None or exchange.head_sent or not exchange.on_its_way or self._stopping:
            task.cancel()
            return
        exchange.client_left = True
        timer = task.get_loop().call_later(self._read_timeout, task.cancel)
        self._alone.add(task)
        task.add_done_callback(self._alone.discard)
        task.add_done_callback(lambda _: timer.cancel())

    def refuse(self, client: ClientConnection, error: ProxyError) -> None:
        """Answer what was no request; raise ``ConnectionResetError`` where the client has left."""
        exchange = Exchange("-", client.address)
        exchange.fields = RequestFields(b"")
        exchange.quiet = self._only is not None
        self._telemetry.opened()
        try:
            write_error(client, exchange, error)
        finally:
            self._telemetry.closed(exchange)

    async def test(self) -> dict[str, Any]:
        """Read one customer as a tool would; return whether that went well (``ok``) and a ``text`` for people."""
        asking = Exchange("GET", caller="test of the connection")
        asking.fields = RequestFields(b"")
        try:
            head, _ = await self._ask(self._forwarder, asking, "/customers?limit=1")
        except ProxyError as error:
            return {"ok": False, "text": error.message}
        ok = head.status == HTTPStatus.OK
        how = f"in {asking.upstream * 1000:.0f} ms" if ok else f"with status {head.status}: run `metquay-proxy check`"
        return {"ok": ok, "text": f"Metquay answered {how}."}

    async def _ask(self, forwarder: Forwarder, asking: Exchange, what: str) -> tuple[ResponseHead, bytes]:
        """Read something from Metquay for an exchange, by one of its own; return the answer, or its beginning.

        Raises ``ProxyError``.
        """
        if self.draining:
            raise _shutting_down()
        self._gate.demand(asking.admission)
        exchange = Exchange("GET", asking.address, asking.agent, admission=asking.admission, caller=asking.caller)
        prefer = b"" if (wait := asking.fields.wait) is None else b"\r\nPrefer: wait=%d" % wait
        exchange.fields = RequestFields(b"\r\nAccept: application/json" + prefer)
        exchange.target = self._rules.parse("GET", what)
        exchange.outgoing = exchange.fields.outbound("GET", exchange.target.sent, host=self._host, chunked=False)
        exchange.path, exchange.body = exchange.target.path, NO_BODY
        self._telemetry.opened()
        try:
            response = await forwarder.forward(exchange)
            exchange.status, exchange.answered_by = response.head.status, "metquay"
            return response.head, await response.beginning(MAX_PAGE)
        except ProxyError as error:
            exchange.status = exchange.status or error.status
            exchange.note_error(error)
            raise
        finally:
            asking.upstream += exchange.upstream
            asking.waited += exchange.waited
            exchange.let_go()
            self._telemetry.closed(exchange)

    def _judge(
        self, client: ClientConnection, exchange: Exchange, head: RequestHead
    ) -> Coroutine[Any, Any, Response | None]:
        """Judge the request; return what answers it here, or brings Metquay's answer, which is to be passed on."""
        if self.draining:
            exchange.cors = self._gate.cors(head.fields)
            raise _shutting_down()
        target, admission, outgoing = self._admitted.get(head) or self._admit(exchange, head)
        exchange.target, exchange.path, exchange.admission, exchange.outgoing = target, target.path, admission, outgoing
        exchange.caller = admission.client or self._callers.name(head.fields.product, exchange.began)
        if admission.preflight:
            return preflight(client, exchange)
        if target.own:
            return self._own.answer(client, exchange, time.time())
        if b"expect" in head.fields.judged:
            client.proceed()
        if exchange.method not in READING:
            exchange.audited = True
            self._writes[client] = exchange
        return self._forwarder.forward(exchange)

    def _admit(self, exchange: Exchange, head: RequestHead) -> tuple[Target, Admission, bytes]:
        """Return what is asked for, who asks, and the head that goes on; raise ``ProxyError`` where nobody may.

        Remembered is what was found out about a few short heads without a secret, where no key and no page plays a
        part: about those the same will be found for ever.
        """
        method, fields, gate, now = head.method, head.fields, self._gate, time.time()
        if b"origin" in fields.judged:
            exchange.cors = gate.cors(fields)
        target = exchange.target = self._rules.parse(method, head.target)
        exchange.path = target.path
        admission = exchange.admission = gate.check(method, target, fields, now)
        gate.permit(method, target, admission)
        if self._only is not None and not (target.own and target.local in self._only and fields.length == 0):
            msg = f"This address offers only {', '.join(sorted(self._only))}, and only to requests without a body."
            raise ProxyError("no-such-page", msg)
        upgrade = (fields.text(b"upgrade") or "").lower() if b"upgrade" in fields.options else ""
        if upgrade == "websocket" and not admission.preflight:
            raise ProxyError("not-supported", "Metquay has no websockets, and this proxy forwards none.")
        outgoing = fields.outbound(
            method,
            target.sent,
            host=self._host,
            chunked=fields.length is None,
            read_only=admission.read_only,
            keep_authorization=target.pass_through and not gate.is_ours(fields.text(b"authorization"), now),
        )
        admitted = target, admission, outgoing
        if not (gate.keys or fields.of_page or fields.secret or head.size > LONGEST_REMEMBERED):
            if len(self._admitted) >= REMEMBERED:
                self._admitted.clear()
            self._admitted[head] = admitted
        return admitted

    def _begin(self, client: ClientConnection, exchange: Exchange, response: Response) -> bool:
        """Pass on the head of an answer and what is there of its body, in one write; return whether that was all."""
        head = response.head
        exchange.status = head.status
        exchange.answered_by = "proxy" if exchange.replayed else "metquay"
        if exchange.client_left:
            exchange.error = "client-left"
            return True
        chunked = head.length is None and exchange.fields.minor == 1
        if (head.length is None and not chunked) or self.draining or not exchange.body.arrived:
            exchange.keep = False
        data = self._answer_head(exchange, head, chunked=chunked)
        piece = response.read_nowait()
        exchange.head_sent = True
        client.write(data + (_framed(piece, last=response.arrived) if chunked else piece))
        if not response.arrived:
            exchange.head_at = time.perf_counter()
        return response.arrived

    async def _pass_on(self, client: ClientConnection, exchange: Exchange, response: Response) -> None:
        """Pass on the rest of a body, piece by piece."""
        chunked = response.head.length is None and exchange.fields.minor == 1
        while not response.ended:
            if client.full:
                await client.drained()
            if not response.ready:
                await response.news()
            piece = response.read_nowait()
            if data := _framed(piece, last=response.arrived) if chunked else piece:
                client.write(data)

    def _answer_head(self, exchange: Exchange, head: ResponseHead, *, chunked: bool) -> bytes:
        """Return the head of Metquay's answer as the client gets it."""
        added = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        if not exchange.keep:
            added += b"Connection: close\r\n"
        elif not exchange.fields.minor:
            added += b"Connection: keep-alive\r\n"
        if exchange.cors:
            added += "".join(f"{name}: {value}\r\n" for name, value in exchange.cors).encode("latin-1")
        if exchange.replayed:
            added += b"Idempotency-Replayed: true\r\n"
        if exchange.note is not None:
            added += b"X-Metquay-Proxy-Note: %b\r\n" % exchange.note.encode()
        if exchange.cors or exchange.hide_challenge or b"location" in head.passed:
            host = None if exchange.target.absolute else exchange.fields.judged.get(b"host")
            origin = host and self._origin + host
            cors = bool(exchange.cors)
            head = adapted(head, self._base, origin, hide_challenge=exchange.hide_challenge, cors=cors)
        if exchange.fields.special:
            head = specially(head, exchange.fields)
        return inbound(head, exchange.id.encode(), added)

    def _cancelled(self, client: ClientConnection, exchange: Exchange) -> None:
        """End a request whose client has left, or that is cut short by the end of a drain."""
        exchange.keep = False
        left = client.gone or exchange.client_left
        if exchange.on_its_way and not exchange.head_sent and (exchange.audited or not left):
            exchange.note_sent("unknown")  # of a read that nobody waits for this need not be told
        if left or exchange.head_sent:
            exchange.error = "client-left" if left else "shutting-down"
            client.abort()
            return
        doubtful = exchange.audited and exchange.sent != "no"
        self._answer_error(client, exchange, _shutting_down(doubtful=doubtful))

    def _failed(self, client: ClientConnection, exchange: Exchange, failure: Exception) -> None:
        """Answer a request that can't be carried out, or break the connection where its answer has begun."""
        if isinstance(failure, ProxyError):
            error = failure
            exchange.note_error(error)
        elif isinstance(failure, ConnectionError):
            exchange.error = "client-left"
            error = ProxyError("bad-request", "The client left in the middle of its request.", sent=exchange.sent)
        else:
            exchange.error = "internal-error"
            log.error("internal error", id=exchange.id, exc_info=failure)
            why = f"An error inside the proxy stopped this request; its log says more under id {exchange.id}."
            cure = "Please report it. Before you repeat a change, check in Metquay whether it was made."
            error = ProxyError("internal-error", f"{why} {cure}", sent="unknown")
        if exchange.head_sent or client.gone:
            exchange.keep = False
            exchange.note_sent(error.sent)
            client.abort()
        else:
            self._answer_error(client, exchange, error)

    def _answer_error(self, client: ClientConnection, exchange: Exchange, error: ProxyError) -> None:
        if b"expect" in exchange.fields.judged or self.draining:
            exchange.keep = False
        with contextlib.suppress(ConnectionResetError):  # the client left: the exchange is told all the same
            write_error(client, exchange, error)


def _framed(piece: bytes, *, last: bool) -> bytes:
    """Return a piece of a body as a chunk (RFC 9112 section 7.1), and behind the last one the end."""
    chunk = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
    return chunk + b"0\r\n\r\n" if last else chunk


def _shutting_down(*, doubtful: bool = False) -> ProxyError:
    what_to_do = "Send the request again once it is back."
    if doubtful:
        what_to_do = "Metquay may have carried out this request: check there before you send it again."
    return ProxyError("shutting-down", f"The proxy is shutting down. {what_to_do}", retry_after=5)
