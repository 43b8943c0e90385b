from __future__ import annotations

import pytest

from metquay_proxy.rules.errors import UpstreamFailure
from metquay_proxy.rules.retries import after_failure, after_status, may_have_deleted

READS = ("GET", "HEAD", "OPTIONS")
IDEMPOTENT = (*READS, "PUT", "DELETE")
METHODS = (*IDEMPOTENT, "POST", "PATCH")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("failure", "repeated", "wait"),
    [
        pytest.param(UpstreamFailure("upstream-unreachable", "-", repeatable=True), METHODS, 0.25, id="unreachable"),
        pytest.param(UpstreamFailure("upstream-tls", "-", repeatable=True), METHODS, 0.25, id="tls broke off"),
        pytest.param(UpstreamFailure("upstream-tls", "-"), (), None, id="certificate"),
        pytest.param(UpstreamFailure("upstream-closed", "-", repeatable=True), IDEMPOTENT, 0.25, id="never written"),
        pytest.param(
            UpstreamFailure("upstream-closed", "-", sent="unknown", repeatable=True), IDEMPOTENT, 0.25, id="reset"
        ),
        pytest.param(
            UpstreamFailure("upstream-closed", "-", sent="unknown", repeatable=True, stale=True),
            IDEMPOTENT,
            0.0,
            id="stale",
        ),
        pytest.param(UpstreamFailure("upstream-protocol", "-", sent="unknown"), (), None, id="no http"),
        pytest.param(UpstreamFailure("upstream-timeout", "-", sent="unknown"), (), None, id="silence"),
    ],
)
def test_after_a_failure(method: str, failure: UpstreamFailure, repeated: tuple[str, ...], wait: float | None) -> None:
    """By method and by what is known of the attempt; what broke because it had idled goes out again at once."""
    assert (wait if method in repeated else None) == after_failure(method, failure, 0, 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status", [400, 403, 404, 409, 422, 500, 501, 502, 503, 504, 505])
def test_after_an_error_answer(method: str, status: int) -> None:
    """The upstream's own 502, 503, 504 are repeated, where the method is idempotent."""
    repeated = method in IDEMPOTENT and status in {502, 503, 504}
    assert (0.25 if repeated else None) == after_status(method, status, 0, 1.0, None)


@pytest.mark.parametrize(("asked", "wait"), [(None, 1.0), (0.5, 1.0), (7.0, 7.0)])
def test_retry_after_is_honoured(asked: float | None, wait: float) -> None:
    """An upstream that says when to come back is asked again then, and not sooner than without."""
    assert wait == after_status("GET", 503, 2, 1.0, asked)


@pytest.mark.parametrize(
    ("failed", "longest"), [(0, 0.25), (1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 4.0), (9999, 4.0)]
)
def test_backoff(failed: int, longest: float) -> None:
    """Each wait is up to twice the one before, up to four seconds; jitter takes off half of it at most."""
    failure = UpstreamFailure("upstream-unreachable", "-", repeatable=True)
    assert [longest / 2, longest] == [after_failure("GET", failure, failed, jitter) for jitter in (0.0, 1.0)]


@pytest.mark.parametrize(
    ("method", "status", "sent", "maybe"),
    [
        ("DELETE", 404, "unknown", True),
        ("DELETE", 404, "no", False),
        ("DELETE", 403, "unknown", False),
        ("PUT", 404, "unknown", False),
    ],
)
def test_a_404_that_may_be_its_own_doing(method: str, status: int, sent: str, *, maybe: bool) -> None:
    """Only of a DELETE, and only where an earlier attempt may have been executed."""
    assert maybe is may_have_deleted(method, status, sent)  # type: ignore[arg-type] # a column of the table
