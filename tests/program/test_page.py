"""The status page in a real browser: Debian's chromium, driven by Playwright. Pictures are kept in ``.artefacts``."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults, Sandbox
from tests.redis_server import needs_redis, redis_server
from tests.running import process, running

async_api = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
expect = async_api.expect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from playwright.async_api import Browser, Page

    from tests.redis_server import RedisServer

ARTEFACTS = Path(__file__).parent.parent.parent / ".artefacts"
pytestmark = pytest.mark.slow


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Open the client of a tool."""
    async with aiohttp.ClientSession(headers={"User-Agent": "Excel"}) as session:
        yield session


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Start a Redis."""
    with redis_server(tmp_path / "redis") as server:
        yield server


@contextlib.asynccontextmanager
async def opened(browser: Browser, url: str, *, strict: bool = True, **options: Any) -> AsyncIterator[Page]:  # noqa: ANN401 - Playwright's own
    """Open the page. At the end its console must be empty and every request must have gone to the proxy itself."""
    context = await browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = await context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(f"{url}/-/")
    yield page
    await context.close()
    assert [] == [address for address in asked if not address.startswith((f"{url}/-/", "data:"))]
    if strict:
        assert [] == said


async def get(session: aiohttp.ClientSession, address: str, **options: Any) -> None:  # noqa: ANN401 - aiohttp's own
    """Make a request as a tool would."""
    async with session.get(address, **options) as response:
        await response.read()


async def test_the_page_is_live(browser: Browser, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """It opens, shows a request within a second, filters, pauses, and has the settings, the badge and the plots."""
    with process(tmp_path, "serve", "--sandbox", METQUAY_LISTEN="127.0.0.1:0") as proxy:
        async with opened(browser, proxy.url) as page:
            await expect(page.locator("#sentence")).to_have_text(
                "Ready: logged in to the built-in sandbox (made-up data)."
            )
            await expect(page.locator("#sandbox")).to_be_visible()
            await expect(page.locator("#read-only")).to_be_hidden()
            await expect(page.locator("#live")).to_have_text("live")
            rows = page.locator("#requests tbody tr")
            await get(session, f"{proxy.url}/customers?limit=1&name=ACME")
            await expect(rows).to_have_count(1, timeout=1000)
            await expect(rows).to_contain_text("/api/v1/customers?limit=*&name=*")
            await expect(rows).to_contain_text("Excel")
            await get(session, f"{proxy.url}/nothing")
            await expect(rows.first).to_contain_text("! 404")

            reader, writer = await asyncio.open_connection(*proxy.url.removeprefix("http://").split(":"))
            writer.write(b"\x16\x03\x01\x02\x00\x01")
            await reader.read()
            writer.close()
            await expect(rows.first).to_contain_text("the tool uses https, but this proxy uses http")
            await page.fill("#filter", "excel 404")
            await expect(rows).to_have_count(1)
            await page.fill("#filter", "")
            await expect(rows).to_have_count(3)

            await page.click("#pause")
            await get(session, f"{proxy.url}/works")
            await expect(page.locator("#shown")).to_have_text("Paused; 1 new")
            assert 3 == await rows.count()
            await page.click("#pause")
            await expect(rows).to_have_count(4)

            await expect(page.locator("#used")).to_have_text("3 of 100requests in 60 s used", timeout=5000)
            await expect(page.locator("#callers")).to_contain_text("excel")
            await expect(page.locator("#answers")).to_contain_text("2 good, 2 refused, 0 failed in the last hour")
            assert await page.locator("#answers rect").count() > 0
            await expect(page.locator("#attempts")).to_contain_text("3 attempts in the last hour.")
            await expect(page.locator("#when")).to_have_text(
                re.compile(r"Working since \d.+\. Last request that succeeded: \d.+\.")
            )
            for chart, text in (
                ("attempts", "3 attempts."),
                ("answers", "2 good, 2 refused, 0 failed."),
                ("times", r"average (< 1|\d+) ms, slowest (< 1|\d+) ms."),
            ):
                plot, values = page.locator(f"#{chart} svg"), page.locator(f"#{chart} figcaption")
                box = await plot.bounding_box()
                await plot.hover(position={"x": box["width"] - 1, "y": 20})
                await expect(values).to_have_text(re.compile(rf"At \d\d:\d\d [AP]M: {text}"))
                await page.mouse.move(0, 0)
                await expect(values).to_contain_text("in the last hour")
                await plot.focus()
                await page.keyboard.press("ArrowLeft")
                await page.keyboard.press("ArrowLeft")
                await expect(values).to_have_text(re.compile(r"At \d\d:\d\d [AP]M: no request."))
            await expect(page.locator("#token")).to_contain_text("1 login, no failure")
            await page.click("text=Settings, and where each comes from")
            await expect(page.locator("#settings")).to_contain_text("METQUAY_LISTEN127.0.0.1:0environment")


async def test_a_request_is_looked_into(browser: Browser, session: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    """Kinds can be picked, known programs have their names, and a click shows the rest; nothing of it is a risk."""
    vba = "Mozilla/4.0 (compatible; Win32; WinHttp.WinHttpRequest.5)"
    async with running(sandbox.url) as (_, url), opened(browser, url) as page:
        rows, address = page.locator("#requests tbody tr"), page.locator("#address")
        await expect(page.locator("#none")).to_be_visible()
        await page.click("#test")
        await expect(page.locator("#tested")).to_contain_text("Metquay answered in")
        await expect(address).to_have_attribute("open", "")
        for path, agent in (
            ("/customers?limit=1", vba),
            ("/nothing", "<img src=x onerror=alert(1)>"),
            ("/works", "Microsoft.Data.Mashup (https://example.org)"),
        ):
            await get(session, url + path, headers={"User-Agent": agent})
        async with session.post(f"{url}/instrument-categories", json={"name": "Pressure gauges"}) as answer:
            await answer.read()
        await expect(rows).to_have_count(5)
        assert await address.get_attribute("open") is None
        for chip, expected in (("Errors", 1), ("Writes", 1), ("429", 0), ("All", 5)):
            await page.click(f"#chips >> text={chip}")
            await expect(rows).to_have_count(expected)
        await page.fill("#filter", "Excel VBA")
        await expect(rows).to_have_count(1)
        await expect(rows.locator(".client")).to_have_attribute("title", vba)
        await rows.locator("button").press("Enter")
        detail = page.locator("#requests .detail")
        await expect(detail).to_contain_text(vba)
        await expect(detail).to_contain_text("none waiting for the token and its turn, ")
        await expect(detail.locator("code")).to_have_text(f'curl "{url}/api/v1/customers?limit=*"')
        await expect(rows.locator("button").first).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(detail).to_have_count(0)
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"GET /$(id)`id`!x'y;z HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        await page.fill("#filter", "$(id)")
        await rows.locator("button").click()
        await expect(detail.locator("code")).to_have_text(f'curl "{url}/api/v1/%24%28id%29%60id%60%21x%27y;*"')
        await page.fill("#filter", "power query")
        await expect(rows).to_have_count(1)
        await page.fill("#filter", "<img")
        await expect(rows).to_have_count(1)
        await page.locator("#requests button").click()
        assert 0 == await page.locator("img").count()


VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
KEYS = ("the-access-key-of-4F2A", "the-secret-key")
WELL = "Ready: logged in to 127.0.0.1:{port} with key ...4F2A."


@pytest.mark.parametrize(
    ("state", "mark", "sentence", "cure"),
    [
        ("fresh", "\u2713", WELL, ""),
        ("busy", "\u2713", WELL, ""),
        ("errors", "\u2713", WELL, ""),
        (
            "down",
            "\u2715",
            "The last request to Metquay failed.",
            "ago. 127.0.0.1:{port} could not be reached: nothing listens there. Check METQUAY_HOST and its port",
        ),
        ("quota", "!", "Slowed down: 1 request waits for its turn.", "7 of 10 requests in 60 s are used. None was"),
        ("refused", "\u2715", "Not working: 127.0.0.1:{port} refuses the key ...4F2A.", "METQUAY_ACCESS_KEY and"),
        ("gone", "\u2715", "No answer: this page cannot reach the proxy.", "Start metquay-proxy again"),
    ],
)
async def test_each_state(  # noqa: PLR0913 - the columns
    browser: Browser, session: aiohttp.ClientSession, state: str, mark: str, sentence: str, cure: str
) -> None:
    """Its first sentence says how things stand, the second what to do; nothing sticks out of the page; pictures stay.

    Each is seen wide and narrow, light and dark.
    """
    ARTEFACTS.mkdir(exist_ok=True)
    quota = 10 if state == "quota" else 1000
    secret = "another" if state == "refused" else KEYS[1]
    sandbox = Sandbox(rate_limit=(quota, 60.0), access_key=KEYS[0], secret_key=secret)
    await sandbox.start()
    waiting: list[asyncio.Future[None]] = []
    async with contextlib.AsyncExitStack() as stack:
        more = {"access_key": KEYS[0], "rate_limit": f"{quota}/minute"}
        proxy, url = await stack.enter_async_context(
            running(sandbox.url, credentials=lambda: Credentials(*KEYS), **more)
        )
        pages = {}
        for width, scheme in VIEWS:
            view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "strict": state != "gone"}
            pages[width, scheme] = await stack.enter_async_context(opened(browser, url, **view))
        asked = 0 if state in {"fresh", "refused"} else 8
        tools = ("Excel", "python-requests/2.32", "PowerShell/7.4", "LabVIEW")
        waiting = [
            asyncio.ensure_future(get(session, f"{url}/customers?limit=5", headers={"User-Agent": tools[number % 4]}))
            for number in range(asked)
        ]
        if state != "quota":
            await asyncio.gather(*waiting)
        if state == "errors":
            for status in (0, 0, 0, 500, 503):
                sandbox.faults = Faults(fail={status: 1.0} if status else {})
                await get(
                    session, f"{url}/customers/1{'?token=x' * (status == 500)}", headers={"User-Agent": "LabVIEW"}
                )
                async with session.post(f"{url}/customers", data="{") as answer:
                    await answer.read()
            sandbox.faults = Faults()
            await get(session, f"{url}/nothing/{'very-' * 40}long")
        if state == "down":
            await sandbox.stop()
            await get(session, f"{url}/customers")
        if state == "gone":
            await proxy.stop(1)
        for (width, scheme), page in pages.items():
            await expect(page.locator("#sentence")).to_have_text(sentence.format(port=sandbox.port), timeout=15_000)
            await expect(page.locator("#cure")).to_contain_text(cure.format(port=sandbox.port))
            await expect(page).to_have_title(f"{mark} {sentence.partition(':')[0]} \u2013 metquay-proxy")
            if state == "errors":
                await page.locator("#requests button").nth(1).click()
            await page.screenshot(path=ARTEFACTS / f"page-{state}-{width}-{scheme}.png", full_page=True)
            assert width >= await page.evaluate("document.documentElement.scrollWidth")
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    await sandbox.stop()


@needs_redis
async def test_with_whom_the_quota_is_shared(browser: Browser, redis: RedisServer, tmp_path: Path) -> None:
    """With a Redis the page says how many replicas share; without it, for how long and why this one goes on alone."""
    ARTEFACTS.mkdir(exist_ok=True)
    environment = {"METQUAY_ACCESS_KEY": ACCESS_KEY, "METQUAY_SECRET_KEY": SECRET_KEY, "METQUAY_LISTEN": "127.0.0.1:0"}
    with contextlib.ExitStack() as stack:

        def begin(name: str, *words: str, **more: str) -> str:
            (tmp_path / name).mkdir()
            return stack.enter_context(process(tmp_path / name, *words, **environment, **more)).url

        environment["METQUAY_HOST"] = begin("upstream", "sandbox", "--listen", "127.0.0.1:0")
        async with opened(browser, begin("one", "serve", METQUAY_REDIS_URL=redis.url)) as page:
            sharing = page.locator("#sharing")
            await expect(sharing).to_have_text("Shared through Redis with no other replica.")
            begin("two", "serve", METQUAY_REDIS_URL=redis.url)
            await expect(sharing).to_have_text("Shared through Redis with 1 other replica.")
            redis.kill()
            alone = r"! Not shared for \d+ s; this proxy uses its own part, 50 requests\. Redis: it cannot be reached\."
            await expect(sharing).to_have_text(re.compile(alone))
            await page.screenshot(path=ARTEFACTS / "page-alone.png")
        async with opened(browser, begin("three", "serve")) as page:
            await expect(page.locator("#used")).to_contain_text("of 100")
            await expect(page.locator("#sharing")).to_be_hidden()


async def test_by_keyboard_with_a_client_key(browser: Browser, sandbox: Sandbox) -> None:
    """A browser logs in with a read-only key; Tab, Enter and arrows are enough; examples carry the key's header."""
    key = "reading-key-0123456789"
    login = {"username": "anyone", "password": key}
    async with (
        running(sandbox.url, client_keys=f"reading:{key}:read-only", read_only="true") as (_, url),
        opened(browser, url, http_credentials=login) as page,
    ):
        await expect(page.locator("#read-only")).to_be_visible()
        await page.keyboard.press("Tab")
        await expect(page.locator("#test")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("#tested")).to_contain_text("\u2713 Metquay answered in")
        await page.locator("#tools :checked").focus()
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#snippet")).to_contain_text("WinHttp.WinHttpRequest")
        await page.keyboard.press("Tab")
        await expect(page.locator("#snippet")).to_be_focused()


