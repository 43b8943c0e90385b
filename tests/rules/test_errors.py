from __future__ import annotations

import ast
import errno
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metquay_proxy
from metquay_proxy.rules.errors import STATUS, ProxyError, UpstreamFailure, shortage

CONTRACT = {
    400: {"bad-target", "bad-request"},
    401: {"login-required"},
    403: {"host-not-allowed", "origin-not-allowed", "client-key-required", "read-only"},
    404: {"no-such-page", "pass-through-off"},
    405: {"method-not-allowed"},
    408: {"request-timeout"},
    409: {"outcome-unknown", "in-progress"},
    413: {"body-too-large"},
    422: {"idempotency-key-reused"},
    429: {"quota-exceeded"},
    431: {"head-too-large"},
    500: {"internal-error"},
    501: {"not-supported"},
    502: {"upstream-unreachable", "upstream-tls", "upstream-protocol", "upstream-closed"},
    503: {"token-unavailable", "credentials-rejected", "retry-with-new-token", "shutting-down", "idempotency-full"},
    504: {"upstream-timeout"},
}
SOURCES = sorted(Path(metquay_proxy.__file__).parent.rglob("*.py"))


def test_the_table_is_the_contract() -> None:
    """Each slug of the contract has its status, and there is no other."""
    assert CONTRACT == {status: {slug for slug in STATUS if STATUS[slug] == status} for status in STATUS.values()}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_only_known_slugs_are_raised(source: Path) -> None:
    """A misspelt slug in a branch that rarely runs is found here, not by a user."""
    calls = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    slugs = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in {"ProxyError", "UpstreamFailure"}
        and isinstance(call.args[0], ast.Constant)
    }
    assert set() == slugs - set(STATUS)


def test_an_error_knows_its_answer() -> None:
    """Slug, status, text and further fields are at hand; unless told otherwise nothing was sent."""
    error = ProxyError("method-not-allowed", "Use GET.", headers=(("Allow", "GET"),))
    assert ("method-not-allowed", 405, "Use GET.", "Use GET.") == (error.slug, error.status, error.message, str(error))
    assert ("no", None, (("Allow", "GET"),)) == (error.sent, error.retry_after, error.headers)


@pytest.mark.parametrize("slug", STATUS)
def test_retry_after_is_there_whenever_waiting_helps(slug: str) -> None:
    """429 and 503 always say when to come back, and nothing else does by itself."""
    assert (1 if STATUS[slug] in {429, 503} else None) == ProxyError(slug, "text").retry_after


@pytest.mark.parametrize(
    ("seconds", "whole"), [(-5.0, 1), (0, 1), (0.2, 1), (1, 1), (1.01, 2), (29.5, 30), (3600.0, 3600)]
)
def test_retry_after_is_in_whole_seconds(seconds: float, whole: int) -> None:
    """Rounded up, so that nobody comes back too early, and at least 1."""
    for slug in ("quota-exceeded", "upstream-unreachable"):
        assert whole == ProxyError(slug, "text", retry_after=seconds).retry_after


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=[])))
def test_the_body_is_metquays_own_shape(message: str) -> None:
    """Any text, half surrogate pairs included, becomes ASCII JSON with the two members that Metquay's errors have."""
    body = ProxyError("not-supported", message).body()
    assert body.isascii()
    assert {"code": 501, "message": message} == json.loads(body)


@pytest.mark.parametrize(
    ("number", "who"),
    [(errno.EMFILE, "this program")]
    + [(number, "this computer") for number in (errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)],
)
def test_what_the_system_ran_out_of(number: int, who: str) -> None:
    """It is told by the error's number; where the program's own limit is reached, how to raise it."""
    why, cure = shortage(OSError(number, "any text")) or ("", "")
    assert why.startswith(who)
    assert ("ulimit -n" in cure) is (number == errno.EMFILE)


@pytest.mark.parametrize("error", [OSError(), OSError(errno.ECONNREFUSED, "Too many open files")])
def test_what_is_no_shortage(error: OSError) -> None:
    """Whatever the text says."""
    assert shortage(error) is None


def test_a_failure_of_the_upstream_says_what_may_follow() -> None:
    """Unless it says otherwise nothing was executed, and nothing may be sent again."""
    failure = UpstreamFailure("upstream-tls", "-")
    assert ("no", False, False) == (failure.sent, failure.repeatable, failure.stale)
    failure = UpstreamFailure("upstream-closed", "-", sent="unknown", repeatable=True, stale=True)
    assert (502, "unknown", True, True) == (failure.status, failure.sent, failure.repeatable, failure.stale)
