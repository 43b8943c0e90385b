"""One exchange with Metquay: token, quota, send, and what is sent again.

Owns the order of these, and the one budget of waiting that a request has. Must not know sockets (the transport's) or
the client's connection (the handler's); what may be repeated, ``retries`` says.

Facts: RFC 9110 section 10.2.3 (Retry-After), 11.6.1 (WWW-Authenticate makes tools ask for a password).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from weakref import WeakValueDictionary

from metquay_proxy.exchange.exchange import Response
from metquay_proxy.rules import retries
from metquay_proxy.rules.errors import ProxyError, Sent, UpstreamFailure
from metquay_proxy.rules.idempotency import MAX_ANSWER, Answer, Records, proves_nothing_was_executed, record_name
from metquay_proxy.rules.quota import QuotaExceeded, retry_after_seconds
from metquay_proxy.rules.renewal import Refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from metquay_proxy.exchange.body import RequestBody
    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.exchange.line import Line
    from metquay_proxy.exchange.tokens import TokenCache
    from metquay_proxy.rules.credentials import AccessToken
    from metquay_proxy.rules.quota import Ticket
    from metquay_proxy.rules.target import BaseURL

T = TypeVar("T")

_UNAUTHORIZED: Final = 401
_TOO_MANY: Final = 429
_TEXT_LIMIT: Final = 4096


class Transport(Protocol):
    """The seam to the network: sends one request, returns one response."""

    async def send(
        self, method: str, head: bytes, body: RequestBody, *, fresh: bool = False, on_sent: Callable[[], object] = int
    ) -> Response:
        """Send a request and wait for the head of its answer; raise ``UpstreamFailure``.

        ``fresh``: on a new connection. ``on_sent`` is called when the first byte has been handed to a connection that
        is finished.
        """


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
        sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """``max_wait`` is in seconds; ``line`` is None where the quota is off, ``records`` where nobody shares them.

        ``retries`` counts further attempts; ``jitter`` yields 0 <= x < 1.
        """
        self._transport = transport
        self._tokens = tokens
        self._line = line
        self._host = base.authority.encode()
        self._max_wait = max_wait
        self._retries = retries
        self._records = Records() if records is None else records
        self._shared = records is not None
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._writes: WeakValueDictionary[str, _Writes] = WeakValueDictionary()
        self._refusals = Refusals()

    def forward(self, exchange: Exchange) -> Coroutine[Any, Any, Response]:
        """Return Metquay's answer; raise ``ProxyError`` where there is none to pass on."""
        if exchange.target.pass_through:
            return self._send(_Attempts(exchange), None, None)
        if exchange.method == "POST" and b"idempotency-key" in exchange.fields.judged:
            return self._once(exchange)
        return self._repeatedly(exchange)

    async def _once(self, exchange: Exchange) -> Response:
        """Forward a POST with an Idempotency-Key, or return what the first one with it was answered."""
        body = exchange.body
        name = record_name(exchange.admission.scope, exchange.target.sent, exchange.fields.text(b"idempotency-key"))
        await body.keep()
        digest = hashlib.sha256(body.whole() or b"").digest()
        claim = await self._records.claim(name, digest, self._clock())
        if isinstance(claim, Answer):
            exchange.replayed = True
            replayed = Response.of(claim.body or b"")
            replayed.begin(claim.head)
            return replayed
        answer: Answer | None = None
        try:
            response = await self._repeatedly(exchange)
            head = response.head
            executed = not proves_nothing_was_executed(head.status)
            if 200 <= head.status <= 299:  # noqa: PLR2004 - RFC 9110 section 15.3, the successful class
                exchange.note_sent("yes")
                answer = Answer(head, None)
                answer.body = await response.beginning(MAX_ANSWER)
                response.unread(answer.body)
        except BaseException as error:
            left: Sent = "unknown" if body.sent else "no"
            exchange.note_sent(error.sent if isinstance(error, ProxyError) else left)
            executed = exchange.sent != "no"
            raise
        finally:
            await self._records.complete(claim, answer, self._clock(), executed=executed)
        return response

    async def _repeatedly(self, exchange: Exchange) -> Response:  # noqa: C901 - each step of an attempt, in order
        """Send a request until it has an answer to pass on; raise ``ProxyError`` where there is none."""
        now = self._clock()
        attempts = _Attempts(exchange, now + self._max_wait)
        if exchange.method not in retries.READING:
            attempts.writes = self._writes.setdefault(exchange.target.sent, _Writes())
        try:
            while True:
                token = self._tokens.current(now)
                if token is None or token is attempts.rejected:
                    token = await self._token(attempts)
                    now = self._clock()
                ticket = None
                if self._line is not None:
                    ticket = self._line.ask(exchange.caller, attempts.deadline, now)
                    if not ticket.granted:
                        token = await self._turn(self._line, ticket, attempts)
                try:
                    response = await self._send(attempts, token, ticket)
                except UpstreamFailure as failure:
                    if not self._repeats_after_failure(attempts, failure):
                        raise
                else:
                    status = response.head.status
                    if self._refusals.marks and status != _UNAUTHORIZED:
                        self._refusals.taken(exchange.resource, token, self._clock())
                    if status < _UNAUTHORIZED or not await self._repeats_after_answer(attempts, response, token):
                        return response
                exchange.body.sent = False
                if attempts.wait:
                    await self._waiting(exchange, self._sleep(attempts.wait))
                    attempts.wait = 0.0
                now = self._clock()
        except BaseException as error:  # noqa: BLE001 - it goes on, unless the last attempt left something better
            return attempts.end(self._quota_exceeded(error) if isinstance(error, QuotaExceeded) else error)

    async def _turn(self, line: Line, ticket: Ticket, attempts: _Attempts) -> AccessToken:
        """Wait for the quota, and return a token: the wait may have outlived the one before."""
        try:
            await self._waiting(attempts.exchange, line.wait(ticket))
            return await self._token(attempts)
        except BaseException:
            line.give_back(ticket)
            raise

    async def _token(self, attempts: _Attempts) -> AccessToken:
        wanted = self._tokens.get(attempts.deadline - self._clock(), attempts.rejected)
        return await self._waiting(attempts.exchange, wanted)

    async def _send(self, attempts: _Attempts, token: AccessToken | None, ticket: Ticket | None) -> Response:
        """Send one attempt; its slot counts from its first byte until one window after the answer's head, or failure.

        Where no byte was sent (there was no connection, or the client left before), the slot comes back at once.
        """
        exchange, line = attempts.exchange, self._line
        on_sent = int if ticket is None else ticket.send
        began = time.perf_counter()
        try:
            if attempts.writes is not None or attempts.failed:
                attempts.begin()
            exchange.attempts += 1
            method, body = exchange.method, exchange.body
            head = exchange.fields.outbound(
                method,
                exchange.target.sent,
                host=self._host,
                authorization=None if token is None else token.authorization,
                chunked=body.chunked,
                read_only=exchange.admission.read_only,
                keep_authorization=exchange.keep_authorization,
            )
            return await self._transport.send(method, head, body, fresh=attempts.fresh, on_sent=on_sent)
        finally:
            exchange.upstream += time.perf_counter() - began
            if line is not None and ticket is not None:
                (line.answered if ticket.state == "sent" else line.give_back)(ticket)

    def _repeats_after_failure(self, attempts: _Attempts, failure: UpstreamFailure) -> bool:
        """Decide whether a request that got no answer is sent again, and prepare for it."""
        exchange = attempts.exchange
        exchange.note_sent(failure.sent)
        attempts.fresh = True
        pause = retries.after_failure(exchange.method, failure, attempts.failed, self._jitter())
        return self._back_off(attempts, failure, pause)

    async def _repeats_after_answer(self, attempts: _Attempts, response: Response, token: AccessToken) -> bool:
        """Decide whether a request that was answered is sent again, and prepare for it."""
        exchange, status = attempts.exchange, response.head.status
        if status == _UNAUTHORIZED:
            return self._renew(attempts, response, token)
        attempts.rejected = None
        if status == _TOO_MANY:
            await self._close_window(attempts, response)
            return True
        if retries.may_have_deleted(exchange.method, status, exchange.sent):
            exchange.note = "repeated-after-unknown"
        asked = retry_after_seconds(response.head.headers, b"", time.time())
        pause = retries.after_status(exchange.method, status, attempts.failed, self._jitter(), asked)
        if not self._back_off(attempts, response, pause):
            return False
        exchange.note_sent("unknown")
        return True

    def _renew(self, attempts: _Attempts, response: Response, token: AccessToken) -> bool:
        """Have another token made after a 401, which means that nothing was executed; False where none would help.

        Raises ``ProxyError`` retry-with-new-token where the request can't be sent again.
        """
        resource = attempts.exchange.resource
        before, attempts.rejected = attempts.rejected, token
        if before is not None:
            self._refusals.mark(resource, before)
        if before is not None or self._refusals.final(resource, token, self._clock()):
            attempts.exchange.hide_challenge = True
            return False
        response.close()
        self._tokens.reject(token)
        if not attempts.repeatable:
            # the next token that it refuses is the second in a row
            self._refusals.mark(resource, token)
            raise ProxyError(
                "retry-with-new-token",
                "Metquay did not accept the token, so that nothing was changed, and this body was not kept for a "
                "second attempt (METQUAY_REPLAY_LIMIT). The proxy is getting a new token: send the request again.",
                retry_after=self._tokens.state.next_login_in,
            )
        return True

    async def _close_window(self, attempts: _Attempts, response: Response) -> None:
        """After Metquay's own 429, which means that nothing was executed, the request goes back into the line.

        Raises ``QuotaExceeded`` where it can't wait so long, or can't be sent again.
        """
        attempts.exchange.body.sent = False
        asked = retry_after_seconds(response.head.headers, b"", time.time())
        if asked is None:
            with contextlib.suppress(ProxyError):  # it broke off in mid-text, and is a 429 all the same
                asked = retry_after_seconds((), await response.beginning(_TEXT_LIMIT), 0.0)
        response.close()
        if self._line is not None:
            self._line.close(asked)
            if not attempts.repeatable:
                raise QuotaExceeded(self._line.snapshot().next_free_in)
            return
        attempts.wait = asked or 1.0
        if not attempts.repeatable or self._clock() + attempts.wait > attempts.deadline:
            raise QuotaExceeded(attempts.wait)

    def _back_off(self, attempts: _Attempts, ended: Response | ProxyError, pause: float | None) -> bool:
        """Plan another attempt after a pause; False where there must be none.

        Of what other replicas write to the same target meanwhile nothing is known here.
        """
        if (
            pause is None
            or attempts.failed == self._retries
            or attempts.overtaken
            or (self._shared and attempts.overwriting and getattr(ended, "sent", "unknown") != "no")
            or not attempts.repeatable
            or self._clock() + pause > attempts.deadline
        ):
            return False
        attempts.failed += 1
        attempts.wait, attempts.ended = pause, ended
        return True

    async def _waiting(self, exchange: Exchange, what: Coroutine[Any, Any, T]) -> T:
        """Await something while the client's body is read ahead, and count the time."""
        began = self._clock()
        try:
            return await (what if exchange.body.ended else _beside(what, exchange.body.prefetch()))
        finally:
            exchange.waited += self._clock() - began

    def _quota_exceeded(self, refusal: QuotaExceeded) -> ProxyError:
        why = (
            "Metquay says that its limit is reached (429); something else may use it too."
            if self._line is None or self._line.snapshot().closed_for > 0
            else "More is asked for than Metquay grants this key pair."
        )
        wait = max(1, math.ceil(refusal.retry_after))
        msg = f"{why} Nothing was changed. Send it again in {wait} s, or ask for more records at once (limit=500)."
        return ProxyError("quota-exceeded", msg, retry_after=refusal.retry_after)


