from __future__ import annotations

import json
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from metquay_proxy.exchange.exchange import Exchange
from metquay_proxy.rules.gate import Admission
from metquay_proxy.rules.renewal import TokenEvent
from metquay_proxy.telemetry import BOUNDS, RECENT, Histogram, Telemetry, line, masked

if TYPE_CHECKING:
    from collections.abc import Callable

    from metquay_proxy.rules.errors import Sent

STATUS = {
    "ready": True,
    "token": {"renewals": 3, "failures": 1, "rejected": False, "last_renewal_age": 7.5, "seconds_left": 600.0},
    "quota": {"limit": 100, "used": 42, "waiting": 2, "closed_for": 0.0},
    "version": "1.2.3",
    "connections": {"busy": 1, "idle": 4},
    "requests": {"active": 5},
}


def exchange(  # noqa: PLR0913 - the facts of one exchange
    path: str = "/api/v1/customers",
    *,
    method: str = "GET",
    status: int = 200,
    answered_by: Literal["metquay", "proxy"] = "metquay",
    error: str | None = None,
    attempts: int = 1,
) -> Exchange:
    """Make an exchange that has ended."""
    made = Exchange(method, path=path)
    made.seconds = made.ended = 0.0
    made.status, made.answered_by, made.error, made.attempts = status, answered_by, error, attempts
    return made


