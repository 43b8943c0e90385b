from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.replicas import Simulation
from benchmarks.window import Window
from metquay_proxy.replicas.share import BEAT, LATE, OTHERS, UNKNOWN, Share
from metquay_proxy.rules.quota import QuotaExceeded, Rate

if TYPE_CHECKING:
    from metquay_proxy.rules.quota import Ticket

MINUTE = Rate(100, 60.0)


class Replica:
    """A share, and a window in which it meets the others; time is the test's."""

    def __init__(self, window: Window, name: str = "one", rate: Rate = MINUTE) -> None:
        self.share = Share(rate, name, lambda: 0.5)
        self.window = window
        self.name = name
        self.calls: list[dict[str, Any]] = []

    def call(self, now: float) -> bool:
        """Make one call; return whether it was carried out."""
        call = json.loads(json.dumps(self.share.report(now, f"{self.name}-{now}")))
        self.calls.append(call)
        return self.share.replied(now, call, self.window.call(1000.0 + now, call))

    def join(self, now: float = 0.0) -> Replica:
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
            assert ticket.granted
            self.share.sent(ticket)
            self.share.answered(ticket, now)


def pair(now: float = 0.0, rate: Rate = MINUTE) -> tuple[Replica, Replica]:
    """Return two replicas that know of each other."""
    window = Window()
    one, two = Replica(window, "one", rate).join(now), Replica(window, "two", rate).join(now)
    one.call(now + BEAT)
    two.call(now + BEAT)
    assert (2, 2) == (one.share.replicas, two.share.replicas)
    return one, two


def test_alone_at_first() -> None:
    """Before it heard of any other, a replica takes as many to be there as are usual, and keeps to its share."""
    share = Share(MINUTE, "one", lambda: 0.5)
    assert share.local
    assert MINUTE.limit // UNKNOWN == share.share
    assert share.take(0.0, "tool") is not None
    assert 0.0 >= share.next_call(0.0)


def test_the_first_call_is_refused_and_says_in_which_window_to_tell_of_oneself() -> None:
    """Whoever does not know the window tells it all; then the quota is shared."""
    replica = Replica(Window())
    assert not replica.call(0.0)
    assert replica.share.local
    assert replica.share.next_call(0.0) <= 0.0
    assert replica.call(0.0)
    assert not replica.share.local
    assert MINUTE.limit == replica.share.share


def test_nothing_is_granted_before_the_others_were_asked() -> None:
    """Neither at once nor by the own books: only a call's answer grants."""
    one, two = pair()
    two.use(1.0, 40)
    assert one.share.take(1.0, "tool") is None
    ticket = one.share.ask(1.0, "tool", 20.0)
    assert not ticket.granted
    assert one.share.poll(1.0) == 21.0
    assert 1.0 == one.share.next_call(1.0)
    one.call(1.0)
    assert ticket.granted
    assert 41 == one.share.snapshot(1.0).used


def test_a_slot_comes_back_a_window_after_the_answer() -> None:
    """However late that is told, and whoever asks."""
    one, two = pair(rate=Rate(10, 10.0))
    one.use(1.0, 7)
    for now in (2.0, 10.9):
        one.call(now)
        two.call(now)
    assert 7 == len(two.window.back)
    two.call(11.02)
    assert 0 == len(two.window.back)


