"""Files that are read again: what counts as a change, what a fault leaves as it was, and the running program."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from metquay_proxy.reload import Reload, Source
from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults, Sandbox
from metquay_proxy.sources import read_file
from metquay_proxy.threads import in_thread
from tests import running as program
from tests.running import Process, process
from tests.wire import Client, certified, eventually, get, patiently, post, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

OLD, NEW = "old-key-of-the-sheet-1", "new-key-of-the-sheet-2"
LIMS = "key-of-the-lims-123456"

ROOT = Path(__file__).parent.parent

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")


class Told:
    """What was logged, in place of the log."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:  # noqa: ANN401 - whatever is logged
        """Take a line."""
        self.lines.append((event, fields))

    error = info

    @property
    def faults(self) -> list[str]:
        """The reasons of the faults."""
        return [fields["reason"] for _, fields in self.lines if "reason" in fields]


@pytest.fixture
def told() -> Told:
    """Return what takes the place of the log."""
    return Told()


class Watched:
    """A source of one file, whose text is taken unless it holds ``bad``; old files by default."""

    def __init__(self, path: Path, told: Told, *, lines: bool = False) -> None:
        self.path = path
        self.taken: list[str] = []
        self.write("first\n")
        self.source = Source("METQUAY_X", [path], self._make, self._take, lines=lines)
        self.reload = Reload([self.source], wall_clock=self.clock, log=told)
        self.now = time.time() + 3600

    def clock(self) -> float:
        """Read the wall clock, an hour ahead of the files."""
        return self.now

    def write(self, text: str) -> None:
        """Change the file."""
        self.path.write_text(text)

    def _make(self) -> str:
        text = self.path.read_text()
        if "bad" in text:
            raise ValueError("it is bad")
        return text

    def _take(self, text: str) -> str:
        self.taken.append(text)
        return "METQUAY_X"


async def test_a_change(tmp_path: Path, told: Told) -> None:
    """What was changed is read and taken once; one line tells of it. What was only touched is not."""
    watched = Watched(tmp_path / "file", told)
    await watched.reload.look()
    watched.path.touch()
    await watched.reload.look()
    assert (["first\n"], []) == (watched.taken, told.lines)
    watched.write("second\n")
    await watched.reload.look()
    await watched.reload.look()
    assert ["first\n", "second\n"] == watched.taken
    assert [("files were read again", {"changed": ["METQUAY_X"], "not_used": []})] == told.lines


async def test_a_fault(tmp_path: Path, told: Told) -> None:
    """What can't be used changes nothing and is told once for each change, whoever asks; then it can be mended."""
    watched = Watched(tmp_path / "file", told)
    watched.write("bad")
    for _ in range(3):
        await watched.reload.look()
    assert ["it is bad"] == told.faults
    await watched.reload.look(asked=True)
    assert ("files were read again", {"changed": [], "not_used": ["METQUAY_X"]}) == told.lines[-1]
    watched.path.unlink()
    for _ in range(2):
        await watched.reload.look()
    assert ["it is bad", f"{watched.path}: No such file or directory"] == told.faults
    assert [] == watched.taken
    watched.write("first\n")
    await watched.reload.look()
    assert ["first\n"] == watched.taken
    assert 2 == len(told.faults)


async def test_whatever_is_raised(tmp_path: Path, told: Told) -> None:
    """A mistake of ours with one file ends no later look, and its text, which may quote anything, is not told."""
    path = tmp_path / "file"
    path.write_text("a")

    def make() -> str:
        raise KeyError("secret")

    reload = Reload([Source("METQUAY_X", [path], make, str)], log=told)
    path.write_text("b")
    await reload.look(asked=True)
    assert ["unexpected KeyError"] == told.faults


async def test_what_was_just_changed_may_be_half_written(tmp_path: Path, told: Told) -> None:
    """A look leaves a file alone for two seconds after a change, unless somebody says that it is complete."""
    watched = Watched(tmp_path / "file", told)
    watched.now = time.time()
    watched.write("second\n")
    await watched.reload.look()
    assert [] == watched.taken
    await watched.reload.look(asked=True)
    assert ["second\n"] == watched.taken
    watched.write("third\n")
    watched.now = time.time() + 2.1
    await watched.reload.look()
    assert ["second\n", "third\n"] == watched.taken
    assert [] == told.faults


async def test_a_list_whose_last_line_has_lost_its_end(tmp_path: Path, told: Told) -> None:
    """Lines that end in the midst, where they did not before, are taken for half-written."""
    watched = Watched(tmp_path / "file", told, lines=True)
    watched.write("first\nsec")
    await watched.reload.look()
    assert [] == watched.taken
    assert "half-written" in told.faults[0]
    watched.write("first\nsecond\n")
    await watched.reload.look()
    assert ["first\nsecond\n"] == watched.taken


