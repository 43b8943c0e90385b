"""The proxy beside its peers: every contender in every round, with a clear-text and with a TLS upstream.

Owns the order of measuring, and the table. A figure is judged by its ratio to the same round's nginx, never by itself.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benchmarks.peers import CONTENDERS, DIRECT, Cache, Contender, Missing, serving
from benchmarks.rig import FAILURES, Door, Failed, Program, Wrk, at_rate, first_answer, load, open_clients, stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from benchmarks.peers import Command, Place

SCHEMES: Final = ("http", "https")
RATE: Final = 200
_SETTLE: Final = 0.3
_PROBES: Final = 5

Figures = dict[str, dict[str, dict[str, list[float]]]]
"""By scheme of the upstream, contender and figure: a value for each round."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. ``seconds`` are for each load, ``size`` is that of a large body in bytes."""

    rounds: int
    seconds: int
    size: int
    clients: int
    names: tuple[str, ...]


def compare(plan: Plan, cache: Cache, wrk: Wrk, folder: Path) -> Figures:
    """Measure every contender of the plan, each as far as it lets itself be measured."""
    prepared = _prepared(plan, cache)
    figures: Figures = {scheme: {name: {} for name in (DIRECT, *prepared)} for scheme in SCHEMES}
    with serving(cache, folder / "upstream", size=plan.size) as upstream:
        for number in range(plan.rounds):
            for scheme in SCHEMES:
                for name, table in figures[scheme].items():
                    say(f"round {number + 1} of {plan.rounds}, {scheme}: {name}")
                    try:
                        if name == DIRECT:
                            measured = _measure(plan, wrk, upstream.door(scheme), None)
                        else:
                            measured = _run(plan, wrk, *prepared[name], upstream.place(folder / name, scheme))
                        for figure, value in measured:
                            if name != DIRECT or value:  # no program, no CPU
                                table.setdefault(figure, []).append(value)
                    except FAILURES as error:
                        say(f"{name}: {error}")
    return figures


def _prepared(plan: Plan, cache: Cache) -> dict[str, tuple[Contender, Callable[[Place], Command]]]:
    """Install the contenders that this machine can have."""
    prepared = {}
    for contender in CONTENDERS:
        if contender.name in plan.names:
            try:
                prepared[contender.name] = contender, contender.prepare(cache)
            except Missing as error:
                say(f"{contender.name} is left out: {error}")
    return prepared


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)


def _run(
    plan: Plan, wrk: Wrk, contender: Contender, command: Callable[[Place], Command], place: Place
) -> Iterator[tuple[str, float]]:
    words, environment = command(place)
    with Program(words, folder=place.folder, environment=environment) as program:
        yield "start_ms", first_answer(program, place.door) * 1000
        time.sleep(_SETTLE)
        yield "idle_mib", program.memory()
        if contender.health:
            yield "health_ms", statistics.median(_health(words, environment) for _ in range(_PROBES)) * 1000
        yield from _measure(plan, wrk, place.door, program, brief=contender.brief)


def _health(words: Sequence[str], environment: Mapping[str, str]) -> float:
    """Return the seconds that the command ``health`` takes beside the running proxy."""
    began = time.perf_counter()
    done = subprocess.run([*words[:-1], "health"], env=os.environ | environment, capture_output=True, check=False)
    if done.returncode:
        raise Failed(f"health said: {(done.stdout + done.stderr).decode(errors='replace')}")
    return time.perf_counter() - began


def _measure(
    plan: Plan, wrk: Wrk, door: Door, program: Program | None, *, brief: bool = False
) -> Iterator[tuple[str, float]]:
    load(wrk, door, program, connections=16, seconds=1)  # so that caches, pools and compilers are warm
    busy = load(wrk, door, program, connections=16, seconds=plan.seconds)
    yield from (("rate_16", busy.rate), ("cpu_16", busy.cpu))
    if brief:
        return
    single = load(wrk, door, program, connections=1, seconds=plan.seconds)
    yield from (("rate_1", single.rate), ("cpu_1", single.cpu), ("p50_1", single.p50), ("p99_1", single.p99))
    yield "cpu_new", load(wrk, door, program, connections=16, seconds=plan.seconds, close=True).cpu
    yield "rate_64", load(wrk, door, program, connections=64, seconds=plan.seconds).rate
    p50, p99 = at_rate(door, RATE, plan.seconds)
    yield from ((f"p50_{RATE}", p50), (f"p99_{RATE}", p99))
    if program is not None:
        before = program.memory()
        yield "loaded_mib", before
        with open_clients(door, plan.clients):
            time.sleep(_SETTLE)
            yield "client_kib", (program.memory() - before) * 1024 / plan.clients
    for name, up in (("down", False), ("up", True)):
        passed = stream(door, program, size=plan.size, up=up)
        yield from ((f"{name}_rate", passed.rate), (f"{name}_cpu", passed.cpu), (f"{name}_growth", passed.growth))


def medians(figures: Figures) -> dict[str, dict[str, dict[str, float]]]:
    """Return the median of each figure's rounds, without the contenders of which there is none."""
    return {
        scheme: {
            name: {figure: statistics.median(values) for figure, values in table.items()}
            for name, table in contenders.items()
            if table
        }
        for scheme, contenders in figures.items()
    }
