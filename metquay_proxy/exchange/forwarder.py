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
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from metquay_proxy.exchange.exchange import Response
from metquay_proxy.rules import retries
from metquay_proxy.rules.errors import ProxyError, Sent, UpstreamFailure
from metquay_proxy.rules.faults import CRLF
from metquay_proxy.rules.idempotency import MAX_ANSWER, Answer, Records, proves_nothing_was_executed, record_name
from metquay_proxy.rules.quota import QuotaExceeded, retry_after_seconds
from metquay_proxy.rules.renewal import Refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from metquay_proxy.exchange.body import RequestBody
    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.exchange.line import Line, PacedLine
    from metquay_proxy.exchange.tokens import TokenCache
    from metquay_proxy.rules.credentials import AccessToken
    from metquay_proxy.rules.quota import Ticket

T = TypeVar("T")

_UNAUTHORIZED: Final = 401
_TOO_MANY: Final = 429
_TEXT_LIMIT: Final = 4096
_MOST_WRITES: Final = 256
"""Targets of which the last write is known; to others a PUT or DELETE counts as overtaken, to be on the safe side."""


class Connection(Protocol):
    """A connection to Metquay, for one request."""

    def send(self, method: str, head: bytes, body: RequestBody) -> Response:
        """Send it; return its answer to come, which raises ``UpstreamFailure``."""


class Transport(Protocol):
    """The seam to the network: hands over connections that are open (TCP, CONNECT and TLS), to be used at once."""

    def take(self, method: str, now: float) -> Connection | None:
        """Return one that has idled and may carry such a request ``now``, if there is one."""

    async def open(self) -> Connection:
        """Return a new one; raise ``UpstreamFailure``."""


