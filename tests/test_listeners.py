"""Where the proxy listens: both families, what is taken or impossible, unix sockets, and the limit of open files."""

# ruff: noqa: S104 - addresses that are bound for a moment
from __future__ import annotations

import asyncio
import errno
import json
import re
import socket
import stat
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.listeners import CannotListen, bind, let_in, release
from metquay_proxy.rules.address import Address, parse_listen
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.settings import SettingsError, load
from metquay_proxy.upstream.pool import Transport
from tests.running import process
from tests.wire import OK, Broken, Client, Upstream, answered, eventually, get, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.wire import Message


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def free_port() -> int:
    """Return a port that is free on both families."""
    bound = bind([Address("::", 0)])
    release(bound)
    return bound[0][0].port


def places(listen: str) -> list[str]:
    """Return where one listens for a setting, and end it."""
    bound = bind(parse_listen(listen))
    try:
        return sorted(str(sock.getsockname()[0]) for _, sockets in bound for sock in sockets)
    finally:
        release(bound)


class TestAddresses:
    @pytest.mark.parametrize(
        ("host", "expected"), [("localhost", {"127.0.0.1", "::1"}), ("::", {"0.0.0.0", "::"}), ("0.0.0.0", {"0.0.0.0"})]
    )
    def test_families(self, host: str, expected: set[str]) -> None:
        """``localhost`` and ``[::]`` mean both families on one port, which is free on both, and the port is told."""
        bound = bind([Address(host, 0)])
        sockets = bound[0][1]
        try:
            assert {bound[0][0].port} == {sock.getsockname()[1] for sock in sockets}
            assert expected == {sock.getsockname()[0] for sock in sockets}
        finally:
            release(bound)

    @pytest.mark.parametrize(("host", "expected"), [("localhost", ["127.0.0.1"]), ("[::]", ["0.0.0.0"])])
    def test_without_ipv6(self, monkeypatch: pytest.MonkeyPatch, host: str, expected: list[str]) -> None:
        """Where the machine has no IPv6 they mean IPv4, and ``::1`` alone is an error that says so."""

        class Socket(socket.socket):
            def __init__(self, family: int = socket.AF_INET, *rest: int, **more: int) -> None:
                if family == socket.AF_INET6:
                    raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
                super().__init__(family, *rest, **more)

        monkeypatch.setattr(socket, "socket", Socket)
        assert expected == places(f"{host}:0")
        with pytest.raises(CannotListen, match=r"\[::1\]:0 is no address of this computer, or IPv6 is switched off"):
            bind([Address("::1", 0)])

    @pytest.mark.parametrize(
        ("listen", "expected"),
        [
            ("0.0.0.0:{0},[::]:{0}", ["0.0.0.0", "::"]),
            ("[::]:{0},0.0.0.0:{0}", ["0.0.0.0", "::"]),
            ("127.0.0.1:{0},[::]:{0}", ["0.0.0.0", "::"]),
            ("localhost:{0},127.0.0.1:{0}", ["127.0.0.1", "::1"]),
            ("0.0.0.0:{0},localhost:{0}", ["0.0.0.0", "::1"]),
            ("[::]:0,0.0.0.0:0", ["0.0.0.0", "0.0.0.0", "::"]),
        ],
    )
    def test_beside_each_other(self, listen: str, expected: list[str]) -> None:
        """What another of the addresses listens for already is no error, and listened for once."""
        assert expected == places(listen.format(free_port()))

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::", "0.0.0.0"])
    @pytest.mark.parametrize("taken_at", ["127.0.0.1", "::1"])
    def test_taken(self, host: str, taken_at: str) -> None:
        """A port that is taken on either family is an error that names the address, and leaves nothing open."""
        if ":" in taken_at and "." in host:
            return
        family = socket.AF_INET6 if ":" in taken_at else socket.AF_INET
        with socket.create_server((taken_at, 0), family=family) as taken:
            address = Address(host, taken.getsockname()[1])
            with pytest.raises(CannotListen, match=re.escape(f"{address} is taken by another program")) as caught:
                bind([Address("127.0.0.1", 0), address])
            assert caught.value.taken
        release(bind([address]))

    @pytest.mark.parametrize(
        ("listen", "cause", "cure"),
        [
            ("192.0.2.1:7000", "is no address of this computer.", "0.0.0.0 for every address"),
            ("no-such-host.invalid:7000", "its name is not known", "Check the spelling"),
            ("unix:{}/none/s", "is in a folder that does not exist", "Make that folder"),
            ("unix:{}/file", "is a file that is no socket", "Move that file away"),
            ("unix:{}/file/s", "is in a folder that does not exist", "Make that folder"),
            ("unix:{}/" + 120 * "s", "is too long for a socket's path", "less than 100"),
        ],
    )
    def test_impossible(self, folder: Path, listen: str, cause: str, cure: str) -> None:
        """Whatever is wrong, one sentence names the address and the cause, and one says what to do."""
        (folder / "file").touch()
        [address] = parse_listen(listen.format(folder))
        with pytest.raises(CannotListen) as caught:
            bind([Address("", 0, f"{folder}/first"), address])
        assert caught.value.cause.startswith(str(address))
        assert cause in caught.value.cause
        assert cure in caught.value.cure
        assert [folder / "file"] == list(folder.iterdir())

    @pytest.mark.parametrize(
        ("number", "cause"), [(errno.EACCES, "This user may not listen on"), (errno.EMFILE, "may open no more files")]
    )
    def test_refused_by_the_system(self, monkeypatch: pytest.MonkeyPatch, number: int, cause: str) -> None:
        """A port that is not for everybody, and a limit of open files, are told as such."""

        def refuse(*_: object) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(socket.socket, "bind", refuse)
        with pytest.raises(CannotListen, match=rf"{cause}.*") as caught:
            bind([Address("127.0.0.1", 80)])
        assert "127.0.0.1:80" in caught.value.cause


