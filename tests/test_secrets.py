"""Whatever the process writes or answers, at debug level and under errors, holds no token, key or placeholder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from metquay_proxy.sandbox import Faults, Sandbox
from tests.running import process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ACCESS_KEY = "an-access-key-of-the-laboratory"
SECRET_KEY = "the-secret-key-of-the-laboratory"  # noqa: S105 - what the test looks for
CLIENT_KEY = "workbook-key-0123456789"
READING_KEY = "reading-key-0123456789"


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """Run a Metquay with keys of its own."""
    sandbox = Sandbox(rate_limit=None, access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    await sandbox.start()
    yield sandbox
    await sandbox.stop()


async def test_nothing_secret_is_written(tmp_path: Path, sandbox: Sandbox) -> None:
    """Logs at debug level, errors, own pages and the process list hold no secret, in good times and in bad ones."""
    environment = {
        "METQUAY_HOST": sandbox.url,
        "METQUAY_ACCESS_KEY": ACCESS_KEY,
        "METQUAY_SECRET_KEY": SECRET_KEY,
        "METQUAY_CLIENT_KEYS": f"workbook:{CLIENT_KEY},reading:{READING_KEY}:read-only",
        "METQUAY_LISTEN": "127.0.0.1:0",
        "METQUAY_LOG_LEVEL": "debug",
        "METQUAY_LOG_FORMAT": "json",
        "METQUAY_MAX_WAIT": "1",
    }
    tokens: set[str] = set()
    with process(tmp_path, **environment) as command:
        arguments = Path(f"/proc/{command.popen.pid}/cmdline")
        seen = [arguments.read_bytes().decode()] if arguments.exists() else []
        async with aiohttp.ClientSession() as session:

            async def ask(method: str, path: str, **headers: str) -> tuple[int, str]:
                async with session.request(method, command.url + path, headers=headers, data=_body(path)) as response:
                    text = await response.text()
                    tokens.update(sandbox._tokens)
                    if not path.endswith("/authenticate"):
                        seen.extend([text, str(response.headers)])
                    return response.status, text

            key = {"X-Proxy-Key": CLIENT_KEY}
            status, login = await ask("POST", "/authenticate")
            assert 200 == status
            placeholder = json.loads(login)["accessToken"]
            bearer = {"Authorization": f"Bearer {placeholder}"}
            expected = [
                (200, "GET", f"/customers?limit=1&secret={SECRET_KEY}", key),
                (200, "GET", "/customers?limit=1", bearer),
                (200, "GET", "/-/status", key),
                (404, "GET", "/-/nothing", key),
                (404, "GET", "/nothing", key),
                (400, "GET", f"/..%2f{SECRET_KEY}", key),
                (403, "GET", "/customers", {"X-Proxy-Key": "wrong" + CLIENT_KEY}),
                (403, "GET", "/customers", {"Authorization": f"Bearer {placeholder}x"}),
                (403, "POST", "/customers", {"X-Proxy-Key": READING_KEY}),
                (401, "GET", "/-/", {}),
                (422, "POST", "/customers", key),
            ]
            for wanted, method, path, headers in expected:
                assert wanted == (await ask(method, path, **headers))[0], path
            sandbox.faults = Faults(expire_tokens=True)
            assert 200 == (await ask("GET", "/customers", **key))[0]
            sandbox.faults = Faults(expire_tokens=True, login_outage=True)
            assert 503 == (await ask("GET", "/customers", **key))[0]
            sandbox._keys = ("other", "keys")
            sandbox.faults = Faults()
            await asyncio.sleep(2)
            assert 503 == (await ask("GET", "/customers", **key))[0]
            await sandbox.stop()
            assert 502 == (await ask("GET", "/customers", **key))[0]
        assert 0 == await asyncio.to_thread(command.stop)
    assert 2 <= len(tokens)
    written = "\n".join([*seen, command.output])
    assert '"request"' in command.output
    for secret in (ACCESS_KEY, SECRET_KEY, CLIENT_KEY, READING_KEY, placeholder, *tokens):
        assert secret not in written


def _body(path: str) -> bytes | None:
    if path == "/authenticate":
        return json.dumps({"accessKey": "any", "secretKey": CLIENT_KEY}).encode()
    return b'{"companyName": ""}' if path == "/customers" else None
