"""Answers every request with two kilobytes in three pieces, a millisecond apart: ``pieces.py SOCKET``."""

from __future__ import annotations

import asyncio
import sys
from typing import Final

PAUSE: Final = 0.001
BODY: Final = b"[%b]" % (b" " * 2046)
HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2048\r\nX-Accel-Buffering: no\r\n\r\n"
)
"""nginx passes each piece on as it comes only where the answer says so."""
THIRDS: Final = (HEAD + BODY[:683], BODY[683:1366], BODY[1366:])


class Pieces(asyncio.Protocol):
    """A connection of the server in front, which sends a whole request at once, and the next one after the answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Keep the way back."""
        self._transport = transport

    def data_received(self, _data: bytes) -> None:
        """Answer."""
        loop = asyncio.get_running_loop()
        for number, piece in enumerate(THIRDS):
            loop.call_later(number * PAUSE, self._transport.write, piece)


async def main(path: str) -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_unix_server(Pieces, path, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
