from __future__ import annotations

import json
import os
import stat
import sys
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.audit import AuditLog

if TYPE_CHECKING:
    from pathlib import Path

WRITE = {"method": "POST", "path": "/api/v1/customers", "status": 201}


def test_one_line_for_each_write(tmp_path: Path) -> None:
    """Each write is one line of JSON, appended to what is there."""
    path = tmp_path / "audit.log"
    path.write_text('{"old": 1}\n')
    audit = AuditLog(path, lambda _: None)
    audit.write(WRITE)
    audit.write({**WRITE, "client": "Büro \udce9\n"})
    audit.close()
    lines = path.read_text().splitlines()
    assert [{"old": 1}, WRITE] == [json.loads(line) for line in lines[:2]]
    assert 3 == len(lines)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file can't be renamed on Windows")
def test_rotation(tmp_path: Path) -> None:
    """After the file was renamed, the next line goes to a new one; a truncated one is continued."""
    path = tmp_path / "audit.log"
    audit = AuditLog(path, lambda _: None)
    audit.write({"n": 1})
    path.rename(tmp_path / "audit.log.1")
    audit.write({"n": 2})
    assert '{"n": 1}\n' == (tmp_path / "audit.log.1").read_text()
    path.rename(tmp_path / "audit.log.2")
    path.touch()
    audit.write({"n": 3})
    assert '{"n": 3}\n' == path.read_text()
    os.truncate(path, 0)
    audit.write({"n": 4})
    assert '{"n": 4}\n' == path.read_text()
    audit.close()
    audit.close()


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX's")
def test_private(tmp_path: Path) -> None:
    """The file is this user's alone: it says who did what."""
    audit = AuditLog(tmp_path / "audit.log", lambda _: None)
    audit.write(WRITE)
    audit.close()
    assert 0o600 == stat.S_IMODE((tmp_path / "audit.log").stat().st_mode)


def test_a_failure_is_reported_once_and_stops_nothing(tmp_path: Path) -> None:
    """While the file can't be written lines are counted as lost, with a report at the beginning and at the end."""
    reports: list[str | None] = []
    folder = tmp_path / "later"
    audit = AuditLog(folder / "audit.log", reports.append)
    audit.write(WRITE)
    audit.write(WRITE)
    assert 2 == audit.lost
    assert 1 == len(reports)
    assert reports[0]
    folder.mkdir()
    audit.write(WRITE)
    assert None is reports[1]
    assert WRITE == json.loads((folder / "audit.log").read_text())
    audit.close()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full loses lines and says so; a line that was cut short is ended, and the next stands alone."""
    reports: list[str | None] = []
    path = tmp_path / "audit.log"
    audit = AuditLog(path, reports.append)
    real = os.write

    def full(_file: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    audit.write(WRITE)
    assert ["No space left on device"] == reports
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:5]))
    audit.write(WRITE)
    monkeypatch.setattr(os, "write", real)
    audit.write(WRITE)
    audit.close()
    assert 2 == audit.lost
    assert WRITE == json.loads(path.read_text().splitlines()[-1])
