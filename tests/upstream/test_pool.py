"""The transport by itself: connecting, the pool, the tunnel, the login. What it does with bytes is in test_wire_*."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy.exchange.body import ReplayBudget, RequestBody
from metquay_proxy.exchange.tokens import Credentials, LoginFailed
from metquay_proxy.rules.errors import ProxyError, UpstreamFailure
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.upstream import pool as upstream
from metquay_proxy.upstream.pool import Login, OutboundProxy, Transport
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
async def speaking(
    play: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Listen with raw streams; yields the port."""
    writers = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await play(reader, writer)  # type: ignore[misc]

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=tls)
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


class Warmth:
    """A transport on a clock that stands still, and the connections that its upstream has accepted so far."""

    def __init__(self, *, answers: bool = True, answer: bytes = OK, tls: ssl.SSLContext | None = None) -> None:
        self.now = 1000.0
        self.accepted: list[asyncio.StreamWriter] = []
        self._answers = answers
        self._answer = answer
        self._tls = tls

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.append(writer)
        while self._answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self._answer)
        writer.transport.abort()

    @contextlib.asynccontextmanager
    async def transport(self) -> AsyncIterator[Transport]:
        """Yield the transport; it looks after its connections a hundred times a second."""
        async with speaking(self._play) as port:
            url = f"http{'s' if self._tls else ''}://127.0.0.1:{port}"
            made = Transport(
                BaseURL.parse(url),
                ssl_context=self._tls,
                connect_timeout=5.0,
                read_timeout=0.1,
                clock=lambda: self.now,
            )
            yield made
            made.close()

    async def passes(self, seconds: float) -> int:
        """Let time pass at once, and the transport look several times; return how many connections were accepted."""
        self.now += seconds
        await asyncio.sleep(0.06)
        return len(self.accepted)


class TestHowLongAConnectionIsUsed:
    """A pooled connection is used while it is young, and while the upstream keeps it."""

    async def test_five_minutes(self) -> None:
        """Under load too a new one is opened after that, so that a changed DNS answer is followed."""
        warmth = Warmth()
        async with warmth.transport() as transport:
            accepted = []
            for _ in range(400):
                await (await transport.send("GET", GET, no_body())).read()
                accepted.append(len(warmth.accepted))
                warmth.now += 2.0
        assert [1] * 150 + [2] * 150 + [3] * 100 == accepted

    @pytest.mark.parametrize("method", ["GET", "POST"])
    @pytest.mark.parametrize(
        ("said", "idle", "accepted"),
        [
            (b"timeout=1", 0.4, 1),
            (b"timeout=1", 0.6, 2),
            (b"timeout=1", 1.5, 2),
            (b"timeout=2, max=99", 0.9, 1),
            (b"timeout=2, max=99", 1.1, 2),
            (b"timeout=0", 0.0, 2),
            (b"timeout=60", 1.9, 1),
            (b"max=99", 1.9, 1),
        ],
    )
    async def test_the_upstreams_own_word(self, method: str, said: bytes, idle: float, accepted: int) -> None:
        """Keep-Alive is believed where it says less than our own bounds, a second or half the time before its end."""
        warmth = Warmth(answer=answered(b"Keep-Alive: " + said, body=b"ok"))
        async with warmth.transport() as transport:
            await (await transport.send(method, GET, no_body())).read()
            warmth.now += idle
            await (await transport.send(method, GET, no_body())).read()
        assert accepted == len(warmth.accepted)

    async def test_what_is_no_longer_kept_is_closed(self) -> None:
        """It does not wait for a request that could not use it."""
        warmth = Warmth(answer=answered("Keep-Alive: timeout=1", body=b"ok"))
        async with warmth.transport() as transport:
            await (await transport.send_own("GET", GET, no_body())).read()
            assert (1, (0, 1)) == (await warmth.passes(0.4), transport.connections)
            assert (1, (0, 0)) == (await warmth.passes(0.2), transport.connections)


