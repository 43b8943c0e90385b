"""Whole lists, as a tool gets them through the proxy from a Metquay that is hostile, and from the simulated one."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.rules.lists import MAX_PAGE
from tests import wire
from tests.wire import Broken, answered, eventually, get

if TYPE_CHECKING:
    from tests.wire import Bench, Peer

CSV, JSON = "/-/lists/customers.csv", "/-/lists/works.json"
KEYS = "writer:0123456789abcdef,reader:fedcba9876543210:read-only"


def page(*ids: int) -> bytes:
    """Return an answer with records of these ids."""
    records = ",".join(f'{{"id": {number}, "notes": "5 \N{MICRO SIGN}m"}}' for number in ids)
    return answered("Content-Type: application/json", body=f"[{records}]".encode())


def targets(bench: Bench) -> list[bytes]:
    """Return what Metquay was asked for."""
    return [request.line.split()[1] for request in bench.upstream.requests]


async def test_page_after_page() -> None:
    """Each page is a request of its own in the tool's name, one after the other, from the last record that was seen."""
    async with wire.running() as bench:
        answer = await bench.ask(get(JSON), page(1, 2, 3), page(3, 4), page(4), page())
        assert [1, 2, 3, 4] == [record["id"] for record in json.loads(answer.body)]
        assert "5 \N{MICRO SIGN}m" == json.loads(answer.body)[0]["notes"]
        assert (200, b"application/json; charset=utf-8") == (answer.status, answer.value(b"Content-Type"))
        assert b'attachment; filename="works.json"' == answer.value(b"Content-Disposition")
        assert [b"/api/v1/works?first=%d&limit=500" % first for first in (0, 2, 3, 4)] == targets(bench)
        for request in bench.upstream.requests:
            assert b"application/json" == request.value(b"Accept")
            assert request.value(b"Authorization") == f"Bearer {wire.TOKEN}".encode()
        lines = bench.proxy.status()["requests"]
        assert 5 == lines["finished"], "four pages and the list"


async def test_csv_for_a_spreadsheet() -> None:
    """The columns are the vendor's, the options of the query hold, and workspaceCode goes to Metquay as it came."""
    records = answered(body=b'[{"id": 1, "phone": "=1", "more": "x"}]')
    async with wire.running() as bench:
        answer = await bench.ask(get(f"{CSV}?workspaceCode=a%2Fb"), records, page(), records)
        head, row = csv.reader(io.StringIO(answer.body.decode("utf-8-sig"), newline=""))
        assert {"id": "1", "phone": "'=1", "more": "x"} == {
            name: cell for name, cell in zip(head, row, strict=True) if cell
        }
        assert b"text/csv; charset=utf-8; header=present" == answer.value(b"Content-Type")
        assert {b"/api/v1/customers?first=%d&limit=500&workspaceCode=a%%2Fb" % n for n in (0, 1)} == set(targets(bench))
        answer = await bench.ask(get(f"{CSV}?formulas=keep"), records, page(), records)
        assert b",=1," in answer.body


async def test_rows_are_sent_as_they_come() -> None:
    """The first row is there before the second page was asked for, and a slow reader holds its page alone."""
    async with wire.running() as bench:
        asked = asyncio.Event()

        async def second(peer: Peer) -> None:
            await asked.wait()
            await peer.send(page(2))

        bench.upstream.plays(page(1, 2), second, page())
        client = await bench.client()
        await client.send(get(JSON))
        await client.until(b'"id": 2')
        asked.set()
        assert (await client.to_the_end()).endswith(b"]\r\n0\r\n\r\n")


