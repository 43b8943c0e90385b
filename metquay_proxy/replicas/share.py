"""One replica's part in a quota that several share: its line, its books, and what it and the others tell each other.

Owns the replica's side of the protocol of ``quota.lua``, and the arithmetic of going on alone. Pure, as ``quota`` is:
``report`` makes a call, ``replied`` takes its answer, ``missed`` its failure, and a driver sends it when ``next_call``
says so. Calls don't overlap.

Facts:

* Every turn is granted by the shared window at the moment at which it is used, so that nothing needs to be called back
  where Metquay closes the window. A replica with a queue stands in the shared line once, and is told when to ask again.
* Times in a call are ages and those in an answer are distances: the clocks of replicas and Redis differ. A call that
  was held up on its way (a frozen Redis executes all that piled up) is too old to be carried out, by ``before``.
* What a replica reports it may report again: slots have names. So a window that was lost is put together anew by all,
  each telling of its own slots; until the others have, their shares of the limit are left alone.
* Alone, a replica keeps to limit / replicas, and of that as much counts as used as of the whole when it last heard.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import count, islice
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from metquay_proxy.rules.quota import BURST, CATCH_UP, SAFETY, Quota, QuotaExceeded, Rate, Ticket, nth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from metquay_proxy.rules.quota import Snapshot

BEAT: Final = 1.0
"""Seconds between the calls of a replica that has nothing to say but that it lives; in short windows a part of those,
since what it knows of the others must not be older than that when it goes on alone."""
_BEATS: Final = 5
_SHORTEST_BEAT: Final = 0.1
_SILENT: Final = 2.5
"""Beats that a replica may miss before the others leave its share of the limit alone."""
LATE: Final = 0.2
"""Seconds after which a call is too old to be carried out."""
UNKNOWN: Final = 10
"""How many replicas are supposed to be there by one that never heard of any."""
_TELLING: Final = 1 / 100
"""Part of the window after which an answer is told at the latest: until then its slot seems to come back later."""
_REMEMBERED: Final = 1000
"""Slots that were given back while the others could not be told; what is left out comes back by itself, later."""
OTHERS: Final = "other replicas"
"""Whom the status calls the caller of slots that are taken to be used elsewhere."""
Count = Annotated[int, Field(ge=0, le=10_000_000)]
Hour = Annotated[float, Field(ge=0.0, le=3700.0)]
"""Seconds, margins included: neither is a window longer, nor closed for longer."""
Day = Annotated[float, Field(ge=0.0, le=100_000.0)]
"""Seconds until a turn, which may wait for both, and for all that may stand in line: METQUAY_MAX_WAIT has no bound."""


class Reply(BaseModel):
    """What the script answers, and nothing else is taken; times are in seconds from now."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    done: bool
    """Whether the call was carried out; if not, ``generation`` names the window that is there, and no more is said."""
    generation: str = Field(max_length=100)
    now: float = Field(ge=0.0, le=1e11, strict=False)
    """Redis's clock, as text, since the script's JSON has too few digits."""
    replicas: int = Field(default=0, ge=0, le=10_000)
    used: Count = 0
    """Slots taken by all."""
    granted: Count = 0
    in_line: bool = False
    due: Day = 0.0
    """When it is this replica's turn,"""
    round: Day = 0.0
    """and after how long again."""
    closed: Hour = 0.0
    each: int = Field(default=1, ge=1, le=100_000)
    """So many slots come back"""
    returns: list[Hour] = Field(default=[], max_length=200)
    """at each of these moments, of this replica's part of all; told at a beat."""


