"""The life of the program: how it starts, what becomes of what is under way when it is told to stop, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy.sandbox.server import Faults, Sandbox
from tests import running as program
from tests.running import Process, process
from tests.wire import OK, Broken, Client, Upstream, answered, certified, eventually, get, head, post
from tests.wire import running as benched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.wire import Bench, Message

SLACK = 0.5
"""Seconds that the end of a drain may take beyond its time-out."""
VERSIONS = ["1.1", "1.0"]
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"

ROOT = Path(__file__).parent.parent
EXIT = 0.5
"""Seconds that an interpreter may take for its own end, on a busy machine."""
TROUBLE = re.compile(r'Traceback|xception|never (retrieved|awaited)|was destroyed|ResourceWarning|"level": "error"')
"""What the log of an orderly life does not hold."""

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


class Ending:
    """A drain under way."""

    def __init__(self, bench: Bench, timeout: float) -> None:
        """Begin it; ``timeout`` is in seconds."""
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._timeout = timeout
        self.task = asyncio.ensure_future(bench.proxy.stop(timeout))

    async def at_once(self) -> None:
        """Assert that it ends without waiting for its deadline."""
        await self.task
        assert self._loop.time() - self._began < min(SLACK, self._timeout)

    async def at_the_deadline(self) -> None:
        """Assert that it takes the whole time, and no more."""
        await self.task
        assert self._timeout <= self._loop.time() - self._began < self._timeout + SLACK


async def served(bench: Bench, client: Client) -> None:
    """Assert that a client is served, and leave its connection open."""
    bench.upstream.plays(OK)
    await client.send(get())
    assert b"ok" == (await client.answer()).body
    bench.upstream.answers = []


def refused(answer: Message, sent: bytes) -> None:
    """Assert that a request was given up because the proxy is being stopped."""
    assert (503, "shutting-down", sent) == (answer.status, answer.slug, answer.value(b"X-Metquay-Proxy-Sent"))
    assert (b"5", b"close") == (answer.value(b"Retry-After"), answer.value(b"Connection"))


async def test_an_upload_that_is_still_arriving() -> None:
    """An upload whose second half comes after SIGTERM completes, and its answer is the last one on its connection."""
    async with benched() as bench:
        client = await bench.client()
        await client.send(head("PUT /x HTTP/1.1", "Content-Length: 200000"), bytes(100_000))
        peer = await bench.upstream.peer()
        ending = Ending(bench, 5)
        await asyncio.sleep(0.05)
        assert not ending.task.done()
        await client.send(bytes(100_000))
        assert 200_000 == len((await peer.request()).body)
        await peer.send(OK)
        answer = await client.answer()
        assert (200, b"close") == (answer.status, answer.value(b"Connection"))
        await client.ended()
        await ending.at_once()


async def test_a_request_that_waits_for_its_answer() -> None:
    """A request that Metquay works on gets its answer; meanwhile the proxy is not ready and takes no connection."""
    async with benched() as bench:
        client = await bench.client()
        await client.send(get())
        peer = await bench.upstream.peer()
        ending = Ending(bench, 5)
        await asyncio.sleep(0.1)
        assert not bench.proxy.ready()
        with pytest.raises(ConnectionRefusedError):
            await bench.client()
        await peer.request()
        await peer.send(OK)
        answer = await client.answer()
        assert (b"ok", b"close") == (answer.body, answer.value(b"Connection"))
        await client.ended()
        await ending.at_once()


async def test_idle_connections() -> None:
    """Connections on which nothing is under way are closed in order, and hold nothing up; nor does a half-sent head."""
    async with benched() as bench:
        new, idle, begun = [await bench.client() for _ in range(3)]
        await served(bench, idle)
        await begun.send(b"GET /x HTTP/1.1\r\nHo")
        await asyncio.sleep(0.05)
        ending = Ending(bench, 5)
        await new.ended()
        await idle.ended()
        await begun.ended()
        await ending.at_once()
        assert 1 == len(bench.upstream.requests)


async def test_a_request_that_has_just_come() -> None:
    """A request that has been read, though nobody may have looked at it yet, gets an answer."""
    async with benched() as bench:
        client = await bench.client()
        await served(bench, client)
        bench.upstream.plays(OK)
        [connection] = bench.proxy.server.clients
        connection.data_received(post(b"abc"))
        ending = Ending(bench, 5)
        answer = await client.answer()
        await ending.at_once()
        assert len(bench.upstream.requests) == (2 if answer.status == 200 else 1)
        if answer.status != 200:
            refused(answer, b"no")


@pytest.mark.parametrize("turns", range(6))
async def test_requests_that_come_meanwhile(turns: int) -> None:
    """However requests and the signal meet, each is answered, and what is refused did not reach Metquay."""
    async with benched() as bench:
        clients = [await bench.client() for _ in range(20)]
        for client in clients:
            await served(bench, client)
        for _ in range(10):  # these come on connections that nobody has looked at yet
            sock = socket.create_connection((bench.host, bench.port))
            clients.append(Client(*await asyncio.open_connection(sock=sock)))
        bench.upstream.plays(OK)
        for client in clients:
            client.writer.write(post(b"abc"))
        for _ in range(turns):
            await asyncio.sleep(0)
        ending = Ending(bench, 5)
        outcomes = [(await client.answer()).status for client in clients]
        await ending.at_once()
        assert {200, 503} >= set(outcomes)
        assert outcomes.count(200) == len(bench.upstream.requests) - 20
        for client in clients[20:]:
            client.close()


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_download_that_does_not_end(version: str) -> None:
    """A stream that is still open at the deadline is cut, and no client can take it for complete."""
    async with benched() as bench:
        client = await bench.client()
        await client.send(head(f"GET /x HTTP/{version}"))
        peer = await bench.upstream.peer()
        await peer.request()
        await peer.send(CHUNKS)
        assert await client.until(b"\nabc")
        ending = Ending(bench, 0.2)
        with pytest.raises(Broken):
            await client.to_the_end()
        await ending.at_the_deadline()
        await peer.gone()


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_status_page_that_is_open(version: str) -> None:
    """The live events of the status page end at once, as a whole answer: an open page holds nothing up."""
    async with benched() as bench:
        client = await bench.client()
        await client.send(head(f"GET /-/events HTTP/{version}"))
        await client.until(b"\n\n")
        ending = Ending(bench, 5)
        rest = await client.to_the_end()
        assert rest.endswith(b"0\r\n\r\n") is (version == "1.1")
        await ending.at_once()


async def test_a_write_whose_client_has_left(tmp_path: Path) -> None:
    """A write that runs on without its client is waited for; the audit log has its outcome."""
    log = tmp_path / "audit"
    async with benched(audit_log=str(log)) as bench:
        client = await bench.client()
        await client.send(post(b"abc"))
        peer = await bench.upstream.peer()
        await peer.request()
        client.close()
        ending = Ending(bench, 5)
        await peer.silent()
        assert not ending.task.done()
        await peer.send(OK)
        await ending.at_once()
        [line] = [json.loads(text) for text in log.read_text().splitlines()]
        assert (200, "yes", "client-left") == (line["status"], line["sent"], line["error"])


async def test_a_write_that_does_not_end(tmp_path: Path) -> None:
    """A write that has no answer at the deadline is given up, and both its client and the audit log learn: unknown."""
    log = tmp_path / "audit"
    async with benched(audit_log=str(log)) as bench:
        staying, leaving = await bench.client(), await bench.client()
        for client in (staying, leaving):
            await client.send(post(b"abc"))
            await (await bench.upstream.peer()).request()
        leaving.close()
        await eventually(lambda: len(bench.proxy.server.clients) == 1)
        ending = Ending(bench, 0.2)
        refused(await staying.answer(), b"unknown")
        await staying.ended()
        await ending.at_the_deadline()
        lines = [json.loads(text) for text in log.read_text().splitlines()]
        outcomes = {(line["status"], line["error"], line["sent"]) for line in lines}
        assert {(503, "shutting-down", "unknown"), (None, "client-left", "unknown")} == outcomes


async def test_writes_that_nobody_waits_for(tmp_path: Path) -> None:
    """Those that are given up at the deadline are in the audit log, although no client is there any more."""
    log = tmp_path / "audit"
    async with benched(audit_log=str(log)) as bench:
        for _ in range(5):
            client = await bench.client()
            await client.send(post(b"abc"))
            await (await bench.upstream.peer()).request()
            client.close()
        await eventually(lambda: not bench.proxy.server.clients)
        await bench.proxy.stop(0.0)
        lines = [json.loads(text) for text in log.read_text().splitlines()]
        assert [(None, "client-left", "unknown")] * 5 == [(it["status"], it["error"], it["sent"]) for it in lines]


@pytest.mark.parametrize("request_", [get(), post(b"abc"), head("DELETE /x HTTP/1.1")])
async def test_requests_that_wait_for_the_quota(request_: bytes) -> None:
    """A request whose turn has not come at the deadline was certainly not sent, and is told so."""
    async with benched(rate_limit="1/minute", max_wait="90") as bench:
        client = await bench.client()
        await served(bench, client)
        await client.send(request_)
        await eventually(lambda: bench.proxy.telemetry.active)
        ending = Ending(bench, 0.2)
        refused(await client.answer(), b"no")
        await client.ended()
        await ending.at_the_deadline()
        assert 1 == len(bench.upstream.requests)


@pytest.mark.parametrize("request_", [get(), post(b"abc")])
async def test_requests_that_wait_for_a_token(request_: bytes) -> None:
    """A request that still waits for the first login at the deadline is told that it was not sent."""
    sandbox = Sandbox(faults=Faults(latency=30))
    await sandbox.start()
    async with program.running(sandbox.url) as (proxy, url):
        client = Client(*await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])))
        await client.send(request_)
        await eventually(lambda: proxy.telemetry.active)
        ending = asyncio.ensure_future(proxy.stop(0.1))
        refused(await client.answer(), b"no")
        await client.ended()
        await ending
        client.close()
    await sandbox.stop()


async def unread(bench: Bench, version: str) -> Client:
    """Return a client to which a whole answer was written, of which most still waits in the proxy."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)  # noqa: FBT003 - a position of the standard library's
    await asyncio.get_running_loop().sock_connect(sock, (bench.host, bench.port))
    client = Client(*await asyncio.open_connection(sock=sock, limit=1024))
    bench.clients.append(client)
    await eventually(lambda: bench.proxy.server.clients)
    [connection] = bench.proxy.server.clients
    handle = connection.transport.get_extra_info("socket")
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    bench.upstream.plays(answered(body=bytes(60_000)))  # less than a client's high water: taken in however many pieces
    await client.send(head(f"GET /x HTTP/{version}"))
    await eventually(lambda: bench.proxy.telemetry.finished)
    assert connection.transport.get_write_buffer_size() > 0
    return client


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_answer_that_is_read_slowly(version: str) -> None:
    """An answer that was written but not yet taken is delivered: the drain waits for its reader."""
    async with benched() as bench:
        client = await unread(bench, version)
        ending = Ending(bench, 5)
        await asyncio.sleep(0.1)
        assert not ending.task.done()
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert 60_000 == len((await client.answer()).body)
        await client.ended()
        await ending.task


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_answer_that_nobody_reads(version: str) -> None:
    """Where the reader does not come until the deadline the answer is cut, and seen to be."""
    async with benched() as bench:
        client = await unread(bench, version)
        await Ending(bench, 0.2).at_the_deadline()
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises(Broken):
            await client.to_the_end()


