"""What is told about exchanges: one log line each, and the figures that the own endpoints show.

Owns ``Exchange``, the logging set-up and redaction. Must not decide anything about a request.

Facts: query values can hold customers' names, bodies can hold passwords (the older interface sends them there): neither is
ever logged. A traceback that shows local variables would show tokens.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog

from metquay_proxy.errors import Sent

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from metquay_proxy.auth import TokenEvent

log: structlog.stdlib.BoundLogger = structlog.get_logger("metquay_proxy")

_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_CERTAINTY: Final[dict[Sent, int]] = {"no": 0, "unknown": 1, "yes": 2}
_QUERY_VALUE: Final = re.compile(r"=[^&]*")
_RUN: Final = os.urandom(4).hex()


class Exchange:
    """One request and its answer, from the parsed head to the last byte.

    Times are in seconds: ``waited`` for token, quota and backing off. ``answered_by`` is ``metquay`` or ``proxy``.
    ``sent`` says whether an earlier attempt could have been executed.
    """

    __slots__ = (
        "answered_by",
        "attempts",
        "began",
        "client",
        "client_left",
        "cors",
        "error",
        "head_sent",
        "hide_challenge",
        "id",
        "method",
        "note",
        "path",
        "sent",
        "status",
        "waited",
    )

    _count = 0

    def __init__(self, method: str, path: str) -> None:
        """``path`` is the raw target until the canonical one is known."""
        Exchange._count += 1
        self.id = f"{_RUN}{Exchange._count:08x}"
        self.began = time.perf_counter()
        self.method = method
        self.path = path
        self.client: str | None = None
        self.cors: tuple[tuple[str, str], ...] = ()
        self.status = 0
        self.answered_by: Literal["metquay", "proxy"] = "proxy"
        self.error: str | None = None
        self.attempts = 0
        self.waited = 0.0
        self.sent: Sent = "no"
        self.note: str | None = None
        self.hide_challenge = False
        self.head_sent = False
        self.client_left = False

    def note_sent(self, sent: Sent) -> None:
        """Remember the worst that an attempt may have done."""
        if _CERTAINTY[sent] > _CERTAINTY[self.sent]:
            self.sent = sent


class Telemetry:
    """Takes each exchange at its end; one place for the log line and the figures."""

    def __init__(self) -> None:
        """Start with empty books."""
        self.active = 0
        self.finished = 0
        self._log = log
        self.logs_requests = logging.getLogger("metquay_proxy").isEnabledFor(logging.INFO)

    def opened(self) -> None:
        """Count an exchange that begins."""
        self.active += 1

    def closed(self, exchange: Exchange) -> None:
        """Log the exchange and count it."""
        self.active -= 1
        self.finished += 1
        if self.logs_requests:
            extra: dict[str, Any] = {} if exchange.error is None else {"error": exchange.error}
            self._log.info(
                "request",
                id=exchange.id,
                client=exchange.client,
                method=exchange.method,
                path=masked(exchange.path),
                status=exchange.status,
                answered_by=exchange.answered_by,
                ms=round((time.perf_counter() - exchange.began) * 1000, 1),
                waited_ms=round(exchange.waited * 1000, 1),
                attempts=exchange.attempts,
                **extra,
            )

    def token_event(self, event: TokenEvent) -> None:
        """Log what became of a login."""
        if event.kind in {"failed", "rejected"}:
            self._log.warning(f"token {event.kind}", reason=event.text, next_attempt_s=round(event.wait, 1))
        else:
            self._log.info(f"token {event.kind}", lifetime_s=event.lifetime, renewal_in_s=round(event.wait, 1))


def masked(target: str) -> str:
    """Return a target without the values of its query; what has no equals sign is all value."""
    path, mark, query = target.partition("?")
    if not mark:
        return path
    return path + "?" + "&".join(_QUERY_VALUE.sub("=*", part) if "=" in part else "*" for part in query.split("&"))


def configure_logging(level: str, form: str) -> None:
    """Send structlog's and the standard library's messages to standard error, through one chain.

    ``form``: ``console``, ``json``, or ``auto`` (console on a terminal, JSON otherwise).
    """
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "json"
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[structlog.typing.Processor]
    if form == "json":
        tracebacks = structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        )
        renderers = [tracebacks, structlog.processors.JSONRenderer()]
    else:
        renderers = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[_drop_internal, *renderers],
            foreign_pre_chain=[*shared, _name_logger],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])


def _drop_internal(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return structlog.stdlib.ProcessorFormatter.remove_processors_meta(None, "", event)


def _name_logger(logger: logging.Logger | None, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["logger"] = "" if logger is None else logger.name
    return event
