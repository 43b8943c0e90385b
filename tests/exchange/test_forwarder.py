from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, Final, Self, cast

import pytest

from metquay_proxy.exchange.body import ReplayBudget, RequestBody, Stream
from metquay_proxy.exchange.exchange import Exchange, Response
from metquay_proxy.exchange.forwarder import Forwarder
from metquay_proxy.exchange.line import Line
from metquay_proxy.exchange.tokens import TokenCache
from metquay_proxy.rules.credentials import AccessToken, LoginFailed
from metquay_proxy.rules.errors import ProxyError, UpstreamFailure
from metquay_proxy.rules.gate import Admission
from metquay_proxy.rules.headers import RequestFields
from metquay_proxy.rules.idempotency import MAX_ANSWER, Records
from metquay_proxy.rules.quota import Quota
from metquay_proxy.rules.target import Target
from tests.fake_time import FakeTime
from tests.heads import response_head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

METHODS: Final = ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "POST", "PATCH")
LIMIT: Final = 1024
"""The replay limit of these tests, in bytes."""
LARGE: Final = b"x" * (LIMIT + 1)
UNREACHABLE: Final = UpstreamFailure("upstream-unreachable", "-", repeatable=True)
RESET: Final = UpstreamFailure("upstream-closed", "-", sent="unknown", repeatable=True)
STALE: Final = UpstreamFailure("upstream-closed", "-", sent="unknown", repeatable=True, stale=True)
SILENCE: Final = UpstreamFailure("upstream-timeout", "-", sent="unknown")
HTML: Final = b"<html>later</html>"


class Reply:
    """An answer that can be given again and again; its body comes in ``pieces``, an error among them breaks it off."""

    def __init__(self, status: int, *pieces: bytes | ProxyError, ends: bool = True, **fields: str) -> None:
        self._pieces, self._ends = pieces, ends
        headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
        self.head = response_head(status, b"Reason", headers)

    async def pour(self, stream: Stream) -> None:
        """Let the body arrive."""
        for piece in self._pieces:
            await asyncio.sleep(0)
            if isinstance(piece, ProxyError):
                stream.fail(piece)
                return
            stream.feed(piece)
        if self._ends:
            stream.end()


def busy(status: int = 503, **fields: str) -> Reply:
    """An error of the upstream's own."""
    return Reply(status, HTML[:6], HTML[6:], Server="Tomcat", **fields)


class Watched(Response):
    """An answer that remembers whether it was closed."""

    closed = False

    def close(self) -> None:
        """Remember it."""
        super().close()
        self.closed = True


Outcome = Reply | UpstreamFailure | int


class Upstream:
    """A transport without a network. ``outcomes`` are taken in turn, the last one for ever; each takes ``lasts`` s."""

    def __init__(self, time: FakeTime, lasts: float) -> None:
        self._time = time
        self.outcomes: list[Outcome | Callable[[bytes], int]] = [200]
        self.lasts = lasts
        self.times: list[float] = []
        """Of each attempt when it came, in seconds since the start, and what it brought."""
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.fresh: list[bool] = []
        self.responses: list[Watched] = []
        self.playing: list[asyncio.Task[None]] = []

    def take(self, _method: str, _now: float) -> None:
        """Have none that has idled."""
        self.fresh.append(False)

    async def open(self) -> Self:
        """Be a new connection; where the next outcome is that there is none, that takes its time."""
        if len(self.fresh) == len(self.times):
            self.fresh.append(True)
        self.times.append(round(self._time.now() - 1000.0, 3))
        if self.outcomes[0] is UNREACHABLE:
            failure = self._next()
            if self.lasts:
                await self._time.sleep(self.lasts)
            raise failure
        return self

    def send(self, _: str, head: bytes, body: RequestBody) -> Response:
        """Play the next outcome."""
        self.heads.append(head)
        response = Watched()
        self.responses.append(response)
        self.playing.append(asyncio.ensure_future(self._play(self._next(), head, body, response)))
        return response

    def _next(self) -> Any:  # noqa: ANN401 - an outcome
        outcome = self.outcomes[0]
        del self.outcomes[: len(self.outcomes) > 1]
        if isinstance(outcome, UpstreamFailure):  # a new one, which remembers nothing of other requests
            how = {"sent": outcome.sent, "repeatable": outcome.repeatable, "stale": outcome.stale}
            return UpstreamFailure(outcome.slug, "-", **how)
        return outcome

    async def _play(self, outcome: Any, head: bytes, body: RequestBody, response: Response) -> None:  # noqa: ANN401 - one
        data = body.whole()
        if data is None:
            try:
                data = b"".join([chunk async for chunk in body.chunks()])
            except Exception as error:  # noqa: BLE001 - as a connection does
                response.fail(error)
                return
        self.bodies.append(data)
        response.sent = True
        if self.lasts:
            await self._time.sleep(self.lasts)
        if isinstance(outcome, UpstreamFailure):
            response.fail(outcome)
            return
        if callable(outcome):
            outcome = outcome(head)
        reply = outcome if isinstance(outcome, Reply) else Reply(outcome)
        response.begin(reply.head)
        response.feed(b"")
        await reply.pour(response)

    @property
    def closed(self) -> list[bool]:
        """Of each answer, whether it was closed."""
        return [response.closed for response in self.responses]

    @property
    def bearers(self) -> list[str]:
        """The token of each attempt."""
        return [head.partition(b"Authorization: Bearer ")[2].partition(b"\r\n")[0].decode() for head in self.heads]


class Source:
    """Grants tokens T1, T2, ... while it is not broken; each login takes ``lasts`` seconds."""

    def __init__(self, time: FakeTime) -> None:
        self._time = time
        self.broken, self.lasts, self.logins = False, 0.0, 0

    async def token(self) -> AccessToken:
        """Log in."""
        self.logins += 1
        now = self._time.now()
        if self.lasts:
            await self._time.sleep(self.lasts)
        if self.broken:
            raise LoginFailed("Metquay is down.")
        return AccessToken(f"T{self.logins}", now, 900.0)


