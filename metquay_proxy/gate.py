"""The gate: who may use the keys through this proxy, judged before anything else is done.

Owns part 6 of the contract as far as one request's head decides it. Pure: takes the canonical target and the judged fields,
and returns an ``Admission`` or raises ``ProxyError``. Must not read bodies, log or wait.

Facts: a web page can make the user's browser send requests to localhost, and by DNS rebinding even read the answers;
what it can't forge are Host, Origin (Fetch standard, section 3.2) and Sec-Fetch-* (W3C Fetch Metadata). Names without a
dot and ``*.localhost`` (RFC 6761 section 6.3) can't be registered by an attacker.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from metquay_proxy.errors import ProxyError
from metquay_proxy.target import OWN_PREFIX, Target, split_authority

if TYPE_CHECKING:
    from collections.abc import Iterable

    from metquay_proxy.rewrite import RequestHead

READING_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
PROBES: Final = frozenset({"/-/live", "/-/ready"})
STATUS_PAGE: Final = OWN_PREFIX
PLACEHOLDER_LIFETIME: Final = 900
"""Seconds; the same as Metquay's own tokens, so that SDKs renew it as they always do."""

_HOST: Final = re.compile(r"[a-z0-9_.-]+")
_PLACEHOLDER_WITHOUT_KEYS: Final = "held-by-metquay-proxy"


