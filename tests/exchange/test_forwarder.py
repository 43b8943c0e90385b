from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, Self, cast

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.streams import StreamReader

from metquay_proxy.exchange.body import ReplayBudget, RequestBody
from metquay_proxy.exchange.exchange import Exchange
from metquay_proxy.exchange.forwarder import Forwarder, Request
from metquay_proxy.exchange.line import Line
from metquay_proxy.exchange.tokens import AccessToken, LoginFailed, TokenCache
from metquay_proxy.rules.errors import ProxyError, UpstreamFailure
from metquay_proxy.rules.headers import RequestHead
from metquay_proxy.rules.http1 import ResponseHead
from metquay_proxy.rules.idempotency import MAX_ANSWER
from metquay_proxy.rules.quota import Quota
from metquay_proxy.rules.target import BaseURL, Target
from metquay_proxy.sandbox.server import Faults, Sandbox
from tests.fake_time import FakeTime
from tests.running import FastTime, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from metquay_proxy.exchange.forwarder import Response

READS = ("GET", "HEAD", "OPTIONS")
IDEMPOTENT = (*READS, "PUT", "DELETE")
METHODS = (*IDEMPOTENT, "POST", "PATCH")
LIMIT = 1024
"""The replay limit of these tests, in bytes."""


def unreachable() -> UpstreamFailure:
    """No connection could be made."""
    return UpstreamFailure("upstream-unreachable", "-", repeatable=True)


def reset(*, stale: bool = False) -> UpstreamFailure:
    """The connection broke before any answer; nobody knows whether the request was executed."""
    return UpstreamFailure("upstream-closed", "-", sent="unknown", repeatable=True, stale=stale)


def silence() -> UpstreamFailure:
    """Our own time-out."""
    return UpstreamFailure("upstream-timeout", "-", sent="unknown")


class Reply:
    """An answer of the made-up upstream, arriving in ``pieces``; an error among them breaks it off."""

    def __init__(self, status: int, *pieces: bytes | ProxyError, **fields: str) -> None:
        headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
        self.head = ResponseHead.made(status, b"Reason", headers, None)
        self._pieces = list(pieces)
        self.closed = False

    def again(self) -> Reply:
        """Return the same answer, unread."""
        reply = copy.copy(self)
        reply._pieces = [*self._pieces]
        return reply

    @property
    def ended(self) -> bool:
        """Whether the whole body was read."""
        return not self._pieces

    def read_nowait(self) -> bytes:
        """Return nothing: every piece has to be waited for."""
        return b""

    async def read(self) -> bytes:
        """Return the next piece, or raise it."""
        assert not self.closed, "a closed answer is read"
        if not self._pieces:
            return b""
        piece = self._pieces.pop(0)
        if isinstance(piece, ProxyError):
            raise piece
        return piece

    def close(self) -> None:
        """Give up the rest."""
        self.closed = True


@dataclass
class Sent:
    """One attempt as the upstream saw it."""

    at: float
    method: str
    head: bytes
    body: bytes
    fresh: bool

    @property
    def bearer(self) -> str:
        """The token that was presented."""
        return self.head.partition(b"Authorization: Bearer ")[2].partition(b"\r\n")[0].decode()


class Upstream:
    """A transport without a network. ``outcomes`` are taken in turn, the last one for ever; each takes ``lasts`` s."""

    def __init__(self, time: FakeTime) -> None:
        self._time = time
        self._began = time.now()
        self.outcomes: list[Reply | UpstreamFailure | int | Callable[[Sent], int]] = [200]
        self.lasts = 0.0
        self.sent: list[Sent] = []
        self.replies: list[Reply] = []

    async def send(
        self, method: str, head: bytes, body: RequestBody, *, fresh: bool = False, on_sent: Callable[[], object] = int
    ) -> Response:
        """Play the next outcome; what can't be reached takes its time before anything is sent."""
        body.sent = False
        attempt = Sent(self._time.now() - self._began, method, head, b"", fresh)
        self.sent.append(attempt)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if not (isinstance(outcome, UpstreamFailure) and outcome.slug == "upstream-unreachable"):
            attempt.body = b"".join([chunk async for chunk in body.chunks()])
            body.sent = True
            on_sent()
        if self.lasts:
            await self._time.sleep(self.lasts)
        if isinstance(outcome, UpstreamFailure):
            raise outcome.with_traceback(None)
        if callable(outcome):
            outcome = outcome(attempt)
        reply = Reply(outcome) if isinstance(outcome, int) else outcome.again()
        self.replies.append(reply)
        return reply

    @property
    def times(self) -> list[float]:
        """When each attempt was sent, in seconds since the start."""
        return [round(attempt.at, 3) for attempt in self.sent]


class Source:
    """Grants tokens T1, T2, ... while it is not broken; each login takes ``lasts`` seconds."""

    def __init__(self, time: FakeTime) -> None:
        self._time = time
        self.broken = False
        self.lasts = 0.0
        self.lifetime = 900.0
        self.logins = 0

    async def token(self) -> AccessToken:
        """Log in."""
        self.logins += 1
        now = self._time.now()
        if self.lasts:
            await self._time.sleep(self.lasts)
        if self.broken:
            raise LoginFailed("Metquay is down.")
        return AccessToken(f"T{self.logins}", now, self.lifetime)


@dataclass
class Asked:
    """One request under way: its task, and what the server would see of it."""

    task: asyncio.Task[Response]
    exchange: Exchange
    body: RequestBody
    client: StreamReader

    @property
    def outcome(self) -> tuple[int | str, int, str]:
        """Status or slug, attempts, and whether it may have been executed."""
        error = self.task.exception()
        if error is None:
            return self.task.result().head.status, self.exchange.attempts, self.exchange.sent
        assert isinstance(error, ProxyError)
        self.exchange.note_sent(error.sent)
        return error.slug, self.exchange.attempts, self.exchange.sent


