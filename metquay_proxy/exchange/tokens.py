"""The access token: obtained, renewed ahead of its end, and handed out to whoever needs it.

Owns the key pair's and the token's types, the judgement of a login's answer, and the cache whose one background task
makes every login. Must not know HTTP, logging or settings: a ``TokenSource`` logs in, an observer is told.

Facts:
* The vendor's ``POST /authenticate`` answers ``{"accessToken", "tokenType": "bearer", "expiresIn": 900}``. There is no
  refresh token (renewing is logging in again) and no rate limit on it; wrong keys may come as 400, 401 or 403.
* RFC 9110 section 10.2.3: a 429 or a 503 may say in Retry-After when to come back.
* RFC 6749 section 5.1: ``token_type`` is case-insensitive, ``expires_in`` (seconds) may be absent.
* RFC 9110 section 5.5 and RFC 6750 section 2.1: a credential in a field value is visible ASCII without spaces.
* asyncio's timers run on ``time.monotonic``, which stands still while Linux or macOS is suspended; so the task looks at
  a clock that does not, at least every 15 s, and each use of the token is judged by that clock.

Nobody ever awaits the login itself: the task owns it, requests wait for news of it. So there is one login at a time by
construction, and a caller that leaves can cancel nothing but its own waiting.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import random
import re
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import is_loopback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

_T = TypeVar("_T")
_Kind = Literal["obtained", "renewed", "recovered", "failed", "rejected"]

DEFAULT_LIFETIME: Final = 900.0
"""Seconds; the vendor's documented lifetime, taken where an answer states none that can be believed."""
SHORTEST_LIFETIME: Final = 1.0
"""Seconds; less is not believed."""
LONGEST_LIFETIME: Final = 86_400.0
"""Seconds; more is not believed (milliseconds, more likely): an early renewal is cheap, a late one costs a 401."""
RENEWAL_SHARE: Final = 0.2
"""Share of the lifetime that is left when the token is renewed,"""
RENEWAL_MARGIN: Final = 120.0
"""but at least so many seconds, or half of a lifetime that is too short for that."""
RENEWAL_JITTER: Final = 0.1
"""Share of the margin by which replicas that were started together drift apart; only ever earlier."""
LOGIN_INTERVAL: Final = 1.0
"""Seconds from the start of one login to the next, whoever asks."""
LOGIN_TIMEOUT: Final = 60.0
"""Seconds after which a login is given up whose source did not give up itself."""
REJECTED_INTERVAL: Final = 60.0
"""Seconds from the refusal of the keys to the next login."""
BACKOFF_CEILING: Final = 30.0
"""Seconds; the longest pause after a failed login while nobody waits,"""
WANTED_CEILING: Final = 4.0
"""and while somebody does: shorter than ``FAILED_PATIENCE``, so that a request that waits gets at least one attempt."""
FAILED_PATIENCE: Final = 5.0
"""Seconds that a request still waits once a login has failed."""
LONGEST_PAUSE: Final = 300.0
"""Seconds; for longer Metquay's own Retry-After does not keep the next login away."""
TICK: Final = 15.0
"""Seconds after which the task looks at the clock, since the machine may have been suspended meanwhile."""

_PLACEHOLDER: Final = re.compile(
    r"(x|[\W_])+|[<\[{(].*[>\]})]|\$(\w+|[{(].*[})])|%\w+%|(your|enter|insert|paste|put|replace)[-_ ].*|.*[-_ ]here"
    r"|change[-_ ]?me|to[-_ ]?do|tbd|dummy|placeholder|example|none|null|(my[-_ ])?(access|secret|api)[-_ ]?key",
    re.IGNORECASE,
)
_QUOTES: Final = "[\"'`´“”„‟‘’‚‛«»‹›]+"  # noqa: RUF001 - also those that word processors put in their place
_ODD: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), words)
    for pattern, words in (
        (r"\s+#.*", "is followed by a comment, which is sent as a part of it: take the comment away"),
        (
            r"^[{\s\"']*(export\s+|set\s+|\$env:)?\w*(key|secret)\w*[\"']?\s*[=:]\s*(?=[^=\s])",
            "holds a name, as in NAME=value: only the value belongs there",
        ),
        (
            f"^{_QUOTES}|{_QUOTES}$",
            "has quotation marks, which are sent as a part of it: take them away (docker --env-file keeps them)",
        ),
        (r"\s+", "holds a blank: copy it again"),
        (r"[^\x00-\x7f]+", "holds an accent, a long dash or another sign that is unusual in a key: copy it again"),
    )
)
"""Each pattern takes away what it explains, so that the next one is not put out by it."""
_TOKEN: Final = re.compile(r"[!-~]{1,16384}")
_REFUSED: Final = frozenset({400, 401, 403})
_REDIRECTED: Final = range(300, 400)
_TOO_MANY: Final = 429
_OUT_OF_ORDER: Final = range(500, 600)
_LONGEST_PLACE: Final = 200


