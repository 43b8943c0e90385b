"""The client's side as a whole: the drain, TLS, own pages, and what happens when the proxy itself makes a mistake."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from metquay_proxy.downstream.connection import Bounds, remote
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.gate import ClientKey
from metquay_proxy.telemetry import level
from tests.wire import BLANK, OK, Broken, Client, Peer, answered, chunked, eventually, get, head, post, rule, running

if TYPE_CHECKING:
    from pathlib import Path

    from metquay_proxy.exchange.exchange import Exchange
    from tests.wire import Bench


class TestFlags:
    @rule("aiohttp")
    async def test_live(self, bench: Bench) -> None:
        """The flags are in force on a live connection: aiohttp's server drops all of them at one misspelling."""
        client = await bench.client()
        await client.send(get("/-/live"))
        await client.answer()
        [connection] = bench.proxy.server.connections
        assert (64 * 1024, 128 * 1024, 128) == (
            connection.max_line_size,
            connection.max_field_size,
            connection.max_headers,
        )
        assert (120.0, 0.0, None) == (
            connection._keepalive_timeout,
            connection._lingering_time,
            connection.access_logger,
        )
        assert bench.proxy.server.handler_cancellation

    @rule("aiohttp")
    async def test_compiled_parser(self, bench: Bench) -> None:
        """The parser is the compiled one, which knows what the pure one does not refuse."""
        client = await bench.client()
        await client.send(get("/-/live"))
        await client.answer()
        assert "aiohttp._http_parser" == type(bench.proxy.server.connections[0]._parser).__module__

    @rule("aiohttp")
    async def test_no_decompression(self, bench: Bench) -> None:
        """Request bodies are not unpacked."""
        assert b"\x1f\x8b\x00" == (await bench.forwarded(post(b"\x1f\x8b\x00", "Content-Encoding: gzip"))).body