@dataclass
class Asked:
    """One request under way: its task, and what the client's side would see of it."""

    task: asyncio.Task[Response]
    exchange: Exchange
    client: Stream

    @property
    def error(self) -> ProxyError:
        """The error that it ended in."""
        error = self.task.exception()
        assert isinstance(error, ProxyError)
        return error

    @property
    def outcome(self) -> tuple[int | str, int, str]:
        """Status or slug, attempts, and whether it may have been executed."""
        if self.task.exception() is None:
            return self.task.result().head.status, self.exchange.attempts, self.exchange.sent
        self.exchange.note_sent(self.error.sent)
        return self.error.slug, self.exchange.attempts, self.exchange.sent

    async def text(self) -> bytes:
        """Read its answer to the end."""
        body, data = self.task.result(), b""
        while not body.ended:
            data += await body.read()
        return data


@dataclass
class Rig:
    """A forwarder with everything around it made up, and time that moves when told."""

    rate: tuple[int, float] | None = None
    burst: float = 1.0
    retries: int = 2
    max_wait: float = 20.0
    jitter: float = 1.0
    lasts: float = 0.0
    records: Records | None = None
    time: FakeTime = field(default_factory=FakeTime)
    timers: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        """Begin with a token."""
        self.upstream = Upstream(self.time, self.lasts)
        self.source = Source(self.time)
        self.tokens = TokenCache(self.source, clock=self.time.now, sleep=self.time.sleep, random=lambda: 0.0)
        self.line = Line(Quota(*(self.rate or (1, 1.0)), burst=self.burst), self.time.now, self._call_later)
        self.forwarder = Forwarder(
            self.upstream,
            self.tokens,
            self.line if self.rate else None,
            max_wait=self.max_wait,
            retries=self.retries,
            clock=self.time.now,
            records=self.records,
            sleep=self.time.sleep,
            jitter=lambda: self.jitter,
        )
        self.tokens.start()
        await self.time.settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Look that nothing is left behind."""
        await self.tokens.close()
        for timer in self.timers:
            timer.cancel()
        await asyncio.gather(*self.timers, *self.upstream.playing, return_exceptions=True)
        assert {asyncio.current_task()} == asyncio.all_tasks(), "no task outlives its request"
        assert 0 == self.line.snapshot().in_flight, "every slot is answered or given back"

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
        key: str | None = None,
        pass_through: bool = False,
    ) -> Asked:
        """Begin a request; the client has not ended its body yet unless it is ``whole``."""
        stream = Stream.of(body)
        stream.arrived = whole
        exchange = Exchange(method, path)
        exchange.target = Target("/api/v1" + path, path.partition("?")[0], None, pass_through=pass_through)
        exchange.path = exchange.target.sent
        fields = exchange.fields = RequestFields(b"" if key is None else b"\r\nIdempotency-Key: " + key.encode())
        exchange.outgoing = fields.outbound(method, exchange.target.sent, host=b"lab.metquay.co", chunked=False)
        exchange.body = RequestBody(stream, chunked=False, limit=LIMIT, budget=ReplayBudget(1 << 20), timeout=60.0)
        exchange.caller, exchange.admission = caller, Admission(scope=caller)
        return Asked(asyncio.ensure_future(self.forwarder.forward(exchange)), exchange, stream)

    async def run(self, asked: Asked) -> Asked:
        """Let time pass until the request has come to its end."""
        await self.time.finish(asked.task)
        return asked

    async def answer(self, *args: Any, **kwargs: Any) -> tuple[int | str, int, str]:  # noqa: ANN401 - those of ask
        """Make one request, and return its outcome."""
        return (await self.run(self.ask(*args, **kwargs))).outcome

    async def post(self, body: bytes = b"{}", key: str = "k1", **kwargs: Any) -> Asked:  # noqa: ANN401 - those of ask
        """POST with a key."""
        return await self.run(self.ask("POST", body=body, key=key, **kwargs))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Return one with the default settings and without a quota."""
    async with Rig() as rig:
        yield rig


# What is sent again, and when

ON_THE_HOUR: Final = "Sat, 28 Nov 2026 05:00:00 GMT"
LATER: Final = "Sat, 28 Nov 2026 05:00:03 GMT"
LONG_AGO: Final = format_datetime(datetime.now(UTC) + timedelta(hours=-1), usegmt=True)
MINUTE: Final = {"rate": (100, 60.0)}
THROUGH: Final = {"pass_through": True, "key": "not for the proxy", **MINUTE}

