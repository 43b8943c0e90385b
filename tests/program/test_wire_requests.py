"""What a request may lose and gain on its way to the upstream."""

from __future__ import annotations

import asyncio
import gzip
import os
from typing import TYPE_CHECKING

import pytest

from tests.wire import BLANK, OK, answered, chunked, eventually, get, head, post, rule

if TYPE_CHECKING:
    from tests.wire import Bench

METHODS = [
    "DELETE",
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "OPTIONS",
    "COPY",
    "LOCK",
    "MKCOL",
    "MOVE",
    "PROPFIND",
    "PROPPATCH",
    "SEARCH",
    "UNLOCK",
    "BIND",
    "REBIND",
    "UNBIND",
    "ACL",
    "REPORT",
    "MKACTIVITY",
    "CHECKOUT",
    "MERGE",
    "M-SEARCH",
    "NOTIFY",
    "SUBSCRIBE",
    "UNSUBSCRIBE",
    "PATCH",
    "PURGE",
    "MKCALENDAR",
    "LINK",
    "UNLINK",
    "SOURCE",
    "QUERY",
]


@rule("9110 9.1")
@pytest.mark.parametrize("method", METHODS)
async def test_methods(bench: Bench, method: str) -> None:
    """Every method that the parser knows is sent as it is."""
    answer = await bench.ask(head(f"{method} /x HTTP/1.1"), OK, method=method)
    assert 200 == answer.status
    assert f"{method} /api/v1/x HTTP/1.1".encode() == bench.upstream.requests[0].line


@rule("9110 9.1")
@pytest.mark.parametrize("method", ["FOO", "get", "Post", "GET2", "DESCRIBE", "PLAY", "(x)"])
async def test_unknown_methods(bench: Bench, method: str) -> None:
    """A method that the parser does not know is answered 501, and nothing is sent."""
    await bench.refused(head(f"{method} /x HTTP/1.1"), 501, "not-supported")


@rule("9110 9.3.8")
async def test_trace(bench: Bench) -> None:
    """TRACE is answered 405: its answer would show the token."""
    await bench.refused(head("TRACE /x HTTP/1.1"), 405, "method-not-allowed")


@rule("9112 3.2.1")
@pytest.mark.parametrize(
    "target",
    [
        "/a%2Fb%2fc",
        "/%41%7E~",
        "/a+b;c=d,e",
        "/customers?",
        "/customers??a",
        "/x?a=%C3%A9&b=1+2&&c",
        "/%zz%",
        '/[{|}]^"`',
        "/x?q=a/../b",
        "/x//y/",
        "/:@!$&'()*,=",
    ],
)
async def test_target_bytes(bench: Bench, target: str) -> None:
    """The target's bytes arrive as they were written: escapes, their case, plus, semicolon, a bare question mark."""
    request = await bench.forwarded(get(target))
    assert f"GET /api/v1{target} HTTP/1.1".encode() == request.line


@rule("contract 3")
@pytest.mark.parametrize("target", ["/api/v1/customers", "//customers", "/api/v1//customers", "/customers"])
async def test_prefix_once(bench: Bench, target: str) -> None:
    """The prefix is never doubled, and empty segments around it are dropped."""
    assert b"GET /api/v1/customers HTTP/1.1" == (await bench.forwarded(get(target))).line


@rule("9112 3")
@pytest.mark.parametrize("size", [8 * 1024, 8191, 20_000, 60_000])
async def test_long_targets(bench: Bench, size: int) -> None:
    """A target of 8 KiB and more arrives whole."""
    target = "/x?" + "a" * size
    assert f"GET /api/v1{target} HTTP/1.1".encode() == (await bench.forwarded(get(target))).line


@rule("3986 2")
@pytest.mark.parametrize("byte", [b"\xe9", b"\xc3\xa9", b"\xff", b"\x80"])
@pytest.mark.parametrize("start", [b"/x", b"/x?q="])
async def test_raw_bytes_in_the_target(bench: Bench, start: bytes, byte: bytes) -> None:
    """Bytes beyond ASCII in a target are refused with 400."""
    await bench.refused(b"GET " + start + byte + b" HTTP/1.1\r\nHost: localhost" + BLANK, 400, "bad-target")


