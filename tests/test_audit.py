from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.audit import AuditLog, try_log, why_not
from tests.test_threads import soon

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Iterator

WRITE = {"method": "POST", "path": "/api/v1/customers", "status": 201}

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="file modes, pipes and renaming are POSIX's")


class Audit(AuditLog):
    """One whose lines can be waited for, and whose reports are remembered; it tries again at once."""

    def __init__(self, path: Path) -> None:
        self.reports: list[str | None] = []
        super().__init__(path, self.reports.append, pause=0.001)

    def wrote(self, fields: dict[str, object]) -> None:
        """Write a line, and wait until it is there."""
        self.write(fields)
        soon(lambda: not self.status()["waiting"])


def test_one_line_for_each_write(tmp_path: Path) -> None:
    """Each write is one line of JSON, appended to what is there."""
    path = tmp_path / "audit.log"
    path.write_text('{"old": 1}\n')
    audit = Audit(path)
    audit.write(WRITE)
    audit.write({**WRITE, "client": "Büro \udce9\n"})
    audit.close(5)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [{"old": 1}, WRITE] == [json.loads(line) for line in lines[:2]]
    assert 3 == len(lines)
    assert {"waiting": 0, "lost": 0, "trouble": None} == audit.status()


@posix_only
def test_rotation(tmp_path: Path) -> None:
    """After the file was renamed, the next line goes to a new one; a truncated one is continued."""
    path = tmp_path / "audit.log"
    audit = Audit(path)
    audit.wrote({"n": 1})
    path.rename(tmp_path / "audit.log.1")
    audit.wrote({"n": 2})
    assert '{"n": 1}\n' == (tmp_path / "audit.log.1").read_text()
    path.rename(tmp_path / "audit.log.2")
    path.touch()
    audit.wrote({"n": 3})
    assert '{"n": 3}\n' == path.read_text()
    os.truncate(path, 0)
    audit.wrote({"n": 4})
    assert '{"n": 4}\n' == path.read_text()
    audit.close(5)
    audit.close(5)


@posix_only
@pytest.mark.parametrize("instead", ["nothing", "pipe"])
def test_rotation_in_the_midst_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instead: str) -> None:
    """A file that is moved away just as it is looked at takes the line yet; that is no failure, and nothing waits."""
    path = tmp_path / "audit.log"
    audit = Audit(path)
    audit.wrote({"n": 1})
    real = os.path.samestat

    def samestat(*both: os.stat_result) -> bool:
        same = real(*both)
        path.rename(tmp_path / "audit.log.1")
        if instead == "pipe":
            os.mkfifo(path)
        return same

    with monkeypatch.context() as patched:
        patched.setattr(os.path, "samestat", samestat)
        audit.wrote({"n": 2})
    assert [] == audit.reports
    audit.close(5)
    assert '{"n": 1}\n{"n": 2}\n' == (tmp_path / "audit.log.1").read_text()


@posix_only
def test_reopened(tmp_path: Path) -> None:
    """Where it is asked for, the file is opened anew at once: whoever rotated it sees the new one there."""
    path = tmp_path / "audit.log"
    audit = Audit(path)
    path.rename(tmp_path / "audit.log.1")
    audit.reopen()
    soon(path.exists)
    audit.close(5)
    assert "" == path.read_text()


@posix_only
def test_private(tmp_path: Path) -> None:
    """The file is this user's alone: it says who did what."""
    audit = Audit(tmp_path / "audit.log")
    audit.close(5)
    assert 0o600 == stat.S_IMODE((tmp_path / "audit.log").stat().st_mode)


@posix_only
def test_what_can_not_be_written_is_told_at_once(tmp_path: Path) -> None:
    """A folder, a file in a folder that is not there and a pipe that nobody reads are refused, by ``try_log`` too."""
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "audit.log", "No such file or directory"),
        (tmp_path / "pipe", "nobody reads from this pipe; start its reader first"),
    ):
        for attempt in (Audit, try_log):
            with pytest.raises(OSError) as refused:  # noqa: PT011 - its text is judged below
                attempt(path)
            assert f"cannot write {path}: {why}" == why_not(path, refused.value)


