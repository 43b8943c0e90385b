from __future__ import annotations

import asyncio
import itertools
import sys
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from metquay_proxy.exchange.tokens import TokenCache, suspend_aware_clock
from metquay_proxy.rules.credentials import AccessToken, CredentialsRejected, LoginBusy, LoginFailed, UpstreamDistrusted
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.renewal import WANTED_CEILING, TokenEvent
from tests.fake_time import FakeTime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MAX_WAIT = 20.0
OUTAGE = LoginFailed("Metquay's login answered with status 404.")
REFUSAL = CredentialsRejected("Metquay refused the key pair (status 401).")
BUSY = LoginBusy("Metquay's login answered with status 429.", 60.0)
FORGERY = UpstreamDistrusted("The certificate was not accepted.")


class Bench:
    """A cache, the source of its tokens, whose answers the test chooses, its time, and what its observer was told."""

    def __init__(self, chance: Callable[[], float] = lambda: 0.0) -> None:
        self.time = FakeTime()
        self.error: BaseException | None = None
        self.lifetime = 900.0
        self.duration = self.farewell = 0.0
        self.starts: list[float] = []
        self.granted: AccessToken | None = None
        self.running = self.broken = False
        self.events: list[TokenEvent] = []
        self.cache = TokenCache(
            self, clock=self.clock, sleep=self.time.sleep, random=chance, observer=self.events.append
        )

    async def token(self) -> AccessToken:
        """Log in; ``granted`` is the last token that did not come too late to live."""
        assert not self.running, "two logins at a time"
        self.running = True
        now = self.time.now()
        self.starts.append(now)
        try:
            await self.time.sleep(self.duration)
            if self.error is not None:
                raise self.error
        finally:
            await self.time.sleep(self.farewell)
            self.running = False
        token = AccessToken(f"token-{len(self.starts)}", now, self.lifetime)
        self.granted = token if token.usable(self.time.now()) else self.granted
        return token

    def clock(self) -> float:
        """Read the time, unless that is broken."""
        return self.time.now() / (not self.broken)

    def usable(self) -> AccessToken:
        """Return the token that is usable now."""
        token = self.cache.current(self.time.now())
        assert token is not None
        return token

    async def started(self) -> AccessToken:
        """Start with a good login, and return its token."""
        self.cache.start()
        await self.time.settle()
        return self.usable()

    def ask(self, max_wait: float = MAX_WAIT, rejected: AccessToken | None = None) -> asyncio.Task[AccessToken]:
        """A request begins that needs a token, perhaps since it was answered with 401."""
        if rejected is not None:
            self.cache.reject(rejected)
        return asyncio.get_running_loop().create_task(self.cache.get(max_wait, rejected))

    async def ending(self, task: asyncio.Task[AccessToken], within: float = 0) -> tuple[str, float | None]:
        """Return slug and Retry-After of a task that must end after exactly ``within`` seconds, with a ProxyError."""
        if within:
            await self.time.advance(within - 0.001)
            assert not task.done()
        await self.time.advance(0.002)
        assert task.done()
        error = task.exception()
        assert isinstance(error, ProxyError)
        return error.slug, error.retry_after


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A bench whose cache has not begun, closed at the end."""
    bench = Bench()
    yield bench
    await bench.cache.close()
    assert not bench.running


@pytest.fixture
async def heard() -> list[object]:
    """The classes of the exceptions that reach the loop's handler."""
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(type(context["exception"])))
    return heard


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux alone has CLOCK_BOOTTIME")
def test_linux_counts_suspended_time() -> None:
    """There it is the clock that runs on while the machine is suspended."""
    assert abs(suspend_aware_clock()() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no clock_gettime")
def test_macos_and_windows_count_suspended_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac in CLOCK_MONOTONIC, asked directly, since time.monotonic stops with it; Windows in time.monotonic."""
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(time, "clock_gettime", lambda number: number)
    assert time.CLOCK_MONOTONIC == suspend_aware_clock()()
    monkeypatch.setattr(sys, "platform", "win32")
    assert time.monotonic is suspend_aware_clock()


class TestTokenCache:
    async def test_obtained_at_start_and_renewed_ahead_of_its_end(self, bench: Bench) -> None:
        """Nobody has to ask for either; the old token serves during the renewal. Starting twice is once."""
        bench.cache.start()
        token = await bench.started()
        assert [TokenEvent("obtained", "", 900.0, 720.0)] == bench.events
        bench.duration = 10.0
        await bench.time.advance(725)
        assert token is await bench.cache.get(0)
        await bench.time.advance(5)
        assert "token-2" == bench.usable().value

    @pytest.mark.parametrize(
        ("error", "slug", "healed"), [(OUTAGE, "token-unavailable", 15), (REFUSAL, "credentials-rejected", 60)]
    )
    async def test_the_old_token_serves_to_its_real_end(
        self, bench: Bench, error: LoginFailed, slug: str, healed: float
    ) -> None:
        """Also where somebody saw a 401 for it; after that requests are refused, until it recovers by itself."""
        token = await bench.started()
        bench.error = error
        await bench.time.advance(899.9)
        assert slug == (await bench.ending(bench.ask(0, token)))[0]
        assert token is await bench.cache.get(0)
        await bench.time.advance(0.1)
        assert slug == (await bench.ending(bench.ask(0)))[0]
        bench.error = None
        await bench.time.advance(healed)
        assert bench.cache.state.ready
        assert "recovered" == bench.events[-1].kind

    @pytest.mark.parametrize("error", [REFUSAL, None])
    async def test_changed_keys_and_a_401_bring_a_login_at_once(self, bench: Bench, error: LoginFailed | None) -> None:
        """Also where nobody waits for it."""
        bench.error = error
        bench.cache.start()
        await bench.time.advance(5)
        bench.error = None
        bench.cache.hasten() if error else bench.cache.reject(bench.usable())
        await bench.time.settle()
        assert 2 == len(bench.starts)

    @pytest.mark.parametrize("error", [RuntimeError("SECRET"), asyncio.CancelledError(), TimeoutError("SECRET")])
    async def test_whatever_a_source_raises_is_a_failure(self, bench: Bench, error: BaseException) -> None:
        """The task survives a source's defect, a cancellation that leaked out of it too, and quotes it to nobody."""
        bench.error = error
        bench.cache.start()
        await bench.time.settle()
        assert ["failed"] == [event.kind for event in bench.events]
        assert "SECRET" not in f"{bench.events} {bench.cache.state}"
        bench.error = None
        await bench.time.advance(1)
        assert bench.cache.current(bench.time.now()) is not None

    async def test_a_login_without_end(self, bench: Bench) -> None:
        """A source that hangs is cancelled after a minute; the next login begins when it has cleaned up behind it."""
        bench.duration, bench.farewell = 10_000.0, 3.0
        bench.cache.start()
        await bench.time.advance(62)
        assert [] == bench.events
        await bench.time.advance(1)
        assert "did not finish in time" in bench.events[0].text
        bench.duration = bench.farewell = 0.0
        await bench.time.advance(1)
        assert "token-2" == bench.usable().value

    async def test_an_observer_that_raises(self, heard: list[object]) -> None:
        """A defect in the observer is heard of and does not end the renewals."""
        time = FakeTime()
        cache = TokenCache(Bench(), clock=time.now, sleep=time.sleep, random=lambda: 0.0, observer=lambda _: 1 // 0)
        cache.start()
        await time.advance(720)
        assert [ZeroDivisionError] * 2 == heard
        await cache.close()

    async def test_a_task_that_died_is_heard_of_and_replaced(self, bench: Bench, heard: list[object]) -> None:
        """Should the task itself die, the loop's handler hears of it and the next request starts another."""
        await bench.started()
        bench.broken = True
        await bench.time.advance(15)
        assert [ZeroDivisionError] == heard
        bench.broken = False
        await bench.time.advance(900)
        assert "token-2" == (await bench.cache.get(0.1)).value

    @pytest.mark.parametrize("again", [False, True])
    @pytest.mark.parametrize("leaving", [0, 1, 200])
    async def test_one_login_for_all(self, bench: Bench, again: bool, leaving: int) -> None:  # noqa: FBT001 - a column
        """Two hundred on a cold cache, or with the same 401, get the token of one login, whoever of them leaves."""
        rejected = await bench.started() if again else None
        await bench.time.advance(10)
        before = len(bench.starts)
        bench.duration = 2.0
        tasks = [bench.ask(rejected=rejected) for _ in range(200)]
        await bench.time.advance(1)
        for task in tasks[:leaving]:
            task.cancel()
        await bench.time.advance(1)
        tokens = await asyncio.gather(*tasks[leaving:])
        assert [bench.usable()] * len(tokens) == tokens
        assert before + 1 == len(bench.starts)

    @pytest.mark.parametrize(
        ("error", "duration", "ends", "told"),
        [
            pytest.param(None, 30.0, 20.0, ("token-unavailable", 1), id="as long as a login is under way"),
            pytest.param(OUTAGE, 3.0, 7.0, ("token-unavailable", 2), id="at most 5 s after a failure"),
            pytest.param(BUSY, 0.0, 0.0, ("token-unavailable", 60), id="not for a pause of Metquay's"),
            pytest.param(REFUSAL, 2.0, 2.0, ("credentials-rejected", 60), id="keys refused"),
            pytest.param(FORGERY, 0.0, 0.0, ("upstream-tls", 1), id="not trusted"),
        ],
    )
    async def test_how_a_wait_ends(
        self, bench: Bench, error: LoginFailed | None, duration: float, ends: float, told: tuple[str, int]
    ) -> None:
        """With a time to come back; the login that the request began goes on, and so do the attempts."""
        bench.error, bench.duration = error, duration
        assert told == await bench.ending(bench.ask(), ends)
        assert told == await bench.ending(bench.ask(0))
        bench.error = None
        await bench.time.advance(told[1] + 10 + duration)
        assert bench.cache.current(bench.time.now()) is not None

    async def test_a_request_brings_the_next_attempt_forward(self, bench: Bench) -> None:
        """Deep in the backoff a request is not left to wait for nothing; one that has left hurries nobody."""
        bench.error = OUTAGE
        bench.cache.start()
        await bench.time.advance(21)  # attempts after 0, 1, 3, 7 and 15 s; the next after 30
        task = bench.ask()
        await bench.time.settle()
        assert (6, 2.0) == (len(bench.starts), bench.cache.state.next_login_in)
        task.cancel()
        await bench.time.advance(3)
        assert (6, 12.0) == (len(bench.starts), bench.cache.state.next_login_in)
        bench.error = None
        assert "token-7" == (await bench.ask()).value

    async def test_a_rejected_token_serves_all_others_until_it_is_replaced(self, bench: Bench) -> None:
        """Who saw the 401 waits for a newer one; a late 401 for the old one gets it at once, and changes nothing."""
        old = await bench.started()
        await bench.time.advance(10)
        bench.duration = 3.0
        task = bench.ask(rejected=old)
        await bench.time.advance(2.9)
        assert old is await bench.cache.get(0)
        assert bench.cache.state.ready
        assert not task.done()
        await bench.time.advance(0.1)
        assert bench.usable() is await task is await bench.ask(0, old)
        await bench.time.advance(30)
        assert 2 == len(bench.starts)

    @pytest.mark.parametrize(("error", "logins"), [(None, 31), (OUTAGE, 20), (REFUSAL, 2)])
    async def test_load_never_hammers(self, bench: Bench, error: LoginFailed | None, logins: int) -> None:
        """Requests and 401s without end: a second or more from one login to the next."""
        await bench.started()
        bench.error = error
        tasks = []
        for _ in range(300):
            tasks.append(bench.ask(rejected=bench.usable()))
            await bench.time.advance(0.1)
        await bench.time.advance(MAX_WAIT)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert logins == len(bench.starts)

    @pytest.mark.parametrize("slept", [800, 8 * 3600])
    async def test_waking(self, bench: Bench, slept: float) -> None:
        """A token that is old is renewed by the first request, one that is dead is known to be so at once."""
        await bench.started()
        await bench.time.suspend(slept)
        assert (slept < 900) is (bench.cache.current(bench.time.now()) is not None)
        await bench.time.settle()
        assert "token-2" == (await bench.cache.get(0)).value

    @pytest.mark.parametrize(("error", "jump"), [(None, 8 * 3600), (REFUSAL, 3600), (None, -500), (REFUSAL, -500)])
    async def test_nobody_there(self, bench: Bench, error: LoginFailed | None, jump: float) -> None:
        """Without any request the task itself notices within 15 s of being awake, and logs in within another second."""
        bench.error = error
        bench.cache.start()
        await bench.time.settle()
        bench.error = None
        bench.time.jump(jump)
        await bench.time.advance(16)
        assert 2 == len(bench.starts)
        assert bench.cache.state.ready

    async def test_what_is_under_way_is_ended(self, bench: Bench) -> None:
        """The login and all waiting; nobody can begin to wait again, and nothing runs on. Closing twice is once."""
        bench.duration = 10.0
        task = bench.ask()
        await bench.time.settle()
        await bench.cache.close()
        await bench.cache.close()
        assert not bench.running
        assert ("shutting-down", 1) == await bench.ending(task)
        assert ("shutting-down", 1) == await bench.ending(bench.ask())
        bench.cache.start()
        await bench.time.advance(100)
        assert 1 == len(bench.starts)

    async def test_a_request_in_flight_keeps_its_token(self, bench: Bench) -> None:
        """A token that is usable stays so for what the proxy finishes."""
        token = await bench.started()
        await bench.cache.close()
        assert token is await bench.cache.get(0)


class CacheModel(RuleBasedStateMachine):
    """Any sequence of time, faults, requests, 401s and departures, held against what must always be true."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.bench = Bench(itertools.cycle([0.0, 0.3, 0.9, 0.6]).__next__)
        self.asked: dict[asyncio.Task[AccessToken], tuple[float, AccessToken | None]] = {}
        self.runner.run(self.advancing(0.0, self.bench.cache.start))

    async def advancing(self, seconds: float, act: Callable[[], object] = int) -> None:
        """Do something, let time pass in steps, and judge each request that has ended, or should have."""
        act()
        for _ in range(4):
            await self.bench.time.advance(seconds / 4)
            for task in [task for task in self.asked if task.done()]:
                _, rejected = self.asked.pop(task)
                error = task.exception()
                assert rejected != task.result() if error is None else isinstance(error, ProxyError)
                assert not isinstance(error, ProxyError) or 1 <= (error.retry_after or 0) <= 60
            assert all(self.bench.time.now() < until + 1e-6 for until, _ in self.asked.values())

    @rule(seconds=st.sampled_from([0.01, 0.4, 1.0, 4.0, 16.0, 61.0, 300.0]), asleep=st.sampled_from([0, 30, 1e5]))
    def advance(self, seconds: float, asleep: float) -> None:
        """Time passes, perhaps after the machine has slept; who waits may wait as long again."""
        self.asked = {task: (until + asleep, rejected) for task, (until, rejected) in self.asked.items()}
        self.runner.run(self.advancing(seconds, lambda: self.bench.time.jump(asleep)))

    @rule(
        error=st.sampled_from([None, OUTAGE, REFUSAL, RuntimeError("hunter2"), asyncio.CancelledError()]),
        duration=st.sampled_from([0.0, 0.3, 8.0]),
        lifetime=st.sampled_from([3.0, 60.0, 900.0]),
    )
    def logins_end_so(self, error: BaseException | None, duration: float, lifetime: float) -> None:
        """The source changes its mind."""
        self.bench.error, self.bench.duration, self.bench.lifetime = error, duration, lifetime

    @rule(limit=st.sampled_from([0.0, 3.0, 20.0]), again=st.booleans())
    def ask(self, limit: float, again: bool) -> None:  # noqa: FBT001 - hypothesis chooses it
        """A request comes, perhaps with a 401 for the token that is, or lately was, in use."""
        until, rejected = self.bench.time.now() + limit, self.bench.granted if again else None
        ask = lambda: self.asked.update({self.bench.ask(limit, rejected): (until, rejected)})  # noqa: E731
        self.runner.run(self.advancing(0.0, ask))

    @precondition(lambda self: self.asked)
    @rule()
    def leave(self) -> None:
        """The client that came first disconnects."""
        task = next(iter(self.asked))
        del self.asked[task]
        self.runner.run(self.advancing(0.0, task.cancel))

    @invariant()
    def the_newest_token_alone_is_current(self) -> None:
        """What is handed out is the last token that came, rejected or not, unless it is over."""
        newest = self.bench.granted
        now = self.bench.time.now()
        assert (newest if newest and newest.usable(now) else None) is self.bench.cache.current(now)

    @invariant()
    def logins_keep_their_distance(self) -> None:
        """A second from start to start; and while somebody waits, 4 s awake at most."""
        assert all(later - earlier > 1 - 1e-6 for earlier, later in itertools.pairwise(self.bench.starts))
        assert not self.asked or self.bench.cache.state.next_login_in <= WANTED_CEILING

    def teardown(self) -> None:
        """Whatever happened: once logins succeed there is a token within a minute, a slow login and a tick."""
        self.logins_end_so(None, 0.0, 900.0)
        self.runner.run(self.advancing(60.0 + 8.0 + 15.0))
        assert self.bench.cache.current(self.bench.time.now()) is not None
        assert "hunter2" not in f"{self.bench.events} {self.bench.cache.state}"
        self.runner.run(self.bench.cache.close())
        self.runner.close()


TestModel = CacheModel.TestCase
TestModel.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
