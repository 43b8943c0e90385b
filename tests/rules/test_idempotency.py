from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.idempotency import (
    LIFETIME,
    Answer,
    Claim,
    Records,
    decoded,
    encoded,
    proves_nothing_was_executed,
    record_name,
)

T = TypeVar("T")

NAME = record_name("workbook", "/api/v1/customers", "key-1")
OTHER = record_name("workbook", "/api/v1/customers", "key-2")
BODY = hashlib.sha256(b"{}").digest()
ANSWER = Answer(201, b"Created", [(b"Content-Type", b"application/json")], b'{"metquayId": 1}')


async def claimed(records: Records, name: bytes = NAME, digest: bytes = BODY, now: float = 0.0) -> Claim:
    """Claim a key that must be free."""
    claim = await records.claim(name, digest, now)
    assert isinstance(claim, Claim)
    return claim


async def refused(records: Records, name: bytes = NAME, digest: bytes = BODY, now: float = 0.0) -> ProxyError:
    """Claim a key that must not be had."""
    with pytest.raises(ProxyError) as caught:
        await records.claim(name, digest, now)
    return caught.value


async def test_the_second_gets_the_first_ones_answer_for_a_day() -> None:
    """The same key and body get the recorded answer for 24 hours after it came, and execute anew after that."""
    records = Records()
    claim = await claimed(records)
    await records.complete(claim, ANSWER, 100.0)
    assert ANSWER == await records.claim(NAME, BODY, 100.0 + LIFETIME - 1)
    await claimed(records, now=100.0 + LIFETIME)


async def test_in_progress() -> None:
    """While the first runs, a second one is told so and executes nothing."""
    records = Records()
    await claimed(records)
    error = await refused(records)
    assert (409, "in-progress", "unknown") == (error.status, error.slug, error.sent)


async def test_outcome_unknown() -> None:
    """After a first request that broke off, nobody can say whether it was executed."""
    records = Records()
    await records.complete(await claimed(records), None, 0.0)
    error = await refused(records)
    assert (409, "outcome-unknown", "unknown") == (error.status, error.slug, error.sent)


async def test_an_answer_too_long_to_keep() -> None:
    """Where the answer was too long, its status is known and it was executed."""
    records = Records()
    await records.complete(await claimed(records), Answer(201, b"Created", [], None), 0.0)
    error = await refused(records)
    assert (409, "outcome-unknown", "yes") == (error.status, error.slug, error.sent)
    assert "201" in error.message


@pytest.mark.parametrize("ended", [False, True])
async def test_another_body(*, ended: bool) -> None:
    """A key is good for one body: another one is refused, while the first runs and after it."""
    records = Records()
    claim = await claimed(records)
    if ended:
        await records.complete(claim, ANSWER, 0.0)
    error = await refused(records, digest=b"other")
    assert (422, "idempotency-key-reused", "no") == (error.status, error.slug, error.sent)


async def test_freed() -> None:
    """What was certainly not executed frees its key, for another body too."""
    records = Records()
    claim = await claimed(records)
    await records.free(claim)
    assert 0 == len(records)
    await claimed(records, digest=b"other")


async def test_settled_once() -> None:
    """A claim is settled by whoever comes first; what comes later changes nothing."""
    records = Records()
    claim = await claimed(records)
    await records.complete(claim, ANSWER, 0.0)
    await records.free(claim)
    await records.complete(claim, None, 0.0)
    assert ANSWER == await records.claim(NAME, BODY, 0.0)


async def test_full() -> None:
    """As many records as fit, running ones included; expired ones make room, and Retry-After says when the next do."""
    records = Records(max_records=2)
    await records.complete(await claimed(records), ANSWER, 0.0)
    await claimed(records, OTHER)
    third = record_name(None, "/x", "key-3")
    error = await refused(records, third, now=LIFETIME - 10)
    assert (503, "idempotency-full", 10, "no") == (error.status, error.slug, error.retry_after, error.sent)
    await claimed(records, third, now=LIFETIME)
    error = await refused(records, NAME, now=LIFETIME)
    assert (503, 60) == (error.status, error.retry_after)