@pytest.mark.parametrize("minor", [0, 1])
@pytest.mark.parametrize(
    "failure",
    [
        answered(status="503 No"),
        answered(status="404 No"),
        answered(body=b"<html>"),
        answered(body=b'{"records": []}'),
        page(9),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n[",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n[" % (MAX_PAGE + 2) + b" " * (MAX_PAGE + 1),
    ],
    ids=["outage", "refusal", "html", "no array", "lost place", "broken off", "too large"],
)
async def test_a_later_failure_breaks_the_transfer(failure: bytes, minor: int) -> None:
    """It never looks like a whole list, to a client of HTTP/1.0 either, and is told in the log."""

    async def fails(peer: Peer) -> None:
        await peer.send(failure)
        if failure.endswith(b"["):
            peer.close()

    async with wire.running(retries="0") as bench:
        bench.upstream.plays(page(1, 2), fails)
        client = await bench.client()
        await client.send(get(JSON).replace(b"HTTP/1.1", b"HTTP/1.%d" % minor))
        with pytest.raises(Broken):
            await client.to_the_end()
        assert b'"id": 2' in client.got
        assert not client.got.endswith((b"]", b"0\r\n\r\n"))
        await bench.healthy()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("status", "slug", "first"),
    [
        (403, None, answered("Content-Type: application/json", status="403 No", body=b'{"code": 403}')),
        (503, None, answered("Retry-After: 7", status="503 No")),
        (502, "upstream-protocol", answered(body=b"<html>")),
        (502, "upstream-protocol", answered("Location: /x", status="302 Found")),
        (502, "upstream-protocol", answered(status="204 No Content").replace(b"Content-Length: 0\r\n", b"")),
    ],
)
async def test_the_first_page_decides_the_status(method: str, status: int, slug: str | None, first: bytes) -> None:
    """Metquay's own refusal is passed on; what is no list is the proxy's 502."""
    async with wire.running(retries="0") as bench:
        answer = await bench.ask(get(CSV).replace(b"GET", method.encode()), first, method=method)
        assert (status, slug) == (answer.status, answer.slug)
        if status == 503:
            assert b"7" == answer.value(b"Retry-After")
        if status == 403 and method == "GET":
            assert b'{"code": 403}' == answer.body


async def test_head() -> None:
    """The head that GET would get, once the first page is there; no other page is asked for."""
    async with wire.running() as bench:
        answer = await bench.ask(get(CSV).replace(b"GET", b"HEAD"), page(1, 2), method="HEAD")
        assert (200, b"") == (answer.status, answer.body)
        assert 1 == len(bench.upstream.requests)
        assert b'attachment; filename="customers.csv"' == answer.value(b"Content-Disposition")


@pytest.mark.parametrize(
    ("status", "slug", "request_", "settings"),
    [
        (404, "no-such-page", get("/-/lists/"), {}),
        (404, "no-such-page", get("/-/lists/customers"), {}),
        (404, "no-such-page", get("/-/lists/customers.csv/x"), {}),
        (404, "no-such-page", get("/-/lists/instrument-categories.csv"), {}),
        (400, "bad-request", get(f"{CSV}?first=0"), {}),
        (400, "bad-request", get(f"{JSON}?dates=vendor"), {}),
        (405, "method-not-allowed", get(CSV).replace(b"GET", b"DELETE"), {}),
        (405, "method-not-allowed", get(CSV).replace(b"GET", b"OPTIONS"), {}),
        (403, "client-key-required", get(CSV), {"client_keys": KEYS}),
        (403, "client-key-required", get(CSV, "X-Proxy-Key: wrong-wrong-wrong"), {"client_keys": KEYS}),
        (403, "origin-not-allowed", get(CSV, "Origin: https://evil.example"), {}),
        (403, "origin-not-allowed", get(CSV, "Sec-Fetch-Site: cross-site"), {}),
        (403, "host-not-allowed", get(CSV, host=b"evil.example"), {}),
    ],
)
async def test_refusals(status: int, slug: str, request_: bytes, settings: dict[str, str]) -> None:
    """Nothing is sent for a list that nobody may have, that there is not, or that is asked for wrongly."""
    async with wire.running(**settings) as bench:
        await bench.refused(request_, status, slug)


async def test_who_may_only_read_may_read_lists() -> None:
    """A key that may not write is enough, and so is METQUAY_READ_ONLY."""
    async with wire.running(client_keys=KEYS, read_only="true") as bench:
        answer = await bench.ask(get(JSON, "X-Proxy-Key: fedcba9876543210"), page(1, 2), page(2), page())
        assert (200, 2) == (answer.status, len(json.loads(answer.body)))