async def test_what_changed_before_the_first_look(tmp_path: Path, told: Told) -> None:
    """What is in use was read before the files were looked at: the first look takes what is there; it is no news."""
    watched = Watched(tmp_path / "file", told)
    await watched.reload.look(asked=True)
    assert ["first\n"] == watched.taken
    assert [("files were read again", {"changed": [], "not_used": []})] == told.lines


@pytest.mark.parametrize("asked", [False, True])
async def test_a_change_while_it_is_read(tmp_path: Path, told: Told, *, asked: bool) -> None:
    """What was there for a moment only is never in force: it is read again, at once if somebody asks, else later."""
    watched = Watched(tmp_path / "file", told)
    await watched.reload.look()
    watched.write("second\n")
    make, moments = watched.source.make, iter(["moment\n"])

    def meanwhile() -> str:
        for moment in moments:
            watched.write(moment)
            made = make()
            watched.write("second\n")
            return made
        return make()

    watched.source.make = meanwhile
    await watched.reload.look(asked=asked)
    assert ["first\n", "second\n"][: 1 + asked] == watched.taken
    await watched.reload.look()
    assert ["first\n", "second\n"] == watched.taken
    assert ([] if asked else ["they were changed while they were read"]) == told.faults


async def test_what_has_just_changed_is_made_sure_of(tmp_path: Path, told: Told) -> None:
    """Clocks of files are coarse: what was taken within two seconds of a change is taken once more, without a line."""
    watched = Watched(tmp_path / "file", told)
    watched.now = time.time()
    watched.write("second\n")
    await watched.reload.look(asked=True)
    watched.now += 60
    for _ in range(2):
        await watched.reload.look()
    assert ["second\n", "second\n"] == watched.taken
    assert 1 == len(told.lines)


@posix_only
async def test_a_pipe_in_the_place_of_a_file(tmp_path: Path, told: Told) -> None:
    """It is a fault that holds nothing up, whoever comes to read it: the sources and the settings alike."""
    watched = Watched(tmp_path / "file", told)
    watched.path.unlink()
    os.mkfifo(watched.path)
    await asyncio.wait_for(watched.reload.look(), 5)
    assert [f"{watched.path}: not a regular file"] == told.faults
    with pytest.raises(OSError, match="not a regular file"):
        await asyncio.wait_for(in_thread(lambda: read_file(watched.path)), 5)


class Hanging(os.PathLike[str]):
    """The path of a file that takes until an event to open."""

    def __init__(self, path: Path, event: threading.Event) -> None:
        self._path, self._event = path, event
        self.asked = 0

    def __fspath__(self) -> str:
        """Wait."""
        self.asked += 1
        self._event.wait()
        return str(self._path)


async def test_what_hangs(tmp_path: Path, told: Told) -> None:
    """Files that can't be read in time are told once and end no later look; no second thread waits for them."""
    there = threading.Event()
    there.set()
    path = tmp_path / "file"
    path.write_text("first")
    taken: list[str] = []
    hanging = Hanging(path, there)
    source = Source("METQUAY_X", [hanging], path.read_text, lambda text: taken.append(text) or "x")  # type: ignore[list-item]
    reload = Reload([source], wall_clock=lambda: time.time() + 60, bound=0.05, log=told)
    path.write_text("second")
    there.clear()
    for _ in range(3):
        await reload.look()
    assert [2, 1] == [hanging.asked, len(told.faults)]
    assert told.faults[0].endswith("could not be read in time")
    there.set()
    while not taken:
        await reload.look()
    assert ["second"] == taken
    source.make = lambda: time.sleep(0.2) or ""
    path.write_text("fourth")
    await reload.look()
    assert "could not be read in time" == told.faults[-1]