@dataclass
class Rig:
    """A forwarder with everything around it made up, and time that moves when told."""

    quota: Quota | None = None
    retries: int = 2
    max_wait: float = 20.0
    jitter: float = 1.0
    time: FakeTime = field(default_factory=FakeTime)
    timers: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        """Begin with a token."""
        self.upstream = Upstream(self.time)
        self.source = Source(self.time)
        self.tokens = TokenCache(self.source, clock=self.time.now, sleep=self.time.sleep, random=lambda: 0.0)
        self.line = None if self.quota is None else Line(self.quota, self.time.now, self._call_later)
        self.forwarder = Forwarder(
            self.upstream,
            self.tokens,
            self.line,
            BaseURL.parse("lab.metquay.co"),
            max_wait=self.max_wait,
            retries=self.retries,
            clock=self.time.now,
            replay_limit=LIMIT,
            sleep=self.time.sleep,
            jitter=lambda: self.jitter,
        )
        self.replays = ReplayBudget(1 << 20)
        self.tokens.start()
        await self.time.settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Look that nothing is left behind."""
        await self.tokens.close()
        for timer in self.timers:
            timer.cancel()
        await asyncio.gather(*self.timers, return_exceptions=True)
        assert {asyncio.current_task()} == asyncio.all_tasks(), "no task outlives its request"
        assert not self.forwarder._writes, "no write is remembered for ever"
        if self.quota is not None:
            assert 0 == self.quota.snapshot(self.time.now()).in_flight, "every slot is answered or given back"

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        async def ring() -> None:
            await self.time.sleep(seconds)
            callback()

        self.timers.append(asyncio.ensure_future(ring()))
        return cast("asyncio.TimerHandle", self.timers[-1])

    def ask(  # noqa: PLR0913 - what a request is made of
        self,
        method: str = "GET",
        path: str = "/customers",
        body: bytes = b"",
        *,
        whole: bool = True,
        caller: str = "tool",
        client: str | None = None,
        key: str | None = None,
        pass_through: bool = False,
    ) -> Asked:
        """Begin a request; the client has not ended its body yet unless it is ``whole``."""
        connection = BaseProtocol(asyncio.get_running_loop())
        connection.connection_made(asyncio.Transport())
        source = StreamReader(connection, 1 << 16, loop=asyncio.get_running_loop())
        present = bool(body) or not whole
        if body:
            source.feed_data(body)
        if whole:
            source.feed_eof()
        fields = [(b"Host", b"localhost")] + ([] if key is None else [(b"Idempotency-Key", key.encode())])
        kept = RequestBody(source, present=present, chunked=False, limit=LIMIT, budget=self.replays, timeout=60.0)
        exchange = Exchange(method, path)
        exchange.client = client
        request = Request(
            method,
            Target("/api/v1" + path, path.partition("?")[0], None, pass_through=pass_through),
            RequestHead(fields),
            kept,
            caller,
            scope=client,
        )
        task = asyncio.ensure_future(self.forwarder.forward(request, exchange))
        return Asked(task, exchange, kept, source)

    async def run(self, asked: Asked, seconds: float = 100.0) -> Asked:
        """Let time pass until the request has come to its end."""
        async with asyncio.timeout(10):
            await self.time.settle()
            until = self.time.now() + seconds
            while not asked.task.done():
                assert self.time.now() < until, "the request never ends"
                await self.time.advance(0.125)
        asked.body.close()
        return asked

    async def answer(self, *args: Any, **kwargs: Any) -> tuple[int | str, int, str]:  # noqa: ANN401 - those of ask
        """Make one request, and return its outcome."""
        return (await self.run(self.ask(*args, **kwargs))).outcome

    def error(self, asked: Asked) -> ProxyError:
        """Return the error that the request ended in."""
        error = asked.task.exception()
        assert isinstance(error, ProxyError)
        return error


async def text(response: Response) -> bytes:
    """Read an answer to its end, as the server does."""
    data = response.read_nowait()
    while not response.ended:
        data += await response.read()
    return data


def busy(status: int, **fields: str) -> Reply:
    """An error of the upstream's own."""
    return Reply(status, b"<html>", b"later</html>", Server="Tomcat", **fields)


# What may be sent again


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("failure", "repeated", "outcome", "sent"),
    [
        (unreachable(), METHODS, "upstream-unreachable", "no"),
        (UpstreamFailure("upstream-tls", "-", repeatable=True), METHODS, "upstream-tls", "no"),
        (UpstreamFailure("upstream-tls", "a bad certificate"), (), "upstream-tls", "no"),
        (reset(), IDEMPOTENT, "upstream-closed", "unknown"),
        (reset(stale=True), IDEMPOTENT, "upstream-closed", "unknown"),
        (UpstreamFailure("upstream-closed", "-", repeatable=True), IDEMPOTENT, "upstream-closed", "no"),
        (UpstreamFailure("upstream-protocol", "-", sent="unknown"), (), "upstream-protocol", "unknown"),
        (silence(), (), "upstream-timeout", "unknown"),
    ],
    ids=["unreachable", "tls", "certificate", "reset", "stale", "never written", "protocol", "silence"],
)
async def test_failures(
    method: str, failure: UpstreamFailure, repeated: tuple[str, ...], outcome: str, sent: str
) -> None:
    """What got no answer is sent again by method and by what is known of the attempt; sent and attempts say it."""
    async with Rig() as rig:
        rig.upstream.outcomes = [failure]
        assert (outcome, 3 if method in repeated else 1, sent) == await rig.answer(method)
        rig.upstream.outcomes = [failure, 200]
        assert method not in repeated or (200, 2, sent) == await rig.answer(method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status", [400, 403, 404, 409, 422, 500, 501, 502, 503, 504, 505])
async def test_error_answers(method: str, status: int) -> None:
    """The upstream's own 502, 503, 504 are repeated for idempotent methods; what stays is passed on as it came."""
    async with Rig() as rig:
        rig.upstream.outcomes = [busy(status)]
        repeated = method in IDEMPOTENT and status in {502, 503, 504}
        asked = await rig.run(rig.ask(method))
        assert (status, 3 if repeated else 1, "unknown" if repeated else "no") == asked.outcome
        assert b"<html>later</html>" == await text(asked.task.result())
        assert [True, True, False][-len(rig.upstream.replies) :] == [reply.closed for reply in rig.upstream.replies]


async def test_a_repeat_carries_the_same_request() -> None:
    """Each attempt sends the whole body and the same head, after a failure on a new connection."""
    async with Rig() as rig:
        rig.upstream.outcomes = [reset(), busy(503), 200]
        assert (200, 3, "unknown") == await rig.answer("PUT", body=b"x" * LIMIT)
        assert [b"x" * LIMIT] * 3 == [sent.body for sent in rig.upstream.sent]
        assert 1 == len({sent.head for sent in rig.upstream.sent})
        assert [False, True, True] == [sent.fresh for sent in rig.upstream.sent]


@pytest.mark.parametrize(
    ("retries", "times"), [(0, [0]), (1, [0, 0.25]), (6, [0, 0.25, 0.75, 1.75, 3.75, 7.75, 11.75])]
)
async def test_backoff(retries: int, times: list[float]) -> None:
    """There are METQUAY_RETRIES further attempts, each after twice the time, up to four seconds."""
    async with Rig(retries=retries) as rig:
        rig.upstream.outcomes = [reset()]
        asked = await rig.run(rig.ask())
        assert times == rig.upstream.times
        assert times[-1] == asked.exchange.waited


async def test_backoff_is_jittered() -> None:
    """The shortest pause is half of the longest, so that tools that failed together do not come back together."""
    async with Rig(jitter=0.0) as rig:
        rig.upstream.outcomes = [reset()]
        await rig.answer()
        assert [0, 0.125, 0.375] == rig.upstream.times


async def test_a_stale_connection() -> None:
    """What broke on a pooled connection goes out again at once on a new one, as one of the further attempts."""
    async with Rig() as rig:
        rig.upstream.outcomes = [reset(stale=True), 200]
        assert (200, 2, "unknown") == await rig.answer()
        assert [0, 0] == rig.upstream.times
        assert [False, True] == [sent.fresh for sent in rig.upstream.sent]
    async with Rig(retries=0) as rig:
        rig.upstream.outcomes = [reset(stale=True), 200]
        assert ("upstream-closed", 1, "unknown") == await rig.answer()


@pytest.mark.parametrize(
    ("asked", "at"),
    [
        ("7", 7),
        ("0", 1),
        (format_datetime(datetime.now(UTC) + timedelta(hours=-1), usegmt=True), 1),
        ("soon", 0.25),
    ],
)
async def test_retry_after_is_honoured(asked: str, at: float) -> None:
    """A 503 that says when to come back is asked again then, not sooner."""
    async with Rig() as rig:
        rig.upstream.outcomes = [busy(503, Retry_After=asked), 200]
        assert (200, 2, "unknown") == await rig.answer()
        assert [0, at] == rig.upstream.times


async def test_a_date_in_retry_after() -> None:
    """Retry-After may be a date."""
    async with Rig() as rig:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)
        rig.upstream.outcomes = [busy(503, Retry_After=date), 200]
        assert 200 == (await rig.answer())[0]
        assert 8 < rig.upstream.times[1] <= 10


