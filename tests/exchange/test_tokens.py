"""Each rule of the token: bought ahead of time, by one login at a time, never hammering, never lost to a caller."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from metquay_proxy.exchange import tokens as auth
from metquay_proxy.exchange.tokens import (
    AccessToken,
    Credentials,
    CredentialsRejected,
    LoginBusy,
    LoginFailed,
    TokenCache,
    TokenEvent,
    UpstreamDistrusted,
    oddities,
    parse_login,
    suspend_aware_clock,
)
from metquay_proxy.rules.errors import ProxyError
from tests.fake_time import FakeTime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

MAX_WAIT = 20.0
OUTAGE = LoginFailed("Metquay's login answered with status 503.")
REFUSAL = CredentialsRejected("Metquay refused the key pair (status 401).")


class Login:
    """A source whose answers the test chooses; it records when it was asked and refuses to be asked twice at once."""

    def __init__(self, time: FakeTime) -> None:
        self.time = time
        self.error: BaseException | None = None
        self.lifetime = 900.0
        self.duration = 0.0
        self.farewell = 0.0
        self.value: str | None = None
        self.starts: list[float] = []
        self.ends: list[tuple[float, AccessToken | BaseException | None]] = []
        self.running = False

    async def token(self) -> AccessToken:
        """Answer as told; in ``ends`` stands what came of it, None where the token came too late to live."""
        assert not self.running, "two logins at a time"
        self.running = True
        now = self.time.now()
        self.starts.append(now)
        try:
            if self.duration:
                await self.time.sleep(self.duration)
            if self.error is not None:
                raise self.error
            token = AccessToken(self.value or f"token-{len(self.starts)}", now, self.lifetime)
        except BaseException as error:
            self.ends.append((self.time.now(), error))
            raise
        finally:
            await self.time.sleep(self.farewell)
            self.running = False
        self.ends.append((self.time.now(), token if token.usable(self.time.now()) else None))
        return token


class Bench:
    """A cache, its source, its time, and what its observer was told."""

    def __init__(self, *, chance: Callable[[], float] = lambda: 0.0) -> None:
        self.time = FakeTime()
        self.login = Login(self.time)
        self.events: list[TokenEvent] = []
        self.cache = TokenCache(
            self.login, clock=self.time.now, sleep=self.time.sleep, random=chance, observer=self.events.append
        )

    async def started(self) -> AccessToken:
        """Start with a good login, and return its token."""
        self.cache.start()
        await self.time.settle()
        token = self.cache.current()
        assert token is not None
        return token

    def ask(self, max_wait: float = MAX_WAIT) -> asyncio.Task[AccessToken]:
        """A request begins that needs a token."""
        return asyncio.create_task(self.cache.get(max_wait))

    def ask_anew(self, rejected: AccessToken, max_wait: float = MAX_WAIT) -> asyncio.Task[AccessToken]:
        """A request begins that was answered with 401."""
        self.cache.reject(rejected)
        return asyncio.create_task(self.cache.get(max_wait, rejected))

    async def ending(self, task: asyncio.Task[AccessToken], within: float) -> tuple[str, float]:
        """Return slug and Retry-After of a task that must end after exactly ``within`` seconds, with a ProxyError."""
        if within:
            await self.time.advance(within - 0.001)
            assert not task.done()
            await self.time.advance(0.002)
        await self.time.settle()
        assert task.done()
        error = task.exception()
        assert isinstance(error, ProxyError)
        assert 503 == error.status
        assert "no" == error.sent
        assert error.retry_after is not None
        return error.slug, error.retry_after


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A bench whose cache has not begun, closed at the end."""
    bench = Bench()
    yield bench
    await bench.cache.close()
    assert not bench.login.running


def answer(**fields: object) -> bytes:
    """A login's good answer, but for ``fields``; None leaves one out."""
    fields = {"accessToken": "abc.def-_~+/==", "tokenType": "bearer", "expiresIn": 600, **fields}
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


