"""Faults that heal: whatever breaks on the way to Metquay, the proxy goes on by itself, soon, and never hammers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import pytest

from metquay_proxy.exchange.body import ReplayBudget, RequestBody, Stream
from metquay_proxy.sandbox.server import Faults, Sandbox
from metquay_proxy.settings import load
from tests.exchange.test_line import SocketTime
from tests.link import Link
from tests.running import FastTime, process, running, simulated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from metquay_proxy.app import Proxy

HOUR = 3600.0
AWAY = 1200.0
HEALED = 2.0
"""Seconds from Metquay's return to the first success, beside what is left of the step that the backoff is in."""
SAID = ("Error", "Sent", "Attempts")
PAGE = b"<!doctype html><html><head><title>503</title></head><body>Service Unavailable</body></html>"


@dataclass
class Seen:
    """One answer as its tool saw it; ``took`` is in seconds of the test's clock."""

    status: int
    error: str | None
    sent: str | None
    attempts: str | None
    retry_after: int
    took: float
    text: str


@dataclass
class Tool:
    """Asks the proxy for things, and knows the time."""

    session: aiohttp.ClientSession
    url: str
    now: Callable[[], float] = time.monotonic

    async def ask(self, method: str = "GET", path: str = "/customers?limit=1", **options: Any) -> Seen:  # noqa: ANN401 - aiohttp's own
        """Make one request."""
        began = self.now()
        async with self.session.request(method, self.url + path, **options) as answer:
            text = await answer.text()
            error, sent, attempts = (answer.headers.get(f"X-Metquay-Proxy-{name}") for name in SAID)
            retry_after = int(answer.headers.get("Retry-After", 0))
            return Seen(answer.status, error, sent, attempts, retry_after, self.now() - began, text)

    async def create(self, name: str) -> Seen:
        """Create a customer."""
        return await self.ask("POST", "/customers", json={"companyName": name})

    async def until_served(self, pause: float = 0.05) -> float:
        """Ask again and again; return the seconds to the first success."""
        began = self.now()
        while (await self.ask()).status != 200:
            await asyncio.sleep(pause)
        return self.now() - began


