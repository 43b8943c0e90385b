"""The canonical request target: the only form of a target that is judged, logged and sent; and what it is sent to.

Owns part 3 of the contract as far as it speaks of targets, and ``BaseURL``. Must not know headers, HTTP libraries or
sockets.

Facts: RFC 9112 section 3.2 (the four forms of a target); RFC 3986 section 3.3 (segments), 5.2.4 (dot segments).
A servlet container cuts ``;parameters`` off a segment before it resolves dot segments, and some decode twice, so
``..;x`` and ``%252e`` are dot segments here too. The vendor's OpenAPI file ends its server address in a slash, so that
generated clients ask for ``/api/v1//customers``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from metquay_proxy.rules.address import HOST_NAME, MAX_PORT
from metquay_proxy.rules.errors import ProxyError

if TYPE_CHECKING:
    from collections.abc import Container

API_PREFIX: Final = "/api/v1"
OWN_PREFIX: Final = "/-/"
LOGIN_PATH: Final = "/authenticate"
OLDER_INTERFACE: Final = "/FlexicalERP/"

_PREFIX: Final = re.compile(r"(/(?!\.{1,2}(/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]+)+")
_FORBIDDEN: Final = re.compile(r"[^\x21\x22\x24-\x5b\x5d-\x7e]")
_ABSOLUTE: Final = re.compile(r"(https?)://([^/?]*)(.*)", re.IGNORECASE)
_NAMES: Final = {"\\": "a backslash", "#": "a number sign (#)", " ": "a space", "\t": "a tab"}
_BY_ITSELF: Final = re.compile(r"/-?|/favicon\.ico|/robots\.txt|/apple-touch-icon.*|/\.well-known/.*")
_LOCATION: Final = re.compile(rb"(?:(https?):)?//([^/?#]*)(/[^?#]*)(.*)", re.IGNORECASE)
_DOT_SEGMENT: Final = re.compile(rb"[/\\](?:\.|%2e){1,2}(?:[/\\;]|\Z)", re.IGNORECASE)
_SEPARATORS: Final = re.compile(r"[/\\]")
_AUTHORITY: Final = re.compile(r"(?:\[([^]@]+)]|([^@:]+))(?::([0-9]{0,5}))?")
_DEFAULT_PORT: Final = {"http": 80, "https": 443}
_DECODINGS: Final = 4
_LONGEST_PATH: Final = 1024
_REMEMBERED: Final = 256
_LONGEST_REMEMBERED: Final = 1024


class Target(NamedTuple):
    """One canonical target.

    ``sent`` is what goes upstream, byte for byte (ASCII); ``local`` is the path below the API's prefix, or below the
    server's root for a pass-through, without query; ``query`` is what follows the question mark, None where there is
    none. ``own``: the proxy answers it itself and never forwards it; ``unasked``: so it does because browsers ask for
    it by themselves. ``path`` is what people are told of it: what is sent, or the local path if own; shortened.
    """

    sent: str
    local: str
    query: str | None
    absolute: bool = False
    pass_through: bool = False
    own: bool = False
    unasked: bool = False
    path: str = "-"


def split_authority(authority: str, scheme: str) -> tuple[str, int] | None:
    """Return (lower-case host without brackets, port) of ``host[:port]``; None where that is malformed or has userinfo.

    ``scheme`` says which port is meant where there is none. A final dot is left off: it is the same host.
    """
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        return None
    host, port = match[1] or match[2].removesuffix("."), int(match[3] or _DEFAULT_PORT[scheme])
    return (host.lower(), port) if host and port <= MAX_PORT else None


@dataclass(frozen=True, slots=True)
class BaseURL:
    """Where the API lives: scheme, lower-case ASCII host (no brackets), port, path prefix without a final slash."""

    scheme: str
    host: str
    port: int
    prefix: str
    rooted: bool = False
    """Whether it was written with a final dot, which is for the look-up alone: no search list is tried (ndots)."""

    @classmethod
    def parse(cls, text: str) -> BaseURL:
        """Read ``lab.metquay.co`` or ``https://lab.metquay.co/api/v1``; raise ``ValueError`` with a text for people.

        No path, or ``/``, means ``/api/v1``. Clear text is accepted to a loopback address only.
        """
        url = text.strip()
        if "://" not in url:
            url = "https://" + url
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ValueError("it is not a valid address; write it like lab.metquay.co") from None
        scheme = parts.scheme
        if scheme not in _DEFAULT_PORT:
            raise ValueError("it must be a host name, or an address that begins with https://")
        if "@" in parts.netloc:
            raise ValueError("it must not contain a user name or password; the keys have settings of their own")
        if "?" in url or "#" in url:
            raise ValueError("it must not contain a question mark or a number sign")
        authority = split_authority(parts.netloc, scheme)
        if authority is None or authority[1] == 0 or parts.netloc.endswith(":"):
            raise ValueError("it needs a host name and, if any, a port from 1 to 65535")
        host, port = _ascii_host(authority[0]), authority[1]
        prefix = re.sub("/+", "/", parts.path).rstrip("/") or API_PREFIX
        if not _PREFIX.fullmatch(prefix):
            raise ValueError("its path may hold only plain path segments, like /api/v1")
        if scheme == "http" and not is_loopback(host):
            why = "http:// would show the keys to the network and is accepted for this machine only; use https://"
            raise ValueError(why)
        rooted = (parts.hostname or "").endswith(".") and host != "localhost" and not is_address(host)
        return cls(scheme, host, port, prefix, rooted)

    @property
    def name(self) -> str:
        """What is looked up; everywhere else ``host`` stands."""
        return self.host + "." if self.rooted else self.host

    @property
    def authority(self) -> str:
        """The value of Host: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORT[self.scheme] else f"{host}:{self.port}"

    @property
    def authorities(self) -> frozenset[tuple[str, int]]:
        """What counts as the upstream in an absolute-form target.

        A tool that uses us as its HTTP proxy speaks clear text to us, so it names port 80 where Metquay has 443.
        """
        plain = {(self.host, 80)} if self.port == 443 else set()  # noqa: PLR2004 - https's own port
        return frozenset({(self.host, self.port)} | plain)

    def __str__(self) -> str:
        """Return the URL as people write it."""
        return f"{self.scheme}://{self.authority}{self.prefix}"


