"""Records of POSTs that carried an ``Idempotency-Key``: the same key never executes twice.

Owns the part of the contract (1.5) that speaks of them: scope, digest, what frees a key, the bounds. Pure: takes
``now``, sends nothing, waits for nothing; its methods are coroutines only because a store beyond this process needs to
wait. In memory, lost at restart.

Facts: the vendor has no such header, so that the promise is kept here. draft-ietf-httpapi-idempotency-key-header,
sections 2.5 to 2.7: a key is good for one request; another payload with it is 422, a first one still under way 409.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from metquay_proxy.errors import ProxyError

LIFETIME: Final = 24 * 3600.0
"""Seconds that a record is kept once its request has ended."""
MAX_ANSWER: Final = 64 * 1024
"""Bytes of an answer's body that are kept."""
MAX_RECORDS: Final = 10_000

_KEY: Final = re.compile(r"[!-~](?:[ -~]{0,253}[!-~])?")


@dataclass(frozen=True, slots=True)
class Answer:
    """A recorded 2xx answer; ``body`` is None where it was longer than ``MAX_ANSWER``, or broke off."""

    status: int
    reason: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to execute one request, until it is completed, lost or freed."""

    record: bytes
    digest: bytes


@dataclass(slots=True)
class _Record:
    digest: bytes
    expires: float
    answer: Answer | None


def record_name(client: str | None, target: str, key: str | None) -> bytes:
    """Return the name of a record: a digest over client key name, path with query as sent, and key.

    ``key`` is None where the header came more than once. Raises ``ProxyError`` bad-request where it is no key.
    """
    if key is None or not _KEY.fullmatch(key):
        raise ProxyError(
            "bad-request",
            "Idempotency-Key must come once and hold 1 to 255 visible ASCII characters. Nothing was sent.",
        )
    return hashlib.sha256("\0".join((client or "", target, key)).encode("utf-8", "surrogateescape")).digest()


def proves_nothing_was_executed(status: int) -> bool:
    """Whether an answer says for certain that the POST did not happen: every 4xx does, a 5xx does not."""
    return 400 <= status <= 499  # noqa: PLR2004 - RFC 9110 section 15.5, the client error class


class Records:
    """The records of this process."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        """Start empty."""
        self._max_records = max_records
        self._running: dict[bytes, bytes] = {}
        self._ended: OrderedDict[bytes, _Record] = OrderedDict()

    def __len__(self) -> int:
        """Return how many records there are, running ones included."""
        return len(self._running) + len(self._ended)

    async def claim(self, record: bytes, digest: bytes, now: float) -> Claim | Answer:
        """Return the right to execute, or the recorded answer.

        Raises ``ProxyError``: ``in-progress``, ``outcome-unknown``, ``idempotency-key-reused``, ``idempotency-full``.
        """
        self._forget_expired(now)
        running = self._running.get(record)
        ended = self._ended.get(record)
        known = running or (ended.digest if ended else None)
        if known is not None and known != digest:
            raise ProxyError(
                "idempotency-key-reused",
                "This Idempotency-Key was used for another request body. Nothing was sent; a new one needs a new key.",
            )
        if running is not None:
            raise ProxyError(
                "in-progress",
                "The first request with this Idempotency-Key is still under way. Ask again with it in a few seconds.",
                sent="unknown",
            )
        if ended is not None:
            if ended.answer is None or ended.answer.body is None:
                raise _unknown(ended.answer)
            return ended.answer
        if len(self) >= self._max_records:
            wait = next(iter(self._ended.values())).expires - now if self._ended else 60.0
            raise ProxyError(
                "idempotency-full",
                f"The proxy keeps at most {self._max_records} requests with an Idempotency-Key. Nothing was sent.",
                retry_after=wait,
            )
        self._running[record] = digest
        return Claim(record, digest)

    async def complete(self, claim: Claim, answer: Answer | None, now: float) -> None:
        """Record a 2xx answer, or (None) that nobody knows whether the request was executed."""
        if self._running.pop(claim.record, None) is not None:
            self._ended[claim.record] = _Record(claim.digest, now + LIFETIME, answer)

    async def free(self, claim: Claim) -> None:
        """Forget a request that was certainly not executed: its key may be used again."""
        self._running.pop(claim.record, None)

    def _forget_expired(self, now: float) -> None:
        while self._ended and next(iter(self._ended.values())).expires <= now:
            self._ended.popitem(last=False)


def _unknown(answer: Answer | None) -> ProxyError:
    if answer is None:
        return ProxyError(
            "outcome-unknown",
            "The first request with this Idempotency-Key broke off, and nobody knows whether Metquay executed it. "
            "Look there whether the record exists; if it does not, send the request with a new key.",
            sent="unknown",
        )
    return ProxyError(
        "outcome-unknown",
        f"The first request with this Idempotency-Key was executed (status {answer.status}). Its answer was not kept "
        "(too long, or broken off). Look in Metquay for the record; do not send it again.",
        sent="yes",
    )
