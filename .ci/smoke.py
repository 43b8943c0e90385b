"""Start the proxy by a shell command, as a user would, read two customers through it, and end it with SIGTERM.

The proxy must be the command's last part and is told by METQUAY_LISTEN to take a free port; where it listens is read
from the address of the status page that it prints. Exits non-zero, with all that the proxy printed, if anything fails.
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

LIMIT = 300  # seconds for all of it: the command may install the package first


def main(command: str) -> None:
    """Run the command and judge what it does."""
    first, _, last = command.rpartition("&& ")
    proxy = subprocess.Popen(  # exec, so that the signal reaches the proxy and the exit code is its own
        ["bash", "-c", f"{first and first + '&& '}exec {last}"],  # noqa: S607 - whichever bash the machine has
        env=os.environ | {"METQUAY_LISTEN": "localhost:0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    signal.signal(signal.SIGALRM, lambda *_: proxy.kill())
    signal.alarm(LIMIT)
    assert proxy.stdout is not None  # noqa: S101 - a script, not run with -O
    printed = ""
    try:
        for line in proxy.stdout:
            printed += line
            if address := re.search(r"http://[^/\s\"]+(?=/-/)", line):
                break
        else:
            sys.exit(f"the proxy ended before it listened:\n{printed}")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the machine may use
        with direct.open(f"{address[0]}/customers?limit=2", timeout=10) as answer:
            customers = json.load(answer)
        if len(customers) != 2:  # noqa: PLR2004 - the limit asked for
            sys.exit(f"expected two customers, got {customers}")
        proxy.send_signal(signal.SIGTERM)
        printed += proxy.stdout.read()
        if proxy.wait() != 0:
            sys.exit(f"exit code {proxy.returncode} after SIGTERM:\n{printed}")
    finally:
        proxy.kill()
        proxy.wait()


if __name__ == "__main__":
    main(sys.argv[1])
