"""Several replicas, each a process of its own, with one quota and one set of records in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from metquay_proxy.sandbox import ACCESS_KEY, SECRET_KEY, Faults, Sandbox
from tests.redis_server import needs_redis, redis_server
from tests.running import process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.redis_server import RedisServer

pytestmark = [pytest.mark.slow, needs_redis]

REPLICAS = 5
LIMIT = 50
WINDOW = 1.0
HEALED = 5.0
"""Seconds in which all replicas share again once Redis is back."""


class Team:
    """Replicas with one key pair before one simulated Metquay."""

    def __init__(self, metquay: Sandbox, redis: RedisServer, urls: list[str], session: aiohttp.ClientSession) -> None:
        self.metquay = metquay
        self.redis = redis
        self.urls = urls
        self._session = session

    async def get(self, number: int) -> int:
        """Read a list through one replica; return the status."""
        async with self._session.get(self.urls[number % REPLICAS] + "/customers") as response:
            await response.read()
            return response.status

    async def post(self, number: int, key: str, name: str) -> tuple[int, bytes]:
        """Create a customer through one replica, with an Idempotency-Key."""
        url, headers = self.urls[number % REPLICAS] + "/customers", {"Idempotency-Key": key}
        async with self._session.post(url, json={"companyName": name}, headers=headers) as response:
            return response.status, await response.read()

    async def status(self, number: int) -> dict[str, Any]:
        """Return what one replica says of itself and the others."""
        async with self._session.get(self.urls[number] + "/-/status") as response:
            told: dict[str, Any] = (await response.json())["redis"]
            return told

    async def until(self, seconds: float, **wanted: object) -> float:
        """Wait until all replicas say what is ``wanted``; return after how many seconds. Fail after ``seconds``."""
        began = time.monotonic()
        while True:
            told = [await self.status(number) for number in range(REPLICAS)]
            if all(wanted.items() <= one.items() for one in told):
                return time.monotonic() - began
            assert time.monotonic() - began < seconds, told
            await asyncio.sleep(0.05)

    async def read_for(self, seconds: float) -> Counter[int]:
        """Let one tool at each replica read without pause; return how often each status came."""
        until, statuses = time.monotonic() + seconds, Counter[int]()

        async def tool(number: int) -> None:
            while time.monotonic() < until:
                statuses[await self.get(number)] += 1

        await asyncio.gather(*(tool(number) for number in range(REPLICAS)))
        return statuses


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Yield a Redis of the test's own."""
    with redis_server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def team(tmp_path: Path, redis: RedisServer) -> AsyncIterator[Team]:
    """Yield five replicas that know of each other."""
    metquay = Sandbox(rate_limit=(LIMIT, WINDOW), faults=Faults(latency=0.02))
    await metquay.start()
    environment = {
        "METQUAY_HOST": metquay.url,
        "METQUAY_ACCESS_KEY": ACCESS_KEY,
        "METQUAY_SECRET_KEY": SECRET_KEY,
        "METQUAY_LISTEN": "127.0.0.1:0",
        "METQUAY_RATE_LIMIT": f"{LIMIT}/second",
        "METQUAY_REDIS_URL": redis.url,
    }
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(metquay.stop)
        urls = []
        for number in range(REPLICAS):
            folder = tmp_path / f"replica-{number}"
            folder.mkdir()
            started = process(folder, "serve", **environment)
            replica = await asyncio.to_thread(started.__enter__)
            stack.push(started.__exit__)
            urls.append(replica.url)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        found = Team(metquay, redis, urls, session)
        await found.until(10, shared=True, replicas=REPLICAS)
        yield found


async def test_five_replicas_use_one_quota_and_use_it_up(team: Team) -> None:
    """500 requests through five processes: Metquay refuses none, and they take no longer than the quota makes them."""
    began = time.monotonic()
    statuses = Counter(await asyncio.gather(*(team.get(number) for number in range(500))))
    took = time.monotonic() - began
    assert {200: 500} == statuses
    assert 0 == team.metquay.refused_429
    assert took <= 1.1 * 500 / LIMIT * WINDOW


async def test_an_idempotency_key_executes_once_whichever_replica_it_reaches(team: Team) -> None:
    """A key raced on five replicas, 200 times: one execution each; who asks again gets the one answer."""
    team.metquay.rate_limit = None
    for turn in range(200):
        key, name = f"key-{turn}", f"customer {turn}"
        raced = await asyncio.gather(*(team.post(number, key, name) for number in range(REPLICAS)))
        assert {status for status, _ in raced} <= {200, 201, 409}
        again = {await team.post(number, key, name) for number in range(REPLICAS)}
        assert 1 == len(again)
        assert again == {answer for answer in raced if answer[0] != 409}
    assert 200 == len(team.metquay.writes)


@pytest.mark.parametrize("fault", ["killed", "frozen", "flushed"])
async def test_no_request_fails_because_of_redis(team: Team, fault: str) -> None:
    """Redis dies, hangs or forgets while tools work: each is answered, Metquay refuses none, and all share again."""
    reading = asyncio.create_task(team.read_for(8.0))
    await asyncio.sleep(1.0)
    if fault == "killed":
        team.redis.kill()
    elif fault == "frozen":
        team.redis.freeze()
    else:
        team.redis.run("FLUSHALL")
    if fault != "flushed":
        await team.until(3.0, shared=False, share=LIMIT // REPLICAS)
        await asyncio.sleep(1.0)
    if fault == "killed":
        team.redis.start()
    elif fault == "frozen":
        team.redis.thaw()
    await team.until(HEALED, shared=True, replicas=REPLICAS)
    statuses = await reading
    assert {200} == set(statuses)
    assert 0 == team.metquay.refused_429
