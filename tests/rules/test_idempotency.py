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
    ABANDONED,
    LIFETIME,
    MAX_ANSWER,
    Answer,
    Claim,
    Records,
    decoded,
    encoded,
    judged_elsewhere,
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


RUNS = "the first still runs"
LONG = Answer(201, b"Created", [], None)


@pytest.mark.parametrize(
    ("first", "digest", "expected", "text"),
    [
        (RUNS, BODY, (409, "in-progress", "unknown"), ""),
        (None, BODY, (409, "outcome-unknown", "unknown"), ""),  # nobody can say whether it was executed
        (LONG, BODY, (409, "outcome-unknown", "yes"), "201"),  # too long to keep, but its status is known
        *[(first, b"other", (422, "idempotency-key-reused", "no"), "") for first in (RUNS, ANSWER)],
    ],
)
async def test_refused(first: Answer | str | None, digest: bytes, expected: tuple[int, str, str], text: str) -> None:
    """While the first runs, after one that broke off, and with another body a second one executes nothing."""
    records = Records()
    claim = await claimed(records)
    if not isinstance(first, str):
        await records.complete(claim, first, 0.0)
    error = await refused(records, digest=digest)
    assert expected == (error.status, error.slug, error.sent)
    assert text in error.message


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


_TEXT = st.from_regex(rb"([!-~\x80-\xff]([\t -~\x80-\xff]{0,6}[!-~\x80-\xff])?)?", fullmatch=True)
_FIELDS = st.lists(st.tuples(st.from_regex(rb"X-[A-Za-z]{1,6}", fullmatch=True), _TEXT), max_size=3)
_BODIES = st.none() | st.binary(max_size=32) | st.just(b"\n{}\n")
_ANSWERS = st.none() | st.builds(Answer, st.integers(200, 299), _TEXT, _FIELDS, _BODIES)


@given(st.binary(min_size=32, max_size=32), _ANSWERS)
def test_a_record_beyond_this_process(digest: bytes, answer: Answer | None) -> None:
    """An answer is read as it was written: odd bytes, a body that was not kept or is empty, an unknown outcome."""
    assert (digest, None, answer) == decoded(encoded(digest, answer))


async def test_what_a_store_beyond_this_process_is_told() -> None:
    """Of a record that runs, one that has ended, and one that is free or was never there."""
    records = Records()
    for name in (b"runs", b"ended", b"freed"):
        claim = await records.claim(name, BODY, 0.0)
        assert isinstance(claim, Claim)
        if name == b"ended":
            await records.complete(claim, ANSWER, 100.0)
        elif name == b"freed":
            await records.free(claim)
    assert [b"runs", b"ended"] == list(records.known())
    assert ("keep", encoded(BODY, None, running="a"), LIFETIME) == records.told(b"runs", "a", 200.0)
    assert ("keep", encoded(BODY, ANSWER), LIFETIME - 100.0) == records.told(b"ended", "a", 200.0)
    assert ("keep", encoded(BODY, ANSWER), 1.0) == records.told(b"ended", "a", LIFETIME + 99.5)
    assert [("free", b"", LIFETIME)] * 2 == [records.told(name, "a", 200.0) for name in (b"freed", b"never")]


def test_a_running_request_beyond_this_process() -> None:
    """Who executes is written and read; the first line is JSON, which the store's script reads too."""
    written = encoded(BODY, None, running="replica-1")
    assert {"digest": BODY.hex(), "running": "replica-1"} == json.loads(written.split(b"\n")[0])
    assert (BODY, "replica-1", None) == decoded(written)


@pytest.mark.parametrize(("age", "slug"), [(ABANDONED - 1, "in-progress"), (ABANDONED, "outcome-unknown")])
def test_judged_elsewhere(age: float, slug: str) -> None:
    """An answer is passed on; a request that another replica began long ago has an unknown outcome."""
    assert ANSWER == judged_elsewhere(BODY, encoded(BODY, ANSWER), age)
    with pytest.raises(ProxyError) as caught:
        judged_elsewhere(BODY, encoded(BODY, None, running="replica-1"), age)
    assert slug == caught.value.slug


@pytest.mark.parametrize(
    "changed",
    [
        *[{"digest": said} for said in (5, "no digits")],
        *[{"status": said} for said in ("201", 99, 103, 1e999)],
        *[{"reason": said} for said in ("Created\r\nEvil: 1", "\u20ac")],
        *[{"fields": [["Location", said]]} for said in ("/\r\nEvil: 1", "/\r\n\r\nevil")],
        *[{"fields": said} for said in ([["Evil :", "1"]], [["Evil", "1", "2"]], [["Evil", "\0"]], None)],
        {"body": "x" * (MAX_ANSWER + 1)},
    ],
)
def test_a_record_that_nobody_of_us_wrote(changed: dict[str, object]) -> None:
    """What can't be read is no answer; it may have been executed, so that it is not done again."""
    told = json.loads(encoded(BODY, ANSWER).split(b"\n")[0]) | changed
    for record in (json.dumps(told).encode() + b"\n" + str(told.get("body", "")).encode(), b"", b"[]", b"\xff"):
        with pytest.raises(ValueError, match="no record"):
            decoded(record)
        with pytest.raises(ProxyError) as caught:
            judged_elsewhere(BODY, record, 0.0)
        assert ("outcome-unknown", "unknown") == (caught.value.slug, caught.value.sent)


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
