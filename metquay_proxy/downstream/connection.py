"""One client's connection: bytes in, one request at a time to whoever serves it; bytes out, and whether they went.

Owns the reading of requests, their order, back-pressure in both directions and the bounds of time. Must not know a
rule: who serves is handed in.

Facts: RFC 9112 section 9.3.2 (pipelining: answers go out in the order of the requests), 9.6 (to close while the client
is still sending would reset the connection, and the reset could overtake the answer); RFC 9110 section 10.1.1 (Expect),
15.5.9 (408).
While reading is paused, nobody hears that the client has left. uvloop raises ``RuntimeError`` where a transport that is
closed is written to, paused or resumed. On Python 3.11 a task that is cancelled before its first step never runs, its
``finally`` included.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import select
import socket
import struct
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final, Protocol, cast

from metquay_proxy.exchange.body import Stream
from metquay_proxy.exchange.receiver import Receiver
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.http1 import RequestReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from metquay_proxy.rules.http1 import RequestHead, RequestsMemory

_HIGH_WATER: Final = 32 * 1024
"""Bytes of answers that may wait for the client before whoever writes them must."""
_CLOSED: Final = getattr(select, "POLLRDHUP", 0)
"""What poll(2) calls a peer that has closed its side; only Linux knows that."""
_NO_BODY: Final = Stream.of()

if sys.version_info >= (3, 12):
    _task: Final = partial(asyncio.Task, eager_start=True)  # what need not wait leaves in the call in which it came
else:
    _task: Final = asyncio.Task


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may take of time, in seconds.

    ``head``: for a request's head, from its first byte, and for a new connection's first byte; ``idle``: between
    requests; ``linger``: how long a refused client may go on sending, so that it finds time to read the refusal;
    ``silence``: in which nothing of an answer is taken.
    """

    head: float = 15.0
    idle: float = 120.0
    linger: float = 2.0
    silence: float = 60.0


class Serving(Protocol):
    """Who serves what comes in on connections."""

    async def serve(self, client: ClientConnection, head: RequestHead, body: Stream, /) -> None:
        """Answer one request, whatever happens, and tell ``client`` by ``served``."""

    def left(self, client: ClientConnection, task: asyncio.Task[None], /) -> None:
        """The client has left: cancel the task that serves its request, or let it run on."""

    def refuse(self, client: ClientConnection, error: ProxyError, /) -> None:
        """Answer what was no request."""


