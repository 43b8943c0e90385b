"""The program that needs no Python: its spec and scripts name what is there, and its own files do what they should.

It is built and used as a whole by .ci/run.
"""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.vault import install_vault

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "deploy/program/program.py"
KEYS = ROOT / "deploy/program/keys.py"
SCRIPTS = sorted((ROOT / "deploy/windows").glob("*.ps1"))
INSTALL = ROOT / "deploy/windows/install.ps1"

SPEC = ROOT / "deploy/program/metquay-proxy.spec"
CMDLETS = {
    "Copy-Item",
    "ForEach-Object",
    "Get-ChildItem",
    "Get-Date",
    "Get-Process",
    "Get-ScheduledTask",
    "New-Item",
    "New-ScheduledTaskAction",
    "New-ScheduledTaskPrincipal",
    "New-ScheduledTaskSettingsSet",
    "New-ScheduledTaskTrigger",
    "New-TimeSpan",
    "Out-Null",
    "Pop-Location",
    "Push-Location",
    "Read-Host",
    "Register-ScheduledTask",
    "Remove-Item",
    "Select-Object",
    "Set-Location",
    "Set-StrictMode",
    "Start-ScheduledTask",
    "Start-Sleep",
    "Stop-Process",
    "Stop-ScheduledTask",
    "Test-Path",
    "Unblock-File",
    "Unregister-ScheduledTask",
    "Wait-Process",
    "Where-Object",
    "Write-Output",
    "Write-Warning",
}
"""What Windows PowerShell 5.1 and its modules have; nothing of it fetches anything."""


def executables() -> set[str]:
    """Return the names of what the spec builds for Windows."""
    return {f"{name}.exe" for name in re.findall(r'"(metquay-\w+)": (?:True|False)', SPEC.read_text(encoding="utf-8"))}


def test_the_spec_names_what_is_there() -> None:
    """Its scripts are those that are beside it, and it fetches nothing."""
    text = SPEC.read_text(encoding="utf-8")
    compile(text, str(SPEC), "exec")
    assert {path.name for path in SPEC.parent.glob("*.py")} == set(re.findall(r'"(\w+\.py)"', text))
    assert {"metquay-proxy.exe", "metquay-proxyw.exe", "metquay-keys.exe"} == executables()
    assert not re.search(r"://|urllib|requests|pip", text)
    modules = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert modules <= sys.stdlib_module_names | {"PyInstaller"}


def test_the_program_is_built_of_what_is_locked() -> None:
    """Each package comes by its hash from a lock, and the wheel is the one that was handed in."""
    text = (ROOT / ".ci/program.py").read_text(encoding="utf-8")
    (call,) = re.findall(r'"pip",.*', text)
    assert '"--no-deps", *only' in call
    assert '("--require-hashes", "--only-binary", ":all:", "--requirement")' in text
    assert {"requirements.lock", "requirements-program.lock"} == set(re.findall(r'"([\w-]+\.lock)"', text))
    assert "://" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_names_what_is_there(path: Path) -> None:
    """It calls what Windows has, or what the archive holds, and fetches nothing."""
    text = path.read_text(encoding="utf-8")
    code = re.sub(r"<#.*?#>", "", text, flags=re.DOTALL)
    assert set(re.findall(r"\b[A-Z][a-z]+-[A-Z]\w+", code)) <= CMDLETS | {"Invoke-Program"}
    assert set(re.findall(r"[\w-]+\.exe", code)) <= executables() | {"icacls.exe"}
    assert "://" not in code
    assert set(re.findall(r"\w+\.ps1", text)) <= {script.name for script in SCRIPTS}


def test_the_installation_copies_the_whole_archive() -> None:
    """Nothing of the archive is missing where it is installed: programs, what they load, licences, scripts."""
    parts = re.search(r"^\$parts = (.*)", INSTALL.read_text(encoding="utf-8"), re.MULTILINE)
    assert parts
    assert set(re.findall(r"'([^']+)'", parts[1])) == {
        *executables(),
        *(script.name for script in SCRIPTS),
        "_internal",
        "licences",
    }
    build = (ROOT / ".ci/program.py").read_text(encoding="utf-8")
    assert 'program / "licences"' in build
    assert 'ROOT / "deploy/windows"' in build


