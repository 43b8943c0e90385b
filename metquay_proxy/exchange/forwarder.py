"""One exchange with Metquay: token, quota, send, and what may be sent again.

Owns the rules of part 5 of the contract on repeating, and the one budget of waiting that a request has. Must not know
sockets (the transport's) or the client's connection (the server's).

Facts: the vendor says that PUT and DELETE may be repeated and POST may not; a 401 and a 429 mean "not executed".
RFC 9110 section 9.2.2 (idempotent methods), 10.2.3 (Retry-After).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import math
import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from metquay_proxy.rules.errors import ProxyError, Sent, UpstreamFailure
from metquay_proxy.rules.http1 import ResponseHead
from metquay_proxy.rules.idempotency import MAX_ANSWER, Answer, Records, proves_nothing_was_executed, record_name
from metquay_proxy.rules.quota import QuotaExceeded, retry_after_seconds
from metquay_proxy.rules.refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from metquay_proxy.exchange.body import RequestBody
    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.exchange.line import Line
    from metquay_proxy.exchange.tokens import AccessToken, TokenCache
    from metquay_proxy.rules.headers import RequestHead
    from metquay_proxy.rules.quota import Ticket
    from metquay_proxy.rules.target import BaseURL, Target

T = TypeVar("T")

READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_OVERWRITING: Final = frozenset({"PUT", "DELETE"})
_IDEMPOTENT: Final = READING | _OVERWRITING
_BUSY: Final = frozenset({502, 503, 504})
_NEVER_CONNECTED: Final = frozenset({"upstream-unreachable", "upstream-tls"})
_FIRST_BACKOFF: Final = 0.25
"""Seconds at most; twice as many before each further attempt, until they have doubled ``_DOUBLINGS`` times."""
_DOUBLINGS: Final = 4
_UNAUTHORIZED: Final = 401
_NOT_FOUND: Final = 404
_TOO_MANY: Final = 429
_TEXT_LIMIT: Final = 4096


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


class BegunResponse(Response, Protocol):
    """An answer whose head may not have arrived yet."""

    notify: Callable[[], None] | None
    """Called once, at the next news of it."""

    @property
    def whole(self) -> bool:
        """Whether all of it has arrived."""

    async def started(self) -> None:
        """Wait for the head; raise ``ProxyError``."""


class Transport(Protocol):
    """The seam to the network: sends one request, returns one response."""

    async def send(
        self, method: str, head: bytes, body: RequestBody, *, fresh: bool = False, on_sent: Callable[[], object] = int
    ) -> Response:
        """Send; raise ``ProxyError``, with ``repeatable`` and ``stale`` where it knows more.

        ``on_sent`` is called when the first byte has been handed to a connection that is finished.
        """

    def begin(self, method: str, head: bytes, body: RequestBody) -> BegunResponse | None:
        """Send at once what may be repeated, on a connection that is there; None where there is none."""


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
    scope: str | None = None
    """The client key whose Idempotency-Keys these are: with another key they are others."""

    @property
    def resource(self) -> tuple[str, str]:
        """What it asks of whom, whatever its query."""
        return self.method, self.target.local


@dataclass(slots=True, eq=False)
class Begun:
    """A first attempt that was sent without waiting for anything; ``at`` is a reading of ``time.perf_counter``."""

    request: Request
    token: AccessToken
    ticket: Ticket | None
    response: BegunResponse
    at: float


@dataclass(slots=True)
class _Writes:
    """The writes under way on one target: how many were forwarded, so that each sees whether another came after it."""

    active: int = 0
    forwarded: int = 0


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
        self._refusals = Refusals()

    def begin(self, request: Request, exchange: Exchange) -> Begun | None:
        """Send the first attempt of a read if nothing needs to be waited for; None where something does.

        Whoever gets one looks at the answer when it comes: ``passes`` says whether it is to be passed on as it is. If
        it is not, or does not come, the exchange goes on with ``forward``.
        """
        token = self._tokens.current()
        if token is None:
            return None
        line, ticket = self._line, None
        if line is not None:
            ticket = line.take(request.caller)
            if ticket is None:
                return None
        began = time.perf_counter()
        response = None
        try:
            response = self._transport.begin(request.method, self._outbound(request, token), request.body)
        finally:
            if line is not None and ticket is not None:
                if response is None:
                    line.give_back(ticket)
                else:
                    line.sent(ticket)
        if response is None:
            return None
        exchange.attempts = 1
        return Begun(request, token, ticket, response, began)

    def passes(self, begun: Begun, exchange: Exchange) -> bool:
        """Whether an attempt brought a whole answer that is no reason for another one; it is counted if so."""
        response = begun.response
        if not response.whole or response.head.status >= _UNAUTHORIZED:
            return False
        exchange.upstream = time.perf_counter() - begun.at
        if self._refusals.marks:
            self._refusals.taken(begun.request.resource, begun.token, self._clock())
        self.leave(begun)
        return True

    def leave(self, begun: Begun) -> None:
        """Say that an attempt has ended."""
        if self._line is not None and begun.ticket is not None:
            self._line.answered(begun.ticket)

    def forward(
        self, request: Request, exchange: Exchange, begun: Begun | None = None
    ) -> Coroutine[Any, Any, Response]:
        """Return Metquay's answer; raise ``ProxyError`` where there is none to pass on."""
        if begun is not None:
            spent = time.perf_counter() - exchange.began
            attempts = _Attempts(request, exchange, self._clock() + self._max_wait - spent, None, begun=begun)
            return self._forward(attempts)
        if request.target.pass_through:
            exchange.attempts = 1
            return self._send(request, None, None, fresh=False)
        if request.method in READING:
            return self._forward(_Attempts(request, exchange, self._clock() + self._max_wait, None))
        if request.method == "POST" and b"idempotency-key" in request.head.judged:
            return self._forward_once(request, exchange)
        return self._forward_write(request, exchange)

    async def _forward_once(self, request: Request, exchange: Exchange) -> Response:
        """Forward a POST with an Idempotency-Key, or return what the first one with it was answered."""
        name = record_name(request.scope, request.target.sent, request.head.text(b"idempotency-key"))
        digest = hashlib.sha256(await request.body.all(self._replay_limit)).digest()
        claim = await self._records.claim(name, digest, self._clock())
        if isinstance(claim, Answer):
            exchange.replayed = True
            return _replayed(claim)
        answer: Answer | None = None
        try:
            response = await self._forward_write(request, exchange)
            head = response.head
            executed = not proves_nothing_was_executed(head.status)
            if 200 <= head.status <= 299:  # noqa: PLR2004 - RFC 9110 section 15.3, the successful class
                exchange.note_sent("yes")
                answer = Answer(head.status, head.reason, head.headers, None)
                beginning = await _beginning(response, MAX_ANSWER)
                if response.ended and len(beginning) <= MAX_ANSWER:
                    answer = replace(answer, body=beginning)
                response = _Begun(head, beginning, response)
        except BaseException as error:
            left: Sent = "unknown" if request.body.sent else "no"
            exchange.note_sent(error.sent if isinstance(error, ProxyError) else left)
            executed = exchange.sent != "no"
            raise
        finally:
            if executed:
                await self._records.complete(claim, answer, self._clock())
            else:
                await self._records.free(claim)
        return response

    async def _forward_write(self, request: Request, exchange: Exchange) -> Response:
        target = request.target.sent
        writes = self._writes.setdefault(target, _Writes())
        writes.active += 1
        try:
            return await self._forward(_Attempts(request, exchange, self._clock() + self._max_wait, writes))
        finally:
            writes.active -= 1
            if not writes.active:
                del self._writes[target]

    async def _forward(self, attempts: _Attempts) -> Response:
        try:
            while True:
                response = await self._attempt(attempts)
                if response is not None:
                    return response
                attempts.request.body.sent = False
                if attempts.wait:
                    await self._waiting(attempts, self._sleep(attempts.wait))
                    attempts.wait = 0.0
        except ProxyError as error:
            return attempts.end(error)
        except QuotaExceeded as refusal:
            closed = self._line is not None and self._line.snapshot().closed_for > 0
            return attempts.end(_quota_exceeded(refusal.retry_after, by_metquay=closed))
        except BaseException:
            attempts.drop()
            raise

    async def _attempt(self, attempts: _Attempts) -> Response | None:
        """Wait for token and quota, and send once; None where another attempt is to follow."""
        if attempts.begun is not None:
            begun, attempts.begun = attempts.begun, None
            return await self._outcome(attempts, begun.token, self._started(begun), begun.at)
        token = self._tokens.current()
        if token is None or token == attempts.rejected:
            token = await self._token(attempts)
        ticket = None
        if self._line is not None:
            ticket = self._line.ask(attempts.request.caller, attempts.deadline - self._clock())
            if not ticket.granted:
                token = await self._turn(self._line, ticket, attempts)
        if attempts.ended is not None and attempts.overtaken:
            if self._line is not None and ticket is not None:
                self._line.give_back(ticket)
            return attempts.end(attempts.ended)
        attempts.begin()
        sending = self._send(attempts.request, token, ticket, fresh=attempts.fresh)
        return await self._outcome(attempts, token, sending, time.perf_counter())

    async def _outcome(
        self, attempts: _Attempts, token: AccessToken, sending: Coroutine[Any, Any, Response], began: float
    ) -> Response | None:
        """Return what an attempt brought; None where another one is to follow."""
        try:
            response = await sending
        except ProxyError as failure:
            if self._repeats_after_failure(attempts, failure):
                return None
            raise
        finally:
            attempts.exchange.upstream += time.perf_counter() - began
        if self._refusals.marks and response.head.status != _UNAUTHORIZED:
            self._refusals.taken(attempts.request.resource, token, self._clock())
        if response.head.status < _UNAUTHORIZED:
            return response
        try:
            return None if await self._repeats_after_answer(attempts, response, token) else response
        except BaseException:
            response.close()
            raise

    async def _send(
        self, request: Request, token: AccessToken | None, ticket: Ticket | None, *, fresh: bool
    ) -> Response:
        """Send one attempt; its slot counts from its first byte until one window after the answer's head, or failure.

        Where no byte was sent (there was no connection, or the client left before), the slot comes back at once.
        """
        line = self._line
        on_sent = int if line is None or ticket is None else functools.partial(line.sent, ticket)
        try:
            head = self._outbound(request, token)
            return await self._transport.send(request.method, head, request.body, fresh=fresh, on_sent=on_sent)
        finally:
            if line is not None and ticket is not None:
                (line.answered if ticket.state == "sent" else line.give_back)(ticket)

    async def _started(self, begun: Begun) -> Response:
        try:
            await begun.response.started()
        except BaseException:
            begun.response.close()
            raise
        finally:
            self.leave(begun)
        return begun.response

    def _outbound(self, request: Request, token: AccessToken | None) -> bytes:
        return request.head.outbound(
            request.method,
            request.target.sent,
            host=self._host,
            authorization=None if token is None else token.authorization,
            chunked=request.body.chunked,
            read_only=request.read_only,
            keep_authorization=request.keep_authorization,
        )

    async def _token(self, attempts: _Attempts) -> AccessToken:
        return await self._waiting(attempts, self._tokens.get(attempts.deadline - self._clock(), attempts.rejected))

    async def _turn(self, line: Line, ticket: Ticket, attempts: _Attempts) -> AccessToken:
        """Wait for the quota, then look whether the token is still fresh: the wait may have outlived it."""
        try:
            await self._waiting(attempts, line.wait(ticket))
            return await self._token(attempts)
        except BaseException:
            line.give_back(ticket)
            raise

    def _repeats_after_failure(self, attempts: _Attempts, failure: ProxyError) -> bool:
        """Decide whether a request that got no answer is sent again, and prepare for it."""
        attempts.fresh = True
        attempts.exchange.note_sent(failure.sent)
        if not (isinstance(failure, UpstreamFailure) and failure.repeatable):
            return False
        if attempts.request.method not in _IDEMPOTENT and failure.slug not in _NEVER_CONNECTED:
            return False
        # that the upstream closed an idle connection says nothing against it
        return self._back_off(attempts, failure, at_once=failure.stale)

    async def _repeats_after_answer(self, attempts: _Attempts, response: Response, token: AccessToken) -> bool:
        """Decide whether a request is sent again that was answered with an error, and prepare for it."""
        request, exchange, status = attempts.request, attempts.exchange, response.head.status
        rejected, attempts.rejected = attempts.rejected, None
        if status == _UNAUTHORIZED:
            if rejected is not None:
                self._refusals.mark(request.resource, rejected)
            if rejected is not None or self._refusals.final(request.resource, token, self._clock()):
                exchange.hide_challenge = True
                return False
            self._tokens.reject(token)
            attempts.rejected = token
            if not attempts.repeatable:
                self._refusals.mark(request.resource, token)  # the next token that it refuses is the second in a row
                raise ProxyError(
                    "retry-with-new-token",
                    "Metquay did not accept the token, so that nothing was changed, and this body was not kept for a "
                    "second attempt (METQUAY_REPLAY_LIMIT). The proxy is getting a new token: send the request again.",
                    retry_after=self._tokens.state.next_login_in,
                )
        elif status == _TOO_MANY:
            await self._close_window(attempts, response)
        elif status in _BUSY and request.method in _IDEMPOTENT:
            asked = retry_after_seconds(response.head.headers, b"", time.time())
            if self._back_off(attempts, response, asked or 0.0):
                exchange.note_sent("unknown")
                return True
            return False
        else:
            if status == _NOT_FOUND and request.method == "DELETE" and exchange.sent != "no":
                exchange.note = "repeated-after-unknown"
            return False
        response.close()
        return True

    async def _close_window(self, attempts: _Attempts, response: Response) -> None:
        """Metquay's own 429, which means that nothing was executed: the request goes back into the line.

        Raises ``ProxyError`` quota-exceeded where it can't wait so long, or can't be sent again.
        """
        attempts.request.body.sent = False
        asked = retry_after_seconds(response.head.headers, b"", time.time())
        if asked is None:
            with contextlib.suppress(ProxyError):  # it broke off in mid-text, and is a 429 all the same
                asked = retry_after_seconds((), await _beginning(response, _TEXT_LIMIT), 0.0)
        wait = asked or 1.0
        if self._line is not None:
            self._line.close(asked)
            if attempts.repeatable:
                return
            wait = self._line.snapshot().next_free_in
        if not attempts.repeatable or self._clock() + wait > attempts.deadline:
            raise _quota_exceeded(wait, by_metquay=True)
        attempts.wait = wait

    def _back_off(
        self, attempts: _Attempts, ended: Response | ProxyError, least: float = 0.0, *, at_once: bool = False
    ) -> bool:
        """Plan another attempt after an unclear end, in ``least`` seconds or more; False where there must be none."""
        if attempts.failed == self._retries or attempts.overtaken or not attempts.repeatable:
            return False
        longest: float = 0.0 if at_once else _FIRST_BACKOFF * 2.0 ** min(attempts.failed, _DOUBLINGS)
        wait = max(least, longest * (0.5 + self._jitter() / 2))
        if self._clock() + wait > attempts.deadline:
            return False
        attempts.failed += 1
        attempts.wait, attempts.ended = wait, ended
        return True

    async def _waiting(self, attempts: _Attempts, what: Coroutine[Any, Any, T]) -> T:
        """Await something while the client's body is read ahead, and count the time."""
        body = attempts.request.body
        began = self._clock()
        try:
            return await (what if body.ended else _beside(what, body.prefetch()))
        finally:
            attempts.exchange.waited += self._clock() - began


