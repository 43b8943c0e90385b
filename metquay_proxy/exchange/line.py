"""The line in which requests wait for their turn.

Owns the sleeping that the quota's arithmetic asks for, and nothing else: must not know what a request is. One seam to
the quota, so that a quota which others share can take the place of the one in memory.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from metquay_proxy.rules.quota import QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from metquay_proxy.replicas.share import Share
    from metquay_proxy.rules.quota import Quota, Snapshot, Ticket

    CallLater = Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None


_ANY_PACE: Final = 86_400.0
"""Seconds that are always enough; Redis's scripts take no infinite number."""


class Line:
    """Lets requests wait for their turn: the quota decides, this sleeps. ``ask`` is the quota's own."""

    def __init__(self, quota: Quota | Share, clock: Callable[[], float], call_later: CallLater = None) -> None:
        """``call_later`` takes seconds on ``clock`` and a callback; the running loop's by default."""
        self._quota = quota
        self._clock = clock
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._timer: asyncio.TimerHandle | None = None
        self.ask: Final = quota.ask

    async def wait(self, ticket: Ticket) -> float:
        """Wait until the ticket is granted; raise ``QuotaExceeded`` where that came to be too late.

        Returns how many of the seconds do not count as waiting: none.
        """
        turn = asyncio.get_running_loop().create_future()
        ticket.on_settled = lambda: None if turn.done() else turn.set_result(None)
        self.poll()
        if ticket.state == "waiting":  # it may have been settled since it was asked for
            await turn
        if ticket.refused is not None:
            raise ticket.refused
        return 0.0

    def settle(self, ticket: Ticket, now: float) -> None:
        """Say that the answer's head has come, or that the attempt failed; what was not sent comes back."""
        if ticket.state == "sent":
            self._quota.answered(ticket, now)
            if self._timer is None:
                return
        else:
            self._quota.cancel(ticket, now)
        self.poll()

    def close(self, seconds: float | None) -> None:
        """Close the window because Metquay refused: for ``seconds``, or until it refills."""
        self._quota.close(self._clock(), seconds)
        self.poll()

    def snapshot(self) -> Snapshot:
        """Return the quota's figures."""
        return self._quota.snapshot(self._clock())

    def poll(self) -> None:
        """Settle what can be settled now, and see to it that this is done again when it is time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        at = self._quota.poll(now)
        if at is not None:
            self._timer = self._call_later(max(0.0, at - now), self.poll)


class PacedLine:
    """The same line for the pages of whole lists: what they wait for the quota's pace does not count.

    Only where Metquay itself takes nothing for a while, they wait no longer than others.
    """

    def __init__(self, line: Line, clock: Callable[[], float]) -> None:
        self._line = line
        self._clock = clock
        self.settle: Final = line.settle
        self.close: Final = line.close
        self.snapshot: Final = line.snapshot

    def ask(self, now: float, caller: str, max_wait: float) -> Ticket:
        """Take a slot, or a place in the queue; raise ``QuotaExceeded`` where the window is closed for too long."""
        if (closed_for := self.snapshot().closed_for) > (patience := max(0.0, max_wait)):
            raise QuotaExceeded(closed_for)
        ticket = self._line.ask(now, caller, _ANY_PACE)
        ticket.patience = patience
        return ticket

    async def wait(self, ticket: Ticket) -> float:
        """Wait as in the line; return the seconds for which the window was open at first."""
        opens = self._clock() + self.snapshot().closed_for
        await self._line.wait(ticket)
        return max(0.0, self._clock() - opens)
