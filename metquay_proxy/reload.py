"""The files that settings name, read again while the program runs: certificates, CAs, keys.

Owns when they are looked at, what counts as a change, and that what can't be used changes nothing. Must not know what
is in them: each ``Source`` makes something of its files and hands it to whoever uses it. What reads or parses runs in a
thread, what hands over in the event loop.

Facts: Kubernetes changes a mounted secret by a symlink to another folder: contents are compared, not names or times.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from metquay_proxy.log import log
from metquay_proxy.sources import read_file
from metquay_proxy.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from pathlib import Path

    import structlog

_T = TypeVar("_T")

INTERVAL: Final = 60.0
"""Seconds from one look to the next; Windows has no signal that could ask for one."""
SETTLED: Final = 2.0
"""Seconds for which a file must not have changed, unless a signal says that all are complete."""

_TRIES: Final = 5
"""How often files are read that change meanwhile, where a signal says that all are complete."""


@dataclass(frozen=True)
class _Content:
    """A digest of a file, or why it can't be read."""

    digest: bytes = b""
    error: str = ""
    ended: bool = False
    """Whether its last line has an end."""
    at: float = field(default=0.0, compare=False)
    """When it was changed, by the wall clock."""
    version: tuple[int, int] = field(default=(0, 0), compare=False)
    """What is another one after a change, even after one that was undone."""


@dataclass
class Source(Generic[_T]):
    """Files that belong together, and what is made of them.

    ``make`` runs in a thread and raises ``OSError`` or ``ValueError`` with a text that holds no secret. ``take`` runs
    in the event loop and returns what it took, for the log, where ``names`` do not say enough.
    """

    names: str
    """The settings that name the files."""
    files: Sequence[Path]
    make: Callable[[], _T]
    take: Callable[[_T], str | None]
    lines: bool = False
    """Whether the files are lists of lines: one that has lost its last line's end may be half-written."""
    seen: list[_Content] = field(init=False)
    used: list[_Content] = field(init=False)
    doubtful: bool = field(default=True, init=False)
    """Whether what is in use may have been made of something else: at first, and where a file has just changed."""
    told: str = field(default="", init=False)
    """The fault that was told last."""
    look: asyncio.Future[list[_T]] | None = field(default=None, init=False)
    """A look in its thread, whose outcome nobody had yet."""

    def __post_init__(self) -> None:
        """Take the files as they are for those that are in use; the first look makes sure of it."""
        self.seen = self.used = [_content(file) for file in self.files]

    async def renew(self, now: float, bound: float, *, asked: bool) -> list[str]:
        """Look at the files in a thread, and hand over what is made of them; return what of it is news, for the log.

        Raises whatever ``make`` and ``take`` raise, and ``TimeoutError`` after ``bound`` seconds; that look goes on.
        """
        look = self.look = self.look or in_thread(lambda: self._made(now, asked=asked))
        await asyncio.wait([look], timeout=bound)
        if not look.done():
            raise TimeoutError("could not be read in time")
        self.look = None
        news = []
        for made in look.result():
            taken = self.take(made) or self.names
            news += [taken] if self.seen != self.used else []
            self.used, self.told = self.seen, ""
        return news

    def fails(self, error: Exception) -> bool:
        """Take note of what ``renew`` raised; return whether it has yet to be told."""
        self.doubtful = isinstance(error, OSError)
        known = isinstance(error, (OSError, ValueError))
        before, self.told = self.told, str(error) if known else f"unexpected {type(error).__name__}"
        return before != self.told

    def _made(self, now: float, *, asked: bool) -> list[_T]:
        """Return what is made of the files if that may be another one than what is in use. Blocks."""
        found = [_content(file) for file in self.files]
        settled = all(abs(now - content.at) >= SETTLED for content in found)
        if (found == self.seen and not self.doubtful) or not (asked or settled):
            return []
        if found != self.seen:
            self.seen, self.told = found, ""
        for _ in range(_TRIES if asked else 1):
            for file, content in zip(self.files, self.seen, strict=True):
                if content.error:
                    raise ValueError(f"{file}: {content.error}")
            made = self.make()
            if self.lines and any(was.ended > now.ended for was, now in zip(self.used, self.seen, strict=True)):
                raise ValueError("the last line has lost its end: it may be half-written; end it with a line break")
            before, self.seen = self.seen, [_content(file) for file in self.files]
            if [(each, each.version) for each in before] == [(each, each.version) for each in self.seen]:
                self.doubtful = not settled
                return [made]
        raise OSError("they were changed while they were read")


def _content(file: Path) -> _Content:
    try:
        data, about = read_file(file)
        version = (about.st_ino, about.st_ctime_ns)
        return _Content(hashlib.sha256(data).digest(), "", data.endswith(b"\n"), about.st_mtime, version)
    except OSError as error:
        return _Content(error=error.strerror or str(error))


@dataclass(kw_only=True)
class Reload:
    """Looks at all sources once a minute, and whenever it is asked to."""

    sources: Sequence[Source[Any]] = field(kw_only=False)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    """Takes seconds."""
    wall_clock: Callable[[], float] = time.time
    """By which files are dated."""
    bound: float = 10.0
    """Seconds that reading may take: a file system that hangs must not end all later looks."""
    log: structlog.stdlib.BoundLogger = log
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    def start(self) -> None:
        """Begin to look once a minute; needs the running loop."""
        if any(source.files for source in self.sources):
            self._begin(self._watch())

    def now(self) -> asyncio.Task[None]:
        """Look now, because somebody says that the files are complete."""
        return self._begin(self.look(asked=True))

    def close(self) -> None:
        """Look no more."""
        for task in self._tasks:
            task.cancel()

    async def look(self, *, asked: bool = False) -> None:
        """Read what has changed and hand it over; one log line for all that changed, and one for each fault.

        Unless it was ``asked`` for, what has only just been changed is left for the next look: it may be half-written.
        """
        async with self._looking:
            changed = []
            for source in (each for each in self.sources if each.files):
                try:
                    changed += await source.renew(self.wall_clock(), self.bound, asked=asked)
                except Exception as error:  # noqa: BLE001 - whatever it is, the next look must find it mended
                    if source.fails(error):
                        told = "files can't be used: the values read before stay in force"
                        self.log.error(told, settings=source.names, reason=source.told)  # noqa: TRY400 - one line, of no bug
            if asked or changed:
                faulty = [source.names for source in self.sources if source.told or source.seen != source.used]
                self.log.info("files were read again", changed=changed, not_used=faulty)

    async def _watch(self) -> None:
        while True:
            await self.sleep(INTERVAL)
            await self.look()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
