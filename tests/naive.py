"""The proxy that one writes in an hour: aiohttp's application before its ClientSession. The bench must fail it."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import ClientSession, web

_HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "authorization"}


class Naive:
    """Forwards to ``base`` with a fixed token."""

    def __init__(self, base: str) -> None:
        """``base`` is a URL without a final slash."""
        self._base = base
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)

    async def start(self) -> int:
        """Listen; return the port."""
        self._session = ClientSession()
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Close everything."""
        for closing in (self._session.close(), self._runner.cleanup()):
            with contextlib.suppress(TimeoutError):  # either may hang
                await asyncio.wait_for(closing, 0.5)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        headers["Authorization"] = "Bearer token-of-the-bench"
        url = self._base + request.path_qs.removeprefix("/api/v1")
        async with self._session.request(request.method, url, headers=headers, data=request.content) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=kept)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            return response
