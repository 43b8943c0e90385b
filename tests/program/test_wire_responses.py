"""What an answer may lose and gain on its way to the client."""

from __future__ import annotations

import asyncio
import gzip
import os
from typing import TYPE_CHECKING

import pytest

from tests.wire import BLANK, OK, Peer, answered, chunked, get, head, post, rule

if TYPE_CHECKING:
    from tests.wire import Bench, Message

ADDED = {b"Cache-Control", b"X-Request-Id"}


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n", fields: str = "") -> bytes:
    """Return a chunked answer."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return f"HTTP/1.1 200 OK\r\n{fields}Transfer-Encoding: chunked\r\n\r\n".encode() + body + end


def ending(data: bytes) -> object:
    """Return an answer after which the upstream closes."""

    async def play(peer: Peer) -> None:
        await peer.send(data)
        peer.close()

    return play


@rule("9110 15")
@pytest.mark.parametrize(
    "status",
    [
        "200 OK",
        "201 Created",
        "299 Made up",
        "302 Found",
        "404 Nicht da",
        "418 I'm a teapot",
        "500 Oh",
        "599 x",
        "799 Odd",
    ],
)
async def test_status_and_reason(bench: Bench, status: str) -> None:
    """Status and reason arrive as they were sent."""
    answer = await bench.ask(post(b""), answered(status=status, body=b"x"))
    assert (f"HTTP/1.1 {status}".encode(), b"x") == (answer.line, answer.body)


@rule("9112 4")
@pytest.mark.parametrize(
    ("line", "reason"), [(b"200", b""), (b"200 ", b""), (b"200 caf\xe9", b"caf\xe9"), (b"200 a  b", b"a  b")]
)
async def test_odd_reasons(bench: Bench, line: bytes, reason: bytes) -> None:
    """An empty, a missing and a latin-1 reason are no trouble."""
    answer = await bench.ask(get(), b"HTTP/1.1 " + line + b"\r\nContent-Length: 0" + BLANK)
    assert reason == answer.reason


@rule("9110 5.3")
async def test_field_order_case_repeats(bench: Bench) -> None:
    """Fields keep order, case, repeats, and empty and latin-1 values."""
    fields = [
        (b"x-b", b"1"),
        (b"ETag", b'"x"'),
        (b"X-A", b"2"),
        (b"X-B", b"3"),
        (b"x-empty", b""),
        (b"VIA", b"1.1 a, 1.1 b"),
        (b"Via", b"1.1 c"),
        (b"X-Latin", b"caf\xe9 \xff"),
        (b"Content-length", b"2"),
        (b"Date", b"yesterday"),
        (b"Server", b"theirs"),
        (b"X-Request-Id", b"theirs"),
    ]
    data = b"HTTP/1.1 200 OK\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in fields) + b"\r\nok"
    assert fields == (await bench.ask(get(), data)).fields


@rule("6265 3")
async def test_set_cookie(bench: Bench) -> None:
    """Each Set-Cookie stays a field of its own, and none is remembered for the next client."""
    cookies = [b"a=1; Expires=Wed, 09 Jun 2027 10:18:14 GMT", b"b=2", b"a=3"]
    answer = await bench.ask(get(), answered(*[b"Set-Cookie: " + cookie for cookie in cookies]))
    assert cookies == answer.values(b"Set-Cookie")
    assert None is (await bench.forwarded(get())).value(b"Cookie")


@rule("contract 3")
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "500 Oh"])
async def test_nothing_invented(bench: Bench, status: str) -> None:
    """No Server, Date, Content-Type, Content-Encoding or Via is invented."""
    answer = await bench.ask(post(b""), answered(status=status, body=b"{}"))
    assert {b"Content-Length"} == set(answer.names) - ADDED


@rule("9111 5.2.2.5")
@pytest.mark.parametrize("name", ["Cache-Control", "Expires", "Pragma", "ETag", "Last-Modified"])
async def test_no_store(bench: Bench, name: str) -> None:
    """Where the upstream says nothing about caching, no-store is added; where it does, nothing."""
    assert b"no-store" == (await bench.ask(get(), answered())).value(b"Cache-Control")
    answer = await bench.ask(get(), answered(f"{name.lower()}: x"))
    assert [name.lower().encode()] == [
        each for each in answer.names if each not in {b"X-Request-Id", b"Content-Length"}
    ]


@rule("9110 8.4")
@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "gzip, gzip", "made-up", "identity", "GZIP"])
async def test_encodings(bench: Bench, coding: str) -> None:
    """A body is passed on byte for byte under any Content-Encoding: known, unknown, double or false."""
    real = gzip.compress(b"x" * 1000)
    for body in (real, b"no gzip at all", b""):
        answer = await bench.ask(get(), answered(f"Content-Encoding: {coding}", body=body))
        assert (body, coding.encode(), str(len(body)).encode()) == (
            answer.body,
            answer.value(b"Content-Encoding"),
            answer.value(b"Content-Length"),
        )


@rule("9110 9.3.2")
@pytest.mark.parametrize("framing", ["Content-Length: 1234", "Transfer-Encoding: chunked", "X: y"])
async def test_head(bench: Bench, framing: str) -> None:
    """HEAD has no body whatever its fields say, its length is kept, and the connection goes on."""
    client = await bench.client()
    bench.upstream.plays(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode(), OK)
    await client.send(head("HEAD /x HTTP/1.1"))
    answer = await client.answer("HEAD")
    length = b"1234" if "1234" in framing else None
    assert (200, length) == (answer.status, answer.value(b"Content-Length"))
    await client.send(get())
    assert b"ok" == (await client.answer()).body


@rule("9112 6.3")
@pytest.mark.parametrize("fields", ["", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_bodiless(bench: Bench, status: str, fields: str) -> None:
    """204 and 304 have no body whatever their fields say; a 204 loses its Content-Length, and no chunk is written."""
    client = await bench.client()
    bench.upstream.plays(f"HTTP/1.1 {status}\r\n{fields}\r\n".encode(), OK)
    await client.send(get())
    answer = await client.answer()
    assert (int(status[:3]), b"", None) == (answer.status, answer.body, answer.value(b"Transfer-Encoding"))
    await client.send(get())
    assert b"ok" == (await client.answer()).body


@rule("9110 15.3.6")
async def test_205(bench: Bench) -> None:
    """205 is framed like any other answer."""
    answer = await bench.ask(get(), answered(status="205 Reset Content"))
    assert (205, b"0") == (answer.status, answer.value(b"Content-Length"))


@rule("9110 14")
async def test_ranges(bench: Bench) -> None:
    """206 and 416 pass with Content-Range, multipart included."""
    body = b"--b\r\nContent-Range: bytes 0-1/9\r\n\r\nab\r\n--b--\r\n"
    fields = ["Content-Type: multipart/byteranges; boundary=b"]
    answer = await bench.ask(
        get("/x", "Range: bytes=0-1,3-4"), answered(*fields, status="206 Partial Content", body=body)
    )
    assert (206, body) == (answer.status, answer.body)
    answer = await bench.ask(
        get("/x", "Range: bytes=99-"), answered("Content-Range: bytes */9", status="416 Range Not Satisfiable")
    )
    assert (416, b"bytes */9") == (answer.status, answer.value(b"Content-Range"))


@rule("9110 15.2")
@pytest.mark.parametrize("interim", [b"100 Continue", b"102 Processing", b"103 Early Hints\r\nLink: </x>"])
async def test_interim(bench: Bench, interim: bytes) -> None:
    """Interim answers of the upstream are dropped, and never taken for the final one."""
    data = b"HTTP/1.1 " + interim + BLANK
    answer = await bench.ask(get(), data + data + answered(body=b"final"))
    assert (200, b"final", []) == (answer.status, answer.body, answer.interim)
    assert None is answer.value(b"Link")


@rule("9110 15.2")
async def test_interim_apart(bench: Bench) -> None:
    """An interim answer that comes long before the final one is no trouble, in pieces either."""

    async def play(peer: Peer) -> None:
        await peer.send(
            b"HTTP/1.1 100 Con",
            b"tinue\r\n\r",
            b"\nHTTP/1.1 2",
            b"00 OK\r\nContent-Length: 2\r\n\r\no",
            b"k",
            pause=0.01,
        )

    bench.upstream.plays(play)
    client = await bench.client()
    await client.send(get())
    assert (200, b"ok") == ((answer := await client.answer()).status, answer.body)


@rule("9110 15.2.2")
async def test_101(bench: Bench) -> None:
    """A switch of protocols that nobody asked for is no answer."""
    answer = await bench.ask(
        get(), b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: foo\r\nConnection: Upgrade\r\n\r\nfoo"
    )
    assert (502, "upstream-protocol") == (answer.status, answer.slug)


@rule("9112 6.2")
@pytest.mark.parametrize("size", [0, 1, 100_000, 5_000_000])
async def test_length_kept(bench: Bench, size: int) -> None:
    """A length stays a length, for any size."""
    body = os.urandom(size)
    answer = await bench.ask(get(), answered(body=body))
    assert ("length", size) == (answer.framing, len(answer.body))
    assert body == answer.body


@rule("9112 7.1")
@pytest.mark.parametrize("sizes", [(), (1,), (5, 6, 7), (300_000, 1)])
async def test_chunked_to_1_1(bench: Bench, sizes: tuple[int, ...]) -> None:
    """An answer without a length is chunked to HTTP/1.1, and the connection goes on."""
    pieces = [os.urandom(size) for size in sizes]
    bench.upstream.plays(chunks(*pieces), ending(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(pieces)))
    client = await bench.client()
    for _ in range(2):
        await client.send(get())
        answer = await client.answer()
        assert ("chunked", b"".join(pieces)) == (answer.framing, answer.body)


@rule("9112 6.1")
@pytest.mark.parametrize("connection", ["close", "keep-alive"])
async def test_close_delimited_to_1_0(bench: Bench, connection: str) -> None:
    """An answer without a length lasts until the connection closes for HTTP/1.0, which knows no chunks."""
    client = await bench.client()
    bench.upstream.plays(chunks(b"abc", b"def"))
    await client.send(head("GET /x HTTP/1.0", f"Connection: {connection}"))
    answer = await client.answer()
    assert ("close", b"abcdef") == (answer.framing, answer.body)


@rule("9112 7.1.2")
async def test_trailers_dropped(bench: Bench) -> None:
    """Trailer fields and chunk extensions are dropped."""
    answer = await bench.ask(
        get(), chunks(end=b'3;a="b"\r\nabc\r\n0\r\nX-Sum: 1\r\nSet-Cookie: a\r\n\r\n', fields="Trailer: X-Sum\r\n")
    )
    assert b"abc" == answer.body
    assert {b"Transfer-Encoding"} == set(answer.names) - ADDED


@rule("HTML 9.2")
async def test_events_at_once(bench: Bench) -> None:
    """Each server-sent event arrives before the next was sent, the head before the first."""
    for version in ("1.1", "1.0"):
        client = await bench.client()
        await client.send(head(f"GET /events HTTP/{version}"))
        peer = await bench.upstream.peer()
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"200 OK" in await client.until(BLANK)
        for number in range(3):
            event = b"data: %d\n\n" % number
            await peer.send(b"%x\r\n%b\r\n" % (len(event), event))
            assert (
                event
                == (await client.exactly(len(event) + 5 if version == "1.1" else len(event)))
                .removeprefix(b"9\r\n")
                .strip()
                + b"\n\n"
            )
        client.close()
        await peer.gone()


@rule("9110 7.6.1")
async def test_hop_by_hop(bench: Bench) -> None:
    """Connection, what it names, Keep-Alive, Proxy-*, TE, Trailer and Upgrade end at the proxy."""
    fields = [
        "Connection: keep-alive, X-Drop",
        "Keep-Alive: timeout=5",
        "x-drop: 1",
        "Proxy-Authenticate: Basic",
        "Proxy-Connection: close",
        "Proxy-Authentication-Info: x",
        "TE: x",
        "Trailer: X-Sum",
        "Upgrade: h2",
        "connection: x-drop-too",
        "X-Drop-Too: 2",
        "X-Stays: 3",
    ]
    answer = await bench.ask(get(), answered(*fields))
    assert {b"X-Stays", b"Content-Length"} == set(answer.names) - ADDED


@rule("9110 7.6.1")
async def test_connection_cannot_unframe(bench: Bench) -> None:
    """Connection can't take the length away."""
    answer = await bench.ask(get(), answered("Connection: content-length", body=b"abc"))
    assert ("length", b"abc") == (answer.framing, answer.body)