CASES: Final[dict[str, tuple[dict[str, Any], str, list[Outcome], tuple[int | str, int, str], list[float]]]] = {
    "a reset": ({}, "PUT", [RESET], ("upstream-closed", 3, "unknown"), [0, 0.25, 0.75]),
    "a reset, then an answer": ({}, "PUT", [RESET, 200], (200, 2, "unknown"), [0, 0.25]),
    "the reset of a POST": ({}, "POST", [RESET, 200], ("upstream-closed", 1, "unknown"), [0]),
    "a POST that found no connection": ({}, "POST", [UNREACHABLE, UNREACHABLE, 201], (201, 3, "no"), [0, 0.25, 0.75]),
    "no connection at all": ({}, "POST", [UNREACHABLE], ("upstream-unreachable", 3, "no"), [0, 0.25, 0.75]),
    "our own time-out": ({}, "GET", [SILENCE, 200], ("upstream-timeout", 1, "unknown"), [0]),
    "a reset, then a 503": ({}, "PUT", [RESET, busy(), 200], (200, 3, "unknown"), [0, 0.25, 0.75]),
    "the last attempt counts": ({}, "PUT", [busy(), SILENCE], ("upstream-timeout", 2, "unknown"), [0, 0.25]),
    "a 503 that stays": ({}, "PUT", [busy()], (503, 3, "unknown"), [0, 0.25, 0.75]),
    "the 503 of a POST": ({}, "POST", [busy(), 200], (503, 1, "no"), [0]),
    "a 500": ({}, "GET", [busy(500), 200], (500, 1, "no"), [0]),
    "no retries": ({"retries": 0}, "GET", [RESET], ("upstream-closed", 1, "unknown"), [0]),
    "four": ({"retries": 4}, "GET", [RESET], ("upstream-closed", 5, "unknown"), [0, 0.25, 0.75, 1.75, 3.75]),
    "jitter": ({"jitter": 0.0}, "GET", [RESET], ("upstream-closed", 3, "unknown"), [0, 0.125, 0.375]),
    "stale": ({}, "GET", [STALE, 200], (200, 2, "unknown"), [0, 0]),
    "stale, no retries": ({"retries": 0}, "GET", [STALE, 200], ("upstream-closed", 1, "unknown"), [0]),
    "Retry-After": ({}, "GET", [busy(Retry_After="7"), 200], (200, 2, "unknown"), [0, 7]),
    "no time": ({}, "GET", [busy(Retry_After="soon"), 200], (200, 2, "unknown"), [0, 0.25]),
    "its own clock": ({}, "PUT", [busy(Date=ON_THE_HOUR, Retry_After=LATER), 200], (200, 2, "unknown"), [0, 3]),
    "our clock": ({}, "GET", [busy(Retry_After=LONG_AGO), 200], (200, 2, "unknown"), [0, 1]),
    "beyond the budget": ({}, "GET", [busy(Retry_After="21"), 200], (503, 1, "no"), [0]),
    "slow failures": ({"lasts": 9}, "GET", [RESET], ("upstream-closed", 3, "unknown"), [0, 9.25, 18.75]),
    "slower ones": ({"lasts": 12}, "GET", [RESET], ("upstream-closed", 2, "unknown"), [0, 12.25]),
    "the slowest": ({"lasts": 20}, "GET", [RESET], ("upstream-closed", 1, "unknown"), [0]),
    "a small budget": ({"max_wait": 0.5}, "GET", [RESET], ("upstream-closed", 2, "unknown"), [0, 0.25]),
    "just enough": ({"max_wait": 0.75}, "GET", [RESET], ("upstream-closed", 3, "unknown"), [0, 0.25, 0.75]),
    "none": ({"max_wait": 0}, "GET", [RESET], ("upstream-closed", 1, "unknown"), [0]),
    "a slow answer": ({"lasts": 90}, "GET", [200], (200, 1, "no"), [0]),
    "a slot for each": ({"rate": (2, 10.0)}, "GET", [RESET, RESET, 200], (200, 3, "unknown"), [0, 0.25, 10.01]),
    "no slot for another": ({"rate": (1, 60.0)}, "PUT", [busy()], (503, 1, "unknown"), [0]),
    "none after a reset": ({"rate": (1, 60.0)}, "PUT", [RESET], ("upstream-closed", 1, "unknown"), [0]),
    "a large body": ({"body": LARGE}, "PUT", [200], (200, 1, "no"), [0]),
    "it waits for a connection": ({"body": LARGE * 5}, "POST", [UNREACHABLE, 201], (201, 2, "no"), [0, 0.25]),
    "a large body, reset": ({"body": LARGE}, "PUT", [RESET, 200], ("upstream-closed", 1, "unknown"), [0]),
    "a large body, 503": ({"body": LARGE}, "PUT", [busy(), 200], (503, 1, "no"), [0]),
    "a large body, 401": ({"body": LARGE}, "PUT", [401, 200], ("retry-with-new-token", 1, "no"), [0]),
    "a large body, 429": ({"body": LARGE}, "PUT", [Reply(429, b"in 3 s"), 200], ("quota-exceeded", 1, "no"), [0]),
    "nobody waits": ({"left": True}, "PUT", [201], (201, 1, "no"), [0]),
    "for another attempt": ({"left": True}, "PUT", [RESET, 200], ("upstream-closed", 1, "unknown"), [0]),
    "nor a connection": ({"left": True}, "POST", [UNREACHABLE, 200], ("upstream-unreachable", 1, "no"), [0]),
    "nor after a 503": ({"left": True}, "PUT", [busy(), 200], (503, 1, "no"), [0]),
    "nor after a 401": ({"left": True}, "POST", [401, 200], ("retry-with-new-token", 1, "no"), [0]),
    "nor after a 429": ({"left": True} | MINUTE, "POST", [429, 200], ("quota-exceeded", 1, "no"), [0]),
    "pass-through": (THROUGH, "PUT", [RESET, 200], ("upstream-closed", 1, "unknown"), [0]),
    "pass-through, 503": (THROUGH, "PUT", [busy(), 200], (503, 1, "no"), [0]),
    "pass-through, 401": (THROUGH, "POST", [401, 200], (401, 1, "no"), [0]),
    "pass-through, 429": (THROUGH, "POST", [429, 200], (429, 1, "no"), [0]),
    "no other token": ({"broken": True}, "POST", [401, 200], ("token-unavailable", 1, "no"), [0]),
    "deleted maybe": ({}, "DELETE", [RESET, 404], (404, 2, "unknown"), [0, 0.25]),
    "deleted maybe, 503": ({}, "DELETE", [busy(), 404], (404, 2, "unknown"), [0, 0.25]),
    "never deleted": ({}, "DELETE", [UNREACHABLE, 404], (404, 2, "no"), [0, 0.25]),
    "not found at first": ({}, "DELETE", [404], (404, 1, "no"), [0]),
    **{f"401 {method}": ({}, method, [401, 200], (200, 2, "no"), [0, 1]) for method in METHODS},
    "a second 401 in a row": ({}, "POST", [401], (401, 2, "no"), [0, 1]),
    "not in a row": ({}, "GET", [401, busy(Retry_After="3"), 401, 200], (200, 4, "unknown"), [0, 1, 4, 4]),
    **{f"429 {method}": ({}, method, [Reply(429, Retry_After="5"), 200], (200, 2, "no"), [0, 5]) for method in METHODS},
    "429, a line": (MINUTE, "POST", [Reply(429, Retry_After="5"), 200], (200, 2, "no"), [0, 5]),
    "429, its clock": ({}, "PUT", [Reply(429, Date=ON_THE_HOUR, Retry_After=LATER), 200], (200, 2, "no"), [0, 3]),
    "429, both": ({}, "PUT", [Reply(429, b"in 9 seconds", Retry_After="5"), 200], (200, 2, "no"), [0, 5]),
    "429, text": (MINUTE, "PUT", [Reply(429, b"Please try ", b"again in 7 seconds."), 200], (200, 2, "no"), [0, 7]),
    "429, long": ({}, "PUT", [Reply(429, b"x" * 9000, b"in 7 seconds."), 200], (200, 2, "no"), [0, 1]),
    "429, broken": ({}, "PUT", [Reply(429, b"try again in 7 sec", RESET), 200], (200, 2, "no"), [0, 1]),
    "429, no line": ({}, "PUT", [429, 200], (200, 2, "no"), [0, 1]),
    "429, our window": ({"rate": (100, 10.0)}, "PUT", [429, 200], (200, 2, "no"), [0, 10.01]),
    "429, for ever": ({}, "POST", [429], ("quota-exceeded", 21, "no"), [*range(21)]),
}


