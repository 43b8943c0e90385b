"""The client's side as a whole: the drain, TLS, and what happens when the proxy itself makes a mistake."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import weakref
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiohttp import web

from metquay_proxy.downstream.connection import Bounds
from metquay_proxy.downstream.handler import Handler
from metquay_proxy.downstream.pages import Pages
from metquay_proxy.downstream.server import Server
from metquay_proxy.exchange.exchange import Response
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.gate import ClientKey, Gate
from metquay_proxy.rules.target import BaseURL, TargetRules
from metquay_proxy.telemetry import Telemetry, level
from tests.heads import response_head
from tests.wire import BLANK, OK, Broken, Client, Peer, answered, eventually, get, head, post, rule, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.exchange.forwarder import Forwarder
    from metquay_proxy.rules.gate import Admission
    from tests.wire import Bench


Forward = Callable[["Exchange"], Awaitable[Response]]


@contextlib.asynccontextmanager
async def handled(
    forward: Forward, gate: Gate | None = None, *, draining: bool = False
) -> AsyncIterator[tuple[Client, Telemetry]]:
    """Serve a client whose requests are forwarded by ``forward``, with nothing else made up."""
    base, telemetry = BaseURL.parse("lab.metquay.co"), Telemetry()
    pages = Pages(ready=lambda: True, status=dict, allow_quit=False, telemetry=telemetry)
    handler = Handler(
        rules=TargetRules(base.prefix, base.authorities),
        gate=gate or Gate(upstream_host=base.host),
        forwarder=cast("Forwarder", SimpleNamespace(forward=forward)),
        paced=cast("Forwarder", None),
        pages=pages,
        telemetry=telemetry,
        base=base,
        scheme="http",
        audit=None,
        replay_limit=1 << 20,
        read_timeout=60.0,
    )
    handler.draining = draining
    server = Server(handler, pages.respond, Bounds())
    listener = await asyncio.get_running_loop().create_server(server.accept, "127.0.0.1", 0)
    client = Client(*await asyncio.open_connection(*listener.sockets[0].getsockname()))
    try:
        yield client, telemetry
    finally:
        client.writer.transport.abort()
        listener.close()
        handler.stop()
        await server.end()


class TestMistakes:
    @pytest.mark.parametrize(
        ("slug", "error"),
        [
            ("internal-error", ZeroDivisionError("secret")),
            ("internal-error", TimeoutError()),
            ("internal-error", web.HTTPNotFound()),
            ("bad-request", ConnectionError()),
        ],
    )
    async def test_before_the_head(self, slug: str, error: Exception) -> None:
        """A mistake of ours before an answer is a JSON error with an honest outcome that gives nothing away."""

        async def fail(_: Exchange) -> Response:
            raise error

        async with handled(fail) as (client, telemetry):
            await client.send(get())
            answer = await client.answer()
            sent = b"unknown" if slug == "internal-error" else b"no"
            assert (slug, sent) == (answer.slug, answer.value(b"X-Metquay-Proxy-Sent"))
            assert b"secret" not in answer.body
            assert 0 == telemetry.active

    @pytest.mark.parametrize("version", ["1.1", "1.0"])
    async def test_after_the_head(self, version: str) -> None:
        """A mistake of ours in mid-answer breaks the transfer: no second answer inside the first."""
        response = Response()
        response.begin(response_head(200, b"OK", []))
        response.feed(b"a")

        async def answer(_: Exchange) -> Response:
            return response

        async with handled(answer) as (client, telemetry):
            await client.send(head(f"GET /x HTTP/{version}"))
            await client.until(b"a")
            response.fail(ZeroDivisionError())
            with pytest.raises(Broken) as caught:
                await client.to_the_end()
            assert 1 == caught.value.got.count(b"HTTP/1")
            assert 0 == telemetry.active

    async def test_an_error_that_cannot_be_written(self) -> None:
        """A mistake while an error is being written ends the connection, and nothing but it."""

        async def fail(_: Exchange) -> Response:
            raise ProxyError("bad-request", "x", headers=(("X", "\u2603"),))

        async with handled(fail) as (client, telemetry):
            await client.send(get())
            await client.gone()
            await eventually(lambda: 0 == telemetry.active)

    async def test_an_exchange_that_cannot_be_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mistake while it is counted or logged does not leave its connection without an end."""

        async def fail(_: Exchange) -> Response:
            raise ProxyError("bad-request", "x")

        async with handled(fail) as (client, telemetry):
            monkeypatch.setattr(telemetry, "closed", lambda _: 1 / 0)
            await client.send(get(), get())
            assert [400] * 2 == [(await client.answer()).status for _ in range(2)]