async def test_a_refusal_that_is_being_read() -> None:
    """A client that was refused while it sends finds time to read why, though the proxy is being stopped."""
    async with benched(read_only="true") as bench:
        client = await bench.client()
        await client.send(head("PUT /x HTTP/1.1", "Content-Length: 3000000"), bytes(1000))
        await eventually(lambda: bench.proxy.telemetry.finished)
        ending = Ending(bench, 5)
        await asyncio.sleep(0.05)
        await client.send(bytes(1_000_000))
        assert "read-only" == (await client.answer()).slug
        client.close()
        await ending.at_once()


async def test_over_tls(tmp_path: Path) -> None:
    """TLS clients are drained too: an upload completes, and one that does not say goodbye holds nothing up."""
    async with benched(**certified(tmp_path, client_tls=True)) as bench:
        mute, client = await bench.client(), await bench.client()
        await client.send(head("PUT /x HTTP/1.1", "Content-Length: 6"), b"abc")
        peer = await bench.upstream.peer()
        await served(bench, mute)
        mute.writer.transport.pause_reading()  # type: ignore[attr-defined]
        ending = Ending(bench, 5)
        await asyncio.sleep(0.05)
        await client.send(b"def")
        assert b"abcdef" == (await peer.request()).body
        await peer.send(OK)
        assert b"ok" == (await client.answer()).body
        await client.ended()
        await ending.at_once()