class Forwarder:
    """Sends requests with a live token, within the quota, again where that is safe."""

    def __init__(  # noqa: PLR0913 - the collaborators and the settings of one exchange
        self,
        transport: Transport,
        tokens: TokenCache,
        line: Line | PacedLine | None,
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
        self._max_wait = max_wait
        self._retries = retries
        self._records = Records() if records is None else records
        self._shared = records is not None
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._latest: dict[str, str] = {}
        """The id of the write that was forwarded last, to each of some targets."""
        self._refusals = Refusals()

    def forward(self, exchange: Exchange) -> Coroutine[Any, Any, Response]:
        """Return Metquay's answer; raise ``ProxyError`` where there is none to pass on."""
        once = exchange.method == "POST" and b"idempotency-key" in exchange.fields.judged
        if once and not exchange.target.pass_through:
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
            left: Sent = "unknown" if exchange.on_its_way else "no"
            exchange.note_sent(error.sent if isinstance(error, ProxyError) else left)
            executed = exchange.sent != "no"
            raise
        finally:
            await self._records.complete(claim, answer, self._clock(), executed=executed)
        return response

    async def _repeatedly(self, exchange: Exchange) -> Response:  # noqa: C901, PLR0912 - the steps of an attempt, in order
        """Send a request until it has an answer to pass on; raise ``ProxyError`` where there is none.

        A slot of the quota counts from the request's first byte until one window after the answer's head, or failure.
        Where no byte was sent (there was no connection, or the client left before), it comes back at once.
        """
        method, line, token, ticket = exchange.method, self._line, None, None
        fresh, now = False, self._clock()
        exchange.deadline = now + (exchange.fields.wait or self._max_wait)
        try:
            while True:
                if not exchange.target.pass_through:
                    token = self._tokens.current(now)
                    if token is None or token is exchange.rejected:
                        token = await self._token(exchange)
                        now = self._clock()
                    if line is not None:
                        ticket = line.ask(now, exchange.caller, exchange.deadline - now)
                        if ticket.state == "waiting":
                            token = await self._turn(line, ticket, exchange)
                            now = self._clock()
                began = time.perf_counter()
                try:
                    try:
                        if exchange.failed or method not in retries.READING:
                            self._begin(exchange)
                        exchange.attempts += 1
                        connection = None if fresh else self._transport.take(method, now)
                        if connection is None:
                            connection = await self._transport.open()
                        head = exchange.outgoing + (CRLF if token is None else token.authorization + CRLF)
                        response = exchange.response = connection.send(method, head, exchange.body)
                        if ticket is not None:
                            ticket.send()
                        while not response.begun:
                            await response.news()
                    finally:
                        exchange.upstream += time.perf_counter() - began
                        if line is not None and ticket is not None:
                            line.settle(ticket, self._clock())
                except UpstreamFailure as failure:
                    fresh, pause = True, self._pause_after_failure(exchange, failure)
                    if pause is None:
                        raise
                else:
                    if token is None or (response.head.status < _UNAUTHORIZED and not self._refusals.marks):
                        return response
                    pause = await self._pause_after_answer(exchange, response, token)
                    if pause is None:
                        return response
                exchange.response = None
                if pause:
                    await self._waiting(exchange, self._sleep(pause))
                now = self._clock()
        except BaseException as error:  # noqa: BLE001 - it goes on, unless the last attempt left something better
            return _end(exchange, self._quota_exceeded(exchange, error) if isinstance(error, QuotaExceeded) else error)

    async def _turn(self, line: Line | PacedLine, ticket: Ticket, exchange: Exchange) -> AccessToken:
        """Wait for the quota, and return a token: the wait may have outlived the one before."""
        try:
            exchange.deadline += await self._waiting(exchange, line.wait(ticket))
            return await self._token(exchange)
        except BaseException:
            line.settle(ticket, self._clock())
            raise

    async def _token(self, exchange: Exchange) -> AccessToken:
        patience, patient = exchange.deadline - self._clock(), exchange.fields.wait is not None
        wanted = self._tokens.get(patience, exchange.rejected, patient=patient)
        return await self._waiting(exchange, wanted)

    def _begin(self, exchange: Exchange) -> None:
        """Note that a write or a repeat is about to be sent; raise ``ProxyError`` where it would undo a newer write."""
        if not (exchange.method in retries.READING or exchange.target.pass_through):
            if exchange.failed and self._is_overtaken(exchange):
                raise ProxyError(
                    "outcome-unknown",
                    "This request failed and was not repeated, because another change to the same record may have "
                    "followed. Check in Metquay what is there now. Send this one again only if you still want it.",
                    sent=exchange.sent,
                )
            self._latest.pop(exchange.path, None)
            if len(self._latest) >= _MOST_WRITES:
                del self._latest[next(iter(self._latest))]
            self._latest[exchange.path] = exchange.id
        _drop(exchange)

    def _is_overtaken(self, exchange: Exchange) -> bool:
        """Whether another write to the same target was forwarded after this PUT or DELETE, as far as that is known."""
        return exchange.method in retries.OVERWRITING and self._latest.get(exchange.path) != exchange.id

    def _pause_after_failure(self, exchange: Exchange, failure: UpstreamFailure) -> float | None:
        """Return the seconds after which a request that got no answer is sent again; None where it is not."""
        if exchange.response is not None:
            exchange.response.close()
        exchange.note_sent(failure.sent)
        pause = retries.after_failure(exchange.method, failure, exchange.failed, self._jitter())
        return self._back_off(exchange, failure, pause)

    async def _pause_after_answer(self, exchange: Exchange, response: Response, token: AccessToken) -> float | None:
        """Return the same for a request that was answered."""
        status = response.head.status
        if status == _UNAUTHORIZED:
            return self._renew(exchange, response, token)
        if self._refusals.marks:
            self._refusals.taken(exchange.resource, token, self._clock())
        exchange.rejected = None
        if status == _TOO_MANY:
            return await self._close_window(exchange, response)
        if retries.may_have_deleted(exchange.method, status, exchange.sent):
            exchange.note = "repeated-after-unknown"
        asked = retry_after_seconds(response.head.headers, b"", time.time())
        pause = retries.after_status(exchange.method, status, exchange.failed, self._jitter(), asked)
        pause = self._back_off(exchange, response, pause)
        if pause is not None:
            exchange.note_sent("unknown")
        return pause

    def _renew(self, exchange: Exchange, response: Response, token: AccessToken) -> float | None:
        """Have another token made after a 401, which means that nothing was executed; None where none would help.

        Raises ``ProxyError`` retry-with-new-token where the request can't be sent again.
        """
        resource = exchange.resource
        before, exchange.rejected = exchange.rejected, token
        if before is not None:
            self._refusals.mark(resource, before)
        if before is not None or self._refusals.final(resource, token, self._clock()):
            exchange.hide_challenge = True
            return None
        response.close()
        self._tokens.reject(token)
        if not _is_repeatable(exchange):
            # the next token that it refuses is the second in a row
            self._refusals.mark(resource, token)
            raise ProxyError(
                "retry-with-new-token",
                "Metquay did not accept the token, so nothing was changed, and this body was not kept for a second "
                "attempt (METQUAY_REPLAY_LIMIT). The proxy is getting a new token: send the request again.",
                retry_after=self._tokens.state.next_login_in,
            )
        return 0.0

    async def _close_window(self, exchange: Exchange, response: Response) -> float:
        """After Metquay's own 429, which means that nothing was executed, the request goes back into the line.

        Returns the seconds to wait before that.

        Raises ``QuotaExceeded`` where it can't wait so long, or can't be sent again.
        """
        exchange.response = None
        asked = retry_after_seconds(response.head.headers, b"", time.time())
        if asked is None:
            with contextlib.suppress(ProxyError):  # it broke off in mid-text, and is a 429 all the same
                asked = retry_after_seconds((), await response.beginning(_TEXT_LIMIT), 0.0)
        response.close()
        if self._line is not None:
            self._line.close(asked)
            if not _is_repeatable(exchange):
                raise QuotaExceeded(self._line.snapshot().next_free_in)
            return 0.0
        pause = asked or 1.0
        if not _is_repeatable(exchange) or self._clock() + pause > exchange.deadline:
            raise QuotaExceeded(pause)
        return pause

    def _back_off(self, exchange: Exchange, ended: Response | ProxyError, pause: float | None) -> float | None:
        """Plan another attempt after a pause, and return that; None where there must be none.

        Of what other replicas write to the same target meanwhile nothing is known here.
        """
        if (
            pause is None
            or exchange.failed == self._retries
            or self._is_overtaken(exchange)
            or (self._shared and exchange.method in retries.OVERWRITING and getattr(ended, "sent", "unknown") != "no")
            or not _is_repeatable(exchange)
            or self._clock() + pause > exchange.deadline
        ):
            return None
        exchange.failed += 1
        exchange.fallback = ended
        return pause

    async def _waiting(self, exchange: Exchange, what: Coroutine[Any, Any, T]) -> T:
        """Await something while the client's body is read ahead, and count the time."""
        began = self._clock()
        try:
            return await (what if exchange.body.ended else _beside(what, exchange.body.prefetch()))
        finally:
            exchange.waited += self._clock() - began

    def _quota_exceeded(self, exchange: Exchange, refusal: QuotaExceeded) -> ProxyError:
        why = (
            "Metquay answered that its limit is reached (429); another program may be using the same keys."
            if self._line is None or self._line.snapshot().closed_for > 0
            else "Its turn would come too late: the quota is spread over the time. Ask for more at once (limit=500)."
        )
        wait = max(1, math.ceil(refusal.retry_after))
        cure = "An earlier attempt may have been carried out: check in Metquay before you send it again."
        if exchange.sent == "no" or exchange.method in retries.READING:
            cure = f"Nothing was changed. Send it again in {wait} s, or let it wait with the header Prefer: wait=120."
        return ProxyError("quota-exceeded", f"{why} {cure}", retry_after=refusal.retry_after)


def _is_repeatable(exchange: Exchange) -> bool:
    """Whether it may be sent again, there is somebody to do it for, and a body to send."""
    return exchange.body.replayable and not (exchange.client_left or exchange.target.pass_through)


def _end(exchange: Exchange, error: BaseException) -> Response:
    """No other attempt is made: pass on what the last one ended in, else raise why; when cancelled, only that."""
    ended = exchange.fallback if isinstance(error, ProxyError) else None
    try:
        if isinstance(ended, Response):
            return ended
        _drop(exchange)
        raise ended or error
    finally:
        del ended, error  # a traceback would keep them, and they the traceback, until somebody collects garbage


def _drop(exchange: Exchange) -> None:
    """Forget what the last attempt ended in."""
    if isinstance(exchange.fallback, Response):
        exchange.fallback.close()
    exchange.fallback = None


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
