"""The key pair, what is odd about it, the token that it buys, and the judgement of a login's answer.

Owns the types of part 4 of the contract, and what each kind of failure means for the requests that need a token. Pure:
must neither log in nor decide when.

Facts:
* The vendor's ``POST /authenticate`` answers ``{"accessToken", "tokenType": "bearer", "expiresIn": 900}``. There is no
  refresh token (renewing is logging in again) and no rate limit on it; wrong keys may come as 400, 401 or 403.
* RFC 9110 section 10.2.3: a 429 or a 503 may say in Retry-After when to come back.
* RFC 6749 section 5.1: ``token_type`` is case-insensitive, ``expires_in`` (seconds) may be absent.
* RFC 9110 section 5.5 and RFC 6750 section 2.1: a credential in a field value is visible ASCII without spaces.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from metquay_proxy.rules.target import is_loopback

DEFAULT_LIFETIME: Final = 900.0
"""Seconds; the vendor's documented lifetime, taken where an answer states none that can be believed."""
LONGEST_LIFETIME: Final = 86_400.0
"""Seconds; more is not believed (milliseconds, more likely): an early renewal is cheap, a late one costs a 401."""
LONGEST_PAUSE: Final = 300.0
"""Seconds; for longer Metquay's own Retry-After does not keep the next login away."""

_PLACEHOLDER: Final = re.compile(
    r"(x|[\W_])+|[<\[{(].*[>\]})]|\$(\w+|[{(].*[})])|%\w+%|(your|choose|enter|insert|paste|put|replace)[-_ ].*"
    r"|.*[-_ ]here|change[-_ ]?me|to[-_ ]?do|tbd|dummy|placeholder|example|none|null"
    r"|(my[-_ ])?(access|secret|api)[-_ ]?key",
    re.IGNORECASE,
)
_NAME: Final = r"(?i)^[{\s\"']*(export\s+|set\s+|\$env:)?\w*(key|secret)\w*[\"']?\s*[=:]\s*(?=[^=\s])"
_MARKS: Final = "[\"'`´“”„‟‘’‚‛«»‹›]+"  # noqa: RUF001 - also those that word processors put in their place
_QUOTED: Final = f"^{_MARKS}|{_MARKS}$"
_ODD: Final = {
    r"\s+#.*": "is followed by a comment, which is sent as a part of it: remove the comment",
    _NAME: "contains a name, as in NAME=value: only the value belongs there",
    _QUOTED: "has quotation marks, which are sent as a part of it: remove them (docker --env-file keeps them)",
    r"\s+": "contains a space: copy it again",
    r"[^\x00-\x7f]+": "contains an accent, a long dash or another character that is unusual in a key: copy it again",
}
"""Each pattern takes away what it explains, so that the next one is not put out by it."""
_TOKEN: Final = re.compile(r"[!-~]{1,16384}")


def oddities(key: str) -> str:
    """Return what makes one think that a key was copied wrongly: the rest of a sentence about it, or nothing.

    It shows no part of the key. Whether a key is right, only who takes it knows.
    """
    if _PLACEHOLDER.fullmatch(key):
        return "seems to be a placeholder: replace it with the key"
    found = []
    for pattern, words in _ODD.items():
        key, count = re.subn(pattern, "", key)
        if count:
            found.append(words)
    return "; it ".join(found)


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """The key pair. Its repr shows nothing of it."""

    access_key: str
    secret_key: str
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What is odd about where they were found: sentences as ``doubts`` returns them."""

    def doubts(self) -> tuple[str, ...]:
        """Return what looks wrong about the pair: sentences without a full stop, that show no part of it."""
        pair = {"METQUAY_ACCESS_KEY": self.access_key, "METQUAY_SECRET_KEY": self.secret_key}
        odd = [f"{name} {words}" for name, key in pair.items() if (words := oddities(key))]
        if not odd and self.access_key == self.secret_key != "":
            odd = [f"{' and '.join(pair)} are the same key: probably one of them was copied twice"]
        return (*self.remarks, *odd)


@dataclass(frozen=True, slots=True)
class AccessToken:
    """What the key pair buys: one grant of the login. Its repr shows its times alone: seconds on the cache's clock.

    ``obtained_at`` is read before the login is sent, so that its duration never lengthens the lifetime. Two grants are
    equal only if made at the same time: the same text granted again later is another one.
    """

    value: str = field(repr=False)
    obtained_at: float
    lifetime: float
    authorization: bytes = field(init=False, compare=False, repr=False)
    """The last field line of a request that it authorizes, made once."""

    def __post_init__(self) -> None:
        """Derive what every request sends."""
        object.__setattr__(self, "authorization", b"Authorization: Bearer %b\r\n" % self.value.encode("ascii"))

    def usable(self, now: float) -> bool:
        """Whether it lives at ``now``; before its own beginning (a clock that was set back) its age is unknown: no."""
        return 0 <= now - self.obtained_at < self.lifetime


class LoginFailed(Exception):
    """A login brought no token; the next one may. The text is shown to people and must hold no secret."""

    slug: ClassVar = "token-unavailable"
    told: ClassVar = (
        "The proxy has no access token for Metquay. {why} The proxy keeps trying; send the request again in {wait} s."
    )
    """The answer to a request that needs a token, and its text."""
    pause: float = 0.0
    """Seconds in which the next login must not be made, whoever waits for it."""


class CredentialsRejected(LoginFailed):
    """The login refused the keys: it will go on so until somebody changes them."""

    slug = "credentials-rejected"
    told = (
        "{why} Check METQUAY_ACCESS_KEY and METQUAY_SECRET_KEY, and that METQUAY_HOST is the server they belong to. "
        "Secret files are read again in {wait} s; other changes need a restart."
    )
    pause = 60.0


class UpstreamDistrusted(LoginFailed):
    """The upstream's certificate was not accepted: nothing was sent, and waiting does not help."""

    slug = "upstream-tls"
    told = "{why}"


