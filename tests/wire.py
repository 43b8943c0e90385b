"""The wire bench: an upstream and a client that know bytes only, with the proxy between them on real sockets.

The upstream records exactly what it got and plays exactly what a test gives it, when the test gives it; the client
reads strictly. Both fail at once on anything that RFC 9112 does not allow, so that each test also proves that the proxy
emits nothing doubtful. A test is a rule: its docstring says it in one line, ``@rule`` says where it comes from and
which settings it needs, and ``tests/RULES.md`` lists them all. The same rules run against ``tests/naive.py``
(WIRE_TARGET=naive), which must fail many: the bench can fail. WIRE_LOOP=uvloop chooses the other event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trustme

from metquay_proxy.app import Proxy
from metquay_proxy.downstream.connection import Bounds
from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.settings import Settings
from tests.naive import Naive

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
    from pathlib import Path

Test = TypeVar("Test", bound="Callable[..., Any]")
Fields = list[tuple[bytes, bytes]]

TARGET = os.environ.get("WIRE_TARGET", "proxy")
PATIENCE = 10.0 if TARGET == "proxy" else 1.0
"""Seconds after which something that should have happened has not; a busy machine must not fail us."""
BLANK = b"\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TOKEN = "token-of-the-bench"  # noqa: S105 - nobody's
_LIMIT = 1 << 20
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*")
_REQUEST_LINE = re.compile(rb"([A-Z-]+) ([\x21-\x7e]+) HTTP/1\.1")
_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-9][0-9]{2}) ([\t\x20-\x7e\x80-\xff]*)")
_LOGIN = b"POST /api/v1/authenticate "


def rule(source: str, **options: Any) -> Callable[[Test], Test]:  # noqa: ANN401 - texts of settings, and Bounds
    """Mark a test as one rule. ``source`` is a section of an RFC, or ours; ``options`` are for ``Bench.start``."""

    def mark(test: Test) -> Test:
        test.rule = (source, options)  # type: ignore[attr-defined]
        return test

    return mark


class Broken(Exception):
    """A message that no careful reader takes for complete. ``got`` is what had arrived of it."""

    def __init__(self, why: str, got: bytes) -> None:
        super().__init__(f"{why} after {got[-200:]!r}")
        self.got = got


class Doubtful(AssertionError):
    """The proxy wrote something that HTTP does not allow, or that two readers may take for two things."""


@dataclass
class Message:
    """One request or answer as it stood on the wire.

    ``head`` are its exact bytes with the blank line, ``body`` is decoded, ``framing`` is none, length, chunked or
    close.
    """

    head: bytes
    line: bytes
    fields: Fields
    framing: str = "none"
    body: bytes = b""
    pieces: list[bytes] = field(default_factory=list)
    interim: list[Message] = field(default_factory=list)

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of a field, in order."""
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def value(self, name: bytes) -> bytes | None:
        """Return the value of a field that may occur once."""
        values = self.values(name)
        assert len(values) <= 1, self.head
        return values[0] if values else None

    @property
    def names(self) -> list[bytes]:
        """The names of the fields, in order and case."""
        return [name for name, _ in self.fields]

    @property
    def status(self) -> int:
        """An answer's status."""
        return int(self.line[9:12])

    @property
    def reason(self) -> bytes:
        """An answer's reason phrase."""
        return self.line[13:]

    @property
    def slug(self) -> str | None:
        """Which of the proxy's own errors it is."""
        value = self.value(b"X-Metquay-Proxy-Error")
        return None if value is None else value.decode()


