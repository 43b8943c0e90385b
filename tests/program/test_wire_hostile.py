"""Hostile input on both sides: refused or cleaned in exactly one way, never passed on ambiguous."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from tests.wire import BLANK, OK, Peer, answered, get, head, post, rule

if TYPE_CHECKING:
    from tests.wire import Bench

HOST = b"Host: localhost\r\n"
SMUGGLED = get("/smuggled")


def raw(*lines: bytes, first: bytes = b"POST /x HTTP/1.1", body: bytes = b"") -> bytes:
    """Return a request of the lines as they are."""
    return b"\r\n".join([first, b"Host: localhost", *lines]) + BLANK + body


@rule("9112 6.1")
@pytest.mark.parametrize(
    "lines",
    [
        (b"Content-Length: 3", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: chunked", b"Content-Length: 3"),
        (b"content-length: 0", b"transfer-encoding: chunked"),
        (b"Transfer-Encoding: gzip", b"Content-Length: 3"),
        (b"Transfer-Encoding: chunked", b"Connection: transfer-encoding", b"Content-Length: 5"),
    ],
)
async def test_cl_te(bench: Bench, lines: tuple[bytes, ...]) -> None:
    """Content-Length beside Transfer-Encoding (CL.TE, TE.CL) is refused."""
    await bench.refused(raw(*lines, body=b"0\r\n\r\n" + SMUGGLED), 400, "bad-request", closes=True)


@rule("9112 6.1")
@pytest.mark.parametrize(
    "value",
    [
        b"gzip, chunked",
        b"chunked, gzip",
        b"chunked, chunked",
        b"chunked,",
        b",chunked",
        b"xchunked",
        b"chunkedx",
        b"identity",
        b"gzip",
        b"chunked;q=1",
        b'"chunked"',
        b"chunked\xa0",
    ],
)
async def test_transfer_encoding(bench: Bench, value: bytes) -> None:
    """A Transfer-Encoding other than exactly chunked is answered 501, and what follows is never read."""
    await bench.refused(
        raw(b"Transfer-Encoding: " + value, body=b"0\r\n\r\n" + SMUGGLED), 501, "not-supported", closes=True
    )


@rule("9112 6.1")
@pytest.mark.parametrize("value", [b"", b"\x0bchunked", b"chun\x00ked", b"chunked\x00", b"chunked\x7f"])
async def test_transfer_encoding_odd(bench: Bench, value: bytes) -> None:
    """A Transfer-Encoding that is empty or holds control characters is refused."""
    answer = await bench.ask(raw(b"Transfer-Encoding: " + value, body=b"0\r\n\r\n" + SMUGGLED))
    assert answer.status in {400, 501}
    assert [] == bench.upstream.peers


@rule("9112 6.1")
@pytest.mark.parametrize(
    "lines",
    [
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: chunked", b"transfer-encoding: identity"),
        (b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: x"),
    ],
)
async def test_te_te(bench: Bench, lines: tuple[bytes, ...]) -> None:
    """Two Transfer-Encodings (TE.TE) are refused."""
    answer = await bench.ask(raw(*lines, body=b"0\r\n\r\n" + SMUGGLED))
    assert answer.status in {400, 501}
    assert [] == bench.upstream.peers


@rule("9112 6.1")
@pytest.mark.parametrize("case", [b" Chunked", b"CHUNKED ", b"  chunked"])
async def test_chunked_in_any_case(bench: Bench, case: bytes) -> None:
    """The coding's name is case-insensitive, and goes on in one spelling."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(raw(b"Transfer-Encoding:" + case, body=b"3\r\nabc\r\n0\r\n\r\n"))
    assert 200 == (await client.answer()).status
    assert [b"chunked"] == bench.upstream.requests[0].values(b"Transfer-Encoding")


@rule("9112 6.1")
@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
async def test_te_on_http_1_0(bench: Bench, connection: bytes) -> None:
    """Transfer-Encoding on HTTP/1.0 is refused with 400, and what follows is never read."""
    lines = (b"Transfer-Encoding: chunked", b"Connection: " + connection)
    await bench.refused(
        raw(*lines, first=b"POST /x HTTP/1.0", body=b"0\r\n\r\n" + SMUGGLED), 400, "bad-request", closes=True
    )


