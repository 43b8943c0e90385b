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
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.rules.quota import CATCH_UP, SAFETY, Quota, Snapshot, Ticket, _Cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from metquay_proxy.rules.quota import Rate

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


class Share(Quota):
    """The quota as one of several replicas sees it; ``local`` while it goes on alone."""

    def __init__(
        self, rate: Rate, name: str, jitter: Callable[[], float], *, burst: float = 0.7, max_waiting: int = 1000
    ) -> None:
        """``name`` is this replica's, and no other's ever; ``jitter`` yields 0 <= x < 1."""
        super().__init__(rate.limit, rate.window, burst=burst, max_waiting=max_waiting)
        self._rate: Final = rate
        self._name: Final = name
        self._jitter: Final = jitter
        self._beat: Final = max(_SHORTEST_BEAT, min(BEAT, rate.window / _BEATS))
        self.local = True
        self.generation = ""
        self.replicas = 0
        self.misses = 0
        self._serial = 0
        self._asked = range(0)
        self._slots: dict[Ticket, int] = {}
        self._news: list[tuple[int, float]] = []
        self._told: deque[tuple[int, float]] = deque()
        self._returned: list[int] = []
        self._closing: list[float | None] = []
        self._returns: list[float] = []
        self._each = 1
        self._full = True
        self._in_line = False
        self._used_by_all = 0
        self._ahead: float | None = None
        self._call_at = self._beat_at = self._turn_at = -math.inf
        self._round = 0.0
        self._retire()

    def poll(self, now: float) -> float | None:
        """Settle what can be settled without the others, and return when to call again; None if nothing waits."""
        if self.local:
            return super().poll(now)
        now = self._advance(now)
        if self._waiting and self._deadline <= now:
            self._refuse_overdue(now)
        return self._deadline if self._waiting else None

    def answered(self, ticket: Ticket, now: float) -> None:
        """Say that the answer's head came or the attempt failed: the slot comes back one window from now."""
        if ticket.state == "sent":
            self._news.append((self._slots.pop(ticket), self._advance(now)))
        super().answered(ticket, now)

    def cancel(self, ticket: Ticket, now: float) -> None:
        """Give up a ticket: its place, or its slot, as though never taken. What was sent counts as answered now."""
        if ticket.state == "granted":
            self._returned.append(self._slots.pop(ticket))
        super().cancel(ticket, now)

    def close(self, now: float, seconds: float | None) -> None:
        """Metquay answered 429: grant nothing for ``seconds`` (None: until a slot comes back), here or elsewhere."""
        self._closing.append(seconds)
        if self.local or seconds is not None:
            super().close(now, seconds)

    def snapshot(self, now: float) -> Snapshot:
        """Return the figures: those of all replicas, or of this one's share while it is alone."""
        own = super().snapshot(now)
        return own if self.local else own._replace(used=max(own.used, self._used_by_all))

    def next_call(self, now: float) -> float:
        """Return when to call; at once is ``now``."""
        if self.local or self._full:
            return self._call_at
        if bool(self._waiting) != self._in_line or self._returned or self._closing:
            return now
        at = min(self._beat_at, self._turn_at) if self._in_line else self._beat_at
        return min(at, self._news[0][1] + self._rate.window * _TELLING) if self._news else at

    def report(self, now: float, fresh: str, *, leaving: bool = False) -> dict[str, Any]:
        """Return the call to be made now: what became of this replica's requests, and how many wait.

        ``fresh`` names the window that begins if none is there; ``leaving``: this replica ends.
        """
        now = self._advance(now)
        beat = self._full or leaving or self._beat_at <= now
        hold = self._rate.window * SAFETY
        while self._told and self._told[0][1] + hold <= now:
            self._told.popleft()
        self._news = [(serial, at) for serial, at in self._news if at + hold > now]
        self._asked = range(self._serial, self._serial + (0 if self.local else self._waiting))
        self._serial = self._asked.stop
        over = [*self._told, *self._news] if self._full else self._news
        return {
            "replica": self._name,
            "generation": self.generation,
            "fresh": fresh,
            "replicas": max(1, self.replicas),
            "before": None if self._ahead is None else now + self._ahead + LATE,
            "leaving": leaving,
            "beat": beat,
            "silent": self._beat * _SILENT,
            "limit": self._rate.limit,
            "burst": self._burst_share,
            "hold": hold,
            "catch_up": self._rate.window * CATCH_UP,
            "latency": self._latency,
            "returned": list(self._returned),
            "answered": [[serial, round(now - at, 6)] for serial, at in over],
            "in_flight": list(self._slots.values()) if beat else [],
            "closing": [-1 if seconds is None else seconds for seconds in self._closing],
            "first": self._asked.start,
            "wanted": len(self._asked),
            "own": self._used,
            "patience": max((ticket.deadline - now for ticket in self._in_turn()), default=0.0),
        }

    def replied(self, now: float, call: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
        """Take the answer to ``call``; return whether it was carried out, else the next call is due at once."""
        now = self._advance(now)
        self._ahead = float(answer["now"]) - now
        if not answer["done"]:
            self.generation = answer["generation"]
            self._full = True
            self._call_at = now
            return False
        self._heard(now, call, answer)
        if answer["closed"] > 0 and now + answer["closed"] > self._closed_until:
            self._closed_until = now + answer["closed"]
            self._refuse_late(now)
        number, self._serial = self._serial, self._asked.start
        for _ in range(min(answer["granted"], self._waiting)):
            self._grant_next(now, now)
        self._returned.extend(range(self._serial, self._asked.start + answer["granted"]))
        self._serial = number
        entered = not self._in_line and answer["in_line"]
        self._in_line = answer["in_line"]
        self._turn_at = now + answer["due"]
        self._round = max(answer["round"], 0.0)
        if self._waiting and (entered or not self._in_line):
            self._refuse_late(now)
        return True

    def missed(self, now: float) -> bool:
        """Take note that a call failed; return whether this replica goes on alone from now on."""
        now = self._advance(now)
        self.misses += 1
        self._returned.extend(self._asked)  # it may have been carried out all the same
        del self._returned[:-_REMEMBERED]
        self._full = True
        self._call_at = now
        if not self.local and self.misses == 1:
            return False
        self._call_at += self._beat * (0.75 + self._jitter() / 2)
        if self.local:
            return False
        self._retire()
        return True

    @property
    def share(self) -> int:
        """How many requests in a window this replica may send alone."""
        return self._limit

    def _heard(self, now: float, call: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        self.misses = 0
        self.replicas = answer["replicas"]
        self._used_by_all = answer["used"]
        self._returned = self._returned[len(call["returned"]) :]
        self._closing = self._closing[len(call["closing"]) :]
        news = len(call["answered"]) - (len(self._told) if self._full else 0)
        self._told.extend(self._news[:news])
        self._news = self._news[news:]
        self._full = False
        if call["beat"]:
            self._beat_at = now + self._beat * (0.9 + self._jitter() / 5)
            self._returns, self._each = [now + distance for distance in answer["returns"]], answer["each"]
        if self.local:
            self.local = self._in_line = False
            others = [cell for cell in self._cells if cell.callers[0] == OTHERS]
            self._release([OTHERS] * len(others))
            self._cells = deque(cell for cell in self._cells if cell.callers[0] != OTHERS)
            self._limit_to(*self._rate)

    def _retire(self) -> None:
        """Go on alone, with the share that nobody else counts on."""
        self.local, now = True, self._now
        replicas = self.replicas or UNKNOWN
        limit = self._rate.limit // replicas
        # a replica among more than there are slots has one in several windows, and not all have theirs at once
        stretch = 1.0 if limit else replicas / self._rate.limit
        self._limit_to(max(1, limit), self._rate.window * stretch)
        returns = sorted(end for end in self._returns for _ in range(self._each) if end > now)
        if not limit and self.replicas:
            returns.append(now + self._jitter() * self._window)
        missing = returns[len(returns) - max(0, len(returns) - self._used) :]
        self._cells = deque(sorted([*self._cells, *(_Cell(-math.inf, end, OTHERS) for end in missing)], key=_end))
        self._used += len(missing)
        if missing:
            self._used_by[OTHERS] = len(missing)

    def _grant(self, ticket: Ticket, now: float, due: float) -> None:
        super()._grant(ticket, now, due)
        self._slots[ticket] = self._serial
        self._serial += 1

    def _schedule(self, now: float) -> Iterator[float]:
        return super()._schedule(now) if self.local else self._rounds(now)

    def _free(self, now: float) -> bool:
        return self.local and super()._free(now)  # the others must be asked before anything is granted

    def _next_free_in(self, now: float) -> float:
        return super()._next_free_in(now) if self.local else self._nth(now, self._waiting + 1) - now

    def _rounds(self, now: float) -> Iterator[float]:
        """Yield the turns of this replica: one in each round of the shared line."""
        at = max(self._turn_at, self._closed_until, now)
        while True:
            yield at
            at += self._round


def _end(cell: _Cell) -> float:
    return cell.end
