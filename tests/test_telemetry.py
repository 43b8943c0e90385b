from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from metquay_proxy.exchange.exchange import Exchange
from metquay_proxy.exchange.tokens import TokenEvent
from metquay_proxy.telemetry import RECENT, Telemetry, line, masked

if TYPE_CHECKING:
    from pathlib import Path

    from metquay_proxy.rules.errors import Sent

STATUS = {
    "ready": True,
    "token": {"renewals": 3, "failures": 1, "rejected": False, "last_renewal_age": 7.5, "seconds_left": 600.0},
    "quota": {"limit": 100, "used": 42, "waiting": 2, "closed_for": 0.0},
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
    made = Exchange(method, path)
    made.status, made.answered_by, made.error, made.attempts = status, answered_by, error, attempts
    return made


def metrics(telemetry: Telemetry, status: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """Return each sample by its name and the values of its labels."""
    text = telemetry.exposition(status).decode()
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
    ],
)
def test_query_values_are_masked(shown: str, target: str) -> None:
    """Names of a query stay, values go; what has no equals sign is all value."""
    assert shown == masked(target)


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\#")), st.text(max_size=200))
def test_a_line_is_json_whatever_it_tells(target: str, agent: str) -> None:
    """The line is written by hand, and still valid JSON in ASCII, event first, with the value of no query."""
    made = exchange("/api/v1/" + target)
    made.caller = agent
    text = line(made)
    assert text.isascii()
    fields = json.loads(text)
    assert ["event", "level", "timestamp", "id"] == list(fields)[:4]
    assert (agent[:80] or None) == fields["client"]
    assert masked("/api/v1/" + target) == fields["path"]


def test_a_line_tells_the_contract() -> None:
    """Id, client, method, path, status, who answered, ms, waited, attempts; an error where there was one."""
    made = exchange(status=429, answered_by="proxy", error="quota-exceeded", attempts=2)
    made.client, made.caller, made.waited, made.seconds, made.ended = "workbook", "Excel", 1.5, 2.0123, 1700000000.25
    made.agent, made.address, made.replayed = "Excel/16" * 50, "192.0.2.7", True
    assert {
        "event": "request",
        "level": "warning",
        "timestamp": "2023-11-14T22:13:20.250000Z",
        "id": made.id,
        "client": "workbook",
        "user_agent": ("Excel/16" * 50)[:200],
        "address": "192.0.2.7",
        "method": "GET",
        "path": "/api/v1/customers",
        "status": 429,
        "answered_by": "proxy",
        "ms": 2012.3,
        "waited_ms": 1500.0,
        "attempts": 2,
        "replayed": True,
        "error": "quota-exceeded",
    } == json.loads(line(made))


def test_a_line_leaves_out_what_is_not_known() -> None:
    """Neither address nor User-Agent nor reason, where there is none; nobody is null."""
    fields = json.loads(line(exchange()))
    assert fields["client"] is None
    assert {"user_agent", "address", "replayed", "error", "reason"}.isdisjoint(fields)


@pytest.mark.parametrize(
    ("level", "status", "error", "sent", "quiet"),
    [
        ("info", 200, None, "no", False),
        ("info", 404, None, "no", False),
        ("info", 0, "client-left", "no", False),
        ("info", 201, "client-left", "yes", False),
        ("warning", 0, "client-left", "unknown", False),
        ("warning", 500, None, "no", False),
        ("warning", 503, None, "no", False),
        ("warning", 200, "upstream-closed", "no", False),
        ("warning", 502, "upstream-unreachable", "no", False),
        ("warning", 429, "quota-exceeded", "no", False),
        ("warning", 403, "client-key-required", "no", False),
        ("warning", 404, "pass-through-off", "no", False),
        ("error", 503, "credentials-rejected", "no", False),
        ("debug", 200, None, "no", True),
        ("debug", 503, None, "no", True),
        ("debug", 404, "no-such-page", "no", True),
        ("debug", 200, "client-left", "no", True),
    ],
)
def test_how_loud_a_line_is(level: str, status: int, error: str | None, sent: Sent, *, quiet: bool) -> None:
    """Made by the proxy or broken: a warning; keys refused: an error; what machines ask all the time: debug."""
    made = exchange(status=status, error=error)
    made.sent, made.quiet = sent, quiet
    assert level == json.loads(line(made))["level"]