@rule("9112 6.3")
@pytest.mark.parametrize(
    "value",
    [
        b"+3",
        b"-3",
        b"0x3",
        b"3 3",
        b"3,3",
        b"3, 4",
        b"",
        b"3;",
        b"3.0",
        b"3_0",
        b"three",
        b"\xb3",
        b"03",
        b"003",
        b"00",
        b"99999999999999999999999",
        b"18446744073709551616",
        b"18446744073709551615",
        b"9223372036854775808",
        b"3\x00",
        b"3\x0b",
    ],
)
async def test_content_length(bench: Bench, value: bytes) -> None:
    """A Content-Length that is anything but one plain number is refused, and what follows is never read."""
    await bench.refused(raw(b"Content-Length: " + value, body=b"abc" + SMUGGLED), 400, "bad-request", closes=True)


@rule("9112 6.3")
@pytest.mark.parametrize("second", [b"3", b"4", b"0"])
async def test_two_lengths(bench: Bench, second: bytes) -> None:
    """Two Content-Lengths are refused, equal ones too."""
    lines = (b"Content-Length: 3", b"content-length: " + second)
    await bench.refused(raw(*lines, body=b"abc" + SMUGGLED), 400, "bad-request", closes=True)


@rule("9112 7.1")
@pytest.mark.parametrize(
    "body",
    [
        b"+3\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b" 3\r\nabc\r\n0\r\n\r\n",
        b"3 \r\nabc\r\n0\r\n\r\n",
        b"3\t;a\r\nabc\r\n0\r\n\r\n",
        b"3\nabc\r\n0\r\n\r\n",
        b"3\rabc\r\n0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nab\r\n0\r\n\r\n",
        b"3\r\nabcX\n0\r\n\r\n",
        b"\r\nabc\r\n0\r\n\r\n",
        b"g\r\nabc\r\n0\r\n\r\n",
        b"10000000000000003\r\nabc\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
        b"3;a\nb\r\nabc\r\n0\r\n\r\n",
        b"3;a\x00\r\nabc\r\n0\r\n\r\n",
        b'3;a="b\r\nabc\r\n0\r\n\r\n',
        b"3;\r\nabc\r\n0\r\n\r\n",
        b"0\n\r\n",
        b"0\r\n\n",
        b"0\r\nX : y\r\n\r\n",
        b"0\r\nX: y\n\r\n",
        b"0\r\nX\r\n\r\n",
        b"0\r\n X: y\r\n\r\n",
        b"0\r\nX: a\x00\r\n\r\n",
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 3])
async def test_chunk_framing(bench: Bench, body: bytes, cut: int) -> None:
    """Bad sizes, ends, extensions and trailers of chunks are refused, in any segments: no whole request upstream."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(raw(b"Transfer-Encoding: chunked") + body[:cut], body[cut:] + SMUGGLED, pause=0.005 if cut else 0)
    answer = await client.answer()
    assert (400, "bad-request") == (answer.status, answer.slug)
    await client.ended()
    assert [] == bench.upstream.requests


@rule("9112 5.1")
@pytest.mark.parametrize(
    "line",
    [
        b"X : y",
        b"X\t: y",
        b" X: y",
        b"\tX: y",
        b"X",
        b"X y",
        b": y",
        b"X(: y",
        b"X@: y",
        b'"X": y',
        b"X\x00: y",
        b"X\xe9: y",
        b"X\x7f: y",
        b"X Y: z",
        b"Transfer-Encoding : chunked",
        b"Content-Length : 3",
    ],
)
async def test_field_names(bench: Bench, line: bytes) -> None:
    """Names that are no tokens, and space before the colon, are refused."""
    await bench.refused(raw(line, first=b"GET /x HTTP/1.1"), 400, "bad-request")


@rule("9112 5.2")
@pytest.mark.parametrize("fold", [b" b", b"\tb", b" Transfer-Encoding: chunked", b" "])
async def test_obs_fold(bench: Bench, fold: bytes) -> None:
    """Folded lines are refused."""
    await bench.refused(raw(b"X: a", fold, first=b"GET /x HTTP/1.1"), 400, "bad-request")


@rule("9112 2.2")
@pytest.mark.parametrize(
    "data",
    [
        b"GET /x HTTP/1.1\nHost: localhost\n\n",
        b"GET /x HTTP/1.1\nHost: localhost\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: localhost\r\nX: y\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: localhost\r\n\n",
        b"GET /x HTTP/1.1\rHost: localhost\r\r",
        b"GET /x HTTP/1.1\r\nHost: localhost\r\nX: a\rY: b\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: localhost\r\nX: a\r\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: localhost\r\nX: a\r\n\rY: b\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nX: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_bare_lf_and_cr(bench: Bench, data: bytes) -> None:
    """A bare LF or CR ends no line: such a head is refused."""
    answer = await bench.ask(data)
    assert (400, "bad-request") == (answer.status, answer.slug)
    assert [] == bench.upstream.peers


@rule("9110 5.5")
@pytest.mark.parametrize("byte", [b"\x00", b"\x01", b"\x08", b"\x0b", b"\x0c", b"\x1f", b"\x7f"])
async def test_controls_in_values(bench: Bench, byte: bytes) -> None:
    """NUL and other control characters in a value are refused."""
    await bench.refused(raw(b"X: a" + byte + b"b", first=b"GET /x HTTP/1.1"), 400, "bad-request")


@rule("9112 2.3")
@pytest.mark.parametrize(
    "version",
    [
        b" HTTP/0.9",
        b" HTTP/1.2",
        b" HTTP/1.9",
        b" HTTP/2.0",
        b" HTTP/2",
        b" HTTP/3.0",
        b" http/1.1",
        b" HTTP/1.01",
        b" HTTP/01.1",
        b" HTTP/1",
        b" HTTP/1.1x",
        b" HTTP/1.1 ",
        b" RTSP/1.0",
        b" ICE/1.0",
        b" XTTP/1.1",
        b"",
    ],
)
async def test_versions(bench: Bench, version: bytes) -> None:
    """HTTP/0.9 and unknown versions are refused."""
    answer = await bench.ask(b"GET /x" + version + b"\r\nHost: localhost" + BLANK)
    assert (400, "bad-request") == (answer.status, answer.slug)
    assert [] == bench.upstream.peers


@rule("9112 2.3")
async def test_simple_request(bench: Bench) -> None:
    """The one line of HTTP/0.9 is refused."""
    await bench.refused(b"GET /x" + BLANK, 400, "bad-request")


@rule("9113 3.4")
async def test_http_2_preface(bench: Bench) -> None:
    """HTTP/2 without TLS is refused in HTTP/1.1, and the connection ends."""
    client = await bench.client()
    await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert (await client.answer()).status in {400, 501}
    await client.ended()


@rule("8446 4.1.2")
async def test_tls_to_a_clear_port(bench: Bench) -> None:
    """TLS spoken to the clear-text port is answered at once, with a hint."""
    client = await bench.client()
    await client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40))
    answer = await client.answer()
    assert 400 == answer.status
    assert b"https" in answer.body


@rule("9112 3")
@pytest.mark.parametrize(
    "line",
    [
        b"GET  /x HTTP/1.1",
        b"GET /x  HTTP/1.1",
        b"GET\t/x HTTP/1.1",
        b"GET /x\tHTTP/1.1",
        b" GET /x HTTP/1.1",
        b"GET HTTP/1.1",
        b"GET",
        b"/x HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET x HTTP/1.1",
        b"GET /x\x0b HTTP/1.1",
        b"GET /x\x00 HTTP/1.1",
        b"GET /x\x7f HTTP/1.1",
    ],
)
async def test_request_line(bench: Bench, line: bytes) -> None:
    """A request line that is not exactly method, one space, target, one space, version is refused."""
    answer = await bench.ask(line + b"\r\nHost: localhost" + BLANK)
    assert answer.status in {400, 501}
    assert answer.slug is not None
    assert [] == bench.upstream.peers


@rule("9112 11.1")
@pytest.mark.parametrize("target", [b"/x\r\nX-Injected: 1", b"/x\nX-Injected: 1", b"/x\rX: 1", b"/x?\r\n\r\nGET /y"])
async def test_crlf_in_the_target(bench: Bench, target: bytes) -> None:
    """CR and LF in a target never become a field."""
    bench.upstream.plays(OK)
    client = await bench.client()
    await client.send(b"GET " + target + b" HTTP/1.1\r\nHost: localhost" + BLANK)
    assert 400 == (await client.answer()).status
    assert [] == bench.upstream.peers


@rule("9112 11.1")
@pytest.mark.parametrize("escape", ["%0d%0aX-Injected:%201", "%0A", "%00", "%0D%0A%0D%0AGET%20/"])
async def test_encoded_crlf_stays_encoded(bench: Bench, escape: str) -> None:
    """Encoded line ends stay encoded."""
    assert f"GET /api/v1/x{escape} HTTP/1.1".encode() == (await bench.forwarded(get("/x" + escape))).line


@rule("9112 3.2")
@pytest.mark.parametrize(
    "hosts",
    [
        (),
        ("localhost", "localhost"),
        ("localhost", "evil.example"),
        ("localhost, evil.example",),
        ("a b",),
        ("localhost/x",),
        ("user@localhost",),
    ],
)
async def test_host(bench: Bench, hosts: tuple[str, ...]) -> None:
    """A missing, double or malformed Host is refused."""
    answer = await bench.ask(head("GET /x HTTP/1.1", *[f"Host: {host}" for host in hosts], host=None))
    assert answer.status in {400, 403}
    assert answer.slug is not None
    assert [] == bench.upstream.peers


@rule("9112 11.2")
async def test_good_then_bad(bench: Bench) -> None:
    """A bad request does not spoil the good one before it in the same segment: both get their own answer."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(get("/good") + b"NONSENSE\r\n\r\n" + SMUGGLED)
    assert 200 == (await client.answer()).status
    answer = await client.answer()
    assert (501, b"close") == (answer.status, answer.value(b"Connection"))
    await client.ended()
    assert [b"GET /api/v1/good HTTP/1.1"] == [request.line for request in bench.upstream.requests]


