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
* A 429 closes the window for all, whichever path it is of. The limit is that of the key pair, and room in our books
  proves nothing: others may use the same keys. No neighbour can show that it concerns one path alone, as 401 can be
  shown to, but by going on against what Metquay said. So a path that is wrong about it costs all an hour at most, which
  is what any longer time counts as, and everybody is told for how long.
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
import mmap
import re
import zlib
from collections import Counter, OrderedDict, deque
from datetime import UTC
from email.utils import parsedate_to_datetime
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SAFETY: Final = 1.001
"""How much longer than the window a slot is taken: two clocks drift apart, and a server may count both ends."""

CELLS: Final = 128
"""Limits above this keep their slots in so many groups that return together, the first of them 1/128 window late."""

BURST: Final = 0.7
"""The part of the limit that may go at once."""

CATCH_UP: Final = 1 / 20
"""Releases missed by a driver that woke late (by 15 ms on Windows) are made up for, within this part of the window."""

TOLD_APART: Final = 32
"""Callers without a client key that are told apart;"""
OTHERS: Final = "others without a client key"
"""all others are one."""
LATELY: Final = 60.0
"""Seconds for which who asked again keeps its place among the former."""
ASKED_BEFORE: Final = 65536
"""So many names are remembered to have asked, at most."""

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
    if not (match := _RATE.fullmatch(stripped)) or not int(match[1]):
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
    with contextlib.suppress(zlib.error):
        text = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(text, 4096)
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
    return min(max(seconds, 1.0), 3600.0)


def _seconds_since_1970(date: str) -> float | None:
    with contextlib.suppress(ValueError, OverflowError):
        read = parsedate_to_datetime(date)
        return read.replace(tzinfo=read.tzinfo or UTC).timestamp()
    return None


