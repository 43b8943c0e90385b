"""Where the proxy listens: sockets that are bound, why there is none, and clients that are let in.

Owns binding and accepting, and the certificate that is shown. Must not know who serves what comes in.

Facts: Windows spends up to 2 s on a missing ``::1``. RFC 4291 section 2.5.3 (the loopback address). A new descriptor
has the lowest free number (POSIX, ``open``). At the limit asyncio's own server logs each failure of up to ``backlog``
attempts a second, and uvloop's closes who waits, without a word. A certificate and a key that don't belong together,
loaded into a context in use, make every later handshake fail (OpenSSL keeps the halves). OpenSSL asks for the context
of each handshake, with a server name or without (SSL_CTX_set_tlsext_servername_callback), so that listeners need not be
opened anew. What begins as no TLS at all it calls by three names (sslerr.h, SSL_R_), and the loop then closes without a
word.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pathlib
import socket
import ssl
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.log import log
from metquay_proxy.rules.address import Address, every
from metquay_proxy.rules.errors import ProxyError, shortage
from metquay_proxy.rules.target import is_loopback

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from pathlib import Path

    Bound = tuple[Address, list[socket.socket]]
    Serve = Callable[[], asyncio.BaseProtocol]
    Connect = Callable[[socket.socket], Coroutine[Any, Any, object]]
    Report = Callable[[str | None], None]

_BACKLOG: Final = 1024
_NO_FAMILY: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT, errno.EINVAL})
_AT_ONCE: Final = 16
"""Clients that are let in before others get their turn."""
_RETRY: Final = 1.0
"""Seconds from one look for a free descriptor to the next."""
_CALM: Final = 3
"""Such looks without want, after which it is over."""
_RESERVE: Final = 64
"""Descriptors that clients must leave to connections to Metquay and to files; a quarter where there are few."""

_USE_HTTPS: Final = ProxyError("bad-request", "This is http where https is expected. Use https:// in the tool.").body()
_IN_CLEAR: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nX-Metquay-Proxy-Error: bad-request\r\n"
    b"X-Metquay-Proxy-Sent: no\r\nX-Metquay-Proxy-Attempts: 0\r\nCache-Control: no-store\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_USE_HTTPS), _USE_HTTPS)
)

_ELSEWHERE: Final = "choose another place in {}, such as localhost:0 for any free port."
_FORBIDDEN: Final = "is forbidden to this user.", "Choose another port above 1023, or a folder that it may write to."
_NOT_HERE: Final = "is not an address of this computer, or IPv6 is off.", "Use localhost, or 0.0.0.0 for every address."
_UNKNOWN: Final = "can't be used: its name is not known.", "Check the spelling, or write localhost."
_WHY: Final = {
    errno.EADDRINUSE: ("is taken, probably by another program.", f"Stop that one, or {_ELSEWHERE}"),
    errno.ENOENT: ("is in a folder that does not exist.", f"Make that folder, or {_ELSEWHERE}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys(_NO_FAMILY, _NOT_HERE),
}
"""What is wrong with an address, and what to do about it."""


class CannotListen(OSError):
    """Why there is no listening at an address, for people: ``cause`` names it, ``cure`` says what to do.

    ``taken``: it is worth asking who listens there.
    """

    def __init__(self, address: Address, error: OSError, setting: str) -> None:
        why, cure = shortage(error) or (error.strerror or str(error), f"Mend that, or {_ELSEWHERE}")
        other = f"can't be used: {why}.", cure
        cause, cure = _UNKNOWN if isinstance(error, socket.gaierror) else _WHY.get(error.errno or 0, other)
        self.cause, self.cure = f"{address} {cause}", cure.format(setting)
        super().__init__(f"{self.cause} {self.cure}")
        self.address, self.taken = address, error.errno in {errno.EADDRINUSE, errno.EACCES}


def bind(
    addresses: Sequence[Address], socket_mode: int = 0o600, setting: str = "METQUAY_LISTEN (--listen)"
) -> list[Bound]:
    """Return each address, with the port that it got, and its listening sockets; raise ``CannotListen``.

    ``setting``: where the addresses stand.

    ``localhost`` means both loopback addresses on one port (Windows spends seconds on a missing ``::1``), and ``[::]``
    every address of both families. Of these two a family that the machine lacks is skipped; a port that is taken on
    either is an error. What another of the addresses listens for already gets no socket of its own.
    """
    bound: list[Bound] = []
    for address in addresses:
        try:
            bound.append(_bind_unix(address, socket_mode) if address.path else _bind_hosts(address, addresses))
        except OSError as error:
            release(bound)
            raise CannotListen(address, error, setting) from None
    return bound


def sockets_of(bound: Iterable[Bound]) -> list[socket.socket]:
    """Return all of them."""
    return [sock for _, sockets in bound for sock in sockets]


def release(bound: Iterable[Bound]) -> None:
    """Close sockets that nobody has accepted on, and leave nothing behind."""
    _close(sockets_of(bound))


def _close(sockets: Iterable[socket.socket]) -> None:
    """Close them, with the paths of unix sockets: another proxy may take these while this one drains."""
    for sock in sockets:
        place = sock.getsockname()
        sock.close()
        if isinstance(place, str):
            pathlib.Path(place).unlink(missing_ok=True)


def serving_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a new context that serves with this pair; raise ``OSError``, or ``ValueError`` with a text for people."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError:
        what = "is not the private key, in PEM form and without a password, of the certificate in"
        raise ValueError(f"{key} {what} {certificate}") from None
    return context


class Serving:
    """The context of all listeners, whose certificate is another one as soon as ``use`` was called."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raise as ``serving_context``."""
        self.context = self._current = serving_context(certificate, key)
        self.context.sni_callback = self._choose

    def use(self, context: ssl.SSLContext) -> None:
        """Serve new handshakes with the certificate of ``context``."""
        self._current = context

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str, _asked: ssl.SSLContext) -> None:
        connection.context = self._current