@rule("9112 11.2")
async def test_bad_after_an_answer(bench: Bench) -> None:
    """A bad request on a connection that has served good ones gets its refusal too."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(get())
    assert 200 == (await client.answer()).status
    await client.send(b"NONSENSE\r\n\r\n")
    assert (501, "not-supported") == ((answer := await client.answer()).status, answer.slug)


@rule("9112 11.2")
@pytest.mark.parametrize("target", ["/../x", "/-/none"])
async def test_unread_body_is_no_request(bench: Bench, target: str) -> None:
    """The body of a request that was refused is never read as the next request."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(head(f"POST {target} HTTP/1.1", "Content-Length: 1000"), SMUGGLED, pause=0.01)
    assert b"close" == (await client.answer()).value(b"Connection")
    await client.ended()
    assert [] == bench.upstream.peers


@rule("9112 11.2")
async def test_request_in_a_body(bench: Bench) -> None:
    """What looks like a request inside a body stays a body."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(post(SMUGGLED) + get("/2"))
    assert [200, 200] == [(await client.answer()).status for _ in range(2)]
    assert [SMUGGLED, b""] == [request.body for request in bench.upstream.requests]


@rule("9112 9.6")
async def test_nothing_after_close(bench: Bench) -> None:
    """What follows a request with Connection: close is not read as a request."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(get("/1", "Connection: close") + SMUGGLED)
    assert 200 == (await client.answer()).status
    await client.gone()
    assert 1 == len(bench.upstream.requests)


