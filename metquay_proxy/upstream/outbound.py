"""The corporate proxy on the way to Metquay: how its address is written, and when the way is a direct one.

Must not connect to it (``dial`` does), and must never put any of an address into an error: it may hold a password.

Facts: NO_PROXY has no standard; it is read as curl and Go's ``httpproxy`` read it. On Windows the system's proxy
stands in the registry.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from metquay_proxy.rules.address import MAX_PORT
from metquay_proxy.upstream.dial import OutboundProxy

if TYPE_CHECKING:
    from metquay_proxy.rules.target import BaseURL

DIRECT: Final = OutboundProxy("", 0)
"""No corporate proxy, not even the system's."""
_URL: Final = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?:(?P<user>[^:]*)(?::(?P<password>.*))?@)?"
    r"(?P<host>\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(?::(?P<port>[0-9]{1,5}))?(?P<path>/[^@]*)?",
    re.IGNORECASE | re.DOTALL,
)
"""In user and password any sign may stand as it is, but for a colon in the user."""

_UNUSABLE: Final = {
    r"socks\w*://": "is a SOCKS proxy, which is not supported: give the company's HTTP proxy, or run a program, "
    "such as privoxy, that accepts HTTP and forwards to the SOCKS proxy",
    r"https://": "is an https:// proxy, which is not supported: try http://, which most accept too; what goes through "
    "it to Metquay is encrypted either way",
    r".*\.(pac|dat)\Z": "is a script (PAC) for browsers, which is not supported: look in it for the address after the "
    "word PROXY",
    r"": "must be the address of an HTTP proxy, such as http://proxy.lab.example:3128, or none to go directly",
}
"""What an address begins with that can't be used, and what to tell its owner."""
_ENTRY: Final = re.compile(r"\[?(\*|[^\[\]:]+|[0-9a-f:.]+:[0-9a-f:.]*(?:/[0-9]+)?)\]?(?::([0-9]+))?")


def parse_outbound_proxy(text: str) -> OutboundProxy:
    """Read ``http://user:password@host:port`` (scheme, user and port may be left out), or ``none``: ``DIRECT``.

    ``%41`` is decoded in user and password. Raises ``ValueError`` with a text for people, without any of the address.
    """
    if text.lower() in {"none", "off", "direct", "no", "false"}:
        return DIRECT
    parts = _URL.fullmatch(text)
    if parts and (parts["scheme"] or "http").lower() == "http" and parts["path"] in {None, "/"}:
        port = int(parts["port"] or 80)
        if 0 < port <= MAX_PORT:
            user, password = (part and unquote(part) for part in parts.group("user", "password"))
            login = None if user is None else f"{user}:{password or ''}"
            return OutboundProxy(parts["host"].strip("[]").lower(), port, login)
    raise ValueError(next(why for start, why in _UNUSABLE.items() if re.match(start, text, re.IGNORECASE | re.DOTALL)))


def system_proxy(base: BaseURL) -> OutboundProxy | None:
    """Return the proxy of HTTPS_PROXY, ALL_PROXY or the system's settings; raise ``ValueError`` if it can't be used."""
    from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415 - other commands need not load it

    found = getproxies()
    url = (found.get("https") or found.get("all") or "").strip()
    if not url or goes_directly(found.get("no", ""), base.host, base.port) or proxy_bypass(base.host):
        return None
    return parse_outbound_proxy(url)


def goes_directly(no_proxy: str, host: str, port: int) -> bool:
    """Whether NO_PROXY names a host (no brackets).

    A name means also what is below it, with or without ``*.`` or a dot before it; a port, an address, a network
    (``10.0.0.0/8``) and ``*`` alone may stand there too, with commas or blanks between.
    """
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        match = _ENTRY.fullmatch(entry)
        if match is None or int(match[2] or port) != port:
            continue
        name = match[1].removeprefix("*").strip(".")
        if not name or f".{host}".endswith(f".{name}"):
            return True
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False):
                return True
    return False
