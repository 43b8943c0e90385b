from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metquay_proxy.rules.headers import RequestHead, connection_options, inbound, rewrite_location
from metquay_proxy.rules.http1 import ResponseHead, ResponseReader
from metquay_proxy.rules.target import BaseURL, is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Field = tuple[bytes, bytes]

BASE = BaseURL.parse("lab.metquay.co")
ORIGIN = b"http://localhost:6387"
BEARER = b"Bearer live-token"


class TestBaseURL:
    @pytest.mark.parametrize(
        ("text", "base"),
        [
            ("lab.metquay.co", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("  lab.metquay.co\n", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("LAB.Metquay.CO", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("lab.metquay.co:8443", BaseURL("https", "lab.metquay.co", 8443, "/api/v1")),
            ("lab.metquay.co/", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("lab.metquay.co.", BaseURL("https", "lab.metquay.co", 443, "/api/v1", rooted=True)),
            ("https://LAB.metquay.co.:8443/", BaseURL("https", "lab.metquay.co", 8443, "/api/v1", rooted=True)),
            ("http://localhost.:4010", BaseURL("http", "localhost", 4010, "/api/v1")),
            ("192.0.2.1.", BaseURL("https", "192.0.2.1", 443, "/api/v1")),
            ("metquay_1", BaseURL("https", "metquay_1", 443, "/api/v1")),
            ("HTTPS://lab.metquay.co", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("https://lab.metquay.co/api/v1", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("https://lab.metquay.co/api/v1//", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("https://lab.metquay.co//metquay//api/v2", BaseURL("https", "lab.metquay.co", 443, "/metquay/api/v2")),
            ("https://m\u00fcller.example", BaseURL("https", "xn--mller-kva.example", 443, "/api/v1")),
            ("https://192.0.2.1", BaseURL("https", "192.0.2.1", 443, "/api/v1")),
            ("https://[2001:DB8:0::1]:8443/x", BaseURL("https", "2001:db8::1", 8443, "/x")),
            ("http://localhost:4010", BaseURL("http", "localhost", 4010, "/api/v1")),
            ("http://127.0.0.2", BaseURL("http", "127.0.0.2", 80, "/api/v1")),
            ("http://[::1]/", BaseURL("http", "::1", 80, "/api/v1")),
        ],
    )
    def test_accepted(self, text: str, base: BaseURL) -> None:
        """A bare host is https; no path, or a slash, is the API's usual one."""
        assert base == BaseURL.parse(text)

    def test_a_final_dot_is_for_the_look_up_alone(self) -> None:
        """It means an absolute name to a name server, and the same host to everybody else."""
        base = BaseURL.parse("lab.metquay.co.")
        assert ("lab.metquay.co.", "lab.metquay.co") == (base.name, base.authority)
        assert "https://lab.metquay.co/api/v1" == str(base)
        assert {("lab.metquay.co", 443), ("lab.metquay.co", 80)} == base.authorities
        assert "lab.metquay.co" == BaseURL.parse("lab.metquay.co").name

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "needs a host name"),
            ("https://", "needs a host name"),
            ("https:///api/v1", "needs a host name"),
            (":443", "needs a host name"),
            ("lab.metquay.co:0", "needs a host name"),
            ("lab.metquay.co:65536", "needs a host name"),
            ("lab.metquay.co:https", "needs a host name"),
            ("2001:db8::1", "needs a host name"),
            ("https:/lab.metquay.co", "needs a host name"),
            ("https://[::1", "no valid address"),
            ("https://lab\u2100.example", "no valid address"),
            ("ftp://lab.metquay.co", "begins with https://"),
            ("://lab.metquay.co", "begins with https://"),
            ("https://user:hunter2@lab.metquay.co", "user name or password"),
            ("hunter2@lab.metquay.co", "user name or password"),
            ("lab.metquay.co?x", "question mark"),
            ("https://lab.metquay.co/api/v1#top", "question mark"),
            ("https://[::g]", "no valid address|IPv6"),
            ("https://[v1.a:b]", "IPv6"),
            ("https://lab metquay.co", "characters"),
            ("https://lab\\evil.example", "characters"),
            ("https://-lab.metquay.co", "characters"),
            ("https://lab..metquay.co", "characters"),
            ("https://*.metquay.co", "characters"),
            ("https://" + "a" * 64 + ".co", "characters"),
            ("https://lab.metquay.co/api/../v1", "path"),
            ("https://lab.metquay.co/api/./v1", "path"),
            ("https://lab.metquay.co/api%2Fv1", "path"),
            ("https://lab.metquay.co/a b", "path"),
            ("http://lab.metquay.co", "clear-text|http://"),
            ("http://10.0.0.1", "clear-text|http://"),
            ("http://localhost.evil.example", "clear-text|http://"),
        ],
    )
    def test_refused(self, text: str, why: str) -> None:
        """What is no plain https address is refused with a text for people, which never repeats a password."""
        with pytest.raises(ValueError, match=why) as caught:
            BaseURL.parse(text)
        assert "hunter2" not in str(caught.value)
        assert str(caught.value).startswith(("it", "its", "the address", "http://"))

    @pytest.mark.parametrize(
        ("text", "authority"),
        [
            ("lab.metquay.co:443", "lab.metquay.co"),
            ("lab.metquay.co:80", "lab.metquay.co:80"),
            ("http://localhost:80", "localhost"),
            ("http://localhost:443", "localhost:443"),
            ("https://[2001:db8::1]", "[2001:db8::1]"),
            ("http://[::1]:4010", "[::1]:4010"),
        ],
    )
    def test_authority(self, text: str, authority: str) -> None:
        """Host holds the port only where it is not the scheme's own, and an IPv6 address in brackets."""
        assert authority == BaseURL.parse(text).authority

    def test_authorities(self) -> None:
        """A tool that uses us as its HTTP proxy names port 80 where Metquay has 443, and no other."""
        assert {("lab.metquay.co", 443), ("lab.metquay.co", 80)} == BASE.authorities
        assert {("lab.metquay.co", 8443)} == BaseURL.parse("lab.metquay.co:8443").authorities

    @settings(deadline=None)
    @given(
        st.sampled_from(["lab.metquay.co", "localhost", "127.0.0.1", "[::1]", "m\u00fcller.example"]),
        st.sampled_from(["", ":80", ":443", ":8443"]),
        st.lists(st.text("aB9.~-:@", min_size=1, max_size=5).filter(lambda text: text not in {".", ".."}), max_size=3),
    )
    def test_the_written_form_means_the_same(self, host: str, port: str, segments: list[str]) -> None:
        """What people are shown can be given back as the setting."""
        base = BaseURL.parse(f"https://{host}{port}/{'/'.join(segments)}")
        assert base == BaseURL.parse(str(base))

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [
            ("localhost", True),
            ("127.0.0.1", True),
            ("127.255.255.254", True),
            ("::1", True),
            ("0.0.0.0", False),  # noqa: S104 - not a listener, a host that is judged
            ("128.0.0.1", False),
            ("localhost.evil.example", False),
            ("127.0.0.1.nip.io", False),
            ("0x7f.1", False),
            ("", False),
        ],
    )
    def test_is_loopback(self, host: str, loopback: bool) -> None:  # noqa: FBT001 - a column of the table
        """Only what no name server can point elsewhere is this machine."""
        assert loopback is is_loopback(host)


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
    head = RequestHead(tuple(fields)).outbound(
        method,
        "/api/v1/customers?first=0",
        host=b"lab.metquay.co",
        authorization=authorization,
        chunked=chunked,
        read_only=read_only,
        keep_authorization=keep_authorization,
    )
    assert head.endswith(b"\r\n\r\n")
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


class TestOutbound:
    def test_the_exact_bytes(self) -> None:
        """Request line, Host, the client's fields in order and case, then the bearer; nothing is invented."""
        head = RequestHead([(b"hOST", b"localhost"), (b"b", b"2"), (b"authorization", b"Bearer fake"), OVERRIDE])
        assert (
            b"PUT /api/v1/x?y HTTP/1.1\r\nHost: lab.metquay.co:8443\r\n"
            b"b: 2\r\nX-HTTP-Method: PUT\r\nAuthorization: Bearer t\r\n\r\n"
        ) == head.outbound("PUT", "/api/v1/x?y", host=b"lab.metquay.co:8443", authorization=b"Bearer t", chunked=False)

    def test_nothing_but_host_and_token_is_added(self) -> None:
        """No Accept-Encoding, no User-Agent, no Content-Type, no Content-Length."""
        assert [TOKEN] == sent([])
        assert [] == sent([], authorization=None)

    def test_ordinary_fields_pass(self) -> None:
        """Order, case, doubles, empty and odd values stay."""
        assert [*ORDINARY, TOKEN] == sent(ORDINARY)

    @pytest.mark.parametrize(
        "name",
        [
            b"Connection",
            b"Keep-Alive",
            b"TE",
            b"Trailer",
            b"Transfer-Encoding",
            b"Upgrade",
            b"HTTP2-Settings",
            b"Proxy-Connection",
            b"Proxy-Authorization",
            b"Proxy-Anything",
            b"Forwarded",
            b"X-Forwarded-For",
            b"X-Forwarded-Host",
            b"X-Forwarded-Proto",
            b"X-Forwarded-Anything",
            b"X-Proxy-Key",
            b"Expect",
            b"Host",
            b"Authorization",
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
        "options",
        [
            [b"x-secret"],
            [b"X-SECRET"],
            [b"close, X-Secret"],
            [b" , ,x-secret\t,keep-alive"],
            [b"close", b"X-Secret"],
            [b"X-Secret", b"close"],
        ],
    )
    def test_connection_names_further_fields(self, options: list[bytes]) -> None:
        """A field that Connection lists, in any of its fields and spellings, is for this hop only."""
        fields = [(b"X-Secret", b"1"), *((b"Connection", option) for option in options), (b"x-secret", b"2")]
        assert [TOKEN] == sent(fields)
        assert [(b"X-Secret-2", b"1"), TOKEN] == sent([(b"X-Secret-2", b"1"), *fields])

    @pytest.mark.parametrize("option", [b"close", b"keep-alive", b"Keep-Alive", b"", b"TE", b"upgrade, http2-settings"])
    def test_usual_connection_options_name_no_field(self, option: bytes) -> None:
        """Nothing else is lost with the options that every client sends."""
        assert [*ORDINARY, TOKEN] == sent([(b"Connection", option), *ORDINARY])

    @pytest.mark.parametrize("option", [b"authorization", b"Host", b"content-length", b"transfer-encoding"])
    def test_connection_cannot_name_what_the_proxy_attaches(self, option: bytes) -> None:
        """A client can neither delete the bearer and Host nor change where the body ends."""
        length = (b"Content-Length", b"5")
        assert [length, TOKEN] == sent([(b"Connection", option), length], method="POST")

    @pytest.mark.parametrize("option", [b"close", b"content-length"])
    def test_a_chunked_body_has_no_length(self, option: bytes) -> None:
        """Of two statements about the body's end only the one that overrides is sent: no server can take the other."""
        fields = [(b"Content-Length", b"5"), (b"Connection", option), (b"Transfer-Encoding", b"chunked")]
        assert [(b"Transfer-Encoding", b"chunked"), TOKEN] == sent(fields, method="POST", chunked=True)

    def test_a_body_with_a_length_keeps_it(self) -> None:
        """Content-Length passes as it was sent."""
        assert [(b"content-LENGTH", b"0005"), TOKEN] == sent([(b"content-LENGTH", b"0005")], method="POST")

    @pytest.mark.parametrize("name", [b"X-HTTP-Method-Override", b"x-http-method", b"X-METHOD-OVERRIDE"])
    def test_method_overrides(self, name: bytes) -> None:
        """A read can't be turned into a write behind a read-only proxy; elsewhere the tool may do as it likes."""
        fields = [(b"A", b"1"), (name, b"DELETE"), (name, b"PUT")]
        assert [(b"A", b"1"), TOKEN] == sent(fields, read_only=True)
        assert [*fields, TOKEN] == sent(fields)
        assert [*fields, TOKEN] == sent([*fields, (b"Connection", b"X")])

    def test_pass_through(self) -> None:
        """The client's own Authorization passes where no token is attached, in its place."""
        mine = (b"authorization", b"Basic eDp5")
        assert [mine, (b"A", b"1")] == sent([mine, (b"A", b"1")], authorization=None, keep_authorization=True)
        assert [(b"A", b"1")] == sent([mine, (b"A", b"1")], authorization=None)

    def test_pass_through_follows_connection(self) -> None:
        """An Authorization that the client itself meant for this hop is not passed on."""
        fields = [(b"Authorization", b"Basic eDp5"), (b"Connection", b"Authorization")]
        assert [] == sent(fields, authorization=None, keep_authorization=True)

    def test_pass_through_of_two(self) -> None:
        """Of two Authorization fields, which the gate could not judge, neither passes: one may hold a client key."""
        fields = [(b"Authorization", b"Bearer a-client-key"), (b"authorization", b"Basic eDp5")]
        assert [] == sent(fields, authorization=None, keep_authorization=True)

    def test_a_head_can_be_sent_again(self) -> None:
        """An attempt changes nothing for the next one, which has another token."""
        head = RequestHead([(b"Connection", b"a"), (b"A", b"1"), (b"B", b"2")])
        first, again, other = (
            head.outbound("GET", "/", host=b"h", authorization=token, chunked=False) for token in (b"1", b"1", b"2")
        )
        assert first == again
        assert first.replace(b"Authorization: 1", b"Authorization: 2") == other

    def test_a_line_break_in_the_target_is_impossible(self) -> None:
        """The request line is ASCII or nothing."""
        with pytest.raises(UnicodeEncodeError):
            RequestHead([]).outbound("GET", "/\u010d\u010a", host=b"h", authorization=None, chunked=False)

    def test_long_values_cost_linear_time(self) -> None:
        """A head of the largest size that is let in, built to be slow, is read at once."""
        fields = [(b"Connection", b",a" * 40_000), *((b"x-%d" % number, b"y") for number in range(127))]
        began = time.process_time()
        sent(fields)
        assert time.process_time() - began < 1


NAMES = st.sampled_from(
    [
        b"Host",
        b"Authorization",
        b"Connection",
        b"Transfer-Encoding",
        b"TE",
        b"Upgrade",
        b"Expect",
        b"Keep-Alive",
        b"Proxy-Authorization",
        b"X-Proxy-Key",
        b"Forwarded",
        b"X-Forwarded-For",
        b"X-Forwarded-Host",
        b"X-HTTP-Method-Override",
        b"Cookie",
        b"Accept",
        b"User-Agent",
    ]
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
        head = RequestHead([(b"HOST", b"localhost"), (b"X-Other", b"1"), (b"origin", b"\xe9")])
        assert {b"host": b"localhost", b"origin": b"\xe9"} == head.judged

    @pytest.mark.parametrize(
        "name",
        [
            b"Origin",
            b"Sec-Fetch-Site",
            b"Sec-Fetch-Mode",
            b"Sec-Fetch-Dest",
            b"Access-Control-Request-Method",
            b"Access-Control-Request-Headers",
            b"Content-Length",
            b"User-Agent",
            b"Idempotency-Key",
        ],
    )
    def test_judged_and_passed_on(self, name: bytes) -> None:
        """What the gate, the queue and the records judge reaches the upstream all the same."""
        assert "7" == RequestHead([(name, b"7")]).text(name.lower())
        assert [(name, b"7"), TOKEN] == sent([(name, b"7")], method="POST")

    @pytest.mark.parametrize(
        "name",
        [b"Host", b"Authorization", b"X-Proxy-Key", b"Connection", b"Transfer-Encoding", b"Expect", b"Upgrade"],
    )
    def test_judged_and_dropped(self, name: bytes) -> None:
        """What is for this proxy alone can still be read by it."""
        assert "7" == RequestHead([(name, b"7")]).text(name.lower())

    def test_doubles_are_no_value(self) -> None:
        """Nobody chooses between two values, not even between equal ones."""
        for count in (2, 3):
            head = RequestHead([(b"Authorization", b"a")] * count)
            assert {b"authorization": None} == head.judged
            assert head.text(b"authorization") is None

    def test_text(self) -> None:
        """A value is text of one character a byte; what is absent is None."""
        head = RequestHead([(b"Origin", b"caf\xe9"), (b"Host", b"")])
        assert ("caf\xe9", "", None) == (head.text(b"origin"), head.text(b"host"), head.text(b"expect"))


def test_connection_options() -> None:
    """Names are lower-cased, trimmed and collected from every Connection field, and from no other."""
    fields = [(b"Connection", b"A ,\tb"), (b"X", b"c"), (b"CONNECTION", b"D")]
    assert {b"a", b"b", b"d"} == connection_options(fields)


def answer(stream: bytes, method: str = "GET") -> ResponseHead:
    """Read an answer's head as the transport does."""
    reader = ResponseReader(method)
    reader.feed(stream + b"\r\n\r\n")
    assert reader.head is not None
    return reader.head


def received(  # noqa: PLR0913 - what inbound takes
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
    head = inbound(
        answer(lines),
        base=BASE,
        origin=origin,
        request_id=b"id-1",
        added=added,
        hide_challenge=hide_challenge,
        cors=cors,
    )
    first, *rest = head.split(b"\r\n")
    assert b"HTTP/1.1 " + status == first
    assert [b"", b""] == rest[-2:]
    return rest[:-2]


BROWSERS = b"WWW-Authenticate: Bearer\r\nAccess-Control-Allow-Origin: *"
PLAIN = b"ETag: x\r\nX-Request-Id: 7"
PASSED = PLAIN.split(b"\r\n")


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
        ) == inbound(head, base=BASE, origin=None, request_id=b"id-1", added=b"Connection: close\r\n")

    def test_an_empty_reason(self) -> None:
        """An answer without a reason keeps the space that HTTP asks for."""
        head = answer(b"HTTP/1.1 200")
        assert inbound(head, base=BASE, origin=None, request_id=b"i", added=b"").startswith(b"HTTP/1.1 200 \r\n")

    @pytest.mark.parametrize(
        "name",
        [
            b"Connection",
            b"Keep-Alive",
            b"Trailer",
            b"TE",
            b"Upgrade",
            b"HTTP2-Settings",
            b"Proxy-Connection",
            b"Proxy-Authenticate",
            b"proxy-authentication-info",
        ],
    )
    def test_hop_by_hop_fields_are_dropped(self, name: bytes) -> None:
        """What the upstream says to this proxy is not said to the client."""
        assert PASSED == received(name + b": close\r\n" + PLAIN + b"\r\n" + name.upper() + b": close")

    def test_every_connection_field_counts(self) -> None:
        """What one Connection field lists is dropped, whatever the others say."""
        for values in ((b"x-hop", b"close"), (b"close", b"x-hop")):
            fields = b"".join(b"Connection: %b\r\n" % value for value in values)
            assert PASSED == received(fields + b"X-Hop: 1\r\n" + PLAIN)

    def test_transfer_encoding_is_dropped(self) -> None:
        """The client's side has a framing of its own, which the caller adds."""
        assert [*PASSED, b"Transfer-Encoding: chunked"] == received(
            b"Transfer-Encoding: chunked\r\n" + PLAIN, added=b"Transfer-Encoding: chunked\r\n"
        )

    @pytest.mark.parametrize(
        "line", [b"Proxy-Status: cache; hit", b"Alt-Svc: h3", b"Via: 1.1 x", b"Server: y", b"WWW-Authenticate: Bearer"]
    )
    def test_end_to_end_fields_pass(self, line: bytes) -> None:
        """Proxy-Status and the like are for the client, whatever they are called."""
        assert [line, *PASSED] == received(line + b"\r\n" + PLAIN)

    def test_connection_names_further_fields(self) -> None:
        """A field that the upstream's Connection lists ends here, a cookie too."""
        assert PASSED == received(b"Set-Cookie: a\r\nConnection: X-Hop, set-cookie\r\nx-hop: 1\r\n" + PLAIN)

    def test_connection_cannot_name_the_length(self) -> None:
        """The body's length is this message's own: without it the client could not tell where the body ends."""
        assert [b"Content-Length: 5", *PASSED] == received(
            b"Content-Length: 5\r\nConnection: content-length\r\n" + PLAIN
        )

    def test_what_connection_removes_counts_as_absent(self) -> None:
        """A freshness field or an id that ends here says nothing to the client, so that ours take their place."""
        assert [b"Cache-Control: no-store", b"X-Request-Id: id-1"] == received(
            b"Connection: etag, x-request-id\r\n" + PLAIN
        )

    @pytest.mark.parametrize("name", [b"Cache-Control", b"expires", b"PRAGMA", b"ETag", b"Last-Modified"])
    def test_freshness_that_is_stated_stays(self, name: bytes) -> None:
        """Where the upstream says anything about caching, nothing is added."""
        assert [name + b": x", b"X-Request-Id: id-1"] == received(name + b": x")

    @pytest.mark.parametrize("fields", [b"", b"Vary: Accept", b"Date: x", b"Age: 1"])
    def test_no_store_where_nothing_is_said(self, fields: bytes) -> None:
        """Some clients serve stale answers from a cache of their own unless they are told not to."""
        assert b"Cache-Control: no-store" in received(fields)

    def test_the_upstreams_request_id_stays(self) -> None:
        """One id is enough, and the upstream's is the one that its support can find."""
        assert [b"X-REQUEST-ID: 7", b"Cache-Control: no-store"] == received(b"X-REQUEST-ID: 7")

    def test_204_has_no_length(self) -> None:
        """A length in a 204 would make some clients wait for a body."""
        assert PASSED == received(b"Content-Length: 0\r\n" + PLAIN, status=b"204 No Content")
        assert PASSED == received(
            b"Content-Length: 5\r\nConnection: content-length\r\n" + PLAIN, status=b"204 No Content"
        )

    def test_304_and_head_keep_the_length(self) -> None:
        """There it tells the length that a GET would have had."""
        assert [b"Content-Length: 5", *PASSED] == received(b"Content-Length: 5\r\n" + PLAIN, status=b"304 Not Modified")
        head = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5", "HEAD")
        assert b"Content-Length: 5\r\n" in inbound(head, base=BASE, origin=None, request_id=b"i", added=b"")

    def test_a_challenge_can_be_hidden(self) -> None:
        """A tool that gets a challenge asks a person for a password that nobody has; the first 401 is not passed on."""
        fields = b"WWW-Authenticate: Bearer\r\n" + PLAIN + b"\r\nwww-authenticate: Basic"
        assert PASSED == received(fields, status=b"401 Unauthorized", hide_challenge=True)
        assert 4 == len(received(fields, status=b"401 Unauthorized"))

    def test_the_gate_speaks_for_the_upstream_to_browsers(self) -> None:
        """A browser refuses an answer with two Access-Control-Allow-Origin; Vary is added to, not replaced."""
        fields = b"Access-Control-Allow-Origin: *\r\nVary: Accept\r\naccess-control-expose-headers: X\r\n" + PLAIN
        ours = b"Access-Control-Allow-Origin: https://tools.lab.example\r\nVary: Origin\r\n"
        assert [b"Vary: Accept", *PASSED, *ours.split(b"\r\n")[:2]] == received(fields, added=ours, cors=True)
        assert fields.split(b"\r\n") == received(fields)

    def test_location(self) -> None:
        """A redirect within the API leads back through this proxy, in the field's own place and case."""
        line = b"LOCATION: https://lab.metquay.co/api/v1/customers/7?x#y\r\n" + PLAIN
        assert [b"LOCATION: " + ORIGIN + b"/api/v1/customers/7?x#y", *PASSED] == received(line, status=b"201 Created")

    @pytest.mark.parametrize("name", [b"Content-Location", b"Link", b"Refresh", b"X-Location"])
    def test_only_location(self, name: bytes) -> None:
        """Any other field that holds an address is passed on as it is."""
        line = name + b": https://lab.metquay.co/api/v1/customers/7"
        assert [line, *PASSED] == received(line + b"\r\n" + PLAIN)

    def test_location_takes_linear_time(self) -> None:
        """However many spaces a Location holds, it is read once."""
        value = b"x" + b" " * 100_000 + b"y"
        began = time.perf_counter()
        assert b"Location: " + value in received(b"Location: " + value)
        assert time.perf_counter() - began < 1.0

    def test_location_for_absolute_form(self) -> None:
        """A tool that uses us as its HTTP proxy keeps the upstream's own address."""
        line = b"Location: https://lab.metquay.co/api/v1/customers/7\r\n" + PLAIN
        assert line.split(b"\r\n") == received(line, origin=None)


class TestLocation:
    @pytest.mark.parametrize(
        ("value", "path"),
        [
            (b"https://lab.metquay.co/api/v1", b"/api/v1"),
            (b"https://lab.metquay.co/api/v1/", b"/api/v1/"),
            (b"https://lab.metquay.co/api/v1?first=0", b"/api/v1?first=0"),
            (b"https://lab.metquay.co/api/v1#top", b"/api/v1#top"),
            (b"https://lab.metquay.co/api/v1/a?b=/../c#/../d", b"/api/v1/a?b=/../c#/../d"),
            (b"https://lab.metquay.co/api/v1/..a/b..", b"/api/v1/..a/b.."),
            (b"https://lab.metquay.co/api/v1//evil.example/x", b"/api/v1//evil.example/x"),
            (b"https://lab.metquay.co/api/v1/%2F\xc3\xa9", b"/api/v1/%2F\xc3\xa9"),
            (b"HTTPS://LAB.Metquay.CO:443/api/v1/a", b"/api/v1/a"),
            (b"https://lab.metquay.co:/api/v1/a", b"/api/v1/a"),
            (b"//lab.metquay.co/api/v1/a", b"/api/v1/a"),
            (b"https://lab.metquay.co./api/v1/a", b"/api/v1/a"),
            (b"//lab.metquay.co.:443/api/v1/a", b"/api/v1/a"),
        ],
    )
    def test_under_the_base(self, value: bytes, path: bytes) -> None:
        """Every spelling of the base's origin gets the client's own; path, query and fragment stay byte for byte."""
        for base in (BASE, BaseURL.parse("lab.metquay.co.")):
            assert ORIGIN + path == rewrite_location(value, base, ORIGIN)

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"/api/v1/a",
            b"a",
            b"?first=0",
            b"https://lab.metquay.co",
            b"https://lab.metquay.co/",
            b"https://lab.metquay.co/login",
            b"https://lab.metquay.co/api/v10",
            b"https://lab.metquay.co/API/v1/a",
            b"https://lab.metquay.co/FlexicalERP/a",
            b"https://lab.metquay.co/api/v1/../a",
            b"https://lab.metquay.co/api/v1/a/..",
            b"https://lab.metquay.co/api/v1/.",
            b"https://lab.metquay.co/api/v1/%2e%2E/a",
            b"https://lab.metquay.co/api/v1/.%2e;x/a",
            b"https://lab.metquay.co/api/v1/a\\..\\b",
            b"https://lab.metquay.co?/api/v1/a",
            b"https://lab.metquay.co#/api/v1/a",
            b"http://lab.metquay.co/api/v1/a",
            b"https://lab.metquay.co:8443/api/v1/a",
            b"https://lab.metquay.co:44 3/api/v1/a",
            b"https://lab.metquay.co.evil.example/api/v1/a",
            b"https://lab.metquay.co../api/v1/a",
            b"https://evil.example/https://lab.metquay.co/api/v1/a",
            b"https://lab.metquay.co@evil.example/api/v1/a",
            b"https://user@lab.metquay.co/api/v1/a",
            b"https://lab.metquay.co\\@evil.example/api/v1/a",
            b"https://evil.example\\@lab.metquay.co/api/v1/a",
            b"https://l\xe1b.metquay.co/api/v1/a",
            b"https:///lab.metquay.co/api/v1/a",
            b"https:/lab.metquay.co/api/v1/a",
            b"///lab.metquay.co/api/v1/a",
            b"\\\\lab.metquay.co/api/v1/a",
            b" https://lab.metquay.co/api/v1/a",
            b"ftp://lab.metquay.co/api/v1/a",
            b"javascript://lab.metquay.co/api/v1/a",
        ],
    )
    def test_any_other(self, value: bytes) -> None:
        """What is not certainly under the base is not touched."""
        assert value == rewrite_location(value, BASE, ORIGIN)

    def test_other_bases(self) -> None:
        """Port, scheme, path and address form of the base count."""
        base = BaseURL.parse("http://[::1]:4010/metquay/api")
        assert b"http://h/metquay/api/x" == rewrite_location(b"http://[::1]:4010/metquay/api/x", base, b"http://h")
        assert b"http://h/metquay/api/x" == rewrite_location(b"//[::1]:4010/metquay/api/x", base, b"http://h")
        for other in (b"http://[::1]/metquay/api/x", b"http://[::1]:4010/api/v1/x", b"https://[::1]:4010/metquay/api"):
            assert other == rewrite_location(other, base, b"http://h")

    @settings(deadline=None)
    @given(
        st.builds(
            lambda *parts: "".join(parts).encode("latin-1"),
            st.sampled_from(["https:", "http:", "HTTPS:", "", "x:"]),
            st.sampled_from(["//", "/", "\\\\", "///", ""]),
            st.sampled_from(["", "lab.metquay.co", "user@", "evil.example", "LAB.metquay.co", "[::1]"]),
            st.sampled_from(["", ":443", ":80", "@evil.example", ".evil.example", "\\"]),
            st.sampled_from(["", "/api/v1", "/api/v1/", "/api/v1x"]),
            st.text(st.characters(max_codepoint=255), max_size=12),
        )
        | st.binary(max_size=60)
    )
    @example(b"https://lab.metquay.co/api/v1/\n//evil.example")
    def test_never_another_host(self, value: bytes) -> None:
        """A Location is either untouched, or leads to the authority that the client used."""
        written = rewrite_location(value, BASE, ORIGIN)
        if written != value:
            assert written.startswith(ORIGIN + b"/api/v1")
            parts = urlsplit(written.decode("latin-1"))
            assert ("http", "localhost:6387") == (parts.scheme, parts.netloc)
            assert value.lower().startswith((b"https://lab.metquay.co", b"//lab.metquay.co"))

    def test_long_values_cost_linear_time(self) -> None:
        """A hostile Location of the largest size is read at once."""
        began = time.process_time()
        for filler in (b"/", b"%2e", b":", b"/.", b"a", b"//"):
            for prefix in (b"https://", b"https://lab.metquay.co/api/v1/", b"//"):
                rewrite_location(prefix + filler * 20_000 + b"\n", BASE, ORIGIN)
        assert time.process_time() - began < 1