async def test_four_lists_at_once() -> None:
    """A fifth is refused with 429, and may come once one of them has ended, however it ended."""
    async with wire.running() as bench:
        go = asyncio.Event()

        async def play(peer: Peer) -> None:
            first = int(bench.upstream.requests[-1].line.partition(b"first=")[2].partition(b"&")[0])
            if first == 1:
                await go.wait()
            await peer.send((page(1, 2), page(2), page())[first])

        bench.upstream.plays(play)
        clients = [await bench.client() for _ in range(4)]
        for client in clients:
            await client.send(get(JSON))
            await client.until(b'"id": 2')
        fifth = await bench.client()
        await fifth.send(get(JSON))
        answer = await fifth.answer()
        assert (429, "quota-exceeded", b"30") == (answer.status, answer.slug, answer.value(b"Retry-After"))
        clients[0].reset()
        await eventually(lambda: bench.proxy.telemetry.active == 6)  # three lists, each with a page under way
        clients[0] = await bench.client()
        await clients[0].send(get(JSON))
        await clients[0].until(b'"id": 2')
        go.set()
        for client in clients:
            assert (await client.to_the_end()).endswith(b"0\r\n\r\n")


async def test_a_client_that_leaves_ends_its_list() -> None:
    """The page under way is cancelled, and no other one is asked for."""
    async with wire.running() as bench:
        gone = asyncio.Event()

        async def endless(peer: Peer) -> None:
            assert b"" == await peer.reader.read()
            gone.set()

        bench.upstream.plays(page(1, 2), endless)
        client = await bench.client()
        await client.send(get(JSON))
        await client.until(b'"id": 2')
        await eventually(lambda: len(bench.upstream.requests) == 2)
        client.reset()
        await wire.patiently(gone.wait())
        await eventually(lambda: bench.proxy.telemetry.active == 0)


async def test_a_key_that_ends_ends_its_list() -> None:
    """No further page is asked for with a client key that was taken away, and the list is visibly broken."""
    async with wire.running(client_keys=KEYS) as bench:

        async def removing(peer: Peer) -> None:
            gate = bench.proxy._gate
            gate.replace_keys(tuple(key for key in gate.keys if key.name == "writer"))
            await peer.send(page(2, 3))

        bench.upstream.plays(page(1, 2), removing)
        client = await bench.client()
        await client.send(get(JSON, "X-Proxy-Key: fedcba9876543210"))
        with pytest.raises(Broken):
            await client.to_the_end()
        assert b'"id": 3' in client.got
        assert 2 == len(bench.upstream.requests)


async def test_a_drain_breaks_it() -> None:
    """A proxy that is being stopped asks for no further page, and the list is visibly broken."""
    async with wire.running() as bench:

        async def draining(peer: Peer) -> None:
            bench.proxy.server._serving.drain()  # type: ignore[attr-defined]
            await peer.send(page(2, 3))

        bench.upstream.plays(page(1, 2), draining)
        client = await bench.client()
        await client.send(get(JSON))
        with pytest.raises(Broken):
            await client.to_the_end()
        assert b'"id": 3' in client.got
        assert 2 == len(bench.upstream.requests)


@pytest.mark.parametrize("settings", [{"max_wait": "5"}, {"max_wait": "60"}])
async def test_a_window_that_metquay_closed(settings: dict[str, str]) -> None:
    """For the pace of the quota a page waits as long as it takes, for Metquay's own refusal as long as any request."""
    refused = answered("Retry-After: 20", status="429 No")
    async with wire.running(rate_limit="100/minute", **settings) as bench:
        if settings["max_wait"] == "5":
            answer = await bench.ask(get(JSON), refused)
            assert (429, "quota-exceeded", 1) == (answer.status, answer.slug, len(bench.upstream.requests))
            answer = await bench.ask(get(JSON), page(1))
            assert (429, "quota-exceeded", 1) == (answer.status, answer.slug, len(bench.upstream.requests))
            answer = await bench.ask(get(JSON, "Prefer: wait=1"), page(1))
            assert b"wait=1" == answer.value(b"Preference-Applied")
