from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy import __version__, app, cli, health
from metquay_proxy.settings import HEADINGS, VARIABLES, flag, variable
from tests.unset import ACCOUNT, unset

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from metquay_proxy.settings import Settings


SEE_SANDBOX = "see metquay-proxy sandbox --help"
READABLE = "since every user can read a command line"
CONTAINS = "to the path of a file that contains it"

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting reaches a test from the machine that runs it."""
    unset(monkeypatch, tmp_path)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what is required."""
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Return what the server is started with; it ends at once with exit code 0."""
    starts: list[Settings] = []

    def run(settings: Settings, _welcome: object, *, warnings: Sequence[str]) -> int:
        starts.append(settings)
        assert [] == list(warnings)
        return 0

    monkeypatch.setattr(app, "run", run)
    return starts


@contextmanager
def listening(answer: bytes) -> Iterator[int]:
    """Give one answer to one connection on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


class TestServe:
    @pytest.mark.parametrize("words", [[], ["serve"]])
    @pytest.mark.usefixtures("account")
    def test_it_is_what_happens_without_a_command(self, started: list[Settings], words: list[str]) -> None:
        """Also when the first word is a flag."""
        assert 0 == cli.main([*words])
        assert 0 == cli.main([*words, "--retries", "7", "--read-only", "--max-wait=3"])
        first, second = started
        assert not first.sandbox
        assert (2, False, 20.0) == (first.retries, first.read_only, first.max_wait)
        assert (7, True, 3.0) == (second.retries, second.read_only, second.max_wait)

    def test_the_sandbox_is_a_flag(self, started: list[Settings]) -> None:
        """With it nothing else is needed."""
        assert 0 == cli.main(["--sandbox"])
        assert [True] == [settings.sandbox for settings in started]

    @pytest.mark.usefixtures("account")
    def test_a_switch_can_be_switched_off(self, monkeypatch: pytest.MonkeyPatch, started: list[Settings]) -> None:
        """A flag wins over a variable in both directions."""
        monkeypatch.setenv("METQUAY_READ_ONLY", "true")
        assert 0 == cli.main(["--no-read-only"])
        assert not started[0].read_only

    def test_wrong_settings_are_one_line_each(
        self, monkeypatch: pytest.MonkeyPatch, started: list[Settings], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Exit code 2, the server is not started, and what may be the cause is told first."""
        monkeypatch.setenv("METQUAY_HSOT", "hunter2")
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", "hunter2")
        assert 2 == cli.main(["--max-wait", "x"])
        captured = capsys.readouterr()
        assert [
            "warning",
            "METQUAY_HOST (--host)",
            "METQUAY_ACCESS_KEY",
            "METQUAY_SECRET_KEY",
            "METQUAY_CLIENT_KEYS (found in environment)",
            "METQUAY_MAX_WAIT (--max-wait)",
        ] == [line.partition(":")[0] for line in captured.err.splitlines()]
        assert "hunter2" not in captured.err
        assert ("", []) == (captured.out, started)

    @pytest.mark.usefixtures("account")
    def test_what_the_system_refuses_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With the file that it is about."""

        def run(*_: object, **__: object) -> int:
            raise OSError(errno.EIO, "input/output error", "file")

        monkeypatch.setattr(app, "run", run)
        assert 1 == cli.main([])
        assert "metquay-proxy: input/output error: file\n" == capsys.readouterr().err

    @pytest.mark.usefixtures("account")
    def test_ctrl_c_before_the_server_listens_for_it_is_a_clean_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No traceback; but a question that was broken off was not answered with yes."""

        def interrupt(*_: object, **__: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(app, "run", interrupt)
        monkeypatch.setattr(health, "check", interrupt)
        assert 0 == cli.main([])
        assert 1 == cli.main(["health"])


class TestMovedAway:
    @pytest.mark.parametrize(
        ("variables", "flags", "expected"),
        [
            ({}, [], []),
            ({}, ["--listen", "0.0.0.0:6387"], []),
            (
                {},
                ["--listen", "localhost:7000"],
                ['asks elsewhere: localhost:6387.*-e "METQUAY_LISTEN=localhost:7000"'],
            ),
            ({}, ["--listen", "localhost:0"], ["asks elsewhere: localhost:6387.*the port that is printed"]),
            ({"LISTEN": "0.0.0.0:6387"}, ["--listen", "0.0.0.0:7000"], ['asks elsewhere: 0.0.0.0:6387.*="?']),
            ({"LISTEN": "localhost:7000"}, [], []),
            ({"LISTEN": "localhost:7000"}, ["--listen", "localhost:8000,localhost:7000"], []),
            ({"LISTEN": "nonsense"}, ["--listen", "localhost:7000"], ["asks elsewhere: nonsense"]),
            ({}, ["--tls-cert", "s.pem", "--tls-key", "s.pem"], ['in clear text.*-e "METQUAY_TLS_CERT=s.pem"']),
            ({"TLS_CERT": "s.pem"}, ["--tls-cert", "s.pem", "--tls-key", "s.pem"], []),
        ],
    )
    def test_a_flag_that_health_does_not_see(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], flags: list[str], expected: list[str]
    ) -> None:
        """One warning for each, at the start, with the variable that both would see."""
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path("s.pem")
        for name, value in variables.items():
            monkeypatch.setenv(f"METQUAY_{name}", value)
        told: list[str] = []
        monkeypatch.setattr(app, "run", lambda *_, warnings, **__: told.extend(warnings) or 0)
        assert 0 == cli.main(["--sandbox", *flags])
        assert len(expected) == len(told)
        for pattern, line in zip(expected, told, strict=True):
            assert re.search(pattern, line), line


ROOT = Path(__file__).parent.parent

FULL_LOG = """
import resource
from metquay_proxy import cli
cli.main(["--version"])
from metquay_proxy.log import configure_logging, log
configure_logging("info", "json")
for _ in range(100):
    log.info("x" * 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(50_000):
    log.info("x" * 1000)
raise SystemExit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 6 * 1024)
"""

BROKEN = [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"]


@posix_only
class TestStreams:
    @pytest.mark.parametrize("streams", BROKEN)
    @pytest.mark.parametrize(
        ("words", "code"),
        [
            ("--version", 0),
            ("health --listen 127.0.0.1:1", 1),
            ("nonsense", 2),
            *[
                pytest.param(words, code, marks=pytest.mark.slow)
                for words, code in (("settings", 2), ("--help", 0), ("check --sandbox", 0), ("settings --x", 2))
            ],
        ],
    )
    def test_a_command_whose_streams_are_closed_or_full(
        self, tmp_path: Path, streams: str, words: str, code: int
    ) -> None:
        """It does its work, and ends with the code that says how that went; what can be said is said."""
        ended = shell(f"{words} {streams}", tmp_path)
        assert code == ended.returncode
        assert not re.search("Traceback|Exception|Errno", ended.stdout + ended.stderr)

    @pytest.mark.slow
    @pytest.mark.parametrize("streams", BROKEN)
    @pytest.mark.parametrize("words", ["serve --sandbox", "sandbox"])
    def test_a_server_whose_streams_are_closed_or_full(self, tmp_path: Path, streams: str, words: str) -> None:
        """It serves, no client gets what was meant for a stream, and it ends with 0."""
        port = free_port()
        popen = subprocess.Popen(  # noqa: S602 - our own words
            f"exec {sys.executable} -m metquay_proxy {words} --listen localhost:{port} {streams}",
            shell=True,
            cwd=tmp_path,
        )
        try:
            wait = time.monotonic() + 10
            while cli.main(["health", "--listen", f"localhost:{port}"]) and time.monotonic() < wait:
                time.sleep(0.05)
                if words == "sandbox":
                    with contextlib.suppress(OSError):
                        socket.create_connection(("127.0.0.1", port)).close()
                        break
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"GET /-/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer = client.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 404 ")
            assert b"listens" not in answer
        finally:
            popen.terminate()
        assert 0 == popen.wait(20)

    @pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that say whether they are full")
    @pytest.mark.parametrize("words", ["serve --sandbox", "sandbox"])
    @pytest.mark.slow
    def test_a_server_whose_output_nobody_reads(self, tmp_path: Path, words: str) -> None:
        """A pipe that is full stops neither the start nor the end."""
        port = free_port()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        command = [sys.executable, "-m", "metquay_proxy", *words.split(), "--listen", f"localhost:{port}"]
        popen = subprocess.Popen(command, cwd=tmp_path, stdout=writer, stderr=subprocess.DEVNULL)  # noqa: S603 - our own
        try:
            answered = b""
            until = time.monotonic() + 10
            while not answered and time.monotonic() < until:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as client:
                    client.sendall(b"GET /-/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    answered = client.recv(13)
            assert b"HTTP/1.1 404 " == answered
        finally:
            popen.terminate()
            os.close(writer)
        assert 0 == popen.wait(20)
        os.close(reader)

    @pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, and kibibytes")
    @pytest.mark.slow
    def test_a_log_that_is_full_is_not_kept(self, tmp_path: Path) -> None:
        """Of what could not be written 4,000 lines gather in memory, and no more."""
        (tmp_path / "log.py").write_text(FULL_LOG)
        words = f"{sys.executable} log.py 2>/dev/full"
        run = subprocess.run(words, shell=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)  # noqa: S602 - our own words
        assert 0 == run.returncode

    def test_streams_that_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As services and pythonw have them."""
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", None)
        assert 0 == cli.main(["--version"])
        assert 2 == cli.main(["nonsense"])

    def test_a_stream_that_was_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Python's own object for it."""
        closed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", closed)
        assert 0 == cli.main(["--version"])
        closed.close()
        assert 0 == cli.main(["--version"])

    @pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
    @pytest.mark.slow
    def test_any_encoding(self, tmp_path: Path, encoding: str) -> None:
        """What an encoding lacks is written as an escape."""
        more = {"PYTHONIOENCODING": encoding, "METQUAY_CA_BUNDLE": "日/ca.pem"}
        for words, code in (("settings", 2), ("check", 1)):
            ended = shell(words, tmp_path, **more)
            assert code == ended.returncode
            assert r"\u65e5/ca.pem" in ended.stdout
            assert "Traceback" not in ended.stderr


def shell(words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program by a shell, which can close its streams."""
    return subprocess.run(  # noqa: S602 - our own words
        f"{sys.executable} -m metquay_proxy {words}",
        shell=True,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class TestUsage:
    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["srve"], "unknown command srve, did you mean serve?; see metquay-proxy --help"),
            (["xyzzy"], "unknown command xyzzy; see metquay-proxy --help"),
            (["--listne", "x"], "unknown flag --listne, did you mean --listen?; see metquay-proxy serve --help"),
            (["serve", "--listne=x"], "unknown flag --listne, did you mean --listen?; see metquay-proxy serve --help"),
            (["--lis", "x"], "unknown flag --lis, did you mean --listen?; see metquay-proxy serve --help"),
            (["-khunter2"], "unknown flag -k; see metquay-proxy serve --help"),
            (["--listen"], "argument --listen: expected one argument; see metquay-proxy serve --help"),
            (["serve", "hunter2"], "it accepts nothing but flags; see metquay-proxy serve --help"),
            (
                ["--secret-key", "hunter2"],
                f"there is no --secret-key, {READABLE}: set METQUAY_SECRET_KEY_FILE {CONTAINS}",
            ),
            (
                ["settings", "--client_keys=hunter2"],
                f"there is no --client_keys, {READABLE}: set METQUAY_CLIENT_KEYS_FILE {CONTAINS}",
            ),
            (["health", "--raedy"], "unknown flag --raedy, did you mean --ready?; see metquay-proxy health --help"),
            (["health", "--wait", "x"], "argument --wait: invalid float value: 'x'; see metquay-proxy health --help"),
            (
                ["health", "--wait", "nan"],
                "argument --wait: give a number of seconds, 0 or more; see metquay-proxy health --help",
            ),
            (
                ["sandbox", "--reset", "x"],
                f"--reset x is wrong: give a rate from 0 (never) to 1 (always), as in --reset 0.1; {SEE_SANDBOX}",
            ),
            (
                ["sandbox", "--listen", "localhost:1,localhost:2"],
                "--listen takes one host and port here; see metquay-proxy sandbox --help",
            ),
        ],
    )
    def test_a_mistake_is_one_line(self, capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
        """Exit code 2, the nearest word, and no value that may be a secret."""
        assert 2 == cli.main(words)
        captured = capsys.readouterr()
        assert f"metquay-proxy: {line}\n" == captured.err
        assert "" == captured.out

    @pytest.mark.parametrize("words", [["--help"], ["serve", "-h"], ["settings", "--help"]])
    def test_help_tells_each_setting(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        """Variable, flag, default and unit; secrets with their variables alone."""
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert 0 == caught.value.code
        printed = capsys.readouterr().out
        heads = re.findall(r"^(\w[\w ]*):$", printed, re.MULTILINE)
        assert ["options", *HEADINGS.values()] == [head for head in heads if head != "commands"]
        assert ["host", "client_key", "listen", "allowed_hosts", "rate_limit"] == list(HEADINGS)[:5]
        text = " ".join(printed.split())
        for name in VARIABLES:
            assert re.search(rf"\b{variable(name)}\b", text), name
            assert flag(name) is None or f"{flag(name)} " in text or f"{flag(name)}, " in text
        assert "--max-wait SECONDS seconds that" in text
        assert "[env: METQUAY_MAX_WAIT] (default: 20)" in text
        assert not re.search(r"--(secret|access|client)-keys? ", text)

    def test_help_tells_each_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        """And each command has its own."""
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        text = capsys.readouterr().out
        for name, (_, summary) in cli.COMMANDS.items():
            assert f"  {name:10}{summary}\n" in text
            with pytest.raises(SystemExit):
                cli.main([name, "--help"])
            assert f"usage: metquay-proxy {name}" in capsys.readouterr().out.replace("[serve]", "serve")

    def test_the_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        """In one line."""
        assert 0 == cli.main(["--version"])
        assert f"metquay-proxy {__version__}\n" == capsys.readouterr().out


class TestSettings:
    @pytest.mark.usefixtures("account")
    def test_each_is_shown_with_its_source(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Secrets are masked."""
        Path(".env").write_text("METQUAY_RETRIES=5\n")
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", "a:0123456789abcdef\nb:0123456789abcdeX:read-only")
        monkeypatch.setenv("METQUAY_MAX_WIAT", "1")
        assert 0 == cli.main(["settings", "--read-only"])
        captured = capsys.readouterr()
        rows = {line.split()[0]: line.split()[1:] for line in captured.out.splitlines()}
        assert {variable(name) for name in VARIABLES} == set(rows)
        assert ["lab.metquay.co", "environment"] == rows["METQUAY_HOST"]
        assert ["***", "environment"] == rows["METQUAY_SECRET_KEY"]
        assert ["a:***,b:***:read-only", "environment"] == rows["METQUAY_CLIENT_KEYS"]
        assert ["5", ".env"] == rows["METQUAY_RETRIES"]
        assert ["true", "flag"] == rows["METQUAY_READ_ONLY"]
        assert ["20", "default"] == rows["METQUAY_MAX_WAIT"]
        assert ["-", "default"] == rows["METQUAY_CA_BUNDLE"]
        warning = "METQUAY_MAX_WIAT (from environment) is not a setting of this proxy; did you mean METQUAY_MAX_WAIT?"
        assert f"warning: {warning}\n" == captured.err

    @pytest.mark.usefixtures("account")
    def test_programs_get_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        """By variable."""
        assert 0 == cli.main(["settings", "--json"])
        shown = json.loads(capsys.readouterr().out)
        assert {"value": "...AAAA", "source": "environment"} == shown["METQUAY_ACCESS_KEY"]
        assert {"value": None, "source": "default"} == shown["METQUAY_AUDIT_LOG"]

    def test_wrong_ones_are_shown_too(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One looks here because something is wrong."""
        monkeypatch.setenv("METQUAY_RETRIES", "many")
        assert 2 == cli.main(["settings"])
        captured = capsys.readouterr()
        assert re.search(r"METQUAY_RETRIES +many +environment", captured.out)
        assert "METQUAY_RETRIES (--retries, found in environment): 'many' is not" in captured.err
        assert "METQUAY_HOST (--host): not set" in captured.err


class TestHealth:
    @pytest.mark.parametrize(("flags", "word"), [([], "alive"), (["--ready"], "ready")])
    def test_well_is_one_word_and_0(self, capsys: pytest.CaptureFixture[str], flags: list[str], word: str) -> None:
        """By flag."""
        with listening(b"HTTP/1.1 200 OK\r\nServer: metquay-proxy\r\n\r\nfine") as port:
            assert 0 == cli.main(["health", "--listen", f"127.0.0.1:{port}", *flags])
        assert (f"{word}\n", "") == capsys.readouterr()

    def test_not_ready_is_one_line_and_1(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By .env; the environment would win."""
        with listening(b"HTTP/1.1 503 Busy\r\nServer: metquay-proxy\r\n\r\nnot ready\n") as port:
            Path(".env").write_text(f"METQUAY_LISTEN=127.0.0.1:{port}\n")
            assert 1 == cli.main(["health", "--ready"])
        assert re.fullmatch("not ready: .*`metquay-proxy check`.*\n", capsys.readouterr().err)
        monkeypatch.setenv("METQUAY_LISTEN", "localhost:0")
        assert 1 == cli.main(["health"])
        assert "localhost:0 leaves the port to the system" in capsys.readouterr().err

    def test_it_waits_and_speaks_tls_as_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The flags and the variables of the proxy itself."""
        asked: list[tuple[str, dict[str, object]]] = []
        monkeypatch.setattr(health, "check", lambda listen, **more: asked.append((listen, more)))
        assert 0 == cli.main(["health", "--wait", "2.5", "--ready", "--tls-cert", "cert.pem"])
        monkeypatch.setenv("METQUAY_TLS_CERT", "cert.pem")
        assert 0 == cli.main(["health", "--listen", "box:1"])
        assert [
            ("localhost:6387", {"ready": True, "tls": True, "wait": 2.5}),
            ("box:1", {"ready": False, "tls": True, "wait": 0}),
        ] == asked

    def test_a_wrong_address_is_a_wrong_setting(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Exit code 2, as for every command."""
        monkeypatch.setenv("METQUAY_LISTEN", "6387")
        assert 2 == cli.main(["health"])
        assert capsys.readouterr().err.startswith("METQUAY_LISTEN (--listen): '6387' is not a host and a port")

    def test_an_unreadable_env_file_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It names the file."""

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", ".env")

        monkeypatch.setattr(cli, "find", refuse)
        assert 1 == cli.main(["health"])
        assert "metquay-proxy: Permission denied: .env\n" == capsys.readouterr().err

    def test_it_loads_nothing_slow(self) -> None:
        """Container engines run it every few seconds: it has 60 ms."""
        arguments = ["health", "--listen", "localhost:1"]
        code = f"import sys; from metquay_proxy.cli import main; main({arguments}); print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - our words
        loaded = set(run.stdout.split())
        ours = {name for name in loaded if name.startswith("metquay_proxy.")}
        assert {f"metquay_proxy.{name}" for name in ("cli", "environment", "health", "rules", "rules.address")} == ours
        slow = (
            "aiohttp asyncio dataclasses difflib http.client ipaddress json logging pathlib pydantic pydantic_settings"
        )
        assert set() == loaded & {*slow.split(), "shutil", "ssl", "structlog", "typing"}


class TestProcess:
    def test_wrong_settings_end_without_a_traceback(self, tmp_path: Path) -> None:
        """``python -m metquay_proxy`` is the same program."""
        ended = shell("--retries x", tmp_path)
        assert 2 == ended.returncode
        assert "METQUAY_RETRIES (--retries): 'x' is not a whole number" in ended.stderr
        assert "Traceback" not in ended.stderr


BEGUN = """
import contextlib, gc, os, ssl, sys
before, usual = set(sys.modules), gc.get_threshold()
from metquay_proxy import cli
cli._welcome = lambda proxy, settings: proxy.quit.set()
cli.main(["serve", "--log-level", "error"])
"""
"""A proxy that ends as soon as it listens."""


def begun(code: str, **environment: str) -> str:
    """Return what a process prints that runs this code."""
    account = {**ACCOUNT, "METQUAY_HOST": "http://127.0.0.1:1", "METQUAY_LISTEN": "127.0.0.1:0"}
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", code],
        env=os.environ | account | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


class TestStart:
    @pytest.mark.slow
    def test_a_plain_start_loads_no_more_than_it_needs(self) -> None:
        """Beyond the libraries that the program is built on it costs its own modules, and of these those that serve."""
        bare = "import contextlib, aiohttp.web, pydantic_settings, structlog\n"
        bare += "with contextlib.suppress(ImportError): import uvloop"
        loaded = set(begun(bare + BEGUN + "print(*set(sys.modules) - before)").split())
        ours = {name for name in loaded if name.partition(".")[0] == "metquay_proxy"}
        package = Path(cli.__file__).parent
        files = [path.relative_to(package.parent) for path in package.rglob("*.py")]
        modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
        assert {"__main__", "check", "health", "replicas", "sandbox"} == {name.split(".")[1] for name in modules - ours}
        others = {name.partition(".")[0] for name in loaded - ours}
        assert {"_queue", "encodings", "mmap", "queue", "resource", "stringprep", "termios"} >= others

    @pytest.mark.skipif(sys.platform in {"win32", "darwin"}, reason="the store is the system's own there")
    @pytest.mark.slow
    def test_certificates_are_read_once_and_only_for_https(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The system's are not read for aiohttp's client, which nobody uses; whoever named others gets these."""
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        there = bool(ssl.create_default_context().cert_store_stats()["x509"])
        held = "[each.cert_store_stats()['x509'] > 0 for each in gc.get_objects() if isinstance(each, ssl.SSLContext)]"
        tell = f"gc.unfreeze(); print(sum({held}), os.environ.get('SSL_CERT_FILE'))"
        assert f"{there:d} None\n" == begun(BEGUN + tell, METQUAY_HOST="https://127.0.0.1:1")
        assert "0 None\n" == begun(BEGUN + tell)
        assert "0 none.pem\n" == begun(BEGUN + tell, SSL_CERT_FILE="none.pem")

    def test_garbage_is_looked_for_as_usual_once_it_listens(self) -> None:
        """Looks are rare only while the program is loaded, and what was loaded is never looked at again."""
        tell = "print(usual == gc.get_threshold(), gc.get_freeze_count() > 50_000)"
        assert "True True\n" == begun(BEGUN + tell)