@pytest.mark.parametrize("key", ["", " ", "a ", " a", "\tx", "x\x7f", "é", "x" * 256, None])
def test_no_key(key: str | None) -> None:
    """A key that is empty, too long, not visible ASCII, or came twice is refused."""
    with pytest.raises(ProxyError) as caught:
        record_name(None, "/x", key)
    assert (400, "bad-request", "no") == (caught.value.status, caught.value.slug, caught.value.sent)


def test_scope() -> None:
    """A key belongs to one client key and one path."""
    names = {
        record_name(client, target, key)
        for client in (None, "a", "b")
        for target in ("/x", "/y", "/x?z")
        for key in ("k", "l l", '"quoted"')
    }
    assert 27 == len(names)


@pytest.mark.parametrize(
    ("status", "proof"), [(400, True), (401, True), (409, True), (429, True), (500, False), (302, False)]
)
def test_proof(status: int, *, proof: bool) -> None:
    """A 4xx proves that nothing was executed; a 5xx or a redirect proves nothing."""
    assert proof is proves_nothing_was_executed(status)


_FIELDS = st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), max_size=3)
_BODIES = st.none() | st.binary(max_size=32) | st.just(b"\n{}\n")
_ANSWERS = st.none() | st.builds(Answer, st.integers(200, 299), st.binary(max_size=8), _FIELDS, _BODIES)


@given(st.binary(min_size=32, max_size=32), _ANSWERS)
def test_a_record_beyond_this_process(digest: bytes, answer: Answer | None) -> None:
    """An answer is read as it was written: odd bytes, a body that was not kept or is empty, an unknown outcome."""
    assert (digest, None, answer) == decoded(encoded(digest, answer))


def test_a_running_request_beyond_this_process() -> None:
    """Who executes is written and read; the first line is JSON, which the store's script reads too."""
    written = encoded(BODY, None, running="replica-1")
    assert {"digest": BODY.hex(), "running": "replica-1"} == json.loads(written.split(b"\n")[0])
    assert (BODY, "replica-1", None) == decoded(written)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["claim", "complete", "lose", "free", "wait"]),
            st.sampled_from([b"a", b"b", b"c"]),
            st.sampled_from([b"1", b"2"]),
        ),
        max_size=40,
    )
)
def test_model(steps: list[tuple[str, bytes, bytes]]) -> None:
    """Whatever the order of events, a key executes only while no other request with it runs or has run."""

    async def play() -> None:
        records = Records(max_records=2)
        now = 0.0
        held: dict[bytes, Claim] = {}
        ended: dict[bytes, tuple[bytes, Answer | None, float]] = {}
        for action, name, digest in steps:
            if action == "wait":
                now += LIFETIME / 2
            ended = {key: record for key, record in ended.items() if record[2] > now}
            if action == "claim":
                expected = _verdict(held, ended, name, digest)
                try:
                    found: object = await records.claim(name, digest, now)
                except ProxyError as error:
                    found = error.slug
                if isinstance(found, Claim):
                    held[name] = found
                    found = "claim"
                assert expected == found
            elif action == "free" and name in held:
                await records.free(held.pop(name))
            elif action in {"complete", "lose"} and name in held:
                answer = ANSWER if action == "complete" else None
                claim = held.pop(name)
                await records.complete(claim, answer, now)
                ended[name] = (claim.digest, answer, now + LIFETIME)
            if action == "claim":
                assert len(held) + len(ended) == len(records)

    asyncio.run(play())


def _verdict(
    held: dict[bytes, Claim], ended: dict[bytes, tuple[bytes, Answer | None, float]], name: bytes, digest: bytes
) -> object:
    known = held[name].digest if name in held else ended[name][0] if name in ended else digest
    if known != digest:
        return "idempotency-key-reused"
    if name in held:
        return "in-progress"
    if name in ended:
        return ended[name][1] or "outcome-unknown"
    return "idempotency-full" if len(held) + len(ended) >= 2 else "claim"
