from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metquay_proxy.rules import headers
from metquay_proxy.rules.headers import (
    FieldNames,
    RequestFields,
    ResponseHead,
    adapted,
    connection_options,
    inbound,
    read_fields,
    specially,
)
from metquay_proxy.rules.http1 import ResponseReader
from metquay_proxy.rules.target import BaseURL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Field = tuple[bytes, bytes]

BASE = BaseURL.parse("lab.metquay.co")
ORIGIN = b"http://localhost:6387"
BEARER = b"Bearer live-token"


def fields_of(fields: Iterable[Field]) -> RequestFields:
    """Return fields as the reader makes them of lines."""
    return RequestFields(b"".join(b"\r\n%b: %b" % field for field in fields))


def sent(  # noqa: PLR0913 - what outbound takes
    fields: Iterable[Field],
    *,
    method: str = "GET",
    authorization: bytes | None = BEARER,
    chunked: bool = False,
    read_only: bool = False,
    keep_authorization: bool = False,
) -> list[Field]:
    """Return what a server's parser finds in the outbound head: its fields but for Host, which must be the first."""
    head = fields_of(fields).outbound(
        method,
        "/api/v1/customers?first=0",
        host=b"lab.metquay.co",
        chunked=chunked,
        read_only=read_only,
        keep_authorization=keep_authorization,
    )
    assert head.endswith(b"\r\n")
    head += b"\r\n" if authorization is None else b"Authorization: %b\r\n\r\n" % authorization
    seen = Seen()
    parser = httptools.HttpRequestParser(seen)
    parser.feed_data(head)
    assert (seen.whole, method.encode(), b"/api/v1/customers?first=0", "1.1") == (
        True,
        parser.get_method(),
        seen.target,
        parser.get_http_version(),
    )
    assert (b"Host", b"lab.metquay.co") == seen.fields[0]
    return seen.fields[1:]


class Seen:
    """Records what httptools found."""

    def __init__(self) -> None:
        self.fields: list[Field] = []
        self.target = b""
        self.whole = False

    def on_url(self, url: bytes) -> None:
        """Take the target."""
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one field."""
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Note that the head ended where it should."""
        self.whole = True


TOKEN = (b"Authorization", BEARER)
OVERRIDE = (b"X-HTTP-Method", b"PUT")
ORDINARY = [
    (b"accept", b"*/*"),
    (b"COOKIE", b"a=1"),
    (b"Cookie", b"b=2"),
    (b"X-Odd", b"\xe9\t \xff"),
    (b"X-Empty", b""),
    (b"User-Agent", b"tool/1"),
    (b"Origin", b"http://localhost:6387"),
    (b"Sec-Fetch-Site", b"same-origin"),
    (b"Idempotency-Key", b"k"),
    (b"X-Request-Id", b"7"),
    (b"Via", b"1.1 other"),
    (b"X-Forwarded", b"no dash, no rule"),
    (b"Proxy", b"no dash, no rule"),
]


POST, MUTE = {"method": "POST"}, {"authorization": None}
PASSED_THROUGH = MUTE | {"keep_authorization": True}
CHUNKED = (b"Transfer-Encoding", b"chunked")
MINE = (b"authorization", b"Basic eDp5")


def connections(*options: bytes) -> list[Field]:
    """Return Connection fields."""
    return [(b"Connection", option) for option in options]


