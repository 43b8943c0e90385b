"""What a proxy changes in a message: the heads of requests and responses, and nothing else.

Owns part 3 of the contract as far as it speaks of headers, and the one table of field names. Must not judge (that is
the gate's) and must not know sockets or HTTP libraries. It trusts the readers (``http1``) that field lines are lines:
names are tokens, and no value holds CR, LF or NUL. What passes keeps its order, its case and its bytes.

Facts: RFC 9110 section 7.6.1 (Connection and hop-by-hop fields), 8.6 (a 204 has no Content-Length), 10.2.2 (Location),
11.7 (the Proxy- fields of one hop; Proxy-Status is none of them); RFC 9112 section 6.3 (Content-Length is removed where
a Transfer-Encoding overrides it); RFC 9111 section 4.2.2 (a cache may keep an answer without being told to).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from metquay_proxy.rules.target import rewrite_location

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from metquay_proxy.rules.target import BaseURL

FIELDS: Final = {
    b"connection upgrade": "hop judged",
    b"transfer-encoding": "hop once",
    b"keep-alive te trailer http2-settings": "hop",
    b"proxy-authenticate proxy-authentication-info proxy-connection": "inbound",
    b"proxy-* x-forwarded-* forwarded x-real-ip": "outbound",
    b"expect": "outbound judged",
    b"host": "outbound once",
    b"authorization x-proxy-key": "outbound judged secret",
    b"proxy-authorization cookie": "secret",
    b"content-length": "noted once",
    b"origin referer sec-fetch-* idempotency-key access-control-request-* prefer": "judged",
    b"user-agent content-type content-location content-range max-forwards server": "once",
    b"etag": "once fresh",
    b"cache-control expires pragma last-modified": "fresh",
    b"location x-request-id www-authenticate retry-after access-control-*": "noted",
    b"x-http-method-override x-http-method x-method-override": "override",
}
"""What each field is, for the whole program. ``name-*`` means all that begin so.

hop: of this hop only, in both directions. outbound, inbound: not passed on to Metquay, to the client. judged: somebody
reads it in a request. noted: somebody reads it in an answer. once: a request that has it twice is refused, so that it
is judged too. fresh: says whether an answer may be kept. override: may turn a read into a write. secret: a head with it
is never remembered.
"""


class FieldNames:
    """The sets of names, and the expressions that find fields in lines, that follow from a table of names."""

    def __init__(self, table: Mapping[bytes, str]) -> None:
        def named(kinds: str) -> frozenset[bytes]:
            found = [names for names, said in table.items() if not set(kinds.split()).isdisjoint(said.split())]
            return frozenset(b" ".join(found).split())

        self.once = named("once")
        self.freshness = named("fresh")
        self.overrides = named("override")
        self.inbound = named("hop inbound")
        self.of_answers = _expression(self.inbound, named("noted fresh secret"))
        self.of_requests = _expression(named("hop outbound"), named("judged once secret"))
        self.of_passed_through = _expression(named("hop outbound") - {b"authorization"}, frozenset())
        self.secret = named("secret")


def _expression(dropped: frozenset[bytes], read: frozenset[bytes]) -> re.Pattern[bytes]:
    """Return what finds, in lines in lower case, the value of each field that is dropped (1) or only read (2)."""
    one, other = (b"|".join(sorted(map(re.escape, names))).replace(rb"\*", rb"[^:]*+") for names in (dropped, read))
    return re.compile(rb"\r\n(?:(%b)|(%b)):[ \t]*+([^\r]*+)" % (one, other or b"(?!)"))


def read_fields(lines: bytes, expression: re.Pattern[bytes]) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the fields that an expression finds in valid lines, and the lines without those that it drops.

    Names are in lower case, values as they came but for the blanks around them.
    """
    found, kept, at = [], b"", 0
    for each in expression.finditer(lines.lower()):
        start, end = each.span(3)
        dropped = each[1]
        found.append((dropped or each[2], lines[start:end].rstrip(b" \t")))
        if dropped:
            kept, at = kept + lines[at : each.start()], end
    return found, kept + lines[at:]


NAMES: Final = FieldNames(FIELDS)

