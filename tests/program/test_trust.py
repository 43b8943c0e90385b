"""Whom the proxy trusts on the way to Metquay: certificates, names, corporate proxies. Nothing is sent to others."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ssl
import sys
from typing import TYPE_CHECKING

import aiohttp
import pytest
import trustme

from metquay_proxy.sandbox.server import Sandbox
from metquay_proxy.upstream.dial import tls_context
from tests.running import running, simulated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PAST = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
def ca() -> trustme.CA:
    """The laboratory's own CA."""
    return trustme.CA()


@pytest.fixture
def bundle(ca: trustme.CA, tmp_path: Path) -> str:
    """What METQUAY_CA_BUNDLE names."""
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return str(path)


@contextlib.asynccontextmanager
async def tls_sandbox(cert: trustme.LeafCert) -> AsyncIterator[Sandbox]:
    """Run a simulated Metquay that shows this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    cert.configure_cert(context)
    async with simulated(ssl_context=context) as sandbox:
        yield sandbox


@pytest.mark.skipif(sys.platform in {"win32", "darwin"}, reason="the store is the system's own there")
def test_the_store_is_read_once() -> None:
    """The context holds the store itself: truststore's would read it anew at each connection, and block meanwhile."""
    context = tls_context(None)
    assert ssl.SSLContext is type(context)
    assert ssl.CERT_REQUIRED is context.verify_mode
    assert context.check_hostname


async def ask(url: str) -> tuple[int, str | None, str]:
    """Make one request; return status, the proxy's slug, and the text."""
    async with aiohttp.ClientSession() as session, session.get(url + "/customers?limit=1") as response:
        return response.status, response.headers.get("X-Metquay-Proxy-Error"), await response.text()


async def test_right_ca(ca: trustme.CA, bundle: str) -> None:
    """A certificate of a CA in METQUAY_CA_BUNDLE, for the right name, is accepted."""
    async with (
        tls_sandbox(ca.issue_cert("localhost")) as sandbox,
        running(f"https://localhost:{sandbox.port}", ca_bundle=bundle) as (_, url),
    ):
        status, slug, _ = await ask(url)
        assert (200, None) == (status, slug)


@pytest.mark.parametrize("shown", ["the whole chain", "its own certificate alone"])
async def test_issuing_ca(ca: trustme.CA, tmp_path: Path, shown: str) -> None:
    """The CA that issued the certificate will do in METQUAY_CA_BUNDLE, without the root above it, as for curl."""
    issuing = ca.create_child_ca()
    issuing.cert_pem.write_to_path(str(tmp_path / "issuing.pem"))
    cert = issuing.issue_cert("localhost")
    if shown != "the whole chain":
        cert.cert_chain_pems[1:] = []
    async with (
        tls_sandbox(cert) as sandbox,
        running(f"https://localhost:{sandbox.port}", ca_bundle=str(tmp_path / "issuing.pem")) as (_, url),
    ):
        assert 200 == (await ask(url))[0]


async def test_another_issuing_ca(ca: trustme.CA, tmp_path: Path) -> None:
    """What another CA under the same root issued is not accepted for it."""
    ca.create_child_ca().cert_pem.write_to_path(str(tmp_path / "issuing.pem"))
    async with (
        tls_sandbox(ca.create_child_ca().issue_cert("localhost")) as sandbox,
        running(f"https://localhost:{sandbox.port}", ca_bundle=str(tmp_path / "issuing.pem"), max_wait="1") as (_, url),
    ):
        assert (502, "upstream-tls") == (await ask(url))[:2]
        assert 0 == sandbox.requests + sandbox.logins + sandbox.refused_logins


@pytest.mark.parametrize("fault", ["unknown CA", "self-signed", "expired", "wrong name"])
async def test_wrong_certificate(ca: trustme.CA, bundle: str, fault: str) -> None:
    """A certificate that can't be trusted is refused with a text that says what to do, and nothing is sent."""
    cert = {
        "unknown CA": lambda: trustme.CA().issue_cert("localhost"),
        "self-signed": lambda: trustme.CA().issue_cert("localhost"),
        "expired": lambda: ca.issue_cert("localhost", not_before=PAST, not_after=PAST + dt.timedelta(days=1)),
        "wrong name": lambda: ca.issue_cert("other.example"),
    }[fault]()
    if fault == "self-signed":
        authority = trustme.CA()
        cert.configure_cert = _shows(authority)  # type: ignore[method-assign]
    async with (
        tls_sandbox(cert) as sandbox,
        running(f"https://localhost:{sandbox.port}", ca_bundle=bundle, max_wait="1") as (proxy, url),
    ):
        status, slug, text = await ask(url)
        assert (502, "upstream-tls") == (status, slug)
        assert "METQUAY_CA_BUNDLE" in text
        assert "certificate" in text
        assert 0 == sandbox.requests + sandbox.logins + sandbox.refused_logins
        assert proxy.tokens.state.failures