@rule("contract 3")
@pytest.mark.parametrize("target", ["/../x", "/%2e%2e/x", "/a/..;/b", "/a\\b", "/a#b", "/%252e%252e/x"])
async def test_dot_segments(bench: Bench, target: str) -> None:
    """A target that could leave the API's path is refused with 400."""
    await bench.refused(get(target), 400, "bad-target")


@rule("9110 5.3")
async def test_field_order_case_repeats(bench: Bench) -> None:
    """Fields keep order, case, repeats, and empty and latin-1 values."""
    fields = [
        b"x-b: 1",
        b"X-A: 2",
        b"Accept: text/html;q=0.5,  */*",
        b"X-B: 3",
        b"X-Empty:",
        b'COOKIE: a=b; c="d"',
        b"Cookie: e=f",
        b"X-Latin: caf\xe9 \xff\xa0",
        b"x!#$%&'*+-.^_`|~0: odd name",
        b"X-Tab: a\tb",
    ]
    request = await bench.forwarded(get("/x", *fields))
    expected = [tuple(text.split(b":", 1)) for text in fields]
    kept = [(name, value) for name, value in request.fields if name not in {b"Host", b"Authorization"}]
    assert [(name, value.strip(b" ")) for name, value in expected] == kept


@rule("9110 5.6.3")
async def test_surrounding_white_space(bench: Bench) -> None:
    """White space around a value is no part of it."""
    request = await bench.forwarded(get("/x", b"A:b", b"C: \t d \t ", b"E:\t"))
    assert [(b"A", b"b"), (b"C", b"d"), (b"E", b"")] == [pair for pair in request.fields if len(pair[0]) == 1]


@rule("contract 3")
async def test_nothing_invented(bench: Bench) -> None:
    """Nothing is added but Host and Authorization: no Accept, Accept-Encoding, User-Agent, Content-Type, Via."""
    for request in (get(), post(b"x=1"), chunked(b"x=1")):
        seen = await bench.forwarded(request)
        assert {b"Host", b"Authorization"} == set(seen.names) - {b"Content-Length", b"Transfer-Encoding"}


@rule("contract 3")
async def test_authorization_replaced(bench: Bench) -> None:
    """The client's Authorization is replaced by the bearer, however it is spelled."""
    request = await bench.forwarded(get("/x", "authorization: Basic Zm9v"))
    assert [b"Bearer token-of-the-bench"] == request.values(b"Authorization")


@rule("9110 7.6.1")
async def test_hop_by_hop(bench: Bench) -> None:
    """Connection, Keep-Alive, TE, Trailer, Upgrade, HTTP2-Settings and Proxy-* end at the proxy."""
    request = await bench.forwarded(
        get(
            "/x",
            "Connection: keep-alive",
            "Keep-Alive: timeout=5",
            "TE: trailers, deflate",
            "Trailer: X-Sum",
            "Upgrade: foo/2",
            "HTTP2-Settings: AAA",
            "Proxy-Connection: keep-alive",
            "Proxy-Authorization: Basic Zm9v",
            "Proxy-Foo: x",
            "X-Stays: 1",
        )
    )
    assert [b"Host", b"X-Stays", b"Authorization"] == request.names


@rule("9110 7.6.1")
@pytest.mark.parametrize(
    "connection",
    [
        ["Connection: X-Drop, close"],
        ["Connection: close", "connection: x-drop"],
        ["Connection: ,, \t X-DROP ,"],
        ["CONNECTION: keep-alive,x-drop,foo"],
    ],
)
async def test_connection_named(bench: Bench, connection: list[str]) -> None:
    """Fields that Connection names end at the proxy, wherever and however they are named."""
    request = await bench.forwarded(get("/x", "X-Drop: 1", *connection, "x-drop: 2", "X-Drop-Not: 3"))
    assert [b"Host", b"X-Drop-Not", b"Authorization"] == request.names


