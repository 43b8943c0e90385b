"""The composition root: everything that is built from the settings, its start, its signals and its end.

Owns the life cycle (part 9 of the contract). Must not hold a rule that a module below could hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from metquay_proxy import __version__, listeners
from metquay_proxy.audit import AuditLog, why_not
from metquay_proxy.downstream.connection import Bounds
from metquay_proxy.downstream.handler import Handler
from metquay_proxy.downstream.pages import Pages
from metquay_proxy.downstream.server import Server
from metquay_proxy.exchange.forwarder import Forwarder
from metquay_proxy.exchange.line import Line, PacedLine
from metquay_proxy.exchange.tokens import TokenCache, suspend_aware_clock
from metquay_proxy.log import configure_logging, log, output, reporter
from metquay_proxy.reload import Reload, Source
from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.rules.gate import WATCHED, Gate
from metquay_proxy.rules.quota import Quota
from metquay_proxy.rules.target import BaseURL, TargetRules
from metquay_proxy.settings import SettingsError, last_four, pool_to, shown_keys
from metquay_proxy.telemetry import Telemetry
from metquay_proxy.upstream.dial import tls_context
from metquay_proxy.upstream.login import Login
from metquay_proxy.upstream.pool import MAX_IDLE, MAX_IDLE_UNSAFE

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from metquay_proxy.listeners import Door
    from metquay_proxy.redis_address import RedisAddress
    from metquay_proxy.replicas.store import Replica
    from metquay_proxy.rules.address import Address
    from metquay_proxy.rules.gate import ClientKey
    from metquay_proxy.settings import Settings

_FLUSH: Final = 1.0
"""Seconds for the last lines of the audit log to be written."""
_MOST_WATCHERS: Final = 32
"""Connections at METQUAY_METRICS_LISTEN,"""
_WATCHERS: Final = Bounds(head=5.0, idle=5.0, silence=5.0)
"""and the time that they have."""
_TURN: Final = 0.02
"""Seconds from one look at what a drain waits for to the next."""
_BRIEFLY: Final = 0.001
"""Seconds in which a request that was just accepted, or was in a lane, reaches its handler, even without a drain."""
_SHORTAGE: Final = reporter(
    "no new clients are accepted: connected ones are still served, and the proxy keeps trying",
    "new clients are accepted again",
)


def _audit(path: Path) -> AuditLog:
    """Open the audit log; raise ``SettingsError`` where it can't be written."""
    try:
        return AuditLog(path)
    except OSError as error:
        raise SettingsError([f"METQUAY_AUDIT_LOG (--audit-log): {why_not(path, error)}"], (), ()) from None


