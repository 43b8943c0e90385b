"""The proxy's own endpoints: a table of paths, answered here by aiohttp and never forwarded.

Owns part 7 of the contract, the sentence that says how things stand, and the status page with its live events. The gate
has judged the request before it comes here. Must not know sockets: answers are values, which aiohttp writes on the
connection that is handed over to it. Of the client's request it gets the method alone, and the connection ends with the
answer, so that nothing can reach it that was not judged.

Facts: server-sent events are lines ``data: ...`` with an empty one after each (WHATWG HTML, section 9.2). A stream of
them remembers only the number of the last exchange that it told of, and tells of few at once, so that next to nothing
is kept for a slow reader: what it missed is lost and counted. The page's policy (CSP level 3) admits its own style and
script by a nonce, nothing else. A socket that is closed while its client is still sending is reset, and the client may
lose what it has not read yet (RFC 9112 section 9.6).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from aiohttp import web

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import OLDER_INTERFACE, OWN_PREFIX
from metquay_proxy.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping

    from metquay_proxy.downstream.connection import ClientConnection
    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.telemetry import Standing

    _Sending = tuple[Exchange, "Answer", asyncio.Future[None]]

_PAGE: Final = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"
_METRICS: Final = "text/plain; version=1.0.0; charset=utf-8"
_ASKED: Final = "{0.method} / HTTP/1.{0.fields.minor}\r\nHost: localhost\r\nConnection: close\r\n\r\n"
"""What aiohttp gets in place of the client's request."""
_SERVER: Final = "metquay-proxy"
"""aiohttp would name itself and Python, with their versions."""
_BEATS: Final = 4
"""Looks for new exchanges from one report of the state to the next."""
_AT_ONCE: Final = 10
"""Exchanges that one message tells of at most."""
_SLOW: Final = 2.0
"""Seconds from which on a wait for the quota is worth telling: the pace makes each tool wait for less now and then."""
_LINGER: Final = 2.0
"""Seconds that a client may go on sending, so that it finds time to read its answer."""
_POLICY: Final = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; ``quit``: the proxy ends once it was sent.

    ``stream`` makes the body for a client (its key's name), piece by piece, in place of ``body``. It is not to be begun
    for HEAD, and ends once ``Pages.close`` was called.
    """

    status: int
    content_type: str
    body: bytes = b""
    quit: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    stream: Callable[[str | None], AsyncGenerator[bytes, None]] | None = None


class Pages:
    """Answers the paths below ``/-/``, and what browsers ask for by themselves."""

    def __init__(  # noqa: PLR0913 - what it asks, and the one setting
        self,
        *,
        ready: Callable[[], bool],
        status: Callable[[], Mapping[str, Any]],
        allow_quit: bool,
        telemetry: Telemetry | None = None,
        test: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
        tick: float = 0.5,
    ) -> None:
        """``ready`` tells whether a request would find a token now; ``status`` collects the figures.

        ``test`` makes one request to Metquay and returns ``ok`` and a ``text``; ``tick`` is in seconds, from one look
        for new exchanges to the next.
        """
        self._ready = ready
        self._status = status
        self._telemetry = telemetry or Telemetry()
        self._test = test
        self._tick = tick
        self._closed = asyncio.Event()
        self._sending: dict[asyncio.BaseTransport, _Sending] = {}
        self.quit = asyncio.Event()
        """Set where somebody asked the proxy to end."""
        self._watching: dict[asyncio.Event, str | None] = {}
        """What ends each open stream of live events, and whose it is."""
        self._pages: dict[str, tuple[str, Callable[[], Answer]]] = {
            **dict.fromkeys(("/", "/-"), ("GET", lambda: Answer(302, _TEXT, headers=(("Location", OWN_PREFIX),)))),
            "/favicon.ico": ("GET", lambda: Answer(204, "image/x-icon")),
            "/-/": ("GET", self._html),
            "/-/events": ("GET", lambda: Answer(200, "text/event-stream", stream=self._events)),
            "/-/live": ("GET", lambda: Answer(200, _TEXT, b"alive\n")),
            "/-/metrics": ("GET", lambda: Answer(200, _METRICS, stream=self._metrics)),
            "/-/ready": ("GET", self._readiness),
            "/-/status": ("GET", lambda: Answer(200, _JSON, self._figures().encode())),
        }
        if test is not None:
            self._pages["/-/test"] = ("POST", lambda: Answer(200, _JSON, stream=self._tested))
        if allow_quit:
            self._pages["/-/quit"] = ("POST", lambda: Answer(200, _TEXT, b"quitting\n", quit=True))

    def close(self) -> None:
        """End all live events, now and from now on: the proxy is being stopped."""
        self._closed.set()
        self.turn_out(set(self._watching.values()))

    def turn_out(self, clients: Collection[str | None]) -> None:
        """End the live events of these clients: their keys have ended."""
        for end, client in self._watching.items():
            if client in clients:
                end.set()

    def answer(self, method: str, path: str) -> Answer:
        """Return the answer; raise ``ProxyError`` no-such-page, pass-through-off or method-not-allowed."""
        if path.startswith(OLDER_INTERFACE):
            msg = (
                "Nothing was sent: METQUAY_PASS_THROUGH does not list this path of Metquay's older interface. Add "
                f"{OLDER_INTERFACE} to METQUAY_PASS_THROUGH and start the proxy again."
            )
            raise ProxyError("pass-through-off", msg)
        page = self._pages.get(path)
        if page is None:
            known = ", ".join(sorted(path for path in self._pages if path.startswith(OWN_PREFIX)))
            msg = f"This proxy has no such page. Its pages are: {known}. Paths below /-/ are never sent to Metquay."
            raise ProxyError("no-such-page", msg)
        allowed, make = page
        if method != allowed and not (method == "HEAD" and allowed == "GET"):
            raise wrong_method(method, path, "GET, HEAD" if allowed == "GET" else allowed)
        return make()

    async def send(self, client: ClientConnection, exchange: Exchange, answer: Answer) -> None:
        """Write an answer on the client's connection, which ends with it."""
        done = asyncio.get_running_loop().create_future()
        exchange.status, exchange.head_sent = answer.status, True
        self._sending[client.transport] = exchange, answer, done
        try:
            client.hand_over(_ASKED.format(exchange).encode())
            await done
        finally:
            del self._sending[client.transport]
        if answer.quit:
            self.quit.set()

    async def respond(self, request: web.BaseRequest) -> web.StreamResponse:
        """Write the answer for aiohttp, whose handler this is."""
        transport = cast("asyncio.Transport", request.transport)
        exchange, answer, done = self._sending[transport]
        try:
            response = web.StreamResponse(status=answer.status)
            fields = [("Content-Type", answer.content_type), ("X-Content-Type-Options", "nosniff"), ("Server", _SERVER)]
            response.headers.extend([*fields, *answer.headers])
            if answer.stream is None:
                response.content_length = len(answer.body)
            await response.prepare(request)
            if request.method != "HEAD" and answer.stream is not None:
                async with contextlib.aclosing(answer.stream(exchange.admission.client)) as pieces:
                    async for piece in pieces:
                        await response.write(piece)
            elif request.method != "HEAD":
                await response.write(answer.body)
            await response.write_eof()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told where the answer is waited for
            if not done.done():
                done.set_exception(error)
            raise asyncio.CancelledError from None  # whoever waits for `done` tells of it, in place of aiohttp
        if not done.done():
            done.set_result(None)
        del exchange, answer  # a body may be large
        if transport.can_write_eof() and not transport.is_closing():
            transport.write_eof()
            with contextlib.suppress(TimeoutError):  # until the client has left: aiohttp ends this then
                await asyncio.wait_for(self._closed.wait(), _LINGER)
        return response

    def _readiness(self) -> Answer:
        return Answer(200, _TEXT, b"ready\n") if self._ready() else Answer(503, _TEXT, b"not ready\n")

    def _html(self) -> Answer:
        nonce = secrets.token_urlsafe(16)
        fields = (("Content-Security-Policy", _POLICY.format(nonce)), ("Referrer-Policy", "no-referrer"))
        return Answer(200, "text/html; charset=utf-8", _PAGE.replace("{nonce}", nonce).encode(), headers=fields)

    def _state(self) -> dict[str, Any]:
        status = self._status()
        standing = self._telemetry.standing()
        now = time.time()
        level, text, cure, since = headline(status, standing, now)
        told = {"level": level, "text": text, "cure": cure, "since": since, "last_success": standing.success}
        return {"now": now, "headline": told, **status, "hour": self._telemetry.hour()}

    def _figures(self) -> str:
        lines = ",\n    ".join(self._telemetry.since(0)[0])
        return f'{json.dumps(self._state(), indent=2)[:-2]},\n  "recent": [\n    {lines}\n  ]\n}}\n'

    async def _events(self, client: str | None) -> AsyncGenerator[bytes, None]:
        """Yield what is new, as messages for each look that found something, and the state at every fourth."""
        number = beat = 0
        end = asyncio.Event()
        self._watching[end] = client
        try:
            while not (end.is_set() or self._closed.is_set()):
                lines, missed, number = self._telemetry.since(number, _AT_ONCE)
                state = "null" if beat % _BEATS else json.dumps(self._state())
                if lines or state != "null":
                    lost = missed if beat else 0  # what came before the page was opened is no loss
                    yield f'data: {{"recent": [{",".join(lines)}], "lost": {lost}, "state": {state}}}\n\n'.encode()
                beat += 1
                if len(lines) < _AT_ONCE:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(end.wait(), self._tick)
        finally:
            del self._watching[end]

    async def _metrics(self, _client: str | None) -> AsyncGenerator[bytes, None]:
        yield await asyncio.to_thread(self._telemetry.exposition(self._status()))

    async def _tested(self, _client: str | None) -> AsyncGenerator[bytes, None]:
        yield json.dumps(self._test and await self._test()).encode()


def wrong_method(method: str, path: str, allow: str) -> ProxyError:
    """Return the refusal of a method that a path of the proxy's own does not take."""
    msg = f"This proxy's {path} accepts {allow}, not {method}."
    return ProxyError("method-not-allowed", msg, headers=(("Allow", allow),))


def headline(  # noqa: PLR0911 - each state has its sentence
    status: Mapping[str, Any], standing: Standing, now: float
) -> tuple[str, str, str, tuple[str, float] | None]:
    """Return how things stand: a level (ok, slow, wait or bad), a sentence, what to do about it, what is since when.

    ``status`` is what ``/-/status`` tells, ``now`` the wall clock in seconds, as is the time that is returned (None:
    this is a matter of the moment). No sentence says more than these figures do.
    """
    token, quota = status["token"], status["quota"]
    host = status["upstream"].partition("://")[2].partition("/")[0]
    if status.get("sandbox"):
        host = "the built-in sandbox (made-up data)"
    key = f"key {status['key']}" if status.get("key") not in {None, "***"} else ""
    if status.get("draining"):
        return "wait", "Stopping: no new requests are accepted.", "Start the proxy again when you need it.", None
    fails = f"{host} refuses the {key or 'key pair'}" if token["rejected"] else f"the login to {host} fails"
    login = "Keys refused" if token["rejected"] else "Logins have failed", standing.login_turned
    if not status["ready"]:
        if token["failures_in_a_row"]:
            return "bad", f"Not working: {fails}.", _login_cure(token), login
        what = "Logging in again" if token["renewals"] else "Starting: logging in"
        return "wait", f"{what} to {host}.", "This usually takes a few seconds; requests wait for it.", None
    trouble = standing.trouble
    if trouble is not None:
        why = trouble.reason or f"It answered with status {trouble.status}. It may be restarting: wait a few minutes."
        cure = f'That was {_span(now - trouble.ended)} ago. {why} "Test the connection" shows whether it works now.'
        return "bad", "The last request to Metquay failed.", cure, ("Requests have failed", standing.turned)
    if token["failures_in_a_row"]:
        left = int(token["seconds_left"])
        text = f"Working for another {f'{left // 60} min' if left >= 120 else f'{left} s'}: {fails}."  # noqa: PLR2004 - two
        return "slow", text, _login_cure(token), login
    if standing.refused or (quota and (quota["closed_for"] or quota["next_free_in"] >= _SLOW)):
        return "slow", *_slowed(quota, standing.refused, host), None
    since = "Working", max(standing.turned, standing.login_turned)
    return "ok", f"Ready: logged in to {host}{key and f' with {key}'}.", "", since


def _login_cure(token: Mapping[str, Any]) -> str:
    if token["rejected"]:
        doubts = (token["last_error"] or "").partition(". ")[2]
        ask = "Ask whoever looks after Metquay for a valid key pair"
        cure = f"{doubts} Correct that" if doubts else f"{ask}: METQUAY_ACCESS_KEY and METQUAY_SECRET_KEY"
        return f"{cure}. Then start the proxy again; keys in files are read again every minute, without a restart."
    wait = token["next_login_in"]
    coming = f"Next attempt in {math.ceil(wait)} s." if wait else "The next attempt is under way."
    return f"{token['last_error'] or ''} {coming}".lstrip()


def _slowed(quota: Mapping[str, Any] | None, refused: int, host: str) -> tuple[str, str]:
    """Return why requests don't go at once, and what to do about it."""
    faster = "It goes faster if tools ask for more records at once (limit=500), or if fewer run at the same time."
    told = f"Too busy: {_count(refused, 'request was', 'requests were')} refused in the last minute (429)."
    again = f"Refused requests must be sent again, after the time given in Retry-After. {faster}"
    counted = "Metquay counted too many requests (429)"
    if quota is None:
        return told, f"{counted}, and METQUAY_RATE_LIMIT is off, so requests do not wait here. {again}"
    number = quota["waiting"]
    waiting = number and _count(number, "request waits for its turn", "requests wait for their turn")
    used = f"{quota['used']} of {quota['limit']} requests in {quota['window']:g} s are used."
    if quota["closed_for"]:
        used = f"{counted}. Something else may use the same keys, or METQUAY_RATE_LIMIT may be set too high."
    if refused:
        return told, f"{f'{waiting}. ' if waiting else ''}{used} {again}"
    if quota["closed_for"]:
        text = f"Slowed down: {host} accepts no requests for another {_span(quota['closed_for'])}"
        return f"{text}; {waiting}." if waiting else f"{text}.", used
    if waiting:
        return f"Slowed down: {waiting}.", f"{used} None was refused in the last minute. {faster}"
    text = f"Slowed down: a request that came now would wait {_span(quota['next_free_in'])}."
    return text, f"{used} The rest of the quota is spread over the remaining time. {faster}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _span(seconds: float) -> str:
    return f"{max(1, math.ceil(seconds))} s" if seconds < 100 else f"{round(seconds / 60)} min"  # noqa: PLR2004 - as the page has it
