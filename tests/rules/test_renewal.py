from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from metquay_proxy.rules.credentials import AccessToken, CredentialsRejected, LoginBusy, LoginFailed, UpstreamDistrusted
from metquay_proxy.rules.renewal import LATELY, MOST, Refusals, Renewal, TokenEvent

OUTAGE = LoginFailed("Metquay's login answered with status 404.")
REFUSAL = CredentialsRejected("Metquay refused the key pair (status {401}).")
FORGERY = UpstreamDistrusted("The certificate was not accepted.")
BUSY = LoginBusy("Metquay's login answered with status 429.", 60.0)
DEFECT = KeyError("hunter2")
ALMOST = 0.9999999
BROKEN = TokenEvent("failed", "The login failed because of a bug in the proxy (KeyError). Please report it.", None, 1.0)
DEAD = replace(BROKEN, text="Metquay's login took longer than the token lives, or the machine slept meanwhile.")
TOLD = [TokenEvent("obtained", "", 2.0, 1.0), TokenEvent("rejected", str(REFUSAL), None, 60.0)]


def login(
    renewal: Renewal, now: float, outcome: float | Exception, took: float = 0.0, chance: float = 0.0
) -> TokenEvent:
    """Log in at ``now``, which takes ``took`` seconds; ``outcome`` is the token's lifetime, or what was raised."""
    renewal.begin(now)
    if isinstance(outcome, Exception):
        return renewal.failed(now + took, outcome, chance)
    return renewal.obtained(now + took, AccessToken(f"T{now:g}", now, outcome), chance)


def after(*outcomes: float | Exception | None, waiting: int = 0) -> Renewal:
    """Make a renewal whose last login, of so many, was at 0, while so many requests wait; None is still under way."""
    renewal = Renewal()
    renewal.waiting = waiting
    for number, outcome in enumerate(outcomes, 1 - len(outcomes)):
        if outcome is None:
            renewal.begin(0.0)
        else:
            login(renewal, 1000.0 * number, outcome)
    return renewal


@pytest.mark.parametrize(
    ("lifetime", "took", "chance", "wait"),
    [
        pytest.param(900, 0, 0, 720, id="with a fifth of the lifetime left"),
        pytest.param(300, 0, 0, 180, id="but at least 120 s"),
        pytest.param(240, 0, 0, 120, id="up to a half"),
        pytest.param(60, 0, 0, 30, id="a short one: with half of it"),
        pytest.param(3, 0, 0, 1.5, id="a very short one"),
        pytest.param(900, 0, 0.5, 711, id="jitter is a tenth of the margin"),
        pytest.param(900, 0, ALMOST, 702, id="and brings it forward only"),
        pytest.param(900, 30, 0, 690, id="the age counts from the question"),
        pytest.param(1, 0, 0, 1, id="never more than one login a second"),
        pytest.param(1, 0.9, 0, 0.1, id="from start to start"),
    ],
)
def test_the_moment_of_renewal(lifetime: float, took: float, chance: float, wait: float) -> None:
    """As the contract has it, whoever waits."""
    for waiting in (0, 1):
        renewal = after(waiting=waiting)
        assert 0 == renewal.next_login_in(-100.0)
        event = login(renewal, 0.0, lifetime, took, chance)
        assert pytest.approx(wait, abs=1e-5) == event.wait == renewal.next_login_in(took)


