"""A bad week at the laboratory: many tools through every fault, and books on both sides that must agree at the end.

Each write carries a number of its own, which the simulator writes into its books where it executes it. What a tool was
told of it (made, not made, unknown) stands in the tool's books. A work has no unique field, so that a write that was
sent twice would be made twice, and seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults, Sandbox
from tests.link import Link
from tests.running import process, running, simulated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from tests.running import Process

pytestmark = pytest.mark.slow

READ_TIMEOUT = 2.0
OF_LOGINS = ("token ", "login failed", "key pair refused")
"""How the log's lines of logins begin."""
HEALED = 2.0
"""Seconds from Metquay's return to the first success, beside the step that the login's backoff is in (4 s at most)."""
WANTED = 4.0
WORKS, INSTRUMENTS = "/works", "/customer-instrument-details"
KINDS = ("poster", "keyed", "editor", "reader", "old", "heavy", "impatient")
KEYS = {kind: f"{kind}-key-0123456789" for kind in KINDS}


@dataclass
class Books:
    """What the tools were told: number of a write to how often it may have been made by that."""

    writes: dict[str, set[int]] = field(default_factory=dict)
    records: dict[int, set[str | None]] = field(default_factory=dict)
    """Id of an instrument to the states that it may be in; None: it is gone."""
    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """What a tool should never see."""
    abandoned: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    last_success: float = 0.0


@dataclass
class Told:
    """What a tool learned of one request; ``error`` is the proxy's, ``whole`` whether the body came whole."""

    status: int
    error: str | None
    sent: str | None
    note: str | None
    whole: bool
    retry_after: float
    body: Any = None

    @property
    def made(self) -> set[int]:
        """How often the write may have been made, of a method that is never repeated blindly."""
        if self.error is None:
            return {1} if self.status < 300 else {0}
        return {"no": {0}, "yes": {1}, "unknown": {0, 1}}[self.sent or "unknown"]


