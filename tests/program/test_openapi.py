"""The judge of the simulator: the vendor's OpenAPI file where it is at hand, else our own table of the operations.

``OPENAPI_FILE`` names the file, which is not ours to ship. ``ORIGINS`` says by which way the API is reached: the
simulator itself, or a proxy in front of it, for which an entry is all that is needed.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import urllib.request
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Sandbox
from tests.operations import BAD, GOOD, LOGIN, MATCHES, OPERATIONS, Operation
from tests.running import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

OPENAPI_FILE = os.environ.get("OPENAPI_FILE")
with_file = pytest.mark.skipif(OPENAPI_FILE is None, reason="OPENAPI_FILE is not set")


@dataclass(frozen=True)
class Origin:
    """Where the API is reached, with which headers, and whether a token is wanted there."""

    url: str
    headers: dict[str, str]
    needs_token: bool = True


@contextmanager
def loop_beside() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs coroutines on a loop in a thread of its own, because the judge blocks the one that it runs on."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def direct() -> Iterator[Origin]:
    """The simulator, without quota and without anything between."""
    with loop_beside() as run:
        sandbox = Sandbox(rate_limit=None)
        run(sandbox.start())
        try:
            keys = json.dumps({"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}).encode()
            with urllib.request.urlopen(f"{sandbox.url}/authenticate", keys) as answer:  # noqa: S310 - our own address
                token = json.load(answer)["accessToken"]
            yield Origin(sandbox.url, {"Authorization": f"Bearer {token}"})
        finally:
            run(sandbox.stop())


@contextmanager
def through_the_proxy() -> Iterator[Origin]:
    """The simulator behind the proxy, which takes any keys at a login and needs no token."""
    with loop_beside() as run:
        sandbox = Sandbox(rate_limit=None)
        run(sandbox.start())
        running_ = running(sandbox.url, rate_limit="off")
        try:
            _, url = run(running_.__aenter__())
            yield Origin(url, {}, needs_token=False)
        finally:
            run(running_.__aexit__(None, None, None))
            run(sandbox.stop())


ORIGINS: dict[str, Callable[[], AbstractContextManager[Origin]]] = {
    "direct": direct,
    "through the proxy": through_the_proxy,
}


@pytest.fixture(params=ORIGINS)
def origin(request: pytest.FixtureRequest) -> Iterator[Origin]:
    """Each way to the API in turn."""
    with ORIGINS[request.param]() as way:
        yield way


def as_meant(node: Any) -> Any:  # noqa: ANN401 - any part of a JSON document
    """The specification with its dates as the API really has them: MM-dd-yyyy out, and that or ISO 8601 in."""
    if isinstance(node, list):
        return [as_meant(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {name: as_meant(part) for name, part in node.items()}
    month, year = "(0[1-9]|1[0-2])", "[12][0-9]{3}"
    if kept.get("format") == "date":
        del kept["format"]
        kept["pattern"] = f"^{month}-(0[1-9]|[12][0-9]|3[01])-{year}$"
    elif kept.get("format") == "date-time":
        del kept["format"]
        # No day past the 28th, so that every text that is generated is a day.
        day = "(0[1-9]|1[0-9]|2[0-8])"
        time = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
        kept["pattern"] = f"^({month}-{day}-{year} |{year}-{month}-{day}T){time}$"
    return kept


@pytest.mark.slow
@with_file
def test_the_judge_finds_nothing(origin: Origin) -> None:
    """Thousands of generated requests, right and wrong, get the answers that the vendor's file promises."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis.engine import events, from_schema  # noqa: PLC0415 - a tool of development

    # A request that keeps to the schema may still break a rule (422), meet its like (409) or a stranger's id (404).
    business = ["2xx", "404", "409", "422"]
    config = {
        "base-url": origin.url,
        "headers": origin.headers,
        "seed": 1,
        "continue-on-failure": True,
        "generation": {"max-examples": 8, "database": "none", "no-shrink": True},
        "checks": {
            "positive_data_acceptance": {"expected-statuses": business},
        },
        # The file documents no 401 for a login: keys that are wrong but well-formed get 400.
        "operations": [
            {
                "include-path": "/authenticate",
                "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400"]}},
            }
        ],
    }
    document = as_meant(json.loads(Path(OPENAPI_FILE or "").read_text(encoding="utf-8")))
    if not origin.needs_token:
        del document["components"]["securitySchemes"]
        document.pop("security", None)
        for methods in document["paths"].values():
            for operation in methods.values():
                operation.pop("security", None)
    schema = schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict(config))
    checks, found = 0, []
    for event in from_schema(schema).execute():
        if isinstance(event, (events.NonFatalError, events.FatalError)):
            found.append(repr(getattr(event, "value", None) or getattr(event, "exception", None)))
        elif isinstance(event, events.ScenarioFinished):
            for case, nodes in event.recorder.checks.items():
                checks += len(nodes)
                response = event.recorder.find_response(case_id=case)
                answer = response and response.content
                found += [
                    f"{node.name}: {node.failure_info.failure.message} {node.failure_info.code_sample} {answer!r}"
                    for node in nodes
                    if node.failure_info is not None
                ]
    assert [] == sorted(set(found))
    assert checks > 10_000


