"""The client behind ``metquay-proxy health``: asks a running proxy whether it is alive, or ready.

Owns one small HTTP exchange. The standard library alone, and of that only
what loads fast, because container engines run this every few seconds: no asyncio, no http.client, no pydantic.

Facts: RFC 9112 section 4 (status line), 9.6 (``Connection: close``). Every answer of the proxy's own has its name in
the head, in ``Server`` or in ``X-Metquay-Proxy-Error``; a foreign one is never shown, since it may be a page.
"""

from __future__ import annotations

import contextlib
import socket
import time

from metquay_proxy.rules.address import parse_listen

TYPE_CHECKING = False  # to import `typing` costs 8 ms
if TYPE_CHECKING:
    from typing import Any, Final

    from metquay_proxy.rules.address import Address


TIMEOUT: Final = 5.0
"""Seconds that one question may take."""
INTERVAL: Final = 0.1
"""Seconds between two questions of ``--wait``."""


def check(listen: str, *, ready: bool = False, tls: bool = False, wait: float = 0, clock: Any = time) -> str | None:  # noqa: ANN401 - a module
    """Return None as soon as the proxy at the first address of ``listen`` is alive (or ready), else why it is not.

    ``wait`` is in seconds; 0 asks once. ``clock`` has ``monotonic`` and ``sleep``, as ``time`` has. Raises
    ``ValueError`` where ``listen`` is malformed.
    """
    address = parse_listen(listen)[0]
    if not address.path and not address.port:
        return f"{address} leaves the port to the system: give health the port that the proxy printed, with --listen"
    path = "/-/ready" if ready else "/-/live"
    end = clock.monotonic() + wait
    while True:
        timeout = min(TIMEOUT, max(INTERVAL, end - clock.monotonic())) if wait else TIMEOUT
        try:
            why = _judge(ask(address, path, tls=tls, timeout=timeout), address)
        except OSError as error:
            why = f"no answer at {address} ({error.strerror or error}): is the proxy running?"
            if hasattr(error, "library"):  # an ssl.SSLError, whose name would cost 20 ms
                why = f"no https at {address}: METQUAY_TLS_CERT (--tls-cert) is set here. Is it for the proxy too?"
        left = end - clock.monotonic()
        if why is None or left <= 0:
            return why
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
    with contextlib.suppress(ConnectionResetError):  # a TLS listener may end a clear-text question so
        while len(answer) < 1 << 20 and time.monotonic() < end and (received := connection.recv(1 << 16)):
            answer += received
    return answer


def _over_tls(connection: socket.socket) -> socket.socket:
    import ssl  # noqa: PLC0415 - 20 ms that only this case needs

    # Nothing is verified: the question holds no secret, the answer no more than a state, the listener is our own, and
    # its certificate names the host that tools use, seldom the loopback address that is asked here.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


def is_ours(answer: bytes) -> bool:
    """Whether a metquay-proxy answers, and no other program."""
    return b"metquay-proxy" in answer.partition(b"\r\n\r\n")[0].lower()


def _judge(answer: bytes, address: Address) -> str | None:
    if answer and not is_ours(answer):
        return f"another program answers at {address}: stop it, or give health the proxy's METQUAY_LISTEN (--listen)"
    status = answer[9:12].decode("ascii", "replace")
    if status in {"", "400"}:
        return f"{address} closed the connection: if the proxy serves https, set METQUAY_TLS_CERT (--tls-cert) here too"
    if status == "503":
        return "not ready: the proxy has no token for Metquay, or is being stopped; `metquay-proxy check` says why"
    return None if status == "200" else f"the proxy at {address} answers with status {status}"