class TestKeptWarm:
    """For a while after a tool's request a connection is ready for the next one."""

    @pytest.mark.parametrize("begins", ["request", "start"])
    @pytest.mark.slow
    async def test_while_tools_are_active(self, begins: str) -> None:
        """It is replaced before it is too old, for a minute; the next request uses it."""
        warmth = Warmth()
        async with warmth.transport() as transport:
            if begins == "start":
                transport.keep_warm()
                await eventually(lambda: (0, 1) == transport.connections)
            else:
                await (await transport.send("GET", GET, no_body())).read()
            for opened in range(2, 16):
                assert opened == await warmth.passes(3.995)
                await eventually(lambda: (0, 2) >= transport.connections)
            await (await transport.send("GET", GET, no_body())).read()
            assert [16, 17] == [await warmth.passes(3.995), await warmth.passes(3.995)]
            assert [17, 17] == [await warmth.passes(60.0), await warmth.passes(60.0)]
            assert (0, 0) == transport.connections

    async def test_at_once_counts_as_well(self) -> None:
        """A request that is sent without waiting is a tool's, too."""
        warmth = Warmth()
        async with warmth.transport() as transport:
            await transport.warm()
            response = transport.begin("GET", GET, no_body())
            assert response is not None
            await response.started()
            assert [2, 3] == [await warmth.passes(3.995), await warmth.passes(3.995)]

    async def test_not_for_ourselves(self) -> None:
        """A login keeps nothing warm."""
        warmth = Warmth()
        async with warmth.transport() as transport:
            await (await transport.send_own("POST", GET, no_body())).read()
            assert [1, 1] == [await warmth.passes(3.995), await warmth.passes(3.995)]
            assert (0, 0) == transport.connections

    async def test_closed_by_the_upstream(self) -> None:
        """A connection that the upstream closes is replaced, no sooner than it would have been anyway."""
        warmth = Warmth(answers=False)
        async with warmth.transport() as transport:
            transport.keep_warm()
            await eventually(lambda: warmth.accepted)
            assert [1, 1, 2, 2] == [await warmth.passes(seconds) for seconds in (0.0, 3.0, 1.0, 0.0)]

    async def test_out_of_reach(self) -> None:
        """Where none can be opened, none is tried again before the next request."""
        warmth = Warmth(answers=False, tls=ssl.create_default_context())
        async with warmth.transport() as transport:
            transport.keep_warm()
            await eventually(lambda: warmth.accepted)
            assert [1, 1, 1] == [await warmth.passes(seconds) for seconds in (0.0, 4.0, 8.0)]
            with pytest.raises(ProxyError):
                await transport.send("GET", GET, no_body())
            assert [2, 2] == [await warmth.passes(0.0), await warmth.passes(4.0)]

    @pytest.mark.parametrize("end", [Transport.let_cool, Transport.close])
    async def test_not_in_a_drain(self, end: Callable[[Transport], None]) -> None:
        """From a drain on, and after the end, none is opened, whatever is still sent."""
        warmth = Warmth()
        async with warmth.transport() as transport:
            await (await transport.send("GET", GET, no_body())).read()
            end(transport)
            transport.keep_warm()
            assert [1, 1] == [await warmth.passes(3.995), await warmth.passes(3.995)]
            assert (0, 0) == transport.connections

    async def test_stale(self) -> None:
        """One that the upstream closes in the moment in which it is first used is stale like any that idled."""
        warmth = Warmth()
        async with warmth.transport() as transport:
            await transport.warm()
            await eventually(lambda: warmth.accepted)
            response = transport.begin("GET", GET, no_body())
            assert response is not None
            warmth.accepted[0].transport.abort()
            with pytest.raises(UpstreamFailure) as caught:
                await response.started()
            assert caught.value.stale


@pytest.mark.parametrize("failing", ["tcp", "tls", "tunnel", "pooled", None])
async def test_the_moment_of_sending(far: Upstream, failing: str | None) -> None:
    """It is told once a connection is finished, TCP, tunnel and TLS, and never where none was."""

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with speaking(close) as port:
        secure = failing in {"tls", "tunnel"}
        url, tls = (f"https://localhost:{port}", ssl.create_default_context()) if secure else (far.url, None)
        proxy = OutboundProxy("127.0.0.1", port) if failing == "tunnel" else None
        transport = transport_to(url, tls, proxy=proxy)
        if failing == "tcp":
            far.refuse()
        if failing == "pooled":  # it is closing, though the pool has not heard of that
            await transport.warm()
            transport._idle[-1][1].usable = lambda: True  # type: ignore[method-assign]
            transport._idle[-1][1].abort()
        told: list[int] = []
        sending = transport.send("GET", GET, no_body(), on_sent=lambda: told.append(len(far.requests)))
        if failing is None:
            assert b"ok" == await (await sending).read()
        else:
            with pytest.raises(ProxyError) as caught:
                await sending
            assert "no" == caught.value.sent
        assert ([0] if failing is None else []) == told
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

    monkeypatch.setattr("metquay_proxy.upstream.pool.socket.getaddrinfo", fail)
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


NO_TUNNEL = b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (NO_TUNNEL % b"407 No", "does not accept the user name and password in METQUAY_OUTBOUND_PROXY"),
        (NO_TUNNEL % b'407 No\r\nProxy-Authenticate: Negotiate, Basic realm="x"', "does not accept the user name and"),
        (NO_TUNNEL % b"407 No\r\nPROXY-AUTHENTICATE: NTLM\r\nProxy-Authenticate: Negotiate", "by NTLM or Negotiate,"),
        (NO_TUNNEL % b"407 No\r\nProxy-Authenticate: Negotiate, NTLM", "px (or cntlm, for NTLM) does"),
        (NO_TUNNEL % b'407 No\r\nProxy-Authenticate: Digest realm="a", nonce="basic"', "a login by Digest,"),
        (
            NO_TUNNEL % b"403 No",
            "refused the way to lab.metquay.example:443 (status 403). Ask whoever runs it",
        ),
        (NO_TUNNEL % b"405 No", "It seems to be a web server, or a proxy that opens no tunnels"),
        (NO_TUNNEL % b"302 Found", "It wants you to log in by a browser first"),
        (NO_TUNNEL % b"502 No", "found no way to lab.metquay.example:443 (status 502). The fault lies behind it"),
        (NO_TUNNEL % b"503 No", "status 503"),
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


