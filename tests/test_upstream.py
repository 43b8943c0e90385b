"""The transport by itself: connecting, the pool, the tunnel, the login. What it does with bytes is in test_wire_*."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy import upstream
from metquay_proxy.auth import Credentials, LoginFailed
from metquay_proxy.body import ReplayBudget, RequestBody
from metquay_proxy.errors import ProxyError
from metquay_proxy.rewrite import BaseURL
from metquay_proxy.upstream import Login, OutboundProxy, Transport
from tests.wire import OK, Upstream, answered, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

GET = b"GET /api/v1/x HTTP/1.1\r\nHost: x\r\n\r\n"


class NoBody:
    """The source of a body that is not there."""

    def is_eof(self) -> bool:
        """Return true."""
        return True

    at_eof = is_eof

    def read_nowait(self, _n: int = -1, /) -> bytes:
        """Return nothing."""
        return b""

    async def readany(self) -> bytes:
        """Return nothing."""
        return b""


def no_body() -> RequestBody:
    """Return the body of a GET."""
    return RequestBody(NoBody(), present=False, chunked=False, limit=0, budget=ReplayBudget(0), timeout=1.0)


def transport_to(
    url: str, tls: ssl.SSLContext | None = None, *, connect_timeout: float = 5.0, proxy: OutboundProxy | None = None
) -> Transport:
    """Return a transport to a base URL."""
    base = BaseURL.parse(url)
    return Transport(base, ssl_context=tls, connect_timeout=connect_timeout, read_timeout=5.0, outbound_proxy=proxy)


@pytest.fixture
async def far() -> AsyncIterator[Upstream]:
    """An upstream that says OK."""
    made = Upstream()
    await made.start()
    made.plays(OK)
    yield made
    await made.stop()


@contextlib.asynccontextmanager
async def speaking(play: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]) -> AsyncIterator[int]:
    """Listen with raw streams; yields the port."""
    writers = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await play(reader, writer)  # type: ignore[misc]

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0.001)


async def failure(transport: Transport) -> ProxyError:
    """Send a GET that fails, and return why."""
    with pytest.raises(ProxyError) as caught:
        await transport.send("GET", GET, no_body())
    transport.close()
    return caught.value


async def test_pool(far: Upstream) -> None:
    """A finished connection is used again; the figures tell busy from idle."""
    transport = transport_to(far.url)
    assert (0, 0) == transport.connections
    for _ in range(3):
        response = await transport.send("GET", GET, no_body())
        assert b"ok" == await response.read()
        assert b"" == await response.read()
        assert (0, 1) == transport.connections
    assert 1 == len(far.peers)
    transport.close()


async def test_warm(far: Upstream) -> None:
    """A connection that was opened ahead serves the next request."""
    transport = transport_to(far.url)
    await transport.warm()
    assert (0, 1) == transport.connections
    await transport.send("GET", GET, no_body())
    assert 1 == len(far.peers)
    transport.close()


async def test_cancelled_while_connecting(far: Upstream) -> None:
    """A connection whose request is given up while it opens is finished, and serves the next one."""
    transport = transport_to(far.url)
    task = asyncio.ensure_future(transport.send("GET", GET, no_body()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: (0, 1) == transport.connections)
    assert [] == far.requests
    transport.close()


async def test_closed_while_connecting(far: Upstream) -> None:
    """The end of the program ends what is being opened."""
    transport = transport_to(far.url)
    task = asyncio.ensure_future(transport.send("GET", GET, no_body()))
    await asyncio.sleep(0)
    transport.close()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.001)
    assert (0, 0) == transport.connections


async def test_pool_is_bounded(far: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """More idle connections than the pool holds are closed."""
    monkeypatch.setattr(upstream, "_MAX_IDLE_CONNECTIONS", 1)
    transport = transport_to(far.url)
    for _ in range(2):
        await transport.warm()
    assert (0, 1) == transport.connections
    transport.close()


async def test_connect_timeout() -> None:
    """A server that accepts and never finishes TLS is unreachable after the connect time-out."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        error = await failure(transport_to(url, ssl.create_default_context(), connect_timeout=0.1))
    assert ("upstream-unreachable", "no") == (error.slug, error.sent)
    assert "0.1 seconds" in error.message