@pytest.mark.parametrize(
    ("lasts", "max_wait", "times"),
    [
        (9, 20, [0, 9.25, 18.75]),
        (12, 20, [0, 12.25]),
        (20, 20, [0]),
        (0, 0.5, [0, 0.25]),
        (0, 0.75, [0, 0.25, 0.75]),
        (0, 0, [0]),
    ],
)
async def test_one_budget(lasts: float, max_wait: float, times: list[float]) -> None:
    """Failed attempts and pauses are paid from one MAX_WAIT: what would begin after its end is not begun."""
    async with Rig(max_wait=max_wait) as rig:
        rig.upstream.outcomes, rig.upstream.lasts = [reset()], lasts
        assert ("upstream-closed", len(times), "unknown") == await rig.answer()
        assert times == rig.upstream.times


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize(
    "fields",
    [
        {"Retry_After": "3"},
        {"Date": "Sat, 28 Nov 2026 05:00:00 GMT", "Retry_After": "Sat, 28 Nov 2026 05:00:03 GMT"},
    ],
)
async def test_a_retry_after(method: str, status: int, fields: dict[str, str]) -> None:
    """Each of the upstream's own errors that are repeated may say when; a date is one of its own clock."""
    async with Rig() as rig:
        rig.upstream.outcomes = [busy(status, **fields), 200]
        assert (200, 2, "unknown") == await rig.answer(method)
        assert [0, 3] == rig.upstream.times


async def test_a_retry_after_beyond_the_budget() -> None:
    """A 503 that asks for more time than there is is passed on at once."""
    async with Rig() as rig:
        rig.upstream.outcomes = [busy(503, Retry_After="21")]
        assert (503, 1, "no") == await rig.answer()
        assert 1000 == rig.time.now()


async def test_the_attempt_that_runs_is_not_counted() -> None:
    """An answer may take as long as it likes."""
    async with Rig() as rig:
        rig.upstream.lasts = 90
        assert (200, 1, "no") == await rig.answer()


async def test_waiting_is_counted() -> None:
    """Waiting for the token is paid from the same budget as backing off, and is told."""
    async with Rig(max_wait=5.0) as rig:
        rig.time.jump(900)
        rig.source.lasts = 4.9
        rig.upstream.outcomes = [reset()]
        asked = await rig.run(rig.ask())
        assert ("upstream-closed", 1, "unknown") == asked.outcome
        assert 4.9 == pytest.approx(asked.exchange.waited)


@pytest.mark.parametrize("failure", [reset(), busy(503)])
@pytest.mark.parametrize(("method", "note"), [("DELETE", "repeated-after-unknown"), ("PUT", None)])
async def test_the_404_of_a_repeated_delete(failure: Reply | UpstreamFailure, method: str, note: str | None) -> None:
    """A DELETE that finds nothing after an unclear first attempt says so."""
    async with Rig() as rig:
        rig.upstream.outcomes = [failure, 404]
        asked = await rig.run(rig.ask(method))
        assert (404, 2, "unknown") == asked.outcome
        assert note == asked.exchange.note


@pytest.mark.parametrize("outcomes", [[404], [unreachable(), 404], [401, 404]])
async def test_the_404_of_a_first_delete(outcomes: list[Reply | UpstreamFailure | int]) -> None:
    """Where no attempt before it can have been executed, a 404 is a 404."""
    async with Rig() as rig:
        rig.upstream.outcomes = [*outcomes]
        asked = await rig.run(rig.ask("DELETE"))
        assert 404 == asked.outcome[0]
        assert asked.exchange.note is None


# Bodies


@pytest.mark.parametrize("failure", [reset(), busy(503), 401, Reply(429, b"in 3 seconds")])
async def test_a_large_body_is_not_replayed(failure: Reply | UpstreamFailure | int) -> None:
    """A body beyond the replay limit streams; what fails after it was read is not sent again."""
    async with Rig() as rig:
        rig.upstream.outcomes = [failure, 200]
        status, attempts, _ = await rig.answer("PUT", body=b"x" * (LIMIT + 1))
        assert 1 == attempts
        assert status in {"upstream-closed", 503, "retry-with-new-token", "quota-exceeded"}


async def test_a_large_body_waits_for_a_connection() -> None:
    """A large body that nobody has read yet goes out whole once there is a connection."""
    async with Rig() as rig:
        rig.upstream.outcomes = [unreachable(), unreachable(), 201]
        assert (201, 3, "no") == await rig.answer("POST", body=b"x" * 5 * LIMIT)
        assert 5 * LIMIT == len(rig.upstream.sent[-1].body)


@pytest.mark.parametrize(("pieces", "unread"), [((9, 9), 0), ((LIMIT, 9), 9), ((9, LIMIT, 9), 9)])
async def test_the_body_is_read_ahead_while_waiting(pieces: tuple[int, ...], unread: int) -> None:
    """While a request waits, its body is read up to the limit and no further; the rest follows when it goes out."""
    async with Rig() as rig:
        rig.upstream.outcomes = [unreachable(), 200]
        asked = rig.ask("POST", whole=False)
        for size in pieces:
            await rig.time.settle()
            asked.client.feed_data(b"x" * size)
        await rig.time.settle()
        assert unread == asked.client._size
        await rig.time.advance(0.25)
        asked.client.feed_eof()
        assert (200, 2, "no") == (await rig.run(asked)).outcome
        assert sum(pieces) == len(rig.upstream.sent[-1].body)


@pytest.mark.parametrize("waits_for", ["token", "quota", "backoff"])
async def test_a_client_that_breaks_its_body_ends_the_wait(waits_for: str) -> None:
    """A client that leaves in mid-body while its request waits ends it at once: nothing is sent, its place is free."""
    async with Rig(Quota(1, 60.0, burst=1.0)) as rig:
        await rig.answer(path="/first")
        if waits_for != "quota":
            await rig.time.advance(61)
        if waits_for == "token":
            rig.source.lasts = 50
            rig.time.jump(900)
        rig.upstream.outcomes = [unreachable()] if waits_for == "backoff" else [200]
        rig.max_wait = 100
        rig.forwarder._max_wait = 100
        asked = rig.ask("POST", body=b"x", whole=False)
        await rig.time.settle()
        assert not asked.task.done()
        attempts = len(rig.upstream.sent)
        asked.client.set_exception(aiohttp.ClientPayloadError())
        await rig.time.settle()
        assert isinstance(asked.task.exception(), aiohttp.ClientPayloadError)
        assert attempts == len(rig.upstream.sent)
        assert rig.line is not None
        assert 0 == rig.line.snapshot().waiting
        asked.body.close()


