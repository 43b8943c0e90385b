"""Records of POSTs that carried an ``Idempotency-Key``: the same key never executes twice.

Owns the part of the contract (1.5) that speaks of them: scope, digest, what frees a key, the bounds. Pure: takes
``now``, sends nothing, waits for nothing; its methods are coroutines only because a store beyond this process needs to
wait. In memory, lost at restart.

A record is text, here and in a store beyond this process: the digest of the request's body (32 bytes), then ``R`` and
the name of the replica that executes it, or nothing where the outcome is unknown, or the answer as it came: head, empty
line, body. An answer that is not kept is cut off behind its status.

Facts: the vendor has no such header, so that the promise is kept here. draft-ietf-httpapi-idempotency-key-header,
sections 2.5 to 2.7: a key is good for one request; another payload with it is 422, a first one still under way 409.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.faults import BLANK_LINE
from metquay_proxy.rules.http1 import ProtocolError, ResponseReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metquay_proxy.rules.headers import ResponseHead

LIFETIME: Final = 24 * 3600.0
"""Seconds that a record is kept once its request has ended."""
MAX_ANSWER: Final = 64 * 1024
"""Bytes of an answer that are kept, its head included,"""
MAX_ANSWERS: Final = 64 * 1024 * 1024
"""and of all answers: the oldest go first, and their keys stay."""
MAX_RECORDS: Final = 200_000
ABANDONED: Final = 600.0
"""Seconds after which the request of another replica, of which nothing was heard, has an unknown outcome."""

_KEY: Final = re.compile(r"[!-~](?:[ -~]{0,253}[!-~])?")
_DIGEST: Final = 32
_CUT: Final = _DIGEST + len(b"HTTP/1.1 200")
_SCOPE: Final = 8
_NOBODY: Final = bytes(_SCOPE)


@dataclass(slots=True)
class Answer:
    """A recorded 2xx answer; ``body`` is None where it was not kept, and then the head may have lost its fields."""

    head: ResponseHead
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to execute one request, until that is completed."""

    record: bytes
    digest: bytes


def record_name(client: str | None, target: str, key: str | None) -> bytes:
    """Return the name of a record: digests of the client key, then of that, path with query as sent, and key.

    ``key`` is None where the header came more than once. Raises ``ProxyError`` bad-request where it is no key.
    """
    if key is None or not _KEY.fullmatch(key):
        raise ProxyError(
            "bad-request",
            "Idempotency-Key must come once and hold 1 to 255 visible ASCII characters. Nothing was sent.",
        )
    scope = _NOBODY if client is None else _sha256(client)[:_SCOPE]
    return scope + _sha256("\0".join((client or "", target, key)))


def greed(record: bytes, most: int) -> int:
    """Return how many times as many records as are free (of ``most``) the client key of this one may hold.

    One alone gets three quarters of them, two three sevenths each, and some are always left for another. Where there
    are no client keys, all are for all.
    """
    return most if record.startswith(_NOBODY) else 3


def proves_nothing_was_executed(status: int) -> bool:
    """Whether an answer says for certain that the POST did not happen: every 4xx does, a 5xx does not."""
    return 400 <= status <= 499  # noqa: PLR2004 - RFC 9110 section 15.5, the client error class