@pytest.mark.parametrize(
    ("route", "path"),
    [
        ("/customers", "/api/v1/customers"),
        ("/customers", "/api/v1/customers?first=0"),
        ("/customers/{id}", "/api/v1/customers/10427"),
        ("/customers/{id}", "/api/v1/customers/"),
        ("/works/{id}", "/api/v1/works/7?x=/y"),
        ("/instrument-categories", "/api/v1/instrument-categories"),
        ("/customer-instrument-details/{id}", "/api/v1/customer-instrument-details/1"),
        ("other", "/api/v1/customers/1/works"),
        ("other", "/api/v1/nothing"),
        ("other", "/FlexicalERP/rest/customers"),
        ("other", "-"),
        ("/-/", "/-/"),
        ("/-/status", "/-/status"),
        ("other", "/-/anything"),
    ],
)
def test_routes_are_templates(route: str, path: str) -> None:
    """Ids are collapsed and unknown paths are one, so that a scan of addresses makes no new series."""
    telemetry = Telemetry()
    telemetry.closed(exchange(path))
    assert 1 == metrics(telemetry, STATUS)["metquay_proxy_requests_total", "GET", "metquay", route, "200"]


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


def test_the_last_exchanges_are_bounded() -> None:
    """A reader gets each exchange once; one that is too slow learns how many it missed; nothing is queued for it."""
    telemetry = Telemetry()
    assert ([], 0, 0) == telemetry.since(0)
    for number in range(3):
        telemetry.closed(exchange(f"/api/v1/works/{number}"))
    telemetry.closed(exchange("/-/status"))
    lines, lost, last = telemetry.since(1)
    probe = exchange("/favicon.ico")
    probe.quiet = True
    telemetry.closed(probe)
    assert (lines, lost, last) == telemetry.since(1)
    assert ["/api/v1/works/1", "/api/v1/works/2"] == [json.loads(line)["path"] for line in lines]
    assert (0, 3) == (lost, last)
    for _ in range(RECENT + 5):
        telemetry.closed(exchange())
    lines, lost, last = telemetry.since(last)
    assert (RECENT, 5, RECENT + 8) == (len(lines), lost, last)
    assert RECENT == len(telemetry._recent)


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
    average, slowest = telemetry.hour()[0][4:]
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


def test_how_many_the_quota_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the last minute are counted, whatever else was answered; memory stays bounded."""
    telemetry, now = Telemetry(), 1_700_000_000.0
    monkeypatch.setattr("metquay_proxy.telemetry.time.time", lambda: now)
    for _ in range(200):
        telemetry.closed(exchange(status=429, answered_by="proxy", error="quota-exceeded", attempts=0))
        telemetry.closed(exchange())
    assert 200 == telemetry.refused()
    now += 60
    assert 0 == telemetry.refused()


def test_trouble_with_metquay() -> None:
    """The last exchange counts: an outage is trouble until Metquay answers, or a login goes well."""
    telemetry = Telemetry()
    failed = exchange(status=502, answered_by="proxy", error="upstream-unreachable")
    telemetry.closed(failed)
    assert failed is telemetry.trouble
    telemetry.closed(exchange(status=429, answered_by="proxy", error="quota-exceeded"))
    assert failed is telemetry.trouble
    telemetry.closed(exchange(status=404))
    assert telemetry.trouble is None
    busy = exchange(status=503)
    telemetry.closed(busy)
    assert busy is telemetry.trouble
    telemetry.token_event(TokenEvent("failed", "no network", None, 4.0))
    assert busy is telemetry.trouble
    telemetry.token_event(TokenEvent("recovered", "", 900.0, 720.0))
    assert telemetry.trouble is None


SCRIPT = """
import asyncio, logging, sys, warnings
from metquay_proxy.exchange.tokens import TokenEvent
from metquay_proxy.exchange.exchange import Exchange
from metquay_proxy.telemetry import Telemetry, configure_logging, log

configure_logging({level!r}, {form!r})
telemetry = Telemetry()

async def main():
    made = Exchange("GET", "/api/v1/customers?name=ACME")
    made.status, made.caller, made.agent = 200, "Excel\\x9b31m", "Excel\\x9b31m"
    telemetry.closed(made)
    telemetry.token_event(TokenEvent("renewed", "", 900.0, 720.0))
    telemetry.token_event(TokenEvent("failed", "no network", None, 4.0))
    logging.getLogger("aiohttp.server").error("a message of %s", "aiohttp")
    warnings.warn("a warning of Python's")
    try:
        secret = "token-in-a-local-variable"
        raise ValueError("broken")
    except ValueError:
        log.exception("internal error", id=made.id)
        logging.getLogger("aiohttp.server").exception("also of aiohttp")
    telemetry.token_event(TokenEvent("rejected", "refused\\x1b[31m", None, 60.0))
    failed = Exchange("POST", "/api/v1/works")
    failed.status, failed.error, failed.attempts, failed.waited = 502, "upstream-closed", 3, 1.25
    telemetry.closed(failed)
    probe = Exchange("GET", "/-/live")
    probe.quiet = True
    telemetry.closed(probe)
    {after}

