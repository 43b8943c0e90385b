"""The cable between the proxy and Metquay, for tests that pull it: a relay of bytes that goes wrong as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct


class Link:
    """Carries connections to ``127.0.0.1:upstream`` until told otherwise. ``opened`` counts those that it took."""

    def __init__(self, upstream: int) -> None:
        """Begin without a port."""
        self.port = 0
        self.opened = 0
        self._upstream = upstream
        self._listener: socket.socket | None = None
        self._plugs: list[socket.socket] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """What the proxy takes for Metquay."""
        return f"http://127.0.0.1:{self.port}/api/v1"

    def listen(self) -> None:
        """Take connections (again)."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._listener.setblocking(False)  # noqa: FBT003 - a position of the standard library's
            self.port = self._listener.getsockname()[1]
        self._listener.listen(100)
        while self._plugs:
            self._plugs.pop().close()
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def refuse(self) -> None:
        """Refuse new connections, and reset those that are open."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self.cut()

    def swallow(self) -> None:
        """Reset the open connections, and answer new ones with nothing at all.

        On Linux: what comes to a listener whose queue is full is dropped.
        """
        assert self._listener is not None
        self.cut()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.listen(0)
        for _ in range(2):
            plug = socket.socket()
            plug.setblocking(False)  # noqa: FBT003 - a position of the standard library's
            with contextlib.suppress(BlockingIOError):
                plug.connect(("127.0.0.1", self.port))
            self._plugs.append(plug)

    def freeze(self) -> None:
        """Carry no byte further, in either direction; connections stay open, and new ones are taken."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Carry on."""
        self._flowing.set()

    def strand(self) -> None:
        """Forget the open connections without telling anybody, as a router that was restarted does."""
        for pump in self._pumps:
            pump.cancel()

    def cut(self) -> None:
        """Reset the open connections."""
        self.strand()
        for writer in self._writers:
            handle = writer.get_extra_info("socket")
            with contextlib.suppress(OSError, AttributeError):  # it is closed, of which uvloop tells by None
                handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()

    @property
    def open(self) -> int:
        """How many connections are open, on both sides together."""
        return sum(not writer.is_closing() for writer in self._writers)

    async def stop(self) -> None:
        """Close everything."""
        self.refuse()
        while self._plugs:
            self._plugs.pop().close()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await asyncio.sleep(0.001)  # what was aborted is closed in the loop's next turn

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # whoever came has gone again
            sock, _ = listener.accept()
            self.opened += 1
            self._begin(self._carry(sock))

    async def _carry(self, sock: socket.socket) -> None:
        near = await asyncio.open_connection(sock=sock)
        self._writers.add(near[1])
        await self._flowing.wait()
        try:
            far = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            near[1].close()
            return
        self._writers.add(far[1])
        self._begin(self._pump(near[0], far[1]))
        self._begin(self._pump(far[0], near[1]))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    def _begin(self, work: object) -> None:
        pump = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)