def is_loopback(host: str) -> bool:
    """Whether the host (no brackets) means this machine, whatever a name server says."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    """Whether the host (no brackets) is an IP address."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def _ascii_host(host: str) -> str:
    try:
        if ":" in host:
            return ipaddress.IPv6Address(host).compressed
        host = host.encode("idna").decode("ascii")
    except UnicodeError:
        host = ""
    except ValueError:
        raise ValueError("the address in brackets is not an IPv6 address") from None
    if not HOST_NAME.fullmatch(host):
        raise ValueError("its host name contains characters that host names can't have")
    return host


def rewrite_location(value: bytes, base: BaseURL, origin: bytes) -> bytes:
    """Return a Location under the base with the client's own scheme and host; any other untouched.

    Host case, an explicit or empty default port and a missing scheme are spellings of the same origin. A path with dot
    segments need not be under the base, however it begins.
    """
    match = _LOCATION.fullmatch(value)
    if match is None:
        return value
    scheme, authority, path, rest = match.groups()
    prefix = base.prefix.encode()
    if (
        (scheme or base.scheme.encode()).lower() == base.scheme.encode()
        and split_authority(authority.decode("latin-1"), base.scheme) == (base.host, base.port)
        and (path == prefix or path.startswith(prefix + b"/"))
        and not _DOT_SEGMENT.search(path)
    ):
        return origin + path + rest
    return value