def oddities(key: str) -> str:
    """Return what makes one think that a key was copied wrongly: the rest of a sentence about it, or nothing.

    It shows no part of the key. Whether a key is right, only who takes it knows.
    """
    if _PLACEHOLDER.fullmatch(key):
        return "is a placeholder: put the key in its place"
    found = []
    for pattern, words in _ODD:
        key, count = pattern.subn("", key)
        if count:
            found.append(words)
    return "; it ".join(found)


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """The key pair. Never printed."""

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

    def __repr__(self) -> str:
        """Name the type alone."""
        return "Credentials(***)"


@dataclass(frozen=True, slots=True, repr=False)
class AccessToken:
    """What the key pair buys: one grant of the login. Times are seconds on the cache's clock.

    ``obtained_at`` is read before the login is sent, so that its duration never lengthens the lifetime. Two grants are
    equal only if made at the same time: the same text granted again later is another one.
    """

    value: str
    obtained_at: float
    lifetime: float
    expires_at: float = field(init=False, compare=False)
    authorization: bytes = field(init=False, compare=False)
    """The value of the Authorization header, made once."""

    def __post_init__(self) -> None:
        """Derive what every request reads."""
        object.__setattr__(self, "expires_at", self.obtained_at + self.lifetime)
        object.__setattr__(self, "authorization", b"Bearer " + self.value.encode("ascii"))

    def __repr__(self) -> str:
        """Show the times alone."""
        return f"AccessToken(***, obtained_at={self.obtained_at:.3f}, lifetime={self.lifetime:g})"

    def usable(self, now: float) -> bool:
        """Whether it lives at ``now``; before its own beginning (a clock that was set back) its age is unknown: no."""
        return self.obtained_at <= now < self.expires_at


class LoginFailed(Exception):
    """A login brought no token; the next one may. The text is shown to people and must hold no secret."""


class CredentialsRejected(LoginFailed):
    """The login refused the keys: it will go on so until somebody changes them."""


class LoginBusy(LoginFailed):
    """The login has too much to do, or is out of order: it asks to be left alone for ``pause`` seconds, if for any."""

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.pause = min(pause, LONGEST_PAUSE)


class UpstreamDistrusted(LoginFailed):
    """The upstream's certificate was not accepted: nothing was sent, and waiting does not help."""


def parse_login(status: int, body: bytes, now: float, *, pause: float | None = None, location: str = "") -> AccessToken:
    """Judge the answer of ``POST /authenticate``; ``now`` is the clock's reading (seconds) before it was asked.

    ``pause``: for how many seconds it asks to be left alone; ``location``: the whole URL that it points to.

    A missing ``tokenType`` counts as bearer: the vendor's schema requires the field but knows no other value, and a
    token that works is worth more than its label. ``expiresIn`` is believed between 1 s and a day, else 900 s are
    taken. A 400 counts as refused keys, since the vendor documents no other status for them.

    Raises ``CredentialsRejected`` for 400, 401 and 403, ``LoginBusy`` for 429 and 5xx, ``LoginFailed`` for whatever
    else is not a usable token.
    """
    if status in _REFUSED:
        msg = f"Metquay refused the key pair (status {status})."
        raise CredentialsRejected(msg)
    if status == _TOO_MANY or status in _OUT_OF_ORDER:
        asked = "" if pause is None else f" and asks to be left alone for {pause:.0f} s"
        if pause is not None and pause > LONGEST_PAUSE:
            asked = f" and asks to be left alone for more than {LONGEST_PAUSE:.0f} s"
        msg = f"Metquay's login answered with status {status}{asked}."
        raise LoginBusy(msg, pause or 0.0)
    if status in _REDIRECTED:
        raise LoginFailed(_redirected(status, location))
    if not 200 <= status <= 299:  # noqa: PLR2004 - RFC 9110 section 15.3, the successful class
        msg = f"Metquay's login answered with status {status}."
        raise LoginFailed(msg)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        msg = "Metquay's login answered with something other than JSON: a page of another server?"
        raise LoginFailed(msg) from None
    if not isinstance(answer, dict):
        msg = "Metquay's login answered with JSON that is no object."
        raise LoginFailed(msg)
    token_type = answer.get("tokenType")
    if token_type is not None and not (isinstance(token_type, str) and token_type.lower() == "bearer"):
        msg = "Metquay's login granted a token of a type other than bearer."
        raise LoginFailed(msg)
    token = answer.get("accessToken")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        msg = "Metquay's login answered without an access token that can be sent in a header."
        raise LoginFailed(msg)
    return AccessToken(token, now, _lifetime(answer.get("expiresIn")))


