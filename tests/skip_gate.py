"""A pytest plugin for CI (``-p tests.skip_gate``): a skip whose reason is not listed in skips.txt fails the run.

So a test cannot fall silent because a tool or a file is missing. An expected failure counts as a skip.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

_ALLOWED = frozenset(
    line
    for line in Path(__file__).with_name("skips.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = getattr(report, "wasxfail", None)
    if text is None:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _unlisted(config: pytest.Config) -> Iterable[str]:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    for report in reporter.getreports("skipped") + reporter.getreports("xfailed"):
        if _reason(report) not in _ALLOWED:
            yield f"{report.nodeid}: {_reason(report)}"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn a green run red."""
    if exitstatus == pytest.ExitCode.OK and any(_unlisted(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say why, above pytest's own last line."""
    for line in _unlisted(config):
        terminalreporter.write_line(f"SKIPPED, BUT NOT LISTED IN tests/skips.txt: {line}", red=True)
