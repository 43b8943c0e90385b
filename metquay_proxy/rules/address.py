"""Where the proxy listens, as text (``METQUAY_LISTEN``) and as a value.

Owns that spelling alone. Pure, and shared by the settings and by ``health``, which has 60 ms for everything: it must
not import what is slow to load (``dataclasses`` costs as much as ``socket``; ``ipaddress`` waits until it is needed).

Facts: RFC 3986 section 3.2.2 (an IPv6 address stands in brackets; a final dot changes no host). Go, nginx and Docker
take [::] for every address of both families. Python has no unix sockets on Windows.
"""

from __future__ import annotations

import collections
import re
import sys

TYPE_CHECKING = False  # to import `typing` costs `health` 8 ms
if TYPE_CHECKING:
    from typing import Final, NamedTuple

    class _Fields(NamedTuple):
        host: str
        port: int
        path: str = ""
else:
    _Fields = collections.namedtuple("_Fields", ("host", "port", "path"), defaults=("",))  # noqa: PYI024 - see above

DEFAULT_LISTEN: Final = "localhost:6387"

HOST_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_PORT: Final = re.compile(r"[0-9]{1,5}")
MAX_PORT: Final = 65535
_BOTH: Final = {"localhost": ("127.0.0.1", "::1"), "::": ("0.0.0.0", "::")}  # noqa: S104 - what is written there
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - as above
_EXAMPLE: Final = f"write it like {DEFAULT_LISTEN}, [::1]:6387 or unix:/run/metquay.sock"


class Address(_Fields):
    """One place to listen: host (lower case, no brackets) and port (0: any free one), or the path of a unix socket."""

    __slots__ = ()

    @property
    def hosts(self) -> tuple[str, ...]:
        """Where the proxy listens for it: a name for one of the families, or for each, means both."""
        return _BOTH.get(self.host, (self.host,))

    @property
    def reach(self) -> tuple[str, ...]:
        """Where a program of this machine reaches it. Windows may spend 2 s on a missing ::1, so that comes last."""
        return tuple([_LOOPBACK.get(host, host) for host in self.hosts])

    def is_reached_at(self, other: Address) -> bool:
        """Whether a program of this machine that asks here reaches who listens at ``other``."""
        if (self.path, self.port) != (other.path, other.port) or not (self.path or self.port):
            return False
        return any(host in other.hosts or every(host) in other.hosts for host in self.reach)

    def __str__(self) -> str:
        """Return the address as people write it."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(text: str) -> tuple[Address, ...]:
    """Read one address or several with commas; raise ``ValueError`` with a text for people."""
    addresses = tuple(_parse(entry.strip()) for entry in text.split(","))
    for address in addresses:
        if addresses.count(address) > 1 and (address.path or address.port):
            raise ValueError(f"{address} is listed twice")
    return addresses


def every(host: str) -> str:
    """Return what stands for all addresses of a host's family."""
    return "::" if ":" in host else "0.0.0.0"  # noqa: S104 - for whoever sets it


def _parse(text: str) -> Address:
    scheme, _, path = text.partition(":")
    if scheme == "unix":
        if not path.startswith("/"):
            raise ValueError(f"{text!r} needs a path that begins with a slash; {_EXAMPLE}")
        if sys.platform == "win32":
            raise ValueError(
                f"{text!r} is a unix socket, which Python does not have on Windows; listen on {DEFAULT_LISTEN}"
            )
        return Address("", 0, path)
    host, colon, port = text.rpartition(":")
    if not (colon and host and _PORT.fullmatch(port) and int(port) <= MAX_PORT):
        raise ValueError(f"{text!r} is not a host and a port from 0 to {MAX_PORT}; {_EXAMPLE}")
    return Address(_host(host.lower().removesuffix("."), text), int(port))


def _host(host: str, text: str) -> str:
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed or host.replace(".", "").isdecimal():
        import ipaddress  # noqa: PLC0415 - 6 ms that `health` saves for a name

        kind = ipaddress.IPv6Address if bracketed else ipaddress.IPv4Address
        try:
            return str(kind(host.strip("[]")))
        except ValueError:
            pass
    elif HOST_NAME.fullmatch(host):
        return host
    raise ValueError(f"{text!r} has no host name or IP address before its port; {_EXAMPLE}")
