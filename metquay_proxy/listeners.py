"""Where the proxy listens: sockets that are bound, why there is none, and clients that are let in.

Owns binding and accepting alone. Must not know who serves what comes in.

Facts: Windows spends up to 2 s on a missing ``::1``. RFC 4291 section 2.5.3 (the loopback address). A new descriptor
has the lowest free number (POSIX, ``open``). At the limit asyncio's own server logs each failure of up to ``backlog``
attempts a second, and uvloop's closes who waits, without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import pathlib
import socket
import stat
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.rules.address import Address, every
from metquay_proxy.rules.errors import shortage

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    Bound = tuple[Address, list[socket.socket]]

_BACKLOG: Final = 1024
_BIND_ATTEMPTS: Final = 10  # a port that is free on one family may be taken on the other
_NO_FAMILY: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT, errno.EINVAL})
_AT_ONCE: Final = 16
"""Clients that are let in before others get their turn."""
_RETRY: Final = 1.0
"""Seconds from one look for a free descriptor to the next."""
_CALM: Final = 3
"""Such looks without want, after which it is over."""
_RESERVE: Final = 64
"""Descriptors that clients must leave to connections to Metquay and to files; a quarter where there are few."""


class CannotListen(OSError):
    """Why there is no listening at an address, for people: ``cause`` names it, ``cure`` says what to do."""

    def __init__(self, address: Address, error: OSError) -> None:
        self.cause, self.cure = _explained(address, error)
        super().__init__(f"{self.cause} {self.cure}")
        self.taken = error.errno in {errno.EADDRINUSE, errno.EACCES}
        """Whether it is worth asking who listens there."""


def bind(addresses: Iterable[Address], socket_mode: int = 0o600) -> list[Bound]:
    """Return each address, with the port that it got, and its listening sockets; raise ``CannotListen``.

    ``localhost`` means both loopback addresses on one port (Windows spends seconds on a missing ``::1``), and ``[::]``
    every address of both families. Of these two a family that the machine lacks is skipped; a port that is taken on
    either is an error. What another of the addresses listens for already gets no socket of its own.
    """
    listed = tuple(addresses)
    bound: list[Bound] = []
    for address in listed:
        try:
            if address.path:
                bound.append((address, [_bind_unix(address.path, socket_mode)]))
            else:
                bound.append(_bind_hosts(address, _needed(address, listed)))
        except OSError as error:
            release(bound)
            raise CannotListen(address, error) from None
    return bound


def release(bound: Iterable[Bound]) -> None:
    """Close sockets that nobody has accepted on, and leave nothing behind."""
    for address, sockets in bound:
        for sock in sockets:
            sock.close()
        if address.path:
            pathlib.Path(address.path).unlink(missing_ok=True)


def _needed(address: Address, listed: Sequence[Address]) -> Sequence[str]:
    """Return the hosts at which an address needs sockets of its own."""
    same = [other for other in listed if other.port == address.port]
    if not address.port:
        return address.hosts
    before = {host for other in same[: same.index(address)] for host in other.hosts}
    wide = {every(host) for other in same for host in other.hosts if host == every(host)}
    return [host for host in address.hosts if host not in before and (host in wide or every(host) not in wide)]


def _bind_hosts(address: Address, hosts: Sequence[str]) -> Bound:
    for attempt in range(_BIND_ATTEMPTS):
        sockets: list[socket.socket] = []
        port, missing = address.port, None
        try:
            for host in hosts:
                try:
                    sockets.append(_bind_tcp(host, port))
                except OSError as error:
                    if len(address.hosts) == 1 or error.errno not in _NO_FAMILY:
                        raise
                    missing = error
                else:
                    port = sockets[0].getsockname()[1]
            if missing is not None and not sockets and len(hosts) > 1:
                raise missing
        except OSError as error:
            for sock in sockets:
                sock.close()
            if error.errno == errno.EADDRINUSE and not address.port and attempt < _BIND_ATTEMPTS - 1:
                continue
            raise
        break
    return address._replace(port=port), sockets


def _bind_tcp(host: str, port: int) -> socket.socket:
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(path: str, mode: int) -> socket.socket:
    """Bind a socket that only those may open whom ``mode`` lets; a stale one is replaced, a live one is not."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(pathlib.Path(path).stat().st_mode):
            raise FileExistsError(errno.EEXIST, "a file that is no socket is in the way", path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                pathlib.Path(path).unlink()
            else:
                raise OSError(errno.EADDRINUSE, "another program listens there", path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


def _explained(address: Address, error: OSError) -> tuple[str, str]:  # noqa: PLR0911 - a table, with its conditions
    """Return what happened (it names the address) and what to do about it, a sentence each."""
    another = "another path" if address.path else "another port (localhost:0 takes any free one)"
    choose = f"{another} in METQUAY_LISTEN (--listen)."
    if error.errno == errno.EADDRINUSE:
        return f"{address} is taken by another program (another metquay-proxy?).", f"Stop that one, or choose {choose}"
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        cure = (
            "Choose a folder that it may write to."
            if address.path
            else "Choose a port above 1023 that is not reserved."
        )
        return f"This user may not listen on {address}.", cure
    if isinstance(error, socket.gaierror):
        return f"{address} can't be listened on: its name is not known.", "Check the spelling, or write localhost."
    if (short := shortage(error)) is not None:
        return f"{address} can't be listened on: {short[0]}.", short[1]
    if not address.path and error.errno in _NO_FAMILY:
        why = "is no address of this computer" + (", or IPv6 is switched off" if ":" in address.host else "")
        return f"{address} {why}.", "Write localhost in METQUAY_LISTEN (--listen), or 0.0.0.0 for every address."
    if error.errno == errno.EEXIST:
        return f"{address} is a file that is no socket.", f"Move that file away, or choose {choose}"
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return f"{address} is in a folder that does not exist.", f"Make that folder, or choose {choose}"
    if address.path and error.errno in {None, errno.ENAMETOOLONG}:
        return f"{address} is too long for a socket's path.", "Choose one of less than 100 bytes."
    return f"{address} can't be listened on: {error.strerror or error}.", f"Choose {choose}"


async def let_in(  # noqa: PLR0913 - who is served where, and the bounds
    serve: Callable[[], asyncio.BaseProtocol],
    sockets: Sequence[socket.socket],
    tls: ssl.SSLContext | None,
    report: Callable[[str | None], None],
    reserve: int = _RESERVE,
    handshake: float = 15.0,
) -> Sequence[asyncio.AbstractServer | Door]:
    """Serve who comes at listening sockets until what is returned is closed; ``serve`` makes a protocol for each.

    While the process has hardly a descriptor left nobody is let in: ``report`` hears why, and None when that is over.
    ``reserve`` descriptors are left to others (a quarter of all, where there are few). TLS must have begun after
    ``handshake`` seconds.
    """
    loop = asyncio.get_running_loop()
    seconds = None if tls is None else handshake
    if sys.platform == "win32":  # its loop has no readers, and it knows no such limit
        return [
            await loop.create_server(serve, sock=sock, ssl=tls, backlog=_BACKLOG, ssl_handshake_timeout=seconds)
            for sock in sockets
        ]
    connect = partial(loop.connect_accepted_socket, serve, ssl=tls, ssl_handshake_timeout=seconds)
    return [Door(connect, sockets, report, reserve)]


def listen(report: Callable[[str | None], None], reserve: int) -> Callable[..., Awaitable[tuple[Sequence[Any], int]]]:
    """Return how to listen for the simulator: it takes what makes a protocol, host and port."""

    async def listening(serve: Callable[[], asyncio.BaseProtocol], host: str, port: int) -> tuple[Sequence[Any], int]:
        [(address, sockets)] = bind([Address(host, port)])
        return await let_in(serve, sockets, None, report, reserve), address.port

    return listening


class Door:
    """Accepts by itself: see the facts above. Who is let in for the last descriptor could not be served either."""

    def __init__(
        self,
        connect: Callable[[socket.socket], Awaitable[object]],
        sockets: Sequence[socket.socket],
        report: Callable[[str | None], None],
        reserve: int,
    ) -> None:
        """Take what ``let_in`` takes; ``connect`` serves one client, and raises ``OSError`` where it can't."""
        self._reserve = reserve
        self._connect, self._sockets, self._report = connect, sockets, report
        self._loop = asyncio.get_running_loop()
        self._arriving: dict[object, socket.socket | None] = {}
        self._ceiling, self._limit = _descriptors(self._reserve)
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
        for sock in self._sockets:
            sock.close()
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
            except BlockingIOError:
                return
            except OSError as error:
                if shortage(error) is None:
                    continue  # that one has left meanwhile
                self._wait(error)
                return
            arriving = self._loop.create_task(self._arrive(client))
            self._arriving[arriving] = client
            arriving.add_done_callback(self._arrived)
            if client.fileno() >= self._ceiling:
                self._wait(OSError(errno.EMFILE, ""))
                return

    async def _arrive(self, client: socket.socket) -> None:
        self._arriving[asyncio.current_task()] = None  # from here on a transport closes it
        with contextlib.suppress(OSError):  # it has left, or speaks no TLS
            await self._connect(client)

    def _arrived(self, arriving: object) -> None:
        client = self._arriving.pop(arriving)
        if client is not None:  # it was cancelled before its first step
            client.close()

    def _wait(self, error: OSError) -> None:
        self._shut()
        self._calm = 0
        if self._looking is None:
            why, cure = shortage(error) or ("", "")
            limit = f" (limit {self._limit:.0f})" if error.errno == errno.EMFILE else ""
            self._report(f"{why}{limit}. {cure}")
            self._looking = self._loop.call_later(_RETRY, self._look)

    def _look(self) -> None:
        self._ceiling, self._limit = _descriptors(self._reserve)  # it may have been raised meanwhile
        self._calm = self._calm + 1 if self._room() else 0
        if self._calm == 1:
            self._open()
        self._looking = None if self._calm > _CALM else self._loop.call_later(_RETRY, self._look)
        if self._looking is None:
            self._report(None)

    def _room(self) -> bool:
        try:
            with socket.socket(self._sockets[0].family) as probe:
                return probe.fileno() < self._ceiling
        except OSError:
            return False


def _descriptors(reserve: int) -> tuple[float, float]:
    """Return how many descriptors clients may take up, and how many there may be at all."""
    import resource  # noqa: PLC0415 - not on Windows

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf, math.inf
    return limit - min(reserve, limit // 4), limit
