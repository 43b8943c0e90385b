"""The audit log: one JSON line for each write, for whoever must say later who changed what.

Owns the file, and what a line says: never bodies, keys or query values. A line is appended by one write to a file
opened with O_APPEND (POSIX: the offset is set to the end before each write), so that several proxies may share a file
and rotation by rename or by truncation loses nothing.

Facts: open(2) of a FIFO waits for a reader, unless O_NONBLOCK makes ENXIO of that; a disk that is full may take the
first part of a line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.log import reporter
from metquay_proxy.telemetry import masked
from metquay_proxy.threads import Writer

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from metquay_proxy.exchange.exchange import Exchange

_REPORT: Final = reporter("audit log can't be written", "audit log can be written again")


def open_log(path: Path) -> io.FileIO:
    """Open the file for appending, making it where there is none; waits for nothing. Raises ``OSError``."""
    try:
        file = open(path, "ab", buffering=0, opener=_open)  # noqa: SIM115 - for as long as we run
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nobody reads from this pipe; start its reader first") from None
        raise
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(file.fileno(), True)  # from here on a thread may wait for a slow reader
    return file


def _open(path: str, flags: int) -> int:
    # It says who did what, and so is for this user alone.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o600)


def try_log(path: Path) -> None:
    """Find out whether the file can be written, and whether there is room for it; leave nothing behind.

    Raises ``OSError``. Room is looked for beside the file, where that is allowed: nothing is written into a log to try.
    """
    there = path.exists()
    if there:
        open_log(path).close()
    try:
        with tempfile.TemporaryFile(dir=path.parent) as beside:
            beside.write(bytes(4096))
    except OSError as error:
        if not there or error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise


def why_not(path: Path, error: OSError) -> str:
    """Return why the file can't be written, for people."""
    return f"cannot write {path}: {error.strerror or error}"


def entry(exchange: Exchange) -> dict[str, Any]:
    """Return the fields of the line for a write that has ended."""
    fields = {
        "time": datetime.fromtimestamp(exchange.ended, UTC).isoformat(timespec="milliseconds"),
        "client": exchange.admission.client,
        "user_agent": exchange.agent or None,
        "address": exchange.address,
        "method": exchange.method,
        "path": masked(exchange.path),
        "status": exchange.status or None,
        "error": exchange.error,
        "sent": "yes" if exchange.answered_by == "metquay" else exchange.sent,
        "id": exchange.id,
    }
    return fields | ({"replayed": True} if exchange.replayed else {})


class AuditLog:
    """Appends lines to a file that may be moved away at any time; nobody waits for it, and no failure stops a request.

    ``status`` tells how many lines wait and were lost.
    """

    def __init__(self, path: Path, report: Callable[[str | None], None] = _REPORT, pause: float = 1.0) -> None:
        """Open the file; raise ``OSError``. ``report`` and ``pause`` (seconds) are ``Writer``'s; the log is told."""
        self._path = path
        self._file = open_log(path)
        try_log(path)
        self._writer = Writer(self._append, report, pause=pause)

    def write(self, fields: Mapping[str, Any]) -> None:
        """Have one line appended."""
        self._writer.put(json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def reopen(self) -> None:
        """Have the file made anew where it was moved away: whoever did that sees it, and the next line goes there."""
        threading.Thread(target=self._make, name="audit", daemon=True).start()

    def _make(self) -> None:
        with contextlib.suppress(OSError):  # the next line will tell
            open_log(self._path).close()

    def status(self) -> dict[str, Any]:
        """Return the figures: lines that wait, lines that were lost, and why none can be written (None: they can)."""
        return {"waiting": self._writer.waiting, "lost": self._writer.lost, "trouble": self._writer.trouble}

    def close(self, timeout: float) -> None:
        """Write what waits, in at most ``timeout`` seconds, and close the file."""
        if self._writer.close(timeout):
            self._file.close()

    def _append(self, line: bytes) -> None:
        try:
            if self._file.closed or self._rotated():
                self._file.close()
                self._file = open_log(self._path)
            whole = b"\n" + line if self._torn() else line
            if self._file.write(whole) < len(whole):
                raise OSError(errno.ENOSPC, "only a part of a line could be written")
        except OSError:
            self._file.close()
            raise

    def _rotated(self) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True

    def _torn(self) -> bool:
        """Whether the file ends within a line, whoever wrote that; of one that can't be read it is assumed."""
        about = os.fstat(self._file.fileno())
        if not stat.S_ISREG(about.st_mode):
            return False
        try:
            with open(self._path, "rb", buffering=0, opener=_open) as reading:
                before, end = -1, reading.seek(-1, os.SEEK_END)
                while before < end and reading.read(1) != b"\n":
                    time.sleep(0.01)  # another proxy may be in the midst of its line, which takes far less
                    before, end = end, reading.seek(-1, os.SEEK_END)
                return before == end
        except PermissionError:
            return about.st_size > 0
        except OSError:  # it is empty, or has just been moved away and takes this line yet
            return False
