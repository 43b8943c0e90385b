from __future__ import annotations

import pytest

from metquay_proxy.exchange.tokens import AccessToken
from metquay_proxy.rules.refusals import LATELY, MOST, Refusals

REFUSED = ("GET", "/documents/7")
OTHER = ("GET", "/customers")
FIRST, SECOND, THIRD = (AccessToken(f"T{at}", at, 900.0) for at in (0.0, 100.0, 200.0))


@pytest.fixture
def refusals() -> Refusals:
    """Marks of which one is set: the first token and the second were refused in a row."""
    refusals = Refusals()
    refusals.mark(REFUSED, FIRST)
    return refusals


@pytest.mark.parametrize(
    ("resource", "token", "taken", "now", "final"),
    [
        pytest.param(REFUSED, SECOND, None, 100.0, True, id="just granted"),
        pytest.param(REFUSED, SECOND, None, 100.0 + LATELY - 0.1, True, id="still young"),
        pytest.param(REFUSED, SECOND, None, 100.0 + LATELY, False, id="no longer"),
        pytest.param(REFUSED, SECOND, (OTHER, SECOND, 300.0), 300.0 + LATELY, True, id="taken elsewhere"),
        pytest.param(REFUSED, SECOND, (OTHER, SECOND, 300.0), 300.1 + LATELY, False, id="too long ago"),
        pytest.param(REFUSED, THIRD, (OTHER, SECOND, 300.0), 300.0, False, id="another token was taken"),
        pytest.param(REFUSED, SECOND, (REFUSED, SECOND, 300.0), 300.0, False, id="it took the token itself"),
        pytest.param(REFUSED, FIRST, (OTHER, FIRST, 110.0), 110.0, False, id="the token that it refused first"),
        pytest.param(("HEAD", "/documents/7"), SECOND, None, 100.0, False, id="another method"),
        pytest.param(("GET", "/documents/8"), SECOND, None, 100.0, False, id="another path"),
    ],
)
def test_when_a_401_is_final(  # noqa: PLR0913 - the columns of the table
    refusals: Refusals,
    resource: tuple[str, str],
    token: AccessToken,
    taken: tuple[tuple[str, str], AccessToken, float] | None,
    now: float,
    final: bool,  # noqa: FBT001 - a column
) -> None:
    """Only of a marked resource, and where the token is not to blame: just granted, or lately taken by another one."""
    if taken is not None:
        refusals.taken(*taken)
    assert final is refusals.final(resource, token, now)


def test_any_other_answer_clears_the_mark(refusals: Refusals) -> None:
    """Also where another resource takes the token after it."""
    refusals.taken(REFUSED, SECOND, 100.0)
    refusals.taken(OTHER, SECOND, 101.0)
    assert not refusals.final(REFUSED, SECOND, 102.0)
    refusals.mark(REFUSED, SECOND)
    assert refusals.final(REFUSED, THIRD, 202.0)


def test_the_oldest_mark_goes_first(refusals: Refusals) -> None:
    """Marks are bounded; one that is set again is the youngest."""
    others = [("GET", f"/{number}") for number in range(MOST)]
    for other in others[:-1]:
        refusals.mark(other, FIRST)
    refusals.mark(REFUSED, FIRST)
    refusals.mark(others[-1], FIRST)
    final = [refusals.final(resource, SECOND, 100.0) for resource in (REFUSED, *others)]
    assert [True, False, *[True] * (MOST - 1)] == final
