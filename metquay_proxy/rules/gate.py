"""The gate: who may use the keys through this proxy, judged before anything else is done.

Owns part 6 of the contract as far as one request's head decides it. Pure: takes the canonical target and the judged
fields, and returns an ``Admission`` or raises ``ProxyError``. Must not read bodies, log or wait.

Facts: a web page can make the user's browser send requests to localhost, and by DNS rebinding even read the answers;
what it can't forge are Host, Origin (Fetch standard, section 3.2) and Sec-Fetch-* (W3C Fetch Metadata). Browsers
serialize an origin in one way only (HTML standard: lower case, no default port), so that it is compared byte for byte.
Under plain http and a name that is not localhost they send neither with images, scripts and frames (Secure Contexts,
section 3.1): what then tells a page is its Referer, where the page does not hide it.
Names without a dot and ``*.localhost`` (RFC 6761 section 6.3) can't be registered by an attacker. RFC 7617: Basic's
password begins after the first colon. RFC 9110 section 9.3.8: the answer to TRACE repeats the request's head.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import LOGIN_PATH, OWN_PREFIX, Target, split_authority

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from metquay_proxy.rules.headers import RequestHead

READING_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
PROBES: Final = frozenset({"/-/live", "/-/ready"})
STATUS_PAGE: Final = OWN_PREFIX
_LINKED: Final = frozenset({"/", "/-", STATUS_PAGE})
"""The status page and what leads there: other sites may link to these."""
PLACEHOLDER_LIFETIME: Final = 900
"""Seconds; the same as Metquay's own tokens, so that SDKs renew it as they always do."""

_ORIGIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_HOST: Final = re.compile(r"[a-z0-9_.-]+|[0-9a-f:.]+(?:%[a-z0-9_.-]+)?")
_LONGEST_HOST: Final = 300
_PLACEHOLDER_WITHOUT_KEYS: Final = "held-by-metquay-proxy"
_PLACEHOLDER: Final = re.compile(rb"local\.([A-Za-z0-9_-]+)\.([0-9]{1,15})\.([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class ClientKey:
    """One named key that a local tool presents; only its SHA-256 digest is kept.

    ``name`` is made of ``[A-Za-z0-9_-]`` and, like the key, no other client's.
    """

    name: str
    digest: bytes
    read_only: bool = False

    @classmethod
    def of(cls, name: str, key: str, *, read_only: bool = False) -> ClientKey:
        """Make one from the key's text."""
        return cls(name, hashlib.sha256(key.encode()).digest(), read_only)

    def __repr__(self) -> str:
        """Leave out the digest."""
        return f"ClientKey({self.name!r}, read_only={self.read_only})"


@dataclass(frozen=True, slots=True)
class Admission:
    """What the gate found out about an admitted request.

    ``client`` is the key's name, None without one; ``preflight``: answer it here as a CORS preflight.
    """

    client: str | None = None
    read_only: bool = False
    preflight: bool = False


class Gate:
    """Admits or refuses one request at a time; nothing but its keys ever changes."""

    def __init__(  # noqa: PLR0913 - each is one setting of the gate
        self,
        *,
        upstream_host: str,
        keys: tuple[ClientKey, ...] = (),
        read_only: bool = False,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        scheme: str = "http",
    ) -> None:
        """Take the settings that decide.

        ``allowed_hosts`` are lower-case names without port and final dot, ``allowed_origins`` are like
        ``https://tools.lab.example``; ``scheme`` is the one that our own pages are served under.
        """
        self._upstream_host = upstream_host
        self._allowed_hosts = frozenset(allowed_hosts)
        self._allowed_origins = frozenset(allowed_origins)
        self._scheme = scheme
        self._open = Admission(read_only=read_only)
        self._take(keys)

    @property
    def keys(self) -> tuple[ClientKey, ...]:
        """Those in force."""
        return self._keys

    def _take(self, keys: tuple[ClientKey, ...]) -> None:
        self._keys = keys
        self._admissions = {key.name: Admission(key.name, self._open.read_only or key.read_only) for key in keys}

    def replace_keys(self, keys: tuple[ClientKey, ...]) -> frozenset[str]:
        """Admit by other keys from now on; return the names whose key has ended, or is another one now.

        With an old key ends its placeholder, which is signed by it. A gate that is guarded stays so: ``keys`` has one.
        """
        ended = frozenset(key.name for key in self._keys if key not in keys)
        if bool(keys) != bool(self._keys):
            raise ValueError("a gate does not begin or cease to ask for keys")
        self._take(keys)
        return ended

    def cors(self, head: RequestHead) -> tuple[tuple[str, str], ...]:
        """Return the fields that let a listed origin read the answer, errors included; nothing for any other."""
        origin = head.text(b"origin") if self._allowed_origins else None
        if origin is None or origin not in self._allowed_origins:
            return ()
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "*"),
            ("Vary", "Origin"),
        )

    def check(self, method: str, target: Target, head: RequestHead, now: float) -> Admission:
        """Admit the request, or raise ``ProxyError``. ``now`` is the wall clock in seconds (placeholders expire)."""
        judged = head.judged
        if b"host" in judged:
            self._check_host(judged[b"host"], absolute=target.absolute)
        if b"origin" in judged:
            self._check_origin(head.text(b"origin"), head.text(b"host"))
            if method == "OPTIONS" and b"access-control-request-method" in judged and self.cors(head):
                return Admission(preflight=True)
        elif b"sec-fetch-site" in judged:
            _check_fetch_site(method, target, judged)
        elif judged.get(b"referer", b"") != b"":
            referer = head.text(b"referer")
            page = None if referer is None else _ORIGIN.match(referer)
            self._check_origin(page and page[0].lower(), head.text(b"host"))
        admission = self._check_key(method, target, judged, now) if self._keys else self._open
        if admission.read_only and method not in READING_METHODS:
            self._check_read_only(method, target, admission)
        if method == "TRACE" and not (target.own or target.pass_through):
            msg = "TRACE would show the token that this proxy attaches, so that it was not sent. Use another method."
            allowed = "GET, HEAD, OPTIONS, POST, PUT, PATCH, DELETE"
            raise ProxyError("method-not-allowed", msg, headers=(("Allow", allowed),))
        return admission

    def login(self, secret: str, now: float) -> str | None:
        """Return the placeholder that ``POST /authenticate`` hands out; None where the secret is no client key.

        Without client keys any secret will do. With them the placeholder stands for that key until it expires: it is an
        HMAC under the key's digest, so that nothing has to be remembered.
        """
        if not self._keys:
            return _PLACEHOLDER_WITHOUT_KEYS
        key = self._key(secret.encode("utf-8", "surrogatepass"))  # JSON can spell half a surrogate pair
        return None if key is None else self.placeholder(key, now)

    def placeholder(self, key: ClientKey, now: float) -> str:
        """Return a token that counts as ``key`` for ``PLACEHOLDER_LIFETIME`` seconds from ``now`` (wall clock)."""
        expiry = int(now) + PLACEHOLDER_LIFETIME
        return f"local.{key.name}.{expiry}.{_sign(key, expiry)}"

    def key_of(self, client: str | None) -> ClientKey | None:
        """Return the key of that name."""
        return next((key for key in self._keys if key.name == client), None)

    def scope(self, client: str | None) -> str | None:
        """Return what stands for the client's very key, for what is remembered of it and must end with it."""
        key = self.key_of(client)
        return None if key is None else f"{key.name} {key.digest.hex()}"

    def is_ours(self, authorization: str | None, now: float) -> bool:
        """Whether an Authorization value holds a client key or a placeholder, which must never leave this machine."""
        value = (authorization or "").encode("latin-1")
        rest = value.partition(b" ")[2].strip(b" ")
        return any(
            secret == _PLACEHOLDER_WITHOUT_KEYS.encode()
            or _PLACEHOLDER.fullmatch(secret)
            or self._identify(secret, now) is not None
            for secret in (value, rest, *_user_and_password(rest))
        )

    def _check_host(self, value: bytes | None, *, absolute: bool) -> None:
        if value is not None and len(value) <= _LONGEST_HOST:
            host, safe = _read_host(value)
            if safe or host in self._allowed_hosts or (absolute and host == self._upstream_host):
                return
        msg = (
            "This proxy was asked for under a host name that it does not know, which a web page could misuse. "
            "Ask for it as localhost or by its IP address, or add the name to METQUAY_ALLOWED_HOSTS."
        )
        raise ProxyError("host-not-allowed", msg)

    def _check_origin(self, origin: str | None, host: str | None) -> None:
        if origin is not None and (
            origin in self._allowed_origins or (host is not None and origin == f"{self._scheme}://{host}".lower())
        ):
            return
        raise _foreign()

    def _check_key(self, method: str, target: Target, judged: Mapping[bytes, bytes | None], now: float) -> Admission:
        if target.unasked or target.local in PROBES:
            return self._open
        for secret in (judged.get(b"x-proxy-key"), _secret(judged.get(b"authorization"))):
            key = None if secret is None else self._identify(secret, now)
            if key is not None:
                return self._admissions[key.name]
        if _is_login(method, target):
            return Admission()
        if target.local == STATUS_PAGE and method in READING_METHODS:
            msg = "This page needs a client key of the proxy: log in with any user name and the key as password."
            raise ProxyError(
                "login-required", msg, headers=(("WWW-Authenticate", 'Basic realm="metquay-proxy", charset="UTF-8"'),)
            )
        msg = (
            "This proxy needs a client key, and the request has none that it knows. Send the key in an X-Proxy-Key "
            "header, as a bearer token, or as a Basic password."
        )
        raise ProxyError("client-key-required", msg)

    def _check_read_only(self, method: str, target: Target, admission: Admission) -> None:
        if _is_login(method, target):
            return
        key = self.key_of(admission.client)
        if target.own and (key is None or not key.read_only or target.local == "/-/test"):
            return
        why = f"the client key {key.name} may only read" if key and key.read_only else "METQUAY_READ_ONLY is set"
        msg = f"{method} was refused, because {why}. Nothing was sent to Metquay. Use a key or a proxy that may write."
        raise ProxyError("read-only", msg)

    def _identify(self, secret: bytes, now: float) -> ClientKey | None:
        return self._key(secret) or self._key_of_placeholder(secret, now)

    def _key(self, secret: bytes) -> ClientKey | None:
        digest = hashlib.sha256(secret).digest()
        found = None
        for key in self._keys:  # always all of them: the time must not tell which one came close
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _key_of_placeholder(self, token: bytes, now: float) -> ClientKey | None:
        match = _PLACEHOLDER.fullmatch(token)
        if match is None:
            return None
        key = self.key_of(match[1].decode())
        expiry = int(match[2])
        if key is None or expiry <= now or not hmac.compare_digest(_sign(key, expiry).encode(), match[3]):
            return None
        return key


