from __future__ import annotations

import asyncio
import json
import re
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from metquay_proxy.downstream.pages import Pages, headline
from metquay_proxy.exchange.exchange import Exchange
from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.sandbox.server import Faults, Sandbox
from metquay_proxy.telemetry import Standing, Telemetry
from tests import wire
from tests.running import FastTime, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

TOKEN = {
    "rejected": False,
    "failures_in_a_row": 0,
    "failures": 0,
    "renewals": 1,
    "last_error": None,
    "next_login_in": 700.0,
    "seconds_left": 880.0,
    "last_renewal_age": 20.0,
}
QUOTA = {"limit": 100, "window": 60.0, "used": 3, "waiting": 0, "closed_for": 0.0, "next_free_in": 0.0}
STATUS: dict[str, Any] = {
    "version": "1",
    "upstream": "https://lab.metquay.co/api/v1",
    "key": "...4F2A",
    "ready": True,
    "draining": False,
    "sandbox": False,
    "token": TOKEN,
    "quota": QUOTA,
    "connections": {"busy": 0, "idle": 1},
    "requests": {"active": 0, "finished": 9},
}
FAILING = {**TOKEN, "failures_in_a_row": 2, "last_error": "lab.metquay.co cannot be found.", "next_login_in": 3.2}
DOUBT = "METQUAY_ACCESS_KEY seems to be a placeholder: replace it with the key."
REJECTED = {**FAILING, "rejected": True, "last_error": "Metquay refused the key pair (status 401)."}
NEVER = {"renewals": 0, "seconds_left": 0.0}
NOW = 1_700_000_000.0
TURNED, LOGIN_TURNED = NOW - 100, NOW - 50
LAB = "lab.metquay.co"
SANDBOX = {"sandbox": True, "key": None}
FASTER = "more records at once (limit=500)"


def trouble(error: str | None, status: int, ago: float = 5.0) -> Exchange:
    """Make an exchange with Metquay that went wrong so many seconds ago."""
    exchange = Exchange("GET", path="/api/v1/customers")
    exchange.error, exchange.status, exchange.ended = error, status, NOW - ago
    exchange.reason = error and "It could not be reached. Check the network."
    return exchange


def quota(**changed: float) -> dict[str, Any]:
    """Change the quota's figures."""
    return {"quota": QUOTA | changed}


