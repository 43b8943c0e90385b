"""What the environment and ``.env`` say: one reader of both, for the settings and for ``health``.

Owns the rule that makes values of names: METQUAY_ names count in any case, what is empty is absent, the last one wins.
Knows no setting. ``health`` has 60 ms for everything, so it must not import what is slow.

Facts: the vendor's SDK reads the same ``.env`` with python-dotenv, whose parser (without what it logs around it) tells
the number of each line, and which of them it could not read. To import it costs ``health`` 18 ms, but only where there
is a file. PowerShell 5 writes UTF-16 with ``>``.
"""

from __future__ import annotations

import errno
import os
import re

TYPE_CHECKING = False  # to import `typing` costs `health` 8 ms
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from dotenv.parser import Binding

PREFIX: Final = "METQUAY_"
ENV_FILE: Final = ".env"

_OURS: Final = re.compile(PREFIX + r"(\w+)", re.IGNORECASE)


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


def find() -> dict[str, str]:
    """Return the texts of all METQUAY_ variables as ``variables`` does, from the environment, else from ``.env``.

    Raises ``OSError`` where that file is there and can't be read.
    """
    return variables((line.key, line.value) for line in read_env_file(ENV_FILE)) | variables(os.environ.items())


def read_env_file(path: str) -> list[Binding]:
    """Read a ``.env`` file, ``${NAME:-default}`` filled in from earlier lines, then from the environment.

    Comments have no ``key``; what can't be read has an ``error``. No file, or a folder, has no lines. Raises
    ``OSError``, also where it is no text in UTF-8.
    """
    if not os.path.exists(path) or os.path.isdir(path):  # noqa: PTH110, PTH112 - pathlib costs 10 ms here
        return []
    import io  # noqa: PLC0415 - only who has a file pays for loading it

    from dotenv.parser import parse_stream  # noqa: PLC0415 - as above
    from dotenv.variables import parse_variables  # noqa: PLC0415 - as above

    path = os.path.abspath(path)  # noqa: PTH100 - an error names the folder
    try:
        with open(path, encoding="utf-8-sig") as file:  # noqa: PTH123 - pathlib costs 10 ms here
            text = file.read()
        if "\0" in text:
            raise UnicodeError
    except UnicodeError:
        why = "it is not UTF-8 text (PowerShell 5 writes UTF-16); save it as UTF-8"
        raise OSError(errno.EILSEQ, why, path) from None
    lines, known = list(parse_stream(io.StringIO(text))), dict[str, str | None](os.environ)
    for number, line in enumerate(lines):
        if line.key is not None:
            known[line.key] = line.value and "".join(part.resolve(known) for part in parse_variables(line.value))
            lines[number] = line._replace(value=known[line.key])
    return lines