class Wire:
    """One end of a connection that reads strictly and writes what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take the two halves of an open connection."""
        self.reader = reader
        self.writer = writer
        self.got = b""
        self.poured = 0

    async def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        """Write each piece in a segment of its own, ``pause`` seconds apart."""
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(pause)
            self.writer.write(piece)
            await self.writer.drain()

    def pause(self) -> None:
        """Read nothing until ``resume``."""
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]

    def resume(self) -> None:
        """Read again."""
        self.writer.transport.resume_reading()  # type: ignore[attr-defined]

    async def pour(self, *pieces: bytes) -> None:
        """Send the last piece again and again, until the other side has had enough."""
        *first, last = pieces
        last *= max(1, 4096 // len(last))
        with contextlib.suppress(ConnectionError):
            await self.send(*first)
            while True:
                await self.send(last)
                self.poured += len(last)
                await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def pouring(self, *pieces: bytes) -> AsyncIterator[None]:
        """Pour beside what the block does."""
        task = asyncio.ensure_future(self.pour(*pieces))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def pour_until_held_up(self, *pieces: bytes) -> int:
        """Pour until the other side takes no more for a while; return how many bytes went."""
        before = -1
        async with self.pouring(*pieces), asyncio.timeout(PATIENCE):
            while self.poured != before:
                before = self.poured
                await asyncio.sleep(0.1)
        return before

    def finish(self) -> None:
        """Close our half: the peer sees an end."""
        if not self.writer.is_closing():  # else the other end was faster, of which uvloop makes an error
            self.writer.write_eof()

    def close(self) -> None:
        """Close in order."""
        self.writer.close()

    def reset(self) -> None:
        """Reset the connection."""
        handle = self.writer.get_extra_info("socket")
        if handle is not None:  # else the other end was faster
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def some(self, size: int = 1 << 16) -> bytes:
        """Return what comes next, empty at the end; raise ``Broken`` at a reset."""
        try:
            data = await patiently(self.reader.read(size))
        except ConnectionError as error:
            raise self._reset() from error
        self.got += data
        return data

    async def exactly(self, size: int) -> bytes:
        """Return so many bytes; raise ``Broken`` where they don't come."""
        return await self._read(self.reader.readexactly(size))

    async def until(self, mark: bytes) -> bytes:
        """Return the bytes up to ``mark``, which ends them; raise ``Broken`` where it does not come."""
        return await self._read(self.reader.readuntil(mark))

    async def to_the_end(self) -> bytes:
        """Return everything up to a clean end of the connection."""
        data = b""
        while piece := await self.some():
            data += piece
        return data

    async def ended(self) -> None:
        """Assert that the peer closes in order and without another byte."""
        rest = await self.to_the_end()
        assert b"" == rest

    async def gone(self) -> bytes:
        """Wait until the peer is gone, in order or not; return what it still wrote."""
        with contextlib.suppress(Broken):
            return await self.to_the_end()
        return b""

    async def silent(self, seconds: float = 0.05) -> None:
        """Assert that nothing comes for a while."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                raise Doubtful(repr(await self.reader.read(1 << 16)))

    async def head(self, pattern: re.Pattern[bytes]) -> Message:
        """Read one head."""
        head = await self.until(BLANK)
        line, *lines = head[: -len(BLANK)].split(b"\r\n")
        if not pattern.fullmatch(line):
            raise Doubtful(head)
        fields = []
        for text in lines:
            match = _FIELD.fullmatch(text)
            if match is None:
                raise Doubtful(head)
            fields.append((match[1], match[2]))
        return Message(head, line, fields)

    async def body(self, message: Message, *, without: bool = False, answer: bool = False) -> Message:
        """Read the body that the head announces; ``without``: there is none whatever the head says."""
        lengths = message.values(b"Content-Length")
        codings = message.values(b"Transfer-Encoding")
        if len(lengths) + len(codings) > 1:
            raise Doubtful(message.head)
        if without:
            return message
        if codings:
            if codings != [b"chunked"]:
                raise Doubtful(message.head)
            message.framing = "chunked"
            while piece := await self._chunk():
                message.pieces.append(piece)
        elif lengths:
            if not re.fullmatch(rb"0|[1-9][0-9]{0,17}", lengths[0]):
                raise Doubtful(message.head)
            message.framing = "length"
            message.pieces.append(await self.exactly(int(lengths[0])))
        elif answer:
            message.framing = "close"
            message.pieces.append(await self.to_the_end())
        message.body = b"".join(message.pieces)
        return message

    async def _chunk(self) -> bytes:
        line = await self.until(b"\r\n")
        if not re.fullmatch(rb"0|[1-9a-f][0-9a-f]{0,8}", line[:-2]):
            raise Doubtful(line)
        size = int(line, 16)
        data = await self.exactly(size + 2)
        if not data.endswith(b"\r\n"):
            raise Doubtful(data)
        return data[:-2]

    async def _read(self, reading: Awaitable[bytes]) -> bytes:
        try:
            data = await patiently(reading)
        except asyncio.IncompleteReadError as error:
            self.got += error.partial
            raise Broken("ended", self.got) from error
        except ConnectionError as error:
            raise self._reset() from error
        self.got += data
        return data

    def _reset(self) -> Broken:
        self.got += bytes(self.reader._buffer)  # type: ignore[attr-defined]
        return Broken("reset", self.got)


class Client(Wire):
    """A client of the proxy."""

    async def answer(self, method: str = "GET") -> Message:
        """Read one final answer, with the interim ones before it."""
        interim = []
        while True:
            message = await self.head(_STATUS_LINE)
            if message.status >= 200:
                break
            interim.append(message)
        without = method == "HEAD" or message.status in {204, 304}
        if message.status == 204 and message.values(b"Content-Length"):
            raise Doubtful(message.head)
        message.interim = interim
        return await self.body(message, without=without, answer=True)

    async def interim(self) -> Message:
        """Read one interim answer."""
        message = await self.head(_STATUS_LINE)
        assert 100 == message.status
        return message


class Peer(Wire):
    """A connection that the upstream accepted."""

    waiting: Message | None = None
    playing: asyncio.Task[None] | None = None

    async def gone(self) -> bytes:
        """Wait until the proxy is gone; return what it still wrote where the test plays this connection."""
        if self.playing is None:
            return await super().gone()
        await patiently(asyncio.wait([self.playing]))
        return b""

    async def begun(self) -> Message:
        """Return the head of the next request."""
        message, self.waiting = self.waiting, None
        return message or await self.head(_REQUEST_LINE)

    async def request(self) -> Message:
        """Return the next request."""
        return await self.body(await self.begun())


class Upstream:
    """Accepts, and plays what it was given: to each request the next answer, the last one for all that follow.

    An answer is bytes, or a coroutine function that takes the ``Peer`` and plays itself. Without any, the test takes
    the connections by ``peer`` and plays them. Logins are answered apart and not recorded.
    """

    def __init__(self) -> None:
        """Begin without answers."""
        self.requests: list[Message] = []
        self.peers: list[Peer] = []
        self.broken: list[bytes] = []
        self.faults: list[BaseException] = []
        self.answers: list[bytes | Callable[[Peer], Awaitable[None]]] = []
        self.greeting = b""
        self._arrived: asyncio.Queue[Peer] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.url = ""

    async def start(self, tls: ssl.SSLContext | None = None, receive_buffer: int = 0) -> None:
        """Listen; ``receive_buffer`` bounds what is read ahead, by the kernel and here, in bytes."""
        sock = socket.create_server(("127.0.0.1", 0))
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._server = await asyncio.start_server(self._accepted, sock=sock, ssl=tls, limit=receive_buffer or _LIMIT)
        host, port = ("127.0.0.1", "http") if tls is None else ("localhost", "https")
        self.url = f"{port}://{host}:{sock.getsockname()[1]}/api/v1"

    async def stop(self) -> None:
        """Close everything."""
        assert self._server is not None
        self._server.close()
        await asyncio.sleep(0.001)  # what was just accepted is to be closed too
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.001)

    @property
    def connections(self) -> int:
        """How many are open, those of a login included."""
        return len(self._tasks)

    def refuse(self) -> None:
        """Listen no longer."""
        assert self._server is not None
        self._server.close()

    def plays(self, *answers: bytes | Callable[[Peer], Awaitable[None]]) -> None:
        """Give the answers."""
        self.answers = list(answers)

    async def peer(self) -> Peer:
        """Return the next connection on which the head of a request has come."""
        return await patiently(self._arrived.get())

    async def seen(self, count: int = 1) -> list[Message]:
        """Wait until so many whole requests have come, and return them."""
        await eventually(lambda: len(self.requests) >= count)
        return self.requests

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        task = asyncio.ensure_future(self._serve(Peer(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: Peer) -> None:
        try:
            if self.greeting:
                peer.writer.write(self.greeting)
            first = await peer.reader.readuntil(BLANK)
            peer.reader._buffer[:0] = first  # type: ignore[attr-defined]
            if first.startswith(_LOGIN):
                await peer.request()
                token = b'{"accessToken": "%b", "tokenType": "bearer", "expiresIn": 900}' % TOKEN.encode()
                head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(token)
                await peer.send(head + token)
                peer.close()
                return
            peer.got = b""
            self.peers.append(peer)
            peer.waiting = await peer.head(_REQUEST_LINE)
            self._arrived.put_nowait(peer)
            peer.playing = asyncio.current_task() if self.answers else None
            while self.answers:
                self.requests.append(await peer.request())
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                await (peer.send(answer) if isinstance(answer, bytes) else answer(peer))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass
        except Broken as error:
            if error.got and not self._between(peer):
                self.broken.append(error.got)
        except Doubtful as error:
            self.faults.append(error)

    def _between(self, peer: Peer) -> bool:
        whole = sum(len(message.head) for message in self.requests)
        return whole > 0 and peer.got.endswith(BLANK)


@dataclass
class Bench:
    """The two ends, and what stands between them; ``proxy`` is only there where that is ours."""

    upstream: Upstream
    host: str
    port: int
    running: Proxy | None
    client_tls: ssl.SSLContext | None = None
    clients: list[Client] = field(default_factory=list)
    crashes: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def proxy(self) -> Proxy:
        """Our proxy, for what can only be seen inside."""
        if self.running is None:
            pytest.skip("the naive proxy has no such inside")
        return self.running

    @property
    def authority(self) -> bytes:
        """What a client puts into Host."""
        return f"{self.host}:{self.port}".encode()

    async def client(self, **options: Any) -> Client:  # noqa: ANN401 - of asyncio.open_connection
        """Open a connection to the proxy."""
        if self.client_tls is not None:
            options |= {"ssl": self.client_tls, "server_hostname": "localhost"}
        client = Client(*await asyncio.open_connection(self.host, self.port, **{"limit": _LIMIT} | options))
        self.clients.append(client)
        return client

    async def mute(self) -> Client:
        """Open a connection that reads nothing until its transport is resumed; little fits in between."""
        before = set(self.proxy.server.clients)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)  # noqa: FBT003 - a position of the standard library's
        await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        client = Client(*await asyncio.open_connection(sock=sock, limit=1024))
        self.clients.append(client)
        client.pause()
        await eventually(lambda: self.proxy.server.clients.keys() - before)
        [connection] = self.proxy.server.clients.keys() - before
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return client

    async def ask(self, request: bytes, *answers: bytes, method: str = "GET") -> Message:
        """Send a request on a connection of its own and return the answer; the upstream plays ``answers``, or OK."""
        if answers or not self.upstream.answers:
            self.upstream.plays(*(answers or (OK,)))
        client = await self.client()
        await client.send(request)
        answer = await client.answer(method)
        client.close()
        return answer

    async def forwarded(self, request: bytes) -> Message:
        """Send a request and return it as the upstream saw it."""
        answer = await self.ask(request)
        assert 200 == answer.status, answer
        return self.upstream.requests[-1]

    async def refused(self, request: bytes, status: int, slug: str, *, closes: bool = False) -> Message:
        """Assert that a request is refused in JSON, and that nothing went upstream; ``closes``: the connection ends."""
        self.upstream.plays(OK)
        client = await self.client()
        await client.send(request)
        answer = await client.answer()
        assert (status, slug) == (answer.status, answer.slug)
        assert b"application/json" == answer.value(b"Content-Type")
        assert b"no" == answer.value(b"X-Metquay-Proxy-Sent")
        if closes or answer.value(b"Connection") == b"close":
            assert b"close" == answer.value(b"Connection")
            await client.ended()
        client.close()
        assert [] == self.upstream.peers
        return answer

    async def healthy(self) -> None:
        """Assert that another client is served."""
        answer = await self.ask(get("/healthy"), OK)
        assert (200, b"ok") == (answer.status, answer.body)

    async def stop(self) -> None:
        """Close the clients."""
        for client in self.clients:
            with contextlib.suppress(AttributeError):  # early Pythons 3.11, where TLS was closed twice
                client.writer.transport.abort()


def head(line: str, *fields: bytes | str, host: bytes | None = b"localhost") -> bytes:
    """Return the head of a request with a Host, or whatever else."""
    lines = [line.encode("latin-1"), *([] if host is None else [b"Host: " + host])]
    lines += [text.encode("latin-1") if isinstance(text, str) else text for text in fields]
    return b"\r\n".join(lines) + BLANK


def get(target: str = "/x", *fields: bytes | str, host: bytes | None = b"localhost") -> bytes:
    """Return a GET."""
    return head(f"GET {target} HTTP/1.1", *fields, host=host)


def post(body: bytes, *fields: bytes | str, method: str = "POST", target: str = "/x") -> bytes:
    """Return a request with a body of known length."""
    return head(f"{method} {target} HTTP/1.1", *fields, f"Content-Length: {len(body)}") + body


def chunked(*pieces: bytes, fields: Iterable[bytes | str] = (), end: bytes = b"0\r\n\r\n") -> bytes:
    """Return a chunked POST."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head("POST /x HTTP/1.1", *fields, "Transfer-Encoding: chunked") + body + end


def answered(*fields: bytes | str, status: str = "200 OK", body: bytes = b"") -> bytes:
    """Return an answer with a body of known length."""
    lines = [text.encode("latin-1") if isinstance(text, str) else text for text in fields]
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), *lines, b"Content-Length: %d" % len(body)]) + BLANK + body


