"""The way to Metquay: names, the corporate proxy, TLS, and what is told where one of them fails."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy.exchange.body import Stream
from metquay_proxy.rules.errors import UpstreamFailure
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.upstream.dial import Dialer, OutboundProxy, tls_context
from tests.upstream.peers import body_of, certified, pool_to, send, speaking
from tests.wire import OK, answered

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.wire import Upstream

LAB = "https://lab.metquay.example"
NO_TUNNEL = b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n"


async def failure(url: str, *, proxy: OutboundProxy | None = None, patience: float = 5.0) -> UpstreamFailure:
    """Open a connection, over TLS where the URL says so, which fails; return why."""
    context = ssl.create_default_context() if url.startswith("https") else None
    with pytest.raises(UpstreamFailure) as caught:
        await Dialer(BaseURL.parse(url), proxy, patience, context).open(asyncio.Protocol)
    assert "no" == caught.value.sent
    assert not caught.value.stale
    return caught.value


async def test_connect_timeout() -> None:
    """A server that accepts and never finishes TLS is unreachable after the connect time-out."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        error = await failure(url, patience=0.1)
    assert ("upstream-unreachable", True) == (error.slug, error.repeatable)
    assert "could not be reached within 0.1 s. Check the network" in error.message


@pytest.mark.parametrize("speaks", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 hello\r\n"])
async def test_no_tls_there(far: Upstream, speaks: bytes) -> None:
    """A server that speaks no TLS is upstream-tls."""
    far.greeting = speaks
    error = await failure(far.url.replace("http://", "https://"))
    assert ("upstream-tls", True) == (error.slug, error.repeatable)


async def test_over_tls_a_server_that_speaks_first_is_left() -> None:
    """What comes before anybody could have asked for it reaches nobody."""
    server, client = certified("127.0.0.1")

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await reader.read()

    async with speaking(play, server) as port:
        pool = pool_to(f"https://127.0.0.1:{port}", client)
        with pytest.raises(UpstreamFailure) as caught:
            await send(pool, "GET", fresh=True)
        pool.close()
    assert ("no", True) == (caught.value.sent, caught.value.repeatable)


async def test_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that can't be looked up is said to be one."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    error = await failure(LAB)
    assert "upstream-unreachable" == error.slug
    assert "its name could not be looked up. Check METQUAY_HOST for" in error.message


async def test_a_look_up_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks while another asks gets the same answer; who asks later asks again."""
    asked: list[str] = []
    go_on = threading.Event()

    def look_up(host: str, *_: object, flags: int = 0, **__: object) -> object:
        if not flags:
            asked.append(host)
            go_on.wait(5.0)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    dialer = Dialer(BaseURL.parse(LAB), None, 5.0, None)
    first = [asyncio.ensure_future(dialer.open(asyncio.Protocol)) for _ in range(3)]
    await asyncio.sleep(0.01)
    first[0].cancel()  # which is no reason for the others to fail
    go_on.set()
    results = await asyncio.gather(*first, return_exceptions=True)
    assert [asyncio.CancelledError, UpstreamFailure, UpstreamFailure] == [type(each) for each in results]
    assert 1 == len(asked)
    with pytest.raises(UpstreamFailure):
        await dialer.open(asyncio.Protocol)
    assert 2 == len(asked)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(24, "x"), "this program has reached its limit of open files"),
        (
            ConnectionRefusedError(111, "x"),
            "nothing listens there. Check METQUAY_HOST and its port, or wait if it worked before.",
        ),
        (ConnectionResetError(104, "x"), "the connection was closed at once. Check the firewall"),
        (OSError(101, "x"), "the network has no connection to it. Check the network (cable,"),
        (TimeoutError(110, "x"), "could not be reached within 5 s."),
    ],
)
async def test_causes(monkeypatch: pytest.MonkeyPatch, error: OSError, text: str) -> None:
    """Each cause is told with its own cure."""

    async def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("metquay_proxy.upstream.dial.start_connection", fail)
    found = await failure("http://127.0.0.1:1")
    assert ("upstream-unreachable", True) == (found.slug, found.repeatable)
    assert text in found.message


def test_outbound_proxy() -> None:
    """A corporate proxy's password is shown nowhere."""
    shown = OutboundProxy("proxy", 80, "u:p")
    assert ("proxy:80", "OutboundProxy(host='proxy', port=80)") == (str(shown), repr(shown))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (NO_TUNNEL % b"407 No", "It asks for a user name and password, or for different ones. Put them into METQUAY_"),
        (NO_TUNNEL % b'407 No\r\nProxy-Authenticate: Negotiate, Basic realm="x"', "asks for a user name and password"),
        (NO_TUNNEL % b"407 No\r\nPROXY-AUTHENTICATE: NTLM\r\nProxy-Authenticate: Negotiate", "with NTLM or Negotiate,"),
        (NO_TUNNEL % b"407 No\r\nProxy-Authenticate: Negotiate, NTLM", "Run px (or cntlm, for NTLM)"),
        (NO_TUNNEL % b'407 No\r\nProxy-Authenticate: Digest realm="a", nonce="basic"', "a login with Digest,"),
        (NO_TUNNEL % b"403 No", "refused to connect to lab.metquay.example:443 (status 403). Ask whoever runs it"),
        (NO_TUNNEL % b"405 No", "It seems to be a web server, or a proxy that opens no tunnels"),
        (NO_TUNNEL % b"302 Found", "It wants you to log in with a browser first"),
        (NO_TUNNEL % b"502 No", "could not reach lab.metquay.example:443 (status 502). The problem lies beyond it"),
        (NO_TUNNEL % b"503 No", "status 503"),
        (
            NO_TUNNEL % b'407 Nobody\r\nProxy-Authenticate: Basic realm="x"',
            "asks for a user name and password, ",
        ),
        (b"SSH-2.0-x\r\n\r\n", "gave no valid HTTP answer. Check METQUAY_OUTBOUND_PROXY"),
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
        login = None if b"Nobody" in answer else "u:p"
        error = await failure(LAB, proxy=OutboundProxy("127.0.0.1", port, login))
    assert ("upstream-unreachable", "no") == (error.slug, error.sent)
    assert text in error.message
    authority = b"lab.metquay.example:443"
    lines = [
        b"CONNECT " + authority + b" HTTP/1.1",
        b"Host: " + authority,
        *([b"Proxy-Authorization: Basic dTpw"] if login else []),
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
    error = await failure(LAB, proxy=proxy)
    assert error.message.startswith(f"The corporate proxy {host}:{port} could not be reached: ")
    assert why in error.message
    assert "Check METQUAY_OUTBOUND_PROXY (or the system's proxy setting)" in error.message
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
        error = await failure(LAB, proxy=proxy)
    assert "no" == error.sent
    assert "Errno" not in error.message
    assert f"lab.metquay.example (through the corporate proxy 127.0.0.1:{port})" in error.message


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

    monkeypatch.setattr("socket.getaddrinfo", here)
    async with speaking(play, server_tls if through == "nothing" else None) as port:
        proxy = None if through == "nothing" else OutboundProxy("127.0.0.1", port)
        pool = pool_to(f"https://lab.metquay.example.:{port}", client_tls, outbound_proxy=proxy)
        assert 200 == (await send(pool, "GET")).head.status
        pool.close()
    first = "lab.metquay.example." if proxy is None else f"Host: lab.metquay.example:{port}".encode()
    assert [first, "lab.metquay.example"] == asked


class Upload(Stream):
    """A body that never ends; ``meanwhile`` happens before its second piece."""

    __slots__ = ("_count", "_meanwhile")

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        """Begin."""
        super().__init__()
        self._meanwhile = meanwhile
        self._count = 0

    async def read(self) -> bytes:
        """Return the next piece."""
        self._count += 1
        if self._count == 2:
            self._meanwhile()
        elif self._count > 2:
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
        pool = pool_to(url, client_tls if tls else None)
        await pool.warm()
        await accepting
        response = await send(pool, "POST", body_of(Upload(refuse), chunked=chunked))
        assert (413, b"too big", b"") == (response.head.status, await response.read(), await response.read())
        pool.close()


async def test_tunnel() -> None:
    """Through a tunnel TLS is spoken with Metquay itself, and a truncated answer is found out there too."""
    server_tls, trusting = certified("localhost")

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
        pool = pool_to("https://localhost:9", trusting, outbound_proxy=OutboundProxy("127.0.0.1", port))
        response = await send(pool, "GET")
        assert b"abc" == await response.read()
        with pytest.raises(UpstreamFailure) as caught:
            await response.read()
        pool.close()
    assert "upstream-closed" == caught.value.slug


def test_tls_context(tmp_path: Path) -> None:
    """The bundle is trusted beside the system's store; HTTP/1.1 alone is offered; a broken bundle is an error."""
    before = tls_context(None).cert_store_stats()["x509_ca"]
    bundle = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(bundle))
    context = tls_context(bundle)
    assert before + 1 == context.cert_store_stats()["x509_ca"]
    assert (ssl.CERT_REQUIRED, True) == (context.verify_mode, context.check_hostname)
    bundle.write_text("nothing")
    with pytest.raises(ValueError, match="holds no certificate"):
        tls_context(bundle)
