"""One command that sets up the peers, measures them and the proxy in interleaved rounds, and prints the tables.

No figure makes it fail: a time says as much about the machine as about a program. Compare the ratios of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import replicas, tables
from benchmarks.compare import Plan, compare, medians, say
from benchmarks.growth import growth
from benchmarks.legacy import legacy
from benchmarks.peers import CONTENDERS, NGINX, OURS, Cache, Missing
from benchmarks.rig import FAILURES, MIB, Wrk
from benchmarks.shared import shared

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS: Final = ("compare", "legacy", "growth", "shared", "replicas")
_DIGITS: Final = 5
_QUICK: Final = (OURS, NGINX)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for; return 0 unless the machine lacks what everything needs."""
    options = _options(arguments)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    cache = Cache(options.cache)
    results: dict[str, Any] = {
        "machine": {
            "date": datetime.now(UTC).date().isoformat(),
            "cores": os.cpu_count(),
            "kernel": platform.release().partition("-")[0],
            "python": platform.python_version(),
        },
        "plan": {name: getattr(options, name) for name in ("rounds", "seconds", "mebibytes", "calls")},
    }
    with tempfile.TemporaryDirectory(prefix="metquay-proxy-") as name:
        folder = Path(name)
        try:
            words, environment = cache.debian("wrk")
            cache.debian("nginx")
        except Missing as error:
            say(f"nothing can be measured without nginx and wrk: {error}")
            return 1
        wrk = Wrk.of(Path(words[0]), environment, folder)
        for part in PARTS:
            if part in options.parts:
                began = time.monotonic()
                try:
                    results |= _rounded(_measured(part, options, cache, wrk, folder / part))
                except (Missing, ImportError, *FAILURES) as error:
                    say(f"{part} is left out: {error}")
                else:
                    say(f"{part} took {time.monotonic() - began:.0f} s")
                if options.output:
                    options.output.mkdir(parents=True, exist_ok=True)
                    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for text in tables.of(results):
        print(text, end="\n\n")
    if options.output:
        with contextlib.suppress(subprocess.CalledProcessError):
            _draw(cache, options.output / "results.json", options.output)
    return 0


def _measured(part: str, options: argparse.Namespace, cache: Cache, wrk: Wrk, folder: Path) -> dict[str, Any]:
    """Measure one part; return what it adds to the results."""
    rounds, seconds = options.rounds, options.seconds
    if part == "compare":
        names = options.only or (_QUICK if options.quick else tuple(contender.name for contender in CONTENDERS))
        clients = 200 if options.quick else 1000
        figures = compare(Plan(rounds, seconds, options.mebibytes * MIB, clients, tuple(names)), cache, wrk, folder)
        return {"figures": figures, "medians": medians(figures)}
    if part == "legacy":
        jobs, how = legacy(cache, folder, calls=options.calls, rounds=rounds)
        return {"legacy": jobs, "link": how}
    if part == "growth":
        return {part: growth(cache, wrk, folder, rounds=rounds, seconds=seconds, most=options.clients)}
    if part == "shared":
        return {part: shared(cache, wrk, folder, rounds=rounds, seconds=seconds)}
    return {part: list(replicas.rows())}


def _rounded(value: Any) -> Any:  # noqa: ANN401 - what JSON holds
    """Leave out the digits that no measurement has."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _draw(cache: Cache, results: Path, folder: Path) -> None:
    try:
        python = cache.python("plots", "matplotlib") / "python"
    except Missing as error:
        say(f"nothing is drawn: {error}")
        return
    subprocess.run([python, Path(__file__).parent / "plots.py", results, folder], check=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"what to measure, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="the proxy beside nginx, one short round, below a minute")
    parser.add_argument("--rounds", type=int, help="how often each contender is measured (default: 3)")
    parser.add_argument("--seconds", type=int, help="length of each load (default: 3)")
    parser.add_argument("--mebibytes", type=int, help="size of a large body (default: 1024)")
    parser.add_argument("--calls", type=int, help="calls of the legacy job (default: 200)")
    parser.add_argument("--clients", type=int, default=10000, help="most clients at once (default: 10000)")
    parser.add_argument("--only", action="append", metavar="NAME", help="a contender to measure; repeatable")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write results.json (after each part) and the pictures there",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        default=os.environ.get("METQUAY_BENCHMARK_CACHE") or home / "metquay-proxy-benchmarks",
        help="where peers are installed (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    if options.only and (unknown := set(options.only) - {contender.name for contender in CONTENDERS}):
        parser.error(f"there is no contender {', '.join(sorted(unknown))}")
    options.parts = options.parts or (["compare"] if options.quick else list(PARTS))
    usual = {"rounds": 1, "seconds": 1, "mebibytes": 128, "calls": 20} if options.quick else {}
    for name, value in ({"rounds": 3, "seconds": 3, "mebibytes": 1024, "calls": 200} | usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