def own_names(addresses: Iterable[Address]) -> frozenset[str] | None:
    """Return the names without a dot by which tools can ask a proxy at these addresses; None where that is any.

    Where only this machine's loopback addresses are listened on, no name but its own leads there by right.
    """
    loopback = all(not address.path and is_loopback(address.host) for address in addresses)
    return frozenset({socket.gethostname().partition(".")[0].lower()}) if loopback else None


def _needed(address: Address, listed: Sequence[Address]) -> Sequence[str]:
    """Return the hosts at which an address needs sockets of its own."""
    same = [other for other in listed if other.port == address.port]
    if not address.port:
        return address.hosts
    before = {host for other in same[: same.index(address)] for host in other.hosts}
    wide = {every(host) for other in same for host in other.hosts if host == every(host)}
    return [host for host in address.hosts if host not in before and (host in wide or every(host) not in wide)]


def _bind_hosts(address: Address, listed: Sequence[Address], attempts: int = 10) -> Bound:
    """Bind all on one port. Where any will do, one that is free on one family may be taken on the other: retry."""
    sockets: list[socket.socket] = []
    port, missing = address.port, 0
    for host in _needed(address, listed):
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sockets.append(socket.create_server(place, family=family, backlog=_BACKLOG))
            port = sockets[0].getsockname()[1]
        except OSError as error:
            missing += 1
            if error.errno in _NO_FAMILY and missing < len(address.hosts):
                continue
            release([(address, sockets)])
            if error.errno == errno.EADDRINUSE and not address.port and attempts > 1:
                return _bind_hosts(address, listed, attempts - 1)
            raise
    return address._replace(port=port), sockets


def _bind_unix(address: Address, mode: int) -> Bound:
    """Bind a socket that only those may open whom ``mode`` lets; a stale one is replaced, a live one is not."""
    path = pathlib.Path(address.path)
    if path.exists():
        if not path.is_socket():
            raise FileExistsError(errno.EEXIST, "a file that is no socket is in the way")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # noqa: FBT003 - a position of the standard library's
            if probe.connect_ex(address.path) != errno.ECONNREFUSED:  # its owner lives, even where it accepts nobody
                raise OSError(errno.EADDRINUSE, "another program listens there")
        path.unlink()
    mask = os.umask(0o777 & ~mode)
    try:
        with socket.socket(socket.AF_UNIX) as sock:  # closed where that fails
            sock.bind(address.path)
            sock.listen(_BACKLOG)
            return address, [sock.dup()]
    finally:
        os.umask(mask)


async def let_in(  # noqa: PLR0913 - who is served where, and the bounds
    serve: Serve,
    sockets: Sequence[socket.socket],
    tls: ssl.SSLContext | None,
    report: Report,
    reserve: int = _RESERVE,
    handshake: float = 15.0,
    shutdown: float = 60.0,
) -> Sequence[asyncio.AbstractServer | Door]:
    """Serve who comes at listening sockets until what is returned is closed; ``serve`` makes a protocol for each.

    While the process has hardly a descriptor left nobody is let in: ``report`` hears why, and None when that is over.
    ``reserve`` descriptors are left to others (a quarter of all, where there are few). TLS must have begun after
    ``handshake`` seconds, and have ended ``shutdown`` seconds after the last answer: a slow client reads until then.
    """
    loop = asyncio.get_running_loop()
    secure: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": handshake, "ssl_shutdown_timeout": shutdown}
    how = {} if tls is None else secure
    if sys.platform == "win32":  # its loop has no readers, and it knows no such limit
        return [await loop.create_server(serve, sock=sock, backlog=_BACKLOG, **how) for sock in sockets]
    connect: Connect = partial(loop.connect_accepted_socket, serve, **how)
    return [Door(partial(_secure, connect) if tls else connect, sockets, report, reserve)]


