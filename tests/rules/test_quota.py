from __future__ import annotations

import copy
import gzip
import math
import random
import tracemalloc
from dataclasses import dataclass, field
from itertools import count, pairwise, repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING

import limits.storage.memory
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from limits import RateLimitItemPerSecond
from limits.strategies import MovingWindowRateLimiter

from metquay_proxy.rules.quota import (
    ASKED_BEFORE,
    LATELY,
    OTHERS,
    SAFETY,
    TOLD_APART,
    Callers,
    Quota,
    QuotaExceeded,
    Rate,
    Ticket,
    Window,
    parse_rate,
    retry_after_seconds,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

PACE = 60.06 / 31
"""The slowest pace at 100/minute: a burst of 70, then 30 slots that must last until the first comes back."""


def spend(quota: Quota, now: float, number: int, caller: str = "tool") -> list[Ticket]:
    """Send so many requests at ``now``, each answered at once."""
    tickets = [quota.ask(now, caller, 0) for _ in range(number)]
    for ticket in tickets:
        ticket.send()
        quota.answered(ticket, now)
    return tickets


def copied(text: str) -> str:
    """Return the same text as an object of its own."""
    return text.encode().decode()


def follow(quota: Quota, now: float, until: float = math.inf) -> Iterator[float]:
    """Poll as the driver does, and yield each moment at which it did."""
    again: float | None = now
    while again is not None and again <= until:
        now = again
        again = quota.poll(now)
        assert again is None or again > now
        yield now


def grants(quota: Quota, now: float, tickets: list[Ticket], until: float = math.inf) -> dict[int, float]:
    """Follow the quota, and return when the n-th ticket was granted; each is answered at once."""
    granted: dict[int, float] = {}
    for moment in follow(quota, now, until):
        for number, ticket in enumerate(tickets):
            if ticket.state == "granted":
                granted[number] = moment
                ticket.send()
                quota.answered(ticket, moment)
    return granted


class TestParseRate:
    @pytest.mark.parametrize(
        ("text", "rate"),
        [
            ("100/minute", Rate(100, 60)),
            ("1/second", Rate(1, 1)),
            ("9999999/hour", Rate(9999999, 3600)),
            (" 20 / Sec ", Rate(20, 1)),
            ("5/min", Rate(5, 60)),
            ("5/s", Rate(5, 1)),
            ("5/m", Rate(5, 60)),
            ("5/H", Rate(5, 3600)),
            ("off", None),
            (" OFF ", None),
        ],
    )
    def test_reads_rates(self, text: str, rate: Rate | None) -> None:
        """Limit and unit, in full or abbreviated, in any case; off is no quota."""
        assert rate == parse_rate(text)

    @pytest.mark.parametrize(
        "text", ["", "100", "0/minute", "-1/s", "1.5/s", "10000000/s", "5/day", "5/minutes!", "5/sek", "٣/s", "none"]
    )
    def test_refuses_anything_else(self, text: str) -> None:
        """The error shows what was written and what can be written."""
        with pytest.raises(
            ValueError, match=r"is not a rate: write N/second, N/minute or N/hour .* or \"off\""
        ) as error:
            parse_rate(text)
        assert repr(text) in str(error.value)


class TestRetryAfterSeconds:
    NOW = 784_111_777.0
    """Sun, 06 Nov 1994 08:49:37 GMT."""
    VENDOR = "API rate limit of 100 requests per minute exceeded. Please try again in 30 seconds."

    @pytest.mark.parametrize(
        ("header", "text", "seconds"),
        [
            ("120", "", 120),
            (" 1.5 ", "", 1.5),
            ("0", "", 1),
            ("999999999", "", 3600),
            ("Sun, 06 Nov 1994 08:50:07 GMT", "", 30),
            ("Sunday, 06-Nov-94 08:50:07 GMT", "", 30),
            ("Sun Nov  6 08:50:07 1994", "", 30),
            ("Sun, 06 Nov 1994 08:49:07 GMT", "", 1),
            ("Sun, 06 Nov 2094 08:49:07 GMT", "", 3600),
            ("7", VENDOR, 7),
            (None, VENDOR, 30),
            (None, VENDOR.encode(), 30),
            (None, b'{"code": 429, "message": "Wait 1 second"}', 1),
            (None, "retry in 12s", 12),
            (None, gzip.compress(VENDOR.encode()), 30),
            (None, gzip.compress(VENDOR.encode())[:-8], 30),
            (None, gzip.compress(b"-" * 99_999 + VENDOR.encode()), None),
            (None, b"\x1f\x8b, in 5 seconds", 5),
            (None, b"\xff\xfe 45 sec", 45),
            ("soon", VENDOR, 30),
            ("-5", VENDOR, 30),
            ("Mon, 1 Jan 99999999999 00:00:00 GMT", VENDOR, 30),
            ("soon", "", None),
            (None, "API rate limit of 100 requests per minute exceeded.", None),
            (None, b"", None),
        ],
    )
    def test_reads_what_the_429_says(self, header: str | None, text: str | bytes, seconds: float | None) -> None:
        """Retry-After in seconds or as a date counts first, then the text; both within one second and one hour."""
        fields = [] if header is None else [(b"Retry-After", header.encode())]
        text = text if isinstance(text, bytes) else text.encode()
        assert seconds == retry_after_seconds(fields, text, self.NOW)

    @pytest.mark.parametrize(
        ("date", "seconds"),
        [("Sun, 06 Nov 1994 08:10:04 GMT", 3), ("Sun, 06 Nov 1994 08:10:10 GMT", 1), ("yesterday", 30), (None, 30)],
    )
    def test_a_date_is_held_against_the_answers_own(self, date: str | None, seconds: float) -> None:
        """The server's clock may be 40 minutes behind ours; only where it tells no date, ours counts."""
        until = b"Sun, 06 Nov 1994 08:10:07 GMT"
        ours = self.NOW if date in {None, "yesterday"} else self.NOW + 2400
        if date in {None, "yesterday"}:
            until = b"Sun, 06 Nov 1994 08:50:07 GMT"
        fields = [(b"retry-after", until), (b"Retry-After", b"900")] + ([(b"DATE", date.encode())] if date else [])
        assert seconds == retry_after_seconds(fields, b"", ours)

    @settings(max_examples=50)
    @given(st.none() | st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d+ Jan \d+ \d+:\d+:\d+ [-+A-Z0-9]+"), st.binary())
    def test_survives_anything(self, header: str | None, text: bytes) -> None:
        """No answer of an upstream makes it raise or leave its bounds."""
        value = (header or "").encode("utf-8", "replace")
        seconds = retry_after_seconds([(b"Retry-After", value), (b"Date", value)], text, self.NOW)
        assert seconds is None or 1 <= seconds <= 3600


class TestPacing:
    def test_seventy_at_once_then_the_reserve_lasts_until_the_first_slot_returns(self) -> None:
        """At 100/minute 70 go at once, 30 within the window, and the 101st with the first slot that returns."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        tickets = [quota.ask(0, "tool", 100) for _ in range(31)]
        assert {n: pytest.approx((n + 1) * PACE) for n in range(31)} == grants(quota, 0, tickets)

    def test_a_clump_that_returns_is_spread(self) -> None:
        """A queue that never empties gets the 70 slots that return together at the pace of the limit, not at once."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        tickets = [quota.ask(0, "tool", 200) for _ in range(130)]
        times = list(grants(quota, 0, tickets).values())
        assert pytest.approx(60.06) == times[30]
        assert [pytest.approx(60.06 / 100)] * 99 == [late - early for early, late in pairwise(times[30:])]

    def test_the_burst_is_back_after_an_idle_window(self) -> None:
        """Who was idle for a window may send 70 at once again."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        spend(quota, 60.07, 70)
        assert quota.ask(60.07, "tool", 20).state != "granted"

    def test_an_earlier_moment_counts_as_the_latest(self) -> None:
        """A request that asks before the one before it finds what that found: slots whose time is over are free."""
        quota = Quota(100, 60.0)
        spend(quota, 0.0, 69)
        quota.ask(61.0, "tool", 0.0)
        assert 1 == quota.snapshot(60.0).used
        assert "granted" == quota.ask(59.0, "tool", 0.0).state

    def test_a_slower_tool_never_waits(self) -> None:
        """Over the burst, a request that comes later than its turn by the pace goes at once."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        for n in range(1, 500):
            spend(quota, n * 2, 1)

    @pytest.mark.parametrize(
        ("limit", "window", "burst", "wait"),
        [(1, 1, 1, 1.001), (2, 1, 1, 0.5005), (5, 60, 3, 20.02), (20, 1, 14, 1.001 / 7)],
    )
    def test_small_limits(self, limit: int, window: float, burst: int, wait: float) -> None:
        """One always goes at once, and the next one's wait is never longer than a window."""
        quota = Quota(limit, window)
        spend(quota, 0, burst)
        assert [pytest.approx(wait)] == list(grants(quota, 0, [quota.ask(0, "tool", 100)]).values())

    def test_burst_one_means_no_pacing(self) -> None:
        """A burst of 1.0 gives the whole limit at once, and then nothing for a window."""
        quota = Quota(100, 60, burst=1.0)
        spend(quota, 0, 100)
        with pytest.raises(QuotaExceeded) as refusal:
            quota.ask(0, "tool", 20)
        assert pytest.approx(60.06) == refusal.value.retry_after

    def test_requests_in_flight_keep_their_slots(self) -> None:
        """While nothing is answered nothing more goes than the limit, and the next poll never lies in the past."""
        quota = Quota(10, 60)
        for n in range(10):
            quota.ask(n * 90, "tool", 0).send()
        waiting = quota.ask(810, "tool", 1000)
        assert [810, 870.06, 930.12] == pytest.approx(list(follow(quota, 810, 950)))
        assert 10 == quota.snapshot(950).in_flight
        assert waiting.state != "granted"

    def test_slow_answers_are_reckoned_with(self) -> None:
        """Slots return one window after the answer: of late answers took 5 s, so a turn comes that much later."""
        quota = Quota(1, 10)
        for n in range(50):
            ticket = quota.ask(n * 20.0, "tool", 0)
            ticket.send()
            quota.answered(ticket, n * 20.0 + 5)
        quota.ask(1000, "tool", 0)
        with pytest.raises(QuotaExceeded) as refusal:
            quota.ask(1000, "tool", 14)
        assert pytest.approx(15.01, abs=0.01) == refusal.value.retry_after
        quota.ask(1000, "tool", 16)
        with pytest.raises(QuotaExceeded) as refusal:
            quota.ask(1000, "tool", 29)
        assert pytest.approx(30.02, abs=0.02) == refusal.value.retry_after

    def test_a_turn_stays_where_answers_take_longer_than_the_window(self) -> None:
        """However slow answers were of late, a promised turn does not move on with the time that passes until then."""
        quota = Quota(1, 10, burst=0.0)
        slow = quota.ask(0, "tool", 0)
        slow.send()
        quota.answered(slow, 120)
        ticket = quota.ask(120, "tool", 20)
        assert [120, 130.01] == pytest.approx(list(follow(quota, 120)))
        assert ticket.state == "granted"

    def test_rounding_releases_nothing_early(self) -> None:
        """Whatever the moment's last bits: the slot that returns is back before the next one goes."""
        for n in range(200):
            quota = Quota(2, 60, burst=1.0)
            spend(quota, n / 7, 1)
            spend(quota, n / 7 + 0.1, 1)
            quota.ask(n / 7 + 0.2, "tool", 60)
            for moment in follow(quota, n / 7 + 0.2):
                assert 2 == quota.snapshot(moment).used

    def test_a_driver_that_wakes_late_makes_up_for_it(self) -> None:
        """Lateness below 1/20 of the window does not add up: the pace counts from when a release was due."""
        quota = Quota(20, 1)
        spend(quota, 0, 14)
        tickets = [quota.ask(0, "tool", 20) for _ in range(5)]
        due = quota.poll(0) or 0
        assert pytest.approx(1.001 / 7) == due
        assert pytest.approx(2 * 1.001 / 7) == quota.poll(due + 0.04)
        assert [True, False, False, False, False] == [ticket.state == "granted" for ticket in tickets]

    def test_a_driver_that_slept_does_not_release_all_at_once(self) -> None:
        """What was missed by more than 1/20 of the window is not made up for."""
        quota = Quota(20, 1)
        spend(quota, 0, 14)
        tickets = [quota.ask(0, "tool", 20) for _ in range(20)]
        quota.poll(0)
        quota.poll(15)
        assert 1 == sum(ticket.state == "granted" for ticket in tickets)

    def test_large_limits_need_little_memory(self) -> None:
        """Above 128 slots those answered within 1/128 window return together."""
        quota = Quota(100_000, 60)
        for n in range(30_000):
            spend(quota, n / 200, 1)
        assert 130 >= len(quota.window._cells)
        shot = quota.snapshot(150)
        assert 12_012 <= shot.used <= 12_012 * 129 / 128
        assert {"tool": shot.used} == shot.used_by_caller

    def test_one_text_of_a_caller(self) -> None:
        """However many slots it has: 50,000 requests, each of which spells it anew, cost less than 64 KiB."""
        quota = Quota(100_000, 60)
        tracemalloc.start()
        try:
            for n in range(50_000):
                spend(quota, n / 1000, 1, copied("a tool with a name of its own"))
            grown = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert 50_000 == quota.snapshot(50).used
        assert 64 * 1024 > grown

    def test_another_librarys_moving_window_agrees(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """300 at once at 20 a second are all let through, in time, by a limiter that was written by others."""
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr(limits.storage.memory, "time", SimpleNamespace(time=lambda: clock.now))
        storage = limits.storage.memory.MemoryStorage()
        limiter, quota = MovingWindowRateLimiter(storage), Quota(20, 1)
        moments = sorted(grants(quota, 0, [quota.ask(0, caller, 20) for caller in "abc" * 100]).values())
        for clock.now in moments:
            assert limiter.hit(RateLimitItemPerSecond(20, 1))
        storage.timer.join()
        assert (300, True) == (len(moments), moments[-1] < 1.1 * 280 / 20)


class TestFairness:
    @pytest.mark.parametrize(
        ("asked", "order"), [("aaaabb", "ababaa"), ("aabbcc", "abcabc"), ("abcba", "abcab"), ("aaabcbb", "abcabab")]
    )
    def test_round_robin(self, asked: str, order: str) -> None:
        """Callers take turns; within one the first to come goes first."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        tickets = [quota.ask(0, caller, 100) for caller in asked]
        granted = list(grants(quota, 0, tickets))
        assert order == "".join(asked[n] for n in granted)
        assert granted == sorted(granted, key=lambda n: (asked[:n].count(asked[n]), granted.index(n)))

    def test_one_who_was_served_goes_to_the_end(self) -> None:
        """A caller that comes back at once finds itself behind all those that wait."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        first, second = quota.ask(0, "a", 20), quota.ask(0, "b", 20)
        assert quota.poll(2) is not None
        again = quota.ask(2, "a", 20)
        quota.poll(4)
        assert [True, True, False] == [first.state == "granted", second.state == "granted", again.state == "granted"]

    def test_the_projection_knows_whose_turn_it_is(self) -> None:
        """With eight of a greedy caller waiting the ninth is refused, and another caller's first is not."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        for _ in range(8):
            quota.ask(0, "greedy", 20)
        with pytest.raises(QuotaExceeded):
            quota.ask(0, "greedy", 9 * PACE - 0.1)
        slow = quota.ask(0, "slow", 2 * PACE + 0.1)
        assert {0: pytest.approx(2 * PACE)} == grants(quota, 0, [slow])

    @settings(max_examples=30)
    @given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=20))
    def test_the_projected_place_is_the_real_one(self, asked: list[str]) -> None:
        """Who asks last gets the place that it was promised."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        tickets = [quota.ask(0, caller, 1000) for caller in asked[:-1]]
        place = quota.queue.place(asked[-1])
        tickets.append(quota.ask(0, asked[-1], 1000))
        assert tickets[-1] is list(quota.queue)[place - 1]
        assert len(tickets) - 1 == list(grants(quota, 0, tickets))[place - 1]


class Hashed(str):
    """A name whose hash is chosen."""

    __slots__ = ("number",)

    def __new__(cls, text: str, number: int) -> Self:
        """Take both."""
        made = super().__new__(cls, text)
        made.number = number
        return made

    def __hash__(self) -> int:
        """Return what was chosen."""
        return self.number


@dataclass
class Asker:
    """A tool that asks again ``pause`` seconds after it was served, or when ``after`` says so after a refusal."""

    names: Iterator[str]
    at: float
    pause: float
    after: Callable[[float], float]
    ticket: Ticket | None = None
    served: list[bool] = field(default_factory=list)

    def step(self, quota: Quota, callers: Callers, now: float) -> None:
        """Do what is due."""
        if self.ticket is None and self.at <= now:
            try:
                self.ticket = quota.ask(now, callers.name(next(self.names), now), 20.0)
            except QuotaExceeded as refusal:
                self._over(served=False, at=now + self.after(refusal.retry_after))
        elif self.ticket is not None and self.ticket.state == "granted":
            self.ticket.send()
            quota.answered(self.ticket, now)
            self._over(served=True, at=now + self.pause)
        elif self.ticket is not None and self.ticket.refused is not None:
            self._over(served=False, at=now + self.after(self.ticket.refused.retry_after))

    def _over(self, *, served: bool, at: float) -> None:
        self.ticket, self.at = None, at
        self.served.append(served)


class TestCallers:
    NAMES = tuple(f"tool {number}" for number in range(TOLD_APART))

    def asked(self, times: int) -> Callers:
        """Return what knows as many names as there is room for, each of which asked so many times at 0.0."""
        callers = Callers()
        for _ in range(times):
            assert [*self.NAMES] == [callers.name(name, 0.0) for name in self.NAMES]
        return callers

    def test_while_there_is_room(self) -> None:
        """Each has its place from its first request on, and keeps it for as long as nobody needs it."""
        callers = self.asked(1)
        assert [*self.NAMES] == [callers.name(name, 1e6) for name in self.NAMES]

    def test_a_new_name_shares_a_place_until_it_asks_again(self) -> None:
        """Then it takes that of one that asked once, longest ago; who lost it so gets one like any other."""
        callers = self.asked(1)
        for name in self.NAMES[1:]:
            callers.name(name, 1.0)
        assert [OTHERS, "a", OTHERS, OTHERS] == [callers.name(name, 2.0) for name in "aabb"]
        assert OTHERS == callers.name("tool 0", LATELY), "all others asked again"
        assert ["tool 0", OTHERS] == [callers.name(name, LATELY + 1.0) for name in ("tool 0", "c")]

    def test_who_asked_again_keeps_its_place_for_a_while(self) -> None:
        """Its place is another's once it has not asked for so long, and not before."""
        callers = self.asked(2)
        assert self.NAMES[1] == callers.name(self.NAMES[1], 1.0)
        assert [OTHERS, OTHERS] == [callers.name("a", now) for now in (2.0, LATELY - 0.1)]
        assert ["a", self.NAMES[1]] == [callers.name(name, LATELY) for name in ("a", self.NAMES[1])]

    def test_invented_names_displace_nobody(self) -> None:
        """However many there are, if each is used once; not even one that asked once itself."""
        callers = self.asked(1)
        assert {OTHERS} == {callers.name(f"invented {number}", 1e6) for number in range(10_000)}
        assert [*self.NAMES] == [callers.name(name, 1e6) for name in self.NAMES]

    def test_what_is_remembered(self) -> None:
        """Two names in one cell: the newer one is known; another one that differs in any bit of the mark is not."""
        callers, cell = self.asked(1), 7
        mark = (ASKED_BEFORE << 20) + cell
        one, same, other = (Hashed(*each) for each in (("one", mark), ("same", mark), ("other", mark + ASKED_BEFORE)))
        assert [OTHERS, OTHERS, OTHERS, "one"] == [callers.name(name, 1.0) for name in (one, other, one, one)]
        assert "same" == callers.name(same, 1.0), "which is as if one had asked"
        assert OTHERS == callers.name(Hashed("negative", ~mark), 1.0)
        assert "negative" == callers.name(Hashed("negative", ~mark), 1.0)

    def test_who_loses_its_place_is_remembered(self) -> None:
        """Though another name came meanwhile whose mark falls on the same cell."""
        callers = Callers()
        first, other = Hashed("first", ASKED_BEFORE + 7), Hashed("other", 2 * ASKED_BEFORE + 7)
        assert first == callers.name(first, 0.0)
        for name in self.NAMES[1:]:
            callers.name(name, 1.0)
        assert [OTHERS, OTHERS, "a"] == [callers.name(name, 2.0) for name in (other, "a", "a")]
        assert first == callers.name(first, 2.0)

    @pytest.mark.parametrize("after", [math.ceil, lambda _: 2.0], ids=["when told", "each 2 s"])
    def test_a_new_name_for_each_request_starves_nobody(self, after: Callable[[float], float]) -> None:
        """Sixty that do so, and ask again at once: who was there before has its turns, and so has who comes later."""
        quota, callers = Quota(100, 60), Callers()
        invented = (f"invented {number}" for number in count())
        before, later = (Asker(repeat(name), at, 2.0, after) for name, at in (("before", 0.0), ("later", 30.0)))
        crowd = [Asker(invented, 5.0, 0.0, lambda _: 0.0) for _ in range(60)]
        for step in range(2 * 150):
            now = step / 2
            for asker in (*crowd, before, later):
                asker.step(quota, callers, now)
            quota.poll(now)
        for tool, seconds in ((before, 150), (later, 120)):
            assert seconds / 10 < len(tool.served)
            assert 0.8 <= sum(tool.served[1:]) / len(tool.served[1:])
        assert 0 < sum(sum(asker.served) for asker in crowd)


class TestRefusals:
    def test_a_wait_beyond_the_budget_is_refused_at_once(self) -> None:
        """Ten are served within 20 s, the eleventh would not be; its Retry-After is its turn."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        tickets = [quota.ask(0, "tool", 20) for _ in range(10)]
        with pytest.raises(QuotaExceeded) as refusal:
            quota.ask(0, "tool", 20)
        assert pytest.approx(11 * PACE) == refusal.value.retry_after
        assert 10 == len(grants(quota, 0, tickets))
        assert quota.ask(refusal.value.retry_after + 1e-9, "tool", 0).state == "granted"

    def test_at_most_max_waiting_wait(self) -> None:
        """One more than ``max_waiting`` is refused whatever its patience."""
        quota = Quota(1, 1, max_waiting=2)
        spend(quota, 0, 1)
        quota.ask(0, "a", 100)
        quota.ask(0, "b", 100)
        with pytest.raises(QuotaExceeded) as refusal:
            quota.ask(0, "c", 100)
        assert pytest.approx(3.003) == refusal.value.retry_after

    def test_one_caller_has_half_of_the_places(self) -> None:
        """However patient it is; the other half is for the others."""
        quota = Quota(1, 1)
        spend(quota, 0, 1)
        for _ in range(500):
            quota.ask(0, "greedy", 10_000)
        with pytest.raises(QuotaExceeded):
            quota.ask(0, "greedy", 10_000)
        assert "waiting" == quota.ask(0, "modest", 10_000).state

    def test_one_who_is_overtaken_is_refused_at_its_deadline(self) -> None:
        """Newcomers whose turn comes first push it back: it is told so at its deadline, with a true Retry-After."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        tickets = [quota.ask(0, "greedy", 2 * PACE + 0.1) for _ in range(2)]
        settled: list[Ticket] = []
        tickets[1].on_settled = lambda: settled.append(tickets[1])
        other = quota.ask(0, "other", 30)
        moments = list(follow(quota, 0))
        assert [0, PACE, 2 * PACE, 2 * PACE + 0.1] == pytest.approx(moments)
        assert ["granted", "granted", "over"] == [tickets[0].state, other.state, tickets[1].state]
        assert [tickets[1]] == settled
        assert tickets[1].refused is not None
        assert pytest.approx(PACE - 0.1) == tickets[1].refused.retry_after
        assert quota.ask(moments[-1] + tickets[1].refused.retry_after + 1e-9, "greedy", 0).state == "granted"

    def test_deadlines_of_those_that_went_already_do_no_harm(self) -> None:
        """A poll at a deadline that is no longer anybody's refuses nobody."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        quota.ask(0, "a", 3)
        patient = [quota.ask(0, "b", 30), quota.ask(0, "b", 30)]
        assert [0, PACE, 3, 2 * PACE, 3 * PACE] == pytest.approx(list(follow(quota, 0)))
        assert [True, True] == [ticket.state == "granted" for ticket in patient]


class TestCancel:
    def test_a_place_is_given_back(self) -> None:
        """Those behind a waiting client that left move up."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        left, stays = quota.ask(0, "tool", 20), quota.ask(0, "tool", 20)
        quota.cancel(left, 0)
        assert {1: pytest.approx(PACE)} == grants(quota, 0, [left, stays])
        assert left.refused is None

    def test_a_slot_that_was_never_sent_is_given_back(self) -> None:
        """It counts as never taken, for window and pace alike."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        ticket = quota.ask(30, "tool", 0)
        quota.cancel(ticket, 30)
        assert (70, {"tool": 70}) == (quota.snapshot(30).used, quota.snapshot(30).used_by_caller)
        assert quota.ask(30, "tool", 0).state == "granted"
        first = Quota(1, 60)
        first.cancel(first.ask(0, "tool", 0), 0)
        assert first.ask(0, "tool", 0).state == "granted"

    def test_the_pace_counts_from_the_latest_release(self) -> None:
        """An earlier slot given back leaves the pace alone."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        early = quota.ask(10, "tool", 0)
        assert quota.ask(20, "tool", 0).state == "granted"
        quota.cancel(early, 20)
        assert quota.ask(20, "tool", 20).state != "granted"

    def test_a_slot_given_back_goes_to_who_waits(self) -> None:
        """Seventy that could not be sent after all pass theirs on at once, one by one, and nobody waits for a pace."""
        quota = Quota(100, 60)
        held = [quota.ask(0, "tool", 0) for _ in range(70)]
        waiting = [quota.ask(0, "tool", 60) for _ in range(25)]
        quota.poll(0)
        for number, ticket in enumerate(held, 1):
            quota.cancel(ticket, 1)
            quota.poll(1)
            assert min(number, 25) == sum(ticket.state == "granted" for ticket in waiting)
        assert (25, 25, 0) == (quota.snapshot(1).used, quota.snapshot(1).in_flight, quota.snapshot(1).waiting)

    def test_a_closed_window_keeps_a_slot_given_back(self) -> None:
        """Metquay's 429 holds for what others did not send, too."""
        quota = Quota(100, 60)
        held = [quota.ask(0, "tool", 0) for _ in range(70)]
        ticket = quota.ask(0, "tool", 60)
        quota.close(0, 5)
        quota.cancel(held[0], 1)
        assert 5 == quota.poll(1)
        assert ticket.state != "granted"

    def test_who_comes_after_a_slot_given_back(self) -> None:
        """Whose turn comes behind the one that gets that slot is told its true time, in a closed window too."""
        quota = Quota(1, 10.0)
        given_up = quota.ask(0, "a", 0)
        quota.close(0, 5)
        first = quota.ask(0, "a", 20)
        quota.cancel(given_up, 0)
        with pytest.raises(QuotaExceeded) as refusal:
            quota.ask(0, "b", 0)
        assert pytest.approx(5 + 10 * SAFETY) == refusal.value.retry_after
        quota.poll(5)
        assert first.state == "granted"

    def test_what_was_sent_counts_as_answered(self) -> None:
        """An attempt given up after sending keeps its slot for a window."""
        quota = Quota(1, 60)
        ticket = quota.ask(0, "tool", 0)
        ticket.send()
        quota.cancel(ticket, 10)
        assert (1, 0) == (quota.snapshot(70).used, quota.snapshot(70).in_flight)
        assert 0 == quota.snapshot(70.07).used

    def test_the_end_is_the_end(self) -> None:
        """Cancelled or answered twice, or cancelled after the answer: counted once."""
        quota = Quota(10, 60)
        (ticket,) = spend(quota, 0, 1)
        quota.cancel(ticket, 1)
        quota.answered(ticket, 1)
        given_back = quota.ask(1, "tool", 0)
        quota.cancel(given_back, 1)
        quota.cancel(given_back, 1)
        assert (1, 0) == (quota.snapshot(1).used, quota.snapshot(1).in_flight)

    def test_only_what_is_granted_may_be_sent(self) -> None:
        """Sending twice, or without a grant, is a mistake of the caller's that must not pass."""
        quota = Quota(1, 60)
        ticket = quota.ask(0, "tool", 0)
        ticket.send()
        with pytest.raises(ValueError, match="a ticket that is sent must not be sent"):
            ticket.send()
        with pytest.raises(ValueError, match="waiting"):
            quota.ask(0, "tool", 100).send()


class TestClose:
    def test_nothing_goes_while_closed(self) -> None:
        """Waiting requests and new ones go when the 429's time is over, at the pace of the limit."""
        quota = Quota(100, 60)
        spend(quota, 0, 1)
        quota.close(0, 10)
        tickets = [quota.ask(1, "tool", 20) for _ in range(3)]
        assert [10, 10.6006, 11.2012] == pytest.approx(list(grants(quota, 1, tickets).values()))

    def test_some_wait_for_the_pace_alone(self) -> None:
        """A ticket whose patience with a closed window is shorter than that is refused, whatever its deadline."""
        for patience, refused in ((34.9, True), (35.0, False)):
            quota = Quota(100, 60)
            spend(quota, 0, 70)
            ticket = quota.ask(0, "tool", 86400)
            ticket.patience = patience
            quota.close(0, 35)
            assert refused == (ticket.refused is not None)

    def test_those_that_cannot_wait_so_long_are_refused_at_once(self) -> None:
        """The others move up; the Retry-After of those refused is true."""
        quota = Quota(100, 60)
        spend(quota, 0, 70)
        tickets = [quota.ask(0, "tool", wait) for wait in (5, 40, 10, 36)]
        quota.close(0, 35)
        assert [True, False, True, False] == [ticket.refused is not None for ticket in tickets]
        assert tickets[0].refused is not None
        retry_after = tickets[0].refused.retry_after
        assert [(1, 35), (3, pytest.approx(35.835, abs=0.001))] == list(grants(quota, 0, tickets).items())
        assert quota.ask(retry_after + 1e-9, "tool", 0).state == "granted"

    def test_new_ones_that_cannot_wait_are_refused(self) -> None:
        """An idle quota that is closed says for how long."""
        quota = Quota(100, 60)
        quota.close(0, 30)
        with pytest.raises(QuotaExceeded) as refusal:
            quota.ask(10, "tool", 19)
        assert 20 == refusal.value.retry_after
        assert quota.ask(10, "tool", 20).state == "waiting"
        assert quota.ask(10, "other", 21).state == "waiting"

    def test_a_shorter_time_opens_nothing(self) -> None:
        """Of several 429 the longest time counts."""
        quota = Quota(100, 60)
        quota.close(0, 30)
        quota.close(1, 5)
        assert 29 == quota.snapshot(1).closed_for

    @pytest.mark.parametrize(("first", "seconds"), [(None, 60.06), (5.0, 55.06)])
    def test_without_a_time_until_the_first_slot_returns(self, first: float | None, seconds: float) -> None:
        """Where the 429 does not say, our own oldest slot decides, and a whole window if we have none."""
        quota = Quota(100, 60)
        if first is not None:
            spend(quota, first, 2)
            spend(quota, 10, 1)
        quota.close(10, None)
        assert pytest.approx(seconds) == quota.snapshot(10).closed_for


class TestWindow:
    """What those that share a quota need beside."""

    def test_slots_that_others_are_taken_to_have(self) -> None:
        """They count as used until their moment comes, or until better is known."""
        window = Window(Rate(10, 60), 0.7)
        window.lend("others", [5.0, 1.0])
        assert (2, {"others": 2}) == (window.used, window.used_by())
        window.advance(1.0)
        assert (1, {"others": 1}) == (window.used, window.used_by())
        window.lend("others", [])
        assert (0, {}) == (window.used, window.used_by())

    def test_a_tool_that_calls_itself_like_the_others(self) -> None:
        """Its own slots stay its own, and those of whoever was answered at that time."""
        quota = Quota(1000, 60)
        spend(quota, 0, 1, "others")
        spend(quota, 0, 1, "tool")
        flying = quota.ask(0, "others", 0)
        flying.send()
        quota.window.lend("others", [5.0])
        assert {"others": 3, "tool": 1} == quota.snapshot(1).used_by_caller
        quota.window.lend("others", [])
        assert {"others": 2, "tool": 1} == quota.snapshot(1).used_by_caller
        quota.answered(flying, 1)
        assert (3, 0) == (quota.snapshot(60).used, quota.snapshot(62).used)


class TestSnapshot:
    def test_figures(self) -> None:
        """Everything that status page and metrics show."""
        quota = Quota(10, 60)
        spend(quota, 0, 5, "a")
        quota.ask(0, "b", 0).send()
        quota.ask(0, "b", 0)
        for caller in "abb":
            quota.ask(1, caller, 60)
        shot = quota.snapshot(1)
        assert (10, 60, 7, 2, 3, 0) == (*shot[:5], shot.closed_for)
        assert {"a": 1, "b": 2} == shot.waiting_by_caller
        assert {"a": 5, "b": 2} == shot.used_by_caller
        assert pytest.approx(59.06) == shot.next_free_in

    def test_idle(self) -> None:
        """An idle quota has a slot at once, and closed ones count down."""
        quota = Quota(10, 60)
        assert (0, 0) == (quota.snapshot(0).next_free_in, quota.snapshot(0).closed_for)
        quota.close(0, 3)
        assert (2, 2) == (quota.snapshot(1).next_free_in, quota.snapshot(1).closed_for)

    def test_a_clock_that_jumps_back(self) -> None:
        """Time stands still until the clock has caught up; nothing raises and nothing is released sooner."""
        quota = Quota(1, 60)
        spend(quota, 100, 1)
        ticket = quota.ask(99.9, "tool", 70)
        assert 170 == ticket.deadline
        assert pytest.approx(160.06) == quota.poll(98)
        quota.cancel(ticket, 97)
        quota.close(96, 1)
        assert (1, 1) == (quota.snapshot(95).used, quota.snapshot(95).closed_for)
        late = Quota(1, 60)
        ticket = late.ask(100, "tool", 0)
        ticket.send()
        late.answered(ticket, 99)
        assert (1, 0, 0.0) == (late.snapshot(160).used, late.snapshot(160.07).used, late.window.latency)


WINDOW = 10.0
LIMIT = 8


class Server(RuleBasedStateMachine):
    """The quota against a server that counts each request anywhere between its release and its answer."""

    @initialize(limit=st.sampled_from([1, 2, 3, LIMIT, 200]), burst=st.sampled_from([0.0, 0.5, 0.7, 1.0]))
    def start(self, limit: int, burst: float) -> None:
        """Begin with an idle quota; the cells of large limits are tried on a small one."""
        self.limit = min(limit, LIMIT)
        self.quota = Quota(self.limit, WINDOW, burst=burst, max_waiting=20)
        if limit > LIMIT:
            self.quota.window._grain = WINDOW / 5
            self.quota.window._hold += WINDOW / 5
        self.now = 0.0
        self.arrivals: list[float] = []
        self.tickets: list[Ticket] = []
        self.released: dict[Ticket, float] = {}
        self.sent_out: set[Ticket] = set()

    @rule(seconds=st.floats(0, 3) | st.sampled_from([0.0, WINDOW, 60.0]))
    def let_time_pass(self, seconds: float) -> None:
        """The driver polls whenever it was told to."""
        end = self.now + seconds
        for moment in follow(self.quota, self.now, end):
            self.now = moment
            self._note_grants()
        self.now = end

    @rule(
        caller=st.sampled_from("abc"),
        max_wait=st.sampled_from([0.0, 1.0, 5.0, 20.0, 100.0]),
        number=st.sampled_from([1, 1, 1, 3, 15]),
    )
    def ask(self, caller: str, max_wait: float, number: int) -> None:
        """Who is refused comes back in time and gets through, if nobody else came; who is not gets its slot in time."""
        for _ in range(number):
            try:
                ticket = self.quota.ask(self.now, caller, max_wait)
            except QuotaExceeded as refusal:
                self._comes_back(caller, refusal.retry_after)
                return
            self.tickets.append(ticket)
            self._note_grants()
            if ticket.state != "granted":
                self._play_on(self.now + max_wait + 1e-6, ticket)

    @rule(pick=st.randoms(use_true_random=False), number=st.sampled_from([1, 5]))
    def send(self, pick: random.Random, number: int) -> None:
        """Some of those granted go out."""
        ready = [ticket for ticket in self.tickets if ticket.state == "granted"]
        for ticket in pick.sample(ready, min(number, len(ready))):
            ticket.send()
            self.sent_out.add(ticket)

    @rule(pick=st.randoms(use_true_random=False), number=st.sampled_from([1, 5]), give_up=st.booleans())
    def answer(self, pick: random.Random, number: int, *, give_up: bool) -> None:
        """Some of those in flight are answered, or fail: the server counted them somewhere on the way."""
        flying = [ticket for ticket in self.tickets if ticket.state == "sent"]
        for ticket in pick.sample(flying, min(number, len(flying))):
            (self.quota.cancel if give_up else self.quota.answered)(ticket, self.now)
            released = self.released[ticket]
            self.arrivals.append(pick.choice([released, self.now, pick.uniform(released, self.now)]))

    @rule(pick=st.randoms(use_true_random=False))
    def leave(self, pick: random.Random) -> None:
        """A client goes while it waits, or before its request was sent."""
        here = [ticket for ticket in self.tickets if ticket.state in {"waiting", "granted"}]
        if here:
            self.quota.cancel(pick.choice(here), self.now)
            self._note_grants()

    @rule(seconds=st.sampled_from([None, 0.5, 5.0, 30.0]))
    def refuse(self, seconds: float | None) -> None:
        """The server answers 429."""
        self.quota.close(self.now, seconds)

    @rule(back=st.floats(0, 2))
    def jump_back(self, back: float) -> None:
        """The clock shows an earlier time once."""
        self.quota.poll(self.now - back)
        self._note_grants()
        self.quota.snapshot(self.now - back)

    @invariant()
    def no_window_holds_more_than_the_limit(self) -> None:
        """Counted by force: any limit + 1 arrivals in a row span more than a window."""
        arrivals = sorted(self.arrivals)
        assert all(late - early > WINDOW for early, late in zip(arrivals, arrivals[self.limit :], strict=False))

    @invariant()
    def figures_agree(self) -> None:
        """What the quota counts is what there is."""
        shot = self.quota.snapshot(self.now)
        states = [ticket.state for ticket in self.tickets]
        assert shot.waiting == states.count("waiting") == sum(shot.waiting_by_caller.values())
        assert shot.in_flight == states.count("granted") + states.count("sent")
        assert shot.in_flight <= shot.used == sum(shot.used_by_caller.values()) <= self.limit
        assert all(ticket.deadline >= self.now for ticket in self.tickets if ticket.state == "waiting")

    def teardown(self) -> None:
        """Answer the rest, and count once more."""
        if hasattr(self, "quota"):
            self.answer(random.Random(0), len(self.tickets), give_up=False)  # noqa: S311 - a choice, not a secret
            self.no_window_holds_more_than_the_limit()

    def _note_grants(self) -> None:
        for ticket in self.tickets:
            if ticket.state == "granted":
                self.released.setdefault(ticket, self.now)

    def _comes_back(self, caller: str, seconds: float) -> None:
        later = self._play_on(self.now + seconds)
        assert later.ask(self.now + seconds + 1e-6, caller, 0).state == "granted"

    def _play_on(self, until: float, promised: Ticket | None = None) -> Quota:
        """Return a copy in which nobody else came until then and answers were no slower than of late."""
        quota, tickets, mine = copy.deepcopy((self.quota, self.tickets, promised))
        moments = follow(quota, self.now, until)
        now = self.now
        while True:
            for ticket in tickets:
                if ticket.state == "granted":
                    ticket.send()
                quota.answered(ticket, now)
            quota.window.latency = self.quota.window.latency
            if mine is not None and mine.state == "over":
                assert mine.refused is None
                return quota
            try:
                now = next(moments)
            except StopIteration:
                assert mine is None
                return quota


TestServer = Server.TestCase
TestServer.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