@pytest.mark.parametrize(
    ("errors", "waiting", "chance", "waits"),
    [
        pytest.param([OUTAGE] * 7, 0, 0, [1, 2, 4, 8, 15, 15, 15], id="doubles up to a ceiling"),
        pytest.param([OUTAGE] * 6, 0, ALMOST, [2, 4, 8, 16, 30, 30], id="jitter does not pass 30 s"),
        pytest.param([OUTAGE] * 2000, 0, 0, [1, 2, 4, 8, *[15] * 1996], id="an outage of days overflows nothing"),
        pytest.param([OUTAGE] * 6, 1, 0, [1, 2, 2, 2, 2, 2], id="sooner while somebody waits"),
        pytest.param([OUTAGE] * 4, 9, ALMOST, [2, 4, 4, 4], id="within the patience of who waits"),
        pytest.param([DEFECT] * 3, 0, 0, [1, 2, 4], id="whatever was raised is a failure"),
        pytest.param([FORGERY] * 3, 0, 0, [1, 2, 4], id="a certificate may be mended at any time"),
        pytest.param([BUSY] * 2, 0, ALMOST, [60, 60], id="Metquay asks for a pause"),
        pytest.param([BUSY] * 2, 1, 0, [60, 60], id="whoever waits"),
        pytest.param([LoginBusy(""), LoginBusy("", 1), OUTAGE], 0, 0, [1, 2, 4], id="a pause is no shorter than that"),
        pytest.param([REFUSAL] * 8, 0, ALMOST, [60] * 8, id="refused keys: each minute"),
        pytest.param([REFUSAL] * 8, 5, 0, [60] * 8, id="neither more often under load"),
        pytest.param([OUTAGE, REFUSAL, OUTAGE, BUSY], 0, 0, [1, 60, 4, 60], id="the last failure decides"),
        pytest.param([OUTAGE, OUTAGE, 900.0, OUTAGE], 0, 0, [1, 2, 720, 1], id="a success begins anew"),
    ],
)
def test_the_pause_after_a_failure(
    errors: list[float | Exception], waiting: int, chance: float, waits: list[float]
) -> None:
    """Each login comes when the one before had planned it, and that plan is what the observer is told."""
    renewal = after(waiting=waiting)
    now, planned = 0.0, []
    for error in errors:
        event = login(renewal, now, error, 0.0, chance)
        planned.append(event.wait)
        assert event.wait == renewal.next_login_in(now)
        now += event.wait
    assert pytest.approx(waits, abs=1e-4) == planned


@pytest.mark.parametrize(
    ("outcome", "act", "now", "wait"),
    [
        pytest.param(900.0, "reject", 10, 0, id="a 401 has the token renewed"),
        pytest.param(900.0, "reject", 0.3, 0.7, id="a second after the last login"),
        pytest.param(900.0, "reject older", 10, 710, id="but not for a late 401"),
        pytest.param(OUTAGE, "reject", 0, 1, id="nor before the backoff ends"),
        pytest.param(REFUSAL, "reject", 10, 50, id="nor where the keys are refused"),
        pytest.param(REFUSAL, "hasten", 10, 0, id="changed keys end the pause"),
        pytest.param(BUSY, "hasten", 0.3, 0.7, id="a second after the last login too"),
        pytest.param(900.0, "hasten", 10, 710, id="where there is no pause they end none"),
        pytest.param(900.0, "set back", -500, 1, id="a token that may live longer than it seems"),
        pytest.param(REFUSAL, "set back", -500, 1, id="a pause that may"),
    ],
)
def test_what_brings_the_next_login_forward(outcome: float | Exception, act: str, now: float, wait: float) -> None:
    """After a login at 0 that followed a good one, something happens at ``now``."""
    renewal = after(900.0, outcome)
    first = renewal.token
    assert first is not None
    if act == "reject":
        renewal.reject(AccessToken("T0", 0.0, 900.0) if outcome == 900.0 else first)
    elif act == "reject older":
        renewal.reject(AccessToken("T-1000", -1000.0, 900.0))
    elif act == "hasten":
        renewal.hasten()
    assert pytest.approx(wait) == renewal.next_login_in(now)


