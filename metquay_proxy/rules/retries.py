"""What may be sent again, and after how long.

Owns the rules of part 5 of the contract on repeating. Pure: must not wait or send.

Facts: RFC 9110 section 9.2.2 (idempotent methods). The vendor says that PUT and DELETE may be repeated and POST may
not; a 401 and a 429 mean "not executed".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from metquay_proxy.rules.errors import Sent, UpstreamFailure

READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
OVERWRITING: Final = frozenset({"PUT", "DELETE"})
"""An older one of these that is repeated after a newer write would undo that."""
IDEMPOTENT: Final = READING | OVERWRITING
_BUSY: Final = frozenset({502, 503, 504})
_NEVER_CONNECTED: Final = frozenset({"upstream-unreachable", "upstream-tls"})
_NOT_FOUND: Final = 404
_FIRST: Final = 0.25
"""Seconds at most; twice as many before each further attempt, until they have doubled ``_DOUBLINGS`` times."""
_DOUBLINGS: Final = 4


def after_failure(method: str, failure: UpstreamFailure, failed: int, jitter: float) -> float | None:
    """Return the seconds to wait before a request that got no answer is sent again; None where it must not be.

    ``failed`` attempts ended badly before this one; 0 <= ``jitter`` < 1 spreads those that failed together.
    """
    if not failure.repeatable or (method not in IDEMPOTENT and failure.slug not in _NEVER_CONNECTED):
        return None
    # that the upstream closed an idle connection says nothing against it
    return 0.0 if failure.stale else _backoff(failed, jitter)


def after_status(method: str, status: int, failed: int, jitter: float, asked: float | None) -> float | None:
    """Return the same for a request that was answered; ``asked`` is the answer's Retry-After in seconds."""
    if status not in _BUSY or method not in IDEMPOTENT:
        return None
    return max(asked or 0.0, _backoff(failed, jitter))


def may_have_deleted(method: str, status: int, sent: Sent) -> bool:
    """Whether a DELETE found nothing maybe because an earlier attempt of its own, which was ``sent``, did it."""
    return method == "DELETE" and status == _NOT_FOUND and sent != "no"


def _backoff(failed: int, jitter: float) -> float:
    return _FIRST * 2.0 ** min(failed, _DOUBLINGS) * (0.5 + jitter / 2)
