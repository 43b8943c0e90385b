"""A body on its way: a stream with back-pressure, and what a request's body is besides, kept for a replay while small.

Owns the two bounds on kept bytes (one body, all together) and the time a client may be silent in mid-body. Must not
know where the bytes come from, nor where they go.

Facts: a stream can be read once, so that a body can be sent again only while all that was read of it is kept. RFC 9110
section 15.5.9: 408 is the answer to a client that falls silent.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Self

from metquay_proxy.rules.errors import ProxyError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import AsyncGenerator, Callable

    Tell = Callable[[Any], object]

HIGH_WATER: Final = 32 * 1024
"""Bytes that may wait for their reader before the sender is held up."""
_SMALL: Final = 4096
"""Bytes; what is smaller is joined to what came before, since each piece costs some 40 bytes beside its own."""


class Stream:
    """A body that arrives piece by piece from one of the two sides, for one reader, with back-pressure.

    ``arrived``: its last byte has come, read or not. ``held_up``: the sender was told to wait for the reader.
    """

    def __init__(self, hold_up: Tell = bool, give_up: Tell = bool, loop: AbstractEventLoop | None = None) -> None:
        """``hold_up`` is called with True where the sender is to stop sending, and with False where it may go on.

        ``give_up`` is called where what has not arrived is wanted no more. ``loop`` is the running one, which costs a
        system call to find out before Python 3.12.
        """
        self._loop = loop
        self._hold_up = hold_up
        self._give_up = give_up
        self._data = b""
        self.arrived = self.held_up = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    def of(cls, data: bytes = b"") -> Self:
        """Make one that has arrived whole; without ``data`` it is no body at all."""
        stream = cls()
        stream.feed(data, last=True)
        return stream

    @property
    def ended(self) -> bool:
        """Whether the last byte was read."""
        return self.arrived and not self._data

    @property
    def ready(self) -> bool:
        """Whether something can be read now, if only the end."""
        return self.arrived or bool(self._data)

    def feed(self, piece: bytes, *, last: bool = False) -> None:
        """Take a piece, maybe an empty one; with the ``last`` one all has come."""
        self._data += piece
        if last:
            self.arrived = True
            if self.held_up:
                self._hold(up=False)
        elif len(self._data) > HIGH_WATER and not (self.held_up or self.arrived):
            self._hold(up=True)
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def unread(self, data: bytes) -> None:
        """Put back what was read, in front of all else."""
        self._data = data + self._data
        if len(self._data) > HIGH_WATER and not (self.held_up or self.arrived):
            self._hold(up=True)

    def end(self) -> None:
        """Note that all of it has come."""
        self.feed(b"", last=True)

    def fail(self, error: Exception) -> None:
        """Note that no more will come; the first error counts, and none does once all has come."""
        if self._error is None and not self.arrived:
            self._error = error
        self.feed(b"")

    def close(self) -> None:
        """Give up what has not arrived; it may be called again, but nothing may be read any more."""
        if not self.arrived:
            self._give_up(self)
            self._error = None  # it holds the frames that were told of it, and they this

    def read_nowait(self) -> bytes:
        """Return what has come, maybe nothing."""
        data, self._data = self._data, b""
        if self.held_up:
            self._hold(up=False)
        return data

    async def read(self) -> bytes:
        """Wait for what comes, and return it; empty at the end. Raises what ``fail`` was given."""
        while not self.ready:
            await self.news()
        return self.read_nowait()

    def news(self) -> asyncio.Future[None]:
        """Return what is to be awaited for the next news; raise what ``fail`` was given."""
        if self._error is not None:
            raise self._error
        waiter = self._waiter = asyncio.Future(loop=self._loop)
        return waiter

    def _hold(self, *, up: bool) -> None:
        self.held_up = up
        self._hold_up(up)


class ReplayBudget:
    """The bytes that all bodies together may keep: ``left`` are never fewer than none."""

    def __init__(self, total: int) -> None:
        """``total`` is in bytes."""
        self.left = total


class RequestBody:
    """One request's body.

    ``replayable``: another attempt can send it from the beginning. ``chunked``: it came without a length.
    """

    def __init__(self, source: Stream, *, chunked: bool, limit: int, budget: ReplayBudget, timeout: float) -> None:
        """``limit`` is in bytes, ``timeout`` in seconds of silence; a ``source`` that has ended is no body."""
        self.replayable = True
        self._source = source
        self._limit = limit
        self._budget = budget
        self._timeout = timeout
        self._kept: list[bytes] = []
        self._size = 0
        self.chunked = chunked

    @property
    def ended(self) -> bool:
        """Whether the whole body was read."""
        return self._source.ended

    @property
    def arrived(self) -> bool:
        """Whether the client has sent all of it, read or not."""
        return self._source.arrived

    def whole(self) -> bytes | None:
        """Return the complete body if it has arrived, for one attempt to send in one piece, else None; never waits.

        Raises ``RuntimeError`` where it is not replayable any more.
        """
        self._check_replayable()
        pieces = self._kept
        if not self.ended:
            if not self._source.arrived:
                return None
            self._keep(self._source.read_nowait())
        if len(pieces) > 1:
            pieces[:] = [b"".join(pieces)]
        return pieces[0] if pieces else b""

    async def prefetch(self) -> None:
        """Read ahead what may be kept while the request waits, so that a client that leaves is noticed."""
        while self.replayable and not self.ended:
            piece = await self._read()
            if len(piece) > self._room:
                self._source.unread(piece)
                return
            self._keep(piece)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the body from its beginning, in pieces that are never empty.

        Raises ``ProxyError`` request-timeout where the client falls silent, ``RuntimeError`` where the body is not
        replayable any more.
        """
        self._check_replayable()
        for chunk in tuple(self._kept):
            yield chunk
        while not self.ended:
            chunk = await self._read()
            self._keep(chunk)
            if chunk:
                yield chunk

    async def keep(self) -> None:
        """Read all of it, so that ``whole`` returns it, before it is sent.

        Raises ``ProxyError`` body-too-large where it is longer than may be kept, idempotency-full where there is too
        little room beside what others keep, and what ``chunks`` raises.
        """
        await self.prefetch()
        if self.ended:
            return
        too_large = self._limit - self._size <= self._budget.left
        self.close()  # at once, so that another one has room
        if too_large:
            msg = f"The body of this request is larger than {self._limit} bytes, more than the proxy can keep."
            cure = "Send a smaller one, or raise METQUAY_REPLAY_LIMIT if it has an Idempotency-Key."
            raise ProxyError("body-too-large", f"{msg} Nothing was sent. {cure}")
        msg = "The proxy already keeps as many bodies as it can. Nothing was sent; send it again in a few seconds."
        raise ProxyError("idempotency-full", msg, retry_after=5)

    async def all(self, limit: int) -> bytes:
        """Return the complete body to who answers here: with a limit of its own (bytes), and beside what others keep.

        Raises what ``keep`` does, of its bounds body-too-large alone. Nothing must have been read before.
        """
        self._limit, self._budget = limit, ReplayBudget(limit)
        await self.keep()
        return self.whole() or b""

    def close(self) -> None:
        """Forget the kept bytes; from here on no other attempt can send them."""
        self._budget.left += self._size
        self._size = 0
        self._kept = []
        self.replayable = False

    def _check_replayable(self) -> None:
        if not self.replayable:
            raise RuntimeError("the body was not kept: another attempt would send only a part of it")

    async def _read(self) -> bytes:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._source.read()
        except TimeoutError:
            msg = (
                f"The tool stopped sending this request's body: nothing came for {self._timeout:g} s. "
                "The request was dropped; send it again."
            )
            raise ProxyError("request-timeout", msg) from None

    @property
    def _room(self) -> int:
        """How many bytes more may be kept."""
        return min(self._limit - self._size, self._budget.left)

    def _keep(self, chunk: bytes) -> None:
        """Keep what goes out now; from the first piece on for which there is no room, nothing is kept any more."""
        if chunk and self.replayable:
            if self._kept and len(self._kept[-1]) < _SMALL:
                self._kept[-1] += chunk
            else:
                self._kept.append(chunk)
            self._size += len(chunk)
            self._budget.left -= len(chunk)
            if self._room < 0:
                self.close()


class _NoBody(RequestBody):
    """That of all requests which have none: it is there, and can be sent again, for ever."""

    def __init__(self) -> None:
        self.replayable, self.chunked = True, False

    ended = arrived = True

    def whole(self) -> bytes:
        """Return nothing."""
        return b""

    def close(self) -> None:
        """Do nothing."""


NO_BODY: Final = _NoBody()
