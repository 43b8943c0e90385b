"""Tools against a quota in invented time: every event happens at once, and the clock jumps from one to the next.

Owns the driver's part as the proxy plays it (poll after each change, wake when told) and the records of what came of
each request. Must not judge: that is for the tests.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from metquay_proxy.rules.quota import Quota, QuotaExceeded, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True)
class Tool:
    """``workers`` sequential loops under one name that share ``requests``; times in seconds."""

    caller: str
    requests: int
    answer: float = 0.05
    workers: int = 1
    start: float = 0.0
    think: float = 0.0
    max_wait: float = 20.0


@dataclass
class Record:
    """What came of one request."""

    caller: str
    asked: float
    released: float = math.nan
    arrived: float = math.nan
    """When the server counted it: a third of the way between release and answer."""
    answered: float = math.nan
    retry_after: float | None = None

    @property
    def waited(self) -> float:
        """Seconds from asking to release."""
        return self.released - self.asked


@dataclass
class Simulation:
    """Run ``tools`` against ``quota``; ``late`` seconds pass between a wake-up's time and the wake-up."""

    quota: Quota
    tools: Iterable[Tool]
    late: float = 0.0
    now: float = 0.0
    polls: int = 0
    records: list[Record] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)
    _left: Counter[Tool] = field(default_factory=Counter)
    _wake: float = math.inf

    def run(self) -> list[Record]:
        """Return a record for each request, in the order of asking."""
        for tool in self.tools:
            self._left[tool] += tool.requests
            for _ in range(tool.workers):
                self._at(tool.start, partial(self._ask, tool))
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()
            self._poll()
        return self.records

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), act))

    def _poll(self) -> None:
        if self._wake + self.late <= self.now:
            self._wake = math.inf
        self.polls += 1
        again = self.quota.poll(self.now)
        if again is not None and again < self._wake:
            assert again > self.now, "a wake-up that is due already would spin"
            self._wake = again
            self._at(again + self.late, lambda: None)

    def _ask(self, tool: Tool) -> None:
        if not self._left[tool]:
            return
        self._left[tool] -= 1
        record = Record(tool.caller, self.now)
        self.records.append(record)
        try:
            ticket = self.quota.ask(self.now, tool.caller, tool.max_wait)
        except QuotaExceeded as refusal:
            self._refused(tool, record, refusal)
            return
        if ticket.granted:
            self._send(tool, record, ticket)
        else:
            ticket.on_settled = lambda: self._at(self.now, lambda: self._settled(tool, record, ticket))

    def _settled(self, tool: Tool, record: Record, ticket: Ticket) -> None:
        if ticket.refused is None:
            self._send(tool, record, ticket)
        else:
            self._refused(tool, record, ticket.refused)

    def _refused(self, tool: Tool, record: Record, refusal: QuotaExceeded) -> None:
        record.retry_after = refusal.retry_after
        self._at(self.now + refusal.retry_after, lambda: self._ask(tool))

    def _send(self, tool: Tool, record: Record, ticket: Ticket) -> None:
        self.quota.sent(ticket)
        record.released = self.now
        record.arrived = self.now + tool.answer / 3
        record.answered = self.now + tool.answer
        self._at(record.answered, lambda: self._answered(tool, ticket))

    def _answered(self, tool: Tool, ticket: Ticket) -> None:
        self.quota.answered(ticket, self.now)
        self._at(self.now + tool.think, lambda: self._ask(tool))
