"""Bodies of any size pass in constant memory, and of what a client chooses little is kept."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY
from tests.running import process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

GIBIBYTE = 1 << 30
PIECE = bytes(1 << 18)
TOKEN = b'{"accessToken": "t", "tokenType": "bearer", "expiresIn": 900}'


@contextlib.asynccontextmanager
async def bulk_upstream() -> AsyncIterator[tuple[int, list[int]]]:
    """Answer a login, swallow any upload and count it, and give 1 GiB to any GET; yields its port and the counts."""
    uploads: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                left = int(fields.get(b"content-length", b"0"))
                received = 0
                while left > received:
                    received += len(await reader.read(min(1 << 18, left - received)))
                if b"/authenticate" in head:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(TOKEN), TOKEN))
                elif head.startswith((b"GET", b"HEAD")):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % GIBIBYTE)
                    for _ in range(GIBIBYTE // len(PIECE) if head.startswith(b"GET") else 0):
                        writer.write(PIECE)
                        await writer.drain()
                else:
                    uploads.append(received)
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 19)
    try:
        yield server.sockets[0].getsockname()[1], uploads
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to read a process's memory")
async def test_a_gibibyte_each_way(tmp_path: Path) -> None:
    """1 GiB up and 1 GiB down arrive whole while the process grows by less than 32 MiB."""
    async with bulk_upstream() as (port, uploads):
        environment = {
            "METQUAY_HOST": f"http://127.0.0.1:{port}",
            "METQUAY_ACCESS_KEY": ACCESS_KEY,
            "METQUAY_SECRET_KEY": SECRET_KEY,
            "METQUAY_LISTEN": "127.0.0.1:0",
        }
        with process(tmp_path, **environment) as command:
            own = int(command.url.rpartition(":")[2])
            assert 0 == await _download(own, b"HEAD"), "warms up what is loaded once"
            before = peak_kib(command.popen.pid)
            assert GIBIBYTE == await _download(own, b"GET")
            await _upload(own)
            assert [GIBIBYTE] == uploads
            grown = peak_kib(command.popen.pid) - before
            print(f"growth of the peak: {grown} KiB")  # noqa: T201 - the figure that the note quotes
            assert 32 * 1024 > grown
            assert 0 == await asyncio.to_thread(command.stop)


async def _serve_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer logins with a token and anything else with an empty list."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            body = TOKEN if b"/authenticate" in head else b"[]"
            await reader.readexactly(int(head.partition(b"Content-Length: ")[2].partition(b"\r")[0] or 0))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to read a process's memory")
@pytest.mark.parametrize(
    ("path", "readers", "bound"),
    [
        pytest.param("/-/events", 100, 24, id="followers"),
        pytest.param("/-/status", 100, 64, id="status"),
        pytest.param("/customers", 0, 8, id="callers"),
    ],
)
@pytest.mark.slow
async def test_text_that_a_client_chooses(tmp_path: Path, path: str, readers: int, bound: int) -> None:
    """Targets of 64 kB and names of 60 kB, told to a hundred readers that take nothing, cost ``bound`` MiB at most."""
    server = await asyncio.start_server(_serve_nothing, "127.0.0.1", 0, limit=1 << 18)
    environment = {
        "METQUAY_HOST": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
        "METQUAY_ACCESS_KEY": ACCESS_KEY,
        "METQUAY_SECRET_KEY": SECRET_KEY,
        "METQUAY_LISTEN": "127.0.0.1:0",
        "METQUAY_RATE_LIMIT": "100000/minute",
    }
    async with server:
        with process(tmp_path, **environment) as command, contextlib.ExitStack() as mute:
            own = int(command.url.rpartition(":")[2])
            for _ in range(3):
                await _asked(own, b"/-/status", b"x")
            before = peak_kib(command.popen.pid)
            for number in range(100 if readers else 300):
                name = bytes([0x80 + number % 100, 0x80 + number // 100]) * 30_000
                assert (await _asked(own, b"/%d" % number + b"x" * 60_000, name)).startswith(b"HTTP/1.1 200")
            for _ in range(readers):
                sock = mute.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await asyncio.to_thread(sock.connect, ("127.0.0.1", own))
                sock.send(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
            status = await _asked(own, b"/-/status", b"x")
            if readers and path == "/-/events":
                await asyncio.sleep(1.0)  # for the next state and what came meanwhile
            grown = (peak_kib(command.popen.pid) - before) / 1024
            print(f"growth of the peak: {grown:.1f} MiB, the status has {len(status)} bytes")  # noqa: T201 - for the note
            assert bound > grown
            assert 400_000 > len(status)
            assert 0 == await asyncio.to_thread(command.stop)


async def _asked(port: int, target: bytes, name: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = (b"GET %b HTTP/1.1" % target, b"Host: localhost", b"User-Agent: " + name, b"Connection: close")
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


def peak_kib(pid: int) -> int:
    """Return the most that a process ever held in memory."""
    with open(f"/proc/{pid}/status") as status:  # noqa: PTH123 - no file of ours
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


async def _download(port: int, method: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 19)
    writer.write(method + b" /big HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    received = 0
    while piece := await reader.read(1 << 18):
        received += len(piece)
    writer.close()
    return received


async def _upload(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PUT /big HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % GIBIBYTE)
    for _ in range(GIBIBYTE // len(PIECE)):
        writer.write(PIECE)
        await writer.drain()
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()