@pytest.mark.slow
@with_file
def test_our_table_agrees_with_the_vendors_file() -> None:
    """What the table says in our words is what the file says; fields marked + may be missing there."""
    document = json.loads(Path(OPENAPI_FILE or "").read_text(encoding="utf-8"))
    found = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert found == {(operation.method, operation.path) for operation in OPERATIONS}

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        return document["components"]["schemas"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    for operation in OPERATIONS:
        described = document["paths"][operation.path][operation.method.lower()]
        assert {operation.status, *operation.refuses} == {int(status) for status in described["responses"]}
        if operation.takes:
            takes = resolved(described["requestBody"]["content"]["application/json"]["schema"])
            assert set(takes["properties"]) == set(operation.fields)
            assert set(takes["required"]) == operation.required
        if operation.gives is not None:
            gives = resolved(described["responses"][str(operation.status)]["content"]["application/json"]["schema"])
            properties = resolved(gives.get("items", gives))["properties"]
            seen_live = {name.rstrip("+") for name in operation.gives if name.endswith("+")}
            assert set(properties) - seen_live == set(operation.gives) - {f"{name}+" for name in seen_live}


IDS = {
    "/customers": 10301,
    "/instrument-categories": 1,
    "/customer-instrument-details": 8001,
    "/works": 21401,
}
REFERENCES = {"companyId": "MCS-001", "instrumentCategoryName": "Caliper", "customerInstrumentId": 8234}


@dataclass(frozen=True)
class Api:
    """A session with a token on a simulator of its own."""

    session: aiohttp.ClientSession
    url: str

    async def call(
        self, operation: Operation, body: object = None, *, row: int = 1, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and parsed body (None where it is empty) of one request."""
        url = self.url + operation.path.format(metquayId=row)
        async with self.session.request(operation.method, url, json=body, headers=headers) as answer:
            return answer.status, json.loads(await answer.read() or "null")


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    """The simulator's own records, without quota."""
    sandbox = Sandbox(rate_limit=None)
    await sandbox.start()
    async with aiohttp.ClientSession() as session:
        _, login = await Api(session, sandbox.url).call(LOGIN, {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY})
        session.headers["Authorization"] = f"Bearer {login['accessToken']}"
        yield Api(session, sandbox.url)
    await sandbox.stop()


def a_body(operation: Operation, *, full: bool) -> dict[str, Any]:
    """A request that is accepted: with every field, or with the required ones alone."""
    fields = {name: kind for name, kind in operation.fields.items() if full or name in operation.required}
    return {name: REFERENCES.get(name, GOOD.get(kind)) for name, kind in fields.items()}


def named(operation: Operation) -> str:
    """The operation's name in a report."""
    return f"{operation.method} {operation.path}"


READS = [operation for operation in OPERATIONS if operation.method == "GET"]
CREATES = [operation for operation in OPERATIONS if operation.method == "POST" and operation is not LOGIN]
REPLACES = [operation for operation in OPERATIONS if operation.method == "PUT"]
WITH_BODY = [*CREATES, *REPLACES, LOGIN]


def row_of(operation: Operation) -> int:
    """The id of a record to which the operation may be tried."""
    return IDS.get(operation.path.removesuffix("/{metquayId}"), 0)


@pytest.mark.parametrize("operation", READS, ids=named)
async def test_lists_have_the_fields_of_the_table_and_no_others(api: Api, operation: Operation) -> None:
    """Every answer field is of its type, and those that a laboratory would have are there."""
    status, rows = await api.call(operation)
    assert (200, 50) == (status, len(rows))
    gives = {name.rstrip("+"): kind for name, kind in (operation.gives or {}).items()}
    for row in rows:
        assert set(gives) >= set(row)
        assert [] == [name for name, value in row.items() if not MATCHES[gives[name]](value)]
    assert len({name for row in rows for name in row}) > len(gives) / 2


@pytest.mark.parametrize("full", [False, True], ids=["required", "all"])
@pytest.mark.parametrize("operation", CREATES, ids=named)
async def test_creating_takes_each_field_and_replacing_too(api: Api, operation: Operation, full: bool) -> None:  # noqa: FBT001 - a parameter
    """A request with only the required fields, or with all of them, is accepted and comes back in the list."""
    body = a_body(operation, full=full)
    status, created = await api.call(operation, body)
    assert 201 == status
    assert ["metquayId"] == list(created)
    replace = next(other for other in REPLACES if other.path.startswith(f"{operation.path}/"))
    assert (200, None) == await api.call(replace, body, row=created["metquayId"])
    if read := next((other for other in READS if other.path == operation.path), None):
        url = f"{api.url}{read.path}?limit=999999"
        async with api.session.get(url) as answer:
            row = (await answer.json())[-1]
        sent = {name: value for name, value in body.items() if name in row and operation.fields[name] != "day"}
        assert sent == {name: row[name] for name in sent}
        days = {name for name, kind in operation.fields.items() if kind == "day"} & set(body)
        assert dict.fromkeys(days, "01-22-2024") == {name: row[name] for name in days}


@pytest.mark.parametrize("operation", WITH_BODY, ids=named)
async def test_each_field_is_checked_for_its_type(api: Api, operation: Operation) -> None:
    """A wrong type or word in any field, or null, is a 400."""
    body = a_body(operation, full=False)
    for name, kind in operation.fields.items():
        wrongs: list[object] = [BAD[kind], None, []]
        for wrong in wrongs:
            status, error = await api.call(operation, body | {name: wrong}, row=row_of(operation))
            assert (400, 400) == (status, error["code"])
            assert name in error["message"] or operation is LOGIN


@pytest.mark.parametrize("operation", WITH_BODY, ids=named)
async def test_each_required_field_is_missed(api: Api, operation: Operation) -> None:
    """A request without a required field, or with a blank one, is a 422; a login, which documents none, gets 400."""
    body = a_body(operation, full=False)
    for name in operation.required:
        without = {other: value for other, value in body.items() if other != name}
        wrong = [without]
        if operation.fields[name] != "whole":
            wrong.append(body | {name: "  "})
        for sent in wrong:
            status, error = await api.call(operation, sent, row=row_of(operation))
            assert (400 if operation is LOGIN else 422) == status
            assert error.keys() == {"code", "message"}


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o is not LOGIN], ids=named)
async def test_each_operation_but_the_login_wants_a_token(api: Api, operation: Operation) -> None:
    """Without a token that is good, nothing else is looked at."""
    for wrong in ("", "Bearer", "Bearer nonsense", "Basic c2FuZGJveDpzYW5kYm94"):
        status, error = await api.call(operation, "nonsense", headers={"Authorization": wrong})
        assert (401, 401) == (status, error["code"])


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if "{" in o.path], ids=named)
async def test_an_unknown_id_is_not_found(api: Api, operation: Operation) -> None:
    """A record that does not exist is a 404, once the request itself is in order."""
    status, error = await api.call(operation, a_body(operation, full=False), row=999999)
    assert (404, "The requested resource with ID 999999 does not exist") == (status, error["message"])
    status, error = await api.call(operation, a_body(operation, full=False), row=0)
    assert (400, 400) == (status, error["code"])


@pytest.mark.parametrize("path", sorted({operation.path for operation in OPERATIONS}))
async def test_no_other_method_exists(api: Api, path: str) -> None:
    """What the table does not list is answered 405, with the methods that there are."""
    known = {operation.method for operation in OPERATIONS if operation.path == path}
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"} - known:
        async with api.session.request(method, api.url + path.format(metquayId=1)) as answer:
            assert 405 == answer.status
            assert known == set(answer.headers["Allow"].split(", "))