class TargetRules:
    """Turns the target of a request line into a ``Target``, or refuses it."""

    def __init__(
        self, prefix: str, authorities: Container[tuple[str, int] | None], *, pass_through: tuple[str, ...] = ()
    ) -> None:
        """Take the upstream's path prefix and what counts as our own authority in absolute-form.

        ``authorities`` are (lower-case host, port) pairs: the upstream's and our listeners', which may be added later.
        ``pass_through`` holds path prefixes, each beginning and ending in a slash.
        """
        self._prefix = prefix
        self._prefixes = tuple(sorted({prefix, API_PREFIX}, key=len, reverse=True))
        self._above = re.compile(rf"\A(?:/*(?:{'|'.join(map(re.escape, self._prefixes))})(?=/|\Z))*(?:/+(?=/))?")
        self._authorities = authorities
        self._pass_through = pass_through
        self._remembered = lru_cache(_REMEMBERED)(self._parse)

    def parse(self, method: str, raw: str) -> Target:
        """Return the canonical target; raise ``ProxyError`` bad-target where nothing may be sent.

        Tools ask for the same again and again: what was found good is remembered, since it stays so.
        """
        return (self._remembered if len(raw) <= _LONGEST_REMEMBERED else self._parse)(method, raw)

    def _parse(self, method: str, raw: str) -> Target:
        if (fault := forbidden(raw)) is not None:
            raise fault
        match = _ABSOLUTE.fullmatch(raw)
        absolute = match is not None
        if match is not None:
            scheme, authority, rest = match.groups()
            if split_authority(authority, scheme.lower()) not in self._authorities:
                raise bad_target("it names another server; this proxy forwards to Metquay only")
            raw = rest if rest.startswith("/") else f"/{rest}" if rest or method != "OPTIONS" else "*"
        if raw == "*" and method == "OPTIONS":
            return Target(raw, raw, None, absolute, path=raw)
        if not raw.startswith("/"):
            raise bad_target("it must begin with a slash")
        path, mark, query = raw.partition("?")
        asked = query if mark else None
        if ("." in path or "%" in path) and _has_dot_segment(path):
            raise bad_target("it holds a dot segment (. or ..), which could leave the API's path")
        if path.startswith("//"):
            path = "/" + path.lstrip("/")
        for prefix in self._pass_through:
            if path.startswith(prefix):
                sent = path + mark + query
                return Target(sent, path, asked, absolute, pass_through=True, path=sent[:_LONGEST_PATH])
        below = self._above.sub("", path) if path.startswith(self._prefixes) else path
        local = _as_a_server_reads(below or "/")
        unasked = _BY_ITSELF.fullmatch(local) is not None
        own = unasked or local == LOGIN_PATH or local.startswith((OWN_PREFIX, OLDER_INTERFACE))
        sent = self._prefix + below + mark + query
        told = (local if own else sent)[:_LONGEST_PATH]
        return Target(sent, local, asked, absolute, False, own, unasked, told)  # noqa: FBT003 - to name them costs more


def _as_a_server_reads(local: str) -> str:
    """Return a path, in its own spelling where others may lead a server to the login or to the older interface too."""
    plain = (unquote(local, "latin-1") if "%" in local else local).partition(";")[0].rstrip("/. \0").lower()
    if plain == LOGIN_PATH:
        return LOGIN_PATH
    return OLDER_INTERFACE if f"{plain}/".startswith(OLDER_INTERFACE.lower()) else local


def _has_dot_segment(path: str) -> bool:
    for _ in range(_DECODINGS):
        if any(segment.partition(";")[0] in {".", ".."} for segment in _SEPARATORS.split(path)):
            return True
        decoded = unquote(path, "latin-1")
        if decoded == path:
            return False
        path = decoded
    return True


def forbidden(raw: str) -> ProxyError | None:
    """Return the refusal of a target for its first character that can't stand in one; it says how to write that.

    Bytes that are no UTF-8 are to be given as surrogates (PEP 383).
    """
    found = _FORBIDDEN.search(raw)
    if found is None:
        return None
    character = found.group()
    if "\ud800" <= character <= "\udfff":
        cure = "write such characters in UTF-8 and percent-encoded (%C3%A9 for \xe9)"
        return bad_target(f"it holds a byte beyond ASCII; {cure}")
    name = _NAMES.get(character, character if character.isprintable() else "a control character")
    return bad_target(f"it holds {name}, which must be written {quote(character, safe='')}")


def bad_target(why: str) -> ProxyError:
    """Return the refusal of a target; ``why`` goes on after a colon."""
    return ProxyError("bad-target", f"The address of this request was refused: {why}. Correct the address in the tool.")