class TestUnixSockets:
    async def test_served(self, folder: Path) -> None:
        """A unix socket serves its owner only, and is removed at the end."""
        path = folder / "proxy.sock"
        async with running(listen=f"127.0.0.1:0,unix:{path}") as bench:
            assert 0o600 == stat.S_IMODE(path.stat().st_mode)
            client = Client(*await asyncio.open_unix_connection(path))
            bench.clients.append(client)
            bench.upstream.plays(answered(b"Location: " + bench.upstream.url.encode() + b"/y", body=b"a"))
            await client.send(get(host=b"localhost"))
            answer = await client.answer()
            assert (b"a", b"http://localhost/api/v1/y") == (answer.body, answer.value(b"Location"))
        assert not path.exists()

    async def test_broken_answer(self, folder: Path) -> None:
        """On a unix socket, which knows no reset, a broken answer with a length or chunks is still broken."""
        path = folder / "proxy.sock"
        async with running(listen=f"127.0.0.1:0,unix:{path}") as bench:
            client = Client(*await asyncio.open_unix_connection(path))
            bench.clients.append(client)
            await client.send(get())
            peer = await bench.upstream.peer()
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")
            peer.close()
            with pytest.raises(Broken):
                await client.answer()

    def test_in_the_way(self, folder: Path) -> None:
        """A stale socket is replaced; a live one is an error."""
        path = folder / "proxy.sock"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        bound = bind([Address("", 0, str(path))])
        with pytest.raises(CannotListen, match=f"unix:{path} is taken by another program"):
            bind([Address("", 0, str(path))])
        assert path.exists()
        release(bound)
        assert not path.exists()

    @pytest.mark.parametrize(
        ("text", "mode"), [("600", 0o600), ("0660", 0o660), ("0o666", 0o666), ("770", 0o770), (None, 0o600)]
    )
    def test_mode(self, folder: Path, text: str | None, mode: int) -> None:
        """METQUAY_SOCKET_MODE is octal, however it is written, and decides who may open the socket."""
        flags = {"listen": f"unix:{folder}/s"} | ({"socket_mode": text} if text else {})
        settings = load(flags, sandbox=True)
        bound = bind(settings.listen, settings.socket_mode)
        try:
            assert mode == stat.S_IMODE((folder / "s").stat().st_mode)
        finally:
            release(bound)

    @pytest.mark.parametrize("text", ["", "66", "0066", "888", "rw-rw----", "01660", "384"])
    def test_wrong_mode(self, text: str) -> None:
        """What is no mode, or would keep the owner out, is one line."""
        with pytest.raises(SettingsError) as caught:
            load({"socket_mode": text or " "}, sandbox=True)
        assert 1 == len(caught.value.lines)
        assert caught.value.lines[0].startswith("METQUAY_SOCKET_MODE (--socket-mode): ")


ROOT = Path(__file__).parent.parent


