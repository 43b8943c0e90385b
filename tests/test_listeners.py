"""Where the proxy listens: both families, what is taken or impossible, unix sockets, and the limit of open files."""

# ruff: noqa: S104 - addresses that are bound for a moment
from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import socket
import stat
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import trustme

from metquay_proxy.listeners import CannotListen, bind, let_in, own_names, release, serving_context, sockets_of
from metquay_proxy.rules.address import Address, parse_listen
from metquay_proxy.settings import SettingsError, load
from tests.running import process
from tests.wire import OK, Broken, Client, Upstream, answered, certified, eventually, get, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

    from tests.running import Process
    from tests.wire import Message


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def free_port() -> int:
    """Return a port that is free on both families."""
    with listening("[::]:0") as found:
        return int(found[0].getsockname()[1])


@contextlib.contextmanager
def listening(listen: str, mode: int = 0o600) -> Iterator[list[socket.socket]]:
    """Listen for a setting, and end it."""
    bound = bind(parse_listen(listen), mode)
    try:
        yield [sock for _, sockets in bound for sock in sockets]
    finally:
        release(bound)


def hosts(listen: str) -> list[str]:
    """Return at which hosts one listens for a setting."""
    with listening(listen) as sockets:
        return sorted(sock.getsockname()[0] for sock in sockets)


