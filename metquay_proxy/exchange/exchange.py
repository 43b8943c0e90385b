"""One request and its answer, as they are carried through the house.

Owns what is known of an exchange, from its judged head to the last byte of its answer. Must not decide anything about
it: whoever decides notes it here.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Final, Literal

from metquay_proxy.exchange.body import Stream
from metquay_proxy.rules.gate import Admission
from metquay_proxy.rules.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from metquay_proxy.exchange.body import RequestBody
    from metquay_proxy.rules.errors import Sent
    from metquay_proxy.rules.headers import RequestFields, ResponseHead

_CERTAINTY: Final[dict[Sent, int]] = {"no": 0, "unknown": 1, "yes": 2}
_LONGEST_RESOURCE: Final = 1024
_RUN: Final = os.urandom(4).hex()
_NUMBERS: Final = count(1)
_NOBODY: Final = Admission()
_NOWHERE: Final = Target("-", "-", None)


def _next_id() -> str:
    return f"{_RUN}{next(_NUMBERS):08x}"


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class Exchange:
    """One request and its answer, from the judged head to the last byte. Durations are in seconds."""

    method: str
    path: str = "-"
    """A dash until the canonical target is known: a refused one may hold anything."""
    id: str = field(default_factory=_next_id)
    began: float = field(default_factory=time.perf_counter)
    target: Target = _NOWHERE
    """What is asked for, once that is known to be allowed."""
    fields: RequestFields = field(init=False)
    body: RequestBody = field(init=False)
    keep: bool = False
    """Whether the client's connection may stay after the answer."""

    admission: Admission = _NOBODY
    """What the gate found out: who asks, and whether that one may only read."""
    agent: str = ""
    """Its User-Agent, shortened."""
    caller: str = ""
    """Whom it waits in line with: the name of the key, else what the tool calls itself."""
    address: str | None = None
    """Where it came from, if from another machine."""
    keep_authorization: bool = False
    """Whether the client's own Authorization is passed on, in place of a token."""
    cors: tuple[tuple[str, str], ...] = ()
    """The fields that let a listed web page read the answer."""
    quiet: bool = False
    """Asked for all the time by machines, or by a browser by itself."""

    attempts: int = 0
    sent: Sent = "no"
    """Whether an earlier attempt could have been executed."""
    waited: float = 0.0
    """For token and quota, and backing off."""
    upstream: float = 0.0
    """From sending to the answer's head, over all attempts."""
    client_left: bool = False
    """The client has left, and the request goes on without it."""

    status: int = 0
    answered_by: Literal["metquay", "proxy"] = "proxy"
    replayed: bool = False
    """Answered from the record of an earlier request with the same Idempotency-Key: this one was not sent."""
    hide_challenge: bool = False
    """The tool must not ask a person for a password that nobody has."""
    note: str | None = None
    """The value of ``X-Metquay-Proxy-Note``."""
    error: str | None = None
    reason: str | None = None
    """What was wrong with a request that could not be read: whoever sent that may not read the answer either."""
    audited: bool = False
    """Whether the audit log tells of it."""
    head_sent: bool = False
    """A byte of the answer was written: nothing else may take its place."""
    head_at: float = 0.0
    """A reading of ``time.perf_counter`` when Metquay's answer was there to be passed on; 0 if never."""
    seconds: float = 0.0
    """In all."""
    ended: float = 0.0
    """Wall clock."""

    @property
    def resource(self) -> tuple[str, str]:
        """What is asked of whom, whatever the query; shortened, since it may be remembered."""
        return self.method, self.target.local[:_LONGEST_RESOURCE]

    def let_go(self) -> None:
        """Forget what served the way alone: finished exchanges are kept for people, and heads may hold secrets."""
        self.target = _NOWHERE
        del self.fields, self.body

    def note_sent(self, sent: Sent) -> None:
        """Remember the worst that an attempt may have done."""
        if _CERTAINTY[sent] > _CERTAINTY[self.sent]:
            self.sent = sent


class Response(Stream):
    """An answer: its head, which is there once it has ``begun``, and its body, which is read piece by piece."""

    head: ResponseHead

    def __init__(self, hold_up: Callable[[bool], object] = bool, give_up: Callable[[Response], object] = bool) -> None:
        """``hold_up`` is as in ``Stream``; ``give_up`` ends the sending of what has not arrived, if there is any."""
        super().__init__(hold_up)
        self._give_up = give_up
        self.begun = False

    def begin(self, head: ResponseHead) -> None:
        """Take the head."""
        self.head = head
        self.begun = True
        if self._waiter is not None:
            self._wake()

    def close(self) -> None:
        """Give up what has not arrived; it may be called again."""
        self._give_up(self)

    async def beginning(self, limit: int) -> bytes:
        """Return the whole body, or a beginning that is longer than ``limit`` bytes; close what breaks off."""
        beginning = b""
        try:
            while len(beginning) <= limit and not self.ended:
                beginning += await self.read()
        except BaseException:
            self.close()
            raise
        return beginning
