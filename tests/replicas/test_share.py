from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.replicas import Simulation
from benchmarks.script import KEYS, QUOTA, Script
from metquay_proxy.replicas.share import BEAT, LATE, OTHERS, UNKNOWN, Reply, Share
from metquay_proxy.rules.quota import QuotaExceeded, Rate
from tests.redis_server import needs_redis, redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from metquay_proxy.rules.quota import Ticket
    from tests.redis_server import RedisServer

MINUTE = Rate(100, 60.0)


class Partner:
    """A share, and a window in which it meets the others; time is the test's."""

    def __init__(self, window: Script | Real, name: str = "one", rate: Rate = MINUTE) -> None:
        self.share = Share(rate, name, lambda: 0.5)
        self.window = window
        self.name = name

    def call(self, now: float) -> bool:
        """Make one call; return whether it was carried out."""
        call = self.share.report(now, f"{self.name}-{now}")
        return self.share.replied(now, call, Reply.model_validate_json(self.window.call(1000.0 + now, call)))

    def join(self, now: float = 0.0) -> Partner:
        """Meet the others."""
        while not self.call(now):
            pass
        return self

    def ask(self, now: float, max_wait: float = 20.0, caller: str = "tool") -> Ticket:
        """Ask for a slot, and call if that is wanted."""
        ticket = self.share.ask(now, caller, max_wait)
        while self.share.next_call(now) <= now:
            self.call(now)
        return ticket

    def use(self, now: float, count: int = 1) -> None:
        """Ask for slots, send, and be answered at once."""
        for _ in range(count):
            ticket = self.ask(now)
            assert ticket.state == "granted"
            ticket.send()
            self.share.answered(ticket, now)


def take(share: Share, now: float) -> Ticket | None:
    """Ask for a slot, and let it be if there is none at once."""
    try:
        ticket = share.ask(now, "tool", 0.0)
    except QuotaExceeded:
        return None
    assert ticket.state == "granted"
    return ticket


def pair(now: float = 0.0, rate: Rate = MINUTE) -> tuple[Partner, Partner]:
    """Return two replicas that know of each other."""
    window = Script()
    one, two = Partner(window, "one", rate).join(now), Partner(window, "two", rate).join(now)
    one.call(now + BEAT)
    two.call(now + BEAT)
    assert (2, 2) == (one.share.heard.replicas, two.share.heard.replicas)
    return one, two


def test_alone_at_first() -> None:
    """Before it heard of any other, a replica takes as many to be there as are usual, and keeps to its share."""
    share = Share(MINUTE, "one", lambda: 0.5)
    assert share.local
    assert MINUTE.limit // UNKNOWN == share.snapshot(0.0).limit
    assert take(share, 0.0) is not None
    assert 0.0 >= share.next_call(0.0)


def test_the_first_call_is_refused_and_says_in_which_window_to_tell_of_oneself() -> None:
    """Whoever does not know the window tells it all; then the quota is shared."""
    replica = Partner(Script())
    assert not replica.call(0.0)
    assert replica.share.local
    assert replica.share.next_call(0.0) <= 0.0
    assert replica.call(0.0)
    assert not replica.share.local
    assert MINUTE.limit == replica.share.snapshot(0.0).limit


def test_nothing_is_granted_before_the_others_were_asked() -> None:
    """Neither at once nor by the own books: only a call's answer grants."""
    one, two = pair()
    two.use(1.0, 40)
    ticket = one.share.ask(1.0, "tool", 20.0)
    assert ticket.state != "granted"
    assert one.share.poll(1.0) == 21.0
    assert 1.0 == one.share.next_call(1.0)
    one.call(1.0)
    assert ticket.state == "granted"
    assert 41 == one.share.snapshot(1.0).used


def test_a_slot_comes_back_a_window_after_the_answer() -> None:
    """However late that is told, and whoever asks."""
    one, two = pair(rate=Rate(10, 10.0))
    one.use(1.0, 7)
    for now in (2.0, 10.9):
        one.call(now)
        two.call(now)
    assert 7 == two.window.redis("ZCARD", "back")
    two.call(11.02)
    assert 0 == two.window.redis("ZCARD", "back")