class Proxy:
    """The running program: everything that was built from the settings, its listeners and its end."""

    def __init__(  # noqa: PLR0913 - its inputs, and the times that tests shorten
        self,
        settings: Settings,
        base: BaseURL,
        credentials: Callable[[], Credentials],
        *,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep,
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None = None,
        bounds: Bounds | None = None,
        max_idle: tuple[float, float] = (MAX_IDLE, MAX_IDLE_UNSAFE),
    ) -> None:
        """Build everything; nothing is opened yet. ``credentials`` is asked at each login.

        ``bounds`` are for clients; ``max_idle`` (seconds) is for connections to Metquay that repeatable and other
        requests reuse. ``clock`` counts the seconds of tokens, quota and waiting; ``sleep`` and ``call_later`` take
        seconds of it.
        """
        self.base = base
        self._settings = settings
        self._audit = None if settings.audit_log is None else _audit(settings.audit_log)
        clock = clock or suspend_aware_clock()
        self.telemetry = Telemetry(base.prefix)
        self.scheme = "https" if settings.tls_cert else "http"
        self.pool = pool_to(base, settings, max_idle=max_idle, clock=clock)
        login = Login(self.pool, base, credentials, clock)
        self.tokens = TokenCache(login, clock=clock, sleep=sleep, observer=self.telemetry.token_event)
        rate = settings.rate_limit
        self._line = None if rate is None else Line(Quota(rate.limit, rate.window), clock, call_later)
        self._shared = None if settings.redis_url is None else _shared(settings, base, clock, call_later)
        if self._shared is not None:
            self._line = self._shared.line
        self._pages = Pages(
            ready=self.ready,
            status=self.status,
            test=self.test,
            allow_quit=settings.allow_quit,
            telemetry=self.telemetry,
        )
        self._own_authorities = set(base.authorities)
        self._gate = Gate(
            upstream_host=base.host,
            keys=settings.keys,
            read_only=settings.read_only,
            allowed_hosts=settings.allowed_hosts,
            allowed_origins=settings.allowed_origins,
            scheme=self.scheme,
            own_names=listeners.own_names(settings.listen),
        )
        forwarder = partial(
            Forwarder,
            self.pool,
            self.tokens,
            max_wait=settings.max_wait,
            retries=settings.retries,
            clock=clock,
            records=None if self._shared is None else self._shared.records,
            sleep=sleep,
        )
        handler = partial(
            Handler,
            rules=TargetRules(base.prefix, self._own_authorities, pass_through=settings.pass_through),
            forwarder=forwarder(self._line),
            paced=forwarder(self._line and PacedLine(self._line, clock)),
            pages=self._pages,
            audit=self._audit,
            telemetry=self.telemetry,
            base=base,
            scheme=self.scheme,
            replay_limit=settings.replay_limit,
            read_timeout=settings.read_timeout,
        )
        self._handler = handler(gate=self._gate)
        bounds = bounds or Bounds(silence=settings.read_timeout)
        self.server = Server(self._handler, self._pages.respond, bounds)
        names = listeners.own_names(settings.metrics_listen)
        watch = Gate(upstream_host=base.host, allowed_hosts=settings.allowed_hosts, own_names=names)
        watcher = handler(gate=watch, only=WATCHED, telemetry=Telemetry(base.prefix))  # whom no drain waits for
        self._watch = Server(watcher, self._pages.respond, _WATCHERS, _MOST_WATCHERS)
        self.quit = self._pages.quit
        certificate, key = settings.tls_cert, settings.tls_key
        self._serving = listeners.Serving(certificate, key) if certificate and key else None
        access_key = None if settings.sandbox else settings.access_key
        self.key = access_key and last_four(access_key.get_secret_value())
        """What may be shown of the access key in use."""
        self._shown: dict[str, str | None] = {}
        """What is shown of settings that have changed since the start."""
        self._files = Reload(list(self._sources(credentials)), sleep=sleep)
        self._listeners: Sequence[asyncio.AbstractServer | Door] = ()
        self._watched: Sequence[asyncio.AbstractServer | Door] = ()
        self.hurry = asyncio.Event()
        """Set where a drain is to end now, as at its deadline."""
        self.listening: list[Address] = []
        self.watched: list[Address] = []
        """Where METQUAY_METRICS_LISTEN listens."""
        self.addresses: list[str] = []

    def ready(self) -> bool:
        """Whether a request would find a token now."""
        return self.tokens.state.ready and not self._handler.draining

    def status(self) -> dict[str, Any]:
        """Return the figures for ``/-/status``; nothing secret among them."""
        token = self.tokens.state
        busy, idle = self.pool.connections
        return {
            "version": __version__,
            "upstream": str(self.base),
            "ready": self.ready(),
            "draining": self._handler.draining,
            "sandbox": self._settings.sandbox,
            "read_only": self._settings.read_only,
            "key": self.key,
            "token": dataclasses.asdict(token),
            "quota": None if self._line is None else self._line.snapshot()._asdict(),
            "redis": None if self._shared is None else self._shared.status(),
            "audit": None if self._audit is None else self._audit.status(),
            "requests": {"active": self.telemetry.active, "finished": self.telemetry.finished},
            "connections": {"busy": busy, "idle": idle},
            "settings": [
                setting._replace(value=self._shown.get(setting.variable, setting.value))._asdict()
                for setting in self._settings.sources()
            ],
        }

    async def test(self) -> dict[str, Any]:
        """Read one customer as a tool would; return whether that went well (``ok``) and a ``text`` for people."""
        return await self._handler.test()

    async def start(self) -> None:
        """Listen, then log in; raise ``OSError`` where an address can't be had."""
        tls = None if self._serving is None else self._serving.context
        if self._shared is not None:
            await self._shared.start()
        bound = listeners.bind(self._settings.listen, self._settings.socket_mode)
        try:
            watched = listeners.bind(self._settings.metrics_listen, setting="METQUAY_METRICS_LISTEN (--metrics-listen)")
        except OSError:
            listeners.release(bound)
            raise
        self.listening, self.watched = ([address for address, _ in some] for some in (bound, watched))
        for address in (*self.listening, *self.watched):
            hosts = () if address.path else ("localhost", "127.0.0.1", "::1", address.host)
            self._own_authorities |= {(host, address.port) for host in hosts}
        self.addresses = [str(each) if each.path else f"{self.scheme}://{each}" for each in self.listening]
        bounds = self.server.bounds
        enter = partial(listeners.let_in, handshake=bounds.head, shutdown=bounds.silence)
        self._listeners = await enter(self.server.accept, listeners.sockets_of(bound), tls, _SHORTAGE)
        self._watched = await enter(self._watch.accept, listeners.sockets_of(watched), None, lambda _: None)
        self.tokens.start()
        self.pool.keep_warm()
        self._files.start()

    def reload(self) -> asyncio.Task[None]:
        """Read the files again that settings name, and open the audit log anew: somebody has changed them."""
        if self._audit is not None:
            self._audit.reopen()
        self.tokens.hasten()
        return self._files.now()

    def _sources(self, credentials: Callable[[], Credentials]) -> Iterator[Source[Any]]:
        """Yield what can be read again, and who is told of it."""
        settings = self._settings

        def trust(context: ssl.SSLContext) -> None:
            self.pool.trust(context)
            self.tokens.hasten()

        def log_in(keys: Credentials) -> None:
            self.key = self._shown["METQUAY_ACCESS_KEY"] = last_four(keys.access_key)
            self.tokens.hasten()

        def admit(keys: tuple[ClientKey, ...]) -> str:
            ended = self._gate.replace_keys(keys)
            self._pages.turn_out(ended)
            self._shown["METQUAY_CLIENT_KEYS"] = shown_keys(key for key in keys if key.name != "default") or None
            names = ", ".join(key.name for key in keys)
            return f"client keys ({names}" + (f"; ended: {', '.join(sorted(ended))})" if ended else ")")

        if self._serving is not None:
            served = [cast("Path", path) for path in (settings.tls_cert, settings.tls_key)]
            make, use = partial(listeners.serving_context, *served), self._serving.use
            yield Source("METQUAY_TLS_CERT, METQUAY_TLS_KEY", served, make, use)
        if settings.ca_bundle and self.base.scheme == "https":
            yield Source("METQUAY_CA_BUNDLE", [settings.ca_bundle], partial(tls_context, settings.ca_bundle), trust)
        if not settings.sandbox:
            pair = settings.secret_files("access_key", "secret_key")
            yield Source("METQUAY_ACCESS_KEY, METQUAY_SECRET_KEY", pair, credentials, log_in)
        names, files = "METQUAY_CLIENT_KEY, METQUAY_CLIENT_KEYS", settings.secret_files("client_key", "client_keys")
        yield Source(names, files, lambda: settings.current_keys(self._gate.keys), admit, lines=True)

    async def stop(self, timeout: float) -> None:  # noqa: ASYNC109 - it does not cut itself short, it lets others end
        """Drain and end: requests in flight have ``timeout`` seconds in all, uploads and detached writes included."""
        server, loop = self.server, asyncio.get_running_loop()
        deadline = loop.time() + timeout
        self._handler.drain()
        self._files.close()
        self.pool.let_cool()
        self._pages.close()
        await asyncio.sleep(min(_TURN, timeout + _BRIEFLY))  # who came before is let in, and told
        for listener in self._listeners:
            listener.close()
        while (server.busy() or self.telemetry.active) and not self.hurry.is_set() and loop.time() < deadline:  # noqa: ASYNC110 - three ends, once
            await asyncio.sleep(_TURN)
        await server.end(self._handler.stop())
        for listener in self._watched:
            listener.close()
        await self._watch.end()
        if self._audit is not None:
            await asyncio.to_thread(self._audit.close, _FLUSH)
        await self.tokens.close()
        if self._shared is not None:
            await self._shared.stop()
        self.pool.close()


