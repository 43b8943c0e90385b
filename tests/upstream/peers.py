"""The other end of the connections that these tests open, and what they are opened for."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Any

import trustme

from metquay_proxy.exchange.body import ReplayBudget, RequestBody, Stream
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.upstream.pool import Pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from metquay_proxy.exchange.exchange import Response

GET = b"GET /api/v1/x HTTP/1.1\r\nHost: x\r\n\r\n"


def body_of(source: Stream, *, chunked: bool = False) -> RequestBody:
    """Return a body that is not kept."""
    return RequestBody(source, chunked=chunked, limit=0, budget=ReplayBudget(0), timeout=5.0)


def no_body() -> RequestBody:
    """Return the body of a GET."""
    return body_of(Stream.of())


def pool_to(url: str, tls: ssl.SSLContext | None = None, **options: Any) -> Pool:  # noqa: ANN401 - of a pool
    """Return a pool of connections to a base URL."""
    times = {"connect_timeout": 5.0, "read_timeout": 5.0}
    return Pool(BaseURL.parse(url), ssl_context=tls, **(times | options))


async def send(  # noqa: PLR0913 - a request, and what its sender knows of it
    pool: Pool,
    method: str,
    body: RequestBody | None = None,
    *,
    fresh: bool = False,
    own: bool = False,
    on_sent: Callable[[], object] = int,
) -> Response:
    """Send a request as the forwarder does, on a new connection where it is to be ``fresh``; return its answer."""
    connection = None if fresh else pool.take(method, None if own else pool.clock())
    response = (connection or await pool.open()).send(method, GET, body or no_body())
    on_sent()
    try:
        while not response.begun:
            await response.news()
    except BaseException:
        response.close()
        raise
    return response


@contextlib.asynccontextmanager
async def speaking(
    play: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Listen with raw streams; yields the port."""
    writers = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await play(reader, writer)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0.001)


def certified(name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the contexts of a server with a certificate for a name, and of a client that trusts it."""
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(name).configure_cert(server)
    authority.configure_trust(client)
    return server, client
