"""The composition root: everything that is built from the settings, its start, its signals and its end.

Owns the life cycle (part 9 of the contract). Must not hold a rule that a module below could hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import pathlib
import signal
import ssl
import sys
from typing import TYPE_CHECKING, Any, Final, cast

import aiohttp.http_parser
import structlog

from metquay_proxy import __version__
from metquay_proxy.address import Address
from metquay_proxy.admin import Admin
from metquay_proxy.audit import AuditLog
from metquay_proxy.auth import Credentials, TokenCache, suspend_aware_clock
from metquay_proxy.forwarder import Forwarder
from metquay_proxy.gate import Gate
from metquay_proxy.line import Line
from metquay_proxy.listeners import BACKLOG, bind, why_not_listening
from metquay_proxy.quota import Quota
from metquay_proxy.rewrite import BaseURL
from metquay_proxy.server import Bounds, Server
from metquay_proxy.settings import last_four, outbound_proxy
from metquay_proxy.target import TargetRules
from metquay_proxy.telemetry import Telemetry, configure_logging
from metquay_proxy.upstream import MAX_IDLE, MAX_IDLE_UNSAFE, Login, Transport, tls_context

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from metquay_proxy.settings import RedisAddress, Settings
    from metquay_proxy.shared import Shared

_TURN: Final = 0.02
"""Seconds from one look at what a drain waits for to the next."""
_BRIEFLY: Final = 0.001
"""Seconds in which a request that was just accepted, or was in a lane, reaches its handler, even without a drain."""

log = structlog.get_logger("metquay_proxy")


def _report_audit(why: str | None) -> None:
    if why is None:
        log.info("audit log is written again")
    else:
        log.error("audit log can't be written: lines are lost until that is mended", reason=why)


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
        clock = clock or suspend_aware_clock()
        self.telemetry = Telemetry(base.prefix)
        scheme = "https" if settings.tls_cert else "http"
        self._transport = Transport(
            base,
            ssl_context=tls_context(settings.ca_bundle) if base.scheme == "https" else None,
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            outbound_proxy=outbound_proxy(settings, base),
            max_idle=max_idle,
            clock=clock,
        )
        self.tokens = TokenCache(
            Login(self._transport, base, credentials, clock),
            clock=clock,
            sleep=sleep,
            observer=self.telemetry.token_event,
        )
        rate = settings.rate_limit
        self._line = None if rate is None else Line(Quota(rate.limit, rate.window), clock, call_later)
        self._shared = None if settings.redis_url is None else _shared(settings, base, clock, call_later)
        if self._shared is not None:
            self._line = self._shared.line
        self._admin = Admin(
            ready=self.ready,
            status=self.status,
            allow_quit=settings.allow_quit,
            telemetry=self.telemetry,
            test=self.test,
        )
        self._own_authorities: set[tuple[str, int]] = set()
        self.server = Server(
            rules=TargetRules(base.prefix, self._own_authorities, pass_through=settings.pass_through),
            gate=Gate(
                upstream_host=base.host,
                keys=settings.keys,
                read_only=settings.read_only,
                allowed_hosts=settings.allowed_hosts,
                allowed_origins=settings.allowed_origins,
                scheme=scheme,
            ),
            forwarder=Forwarder(
                self._transport,
                self.tokens,
                self._line,
                base,
                max_wait=settings.max_wait,
                retries=settings.retries,
                clock=clock,
                records=None if self._shared is None else self._shared.records,
                replay_limit=settings.replay_limit,
                sleep=sleep,
            ),
            admin=self._admin,
            audit=None if settings.audit_log is None else AuditLog(settings.audit_log, _report_audit),
            telemetry=self.telemetry,
            base=base,
            scheme=scheme,
            replay_limit=settings.replay_limit,
            read_timeout=settings.read_timeout,
            bounds=bounds or Bounds(),
        )
        self.scheme = scheme
        self._listeners: list[asyncio.AbstractServer] = []
        self._unix_paths: list[str] = []
        self._hurried = False
        self.addresses: list[str] = []

    def ready(self) -> bool:
        """Whether a request would find a token now."""
        return self.tokens.state.ready and not self.server.draining

    def status(self) -> dict[str, Any]:
        """Return the figures for ``/-/status``; nothing secret among them."""
        token = self.tokens.state
        busy, idle = self._transport.connections
        key = None if self._settings.sandbox else self._settings.access_key
        return {
            "version": __version__,
            "upstream": str(self.base),
            "ready": self.ready(),
            "draining": self.server.draining,
            "sandbox": self._settings.sandbox,
            "read_only": self._settings.read_only,
            "key": None if key is None else last_four(key.get_secret_value()),
            "token": dataclasses.asdict(token),
            "quota": None if self._line is None else self._line.snapshot()._asdict(),
            "redis": None if self._shared is None else self._shared.status(),
            "requests": {"active": self.telemetry.active, "finished": self.telemetry.finished},
            "connections": {"busy": busy, "idle": idle},
            "settings": [setting._asdict() for setting in self._settings.sources()],
        }

    async def test(self) -> dict[str, Any]:
        """Read one customer as a tool would; return whether that went well (``ok``) and a ``text`` for people."""
        return await self.server.test()

    async def start(self) -> None:
        """Listen, then log in; raise ``OSError`` where an address can't be had."""
        tls = None
        if self._settings.tls_cert and self._settings.tls_key:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self._settings.tls_cert, self._settings.tls_key)
        loop = asyncio.get_running_loop()
        if self._shared is not None:
            await self._shared.start()
        self._own_authorities |= self.base.authorities
        for address in self._settings.listen:
            for sock in bind(address):
                if address.path:
                    self._unix_paths.append(address.path)
                    self.addresses.append(str(address))
                    listener = await loop.create_unix_server(self.server, sock=sock, ssl=tls, backlog=BACKLOG)
                else:
                    port = sock.getsockname()[1]
                    self.addresses.append(f"{self.scheme}://{Address(address.host, port)}")
                    self._own_authorities |= {(host, port) for host in ("localhost", "127.0.0.1", "::1", address.host)}
                    listener = await loop.create_server(self.server, sock=sock, ssl=tls, backlog=BACKLOG)
                self._listeners.append(listener)
        self.addresses = list(dict.fromkeys(self.addresses))
        self.tokens.start()
        self._transport.keep_warm()

    async def stop(self, timeout: float) -> None:  # noqa: ASYNC109 - it does not cut itself short, it lets others end
        """Drain and end: requests in flight have ``timeout`` seconds in all, uploads and detached writes included."""
        server, loop = self.server, asyncio.get_running_loop()
        deadline = loop.time() + timeout
        server.drain()
        self._transport.let_cool()
        self._admin.close()
        await asyncio.sleep(min(_TURN, timeout + _BRIEFLY))  # who came before is let in, and told
        for listener in self._listeners:
            listener.close()
        while self._unix_paths:  # now, since another proxy may take the path while this one drains
            with contextlib.suppress(FileNotFoundError):
                pathlib.Path(self._unix_paths.pop()).unlink()  # noqa: ASYNC240 - one call, and nobody new is served
        while server.busy() and not self._hurried and loop.time() < deadline:  # noqa: ASYNC110 - three ends, once
            await asyncio.sleep(_TURN)
        await server.end()
        await self.tokens.close()
        if self._shared is not None:
            await self._shared.stop()
        self._transport.close()

    def hurry(self) -> None:
        """End a drain now, as at its deadline."""
        self._hurried = True


