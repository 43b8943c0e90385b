from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from dotenv import dotenv_values

from metquay_proxy.environment import find, read_env_file, variables

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the file, beside an environment that a file may refer to."""
    monkeypatch.setenv("OUTER", "outer")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path / ".env"


def read(file: Path) -> dict[str, str | None]:
    """Return what our reader makes of the file."""
    return {line.key: line.value for line in read_env_file(str(file)) if line.key is not None}


@pytest.mark.parametrize(
    "text",
    [
        "export METQUAY_LISTEN = localhost:1  # why",
        "'METQUAY_LISTEN'=localhost:1\r\nMETQUAY_HOST=x\r\n",
        "METQUAY_LISTEN",
        "METQUAY_LISTEN='unclosed",
        "METQUAY_LISTEN=localhost:1\nMETQUAY_LISTEN=",
        "METQUAY_LISTEN=localhost:1\nMETQUAY_LISTEN",
        "HOST=box\nMETQUAY_LISTEN=${HOST}:${PORT:-99}",
        "METQUAY_LISTEN=${OUTER}:1",
        "OUTER=inner\nMETQUAY_LISTEN=${OUTER}:1",
        "METQUAY_LISTEN=${NOWHERE}:1",
        "A\nMETQUAY_LISTEN=${A:-default}:1",
        "A='\nMETQUAY_LISTEN=localhost:1\n'\nMETQUAY_LISTEN=localhost:2",
        "\ufeffMETQUAY_LISTEN=localhost:1",
        "",
    ],
)
def test_an_env_file_is_read_as_python_dotenv_reads_it(env_file: Path, text: str) -> None:
    """The vendor's SDK does it so; ours alone is what is made of encodings, line ends and references."""
    env_file.write_bytes(text.encode())
    assert dotenv_values(env_file) == read(env_file)


@pytest.mark.parametrize("data", ["A=lab\n".encode("utf-16"), "A=lab\n".encode("utf-16-le"), "A=é\n".encode("latin-1")])
def test_another_encoding_is_an_error(env_file: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Its text says what to do, and it names the folder."""
    env_file.write_bytes(data)
    monkeypatch.chdir(env_file.parent)
    with pytest.raises(OSError, match="UTF-8") as caught:
        read_env_file(".env")
    why = "it is not UTF-8 text (PowerShell 5 writes UTF-16); save it as UTF-8"
    assert (why, str(env_file)) == (caught.value.strerror, caught.value.filename)


def test_no_file_and_a_folder_have_no_lines(env_file: Path) -> None:
    """Who looks for a virtual environment called .env, or has no file, is told nothing."""
    assert [] == read_env_file(str(env_file))
    env_file.mkdir()
    assert [] == read_env_file(str(env_file))


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


@pytest.mark.parametrize(
    ("environ", "file", "expected"),
    [
        ({}, None, None),
        ({"METQUAY_LISTEN": "a:1"}, "METQUAY_LISTEN=b:2", "a:1"),
        ({"METQUAY_LISTEN": ""}, "METQUAY_LISTEN=b:2", "b:2"),
        ({"metquay_listen": "a:1"}, None, "a:1"),
        ({}, "metquay_listen=b:2", "b:2"),
        ({}, "METQUAY_LISTEN=", None),
    ],
)
def test_where_the_proxy_listens_is_found(
    env_file: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], file: str | None, expected: str | None
) -> None:
    """The environment wins over .env, and what is empty is absent: as for the proxy itself."""
    if file is not None:
        env_file.write_text(file)
    monkeypatch.chdir(env_file.parent)
    monkeypatch.setattr(os, "environ", environ)
    assert expected == find().get("listen")
