"""The proxy's own endpoints: a table of paths, answered here and never forwarded.

Owns part 7 of the contract, the sentence that says how things stand, and the status page with its live events. The gate
has judged the request before it comes here. Must not know sockets: it returns answers as values.

Facts: server-sent events are lines ``data: ...`` with an empty one after each (WHATWG HTML, section 9.2). A stream of
them remembers only the number of the last exchange that it told of, so that nothing is queued for a slow reader: what
it missed is lost and counted. The page's policy (CSP level 3) admits its own style and script by a nonce, nothing else.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.errors import ProxyError
from metquay_proxy.target import OLDER_INTERFACE, OWN_PREFIX
from metquay_proxy.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from metquay_proxy.telemetry import Exchange

_PAGE: Final = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"
_METRICS: Final = "text/plain; version=1.0.0; charset=utf-8"
_BEATS: Final = 4
"""Looks for new exchanges from one report of the state to the next."""
_POLICY: Final = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_TROUBLE: Final = {
    "upstream-unreachable": ("cannot be reached", "Check the network: cable, VPN, firewall, company proxy."),
    "upstream-tls": (
        "cannot be reached securely",
        "Its certificate is not trusted here: see what `metquay-proxy check` says about it.",
    ),
    "upstream-timeout": ("does not answer in time", "It may have too much to do. Wait a few minutes."),
    "upstream-closed": ("breaks off its answers", "It may be restarting. Wait a few minutes."),
    "upstream-protocol": ("gives answers that make no sense", "Check that METQUAY_HOST names the right server."),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; ``quit``: the proxy ends once it was sent.

    ``stream`` makes the body, piece by piece, in place of ``body``. It is not to be begun for HEAD, and ends once
    ``Admin.close`` was called.
    """

    status: int
    content_type: str
    body: bytes = b""
    quit: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    stream: Callable[[], AsyncIterator[bytes]] | None = None


_TO_THE_PAGE: Final = Answer(302, _TEXT, headers=(("Location", OWN_PREFIX),))


