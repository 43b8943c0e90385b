"""What docs/ must say of the program: ``python -m tests.documents`` writes the table of settings anew.

``tests/program/test_documents.py`` keeps it, and all else that is said there, true.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from metquay_proxy import check
from metquay_proxy.settings import VARIABLES, default_text, flag, meaning, variable

SETTINGS = Path(__file__).parent.parent / "docs/settings.md"
REQUIRED = {"host", "access_key", "secret_key"}
_HEADS = ("variable", "flag", "default", "meaning")


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def settings() -> str:
    """Return the table of all settings."""
    rows = [row(*_HEADS), "|---|---|---|---|"]
    for name in VARIABLES:
        if not name.endswith("_file"):
            default, given = default_text(name), flag(name)
            shown = f"`{default}`" if default else "(required)" if name in REQUIRED else "none"
            rows.append(row(f"`{variable(name)}`", f"`{given}`" if given else "none", shown, meaning(name)[1]))
    return "\n".join(rows)


def with_settings(text: str) -> str:
    """Return a document with the table of settings in the place of the one that it has."""
    table = re.compile(rf"^{re.escape(row(*_HEADS))}\n(?:\|.*\n)+", re.MULTILINE)
    assert table.search(text)
    return table.sub(lambda _: f"{settings()}\n", text)


def said_by_check() -> set[str]:
    """Return what ``check`` itself says, in pieces of three words or more between what depends on the case."""
    nodes = list(ast.walk(ast.parse(Path(check.__file__).read_text(encoding="utf-8"))))
    documentation = {node.value for node in nodes if isinstance(node, ast.Expr)}
    texts = {
        piece.strip(" .;:(")
        for node in nodes
        if node not in documentation and isinstance(node, ast.Constant) and isinstance(node.value, str)
        for piece in node.value.split("{}")
    }
    return {text for text in texts if len(text.split()) > 2}


if __name__ == "__main__":
    SETTINGS.write_text(with_settings(SETTINGS.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
