"""Counts the instructions of the processor that one request takes, in user space: no clock, and little noise.

``python -m benchmarks.instructions`` prints them for each event loop. The whole program runs under valgrind's callgrind
before an upstream in this process; what two runs of different length differ in is what the requests took.

Facts: valgrind counts what a process executes outside of the kernel, all of its threads together. Starts of one Python
differ by less than a million instructions once hashes are the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from typing import IO, Final, cast

from benchmarks.work import REQUESTS, Upstream, ask

FEW: Final = 200
MANY: Final = 1200
LOOPS: Final = {"uvloop": "import uvloop", "asyncio": "import sys; sys.modules['uvloop'] = None"}
"""What is to be executed before the program, so that it runs on one loop or the other."""
_SERVE: Final = "; from metquay_proxy.cli import main; import sys; sys.argv[1:] = ['serve']; main()"


def instructions(loop: str) -> float:
    """Return how many instructions a plain GET takes on an event loop; they hold within some 2 %."""
    few, many = _run(loop, FEW), _run(loop, MANY)
    return (many - few) / (MANY - FEW)


def _run(loop: str, requests: int) -> int:
    """Start the program, send so many requests one after the other, end it; return what it took in all."""
    upstream = Upstream()
    upstream.start()
    settings = {
        "METQUAY_HOST": f"http://127.0.0.1:{upstream.port}",
        "METQUAY_ACCESS_KEY": "counted",
        "METQUAY_SECRET_KEY": "counted-secret",
        "METQUAY_RATE_LIMIT": "9999999/minute",
        "METQUAY_LISTEN": "127.0.0.1:0",
        "METQUAY_LOG_LEVEL": "warning",
        "METQUAY_LOG_FORMAT": "json",
        "PYTHONHASHSEED": "0",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("METQUAY_")}
    words = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, "-c"]
    with tempfile.TemporaryDirectory() as folder:
        proxy = subprocess.Popen(
            [*words, LOOPS[loop] + _SERVE],
            env=others | settings,
            cwd=folder,  # where no .env lies
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            place = re.search(r"http://127\.0\.0\.1:([0-9]+)", cast("IO[str]", proxy.stdout).readline())
            if place is None:
                raise RuntimeError(f"the program did not start:\n{proxy.communicate()[1]}")
            with contextlib.closing(socket.create_connection(("127.0.0.1", int(place[1])))) as client:
                for _ in range(requests):
                    ask(client, REQUESTS["GET"][0])
        finally:
            proxy.send_signal(signal.SIGTERM)
            _, told = proxy.communicate()
    collected = re.search(r"Collected : ([0-9]+)", told)
    if collected is None:
        raise RuntimeError(f"valgrind counted nothing:\n{told}")
    return int(collected[1])


if __name__ == "__main__":
    for name in LOOPS:
        print(f"{name}: {instructions(name):.0f} instructions for a GET")
