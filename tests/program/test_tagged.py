"""Each client gets its own answers, whatever clients and Metquay do to their connections.

Every request carries a tag, and so does each piece of its answer. The pieces of an answer are whole answers by
themselves, and those of a request's body whole requests: whatever went astray would be taken for what it is not, and
be seen. ``TAGGED_SEED`` repeats a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.wire import Broken, answered, certified, eventually, get, running

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.wire import Bench, Client, Peer

CLIENTS = 24
METHODS = {"GET": 50, "HEAD": 10, "POST": 25, "PUT": 10, "DELETE": 5}
BODILESS = {204, 304}
CHUNKED = b"HTTP/1.1 200 OK\r\nX-Tag: %d\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Asked:
    """One request; ``pieces`` is how many its answer has."""

    tag: int
    method: str
    data: bytes
    body: bytes
    pieces: int

    @property
    def answer(self) -> bytes:
        """The body that is its own."""
        return piece(self.tag) * self.pieces


def piece(tag: int) -> bytes:
    """Return a piece of an answer's body, which looks like an answer."""
    return answered(f"X-Tag: {tag}", body=b"%d" % tag)


def chunks(asked: Asked, count: int) -> bytes:
    """Return so many pieces of an answer, each in a chunk."""
    one = piece(asked.tag)
    return b"%x\r\n%b\r\n" % (len(one), one) * count