@pytest.mark.slow
async def test_accepting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it fails for want of a descriptor it is told once, tried again each second, and told when it is over."""

    class Greeting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.write(b"hello")  # type: ignore[attr-defined]
            transport.close()

    tries: list[float] = []
    accept = socket.socket.accept

    def failing(sock: socket.socket) -> object:
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", failing)
    told: list[str | None] = []
    [(address, sockets)] = bind([Address("127.0.0.1", 0)])
    doors = await let_in(Greeting, sockets, None, told.append)
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    assert b"hello" == await reader.read()
    writer.close()
    assert 1.8 < tries[2] - tries[0] < 4
    assert 3 <= len(tries) <= 4  # the last one finds nobody
    await eventually(lambda: len(told) == 2)
    assert "may open no more files" in str(told[0])
    assert told[1] is None
    for door in doors:
        door.close()


async def test_a_look_up_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up does not say that it failed for want of a descriptor: that there is none tells."""

    def nowhere(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    transport = Transport(
        BaseURL.parse("https://lab.metquay.example"), ssl_context=None, connect_timeout=5, read_timeout=5
    )
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(ProxyError, match="its name could not be looked up"):
        await transport.warm()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", none_left)
        with pytest.raises(ProxyError, match=r"may open no more files.*Raise") as caught:
            await transport.warm()
    assert "upstream-unreachable" == caught.value.slug


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
if {} == "asyncio":
    sys.modules["uvloop"] = None
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such limit")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
class TestTheLimitOfOpenFiles:
    async def test_too_many_clients(self, tmp_path: Path, loop: str) -> None:
        """Who is connected is served; one line says why others are not, and one that they are, once there is room."""
        upstream = Upstream()
        await upstream.start()
        upstream.plays(OK)
        with process(tmp_path, "serve", **few_files(tmp_path, loop, upstream.url)) as command:
            port = int(command.url.rpartition(":")[2])
            early = [Client(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(10)]
            assert [200] * 10 == [answer.status for answer in await asked(early)]
            idle = [Client(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(70)]
            for _ in range(4):
                assert [200] * 10 == [answer.status for answer in await asked(early)]
                await asyncio.sleep(0.5)
            used = Path(f"/proc/{command.popen.pid}/stat")
            before = sum(map(int, used.read_text().split()[13:15])) if used.exists() else 0
            await asyncio.sleep(2)
            after = sum(map(int, used.read_text().split()[13:15])) if used.exists() else 0
            assert after - before < 20  # hundredths of a second
            for client in idle:
                client.close()
            late = Client(*await asyncio.open_connection("127.0.0.1", port))
            assert [200] == [answer.status for answer in await asked([late])]
            log = command.log
            await eventually(lambda: "let in again" in log.read_text())
            for client in [*early, late]:
                client.close()
            assert 0 == await asyncio.to_thread(command.stop)
        await upstream.stop()
        told = Counter(
            (line["level"], line["event"])
            for line in map(json.loads, log.read_text().splitlines())
            if line["event"] != "request"
        )
        assert {"error": 1} == Counter(level for level, _ in told if level in {"warning", "error"})
        assert max(told.values()) == 1
        assert re.search(r"may open no more files and connections \(limit 60\). Raise the limit", log.read_text())

    async def test_too_many_connections_to_metquay(self, tmp_path: Path, loop: str) -> None:
        """Where a request finds no descriptor left it is told so, and what to do; the next one finds one again."""
        upstream = Upstream()
        await upstream.start()
        named = upstream.url.replace("127.0.0.1", "localhost")  # which must be looked up
        with process(tmp_path, "serve", **few_files(tmp_path, loop, named)) as command:
            port = int(command.url.rpartition(":")[2])
            clients = [Client(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(30)]
            waiting = {asyncio.ensure_future(client.answer()): client for client in clients}
            for client in clients:
                await client.send(get())
            done, _ = await asyncio.wait(waiting, timeout=1)
            assert 0 < len(done) < 30
            for answer in [task.result() for task in done]:
                assert (502, "upstream-unreachable") == (answer.status, answer.slug)
                assert b"this program may open no more files and connections. Raise the limit" in answer.body
            upstream.plays(OK)
            for peer in upstream.peers:
                await peer.send(answered("Connection: close"))
            assert {200} == {(await task).status for task in waiting if task not in done}
            assert [200] == [answer.status for answer in await asked([waiting[done.pop()]])]
            for client in clients:
                client.close()
        await upstream.stop()


def few_files(folder: Path, loop: str, upstream: str) -> dict[str, str]:
    """Return the variables of a process that may open sixty files."""
    (folder / "sitecustomize.py").write_text(FEW_FILES.format(repr(loop)))
    values = {"host": upstream, "access_key": "a" * 8, "secret_key": "s" * 8, "listen": "127.0.0.1:0"}
    values |= {"rate_limit": "off", "retries": "0"}
    path = f"{folder}:{ROOT}"
    return {f"METQUAY_{name.upper()}": value for name, value in values.items()} | {"PYTHONPATH": path}


async def asked(clients: list[Client]) -> list[Message]:
    """Let each client ask something at the same time."""
    for client in clients:
        await client.send(get())
    return [await client.answer() for client in clients]
