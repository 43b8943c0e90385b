from __future__ import annotations

import asyncio
import gzip
import io
import json
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from metquay_proxy.sandbox.records import CUSTOMERS, Records
from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults, Sandbox
from tests.fake_time import FakeTime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

KEYS = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
PAGE = "text/html;charset=utf-8"


@dataclass
class Client:
    """A simulator on a clock that only the test moves, and a session with a token for it."""

    sandbox: Sandbox
    session: aiohttp.ClientSession
    clock: FakeTime
    slept: list[float] = field(default_factory=list)

    async def login(self) -> None:
        """Get a token and use it from now on."""
        status, body = await self.call("POST", "/authenticate", json=KEYS)
        assert 200 == status
        self.session.headers["Authorization"] = f"Bearer {body['accessToken']}"

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:  # noqa: ANN401 - aiohttp's options
        """Status and body of one request below the base: parsed JSON, text of a page, or None for no body."""
        async with self.session.request(method, self.sandbox.url + path, **options) as answer:
            body = await answer.read()
            if answer.content_type == "application/json" and body:
                return answer.status, json.loads(body)
            return answer.status, body.decode() or None

    async def control(self, method: str, page: str, **options: Any) -> tuple[int, Any]:  # noqa: ANN401 - aiohttp's options
        """The same for a page of the simulator's own."""
        root = self.sandbox.url.removesuffix("/api/v1")
        async with self.session.request(method, f"{root}{page}", **options) as answer:
            return answer.status, await answer.json()

    async def raw(self, request: str | bytes) -> bytes:
        """All that a connection answers to these bytes before it closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.sandbox.port)
        writer.write(request.encode() if isinstance(request, str) else request)
        answer = await reader.read()
        writer.close()
        return answer


async def until(condition: Callable[[], bool]) -> None:
    """Let everything run until the condition holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., Any]]:
    """Opens clients for sandboxes with the given properties."""
    clients: list[Client] = []

    async def opener(*, login: bool = True, **properties: Any) -> Client:  # noqa: ANN401 - the sandbox's properties
        clock, slept = FakeTime(), list[float]()

        async def sleep(seconds: float) -> None:
            slept.append(seconds)

        sandbox = Sandbox(**({"clock": clock.now, "sleep": sleep, "rate_limit": None} | properties))
        await sandbox.start()
        clients.append(Client(sandbox, aiohttp.ClientSession(), clock, slept))
        if login:
            await clients[-1].login()
        return clients[-1]

    yield opener
    for client in clients:
        await client.session.close()
        await client.sandbox.stop()


@pytest.fixture
async def client(opened: Callable[..., Any]) -> Client:
    """A client that is logged in, without quota."""
    return await opened()  # type: ignore[no-any-return]


class TestLogin:
    async def test_the_keys_buy_a_token(self, opened: Callable[..., Any]) -> None:
        """The answer has the vendor's three fields, and the token opens the API."""
        client = await opened(login=False)
        status, body = await client.call("POST", "/authenticate", json=KEYS)
        assert (200, "bearer", 900) == (status, body["tokenType"], body["expiresIn"])
        headers = {"Authorization": f"bearer  {body['accessToken']}"}
        assert 200 == (await client.call("GET", "/works", headers=headers))[0]
        assert (1, 0) == (client.sandbox.logins, client.sandbox.refused_logins)

    @pytest.mark.parametrize(
        "body",
        [b"", b"[]", b"{}", b'{"accessKey":1,"secretKey":""}', b'{"accessKey":"sandbox-access-key","secretKey":"x"}'],
    )
    async def test_wrong_keys_are_a_400(self, opened: Callable[..., Any], body: bytes) -> None:
        """The only refusal that is documented for a login."""
        client = await opened(login=False)
        status, error = await client.call("POST", "/authenticate", data=body)
        assert (400, 400) == (status, error["code"])
        assert (0, 1) == (client.sandbox.logins, client.sandbox.refused_logins)

    async def test_a_token_really_expires(self, opened: Callable[..., Any]) -> None:
        """A token lives exactly its time; a newer one does not end an older."""
        client = await opened(token_lifetime=10)
        await client.clock.advance(5)
        old = client.session.headers["Authorization"]
        await client.login()
        assert 200 == (await client.call("GET", "/customers", headers={"Authorization": old}))[0]
        await client.clock.advance(5)
        status, error = await client.call("GET", "/customers", headers={"Authorization": old})
        assert {"code": 401, "message": "Invalid or expired access token. Please re-authenticate."} == error
        assert 200 == (await client.call("GET", "/customers"))[0]
        assert (401, 1) == (status, client.sandbox.refused_401)


