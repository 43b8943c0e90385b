"""The main job, end to end on real sockets: any request reaches Metquay with a live token."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from typing import TYPE_CHECKING

import aiohttp
import pytest
import trustme

from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults
from tests.running import FastTime, process, running, simulated
from tests.wire import eventually
from tests.working_day import work

if TYPE_CHECKING:
    from pathlib import Path

SEEN_ON_A_GOOD_DAY = {200, 201, 409}


@pytest.mark.slow
async def test_working_day() -> None:
    """A tool that knows no tokens works all day through at least five renewals, sees no 401 and never waits."""
    quick = FastTime(40)
    async with (
        simulated(token_lifetime=60, clock=quick.now, sleep=quick.sleep) as sandbox,
        running(sandbox.url, time_=quick, rate_limit="off") as (proxy, url),
    ):
        waited = []
        closed = proxy.telemetry.closed
        proxy.telemetry.closed = lambda exchange: (waited.append(exchange.waited), closed(exchange))  # type: ignore[method-assign,assignment]
        await eventually(proxy.ready)
        statuses = await work(url, lambda: sandbox.logins > 5)
        assert set(statuses) <= SEEN_ON_A_GOOD_DAY
        assert 6 <= sandbox.logins
        assert 0 == sandbox.refused_401
        assert 0.0 == max(waited)


@pytest.mark.slow
async def test_working_day_over_tls(tmp_path: Path) -> None:
    """The same day in a process of its own against a TLS upstream whose CA is METQUAY_CA_BUNDLE."""
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    bundle = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(bundle))
    async with simulated(token_lifetime=3, ssl_context=context) as sandbox:
        environment = {
            "METQUAY_HOST": f"https://localhost:{sandbox.port}",
            "METQUAY_ACCESS_KEY": ACCESS_KEY,
            "METQUAY_SECRET_KEY": SECRET_KEY,
            "METQUAY_CA_BUNDLE": str(bundle),
            "METQUAY_RATE_LIMIT": "off",
            "METQUAY_LISTEN": "127.0.0.1:0",
        }
        with process(tmp_path, "serve", **environment) as command:
            statuses = await work(command.url + "/api/v1", lambda: sandbox.logins > 5)
            assert 0 == await asyncio.to_thread(command.stop)
        assert set(statuses) <= SEEN_ON_A_GOOD_DAY
        assert 0 == sandbox.refused_401
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in command.output


async def test_cold_start_makes_one_login() -> None:
    """200 concurrent requests against a cold proxy cause exactly one login, and all succeed."""
    async with simulated(faults=Faults(latency=0.05)) as sandbox, running(sandbox.url, rate_limit="off") as (_, url):
        assert Counter({200: 200}) == Counter(await _get_many(url, 200))
        assert 1 == sandbox.logins


@pytest.mark.slow
async def test_expired_token_makes_one_renewal() -> None:
    """100 concurrent 401s cause exactly one renewal, and no tool sees one."""
    slow = Faults(latency=0.02)
    async with simulated(faults=slow) as sandbox, running(sandbox.url, rate_limit="off") as (proxy, url):
        await eventually(proxy.ready)
        await asyncio.sleep(1.0 - 0.02)  # the cache makes at most one login a second
        sandbox.faults = Faults(latency=0.02, expire_tokens=True)
        assert Counter({200: 100}) == Counter(await _get_many(url, 100))
        assert 2 == sandbox.logins
        assert 100 >= sandbox.refused_401 > 0


async def test_renewal_outlives_its_first_caller() -> None:
    """A renewal whose first caller disconnects still serves the others."""
    async with simulated(faults=Faults(latency=0.2)) as sandbox, running(sandbox.url, rate_limit="off") as (_, url):
        async with aiohttp.ClientSession() as session:
            first = asyncio.ensure_future(session.get(url + "/customers?limit=1"))
            await asyncio.sleep(0.05)
            others = asyncio.ensure_future(_get_many(url, 5))
            await asyncio.sleep(0.05)
            first.cancel()
            assert [200] * 5 == await others
        assert 1 == sandbox.logins


async def test_sdk_login_is_answered_here() -> None:
    """POST /authenticate, in both forms, gives a placeholder; a request with it reaches Metquay with the real token."""
    async with (
        simulated() as sandbox,
        running(sandbox.url, rate_limit="off") as (_, url),
        aiohttp.ClientSession() as session,
    ):
        for path in ("/authenticate", "/api/v1/authenticate", "/api/v1//authenticate"):
            async with session.post(url + path, json={"accessKey": "any", "secretKey": "any"}) as response:
                login = await response.json()
            assert {"accessToken", "tokenType", "expiresIn"} == set(login)
            headers = {"Authorization": f"Bearer {login['accessToken']}"}
            async with session.get(url + "/api/v1//customers?limit=1", headers=headers) as response:
                assert 200 == response.status
        assert 1 == sandbox.logins


async def _get_many(url: str, count: int) -> list[int]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def get() -> int:
            async with session.get(url + "/customers?limit=1") as response:
                await response.read()
                return response.status

        return await asyncio.gather(*(get() for _ in range(count)))