class Admin:
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
        self._closing = asyncio.Event()
        self._pages: dict[str, tuple[str, Callable[[], Answer]]] = {
            "/": ("GET", lambda: _TO_THE_PAGE),
            "/-": ("GET", lambda: _TO_THE_PAGE),
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
        """End the live events: the proxy is being stopped."""
        self._closing.set()

    def answer(self, method: str, path: str) -> Answer:
        """Return the answer; raise ``ProxyError`` no-such-page, pass-through-off or method-not-allowed."""
        if path.startswith(OLDER_INTERFACE):
            msg = (
                f"Metquay's older interface below {OLDER_INTERFACE} is not passed through, so that nothing was sent: "
                "METQUAY_PASS_THROUGH does not list this path. Set METQUAY_PASS_THROUGH=/FlexicalERP/ and start the "
                "proxy again."
            )
            raise ProxyError("pass-through-off", msg)
        page = self._pages.get(path)
        if page is None:
            known = ", ".join(sorted(path for path in self._pages if path.startswith(OWN_PREFIX)))
            msg = f"There is no page {path} on this proxy; there are: {known}. None below /-/ is ever asked of Metquay."
            raise ProxyError("no-such-page", msg)
        allowed, make = page
        if method != allowed and not (method == "HEAD" and allowed == "GET"):
            raise wrong_method(method, path, "GET, HEAD" if allowed == "GET" else allowed)
        return make()

    def _readiness(self) -> Answer:
        return Answer(200, _TEXT, b"ready\n") if self._ready() else Answer(503, _TEXT, b"not ready\n")

    def _html(self) -> Answer:
        nonce = secrets.token_urlsafe(16)
        fields = (("Content-Security-Policy", _POLICY.format(nonce)), ("Referrer-Policy", "no-referrer"))
        body = _PAGE.replace("{nonce}", nonce).encode()
        return Answer(200, "text/html; charset=utf-8", body, headers=fields)

    def _state(self) -> dict[str, Any]:
        status = self._status()
        told = dict(zip(("level", "text", "cure"), headline(status, self._telemetry.trouble), strict=True))
        return {"headline": told, **status, "hour": self._telemetry.hour()}

    def _figures(self) -> str:
        lines = ",\n    ".join(self._telemetry.since(0)[0])
        return f'{json.dumps(self._state(), indent=2)[:-2]},\n  "recent": [\n    {lines}\n  ]\n}}\n'

    async def _events(self) -> AsyncIterator[bytes]:
        """Yield what is new, as one message for each look that found something, and the state at every fourth."""
        number = beat = 0
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            while not closing.done():
                lines, missed, number = self._telemetry.since(number)
                state = None if beat % _BEATS else json.dumps(self._state())
                if lines or state:
                    lost = missed if beat else 0  # what came before the page was opened is no loss
                    recent = ",".join(lines)
                    yield f'data: {{"recent": [{recent}], "lost": {lost}, "state": {state or "null"}}}\n\n'.encode()
                beat += 1
                await asyncio.wait({closing}, timeout=self._tick)
        finally:
            closing.cancel()

    async def _metrics(self) -> AsyncIterator[bytes]:
        yield await asyncio.to_thread(self._telemetry.exposition, self._status())

    async def _tested(self) -> AsyncIterator[bytes]:
        yield json.dumps(self._test and await self._test()).encode()


def wrong_method(method: str, path: str, allow: str) -> ProxyError:
    """Return the refusal of a method that a path of the proxy's own does not take."""
    msg = f"{path} of this proxy takes {allow}, not {method}."
    return ProxyError("method-not-allowed", msg, headers=(("Allow", allow),))


def headline(  # noqa: PLR0911 - each state has its sentence
    status: Mapping[str, Any], trouble: Exchange | None
) -> tuple[str, str, str]:
    """Return how things stand: a level (ok, slow, wait or bad), a sentence, and what to do about it.

    ``status`` is what ``/-/status`` tells, ``trouble`` the last exchange with Metquay if it failed.
    """
    token, quota = status["token"], status["quota"]
    host = status["upstream"].partition("://")[2].partition("/")[0]
    if status.get("sandbox"):
        host = "the built-in sandbox (made-up data)"
    key = f"key {status['key']}" if status.get("key") else ""
    reason = f"{token['last_error'] or ''} Next attempt in {math.ceil(token['next_login_in'])} s."
    if status.get("draining"):
        return "wait", "Stopping: no new requests are taken.", "Start the proxy again when you need it."
    if token["rejected"]:
        cure = (
            "Ask whoever looks after Metquay for a valid key pair, put it into METQUAY_ACCESS_KEY and "
            "METQUAY_SECRET_KEY, and start the proxy again. (Keys in files are read anew every minute, without that.)"
        )
        return "bad", f"Not working: {host} refuses the {key or 'keys'}.", cure
    if not status["ready"]:
        if token["failures_in_a_row"]:
            return "bad", f"Not working: no connection to {host}.", reason
        return "wait", f"Starting: logging in to {host}.", "This takes a few seconds."
    if trouble is not None:
        out_of_order = (f"is out of order (status {trouble.status})", "It may be restarting. Wait a few minutes.")
        what, cure = _TROUBLE.get(trouble.error or "", out_of_order)
        return "bad", f"Not working: {host} {what}.", f"{cure} This proxy need not be restarted."
    if token["failures_in_a_row"]:
        minutes = int(token["seconds_left"] // 60)
        return "slow", f"Working for {minutes} more minutes: the login to {host} fails.", reason
    if quota and (quota["waiting"] or quota["closed_for"] or quota["used"] >= quota["limit"]):
        cure = (
            f"Nothing is lost: requests wait for their turn ({quota['waiting']} now). It goes faster if tools ask for "
            "more records at once (limit=500), or if fewer run at the same time."
        )
        return "slow", f"Slowed down: tools ask for more than {quota['limit']} requests in {quota['window']:g} s.", cure
    return "ok", f"Ready: connected to {host}{key and f' with {key}'}.", ""