@pytest.mark.parametrize("whole", [True, False])
async def test_cancelled_while_waiting(*, whole: bool) -> None:
    """A request that is cancelled in the line is never sent, and leaves neither a task nor its place behind."""
    async with Rig(Quota(1, 10.0, burst=1.0)) as rig:
        await rig.answer()
        asked = rig.ask("POST", body=b"x", whole=whole)
        await rig.time.settle()
        assert rig.line is not None
        assert 1 == rig.line.snapshot().waiting
        assert not asked.body.sent
        asked.task.cancel()
        await rig.time.settle()
        assert asked.task.cancelled()
        assert 0 == rig.line.snapshot().waiting
        await rig.time.advance(11)
        assert 1 == len(rig.upstream.sent)
        asked.body.close()


async def test_settled_before_anybody_waits() -> None:
    """A ticket that comes to be granted between asking and waiting is not waited for for ever."""
    async with Rig(Quota(1, 10.0, burst=1.0)) as rig:
        await rig.answer()
        asked = rig.ask("POST", body=b"x", whole=False)
        await asyncio.sleep(0)  # it has asked; the tasks that wait and read have not begun
        rig.time.jump(10.5)
        assert rig.line is not None
        rig.line.answered(rig.line.ask("another", 60.0))
        rig.line._poll()
        asked.client.feed_eof()
        assert 200 == (await rig.run(asked)).outcome[0]


# The token


@pytest.mark.parametrize("method", METHODS)
async def test_401(method: str) -> None:
    """A 401 means one new token and one replay, for every method; the client sees the answer to that."""
    async with Rig() as rig:
        rig.upstream.outcomes = [lambda sent: 401 if sent.bearer == "T1" else 200]
        assert (200, 2, "no") == await rig.answer(method, body=b"{}")
        assert ["T1", "T2"] == [sent.bearer for sent in rig.upstream.sent]
        assert [b"{}", b"{}"] == [sent.body for sent in rig.upstream.sent]
        assert rig.upstream.replies[0].closed


async def test_a_second_401_in_a_row() -> None:
    """A second 401 in a row is passed on, and its challenge is to be hidden."""
    async with Rig() as rig:
        rig.upstream.outcomes = [401]
        asked = await rig.run(rig.ask("POST"))
        assert (401, 2, "no") == asked.outcome
        assert asked.exchange.hide_challenge
        assert not rig.upstream.replies[1].closed


REFUSED = "/documents/7?as=pdf"


def refusing(sent: Sent) -> int:
    """One resource answers 401 whatever the token."""
    return 401 if b"/documents/7" in sent.head else 200


@pytest.mark.parametrize("method", METHODS)
async def test_a_resource_that_answers_401_whatever_the_token(method: str) -> None:
    """Its first 401 costs a login; those after it, whatever their query, are passed on at once."""
    async with Rig() as rig:
        rig.upstream.outcomes = [refusing]
        assert (401, 2, "no") == await rig.answer(method, REFUSED)
        for number in range(5):
            asked = await rig.run(rig.ask(method, f"/documents/7?{number}"))
            assert (401, 1, "no") == asked.outcome
            assert asked.exchange.hide_challenge
            await rig.time.advance(10)
        assert 2 == rig.source.logins
        assert 1001 + 50 == rig.time.now(), "one login a second"


async def test_such_a_resource_beside_others() -> None:
    """While others take the token its 401s are passed on; without them the token is renewed, once a minute at most."""
    async with Rig() as rig:
        rig.upstream.outcomes = [refusing]
        await rig.answer(path=REFUSED)
        for _ in range(10):
            await rig.time.advance(59)
            assert (200, 1, "no") == await rig.answer()
            assert (401, 1, "no") == await rig.answer(path=REFUSED)
        assert 2 == rig.source.logins
        await rig.time.advance(61)
        assert (401, 2, "no") == await rig.answer(path=REFUSED)
        assert (401, 1, "no") == await rig.answer(path=REFUSED)
        assert 3 == rig.source.logins


async def test_such_a_resource_that_comes_round() -> None:
    """An answer of another kind clears the mark: the next 401 is one for a new token again."""
    async with Rig() as rig:
        rig.upstream.outcomes = [401, 401, 404, 401, 200]
        assert (401, 2, "no") == await rig.answer(path=REFUSED)
        assert (404, 1, "no") == await rig.answer(path=REFUSED)
        assert (200, 2, "no") == await rig.answer(path=REFUSED)
        assert ["T1", "T2", "T2", "T2", "T3"] == [sent.bearer for sent in rig.upstream.sent]


async def test_neighbours_of_such_a_resource() -> None:
    """While a 401 has a renewal made, all others go on with the token that they have; then the new one serves all."""
    async with Rig() as rig:
        rig.upstream.outcomes, rig.source.lasts = [refusing], 3.0
        await rig.time.advance(5)
        asked = rig.ask(path=REFUSED)
        for _ in range(5):
            await rig.time.advance(0.5)
            began = rig.time.now()
            assert (200, 1, "no") == await rig.answer()
            assert began == rig.time.now()
            assert rig.tokens.state.ready
        assert (401, 2, "no") == (await rig.run(asked)).outcome
        assert (200, 1, "no") == await rig.answer()
        assert ["T1"] * 6 + ["T2"] * 2 == [sent.bearer for sent in rig.upstream.sent]


async def test_a_token_that_died() -> None:
    """Though another resource is marked: one renewal and one replay for all others."""
    async with Rig() as rig:
        rig.upstream.outcomes = [refusing]
        await rig.answer(path=REFUSED)
        await rig.time.advance(5)
        rig.upstream.outcomes = [lambda sent: 401 if sent.bearer == "T2" else refusing(sent)]
        many = [rig.ask("POST", f"/{number}", b"{}") for number in range(100)]
        assert {(200, 2, "no")} == {(await rig.run(asked)).outcome for asked in many}
        assert (401, 1, "no") == await rig.answer(path=REFUSED)
        assert 3 == rig.source.logins


async def test_a_large_upload_to_such_a_resource() -> None:
    """What can't be replayed is told once to come again; the second 401, with the newer token, is passed on."""
    async with Rig() as rig:
        rig.upstream.outcomes = [refusing]
        large = b"x" * (LIMIT + 1)
        first, second = (rig.ask("PUT", REFUSED, large) for _ in range(2))
        assert "retry-with-new-token" == (await rig.run(first)).outcome[0]
        assert "retry-with-new-token" == (await rig.run(second)).outcome[0], "the token may have died"
        await rig.time.advance(1.0)
        assert (401, 1, "no") == await rig.answer("PUT", REFUSED, large)
        assert 2 == rig.source.logins


async def test_a_401_that_is_not_in_a_row() -> None:
    """A 401 after an answer of another kind means a new token again."""
    async with Rig() as rig:
        rig.upstream.outcomes = [401, busy(503), 401, 200]
        assert (200, 4, "unknown") == await rig.answer()
        assert ["T1", "T2", "T2", "T3"] == [sent.bearer for sent in rig.upstream.sent]


async def test_a_401_after_a_pause() -> None:
    """The replay after a 401 waits for the new token alone, whatever the attempt before had to wait for."""
    async with Rig() as rig:
        rig.upstream.outcomes = [busy(503, Retry_After="3"), 401, 200]
        assert (200, 3, "unknown") == await rig.answer()
        assert [0, 3, 3] == rig.upstream.times