class ClientConnection(Receiver):
    """The protocol of one connection.

    ``full``: the client takes its answers too slowly, so that whoever writes must wait for ``drained``. ``gone``: it
    has left. ``address``: the client's, where that is another machine.
    """

    transport: asyncio.Transport
    address: str | None = None
    _drained: asyncio.Future[None] | None = None
    _unsent = 0
    """Bytes that had not been taken when somebody last looked,"""
    _moved = 0.0
    """and when some were taken last."""

    def __init__(  # noqa: PLR0913 - who serves, and the bounds
        self,
        serving: Serving,
        bounds: Bounds,
        memory: RequestsMemory,
        make_helper: Callable[[], asyncio.Protocol],
        on_made: Callable[[ClientConnection], object],
        on_gone: Callable[[ClientConnection], object],
    ) -> None:
        """``on_made`` and ``on_gone`` are called once each, when it is open and when it has ended.

        ``make_helper`` makes the protocol that ``hand_over`` hands over to.
        """
        self._serving = serving
        self._bounds = bounds
        self._reader = RequestReader(memory)
        self._make_helper = make_helper
        self._on_made = on_made
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._deadline = math.inf
        self.busy = self.full = self.gone = self._in_head = self._paused = False
        self._task: asyncio.Task[None] | None = None
        self._stream: Stream | None = None
        """The body of the request that is being served, while it is arriving."""
        self._helper: asyncio.Protocol | None = None
        """Who answers the request that is being served, if it was handed over."""
        self._answered = False
        """The next request waits until the answer to this one has been taken."""
        self._deaf = False
        """What still comes is not read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, and give the client its time for the first byte."""
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH_WATER)
        self.address = remote(transport.get_extra_info("peername"))
        self._deadline = self._loop.time() + self._bounds.head
        self._on_made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End: what is being served has lost its client."""
        super().connection_lost(exc)
        self.gone = True
        self._wake()
        if self._helper is not None:
            self._helper.connection_lost(exc)
        if self._stream is not None:
            self._stream.fail(ConnectionResetError())
        if self._task is not None:
            self._serving.left(self, self._task)
        self._on_gone(self)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if self._deaf:
            return
        try:
            piece = self._reader.feed(data)
        except ProxyError as error:
            self._deaf = True
            if self._stream is None:
                self._refuse(error)
            else:
                self._stream.fail(error)
            return
        if not self.busy:
            self._begin(piece)
        elif self._stream is not None:
            if piece:
                self._stream.feed(piece)
            if self._reader.complete:
                self._stream.end()
                self._stream = None
        elif self._reader.held:
            self._hold_up(True)  # noqa: FBT003 - its one argument

    def pause_writing(self) -> None:
        """Note that the client is slower than what it asked for."""
        self.full = True
        if self._helper is not None:
            self._helper.pause_writing()

    def resume_writing(self) -> None:
        """Note that it has taken most of it."""
        self.full = False
        self._wake()
        if self._helper is not None:
            self._helper.resume_writing()
        elif self._answered:
            self._answered = False
            self.served(keep=True)

    async def drained(self) -> None:
        """Wait until the client has taken what it was sent; raise ``ConnectionResetError`` where it has left."""
        while self.full and not self.gone:
            self._drained = self._loop.create_future()
            await self._drained
        if self.gone:
            raise ConnectionResetError

    def write(self, data: bytes) -> None:
        """Write to the client; raise ``ConnectionResetError`` where it has left."""
        if self.gone or self.transport.is_closing():
            raise ConnectionResetError
        self.transport.write(data)

    def proceed(self) -> None:
        """Answer Expect: 100-continue, if the request has that and waits: it was admitted, and its body is wanted."""
        head = self._reader.head
        waits = head is not None and (head.fields.text(b"expect") or "").lower() == "100-continue" and head.fields.minor
        if waits and not self._reader.complete:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def hand_over(self, data: bytes) -> None:
        """Let another protocol answer: it gets ``data``, and nothing that the client sends after that."""
        self._deaf = True
        self._helper = self._make_helper()
        self._helper.connection_made(self.transport)
        self._helper.data_received(data)

    def abort(self) -> None:
        """Break the connection so that the client can't take what it got for a complete answer.

        A plain close looks like a clean end where the body lasts until the connection closes, so that it is reset.
        """
        if not self.gone:
            reset(self.transport)

    def close(self) -> None:
        """Close it once everything written has been taken."""
        self._deaf = True
        if not self.transport.is_closing():
            self.transport.close()

    def cancel(self) -> asyncio.Task[None] | None:
        """Give up what is being served, and return its task; a client that is only written to sees that break."""
        if self._task is not None:
            self._task.cancel()
        elif self.unsent:
            self.abort()
        return self._task

    @property
    def unsent(self) -> int:
        """How many bytes of its answers the client has not taken, as far as is known here."""
        closed_twice = self._helper is not None and self.transport.is_closing()
        if self.gone or (closed_twice and self.transport.get_extra_info("sslcontext") is not None):
            return 0  # see the facts; the end of TLS has a bound of its own
        return self.transport.get_write_buffer_size()

    @property
    def idle(self) -> bool:
        """Whether nothing is under way, not even the head of a request."""
        return not (self.busy or self._reader.begun or self.unsent)

    def look(self, now: float) -> None:
        """End what takes too long; ``now`` is the loop's time."""
        if self._paused and not self.transport.is_closing() and self._has_left():
            self.abort()
            return
        unsent = self.unsent
        if unsent != self._unsent or not unsent:
            self._unsent, self._moved = unsent, now
        elif now - self._moved > self._bounds.silence:
            self.abort()
            return
        if self._deadline == math.inf and not self.busy:
            self._deadline = now + self._bounds.idle  # this is the first look since it rests
        if now < self._deadline:
            return
        self._deadline = math.inf
        if self._reader.begun and not self._deaf:
            why = f"The headers of this request were not complete {self._bounds.head:g} s after its first byte."
            self._refuse(ProxyError("request-timeout", f"{why} Nothing was sent; send the request again."))
        else:
            self.close()

    def _begin(self, piece: bytes) -> None:
        """Serve a request whose head is there; ``piece`` is what has come of its body."""
        head = self._reader.head
        if head is None:
            if self._reader.begun and not self._in_head:
                self._in_head = True
                self._deadline = self._loop.time() + self._bounds.head
            return
        self._in_head = False
        self.busy = True
        self._deadline = math.inf
        stream = _NO_BODY
        if not self._reader.complete:
            stream = self._stream = Stream(self._hold_up)
            if piece:
                stream.feed(piece)
        elif piece:
            stream = Stream.of(piece)
        task = _task(self._serving.serve(self, head, stream), loop=self._loop, name="request")
        if not task.done():  # else it has ended within that call
            self._task = task

    def served(self, *, keep: bool) -> None:
        """Be ready for the next request once the client has taken this answer; or end, unless ``keep``."""
        self._task = None
        if self.gone or self._helper is not None:
            return  # which closes by itself
        if not keep or self._deaf or not self._reader.complete:
            self._linger()
            return
        if self.full:
            self._answered = True
            return
        if self._reader.rest():
            self.busy = False
        else:
            self._loop.call_soon(self._go_on)  # not from here: a thousand requests may wait, each within the last

    def _go_on(self) -> None:
        if self.gone or self._deaf:
            return
        self.busy = False
        try:
            piece = self._reader.next()
        except ProxyError as error:
            self._refuse(error)
        else:
            if not self._reader.held:
                self._hold_up(False)  # noqa: FBT003 - its one argument
            self._begin(piece)

    def _refuse(self, error: ProxyError) -> None:
        """Answer what is no request, and read no more."""
        self.busy = True
        with contextlib.suppress(ConnectionResetError):
            self._serving.refuse(self, error)
        self._linger()

    def _linger(self) -> None:
        """Close; a client that is still sending gets time to read its answer first (RFC 9112 section 9.6)."""
        self._stream = None
        transport = self.transport
        if (self._reader.complete and not self._reader.held) or transport.is_closing():
            self.close()
            return
        self._deaf = True
        if transport.can_write_eof():
            with contextlib.suppress(OSError):  # it was reset, which its loss will tell
                transport.write_eof()
        self._hold_up(False)  # noqa: FBT003 - its one argument
        self._deadline = self._loop.time() + self._bounds.linger

    def _has_left(self) -> bool:
        """Ask the system whether the client has closed its side: while reading is paused, nobody is told of it."""
        if not _CLOSED:
            return False
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), _CLOSED)
        return bool(poll.poll(0))

    def _hold_up(self, stop: bool) -> None:  # noqa: FBT001 - as streams call it
        if stop != self._paused and not self.transport.is_closing():
            self._paused = stop
            if stop:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def _wake(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)


def reset(transport: asyncio.WriteTransport) -> None:
    """Close a connection so that its peer sees it broken; a unix socket knows no such thing, and is just closed."""
    handle = transport.get_extra_info("socket")
    if handle is not None and handle.family != getattr(socket, "AF_UNIX", None):
        with contextlib.suppress(OSError):  # the peer may have closed already, which is what we want
            handle.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
            )
    with contextlib.suppress(AttributeError):  # early Pythons 3.11, where TLS was closed twice and so has ended
        transport.abort()


def remote(peer: object) -> str | None:
    """Return the address of a peer's name, if that is another machine's; an IPv4 address is one in IPv6 too."""
    return _remote(peer[0]) if isinstance(peer, tuple) else None  # a unix socket's


@lru_cache(maxsize=64)
def _remote(host: str) -> str | None:
    address = ipaddress.ip_address(host)
    address = getattr(address, "ipv4_mapped", None) or address
    return None if address.is_loopback else str(address)
