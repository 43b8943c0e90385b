"""Whole lists as one answer, for tools that can't page: each page is asked for as an exchange of its own.

Owns how many lists run at once, and what becomes of one that can't be read to its end. Must not know how a list is
paged and written (``rules.lists``), nor how Metquay is asked: ``ask`` is handed in.

Facts: once rows were sent nothing else can take their place, so a failure breaks the transfer. A page of 500 records
takes some 40 ms to be read and written: in a thread, so that nobody else waits for that.
"""

from __future__ import annotations

import contextlib
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from metquay_proxy.downstream.pages import Answer, wrong_method
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.lists import CONTENT_TYPES, MAX_PAGE, ListQuery, Pager, writer_for
from metquay_proxy.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.rules.headers import ResponseHead
    from metquay_proxy.rules.lists import CsvWriter, JsonWriter

LISTS: Final = "/-/lists/"
MOST: Final = 4
"""Lists that run at once."""
_AGAIN: Final = 30.0
"""Seconds after which another one may be asked for."""


class Lists:
    """Makes the answers to requests for whole lists."""

    def __init__(self, ask: Callable[[Exchange, str], Awaitable[tuple[ResponseHead, bytes]]]) -> None:
        """``ask`` reads a target on behalf of a request; it raises ``ProxyError``."""
        self._ask = ask
        self._running = 0

    @contextlib.asynccontextmanager
    async def opened(self, exchange: Exchange) -> AsyncIterator[Answer]:
        """Yield the answer, whose status the first page decides, and count the list as running until it was sent.

        Raises ``ProxyError``, as the answer's stream does.
        """
        query = ListQuery.parse(exchange.target.local.removeprefix(LISTS), exchange.target.query)
        if exchange.method not in {"GET", "HEAD"}:
            raise wrong_method(exchange.method, exchange.target.local, "GET, HEAD")
        if self._running >= MOST:
            why = f"{MOST} lists are being sent already, and no more run at once. Nothing was sent."
            raise ProxyError("quota-exceeded", f"{why} Ask again when one of them has ended.", retry_after=_AGAIN)
        self._running += 1
        try:
            pager, writer = Pager(query), writer_for(query)
            head, body = await self._page(exchange, pager)
            if head.status != HTTPStatus.OK:
                yield _passed_on(head, body)
                return
            pieces = [await in_thread(lambda: writer.begin(pager.feed(body)))]
            fields = (("Content-Disposition", query.content_disposition),)
            rows = partial(self._rows, exchange, pager, writer, pieces)
            yield Answer(HTTPStatus.OK, CONTENT_TYPES[query.format], headers=fields, stream=rows)
        finally:
            self._running -= 1

    async def _rows(
        self, exchange: Exchange, pager: Pager, writer: CsvWriter | JsonWriter, pieces: list[bytes], _client: str | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the first rows, which are in ``pieces``, and then those of each page as it comes."""
        yield pieces.pop()
        while not pager.complete:
            head, body = await self._page(exchange, pager)
            if head.status != HTTPStatus.OK:
                raise ProxyError("upstream-protocol", f"Metquay answered a page with status {head.status}.", sent="yes")
            yield await in_thread(lambda body=body: writer.more(pager.feed(body)))  # type: ignore[misc] # bytes
        yield writer.end

    async def _page(self, exchange: Exchange, pager: Pager) -> tuple[ResponseHead, bytes]:
        head, body = await self._ask(exchange, pager.target)
        if len(body) > MAX_PAGE or head.status in range(HTTPStatus.CREATED, HTTPStatus.BAD_REQUEST):
            why = f"status {head.status}" if len(body) <= MAX_PAGE else f"more than {MAX_PAGE >> 20} MiB"
            cure = "Check METQUAY_HOST, and ask for the pages yourself."
            raise ProxyError(
                "upstream-protocol", f"Metquay answered a page of this list with {why}. {cure}", sent="yes"
            )
        return head, body


def _passed_on(head: ResponseHead, body: bytes) -> Answer:
    """Return Metquay's own refusal of the first page."""
    fields = {name.decode().lower(): value.decode("latin-1") for name, value in head.headers}
    after = fields.get("retry-after")
    headers = () if after is None else (("Retry-After", after),)
    return Answer(head.status, fields.get("content-type", "application/octet-stream"), body, headers=headers)