FETCH = "async address => { const answer = await fetch(address); return [answer.status, await answer.text()]; }"
LISTS = ("customers", "customer-instrument-details", "works")


async def test_addresses_of_whole_lists(browser: Browser, sandbox: Sandbox) -> None:
    """Each stands there, is copied as it stands, and answers; each tool has an example for a whole list."""
    may = {"permissions": ["clipboard-read", "clipboard-write"]}
    async with running(sandbox.url) as (_, url), opened(browser, url, **may) as page:
        rows = page.locator("#lists .row")
        await expect(rows).to_have_count(3)
        for row, name in enumerate(LISTS):
            address = f"{url}/-/lists/{name}.csv"
            await expect(rows.nth(row).locator("code")).to_have_text(address)
            await rows.nth(row).locator("button").click()
            await expect(rows.nth(row).locator("button")).to_have_text("Copied")
            assert address == await page.evaluate("navigator.clipboard.readText()")
        await expect(page.locator("#header")).to_be_hidden()
        snippet = page.locator("#snippet")
        for tool, part, whole in (
            ("curl", f'"{url}/customers?limit=50"', f'-o customers.csv "{url}/-/lists/customers.csv"'),
            ("Excel VBA", "WinHttp", f'QueryTables.Add("TEXT;{url}/-/lists/customers.csv"'),
            ("Power Query", "Json.Document", 'RelativePath = "-/lists/customers.csv"'),
            ("PowerShell", "Invoke-RestMethod", f'"{url}/-/lists/customers.csv" -OutFile customers.csv'),
            ("Python", "import requests", f'pandas.read_csv("{url}/-/lists/customers.csv?formulas=keep", dtype=str)'),
        ):
            await page.click(f"#tools >> text={tool}")
            for choice, text in (("Some records", part), ("A whole list", whole)):
                await page.click(f"#scope >> text={choice}")
                await expect(snippet).to_contain_text(text)
                assert "X-Proxy-Key" not in await snippet.text_content()
        for address in await rows.locator("code").all_text_contents():
            status, text = await page.evaluate(FETCH, address)
            assert (200, "id") == (status, text.partition(",")[0].strip("\ufeff"))
            assert text.count("\r\n") > 100