@pytest.mark.parametrize(("setting", "method", "outcomes", "expected", "times"), CASES.values(), ids=CASES)
async def test_attempts(
    setting: dict[str, Any],
    method: str,
    outcomes: list[Outcome],
    expected: tuple[int | str, int, str],
    times: list[float],
) -> None:
    """When a request is sent again and what it ends in; and what holds for all of them."""
    request = {name: setting[name] for name in ("pass_through", "key") if name in setting}
    body = setting.get("body", b"{}")
    others = ("body", "left", "broken", *request)
    async with Rig(**{name: value for name, value in setting.items() if name not in others}) as rig:
        rig.upstream.outcomes, rig.source.broken = [*outcomes], "broken" in setting
        asked = rig.ask(method, body=body, **request)
        asked.exchange.client_left = "left" in setting
        await rig.run(asked)
        assert (expected, times) == (asked.outcome, rig.upstream.times)
        status, attempts, sent = expected
        passed_on = isinstance(status, int)
        assert [True] * (len(rig.upstream.closed) - passed_on) + [False] * passed_on == rig.upstream.closed
        assert not passed_on or (HTML if status in {500, 503} else b"") == await asked.text()
        assert {body} >= set(rig.upstream.bodies)
        failed = next((at for at, outcome in enumerate(outcomes) if isinstance(outcome, UpstreamFailure)), attempts)
        assert [at > failed for at in range(attempts)] == rig.upstream.fresh
        heads = rig.upstream.heads
        assert min(1 + outcomes.count(401), len(heads)) == len({*rig.upstream.bearers}) == len({*heads})
        assert ("pass_through" in setting and bool(heads)) is ("" in rig.upstream.bearers)
        assert ("pass_through" in setting) <= (not rig.line.snapshot().used)
        assert pytest.approx(rig.time.now() - 1000 - attempts * rig.lasts) == asked.exchange.waited
        assert 0 < asked.exchange.upstream
        assert asked.exchange.hide_challenge is (status == 401 and "pass_through" not in setting)
        maybe = (method, status) == ("DELETE", 404) and sent == "unknown"
        assert ("repeated-after-unknown" if maybe else None) == asked.exchange.note


@pytest.mark.parametrize(("max_wait", "lasts", "expected"), [(5.0, 4.9, 4.9), (5.0, 9.0, 5.0)])
async def test_waiting_for_the_token_counts(max_wait: float, lasts: float, expected: float) -> None:
    """It is paid from the same budget as backing off, and is told."""
    async with Rig(max_wait=max_wait) as rig:
        rig.time.jump(900)
        rig.source.lasts, rig.upstream.outcomes = lasts, [RESET]
        asked = await rig.run(rig.ask())
        assert ["upstream-closed", "token-unavailable"][lasts > max_wait] == asked.outcome[0]
        assert expected == pytest.approx(asked.exchange.waited)


