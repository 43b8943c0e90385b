"""What mitmproxy needs to attach a bearer token: one hook of an addon."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mitmproxy.http import HTTPFlow


def requestheaders(flow: HTTPFlow) -> None:
    """Attach the token."""
    flow.request.headers["authorization"] = f"Bearer {os.environ['TOKEN']}"
