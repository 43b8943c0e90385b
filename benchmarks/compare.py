"""The proxy beside its peers: every contender in every round, with a clear-text and with a TLS upstream.

Owns what is measured of a contender, row by row, and in what order. A figure is judged by its ratio to another of the
same run, never by itself.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from benchmarks.peers import CONTENDERS, DIRECT, Cache, Command, Contender, Missing, Place, serving
from benchmarks.rig import (
    FAILURES,
    NEW_HEAD,
    PIECES,
    PLAIN,
    Door,
    Failed,
    Kind,
    Load,
    Program,
    Wrk,
    at_rate,
    first_answer,
    free_port,
    load,
    stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

SCHEMES: Final = ("http", "https")
RATE: Final = 200
_SETTLE: Final = 0.3
_PROBES: Final = 5
_BARE: Final = """
import aiohttp.web, pydantic_settings, structlog
import os
print(open("/proc/self/status").read(), flush=True)
os._exit(0)
"""
"""What the proxy can't do without; nothing that starts sooner could do its work."""
_RESIDENT: Final = re.compile(r"VmRSS:\s*(\d+) kB")
_VARIED: Final = Kind(NEW_HEAD, new_target=True)

Figures = dict[str, dict[str, dict[str, list[float]]]]
"""By scheme of the upstream, contender and figure: a value for each round."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. ``seconds`` are for each load, ``size`` is that of a large body in bytes."""

    rounds: int
    seconds: int
    size: int
    requests: int
    """Those after which memory is looked at again."""
    names: tuple[str, ...]
    """Of contenders."""
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Subject:
    """Who is measured, as it runs, and how it is started."""

    plan: Plan
    wrk: Wrk
    program: Program
    start: Callable[[Place], Command]
    place: Place

    def load(self, kind: Kind = PLAIN, *, connections: int = 16) -> Load:
        """Ask it for so many seconds as all are asked."""
        return load(
            self.wrk, self.place.door, self.program, connections=connections, seconds=self.plan.seconds, kind=kind
        )


def compare(plan: Plan, cache: Cache, wrk: Wrk, folder: Path) -> Figures:
    """Measure every contender of the plan, each as far as it lets itself be measured."""
    prepared = _prepared(plan, cache)
    direct = (DIRECT,) if "latency" in plan.rows else ()
    figures: Figures = {scheme: {name: {} for name in (*direct, *prepared)} for scheme in SCHEMES}
    with serving(cache, folder / "upstream", size=plan.size) as upstream:
        for number in range(plan.rounds):
            for scheme in SCHEMES:
                for name, table in figures[scheme].items():
                    say(f"round {number + 1} of {plan.rounds}, {scheme}: {name}")
                    try:
                        if name == DIRECT:
                            measured = _latencies(wrk, upstream.door(scheme), None, plan.seconds)
                        else:
                            contender, start = prepared[name]
                            place = upstream.place(folder / name, scheme, contender.headers)
                            measured = _run(plan, wrk, contender, start, place)
                        for figure, value in measured:
                            table.setdefault(figure, []).append(value)
                    except FAILURES as error:
                        say(f"{name}: {error}")
    return figures


def _prepared(plan: Plan, cache: Cache) -> dict[str, tuple[Contender, Callable[[Place], Command]]]:
    """Install the contenders that this machine can have."""
    prepared = {}
    for contender in CONTENDERS:
        if contender.name in plan.names and set(contender.rows) & set(plan.rows):
            try:
                prepared[contender.name] = contender, contender.prepare(cache)
            except Missing as error:
                say(f"{contender.name} is left out: {error}")
    return prepared


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)


def _run(
    plan: Plan, wrk: Wrk, contender: Contender, start: Callable[[Place], Command], place: Place
) -> Iterator[tuple[str, float]]:
    words, environment = start(place)
    with Program(words, folder=place.folder, environment=environment) as program:
        first_answer(program, place.door)
        time.sleep(_SETTLE)
        yield "idle_mib", program.memory()
        load(wrk, place.door, program, connections=16, seconds=1)  # so that caches, pools and compilers are warm
        subject = _Subject(plan, wrk, program, start, place)
        for row, measure in ROWS.items():
            if row in plan.rows and row in contender.rows:
                yield from measure(subject)


