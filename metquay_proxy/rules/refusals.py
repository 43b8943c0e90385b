"""Which resources answer 401 whatever the token, so that no new one is bought for them again and again.

Owns the marks of part 4 of the contract. Pure: takes ``now`` and values, and must neither send nor log in.

Facts: RFC 9110 section 15.5.2: a 401 says that the credentials do not do for this resource. Where others take the same
token, or where it was just granted, another one will not do either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from metquay_proxy.exchange.tokens import AccessToken

LATELY: Final = 60.0
"""Seconds after its grant, or after another resource took it, in which a token is not to blame for a 401."""
MOST: Final = 256
"""Resources that are marked at most; the oldest mark goes first."""


class Refusals:
    """The marks. A resource is a method and a path without its query; ``now`` is in seconds of the tokens' clock."""

    def __init__(self) -> None:
        """Mark nothing."""
        self.marks: dict[tuple[str, str], AccessToken] = {}
        """Each with the first token that it refused; while there is none, nobody needs to call ``taken``."""
        self._taken: tuple[AccessToken, tuple[str, str], float] | None = None

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
        if now - token.obtained_at < LATELY:
            return True
        taken, by, at = self._taken or (None, resource, now)
        return taken == token and by != resource and now - at <= LATELY
