"""A simulator of the Metquay API, good enough to develop a tool against for days.

Owns the HTTP face of ``records``: addresses, methods, tokens, quota, faults on demand, and the books by which
a test reconciles what was executed. Must not import anything of the proxy: it is there to prove it wrong.

Facts (vendor's specification, unless marked): base path ``/api/v1``; tokens live 900 s; 100 requests a minute, logins
free, and a 429 says the wait in its text; POST answers 201 ``{"metquayId"}``, PUT and DELETE 200 without a body; errors
are ``{"code", "message"}``. The server is a Tomcat (inferred): it answers unknown addresses with a page, refuses raw
``[]{}|^"`` and ``%2F`` in a target and heads over 8 KiB, and closes a connection that idled for 20 s.

Our choices where nothing is published: wrong keys get 400, the only refusal documented for a login; the quota counts
what it let through, at arrival, in a sliding window; a refusal of the token precedes those of method, path and query.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import re
import secrets
import socket
import struct
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qs, unquote

from aiohttp import web

from metquay_proxy.sandbox.records import (
    CATEGORIES,
    CUSTOMERS,
    INSTRUMENTS,
    LEGACY_CALLS,
    VENDOR_TEXTS,
    WORKS,
    Records,
    Refusal,
    legacy,
    legacy_failure,
    refuse,
)
from metquay_proxy.sandbox.seed import SeedError, load_seed, sample_records

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    Listen = Callable[[Callable[[], web.RequestHandler], str, int], Awaitable[tuple[Sequence[Any], int]]]

__all__ = ["ACCESS_KEY", "SECRET_KEY", "Faults", "Sandbox", "SeedError", "load_seed"]

ACCESS_KEY: Final = "sandbox-access-key"
SECRET_KEY: Final = "sandbox-secret-key"  # noqa: S105 - the simulator's public key

PREFIX: Final = "/api/v1"
_LOGIN: Final = f"{PREFIX}/authenticate"
_FAULTS, _BOOKS, _LEGACY = "/_sandbox/faults", "/_sandbox/books", "/FlexicalERP/rest/"
_ROUTE: Final = re.compile(rf"{PREFIX}/({CUSTOMERS}|{CATEGORIES}|{INSTRUMENTS}|{WORKS})(?:/([^/]+))?")
_METHODS: Final[dict[tuple[str, bool], tuple[str, ...]]] = {
    (CUSTOMERS, False): ("GET", "POST"),
    (CUSTOMERS, True): ("PUT", "DELETE"),
    (CATEGORIES, False): ("POST",),
    (CATEGORIES, True): ("PUT", "DELETE"),
    (INSTRUMENTS, False): ("GET", "POST"),
    (INSTRUMENTS, True): ("PUT", "DELETE"),
    (WORKS, False): ("GET", "POST"),
    (WORKS, True): ("PUT",),
}
_RAW: Final = re.compile(r'[\[\]{}|^"<>\\`]')
_WHOLE: Final = re.compile(r"[0-9]{1,1000}")
_KEEPALIVE = 20.0
_MAX_HEAD = 8192
_MAX_BODY = 16 * 1024 * 1024
_SHUTDOWN = 0.04
_PAGES = 64
"""How many encoded list answers are kept until the next write."""
_MAX_KEPT = 400_000
"""The longest of them, in bytes: each page of a laboratory of the usual size, but not all those of a large one."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What the simulator does wrong on purpose; ``changed`` reads the same names from JSON or flags."""

    latency: float = 0.0
    """Seconds before each answer of the API."""
    jitter: float = 0.0
    """Up to so many seconds more."""
    fail: Mapping[int, float] = field(default_factory=dict)
    """Status to rate (0 to 1): requests answered with it instead of being executed."""
    expire_tokens: bool = False
    """Forget all tokens, now and once."""
    token_lifetime: float | None = None
    """Seconds that new tokens live; None: as the sandbox was started."""
    login_outage: bool | float = False
    """Answer logins with 503, for so many seconds or until switched off."""
    retry_after: bool = False
    """Does a 429 carry Retry-After? Nothing is documented."""
    lose_answer: float = 0.0
    """Rate of requests that are executed and then dropped without an answer."""
    reset: float = 0.0
    """Rate of answers whose connection is reset in mid-body, or before the head where there is no body."""
    slow_body: float = 0.0
    """Bytes a second of an answer's body; 0: at once."""

    def changed(self, wanted: Mapping[str, object], spelled: Callable[[str, Any], str] | None = None) -> Faults:
        """Return these faults with some set anew, by snake_case or kebab-case names.

        Raises ValueError, one line; in it a fault and its value are ``spelled`` as whoever asked writes them (as JSON).
        """
        spelled = spelled or (lambda name, value: json.dumps({name: value}))
        new = {}
        for given, value in wanted.items():
            name = given.replace("-", "_")
            if name not in _READERS:
                raise ValueError(f"there is no fault {given!r}; the faults are {', '.join(_READERS)}")
            read, right, example = _READERS[name]
            try:
                new[name] = read(value)
            except (TypeError, ValueError, ArithmeticError, AttributeError):
                text = f"{spelled(given, value)} is wrong: {right}, as in {spelled(given, example)}"
                raise ValueError(text) from None
        return replace(self, **new)