def _shared(
    settings: Settings,
    base: BaseURL,
    clock: Callable[[], float],
    call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None,
) -> Shared:
    from metquay_proxy import shared  # noqa: PLC0415 - only who shares pays for loading it

    address = cast("RedisAddress", settings.redis_url)
    tls = tls_context(settings.ca_bundle) if address.scheme == "rediss" else None
    key = "" if settings.access_key is None else settings.access_key.get_secret_value()
    prefix = shared.namespace(base.authority, key)
    store = shared.Store(address, settings.redis_secret, tls)
    return shared.Shared(store, prefix, settings.rate_limit, clock, call_later)


def run(settings: Settings, *, sandbox: bool) -> int:
    """Run the proxy until it is told to stop; return the exit code. ``sandbox``: the simulator is the upstream."""
    configure_logging(settings.log_level, settings.log_format)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(settings, sandbox=sandbox))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - an optional extra
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _run(settings: Settings, *, sandbox: bool) -> int:
    for warning in settings.warnings:
        log.warning(warning)
    if not aiohttp.http_parser.HttpRequestParser.__module__.endswith("_http_parser"):
        log.warning(
            "aiohttp's compiled parser is missing: its slower one in pure Python has had holes. Reinstall aiohttp."
        )
    simulator = None
    if sandbox:
        from metquay_proxy import sandbox as sandbox_module  # noqa: PLC0415 - of no use otherwise

        simulator = sandbox_module.Sandbox(rate_limit=settings.rate_limit)
        await simulator.start()
        base = BaseURL.parse(simulator.url)
        proxy = Proxy(settings, base, lambda: Credentials(sandbox_module.ACCESS_KEY, sandbox_module.SECRET_KEY))
    else:
        proxy = Proxy(settings, cast("BaseURL", settings.host), settings.credentials)
    signals = _Signals(proxy.hurry)
    try:
        try:
            await proxy.start()
        except OSError as error:
            sys.stderr.write(f"metquay-proxy: cannot listen: {why_not_listening(error)}\n")
            await proxy.stop(0.0)
            return 1
        sys.stdout.write(_welcome(proxy, settings, sandbox=sandbox))
        sys.stdout.flush()
        log.info("listening", addresses=proxy.addresses, upstream=str(proxy.base))
        gc.freeze()  # what the program consists of never becomes garbage: collections need not look at it again
        gc.enable()
        await signals.wait(proxy.server.quit)
        log.info("stopping", requests_in_flight=proxy.telemetry.active)
        await proxy.stop(settings.drain_timeout)
        log.info("stopped")
    finally:
        if simulator is not None:
            await simulator.stop()
    return 0


