from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.idempotency import (
    ABANDONED,
    LIFETIME,
    MAX_ANSWER,
    MAX_ANSWERS,
    MAX_RECORDS,
    Answer,
    Claim,
    Records,
    encoded,
    greed,
    judged,
    proves_nothing_was_executed,
    record_name,
)
from tests.heads import response_head

T = TypeVar("T")

NAME = record_name("workbook", "/api/v1/customers", "key-1")
OTHER = record_name("workbook", "/api/v1/customers", "key-2")
BODY = hashlib.sha256(b"{}").digest()
ANSWER = Answer(response_head(201, b"Created", [(b"Content-Type", b"application/json")]), b'{"metquayId": 1}')


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
BROKEN = Answer(response_head(201, b"Created", [(b"X", b"y")]), None)
LONG = Answer(response_head(201, b"Created", [(b"X", bytes(100).hex().encode())]), bytes(MAX_ANSWER - 200))
LONGEST = Answer(
    response_head(201, b"Created", [(b"X", b"y")]), bytes(MAX_ANSWER - len("HTTP/1.1 201 Created\r\nX: y\r\n\r\n"))
)


@pytest.mark.parametrize(
    ("first", "digest", "expected", "text"),
    [
        (RUNS, BODY, (409, "in-progress", "unknown"), ""),
        (None, BODY, (409, "outcome-unknown", "unknown"), ""),  # nobody can say whether it was executed
        (BROKEN, BODY, (409, "outcome-unknown", "yes"), "201"),  # its status is known,
        (LONG, BODY, (409, "outcome-unknown", "yes"), "201"),  # and that of one whose head makes it too long to keep
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
    await records.complete(claim, None, 0.0, executed=False)
    assert 0 == len(records)
    await claimed(records, digest=b"other")


async def test_settled_once() -> None:
    """A claim is settled by whoever comes first; what comes later changes nothing."""
    records = Records()
    claim = await claimed(records)
    await records.complete(claim, ANSWER, 0.0)
    await records.complete(claim, None, 0.0, executed=False)
    await records.complete(claim, None, 0.0)
    assert ANSWER == await records.claim(NAME, BODY, 0.0)


async def test_the_longest_answer() -> None:
    """As many bytes as an answer may have, its head included, are kept."""
    records = Records()
    await records.complete(await claimed(records), LONGEST, 0.0)
    assert LONGEST == await records.claim(NAME, BODY, 0.0)


async def test_full() -> None:
    """As many records as fit, running ones included; expired ones make room, and Retry-After says when the next do."""
    records = Records(max_records=2)
    names = [record_name(None, "/x", f"key-{number}") for number in range(3)]
    await records.complete(await claimed(records, names[0]), ANSWER, 0.0)
    await claimed(records, names[1])
    error = await refused(records, names[2], now=LIFETIME - 10)
    assert (503, "idempotency-full", 10, "no") == (error.status, error.slug, error.retry_after, error.sent)
    await claimed(records, names[2], now=LIFETIME)
    error = await refused(records, names[0], now=LIFETIME)
    assert (503, 60) == (error.status, error.retry_after)


async def test_the_share_of_a_client_key() -> None:
    """One that asks for all gets three quarters, the next one of what is left; what is freed or expired comes back."""

    async def taken(records: Records, client: str | None, now: float = 0.0) -> list[Claim]:
        claims: list[Claim] = []
        while True:
            try:
                claims.append(await claimed(records, record_name(client, "/x", f"{len(claims)}-{now}"), now=now))
            except ProxyError as error:
                assert "idempotency-full" == error.slug  # noqa: PT017 - it ends the loop
                return claims

    records = Records(max_records=1000)
    first = await taken(records, "a")
    assert [750, 188, 47] == [len(first), *[len(await taken(records, client)) for client in ("b", "c")]]
    for claim in first:
        await records.complete(claim, None, 0.0)
    assert 0 == len(await taken(records, "a", LIFETIME - 1))
    assert 574 == len(await taken(records, "a", LIFETIME)), "three quarters of what the others leave"
    assert 1000 == len(await taken(Records(max_records=1000), None)), "without client keys all are for all"
    assert MAX_RECORDS * greed(record_name("a", "/x", "k"), MAX_RECORDS) / 4 > 24 * 60 * 100, "a day at full speed"


async def test_the_oldest_answers_make_room() -> None:
    """Where answers hold too many bytes, the oldest are forgotten, and that they were executed is not."""
    answer = Answer(response_head(201, b"Created", []), bytes(400))
    size = len(encoded(BODY, answer))
    records = Records(max_answers=2 * size + 1)
    for number in range(5):
        await records.complete(await claimed(records, bytes([number])), answer, float(number))
        await records.complete(await claimed(records, bytes([number, 0])), None, float(number))
    for number in range(3):
        error = await refused(records, bytes([number]), now=LIFETIME - 1)
        assert ("outcome-unknown", "yes", "201" in error.message) == (error.slug, error.sent, True)
    assert answer == await records.claim(b"\3", BODY, LIFETIME - 1)
    for number in range(5):  # the bytes of expired ones are free again
        await records.complete(await claimed(records, bytes([9, number]), now=2 * LIFETIME), answer, 2 * LIFETIME)
    assert answer == await records.claim(b"\t\3", BODY, 2 * LIFETIME)
    assert "outcome-unknown" == (await refused(records, b"\t\2", now=2 * LIFETIME)).slug


@pytest.mark.slow
async def test_the_bounds_hold_in_memory() -> None:
    """A tenth of the keys and answers that are kept stays below 16 MiB."""
    tracemalloc.start()
    try:
        records = Records(MAX_RECORDS // 10, MAX_ANSWERS // 10)
        answer = Answer(response_head(201, b"Created", []), bytes(MAX_ANSWERS // MAX_RECORDS))
        for number in range(MAX_RECORDS // 10):
            digest = hashlib.sha256(b"%d" % number).digest()
            claim = await records.claim(bytes(8) + digest, digest, 0.0)
            assert isinstance(claim, Claim)
            await records.complete(claim, answer, 0.0)
        assert MAX_RECORDS // 10 == len(records)
        assert tracemalloc.get_traced_memory()[0] < 16 << 20
    finally:
        tracemalloc.stop()


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
_STATUSES = st.integers(200, 299).filter(lambda status: status != 204)  # which has no body
_ANSWERS = st.none() | st.builds(Answer, st.builds(response_head, _STATUSES, _TEXT, _FIELDS), _BODIES)


@given(st.binary(min_size=32, max_size=32), _ANSWERS)
def test_a_record_beyond_this_process(digest: bytes, answer: Answer | None) -> None:
    """An answer is read as it was written: odd bytes, a body that was not kept or is empty, an unknown outcome."""
    record = encoded(digest, answer)
    if answer is not None and answer.body is not None:
        assert answer == judged(digest, record)
    else:
        with pytest.raises(ProxyError) as caught:
            judged(digest, record)
        assert ("outcome-unknown", ["unknown", "yes"][answer is not None]) == (caught.value.slug, caught.value.sent)
    with pytest.raises(ProxyError) as caught:
        judged(hashlib.sha256(digest).digest(), record)
    assert "idempotency-key-reused" == caught.value.slug


async def test_what_a_store_beyond_this_process_is_told() -> None:
    """Of a record that runs, one that has ended, and one that is free or was never there."""
    records = Records()
    for name in (b"runs", b"ended", b"freed"):
        claim = await records.claim(name, BODY, 0.0)
        assert isinstance(claim, Claim)
        if name == b"ended":
            await records.complete(claim, ANSWER, 100.0)
        elif name == b"freed":
            await records.complete(claim, None, 0.0, executed=False)
    assert [b"ended", b"runs"] == list(records.known())
    assert ("keep", BODY + b"Ra", LIFETIME) == records.told(b"runs", "a", 200.0)
    assert ("keep", encoded(BODY, ANSWER), LIFETIME - 100.0) == records.told(b"ended", "a", 200.0)
    assert ("keep", encoded(BODY, ANSWER), 1.0) == records.told(b"ended", "a", LIFETIME + 99.5)
    assert [("free", b"", LIFETIME)] * 2 == [records.told(name, "a", 200.0) for name in (b"freed", b"never")]


@pytest.mark.parametrize(("age", "slug"), [(ABANDONED - 1, "in-progress"), (ABANDONED, "outcome-unknown")])
def test_judged_elsewhere(age: float, slug: str) -> None:
    """An answer is passed on; a request that another replica began long ago has an unknown outcome."""
    assert ANSWER == judged(BODY, encoded(BODY, ANSWER), age)
    for digest, expected in ((BODY, slug), (bytes(32), "idempotency-key-reused")):
        with pytest.raises(ProxyError) as caught:
            judged(digest, BODY + b"Rreplica-1", age)
        assert expected == caught.value.slug


@pytest.mark.parametrize(
    "text",
    [
        *(b"Created", b'{"status": 201}', b"\r\n\r\n", b"\xff", b"r", b"HTTP/1.1 2", b"HTTP/1.1 99", b"HTTP/2 200 OK"),
        *(b"HTTP/1.1 %b\r\n\r\n{}" % status for status in (b"1e9", b"103", b"401", b"302 Found", b"200 \n", b"999999")),
        *(
            b"HTTP/1.1 201 Created\r\n%b\r\n\r\n{}" % line
            for line in (b"Evil : 1", b"Evil", b"E: \0", b"E: \n1", b" : 1")
        ),
        b"HTTP/1.1 201 Created\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 201 Created\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 201 Created\r\n\r\n" + bytes(MAX_ANSWER),
        b"HTTP/1.1 201 " + b"x" * MAX_ANSWER + b"\r\n\r\n",
        b"HTTP/1.1 201 Created\r\n" + b"X: y\r\n" * 300 + b"\r\n",
    ],
)
def test_a_record_that_nobody_of_us_wrote(text: bytes) -> None:
    """What Metquay can't have answered is no answer; it may have been executed, so that it is not done again."""
    for record in (BODY + text, bytes(32) + text, text[:31]):
        with pytest.raises(ProxyError) as caught:
            judged(BODY, record)
        assert ("outcome-unknown", "unknown") == (caught.value.slug, caught.value.sent)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["claim", "complete", "lose", "free", "wait"]),
            st.sampled_from([record_name(None, "/x", key) for key in "abc"]),
            st.sampled_from([BODY, bytes(32)]),
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
                await records.complete(held.pop(name), None, 0.0, executed=False)
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