@dataclass(frozen=True, slots=True)
class ClientKey:
    """One named key that a local tool presents; only its SHA-256 digest is kept."""

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
    """Admits or refuses one request at a time; holds nothing that changes."""

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
        """``allowed_hosts`` are lower-case names without port, ``allowed_origins`` like ``https://tools.lab.example``."""
        self._upstream_host = upstream_host
        self._keys = keys
        self._allowed_hosts = frozenset(allowed_hosts)
        self._allowed_origins = frozenset(allowed_origins)
        self._scheme = scheme
        self._open = Admission(read_only=read_only)
        self._admissions = {key.name: Admission(key.name, read_only or key.read_only) for key in keys}

    @property
    def guarded(self) -> bool:
        """Whether a client key is required."""
        return bool(self._keys)

    def cors(self, head: RequestHead) -> tuple[tuple[str, str], ...]:
        """Return the fields that let a listed origin read the answer, errors included; nothing for any other."""
        if not self._allowed_origins:
            return ()
        origin = head.text(b"origin")
        if origin not in self._allowed_origins or origin is None:
            return ()
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "*"),
            ("Vary", "Origin"),
        )

    def check(self, method: str, target: Target, head: RequestHead, now: float) -> Admission:
        """Admit the request, or raise ``ProxyError``. ``now`` is the wall clock in seconds (placeholders expire)."""
        judged = head.judged
        self._check_host(head.text(b"host"), present=b"host" in judged, absolute=target.absolute)
        if b"origin" in judged:
            self._check_origin(head.text(b"origin"), head.text(b"host"))
            if method == "OPTIONS" and b"access-control-request-method" in judged and self.cors(head):
                return Admission(preflight=True)
        elif b"sec-fetch-site" in judged:
            _check_fetch_site(method, target, head)
        admission = self._open
        if self._keys:
            admission = self._check_key(method, target, head, now)
        if admission.read_only and method not in READING_METHODS:
            self._check_read_only(method, target, admission)
        return admission

    def login(self, secret: str, now: float) -> str | None:
        """Return the placeholder that ``POST /authenticate`` hands out; None where the secret is no client key.

        Without client keys any secret will do. With them the placeholder stands for that key until it expires: it is an
        HMAC under the key's digest, so that nothing has to be remembered.
        """
        if not self._keys:
            return _PLACEHOLDER_WITHOUT_KEYS
        key = self._key(secret)
        return None if key is None else self.placeholder(key, now)

    def placeholder(self, key: ClientKey, now: float) -> str:
        """Return a token that counts as ``key`` for ``PLACEHOLDER_LIFETIME`` seconds from ``now`` (wall clock)."""
        expiry = int(now) + PLACEHOLDER_LIFETIME
        return f"local.{key.name}.{expiry}.{_sign(key, expiry)}"

    def key_of(self, client: str | None) -> ClientKey | None:
        """Return the key of that name."""
        return next((key for key in self._keys if key.name == client), None)

    def is_ours(self, authorization: str | None, now: float) -> bool:
        """Whether an Authorization value holds a client key or a placeholder, which must never leave this machine."""
        bearer, _, basic = _credentials(authorization)
        found = (bearer, basic)
        if any(secret is not None and secret.startswith(("local.", _PLACEHOLDER_WITHOUT_KEYS)) for secret in found):
            return True
        return any(secret is not None and self._identify(secret, now) is not None for secret in found)

    def _check_host(self, value: str | None, *, present: bool, absolute: bool) -> None:
        if not present:
            return
        authority = None if value is None else split_authority(value, "http")
        if authority is not None:
            host = authority[0]
            if ":" in host or host[-1].isdigit():
                try:
                    ipaddress.ip_address(host)
                except ValueError:
                    pass  # a name may end in a digit: judged below
                else:
                    return
            if _HOST.fullmatch(host) and (
                "." not in host
                or host == "localhost."
                or host.endswith((".localhost", ".localhost."))
                or host in self._allowed_hosts
                or (absolute and host == self._upstream_host)
            ):
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

    def _check_key(self, method: str, target: Target, head: RequestHead, now: float) -> Admission:
        if target.local in PROBES:
            return self._open
        bearer, is_basic, basic = _credentials(head.text(b"authorization"))
        presented = (head.text(b"x-proxy-key"), basic if is_basic else bearer)
        for secret in presented:
            key = None if secret is None else self._identify(secret, now)
            if key is not None:
                return self._admissions[key.name]
        if method == "POST" and target.local == "/authenticate":
            return Admission(read_only=False)
        if target.local == STATUS_PAGE and method in READING_METHODS:
            msg = "This page needs a client key of the proxy: log in with any user name and the key as password."
            raise ProxyError(
                "login-required", msg, headers=(("WWW-Authenticate", 'Basic realm="metquay-proxy", charset="UTF-8"'),)
            )
        msg = (
            "This proxy needs a client key, and the request has none that it knows. Send the key in an X-Proxy-Key header, "
            "as a bearer token, or as a Basic password."
        )
        raise ProxyError("client-key-required", msg)

    def _check_read_only(self, method: str, target: Target, admission: Admission) -> None:
        if method == "POST" and target.local == "/authenticate":
            return
        if target.own:
            key = self.key_of(admission.client)
            if key is None or not key.read_only:
                return
        msg = (
            f"{method} was refused: this proxy, or the client key that was used, may only read. "
            "Nothing was changed in Metquay."
        )
        raise ProxyError("read-only", msg)

    def _identify(self, secret: str, now: float) -> ClientKey | None:
        return self._key(secret) or self._key_of_placeholder(secret, now)

    def _key(self, secret: str) -> ClientKey | None:
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:  # always all of them: the time must not tell which one came close
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _key_of_placeholder(self, token: str, now: float) -> ClientKey | None:
        parts = token.split(".")
        if len(parts) != 4 or not re.fullmatch(r"[0-9]{1,15}", parts[2]):  # noqa: PLR2004 - local.name.expiry.signature
            return None
        key = self.key_of(parts[1])
        expiry = int(parts[2])
        if key is None or expiry <= now or not hmac.compare_digest(_sign(key, expiry).encode(), parts[3].encode()):
            return None
        return key


def _sign(key: ClientKey, expiry: int) -> str:
    return hmac.new(key.digest, f"placeholder {expiry}".encode(), hashlib.sha256).hexdigest()


def _credentials(authorization: str | None) -> tuple[str | None, bool, str | None]:
    """Return (bearer token, whether the scheme is Basic, Basic password)."""
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip(), False, None
    if scheme.lower() != "basic":
        return None, False, None
    try:
        text = base64.b64decode(value.strip(), validate=True).decode("utf-8", "surrogateescape")
    except binascii.Error:
        return None, True, None
    return None, True, text.partition(":")[2]


def _check_fetch_site(method: str, target: Target, head: RequestHead) -> None:
    if head.text(b"sec-fetch-site") in {"same-origin", "none"}:
        return
    navigation = head.text(b"sec-fetch-mode") == "navigate" and head.text(b"sec-fetch-dest") == "document"
    if method == "GET" and target.local == STATUS_PAGE and navigation:
        return
    raise _foreign()


def _foreign() -> ProxyError:
    msg = (
        "A web page of another site tried to use this proxy, and was refused. If that page is a tool of yours, "
        "add its origin (like https://tools.lab.example) to METQUAY_ALLOWED_ORIGINS."
    )
    return ProxyError("origin-not-allowed", msg)