@contextlib.asynccontextmanager
async def tool(url: str, now: Callable[[], float] = time.monotonic) -> AsyncIterator[Tool]:
    """Run a tool."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Tool(session, url, now)


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# The login, in simulated time


class Impostor:
    """Stands in Metquay's place and answers every connection with the same bytes, then resets or closes it."""

    def __init__(self, answer: bytes, *, reset: bool = False) -> None:
        """Prepare."""
        self._answer = answer
        self._reset = reset
        self._server: asyncio.Server | None = None

    async def start(self, port: int) -> None:
        """Take the place."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)

    def stop(self) -> None:
        """Leave it."""
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.write(self._answer)
        if self._reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()


def whole(body: bytes, status: str = "200 OK") -> bytes:
    """Return an answer."""
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


IMPOSTORS = {
    "nothing listens": None,
    "reset": Impostor(b"", reset=True),
    "closed": Impostor(b""),
    "page of an outage": Impostor(whole(PAGE, "503 Service Unavailable")),
    "page of another server": Impostor(whole(PAGE)),
    "not JSON's whole": Impostor(whole(b'{"accessToken": "abc", "tokenT')),
    "cut off": Impostor(b'HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{"accessToken": "abc"'),
    "no token": Impostor(whole(b'{"tokenType": "bearer", "expiresIn": 900}')),
    "not HTTP": Impostor(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "far too long": Impostor(whole(b" " * 1_000_000)),
}


@dataclass
class Laboratory:
    """Proxy and Metquay in one simulated time."""

    time: SocketTime
    sandbox: Sandbox
    proxy: Proxy
    tool: Tool

    async def ask(self, method: str = "GET", path: str = "/customers?limit=1") -> Seen:
        """Make one request, moving time on as far as it takes."""
        return await self.time.until(self.tool.ask(method, path))

    async def healed(self) -> float:
        """Ask twice a second until served; return the seconds that it took beyond the step that the backoff was in."""
        while self.proxy.tokens.state.logging_in:
            await self.time.advance(0.1)
        began, step = self.time.now(), self.proxy.tokens.state.next_login_in
        while (await self.ask()).status != 200:
            await self.time.advance(0.5)
        return self.time.now() - began - step


@contextlib.asynccontextmanager
async def laboratory(**settings: Any) -> AsyncIterator[Laboratory]:  # noqa: ANN401 - the settings' own types
    """Run one; the proxy begins when time first moves."""
    time_ = SocketTime()
    async with (
        simulated(clock=time_.now, sleep=time_.sleep) as sandbox,
        running(sandbox.url, time_=cast("FastTime", time_), **{"rate_limit": "off"} | settings) as (proxy, url),
        tool(url, time_.now) as asking,
    ):
        yield Laboratory(time_, sandbox, proxy, asking)


QUICK = {"nothing listens", "no token"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in IMPOSTORS]
)
@pytest.mark.slow
async def test_no_login_at_start(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a login the proxy starts, is alive but not ready, says why, logs in seldom, tells of each, and heals."""
    async with laboratory() as lab:
        await lab.sandbox.stop()
        impostor = IMPOSTORS[kind]
        if impostor is not None:
            await impostor.start(lab.sandbox.port)
        await lab.time.advance(AWAY)
        assert ((await lab.ask(path="/-/live")).status, (await lab.ask(path="/-/ready")).status) == (200, 503)
        unasked = lab.proxy.tokens.state.failures
        assert AWAY / 31 < unasked < AWAY / 15 + 8
        assert unasked == capsys.readouterr().out.count("\n")
        began = lab.time.now()
        for _ in range(10):
            answer = await lab.ask()
            assert (503, "token-unavailable", "no") == (answer.status, answer.error, answer.sent)
            assert 1 <= answer.retry_after <= 30
            assert answer.took <= 5.0
        asked = lab.proxy.tokens.state.failures - unasked
        assert asked <= (lab.time.now() - began) / 2 + 1
        assert asked == capsys.readouterr().out.count("\n")
        if impostor is not None:
            impostor.stop()
        await lab.sandbox.start(port=lab.sandbox.port)
        assert await lab.healed() < HEALED
        assert 1 == lab.sandbox.logins


@pytest.mark.slow
async def test_a_flood_without_a_token() -> None:
    """However many requests wait for a token, there is at most one login a second."""
    async with laboratory() as lab:
        lab.sandbox.faults = Faults(login_outage=True)
        for _ in range(3):
            answers = await lab.time.until(_all(lab.tool.ask() for _ in range(50)))
            assert {(503, "token-unavailable")} == {(answer.status, answer.error) for answer in answers}
        assert lab.sandbox.refused_logins <= lab.time.now() - 1000.0 + 1
        lab.sandbox.faults = Faults()
        assert await lab.healed() < HEALED


