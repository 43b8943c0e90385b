"""What one path of Metquay answers costs the tools that ask for others as little as can be."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import count

import pytest

from tests import wire


@pytest.mark.parametrize("method", [pytest.param("GET", marks=pytest.mark.slow), "POST"])
@pytest.mark.slow
async def test_a_path_that_refuses_every_token(method: str) -> None:
    """Whoever asks for it all the time slows no neighbour down and takes the token from nobody; it costs few logins."""
    async with wire.running() as bench:

        async def play(peer: wire.Peer) -> None:
            asked = bench.upstream.requests[-1].line
            login = wire.answered(body=b'{"accessToken": "T", "expiresIn": 900}')  # on a connection that is there
            refusal = wire.answered(status="401 Unauthorized")
            await peer.send(login if b"/authenticate" in asked else refusal if b"/documents/7" in asked else wire.OK)

        bench.upstream.plays(play)
        refusals: Counter[int] = Counter()

        async def hammer() -> None:
            client = await bench.client()
            for number in count():
                await client.send(wire.post(b"{}", method=method, target=f"/documents/7?{number}"))
                refusals[(await client.answer()).status] += 1

        neighbour, hammering = await bench.client(), asyncio.ensure_future(hammer())
        took = []
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            for path, body in (("/customers", b"ok"), ("/-/ready", b"ready\n")):
                client = neighbour if body == b"ok" else await bench.client()
                began = time.monotonic()
                await client.send(wire.get(path))
                assert body == (await client.answer()).body
                took.append(time.monotonic() - began)
            await asyncio.sleep(0.01)
        hammering.cancel()
        print(f"{refusals}, {len(took)} of the others, {max(took) * 1000:.0f} ms at most")  # noqa: T201 - for the note
        assert {401} == set(refusals)
        assert refusals[401] > 50
        assert 3 >= bench.proxy.tokens.state.renewals
        assert 0.5 > max(took)
        assert 100 < len(took)


@pytest.mark.parametrize(
    ("path", "asked", "told"),
    [
        ("/reports", "600", 600),
        ("/reports", "3601", 3600),
        ("/reports", "999999999", 3600),
        ("/reports", "9" * 30, 61),
        ("/FlexicalERP/reports", "600", 0),
    ],
)
async def test_a_path_that_says_too_many(path: str, asked: str, told: int) -> None:
    """The window closes for all, as the limit is that of the keys; for an hour at most, and all are told how long."""
    settings = {"rate_limit": "100/minute", "pass_through": "/FlexicalERP/"}
    async with wire.running(**settings) as bench:
        refusal = wire.answered(f"Retry-After: {asked}", status="429 Too Many Requests")
        assert 429 == (await bench.ask(wire.get(path), refusal)).status
        answer = await bench.ask(wire.get("/customers"), wire.OK)
        assert (429 if told else 200) == answer.status
        assert told == int(answer.value(b"Retry-After") or 0)
        assert bench.proxy.ready()