def _redirected(status: int, location: str) -> str:
    """Say where a redirect points, for people: neither its query nor a password in it, and nothing unprintable."""
    try:
        url = urlsplit(location)
    except ValueError:
        url = urlsplit("")
    path = url.path.partition(";")[0]
    place = re.sub(r"[^!-~]", "?", f"{url.scheme}://{url.netloc.rpartition('@')[2]}{path}")[:_LONGEST_PLACE]
    base = place.rstrip("/").removesuffix("/authenticate")
    if not is_loopback(url.hostname or ""):
        base = re.sub("^http:", "https:", base)
    if not url.netloc:
        return f"Metquay's login was redirected (status {status}) without saying where to. Check METQUAY_HOST."
    cure = (
        "That is a page for people: METQUAY_HOST should probably be another address, or the network (of a hotel or a "
        "company) wants you to log in by a browser first."
        if not place.rstrip("/").endswith("/authenticate")
        else f"METQUAY_HOST should probably be {base}."
    )
    return f"Metquay's login was redirected (status {status}) to {place}. {cure}"


def _lifetime(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DEFAULT_LIFETIME
    return float(value) if SHORTEST_LIFETIME <= value <= LONGEST_LIFETIME else DEFAULT_LIFETIME


def suspend_aware_clock() -> Callable[[], float]:
    """Make a clock in seconds that never goes back and counts the time in which the machine is suspended.

    Linux has CLOCK_BOOTTIME for that; macOS counts sleep in CLOCK_MONOTONIC, though not in ``time.monotonic``; Windows
    counts it in ``time.monotonic``.
    """
    if sys.platform == "win32":
        return time.monotonic
    return functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class TokenSource(Protocol):
    """Anything that can return a token."""

    async def token(self) -> AccessToken:
        """Log in once, with the secret files read anew; raises ``LoginFailed``. Cancellation ends it at once."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What the observer is told of each login; it holds neither the token nor a key.

    ``obtained`` is the first token at all, ``recovered`` the first one after failures, ``renewed`` any other.
    """

    kind: _Kind
    text: str
    """Why it failed, else empty; for a log."""
    lifetime: float | None
    """Seconds, of a new token."""
    wait: float
    """Seconds to the next login, as planned now."""


@dataclass(frozen=True, slots=True)
class TokenState:
    """A snapshot for readiness, metrics and the status page; durations in seconds."""

    ready: bool
    """A token is usable now."""
    ever: bool
    """A token was had at least once."""
    seconds_left: float
    lifetime: float
    """Of the token that is usable now, else 0."""
    logging_in: bool
    next_login_in: float
    renewals: int
    """Logins that brought a token, since the start."""
    failures: int
    """Logins that did not, since the start,"""
    failures_in_a_row: int
    """and since the last that did."""
    rejected: bool
    """The last login refused the keys."""
    last_error: str | None
    """Why the last login failed, for people; None once one succeeded."""
    last_renewal_age: float | None


class TokenCache:
    """Keeps one usable token ready, by one background task that alone logs in.

    ``clock`` must count through suspend (``suspend_aware_clock``); ``sleep`` need not. ``random`` yields 0 <= x < 1.
    ``observer`` is called from the event loop; what it raises goes to the loop's exception handler and harms nothing.
    For one event loop, not for threads.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random.random,
        observer: Callable[[TokenEvent], None] | None = None,
    ) -> None:
        """Make an empty cache; ``start`` fills it."""
        self._source = source
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._observer = observer
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._waiting = 0
        self._token: AccessToken | None = None
        self._busy = False
        self._due = math.inf
        self._looked = self._started = self._ended = self._renew_at = -math.inf
        self._jitter = 1.0
        self._renewed: float | None = None
        self._renewals = self._failures = self._failing = 0
        self._pause = 0.0
        self._rejected = self._distrusted = False
        self._error: str | None = None

    def start(self) -> None:
        """Begin to obtain and renew; needs the running loop. Does nothing when begun, or closed."""
        if not self._closed and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name="token renewal")
            # A done task's exception shows up nowhere by itself; raised in a callback it reaches the loop's handler.
            self._task.add_done_callback(lambda task: None if task.cancelled() else task.result())

    async def close(self) -> None:
        """End the task and a login under way; who waits gets 503 ``shutting-down``."""
        self._closed = True
        self._tell_waiting()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def current(self) -> AccessToken | None:
        """Return a token that is usable now, or None; the hot path. Starts an overdue renewal and waits for nothing."""
        now = self._clock()
        if now >= self._due:
            self._poke()
        token = self._token
        return token if token is not None and token.usable(now) else None

    async def get(self, max_wait: float, rejected: AccessToken | None = None) -> AccessToken:
        """Return a token that is usable now, and another than ``rejected``, after at most ``max_wait`` seconds.

        Waits while a login is under way, at most 5 s more once one has failed, not at all when the keys were refused or
        the upstream is not trusted, or where Metquay asked to be left alone for longer. Raises ``ProxyError``:
        ``token-unavailable``, ``credentials-rejected``, ``upstream-tls`` or ``shutting-down``.
        """
        token = self.current()
        if token is None or token == rejected:
            self._waiting += 1
            self._poke()
            try:
                token = await self._wait(max_wait, rejected)
            finally:
                self._waiting -= 1
        if token is None:
            raise self._refusal()
        return token

    def reject(self, token: AccessToken) -> None:
        """Renew ``token``, which the API answered with 401, unless that was done; nobody waits here.

        Until there is a newer one it serves on: that one resource does not take it says little about the others.
        """
        if self._token == token:
            self._renew_at = -math.inf
            self._poke()

    def hasten(self) -> None:
        """End the pause after a failed login, because what it was made with has changed; at most one login a second."""
        if self._failing:
            self._ended = -math.inf
            self._poke()

    @property
    def state(self) -> TokenState:
        """The snapshot of now."""
        now = self._clock()
        token = self._token if self._token is not None and self._token.usable(now) else None
        return TokenState(
            ready=token is not None,
            ever=self._renewals > 0,
            seconds_left=token.expires_at - now if token else 0.0,
            lifetime=token.lifetime if token else 0.0,
            logging_in=self._busy,
            next_login_in=0.0 if self._busy else max(0.0, self._next_login() - now),
            renewals=self._renewals,
            failures=self._failures,
            failures_in_a_row=self._failing,
            rejected=self._rejected,
            last_error=self._error,
            last_renewal_age=None if self._renewed is None else max(0.0, now - self._renewed),
        )

    async def _wait(self, max_wait: float, rejected: AccessToken | None) -> AccessToken | None:
        until = self._clock() + max_wait
        while not (self._closed or self._rejected or self._distrusted):
            now = self._clock()
            if self._failing and not self._busy:
                until = min(until, now + FAILED_PATIENCE)
                if self._ended + self._pause > until:
                    return None
            try:
                await self._within(self._news.wait(), until - now)
            except TimeoutError:
                return None
            token = self.current()
            if token is not None and token != rejected:
                return token
        return None

    def _refusal(self) -> ProxyError:
        if self._closed:
            return ProxyError("shutting-down", "The proxy is shutting down. Send the request again once it runs again.")
        # Rounded first, lest a float's last bit become a whole second.
        wait = math.ceil(max(1.0, round(self._next_login() - self._clock(), 3)))
        if self._rejected:
            message = (
                f"{self._error} Check METQUAY_ACCESS_KEY and METQUAY_SECRET_KEY, and that METQUAY_HOST is the tenant "
                f"that they belong to. Secret files are read again in {wait} s; other changes need a restart."
            )
            return ProxyError("credentials-rejected", message, retry_after=wait)
        if self._distrusted:
            return ProxyError("upstream-tls", self._error or "", retry_after=wait)
        reason = self._error or "Metquay's login has not answered yet."
        message = f"No access token can be had: {reason} The proxy goes on trying; send the request again in {wait} s."
        return ProxyError("token-unavailable", message, retry_after=wait)

    def _poke(self) -> None:
        self._due = math.inf
        self.start()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                await self._turn()
            except Exception as error:  # noqa: BLE001 - whatever a source raises is a failed login, never the task's end
                self._failed(error)

    async def _turn(self) -> None:
        now = self._look()
        self._due = self._next_login()
        if self._due > now:
            try:
                await self._within(self._wake.wait(), min(self._due - now, TICK))
            except TimeoutError:
                return
            self._wake.clear()
            return
        self._started = now
        self._busy = True
        try:
            token = await self._within(self._source.token(), LOGIN_TIMEOUT)
        except TimeoutError:
            msg = "Metquay's login did not come to an end in time."
            raise LoginFailed(msg) from None
        finally:
            self._busy = False
        if not token.usable(self._look()):
            msg = "Metquay's login took longer than the token lives, or the machine slept meanwhile."
            raise LoginFailed(msg)
        self._succeeded(token)

    def _look(self) -> float:
        """Read the clock. Where it went back, nothing is later than now, and the token's age is doubtful: renew it."""
        now = self._clock()
        if now < self._looked:
            self._started, self._ended, self._renew_at = min(self._started, now), min(self._ended, now), now
        self._looked = now
        return now

    def _next_login(self) -> float:
        earliest = self._started + LOGIN_INTERVAL
        if self._rejected:
            return max(earliest, self._ended + REJECTED_INTERVAL)
        if self._failing:
            ceiling = WANTED_CEILING if self._waiting else BACKOFF_CEILING
            backoff = min(ceiling, 2.0 ** min(self._failing, 5)) / 2 * self._jitter
            return max(earliest, self._ended + max(backoff, self._pause))
        return earliest if self._token is None else max(earliest, self._renew_at)

    def _succeeded(self, token: AccessToken) -> None:
        margin = max(RENEWAL_SHARE * token.lifetime, min(RENEWAL_MARGIN, token.lifetime / 2))
        self._renew_at = token.expires_at - margin * (1 + RENEWAL_JITTER * self._random())
        self._token = token
        self._renewed = token.obtained_at
        self._renewals += 1
        kind: _Kind = "obtained" if self._renewals == 1 else "recovered" if self._failing else "renewed"
        self._failing, self._rejected, self._distrusted, self._error = 0, False, False, None
        self._report(kind, "", token.lifetime)

    def _failed(self, error: Exception) -> None:
        self._ended = self._look()
        self._jitter = 1 + self._random()
        self._failures += 1
        self._failing += 1
        self._rejected = isinstance(error, CredentialsRejected)
        self._distrusted = isinstance(error, UpstreamDistrusted)
        self._pause = error.pause if isinstance(error, LoginBusy) else 0.0
        text = str(error)
        self._error = text
        if not isinstance(error, LoginFailed):
            # Its text may quote anything, a key included: only the log learns its name, nobody its text.
            text = f"unexpected {type(error).__name__}"
            self._error = "The login failed inside the proxy; its log says how."
        self._report("rejected" if self._rejected else "failed", text, None)

    def _report(self, kind: _Kind, text: str, lifetime: float | None) -> None:
        if self._observer is not None:
            event = TokenEvent(kind, text, lifetime, max(0.0, self._next_login() - self._looked))
            # Through the loop, so that an observer that raises is heard of there and can't end the renewals.
            asyncio.get_running_loop().call_soon(self._observer, event)
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _within(self, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
        """Await ``work``; TimeoutError, and its cancellation, after ``seconds`` of the injected sleep.

        Work that was cancelled from elsewhere counts as out of time: it must not look like our own cancellation.
        """
        task = asyncio.ensure_future(work)
        timer = asyncio.ensure_future(self._sleep(seconds))
        try:
            await asyncio.wait((task, timer), return_when=asyncio.FIRST_COMPLETED)
            if not task.done() or task.cancelled():
                raise TimeoutError
            return task.result()
        finally:
            task.cancel()
            timer.cancel()
            await asyncio.gather(task, timer, return_exceptions=True)