def metrics(telemetry: Telemetry, status: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """Return each sample by its name and the values of its labels."""
    text = telemetry.exposition(status)().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


@pytest.mark.parametrize(
    ("shown", "target"),
    [
        ("/customers", "/customers"),
        ("/customers?", "/customers?"),
        ("/customers?limit=*&name=*", "/customers?limit=5&name=ACME%20Ltd"),
        ("/customers?*", "/customers?ACME"),
        ("/customers?a=*&&*&b=*", "/customers?a=b=c&&secret&b="),
        ("/FlexicalERP/app;*/rest;*?id=*", "/FlexicalERP/app;jsessionid=secret/rest%3bv=1;w=2?id=secret"),
    ],
)
def test_query_values_are_masked(shown: str, target: str) -> None:
    """Names of a query stay, values go; what has no equals sign is all value, as is what follows a semicolon."""
    assert shown == masked(target)


def test_a_line_tells_the_contract() -> None:
    """Id, client, method, path, status, who answered, times, attempts; an error and why, where there was one."""
    made = exchange(status=429, answered_by="proxy", error="quota-exceeded", attempts=2)
    made.admission = Admission("workbook")
    made.caller, made.waited, made.seconds, made.ended = "Excel", 1.5, 2.0123, 1700000000.25
    made.upstream, made.reason = 0.25, "More is asked for."
    made.agent, made.address, made.replayed = 'Excel/16 "{%s}\\', "192.0.2.7", True
    assert {
        "event": "request",
        "level": "warning",
        "timestamp": "2023-11-14T22:13:20.250000Z",
        "id": made.id,
        "client": "workbook",
        "user_agent": 'Excel/16 "{%s}\\',
        "address": "192.0.2.7",
        "method": "GET",
        "path": "/api/v1/customers",
        "status": 429,
        "answered_by": "proxy",
        "ms": 2012.3,
        "waited_ms": 1500.0,
        "upstream_ms": 250.0,
        "attempts": 2,
        "replayed": True,
        "error": "quota-exceeded",
        "reason": "More is asked for.",
        "sent": "no",
    } == json.loads(line(made))


def test_a_line_leaves_out_what_is_not_known() -> None:
    """Neither address nor User-Agent nor reason, where there is none; nobody is null."""
    fields = json.loads(line(exchange()))
    assert fields["client"] is None
    assert ["event", "level", "timestamp", "id"] == list(fields)[:4]
    assert {"user_agent", "address", "replayed", "error", "reason"}.isdisjoint(fields)


def test_what_a_client_chooses_is_shortened() -> None:
    """Of who asked 80 characters are told, whatever it was called; and no value of a query."""
    telemetry, made = Telemetry(), exchange("/api/v1/works?secret=1&xxx")
    made.caller, made.agent = "excel", "\x9b" * 200
    telemetry.closed(made)
    [text], *_ = telemetry.since(0)
    assert text.isascii()
    fields = json.loads(text)
    assert ("/api/v1/works?secret=*&*", "\x9b" * 80, "\x9b" * 200) == tuple(
        fields[name] for name in ("path", "client", "user_agent")
    )


@pytest.mark.parametrize(
    ("level", "sent", "quiet", "outcomes"),
    [
        ("info", "no", False, [(200, None), (404, None), (0, "client-left")]),
        ("info", "yes", False, [(201, "client-left")]),
        ("warning", "unknown", False, [(0, "client-left")]),
        ("warning", "no", False, [(500, None), (503, None), (200, "upstream-closed"), (502, "upstream-unreachable")]),
        ("warning", "no", False, [(429, "quota-exceeded"), (403, "client-key-required"), (404, "pass-through-off")]),
        ("error", "no", False, [(503, "credentials-rejected")]),
        ("debug", "no", True, [(200, None), (503, None), (404, "no-such-page"), (200, "client-left")]),
    ],
)
def test_how_loud_a_line_is(level: str, sent: Sent, outcomes: list[tuple[int, str | None]], *, quiet: bool) -> None:
    """Made by the proxy or broken: a warning; keys refused: an error; what machines ask all the time: debug."""
    for status, error in outcomes:
        made = exchange(status=status, error=error)
        made.sent, made.quiet = sent, quiet
        assert level == json.loads(line(made))["level"], (status, error)


@pytest.mark.parametrize(
    ("route", "paths"),
    [
        ("/customers", "/api/v1/customers /api/v1/customers?first=0"),
        ("/customers/{id}", "/api/v1/customers/10427 /api/v1/customers/"),
        ("/works/{id}", "/api/v1/works/7?x=/y"),
        ("/instrument-categories", "/api/v1/instrument-categories"),
        ("/customer-instrument-details/{id}", "/api/v1/customer-instrument-details/1"),
        ("other", "/api/v1/customers/1/works /api/v1/nothing /FlexicalERP/rest/customers - /-/anything"),
        *(("/-/", "/-/"), ("/-/status", "/-/status")),
    ],
)
def test_routes_are_templates(route: str, paths: str) -> None:
    """Ids are collapsed and unknown paths are one, so that a scan of addresses makes no new series."""
    telemetry = Telemetry()
    for path in paths.split():
        telemetry.closed(exchange(path))
    found = metrics(telemetry, STATUS)["metquay_proxy_requests_total", "GET", "metquay", route, "200"]
    assert len(paths.split()) == found


def test_another_prefix() -> None:
    """Where METQUAY_HOST has a path of its own, the routes are below that."""
    telemetry = Telemetry("/lab")
    telemetry.closed(exchange("/lab/works"))
    assert 1 == metrics(telemetry, STATUS)["metquay_proxy_requests_total", "GET", "metquay", "/works", "200"]


def test_metrics() -> None:
    """Counters, histograms, token, quota, connections and the process's own figures, as Prometheus reads them."""
    telemetry = Telemetry()
    made = exchange(attempts=3)
    made.began -= 1.0
    made.head_at = made.began + 0.8
    made.upstream, made.waited = 0.15, 0.61
    telemetry.opened()
    telemetry.closed(made)
    telemetry.opened()
    telemetry.closed(exchange("/-/live", attempts=0))
    found = metrics(telemetry, STATUS)
    assert 0 == telemetry.active
    assert 2 == telemetry.finished
    assert {
        ("metquay_proxy_retries_total",): 2,
        ("metquay_proxy_upstream_seconds_count",): 1,
        ("metquay_proxy_upstream_seconds_sum",): 0.15,
        ("metquay_proxy_upstream_seconds_bucket", "0.1"): 0,
        ("metquay_proxy_upstream_seconds_bucket", "0.2"): 1,
        ("metquay_proxy_upstream_seconds_bucket", "+Inf"): 1,
        ("metquay_proxy_waited_seconds_sum",): 0.61,
        ("metquay_proxy_own_seconds_bucket", "0.02"): 0,
        ("metquay_proxy_own_seconds_bucket", "0.05"): 1,
        ("metquay_proxy_ready",): 1,
        ("metquay_proxy_requests_active",): 5,
        ("metquay_proxy_token_age_seconds",): 7.5,
        ("metquay_proxy_token_left_seconds",): 600,
        ("metquay_proxy_token_renewals_total",): 3,
        ("metquay_proxy_token_failures_total",): 1,
        ("metquay_proxy_token_rejected",): 0,
        ("metquay_proxy_quota_limit",): 100,
        ("metquay_proxy_quota_used",): 42,
        ("metquay_proxy_quota_waiting",): 2,
        ("metquay_proxy_quota_closed_seconds",): 0,
        ("metquay_proxy_connections", "busy"): 1,
        ("metquay_proxy_connections", "idle"): 4,
    }.items() <= found.items()
    if sys.platform == "linux":
        assert found["process_cpu_seconds_total",] > 0
        assert found["process_resident_memory_bytes",] > 0


def test_metrics_before_the_first_token_and_without_a_quota() -> None:
    """What is not known is left out, never told as 0."""
    token = {"renewals": 0, "failures": 0, "rejected": False, "last_renewal_age": None, "seconds_left": 0.0}
    found = metrics(Telemetry(), {**STATUS, "token": token, "quota": None, "ready": False})
    assert ("metquay_proxy_token_age_seconds",) not in found
    assert ("metquay_proxy_quota_used",) not in found
    assert 0 == found["metquay_proxy_ready",]


def test_a_clock_that_jumps_makes_no_negative_time() -> None:
    """The machine slept while a request waited: the proxy's own share is 0 then, and the sum never falls."""
    telemetry = Telemetry()
    made = exchange()
    made.waited = 3600.0
    telemetry.closed(made)
    assert 0 == metrics(telemetry, STATUS)["metquay_proxy_own_seconds_sum",]


@given(st.lists(st.floats(-1.0, 100.0) | st.sampled_from(BOUNDS)))
def test_durations_are_counted_in_buckets(durations: list[float]) -> None:
    """Each duration is in every bucket whose bound it does not exceed, and less than nothing is nothing."""
    histogram = Histogram((1,) * (len(BOUNDS) + 1), 1.0).plus(durations.copy())
    assert [1 + sum(each <= bound for each in durations) for bound in (*BOUNDS, float("inf"))] == histogram.counts
    assert pytest.approx(1 + sum(each for each in durations if each > 0)) == histogram.total


def figures(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    """Return what is exposed, but for what the process itself uses."""
    return {key: value for key, value in metrics(telemetry, STATUS).items() if not key[0].startswith("process_")}


READS: tuple[Callable[[Telemetry], object], ...] = (
    lambda telemetry: telemetry.finished,
    Telemetry.standing,
    lambda telemetry: telemetry.since(0),
    Telemetry.hour,
    figures,
)
OUTCOMES = st.tuples(
    st.sampled_from(["/api/v1/works", "/api/v1/works/7", "/-/status", "/favicon.ico", "/x"]),
    st.sampled_from([0, 200, 404, 429, 500, 502, 503]),
    st.sampled_from([("metquay", None), ("proxy", "upstream-timeout"), ("proxy", "quota-exceeded"), ("proxy", None)]),
    st.sampled_from([(attempts, times) for attempts in (0, 1, 3) for times in (1, 2, 300)]),
    st.sampled_from([0.0, 2.0**-12, 0.5, 61.0, -90.0]),
)
STEPS = st.one_of(OUTCOMES, st.sampled_from(READS), st.sampled_from([TokenEvent("renewed", "", 900.0, 720.0)]))


@settings(deadline=None, max_examples=50)
@given(st.lists(STEPS, max_size=20), st.permutations(READS))
@pytest.mark.slow
def test_it_matters_to_nobody_when_exchanges_are_counted(
    steps: list[Any], reads: list[Callable[[Telemetry], object]]
) -> None:
    """What is read is the same whether somebody reads after each exchange, now and then, or never before."""
    now = 1_700_000_000.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metquay_proxy.telemetry.time.time", lambda: now)
        seldom, always, never = Telemetry(), Telemetry(), Telemetry()
        patch.setattr("metquay_proxy.telemetry.time.perf_counter", lambda: now)
        for step in steps:
            if isinstance(step, TokenEvent):
                for telemetry in (seldom, always, never):
                    telemetry.token_event(step)
            elif not isinstance(step, tuple):
                step(seldom)
            else:
                path, status, (answered_by, error), (attempts, times), seconds = step
                for _ in range(times):
                    made = exchange(path, status=status, answered_by=answered_by, error=error, attempts=attempts)
                    made.quiet = path == "/favicon.ico" and not attempts
                    made.began, made.waited, made.upstream = now, seconds / 2, seconds / 4
                    made.head_at = now + seconds if attempts == 1 else 0.0
                    now += seconds
                    for telemetry in (seldom, always, never):
                        telemetry.closed(made)
                    always.hour()
        for read in reads:
            assert read(always) == read(seldom) == read(never)


def test_a_wall_clock_that_is_set_back_mixes_no_minutes() -> None:
    """What ended in another minute than the first and the last of those that are counted together stands there."""
    telemetry, ends = Telemetry(), [600.0, 660.0, 600.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metquay_proxy.telemetry.time.time", lambda: ends.pop(0) if len(ends) > 1 else ends[0])
        for _ in range(3):
            telemetry.closed(exchange())
        assert [(10, 1), (11, 1), (10, 1)] == [(row[0], row[1]) for row in telemetry.hour()]


def test_what_waits_to_be_counted_is_bounded() -> None:
    """Where nobody reads for days, the last 100 exchanges are kept, and fewer than 300 that are not counted yet."""
    telemetry, kept = Telemetry(), []
    for _ in range(1000):
        made = exchange()
        kept.append(weakref.ref(made))
        telemetry.closed(made)
    del made
    assert RECENT <= sum(each() is not None for each in kept) < RECENT + 300
    telemetry.hour()
    assert RECENT == sum(each() is not None for each in kept)


def test_the_thread_of_a_scrape_only_reads() -> None:
    """What ends while a scrape is made is not counted by its thread, but by whoever reads next."""
    telemetry = Telemetry()
    telemetry.closed(exchange())
    scrape = telemetry.exposition(STATUS)
    telemetry.closed(exchange())
    with ThreadPoolExecutor() as threads:
        text = threads.submit(scrape).result().decode()
    for name in ("requests_total{", "own_seconds_count", "upstream_seconds_count", "waited_seconds_count"):
        assert ["1.0"] == re.findall(rf"^metquay_proxy_{name}.* (.+)$", text, re.MULTILINE), name
    assert 2 == metrics(telemetry, STATUS)["metquay_proxy_own_seconds_count",]


def test_the_last_exchanges_are_bounded() -> None:
    """A reader gets each exchange once; one that is too slow learns how many it missed; nothing is queued for it."""
    telemetry = Telemetry()
    assert ([], 0, 0) == telemetry.since(0)
    for number in range(3):
        telemetry.closed(exchange(f"/api/v1/works/{number}"))
    telemetry.closed(exchange("/-/status", attempts=0))
    lines, lost, last = telemetry.since(1)
    probe = exchange("/favicon.ico", attempts=0)
    probe.quiet = True
    telemetry.closed(probe)
    assert (lines, lost, last) == telemetry.since(1)
    assert ["/api/v1/works/1", "/api/v1/works/2"] == [json.loads(line)["path"] for line in lines]
    assert (0, 3) == (lost, last)
    for _ in range(RECENT + 5):
        telemetry.closed(exchange())
    lines, lost, last = telemetry.since(last)
    assert (RECENT, 5, RECENT + 8) == (len(lines), lost, last)
    for told, missed, number in ((10, 5, 18), (10, 0, 28)):
        lines, lost, last = telemetry.since(number - told - missed, 10)
        assert (told, missed, number) == (len(lines), lost, last)


def test_the_last_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each minute with exchanges: how many were good, refused and failed; after an hour it is gone."""
    telemetry = Telemetry()
    now = 28_333_333 * 60.0
    monkeypatch.setattr("metquay_proxy.telemetry.time.time", lambda: now)
    for status in (200, 201, 304, 404, 429, 502, 0):
        made = exchange(status=status)
        made.began -= 0.7 if status == 404 else 0.0
        telemetry.closed(made)
    assert [28_333_333, 3, 2, 2] == telemetry.hour()[0][:4]
    average, slowest, attempts = telemetry.hour()[0][4:]
    assert 7 == attempts
    assert 700 <= slowest < 800
    assert 100 <= average < 120
    now += 60
    telemetry.closed(exchange())
    assert [[28_333_333, 3, 2, 2], [28_333_334, 1, 0, 0]] == [row[:4] for row in telemetry.hour()]
    now += 59 * 60
    assert [28_333_334] == [row[0] for row in telemetry.hour()]
    for _ in range(200):
        now += 60
        telemetry.closed(exchange())
    assert 60 == len(telemetry.hour())


@pytest.mark.parametrize("now", [-90.0, 0.0, 30.0])
def test_a_clock_that_was_never_set(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    """In the first hour of 1970, and before it, the figures are figures, too."""
    monkeypatch.setattr("metquay_proxy.telemetry.time.time", lambda: now)
    telemetry = Telemetry()
    assert [] == telemetry.hour()
    telemetry.closed(exchange())
    assert [[now // 60, 1, 0, 0]] == [row[:4] for row in telemetry.hour()]
    assert json.loads(telemetry.since(0)[0][0])["timestamp"].startswith(("1970-01-01T00:00", "1969-12-31T23:58"))


def test_how_many_the_quota_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the last minute are counted, whatever else was answered; memory stays bounded."""
    telemetry, now = Telemetry(), 1_700_000_000.0
    monkeypatch.setattr("metquay_proxy.telemetry.time.time", lambda: now)
    for _ in range(200):
        telemetry.closed(exchange(status=429, answered_by="proxy", error="quota-exceeded", attempts=0))
        telemetry.closed(exchange())
    assert 200 == telemetry.standing().refused
    now += 60
    assert 0 == telemetry.standing().refused


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what sets the wall clock."""

    def put(now: float) -> None:
        monkeypatch.setattr("metquay_proxy.telemetry.time.time", lambda: now)

    put(0.0)
    return put


UNREACHABLE = partial(exchange, status=502, answered_by="proxy", error="upstream-unreachable")
REFUSED = partial(exchange, status=429, answered_by="proxy", error="quota-exceeded", attempts=0)


@pytest.mark.parametrize("read", [True, False])
def test_trouble_with_metquay(wall: Callable[[float], None], *, read: bool) -> None:
    """The last exchange counts: an outage is trouble until Metquay answers, or a login goes well; since its first."""
    telemetry = Telemetry()
    for now, outcome, turned, success in (
        (10.0, exchange(), 0.0, 10.0),
        (20.0, UNREACHABLE(), 20.0, 10.0),
        (30.0, UNREACHABLE(), 20.0, 10.0),
        (40.0, REFUSED(), 20.0, 10.0),
        (50.0, exchange(status=404), 50.0, 10.0),
        (60.0, exchange(status=503), 60.0, 10.0),
        (65.0, TokenEvent("failed", "no network", None, 4.0), 60.0, 10.0),
        (70.0, TokenEvent("recovered", "", 900.0, 720.0), 70.0, 10.0),
        (80.0, exchange(), 70.0, 80.0),
        (90.0, TokenEvent("renewed", "", 900.0, 720.0), 70.0, 80.0),
        (95.0, exchange(status=503, answered_by="proxy", error="token-unavailable", attempts=0), 70.0, 80.0),
        (97.0, exchange(status=503, answered_by="proxy", error="token-unavailable"), 97.0, 80.0),
        (98.0, exchange(), 98.0, 98.0),
        (99.0, exchange(status=200, error="upstream-closed"), 99.0, 98.0),
    ):
        wall(now)
        if isinstance(outcome, TokenEvent):
            telemetry.token_event(outcome)
        else:
            telemetry.closed(outcome)
        if read or now == 99.0:
            found = telemetry.standing()
            assert (turned, success) == (found.turned, found.success), now
            assert (turned in {20.0, 60.0, 97.0, 99.0}) == (found.trouble is not None), now


def test_since_when_logins_fail(wall: Callable[[float], None]) -> None:
    """From the first failure of its kind in a row to the login that goes well again; at the start, from the first."""
    telemetry = Telemetry()
    for now, kind, turned in (
        *((1.0, "obtained", 1.0), (2.0, "failed", 2.0), (3.0, "failed", 2.0), (4.0, "rejected", 4.0)),
        *((5.0, "rejected", 4.0), (6.0, "recovered", 6.0), (7.0, "renewed", 6.0)),
    ):
        wall(now)
        telemetry.token_event(TokenEvent(kind, "", 900.0, 720.0))  # type: ignore[arg-type] # one of the kinds
        assert turned == telemetry.standing().login_turned


@pytest.mark.slow
def test_nobody_pays_for_metrics_who_does_not_ask() -> None:
    """The library for Prometheus is loaded at the first scrape: a cold start has no time for it."""
    text = "import sys, metquay_proxy.app; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - ours
    assert "False\n" == done.stdout


def test_what_replicas_share_is_counted_where_they_share() -> None:
    """Alone or not, with how many, and how often Redis failed; nothing of that where no Redis is set."""
    redis = {"shared": False, "replicas": 5, "share": 20, "alone_for": 3.0, "failures": 2, "trouble": "gone"}
    found = metrics(Telemetry(), {**STATUS, "redis": redis})
    assert (0.0, 5.0, 2.0) == tuple(
        found[f"metquay_proxy_redis_{name}",] for name in ("shared", "replicas", "failures_total")
    )
    assert not [name for name, *_ in metrics(Telemetry(), {**STATUS, "redis": None}) if "redis" in name]