class TestOutbound:
    def test_the_exact_bytes(self) -> None:
        """Request line, Host, the client's fields in order and case; nothing is invented."""
        head = fields_of([(b"hOST", b"localhost"), (b"b", b"2"), (b"authorization", b"Bearer fake"), OVERRIDE])
        assert (
            b"PUT /api/v1/x?y HTTP/1.1\r\nHost: lab.metquay.co:8443\r\nb: 2\r\nX-HTTP-Method: PUT\r\n"
        ) == head.outbound("PUT", "/api/v1/x?y", host=b"lab.metquay.co:8443", chunked=False)

    @pytest.mark.parametrize(
        "name",
        [
            *b"Connection Keep-Alive TE Trailer Transfer-Encoding Upgrade HTTP2-Settings Expect Host".split(),
            *b"Proxy-Connection Proxy-Authorization Proxy-Anything X-Proxy-Key Authorization".split(),
            *b"Forwarded X-Forwarded-For X-Forwarded-Host X-Forwarded-Proto X-Forwarded-Anything X-Real-IP".split(),
        ],
    )
    @pytest.mark.parametrize("spell", [bytes.upper, bytes.lower, bytes.title])
    def test_dropped(self, name: bytes, spell: Callable[[bytes], bytes]) -> None:
        """What is for this hop, or for this proxy, goes no further, in any spelling and number."""
        field = (spell(name), b"close")
        fields = [field, (b"A", b"1"), field, (b"B", b"2"), field]
        assert [(b"A", b"1"), (b"B", b"2"), TOKEN] == sent(fields)
        assert [(b"A", b"1"), (b"B", b"2"), TOKEN] == sent([*fields, (b"Connection", b"X")])

    @pytest.mark.parametrize(
        ("fields", "expected", "options"),
        [
            # nothing but Host and the token is added: no Accept-Encoding, no User-Agent, no Content-Type, no length
            ([], [TOKEN], {}),
            ([], [], MUTE),
            # order, case, doubles, empty and odd values stay, whatever every client's Connection says
            *[
                ([(b"Connection", option), *ORDINARY], [*ORDINARY, TOKEN], {})
                for option in (b"close", b"keep-alive", b"Keep-Alive", b"", b"TE", b"upgrade, http2-settings")
            ],
            # a field that Connection lists, in any of its fields and spellings, is for this hop only
            *[
                (
                    [(b"X-Secret-2", b"1"), (b"X-Secret", b"1"), *connections(*options), (b"x-secret", b"2")],
                    *([(b"X-Secret-2", b"1"), TOKEN], {}),
                )
                for options in (
                    *([b"x-secret"], [b"X-SECRET"], [b"close, X-Secret"], [b" , ,x-secret\t,keep-alive"]),
                    *([b"close", b"X-Secret"], [b"X-Secret", b"close"]),
                )
            ],
            # a client can neither delete the bearer and Host nor change where the body ends
            *[
                ([*connections(option), (b"content-LENGTH", b"0005")], [(b"content-LENGTH", b"0005"), TOKEN], POST)
                for option in (b"authorization", b"Host", b"content-length", b"transfer-encoding")
            ],
            # of two statements about the body's end only the one that overrides is sent: no server can take the other
            *[
                ([(b"Content-Length", b"5"), *connections(option), CHUNKED], [CHUNKED, TOKEN], POST | {"chunked": True})
                for option in (b"close", b"content-length")
            ],
            # a read can't be turned into a write behind a read-only proxy; elsewhere the tool may do as it likes
            *[
                row
                for name in (b"X-HTTP-Method-Override", b"x-http-method", b"X-METHOD-OVERRIDE")
                for two in [[(name, b"DELETE"), (name, b"PUT")]]
                for row in ((two, [TOKEN], {"read_only": True}), ([*two, *connections(b"X")], [*two, TOKEN], {}))
            ],
            # the client's own Authorization passes where no token is attached, in its place
            ([MINE, (b"A", b"1")], [MINE, (b"A", b"1")], PASSED_THROUGH),
            ([MINE, (b"A", b"1")], [(b"A", b"1")], MUTE),
            # but for one that was meant for this hop, and for two, of which the gate could judge neither
            ([MINE, *connections(b"Authorization")], [], PASSED_THROUGH),
            ([(b"Authorization", b"Bearer a-client-key"), MINE], [], PASSED_THROUGH),
        ],
    )
    def test_what_is_sent(self, fields: list[Field], expected: list[Field], options: dict[str, Any]) -> None:
        """Each head goes on as its line says; the comments say why."""
        assert expected == sent(fields, **options)

    def test_a_head_can_be_sent_again(self) -> None:
        """Nothing of a head is used up: others may share it."""
        head = fields_of([(b"Connection", b"a"), (b"A", b"1"), (b"B", b"2")])
        first, again = (head.outbound("GET", "/", host=b"h", chunked=False) for _ in range(2))
        assert first == again

    def test_a_line_break_in_the_target_is_impossible(self) -> None:
        """The request line is ASCII or nothing."""
        with pytest.raises(UnicodeEncodeError):
            fields_of([]).outbound("GET", "/\u010d\u010a", host=b"h", chunked=False)

    def test_long_values_cost_linear_time(self) -> None:
        """A head of the largest size that is let in, built to be slow, is read at once."""
        fields = [(b"Connection", b",a" * 40_000), *((b"x-%d" % number, b"y") for number in range(127))]
        began = time.process_time()
        sent(fields)
        assert time.process_time() - began < 1


