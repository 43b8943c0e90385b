"""A POST with an Idempotency-Key is executed once, whatever gets lost on the way."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from metquay_proxy.sandbox.server import Faults
from tests.program.test_main_job import simulated
from tests.running import FastTime, running
from tests.wire import eventually


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
