"""The files that settings name, read again while the program runs: certificates, CAs, keys.

Owns when they are looked at, what counts as a change, and that what can't be used changes nothing. Must not know what
is in them: each ``Source`` makes something of its files and hands it to whoever uses it. What reads or parses runs in a
thread, what hands over in the event loop.

Facts: a certificate and a key that don't belong together, loaded into a context in use, make every later handshake
fail (OpenSSL keeps the halves). OpenSSL asks for the context of each handshake, with a server name or without
(SSL_CTX_set_tlsext_servername_callback), so that listeners need not be opened anew. Kubernetes changes a mounted secret
by a symlink to another folder: contents are compared, not names or times.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import ssl
import stat
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import structlog

from metquay_proxy.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from pathlib import Path

_T = TypeVar("_T")

INTERVAL: Final = 60.0
"""Seconds from one look to the next; Windows has no signal that could ask for one."""
SETTLED: Final = 2.0
"""Seconds for which a file must not have changed, unless a signal says that all are complete."""

_TRIES: Final = 5
"""How often files are read that change meanwhile, where a signal says that all are complete."""
BOUND: Final = 10.0
"""Seconds that reading may take: a file system that hangs must not end all later looks."""
_LATE: Final = "could not be read in time"

log: structlog.stdlib.BoundLogger = structlog.get_logger("metquay_proxy")


def serving_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a new context that serves with this pair; raise ``OSError``, or ``ValueError`` with a text for people."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError:
        msg = f"{key} is not the private key, in PEM form and without a password, of the certificate in {certificate}"
        raise ValueError(msg) from None
    return context


def read_file(path: Path) -> tuple[bytes, os.stat_result]:
    """Return what an ordinary file holds, and what is known about it; waits for no pipe. Raises ``OSError``."""
    with open(path, "rb", opener=_at_once) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "is no ordinary file", str(path))
        return file.read(), about


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class Serving:
    """The context of all listeners, whose certificate is another one as soon as ``use`` was called."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = self._current = context
        context.sni_callback = self._choose

    def use(self, context: ssl.SSLContext) -> None:
        """Serve new handshakes with the certificate of ``context``."""
        self._current = context

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str, _asked: ssl.SSLContext) -> None:
        connection.context = self._current


@dataclass
class Source(Generic[_T]):
    """Files that belong together, and what is made of them.

    ``make`` runs in a thread and raises ``OSError`` or ``ValueError`` with a text that holds no secret. ``take`` runs
    in the event loop and returns what it took, for the log.
    """

    names: str
    """The settings that name the files."""
    files: Sequence[Path]
    make: Callable[[], _T]
    take: Callable[[_T], str]
    lines: bool = False
    """Whether the files are lists of lines: one that has lost its last line's end may be half-written."""
    seen: list[_Content] = field(init=False)
    used: list[_Content] = field(init=False)
    doubtful: bool = field(default=True, init=False)
    """Whether what is in use may have been made of something else: at first, and where a file has just changed."""
    told: str = field(default="", init=False)
    """The fault that was told last."""

    def __post_init__(self) -> None:
        """Take the files as they are for those that are in use; the first look makes sure of it."""
        self._reading = threading.Lock()
        self.seen = self.used = self.read()

    def read(self) -> list[_Content]:
        """Look at the files; blocks, but where an earlier call still waits for them."""
        if not self._reading.acquire(blocking=False):
            return self.late()
        try:
            return [_content(file) for file in self.files]
        finally:
            self._reading.release()

    def late(self) -> list[_Content]:
        """Return what is known of files that nobody could read in time."""
        return [_Content(error=_LATE) for _ in self.files]


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


def _content(file: Path) -> _Content:
    try:
        data, about = read_file(file)
        digest, version = hashlib.sha256(data).digest(), (about.st_ino, about.st_ctime_ns)
        return _Content(digest, ended=data.endswith(b"\n"), at=about.st_mtime, version=version)
    except FileNotFoundError:
        return _Content(error="there is no such file")
    except OSError as error:
        return _Content(error=error.strerror or str(error))


class Reload:
    """Looks at all sources once a minute, and whenever it is asked to."""

    def __init__(
        self,
        sources: Sequence[Source[Any]],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        wall_clock: Callable[[], float] = time.time,
        bound: float = BOUND,
    ) -> None:
        """``sleep`` takes seconds; ``wall_clock`` is the one by which files are dated; ``bound`` is for reading."""
        self._sources = [source for source in sources if source.files]
        self._sleep = sleep
        self._wall_clock = wall_clock
        self._bound = bound
        self._looking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to look once a minute; needs the running loop."""
        if self._sources:
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
            for source in self._sources:
                found = await self._read(source)
                settled, news = self._settled(found), found != source.seen
                if not (news or source.doubtful) or not (asked or settled):
                    continue
                source.seen = found
                try:
                    made, source.seen = await self._in_time(partial(_made, source, found, _TRIES if asked else 1))
                    taken = source.take(made)
                    if source.seen != source.used:
                        changed.append(taken)
                    source.used, source.doubtful, source.told = source.seen, not settled, ""
                except Exception as error:  # noqa: BLE001 - whatever it is, the next look must find it mended
                    source.doubtful, reason = isinstance(error, OSError), _why(error)
                    if news or reason != source.told:
                        told = "files were changed and can't be used: what was read before stays in force"
                        log.error(told, settings=source.names, reason=reason)  # noqa: TRY400 - one line, of no bug
                    source.told = reason
            if asked or changed:
                faulty = [source.names for source in self._sources if source.seen != source.used]
                log.info("files were read again", changed=changed, not_used=faulty)

    async def _read(self, source: Source[Any]) -> list[_Content]:
        try:
            return await self._in_time(source.read)
        except TimeoutError:
            return source.late()

    async def _in_time(self, call: Callable[[], _T]) -> _T:
        async with asyncio.timeout(self._bound):
            return await in_thread(call)

    async def _watch(self) -> None:
        while True:
            await self._sleep(INTERVAL)
            await self.look()

    def _settled(self, found: list[_Content]) -> bool:
        now = self._wall_clock()
        return all(abs(now - content.at) >= SETTLED for content in found)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _made(source: Source[_T], found: list[_Content], tries: int) -> tuple[_T, list[_Content]]:
    """Return what was made of the files, and what they held before and after that."""
    for _ in range(tries):
        for file, content in zip(source.files, found, strict=True):
            if content.error:
                raise ValueError(f"{file}: {content.error}")
        made = source.make()
        if source.lines and any(was.ended > now.ended for was, now in zip(source.used, found, strict=True)):
            msg = "the last line has no end any more, as though it were half-written; end it with a line break"
            raise ValueError(msg)
        before, found = found, source.read()
        if [(each, each.version) for each in before] == [(each, each.version) for each in found]:
            return made, found
    msg = "they were changed while they were read"
    raise OSError(msg)


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return _LATE
    return str(error) if isinstance(error, (OSError, ValueError)) else f"unexpected {type(error).__name__}"