@rule("9112 9.3")
async def test_upstream_close_is_its_own(bench: Bench) -> None:
    """The upstream's Connection: close closes the upstream's connection, not the client's."""
    client = await bench.client()
    bench.upstream.plays(ending(answered("Connection: close", body=b"a")))
    for _ in range(2):
        await client.send(get())
        answer = await client.answer()
        assert (b"a", None) == (answer.body, answer.value(b"Connection"))


@rule("9112 9.3")
async def test_upstream_http_1_0(bench: Bench) -> None:
    """An answer in HTTP/1.0 is passed on in HTTP/1.1, and its connection is not used again."""
    bench.upstream.plays(ending(b"HTTP/1.0 200 OK\r\n\r\nold"))
    client = await bench.client()
    for _ in range(2):
        await client.send(get())
        answer = await client.answer()
        assert (b"HTTP/1.1 200 OK", "chunked", b"old") == (answer.line, answer.framing, answer.body)
    assert 2 == len(bench.upstream.peers)


@rule("contract 3")
async def test_redirects_not_followed(bench: Bench) -> None:
    """A redirect is the client's to follow."""
    answer = await bench.ask(get(), answered("Location: /elsewhere", status="302 Found"))
    assert (302, b"/elsewhere") == (answer.status, answer.value(b"Location"))
    assert 1 == len(bench.upstream.requests)