async def test_examples_of_whole_lists_with_a_client_key(browser: Browser, tmp_path: Path) -> None:
    """They send the key, or say that this tool can't; the page says where Excel takes it; nothing sticks out."""
    key = "reading-key-0123456789"
    login = {"http_credentials": {"username": "anyone", "password": key}, "viewport": {"width": 390, "height": 900}}
    settings = {"METQUAY_LISTEN": "127.0.0.1:0", "METQUAY_CLIENT_KEYS": f"reading:{key}:read-only"}
    with process(tmp_path, "serve", "--sandbox", **settings) as proxy:
        async with opened(browser, proxy.url, **login) as page:
            await expect(page.locator("#header")).to_be_visible()
            await page.click("text=A whole list")
            for tool in ("curl", "Power Query", "PowerShell", "Python"):
                await page.click(f"#tools >> text={tool}")
                await expect(page.locator("#snippet")).to_contain_text("X-Proxy-Key")
            await page.click("#tools >> text=Excel VBA")
            await expect(page.locator("#snippet")).to_contain_text("A QueryTable can't send a client key")
            assert 390 >= await page.evaluate("document.documentElement.scrollWidth")
            status, _text = await page.evaluate(FETCH, f"{proxy.url}/-/lists/works.csv")
            assert 200 == status
            ARTEFACTS.mkdir(exist_ok=True)
            await page.screenshot(path=ARTEFACTS / "page-lists-390.png", full_page=True)


