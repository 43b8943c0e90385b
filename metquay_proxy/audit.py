"""The audit log: one JSON line for each write, for whoever must say later who changed what.

Owns the file. Must not see bodies, keys or query values: it is handed the fields of a line. A line is appended by one
write to a file opened with O_APPEND (POSIX: the offset is set to the end before each write), so that several proxies
may share a file and rotation by rename or by truncation loses nothing.

Facts: open(2) of a FIFO waits for a reader, unless O_NONBLOCK makes ENXIO of that; a disk that is full may take the
first part of a line.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_PRIVATE: Final = 0o600
_NEEDED: Final = ("O_CLOEXEC", "O_BINARY", "O_NONBLOCK")
_REOPEN: Final = b""


def open_log(path: Path) -> int:
    """Open the file for appending, making it where there is none; waits for nothing. Raises ``OSError``."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for name in _NEEDED:
        flags |= getattr(os, name, 0)
    try:
        file = os.open(path, flags, _PRIVATE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nobody reads from this pipe; start its reader first") from None
        raise
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(file, True)  # from here on a thread may wait for a slow reader
    return file


def try_log(path: Path) -> None:
    """Find out whether the file can be written, and leave nothing behind; raise ``OSError``."""
    if path.exists():
        os.close(open_log(path))
    else:
        tempfile.TemporaryFile(dir=path.parent).close()


def why_not(path: Path, error: OSError) -> str:
    """Return why the file can't be written, for people."""
    return f"cannot write {path}: {error.strerror or error}"


class AuditLog:
    """Appends lines to a file that may be moved away at any time; nobody waits for it, and no failure stops a request.

    ``status`` tells how many lines wait and were lost.
    """

    def __init__(self, path: Path, report: Callable[[str | None], None], pause: float = 1.0) -> None:
        """Open the file; raise ``OSError``. ``report`` and ``pause`` (seconds) are ``Writer``'s."""
        self._path = path
        self._file: int | None = open_log(path)
        self._writer = Writer(self._append, report, pause=pause)

    def write(self, fields: Mapping[str, Any]) -> None:
        """Have one line appended."""
        self._writer.put(json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def reopen(self) -> None:
        """Have the file opened anew, behind the lines that wait; after a failure that is done anyway."""
        if self._writer.trouble is None:
            self._writer.put(_REOPEN)

    def status(self) -> dict[str, Any]:
        """Return the figures: lines that wait, lines that were lost, and why none can be written (None: they can)."""
        writer = self._writer
        return {"waiting": writer.waiting, "lost": writer.lost, "trouble": writer.trouble}

    def close(self, timeout: float) -> None:
        """Write what waits, in at most ``timeout`` seconds, and close the file."""
        if self._writer.close(timeout):
            self._shut()

    def _append(self, line: bytes) -> None:
        if line == _REOPEN:
            self._shut()
            self._current()
            return
        try:
            file = self._current()
            whole = b"\n" + line if self._torn(file) else line
            if os.write(file, whole) < len(whole):
                raise OSError(errno.ENOSPC, "only a part of a line could be written")
        except OSError:
            self._shut()
            raise

    def _current(self) -> int:
        """Return the file, opened anew where it was rotated away."""
        if self._file is not None:
            try:
                there = self._path.stat()
            except FileNotFoundError:
                self._shut()
            else:
                if not os.path.samestat(there, os.fstat(self._file)):
                    self._shut()
        if self._file is None:
            self._file = open_log(self._path)
        return self._file

    def _torn(self, file: int) -> bool:
        """Whether the file ends within a line, whoever wrote that; of one that can't be read it is assumed."""
        about = os.fstat(file)
        if not (stat.S_ISREG(about.st_mode) and about.st_size):
            return False
        try:
            with self._path.open("rb") as reading:
                reading.seek(-1, os.SEEK_END)
                return reading.read(1) != b"\n"
        except OSError:
            return True

    def _shut(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
