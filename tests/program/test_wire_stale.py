"""Connections that die while they idle: reads are repeated unseen, writes never ride them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.upstream.pool import MAX_IDLE, MAX_IDLE_UNSAFE
from tests.wire import OK, Peer, answered, chunked, get, head, post, rule

if TYPE_CHECKING:
    from metquay_proxy.exchange.exchange import Exchange
    from tests.wire import Bench, Client


async def drop(peer: Peer) -> None:
    """Close without an answer, as a server does that closes an idle connection while a request is on its way."""
    peer.reset()


async def ask(client: Client, request: bytes) -> int:
    """Send a request on a connection that is open, and return the status of the answer."""
    await client.send(request)
    return (await client.answer()).status


@rule("9112 9.3.1")
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
async def test_repeated_unseen(bench: Bench, method: str) -> None:
    """An idempotent request on a connection that the upstream has just closed is repeated on a new one, unseen."""
    client = await bench.client()
    bench.upstream.plays(OK, drop, OK)
    assert 200 == await ask(client, get())
    await client.send(head(f"{method} /x HTTP/1.1"))
    assert 200 == (await client.answer(method)).status
    assert (3, 2) == (len(bench.upstream.requests), len(bench.upstream.peers))


@rule("contract 5")
async def test_repeated_and_counted(bench: Bench) -> None:
    """The repetition is counted as an attempt."""
    client = await bench.client()
    bench.upstream.plays(OK, drop, OK)
    exchanges: list[Exchange] = []
    closed = bench.proxy.telemetry.closed
    bench.proxy.telemetry.closed = lambda exchange: exchanges.append(exchange) or closed(exchange)  # type: ignore[method-assign, func-returns-value]
    for _ in range(2):
        assert 200 == await ask(client, get())
    assert [1, 2] == [exchange.attempts for exchange in exchanges]


@rule("9112 9.3.1")
@pytest.mark.parametrize("body", ["length", "chunked"])
async def test_body_repeated(bench: Bench, body: str) -> None:
    """The repetition of an idempotent request brings its body again."""
    client = await bench.client()
    bench.upstream.plays(OK, drop, OK)
    assert 200 == await ask(client, get())
    request = post(b"abc", method="PUT") if body == "length" else chunked(b"abc").replace(b"POST", b"PUT")
    assert 200 == await ask(client, request)
    assert [b"", b"abc", b"abc"] == [each.body for each in bench.upstream.requests]


@rule("9110 9.2.2")
@pytest.mark.parametrize("request_", [post(b"abc"), chunked(b"abc"), post(b"", method="PATCH")])
async def test_post_never_twice(bench: Bench, request_: bytes) -> None:
    """A POST whose reused connection breaks is answered 502 with its outcome unknown, and never goes out twice."""
    client = await bench.client()
    bench.upstream.plays(OK, drop, OK)
    assert 200 == await ask(client, get())
    await client.send(request_)
    answer = await client.answer()
    assert (502, "upstream-closed", b"unknown") == (answer.status, answer.slug, answer.value(b"X-Metquay-Proxy-Sent"))
    await asyncio.sleep(0.05)
    assert 2 == len(bench.upstream.requests)


@rule("contract 5", max_idle=(1.0, 0.1))
async def test_post_rides_nothing_stale(bench: Bench) -> None:
    """A POST goes out on a new connection where the pooled one has idled too long; a GET may still use that."""
    client = await bench.client()
    bench.upstream.plays(OK)
    assert [200, 200] == [await ask(client, get()), await ask(client, post(b"a"))]
    assert 1 == len(bench.upstream.peers)
    await asyncio.sleep(0.15)
    assert 200 == await ask(client, get())
    assert 1 == len(bench.upstream.peers)
    await asyncio.sleep(0.15)
    assert 200 == await ask(client, post(b"a"))
    assert 2 == len(bench.upstream.peers)


@rule("contract 5")
async def test_the_figures(bench: Bench) -> None:  # noqa: ARG001 - every rule has one
    """The bounds are 2 s for what must not be repeated, and below the shortest idle time of servers for the rest."""
    assert MAX_IDLE_UNSAFE <= 2.0
    assert MAX_IDLE < 5.0


@rule("9112 9.5", max_idle=(0.15, 0.1), read_timeout="0.3")
async def test_idle_connections_closed(bench: Bench) -> None:
    """A connection that idled too long is closed by the proxy."""
    bench.proxy.pool.let_cool()
    assert 200 == (await bench.ask(get())).status
    await bench.upstream.peers[0].gone()
    assert (0, 0) == bench.proxy.pool.connections


@rule("9112 9.3.1")
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("wait", [0.0, 0.02])
@pytest.mark.parametrize("request_", [get(), post(b"abc")])
async def test_closed_while_idle(bench: Bench, request_: bytes, wait: float, reset: bool) -> None:  # noqa: FBT001 - a column
    """A connection that the upstream has closed is not used, even if the close has just arrived."""
    client = await bench.client()
    bench.upstream.plays(OK)
    assert 200 == await ask(client, get())
    peer = bench.upstream.peers[0]
    peer.reset() if reset else peer.close()
    await asyncio.sleep(wait)
    assert 200 == await ask(client, request_)
    assert 2 == len(bench.upstream.requests)


@rule("9112 9.3")
async def test_reuse(bench: Bench) -> None:
    """One client after the other uses the same connection; at once, each has its own."""
    for _ in range(3):
        assert 200 == (await bench.ask(get(), OK)).status
    assert 1 == len(bench.upstream.peers)
    clients = [await bench.client() for _ in range(3)]
    bench.upstream.plays(OK)
    await asyncio.gather(*[ask(client, get()) for client in clients])
    assert 3 >= len(bench.upstream.peers)


@rule("9112 9.3.1", max_idle=(1.0, 1.0), retries="2")
async def test_several_stale(bench: Bench) -> None:
    """After one stale connection the repetition takes a new one, not the next stale one."""
    clients = [await bench.client() for _ in range(4)]
    gate = asyncio.Event()

    async def hold(peer: Peer) -> None:
        await gate.wait()
        await peer.send(OK)

    bench.upstream.plays(hold)
    asking = [asyncio.ensure_future(ask(client, get())) for client in clients]
    await bench.upstream.seen(4)
    bench.upstream.plays(drop, OK)
    gate.set()
    assert [200] * 4 == await asyncio.gather(*asking)
    assert 200 == await ask(clients[0], get())
    assert 5 == len(bench.upstream.peers)


@rule("9112 6.3")
@pytest.mark.parametrize("before", [("HEAD", answered("X: y")), ("GET", b"HTTP/1.1 204 No Content\r\n\r\n")])
@pytest.mark.parametrize("method", ["GET", "PUT", "POST"])
async def test_left_over(bench: Bench, method: str, before: tuple[str, bytes]) -> None:
    """A body where none may be, flushed when a request is on its way, breaks none: a POST takes another connection."""

    async def flush(peer: Peer) -> None:
        await peer.send(b"poison" if peer is bench.upstream.peers[0] else OK)

    client = await bench.client()
    bench.upstream.plays(before[1], flush, OK)
    await client.send(head(f"{before[0]} /x HTTP/1.1"))
    await client.answer(before[0])
    await client.send(post(b"", method=method))
    answer = await client.answer()
    assert (200, b"ok") == (answer.status, answer.body)
    assert 2 == len(bench.upstream.peers)
    assert (2 if method == "POST" else 3) == len(bench.upstream.requests)