@pytest.mark.parametrize(("host", "why"), [("127.0.0.1", "nothing listens there"), ("proxy.invalid", "looked up")])
async def test_corporate_proxy_away(host: str, why: str) -> None:
    """Where the corporate proxy itself can't be reached, its setting is to be checked, not Metquay's."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    proxy = OutboundProxy(host, port)
    error = await failure(transport_to("https://lab.metquay.example", ssl.create_default_context(), proxy=proxy))
    assert error.message.startswith(f"The corporate proxy {host}:{port} could not be reached: ")
    assert why in error.message
    assert "Check METQUAY_OUTBOUND_PROXY (or the system's)" in error.message
    assert "METQUAY_HOST" not in error.message


async def test_corporate_proxy_that_resets() -> None:
    """A reset behind the corporate proxy, in mid-handshake, is told without the system's number for it."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await reader.read(1)
        handle = writer.get_extra_info("socket")
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with speaking(play) as port:
        proxy = OutboundProxy("127.0.0.1", port)
        error = await failure(transport_to("https://lab.metquay.example", ssl.create_default_context(), proxy=proxy))
    assert "no" == error.sent
    assert "Errno" not in error.message
    assert f"lab.metquay.example (through the corporate proxy 127.0.0.1:{port})" in error.message


async def test_tunnel_for_nobody() -> None:
    """Where the corporate proxy wants a password and has none, it is said where to put it."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(NO_TUNNEL % b'407 No\r\nProxy-Authenticate: Basic realm="x"')
        writer.close()

    async with speaking(play) as port:
        proxy = OutboundProxy("127.0.0.1", port)
        error = await failure(transport_to("https://lab.metquay.example", ssl.create_default_context(), proxy=proxy))
    assert "wants a user name and password: put them into METQUAY_OUTBOUND_PROXY" in error.message


def certified(name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the contexts of a server with a certificate for a name, and of a client that trusts it."""
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(name).configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.mark.parametrize("through", ["nothing", "a corporate proxy"])
async def test_final_dot(monkeypatch: pytest.MonkeyPatch, through: str) -> None:
    """With a final dot a host is looked up, and shown to nobody else: neither in SNI nor to the corporate proxy."""
    server_tls, client_tls = certified("lab.metquay.example")
    asked: list[str | bytes | None] = []
    server_tls.sni_callback = lambda _, name, __: asked.append(name)
    look_up = socket.getaddrinfo

    def here(host: str, *rest: object, **options: object) -> object:
        if host.startswith("127."):
            return look_up(host, *rest, **options)  # type: ignore[arg-type]
        if options.get("flags"):
            raise socket.gaierror
        asked.append(host)
        return look_up("127.0.0.1", *rest, **options)  # type: ignore[arg-type]

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if through != "nothing":
            asked.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[1])
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await writer.start_tls(server_tls)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)

    monkeypatch.setattr("metquay_proxy.upstream.pool.socket.getaddrinfo", here)
    async with speaking(play, server_tls if through == "nothing" else None) as port:
        proxy = None if through == "nothing" else OutboundProxy("127.0.0.1", port)
        transport = transport_to(f"https://lab.metquay.example.:{port}", client_tls, proxy=proxy)
        assert 200 == (await transport.send("GET", GET, no_body())).head.status
        transport.close()
    first = "lab.metquay.example." if proxy is None else f"Host: lab.metquay.example:{port}".encode()
    assert [first, "lab.metquay.example"] == asked


class Upload(NoBody):
    """The source of a body that never ends; ``meanwhile`` happens before its second piece."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        """Begin."""
        self._meanwhile = meanwhile
        self._pieces = 0

    def is_eof(self) -> bool:
        """Return false."""
        return False

    at_eof = is_eof

    async def readany(self) -> bytes:
        """Return the next piece."""
        self._pieces += 1
        if self._pieces == 2:
            self._meanwhile()
        elif self._pieces > 2:
            await asyncio.sleep(0)
        return bytes(100_000)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("tls", [False, True])
async def test_an_answer_before_the_end_of_an_upload(*, tls: bool, chunked: bool) -> None:
    """It is passed on where the upstream resets the connection right behind it, and the next write fails."""
    server_tls, client_tls = certified("127.0.0.1")
    far_end: list[socket.socket] = []

    def accept() -> None:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far_end.append(server_tls.wrap_socket(sock, server_side=True) if tls else sock)

    def refuse() -> None:
        (sock,) = far_end
        sock.setblocking(False)  # noqa: FBT003 - the standard library's own
        sock.sendall(answered(status="413 Content Too Large", body=b"too big"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = asyncio.get_running_loop().run_in_executor(None, accept)
        url = f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
        transport = transport_to(url, client_tls if tls else None)
        await transport.warm()
        await accepting
        body = RequestBody(Upload(refuse), present=True, chunked=chunked, limit=0, budget=ReplayBudget(0), timeout=1.0)
        response = await transport.send("POST", GET, body)
        assert (413, b"too big", b"") == (response.head.status, await response.read(), await response.read())
        transport.close()


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
