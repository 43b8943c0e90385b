"""METQUAY_METRICS_LISTEN, as kubelet, Prometheus and whoever else comes by meet it: it shows figures, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import TYPE_CHECKING

import aiohttp
import pytest

from metquay_proxy.listeners import CannotListen
from metquay_proxy.rules.gate import ClientKey
from metquay_proxy.settings import Settings, SettingsError, load
from tests.running import process, running, simulated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from metquay_proxy.app import Proxy
    from metquay_proxy.sandbox.server import Sandbox

KEY = "key-of-the-label-printer"
TOOL = {"X-Proxy-Key": KEY}
LISTEN = "127.0.0.1:0"


class Watched:
    """A proxy that wants a client key, in front of a simulator, and its second listener."""

    def __init__(self, proxy: Proxy, url: str, sandbox: Sandbox) -> None:
        """Note where each is."""
        self.proxy, self.url, self.sandbox = proxy, url, sandbox
        self.port = proxy.watched[0].port
        self.root = f"http://127.0.0.1:{self.port}"

    async def said(self, request: str) -> tuple[int, str, str]:
        """Return status, slug and body of the answer to a request that is written out."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request.encode().replace(b"\n", b"\r\n"))
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        slug = next((line.partition(": ")[2] for line in head.splitlines() if "Proxy-Error" in line), "")
        return int(head.split()[1]), slug, body


@contextlib.asynccontextmanager
async def watched(**settings: object) -> AsyncIterator[Watched]:
    """Run one."""
    keys = (ClientKey.of("label-printer", KEY),)
    texts = {"metrics_listen": LISTEN, "client_keys": keys, "rate_limit": "off", "pass_through": "/FlexicalERP/"}
    async with simulated() as sandbox, running(sandbox.url, **texts | settings) as (proxy, url):
        async with asyncio.timeout(10):
            while not proxy.ready():
                await asyncio.sleep(0.005)
        yield Watched(proxy, url, sandbox)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/-/live", "/-/ready", "/-/metrics"])
async def test_it_serves_three_pages_to_anybody(method: str, path: str) -> None:
    """No key is asked for, by whichever name of its own it is asked; the other listener goes on asking for one."""
    async with watched() as there:
        for host in ("127.0.0.1", "localhost", "10.1.2.3"):
            status, slug, body = await there.said(f"{method} {path} HTTP/1.1\nHost: {host}:9187\n\n")
            assert (200, "") == (status, slug)
            assert bool(body) == (method == "GET")
        async with aiohttp.ClientSession() as tool, tool.get(f"{there.url}/-/metrics") as answer:
            assert 403 == answer.status


REFUSED = {
    "GET /customers HTTP/1.1": (404, "no-such-page"),
    "GET /api/v1/customers?limit=1 HTTP/1.1": (404, "no-such-page"),
    "POST /customers HTTP/1.1": (404, "no-such-page"),
    "OPTIONS /customers HTTP/1.1": (404, "no-such-page"),
    "POST /authenticate HTTP/1.1": (404, "no-such-page"),
    "GET /FlexicalERP/rest/customers HTTP/1.1": (404, "no-such-page"),
    "GET / HTTP/1.1": (404, "no-such-page"),
    "GET /favicon.ico HTTP/1.1": (404, "no-such-page"),
    "GET /-/ HTTP/1.1": (404, "no-such-page"),
    "GET /-/status HTTP/1.1": (404, "no-such-page"),
    "GET /-/events HTTP/1.1": (404, "no-such-page"),
    "POST /-/test HTTP/1.1": (404, "no-such-page"),
    "POST /-/quit HTTP/1.1": (404, "no-such-page"),
    "POST /-/metrics HTTP/1.1": (405, "method-not-allowed"),
    "DELETE /-/live HTTP/1.1": (405, "method-not-allowed"),
    "GET /-/metrics/../../customers HTTP/1.1": (400, "bad-target"),
    "GET /-/live/..%2f..%2fcustomers HTTP/1.1": (400, "bad-target"),
    "CONNECT lab.metquay.co:443 HTTP/1.1": (501, "not-supported"),
    "GET http://{upstream}/api/v1/customers HTTP/1.1": (404, "no-such-page"),
}


