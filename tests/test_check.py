from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import re
import socket
import ssl
import sys
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy.check import Probe, probed, run
from metquay_proxy.listeners import CannotListen
from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults, Sandbox
from metquay_proxy.settings import Settings, load
from tests.redis_server import needs_redis, redis_server
from tests.running import running
from tests.wire import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

SKIPPED_AFTER = {
    "keys": {"login", "read", "quota"},
    "port": set(),
    "audit": set(),
    "dns": {"tcp", "tls", "clock", "login", "read", "quota"},
    "tcp": {"tls", "clock", "login", "read", "quota"},
    "tls": {"clock", "login", "read", "quota"},
    "clock": set(),
    "login": {"read", "quota"},
    "read": {"quota"},
    "redis": set(),
}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Find no settings but a test's own, and no corporate proxy of the machine's."""
    monkeypatch.chdir(tmp_path)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Make a certificate authority that no machine trusts."""
    return trustme.CA()


def closed_port() -> int:
    """Return a port at which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.asynccontextmanager
async def metquay(
    authority: trustme.CA | None = None, name: str = "localhost", *, expired: bool = False
) -> AsyncIterator[Sandbox]:
    """Run a Metquay; ``authority`` signs its certificate for ``name``."""
    context = None
    if authority is not None:
        yesterday = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
        dates = {"not_before": yesterday - dt.timedelta(days=9), "not_after": yesterday} if expired else {}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name, **dates).configure_cert(context)
    sandbox = Sandbox(ssl_context=context)
    await sandbox.start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


@contextlib.asynccontextmanager
async def answering(head: str, body: str = "") -> AsyncIterator[int]:
    """Run a server that gives one answer to all; yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def probes(host: str, then: Callable[[], None] = lambda: None, **settings: str) -> dict[str, Probe]:
    """Check with these settings, given as texts, and return the probes by name; ``then`` happens once they are read."""

    def loaded() -> Settings:
        keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "listen": "localhost:0"}
        found = load(
            {"host": host, **keys, **settings} if "access_key_file" not in settings else {"host": host, **settings}
        )
        then()
        return found

    return {probe.name: probe async for probe in probed(loaded)}


def assert_failed(found: dict[str, Probe], name: str, cause: str, cure: str) -> None:
    """The probe failed with this cause and this cure; what needs it was skipped, and all else was tried."""
    assert name in {probe.name for probe in found.values() if probe.outcome == "failed"}, found
    assert re.search(cause, found[name].text), found[name]
    assert re.search(cure, found[name].cure), found[name]
    for probe in found.values():
        if probe.name in SKIPPED_AFTER[name]:
            assert "skipped" == probe.outcome, probe
            assert probe.text.startswith("needs ")
        elif probe.name != name:
            assert probe.outcome in {"ok", "skipped"}, probe
            assert not probe.text.startswith("needs ")
    for probe in found.values():
        words = probe.text + probe.cure
        assert SECRET_KEY not in words
        assert not re.search(r"\w+Error|Exception|Errno|None|\[SSL|_ssl", words), words


async def test_all_is_well(authority: trustme.CA, tmp_path: Path) -> None:
    """Against a Metquay with a good certificate everything is tried and nothing fails."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with metquay(authority) as sandbox:
        found = await probes(f"https://localhost:{sandbox.port}", ca_bundle="ca.pem")
    names = ["settings", "keys", "port", "audit", "dns", "tcp", "tls", "clock", "login", "read", "quota", "redis"]
    assert names == list(found)
    assert {"ok": 10, "skipped": 2} == {
        outcome: [probe.outcome for probe in found.values()].count(outcome) for outcome in ("ok", "skipped")
    }
    assert "access key ...-key" == found["keys"].text
    assert "a token for 900 s" == found["login"].text
    assert all(probe.ms >= 0 for probe in found.values())
    assert found["tls"].ms > 0
    assert 0 == len(sandbox.writes)


async def test_settings_are_wrong() -> None:
    """Wrong settings are the first probe, and the only one: each variable is named."""

    def loaded() -> Settings:
        return load({"access_key": "k", "retries": "many"})

    found = [probe async for probe in probed(loaded)]
    assert ["settings"] == [probe.name for probe in found]
    assert "failed" == found[0].outcome
    for variable in ("METQUAY_HOST", "METQUAY_SECRET_KEY", "METQUAY_RETRIES"):
        assert variable in found[0].text


async def test_a_key_file_is_gone(tmp_path: Path) -> None:
    """A secret file that can't be read (any more) is named; the network is tried all the same."""
    (tmp_path / "access").write_text(ACCESS_KEY)
    (tmp_path / "secret").write_text(SECRET_KEY)
    async with metquay() as sandbox:
        found = await probes(
            sandbox.url,
            (tmp_path / "secret").unlink,
            access_key_file="access",
            secret_key_file="secret",  # noqa: S106 - a file's name
        )
    assert_failed(found, "keys", "could not be read .secret: No such file", "Put them there again")