class TestAddresses:
    @pytest.mark.parametrize(
        ("listen", "expected"),
        [
            ("localhost:{}", ["127.0.0.1", "::1"]),
            ("[::]:{}", ["0.0.0.0", "::"]),
            ("0.0.0.0:{}", ["0.0.0.0"]),
            ("0.0.0.0:{0},[::]:{0}", ["0.0.0.0", "::"]),
            ("[::]:{0},0.0.0.0:{0}", ["0.0.0.0", "::"]),
            ("127.0.0.1:{0},[::]:{0}", ["0.0.0.0", "::"]),
            ("localhost:{0},127.0.0.1:{0}", ["127.0.0.1", "::1"]),
            ("0.0.0.0:{0},localhost:{0}", ["0.0.0.0", "::1"]),
            ("[::]:0,0.0.0.0:0", ["0.0.0.0", "0.0.0.0", "::"]),
        ],
    )
    def test_families(self, listen: str, expected: list[str]) -> None:
        """``localhost`` and ``[::]`` mean both; what another of the addresses listens for is listened for once."""
        assert expected == hosts(listen.format(free_port()))

    def test_any_port(self) -> None:
        """Both families get the same one."""
        with listening("localhost:0") as sockets:
            assert 1 == len({sock.getsockname()[1] for sock in sockets})

    def test_without_ipv6(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the machine has no IPv6 both mean IPv4, and ``::1`` alone is an error that says so."""

        class Socket(socket.socket):
            def __init__(self, family: int = socket.AF_INET, *rest: int, **more: int) -> None:
                if family == socket.AF_INET6:
                    raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
                super().__init__(family, *rest, **more)

        monkeypatch.setattr(socket, "socket", Socket)
        assert [["127.0.0.1"], ["0.0.0.0"]] == [hosts("localhost:0"), hosts("[::]:0")]
        with pytest.raises(CannotListen, match=r"\[::1\]:0 is not an address of this computer, or IPv6 is off"):
            bind([Address("::1", 0)])

    @pytest.mark.parametrize(
        ("host", "taken_at"),
        [(host, "127.0.0.1") for host in ("localhost", "127.0.0.1", "::", "0.0.0.0")]
        + [("localhost", "::1"), ("::", "::1")],
    )
    def test_taken(self, host: str, taken_at: str) -> None:
        """A port that is taken on either family is an error that names the address, and leaves nothing open."""
        family = socket.AF_INET6 if ":" in taken_at else socket.AF_INET
        with socket.create_server((taken_at, 0), family=family) as taken:
            address = Address(host, taken.getsockname()[1])
            with pytest.raises(
                CannotListen, match=re.escape(f"{address} is taken, probably by another program")
            ) as caught:
                bind([Address("127.0.0.1", 0), address])
            assert caught.value.taken
        release(bind([address]))

    @pytest.mark.parametrize(
        ("listen", "cause", "cure"),
        [
            ("192.0.2.1:7000", "is not an address of this computer", "0.0.0.0 for every address"),
            ("no-such-host.invalid:7000", "its name is not known", "Check the spelling"),
            ("unix:{}/none/s", "is in a folder that does not exist", "Make that folder"),
            ("unix:{}/file", "a file that is no socket is in the way", "Mend that, or choose"),
            ("unix:{}/file/s", "Not a directory", "choose another place in METQUAY_LISTEN"),
            ("unix:{}/" + 120 * "s", "path too long", "choose another place in METQUAY_LISTEN"),
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
        ("number", "cause"),
        [(errno.EACCES, "is forbidden to this user"), (errno.EMFILE, "has reached its limit of open files")],
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
        """It serves its owner only, breaks off a broken answer without a reset, and is removed at the end."""
        path = folder / "proxy.sock"
        async with running(listen=f"127.0.0.1:0,unix:{path}") as bench:
            assert 0o600 == stat.S_IMODE(path.stat().st_mode)
            bench.clients += [Client(*await asyncio.open_unix_connection(path)) for _ in range(2)]
            broken, whole = bench.clients
            await broken.send(get())
            peer = await bench.upstream.peer()
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")
            peer.close()
            with pytest.raises(Broken):
                await broken.answer()
            bench.upstream.plays(answered(b"Location: " + bench.upstream.url.encode() + b"/y", body=b"a"))
            await whole.send(get(host=b"localhost"))
            answer = await whole.answer()
            assert (b"a", b"http://localhost/api/v1/y") == (answer.body, answer.value(b"Location"))
        assert not path.exists()

    @pytest.mark.parametrize("accepts", [True, False])
    def test_in_the_way(self, folder: Path, accepts: bool) -> None:  # noqa: FBT001 - a table
        """A stale socket is replaced; a live one is an error at once, even where its owner has stopped accepting."""
        path = folder / "proxy.sock"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        with listening(f"unix:{path}") as [owned], contextlib.ExitStack() as waiting:
            if not accepts:
                owned.listen(0)
                fillers = [waiting.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
                for filler in fillers:
                    filler.setblocking(False)  # noqa: FBT003 - the standard library's own
                    filler.connect_ex(str(path))
            with pytest.raises(CannotListen, match=f"unix:{path} is taken, probably by another program"):
                bind([Address("", 0, str(path))])
            assert path.exists()
        assert not path.exists()

    def test_mode(self, folder: Path) -> None:
        """METQUAY_SOCKET_MODE is octal, however it is written, and decides who may open the socket."""
        for text, mode in {"600": 0o600, "0660": 0o660, "0o666": 0o666, None: 0o600}.items():
            settings = load({"socket_mode": text} if text else {}, sandbox=True)
            with listening(f"unix:{folder}/s", settings.socket_mode):
                assert mode == stat.S_IMODE((folder / "s").stat().st_mode)

    @pytest.mark.parametrize("text", [" ", "66", "0066", "888", "rw-rw----", "01660", "384"])
    def test_wrong_mode(self, text: str) -> None:
        """What is no mode, or would keep the owner out, is one line."""
        with pytest.raises(SettingsError) as caught:
            load({"socket_mode": text}, sandbox=True)
        assert ["METQUAY_SOCKET_MODE (--socket-mode)"] == [line.partition(":")[0] for line in caught.value.lines]


@pytest.mark.parametrize("listen", ["localhost:0", "127.0.0.1:0,[::1]:0", "127.0.0.2:0"])
def test_own_names(monkeypatch: pytest.MonkeyPatch, listen: str) -> None:
    """Where every listener is loopback TCP, one name without a dot is this machine's."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.lab.example")
    assert {"box"} == own_names(parse_listen(listen))


@pytest.mark.parametrize("listen", ["localhost:0,0.0.0.0:0", "192.0.2.1:0", "box:0", "unix:/s", "localhost:0,unix:/s"])
def test_any_name(listen: str) -> None:
    """Elsewhere any name without a dot may lead here."""
    assert own_names(parse_listen(listen)) is None


def test_a_pair_that_does_not_fit(tmp_path: Path) -> None:
    """A key of another certificate, or one with a password, is refused in words that name both files."""
    certified(tmp_path, client_tls=True)
    other = trustme.CA().issue_cert("localhost")
    other.private_key_pem.write_to_path(tmp_path / "key.pem")
    with pytest.raises(ValueError, match=r"key.pem is not the private key, .* of the certificate in .*server.pem"):
        serving_context(tmp_path / "server.pem", tmp_path / "key.pem")
    with pytest.raises(FileNotFoundError):
        serving_context(tmp_path / "server.pem", tmp_path / "none.pem")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.skipif(sys.platform == "win32", reason="asyncio itself accepts there, and closes without a word")
class TestClearTextWhereTLSIsExpected:
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "CONNECT"])
    def test_http(self, tmp_path: Path, loop: str, method: str) -> None:
        """Who writes http:// in place of https:// is told so, in clear text, and so is the log."""
        request = f"{method} /x HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with structlog.testing.capture_logs() as told:
            head, _, body = on(loop, partial(sent_to_tls, tmp_path, request)).partition(b"\r\n\r\n")
        assert b"HTTP/1.1 400 Bad Request" == head.splitlines()[0]
        fields = {b"X-Metquay-Proxy-Error: bad-request", b"X-Metquay-Proxy-Sent: no", b"Connection: close"}
        assert fields | {b"Content-Length: %d" % len(body)} <= set(head.splitlines())
        message = "This is http where https is expected. Use https:// in the tool."
        assert {"code": 400, "message": message} == json.loads(body)
        why = "a client does not speak TLS, which is expected here"
        assert [{"event": why, "log_level": "warning"}] == told

    def test_silence(self, tmp_path: Path, loop: str) -> None:
        """Who says nothing within the time for a handshake gets no answer."""
        assert b"" == on(loop, partial(sent_to_tls, tmp_path, b""))


