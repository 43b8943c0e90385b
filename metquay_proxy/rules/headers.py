"""What a proxy changes in a message: the heads of requests and responses, and nothing else.

Owns part 3 of the contract as far as it speaks of headers. Must not judge (that is the gate's) and
must not know sockets or HTTP libraries; it turns field lists into bytes. It trusts the two parsers that names are
tokens and that no value holds CR, LF or NUL.

Facts: RFC 9110 section 7.6.1 (Connection and hop-by-hop fields), 8.6 (a 204 has no Content-Length), 10.2.2 (Location),
11.7 (the Proxy- fields of one hop; Proxy-Status is none of them); RFC 9112 section 6.3 (Content-Length is removed where
a Transfer-Encoding overrides it); RFC 9111 section 4.2.2 (a cache may keep an answer without being told to).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from metquay_proxy.rules.target import split_authority

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from metquay_proxy.rules.http1 import ResponseHead
    from metquay_proxy.rules.target import BaseURL

_LOCATION: Final = re.compile(rb"(?:(https?):)?//([^/?#]*)(/[^?#]*)(.*)", re.IGNORECASE)
_DOT_SEGMENT: Final = re.compile(rb"[/\\](?:\.|%2e){1,2}(?:[/\\;]|\Z)", re.IGNORECASE)

_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings"}
)
_DROPPED: Final = _HOP_BY_HOP | {b"host", b"authorization", b"x-proxy-key", b"expect", b"forwarded"}
_DROPPED_PREFIXES: Final = (b"proxy-", b"x-forwarded-")
_DROPPED_INBOUND: Final = _HOP_BY_HOP | {b"proxy-authenticate", b"proxy-authentication-info", b"proxy-connection"}
_HOP_LINE: Final = re.compile(rb"\r\n(?i:%b):[^\r]*+" % b"|".join(sorted(_DROPPED_INBOUND)))
_FIELD_LINE: Final = re.compile(rb"\r\n([^:\r]++):[^\r]*+")
_LOCATION_LINE: Final = re.compile(rb"(\r\n(?i:location):[ \t]*+)([^\r]*+)")
_OVERRIDES: Final = frozenset({b"x-http-method-override", b"x-http-method", b"x-method-override"})
_JUDGED: Final = _DROPPED | {
    b"origin",
    b"referer",
    b"sec-fetch-site",
    b"sec-fetch-mode",
    b"sec-fetch-dest",
    b"access-control-request-method",
    b"access-control-request-headers",
    b"content-length",
    b"user-agent",
    b"idempotency-key",
    # aiohttp's parser refuses these where they come twice: who passes it by must see that too
    b"content-location",
    b"content-range",
    b"content-type",
    b"etag",
    b"max-forwards",
    b"server",
}
_NAMES_NO_FIELD: Final = frozenset({b"", b"close", b"keep-alive"})
_CONTENT_LENGTH: Final = frozenset({b"content-length"})
_FRESHNESS: Final = frozenset({b"cache-control", b"expires", b"pragma", b"etag", b"last-modified"})
_NO_CONTENT: Final = 204


class RequestHead:
    """The fields of one request, read once: those that somebody judges, and those that are only passed on.

    ``judged`` maps lower-case names to values, None where a name came more than once (nobody may choose between two).
    """

    __slots__ = ("_fields", "_kept", "_names_no_field", "judged")

    def __init__(self, fields: Sequence[tuple[bytes, bytes]]) -> None:
        """Take the fields as the parser gave them: in order and case, values without surrounding white space."""
        judged: dict[bytes, bytes | None] = {}
        kept: list[bytes] = []
        for name, value in fields:
            lower = name.lower()
            if lower in _JUDGED:
                judged[lower] = None if lower in judged else value
                if lower in _DROPPED:
                    continue
            elif lower.startswith(_DROPPED_PREFIXES):
                continue
            kept += (name, b": ", value, b"\r\n")
        connection = judged.get(b"connection", b"")
        self.judged: Mapping[bytes, bytes | None] = judged
        self._names_no_field = connection is not None and connection.lower() in _NAMES_NO_FIELD
        self._kept = b"".join(kept)
        self._fields = fields

    def text(self, name: bytes) -> str | None:
        """Return a judged field's value as text (latin-1); None where it is absent or came more than once."""
        value = self.judged.get(name)
        return None if value is None else value.decode("latin-1")

    def outbound(  # noqa: PLR0913 - one request line and what is attached to it
        self,
        method: str,
        target: str,
        *,
        host: bytes,
        authorization: bytes | None,
        chunked: bool,
        read_only: bool = False,
        keep_authorization: bool = False,
    ) -> bytes:
        """Return the head that goes upstream, ending in the empty line.

        First strip, then attach: a client's ``Connection: authorization`` must not delete the bearer.
        ``keep_authorization`` is for pass-through targets, which get no token; of two Authorization fields the gate
        could judge neither, so that none is kept.
        """
        kept = self._kept
        if (
            read_only
            or keep_authorization
            or not self._names_no_field
            or (chunked and b"content-length" in self.judged)
        ):
            dropped = _DROPPED
            if keep_authorization and self.judged.get(b"authorization") is not None:
                dropped -= {b"authorization"}
            if read_only:
                dropped |= _OVERRIDES
            dropped |= connection_options(self._fields)
            kept = self._without(dropped | _CONTENT_LENGTH if chunked else dropped - _CONTENT_LENGTH)
        attached = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        if authorization is not None:
            attached += b"Authorization: %b\r\n" % authorization
        line = f"{method} {target} HTTP/1.1".encode("ascii")
        return b"%b\r\nHost: %b\r\n%b%b\r\n" % (line, host, kept, attached)

    def _without(self, dropped: frozenset[bytes]) -> bytes:
        kept: list[bytes] = []
        for name, value in self._fields:
            lower = name.lower()
            if lower not in dropped and not lower.startswith(_DROPPED_PREFIXES):
                kept += (name, b": ", value, b"\r\n")
        return b"".join(kept)


