"""The tables of a run in Markdown, with times as they were measured; ``page`` makes those of the README."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

from benchmarks import targets
from benchmarks.compare import RATE
from benchmarks.legacy import EACH, FIFTY, PROXY, summary
from benchmarks.peers import NGINX
from benchmarks.replicas import RATE as QUOTA

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
TARGET_HEADS: Final = ("figure", "target", "measured", "")
REPLICA_TITLE: Final = f"Replicas that share {QUOTA.limit} requests in {QUOTA.window:.0f} s, all busy (simulated)"
REPLICA_HEADS: Final = (
    "replicas",
    "quota used",
    "most in one window",
    "longest wait",
    "fairness, of the best possible",
    "calls to Redis/s",
    "told to come back/s",
)


def of(results: Mapping[str, Any]) -> Iterator[str]:
    """Return the tables of whatever was measured."""
    if results.get("medians"):
        yield _peers(results["medians"], "Cost and latency (clear-text upstream / TLS upstream)", _FIGURES)
        yield _peers(results["medians"], "Memory, start and large bodies (clear-text upstream / TLS upstream)", _REST)
        yield _targets(results)
    if results.get("legacy"):
        yield _legacy(results["legacy"], results["link"])
    if results.get("growth"):
        yield _growth(results["growth"])
    if results.get("shared"):
        yield _shared(results["shared"])
    if results.get("replicas"):
        yield table(REPLICA_TITLE, REPLICA_HEADS, replica_rows(results["replicas"]))


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with its title."""
    return f"## {title}\n\n{grid(heads, rows)}"


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def _peers(medians: Medians, title: str, figures: Sequence[tuple[str, str, str]]) -> str:
    heads = ["contender"]
    for head, figure, _ in figures:
        heads += [head, "x nginx"] if figure.startswith("cpu") else [head]
    rows = []
    for name in dict.fromkeys(name for contenders in medians.values() for name in contenders):
        cells = [name]
        for _, figure, form in figures:
            values = [contenders.get(name, {}).get(figure) for contenders in medians.values()]
            cells.append(pair(values, form))
            if figure.startswith("cpu"):
                bases = [contenders.get(NGINX, {}).get(figure) for contenders in medians.values()]
                cells.append(pair([a / b if a and b else None for a, b in zip(values, bases, strict=True)], "{:.1f}"))
        rows.append(cells)
    return table(title, heads, rows)


def pair(values: Iterable[float | None], form: str) -> str:
    """Return the values of both schemes in one cell."""
    return " / ".join("-" if value is None else form.format(value) for value in values)


def _targets(results: Mapping[str, Any]) -> str:
    title = "Against the targets (clear-text upstream / TLS upstream; in bold what is beyond its bound)"
    return table(title, TARGET_HEADS, target_rows(results))


def target_rows(results: Mapping[str, Any]) -> list[Sequence[str]]:
    """Return a row for each target."""
    return [(row.figure, row.asked, row.measured, row.verdict) for row in targets.of(results)]


def _legacy(jobs: Sequence[Sequence[Any]], link: str) -> str:
    limit = jobs[0][4]
    rows = []
    for case, ways in summary(jobs).items():
        for way, (total, first) in ways.items():
            whole = way in {EACH, FIFTY, PROXY}
            ours = f"{total / ways[PROXY][0]:.1f}" if PROXY in ways else "-"
            cells = (f"{total:.1f}", ours, f"{total / limit:.2f}") if whole else ("-", "-", "-")
            rows.append([case, way, *cells, f"{first * 1000:.0f}"])
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


def _shared(ways: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    figures = ("cpu_16", "redis_cpu_16", "calls_16", "rate_16", "p50_16", "cpu_1", "p50_1", "p99_1", "alone")
    rows = [
        [way, *(f"{statistics.median(found[name]):.4g}" if found.get(name) else "-" for name in figures)]
        for way, found in ways.items()
    ]
    heads = [
        "quota",
        "CPU a request, 16 conn. (us)",
        "of Redis (us)",
        "calls to Redis",
        "requests/s",
        "p50 (us)",
        "CPU a request, 1 conn. (us)",
        "p50 (us)",
        "p99 (us)",
        "times alone",
    ]
    return table("The quota shared through Redis", heads, rows)


def replica_rows(rows: Iterable[Sequence[Any]]) -> list[list[str]]:
    """Return a row for each case that was simulated."""
    return [
        [
            case,
            f"{used:.0%}",
            str(most),
            f"{wait:.1f} s",
            f"{fair:.2f} of {best:.2f}",
            f"{calls:,.0f}",
            f"{refused:.1f}",
        ]
        for case, used, most, wait, fair, best, calls, refused in map(tuple, rows)
    ]