@pytest.mark.slow
async def test_the_login_is_down_for_an_hour(capsys: pytest.CaptureFixture[str]) -> None:
    """The token that is there serves to its real end; then 503 until the login is back, and no tool ever sees a 401."""
    async with laboratory() as lab:
        assert 200 == (await lab.ask()).status
        began = lab.time.now()
        lab.sandbox.faults = Faults(login_outage=HOUR)
        served = 0.0
        seen: Counter[tuple[int, str | None]] = Counter()
        while lab.time.now() < began + HOUR - 60:  # a request waits, and must not see the end
            answer = await lab.ask()
            seen[answer.status, answer.error] += 1
            if answer.status == 200:
                served = lab.time.now() - began
            await lab.time.advance(30.0)
        assert {(200, None), (503, "token-unavailable")} == set(seen)
        assert 860 < served < 900
        assert 29 <= seen[200, None]
        await lab.time.advance(began + HOUR + 1 - lab.time.now())
        assert await lab.healed() < HEALED
        assert 0 == lab.sandbox.refused_401
        assert lab.sandbox.refused_logins < HOUR / 5
        printed = capsys.readouterr().out
        assert 2 == len(re.findall("] token (?:obtained|recovered)", printed))
        assert lab.sandbox.refused_logins == printed.count("] login failed")


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file with the secret key, of which the environment tells."""
    path = tmp_path / "secret"
    path.write_text("secret-key-1")
    path.chmod(0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METQUAY_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("METQUAY_ACCESS_KEY", "access-key")
    monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(path))
    return path


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.slow
async def test_keys_rotated_on_disk(key_file: Path, late: bool) -> None:  # noqa: FBT001 - a column
    """Keys that are replaced before the token ends fail no request; later, it takes a minute, and nobody restarts."""
    time_ = SocketTime()
    async with (
        simulated(access_key="access-key", secret_key="secret-key-1", clock=time_.now, sleep=time_.sleep) as sandbox,  # noqa: S106 - nobody's
        running(sandbox.url, time_=cast("FastTime", time_), credentials=load().credentials, rate_limit="off") as (
            proxy,
            url,
        ),
        tool(url, time_.now) as asking,
    ):
        seen: Counter[tuple[int, str | None]] = Counter()

        async def ask(seconds: float) -> None:
            end = time_.now() + seconds
            while time_.now() < end:
                answer = await time_.until(asking.ask())
                assert answer.retry_after <= 60
                seen[answer.status, answer.error] += 1
                await time_.advance(10.0)

        await ask(300)
        sandbox._keys = ("access-key", "secret-key-2")
        await ask(1200 if late else 500)
        key_file.write_text("secret-key-2")
        await ask(60)
        served = seen[200, None]
        await ask(60)
        assert served + 6 == seen[200, None]
        assert {(200, None)} | ({(503, "credentials-rejected")} if late else set()) == set(seen)
        assert sandbox.refused_logins <= (1560 - 700) / 60 + 1
        assert 2 == sandbox.logins
        assert 0 == sandbox.refused_401
        assert proxy.ready()


async def test_suspended() -> None:
    """A machine that slept wakes with a token that is long past its end: no tool sees that, and one login is made."""
    async with laboratory() as lab:
        assert 200 == (await lab.ask()).status
        for number in range(3):
            await lab.time.suspend(2 * HOUR)
            for _ in range(3):
                answer = await lab.ask()
                assert (200, 0.0) == (answer.status, answer.took)
            assert number + 2 == lab.sandbox.logins
            await lab.time.advance(60.0)
        assert 4 == lab.sandbox.logins
        assert 0 == lab.sandbox.refused_401


@pytest.mark.parametrize("jump", [-1e8, -HOUR, HOUR, 1e8])
async def test_the_wall_clock_jumps(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is set concerns neither token nor quota: nothing waits or is refused, no login is made."""
    async with laboratory(rate_limit="100/minute") as lab:
        assert 200 == (await lab.ask()).status
        really = time.time
        monkeypatch.setattr(time, "time", lambda: really() + jump)
        for _ in range(20):
            answer = await lab.ask()
            assert (200, 0.0) == (answer.status, answer.took)
        assert 1 == lab.sandbox.logins


async def _all(work: Any) -> list[Any]:  # noqa: ANN401 - any coroutines
    return await asyncio.gather(*work)


class Scripted:
    """Stands in Metquay's place: a test gives each answer, by path and token; T1, T2, ... unless a login says other."""

    def __init__(self) -> None:
        """Log in whoever asks, and take every token."""
        self.requests: list[tuple[str, str]] = []
        self.logins = 0
        self.login: bytes | None = None
        self.writers: list[asyncio.StreamWriter] = []
        self.answers: Callable[[str, str], bytes] = lambda _path, _token: whole(b"[]")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1].removeprefix("/api/v1")
                for line in head.splitlines():
                    if line.startswith("Content-Length: "):
                        await reader.readexactly(int(line[16:]))
                if path == "/authenticate":
                    self.logins += 1
                    writer.write(self.login or whole(b'{"accessToken": "T%d", "expiresIn": 900}' % self.logins))
                    continue
                token = head.partition("Bearer ")[2].partition("\r")[0]
                self.requests.append((path, token))
                writer.write(self.answers(path, token))


