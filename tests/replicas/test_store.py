"""What replicas share, in a real Redis: several of them in this process."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import ssl
import time
from typing import TYPE_CHECKING, Any, cast

import pytest
import trustme
from structlog.testing import capture_logs

from metquay_proxy.redis_address import RedisAddress
from metquay_proxy.replicas.store import Away, Replica, SharedRecords, Store, namespace
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.idempotency import Answer, Claim, Records, record_name
from metquay_proxy.rules.quota import Rate
from tests.heads import response_head
from tests.redis_server import needs_redis, redis_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from metquay_proxy.exchange.line import Line
    from tests.redis_server import RedisServer

PREFIX = namespace("lab.metquay.co", "the access key")
RATE = Rate(20, 0.5)
NAME = record_name(None, "/api/v1/customers", "key-1")
BODY = hashlib.sha256(b"{}").digest()
ANSWER = Answer(response_head(201, b"Created", [(b"Content-Type", b"application/json")]), b'{"metquayId": 1}')
EARLIER = (
    "for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('ZINCRBY', KEYS[1], -ARGV[1], name) end"
)
"""Makes all records older, by seconds."""
SPOIL = "for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do redis.call('HSET', KEYS[1], name, ARGV[1]) end"
"""Puts something else in their place."""

pytestmark = needs_redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Yield a Redis of the test's own."""
    with redis_server(tmp_path / "redis") as server:
        yield server


@contextlib.asynccontextmanager
async def store(
    address: RedisAddress, password: str | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Store]:
    """Yield a connection to Redis, which is closed in the end."""
    found = Store(address, lambda: password, tls)
    try:
        yield found
    finally:
        await found.close()


@contextlib.asynccontextmanager
async def replica(redis: RedisServer, rate: Rate | None = RATE) -> AsyncIterator[Replica]:
    """Yield one replica that has joined the others, and leaves them in the end."""
    found = Replica(Store(RedisAddress("unix", path=str(redis.path)), lambda: None), PREFIX, rate, time.monotonic)
    await found.start()
    await until(lambda: found.status()["shared"] or found.status()["trouble"])
    try:
        yield found
    finally:
        await found.stop()


@contextlib.asynccontextmanager
async def replicas(redis: RedisServer) -> AsyncIterator[tuple[Replica, Replica]]:
    """Yield two that know of each other, in a window that has been there for a while."""
    async with replica(redis) as one:
        grow_old(redis)
        async with replica(redis) as two:
            await until(lambda: one.status()["replicas"] == two.status()["replicas"] == 2)
            yield one, two


async def until(true: object, seconds: float = 6.0) -> None:
    """Wait until ``true()``; fail after ``seconds``."""
    assert callable(true)
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