async def test_hurried() -> None:
    """A drain that is hurried ends at once, in the same order as at its deadline."""
    async with benched() as bench:
        client = await bench.client()
        await client.send(post(b"abc"))
        await (await bench.upstream.peer()).request()
        ending = Ending(bench, 5)
        await asyncio.sleep(0.05)
        bench.proxy.hurry.set()
        refused(await client.answer(), b"unknown")
        await client.ended()
        await ending.at_once()


@dataclass
class Sidecar:
    """The program as a process of its own, before the wire bench's upstream."""

    upstream: Upstream
    command: Process
    clients: list[Client] = field(default_factory=list)

    async def client(self, path: Path | None = None) -> Client:
        """Open a connection, to a unix socket if ``path`` is given, once the program is ready."""
        ready = False
        while True:
            opening = (
                asyncio.open_connection("127.0.0.1", int(self.command.url.rpartition(":")[2]))
                if path is None
                else asyncio.open_unix_connection(str(path))
            )
            client = Client(*await opening)
            self.clients.append(client)
            if ready:
                return client
            await client.send(get("/-/ready"))
            ready = (await client.answer()).status == 200
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def sidecar(folder: Path, listen: str = "127.0.0.1:0", **settings: str) -> AsyncIterator[Sidecar]:
    """Run one."""
    upstream = Upstream()
    await upstream.start()
    try:
        with process(folder, "serve", **environment(upstream.url, listen, **settings)) as command:
            made = Sidecar(upstream, command)
            yield made
            for client in made.clients:
                client.close()
    finally:
        await upstream.stop()


