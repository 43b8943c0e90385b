from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.exchange.body import ReplayBudget, RequestBody, Stream
from metquay_proxy.exchange.exchange import Exchange, Response
from metquay_proxy.rules.credentials import AccessToken
from metquay_proxy.rules.gate import Admission
from metquay_proxy.rules.headers import RequestFields
from metquay_proxy.rules.target import Target

if TYPE_CHECKING:
    from metquay_proxy.rules.errors import Sent


@pytest.mark.parametrize(
    ("worst", "attempts"),
    [
        ("no", ["no"]),
        ("unknown", ["no", "unknown", "no"]),
        ("yes", ["unknown", "yes", "no", "unknown"]),
    ],
)
def test_the_worst_that_an_attempt_may_have_done_is_kept(worst: Sent, attempts: list[Sent]) -> None:
    """An attempt that was certainly not executed does not excuse one before it."""
    exchange = Exchange("PUT", path="/api/v1/customers/1")
    for sent in attempts:
        exchange.note_sent(sent)
    assert worst == exchange.sent


def test_a_resource_is_short() -> None:
    """It may be remembered for long: 1,024 characters of a path, without its query, tell it from others."""
    exchange = Exchange("GET")
    exchange.target = Target("/api/v1" + "/x" * 1000 + "?y", "/x" * 1000, "y")
    assert ("GET", "/x" * 512) == exchange.resource


def test_no_two_exchanges_share_an_id() -> None:
    """A log line and an answer of the same id belong together."""
    assert 100 == len({Exchange("GET", path="-").id for _ in range(100)})


def test_what_is_kept_of_a_finished_one_holds_no_head() -> None:
    """The last ones are kept for the status page: neither keys in a head nor bodies are among that."""
    exchange = Exchange("PUT", path="/api/v1/customers/1")
    exchange.fields = RequestFields(b"\r\nX-Proxy-Key: key-of-the-shop")
    exchange.body = RequestBody(Stream.of(), chunked=False, limit=0, budget=ReplayBudget(0), timeout=1.0)
    exchange.target = Target("/api/v1/customers/1", "/customers/1", None)
    exchange.outgoing = b"GET / HTTP/1.1\r\nHost: lab.metquay.co\r\nX-Lab-Password: s3cr3t\r\n"
    exchange.rejected = AccessToken("s3cr3t", 0.0, 900.0)
    given_up: list[Response] = []
    exchange.response, exchange.fallback = Response(give_up=given_up.append), Response(give_up=given_up.append)
    answers = [exchange.response, exchange.fallback]
    exchange.let_go()
    assert answers == given_up
    assert not hasattr(exchange, "fields")
    assert "/api/v1/customers/1" == exchange.path
    left = [getattr(exchange, each.name) for each in fields(exchange) if hasattr(exchange, each.name)]
    left.remove(b"")
    assert {str, int, float, bool, tuple, type(None), Admission, Target} >= {type(value) for value in left}
    assert Exchange("GET").target is exchange.target
