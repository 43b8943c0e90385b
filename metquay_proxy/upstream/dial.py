"""The way to Metquay: look-up, TCP, the corporate proxy's tunnel, TLS, and what to tell where one of them fails.

Owns the trust in certificates and the connect time-out. Must not know what is sent on a connection, nor by whom.

Facts: RFC 9110 section 9.3.6 (CONNECT). RFC 8305 (happy eyeballs). Windows's own TLS (truststore) accepts an issuing CA
without its root only where it is in the system's store. No TLS server speaks before it was spoken to. What a write that
fails loses (see ``connection``), it loses before TLS has decrypted it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import re
import socket
import ssl
import sys
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from aiohappyeyeballs import start_connection

from metquay_proxy.rules.address import Address
from metquay_proxy.rules.errors import UpstreamFailure, shortage
from metquay_proxy.rules.http1 import ProtocolError, ResponseReader
from metquay_proxy.threads import in_thread
from metquay_proxy.upstream.bundle import trust
from metquay_proxy.upstream.connection import left_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiohappyeyeballs import AddrInfoType

    from metquay_proxy.rules.headers import ResponseHead
    from metquay_proxy.rules.target import BaseURL

_P = TypeVar("_P", bound=asyncio.BaseProtocol)

_CA_FILES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
)
_HEAD_START: Final = 0.25
"""Seconds that one address of a host is ahead of the next one (RFC 8305 section 5)."""
_LOOK_UP_SHARED: Final = 1.0
"""Seconds after which a look-up that has no answer yet is no longer shared: the network may be back."""
_SUCCESS: Final = range(200, 300)
"""Any of these opens a tunnel (RFC 9110 section 9.3.6)."""
_GATEWAY_FAULTS: Final = (502, 503, 504)
_REFUSALS: Final = {
    (400, 404, 405, 501): "It seems to be a web server, or a proxy that opens no tunnels: check METQUAY_OUTBOUND_PROXY "
    "(or the system's proxy setting) and its port.",
    _GATEWAY_FAULTS: "The problem lies beyond it: check METQUAY_HOST for a typing mistake, then ask whoever runs it.",
    (301, 302, 303, 307, 308, 511): "It wants you to log in with a browser first: open any page there, then try again.",
}
"""What to do about a corporate proxy's status."""
_PROXY_SETTING: Final = "METQUAY_OUTBOUND_PROXY (or the system's proxy setting)"
_NETWORK: Final = "Check the network (cable, VPN, firewall), and METQUAY_OUTBOUND_PROXY if it has a corporate proxy."
_CA: Final = "If your company inspects TLS or runs its own Metquay, METQUAY_CA_BUNDLE must name its CA's file (PEM)."
_CAUSES: Final = (
    (ssl.SSLCertVerificationError, ": its certificate was not accepted ({told})", _CA),
    (ssl.SSLError, ": TLS could not be set up ({told})", f"Check the address, and that the server uses TLS. {_CA}"),
    (TimeoutError, " within {timeout:g} s", _NETWORK),
    (socket.gaierror, ": its name could not be looked up", "Check {setting} for a typing mistake, and the network."),
    (ConnectionRefusedError, ": nothing listens there", "Check {setting} and its port, or wait if it worked before."),
    (ConnectionResetError, ": the connection was closed at once", "Check the firewall and the address, and try again."),
    (OSError, ": the network has no connection to it", _NETWORK),
)
"""Why something could not be reached (``told``: by OpenSSL), and what to do about it."""
_SCHEME: Final = re.compile(rb"(?:\A|,)[ \t]*(basic|digest|negotiate|ntlm|kerberos|bearer)(?=[ \t,]|\Z)")