class TestLoginAnswer:
    """``parse_login``."""

    def test_a_good_answer(self) -> None:
        """The vendor's answer becomes a token that begins when it was asked for."""
        token = parse_login(200, answer(), 50.0)
        assert ("abc.def-_~+/==", 50.0, 600.0, 650.0) == (
            token.value,
            token.obtained_at,
            token.lifetime,
            token.expires_at,
        )
        assert b"Bearer abc.def-_~+/==" == token.authorization

    @pytest.mark.parametrize("status", [400, 401, 403])
    def test_refused_keys(self, status: int) -> None:
        """The statuses that the vendor may answer wrong keys with, whatever else the answer holds."""
        with pytest.raises(CredentialsRejected, match=str(status)):
            parse_login(status, answer(), 0)

    @pytest.mark.parametrize("status", [100, 199, 300, 302, 404, 422, 600])
    def test_other_statuses_fail(self, status: int) -> None:
        """A redirect or an error is no token, even with one in its body, and says nothing about the keys."""
        with pytest.raises(LoginFailed, match=str(status)) as failed:
            parse_login(status, answer(), 0, pause=60)
        assert LoginFailed is failed.type

    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 599])
    @pytest.mark.parametrize(
        ("asked", "pause", "told"), [(None, 0, r"\d\.$"), (60, 60, "for 60 s"), (3600, 300, "for more than 300 s")]
    )
    def test_a_login_that_is_busy(self, status: int, asked: float | None, pause: float, told: str) -> None:
        """What it says about when to come back is believed up to 300 s."""
        with pytest.raises(LoginBusy, match=told) as failed:
            parse_login(status, answer(), 0, pause=asked)
        assert pause == failed.value.pause
        assert f"status {status}" in str(failed.value)

    @pytest.mark.parametrize(
        ("location", "told"),
        [
            (
                "https://eu.metquay.co/api/v1/authenticate",
                "to https://eu.metquay.co/api/v1/authenticate. METQUAY_HOST should probably be https://eu.metquay.co/api/v1.",
            ),
            (
                "https://me:hunter2@eu.metquay.co/api/v1/authenticate?a=hunter2#hunter2",
                "probably be https://eu.metquay.co/api/v1.",
            ),
            ("http://eu.metquay.co/authenticate", "probably be https://eu.metquay.co."),
            ("https://eu.metquay.co/api/v1/authenticate/", "probably be https://eu.metquay.co/api/v1."),
            (
                "https://sso.lab.example/login;id=hunter2?to=hunter2",
                "to https://sso.lab.example/login. That is a page for people",
            ),
            ("https://sso.lab.example", "to https://sso.lab.example. That is a page for people"),
            ("https://sso.lab.example/\u00fc\x1b[2Jx", "to https://sso.lab.example/??[2Jx. That"),
            ("https://sso.lab.example/" + "a" * 999, "to https://sso.lab.example/" + "a" * 176 + ". That"),
            ("", "without saying where to. Check METQUAY_HOST."),
            ("https://[hunter2", "without saying where to. Check METQUAY_HOST."),
        ],
    )
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_a_redirect(self, status: int, location: str, told: str) -> None:
        """Where it points is told, without anything that may be secret or unprintable, and what METQUAY_HOST may be."""
        with pytest.raises(LoginFailed) as failed:
            parse_login(status, answer(), 0, location=location)
        assert f"(status {status}) " in str(failed.value)
        assert told in str(failed.value)
        assert "hunter2" not in str(failed.value)
        assert str(failed.value).isascii()
        assert str(failed.value).isprintable()

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html><body>Sign in to the hotel's network</body></html>",
            b"\xff\xfe\xfd",
            b"[" * 100_000,
            b"[]",
            b"null",
            b'"token"',
            b"{}",
            answer(accessToken=None),
            answer(accessToken=""),
            answer(accessToken=5),
            answer(accessToken=["abc"]),
            answer(accessToken="a b"),
            answer(accessToken="abc\r\nX-Evil: 1"),
            answer(accessToken="abc\n"),
            answer(accessToken="abc\x7f"),
            answer(accessToken="t\u00f6ken"),
            answer(accessToken="a" * 16_385),
            answer(tokenType="mac"),
            answer(tokenType=""),
            answer(tokenType=1),
        ],
    )
    def test_malformed_answers_fail(self, body: bytes) -> None:
        """What is not a bearer token that fits in a header is a failure that may pass, and its text quotes nothing."""
        with pytest.raises(LoginFailed) as failed:
            parse_login(200, body, 0)
        assert LoginFailed is failed.type
        assert "abc" not in str(failed.value)

    @pytest.mark.parametrize("token_type", ["bearer", "Bearer", "BEARER", None])
    def test_token_types(self, token_type: str | None) -> None:
        """Bearer in any case (RFC 6749), or no type at all."""
        assert 600.0 == parse_login(200, answer(tokenType=token_type), 0).lifetime

    def test_the_longest_token(self) -> None:
        """16 KiB are accepted."""
        assert 16_384 == len(parse_login(201, answer(accessToken="a" * 16_384), 0).value)

    @pytest.mark.parametrize(
        ("expires_in", "lifetime"),
        [
            ("1", 1.0),
            ("3", 3.0),
            ("899.5", 899.5),
            ("86400", 86_400.0),
            ("null", 900.0),
            ("0", 900.0),
            ("0.5", 900.0),
            ("-1", 900.0),
            ('"600"', 900.0),
            ("true", 900.0),
            ("[600]", 900.0),
            ("NaN", 900.0),
            ("Infinity", 900.0),
            ("-Infinity", 900.0),
            ("86401", 900.0),
            ("900000000", 900.0),
            ("1e400", 900.0),
            ("1" + "0" * 400, 900.0),
        ],
    )
    def test_lifetimes(self, expires_in: str, lifetime: float) -> None:
        """A lifetime that can't be believed is taken for the documented 900 s."""
        body = f'{{"accessToken": "abc", "tokenType": "bearer", "expiresIn": {expires_in}}}'.encode()
        assert lifetime == parse_login(200, body, 0).lifetime

    def test_a_number_longer_than_python_reads(self) -> None:
        """A number of 5,000 digits is a malformed answer, not a crash."""
        with pytest.raises(LoginFailed):
            parse_login(200, b'{"accessToken": "abc", "expiresIn": ' + b"9" * 5000 + b"}", 0)

    @settings(max_examples=50, deadline=None)
    @given(
        st.binary()
        | st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("bearer"),
            lambda inner: (
                st.lists(inner) | st.dictionaries(st.sampled_from(["accessToken", "tokenType", "expiresIn"]), inner)
            ),
        ).map(lambda value: json.dumps(value).encode())
    )
    def test_any_answer(self, body: bytes) -> None:
        """Whatever comes, it is a token that a header can hold with a sane lifetime, or a failure."""
        try:
            token = parse_login(200, body, 0)
        except LoginFailed:
            return
        assert 1 <= token.lifetime <= 86_400
        assert len(token.authorization.split()) == 2


def test_nothing_prints_secrets() -> None:
    """Neither the keys nor the token show in a repr, a text or a list of them."""
    shown = f"{Credentials('ACCESS', 'SECRET')!r} {Credentials('ACCESS', 'SECRET')} {[AccessToken('TOKEN', 5, 900)]}"
    assert "Credentials(***) Credentials(***) [AccessToken(***, obtained_at=5.000, lifetime=900)]" == shown


@pytest.mark.parametrize(
    ("key", "words"),
    [
        *((key, "") for key in ("access-key-AAAA", "s3cr3t/with+signs==", "a#b", "Ab.~_-:;!$%&9", "key==")),
        *((key, "has quotation marks") for key in ('"4711"', "'4711'", "“4711”", "„4711“", "«4711»", "`4711`")),
        *((key, "has quotation marks") for key in ('"4711', "4711'", "4711”", '""4711""')),
        *((key, "is followed by a comment") for key in ("4711 # production", "4711\t#2")),
        *((key, "holds a name") for key in ("METQUAY_SECRET_KEY=4711", "export SECRET_KEY=4711", "secretKey: 4711")),
        *((key, "holds a name") for key in ("$env:METQUAY_ACCESS_KEY=4711", "set ACCESS_KEY=4711")),
        *((key, "holds a blank") for key in ("47 11", "47\t11")),
        *((key, "holds an accent") for key in ("47é11", "47–11", "47\u200b11")),  # noqa: RUF001
        *((key, "is a placeholder") for key in ("...", "…", "***", "xxx", "XX-XX", "your-key-here", "your_key_x")),
        *((key, "is a placeholder") for key in ("<access key>", "[key]", "{{ .Values.k }}", "$KEY", "${KEY:-}", "%K%")),
        *((key, "is a placeholder") for key in ("changeme", "CHANGE-ME", "access-key", "put your key here", "null")),
    ],
)
def test_what_looks_wrong_about_a_key_is_said_without_it(key: str, words: str) -> None:
    """As people copy it: with its quotation marks, its line, or not at all."""
    said = oddities(key)
    assert words == said[: len(words)]
    assert bool(words) == bool(said)
    assert "4711" not in said


def test_all_that_looks_wrong_about_a_key_is_said() -> None:
    """What one fault explains does not count as another."""
    first, second, third = oddities("SECRET_KEY='4711' # why").split("; it ")
    assert first.startswith("is followed by a comment")
    assert second.startswith("holds a name")
    assert third.startswith("has quotation marks")


