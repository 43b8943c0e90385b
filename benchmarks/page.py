"""What is said of speed: ``python -m benchmarks.page`` writes it into docs/performance.md, its gist into the README.

Owns the words around a run's figures, all of which come from a run's results. Tells ratios: times hold on one machine.
``python -m benchmarks`` prints the same of what it measured.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import targets
from benchmarks.compare import RATE, SCHEMES
from benchmarks.growth import CLIENTS, WORKING
from benchmarks.legacy import ALONE, EACH, FIFTY, PROXY, QUIET_PROXY, ROUND_TRIP, summary
from benchmarks.peers import DIRECT, NGINX, OURS
from benchmarks.replicas import RATE as QUOTA
from benchmarks.shared import IN_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

BEGIN: Final = "<!-- begin: python -m benchmarks.page -->"
END: Final = "<!-- end: python -m benchmarks.page -->"
PICTURES: Final = "benchmarks/results"
_WHOLE: Final = 10
_RATIOS: Final = (
    ("CPU of a request", "cpu_16"),
    ("varied traffic", "cpu_varied"),
    ("a new connection each", "cpu_new"),
    ("POST", "cpu_post"),
    ("answer in pieces", "cpu_pieces"),
    ("median, 1 connection", "p50_1"),
    (f"99th percentile, {RATE}/s", f"p99_{RATE}"),
    ("rate of a large download", "down_rate"),
    ("of an upload", "up_rate"),
)


def of(results: Mapping[str, Any], *, whole: bool = True) -> str:
    """Return the page, without the marks: a section for each part that was measured.

    ``whole``: with the targets of which nothing was measured.
    """
    sections = [_intro(results["machine"], results["plan"])]
    for part, write in (
        ("legacy", _legacy),
        ("medians", _peers),
        ("growth", _growth),
        ("shared", _shared),
        ("replicas", _replicas),
    ):
        if results.get(part):
            sections += write(results[part])
    rows = [row for row in targets.of(results) if whole or row.known]
    told = "What the project wants of itself, and what the same run found. In bold: beyond its bound."
    cells = [(row.figure, row.asked, row.measured, row.verdict) for row in rows]
    targeted = ["## Targets", told, grid(("figure", "target", "measured", ""), cells)]
    return "\n\n".join([_wrapped(section) for section in (*filter(None, sections), *targeted)])


def _intro(machine: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    rounds = f"{plan['rounds']} rounds" if plan["rounds"] > 1 else "one round"
    where = [f"{machine['cores']} cores"]
    if "cpu" in machine:
        where[0] += f" of {machine['cpu']}, load average {machine['load']:.1f} before"
    where.append(f"Python {machine['python']}" + (f" ({machine['build']})" if "build" in machine else ""))
    return (
        f"Measured on {machine['date']}: {', '.join(where)}, medians of {rounds}, {plan['seconds']} s for each load, "
        f"large bodies of {plan['mebibytes']} MiB. Two values are those for a clear-text and for a TLS upstream."
    )


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def pair(values: Iterable[float | None], form: str) -> str:
    """Return the values of both schemes in one cell."""
    return " / ".join("-" if value is None else form.format(value) for value in values)


def put(text: str, page: str) -> str:
    """Return a document with this page between its marks; raise ``ValueError`` unless it has both."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there is no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{page}\n\n{END}{after}"


def gist(results: Mapping[str, Any]) -> str:
    """Return what it means for a laboratory, as a list."""
    return "\n".join(_wrapped(point) for point in _meaning(results))


def _meaning(results: Mapping[str, Any]) -> Iterator[str]:
    jobs, ours = results.get("legacy", ()), results.get("medians", {}).get("https", {}).get(OURS, {})
    ways = summary(jobs).get(ALONE, {})
    if {EACH, FIFTY, PROXY} <= set(ways):
        each, fifty, proxy = (ways[way][0] for way in (EACH, FIFTY, PROXY))
        yield (
            f"* **A script** {ROUND_TRIP * 1000:.0f} ms away from Metquay needs {proxy / each:.0%} of the time that it "
            f"would need if it logged in for each call, and {proxy / fifty:.0%} if it did so every 50 calls."
        )
    if "cpu_16" in ours:
        share = QUOTA.limit / QUOTA.window * ours["cpu_16"] / 1e6
        yield (
            f"* **The processor** hardly notices it: the whole quota, {QUOTA.limit} requests a minute over TLS, takes "
            f"{share:.3%} of one core."
        )
    if "loaded_mib" in ours:
        grown = max(ours.get("down_growth", 0.0), ours.get("up_growth", 0.0))
        yield (
            f"* **Memory**: {ours['loaded_mib']:.0f} MiB after load, and {grown:.0f} MiB more while a body of "
            f"{results['plan']['mebibytes']} MiB passes. Large bodies are never held as a whole."
        )


