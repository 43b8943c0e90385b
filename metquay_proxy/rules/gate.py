"""The gate: who may use the keys through this proxy, judged before anything else is done.

Owns part 6 of the contract as far as one request's head decides it. Pure: takes the canonical target and the judged
fields, and returns an ``Admission`` or raises ``ProxyError``. Must not read bodies, log or wait.

Facts: a web page can make the user's browser send requests to localhost, and by DNS rebinding even read the answers;
what it can't forge are Host, Origin (Fetch standard, section 3.2) and Sec-Fetch-* (W3C Fetch Metadata). Browsers
serialize an origin in one way only (HTML standard: lower case, no default port), so that it is compared byte for byte.
Under plain http and a name that is not localhost they send neither with images, scripts and frames (Secure Contexts,
section 3.1): what then tells a page is its Referer, where the page does not hide it.
``*.localhost`` (RFC 6761 section 6.3) and names without a dot can't be registered by an attacker, but one of the latter
can be owned by a neighbour in the local network. RFC 7617: Basic's password begins after the first colon. RFC 9110
section 9.3.8: the answer to TRACE repeats the request's head.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import LOGIN_PATH, OWN_PREFIX, Target, is_address, split_authority

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from metquay_proxy.rules.headers import RequestFields

READING_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
PROBES: Final = frozenset({"/-/live", "/-/ready"})
WATCHED: Final = PROBES | {"/-/metrics"}
_LINKED: Final = frozenset({"/", "/-", OWN_PREFIX})
"""The status page and what leads there: other sites may link to these."""
PLACEHOLDER_LIFETIME: Final = 900
"""Seconds; the same as Metquay's own tokens, so that SDKs renew it as they always do."""