def test_what_looks_wrong_about_a_pair_is_said() -> None:
    """Each key by its variable, then whether both are the same; where they were found stands first."""
    assert () == Credentials("access-4711", "secret-4711").doubts()
    pair = Credentials("<key>", "secret-4711'", ("it is found twice",))
    found, access_key, secret_key = pair.doubts()
    assert "it is found twice" == found
    assert "METQUAY_ACCESS_KEY is a placeholder: put the key in its place" == access_key
    assert secret_key.startswith("METQUAY_SECRET_KEY has quotation marks")
    (same,) = Credentials("secret-4711", "secret-4711").doubts()
    assert same.startswith("METQUAY_ACCESS_KEY and METQUAY_SECRET_KEY are the same key")
    assert "secret-4711" not in f"{pair!r}{same}"


class TestClock:
    """``suspend_aware_clock``."""

    def test_it_runs(self) -> None:
        """It counts seconds on this machine and does not go back."""
        clock = suspend_aware_clock()
        first, second = clock(), clock()
        assert 0 <= second - first < 60

    @pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux alone has CLOCK_BOOTTIME")
    def test_linux_counts_suspended_time(self) -> None:
        """On Linux it is the clock that runs on while the machine is suspended."""
        assert abs(suspend_aware_clock()() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no clock_gettime")
    def test_macos_counts_suspended_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without CLOCK_BOOTTIME it is CLOCK_MONOTONIC, asked directly: time.monotonic stops with a sleeping Mac."""
        monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
        monkeypatch.setattr(time, "clock_gettime", lambda number: number)
        assert time.CLOCK_MONOTONIC == suspend_aware_clock()()

    def test_windows_has_its_monotonic_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Windows counts suspended time in time.monotonic."""
        monkeypatch.setattr(sys, "platform", "win32")
        assert time.monotonic is suspend_aware_clock()


class TestRenewal:
    """The background task while all goes well."""

    async def test_a_token_is_obtained_at_start(self, bench: Bench) -> None:
        """Nobody has to ask for the first token, and who asks then waits for nothing."""
        assert bench.cache.current() is None
        token = await bench.started()
        assert "token-1" == token.value
        assert token is await bench.cache.get(0)
        assert [TokenEvent("obtained", "", 900.0, 720.0)] == bench.events

    @pytest.mark.parametrize(
        ("lifetime", "chance", "moment"),
        [
            (3600, 0.0, 2880),
            (900, 0.0, 720),
            (900, 0.5, 711),
            (600, 0.0, 480),
            (300, 0.0, 180),
            (240, 0.0, 120),
            (60, 0.0, 30),
            (3, 0.0, 1.5),
        ],
    )
    async def test_the_moment_of_renewal(self, lifetime: float, chance: float, moment: float) -> None:
        """With a fifth of the lifetime left, or 120 s, or half of a short one; jitter only brings it forward."""
        bench = Bench(chance=lambda: chance)
        bench.login.lifetime = lifetime
        await bench.started()
        await bench.time.advance(moment - 0.01)
        assert 1 == len(bench.login.starts)
        await bench.time.advance(0.02)
        assert 2 == len(bench.login.starts)
        token = bench.cache.current()
        assert token is not None
        assert "token-2" == token.value
        assert "renewed" == bench.events[-1].kind
        await bench.cache.close()

    async def test_short_lifetimes_never_make_a_request_wait(self, bench: Bench) -> None:
        """With tokens of 3 s and logins of 1 s there is a usable token at every moment."""
        bench.login.lifetime, bench.login.duration = 3.0, 1.0
        bench.cache.start()
        await bench.time.advance(1.0)
        for _ in range(600):
            assert bench.cache.current() is not None
            await bench.time.advance(0.1)
        assert 0 == bench.cache.state.failures

    async def test_the_shortest_lifetime(self, bench: Bench) -> None:
        """Tokens of 1 s are still bought once a second, not more often."""
        bench.login.lifetime = 1.0
        bench.cache.start()
        await bench.time.advance(10.5)
        assert 11 == len(bench.login.starts)

    async def test_the_old_token_serves_during_the_renewal(self, bench: Bench) -> None:
        """A renewal under way blocks nobody."""
        token = await bench.started()
        bench.login.duration = 10.0
        await bench.time.advance(725)
        assert bench.login.running
        assert token is bench.cache.current()
        assert token is await bench.cache.get(0)

    async def test_the_age_counts_from_the_question(self, bench: Bench) -> None:
        """A slow login does not lengthen the token's life."""
        bench.login.duration = 30.0
        bench.cache.start()
        await bench.time.advance(30)
        token = bench.cache.current()
        assert token is not None
        assert bench.login.starts[0] == token.obtained_at
        assert 870.0 == bench.cache.state.seconds_left

    async def test_start_twice_is_one_task(self, bench: Bench) -> None:
        """A second start does nothing."""
        bench.cache.start()
        bench.cache.start()
        await bench.time.settle()
        assert 1 == len(bench.login.starts)

    async def test_it_runs_without_an_observer(self) -> None:
        """The observer is optional."""
        now = FakeTime()
        cache = TokenCache(Login(now), clock=now.now, sleep=now.sleep)
        cache.start()
        await now.settle()
        assert cache.current() is not None
        await cache.close()


class TestSingleFlight:
    """One login at a time, whoever asks; the source itself refuses a second one."""

    async def test_two_hundred_on_a_cold_cache(self, bench: Bench) -> None:
        """Two hundred requests at once make one login and get one token, even where nobody called start."""
        bench.login.duration = 2.0
        tasks = [bench.ask() for _ in range(200)]
        await bench.time.advance(2)
        assert {"token-1"} == {(await task).value for task in tasks}
        assert 1 == len(bench.login.starts)

    async def test_a_hundred_with_the_same_rejected_token(self, bench: Bench) -> None:
        """A hundred requests that saw the same 401 make one login."""
        token = await bench.started()
        bench.login.duration = 2.0
        await bench.time.advance(100)
        tasks = [bench.ask_anew(token) for _ in range(100)]
        await bench.time.advance(2)
        assert {"token-2"} == {(await task).value for task in tasks}
        assert 2 == len(bench.login.starts)

    async def test_the_first_caller_leaves(self, bench: Bench) -> None:
        """The one whose question began the login may be cancelled: the login and the others go on."""
        bench.login.duration = 2.0
        first, second = bench.ask(), bench.ask()
        await bench.time.advance(1)
        first.cancel()
        await bench.time.advance(1)
        assert first.cancelled()
        assert "token-1" == (await second).value
        assert 1 == len(bench.login.starts)

    async def test_every_caller_leaves(self, bench: Bench) -> None:
        """The login is finished for the next one even if nobody waits any more, and nobody is counted as waiting."""
        bench.login.duration = 2.0
        tasks = [bench.ask() for _ in range(3)]
        await bench.time.advance(1)
        for task in tasks:
            task.cancel()
        await bench.time.advance(1)
        assert bench.cache.current() is not None
        assert 0 == bench.cache._waiting


class TestWaiting:
    """How long a request without a usable token waits."""

    async def test_as_long_as_the_login_is_under_way(self, bench: Bench) -> None:
        """A login that takes 19 s is waited for, though another patience is 5 s."""
        bench.login.duration = 19.0
        task = bench.ask()
        await bench.time.advance(19)
        assert "token-1" == (await task).value

    async def test_at_most_max_wait(self, bench: Bench) -> None:
        """After its own limit a request is told to come back, and the login goes on."""
        bench.login.duration = 30.0
        task = bench.ask()
        assert ("token-unavailable", 1) == await bench.ending(task, MAX_WAIT)
        assert "has not answered yet" in str(task.exception())
        assert "in 1 s" in str(task.exception())
        await bench.time.advance(10)
        assert "token-1" == (await bench.cache.get(0)).value

    async def test_no_patience_at_all(self, bench: Bench) -> None:
        """With nothing left to wait a request is answered at once; it has started a login all the same."""
        bench.login.duration = 1.0
        assert ("token-unavailable", 1) == await bench.ending(bench.ask(0), 0)
        await bench.time.advance(1)
        assert bench.cache.current() is not None

    async def test_five_seconds_after_a_failure(self, bench: Bench) -> None:
        """Who waits for a login that fails waits 5 s more, during which others are tried, then gets the reason."""
        bench.login.error, bench.login.duration = OUTAGE, 3.0
        task = bench.ask()
        assert ("token-unavailable", 1) == await bench.ending(task, 3.0 + 5.0)
        assert "status 503" in str(task.exception())
        assert [0.0, 4.0] == [start - bench.login.starts[0] for start in bench.login.starts]

    async def test_five_seconds_during_an_outage(self, bench: Bench) -> None:
        """Who comes when a login has failed waits 5 s, gets at least one attempt, and a true Retry-After."""
        bench.login.error = OUTAGE
        bench.cache.start()
        await bench.time.advance(120)
        before = len(bench.login.starts)
        slug, retry_after = await bench.ending(bench.ask(), 5.0)
        assert "token-unavailable" == slug
        assert before < len(bench.login.starts)
        attempts = len(bench.login.starts)
        await bench.time.advance(retry_after - 1.5)
        assert attempts == len(bench.login.starts)
        await bench.time.advance(1.5)
        assert attempts + 1 == len(bench.login.starts)

    async def test_a_login_under_way_after_failures(self, bench: Bench) -> None:
        """Who comes during an attempt waits for its end, however long, even if earlier ones have failed."""
        bench.login.error = OUTAGE
        bench.cache.start()
        await bench.time.settle()
        bench.login.error, bench.login.duration = None, 9.0
        await bench.time.advance(1)
        assert bench.login.running
        task = bench.ask()
        await bench.time.advance(9)
        assert "token-2" == (await task).value

    async def test_it_is_served_when_the_outage_ends(self, bench: Bench) -> None:
        """A request that waits through a failure gets the token of the next attempt."""
        bench.login.error = OUTAGE
        task = bench.ask()
        await bench.time.settle()
        bench.login.error = None
        await bench.time.advance(1)
        assert "token-2" == (await task).value

    async def test_a_request_brings_the_next_attempt_forward(self, bench: Bench) -> None:
        """Deep in the backoff a request is not left to wait for nothing: an attempt is made at once."""
        bench.login.error = OUTAGE
        bench.cache.start()
        await bench.time.advance(16)  # attempts after 0, 1, 3, 7 and 15 s; the next after 30
        await bench.time.advance(5)
        bench.login.error = None
        task = bench.ask()
        await bench.time.settle()
        assert "token-6" == (await task).value


class TestFailures:
    """Renewals that fail."""

    async def test_the_old_token_serves_to_its_real_end(self, bench: Bench) -> None:
        """A failed renewal takes nothing away before the token's own end, and then requests are refused."""
        token = await bench.started()
        bench.login.error = OUTAGE
        await bench.time.advance(899.9)
        assert token is bench.cache.current()
        assert token is await bench.cache.get(0)
        await bench.time.advance(0.1)
        assert bench.cache.current() is None
        assert "token-unavailable" == (await bench.ending(bench.ask(), 5.0))[0]

    async def test_the_backoff(self, bench: Bench) -> None:
        """The pauses double from 1 s on and stop growing at the ceiling."""
        bench.login.error = OUTAGE
        bench.cache.start()
        await bench.time.advance(80)
        pauses = [later - earlier for earlier, later in itertools.pairwise(bench.login.starts)]
        assert pytest.approx([1, 2, 4, 8, 15, 15, 15, 15]) == pauses
        assert pytest.approx([1, 2, 4, 8, 15, 15, 15, 15, 15]) == [event.wait for event in bench.events]
        assert {TokenEvent("failed", str(OUTAGE), None, 15.0)} == set(bench.events[4:])

    async def test_the_backoff_is_jittered_within_its_bounds(self) -> None:
        """With the other extreme of chance no pause reaches twice as long, nor 30 s."""
        bench = Bench(chance=lambda: 0.999)
        bench.login.error = OUTAGE
        bench.cache.start()
        await bench.time.advance(145)
        pauses = [later - earlier for earlier, later in itertools.pairwise(bench.login.starts)]
        assert pytest.approx([1.999, 3.998, 7.996, 15.992, 29.985, 29.985, 29.985]) == pauses
        await bench.cache.close()

    async def test_an_outage_of_days(self, bench: Bench) -> None:
        """After thousands of failures the pauses are still the same, and no power of two overflows."""
        bench.login.error = OUTAGE
        bench.cache._failing = 5_000
        bench.cache.start()
        await bench.time.advance(60)
        assert pytest.approx([15, 15, 15, 15]) == [
            later - earlier for earlier, later in itertools.pairwise(bench.login.starts)
        ]

    async def test_the_pause_that_metquay_asks_for(self, bench: Bench) -> None:
        """No attempt is made before it ends, tools are told the truth at once, and the old token serves meanwhile."""
        token = await bench.started()
        bench.login.error = LoginBusy("Metquay's login answered with status 429.", 60.0)
        await bench.time.advance(720)
        assert 60 == bench.cache.state.next_login_in
        assert token is await bench.cache.get(MAX_WAIT)
        assert ("token-unavailable", 60) == await bench.ending(bench.ask_anew(token), 0)
        bench.login.error = LoginBusy("Metquay's login answered with status 503.", 200.0)
        await bench.time.advance(180)
        assert [0, 720, 780] == [start - bench.login.starts[0] for start in bench.login.starts]
        assert bench.cache.current() is None
        assert ("token-unavailable", 80) == await bench.ending(bench.ask(), 0)
        bench.login.error = None
        await bench.time.advance(80)
        assert "token-4" == (await bench.cache.get(0)).value

    async def test_a_short_pause_is_waited_for(self, bench: Bench) -> None:
        """A request is patient for 5 s after a failed login, whoever wants those."""
        bench.login.error = LoginBusy("Metquay's login answered with status 429.", 4.5)
        task = bench.ask()
        await bench.time.settle()
        bench.login.error = None
        await bench.time.advance(4.4)
        assert 1 == len(bench.login.starts)
        await bench.time.advance(0.2)
        assert "token-2" == (await task).value

    async def test_a_pause_is_no_shorter_than_the_backoff(self, bench: Bench) -> None:
        """A server that asks for a second each time is not asked each second for ever."""
        bench.login.error = LoginBusy("Metquay's login answered with status 503.", 1.0)
        bench.cache.start()
        await bench.time.advance(80)
        pauses = [later - earlier for earlier, later in itertools.pairwise(bench.login.starts)]
        assert pytest.approx([1, 2, 4, 8, 15, 15, 15, 15]) == pauses

    async def test_recovery_by_itself(self, bench: Bench) -> None:
        """After an outage the token comes back without any request, and the observer hears of both."""
        await bench.started()
        bench.login.error = OUTAGE
        await bench.time.advance(1000)
        assert not bench.cache.state.ready
        bench.login.error = None
        await bench.time.advance(15)
        assert bench.cache.state.ready
        assert ["obtained", "failed", "recovered"] == list(dict.fromkeys(event.kind for event in bench.events))
        assert TokenEvent("recovered", "", 900.0, 720.0) == bench.events[-1]

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("SECRET in a text"), KeyError("SECRET"), asyncio.CancelledError(), TimeoutError("SECRET")],
    )
    async def test_whatever_a_source_raises_is_a_failure(self, bench: Bench, error: BaseException) -> None:
        """The task survives a source's defect, a cancellation that leaked out of it too, and quotes it to nobody."""
        bench.login.error = error
        bench.cache.start()
        await bench.time.settle()
        assert ["failed"] == [event.kind for event in bench.events]
        assert "SECRET" not in f"{bench.events} {bench.cache.state}"
        bench.login.error = None
        await bench.time.advance(1)
        assert bench.cache.current() is not None

    async def test_a_defect_is_named_in_the_log_alone(self, bench: Bench) -> None:
        """The observer learns the exception's class; people learn that the log has it."""
        bench.login.error = ZeroDivisionError("SECRET")
        task = bench.ask(0)
        await bench.time.settle()
        assert "unexpected ZeroDivisionError" == bench.events[0].text
        assert "The login failed inside the proxy; its log says how." == bench.cache.state.last_error
        assert "ZeroDivisionError" not in str(task.exception())

    async def test_a_login_without_end(self, bench: Bench) -> None:
        """A source that hangs is cancelled after a minute; the next login begins when it has cleaned up behind it."""
        bench.login.duration, bench.login.farewell = 10_000.0, 3.0
        bench.cache.start()
        await bench.time.advance(62)
        assert bench.login.running
        assert [] == bench.events
        await bench.time.advance(1)
        assert not bench.login.running
        assert "did not come to an end in time" in bench.events[0].text
        bench.login.duration = bench.login.farewell = 0.0
        await bench.time.advance(1)
        assert bench.cache.current() is not None
        assert 2 == len(bench.login.starts)

    async def test_a_token_that_arrives_dead(self, bench: Bench) -> None:
        """A login that takes longer than its token lives is a failure with a reason, not a token."""
        bench.login.lifetime, bench.login.duration = 3.0, 4.0
        bench.cache.start()
        await bench.time.advance(4)
        assert bench.cache.current() is None
        assert "longer than the token lives" in str(bench.cache.state.last_error)

    async def test_an_observer_that_raises(self) -> None:
        """A defect in the observer is heard of and does not end the renewals."""

        def broken(_: TokenEvent) -> None:
            msg = "observer"
            raise RuntimeError(msg)

        heard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
        now = FakeTime()
        login = Login(now)
        cache = TokenCache(login, clock=now.now, sleep=now.sleep, random=lambda: 0.0, observer=broken)
        cache.start()
        await now.advance(720)
        assert 2 == len(login.starts)
        assert ["observer", "observer"] == [str(context["exception"]) for context in heard]
        await cache.close()

    async def test_a_task_that_died_is_heard_of_and_replaced(self, bench: Bench) -> None:
        """Should the task itself die, the loop's handler hears of it and the next request starts another."""
        heard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))

        def broken() -> float:
            msg = "clock"
            raise OSError(msg)

        await bench.started()
        bench.cache._clock = broken
        await bench.time.advance(15)
        assert ["clock"] == [str(context["exception"]) for context in heard]
        bench.cache._clock = bench.time.now
        await bench.time.advance(900)
        assert "token-2" == (await bench.cache.get(0.1)).value