def _wrapped(text: str) -> str:
    """Return a paragraph or a list's point in lines that an editor shows whole; a table or a picture as it is."""
    if text.startswith(("|", "!", "#")):
        return text
    hanging = "  " if text.startswith("* ") else ""
    return textwrap.fill(text, 120, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def _picture(part: str, what: str) -> str:
    return f"![{what}](../{PICTURES}/{part}.png)"


def _legacy(jobs: Sequence[Sequence[Any]]) -> Iterator[str]:
    cases = summary(jobs)
    calls = round(jobs[0][4] / ROUND_TRIP)
    yield "## A script far from Metquay"
    yield (
        f"It makes {calls} calls one after the other, on a new connection each, {ROUND_TRIP * 1000:.0f} ms from a TLS "
        "server; the proxy is on its own computer. In round trips for each call, of which there can't be less than one:"
    )
    rows = []
    for way in (EACH, FIFTY, PROXY):
        totals = [ways[way][0] / jobs[0][4] if way in ways else None for ways in cases.values()]
        rows.append([way, *(pair([total], "{:.2f}") for total in totals), _first(cases, way)])
    rows.append([QUIET_PROXY, *("" for _ in cases), _first(cases, QUIET_PROXY)])
    yield grid(["", *cases, "its first call"], rows)
    yield _picture("legacy", "Time for the job, in round trips a call")


def _first(cases: Mapping[str, Mapping[str, tuple[float, float]]], way: str) -> str:
    alone = cases.get(ALONE, {})
    return pair([alone[way][1] / ROUND_TRIP if way in alone else None], "{:.1f}")


def _peers(medians: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    yield "## Beside other proxies that attach a token"
    yield "As ratios to nginx's; memory in MiB. What is not measured (-) is not offered by that program, or failed."
    table = [(name, [medians[scheme].get(name, {}) for scheme in SCHEMES]) for name in _names(medians)]
    bases = [medians[scheme].get(NGINX, {}) for scheme in SCHEMES]
    columns = [(head, key) for head, key in _RATIOS if any(key in base for base in bases)]
    rows = []
    for name, found in table:
        cells = [
            _ratios(
                row[key] / base[key] if row.get(key) and base.get(key) else None
                for row, base in zip(found, bases, strict=True)
            )
            for _, key in columns
        ]
        if any("loaded_mib" in base for base in bases):
            cells.append(pair([row.get("loaded_mib") for row in found], "{:.0f}"))
        rows.append([name, *cells])
    heads = ["", *(head for head, _ in columns), "memory"]
    yield grid(heads[: len(rows[0])] if rows else heads, rows)
    yield _picture("medians", "CPU time of a request, nginx = 1")


def _names(medians: Mapping[str, Mapping[str, object]]) -> list[str]:
    return [name for name in dict.fromkeys(name for found in medians.values() for name in found) if name != DIRECT]


def _ratios(values: Iterable[float | None]) -> str:
    """Return them with the digits that mean something."""
    return " / ".join(
        "-" if value is None else f"{value:.2f}" if value < _WHOLE else f"{value:.0f}" for value in values
    )


def _growth(rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    costs: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for name, kind, count, cpu, *_ in rows:
        costs[name, kind][count] = cpu
    yield "## More clients"
    yield f"CPU of a request; with {WORKING} clients it is 1."
    counts = [count for count in CLIENTS if any(count in found for found in costs.values())]
    lines = []
    for (name, kind), found in costs.items():
        what = "all at work" if kind == "working" else f"{WORKING} at work"
        values = [found[count] / found[WORKING] if {count, WORKING} <= set(found) else None for count in counts]
        lines.append([f"{name}, {what}", *(pair([value], "{:.2f}") for value in values)])
    yield grid(["clients", *(f"{count:,}" for count in counts)], lines)
    yield _picture("growth", "CPU time of a request with more and more clients")


def _shared(ways: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    found = {way: {name: statistics.median(values) for name, values in row.items()} for way, row in ways.items()}
    base = found.get(IN_MEMORY, {})
    yield "## The quota shared through Redis"
    yield (
        "Both on this machine, with a quota that is never used up. As ratios to the quota in memory; Redis's CPU is "
        "told in units of the proxy's, and its calls for each request. A proxy that waits longer than 50 ms for Redis "
        "goes on alone for a while, and asks it nothing: the last column counts that."
    )
    heads = (
        "CPU, 16 connections",
        "requests/s",
        "median, 16 connections",
        "1 connection",
        "CPU of Redis",
        "calls to Redis",
        "went on alone",
    )
    rows = []
    for way, row in found.items():
        compared = [(key, key) for key in ("cpu_16", "rate_16", "p50_16", "p50_1")]
        ratios = [
            row[key] / base[to] if key in row and to in base else None
            for key, to in (*compared, ("redis_cpu_16", "cpu_16"))
        ]
        cells = [pair([value], "{:.2f}") for value in (*ratios, row.get("calls_16"))]
        rows.append([way, *cells, pair([row.get("alone")], "{:.0f}")])
    yield grid(["quota", *heads], rows)


def _replicas(rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"## Replicas that share {QUOTA.limit} requests in {QUOTA.window:.0f} s, all busy (simulated)"
    heads = (
        "replicas",
        "quota used",
        "most in one window",
        "longest wait",
        "fairness, of the best possible",
        "calls to Redis/s",
        "told to come back/s",
    )
    cells = [
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
    yield grid(heads, cells)


def main() -> None:
    """Write what the results in the repository say into the documents."""
    root = Path(__file__).parent.parent
    results = json.loads((root / PICTURES / "results.json").read_text(encoding="utf-8"))
    for name, write in DOCUMENTS.items():
        path = root / name
        path.write_text(put(path.read_text(encoding="utf-8"), write(results)), encoding="utf-8", newline="\n")


DOCUMENTS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {"docs/performance.md": of, "README.md": gist}
"""Each document with marks, and what is written between them."""

if __name__ == "__main__":
    main()
