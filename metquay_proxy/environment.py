"""What the environment and ``.env`` say: one reader of both, for the settings and for ``health``.

Owns the grammar of ``.env`` and the rule that makes values of names: METQUAY_ names count in any case, what is empty is
absent, the last one wins. Knows no setting. ``health`` has 60 ms for everything, so it must not import what is slow.

Facts: the grammar is python-dotenv's, with which the vendor's SDK reads the same file (a test holds both against each
other). To import that costs ``health`` 20 ms of its 60, and it tells neither the numbers of lines nor which of them it
could not read, but logs that by itself. PowerShell 5 writes UTF-16 with ``>``.
"""

from __future__ import annotations

import collections
import errno
import os
import re

TYPE_CHECKING = False  # to import `typing` costs `health` 8 ms
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Final

Line = collections.namedtuple("Line", ("number", "text", "name", "value"))  # noqa: PYI024 - see above
"""One statement of a ``.env`` file; ``name`` is None where it can't be read, ``value`` without a ``=``."""
PREFIX: Final = "METQUAY_"
ENV_FILE: Final = ".env"

_OURS: Final = re.compile(PREFIX + r"(\w+)", re.IGNORECASE)
_STATEMENT: Final = r"""\s*(?P<text>(?:export[^\S\n]+)?
        (?:(?:'(?P<quoted>[^']+)'|(?P<name>(?!')[^=\#\s]+))[^\S\n]*
           (?P<equals>=(?P<gap>[^\S\n]*)
              (?:'(?P<single>(?:\\.|[^'\\])*)'|"(?P<double>(?:\\.|[^"\\])*)"|(?P<plain>(?!['"])[^\n]*))?)?)?
        (?:[^\S\n]*\#[^\n]*)?)[^\S\n]*(?:\n|\Z|(?P<rest>[^\n]*\n?))"""
"""Matches at every place, since each part may be absent; what is left over on the line makes it unreadable."""
_ESCAPES: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_REFERENCE: Final = re.compile(r"\$\{([^}:]*)(?::-([^}]*))?\}")


class Refused(Exception):
    """What was typed or set makes no sense: each argument is a line for people, and the exit code is 2."""


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the word that was probably meant, or nothing."""
    import difflib  # noqa: PLC0415 - only a mistake pays for loading it

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)), "")


def variables(found: Iterable[tuple[str | None, str | None]]) -> dict[str, str]:
    """Return the texts of the METQUAY_ variables that are not empty, by their names, in lower case without prefix."""
    named = ((_OURS.fullmatch(name or ""), text) for name, text in dict(found).items())
    return {match[1].lower(): text for match, text in named if match and text}


def read_env_file(path: str, environ: Mapping[str, str]) -> list[Line]:
    """Read a ``.env`` file, ``${NAME:-default}`` filled in from earlier lines, then from ``environ``; none: no lines.

    Raises ``OSError``, also where it is no text in UTF-8.
    """
    if not os.path.exists(path) or os.path.isdir(path):  # noqa: PTH110, PTH112 - pathlib costs 10 ms here
        return []
    path = os.path.abspath(path)  # noqa: PTH100 - an error names the folder
    with open(path, "rb") as file:  # noqa: PTH123 - pathlib costs 10 ms here
        data = file.read()
    if b"\0" in data:
        raise OSError(errno.EILSEQ, "it is UTF-16 text, as PowerShell 5 writes it; save it as UTF-8", path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, "it is not UTF-8 text; save it as UTF-8", path) from None
    return _parse(text.replace("\r\n", "\n").replace("\r", "\n"), dict(environ))


def _parse(text: str, known: dict[str, str | None]) -> list[Line]:
    lines, number, end = [], 1, 0
    statement = re.compile(_STATEMENT, re.DOTALL | re.VERBOSE)  # 2 ms for who has a file
    while end < len(text):
        match = statement.match(text, end)
        assert match is not None  # noqa: S101 - it matches everywhere
        number += text.count("\n", end, match.start("text"))
        name = match["quoted"] or match["name"]
        if match["rest"]:
            lines.append(Line(number, match[0].strip(), None, None))
        elif name:
            known[name] = _value(match, known)
            lines.append(Line(number, match[0].strip(), name, known[name]))
        number += text.count("\n", match.start("text"), match.end())
        end = match.end()
    return lines


def _value(match: re.Match[str], known: Mapping[str, str | None]) -> str | None:
    gap, single, double, plain = match.group("gap", "single", "double", "plain")
    if gap is None:
        return None
    if single is not None:
        value = re.sub(r"\\([\\'])", r"\1", single)
    elif double is not None:
        value = re.sub(r"\\([\\'\"abfnrtv])", lambda escape: _ESCAPES.get(escape[1], escape[1]), double)
    else:
        value = re.sub(r"\A#.*|\s+#.*" if gap else r"\s+#.*", "", plain or "").rstrip()
    return _REFERENCE.sub(lambda reference: known.get(reference[1], reference[2]) or "", value)