LAST_FAILED = "The last request to Metquay failed."
LOGIN_FAILS = f"Not working: the login to {LAB} fails."
AT_ONCE = {"ready": False, "token": FAILING | {"next_login_in": 0.0}}
UNREACHABLE = trouble("upstream-unreachable", 502)
STATES: list[tuple[str, str, str, dict[str, Any]]] = [
    # nothing is the matter
    ("ok", f"Ready: logged in to {LAB} with key ...4F2A.", "", {}),
    ("ok", f"Ready: logged in to {LAB}.", "", {"key": None}),
    ("ok", "Ready: logged in to the built-in sandbox (made-up data).", "", SANDBOX),
    ("ok", "Ready: logged in to", "", {"read_only": True}),
    ("ok", "Ready: logged in to", "", {"quota": None}),
    ("ok", "Ready: logged in to", "", quota(used=69)),
    ("ok", "Ready: logged in to", "", {"redis": {"shared": False, "alone_for": 3.0, "share": 50}}),
    # no token
    ("wait", f"Starting: logging in to {LAB}.", "a few seconds", {"ready": False, "token": TOKEN | NEVER}),
    ("wait", f"Logging in again to {LAB}.", "wait for it", {"ready": False}),
    ("bad", LOGIN_FAILS, "lab.metquay.co cannot be found. Next attempt in 4 s.", {"ready": False, "token": FAILING}),
    ("bad", LOGIN_FAILS, "cannot be found. The next attempt is under way.", AT_ONCE | {"last": UNREACHABLE}),
    (
        *("bad", f"Not working: {LAB} refuses the key ...4F2A.", "METQUAY_SECRET_KEY"),
        {"ready": False, "token": REJECTED},
    ),
    # the token of before still serves
    ("slow", f"Working for another 14 min: the login to {LAB} fails.", "attempt in 4 s.", {"token": FAILING}),
    ("slow", "Working for another 59 s: the login", "Next attempt", {"token": {**FAILING, "seconds_left": 59.9}}),
    ("slow", f"Working for another 14 min: {LAB} refuses the key", "valid key pair", {"token": REJECTED}),
    (
        *("bad", f"Not working: {LAB} refuses the key pair."),
        f"{DOUBT} Correct that. Then start the proxy again; keys in files",
        {"ready": False, "key": "***", "token": {**REJECTED, "last_error": f"{REJECTED['last_error']} {DOUBT}"}},
    ),
    # Metquay is out of order
    ("bad", LAST_FAILED, "That was 5 s ago. It could not be reached. Check the network. ", {"last": UNREACHABLE}),
    ("bad", LAST_FAILED, "Check the network", {"token": FAILING, "last": UNREACHABLE, "refused": 9}),
    ("bad", LAST_FAILED, "12 min ago. It answered with status 503. It may", {"last": trouble(None, 503, 720.0)}),
    # the quota
    (
        *("slow", "Slowed down: 7 requests wait for their turn."),
        "73 of 100 requests in 60 s are used. None was refused in the last minute. It goes faster",
        quota(used=73, waiting=7, next_free_in=24.0),
    ),
    ("slow", "Slowed down: 1 request waits for its turn.", FASTER, quota(waiting=1, next_free_in=2.0)),
    ("ok", "Ready: logged in to", "", quota(waiting=1, next_free_in=1.9)),
    (
        *("slow", "Slowed down: a request that came now would wait 2 s."),
        "73 of 100 requests in 60 s are used. The rest of the quota is spread over the remaining time.",
        quota(used=73, next_free_in=2.0),
    ),
    (
        *("slow", f"Slowed down: {LAB} accepts no requests for another 12 s."),
        "counted too many requests (429). Something else may use the same keys",
        quota(closed_for=12.0, next_free_in=12.0),
    ),
    (
        *("slow", f"Slowed down: {LAB} accepts no requests for another 12 s; 3 requests wait for their turn."),
        "Something else may use the same keys",
        quota(closed_for=12.0, waiting=3, next_free_in=14.0),
    ),
    (
        *("slow", "Too busy: 31 requests were refused in the last minute (429)."),
        "7 requests wait for their turn. 100 of 100 requests in 60 s are used. Refused requests must be",
        quota(used=100, waiting=7, next_free_in=24.0) | {"refused": 31},
    ),
    (
        *("slow", "Too busy: 1 request was refused"),
        "counted too many requests (429). Something else may use the same keys",
        quota(closed_for=12.0, next_free_in=12.0) | {"refused": 1},
    ),
    ("slow", "Too busy: 2 requests were refused in the last minute (429).", "is off", {"quota": None, "refused": 2}),
    # the end
    ("wait", "Stopping: no new requests are accepted.", "Start the proxy again", {"draining": True, "ready": False}),
]


@pytest.mark.parametrize(("level", "text", "cure", "change"), STATES)
def test_the_sentence(level: str, text: str, cure: str, change: dict[str, Any]) -> None:
    """Each state has one sentence that says how things stand, and one that says what to do; each is true in it."""
    state = STATUS | {"last": None, "refused": 0} | change
    *found, since = headline(state, Standing(state.pop("last"), TURNED, LOGIN_TURNED, None, state.pop("refused")), NOW)
    assert level == found[0]
    assert text in found[1]
    assert cure in found[2]
    assert bool(cure) == bool(found[2])
    assert "  " not in " ".join(found)
    expected = {
        "Ready": ("Working", LOGIN_TURNED),
        "The last": ("Requests have failed", TURNED),
        **dict.fromkeys(("Working", "Not working"), ("Logins have failed", LOGIN_TURNED)),
    }
    what = next((each for start, each in expected.items() if text.startswith(start)), None)
    assert since == (("Keys refused", LOGIN_TURNED) if "refuses" in text else what)


def test_since_when_all_is_well() -> None:
    """That is since the last trouble ended, be it one of logins or of requests."""
    for turned, login_turned in ((NOW - 7, NOW - 9), (NOW - 9, NOW - 7)):
        assert ("Working", NOW - 7) == headline(STATUS, Standing(None, turned, login_turned, None, 0), NOW)[3]


def admin(telemetry: Telemetry | None = None, *, allow_quit: bool = False, tick: float = 0.01) -> Pages:
    """Make one that is ready and has nothing behind it."""

    async def test() -> Mapping[str, Any]:
        return {"ok": True, "text": "fine"}

    return Pages(
        ready=lambda: True, status=lambda: STATUS, allow_quit=allow_quit, telemetry=telemetry, test=test, tick=tick
    )