@pytest.mark.parametrize("outcomes", [[200], [busy(), 200], [busy()], [RESET, 200], [RESET], [SILENCE], [401], [429]])
async def test_nothing_of_it_stays(rig: Rig, outcomes: list[Outcome]) -> None:
    """Once a write has ended and its answer was passed on, nobody remembers it, nor waits for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        rig.upstream.outcomes = [*outcomes]
        asked = await rig.run(rig.ask("PUT"))
        assert asked.outcome
        asked.exchange.let_go()
        exchange = weakref.ref(asked.exchange)
        del asked
        assert exchange() is None
    finally:
        gc.enable()


async def test_no_repeat_after_all(rig: Rig) -> None:
    """Where there is no token for a repeat, what the last attempt ended in is passed on, whole."""
    rig.source.broken = True
    await rig.time.advance(899.9)
    rig.upstream.outcomes = [busy()]
    asked = await rig.run(rig.ask("PUT"))
    assert (503, 1, "unknown") == asked.outcome
    assert HTML == await asked.text()


@pytest.mark.parametrize(
    "outcome", [UNREACHABLE, RESET, busy(), 401, Reply(429, ends=False), Reply(429, Retry_After="5")]
)
async def test_cancelled_between_two_attempts(rig: Rig, outcome: Outcome) -> None:
    """A write that waits for another attempt is not under way: it can be cancelled, and closes the answer it has."""
    rig.source.lasts = 1.0
    rig.upstream.outcomes = [outcome, 200]
    asked = rig.ask("PUT", body=b"{}")
    await rig.time.settle()
    assert (False, False) == (asked.task.done(), asked.exchange.on_its_way)
    asked.task.cancel()
    await rig.time.settle()
    assert asked.task.cancelled()
    assert all(rig.upstream.closed)
    assert 1 == len(rig.upstream.times)


# The body, while the request waits


@pytest.mark.parametrize(("pieces", "unread"), [((9, 9), 0), ((LIMIT, 9), 9), ((9, LIMIT, 9), LIMIT + 9)])
async def test_the_body_is_read_ahead_while_waiting(rig: Rig, pieces: tuple[int, ...], unread: int) -> None:
    """While a request waits, its body is read up to the limit and no further; the rest follows when it goes out."""
    rig.upstream.outcomes = [UNREACHABLE, 200]
    asked = rig.ask("POST", whole=False)
    for size in pieces:
        await rig.time.settle()
        asked.client.feed(b"x" * size)
    await rig.time.settle()
    rest = asked.client.read_nowait()
    assert unread == len(rest)
    asked.client.unread(rest)
    await rig.time.advance(0.25)
    assert [0, 0.25] == rig.upstream.times
    asked.client.end()
    assert (200, 2, "no") == (await rig.run(asked)).outcome
    assert [sum(pieces)] == [len(body) for body in rig.upstream.bodies]


@pytest.mark.parametrize("waits_for", ["token", "quota", "backoff"])
@pytest.mark.parametrize("breaks", [True, False])
async def test_a_client_that_leaves_ends_the_wait(waits_for: str, *, breaks: bool) -> None:
    """Whether its body breaks or it is cancelled: no more is sent, and neither a task nor its place is left."""
    async with Rig((1, 60.0), max_wait=100.0) as rig:
        await rig.answer()
        await rig.time.advance(0 if waits_for == "quota" else 61)
        if waits_for == "token":
            rig.source.lasts = 50
            rig.time.jump(900)
        rig.upstream.outcomes = [UNREACHABLE if waits_for == "backoff" else 200]
        asked = rig.ask("POST", body=b"x", whole=False)
        await rig.time.settle()
        attempts = len(rig.upstream.times)
        assert (False, False) == (asked.task.done(), asked.exchange.on_its_way)
        if breaks:
            asked.client.fail(ConnectionResetError())
        else:
            asked.task.cancel()
        with pytest.raises(ConnectionResetError if breaks else asyncio.CancelledError):
            await asked.task
        await rig.time.advance(61)
        assert (attempts, 0) == (len(rig.upstream.times), rig.line.snapshot().waiting)


# The token

REFUSED: Final = "/documents/7?as=pdf"


def refusing(head: bytes, revoked: bytes = b"-") -> int:
    """One resource answers 401 whatever the token, the others where it was revoked."""
    return 401 if b"/documents/7" in head or b"Bearer " + revoked in head else 200


async def test_a_resource_that_answers_401_whatever_the_token(rig: Rig) -> None:
    """Its first 401 costs a login; those after it, whatever their query, are passed on at once while others take it."""
    rig.upstream.outcomes = [refusing]
    assert (401, 2, "no") == await rig.answer("POST", REFUSED)
    for number in range(20):
        await rig.time.advance(59)
        assert (200, 1, "no") == await rig.answer()
        asked = await rig.run(rig.ask("POST", f"/documents/7?{number}"))
        assert ((401, 1, "no"), True) == (asked.outcome, asked.exchange.hide_challenge)
    assert 3 == rig.source.logins, "the third one is the renewal after 12 minutes"
    await rig.time.advance(61)
    assert [(401, 2, "no"), (401, 1, "no")] == [await rig.answer("POST", REFUSED) for _ in range(2)]
    assert 4 == rig.source.logins, "without others, one login a minute at most"


async def test_such_a_resource_that_comes_round(rig: Rig) -> None:
    """An answer of another kind clears the mark: the next 401 is one for a new token again."""
    rig.upstream.outcomes = [401, 401, 404, 401, 200]
    assert [(401, 2), (404, 1), (200, 2)] == [(await rig.answer(path=REFUSED))[:2] for _ in range(3)]
    assert ["T1", "T2", "T2", "T2", "T3"] == rig.upstream.bearers


async def test_neighbours_of_such_a_resource(rig: Rig) -> None:
    """While a 401 has a renewal made, all others go on with the token that they have; then the new one serves all."""
    rig.upstream.outcomes, rig.source.lasts = [refusing], 3.0
    await rig.time.advance(5)
    asked = rig.ask(path=REFUSED)
    for _ in range(5):
        await rig.time.advance(0.5)
        assert (200, 1, "no") == await rig.answer()
    assert (401, 2, "no") == (await rig.run(asked)).outcome
    assert (200, 1, "no") == await rig.answer()
    assert ["T1"] * 6 + ["T2"] * 2 == rig.upstream.bearers
    assert [5, 5.5, 6, 6.5, 7, 7.5, 8, 8] == rig.upstream.times


async def test_a_token_that_died(rig: Rig) -> None:
    """Though another resource is marked, all others have one renewal for all, and one replay each."""
    rig.upstream.outcomes = [refusing]
    await rig.answer(path=REFUSED)
    await rig.time.advance(5)
    rig.upstream.outcomes, rig.upstream.lasts = [lambda head: refusing(head, b"T2")], 0.5
    many = [rig.ask("POST", f"/{number}", b"{}") for number in range(100)]
    assert {(200, 2, "no")} == {(await rig.run(asked)).outcome for asked in many}
    assert (401, 1, "no") == await rig.answer(path=REFUSED)
    assert 3 == rig.source.logins


async def test_a_late_401(rig: Rig) -> None:
    """It does not throw a newer token away, and a second one in a row is passed on however old that token is."""
    rig.upstream.outcomes, rig.upstream.lasts = [401], 45.0
    late = rig.ask()
    await rig.time.advance(2.0)
    rig.tokens.reject(AccessToken("T1", 1000.0, 900.0))
    assert (401, 2, "no") == (await rig.run(late)).outcome
    assert (["T1", "T2"], 2) == (rig.upstream.bearers, rig.source.logins)


async def test_large_uploads_that_met_a_401(rig: Rig) -> None:
    """What can't be replayed is told once to come again, by when there is a new token; the second 401 is passed on."""
    rig.upstream.outcomes = [lambda head: refusing(head, b"T1")]
    asked = [await rig.run(rig.ask("PUT", path, LARGE)) for path in ("/1", REFUSED, REFUSED)]
    assert [("retry-with-new-token", 1)] * 3 == [(one.outcome[0], one.error.retry_after) for one in asked]
    await rig.time.advance(1.0)
    assert [(200, 1, "no"), (401, 1, "no")] == [await rig.answer("PUT", path, LARGE) for path in ("/1", REFUSED)]
    assert 2 == rig.source.logins