@dataclass(frozen=True, slots=True)
class OutboundProxy:
    """A corporate proxy, asked for a tunnel by CONNECT; ``login`` is ``user:password`` or None."""

    host: str
    port: int
    login: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Say where it is."""
        return str(Address(self.host, self.port))


@dataclass(slots=True, eq=False)
class Dialer:
    """Opens connections to one upstream, by its corporate proxy where there is one.

    ``timeout`` is in seconds, for all that happens until TLS stands; without an ``ssl_context`` there is no TLS.
    """

    base: BaseURL
    proxy: OutboundProxy | None
    timeout: float
    ssl_context: ssl.SSLContext | None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, init=False)
    _looking: tuple[float, asyncio.Future[Sequence[AddrInfoType]]] | None = field(default=None, init=False)

    async def open(self, make: Callable[[], _P]) -> _P:
        """Return a new protocol of ``make``'s on a connection that is finished; raise ``UpstreamFailure``."""
        proxy = self.proxy
        host, port = (self.base.name, self.base.port) if proxy is None else (proxy.host, proxy.port)
        try:
            async with asyncio.timeout(self.timeout):
                sock = await start_connection(await self._look_up(host, port), happy_eyeballs_delay=_HEAD_START)
                with contextlib.ExitStack() as undo:
                    undo.callback(sock.close)
                    if proxy is not None:
                        await self._make_tunnel(sock, proxy)
                    protocol = await self._finish(sock, make, undo)
                    undo.pop_all()
                    return protocol
        except OSError as error:
            raise self.failure(error) from None

    async def _look_up(self, host: str, port: int) -> Sequence[AddrInfoType]:
        """Return a host's addresses; raise ``socket.gaierror``. Who asks while another asks shares its answer.

        Nothing can cut a look-up short.
        """
        ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        with contextlib.suppress(socket.gaierror):
            return ask(flags=socket.AI_NUMERICHOST)
        now = self._loop.time()
        if self._looking is None or self._looking[1].done() or now - self._looking[0] > _LOOK_UP_SHARED:
            found: asyncio.Future[Any] = in_thread(ask)
            found.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to see it
            self._looking = now, found
        return await asyncio.shield(self._looking[1])

    async def _make_tunnel(self, sock: socket.socket, proxy: OutboundProxy) -> None:
        """Ask a corporate proxy for the way; raise ``OSError`` or ``UpstreamFailure``."""
        authority = str(Address(self.base.host, self.base.port))
        head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
        if proxy.login is not None:
            head += f"Proxy-Authorization: Basic {base64.b64encode(proxy.login.encode()).decode()}\r\n"
        await self._loop.sock_sendall(sock, head.encode("ascii") + b"\r\n")
        reader, did = ResponseReader("CONNECT"), "closed the connection"
        try:
            while reader.head is None:
                if not (data := await self._loop.sock_recv(sock, 4096)):
                    raise ProtocolError
                did = "gave no valid HTTP answer"
                reader.feed(data)
        except ProtocolError:
            message = f"The corporate proxy {proxy} {did}. Check {_PROXY_SETTING} and its port, then try again."
            raise UpstreamFailure("upstream-unreachable", message, repeatable=True) from None
        status = reader.head.status
        if status in _SUCCESS:
            return
        known = (cure for statuses, cure in _REFUSALS.items() if status in statuses)
        cure = next(known, "Ask whoever runs it to allow this address.")
        if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            cure = _what_it_wants(reader.head)
        did = "could not reach" if status in _GATEWAY_FAULTS else "refused to connect to"
        message = f"The corporate proxy {proxy} {did} {authority} (status {status}). {cure}"
        raise UpstreamFailure("upstream-unreachable", message, repeatable=status in _GATEWAY_FAULTS)

    async def _finish(self, sock: socket.socket, make: Callable[[], _P], undo: contextlib.ExitStack) -> _P:
        """Let a protocol have the socket, under TLS where there is a context."""
        transport, unasked = await self._loop.create_connection(_Unasked, sock=sock)
        undo.callback(transport.abort)
        used: asyncio.Transport | None = transport
        if self.ssl_context is not None:
            if unasked.spoke:
                raise ssl.SSLError
            used = await self._loop.start_tls(transport, unasked, self.ssl_context, server_hostname=self.base.host)
            if not transport.is_closing():
                transport.set_protocol(_LastWords(transport))
        if used is None or used.is_closing() or unasked.spoke:
            raise ConnectionResetError
        protocol = make()
        used.set_protocol(protocol)
        protocol.connection_made(used)
        return protocol

    def failure(self, error: OSError) -> UpstreamFailure:
        """Say why no connection came about, and what to do."""
        proxy = self.proxy
        place, setting = self.base.authority, "METQUAY_HOST"
        if proxy is not None:
            place += f" (through the corporate proxy {proxy})"
        # nothing else can happen once the corporate proxy is reached
        if proxy is not None and not isinstance(error, (ConnectionResetError, TimeoutError, ssl.SSLError)):
            place, setting = f"The corporate proxy {proxy}", _PROXY_SETTING
        if isinstance(error, socket.gaierror):  # which does not tell a shortage: another attempt does
            try:
                socket.socket().close()
            except OSError as reason:
                error = reason
        why, cure = next((why, cure) for kind, why, cure in _CAUSES if isinstance(error, kind))
        if (short := shortage(error)) is not None:
            why, cure = f": {short[0]}", short[1]
        told = getattr(error, "verify_message", None) or getattr(error, "reason", None) or "TLS failed"
        why, cure = why.format(told=told, timeout=self.timeout), cure.format(setting=setting)
        message = f"{place} could not be reached{why}. {cure}"
        slug = "upstream-tls" if isinstance(error, ssl.SSLError) else "upstream-unreachable"
        return UpstreamFailure(slug, message, repeatable=not isinstance(error, ssl.SSLCertVerificationError))


