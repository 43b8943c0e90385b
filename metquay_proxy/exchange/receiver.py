"""What the connections of both sides have in common: how many bytes they read at once.

Owns that bound, the greatest part of what connections hold in memory. One by itself reads as much as event loops do;
where there are many, each reads less at once.

Facts: asyncio and uvloop read up to 256 KiB at once, unless a ``BufferedProtocol`` names the place. A loop asks for
that place, fills it and says so without doing anything else in between, so that its connections can share it. Memory
that is mapped takes up no more than what was once written there.
"""

from __future__ import annotations

import asyncio
import mmap
import threading
from typing import Final

AT_ONCE: Final = 256 * 1024
"""Bytes that a connection reads at once at most;"""
IN_ALL: Final = 8 * 1024 * 1024
"""and no more than its part of these, if all that were there when it came had the same part."""


class _Shared(threading.local):
    """The place; another loop, which runs in another thread, has another."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, AT_ONCE)


_SHARED: Final = _Shared()
_OPEN: Final[set[Receiver]] = set()


class Receiver(asyncio.BufferedProtocol):
    """A protocol that gets its bytes in pieces, of a size that depends on how many such protocols there are."""

    def connection_made(self, _transport: asyncio.BaseTransport) -> None:
        """Begin: it counts from here to its loss."""
        _OPEN.add(self)
        self._memory = _SHARED.memory
        self._place = memoryview(self._memory)[: IN_ALL // len(_OPEN)]

    def connection_lost(self, _exc: Exception | None) -> None:
        """End."""
        _OPEN.discard(self)

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Name the place."""
        return self._place

    def buffer_updated(self, nbytes: int) -> None:
        """Take the bytes out of it."""
        self.data_received(self._memory[:nbytes])

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        raise NotImplementedError