class TestRejectedKeys:
    """Keys that the login refuses."""

    async def test_requests_are_answered_at_once(self, bench: Bench) -> None:
        """Waiting ends with the refusal, and later requests don't wait at all; Retry-After is the next attempt."""
        bench.login.error, bench.login.duration = REFUSAL, 2.0
        waiting = bench.ask()
        assert ("credentials-rejected", 60) == await bench.ending(waiting, 2.0)
        assert "status 401" in str(waiting.exception())
        assert "METQUAY_SECRET_KEY" in str(waiting.exception())
        await bench.time.advance(20)
        assert ("credentials-rejected", 40) == await bench.ending(bench.ask(), 0)
        assert [TokenEvent("rejected", str(REFUSAL), None, 60.0)] == bench.events

    async def test_a_minute_is_never_61_seconds(self, bench: Bench) -> None:
        """Retry-After is rounded up, but not for a float's last bit."""
        await bench.time.advance(0.1)
        bench.login.error = REFUSAL
        bench.cache.start()
        for tenth in range(600):
            assert ("credentials-rejected", max(1, math.ceil((600 - tenth) / 10))) == await bench.ending(bench.ask(), 0)
            await bench.time.advance(0.1)

    async def test_attempts_every_minute(self, bench: Bench) -> None:
        """Neither requests nor impatience change the minute, and rotated keys heal it."""
        bench.login.error = REFUSAL
        bench.cache.start()
        for _ in range(600):
            await bench.time.advance(1 / 3)
            assert "credentials-rejected" == (await bench.ending(bench.ask(), 0))[0]
        assert pytest.approx([0, 60, 120, 180]) == [start - bench.login.starts[0] for start in bench.login.starts]
        bench.login.error = None
        await bench.time.advance(60)
        assert "token-5" == (await bench.cache.get(0)).value
        assert not bench.cache.state.rejected

    @pytest.mark.parametrize("error", [REFUSAL, LoginBusy("Metquay's login answered with status 429.", 300.0)])
    async def test_changed_keys_end_the_pause(self, bench: Bench, error: LoginFailed) -> None:
        """Who knows that the keys have changed need not wait out the pause; a login a second is still the most."""
        bench.login.error = error
        bench.cache.start()
        await bench.time.advance(0.5)
        bench.login.error = None
        bench.cache.hasten()
        await bench.time.advance(0.4)
        assert 1 == len(bench.login.starts)
        await bench.time.advance(0.2)
        assert "token-2" == (await bench.cache.get(0)).value
        bench.cache.hasten()
        await bench.time.advance(5)
        assert 2 == len(bench.login.starts)

    async def test_still_at_once_during_the_next_attempt(self, bench: Bench) -> None:
        """An attempt under way does not make refused keys good: no request waits for it."""
        bench.login.error = REFUSAL
        bench.cache.start()
        await bench.time.settle()
        bench.login.duration = 10.0
        await bench.time.advance(61)
        assert bench.login.running
        assert ("credentials-rejected", 1) == await bench.ending(bench.ask(), 0)

    async def test_the_old_token_serves_on(self, bench: Bench) -> None:
        """Keys refused at a renewal leave the old token to its end."""
        token = await bench.started()
        bench.login.error = REFUSAL
        await bench.time.advance(899)
        assert token is await bench.cache.get(MAX_WAIT)
        await bench.time.advance(1)
        assert "credentials-rejected" == (await bench.ending(bench.ask(), 0))[0]

    async def test_an_outage_after_a_refusal(self, bench: Bench) -> None:
        """The last login decides: once it fails otherwise, requests wait again."""
        bench.login.error = REFUSAL
        bench.cache.start()
        await bench.time.settle()
        bench.login.error = OUTAGE
        await bench.time.advance(60)
        assert "token-unavailable" == (await bench.ending(bench.ask(), 5.0))[0]


