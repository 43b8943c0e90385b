"""What sharing the quota through Redis costs a request: the proxy with the quota in memory, and beside it with a Redis.

Owns the order of measuring. Each measurement has a proxy and a Redis of its own, both on this machine, so that the
network between them costs nothing: what is measured is the work. The limit is high, and nothing ever waits for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import socket
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.compare import say
from benchmarks.peers import Missing, ours, serving
from benchmarks.rig import FAILURES, LOCAL, Failed, Program, first_answer, free_port, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.peers import Cache, Upstream
    from benchmarks.rig import Wrk

IN_MEMORY: Final = "in memory"
SOCKET: Final = "Redis, unix socket"
TCP: Final = "Redis, TCP"
WAYS: Final = (IN_MEMORY, SOCKET, TCP)
LIMIT: Final = "9999999/minute"
_SETTLE: Final = 0.3
_PATIENCE: Final = 10.0
_ALONE: Final = "going on without Redis"
"""What the proxy logs when it does, so that a figure is not taken for the cost of asking Redis when nobody asked."""
_CALLS: Final = re.compile(rb"cmdstat_evalsha:calls=([0-9]+)")


def shared(cache: Cache, wrk: Wrk, folder: Path, *, rounds: int, seconds: int) -> dict[str, dict[str, list[float]]]:
    """Measure each way in each round; return the rounds' values by way and figure. Raises ``Missing``."""
    cache.debian("redis-server")
    if importlib.util.find_spec("redis") is None:
        raise Missing("redis-py is not installed: pip install '.[redis]'")
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with serving(cache, folder / "upstream") as upstream:
        for number in range(rounds):
            for way in WAYS:
                say(f"shared quota, round {number + 1} of {rounds}: {way}")
                try:
                    with _redis(cache) as redis:
                        for figure, value in _measure(cache, wrk, upstream, folder / "proxy", seconds, way, redis):
                            seen[way][figure].append(value)
                except FAILURES as error:
                    say(f"{way}: {error}")
    return {way: dict(figures) for way, figures in seen.items()}


class _Redis(NamedTuple):
    """A running Redis, with its two doors."""

    program: Program
    port: int
    path: Path

    def url(self, way: str) -> str:
        """Return where a proxy finds it."""
        return f"unix://{self.path}" if way == SOCKET else f"redis://{LOCAL}:{self.port}"

    def calls(self) -> int:
        """Return how often a script of ours has run."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_PATIENCE)
            connection.connect(str(self.path))
            connection.sendall(b"INFO commandstats\r\nQUIT\r\n")
            told = b"".join(iter(lambda: connection.recv(65536), b""))
        calls = _CALLS.search(told)
        return int(calls[1]) if calls else 0


@contextlib.contextmanager
def _redis(cache: Cache) -> Iterator[_Redis]:
    """Run a Redis that keeps nothing on disk."""
    words, environment = cache.debian("redis-server")
    # the path of a unix socket holds hardly more than 100 characters
    with tempfile.TemporaryDirectory(prefix="metquay-proxy-") as name:
        folder, port = Path(name), free_port()
        path = folder / "redis.sock"
        where = ["--bind", LOCAL, "--port", str(port), "--unixsocket", str(path), "--dir", name]
        with Program([*words, *where, "--save", ""], folder=folder, environment=environment) as program:
            until = time.monotonic() + _PATIENCE
            while not path.exists():
                if time.monotonic() > until or not program.alive:
                    raise Failed(f"redis-server does not start:\n{program.output}")
                time.sleep(0.01)
            yield _Redis(program, port, path)


def _measure(  # noqa: PLR0913 - with what, where, how long and which way
    cache: Cache, wrk: Wrk, upstream: Upstream, folder: Path, seconds: int, way: str, redis: _Redis
) -> Iterator[tuple[str, float]]:
    settings: dict[str, Any] = {} if way == IN_MEMORY else {"REDIS_URL": redis.url(way)}
    place = upstream.place(folder, "http")
    words, environment = ours(RATE_LIMIT=LIMIT, **settings)(cache)(place)
    with Program(words, folder=folder, environment=environment) as program:
        first_answer(program, place.door)
        load(wrk, place.door, program, connections=16, seconds=1)
        time.sleep(_SETTLE)
        calls, cpu = redis.calls(), redis.program.cpu()
        busy = load(wrk, place.door, program, connections=16, seconds=seconds)
        yield from (("cpu_16", busy.cpu), ("rate_16", busy.rate), ("p50_16", busy.p50))
        if way != IN_MEMORY:
            if redis.calls() == calls:
                raise Failed("the proxy asked Redis nothing")
            yield "redis_cpu_16", (redis.program.cpu() - cpu) / busy.requests * 1e6
            yield "calls_16", (redis.calls() - calls) / busy.requests
        single = load(wrk, place.door, program, connections=1, seconds=seconds)
        yield from (("cpu_1", single.cpu), ("p50_1", single.p50), ("p99_1", single.p99))
        if way != IN_MEMORY:
            yield "alone", program.output.count(_ALONE)
