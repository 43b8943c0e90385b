"""The client behind ``metquay-proxy health``: asks a running proxy whether it is alive, or ready.

Owns one small HTTP exchange. The standard library alone, and of that only
what loads fast, because container engines run this every few seconds: no asyncio, no http.client, no pydantic.

Facts: RFC 9112 section 4 (status line), 9.6 (``Connection: close``).
"""

from __future__ import annotations

import re
import socket
import time

from metquay_proxy.rules.address import parse_listen

TYPE_CHECKING = False  # to import `typing` costs 8 ms
if TYPE_CHECKING:
    from typing import Final, Protocol

    from metquay_proxy.rules.address import Address

    class Clock(Protocol):
        """What tells the time and lets it pass, in seconds, as ``time`` does."""

        def monotonic(self) -> float: ...  # noqa: D102 - as there
        def sleep(self, seconds: float, /) -> None: ...  # noqa: D102 - as there


TIMEOUT: Final = 5.0
"""Seconds that one question may take."""
INTERVAL: Final = 0.1
"""Seconds between two questions of ``--wait``."""

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r\n]")


def check(listen: str, *, ready: bool = False, tls: bool = False, wait: float = 0, clock: Clock = time) -> str | None:
    """Return None as soon as the proxy at the first address of ``listen`` is alive (or ready), else why it is not.

    ``wait`` is in seconds; 0 asks once. Raises ``ValueError`` where ``listen`` is malformed.
    """
    address = parse_listen(listen)[0]
    if not address.path and not address.port:
        return f"{address} leaves the port to the system: give health the port that the proxy printed, with --listen"
    path = "/-/ready" if ready else "/-/live"
    end = clock.monotonic() + wait
    while True:
        timeout = min(TIMEOUT, max(INTERVAL, end - clock.monotonic())) if wait else TIMEOUT
        try:
            why = _judge(ask(address, path, tls=tls, timeout=timeout))
        except OSError as error:
            why = f"{error.strerror or error}; is the proxy running?"
        left = end - clock.monotonic()
        if why is None or left <= 0:
            return why and f"{address}{path}: {why}"
        clock.sleep(min(INTERVAL, left))


def ask(address: Address, path: str, *, tls: bool, timeout: float = TIMEOUT) -> bytes:
    """Return what is answered to ``GET path`` where an address is reached, as far as it comes in ``timeout`` seconds.

    Raises ``OSError``; of several hosts the first's, since a machine that lacks the other family says less about it.
    """
    failure, share = None, timeout / len(address.reach)
    for host in address.reach:
        family = socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family) as plain:
                plain.settimeout(share)
                plain.connect(address.path or (host, address.port))
                with _over_tls(plain) if tls else plain as connection:
                    return _answer(connection, path, time.monotonic() + share)
        except OSError as error:
            failure = failure or error
    raise failure or OSError


def _answer(connection: socket.socket, path: str, end: float) -> bytes:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = b""
    try:
        while len(answer) < 1 << 20 and time.monotonic() < end and (received := connection.recv(1 << 16)):
            answer += received
    except ConnectionResetError:
        return answer  # a TLS listener may end a clear-text question so
    return answer


def _over_tls(connection: socket.socket) -> socket.socket:
    import ssl  # noqa: PLC0415 - 20 ms that only this case needs

    # Nothing is verified: the question holds no secret, the answer no more than a state, the listener is our own, and
    # its certificate names the host that tools use, seldom the loopback address that is asked here.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


def _judge(answer: bytes) -> str | None:
    if not answer:
        return "closed without an answer; does it serve TLS? Then METQUAY_TLS_CERT must be set here too"
    match = _STATUS_LINE.match(answer)
    if match is None:
        return "no HTTP answer"
    if match[1] == b"200":
        return None
    state = answer.partition(b"\r\n\r\n")[2].decode("ascii", "replace").strip()
    return f"status {match[1].decode()}" + (f", {state[:200]}" if state.isprintable() and state else "")