def _cost(it: _Subject) -> Iterator[tuple[str, float]]:
    yield "cpu_16", it.load().cpu


def _varied(it: _Subject) -> Iterator[tuple[str, float]]:
    """What can be remembered of a request or of an answer is worth nothing where no two are the same."""
    yield "cpu_target", it.load(Kind(new_target=True)).cpu
    yield "cpu_head", it.load(Kind(NEW_HEAD)).cpu
    yield "cpu_varied", it.load(_VARIED).cpu


def _new(it: _Subject) -> Iterator[tuple[str, float]]:
    yield "cpu_new", it.load(Kind(close=True)).cpu


def _post(it: _Subject) -> Iterator[tuple[str, float]]:
    yield "cpu_post", it.load(Kind(body=2048)).cpu


def _pieces(it: _Subject) -> Iterator[tuple[str, float]]:
    yield "cpu_pieces", it.load(Kind(PIECES)).cpu


def _latency(it: _Subject) -> Iterator[tuple[str, float]]:
    return _latencies(it.wrk, it.place.door, it.program, it.plan.seconds)


def _latencies(wrk: Wrk, door: Door, program: Program | None, seconds: int) -> Iterator[tuple[str, float]]:
    single = load(wrk, door, program, connections=1, seconds=seconds)
    p50, p99 = at_rate(door, RATE, seconds)
    yield from (("p50_1", single.p50), ("p99_1", single.p99), (f"p50_{RATE}", p50), (f"p99_{RATE}", p99))


def _memory(it: _Subject) -> Iterator[tuple[str, float]]:
    it.load(connections=64)
    yield "loaded_mib", it.program.memory()


def _soak(it: _Subject) -> Iterator[tuple[str, float]]:
    """Ask for much, and for something else each time."""
    left = it.plan.requests
    while left > 0:
        left -= it.load(_VARIED).requests
    yield "soaked_mib", it.program.memory()


def _large(it: _Subject) -> Iterator[tuple[str, float]]:
    for name, up in (("down", False), ("up", True)):
        passed = stream(it.place.door, it.program, size=it.plan.size, up=up)
        yield from ((f"{name}_rate", passed.rate), (f"{name}_cpu", passed.cpu), (f"{name}_growth", passed.growth))


def _start(it: _Subject) -> Iterator[tuple[str, float]]:
    """Start another one, ask the one that runs for its health, and beside these run what neither can do without."""
    folder = it.place.folder / "start"
    words, environment = it.start(it.place)
    took: dict[str, list[float]] = {"start_ms": [], "health_ms": [], "pass_ms": [], "import_ms": [], "import_mib": []}
    for _ in range(_PROBES):
        other = replace(it.place, port=free_port(), folder=folder)
        command = it.start(other)
        with Program(command.words, folder=folder, environment=command.environment) as program:
            took["start_ms"].append(first_answer(program, other.door) * 1000)
        for name, arguments in (
            ("import_ms", (words[0], "-c", _BARE)),
            ("health_ms", (*words[:-1], "health")),
            ("pass_ms", (words[0], "-c", "pass")),
        ):
            with Program(arguments, folder=folder, environment=environment) as program:
                took[name].append(program.finish() * 1000)
                if resident := _RESIDENT.search(program.output):
                    took["import_mib"].append(int(resident[1]) / 1024)
    for name, values in took.items():
        if not values:
            raise Failed(f"there is no {name}")
        yield name, statistics.median(values)


ROWS: Final[Mapping[str, Callable[[_Subject], Iterator[tuple[str, float]]]]] = {
    "cost": _cost,
    "varied": _varied,
    "new": _new,
    "post": _post,
    "pieces": _pieces,
    "latency": _latency,
    "memory": _memory,
    "soak": _soak,
    "large": _large,
    "start": _start,
}
"""What can be measured of a contender, in this order, since memory is looked at after load."""


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
