"""What the proxy holds at most: the table in SECURITY.md is the program's, fits the files in deploy/, and holds.

The last of these drives every bound to its end at the same time, against the program as a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import inspect
import os
import re
import socket
import ssl
import struct
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trustme

from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY
from metquay_proxy.settings import default_text
from tests.program.test_deploy import COMPOSE, PODS, UNIT, documents
from tests.running import process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parent.parent.parent
MEMORY = 512
"""MiB."""
DESCRIPTORS = 1024
UNITS = {"": 1, "s": 1, "h": 3600, "KiB": 1024, "MiB": 1 << 20}
FIGURE = re.compile(r"([0-9]+(?:,[0-9]{3})*)(?: ?(KiB|MiB|s|h)\b)?")

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="a source archive holds only a part of the repository"
)


class Row(NamedTuple):
    """One bound: what is held, how much, where the code says so, what happens at the end, and what it adds up to."""

    what: str
    most: str
    where: str
    end: str
    memory: str


def table(heading: str) -> list[Row]:
    """Return the rows of the table below a heading."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [Row(*(cell.strip() for cell in row)) for row in rows[2:]]


BOUNDS = table("What it holds at most")
"""The last row is the sum."""


def figures(text: str) -> list[int]:
    """Return the figures of a cell, in bytes, seconds or pieces."""
    return [int(number.replace(",", "")) * UNITS[unit] for number, unit in FIGURE.findall(text)]


def in_code(place: str) -> float:
    """Return a figure of the program: a constant, a dataclass's or a parameter's default, or that of a setting."""
    if place.startswith("METQUAY_"):
        return figures(default_text(place.removeprefix("METQUAY_").lower()) or "")[0]
    module, name, parameter = re.fullmatch(r"([a-z_.0-9]+)\.(\w+)(?:\.(\w+))?", place).groups()  # type: ignore[union-attr] # else it fails
    found: Any = getattr(importlib.import_module(f"metquay_proxy.{module}"), name)
    if parameter is None:
        return float(found)
    if dataclasses.is_dataclass(found):
        return float(next(each.default for each in dataclasses.fields(found) if each.name == parameter))  # type: ignore[arg-type] # a number
    return float(inspect.signature(found).parameters[parameter].default)


@pytest.mark.parametrize("row", [row for row in BOUNDS if row.where], ids=lambda row: row.what[:40])
def test_a_bound_is_what_the_code_says(row: Row) -> None:
    """Each figure of a row is that of the constant, or the setting's default, that the row names."""
    places = re.findall(r"`([\w.]+)`", row.where)
    assert figures(row.most) == [in_code(place) for place in places]


def test_the_bounds_add_up() -> None:
    """The last row is the sum of the others, in MiB; the files in deploy/ tell it, and grant more."""
    *rows, total = [int(row.memory) for row in BOUNDS if row.memory]
    assert sum(rows) == total < MEMORY
    for path in (COMPOSE, *PODS, UNIT):
        assert re.search(rf"# .*open files is {total} MiB: SECURITY.md adds it up", path.read_text(encoding="utf-8"))


def test_no_figure_is_wrongly_read() -> None:
    """Units are understood, and a table that lost its form is noticed."""
    assert [65536, 1000, 15, 86400] == figures("64 KiB, 1,000 lines, 15 s, 24 h")
    assert len(BOUNDS) > 15


def test_the_files_of_deploy_have_these_limits() -> None:
    """Whatever runs the proxy gives it the memory and the descriptors that the bounds are reckoned with."""
    services = documents(COMPOSE)[0]["services"]
    proxies = [service for service in services.values() if service["image"] == "metquay-proxy"]
    pods = [documents(path)[0]["spec"]["template"]["spec"]["initContainers"][0] for path in PODS]
    unit = dict(re.findall(r"^(\w+)=(.*)", UNIT.read_text(encoding="utf-8"), re.MULTILINE))
    memory = [
        *(service["mem_limit"].removesuffix("m") for service in proxies),
        *(pod["resources"]["limits"]["memory"].removesuffix("Mi") for pod in pods),
        unit["MemoryMax"].removesuffix("M"),
    ]
    assert {MEMORY} == {int(limit) for limit in memory}
    descriptors = [
        *(service["ulimits"]["nofile"] for service in proxies),
        *(int(pod["command"][1].removeprefix("--nofile=")) for pod in pods),
        int(unit["LimitNOFILE"]),
    ]
    assert {DESCRIPTORS} == set(descriptors)
    assert all(["prlimit", "metquay-proxy"] == [pod["command"][0], *pod["command"][2:]] for pod in pods)


