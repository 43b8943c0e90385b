"""The quota of the key pair: when the next request may go, and whose turn it is.

Owns the window, the pacing, the fair queue and their figures. Pure arithmetic over ``now`` (seconds of a clock that
does not stop): must not sleep, await, log or know HTTP. A driver waits until the moment that ``poll`` names.

Facts:

* Metquay grants an API client 100 requests a minute, logins excepted, and answers 429 with the wait in the text
  ("Please try again in 30 seconds."). Whether its window slides is unknown, so no window of that length, wherever it
  begins, may hold more than the limit.
* The server counts at arrival, which lies between sending and the answer's head. So a slot is taken from the grant,
  since it may be sent at any moment from then on, until one window (and a margin, ``SAFETY``) after the answer or the
  failure. One that was not sent after all comes back at once, and goes to whoever is next in line.
* RFC 6585 section 4 (429), RFC 9110 section 10.2.3 (Retry-After: whole seconds or a date), 6.6.1 (Date: the moment at
  which an answer was made, by the clock of who made it).

Pacing: while nothing waits, requests go at once until ``burst`` of the limit is used. From then on the n-th release
from now may not come before the n-th slot is free, and the releases keep to the straightest such path: the pace is the
steepest line from the last release to any slot's return, and at least window / limit. On that path the pace only ever
falls, and it starts at most at window / (reserve + 1), 2 s at 100/minute, because a request that goes at once always
leaves the whole reserve (what ``burst`` leaves of the limit) behind. So, as long as answers come, the head of the queue
never waits longer than that, and slots that come back in a clump are spread over the whole window.
"""

from __future__ import annotations

import contextlib
import math
import re
import zlib
from collections import OrderedDict, deque
from datetime import UTC
from email.utils import parsedate_to_datetime
from itertools import islice, repeat, zip_longest
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SAFETY: Final = 1.001
"""How much longer than the window a slot is taken: two clocks drift apart, and a server may count both ends."""

CELLS: Final = 128
"""Limits above this keep their slots in so many groups that return together, the first of them 1/128 window late."""

CATCH_UP: Final = 1 / 20
"""Releases missed by a driver that woke late (by 15 ms on Windows) are made up for, within this part of the window."""

_GZIP: Final = b"\x1f\x8b"
_LONGEST_TEXT: Final = 4096
_SHORTEST_CLOSE: Final = 1.0
_LONGEST_CLOSE: Final = 3600.0

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_RATE: Final = re.compile(r"([0-9]{1,7})\s*/\s*(s(?:ec(?:ond)?)?|m(?:in(?:ute)?)?|h(?:our)?)", re.IGNORECASE)
_DELAY: Final = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*")
_DELAY_IN_TEXT: Final = re.compile(r"\b([0-9]{1,9}) ?(?:seconds?|secs?|s)\b", re.IGNORECASE)


class Rate(NamedTuple):
    """So many requests (``limit``) in any ``window`` seconds."""

    limit: int
    window: float


def parse_rate(text: str) -> Rate | None:
    """Read ``100/minute`` (second, minute, hour or their beginnings s, sec, m, min, h); ``off`` means no quota.

    ValueError, whose text can be shown to people, for anything else.
    """
    stripped = text.strip()
    if stripped.lower() == "off":
        return None
    match = _RATE.fullmatch(stripped)
    if match is None or not int(match[1]):
        message = f'{text!r} is not a rate: write N/second, N/minute or N/hour with N from 1 to 9999999, or "off"'
        raise ValueError(message)
    return Rate(int(match[1]), _UNITS[match[2][0].lower()])


def retry_after_seconds(fields: Sequence[tuple[bytes, bytes]], text: bytes, now_wall: float) -> float | None:
    """Return for how many seconds an answer asks us to stay away, from 1 to 3600; None where it does not say.

    ``fields`` are its head's: Retry-After says it in seconds or as a date. A date is the server's, and its clock may
    differ from ours: it is held against the answer's own Date, or ``now_wall`` (seconds since 1970) where that is
    missing. Failing that the first "N seconds" in ``text`` counts, as Metquay writes it, gzipped where the tool likes
    that.
    """
    if text.startswith(_GZIP):
        with contextlib.suppress(zlib.error):
            text = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(text, _LONGEST_TEXT)
    said = {name.lower(): value.decode("latin-1") for name, value in reversed(fields)}
    header = said.get(b"retry-after", "")
    if match := _DELAY.fullmatch(header):
        seconds = float(match[1])
    elif (until := _seconds_since_1970(header)) is not None:
        now = _seconds_since_1970(said.get(b"date", ""))
        seconds = until - (now_wall if now is None else now)
    elif match := _DELAY_IN_TEXT.search(text.decode("latin-1")):
        seconds = float(match[1])
    else:
        return None
    return min(max(seconds, _SHORTEST_CLOSE), _LONGEST_CLOSE)


