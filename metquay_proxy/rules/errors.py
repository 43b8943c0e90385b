"""The errors that the proxy itself makes: one exception, one table.

Owns part 8 of the contract: each slug, its status, and the shape of the answer (Metquay's ErrorResponse,
``{"code": status, "message": text}``, so that a tool needs one parser for both origins). Must not know HTTP
libraries: the handler turns the exception into bytes.

Facts: RFC 9110 section 10.2.3 (Retry-After in whole seconds); RFC 9110 section 15 (status codes).
"""

from __future__ import annotations

import errno
import json
import math
from typing import Final, Literal

Sent = Literal["no", "yes", "unknown"]
"""Could Metquay have executed the request? The value of ``X-Metquay-Proxy-Sent``."""

STATUS: Final[dict[str, int]] = {
    "bad-target": 400,
    "bad-request": 400,
    "login-required": 401,
    "host-not-allowed": 403,
    "origin-not-allowed": 403,
    "client-key-required": 403,
    "read-only": 403,
    "no-such-page": 404,
    "pass-through-off": 404,
    "method-not-allowed": 405,
    "request-timeout": 408,
    "outcome-unknown": 409,
    "in-progress": 409,
    "body-too-large": 413,
    "idempotency-key-reused": 422,
    "quota-exceeded": 429,
    "head-too-large": 431,
    "internal-error": 500,
    "not-supported": 501,
    "upstream-unreachable": 502,
    "upstream-tls": 502,
    "upstream-protocol": 502,
    "upstream-closed": 502,
    "token-unavailable": 503,
    "credentials-rejected": 503,
    "retry-with-new-token": 503,
    "shutting-down": 503,
    "idempotency-full": 503,
    "upstream-timeout": 504,
}
"""Slug (``X-Metquay-Proxy-Error``) to status."""

_WAITABLE: Final = frozenset({429, 503})
_BEFORE_A_REPEAT: Final = "A read can be sent again. Before you repeat a change, check in Metquay whether it was made."


_PROGRAM_SHORT: Final = (
    "this program has reached its limit of open files and connections",
    "Raise the limit (ulimit -n, LimitNOFILE= of systemd, docker run --ulimit), or close tools that stay connected.",
)
_COMPUTER_SHORT: Final = (
    "this computer cannot open more files and connections",
    "Close programs that it can do without.",
)
_SHORTAGE: Final = {
    errno.EMFILE: _PROGRAM_SHORT,
    **dict.fromkeys((errno.ENFILE, errno.ENOBUFS, errno.ENOMEM), _COMPUTER_SHORT),
}


def shortage(error: OSError) -> tuple[str, str] | None:
    """Return what the system ran out of (no full stop) and what to do about it; None where that is not the fault."""
    return _SHORTAGE.get(error.errno or 0)


class ProxyError(Exception):
    """An answer made by the proxy, not by Metquay.

    ``message`` says what happened, why, and what to do; it is shown to people and must hold no secret.
    ``retry_after`` is in seconds and goes out in whole ones, rounded up; 429 and 503 always have one.
    ``sent`` says whether Metquay could have executed the request. ``headers`` are further fields of the answer.
    A slug that the table lacks is a ``KeyError``.
    """

    def __init__(
        self,
        slug: str,
        message: str,
        *,
        retry_after: float | None = None,
        sent: Sent = "no",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.slug = slug
        self.status = STATUS[slug]
        self.message = message
        if retry_after is None and self.status in _WAITABLE:
            retry_after = 1
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))
        self.sent: Sent = sent
        self.headers = headers

    def body(self) -> bytes:
        """The answer's JSON body, in ASCII: whatever charset a tool assumes, it reads the same."""
        return json.dumps({"code": self.status, "message": self.message}).encode("ascii")


class UpstreamFailure(ProxyError):
    """An exchange that broke, and ``why``; what that means for whoever sent the request is told behind it.

    ``repeatable``: a request whose method allows it may be sent again. ``stale``: it broke on a connection that had
    idled, before any byte of an answer, as happens when the server closes an idle one.
    """

    def __init__(
        self, slug: str, why: str, *, sent: Sent = "no", repeatable: bool = False, stale: bool = False
    ) -> None:
        super().__init__(slug, f"{why} {'Nothing was changed.' if sent == 'no' else _BEFORE_A_REPEAT}", sent=sent)
        self.why = why
        self.repeatable = repeatable
        self.stale = stale