async def test_a_hundred_401s() -> None:
    """A hundred requests whose token was rejected at the same time cause one renewal, and all succeed."""
    async with Rig() as rig:
        rig.upstream.outcomes, rig.upstream.lasts = [lambda sent: 401 if sent.bearer == "T1" else 200], 0.5
        many = [rig.ask("POST", f"/{number}") for number in range(100)]
        assert {(200, 2, "no")} == {(await rig.run(asked)).outcome for asked in many}
        assert 2 == rig.source.logins


async def test_a_late_401() -> None:
    """A 401 to an older token does not throw the newer one away."""
    async with Rig() as rig:
        rig.upstream.outcomes, rig.upstream.lasts = [lambda sent: 401 if sent.bearer == "T1" else 200], 5.0
        late = rig.ask()
        await rig.time.advance(2.0)
        rig.tokens.reject(AccessToken("T1", 1000.0, 900.0))
        assert (200, 2, "no") == (await rig.run(late)).outcome
        assert 2 == rig.source.logins


async def test_a_large_upload_that_met_a_401() -> None:
    """What can't be replayed gets 503 and is told to come again, by when there is a new token."""
    async with Rig() as rig:
        rig.upstream.outcomes = [lambda sent: 401 if sent.bearer == "T1" else 200]
        asked = await rig.run(rig.ask("POST", body=b"x" * (LIMIT + 1)))
        assert ("retry-with-new-token", 1, "no") == asked.outcome
        assert 1 == rig.error(asked).retry_after
        assert rig.upstream.replies[0].closed
        await rig.time.advance(1.0)
        assert (200, 1, "no") == await rig.answer("POST", body=b"x" * (LIMIT + 1))


async def test_a_large_upload_while_logins_fail() -> None:
    """It is told to come again when there may be a new token, which is not in a second."""
    async with Rig() as rig:
        rig.source.broken = True
        await rig.time.advance(750)
        rig.upstream.outcomes = [401]
        asked = await rig.run(rig.ask("POST", body=b"x" * (LIMIT + 1)))
        assert ("retry-with-new-token", 1, "no") == asked.outcome
        assert rig.tokens.state.next_login_in > 1
        assert math.ceil(rig.tokens.state.next_login_in) == rig.error(asked).retry_after


async def test_no_new_token() -> None:
    """Where no new token can be had after a 401, the client learns that, and that nothing was executed."""
    async with Rig() as rig:
        rig.upstream.outcomes, rig.source.broken = [401], True
        assert ("token-unavailable", 1, "no") == await rig.answer("POST")


async def test_a_token_that_ended_in_the_line() -> None:
    """After waiting for the quota, a request goes out with a token that is still good."""
    async with Rig(Quota(1, 30.0, burst=1.0), max_wait=100.0) as rig:
        await rig.answer()
        asked = rig.ask()
        await rig.time.advance(10)
        rig.tokens.reject(AccessToken("T1", 1000.0, 900.0))
        await rig.run(asked)
        assert ["T1", "T2"] == [sent.bearer for sent in rig.upstream.sent]


async def test_no_token_after_the_line() -> None:
    """Where the token is gone when its turn comes, a request gives its slot back."""
    async with Rig(Quota(1, 30.0, burst=1.0), max_wait=100.0) as rig:
        rig.source.broken = True
        await rig.time.advance(880)
        await rig.answer()
        asked = rig.ask()
        assert ("token-unavailable", 0, "no") == (await rig.run(asked)).outcome
        assert rig.line is not None
        assert 0 == rig.line.snapshot().used


# The quota


async def test_a_slot_counts_from_sending_until_a_window_after_the_answer() -> None:
    """A slot is taken while the request is under way, and for one window after its answer or failure."""
    async with Rig(Quota(1, 10.0, burst=1.0)) as rig:
        rig.upstream.lasts = 5.0
        asked = rig.ask()
        await rig.time.advance(4.0)
        assert rig.line is not None
        assert (1, 1) == rig.line.snapshot()[2:4]
        await rig.run(asked)
        assert (1, 0) == rig.line.snapshot()[2:4]
        rig.upstream.outcomes, rig.upstream.lasts = [silence()], 0.0
        assert ("upstream-timeout", 1, "unknown") == await rig.answer()
        assert [0, 15.01] == rig.upstream.times
        assert (1, 0) == rig.line.snapshot()[2:4]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_what_was_never_sent_takes_no_slot(method: str) -> None:
    """While no connection can be made a slot is held; then it comes back, and requests that wait for it go at once."""
    async with Rig(Quota(20, 60.0), retries=0, max_wait=120.0) as rig:
        rig.upstream.outcomes, rig.upstream.lasts = [unreachable()], 10.0
        many = [rig.ask(method) for _ in range(26)]
        await rig.time.advance(9.9)
        assert rig.line is not None
        assert 14 <= rig.line.snapshot().in_flight == rig.line.snapshot().used < 26
        await rig.time.advance(0.2)
        assert 0 == rig.line.snapshot().waiting
        assert {("upstream-unreachable", 1, "no")} == {(await rig.run(asked)).outcome for asked in many}
        assert rig.time.now() <= 1020.1
        assert (0, 0) == rig.line.snapshot()[2:4]
        rig.upstream.outcomes, rig.upstream.lasts = [200], 0.0
        assert (200, 1, "no") == await rig.answer(method)
        assert 1 == rig.line.snapshot().used


async def test_cancelled_while_it_connects() -> None:
    """The slot of a request whose client leaves before there is a connection comes back at once."""
    async with Rig(Quota(1, 60.0, burst=1.0), max_wait=90.0) as rig:
        rig.upstream.outcomes, rig.upstream.lasts = [unreachable(), 200], 10.0
        first = rig.ask("POST", body=b"{}")
        await rig.time.settle()
        second = rig.ask("POST", body=b"{}")
        await rig.time.advance(1.0)
        assert rig.line is not None
        assert 1 == rig.line.snapshot().waiting
        first.task.cancel()
        await rig.time.settle()
        assert [0, 1] == rig.upstream.times
        assert (200, 1, "no") == (await rig.run(second)).outcome
        first.body.close()


async def test_an_answer_that_came_sooner_than_expected() -> None:
    """Who waits goes as soon as the slot is really free, not when it was expected to be."""
    async with Rig(Quota(2, 10.0, burst=1.0)) as rig:
        rig.upstream.lasts = 16.0
        slow = [rig.ask(), rig.ask()]
        await rig.time.advance(40.0)
        rig.upstream.lasts = 1.0
        for asked in [*slow, rig.ask(), rig.ask(), rig.ask()]:
            await rig.run(asked)
        assert [0, 0, 40, 40, 51.01] == rig.upstream.times


async def test_retries_count() -> None:
    """Each attempt takes a slot of its own, and waits for it."""
    async with Rig(Quota(2, 10.0, burst=1.0), max_wait=30.0) as rig:
        rig.upstream.outcomes = [reset(), reset(), 200]
        asked = await rig.run(rig.ask())
        assert (200, 3, "unknown") == asked.outcome
        assert [0, 0.25, 10.01] == rig.upstream.times
        assert 10.01 == pytest.approx(asked.exchange.waited)