_LINE: Final = re.compile(rb"\r\n([^:\r]++):[ \t]*+([^\r]*+)")
_LOCATION_LINE: Final = re.compile(rb"(\r\n(?i:location):[ \t]*+)([^\r]*+)")
_OPTION: Final = re.compile(rb"[^ \t,](?:[^,]*[^ \t,])?")
_NO_HOP: Final = frozenset({b"close", b"keep-alive", b"content-length"})
"""Options of Connection that name no field, or one that no option may take away: the message's own length."""
_USUAL_OPTIONS: Final = {option: frozenset({option}) for option in (b"close", b"keep-alive")}
_LONGEST_AGENT: Final = 200
_PRODUCT: Final = re.compile(rb"(?:mozilla/\S+ \([^)]*\) )?[^a-z/(]*([a-z]*(?:[ ._-]+[a-z]++(?!\d))*)")
"""The words without digits that a User-Agent begins with; of one that says it is like a browser, those after that."""
_OF_PAGE: Final = frozenset({b"origin", b"sec-fetch-site", b"referer"})
POWERSHELL_5: Final = "windowspowershell"
"""The product of Windows PowerShell 5, which reads JSON without a charset as Latin-1."""
_JSON_LINE: Final = re.compile(
    rb"(?i)\r\ncontent-type:[ \t]*+application/json(?![^;\r \t])(?![^\r]*charset[ \t]*=)[^\r]*"
)
_PREFER_LINE: Final = re.compile(rb"(\r\n(?i:prefer):)([^\r]*+)")
_PREFERENCE: Final = re.compile(rb'(?:[^,"]++|"(?:[^"\\]++|\\.)*"?)+')
_WAIT: Final = re.compile(rb'(?i)[ \t]*wait[ \t]*(?:=[ \t]*"?([0-9]{1,18})"?[ \t]*|=[^;]*+)?(?:;.*)?')
_NO_CONTENT: Final = 204
_ENDLESS: Final = 1 << 62


class RequestFields:
    """The fields of one request, read once: those that somebody judges, and those that are only passed on.

    ``judged`` maps lower-case names to values, None where a name came more than once (nobody may choose between two);
    what goes no further is among them too.
    ``options`` are those of Connection, in lower case; ``agent`` is the User-Agent, shortened, since many are kept, and
    ``product`` the name that it begins with, in lower case, without versions and numbers. ``of_page``: a browser says
    which page it is for; ``secret``: it holds what nobody may remember; ``wait``: for how many seconds the request may
    wait in all, None where that is not said; ``special``: its answer may have to say more than others do. They came in
    HTTP/1.``minor``; ``length`` is the body's in bytes: None where it is chunked, 0 without a body; ``keep_alive``: the
    client lets the connection stay after the answer. Nothing of it ever changes once its reader has made it, so that
    many requests may share it.
    """

    __slots__ = ("_hop", "_kept", "_lines", "agent", "judged", "keep_alive", "length", "minor", "of_page", "options",
                 "product", "secret", "special", "wait")  # fmt: skip

    minor: int
    length: int | None
    keep_alive: bool

    def __init__(self, lines: bytes) -> None:
        r"""Take valid field lines, each after its CRLF, such as ``\r\nHost: localhost\r\nAccept: */*``."""
        found, kept = read_fields(lines, NAMES.of_requests)
        judged: dict[bytes, bytes | None] = {}
        for name, value in found:
            judged[name] = None if name in judged else value
        self.judged: Mapping[bytes, bytes | None] = judged
        self.of_page = not _OF_PAGE.isdisjoint(judged)
        agent = (judged.get(b"user-agent") or b"")[:_LONGEST_AGENT]
        self.agent = agent.decode("latin-1")
        self.product = product = _PRODUCT.findall(agent.lower())[0].decode()
        self.options = connection_options(found)
        self._hop = self.options - _NO_HOP
        self.secret = not NAMES.secret.isdisjoint(judged)
        self._lines = lines
        self._kept = _without(self._hop, kept) if self._hop else kept
        self.wait: float | None = None
        self.special = b"prefer" in judged or product == POWERSHELL_5
        if self.special:
            self.wait, self._kept = taken_wait(self._kept)

    def text(self, name: bytes) -> str | None:
        """Return a judged field's value as text (latin-1); None where it is absent or came more than once."""
        value = self.judged.get(name)
        return None if value is None else value.decode("latin-1")

    def outbound(  # noqa: PLR0913 - one request line and what changes its fields
        self,
        method: str,
        target: str,
        *,
        host: bytes,
        chunked: bool,
        read_only: bool = False,
        keep_authorization: bool = False,
    ) -> bytes:
        """Return the head that goes upstream, without its end: a token's line and the empty one.

        First strip, then attach: a client's ``Connection: authorization`` must not delete the bearer.
        ``keep_authorization`` is for pass-through targets, which get no token; of two Authorization fields the gate
        could judge neither, so that none is kept.
        """
        kept = self._kept
        if keep_authorization and self.judged.get(b"authorization") is not None:
            kept = taken_wait(_without(self._hop, read_fields(self._lines, NAMES.of_passed_through)[1]))[1]
        if read_only:
            kept = _without(NAMES.overrides, kept)
        if chunked:
            kept = _without({b"content-length"}, kept) + b"\r\nTransfer-Encoding: chunked"
        return b"%b HTTP/1.1\r\nHost: %b%b\r\n" % (f"{method} {target}".encode("ascii"), host, kept)


