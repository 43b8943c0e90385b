"""What the proxy answers by itself, as bytes: its errors, logins, preflights; and what of it the pages answer.

Owns the form of these answers (part 8 of the contract) and the login with a placeholder (part 4). Nothing here is ever
forwarded, and the gate has admitted whoever gets more than an error.

Facts: RFC 9110 section 8.6 (a 204 has no Content-Length); Fetch standard, section 4.8 (preflights).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from metquay_proxy.downstream.lists import LISTS
from metquay_proxy.downstream.pages import wrong_method
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.gate import PLACEHOLDER_LIFETIME, WATCHED
from metquay_proxy.rules.target import LOGIN_PATH

if TYPE_CHECKING:
    from metquay_proxy.downstream.connection import ClientConnection
    from metquay_proxy.downstream.lists import Lists
    from metquay_proxy.downstream.pages import Answer, Pages
    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.rules.gate import Gate

_LIMIT: Final = 64 * 1024
"""Bytes of a body that the proxy's own paths read."""
_QUIET: Final = WATCHED | {"/-/events"}
_METHODS: Final = "GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH"


class OwnAnswers:
    """Answers the requests that are never forwarded: logins, and what has a page."""

    def __init__(self, gate: Gate, pages: Pages, lists: Lists) -> None:
        """``gate`` makes placeholders, ``lists`` whole lists, and ``pages`` answer all else."""
        self._gate = gate
        self._pages = pages
        self._lists = lists

    async def answer(self, client: ClientConnection, exchange: Exchange, now: float) -> None:
        """Answer what is never forwarded."""
        target = exchange.target
        if target.local == LOGIN_PATH:
            if exchange.method != "POST":
                raise wrong_method(exchange.method, LOGIN_PATH, "POST")
            client.proceed()
            granted = self._login(exchange.admission.client, await exchange.body.all(_LIMIT), now)
            _write(client, exchange, 200, [("Content-Type", "application/json")], granted)
            return
        exchange.quiet = target.unasked or target.local in _QUIET
        opened: contextlib.AbstractAsyncContextManager[Answer] = self._lists.opened(exchange)
        if not target.local.startswith(LISTS):
            opened = contextlib.nullcontext(self._pages.answer(exchange.method, target.local))
        client.proceed()
        await exchange.body.all(_LIMIT)
        exchange.keep = False
        async with opened as answer:
            whole = replace(answer, headers=(*answer.headers, *_own_fields(exchange)))
            await self._pages.send(client, exchange, whole)

    def _login(self, client: str | None, body: bytes, now: float) -> bytes:
        """Answer a login here, with a placeholder: SDKs that insist on logging in work with any keys."""
        secret = _secret_key(body)
        placeholder = self._gate.login(client, secret or "", now)
        if placeholder is None:
            msg = "To log in to this proxy, send one of its client keys as secretKey; accessKey can be anything."
            raise ProxyError("client-key-required", msg)
        if secret is None:
            msg = 'The body of a login is a JSON object with two strings, {"accessKey": "...", "secretKey": "..."}.'
            raise ProxyError("bad-request", msg)
        granted = {"accessToken": placeholder, "tokenType": "bearer", "expiresIn": PLACEHOLDER_LIFETIME}
        return json.dumps(granted).encode()


async def preflight(client: ClientConnection, exchange: Exchange) -> None:
    """Answer a listed web page that asks what it may send."""
    fields = [("Access-Control-Allow-Methods", _METHODS), ("Access-Control-Max-Age", "600")]
    asked = exchange.fields.text(b"access-control-request-headers")
    if asked is not None:
        fields.append(("Access-Control-Allow-Headers", asked))
    _write(client, exchange, 204, fields)


def write_error(client: ClientConnection, exchange: Exchange, error: ProxyError) -> None:
    """Write one of the proxy's own errors (part 8 of the contract)."""
    exchange.note_error(error)
    fields = [
        ("Content-Type", "application/json"),
        ("X-Metquay-Proxy-Error", error.slug),
        ("X-Metquay-Proxy-Sent", exchange.sent),
        ("X-Metquay-Proxy-Attempts", str(exchange.attempts)),
        *error.headers,
    ]
    if error.retry_after is not None:
        fields.append(("Retry-After", str(error.retry_after)))
    _write(client, exchange, error.status, fields, error.body())


def _write(
    client: ClientConnection, exchange: Exchange, status: int, fields: list[tuple[str, str]], body: bytes = b""
) -> None:
    exchange.status = status
    exchange.keep = exchange.keep and exchange.body.arrived  # what else comes of it is no next request
    fields += _own_fields(exchange)
    fields.append(("Connection", "keep-alive" if exchange.keep else "close"))
    if status != HTTPStatus.NO_CONTENT:
        fields.append(("Content-Length", str(len(body))))
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in fields)]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    exchange.head_sent = True
    client.write(head if exchange.method == "HEAD" else head + body)


def _own_fields(exchange: Exchange) -> list[tuple[str, str]]:
    """Return the fields that every answer of the proxy's own has."""
    date = formatdate(usegmt=True)
    wait = exchange.fields.wait
    applied = [] if wait is None else [("Preference-Applied", f"wait={wait:.0f}")]
    return [*exchange.cors, ("Cache-Control", "no-store"), ("Date", date), ("X-Request-Id", exchange.id), *applied]


def _secret_key(data: bytes) -> str | None:
    """Return the secret key of a login's body; None where that is not of the vendor's form."""
    try:
        login = json.loads(data)
    except (ValueError, RecursionError):
        return None
    match login:
        case {"accessKey": str(), "secretKey": str() as secret}:
            return secret
    return None
