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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import tables
from benchmarks.compare import Plan, compare, medians, say
from benchmarks.growth import growth
from benchmarks.legacy import legacy
from benchmarks.peers import CONTENDERS, NGINX, OURS, Cache, Missing
from benchmarks.rig import MIB, Wrk

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS: Final = ("compare", "legacy", "growth")
_QUICK: Final = (OURS, NGINX)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for; return 0 unless the machine lacks what everything needs."""
    options = _options(arguments)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    cache = Cache(options.cache)
    results: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
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
        names = options.only or (_QUICK if options.quick else tuple(contender.name for contender in CONTENDERS))
        if "compare" in options.parts:
            plan = Plan(
                options.rounds, options.seconds, options.mebibytes * MIB, 200 if options.quick else 1000, tuple(names)
            )
            figures = compare(plan, cache, wrk, folder / "compare")
            results |= {"figures": figures, "medians": medians(figures)}
        if "legacy" in options.parts:
            try:
                results["legacy"], results["link"] = legacy(
                    cache, folder / "legacy", calls=options.calls, rounds=options.rounds
                )
            except Missing as error:
                say(f"the legacy job is left out: {error}")
        if "growth" in options.parts:
            results["growth"] = growth(
                cache, wrk, folder / "growth", rounds=options.rounds, seconds=options.seconds, most=options.clients
            )
    for text in tables.of(results):
        print(text, end="\n\n")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / "results.json"
        path.write_text(json.dumps(results, indent=1))
        with contextlib.suppress(subprocess.CalledProcessError):
            _draw(cache, path, options.output)
    return 0


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
    parser.add_argument("--seconds", type=int, help="length of each load (default: 4)")
    parser.add_argument("--mebibytes", type=int, help="size of a large body (default: 1024)")
    parser.add_argument("--calls", type=int, help="calls of the legacy job (default: 200)")
    parser.add_argument("--clients", type=int, default=10000, help="most clients at once (default: 10000)")
    parser.add_argument("--only", action="append", metavar="NAME", help="a contender to measure; repeatable")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write results.json and the pictures there")
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
    for name, value in ({"rounds": 3, "seconds": 4, "mebibytes": 1024, "calls": 200} | usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
