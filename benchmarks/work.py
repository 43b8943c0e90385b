"""Counts the work of one request, without a clock: the byte code that the proxy's event loop executes for it.

``python -m benchmarks.work [KIND...]`` prints the counts of the kinds of requests, by module. The whole program runs
on real sockets in this thread, upstream and client in others, which do not count. Asyncio's own loop is used, and the
standard library does not count, so that the figures hold on every Python.

Facts: ``sys.settrace`` sees the frames of its thread only, and one event for each instruction where a frame asks for
it. What C code does for one instruction (a regular expression, a sort) is not seen.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import socket
import sys
import sysconfig
import threading
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.app import Proxy
from metquay_proxy.log import configure_logging
from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

REPEATS: Final = 20
_STANDARD_LIBRARY: Final = sysconfig.get_path("stdlib")
_KEY: Final = "key-of-the-counted-tool"
_ANSWER: Final = b"".join(
    (
        b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Tue, 24 Nov 2026 05:00:00 GMT\r\n",
        b"Content-Type: application/json\r\nContent-Length: 2048\r\nConnection: keep-alive\r\n",
        b"Vary: Accept-Encoding\r\n\r\n",
        b"x" * 2048,
    )
)
_FIELDS: Final = (
    "User-Agent: label-printer/2.1\r\nAccept: application/json\r\nAccept-Encoding: gzip\r\nConnection: keep-alive\r\n"
)
_GET: Final = f"GET /customers?first=0&limit=50 HTTP/1.1\r\nHost: localhost\r\n{_FIELDS}"
_PUT: Final = f"PUT /customers/10427 HTTP/1.1\r\nHost: localhost\r\n{_FIELDS}"
REQUESTS: Final = {
    "GET": (f"{_GET}\r\n", False),
    "GET with a client key": (f"{_GET}X-Proxy-Key: {_KEY}\r\n\r\n", True),
    "PUT": (f"{_PUT}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}", False),
}
"""Each kind: the bytes of a request, and whether client keys are on."""


class Upstream(threading.Thread):
    """Answers a login, and everything else with two kilobytes; one connection at a time and thread."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def run(self) -> None:
        """Serve for ever."""
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        login = json.dumps({"accessToken": "token", "tokenType": "bearer", "expiresIn": 86400}).encode()
        while data := connection.recv(65536):
            if b" /api/v1/authenticate " in data:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(login), login))
            else:
                connection.sendall(_ANSWER)


class Counter:
    """Counts instructions by module while it is on."""

    def __init__(self) -> None:
        self.by_module: collections.Counter[str] = collections.Counter()

    def on(self) -> None:
        """Begin, in the thread that calls."""
        sys.settrace(self._call)
        self._stamp()  # CPython 3.12 counts instructions only from the second call on that finds a frame asking for it
        sys.settrace(self._call)

    def _stamp(self) -> None:
        """Be a frame that asks for its instructions to be counted."""

    def off(self) -> None:
        """End."""
        sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Callable[..., Any] | None:  # noqa: ANN401 - sys.settrace's own
        name = frame.f_code.co_filename
        if name.startswith((_STANDARD_LIBRARY, "<frozen")) and "site-packages" not in name:
            return None
        module = frame.f_globals.get("__name__", "?")
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False

        def count(_frame: FrameType, event: str, _arg: Any) -> Any:  # noqa: ANN401 - as above
            if event == "opcode":
                self.by_module[module] += 1
            return count

        return count


def instructions(kind: str) -> dict[str, int]:
    """Return how many instructions one request of a kind takes, by module."""
    return asyncio.run(_count(kind))


async def _count(kind: str) -> dict[str, int]:
    request, keys = REQUESTS[kind]
    upstream = Upstream()
    upstream.start()
    base = BaseURL.parse(f"http://127.0.0.1:{upstream.port}")
    values: dict[str, Any] = {"host": base, "listen": "127.0.0.1:0", "rate_limit": "9999999/minute"}
    values |= {"access_key": "counted", "secret_key": "counted-secret"}
    if keys:
        values["client_keys"] = f"counted:{_KEY}"
    configure_logging("warning", "json")
    proxy = Proxy(Settings(**values), base, lambda: Credentials("counted", "counted-secret"))
    await proxy.start()
    counter = Counter()
    try:
        port = int(proxy.addresses[0].rpartition(":")[2])
        with contextlib.closing(await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port))) as client:
            await asyncio.to_thread(ask, client, request)
            counter.on()
            for _ in range(REPEATS):
                await asyncio.to_thread(ask, client, request)
            counter.off()
    finally:
        await proxy.stop(1.0)
    return {module: round(count / REPEATS) for module, count in counter.by_module.most_common()}


def ask(client: socket.socket, request: str) -> None:
    """Send a request and read its answer, which must be the good one."""
    client.sendall(request.encode())
    answer = b""
    while not answer.endswith(_ANSWER[-2048:]):
        piece = client.recv(65536)
        if not piece or not (answer + piece).startswith(b"HTTP/1.1 200"):
            raise ConnectionError((answer + piece)[:300])
        answer += piece


def main(words: list[str]) -> None:
    """Print the counts of the named kinds, or of all; after ``--json`` as JSON."""
    as_json = words[:1] == ["--json"]
    counted = {name: instructions(name) for name in words[as_json:] or REQUESTS}
    if as_json:
        print(json.dumps(counted))
        return
    for name, counts in counted.items():
        print(f"{name}: {sum(counts.values())}")
        for module, count in counts.items():
            print(f"  {count:6} {module}")


if __name__ == "__main__":
    main(sys.argv[1:])