class TestQuota:
    async def test_the_101st_in_a_minute_is_refused(self, opened: Callable[..., Any]) -> None:
        """The window slides; the vendor's text says how long to wait, and that is true."""
        client = await opened(rate_limit=(100, 60.0))
        for moved in (0, 20):
            await client.clock.advance(moved)
            assert {200} == {(await client.call("GET", "/works?limit=1"))[0] for _ in range(50)}
        await client.clock.advance(9.5)
        status, error = await client.call("GET", "/works")
        text = "API rate limit of 100 requests per minute exceeded. Please try again in 31 seconds."
        assert (429, {"code": 429, "message": text}) == (status, error)
        await client.clock.advance(30.5)
        assert {200} == {(await client.call("GET", "/works?limit=1"))[0] for _ in range(50)}
        assert 429 == (await client.call("GET", "/works"))[0]
        assert (152, 2) == (client.sandbox.requests, client.sandbox.refused_429)

    async def test_everything_but_logins_counts(self, opened: Callable[..., Any]) -> None:
        """A 401 and a 404 cost a slot; logins, the simulator's own pages and refusals cost none."""
        client = await opened(rate_limit=(2, 60.0))
        await client.login()
        await client.control("GET", "/_sandbox/books")
        assert 404 == (await client.call("DELETE", "/customers/1"))[0]
        assert 401 == (await client.call("GET", "/customers", headers={"Authorization": "Bearer x"}))[0]
        assert 429 == (await client.call("GET", "/customers"))[0]
        await client.clock.advance(60)
        assert 200 == (await client.call("GET", "/customers"))[0]

    @pytest.mark.parametrize(("on", "expected"), [(False, None), (True, "60")])
    async def test_retry_after_is_a_question_of_faults(
        self,
        opened: Callable[..., Any],
        on: bool,  # noqa: FBT001 - a parameter
        expected: str | None,
    ) -> None:
        """Off as with the vendor, who documents no such header; where on, it says what the text says."""
        client = await opened(rate_limit=(1, 60.0), faults=Faults(retry_after=on))
        await client.call("GET", "/works")
        async with client.session.get(f"{client.sandbox.url}/works") as answer:
            assert (429, expected) == (answer.status, answer.headers.get("Retry-After"))


