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
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.threads import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_PRIVATE: Final = 0o600
_NEEDED: Final = ("O_CLOEXEC", "O_BINARY", "O_NONBLOCK")
_GLANCE: Final = 0.01
"""Seconds from one look at the end of the file to the next; a line is written in far less."""
_BLOCK: Final = 4096
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def open_log(path: Path) -> int:
    """Open the file for appending, making it where there is none; waits for nothing. Raises ``OSError``."""
    try:
        file = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nobody reads from this pipe; start its reader first") from None
        raise
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(file, True)  # from here on a thread may wait for a slow reader
    return file


def _open(path: Path | str, flags: int) -> int:
    for name in _NEEDED:
        flags |= getattr(os, name, 0)
    return os.open(path, flags, _PRIVATE)


def try_log(path: Path) -> None:
    """Find out whether the file can be written, and whether there is room for it; leave nothing behind.

    Raises ``OSError``. Room is looked for beside the file, where that is allowed: nothing is written into a log to try.
    """
    there = path.exists()
    if there:
        os.close(open_log(path))
    try:
        with tempfile.TemporaryFile(dir=path.parent) as beside:
            beside.write(bytes(_BLOCK))
    except OSError as error:
        if not there or error.errno in _FULL:
            raise


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
        self._reopening = threading.Event()
        try_log(path)
        self._writer = Writer(self._append, report, pause=pause)

    def write(self, fields: Mapping[str, Any]) -> None:
        """Have one line appended."""
        self._writer.put(json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def reopen(self) -> None:
        """Have the file opened anew, as soon as the line in hand is written."""
        if not self._reopening.is_set():
            self._reopening.set()
            self._writer.wake()

    def status(self) -> dict[str, Any]:
        """Return the figures: lines that wait, lines that were lost, and why none can be written (None: they can)."""
        writer = self._writer
        return {"waiting": writer.waiting, "lost": writer.lost, "trouble": writer.trouble}

    def close(self, timeout: float) -> None:
        """Write what waits, in at most ``timeout`` seconds, and close the file."""
        if self._writer.close(timeout):
            self._shut()

    def _append(self, line: bytes) -> None:
        if self._reopening.is_set():
            self._reopening.clear()
            self._shut()
        try:
            file = self._current()
            whole = b"\n" + line if line and self._torn(file) else line
            if line and os.write(file, whole) < len(whole):
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
        cut, before = self._cut_at(file), 0
        while cut not in {0, before}:
            time.sleep(_GLANCE)  # another proxy may be in the midst of its line
            cut, before = self._cut_at(file), cut
        return cut > 0

    def _cut_at(self, file: int) -> int:
        """Return the size of a file that ends within a line, else 0."""
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            return 0
        try:
            with open(self._path, "rb", opener=_open) as reading:
                reading.seek(max(0, about.st_size - 1))
                return 0 if reading.read(1) in {b"\n", b""} else about.st_size
        except PermissionError:
            return about.st_size
        except OSError:  # it has just been moved away, and takes this line yet
            return 0

    def _shut(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
