"""What blocks leaves the event loop by a thread of its own, so that nobody waits for a disk, a pipe or a name server.

Owns the threads, and for lines that are written the queue and the count of what was lost. Must not know what is called,
what the lines hold or where they go. The threads are daemons: a call that never returns does not keep the program from
ending, as it would in one of the loop's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

KEPT: Final = 1000
"""Lines that wait at most; further ones are lost."""
PAUSE: Final = 1.0
"""Seconds from a write that failed to the next attempt."""


def in_thread(call: Callable[[], _T]) -> asyncio.Future[_T]:
    """Call in a thread; return a future of the running loop, which gets what it returns or raises."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def run() -> None:
        try:
            settle = functools.partial(done.set_result, call())
        except Exception as error:  # noqa: BLE001 - whatever it is, it must reach who waits in the loop
            settle = functools.partial(done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(lambda: done.done() or settle())

    threading.Thread(target=run, name="call", daemon=True).start()
    return done


class Writer:
    """Writes lines in their order. A line that can't be written is kept and tried again; nothing is ever raised."""

    def __init__(
        self,
        write: Callable[[bytes], None],
        report: Callable[[str | None], None],
        *,
        kept: int = KEPT,
        pause: float = PAUSE,
    ) -> None:
        """``write`` is called in the thread, with a line or (``wake``) none, and raises ``OSError`` where it failed.

        ``report`` is told, from either thread, once why lines can't be written, and once (None) that all are again.
        """
        self._write = write
        self._report = report
        self._kept = kept
        self._pause = pause
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._taken = self._written = self._refused = 0
        self.trouble: str | None = None
        """Why lines can't be written, while that is so."""

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
        if self._closing.is_set() or self.waiting >= self._kept:
            self._refused += 1
            self._note(self.trouble or "writing takes too long")
            return
        self._taken += 1
        self._hand_over(line)

    def wake(self) -> None:
        """Have ``write`` called once without a line, which takes no place and counts as none."""
        if not self._closing.is_set():
            self._hand_over(b"")

    def _hand_over(self, line: bytes) -> None:
        self._lines.put(line)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
            self._thread.start()

    def close(self, timeout: float) -> bool:
        """Write what waits, each line with one attempt more, for at most ``timeout`` seconds; return whether it ended.

        What could not be written counts as lost, and is reported.
        """
        self._closing.set()
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join(timeout)
        if self.waiting:
            self._report(f"{self.trouble or 'writing takes too long'}; lines lost at the end: {self.waiting}")
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            while not self._attempt(line) and not self._closing.is_set():
                self._closing.wait(self._pause)

    def _attempt(self, line: bytes) -> bool:
        try:
            self._write(line)
        except OSError as error:
            self._note(error.strerror or str(error))
            return False
        self._written += bool(line)
        if self._lines.empty():
            self._note(None)
        return True

    def _note(self, trouble: str | None) -> None:
        news = (trouble is None) != (self.trouble is None)
        self.trouble = trouble
        if news:
            self._report(trouble and f"{trouble}; {self._kept} lines are kept until that is mended, more are lost")