class QuotaExceeded(Exception):
    """No slot in time. A request that comes back after ``retry_after`` seconds gets one if nobody else came."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Ticket:
    """One request's place: it waits, until it is either ``granted`` or ``refused``.

    Who waits does so until ``deadline``, and ``on_settled`` is called once when that is over; it must not call the
    quota. Who is granted has its slot ``since`` that moment; ``slot`` is its number once others are told of it.
    """

    state: Literal["waiting", "granted", "sent", "over"] = "waiting"
    deadline = math.inf
    patience = math.inf
    """Seconds for which it waits where Metquay itself takes nothing."""
    on_settled: Callable[[], object] = bool
    refused: QuotaExceeded | None = None
    since = math.inf
    slot = 0

    def __init__(self, caller: str) -> None:
        self.caller: Final = caller

    def send(self) -> None:
        """Say that a granted request is on its way: from here on Metquay may count it. ValueError if not granted."""
        if self.state != "granted":
            raise ValueError(f"a ticket that is {self.state} must not be sent")
        self.state = "sent"


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
    """Slots that come back together at ``end``, counted by caller: those answered ``until`` a moment, or those lent.

    To these no answer comes: their moment is before all others.
    """

    def __init__(self, end: float, until: float, callers: dict[str, int]) -> None:
        self.end, self.until, self.callers = end, until, callers


class Window:
    """The slots: who has which, when they come back, and when further ones are due.

    ``burst`` is the part of the limit that may go at once. A ``now`` before the latest one counts as the latest.
    """

    def __init__(self, rate: Rate, burst: float) -> None:
        self._burst_share: Final = burst
        self.resize(rate)
        self.used = 0
        self.in_flight: dict[Ticket, float] = {}
        """What is granted and not answered yet, each with the release before it."""
        self.latency = 0.0
        """Seconds that answers took of late."""
        self.closed_until = -math.inf
        self._cells: deque[_Cell] = deque()
        self._now = self.last = -math.inf
        """The latest release."""
        self._latest: Ticket | None = None

    def resize(self, rate: Rate) -> None:
        """Go on with another rate."""
        self.rate = rate
        self._burst = max(1, int(rate.limit * self._burst_share))
        self._grain = rate.window / CELLS if rate.limit > CELLS else 0.0
        self._hold = rate.window * SAFETY + self._grain
        self._newest = _Cell(-math.inf, -math.inf, {})

    def advance(self, now: float) -> float:
        """Take back the slots whose time is over; return the latest ``now``."""
        self._now = now = max(now, self._now)
        while self._cells and self._cells[0].end <= now:
            self.used -= sum(self._cells.popleft().callers.values())
        return now

    def used_by(self) -> dict[str, int]:
        """Return how many slots each caller has."""
        used = Counter([ticket.caller for ticket in self.in_flight])
        for cell in self._cells:
            used.update(cell.callers)
        return used

    def take(self, ticket: Ticket, now: float) -> bool:
        """Let a ticket have a slot if one may go at once while none waits; return whether it has one.

        Slots whose time is over are taken back only where that could make a difference.
        """
        if self.used >= self._burst or now < self._now:
            now = self.advance(now)
        self._now = now
        if self.next_free(now) > now:
            return False
        self.grant(ticket, now, now)
        return True

    def grant(self, ticket: Ticket, now: float, due: float) -> None:
        """Let a ticket have a slot, as of ``due`` on the path."""
        ticket.state = "granted"
        ticket.since = now
        self.used += 1
        self.in_flight[ticket] = self.last
        self.last = due
        self._latest = ticket

    def answered(self, ticket: Ticket, now: float) -> None:
        """Say that the answer's head came or the attempt failed: the slot comes back one window from now."""
        if ticket.state != "sent":
            return
        ticket.state = "over"
        del self.in_flight[ticket]
        if now < self._now:  # noqa: PLR1730 - to call max() costs more than the rest of this
            now = self._now
        self._now = now
        self.latency += (now - ticket.since - self.latency) / 8
        cell = self._newest
        if now > cell.until:
            self.advance(now)
            cell = self._newest = _Cell(now + self._hold, now + self._grain, {})
            self._cells.append(cell)
        cell.callers[ticket.caller] = cell.callers.get(ticket.caller, 0) + 1

    def give_back(self, ticket: Ticket) -> None:
        """Take back the slot of a ticket that was not sent, as though it never had one."""
        ticket.state = "over"
        self.used -= 1
        before = self.in_flight.pop(ticket)
        if self._latest is ticket:
            self.last = before

    def lend(self, caller: str, ends: Sequence[float]) -> None:
        """Let a caller have slots that come back at ``ends``, and no others."""
        lent = [_Cell(end, -math.inf, {caller: 1}) for end in ends]
        cells = [cell for cell in self._cells if cell.until > -math.inf] + lent
        self.used += len(cells) - len(self._cells)
        self._cells = deque(sorted(cells, key=lambda cell: cell.end))

    def close(self, now: float, seconds: float | None) -> None:
        """Grant nothing for so long (None: until the first slot comes back), and never for less than before."""
        if seconds is None:
            seconds = self._cells[0].end - now if self._cells else self._hold
        self.closed_until = max(self.closed_until, now + seconds)

    def next_free(self, now: float) -> float:
        """Return when one more request may go while none waits."""
        if self.used >= self._burst:
            return next(self.turns(now))
        return now if now > self.closed_until else self.closed_until  # noqa: FURB136 - to call max() costs more

    def turns(self, now: float) -> Iterator[float]:
        """Yield, without end, when the first, second, ... of the requests that wait is due."""
        number = self.rate.limit - self.used
        earliest = max(now, self.closed_until)
        # what is so long ago that every pace has brought the first turn by now makes no difference
        last = max(self.last, now - 2 * (self._hold + self.latency))
        points = []
        for cell in self._cells:
            points.append((number + 1, cell.end))
            number += sum(cell.callers.values())
        if self.in_flight:
            points.append((number + 1, max(last + self.latency, now) + self._hold))
        if self.used >= self.rate.limit:
            earliest = max(earliest, *(back for number, back in points if number <= 1))
        steady = (self._hold + self.latency) / self.rate.limit
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


