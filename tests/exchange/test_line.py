"""The quota as tools feel it: the whole program on real sockets before a simulated Metquay that counts."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import string
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

import aiohttp
import pytest

from metquay_proxy.exchange.line import Line, PacedLine
from metquay_proxy.rules.quota import Quota, QuotaExceeded
from metquay_proxy.sandbox.server import Faults, Sandbox
from tests.fake_time import FakeTime
from tests.running import FastTime, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

T = TypeVar("T")

PACE = 60.06 / 31
"""The slowest pace at 100/minute, in seconds: a burst of 70, then 30 slots until the first comes back."""
LATENCY = 0.05
"""Seconds that the simulated Metquay takes for each answer."""


def _calls() -> int:
    return sum(thread.name == "call" for thread in threading.enumerate())


class SocketTime(FakeTime):
    """Time that moves only while nothing else does: tools, proxy and simulator share this loop, over real sockets."""

    async def settle(self) -> None:
        """Let all that is under way on the loopback, or in a thread (keys are read in one), come to rest."""
        busy = True
        while busy:
            looks = self._looks
            await super().settle()
            began = time.monotonic()
            while time.monotonic() < began + 0.002:  # uvloop's timers may ring early
                await asyncio.sleep(0.001)
            calls = _calls()
            await super().settle()
            busy = looks != self._looks or calls + _calls() > 0

    def call_later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call back after so many seconds of this clock."""

        async def ring() -> None:
            await self.sleep(seconds)
            callback()

        return cast("asyncio.TimerHandle", asyncio.ensure_future(ring()))

    async def until(self, work: Coroutine[Any, Any, T]) -> T:
        """Move time on, from one sleeper to the next, until ``work`` is done."""
        task = asyncio.ensure_future(work)
        while True:
            await self.settle()
            if task.done():
                return task.result()
            due, _, alarm = heapq.heappop(self._sleepers)
            if not alarm.done():
                self._awake = max(self._awake, due)
                alarm.set_result(None)


@dataclass
class Seen:
    """One answer as its tool saw it; times in seconds."""

    status: int
    took: float
    retry_after: int | None