class LoginBusy(LoginFailed):
    """The login has too much to do, or is out of order: it asks to be left alone for ``pause`` seconds, if for any."""

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.pause = min(pause, LONGEST_PAUSE)


def parse_login(status: int, body: bytes, now: float, *, pause: float | None = None, location: str = "") -> AccessToken:
    """Judge the answer of ``POST /authenticate``; ``now`` is the clock's reading (seconds) before it was asked.

    ``pause``: for how many seconds it asks to be left alone; ``location``: the whole URL that it points to.

    A missing ``tokenType`` counts as bearer: the vendor's schema requires the field but knows no other value, and a
    token that works is worth more than its label. ``expiresIn`` is believed between 1 s and a day, else 900 s are
    taken. A 400 counts as refused keys, since the vendor documents no other status for them.

    Raises ``CredentialsRejected`` for 400, 401 and 403, ``LoginBusy`` for 429 and 5xx, ``LoginFailed`` for whatever
    else is not a usable token.
    """
    if status in {400, 401, 403}:
        raise CredentialsRejected(f"Metquay refused the key pair (status {status}).")
    if status in {429, *range(500, 600)}:
        asked = "" if pause is None else f" and asks the proxy to wait {pause:.0f} s"
        raise LoginBusy(f"Metquay's login answered with status {status}{asked}.", pause or 0.0)
    if status in range(300, 400):
        raise LoginFailed(_redirected(status, location))
    if status not in range(200, 300):
        raise LoginFailed(f"Metquay's login answered with status {status}.")
    answer = None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(body)
    if not isinstance(answer, dict):
        raise LoginFailed(
            "Metquay's login answered with something other than JSON with a token: it may be another server."
        )
    token_type = answer.get("tokenType")
    if token_type is not None and str(token_type).lower() != "bearer":
        raise LoginFailed("Metquay's login granted a token of a type other than bearer.")
    token = answer.get("accessToken")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise LoginFailed("Metquay's login answered without an access token that can be sent in a header.")
    lifetime: Any = answer.get("expiresIn")
    if type(lifetime) not in {int, float} or not 1 <= lifetime <= LONGEST_LIFETIME:
        lifetime = DEFAULT_LIFETIME
    return AccessToken(token, now, float(lifetime))


def _redirected(status: int, location: str) -> str:
    """Say where a redirect points, for people: neither its query nor a password in it, and nothing unprintable."""
    url = urlsplit("")
    with contextlib.suppress(ValueError):  # of a password with a slash too, which looks like a port
        found = urlsplit(location)
        url = found if found.port != 0 else url
    if not url.netloc:
        return f"Metquay's login was redirected (status {status}) without a new address. Check METQUAY_HOST."
    place = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path.partition(';')[0]}".rstrip("/")
    place = re.sub(r"[^!-~]", "?", place)[:200]
    base = place.removesuffix("/authenticate")
    if not is_loopback(url.hostname or ""):
        base = re.sub("^http:", "https:", base)
    cure = f"METQUAY_HOST should probably be {base}."
    if not place.endswith("/authenticate"):
        place = "/".join(place.split("/")[:3])  # what follows may let somebody in
        cure = (
            "That is a web page: METQUAY_HOST should probably be another address, or the network (of a hotel or a "
            "company) wants you to log in with a browser first."
        )
    return f"Metquay's login was redirected (status {status}) to {place}. {cure}"
