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
    from metquay_proxy.exchange.body import RequestBody
    from metquay_proxy.rules.credentials import AccessToken
    from metquay_proxy.rules.errors import ProxyError, Sent
    from metquay_proxy.rules.headers import RequestFields, ResponseHead

_CERTAINTY: Final[dict[Sent, int]] = {"no": 0, "unknown": 1, "yes": 2}
_LONGEST_RESOURCE: Final = 1024
_NUMBERS: Final = count(1 << 63 | int.from_bytes(os.urandom(7), "big"))
"""Of sixteen hexadecimal digits, and others in each run."""
_NOBODY: Final = Admission()
_NOWHERE: Final = Target("-", "-", None)


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class Exchange:
    """One request and its answer, from the judged head to the last byte. Durations are in seconds."""

    method: str
    address: str | None = None
    """Where it came from, if from another machine."""
    agent: str = ""
    """Its User-Agent, shortened."""
    keep: bool = False
    """Whether the client's connection may stay after the answer."""
    fields: RequestFields = field(init=False)
    body: RequestBody = field(init=False)
    id: str = field(init=False, default_factory=lambda: "%x" % next(_NUMBERS))  # noqa: UP031 - half the cost of others
    began: float = field(init=False, default_factory=time.perf_counter)

    target: Target = _NOWHERE
    """What is asked for, once that is known to be allowed;"""
    path: str = "-"
    """and until then nobody is told, since a refused one may hold anything."""
    admission: Admission = _NOBODY
    """What the gate found out: who asks, and whether that one may only read."""
    caller: str = ""
    """Whom it waits in line with: the name of the key, else what the tool calls itself."""
    outgoing: bytes = b""
    """The head that goes upstream, but for a token's line and the empty one."""
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

    deadline: float = field(init=False)
    """How long it may wait in all, in seconds of the forwarder's clock."""
    failed: int = 0
    """How many of its attempts had an unclear end, after which another one was planned."""
    fallback: Response | ProxyError | None = None
    """What the last one ended in, to be passed on if the other one can't be made."""
    rejected: AccessToken | None = None
    """The token of the last one, if it was answered with 401: another one is waited for."""
    response: Response | None = None
    """What the latest attempt is answered, unless another one is waited for."""

    status: int = 0
    answered_by: Literal["metquay", "proxy"] = "proxy"
    replayed: bool = False
    """Answered from the record of an earlier request with the same Idempotency-Key: this one was not sent."""
    hide_challenge: bool = False
    """The tool must not ask a person for a password that nobody has."""
    note: str | None = None
    """The value of ``X-Metquay-Proxy-Note``."""
    error: str | None = None
    """The slug of what went wrong,"""
    reason: str | None = None
    """and its text: who looks into the log or at the status page has not seen the answer."""
    audited: bool = False
    """Whether the audit log tells of it."""
    head_sent: bool = False
    """A byte of the answer was written: nothing else may take its place."""
    head_at: float = 0.0
    """A reading of ``time.perf_counter`` when the rest of an answer was yet to come; 0 if none was."""
    seconds: float = field(init=False)
    """In all."""
    ended: float = field(init=False)
    """Wall clock."""

    @property
    def resource(self) -> tuple[str, str]:
        """What is asked of whom, whatever the query; shortened, since it may be remembered."""
        return self.method, self.target.local[:_LONGEST_RESOURCE]

    @property
    def on_its_way(self) -> bool:
        """Whether all of it was handed to the network, in the attempt that is under way."""
        return self.response is not None and self.response.sent

    def let_go(self) -> None:
        """End and forget what served the way alone: finished exchanges are kept for people, and heads hold secrets."""
        if self.response is not None:
            self.response.close()
        if isinstance(self.fallback, Response):
            self.fallback.close()
        self.target, self.outgoing = _NOWHERE, b""
        self.response = self.fallback = self.rejected = None
        del self.fields, self.body

    def note_sent(self, sent: Sent) -> None:
        """Remember the worst that an attempt may have done."""
        if _CERTAINTY[sent] > _CERTAINTY[self.sent]:
            self.sent = sent

    def note_error(self, error: ProxyError) -> None:
        """Remember what went wrong."""
        self.note_sent(error.sent)
        self.error, self.reason = error.slug, error.message


class Response(Stream):
    """The answer to one attempt: its head, which is there once it has ``begun``, and its body, read piece by piece.

    ``sent``: all of the request was handed to the network (whoever sends it says so).
    """

    head: ResponseHead
    begun = sent = False

    def begin(self, head: ResponseHead) -> None:
        """Take the head; whoever waits for it hears of it with what is fed next."""
        self.head = head
        self.begun = True

    async def beginning(self, limit: int) -> bytes:
        """Return the whole body, or a beginning that is longer than ``limit`` bytes; close what breaks off."""
        beginning = bytearray()
        try:
            while len(beginning) <= limit and not self.ended:
                beginning += await self.read()
        except BaseException:
            self.close()
            raise
        return bytes(beginning)