def environment(upstream: str, listen: str = "127.0.0.1:0", **settings: str) -> dict[str, str]:
    """Return the variables of a program of its own that warns of everything that it leaves open."""
    variables = {"host": upstream, "listen": listen, "access_key": "a" * 8, "secret_key": "s" * 8} | settings
    return {f"METQUAY_{name.upper()}": value for name, value in variables.items()} | {
        "PYTHONWARNINGS": "always::ResourceWarning"
    }


async def ended(command: Process, *numbers: int) -> float:
    """Signal a process, and assert that it ends with 0 and without any trouble; return the seconds that it took."""
    began = time.monotonic()
    for number in numbers[:-1]:
        command.popen.send_signal(number)
        await asyncio.sleep(0.2)
    assert 0 == await asyncio.to_thread(command.stop, *numbers[-1:])
    took = time.monotonic() - began
    assert [] == [line for line in command.output.splitlines() if TROUBLE.search(line)]
    assert 1 == command.output.count('"event": "stopped"')
    return took


@posix_only
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.slow
async def test_a_process_that_is_told_to_stop(tmp_path: Path, number: int) -> None:
    """What is under way ends as it should, what does not is cut in time, and the process ends with 0."""
    path = tmp_path / "socket"
    async with sidecar(tmp_path, f"127.0.0.1:0,unix:{path}", drain_timeout="1") as running:
        uploading, downloading, idle = await running.client(), await running.client(), await running.client(path)
        await uploading.send(head("PUT /upload HTTP/1.1", "Content-Length: 6"), b"abc")
        upload = await running.upstream.peer()
        await downloading.send(get("/download"))
        await (await running.upstream.peer()).send(CHUNKS)
        await downloading.until(b"\nabc")
        ending = asyncio.ensure_future(ended(running.command, number))
        await idle.ended()
        assert not path.exists()
        await uploading.send(b"def")
        assert b"abcdef" == (await upload.request()).body
        await upload.send(OK)
        assert 200 == (await uploading.answer()).status
        with pytest.raises(Broken):
            await downloading.to_the_end()
        assert 1 <= await ending < 1 + SLACK + EXIT


