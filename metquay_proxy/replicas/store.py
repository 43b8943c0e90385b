"""The quota and the records of several replicas, in a Redis (or Valkey) that none of them depends on.

Owns the connection to Redis, and the driving of ``share``: calls, beats, probes. Must not decide what the quota or a
record allows. While Redis is unreachable, slow, read-only or empty, or answers what no script of ours does, the replica
goes on alone, and says so.

Facts: redis-py is an optional extra, so that this module is loaded only by who sets METQUAY_REDIS_URL; it closes a
connection whose command was cancelled, and retries by itself unless told not to. It would read the certificates anew
for each connection, 50 ms in which nobody is served, and its own version from its installed files, to tell Redis
(``driver_info``). Redis names a script by its SHA-1, and forgets it when it restarts (NOSCRIPT).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import redis.asyncio
import structlog

from metquay_proxy.exchange.line import Line
from metquay_proxy.replicas.share import LATE, Reply, Share
from metquay_proxy.rules.idempotency import LIFETIME, Answer, Claim, Records, full, greed, judged
from metquay_proxy.rules.quota import Rate

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from metquay_proxy.exchange.line import CallLater
    from metquay_proxy.redis_address import RedisAddress

SLOW: Final = 0.05
"""Seconds after which Redis counts as away."""
_PATIENCE: Final = 1.0
"""Seconds that a connection takes, and a claim waits for Redis: that a request is executed twice is worse."""
_GIVEN_UP: Final = 5.0
"""Seconds alone after which claims don't wait for Redis any more."""
_GATHERING: Final = 10.0
"""Seconds that a claim waits at most until all replicas have told a new window what they know."""
_QUOTA, _RECORD = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("quota.lua", "record.lua"))
_SHA1: Final = {script: hashlib.sha1(script.encode()).hexdigest() for script in (_QUOTA, _RECORD)}  # noqa: S324 - Redis's name for it
_WHY: Final = {
    "TimeoutError": "it takes longer than 50 ms to answer",
    "AuthenticationError": "it refuses the user or the password",
    "NoPermissionError": "its user may not run scripts on our keys",
    "ReadOnlyError": "it takes no writes (a replica, or it is failing over)",
    "BusyLoadingError": "it is loading its data",
    "OutOfMemoryError": "its memory is full",
    "ResponseError": "it refuses the call",
    "SSLCertVerificationError": "its certificate is not trusted here, or is for another name",
}
"""Class of an error to what is told of it: an error's own text may quote what was sent."""

T = TypeVar("T")

log: structlog.stdlib.BoundLogger = structlog.get_logger("metquay_proxy")


class Away(Exception):
    """Redis did not do what it was asked in time; the text says why, and is no secret."""


def namespace(host: str, access_key: str) -> str:
    """Return what the names of this key pair's keys in Redis begin with; in braces what a cluster keeps together."""
    digest = hashlib.sha256(f"{host}\0{access_key}".encode()).hexdigest()[:32]
    return f"metquay:{{{digest}}}:"