@rule("contract 3")
@pytest.mark.parametrize(
    "named", ["authorization", "host", "content-length", "transfer-encoding", "expect", "connection"]
)
async def test_connection_names_what_must_stay(bench: Bench, named: str) -> None:
    """Connection can't take away what was attached, nor the framing."""
    request = await bench.forwarded(post(b"abc", f"Connection: {named}"))
    assert b"abc" == request.body
    assert ("length", [b"Bearer token-of-the-bench"]) == (request.framing, request.values(b"Authorization"))


@rule("contract 3")
async def test_dropped_for_safety(bench: Bench) -> None:
    """Forwarded, X-Forwarded-* and the client key of the proxy go no further."""
    fields = ["Forwarded: for=1", "X-Forwarded-For: 1", "x-forwarded-proto: http", "X-Proxy-Key: k", "X-Forward: stays"]
    assert [b"Host", b"X-Forward", b"Authorization"] == (await bench.forwarded(get("/x", *fields))).names


@rule("9112 3.2")
async def test_host_is_the_upstreams(bench: Bench) -> None:
    """Host is the upstream's, once, whatever the client asked for."""
    request = await bench.forwarded(get("/x", host=b"127.0.0.1:99"))
    assert [bench.upstream.url.split("/")[2].encode()] == request.values(b"Host")


@rule("9110 8.4")
@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "gzip, gzip", "made-up", "identity"])
async def test_body_encodings(bench: Bench, coding: str) -> None:
    """A body is passed on byte for byte under any Content-Encoding, a false one included."""
    body = gzip.compress(b"x" * 1000) if coding == "gzip" else b"\x1f\x8b not what it says \x00\xff"
    request = await bench.forwarded(post(body, f"Content-Encoding: {coding}"))
    assert (body, coding.encode()) == (request.body, request.value(b"Content-Encoding"))


@rule("9112 6.2")
@pytest.mark.parametrize("size", [0, 1, 65536, 3_000_000])
async def test_length_stays_length(bench: Bench, size: int) -> None:
    """A body with a length arrives with that length, of any size and in any segments."""
    body = os.urandom(size)
    request = await bench.forwarded(post(body))
    assert ("length", str(size).encode()) == (request.framing, request.value(b"Content-Length"))
    assert body == request.body


@rule("9112 7.1")
@pytest.mark.parametrize("sizes", [(), (1,), (1, 2, 3), (100_000, 1), (2_000_000,)])
async def test_chunked_stays_chunked(bench: Bench, sizes: tuple[int, ...]) -> None:
    """A chunked body arrives chunked, with the same bytes."""
    pieces = [os.urandom(size) for size in sizes]
    request = await bench.forwarded(chunked(*pieces))
    assert ("chunked", b"".join(pieces)) == (request.framing, request.body)


@rule("9112 6.3")
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_no_body_stays_no_body(bench: Bench, method: str) -> None:
    """A request without a body gets no Content-Length and no Transfer-Encoding."""
    assert "none" == (await bench.forwarded(head(f"{method} /x HTTP/1.1"))).framing


@rule("9110 9.3.1")
@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS", "PROPFIND"])
async def test_body_of_any_method(bench: Bench, method: str) -> None:
    """A body is forwarded whatever the method."""
    assert b"abc" == (await bench.forwarded(post(b"abc", method=method))).body


@rule("contract 3")
async def test_upload_streams(bench: Bench) -> None:
    """The first byte of a body reaches the upstream before the last was sent."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Content-Length: 6"), b"abc", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    assert b"abc" == await peer.exactly(3)
    await client.send(b"def")
    assert b"def" == await peer.exactly(3)
    await peer.send(OK)
    assert 200 == (await client.answer()).status


@rule("9112 7.1")
async def test_chunks_stream(bench: Bench) -> None:
    """A chunk reaches the upstream before the next was sent."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked"), b"3\r\nabc\r\n", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    assert b"3\r\nabc\r\n" == await peer.exactly(8)
    await client.send(b"0\r\n\r\n")
    assert b"0\r\n\r\n" == await peer.exactly(5)
    await peer.send(OK)
    assert 200 == (await client.answer()).status


