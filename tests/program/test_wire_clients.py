"""Real clients do their job through the proxy: Python's own, curl, wget, node and ApacheBench."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import re
import shutil
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from tests.wire import Bench, Peer, answered, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

LARGE = bytes(range(256)) * 10_000
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"
CUT_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.fixture
async def echoing() -> AsyncIterator[Bench]:
    """A bench whose upstream tells what it saw, as JSON."""
    async with running() as bench:

        async def echo(peer: Peer) -> None:
            request = bench.upstream.requests[-1]
            method, target, _ = request.line.decode().split(" ")
            seen = {"method": method, "target": target, "size": len(request.body), "framing": request.framing}
            seen |= {"same": request.body == LARGE, "names": [name.decode() for name in request.names]}
            fields = ["Content-Type: application/json", "ETag: x"]
            body = json.dumps(seen).encode()
            if "gzip" in target:
                fields.append("Content-Encoding: gzip")
                body = gzip.compress(body)
            if "404" in target:
                answer = answered(*fields, status="404 Not Found", body=body)
            else:
                answer = answered(*fields, body=body)
            await peer.send(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == "HEAD" else answer)

        bench.upstream.plays(echo)
        yield bench


def url(bench: Bench, path: str) -> str:
    """Return an address at the proxy."""
    return f"http://{bench.host}:{bench.port}{path}"


async def command(*words: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run a client; return its exit code and what it wrote."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        output, errors = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, output, errors


async def blocking(work: Callable[[], Any]) -> Any:  # noqa: ANN401 - of whatever it returns
    """Run a client that blocks in a thread."""
    async with asyncio.timeout(30):
        return await asyncio.to_thread(work)


async def test_requests(echoing: Bench) -> None:
    """The requests library: sessions, JSON, streams, compression, HEAD, errors."""
    requests = pytest.importorskip("requests", reason="requests is not installed")

    def work() -> None:
        with requests.Session() as session:
            session.trust_env = False
            for _ in range(3):
                seen = session.get(url(echoing, "/customers"), params={"first": 0, "q": "a b/ü"}, timeout=10).json()
                assert "/api/v1/customers?first=0&q=a+b%2F%C3%BC" == seen["target"]
            seen = session.post(url(echoing, "/customers"), json={"companyName": "x"}, timeout=10).json()
            assert ("POST", 20, "length") == (seen["method"], seen["size"], seen["framing"])
            seen = session.put(url(echoing, "/x"), data=iter([LARGE[:1000], LARGE[1000:]]), timeout=10).json()
            assert (True, "chunked") == (seen["same"], seen["framing"])
            assert session.post(url(echoing, "/x"), data=LARGE, timeout=10).json()["same"]
            assert session.post(url(echoing, "/x"), files={"file": LARGE}, timeout=10).json()["size"] > len(LARGE)
            assert "GET" == session.get(url(echoing, "/gzip"), timeout=10).json()["method"]
            answer = session.head(url(echoing, "/x"), timeout=10)
            assert (200, b"") == (answer.status_code, answer.content)
            assert 404 == session.delete(url(echoing, "/404"), timeout=10).status_code

    await blocking(work)
    assert 1 == len(echoing.upstream.peers)


async def test_requests_sees_broken_transfers() -> None:
    """The requests library sees a broken transfer as one."""
    requests = pytest.importorskip("requests", reason="requests is not installed")
    async with running() as bench:
        for data in (CUT, CUT_CHUNKS):

            async def cut(peer: Peer, data: bytes = data) -> None:
                await peer.send(data)
                peer.close()

            bench.upstream.plays(cut)

            def work() -> None:
                with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
                    requests.get(url(bench, "/x"), timeout=10)

            await blocking(work)


async def test_urllib(echoing: Bench) -> None:
    """urllib: HTTP/1.1 with Connection: close, a body, and the proxy used as its HTTP proxy."""
    upstream = echoing.upstream.url

    def work() -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url(echoing, "/x"), timeout=10) as answer:
            assert "/api/v1/x" == json.load(answer)["target"]
        with direct.open(url(echoing, "/x"), data=LARGE, timeout=10) as answer:
            assert json.load(answer)["same"]
        through = urllib.request.build_opener(urllib.request.ProxyHandler({"http": url(echoing, "")}))
        with through.open(upstream + "/y?z", timeout=10) as answer:
            assert "/api/v1/y?z" == json.load(answer)["target"]

    await blocking(work)


async def test_http_client(echoing: Bench) -> None:
    """http.client: one connection for many requests, chunks, Expect."""

    def work() -> None:
        connection = http.client.HTTPConnection(echoing.host, echoing.port, timeout=10)
        for method, body, fields in (
            ("GET", None, {}),
            ("POST", LARGE, {}),
            ("PUT", iter([LARGE]), {"Transfer-Encoding": "chunked"}),
            ("DELETE", None, {}),
            ("PATCH", b"x", {}),
            ("OPTIONS", None, {}),
        ):
            connection.request(method, "/x", body, fields, encode_chunked=bool(fields))
            seen = json.load(connection.getresponse())
            assert (method, (isinstance(body, bytes) and len(body) > 1) or method == "PUT") == (
                seen["method"],
                seen["same"],
            )
        connection.close()

    await blocking(work)


@pytest.mark.slow
class TestCurl:
    @pytest.mark.parametrize("version", ["-0", "--http1.1"])
    async def test_get(self, echoing: Bench, version: str) -> None:
        """Curl gets, in HTTP/1.0 and 1.1, several on one connection."""
        code, output, _ = await command("curl", "-sS", version, url(echoing, "/a"), url(echoing, "/b"))
        assert 0 == code
        assert [b"/api/v1/a", b"/api/v1/b"] == re.findall(rb'"target": "([^"]*)"', output)

    async def test_compressed(self, echoing: Bench) -> None:
        """Curl --compressed unpacks what the upstream packed."""
        code, output, _ = await command("curl", "-sS", "--compressed", url(echoing, "/gzip"))
        assert (0, "GET") == (code, json.loads(output)["method"])

    @pytest.mark.parametrize("words", [("-T", "-"), ("--data-binary", "@-"), ("-0", "--data-binary", "@-")])
    async def test_upload(self, echoing: Bench, words: tuple[str, ...]) -> None:
        """Curl uploads from its input, in chunks or with a length, and waits for the 100."""
        code, output, errors = await command("curl", "-sSv", *words, url(echoing, "/x"), stdin=LARGE)
        seen = json.loads(output)
        assert (0, True) == (code, seen["same"])
        assert ("chunked" if "-T" in words else "length") == seen["framing"]
        if "-0" not in words:
            assert b"100 Continue" in errors
        assert "Expect" not in seen["names"]

    async def test_form(self, echoing: Bench, tmp_path: Path) -> None:
        """Curl -F sends a form with a file."""
        (tmp_path / "file").write_bytes(LARGE)
        code, output, _ = await command("curl", "-sS", "-F", f"file=@{tmp_path / 'file'}", url(echoing, "/x"))
        assert 0 == code
        assert json.loads(output)["size"] > len(LARGE)

    async def test_head(self, echoing: Bench) -> None:
        """Curl -I gets the head and does not wait for a body."""
        code, output, _ = await command("curl", "-sSI", url(echoing, "/x"))
        assert 0 == code
        assert re.match(
            rb"HTTP/1\.1 200 OK\r\nContent-Type: application/json\r\nETag: x\r\nContent-Length: \d+\r\n", output
        )

    async def test_as_proxy(self, echoing: Bench) -> None:
        """Curl -x uses us as its HTTP proxy."""
        words = ["curl", "-sS", "--noproxy", "", "-x", url(echoing, ""), echoing.upstream.url + "/x?y"]
        code, output, _ = await command(*words)
        assert (0, "/api/v1/x?y") == (code, json.loads(output)["target"])

    @pytest.mark.parametrize(
        ("version", "data", "codes"),
        [("--http1.1", CUT, {18, 56}), ("--http1.1", CUT_CHUNKS, {18, 56}), ("-0", CUT_CHUNKS, {56})],
    )
    async def test_broken(self, version: str, data: bytes, codes: set[int]) -> None:
        """Curl sees a broken transfer as one."""

        async def cut(peer: Peer) -> None:
            await peer.send(data)
            await asyncio.sleep(0.02)
            peer.close()

        async with running() as bench:
            bench.upstream.plays(cut)
            code, _, _ = await command("curl", "-sS", version, url(bench, "/x"))
            assert code in codes

    async def test_upgrade(self, echoing: Bench) -> None:
        """Curl --http2 offers h2c and goes on in HTTP/1.1."""
        code, output, _ = await command("curl", "-sS", "--http2", url(echoing, "/x"), url(echoing, "/y"))
        assert 0 == code
        assert 2 == output.count(b'"GET"')


@pytest.mark.slow
async def test_wget(echoing: Bench) -> None:
    """Wget gets and posts."""
    words = ["wget", "-q", "--no-proxy", "-O", "-", "--tries=1"]
    code, output, _ = await command(*words, url(echoing, "/a"), url(echoing, "/b"))
    assert (0, 2) == (code, output.count(b'"GET"'))
    code, output, _ = await command(*words, "--post-data=abc", url(echoing, "/x"))
    assert (0, ("POST", 3)) == (code, (json.loads(output)["method"], json.loads(output)["size"]))


@pytest.mark.slow
async def test_wget_sees_broken_transfers() -> None:
    """Wget sees a broken transfer as one."""

    async def cut(peer: Peer) -> None:
        await peer.send(CUT)
        peer.close()

    async with running() as bench:
        bench.upstream.plays(cut)
        code, _, _ = await command("wget", "-q", "--no-proxy", "-O", "-", "--tries=1", url(bench, "/x"))
        assert 0 != code


@pytest.mark.slow
async def test_node(echoing: Bench) -> None:
    """Node's fetch gets and posts, a stream too, on kept connections."""
    script = """
const base = process.argv[1];
const large = Buffer.alloc(2560000, Buffer.from([...Array(256).keys()]));
const seen = [];
for (let i = 0; i < 5; i++) seen.push(await (await fetch(base + '/a')).json());
seen.push(await (await fetch(base + '/b', {method: 'POST', body: large})).json());
const stream = new Blob([large]).stream();
seen.push(await (await fetch(base + '/c', {method: 'PUT', body: stream, duplex: 'half'})).json());
seen.push(await (await fetch(base + '/gzip')).json());
console.log(JSON.stringify(seen));
"""
    code, output, errors = await command("node", "--input-type=module", "-e", script, url(echoing, ""))
    assert 0 == code, errors
    seen = json.loads(output)
    assert ["GET"] * 5 + ["POST", "PUT", "GET"] == [each["method"] for each in seen]
    assert [True, True] == [each["same"] for each in seen[5:7]]
    assert "chunked" == seen[6]["framing"]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [[], ["-k"]])
async def test_apache_bench(echoing: Bench, keep: list[str]) -> None:
    """ApacheBench, which speaks HTTP/1.0, with kept connections and without."""
    code, output, _ = await command("ab", *keep, "-n", "200", "-c", "4", url(echoing, "/x"))
    text = output.decode()
    assert 0 == code
    assert re.search(r"Complete requests: +200\n", text)
    assert re.search(r"Failed requests: +0\n", text)
    assert "Non-2xx" not in text
    kept = re.search(r"Keep-Alive requests: +(\d+)\n", text)
    assert (200 if keep else None) == (kept and int(kept[1]))
