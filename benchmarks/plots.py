"""Draws the pictures of a run: ``python plots.py RESULTS FOLDER``, with an interpreter that has matplotlib.

Times are shown as ratios, since nothing else holds on another machine.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

mpl.use("Agg")
from matplotlib import pyplot as plt

_OURS: Final = "metquay-proxy"
_WORKING: Final = 16
_CASES: Final = {"alone": "one script", "1 % loss": "1 % of packets lost", "20 at once": "20 scripts at once"}
_COLOURS: Final = {"ours": "#1b6ca8", "peer": "#b8c4ce", "other": "#6d7a85", "second": "#e2852e"}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write one PNG for each part that was measured, and return their paths."""
    plt.rcParams.update({"figure.dpi": 130, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for part, picture in (("medians", _cost), ("growth", _growth), ("legacy", _legacy)):
        if results.get(part):
            figure = picture(results[part])
            path = folder / f"{part}.png"
            figure.savefig(path, bbox_inches="tight")
            plt.close(figure)
            drawn.append(path)
    return drawn


def _cost(medians: dict[str, Any]) -> Any:  # noqa: ANN401 - matplotlib has no types
    """A dot for each upstream: on a log scale, the length of a bar would mean nothing."""
    costs = {
        scheme: {
            name: row["cpu_16"] / contenders["nginx"]["cpu_16"]
            for name, row in contenders.items()
            if row.get("cpu_16") and contenders.get("nginx", {}).get("cpu_16")
        }
        for scheme, contenders in medians.items()
    }
    names = sorted(set().union(*costs.values()), key=lambda name: max(cost.get(name, 0.0) for cost in costs.values()))
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.27 * len(names)))
    places = {name: -index for index, name in enumerate(names)}
    for scheme, marker, label in (("http", "o", "clear-text upstream"), ("https", "D", "TLS upstream")):
        known = [name for name in names if name in costs.get(scheme, {})]
        colours = [_COLOURS["ours" if name.startswith(_OURS) else "other"] for name in known]
        values, heights = [costs[scheme][name] for name in known], [places[name] for name in known]
        faces = colours if scheme == "http" else "white"
        axes.scatter(values, heights, s=38, c=faces, marker=marker, edgecolors=colours, zorder=3)
        grey = _COLOURS["other"]
        axes.scatter([], [], s=38, c=grey if scheme == "http" else "white", marker=marker, edgecolors=grey, label=label)
    for name in names:
        seen = [cost[name] for cost in costs.values() if name in cost]
        text = " / ".join(f"{value:.1f}" for value in seen)
        axes.annotate(text, (max(seen), places[name]), (8, 0), textcoords="offset points", va="center")
    axes.set_xscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.8, 3 * max(max(cost.values()) for cost in costs.values()))
    axes.set_yticks(list(places.values()), names)
    axes.grid(axis="x", color="#e3e7ea", linewidth=0.8)
    axes.set_xlabel("CPU time of a request, nginx = 1 (16 connections; log scale)")
    axes.legend(frameon=False, loc="upper right")
    return figure


def _growth(rows: list[list[Any]]) -> Any:  # noqa: ANN401 - matplotlib has no types
    figure, axes = plt.subplots(figsize=(7.5, 3.4))
    lines: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for name, kind, count, cpu, *_ in rows:
        lines[name, kind].append((count, cpu))
    styles = {"open": "-o", "working": "--s"}
    for (name, kind), points in lines.items():
        first = dict(points).get(_WORKING)
        if not first:
            continue
        colour = _COLOURS["ours" if name == _OURS else "second"]
        axes.plot(
            *zip(*((count, cpu / first) for count, cpu in points), strict=True),
            styles[kind],
            color=colour,
            label=f"{name}, {'all at work' if kind == 'working' else '16 at work'}",
        )
    axes.axhline(1.5, color="#999999", linewidth=0.8, linestyle=":", label="target, up to 1,000")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    ticks = sorted({count for points in lines.values() for count, _ in points} - {_WORKING})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("clients (log scale)")
    axes.set_ylabel("CPU time of a request,\n16 clients = 1")
    axes.legend(frameon=False)
    return figure


def _legacy(jobs: list[list[Any]]) -> Any:  # noqa: ANN401 - matplotlib has no types
    figure, axes = plt.subplots(figsize=(7.5, 3.0))
    totals: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    limit = 1.0
    for case, way, total, _, limit in jobs:  # noqa: B007 - the limit is the same for all
        if not way.endswith("of quiet"):  # a single call
            totals[way][case].append(total)
    cases = list(dict.fromkeys(case for by_case in totals.values() for case in by_case))
    colours = ("#8f9ba6", _COLOURS["peer"], _COLOURS["ours"])
    for number, (way, by_case) in enumerate(totals.items()):
        heights = [statistics.median(by_case[case]) / limit if case in by_case else math.nan for case in cases]
        places = [index + (number - 1) * 0.27 for index in range(len(cases))]
        bars = axes.bar(places, heights, 0.25, color=colours[number % len(colours)], label=way)
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(cases)), [_CASES.get(case, case) for case in cases])
    axes.set_ylabel("time for the job,\nin round trips for each call")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    return figure


if __name__ == "__main__":
    for written in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(written)
