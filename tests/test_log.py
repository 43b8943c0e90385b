from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if sys.platform == "linux":
    import fcntl

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import asyncio, logging, sys, warnings
from metquay_proxy.rules.renewal import TokenEvent
from metquay_proxy.exchange.exchange import Exchange
from metquay_proxy.log import configure_logging, log
from metquay_proxy.telemetry import Telemetry

configure_logging({level!r}, {form!r})
telemetry = Telemetry()

async def main():
    made = Exchange("GET", path="/api/v1/customers?name=ACME")
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
    failed = Exchange("POST", path="/api/v1/works")
    failed.status, failed.error, failed.attempts, failed.waited = 502, "upstream-closed", 3, 1.25
    telemetry.closed(failed)
    probe = Exchange("GET", path="/-/live")
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
    assert ["request", "token renewed", "login failed", "a message of aiohttp"] == events[:4]
    assert "a warning of Python's" in events[4]
    assert ["internal error", "also of aiohttp", "key pair refused", "request"] == events[5:]
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


LOUD = {"warning": ["/api/v1/works"], "debug": ["/api/v1/customers?name=*", "/api/v1/works", "/-/live"]}
"""At each level, the paths of the requests that are told."""


def test_levels() -> None:
    """There is no line for what went well, and one for each request that did not; probes are told at debug alone."""
    told = {level: [json.loads(line) for line in logged("json", level=level).splitlines()] for level in LOUD}
    paths = {level: [line["path"] for line in lines if line["event"] == "request"] for level, lines in told.items()}
    assert LOUD == paths
    assert "token renewed" not in [line["event"] for line in told["warning"]]


async def test_lines_leave_by_themselves(tmp_path: Path) -> None:
    """A line that nothing follows is written within a moment."""
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


FLOOD = """
import sys
from metquay_proxy.log import configure_logging, log, output

configure_logging("info", "json")
for number in range(10_000):
    log.info("line", number=number)
print(output.writer.lost, flush=True)
sys.stdin.readline()
log.info("the end")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has pipes of a given size")
@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.slow
def test_what_does_not_fit_is_lost_and_told(*, blocking: bool) -> None:
    """Nobody waits for the reader; what was kept comes once and in its order, then how many lines did not fit."""
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, 1 << 18)
    os.set_blocking(theirs, blocking)  # a program that shares a terminal may have made it so
    with subprocess.Popen(  # noqa: S603 - our own script
        [sys.executable, "-c", FLOOD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as process:
        os.close(theirs)
        assert process.stdin is not None
        assert process.stdout is not None
        lost = int(process.stdout.readline())
        with open(ours) as log:  # noqa: PTH123 - a descriptor
            lines = [json.loads(log.readline())]
            while "number" in lines[-1]:
                lines.append(json.loads(log.readline()))
            process.stdin.close()
            assert "the end" == json.loads(log.read())["event"]
    assert list(range(10_000 - lost)) == [line["number"] for line in lines[:-1]], "the first ones were kept"
    assert 4000 < len(lines) < 8000
    assert ("error", lost) == (lines[-1]["level"], lines[-1]["lines"])


def ask(client: http.client.HTTPConnection, path: str) -> str:
    """Return the body of a good answer."""
    client.request("GET", path)
    answer = client.getresponse()
    assert 200 == answer.status
    return answer.read().decode()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="it has no SIGTERM that a program can handle")
def test_nobody_reads_standard_error(tmp_path: Path) -> None:
    """The program serves, is alive and ends with 0, though each of 2,000 requests has a line that nobody takes."""
    settings = {"LISTEN": "127.0.0.1:0", "RATE_LIMIT": "off", "LOG_LEVEL": "info"}
    with subprocess.Popen(
        [sys.executable, "-m", "metquay_proxy", "serve", "--sandbox"],
        cwd=tmp_path,
        env=os.environ | {f"METQUAY_{name}": value for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://([\d.]+:\d+)", process.stdout.readline())
            assert found is not None
            with contextlib.closing(http.client.HTTPConnection(found[1], timeout=10)) as client:
                for _ in range(2000):
                    ask(client, f"/customers?limit=1&padding={'&' * 900}")
                assert ask(client, "/-/live")
                assert "\nmetquay_proxy_log_lost_total " in ask(client, "/-/metrics")
            process.send_signal(signal.SIGTERM)
            assert 0 == process.wait(15)
        finally:
            process.kill()