@contextlib.contextmanager
def anybody() -> Iterator[None]:
    """Be a user without rights, also where the tests are run by root, who may write everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@posix_only
def test_what_may_not_be_written() -> None:
    """A file or a folder that this user may not write to is refused."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "file").touch(mode=0o400)
        (folder / "closed").mkdir(mode=0o500)
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        with anybody():
            for path in (folder / "file", folder / "closed" / "audit.log"):
                with pytest.raises(PermissionError):
                    Audit(path)
                with pytest.raises(PermissionError):
                    try_log(path)
            try_log(folder / "open" / "audit.log")


def test_trying_leaves_nothing_behind(tmp_path: Path) -> None:
    """To try a file neither makes it nor changes it."""
    path = tmp_path / "audit.log"
    try_log(path)
    assert [] == list(tmp_path.iterdir())
    path.write_text("x")
    try_log(path)
    assert ([path], "x") == (list(tmp_path.iterdir()), path.read_text())


def test_a_failure_stops_nothing(tmp_path: Path) -> None:
    """While the file can't be written lines are kept, with a report at the beginning and at the end."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "audit.log"
    audit = Audit(path)
    folder.rename(tmp_path / "moved")
    audit.write(WRITE)
    audit.write(WRITE)
    soon(lambda: audit.reports)
    assert {"waiting": 2, "lost": 0, "trouble": "No such file or directory"} == audit.status()
    folder.mkdir()
    soon(lambda: audit.reports[-1] is None)
    audit.close(5)
    assert [WRITE] * 2 == [json.loads(line) for line in path.read_text().splitlines()]
    assert 2 == len(audit.reports)


@posix_only
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """What was cut short stands on a line of its own, and the line is there as a whole once there is room again."""
    path, size = tmp_path / "audit.log", 1 << 30
    with path.open("wb") as file:  # so large that the bound below is no other file's
        file.seek(size - 1)
        file.write(b"\n")
    audit = Audit(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
    try:
        audit.write(WRITE)
        soon(lambda: audit.status()["trouble"] == "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    soon(lambda: not audit.status()["waiting"])
    audit.close(5)
    with path.open() as file:
        file.seek(size)
        assert f'{{"met\n{json.dumps(WRITE)}\n' == file.read()


def test_a_line_begins_on_a_line_of_its_own(tmp_path: Path) -> None:
    """Whatever the file ends in, and whoever wrote that."""
    path = tmp_path / "audit.log"
    path.write_text('{"torn": ')
    audit = Audit(path)
    audit.wrote({"n": 1})
    assert '{"torn": \n{"n": 1}\n' == path.read_text()
    with path.open("a") as other:
        other.write('{"other": ')
    audit.wrote({"n": 2})
    audit.close(5)
    assert '{"torn": \n{"n": 1}\n{"other": \n{"n": 2}\n' == path.read_text()


@posix_only
def test_a_pipe(tmp_path: Path) -> None:
    """A pipe is opened without waiting; a slow reader gets every line, and the next one what the last one missed."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    audit = Audit(path)
    for number in range(900):
        audit.write({"n": number, "filler": "x" * 200})  # more than a pipe holds
    got = b""
    while got.count(b"\n") < 900:
        try:
            got += os.read(reading, 65536)
        except BlockingIOError:
            time.sleep(0.001)  # lets the writer's thread run
    assert list(range(900)) == [json.loads(line)["n"] for line in got.splitlines()]
    assert [] == audit.reports
    os.close(reading)
    audit.write(WRITE)
    soon(lambda: audit.reports)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    soon(lambda: not audit.status()["waiting"])
    assert WRITE == json.loads(os.read(reading, 65536))
    audit.close(5)
    os.close(reading)


def test_several_proxies_share_a_file(tmp_path: Path) -> None:
    """Lines of two writers never mix."""
    path = tmp_path / "audit.log"
    audits = [Audit(path), Audit(path)]
    for number in range(400):
        audits[number % 2].write({"n": number, "filler": "x" * 3000})
    for audit in audits:
        audit.close(5)
    assert list(range(400)) == sorted(json.loads(line)["n"] for line in path.read_text().splitlines())
