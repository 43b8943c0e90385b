"""``metquay-proxy check``: what lies between this machine and an answer of Metquay, tried in order.

Owns the probes: for each failure a sentence of cause and one of cure, for people who are no programmers. Must not
change anything in Metquay (it logs in, and reads one customer) and must show nothing secret.

Facts: RFC 9110 section 6.6.1 (Date, against which our clock is held: where that is wrong, good certificates look bad).
OpenSSL's X509_V_ERR numbers 9 and 10 (not yet, no longer valid), 18 to 21 (the issuer is not known), 62 and 64 (another
name). Logins don't count for the quota, so that their address is asked for the time.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections import Counter
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from aiohttp.streams import EMPTY_PAYLOAD

from metquay_proxy.audit import try_log, why_not
from metquay_proxy.exchange.body import ReplayBudget, RequestBody
from metquay_proxy.exchange.tokens import Credentials, CredentialsRejected, LoginBusy, LoginFailed
from metquay_proxy.listeners import CannotListen, bind, release
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.sandbox import server as simulator
from metquay_proxy.settings import SettingsError, last_four, outbound_proxy
from metquay_proxy.upstream.pool import Login, Transport, tls_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from metquay_proxy.rules.address import Address
    from metquay_proxy.settings import Settings

MAX_SKEW: Final = 120.0
"""Seconds by which this machine's clock may differ from Metquay's."""
_LOCAL_TIMEOUT: Final = 3.0
_NEEDS: Final = {
    "keys": "",
    "port": "",
    "audit": "",
    "dns": "",
    "tcp": "dns",
    "tls": "tcp",
    "clock": "tls",
    "login": "keys tls",
    "read": "login",
    "quota": "read",
    "redis": "",
}
_WAIT: Final = "Metquay is restarting or has too much to do: wait a few minutes, then check again."
_HOST: Final = (
    "Check METQUAY_HOST: another server answers there, or the network wants you to log in by a browser first."
)
_KEYS: Final = "Check METQUAY_ACCESS_KEY and METQUAY_SECRET_KEY: copied whole, not withdrawn, and of this laboratory."
_EXPIRED: Final = (
    "The certificate of {} is not valid at this date.",
    "Check this computer's date and time first; if they are right, the server's owner must renew it.",
)
_UNKNOWN: Final = (
    "This computer does not know who issued the certificate of {}: a company firewall, perhaps, or a CA of your own.",
    "Ask its administrators for the CAs' certificates (PEM), the issuing one too: METQUAY_CA_BUNDLE names them.",
)
_OTHER: Final = ("The certificate of {} is for another name.", "Check METQUAY_HOST for a typing mistake.")
_NO_TLS: Final = (
    "{} does not answer as a secure (https) server does.",
    "Check METQUAY_HOST; usually it names no port.",
)
_CERTIFICATE: Final = {9: _EXPIRED, 10: _EXPIRED, **dict.fromkeys(range(18, 22), _UNKNOWN), 62: _OTHER, 64: _OTHER}
_ANSWERS: Final = {
    401: ("Metquay gave a token and then did not take it.", "Check again; if it stays so, tell Metquay's support."),
    403: ("These keys may not read customers.", "Ask whoever looks after Metquay to allow this API client to."),
    404: ("Metquay's API is not at {}.", "Check METQUAY_HOST: usually it is a name without a path."),
    429: (
        "The quota of these keys is used up.",
        "Wait a minute; let all programs with these keys go through one proxy.",
    ),
}


class Probe(NamedTuple):
    """What came of one probe: ``ok``, ``failed`` or ``skipped``; ``cure`` is empty unless it failed."""

    name: str
    outcome: str
    text: str
    cure: str = ""
    ms: float = 0.0
    """Its time in milliseconds."""


def run(load: Callable[[], Settings], *, sandbox: bool, as_json: bool) -> int:
    """Try everything and print a line for each probe (``as_json``: one object); return 0 if none failed, else 1.

    ``load`` finds the settings and raises ``SettingsError``; ``sandbox``: the simulator takes Metquay's place.
    """
    probes: list[Probe] = []
    warnings: list[str] = []

    def loaded() -> Settings:
        settings = load()
        warnings.extend(settings.warnings)
        return settings

    async def probe_all() -> None:
        async for probe in probed(loaded, sandbox=sandbox):
            probes.append(probe)
            took = "" if probe.outcome == "skipped" else f"{probe.ms:.0f} ms"
            if not as_json:
                line = f"{probe.outcome:8} {probe.name:8} {took:>8}  {probe.text} {probe.cure}"
                print(line.rstrip(), flush=True)  # noqa: T201 - what the command is for

    asyncio.run(probe_all())
    good = all(probe.outcome != "failed" for probe in probes)
    told = {
        "ok": good,
        "summary": _summary(probes, warned=bool(warnings)),
        "probes": [probe._asdict() for probe in probes],
    }
    print(json.dumps(told, indent=2) if as_json else told["summary"])  # noqa: T201 - as above
    return 0 if good else 1


def _summary(probes: Sequence[Probe], *, warned: bool) -> str:
    count = Counter(probe.outcome for probe in probes)
    if count["failed"]:
        first = "; begin with the first" if count["failed"] > 1 else ""
        return f"{count['failed']} of {len(probes)} checks failed{first}."
    well = "Nothing failed, but there is a warning about the settings" if warned else "All is well"
    return f"{well}: {count['ok']} checks passed, {count['skipped']} had nothing to try."


async def probed(load: Callable[[], Settings], *, sandbox: bool = False) -> AsyncIterator[Probe]:
    """Yield the outcome of each probe, in order; those that need one that failed are skipped."""
    try:
        settings = load()
    except SettingsError as error:
        cure = "Correct that; `metquay-proxy settings` shows where each setting comes from."
        yield Probe("settings", "failed", " ".join(f"{line}." for line in (*error.warnings, *error.lines)), cure)
        return
    warnings = (warning for warning in settings.warnings if warning not in settings.doubts)  # `keys` tells those
    yield Probe("settings", "ok", "; ".join(warnings) or "complete")
    server = simulator.Sandbox()
    if sandbox:
        await server.start()
        keys = Credentials(simulator.ACCESS_KEY, simulator.SECRET_KEY)
        check = _Check(settings, BaseURL.parse(server.url), lambda: keys)
    else:
        assert settings.host is not None  # noqa: S101 - `load` has seen to it
        check = _Check(settings, settings.host, settings.credentials)
    broken: set[str] = set()
    try:
        for name, needs in _NEEDS.items():
            missing = [need for need in needs.split() if need in broken]
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
        self._settings = settings
        self._base = base
        self._credentials = credentials
        proxy = outbound_proxy(settings, base)
        self._first = (base.name, base.port) if proxy is None else (proxy.host, proxy.port)
        self._variable = "METQUAY_HOST" if proxy is None else "METQUAY_OUTBOUND_PROXY (or the system's proxy setting)"
        self._token = b""
        self._own_status = b""
        self.transport = Transport(
            base,
            ssl_context=tls_context(settings.ca_bundle) if base.scheme == "https" else None,
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            outbound_proxy=proxy,
        )

    async def probe(self, name: str) -> Probe:
        try:
            return Probe(name, *await getattr(self, f"_{name}")())
        except ProxyError as error:
            cause, _, cure = error.message.partition(". ")
            return Probe(name, "failed", f"{cause}.", cure)

    async def _keys(self) -> tuple[str, ...]:
        try:
            keys = self._credentials()
            return "ok", "; ".join((f"access key {last_four(keys.access_key)}", *keys.doubts()))
        except ValueError as error:
            return "failed", f"The keys could not be read ({error}).", "Put them there again, one line of text each."

    async def _port(self) -> tuple[str, ...]:
        """Listen as the proxy would, and where it can't, look who is there: a proxy of ours, or another program."""
        free, ours = [], []
        for address in self._settings.listen:
            try:
                release(bind([address], self._settings.socket_mode))
                free.append(str(address))
            except CannotListen as error:
                if not (error.taken and await self._is_ours(address)):
                    return "failed", error.cause, error.cure
                ours.append(str(address))
        told = [f"{' and '.join(free)} can be listened on"] if free else []
        return "ok", "; ".join(told + ([f"a metquay-proxy is running at {' and '.join(ours)}"] if ours else []))

    async def _is_ours(self, address: Address) -> bool:
        """Whether all who listen at an address are proxies of ours."""
        context = None
        if self._settings.tls_cert:
            context = ssl._create_unverified_context()  # noqa: S323, SLF001 - ourselves, and nothing secret is asked
        answers = []
        for host in address.reach:
            try:
                async with asyncio.timeout(_LOCAL_TIMEOUT):
                    if address.path:
                        streams = await asyncio.open_unix_connection(
                            address.path, ssl=context, server_hostname=context and "localhost"
                        )
                    else:
                        streams = await asyncio.open_connection(host, address.port, ssl=context)
            except ssl.SSLError:
                return False
            except OSError:
                continue
            answers.append(await _asked(*streams))
        ours = [answer for answer in answers if b"X-Metquay-Proxy-" in answer or b'"quota"' in answer]
        self._own_status = ours[0] if ours else b""
        return 0 < len(answers) == len(ours)

    async def _audit(self) -> tuple[str, ...]:
        """Ask what the proxy asks at its start, and whether one that runs has lost lines."""
        path = self._settings.audit_log
        if path is None:
            return "skipped", "METQUAY_AUDIT_LOG is not set"
        try:
            try_log(path)
        except OSError as error:
            cure = "Make it possible for this user, or choose another file in METQUAY_AUDIT_LOG."
            return "failed", f"The proxy {why_not(path, error)}.", cure
        try:
            figures = json.loads(self._own_status.partition(b"\r\n\r\n")[2])["audit"]
            lost, trouble = figures["lost"], figures["trouble"]
        except (ValueError, LookupError, TypeError):
            lost, trouble = 0, None
        if trouble:
            return (
                "failed",
                f"The running proxy cannot write {path}: {trouble}.",
                "Mend that; it then goes on by itself.",
            )
        if lost:
            cause = f"The running proxy has lost {lost} lines of {path}."
            return "failed", cause, "Its log says why. Once that is mended start it again, so that it counts anew."
        return "ok", f"{path} can be written"

    async def _dns(self) -> tuple[str, ...]:
        host, port = self._first
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            cure = f"Check {self._variable} for a typing mistake, and whether this computer is online (cable, VPN)."
            return "failed", f"The network does not know the name {host}.", cure
        return "ok", f"{host} is {found[0][4][0]}"

    async def _tcp(self) -> tuple[str, ...]:
        place = ":".join(map(str, self._first))
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                _, writer = await asyncio.open_connection(*self._first)
        except ConnectionRefusedError:
            return "failed", f"Nothing listens at {place}.", f"Check {self._variable} and its port."
        except OSError:
            cure = (
                "Check the network (cable, VPN). Where all must go through a company proxy, set METQUAY_OUTBOUND_PROXY."
            )
            return "failed", f"{place} does not answer.", cure
        writer.close()
        return "ok", f"connected to {place}"

    async def _tls(self) -> tuple[str, ...]:
        if self._base.scheme == "http":
            return "skipped", "not used within this machine"
        try:
            await self.transport.warm()
        except ProxyError as error:
            reason = error.__context__
            no_tls = isinstance(reason, ssl.SSLError) and not isinstance(reason, ssl.SSLCertVerificationError)
            known = _NO_TLS if no_tls else _CERTIFICATE.get(getattr(reason, "verify_code", 0))
            if known is None:
                raise
            return "failed", known[0].format(self._base.authority), known[1]
        return "ok", "the certificate is good"

    async def _clock(self) -> tuple[str, ...]:
        _, date, _ = await self._ask("/authenticate")
        try:
            ahead = time.time() - parsedate_to_datetime(date).timestamp()
        except ValueError:
            return "skipped", "the server tells no time"
        if abs(ahead) <= MAX_SKEW:
            return "ok", f"{abs(ahead):.0f} s apart"
        cause = f"This computer's clock is {abs(ahead) / 60:.0f} minutes {'ahead' if ahead > 0 else 'behind'}."
        return "failed", cause, "Set its date, time and time zone; best let it set them by itself."

    async def _login(self) -> tuple[str, ...]:
        try:
            token = await Login(self.transport, self._base, self._credentials, time.monotonic).token()
        except CredentialsRejected as error:
            return "failed", str(error), _KEYS
        except LoginFailed as error:
            cause, _, cure = str(error).partition(". ")
            if cure:  # it says itself what to do
                return "failed", f"{cause}.", cure
            return "failed", str(error), _WAIT if isinstance(error, LoginBusy) else _HOST
        self._token = token.authorization
        return "ok", f"a token for {token.lifetime:.0f} s"

    async def _read(self) -> tuple[str, ...]:
        status, _, body = await self._ask("/customers?limit=1")
        if status in _ANSWERS:
            cause, cure = _ANSWERS[status]
            return "failed", cause.format(self._base), cure
        if status >= 500:  # noqa: PLR2004 - RFC 9110 section 15.6, the server's errors
            return "failed", f"Metquay is out of order (status {status}).", _WAIT
        if status != 200 or body[:1] != b"[":  # noqa: PLR2004 - what the vendor documents
            return "failed", f"The answer to a read was not Metquay's (status {status}).", _HOST
        return "ok", "one customer"

    async def _quota(self) -> tuple[str, ...]:
        rate = self._settings.rate_limit
        if rate is None:
            return "skipped", "METQUAY_RATE_LIMIT is off"
        try:
            used = json.loads(self._own_status.partition(b"\r\n\r\n")[2])["quota"]["used"]
        except (ValueError, LookupError, TypeError):
            why = "a running proxy tells only who has a client key" if self._settings.keys else "no running proxy says"
            return "ok", f"{rate.limit} in {rate.window:g} s; {why} how many are used"
        return "ok", f"{max(0, rate.limit - used)} of {rate.limit} in {rate.window:g} s are left"

    async def _redis(self) -> tuple[str, ...]:
        """Run a script in Redis, as each replica does, and in the time that it gets."""
        address = self._settings.redis_url
        if address is None:
            return "skipped", "METQUAY_REDIS_URL is not set: this proxy shares its quota with nobody"
        from metquay_proxy.replicas import store as shared  # noqa: PLC0415 - only who shares pays for loading it

        tls = tls_context(self._settings.ca_bundle) if address.scheme == "rediss" else None
        store = None
        try:
            store = shared.Store(address, self._settings.redis_secret, tls)
            await store.connect()
            await store.ping()
        except shared.Away as away:
            cure = "Until it is mended each proxy keeps to its own part of the quota. Check METQUAY_REDIS_URL."
            return "failed", f"Redis at {address}: {away}.", cure
        except (OSError, ValueError):
            return "failed", "Redis's password could not be read.", "Check METQUAY_REDIS_PASSWORD_FILE."
        finally:
            if store is not None:
                await store.close()
        return "ok", f"Redis at {address} answers in time"

    async def _ask(self, path: str) -> tuple[int, str, bytes]:
        """GET a path below the base; return status, Date and the beginning of the body."""
        head = f"GET {self._base.prefix}{path} HTTP/1.1\r\nHost: {self._base.authority}\r\n".encode("ascii")
        if self._token:
            head += b"Authorization: %b\r\n" % self._token
        nothing = RequestBody(EMPTY_PAYLOAD, present=False, chunked=False, limit=0, budget=ReplayBudget(0), timeout=1)
        response = await self.transport.send("GET", head + b"Accept: application/json\r\n\r\n", nothing)
        try:
            body = b"" if response.ended else await response.read()
        finally:
            response.close()
        dates = [value for name, value in response.head.headers if name.lower() == b"date"]
        return response.head.status, b"".join(dates).decode("latin-1"), body


async def _asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Return what a listener of this machine says to the question for a proxy's status; nothing if it says nothing."""
    try:
        async with asyncio.timeout(_LOCAL_TIMEOUT):
            writer.write(b"GET /-/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return await reader.read()
    except OSError:
        return b""
    finally:
        writer.close()