def _figure(most: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:  # noqa: ANN401 - JSON or a flag's text
        figure = math.nan if isinstance(value, bool) else float(value)
        if not 0 <= figure <= most:
            raise ValueError
        return figure

    return read


_seconds = _figure(86400)
_rate = _figure(1)


def _switch(value: Any) -> bool:  # noqa: ANN401 - JSON or a flag's text
    if isinstance(value, bool):
        return value
    if value in ("on", "off"):
        return bool(value == "on")
    raise ValueError


def _outage(value: Any) -> bool | float:  # noqa: ANN401 - JSON or a flag's text
    try:
        return _switch(value)
    except ValueError:
        return _seconds(value)


def _failures(value: Any) -> dict[int, float]:  # noqa: ANN401 - JSON or a flag's text
    texts = value.split(",") if isinstance(value, str) else value
    pairs = texts.items() if isinstance(texts, dict) else [text.split("=") for text in texts if text]
    fail = {int(status): _rate(rate) for status, rate in pairs}
    if sum(fail.values()) > 1 or not all(400 <= status <= 599 for status in fail):  # noqa: PLR2004 - error statuses
        raise ValueError
    return fail


_SECONDS: Final = "give seconds from 0 to 86400"
_RATE: Final = "give a rate from 0 (never) to 1 (always)"
_STATUSES: Final = "give each status (400 to 599) its rate, at most 1 in all"
_SWITCH: Final = "switch it on or off"
_READERS: Final[dict[str, tuple[Callable[[Any], Any], str, Any]]] = {
    "latency": (_seconds, _SECONDS, 0.5),
    "jitter": (_seconds, _SECONDS, 0.5),
    "fail": (_failures, _STATUSES, {"503": 0.1}),
    "expire_tokens": (_switch, _SWITCH, True),
    "token_lifetime": (lambda value: None if value is None else _seconds(value), _SECONDS, 60),
    "login_outage": (_outage, f"{_SECONDS}, or {_SWITCH}", True),
    "retry_after": (_switch, _SWITCH, True),
    "lose_answer": (_rate, _RATE, 0.1),
    "reset": (_rate, _RATE, 0.1),
    "slow_body": (_figure(1e12), "give bytes a second, or 0 for no limit", 1000),
}
"""Name to what reads its value, and to what is right: in words, and as an example."""


class _Answer(NamedTuple):
    status: int
    body: bytes = b""
    content_type: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    written: int | None = None
    """The id of the record that the request created, changed or deleted."""


def _json(status: int, value: object, **more: Any) -> _Answer:  # noqa: ANN401 - fields of _Answer
    # A lone surrogate has no UTF-8; Java writes "?" for it.
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return _Answer(status, body, "application/json", **more)


def _error(status: int, message: str, *headers: tuple[str, str]) -> _Answer:
    return _json(status, {"code": status, "message": message}, headers=headers)


def _html(status: int) -> _Answer:
    reason = web.Response(status=status).reason
    text = f"<!doctype html><html><head><title>HTTP Status {status} - {reason}</title></head>"
    return _Answer(status, f"{text}<body><h1>{reason}</h1></body></html>".encode(), "text/html;charset=utf-8")


def _wrong_method(method: str, allowed: tuple[str, ...]) -> _Answer:
    return _error(405, f"Request method '{method}' is not supported", ("Allow", ", ".join(allowed)))


def _headers(answer: _Answer) -> dict[str, str]:
    content_type = {"Content-Type": answer.content_type} if answer.content_type else {}
    return content_type | dict(answer.headers)


def _response(answer: _Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers=_headers(answer))


def _head_size(request: web.BaseRequest) -> int:
    return len(request.raw_path) + sum(len(name) + len(value) + 4 for name, value in request.raw_headers)


def _from_a_web_page(headers: Mapping[str, str]) -> bool:
    """Whether a page may have sent it: a browser says so, and a host name of the page's own points here (rebinding)."""
    host = re.sub(r":[0-9]*\Z", "", headers.get("Host", "").lower())
    ours = "." not in host or host.startswith("[") or host.replace(".", "").isdigit() or host.endswith(".localhost")
    return not ours or "Origin" in headers or headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"}


async def _body(request: web.BaseRequest) -> bytes:
    """Read the body, no further than needed to see that it is too long. Raises RequestPayloadError, OSError."""
    expects = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= (1, 1)
    if expects and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    while len(body) <= _MAX_BODY and (chunk := await request.content.readany()):
        body += chunk
    return bytes(body)


def _whole(name: str, text: str, least: int) -> int:
    """Read a number of an address, as large as one likes: beyond 2**30 there is no record anyway. Raises Refusal."""
    if not _WHOLE.fullmatch(text) or int(text) < least:
        refuse(f"{name} must be an integer from {least} on")
    return min(int(text), 2**30)


def _parsed(body: bytes) -> object:
    def no_constant(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(body.decode(), parse_constant=no_constant)
    except (ValueError, RecursionError):
        refuse("the body is not JSON")


class _Connection(web.RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what the parser refuses as the container would, with a page."""
        if status != 400:  # noqa: PLR2004 - a fault of ours: let it be seen in the log
            return super().handle_error(request, status, exc, message)
        response = _response(_html(status))
        response.force_close()
        return response


class _Listener(web.Server):
    def __call__(self) -> _Connection:
        return _Connection(self, loop=self._loop, **self._kwargs)


class Sandbox:
    """One simulated Metquay server with its own records. Counters and ``records`` may be read at any time.

    ``logins`` counts tokens given out and ``refused_logins`` the others; ``requests`` counts what reached ``/api/v1``,
    logins excepted; ``refused_401`` and ``refused_429`` count those answers to them; ``writes`` is the book of writes.
    """

    def __init__(  # noqa: PLR0913 - each is a fact of the simulated server, by keyword
        self,
        *,
        rate_limit: tuple[int, float] | None = (100, 60.0),
        token_lifetime: float = 900.0,
        records: Records | int | None = None,
        max_page: int | None = None,
        faults: Faults | None = None,
        access_key: str = ACCESS_KEY,
        secret_key: str = SECRET_KEY,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare a server that is not yet listening.

        ``rate_limit`` is requests and seconds (None: off), ``token_lifetime`` seconds; without ``records`` there is a
        made-up laboratory, and a number makes it so large. A page of a list holds at most ``max_page`` records (None:
        as many as it is asked for). ``clock`` and ``sleep`` (seconds) may be a test's; the faults' dice fall the same
        each time.
        """
        self.records = records if isinstance(records, Records) else sample_records(number=records)
        self.rate_limit, self.max_page = rate_limit, max_page
        self.logins = self.refused_logins = self.requests = self.refused_401 = self.refused_429 = 0
        self.writes: deque[dict[str, object]] = deque(maxlen=100_000)
        self.port = 0
        self.url = ""
        self._server: _Listener | None = None
        self._listening: Sequence[Any] = ()
        self._token_lifetime = token_lifetime
        self._keys = (access_key, secret_key)
        self._clock, self._sleep, self._ssl_context = clock, sleep, ssl_context
        self._dice = random.Random("sandbox")  # noqa: S311 - faults that repeat, no secret
        self._tokens: dict[str, float] = {}
        self._arrivals: deque[float] = deque()
        self._pages: dict[tuple[str, int, int, str], _Answer] = {}
        self._pages_version = -1
        self._faults = Faults()
        self._outage_end = -math.inf
        self.faults = faults or Faults()

    @property
    def faults(self) -> Faults:
        """The faults in force; a login outage that will end says how many seconds are left of it."""
        left = max(0.0, self._outage_end - self._clock())
        return replace(self._faults, login_outage=True if left == math.inf else left or False)

    @faults.setter
    def faults(self, faults: Faults) -> None:
        if faults.expire_tokens:
            self._tokens.clear()
        self._faults = replace(faults, expire_tokens=False)
        self._outage_end = math.inf if faults.login_outage is True else self._clock() + faults.login_outage

    async def start(self, host: str = "127.0.0.1", port: int = 0, listen: Listen | None = None) -> None:
        """Listen; port 0 takes any free one. Sets ``port`` and ``url``. Raises OSError if the port is taken.

        ``listen`` does so in its own way: it takes what makes a protocol, host and port, and returns what is to be
        closed at the end, and the port.
        """
        server = _Listener(self._handle, keepalive_timeout=_KEEPALIVE, auto_decompress=False, access_log=None)
        self._listening, self.port = await (listen or self._listen)(server, host, port)
        self._server = server
        scheme = "http" if self._ssl_context is None else "https"
        host = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 - every address, of which this is one
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}{PREFIX}"

    async def _listen(self, server: web.Server, host: str, port: int) -> tuple[list[asyncio.Server], int]:
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(server, host, port, ssl=self._ssl_context, backlog=1024)
        return [listening], listening.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close at once, open connections too; requests under way get no answer. Harmless when not started."""
        if self._server is None:
            return
        for listening in self._listening:
            listening.close()
        transports = [connection.transport for connection in self._server.connections]
        await self._server.shutdown(_SHUTDOWN)
        for transport in transports:
            if transport is not None:
                with contextlib.suppress(AttributeError):  # early Pythons 3.11, where TLS was closed twice
                    transport.abort()
        self._server = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request.raw_path
        if not target.startswith("/"):
            target = "/" + target.partition("://")[2].partition("/")[2]
        path, _, query = target.partition("?")
        counted = path.startswith(f"{PREFIX}/") and path != _LOGIN
        wait = self._arrive() if counted else 0.0
        try:
            body = await _body(request)
        except (web.RequestPayloadError, OSError):
            response = _response(_html(400))
            response.force_close()
            return response
        if path in (_FAULTS, _BOOKS):
            refused = _from_a_web_page(request.headers) and _error(403, "a web page must not use this address")
            return _response(refused or self._control(request.method, path, body))
        if self._faults.latency or self._faults.jitter:
            await self._sleep(self._faults.latency + self._faults.jitter * self._dice.random())
        if _RAW.search(target) or "%2f" in path.lower() or _head_size(request) > _MAX_HEAD:
            return _response(_html(400))
        if len(body) > _MAX_BODY:
            return _response(_html(413))
        try:
            if path == _LOGIN:
                return _response(self._login(request.method, body))
            answer = self._answer(request, path, query, body, wait) if counted else self._legacy(request, path, body)
        except Refusal as refusal:
            answer = _error(refusal.status, refusal.message)
        self.refused_401 += answer.status == 401  # noqa: PLR2004 - a status
        self.refused_429 += answer.status == 429  # noqa: PLR2004 - a status
        return await self._deliver(request, answer)

    def _arrive(self) -> float:
        """Count one request, in or out of the quota: the seconds until there is room, 0 for now."""
        self.requests += 1
        if self.rate_limit is None:
            return 0.0
        (limit, window), now = self.rate_limit, self._clock()
        while self._arrivals and now - self._arrivals[0] >= window:
            self._arrivals.popleft()
        if len(self._arrivals) >= limit:
            return window - (now - self._arrivals[0] if self._arrivals else 0)
        self._arrivals.append(now)
        return 0.0

    def _over_quota(self, wait: float) -> _Answer:
        limit, window = self.rate_limit or (100, 60.0)
        unit = {1.0: "second", 60.0: "minute", 3600.0: "hour"}.get(window, f"{window:g} seconds")
        seconds = max(1, math.ceil(wait))
        text = f"API rate limit of {limit} requests per {unit} exceeded. Please try again in {seconds} seconds."
        return _error(429, text, *([("Retry-After", str(seconds))] if self._faults.retry_after else []))

    def _login(self, method: str, body: bytes) -> _Answer:
        if method != "POST":
            return _wrong_method(method, ("POST",))
        now = self._clock()
        self.refused_logins += 1
        if now < self._outage_end:
            return _html(503)
        match _parsed(body):
            case {"accessKey": str() as access_key, "secretKey": str() as secret_key}:
                if (access_key, secret_key) != self._keys:
                    return _error(400, "Invalid access key or secret key.")
            case _:
                refuse("accessKey and secretKey must be strings")
        self.refused_logins -= 1
        self.logins += 1
        lifetime = self._faults.token_lifetime
        lifetime = self._token_lifetime if lifetime is None else lifetime
        token = secrets.token_urlsafe(32)
        self._tokens = {old: end for old, end in self._tokens.items() if end > now} | {token: now + lifetime}
        return _json(200, {"accessToken": token, "tokenType": "bearer", "expiresIn": max(1, int(lifetime))})

    def _legacy(self, request: web.BaseRequest, path: str, body: bytes) -> _Answer:
        call = path.removeprefix(_LEGACY)
        if call == path or call not in LEGACY_CALLS:
            return _html(404)
        if request.method != "POST":
            return _wrong_method(request.method, ("POST",))
        value = _parsed(body)
        if not isinstance(value, dict):
            refuse("the body must be a JSON object")
        if (value.get("username"), value.get("password")) != self._keys:
            return _json(200, legacy_failure(401, "Wrong user name or password"))
        result = legacy(self.records, call, value)
        return _json(200, result, written=result["response"].get("calibrId"))

    def _answer(  # noqa: PLR0911 - each check in its order answers by itself
        self, request: web.BaseRequest, path: str, query: str, body: bytes, wait: float
    ) -> _Answer:
        if wait:
            return self._over_quota(wait)
        if self._faults.fail and (status := self._failure()):
            return self._failed(status)
        if (route := _ROUTE.fullmatch(path)) is None:
            return _html(404)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or self._tokens.get(token.strip(), -math.inf) <= self._clock():
            return self._failed(401)
        kind, row = route.groups()
        allowed = _METHODS[kind, row is not None]
        if request.method not in allowed:
            return _wrong_method(request.method, allowed)
        if row is None:
            if request.method == "GET":
                return self._list(kind, query)
            row_id = self.records.create(kind, _parsed(body))
            return _json(201, {"metquayId": row_id}, written=row_id)
        row_id = _whole("metquayId", unquote(row), 1)
        if request.method == "PUT":
            self.records.replace(kind, row_id, _parsed(body))
        else:
            self.records.delete(kind, row_id)
        return _Answer(200, written=row_id)

    def _failure(self) -> int | None:
        roll = self._dice.random()
        for status, rate in self._faults.fail.items():
            if roll < rate:
                return status
            roll -= rate
        return None

    def _failed(self, status: int) -> _Answer:
        if status == 429:  # noqa: PLR2004 - a status
            return self._over_quota(30)
        if status not in VENDOR_TEXTS:
            return _html(status)
        challenge = [("WWW-Authenticate", 'Bearer realm="Metquay"')] if status == 401 else []  # noqa: PLR2004 - a status
        return _error(status, VENDOR_TEXTS[status].format(10427), *challenge)

    def _list(self, kind: str, query: str) -> _Answer:
        given = parse_qs(query, keep_blank_values=True)
        first = _whole("first", given.get("first", ["0"])[0], 0)
        limit = _whole("limit", given.get("limit", ["50"])[0], 1)
        limit = min(limit, self.max_page or limit)
        wanted = (kind, first, limit, given.get("workspaceCode", [""])[0])
        if self._pages_version != self.records.version or len(self._pages) >= _PAGES:
            self._pages.clear()
            self._pages_version = self.records.version
        if (page := self._pages.get(wanted)) is None:
            page = _json(200, self.records.page(*wanted))
            if len(page.body) <= _MAX_KEPT:
                self._pages[wanted] = page
        return page

    def _control(self, method: str, path: str, body: bytes) -> _Answer:
        allowed = ("GET", "POST", "DELETE") if path == _FAULTS else ("GET",)
        if method not in allowed:
            return _wrong_method(method, allowed)
        if path == _BOOKS:
            return _json(200, self.books())
        try:
            if method == "DELETE":
                self.faults = Faults()
            elif method == "POST":
                if not isinstance(wanted := _parsed(body), dict):
                    refuse("the body is not a JSON object")
                self.faults = self.faults.changed(wanted)
        except Refusal:
            return _error(400, 'the faults must be a JSON object, such as {"latency": 0.5, "fail": {"503": 0.1}}')
        except ValueError as error:
            return _error(400, str(error))
        return _json(200, asdict(self.faults))

    def books(self) -> dict[str, object]:
        """What happened so far: the counters, the number of records of each kind, and each executed write."""
        counters = ("requests", "logins", "refused_logins", "refused_401", "refused_429")
        return {name: getattr(self, name) for name in counters} | {
            "records": self.records.counts(),
            "writes": list(self.writes),
        }

    async def _deliver(self, request: web.BaseRequest, answer: _Answer) -> web.StreamResponse:
        faults, transport = self._faults, request.transport
        lost = bool(faults.lose_answer) and self._dice.random() < faults.lose_answer
        broken = not lost and bool(faults.reset) and self._dice.random() < faults.reset
        if answer.written is not None:
            entry = {"method": request.method, "path": request.raw_path, "id": answer.written}
            answered = transport is not None and not lost and not broken
            self.writes.append(entry | {"requestId": request.headers.get("X-Request-Id"), "answered": answered})
        response = _response(answer)
        if transport is None:
            return response
        if lost:
            transport.abort()
        elif broken:
            # Linger 0 makes the close a reset; Windows wants two shorts.
            linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            half = 0 if request.method == "HEAD" else len(answer.body) // 2
            await self._trickle(request, answer, answer.body[:half], math.inf)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            transport.abort()
        elif faults.slow_body and answer.body and request.method != "HEAD":
            return await self._trickle(request, answer, answer.body, faults.slow_body)
        return response

    async def _trickle(self, request: web.BaseRequest, answer: _Answer, part: bytes, rate: float) -> web.StreamResponse:
        """Send the head, then ``part`` of the body in ten pieces a second, ``rate`` bytes a second."""
        stream = web.StreamResponse(status=answer.status, headers=_headers(answer))
        stream.content_length = len(answer.body)
        if not part:
            return stream
        size = len(part) if rate == math.inf else max(1, int(rate / 10))
        # The client may leave meanwhile, which is no fault of ours.
        with contextlib.suppress(ConnectionError):
            await stream.prepare(request)
            for start in range(0, len(part), size):
                await stream.write(part[start : start + size])
                if rate != math.inf:
                    await self._sleep(size / rate)
        return stream
