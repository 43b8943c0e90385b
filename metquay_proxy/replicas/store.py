"""The quota and the records of several replicas, in a Redis (or Valkey) that none of them depends on.

Owns the connection to Redis, and the driving of ``share``: calls, beats, probes. Must not decide what the quota or a
record allows. While Redis is unreachable, slow, read-only or empty, the replica goes on alone, and says so.

Facts: redis-py is an optional extra, loaded only by who sets METQUAY_REDIS_URL; it closes a connection whose command
was cancelled, and retries by itself unless told not to. It would read the certificates anew for each connection, 50 ms
in which nobody is served, and its own version from its installed files, to tell Redis (``driver_info``). Redis names a
script by its SHA-1, and forgets it when it restarts (NOSCRIPT).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from metquay_proxy.exchange.line import Line
from metquay_proxy.replicas.share import Share
from metquay_proxy.rules.idempotency import (
    LIFETIME,
    MAX_RECORDS,
    Answer,
    Claim,
    Records,
    decoded,
    encoded,
    full,
    judged,
)
from metquay_proxy.rules.quota import Rate

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from metquay_proxy.settings import RedisAddress

SLOW: Final = 0.05
"""Seconds after which Redis counts as away."""
_CONNECTING: Final = 1.0
_ABANDONED: Final = 600.0
"""Seconds after which the request of another replica, of which nothing was heard, has an unknown outcome."""
_PATIENCE: Final = 1.0
"""Seconds that a claim waits for Redis: that a request is executed twice is worse than that."""
_GIVEN_UP: Final = 5.0
"""Seconds alone after which claims don't wait for Redis any more."""
_GATHERING: Final = 10.0
"""Seconds that a claim waits at most until all replicas have told a new window what they know."""
_QUOTA: Final = Path(__file__).with_name("quota.lua").read_text(encoding="utf-8")
_RECORD: Final = Path(__file__).with_name("record.lua").read_text(encoding="utf-8")
_KEYS: Final = ("state", "seen", "flight", "back", "line")
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

log: structlog.stdlib.BoundLogger = structlog.get_logger("metquay_proxy")


class Away(Exception):
    """Redis did not do what it was asked in time; the text says why, and is no secret."""


def namespace(host: str, access_key: str) -> str:
    """Return what the names of this key pair's keys in Redis begin with; in braces what a cluster keeps together."""
    digest = hashlib.sha256(f"{host}\0{access_key}".encode()).hexdigest()[:32]
    return f"metquay:{{{digest}}}:"