class TestHttp:
    async def test_puts_and_deletes_answer_nothing(self, client: Client) -> None:
        """200 with an empty body and no content type."""
        _, created = await client.call("POST", "/customers", json={"companyName": "Acme"})
        url = f"{client.sandbox.url}/customers/{created['metquayId']}"
        for method in ("PUT", "DELETE"):
            async with client.session.request(method, url, json={"companyName": "Acme"}) as answer:
                assert (200, b"") == (answer.status, await answer.read())
                assert "Content-Type" not in answer.headers
                assert "0" == answer.headers["Content-Length"]

    @pytest.mark.parametrize(
        "path",
        ["/customer", "/customers/", "//customers", "/customers/1/works", "/Customers", "/authenticate/", "/../x"],
    )
    async def test_an_unknown_address_is_the_containers_affair(self, client: Client, path: str) -> None:
        """A page, whoever asks."""
        answer = await client.raw(f"GET /api/v1{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
        assert PAGE.encode() in answer

    @pytest.mark.parametrize(
        "request_text",
        [
            "GET /api/v1/customers?a=[1] HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            "GET /api/v1/customers%2F1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            f"GET /api/v1/works HTTP/1.1\r\nHost: x\r\nConnection: close\r\nA: {'a' * 5000}\r\nB: {'b' * 5000}\r\n\r\n",
            f"GET /api/v1/works HTTP/1.1\r\nHost: x\r\nA: {'a' * 9000}\r\n\r\n",
            "FOO /api/v1/works HTTP/1.1\r\nHost: x\r\n\r\n",
            "nonsense\r\n\r\n",
        ],
    )
    async def test_what_tomcat_refuses_is_a_400_page(self, client: Client, request_text: str) -> None:
        """Raw brackets, an encoded slash, heads over 8 KiB and what is no HTTP."""
        answer = await client.raw(request_text)
        assert b" 400 Bad Request\r\n" in answer
        assert PAGE.encode() in answer

    async def test_a_broken_body_executes_nothing(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        """Bad chunks are a 400; a client that leaves in mid-body leaves no record and no traceback."""
        head = f"Host: x\r\nAuthorization: {client.session.headers['Authorization']}\r\n"
        start = f"POST /api/v1/customers HTTP/1.1\r\n{head}"
        assert b" 400 Bad Request" in await client.raw(f"{start}Transfer-Encoding: chunked\r\n\r\nZZ\r\n")
        before = client.sandbox.requests
        _, writer = await asyncio.open_connection("127.0.0.1", client.sandbox.port)
        writer.write(f'{start}Content-Length: 99\r\n\r\n{{"companyName":"Half"'.encode())
        await writer.drain()
        await until(lambda: client.sandbox.requests > before)
        writer.close()
        await writer.wait_closed()
        assert 200 == (await client.call("GET", "/customers"))[0]
        assert [] == list(client.sandbox.writes)
        assert "" == caplog.text

    @pytest.mark.parametrize(
        "body",
        [
            *(b"", b"{", b'"text"', b'{"companyName": NaN}', b'{"companyName": "\xff"}', b"[" * 100_000),
            gzip.compress(b"{}"),
        ],
    )
    async def test_a_body_that_is_no_object_is_a_400(self, client: Client, body: bytes) -> None:
        """Syntax, encoding, constants that JSON lacks, bottomless nesting and compression."""
        status, error = await client.call("POST", "/customers", data=body)
        assert (400, 400) == (status, error["code"])
        assert error["message"].startswith(
            "The request contains invalid fields or missing required parameters: the body"
        )

    async def test_a_body_without_end_is_a_413(self, client: Client) -> None:
        """The simulator's memory is not the client's."""
        status, page = await client.call("POST", "/customers", data=io.BytesIO(b" " * (16 * 1024 * 1024 + 1)))
        assert 413 == status
        assert page.startswith("<!doctype html>")

    async def test_text_is_utf_8(self, client: Client) -> None:
        """Letters come back as they went; half a surrogate pair becomes a question mark, as in Java."""
        await client.call("POST", "/customers", data=b'{"companyName": "Z\\u00fcrich \\ud800"}')
        _, rows = await client.call("GET", "/customers?first=140")
        assert ["Zürich ?"] == [row["companyName"] for row in rows]

    @pytest.mark.parametrize("row", ["abc", "0", "-1", "1.5", "%2B1", "1%20"])
    async def test_an_id_that_is_no_number_is_a_400(self, client: Client, row: str) -> None:
        """Before the body is looked at."""
        head = f"Host: x\r\nAuthorization: {client.session.headers['Authorization']}\r\nConnection: close\r\n"
        answer = await client.raw(f"PUT /api/v1/customers/{row} HTTP/1.1\r\n{head}\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b'metquayId must be an integer from 1 on"}')

    @pytest.mark.parametrize(
        ("query", "ids"),
        [
            ("first=1&limit=2", [10302, 10303]),
            ("first=139", [10440]),
            ("first=140", []),
            ("limit=1&limit=9", [10301]),
            ("limit=1&workspaceCode=&colour=red", [10301]),
            ("limit=99999999999999999999&first=138", [10439, 10440]),
            ("workspaceCode=nowhere", []),
        ],
    )
    async def test_lists_are_paged(self, client: Client, query: str, ids: list[int]) -> None:
        """From first on, at most limit, of one workspace; what is unknown is ignored."""
        status, rows = await client.call("GET", f"/customers?{query}")
        assert (200, ids) == (status, [row["id"] for row in rows])

    @pytest.mark.parametrize("query", ["first=-1", "first=x", "first=", "limit=0", "limit=1.0", f"limit={'9' * 1001}"])
    async def test_bad_paging_is_a_400(self, client: Client, query: str) -> None:
        """The message names the parameter."""
        status, error = await client.call("GET", f"/works?{query}")
        assert (400, True) == (status, query.partition("=")[0] in error["message"])

    async def test_a_list_shows_the_last_write(self, client: Client) -> None:
        """Answers are kept only until something changes."""
        for name in ("Acme", "Beta"):
            await client.call("PUT", "/customers/10301", json={"companyName": name})
            for _ in range(2):
                _, rows = await client.call("GET", "/customers?limit=1")
                assert name == rows[0]["companyName"]
        for first in range(300):
            await client.call("GET", f"/works?limit=1&first={first}")
        assert len(client.sandbox._pages) < 300

    async def test_a_large_laboratory_is_read_page_by_page(self, opened: Callable[..., Any]) -> None:
        """As many records as were wanted; of these pages only the short ones, at the ends, are kept."""
        client = await opened(records=1234)
        for kind in ("customers", "customer-instrument-details", "works"):
            pages = [(await client.call("GET", f"/{kind}?first={first}&limit=500"))[1] for first in (0, 500, 1000)]
            assert [500, 500, 234] == [len(page) for page in pages]
            assert 1234 == len({row["id"] for page in pages for row in page})
        assert 3 == len(client.sandbox._pages)

    @pytest.mark.parametrize(("query", "number"), [("limit=1000", 3), ("", 3), ("limit=2", 2), ("first=139", 1)])
    async def test_a_page_can_be_capped(self, opened: Callable[..., Any], query: str, number: int) -> None:
        """It holds the most that the server allows, whatever limit asks for; the pages after it join on."""
        client = await opened(max_page=3)
        first = 139 if "first" in query else 0
        _, rows = await client.call("GET", f"/customers?{query}")
        assert [*range(10301 + first, 10301 + first + number)] == [row["id"] for row in rows]


class TestLife:
    async def test_stopping_is_quick(self, opened: Callable[..., Any]) -> None:
        """Neither an idle connection nor a request under way holds it up; stopping again does nothing."""
        waiting = asyncio.Event()

        async def for_ever(_: float) -> None:
            waiting.set()
            await asyncio.Event().wait()

        client = await opened(sleep=for_ever)
        reader, writer = await asyncio.open_connection("127.0.0.1", client.sandbox.port)
        client.sandbox.faults = Faults(latency=1)
        request = asyncio.create_task(client.call("GET", "/customers"))
        await waiting.wait()
        start = time.monotonic()
        await client.sandbox.stop()
        assert time.monotonic() - start < 0.2
        assert b"" == await reader.read()
        with pytest.raises(aiohttp.ClientError):
            await request
        writer.close()
        await client.sandbox.stop()

    async def test_a_client_that_leaves_does_not_stop_its_write(self, opened: Callable[..., Any]) -> None:
        """A server executes what it got."""
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def hold(_: float) -> None:
            arrived.set()
            await go_on.wait()

        client = await opened(sleep=hold, records=Records())
        client.sandbox.faults = Faults(latency=1)
        request = asyncio.create_task(client.call("POST", "/customers", json={"companyName": "Acme"}))
        await arrived.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await client.session.close()
        await asyncio.sleep(0.01)
        go_on.set()
        await until(lambda: bool(client.sandbox.writes))
        assert [False] == [write["answered"] for write in client.sandbox.writes]
        assert 1 == client.sandbox.records.counts()[CUSTOMERS]


class TestFaults:
    async def test_latency_is_slept(self, opened: Callable[..., Any]) -> None:
        """Each answer of the API, logins too, comes after the latency and a part of the jitter."""
        client = await opened(faults=Faults(latency=2, jitter=1))
        await client.call("GET", "/customers")
        await client.control("GET", "/_sandbox/books")
        assert 2 == len(client.slept)
        assert all(2 <= seconds <= 3 for seconds in client.slept)
        assert client.slept[0] != client.slept[1]

    @pytest.mark.parametrize(
        ("status", "text"),
        [
            (500, "An unexpected error occurred."),
            (403, "You don't have permission to access this resource"),
            (404, "The requested resource with ID 10427 does not exist"),
            (401, "Please re-authenticate."),
            (429, "Please try again in 30 seconds."),
        ],
    )
    async def test_failures_have_the_vendors_texts(self, client: Client, status: int, text: str) -> None:
        """What fails is not executed."""
        client.sandbox.faults = Faults(fail={status: 1})
        got, error = await client.call("POST", "/customers", json={"companyName": "Acme"})
        assert (status, status) == (got, error["code"])
        assert text in error["message"]
        assert [] == list(client.sandbox.writes)

    async def test_failures_come_at_their_rate(self, client: Client) -> None:
        """Several statuses share the requests, the same way in each run."""
        client.sandbox.faults = Faults(fail={503: 0.3, 500: 0.2})
        seen = [(await client.call("GET", "/works?limit=1"))[0] for _ in range(200)]
        assert 40 < seen.count(503) < 80
        assert 25 < seen.count(500) < 55
        status, page = 0, ""
        while 503 != status:
            status, page = await client.call("GET", "/works?limit=1")
        assert page.startswith("<!doctype html>")

    async def test_a_login_outage_ends_by_itself(self, client: Client) -> None:
        """For some seconds, or until it is switched off, logins are 503 while tokens go on."""
        for outage, answer in ((30.0, 10.0), (True, True)):
            client.sandbox.faults = Faults(login_outage=outage)
            await client.clock.advance(20)
            assert answer == client.sandbox.faults.login_outage
            assert 503 == (await client.call("POST", "/authenticate", json=KEYS))[0]
            assert 200 == (await client.call("GET", "/works"))[0]
            if outage is not True:
                client.sandbox.faults = client.sandbox.faults.changed({"latency": 0})
                await client.clock.advance(10)
                assert client.sandbox.faults.login_outage is False
                await client.login()
        client.sandbox.faults = Faults()
        await client.login()

    async def test_tokens_can_be_forgotten(self, client: Client) -> None:
        """Once: new tokens are good."""
        client.sandbox.faults = Faults(expire_tokens=True)
        assert client.sandbox.faults.expire_tokens is False
        assert 401 == (await client.call("GET", "/works"))[0]
        await client.login()
        assert 200 == (await client.call("GET", "/works"))[0]

    async def test_an_answer_can_be_lost(self, client: Client) -> None:
        """The write is executed and in the books, the connection closes without a byte."""
        client.sandbox.faults = Faults(lose_answer=1)
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await client.call("POST", "/customers", json={"companyName": "Acme"}, headers={"X-Request-Id": "r-1"})
        expected = {"method": "POST", "path": "/api/v1/customers", "id": 10441, "requestId": "r-1", "answered": False}
        assert [expected] == list(client.sandbox.writes)

    async def test_an_answer_can_break_off(self, client: Client) -> None:
        """Half of the body, then a reset; where there is no body, a reset."""
        client.sandbox.faults = Faults(reset=1)
        rest = f" HTTP/1.1\r\nHost: x\r\nAuthorization: {client.session.headers['Authorization']}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", client.sandbox.port)
        writer.write(f"GET /api/v1/customers{rest}".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.partition("Content-Length: ")[2].partition("\r\n")[0])
        assert await reader.readexactly(length // 2)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        free = next(row["id"] for row in client.sandbox.records.page(CUSTOMERS, 135))
        for request in (f"DELETE /api/v1/customers/{free}", "HEAD /api/v1/customers"):
            with pytest.raises(ConnectionResetError):
                await client.raw(request + rest)
        assert [False] == [write["answered"] for write in client.sandbox.writes]

    async def test_a_body_can_trickle(self, client: Client) -> None:
        """The body is whole and takes as long as the rate says."""
        client.sandbox.faults = Faults(slow_body=1000)
        async with client.session.get(f"{client.sandbox.url}/customers?limit=5") as answer:
            body = await answer.read()
        assert 5 == len(json.loads(body))
        assert len(body) / 1000 <= sum(client.slept) < len(body) / 1000 + 0.1


class TestControl:
    async def test_faults_are_shown_set_and_cleared(self, client: Client) -> None:
        """Names in either spelling, values as JSON or as a flag has them; what is not named stays."""
        wanted = {"lose-answer": 0.25, "slow_body": "100", "retry-after": "on", "fail": ["503=0.5", "500=0.1"]}
        status, shown = await client.control("POST", "/_sandbox/faults", json=wanted)
        expected = {"lose_answer": 0.25, "slow_body": 100, "retry_after": True, "fail": {"503": 0.5, "500": 0.1}}
        assert 200 == status
        assert expected.items() <= shown.items()
        _, shown = await client.control("POST", "/_sandbox/faults", json={"fail": {"429": 1}, "login-outage": True})
        assert (0.25, {"429": 1.0}, True) == (shown["lose_answer"], shown["fail"], shown["login_outage"])
        assert (200, shown) == await client.control("GET", "/_sandbox/faults")
        await client.control(
            "POST", "/_sandbox/faults", json={"fail": "", "login-outage": "off", "token-lifetime": None}
        )
        assert Faults(lose_answer=0.25, slow_body=100, retry_after=True) == client.sandbox.faults
        await client.control("DELETE", "/_sandbox/faults")
        assert Faults() == client.sandbox.faults

    @pytest.mark.parametrize(
        ("wanted", "right"),
        [
            *[
                ({"latency": value}, 'give seconds from 0 to 86400, as in {"latency": 0.5}')
                for value in ("soon", True, -1, None, [], 10**400, "9" * 400)
            ],
            ({"lose-answer": 1.5}, 'give a rate from 0 (never) to 1 (always), as in {"lose-answer": 0.1}'),
            ({"reset": "nan"}, 'give a rate from 0 (never) to 1 (always), as in {"reset": 0.1}'),
            ({"retry_after": 1}, 'switch it on or off, as in {"retry_after": true}'),
            (
                {"login_outage": "x"},
                'give seconds from 0 to 86400, or switch it on or off, as in {"login_outage": true}',
            ),
            *[
                (
                    {"fail": value},
                    'give each status (400 to 599) its rate, at most 1 in all, as in {"fail": {"503": 0.1}}',
                )
                for value in (0.1, {"200": 1}, {"500": 0.6, "503": 0.6}, {"x": 1}, "500", 5, [5], None)
            ],
            ({"slow-body": "fast"}, 'give bytes a second, or 0 for no limit, as in {"slow-body": 1000}'),
        ],
    )
    async def test_a_bad_fault_is_explained(self, client: Client, wanted: object, right: str) -> None:
        """A 400 that names the field, and shows what would be right, which is taken; before that nothing changes."""
        status, error = await client.control("POST", "/_sandbox/faults", json=wanted)
        assert (400, {"code": 400, "message": f"{json.dumps(wanted)} is wrong: {right}"}) == (status, error)
        assert Faults() == client.sandbox.faults
        status, _ = await client.control("POST", "/_sandbox/faults", json=json.loads(right.partition("as in ")[2]))
        assert 200 == status

    async def test_an_unknown_fault_is_explained(self, client: Client) -> None:
        """With the names that there are."""
        status, error = await client.control("POST", "/_sandbox/faults", json={"colour": 1})
        names = ", ".join(asdict(Faults()))
        assert (400, f"there is no fault 'colour'; the faults are {names}") == (status, error["message"])

    @pytest.mark.parametrize("body", [b"latency=1", b"[]", b"", b"[" * 100_000])
    async def test_faults_that_are_no_json_object_are_refused(self, client: Client, body: bytes) -> None:
        """With an example, which is taken."""
        status, error = await client.control("POST", "/_sandbox/faults", data=body)
        text, _, example = error["message"].partition(", such as ")
        assert (400, "the faults must be a JSON object") == (status, text)
        status, _ = await client.control("POST", "/_sandbox/faults", data=example)
        assert 200 == status

    @pytest.mark.parametrize(
        ("name", "value", "status"),
        [
            *[("Origin", value, 403) for value in ("http://evil.example", "null")],
            *[("Sec-Fetch-Site", *row) for row in (("cross-site", 403), ("same-site", 403), ("none", 200))],
            ("Host", "rebound.evil.example:6388", 403),
            *[("Host", value, 200) for value in ("localhost:6388", "app.localhost", "sandbox:6388", "[::1]:6388")],
        ],
    )
    async def test_no_web_page_switches_faults_on(self, client: Client, name: str, value: str, status: int) -> None:
        """What a browser marks as a page's, or what names a host that a page may own, is refused."""
        answered, _ = await client.control("POST", "/_sandbox/faults", json={"latency": 1}, headers={name: value})
        assert (status, 1.0 if status == 200 else 0.0) == (answered, client.sandbox.faults.latency)

    async def test_the_books_say_what_was_executed(self, client: Client) -> None:
        """Counters, records and each write that was executed, refused ones not."""
        await client.call("PUT", "/customers/10301", json={"companyName": "Acme"}, headers={"X-Request-Id": "r-1"})
        await client.call("PUT", "/customers/10301", json={})
        _, books = await client.control("GET", "/_sandbox/books", headers={"Authorization": ""})
        expected = {
            "method": "PUT",
            "path": "/api/v1/customers/10301",
            "id": 10301,
            "requestId": "r-1",
            "answered": True,
        }
        assert [expected] == books["writes"]
        counters = {"requests": 2, "logins": 1, "refused_logins": 0, "refused_401": 0, "refused_429": 0}
        assert counters.items() <= books.items()
        assert 140 == books["records"]["customers"]

    @pytest.mark.parametrize(
        ("page", "allowed"), [("/_sandbox/books", "GET"), ("/_sandbox/faults", "GET, POST, DELETE")]
    )
    async def test_other_methods_are_405(self, client: Client, page: str, allowed: str) -> None:
        """With the methods that there are."""
        async with client.session.put(client.sandbox.url.removesuffix("/api/v1") + page) as answer:
            assert (405, allowed) == (answer.status, answer.headers["Allow"])


class TestLegacy:
    URL = "/FlexicalERP/rest/customer/createCustomer"

    async def test_the_older_interface_reaches_the_same_records(self, client: Client) -> None:
        """Its users name themselves in the body, and its writes are in the books."""
        body = {"username": ACCESS_KEY, "password": SECRET_KEY, "model": "customer"}
        model = {"northlabCustomer": [{"companyName": "Odoo SA"}]}
        status, answer = await client.control("POST", self.URL, json=body | model, headers={"Authorization": ""})
        assert (200, "700") == (status, answer["responseCode"])
        assert "Odoo SA" == client.sandbox.records.answer(CUSTOMERS, answer["response"]["calibrId"])["companyName"]
        status, answer = await client.control("POST", self.URL, json=body | model | {"password": "x"})
        assert (200, "401") == (status, answer["responseCode"])
        assert [self.URL] == [write["path"] for write in client.sandbox.writes]

    async def test_its_mistakes_are_errors(self, client: Client) -> None:
        """A body that is no object is a 400, another method a 405, another call a page."""
        assert 400 == (await client.control("POST", self.URL, json=[]))[0]
        assert 405 == (await client.control("GET", self.URL))[0]
        async with client.session.post(client.sandbox.url.removesuffix("/api/v1") + self.URL + "s") as answer:
            assert (404, "text/html") == (answer.status, answer.content_type)