class _Unasked(asyncio.Protocol):
    """Stands where nobody may speak: before TLS has begun, and until somebody can listen. No TLS server does."""

    spoke = False

    def data_received(self, _data: bytes, /) -> None:
        self.spoke = True


class _LastWords(asyncio.BufferedProtocol):
    """Stands before the loop's TLS, and hands it what was left behind where a write fails."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._tls = cast("asyncio.BufferedProtocol", transport.get_protocol())
        for name in ("get_buffer", "buffer_updated", "eof_received", "pause_writing"):
            setattr(self, name, getattr(self._tls, name))  # with no call of ours between

    def resume_writing(self) -> None:
        # Where a write fails inside of this call, asyncio ends the connection twice, and at first without the error.
        asyncio.get_running_loop().call_soon(self._tls.resume_writing)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            for data in left_behind(self._transport):
                cast("memoryview", self._tls.get_buffer(len(data)))[: len(data)] = data
                self._tls.buffer_updated(len(data))
        self._tls.connection_lost(exc)


def _what_it_wants(answer: ResponseHead) -> str:
    """Return what to do about a corporate proxy's 407."""
    asked = b",".join(value.lower() for name, value in answer.noted if name == b"proxy-authenticate")
    schemes = dict.fromkeys(scheme.decode() for scheme in _SCHEME.findall(asked))
    if schemes and "basic" not in schemes:
        wanted = " or ".join("NTLM" if scheme == "ntlm" else scheme.title() for scheme in schemes)
        return (
            f"It asks for a login with {wanted}, which metquay-proxy does not support. Run px (or cntlm, for NTLM) on "
            "this computer, and set METQUAY_OUTBOUND_PROXY=http://127.0.0.1:3128."
        )
    return (
        "It asks for a user name and password, or for different ones. Put them into METQUAY_OUTBOUND_PROXY "
        "(http://user:password@host:port, each % in them written as %25), and start the proxy again."
    )


def tls_context(ca_bundle: Path | None) -> ssl.SSLContext:
    """Return a context that verifies names and certificates by the operating system's store and ``ca_bundle``.

    Raises as ``bundle.trust``.
    """
    if sys.platform in {"win32", "darwin"}:
        import truststore  # noqa: PLC0415 - other systems need not load it

        context: ssl.SSLContext = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    else:
        # truststore would read the whole store again at each connection, 50 ms in which nobody else is served
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_default_certs()
        paths = ssl.get_default_verify_paths()
        known = [Path(file) for file in _CA_FILES if Path(file).is_file()]
        if paths.cafile is None and paths.capath is None and known:  # an OpenSSL that was built for another system
            context.load_verify_locations(known[0])
    context.set_alpn_protocols(["http/1.1"])
    # as curl does: the CA that issued the server's certificate is enough, without the root above it
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if ca_bundle is not None:
        trust(context, ca_bundle)
    return context