def _shared(
    settings: Settings,
    base: BaseURL,
    clock: Callable[[], float],
    call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None,
) -> Replica:
    from metquay_proxy.replicas import store as shared  # noqa: PLC0415 - only who shares pays for loading it

    address = cast("RedisAddress", settings.redis_url)
    tls = tls_context(settings.ca_bundle) if address.scheme == "rediss" else None
    key = "" if settings.access_key is None else settings.access_key.get_secret_value()
    prefix = shared.namespace(base.authority, key)
    store = shared.Store(address, settings.redis_secret, tls)
    return shared.Replica(store, prefix, settings.rate_limit, clock, call_later)


def run(settings: Settings, welcome: Callable[[Proxy], None], *, warnings: Sequence[str] = ()) -> int:
    """Run the proxy until it is told to stop; return the exit code.

    Once it listens, ``welcome`` tells of it, and the ``warnings`` are logged.
    """
    configure_logging(settings.log_level, settings.log_format)
    for warning in settings.warnings:
        log.warning(warning)
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        import uvloop  # noqa: PLC0415 - an optional extra

        loop_factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_run(settings, welcome, warnings))
    finally:
        output.writer.flush(_FLUSH)  # before whoever called writes, too


async def _run(settings: Settings, welcome: Callable[[Proxy], None], warnings: Sequence[str]) -> int:
    async with contextlib.AsyncExitStack() as undo:
        if settings.sandbox:
            from metquay_proxy.sandbox import server as sandbox  # noqa: PLC0415 - of no use otherwise

            simulator = sandbox.Sandbox(rate_limit=settings.rate_limit)
            undo.push_async_callback(simulator.stop)
            # It gets its descriptors from the reserve.
            await simulator.start(listen=partial(listeners.listen, lambda _: None))
            base = BaseURL.parse(simulator.url)
            proxy = Proxy(settings, base, lambda: Credentials(sandbox.ACCESS_KEY, sandbox.SECRET_KEY))
        else:
            proxy = Proxy(settings, cast("BaseURL", settings.host), settings.credentials)
        undo.enter_context(_signals(proxy))
        try:
            await proxy.start()
        except OSError as error:
            log.error("cannot start", reason=str(error))
            await proxy.stop(0.0)
            return 1
        output.writer.flush(_FLUSH)  # what was found odd comes before
        welcome(proxy)
        log.info("listening", addresses=proxy.addresses, upstream=str(proxy.base))
        for warning in warnings:
            log.warning(warning)
        await proxy.quit.wait()
        log.info("stopping", requests_in_flight=proxy.telemetry.active)
        await proxy.stop(settings.drain_timeout)
        log.info("stopped")
    return 0