async def test_a_large_upload_while_logins_fail(rig: Rig) -> None:
    """It is told to come again when there may be a new token, which is not in a second."""
    rig.source.broken = True
    await rig.time.advance(750)
    rig.upstream.outcomes = [401]
    asked = await rig.run(rig.ask("POST", body=LARGE))
    assert 1 < rig.tokens.state.next_login_in <= cast("int", asked.error.retry_after)


async def test_a_token_that_ended_in_the_line() -> None:
    """After waiting for the quota a request goes out with a token that is still good; else its slot is free again."""
    async with Rig((1, 30.0), max_wait=100.0) as rig:
        await rig.answer()
        asked = rig.ask()
        await rig.time.advance(10)
        rig.tokens.reject(AccessToken("T1", 1000.0, 900.0))
        await rig.run(asked)
        assert ["T1", "T2"] == rig.upstream.bearers
        rig.source.broken = True
        await rig.time.advance(865)
        assert [(200, 1, "no"), ("token-unavailable", 0, "no")] == [await rig.answer() for _ in range(2)]
        assert 0 == rig.line.snapshot().used


# The quota


async def test_a_slot_counts_from_sending_until_a_window_after_the_answer() -> None:
    """A slot is taken while the request is under way, and for one window after its answer or failure."""
    async with Rig((1, 10.0), lasts=5.0) as rig:
        asked = rig.ask()
        await rig.time.advance(4.0)
        assert (1, 1) == rig.line.snapshot()[2:4]
        await rig.run(asked)
        assert (1, 0) == rig.line.snapshot()[2:4]
        rig.upstream.outcomes, rig.upstream.lasts = [SILENCE], 0.0
        assert ("upstream-timeout", 1, "unknown") == await rig.answer()
        assert [0, 15.01] == rig.upstream.times
        assert (1, 0) == rig.line.snapshot()[2:4]


async def test_what_was_never_sent_takes_no_slot() -> None:
    """While no connection can be made a slot is held; then it comes back, and requests that wait for it go at once."""
    async with Rig((20, 60.0), 0.7, retries=0, max_wait=120.0, lasts=10.0) as rig:
        rig.upstream.outcomes = [UNREACHABLE]
        many = [rig.ask("POST") for _ in range(26)]
        await rig.time.advance(9.9)
        assert 14 <= rig.line.snapshot().in_flight == rig.line.snapshot().used < 26
        await rig.time.advance(0.2)
        assert 0 == rig.line.snapshot().waiting
        assert {("upstream-unreachable", 1, "no")} == {(await rig.run(asked)).outcome for asked in many}
        assert (True, 0, 0) == (rig.time.now() <= 1020.1, *rig.line.snapshot()[2:4])


async def test_cancelled_while_it_connects() -> None:
    """The slot of a request whose client leaves before there is a connection comes back at once."""
    async with Rig((1, 60.0), max_wait=90.0, lasts=10.0) as rig:
        rig.upstream.outcomes = [UNREACHABLE, 200]
        first, second = rig.ask("POST"), rig.ask("POST")
        await rig.time.advance(1.0)
        assert 1 == rig.line.snapshot().waiting
        first.task.cancel()
        assert (200, 1, "no") == (await rig.run(second)).outcome
        assert [0, 1] == rig.upstream.times


async def test_an_answer_that_came_sooner_than_expected() -> None:
    """Who waits goes as soon as the slot is really free, not when it was expected to be."""
    async with Rig((2, 10.0), lasts=16.0) as rig:
        slow = [rig.ask(), rig.ask()]
        await rig.time.advance(40.0)
        rig.upstream.lasts = 1.0
        for asked in [*slow, rig.ask(), rig.ask(), rig.ask()]:
            await rig.run(asked)
        assert [0, 0, 40, 40, 51.01] == rig.upstream.times


@pytest.mark.parametrize(
    ("setting", "earlier", "outcome", "body", "retry_after", "why"),
    [
        ({"rate": (1, 60.0)}, 1, 200, b"", 61, "Its turn would come too late: the quota is spread over the time"),
        (
            MINUTE,
            0,
            Reply(429, b"Please try again in 30 seconds."),
            b"",
            30,
            "Metquay answered that its limit is reached",
        ),
        (MINUTE, 0, 429, LARGE, 61, "Metquay answered that its limit is reached"),
        ({}, 0, Reply(429, Retry_After="30"), b"", 30, "Metquay answered that its limit is reached"),
    ],
)
async def test_what_a_refusal_says(  # noqa: PLR0913 - the columns of the table
    setting: dict[str, Any], earlier: int, outcome: Outcome, body: bytes, retry_after: int, why: str
) -> None:
    """What can't be sent within MAX_WAIT is refused at once: not executed, why, and truly when to come back."""
    async with Rig(**setting) as rig:
        for _ in range(earlier):
            await rig.answer()
        rig.upstream.outcomes = [outcome]
        asked = await rig.run(rig.ask("POST", body=body))
        assert ("quota-exceeded", 1 - earlier, "no") == asked.outcome
        assert retry_after == asked.error.retry_after
        assert asked.error.message.startswith(why)
        assert f"Nothing was changed. Send it again in {retry_after} s" in asked.error.message
        assert 1000 == rig.time.now()
        rig.upstream.outcomes = [200]
        await rig.time.advance(retry_after)
        assert (200, 1, "no") == await rig.answer("POST", body=body)


async def test_a_429_closes_the_window_for_all() -> None:
    """One 429 holds everybody back; those in the line that can't wait so long are refused at once."""
    async with Rig((2, 30.0), 0.5, lasts=1.0) as rig:
        rig.upstream.outcomes = [Reply(429, Retry_After="60"), 200]
        first, second = rig.ask(), rig.ask()
        await rig.time.advance(1.0)
        assert [("quota-exceeded", 1, "no"), ("quota-exceeded", 0, "no")] == [first.outcome, second.outcome]
        assert 60 <= cast("int", second.error.retry_after)
    async with Rig((100, 60.0)) as rig:
        rig.upstream.outcomes = [Reply(429, Retry_After="15"), 200]
        first = rig.ask()
        await rig.time.settle()
        second = rig.ask()
        assert [(200, 2), (200, 1)] == [(await rig.run(asked)).outcome[:2] for asked in (first, second)]
        assert [0, 15] == rig.upstream.times[:2]