@rule("9112 2.2")
async def test_garbage(bench: Bench) -> None:
    """Garbage instead of a request is refused, and others are served."""
    for data in (b"\x00" * 100 + BLANK, bytes(range(256)) + BLANK, b"{}" + BLANK, b"\xff\xfe" + BLANK):
        client = await bench.client()
        await client.send(data)
        assert (await client.answer()).status in {400, 501}
    await bench.healthy()


@rule("contract 8")
@pytest.mark.parametrize(
    ("status", "text", "data"),
    [
        (400, "a space, which must be written %20", get("/customers?name=ACME Ltd")),
        (400, "%C3%A9", "GET /caf\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()),
        (400, "%C3%A9", "GET /caf\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1")),
        (400, "it has more than one Content-Type field", post(b"", "Content-Type: a/b", "Content-Type: a/b")),
        (400, "it has more than one User-Agent field", get("/x", "User-Agent: a", "User-Agent: b")),
        (400, "the tool uses https", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40)),
        (400, "only CR or only LF", b"GET /x HTTP/1.1\nHost: localhost\n\n"),
        (400, "line 4 begins with a space or a tab", raw(b"X: a", b" b", first=b"GET /x HTTP/1.1")),
        (400, "line 3 has a space before its colon", raw(b"X : y", first=b"GET /x HTTP/1.1")),
        (400, "no Host field", head("GET /x HTTP/1.1", host=None)),
        (400, "begins with HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (400, "SOCKS", b"\x05\x01\x00"),
        (400, "both Content-Length and Transfer-Encoding", raw(b"Content-Length: 1", b"Transfer-Encoding: chunked")),
        (400, "this proxy supports only HTTP/1.1 and HTTP/1.0", b"GET /x HTTP/1.2\r\nHost: localhost\r\n\r\n"),
        (501, "Methods are written in capitals (GET)", head("get /x HTTP/1.1")),
    ],
)
async def test_each_refusal_says_what_is_wrong(bench: Bench, status: int, text: str, data: bytes) -> None:
    """A request that can't be read is told what is wrong with it, in the log too; https only where it speaks that."""
    answer = await bench.ask(data)
    assert status == answer.status
    message = json.loads(answer.body)["message"]
    assert text in message
    assert ("https" in message) == (data[:1] == b"\x16")
    lines, *_ = bench.proxy.telemetry.since(0)
    assert message == json.loads(lines[-1])["reason"]
    assert [] == bench.upstream.peers


