from __future__ import annotations

import logging
import os
import random
from typing import TYPE_CHECKING

import pytest
from dotenv import dotenv_values

from metquay_proxy.environment import Line, read_env_file, variables

if TYPE_CHECKING:
    from pathlib import Path

PIECES = ["METQUAY_LISTEN", "A", "B", "=", "=", "=", "'", '"', "\\", "n", "#", " ", "  ", "\n", "\n", "\n", "\r\n"]
PIECES += ["\t", "export ", "${A}", "${B:-x}", "${OUTER}", "$", "x", "y:1", "'B'", "\ufeff", "\u00a0", "\v", "é", "${"]
PIECES += ["\r", "}", ":-", "\\'", '\\"', "\\\\", "\x85"]


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the file, beside an environment that a file may refer to."""
    monkeypatch.setenv("OUTER", "outer")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path / ".env"


def read(file: Path) -> dict[str, str | None]:
    """Return what our reader makes of the file."""
    return {line.name: line.value for line in read_env_file(str(file), os.environ) if line.name is not None}


@pytest.mark.parametrize(
    "text",
    [
        "METQUAY_LISTEN=localhost:1",
        "export METQUAY_LISTEN = localhost:1  # why",
        "  METQUAY_LISTEN='localhost:1' # why",
        'METQUAY_LISTEN="localhost:1,\nlocalhost:2"',
        "'METQUAY_LISTEN'=localhost:1\r\nMETQUAY_HOST=x\r\n",
        "METQUAY_LISTEN=localhost:1#2",
        "METQUAY_LISTEN= # nothing",
        "METQUAY_LISTEN=#2",
        "METQUAY_LISTEN",
        "METQUAY_LISTEN='unclosed",
        "METQUAY_LISTEN='a' b",
        "#METQUAY_LISTEN=localhost:1",
        "X_METQUAY_LISTEN=localhost:1",
        "METQUAY_LISTEN=localhost:1\nMETQUAY_LISTEN=localhost:2",
        "METQUAY_LISTEN=localhost:1\nMETQUAY_LISTEN=",
        "METQUAY_LISTEN=localhost:1\nMETQUAY_LISTEN",
        "HOST=box\nMETQUAY_LISTEN=${HOST}:${PORT:-99}",
        "METQUAY_LISTEN=${OUTER}:1",
        "OUTER=inner\nMETQUAY_LISTEN=${OUTER}:1",
        "METQUAY_LISTEN=${NOWHERE}:1",
        "A\nMETQUAY_LISTEN=${A:-default}:1",
        "A='\nMETQUAY_LISTEN=localhost:1\n'\nMETQUAY_LISTEN=localhost:2",
        r"""METQUAY_LISTEN="unix:/a\"b\\c\td" """,
        r"""METQUAY_LISTEN='unix:/a\'b\\c\td' """,
        "\ufeffMETQUAY_LISTEN=localhost:1",
        "\n\n export # why\nMETQUAY_LISTEN=localhost:1",
        "",
        "\n",
    ],
)
def test_an_env_file_is_read_as_python_dotenv_reads_it(env_file: Path, text: str) -> None:
    """The vendor's SDK reads the same file with that: quoting, comments, ``export``, escapes, references."""
    env_file.write_bytes(text.encode())
    assert dotenv_values(env_file) == read(env_file)


@pytest.mark.slow
def test_random_files_are_read_as_python_dotenv_reads_them(env_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So are 5,000 files of pieces that mean something, put together by chance."""
    caplog.set_level(logging.CRITICAL)  # python-dotenv logs each line that it can't read
    chance = random.Random(13)  # noqa: S311 - no secret
    for _ in range(5000):
        text = "".join(chance.choices(PIECES, k=chance.randrange(30)))
        env_file.write_bytes(text.encode())
        assert dotenv_values(env_file) == read(env_file), repr(text)


def test_each_statement_has_its_number_and_its_text(env_file: Path) -> None:
    """Those that can't be read too, without a name; comments and blank lines are none."""
    env_file.write_text("# why\n\nA=1 # one\nset B=2\n\nC='\n3'\nD=\"open\nE\n")
    assert [
        Line(3, "A=1 # one", "A", "1"),
        Line(4, "set B=2", None, None),
        Line(6, "C='\n3'", "C", "\n3"),
        Line(8, 'D="open', None, None),
        Line(9, "E", "E", None),
    ] == read_env_file(str(env_file), {})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("METQUAY_HOST=lab\n".encode("utf-16"), "it is UTF-16 text, as PowerShell 5 writes it; save it as UTF-8"),
        ("METQUAY_HOST=lab\n".encode("utf-16-le"), "it is UTF-16 text, as PowerShell 5 writes it; save it as UTF-8"),
        ("A=é\n".encode("latin-1"), "it is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_another_encoding_is_an_error(env_file: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, why: str) -> None:
    """Its text says what to do, and it names the folder."""
    env_file.write_bytes(data)
    monkeypatch.chdir(env_file.parent)
    with pytest.raises(OSError, match="UTF-8") as caught:
        read_env_file(".env", {})
    assert (why, str(env_file)) == (caught.value.strerror, caught.value.filename)


def test_no_file_and_a_folder_have_no_lines(env_file: Path) -> None:
    """Who looks for a virtual environment called .env, or has no file, is told nothing."""
    assert [] == read_env_file(str(env_file), {})
    env_file.mkdir()
    assert [] == read_env_file(str(env_file), {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
def test_a_fifo_is_read(env_file: Path) -> None:
    """Password managers mount one in the place of the file."""
    os.mkfifo(env_file)
    end = os.open(env_file, os.O_RDWR)  # so that neither side waits for the other
    os.write(end, b"A=1\n")
    import threading  # noqa: PLC0415 - needed here alone

    threading.Timer(0.05, os.close, (end,)).start()
    assert {"A": "1"} == read(env_file)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([("METQUAY_LISTEN", "a"), ("HOME", "b"), ("metquay_tls_CERT", "c")], {"listen": "a", "tls_cert": "c"}),
        ([("METQUAY_LISTEN", "a"), ("metquay_listen", "b")], {"listen": "b"}),
        ([("METQUAY_LISTEN", "a"), ("metquay_listen", "")], {"listen": "a"}),
        ([("METQUAY_LISTEN", "a"), ("METQUAY_LISTEN", "")], {}),
        ([("METQUAY_LISTEN", "a"), ("METQUAY_LISTEN", None)], {}),
        ([(None, None), ("METQUAY_", "a"), ("METQUAY_LISTEN:a", "b"), ("$env:METQUAY_LISTEN", "c")], {}),
    ],
)
def test_names_count_in_any_case_and_empty_values_not(
    found: list[tuple[str | None, str | None]], expected: dict[str, str]
) -> None:
    """The last one wins, and what is no name counts as none: it may hold a value."""
    assert expected == variables(found)