@lru_cache(maxsize=64)  # reading an address costs more than the rest of the gate
def _read_host(value: bytes) -> tuple[str, bool]:
    """Return the lower-case host of a Host field, and whether no attacker can own that name."""
    authority = split_authority(value.decode("latin-1"), "http")
    host = "" if authority is None else authority[0]
    if not _HOST.fullmatch(host):
        return "", False
    if ":" in host:
        return host, _is_address(host)
    return host, b"." not in value or host == "localhost" or host.endswith(".localhost") or _is_address(host)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_login(method: str, target: Target) -> bool:
    return method == "POST" and target.local == LOGIN_PATH


def _sign(key: ClientKey, expiry: int) -> str:
    return hmac.new(key.digest, f"placeholder {key.name} {expiry}".encode(), hashlib.sha256).hexdigest()


def _secret(authorization: bytes | None) -> bytes | None:
    """Return the bearer token or the Basic password of an Authorization value."""
    scheme, _, value = (authorization or b"").partition(b" ")
    value = value.strip(b" ")
    match scheme.lower():
        case b"bearer":
            return value
        case b"basic":
            return _user_and_password(value)[1]
    return None


def _user_and_password(value: bytes) -> tuple[bytes, bytes]:
    """Return what Basic's base64 holds, empty where it is malformed."""
    try:
        user, _, password = base64.b64decode(value, validate=True).partition(b":")
    except binascii.Error:
        return b"", b""
    return user, password


def _check_fetch_site(method: str, target: Target, judged: Mapping[bytes, bytes | None]) -> None:
    if judged[b"sec-fetch-site"] in {b"same-origin", b"none"}:
        return
    navigation = judged.get(b"sec-fetch-mode") == b"navigate" and judged.get(b"sec-fetch-dest") == b"document"
    if not (navigation and method == "GET" and target.local in _LINKED):
        raise _foreign()


def _foreign() -> ProxyError:
    msg = (
        "A web page of another site tried to use this proxy, and was refused. If that page is a tool of yours, "
        "add its origin (like https://tools.lab.example) to METQUAY_ALLOWED_ORIGINS."
    )
    return ProxyError("origin-not-allowed", msg)