class _Signals:
    """SIGTERM and SIGINT (Windows: Ctrl-C and Ctrl-Break): the first ends the program in order, the second at once."""

    def __init__(self, again: Callable[[], None]) -> None:
        """``again`` is called for each signal after the first."""
        self._stop = asyncio.Event()
        self._again = again
        loop = asyncio.get_running_loop()
        if sys.platform == "win32":
            numbers = [signal.SIGINT, signal.SIGBREAK]
        else:
            numbers = [signal.SIGINT, signal.SIGTERM]
        for number in numbers:
            try:
                loop.add_signal_handler(number, self._received)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(self._received))

    def _received(self) -> None:
        if self._stop.is_set():
            self._again()
        self._stop.set()

    async def wait(self, other: asyncio.Event) -> None:
        """Return at the first signal, or when ``other`` is set."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._stop, other)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._stop.set()


def _welcome(proxy: Proxy, settings: Settings, *, sandbox: bool) -> str:
    where = ", ".join(proxy.addresses)
    key = (
        ""
        if sandbox or settings.access_key is None
        else f" with key {last_four(settings.access_key.get_secret_value())}"
    )
    whom = "the built-in sandbox (made-up data, no account needed)" if sandbox else f"{proxy.base.authority}{key}"
    page = next((address for address in proxy.addresses if not address.startswith("unix:")), None)
    lines = [f"metquay-proxy {__version__} listens on {where}", f"for {whom}"]
    if page is not None:
        lines += [f"status page: {page}/-/", f"try: curl '{page}/customers?limit=2'"]
    return "\n".join(lines) + "\n"
