"""The client behind ``metquay-proxy health``: asks a running proxy whether it is alive, or ready.

Owns the question where the proxy is, and one small HTTP exchange. The standard library alone, and of that only
what loads fast, because container engines run this every few seconds: no asyncio, no http.client, no pydantic.

Facts: RFC 9112 section 4 (status line), 9.6 (``Connection: close``).
"""

from __future__ import annotations

import re
import socket
import sys
import time

from metquay_proxy.environment import ENV_FILE, PREFIX, read_env_file, variables
from metquay_proxy.rules.address import parse_listen

TYPE_CHECKING = False  # to import `typing` costs 8 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Final

    from metquay_proxy.rules.address import Address

TIMEOUT: Final = 5.0
"""Seconds that one question may take."""
INTERVAL: Final = 0.1
"""Seconds between two questions of ``--wait``."""

_MAX_ANSWER: Final = 4096
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r\n]")
_OK: Final = 200


def find(variable: str, environ: Mapping[str, str], env_file: str = ENV_FILE) -> str | None:
    """Return a variable's value from the environment, else from the ``.env`` file, both read as the proxy reads them.

    Raises ``OSError`` where the file is there and cannot be read.
    """
    name = variable.removeprefix(PREFIX).lower()
    if name in (found := variables(environ.items())):
        return found[name]
    return variables((line.name, line.value) for line in read_env_file(env_file, environ)).get(name)


def check(  # noqa: PLR0913 - what to ask, how long, and the clock
    listen: str,
    *,
    ready: bool = False,
    tls: bool = False,
    wait: float = 0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str | None:
    """Return None as soon as the proxy at the first address of ``listen`` is alive (or ready), else why it is not.

    ``wait`` is in seconds; 0 asks once. Raises ``ValueError`` where ``listen`` is malformed.
    """
    address = parse_listen(listen)[0]
    if not address.path and not address.port:
        return f"{address} leaves the port to the system: give health the port that the proxy printed, with --listen"
    path = "/-/ready" if ready else "/-/live"
    end = clock() + wait
    while True:
        try:
            why = _judge(
                _ask(address, path, tls=tls, timeout=min(TIMEOUT, max(INTERVAL, end - clock())) if wait else TIMEOUT)
            )
        except OSError as error:
            why = f"{error.strerror or error}; is the proxy running?"
        left = end - clock()
        if why is None or left <= 0:
            return why and f"{address}{path}: {why}"
        sleep(min(INTERVAL, left))


def _ask(address: Address, path: str, *, tls: bool, timeout: float) -> bytes:
    answer = b""
    with _connect(address, timeout, tls=tls) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        try:
            while len(answer) < _MAX_ANSWER and (received := connection.recv(_MAX_ANSWER)):
                answer += received
        except ConnectionResetError:
            return answer  # a TLS listener may end a clear-text question so
    return answer


def _connect(address: Address, timeout: float, *, tls: bool) -> socket.socket:
    targets: list[tuple[int, str | tuple[str, int]]] = [
        (socket.AF_INET6 if ":" in host else socket.AF_INET, (host, address.port)) for host in address.reach
    ]
    if sys.platform != "win32" and address.path:
        targets = [(socket.AF_UNIX, address.path)]
    failures = []
    for family, target in targets:
        connection = None
        try:
            connection = socket.socket(family)
            connection.settimeout(timeout)
            connection.connect(target)
            return _over_tls(connection) if tls else connection
        except OSError as error:
            failures.append(error)
            if connection is not None:
                connection.close()
    raise failures[0]  # a machine that lacks the other family says less about it


def _over_tls(connection: socket.socket) -> socket.socket:
    import ssl  # noqa: PLC0415 - 20 ms that only this case needs

    # Nothing is verified: the question holds no secret, the answer no more than a state, the listener is our own, and
    # its certificate names the host that tools use, seldom the loopback address that is asked here.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


def _judge(answer: bytes) -> str | None:
    match = _STATUS_LINE.match(answer)
    if match is None and answer:
        return "no HTTP answer"
    if match is None:
        return "closed without an answer; does it serve TLS? Then METQUAY_TLS_CERT must be set here too"
    if int(match[1]) == _OK:
        return None
    state = answer.partition(b"\r\n\r\n")[2].decode("ascii", "replace").strip()
    return f"status {match[1].decode()}" + (f", {state[:200]}" if state.isprintable() and state else "")