async def test_too_long_a_wait_is_refused_at_once() -> None:
    """What can't be sent within MAX_WAIT gets the proxy's 429 with a true Retry-After, and nothing is sent."""
    async with Rig(Quota(1, 60.0, burst=1.0)) as rig:
        await rig.answer()
        asked = await rig.run(rig.ask("POST"))
        assert ("quota-exceeded", 0, "no") == asked.outcome
        assert 61 == rig.error(asked).retry_after
        assert "More is asked for" in rig.error(asked).message
        assert "Send it again in 61 s" in rig.error(asked).message
        assert 1000 == rig.time.now()
        await rig.time.advance(61)
        assert (200, 1, "no") == await rig.answer("POST")


@pytest.mark.parametrize("quota", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("reply", "wait"),
    [
        (Reply(429, Retry_After="5"), 5),
        (Reply(429, Date="Sat, 28 Nov 2026 05:00:00 GMT", Retry_After="Sat, 28 Nov 2026 05:00:03 GMT"), 3),
        (Reply(429, b"try again in 9 seconds", Retry_After="5"), 5),
        (Reply(429, b"100 requests per minute exceeded. Please try ", b"again in 7 seconds."), 7),
        (Reply(429, b"x" * 9000, b"in 7 seconds."), None),
        (Reply(429, b"Please try again in 7 sec", reset()), None),
        (Reply(429), None),
    ],
    ids=["header", "another clock", "both", "text", "a long text", "broken off", "nothing"],
)
async def test_429(*, quota: bool, method: str, reply: Reply, wait: float | None) -> None:
    """After Metquay's 429 the request, POST too, is sent again when it says, else when our own window refills."""
    async with Rig(Quota(100, 10.0) if quota else None) as rig:
        rig.upstream.outcomes = [reply, 200]
        assert (200, 2, "no") == await rig.answer(method, body=b"{}")
        expected = wait or (10.01 if quota else 1.0)
        assert [0, expected] == rig.upstream.times
        assert [b"{}", b"{}"] == [sent.body for sent in rig.upstream.sent]
        assert rig.upstream.replies[0].closed


@pytest.mark.parametrize("quota", [True, False])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_429_beyond_the_budget(*, quota: bool, method: str) -> None:
    """Where Metquay asks for more than MAX_WAIT, the answer is the proxy's 429: not executed, and when to come back."""
    async with Rig(Quota(100, 60.0) if quota else None) as rig:
        rig.upstream.outcomes = [Reply(429, b"Please try again in 30 seconds.")]
        asked = await rig.run(rig.ask(method))
        assert ("quota-exceeded", 1, "no") == asked.outcome
        assert 30 == rig.error(asked).retry_after
        assert "Metquay says that its limit is reached (429)" in rig.error(asked).message
        assert 1000 == rig.time.now()
        assert rig.upstream.replies[0].closed


async def test_a_429_closes_the_window_for_all() -> None:
    """One 429 holds everybody back; those that can't wait so long are refused."""
    async with Rig(Quota(100, 60.0)) as rig:
        rig.upstream.outcomes = [Reply(429, Retry_After="15"), 200]
        first = rig.ask()
        await rig.time.settle()
        second = rig.ask()
        await rig.time.advance(14)
        assert 1 == len(rig.upstream.sent)
        assert (200, 2, "no") == (await rig.run(first)).outcome
        assert (200, 1, "no") == (await rig.run(second)).outcome
        assert rig.upstream.times[1] >= 15


async def test_those_in_the_line_are_refused_when_the_window_closes() -> None:
    """A request in the line that can't outwait Metquay's 429 is refused then, not at its deadline."""
    async with Rig(Quota(2, 30.0, burst=0.5)) as rig:
        rig.upstream.outcomes, rig.upstream.lasts = [Reply(429, Retry_After="60"), 200], 1.0
        first, second = rig.ask(), rig.ask()
        await rig.time.advance(1.0)
        assert ("quota-exceeded", 1, "no") == first.outcome
        assert ("quota-exceeded", 0, "no") == second.outcome
        assert 60 <= cast("int", rig.error(second).retry_after)


async def test_a_large_body_that_met_a_429() -> None:
    """A 429 to what can't be replayed names the time that the line itself needs."""
    async with Rig(Quota(100, 60.0)) as rig:
        rig.upstream.outcomes = [Reply(429)]
        asked = await rig.run(rig.ask("POST", body=b"x" * (LIMIT + 1)))
        assert ("quota-exceeded", 1, "no") == asked.outcome
        assert 61 == rig.error(asked).retry_after


async def test_429_again_and_again() -> None:
    """Metquay may refuse as often as it likes: the request is not executed, and ends at MAX_WAIT."""
    async with Rig() as rig:
        rig.upstream.outcomes = [lambda _: 429]
        assert ("quota-exceeded", 21, "no") == await rig.answer("POST")
        assert 1020 == rig.time.now()


# PUT and DELETE, and what came between


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize("between", ["PUT", "DELETE", "POST", "PATCH"])
@pytest.mark.parametrize("failure", [reset(), busy(503)])
@pytest.mark.parametrize("lasts", [0.0, 1.0], ids=["while it backs off", "while it runs"])
async def test_overtaken(method: str, between: str, failure: Reply | UpstreamFailure, lasts: float) -> None:
    """A PUT or DELETE is not repeated once another write to the same target was forwarded, not even from its pause."""
    async with Rig() as rig:
        rig.upstream.outcomes, rig.upstream.lasts = [failure, 200], lasts
        first = rig.ask(method, "/customers/1")
        await rig.time.settle()
        rig.upstream.lasts = 0.0
        second = rig.ask(between, "/customers/1")
        await rig.time.settle()
        status = 503 if isinstance(failure, Reply) else "upstream-closed"
        sent = "no" if lasts and isinstance(failure, Reply) else "unknown"
        assert (status, 1, sent) == (await rig.run(first)).outcome
        assert (200, 1, "no") == (await rig.run(second)).outcome
        assert 2 == len(rig.upstream.sent)
        if isinstance(failure, Reply):
            assert b"<html>later</html>" == await text(first.task.result())


async def test_the_later_one_is_repeated() -> None:
    """Of two writes to one target the later one may be repeated, and so may those to others, and reads."""
    async with Rig() as rig:
        rig.upstream.outcomes = [lambda sent: 503 if sent.at < 0.125 else 200]
        asked = [
            rig.ask("PUT", "/customers/1"),
            rig.ask("PUT", "/customers/1"),
            rig.ask("PUT", "/customers/2"),
            rig.ask("GET", "/customers/1"),
        ]
        expected = [(503, 1, "unknown"), (200, 2, "unknown"), (200, 2, "unknown"), (200, 2, "unknown")]
        assert expected == [(await rig.run(one)).outcome for one in asked]


async def test_posts_do_not_overtake_each_other() -> None:
    """POSTs to one list that found no connection are all sent again."""
    async with Rig() as rig:
        rig.upstream.outcomes = [unreachable(), unreachable(), unreachable(), 201]
        asked = [rig.ask("POST") for _ in range(3)]
        assert [(201, 2, "no")] * 3 == [(await rig.run(one)).outcome for one in asked]


async def test_overtaken_in_the_line() -> None:
    """A PUT that is overtaken while its repeat waits for the quota gives the slot back."""
    async with Rig(Quota(1, 10.0, burst=1.0), max_wait=60.0) as rig:
        rig.upstream.outcomes = [reset(), 200]
        first = rig.ask("PUT", "/customers/1", caller="a")
        await rig.time.settle()
        second = rig.ask("PUT", "/customers/1", caller="b")
        await rig.time.advance(1.0)
        third = rig.ask("GET", caller="c")
        assert ("upstream-closed", 1, "unknown") == (await rig.run(first)).outcome
        assert (200, 1, "no") == (await rig.run(second)).outcome
        assert (200, 1, "no") == (await rig.run(third)).outcome
        assert [0, 10.01, 20.02] == rig.upstream.times