async def test_a_write_that_failed_leaves_nothing() -> None:
    """What it failed with is gone with it, and does not wait for the garbage collector."""
    left: list[weakref.ref[ProxyError]] = []

    def made() -> ProxyError:
        error = ProxyError("bad-request", "x")
        left.append(weakref.ref(error))
        return error

    async def fail(_: Exchange) -> Response:
        raise made()

    gc.collect()
    gc.disable()
    try:
        async with handled(fail) as (client, _telemetry):
            await client.send(post(b"{}"))
            assert 400 == (await client.answer()).status
            await eventually(lambda: left[0]() is None)
    finally:
        gc.enable()


class Counted(Gate):
    """A gate that counts what it judges."""

    judged = 0

    def check(self, *asked: Any) -> Admission:  # noqa: ANN401 - whatever a gate is asked
        """Judge."""
        self.judged += 1
        return super().check(*asked)


class TestWhatIsRemembered:
    @pytest.mark.parametrize(
        ("times", "key", "request_"),
        [
            (1, None, get()),
            (1, None, post(b"{}")),
            (3, None, get("/x", "Cookie: a=b")),
            (3, None, get("/x", "Authorization: Bearer x")),
            (3, None, get("/x", "Origin: http://localhost")),
            (3, None, get("/x", "Origin: https://evil.example")),
            (3, None, get("/x", host=b"evil.example")),
            (3, None, get("/" + "x" * 2048)),
            (3, "s3cr3t", get()),
            (3, "s3cr3t", get("/x", "X-Proxy-Key: s3cr3t")),
        ],
    )
    async def test_the_verdict(self, times: int, key: str | None, request_: bytes) -> None:
        """It is remembered of short heads without a secret, a page or a refusal, where there are no keys."""

        async def refuse(_: Exchange) -> Response:
            raise ProxyError("bad-request", "x")

        gate = Counted(upstream_host="x", keys=() if key is None else (ClientKey.of("a", key),))
        async with handled(refuse, gate) as (client, _telemetry):
            found = set()
            for _ in range(3):
                await client.send(request_)
                answer = await client.answer()
                found.add((answer.status, answer.slug))
            assert (times, 1) == (gate.judged, len(found))

    async def test_a_few(self) -> None:
        """Of many heads all are answered as they should be, and no more than a few are remembered."""

        async def refuse(_: Exchange) -> Response:
            raise ProxyError("bad-request", "x")

        gate = Counted(upstream_host="x")
        async with handled(refuse, gate) as (client, _telemetry):
            for turn in (1, 2):
                for number in range(100):
                    await client.send(get(f"/{number}"))
                    assert "bad-request" == (await client.answer()).slug
                assert 100 * turn == gate.judged