@contextlib.asynccontextmanager
async def scripted(**settings: Any) -> AsyncIterator[tuple[Scripted, Laboratory]]:  # noqa: ANN401 - the settings' own types
    """Run one and a proxy, in simulated time."""
    time_, metquay = SocketTime(), Scripted()
    server = await asyncio.start_server(metquay.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with (  # not with the server: from Python 3.12 on its end waits for that of its connections
            running(url, time_=cast("FastTime", time_), **{"rate_limit": "off"} | settings) as (proxy, own),
            tool(own, time_.now) as asking,
        ):
            yield metquay, Laboratory(time_, cast("Sandbox", None), proxy, asking)
    finally:
        server.close()
        for writer in metquay.writers:
            writer.transport.abort()
        await asyncio.sleep(0.001)


@pytest.mark.slow
async def test_an_upstream_that_is_away_costs_no_quota() -> None:
    """Sixty reads find nothing there, twenty at a time: each is told soon, none takes a slot, and none waits after."""
    async with laboratory(rate_limit="100/minute") as lab:
        assert 200 == (await lab.ask()).status
        await lab.sandbox.stop()
        for _ in range(3):
            answers = await lab.time.until(_all(lab.tool.ask() for _ in range(20)))
            assert {(502, "upstream-unreachable", "no", "3")} == {
                (answer.status, answer.error, answer.sent, answer.attempts) for answer in answers
            }
            assert max(answer.took for answer in answers) <= 0.75
        quota = lab.proxy.status()["quota"]
        assert (1, 0, 0) == (quota["used"], quota["in_flight"], quota["waiting"])
        await lab.sandbox.start(port=lab.sandbox.port)
        answers = await lab.time.until(_all(lab.tool.ask() for _ in range(69)))
        assert {(200, 0.0)} == {(answer.status, answer.took) for answer in answers}


async def test_a_resource_that_refuses_every_token() -> None:
    """Six requests for it cost one login in all; its neighbours go on at once, and the proxy stays ready."""
    async with scripted() as (metquay, lab):
        metquay.answers = lambda path, _: (
            whole(b"", "401 Unauthorized\r\nWWW-Authenticate: Basic") if path == "/authenticated" else whole(b"[]")
        )
        await lab.time.advance(2.0)
        began = lab.time.now()
        for _ in range(6):
            answers = await lab.time.until(_all([lab.tool.ask(path="/authenticated"), lab.tool.ask()]))
            assert [401, 200] == [answer.status for answer in answers]
            assert 0.0 == answers[1].took
            assert lab.proxy.ready()
        assert 2 == metquay.logins
        assert lab.time.now() <= began + 1.0
        assert 6 + 1 == sum(path == "/authenticated" for path, _ in metquay.requests)


async def test_a_token_that_is_withdrawn() -> None:
    """A hundred requests make one renewal, those that are refused with it one replay each, and no tool sees it."""
    refused = []

    def answer(number: str, token: str) -> bytes:
        if token == "T2":  # noqa: S105 - nobody's
            return whole(b"[]")
        refused.append(number)
        return whole(b"[]", "401 Unauthorized")

    async with scripted() as (metquay, lab):
        metquay.answers = answer
        await lab.time.advance(2.0)
        answers = await lab.time.until(_all(lab.tool.ask(path=f"/{number}") for number in range(100)))
        assert {(200, None)} == {(answer.status, answer.error) for answer in answers}
        assert (2, 100 + len(refused)) == (metquay.logins, len(metquay.requests))
        assert len(refused) > 1


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
@pytest.mark.parametrize(
    "when", ["60", "Sat, 28 Nov 2026 05:01:00 GMT\r\nDate: Sat, 28 Nov 2026 05:00:00 GMT"], ids=["seconds", "date"]
)
async def test_a_login_that_asks_to_be_left_alone(status: str, when: str) -> None:
    """It is, whoever wants what; tools are told at once when to come back; new keys end the pause."""
    async with scripted() as (metquay, lab):
        metquay.login = whole(b"{}", f"{status}\r\nRetry-After: {when}")
        await lab.time.advance(0.0)
        for _ in range(6):
            answer = await lab.ask()
            left = 60 - int(lab.time.now() - 1000)
            assert (503, "token-unavailable", left, 0.0) == (
                answer.status, answer.error, answer.retry_after, answer.took
            )  # fmt: skip
            assert "asks the proxy to wait 60 s" in answer.text
            await lab.time.advance(9.0)
        assert 1 == metquay.logins
        metquay.login = None
        lab.proxy.tokens.hasten()
        assert (200, 2) == ((await lab.ask()).status, metquay.logins)


async def test_a_429_by_another_clock() -> None:
    """A date is one of Metquay's clock, which may be 40 minutes behind ours: the window is closed for 3 s."""
    async with scripted(rate_limit="100/minute") as (metquay, lab):
        then = time.time() - 2400
        said = f"Date: {formatdate(then, usegmt=True)}\r\nRetry-After: {formatdate(then + 3, usegmt=True)}"
        metquay.answers = lambda _, __: whole(b"[]", f"429 Too Many Requests\r\n{said}")
        await lab.time.advance(2.0)
        asking = asyncio.ensure_future(lab.tool.ask())
        await lab.time.settle()
        assert 3 == pytest.approx(lab.proxy.status()["quota"]["closed_for"])
        metquay.answers = lambda _, __: whole(b"[]")
        await lab.time.advance(3.0)
        assert (200, 2) == ((await asking).status, len(metquay.requests))


@pytest.mark.parametrize(
    ("location", "told"),
    [
        (
            "https://eu.metquay.co/api/v1/authenticate?key=1",
            "v1/authenticate. METQUAY_HOST should probably be https://eu.metquay.co/api/v1. ",
        ),
        ("/api/v2/authenticate", "METQUAY_HOST should probably be http://127.0.0.1:{}/api/v2. "),
        ("/login.html?next=%2F", "to http://127.0.0.1:{}. That is a web page: "),
    ],
)
async def test_a_login_that_has_moved(location: str, told: str) -> None:
    """Tools and page are told where to, and what METQUAY_HOST should be."""
    async with scripted() as (metquay, lab):
        metquay.login = whole(b"<html>", f"301 Moved Permanently\r\nLocation: {location}")
        answer = await lab.ask()
        told = told.format(lab.proxy.base.port)
        assert (503, "token-unavailable") == (answer.status, answer.error)
        assert told in answer.text
        page = await lab.ask(path="/-/status")
        assert told in json.loads(page.text)["headline"]["cure"]


# The way to Metquay, in real time


@dataclass
class Line:
    """A proxy at one end of a link, a simulated Metquay at the other."""

    link: Link
    sandbox: Sandbox
    proxy: Proxy
    tool: Tool


@contextlib.asynccontextmanager
async def linked(time_: FastTime | None = None, **settings: Any) -> AsyncIterator[Line]:  # noqa: ANN401 - the settings' own types
    """Run one that has logged in."""
    async with simulated() as sandbox:
        link = Link(sandbox.port)
        link.listen()
        try:
            async with (
                running(link.url, time_=time_, **{"rate_limit": "off"} | settings) as (proxy, url),
                tool(url) as asking,
            ):
                await until(proxy.ready)
                yield Line(link, sandbox, proxy, asking)
        finally:
            await link.stop()


@pytest.mark.slow
async def test_metquay_restarts() -> None:
    """A restart that takes a moment is not noticed by reads and replacements; what is created is created once."""
    async with simulated() as sandbox, running(sandbox.url, rate_limit="off") as (_, url), tool(url) as asking:
        created = (await asking.create("Before")).text.partition(":")[2].strip("}")
        end = asyncio.get_running_loop().time() + 1.7
        seen: Counter[tuple[str, int]] = Counter()
        told: Counter[str] = Counter()

        async def read() -> None:
            while asyncio.get_running_loop().time() < end:
                seen["GET", (await asking.ask()).status] += 1
                path, body = f"/customers/{created}", {"companyName": "Before"}
                seen["PUT", (await asking.ask("PUT", path, json=body)).status] += 1
                await asyncio.sleep(0.01)

        async def create() -> None:
            number = 0
            while asyncio.get_running_loop().time() < end:
                number += 1
                answer = await asking.create(f"Customer {number}")
                told[answer.sent or str(answer.status)] += 1
                await asyncio.sleep(0.01)

        async def restart() -> None:
            for _ in range(2):
                await asyncio.sleep(0.5)
                await sandbox.stop()
                await asyncio.sleep(0.05)
                await sandbox.start(port=sandbox.port)

        await asyncio.gather(read(), create(), restart())
        assert {("GET", 200), ("PUT", 200)} == set(seen)
        executed = sum(write["method"] == "POST" for write in sandbox.writes) - 1
        assert told["201"] <= executed <= told["201"] + told["unknown"]


@pytest.mark.slow
async def test_metquay_is_away() -> None:
    """While nothing listens each request says so at once, with a live token; the first one after that is served."""
    async with linked() as line:
        line.link.refuse()
        for _ in range(2):
            answer = await line.tool.create("Never")
            assert (502, "upstream-unreachable", "no", "3") == (
                answer.status, answer.error, answer.sent, answer.attempts
            )  # fmt: skip
            assert "nothing listens there" in answer.text
            assert answer.took < 2
        assert 200 == (await line.tool.ask(path="/-/live")).status
        line.link.listen()
        assert 201 == (await line.tool.create("Now")).status
        assert 1 == line.sandbox.logins
        assert 1 == len(line.sandbox.writes)


@pytest.mark.slow
async def test_connections_that_are_half_open() -> None:
    """A router that forgot our connections costs who is on them a time-out, and nobody for longer than they idle."""
    async with linked(FastTime(20), read_timeout="0.4") as line:
        line.sandbox.faults = Faults(latency=0.1)
        waiting = [asyncio.ensure_future(line.tool.create(f"Customer {number}")) for number in range(5)]
        await until(lambda: line.sandbox.requests == 5)
        line.link.strand()
        for answer in await asyncio.gather(*waiting):
            assert (504, "upstream-timeout", "unknown") == (answer.status, answer.error, answer.sent)
        line.sandbox.faults = Faults()
        assert await line.tool.until_served() < HEALED
        assert 201 == (await line.tool.create("Customer 6")).status
        assert 6 == len(line.sandbox.writes)


class Left(Stream):
    """A body that had come whole when its client left: it can't be read any more."""

    def __init__(self) -> None:
        super().__init__()
        self.feed(b"body")
        self.end()

    def read_nowait(self) -> bytes:
        """Raise."""
        raise ConnectionResetError


async def test_a_client_that_leaves_while_a_connection_opens() -> None:
    """A connection that was opened for a request whose client has left meanwhile is closed, not forgotten."""
    async with linked() as line:
        opened = line.link.opened
        body = RequestBody(Left(), chunked=False, limit=1000, budget=ReplayBudget(1000), timeout=1.0)
        with pytest.raises(ConnectionResetError):
            (await line.proxy.pool.open()).send("POST", b"POST / HTTP/1.1\r\n\r\n", body)
        await until(lambda: line.link.opened > opened)
        await until(lambda: line.link.open == 2 * sum(line.proxy.pool.connections))


async def test_the_network_changed_while_suspended() -> None:
    """After a night in a bag no request goes out on a connection of the day before."""
    awake = time.monotonic()
    offset = 0.0

    class Jumping(FastTime):
        def now(self) -> float:
            return super().now() + offset

    async with linked(Jumping(1), read_timeout="5") as line:
        assert 200 == (await line.tool.ask()).status
        opened = line.link.opened
        line.link.strand()
        offset = 60.0
        answer = await line.tool.create("Morning")
        assert 201 == answer.status
        assert answer.took < 2
        assert opened < line.link.opened
        assert time.monotonic() - awake < 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a connection be swallowed on the loopback")
@pytest.mark.slow
async def test_a_black_hole() -> None:
    """A network that swallows what is sent costs the connect time-out: nothing was sent, and the next one is served."""
    async with linked(connect_timeout="0.1") as line:
        line.link.swallow()
        answer = await line.tool.create("Never")
        assert (502, "upstream-unreachable", "no", "3") == (answer.status, answer.error, answer.sent, answer.attempts)
        assert "could not be reached within 0.1 s" in answer.text
        assert 0.3 <= answer.took < 3
        line.link.listen()
        assert await line.tool.until_served() < HEALED
        assert [] == list(line.sandbox.writes)


@pytest.mark.slow
async def test_silence() -> None:
    """Silence ends in 504 and is not repeated; once it is over all is served, and the write was made once at most."""
    async with linked(read_timeout="0.3") as line:
        line.link.freeze()
        read, write = await asyncio.gather(line.tool.ask(), line.tool.create("Late"))
        for answer in (read, write):
            assert (504, "upstream-timeout", "unknown", "1") == (
                answer.status, answer.error, answer.sent, answer.attempts
            )  # fmt: skip
        line.link.thaw()
        assert await line.tool.until_served() < HEALED
        assert len(line.sandbox.writes) <= 1


@pytest.mark.slow
async def test_pages_of_the_servlet_container() -> None:
    """A page that Metquay's server shows while it restarts is passed on as it is: read again twice, created once."""
    async with simulated() as sandbox, running(sandbox.url, rate_limit="off") as (proxy, url), tool(url) as asking:
        await until(proxy.ready)
        sandbox.faults = Faults(fail={503: 1.0})
        for method, count in (("GET", 3), ("POST", 1)):
            before = sandbox.requests
            answer = await asking.ask(method, "/customers")
            assert (503, None, before + count) == (answer.status, answer.error, sandbox.requests)
            assert answer.text.startswith("<!doctype html>")
        sandbox.faults = Faults()
        assert await asking.until_served() < HEALED
        assert 1 == sandbox.logins


# The name of Metquay


class Names:
    """A name server in place of the machine's: ``fail`` or ``hang`` until told otherwise, and count what is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take its place; an address is no question."""
        self.fail = False
        self.hang = 0.0
        self.asked = 0
        self.addresses: list[tuple[str, int]] = []
        self._really = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:  # noqa: ANN401 - the standard library's
        if host != "localhost" or options.get("flags"):
            return list(self._really(host, port, *arguments, **options))
        self.asked += 1
        time.sleep(self.hang)
        if self.fail:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        addresses = self.addresses or [("127.0.0.1", port)]
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for address in addresses]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Return a name server that knows ``localhost``."""
    return Names(monkeypatch)


def named(sandbox: Sandbox) -> str:
    """Return a Metquay's address by name."""
    return f"http://localhost:{sandbox.port}/api/v1"


