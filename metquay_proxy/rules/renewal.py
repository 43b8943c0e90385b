"""When to log in next, how long a request may wait for that, and which 401 is no reason for it.

Owns the figures of part 4 of the contract: margins, pauses, patience, marks. Pure arithmetic over ``now`` (seconds of
a clock that counts through suspend) and a ``chance`` (0 <= x < 1) that is handed in: must not log in, wait, log or
know HTTP. A driver logs in whenever ``next_login_in`` says 0, and tells what came of it.

Facts:
* Renewing is logging in again, and costs no slot of the quota. A token that was renewed lives on to its own end.
* Replicas that were started together would log in together for ever: the margin is jittered, and so is the backoff.
* A clock that was set back makes a token seem younger than it is, and a pause longer.
* RFC 9110 section 15.5.2: a 401 says that the credentials do not do for this resource. Where others take the same
  token, or where it was just granted, another one will not do either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from metquay_proxy.rules.credentials import CredentialsRejected, LoginFailed, UpstreamDistrusted
from metquay_proxy.rules.errors import ProxyError

if TYPE_CHECKING:
    from metquay_proxy.rules.credentials import AccessToken

_Kind = Literal["obtained", "renewed", "recovered", "failed", "rejected"]

RENEWAL_SHARE: Final = 0.2
"""Share of the lifetime that is left when the token is renewed,"""
RENEWAL_MARGIN: Final = 120.0
"""but at least so many seconds, or half of a lifetime that is too short for that."""
RENEWAL_JITTER: Final = 0.1
"""Share of the margin by which replicas that were started together drift apart; only ever earlier."""
LOGIN_INTERVAL: Final = 1.0
"""Seconds from the start of one login to the next, whoever asks."""
BACKOFF_CEILING: Final = 30.0
"""Seconds; the longest pause after a failed login while nobody waits,"""
WANTED_CEILING: Final = 4.0
"""and while somebody does: shorter than ``FAILED_PATIENCE``, so that a request that waits gets at least one attempt."""
FAILED_PATIENCE: Final = 5.0
"""Seconds that a request still waits once a login has failed."""
LATELY: Final = 60.0
"""Seconds after its grant, or after another resource took it, in which a token is not to blame for a 401."""
MOST: Final = 256
"""Resources that are marked at most; the oldest mark goes first."""


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


class Renewal:
    """The newest token, what came of the logins so far, and when the next one is due.

    The protocol of a login is ``begin``, then ``obtained`` or ``failed``. Whoever waits for a token counts in
    ``waiting`` meanwhile.
    """

    def __init__(self) -> None:
        self.token: AccessToken | None = None
        self.failure: LoginFailed | None = None
        """Of the last login; None once one succeeded."""
        self.waiting = 0
        """Requests that wait for a token: while there are some, failed logins are followed sooner by the next."""
        self.due = -math.inf
        """When the next login is due while nobody waits, unless the last one began less than a second before."""
        self._due_if_wanted = self._not_before = self._latest = -math.inf
        self._logging_in = False
        self._renewals = self._failures = self._failures_in_a_row = 0

    def next_login_in(self, now: float) -> float:
        """Return for how many seconds the next login must wait; 0 where it is due.

        Where the clock went back, what was planned is worth nothing: the next login comes a second later.
        """
        if now < self._latest:
            self._not_before = now + LOGIN_INTERVAL
            self.due = self._due_if_wanted = -math.inf
        self._latest = now
        return max(0.0, max(self._not_before, self._due_if_wanted if self.waiting else self.due) - now)

    def begin(self, now: float) -> None:
        """Say that a login begins."""
        self._not_before = now + LOGIN_INTERVAL
        self._logging_in = True

    def obtained(self, now: float, token: AccessToken, chance: float) -> TokenEvent:
        """Take the token that a login brought, unless it arrived dead."""
        if not token.usable(now):
            text = "Metquay's login took longer than the token lives, or the machine slept meanwhile."
            return self.failed(now, LoginFailed(text), chance)
        kind: _Kind = "obtained" if self.token is None else "renewed" if self.failure is None else "recovered"
        self.token, self.failure = token, None
        self._renewals += 1
        self._failures_in_a_row = 0
        self._logging_in = False
        margin = max(RENEWAL_SHARE * token.lifetime, min(RENEWAL_MARGIN, token.lifetime / 2))
        self.due = self._due_if_wanted = token.obtained_at + token.lifetime - margin * (1 + RENEWAL_JITTER * chance)
        return TokenEvent(kind, "", token.lifetime, self.next_login_in(now))

    def failed(self, now: float, error: Exception, chance: float) -> TokenEvent:
        """Plan the next login after one that brought no token; whatever was raised counts as that."""
        if not isinstance(error, LoginFailed):
            # Its text may quote anything, a key included.
            error = LoginFailed(
                f"The login failed because of a bug in the proxy ({type(error).__name__}). Please report it."
            )
        self.failure = error
        self._failures += 1
        self._failures_in_a_row += 1
        self._logging_in = False
        doubled = 2.0 ** min(self._failures_in_a_row, 5)
        pauses = (min(ceiling, doubled) / 2 * (1 + chance) for ceiling in (BACKOFF_CEILING, WANTED_CEILING))
        self.due, self._due_if_wanted = (now + max(error.pause, pause) for pause in pauses)
        kind: _Kind = "rejected" if isinstance(error, CredentialsRejected) else "failed"
        return TokenEvent(kind, str(error), None, self.next_login_in(now))

    def reject(self, token: AccessToken) -> None:
        """Renew a token that the API answered with 401, unless that was done; a pause after a failure is kept."""
        if self.failure is None and self.token == token:
            self.due = self._due_if_wanted = -math.inf

    def hasten(self) -> None:
        """End the pause after a failed login."""
        if self.failure is not None:
            self.due = self._due_if_wanted = -math.inf

    def patience(self, now: float, until: float, *, patient: bool = False) -> float:
        """Return until when a request may go on to wait that could do so until ``until``: ``now`` means, not at all.

        It waits while a login is under way, at most 5 s more once one has failed unless it is ``patient``, and not for
        what won't come in time.
        """
        if isinstance(self.failure, (CredentialsRejected, UpstreamDistrusted)):
            return now
        if self.failure is None or self._logging_in:
            return until
        until = until if patient else min(until, now + FAILED_PATIENCE)
        return until if now + self.next_login_in(now) <= until else now

    def refusal(self, now: float) -> ProxyError:
        """Make the answer to a request for which there is no token, with the time until the next login."""
        failure = self.failure or LoginFailed("Metquay's login has not answered yet.")
        # Rounded first, lest a float's last bit become a whole second.
        wait = max(1, math.ceil(round(self.next_login_in(now), 3)))
        return ProxyError(failure.slug, failure.told.format(why=failure, wait=wait), retry_after=wait)

    def state(self, now: float) -> TokenState:
        """Return the snapshot of ``now``."""
        token = self.token if self.token is not None and self.token.usable(now) else None
        return TokenState(
            ready=token is not None,
            seconds_left=token.obtained_at + token.lifetime - now if token else 0.0,
            lifetime=token.lifetime if token else 0.0,
            logging_in=self._logging_in,
            next_login_in=0.0 if self._logging_in else self.next_login_in(now),
            renewals=self._renewals,
            failures=self._failures,
            failures_in_a_row=self._failures_in_a_row,
            rejected=isinstance(self.failure, CredentialsRejected),
            last_error=None if self.failure is None else str(self.failure),
            last_renewal_age=None if self.token is None else max(0.0, now - self.token.obtained_at),
        )


class Refusals:
    """Marks the resources that answer 401 whatever the token, so that no new one is bought for them again and again.

    A resource is a method and a path without its query.
    """

    def __init__(self) -> None:
        """Mark nothing."""
        self.marks: dict[tuple[str, str], AccessToken] = {}
        """Each with the first token that it refused; while there is none, nobody needs to call ``taken``."""
        self._taken: tuple[AccessToken | None, tuple[str, str], float] = (None, ("", ""), -math.inf)

    def taken(self, resource: tuple[str, str], token: AccessToken, now: float) -> None:
        """Take note of an answer other than 401: the token is good, and the resource's mark is cleared."""
        self._taken = token, resource, now
        self.marks.pop(resource, None)

    def mark(self, resource: tuple[str, str], token: AccessToken) -> None:
        """Mark a resource that answered 401; ``token`` is the first that it refused, and only newer ones count."""
        self.marks.pop(resource, None)
        self.marks[resource] = token
        if len(self.marks) > MOST:
            del self.marks[next(iter(self.marks))]

    def final(self, resource: tuple[str, str], token: AccessToken, now: float) -> bool:
        """Whether a 401 is to be passed on, since a newer token would change nothing."""
        if self.marks.get(resource, token) == token:
            return False
        taken, by, at = self._taken
        return now - token.obtained_at < LATELY or (taken == token and by != resource and now - at <= LATELY)