class TestDistrustedUpstream:
    """A certificate that is not accepted."""

    async def test_at_once_and_recovered(self, bench: Bench) -> None:
        """Requests are answered at once, since waiting does not help, and the next login that succeeds ends it."""
        bench.login.error = UpstreamDistrusted("The certificate of lab.metquay.co was not accepted.")
        bench.cache.start()
        await bench.time.settle()
        refused = bench.ask()
        await bench.time.settle()
        error = refused.exception()
        assert isinstance(error, ProxyError)
        assert ("upstream-tls", "no") == (error.slug, error.sent)
        bench.login.error = None
        await bench.time.advance(5)
        assert bench.cache.current() is not None


class TestRejectedToken:
    """``reject``, after the API's 401, and ``get`` for what saw it."""

    async def test_it_is_replaced(self, bench: Bench) -> None:
        """Who saw the 401 waits for a newer token; all others go on with the old one until that is there."""
        token = await bench.started()
        await bench.time.advance(10)
        bench.login.duration = 3.0
        task = bench.ask_anew(token)
        await bench.time.advance(2.9)
        assert not task.done()
        assert token is bench.cache.current()
        assert token is await bench.cache.get(0)
        assert bench.cache.state.ready
        await bench.time.advance(0.1)
        assert "token-2" == (await task).value
        assert bench.cache.current() is await task

    async def test_it_can_be_rejected_without_waiting(self, bench: Bench) -> None:
        """Who can't repeat its request rejects the token alone: the renewal needs nobody, and is made once."""
        token = await bench.started()
        await bench.time.advance(10)
        bench.cache.reject(token)
        assert token is bench.cache.current()
        await bench.time.settle()
        new = bench.cache.current()
        assert new is not None
        assert token != new
        bench.cache.reject(token)
        assert new is bench.cache.current()
        await bench.time.advance(30)
        assert 2 == len(bench.login.starts)

    async def test_a_late_401_for_an_older_token(self, bench: Bench) -> None:
        """A newer token is returned as it is, and kept."""
        old = await bench.started()
        await bench.time.advance(720)
        new = bench.cache.current()
        assert new is not None
        assert new is await bench.ask_anew(old)
        assert new is bench.cache.current()
        assert 2 == len(bench.login.starts)

    async def test_the_renewal_under_way_is_shared(self, bench: Bench) -> None:
        """A 401 during the renewal in the background waits for that one."""
        token = await bench.started()
        bench.login.duration = 5.0
        await bench.time.advance(721)
        task = bench.ask_anew(token)
        await bench.time.advance(4)
        assert "token-2" == (await task).value
        assert 2 == len(bench.login.starts)

    async def test_the_renewal_fails(self, bench: Bench) -> None:
        """Then who saw the 401 gets none; the old token serves all others to its end, and recovery brings another."""
        token = await bench.started()
        await bench.time.advance(10)
        bench.login.error = OUTAGE
        assert "token-unavailable" == (await bench.ending(bench.ask_anew(token), 5.0))[0]
        assert "token-unavailable" == (await bench.ending(bench.ask_anew(token), 5.0))[0]
        assert token is await bench.cache.get(0)
        bench.login.error = None
        await bench.time.advance(30)
        current = bench.cache.current()
        assert current is not None
        assert token.value != current.value

    async def test_keys_that_are_refused_now(self, bench: Bench) -> None:
        """A 401 whose renewal is refused says so at once; the next one does not even ask."""
        token = await bench.started()
        await bench.time.advance(10)
        bench.login.error = REFUSAL
        assert ("credentials-rejected", 60) == await bench.ending(bench.ask_anew(token), 0)
        assert ("credentials-rejected", 60) == await bench.ending(bench.ask_anew(token), 0)
        assert 2 == len(bench.login.starts)

    async def test_the_same_text_granted_again(self, bench: Bench) -> None:
        """A login that grants the same text anew vouches for it: a late 401 for the old grant leaves the new one."""
        bench.login.value = "constant"
        old = await bench.started()
        await bench.time.advance(10)
        new = await bench.ask_anew(old)
        assert old != new
        assert new is await bench.ask_anew(old)
        assert 2 == len(bench.login.starts)

    async def test_a_storm(self, bench: Bench) -> None:
        """An API that rejects every new token at once causes one login a second, not more."""
        await bench.started()

        async def client() -> None:
            while True:
                await bench.ask_anew(await bench.cache.get(MAX_WAIT))

        clients = [asyncio.create_task(client()) for _ in range(20)]
        await bench.time.advance(30)
        assert 31 == len(bench.login.starts)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    @pytest.mark.parametrize("error", [OUTAGE, REFUSAL, None])
    async def test_load_never_hammers(self, bench: Bench, error: LoginFailed | None) -> None:
        """Requests, 401s and answers of any kind together: a second or more from one login to the next."""
        token = await bench.started()
        bench.login.error = error
        tasks = []
        for step in range(300):
            tasks.append(bench.ask_anew(bench.cache.current() or token) if step % 2 else bench.ask())
            await bench.time.advance(0.1)
        await bench.time.advance(MAX_WAIT)
        await asyncio.gather(*tasks, return_exceptions=True)
        pauses = [later - earlier for earlier, later in itertools.pairwise(bench.login.starts)]
        assert 1.0 <= min(pauses) + 1e-9


