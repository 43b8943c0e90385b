"""Records of POSTs that carried an ``Idempotency-Key``: the same key never executes twice.

Owns the part of the contract (1.5) that speaks of them: scope, digest, what frees a key, the bounds. Pure: takes
``now``, sends nothing, waits for nothing; its methods are coroutines only because a store beyond this process needs to
wait. In memory, lost at restart.

Facts: the vendor has no such header, so that the promise is kept here. draft-ietf-httpapi-idempotency-key-header,
sections 2.5 to 2.7: a key is good for one request; another payload with it is 422, a first one still under way 409.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.http1 import ProtocolError, ResponseReader

if TYPE_CHECKING:
    from collections.abc import Iterator

LIFETIME: Final = 24 * 3600.0
"""Seconds that a record is kept once its request has ended."""
MAX_ANSWER: Final = 64 * 1024
"""Bytes of an answer's body that are kept."""
MAX_RECORDS: Final = 10_000
ABANDONED: Final = 600.0
"""Seconds after which the request of another replica, of which nothing was heard, has an unknown outcome."""

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
        if running is not None:
            return judged(digest, running, None, running=True)
        if ended is not None:
            return judged(digest, ended.digest, ended.answer)
        if len(self) >= self._max_records:
            raise full(self._max_records, next(iter(self._ended.values())).expires - now if self._ended else 60.0)
        self._running[record] = digest
        return Claim(record, digest)

    def known(self) -> Iterator[bytes]:
        """Yield the names of all records."""
        yield from (*self._running, *self._ended)

    def told(self, record: bytes, replica: str, now: float) -> tuple[str, bytes, float]:
        """Return what a store beyond this process is to do with a record, its value, and for how many seconds.

        ``replica`` names this process.
        """
        if record in self._running:
            return "keep", encoded(self._running[record], None, running=replica), LIFETIME
        ended = self._ended.get(record)
        if ended is None:
            return "free", b"", LIFETIME
        return "keep", encoded(ended.digest, ended.answer), max(1.0, ended.expires - now)

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


def judged(digest: bytes, known: bytes, answer: Answer | None, *, running: bool = False) -> Answer:
    """Return the answer to a request with ``digest`` whose key is known, for ``known``; raise as ``claim`` does."""
    if known != digest:
        raise ProxyError(
            "idempotency-key-reused",
            "This Idempotency-Key was used for another request body. Nothing was sent; a new one needs a new key.",
        )
    if running:
        raise ProxyError(
            "in-progress",
            "The first request with this Idempotency-Key is still under way. Ask again with it in a few seconds.",
            sent="unknown",
        )
    if answer is None or answer.body is None:
        raise _unknown(answer)
    return answer


def full(most: int, wait: float) -> ProxyError:
    """Return the refusal where ``most`` records are there; the first of them goes in ``wait`` seconds."""
    return ProxyError(
        "idempotency-full",
        f"The proxy keeps at most {most} requests with an Idempotency-Key. Nothing was sent.",
        retry_after=wait,
    )


def encoded(digest: bytes, answer: Answer | None, *, running: str | None = None) -> bytes:
    """Write a record for a store beyond this process: one line of JSON, then the answer's body.

    ``running`` is the replica that executes the request; without it and without an answer the outcome is unknown.
    """
    told: dict[str, object] = {"digest": digest.hex()}
    if running is not None:
        told["running"] = running
    elif answer is not None:
        fields = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in answer.fields]
        told |= {"status": answer.status, "reason": answer.reason.decode("latin-1"), "fields": fields}
        told["kept"] = answer.body is not None
    return json.dumps(told).encode() + b"\n" + (answer.body or b"" if answer else b"")


def decoded(record: bytes) -> tuple[bytes, str | None, Answer | None]:
    """Return digest, executing replica and answer of what ``encoded`` wrote; ValueError where others wrote it."""
    line, _, body = record.partition(b"\n")
    try:
        told = json.loads(line)
        return bytes.fromhex(told["digest"]), told.get("running"), _answer(told, body) if "status" in told else None
    except (ArithmeticError, AttributeError, LookupError, ProtocolError, TypeError, ValueError) as error:
        raise ValueError("no record") from error


def _answer(told: dict[str, Any], body: bytes) -> Answer:
    """Read a recorded answer as though Metquay had sent it just now."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in told["fields"])
    reader = ResponseReader("HEAD")
    reader.feed(b"HTTP/1.1 %d " % told["status"] + f"{told['reason']}\r\n{lines}\r\n".encode("latin-1"))
    head = reader.head
    if head is None or reader.surplus or len(head.headers) != len(told["fields"]) or len(body) > MAX_ANSWER:
        raise ValueError("no head, or more than one")
    return Answer(head.status, head.reason, head.headers, body if told["kept"] else None)


def judged_elsewhere(digest: bytes, record: bytes, age: float) -> Answer:
    """Return the answer that another replica recorded ``age`` seconds ago; raise as ``claim`` does.

    What can't be read was executed for all that is known.
    """
    try:
        known, running, answer = decoded(record)
    except ValueError:
        known, running, answer = digest, None, None
    return judged(digest, known, answer, running=running is not None and age < ABANDONED)


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