@pytest.mark.parametrize("line", REFUSED)
async def test_it_serves_nothing_else(line: str) -> None:
    """Not even to who has a client key; nothing is sent, and the proxy does not end."""
    async with watched(allow_quit=True) as there:
        before = there.sandbox.requests
        begin = line.format(upstream=there.proxy.base.authority)
        for key in ("", f"X-Proxy-Key: {KEY}\n", f"Authorization: Bearer {KEY}\n"):
            request = f"{begin}\nHost: localhost\n{key}Content-Length: 0\nConnection: close\n\n"
            assert REFUSED[line] == (await there.said(request))[:2]
        assert before == there.sandbox.requests
        assert not there.proxy.quit.is_set()


@pytest.mark.parametrize(
    ("fields", "slug"),
    [
        ("Host: attacker.example", "host-not-allowed"),
        ("Host: localhost\nOrigin: https://attacker.example", "origin-not-allowed"),
        ("Host: localhost\nSec-Fetch-Site: cross-site", "origin-not-allowed"),
    ],
)
async def test_a_web_page_gets_nothing(fields: str, slug: str) -> None:
    """The rules against web pages hold here as everywhere."""
    async with watched() as there:
        assert (403, slug) == (await there.said(f"GET /-/metrics HTTP/1.1\n{fields}\nConnection: close\n\n"))[:2]


async def test_its_figures_name_nobody() -> None:
    """Neither who asked, nor with which key, nor for which record."""
    async with watched() as there:
        asked = f"{there.url}/customers/10427?note=confidential"
        record, fields = {"companyName": "Acme", "companyCode": "ACM"}, TOOL | {"User-Agent": "label-printer/7"}
        async with aiohttp.ClientSession() as tool, tool.put(asked, headers=fields, json=record) as answer:
            await answer.read()
        _, _, figures = await there.said("GET /-/metrics HTTP/1.1\nHost: localhost\n\n")
        assert 'metquay_proxy_build_info{version="' in figures
        assert 'method="PUT"' in figures
        assert [] == [word for word in ("label-printer", KEY, "10427", "confidential") if word in figures]


async def test_a_crowd_keeps_nobody_out() -> None:
    """Of clients that say nothing there are 32; for the next one the oldest is closed, so that a probe is answered."""
    async with watched() as there:
        crowd = [await asyncio.open_connection("127.0.0.1", there.port) for _ in range(32)]
        assert 200 == (await there.said("GET /-/live HTTP/1.1\nHost: localhost\n\n"))[0]
        with contextlib.suppress(ConnectionResetError):
            assert b"" == await crowd[0][0].read()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await crowd[1][0].read()
        for _, one in crowd:
            one.close()
        async with aiohttp.ClientSession() as tool, tool.get(f"{there.url}/customers", headers=TOOL) as answer:
            assert 200 == answer.status, "tools are let in all the while"


async def test_a_body_is_not_waited_for() -> None:
    """A request that announces one is refused at once, so that trickling clients hold nothing, least of all a stop."""
    async with watched() as there:
        for field in ("Content-Length: 60000", "Transfer-Encoding: chunked"):
            status, slug, _ = await there.said(f"GET /-/live HTTP/1.1\nHost: localhost\n{field}\n\n")
            assert (404, "no-such-page") == (status, slug)


async def test_it_leaves_no_trace_among_the_requests_of_tools(capsys: pytest.CaptureFixture[str]) -> None:
    """Strangers can push nothing off the status page, and fill no log."""
    async with watched() as there:
        capsys.readouterr()
        for line in ("GET /x HTTP/1.1\nHost: localhost", "GET /-/live HTTP/1.1\nHost: localhost", "no request at all"):
            await there.said(f"{line}\n\n")
        assert (0, 0, "") == (there.proxy.telemetry.finished, there.proxy.telemetry.active, capsys.readouterr().out)


async def test_on_the_loopback_it_has_the_names_of_this_machine_alone() -> None:
    """As every listener has: a name without a dot may be a neighbour's."""
    async with watched() as there:
        asked = "GET /-/metrics HTTP/1.1\nHost: neighbour\n\n"
        assert (403, "host-not-allowed") == (await there.said(asked))[:2]
    async with watched(metrics_listen="0.0.0.0:0") as there:
        assert 200 == (await there.said(asked))[0]