async def test_the_audit_log(tmp_path: Path) -> None:
    """What would keep the proxy from starting is found, and to look for it leaves nothing behind."""
    async with metquay() as sandbox:
        path = tmp_path / "audit.log"
        assert "ok" == (await probes(sandbox.url, audit_log=str(path)))["audit"].outcome
        assert not path.exists()
        found = await probes(sandbox.url, audit_log=str(tmp_path))
        assert_failed(found, "audit", f"cannot write {tmp_path}: Is a directory", "choose another file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
async def test_the_audit_log_of_a_running_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that can't write its lines, or has lost some, is told of."""
    async with metquay() as sandbox, running(sandbox.url, audit_log="/dev/full") as (proxy, url):
        listen = url.partition("//")[2]
        proxy.server._audit.write({"n": 1})
        await eventually(lambda: proxy.status()["audit"]["trouble"])
        found = await probes(sandbox.url, listen=listen, audit_log="/dev/full")
        assert_failed(found, "audit", "cannot write /dev/full: No space left on device", "goes on by itself")
        monkeypatch.setattr(proxy._audit, "status", lambda: {"waiting": 0, "lost": 3, "trouble": None})
        found = await probes(sandbox.url, listen=listen, audit_log="/dev/full")
        assert_failed(found, "audit", "has lost 3 lines of /dev/full", "start it again")


async def test_the_name_is_unknown() -> None:
    """A host that has no address is most likely a typing mistake."""
    assert_failed(
        await probes("metquay.invalid"), "dns", "does not know the name metquay.invalid", "METQUAY_HOST.*online"
    )


async def test_nothing_listens() -> None:
    """A port at which nothing listens."""
    port = closed_port()
    found = await probes(f"http://127.0.0.1:{port}")
    assert_failed(found, "tcp", f"Nothing listens at 127.0.0.1:{port}", "METQUAY_HOST and its port")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops connections that a full queue has no room for")
async def test_no_answer() -> None:
    """A network that lets nothing through is given up after the connect time-out."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)  # noqa: FBT003 - the standard library's own
            filler.connect_ex(address)
        found = await probes(f"http://127.0.0.1:{address[1]}", connect_timeout="0.2")
        for filler in fillers:
            filler.close()
    assert_failed(found, "tcp", "does not answer", "VPN.*METQUAY_OUTBOUND_PROXY")


async def test_a_firewall_looks_into_tls(authority: trustme.CA) -> None:
    """A certificate of an unknown issuer means a company firewall, whose certificate is to be trusted."""
    async with metquay(authority) as sandbox:
        found = await probes(f"https://localhost:{sandbox.port}")
    assert_failed(found, "tls", "localhost.*company firewall", "administrators.*METQUAY_CA_BUNDLE")


async def test_the_certificate_is_for_another_name(authority: trustme.CA, tmp_path: Path) -> None:
    """A wrong host that speaks TLS is told by its certificate's name."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with metquay(authority, "other.example") as sandbox:
        found = await probes(f"https://localhost:{sandbox.port}", ca_bundle="ca.pem")
    assert_failed(found, "tls", "for another name", "METQUAY_HOST for a typing mistake")


async def test_the_certificate_has_expired(authority: trustme.CA, tmp_path: Path) -> None:
    """An expired certificate is first of all a reason to look at this computer's own date."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with metquay(authority, expired=True) as sandbox:
        found = await probes(f"https://localhost:{sandbox.port}", ca_bundle="ca.pem")
    assert_failed(found, "tls", "not valid at this date", "date and time first")


async def test_the_port_is_not_tls() -> None:
    """A server that answers in clear text where TLS is expected."""
    async with metquay() as sandbox:
        found = await probes(f"https://localhost:{sandbox.port}")
    assert_failed(found, "tls", "does not answer as a secure", "names no port")


@pytest.mark.parametrize(("hours", "way"), [(-3, "ahead"), (3, "behind")])
async def test_the_clock_is_off(hours: int, way: str) -> None:
    """The computer's clock is held against Metquay's, and minutes are told; the login is tried all the same."""
    date = formatdate(dt.datetime.now().timestamp() + hours * 3600, usegmt=True)  # noqa: DTZ005 - a timestamp
    async with answering(f"200 OK\r\nDate: {date}", "[]") as port:
        found = await probes(f"http://127.0.0.1:{port}")
    assert re.search(f"clock is 180 minutes {way}", found["clock"].text)
    assert "time zone" in found["clock"].cure
    assert ("failed", "failed") == (found["clock"].outcome, found["login"].outcome)


async def test_no_date() -> None:
    """A server that tells no time is none that the clock can be held against."""
    async with answering("204 No Content") as port:
        assert "skipped" == (await probes(f"http://127.0.0.1:{port}"))["clock"].outcome


async def test_the_keys_are_refused() -> None:
    """Keys that Metquay refuses: which ones, and what may be wrong with them."""
    async with metquay() as sandbox:
        found = await probes(sandbox.url, secret_key="a-key-that-is-wrong")  # noqa: S106 - nobody's
    assert_failed(found, "login", "refused the key pair", "METQUAY_SECRET_KEY: copied whole")


async def test_the_keys_look_wrong() -> None:
    """What looks wrong about them is said where they are read, and beside their refusal, without showing them."""
    async with metquay() as sandbox:
        found = await probes(sandbox.url, access_key=f'"{ACCESS_KEY}"', secret_key="<secret key>")  # noqa: S106 - nobody's
    marks = "METQUAY_ACCESS_KEY has quotation marks, .* take them away .docker --env-file keeps them.; "
    assert re.fullmatch(f"access key \\*\\*\\*; {marks}METQUAY_SECRET_KEY is a placeholder: .*", found["keys"].text)
    assert ("ok", "complete") == (found["keys"].outcome, found["settings"].text)
    assert_failed(found, "login", "refused the key pair .* has quotation marks, .* is a placeholder", "copied whole")
    assert ACCESS_KEY not in str(found)


async def test_the_login_is_out_of_order() -> None:
    """A login that is out of order is a matter of waiting."""
    async with metquay() as sandbox:
        sandbox.faults = Faults(login_outage=True)
        assert_failed(await probes(sandbox.url), "login", "status 503", "wait a few minutes")


@pytest.mark.parametrize(
    ("answer", "text", "cure"),
    [
        (
            "429 Too Many Requests\r\nRetry-After: 60",
            "status 429 and asks to be left alone for 60 s",
            "wait a few minutes",
        ),
        (
            "301 Moved\r\nLocation: https://eu.metquay.co/api/v1/authenticate",
            "was redirected \\(status 301\\) to https://eu.metquay.co/api/v1/authenticate.$",
            "^METQUAY_HOST should probably be https://eu.metquay.co/api/v1.$",
        ),
    ],
)
async def test_the_login_says_what_is_wrong(answer: str, text: str, cure: str) -> None:
    """Where it has moved to, or that it is asked for too much."""
    async with answering(f"{answer}\r\nDate: {formatdate(usegmt=True)}", "") as port:
        assert_failed(await probes(f"http://127.0.0.1:{port}"), "login", text, cure)


async def test_another_server_answers() -> None:
    """A web page in place of a login: a wrong host, or a network that wants to be logged in to."""
    date = formatdate(usegmt=True)
    async with answering(f"200 OK\r\nDate: {date}\r\nContent-Type: text/html", "<html>Welcome to the hotel") as port:
        found = await probes(f"http://127.0.0.1:{port}")
    assert_failed(found, "login", "something other than JSON", "METQUAY_HOST.*log in by a browser")


@pytest.mark.parametrize(
    ("status", "cause", "cure"),
    [
        (401, "did not take it", "support"),
        (403, "may not read customers", "allow this API client"),
        (429, "quota of these keys is used up", "one proxy"),
        (500, "out of order", "wait a few minutes"),
        (410, "not Metquay's", "METQUAY_HOST"),
    ],
)
async def test_the_read_is_refused(status: int, cause: str, cure: str) -> None:
    """The login works and a read does not: what Metquay says to it decides what to do."""
    async with metquay() as sandbox:
        sandbox.faults = Faults(fail={status: 1.0})
        assert_failed(await probes(sandbox.url), "read", cause, cure)


async def test_the_port_is_taken() -> None:
    """Another program listens where the proxy is to; the rest is tried all the same."""
    async with metquay() as sandbox, answering("200 OK", "alive\n") as port:
        found = await probes(sandbox.url, listen=f"127.0.0.1:{port}")
    assert_failed(found, "port", f"127.0.0.1:{port} is taken by another program", "METQUAY_LISTEN .--listen")


async def test_a_silent_program_has_the_port() -> None:
    """A program that closes without a word is another program too."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with metquay() as sandbox, server:
        found = await probes(sandbox.url, listen=f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert_failed(found, "port", "another program", "Stop that one")


async def test_a_proxy_is_running() -> None:
    """A running proxy is no program in the way: it says how much of the quota is left."""
    async with metquay() as sandbox, running(sandbox.url) as (_, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /customers HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        found = await probes(sandbox.url, listen=url.removeprefix("http://"))
    assert "a metquay-proxy is running" in found["port"].text
    assert "99 of 100 in 60 s are left" == found["quota"].text


async def test_a_proxy_with_client_keys_is_running() -> None:
    """It is known by its refusal."""
    async with metquay() as sandbox, running(sandbox.url, client_key="a-long-client-key") as (_, url):
        found = await probes(sandbox.url, listen=url.removeprefix("http://"))
    assert ("ok", "ok") == (found["port"].outcome, found["quota"].outcome)


@pytest.mark.skipif(sys.platform == "win32", reason="Python has no unix sockets on Windows")
async def test_proxies_are_running_at_all_addresses(tmp_path: Path) -> None:
    """A unix socket is asked too; where some addresses are free and some our own, each is told."""
    async with metquay() as sandbox, running(sandbox.url, listen=f"127.0.0.1:0,unix:{tmp_path}/s") as (proxy, url):
        place = url.removeprefix("http://")
        found = await probes(sandbox.url, listen=f"unix:{tmp_path}/s,{place}")
        assert f"a metquay-proxy is running at unix:{tmp_path}/s and {place}" == found["port"].text
        found = await probes(sandbox.url, listen=f"unix:{tmp_path}/t,{place}")
        assert f"unix:{tmp_path}/t can be listened on; a metquay-proxy is running at {place}" == found["port"].text
        assert proxy.ready()
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "listen", ["192.0.2.1:7000", "localhost:0,192.0.2.1:7000", "127.0.0.1:{taken}", "localhost:0,unix:{folder}/none/s"]
)
async def test_what_serve_could_not_listen_on(tmp_path: Path, listen: str) -> None:
    """``check`` asks what ``serve`` asks, for each address, says the same, and leaves nothing behind."""
    async with metquay() as sandbox, answering("200 OK", "alive\n") as taken:
        listen = listen.format(taken=taken, folder=tmp_path)
        found = await probes(sandbox.url, listen=f"unix:{tmp_path}/s,{listen}", trust_network="true")
        with pytest.raises(CannotListen) as caught:
            async with running(sandbox.url, listen=listen, trust_network="true"):
                pass
    assert ("failed", caught.value.cause, caught.value.cure) == found["port"][1:4]
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("head", "cause", "cure"),
    [
        ("407 Proxy Authentication Required", "company|corporate", "user name and password.*METQUAY_OUTBOUND_PROXY"),
        ("403 Forbidden", "refused the way to metquay.example:443", "allow this address"),
    ],
)
async def test_the_corporate_proxy_refuses(head: str, cause: str, cure: str) -> None:
    """What the corporate proxy says is told as its own word, not Metquay's."""
    async with answering(head) as port:
        found = await probes("metquay.example", outbound_proxy=f"http://user:pass-word@127.0.0.1:{port}")
    assert_failed(found, "tls", cause, cure)
    assert "pass-word" not in str(found)


@pytest.mark.parametrize("url", ["socks5://u:pass-word@proxy:1080", "https://u:pass-word@proxy", "pass-word pass-word"])
async def test_the_systems_proxy_cannot_be_used(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """It is said with the settings, and Metquay is asked directly, as by the proxy itself."""
    monkeypatch.setenv("HTTPS_PROXY", url)
    found = await probes("metquay.invalid")
    assert "ok" == found["settings"].outcome
    assert re.match("HTTPS_PROXY, or the system's proxy setting, (is|must be) ", found["settings"].text)
    assert_failed(found, "dns", "does not know the name metquay.invalid", "METQUAY_HOST")
    assert "pass-word" not in str(found)


async def test_the_corporate_proxy_wants_another_login() -> None:
    """One that takes no user names and passwords is told by what it wants, and what can stand between."""
    async with answering("407 No\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM") as port:
        found = await probes("metquay.example", outbound_proxy=f"http://user:pass-word@127.0.0.1:{port}")
    assert_failed(
        found, "tls", "refused the way", "login by Negotiate or NTLM.*px .or cntlm.*METQUAY_OUTBOUND_PROXY=http://"
    )


async def test_the_corporate_proxy_is_away() -> None:
    """Where the corporate proxy does not listen, it is its setting that is to be checked."""
    found = await probes("metquay.example", outbound_proxy=f"127.0.0.1:{closed_port()}")
    assert_failed(found, "tcp", "Nothing listens at 127.0.0.1", "METQUAY_OUTBOUND_PROXY")


async def test_who_does_not_share_has_no_redis() -> None:
    """Without METQUAY_REDIS_URL nothing is asked."""
    async with metquay() as sandbox:
        assert "skipped" == (await probes(sandbox.url))["redis"].outcome


@needs_redis
@pytest.mark.slow
async def test_redis_answers_is_gone_or_hangs(tmp_path: Path) -> None:
    """It is well, dead or frozen, and the last two say what it means for the quota; all else is tried just so."""
    with redis_server(tmp_path / "redis") as redis:
        async with metquay() as sandbox:
            found = await probes(sandbox.url, redis_url=redis.url)
            assert ("ok", f"Redis at {redis.url} answers in time") == (found["redis"].outcome, found["redis"].text)
            redis.freeze()
            found = await probes(sandbox.url, redis_url=redis.url)
            assert_failed(found, "redis", "longer than 50 ms", "its own part of the quota")
            redis.kill()
            found = await probes(sandbox.url, redis_url=redis.url)
            assert_failed(found, "redis", "cannot be reached", "METQUAY_REDIS_URL")
            assert "ok" == found["read"].outcome


@pytest.fixture
def sandbox_settings() -> Iterator[Callable[[], Settings]]:
    """Load what ``check --sandbox`` would."""
    yield lambda: load({"listen": "localhost:0", "rate_limit": "off"}, sandbox=True)  # noqa: PT022 - a fixture of one value


def test_one_line_for_each_probe(sandbox_settings: Callable[[], Settings], capsys: pytest.CaptureFixture[str]) -> None:
    """Each probe is a line: outcome, name, time, what was found; nothing failed, so the exit code is 0."""
    assert 0 == run(sandbox_settings, sandbox=True, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert 13 == len(lines)
    assert "All is well: 8 checks passed, 4 had nothing to try." == lines[-1]
    assert re.fullmatch(r"ok +login +\d+ ms  a token for 900 s", lines[8])
    assert re.fullmatch(r"skipped +tls +not used within this machine", lines[6])


def test_json(sandbox_settings: Callable[[], Settings], capsys: pytest.CaptureFixture[str]) -> None:
    """The same as one JSON object, for a program that watches."""
    assert 0 == run(sandbox_settings, sandbox=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert "All is well: 8 checks passed, 4 had nothing to try." == found["summary"]
    assert ["name", "outcome", "text", "cure", "ms"] == list(found["probes"][0])


def test_a_failure_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """One failed probe makes the exit code 1; its line ends with what to do."""
    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "listen": "localhost:0"}
    assert 1 == run(lambda: load({"host": "metquay.invalid", **keys}), sandbox=False, as_json=False)
    assert "failed   dns" in (out := capsys.readouterr().out)
    assert "Check METQUAY_HOST for a typing mistake" in out
    assert "1 of 12 checks failed." == out.splitlines()[-1]


def test_a_warning_is_not_all_well(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line says only what is so: there is a warning above it."""
    settings = {"listen": "localhost:0", "rate_limit": "off", "client_key": "short"}
    assert 0 == run(lambda: load(settings, sandbox=True), sandbox=True, as_json=False)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "Nothing failed, but there is a warning about the settings: 8 checks passed, 4 had nothing to try." == last


def test_what_is_odd_is_told_where_a_setting_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A line of .env that is left out is why."""
    (tmp_path / ".env").write_text("set METQUAY_HOST=lab.metquay.co\n")
    assert 1 == run(load, sandbox=False, as_json=False)
    out = capsys.readouterr().out
    assert out.index("line 1, is left out: that is a command of a shell") < out.index(
        "METQUAY_HOST (--host): is missing"
    )


def test_wrong_settings_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else was tried."""
    assert 1 == run(load, sandbox=False, as_json=False)
    assert "1 of 1 checks failed." == capsys.readouterr().out.splitlines()[-1]
