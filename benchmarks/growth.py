"""What many clients cost: the proxy and nginx at 16 to 10,000 clients.

Facts: clients may be open and silent while 16 others work, or all at work at once; the second costs the proxy a
connection to the upstream for each. Open files bound both.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.compare import say
from benchmarks.peers import CONTENDERS, NGINX, OURS, Contender, Missing, serving
from benchmarks.rig import FAILURES, Program, Wrk, first_answer, load, open_clients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.peers import Cache, Command, Upstream

CLIENTS: Final = (16, 100, 1000, 10000)
WORKING: Final = 16
_SPARE_FILES: Final = 500
_SETTLE: Final = 0.5


class Row(NamedTuple):
    """One measurement; latencies in microseconds."""

    contender: str
    kind: str
    """``open``: so many clients beside 16 that work; ``working``: so many that work."""
    number: int
    cpu: float
    rate: float
    p50: float
    p99: float
    memory: float


def growth(  # noqa: PLR0913 - with what, where and how much
    cache: Cache, wrk: Wrk, folder: Path, *, rounds: int, seconds: int, most: int
) -> list[Row]:
    """Measure with up to ``most`` clients, each case in a process of its own; return medians of the rounds."""
    seen: dict[tuple[str, str, int], list[tuple[float, ...]]] = defaultdict(list)
    with serving(cache, folder / "upstream") as upstream:
        for number in range(rounds):
            for contender, kind, count in _cases(most):
                say(f"growth, round {number + 1} of {rounds}: {contender.name}, {count} {kind}")
                try:
                    figures = _measure(contender.prepare(cache), wrk, upstream, folder, kind, count, seconds)
                except (Missing, *FAILURES) as error:
                    say(f"{contender.name}: {error}")
                else:
                    seen[contender.name, kind, count].append(figures)
    return [Row(*case, *map(statistics.median, zip(*figures, strict=True))) for case, figures in seen.items()]


def _cases(most: int) -> Iterator[tuple[Contender, str, int]]:
    """Yield (contender, kind, count)."""
    named = {contender.name: contender for contender in CONTENDERS}
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES
    for kind, largest in (("open", files), ("working", files // 2)):
        for count in CLIENTS:
            if count > min(most, largest):
                say(f"growth: {count:,} clients {kind} are left out: open files allow {largest:,}, wanted are {most:,}")
            else:
                yield from ((named[name], kind, count) for name in (OURS, NGINX))


def _measure(  # noqa: PLR0913 - one case: who, where, how many, how long
    command: Callable[..., Command],
    wrk: Wrk,
    upstream: Upstream,
    folder: Path,
    kind: str,
    count: int,
    seconds: int,
) -> tuple[float, float, float, float, float]:
    place = upstream.place(folder / "contender", "http")
    words, environment = command(place)
    with Program(words, folder=place.folder, environment=environment) as program:
        first_answer(program, place.door)
        working = count if kind == "working" else WORKING
        with open_clients(place.door, max(0, count - working) if kind == "open" else 0):
            load(wrk, place.door, program, connections=working, seconds=1)
            time.sleep(_SETTLE)
            seen = load(wrk, place.door, program, connections=working, seconds=seconds)
            return seen.cpu, seen.rate, seen.p50, seen.p99, program.memory()