class TestClockTrouble:
    """A machine that was suspended, a clock that jumps."""

    async def test_waking_with_a_dead_token(self, bench: Bench) -> None:
        """After a night the token is known to be dead at once, and one short wait brings another."""
        await bench.started()
        await bench.time.suspend(8 * 3600)
        assert bench.cache.current() is None
        assert "token-2" == (await bench.cache.get(MAX_WAIT)).value

    async def test_waking_with_an_old_token(self, bench: Bench) -> None:
        """In the last fifth of its life the token is handed out and renewed meanwhile, without waiting for the tick."""
        token = await bench.started()
        await bench.time.suspend(800)
        assert token is bench.cache.current()
        await bench.time.settle()
        assert "token-2" == (await bench.cache.get(0)).value

    async def test_waking_with_nobody_there(self, bench: Bench) -> None:
        """Without any request the task itself notices within 15 s of being awake."""
        await bench.started()
        await bench.time.suspend(8 * 3600)
        await bench.time.advance(15)
        assert bench.cache.current() is not None

    async def test_the_backoff_of_a_suspended_machine(self, bench: Bench) -> None:
        """A pause that passed during the suspension is over."""
        bench.login.error = REFUSAL
        bench.cache.start()
        await bench.time.settle()
        bench.login.error = None
        await bench.time.suspend(3600)
        await bench.time.advance(15)
        assert bench.cache.current() is not None

    async def test_set_back_before_the_token(self, bench: Bench) -> None:
        """A token from the future has no age that could be known: it is not used, and replaced."""
        await bench.started()
        bench.time.jump(-500)
        assert bench.cache.current() is None
        await bench.time.advance(15 + 1)
        current = bench.cache.current()
        assert current is not None
        assert "token-2" == current.value

    async def test_set_back_within_its_life(self, bench: Bench) -> None:
        """Set back by ten minutes a token would seem to live ten minutes longer: it is renewed within a tick."""
        await bench.started()
        await bench.time.advance(660)
        bench.time.jump(-600)
        await bench.time.advance(15)
        current = bench.cache.current()
        assert current is not None
        assert "token-2" == current.value

    @pytest.mark.parametrize(("error", "pause"), [(OUTAGE, 15), (REFUSAL, 60)])
    async def test_set_back_during_a_pause(self, bench: Bench, error: LoginFailed, pause: float) -> None:
        """A pause does not grow by the jump."""
        bench.login.error = error
        bench.cache.start()
        await bench.time.settle()
        bench.time.jump(-5000)
        bench.login.error = None
        await bench.time.advance(15 + pause)
        assert bench.cache.current() is not None

    async def test_set_back_during_a_login(self, bench: Bench) -> None:
        """The token of such a login is from the future: another login follows a second later."""
        bench.login.duration = 2.0
        bench.cache.start()
        await bench.time.advance(1)
        bench.time.jump(-5000)
        await bench.time.advance(1)
        assert bench.cache.current() is None
        await bench.time.advance(3)
        assert bench.cache.current() is not None

    async def test_set_forward(self, bench: Bench) -> None:
        """A clock set forward ends the token early, which costs one login."""
        await bench.started()
        bench.time.jump(1e9)
        assert "token-2" == (await bench.cache.get(MAX_WAIT)).value