@dataclass
class Storm:
    """A run: what was asked, what Metquay saw and did, and what the clients were told."""

    bench: Bench
    seed: int
    asked: dict[int, Asked] = field(default_factory=dict)
    seen: Counter[int] = field(default_factory=Counter)
    """How often a request has come whole to Metquay."""
    cut: set[int] = field(default_factory=set)
    """Those whose answer Metquay broke off."""
    sent: dict[int, str] = field(default_factory=dict)
    """Those that the proxy answered itself, and whether it says that they were sent."""
    ended: Counter[str] = field(default_factory=Counter)

    def dice(self, *what: object) -> random.Random:
        """Return what decides about one thing, whatever the order in which things happen."""
        return random.Random(f"{self.seed} {what}")  # noqa: S311 - no secret

    async def play(self, peer: Peer) -> None:
        """Answer one request as Metquay; a request that comes again is answered well."""
        message = self.bench.upstream.requests[-1]
        tag = int(message.line.split()[1].rpartition(b"/")[2])
        asked = self.asked[tag]
        assert (asked.method.encode(), asked.body) == (message.line.split()[0], message.body)
        self.seen[tag] += 1
        dice = self.dice("upstream", tag, self.seen[tag])
        if dice.random() < 0.2:
            await asyncio.sleep(dice.random() * 0.01)
        ways: list[tuple[Callable[[Peer, Asked, random.Random], Awaitable[None]], int]]
        ways = [(self._whole, 30), (self._chunks, 30), (self._until_close, 5), (self._bodiless, 5)]
        if self.seen[tag] == 1:
            ways += [(self._nothing, 5), (self._break_off, 5), (self._say_too_much, 10), (self._leave, 10)]
        [way] = dice.choices([way for way, _ in ways], [weight for _, weight in ways])
        await way(peer, asked, dice)

    async def _whole(self, peer: Peer, asked: Asked, dice: random.Random, more: bytes = b"") -> None:
        data = answered(f"X-Tag: {asked.tag}", body=asked.answer)
        if asked.method == "HEAD":
            data = data.removesuffix(asked.answer)
        *first, last = split(data, dice)
        await peer.send(*first, last + more, pause=dice.random() * 0.003)

    async def _chunks(self, peer: Peer, asked: Asked, dice: random.Random) -> None:
        count = 0 if asked.method == "HEAD" else dice.randint(1, asked.pieces)
        rest = b"" if asked.method == "HEAD" else chunks(asked, asked.pieces - count) + b"0\r\n\r\n"
        await peer.send(CHUNKED % asked.tag + chunks(asked, count), rest, pause=0.001)

    async def _until_close(self, peer: Peer, asked: Asked, _: random.Random) -> None:
        head = b"HTTP/1.1 200 OK\r\nX-Tag: %d\r\nConnection: close\r\n\r\n" % asked.tag
        await peer.send(head, b"" if asked.method == "HEAD" else asked.answer)
        peer.close()

    async def _bodiless(self, peer: Peer, asked: Asked, dice: random.Random) -> None:
        status = dice.choice([b"204 No Content", b"304 Not Modified"])
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 %b\r\nX-Tag: %d\r\n\r\n" % (status, asked.tag))

    async def _nothing(self, peer: Peer, asked: Asked, dice: random.Random) -> None:
        if dice.random() < 0.5:
            self.cut.add(asked.tag)  # a reset takes along what was sent before and not yet read
            peer.reset()
        else:
            peer.close()

    async def _break_off(self, peer: Peer, asked: Asked, dice: random.Random) -> None:
        self.cut.add(asked.tag)
        data = (
            answered(f"X-Tag: {asked.tag}", body=asked.answer)
            if dice.random() < 0.5
            else CHUNKED % asked.tag + chunks(asked, 9)
        )
        await peer.send(data[: -dice.randrange(1, len(piece(asked.tag)))], pause=0.001)
        await self._nothing(peer, asked, dice)

    async def _say_too_much(self, peer: Peer, asked: Asked, dice: random.Random) -> None:
        """Say more than was asked for: another answer with the last piece, or what is none a moment late."""
        if dice.random() < 0.5:
            await self._whole(peer, asked, dice, answered("X-Tag: 0", body=b"0"))
        else:
            await self._whole(peer, asked, dice)
            await asyncio.sleep(dice.random() * 0.003)
            await peer.send(b"left over")

    async def _leave(self, peer: Peer, asked: Asked, dice: random.Random) -> None:
        """Close the connection while it idles."""
        await self._whole(peer, asked, dice)
        await asyncio.sleep(dice.random() * 0.003)
        await self._nothing(peer, asked, dice)

    def ask(self, tag: int, dice: random.Random, *, last: bool) -> bytes:
        """Make a request; the ``last`` one of its connection may say so."""
        [method] = dice.choices([*METHODS], [*METHODS.values()])
        minor = 0 if last and dice.random() < 0.1 else 1
        fields = [b"User-Agent: tool-%d" % dice.randrange(4)]
        if last and dice.random() < 0.1:
            fields.append(b"Connection: close")
        count = dice.choice([1, 3, 40]) if method in {"POST", "PUT"} else 0
        smuggled = get(f"/{tag}/smuggled")
        body = smuggled * count
        if count and minor and dice.random() < 0.5:
            fields.append(b"Transfer-Encoding: chunked")
            wire = (b"%x\r\n%b\r\n" % (len(smuggled), smuggled)) * count + b"0\r\n\r\n"
        else:
            wire = body
            if count or method == "POST":
                fields.append(b"Content-Length: %d" % len(body))
        data = get(f"/{tag}", *fields).replace(b"GET", method.encode(), 1).replace(b"1.1", b"1.%d" % minor, 1) + wire
        self.asked[tag] = Asked(tag, method, data, body, dice.choice([1, 2, 3, 50, 2000]))
        return data

    async def client(self, number: int, tags: Iterator[int]) -> None:
        """Ask for one batch after the other, each on the same connection while that lasts."""
        client = None
        dice = self.dice("client", number)
        while batch := [tag for tag, _ in zip(tags, range(dice.choice([1, 1, 1, 2, 4, 8])), strict=False)]:
            if client is None:
                client = await self.bench.client()
            data = b"".join(self.ask(tag, dice, last=tag == batch[-1]) for tag in batch)
            if dice.random() < 0.2:
                await self._leave_early(client, data, dice)
                client = None
                continue
            sending = asyncio.ensure_future(client.send(*split(data, dice), pause=0.001))
            if dice.random() < 0.05:
                await asyncio.sleep(0.02)
            keep = True
            while keep and batch:
                keep = await self._take(client, batch)
            await asyncio.gather(sending, return_exceptions=True)
            if not keep:
                client.close()
                client = None

    async def _leave_early(self, client: Client, data: bytes, dice: random.Random) -> None:
        if dice.random() < 0.5:
            data = data[: dice.randrange(len(data))]
        await client.send(data)
        with contextlib.suppress(Broken, TimeoutError):
            for _ in range(dice.choice([0, 1, 3])):
                async with asyncio.timeout(dice.random() * 0.01):
                    await client.some(dice.choice([1, 1000, 100_000]))
        way = dice.choice([client.reset, client.close, client.finish])
        if way != client.finish or client.writer.can_write_eof():
            way()
        self.ended["left"] += 1

    async def _take(self, client: Client, batch: list[int]) -> bool:
        """Read one answer, which must be the client's own; return whether another may follow."""
        try:
            answer = await client.answer(self.asked[batch[0]].method)
        except Broken:
            if self.cut.isdisjoint(batch):  # the reset that ends a later answer may overtake this one
                raise
            self.ended["broken"] += 1
            return False
        asked = self.asked[batch.pop(0)]
        keep = answer.value(b"Connection") != b"close" and answer.framing != "close"
        self.ended[answer.slug or "answered"] += 1
        if answer.slug is not None:
            assert "POST" == asked.method, f"{answer.slug} for what may be sent again"
            self.sent[asked.tag] = (answer.value(b"X-Metquay-Proxy-Sent") or b"").decode()
            return keep
        assert b"%d" % asked.tag == answer.value(b"X-Tag")
        expected = b"" if asked.method == "HEAD" or answer.status in BODILESS else asked.answer
        assert expected == answer.body
        return keep


