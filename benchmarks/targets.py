"""What the proxy shall reach, beside what a run measured.

Owns the targets. Most are ratios to peers of the same run; the few in MiB or ms say something of the machine too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.compare import RATE, SCHEMES
from benchmarks.legacy import ALONE, EACH, FIFTY, PROXY, summary
from benchmarks.peers import DIRECT, NGINX, OURS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CLEAR, TLS = SCHEMES
_LOG_ON: Final = f"{OURS}, log on"
_GROWN: Final = 1000


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
        return "missed" if False in met else "not measured" if None in met else "reached"

    @property
    def measured(self) -> str:
        """What the run found."""
        return "; ".join(bound.text() for bound in self.bounds)


def of(results: Mapping[str, Any]) -> Iterator[Target]:
    """Return every target, with what of it was measured."""
    run = _Run(results)
    yield from _requests(run)
    yield from _job(results.get("legacy", ()))
    yield from _rest(run)
    yield _growth(results.get("growth", ()))


class _Run:
    """The medians of a run; None for what is not there."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._medians = results.get("medians", {})

    def get(self, scheme: str, name: str, figure: str) -> float | None:
        value: float | None = self._medians.get(scheme, {}).get(name, {}).get(figure)
        return value

    def both(self, figure: str) -> list[float | None]:
        """Return a figure of ours, for each scheme."""
        return [self.get(scheme, OURS, figure) for scheme in SCHEMES]

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
        "at most 2.3 x nginx's, and below Envoy's",
        [
            Bound(run.against(NGINX, "cpu_16"), 2.3, "{} x nginx"),
            Bound(run.against("Envoy", "cpu_16"), 1.0, "{} x Envoy"),
        ],
    )
    yield Target(
        "the same, a new client connection for each",
        "at most 4.5 x nginx's",
        [Bound(run.against(NGINX, "cpu_new"), 4.5, "{} x nginx")],
    )
    for what, figure in (("1 connection", "p50_1"), (f"{RATE} requests a second", f"p50_{RATE}")):
        yield Target(
            f"median latency added, {what}",
            "below Envoy's and Caddy's",
            [Bound(run.against(other, figure, added=True), 1.0, f"{{}} x {other}") for other in ("Envoy", "Caddy")],
        )
    yield Target(
        f"99th percentile, {RATE} requests a second",
        "at most 2 x nginx's",
        [Bound(run.against(NGINX, f"p99_{RATE}"), 2.0, "{} x nginx")],
    )


def _job(jobs: Sequence[Sequence[Any]]) -> Iterator[Target]:
    ways = summary(jobs).get(ALONE, {})
    limit = jobs[0][4] if jobs else 1.0
    ours, fifty, each = (ways.get(way) for way in (PROXY, FIFTY, EACH))
    yield Target(
        "the legacy job, 40 ms from Metquay",
        "3 x faster than with a login every 50 calls, 5.8 x than with one for each; at most 1.05 x the round trips",
        [
            Bound([fifty[0] / ours[0] if ours and fifty else None], 3.0, "{} x", least=True),
            Bound([each[0] / ours[0] if ours and each else None], 5.8, "{} x", least=True),
            Bound([ours[0] / limit if ours else None], 1.05, "{} x the round trips"),
        ],
    )
    yield Target(
        "its first call",
        "5 x faster than direct",
        [Bound([each[1] / ours[1] if ours and each else None], 5.0, "{} x", least=True)],
    )


def _rest(run: _Run) -> Iterator[Target]:
    down, up = ([run.ratio(scheme, NGINX, figure) for scheme in SCHEMES] for figure in ("down_rate", "up_rate"))
    yield Target(
        "rate of a large body, down and up",
        "at least 1 and 0.8 x nginx's in clear text, 0.8 x in TLS",
        [
            Bound(down[:1], 1.0, "down {} x nginx in clear text", least=True),
            Bound(up[:1], 0.8, "up {} x", least=True),
            Bound(down[1:], 0.8, "down {} x in TLS", least=True),
            Bound(up[1:], 0.8, "up {} x", least=True),
        ],
    )
    yield Target(
        "memory that it adds",
        "at most 8 MiB",
        [Bound(run.both(f"{way}_growth"), 8.0, f"{way} {{}} MiB", digits=1) for way in ("down", "up")],
    )
    yield Target(
        "memory when idle, after load",
        "at most 56 and 62 MiB, below Envoy's",
        [
            Bound(run.both("idle_mib"), 56.0, "{} MiB", digits=0),
            Bound(run.both("loaded_mib"), 62.0, "{} MiB", digits=0),
            Bound(run.against("Envoy", "idle_mib"), 1.0, "{} x Envoy"),
            Bound(run.against("Envoy", "loaded_mib"), 1.0, "{} x Envoy"),
        ],
    )
    yield Target(
        "start to first answer, on this machine",
        "at most 600 ms; the command health 60 ms",
        [
            Bound(run.both("start_ms"), 600.0, "{} ms", digits=0),
            Bound(run.both("health_ms"), 60.0, "health {} ms", digits=0),
        ],
    )
    yield Target(
        "memory of each of 1,000 idle clients",
        "at most 25 KiB",
        [Bound(run.both("client_kib"), 25.0, "{} KiB", digits=1)],
    )
    yield Target(
        "CPU of a request with the JSON log on",
        "at most 1.3 x that with it off",
        [Bound(run.against(OURS, "cpu_16", name=_LOG_ON), 1.3, "{} x")],
    )


def _growth(rows: Sequence[Sequence[Any]]) -> Target:
    costs = {(kind, count): cpu for name, kind, count, cpu, *_ in rows if name == OURS}

    def grown(kind: str, first: int, last: int) -> list[float | None]:
        base, cost = costs.get((kind, first)), costs.get((kind, last))
        return [cost / base if base and cost else None]

    return Target(
        "CPU of a request, more clients or keys",
        "at most 1.5 x from 16 to 1,000 clients",
        [
            Bound(grown("open", 16, _GROWN), 1.5, "{} x with the others idle"),
            Bound(grown("working", 16, _GROWN), 1.5, "{} x with all at work"),
            Bound(grown("keys", 1, 100), 1.5, "{} x with 100 named keys"),
        ],
    )