def test_one_stands_in_line_and_is_told_when_to_ask_again() -> None:
    """Its turn is due as by the quota's own pace; the next of its own is due a round later."""
    one, two = pair()
    one.use(1.0, 70)
    first, second = one.ask(1.0), one.share.ask(1.0, "tool", 20.0)
    assert {"waiting"} == {first.state, second.state}
    due = one.share.next_call(1.0)
    assert 1.0 + BEAT * 0.9 <= due <= 1.0 + BEAT * 1.1, "it tells that it lives before its turn"
    pace = 60.06 / 31
    turn = one.window.line.scores["one"] - 1000.0
    assert 1.0 + pace == pytest.approx(turn, rel=0.01)
    assert 2 * turn - 1.0 == pytest.approx(1.0 + one.share.snapshot(1.0).next_free_in - pace, rel=0.02)
    one.call(2.0)
    one.call(turn)
    assert first.granted
    assert not second.granted
    assert 1 == len(one.window.line)
    assert two.ask(turn).state == "waiting"
    assert 2 == len(one.window.line)


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
    assert other.granted
    assert (4, 0) == (len(one.window.flight), one.window.spare)


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
    assert other.granted
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
    assert one.share.ask(3.0, "tool", 20.0).granted
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
        order += [name for name, ticket in (("g0", greedy[0]), ("g1", greedy[1]), ("m", modest)) if ticket.granted]
        for ticket in (*greedy, modest):
            if ticket.state == "granted":
                one.share.sent(ticket)
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
    assert 0 == len(one.window.line), "who left the line is not waited for"
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


def test_a_slot_that_is_given_back_is_there_for_others() -> None:
    """It is told at once."""
    one, two = pair()
    ticket = one.ask(1.0)
    one.share.answered(ticket, 1.0)
    assert ticket.granted, "it was never sent"
    one.share.cancel(ticket, 1.0)
    assert 1.0 == one.share.next_call(1.0)
    one.call(1.0)
    two.call(1.0)
    assert 0 == two.share.snapshot(1.0).used


def test_a_grant_that_nobody_waits_for_any_more_is_given_back() -> None:
    """The tool left while the call was under way."""
    one, _ = pair()
    ticket = one.share.ask(1.0, "tool", 20.0)
    call = one.share.report(1.0, "x")
    one.share.cancel(ticket, 1.0)
    one.share.replied(1.0, call, one.window.call(1001.0, call))
    assert 1 == len(one.window.flight)
    one.call(1.0)
    assert 0 == len(one.window.flight)


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
    assert 50 == one.share.share
    assert 2.0 + BEAT == one.share.next_call(2.0)
    assert not one.share.missed(3.0), "it was alone already"


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
            ticket = replica.share.take(float(now), "tool")
            if ticket is not None:
                replica.share.sent(ticket)
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
        ticket = one.share.take(1.5, "tool")
        assert ticket is not None
        one.share.sent(ticket)
        one.use(1.5)
        assert one.share.local
        if lost:
            one.window.clear()
        one.join(2.5)
        two.join(2.5)
        two.call(2.5)
        assert (4, 1) == (len(two.window.back), len(two.window.flight))
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
    while (ticket := one.share.ask(2.0, "tool", 20.0)) and (one.call(2.0), ticket.granted)[1]:
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
    answer = one.window.call(1001.0 + LATE + 0.1, call)
    assert not answer["done"]
    assert 0 == len(one.window.flight)
    assert not one.share.replied(1.3, call, answer)
    one.call(1.3)
    assert ticket.granted


def test_what_may_have_been_granted_in_a_failed_call_is_given_back() -> None:
    """The answer was lost, and not the call."""
    one, _ = pair()
    one.share.ask(1.0, "tool", 20.0)
    call = one.share.report(1.0, "x")
    one.window.call(1001.0, call)
    one.share.missed(1.05)
    one.call(1.05)
    assert 1 == len(one.window.flight)


def test_leaving() -> None:
    """Who leaves is not counted any more, nor is anything left aside for it."""
    one, two = pair()
    call = one.share.report(1.5, "x", leaving=True)
    one.window.call(1001.5, call)
    two.call(5.0)
    assert 1 == two.share.replicas


def test_more_replicas_than_slots() -> None:
    """Alone, each of 200 has one slot in two windows, and they do not all have theirs at once."""
    window = Window()
    replicas = [Replica(window, f"replica {number}").join() for number in range(200)]
    for number, replica in enumerate(replicas):
        replica.share._jitter = lambda number=number: number / 200  # type: ignore[misc]
        replica.call(1.0)
        replica.share.missed(1.0)
        replica.share.missed(1.0)
    sent = [now for now in range(120) for replica in replicas if replica.share.take(1.0 + now, "tool") is not None]
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