class Records:
    """The records of this process."""

    def __init__(self, max_records: int = MAX_RECORDS, max_answers: int = MAX_ANSWERS) -> None:
        """Start empty; ``max_answers`` is in bytes."""
        self._max_records = max_records
        self._max_answers = max_answers
        self._running: dict[bytes, bytes] = {}
        self._ended: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self._answers: deque[bytes] = deque()
        """The names of those whose answers are kept, oldest first,"""
        self._kept = 0
        """and the bytes of these answers."""
        self._of: Counter[bytes] = Counter()
        """How many each client key has."""

    def __len__(self) -> int:
        """Return how many records there are, running ones included."""
        return len(self._running) + len(self._ended)

    async def claim(self, record: bytes, digest: bytes, now: float) -> Claim | Answer:
        """Return the right to execute, or the recorded answer.

        Raises ``ProxyError``: ``in-progress``, ``outcome-unknown``, ``idempotency-key-reused``, ``idempotency-full``.
        """
        self._forget_expired(now)
        known = self._running.get(record) or self._ended.get(record, (0.0, None))[1]
        if known is not None:
            return judged(digest, known)
        free = self._max_records - len(self)
        if self._of[record[:_SCOPE]] >= greed(record, self._max_records) * free:
            raise full(self._max_records, next(iter(self._ended.values()))[0] - now if self._ended else 60.0)
        self._running[record] = digest + b"R"
        self._of[record[:_SCOPE]] += 1
        return Claim(record, digest)

    def known(self) -> Iterator[bytes]:
        """Yield the names of all records."""
        yield from (*self._ended, *self._running)

    def told(self, record: bytes, replica: str, now: float) -> tuple[str, bytes, float]:
        """Return what a store beyond this process is to do with a record, its value, and for how many seconds.

        ``replica`` names this process.
        """
        if record in self._running:
            return "keep", self._running[record] + replica.encode(), LIFETIME
        if record not in self._ended:
            return "free", b"", LIFETIME
        expires, text = self._ended[record]
        return "keep", text, max(1.0, expires - now)

    async def complete(self, claim: Claim, answer: Answer | None, now: float, *, executed: bool = True) -> None:
        """Record a 2xx answer, or (None) that nobody knows whether the request was executed.

        ``executed``: False where it was certainly not, so that its key may be used again.
        """
        if self._running.pop(claim.record, None) is None:
            return
        if not executed:
            self._of[claim.record[:_SCOPE]] -= 1
            return
        text = encoded(claim.digest, answer)
        self._ended[claim.record] = now + LIFETIME, text
        if text[_CUT:]:
            self._answers.append(claim.record)
            self._kept += len(text)
        while self._kept > self._max_answers:
            oldest = self._answers.popleft()
            expires, text = self._ended[oldest]
            self._ended[oldest] = expires, text[:_CUT]
            self._kept -= len(text)

    def _forget_expired(self, now: float) -> None:
        while self._ended and next(iter(self._ended.values()))[0] <= now:
            record, (_, text) = self._ended.popitem(last=False)
            self._of[record[:_SCOPE]] -= 1
            if text[_CUT:]:
                self._answers.popleft()
                self._kept -= len(text)


def judged(digest: bytes, record: bytes, age: float = 0.0) -> Answer:
    """Return the answer to a request with ``digest`` whose key has a ``record``; raise as ``claim`` does.

    ``age`` is the record's, in seconds. What can't be read was executed for all that is known.
    """
    running = record.startswith(b"R", _DIGEST)
    answer = _answer(record[_DIGEST:])
    readable = running or answer is not None or len(record) == _DIGEST
    if readable and record[:_DIGEST] != digest:
        raise ProxyError(
            "idempotency-key-reused",
            "This Idempotency-Key was already used with a different body. Nothing was sent. New records need new keys.",
        )
    if running and age < ABANDONED:
        raise ProxyError(
            "in-progress",
            "The first request with this Idempotency-Key is still in progress. Repeat this one in a few seconds.",
            sent="unknown",
        )
    if answer is None or answer.body is None:
        raise _unknown(answer)
    return answer


def full(most: int, wait: float) -> ProxyError:
    """Return the refusal where there is no room for one more among ``most``; the first of them goes in ``wait`` s."""
    return ProxyError(
        "idempotency-full",
        f"The proxy cannot remember another Idempotency-Key of this client now: it keeps {most} in all, each for a "
        "day. Nothing was sent. Send the request again after the time in Retry-After.",
        retry_after=wait,
    )


def encoded(digest: bytes, answer: Answer | None) -> bytes:
    """Write the record of a request that has ended; without an answer nobody knows how."""
    if answer is None:
        return digest
    head = answer.head
    text = b"HTTP/1.1 %d %b%b\r\n\r\n%b" % (head.status, head.reason, head.lines, answer.body or b"")
    kept = answer.body is not None and len(text) <= MAX_ANSWER
    return digest + text if kept else (digest + text)[:_CUT]


def _answer(text: bytes) -> Answer | None:
    """Read a recorded answer as though Metquay had sent it just now; None where there is none that it can have sent."""
    lines, blank, body = text.partition(BLANK_LINE)
    reader = ResponseReader("POST")
    with contextlib.suppress(ProtocolError):
        reader.feed(lines + BLANK_LINE)
    head = reader.head
    if head is None or head.status // 100 != 2 or len(text) > MAX_ANSWER:  # noqa: PLR2004 - RFC 9110 section 15.3
        return None
    if blank and head.length not in {None, len(body)}:
        return None
    return Answer(head, body if blank else None)


def _unknown(answer: Answer | None) -> ProxyError:
    if answer is None:
        return ProxyError(
            "outcome-unknown",
            "The first request with this Idempotency-Key had no clear result, so Metquay may have carried it out. "
            "Check there whether the record exists. If it does not, send the request with a new key.",
            sent="unknown",
        )
    return ProxyError(
        "outcome-unknown",
        f"The first request with this Idempotency-Key was carried out (status {answer.head.status}). Its answer is not "
        "kept (too long, incomplete, or too many came since). Look for the record in Metquay; do not send it again.",
        sent="yes",
    )


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
