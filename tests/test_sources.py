from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from metquay_proxy.sources import PAIR, Found, Text, place_of_env_file, read_secret
from tests.unset import unset, write
from tests.vault import install_vault

if TYPE_CHECKING:
    from collections.abc import Callable

    Write = Callable[..., Path]

NAMES = ("host", "access_key", "access_key_file", "secret_key", "secret_key_file", "retries", "max_wait")

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting reaches a test from the machine that runs it."""
    unset(monkeypatch, tmp_path)


@pytest.fixture(name="write")
def _write(tmp_path: Path) -> Write:
    """Return a function that writes a private file below the test's directory and returns its path."""
    return partial(write, tmp_path)


def search(**flags: str) -> Found:
    """Look everywhere; mounted secrets lie beside the working folder."""
    found = Found(NAMES, Path("../run-secrets").resolve())
    found.search(flags)
    return found


def test_the_order_of_precedence(monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path) -> None:
    """Flags, environment, .env, files named by a variable, credentials directory, /run/secrets."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    file = write("run-secrets/METQUAY_SECRET_KEY", "key-1\n")
    assert ("key-1", f"file {file}", file) == origin(search())
    file = write("credentials/metquay_secret_key", "key-2")
    assert ("key-2", f"file {file}", file) == origin(search())
    monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file := write("mine", "\ufeff key-3")))
    assert ("key-3", f"file {file}", file) == origin(search())
    write("current/.env", "METQUAY_SECRET_KEY=key-4\n")
    assert ("key-4", ".env", None) == origin(search())
    monkeypatch.setenv("METQUAY_SECRET_KEY", "key-5")
    assert ("key-5", "environment", None) == origin(search())
    assert ("key-6", "flag", None) == origin(search(secret_key="key-6"))  # noqa: S106 - nobody's


def origin(found: Found) -> tuple[str, str, Path | None]:
    """Return the secret key, and where it was found."""
    return found.text("secret_key"), found.texts["secret_key"].origin, found.file("secret_key")


def test_an_empty_variable_is_absent(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    """Compose files and CI set variables to nothing."""
    monkeypatch.setenv("METQUAY_RETRIES", "")
    write("current/.env", "METQUAY_RETRIES=4\nMETQUAY_MAX_WAIT=\n")
    assert {"retries": "4"} == {name: text.text for name, text in search().texts.items()}


def test_the_sdks_env_file_works_as_it_is(write: Write) -> None:
    """Names in any case, other variables beside them, a byte order mark from Windows' editor."""
    write("current/.env", "\ufeffDEBUG=1\r\nmetquay_access_key='A'\r\nMetquay_Secret_Key='S'")
    found = search()
    assert ("A", "S", []) == (found.text("access_key"), found.text("secret_key"), found.warnings)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("METQUAY_HSOT", "hunter2", "; did you mean METQUAY_HOST?"),
        ("METQUAY_SECRETKEY", "hunter2", "; did you mean METQUAY_SECRET_KEY?"),
        ("METQUAY_SANDBOX", "hunter2", ""),
        ("METQUAY_PORT", "hunter2", ""),
        ("METQUAY_KEY", "hunter2", ""),  # who follows a wrong hint puts a secret where it is shown
        ("METQUAY_PROXY_SERVICE_HOST", "10.0.0.1", None),
        ("METQUAY_PROXY_SERVICE_PORT_HTTP", "6387", None),
        ("METQUAY_SERVICE_PORT", "6387", None),
        ("METQUAY_PROXY_PORT", "tcp://10.0.0.1:6387", None),
        ("METQUAY_PROXY_PORT_6387_TCP_ADDR", "10.0.0.1", None),
        ("METQUAY_PORT_6387_TCP", "tcp://10.0.0.1:6387", None),
    ],
)
def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, hint: str | None) -> None:
    """It is told with the nearest known one, never with its value; Kubernetes' own are nobody's mistake."""
    monkeypatch.setenv(name, value)
    told = [] if hint is None else [f"{name} (from environment) is not a setting of this proxy{hint}"]
    assert told == search().warnings


