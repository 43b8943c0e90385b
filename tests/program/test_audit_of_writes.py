"""The audit log of a running proxy."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from metquay_proxy.sandbox.server import Faults, Sandbox
from tests.running import running
from tests.wire import eventually

if sys.platform == "linux":
    import fcntl

KEYS = "workbook:workbook-key-0123456789,reader:reader-key-0123456789:read-only"


async def test_each_write_leaves_one_line(tmp_path: Path, sandbox: Sandbox) -> None:
    """Who wrote what, with which outcome, and never a body, a key or a query value; reads leave nothing."""
    path = tmp_path / "audit.log"
    async with (
        running(sandbox.url, audit_log=str(path), client_keys=KEYS, rate_limit="off") as (_, url),
        aiohttp.ClientSession(headers={"X-Proxy-Key": "workbook-key-0123456789", "User-Agent": "x" * 300}) as session,
    ):

        async def ask(method: str, target: str, body: str | None = None) -> int:
            async with session.request(method, url + target, data=body) as response:
                return response.status

        assert 200 == await ask("GET", "/customers?limit=1")
        assert 201 == await ask("POST", "/customers?x=hidden", '{"companyName": "Private Ltd"}')
        assert 404 == await ask("DELETE", "/customers/1")
        assert 200 == await ask("GET", "/-/status")
        sandbox.faults = Faults(lose_answer=1.0)
        assert 502 == await ask("POST", "/customers", '{"companyName": "Lost Ltd"}')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [
        ("workbook", "POST", "/api/v1/customers?x=*", 201, None, "yes"),
        ("workbook", "DELETE", "/api/v1/customers/1", 404, None, "yes"),
        ("workbook", "POST", "/api/v1/customers", 502, "upstream-closed", "unknown"),
    ] == [tuple(line[name] for name in ("client", "method", "path", "status", "error", "sent")) for line in lines]
    assert {"time", "id"} <= set(lines[0])
    assert [("x" * 200, None)] * 3 == [(line["user_agent"], line["address"]) for line in lines]
    text = path.read_text()
    for hidden in ("hidden", "Private", "Lost", "workbook-key"):
        assert hidden not in text


@pytest.mark.skipif(sys.platform == "win32", reason="an open file can't be renamed on Windows")
async def test_a_rotation_that_is_told_of(tmp_path: Path) -> None:
    """Whoever moves the file away and says so finds a new one there, before the next write."""
    path = tmp_path / "audit.log"
    async with running("http://127.0.0.1:9", audit_log=str(path)) as (proxy, _):
        path.rename(tmp_path / "audit.log.1")
        await proxy.reload()
        await eventually(path.exists)


async def test_a_write_whose_client_left_is_recorded(tmp_path: Path, sandbox: Sandbox) -> None:
    """A tool that gives up does not make the outcome of its write unknowable."""
    path = tmp_path / "audit.log"
    async with running(sandbox.url, audit_log=str(path)) as (proxy, url), aiohttp.ClientSession() as session:
        async with session.get(url + "/customers?limit=1") as response:
            assert 200 == response.status
        sandbox.faults = Faults(latency=0.3)
        impatient = aiohttp.ClientTimeout(total=0.1)
        try:
            await session.post(url + "/customers", data='{"companyName": "Patience Ltd"}', timeout=impatient)
        except TimeoutError:
            pass
        else:
            raise AssertionError
        async with asyncio.timeout(5):
            while proxy.telemetry.active:
                await asyncio.sleep(0.01)
        assert 1 == len(sandbox.writes)
    [line] = path.read_text().splitlines()
    assert ("POST", 201, "client-left", "yes") == tuple(
        json.loads(line)[name] for name in ("method", "status", "error", "sent")
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
@pytest.mark.slow
def test_a_log_that_can_not_be_written_keeps_the_proxy_from_starting(tmp_path: Path) -> None:
    """It ends with 2, before anything listens, and says why in one line: unaudited writes are worse than none."""
    os.mkfifo(tmp_path / "pipe")
    for path, why in (("pipe", "nobody reads from this pipe; start its reader first"), (".", "Is a directory")):
        ended = subprocess.run(
            [sys.executable, "-m", "metquay_proxy", "serve", "--sandbox"],
            cwd=tmp_path,
            env=os.environ
            | {
                "METQUAY_AUDIT_LOG": path,
                "METQUAY_LISTEN": "127.0.0.1:0",
                "PYTHONPATH": str(Path(__file__).parent.parent.parent),
            },
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert (2, "") == (ended.returncode, ended.stdout)
        assert f"METQUAY_AUDIT_LOG (--audit-log): cannot write {path}: {why}\n" == ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has pipes of a given size")
async def test_no_request_waits_for_a_reader_that_reads_nothing(tmp_path: Path, sandbox: Sandbox) -> None:
    """Writes are answered while the log's pipe is full; each has its line once somebody reads on, nothing is lost."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 4096)
    got = b""
    async with (
        running(sandbox.url, audit_log=str(path), rate_limit="off") as (proxy, url),
        aiohttp.ClientSession() as session,
    ):
        for _ in range(100):
            async with session.delete(url + "/customers/1") as response:
                assert 404 == response.status
        assert 0 < proxy.status()["audit"]["waiting"]
        while got.count(b"\n") < 100:
            try:
                got += os.read(reading, 65536)
            except BlockingIOError:
                await asyncio.sleep(0.001)
        assert 0 == proxy.status()["audit"]["lost"]
    os.close(reading)
