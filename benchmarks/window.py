"""The shared window of ``quota.lua`` in Python: the same calls get the same answers, on a clock of invented time.

The simulation needs it, since a thousand replicas make more calls than can be awaited.
``tests/replicas/test_window.py`` holds the two against each other.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from typing import Any, Final

BURIED: Final = 10.0
FORGOTTEN: Final = 60.0
GATHERING: Final = 4.0
GRACE: Final = 0.5
AGAIN: Final = 0.5
CELLS: Final = 128


class Scores:
    """A sorted set, as Redis has them: names with a score each, ordered by score and name."""

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}
        self.order: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """Count them."""
        return len(self.order)

    def add(self, name: str, score: float) -> None:
        """Give a name its score, whether it is new or not."""
        self.remove(name)
        self.scores[name] = score
        insort(self.order, (score, name))

    def remove(self, name: str) -> float | None:
        """Forget a name; return its score."""
        score = self.scores.pop(name, None)
        if score is not None:
            del self.order[bisect_left(self.order, (score, name))]
        return score

    def below(self, score: float) -> int:
        """Count those with less."""
        return bisect_left(self.order, (score, ""))

    def pop_until(self, score: float) -> list[str]:
        """Forget those with so much or less, and return them."""
        end = bisect_right(self.order, (score, "\uffff"))
        names = [name for _, name in self.order[:end]]
        del self.order[:end]
        for name in names:
            del self.scores[name]
        return names


class Window:
    """What lies in Redis; ``call`` is one run of the script."""

    def __init__(self) -> None:
        self.calls = 0
        self.clear()

    def clear(self) -> None:
        """Lose everything, as a flush does."""
        self.generation: str | None = None
        self.latest = self.born = self.last = self.closed = 0.0
        self.expected = 0
        self.turned, self.starved = 0, 0.0
        self.spare = 0
        self.seen, self.flight, self.back, self.line = (Scores() for _ in range(4))

    def call(self, now: float, call: dict[str, Any]) -> dict[str, Any]:  # noqa: C901, PLR0912, PLR0915 - in the script's order
        """Carry out a call at ``now``."""
        self.calls += 1
        me = call["replica"]
        if call["before"] is not None and now > call["before"]:
            return {"done": False, "generation": call["generation"], "now": now}
        if self.generation is not None and now < self.latest - GRACE:
            latest, calls = self.latest, self.calls
            self.clear()
            self.latest, self.calls = latest, calls
        if self.generation is None or now > self.latest + GATHERING:
            self.generation, self.born, self.expected = call["fresh"], now, 0
        self.latest = now = max(now, self.latest)
        self.expected = max(self.expected, call["replicas"])
        if call["generation"] != self.generation:
            return {"done": False, "generation": self.generation, "now": now}

        for slot in call["returned"]:
            self.spare += self.flight.remove(f"{me}:{slot}") is not None
        for slot, age in call["answered"]:
            self.flight.remove(f"{me}:{slot}")
            self.back.add(f"{me}:{slot}", now - age + call["hold"])
        for slot in call["in_flight"]:
            self.back.remove(f"{me}:{slot}")
            self.flight.add(f"{me}:{slot}", now)
        for name in self.flight.pop_until(now - BURIED):
            self.back.add(name, now + call["hold"])
        self.back.pop_until(now)
        self.seen.pop_until(now - FORGOTTEN)
        self.line.pop_until(now - GRACE)
        if call["leaving"]:
            self.seen.remove(me)
        else:
            self.seen.add(me, now)

        replicas = max(len(self.seen), 1)
        if now < self.born + GATHERING:
            replicas = max(replicas, self.expected)
        silent = replicas - (len(self.seen) - self.seen.below(now - call["silent"]))
        limit = call["limit"] - math.ceil(silent * call["limit"] / replicas)
        burst = max(1, math.floor(limit * call["burst"]))
        for seconds in call["closing"]:
            if seconds < 0:
                self.closed = max(self.closed, self.back.order[0][0] if self.back else now + call["hold"])
            else:
                self.closed = max(self.closed, now + seconds)

        mine = self.line.remove(me)
        base = now if mine is None else max(min(mine, now), now - call["catch_up"])
        ahead = len(self.line) if mine is None else self.line.below(mine)
        granted = 0
        while granted < call["wanted"] and ahead < max(self.spare, 1):
            release = now
            used = len(self.flight) + len(self.back)
            if mine is not None or self.line or used >= burst or self.closed > now:
                if self.spare and used < limit and self.closed <= now:
                    self.spare -= 1
                else:
                    release = math.inf if ahead or limit <= 0 else self._turns(1, base, now, limit, call)[0]
                if release > now:
                    break
                base = release
            self.last = now if mine is None else release
            self.flight.add(f"{me}:{call['first'] + granted}", now)
            granted += 1
            ahead = len(self.line)

        used, waits = len(self.flight) + len(self.back), len(self.line)
        answer: dict[str, Any] = {
            "done": True, "replicas": replicas, "used": used, "granted": granted, "in_line": False, "due": 0, "round": 0
        }  # fmt: skip
        if granted < call["wanted"]:
            greedy = call["own"] * replicas > call["limit"]
            patience = call["patience"] / 2 if greedy and now < self.starved + call["patience"] else call["patience"]
            place, again = ahead + 1, AGAIN if silent else 0.0
            due = self._turns(waits + 2, now, now, call["limit"], call)
            answer["in_line"] = due[place - 1] <= now + patience
            if answer["in_line"]:
                self.line.add(me, max(due[place - 1], now + again))
            else:
                self.turned += 1
                place = waits + 1 + self.turned % min(replicas, call["limit"])
                due = self._turns(max(place, waits + 2), now, now, call["limit"], call)
                due[place - 1] = max(due[place - 1], now + call["patience"] + 0.001)
                if not greedy:
                    self.starved = now
            answer["round"] = due[waits + 1] - due[0]
            answer["due"] = max(again, due[place - 1] - now)
        if not self.line:
            self.spare = 0
        answer["returns"], answer["each"] = [], 1
        if call["beat"]:
            answer["each"] = max(1, math.ceil(used / replicas / CELLS))
            step = replicas * answer["each"]
            for number in range(step, used + step, step):
                rank = min(number, used) - 1
                known = rank < len(self.back)
                answer["returns"].append(self.back.order[rank][0] - now if known else call["hold"])
        answer["closed"] = max(0.0, self.closed - now)
        answer["now"] = now
        return answer

    def _turns(self, count: int, base: float, now: float, limit: int, call: dict[str, Any]) -> list[float]:
        coming = len(self.back)
        number = limit - len(self.flight) - coming
        full = number < 1
        points: list[tuple[int, float]] = []
        earliest = max(base, self.closed)
        step = max(1, math.ceil(coming / CELLS))
        groups = [
            (min(step, coming - rank), self.back.order[min(rank + step, coming) - 1][0])
            for rank in range(0, coming, step)
        ]
        if self.flight:
            groups.append((len(self.flight), max(self.last + call["latency"], now) + call["hold"]))
        for size, at in groups:
            points.append((number + 1, at))
            if full and number < 1:
                earliest = max(earliest, at)
            number += size
        steady, at = (call["hold"] + call["latency"]) / limit, self.last
        due: list[float] = []
        while len(due) < count:
            pace, till = steady, math.inf
            for place, back in points:
                if place > len(due) and back - at > pace * (place - len(due)):
                    pace, till = (back - at) / (place - len(due)), place
            while len(due) < till and len(due) < count:
                straight = at + pace
                at = max(straight, earliest)
                due.append(at)
                if straight < at:
                    break
        return due