def _secure(connect: Connect, client: socket.socket) -> Coroutine[Any, Any, None]:
    """Connect over TLS; who speaks http in its place is answered in clear text, as far as that can be had.

    The loop gets a descriptor of its own, since it has closed that by the time the handshake has failed. It is made at
    once, so that whoever counts descriptors sees it.
    """
    client.setblocking(False)  # noqa: FBT003 - a position of the standard library's
    try:
        return _shake_hands(connect, client, client.dup())
    except OSError:
        client.close()
        raise


async def _shake_hands(connect: Connect, client: socket.socket, own: socket.socket) -> None:
    with client:
        try:
            await connect(own)
        except ssl.SSLError as error:
            if error.reason in {"HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "WRONG_VERSION_NUMBER"}:
                log.warning("a client does not speak TLS, which is expected here")
                client.send(_IN_CLEAR)
            raise


async def listen(report: Report, serve: Serve, host: str, port: int) -> tuple[Sequence[Any], int]:
    """Let in whoever comes to the simulator, with no reserve; return what is to be closed, and the port."""
    [(address, sockets)] = bind([Address(host, port)])
    return await let_in(serve, sockets, None, report, 0), address.port


class Door:
    """Accepts by itself: see the facts above. Who is let in for the last descriptor could not be served either."""

    def __init__(self, connect: Connect, sockets: Sequence[socket.socket], report: Report, reserve: int) -> None:
        """Take what ``let_in`` takes; ``connect`` serves one client, and raises ``OSError`` where it can't."""
        self._connect, self._sockets, self._report, self._reserve = connect, sockets, report, reserve
        self._loop = asyncio.get_running_loop()
        self._looking: asyncio.TimerHandle | None = None
        self._calm = 0
        for sock in sockets:
            sock.setblocking(False)  # noqa: FBT003 - a position of the standard library's
        self._open()

    def close(self) -> None:
        """Let nobody in any more; who is there may stay."""
        self._shut()
        if self._looking is not None:
            self._looking.cancel()
        _close(self._sockets)
        self._sockets = ()

    def _open(self) -> None:
        for sock in self._sockets:
            self._loop.add_reader(sock, self._accept, sock)

    def _shut(self) -> None:
        for sock in self._sockets:
            self._loop.remove_reader(sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                client, _from = sock.accept()
                arriving = self._loop.create_task(self._connect(client))
            except OSError as error:  # nobody waits any more, or who did has just left
                self._wait(error)
                return
            arriving.add_done_callback(partial(_arrived, client))
            if client.fileno() >= _descriptors(self._reserve):
                self._wait(OSError(errno.EMFILE, ""))
                return

    def _wait(self, error: OSError) -> None:
        if (short := shortage(error)) is None:
            return
        self._shut()
        self._calm = 0
        if self._looking is None:
            limit = f" (limit {_descriptors(0)})" if error.errno == errno.EMFILE else ""
            self._report(f"{short[0]}{limit}. {short[1]}")
            self._looking = self._loop.call_later(_RETRY, self._look)

    def _look(self) -> None:
        room = False
        with contextlib.suppress(OSError), socket.socket(self._sockets[0].family) as probe:
            room = probe.fileno() < _descriptors(self._reserve)
        self._calm = self._calm + 1 if room else 0
        if self._calm == 1:
            self._open()
        self._looking = None if self._calm > _CALM else self._loop.call_later(_RETRY, self._look)
        if self._looking is None:
            self._report(None)


def _arrived(client: socket.socket, arriving: asyncio.Task[object]) -> None:
    if arriving.cancelled():  # perhaps before a transport had it, which closes it otherwise
        client.close()
    elif (error := arriving.exception()) and not isinstance(error, OSError):
        raise error
    elif error:  # it has left, or speaks no TLS; what it leaves must not wait for a collection of garbage
        error.__traceback__ = error.__context__ = None


def _descriptors(reserve: int) -> int:
    """Return how many descriptors clients may take up, where ``reserve`` are for others."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit - min(reserve, limit // 4)