class TestDrain:
    @rule("contract 9")
    async def test_a_client_that_has_read_a_page(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is waited for until it leaves, so that it finds time to read; when the proxy stops, no more."""
        monkeypatch.setattr("metquay_proxy.downstream.pages._LINGER", 3600.0)
        client = await bench.client()
        await client.send(get("/-/live"))
        assert 200 == (await client.answer()).status
        await asyncio.wait_for(bench.proxy.stop(3600.0), 10.0)

    @rule("contract 9")
    @pytest.mark.parametrize(("request_", "sent"), [(get(), b"no"), (post(b"abc"), b"unknown")])
    async def test_the_deadline(self, bench: Bench, request_: bytes, sent: bytes) -> None:
        """What is not answered at the deadline gets 503 that says whether it may have been executed, and what to do."""
        client = await bench.client()
        await client.send(request_)
        peer = await bench.upstream.peer()
        await peer.request()
        await bench.proxy.stop(0.05)
        answer = await client.answer()
        assert (503, "shutting-down") == (answer.status, answer.slug)
        assert answer.value(b"X-Metquay-Proxy-Sent") in {sent, b"unknown"}
        assert (request_[:4] == b"POST") == (b"check there before" in answer.body)
        await peer.gone()

    @rule("contract 9")
    async def test_detached_writes_are_waited_for(self, bench: Bench) -> None:
        """A write that runs on without its client is waited for, and its connection stays open until then."""
        client = await bench.client()
        await client.send(post(b"abc"))
        peer = await bench.upstream.peer()
        await peer.request()
        client.close()
        await asyncio.sleep(0.05)
        stopping = asyncio.ensure_future(bench.proxy.stop(5))
        await peer.silent(0.05)
        assert not stopping.done()
        await peer.send(OK)
        await stopping

    async def test_nothing_else_is_judged(self) -> None:
        """Whatever a request is, while the proxy drains it is told to come again: also one that would be refused."""

        async def forward(_: Exchange) -> Response:
            raise AssertionError

        async with handled(forward, draining=True) as (client, _telemetry):
            await client.send(get("/a/../b", host=b"evil.example"))
            assert "shutting-down" == (await client.answer()).slug

    @rule("contract 9")
    async def test_late_requests(self, bench: Bench) -> None:
        """A request that arrives during the drain is told to come again."""
        client = await bench.client()
        await client.send(b"GET /x HTTP/1.1\r\nHost: loc")
        await asyncio.sleep(0.01)
        other = await bench.client()
        await other.send(get())
        peer = await bench.upstream.peer()
        stopping = asyncio.ensure_future(bench.proxy.stop(5))
        await eventually(lambda: bench.proxy.status()["draining"])
        await client.send(b"alhost\r\n\r\n")
        answer = await client.answer()
        assert (503, "shutting-down") == (answer.status, answer.slug)
        assert answer.value(b"Retry-After") is not None
        await peer.send(OK)
        await other.answer()
        await stopping


class TestTLS:
    @rule("contract 6", client_tls=True, bounds=Bounds(head=0.2))
    async def test_silence(self, bench: Bench) -> None:
        """A client that never begins TLS has no more time than one that never sends a head."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(bench.proxy.addresses[0].rpartition(":")[2]))
        assert b"" == await asyncio.wait_for(reader.read(), 5)
        writer.close()

    @rule("contract 6", client_tls=True, bounds=Bounds(head=0.2))
    async def test_time_is_looked_after_behind_a_page(self, bench: Bench) -> None:
        """A client that keeps its connection after a page of ours changes nothing for the others, nor for the end."""
        keeping = await bench.client()
        await keeping.send(get("/-/live"))
        assert 200 == (await keeping.answer()).status
        await asyncio.sleep(0.3)
        half = await bench.client()
        await half.send(b"GET /x HT")
        assert 408 == (await half.answer()).status

    @rule("contract 2", client_tls=True)
    async def test_tls(self, bench: Bench) -> None:
        """With a certificate the proxy serves TLS, and rewrites Location to https."""
        location = bench.upstream.url.encode() + b"/y"
        answer = await bench.ask(get(host=b"localhost:5"), answered(b"Location: " + location, body=b"a"))
        assert (b"a", b"https://localhost:5/api/v1/y") == (answer.body, answer.value(b"Location"))

    @rule("contract 2", client_tls=True)
    async def test_clear_text_to_tls(self, bench: Bench) -> None:
        """Clear text spoken to the TLS port is refused, and breaks nothing."""
        client = Client(*await asyncio.open_connection(bench.host, bench.port))
        await client.send(get())
        answer = await client.answer()
        assert (400, "bad-request") == (answer.status, answer.slug)
        client.close()
        bench.crashes.clear()
        await bench.healthy()


class TestInFlight:
    """A read under way, and what comes meanwhile."""

    @staticmethod
    async def in_flight(bench: Bench, *rest: bytes) -> tuple[Client, asyncio.Event]:
        """Send a read on warm connections whose answer waits for the event, and more behind it."""
        may_answer = asyncio.Event()

        async def late(peer: Peer) -> None:
            await may_answer.wait()
            await peer.send(OK)

        client = await bench.client()
        bench.upstream.plays(OK, late, *[OK for _ in rest])
        await client.send(get())
        await client.answer()
        await client.send(get("/late"))
        await eventually(lambda: 2 == len(bench.upstream.requests))
        for request in rest:
            await client.send(request)
        return client, may_answer

    @rule("ours", rate_limit="100/minute")
    async def test_the_client_leaves(self, bench: Bench) -> None:
        """The request is given up upstream too, logged, and its slot comes back."""
        client, _ = await self.in_flight(bench)
        client.reset()
        await eventually(lambda: 0 == bench.proxy.telemetry.active)
        assert ["client-left"] == [line["error"] for line in lines(bench) if "error" in line]
        await eventually(lambda: {"busy": 0, "idle": 0} == bench.proxy.status()["connections"])
        quota = bench.proxy.status()["quota"]
        assert (2, 0) == (quota["used"], quota["in_flight"])

    @rule("ours", max_idle=(0.15, 0.1), read_timeout="0.3")
    async def test_ready_before_the_first_request(self, bench: Bench) -> None:
        """After the start a connection stays ready, longer than one may idle, until the drain begins."""
        await asyncio.sleep(0.4)
        assert 1 <= bench.proxy.status()["connections"]["idle"]
        bench.upstream.plays(OK)
        assert 200 == (await bench.ask(get())).status
        await bench.proxy.stop(5.0)
        await asyncio.sleep(0.1)
        assert {"busy": 0, "idle": 0} == bench.proxy.status()["connections"]

    @rule("ours", client_keys="shop:key-of-the-shop-x")
    async def test_remembered_heads_are_judged_anew(self, bench: Bench) -> None:
        """Lines that were passed once are no pass for another request: without its key none is sent."""
        client = await bench.client()
        for fields, status in (([], 403), (["X-Proxy-Key: key-of-the-shop-x"], 200), ([], 403), ([], 403)):
            bench.upstream.plays(OK)
            await client.send(get("/x", *fields))
            assert status == (await client.answer()).status
        assert 1 == len(bench.upstream.requests)

    @rule("ours")
    @pytest.mark.parametrize("name", ["Host", "Content-Type", "Content-Location", "ETag", "Max-Forwards", "User-Agent"])
    async def test_what_must_come_once(self, bench: Bench, name: str) -> None:
        """A repeated field of which nobody may choose one is refused, and nothing is sent."""
        answer = await bench.ask(get("/x", f"{name}: localhost", *([] if name == "Host" else [f"{name}: b"])))
        assert (400, "bad-request") == (answer.status, answer.slug)
        assert [] == bench.upstream.requests


def lines(bench: Bench) -> list[dict[str, Any]]:
    """Return what the log tells of the requests."""
    return [json.loads(line) for line in bench.proxy.telemetry.since(0)[0]]


class TestLog:
    @rule("contract 9")
    async def test_who_asked(self, bench: Bench) -> None:
        """User-Agents are told in every way through the server, refused requests included; loopback is no address."""
        client = await bench.client()
        bench.upstream.plays(OK)
        for request in (get, post):
            for target in ("/x", "/../x"):
                fields = ["User-Agent: Tool/1"]
                await client.send(get(target, *fields) if request is get else post(b"{}", *fields, target=target))
                await client.answer()
        assert ["Tool/1"] * 4 == [line["user_agent"] for line in lines(bench)]
        assert [None, "bad-target"] * 2 == [line.get("error") for line in lines(bench)]
        assert not [line for line in lines(bench) if "address" in line]

    @rule("contract 9")
    async def test_from_where(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """The address of another machine is found once a connection, and told of each of its requests."""
        found = []
        monkeypatch.setattr(
            "metquay_proxy.downstream.connection.remote", lambda peer: found.append(peer) or "192.0.2.7"
        )
        client = await bench.client()
        bench.upstream.plays(OK)
        for request in (get(), post(b"{}"), b"nonsense" + BLANK):
            await client.send(request)
            await client.answer()
        assert ["192.0.2.7"] * 3 == [line["address"] for line in lines(bench)]
        assert 1 == len(found)

    @rule("contract 9")
    async def test_what_is_asked_all_the_time(self, bench: Bench) -> None:
        """Probes, scrapes, event streams and what browsers ask by themselves are no news, unless they were refused."""
        told: list[Exchange] = []
        tell = bench.proxy.telemetry.closed
        bench.proxy.telemetry.closed = lambda exchange: told.append(exchange) or tell(exchange)  # type: ignore[method-assign, func-returns-value]
        for path in ("/-/live", "/-/ready", "/-/metrics", "/", "/favicon.ico", "/robots.txt", "/-/status", "/-/x"):
            await bench.ask(get(path))
            await bench.ask(get(path, host=b"rebound.example"))
        stream = await bench.client()
        await stream.send(get("/-/events"))
        await stream.until(b"data: ")
        stream.close()
        await eventually(lambda: 0 == bench.proxy.telemetry.active)
        assert ["debug", "warning"] * 6 + ["info", "warning"] + ["warning"] * 2 + ["debug"] == [
            level(each) for each in told
        ]

    async def test_a_replayed_answer(self, tmp_path: Path) -> None:
        """A repeated POST was answered by the proxy, from its record: log and audit tell of one execution."""
        path = tmp_path / "audit.log"
        async with running(audit_log=str(path)) as bench:
            await self.replay(bench)
            told = lines(bench)
        assert [("metquay", 1, None), ("proxy", 0, True)] == [
            (line["answered_by"], line["attempts"], line.get("replayed")) for line in told
        ]
        audit = [json.loads(line) for line in path.read_text().splitlines()]
        assert [("yes", None), ("no", True)] == [(line["sent"], line.get("replayed")) for line in audit]
        assert [line["id"] for line in told] == [line["id"] for line in audit]

    async def test_an_answer_is_not_for_another_key(self) -> None:
        """A key that takes the name of one that was removed does not get what that one was answered."""
        old, new = "workbook-key-0123456789", "workbook-key-9876543210"
        async with running(client_keys=f"workbook:{old}") as bench:
            bench.upstream.plays(answered(body=b"old"), answered(body=b"new"))
            for key, expected in ((old, b"old"), (old, b"old"), (new, b"new")):
                if key == new:
                    bench.proxy._gate.replace_keys((ClientKey.of("workbook", new),))
                client = await bench.client()
                await client.send(post(b"{}", "Idempotency-Key: k", f"X-Proxy-Key: {key}"))
                assert expected == (await client.answer()).body
        assert 2 == len(bench.upstream.requests)

    async def replay(self, bench: Bench) -> None:
        """Send the same POST twice."""
        client = await bench.client()
        bench.upstream.plays(answered("X-Request-Id: first", status="201 Created", body=b"{}"))
        for _ in range(2):
            await client.send(post(b"{}", "Idempotency-Key: k"))
            answer = await client.answer()
            assert (201, b"first") == (answer.status, answer.value(b"X-Request-Id"))