@dataclass(slots=True, eq=False)
class _Attempts:
    """The attempts of one request: how long it may wait in all, and what is known of those that were made.

    ``ended`` is what the last one ended in, if unclear, while another is to follow; ``wait``: after so many seconds.
    ``rejected`` is the token of the last one, if it was answered with 401: another one is waited for.
    """

    request: Request
    exchange: Exchange
    deadline: float
    writes: _Writes | None
    serial: int = 0
    failed: int = 0
    wait: float = 0.0
    fresh: bool = False
    rejected: AccessToken | None = None
    begun: Begun | None = None
    ended: Response | ProxyError | None = None

    @property
    def repeatable(self) -> bool:
        """Whether there is still somebody to repeat it for, and a body to send."""
        return self.request.body.replayable and not self.exchange.client_left

    @property
    def overtaken(self) -> bool:
        """Whether another write to the same target was forwarded after the first attempt of this PUT or DELETE."""
        writes = self.writes
        return writes is not None and writes.forwarded != self.serial and self.request.method in _OVERWRITING

    def begin(self) -> None:
        """Count an attempt that is about to be sent."""
        self.exchange.attempts += 1
        if self.ended is not None:
            self.drop()
        elif self.writes is not None:
            self.writes.forwarded += 1
            self.serial = self.writes.forwarded

    def end(self, refusal: Response | ProxyError) -> Response:
        """No other attempt can be made: pass on what the last one ended in, else ``refusal``."""
        ended = refusal if self.ended is None else self.ended
        if isinstance(ended, ProxyError):
            raise ended
        return ended

    def drop(self) -> None:
        """Forget what the last attempt ended in."""
        if self.ended is not None and not isinstance(self.ended, ProxyError):
            self.ended.close()
        self.ended = None


