"""Whole lists as one answer, for tools that can't page: each page is asked for as an exchange of its own.

Owns how many lists run at once, and what becomes of one that can't be read to its end. Must not know how a list is
paged and written (``rules.lists``), nor how Metquay is asked: ``ask`` is handed in.

Facts: once rows were sent nothing else can take their place, so a failure breaks the transfer. A page of 500 records
takes some 40 ms to be read and written: in a thread, so that nobody else waits for that.
"""

from __future__ import annotations

import contextlib
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from metquay_proxy.downstream.pages import Answer, wrong_method
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.lists import CONTENT_TYPES, MAX_PAGE, CsvWriter, JsonWriter, ListQuery, Pager
from metquay_proxy.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Container

    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.rules.headers import ResponseHead
    from metquay_proxy.rules.lists import Record

LISTS: Final = "/-/lists/"
MOST: Final = 4
"""Lists that run at once."""


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
            raise ProxyError("quota-exceeded", f"{why} Ask again when one of them has ended.", retry_after=30.0)
        self._running += 1
        try:
            pager, writer = Pager(query), CsvWriter(query) if query.format == "csv" else JsonWriter()
            head, rows = await self._page(exchange, pager, writer.begin, range(400, 600))
            if head.status != HTTPStatus.OK:
                fields = {name.title(): value.decode("latin-1") for name, value in head.headers}
                after = [("Retry-After", fields[b"Retry-After"])] if b"Retry-After" in fields else []
                yield Answer(head.status, fields.get(b"Content-Type", "text/plain"), rows, headers=(*after,))
                return

            async def stream(_client: str | None) -> AsyncGenerator[bytes, None]:
                nonlocal rows
                yield rows
                while not pager.complete:
                    _, rows = await self._page(exchange, pager, writer.more)
                    yield rows
                yield writer.end

            saved = ("Content-Disposition", f'attachment; filename="{query.name}.{query.format}"')  # RFC 6266
            yield Answer(HTTPStatus.OK, CONTENT_TYPES[query.format], headers=(saved,), stream=stream)
        finally:
            self._running -= 1

    async def _page(
        self, exchange: Exchange, pager: Pager, write: Callable[[list[Record]], bytes], refusals: Container[int] = ()
    ) -> tuple[ResponseHead, bytes]:
        """Return the head of the next page and what ``write`` makes of its new records; of ``refusals`` the body."""
        head, body = await self._ask(exchange, pager.target)
        if head.status in refusals and len(body) <= MAX_PAGE:
            return head, body
        if head.status != HTTPStatus.OK or len(body) > MAX_PAGE:
            why = f"Metquay's answer (status {head.status}) is no page of this list, or has over {MAX_PAGE >> 20} MiB."
            raise ProxyError("upstream-protocol", f"{why} Check METQUAY_HOST, and ask for the list again.", sent="yes")
        return head, await in_thread(lambda: write(pager.feed(body)))