def test_an_unknown_file(write: Write) -> None:
    """It is told with its folder, unless it is nobody's business."""
    folder = write("run-secrets/METQUAY_HSOT", "hunter2").parent
    write("run-secrets/other", "x")
    told = f"METQUAY_HSOT (from {folder}) is not a setting of this proxy; did you mean METQUAY_HOST?"
    assert [told] == search().warnings


@posix_only
def test_a_secret_that_everyone_can_read(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    """It is told, but not for those that an engine mounts: their modes are its own."""
    write("run-secrets/metquay_access_key", "A").chmod(0o444)
    monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file := write("key", "S")))
    assert [] == search().warnings
    file.chmod(0o644)
    told = f"{file}, which contains METQUAY_SECRET_KEY, can be read by every user: chmod 600 {file}"
    assert [told] == search().warnings


def test_a_second_key_that_is_not_used(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    """It is told, where it differs: else a rotated key seems to have no effect."""
    used = "METQUAY_SECRET_KEY (from environment) is used, and"
    monkeypatch.setenv("METQUAY_ACCESS_KEY", "A")
    monkeypatch.setenv("METQUAY_SECRET_KEY", "S")
    monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", "key")
    assert [f"{used} METQUAY_SECRET_KEY_FILE is not"] == search().remarks
    monkeypatch.delenv("METQUAY_SECRET_KEY_FILE")
    env = write("current/.env", "METQUAY_ACCESS_KEY=A\nMETQUAY_SECRET_KEY=another\n")
    file = write("run-secrets/METQUAY_SECRET_KEY", "another")
    assert [f"{used} another one in {env}, line 2 is not", f"{used} {file} is not"] == search().remarks
    monkeypatch.delenv("METQUAY_SECRET_KEY")
    env.unlink()
    monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file))
    assert ([], []) == (search().remarks, search().warnings)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("set METQUAY_HOST=hunter2", "METQUAY_HOST"),
        ("SETX METQUAY_SECRET_KEY hunter2", "METQUAY_SECRET_KEY"),
        ('$env:METQUAY_SECRET_KEY="hunter2"', "METQUAY_SECRET_KEY"),
        ("METQUAY_SECRET_KEY:hunter2==", "METQUAY_SECRET_KEY"),
        ('"METQUAY_HOST": "hunter2",', "METQUAY_HOST"),
        ("METQUAY_HOST hunter2", "METQUAY_HOST"),
        ("metquay_max_wait", "METQUAY_MAX_WAIT"),
        ("METQUAY RETRIES=hunter2", "NAME"),
        ("- METQUAY_HOST=hunter2", "METQUAY_HOST"),
        ("METQUAY-HOST=hunter2", "NAME"),
        ('METQUAY_SECRET_KEY="hunter2', "METQUAY_SECRET_KEY"),
        ("METQUAY_SECRET_KEY='hunter2'2", "METQUAY_SECRET_KEY"),
        ("if [ -f hunter2 ]; then", "NAME"),
        *[(line, "") for line in ("export OTHER=hunter2", "OTHER", "my-other.name=hunter2", "METQUAY_MAX_WAIT=")],
        ("METQUAY_ACCESS_KEY", ""),
    ],
)
def test_a_line_of_env_that_is_no_setting(monkeypatch: pytest.MonkeyPatch, write: Write, line: str, name: str) -> None:
    """It is told with folder, number and what it should be, never with its value; a bare name is the system's."""
    monkeypatch.setenv("METQUAY_ACCESS_KEY", "A")
    file = write("current/.env", f"\nA='1\n2'\n# ours\n{line}\n")
    why = "it is not of the form NAME=value .is there a word or a symbol before the name.*"
    assert len(told := search().warnings) == bool(name)
    assert all(re.fullmatch(f"{file}, line 5, is ignored: {why}; write {name}=value", line) for line in told)


def test_a_folder_of_secrets_that_cannot_be_listed(write: Write) -> None:
    """It is told: the proxy may have all it needs without it."""
    file = write("run-secrets", "no directory")
    assert search().warnings[0].startswith(f"{file} was not searched for secrets: ")