@pytest.mark.parametrize(
    ("outcomes", "now", "until", "patience"),
    [
        pytest.param([], 0, 20, 20, id="before the first login: as long as it may"),
        pytest.param([None], 0, 20, 20, id="and during it"),
        pytest.param([OUTAGE], 0, 20, 5, id="5 s more once one has failed"),
        pytest.param([OUTAGE], 0, 3, 3, id="or what is left"),
        pytest.param([OUTAGE], 100, 120, 105, id="counted from who comes later"),
        pytest.param([OUTAGE, None], 0, 20, 20, id="a login under way is waited for, whatever was before"),
        pytest.param([OUTAGE], 0, 0.9, 0, id="no waiting for what comes too late"),
        pytest.param([OUTAGE] * 9, 0, 20, 5, id="there is an attempt in those 5 s"),
        pytest.param([LoginBusy("", 4.5)], 0, 20, 5, id="a short pause"),
        pytest.param([BUSY], 0, 20, 0, id="a long pause is no use"),
        pytest.param([BUSY], 56, 76, 61, id="but its end is"),
        pytest.param([REFUSAL], 59, 79, 59, id="refused keys: at once"),
        pytest.param([REFUSAL, None], 0, 20, 0, id="during the next attempt too"),
        pytest.param([FORGERY], 0, 20, 0, id="a foreign certificate: at once"),
        pytest.param([REFUSAL, OUTAGE], 0, 20, 5, id="the last failure decides"),
        pytest.param([OUTAGE, 900.0], 950, 970, 970, id="a success ends it"),
    ],
)
def test_how_long_a_request_may_wait(
    outcomes: list[float | Exception | None], now: float, until: float, patience: float
) -> None:
    """Its own limit is ``until``, and it is the only one."""
    assert pytest.approx(patience) == after(*outcomes, waiting=1).patience(now, until)


@pytest.mark.parametrize(
    ("outcomes", "until", "patience"),
    [([OUTAGE], 20, 20), ([OUTAGE] * 9, 120, 120), ([BUSY], 20, 0), ([BUSY], 120, 120), ([REFUSAL], 120, 0)],
)
def test_how_long_a_patient_request_waits(
    outcomes: list[float | Exception | None], until: float, patience: float
) -> None:
    """Across logins that fail, as long as it may; refused keys are answered at once, and what won't come in time."""
    assert pytest.approx(patience) == after(*outcomes, waiting=1).patience(0, until, patient=True)


@pytest.mark.parametrize(
    ("outcomes", "now", "slug", "retry_after", "text"),
    [
        (
            [],
            0,
            "token-unavailable",
            1,
            "has not answered yet. The proxy keeps trying; send the request again in 1 s.",
        ),
        (
            [OUTAGE],
            0,
            "token-unavailable",
            1,
            "The proxy has no access token for Metquay. Metquay's login answered with status 404.",
        ),
        ([BUSY], 0.5, "token-unavailable", 60, "again in 60 s."),
        ([BUSY], 61, "token-unavailable", 1, "again in 1 s."),
        ([REFUSAL], 1e-6, "credentials-rejected", 60, "(status {401}). Check METQUAY_ACCESS_KEY and METQUAY_SECRET"),
        ([REFUSAL], 20 - 1e-9, "credentials-rejected", 40, "Secret files are read again in 40 s"),
        ([FORGERY], 0, "upstream-tls", 1, "The certificate was not accepted."),
        ([DEFECT], 0, "token-unavailable", 1, "a bug in the proxy (KeyError)"),
    ],
)
def test_what_a_request_without_a_token_is_told(
    outcomes: list[float | Exception], now: float, slug: str, retry_after: int, text: str
) -> None:
    """Why, what to do, and how many whole seconds are left: rounded up, but not for a float's last bit."""
    refusal = after(*outcomes).refusal(now)
    assert (slug, "no", retry_after) == (refusal.slug, refusal.sent, refusal.retry_after)
    assert text in refusal.message
    assert "hunter2" not in refusal.message