def on(loop: str, what: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
    """Run it on a loop of this kind."""
    library = pytest.importorskip(loop, reason=f"{loop} is not installed")
    with asyncio.Runner(loop_factory=library.new_event_loop) as runner:
        return runner.run(what())


async def sent_to_tls(folder: Path, clear: bytes) -> bytes:
    """Return all that is answered to clear text where TLS is served; others are served before and after."""
    options = certified(folder, client_tls=True)
    context = serving_context(Path(options["tls_cert"]), Path(options["tls_key"]))
    bound = bind([Address("127.0.0.1", 0)])
    [door] = await let_in(Greeting, sockets_of(bound), context, lambda _: None, handshake=0.2)

    async def answer(sent: bytes, **more: Any) -> bytes:  # noqa: ANN401 - of asyncio.open_connection
        reader, writer = await asyncio.open_connection("127.0.0.1", bound[0][0].port, **more)
        writer.write(sent)
        got = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return got

    secure = {"ssl": options["client_tls"], "server_hostname": "localhost"}
    assert b"hello" == await answer(b"", **secure)
    got = await answer(clear)
    assert b"hello" == await answer(b"", **secure)
    door.close()
    return got


class Greeting(asyncio.Protocol):
    """Says hello to whoever comes, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say so."""
        transport.write(b"hello")  # type: ignore[attr-defined]
        transport.close()


@pytest.mark.slow
async def test_accepting_fails() -> None:
    """Where it fails for want of a descriptor it is told once, tried again each second, and told when it is over."""

    class Failing(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            tries.append(time.monotonic())
            if len(tries) < 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    tries: list[float] = []
    told: list[str | None] = []
    [(address, [sock])] = bind([Address("127.0.0.1", 0)])
    [door] = await let_in(Greeting, [Failing(fileno=sock.detach())], None, told.append)
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    assert b"hello" == await reader.read()
    writer.close()
    assert 1.8 < tries[2] - tries[0] < 4
    await eventually(lambda: len(told) == 2)
    assert "has reached its limit of open files" in str(told[0])
    assert (None, 4) == (told[1], len(tries))  # the last one finds nobody
    door.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
class TestTheLimitOfOpenFiles:
    async def test_too_many_clients(self, tmp_path: Path, loop: str) -> None:
        """Who is connected is served; one line says why others are not, and one that they are, once there is room."""
        async with few_files(tmp_path, loop, "127.0.0.1") as (upstream, command, connect):
            upstream.plays(OK)
            early = [await connect() for _ in range(10)]
            assert [200] * 10 == [answer.status for answer in await asked(early)]
            idle = await asyncio.gather(*[connect() for _ in range(70)])
            for _ in range(4):
                assert [200] * 10 == [answer.status for answer in await asked(early)]
                await asyncio.sleep(0.5)
            used = Path(f"/proc/{command.popen.pid}/stat")
            before = sum(map(int, used.read_text().split()[13:15]))
            await asyncio.sleep(2)
            assert 20 > sum(map(int, used.read_text().split()[13:15])) - before  # hundredths of a second
            for client in idle:
                client.close()
            assert [200] == [answer.status for answer in await asked([await connect()])]
            await eventually(lambda: "accepted again" in command.log.read_text())
            assert 0 == await asyncio.to_thread(command.stop)
        told = [line for line in map(json.loads, command.log.read_text().splitlines()) if line["event"] != "request"]
        assert 1 == max(Counter((line["level"], line["event"]) for line in told).values())
        [why] = [line["reason"] for line in told if line["level"] in {"warning", "error"}]
        assert "has reached its limit of open files and connections (limit 60). Raise the limit" in why

    async def test_too_many_connections_to_metquay(self, tmp_path: Path, loop: str) -> None:
        """Where a request finds no descriptor left it is told so, and what to do; the next one finds one again."""
        async with few_files(tmp_path, loop, "localhost") as (upstream, _, connect):  # which must be looked up
            clients = [await connect() for _ in range(30)]
            waiting = {asyncio.ensure_future(client.answer()): client for client in clients}
            for client in clients:
                await client.send(get())
            done, _ = await asyncio.wait(waiting, timeout=1)
            assert 0 < len(done) < 30
            for answer in [task.result() for task in done]:
                assert (502, "upstream-unreachable") == (answer.status, answer.slug)
                assert (
                    b"this program has reached its limit of open files and connections. Raise the limit" in answer.body
                )
            upstream.plays(OK)
            for peer in upstream.peers:
                await peer.send(answered("Connection: close"))
            assert {200} == {(await task).status for task in waiting if task not in done}
            assert [200] == [answer.status for answer in await asked([waiting[done.pop()]])]


@contextlib.asynccontextmanager
async def few_files(
    folder: Path, loop: str, host: str
) -> AsyncIterator[tuple[Upstream, Process, Callable[[], Awaitable[Client]]]]:
    """Run a proxy that may open sixty files; yields its upstream, itself, and how to connect to it."""
    without = 'sys.modules["uvloop"] = None' if loop == "asyncio" else ""
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))"
    (folder / "sitecustomize.py").write_text(f"import resource, sys\n{limit}\n{without}\n")
    upstream = Upstream()
    await upstream.start()
    values = {"host": upstream.url.replace("127.0.0.1", host), "access_key": "a" * 8, "secret_key": "s" * 8}
    values |= {"listen": "127.0.0.1:0", "rate_limit": "off", "retries": "0"}
    variables = {f"METQUAY_{name.upper()}": value for name, value in values.items()}
    clients: list[Client] = []
    with process(folder, "serve", **variables, PYTHONPATH=f"{folder}:{Path(__file__).parent.parent}") as command:

        async def connect() -> Client:
            clients.append(Client(*await asyncio.open_connection("127.0.0.1", int(command.url.rpartition(":")[2]))))
            return clients[-1]

        yield upstream, command, connect
        for client in clients:
            client.close()
    await upstream.stop()


async def asked(clients: list[Client]) -> list[Message]:
    """Let each client ask something at the same time."""
    for client in clients:
        await client.send(get())
    return [await client.answer() for client in clients]