def test_the_task_runs_the_program_that_has_no_window() -> None:
    """In the folder where .env is, and where help says that the log is."""
    text = INSTALL.read_text(encoding="utf-8")
    action = re.search(r"^\$action = .*", text, re.MULTILINE)
    assert action
    assert r"""-Execute "$folder\metquay-proxyw.exe" -Argument 'serve' -WorkingDirectory $folder""" in action[0]
    assert r'"$folder\.env"' in text
    told = subprocess.run(
        [sys.executable, "-m", "metquay_proxy", "--help"], check=True, capture_output=True, text=True, timeout=30
    ).stdout
    for place in (r"%LOCALAPPDATA%\metquay-proxy", r"%ProgramFiles%\metquay-proxy", r"logs\proxy.log"):
        assert place in told
        assert place in (ROOT / "docs/windows.md").read_text(encoding="utf-8")
    for place in (r"$env:LOCALAPPDATA\metquay-proxy", r"$env:ProgramFiles\metquay-proxy"):
        for script in SCRIPTS:
            assert place in script.read_text(encoding="utf-8")


# What the program does before the commands do theirs.

STARTED = """
import os, runpy, sys
sys.executable, sys.argv = sys.argv[2], sys.argv[2:]
if sys.argv.pop(1) == "closed":
    sys.stdin = sys.stdout = sys.stderr = None
    for number in (0, 1, 2):
        os.close(number)
runpy.run_path({program!r}, run_name="__main__")
"""


