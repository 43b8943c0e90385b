"""A real Redis for tests: its own process, folder and socket, which a test may kill, freeze and start again."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


class RedisServer:
    """One ``redis-server``; ``options`` are further words of its command line."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        """Start it on a free port of 127.0.0.1 and on a unix socket in ``folder``; it keeps nothing on disk.

        ``tls``: on one more port; ``options`` name the certificate.
        """
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port: int = one.getsockname()[1]
            self.tls_port: int = other.getsockname()[1]
        self.folder = folder
        self.path = folder / "redis.sock"
        self._options = (*options, *(("--tls-port", str(self.tls_port)) if tls else ()))
        self.start()

    @property
    def url(self) -> str:
        """Where it is, in clear text on this machine."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it (again), and wait until it answers."""
        words = ["--port", str(self.port), "--unixsocket", str(self.path), "--save", "", "--dir", str(self.folder)]
        with (self.folder / "redis.log").open("a") as log:
            self._popen = subprocess.Popen(  # noqa: S603 - a test's own
                ["redis-server", "--bind", "127.0.0.1", "--daemonize", "no", *words, *self._options],  # noqa: S607 - Debian's
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.path))
                return
            assert self._popen.poll() is None, (self.folder / "redis.log").read_text()
            time.sleep(0.01)
        raise AssertionError("redis-server does not answer")

    def run(self, *words: str) -> str:
        """Run one command in it, and return what it says."""
        command = ["redis-cli", "-s", str(self.path), *words]
        password = dict(itertools.pairwise(self._options)).get("--requirepass", "")
        environment = os.environ | {"REDISCLI_AUTH": password} if password else None
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603 - a test's own
        return done.stdout.strip()

    def kill(self) -> None:
        """End it at once, as a crash would; what it held is lost."""
        self._popen.kill()
        self._popen.wait()

    def freeze(self) -> None:
        """Stop it without ending it."""
        self._popen.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._popen.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, whatever its state."""
        self.kill()


@contextlib.contextmanager
def redis_server(folder: Path, *options: str, tls: bool = False) -> Iterator[RedisServer]:
    """Run a Redis in ``folder`` until the block ends."""
    folder.mkdir(exist_ok=True)
    server = RedisServer(folder, *options, tls=tls)
    try:
        yield server
    finally:
        server.stop()
