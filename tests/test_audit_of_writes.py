"""The audit log of a running proxy."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import aiohttp

from metquay_proxy.sandbox import Faults, Sandbox
from tests.running import running

if TYPE_CHECKING:
    from pathlib import Path

KEYS = "workbook:workbook-key-0123456789,reader:reader-key-0123456789:read-only"


async def test_each_write_leaves_one_line(tmp_path: Path) -> None:
    """Who wrote what, with which outcome, and never a body, a key or a query value; reads leave nothing."""
    path = tmp_path / "audit.log"
    sandbox = Sandbox(rate_limit=None)
    await sandbox.start()
    async with (
        running(sandbox.url, audit_log=str(path), client_keys=KEYS, rate_limit="off") as (_, url),
        aiohttp.ClientSession(headers={"X-Proxy-Key": "workbook-key-0123456789"}) as session,
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
    await sandbox.stop()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [
        ("workbook", "POST", "/api/v1/customers?x=*", 201, None, "yes"),
        ("workbook", "DELETE", "/api/v1/customers/1", 404, None, "yes"),
        ("workbook", "POST", "/api/v1/customers", 502, "upstream-closed", "unknown"),
    ] == [tuple(line[name] for name in ("client", "method", "path", "status", "error", "sent")) for line in lines]
    assert {"time", "id"} <= set(lines[0])
    text = path.read_text()
    for hidden in ("hidden", "Private", "Lost", "workbook-key"):
        assert hidden not in text


async def test_a_write_whose_client_left_is_recorded(tmp_path: Path) -> None:
    """A tool that gives up does not make the outcome of its write unknowable."""
    path = tmp_path / "audit.log"
    sandbox = Sandbox(rate_limit=None)
    await sandbox.start()
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
    await sandbox.stop()
    [line] = path.read_text().splitlines()
    assert ("POST", 201, "client-left", "yes") == tuple(
        json.loads(line)[name] for name in ("method", "status", "error", "sent")
    )