@pytest.mark.parametrize(
    ("allow", "method", "path"),
    [
        *[("GET, HEAD", "POST", path) for path in ("/-/status", "/", "/-", "/favicon.ico")],
        *[("GET, HEAD", "DELETE", "/-/"), ("POST", "GET", "/-/test")],
    ],
)
def test_wrong_methods(allow: str, method: str, path: str) -> None:
    """A page that is asked by a method that it does not take says which ones it takes."""
    with pytest.raises(ProxyError) as refusal:
        admin().answer(method, path)
    assert "method-not-allowed" == refusal.value.slug
    assert (("Allow", allow),) == refusal.value.headers


@pytest.mark.parametrize(("status", "path"), [(302, "/"), (302, "/-"), (204, "/favicon.ico")])
def test_what_browsers_ask_for_by_themselves(status: int, path: str) -> None:
    """The root leads to the status page; there is no picture."""
    for method in ("GET", "HEAD"):
        answer = admin().answer(method, path)
        assert (status, b"") == (answer.status, answer.body)
        assert (status == 302) == (("Location", "/-/") in answer.headers)


@pytest.mark.parametrize(
    ("slug", "text", "paths"),
    [
        (
            "no-such-page",
            r"no such page.*/-/status",
            "/robots.txt /apple-touch-icon.png /-/nothing /-/quit /-/page.html",
        ),
        ("pass-through-off", r"Add /FlexicalERP/ to METQUAY_PASS_THROUGH", "/FlexicalERP/rest/customer"),
    ],
)
def test_what_is_no_page(slug: str, text: str, paths: str) -> None:
    """It is not forwarded, but answered with the pages that there are, or with the setting that is missing."""
    for path in paths.split():
        for method in ("GET", "POST"):
            with pytest.raises(ProxyError, match=text) as refusal:
                admin().answer(method, path)
            assert slug == refusal.value.slug


def test_quit() -> None:
    """Where it is allowed, a POST ends the proxy."""
    assert admin(allow_quit=True).answer("POST", "/-/quit").quit


def test_the_page_has_a_policy_and_no_outside() -> None:
    """One file: each load has a nonce of its own, and neither the page nor its policy names another origin."""
    first, second = admin().answer("GET", "/-/"), admin().answer("GET", "/-/")
    policy = dict(first.headers)["Content-Security-Policy"]
    nonces = set(re.findall(rb'nonce="([^"]+)"', first.body))
    assert 1 == len(nonces)
    assert nonces.isdisjoint(re.findall(rb'nonce="([^"]+)"', second.body))
    assert f"script-src 'nonce-{nonces.pop().decode()}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert b"style=" not in first.body
    assert not re.search(rb"\bon[a-z]+=\"|innerHTML|@import|url\(", first.body)
    outside = [url for url in re.findall(rb"https?://[^'\"\s)]+", first.body) if b"www.w3.org" not in url]
    assert [] == outside
    assert len(first.body.splitlines()) < 500


async def events(made: Pages) -> AsyncIterator[dict[str, Any]]:
    """Yield the messages of the live events."""
    stream = made.answer("GET", "/-/events").stream
    assert stream is not None
    async for piece in stream(None):
        assert piece.startswith(b"data: ")
        assert piece.endswith(b"\n\n")
        assert 2 == piece.count(b"\n")
        yield json.loads(piece[6:])


async def test_events() -> None:
    """First the state and the last exchanges, then what is new, with how many were missed; they end at the drain."""
    telemetry = Telemetry()
    made = admin(telemetry)
    for _ in range(150):
        telemetry.closed(Exchange("GET", path="/api/v1/works"))
    stream = events(made)
    for lost, path in ((0, "/api/v1/works"), (30, "/api/v1/customers")):
        messages = [await anext(stream) for _ in range(10)]
        assert [10] * 10 == [len(message["recent"]) for message in messages], "a slow reader holds few of them up"
        assert [lost, *[0] * 9] == [message["lost"] for message in messages]
        assert {path} == {request["path"] for message in messages for request in message["recent"]}
        states = [message["state"] for message in messages if message["state"]]
        assert {"ok"} == {state["headline"]["level"] for state in states}
        for _ in range(130):
            telemetry.closed(Exchange("GET", path="/api/v1/customers"))
    made.close()
    assert [] == [message async for message in stream]


