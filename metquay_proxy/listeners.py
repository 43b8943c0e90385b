"""Where the proxy listens: sockets that are bound and listening, and why there is none.

Owns binding alone. Must not know who serves what comes in.

Facts: Windows spends up to 2 s on a missing ``::1``. RFC 4291 section 2.5.3 (the loopback address).
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
import stat
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from metquay_proxy.address import Address

BACKLOG: Final = 1024
_BIND_ATTEMPTS: Final = 10  # a port that is free on one family may be taken on the other


def bind(address: Address) -> list[socket.socket]:
    """Return bound sockets for one address; raise ``OSError`` with a text for people.

    ``localhost`` means both loopback addresses on one port: Windows spends seconds on a missing ``::1``. A family that
    the machine lacks is skipped; a port that is taken on either is an error.
    """
    if address.path:
        return [_bind_unix(address.path)]
    if address.host == "localhost":
        return _bind_loopback(address)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    if ":" not in address.host and not address.host.replace(".", "").isdigit():
        family = socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM)[0][0]
    return [_bind_tcp(family, address.host, address.port)]


def _bind_loopback(address: Address) -> list[socket.socket]:
    for attempt in range(_BIND_ATTEMPTS):
        sockets: list[socket.socket] = []
        port = address.port
        try:
            for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                try:
                    sockets.append(_bind_tcp(family, host, port))
                except OSError as error:
                    if error.errno in _NO_FAMILY:
                        continue
                    raise
                port = sockets[0].getsockname()[1]
        except OSError:
            for sock in sockets:
                sock.close()
            if address.port == 0 and attempt < _BIND_ATTEMPTS - 1:
                continue
            raise
        if sockets:
            return sockets
    msg = "this machine has no loopback address"
    raise OSError(msg)


_NO_FAMILY: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT, errno.EINVAL})


def _bind_tcp(family: int, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(path: str) -> socket.socket:
    """Bind a socket that only this user may open; a stale one is replaced, a live one is not."""
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
    mask = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


def why_not_listening(error: OSError) -> str:
    """Return what happened and what to do about it, for people."""
    if error.errno == errno.EADDRINUSE:
        return (
            "the address of METQUAY_LISTEN is taken by another program (another metquay-proxy?). Stop that one, or "
            "choose another port: --listen localhost:0 takes any free one."
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return "this user may not listen on the address of METQUAY_LISTEN. Choose a port above 1023."
    return f"{error.strerror or error}. Check METQUAY_LISTEN."
