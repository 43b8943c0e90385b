"""The proxy's own endpoints below ``/-/``: a table of paths, answered here and never forwarded.

Owns part 7 of the contract. The gate has judged the request before it comes here. Must not know sockets: it returns
answers as values.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.errors import ProxyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete answer; ``quit``: the proxy ends once it was sent."""

    status: int
    content_type: str
    body: bytes
    quit: bool = False


class Admin:
    """Answers the paths below ``/-/``."""

    def __init__(self, *, ready: Callable[[], bool], status: Callable[[], Mapping[str, Any]], allow_quit: bool) -> None:
        """``ready`` tells whether a request would find a token now; ``status`` collects the figures."""
        self._ready = ready
        self._status = status
        self._pages: dict[str, tuple[str, Callable[[], Answer]]] = {
            "/-/live": ("GET", _live),
            "/-/ready": ("GET", self._readiness),
            "/-/status": ("GET", self._figures),
        }
        if allow_quit:
            self._pages["/-/quit"] = ("POST", _quit)

    def answer(self, method: str, path: str) -> Answer:
        """Return the answer; raise ``ProxyError`` no-such-page or method-not-allowed."""
        page = self._pages.get(path)
        if page is None:
            known = ", ".join(sorted(self._pages))
            msg = f"There is no page {path} on this proxy; there are: {known}. Paths below /-/ are never sent to Metquay."
            raise ProxyError("no-such-page", msg)
        allowed, make = page
        if method != allowed and not (method == "HEAD" and allowed == "GET"):
            allow = "GET, HEAD" if allowed == "GET" else allowed
            msg = f"{path} of this proxy takes {allow}, not {method}."
            raise ProxyError("method-not-allowed", msg, headers=(("Allow", allow),))
        return make()

    def _readiness(self) -> Answer:
        if self._ready():
            return Answer(200, _TEXT, b"ready\n")
        return Answer(503, _TEXT, b"not ready\n")

    def _figures(self) -> Answer:
        return Answer(200, _JSON, json.dumps(self._status(), indent=2).encode() + b"\n")


def _live() -> Answer:
    return Answer(200, _TEXT, b"alive\n")


def _quit() -> Answer:
    return Answer(200, _TEXT, b"quitting\n", quit=True)