# When a planned repeat can't be made


async def test_the_last_attempt_counts() -> None:
    """What the last attempt ended in is passed on, not what those before it did."""
    async with Rig() as rig:
        rig.upstream.outcomes = [busy(503), silence()]
        assert ("upstream-timeout", 2, "unknown") == await rig.answer("PUT")


@pytest.mark.parametrize("why", ["quota", "token"])
async def test_no_repeat_after_all(why: str) -> None:
    """Where quota or token stand in the way of a repeat, what the last attempt ended in is passed on, whole."""
    async with Rig(Quota(1, 60.0, burst=1.0) if why == "quota" else None) as rig:
        rig.source.broken = why == "token"
        await rig.time.advance(899.9)
        rig.upstream.outcomes = [busy(503)]
        asked = rig.ask("PUT")
        await rig.time.settle()
        assert (503, 1, "unknown") == (await rig.run(asked)).outcome
        assert b"<html>later</html>" == await text(asked.task.result())
    async with Rig(Quota(1, 60.0, burst=1.0)) as rig:
        rig.upstream.outcomes = [reset()]
        assert ("upstream-closed", 1, "unknown") == await rig.answer("PUT")


async def test_cancelled_in_its_pause() -> None:
    """A request whose client leaves while it backs off closes the answer that it kept."""
    async with Rig() as rig:
        rig.upstream.outcomes = [busy(503)]
        asked = rig.ask("PUT", body=b"{}")
        await rig.time.settle()
        assert not asked.body.sent, "the server may cancel it"
        assert not rig.upstream.replies[0].closed
        asked.task.cancel()
        await rig.time.settle()
        assert rig.upstream.replies[0].closed
        asked.body.close()


async def test_cancelled_while_it_reads_a_429() -> None:
    """A request whose client leaves while a 429's text arrives closes that answer."""

    class Slow(Reply):
        async def read(self) -> bytes:
            await asyncio.get_running_loop().create_future()
            return b""

    async with Rig() as rig:
        rig.upstream.outcomes = [Slow(429, b"-")]
        asked = rig.ask("POST", body=b"{}")
        await rig.time.settle()
        assert not asked.body.sent
        asked.task.cancel()
        await rig.time.settle()
        assert rig.upstream.replies[0].closed
        asked.body.close()


# The client that left


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (201, (201, 1, "no")),
        (reset(), ("upstream-closed", 1, "unknown")),
        (unreachable(), ("upstream-unreachable", 1, "no")),
        (busy(503), (503, 1, "no")),
        (401, ("retry-with-new-token", 1, "no")),
        (Reply(429, Retry_After="1"), ("quota-exceeded", 1, "no")),
    ],
    ids=["answer", "reset", "unreachable", "503", "401", "429"],
)
async def test_a_write_runs_on_once(method: str, outcome: Reply | UpstreamFailure | int, expected: object) -> None:
    """A write whose client left comes to its end, and no further attempt is made for nobody."""
    async with Rig(Quota(100, 60.0)) as rig:
        rig.upstream.outcomes, rig.upstream.lasts = [outcome, 200], 5.0
        asked = rig.ask(method, body=b"{}")
        await rig.time.advance(1.0)
        assert asked.body.sent or outcome == expected or isinstance(outcome, UpstreamFailure)
        asked.exchange.client_left = True
        assert expected == (await rig.run(asked)).outcome
        assert 1 == len(rig.upstream.sent)


@pytest.mark.parametrize("outcome", [unreachable(), reset(), busy(503), 401, Reply(429, Retry_After="5")])
async def test_what_waits_is_not_under_way(outcome: Reply | UpstreamFailure | int) -> None:
    """While a write waits for another attempt, the server may take it back when its client leaves."""
    async with Rig() as rig:
        rig.source.lasts = 1.0
        rig.upstream.outcomes = [outcome, 200]
        asked = rig.ask("PUT", body=b"{}")
        await rig.time.settle()
        assert (False, False) == (asked.task.done(), asked.body.sent)
        await rig.run(asked)
        assert asked.body.sent


# Pass-through


async def test_pass_through() -> None:
    """A pass-through gets no token, takes no slot, is never repeated, and keeps an Idempotency-Key to itself."""
    async with Rig(Quota(1, 60.0, burst=1.0)) as rig:
        rig.upstream.outcomes = [503, 401, 429, reset()]
        for expected in (503, 401, 429, "upstream-closed"):
            status, attempts, _ = await rig.answer("POST", key="k", body=b"{}", pass_through=True)
            assert (expected, 1) == (status, attempts)
        assert [""] * 4 == [sent.bearer for sent in rig.upstream.sent]
        assert rig.line is not None
        assert 0 == rig.line.snapshot().used


# Idempotency-Key


async def post(rig: Rig, body: bytes = b"{}", *, key: str = "k1", path: str = "/customers", client: str = "") -> Asked:
    """POST with a key."""
    return await rig.run(rig.ask("POST", path, body, key=key, client=client or None))


@pytest.mark.parametrize("pieces", [(b'{"metquayId": 1}',), (b'{"metquay', b'Id": 1}'), ()])
@pytest.mark.parametrize("fields", [{}, {"content_length": "16"}, {"Location": "/x"}])
async def test_the_recorded_answer(pieces: tuple[bytes, ...], fields: dict[str, str]) -> None:
    """The second POST with a key gets the first one's answer, framed by its length and marked; nothing is sent."""
    async with Rig() as rig:
        rig.upstream.outcomes = [Reply(201, *pieces, **fields), 500]
        first = await post(rig)
        assert (201, 1, "yes") == first.outcome
        whole = b"".join(pieces)
        assert whole == await text(first.task.result())
        second = await post(rig)
        assert (201, 0, "no") == second.outcome
        answer = second.task.result()
        assert (len(whole), False, b"Reason") == (answer.head.length, answer.head.chunked, answer.head.reason)
        headers = dict(answer.head.headers)
        assert (b"true", b"%d" % len(whole)) == (headers[b"Idempotency-Replayed"], headers[b"Content-Length"])
        assert fields.get("Location", "").encode() == headers.get(b"Location", b"")
        assert 1 == [name.lower() for name, _ in answer.head.headers].count(b"content-length")
        assert whole == await text(answer)
        answer.close()
        assert 1 == len(rig.upstream.sent)


async def test_in_progress() -> None:
    """While the first runs, with or without its client, a second one is told so."""
    async with Rig() as rig:
        rig.upstream.lasts = 5.0
        first = rig.ask("POST", key="k1", body=b"{}")
        await rig.time.settle()
        first.exchange.client_left = True
        assert ("in-progress", 0, "unknown") == (await post(rig)).outcome
        assert ("idempotency-key-reused", 0, "no") == (await post(rig, b"[]")).outcome
        await rig.run(first)
        assert (200, 0, "no") == (await post(rig)).outcome