class _Begun:
    """An answer whose beginning, or whole, was read before it is passed on."""

    def __init__(self, head: ResponseHead, beginning: bytes, rest: Response | None = None) -> None:
        self.head = head
        self._beginning = beginning
        self._rest = rest

    @property
    def ended(self) -> bool:
        return not self._beginning and (self._rest is None or self._rest.ended)

    def read_nowait(self) -> bytes:
        beginning, self._beginning = self._beginning, b""
        return beginning or (b"" if self._rest is None else self._rest.read_nowait())

    async def read(self) -> bytes:
        return self.read_nowait() or (b"" if self._rest is None else await self._rest.read())

    def close(self) -> None:
        if self._rest is not None:
            self._rest.close()


def _replayed(answer: Answer) -> _Begun:
    """Return a recorded answer as though it came now, in one piece however it came then."""
    body = answer.body or b""
    fields = [(name, value) for name, value in answer.fields if name.lower() != b"content-length"]
    fields += [(b"Content-Length", b"%d" % len(body)), (b"Idempotency-Replayed", b"true")]
    return _Begun(ResponseHead.made(answer.status, answer.reason, fields, len(body)), body)


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


async def _beginning(response: Response, limit: int) -> bytes:
    """Return the body, or a beginning of it that is longer than ``limit`` bytes."""
    beginning = b""
    try:
        while len(beginning) <= limit and not response.ended:
            beginning += await response.read()
    except BaseException:
        response.close()
        raise
    return beginning


def _quota_exceeded(seconds: float, *, by_metquay: bool) -> ProxyError:
    wait = max(1, math.ceil(seconds))
    why = (
        "Metquay says that its limit is reached (429); something else may use it too."
        if by_metquay
        else "More is asked for than Metquay grants this key pair."
    )
    msg = f"{why} Nothing was changed. Send it again in {wait} s, or ask for more records at once (limit=500)."
    return ProxyError("quota-exceeded", msg, retry_after=seconds)