@rule("9112 7.1.2")
async def test_trailers_dropped(bench: Bench) -> None:
    """Trailer fields are dropped, and never become fields of the next request."""
    client = await bench.client()
    bench.upstream.plays(OK)
    trailers = b"0\r\nX-Sum: 1\r\nContent-Length: 7\r\n\r\n"
    await client.send(chunked(b"abc", end=trailers) + get("/2"))
    assert [200, 200] == [(await client.answer()).status for _ in range(2)]
    first, second = await bench.upstream.seen(2)
    assert b"abc" == first.body
    assert [b"Host", b"Authorization"] == second.names


@rule("9112 7.1.1")
async def test_chunk_extensions_dropped(bench: Bench) -> None:
    """Chunk extensions are dropped."""
    request = head("POST /x HTTP/1.1", "Transfer-Encoding: chunked") + b'3;a=b;c="d"\r\nabc\r\n0;x\r\n\r\n'
    assert b"abc" == (await bench.forwarded(request)).body


@rule("9110 10.1.1")
async def test_expect_answered_here(bench: Bench) -> None:
    """Expect: 100-continue is answered by the proxy and not forwarded."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(head("POST /x HTTP/1.1", "Expect: 100-continue", "Content-Length: 3"))
    assert b"HTTP/1.1 100 Continue\r\n\r\n" == (await client.interim()).head
    await client.send(b"abc")
    assert 200 == (await client.answer()).status
    request = (await bench.upstream.seen())[0]
    assert (b"abc", None) == (request.body, request.value(b"Expect"))


@rule("9110 10.1.1")
@pytest.mark.parametrize(
    ("target", "fields", "status"),
    [
        ("/../x", [], 400),
        ("/x", ["Host: evil.example"], 403),
        ("/-/none", [], 404),
        ("/x", ["Origin: http://evil.example"], 403),
    ],
)
async def test_expect_refused(bench: Bench, target: str, fields: list[str], status: int) -> None:
    """A request that is not admitted gets no 100, and its connection closes: the body may or may not follow."""
    client = await bench.client()
    host = [] if any(text.startswith("Host") for text in fields) else ["Host: localhost"]
    fields = [*host, *fields, "Expect: 100-continue", "Content-Length: 3"]
    await client.send(head(f"POST {target} HTTP/1.1", *fields, host=None))
    answer = await client.answer()
    assert (status, [], b"close") == (answer.status, answer.interim, answer.value(b"Connection"))
    await client.ended()
    assert [] == bench.upstream.peers


@rule("9110 10.1.1")
async def test_expect_with_the_body_there(bench: Bench) -> None:
    """Where the body has come already no 100 is needed, and the request is forwarded once."""
    answer = await bench.ask(post(b"abc", "Expect: 100-continue"))
    assert 200 == answer.status
    assert b"abc" == bench.upstream.requests[0].body


@rule("9110 10.1.1")
async def test_expect_of_http_1_0(bench: Bench) -> None:
    """HTTP/1.0 has no 100, so that its Expect is ignored."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(head("POST /x HTTP/1.0", "Expect: 100-continue", "Content-Length: 3"))
    await client.silent()
    await client.send(b"abc")
    answer = await client.answer()
    assert (200, []) == (answer.status, answer.interim)


@rule("9112 9.3.2")
async def test_pipelining(bench: Bench) -> None:
    """Pipelined requests are answered in order, and sent upstream one after the other."""
    client = await bench.client()
    await client.send(get("/1") + post(b"abc", target="/2") + chunked(b"de") + get("/4"))
    peer = await bench.upstream.peer()
    for number, body in enumerate([b"", b"abc", b"de", b""], 1):
        request = await peer.request()
        assert body == request.body
        await asyncio.sleep(0.01)
        await peer.silent(0.01)
        await peer.send(answered(body=b"%d" % number))
        assert b"%d" % number == (await client.answer()).body


