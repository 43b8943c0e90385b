"""One exchange with Metquay: token, quota, send, and what may be sent again.

Owns the rules of part 5 of the contract on repeating, and the one budget of waiting that a request has. Must not know
sockets (the transport's) or the client's connection (the server's).

Facts: the vendor says that PUT and DELETE may be repeated and POST may not; a 401 and a 429 mean "not executed".
RFC 9110 section 9.2.2 (idempotent methods), 10.2.3 (Retry-After).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from metquay_proxy.errors import ProxyError, Sent
from metquay_proxy.http1 import ResponseHead
from metquay_proxy.idempotency import MAX_ANSWER, Answer, Claim, Records, proves_nothing_was_executed, record_name
from metquay_proxy.quota import Quota, QuotaExceeded, Snapshot, Ticket, retry_after_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from metquay_proxy.auth import AccessToken, TokenCache
    from metquay_proxy.body import RequestBody
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
_FIRST_OF_INTEREST: Final = 401
_UNAUTHORIZED: Final = 401
_NOT_FOUND: Final = 404
_TOO_MANY: Final = 429
_ANSWER_TEXT_LIMIT: Final = 4096


class Response(Protocol):
    """An answer whose head has arrived."""

    @property
    def head(self) -> ResponseHead:
        """The final head."""

    @property
    def ended(self) -> bool:
        """Whether the whole body was read."""

    def read_nowait(self) -> bytes:
        """Return a piece that has arrived, or nothing."""

    async def read(self) -> bytes:
        """Return the next piece, empty at the clean end; raise ``ProxyError`` where it breaks off."""

    def close(self) -> None:
        """Give up what has not arrived."""


class Transport(Protocol):
    """The seam to the network: sends one request, returns one response."""

    async def send(self, method: str, head: bytes, body: RequestBody, *, fresh: bool = False) -> Response:
        """Send; raise ``ProxyError``, with ``repeatable`` and ``stale`` where it knows more."""


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
        self._quota = quota
        self._clock = clock
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, caller: str, max_wait: float) -> Ticket:
        """Return a ticket, granted or waiting; raise ``QuotaExceeded`` where its turn would come too late."""
        return self._quota.ask(self._clock(), caller, max_wait)

    async def wait(self, ticket: Ticket) -> None:
        """Wait until the ticket is granted; raise ``QuotaExceeded`` where that came to be too late.

        Whoever is cancelled here gives the ticket back.
        """
        turn = asyncio.get_running_loop().create_future()

        def settled() -> None:
            if not turn.done():
                turn.set_result(None)

        ticket.on_settled = settled
        self._poll()
        await turn
        if ticket.refused is not None:
            raise ticket.refused

    def sent(self, ticket: Ticket) -> None:
        """Say that the request is on its way."""
        self._quota.sent(ticket)

    def answered(self, ticket: Ticket) -> None:
        """Say that the answer's head has come, or that the attempt failed."""
        self._quota.answered(ticket, self._clock())
        if self._timer is not None:
            self._poll()

    def give_back(self, ticket: Ticket) -> None:
        """Return a ticket that was not used: the place in the line, or the slot."""
        self._quota.cancel(ticket, self._clock())
        self._poll()

    def close(self, seconds: float | None) -> None:
        """Close the window because Metquay refused: for ``seconds``, or until it refills."""
        self._quota.close(self._clock(), seconds)
        self._poll()

    def snapshot(self) -> Snapshot:
        """Return the quota's figures."""
        return self._quota.snapshot(self._clock())

    def _poll(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        at = self._quota.poll(now)
        if at is not None:
            self._timer = self._call_later(max(0.0, at - now), self._poll)


class Forwarder:
    """Sends requests with a live token, within the quota, again where that is safe."""

    def __init__(  # noqa: PLR0913 - the collaborators and the settings of one exchange
        self,
        transport: Transport,
        tokens: TokenCache,
        line: Line | None,
        base: BaseURL,
        *,
        max_wait: float,
        retries: int,
        clock: Callable[[], float],
        records: Records | None = None,
        replay_limit: int = 1 << 20,
        sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """``max_wait`` is in seconds, ``replay_limit`` in bytes; ``line`` is None where the quota is off.

        ``retries`` counts further attempts; ``jitter`` yields 0 <= x < 1.
        """
        self._transport = transport
        self._tokens = tokens
        self._line = line
        self._host = base.authority.encode()
        self._max_wait = max_wait
        self._retries = retries
        self._replay_limit = replay_limit
        self._records = Records() if records is None else records
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._writes: dict[str, _Writes] = {}

    async def forward(self, request: Request, exchange: Exchange) -> Response:
        """Return Metquay's answer; raise ``ProxyError`` where there is none to pass on."""
        if request.target.pass_through:
            exchange.attempts = 1
            return await self._send(request, None, None, fresh=False)
        if request.method in READING:
            return await self._forward(request, exchange, None)
        if request.method == "POST" and b"idempotency-key" in request.head.judged:
            return await self._forward_once(request, exchange)
        return await self._forward_write(request, exchange)

    async def _forward_once(self, request: Request, exchange: Exchange) -> Response:
        """Forward a POST with an Idempotency-Key, or return what the first one with it was answered."""
        name = record_name(exchange.client, request.target.sent, request.head.text(b"idempotency-key"))
        digest = hashlib.sha256(await request.body.all(self._replay_limit)).digest()
        claim = await self._records.claim(name, digest, self._clock())
        if isinstance(claim, Answer):
            return _replayed(claim)
        try:
            response = await self._forward_write(request, exchange)
            if 200 <= response.head.status <= 299:  # noqa: PLR2004 - RFC 9110 section 15.3, the successful class
                exchange.note_sent("yes")
                return await self._record(claim, response)
        except BaseException as error:
            left: Sent = "unknown" if request.body.sent else "no"
            exchange.note_sent(error.sent if isinstance(error, ProxyError) else left)
            await self._settle(claim, executed=exchange.sent != "no")
            raise
        await self._settle(claim, executed=not proves_nothing_was_executed(response.head.status))
        return response

    async def _record(self, claim: Claim, response: Response) -> Response:
        """Write a 2xx answer down before the client sees it; one that is too long is only known to have come."""
        pieces: list[bytes] = []
        size = 0
        try:
            while size <= MAX_ANSWER and not response.ended:
                pieces.append(await response.read())
                size += len(pieces[-1])
        except BaseException:
            response.close()
            raise
        head = response.head
        body = b"".join(pieces) if response.ended and size <= MAX_ANSWER else None
        await self._records.complete(claim, Answer(head.status, head.reason, head.headers, body), self._clock())
        return _Buffered(head, pieces, response)

    async def _settle(self, claim: Claim, *, executed: bool) -> None:
        if executed:
            await self._records.complete(claim, None, self._clock())
        else:
            await self._records.free(claim)

    async def _forward_write(self, request: Request, exchange: Exchange) -> Response:
        writes = self._writes.setdefault(request.target.sent, _Writes())
        writes.active += 1
        try:
            return await self._forward(request, exchange, writes)
        finally:
            writes.active -= 1
            if not writes.active:
                del self._writes[request.target.sent]

    async def _forward(self, request: Request, exchange: Exchange, writes: _Writes | None) -> Response:
        deadline = self._clock() + self._max_wait
        line = self._line
        attempts = _Attempts(writes)
        while True:
            token = self._tokens.current() or await self._token(request, exchange, deadline)
            ticket = None
            if line is not None:
                ticket = self._ask(line, request.caller, deadline)
                if not ticket.granted:
                    token = await self._turn(line, ticket, request, exchange, deadline)
            attempts.begin()
            exchange.attempts += 1
            try:
                response = await self._send(request, token, ticket, fresh=attempts.fresh)
            except ProxyError as failure:
                wait = self._wait_after(failure, request, exchange, attempts)
                if wait is None or self._clock() + wait > deadline:
                    raise
                exchange.note_sent(failure.sent)
            else:
                if response.head.status < _FIRST_OF_INTEREST:
                    return response
                wait = await self._judge(response, request, exchange, attempts, token, deadline)
                if wait is None:
                    return response
            request.body.sent = False
            if wait > 0:
                await self._waiting(request, exchange, self._sleep(wait))

    async def _judge(  # noqa: PLR0913 - all that an answer is judged by
        self,
        response: Response,
        request: Request,
        exchange: Exchange,
        attempts: _Attempts,
        token: AccessToken,
        deadline: float,
    ) -> float | None:
        """Return for how many seconds to wait before the request is sent again; None: the answer is passed on."""
        status = response.head.status
        rejected, attempts.rejected = attempts.rejected, status == _UNAUTHORIZED
        if exchange.client_left:
            return None
        if status == _UNAUTHORIZED:
            if not rejected:
                return await self._renew(request, exchange, response, token, deadline)
            exchange.hide_challenge = True
        elif status == _TOO_MANY:
            return await self._refused(request, response, deadline)
        elif status in _BUSY:
            wait = self._wait_after_busy(request, response, attempts)
            if wait is not None and self._clock() + wait <= deadline:
                exchange.note_sent("unknown")
                response.close()
                return wait
        elif status == _NOT_FOUND and request.method == "DELETE" and exchange.sent != "no":
            exchange.note = "repeated-after-unknown"
        return None

    async def _send(
        self, request: Request, token: AccessToken | None, ticket: Ticket | None, *, fresh: bool
    ) -> Response:
        """Send one attempt; its slot counts from now until one window after the answer's head, or the failure."""
        head = request.head.outbound(
            request.method,
            request.target.sent,
            host=self._host,
            authorization=None if token is None else token.authorization,
            chunked=request.body.chunked,
            read_only=request.read_only,
            keep_authorization=request.keep_authorization,
        )
        if ticket is None or self._line is None:
            return await self._transport.send(request.method, head, request.body, fresh=fresh)
        self._line.sent(ticket)
        try:
            return await self._transport.send(request.method, head, request.body, fresh=fresh)
        finally:
            self._line.answered(ticket)

    async def _token(self, request: Request, exchange: Exchange, deadline: float) -> AccessToken:
        return await self._waiting(request, exchange, self._tokens.get(deadline - self._clock()))

    def _ask(self, line: Line, caller: str, deadline: float) -> Ticket:
        try:
            return line.ask(caller, deadline - self._clock())
        except QuotaExceeded as refusal:
            raise _quota_exceeded(refusal.retry_after) from None

    async def _turn(
        self, line: Line, ticket: Ticket, request: Request, exchange: Exchange, deadline: float
    ) -> AccessToken:
        """Wait for the quota, then look whether the token is still fresh: the wait may have outlived it."""
        try:
            await self._waiting(request, exchange, line.wait(ticket))
            return self._tokens.current() or await self._token(request, exchange, deadline)
        except QuotaExceeded as refusal:
            raise _quota_exceeded(refusal.retry_after) from None
        except BaseException:
            line.give_back(ticket)
            raise

    async def _renew(
        self, request: Request, exchange: Exchange, response: Response, token: AccessToken, deadline: float
    ) -> float:
        """Get a new token after a 401, which means that nothing was executed."""
        response.close()
        if not request.body.replayable:
            self._tokens.reject(token)
            msg = (
                "Metquay no longer accepted the token when this large upload arrived, and nothing was changed. "
                "The proxy is getting a new token: send the request again."
            )
            raise ProxyError("retry-with-new-token", msg)
        await self._waiting(request, exchange, self._tokens.renew(token, deadline - self._clock()))
        return 0.0

    async def _refused(self, request: Request, response: Response, deadline: float) -> float:
        """Metquay's own 429, which means that nothing was executed: close the window, and wait for it in the line."""
        asked = retry_after_seconds(_field(response.head, b"retry-after"), await _text(response), time.time())
        response.close()
        if self._line is not None:
            self._line.close(asked)
        wait = asked or 1.0
        if not request.body.replayable or (self._line is None and self._clock() + wait > deadline):
            raise _quota_exceeded(wait)
        return 0.0 if self._line is not None else wait

    def _wait_after(
        self, failure: ProxyError, request: Request, exchange: Exchange, attempts: _Attempts
    ) -> float | None:
        """Return for how many seconds to back off before the request is sent again; None where it must not be."""
        attempts.fresh = True
        if exchange.client_left or not getattr(failure, "repeatable", False) or not request.body.replayable:
            return None
        if failure.slug not in _NEVER_CONNECTED and request.method not in IDEMPOTENT:
            return None
        if getattr(failure, "stale", False) and not attempts.was_stale:
            # the upstream closed a pooled connection under it: no failure of the upstream's, and no reason to wait
            attempts.was_stale = True
            return None if attempts.overtaken else 0.0
        return self._backoff(attempts)

    def _wait_after_busy(self, request: Request, response: Response, attempts: _Attempts) -> float | None:
        if request.method not in IDEMPOTENT or not request.body.replayable:
            return None
        wait = self._backoff(attempts)
        if wait is not None:
            asked = retry_after_seconds(_field(response.head, b"retry-after"), b"", time.time())
            wait = max(wait, asked or 0.0)
        return wait

    def _backoff(self, attempts: _Attempts) -> float | None:
        attempts.failed += 1
        if attempts.failed > self._retries or attempts.overtaken:
            return None
        longest: float = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** (attempts.failed - 1))
        return longest * (0.5 + self._jitter() / 2)

    async def _waiting(self, request: Request, exchange: Exchange, what: Coroutine[Any, Any, T]) -> T:
        """Await something while the client's body is read ahead, and count the time."""
        began = self._clock()
        try:
            if request.body.ended:
                return await what
            return await _beside(what, request.body.prefetch())
        finally:
            exchange.waited += self._clock() - began


class _Attempts:
    """What is known of one request's attempts so far."""

    __slots__ = ("_serial", "_writes", "failed", "fresh", "rejected", "was_stale")

    def __init__(self, writes: _Writes | None) -> None:
        self._writes = writes
        self._serial = 0
        self.failed = 0
        self.fresh = False
        self.rejected = False
        self.was_stale = False

    def begin(self) -> None:
        """Note that an attempt is about to be sent."""
        if self._writes is not None and not self._serial:
            self._writes.forwarded += 1
            self._serial = self._writes.forwarded

    @property
    def overtaken(self) -> bool:
        """Whether another write to the same target was forwarded after the first attempt of this one."""
        return self._writes is not None and self._serial != self._writes.forwarded


class _Buffered:
    """An answer whose beginning, or whole, was read before it is passed on."""

    def __init__(self, head: ResponseHead, pieces: list[bytes], rest: Response | None = None) -> None:
        self.head = head
        self._pieces = pieces
        self._rest = rest

    @property
    def ended(self) -> bool:
        return not self._pieces and (self._rest is None or self._rest.ended)

    def read_nowait(self) -> bytes:
        if self._pieces:
            return self._pieces.pop(0)
        return b"" if self._rest is None else self._rest.read_nowait()

    async def read(self) -> bytes:
        if self._pieces or self._rest is None:
            return self.read_nowait()
        return await self._rest.read()

    def close(self) -> None:
        if self._rest is not None:
            self._rest.close()


def _replayed(answer: Answer) -> _Buffered:
    fields = [*answer.fields, (b"Idempotency-Replayed", b"true")]
    body = answer.body or b""
    sized = any(name.lower() == b"content-length" for name, _ in answer.fields)
    head = ResponseHead(
        status=answer.status,
        reason=answer.reason,
        minor=1,
        headers=fields,
        names=[name.lower() for name, _ in fields],
        length=len(body) if sized else None,
        chunked=not sized,
        until_close=False,
        keep_alive=True,
        no_body=False,
    )
    return _Buffered(head, [body] if body else [])


async def _beside(what: Coroutine[Any, Any, T], reading: Coroutine[Any, Any, None]) -> T:
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
        "Metquay allows this key pair only so many requests a minute, and they are used up: more are asked for than can "
        "be sent in time. Nothing was sent. Try again after the seconds that Retry-After names, or ask for less at once."
    )
    return ProxyError("quota-exceeded", msg, retry_after=seconds)