def test_one_stands_in_line_and_is_told_when_to_ask_again() -> None:
    """Its turn is due as by the quota's own pace; the next of its own is due a round later."""
    one, two = pair()
    one.use(1.0, 70)
    first, second = one.ask(1.0), one.share.ask(1.0, "tool", 20.0)
    assert {"waiting"} == {first.state, second.state}
    due = one.share.next_call(1.0)
    assert 1.0 + BEAT * 0.9 <= due <= 1.0 + BEAT * 1.1, "it tells that it lives before its turn"
    pace = 60.06 / 31
    turn = one.window.redis("ZSCORE", "line", "one") - 1000.0
    assert 1.0 + pace == pytest.approx(turn, rel=0.01)
    assert 2 * turn - 1.0 == pytest.approx(1.0 + one.share.snapshot(1.0).next_free_in - pace, rel=0.02)
    one.call(2.0)
    one.call(turn)
    assert first.state == "granted"
    assert second.state != "granted"
    assert 1 == one.window.redis("ZCARD", "line")
    assert two.ask(turn).state == "waiting"
    assert 2 == one.window.redis("ZCARD", "line")


def test_slots_that_were_not_sent_go_to_who_waits() -> None:
    """Those of this replica go at once, since there are enough for the one that is before it; that one goes next."""
    one, two = pair()
    held = [one.ask(1.0) for _ in range(70)]
    waiting = [one.share.ask(1.0, "tool", 20.0) for _ in range(3)]
    other = two.ask(1.0)
    one.call(1.0)
    assert {"waiting"} == {ticket.state for ticket in [*waiting, other]}
    for ticket in held:
        one.share.cancel(ticket, 1.5)
    assert 1.5 == one.share.next_call(1.5)
    one.call(1.5)
    assert {"granted"} == {ticket.state for ticket in waiting}
    due = two.share.next_call(1.5)
    assert due <= 1.0 + 1.1 * BEAT
    two.call(due)
    assert other.state == "granted"
    assert (4, 0) == (one.window.redis("ZCARD", "flight"), one.window.redis("HMGET", "state", "spare")[1])


def test_a_slot_that_was_not_sent_keeps_the_order() -> None:
    """One that comes back goes to the replica that is first in line, not to the one that gives it back."""
    one, two = pair()
    held = [one.ask(1.0) for _ in range(70)]
    other = two.ask(1.0)
    mine = one.ask(1.0)
    one.share.cancel(held[0], 1.5)
    one.call(1.5)
    assert {"waiting"} == {other.state, mine.state}
    two.call(1.6)
    assert other.state == "granted"
    one.call(1.7)
    assert "waiting" == mine.state


def test_alone_before_it_sent_anything() -> None:
    """A replica that has no release to reckon from lets one go from its reserve, and then paces like any other."""
    one, two = pair()
    two.use(1.0, 70)
    one.call(2.1)
    for now in (2.5, 3.0):
        one.share.missed(now)
    assert one.share.local
    assert 35 == one.share.snapshot(3.0).used
    assert one.share.ask(3.0, "tool", 20.0).state == "granted"
    assert 58.0 / 15 == pytest.approx(one.share.snapshot(3.0).next_free_in, rel=0.02)


def test_fair_among_the_callers_of_a_replica() -> None:
    """Whose turn it is among its own callers, a replica decides as ever."""
    one, two = pair(rate=Rate(4, 10.0))
    one.use(1.0, 2)
    greedy = [one.ask(1.0, caller="greedy") for _ in range(2)]
    modest = one.ask(1.0, caller="modest")
    now, order = 1.0, []
    for _ in range(40):
        now += 0.5
        two.call(now)
        one.call(now)
        waited = {"g0": greedy[0], "g1": greedy[1], "m": modest}
        order += [name for name, ticket in waited.items() if ticket.state == "granted"]
        for ticket in (*greedy, modest):
            if ticket.state == "granted":
                ticket.send()
                one.share.answered(ticket, now)
    assert ["g0", "m", "g1"] == order


def test_who_would_wait_too_long_is_refused_at_once_and_told_the_truth() -> None:
    """Who comes back then is served, if nobody else came."""
    one, two = pair()
    one.use(1.0, 70)
    waiting = [one.ask(1.0, caller="a") for _ in range(10)]
    with pytest.raises(QuotaExceeded) as refusal:
        one.ask(1.0, caller="a")
    for ticket in waiting:
        one.share.cancel(ticket, 1.0)
    late = two.share.ask(1.0, "tool", 0.5)
    two.call(1.0)
    assert late.refused is not None
    assert 0.5 < late.refused.retry_after
    assert refusal.value.retry_after > 20
    one.call(1.0)
    assert 0 == one.window.redis("ZCARD", "line"), "who left the line is not waited for"
    back = 1.0 + late.refused.retry_after
    for now in (2.0, 3.0, 4.0, 5.0, 6.0, back):
        one.call(now)
        two.call(now)
    two.use(back)


