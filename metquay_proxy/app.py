"""The composition root: everything that is built from the settings, its start, its signals and its end.

Owns the life cycle (part 9 of the contract). Must not hold a rule that a module below could hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import pathlib
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, cast

import aiohttp.http_parser
import structlog

from metquay_proxy import __version__
from metquay_proxy.audit import AuditLog, why_not
from metquay_proxy.downstream.connection import Bounds, Server
from metquay_proxy.downstream.pages import Admin
from metquay_proxy.exchange.forwarder import Forwarder
from metquay_proxy.exchange.line import Line
from metquay_proxy.exchange.tokens import Credentials, TokenCache, suspend_aware_clock
from metquay_proxy.listeners import bind, let_in, listen
from metquay_proxy.reload import Reload, Serving, Source, serving_context
from metquay_proxy.rules.gate import Gate
from metquay_proxy.rules.quota import Quota
from metquay_proxy.rules.target import BaseURL, TargetRules
from metquay_proxy.settings import SettingsError, last_four, outbound_proxy
from metquay_proxy.telemetry import Telemetry, configure_logging
from metquay_proxy.upstream.pool import MAX_IDLE, MAX_IDLE_UNSAFE, Login, Transport, tls_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from metquay_proxy.listeners import Door
    from metquay_proxy.replicas.store import Shared
    from metquay_proxy.rules.address import Address
    from metquay_proxy.rules.gate import ClientKey
    from metquay_proxy.settings import RedisAddress, Settings

_TURN: Final = 0.02
"""Seconds from one look at what a drain waits for to the next."""
_BRIEFLY: Final = 0.001
"""Seconds in which a request that was just accepted, or was in a lane, reaches its handler, even without a drain."""

log = structlog.get_logger("metquay_proxy")


def _audit(settings: Settings) -> AuditLog | None:
    """Open the audit log; raise ``SettingsError`` where it can't be written."""
    path, loop = settings.audit_log, asyncio.get_running_loop()
    if path is None:
        return None

    def report(why: str | None) -> None:
        if why is None:
            log.info("audit log is written again")
        else:
            log.error("audit log can't be written", reason=why)

    def from_thread(why: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(report, why)

    try:
        return AuditLog(path, from_thread)
    except OSError as error:
        raise SettingsError([f"METQUAY_AUDIT_LOG (--audit-log): {why_not(path, error)}"], (), ()) from None


def _report_shortage(why: str | None) -> None:
    if why is None:
        log.info("new clients are let in again")
    else:
        log.error("no new clients are let in: who is connected is served, and it is tried again", reason=why)


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
        self._audit = _audit(settings)
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
        self._gate = Gate(
            upstream_host=base.host,
            keys=settings.keys,
            read_only=settings.read_only,
            allowed_hosts=settings.allowed_hosts,
            allowed_origins=settings.allowed_origins,
            scheme=scheme,
        )
        self.server = Server(
            rules=TargetRules(base.prefix, self._own_authorities, pass_through=settings.pass_through),
            gate=self._gate,
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
            audit=self._audit,
            telemetry=self.telemetry,
            base=base,
            scheme=scheme,
            replay_limit=settings.replay_limit,
            read_timeout=settings.read_timeout,
            bounds=bounds or Bounds(),
        )
        self.scheme = scheme
        self._serving: Serving | None = None
        if settings.tls_cert and settings.tls_key:
            self._serving = Serving(serving_context(settings.tls_cert, settings.tls_key))
        self._key = None if settings.sandbox or settings.access_key is None else settings.access_key.get_secret_value()
        self._shown: dict[str, str | None] = {}
        """What is shown of settings that have changed since the start."""
        self._files = Reload(list(self._sources(credentials)), sleep=sleep)
        self._listeners: Sequence[asyncio.AbstractServer | Door] = ()
        self._unix_paths: list[str] = []
        self._hurried = False
        self.listening: list[Address] = []
        self.addresses: list[str] = []

    def ready(self) -> bool:
        """Whether a request would find a token now."""
        return self.tokens.state.ready and not self.server.draining

    def status(self) -> dict[str, Any]:
        """Return the figures for ``/-/status``; nothing secret among them."""
        token = self.tokens.state
        busy, idle = self._transport.connections
        return {
            "version": __version__,
            "upstream": str(self.base),
            "ready": self.ready(),
            "draining": self.server.draining,
            "sandbox": self._settings.sandbox,
            "read_only": self._settings.read_only,
            "key": None if self._key is None else last_four(self._key),
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
        return await self.server.test()

    async def start(self) -> None:
        """Listen, then log in; raise ``OSError`` where an address can't be had."""
        tls = None if self._serving is None else self._serving.context
        if self._shared is not None:
            await self._shared.start()
        self._own_authorities |= self.base.authorities
        bound = bind(self._settings.listen, self._settings.socket_mode)
        for address, _ in bound:
            self.listening.append(address)
            if address.path:
                self._unix_paths.append(address.path)
            else:
                hosts = ("localhost", "127.0.0.1", "::1", address.host)
                self._own_authorities |= {(host, address.port) for host in hosts}
        self.addresses = [str(each) if each.path else f"{self.scheme}://{each}" for each in self.listening]
        sockets = [sock for _, some in bound for sock in some]
        self._listeners = await let_in(self.server, sockets, tls, _report_shortage, handshake=self.server.bounds.head)
        self.tokens.start()
        self._transport.keep_warm()
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

        def serve(context: ssl.SSLContext) -> str:
            cast("Serving", self._serving).use(context)
            return "METQUAY_TLS_CERT, METQUAY_TLS_KEY"

        def trust(context: ssl.SSLContext) -> str:
            self._transport.trust(context)
            self.tokens.hasten()
            return "METQUAY_CA_BUNDLE"

        def log_in(keys: Credentials) -> str:
            self._key = keys.access_key
            self._shown["METQUAY_ACCESS_KEY"] = last_four(self._key)
            self.tokens.hasten()
            return "METQUAY_ACCESS_KEY, METQUAY_SECRET_KEY"

        def admit(keys: tuple[ClientKey, ...]) -> str:
            ended = self._gate.replace_keys(keys)
            self._admin.turn_out(ended)
            named = [f"{key.name}:***" + ":read-only" * key.read_only for key in keys if key.name != "default"]
            self._shown["METQUAY_CLIENT_KEYS"] = ",".join(named) or None
            names = ", ".join(key.name for key in keys)
            return f"client keys ({names}" + (f"; ended: {', '.join(sorted(ended))})" if ended else ")")

        if settings.tls_cert and settings.tls_key:
            served = [settings.tls_cert, settings.tls_key]
            yield Source("METQUAY_TLS_CERT, METQUAY_TLS_KEY", served, lambda: serving_context(*served), serve)
        if settings.ca_bundle and self.base.scheme == "https":
            bundle = [settings.ca_bundle]
            yield Source("METQUAY_CA_BUNDLE", bundle, lambda: tls_context(settings.current_ca_bundle()), trust)
        if not settings.sandbox:
            pair = settings.secret_files("access_key", "secret_key")
            yield Source("METQUAY_ACCESS_KEY, METQUAY_SECRET_KEY", pair, credentials, log_in)
        names, files = "METQUAY_CLIENT_KEY, METQUAY_CLIENT_KEYS", settings.secret_files("client_key", "client_keys")
        yield Source(names, files, lambda: settings.current_keys(self._gate.keys), admit, lines=True)

    async def stop(self, timeout: float) -> None:  # noqa: ASYNC109 - it does not cut itself short, it lets others end
        """Drain and end: requests in flight have ``timeout`` seconds in all, uploads and detached writes included."""
        server, loop = self.server, asyncio.get_running_loop()
        deadline = loop.time() + timeout
        server.drain()
        self._files.close()
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
    from metquay_proxy.replicas import store as shared  # noqa: PLC0415 - only who shares pays for loading it

    address = cast("RedisAddress", settings.redis_url)
    tls = tls_context(settings.ca_bundle) if address.scheme == "rediss" else None
    key = "" if settings.access_key is None else settings.access_key.get_secret_value()
    prefix = shared.namespace(base.authority, key)
    store = shared.Store(address, settings.redis_secret, tls)
    return shared.Shared(store, prefix, settings.rate_limit, clock, call_later)


def run(settings: Settings, *, sandbox: bool, warnings: Sequence[str] = ()) -> int:
    """Run the proxy until it is told to stop; return the exit code. ``sandbox``: the simulator is the upstream.

    ``warnings`` are told once it listens.
    """
    as_json = configure_logging(settings.log_level, settings.log_format)
    for warning in settings.warnings:
        log.warning(warning)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(settings, sandbox=sandbox, as_json=as_json, warnings=warnings))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - an optional extra
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _run(settings: Settings, *, sandbox: bool, as_json: bool, warnings: Sequence[str]) -> int:
    if not aiohttp.http_parser.HttpRequestParser.__module__.endswith("_http_parser"):
        log.warning(
            "aiohttp's compiled parser is missing: its slower one in pure Python has had holes. Reinstall aiohttp."
        )
    simulator = None
    if sandbox:
        from metquay_proxy.sandbox import server as sandbox_module  # noqa: PLC0415 - of no use otherwise

        simulator = sandbox_module.Sandbox(rate_limit=settings.rate_limit)
        await simulator.start(listen=listen(lambda _: None, 0))  # it gets its descriptors from the reserve
        base = BaseURL.parse(simulator.url)
        proxy = Proxy(settings, base, lambda: Credentials(sandbox_module.ACCESS_KEY, sandbox_module.SECRET_KEY))
    else:
        proxy = Proxy(settings, cast("BaseURL", settings.host), settings.credentials)
    signals = _Signals(proxy.hurry, proxy.reload)
    try:
        try:
            await proxy.start()
        except OSError as error:
            log.error("cannot start", reason=str(error))  # noqa: TRY400 - a person can put it right: no traceback
            await proxy.stop(0.0)
            return 1
        print(_welcome(proxy, settings, sandbox=sandbox, as_json=as_json), flush=True)  # noqa: T201 - it is for eyes
        log.info("listening", addresses=proxy.addresses, upstream=str(proxy.base))
        for warning in warnings:
            log.warning(warning)
        gc.freeze()  # what the program consists of never becomes garbage: collections need not look at it again
        gc.enable()
        await signals.wait(proxy.server.quit)
        log.info("stopping", requests_in_flight=proxy.telemetry.active)
        await proxy.stop(settings.drain_timeout)
        log.info("stopped")
    finally:
        if simulator is not None:
            await simulator.stop()
        signals.close()
    return 0


class _Signals:
    """SIGTERM and SIGINT (Windows: Ctrl-C and Ctrl-Break): the first ends the program in order, the second at once.

    What SIGHUP means was decided before: it ends, reads files again, or is ignored (``cli``). None is registered with
    the loop, which would let it kill as soon as the loop closes.
    """

    def __init__(self, again: Callable[[], None], reload: Callable[[], object]) -> None:
        """``again`` is called for each signal after the first that ends."""
        self._stop = asyncio.Event()
        self._again = again
        loop = asyncio.get_running_loop()
        self._calls: dict[int, Callable[[], object]] = {signal.SIGINT: self._received}
        if sys.platform == "win32":
            self._calls[signal.SIGBREAK] = self._received
        else:
            self._calls[signal.SIGTERM] = self._received
            hangup = signal.getsignal(signal.SIGHUP)
            if hangup is not signal.SIG_IGN:
                self._calls[signal.SIGHUP] = self._received if hangup is signal.default_int_handler else reload
            loop.add_signal_handler(signal.SIGWINCH, int)  # from now on the loop wakes for every signal
        for number in self._calls:
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(self._calls[number]))

    def _received(self) -> None:
        if self._stop.is_set():
            self._again()
        self._stop.set()

    def close(self) -> None:
        """Ignore them: Python, as it ends, gives the power to kill back to all that are not ignored."""
        for number in self._calls:
            signal.signal(number, signal.SIG_IGN)

    async def wait(self, other: asyncio.Event) -> None:
        """Return at the first signal, or when ``other`` is set."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._stop, other)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._stop.set()


def _welcome(proxy: Proxy, settings: Settings, *, sandbox: bool, as_json: bool) -> str:
    """Return what is printed at the start; all of it can be pasted, and works with these settings."""
    whom = "the built-in sandbox (made-up data, no account needed)" if sandbox else proxy.base.authority
    if not sandbox and settings.access_key is not None:
        whom += f" with key {last_four(settings.access_key.get_secret_value())}"
    urls = list(dict.fromkeys([_url(proxy, address) for address in proxy.listening]))
    root = next((url for url in urls if not url.startswith("unix:")), None)
    # Windows PowerShell has another curl; the certificate may be anybody's, and for another name.
    curl = ("curl.exe" if sys.platform == "win32" else "curl") + (" --insecure" if settings.tls_cert else "")
    if root is None:
        curl += f" --unix-socket {shlex.quote(proxy.listening[0].path)}"
    test = f'{curl} "{root or f"{proxy.scheme}://localhost"}{"/-/ready" if settings.keys else "/customers?limit=2"}"'
    page = root and f"{root}/-/"
    if as_json:
        told = {"version": __version__, "addresses": urls, "upstream": whom, "status_page": page, "try": test}
        return json.dumps({"event": "started", **told})
    lines = [f"metquay-proxy {__version__} listens on {', '.join(urls)}", f"for {whom}"]
    if any(address.hosts != address.reach for address in proxy.listening):
        lines.append("other machines may reach it too, at the addresses of this one")
    if page:
        lines.append(f"status page: {page}")
    if settings.keys:
        lines.append("each tool must send a client key, for instance in a header X-Proxy-Key")
    return "\n".join([*lines, f"try: {test}"])


def _url(proxy: Proxy, address: Address) -> str:
    """Return where a program of this machine reaches us."""
    if address.path:
        return str(address)
    host = address.host if address.hosts == address.reach else address.reach[0]
    return f"{proxy.scheme}://{address._replace(host=host)}"