@pytest.mark.slow
async def test_no_name_server_at_start(names: Names) -> None:
    """A machine without a network gets its proxy all the same, and Metquay within the backoff once there is one."""
    quick = FastTime(10)
    names.fail = True
    async with (
        simulated() as sandbox,
        running(named(sandbox), time_=quick, rate_limit="off") as (proxy, url),
        tool(url, quick.now) as asking,
    ):
        answer = await asking.ask()
        assert (503, "token-unavailable") == (answer.status, answer.error)
        assert "its name could not be looked up" in answer.text
        assert names.asked <= answer.took + 1
        await until(lambda: not proxy.tokens.state.logging_in)
        names.fail, before = False, proxy.tokens.state.failures
        await asking.until_served(0.02)
        assert (1, before) == (sandbox.logins, proxy.tokens.state.failures)


@pytest.mark.slow
async def test_the_name_server_is_away_for_a_while(names: Names) -> None:
    """With a live token, what needs a new connection says that the name was not found, and is served afterwards."""
    async with simulated() as sandbox, running(named(sandbox), rate_limit="off") as (proxy, url), tool(url) as asking:
        await until(proxy.ready)
        names.fail = True
        assert 200 == (await asking.ask()).status, "an open connection needs no name"
        await sandbox.stop()
        await sandbox.start(port=sandbox.port)
        answer = await asking.create("Never")
        assert (502, "upstream-unreachable", "no") == (answer.status, answer.error, answer.sent)
        assert "its name could not be looked up" in answer.text
        names.fail = False
        assert 201 == (await asking.create("Now")).status
        assert 1 == len(sandbox.writes)