@rule("contract 6", allowed_hosts="metquay-proxy")
@pytest.mark.parametrize("path", ["/customers", "/-/status"])
async def test_the_page_that_only_a_referer_tells(bench: Bench, path: str) -> None:
    """Where a browser says nothing else, another site's Referer is refused, and nothing is sent; our own is not."""
    answer = await bench.ask(get(path, "Referer: http://evil.example/", host=b"metquay-proxy:6387"))
    assert (403, "origin-not-allowed") == (answer.status, answer.slug)
    assert [] == bench.upstream.peers


@rule("contract 3")
@pytest.mark.parametrize("path", ["/authenticate/", "/authenticate;x=1", "/%61uthenticate", "/AUTHENTICATE"])
async def test_a_login_in_another_spelling(bench: Bench, path: str) -> None:
    """What a server may read as the login is answered here too: the keys in its body never go to Metquay."""
    answer = await bench.ask(post(b'{"accessKey": "a", "secretKey": "b"}', target=path))
    assert 200 == answer.status
    assert "accessToken" in json.loads(answer.body)
    assert [] == bench.upstream.peers


BAD_HEADS = [
    b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    b"HTTP/1.1 200 OK\r\nX : y\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nX: a\nSet-Cookie: b\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\n: y\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 O\x00K\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 99 Low\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 2000 High\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 abc\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/0.9 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"ICY 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"<html>not http</html>",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x15\x03\x01\x00\x02\x02\x46",
    b"\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
]


@rule("9112 11.1", retries="0")
@pytest.mark.parametrize("data", BAD_HEADS)
async def test_bad_answers(bench: Bench, data: bytes) -> None:
    """A head of the upstream that breaks HTTP (splitting, garbage, odd versions) gives 502 and a closed connection."""
    answer = await bench.ask(get(), data)
    assert (502, "upstream-protocol") == (answer.status, answer.slug)
    await bench.upstream.peers[0].gone()
    await bench.healthy()


