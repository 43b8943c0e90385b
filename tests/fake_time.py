"""Time that moves only when a test says so: a clock, a sleep that obeys it, and a way to let the tasks catch up.

For one event loop, of any kind. It drives what awaits ``sleep``; it can't see sockets, so that a test with real
connections must await their answers itself.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from typing import Any, Final

CALM: Final = 16
"""Turns of the loop in which nobody looks at the clock, after which all are at rest: no chain of wake-ups takes more
than 6 from one look to the next."""


class FakeTime:
    """``now`` and ``sleep`` go into the code under test, the other methods into the test."""

    def __init__(self, start: float = 1000.0) -> None:
        """Begin at ``start`` seconds."""
        self._awake = 0.0
        self._offset = start
        self._looks = 0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> float:
        """Read the clock, in seconds."""
        self._looks += 1
        return self._awake + self._offset

    async def sleep(self, seconds: float) -> None:
        """Wait until the test has advanced by ``seconds``; as ``asyncio.sleep``, yield once where there are none."""
        self._looks += 1
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        alarm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._awake + seconds, next(self._order), alarm))
        await alarm

    async def settle(self) -> None:
        """Let every task run until all of them wait for something; fails when they never come to rest."""
        calm = 0
        for _ in range(10_000):
            looks = self._looks
            await asyncio.sleep(0)
            calm = calm + 1 if looks == self._looks else 0
            if calm == CALM:
                return
        msg = "the tasks never come to rest"
        raise AssertionError(msg)

    async def advance(self, seconds: float) -> None:
        """Move time on, waking each sleeper at its own moment and letting what it wakes settle before the next one."""
        target = self._awake + seconds
        await self.settle()
        while await self._wake(target):
            pass
        self._awake = target
        await self.settle()

    async def finish(self, task: asyncio.Future[Any], within: float = 100.0) -> None:
        """Move time on until ``task`` is done, from one sleeper to the next; fails where that takes too long."""
        latest = self._awake + within
        await self.settle()
        while not task.done():
            assert await self._wake(latest), "it never ends"

    async def suspend(self, seconds: float) -> None:
        """Put the machine to sleep: the clock moves on, timers don't."""
        self.jump(seconds)
        await self.settle()

    def jump(self, seconds: float) -> None:
        """Set the clock forward, or back where negative; no task runs."""
        self._offset += seconds

    async def _wake(self, latest: float) -> bool:
        """Wake the next sleeper, unless it sleeps beyond ``latest``; False where there is none."""
        while self._sleepers and self._sleepers[0][0] <= latest:
            due, _, alarm = heapq.heappop(self._sleepers)
            if not alarm.done():
                self._awake = max(self._awake, due)
                alarm.set_result(None)
                await self.settle()
                return True
        return False