class _Writes:
    """The writes under way on one target; it lives as long as any of them."""

    last: Exchange
    """The one that was forwarded last."""


@dataclass(slots=True, eq=False)
class _Attempts:
    """The attempts of one request: how long it may wait in all, and what is known of those that were made."""

    exchange: Exchange
    deadline: float = 0.0
    """In seconds of the forwarder's clock."""
    writes: _Writes | None = None
    failed: int = 0
    """How many had an unclear end, after which another one was planned."""
    ended: Response | ProxyError | None = None
    """That of the last one, to be passed on if the other one can't be made,"""
    wait: float = 0.0
    """which is to be in so many seconds."""
    fresh: bool = False
    rejected: AccessToken | None = None
    """The token of the last one, if it was answered with 401: another one is waited for."""

    @property
    def repeatable(self) -> bool:
        """Whether there is still somebody to repeat it for, and a body to send."""
        return self.exchange.body.replayable and not self.exchange.client_left

    @property
    def overwriting(self) -> bool:
        """Whether it takes the place of what an earlier write left: a PUT or DELETE."""
        return self.exchange.method in retries.OVERWRITING

    @property
    def overtaken(self) -> bool:
        """Whether another write to the same target was forwarded after this PUT or DELETE."""
        return self.writes is not None and self.overwriting and self.writes.last is not self.exchange

    def begin(self) -> None:
        """Note that a write or a repeat is about to be sent; raise ``ProxyError`` where it would undo a newer write."""
        if self.writes is not None:
            if self.failed and self.overtaken:
                raise ProxyError(
                    "outcome-unknown",
                    "This request is not sent again, since another one that changes the same record was sent after it: "
                    "look in Metquay whether it was executed, and send it again if it was not.",
                    sent=self.exchange.sent,
                )
            self.writes.last = self.exchange
        self.drop()

    def end(self, error: BaseException) -> Response:
        """No other attempt is made: pass on what the last one ended in, else raise why; when cancelled, only that."""
        ended = self.ended if isinstance(error, ProxyError) else None
        try:
            if isinstance(ended, Response):
                return ended
            self.drop()
            raise ended or error
        finally:
            del ended, error  # a traceback would keep them, and they the traceback, until somebody collects garbage

    def drop(self) -> None:
        """Forget what the last attempt ended in."""
        if isinstance(self.ended, Response):
            self.ended.close()
        self.ended = None


async def _beside(what: Coroutine[Any, Any, T], reading: Coroutine[Any, Any, None]) -> T:
    """Await ``what``; a failure of ``reading`` (the client broke its body) ends it early."""
    try:
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(reading)
            result = await what
            reader.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return result
