"""One command that sets up the peers, measures them and the proxy in interleaved rounds, and prints their ratios.

No figure makes it fail: a time says as much about the machine as about a program. Compare the ratios of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import page, replicas
from benchmarks.compare import ROWS, Plan, compare, medians, say
from benchmarks.growth import growth
from benchmarks.legacy import legacy
from benchmarks.peers import ASYNCIO, CONTENDERS, NGINX, OURS, Cache, Missing, newest_python
from benchmarks.rig import FAILURES, MIB, Wrk
from benchmarks.shared import shared

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS: Final = ("compare", "legacy", "growth", "shared", "replicas")
_DIGITS: Final = 5
_QUICK: Final = {"rounds": 1, "seconds": 1, "mebibytes": 128, "calls": 20, "requests": 20000, "clients": 1000}
_USUAL: Final = {"rounds": 3, "seconds": 3, "mebibytes": 1024, "calls": 200, "requests": 500000, "clients": 10000}
_QUICK_CONTENDERS: Final = (OURS, ASYNCIO, NGINX)
_QUICK_ROWS: Final = ("cost", "varied")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for; return 0 unless the machine lacks what everything needs."""
    options = options_of(arguments)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    cache = Cache(options.cache)
    results: dict[str, Any] = {
        "machine": _machine(),
        "plan": {name: getattr(options, name) for name in _USUAL},
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
            if part in options.what or (part == "compare" and options.rows):
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
    print(page.of(results, whole=options.whole))
    if options.output:
        with contextlib.suppress(subprocess.CalledProcessError):
            _draw(cache, options.output / "results.json", options.output)
    return 0


def _measured(part: str, options: argparse.Namespace, cache: Cache, wrk: Wrk, folder: Path) -> dict[str, Any]:
    """Measure one part; return what it adds to the results."""
    rounds, seconds = options.rounds, options.seconds
    if part == "compare":
        size = options.mebibytes * MIB
        plan = Plan(rounds, seconds, size, options.requests, tuple(options.only), tuple(options.rows))
        figures = compare(plan, cache, wrk, folder)
        return {"figures": figures, "medians": medians(figures)}
    if part == "legacy":
        jobs, how = legacy(cache, folder, calls=options.calls, rounds=rounds)
        return {"legacy": jobs, "link": how}
    if part == "growth":
        return {part: growth(cache, wrk, folder, rounds=rounds, seconds=seconds, most=options.clients)}
    if part == "shared":
        return {part: shared(cache, wrk, folder, rounds=rounds, seconds=seconds)}
    return {part: list(replicas.rows())}


def _machine() -> dict[str, Any]:
    """Return what the figures hold for: times for nothing else, ratios for more."""
    model = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    newest = newest_python()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "cpu": model[1] if model else platform.machine(),
        "load": os.getloadavg()[0],
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        # Debian builds with PGO and does not tell
        "build": "PGO" if optimized else "the system's" if sys.base_prefix == "/usr" else "without PGO",
        "newest_python": newest and newest[1],
    }


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


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for, with what follows from it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        help=f"what to measure: of the parts {', '.join(PARTS)}, or of what compare measures, {', '.join(ROWS)} "
        "(default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one short round of the proxy beside nginx; unless more is asked for, below a minute and only of "
        f"{' and '.join(_QUICK_ROWS)}",
    )
    for name, meaning in (
        ("rounds", "how often each contender is measured"),
        ("seconds", "length of each load"),
        ("mebibytes", "size of a large body"),
        ("calls", "calls of the legacy job"),
        ("requests", "how many requests make memory be looked at again"),
        ("clients", "most clients at once"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{meaning} (default: {_USUAL[name]}; quick: {_QUICK[name]})")
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
    names = tuple(contender.name for contender in CONTENDERS)
    for kind, chosen, known in (
        ("part or row", options.what, (*PARTS, *ROWS)),
        ("contender", options.only or (), names),
    ):
        if unknown := set(chosen) - set(known):
            parser.error(f"there is no {kind} {', '.join(sorted(unknown))}, of {', '.join(known)}")
    options.whole = not options.what and not options.quick
    options.what = options.what or (_QUICK_ROWS if options.quick else PARTS)
    options.rows = [row for row in ROWS if row in options.what or "compare" in options.what]
    options.only = options.only or (_QUICK_CONTENDERS if options.quick else names)
    for name, value in (_QUICK if options.quick else _USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