@rule("9112 9.3.2")
async def test_deep_pipeline(bench: Bench) -> None:
    """Hundreds of requests in one segment are all answered, in order, without being held in memory at once."""
    client = await bench.client()

    async def echo(peer: object) -> None:
        await peer.send(answered(body=bench.upstream.requests[-1].line))  # type: ignore[attr-defined]

    bench.upstream.plays(echo)
    await client.send(b"".join(get(f"/{number}") for number in range(300)))
    for number in range(300):
        assert f"GET /api/v1/{number} HTTP/1.1".encode() == (await client.answer()).body


@rule("9112 2.2")
async def test_empty_lines_before_a_request(bench: Bench) -> None:
    """Empty lines before a request line are ignored."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(b"\r\n" + get("/1") + b"\r\n\r\n" + get("/2"), b"\r\n", b"\r\n" + get("/3"), pause=0.01)
    assert [200, 200, 200] == [(await client.answer()).status for _ in range(3)]


@rule("9112 2.2")
async def test_any_segments(bench: Bench) -> None:
    """A request means the same however it is cut into segments."""
    bench.upstream.plays(OK)
    whole = post(b"a\r\n\r\nb") + chunked(b"a\r\n\r\n", b"c", end=b"0\r\nX: y\r\n\r\n") + get("/3")
    for size in (1, 2, 7):
        client = await bench.client()
        await client.send(*[whole[index : index + size] for index in range(0, len(whole), size)])
        assert [200] * 3 == [(await client.answer()).status for _ in range(3)]
        assert [b"a\r\n\r\nb", b"a\r\n\r\nc", b""] == [request.body for request in bench.upstream.requests[-3:]]


@rule("9112 9.3")
async def test_persistence(bench: Bench) -> None:
    """An HTTP/1.1 connection persists; Connection: close ends it after the answer."""
    client = await bench.client()
    bench.upstream.plays(OK)
    for number in range(3):
        await client.send(get(f"/{number}"))
        assert 200 == (await client.answer()).status
    await client.send(get("/last", "Connection: close"))
    assert b"close" == (await client.answer()).value(b"Connection")
    await client.ended()


@rule("9112 9.3")
async def test_http_1_0(bench: Bench) -> None:
    """HTTP/1.0 without keep-alive: one answer, then the connection ends. The upstream is asked in HTTP/1.1."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(head("GET /x HTTP/1.0", host=None))
    assert b"ok" == (await client.answer()).body
    await client.ended()
    assert b"GET /api/v1/x HTTP/1.1" == bench.upstream.requests[0].line


@rule("9112 9.3")
async def test_http_1_0_keep_alive(bench: Bench) -> None:
    """HTTP/1.0 with keep-alive: the connection persists, and the answer says so."""
    client = await bench.client()
    bench.upstream.plays(OK)
    for _ in range(2):
        await client.send(head("GET /x HTTP/1.0", "Connection: keep-alive"))
        assert b"keep-alive" == (await client.answer()).value(b"Connection")


@rule("9112 3.2.2")
async def test_absolute_form(bench: Bench) -> None:
    """An absolute-form target for the upstream's own host, or ours, is sent in origin-form; Host is ignored."""
    upstream = bench.upstream.url.split("/")[2]
    for authority in (upstream, bench.authority.decode()):
        request = await bench.forwarded(get(f"http://{authority}/api/v1/customers?a", host=upstream.encode()))
        assert b"GET /api/v1/customers?a HTTP/1.1" == request.line


@rule("9112 3.2.2")
@pytest.mark.parametrize("target", ["http://evil.example/x", "https://evil.example/api/v1/x", "ftp://localhost/x"])
async def test_absolute_form_elsewhere(bench: Bench, target: str) -> None:
    """An absolute-form target for another server is refused."""
    await bench.refused(get(target), 400, "bad-target")


@rule("9112 3.2.4")
async def test_options_asterisk(bench: Bench) -> None:
    """OPTIONS * is sent as OPTIONS *."""
    assert b"OPTIONS * HTTP/1.1" == (await bench.forwarded(head("OPTIONS * HTTP/1.1"))).line


