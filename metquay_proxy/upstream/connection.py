"""One connection to Metquay: it carries one exchange at a time, from a request's first byte to its answer's last.

Owns what is on the wire: how a body is framed, what came back (``ResponseReader`` judges it), whether the request went
out whole, and what the end of the connection means. Must not know who uses the connection next, nor whether a request
is repeated.

Facts: a loop whose write fails closes the connection without reading what had come before, such as the 413 to an upload
that the server does not want and then resets (RFC 9112 section 9.5); Linux and BSD keep that for whoever reads on.
uvloop raises RuntimeError where a closed transport is written to. RFC 9112 section 6.3: bytes that nobody asked for
belong to no answer, so that such a connection is thrown away; some servers send them a moment late, when the next
request is on its way. Section 9.3: a server may close an idle connection at any moment, and a client that reuses it
can't know whether its request was read. Section 9.8: over TLS an answer that lasts until the connection closes is whole
only where the peer said so.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import select
import ssl
import sys
from typing import TYPE_CHECKING, Final, cast

from metquay_proxy.exchange.exchange import Response
from metquay_proxy.exchange.receiver import Receiver
from metquay_proxy.rules.errors import ProxyError, Sent, UpstreamFailure
from metquay_proxy.rules.http1 import ProtocolError, ResponseReader

if sys.platform == "linux":
    import fcntl
    import termios

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from metquay_proxy.exchange.body import RequestBody
    from metquay_proxy.rules.http1 import AnswersMemory


_NO_MORE: Final = 300
"""An answer with this status or a higher one says that the rest of the request's body is not wanted."""