def test_overdue() -> None:
    """Who is not granted a turn in time is refused at its deadline, though no call was made."""
    one, two = pair()
    two.use(1.0, 70)
    ticket = one.ask(1.0, max_wait=10.0)
    assert 11.0 == one.share.poll(2.0)
    assert 11.0 == one.share.poll(10.9)
    assert one.share.poll(11.0) is None
    assert ticket.refused is not None


def test_a_grant_that_nobody_waits_for_any_more_is_given_back() -> None:
    """The tool left while the call was under way."""
    one, _ = pair()
    ticket = one.share.ask(1.0, "tool", 20.0)
    call = one.share.report(1.0, "x")
    one.share.cancel(ticket, 1.0)
    one.share.replied(1.0, call, Reply.model_validate_json(one.window.call(1001.0, call)))
    assert 1 == one.window.redis("ZCARD", "flight")
    one.call(1.0)
    assert 0 == one.window.redis("ZCARD", "flight")


@pytest.mark.parametrize(("seconds", "closed"), [(30.0, 30.0), (None, 60.06)])
def test_metquays_own_refusal_closes_the_window_for_all(seconds: float | None, closed: float) -> None:
    """For as long as it said, else until a slot comes back; who can't wait so long is refused."""
    one, two = pair()
    one.use(1.0)
    one.call(1.0)
    ticket = two.share.ask(1.0, "tool", 20.0)
    one.share.close(1.0, seconds)
    assert 1.0 == one.share.next_call(1.0)
    one.call(1.0)
    two.call(1.0)
    assert ticket.refused is not None
    for replica in (one, two):
        assert closed == pytest.approx(replica.share.snapshot(1.0).closed_for, abs=0.01)


def test_a_second_failure_means_alone() -> None:
    """One may be an accident; after the second a replica goes on with its share, and tries again after a while."""
    one, _ = pair()
    assert not one.share.missed(2.0)
    assert not one.share.local
    assert 2.0 == one.share.next_call(2.0)
    assert one.share.missed(2.0)
    assert one.share.local
    assert 50 == one.share.snapshot(2.0).limit
    assert 2.0 + BEAT == one.share.next_call(2.0)
    assert not one.share.missed(3.0), "it was alone already"
    assert 1.0 == one.share.alone_for(3.0)
    one.join(4.0)
    assert 0.0 == one.share.alone_for(5.0)


def test_a_first_failure_at_the_start_means_alone() -> None:
    """It is known from then on that there are no others to ask; until then there may be."""
    share = Share(MINUTE, "one", lambda: 0.5)
    assert 0.0 == share.alone_for(1.0)
    assert [True, False] == [share.missed(2.0), share.missed(3.0)]
    assert 3.0 == share.alone_for(5.0)
    assert 3.0 + BEAT == share.next_call(3.0)


def test_what_alone_is_for_nobody_else_to_know() -> None:
    """Slots have names once others are told of them: those that were given back before are not, each other one is."""
    replica = Partner(Script())
    unsent, *held = (take(replica.share, 0.0) for _ in range(3))
    assert unsent is not None
    replica.share.cancel(unsent, 0.0)
    call = replica.share.report(0.0, "fresh")
    assert ([], 2) == (call["returned"], len(set(call["in_flight"])))
    assert call["in_flight"] == replica.share.report(0.1, "fresh")["in_flight"] == [each.slot for each in held if each]
    replica.join(0.2)
    assert replica.ask(0.3).slot not in call["in_flight"]


def test_a_share_that_is_closed_alone() -> None:
    """Metquay's refusal holds for a replica alone, and is told when the others are there again."""
    replica = Partner(Script())
    replica.share.close(1.0, 30.0)
    assert 29.0 == replica.share.snapshot(2.0).closed_for
    replica.join(2.0)
    assert 30.0 == pytest.approx(replica.share.snapshot(2.0).closed_for)


