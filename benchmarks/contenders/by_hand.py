"""The proxy that one writes in an hour with FastAPI and httpx, bodies held whole."""

from __future__ import annotations

import os

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

UPSTREAM = os.environ["UPSTREAM"]
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "authorization"}

application = FastAPI()
client = httpx.AsyncClient(verify=os.environ["CA"], timeout=60, limits=httpx.Limits(max_keepalive_connections=512))


@application.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def forward(path: str, request: Request) -> Response:
    """Send the request on with a token, and the answer back."""
    headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
    headers["Authorization"] = f"Bearer {os.environ['TOKEN']}"
    url = f"{UPSTREAM}/{path}?{request.url.query}"
    answer = await client.request(request.method, url, headers=headers, content=await request.body())
    passed = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP | {"content-encoding"}}
    return Response(answer.content, answer.status_code, passed)


if __name__ == "__main__":
    uvicorn.run(
        application, host="127.0.0.1", port=int(os.environ["PORT"]), access_log=False, log_level="error", backlog=4096
    )