@rule("9112 3.2.4")
async def test_asterisk_of_others(bench: Bench) -> None:
    """No other method may ask for *."""
    await bench.refused(head("GET * HTTP/1.1"), 400, "bad-target")


@rule("9110 9.3.6")
async def test_connect(bench: Bench) -> None:
    """CONNECT is answered 501, and what follows it is not read as a request."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(head("CONNECT evil.example:443 HTTP/1.1") + get("/smuggled"))
    answer = await client.answer()
    assert (501, "not-supported") == (answer.status, answer.slug)
    await client.ended()
    assert [] == bench.upstream.peers


@rule("contract 3")
@pytest.mark.parametrize(
    ("line", "status", "field"),
    [
        ("GET /", 302, (b"Location", b"/-/")),
        ("GET /-", 302, (b"Location", b"/-/")),
        ("GET /api/v1/", 302, (b"Location", b"/-/")),
        ("GET http://localhost/", 302, (b"Location", b"/-/")),
        ("HEAD /", 302, (b"Location", b"/-/")),
        ("POST /", 405, (b"Allow", b"GET, HEAD")),
        ("DELETE http://localhost", 405, (b"Allow", b"GET, HEAD")),
        ("GET /favicon.ico", 204, (b"Content-Length", None)),
        ("GET /robots.txt", 404, (b"X-Metquay-Proxy-Error", b"no-such-page")),
        ("GET /apple-touch-icon-precomposed.png", 404, (b"X-Metquay-Proxy-Error", b"no-such-page")),
        ("GET /.well-known/security.txt", 404, (b"X-Metquay-Proxy-Error", b"no-such-page")),
        ("GET /authenticate", 405, (b"Allow", b"POST")),
        ("PUT /api/v1/authenticate", 405, (b"Allow", b"POST")),
        ("POST /FlexicalERP/rest/x", 404, (b"X-Metquay-Proxy-Error", b"pass-through-off")),
    ],
)
async def test_what_never_reaches_metquay(bench: Bench, line: str, status: int, field: tuple[bytes, bytes]) -> None:
    """What browsers ask for by themselves, logins, and the older interface while it is off are answered here."""
    bench.upstream.plays(OK)
    client = await bench.client()
    method, target = line.replace("http://localhost", f"http://{bench.authority.decode()}").split(" ")
    await client.send(head(f"{method} {target} HTTP/1.1"))
    answer = await client.answer(method)
    assert (status, field[1]) == (answer.status, answer.value(field[0]))
    assert [] == bench.upstream.peers


@rule("6455 4.2")
async def test_websocket(bench: Bench) -> None:
    """A websocket handshake is answered 501."""
    fields = ["Connection: Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA"]
    await bench.refused(get("/x", *fields), 501, "not-supported")


@rule("contract 3", allowed_origins="https://tools.lab.example")
async def test_a_preflight_is_no_websocket(bench: Bench) -> None:
    """A preflight of a listed page is answered as one, whatever upgrade it asks for, and never sent."""
    fields = ["Access-Control-Request-Method: POST", "Connection: Upgrade", "Upgrade: websocket"]
    client = await bench.client()
    await client.send(head("OPTIONS /x HTTP/1.1", "Origin: https://tools.lab.example", *fields))
    assert 204 == (await client.answer("OPTIONS")).status
    assert [] == bench.upstream.peers


@rule("9110 7.8")
async def test_h2c_ignored(bench: Bench) -> None:
    """Any other upgrade is ignored: the request is answered in HTTP/1.1."""
    fields = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"]
    for request in (get("/x", *fields), post(b"abc", *fields)):
        seen = await bench.forwarded(request)
        assert [b"Host", b"Authorization"] == [name for name in seen.names if name != b"Content-Length"]


@rule("9110 7.8")
@pytest.mark.parametrize("cut", [0, 5])
async def test_h2c_and_pipelining(bench: Bench, cut: int) -> None:
    """An upgrade that is ignored changes nothing: what follows is the next request, however it is cut."""
    client = await bench.client()
    bench.upstream.plays(OK)
    follow = get("/2")
    first = get("/1", "Connection: Upgrade", "Upgrade: h2c") + follow[:cut]
    await client.send(first, follow[cut:], pause=0.01)
    assert [200, 200] == [(await client.answer()).status for _ in range(2)]
    assert 2 == len(bench.upstream.requests)


@rule("9112 9.3")
@pytest.mark.parametrize("field", ["Proxy-Connection: close", "Proxy-Connection: keep-alive", "Sec-WebSocket-Key1: x"])
async def test_fields_that_decide_nothing(bench: Bench, field: str) -> None:
    """Neither Proxy-Connection nor a leftover of old websockets makes the proxy deaf to the next request."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(get("/1", field))
    assert 200 == (await client.answer()).status
    await client.send(get("/2", field) + get("/3"))
    assert [200, 200] == [(await client.answer()).status for _ in range(2)]
    passed = [b"x", b"x", None] if "WebSocket" in field else [None] * 3
    assert passed == [request.value(field.partition(":")[0].encode()) for request in bench.upstream.requests]