asyncio.run(main())
"""


def logged(form: str, after: str = "", level: str = "info", **more: Any) -> str:  # noqa: ANN401 - subprocess's own
    """Return what a process of its own writes: logging is set up once for a process."""
    text = SCRIPT.format(level=level, form=form, after=after)
    command = [sys.executable, "-W", "always", "-c", text]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True, **more)  # noqa: S603 - our own script
    return str(done.stderr)


def test_json_log() -> None:
    """Each line is one JSON object, event first, in order, aiohttp's and Python's too; the held one comes at exit."""
    text = logged("auto")
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(line.startswith('{"event": ') for line in text.splitlines())
    assert all(["event", "level", "timestamp"] == list(line)[:3] for line in lines)
    events = [line["event"] for line in lines]
    assert ["request", "token renewed", "token failed", "a message of aiohttp"] == events[:4]
    assert "a warning of Python's" in events[4]
    assert ["internal error", "also of aiohttp", "token rejected", "request"] == events[5:]
    assert ["info", "error", "warning"] == [lines[place]["level"] for place in (0, 7, 8)]
    assert "Excel\x9b31m" == lines[0]["user_agent"]
    assert "no network" == lines[2]["reason"]
    assert ("error", "aiohttp.server") == (lines[3]["level"], lines[3]["logger"])
    assert lines[0]["id"] == lines[5]["id"]
    assert "broken" in json.dumps(lines[5]["exception"])
    assert "local-variable" not in text.replace('secret = "token-in-a-local-variable"', "")
    assert "ACME" not in text


def test_console_log() -> None:
    """On a terminal the same things are said for people, tracebacks without variables too."""
    text = logged("console")
    for part in ("token renewed", "a message of aiohttp", "ValueError: broken"):
        assert part in text
    good, failed = (line for line in text.splitlines() if " /api/v1/" in line)
    assert re.match(r"[\d-]+ [\d:]+ \[info +\] GET /api/v1/customers\?name=\* 200 \d+\.\d ms Excel\\x9b31m *$", good)
    assert re.match(r"[\d-]+ [\d:]+ \[warning +\] POST /api/v1/works 502 \d+\.\d ms - ", failed)
    for part in ("error=upstream-closed", "waited_ms=1250.0", "attempts=3"):
        assert part in failed
    assert "waited" not in good
    assert "/-/live" not in text
    assert text.replace("\n", "").isprintable(), "no colours in a file, and nothing that a terminal would obey"
    assert "ACME" not in text
    assert "{" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="it has no pseudo terminals")
@pytest.mark.parametrize(("colours", "environment"), [(True, {"NO_COLOR": ""}), (False, {"NO_COLOR": "1"})])
def test_colours(environment: dict[str, str], *, colours: bool) -> None:
    """On a terminal there are colours, unless NO_COLOR is set (no-color.org)."""
    ours, theirs = os.openpty()
    text = SCRIPT.format(level="info", form="auto", after="")
    command = [sys.executable, "-c", text]
    subprocess.run(command, stderr=theirs, check=True, env={**os.environ, **environment})  # noqa: S603 - our own script
    os.close(theirs)
    assert colours == (b"\x1b[" in os.read(ours, 4096))
    os.close(ours)


def test_the_level_warning() -> None:
    """At level warning there is no line for what went well, and one for each request that did not."""
    lines = [json.loads(line) for line in logged("json", level="warning").splitlines()]
    assert ("token failed", "token rejected") == (lines[0]["event"], lines[-2]["event"])
    assert "token renewed" not in [line["event"] for line in lines]
    assert [502] == [line["status"] for line in lines if line["event"] == "request"]


def test_the_level_debug() -> None:
    """At level debug probes are told too."""
    lines = [json.loads(line) for line in logged("json", level="debug").splitlines()]
    assert ["/-/live"] == [line["path"] for line in lines if line["event"] == "request" and line["level"] == "debug"]


async def test_request_lines_are_held_for_a_moment(tmp_path: Path) -> None:
    """A request line that nothing follows is written within a fifth of a second."""
    path = tmp_path / "log"
    after = f"""
    size = lambda: len(open({str(path)!r}).read())
    before = size()
    await asyncio.sleep(0.3)
    assert before < size(), "still held"
    """
    with path.open("w") as file:
        command = [sys.executable, "-c", SCRIPT.format(level="info", form="json", after=after)]
        process = await asyncio.create_subprocess_exec(*command, stderr=file)
        assert 0 == await process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_fails_no_request() -> None:
    """Where nothing can be written any more, requests are served all the same."""
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        text = SCRIPT.format(level="info", form="json", after="telemetry.closed(made); print('served')")
        done = subprocess.run(  # noqa: S603 - our own script
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert "served\n" == done.stdout


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