def _shows(authority: trustme.CA) -> object:
    def configure(context: ssl.SSLContext) -> None:
        with authority.private_key_pem.tempfile() as key, authority.cert_pem.tempfile() as cert:
            context.load_cert_chain(cert, key)

    return configure


async def test_certificate_that_goes_bad(ca: trustme.CA, bundle: str) -> None:
    """With a token at hand, a certificate that is not accepted is 502 upstream-tls, and the request is not sent."""
    async with tls_sandbox(ca.issue_cert("localhost")) as sandbox:
        port = sandbox.port
        async with running(f"https://localhost:{port}", ca_bundle=bundle, retries="0") as (_, url):
            assert 200 == (await ask(url))[0]
            await sandbox.stop()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            trustme.CA().issue_cert("localhost").configure_cert(context)
            intercepting = Sandbox(rate_limit=None, ssl_context=context)
            await intercepting.start(port=port)
            try:
                status, slug, text = await ask(url)
            finally:
                await intercepting.stop()
            assert (502, "upstream-tls") == (status, slug)
            assert "METQUAY_CA_BUNDLE" in text
            assert 0 == intercepting.requests


class CorporateProxy:
    """A proxy that opens tunnels by CONNECT, and remembers for whom and with which authorization."""

    def __init__(self, wants: str | None = None) -> None:
        """``wants`` is the value of Proxy-Authorization that it insists on."""
        self.asked: list[str] = []
        self.authorization: list[str | None] = []
        self._wants = wants
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> str:
        """Listen; returns the host and port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        method, authority, _ = lines[0].split(" ")
        assert "CONNECT" == method
        fields = dict(line.split(": ", 1) for line in lines[1:] if line)
        self.asked.append(authority)
        self.authorization.append(fields.get("Proxy-Authorization"))
        if self._wants is not None and self._wants != fields.get("Proxy-Authorization"):
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        host, port = authority.rsplit(":", 1)
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_corporate_proxy_of_the_setting(ca: trustme.CA, bundle: str) -> None:
    """METQUAY_OUTBOUND_PROXY is asked for a tunnel, with its password; the certificate is verified all the same."""
    corporate = CorporateProxy("Basic bWU6aHVuIHRlcg==")
    async with tls_sandbox(ca.issue_cert("localhost")) as sandbox, corporate as address:
        upstream = f"https://localhost:{sandbox.port}"
        async with running(upstream, ca_bundle=bundle, outbound_proxy=f"http://me:hun%20ter@{address}") as (_, url):
            assert 200 == (await ask(url))[0]
        assert {f"localhost:{sandbox.port}"} == set(corporate.asked)


async def test_corporate_proxy_that_refuses(ca: trustme.CA, bundle: str) -> None:
    """Where the corporate proxy wants a password, the error says where to put it, and nothing reaches Metquay."""
    corporate = CorporateProxy("Basic right")
    async with tls_sandbox(ca.issue_cert("localhost")) as sandbox, corporate as address:
        upstream = f"https://localhost:{sandbox.port}"
        async with running(upstream, ca_bundle=bundle, max_wait="1", outbound_proxy=f"http://{address}") as (_, url):
            status, _, text = await ask(url)
        assert 503 == status
        assert "METQUAY_OUTBOUND_PROXY" in text
        assert 0 == sandbox.logins + sandbox.refused_logins


async def test_corporate_proxy_with_wrong_certificate(bundle: str) -> None:
    """An interception behind the tunnel is found out."""
    corporate = CorporateProxy()
    async with tls_sandbox(trustme.CA().issue_cert("localhost")) as sandbox, corporate as address:
        upstream = f"https://localhost:{sandbox.port}"
        async with running(upstream, ca_bundle=bundle, max_wait="1", outbound_proxy=f"http://{address}") as (_, url):
            assert (502, "upstream-tls") == (await ask(url))[:2]
        assert 0 == sandbox.logins + sandbox.refused_logins
        assert corporate.asked


@pytest.mark.parametrize(("no_proxy", "used"), [(None, True), ("localhost:{}", False), ("localhost:1", True)])
async def test_system_proxy(
    ca: trustme.CA, bundle: str, monkeypatch: pytest.MonkeyPatch, no_proxy: str | None, *, used: bool
) -> None:
    """HTTPS_PROXY is honoured, and so is NO_PROXY."""
    for name in ("https_proxy", "no_proxy", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    corporate = CorporateProxy()
    async with tls_sandbox(ca.issue_cert("localhost")) as sandbox, corporate as address:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
        if no_proxy is not None:
            monkeypatch.setenv("NO_PROXY", no_proxy.format(sandbox.port))
        async with running(f"https://localhost:{sandbox.port}", ca_bundle=bundle) as (_, url):
            assert 200 == (await ask(url))[0]
        assert used is bool(corporate.asked)


async def test_netrc_is_never_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sandbox: Sandbox) -> None:
    """A netrc entry for the upstream changes nothing."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with running(sandbox.url) as (_, url):
        assert 200 == (await ask(url))[0]
