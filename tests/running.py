"""Runs the whole program on real sockets: in this process with a clock of its own, or as a process by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from metquay_proxy.app import Proxy
from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Sandbox
from metquay_proxy.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path


class FastTime:
    """A clock that runs ``speed`` times as fast as the real one, with the sleeps that belong to it."""

    def __init__(self, speed: float) -> None:
        """``speed`` is in seconds of this clock for each real one."""
        self._speed = speed
        self._began = time.monotonic()

    def now(self) -> float:
        """Read the clock, in seconds."""
        return 1000.0 + (time.monotonic() - self._began) * self._speed

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds of this clock."""
        await asyncio.sleep(seconds / self._speed)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call back after so many seconds of this clock."""
        return asyncio.get_running_loop().call_later(seconds / self._speed, callback)


@contextlib.asynccontextmanager
async def simulated(**options: Any) -> AsyncIterator[Sandbox]:  # noqa: ANN401 - of the sandbox
    """Run a simulated Metquay, without a quota unless told otherwise."""
    sandbox = Sandbox(**{"rate_limit": None} | options)
    await sandbox.start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


@contextlib.asynccontextmanager
async def running(
    upstream: str,
    *,
    time_: FastTime | None = None,
    credentials: Callable[[], Credentials] = lambda: Credentials(ACCESS_KEY, SECRET_KEY),
    **settings: Any,  # noqa: ANN401 - the settings' own types
) -> AsyncIterator[tuple[Proxy, str]]:
    """Run a proxy in front of ``upstream``; yields it and its address. Settings are given as their texts."""
    values = Settings(
        **{"listen": "127.0.0.1:0", "access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "host": upstream} | settings
    )
    timing = {} if time_ is None else {"clock": time_.now, "sleep": time_.sleep, "call_later": time_.call_later}
    proxy = Proxy(values, BaseURL.parse(upstream), credentials, **timing)
    await proxy.start()
    try:
        yield proxy, proxy.addresses[0]
    finally:
        await proxy.stop(0.0)


@dataclass
class Process:
    """A command of ours under way; what it wrote is in ``output`` once it has ended."""

    popen: subprocess.Popen[str]
    url: str
    log: Path
    welcome: str
    output: str = field(default="")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it, and return its exit code."""
        self.popen.send_signal(number)
        code = self.popen.wait(20)
        assert self.popen.stdout is not None
        self.output = self.welcome + self.popen.stdout.read() + self.log.read_text()
        self.popen.stdout.close()
        return code


@contextlib.contextmanager
def process(folder: Path, *arguments: str, **environment: str) -> Iterator[Process]:
    """Run ``metquay-proxy`` with only the given METQUAY_ variables, in ``folder``, until the block ends."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("METQUAY_")}
    log = folder / "stderr.log"
    with log.open("w") as stderr:
        popen = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "metquay_proxy", *arguments],
            cwd=folder,
            env={**clean, **environment},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # without a terminal, as a service
        )
    assert popen.stdout is not None
    try:
        welcome = popen.stdout.readline()
        found = re.search(r"https?://\S+:\d+", welcome)
        if found is None:
            raise AssertionError(welcome + log.read_text())
        yield Process(popen, found[0], log, welcome)
    finally:
        if popen.poll() is None:
            popen.kill()
            popen.wait()
        popen.stdout.close()
