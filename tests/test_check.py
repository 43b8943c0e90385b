from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import re
import socket
import ssl
import sys
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from metquay_proxy.check import Probe, probed, run
from metquay_proxy.listeners import CannotListen
from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults, Sandbox
from metquay_proxy.settings import Settings, SettingsError, load
from tests.redis_server import needs_redis, redis_server
from tests.running import running
from tests.wire import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

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


async def probes(host: str, then: Callable[[], object] = int, **settings: str) -> dict[str, Probe]:
    """Check with these settings, given as texts, and return the probes by name; ``then`` happens once they are read."""

    def loaded() -> Settings:
        keys = {} if "access_key_file" in settings else {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        found = load({"host": host, "listen": "localhost:0", **keys, **settings})
        then()
        return found

    return {probe.name: probe async for probe in probed(loaded)}


def timely() -> str:
    """Return a Date field of now."""
    return f"Date: {formatdate(usegmt=True)}"


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
@pytest.mark.parametrize(("pipe", "why"), [(False, "secret: No such file"), (True, "secret: not a regular file")])
async def test_a_key_file_is_gone(tmp_path: Path, pipe: bool, why: str) -> None:  # noqa: FBT001 - a table
    """A secret file that can't be read (any more), or would block, is named; the network is tried all the same."""
    (tmp_path / "access").write_text(ACCESS_KEY)
    (tmp_path / "secret").write_text(SECRET_KEY)

    def lose() -> None:
        (tmp_path / "secret").unlink()
        if pipe:
            os.mkfifo(tmp_path / "secret")

    async with metquay() as sandbox:
        files = {"access_key_file": "access", "secret_key_file": "secret"}
        assert_failed(
            await probes(sandbox.url, lose, **files), "keys", f"could not be read .*{why}", "Put them there again"
        )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
async def test_nothing_waits_for_a_pipe(tmp_path: Path) -> None:
    """A FIFO in the place of a file is told of."""
    os.mkfifo(tmp_path / "pipe")
    async with metquay() as sandbox:
        for name in ("access_key_file", "ca_bundle", "redis_password_file", "tls_cert"):
            found = await probes(sandbox.url, **{name: "pipe"})
            assert ["failed"] == [probe.outcome for probe in found.values()]
            assert f"METQUAY_{name.upper()}" in found["settings"].text
        found = await probes(sandbox.url, audit_log=str(tmp_path / "pipe"))
        assert_failed(found, "audit", "nobody reads from this pipe", "choose another file")


async def test_the_audit_log(tmp_path: Path) -> None:
    """What would keep the proxy from starting is found, and to look for it leaves nothing behind."""
    async with metquay() as sandbox:
        path = tmp_path / "audit.log"
        assert "ok" == (await probes(sandbox.url, audit_log=str(path)))["audit"].outcome
        assert not path.exists()
        found = await probes(sandbox.url, audit_log=str(tmp_path))
        assert_failed(found, "audit", f"cannot write {tmp_path}: Is a directory", "choose another file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
async def test_the_audit_log_of_a_running_proxy() -> None:
    """A proxy that can't write its lines, or has lost some, is told of."""
    async with metquay() as sandbox, running(sandbox.url, audit_log="/dev/full") as (proxy, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"DELETE /customers/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        await eventually(lambda: proxy.status()["audit"]["trouble"])
        found = await probes(sandbox.url, listen=url.partition("//")[2], audit_log="/dev/full")
        assert_failed(found, "audit", "failed to write /dev/full: No space left on device", "goes on by itself")


@pytest.mark.parametrize(
    ("host", "proxy", "failed", "cause", "cure"),
    [
        ("metquay.invalid", "", "dns", "metquay.invalid .*name could not be looked up", "METQUAY_HOST.*network"),
        ("http://127.0.0.1:{}", "", "tcp", "127.0.0.1:{} .*nothing listens there", "METQUAY_HOST and its port"),
        ("metquay.example", "127.0.0.1:{}", "tcp", "127.0.0.1:{} .*nothing listens there", "METQUAY_OUTBOUND_PROXY"),
    ],
)
async def test_nobody_is_there(host: str, proxy: str, failed: str, cause: str, cure: str) -> None:
    """A typing mistake, a wrong port, and a corporate proxy that is away: the setting to be checked is told."""
    port = closed_port()
    found = await probes(host.format(port), **({"outbound_proxy": proxy.format(port)} if proxy else {}))
    assert_failed(found, failed, cause.format(port), cure)


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
    assert_failed(found, "tcp", "could not be reached within 0.2 s", "VPN.*METQUAY_OUTBOUND_PROXY")


@pytest.mark.parametrize(
    ("server", "cause", "cure"),
    [
        ({"name": "localhost"}, "localhost.*certificate was not accepted", "company inspects.*METQUAY_CA_BUNDLE"),
        ({"name": "other", "ca_bundle": "ca.pem"}, "was not accepted", "METQUAY_HOST for a typing mistake"),
        ({"name": "localhost", "ca_bundle": "ca.pem", "expired": True}, "has expired", "date and time first"),
        ({}, "localhost.* TLS could not be set up", "Check the address, and that the server uses TLS"),
    ],
)
async def test_tls(authority: trustme.CA, tmp_path: Path, server: dict[str, Any], cause: str, cure: str) -> None:
    """A firewall that looks into TLS, a wrong host, a wrong clock and a wrong port each need something else."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    settings = {name: value for name, value in server.items() if name == "ca_bundle"}
    server = {name: value for name, value in server.items() if name != "ca_bundle"}
    async with metquay(authority if server else None, **server) as sandbox:
        found = await probes(f"https://localhost:{sandbox.port}", **settings)
    assert_failed(found, "tls", cause, cure)


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
    assert_failed(found, "login", "refused the key pair", "METQUAY_SECRET_KEY: complete")


async def test_the_keys_look_wrong() -> None:
    """What looks wrong about them is said with the settings, and beside their refusal, without showing them."""
    async with metquay() as sandbox:
        found = await probes(sandbox.url, access_key=f'"{ACCESS_KEY}"', secret_key="<secret key>")  # noqa: S106 - nobody's
    marks = (
        "METQUAY_ACCESS_KEY has quotation marks, .* remove them .docker --env-file keeps them.*METQUAY_SECRET_KEY seems"
    )
    assert re.match(
        f"warning: {marks.replace('METQUAY_SECRET', 'warning: METQUAY_SECRET')}", found["settings"].text, re.DOTALL
    )
    assert ("ok", "access key ***") == found["keys"][1:3]
    assert_failed(found, "login", "refused the key pair", marks)
    assert ACCESS_KEY not in str(found)


MOVED = "https://eu.metquay.co/api/v1"


@pytest.mark.parametrize(
    ("answer", "text", "cure"),
    [
        ("429 No\r\nRetry-After: 60", "status 429 and asks the proxy to wait 60 s", "wait a few minutes"),
        ("503 No", "status 503", "wait a few minutes"),
        (
            f"301 Moved\r\nLocation: {MOVED}/authenticate",
            f"redirected .* to {MOVED}/authenticate.$",
            f"should .* be {MOVED}.$",
        ),
        ("200 OK\r\nContent-Type: text/html", "something other than JSON", "METQUAY_HOST.*log in with a browser"),
    ],
)
async def test_the_login_says_what_is_wrong(answer: str, text: str, cure: str) -> None:
    """It has too much to do, has moved, or is another server's page: a network that wants to be logged in to."""
    async with answering(f"{answer}\r\n{timely()}", "<html>Welcome to the hotel") as port:
        assert_failed(await probes(f"http://127.0.0.1:{port}"), "login", text, cure)


@pytest.mark.parametrize(
    ("status", "cause", "cure"),
    [
        (401, "then refused it", "support"),
        (403, "may not read customers", "allow it for this API client"),
        (429, "quota of these keys is used up", "one proxy"),
        (500, "not answered as it should be .status 500", "wait a few minutes"),
        (410, "not answered as it should be .status 410", "METQUAY_HOST"),
    ],
)
async def test_the_read_is_refused(status: int, cause: str, cure: str) -> None:
    """The login works and a read does not: what Metquay says to it decides what to do."""
    async with metquay() as sandbox:
        sandbox.faults = Faults(fail={status: 1.0})
        assert_failed(await probes(sandbox.url), "read", cause, cure)


async def test_the_port_is_taken() -> None:
    """Another program listens where the proxy is to, even one that says nothing; the rest is tried all the same."""
    silent = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with metquay() as sandbox, answering("200 OK", "alive\n") as port, silent:
        for taken in (port, silent.sockets[0].getsockname()[1]):
            found = await probes(sandbox.url, listen=f"127.0.0.1:{taken}")
            assert_failed(
                found,
                "port",
                f"127.0.0.1:{taken} is taken, probably by another program",
                "Stop that one.*METQUAY_LISTEN",
            )


@pytest.mark.parametrize(
    ("keys", "left"),
    [("", "99 of them are left"), ("a-long-client-key", "only a running proxy that needs no client key")],
)
async def test_a_proxy_is_running(keys: str, left: str) -> None:
    """One of ours is no program in the way, and says how much is left; one with client keys is known by its refusal."""
    settings = {"client_key": keys} if keys else {}
    async with metquay() as sandbox, running(sandbox.url, **settings) as (_, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /customers HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        found = await probes(sandbox.url, listen=url.removeprefix("http://"))
    assert f"a metquay-proxy is running at {url.removeprefix('http://')}" == found["port"].text
    assert left in found["quota"].text


@pytest.mark.parametrize(
    "told",
    [
        '"quota"',
        '["quota", "upstream"]',
        '{"quota": 5}',
        '{"quota": [], "upstream": 5}',
        '{"upstream": "{base}", "token": "quota"}',
    ],
)
async def test_who_is_running_tells_nonsense(told: str) -> None:
    """Whatever a program says that looks like ours, there is a line for each step, and no traceback."""
    ours = "200 OK\r\nServer: metquay-proxy"
    async with metquay() as sandbox, answering(ours, told.replace("{base}", sandbox.url)) as port:
        found = await probes(sandbox.url, listen=f"127.0.0.1:{port}", audit_log=os.devnull)
    assert {"port", "audit", "quota", "redis"} <= found.keys()
    assert "only a running proxy that needs no client key" in found["quota"].text


async def test_another_proxy_is_running() -> None:
    """One for another Metquay, or with keys that were wrong, is told; its listener for figures is known as ours."""
    async with (
        metquay() as sandbox,
        metquay() as other,
        running(other.url, metrics_listen="127.0.0.1:0") as (proxy, url),
        running(sandbox.url, credentials=lambda: Credentials("wrong", "wrong")) as (refused, refused_url),
    ):
        place, figures = url.removeprefix("http://"), str(proxy.watched[0])
        found = await probes(sandbox.url, listen=place)
        assert_failed(found, "port", f"that runs at {place} forwards to {other.url}, not to", "Stop it")
        found = await probes(other.url, listen=place, metrics_listen=figures)
        ours = "a metquay-proxy is running at"
        assert ("ok", f"{ours} {place}; {ours} {figures}") == found["port"][1:3]
        assert "are left" in found["quota"].text
        while not refused.tokens.state.rejected:
            await asyncio.sleep(0.005)
        found = await probes(sandbox.url, listen=refused_url.removeprefix("http://"))
        assert_failed(found, "port", "was started with keys that Metquay refuses", "Start it again")


@pytest.mark.skipif(sys.platform == "win32", reason="Python has no unix sockets on Windows")
async def test_proxies_are_running_at_all_addresses(tmp_path: Path) -> None:
    """A unix socket is asked too; where some addresses are free and some our own, each is told."""
    async with metquay() as sandbox, running(sandbox.url, listen=f"127.0.0.1:0,unix:{tmp_path}/s") as (proxy, url):
        place, ours = url.removeprefix("http://"), "a metquay-proxy is running at"
        found = await probes(sandbox.url, listen=f"unix:{tmp_path}/s,{place}")
        assert f"{ours} unix:{tmp_path}/s; {ours} {place}" == found["port"].text
        found = await probes(sandbox.url, listen=f"unix:{tmp_path}/t,{place}")
        assert f"the proxy can listen at unix:{tmp_path}/t; {ours} {place}" == found["port"].text
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


@pytest.mark.parametrize("setting", ["listen", "metrics_listen"])
async def test_two_addresses_collide(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """Addresses that are free one by one, and not all at once, as ``serve`` needs them."""
    port, look_up = closed_port(), socket.getaddrinfo

    def known(host: str, *rest: Any, **more: Any) -> Any:  # noqa: ANN401 - the standard library's own
        return look_up("127.0.0.1" if host == "box" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", known)
    listen = {"listen": f"127.0.0.1:{port}"}
    listen[setting] = f"{listen.get(setting, '')},box:{port}".strip(",")
    async with metquay() as sandbox:
        found = await probes(sandbox.url, trust_network="true", **listen)
    assert_failed(found, "port", f"box:{port} is taken", f"METQUAY_{setting.upper()}")


NTLM = "Proxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM"


@pytest.mark.parametrize(
    ("head", "cause", "cure"),
    [
        ("407 Proxy Authentication Required", "company|corporate", "user name and password.*METQUAY_OUTBOUND_PROXY"),
        ("403 Forbidden", "refused to connect to metquay.example:443", "allow this address"),
        (
            f"407 No\r\n{NTLM}",
            "refused to connect",
            "login with Negotiate or NTLM.*px .or cntlm.*_OUTBOUND_PROXY=http://",
        ),
    ],
)
async def test_the_corporate_proxy_refuses(head: str, cause: str, cure: str) -> None:
    """What the corporate proxy says is told as its own word, not Metquay's, and what can stand between."""
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
    assert re.match("warning: HTTPS_PROXY, or the system's proxy setting, (is|must be) ", found["settings"].text)
    assert_failed(found, "dns", "metquay.invalid .*could not be looked up", "METQUAY_HOST")
    assert "pass-word" not in str(found)


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


def printed(capsys: pytest.CaptureFixture[str], code: int, *, as_json: bool = False, **texts: str) -> list[str]:
    """Run the command, on the simulator where no host is set; return the lines that it printed."""
    sandbox = bool(texts) and "host" not in texts
    assert code == run(lambda: load(texts, sandbox=sandbox), print, as_json=as_json)
    return capsys.readouterr().out.splitlines()


PASSED = "8 checks passed, 4 had nothing to try."
NOWHERE = {"listen": "localhost:0", "rate_limit": "off"}


def test_one_line_for_each_probe(capsys: pytest.CaptureFixture[str]) -> None:
    """Each probe is a line: outcome, name, time, what was found; nothing failed, so the exit code is 0."""
    lines = printed(capsys, 0, **NOWHERE)
    assert (13, f"All is well: {PASSED}") == (len(lines), lines[-1])
    assert re.fullmatch(r"ok +login +\d+ ms  a token for 900 s", lines[8])
    assert re.fullmatch(r"skipped +tls +not used within this machine", lines[6])


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The same as one JSON object, for a program that watches."""
    found = json.loads("".join(printed(capsys, 0, as_json=True, **NOWHERE)))
    assert (True, f"All is well: {PASSED}") == (found["ok"], found["summary"])
    assert ["name", "outcome", "text", "cure", "ms"] == list(found["probes"][0])


def test_a_failure_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """One failed probe makes the exit code 1; its line ends with what to do."""
    lines = printed(
        capsys, 1, host="metquay.invalid", access_key=ACCESS_KEY, secret_key=SECRET_KEY, listen="localhost:0"
    )
    assert re.search("failed +dns .*Check METQUAY_HOST for a typing mistake", "\n".join(lines))
    assert "1 failed, 8 skipped, 3 passed." == lines[-1]


def test_a_warning_is_not_all_well(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line says only what is so: there is a warning above it."""
    lines = printed(capsys, 0, client_key="short", retires="1", **NOWHERE)
    assert re.search(r"retires.* did you mean METQUAY_RETRIES\?$", lines[0], re.IGNORECASE)
    assert lines[1] == f"{'':28}warning: METQUAY_CLIENT_KEY is short: make it 16 random characters or more"
    assert f"Nothing failed, but there is a warning about the settings: {PASSED}" == lines[-1]


def test_wrong_settings_are_all_that_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing else was tried; a line of .env that is left out is told first, since it may be why."""
    (tmp_path / ".env").write_text("set METQUAY_HOST=lab.metquay.co\n")
    with pytest.raises(SettingsError) as caught:
        load({})
    first, *told, cure, last = printed(capsys, 1)
    assert re.search(r"^failed +settings +0 ms  warning: .*line 1, is ignored: .* a word .* before the name", first)
    assert [f"{'':28}{line}" for line in caught.value.args[1:]] == told
    assert "METQUAY_HOST (--host): not set" in told[0]
    assert f"{'':28}Correct that; `metquay-proxy settings` shows where each setting comes from." == cure
    assert "1 failed, nothing else was tried." == last


def test_two_failures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The last line says with which of them to begin; what was skipped has not failed, and has not passed."""
    lines = printed(capsys, 1, **NOWHERE | {"listen": "192.0.2.1:7000", "audit_log": str(tmp_path)})
    count = Counter(line.split()[0] for line in lines)
    assert f"2 failed, {count['skipped']} skipped, {count['ok']} passed. Begin with the first that failed." == lines[-1]
    assert 12 == sum(count[outcome] for outcome in ("failed", "skipped", "ok"))