@dataclass
class Tools:
    """The laboratory's tools: they share nothing but the address of the proxy."""

    url: str
    books: Books
    going: bool = True
    ending: bool = False
    _numbers: Iterable[int] = field(default_factory=itertools.count)
    _dice: random.Random = field(default_factory=lambda: random.Random("soak"))  # noqa: S311 - no secret

    async def run(self) -> None:
        """Work until told to stop."""
        works = [self._poster] * 3 + [self._keyed] * 3 + [self._editor] * 3
        works += [self._reader] * 2 + [self._old, self._heavy, self._impatient]
        async with asyncio.TaskGroup() as group:
            for number, work in enumerate(works):
                group.create_task(work(number))

    @contextlib.asynccontextmanager
    async def _session(self, kind: str, number: int) -> AsyncIterator[aiohttp.ClientSession]:
        headers = {"X-Proxy-Key": KEYS[kind], "User-Agent": f"{kind}-{number}"}
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            yield session

    def _name(self, kind: str) -> str:
        return f"{kind}-{next(iter(self._numbers))}"

    async def _think(self, told: Told | None = None) -> None:
        wait = self._dice.random() * 0.06
        if told is not None and told.error is not None:
            wait += min(0.3, told.retry_after)
        await asyncio.sleep(wait)

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        name: str = "",
        **options: Any,  # noqa: ANN401 - aiohttp's own
    ) -> Told | None:
        """Make one request; None where the proxy is gone, which only the end may bring."""
        headers = options.pop("headers", {}) | ({"X-Request-Id": name} if name else {})
        told = None
        try:
            async with session.request(method, self.url + path, headers=headers, **options) as answer:
                told = Told(
                    answer.status,
                    answer.headers.get("X-Metquay-Proxy-Error"),
                    answer.headers.get("X-Metquay-Proxy-Sent"),
                    answer.headers.get("X-Metquay-Proxy-Note"),
                    whole=False,
                    retry_after=float(answer.headers.get("Retry-After", 0)),
                )
                body = await answer.read()
                told.whole = True
                if "json" in answer.content_type:
                    told.body = json.loads(body)
        except (aiohttp.ClientError, ConnectionError) as error:
            if told is None and not self.ending:
                self.books.faults.append(f"{method} {path}: {error!r}")
        except TimeoutError:
            self.books.faults.append(f"{method} {path}: hung")
        if told is not None:
            self._count(told)
        elif self.ending:
            self.going = False
        return told

    def _count(self, told: Told) -> None:
        books = self.books
        books.answers[told.error or ("metquay" if told.whole else "broken")] += 1
        books.statuses[told.status] += 1
        if told.status < 300 and told.error is None:
            books.last_success = time.monotonic()
        if told.error in {"internal-error", "bad-request", "client-key-required"}:
            books.faults.append(f"{told}")
        if told.status in {429, 503} and told.error is not None and told.retry_after < 1:
            books.faults.append(f"no Retry-After: {told}")

    async def _poster(self, number: int) -> None:
        """Create works, and take each answer as it comes."""
        async with self._session("poster", number) as session:
            while self.going:
                name = self._name("poster")
                told = await self._ask(session, "POST", WORKS, name, json=work(name))
                self.books.writes[name] = {0, 1} if told is None else told.made
                await self._think(told)

    async def _keyed(self, number: int) -> None:
        """Create works with an Idempotency-Key, again and again until it is known what became of each."""
        async with self._session("keyed", number) as session:
            while self.going:
                name = self._name("keyed")
                self.books.writes[name] = {0, 1}
                for _ in range(40):
                    told = await self._ask(
                        session, "POST", WORKS, name, json=work(name), headers={"Idempotency-Key": name}
                    )
                    if told is None or told.error == "outcome-unknown":
                        break
                    if told.error is None and told.status < 300:
                        self.books.writes[name] = {1}
                        break
                    await self._think(told)

    async def _editor(self, number: int) -> None:
        """Create an instrument, change it five times and delete it; leave it alone once its state is unclear."""
        async with self._session("editor", number) as session:
            while self.going:
                name = self._name("editor")
                told = await self._ask(session, "POST", INSTRUMENTS, name, json=instrument(name, "0"))
                self.books.writes[name] = {0, 1} if told is None else told.made
                if told is not None and told.status == 201 and told.whole:
                    await self._edit(session, name, told.body["metquayId"])
                await self._think(told)

    async def _edit(self, session: aiohttp.ClientSession, name: str, record: int) -> None:
        states: set[str | None] = {"0"}
        self.books.records[record] = states
        path = f"{INSTRUMENTS}/{record}"
        for version in range(1, 6):
            if not self.going:
                return
            told = await self._ask(session, "PUT", path, json=instrument(name, str(version)))
            if told is None or not settled(told):
                states.add(str(version))
                return
            if told.status < 300:
                states.clear()
                states.add(str(version))
            await self._think(told)
        told = await self._ask(session, "DELETE", path)
        if told is not None and (told.status == 200 or told.note is not None):
            states.clear()
        elif told is not None and told.status == 404 and told.error is None:
            self.books.faults.append(f"{path} is gone: {told}")
        if told is None or told.status == 200 or told.note is not None or not settled(told):
            states.add(None)

    async def _reader(self, number: int) -> None:
        """Read pages; what came whole is JSON."""
        async with self._session("reader", number) as session:
            while self.going:
                told = await self._ask(session, "GET", f"/customers?first={number}&limit=100")
                if told is not None and told.whole and told.status == 200 and len(told.body) != 100:
                    self.books.faults.append(f"a page of {len(told.body)}")
                await self._think(told)

    async def _old(self, number: int) -> None:
        """Read with HTTP/1.0, where only a length or a reset tells a broken answer."""
        port = int(self.url.rpartition(":")[2])
        while self.going:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                self.going = False
                assert self.ending
                return
            fields = f"User-Agent: old-{number}\r\nX-Proxy-Key: {KEYS['old']}\r\n\r\n"
            writer.write(f"GET /works?limit=50 HTTP/1.0\r\n{fields}".encode())
            with contextlib.suppress(ConnectionError):
                answer = await reader.read(-1)
                assert answer or self.ending
                head, _, body = answer.partition(b"\r\n\r\n")
                said = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
                if head and int(said.get(b"content-length", len(body))) == len(body):
                    if b"json" in said.get(b"content-type", b"json"):
                        json.loads(body)
                    self.books.statuses[int(head[9:12])] += 1
            writer.close()
            await self._think()

    async def _heavy(self, number: int) -> None:
        """Create works with remarks that are too long to be kept for a replay, in chunks."""
        async with self._session("heavy", number) as session:
            while self.going:
                name = self._name("heavy")
                body = json.dumps(work(name) | {"scope": "x" * 200_000}).encode()
                told = await self._ask(session, "POST", WORKS, name, data=pieces(body))
                self.books.writes[name] = {0, 1} if told is None else told.made
                await self._think(told)

    async def _impatient(self, number: int) -> None:
        """Create works and give up on each after a moment."""
        async with self._session("impatient", number) as session:
            while self.going:
                name = self._name("impatient")
                self.books.writes[name] = {0, 1}
                asking = asyncio.ensure_future(self._ask(session, "POST", WORKS, name, json=work(name)))
                await asyncio.wait([asking], timeout=self._dice.random() * 0.1)
                if asking.done():
                    told = asking.result()
                    self.books.writes[name] = {0, 1} if told is None else told.made
                else:
                    self.books.abandoned += 1
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                await self._think()