@dataclass(slots=True, repr=False)  # no repr, since field values can be secrets
class ResponseHead:
    """A final answer's head, and what it says about the body. Nothing of it ever changes: many answers may share it.

    ``lines`` holds its field lines as they came, each after its CRLF; ``kept`` those of them that any client gets, and
    ``start`` what any client gets of the head, up to the value of X-Request-Id if Metquay gave none.
    ``noted`` are the fields that somebody reads, or that nobody may remember, names in lower case, in order;
    ``passed`` the names of those among them that any client gets; ``options`` are those of Connection. ``secret``: it
    holds what nobody may remember.

    ``length`` is that of the body in bytes: None when chunked or until close, 0 without a body, which some have by rule
    (``bodiless``); ``left`` is how many bytes follow, as far as the head says: 0 when chunked, more than can ever come
    until close. ``keep_alive``: the connection may be used again after the body, unless the reader has seen surplus
    bytes; ``kept_for``: for how many seconds, if the upstream says.
    """

    status: int
    reason: bytes
    lines: bytes
    kept: bytes
    noted: list[tuple[bytes, bytes]]
    options: frozenset[bytes]
    length: int | None
    until_close: bool
    bodiless: bool
    keep_alive: bool
    kept_for: float | None
    secret: bool = field(init=False)
    passed: frozenset[bytes] = field(init=False)
    start: bytes = field(init=False)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        """Find out what any client gets, and how much follows."""
        names = frozenset([name for name, _ in self.noted])
        self.secret = not names.isdisjoint(NAMES.secret)
        dropped = (self.options - _NO_HOP).union([b"content-length"] if self.status == _NO_CONTENT else [])
        if dropped:
            self.kept = _without(dropped, self.kept)
        self.passed = names - NAMES.inbound - dropped
        self.start = _start(self.status, self.reason, self.kept, self.passed)
        self.left = _ENDLESS if self.until_close else self.length or 0

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Its fields, in order and case, values without the space around them."""
        return [(name, value.rstrip(b" \t")) for name, value in _LINE.findall(self.lines)]


def connection_options(fields: list[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Return what every Connection field lists, in lower case: fields of these names go no further than this hop."""
    listed = b",".join([value for name, value in fields if name == b"connection"]).lower()
    return _USUAL_OPTIONS.get(listed) or frozenset(_OPTION.findall(listed))


def taken_wait(lines: bytes) -> tuple[float | None, bytes]:
    """Take ``wait`` out of the Prefer fields (RFC 7240 section 4.3); return its seconds, if any, and the other lines.

    The first that is a number counts, up to 600; it is never quite 0. Other preferences stay.
    """
    waits: list[bytes] = []

    def rest(line: re.Match[bytes]) -> bytes:
        preferences = {each: _WAIT.fullmatch(each) for each in _PREFERENCE.findall(line[2])}
        waits.extend(wait[1] for wait in preferences.values() if wait and wait[1])
        kept = [each for each, wait in preferences.items() if not wait]
        return line[0] if len(kept) == len(preferences) else line[1] + b",".join(kept) if kept else b""

    lines = _PREFER_LINE.sub(rest, lines)
    return (min(max(float(waits[0]), 1e-6), 600.0) if waits else None), lines


def _start(status: int, reason: bytes, lines: bytes, passed: frozenset[bytes]) -> bytes:
    fresh = b"Cache-Control: no-store\r\n" if NAMES.freshness.isdisjoint(passed) else b""
    number = b"" if b"x-request-id" in passed else b"X-Request-Id: "
    return b"HTTP/1.1 %d %b%b\r\n%b%b" % (status, reason, lines, fresh, number)


def _without(dropped: Collection[bytes], lines: bytes) -> bytes:
    return _LINE.sub(lambda line: b"" if line[1].lower() in dropped else line[0], lines)


def adapted(
    head: ResponseHead, base: BaseURL, origin: bytes | None, *, hide_challenge: bool = False, cors: bool = False
) -> ResponseHead:
    """Return a head as it must be for one client, and not for all.

    ``origin`` is the scheme and authority that the client used (``http://localhost:6387``), None where Location must
    stay (absolute-form). ``hide_challenge``: a second 401 in a row must not make the tool ask a person for a password
    that nobody has. ``cors``: the gate, not the upstream, says which pages may read.
    """
    kept, dropped = head.kept, {b"www-authenticate"} if hide_challenge else set[bytes]()
    if cors:
        dropped |= {name for name in head.passed if name.startswith(b"access-control-")}
    if origin is not None:
        kept = _LOCATION_LINE.sub(lambda line: line[1] + rewrite_location(line[2].rstrip(b" \t"), base, origin), kept)
    return replace(head, kept=_without(dropped, kept))


def specially(head: ResponseHead, fields: RequestFields) -> ResponseHead:
    """Return a head with what the request's ``special`` fields ask for.

    Windows PowerShell 5 is told in which charset JSON is, which is UTF-8 (RFC 8259 section 8.1).
    """
    kept = head.kept
    if fields.product == POWERSHELL_5:
        kept = _JSON_LINE.sub(rb"\g<0>; charset=utf-8", kept)
    if fields.wait is not None:
        kept += b"\r\nPreference-Applied: wait=%d" % fields.wait
    return replace(head, kept=kept)


def inbound(head: ResponseHead, request_id: bytes, added: bytes) -> bytes:
    """Return the head that goes to the client, ending in the empty line.

    ``added`` holds whole lines for framing, connection and CORS.
    """
    own = b"" if b"x-request-id" in head.passed else request_id + b"\r\n"
    return head.start + own + added + b"\r\n"
