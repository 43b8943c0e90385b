"""Draws the pictures of a run: ``python plots.py RESULTS FOLDER``, with an interpreter that has matplotlib.

Times are shown as ratios, since nothing else holds on another machine.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

mpl.use("Agg")
from matplotlib import pyplot as plt

_OURS: Final = "metquay-proxy"
_COLOURS: Final = {"ours": "#1b6ca8", "peer": "#b8c4ce", "second": "#e2852e"}


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
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    contenders = medians["http"]
    nginx = contenders["nginx"]["cpu_16"]
    costs = {name: row["cpu_16"] / nginx for name, row in contenders.items() if row.get("cpu_16")}
    names = sorted(costs, key=lambda name: costs[name], reverse=True)
    colours = [_COLOURS["ours" if name.startswith(_OURS) else "peer"] for name in names]
    bars = axes.barh(names, [costs[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xscale("log")
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)  # the bars carry their values
    axes.set_xlabel("CPU time for a request, nginx = 1 (16 connections, clear-text upstream, log scale)")
    return figure


def _growth(rows: list[list[Any]]) -> Any:  # noqa: ANN401 - matplotlib has no types
    figure, axes = plt.subplots(figsize=(7.5, 3.4))
    lines: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for name, kind, count, cpu, *_ in rows:
        if kind != "keys":
            lines[name, kind].append((count, cpu))
    styles = {"open": "-o", "working": "--s"}
    for (name, kind), points in lines.items():
        first = dict(points)[16]
        colour = _COLOURS["ours" if name == _OURS else "second"]
        axes.plot(
            *zip(*((count, cpu / first) for count, cpu in points), strict=True),
            styles[kind],
            color=colour,
            label=f"{name}, {kind}",
        )
    axes.axhline(1.5, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients (open beside 16 that work, or all working)")
    axes.set_ylabel("CPU time for a request,\n16 clients = 1")
    axes.legend(frameon=False)
    return figure


def _legacy(jobs: list[list[Any]]) -> Any:  # noqa: ANN401 - matplotlib has no types
    figure, axes = plt.subplots(figsize=(7.5, 3.0))
    totals: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    limit = 1.0
    for case, way, total, _, limit in jobs:  # noqa: B007 - the limit is the same for all
        if not way.endswith("of quiet"):  # a single call
            totals[way][case].append(total)
    cases = list(next(iter(totals.values())))
    colours = ("#8f9ba6", _COLOURS["peer"], _COLOURS["ours"])
    for number, (way, by_case) in enumerate(totals.items()):
        heights = [statistics.median(by_case[case]) / limit if case in by_case else 0.0 for case in cases]
        places = [index + (number - 1) * 0.27 for index in range(len(cases))]
        bars = axes.bar(places, heights, 0.25, color=colours[number % len(colours)], label=way)
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("time for the job,\none round trip a call = 1")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


if __name__ == "__main__":
    for written in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(written)