@rule("9110 10.2.2")
@pytest.mark.parametrize(
    "spelling", ["http://{0}/api/v1/x?a=%2F#b", "HTTP://{0}/api/v1/x?a=%2F#b", "//{0}/api/v1/x?a=%2F#b"]
)
async def test_location_rewritten(bench: Bench, spelling: str) -> None:
    """A Location under the upstream's base gets the scheme and host that the client used, in all its spellings."""
    location = spelling.format(bench.upstream.url.split("/")[2])
    answer = await bench.ask(get(host=bench.authority), answered(f"location: {location}", status="201 Created"))
    assert [(b"location", b"http://" + bench.authority + b"/api/v1/x?a=%2F#b")] == answer.fields[:1]


@rule("9110 10.2.2")
@pytest.mark.parametrize(
    "location", ["https://elsewhere.example/api/v1/x", "/api/v1/x", "x", "http://{0}/other", "http://{0}x/api/v1/y", ""]
)
async def test_location_untouched(bench: Bench, location: str) -> None:
    """Any other Location is untouched."""
    location = location.format(bench.upstream.url.split("/")[2])
    answer = await bench.ask(get(host=bench.authority), answered(f"Location: {location}", status="302 Found"))
    assert location.encode() == answer.value(b"Location")


@rule("contract 3")
async def test_location_for_absolute_form(bench: Bench) -> None:
    """A client that uses us as its HTTP proxy gets the upstream's own Location."""
    upstream = bench.upstream.url.split("/")[2]
    location = f"http://{upstream}/api/v1/y".encode()
    answer = await bench.ask(
        get(f"http://{upstream}/api/v1/x", host=upstream.encode()),
        answered(b"Location: " + location, status="302 Found"),
    )
    assert location == answer.value(b"Location")