@posix_only
async def test_a_folder_that_is_a_link(tmp_path: Path, told: Told) -> None:
    """Kubernetes' way: the folder is a link to another one from one moment to the next."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"{name}\n")
    (tmp_path / "now").symlink_to("a")
    taken: list[str] = []
    path = tmp_path / "now" / "file"
    reload = Reload(
        [Source("METQUAY_X", [path], path.read_text, lambda text: taken.append(text) or "x")],
        wall_clock=lambda: time.time() + 60,
        log=told,
    )
    (tmp_path / "next").symlink_to("b")
    (tmp_path / "next").rename(tmp_path / "now")
    await reload.look()
    assert ["b\n"] == taken
    assert [] == told.faults


async def test_once_a_minute(tmp_path: Path, told: Told) -> None:
    """Somebody looks every 60 seconds, until the end; where there is nothing to look at nobody does."""
    watched = Watched(tmp_path / "file", told)
    slept: list[float] = []
    alarm = asyncio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await alarm.wait()
        alarm.clear()

    reload = Reload([watched.source], sleep=sleep, wall_clock=watched.clock, log=told)
    reload.start()
    for turn, text in enumerate(("second\n", "third\n"), start=1):
        watched.write(text)
        await eventually(lambda turn=turn: len(slept) == turn)
        assert turn - 1 == len(watched.taken)
        alarm.set()
        await eventually(lambda turn=turn: len(watched.taken) == turn)
    await eventually(lambda: len(slept) == 3)
    assert [60.0] * 3 == slept
    reload.close()
    Reload([Source("METQUAY_X", [], str, str)], sleep=sleep).start()
    await eventually(lambda: len(asyncio.all_tasks()) == 1)
    assert (3, 2) == (len(slept), len(told.lines))


class Tls:
    """A certificate and a key in two files, and what a new client sees of them."""

    def __init__(self, folder: Path) -> None:
        """Issue the first pair."""
        self.certificate, self.key = folder / "cert.pem", folder / "key.pem"
        self._authority = trustme.CA()
        self._client = ssl.create_default_context()
        self._authority.configure_trust(self._client)
        self.change(self.issue())

    def issue(self, key_type: trustme.KeyType = trustme.KeyType.ECDSA) -> trustme.LeafCert:
        """Return a new pair."""
        return self._authority.issue_cert("localhost", "127.0.0.1", key_type=key_type)

    def change(self, made: trustme.LeafCert, *, certificate: bool = True, key: bool = True) -> None:
        """Write the files, or one of them, dated back so that a look does not wait for more."""
        if certificate:
            self.certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        if key:
            made.private_key_pem.write_to_path(self.key)
        for file in (self.certificate, self.key):
            os.utime(file, (1e9, 1e9))

    async def serial(self, port: int) -> str:
        """Return the serial number that a new client is shown; a handshake that fails is an error."""
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=self._client)
        peer = writer.get_extra_info("ssl_object").getpeercert()
        writer.transport.abort()
        return str(peer["serialNumber"])


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a program on that loop."""
    if request.param == "asyncio":
        (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['uvloop'] = None")
        return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    pytest.importorskip("uvloop")
    return {"PYTHONPATH": str(ROOT)}


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """Run a simulator."""
    made = Sandbox(rate_limit=None)
    await made.start()
    yield made
    await made.stop()


class Command:
    """The program as a process of its own, whose files are changed."""

    def __init__(self, command: Process) -> None:
        self._command = command
        self.port = int(command.url.rpartition(":")[2])

    @property
    def log(self) -> list[dict[str, Any]]:
        """What it has logged beside its requests."""
        whole, _, _ = self._command.log.read_text().rpartition("\n")  # it may be about to write another
        lines = map(json.loads, whole.splitlines())
        return [line for line in lines if line["event"] != "request"]

    def count(self, event: str) -> int:
        """Return how often that was logged."""
        return [line["event"] for line in self.log].count(event)

    @property
    def faults(self) -> list[str]:
        """The reasons for which files were not taken."""
        return [line["reason"] for line in self.log if line["event"].startswith("files can't be used")]

    async def hang_up(self) -> dict[str, Any]:
        """Send SIGHUP, and return what was logged when the files were read."""
        before = self.count("files were read again")
        self._command.popen.send_signal(signal.SIGHUP)
        await eventually(lambda: self.count("files were read again") > before)
        return [line for line in self.log if line["event"] == "files were read again"][-1]

    async def client(self) -> Client:
        """Connect."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def status(self, key: str, target: str = "/-/status") -> int:
        """Return the status that a tool with this key gets."""
        client = await self.client()
        await client.send(get(target, f"X-Proxy-Key: {key}"))
        answer = await client.answer()
        client.close()
        return answer.status


@contextlib.contextmanager
def command(folder: Path, environment: dict[str, str], upstream: str, **settings: object) -> Iterator[Command]:
    """Run one."""
    texts = {"host": upstream, "listen": "127.0.0.1:0", "access_key": ACCESS_KEY, "secret_key": SECRET_KEY} | settings
    variables = {f"METQUAY_{name.upper()}": str(text) for name, text in texts.items() if text}
    with process(folder, "serve", **environment, **variables) as made:
        yield Command(made)
        assert 0 == made.stop()
        assert "Traceback" not in made.output


@posix_only
@pytest.mark.slow
async def test_a_certificate_is_renewed(tmp_path: Path, loop: dict[str, str]) -> None:
    """New certificate, then its key: no handshake ever fails, and each shows a pair that fits; of another kind, too."""
    tls = Tls(tmp_path)
    with command(tmp_path, loop, "http://127.0.0.1:9", tls_cert=tls.certificate, tls_key=tls.key) as running:
        seen: list[str] = []

        async def shake_hands() -> None:
            while True:
                seen.append(await tls.serial(running.port))

        shaking = asyncio.ensure_future(shake_hands())
        for number, key_type in enumerate((trustme.KeyType.RSA, trustme.KeyType.ECDSA), start=1):
            old = await tls.serial(running.port)
            new = tls.issue(key_type)
            tls.change(new, key=False)
            assert ([], ["METQUAY_TLS_CERT, METQUAY_TLS_KEY"]) == named(await running.hang_up())
            await running.hang_up()
            assert number == len(running.faults)
            assert "is not the private key" in running.faults[-1]
            assert old == await tls.serial(running.port)
            tls.change(new, certificate=False)
            assert (["METQUAY_TLS_CERT, METQUAY_TLS_KEY"], []) == named(await running.hang_up())
            assert old != await tls.serial(running.port)
        assert not shaking.done()
        shaking.cancel()
        assert 3 == len(set(seen))


def named(line: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what changed, and what could not be used."""
    return line["changed"], line["not_used"]


@posix_only
@pytest.mark.slow
async def test_client_keys(tmp_path: Path, loop: dict[str, str]) -> None:
    """No file that is empty, cut off, gone or without a key opens the gate; with a removed key all of it ends."""
    path = tmp_path / "keys"
    good = f"sheet:{OLD}\nlims:{LIMS}:read-only\n"
    path.write_text(good)
    with command(tmp_path, loop, "http://127.0.0.1:9", client_keys_file=path) as running:
        for text in ("", "\n,\n", good[:7], good[:-1], good[: -len(":read-only\n")], "sheet", None):
            path.unlink() if text is None else path.write_text(text)
            await running.hang_up()
            assert [200, 200, 403] == [await running.status(key) for key in (OLD, LIMS, NEW)], text
        assert 7 == len(running.faults)
        assert not [line for line in running.log if OLD in str(line) or LIMS in str(line)]
        path.write_text(good)
        await running.hang_up()
        watching = {key: await running.client() for key in (OLD, LIMS)}
        for key, client in watching.items():
            await client.send(get("/-/events", f"X-Proxy-Key: {key}"))
            await client.until(b"\n\n")
        placeholder = await placeholder_of(running, OLD)
        assert 200 == await running.status(placeholder)
        kept = await running.client()
        await kept.send(login(OLD))
        assert 200 == (await kept.answer()).status
        path.write_text(good.replace(OLD, NEW))
        assert (["client keys (sheet, lims; ended: sheet)"], []) == named(await running.hang_up())
        assert "sheet:***,lims:***:read-only" == await shown(running, LIMS)
        assert (await patiently(watching[OLD].to_the_end())).endswith(b"0\r\n\r\n")
        await watching[LIMS].until(b"\n\n")
        await kept.send(login(OLD))
        assert 403 == (await kept.answer()).status
        assert [403, 403, 200, 200] == [await running.status(key) for key in (OLD, placeholder, NEW, LIMS)]
        for client in (*watching.values(), kept):
            client.close()


async def shown(running: Command, key: str) -> str:
    """Return what is shown of the named keys."""
    client = await running.client()
    await client.send(get("/-/status", f"X-Proxy-Key: {key}"))
    settings = json.loads((await client.answer()).body)["settings"]
    client.close()
    return next(setting["value"] for setting in settings if setting["variable"] == "METQUAY_CLIENT_KEYS")


def login(key: str) -> bytes:
    """Return the login with a client key, whose connection can be used again."""
    return post(json.dumps({"accessKey": "x", "secretKey": key}).encode(), target="/authenticate")


async def placeholder_of(running: Command, key: str) -> str:
    """Log in with a client key."""
    client = await running.client()
    await client.send(login(key))
    answer = await client.answer()
    client.close()
    return str(json.loads(answer.body)["accessToken"])


@posix_only
async def test_a_single_client_key(tmp_path: Path, loop: dict[str, str]) -> None:
    """A client key that was cut off is none: the old one stays in force."""
    path = tmp_path / "key"
    path.write_text(f"{OLD}\n")
    with command(tmp_path, loop, "http://127.0.0.1:9", client_key_file=path) as running:
        for text in (f"{NEW[:5]}\n", "\n", NEW):
            path.write_text(text)
            assert ([], ["METQUAY_CLIENT_KEY, METQUAY_CLIENT_KEYS"]) == named(await running.hang_up())
            assert [200, 403, 403] == [await running.status(key) for key in (OLD, NEW, NEW[:5])]
        path.write_text(f"{NEW}\n")
        assert (["client keys (default; ended: default)"], []) == named(await running.hang_up())
        assert [403, 200] == [await running.status(key) for key in (OLD, NEW)]


@posix_only
@pytest.mark.slow
async def test_a_key_pair_is_rotated(tmp_path: Path, loop: dict[str, str], sandbox: Sandbox) -> None:
    """Keys that were refused are tried again as soon as they have changed, and the page names the new one."""
    access, secret = tmp_path / "access", tmp_path / "secret"
    access.write_text("key-that-was-withdrawn")
    secret.write_text(SECRET_KEY)
    files = {"access_key": "", "secret_key": "", "access_key_file": access, "secret_key_file": secret}
    with command(tmp_path, loop, sandbox.url, **files) as running:
        await eventually(lambda: running.count("key pair refused"))
        access.write_text(ACCESS_KEY)
        assert (["METQUAY_ACCESS_KEY, METQUAY_SECRET_KEY"], []) == named(await running.hang_up())
        await eventually(lambda: running.count("token obtained"))
        client = await running.client()
        await client.send(get("/-/status"))
        assert f"...{ACCESS_KEY[-4:]}" == json.loads((await client.answer()).body)["key"]
        client.close()
        access.unlink()
        assert ([], ["METQUAY_ACCESS_KEY, METQUAY_SECRET_KEY"]) == named(await running.hang_up())


@pytest.mark.slow
async def test_a_key_pair_that_is_gone(sandbox: Sandbox) -> None:
    """Where the keys can't be read any more, those that were read before are used for the next login."""
    sandbox.faults = Faults(token_lifetime=1.0)
    known = [Credentials(ACCESS_KEY, SECRET_KEY)]
    async with program.running(sandbox.url, credentials=lambda: known[0] if known else missing()) as (proxy, _):
        await eventually(proxy.ready)
        known.clear()
        await eventually(lambda: proxy.tokens.state.renewals > 1)
        assert 0 == proxy.tokens.state.failures


@pytest.mark.slow
async def test_a_key_pair_that_takes_for_ever(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that hangs at a login holds nobody else up, and the keys that were read before are used."""
    monkeypatch.setattr("metquay_proxy.upstream.login.KEYS_TIMEOUT", 0.05)
    sandbox.faults = Faults(token_lifetime=1.0)
    hanging = threading.Event()
    hanging.set()

    def credentials() -> Credentials:
        hanging.wait()
        return Credentials(ACCESS_KEY, SECRET_KEY)

    async with program.running(sandbox.url, credentials=credentials) as (proxy, _):
        await eventually(proxy.ready)
        hanging.clear()
        await eventually(lambda: proxy.tokens.state.renewals > 1)
        hanging.set()
        assert 0 == proxy.tokens.state.failures


def missing() -> Credentials:
    """Fail as a file that is not there does."""
    raise FileNotFoundError(2, "No such file or directory", "secret")


async def test_a_ca_bundle_is_changed(tmp_path: Path) -> None:
    """New connections trust what the bundle holds now, and a broken one changes nothing; the login is tried at once."""
    options = certified(tmp_path, tls=True)
    bundle = tmp_path / "ca.pem"
    good = bundle.read_bytes()
    async with running(**options, max_idle=(0.0, 0.0)) as bench:
        for text, status in ((b"broken", 200), (trustme.CA().cert_pem.bytes(), 502), (good, 200)):
            bundle.write_bytes(text)
            await bench.proxy.reload()
            assert status == (await bench.ask(get())).status


async def test_without_a_signal(tmp_path: Path) -> None:
    """A certificate that was renewed is in use a minute later, whoever knows of signals."""
    tls = Tls(tmp_path)
    time_ = program.FastTime(300)
    async with program.running(
        "http://127.0.0.1:9", time_=time_, tls_cert=str(tls.certificate), tls_key=str(tls.key)
    ) as (_, url):
        port = int(url.rpartition(":")[2])
        old = await tls.serial(port)
        tls.change(tls.issue())
        began = time_.now()
        while await tls.serial(port) == old:
            await asyncio.sleep(0.02)
            assert time_.now() - began < 600