class Relay:
    """The way to a Redis, on which each answer takes ``seconds`` more, and what holds ``slow`` comes ``held`` late."""

    seconds = held = 0.0
    slow = b""

    def __init__(self, redis: RedisServer) -> None:
        self._redis = redis
        self.address = RedisAddress("redis", "127.0.0.1", 0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect one client."""
        back, forth = await asyncio.open_connection("127.0.0.1", self._redis.port)
        try:
            with contextlib.suppress(ConnectionError):
                await asyncio.gather(self._pass(reader, forth, there=True), self._pass(back, writer, there=False))
        finally:
            forth.close()
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, there: bool) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(self.seconds if not there else self.held if self.slow in data else 0.0)
            writer.write(data)
        writer.close()


@contextlib.asynccontextmanager
async def relay(redis: RedisServer) -> AsyncIterator[Relay]:
    """Yield a way to the Redis."""
    found = Relay(redis)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.address = found.address._replace(port=server.sockets[0].getsockname()[1])
    async with server:
        yield found


def grow_old(redis: RedisServer) -> None:
    """Let the window be one that need not wait for what replicas tell it."""
    redis.run("HINCRBYFLOAT", f"{PREFIX}state", "born", "-10")


def local(redis: RedisServer) -> RedisAddress:
    """Where it is, in clear text."""
    return RedisAddress("redis", "127.0.0.1", redis.port)


async def send(line: Line, caller: str = "tool", max_wait: float = 10.0) -> float:
    """Have one request's turn and its answer; return when that came."""
    ticket = line.ask(time.monotonic(), caller, max_wait)
    if ticket.state == "waiting":
        await line.wait(ticket)
    ticket.send()
    now = time.monotonic()
    line.settle(ticket, now)
    return now


async def claimed(one: Replica) -> Claim:
    """Claim a key that must be free."""
    found = await one.records.claim(NAME, BODY, time.monotonic())
    assert isinstance(found, Claim)
    return found


async def answered(one: Replica) -> Claim | Answer:
    """Ask for the key again."""
    return await one.records.claim(NAME, BODY, time.monotonic())


def test_the_names_of_keys_tell_no_key() -> None:
    """They hold a digest of host and access key, in the braces that keep a cluster's keys together."""
    assert "the access key" not in PREFIX
    assert "lab" not in PREFIX
    assert PREFIX.startswith("metquay:{")
    assert PREFIX.endswith("}:")
    assert 4 == len({namespace(host, key) for host in ("a", "ab") for key in ("bc", "c")})


class TestStore:
    """How Redis is reached, and what is told where it is not."""

    @pytest.mark.parametrize("user", [None, "lab"])
    async def test_a_new_password_needs_no_restart(self, redis: RedisServer, user: str | None) -> None:
        """It is asked for at each connection; while it is the wrong one, the text says so and does not show it."""
        words = iter([*["first word"] * 3, "second word"])  # the first is asked for by Store itself
        redis.run("ACL", "SETUSER", "admin", "on", "nopass", "~*", "+@all")
        admin = ("--user", "admin", "--pass", "", "--no-auth-warning")
        rights = ("on", "resetkeys", "~metquay:*", "-@all", "+eval", "+evalsha", "+ping", "+select")
        redis.run(*admin, "ACL", "SETUSER", user or "default", "resetpass", ">first word", *rights)
        found = Store(local(redis)._replace(user=user), lambda: next(words))
        await found.connect()
        await found.ping()
        redis.run(*admin, "ACL", "SETUSER", user or "default", "resetpass", ">second word")
        redis.run(*admin, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(Away):
            await found.connect()
        with pytest.raises(Away, match="it refuses the user or the password"):
            await found.connect()
        await found.connect()
        await found.ping()
        await found.close()

    async def test_tls(self, tmp_path: Path) -> None:
        """A certificate is needed that is trusted here, and is for the name by which Redis was called."""
        authority = trustme.CA()
        leaf = authority.issue_cert("localhost")
        leaf.private_key_pem.write_to_path(tmp_path / "key.pem")
        leaf.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        files = ("--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-key-file", str(tmp_path / "key.pem"))
        with redis_server(tmp_path / "redis", *files, "--tls-auth-clients", "no", tls=True) as redis:
            trusting, other = ssl.create_default_context(), ssl.create_default_context()
            authority.configure_trust(trusting)
            there = RedisAddress("rediss", "localhost", redis.tls_port)
            async with store(there, tls=trusting) as found:
                await found.connect()
                await found.ping()
            for address, context, why in (
                (there, other, "its certificate is not trusted here"),
                (there._replace(host="127.0.0.1"), trusting, "its certificate is not trusted here"),
            ):
                async with store(address, tls=context) as found:
                    with pytest.raises(Away, match=why):
                        await found.connect()

    @pytest.mark.parametrize(
        ("commands", "why"),
        [
            ([("ACL", "SETUSER", "default", "-eval", "-evalsha")], "its user may not run scripts on our keys"),
            ([("ACL", "SETUSER", "default", "resetkeys", "~other:*")], "its user may not run scripts on our keys"),
            ([("REPLICAOF", "127.0.0.1", "1")], "it takes no writes"),
            ([("CONFIG", "SET", "maxmemory", "1")], "its memory is full"),
            ([("SET", f"{PREFIX}state", "no hash")], "it refuses the call"),
        ],
    )
    async def test_what_redis_does_not_do_is_told_for_people(
        self, redis: RedisServer, commands: list[tuple[str, ...]], why: str
    ) -> None:
        """In our own words, since an error's own text may quote what was sent."""
        async with replica(redis) as one:
            for command in commands:
                redis.run(*command)
            await until(lambda: one.status()["trouble"])
            assert why in one.status()["trouble"]
            assert not one.status()["shared"]

    async def test_frozen_or_away(self, redis: RedisServer) -> None:
        """More than 50 ms is too late; where nobody listens it cannot be reached."""
        async with store(local(redis)) as found:
            await found.connect()
            redis.freeze()
            with pytest.raises(Away, match="longer than 50 ms"):
                await found.ping()
            redis.kill()
            with pytest.raises(Away, match="cannot be reached"):
                await found.connect()


class TestLine:
    """The quota of two replicas."""

    async def test_who_leaves_leaves_its_part(self, redis: RedisServer) -> None:
        """The others know at their next call that one less shares, and Redis keeps nothing of it for long."""
        async with replica(redis) as one:
            grow_old(redis)
            async with replica(redis):
                await until(lambda: one.status()["replicas"] == 2)
            await until(lambda: one.status()["replicas"] == 1)
        names = redis.run("--raw", "KEYS", "*").split()
        assert names
        assert f"{PREFIX}seen" not in names
        assert all(0 < int(redis.run("TTL", name)) <= 61 for name in names)

    @pytest.mark.slow
    async def test_alone_and_back(self, redis: RedisServer) -> None:
        """While Redis is away it says so once, serves its part of the quota, and says when it shares again."""
        with capture_logs() as logs:
            async with replicas(redis) as (one, two):
                redis.kill()
                await until(lambda: not one.status()["shared"] and not two.status()["shared"])
                told = one.status()
                assert (2, RATE.limit // 2) == (told["replicas"], told["share"])
                assert "it cannot be reached" == told["trouble"]
                assert one.line is not None
                await asyncio.gather(*(send(one.line) for _ in range(RATE.limit)))
                redis.start()
                await until(lambda: one.status()["shared"] and two.status()["shared"])
                assert one.status()["trouble"] is None
                assert one.status()["failures"] >= 2
        events = [entry["event"] for entry in logs if entry["log_level"] != "debug"]
        assert 2 == events.count("working without Redis, with this proxy's own share")
        assert 4 == events.count("sharing through Redis"), "each at its start, and again"

    async def test_a_redis_that_is_slow_is_away(self, redis: RedisServer) -> None:
        """What takes longer than 50 ms to answer is not waited for; once it is quick again, all share."""
        async with relay(redis) as way:
            shared = Replica(Store(way.address, lambda: None), PREFIX, RATE, time.monotonic)
            await shared.start()
            await until(lambda: shared.status()["shared"])
            way.seconds = 0.1
            await until(lambda: not shared.status()["shared"])
            assert "it takes longer than 50 ms to answer" == shared.status()["trouble"]
            assert shared.line is not None
            await send(shared.line)
            way.seconds = 0.0
            await until(lambda: shared.status()["shared"])
            await shared.stop()

    async def test_no_redis_at_the_start(self, redis: RedisServer) -> None:
        """It starts all the same, with the part of one among ten, says so, and joins when Redis comes."""
        redis.kill()
        with capture_logs() as logs:
            async with replica(redis) as one:
                assert RATE.limit // 10 == one.status()["share"]
                assert "unknown" == logs[0]["replicas"]
                assert one.line is not None
                await send(one.line)
                redis.start()
                await until(lambda: one.status()["shared"])

    @pytest.mark.parametrize(
        ("said", "why"),
        [
            (b'{"done": false, "generation": "another", "now": "0"}', "it carries out no call"),
            *(
                pytest.param(said, "it answers what no script of ours does", marks=pytest.mark.slow)
                for said in (b'{"done": true, "generation": "x", "now": "0", "closed": 1e12}', b"garbage", 7)
            ),
        ],
    )
    async def test_a_redis_that_answers_and_does_nothing(self, redis: RedisServer, said: object, why: str) -> None:
        """It is as though it were away: the replica goes on alone, asks again now and then, and ends when told to."""

        class Odd(Store):
            calls = 0

            async def _run(self, *_: object) -> object:
                self.calls += 1
                return said

        found = Odd(local(redis), lambda: None)
        one = Replica(found, PREFIX, RATE, time.monotonic)
        await one.start()
        await until(lambda: one.status()["trouble"])
        await asyncio.sleep(0.5)
        assert found.calls < 20
        assert why in one.status()["trouble"]
        assert not one.status()["shared"]
        assert one.line is not None
        await send(one.line)
        assert isinstance(await answered(one), Claim)
        await one.stop()

    async def test_a_mistake_of_ours_is_no_end(self, redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer that makes no sense is logged, counts as missed, and the replica goes on."""
        with capture_logs() as logs:
            async with replica(redis) as one:
                with monkeypatch.context() as patched:
                    patched.setattr(one._share, "replied", lambda *_: 1 / 0)
                    await until(lambda: not one.status()["shared"])
                await until(lambda: one.status()["shared"])
        assert "the shared quota failed" in [entry["event"] for entry in logs]

    async def test_without_a_limit_only_records_are_shared(self, redis: RedisServer) -> None:
        """Nothing waits in a line, and no share is told."""
        async with replica(redis, None) as one:
            assert one.line is None
            assert one.status()["shared"]
            assert one.status()["share"] is None


class TestRecords:
    """The Idempotency-Keys of two replicas."""

    async def test_the_other_gets_the_answer(self, redis: RedisServer) -> None:
        """While one executes, the other is told so; then it gets the same answer, and another body is refused."""
        async with replicas(redis) as (one, two):
            claim = await claimed(one)
            with pytest.raises(ProxyError) as caught:
                await answered(two)
            assert "in-progress" == caught.value.slug
            await one.records.complete(claim, ANSWER, time.monotonic())
            assert ANSWER == await answered(two) == await answered(one)
            with pytest.raises(ProxyError) as caught:
                await two.records.claim(NAME, b"another body".ljust(32), time.monotonic())
            assert "idempotency-key-reused" == caught.value.slug

    async def test_an_unknown_outcome_is_unknown_to_all(self, redis: RedisServer) -> None:
        """What broke off at one replica must not be executed by another."""
        async with replicas(redis) as (one, two):
            await one.records.complete(await claimed(one), None, time.monotonic())
            with pytest.raises(ProxyError) as caught:
                await answered(two)
            assert "outcome-unknown" == caught.value.slug

    async def test_what_was_not_executed_frees_the_key_for_all(self, redis: RedisServer) -> None:
        """A refusal that proves it lets the other try."""
        async with replicas(redis) as (one, two):
            await one.records.complete(await claimed(one), None, 0.0, executed=False)
            await claimed(two)

    async def test_the_claim_of_a_replica_that_died(self, redis: RedisServer) -> None:
        """It stays: at first it seems to be under way, and after ten minutes nobody knows its outcome."""
        async with replicas(redis) as (one, two):
            await claimed(one)
            redis.run("EVAL", EARLIER, "1", f"{PREFIX}records:ends", "601")
            with pytest.raises(ProxyError) as caught:
                await answered(two)
            assert "outcome-unknown" == caught.value.slug

    async def test_full(self, redis: RedisServer) -> None:
        """The bound holds for all together, and Retry-After is that of the record that goes first."""
        async with replicas(redis) as (one, two):
            two.records._max_records = 1
            await one.records.complete(await claimed(one), ANSWER, time.monotonic())
            with pytest.raises(ProxyError) as caught:
                await two.records.claim(record_name(None, "/x", "key-2"), BODY, time.monotonic())
            assert "idempotency-full" == caught.value.slug
            assert caught.value.retry_after is not None
            assert 86390 < caught.value.retry_after <= 86400
            assert 0 == len(two.records)

    @pytest.mark.slow
    async def test_flushed(self, redis: RedisServer) -> None:
        """What Redis forgot is told again by whoever knows it, and until then nobody executes it anew."""
        async with replicas(redis) as (one, two):
            await one.records.complete(await claimed(one), ANSWER, time.monotonic())
            redis.run("FLUSHALL")
            assert ANSWER == await answered(two)

    @pytest.mark.slow
    async def test_what_happened_while_redis_was_away_is_told_later(self, redis: RedisServer) -> None:
        """An answer recorded alone is the other's, too, once both share again."""
        async with replicas(redis) as (one, two):
            redis.kill()
            await until(lambda: not one.status()["shared"] and not two.status()["shared"])
            await one.records.complete(await claimed(one), ANSWER, time.monotonic())
            redis.start()
            await until(lambda: one.status()["shared"] and two.status()["shared"])
            assert ANSWER == await answered(two)

    @pytest.mark.slow
    async def test_redis_dies_between_claim_and_answer(self, redis: RedisServer) -> None:
        """The request is neither refused nor lost, and its answer is told when Redis is back."""
        async with replicas(redis) as (one, two):
            claim = await claimed(one)
            redis.kill()
            await one.records.complete(claim, ANSWER, time.monotonic())
            assert ANSWER == await answered(one)
            redis.start()
            await until(lambda: one.status()["shared"] and two.status()["shared"])
            assert ANSWER == await answered(two)

    async def test_an_older_word_that_comes_through_late(
        self, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was to be told meanwhile, and could not be, is told after it."""
        async with replicas(redis) as (one, two):
            claim = await claimed(one)
            run, through = one._store.run, asyncio.Event()

            async def late(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as the store takes them
                await through.wait()
                return await run(*arguments, **options)

            async def never(*_: object, **__: object) -> None:
                raise Away("it cannot be reached")

            one.records._untold[NAME] = None
            monkeypatch.setattr(one._store, "run", late)
            one.records.heard()
            await asyncio.sleep(0.01)
            monkeypatch.setattr(one._store, "run", never)
            await one.records.complete(claim, ANSWER, time.monotonic())
            monkeypatch.setattr(one._store, "run", run)
            through.set()
            await until(lambda: not one.records._untold)
            assert ANSWER == await answered(two)

    @pytest.mark.slow
    async def test_a_claim_that_redis_does_not_answer(self, redis: RedisServer) -> None:
        """A frozen Redis costs it a second, and then it is executed on the word of this replica alone."""
        async with replica(redis) as one:
            redis.freeze()
            await claimed(one)
            redis.thaw()
            with pytest.raises(ProxyError) as caught:
                await answered(one)
            assert "in-progress" == caught.value.slug

    async def test_who_gives_up_while_asking_leaves_no_claim(self, redis: RedisServer) -> None:
        """A client that left before Redis answered has not taken the key for good."""
        async with replicas(redis) as (one, two):
            asking = asyncio.create_task(answered(one))
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert asking.cancelled()
            await claimed(two)

    @pytest.mark.parametrize("held", [0.3, 1.3])
    @pytest.mark.slow
    async def test_a_claim_that_comes_late(self, redis: RedisServer, held: float) -> None:
        """Whether its client leaves meanwhile or it is given up: it does not come after the word that frees it."""
        async with replicas(redis) as (_, two), relay(redis) as way:
            one = Replica(Store(way.address, lambda: None), PREFIX, RATE, time.monotonic)
            await one.start()
            await until(lambda: one.status()["shared"])
            await two.records.complete(
                await claimed(two), None, 0.0, executed=False
            )  # Redis knows the script from now on
            way.slow, way.held = b"claim", held
            asking = asyncio.create_task(answered(one))
            await asyncio.sleep(0.1)
            if held < 1.0:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                assert asking.cancelled()
            else:
                claim = await asking
                assert isinstance(claim, Claim)
                await one.records.complete(claim, None, 0.0, executed=False)
            await asyncio.sleep(0.4)
            await claimed(two)
            await one.stop()

    async def test_as_in_memory(self, redis: RedisServer) -> None:
        """Who remembers nothing itself gets from Redis what the records in memory would say, within the same bounds."""

        async def outcome(records: Records, name: bytes, answer: Answer | str | None) -> object:
            try:
                claim = await records.claim(name, BODY, time.monotonic())
            except ProxyError as error:
                return error.slug, error.sent
            if isinstance(claim, Claim) and isinstance(answer, str):
                await records.complete(claim, None, 0.0, executed=False)
            elif isinstance(claim, Claim):
                await records.complete(claim, cast("Answer | None", answer), time.monotonic())
            return claim

        draw, bounds, seen = random.Random(7), (24, 5000), set()  # noqa: S311 - a test's
        async with replica(redis) as one:
            memory = Records(*bounds)
            for number in range(400):
                client = draw.choice([None, "a", "b"])
                name = record_name(client, "/x", str(draw.randrange(30 if client == "a" else 8)))
                answer = draw.choice([ANSWER, Answer(response_head(200, b"OK", []), bytes(900)), None, "free"])
                expected = await outcome(memory, name, answer)
                shared = SharedRecords(one._share, one._store, PREFIX, time.monotonic, *bounds)
                assert expected == await outcome(shared, name, answer), number
                seen.add(type(expected) if not isinstance(expected, tuple) else expected)
        unknown = [("outcome-unknown", sent) for sent in ("unknown", "yes")]
        assert {Claim, Answer, *unknown, ("idempotency-full", "no")} == seen

    async def test_what_is_forgotten_after_a_day(self, redis: RedisServer) -> None:
        """A key may be used again then, and its bytes, its place and that of its client key are free."""
        async with replica(redis) as one:
            await one.records.complete(await claimed(one), ANSWER, time.monotonic())
            shared = SharedRecords(one._share, one._store, PREFIX, time.monotonic)
            redis.run("EVAL", EARLIER, "1", f"{PREFIX}records:ends", "86400")
            claim = await shared.claim(NAME, BODY, time.monotonic())
            assert isinstance(claim, Claim)
            await shared.complete(claim, None, 0.0, executed=False)
            assert {"0"} == {*redis.run("--raw", "HVALS", f"{PREFIX}records:text").split()}, "nothing but the counts"

    @pytest.mark.parametrize("garbage", ["garbage" * 9, "{}", "R", "\r\n\r\n"])
    async def test_a_record_that_nobody_of_us_wrote(self, redis: RedisServer, garbage: str) -> None:
        """It is no answer, and whoever has its key is told that nobody knows."""
        async with replicas(redis) as (one, two):
            await one.records.complete(await claimed(one), ANSWER, time.monotonic())
            redis.run("EVAL", SPOIL, "1", f"{PREFIX}records:text", garbage)
            with pytest.raises(ProxyError) as caught:
                await answered(two)
            assert "outcome-unknown" == caught.value.slug

    @pytest.mark.parametrize(
        "said",
        [
            [b"done", b"nan", b""],
            *(
                pytest.param(said, marks=pytest.mark.slow)
                for said in (7, [b"done", b"0"], [[b"done"], b"0", b""], [b"full", b"1e12", b""], [b"known", b"0", 7])
            ),
        ],
    )
    async def test_what_no_script_of_ours_says(self, redis: RedisServer, said: object) -> None:
        """It is as though Redis were away: the key is claimed after a second, on the word of this replica alone."""

        class Odd(Store):
            async def _run(self, script: str, keys: Sequence[str], values: Sequence[Any]) -> Any:  # noqa: ANN401 - as there
                return said if values[0] == "claim" else await super()._run(script, keys, values)

        one = Replica(Odd(local(redis), lambda: None), PREFIX, RATE, time.monotonic)
        await one.start()
        await until(lambda: one.status()["shared"])
        claim = await claimed(one)
        await one.records.complete(claim, ANSWER, time.monotonic())
        assert ANSWER == await answered(one)
        await one.stop()
