"""One exchange with Metquay: token, quota, send, and what may be sent again.

Owns the rules of part 5 of the contract on repeating, and the one budget of waiting that a request has. Must not know
sockets (the transport's) or the client's connection (the server's).

Facts: the vendor says that PUT and DELETE may be repeated and POST may not; a 401 and a 429 mean "not executed".
RFC 9110 section 9.2.2 (idempotent methods), 10.2.3 (Retry-After).
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from metquay_proxy.errors import ProxyError
from metquay_proxy.quota import Quota, QuotaExceeded, Snapshot, Ticket, retry_after_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from metquay_proxy.auth import AccessToken, TokenCache
    from metquay_proxy.body import RequestBody
    from metquay_proxy.http1 import ResponseHead
    from metquay_proxy.rewrite import BaseURL, RequestHead
    from metquay_proxy.target import Target
    from metquay_proxy.telemetry import Exchange

T = TypeVar("T")

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_BUSY: Final = frozenset({502, 503, 504})
_NEVER_CONNECTED: Final = frozenset({"upstream-unreachable", "upstream-tls"})
_FIRST_BACKOFF: Final = 0.25
_LONGEST_BACKOFF: Final = 4.0
_UNAUTHORIZED: Final = 401
_NOT_FOUND: Final = 404
_TOO_MANY: Final = 429
_ANSWER_TEXT_LIMIT: Final = 4096


class Response(Protocol):
    """An answer whose head has arrived."""

    @property
    def head(self) -> ResponseHead: ...

    @property
    def ended(self) -> bool: ...

    def read_nowait(self) -> bytes: ...

    async def read(self) -> bytes: ...

    def close(self) -> None: ...


class Transport(Protocol):
    """The seam to the network: sends one request, returns one response."""

    async def send(self, method: str, head: bytes, body: RequestBody, *, fresh: bool = False) -> Response: ...


@dataclass(slots=True)
class Request:
    """One admitted request. ``caller`` is whom it waits in line with (key name, else User-Agent)."""

    method: str
    target: Target
    head: RequestHead
    body: RequestBody
    caller: str
    read_only: bool = False
    keep_authorization: bool = False


class _Writes:
    """The writes under way on one target: how many were forwarded, so that each sees whether another came after it."""

    __slots__ = ("active", "forwarded")

    def __init__(self) -> None:
        self.active = self.forwarded = 0


class Line:
    """Lets requests wait for their turn: the quota decides, this sleeps."""

    def __init__(
        self,
        quota: Quota,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None = None,
    ) -> None:
        """``call_later`` takes seconds on ``clock`` and a callback; the running loop's by default."""
        self.quota = quota
        self.clock = clock
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, caller: str, max_wait: float) -> Ticket:
        """Return a granted ticket; raise ``QuotaExceeded`` where the turn would come too late."""
        ticket = self.quota.ask(self.clock(), caller, max_wait)
        if ticket.granted:
            return ticket
        turn = asyncio.get_running_loop().create_future()
        ticket.on_settled = lambda: turn.done() or turn.set_result(None)
        self._poll()
        try:
            await turn
        except asyncio.CancelledError:
            self.quota.cancel(ticket, self.clock())
            self._poll()
            raise
        if ticket.refused is not None:
            raise ticket.refused
        return ticket

    def snapshot(self) -> Snapshot:
        """Return the quota's figures."""
        return self.quota.snapshot(self.clock())

    def answered(self, ticket: Ticket) -> None:
        """Say that the answer's head has come, or that the attempt failed."""
        self.quota.answered(ticket, self.clock())
        if self._timer is not None:
            self._poll()

    def give_back(self, ticket: Ticket) -> None:
        """Return a ticket that was never used."""
        self.quota.cancel(ticket, self.clock())
        self._poll()

    def close(self, seconds: float | None) -> None:
        """Close the window because Metquay refused: for ``seconds``, or until it refills."""
        self.quota.close(self.clock(), seconds)
        self._poll()

    def _poll(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self.clock()
        at = self.quota.poll(now)
        if at is not None:
            self._timer = self._call_later(max(0.0, at - now), self._poll)


class Forwarder:
    """Sends requests with a live token, within the quota, again where that is safe."""

    def __init__(  # noqa: PLR0913 - the collaborators and the two settings of one exchange
        self,
        transport: Transport,
        tokens: TokenCache,
        line: Line | None,
        base: BaseURL,
        *,
        max_wait: float,
        retries: int,
        clock: Callable[[], float],
        sleep: Callable[[float], Coroutine[None, None, None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """``max_wait`` is in seconds, ``retries`` counts further attempts; ``line`` is None where the quota is off."""
        self._transport = transport
        self._tokens = tokens
        self._line = line
        self._host = base.authority.encode()
        self._max_wait = max_wait
        self._retries = retries
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._writes: dict[str, _Writes] = {}

    async def forward(self, request: Request, exchange: Exchange) -> Response:
        """Return Metquay's answer; raise ``ProxyError`` where there is none to pass on."""
        if request.target.pass_through:
            return await self._send(request, exchange, None, fresh=False)
        if request.method in READING:
            return await self._forward(request, exchange, None)
        write = self._writes.setdefault(request.target.sent, _Writes())
        write.active += 1
        try:
            return await self._forward(request, exchange, write)
        finally:
            write.active -= 1
            if not write.active:
                del self._writes[request.target.sent]

    async def _forward(self, request: Request, exchange: Exchange, writes: _Writes | None) -> Response:
        deadline = self._clock() + self._max_wait
        rejected: AccessToken | None = None
        failures = serial = 0
        fresh = False

        def overtaken() -> bool:
            return writes is not None and serial != writes.forwarded

        while True:
            token = self._tokens.current()
            if token is None:
                token = await self._waiting(request, exchange, self._tokens.get(deadline - self._clock()))
            ticket = None
            if self._line is not None:
                ticket, token = await self._turn(self._line, request, exchange, token, deadline)
            if writes is not None and not serial:
                writes.forwarded += 1
                serial = writes.forwarded
            try:
                response = await self._send(request, exchange, token, fresh=fresh)
            except ProxyError as failure:
                failures += 1
                fresh = True
                wait = 0.0 if getattr(failure, "stale", False) else self._backoff(failures)
                if not self._may_repeat(request, failure, failures, overtaken=overtaken()) or self._clock() + wait > deadline:
                    raise
                exchange.note_sent(failure.sent)
                await self._pause(request, exchange, wait)
                continue
            finally:
                if ticket is not None and self._line is not None:
                    self._line.answered(ticket)
            status = response.head.status
            if status == _UNAUTHORIZED:
                if rejected is not None:
                    exchange.hide_challenge = True
                    return response
                rejected = token
                await self._renew(request, exchange, response, token, deadline)
                continue
            rejected = None
            if status == _TOO_MANY:
                await self._refused(request, exchange, response, deadline)
                continue
            if status in _BUSY and request.method in IDEMPOTENT and request.body.replayable:
                failures += 1
                wait = max(self._backoff(failures), retry_after_seconds(_field(response.head, b"retry-after"), b"", time.time()) or 0.0)
                if failures <= self._retries and not overtaken() and self._clock() + wait <= deadline:
                    exchange.note_sent("unknown")
                    response.close()
                    await self._pause(request, exchange, wait)
                    continue
            if status == _NOT_FOUND and request.method == "DELETE" and exchange.sent != "no":
                exchange.note = "repeated-after-unknown"
            return response

    async def _send(self, request: Request, exchange: Exchange, token: AccessToken | None, *, fresh: bool) -> Response:
        head = request.head.outbound(
            request.method,
            request.target.sent,
            host=self._host,
            authorization=None if token is None else token.authorization,
            chunked=request.body.chunked,
            read_only=request.read_only,
            keep_authorization=request.keep_authorization,
        )
        exchange.attempts += 1
        return await self._transport.send(request.method, head, request.body, fresh=fresh)

    async def _turn(
        self, line: Line, request: Request, exchange: Exchange, token: AccessToken, deadline: float
    ) -> tuple[Ticket, AccessToken]:
        """Wait for the quota, then look whether the token is still fresh: the wait may have outlived it."""
        try:
            ticket = await self._waiting(request, exchange, line.take(request.caller, deadline - self._clock()))
        except QuotaExceeded as refusal:
            raise _quota_exceeded(refusal.retry_after) from None
        try:
            fresh = self._tokens.current()
            if fresh is None:
                fresh = await self._waiting(request, exchange, self._tokens.get(deadline - self._clock()))
        except BaseException:
            line.give_back(ticket)
            raise
        return ticket, fresh

    async def _renew(self, request: Request, exchange: Exchange, response: Response, token: AccessToken, deadline: float) -> None:
        """Get a new token after a 401, which means that nothing was executed."""
        response.close()
        if not request.body.replayable:
            self._tokens.reject(token)
            msg = (
                "Metquay no longer accepted the token when this large upload arrived, and nothing was changed. The proxy has a "
                "new token by now: send the request again."
            )
            raise ProxyError("retry-with-new-token", msg)
        await self._waiting(request, exchange, self._tokens.renew(token, deadline - self._clock()))

    async def _refused(self, request: Request, exchange: Exchange, response: Response, deadline: float) -> None:
        """Metquay's own 429, which means that nothing was executed: close the window and wait for it."""
        text = await _text(response)
        wait = retry_after_seconds(_field(response.head, b"retry-after"), text, time.time())
        response.close()
        if not request.body.replayable:
            raise _quota_exceeded(wait or 1.0)
        if self._line is not None:
            self._line.close(wait)
        else:
            wait = max(1.0, wait or 0.0)
            if self._clock() + wait > deadline:
                raise _quota_exceeded(wait)
            await self._pause(request, exchange, wait)

    def _may_repeat(self, request: Request, failure: ProxyError, failures: int, *, overtaken: bool) -> bool:
        if failures > self._retries or not getattr(failure, "repeatable", False) or not request.body.replayable:
            return False
        if failure.slug in _NEVER_CONNECTED:
            return True
        return request.method in IDEMPOTENT and not overtaken

    def _backoff(self, failures: int) -> float:
        longest = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** (failures - 1))
        return longest * (0.5 + self._jitter() / 2)

    async def _pause(self, request: Request, exchange: Exchange, seconds: float) -> None:
        if seconds > 0:
            await self._waiting(request, exchange, self._sleep(seconds))

    async def _waiting(self, request: Request, exchange: Exchange, what: Coroutine[None, None, T]) -> T:
        """Await something while the client's body is read ahead, and count the time."""
        began = self._clock()
        try:
            if request.body.ended:
                return await what
            return await _beside(what, request.body.prefetch())
        finally:
            exchange.waited += self._clock() - began


async def _beside(what: Coroutine[None, None, T], reading: Coroutine[None, None, None]) -> T:
    """Await ``what``; a failure of ``reading`` (the client broke its body) ends it early."""
    main = asyncio.ensure_future(what)
    reader = asyncio.ensure_future(reading)
    try:
        await asyncio.wait({main, reader}, return_when=asyncio.FIRST_COMPLETED)
        if reader.done():
            reader.result()
        return await main
    finally:
        main.cancel()
        reader.cancel()
        await asyncio.gather(main, reader, return_exceptions=True)


async def _text(response: Response) -> bytes:
    """Return the beginning of a short error text."""
    text = b""
    while len(text) < _ANSWER_TEXT_LIMIT:
        piece = await response.read()
        if not piece:
            break
        text += piece
    return text[:_ANSWER_TEXT_LIMIT]


def _field(head: ResponseHead, name: bytes) -> str | None:
    for lower, (_, value) in zip(head.names, head.headers, strict=True):
        if lower == name:
            return value.decode("latin-1")
    return None


def _quota_exceeded(seconds: float) -> ProxyError:
    msg = (
        "Metquay allows this key pair only so many requests a minute, and they are used up: more are asked for than can be "
        "sent in time. Nothing was sent. Try again after the seconds that Retry-After names, or ask for less at once."
    )
    return ProxyError("quota-exceeded", msg, retry_after=seconds)