def started(
    name: str, streams: str, folder: Path, *words: str, product: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run the program as the executable of that name would; without standard streams where ``closed``."""
    text = STARTED.format(program=str(PROGRAM))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("METQUAY_")}
    return subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", text, "", str(folder / name), streams, *words],
        check=False,
        cwd=folder,
        env=clean | {"PYTHONPATH": str(product)},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("streams", ["open", "closed"])
def test_without_a_window_everything_goes_to_the_log(streams: str, tmp_path: Path) -> None:
    """What is printed is in the log, below what was there; a large one is kept under another name."""
    log, previous = (tmp_path / "logs" / name for name in ("proxy.log", "previous.log"))
    assert 0 == started("metquay-proxyw", streams, tmp_path, "--version").returncode
    ended = started("metquay-proxyw", streams, tmp_path, "--rate-limit", "fast")
    assert (2, "", "") == (ended.returncode, ended.stdout, ended.stderr)
    first, *others = log.read_text(encoding="utf-8").splitlines()
    assert "metquay-proxy" == first.split()[0]
    assert ["METQUAY_RATE_LIMIT"] == [line.split()[0] for line in others if "'fast' is not a rate" in line]
    assert [log] == list(log.parent.iterdir())
    with log.open("a", encoding="utf-8") as file:
        file.truncate(4 << 20)
    assert 0 == started("metquay-proxyw", streams, tmp_path, "--version").returncode
    assert (4 << 20, f"{first}\n") == (previous.stat().st_size, log.read_text(encoding="utf-8"))
    if sys.platform != "win32":
        assert 0o600 == log.stat().st_mode & 0o777


@pytest.mark.parametrize("streams", ["open", "closed"])
@pytest.mark.slow
def test_without_a_place_for_the_log_it_runs_all_the_same(streams: str, tmp_path: Path) -> None:
    """Where the log can't be made, what is printed is lost; nothing else is."""
    (tmp_path / "logs").write_text("in the way", encoding="utf-8")
    ended = started("metquay-proxyw", streams, tmp_path, "--rate-limit", "fast")
    assert (2, "", "") == (ended.returncode, ended.stdout, ended.stderr)
    assert "in the way" == (tmp_path / "logs").read_text(encoding="utf-8")


def test_with_a_window_it_prints(tmp_path: Path) -> None:
    """The program of the command line makes no log, and waits for nobody who reads it in a terminal."""
    ended = started("metquay-proxy", "open", tmp_path, "--rate-limit", "fast")
    assert 2 == ended.returncode
    assert "'fast' is not a rate" in ended.stderr
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("waits", "code", "facts"),
    [
        pytest.param(True, 2, {}, id="a double click, and it failed"),
        pytest.param(False, 0, {}, id="a double click, and it ended well"),
        pytest.param(False, 2, {"sharing": 2}, id="from a prompt"),
        pytest.param(False, 2, {"session": 0}, id="by a service"),
        pytest.param(False, 2, {"terminal": False}, id="by a program that reads what it prints"),
        pytest.param(False, 2, {"stdin": None}, id="without standard input"),
        pytest.param(False, 2, {"platform": "linux"}, id="elsewhere"),
    ],
)
@pytest.mark.parametrize("answer", [None, EOFError(), KeyboardInterrupt()], ids=repr)
def test_a_window_that_would_close_stays(
    waits: bool,  # noqa: FBT001 - a parameter
    code: int,
    facts: dict[str, object],
    answer: BaseException | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever started it by a double click can read why it failed; nobody else is kept waiting."""
    facts = {"platform": "win32", "terminal": True, "session": 1, "sharing": 1} | facts
    module = runpy.run_path(str(PROGRAM))
    asked: list[str] = []

    def session_of(_process: int, session: SimpleNamespace) -> None:
        session.value = facts["session"]

    def ask(prompt: str) -> str:
        asked.append(prompt)
        if answer:
            raise answer
        return ""

    stream = SimpleNamespace(isatty=lambda: facts["terminal"])
    kernel = SimpleNamespace(
        GetConsoleProcessList=lambda _list, _length: facts["sharing"], ProcessIdToSessionId=session_of
    )
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
        patch.setattr(ctypes, "byref", lambda value: value)
        patch.setattr("metquay_proxy.cli.main", lambda: code)
        patch.setattr("builtins.input", ask)
        patch.setattr(sys, "stdin", facts.get("stdin", stream))
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "platform", facts["platform"])
        assert code == module["main"]()
    assert (["Press Enter to close this window."] if waits else []) == asked


def test_without_a_window_no_bug_waits_for_anybody(tmp_path: Path) -> None:
    """PyInstaller would show it in a dialog, which nobody closes where Task Scheduler runs the program."""
    (tmp_path / "metquay_proxy").mkdir()
    (tmp_path / "metquay_proxy/__init__.py").write_text("raise ValueError('a bug')", encoding="utf-8")
    ended = started("metquay-proxyw", "closed", tmp_path, "--version", product=tmp_path)
    assert (1, "", "") == (ended.returncode, ended.stdout, ended.stderr)
    assert "ValueError: a bug" in (tmp_path / "logs/proxy.log").read_text(encoding="utf-8")


def kept(monkeypatch: pytest.MonkeyPatch, held: dict[str, str], typed: str, *words: str) -> tuple[int, dict[str, str]]:
    """Run `metquay-keys` with what is typed, or comes by a pipe; return its exit code and what is held then."""
    install_vault(monkeypatch, held)
    monkeypatch.setattr(sys, "argv", ["metquay-keys", *words])
    lines = iter(typed.splitlines(keepends=True))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, readline=lambda: next(lines, "")))
    return runpy.run_path(str(KEYS))["main"](), held


ACCESS, SECRET = "METQUAY_ACCESS_KEY", "METQUAY_SECRET_KEY"


def test_keys_are_kept_renewed_and_removed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are asked for; Enter alone keeps one that is there; none is ever shown."""
    both = {ACCESS: "key-1", SECRET: "key-2"}
    assert (0, both) == kept(monkeypatch, {}, "key-1\nkey-2\n")
    assert (0, both | {SECRET: "key-3"}) == kept(monkeypatch, dict(both), "\n key-3 \n")
    assert (1, {ACCESS: "key-1"}) == kept(monkeypatch, {}, "key-1\n\n")
    printed = capsys.readouterr().out
    assert 1 == printed.count("METQUAY_ACCESS_KEY stays as it is.")
    assert "No METQUAY_SECRET_KEY is stored in Credential Manager yet." in printed
    assert "key-" not in printed
    assert (0, {}) == kept(monkeypatch, {ACCESS: "key-1"}, "", "--remove")


def test_a_key_that_is_typed_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At a console it is typed as a password is; what Ctrl-V types there is no key."""
    answers = iter(["\x16", " key-1 \n"])
    asked: list[str] = []
    install_vault(monkeypatch, {})
    monkeypatch.setattr("getpass.getpass", lambda prompt: asked.append(prompt) or next(answers))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert "key-1" == runpy.run_path(str(KEYS))["typed"](ACCESS)
    assert 2 == len(asked)
    printed = capsys.readouterr().out
    assert 2 == printed.count(ACCESS)
    assert 1 == printed.count("That is no key")
