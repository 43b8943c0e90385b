"""The log: what structlog, the standard library's loggers and Python's warnings tell, as lines on standard error.

Owns standard error and how a line looks: JSON for machines, text for eyes, of the same event. Must not decide what is
told, nor let anybody wait: lines leave by a thread, and where nobody reads them they are lost and counted.

Facts: a traceback that shows local variables would show tokens. A thread that waits within ``sys.stderr.write`` holds
its lock, and Python aborts when it ends and finds that lock taken: so lines go to the descriptor, past that object.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import structlog
from structlog import processors, stdlib

from metquay_proxy.threads import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    Event = MutableMapping[str, Any]

log: stdlib.BoundLogger = structlog.get_logger("metquay_proxy")

to_json: Final = json.JSONEncoder(check_circular=False).encode
"""Turns a request's event into JSON; made once, because there are many."""
LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_SILENT: Final = 100
_KEPT: Final = 4000
"""Lines that wait at most; a request's has three kilobytes at most, and 1,000 that wait may be refused at once."""
_GATHERED: Final = 0.05
"""Seconds from one write to the next: lines that come meanwhile leave together."""
_LAST: Final = 1.0
"""Seconds for the last lines to be written, when the program ends."""
_OF_MACHINES: Final = ("id", "user_agent", "answered_by", "upstream_ms")
_WORTH_TELLING: Final = {"waited_ms": 1, "attempts": 2}
"""From which figure on they are told to eyes."""


class _Output:
    """Standard error, as structlog and logging see it: a file to write to, which never fails and lets nobody wait."""

    def __init__(self) -> None:
        self.threshold = _SILENT
        """The least level of an event that is told; none is before logging was set up."""
        self.as_json = False
        self.encoding = "ascii"
        self.writer = Writer(self._write, self._report, kept=_KEPT, gather=_GATHERED)
        self._begun = self._told = 0
        atexit.register(self.writer.close, _LAST)

    def tell(self, line: str) -> None:
        """Log a line of JSON that has its level and its time already."""
        if self.as_json:
            self.write(f"{line}\n")
        else:
            event = json.loads(line)
            log.log(LEVELS[event.pop("level")], **event)

    def write(self, text: str) -> None:
        """Have lines written."""
        self.writer.put(text.encode(self.encoding, "backslashreplace"))

    def flush(self) -> None:
        """Do nothing: what is written leaves by itself."""

    def _write(self, lines: bytes) -> None:
        """Write them; where the last attempt, which was of the same lines, was cut short, go on from there."""
        with open(sys.stderr.fileno(), "wb", buffering=0, closefd=False) as file:
            while self._begun < len(lines):
                written = file.write(lines[self._begun :])
                if not written:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                self._begun += written
        self._begun = 0

    def _report(self, trouble: str | None) -> None:
        lost = self.writer.lost - self._told
        if trouble is None and lost:
            self._told += lost
            log.error("lines of this log were lost: standard error did not take them in time", lines=lost)


output: Final = _Output()


def reporter(trouble: str, over: str) -> Callable[[str | None], None]:
    """Return what logs ``trouble`` with its reason, and that it is ``over`` where that is None."""
    return lambda why: log.info(over) if why is None else log.error(trouble, reason=why)


def configure_logging(level: str, form: str) -> None:
    """Send structlog's, the standard library's and Python's own messages to standard error, through one chain.

    ``form``: ``console``, ``json``, or ``auto`` (console on a terminal, JSON otherwise).
    """
    terminal = sys.stderr.isatty()
    output.as_json = form == "json" or (form == "auto" and not terminal)
    output.threshold, output.encoding = LEVELS[level], sys.stderr.encoding
    shared: list[structlog.typing.Processor] = [
        stdlib.add_log_level,
        processors.TimeStamper(fmt="iso" if output.as_json else "%Y-%m-%d %H:%M:%S", utc=output.as_json),
    ]
    renderers: list[structlog.typing.Processor]
    if output.as_json:
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        renderers = [processors.ExceptionRenderer(tracebacks), _event_first, processors.JSONRenderer()]
    else:
        # no-color.org; and structlog's colours need another package on Windows
        colours = terminal and not os.environ.get("NO_COLOR") and sys.platform != "win32"
        console = structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=structlog.dev.plain_traceback)
        renderers = [_for_eyes, console]
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(output),  # type: ignore[arg-type] # it writes and flushes
        cache_logger_on_first_use=True,
    )
    drop = stdlib.ProcessorFormatter.remove_processors_meta
    chain = stdlib.ProcessorFormatter(
        processors=[drop, *renderers], foreign_pre_chain=[*shared, stdlib.add_logger_name]
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(chain)
    logging.basicConfig(handlers=[handler], level=LEVELS[level], force=True)
    logging.captureWarnings(capture=True)


def _event_first(_logger: object, _method: str, event: Event) -> Event:
    return {**{name: event.pop(name) for name in ("event", "level", "timestamp")}, **event}


def _for_eyes(_logger: object, _method: str, event: Event) -> Event:
    """Tell in one text what every request has, and beside it only what is out of the ordinary.

    What a terminal would obey is escaped; tracebacks are ours, and have lines.
    """
    if "answered_by" in event:
        method, path, status, ms, client = (event.pop(name) for name in ("method", "path", "status", "ms", "client"))
        event["event"] = f"{method} {path} {status or '-'} {ms:.1f} ms {client or '-'}"
        for name in (*_OF_MACHINES, *(name for name, least in _WORTH_TELLING.items() if event[name] < least)):
            event.pop(name, None)
    for name, value in event.items():
        if isinstance(value, str) and name != "exception" and not value.isprintable():
            event[name] = "".join(each if each.isprintable() else repr(each)[1:-1] for each in value)
    return event