async def test_no_tls_there(far: Upstream) -> None:
    """A server that speaks no TLS is upstream-tls."""
    far.greeting = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    url = far.url.replace("http://", "https://")
    error = await failure(transport_to(url, ssl.create_default_context()))
    assert ("upstream-tls", "no") == (error.slug, error.sent)


async def test_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that can't be looked up is said to be one."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr("metquay_proxy.upstream.socket.getaddrinfo", fail)
    error = await failure(transport_to("https://lab.metquay.example", ssl.create_default_context()))
    assert "upstream-unreachable" == error.slug
    assert "looked up" in error.message


async def test_closed_at_once() -> None:
    """A server that resets each connection during the handshake gives an error that says that nothing was sent."""

    async def play(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with speaking(play) as port:
        error = await failure(transport_to(f"https://127.0.0.1:{port}", ssl.create_default_context()))
    assert error.slug in {"upstream-unreachable", "upstream-tls"}
    assert "no" == error.sent


def test_outbound_proxy() -> None:
    """A corporate proxy's password is sent to it and shown nowhere."""
    assert "Basic dTpw" == OutboundProxy.of("proxy", 80, "u", "p").authorization
    assert "Basic dTo=" == OutboundProxy.of("proxy", 80, "u", None).authorization
    assert None is OutboundProxy.of("proxy", 80, None, None).authorization
    assert "OutboundProxy(proxy:80)" == repr(OutboundProxy.of("proxy", 80, "u", "p"))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", "METQUAY_OUTBOUND_PROXY"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", "status 503"),
        (b"SSH-2.0-x\r\n\r\n", "not valid HTTP"),
        (b"", "closed the connection"),
    ],
)
async def test_tunnel_refused(answer: bytes, text: str) -> None:
    """A corporate proxy that opens no tunnel is named, with what to do."""
    seen = []

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer + b"late" if answer else b"")
        await writer.drain()
        writer.close()

    async with speaking(play) as port:
        proxy = OutboundProxy.of("127.0.0.1", port, "u", "p")
        error = await failure(transport_to("https://lab.metquay.example", ssl.create_default_context(), proxy=proxy))
    assert ("upstream-unreachable", "no") == (error.slug, error.sent)
    assert text in error.message
    authority = b"lab.metquay.example:443"
    lines = [
        b"CONNECT " + authority + b" HTTP/1.1",
        b"Host: " + authority,
        b"Proxy-Authorization: Basic dTpw",
        b"",
        b"",
    ]
    assert [b"\r\n".join(lines)] == seen


async def test_tunnel() -> None:
    """Through a tunnel TLS is spoken with Metquay itself, and a truncated answer is found out there too."""
    authority = trustme.CA()
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server_tls)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.start_tls(server_tls)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    async with speaking(play) as port:
        transport = transport_to("https://localhost:9", trusting, proxy=OutboundProxy("127.0.0.1", port))
        response = await transport.send("GET", GET, no_body())
        assert b"abc" == await response.read()
        with pytest.raises(ProxyError) as caught:
            await response.read()
        transport.close()
    assert "upstream-closed" == caught.value.slug


async def login(far: Upstream, credentials: Callable[[], Credentials]) -> None:
    """Log in."""
    transport = transport_to(far.url)
    try:
        await Login(transport, BaseURL.parse(far.url), credentials, lambda: 0.0).token()
    finally:
        transport.close()


async def test_login(far: Upstream) -> None:
    """A login sends the keys once, as JSON with a length."""
    transport = transport_to(far.url)
    token = await Login(transport, BaseURL.parse(far.url), lambda: Credentials("a", "s"), lambda: 5.0).token()
    assert "Bearer token-of-the-bench" == token.authorization.decode()
    transport.close()


async def test_login_without_keys(far: Upstream) -> None:
    """Keys that can't be read are a failure like any other."""

    def fail() -> Credentials:
        raise OSError("no such file")

    with pytest.raises(LoginFailed, match="no such file"):
        await login(far, fail)


async def test_login_answer_is_bounded(monkeypatch: pytest.MonkeyPatch, far: Upstream) -> None:
    """A login's answer that never ends is given up."""
    monkeypatch.setattr("tests.wire._LOGIN", b"no login")
    far.plays(answered(body=bytes(100_000)))
    with pytest.raises(LoginFailed, match="too long"):
        await login(far, lambda: Credentials("a", "s"))
