"""What the proxy answers by itself: logins, pages and errors, none of which is ever forwarded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.wire import OK, chunked, eventually, get, head, post, rule

if TYPE_CHECKING:
    from tests.wire import Bench


@rule("contract 7")
@pytest.mark.parametrize(
    ("target", "status"),
    [("/-/live", 200), ("/-/ready", 200), ("/-/status", 200), ("/-/none", 404), ("/-/quit", 404)],
)
async def test_answered_here(bench: Bench, target: str, status: int) -> None:
    """The proxy's own pages are never forwarded; what comes behind the request of one is never served."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(get(target) + get("/behind"))
    answer = await client.answer()
    assert (status, b"no-store") == (answer.status, answer.value(b"Cache-Control"))
    if status == 200:
        assert b"close" == answer.value(b"Connection")
        await client.gone()
        assert [] == bench.upstream.peers


@rule("contract 7")
async def test_nothing_of_the_request_is_passed_on(bench: Bench) -> None:
    """Aiohttp sees neither the request's fields nor its body, whatever they are; of itself it tells nothing."""
    request = post(b"GET /x HTTP/1.1\r\n\r\n", "Upgrade: h2c", "Expect: 100-continue", target="/-/test")
    answer = await bench.ask(request, OK)
    assert (200, b"metquay-proxy") == (answer.status, answer.value(b"Server"))
    answer = await bench.ask(post(bytes(100_000), target="/-/test"))
    assert (413, "body-too-large") == (answer.status, answer.slug)


@rule("contract 7")
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_client_that_leaves_a_page(bench: Bench, version: str) -> None:
    """It ends its live events, and is no failure."""
    client = await bench.client()
    await client.send(head(f"GET /-/events HTTP/{version}"))
    await client.until(b"data: ")
    client.reset()
    await eventually(lambda: 0 == bench.proxy.telemetry.active)
    await bench.healthy()


@rule("contract 3")
@pytest.mark.parametrize("target", ["/authenticate", "/api/v1/authenticate"])
async def test_login(bench: Bench, target: str) -> None:
    """A login is answered here with a placeholder, and its body is read."""
    client = await bench.client()
    body = b'{"accessKey": "a", "secretKey": "b"}'
    for data in (post(body, target=target), chunked(body).replace(b"/x", target.encode())):
        await client.send(data)
        answer = await client.answer()
        assert (200, b"application/json") == (answer.status, answer.value(b"Content-Type"))
        assert b"accessToken" in answer.body
    assert [] == bench.upstream.peers


@rule("contract 8")
async def test_login_bounded(bench: Bench) -> None:
    """A login's body is bounded."""
    client = await bench.client()
    await client.send(head("POST /authenticate HTTP/1.1", "Content-Length: 10000000") + bytes(200_000))
    answer = await client.answer()
    assert (413, b"close") == (answer.status, answer.value(b"Connection"))