def test_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is not told: who mistook the one setting for the other has put the key itself there."""
    for text in ("bad-secret-0123456789", "x" * 5000, "bad\0secret"):
        found = search(secret_key_file=text)
        (name, why) = found.problems["secret_key"]
        assert ("secret_key_file", True) == (name, why.startswith("does not name an existing file"))
        assert text not in why
    monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", "none")
    assert [] == search().warnings


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file {} is empty"),
        (b" \r\n", "the file {} is empty"),
        (b"\xff\xfeh\x00", "{} is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_a_file_that_holds_no_secret(write: Write, content: bytes, complaint: str) -> None:
    """The one problem names it; that the secret is missing is none."""
    file = write("key", content)
    assert {"secret_key": ("secret_key", complaint.format(file))} == search(secret_key_file=str(file)).problems


def test_a_secret_with_what_is_around_it(write: Write) -> None:
    """Blanks around it are no part of it, unless somebody asks how the file ends."""
    file = write("key", "\ufeff S\r\n")
    assert ("S", " S\r\n") == (read_secret(file), read_secret(file, whole=True))


def test_an_unusable_env_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one problem; PowerShell writes UTF-16 unless told otherwise."""
    file = write("current/.env", "METQUAY_RETRIES=1".encode("utf-16"))
    why = "cannot be read: it is not UTF-8 text (PowerShell 5 writes UTF-16); save it as UTF-8"
    assert {".env": (str(file), why)} == search().problems

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", refuse)
    assert {".env": (str(file), "cannot be read: Permission denied")} == search().problems


@pytest.mark.parametrize("name", [".env.txt", "env.txt", "ENV", ".env.txt.txt", ".env ", "_env"])
def test_a_file_that_is_nearly_env(write: Write, name: str) -> None:
    """Windows' editor adds .txt, and its file manager does not show that."""
    write(f"current/{name}", "METQUAY_HOST=lab.metquay.co\n")
    write("current/environment.txt", "")
    assert f"{Path.cwd()}/.env (there is none; rename {name!r} if it is meant to be that)" == place_of_env_file()


def test_no_file_in_the_place_of_env() -> None:
    """Docker makes a folder of a file that it is to mount and that is not there."""
    here = Path.cwd() / ".env"
    assert f"{here} (there is none)" == place_of_env_file()
    here.mkdir()
    assert f"{here} (which is a folder: put a file in its place)" == place_of_env_file()
    here.rmdir()
    here.touch()
    assert str(here) == place_of_env_file()


@posix_only
def test_a_folder_that_is_gone() -> None:
    """A service manager may start the program there."""
    Path.cwd().rmdir()
    assert ".env" == place_of_env_file()


class TestCredentialManager:
    """Where Windows keeps passwords: the last place that is asked, and only there, and only for the key pair."""

    HELD: ClassVar = {"METQUAY_ACCESS_KEY": "key-1", "METQUAY_SECRET_KEY": "key-2", "METQUAY_HOST": "lab.metquay.co"}

    def test_it_comes_last(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """What is found elsewhere is not asked for."""
        monkeypatch.setattr(sys, "platform", "win32")
        install_vault(monkeypatch, self.HELD)
        place = ("Credential Manager", "the Credential Manager", None)
        assert {name: Text(f"key-{number}", *place) for number, name in enumerate(PAIR, 1)} == search().texts
        write("current/.env", "METQUAY_SECRET_KEY=key-3\n")
        found = search()
        assert ("key-1", "key-3") == (found.text("access_key"), found.text("secret_key"))
        assert [] == found.warnings == found.remarks

    @pytest.mark.parametrize("platform", ["linux", "darwin"])
    def test_other_systems_have_none(self, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The library may be installed there for something else."""
        monkeypatch.setattr(sys, "platform", platform)
        install_vault(monkeypatch, self.HELD)
        assert {} == search().texts

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is an extra."""
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        assert ({}, {}) == (search().texts, search().problems)

    def test_what_windows_refuses_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The key is not found, and why is in the one line about it; a file that is missing is told as such."""
        monkeypatch.setattr(sys, "platform", "win32")
        install_vault(monkeypatch, self.HELD, OSError("no logon session"))
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", "nowhere")
        found = search()
        assert "cannot be read from the Credential Manager: no logon session" == found.problems["access_key"][1]
        assert "does not name an existing file" in found.problems["secret_key"][1]
        assert not {"access_key", "secret_key"} & set(found.texts)