async def test_a_reader_that_leaves_leaves_nothing_behind() -> None:
    """When the stream is given up, its task ends too."""
    before = asyncio.all_tasks()
    stream = admin().answer("GET", "/-/events").stream
    assert stream is not None
    pieces = stream(None)
    await anext(pieces)
    await pieces.aclose()  # type: ignore[attr-defined] # it is a generator
    await asyncio.sleep(0)
    assert before == asyncio.all_tasks()


async def test_a_client_whose_key_has_ended() -> None:
    """Its streams end at once, though nothing is new; those of the others go on."""
    made = admin(tick=60.0)
    stream = made.answer("GET", "/-/events").stream
    assert stream is not None
    gone, kept, nameless = (stream(name) for name in ("gone", "kept", None))
    for pieces in (gone, kept, nameless):
        await anext(pieces)
    made.turn_out({"gone"})
    assert [] == await asyncio.wait_for(_rest(gone), 5)
    waiting = [asyncio.ensure_future(_rest(pieces)) for pieces in (kept, nameless)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    made.close()
    assert [[], []] == await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert [] == await _rest(stream("late"))


async def _rest(pieces: AsyncIterator[bytes]) -> list[bytes]:
    return [piece async for piece in pieces]


@pytest.mark.parametrize("more", [wire.get(), bytes(50_000)])
@pytest.mark.parametrize("path", ["/-/live", "/-/status", "/-/"])
async def test_a_client_that_goes_on_sending(path: str, more: bytes) -> None:
    """It gets its page whole and the end of the connection, however slowly it reads."""
    async with wire.running() as bench:
        client = await bench.client(limit=1024)
        async with client.pouring(wire.get(path), more):
            await asyncio.sleep(0.1)
            answer = await client.answer()
            assert (200, b"close") == (answer.status, answer.value(b"Connection"))
            await client.ended()


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """Run a Metquay."""
    sandbox = Sandbox(rate_limit=None)
    await sandbox.start()
    yield sandbox
    await sandbox.stop()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Open a client."""
    async with aiohttp.ClientSession() as session:
        yield session


async def test_status_is_the_single_source(sandbox: Sandbox, session: aiohttp.ClientSession) -> None:
    """The JSON has all that the page shows: the sentence, token, quota, the last hour, settings, the last requests."""
    async with running(sandbox.url, read_only="true") as (_, url):
        await (await session.get(f"{url}/customers?limit=1&name=ACME", headers={"User-Agent": "Excel"})).read()
        await (await session.delete(f"{url}/customers/1")).read()
        async with session.get(f"{url}/-/status") as response:
            assert "application/json" == response.content_type
            status = await response.json()
    assert f"Ready: logged in to 127.0.0.1:{sandbox.port}" in status["headline"]["text"]
    assert (True, False, False) == (status["read_only"], status["sandbox"], status["draining"])
    assert 1 == status["quota"]["used"]
    assert [1, 1, 0] == status["hour"][-1][1:4]
    assert 1 == status["hour"][-1][6]
    read, write = status["recent"]
    assert ("Excel", 200, "metquay") == (read["client"], read["status"], read["answered_by"])
    assert "/api/v1/customers?limit=*&name=*" == read["path"]
    assert (403, "proxy", "read-only") == (write["status"], write["answered_by"], write["error"])
    assert "DELETE was refused, because METQUAY_READ_ONLY is set. Nothing was sent to Metquay." in write["reason"]
    what, since = status["headline"]["since"]
    assert "Working" == what
    assert since <= status["headline"]["last_success"] <= status["now"] <= time.time()
    assert isinstance(status["settings"], list)


async def test_refusals_are_told(sandbox: Sandbox, session: aiohttp.ClientSession) -> None:
    """Where the quota refuses requests, the sentence says how many, and no longer once a minute has passed."""
    async with running(sandbox.url, rate_limit="4/minute", max_wait="0.1") as (proxy, url):
        statuses = []
        for _ in range(6):
            async with session.get(f"{url}/customers?limit=1") as response:
                statuses.append(response.status)
        async with session.get(f"{url}/-/status") as response:
            text = (await response.json())["headline"]["text"]
        refused = statuses.count(429)
        assert refused == proxy.telemetry.standing().refused > 1
        assert f"Too busy: {refused} requests were refused in the last minute (429)." in text


async def test_metrics_over_http(sandbox: Sandbox, session: aiohttp.ClientSession) -> None:
    """Prometheus gets its text, with the time that Metquay took apart from the proxy's own."""
    async with running(sandbox.url) as (_, url):
        sandbox.faults = Faults(latency=0.05)
        await (await session.get(f"{url}/customers")).read()
        async with session.get(f"{url}/-/metrics") as response:
            assert "text/plain; version=1.0.0; charset=utf-8" == response.headers["Content-Type"]
            text = await response.text()
        async with session.head(f"{url}/-/metrics") as response:
            assert 200 == response.status
    samples = {
        sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert samples["metquay_proxy_upstream_seconds_sum"] >= 0.05
    assert samples["metquay_proxy_own_seconds_sum"] < samples["metquay_proxy_upstream_seconds_sum"]


async def test_the_connection_is_tested(sandbox: Sandbox, session: aiohttp.ClientSession) -> None:
    """The page's button makes one read through the proxy, and tells in a sentence what came of it."""
    async with running(sandbox.url) as (_, url):

        async def result() -> dict[str, Any]:
            async with session.post(f"{url}/-/test") as response:
                assert 200 == response.status
                return dict(await response.json())

        good = await result()
        assert good["ok"]
        assert re.fullmatch(r"Metquay answered in \d+ ms\.", good["text"])
        sandbox.faults = Faults(fail={403: 1.0})
        refused = await result()
        assert not refused["ok"]
        assert "status 403" in refused["text"]
        await sandbox.stop()
        down = await result()
        assert not down["ok"]
        assert "could not be reached" in down["text"]
        async with session.get(f"{url}/-/status") as response:
            status = await response.json()
        assert "could not be reached" in status["headline"]["cure"]
        assert "test of the connection" == status["recent"][-1]["client"]


async def test_waiting_is_not_metquays_time(sandbox: Sandbox) -> None:
    """What the request waited for the proxy is no part of the time in which Metquay answered."""
    async with running(sandbox.url, time_=FastTime(20)) as (proxy, _):
        await proxy.test()
        sandbox.faults = Faults(expire_tokens=True)
        told = re.fullmatch(r"Metquay answered in (\d+) ms\.", (await proxy.test())["text"])
        assert told is not None
        waited = json.loads(proxy.telemetry.since(0)[0][-1])["waited_ms"]
        assert int(told[1]) < waited


async def test_a_reading_key_may_test_and_no_web_page_may(sandbox: Sandbox, session: aiohttp.ClientSession) -> None:
    """The button works with a read-only key; a page of another origin can't press it."""
    key = {"X-Proxy-Key": "reading-key-0123456789"}
    async with running(sandbox.url, client_keys="reading:reading-key-0123456789:read-only") as (_, url):
        for status, headers in ((403, {}), (200, key), (403, {**key, "Origin": "https://evil.example"})):
            async with session.post(f"{url}/-/test", headers=headers) as response:
                assert status == response.status, headers


@pytest.mark.slow
async def test_no_secret_on_the_pages(session: aiohttp.ClientSession) -> None:
    """Page, events, metrics and status hold neither a key nor a token, nor what a query said, in good times and bad."""
    keys = ("an-access-key-of-the-laboratory", "the-secret-key-of-the-laboratory")
    client_key = "workbook-key-0123456789"
    sandbox = Sandbox(rate_limit=None, access_key=keys[0], secret_key=keys[1])
    await sandbox.start()
    settings = {
        "access_key": keys[0],
        "secret_key": keys[1],
        "client_keys": f"workbook:{client_key}",
        "max_wait": "0.2",
    }
    async with running(sandbox.url, credentials=lambda: Credentials(*keys), **settings) as (_, url):
        session.headers["X-Proxy-Key"] = client_key
        seen = []
        for outage in (False, True):
            sandbox.faults = Faults(login_outage=outage, expire_tokens=outage, fail={500: 0.5})
            for path in (f"/customers?limit=1&key={keys[1]}", f"/works?{keys[1]}", "/-/", "/-/status", "/-/metrics"):
                async with session.get(url + path) as response:
                    seen.append(await response.text() if "/-/" in path else "")
            async with session.post(f"{url}/-/test") as response:
                seen.append(await response.text())
            async with session.get(f"{url}/-/events") as response:
                seen.append((await response.content.readline()).decode())
        tokens = list(sandbox._tokens)
    await sandbox.stop()
    assert all(seen[place] for place in (2, 3, 4, 5, 6))
    for secret in (*keys, client_key, *tokens):
        assert secret not in "\n".join(seen)
