"""Where the proxy listens: both loopback addresses, ports that are taken, unix sockets."""

from __future__ import annotations

import asyncio
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.address import Address
from metquay_proxy.listeners import bind
from tests.wire import Broken, Client, answered, get, running

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


class TestListeners:
    async def test_localhost(self) -> None:
        """``localhost`` means both loopback addresses on one port, which is free on both."""
        sockets = bind(Address("localhost", 0))
        try:
            assert 1 == len({sock.getsockname()[1] for sock in sockets})
            assert {"127.0.0.1", "::1"} >= {sock.getsockname()[0] for sock in sockets}
        finally:
            for sock in sockets:
                sock.close()

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
    async def test_taken(self, host: str) -> None:
        """A port that is taken on either address is an error, and leaves nothing open."""
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
            bind(Address(host, taken.getsockname()[1]))

    async def test_unix(self, folder: Path) -> None:
        """A unix socket serves its owner only, and is removed at the end."""
        path = folder / "proxy.sock"
        async with running(listen=f"127.0.0.1:0,unix:{path}") as bench:
            assert 0o600 == stat.S_IMODE(path.stat().st_mode)
            client = Client(*await asyncio.open_unix_connection(path))
            bench.clients.append(client)
            bench.upstream.plays(answered(b"Location: " + bench.upstream.url.encode() + b"/y", body=b"a"))
            await client.send(get(host=b"localhost"))
            answer = await client.answer()
            assert (b"a", b"http://localhost/api/v1/y") == (answer.body, answer.value(b"Location"))
        assert not path.exists()

    async def test_unix_broken_answer(self, folder: Path) -> None:
        """On a unix socket, which knows no reset, a broken answer with a length or chunks is still broken."""
        path = folder / "proxy.sock"
        async with running(listen=f"127.0.0.1:0,unix:{path}") as bench:
            client = Client(*await asyncio.open_unix_connection(path))
            bench.clients.append(client)
            await client.send(get())
            peer = await bench.upstream.peer()
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")
            peer.close()
            with pytest.raises(Broken):
                await client.answer()

    async def test_unix_in_the_way(self, folder: Path) -> None:
        """A stale socket is replaced; a live one, or a file, is an error."""
        path = folder / "proxy.sock"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        [sock] = bind(Address("", 0, str(path)))
        with pytest.raises(OSError, match="another program"):
            bind(Address("", 0, str(path)))
        sock.close()
        path.unlink()
        path.write_text("")
        with pytest.raises(FileExistsError):
            bind(Address("", 0, str(path)))