class TestMistakes:
    @rule("contract 8")
    async def test_before_the_head(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mistake of ours before an answer is a JSON 500 with an unknown outcome that gives nothing away."""

        async def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(bench.proxy.server._forwarder, "forward", fail)
        client = await bench.client()
        await client.send(get())
        answer = await client.answer()
        assert (500, "internal-error", b"unknown") == (
            answer.status,
            answer.slug,
            answer.value(b"X-Metquay-Proxy-Sent"),
        )
        assert b"Zero" not in answer.body
        assert 0 == bench.proxy.telemetry.active

    @rule("contract 8")
    @pytest.mark.parametrize("version", ["1.1", "1.0"])
    async def test_after_the_head(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        """A mistake of ours in mid-answer breaks the transfer: no second answer inside the first."""
        client = await bench.client()
        await client.send(head(f"GET /x HTTP/{version}"))
        peer = await bench.upstream.peer()
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await client.until(b"a")

        def fail(*_: object) -> bytes:
            raise ZeroDivisionError

        monkeypatch.setattr("metquay_proxy.upstream.pool.Response.read_nowait", fail)
        await peer.send(b"1\r\nb\r\n")
        with pytest.raises(Broken) as caught:
            await client.to_the_end()
        assert 1 == caught.value.got.count(b"HTTP/1")

    @rule("contract 8")
    @pytest.mark.parametrize("error", [TimeoutError(), web.HTTPNotFound(), ConnectionError()])
    async def test_odd_errors(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        """Errors for which aiohttp has answers of its own get ours."""

        async def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(bench.proxy.server._forwarder, "forward", fail)
        answer = await bench.ask(get())
        assert answer.slug in {"internal-error", "bad-request"}

    @rule("contract 8")
    async def test_an_error_that_cannot_be_written(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A mistake while an error is being written ends the connection, and nothing but it."""

        async def fail(*_: object) -> None:
            raise ProxyError("bad-request", "x", headers=(("X", "\u2603"),))

        monkeypatch.setattr(bench.proxy.server._forwarder, "forward", fail)
        client = await bench.client()
        await client.send(get())
        await client.gone()
        monkeypatch.undo()
        await bench.healthy()


class TestDrain:
    @rule("contract 9")
    async def test_upload_goes_on(self, bench: Bench) -> None:
        """An upload whose second half comes after the stop is finished, and its answer closes the connection."""
        client = await bench.client()
        await client.send(head("POST /x HTTP/1.1", "Content-Length: 6"), b"abc", pause=0.01)
        peer = await bench.upstream.peer()
        await peer.begun()
        assert b"abc" == await peer.exactly(3)
        stopping = asyncio.ensure_future(bench.proxy.stop(5))
        await eventually(lambda: bench.proxy.server.draining)
        await client.send(b"def")
        assert b"def" == await peer.exactly(3)
        await peer.send(OK)
        answer = await client.answer()
        assert (200, b"close") == (answer.status, answer.value(b"Connection"))
        await client.ended()
        await stopping

    @rule("contract 9")
    async def test_idle_connections_end(self, bench: Bench) -> None:
        """Idle connections are closed at once, new ones refused, a busy one asked to go after its answer."""
        idle, busy = await bench.client(), await bench.client()
        bench.upstream.plays(OK)
        await idle.send(get())
        await idle.answer()
        bench.upstream.answers.clear()
        await busy.send(get())
        await bench.upstream.seen(2)
        stopping = asyncio.ensure_future(bench.proxy.stop(5))
        await idle.ended()
        with pytest.raises(ConnectionError):
            await bench.client()
        await bench.upstream.peers[-1].send(OK)
        assert b"close" == (await busy.answer()).value(b"Connection")
        await stopping

    @rule("contract 9")
    async def test_late_requests(self, bench: Bench) -> None:
        """A request that arrives during the drain is told to come again."""
        client = await bench.client()
        await client.send(b"GET /x HTTP/1.1\r\nHost: loc")
        await eventually(lambda: any(each._head for each in bench.proxy.server.connections))  # type: ignore[attr-defined]
        other = await bench.client()
        await other.send(get())
        peer = await bench.upstream.peer()
        stopping = asyncio.ensure_future(bench.proxy.stop(5))
        await eventually(lambda: bench.proxy.server.draining)
        await client.send(b"alhost\r\n\r\n")
        answer = await client.answer()
        assert (503, "shutting-down") == (answer.status, answer.slug)
        assert answer.value(b"Retry-After") is not None
        await peer.send(OK)
        await other.answer()
        await stopping

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
        assert (request_[:4] == b"POST") == (b"look there before" in answer.body)
        await peer.gone()

    @rule("contract 9")
    @pytest.mark.parametrize("version", ["1.1", "1.0"])
    async def test_mid_answer_at_the_deadline(self, bench: Bench, version: str) -> None:
        """An answer that is cut by the deadline is a broken transfer."""
        client = await bench.client()
        await client.send(head(f"GET /x HTTP/{version}"))
        peer = await bench.upstream.peer()
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await client.until(b"a")
        await bench.proxy.stop(0.05)
        with pytest.raises(Broken):
            await client.to_the_end()

    @rule("contract 9")
    async def test_detached_writes_are_waited_for(self, bench: Bench) -> None:
        """A write that runs on without its client is waited for, and its connection stays open until then."""
        client = await bench.client()
        await client.send(post(b"abc"))
        peer = await bench.upstream.peer()
        await peer.request()
        client.close()
        await eventually(lambda: bench.proxy.server._detached)
        stopping = asyncio.ensure_future(bench.proxy.stop(5))
        await peer.silent(0.05)
        assert not stopping.done()
        await peer.send(OK)
        await stopping

    @rule("contract 9")
    async def test_a_partial_head_does_not_hold(self, bench: Bench) -> None:
        """A client that has begun a head and says no more does not hold up the end."""
        client = await bench.client()
        await client.send(b"GET /x HTTP/1.1\r\n")
        await asyncio.sleep(0.01)
        await asyncio.wait_for(bench.proxy.stop(5), 4)
        await client.gone()


class TestTLS:
    @rule("contract 6", client_tls=True, bounds=Bounds(head=0.2))
    async def test_silence(self, bench: Bench) -> None:
        """A client that never begins TLS has no more time than one that never sends a head."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(bench.proxy.addresses[0].rpartition(":")[2]))
        assert b"" == await asyncio.wait_for(reader.read(), 5)
        writer.close()

    @rule("contract 2", client_tls=True)
    async def test_tls(self, bench: Bench) -> None:
        """With a certificate the proxy serves TLS, and rewrites Location to https."""
        location = bench.upstream.url.encode() + b"/y"
        answer = await bench.ask(get(host=b"localhost:5"), answered(b"Location: " + location, body=b"a"))
        assert (b"a", b"https://localhost:5/api/v1/y") == (answer.body, answer.value(b"Location"))

    @rule("contract 2", client_tls=True)
    async def test_clear_text_to_tls(self, bench: Bench) -> None:
        """Clear text spoken to the TLS port breaks nothing."""
        reader, writer = await asyncio.open_connection(bench.host, bench.port)
        writer.write(get())
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readuntil(BLANK)
        writer.close()
        bench.crashes.clear()
        await bench.healthy()


class TestOwnPages:
    @rule("contract 7")
    async def test_pages_keep_the_connection(self, bench: Bench) -> None:
        """The proxy's own pages are answered on one connection like any other request, and never forwarded."""
        client = await bench.client()
        for target, status in (
            ("/-/live", 200),
            ("/-/ready", 200),
            ("/-/status", 200),
            ("/-/none", 404),
            ("/-/quit", 404),
        ):
            await client.send(get(target))
            answer = await client.answer()
            assert (status, b"no-store") == (answer.status, answer.value(b"Cache-Control"))
        assert [] == bench.upstream.peers

    @rule("contract 3")
    @pytest.mark.parametrize("target", ["/authenticate", "/api/v1/authenticate"])
    async def test_login(self, bench: Bench, target: str) -> None:
        """A login is answered here with a placeholder, and its body is read."""
        client = await bench.client()
        body = b'{"accessKey": "a", "secretKey": "b"}'
        for data in (post(body, target=target), chunked(body).replace(b"/x", target.encode())):
            await client.send(data)
            answer = await client.answer()
            assert (200, b"application/json") == (answer.status, answer.value(b"Content-Type"))
            assert b"accessToken" in answer.body
        assert [] == bench.upstream.peers

    @rule("contract 8")
    async def test_login_bounded(self, bench: Bench) -> None:
        """A login's body is bounded."""
        client = await bench.client()
        await client.send(head("POST /authenticate HTTP/1.1", "Content-Length: 10000000") + bytes(200_000))
        answer = await client.answer()
        assert (413, b"close") == (answer.status, answer.value(b"Connection"))


class TestAtOnce:
    """A plain read that finds a token, a slot and a connection goes to Metquay without a task."""

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
        [connection] = bench.proxy.server.connections
        assert connection.lane is not None
        for request in rest:
            await client.send(request)
        return client, may_answer

    @rule("ours")
    async def test_no_task(self, bench: Bench) -> None:
        """Neither the parser's task nor any other sees it, on an old connection or on a new one."""
        client = await bench.client()
        bench.upstream.plays(OK, OK, OK)
        await client.send(get())
        await client.answer()
        made: list[str] = []
        loop = asyncio.get_running_loop()

        def make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:  # noqa: ANN401 - asyncio's
            made.append(coro.__qualname__)
            return asyncio.Task(coro, loop=loop, **options)

        loop.set_task_factory(make)
        try:
            for each in (client, await bench.client()):
                await each.send(get())
                assert 200 == (await each.answer()).status
        finally:
            loop.set_task_factory(None)
        assert [] == [name for name in made if name.startswith(("Server", "RequestHandler", "Forwarder"))]

    @rule("ours", rate_limit="100/minute")
    async def test_the_client_leaves(self, bench: Bench) -> None:
        """The request is given up upstream too, logged, and its slot comes back."""
        closed: list[Exchange] = []
        telemetry = bench.proxy.telemetry
        tell = telemetry.closed
        telemetry.closed = lambda exchange: closed.append(exchange) or tell(exchange)  # type: ignore[method-assign, func-returns-value]
        client, _ = await self.in_flight(bench)
        client.reset()
        await eventually(lambda: 0 == telemetry.active)
        assert ["client-left"] == [exchange.error for exchange in closed if exchange.error]
        await eventually(lambda: (0, 0) == bench.proxy._transport.connections)
        quota = bench.proxy.status()["quota"]
        assert (2, 0) == (quota["used"], quota["in_flight"])

    @rule("ours")
    async def test_more_behind_it(self, bench: Bench) -> None:
        """What the client sends meanwhile is served after it, in order."""
        behind = [get("/a"), post(b"{}", target="/b"), get("/c")]
        client, may_answer = await self.in_flight(bench, *behind)
        assert 2 == len(bench.upstream.requests)
        may_answer.set()
        assert [200] * 4 == [(await client.answer()).status for _ in range(4)]
        assert [b"/late", b"/a", b"/b", b"/c"] == [
            request.line.split()[1].removeprefix(b"/api/v1") for request in bench.upstream.requests[1:]
        ]

    @rule("ours", max_idle=(0.15, 0.1), read_timeout="0.3")
    async def test_ready_before_the_first_request(self, bench: Bench) -> None:
        """After the start a connection stays ready, longer than one may idle, until the drain begins."""
        transport = bench.proxy._transport
        await asyncio.sleep(0.4)
        assert (0, 1) <= transport.connections
        bench.upstream.plays(OK)
        assert 200 == (await bench.ask(get())).status
        await bench.proxy.stop(5.0)
        await asyncio.sleep(0.1)
        assert (0, 0) == transport.connections

    @rule("ours", bounds=Bounds(idle=0.2))
    async def test_idle_connections_end(self, bench: Bench) -> None:
        """A connection that has brought nothing but such reads is closed after the idle time, counted from the last."""
        bench.upstream.plays(OK, OK, OK)
        await bench.ask(get())
        client = await bench.client()
        began = time.monotonic()
        for pause in (0.15, 0.0):
            await client.send(get())
            assert 200 == (await client.answer()).status
            await asyncio.sleep(pause)
        await client.ended()
        assert 0.3 < time.monotonic() - began

    @rule("ours", client_keys="shop:key-of-the-shop-x")
    async def test_remembered_heads(self, bench: Bench) -> None:
        """Of the heads that are remembered none holds a secret, none is long, and there are only so many."""
        server = bench.proxy.server
        key = "X-Proxy-Key: key-of-the-shop-x"
        client = await bench.client()
        for fields in ([key], [key], [key, "Cookie: a=b"], ["Authorization: Bearer key-of-the-shop-x"]):
            bench.upstream.plays(OK)
            await client.send(get("/x", *fields))
            assert 200 == (await client.answer()).status
        assert {} == server._plain_heads
        for number in range(100):
            assert server._plain_head(get("/x", f"X-Number: {number}").partition(b" HTTP/1.1")[2])[1]
        assert 0 < len(server._plain_heads) <= 64
        server._plain_heads.clear()
        assert server._plain_head(get("/x", f"X-Long: {'x' * 4000}").partition(b" HTTP/1.1")[2])[1]
        assert {} == server._plain_heads

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
    async def test_overtakes_nothing(self, bench: Bench) -> None:
        """A read that comes when another request has just been taken up is answered after that one."""
        may_answer = asyncio.Event()

        async def late(peer: Peer) -> None:
            await may_answer.wait()
            await peer.send(answered(body=b"first"))

        client = await bench.client()
        bench.upstream.plays(OK, late, OK)
        await client.send(get())
        await client.answer()
        [connection] = bench.proxy.server.connections
        for turns in range(4):
            connection.data_received(post(b"{}"))
            for _ in range(turns):
                await asyncio.sleep(0)
            connection.data_received(get("/second"))
            await eventually(lambda: b"POST" in bench.upstream.requests[-1].line)
            await asyncio.sleep(0.01)
            assert b"POST" in bench.upstream.requests[-1].line
            may_answer.set()
            assert [b"first", b"ok"] == [(await client.answer()).body for _ in range(2)]
            may_answer.clear()
            bench.upstream.plays(late, OK)

    @rule("ours")
    async def test_too_much_behind_it(self, bench: Bench) -> None:
        """A client that goes on sending is not read from without end."""
        client, may_answer = await self.in_flight(bench)
        [connection] = bench.proxy.server.connections
        client.writer.write(b"\r\n" * (1 << 22))
        transport = connection.transport
        assert transport is not None
        await eventually(lambda: not transport.is_reading())
        assert len(connection._unread) < 1 << 20
        may_answer.set()
        assert 200 == (await client.answer()).status

    @rule("ours")
    @pytest.mark.parametrize(("answers", "seconds"), [(True, 10), (False, 0.1), (False, 0)])
    async def test_the_drain(self, bench: Bench, answers: bool, seconds: float) -> None:  # noqa: FBT001 - a column
        """A drain waits for its answer, which ends the connection; at its end the client is told that none came."""
        client, may_answer = await self.in_flight(bench)
        stopping = asyncio.ensure_future(bench.proxy.stop(seconds))
        await eventually(lambda: bench.proxy.server.draining)
        if answers:
            may_answer.set()
        answer = await client.answer()
        assert (200 if answers else 503, b"close") == (answer.status, answer.value(b"Connection"))
        await client.ended()
        await stopping

    @rule("ours")
    async def test_goes_on_as_any_other(self, bench: Bench) -> None:
        """An answer that asks for another attempt gets one."""
        client = await bench.client()
        bench.upstream.plays(OK, answered(status="503 Busy"), OK)
        for _ in range(2):
            await client.send(get())
            assert 200 == (await client.answer()).status
        assert 3 == len(bench.upstream.requests)

    @rule("ours")
    @pytest.mark.parametrize("name", ["Host", "Content-Type", "Content-Location", "ETag", "Max-Forwards", "User-Agent"])
    async def test_what_must_come_once(self, bench: Bench, name: str) -> None:
        """A repeated field that the parser refuses is refused here as well, and nothing is sent."""
        client = await bench.client()
        bench.upstream.plays(OK)
        await client.send(get())
        await client.answer()
        await client.send(get("/x", f"{name}: localhost", *([] if name == "Host" else [f"{name}: b"])))
        assert (400, "bad-request") == ((answer := await client.answer()).status, answer.slug)
        assert 1 == len(bench.upstream.requests)

    @rule("ours")
    async def test_a_mistake_of_ours(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """The client sees a broken connection, the log says why, and nothing stays behind."""
        client, may_answer = await self.in_flight(bench)

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(bench.proxy.server, "_answer_head", fail)
        may_answer.set()
        with pytest.raises(Broken):
            await client.answer()
        await eventually(lambda: 0 == bench.proxy.telemetry.active)


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

    @pytest.mark.parametrize(
        ("address", "peer"),
        [
            ("192.0.2.7", ("192.0.2.7", 50000)),
            ("192.0.2.7", ("::ffff:192.0.2.7", 50000, 0, 0)),
            ("2001:db8::7", ("2001:db8::7", 50000, 0, 0)),
            ("fe80::7%eth0", ("fe80::7%eth0", 50000, 0, 2)),
            (None, ("127.0.0.1", 50000)),
            (None, ("127.8.8.8", 50000)),
            (None, ("::1", 50000, 0, 0)),
            (None, ("::ffff:127.0.0.1", 50000, 0, 0)),
            (None, ""),
            (None, None),
        ],
    )
    def test_what_is_an_address(self, address: str | None, peer: object) -> None:
        """Loopback and unix sockets are this machine; IPv4 in IPv6 is IPv4."""
        assert address == remote(peer)

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
