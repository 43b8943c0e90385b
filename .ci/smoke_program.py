"""Use the program that needs no Python as its users do: `smoke_program.py ARCHIVE`, which .ci/program.py has built.

It is unpacked into a folder whose name has a space, and finds neither Python nor any other program on its path. Needs
curl and openssl. Says what was tried, and exits non-zero as soon as something is not as it should be.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WINDOWS = sys.platform == "win32"
EXE = ".exe" if WINDOWS else ""
LIMIT = 60  # seconds for each command
WRONG = 2  # the exit code for wrong settings
SYSTEM = {
    name: os.environ[name] for name in ("SYSTEMROOT", "TEMP", "USERPROFILE", "LOCALAPPDATA") if name in os.environ
}
KEYS = {"METQUAY_ACCESS_KEY": "sandbox-access-key", "METQUAY_SECRET_KEY": "sandbox-secret-key"}


def expect(what: str, holds: object, *, seen: object = "") -> None:
    """Say that something holds, or exit with an error."""
    if not holds:
        sys.exit(f"FAILED: {what}\n{seen}")
    print(f"ok: {what}")


class Place:
    """A folder with the program, in which its commands are run."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.folder = program, folder
        folder.mkdir()

    def words(self, *words: str, name: str = "metquay-proxy") -> list[str]:
        """Return a command line."""
        return [str(self.program / f"{name}{EXE}"), *words]

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        """Return the variables that a command gets: nothing leads to a Python."""
        return SYSTEM | {"PATH": str(self.folder), "NO_COLOR": "1"} | more

    def run(self, *words: str, code: int = 0, stdin: str = "", name: str = "metquay-proxy", **more: str) -> str:
        """Run a command to its end and return what it printed; end where its exit code is another, or it broke."""
        ended = subprocess.run(
            self.words(*words, name=name),
            check=False, cwd=self.folder, env=self.environment(more), input=stdin, text=True, timeout=LIMIT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        printed = ended.stdout
        good = ended.returncode == code and "Traceback" not in printed and "sandbox-secret-key" not in printed
        expect(f"{name} {' '.join(words)}: exit code {code}", good, seen=f"{ended.returncode}\n{printed}")
        return printed

    @contextlib.contextmanager
    def running(self, *words: str, **more: str) -> Iterator[str]:
        """Run a command, yield the address that it prints, and end it by what Ctrl-C does (Windows: Ctrl-Break)."""
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if WINDOWS else {}
        log = self.folder / f"{words[0]}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                self.words(*words), cwd=self.folder, env=self.environment(more), stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, **group,
            )  # fmt: skip
        try:
            yield waited(process, log, r"https?://localhost:\d+")
            process.send_signal(signal.CTRL_BREAK_EVENT if WINDOWS else signal.SIGINT)
            ended = process.wait(LIMIT)
        finally:
            process.kill()
            process.wait()
        printed = log.read_text(encoding="utf-8")
        told = words[0] != "sandbox" and "sandbox-secret-key" in printed  # which tells its own
        good = ended == 0 and "Traceback" not in printed and not told
        expect(f"{' '.join(words)}: exit code 0 after Ctrl-C", good, seen=f"{ended}\n{printed}")


def waited(process: subprocess.Popen[bytes], file: Path, pattern: str) -> str:
    """Return what matches in a file as soon as it does."""
    until = time.monotonic() + LIMIT
    while True:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if found := re.search(pattern, text):
            return found[0]
        if process.poll() is not None or time.monotonic() > until:
            sys.exit(f"FAILED: {pattern} in {file.name}, exit code {process.poll()}\n{text}")
        time.sleep(0.05)


def curl(url: str, *words: str) -> str:
    """Ask as a user would; end where that fails."""
    program = shutil.which("curl") or sys.exit("curl is not installed")
    asked = [program, "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", *words, url]
    return subprocess.run(asked, check=True, stdout=subprocess.PIPE, encoding="utf-8", timeout=LIMIT).stdout


def has_two(answer: str) -> bool:
    """Whether an answer is a list of two records."""
    return len(json.loads(answer)) == 2  # noqa: PLR2004 - as many as it asks for


def made_certificate(folder: Path) -> tuple[str, str]:
    """Make a certificate for localhost; return the paths of it and of its key."""
    paths = str(folder / "cert.pem"), str(folder / "key.pem")
    program = shutil.which("openssl") or sys.exit("openssl is not installed")
    words = "req -x509 -newkey rsa:2048 -noenc -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(
        [program, *words.split(), "-out", paths[0], "-keyout", paths[1]], check=True, stderr=subprocess.DEVNULL
    )
    return paths