async def test_it_tells_that_the_proxy_is_being_stopped() -> None:
    """While requests in flight end, it is alive and not ready; then nobody listens."""
    async with watched() as there:
        there.sandbox.faults = there.sandbox.faults.changed({"latency": 0.3})
        async with aiohttp.ClientSession() as tool:
            under_way = asyncio.ensure_future(tool.get(f"{there.url}/customers", headers=TOOL))
            async with asyncio.timeout(10):
                while not there.proxy.telemetry.active:
                    await asyncio.sleep(0.005)
            ending = asyncio.ensure_future(there.proxy.stop(10.0))
            await asyncio.sleep(0.1)
            with pytest.raises(OSError, match=r"refused|111|10061"):
                await asyncio.open_connection("127.0.0.1", int(there.url.rpartition(":")[2]))
            for path, expected in (("/-/ready", 503), ("/-/live", 200)):
                assert expected == (await there.said(f"GET {path} HTTP/1.1\nHost: localhost\n\n"))[0]
            assert 200 == (await under_way).status
            await ending
        with pytest.raises(OSError, match=r"refused|111|10061"):
            await asyncio.open_connection("127.0.0.1", there.port)


async def test_where_it_can_not_listen_nothing_listens(unused_tcp_port: int) -> None:
    """The start fails with a text that names the address, and the other listeners are closed."""
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    with pytest.raises(CannotListen, match=f"127.0.0.1:{port} is taken.* METQUAY_METRICS_LISTEN"):
        async with watched(listen=f"127.0.0.1:{unused_tcp_port}", metrics_listen=f"127.0.0.1:{port}"):
            pass
    taken.close()
    with pytest.raises(OSError, match=r"refused|111|10061"):
        await asyncio.open_connection("127.0.0.1", unused_tcp_port)


@pytest.mark.parametrize("text", ["unix:/run/metrics.sock", "127.0.0.1:1,127.0.0.1:2", "9187", "localhost"])
def test_what_is_no_place_for_it(text: str) -> None:
    """One host and port, told in one line."""
    with pytest.raises(SettingsError) as caught:
        load({"metrics_listen": text}, sandbox=True)
    (line,) = caught.value.lines
    assert line.startswith("METQUAY_METRICS_LISTEN")


def test_it_may_be_reached_from_elsewhere() -> None:
    """It needs no consent beside its own name, since it shows so little; but Metquay must not be sought there."""
    account = {"access_key": "a", "secret_key": "s"}
    asked = Settings(host="lab.metquay.co", metrics_listen="0.0.0.0:9187", **account)  # type: ignore[arg-type]
    assert ["0.0.0.0:9187"] == [str(address) for address in asked.metrics_listen]
    for tools, metrics in (
        ("localhost:9187", "127.0.0.1:9187"),
        ("0.0.0.0:9187,unix:/x.sock", "127.0.0.1:9187"),
        ("127.0.0.2:9187", "0.0.0.0:9187"),
    ):
        with pytest.raises(ValueError, match="listens for tools"):
            Settings(host="lab.metquay.co", listen=tools, trust_network="true", metrics_listen=metrics, **account)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="would ask itself"):
        Settings(host="http://127.0.0.1:9187", metrics_listen="0.0.0.0:9187", **account)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
@pytest.mark.parametrize("form", ["console", "json"])
async def test_the_start_tells_where_it_is(tmp_path: Path, form: str) -> None:
    """As an address that can be asked as it is printed."""
    with process(
        tmp_path, "serve", "--sandbox", "--listen", LISTEN, "--metrics-listen", LISTEN, "--log-format", form
    ) as proxy:
        lines = [proxy.welcome]
        assert proxy.popen.stdout is not None
        while form == "console" and "metrics" not in lines[-1]:
            lines.append(proxy.popen.stdout.readline())
        url = json.loads(lines[0])["metrics"][0] if form == "json" else lines[-1].split()[-1]
        async with aiohttp.ClientSession() as client, client.get(url) as answer:
            assert "metquay_proxy_ready" in await answer.text()
        assert 0 == proxy.stop()