@rule("contract 3")
async def test_back_pressure_down(bench: Bench) -> None:
    """A client that does not read slows the upstream down instead of filling the proxy's memory."""
    client = await bench.client(limit=1024)
    await client.send(get())
    client.pause()
    peer = await bench.upstream.peer()
    await peer.request()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 200000000" + BLANK
    assert await peer.pour_until_held_up(answer, bytes(1 << 18)) < 40_000_000
    await bench.healthy()


@rule("contract 3")
async def test_slow_reader_gets_all(bench: Bench) -> None:
    """A client that reads with pauses gets every byte."""
    body = os.urandom(8_000_000)
    bench.upstream.plays(answered(body=body))
    client = await bench.client(limit=4096)
    await client.send(get())
    await asyncio.sleep(0.1)
    assert body == (await client.answer()).body


@rule("contract 3")
async def test_early_answer(bench: Bench) -> None:
    """An answer that comes before the body was sent is passed on at once; then the connection closes."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Content-Length: 1000000"), b"abc", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    await peer.send(answered(status="403 Forbidden", body=b"no"))
    answer = await client.answer()
    assert (403, b"no", b"close") == (answer.status, answer.body, answer.value(b"Connection"))
    await client.ended()


@rule("9112 9.6")
async def test_early_answer_reaches_a_busy_client(bench: Bench) -> None:
    """A client that is still sending its body can read the early answer: the connection is not reset under it."""

    async def play(peer: Peer) -> None:
        await peer.send(answered(status="403 Forbidden", body=b"no"))

    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Content-Length: 100000000"))
    peer = await bench.upstream.peer()
    await peer.begun()
    await play(peer)
    for _ in range(40):
        client.writer.write(bytes(200_000))
        await asyncio.sleep(0)
    answer = await client.answer()
    assert (403, b"no") == (answer.status, answer.body)


@rule("9112 9.6")
async def test_refusal_reaches_a_busy_client(bench: Bench) -> None:
    """A client that is still sending its body can read a refusal."""
    client = await bench.client()
    await client.send(head("POST /../x HTTP/1.1", "Content-Length: 100000000"))
    for _ in range(40):
        client.writer.write(bytes(200_000))
        await asyncio.sleep(0)
    assert 400 == (await client.answer()).status


@rule("contract 3")
async def test_answer_while_the_upload_runs(bench: Bench) -> None:
    """Both bodies stream at the same time."""
    client = await bench.client()
    await client.send(head("POST /x HTTP/1.1", "Transfer-Encoding: chunked"), b"1\r\na\r\n", pause=0.01)
    peer = await bench.upstream.peer()
    await peer.begun()
    assert b"1\r\na\r\n" == await peer.exactly(6)
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nx")
    assert b"x" == (await client.until(BLANK) and await client.exactly(1))
    await client.send(b"1\r\nb\r\n")
    assert b"1\r\nb\r\n" == await peer.exactly(6)
    await peer.send(b"y")
    assert b"y" == await client.exactly(1)
    await client.send(b"0\r\n\r\n")
    assert b"0\r\n\r\n" == await peer.exactly(5)
    await peer.send(b"z")
    assert b"z" == await client.exactly(1)


@rule("9110 6.6.1")
async def test_request_id(bench: Bench) -> None:
    """X-Request-Id is added, another for each request, unless the upstream sent one."""
    ids = [(await bench.ask(get())).value(b"X-Request-Id") for _ in range(2)]
    assert 2 == len(set(ids) - {None})


@rule("9112 2.1")
async def test_any_segments(bench: Bench) -> None:
    """An answer means the same however it is cut into segments."""
    messages: list[Message] = []
    for whole in (answered("X: y", body=b"a\r\n\r\nb"), chunks(b"a\r\n\r\n", b"b", end=b"0\r\nX: y\r\n\r\n")):
        for size in (1, 3, 8):

            async def play(peer: Peer, size: int = size, whole: bytes = whole) -> None:
                await peer.send(*[whole[index : index + size] for index in range(0, len(whole), size)], pause=0)

            bench.upstream.plays(play)
            client = await bench.client()
            await client.send(get())
            messages.append(await client.answer())
    assert {b"a\r\n\r\nb"} == {message.body for message in messages}


@rule("contract 8")
async def test_own_answers_to_head(bench: Bench) -> None:
    """The proxy's own answers to HEAD have no body either."""
    for target, status in (("/-/live", 200), ("/-/none", 404)):
        assert status == (await bench.ask(head(f"HEAD {target} HTTP/1.1"), method="HEAD")).status