class Connection(Receiver):
    """One connection to the upstream, over TLS or not."""

    transport: asyncio.Transport
    idle_since = -math.inf
    """What its owner notes of it: when it became free, if ever,"""
    good_until = 0.0
    """until when it may be used then,"""
    too_old = math.inf
    """and from when on never."""
    bodiless: bool | None = None
    """Whether the latest answer had no body by rule: some servers send one all the same, a moment late. None before the
    end of the first."""
    _cut = False
    """Whether the end of the connection is not what the peer meant for the end of its answer."""
    _silent = 0.0
    _unsent = 0

    def __init__(
        self,
        memory: AnswersMemory,
        on_free: Callable[[Connection, float | None], object],
        on_lost: Callable[[Connection], object],
    ) -> None:
        """``on_free``: an exchange ended well; with the seconds for which the upstream keeps the connection, if told.

        ``on_lost``: the connection has closed.
        """
        self._reader = ResponseReader("", memory)
        self._on_free = on_free
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._response: Response | None = None
        """The answer that comes; there while an exchange runs."""
        self._upload: asyncio.Task[None] | None = None
        """What sends a body that comes piece by piece, until it is sent or no longer wanted."""
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: the connection is open, over TLS where that is asked for."""
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", transport)
        self._tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        self._cut = self._tls is not None  # until the peer has said otherwise

    def data_received(self, data: bytes) -> None:
        """Take a piece of the answer, or close where nobody waits for one."""
        response = self._response
        if response is None:
            self.abort()
            return
        self._silent = 0.0
        reader = self._reader
        try:
            piece = reader.feed(data)
        except ProtocolError as error:
            if not response.begun and reader.head is not None:
                response.begin(reader.head)
            cause = f"Metquay's answer was not valid HTTP ({error})."
            left_over = self.bodiless is not None and reader.head is None  # of the exchange before, a moment late
            self._fail(response, "upstream-protocol", cause, repeatable=left_over, stale=left_over)
            return
        if not response.begun:
            head = reader.head
            if head is None:
                return
            response.begin(head)
            if self._upload is not None and head.status >= _NO_MORE:
                self._stop_sending()
        last = reader.complete
        response.feed(piece, last=last)
        if last:
            self._finish(response)

    def eof_received(self) -> bool:
        """Note whether the peer ended in order; over TLS it says so (RFC 8446 section 6.1)."""
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):  # it wants more: the alert that TLS ends with has not come
                self._cut = self._tls.read(1) != b""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End: an answer that lasts until the connection closes is whole now, any other is broken."""
        super().connection_lost(exc)
        if exc is not None and self._tls is None:
            for data in left_behind(self.transport):
                self.data_received(data)
        self._on_lost(self)
        response = self._response
        if response is None:
            return
        if exc is None and not self._cut:
            self._reader.eof()
        if self._reader.complete:
            response.end()
            self._finish(response)
        elif self._reader.head is not None:
            self._fail(response, "upstream-closed", "Metquay closed the connection in the middle of its answer.")
        else:
            cause = "Metquay closed the connection without an answer."
            stale = self.idle_since > -math.inf and not self._reader.started
            self._fail(response, "upstream-closed", cause, repeatable=True, stale=stale)

    def pause_writing(self) -> None:
        """Note that the upstream is slower than the client."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Note that it takes bytes again."""
        self._writable.set()

    def has_unread(self) -> bool:
        """Ask the system whether bytes, or the peer's end, have come to it that the loop has not read yet."""
        sock = self.transport.get_extra_info("socket")
        if sys.platform == "win32":
            return bool(select.select([sock], [], [], 0)[0])
        poll = select.poll()  # which takes descriptors of any number
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))

    def watch(self, timeout: float, interval: float) -> None:
        """Look, each ``interval`` seconds, whether anything moves; end an exchange where for ``timeout`` nothing did.

        Bytes that come move, and bytes of the request that leave. Where the client is waited for, no time counts.
        """
        response = self._response
        unsent = 0 if self.transport.is_closing() else _unsent(self.transport)
        waits_for_client = self._upload is not None and self._writable.is_set()
        if response is None or response.held_up or waits_for_client or unsent != self._unsent:
            self._silent = 0.0
        elif (silent := self._silent + interval) <= timeout:
            self._silent = silent
        else:
            self._fail(response, "upstream-timeout", f"Metquay did not answer: nothing came for {timeout:g} s.")
        self._unsent = unsent

    def send(self, method: str, head: bytes, body: RequestBody) -> Response:
        """Send one request; return its answer to come, which raises ``ProxyError``.

        The connection must not be closing. A body that is not there yet follows by a task of its own. Raises what
        ``body`` raises.
        """
        transport = self.transport
        try:
            data = body.whole()
        except BaseException:
            self.abort()
            raise
        self._reader.next(method)
        self._response = response = Response(self._hold_up, self.give_up, self._loop)
        self._silent = 0.0
        if data is None:
            transport.write(head)
            self._upload = self._loop.create_task(self._send_rest(transport, body, response))
        else:
            if body.chunked:
                data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
            transport.write(head + data if data else head)
            response.sent = True
        return response

    def give_up(self, response: Response) -> None:
        """End the exchange that ``response`` answers, if it still runs, and the connection with it."""
        if self._response is response:
            self._response = None
            self._stop_sending()
            self.abort()

    def abort(self) -> None:
        """Close at once."""
        self._cut = True
        self.transport.abort()

    def _finish(self, response: Response) -> None:
        """End the exchange, whose answer has come whole; what of it is still unread is its reader's."""
        head = response.head
        self._response = None
        if self._upload is not None:
            self._stop_sending()
        if head.keep_alive and response.sent and not self._reader.surplus:
            self.bodiless = head.bodiless
            self._on_free(self, head.kept_for)
        else:
            self.abort()

    def _fail(
        self, response: Response, slug: str, cause: str, *, repeatable: bool = False, stale: bool = False
    ) -> None:
        """End the exchange, which the upstream broke."""
        sent: Sent = "yes" if self._reader.head is not None else "unknown" if response.sent else "no"
        self._end(response, UpstreamFailure(slug, cause, sent=sent, repeatable=repeatable, stale=stale))

    def _end(self, response: Response, error: ProxyError) -> None:
        self._response = None
        self._stop_sending()
        response.fail(error)
        self.abort()

    def _stop_sending(self) -> None:
        if self._upload is not None:
            self._upload.cancel()
            self._upload = None

    def _hold_up(self, stop: bool) -> None:  # noqa: FBT001 - a stream's one question
        if not self.transport.is_closing():
            (self.transport.pause_reading if stop else self.transport.resume_reading)()

    async def _send_rest(self, transport: asyncio.Transport, body: RequestBody, response: Response) -> None:
        """Send a body as it comes; cancelled where the exchange ends before."""
        try:
            async for chunk in body.chunks():
                if transport.is_closing():
                    return
                transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if body.chunked else chunk)
                await self._writable.wait()
        except Exception as error:  # noqa: BLE001 - whatever the client's side raised, the upstream is not to blame
            broke = "The body of this request ended early or was not valid HTTP, so Metquay did not get all of it."
            self._end(response, error if isinstance(error, ProxyError) else ProxyError("bad-request", broke))
            return
        if body.chunked:
            if transport.is_closing():
                return
            transport.write(b"0\r\n\r\n")
        response.sent = True
        self._upload = None


def left_behind(transport: asyncio.BaseTransport) -> Iterator[bytes]:
    """Yield what a peer sent before it reset the connection: a loop whose write fails does not look for it."""
    handle = transport.get_extra_info("socket")
    with contextlib.suppress(OSError), handle.dup() as sock:
        while data := sock.recv(65536):
            yield data


def _unsent(transport: asyncio.Transport) -> int:
    """Return how many bytes have not yet come to the peer, where the kernel can be asked for its own."""
    waiting = transport.get_write_buffer_size()
    if sys.platform != "linux":
        return waiting
    queue = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return waiting + int.from_bytes(queue, sys.byteorder)
