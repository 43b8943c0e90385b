"""The proxy that one writes in an hour with aiohttp: its application in front, its ClientSession behind."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

from aiohttp import ClientSession, TCPConnector, web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

UPSTREAM = os.environ["UPSTREAM"]
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "authorization"}


async def _session(application: web.Application) -> AsyncIterator[None]:
    connector = TCPConnector(limit=0, ssl=ssl.create_default_context(cafile=os.environ["CA"]))
    async with ClientSession(connector=connector, auto_decompress=False) as session:
        application["session"] = session
        yield


async def _forward(request: web.Request) -> web.StreamResponse:
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
    headers["Authorization"] = f"Bearer {os.environ['TOKEN']}"
    body = request.content if request.body_exists else None
    async with request.app["session"].request(
        request.method, UPSTREAM + request.path_qs, headers=headers, data=body, allow_redirects=False
    ) as answer:
        response = web.StreamResponse(status=answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                response.headers[name] = value
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


if __name__ == "__main__":
    application = web.Application(client_max_size=1 << 40)
    application.cleanup_ctx.append(_session)
    application.router.add_route("*", "/{path:.*}", _forward)
    web.run_app(application, host="127.0.0.1", port=int(os.environ["PORT"]), access_log=None, print=None, backlog=4096)
