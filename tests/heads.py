"""Heads of answers for tests, read as the proxy reads those of Metquay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metquay_proxy.rules.http1 import ResponseReader

if TYPE_CHECKING:
    from metquay_proxy.rules.headers import ResponseHead


def response_head(status: int, reason: bytes, fields: list[tuple[bytes, bytes]]) -> ResponseHead:
    """Return the head of an answer to a POST."""
    reader = ResponseReader("POST")
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    reader.feed(b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, reason, lines))
    assert reader.head is not None
    return reader.head
