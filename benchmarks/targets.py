"""What the proxy shall reach, beside what a run measured.

Owns the targets. All are ratios to something that the same run measured, or MiB beside it.
"""

from __future__ import annotations

import math
import operator
import statistics
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.compare import RATE, SCHEMES
from benchmarks.growth import WORKING
from benchmarks.legacy import ALONE, EACH, FIFTY, PROXY, summary
from benchmarks.peers import ASYNCIO, DIRECT, KEYED, LOGGING, NEWEST, NGINX, OURS
from benchmarks.shared import IN_MEMORY, SOCKET, TCP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_GROWN: Final = 1000
REPORTED: Final = math.inf
"""The bound of what is told, and not judged."""


class Bound(NamedTuple):
    """A figure, or one for each scheme of the upstream, and what it must not exceed (``least``: fall below)."""

    values: Sequence[float | None]
    bound: float
    form: str
    """How it is written, with ``{}`` for the values."""
    least: bool = False
    digits: int = 2

    @property
    def met(self) -> bool | None:
        """Whether every value is within the bound; None if those that are known are, and one is not."""
        if all(value is None or self._within(value) for value in self.values):
            return None if None in self.values else True
        return False

    def _within(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound

    def text(self) -> str:
        """Return the values, those beyond the bound in bold."""
        cells = []
        for value in self.values:
            cell = "-" if value is None else f"{value:.{self.digits}f}"
            cells.append(cell if value is None or self._within(value) else f"**{cell}**")
        return self.form.format(" / ".join(cells))


class Target(NamedTuple):
    """One row: what is measured, what was asked for, and how that came out."""

    figure: str
    asked: str
    bounds: Sequence[Bound]

    @property
    def verdict(self) -> str:
        """Whether it was reached."""
        met = [bound.met for bound in self.bounds]
        if False in met or None in met:
            return "missed" if False in met else "not measured"
        return "reported" if all(bound.bound == REPORTED for bound in self.bounds) else "reached"

    @property
    def known(self) -> bool:
        """Whether the run found anything."""
        return any(value is not None for bound in self.bounds for value in bound.values)

    @property
    def measured(self) -> str:
        """What the run found."""
        return "; ".join(bound.text() for bound in self.bounds)


def of(results: Mapping[str, Any]) -> Iterator[Target]:
    """Return every target, with what of it was measured."""
    run = _Run(results)
    yield from _requests(run)
    yield _growth(results.get("growth", ()))
    yield Target(
        "CPU of a request with the JSON log on",
        "at most 1.2 x that with it off",
        [Bound(run.against(OURS, "cpu_16", name=LOGGING), 1.2, "{} x")],
    )
    yield from _latency(run)
    yield from _job(results.get("legacy", ()))
    yield from _rest(run)
    yield _shared(results.get("shared", {}))


class _Run:
    """The medians of a run; None for what is not there."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._medians = results.get("medians", {})
        version = results.get("machine", {}).get("newest_python")
        self.newest = f"Python {version}" if version else "the newest Python"

    def get(self, scheme: str, name: str, figure: str) -> float | None:
        value: float | None = self._medians.get(scheme, {}).get(name, {}).get(figure)
        return value

    def own(
        self, figure: str, base: str = "", join: Callable[[float, float], float] = operator.sub
    ) -> list[float | None]:
        """Return a figure of ours for each scheme, joined with another one."""
        values = []
        for scheme in SCHEMES:
            ours, other = self.get(scheme, OURS, figure), self.get(scheme, OURS, base) if base else 0.0
            values.append(None if ours is None or other is None else join(ours, other))
        return values

    def against(self, other: str, figure: str, *, name: str = OURS, added: bool = False) -> list[float | None]:
        """Return its ratio to that of another, for each scheme; ``added``: to what both add to going direct."""
        return [self.ratio(scheme, other, figure, name=name, added=added) for scheme in SCHEMES]

    def ratio(self, scheme: str, other: str, figure: str, *, name: str = OURS, added: bool = False) -> float | None:
        base = self.get(scheme, DIRECT, figure) if added else 0.0
        ours, theirs = self.get(scheme, name, figure), self.get(scheme, other, figure)
        if base is None or ours is None or theirs is None or theirs <= base:
            return None
        return (ours - base) / (theirs - base)


def _requests(run: _Run) -> Iterator[Target]:
    yield Target(
        "CPU of a request, 16 connections",
        "at most 1.5 x nginx's",
        [Bound(run.against(NGINX, "cpu_16"), 1.5, "{} x nginx")],
    )
    yield Target(
        "the same on asyncio",
        "at most 1.8 x nginx's in clear text, 1.9 x in TLS",
        [
            Bound([run.ratio(scheme, NGINX, "cpu_16", name=ASYNCIO)], bound, f"{{}} x in {what}")
            for scheme, bound, what in zip(SCHEMES, (1.8, 1.9), ("clear text", "TLS"), strict=True)
        ],
    )
    for name, what in ((KEYED, "with a client key, one of 100"), (NEWEST, f"on {run.newest}")):
        yield Target(
            f"the same {what}", "reported", [Bound(run.against(NGINX, "cpu_16", name=name), REPORTED, "{} x nginx")]
        )
    yield Target(
        "the same, traffic that varies",
        "at most 2 x nginx's where target and answer head are new each time; one of both reported",
        [
            Bound(run.against(NGINX, "cpu_varied"), 2.0, "both {} x nginx"),
            Bound(run.against(NGINX, "cpu_target"), REPORTED, "target {} x"),
            Bound(run.against(NGINX, "cpu_head"), REPORTED, "answer head {} x"),
        ],
    )
    for what, figure, bound in (
        ("a new client connection for each", "cpu_new", 1.9),
        ("a POST with 2 KB", "cpu_post", 2.0),
        ("an answer in three pieces", "cpu_pieces", 1.6),
    ):
        yield Target(
            f"the same, {what}", f"at most {bound} x nginx's", [Bound(run.against(NGINX, figure), bound, "{} x nginx")]
        )


def _latency(run: _Run) -> Iterator[Target]:
    yield Target(
        "median latency added, 1 connection",
        "at most 1.5 x HAProxy's, and below Envoy's and Caddy's",
        [
            Bound(run.against(other, "p50_1", added=True), bound, f"{{}} x {other}")
            for other, bound in (("HAProxy", 1.5), ("Envoy", 1.0), ("Caddy", 1.0))
        ],
    )
    yield Target(
        f"99th percentile, {RATE} requests a second",
        "reported",
        [Bound(run.against(NGINX, f"p99_{RATE}"), REPORTED, "{} x nginx")],
    )


def _job(jobs: Sequence[Sequence[Any]]) -> Iterator[Target]:
    ways = summary(jobs).get(ALONE, {})
    limit = jobs[0][4] if jobs else 1.0
    ours, fifty, each = (ways.get(way) for way in (PROXY, FIFTY, EACH))
    yield Target(
        "the legacy job, 40 ms from Metquay",
        "3.1 x faster than with a login every 50 calls, 6 x than with one for each; at most 1.03 x the round trips",
        [
            Bound([fifty[0] / ours[0] if ours and fifty else None], 3.1, "{} x", least=True),
            Bound([each[0] / ours[0] if ours and each else None], 6.0, "{} x", least=True),
            Bound([ours[0] / limit if ours else None], 1.03, "{} x the round trips"),
        ],
    )
    yield Target(
        "its first call",
        "5.5 x faster than direct",
        [Bound([each[1] / ours[1] if ours and each else None], 5.5, "{} x", least=True)],
    )


def _rest(run: _Run) -> Iterator[Target]:
    yield Target(
        "rate of a large body",
        "at least nginx's",
        [Bound(run.against(NGINX, f"{way}_rate"), 1.0, f"{way} {{}} x nginx", least=True) for way in ("down", "up")],
    )
    yield Target(
        "memory that it adds",
        "at most 4 MiB",
        [Bound(run.own(f"{way}_growth"), 4.0, f"{way} {{}} MiB", digits=1) for way in ("down", "up")],
    )
    yield Target(
        "memory when idle; grown after load, and after a long one",
        "at most 4 MiB more than the bare imports take; 3 MiB, and 5 MiB after 500,000 requests",
        [
            Bound(run.own("idle_mib", "import_mib"), 4.0, "{} MiB more", digits=1),
            Bound(run.own("loaded_mib", "idle_mib"), 3.0, "{} MiB", digits=1),
            Bound(run.own("soaked_mib", "idle_mib"), 5.0, "{} MiB", digits=1),
        ],
    )
    yield Target(
        "start to first answer; the command health",
        "at most 1.25 x the bare imports; 3 x a Python that does nothing",
        [
            Bound(run.own("start_ms", "import_ms", operator.truediv), 1.25, "{} x"),
            Bound(run.own("health_ms", "pass_ms", operator.truediv), 3.0, "{} x"),
        ],
    )


def _growth(rows: Sequence[Sequence[Any]]) -> Target:
    costs = {count: cpu for name, kind, count, cpu, *_ in rows if (name, kind) == (OURS, "working")}
    base, cost = costs.get(WORKING), costs.get(_GROWN)
    return Target(
        "CPU of a request, all of 1,000 clients at work",
        "at most 1.5 x that of 16",
        [Bound([cost / base if base and cost else None], 1.5, "{} x")],
    )


def _shared(ways: Mapping[str, Mapping[str, Sequence[float]]]) -> Target:
    costs = {way: statistics.median(found["cpu_16"]) for way, found in ways.items() if found.get("cpu_16")}
    base = costs.get(IN_MEMORY)
    return Target(
        "CPU of a request with the quota in Redis",
        "at most 1.6 x that with it in memory",
        [
            Bound([costs[way] / base if base and way in costs else None], 1.6, f"{{}} x by {what}")
            for way, what in ((SOCKET, "unix socket"), (TCP, "TCP"))
        ],
    )