@rule("9110 9.3.4")
@pytest.mark.parametrize("request_", [get(), post(b"abc"), chunked(b"abc"), post(b"abc", method="PUT")])
async def test_error_statuses_pass(bench: Bench, request_: bytes) -> None:
    """An error of the upstream is the upstream's: no slug, and the connection goes on."""
    client = await bench.client()
    bench.upstream.plays(answered(status="422 Unprocessable Entity", body=b'{"code": 422}'))
    for _ in range(2):
        await client.send(request_)
        answer = await client.answer()
        assert (422, b'{"code": 422}', None) == (answer.status, answer.body, answer.slug)


@rule("8259 8.1")
async def test_json_for_powershell_5(bench: Bench) -> None:
    """It alone would take JSON for Latin-1, so that it is told the charset, whatever it was told of the same before."""
    tool, other = (f"User-Agent: Mozilla/5.0 (Windows NT; Windows NT 10.0; de-DE) {name}" for name in POWERSHELLS)
    for agent, seen in ((other, b""), (tool, b"; charset=utf-8"), (other, b""), (tool, b"; charset=utf-8")):
        answer = await bench.ask(get("/x", agent), answered("Content-Type: application/json", body=b"{}"))
        assert b"application/json" + seen == answer.value(b"Content-Type")
    answer = await bench.ask(get("/x", tool), answered("Content-Type: text/html; charset=latin-1"))
    assert b"text/html; charset=latin-1" == answer.value(b"Content-Type")


POWERSHELLS = ("WindowsPowerShell/5.1.19041.4894", "PowerShell/7.4.6")
