"""With a real browser: a page of another site can't use the proxy, and a page that is meant to can."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from tests.running import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser

    from metquay_proxy.sandbox.server import Sandbox

pytestmark = pytest.mark.slow

ATTACKS = """
async proxy => {
    const outcomes = {};
    const attempt = async (name, what) => {
        try { outcomes[name] = await what(); } catch (error) { outcomes[name] = "refused"; }
    };
    const read = async (path, options) => {
        const response = await fetch(proxy + path, options);
        return response.type === "opaque" ? "opaque" : response.status + ":" + (await response.text()).slice(0, 40);
    };
    for (const mode of ["cors", "no-cors", "same-origin"])
        for (const path of ["/customers?limit=1", "/-/status", "/-/", "/authenticate", "/", "/favicon.ico"])
            await attempt("GET " + mode + " " + path, () => read(path, {mode}));
    for (const type of ["text/plain", "application/x-www-form-urlencoded", "application/json"])
        for (const mode of ["cors", "no-cors"])
            await attempt("POST " + mode + " " + type, () => read("/customers", {
                method: "POST", mode, headers: {"Content-Type": type}, body: '{"companyName": "Mallory"}'}));
    for (const method of ["PUT", "DELETE", "PATCH"])
        await attempt(method, () => read("/customers/10427", {method, body: "{}"}));
    await attempt("key header", () => read("/customers", {headers: {"X-Proxy-Key": "guess"}}));
    await attempt("beacon", () => String(navigator.sendBeacon(proxy + "/customers", '{"companyName": "Mallory"}')));
    for (const type of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]) {
        const frame = Object.assign(document.createElement("iframe"), {name: "frame-" + type});
        document.body.append(frame);
        const form = document.createElement("form");
        Object.assign(form, {action: proxy + "/customers", method: "POST", enctype: type, target: frame.name});
        form.append(Object.assign(document.createElement("input"), {name: '{"companyName": "M', value: 'allory"}'}));
        document.body.append(form);
        await new Promise(done => { frame.addEventListener("load", done); setTimeout(done, 1500); form.submit(); });
    }
    const load = (tag, attribute, path) => new Promise(done => {
        const element = document.createElement(tag);
        element.onload = element.onerror = done;
        setTimeout(done, 1500);
        element[attribute] = proxy + path;
        document.body.append(element);
    });
    await load("img", "src", "/customers");
    await load("script", "src", "/customers");
    await load("iframe", "src", "/customers");
    await load("iframe", "src", "/-/");
    await load("iframe", "src", "/");
    await new Promise(done => {
        new EventSource(proxy + "/customers").onerror = done; setTimeout(done, 1500);
    });
    await new Promise(done => {
        const socket = new WebSocket(proxy.replace("http", "ws") + "/customers");
        socket.onerror = socket.onopen = done; setTimeout(done, 1500);
    });
    return outcomes;
}
"""
ALLOWED = """
async proxy => {
    const customers = await fetch(proxy + "/customers?limit=1", {headers: {"X-Proxy-Key": "browser-tool-key-0123"}});
    const made = await fetch(proxy + "/customers", {method: "POST", body: '{"companyName": "Made in a browser"}',
        headers: {"Content-Type": "application/json", "X-Proxy-Key": "browser-tool-key-0123"}});
    const refused = await fetch(proxy + "/customers");
    const told = (await refused.json()).code;
    return [customers.status, (await customers.json()).length, made.status, refused.status, told];
}
"""


@contextlib.asynccontextmanager
async def site() -> AsyncIterator[str]:
    """Serve an empty page from an origin of its own."""

    async def page(_request: web.BaseRequest) -> web.Response:
        return web.Response(text="<!doctype html><title>a site</title><body></body>", content_type="text/html")

    runner = web.ServerRunner(web.Server(page))
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_another_site_gets_nothing_through(sandbox: Sandbox, browser: Browser) -> None:
    """Fetches of all modes, forms, beacons, images, scripts, frames, event streams and websockets reach nothing."""
    async with running(sandbox.url) as (proxy, url), site() as origin:
        await asyncio.sleep(0.2)
        page = await browser.new_page()
        await page.goto(origin)
        outcomes = await page.evaluate(ATTACKS, url)
        for name, outcome in outcomes.items():
            assert outcome in {"refused", "opaque", "true"}, (name, outcome)
        assert 0 == sandbox.requests
        assert 20 < proxy.telemetry.finished, "the attacks were made, and the proxy refused them"


async def test_a_link_leads_to_the_status_page(sandbox: Sandbox, browser: Browser) -> None:
    """Another site may link to the bare address; what the browser asks for by itself is no news, nor Metquay's."""
    async with running(sandbox.url) as (proxy, url), site() as origin:
        await asyncio.sleep(0.2)
        page = await browser.new_page()
        await page.goto(origin)
        await page.evaluate("address => { location.href = address; }", url)
        await page.wait_for_url(f"{url}/-/")
        assert 204 == await page.evaluate("async () => (await fetch('/favicon.ico')).status")
        assert 0 == sandbox.requests
        assert ([], 0, 0) == proxy.telemetry.since(0)


async def test_rebinding(sandbox: Sandbox, browser: Browser) -> None:
    """A page that makes its own host name point to this machine is refused by that name."""
    async with running(sandbox.url) as (proxy, url):
        await asyncio.sleep(0.2)
        page = await browser.new_page()
        rebound = f"http://rebound.example:{url.rpartition(':')[2]}"
        response = await page.goto(rebound + "/customers?limit=1")
        assert (403, "host-not-allowed") == (response.status, response.headers["x-metquay-proxy-error"])
        status = await page.evaluate("async () => (await fetch('/customers', {method: 'POST', body: '{}'})).status")
        assert 403 == status
        assert 403 == await page.evaluate("async () => (await fetch('/-/status')).status")
        assert 0 == sandbox.requests
        assert 3 <= proxy.telemetry.finished


async def test_a_listed_origin_works(sandbox: Sandbox, browser: Browser) -> None:
    """A page whose origin is listed reads and writes with its key, preflights included, and can read refusals."""
    async with site() as origin:
        settings = {"allowed_origins": origin, "client_keys": "tool:browser-tool-key-0123"}
        async with running(sandbox.url, **settings) as (_, url):
            page = await browser.new_page()
            await page.goto(origin)
            assert [200, 1, 201, 403, 403] == await page.evaluate(ALLOWED, url)
            assert 2 == sandbox.requests