class TestClosing:
    """``close``."""

    async def test_the_login_under_way_is_ended(self, bench: Bench) -> None:
        """Nothing runs on after close has returned."""
        bench.login.duration = 10.0
        bench.cache.start()
        await bench.time.settle()
        assert bench.login.running
        await bench.cache.close()
        assert not bench.login.running

    async def test_who_waits_is_told(self, bench: Bench) -> None:
        """Waiting ends with the proxy, and nobody can begin to wait again; closing twice is once."""
        bench.login.duration = 10.0
        task = bench.ask()
        await bench.time.settle()
        await bench.cache.close()
        await bench.cache.close()
        assert ("shutting-down", 1) == await bench.ending(task, 0)
        assert ("shutting-down", 1) == await bench.ending(bench.ask(), 0)
        bench.cache.start()
        await bench.time.advance(100)
        assert 1 == len(bench.login.starts)

    async def test_a_request_in_flight_keeps_its_token(self, bench: Bench) -> None:
        """A token that is usable stays so for what the proxy finishes."""
        token = await bench.started()
        await bench.cache.close()
        assert token is await bench.cache.get(0)

    async def test_before_it_began(self, bench: Bench) -> None:
        """A cache that was never started closes."""
        await bench.cache.close()
        assert [] == bench.login.starts


class TestState:
    """The snapshot."""

    async def test_before_the_first_token(self, bench: Bench) -> None:
        """All is nought, and nothing was ever had."""
        expected = auth.TokenState(
            ready=False,
            ever=False,
            seconds_left=0.0,
            lifetime=0.0,
            logging_in=False,
            next_login_in=0.0,
            renewals=0,
            failures=0,
            failures_in_a_row=0,
            rejected=False,
            last_error=None,
            last_renewal_age=None,
        )
        assert expected == bench.cache.state

    async def test_through_a_life(self, bench: Bench) -> None:
        """Obtained, renewed, failed, expired and recovered, as each figure tells it."""
        await bench.started()
        await bench.time.advance(100)
        state = bench.cache.state
        assert (True, True, 800.0, 900.0, 620.0) == (
            state.ready,
            state.ever,
            state.seconds_left,
            state.lifetime,
            state.next_login_in,
        )
        assert (1, 0, 100.0) == (state.renewals, state.failures, state.last_renewal_age)
        bench.login.error = OUTAGE
        await bench.time.advance(620)
        state = bench.cache.state
        assert (True, 1, 1, str(OUTAGE)) == (state.ready, state.failures, state.failures_in_a_row, state.last_error)
        await bench.time.advance(180)
        state = bench.cache.state
        assert (False, True, 0.0, 0.0) == (state.ready, state.ever, state.seconds_left, state.lifetime)
        bench.login.error, bench.login.duration = None, 1.0
        failures = state.failures
        await bench.time.advance(state.next_login_in + 0.5)
        assert (True, 0.0) == (bench.cache.state.logging_in, bench.cache.state.next_login_in)
        await bench.time.advance(0.5)
        state = bench.cache.state
        assert (True, 2, failures, 0, None) == (
            state.ready,
            state.renewals,
            state.failures,
            state.failures_in_a_row,
            state.last_error,
        )

    async def test_rejected(self, bench: Bench) -> None:
        """Refused keys show, with their text."""
        bench.login.error = REFUSAL
        bench.cache.start()
        await bench.time.settle()
        assert (True, str(REFUSAL), 60.0) == (
            bench.cache.state.rejected,
            bench.cache.state.last_error,
            bench.cache.state.next_login_in,
        )


