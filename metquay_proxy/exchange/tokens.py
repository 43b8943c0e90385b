"""The access token: obtained, renewed ahead of its end, and handed out to whoever needs it.

Owns the one background task that makes every login, when ``rules.renewal`` says so, and the waiting for it. Must not
know HTTP, logging or settings, nor decide anything: a ``TokenSource`` logs in, an observer is told.

Facts: asyncio's timers run on ``time.monotonic``, which stands still while Linux or macOS is suspended; so the task
looks at a clock that does not, at least every 15 s, and each use of the token is judged by that clock.

Nobody ever awaits the login itself: the task owns it, requests wait for news of it. So there is one login at a time by
construction, and a caller that leaves can cancel nothing but its own waiting.
"""

from __future__ import annotations

import asyncio
import functools
import random
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from metquay_proxy.rules.credentials import LoginFailed
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.renewal import Renewal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from metquay_proxy.rules.credentials import AccessToken
    from metquay_proxy.rules.renewal import TokenEvent, TokenState

_T = TypeVar("_T")

LOGIN_TIMEOUT: Final = 60.0
"""Seconds after which a login is given up whose source did not give up itself."""
TICK: Final = 15.0
"""Seconds after which the task looks at the clock, since the machine may have been suspended meanwhile."""


def suspend_aware_clock() -> Callable[[], float]:
    """Make a clock in seconds that never goes back and counts the time in which the machine is suspended.

    Linux has CLOCK_BOOTTIME for that; macOS counts sleep in CLOCK_MONOTONIC, though not in ``time.monotonic``; Windows
    counts it in ``time.monotonic``.
    """
    if sys.platform == "win32":
        return time.monotonic
    return functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class TokenSource(Protocol):
    """Anything that can return a token."""

    async def token(self) -> AccessToken:
        """Log in once, with the secret files read anew; raises ``LoginFailed``. Cancellation ends it at once."""


class TokenCache:
    """Keeps one usable token ready, by one background task that alone logs in.

    ``clock`` must count through suspend (``suspend_aware_clock``); ``sleep`` need not. ``random`` yields 0 <= x < 1.
    ``observer`` is called from the event loop; what it raises goes to the loop's exception handler and harms nothing.
    For one event loop, not for threads.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random.random,
        observer: Callable[[TokenEvent], None] | None = None,
    ) -> None:
        """Make an empty cache; ``start`` fills it."""
        self._source = source
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._observer = observer
        self._renewal = Renewal()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._wake = asyncio.Event()
        self._news = asyncio.Event()

    def start(self) -> None:
        """Begin to obtain and renew; needs the running loop. Does nothing when begun, or closed."""
        if not self._closed and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name="token renewal")
            # A done task's exception shows up nowhere by itself; raised in a callback it reaches the loop's handler.
            self._task.add_done_callback(lambda task: None if task.cancelled() else task.result())

    async def close(self) -> None:
        """End the task and a login under way; who waits gets 503 ``shutting-down``."""
        self._closed = True
        self._tell_waiting()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def current(self, now: float) -> AccessToken | None:
        """Return a token that is usable now, or None; the hot path. Starts an overdue renewal and waits for nothing.

        ``now`` is a reading of the cache's clock.
        """
        if now >= self._renewal.due:
            self._poke()
        token = self._renewal.token
        return token if token is not None and token.usable(now) else None

    async def get(self, max_wait: float, rejected: AccessToken | None = None, *, patient: bool = False) -> AccessToken:
        """Return a token that is usable now, and another than ``rejected``, after at most ``max_wait`` seconds.

        Waits while a login is under way, at most 5 s more once one has failed (``patient``: all the time), not when the
        keys were refused or the upstream is not trusted, or where the next login comes too late. Raises ``ProxyError``:
        ``token-unavailable``, ``credentials-rejected``, ``upstream-tls`` or ``shutting-down``.
        """
        until = self._clock() + max_wait
        self._renewal.waiting += 1
        try:
            while (token := self.current(self._clock())) is None or token == rejected:
                self._poke()
                now = self._clock()
                until = self._renewal.patience(now, until, patient=patient)
                if self._closed or not await self._within(self._news.wait(), until - now):
                    break
            else:
                return token
        finally:
            self._renewal.waiting -= 1
        if self._closed:
            raise ProxyError("shutting-down", "The proxy is shutting down. Send the request again once it is back.")
        raise self._renewal.refusal(self._clock())

    def reject(self, token: AccessToken) -> None:
        """Renew ``token``, which the API answered with 401, unless that was done; nobody waits here.

        Until there is a newer one it serves on: that one resource does not take it says little about the others.
        """
        self._renewal.reject(token)
        self._poke()

    def hasten(self) -> None:
        """End the pause after a failed login, because what it was made with has changed; at most one login a second."""
        self._renewal.hasten()
        self._poke()

    @property
    def state(self) -> TokenState:
        """The snapshot of now."""
        return self._renewal.state(self._clock())

    def _poke(self) -> None:
        self.start()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            now = self._clock()
            pause = self._renewal.next_login_in(now)
            if pause > 0:
                await self._within(self._wake.wait(), min(pause, TICK))
                continue
            self._renewal.begin(now)
            try:
                token = await self._within(self._source.token(), LOGIN_TIMEOUT)
                if token is None:
                    raise LoginFailed("Metquay's login did not finish in time.")
                event = self._renewal.obtained(self._clock(), token, self._random())
            except Exception as error:  # noqa: BLE001 - whatever a source raises is a failed login, never the task's end
                event = self._renewal.failed(self._clock(), error, self._random())
            if self._observer is not None:
                # Through the loop, so that an observer that raises is heard of there and can't end the renewals.
                asyncio.get_running_loop().call_soon(self._observer, event)
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _within(self, work: Coroutine[Any, Any, _T], seconds: float) -> _T | None:
        """Await ``work``; after ``seconds`` of the injected sleep it is cancelled, and None.

        Work that was cancelled from elsewhere counts as out of time: it must not look like our own cancellation.
        """
        task = asyncio.ensure_future(work)
        timer = asyncio.ensure_future(self._sleep(seconds))
        try:
            await asyncio.wait((task, timer), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() and not task.cancelled() else None
        finally:
            task.cancel()
            timer.cancel()
            await asyncio.gather(task, timer, return_exceptions=True)