BAD_FRAMING = [
    b"Content-Length: 2\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 2",
    b"Content-Length: 2\r\nContent-Length: 3",
    b"Content-Length: 2\r\nContent-Length: 2",
    b"Content-Length: 2, 3",
    b"Content-Length: +2",
    b"Content-Length: -2",
    b"Content-Length: 0x2",
    b"Content-Length: 2 2",
    b"Content-Length:",
    b"Content-Length: 99999999999999999999",
    b"Transfer-Encoding: gzip",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
]


@rule("9112 6.3", retries="0")
@pytest.mark.parametrize("fields", BAD_FRAMING)
async def test_bad_framing_of_answers(bench: Bench, fields: bytes) -> None:
    """An answer whose length can be read in two ways gives 502."""
    answer = await bench.ask(get(), b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\n0\r\n\r\n")
    assert (502, "upstream-protocol") == (answer.status, answer.slug)


@rule("9112 6.1", retries="0")
async def test_te_of_an_http_1_0_answer(bench: Bench) -> None:
    """A Transfer-Encoding in an HTTP/1.0 answer gives 502."""
    answer = await bench.ask(get(), b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert (502, "upstream-protocol") == (answer.status, answer.slug)


POISON = answered(body=b"poison")


@rule("9112 9.2")
async def test_poison_with_the_answer(bench: Bench) -> None:
    """A second answer in the same segment never answers the next client."""
    bench.upstream.plays(answered(body=b"first") + POISON, OK)
    assert b"first" == (await bench.ask(get(), answered(body=b"first") + POISON)).body
    await bench.healthy()
    assert 2 == len(bench.upstream.peers)


@rule("9112 9.2")
@pytest.mark.parametrize("wait", [True, False])
async def test_poison_while_idle(bench: Bench, wait: bool) -> None:  # noqa: FBT001 - a column
    """An answer that nobody asked for, on an idle connection, never answers the next client, however late it came."""
    client = await bench.client()
    await client.send(get("/1"))
    peer = await bench.upstream.peer()
    await peer.request()
    await peer.send(OK)
    await client.answer()
    peer.writer.write(POISON)
    if wait:
        await peer.gone()
    await bench.healthy()
    assert b"/healthy" in bench.upstream.requests[-1].line


@rule("9112 6.3")
@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n" + POISON),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\npoison"),
        ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + POISON),
    ],
)
async def test_body_where_none_may_be(bench: Bench, method: str, data: bytes) -> None:
    """A body after an answer that has none never reaches a client."""
    client = await bench.client()
    bench.upstream.plays(data, OK)
    await client.send(head(f"{method} /x HTTP/1.1"))
    assert b"" == (await client.answer(method)).body
    await client.send(get())
    assert b"ok" == (await client.answer()).body
    assert 2 == len(bench.upstream.peers)


@rule("9112 9.2")
async def test_answer_before_the_request(bench: Bench) -> None:
    """An upstream that speaks first breaks nothing but its own connection."""
    bench.upstream.greeting = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    client = await bench.client()
    await client.send(get())
    assert (await client.answer()).status in {408, 502}
    bench.upstream.greeting = b""
    await bench.healthy()


@rule("9112 9.6")
async def test_poison_after_close(bench: Bench) -> None:
    """A connection that the upstream wants closed is not used again."""
    bench.upstream.plays(answered("Connection: close", body=b"a"))
    client = await bench.client()
    for _ in range(2):
        await client.send(get())
        assert b"a" == (await client.answer()).body
    assert 2 == len(bench.upstream.peers)


@rule("9110 7.6.1")
async def test_injection_by_the_location(bench: Bench) -> None:
    """A Host that the client made up can't put a line into the answer."""
    location = bench.upstream.url.encode() + b"/y"
    answer = await bench.ask(get(host=b"localhost:1"), answered(b"Location: " + location, status="302 Found"))
    assert b"http://localhost:1/api/v1/y" == answer.value(b"Location")


@rule("9112 7.1")
async def test_answer_with_evil_chunks_to_others(bench: Bench) -> None:
    """While one answer breaks off others go on."""

    async def play(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")

    bench.upstream.plays(play, OK)
    client = await bench.client()
    await client.send(get())
    await client.gone()
    await asyncio.gather(*[bench.healthy() for _ in range(5)])
