from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from metquay_proxy.threads import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


def soon(condition: Callable[[], object]) -> None:
    """Wait until something holds that a thread brings about."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


class Outlet:
    """Takes lines, fails, or makes its caller wait, as it is told; remembers the reports."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.reports: list[str | None] = []
        self.error: OSError | None = None
        self.open = threading.Event()
        self.open.set()

    def write(self, line: bytes) -> None:
        """Take a line."""
        self.open.wait()
        if self.error is not None:
            raise self.error
        self.lines.append(line)


def refused(*_: object) -> None:
    """Start no thread, as a system does that has none to spare."""
    raise RuntimeError("can't start new thread")


FULL = OSError(28, "No space left on device")


def test_order() -> None:
    """Lines are written in their order, by a thread that was not there before, and closing waits for them."""
    out = Outlet()
    writer = Writer(out.write, out.reports.append)
    assert writer.close(1)
    writer = Writer(out.write, out.reports.append)
    for number in range(100):
        writer.put(b"%d" % number)
    assert writer.close(5)
    assert [b"%d" % number for number in range(100)] == out.lines
    assert (0, 0, []) == (writer.waiting, writer.lost, out.reports)


def written_together() -> tuple[int, int]:
    """Let four threads write the first line at once; return how many lines were written, and by how many threads."""
    writers: list[int] = []
    writer, barrier = Writer(lambda _: writers.append(threading.get_ident()), print), threading.Barrier(4)
    threads = [threading.Thread(target=lambda: (barrier.wait(), writer.put(b"x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.close(5)
    return len(writers), len(set(writers))


def test_lines_from_several_threads() -> None:
    """Each is written once, by one thread, also where all come with the first."""
    assert {(4, 1)} == {written_together() for _ in range(50)}


def test_nobody_waits_and_what_is_too_much_is_lost() -> None:
    """Behind a write that takes for ever so many lines are kept; further ones are lost, which is told once each way."""
    out = Outlet()
    out.open.clear()
    writer = Writer(out.write, out.reports.append, kept=3)
    for number in range(5):
        writer.put(b"%d" % number)
    assert (3, 2) == (writer.waiting, writer.lost)
    assert ["writing takes too long; 3 lines are kept until this is fixed, any more are lost"] == out.reports
    out.open.set()
    soon(lambda: len(out.reports) == 2)
    assert ([b"0", b"1", b"2"], None) == (out.lines, out.reports[1])
    writer.put(b"5")
    assert writer.close(5)
    assert (b"5", 2, 2) == (out.lines[-1], writer.lost, len(out.reports))


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tells something does not notice; the next line tries again, and both are written."""
    out = Outlet()
    writer = Writer(out.write, out.reports.append)
    with monkeypatch.context() as patch:
        patch.setattr("threading._start_new_thread", refused)
        writer.put(b"1")
    assert [] == out.lines
    writer.put(b"2")
    assert writer.close(5)
    assert [b"1", b"2"] == out.lines


def test_a_line_that_failed_is_tried_again() -> None:
    """Nothing is lost by a failure that is mended in time; it is told once, and once when all is written again."""
    out = Outlet()
    out.error = FULL
    writer = Writer(out.write, out.reports.append, pause=0.001)
    writer.put(b"a")
    writer.put(b"b")
    soon(lambda: writer.trouble)
    assert ("No space left on device", 0) == (writer.trouble, writer.lost)
    out.error = None
    soon(lambda: writer.trouble is None)
    assert [b"a", b"b"] == out.lines
    assert ["No space left on device; 1000 lines are kept until this is fixed, any more are lost", None] == out.reports
    assert writer.close(5)


def test_the_end() -> None:
    """At the end what failed has one attempt more; what comes later is lost."""
    out = Outlet()
    out.error = FULL
    writer = Writer(out.write, out.reports.append, pause=60)
    writer.put(b"a")
    soon(lambda: writer.trouble)
    writer.put(b"b")
    out.error = None
    assert writer.close(5)
    assert ([b"a", b"b"], 0) == (out.lines, writer.lost)
    writer.put(b"c")
    assert 1 == writer.lost


def test_the_end_of_what_can_not_be_written() -> None:
    """What fails at the end too is told in one line more, and does not hold the end up."""
    out = Outlet()
    out.error = FULL
    writer = Writer(out.write, out.reports.append, pause=60)
    for line in (b"a", b"b", b"c"):
        writer.put(line)
    soon(lambda: writer.trouble)
    assert writer.close(5)
    assert (3, "No space left on device; lines lost at the end: 3") == (writer.lost, out.reports[-1])
    assert 2 == len(out.reports)


def test_lines_are_gathered() -> None:
    """The first line leaves at once, what comes soon after it leaves together; the end waits for no more."""
    out = Outlet()
    writer = Writer(out.write, out.reports.append, pause=0.001, gather=60)
    writer.put(b"a")
    soon(lambda: out.lines)
    writer.put(b"b")
    writer.put(b"c")
    assert (2, 0) == (writer.waiting, writer.lost)
    assert writer.close(5)
    assert ([b"a", b"bc"], 0, 0) == (out.lines, writer.waiting, writer.lost)


def test_a_write_that_never_returns() -> None:
    """The end waits for no longer than it is told to, and what was not written is told."""
    out = Outlet()
    out.open.clear()
    writer = Writer(out.write, out.reports.append)
    writer.put(b"a")
    began = time.monotonic()
    assert not writer.close(0.05)
    assert time.monotonic() - began < 5
    assert (1, ["writing takes too long; lines lost at the end: 1"]) == (writer.lost, out.reports)
    out.open.set()
