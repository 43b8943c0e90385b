"""The table of rules is true, and the bench can fail."""

from __future__ import annotations

import asyncio
import gc
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests import wire, wire_rules
from tests.wire import running

if TYPE_CHECKING:
    from collections.abc import Callable

ALL = list(wire_rules.rules())


def test_the_table_is_true() -> None:
    """RULES.md names every rule, its source and a test that exists; ``python -m tests.wire_rules`` writes it anew."""
    assert wire_rules.page() == wire_rules.PAGE.read_text(encoding="utf-8")
    assert len(ALL) == len({(name, test.__name__) for name, test in ALL})
    assert len(ALL) >= 140


@pytest.mark.parametrize(("module", "test"), ALL, ids=lambda each: getattr(each, "__name__", each))
def test_each_rule(module: str, test: Callable[..., Any]) -> None:
    """A rule is one line of text, has a source, and is collected by pytest."""
    assert re.fullmatch(r"[A-Z0-9][^\n|]*\.", test.__doc__ or "")
    assert re.fullmatch(r"(\d{4} \d+(\.\d+)*|contract \d|HTML 9.2)", test.rule[0])  # type: ignore[attr-defined]
    assert test.__name__.startswith("test_")
    assert list(wire_rules.cases(test)), module


async def fails(test: Callable[..., Any]) -> bool:
    """Run a rule against the naive proxy, case by case until one fails."""
    options = test.rule[1]  # type: ignore[attr-defined]
    if options.keys() & {"tls", "client_tls"}:
        return False
    for case in wire_rules.cases(test):
        try:
            async with running(target="naive", **options) as bench:
                await asyncio.wait_for(test(bench=bench, **case), 3)
        except pytest.skip.Exception:
            return False
        except (pytest.fail.Exception, Exception):  # noqa: BLE001 - whichever way it fails
            return True
    return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
async def test_the_bench_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy that one writes in an hour breaks at least 40 of the rules, and keeps some."""
    monkeypatch.setattr(wire, "PATIENCE", 0.7)
    broken = [test.__name__ for _, test in ALL if await fails(test)]
    gc.collect()  # what a broken rule left unfinished warns here, not in a later test
    print(f"{len(broken)} of {len(ALL)}: {' '.join(broken)}")  # noqa: T201 - shown by pytest -s
    assert 40 <= len(broken) < len(ALL)