def settled(told: Told) -> bool:
    """Whether it is clear what a PUT or DELETE did, which the proxy may have repeated after an unclear attempt."""
    return told.status < 300 or told.sent == "no" or told.status == 404


def work(name: str) -> dict[str, Any]:
    """Return a work."""
    return {"customerInstrumentId": 8200, "inDate": "2026-01-22T10:15:00", "remarks": name}


def instrument(name: str, version: str) -> dict[str, Any]:
    """Return an instrument."""
    return {"name": name, "companyId": "10401", "instrumentCategoryName": "Caliper", "make": version}


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """Yield a body in chunks."""
    for start in range(0, len(body), 50_000):
        yield body[start : start + 50_000]
        await asyncio.sleep(0)


@dataclass
class Chaos:
    """What goes wrong, phase by phase."""

    sandbox: Sandbox
    link: Link
    tools: Tools
    length: float
    """Seconds of each phase."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds from the end of an outage to the first success after it."""
    used: set[str] = field(default_factory=set)
    """The knobs of the simulator that were turned."""

    @property
    def phases(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Name to phase; every knob of the simulator and of the link is among them."""
        return {
            "quiet": self._faults(),
            "latency, jitter": self._faults(latency=0.05, jitter=0.1),
            "fail": self._faults(fail=dict.fromkeys((400, 403, 409, 422, 500, 502, 503, 504), 0.03)),
            "fail 401": self._faults(fail={401: 0.02}),
            "expire_tokens": self._expiring,
            "token_lifetime": self._faults(token_lifetime=2.0, expire_tokens=True),
            "login_outage": self._login_outage,
            "quota": self._quota(retry_after=False),
            "quota, retry_after": self._quota(retry_after=True),
            "lose_answer": self._faults(lose_answer=0.15),
            "reset": self._faults(reset=0.15),
            "slow_body": self._faults(slow_body=200_000.0),
            "cut": self._cutting,
            "strand": self._stranding,
            "freeze": self._freezing,
            "refuse": self._refusing,
            "swallow": self._swallowing,
            "restart": self._restarting,
            "everything": self._faults(
                fail={500: 0.02, 503: 0.05},
                lose_answer=0.05,
                reset=0.05,
                slow_body=500_000.0,
                token_lifetime=3.0,
            ),
            "quiet again": self._faults(),
        }

    async def run(self) -> None:
        """Let everything go wrong once."""
        for name, phase in self.phases.items():
            before = self.tools.books.statuses.total()
            await phase()
            self.sandbox.faults = Faults()
            self.sandbox.rate_limit = None
            print(f"{name}: {self.tools.books.statuses.total() - before}")  # noqa: T201 - for the note
        assert {knob.name for knob in fields(Faults)} == self.used

    def _fault(self, **faults: Any) -> None:  # noqa: ANN401 - of the simulator
        self.used |= faults.keys()
        self.sandbox.faults = Faults(**faults)

    async def served(self, name: str) -> None:
        """Wait for the first success from now on."""
        began = time.monotonic()
        async with asyncio.timeout(30):
            while self.tools.books.last_success < began:
                await asyncio.sleep(0.01)
        self.times[name] = self.tools.books.last_success - began

    def _faults(self, **faults: Any) -> Callable[[], Awaitable[None]]:  # noqa: ANN401 - of the simulator
        async def phase() -> None:
            self._fault(**faults)
            await asyncio.sleep(self.length)

        return phase

    def _quota(self, *, retry_after: bool) -> Callable[[], Awaitable[None]]:
        async def phase() -> None:
            self._fault(retry_after=retry_after)
            self.sandbox.rate_limit = (30, 1.0)
            await asyncio.sleep(self.length)

        return phase

    async def _expiring(self) -> None:
        for _ in range(3):
            self._fault(expire_tokens=True)
            await asyncio.sleep(self.length / 3)
            # A token that is forgotten before anybody used it marks whatever waited for it: 401 for 60 s, by contract.
            await self.served("expire_tokens")

    async def _login_outage(self) -> None:
        self._fault(login_outage=True, expire_tokens=True)
        await asyncio.sleep(self.length)
        self.sandbox.faults = Faults()
        await self.served("login_outage")

    async def _cutting(self) -> None:
        for _ in range(10):
            await asyncio.sleep(self.length / 10)
            self.link.cut()

    async def _stranding(self) -> None:
        self.link.strand()
        await asyncio.sleep(max(self.length, READ_TIMEOUT + 0.5))
        await self.served("strand")

    async def _freezing(self) -> None:
        for seconds in (READ_TIMEOUT / 4, READ_TIMEOUT + 1):
            self.link.freeze()
            await asyncio.sleep(seconds)
            self.link.thaw()
            await self.served("freeze")

    async def _refusing(self) -> None:
        self.link.refuse()
        await asyncio.sleep(self.length)
        self.link.listen()
        await self.served("refuse")

    async def _swallowing(self) -> None:
        if sys.platform != "linux":
            return
        self.link.swallow()
        await asyncio.sleep(self.length)
        self.link.listen()
        await self.served("swallow")

    async def _restarting(self) -> None:
        for _ in range(3):
            await self.sandbox.stop()
            self._fault(expire_tokens=True)
            await asyncio.sleep(0.2)
            await self.sandbox.start(port=self.sandbox.port)
            await self.served("restart")
            await asyncio.sleep(self.length / 3)


def check(books: Books, sandbox: Sandbox) -> None:
    """Assert that both sides' books agree."""
    assert [] == books.faults
    made = Counter(str(write["requestId"]) for write in sandbox.writes if write["method"] == "POST")
    assert {} == {name: count for name, count in made.items() if name not in books.writes}
    wrong = {name: (made[name], told) for name, told in books.writes.items() if made[name] not in told}
    assert {} == wrong, "number of a write: how often it was made, and what its tool was told"
    works = Counter(row.get("remarks") for row in sandbox.records.page("works", 0, 1_000_000))
    for name, count in made.items():
        if not name.startswith("editor"):
            assert count == works[name], name
    rows = {row["id"]: row for row in sandbox.records.page("customer-instrument-details", 0, 1_000_000)}
    states = {record: rows[record].get("make") if record in rows else None for record in books.records}
    assert {} == {
        record: (states[record], told) for record, told in books.records.items() if states[record] not in told
    }


@contextlib.asynccontextmanager
async def metquay() -> AsyncIterator[tuple[Sandbox, Link]]:
    """Run a simulated Metquay at the end of a link."""
    async with simulated() as sandbox:
        link = Link(sandbox.port)
        link.listen()
        try:
            yield sandbox, link
        finally:
            await link.stop()


SETTINGS: dict[str, Any] = {
    "rate_limit": "300/second",
    "read_timeout": str(READ_TIMEOUT),
    "connect_timeout": "0.5",
    "max_wait": "4",
    "replay_limit": "64KiB",
    "client_keys": ",".join(f"{name}:{key}" for name, key in KEYS.items()),
}


@dataclass(frozen=True)
class Footprint:
    """What a process holds: descriptors, threads, and resident memory in KiB."""

    descriptors: int
    threads: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Look."""
        folder = Path(f"/proc/{pid}")
        facts = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return cls(len(list((folder / "fd").iterdir())), int(facts["Threads"]), int(facts["VmRSS"].split()[0]))


async def at_rest(command: Process) -> Footprint:
    """Wait until a process has no connection any more but the one that it keeps ready, and look at it.

    While it replaces that one it has two: so the least of some moments counts.
    """
    async with asyncio.timeout(20):
        async with aiohttp.ClientSession(headers={"X-Proxy-Key": KEYS["reader"], "Connection": "close"}) as session:
            while True:
                async with session.get(command.url + "/-/status") as answer:
                    status = await answer.json()
                if status["requests"]["active"] == 1 and status["connections"] == {"busy": 0, "idle": 1}:
                    break
                await asyncio.sleep(0.1)
    looks = []
    for _ in range(25):
        await asyncio.sleep(0.2)
        looks.append(Footprint.of(command.popen.pid))
    return min(looks, key=lambda look: look.descriptors)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see what a process holds")
async def test_the_books_agree(tmp_path: Path) -> None:
    """Thousands of requests through every fault and into a SIGTERM: no write is lost, none doubled, nothing is left."""
    audit = tmp_path / "audit"
    async with metquay() as (sandbox, link):
        environment = {
            "METQUAY_HOST": link.url,
            "METQUAY_ACCESS_KEY": ACCESS_KEY,
            "METQUAY_SECRET_KEY": SECRET_KEY,
            "METQUAY_LISTEN": "127.0.0.1:0",
            "METQUAY_AUDIT_LOG": str(audit),
            "METQUAY_DRAIN_TIMEOUT": "4",
            "PYTHONWARNINGS": "always::ResourceWarning",
        } | {f"METQUAY_{name.upper()}": value for name, value in SETTINGS.items()}
        began = time.monotonic()
        with process(tmp_path, "serve", **environment) as command:
            books = Books()
            tools = Tools(command.url, books)
            working = asyncio.ensure_future(tools.run())
            await asyncio.sleep(3)
            tools.going = False
            await working
            before = await at_rest(command)
            tools.going = True
            working = asyncio.ensure_future(tools.run())
            chaos = Chaos(sandbox, link, tools, 2.5)
            await chaos.run()
            tools.going = False
            await working
            after = await at_rest(command)
            tools.going = True
            working = asyncio.ensure_future(tools.run())
            await asyncio.sleep(1)
            tools.ending = True
            ending = time.monotonic()
            assert 0 == await asyncio.to_thread(command.stop, signal.SIGTERM)
            drained = time.monotonic() - ending
            await working
        seconds = time.monotonic() - began
        await asyncio.sleep(0.5)
        check(books, sandbox)
    log = [json.loads(line) for line in command.output.splitlines() if line.startswith("{")]
    print(  # noqa: T201 - the figures that the note quotes
        f"{books.statuses.total()} requests in {seconds:.0f} s, {len(books.writes)} creations of which "
        f"{books.abandoned} abandoned, {len(sandbox.writes)} writes made\n{books.answers}\n{books.statuses}\n"
        f"healed after {chaos.times}\ndrained in {drained:.1f} s\n{before}\n{after}\n"
        f"{Counter(line['event'] for line in log)}"
    )
    assert 2000 <= books.statuses.total()
    assert max(chaos.times.values()) < HEALED + WANTED
    assert drained < 5
    assert after.descriptors <= before.descriptors
    assert after.threads == before.threads
    assert after.memory < before.memory + 16 * 1024
    logins = sum(line["event"].startswith(OF_LOGINS) for line in log)
    assert logins <= seconds + 1
    assert logins - 1 <= sandbox.logins + sandbox.refused_logins <= logins + 20
    others = [line for line in log if line["event"] != "request" and not line["event"].startswith(OF_LOGINS)]
    assert ["started", "listening", "stopping", "stopped"] == [line["event"] for line in others], others
    told = Counter(
        "made" if line["status"] == 201 else line["sent"]
        for line in map(json.loads, audit.read_text().splitlines())
        if line["client"] == "impatient"
    )
    made = sum(str(write["requestId"]).startswith("impatient") for write in sandbox.writes)
    assert told["made"] <= made <= told["made"] + told["unknown"], "the audit log knows what the tool did not wait for"


async def test_nothing_is_left() -> None:
    """After every fault the program holds no task, no descriptor and none of its own objects that it had not before."""
    gc.collect()
    others = Counter(type(each).__name__ for each in gc.get_objects() if type(each).__module__ in PER_REQUEST)
    async with metquay() as (sandbox, link), running(link.url, **SETTINGS) as (proxy, url):
        books = Books()
        tools = Tools(url, books)

        async def rest() -> tuple[Counter[str], int]:
            proxy.pool.let_cool()
            async with asyncio.timeout(20):
                while proxy.telemetry.active or proxy.server.clients or sum(proxy.pool.connections):
                    await asyncio.sleep(0.05)
            link.cut()
            await asyncio.sleep(1.5)  # the quota's window is empty again
            tasks = Counter(task.get_coro().__qualname__ for task in asyncio.all_tasks())  # type: ignore[union-attr]
            proxy.status()  # which counts those that are yet to be counted
            gc.collect()
            objects = Counter(type(each).__name__ for each in gc.get_objects() if type(each).__module__ in PER_REQUEST)
            exchanges, cells, targets, asked, answered = (
                objects.pop(name, 0) - others[name]
                for name in ("Exchange", "_Cell", "Target", "RequestFields", "ResponseHead")
            )
            assert exchanges <= 100 + 2, "those of the status page, and the last trouble"
            assert cells <= 300, "the quota's last window"
            assert targets <= 256, "those that are remembered"
            assert max(asked, answered) <= 64, "heads that are remembered"
            descriptors = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0
            return tasks + objects, descriptors

        working = asyncio.ensure_future(tools.run())
        await asyncio.sleep(1)
        tools.going = False
        await working
        before = await rest()
        tools.going = True
        working = asyncio.ensure_future(tools.run())
        await Chaos(sandbox, link, tools, 1.2).run()
        tools.going = False
        await working
        after = await rest()
        check(books, sandbox)
        print(f"{books.statuses.total()} requests\n{books.answers}\n{after}")  # noqa: T201 - for the note
        assert before == after
        assert 0 == proxy.status()["quota"]["waiting"]


PER_REQUEST = {
    "metquay_proxy.exchange.body",
    "metquay_proxy.exchange.exchange",
    "metquay_proxy.exchange.forwarder",
    "metquay_proxy.rules.http1",
    "metquay_proxy.rules.quota",
    "metquay_proxy.rules.headers",
    "metquay_proxy.downstream.connection",
    "metquay_proxy.rules.target",
    "metquay_proxy.telemetry",
    "metquay_proxy.upstream.connection",
    "metquay_proxy.upstream.pool",
}