def connection_options(fields: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Return the lower-case names that Connection lists: these fields go no further than this hop."""
    return frozenset(
        option.strip(b" \t").lower()
        for name, value in fields
        if name.lower() == b"connection"
        for option in value.split(b",")
    )


def inbound(  # noqa: PLR0913 - what the client's side of the connection adds to a head
    head: ResponseHead,
    *,
    base: BaseURL,
    origin: bytes | None,
    request_id: bytes,
    added: bytes,
    hide_challenge: bool = False,
    cors: bool = False,
) -> bytes:
    """Return the head that goes to the client, ending in the empty line.

    ``origin`` is the scheme and authority that the client used (``http://localhost:6387``), None where Location must
    stay (absolute-form). ``added`` holds whole lines for framing, connection and CORS. ``hide_challenge``: a second 401
    in a row must not make the tool ask a person for a password that nobody has. ``cors``: the gate, not the upstream,
    says which pages may read.
    """
    noted = dict(head.noted)
    dropped = _DROPPED_INBOUND
    if not head.options <= _NAMES_NO_FIELD:
        dropped = (dropped | head.options) - _CONTENT_LENGTH
    if head.status == _NO_CONTENT:
        dropped |= _CONTENT_LENGTH
    if hide_challenge:
        dropped |= {b"www-authenticate"}
    if cors:
        dropped |= {name for name in noted if name.startswith(b"access-control-")}
    lines = head.lines
    if origin is not None and b"location" in noted:
        lines = _LOCATION_LINE.sub(lambda line: line[1] + rewrite_location(line[2].rstrip(b" \t"), base, origin), lines)
    if dropped is not _DROPPED_INBOUND:
        lines = _FIELD_LINE.sub(lambda line: b"" if line[1].lower() in dropped else line[0], lines)
    elif not dropped.isdisjoint(noted):
        lines = _HOP_LINE.sub(b"", lines)
    passed = noted.keys() - dropped
    if b"x-request-id" not in passed:
        added = b"X-Request-Id: %b\r\n%b" % (request_id, added)
    if passed.isdisjoint(_FRESHNESS):
        added = b"Cache-Control: no-store\r\n" + added
    return b"HTTP/1.1 %d %b%b\r\n%b\r\n" % (head.status, head.reason, lines, added)


def rewrite_location(value: bytes, base: BaseURL, origin: bytes) -> bytes:
    """Return a Location under the base with the client's own scheme and host; any other untouched.

    Host case, an explicit or empty default port and a missing scheme are spellings of the same origin. A path with dot
    segments need not be under the base, however it begins.
    """
    match = _LOCATION.fullmatch(value)
    if match is None:
        return value
    scheme, authority, path, rest = match.groups()
    prefix = base.prefix.encode()
    if (
        (scheme or base.scheme.encode()).lower() == base.scheme.encode()
        and split_authority(authority.decode("latin-1"), base.scheme) == (base.host, base.port)
        and (path == prefix or path.startswith(prefix + b"/"))
        and not _DOT_SEGMENT.search(path)
    ):
        return origin + path + rest
    return value