async def test_polling_and_a_proxy_that_ends(
    browser: Browser, session: aiohttp.ClientSession, sandbox: Sandbox
) -> None:
    """Where events don't get through, the page asks; when the proxy has ended, it says so and what to do."""
    async with running(sandbox.url) as (proxy, url), opened(browser, url, strict=False) as page:
        await expect(page.locator("#live")).to_have_text("live")
        await page.route("**/-/events", lambda route: route.abort())
        await page.reload()
        await expect(page.locator("#live")).to_have_text("asking every 2 s")
        await get(session, f"{url}/works")
        await expect(page.locator("#requests tbody tr")).to_have_count(1)
        await proxy.stop(1)
        await expect(page.locator("#sentence")).to_have_text("No answer: this page cannot reach the proxy.")
        await expect(page.locator("#cure")).to_contain_text("Start metquay-proxy again")
        await expect(page.locator("#live")).to_have_text("no contact")
        left = await page.locator("#left").text_content()
        await asyncio.sleep(1.2)
        assert left == await page.locator("#left").text_content(), "figures that nobody brings do not tick on"
        assert "no contact" == await page.locator("main").get_attribute("data-stale")


@pytest.mark.parametrize(
    ("status", "slug", "body", "sentence", "cure"),
    [
        (
            403,
            "client-key-required",
            '{"code": 403, "message": "x"}',
            "Locked: the proxy is running",
            "Load this page again",
        ),
        (403, "host-not-allowed", '{"code": 403, "message": "told"}', "Refused: the proxy is running", "told"),
        (503, "shutting-down", '{"code": 503, "message": "told"}', "Stopping: no new", "told"),
        (200, None, "<html>", "Not the proxy: another program answers", "status 200"),
        (404, None, '{"error": "none"}', "Not the proxy: another program answers", "status 404"),
    ],
)
async def test_what_the_page_says_when_it_gets_no_figures(  # noqa: PLR0913 - the columns
    browser: Browser, status: int, slug: str | None, body: str, sentence: str, cure: str, sandbox: Sandbox
) -> None:
    """It tells a proxy that refuses it from one that is gone, and from another program; old figures are marked."""
    async with running(sandbox.url) as (_, url), opened(browser, url, strict=False) as page:
        await expect(page.locator("#live")).to_have_text("live")
        headers = {} if slug is None else {"X-Metquay-Proxy-Error": slug}

        async def answer(route: Any) -> None:  # noqa: ANN401 - Playwright's own
            await route.fulfill(status=status, body=body, headers=headers)

        await page.route("**/-/events", answer)
        await page.route("**/-/status", answer)
        await page.reload()
        await expect(page.locator("#sentence")).to_contain_text(sentence)
        await expect(page.locator("#cure")).to_contain_text(cure)
        await expect(page.locator("#live")).to_have_text("old figures")
        await page.unroute_all()
        await expect(page.locator("#sentence")).to_contain_text("Ready", timeout=10_000)
        assert await page.locator("main").get_attribute("data-stale") is None