@posix_only
@pytest.mark.slow
async def test_a_second_signal(tmp_path: Path) -> None:
    """A second signal ends the drain at once, in order: the client is told, the socket is gone, the code is 0."""
    path = tmp_path / "socket"
    async with sidecar(tmp_path, f"127.0.0.1:0,unix:{path}", drain_timeout="60") as running:
        client = await running.client()
        await client.send(post(b"abc"))
        await (await running.upstream.peer()).request()
        assert await ended(running.command, signal.SIGTERM, signal.SIGINT) < 0.2 + SLACK + EXIT
        refused(await client.answer(), b"unknown")
        assert not path.exists()


@posix_only
async def test_quit(tmp_path: Path) -> None:
    """POST /-/quit, where it is allowed, is answered and ends the proxy as a signal does."""
    async with sidecar(tmp_path, allow_quit="true") as running:
        client, busy = await running.client(), await running.client()
        await busy.send(get())
        peer = await running.upstream.peer()
        await client.send(head("POST /-/quit HTTP/1.1", "Content-Length: 0"))
        assert b"quitting\n" == (await client.answer()).body
        await client.ended()
        assert running.command.popen.poll() is None
        await peer.request()
        await peer.send(OK)
        assert b"ok" == (await busy.answer()).body
        assert 0 == await asyncio.to_thread(running.command.popen.wait, 10)


@posix_only
async def test_a_look_up_that_hangs(tmp_path: Path) -> None:
    """A name server that does not answer keeps nobody from ending: nothing can cut a look-up short."""
    (tmp_path / "sitecustomize.py").write_text(HANGING_LOOK_UP)
    variables = environment("https://lab.metquay.example") | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with process(tmp_path, "serve", **variables) as command:
        await eventually((tmp_path / "hangs").exists)
        assert await ended(command, signal.SIGTERM) < SLACK + EXIT