class Callers:
    """The names by which callers without a client key are told apart: ``TOLD_APART`` at most, the rest is ``OTHERS``.

    While there is room, a name has its place from its first request on. After that only a name that has asked before
    gets one: that of a name that asked once, or not for ``LATELY`` seconds. If there is none such, it is one of the
    ``OTHERS``. So who invents a name for each request has, after the first of them, one turn with all of them; a tool
    that keeps its name has a turn of its own from its second request on, and no invented name takes it away.

    Who uses each invented name twice can still take all places, and keep who comes later out while it goes on. Client
    keys prevent that.

    Of a name that has asked and has no place only a mark is kept: 32 bits of its hash, in the cell that 16 further bits
    name, until another name falls on it. Hashes are salted anew in each process, so that nobody can aim at a cell; at
    1,000 new names a second a mark outlives a pause of 20 s in three cases of four, else that tool's next request is
    its first.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        """Until when a name surely keeps its place; for one that asked once, when it did so."""
        self._marks = memoryview(mmap.mmap(-1, 4 * ASKED_BEFORE)).cast("I")  # which takes up what was written there

    def name(self, product: str, now: float) -> str:
        """Return the name under which a tool waits; ``product`` is what it calls itself."""
        if product in self._until:
            self._until[product] = now + LATELY
            return product
        again = self._mark(product)
        if len(self._until) >= TOLD_APART:
            if not again or self._until[first := min(self._until, key=self._until.__getitem__)] > now:
                return OTHERS
            del self._until[first]
            self._mark(first)
        self._until[product] = now + LATELY if again else now
        return product

    def _mark(self, name: str) -> bool:
        """Remember that a name has asked; return whether that was known."""
        mark, cell = divmod(hash(name) % (ASKED_BEFORE << 32), ASKED_BEFORE)
        before, self._marks[cell] = self._marks[cell], mark
        return mark == before


class Queue:
    """The tickets that wait, at most ``most``: round-robin over callers, first come first served within one.

    One caller has half of the places at most. ``turns`` yields when the first, second, ... of those that wait is due.
    """

    def __init__(self, most: int) -> None:
        self._most: Final = most
        self.callers: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self.deadline = math.inf
        """The earliest deadline, or one before it."""

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self.callers.values()))

    def __iter__(self) -> Iterator[Ticket]:
        """Yield the tickets in turn."""
        for turn in zip_longest(*self.callers.values()):
            yield from filter(None, turn)

    def join(self, ticket: Ticket, deadline: float, turns: Iterator[float]) -> bool:
        """Give a ticket its place; False where there is none, or where its turn would come after the deadline."""
        own = self.callers.get(ticket.caller, deque())
        full = len(self) >= self._most or len(own) >= self._most / 2
        if full or nth(turns, self.place(ticket.caller)) > deadline:
            return False
        ticket.deadline = deadline
        self.deadline = min(self.deadline, deadline)
        self.callers.setdefault(ticket.caller, own).append(ticket)
        return True

    def place(self, caller: str) -> int:
        """Return the place, from 1, that one more request of this caller would have."""
        own = len(self.callers.get(caller, ()))
        rank = [*self.callers].index(caller) if own else len(self.callers)
        ahead = (min(len(tickets), own + (n < rank)) for n, tickets in enumerate(self.callers.values()) if n != rank)
        return 1 + own + sum(ahead)

    def leave(self, ticket: Ticket) -> None:
        """Take a ticket's place away."""
        tickets = self.callers[ticket.caller]
        tickets.remove(ticket)
        if not tickets:
            del self.callers[ticket.caller]

    def serve(self, window: Window, now: float, due: float, slot: int = 0) -> None:
        """Let the ticket whose turn it is have a slot; its caller's next one goes behind those of the others.

        As of ``due`` on the path; ``slot`` is its number, if others were told of it.
        """
        caller, tickets = next(iter(self.callers.items()))
        ticket = tickets[0]
        self.leave(ticket)
        if tickets:
            self.callers.move_to_end(caller)
        ticket.slot = slot
        window.grant(ticket, now, due)
        ticket.on_settled()

    def overdue(self, now: float) -> list[Ticket]:
        """Return those whose deadline has come."""
        if self.deadline > now:
            return []
        self.deadline = min((ticket.deadline for ticket in self if ticket.deadline > now), default=math.inf)
        return [ticket for ticket in self if ticket.deadline <= now]

    def late(self, turns: Iterator[float], closed_for: float) -> list[Ticket]:
        """Return those whose turn would come after their deadline, or who do not wait for ``closed_for`` seconds."""
        late, due = [], next(turns)
        for ticket in self:
            if due > ticket.deadline or closed_for > ticket.patience:
                late.append(ticket)
            else:
                due = next(turns)
        return late

    def refuse(self, tickets: Sequence[Ticket], now: float, next_free_in: Callable[[float], float]) -> None:
        """Refuse them; ``next_free_in`` is asked, once they have left, in how many seconds one more could go."""
        for ticket in tickets:
            self.leave(ticket)
        wait = next_free_in(now) if tickets else 0.0
        for ticket in tickets:
            ticket.state, ticket.refused = "over", QuotaExceeded(wait)
            ticket.on_settled()


