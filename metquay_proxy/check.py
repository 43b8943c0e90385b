"""``metquay-proxy check``: what lies between this machine and an answer of Metquay, tried in order.

Owns the probes: for each failure a sentence of cause and one of cure, for people who are no programmers. Must not
change anything in Metquay (it logs in, and reads one customer) and must show nothing secret.

Facts: RFC 9110 section 6.6.1 (Date, against which our clock is held: where that is wrong, good certificates look bad).
OpenSSL's X509_V_ERR numbers 9 and 10 (not yet, no longer valid), 18 to 21 (the issuer is not known), 62 and 64 (another
name). Logins don't count for the quota, so that their address is asked for the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from email.utils import parsedate_to_datetime
from functools import partial, reduce
from http import HTTPStatus
from operator import getitem
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from metquay_proxy import health
from metquay_proxy.audit import try_log, why_not
from metquay_proxy.listeners import CannotListen, bind, release
from metquay_proxy.rules.address import Address
from metquay_proxy.rules.credentials import Credentials, CredentialsRejected, LoginBusy, LoginFailed
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.sandbox import server as simulator
from metquay_proxy.settings import SettingsError, last_four, outbound_proxy, pool_to
from metquay_proxy.threads import in_thread
from metquay_proxy.upstream.dial import Dialer, tls_context
from metquay_proxy.upstream.login import Login, ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from metquay_proxy.settings import Settings

MAX_SKEW: Final = 120.0
"""Seconds by which this machine's clock may differ from Metquay's."""
_COMPLETE: Final = "complete"
_BREAK: Final = "\n" + 28 * " "
"""What stands between the lines of one probe: each text begins below the one before it."""
_ORDER: Final = ("keys", "port", "audit", "dns", "tcp", "tls", "clock", "login", "read", "quota", "redis")
_NEEDS: Final = {"tcp": "dns", "tls": "tcp", "clock": "tls", "login": "keys tls", "read": "login", "quota": "read"}

_WAIT: Final = "Metquay is restarting or has too much to do: wait a few minutes, then check again."
_HOST: Final = "Check METQUAY_HOST: another server answers, or the network wants you to log in with a browser first."
_KEYS: Final = "Check METQUAY_ACCESS_KEY and METQUAY_SECRET_KEY: complete, still valid, and of this laboratory?"
_DATE: Final = "Check this computer's date and time first; if they are right, the server's certificate must be renewed."
_NAME: Final = "Check METQUAY_HOST for a typing mistake: the certificate is for another name."
_CERTIFICATE: Final = {9: _DATE, 10: _DATE, 62: _NAME, 64: _NAME}
_LOGIN: Final = {CredentialsRejected: _KEYS, LoginBusy: _WAIT, LoginFailed: _HOST}
"""What to do where the text of the failure does not say it."""
_READ: Final = {
    401: ("Metquay gave out a token and then refused it.", "Check again; if that is no help, tell Metquay's support."),
    403: ("These keys may not read customers.", "Ask whoever looks after Metquay to allow it for this API client."),
    404: ("Metquay's API is not at {}.", "Check METQUAY_HOST: usually it is a name without a path."),
    429: ("The quota of these keys is used up.", "Wait a minute, and let all programs with these keys use one proxy."),
}


class Probe(NamedTuple):
    """What came of one probe: ``ok``, ``failed`` or ``skipped``; ``cure`` is empty unless it failed."""

    name: str
    outcome: str
    text: str
    cure: str = ""
    ms: float = 0.0
    """Its time in milliseconds."""


def run(load: Callable[[], Settings], tell: Callable[[str], None], *, as_json: bool) -> int:
    """Try everything and ``tell`` a line for each probe (``as_json``: one object); return 0 if none failed, else 1.

    ``load`` finds the settings and raises ``SettingsError``.
    """
    probes: list[Probe] = []

    async def probe_all() -> None:
        async for probe in probed(load):
            probes.append(probe)
            took = "" if probe.outcome == "skipped" else f"{probe.ms:.0f} ms"
            if not as_json:
                cure = ("\n" if probe.name == "settings" else " ") + probe.cure
                tell(f"{probe.outcome:8} {probe.name:8} {took:>8}  {probe.text}{cure}".rstrip().replace("\n", _BREAK))

    asyncio.run(probe_all())
    good = all(probe.outcome != "failed" for probe in probes)
    summary = _summary(probes)
    told = {"ok": good, "summary": summary, "probes": [probe._asdict() for probe in probes]}
    tell(json.dumps(told, indent=2) if as_json else summary)
    return 0 if good else 1


def _summary(probes: Sequence[Probe]) -> str:
    count = Counter(probe.outcome for probe in probes)
    if count["failed"]:
        others = f"{count['skipped']} skipped, {count['ok']} passed" if probes[1:] else "nothing else was tried"
        first = ". Begin with the first that failed" if count["failed"] > 1 else ""
        return f"{count['failed']} failed, {others}{first}."
    well = "All is well" if probes[0].text == _COMPLETE else "Nothing failed, but there is a warning about the settings"
    return f"{well}: {count['ok']} checks passed, {count['skipped']} had nothing to try."


async def probed(load: Callable[[], Settings]) -> AsyncIterator[Probe]:
    """Yield the outcome of each probe, in order; those that need one that failed are skipped."""
    try:
        settings = load()
    except SettingsError as error:
        cure = "Correct that; `metquay-proxy settings` shows where each setting comes from."
        yield Probe("settings", "failed", "\n".join(error.args), cure)
        return
    yield Probe("settings", "ok", "\n".join(f"warning: {line}" for line in settings.warnings) or _COMPLETE)
    server = simulator.Sandbox()
    base, credentials = settings.host, settings.credentials
    if settings.sandbox:
        await server.start()
        keys = Credentials(simulator.ACCESS_KEY, simulator.SECRET_KEY)
        base, credentials = BaseURL.parse(server.url), lambda: keys
    assert base is not None  # noqa: S101 - `load` has seen to it
    check = _Check(settings, base, credentials)
    broken: set[str] = set()
    try:
        for name in _ORDER:
            missing = [need for need in _NEEDS.get(name, "").split() if need in broken]
            began = time.perf_counter()
            probe = Probe(name, "skipped", f"needs {missing[0]}") if missing else await check.probe(name)
            if missing or probe.outcome == "failed":
                broken.add(name)
            yield probe._replace(ms=round((time.perf_counter() - began) * 1000, 1))
    finally:
        check.transport.close()
        await server.stop()


class _Check:
    """The probes: each is a method that returns outcome, text and cure."""

    def __init__(self, settings: Settings, base: BaseURL, credentials: Callable[[], Credentials]) -> None:
        self._settings, self._base, self._credentials = settings, base, credentials
        proxy = outbound_proxy(settings, base)
        self._first = (base.name, base.port) if proxy is None else (proxy.host, proxy.port)
        self._failure = Dialer(base, proxy, settings.connect_timeout, None).failure
        self._authorization = ""
        self._status: Any = None
        """What the proxy that runs here tells of itself."""
        self.transport = pool_to(base, settings)

    async def probe(self, name: str) -> Probe:
        """Make one; a text that tells of a failure has the cause in its first sentence, and then what to do."""
        try:
            return Probe(name, *await getattr(self, name)())
        except (ProxyError, LoginFailed, OSError) as fault:
            error = self._failure(fault) if isinstance(fault, OSError) else fault
            cause, stop, cure = str(error).partition(". ")
            better = _CERTIFICATE.get(getattr(error.__context__, "verify_code", 0))
            return Probe(name, "failed", cause + stop.rstrip(), better or cure or _LOGIN.get(type(error), ""))

    async def keys(self) -> tuple[str, ...]:
        try:
            return "ok", f"access key {last_four(self._credentials().access_key)}"
        except ValueError as error:
            return "failed", f"The keys could not be read ({error}).", "Put them there again, one line of text each."

    async def port(self) -> tuple[str, ...]:
        """Listen as the proxy would, at all at once, and where it can't, look who is there: ours or another program."""
        every, running = (*self._settings.listen, *self._settings.metrics_listen), list[Address]()
        where = "METQUAY_LISTEN (--listen)" + " or METQUAY_METRICS_LISTEN" * len(self._settings.metrics_listen)
        while free := [address for address in every if address not in running]:
            try:
                release(bind(free, self._settings.socket_mode, where))
                break
            except CannotListen as error:
                if not (error.taken and await self._is_ours(error.address)):
                    return "failed", error.cause, error.cure
                if (wrong := self._is_another(error.address)) is not None:
                    return "failed", *wrong
                running.append(error.address)
        told = {True: "a metquay-proxy is running at {}", False: "the proxy can listen at {}"}
        return "ok", "; ".join(told[address in running].format(address) for address in every)

    async def _is_ours(self, address: Address) -> bool:
        """Whether all who listen at an address are proxies of ours."""
        answers, tls = [], self._settings.tls_cert is not None and address in self._settings.listen
        for host in address.reach:
            with contextlib.suppress(OSError):  # nobody is there, or nobody of ours
                answers.append(await in_thread(partial(health.ask, address._replace(host=host), "/-/status", tls=tls)))
        ours = [answer for answer in answers if health.is_ours(answer)]
        with contextlib.suppress(ValueError, IndexError, TypeError):
            told = json.loads(ours[0].partition(b"\r\n\r\n")[2])
            self._status = told if "upstream" in told else self._status
        return 0 < len(answers) == len(ours)

    def _is_another(self, address: Address) -> tuple[str, str] | None:
        """Return what is wrong if the proxy that runs here is not the one of these settings, as far as it tells us."""
        where, upstream = f"The metquay-proxy that runs at {address}", self._running("upstream")
        if self._settings.sandbox or address not in self._settings.listen or upstream is None:
            return None
        if upstream != str(self._base):
            whom = "the built-in sandbox" if self._running("sandbox") else upstream
            return f"{where} forwards to {whom}, not to {self._base}.", "Stop it, then start it with these settings."
        if self._running("token", "rejected"):
            return f"{where} was started with keys that Metquay refuses.", "Start it again, to read these settings."
        return None

    def _running(self, *names: str) -> Any:  # noqa: ANN401 - text or number
        """Return a figure of the proxy that runs here; None where there is none, or none that tells us."""
        try:
            return reduce(getitem, names, self._status)
        except (LookupError, TypeError):  # whoever listens there may tell anything
            return None

    async def audit(self) -> tuple[str, ...]:
        """Ask what the proxy asks at its start, and whether one that runs has lost lines."""
        path = self._settings.audit_log
        if path is None:
            return "skipped", "METQUAY_AUDIT_LOG is not set"
        try:
            try_log(path)
        except OSError as error:
            return "failed", f"The proxy {why_not(path, error)}.", "Let this user write it, or choose another file."
        trouble, lost = self._running("audit", "trouble"), self._running("audit", "lost")
        if trouble or lost:
            cause = f"The running proxy failed to write {path}: {trouble or 'its log says why'} (lines lost: {lost})."
            return "failed", cause, "Mend that, and it goes on by itself; once restarted, it counts from 0."
        return "ok", f"{path} can be written"

    async def dns(self) -> tuple[str, ...]:
        found = await asyncio.get_running_loop().getaddrinfo(*self._first)
        return "ok", f"{self._first[0]} has the address {found[0][4][0]}"

    async def tcp(self) -> tuple[str, ...]:
        async with asyncio.timeout(self._settings.connect_timeout):
            _, writer = await asyncio.open_connection(*self._first)
        writer.close()
        return "ok", f"connected to {Address(*self._first)}"

    async def tls(self) -> tuple[str, ...]:
        if self._base.scheme == "http":
            return "skipped", "not used within this machine"
        await self.transport.warm()
        return "ok", "the certificate is good"

    async def clock(self) -> tuple[str, ...]:
        head, _ = await ask(self.transport, self._base, "GET /authenticate")
        date = b"".join(value for name, value in head.headers if name.lower() == b"date")
        try:
            ahead = time.time() - parsedate_to_datetime(date.decode("latin-1")).timestamp()
        except ValueError:
            return "skipped", "the server does not tell the time"
        if abs(ahead) <= MAX_SKEW:
            return "ok", f"{abs(ahead):.0f} s away from Metquay's clock"
        cause = f"This computer's clock is {abs(ahead) / 60:.0f} minutes {'ahead' if ahead > 0 else 'behind'}."
        return "failed", cause, "Set its date, time and time zone, or better, let it set them by itself."

    async def login(self) -> tuple[str, ...]:
        token = await Login(self.transport, self._base, self._credentials, time.monotonic).token()
        self._authorization = token.authorization.decode()
        return "ok", f"a token for {token.lifetime:.0f} s"

    async def read(self) -> tuple[str, ...]:
        head, body = await ask(self.transport, self._base, "GET /customers?limit=1", self._authorization)
        status = head.status
        if status == HTTPStatus.OK and body[:1] == b"[":
            return "ok", "one customer was read"
        cure = _WAIT if status >= HTTPStatus.INTERNAL_SERVER_ERROR else _HOST
        cause, cure = _READ.get(status, (f"A read was not answered as it should be (status {status}).", cure))
        return "failed", cause.format(self._base), cure

    async def quota(self) -> tuple[str, ...]:
        rate, used = self._settings.rate_limit, self._running("quota", "used")
        if rate is None:
            return "skipped", "METQUAY_RATE_LIMIT is off"
        unknown = "only a running proxy that needs no client key tells how many are left"
        left = unknown if used is None else f"{max(0, rate.limit - used)} of them are left"
        return "ok", f"{rate.limit} requests in {rate.window:g} s; {left}"

    async def redis(self) -> tuple[str, ...]:
        """Run a script in Redis, as each replica does, and in the time that it gets."""
        address = self._settings.redis_url
        if address is None:
            return "skipped", "METQUAY_REDIS_URL is not set: this proxy shares its quota with nobody"
        from metquay_proxy.replicas import store as shared  # noqa: PLC0415 - only who shares pays for loading it

        tls = tls_context(self._settings.ca_bundle) if address.scheme == "rediss" else None
        try:
            async with contextlib.AsyncExitStack() as stack:
                store = shared.Store(address, self._settings.redis_secret, tls)
                stack.push_async_callback(store.close)
                await store.connect()
                await store.ping()
        except (shared.Away, ValueError) as why:
            cure = "Until that is mended, each proxy keeps to its own part of the quota. Check METQUAY_REDIS_URL."
            return "failed", f"Redis at {address} can't be used: {why}.", cure
        return "ok", f"Redis at {address} answers in time"