def test_alone_as_much_counts_as_used_as_of_the_whole() -> None:
    """Two that go on alone never send more than the limit together with what was sent before."""
    one, two = pair()
    one.use(1.0, 60)
    for replica in (one, two):
        replica.call(2.2)
        replica.share.missed(2.2)
        replica.share.missed(2.2)
    assert (60, 30) == (one.share.snapshot(2.2).used, two.share.snapshot(2.2).used)
    assert {OTHERS: 30} == two.share.snapshot(2.2).used_by_caller
    granted = 0
    for now in range(3, 60):
        for replica in (one, two):
            ticket = take(replica.share, float(now))
            if ticket is not None:
                ticket.send()
                replica.share.answered(ticket, float(now))
                granted += 1
    assert 0 < granted <= 40
    assert two.share.poll(59.0) is None


def test_back_from_alone_it_tells_what_it_sent() -> None:
    """In the old window as in one that is new."""
    for lost in (False, True):
        one, two = pair()
        one.use(1.0, 3)
        one.call(1.0)
        one.share.missed(1.0)
        one.share.missed(1.0)
        ticket = take(one.share, 1.5)
        assert ticket is not None
        ticket.send()
        one.use(1.5)
        assert one.share.local
        if lost:
            one.window.clear()
        one.join(2.5)
        two.join(2.5)
        two.call(2.5)
        assert (4, 1) == (two.window.redis("ZCARD", "back"), two.window.redis("ZCARD", "flight"))
        assert not one.share.local
        assert 5 == two.share.snapshot(2.5).used
        assert OTHERS not in one.share.snapshot(2.5).used_by_caller


def test_a_lost_window_leaves_the_shares_of_those_who_have_not_told_yet() -> None:
    """A flush does not allow more than the limit, and after a while all of it is there again."""
    one, two = pair()
    two.use(1.0, 50)
    one.window.clear()
    one.join(2.0)
    granted = 0
    while (ticket := one.share.ask(2.0, "tool", 20.0)) and (one.call(2.0), ticket.state == "granted")[1]:
        granted += 1
    assert 35 == granted, "the burst of half of the limit"
    assert 2.5 <= one.share.next_call(2.0) <= 3.0, "it asks again soon, since all can change"
    two.join(2.9)
    assert 85 == two.share.snapshot(2.9).used


def test_a_call_that_was_held_up_is_not_carried_out() -> None:
    """A frozen Redis executes in the end all that piled up, when everybody has long helped himself."""
    one, _ = pair()
    ticket = one.share.ask(1.0, "tool", 20.0)
    call = one.share.report(1.0, "x")
    answer = Reply.model_validate_json(one.window.call(1001.0 + LATE + 0.1, call))
    assert not answer.done
    assert 0 == one.window.redis("ZCARD", "flight")
    assert not one.share.replied(1.3, call, answer)
    one.call(1.3)
    assert ticket.state == "granted"


def test_what_may_have_been_granted_in_a_failed_call_is_given_back() -> None:
    """The answer was lost, and not the call."""
    one, _ = pair()
    one.share.ask(1.0, "tool", 20.0)
    call = one.share.report(1.0, "x")
    one.window.call(1001.0, call)
    one.share.missed(1.05)
    one.call(1.05)
    assert 1 == one.window.redis("ZCARD", "flight")


def test_leaving() -> None:
    """Who leaves is not counted any more, nor is anything left aside for it."""
    one, two = pair()
    call = one.share.report(1.5, "x", leaving=True)
    one.window.call(1001.5, call)
    two.call(5.0)
    assert 1 == two.share.heard.replicas


def test_more_replicas_than_slots() -> None:
    """Alone, each of 200 has one slot in two windows, and they do not all have theirs at once."""
    window = Script()
    replicas = [Partner(window, f"replica {number}").join() for number in range(200)]
    for number, replica in enumerate(replicas):
        replica.share._jitter = lambda number=number: number / 200  # type: ignore[misc]
        replica.call(1.0)
        replica.share.missed(1.0)
        replica.share.missed(1.0)
    sent = [now for now in range(120) for replica in replicas if take(replica.share, 1.0 + now) is not None]
    assert 200 == len(sent) + 1
    assert max(sum(now <= moment < now + 60 for moment in sent) for now in range(60)) <= 101