def smoke(place: Place) -> None:
    """Try what a user tries."""
    anywhere = {"METQUAY_LISTEN": "localhost:0"}
    version = place.run("--version")
    expect("a version", re.fullmatch(r"metquay-proxy \d+\.\d+\.\d+\n", version), seen=version)
    expect("help names the places", "proxy.log" in place.run("--help"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nobody = place.run("health", "--listen", f"127.0.0.1:{port}", code=1)
    expect("health says that nobody is there", "is the proxy running?" in nobody, seen=nobody)
    refused = place.run("--rate-limit", "fast", code=WRONG, METQUAY_HOST="lab.metquay.co", **KEYS)
    expect("a wrong setting has one line", len(refused.splitlines()) == 1 and "fast" in refused, seen=refused)
    missing = place.run(code=WRONG)
    expect("missing settings have a line each", all(name in missing for name in ("METQUAY_HOST", *KEYS)), seen=missing)
    checked = place.run("check", "--sandbox", **anywhere)
    expect("check passes on the sandbox", "All is well" in checked, seen=checked)

    with place.running("serve", "--sandbox", **anywhere) as url:
        expect("two customers", has_two(curl(f"{url}/customers?limit=2")))
        expect("the status page", "<title>metquay-proxy</title>" in curl(f"{url}/-/"))
        expect("figures", "metquay_proxy_requests_total" in curl(f"{url}/-/metrics"))
        expect("a whole list", curl(f"{url}/-/lists/customers.csv").startswith("\ufeffid,"))
        place.run("health", "--ready", "--wait", "20", "--listen", url.removeprefix("http://"))
        second = place.run("serve", "--sandbox", code=1, METQUAY_LISTEN=url.removeprefix("http://"))
        expect("a second one says that the address is taken", "is taken" in second, seen=second)

    with place.running("sandbox", "--listen", "localhost:0") as metquay:
        lines = (
            f"METQUAY_HOST={metquay}",
            *(f"{name}={value}" for name, value in KEYS.items()),
            "METQUAY_LISTEN=localhost:0",
        )
        (place.folder / ".env").write_text("\n".join(lines), encoding="utf-8")
        shown = place.run("settings", "--redis-url", "redis://localhost:1/0")
        expect(
            "settings come from .env, and Redis is at hand",
            ".env" in shown and "redis://localhost:1/0" in shown,
            seen=shown,
        )
        with place.running("serve") as url:
            body = '{"name": "Pressure gauges of a laboratory"}'
            made = curl(f"{url}/instrument-categories", "--data", body, "--header", "Content-Type: application/json")
            expect("a write", "metquayId" in json.loads(made), seen=made)
        without_window(place)
        with_certificates(place)
    (place.folder / ".env").unlink()
    if WINDOWS:
        with_credential_manager(place)


def without_window(place: Place) -> None:
    """Start the program that opens no window as the Task Scheduler does: without a single standard stream."""
    log = place.folder / "logs/proxy.log"
    words = place.words("serve", name="metquay-proxyw")
    start = "" if WINDOWS else "for number in (0, 1, 2): os.close(number)\n"
    closed = f"import os, sys\n{start}os.execv(sys.argv[1], sys.argv[1:])"
    line = words if WINDOWS else [sys.executable, "-c", closed, *words]
    process = subprocess.Popen(line, cwd=place.folder, env=place.environment({}), close_fds=True)
    try:
        url = waited(process, log, r"https?://localhost:\d+")
        expect("two customers, without a window", has_two(curl(f"{url}/customers?limit=2")))
        expect("the request is in the log", waited(process, log, '"path": "/api/v1/customers'))
    finally:
        process.terminate()
        process.wait(LIMIT)
    wrong = subprocess.run(
        [*words, "--rate-limit", "fast"], check=False, cwd=place.folder, env=place.environment({}), timeout=LIMIT
    )
    told = log.read_text(encoding="utf-8")
    good = wrong.returncode == WRONG and "fast" in told and "listening" in told
    expect("without a window, what is wrong with a setting is in the log, below the run before", good, seen=told)


def with_certificates(place: Place) -> None:
    """Serve https, and reach that as Metquay: the system's certificates are looked at, and METQUAY_CA_BUNDLE."""
    certificate, key = made_certificate(place.folder)
    with place.running("serve", METQUAY_TLS_CERT=certificate, METQUAY_TLS_KEY=key) as url:
        expect("https", has_two(curl(f"{url}/customers?limit=2", "--cacert", certificate)))
        distrusted = place.run("check", "--host", url, "--listen", "localhost:0", code=1)
        expect("a certificate that the system does not know is refused", "failed   tls" in distrusted, seen=distrusted)
        trusted = place.run("check", "--host", url, "--listen", "localhost:0", METQUAY_CA_BUNDLE=certificate)
        expect("a certificate in METQUAY_CA_BUNDLE is accepted", "the certificate is good" in trusted, seen=trusted)


def with_credential_manager(place: Place) -> None:
    """Keep the key pair where Windows keeps passwords."""
    place.run(name="metquay-keys", stdin="".join(f"{key}\n" for key in KEYS.values()))
    try:
        shown = place.run("settings", METQUAY_HOST="lab.metquay.co")
        expect("the keys come from the Credential Manager", shown.count("Credential Manager") == len(KEYS), seen=shown)
    finally:
        place.run("--remove", name="metquay-keys")
    place.run("settings", code=WRONG, METQUAY_HOST="lab.metquay.co")


def main(archive: Path) -> None:
    """Unpack and try."""
    with tempfile.TemporaryDirectory(prefix="a laboratory ", ignore_cleanup_errors=True) as folder:
        shutil.unpack_archive(archive, folder)
        smoke(Place(Path(folder, "metquay-proxy"), Path(folder, "work")))
    print(f"{archive.name}: all that was tried works")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