async def test_a_slow_name_server_is_asked_once(names: Names) -> None:
    """Requests that come while the name is being looked up share the answer."""
    async with simulated() as sandbox, running(named(sandbox), rate_limit="off") as (proxy, url), tool(url) as asking:
        await until(proxy.ready)
        await sandbox.stop()
        await sandbox.start(port=sandbox.port)
        names.asked, names.hang = 0, 0.2
        assert {200} == {answer.status for answer in await _all(asking.ask() for _ in range(50))}
        assert 1 <= names.asked <= 3


@pytest.mark.slow
async def test_a_name_server_that_hangs(names: Names) -> None:
    """A look-up that hangs costs the connect time-out, and holds up nobody who asks once the name server is back."""
    async with (
        simulated() as sandbox,
        running(named(sandbox), rate_limit="off", connect_timeout="0.2", retries="0") as (proxy, url),
        tool(url) as asking,
    ):
        await until(proxy.ready)
        await sandbox.stop()
        await sandbox.start(port=sandbox.port)
        names.asked, names.hang = 0, 2.5
        answer = await asking.create("Never")
        assert (502, "upstream-unreachable", "no") == (answer.status, answer.error, answer.sent)
        names.hang = 0.0
        assert await asking.until_served() < 1.5
        assert 2 == names.asked


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a connection be swallowed on the loopback")
async def test_one_address_of_two_is_dead(names: Names) -> None:
    """Where one address of a name swallows everything (IPv6 that leads nowhere) the next one is tried soon."""
    async with simulated() as sandbox, running(named(sandbox), rate_limit="off") as (proxy, url), tool(url) as asking:
        await until(proxy.ready)
        dead = Link(sandbox.port)
        dead.listen()
        dead.swallow()
        names.addresses = [("127.0.0.1", dead.port), ("127.0.0.1", sandbox.port)]
        await sandbox.stop()
        await sandbox.start(port=sandbox.port)
        answer = await asking.create("Soon")
        assert 201 == answer.status
        assert 0.2 < answer.took < 2
        await dead.stop()