@pytest.mark.parametrize(
    "simulation",
    [
        Simulation(1, 200),
        Simulation(7, 200, outage=(90.0, 140.0)),
        Simulation(7, 200, flushed=65.0),
        Simulation(7, 200, outage=(30.0, 32.0), flushed=32.0),
        pytest.param(Simulation(150, 130), marks=pytest.mark.slow),
    ],
    ids=lambda simulation: f"{simulation.replicas}, away {simulation.outage}, flushed {simulation.flushed}",
)
def test_simulated(simulation: Simulation) -> None:
    """Busy replicas use their quota, never more of it, and each gets its part."""
    outcome = simulation.run()
    assert outcome.most <= MINUTE.limit
    assert 0.85 <= outcome.used
    assert max(outcome.waits) <= 20.0
    if simulation.replicas < MINUTE.limit:
        assert 0.9 <= outcome.fairness


def test_one_replica_is_served_as_in_memory() -> None:
    """What a quota that is shared with nobody grants when is what the one in memory does, but for the way to Redis."""
    outcome = Simulation(1, 200).run()
    assert 1.3 == pytest.approx(max(outcome.waits), abs=0.7)
    assert 100 * 200 / 60 * 1.1 >= len(outcome.sent) >= 100 * 200 / 60 * 0.95


@pytest.mark.parametrize("window", [1.0, 5.0])
@pytest.mark.parametrize("away", [0.5, 1.2, 6.0])
@pytest.mark.slow
def test_short_windows(window: float, away: float) -> None:
    """Where a second is much of the window, too, no window holds more than the limit while Redis comes and goes."""
    for seed in range(3):
        outage = (3.3 + seed / 20, 3.3 + away)
        outcome = Simulation(
            5, 12.0 * window, Rate(40, window), (outage[0] * window, outage[1] * window), seed=seed
        ).run()
        assert outcome.most <= 40
        assert outcome.sent


def test_what_comes_back_is_told_in_groups_where_it_is_much() -> None:
    """Of a large limit a replica is not told slot by slot, and still counts its part as used when it goes on alone."""
    rate = Rate(2000, 60.0)
    one, two = pair(rate=rate)
    one.use(1.0, 1000)
    two.call(2.2)
    assert (125, 4) == (len(two.share._returns), two.share._each)
    two.share.missed(2.2)
    two.share.missed(2.2)
    assert 500 == two.share.snapshot(2.2).used


CLOCK = "local time = redis.call('TIME')"
START = 1_700_000_000.0


