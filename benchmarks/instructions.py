"""Counts the instructions of the processor that one request takes, in user space: no clock, and little noise.

``python -m benchmarks.instructions`` prints them for each event loop. The whole program runs under valgrind's callgrind
before an upstream in this process; what two runs of different length differ in is what the requests took.

Facts: valgrind counts what a process executes outside of the kernel, all of its threads together. Once hashes are the
same, two runs differ by some thousand instructions in a billion.
"""

from __future__ import annotations

import compileall
import contextlib
import re
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.peers import REPOSITORY, Cache, Place, ours
from benchmarks.rig import Door, Failed, Program, first_answer, free_port
from benchmarks.work import REQUESTS, Upstream, ask

FEW: Final = 200
MANY: Final = 1200
LOOPS: Final = ("uvloop", "asyncio")
_VALGRIND: Final = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")


def instructions(loop: str) -> float:
    """Return how many instructions a plain GET takes on an event loop."""
    compileall.compile_dir(REPOSITORY / "metquay_proxy", quiet=1)  # else the first start would do that, and be counted
    few, many = _run(loop, FEW), _run(loop, MANY)
    return (many - few) / (MANY - FEW)


def _run(loop: str, requests: int) -> int:
    """Start the program, send so many requests one after the other, end it; return what it took in all."""
    upstream = Upstream()
    upstream.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Place(folder, free_port(), "http", upstream.port, folder)
        words, environment = ours(uvloop=loop == "uvloop", CA_BUNDLE="")(Cache(folder))(place)
        with Program([*_VALGRIND, *words], folder=folder, environment={**environment, "PYTHONHASHSEED": "0"}) as proxy:
            door = Door(place.port)
            first_answer(proxy, door)
            with contextlib.closing(door.connect()) as client:
                for _ in range(requests):
                    ask(client, REQUESTS["GET"][0])
        collected = re.search(r"Collected : ([0-9]+)", proxy.output)
        if collected is None:
            raise Failed(f"valgrind counted nothing:\n{proxy.output}")
        return int(collected[1])


if __name__ == "__main__":
    for name in LOOPS:
        print(f"{name}: {instructions(name):.0f} instructions for a GET")
