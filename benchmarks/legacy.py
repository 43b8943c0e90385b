"""The users' own measure: a script that makes 200 GETs one after the other, each on a new connection, far from Metquay.

Direct, with a login for each call or for every fifty, and through the proxy on the script's own host; on a clean link,
on one that loses 1 % of all packets, and with twenty scripts at once. The limit is one round trip for each call.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.compare import say
from benchmarks.link import FAR, link
from benchmarks.peers import ours, serving
from benchmarks.rig import FAILURES, LOCAL, Failed, Program

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from benchmarks.link import Link
    from benchmarks.peers import Cache, Upstream

ROUND_TRIP: Final = 0.040
EACH: Final = "direct, a login for each call"
FIFTY: Final = "direct, a login every 50 calls"
PROXY: Final = "through the proxy"
ALONE: Final = "alone"
QUIET: Final = 10.0
"""Seconds after which the proxy has closed its connections to the server."""
QUIET_PROXY: Final = f"through the proxy, after {QUIET:.0f} s of quiet"
_SETTLE: Final = 0.5
_TOOL: Final = Path(__file__).parent / "tool.py"
_LONGEST: Final = 900


class Job(NamedTuple):
    """One run of the script; seconds."""

    case: str
    way: str
    total: float
    first: float
    limit: float


def legacy(cache: Cache, folder: Path, *, calls: int, rounds: int) -> tuple[list[Job], str]:
    """Run the script every way; return the runs, and what delayed the packets. Raises ``Missing``."""
    jobs: list[Job] = []
    how = ""
    for case, loss, tools, repeated in ((ALONE, 0.0, 1, rounds), ("1 % loss", 0.01, 1, 1), ("20 at once", 0.0, 20, 1)):
        with link(ROUND_TRIP, loss) as hosts:
            how = hosts.how
            with serving(cache, folder / case.replace(" ", ""), address=FAR, inside=hosts.far) as upstream:
                for number in range(repeated):
                    for way, login in ((EACH, 1), (FIFTY, 50), (PROXY, 0)):
                        say(f"legacy job, round {number + 1} of {repeated}, {case}: {way}")
                        try:
                            if login:
                                url = f"https://{FAR}:{upstream.ports['https']}"
                                runs = [(way, *_tool(hosts, url, calls, tools, login, str(upstream.ca)))]
                            else:
                                with _proxy(hosts, upstream, cache, folder) as url:
                                    runs = [(way, *_tool(hosts, url, calls, tools, login))]
                                    if case == ALONE:
                                        time.sleep(QUIET)
                                        runs.append((QUIET_PROXY, *_tool(hosts, url, 1, 1, login)))
                        except FAILURES as error:
                            say(f"{way}: {error}")
                        else:
                            jobs += [Job(case, *run, calls * ROUND_TRIP) for run in runs]
    return jobs, how


def summary(jobs: Iterable[Sequence[Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return (median of the totals, of the first calls) in seconds, by case and way."""
    seen: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for case, way, total, first, _ in jobs:
        seen[case][way].append((total, first))
    return {
        case: {
            way: (statistics.median(total for total, _ in runs), statistics.median(first for _, first in runs))
            for way, runs in ways.items()
        }
        for case, ways in seen.items()
    }


@contextlib.contextmanager
def _proxy(hosts: Link, upstream: Upstream, cache: Cache, folder: Path) -> Iterator[str]:
    """Run the proxy on the near host; yields its URL once it is ready."""
    place = upstream.place(folder / "proxy", "https")
    words, environment = ours(RATE_LIMIT="100000/minute")(cache)(place)
    with Program([*hosts.near, *words], folder=place.folder, environment=environment) as program:
        health = [*hosts.near, *words[:-1], "health", "--ready", "--wait", "20"]
        if subprocess.run(health, env=os.environ | environment, check=False, capture_output=True).returncode:
            raise Failed(f"the proxy did not become ready:\n{program.output}")
        time.sleep(_SETTLE)
        yield f"http://{LOCAL}:{place.port}"


def _tool(hosts: Link, url: str, calls: int, tools: int, login: int, *ca: str) -> tuple[float, float]:
    words = [*hosts.near, sys.executable, str(_TOOL), url, str(calls), str(tools), str(login), *ca]
    output = subprocess.run(words, check=True, capture_output=True, text=True, timeout=_LONGEST).stdout
    seen = json.loads(output)
    if seen["failed"]:
        raise Failed(f"{seen['failed']} calls of the legacy job failed: {seen['failures']}")
    return seen["total"], seen["first"]
