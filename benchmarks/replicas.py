"""A thousand replicas that share a quota, in invented time: ``python -m benchmarks replicas``; a minute.

What runs is the proxy's own ``Share`` in each replica, and the script that runs in Redis (this needs lupa, of the extra
``test``); only the network, the tools, Redis's commands and Metquay are invented. Every replica serves one tool that
never stops asking: it sends its next request when it was answered, and comes back when a refusal told it to.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.script import Script
from metquay_proxy.replicas.share import Reply, Share
from metquay_proxy.rules.quota import QuotaExceeded, Rate, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RATE: Final = Rate(100, 60.0)
MAX_WAIT: Final = 20.0
HALF_WAY: Final = 0.00025
"""Seconds from a replica to Redis."""
SLOW: Final = 0.05
ANSWER: Final = 0.2
"""Seconds that Metquay takes."""


@dataclass
class Outcome:
    """What came of one run; times in seconds."""

    replicas: int
    seconds: float
    served: list[int]
    """Requests of each replica."""
    sent: list[float]
    waits: list[float]
    calls: int
    refusals: int
    limit: int
    window: float

    @property
    def used(self) -> float:
        """Part of the quota that was used; the burst at the beginning counts as of the first window."""
        return len(self.sent) / (self.limit * self.seconds / self.window)

    @property
    def most(self) -> int:
        """Requests in the fullest window."""
        first = most = 0
        for last, moment in enumerate(self.sent):
            while self.sent[first] <= moment - self.window:
                first += 1
            most = max(most, last - first + 1)
        return most

    @property
    def fairness(self) -> float:
        """Jain's index: 1 where all replicas got the same, 1/n where one got all."""
        total = sum(self.served)
        return total * total / (len(self.served) * sum(count * count for count in self.served))

    @property
    def fairest(self) -> float:
        """What ``fairness`` would be, had so many requests been spread as evenly as can be."""
        total, replicas = sum(self.served), len(self.served)
        each, more = divmod(total, replicas)
        return total * total / (replicas * (more * (each + 1) ** 2 + (replicas - more) * each**2))


@dataclass
class Simulation:
    """``replicas`` that are busy for ``seconds``; Redis is away from and until ``outage``, ``flushed`` at a moment."""

    replicas: int
    seconds: float
    rate: Rate = RATE
    outage: tuple[float, float] = (-1.0, -1.0)
    flushed: float | None = None
    seed: int = 1
    now: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def run(self) -> Outcome:
        """Run it."""
        dice = random.Random(self.seed)  # noqa: S311 - invented events
        self.window = Script()
        self.outcome = Outcome(self.replicas, self.seconds, [0] * self.replicas, [], [], 0, 0, *self.rate)
        for number in range(self.replicas):
            replica = _Replica(self, number, dice)
            self.at(dice.random(), replica.look)
            self.at(2.0 + dice.random(), replica.ask)
        if self.flushed is not None:
            self.at(self.flushed, self.window.clear)
        while self._events and self._events[0][0] < self.seconds:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.outcome.calls = self.window.calls
        return self.outcome

    def at(self, moment: float, act: Callable[[], None]) -> None:
        """Let something happen."""
        heapq.heappush(self._events, (moment, next(self._order), act))

    @property
    def away(self) -> bool:
        """Whether Redis is."""
        return self.outage[0] <= self.now < self.outage[1]


class _Replica:
    """One replica and its tool."""

    def __init__(self, simulation: Simulation, number: int, dice: random.Random) -> None:
        self._simulation = simulation
        self._number = number
        self._share = Share(simulation.rate, f"replica-{number}", dice.random)
        self._fresh = f"window-{number}-"
        self._calling = False
        self._woken = -1.0

    def look(self) -> None:
        """Do what is due, and see to it that the next thing is done when it is."""
        simulation = self._simulation
        now = simulation.now
        settle = self._share.poll(now)
        call = self._share.next_call(now)
        if not self._calling and call <= now:
            self._call()
            call = now + 1.0
        at = min(call, now + 1.0 if settle is None else settle)
        if at > now and (self._woken <= now or at < self._woken):
            self._woken = at
            simulation.at(at, self.look)

    def ask(self) -> None:
        """Let the tool ask."""
        simulation, now = self._simulation, self._simulation.now
        try:
            ticket = self._share.ask(now, "tool", MAX_WAIT)
        except QuotaExceeded as refusal:
            self._refused(refusal)
        else:
            if ticket.state == "granted":
                self._send(ticket, now)
            else:
                ticket.on_settled = lambda: simulation.at(simulation.now, lambda: self._settled(ticket, now))
        self.look()

    def _settled(self, ticket: Ticket, asked: float) -> None:
        if ticket.refused is None:
            self._send(ticket, asked)
        else:
            self._refused(ticket.refused)

    def _refused(self, refusal: QuotaExceeded) -> None:
        self._simulation.outcome.refusals += 1
        self._simulation.at(self._simulation.now + max(1.0, refusal.retry_after), self.ask)

    def _send(self, ticket: Ticket, asked: float) -> None:
        simulation = self._simulation
        ticket.send()
        simulation.outcome.sent.append(simulation.now)
        simulation.outcome.waits.append(simulation.now - asked)
        simulation.outcome.served[self._number] += 1

        def answered() -> None:
            self._share.answered(ticket, simulation.now)
            self.ask()

        simulation.at(simulation.now + ANSWER, answered)

    def _call(self) -> None:
        simulation = self._simulation
        self._calling = True
        call = self._share.report(simulation.now, f"{self._fresh}{simulation.now}")

        def missed() -> None:
            self._calling = False
            self._share.missed(simulation.now)
            self.look()

        def arrives() -> None:
            reply = Reply.model_validate_json(simulation.window.call(simulation.now, call))

            def back() -> None:
                self._calling = False
                self._share.replied(simulation.now, call, reply)
                self.look()

            simulation.at(simulation.now + HALF_WAY, back)

        if simulation.away:
            simulation.at(simulation.now + SLOW, missed)
        else:
            simulation.at(simulation.now + HALF_WAY, arrives)


class Row(NamedTuple):
    """What is told of one run; times in seconds."""

    case: str
    used: float
    """Part of the quota."""
    most: int
    """Requests in the fullest window; the limit is ``RATE``'s."""
    longest_wait: float
    fairness: float
    fairest: float
    """The best that fairness could have been: n requests can't be spread evenly over more than n replicas."""
    calls: float
    """Calls to Redis in a second, of all replicas together."""
    refusals: float
    """Requests in a second that were told to come back later."""


def rows(seconds: float = 300.0) -> Iterator[Row]:
    """Simulate every case for so many seconds of invented time."""
    middle = seconds / 2
    for name, simulation in (
        *((f"{count:,} replica{'s' if count > 1 else ''}", Simulation(count, seconds)) for count in (1, 20, 1000)),
        ("20, Redis away for a minute", Simulation(20, seconds, outage=(middle, middle + 60))),
        ("20, Redis flushed", Simulation(20, seconds, flushed=middle)),
    ):
        outcome = simulation.run()
        yield Row(
            name,
            outcome.used,
            outcome.most,
            max(outcome.waits),
            outcome.fairness,
            outcome.fairest,
            outcome.calls / seconds,
            outcome.refusals / seconds,
        )