def _seconds_since_1970(date: str) -> float | None:
    try:
        read = parsedate_to_datetime(date)
    except (ValueError, OverflowError):
        return None
    return read.replace(tzinfo=read.tzinfo or UTC).timestamp()


class QuotaExceeded(Exception):
    """No slot in time. A request that comes back after ``retry_after`` seconds gets one if nobody else came."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        """Say when to come back."""
        return f"no slot in time; the next free one comes in {self.retry_after:.1f} s"


class Ticket:
    """One request's place: it waits, until it is either ``granted`` or ``refused``.

    ``on_settled`` is called once when a waiting ticket is settled; it must not call the quota.
    """

    __slots__ = ("before", "caller", "deadline", "on_settled", "refused", "since", "state")

    def __init__(self, caller: str, deadline: float) -> None:
        self.caller: Final = caller
        self.deadline: Final = deadline
        self.state: Literal["waiting", "granted", "sent", "over"] = "waiting"
        self.refused: QuotaExceeded | None = None
        self.on_settled: Callable[[], None] | None = None
        self.since: float
        """When it was granted."""
        self.before: float
        """The release before this one, from which the pace counts again if this one is given back."""

    @property
    def granted(self) -> bool:
        """Whether it holds a slot that may be sent, or is on its way."""
        return self.state in {"granted", "sent"}


class Snapshot(NamedTuple):
    """The quota's figures at one moment; times in seconds."""

    limit: int
    window: float
    used: int
    """Slots taken, those of answers less than a window old included."""
    in_flight: int
    """Slots granted and not answered yet."""
    waiting: int
    waiting_by_caller: dict[str, int]
    used_by_caller: dict[str, int]
    next_free_in: float
    """When one more request would go if it came now."""
    closed_for: float


class _Cell:
    """Slots that come back together at ``end``; the first of them was answered at ``start``."""

    __slots__ = ("callers", "end", "start")

    def __init__(self, start: float, end: float, caller: str) -> None:
        self.start = start
        self.end = end
        self.callers = [caller]