NO_NETWORK = """
import pathlib, socket

really = socket.getaddrinfo

def getaddrinfo(host, *arguments, **options):
    if host == "localhost" and not options.get("flags") and not pathlib.Path("network").exists():
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return really(host, *arguments, **options)

socket.getaddrinfo = getaddrinfo
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
async def test_a_process_without_a_network(tmp_path: Path) -> None:
    """As a process: it starts, logs one line for each attempt, and serves once the network is there."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    async with simulated() as sandbox:
        environment = {
            "METQUAY_HOST": named(sandbox),
            "METQUAY_ACCESS_KEY": "sandbox-access-key",
            "METQUAY_SECRET_KEY": "sandbox-secret-key",
            "METQUAY_LISTEN": "127.0.0.1:0",
            "METQUAY_MAX_WAIT": "1",
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent.parent)]),
        }
        with process(tmp_path, "serve", **environment) as command:
            async with tool(command.url) as asking:
                began = time.monotonic()
                assert (200, 503) == tuple([(await asking.ask(path=f"/-/{page}")).status for page in ("live", "ready")])
                answer = await asking.ask(headers={"Connection": "close"})
                assert (503, "token-unavailable") == (answer.status, answer.error)
                offline = time.monotonic() - began
                (tmp_path / "network").touch()
                assert await asking.until_served() < 4 + HEALED
            assert 0 == await asyncio.to_thread(command.stop)
        lines = command.log.read_text().splitlines()
        attempts = [line for line in lines if '"event": "token ' in line or '"event": "login failed"' in line]
        assert len(attempts) <= offline + 3
        requests = [line for line in lines if '"request"' in line]
        assert len(lines) == len(attempts) + len(requests) + 3, "listening, stopping, stopped"
