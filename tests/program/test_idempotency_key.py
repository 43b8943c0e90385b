"""A POST with an Idempotency-Key is executed once, whatever gets lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from metquay_proxy.sandbox.server import Faults
from tests.program.test_main_job import simulated
from tests.program.test_memory import PIECE, TOKEN, peak_kib
from tests.running import FastTime, process, running
from tests.wire import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LARGEST = 64 << 20
"""Bytes of a body that may be kept, and of all of them."""


async def create(session: aiohttp.ClientSession, url: str, name: str) -> tuple[int, Any, Any]:
    """Create a category with a key of its own; return status, body and fields of the answer."""
    fields = {"Idempotency-Key": name}
    async with session.post(url + "/instrument-categories", json={"name": name}, headers=fields) as answer:
        return answer.status, await answer.json(), answer.headers


def said(headers: Any) -> tuple[str, ...]:  # noqa: ANN401 - aiohttp's own
    """Return what the proxy says of an error of its own."""
    return tuple(headers[f"X-Metquay-Proxy-{name}"] for name in ("Error", "Sent", "Attempts"))


async def test_a_lost_answer() -> None:
    """A POST whose answer was lost is executed once: 502 unknown, then 409; a lost PUT is repeated and succeeds."""
    async with (
        simulated() as sandbox,
        running(sandbox.url, time_=FastTime(20), rate_limit="off") as (_, url),
        aiohttp.ClientSession() as session,
    ):
        status, created, _ = await create(session, url, "Gauge")
        assert 201 == status
        sandbox.faults = Faults(lose_answer=1.0)
        status, _, headers = await create(session, url, "Calliper")
        assert (502, "upstream-closed", "unknown", "1") == (status, *said(headers))
        sandbox.faults = Faults()
        status, _, headers = await create(session, url, "Calliper")
        assert (409, "outcome-unknown", "unknown", "0") == (status, *said(headers))
        assert 2 == len(sandbox.writes)
        sandbox.faults = Faults(lose_answer=0.5)
        for number in range(10):
            path = f"{url}/instrument-categories/{created['metquayId']}"
            async with session.put(path, json={"name": f"Gauge {number}"}) as answer:
                assert 200 == answer.status or "3" == answer.headers["X-Metquay-Proxy-Attempts"]


async def test_the_answer_of_a_client_that_left() -> None:
    """A tool that gave up on a POST gets its answer when it asks again with the same key."""
    async with (
        simulated() as sandbox,
        running(sandbox.url, rate_limit="off") as (proxy, url),
        aiohttp.ClientSession() as session,
    ):
        sandbox.faults = Faults(latency=0.3)
        first = asyncio.ensure_future(create(session, url, "Gauge"))
        await eventually(lambda: sandbox.requests == 1)
        first.cancel()
        await eventually(lambda: not proxy.telemetry.active)
        status, created, headers = await create(session, url, "Gauge")
        assert (201, "true") == (status, headers["Idempotency-Replayed"])
        assert [created["metquayId"]] == [write["id"] for write in sandbox.writes]


@contextlib.asynccontextmanager
async def failing_once() -> AsyncIterator[tuple[int, list[tuple[bytes, int]]]]:
    """Answer POST with 201 and the first PUT with 503; yields the port, and method and size of what came whole."""
    seen: list[tuple[bytes, int]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = left = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                while left:
                    left -= len(await reader.read(min(1 << 18, left)))
                if b"/authenticate" in head:
                    status, body = b"200 OK", TOKEN
                else:
                    seen.append((head.partition(b" ")[0], size))
                    status, body = b"503 Busy" if [(b"PUT", size)] == seen[-1:] != seen[-2:-1] else b"201 Created", b""
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 19)
    async with server:
        yield server.sockets[0].getsockname()[1], seen


async def upload(port: int, begin: bytes, last: asyncio.Event) -> tuple[bytes, bytes]:
    """Send a body of ``LARGEST`` bytes, the last of which waits for an event; return status line and slug."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send() -> None:
        writer.write(b"%b\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (begin, LARGEST))
        for _ in range(LARGEST // len(PIECE) - 1):
            writer.write(PIECE)
            await writer.drain()
        writer.write(PIECE[1:])
        await last.wait()
        writer.write(PIECE[:1])

    sending = asyncio.ensure_future(send())
    head = await reader.readuntil(b"\r\n\r\n")
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    writer.close()
    return head[9:12], head.partition(b"X-Metquay-Proxy-Error: ")[2].partition(b"\r\n")[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to read a process's memory")
async def test_all_bodies_together(tmp_path: Path) -> None:
    """Of twelve that fill the 64 MiB each, one is kept and the others are refused; then all of it is free again."""
    async with failing_once() as (port, seen):
        environment = {
            "METQUAY_HOST": f"http://127.0.0.1:{port}",
            "METQUAY_ACCESS_KEY": "a",
            "METQUAY_SECRET_KEY": "s",
            "METQUAY_LISTEN": "127.0.0.1:0",
            "METQUAY_REPLAY_LIMIT": "64MiB",
        }
        with process(tmp_path, **environment) as command:
            own, last = int(command.url.rpartition(":")[2]), asyncio.Event()
            before = peak_kib(command.popen.pid)
            heads = [b"POST /x HTTP/1.1\r\nIdempotency-Key: key-%d" % number for number in range(12)]
            uploads = [asyncio.ensure_future(upload(own, head, last)) for head in heads]
            async with asyncio.timeout(20):
                while sum(uploading.done() for uploading in uploads) < 11:
                    await asyncio.sleep(0.1)
            last.set()
            answers = sorted(await asyncio.gather(*uploads))
            assert [(b"201", b""), *[(b"503", b"idempotency-full")] * 11] == answers
            grown = peak_kib(command.popen.pid) - before
            print(f"growth of the peak: {grown} KiB")  # noqa: T201 - the figure that the note quotes
            assert 224 * 1024 > grown, "kept once, joined once, and once in the buffer of the connection"
            assert (b"201", b"") == await upload(own, b"PUT /x HTTP/1.1", last), "sent again, which needs all of it"
            assert [b"POST", b"PUT", b"PUT"] == [method for method, size in seen if size == LARGEST]
            assert 0 == await asyncio.to_thread(command.stop)