async def patiently(what: Awaitable[Any]) -> Any:  # noqa: ANN401 - of whatever is awaited
    """Await something that should happen soon."""
    async with asyncio.timeout(PATIENCE):
        return await what


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it never came true")
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(  # noqa: PLR0913 - whatever a rule may need
    *,
    tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext | None = None,
    bounds: Bounds | None = Bounds(),  # noqa: B008 - it is frozen
    max_idle: tuple[float, float] = (4.0, 2.0),
    receive_buffer: int = 0,
    target: str = TARGET,
    **settings: str,
) -> AsyncIterator[Bench]:
    """Run a bench. ``tls`` is the upstream's context, ``client_tls`` the clients'; ``settings`` are the proxy's."""
    upstream = Upstream()
    await upstream.start(tls, receive_buffer)
    crashes: list[Mapping[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: crashes.append(context))
    if target == "naive":
        naive = Naive(upstream.url)
        port = await naive.start()
        bench = Bench(upstream, "127.0.0.1", port, None)
        stop = naive.stop()
    else:
        texts = {"listen": "127.0.0.1:0", "host": upstream.url, "access_key": "a" * 8, "secret_key": "s" * 8}
        values = Settings(**texts | {"rate_limit": "off", "log_level": "error"} | settings)
        keys = Credentials("a" * 8, "s" * 8)
        proxy = Proxy(values, BaseURL.parse(upstream.url), lambda: keys, bounds=bounds, max_idle=max_idle)
        await proxy.start()
        await eventually(proxy.ready)
        port = int(proxy.addresses[0].rpartition(":")[2])
        bench = Bench(upstream, "127.0.0.1", port, proxy, client_tls)
        stop = proxy.stop(0.0)
    bench.crashes = crashes
    try:
        yield bench
    finally:
        await bench.stop()
        await stop
        await upstream.stop()
    assert [] == upstream.faults
    assert [] == crashes


@pytest.fixture
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """Run the bench that the test's rule asks for."""
    options = dict(request.function.rule[1])
    if options.keys() & {"tls", "client_tls"}:
        options |= certified(request.getfixturevalue("tmp_path"), **options)
    async with running(**options) as made:
        yield made


def certified(folder: Path, *, tls: bool = False, client_tls: bool = False, **_: object) -> dict[str, Any]:
    """Return what ``running`` needs for TLS on either side."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    options: dict[str, Any] = {}
    if tls:
        options["tls"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(options["tls"])
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        options["ca_bundle"] = str(folder / "ca.pem")
    if client_tls:
        options["client_tls"] = ssl.create_default_context()
        authority.configure_trust(options["client_tls"])
        certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
        options |= {"tls_cert": str(folder / "server.pem"), "tls_key": str(folder / "server.pem")}
    return options