# PUT and DELETE, and what came between


@pytest.mark.parametrize(("method", "between"), [("PUT", "PATCH"), ("PUT", "DELETE"), ("DELETE", "POST")])
@pytest.mark.parametrize("failure", [RESET, busy()])
@pytest.mark.parametrize("lasts", [0.0, 1.0], ids=["while it backs off", "while it runs"])
async def test_overtaken(rig: Rig, method: str, between: str, failure: Outcome, lasts: float) -> None:
    """A PUT or DELETE is not repeated once another write to the same target was forwarded, not even from its pause."""
    rig.upstream.outcomes, rig.upstream.lasts = [failure, 200], lasts
    first = rig.ask(method, "/customers/1")
    await rig.time.settle()
    rig.upstream.lasts = 0.0
    assert (200, 1, "no") == await rig.answer(between, "/customers/1")
    assert ("upstream-closed" if failure is RESET else 503, 1) == (await rig.run(first)).outcome[:2]
    assert failure is RESET or HTML == await first.text()
    assert 2 == len(rig.upstream.times)


@pytest.mark.parametrize("outcome", [401, Reply(429, Retry_After="5")])
async def test_overtaken_after_a_second_attempt(rig: Rig, outcome: Outcome) -> None:
    """Nor where the second attempt was certainly not executed, as long as the first may have been."""
    rig.source.lasts = 1.0
    rig.upstream.outcomes = [STALE, outcome, 200]
    first = rig.ask("PUT", "/customers/1")
    await rig.time.settle()
    assert (200, 1, "no") == await rig.answer("PUT", "/customers/1")
    assert ("outcome-unknown", 2, "unknown") == (await rig.run(first)).outcome
    assert 3 == len(rig.upstream.times)


async def test_the_later_one_is_repeated(rig: Rig) -> None:
    """Of two writes to one target the later one may be repeated, and so may those to others, and reads."""
    rig.upstream.outcomes = [503, 503, 503, 503, 200]
    requests = [("PUT", "/1"), ("PUT", "/1"), ("PUT", "/2"), ("GET", "/1")]
    asked = [rig.ask(*request) for request in requests]
    assert [(503, 1), (200, 2), (200, 2), (200, 2)] == [(await rig.run(one)).outcome[:2] for one in asked]
    rig.upstream.outcomes = [RESET, 200]
    assert (200, 2, "unknown") == await rig.answer("PUT", "/1"), "what has ended overtakes nothing"


@pytest.mark.parametrize(("others", "outcome"), [(255, (200, 2)), (256, (503, 1))])
async def test_more_writes_than_are_known(rig: Rig, others: int, outcome: tuple[int, int]) -> None:
    """Where other targets have taken the place of its own, a PUT is not repeated: another one may have come between."""
    rig.upstream.outcomes, rig.upstream.lasts = [busy(), 200], 1.0
    first = rig.ask("PUT", "/customers/1")
    await rig.time.settle()
    rig.upstream.lasts = 0.0
    for number in range(others):
        for _ in range(2):
            assert (200, 1, "no") == await rig.answer("POST", f"/{number}")
    assert outcome == (await rig.run(first)).outcome[:2]


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (RESET, ("upstream-closed", 1, "unknown")),
        (STALE, ("upstream-closed", 1, "unknown")),
        (busy(), (503, 1, "no")),
        (UNREACHABLE, (200, 2, "no")),
        (401, (200, 2, "no")),
        (Reply(429, Retry_After="5"), (200, 2, "no")),
    ],
)
async def test_other_replicas(method: str, outcome: Outcome, expected: tuple[int | str, int, str]) -> None:
    """Where replicas share, one may have written meanwhile: only what was certainly not executed is sent again."""
    async with Rig(records=Records()) as rig:
        rig.upstream.outcomes = [outcome, 200]
        assert expected == await rig.answer(method, body=b"{}")
        rig.upstream.outcomes = [busy(), 200]
        assert 2 == (await rig.answer("GET"))[1]


async def test_posts_do_not_overtake_each_other(rig: Rig) -> None:
    """POSTs to one list that found no connection are all sent again."""
    rig.upstream.outcomes = [UNREACHABLE, UNREACHABLE, UNREACHABLE, 201]
    asked = [rig.ask("POST") for _ in range(3)]
    assert [(201, 2, "no")] * 3 == [(await rig.run(one)).outcome for one in asked]


async def test_overtaken_in_the_line() -> None:
    """A PUT that is overtaken while its repeat waits for the quota gives the slot back."""
    async with Rig((1, 10.0), max_wait=60.0) as rig:
        rig.upstream.outcomes = [RESET, 200]
        first = rig.ask("PUT", caller="a")
        await rig.time.settle()
        second = rig.ask("PUT", caller="b")
        await rig.time.advance(1.0)
        asked = [first, second, rig.ask("GET", caller="c")]
        assert ["upstream-closed", 200, 200] == [(await rig.run(one)).outcome[0] for one in asked]
        assert [0, 10.01, 20.02] == rig.upstream.times


# Idempotency-Key

HEAD: Final = len("HTTP/1.1 201 Reason\r\n\r\n")


@pytest.mark.parametrize("pieces", [(b'{"metquayId": 1}',), (b'{"metquay', b'Id": 1}'), ()])
@pytest.mark.parametrize("sized", [True, False])
async def test_the_recorded_answer(rig: Rig, pieces: tuple[bytes, ...], *, sized: bool) -> None:
    """The second POST with a key gets the first one's answer; nothing is sent."""
    whole = b"".join(pieces)
    fields = {"Content_Length": str(len(whole))} if sized else {"Location": "/x"}
    rig.upstream.outcomes = [Reply(201, *pieces, **fields), 500]
    first, second = await rig.post(), await rig.post()
    assert [(201, 1, "yes"), (201, 0, "no")] == [first.outcome, second.outcome]
    assert [False, True] == [first.exchange.replayed, second.exchange.replayed]
    assert [whole, whole] == [await first.text(), await second.text()]
    assert first.task.result().head == second.task.result().head