class _Password(redis.credentials.CredentialProvider):
    """The user and the password, which is asked for at each connection."""

    def __init__(self, user: str | None, password: Callable[[], str | None]) -> None:
        self._user = user
        self._password = password

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        word = self._password() or ""
        return (self._user, word) if self._user else (word,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


class _Secure(redis.asyncio.SSLConnection):
    """A connection by TLS with a context that is made already."""

    def __init__(self, tls: ssl.SSLContext, **options: Any) -> None:  # noqa: ANN401 - redis-py's own
        super().__init__(**options)
        self.ssl_context.context = tls


class Store:
    """The connection to Redis."""

    def __init__(
        self, address: RedisAddress, password: Callable[[], str | None], tls: ssl.SSLContext | None = None
    ) -> None:
        """``password`` is asked at each connection, so that one that was changed needs no restart."""
        place: dict[str, Any] = {"host": address.host, "port": address.port}
        kind, where = {
            "redis": (redis.asyncio.Connection, place),
            "rediss": (_Secure, place | {"tls": tls}),
            "unix": (redis.asyncio.UnixDomainSocketConnection, {"path": address.path}),
        }[address.scheme]
        pool = redis.asyncio.ConnectionPool(
            kind,
            **where,
            db=address.database,
            credential_provider=None if password() is None else _Password(address.user, password),
            protocol=2,
            driver_info=None,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0),
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self.connect = partial(self._within, _PATIENCE, self._redis.ping)
        self.ping = partial(self._within, SLOW, self._redis.eval, "return 1", 0)
        self.close = self._redis.aclose

    async def run(
        self, script: str, keys: Sequence[str], values: Sequence[Any], read: Callable[[Any], T], within: float = SLOW
    ) -> T:
        """Run a script, and ``read`` its answer; raise ``Away`` unless that comes ``within`` so many seconds."""
        said = await self._within(within, self._run, script, keys, values)
        try:
            return read(said)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise Away("it answers what no script of ours does") from error

    async def _run(self, script: str, keys: Sequence[str], values: Sequence[Any]) -> Any:  # noqa: ANN401 - as above
        try:
            return await self._redis.evalsha(_SHA1[script], len(keys), *keys, *values)
        except redis.exceptions.NoScriptError:
            return await self._redis.eval(script, len(keys), *keys, *values)

    async def _within(self, seconds: float, work: Any, *arguments: Any) -> Any:  # noqa: ANN401 - as above
        try:
            async with asyncio.timeout(seconds):
                return await work(*arguments)
        except (redis.RedisError, OSError, TimeoutError, ValueError) as error:
            cause = error.__cause__ or error.__context__ or error
            why = _WHY.get(type(error).__name__) or _WHY.get(type(cause).__name__) or "it cannot be reached"
            raise Away(why) from error


class SharedRecords(Records):
    """The records of all replicas; those of this one's own requests are kept here too, for when Redis is away."""

    def __init__(self, share: Share, store: Store, prefix: str, clock: Callable[[], float], *bounds: int) -> None:
        """``prefix`` begins the names of the keys; ``bounds`` are those of ``Records``, for all replicas together."""
        super().__init__(*bounds)
        self._share = share
        self._store = store
        self._keys = [prefix + name for name in ("records:text", "records:ends", "records:answers", "state")]
        self._clock = clock
        self._generation = ""
        self._asking: set[bytes] = set()
        self._untold: dict[bytes, None] = {}
        self._heard = asyncio.Event()

    async def claim(self, record: bytes, digest: bytes, now: float) -> Claim | Answer:
        """Return the right to execute, or the recorded answer, whichever replica recorded it."""
        claim = await super().claim(record, digest, now)
        if isinstance(claim, Answer):
            return claim
        self._asking.add(record)
        found: Claim | Answer | None = None
        try:
            found = await self._claimed(claim)
        finally:
            self._asking.discard(record)
            if found is not claim:
                await self.complete(claim, None, now, executed=False)
        return found

    async def complete(self, claim: Claim, answer: Answer | None, now: float, *, executed: bool = True) -> None:
        """Record what came of a request, and tell the others."""
        await super().complete(claim, answer, now, executed=executed)
        await self._tell(claim.record)

    def heard(self) -> None:
        """Take note of a call that was carried out."""
        if self._generation != self._share.generation:
            self._generation = self._share.generation
            self._untold = dict.fromkeys(self.known()) | self._untold
        self._heard.set()

    async def catch_up(self) -> None:
        """Tell, for ever, what could not be told, or what Redis lost; what fails is left to the next call."""
        while await self._heard.wait():
            self._heard.clear()
            while self._untold and await self._tell(next(reversed(self._untold))):  # the newest are asked for first
                pass

    async def _claimed(self, claim: Claim) -> Claim | Answer:
        """Return what the other replicas, or their silence, make of a claim."""
        began = self._clock()
        _, value, _ = self.told(claim.record, self._share.name, began)
        while self._share.alone_for(self._clock()) < _GIVEN_UP and self._clock() < began + _GATHERING:
            try:
                kind, seconds, known = await self._ask(claim.record, "claim", value, LIFETIME, _PATIENCE)
            except Away:
                if self._clock() >= began + _PATIENCE:
                    break
                kind, seconds, known = b"wait", SLOW, b""
            if kind == b"done":
                return claim
            if kind == b"full":
                raise full(self._max_records, seconds)
            if kind == b"known":
                return judged(claim.digest, known, seconds)
            await asyncio.sleep(min(seconds, _PATIENCE))
        self._untold[claim.record] = None
        return claim

    async def _tell(self, record: bytes) -> bool:
        """Tell the others what is known of a record; return whether that was done."""
        self._untold.pop(record, None)  # now, since there may be more to tell before this has come through
        told = record in self._asking  # it is not this replica's before that is decided
        if not told and not self._share.local:
            with contextlib.suppress(Away):
                kind, _, _ = await self._ask(record, *self.told(record, self._share.name, self._clock()))
                told = kind != b"wait"
        if not told and (record in self._ended or len(self._untold) < self._max_records):
            self._untold[record] = None
        return told

    async def _ask(
        self, record: bytes, what: str, value: bytes, lifetime: float, within: float = SLOW
    ) -> tuple[bytes, float, bytes]:
        share = self._share
        before = share.before(self._clock(), max(within, LATE)) or 0
        bounds = (self._max_records, greed(record, self._max_records), self._max_answers)
        values = (what, share.name, share.generation, before, value, lifetime, *bounds, record)
        asking = asyncio.ensure_future(self._store.run(_RECORD, self._keys, values, _outcome, within))
        try:
            return await asyncio.shield(asking)
        finally:
            # who was cancelled says next that the key is free, which must not overtake this
            await asyncio.gather(asking, return_exceptions=True)


def _outcome(said: list[bytes]) -> tuple[bytes, float, bytes]:
    kind, seconds, known = said
    if kind not in {b"done", b"wait", b"full", b"known"} or not 0 <= float(seconds) <= LIFETIME:
        raise ValueError(kind)
    return kind, float(seconds), b"" + known


class Replica:
    """One of several proxies with one key pair: ``line`` and ``records`` take the place of those in memory."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        rate: Rate | None,
        clock: Callable[[], float],
        call_later: CallLater = None,
    ) -> None:
        """``prefix`` begins the names of the keys; without a ``rate`` only the records are shared."""
        self._store = store
        self._clock = clock
        self._keys = [prefix + name for name in ("state", "seen", "flight", "back", "line")]
        self._changed = asyncio.Event()
        self._share = Share(rate or Rate(1, 1.0), secrets.token_hex(8), random.random, self._changed.set)
        self._line = Line(self._share, clock, call_later)
        self.line = None if rate is None else self._line
        self.records = SharedRecords(self._share, store, prefix, clock)
        self._tasks: list[asyncio.Task[None]] = []
        self._failures = 0
        self._trouble: str | None = None

    async def start(self) -> None:
        """Join the others as soon as Redis is there, and keep in touch; nothing is waited for."""
        self._tasks = [asyncio.create_task(work) for work in (self._run(), self.records.catch_up())]

    async def stop(self) -> None:
        """Leave the others."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._share.local:
            with contextlib.suppress(Away):
                await self._report(leaving=True)
        await self._store.close()

    def status(self) -> dict[str, Any]:
        """Return how things stand between the replicas, for people and metrics."""
        share = self._share
        return {
            "shared": not share.local,
            "replicas": share.heard.replicas,
            "share": self._line.snapshot().limit if share.local and self.line is not None else None,
            "alone_for": round(share.alone_for(self._clock()), 1),
            "failures": self._failures,
            "trouble": self._trouble if share.local else None,
        }

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            wait = self._share.next_call(self._clock()) - self._clock()
            if wait <= 0:
                await self._call()
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)

    async def _call(self) -> None:
        share, local, away = self._share, self._share.local, self._share.alone_for(self._clock())
        try:
            if local:
                await self._store.connect()
            call, reply = await self._report()
            if share.replied(self._clock(), call, reply):
                self.records.heard()
                if local:
                    log.info("sharing through Redis", replicas=share.heard.replicas, after_s=round(away, 1))
            elif share.refusals > 1:
                raise Away("it carries out no call: its clock is being set, or it is too slow")
        except Away as error:
            self._missed(str(error))
        except Exception:
            log.exception("the shared quota failed")
            self._missed("an error of this program, which its log tells")
        self._line.poll()

    async def _report(self, *, leaving: bool = False) -> tuple[dict[str, Any], Reply]:
        call = self._share.report(self._clock(), secrets.token_hex(8), leaving=leaving)
        return call, await self._store.run(_QUOTA, self._keys, [json.dumps(call)], Reply.model_validate_json)

    def _missed(self, why: str) -> None:
        self._failures += 1
        self._trouble = why
        if self._share.missed(self._clock()):
            limit, replicas = self._line.snapshot().limit, self._share.heard.replicas or "unknown"
            told = {"reason": why, "requests_in_a_window": limit, "replicas": replicas}
            log.warning("working without Redis, with this proxy's own share", **told)