HANGING_LOOK_UP = """
import pathlib, socket, time

really = socket.getaddrinfo

def getaddrinfo(host, *arguments, **options):
    if "metquay" in host and not options.get("flags"):
        pathlib.Path("hangs").touch()
        time.sleep(60)
    return really(host, *arguments, **options)

socket.getaddrinfo = getaddrinfo
"""


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """A port that is taken gives one line and 1; what was opened before it is closed again; JSON logs are all JSON."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other_port = other.getsockname()[1]
        listen = f"127.0.0.1:{other_port}"
        if sys.platform != "win32":
            listen = f"unix:{tmp_path / 'socket'},{listen}"
        run = subprocess.run(
            [sys.executable, "-m", "metquay_proxy", "serve", "--sandbox"],
            cwd=tmp_path,
            env=os.environ | environment("http://127.0.0.1:9", listen, client_key="short", log_format="json"),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert (1, "") == (run.returncode, run.stdout)
    warning, error = [json.loads(line) for line in run.stderr.splitlines()]
    assert ("warning", "error") == (warning["level"], error["level"])
    assert "METQUAY_CLIENT_KEY is short" in warning["event"]
    assert f"127.0.0.1:{other_port} is taken, probably by another program" in error["reason"]
    assert [] == list(tmp_path.iterdir())


async def test_a_successor_on_the_same_path(tmp_path: Path) -> None:
    """A proxy that takes the unix socket's path while its predecessor drains keeps it when that one has ended."""
    listen = f"unix:{tmp_path / 'socket'}"
    sandbox = Sandbox(faults=Faults(latency=0.15))
    await sandbox.start()
    async with program.running(sandbox.url, listen=listen) as (old, _):
        await eventually(old.ready)
        client = Client(*await asyncio.open_unix_connection(str(tmp_path / "socket")))
        await client.send(get("/customers"))
        await eventually(lambda: old.telemetry.active)
        ending = asyncio.ensure_future(old.stop(5))
        await eventually(lambda: not (tmp_path / "socket").exists())
        async with program.running(sandbox.url, listen=listen) as (new, _):
            assert 200 == (await client.answer()).status
            await ending
            other = Client(*await asyncio.open_unix_connection(str(tmp_path / "socket")))
            await other.send(get("/customers"))
            assert 200 == (await other.answer()).status
            assert 1 == new.telemetry.finished
            other.close()
        client.close()
    await sandbox.stop()
    assert [] == list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root on Linux can make a process the first one"
)
async def test_process_1(tmp_path: Path) -> None:
    """As process 1 of a container, for which signals have no default action, it ends with 0 on SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = [sys.executable, "-m", "metquay_proxy", "serve"]
        first = await asyncio.create_subprocess_exec(
            *("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *words),
            cwd=tmp_path,
            env=os.environ | environment(upstream),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert first.stdout is not None
        assert b'"event": "started"' in await first.stdout.readline()
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text()
        status = Path(f"/proc/{children.strip()}/status").read_text()
        assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)
        os.kill(int(children), signal.SIGTERM)
        _, log = await asyncio.wait_for(first.communicate(), 20)
        assert 0 == first.returncode
        assert not TROUBLE.search(log.decode())


EARLY_SIGNAL = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == os.environ["WHERE"]:
            for number in os.environ["SIGNALS"].split():
                os.kill(os.getpid(), int(number))

sys.meta_path.insert(0, Finder())
"""
PARTS = ["datetime", "metquay_proxy.settings", "metquay_proxy.app", "metquay_proxy.sandbox.server"]
"""pydantic's library in Rust loads the first, and makes an exception of its own of any other."""
HARMLESS = () if sys.platform == "win32" else (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def early(folder: Path, where: str, *numbers: int) -> dict[str, str]:
    """Return the variables of a program that gets signals when it loads one of its parts."""
    (folder / "sitecustomize.py").write_text(EARLY_SIGNAL)
    signals = " ".join(str(int(number)) for number in numbers)
    path = f"{folder}{os.pathsep}{ROOT}"
    return environment("http://127.0.0.1:9") | {"PYTHONPATH": path, "WHERE": where, "SIGNALS": signals}


@posix_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", PARTS)
@pytest.mark.slow
def test_while_it_loads(tmp_path: Path, where: str, number: int) -> None:
    """A signal that comes while the program still loads its parts ends it with 0, and without a word."""
    variables = early(tmp_path, where, number)
    run = subprocess.run(
        [sys.executable, "-m", "metquay_proxy", "serve", "--sandbox"],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (0, "", "") == (run.returncode, run.stdout, run.stderr)


@posix_only
@pytest.mark.parametrize("where", PARTS)
@pytest.mark.slow
async def test_harmless_signals_while_it_loads(tmp_path: Path, where: str) -> None:
    """SIGUSR1, SIGUSR2 and, without a terminal, SIGHUP end nothing while the program still loads its parts."""
    with process(tmp_path, "serve", "--sandbox", **early(tmp_path, where, *HARMLESS)) as command:
        await ended(command, signal.SIGTERM)


@posix_only
@pytest.mark.slow
async def test_harmless_signals(tmp_path: Path) -> None:
    """The same once it runs, and while it drains; SIGHUP has files read again, of which one line tells."""
    async with sidecar(tmp_path) as running:
        client = await running.client()
        for number in HARMLESS:
            running.command.popen.send_signal(number)
        await eventually(lambda: "files were read again" in running.command.log.read_text())
        await client.send(get())
        peer = await running.upstream.peer()
        await peer.request()
        ending = asyncio.ensure_future(ended(running.command, *HARMLESS, signal.SIGTERM, *HARMLESS))
        await eventually(lambda: '"stopping"' in running.command.log.read_text())
        await asyncio.sleep(0.1)
        await peer.send(OK)
        assert b"ok" == (await client.answer()).body
        await ending


TERMINAL = """
import os
os.open(os.environ["TERMINAL"], os.O_RDWR)  # a process that leads a session and has none gets it as its terminal
"""


@posix_only
@pytest.mark.slow
async def test_a_terminal_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a controlling terminal SIGHUP means that this was closed: the program ends, after the requests in flight."""
    controller, terminal = os.openpty()
    (tmp_path / "sitecustomize.py").write_text(TERMINAL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("TERMINAL", os.ttyname(terminal))
    async with sidecar(tmp_path) as running:
        client = await running.client()
        await client.send(get())
        peer = await running.upstream.peer()
        await peer.request()
        os.close(terminal)
        os.close(controller)
        await eventually(lambda: '"stopping"' in running.command.log.read_text())
        await peer.send(OK)
        assert b"ok" == (await client.answer()).body
        await client.ended()
        assert 0 == await asyncio.to_thread(running.command.popen.wait, 10)


@posix_only
@pytest.mark.slow
async def test_nohup(tmp_path: Path) -> None:
    """Where SIGHUP is ignored at the start, as under nohup, it stays ignored: nothing is read again."""
    (tmp_path / "sitecustomize.py").write_text("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    variables = environment("http://127.0.0.1:9") | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with process(tmp_path, "serve", **variables) as command:
        await ended(command, signal.SIGHUP, signal.SIGTERM)
        assert "files were read again" not in command.output


def started(folder: Path, **settings: str) -> Iterator[str]:
    """Run the sandbox with these settings; yield what is printed at the start, and end it."""
    variables = environment("http://127.0.0.1:9", **settings)
    with subprocess.Popen(
        [sys.executable, "-m", "metquay_proxy", "serve", "--sandbox"],
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as popen:
        assert popen.stdout is not None
        printed = ""
        for line in popen.stdout:
            printed += line
            if line.startswith(("try: ", "{")):
                break
        try:
            yield printed
        finally:
            popen.terminate()
        assert 0 == popen.wait(20)


CURL = shutil.which("curl")


@posix_only
@pytest.mark.slow
@pytest.mark.skipif(CURL is None, reason="what is printed is for curl")
@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"listen": "localhost:0"}, "http://localhost:"),
        ({"listen": "0.0.0.0:0"}, "http://127.0.0.1:"),
        ({"listen": "[::]:0"}, "http://127.0.0.1:"),
        ({"listen": "unix:{}/a b$,127.0.0.1:0"}, "http://127.0.0.1:"),
        ({"listen": "unix:{}/a b$"}, "--unix-socket"),
        ({"tls_cert": "{}/s.pem", "tls_key": "{}/s.pem", "listen": "127.0.0.1:0"}, "https://127.0.0.1:"),
        ({"tls_cert": "{}/s.pem", "tls_key": "{}/s.pem", "listen": "unix:{}/s"}, "--unix-socket"),
        ({"client_key": "key-of-the-workbook-0123"}, "http://127.0.0.1:"),
        ({"client_keys": "a:key-of-the-workbook-0123:read-only", "listen": "[::1]:0"}, "http://[::1]:"),
        ({"read_only": "true"}, "http://127.0.0.1:"),
    ],
)
def test_what_is_printed_can_be_pasted(tmp_path: Path, settings: dict[str, str], where: str, form: str) -> None:
    """The command that is printed works in a shell, with whatever settings, and shows no key."""
    trustme.CA().issue_cert("tools.lab.example").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "s.pem"))
    texts = {name: text.replace("{}", str(tmp_path)) for name, text in settings.items()}
    for printed in started(tmp_path, log_format=form, **texts):
        if form == "json":
            assert 1 == printed.count("\n")
            told = json.loads(printed)
            assert ["event", "version", "addresses", "upstream", "status_page", "try"] == list(told)
            line, page = told["try"], told["status_page"]
        else:
            line = re.search("^try: (.*)$", printed, re.MULTILINE)[1]  # type: ignore[index]
            page = (re.search("^status page: (.*)$", printed, re.MULTILINE) or [None, None])[1]
        assert where in line
        assert (page is None) is ("--unix-socket" in line)
        assert "key-of" not in printed
        assert ("X-Proxy-Key" in printed) is ("client_key" in str(settings) and form == "console")
        assert "//0.0.0.0" not in printed
        assert "//[::]:" not in printed
        command = f"{line} --silent --noproxy '*' --retry 5 --retry-all-errors --retry-delay 1 --fail"
        pasted = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30, check=False)  # noqa: S602 - ours
        assert (0, "") == (pasted.returncode, pasted.stderr)
        assert pasted.stdout.startswith("ready" if "client_key" in str(settings) else "[{")


@posix_only
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.slow
def test_signals_to_the_very_end(tmp_path: Path, loop: str, number: int) -> None:
    """However late a signal comes, the program ends with 0."""
    off = "import sys; sys.modules['uvloop'] = None" if loop == "asyncio" else "import uvloop"
    (tmp_path / "sitecustomize.py").write_text(off)
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with process(tmp_path, "serve", "--sandbox", "--listen=127.0.0.1:0", **path) as command:
        command.popen.send_signal(signal.SIGTERM)
        while command.popen.poll() is None:
            command.popen.send_signal(number)
            time.sleep(0.0002)
        assert 0 == command.popen.returncode
        assert not TROUBLE.search(command.log.read_text())
