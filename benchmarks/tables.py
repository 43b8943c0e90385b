"""The tables of a run in Markdown, and its ratios beside the targets; whether one is met is for the reader to say."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from benchmarks.compare import RATE
from benchmarks.legacy import EACH, FIFTY, PROXY
from benchmarks.peers import DIRECT, NGINX, OURS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Row = dict[str, float]
Medians = dict[str, dict[str, Row]]
"""By scheme of the upstream, contender and figure."""

_FIGURES: Final[Sequence[tuple[str, str, str]]] = (
    ("CPU a request, 16 conn. (us)", "cpu_16", "{:.0f}"),
    ("new connection each (us)", "cpu_new", "{:.0f}"),
    ("requests/s at 1", "rate_1", "{:,.0f}"),
    ("at 16", "rate_16", "{:,.0f}"),
    ("at 64", "rate_64", "{:,.0f}"),
    ("p50, 1 conn. (us)", "p50_1", "{:,.0f}"),
    ("p99", "p99_1", "{:,.0f}"),
    (f"p50, {RATE}/s (us)", f"p50_{RATE}", "{:,.0f}"),
    ("p99", f"p99_{RATE}", "{:,.0f}"),
)
_REST: Final[Sequence[tuple[str, str, str]]] = (
    ("memory idle (MiB)", "idle_mib", "{:.0f}"),
    ("loaded", "loaded_mib", "{:.0f}"),
    ("idle client (KiB)", "client_kib", "{:.1f}"),
    ("cold start (ms)", "start_ms", "{:.0f}"),
    ("health (ms)", "health_ms", "{:.0f}"),
    ("down (MiB/s)", "down_rate", "{:.0f}"),
    ("CPU (ms/GiB)", "down_cpu", "{:.0f}"),
    ("growth (MiB)", "down_growth", "{:.1f}"),
    ("up (MiB/s)", "up_rate", "{:.0f}"),
    ("CPU (ms/GiB)", "up_cpu", "{:.0f}"),
    ("growth (MiB)", "up_growth", "{:.1f}"),
)


def of(results: Mapping[str, Any]) -> Iterator[str]:
    """Return the tables of whatever was measured."""
    if results.get("medians"):
        yield _peers(results["medians"], "Cost and latency (clear-text upstream / TLS upstream)", _FIGURES)
        yield _peers(results["medians"], "Memory, start and large bodies (clear-text upstream / TLS upstream)", _REST)
        yield _targets(results["medians"])
    if results.get("legacy"):
        yield _legacy(results["legacy"], results["link"])
    if results.get("growth"):
        yield _growth(results["growth"])


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _peers(medians: Medians, title: str, figures: Sequence[tuple[str, str, str]]) -> str:
    heads = ["contender"]
    for head, figure, _ in figures:
        heads += [head, "x nginx"] if figure.startswith("cpu") else [head]
    rows = []
    for name in dict.fromkeys(name for contenders in medians.values() for name in contenders):
        cells = [name]
        for _, figure, form in figures:
            values = [contenders.get(name, {}).get(figure) for contenders in medians.values()]
            cells.append(_pair(values, form))
            if figure.startswith("cpu"):
                bases = [contenders.get(NGINX, {}).get(figure) for contenders in medians.values()]
                cells.append(_pair([a / b if a and b else None for a, b in zip(values, bases, strict=True)], "{:.1f}"))
        rows.append(cells)
    return table(title, heads, rows)


def _pair(values: Iterable[float | None], form: str) -> str:
    return " / ".join(form.format(value) if value else "-" for value in values)


def _targets(medians: Medians) -> str:
    rows: list[list[str]] = []

    def ratio(what: str, target: float, figure: str, other: str, *, added: bool = False) -> None:
        values = []
        for contenders in medians.values():
            base = contenders.get(DIRECT, {}).get(figure, 0.0) if added else 0.0
            ours, theirs = (contenders.get(name, {}).get(figure) for name in (OURS, other))
            values.append(None if ours is None or theirs is None or theirs <= base else (ours - base) / (theirs - base))
        if any(value is not None for value in values):
            rows.append([what, f"{target:.2g} x {other}", _pair(values, "{:.2f}")])

    for other, target in (
        (NGINX, 2.3),
        ("Envoy", 1),
        ("node http-proxy", 1 / 2.2),
        ("mitmproxy", 1 / 25),
        ("naive aiohttp", 1 / 3),
    ):
        ratio("CPU a request, 16 connections: at most", target, "cpu_16", other)
    ratio("CPU a request, a new connection each: at most", 4.5, "cpu_new", NGINX)
    for other in ("Envoy", "Caddy"):
        ratio("added p50, 1 connection: below", 1, "p50_1", other, added=True)
        ratio(f"added p50, {RATE}/s: below", 1, f"p50_{RATE}", other, added=True)
    ratio(f"p99, {RATE}/s: at most", 2, f"p99_{RATE}", NGINX)
    ratio("rate of a large download: at least", 1, "down_rate", NGINX)
    ratio("rate of a large upload: at least", 0.8, "up_rate", NGINX)
    ratio("CPU of a large download", 1, "down_cpu", NGINX)
    ratio("memory, idle: below", 1, "idle_mib", "Envoy")
    log = f"{OURS}, log on"
    costs = [(row.get(log, {}).get("cpu_16"), row.get(OURS, {}).get("cpu_16")) for row in medians.values()]
    if any(on for on, _ in costs):
        rows.append(
            [
                "CPU a request with the log on: at most",
                "1.3 x off",
                _pair([on / off if on and off else None for on, off in costs], "{:.2f}"),
            ]
        )
    return table(
        "Against the targets (clear-text upstream / TLS upstream)", ["figure of this run", "target", "measured"], rows
    )


def _legacy(jobs: Sequence[Sequence[Any]], link: str) -> str:
    totals: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    firsts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    limit = 0.0
    for case, way, total, first, limit in jobs:  # noqa: B007 - the limit is the same for all
        totals[case][way].append(total)
        firsts[case][way].append(first)
    rows = []
    for case, ways in totals.items():
        ours = statistics.median(ways[PROXY])
        for way, values in ways.items():
            total, first = statistics.median(values), statistics.median(firsts[case][way])
            cells = (f"{total:.1f}", f"{total / ours:.1f}", f"{total / limit:.2f}", f"{first * 1000:.0f}")
            rows.append([case, way, *(cells if way in {EACH, FIFTY, PROXY} else ("-", "-", "-", cells[3]))])
    heads = ["tools", "way", "total (s)", "x the proxy's", "x the limit", "first call (ms)"]
    return table(f"The legacy job (packets delayed by {link}; limit {limit:.1f} s)", heads, rows)


def _growth(rows: Sequence[Sequence[Any]]) -> str:
    base: dict[tuple[str, str], float] = {}
    for name, kind, count, cpu, *_ in rows:
        if count == 16 or (kind == "keys" and count == 1):  # noqa: PLR2004 - what growth is counted from
            base[name, kind] = cpu
    cells = [
        [
            name,
            kind,
            f"{count:,}",
            f"{cpu:.0f}",
            f"{cpu / base.get((name, kind), cpu):.2f}",
            f"{rate:,.0f}",
            f"{p50:,.0f}",
            f"{p99:,.0f}",
            f"{memory:.0f}",
        ]
        for name, kind, count, cpu, rate, p50, p99, memory in rows
    ]
    heads = [
        "contender",
        "what",
        "how many",
        "CPU a request (us)",
        "x that of 16 clients, 1 key",
        "requests/s",
        "p50 (us)",
        "p99 (us)",
        "memory (MiB)",
    ]
    return table("Growth (target: at most 1.5 x the CPU from 16 to 1,000 clients)", heads, cells)