async def test_in_progress(rig: Rig) -> None:
    """While the first runs, with or without its client, a second one is told so."""
    rig.upstream.lasts = 5.0
    first = rig.ask("POST", key="k1", body=b"{}")
    await rig.time.settle()
    first.exchange.client_left = True
    assert ("in-progress", 0, "unknown") == (await rig.post()).outcome
    await rig.run(first)
    assert (200, 0, "no") == (await rig.post()).outcome


@pytest.mark.parametrize("outcome", [RESET, SILENCE, 500, 503, 302])
async def test_an_unknown_outcome(rig: Rig, outcome: Outcome) -> None:
    """Where nobody knows whether the first was executed, a second one is not sent, and no other body with its key."""
    rig.upstream.outcomes = [outcome, 201]
    await rig.post()
    assert ("outcome-unknown", 0, "unknown") == (await rig.post()).outcome
    assert ("idempotency-key-reused", 0, "no") == (await rig.post(b"[]")).outcome


@pytest.mark.parametrize("outcome", [UNREACHABLE, 400, 422, Reply(429, Retry_After="60")])
async def test_not_executed(rig: Rig, outcome: Outcome) -> None:
    """What proves that nothing was executed frees the key, and so does a refusal of the quota's."""
    rig.upstream.outcomes = [outcome] * (3 if outcome is UNREACHABLE else 1) + [201]
    assert "no" == (await rig.post()).outcome[2]
    assert (201, 1, "yes") == (await rig.post(b"[]")).outcome


@pytest.mark.parametrize(("lasts", "expected"), [(0.0, 200), (5.0, "outcome-unknown")], ids=["queued", "sent"])
async def test_cancelled_with_a_key(lasts: float, expected: object) -> None:
    """A POST that is cancelled in the line frees its key; one that was sent leaves an unknown outcome."""
    async with Rig((1, 10.0), lasts=lasts) as rig:
        if not lasts:
            await rig.answer()
        asked = rig.ask("POST", key="k1", body=b"{}")
        await rig.time.settle()
        asked.task.cancel()
        await rig.time.advance(11)
        rig.upstream.lasts = 0.0
        assert expected == (await rig.post()).outcome[0]


@pytest.mark.parametrize(
    ("pieces", "again"),
    [
        ((b"x" * (MAX_ANSWER - HEAD),), (201, 0, "no")),
        ((b"x" * (MAX_ANSWER - HEAD + 1),), ("outcome-unknown", 0, "yes")),
        ((b"x" * (MAX_ANSWER + 1),), ("outcome-unknown", 0, "yes")),
        ((b"x" * MAX_ANSWER, b"y", b"z"), ("outcome-unknown", 0, "yes")),
    ],
)
async def test_a_long_answer(rig: Rig, pieces: tuple[bytes, ...], again: object) -> None:
    """An answer beyond 64 KiB, its head included, reaches its client whole, but only that it came is recorded."""
    rig.upstream.outcomes = [Reply(201, *pieces)]
    assert b"".join(pieces) == await (await rig.post()).text()
    assert again == (await rig.post()).outcome


async def test_an_answer_that_broke_off(rig: Rig) -> None:
    """A 2xx whose body broke off was executed, and the second one is told so."""
    rig.upstream.outcomes = [Reply(201, b'{"metq', UpstreamFailure("upstream-closed", "-", sent="yes"))]
    assert ("upstream-closed", 1, "yes") == (await rig.post()).outcome
    assert ("outcome-unknown", 0, "yes") == (await rig.post()).outcome
    assert [True] == rig.upstream.closed


async def test_scope_of_a_key(rig: Rig) -> None:
    """The same key of another client or for another path is another one; other methods have none."""
    for caller, path in (("", "/x"), ("a", "/x"), ("b", "/x"), ("a", "/y"), ("a", "/x?y")):
        assert (200, 1, "yes") == (await rig.post(caller=caller, path=path)).outcome
    assert (200, 1, "no") == await rig.answer("PUT", key="k1", body=b"{}")
    assert (200, 1, "no") == await rig.answer("GET", key="")


async def test_what_can_have_no_key(rig: Rig) -> None:
    """A key that is none is refused, and a body that can't be kept can't be compared: nothing is sent."""
    assert ("bad-request", 0, "no") == (await rig.post(key="")).outcome
    assert ("body-too-large", 0, "no") == (await rig.post(LARGE)).outcome
    assert (200, 1, "yes") == (await rig.post(LARGE[1:])).outcome


@pytest.mark.parametrize(
    ("method", "sent", "told"),
    [
        ("PUT", "unknown", "An earlier attempt may have been carried out: check in Metquay before you send it again."),
        ("GET", "unknown", "Nothing was changed. Send it again in "),
    ],
)
async def test_a_refusal_after_an_attempt_whose_end_is_unknown(method: str, sent: str, told: str) -> None:
    """It never says that nothing was changed where that is not known; a read changes nothing."""
    async with Rig(max_wait=5.0) as rig:
        rig.upstream.outcomes = [RESET, Reply(429, Retry_After="60")]
        asked = await rig.run(rig.ask(method))
        assert ("quota-exceeded", 2, sent) == asked.outcome
        assert told in asked.error.message


@pytest.mark.parametrize(
    ("prefer", "outcome"),
    [(b"\r\nPrefer: wait=60", (200, 1, "no")), (b"", ("token-unavailable", 0, "no"))],
)
async def test_a_tool_that_waits_across_failed_logins(prefer: bytes, outcome: tuple[int | str, int, str]) -> None:
    """Where it said how long it waits, it does so until a login goes well again; else 5 s after the first failure."""
    async with Rig() as rig:
        rig.source.broken = True
        await rig.time.advance(901)
        asked = rig.ask()
        asked.exchange.fields = RequestFields(prefer)
        await rig.time.advance(10)
        rig.source.broken = False
        assert outcome == (await rig.run(asked)).outcome