class Real:
    """The script in a real Redis, on a clock of the test's."""

    def __init__(self, server: RedisServer) -> None:
        assert 1 == QUOTA.count(CLOCK)
        self._redis = redis.Redis(unix_socket_path=str(server.path))
        self.redis = self._redis.execute_command
        self.clear = self._redis.flushall
        self.close = self._redis.close
        self._script = self._redis.register_script(QUOTA.replace(CLOCK, "local time = {ARGV[2], 0}"))

    def call(self, now: float, call: dict[str, Any]) -> bytes:
        """Run it."""
        answer: bytes = self._script(keys=KEYS, args=[json.dumps(call), f"{now:.6f}"])
        return answer


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """Yield the script in a Redis of its own."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        found = Real(server)
        yield found
        found.close()


class Play:
    """Shares that call a window in invented time; what each of them did is told as a sequence of steps."""

    def __init__(self, call: Callable[[float, dict[str, Any]], bytes], count: int, rate: Rate) -> None:
        self.call = call
        self.now = START
        self.shares = [Share(rate, f"replica-{number}", lambda: 0.5) for number in range(count)]
        self.tickets: list[list[Ticket]] = [[] for _ in range(count)]
        self.replies: list[Reply] = []
        self.sent: list[float] = []
        self._fresh = 0

    def exchange(self, number: int) -> None:
        """Let one replica call."""
        share = self.shares[number]
        self._fresh += 1
        call = share.report(self.now - START, f"window-{self._fresh}")
        self.replies.append(Reply.model_validate_json(self.call(self.now, call)))
        share.replied(self.now - START, call, self.replies[-1])

    def step(self, number: int, what: str, seconds: float) -> None:
        """Do one thing with one replica, ``seconds`` after the last."""
        self.now = round(self.now + seconds, 6)
        share, now = self.shares[number], self.now - START
        number %= len(self.shares)
        mine = self.tickets[number]
        if what in {"ask", "connect"}:
            with contextlib.suppress(QuotaExceeded):
                mine.append(share.ask(now, f"tool {len(mine) % 2}", 20.0))
        elif what == "close":
            share.close(now, None if seconds > 0.5 else 3.0)
        elif what in {"answer", "give back"}:
            for ticket in mine:
                if ticket.state == "sent" and what == "answer":
                    share.answered(ticket, now)
                    break
                if ticket.state in {"waiting", "granted"} and what == "give back":
                    share.cancel(ticket, now)
                    break
        self.exchange(number)
        for ticket in mine:
            if ticket.state == "granted" and what != "connect":
                ticket.send()
                self.sent.append(self.now)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([*["ask"] * 4, *["connect"] * 2, *["answer"] * 3, *["give back"] * 2, "beat", "close"]),
        st.floats(0, 1, allow_nan=False).map(lambda seconds: round(seconds**3 * 3, 3)),
    ),
    min_size=1,
    max_size=120,
)


@pytest.mark.slow
@needs_redis
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, rate=st.sampled_from([Rate(4, 1.0), Rate(10, 10.0), Rate(300, 10.0)]))
def test_what_stands_in_for_redis_is_like_it(real: Real, steps: list[tuple[int, str, float]], rate: Rate) -> None:
    """The same sequence of calls gets the same answers from both, and never more than the limit in any window."""
    real.clear()
    both = Play(real.call, 3, rate), Play(Script().call, 3, rate)
    for replicas in both:
        for number in range(3):
            replicas.exchange(number)  # before that it has the share of one that never heard of others
    for number, what, seconds in steps:
        for replicas in both:
            replicas.step(number, what, seconds)
        expected, observed = (replicas.replies[-1].model_dump() for replicas in both)
        assert expected.pop("now") == pytest.approx(observed.pop("now"), abs=2e-6)
        assert expected.pop("returns") == pytest.approx(observed.pop("returns"), abs=1e-4)
        assert expected.pop("generation") == observed.pop("generation")
        assert expected == pytest.approx(observed, abs=1e-4)
    assert both[0].sent == both[1].sent
    assert never_more_than(rate, both[0].sent)


def never_more_than(rate: Rate, moments: list[float]) -> bool:
    """Whether no window holds more than the limit."""
    return all(later - earlier >= rate.window for earlier, later in zip(moments, moments[rate.limit :], strict=False))


@pytest.mark.parametrize("seconds", [-900.0, -45.0, 45.0, 3600.0])
def test_redis_has_its_clock_set(seconds: float) -> None:
    """The window begins anew, put together from what each tells of itself; soon all goes on as before."""
    one, two = pair()
    one.use(1.0, 40)
    two.use(1.0, 25)
    one.window.ahead += seconds
    for replica in (one, two, one):
        calls = replica.window.calls
        replica.join(1.5)
        assert replica.window.calls - calls <= 3
    assert not one.share.local
    assert (65, 2) == (one.share.snapshot(1.5).used, one.share.heard.replicas)
    assert one.ask(1.5).state == "granted"


AHEAD = 1_000_000.0
"""Seconds, longer than which nothing lasts."""
UNTRUE = [
    *(("HSET", "state", name, said) for name in ("latest", "born", "last", "starved") for said in ("1e12", "nan", "x")),
    *(("HSET", "state", "closed", said) for said in (1_000.0 + AHEAD, "inf", "nan")),
    *(("HSET", "state", name, said) for name in ("expected", "turned", "spare") for said in ("inf", "nan", "-inf")),
    *(("ZADD", name, said) for name in ("seen", "flight", "back", "line") for said in (1_000.0 + AHEAD, math.inf)),
]
"""What another program may have written, at 1,000 seconds; for sorted sets it is the score of 200 names."""


@pytest.mark.parametrize("place", ["a stand-in", pytest.param("redis", marks=needs_redis)])
@pytest.mark.parametrize("untrue", UNTRUE, ids=lambda untrue: " ".join(map(str, untrue)))
def test_what_can_not_be_true(request: pytest.FixtureRequest, place: str, untrue: tuple[str | float, ...]) -> None:
    """Soon all goes on as before; no window ever holds more than the limit, and nobody is told to stay away so long."""
    rate = Rate(10, 10.0)
    window: Script | Real = Script() if place == "a stand-in" else request.getfixturevalue("real")
    window.clear()
    partners = [Partner(window, name, rate).join() for name in ("one", "two")]
    waiting: dict[Partner, Ticket | None] = dict.fromkeys(partners)
    sent: list[float] = []
    waits: list[float] = []
    for step in range(500):
        now = step / 10
        if step == 50:
            for number in range(200 if untrue[0] == "ZADD" else 1):
                window.redis(*untrue, *([f"x:{number}"] if untrue[0] == "ZADD" else []))
        for partner in partners:
            partner.share.poll(now)
            while partner.share.next_call(now) <= now:
                partner.call(now)
            try:
                ticket = waiting[partner] or partner.ask(now)
            except QuotaExceeded as refusal:
                waits.append(refusal.retry_after)
                continue
            waiting[partner] = ticket if ticket.state == "waiting" else None
            if ticket.state == "granted":
                ticket.send()
                partner.share.answered(ticket, now)
                sent.append(now)
            elif ticket.refused is not None:
                waits.append(ticket.refused.retry_after)
    assert never_more_than(rate, sent)
    assert 0.9 * 2 * rate.limit <= len([moment for moment in sent if moment >= 30.0])
    assert max(waits, default=0.0) <= 2.5 * rate.window
    assert [2, 2] == [partner.share.heard.replicas for partner in partners]


def test_what_is_true_at_most() -> None:
    """The longest window, closed for as long as can be, its slots taken, many in line: no reply of these is refused."""
    rate = Rate(1, 3600.0)
    window = Script()
    partners = [Partner(window, f"replica {number}", rate).join() for number in range(20)]
    for partner in partners:
        partner.call(5.0)
    first = partners[0].ask(5.0)
    assert first.state == "granted"
    first.send()
    partners[0].share.answered(first, 5.0)
    partners[0].share.close(5.0, None)
    for partner in partners:
        partner.ask(5.1, max_wait=86_400.0)
    assert 0 == sum(partner.share.misses for partner in partners)
    closed = partners[1].share.snapshot(5.1).closed_for
    assert 3603.0 < closed <= 3603.6
    assert 20 * 3600 < max(partner.share.heard.due for partner in partners)
    generation = partners[0].share.generation
    for partner in partners:
        assert partner.call(6.0)
        assert generation == partner.share.generation
    assert 20 == window.redis("ZCARD", "line")


def test_what_is_never_carried_out_is_missed() -> None:
    """A Redis that answers and does nothing is told apart from one that was started anew."""
    share = pair()[0].share
    refusal = Reply(done=False, generation="another", now=0.0)
    for number in (1, 2, 3):
        assert not share.replied(1.0, share.report(1.0, "x"), refusal)
        assert number == share.refusals


def answer(**changed: object) -> bytes:
    """Return an answer of the script to one that waits, with something changed."""
    share = pair(rate=Rate(2, 60.0))[0].share
    for _ in range(3):
        share.ask(1.0, "tool", 100.0)
    window = Script()
    share.replied(1.0, call := share.report(1.0, "x"), Reply.model_validate_json(window.call(1001.0, call)))
    told = json.loads(window.call(1001.0, share.report(1.0, "x"))) | changed
    return json.dumps({name: value for name, value in told.items() if value != "gone"}).encode()


def test_what_redis_answers() -> None:
    """It is read as it was meant."""
    reply = Reply.model_validate_json(answer())
    assert (True, 1, True) == (reply.done, reply.granted, reply.in_line)
    assert 30.03 == reply.due


@pytest.mark.parametrize(
    "said",
    [
        *(b"", b"[]", b"null", b"\xff", b'{"done": false}', answer(done=1), answer(evil=1)),
        *(answer(generation=said) for said in (5, "gone")),
        *(answer(now=said) for said in ("soon", "nan", "1e300", None)),
        *(answer(replicas=said) for said in (-1, 1.5)),
        *(
            answer(used="7"),
            answer(granted=1e12),
            answer(in_line="no"),
            answer(round=None),
            answer(round=AHEAD),
            answer(each=1_000_000),
        ),
        *(answer(due=said) for said in (-1, float("nan"), AHEAD)),
        *(answer(closed=said) for said in (1e12, "30")),
        *(answer(returns=said) for said in ([1.0, float("inf")], [5000.0], 5, [1.0] * 999)),
    ],
)
def test_what_no_script_of_ours_answers(said: bytes) -> None:
    """It is refused before anything is made of it."""
    with pytest.raises(ValueError, match="validation error"):
        Reply.model_validate_json(said)