class Store:
    """The connection to Redis."""

    def __init__(
        self, address: RedisAddress, password: Callable[[], str | None], tls: ssl.SSLContext | None = None
    ) -> None:
        """``password`` is asked at each connection, so that one that was changed needs no restart."""
        from redis.asyncio import Connection, ConnectionPool, Redis, UnixDomainSocketConnection  # noqa: PLC0415 - an optional extra, slow to load
        from redis.asyncio.retry import Retry  # noqa: PLC0415 - as above
        from redis.backoff import NoBackoff  # noqa: PLC0415 - as above
        from redis.credentials import CredentialProvider  # noqa: PLC0415 - as above
        from redis.exceptions import NoScriptError, RedisError  # noqa: PLC0415 - as above

        class Secure(Connection):
            def _connection_arguments(self) -> dict[str, Any]:
                return {**super()._connection_arguments(), "ssl": tls}

        class Password(CredentialProvider):
            def get_credentials(self) -> tuple[str] | tuple[str, str]:
                word = password() or ""
                return (address.user, word) if address.user else (word,)

            async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
                return self.get_credentials()

        kind: type[Any] = Connection
        where: dict[str, Any] = {"host": address.host, "port": address.port}
        if address.path:
            kind, where = UnixDomainSocketConnection, {"path": address.path}
        elif address.scheme == "rediss":
            kind = Secure
        pool = ConnectionPool(
            kind,
            **where,
            db=address.database,
            credential_provider=Password() if password() is not None else None,
            protocol=2,
            driver_info=None,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis = Redis.from_pool(pool)
        self._errors = (RedisError, OSError, TimeoutError, ValueError)
        self._unknown_script = NoScriptError
        self._names = {script: hashlib.sha1(script.encode()).hexdigest() for script in (_QUOTA, _RECORD)}  # noqa: S324 - Redis's name for it

    async def run(self, script: str, keys: Sequence[str], *values: str | bytes | float, within: float = SLOW) -> Any:  # noqa: ANN401 - what the script returns
        """Run a script; raise ``Away`` unless it answers ``within`` so many seconds."""
        return await self._within(within, self._run, script, keys, values)

    async def connect(self) -> None:
        """Open a connection unless one is there, for which there is a second; raise ``Away``."""
        await self._within(_CONNECTING, self._redis.ping)

    async def ping(self) -> None:
        """Run a script that does nothing; raise ``Away`` unless that is allowed and takes less than 50 ms."""
        await self._within(SLOW, self._redis.eval, "return 1", 0)

    async def close(self) -> None:
        """End all connections."""
        await self._redis.aclose()

    async def _run(self, script: str, keys: Sequence[str], values: Sequence[str | bytes | float]) -> Any:  # noqa: ANN401 - as above
        try:
            return await self._redis.evalsha(self._names[script], len(keys), *keys, *values)
        except self._unknown_script:
            return await self._redis.eval(script, len(keys), *keys, *values)

    async def _within(self, seconds: float, work: Any, *arguments: Any) -> Any:  # noqa: ANN401 - as above
        try:
            async with asyncio.timeout(seconds):
                return await work(*arguments)
        except self._errors as error:
            cause = error.__cause__ or error.__context__ or error
            why = _WHY.get(type(error).__name__) or _WHY.get(type(cause).__name__) or "it cannot be reached"
            raise Away(why) from error


class SharedLine(Line):
    """Lets requests wait for their turn in a line that several replicas share."""

    def __init__(  # noqa: PLR0913 - its parts, and what a test replaces
        self,
        share: Share,
        store: Store,
        prefix: str,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None = None,
        on_heard: Callable[[], None] = lambda: None,
    ) -> None:
        """``prefix`` begins the names of the keys; ``on_heard`` is called after each call that was carried out."""
        super().__init__(share, clock, call_later)
        self._share = share
        self._store = store
        self._keys = [prefix + name for name in _KEYS]
        self._on_heard = on_heard
        self._kick = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._alone_since = clock()
        self.failures = 0
        self.trouble: str | None = None

    @property
    def alone_for(self) -> float:
        """For how many seconds this replica has been going on alone."""
        return self._clock() - self._alone_since if self._share.local else 0.0

    async def start(self) -> None:
        """Join the others, if Redis is there, and keep in touch."""
        while self._share.local and not self._share.misses:
            await self._call()
        if self._share.local:
            self._tell_alone()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Leave the others."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            if not self._share.local:
                with contextlib.suppress(Away):
                    call = self._share.report(self._clock(), "", leaving=True)
                    await self._store.run(_QUOTA, self._keys, json.dumps(call))

    def _poll(self) -> None:
        super()._poll()
        self._kick.set()

    async def _run(self) -> None:
        while True:
            self._kick.clear()
            wait = self._share.next_call(self._clock()) - self._clock()
            if wait > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._kick.wait()
                continue
            try:
                await self._call()
            except Exception:
                log.exception("the shared quota failed")
                self._share.missed(self._clock())

    async def _call(self) -> None:
        share = self._share
        local = share.local
        try:
            if local:
                await self._store.connect()
            call = share.report(self._clock(), secrets.token_hex(8))
            answer = json.loads(await self._store.run(_QUOTA, self._keys, json.dumps(call)))
        except Away as away:
            self.trouble = str(away)
            self.failures += 1
            if share.missed(self._clock()):
                self._alone_since = self._clock()
                self._tell_alone()
        else:
            if share.replied(self._clock(), call, answer):
                self._on_heard()
                if local:
                    away_s = round(self._clock() - self._alone_since, 1)
                    log.info("the quota is shared through Redis", replicas=share.replicas, after_s=away_s)
                    self.trouble = None
        super()._poll()

    def _tell_alone(self) -> None:
        share = self._share
        told = {"reason": self.trouble, "requests_in_a_window": share.share, "replicas": share.replicas or "unknown"}
        log.warning("going on without Redis, with a share of the quota", **told)


class SharedRecords(Records):
    """The records of all replicas; those of this one's own requests are kept here too, for when Redis is away."""

    def __init__(  # noqa: PLR0913 - its parts
        self,
        share: Share,
        store: Store,
        prefix: str,
        name: str,
        clock: Callable[[], float],
        alone_for: Callable[[], float],
        max_records: int = MAX_RECORDS,
    ) -> None:
        """``name`` is this replica's, ``prefix`` begins the keys' names, ``alone_for`` tells seconds without Redis."""
        super().__init__(max_records)
        self._share = share
        self._store = store
        self._prefix = prefix
        self._name = name
        self._clock = clock
        self._alone_for = alone_for
        self._generation = ""
        self._asking: set[bytes] = set()
        self._untold: dict[bytes, None] = {}

    async def claim(self, record: bytes, digest: bytes, now: float) -> Claim | Answer:
        """Return the right to execute, or the recorded answer, whichever replica recorded it."""
        claim = await super().claim(record, digest, now)
        if isinstance(claim, Answer):
            return claim
        self._asking.add(record)
        try:
            answer = await self._claimed_elsewhere(claim)
        except BaseException:
            self._asking.discard(record)
            await self.free(claim)
            raise
        self._asking.discard(record)
        if answer is None:
            return claim
        await super().free(claim)
        return answer

    async def complete(self, claim: Claim, answer: Answer | None, now: float) -> None:
        """Record a 2xx answer, or (None) that nobody knows whether the request was executed."""
        await super().complete(claim, answer, now)
        self._untold[claim.record] = None
        await self._told(claim.record)

    async def free(self, claim: Claim) -> None:
        """Forget a request that was certainly not executed: its key may be used again."""
        await super().free(claim)
        self._untold[claim.record] = None
        await self._told(claim.record)

    def heard(self) -> bool:
        """Take note of a call that was carried out; return whether there is something to tell."""
        if self._generation != self._share.generation:
            self._generation = self._share.generation
            self._untold |= dict.fromkeys((*self._running, *self._ended))
        return bool(self._untold)

    async def catch_up(self) -> None:
        """Tell what could not be told, or what Redis lost; what fails is left to the next call that is carried out."""
        while self._untold and not self._share.local and await self._told(next(iter(self._untold))):
            pass

    async def _claimed_elsewhere(self, claim: Claim) -> Answer | None:
        value = encoded(claim.digest, None, running=self._name)
        began = self._clock()
        while self._alone_for() < _GIVEN_UP and self._clock() < began + _GATHERING:
            try:
                said = await self._ask("claim", claim.record, value, LIFETIME, within=_PATIENCE)
            except Away:
                if self._clock() >= began + _PATIENCE:
                    break
                await asyncio.sleep(SLOW)
                continue
            kind, told = said[0], said[1:]
            if kind == b"done":
                return None
            if kind == b"full":
                raise full(self._max_records, float(told[0]))
            if kind == b"known":
                digest, running, answer = decoded(told[0])
                return judged(claim.digest, digest, answer, running=bool(running) and float(told[1]) < _ABANDONED)
            await asyncio.sleep(float(told[0]))
        self._untold[claim.record] = None
        return None

    async def _told(self, record: bytes) -> bool:
        """Tell the others what is known of a record; return whether that was done."""
        if self._share.local:
            return False
        if record in self._asking:  # it is not this replica's before that is decided
            self._untold.pop(record, None)
            return True
        running, ended = self._running.get(record), self._ended.get(record)
        what, value, left = "free", b"", LIFETIME
        if running is not None:
            what, value = "keep", encoded(running, None, running=self._name)
        elif ended is not None:
            what, value, left = "keep", encoded(ended.digest, ended.answer), ended.expires - self._clock()
        self._untold.pop(record, None)  # now, since there may be more to tell before this has come through
        try:
            await self._ask(what, record, value, max(1.0, left))
        except Away:
            self._untold[record] = None
            return False
        return True

    async def _ask(self, what: str, record: bytes, value: bytes, lifetime: float, within: float = SLOW) -> list[bytes]:
        name = record.hex()
        keys = (f"{self._prefix}record:{name}", f"{self._prefix}records", f"{self._prefix}state")
        values = (what, self._name, self._share.generation, value, int(lifetime * 1000), self._max_records, name)
        said: list[bytes] = await self._store.run(_RECORD, keys, *values, within=within)
        return said


class Shared:
    """What the replicas of one key pair share: ``line`` and ``records`` take the place of those in memory."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        rate: Rate | None,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None = None,
    ) -> None:
        """``prefix`` begins the names of the keys; without a ``rate`` only the records are shared."""
        name = secrets.token_hex(8)
        self._store = store
        self._share = Share(rate or Rate(1, 1.0), name, random.random)
        self._telling: asyncio.Task[None] | None = None
        self._line = SharedLine(self._share, store, prefix, clock, call_later, self._heard)
        self.line = None if rate is None else self._line
        self.records = SharedRecords(self._share, store, prefix, name, clock, lambda: self._line.alone_for)

    async def start(self) -> None:
        """Join the others; where Redis is away, go on alone."""
        await self._line.start()

    async def stop(self) -> None:
        """Leave the others."""
        await self._line.stop()
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
        await self._store.close()

    def status(self) -> dict[str, Any]:
        """Return how things stand between the replicas, for people and metrics."""
        share = self._share
        return {
            "shared": not share.local,
            "replicas": share.replicas,
            "share": share.share if share.local and self.line is not None else None,
            "alone_for": round(self._line.alone_for, 1),
            "failures": self._line.failures,
            "trouble": self._line.trouble if share.local else None,
        }

    def _heard(self) -> None:
        if self.records.heard() and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self.records.catch_up())