class Quota:
    """At most ``limit`` requests in any ``window`` seconds, paced, and shared fairly among those that wait.

    ``burst`` is the part of the limit that may go at once; ``max_waiting`` bounds the queue. The protocol of a
    request is ``ask``, (wait), ``Ticket.send``, ``answered``; ``cancel`` is right at any point and harmless at the
    end. After ``ask`` gave a waiting ticket, ``cancel`` or ``close``: ``poll`` again. Each attempt takes a ticket of
    its own.
    """

    def __init__(self, limit: int, window: float, *, burst: float = BURST, max_waiting: int = 1000) -> None:
        self.window: Final = Window(Rate(limit, window), burst)
        self.queue: Final = Queue(max_waiting)
        self._due = math.inf
        self.answered: Final = self.window.answered

    def ask(self, now: float, caller: str, max_wait: float) -> Ticket:
        """Take a slot, or a place in the queue: round-robin over callers, first come first served within one.

        QuotaExceeded if its turn would come after more than ``max_wait`` seconds, or if too many wait. Its turn is
        reckoned on the path described above with all that wait now; what is in flight, and what goes before it, is
        taken to be answered as quickly as the answers of late. Where it turns out later (slower answers, newcomers
        whose turn comes first), ``poll`` refuses the ticket at its deadline.
        """
        ticket = Ticket(caller)
        if self.queue.callers or not self.window.take(ticket, now):
            now = self.window.advance(now)
            if not self.queue.join(ticket, now + max_wait, self.window.turns(now)):
                raise QuotaExceeded(self.next_free_in(now))
        return ticket

    def poll(self, now: float) -> float | None:
        """Settle whatever can be settled, and return when to call again; None if nothing waits."""
        now = self.window.advance(now)
        due = max(min(self._due, now), now - self.window.rate.window * CATCH_UP)
        while self.queue and (due := next(self.window.turns(due))) <= now:
            self.queue.serve(self.window, now, due)
        self._due = due if self.queue else math.inf
        self.queue.refuse(self.queue.overdue(now), now, self.next_free_in)
        return min(due, self.queue.deadline) if self.queue else None

    def cancel(self, ticket: Ticket, now: float) -> None:
        """Give up a ticket: its place, or its slot, as though never taken. What was sent counts as answered now."""
        now = self.window.advance(now)
        self.answered(ticket, now)
        if ticket.state == "waiting":
            self.queue.leave(ticket)
            ticket.state = "over"
        elif ticket.state == "granted":
            due = self.window.last
            self.window.give_back(ticket)
            if self.queue and self.window.closed_until <= now:
                self.queue.serve(self.window, now, due)

    def close(self, now: float, seconds: float | None) -> None:
        """Metquay answered 429: grant nothing for ``seconds``, and refuse at once what can't wait so long.

        None: until the first of our own slots comes back, the soonest moment at which the server's count has surely
        fallen. The 429 is also the answer of its ticket: ``answered`` first. A later call never opens it sooner.
        """
        now = self.window.advance(now)
        self.window.close(now, seconds)
        late = self.queue.late(self.window.turns(now), self.window.closed_until - now)
        self.queue.refuse(late, now, self.next_free_in)

    def snapshot(self, now: float) -> Snapshot:
        """Return the figures for status page and metrics."""
        now, window = self.window.advance(now), self.window
        return Snapshot(
            limit=window.rate.limit,
            window=window.rate.window,
            used=window.used,
            in_flight=len(window.in_flight),
            waiting=len(self.queue),
            waiting_by_caller={caller: len(tickets) for caller, tickets in self.queue.callers.items()},
            used_by_caller=window.used_by(),
            next_free_in=self.next_free_in(now),
            closed_for=max(0.0, window.closed_until - now),
        )

    def next_free_in(self, now: float) -> float:
        """Return in how many seconds one more request would go if it came now."""
        return (nth(self.window.turns(now), len(self.queue) + 1) if self.queue else self.window.next_free(now)) - now


def nth(turns: Iterator[float], number: int) -> float:
    """Return when the ``number``-th of those that wait is due."""
    return next(islice(turns, number - 1, None))
