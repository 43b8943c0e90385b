"""What blocks leaves the event loop by a thread of its own, so that nobody waits for a disk, a pipe or a name server.

Owns the threads, and for lines that are written the queue and the count of what was lost. Must not know what is called,
what the lines hold or where they go. The threads are daemons: a call that never returns does not keep the program from
ending, as it would in one of the loop's own.

Facts: a finalizer may log in the midst of ``put``, and of the queues only ``SimpleQueue`` may be entered again there.
Python changes threads at calls and jumps, never within ``+= 1``.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_GLANCE: Final = 0.002
"""Seconds from one look whether all is written to the next."""
_T = TypeVar("_T")


def in_thread(call: Callable[[], _T]) -> asyncio.Future[_T]:
    """Call in a thread; return a future of the running loop, which gets what it returns or raises."""
    done: Future[_T] = Future()
    done.set_running_or_notify_cancel()  # who no longer waits leaves the thread a future that it can settle

    def run() -> None:
        try:
            done.set_result(call())
        except Exception as error:  # noqa: BLE001 - whatever it is, it must reach who waits in the loop
            done.set_exception(error)

    threading.Thread(target=run, name="call", daemon=True).start()
    return asyncio.wrap_future(done)


@dataclass(eq=False)
class Writer:
    """Writes lines in their order. What can't be written is kept and tried again; nothing is ever raised.

    Lines may come from any thread.
    """

    write: Callable[[bytes], None]
    """Called in the thread, with a line; raises ``OSError`` where it failed, and then gets the same again."""
    report: Callable[[str | None], None]
    """Called from either thread: once with why lines can't be written, and once with None when all are again."""
    kept: int = 1000
    """Lines that wait at most; further ones are lost."""
    pause: float = 1.0
    """Seconds from a write that failed to the next attempt."""
    gather: float = 0.0
    """Seconds from one write to the next, which then is of all lines that wait; 0: each line is written by itself."""
    trouble: str | None = field(default=None, init=False)
    """Why lines can't be written, while that is so."""

    def __post_init__(self) -> None:
        """Begin; the thread starts with the first line."""
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._to_start, self._closing, self._hurry = iter([self._thread]), threading.Event(), threading.Event()
        self._taken = self._written = self._refused = 0

    @property
    def waiting(self) -> int:
        """How many lines are yet to be written."""
        return self._taken - self._written

    @property
    def lost(self) -> int:
        """How many lines were not written and never will be."""
        return self._refused + (self.waiting if self._closing.is_set() else 0)

    def put(self, line: bytes) -> None:
        """Take a line; it is lost where too many wait already, or after ``close``. Returns at once."""
        if self._closing.is_set() or self.waiting >= self.kept:
            self._refused += 1
            self._note(self.trouble or "writing takes too long")
            return
        self._taken += 1
        self._lines.put(line)
        for thread in self._to_start:  # taken from there in one operation, whoever comes at the same time
            try:
                thread.start()
            except RuntimeError:  # there is none to be had: the next line tries again
                self._to_start = iter([thread])

    def flush(self, timeout: float) -> None:
        """Wait until what was put before is written, for at most ``timeout`` seconds."""
        until = time.monotonic() + timeout
        self._hurry.set()
        while self.waiting and time.monotonic() < until:
            time.sleep(_GLANCE)
        self._hurry.clear()

    def close(self, timeout: float) -> bool:
        """Write what waits, for at most ``timeout`` seconds and until that fails; return whether the thread ended.

        What could not be written counts as lost, and is reported.
        """
        self._closing.set()
        self._hurry.set()
        if self._thread.ident is None:
            return True
        self._lines.put(b"")  # it may be waiting for one
        self._thread.join(timeout)
        if self.waiting:
            self.report(f"{self.trouble or 'writing takes too long'}; lines lost at the end: {self.waiting}")
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not (self._closing.is_set() and self._lines.empty()):
            lines = [self._lines.get()]
            lines += [self._lines.get() for _ in range(self._lines.qsize() if self.gather else 0)]
            while any(lines) and not self._attempt(lines):
                if self._closing.is_set():
                    return
                self._closing.wait(self.pause)
            self._hurry.wait(self.gather)

    def _attempt(self, lines: list[bytes]) -> bool:
        try:
            self.write(b"".join(lines))
        except OSError as error:
            self._note(error.strerror or str(error))
            return False
        self._written += len(lines) - lines.count(b"")
        if self._lines.empty():
            self._note(None)
        return True

    def _note(self, trouble: str | None) -> None:
        news = (trouble is None) != (self.trouble is None)
        self.trouble = trouble
        if news:
            self.report(trouble and f"{trouble}; {self.kept} lines are kept until this is fixed, any more are lost")