@dataclass
class Laboratory:
    """A proxy before a simulated Metquay, and the time that both live in."""

    time: SocketTime
    sandbox: Sandbox
    url: str

    @contextlib.asynccontextmanager
    async def tool(
        self, name: str | Callable[[], str], path: str = "/customers?limit=1", **fields: str
    ) -> AsyncIterator[Callable[[], Coroutine[Any, Any, Seen]]]:
        """Yield what makes one request of the tool of that name, which may be another one each time."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def get() -> Seen:
                began = self.time.now()
                headers = {"User-Agent": name if isinstance(name, str) else name(), **fields}
                async with session.get(self.url + path, headers=headers) as answer:
                    await answer.read()
                    retry_after = answer.headers.get("Retry-After")
                    took = self.time.now() - began
                    return Seen(answer.status, took, None if retry_after is None else int(retry_after))

            yield get


@contextlib.asynccontextmanager
async def laboratory(rate: str, limit: tuple[int, float]) -> AsyncIterator[Laboratory]:
    """Run both with the same quota."""
    time = SocketTime()
    sandbox = Sandbox(rate_limit=limit, clock=time.now, sleep=time.sleep, faults=Faults(latency=LATENCY))
    await sandbox.start()
    try:
        async with running(sandbox.url, time_=cast("FastTime", time), rate_limit=rate) as (proxy, url):
            while not proxy.ready():
                await time.advance(LATENCY)
            yield Laboratory(time, sandbox, url)
            assert 0 == sandbox.refused_429, "Metquay never had to refuse"
    finally:
        await sandbox.stop()


@pytest.mark.slow
async def test_three_hundred_at_once_at_twenty_a_second() -> None:
    """Three tools that ask for 300 records at once get them all, in the time that the quota needs for them."""
    async with (
        laboratory("20/second", (20, 1.0)) as lab,
        lab.tool("one") as one,
        lab.tool("two") as two,
        lab.tool("three") as three,
    ):
        began = lab.time.now()
        seen = await lab.time.until(_all(get() for _ in range(100) for get in (one, two, three)))
        assert Counter({200: 300}) == Counter(answer.status for answer in seen)
        assert 300 == lab.sandbox.requests
        bound = (300 - 20) / 20 * (1 + LATENCY)
        assert bound <= lab.time.now() - began <= 1.1 * bound


@pytest.mark.slow
async def test_a_sequential_tool() -> None:
    """A tool that makes 250 requests one after the other at 100/minute waits less than 3 s for each, never refused."""
    async with laboratory("100/minute", (100, 60.0)) as lab, lab.tool("a script") as get:
        began = lab.time.now()
        seen = await lab.time.until(_one_after_the_other(get, 250))
        assert Counter({200: 250}) == Counter(answer.status for answer in seen)
        assert 1.0 < max(answer.took for answer in seen) < 3.0
        assert lab.time.now() - began < 250 / 100 * 60 * 1.01


@pytest.mark.slow
async def test_eight_sequential_tools() -> None:
    """Eight tools that work at once at 100/minute wait less than 20 s for each answer, and none is refused."""
    async with laboratory("100/minute", (100, 60.0)) as lab, contextlib.AsyncExitStack() as stack:
        tools = [await stack.enter_async_context(lab.tool(f"tool {letter}")) for letter in "abcdefgh"]
        seen = await lab.time.until(_all(_one_after_the_other(get, 25) for get in tools))
        assert Counter({200: 200}) == Counter(answer.status for answers in seen for answer in answers)
        assert max(answer.took for answers in seen for answer in answers) < 20.0


@pytest.mark.slow
async def test_more_than_can_wait() -> None:
    """Of 300 at once at 100/minute, those beyond MAX_WAIT are refused at once, and told when one will be served."""
    async with laboratory("100/minute", (100, 60.0)) as lab, lab.tool("a flood") as get:
        began = lab.time.now()
        seen = await lab.time.until(_all(get() for _ in range(300)))
        assert lab.time.now() - began < 20 + LATENCY
        served = [answer for answer in seen if answer.status == 200]
        refused = [answer for answer in seen if answer.status == 429]
        assert 300 == len(served) + len(refused)
        assert 70 + int(20 / PACE) == len(served) == lab.sandbox.requests
        assert {0.0} == {answer.took for answer in refused}
        waits = {answer.retry_after for answer in refused}
        assert len(waits) == 1, "all were refused at the same moment"
        wait = waits.pop()
        assert wait is not None
        await lab.time.advance(began + wait - lab.time.now())
        again = await lab.time.until(get())
        assert (200, LATENCY) == (again.status, round(again.took, 6))


NUMBERS = count(100)
GREEDY = {
    "with a name": lambda: "greedy",
    "with numbers": lambda: f"x-{next(NUMBERS)}/1.0",
    "with letters": lambda: "".join(random.choices(string.ascii_letters, k=12)),  # noqa: S311 - a choice, not a secret
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=how, marks=[] if how == "with numbers" else [pytest.mark.slow])
        for how, name in GREEDY.items()
    ],
)
@pytest.mark.slow
async def test_a_slow_tool_beside_a_greedy_one(name: Callable[[], str]) -> None:
    """A tool waits for one turn of a greedy one that came later at most, though that has a new name each time."""
    async with (
        laboratory("100/minute", (100, 60.0)) as lab,
        lab.tool(name) as greedy,
        lab.tool("slow") as slow,
    ):
        await lab.time.until(slow())

        async def grab() -> None:
            while True:
                answer = await greedy()
                if answer.retry_after is not None:
                    await lab.time.sleep(answer.retry_after)

        grabbing = [asyncio.ensure_future(grab()) for _ in range(100)]
        await lab.time.advance(1.0)
        seen = await lab.time.until(_one_after_the_other(slow, 6, think=lambda: lab.time.sleep(7.0)))
        for task in grabbing:
            task.cancel()
        await asyncio.gather(*grabbing, return_exceptions=True)
        assert Counter({200: 6}) == Counter(answer.status for answer in seen)
        assert max(answer.took for answer in seen) <= 2 * PACE + LATENCY


@pytest.mark.parametrize(
    ("prefer", "refused"),
    [
        ({"Prefer": "wait=120"}, False),
        pytest.param({}, True, marks=pytest.mark.slow),
        ({"Prefer": "wait=5"}, True),
    ],
)
@pytest.mark.slow
async def test_tools_that_say_how_long_they_wait(prefer: dict[str, str], *, refused: bool) -> None:
    """150 requests of three tools, twelve at a time, all get through where they say that they wait; else some don't."""
    async with laboratory("100/minute", (100, 60.0)) as lab, contextlib.AsyncExitStack() as stack:
        tools = [await stack.enter_async_context(lab.tool(name, **prefer)) for name in ("one", "two", "three")]
        began = lab.time.now()
        seen = await lab.time.until(_all(_one_after_the_other(get, n) for get in tools for n in (13, 13, 12, 12)))
        statuses = Counter(answer.status for answers in seen for answer in answers)
        assert refused == (429 in statuses)
        if not refused:
            assert Counter({200: 150}) == statuses
            assert lab.time.now() - began <= 95.0