class Share:
    """The quota as one of several replicas sees it, in place of a ``Quota``; ``local`` while it goes on alone."""

    def __init__(
        self, rate: Rate, name: str, jitter: Callable[[], float], on_change: Callable[[], None] = lambda: None
    ) -> None:
        """``name`` is this replica's, and no other's ever; ``jitter`` yields 0 <= x < 1.

        ``on_change`` is called where ``next_call`` may say something new.
        """
        self._rate: Final = rate
        self.name: Final = name
        self._jitter: Final = jitter
        self._on_change: Final = on_change
        self._quota: Final = Quota(*rate)
        self._queue, self._window = self._quota.queue, self._quota.window
        self._beat: Final = max(_SHORTEST_BEAT, min(BEAT, rate.window / _BEATS))
        self.local = True
        self.generation = ""
        self.heard = Reply(done=False, generation="", now=0.0)
        """The latest answer to a call that was carried out."""
        self.misses = 0
        """Calls that failed in a row,"""
        self.refusals = 0
        """and those that came to Redis and were not carried out."""
        self._alone_since = math.inf
        self._numbers: Final = count(1)
        """The names of slots."""
        self._asked: list[int] = []
        self._over: deque[tuple[int, float]] = deque()
        self._told = 0
        self._returned: list[int] = []
        self._closing: list[float] = []
        self._returns: list[float] = []
        self._each, self._full = 1, True
        self._ahead: float | None = None
        self._call_at = self._beat_at = self._turn_at = -math.inf
        self._retire(-math.inf)

    def alone_for(self, now: float) -> float:
        """Return for how many seconds it has been known that there are no others to ask."""
        return max(0.0, now - self._alone_since)

    def ask(self, now: float, caller: str, max_wait: float) -> Ticket:
        """Take a slot, or a place in the queue, as ``Quota.ask`` does; shared, the others are asked before a grant."""
        if self.local:
            return self._quota.ask(now, caller, max_wait)
        now = self._window.advance(now)
        ticket = Ticket(caller)
        if not self._queue.join(ticket, now + max_wait, self._turns(now)):
            raise QuotaExceeded(self._next_free_in(now))
        return ticket

    def poll(self, now: float) -> float | None:
        """Settle what can be settled without the others, and return when to call again; None if nothing waits."""
        self._on_change()
        if self.local:
            return self._quota.poll(now)
        self._queue.refuse(self._queue.overdue(self._window.advance(now)), now, self._next_free_in)
        return self._queue.deadline if self._queue else None

    def answered(self, ticket: Ticket, now: float) -> None:
        """Say that the answer's head came or the attempt failed: the slot comes back one window from now."""
        if ticket.state == "sent":
            self._over.append((ticket.slot or next(self._numbers), self._window.advance(now)))
        self._quota.answered(ticket, now)

    def cancel(self, ticket: Ticket, now: float) -> None:
        """Give up a ticket: its place, or its slot, as though never taken. What was sent counts as answered now."""
        self.answered(ticket, now)
        if ticket.state == "granted" and ticket.slot:
            self._returned.append(ticket.slot)
        if ticket.state == "granted" and not self.local:
            self._window.give_back(ticket)  # who gets it is for all to say
        else:
            self._quota.cancel(ticket, now)

    def close(self, now: float, seconds: float | None) -> None:
        """Metquay answered 429: grant nothing for ``seconds`` (None: until a slot comes back), here or elsewhere."""
        self._closing.append(-1 if seconds is None else seconds)
        if self.local:
            self._quota.close(now, seconds)
        elif seconds is not None:
            self._window.close(now, seconds)
            self._refuse_late(now)

    def snapshot(self, now: float) -> Snapshot:
        """Return the figures: those of all replicas, or of this one's share while it is alone."""
        own, used = self._quota.snapshot(now), max(self._window.used, self.heard.used)
        return own if self.local else own._replace(used=used, next_free_in=self._next_free_in(now))

    def next_call(self, now: float) -> float:
        """Return when to call; at once is ``now``."""
        if self.local or self._full:
            return self._call_at
        if bool(self._queue) != self.heard.in_line or self._returned or self._closing:
            return now
        at = min(self._beat_at, self._turn_at) if self.heard.in_line else self._beat_at
        news = (moment + self._rate.window * _TELLING for _, moment in islice(self._over, self._told, None))
        return min(at, next(news, at))

    def before(self, now: float, seconds: float) -> float | None:
        """Return when, on Redis's clock, a call that is made now is ``seconds`` old; None before the first answer."""
        return None if self._ahead is None else now + self._ahead + seconds

    def report(self, now: float, fresh: str, *, leaving: bool = False) -> dict[str, Any]:
        """Return the call to be made now: what became of this replica's requests, and how many wait.

        ``fresh`` names the window that begins if none is there; ``leaving``: this replica ends.
        """
        now = self._window.advance(now)
        beat = self._full or leaving or self._beat_at <= now
        hold = self._rate.window * SAFETY
        while self._over and self._over[0][1] + hold <= now:
            self._over.popleft()
            self._told = max(0, self._told - 1)
        if self._full:
            self._told = 0
        for ticket in self._window.in_flight:  # those that were granted alone have none yet
            ticket.slot = ticket.slot or next(self._numbers)
        self._asked = [*islice(self._numbers, 0 if self.local else len(self._queue))]
        return {
            "replica": self.name,
            "generation": self.generation,
            "fresh": fresh,
            "replicas": max(1, self.heard.replicas),
            "before": self.before(now, LATE),
            "leaving": leaving,
            "beat": beat,
            "silent": self._beat * _SILENT,
            "limit": self._rate.limit,
            "burst": BURST,
            "hold": hold,
            "catch_up": self._rate.window * CATCH_UP,
            "latency": self._window.latency,
            "returned": list(self._returned),
            "answered": [[slot, round(now - at, 6)] for slot, at in islice(self._over, self._told, None)],
            "in_flight": [ticket.slot for ticket in self._window.in_flight] if beat else [],
            "closing": list(self._closing),
            "slots": self._asked,
            "own": self._window.used,
            "patience": max((ticket.deadline - now for ticket in self._queue), default=0.0),
        }

    def replied(self, now: float, call: Mapping[str, Any], reply: Reply) -> bool:
        """Take the answer to ``call``; return whether it was carried out, else the next call is due at once."""
        now = self._window.advance(now)
        self._ahead = reply.now - now
        if not reply.done:
            self.refusals += 1
            self.generation, self._full, self._call_at = reply.generation, True, now
            return False
        self.misses, self.refusals, self._full, self._alone_since = 0, 0, False, math.inf
        del self._returned[: len(call["returned"])]
        del self._closing[: len(call["closing"])]
        self._told += len(call["answered"])
        if call["beat"]:
            self._beat_at = now + self._beat * (0.9 + self._jitter() / 5)
            self._returns, self._each = [now + distance for distance in reply.returns], reply.each
        if self.local:
            self.local = False
            self._window.lend(OTHERS, [])
            self._window.resize(self._rate)
        closing = reply.closed > 0 and now + reply.closed > self._window.closed_until
        late = closing or not (reply.in_line and self.heard.in_line)
        self._window.close(now, reply.closed)
        for slot in self._asked[: reply.granted]:
            if self._queue:
                self._queue.serve(self._window, now, now, slot)
            else:
                self._returned.append(slot)
        self.heard, self._turn_at = reply, now + reply.due
        if late:
            self._refuse_late(now)
        return True

    def missed(self, now: float) -> bool:
        """Take note that a call failed; return whether this replica goes on alone from now on."""
        now = self._window.advance(now)
        self.misses += 1
        self._returned = [*self._returned, *self._asked][-_REMEMBERED:]  # it may have been carried out all the same
        at_once = self.misses == 1 and not self.local
        self._full, self._call_at = True, now if at_once else now + self._beat * (0.75 + self._jitter() / 2)
        if self.misses != (1 if self.local else 2):
            return False
        if not self.local:
            self._retire(now)
        self._alone_since = now
        return True

    def _retire(self, now: float) -> None:
        """Go on alone, with the share that nobody else counts on."""
        self.local = True
        replicas = self.heard.replicas or UNKNOWN
        limit = self._rate.limit // replicas
        # a replica among more than there are slots has one in several windows, and not all have theirs at once
        stretch = 1.0 if limit else replicas / self._rate.limit
        self._window.resize(Rate(max(1, limit), self._rate.window * stretch))
        ends = (end for end in self._returns for _ in range(self._each) if end > now)
        returns = sorted(islice(ends, self._rate.limit))
        if not limit and self.heard.replicas:
            returns.append(now + self._jitter() * self._window.rate.window)
        self._window.lend(OTHERS, returns[min(len(returns), self._window.used) :])

    def _turns(self, now: float) -> Iterator[float]:
        """Yield the turns of this replica: one in each round of the shared line."""
        at = max(self._turn_at, self._window.closed_until, now)
        while True:
            yield at
            at += self.heard.round

    def _next_free_in(self, now: float) -> float:
        return nth(self._turns(now), len(self._queue) + 1) - now

    def _refuse_late(self, now: float) -> None:
        late = self._queue.late(self._turns(now), self._window.closed_until - now)
        self._queue.refuse(late, now, self._next_free_in)