@pytest.mark.parametrize(
    ("outcomes", "events"),
    [
        ([900.0, 900.0], [TokenEvent("obtained", "", 900.0, 720.0), TokenEvent("renewed", "", 900.0, 720.0)]),
        ([OUTAGE, 300.0], [TokenEvent("failed", str(OUTAGE), None, 1.0), TokenEvent("obtained", "", 300.0, 180.0)]),
        ([2.0, REFUSAL, 900.0], [*TOLD, TokenEvent("recovered", "", 900.0, 720.0)]),
        ([DEFECT], [BROKEN]),
        ([0.0], [DEAD]),
    ],
)
def test_what_the_observer_is_told(outcomes: list[float | Exception], events: list[TokenEvent]) -> None:
    """What came of each login, and nothing that an unexpected error may quote."""
    renewal = after()
    assert events == [login(renewal, 1000.0 * number, outcome) for number, outcome in enumerate(outcomes)]


def test_the_snapshot() -> None:
    """Through a life: nothing yet, obtained, renewal under way, refused, over, recovered."""
    renewal = after()
    nothing = renewal.state(0.0)
    assert {False, None} == set(astuple(nothing))
    login(renewal, 0.0, 900.0)
    had = replace(nothing, ready=True, renewals=1)
    good = replace(had, seconds_left=800.0, lifetime=900.0, next_login_in=620.0, last_renewal_age=100.0)
    assert good == renewal.state(100.0)
    renewal.begin(720.0)
    under_way = replace(good, seconds_left=179.0, logging_in=True, next_login_in=0.0, last_renewal_age=721.0)
    assert under_way == renewal.state(721.0)
    renewal.failed(722.0, REFUSAL, 0.0)
    refused = replace(good, failures=1, failures_in_a_row=1, rejected=True, last_error=str(REFUSAL))
    assert replace(refused, seconds_left=178.0, next_login_in=60.0, last_renewal_age=722.0) == renewal.state(722.0)
    login(renewal, 782.0, OUTAGE)
    over = replace(nothing, renewals=1, failures=2, failures_in_a_row=2, last_error=str(OUTAGE))
    assert replace(over, last_renewal_age=900.0) == renewal.state(900.0)
    login(renewal, 901.0, 300.0)
    recovered = replace(had, renewals=2, failures=2, seconds_left=300.0, lifetime=300.0, last_renewal_age=0.0)
    assert replace(recovered, next_login_in=180.0) == renewal.state(901.0)


Resource = tuple[str, str]
Taken = tuple[Resource, AccessToken, float] | None

REFUSED = ("GET", "/documents/7")
OTHER = ("GET", "/customers")
FIRST, SECOND, THIRD = (AccessToken(f"T{at}", at, 900.0) for at in (0.0, 100.0, 200.0))


def refusing() -> Refusals:
    """Mark one resource: the first token and the second were refused in a row."""
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
def test_when_a_401_is_final(resource: Resource, token: AccessToken, taken: Taken, now: float, *, final: bool) -> None:
    """Only of a marked resource, and where the token is not to blame: just granted, or lately taken by another one."""
    refusals = refusing()
    if taken is not None:
        refusals.taken(*taken)
    assert final is refusals.final(resource, token, now)


def test_any_other_answer_clears_the_mark() -> None:
    """Also where another resource takes the token after it."""
    refusals = refusing()
    refusals.taken(REFUSED, SECOND, 100.0)
    refusals.taken(OTHER, SECOND, 101.0)
    assert not refusals.final(REFUSED, SECOND, 102.0)
    refusals.mark(REFUSED, SECOND)
    assert refusals.final(REFUSED, THIRD, 202.0)


def test_the_oldest_mark_goes_first() -> None:
    """Marks are bounded; one that is set again is the youngest."""
    refusals = refusing()
    others = [("GET", f"/{number}") for number in range(MOST)]
    for other in others[:-1]:
        refusals.mark(other, FIRST)
    refusals.mark(REFUSED, FIRST)
    refusals.mark(others[-1], FIRST)
    final = [refusals.final(resource, SECOND, 100.0) for resource in (REFUSED, *others)]
    assert [True, False, *[True] * (MOST - 1)] == final