# All bounds at the same time.

ANSWER = 63 * 1024
TOKEN = b'{"accessToken": "t", "tokenType": "bearer", "expiresIn": 900}'
CLOSED = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 300\r\nContent-Length: 0\r\n\r\n"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sized(body: bytes, status: str = "200 OK") -> bytes:
    """Return an answer."""
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Be a Metquay with large answers and, for ``/closed``, none for five minutes."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            target = head.split(b" ", 2)[1]
            if b"/endless" in target:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 40))
                while True:
                    writer.write(bytes(1 << 18))
                    await writer.drain()
            answers = {b"authenticate": sized(TOKEN), b"closed": CLOSED, b"kept": sized(bytes(ANSWER), "201 Created")}
            writer.write(next((answer for part, answer in answers.items() if part in target), sized(b"ok")))
            await writer.drain()
    writer.close()


def long_head(line: str, *fields: str, size: int = 125 * 1024) -> bytes:
    """Return a head without its blank line; a part of its size is in the first line, to be kept in several forms."""
    start = f"{line.replace('?', '?' + 'q' * 60_000)} HTTP/1.1\r\nHost: localhost\r\n"
    start += "".join(f"{field}\r\n" for field in fields)
    rest = size - len(start)
    return (start + "".join(f"X-{number}: {'v' * 1000}\r\n" for number in range(rest // 1012))).encode()


class Crowd:
    """Clients of one proxy that want too much, and one that does not."""

    def __init__(self, port: int) -> None:
        """``port`` is the proxy's."""
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def come(self, number: int, *pieces: bytes, forever: bytes = b"") -> None:
        """Let so many send this, and then ``forever`` again and again; none of them reads."""
        for _ in range(number):
            sock = socket.socket()
            sock.settimeout(0)
            self._sockets.append(sock)
            await self._loop.sock_connect(sock, ("127.0.0.1", self._port))
            self._tasks.append(self._loop.create_task(self._send(sock, b"".join(pieces), forever)))
            await asyncio.sleep(0)

    async def _send(self, sock: socket.socket, data: bytes, forever: bytes) -> None:
        with contextlib.suppress(OSError):
            await self._loop.sock_sendall(sock, data)
            while forever:
                await self._loop.sock_sendall(sock, forever)

    async def leave(self) -> None:
        """Reset all connections: a mere end would wait behind what nobody reads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in self._sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        self._tasks, self._sockets = [], []

    async def ask(self, request: bytes) -> bytes:
        """Send a request as an honest client does, and return its answer."""
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                writer.write(request)
                return await reader.read()
            finally:
                writer.close()

    async def served(self) -> None:
        """Assert that an honest client is served, by Metquay and by the proxy itself."""
        end = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        for target in (b"/open/x", b"/-/live", b"/-/status", b"/-/metrics"):
            answer = await self.ask(b"GET " + target + end)
            assert answer.startswith(b"HTTP/1.1 200 "), (target, answer[:300])

    async def fill_the_records(self, number: int) -> None:
        """Have so many answers recorded, each almost as long as one may be, of tools with as many names."""
        numbers = count()

        async def post() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 18)
            while (each := next(numbers)) < number:
                name = "".join(LETTERS[each // 26**place % 26] for place in range(3))
                fields = (
                    "Host: localhost",
                    f"User-Agent: {name * 60}",
                    f"Idempotency-Key: {each}",
                    "Content-Length: 2",
                )
                writer.write("\r\n".join(("POST /kept HTTP/1.1", *fields, "", "{}")).encode())
                answer = await reader.readuntil(b"\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 201 "), answer
                await reader.readexactly(ANSWER)
            writer.close()

        async with asyncio.TaskGroup() as posting:
            for _ in range(8):
                posting.create_task(post())

    async def want_everything(self) -> None:
        """Come with everything at once."""
        tools = ["alpha" * 40, "beta" * 40]
        for tool in tools:
            waiting = long_head("GET /x?", f"User-Agent: {tool}") + b"\r\n"
            await self.come(140, waiting, forever=waiting)
            kept = long_head("POST /x?", f"User-Agent: {tool}", "Content-Length: 1000000", size=70_000) + b"\r\n"
            await self.come(40, kept + bytes(1_000_000), forever=waiting)
            keyed = kept[:-2] + b"Idempotency-Key: k\r\n\r\n"
            await self.come(10, keyed + bytes(1_000_000), forever=waiting)
        await self.come(
            20, long_head("PUT /x?", "Content-Length: 100000000", size=70_000) + b"\r\n", forever=bytes(65536)
        )
        await self.come(200, long_head("GET /x?"))
        slow = long_head("GET /open/endless?") + b"\r\n"
        await self.come(90, slow, forever=slow)
        await self.come(60, b"GET /-/events HTTP/1.1\r\nHost: localhost\r\n\r\n")


@contextlib.contextmanager
def few_descriptors(number: int) -> Iterator[None]:
    """Let what is started meanwhile have so many descriptors, and this process, as long as it runs, all that it may."""
    import resource  # noqa: PLC0415 - not on Windows

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def resident(pid: int, what: str = "VmRSS") -> int:
    """Return the memory of a process, or the most that it ever was (``VmHWM``), in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) // 1024  # type: ignore[index] # Linux has both


@contextlib.asynccontextmanager
async def besieged(folder: Path) -> AsyncIterator[tuple[int, Crowd]]:
    """Run a proxy whose log and audit log are pipes that nobody reads; yield its process id, and its clients.

    Metquay is asked by TLS, as it is out there.
    """
    ca, secure = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(secure)
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    playing: set[asyncio.Task[None]] = set()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        playing.add(asyncio.ensure_future(play(reader, writer)))

    upstream = await asyncio.start_server(begin, "127.0.0.1", 0, limit=1 << 21, ssl=secure)
    environment = {
        "METQUAY_HOST": f"https://localhost:{upstream.sockets[0].getsockname()[1]}",
        "METQUAY_CA_BUNDLE": str(folder / "ca.pem"),
        "METQUAY_ACCESS_KEY": ACCESS_KEY,
        "METQUAY_SECRET_KEY": SECRET_KEY,
        "METQUAY_LISTEN": "127.0.0.1:0",
        "METQUAY_RATE_LIMIT": "3000/minute",
        "METQUAY_MAX_WAIT": "600",
        "METQUAY_PASS_THROUGH": "/open/",
        "METQUAY_AUDIT_LOG": str(folder / "audit"),
    }
    pipes = []
    for name in ("stderr.log", "audit"):
        os.mkfifo(folder / name)
        pipes.append(os.open(folder / name, os.O_RDWR | os.O_NONBLOCK))
    try:
        with contextlib.ExitStack() as stack:
            with few_descriptors(DESCRIPTORS):
                command = stack.enter_context(process(folder, **environment))
            crowd = Crowd(int(command.url.rpartition(":")[2]))
            try:
                await crowd.served()
                yield command.popen.pid, crowd
            finally:
                await crowd.leave()
    finally:
        for pipe in pipes:
            os.close(pipe)
        upstream.close()
        await asyncio.gather(*playing)  # the proxy has ended, and so do they


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to read a process's memory")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_all_bounds_at_once(loop: str, tmp_path: Path) -> None:
    """Everybody wants too much of everything: others are served, memory stays in its limits, and is used again."""
    if loop == "asyncio":
        (tmp_path / "uvloop.py").write_text("raise ImportError\n", encoding="ascii")
    else:
        pytest.importorskip("uvloop", reason="uvloop is not installed")
    async with besieged(tmp_path) as (pid, crowd):
        before = resident(pid)
        await crowd.fill_the_records(1200)
        told = [f"before {before}", f"records {resident(pid)}"]
        await crowd.come(1, b"GET /closed HTTP/1.1\r\nHost: localhost\r\nUser-Agent: gamma\r\n\r\n")
        for _ in range(2):
            await crowd.want_everything()
            for _ in range(6):
                await asyncio.sleep(0.5)
                await crowd.served()
            told.append(f"wave {resident(pid)}, most {resident(pid, 'VmHWM')}")
            await crowd.leave()
            await asyncio.sleep(3)
            told.append(f"after it {resident(pid)}")
        print("MiB:", *told, sep="; ")  # noqa: T201 - the figures that a note quotes
        assert resident(pid, "VmHWM") < MEMORY, told
