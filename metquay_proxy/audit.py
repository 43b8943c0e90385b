"""The audit log: one JSON line for each write, for whoever must say later who changed what.

Owns the file. Must not see bodies, keys or query values: it is handed the fields of a line. A line is appended by one
write to a file opened with O_APPEND (POSIX: the offset is set to the end before each write), so that several proxies
may share a file and rotation by rename or by truncation loses nothing.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_PRIVATE: Final = 0o600


class AuditLog:
    """Appends lines to a file that may be moved away at any time; a disk that is full stops no request."""

    def __init__(self, path: Path, report: Callable[[str | None], None]) -> None:
        """``report`` is told once why lines are being lost, and once (None) that they are written again."""
        self._path = path
        self._report = report
        self._file: int | None = None
        self._failing = False
        self.lost = 0

    def write(self, fields: Mapping[str, Any]) -> None:
        """Append one line; a failure is counted in ``lost`` and reported, never raised."""
        line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            written = os.write(self._open(), line)
            if written < len(line):
                os.write(self._open(), b"\n")
                raise OSError(0, "only part of a line could be written")
        except OSError as error:
            self.lost += 1
            if not self._failing:
                self._failing = True
                self._report(error.strerror or str(error))
            self.close()
            return
        if self._failing:
            self._failing = False
            self._report(None)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        """Return the file, opened anew where it was rotated away."""
        if self._file is not None:
            try:
                there = self._path.stat()
            except FileNotFoundError:
                self.close()
            else:
                if not os.path.samestat(there, os.fstat(self._file)):
                    self.close()
        if self._file is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            self._file = os.open(self._path, flags, _PRIVATE)
        return self._file