NAMES = st.sampled_from(
    b"Host Authorization Connection Transfer-Encoding TE Upgrade Expect Keep-Alive Proxy-Authorization X-Proxy-Key "
    b"Forwarded X-Forwarded-For X-Forwarded-Host X-HTTP-Method-Override Cookie Accept User-Agent".split()
) | st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=12).map(str.encode).filter(
    lambda name: name.lower() != b"content-length"
)
SPELLED = st.builds(lambda name, spell: spell(name), NAMES, st.sampled_from([bytes.upper, bytes.lower, bytes.title]))
VALUES = st.lists(st.sampled_from([*range(0x21, 0x7F), *range(0x80, 0x100), 0x20, 0x09]), max_size=20).map(
    lambda value: bytes(value).strip(b" \t")
)
FIELDS = st.lists(
    st.tuples(SPELLED, VALUES)
    | st.tuples(
        st.sampled_from([b"Connection", b"connection"]),
        st.lists(SPELLED | st.sampled_from([b"", b"close", b"Content-Length"]), max_size=4).map(b" ,".join),
    ),
    max_size=12,
)
NEVER = {b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"http2-settings", b"expect", b"forwarded"} | {
    b"x-proxy-key"
}


@settings(deadline=None)
@given(FIELDS, st.none() | st.integers(0, 10**6), st.booleans(), st.booleans(), st.booleans())
def test_outbound_means_what_was_meant(
    fields: list[Field],
    length: int | None,
    chunked: bool,  # noqa: FBT001 - drawn, not passed by people
    read_only: bool,  # noqa: FBT001 - the same
    pass_through: bool,  # noqa: FBT001 - the same
) -> None:
    """Whatever a client sends: one Host, at most one Authorization, one framing, and its other fields untouched."""
    if length is not None:
        fields.insert(len(fields) // 2, (b"Content-Length", b"%d" % length))
    seen = sent(
        fields,
        authorization=None if pass_through else BEARER,
        chunked=chunked,
        read_only=read_only,
        keep_authorization=pass_through,
    )
    lower = [name.lower() for name, _ in seen]
    assert NEVER.isdisjoint(lower)
    assert not any(name.startswith((b"proxy-", b"x-forwarded-")) for name in lower)
    assert b"host" not in lower
    assert (1 if chunked else 0) == lower.count(b"transfer-encoding")
    assert (0 if chunked or length is None else 1) == lower.count(b"content-length")
    assert lower.count(b"authorization") <= 1
    assert pass_through or TOKEN == seen[-1]
    options = {
        option.strip().lower()
        for name, value in fields
        if name.lower() == b"connection"
        for option in value.split(b",")
    }
    gone = NEVER | {b"host", b"transfer-encoding", b"authorization"} | (options - {b"content-length"})
    gone |= {b"content-length"} if chunked else set()
    gone |= {b"x-http-method-override"} if read_only else set()
    assert [
        field
        for field in fields
        if field[0].lower() not in gone and not field[0].lower().startswith((b"proxy-", b"x-forwarded-"))
    ] == [field for field in seen if field[0].lower() not in {b"authorization", b"transfer-encoding"}]


class TestJudged:
    def test_by_lower_case_name(self) -> None:
        """What somebody judges is found under one spelling; what nobody judges is not kept twice."""
        head = fields_of([(b"HOST", b"localhost"), (b"X-Other", b"1"), (b"origin", b"\xe9")])
        assert {b"host": b"localhost", b"origin": b"\xe9"} == head.judged

    @pytest.mark.parametrize(
        "name",
        [
            *b"Origin Referer Sec-Fetch-Site Sec-Fetch-Mode Sec-Fetch-Dest Access-Control-Request-Method".split(),
            *b"Access-Control-Request-Headers Content-Length User-Agent Idempotency-Key".split(),
        ],
    )
    def test_judged_and_passed_on(self, name: bytes) -> None:
        """What the gate, the queue and the records judge reaches the upstream all the same."""
        assert "7" == fields_of([(name, b"7")]).text(name.lower())
        assert [(name, b"7"), TOKEN] == sent([(name, b"7")], method="POST")

    @pytest.mark.parametrize(
        "name", [b"Host", b"Authorization", b"X-Proxy-Key", b"Connection", b"Transfer-Encoding", b"Expect", b"Upgrade"]
    )
    def test_judged_and_dropped(self, name: bytes) -> None:
        """What is for this proxy alone can still be read by it."""
        assert "7" == fields_of([(name, b"7")]).text(name.lower())

    def test_doubles_are_no_value(self) -> None:
        """Nobody chooses between two values, not even between equal ones."""
        for count in (2, 3):
            head = fields_of([(b"Authorization", b"a")] * count)
            assert {b"authorization": None} == head.judged
            assert head.text(b"authorization") is None

    def test_text(self) -> None:
        """A value is text of one character a byte; what is absent is None."""
        head = fields_of([(b"Origin", b"caf\xe9"), (b"Host", b"")])
        assert ("caf\xe9", "", None) == (head.text(b"origin"), head.text(b"host"), head.text(b"expect"))

    @pytest.mark.parametrize(
        ("product", "agents"),
        [
            ("tool", "tool-17|tool 17/1.0 (x)|tool_ab12|TOOL/2|Tool17|tool-550e8400-e29b|17 tool v2|tool (x64)"),
            ("python-requests", "python-requests/2.31.0"),
            ("microsoft office", "Microsoft Office/16.0 (Windows NT 10.0; Microsoft Excel 16.0.1)"),
            ("com.vendor.app", "com.vendor.App/3 (17; like tool)"),
            ("windowspowershell", "Mozilla/5.0 (Windows NT; Windows NT 10.0; en-US) WindowsPowerShell/5.1.19041"),
            ("mozilla", "Mozilla/4.0 (compatible; Win32; WinHttp.WinHttpRequest.5)"),
            ("berwachung", "\xc3\x9cberwachung-1"),
            ("", "|17|1/2|(tool)|/tool"),
            ("a" * 200, "A" * 300),
        ],
    )
    def test_product(self, product: str, agents: str) -> None:
        """A User-Agent is kept short; what its product is called is the same whatever version and number it has."""
        for agent in agents.split("|"):
            head = fields_of([(b"User-Agent", agent.encode("latin-1"))])
            assert (product, agent[:200]) == (head.product, head.agent)
        assert ("", "") == ((head := fields_of([])).product, head.agent)


def test_connection_options() -> None:
    """Names are lower-cased, trimmed and collected from every Connection field, and from no other."""
    fields = [(b"Connection", b"A ,\tb"), (b"X", b"c"), (b"CONNECTION", b"D ")]
    assert {b"a", b"b", b"d"} == fields_of(fields).options
    assert {b"a", b"b"} == connection_options([(b"te", b"x"), (b"connection", b"a , B")])
    assert set() == fields_of([(b"X", b"c")]).options


class TestNames:
    LINES = b"\r\nX-New: 1\r\nx-newer-7:2 \r\nX-News: 3"

    @pytest.mark.parametrize(
        ("kind", "places"),
        [
            ("hop", {"inbound", "of_answers drops", "of_requests drops", "of_passed_through drops"}),
            ("inbound", {"inbound", "of_answers drops"}),
            ("outbound", {"of_requests drops", "of_passed_through drops"}),
            ("judged", {"of_requests"}),
            ("once", {"once", "of_requests"}),
            ("noted", {"of_answers"}),
            ("fresh", {"freshness", "of_answers"}),
            ("override", {"overrides"}),
            ("secret", {"secret", "of_answers", "of_requests"}),
        ],
    )
    def test_a_name_is_added_in_one_place(self, kind: str, places: set[str]) -> None:
        """What the table says of a name, or of all that begin in a way, holds wherever it matters, and only there."""
        names, found = vars(FieldNames(headers.FIELDS | {b"x-new x-newer-*": kind})), set()
        for place, known in names.items():
            if isinstance(known, frozenset):
                found |= {place} if b"x-new" in known else set()
                continue
            fields, kept = read_fields(self.LINES, known)
            assert fields in ([], [(b"x-new", b"1"), (b"x-newer-7", b"2")])
            assert kept in (self.LINES, b"\r\nX-News: 3")
            found |= {place + " drops" * (kept != self.LINES)} if fields else set()
        assert places == found

    def test_each_name_once(self) -> None:
        """No two rows speak of the same name."""
        names = b" ".join(headers.FIELDS).split()
        assert len(names) == len(set(names))

    def test_authorization_alone_is_kept(self) -> None:
        """For targets that get no token every other field is dropped as ever, and so is what Connection names."""
        fields = [(b"Authorization", b"a"), (b"X-Proxy-Key", b"b"), (b"Proxy-X", b"c"), (b"X", b"d")]
        assert [(b"Authorization", b"a"), (b"X", b"d")] == sent(fields, **PASSED_THROUGH)
        assert [(b"X", b"d")] == sent([*fields, (b"Connection", b"authorization")], **PASSED_THROUGH)

    def test_what_is_read_of_an_answer(self) -> None:
        """Those fields that somebody reads, names in lower case, in order; of the others nothing but their bytes."""
        lines = b"\r\nETag: A\r\nServer: x\r\nAccess-Control-Max-Age:\t1\r\nconnection: Close \r\nLocation:"
        noted = [(b"etag", b"A"), (b"access-control-max-age", b"1"), (b"connection", b"Close"), (b"location", b"")]
        assert (noted, lines.replace(b"\r\nconnection: Close ", b"")) == read_fields(lines, headers.NAMES.of_answers)


def test_fields_of_an_answer() -> None:
    """They are there in order and case, without the blanks around their values."""
    assert [(b"A", b"b c"), (b"a", b""), (b"B", b"d")] == answer(b"HTTP/1.1 200 OK\r\nA: \t b c \r\na:\r\nB:d").headers


def answer(stream: bytes, method: str = "GET") -> ResponseHead:
    """Read an answer's head as the transport does."""
    reader = ResponseReader(method)
    reader.feed(stream + b"\r\n\r\n")
    assert reader.head is not None
    return reader.head


def received(  # noqa: PLR0913 - what adapted and inbound take
    fields: bytes,
    *,
    status: bytes = b"200 OK",
    origin: bytes | None = ORIGIN,
    added: bytes = b"",
    hide_challenge: bool = False,
    cors: bool = False,
) -> list[bytes]:
    """Return the lines that the client gets for an answer, without the status line."""
    lines = b"HTTP/1.1 " + status + (b"\r\n" + fields if fields else b"")
    head = inbound(adapted(answer(lines), BASE, origin, hide_challenge=hide_challenge, cors=cors), b"id-1", added)
    first, *rest = head.split(b"\r\n")
    assert b"HTTP/1.1 " + status == first
    assert [b"", b""] == rest[-2:]
    return rest[:-2]


BROWSERS = b"WWW-Authenticate: Bearer\r\nAccess-Control-Allow-Origin: *"
PLAIN = b"ETag: x\r\nX-Request-Id: 7"
CODED = b"Transfer-Encoding: chunked\r\n"
CHALLENGE = b"WWW-Authenticate: Bearer"
THERE = b"https://lab.metquay.co/api/v1/7?x#y\r\n" + PLAIN
HIDDEN = {"status": b"401 Unauthorized", "hide_challenge": True}
OPENED = b"Access-Control-Allow-Origin: *\r\nVary: Accept\r\naccess-control-expose-headers: X\r\n" + PLAIN
OURS = b"Access-Control-Allow-Origin: https://tools.lab.example\r\nVary: Origin\r\n"


class TestInbound:
    def test_the_exact_bytes(self) -> None:
        """Status, reason, order, case, doubles and odd bytes stay; what was missing comes after them."""
        head = answer(
            b"HTTP/1.0 299 Odd  r\xe9ason\r\nb: 2\r\nset-cookie: a\r\nA: \xff\r\nSet-Cookie: b, c\r\n" + BROWSERS
        )
        assert (
            b"HTTP/1.1 299 Odd  r\xe9ason\r\nb: 2\r\nset-cookie: a\r\nA: \xff\r\nSet-Cookie: b, c\r\n"
            + BROWSERS
            + b"\r\nCache-Control: no-store\r\nX-Request-Id: id-1\r\nConnection: close\r\n\r\n"
        ) == inbound(head, b"id-1", b"Connection: close\r\n")

    def test_an_empty_reason(self) -> None:
        """An answer without a reason keeps the space that HTTP asks for."""
        head = answer(b"HTTP/1.1 200")
        assert inbound(head, b"i", b"").startswith(b"HTTP/1.1 200 \r\n")

    @pytest.mark.parametrize(
        ("fields", "expected", "options"),
        [
            # what the upstream says to this proxy is not said to the client, in whatever spelling and number
            *[
                (name + b": close\r\n" + PLAIN + b"\r\n" + name.upper() + b": close", PLAIN, {})
                for name in (
                    *b"Connection Keep-Alive Trailer TE Upgrade HTTP2-Settings".split(),
                    *b"Proxy-Connection Proxy-Authenticate proxy-authentication-info".split(),
                )
            ],
            # a field that any Connection field lists ends here, a cookie too, whatever the others say
            (b"Set-Cookie: a\r\nConnection: X-Hop, set-cookie\r\nx-hop: 1\r\n" + PLAIN, PLAIN, {}),
            (b"Connection: x-hop\r\nConnection: close\r\nX-Hop: 1\r\n" + PLAIN, PLAIN, {}),
            (b"Connection: close\r\nConnection: x-hop\r\nX-Hop: 1\r\n" + PLAIN, PLAIN, {}),
            # but not the body's length, without which the client could not tell where the body ends
            (b"Content-Length: 5\r\nConnection: content-length\r\n" + PLAIN, b"Content-Length: 5\r\n" + PLAIN, {}),
            # the client's side has a framing of its own, which the caller adds
            (CODED + PLAIN, PLAIN + b"\r\n" + CODED[:-2], {"added": CODED}),
            # a length in a 204 would make some clients wait for a body; a 304's tells that of a GET
            (b"Content-Length: 0\r\n" + PLAIN, PLAIN, {"status": b"204 No Content"}),
            (b"Content-Length: 5\r\nConnection: content-length\r\n" + PLAIN, PLAIN, {"status": b"204 No Content"}),
            (b"Content-Length: 5\r\n" + PLAIN, b"Content-Length: 5\r\n" + PLAIN, {"status": b"304 Not Modified"}),
            # what is for the client passes, whatever it is called
            *[
                (line + b"\r\n" + PLAIN, line + b"\r\n" + PLAIN, {})
                for line in (b"Proxy-Status: cache; hit", b"Alt-Svc: h3", b"Via: 1.1 x", b"Server: y", CHALLENGE)
            ],
            # of all that holds an address Location is rewritten, for who does not use us as its HTTP proxy
            *[
                (name + b": " + THERE, name + b": " + THERE, {})
                for name in b"Content-Location Link Refresh X-Location".split()
            ],
            (b"LOCATION: " + THERE, b"LOCATION: " + ORIGIN + b"/api/v1/7?x#y\r\n" + PLAIN, {"status": b"201 Created"}),
            (b"Location: " + THERE, b"Location: " + THERE, {"origin": None}),
            # some clients serve stale answers from a cache of their own unless they are told anything about it
            *[
                (name + b": x", name + b": x\r\nX-Request-Id: id-1", {})
                for name in (b"Cache-Control", b"expires", b"PRAGMA", b"ETag", b"Last-Modified")
            ],
            *[
                (line, line + b"\r\nCache-Control: no-store\r\nX-Request-Id: id-1", {})
                for line in (b"Vary: Accept", b"Date: x", b"Age: 1")
            ],
            # the upstream's id is the one that its support can find; what Connection removes says nothing
            (b"X-REQUEST-ID: 7", b"X-REQUEST-ID: 7\r\nCache-Control: no-store", {}),
            (b"Connection: etag, x-request-id\r\n" + PLAIN, b"Cache-Control: no-store\r\nX-Request-Id: id-1", {}),
            # a tool that gets a challenge asks a person for a password that nobody has
            (CHALLENGE + b"\r\n" + PLAIN + b"\r\nwww-authenticate: Basic", PLAIN, HIDDEN),
            (CHALLENGE + b"\r\n" + PLAIN, PLAIN, HIDDEN | {"origin": None}),
            # a browser refuses an answer with two Access-Control-Allow-Origin; Vary is added to, not replaced
            (OPENED, OPENED, {}),
            (OPENED, b"Vary: Accept\r\n" + PLAIN + b"\r\n" + OURS[:-2], {"added": OURS, "cors": True}),
        ],
    )
    def test_what_is_received(self, fields: bytes, expected: bytes, options: dict[str, Any]) -> None:
        """Each answer goes on as its line says; the comments say why."""
        assert expected.split(b"\r\n") == received(fields, **options)

    def test_the_answer_to_head_keeps_the_length(self) -> None:
        """It is the one that a GET would have had."""
        head = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5", "HEAD")
        assert b"Content-Length: 5\r\n" in inbound(head, b"i", b"")

    def test_location_takes_linear_time(self) -> None:
        """However many spaces a Location holds, it is read once."""
        value = b"x" + b" " * 100_000 + b"y"
        began = time.perf_counter()
        assert b"Location: " + value in received(b"Location: " + value)
        assert time.perf_counter() - began < 1.0


@pytest.mark.parametrize(
    ("wait", "kept", "values"),
    [
        (120.0, [], ["wait=120"]),
        (120.0, [], ['WAIT = "120"']),
        (120.0, [], [" wait=120 ; x=1"]),
        (120.0, [b"respond-async"], ["respond-async, wait=120"]),
        (5.0, [b'a="x, wait=9\\"", b;c=1'], ['wait=5, a="x, wait=9\\"", b;c=1']),
        (120.0, [b"handling=lenient"], ["wait=120, wait=5", "handling=lenient", "wait=7"]),
        (600.0, [], ["wait=601"]),
        (600.0, [], ["wait=999999999"]),
        (1e-6, [], ["wait=0"]),
        (None, [], ["wait"]),
        (None, [], ["wait=soon"]),
        (None, [], ["wait=-1"]),
        (7.0, [], ["wait=1.5, wait=7"]),
        (None, [b"respond-async"], ["respond-async"]),
        (None, [b"waiting=1"], ["waiting=1"]),
        (None, [b'a="wait=5'], ['a="wait=5']),
    ],
)
def test_how_long_a_tool_waits(wait: float | None, kept: list[bytes], values: list[str]) -> None:
    """``Prefer: wait`` is for the proxy alone; the first that is a number counts; other preferences are sent on."""
    lines = [(b"Prefer", value.encode()) for value in values]
    for authorization in ([], [(b"Authorization", b"x")]):
        fields = fields_of([*authorization, *lines])
        assert wait == fields.wait
        assert kept == [value for name, value in sent([*authorization, *lines]) if name == b"Prefer"]
    passed = sent([(b"Authorization", b"x"), *lines], authorization=None, keep_authorization=True)
    assert kept == [value for name, value in passed if name == b"Prefer"]


POWERSHELL = b"Mozilla/5.0 (Windows NT; Windows NT 10.0; de-DE) WindowsPowerShell/5.1.19041.1"


@pytest.mark.parametrize(
    ("seen", "sent"),
    [
        (b"application/json; charset=utf-8", b"application/json"),
        (b"Application/JSON; charset=utf-8", b"Application/JSON"),
        (b"application/json; q=1; charset=utf-8", b"application/json; q=1"),
        (b"application/json;Charset = latin-1", b"application/json;Charset = latin-1"),
        (b"application/json-patch+json", b"application/json-patch+json"),
        (b"text/html", b"text/html"),
    ],
)
def test_powershell_5_is_told_the_charset_of_json(seen: bytes, sent: bytes) -> None:
    """It alone would take JSON for Latin-1; the head that others get is left alone."""
    head = answer(b"HTTP/1.1 200 OK\r\nX-Before: 1\r\nContent-Type: %b\r\nContent-Length: 0" % sent)
    fields = fields_of([(b"User-Agent", POWERSHELL)])
    assert fields.special
    assert seen in inbound(specially(head, fields), b"id", b"")
    assert b"Content-Type: %b\r\n" % sent in inbound(head, b"id", b"")
    for other in (
        b"Mozilla/5.0 (Windows NT 10.0; Microsoft Windows 10.0.19045; de-DE) PowerShell/7.4.0",
        b"Excel/16",
        b"",
    ):
        assert not fields_of([(b"User-Agent", other)]).special


def test_what_was_preferred_is_told_to_who_asked() -> None:
    """The seconds that apply, in the answer's head."""
    head = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0")
    for said, applied in ((b"wait=120", b"wait=120"), (b"wait=9999", b"wait=600"), (b"wait=0", b"wait=0")):
        told = inbound(specially(head, fields_of([(b"Prefer", said)])), b"id", b"")
        assert b"\r\nPreference-Applied: %b\r\n" % applied in told
    assert b"Preference" not in inbound(specially(head, fields_of([(b"Prefer", b"respond-async")])), b"id", b"")