class CacheModel(RuleBasedStateMachine):
    """Any sequence of time, faults, requests, 401s and departures, held against a model that knows only outcomes."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        chances = itertools.cycle([0.0, 0.3, 0.9, 0.6])
        self.bench = Bench(chance=lambda: next(chances))
        self.login = self.bench.login
        self.rejected: list[AccessToken] = []
        self.asked: dict[asyncio.Task[AccessToken], tuple[float, float, str]] = {}
        self.runner.run(self.advancing(0.0, self.bench.cache.start))

    def newest(self) -> AccessToken | None:
        """The last token that was alive when it came, as long as it is alive."""
        granted = [end for _, end in self.login.ends if isinstance(end, AccessToken)]
        token = granted[-1] if granted else None
        return token if token and token.usable(self.bench.time.now()) else None

    async def advancing(self, seconds: float, act: Callable[[], object] = int) -> None:
        """Do something, let time pass in steps, and judge each request that has ended."""
        act()
        for _ in range(4):
            await self.bench.time.advance(seconds / 4)
            self.judge()

    def judge(self) -> None:
        """A request ends in time, with another token than its own 401 was for, or is told when to come back."""
        now = self.bench.time.now()
        for task, (since, limit, rejected) in list(self.asked.items()):
            if not task.done():
                assert now < since + limit + 1e-6
                continue
            del self.asked[task]
            error = task.exception()
            if error is None:
                assert rejected != task.result().value
                continue
            assert isinstance(error, ProxyError)
            assert error.slug in {"token-unavailable", "credentials-rejected"}
            assert 1 <= (error.retry_after or 0) <= 60
            assert "hunter2" not in str(error)

    @rule(seconds=st.sampled_from([0.01, 0.4, 1.0, 4.0, 16.0, 61.0, 300.0]))
    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.runner.run(self.advancing(seconds))

    @rule(seconds=st.sampled_from([30.0, 700.0, 100_000.0]))
    def suspend(self, seconds: float) -> None:
        """The machine sleeps; who waits may wait as long again."""
        self.asked = {task: (since + seconds, *others) for task, (since, *others) in self.asked.items()}  # type: ignore[misc]
        self.runner.run(self.advancing(0.0, lambda: self.bench.time.jump(seconds)))

    @rule(error=st.sampled_from([None, OUTAGE, REFUSAL, RuntimeError("hunter2"), asyncio.CancelledError()]))
    def logins_end_so(self, error: BaseException | None) -> None:
        """The source changes its mind."""
        self.login.error = error

    @rule(duration=st.sampled_from([0.0, 0.3, 8.0]), lifetime=st.sampled_from([3.0, 60.0, 900.0]))
    def logins_take(self, duration: float, lifetime: float) -> None:
        """The source changes its pace."""
        self.login.duration, self.login.lifetime = duration, lifetime

    @rule(limit=st.sampled_from([0.0, 3.0, 20.0]), number=st.integers(1, 3))
    def ask(self, limit: float, number: int) -> None:
        """Requests come."""
        for _ in range(number):
            self.runner.run(self.advancing(0.0, lambda: self.begin(self.bench.cache.get(limit), limit)))

    @precondition(lambda self: self.newest() is not None)
    @rule(limit=st.sampled_from([0.0, 20.0]), number=st.integers(1, 3))
    def answer_401(self, limit: float, number: int) -> None:
        """Requests come back with a 401 for the token that all of them had."""
        token = self.newest()
        assert token is not None
        self.rejected.append(token)
        for _ in range(number):
            self.runner.run(self.advancing(0.0, lambda: self.begin_anew(token, limit)))

    @precondition(lambda self: self.rejected)
    @rule()
    def answer_late_401(self) -> None:
        """A request comes back with a 401 for a token that was rejected before, and perhaps replaced long ago."""
        token = self.rejected[0]
        self.runner.run(self.advancing(0.0, lambda: self.begin_anew(token, 20.0)))

    @precondition(lambda self: self.asked)
    @rule()
    def leave(self) -> None:
        """The client that came first disconnects."""
        task = next(iter(self.asked))
        del self.asked[task]
        self.runner.run(self.advancing(0.0, task.cancel))
        assert task.cancelled()

    def begin(self, request: Coroutine[None, None, AccessToken], limit: float, rejected: str = "") -> None:
        """Start a request and note when."""
        self.asked[asyncio.get_running_loop().create_task(request)] = (self.bench.time.now(), limit, rejected)

    def begin_anew(self, token: AccessToken, limit: float) -> None:
        """Reject a token and start to wait for a newer one."""
        self.bench.cache.reject(token)
        self.begin(self.bench.cache.get(limit, token), limit, token.value)

    @invariant()
    def the_newest_token_alone_is_current(self) -> None:
        """What is handed out is the last token that came, rejected or not, unless it is over."""
        assert self.newest() is self.bench.cache.current()
        assert (self.newest() is not None) is self.bench.cache.state.ready

    @invariant()
    def logins_keep_their_distance(self) -> None:
        """A second from start to start and after a failure, a minute after a refusal; half a minute awake at most."""
        starts = self.login.starts
        assert all(1.0 <= later - earlier + 1e-6 for earlier, later in itertools.pairwise(starts))
        for (ended, end), later in zip(self.login.ends, starts[1:], strict=False):
            least = 60.0 if isinstance(end, CredentialsRejected) else 0.0 if isinstance(end, AccessToken) else 1.0
            assert least <= later - ended + 1e-6

    @invariant()
    def nobody_is_forgotten(self) -> None:
        """The cache counts exactly those who wait, and each of them can still be answered in time."""
        assert len(self.asked) == self.bench.cache._waiting

    def teardown(self) -> None:
        """Whatever happened: once logins succeed there is a token within a minute, a slow login and a tick."""
        self.login.error, self.login.duration, self.login.lifetime = None, 0.0, 900.0
        self.runner.run(self.advancing(60.0 + 8.0 + 15.0))
        assert self.bench.cache.current() is not None
        assert "hunter2" not in f"{self.bench.events} {self.bench.cache.state}"
        self.runner.run(self.bench.cache.close())
        self.runner.close()


TestModel = CacheModel.TestCase
TestModel.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