@pytest.mark.slow
async def test_whole_lists_beside_a_sequential_tool() -> None:
    """The pages of lists wait their turn as long as it takes, and cost a sequential tool at most 2 s more a turn."""
    async with (
        laboratory("100/minute", (100, 60.0)) as lab,
        lab.tool("a report", "/-/lists/customers.csv") as report,
        lab.tool("a script") as script,
    ):

        async def lists() -> list[Seen]:
            return await _one_after_the_other(report, 50)

        listing = asyncio.ensure_future(lists())
        seen = await lab.time.until(_one_after_the_other(script, 60))
        answers = await lab.time.until(listing)
        assert Counter({200: 60}) == Counter(answer.status for answer in seen)
        assert Counter({200: 50}) == Counter(answer.status for answer in answers)
        assert lab.sandbox.requests == 60 + 3 * 50
        assert max(answer.took for answer in seen) < 3.0 + 2.0


async def test_a_list_waits_longer_than_any_other() -> None:
    """Where the quota's pace alone keeps a page waiting, it waits beyond METQUAY_MAX_WAIT, and the list comes whole."""
    async with laboratory("2/minute", (2, 60.0)) as lab, lab.tool("a report", "/-/lists/works.json") as report:
        one, two = await lab.time.until(_all([report(), report()]))
        assert (200, 200) == (one.status, two.status)
        assert max(one.took, two.took) > 20.0


async def _all(work: Any) -> list[Any]:  # noqa: ANN401 - any coroutines
    return await asyncio.gather(*work)


async def _one_after_the_other(
    get: Callable[[], Coroutine[Any, Any, Seen]],
    count: int,
    think: Callable[[], Coroutine[Any, Any, None]] = lambda: asyncio.sleep(0),
) -> list[Seen]:
    seen = []
    for _ in range(count):
        seen.append(await get())
        await think()
    return seen


async def test_a_page_that_has_no_time_left() -> None:
    """It gets its slot all the same where the window is open: a 401 may have taken all its time before."""
    time_ = FakeTime()
    paced = PacedLine(Line(Quota(1, 60.0), time_.now), time_.now)
    assert "granted" == paced.ask(time_.now(), "a", -0.3).state
    paced.close(20.0)
    with pytest.raises(QuotaExceeded):
        paced.ask(time_.now(), "a", -0.3)
