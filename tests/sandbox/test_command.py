from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from metquay_proxy.sandbox.command import add_flags, simulator
from metquay_proxy.sandbox.records import CUSTOMERS, INSTRUMENTS, WORKS
from metquay_proxy.sandbox.server import Faults

if TYPE_CHECKING:
    from pathlib import Path

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


def values(*words: str) -> dict[str, Any]:
    """Return what the flags say."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(words))


def test_each_fault_has_a_flag() -> None:
    """What is not given is as it was."""
    words = "--latency 1 --jitter 2 --retry-after on --lose-answer 0.5 --reset 0.25 --slow-body 9 --token-lifetime 60"
    made = simulator(values(*words.split(), "--fail", "500=0.5", "--fail", "503=0.25"), lambda _: None)
    expected = Faults(1.0, 2.0, {500: 0.5, 503: 0.25}, retry_after=True, lose_answer=0.5, reset=0.25, slow_body=9.0)
    assert replace(expected, token_lifetime=60.0) == made.faults


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("--latency x", "--latency 0.5"),
        ("--fail 500=2", "--fail 503=0.1"),
        ("--fail 500=0.1 --fail x", "--fail 503=0.1"),
        ("--retry-after 1", "--retry-after on"),
        ("--login-outage x", "--login-outage on"),
        ("--records many", "--records 1234"),
        ("--records -1", "--records 1234"),
        ("--records 100001", "--records 1234"),
        ("--max-page 0", "--max-page 100"),
        ("--max-page 1.5", "--max-page 100"),
    ],
)
def test_a_bad_value_is_explained(words: str, right: str) -> None:
    """As flags are written, with what would be right."""
    with pytest.raises(ValueError, match=f"^{re.escape(words)} is wrong: .*, as in {re.escape(right)}$"):
        simulator(values(*words.split()), lambda _: None)
    simulator(values(*right.split()), lambda _: None)


@pytest.mark.parametrize("number", [0, 5])
def test_records_are_counted(number: int) -> None:
    """As many of each as were asked for, none included; without the flag, the laboratory."""
    made = simulator(values("--records", f"{number}"), lambda _: None)
    assert {number} == {made.records.counts()[kind] for kind in (CUSTOMERS, INSTRUMENTS, WORKS)}
    assert 140 == simulator(values(), lambda _: None).records.counts()[CUSTOMERS]


def test_a_seed_file_is_taken_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """No number of records goes with one's own."""
    with pytest.raises(SystemExit):
        values("--records", "5", "--seed-file", "seed.json")
    assert "--seed-file: not allowed with argument --records" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "most"), [("", None), ("--max-page 1", 1), ("--max-page 100000", 100_000)])
def test_pages_are_capped_if_wanted(words: str, most: int | None) -> None:
    """Without the flag there is no cap."""
    assert most == simulator(values(*words.split()), lambda _: None).max_page


@posix_only
def test_the_sandbox_says_how_to_use_it_and_ends_in_order(tmp_path: Path) -> None:
    """What it prints works, faults included; SIGTERM ends it with 0."""
    words = ["sandbox", "--listen", "127.0.0.1:0", "--rate-limit", "off", "--fail", "500=0.5", "--fail", "503=0.25"]
    process = subprocess.Popen(  # noqa: S603 - our own words
        [sys.executable, "-m", "metquay_proxy", *words, "--login-outage", "--retry-after", "on"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(5)]
    url = lines[1].removeprefix("METQUAY_HOST=")
    assert lines[0].endswith(url)
    assert lines[2].startswith("METQUAY_ACCESS_KEY=")
    assert lines[4].endswith(f'"{url}/authenticate"')
    if shutil.which("curl"):
        pasted = subprocess.run(f"{lines[4]} -s", shell=True, capture_output=True, text=True, check=True)  # noqa: S602 - ours
        assert "503" in pasted.stdout
    with urllib.request.urlopen(url.replace("/api/v1", "/_sandbox/faults"), timeout=10) as answer:  # noqa: S310 - loopback
        faults = json.load(answer)
    assert ({"500": 0.5, "503": 0.25}, True) == (faults["fail"], faults["retry_after"])
    again = [sys.executable, "-m", "metquay_proxy", "sandbox", "--listen", url.split("/")[2]]
    taken = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603 - ours
    assert 1 == taken.returncode
    assert 1 == taken.stderr.count("\n")
    assert f"{url.split('/')[2]} is taken, probably by another program" in taken.stderr
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=10)
    assert (0, "", "") == (process.returncode, out, err)