class Quota:
    """At most ``limit`` requests in any ``window`` seconds, paced, and shared fairly among those that wait.

    ``burst`` is the part of the limit that may go at once; ``max_waiting`` bounds the queue. The protocol of a
    request is ``ask``, (wait), ``sent``, ``answered``; ``cancel`` is right at any point and harmless at the end. After
    ``ask`` gave a waiting ticket, ``cancel`` or ``close``: ``poll`` again. Each attempt takes a ticket of its own.
    A ``now`` before the latest one counts as the latest.
    """

    def __init__(self, limit: int, window: float, *, burst: float = 0.7, max_waiting: int = 1000) -> None:
        self._burst_share: Final = burst
        self._max_waiting: Final = max_waiting
        self._limit_to(limit, window)
        self._cells: deque[_Cell] = deque()
        self._queues: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._used_by: dict[str, int] = {}
        self._used = 0
        self._held = 0
        self._waiting = 0
        self._spare = 0  # slots given back, each of which goes at once to one that waits
        self._latency = 0.0
        self._latest: Ticket | None = None
        self._now = self._last = self._closed_until = -math.inf
        self._due = self._deadline = math.inf

    def _limit_to(self, limit: int, window: float) -> None:
        self._limit = limit
        self._window = window
        self._burst = max(1, int(limit * self._burst_share))
        self._catch_up = window * CATCH_UP
        self._grain = window / CELLS if limit > CELLS else 0.0
        self._hold = window * SAFETY + self._grain

    def ask(self, now: float, caller: str, max_wait: float) -> Ticket:
        """Take a slot, or a place in the queue: round-robin over callers, first come first served within one.

        QuotaExceeded if its turn would come after more than ``max_wait`` seconds, or if too many wait. Its turn is
        reckoned on the path described above with all that wait now; what is in flight, and what goes before it, is
        taken to be answered as quickly as the answers of late. Where it turns out later (slower answers, newcomers
        whose turn comes first), ``poll`` refuses the ticket at its deadline.
        """
        now = self._advance(now)
        ticket = Ticket(caller, now + max_wait)
        if self._free(now):
            self._grant(ticket, now, now)
            return ticket
        if self._waiting >= self._max_waiting or self._nth(now, self._place(caller)) > ticket.deadline:
            raise QuotaExceeded(self._next_free_in(now))
        self._deadline = min(self._deadline, ticket.deadline)
        self._queues.setdefault(caller, deque()).append(ticket)
        self._waiting += 1
        return ticket

    def take(self, now: float, caller: str) -> Ticket | None:
        """Take a slot if it may be sent at once; None where ``ask`` would give a place in the queue, or refuse."""
        now = self._advance(now)
        if not self._free(now):
            return None
        ticket = Ticket(caller, now)
        self._grant(ticket, now, now)
        return ticket

    def poll(self, now: float) -> float | None:
        """Settle whatever can be settled, and return when to call again; None if nothing waits."""
        now = self._advance(now)
        due = max(min(self._due, now), now - self._catch_up)
        while self._waiting and (due := next(self._schedule(due))) <= now:
            self._grant_next(now, due)
        self._due = due if self._waiting else math.inf
        if self._waiting and self._deadline <= now:
            self._refuse_overdue(now)
        return min(due, self._deadline) if self._waiting else None

    def sent(self, ticket: Ticket) -> None:
        """Say that a granted request is on its way: from here on Metquay may count it. ValueError if not granted."""
        if ticket.state != "granted":
            message = f"a ticket that is {ticket.state} must not be sent"
            raise ValueError(message)
        ticket.state = "sent"

    def answered(self, ticket: Ticket, now: float) -> None:
        """Say that the answer's head came or the attempt failed: the slot comes back one window from now."""
        if ticket.state != "sent":
            return
        now = self._advance(now)
        ticket.state = "over"
        self._held -= 1
        self._latency += (now - ticket.since - self._latency) / 8
        cells = self._cells
        if cells and now - cells[-1].start <= self._grain:
            cells[-1].callers.append(ticket.caller)
        else:
            cells.append(_Cell(now, now + self._hold, ticket.caller))

    def cancel(self, ticket: Ticket, now: float) -> None:
        """Give up a ticket: its place, or its slot, as though never taken. What was sent counts as answered now."""
        now = self._advance(now)
        if ticket.state == "sent":
            self.answered(ticket, now)
        elif ticket.state == "waiting":
            self._leave(ticket)
            ticket.state = "over"
        elif ticket.state == "granted":
            ticket.state = "over"
            self._held -= 1
            self._release([ticket.caller])
            if self._waiting:
                self._spare += 1
            elif self._latest is ticket:
                self._last = ticket.before

    def close(self, now: float, seconds: float | None) -> None:
        """Metquay answered 429: grant nothing for ``seconds``, and refuse at once what can't wait so long.

        None: until the first of our own slots comes back, the soonest moment at which the server's count has surely
        fallen. The 429 is also the answer of its ticket: ``answered`` first. A later call never opens it sooner.
        """
        now = self._advance(now)
        if seconds is None:
            seconds = self._cells[0].end - now if self._cells else self._hold
        until = now + seconds
        if until <= self._closed_until:
            return
        self._closed_until = until
        self._refuse_late(now)

    def snapshot(self, now: float) -> Snapshot:
        """Return the figures for status page and metrics."""
        now = self._advance(now)
        return Snapshot(
            limit=self._limit,
            window=self._window,
            used=self._used,
            in_flight=self._held,
            waiting=self._waiting,
            waiting_by_caller={caller: len(queue) for caller, queue in self._queues.items()},
            used_by_caller=dict(self._used_by),
            next_free_in=self._next_free_in(now),
            closed_for=max(0.0, self._closed_until - now),
        )

    def _advance(self, now: float) -> float:
        if now <= self._now:
            return self._now
        self._now = now
        cells = self._cells
        while cells and cells[0].end <= now:
            self._release(cells.popleft().callers)
        return now

    def _free(self, now: float) -> bool:
        if self._waiting:
            return False
        return (self._used < self._burst and self._closed_until <= now) or next(self._schedule(now)) <= now

    def _grant(self, ticket: Ticket, now: float, due: float) -> None:
        ticket.state = "granted"
        ticket.since = now
        ticket.before = self._last
        self._last = due
        self._latest = ticket
        self._used += 1
        self._held += 1
        self._used_by[ticket.caller] = self._used_by.get(ticket.caller, 0) + 1

    def _grant_next(self, now: float, due: float) -> None:
        """Grant the one whose turn it is, as of ``due`` on the path."""
        self._spare -= self._spare > 0
        caller, queue = next(iter(self._queues.items()))
        ticket = queue[0]
        self._leave(ticket)
        if queue:
            self._queues.move_to_end(caller)
        self._grant(ticket, now, due)
        _settle(ticket)

    def _release(self, callers: list[str]) -> None:
        used_by = self._used_by
        self._used -= len(callers)
        for caller in callers:
            used_by[caller] -= 1
            if not used_by[caller]:
                del used_by[caller]

    def _leave(self, ticket: Ticket) -> None:
        queue = self._queues[ticket.caller]
        queue.remove(ticket)
        if not queue:
            del self._queues[ticket.caller]
        self._waiting -= 1
        self._spare = min(self._spare, self._waiting)

    def _refuse_overdue(self, now: float) -> None:
        """Refuse those whose deadline has come."""
        self._refuse([ticket for ticket in self._in_turn() if ticket.deadline <= now], now)
        self._deadline = min((ticket.deadline for ticket in self._in_turn()), default=math.inf)

    def _refuse_late(self, now: float) -> None:
        """Refuse those whose turn would come after their deadline."""
        turns = self._schedule(now)
        due = next(turns)
        late = []
        for ticket in self._in_turn():
            if due > ticket.deadline:
                late.append(ticket)
            else:
                due = next(turns)
        self._refuse(late, now)

    def _refuse(self, tickets: list[Ticket], now: float) -> None:
        for ticket in tickets:
            self._leave(ticket)
            ticket.state = "over"
        retry_after = self._next_free_in(now)
        for ticket in tickets:
            ticket.refused = QuotaExceeded(retry_after)
            _settle(ticket)

    def _in_turn(self) -> Iterator[Ticket]:
        for turn in zip_longest(*self._queues.values()):
            yield from filter(None, turn)

    def _place(self, caller: str) -> int:
        """Return the place, from 1, that one more request of this caller would have in the queue."""
        turns = len(self._queues.get(caller, ()))
        place, passed = turns + 1, False
        for other, queue in self._queues.items():
            if other == caller:
                passed = True
            else:
                place += min(len(queue), turns if passed else turns + 1)
        return place

    def _next_free_in(self, now: float) -> float:
        if not self._waiting and self._used < self._burst:
            return max(0.0, self._closed_until - now)
        return self._nth(now, self._waiting + 1) - now

    def _nth(self, now: float, place: int) -> float:
        return next(islice(self._schedule(now), place - 1, None))

    def _schedule(self, now: float) -> Iterator[float]:
        """Yield, without end, when the first, second, ... of the requests that wait is due."""
        number = self._limit - self._used
        spare = min(self._spare, max(0, number))
        number -= spare
        earliest = max(now, self._closed_until)
        # what is longer ago makes no difference
        last = max(self._last, earliest if spare else now - 2 * self._hold)
        points = []
        for cell in self._cells:
            points.append((number + 1, cell.end))
            number += len(cell.callers)
        if self._held or spare:
            points.append((number + 1, max(last + self._latency, now) + self._hold))
        if self._used >= self._limit:
            earliest = max(earliest, *(back for number, back in points if number <= 1))
        yield from repeat(earliest, spare)
        steady = (self._hold + self._latency) / self._limit
        at, done = last, 0
        while True:
            pace, until = steady, math.inf
            for number, back in points:
                if number > done and back - at > pace * (number - done):
                    pace, until = (back - at) / (number - done), number
            while done < until:
                due = at + pace
                at, done = max(due, earliest), done + 1
                yield at
                if due < at:
                    break


def _settle(ticket: Ticket) -> None:
    if ticket.on_settled is not None:
        ticket.on_settled()