_SENT_METHODS: Final = "GET, HEAD, OPTIONS, POST, PUT, PATCH, DELETE"
_LOGIN_PROMPT: Final = ("WWW-Authenticate", 'Basic realm="metquay-proxy", charset="UTF-8"')
_ORIGIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_HOST: Final = re.compile(r"[a-z0-9_.-]+|[0-9a-f:.]+(?:%[a-z0-9_.-]+)?")
_LONGEST_HOST: Final = 300
_REMEMBERED: Final = 64
_ANYBODYS, _DOTLESS, _OURS = range(3)
_PLACEHOLDER_WITHOUT_KEYS: Final = "held-by-metquay-proxy"
_PLACEHOLDER: Final = re.compile(rb"local\.([A-Za-z0-9_-]+)\.([0-9]{1,15})\.([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class ClientKey:
    """One named key that a local tool presents; only its SHA-256 digest is kept.

    ``name`` is made of ``[A-Za-z0-9_-]`` and, like the key, no other client's.
    """

    name: str
    digest: bytes = field(repr=False)
    read_only: bool = False

    @classmethod
    def of(cls, name: str, key: str, *, read_only: bool = False) -> ClientKey:
        """Make one from the key's text."""
        return cls(name, hashlib.sha256(key.encode()).digest(), read_only)


@dataclass(frozen=True, slots=True)
class Admission:
    """What the gate found out about an admitted request.

    ``client`` is the key's name, None without one; ``scope`` stands for that very key, for what is remembered of it and
    must end with it. ``preflight``: answer it here as a CORS preflight.
    """

    client: str | None = None
    read_only: bool = False
    scope: str | None = field(default=None, compare=False, repr=False)
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
        own_names: Collection[str] | None = None,
    ) -> None:
        """Take the settings that decide.

        ``allowed_hosts`` are lower-case names without port and final dot, ``allowed_origins`` are like
        ``https://tools.lab.example``; ``scheme`` is the one that our own pages are served under. ``own_names``: of the
        names without a dot only these lower-case ones may be asked for; None: any.
        """
        self._upstream_host = upstream_host
        self._safe = _DOTLESS if own_names is None else _OURS
        self._allowed_hosts = frozenset([*allowed_hosts, *(own_names or ())])
        self._allowed_origins = frozenset(allowed_origins)
        self._scheme = scheme
        self._good_hosts: set[bytes] = set()
        """Some of the Host fields that were found good, whatever is asked for; to read one costs more than the rest."""
        self._open = Admission(read_only=read_only)
        self.keys = keys
        """Those in force; ``replace_keys`` changes them."""
        self.replace_keys(keys)

    def replace_keys(self, keys: tuple[ClientKey, ...]) -> frozenset[str]:
        """Admit by other keys from now on; return the names whose key has ended, or is another one now.

        With an old key ends its placeholder, which is signed by it. A gate that is guarded stays so: ``keys`` has one.
        """
        if bool(keys) != bool(self.keys):
            raise ValueError("a gate does not begin or cease to ask for keys")
        ended = frozenset(key.name for key in self.keys if key not in keys)
        self.keys = keys
        self._admissions = {
            key.name: Admission(key.name, self._open.read_only or key.read_only, f"{key.name} {key.digest.hex()}")
            for key in keys
        }
        return ended

    def cors(self, head: RequestFields) -> tuple[tuple[str, str], ...]:
        """Return the fields that let a listed origin read the answer, errors included; nothing for any other."""
        origin = head.text(b"origin") if self._allowed_origins else None
        if origin is None or origin not in self._allowed_origins:
            return ()
        return (("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", "*"), ("Vary", "Origin"))

    def check(self, method: str, target: Target, head: RequestFields, now: float) -> Admission:
        """Return who asks, or raise ``ProxyError`` where nobody may who asks so. What they may do, ``permit`` judges.

        ``now`` is the wall clock in seconds (placeholders expire).
        """
        judged = head.judged
        if b"host" in judged and (host := judged[b"host"]) not in self._good_hosts:
            self._check_host(host, target)
        if head.of_page:
            if self._is_foreign(method, target, head):
                msg = (
                    "A web page of another site tried to use this proxy, and was refused. If that page is a tool of "
                    "yours, add its origin (like https://tools.lab.example) to METQUAY_ALLOWED_ORIGINS, and restart."
                )
                raise ProxyError("origin-not-allowed", msg)
            if method == "OPTIONS" and b"access-control-request-method" in judged and self.cors(head):
                return Admission(preflight=True)
        return self._check_key(method, target, judged, now) if self.keys else self._open

    def permit(self, method: str, target: Target, admission: Admission) -> None:
        """Raise ``ProxyError`` where those who were admitted may not do that."""
        if admission.read_only and method not in READING_METHODS:
            self._check_read_only(method, target, admission)
        if method == "TRACE" and not (target.own or target.pass_through):
            msg = "TRACE would show the token that this proxy attaches, so it was not sent. Use another method."
            raise ProxyError("method-not-allowed", msg, headers=(("Allow", _SENT_METHODS),))

    def demand(self, admission: Admission) -> None:
        """Raise ``ProxyError`` where a client was admitted by a key that has ended since."""
        if admission.scope is not None and all(each.scope != admission.scope for each in self._admissions.values()):
            raise ProxyError("client-key-required", "The client key of this request has ended since it began.")

    def login(self, client: str | None, secret: str, now: float) -> str | None:
        """Return the placeholder that ``POST /authenticate`` hands out, or None where the secret is no client key.

        It counts as the key of ``client``, else as the one that the ``secret`` is, for ``PLACEHOLDER_LIFETIME`` seconds
        from ``now`` (wall clock). It is an HMAC under the key's digest, so that nothing has to be remembered. Without
        client keys any secret will do.
        """
        if not self.keys:
            return _PLACEHOLDER_WITHOUT_KEYS
        # JSON can spell half a surrogate pair
        key = self._named(client) or self._key(secret.encode("utf-8", "surrogatepass"))
        expiry = int(now) + PLACEHOLDER_LIFETIME
        return None if key is None else f"local.{key.name}.{expiry}.{_sign(key, expiry)}"

    def is_ours(self, authorization: str | None, now: float) -> bool:
        """Whether an Authorization value holds a client key or a placeholder, which must never leave this machine."""
        value = (authorization or "").encode("latin-1")
        rest = value.partition(b" ")[2].strip(b" ")
        secrets = (value, rest, *_user_and_password(rest))
        shaped = _PLACEHOLDER_WITHOUT_KEYS.encode() in secrets or any(map(_PLACEHOLDER.fullmatch, secrets))
        return shaped or any(self._identify(secret, now) for secret in secrets)

    def _check_host(self, value: bytes | None, target: Target) -> None:
        if value and len(value) <= _LONGEST_HOST:
            host, safety = _read_host(value)
            if safety >= self._safe or host in self._allowed_hosts:
                if len(self._good_hosts) < _REMEMBERED:
                    self._good_hosts.add(value)
                return
            if target.absolute and host == self._upstream_host:
                return
        raise ProxyError(
            "host-not-allowed",
            "This request was sent to a host name that the proxy does not accept, because web pages could misuse it. "
            "Use localhost or the IP address, or add the name to METQUAY_ALLOWED_HOSTS and restart the proxy.",
        )

    def _is_foreign(self, method: str, target: Target, head: RequestFields) -> bool:
        """Whether another site's page asks. Of Origin, Sec-Fetch-Site and Referer the first that is there decides."""
        judged = head.judged
        if b"origin" in judged:
            origin = head.text(b"origin")
        elif b"sec-fetch-site" in judged:
            if judged[b"sec-fetch-site"] in {b"same-origin", b"none"}:
                return False
            navigation = judged.get(b"sec-fetch-mode") == b"navigate" and judged.get(b"sec-fetch-dest") == b"document"
            return not (navigation and method == "GET" and target.local in _LINKED)
        elif judged[b"referer"] == b"":
            return False
        else:
            page = _ORIGIN.match(head.text(b"referer") or "")
            origin = page and page[0].lower()
        own = f"{self._scheme}://{head.text(b'host') or ' '}".lower()  # no origin ends in a blank
        return origin is None or (origin != own and origin not in self._allowed_origins)

    def _check_key(self, method: str, target: Target, judged: Mapping[bytes, bytes | None], now: float) -> Admission:
        if target.unasked or target.local in PROBES:
            return self._open
        for name, secret_in in _PRESENTED.items():
            if (value := judged.get(name)) and (key := self._identify(secret_in(value), now)):
                return self._admissions[key.name]
        if _is_login(method, target):
            return Admission()
        if target.local == OWN_PREFIX and method in READING_METHODS:
            msg = "This page needs a client key of the proxy: log in with any user name and the key as password."
            raise ProxyError("login-required", msg, headers=(_LOGIN_PROMPT,))
        raise ProxyError(
            "client-key-required",
            "This proxy needs a client key, and the request has none, or a wrong one. Send the key in an X-Proxy-Key "
            "header, as a bearer token, or as a Basic password.",
        )

    def _check_read_only(self, method: str, target: Target, admission: Admission) -> None:
        limited = any(key.name == admission.client and key.read_only for key in self.keys)
        if _is_login(method, target) or (target.own and (not limited or target.local == "/-/test")):
            return
        why, other = "METQUAY_READ_ONLY is set", "a proxy"
        if limited:
            why, other = f'the client key "{admission.client}" may only read', "a client key"
        msg = f"{method} was refused, because {why}. Nothing was sent to Metquay. Use {other} that may write."
        raise ProxyError("read-only", msg)

    def _identify(self, secret: bytes, now: float) -> ClientKey | None:
        """Return the key that a secret is, or that it is a living placeholder of."""
        match = _PLACEHOLDER.fullmatch(secret)
        if match is None:
            return self._key(secret)
        key, expiry = self._named(match[1].decode()), int(match[2])
        good = key is not None and expiry > now and hmac.compare_digest(_sign(key, expiry).encode(), match[3])
        return key if good else None

    def _named(self, client: str | None) -> ClientKey | None:
        return next((key for key in self.keys if key.name == client), None)

    def _key(self, secret: bytes) -> ClientKey | None:
        # always all keys are compared: the time must not tell which came close
        digest = hashlib.sha256(secret).digest()
        found = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        return found[0] if found else None


