from __future__ import annotations

import asyncio
import ssl

import pytest
import trustme

from metquay_proxy.exchange.receiver import AT_ONCE, IN_ALL, Receiver


class Kept(Receiver):
    """Keeps what came."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        """Keep it."""
        self.pieces.append(data)

    def connection_lost(self, exc: Exception | None, /) -> None:
        """Say so."""
        super().connection_lost(exc)
        self.ended.set()


@pytest.mark.parametrize("tls", [False, True])
async def test_pieces_of_many_connections(*, tls: bool) -> None:
    """Each connection gets its own bytes, all of them and in order, and never more than so many at once."""
    ca = trustme.CA()
    serving, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    ca.issue_cert("localhost").configure_cert(serving)
    ca.configure_trust(trusting)
    kept: list[Kept] = []

    def accept() -> Kept:
        kept.append(Kept())
        return kept[-1]

    server = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", 0, ssl=serving if tls else None)
    port = server.sockets[0].getsockname()[1]

    async def send(letter: bytes) -> None:
        to = {"ssl": trusting, "server_hostname": "localhost"} if tls else {}
        _, writer = await asyncio.open_connection("127.0.0.1", port, **to)  # type: ignore[arg-type] # for TLS or not
        for _ in range(5):
            writer.write(letter * 300_000)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*map(send, (b"a", b"b", b"c")))
    for each in kept:
        await each.ended.wait()
    server.close()
    assert [letter * 1_500_000 for letter in (b"a", b"b", b"c")] == sorted(b"".join(each.pieces) for each in kept)
    assert max(len(piece) for each in kept for piece in each.pieces) <= AT_ONCE


def test_many_read_less_at_once() -> None:
    """A few connections read as much as loops do; of a thousand each one that comes reads less than those before it."""
    many = [Receiver() for _ in range(1000)]
    for each in many:
        each.connection_made(asyncio.BaseTransport())
    sizes = [len(each.get_buffer(-1)) for each in many]
    assert sorted(sizes, reverse=True) == sizes
    assert 1 << 12 < sizes[-1] <= IN_ALL // 1000
    assert 5 * IN_ALL > sum(sizes)
    for each in (*many, many[0]):  # TLS may end one twice
        each.connection_lost(None)
    many[0].connection_made(asyncio.BaseTransport())
    assert sizes[-1] < len(many[0].get_buffer(-1)) <= AT_ONCE
    many[0].connection_lost(None)