@pytest.mark.parametrize("outcome", [reset(), silence(), 500, 503, 302])
async def test_an_unknown_outcome(outcome: Reply | UpstreamFailure | int) -> None:
    """Where nobody knows whether the first was executed, a second one is not sent, and no other body with its key."""
    async with Rig() as rig:
        rig.upstream.outcomes = [outcome, 201]
        await post(rig)
        assert ("outcome-unknown", 0, "unknown") == (await post(rig)).outcome
        assert ("idempotency-key-reused", 0, "no") == (await post(rig, b"[]")).outcome
        assert 1 == len(rig.upstream.sent)


@pytest.mark.parametrize("outcome", [unreachable(), 400, 403, 409, 422, Reply(429, Retry_After="60")])
async def test_not_executed(outcome: Reply | UpstreamFailure | int) -> None:
    """What proves that nothing was executed frees the key."""
    async with Rig(retries=0) as rig:
        rig.upstream.outcomes = [outcome, 201]
        assert "no" == (await post(rig)).outcome[2]
        assert (201, 1, "yes") == (await post(rig, b"[]")).outcome


async def test_refused_by_the_quota() -> None:
    """What was refused here frees the key."""
    async with Rig(Quota(1, 60.0, burst=1.0)) as rig:
        await rig.answer()
        assert ("quota-exceeded", 0, "no") == (await post(rig)).outcome
        await rig.time.advance(61)
        assert (200, 1, "yes") == (await post(rig)).outcome


@pytest.mark.parametrize(("lasts", "slug"), [(0.0, None), (5.0, "outcome-unknown")], ids=["queued", "sent"])
async def test_cancelled_with_a_key(lasts: float, slug: str | None) -> None:
    """A POST that is cancelled in the line frees its key; one that was sent leaves an unknown outcome."""
    async with Rig(Quota(1, 10.0, burst=1.0)) as rig:
        if not lasts:
            await rig.answer()
        rig.upstream.lasts = lasts
        asked = rig.ask("POST", key="k1", body=b"{}")
        await rig.time.settle()
        asked.task.cancel()
        await rig.time.advance(11)
        asked.body.close()
        rig.upstream.lasts = 0.0
        assert (slug or 200) == (await post(rig)).outcome[0]


async def test_a_long_answer() -> None:
    """An answer beyond 64 KiB reaches its client whole, but only that it came is recorded."""
    async with Rig() as rig:
        rig.upstream.outcomes = [Reply(201, b"x" * MAX_ANSWER, b"y", b"z")]
        asked = await post(rig)
        answer = asked.task.result()
        assert not answer.ended
        assert b"x" * MAX_ANSWER + b"yz" == await text(answer)
        answer.close()
        assert rig.upstream.replies[0].closed
        assert ("outcome-unknown", 0, "yes") == (await post(rig)).outcome
        rig.upstream.outcomes = [Reply(201, b"x" * MAX_ANSWER, b"")]
        await post(rig, key="k2")
        assert (201, 0, "no") == (await post(rig, key="k2")).outcome
        rig.upstream.outcomes = [Reply(201, b"x" * (MAX_ANSWER + 1))]
        await post(rig, key="k3")
        assert ("outcome-unknown", 0, "yes") == (await post(rig, key="k3")).outcome


async def test_an_answer_that_broke_off() -> None:
    """A 2xx whose body broke off was executed, and the second one is told so."""
    async with Rig() as rig:
        broken = UpstreamFailure("upstream-closed", "-", sent="yes")
        rig.upstream.outcomes = [Reply(201, b'{"metq', broken)]
        assert ("upstream-closed", 1, "yes") == (await post(rig)).outcome
        assert rig.upstream.replies[0].closed
        assert ("outcome-unknown", 0, "yes") == (await post(rig)).outcome


async def test_scope_of_a_key() -> None:
    """The same key of another client or for another path is another one; other methods have none."""
    async with Rig() as rig:
        for client, path in (("", "/x"), ("a", "/x"), ("b", "/x"), ("a", "/y"), ("a", "/x?y")):
            assert (200, 1, "yes") == (await post(rig, client=client, path=path)).outcome
        assert (200, 1, "no") == await rig.answer("PUT", key="k1", body=b"{}")
        assert (200, 1, "no") == await rig.answer("GET", key="")


async def test_what_is_no_key() -> None:
    """A key that is none is refused before anything is sent."""
    async with Rig() as rig:
        assert ("bad-request", 0, "no") == (await post(rig, key="")).outcome


async def test_too_long_a_body_for_a_key() -> None:
    """A body that can't be kept can't be compared: 413."""
    async with Rig() as rig:
        assert ("body-too-large", 0, "no") == (await post(rig, b"x" * (LIMIT + 1))).outcome
        assert (200, 1, "yes") == (await post(rig, b"x" * LIMIT)).outcome


# On real sockets


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A simulated Metquay without a quota."""
    simulated = Sandbox(rate_limit=None)
    await simulated.start()
    yield simulated
    await simulated.stop()


async def _create(
    session: aiohttp.ClientSession, url: str, name: str
) -> tuple[int, Any, aiohttp.typedefs.LooseHeaders]:
    key = hashlib.sha256(name.encode()).hexdigest()
    async with session.post(
        url + "/instrument-categories", json={"name": name}, headers={"Idempotency-Key": key}
    ) as answer:
        return answer.status, json.loads(await answer.read()), answer.headers


async def test_a_lost_answer(sandbox: Sandbox) -> None:
    """A POST whose answer was lost is executed once: 502 unknown, then 409; a lost PUT is repeated and succeeds."""
    async with (
        running(sandbox.url, time_=FastTime(20), rate_limit="off") as (_, url),
        aiohttp.ClientSession() as session,
    ):
        status, created, _ = await _create(session, url, "Gauge")
        assert 201 == status
        sandbox.faults = Faults(lose_answer=1.0)
        status, _, headers = await _create(session, url, "Calliper")
        assert (502, "upstream-closed", "unknown", "1") == (status, *_said(headers))
        sandbox.faults = Faults()
        status, _, headers = await _create(session, url, "Calliper")
        assert (409, "outcome-unknown", "unknown", "0") == (status, *_said(headers))
        assert 2 == len(sandbox.writes)
        sandbox.faults = Faults(lose_answer=0.5)
        for number in range(10):
            path = f"{url}/instrument-categories/{created['metquayId']}"
            async with session.put(path, json={"name": f"Gauge {number}"}) as answer:
                assert 200 == answer.status or "3" == answer.headers["X-Metquay-Proxy-Attempts"]


async def test_the_answer_of_a_client_that_left(sandbox: Sandbox) -> None:
    """A tool that gave up on a POST gets its answer when it asks again with the same key."""
    async with running(sandbox.url, rate_limit="off") as (proxy, url), aiohttp.ClientSession() as session:
        sandbox.faults = Faults(latency=0.3)
        first = asyncio.ensure_future(_create(session, url, "Gauge"))
        await _until(lambda: sandbox.requests == 1)
        first.cancel()
        await _until(lambda: not proxy.telemetry.active)
        status, created, headers = await _create(session, url, "Gauge")
        assert (201, "true") == (status, cast("dict[str, str]", headers)["Idempotency-Replayed"])
        assert [created["metquayId"]] == [write["id"] for write in sandbox.writes]


def _said(headers: Any) -> tuple[str, str, str]:  # noqa: ANN401 - aiohttp's own
    return tuple(headers[f"X-Metquay-Proxy-{name}"] for name in ("Error", "Sent", "Attempts"))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