@contextlib.contextmanager
def _signals(proxy: Proxy) -> Iterator[None]:
    """SIGTERM and SIGINT (Windows: Ctrl-C and Ctrl-Break): the first ends the program in order, the second at once.

    What SIGHUP means was decided before: it ends, reads files again, or is ignored (``cli``). None is registered with
    the loop, which would let it kill as soon as the loop closes; and at the end they are ignored, since Python gives
    the power to kill back to all others.
    """
    loop = asyncio.get_running_loop()

    def end() -> None:
        if proxy.quit.is_set():
            proxy.hurry.set()
        proxy.quit.set()

    calls: dict[int, Callable[[], object]] = {signal.SIGINT: end}
    if sys.platform == "win32":
        calls[signal.SIGBREAK] = end
    else:
        calls[signal.SIGTERM] = end
        hangup = signal.getsignal(signal.SIGHUP)
        if hangup is not signal.SIG_IGN:
            calls[signal.SIGHUP] = end if hangup is signal.getsignal(signal.SIGTERM) else proxy.reload
        loop.add_signal_handler(signal.SIGWINCH, int)  # from now on the loop wakes for every signal
    for number, call in calls.items():
        signal.signal(number, lambda *_, call=call: loop.call_soon_threadsafe(call))
    try:
        yield
    finally:
        for number in calls:
            signal.signal(number, signal.SIG_IGN)