def _read_host(value: bytes) -> tuple[str, int]:
    """Return the lower-case host of a Host field, and how safe it is that the name is not somebody else's."""
    authority = split_authority(value.decode("latin-1"), "http")
    host = "" if authority is None else authority[0]
    if not _HOST.fullmatch(host):
        return "", _ANYBODYS
    if host == "localhost" or host.endswith(".localhost") or is_address(host):
        return host, _OURS
    return host, _ANYBODYS if b"." in value or ":" in host else _DOTLESS


def _is_login(method: str, target: Target) -> bool:
    return method == "POST" and target.local == LOGIN_PATH


def _sign(key: ClientKey, expiry: int) -> str:
    return hmac.new(key.digest, f"placeholder {key.name} {expiry}".encode(), hashlib.sha256).hexdigest()


def _secret(authorization: bytes) -> bytes:
    """Return the bearer token or the Basic password of an Authorization value; empty where it has none."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"basic":
        return _user_and_password(value.strip(b" "))[1]
    return value.strip(b" ") if scheme.lower() == b"bearer" else b""


def _user_and_password(value: bytes) -> tuple[bytes, bytes]:
    """Return what Basic's base64 holds, empty where it is malformed."""
    with contextlib.suppress(ValueError):
        user, _, password = base64.b64decode(value, validate=True).partition(b":")
        return user, password
    return b"", b""


_PRESENTED: Final[Mapping[bytes, Callable[[bytes], bytes]]] = {b"x-proxy-key": bytes, b"authorization": _secret}
"""Where a client key is looked for, and what finds it there; the first is meant for us for certain."""