def split(data: bytes, dice: random.Random) -> list[bytes]:
    """Cut data into a few pieces."""
    cuts = sorted(dice.randrange(len(data)) for _ in range(dice.choice([0, 0, 1, 3])))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def tasks() -> Counter[str]:
    """Count what runs."""
    return Counter(task.get_coro().__qualname__ for task in asyncio.all_tasks())  # type: ignore[union-attr]


async def storm(count: int, seed: int, **options: Any) -> Counter[str]:  # noqa: ANN401 - of the bench
    """Run one, and check what is left of it."""
    async with running(rate_limit="600/second", read_timeout="4", max_idle=(0.2, 0.1), **options) as bench:
        proxy = bench.proxy
        proxy.pool.let_cool()
        before = tasks()
        del before["Upstream._serve"]
        run = Storm(bench, seed)
        bench.upstream.plays(run.play)
        tags = iter(range(1, count + 1))
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(run.client(number, tags))
        for client in bench.clients:
            client.close()
        await eventually(lambda: not proxy.server.clients)
        await eventually(lambda: (0, 0) == proxy.pool.connections)
        await eventually(lambda: before == tasks())
        if count > 1000:  # it takes the quota's second
            await eventually(lambda: not proxy.status()["quota"]["used"])
        status = proxy.status()
        assert (0, 0) == (status["requests"]["active"], status["quota"]["waiting"])
        assert [] == [tag for tag, times in run.seen.items() if times > 1 and run.asked[tag].method == "POST"]
        assert [] == [tag for tag, sent in run.sent.items() if sent == "no" and run.seen[tag]]
        assert set(run.sent.values()) <= {"no", "unknown", "yes"}
        return run.ended


@pytest.mark.parametrize("count", [375, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("client_tls", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["clear", "tls"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_everybody_gets_their_own(tmp_path: Path, loop: str, client_tls: bool, count: int) -> None:  # noqa: FBT001 - a column
    """Clients and Metquay break what they can: no answer goes astray, no POST runs twice, and nothing is left."""
    library = pytest.importorskip(loop, reason=f"{loop} is not installed")
    seed = int(os.environ.get("TAGGED_SEED") or random.randrange(1 << 32))  # noqa: S311 - no secret
    print(f"TAGGED_SEED={seed}")  # noqa: T201 - shown where it fails
    options = certified(tmp_path, client_tls=client_tls)
    counted: Counter[str] = Counter()
    with asyncio.Runner(loop_factory=library.new_event_loop) as runner:
        counted = runner.run(storm(count, seed, **options))
    print(counted)  # noqa: T201 - the figures