@rule("9110 7.8")
async def test_upgrade_without_connection(bench: Bench) -> None:
    """An Upgrade that Connection does not name is no upgrade."""
    client = await bench.client()
    bench.upstream.plays(OK)
    await client.send(get("/1", "Upgrade: websocket") + get("/2"))
    assert [200, 200] == [(await client.answer()).status for _ in range(2)]


@rule("contract 3")
async def test_back_pressure_up(bench: Bench) -> None:
    """An upstream that does not read slows the client down instead of filling the proxy's memory."""
    client = await bench.client()
    pouring = client.pour_until_held_up(head("POST /x HTTP/1.1", "Content-Length: 200000000"), bytes(1 << 18))
    assert await pouring < 40_000_000
    await bench.healthy()


@rule("9112 9.3.2")
async def test_pipelined_behind_an_upload(bench: Bench) -> None:
    """A request that shares a segment with the end of a body before it is served after it, whatever was paused."""
    client = await bench.client()
    bench.upstream.plays(OK)
    body = os.urandom(3_000_000)
    await client.send(post(body) + get("/2"))
    assert [200, 200] == [(await client.answer()).status for _ in range(2)]
    assert [len(body), 0] == [len(request.body) for request in bench.upstream.requests]


@rule("9110 7.6.1")
async def test_two_clients_do_not_mix(bench: Bench) -> None:
    """Answers go to those who asked, whichever comes first."""
    clients = [await bench.client() for _ in range(8)]
    for number, client in enumerate(clients):
        await client.send(get(f"/{number}"))
    peers = [await bench.upstream.peer() for _ in clients]
    for peer in reversed(peers):
        await peer.send(answered(body=(await peer.request()).line))
    for number, client in enumerate(clients):
        assert f"GET /api/v1/{number} HTTP/1.1".encode() == (await client.answer()).body
    await eventually(lambda: bench.running is None or bench.running.telemetry.active == 0)


@rule("7240 2")
async def test_preferences(bench: Bench) -> None:
    """How long a tool waits is for the proxy alone, and told to apply; other preferences are sent on as they came."""
    answer = await bench.ask(get("/x", "Prefer: respond-async, wait=30", 'Prefer: a="b, c"'), OK)
    assert [b"respond-async", b'a="b, c"'] == bench.upstream.requests[-1].values(b"Prefer")
    assert b"wait=30" == answer.value(b"Preference-Applied")
    answer = await bench.ask(get("/x", "Prefer: wait=601"), answered("Preference-Applied: a"))
    assert [] == bench.upstream.requests[-1].values(b"Prefer")
    assert [b"a", b"wait=600"] == answer.values(b"Preference-Applied")
    answer = await bench.ask(get("/-/nothing", "Prefer: wait=5"))
    assert (404, b"wait=5") == (answer.status, answer.value(b"Preference-Applied"))
