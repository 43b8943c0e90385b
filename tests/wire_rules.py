"""The table of wire rules: every test that carries ``@rule``, by its docstring.

``python -m tests.wire_rules`` writes RULES.md.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODULES = (
    "test_wire_requests",
    "test_wire_responses",
    "test_wire_failures",
    "test_wire_hostile",
    "test_wire_bounds",
    "test_wire_stale",
)
PAGE = Path(__file__).with_name("RULES.md")

INTRODUCTION = """\
# What the proxy does on the wire

Each row is one rule, proved on raw sockets by the test beside it (`tests/wire.py` is the bench). A bare number is a
section of that RFC; `contract` is the project's own part of that number. Written by `python -m tests.wire_rules`;
`tests/program/test_wire_rules.py` keeps it true.

Left out on purpose, and safe: trailer fields are dropped in both directions (RFC 9110 6.5.1 allows it), and so are
interim answers other than our own 100 (RFC 9110 15.2 lets a proxy that did not ask for them). Nothing is added that
the client or Metquay did not say: no Via (RFC 9110 7.6.3) and no Date (6.6.1), since answers must arrive as they
would without the proxy. Max-Forwards (7.6.2) is passed on like any other field: the proxy stands beside its client
and cannot be part of a loop. A half-closed client counts as gone. On a unix socket a broken answer to HTTP/1.0
without a length can't be told from a whole one: such sockets know no reset.
"""


def rules() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield each module's name and rule, in the order of the files."""
    for name in MODULES:
        module = importlib.import_module(f"tests.program.{name}")
        for test in vars(module).values():
            if inspect.isfunction(test) and hasattr(test, "rule"):
                yield name, test


def cases(test: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of each of a test's cases."""
    columns = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = (
                [name.strip() for name in mark.args[0].split(",")]
                if isinstance(mark.args[0], str)
                else list(mark.args[0])
            )
            columns.append([dict(zip(names, row if len(names) > 1 else [row], strict=True)) for row in mark.args[1]])
    for rows in itertools.product(*columns):
        yield {name: value for row in rows for name, value in row.items()}


def page() -> str:
    """Return the text of RULES.md."""
    lines = [INTRODUCTION]
    for name, group in itertools.groupby(rules(), key=lambda pair: pair[0]):
        module = importlib.import_module(f"tests.program.{name}")
        lines += [
            f"## {inspect.getdoc(module)}\n",
            f"In `program/{name}.py`:\n",
            "| rule | source | test |",
            "|---|---|---|",
        ]
        lines += [f"| {inspect.getdoc(test)} | {test.rule[0]} | `{test.__name__}` |" for _, test in group]  # type: ignore[attr-defined]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
