"""Whatever the process writes or answers, at debug level and under errors, holds no token, key or placeholder."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from metquay_proxy.sandbox.server import Faults, Sandbox
from tests.running import process, simulated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ACCESS_KEY = "an-access-key-of-the-laboratory"
SECRET_KEY = "the-secret-key-of-the-lab-Zq7w"  # noqa: S105 - what the test looks for
CLIENT_KEY = "workbook-key-0123456-Yv8k"
READING_KEY = "reading-key-01234567-Jx4h"
PASSWORDS = ("proxy-password-Hk3x", "redis-password-Wm2j")


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """Run a Metquay with keys of its own."""
    async with simulated(access_key=ACCESS_KEY, secret_key=SECRET_KEY) as made:
        yield made


@pytest.mark.slow
async def test_nothing_secret_is_written(tmp_path: Path, sandbox: Sandbox) -> None:
    """Logs at debug level, errors, own pages and the process list hold no secret, in good times and in bad ones."""
    environment = {
        "METQUAY_HOST": sandbox.url,
        "METQUAY_ACCESS_KEY": ACCESS_KEY,
        "METQUAY_SECRET_KEY": SECRET_KEY,
        "METQUAY_CLIENT_KEYS": f"workbook:{CLIENT_KEY},reading:{READING_KEY}:read-only",
        "METQUAY_OUTBOUND_PROXY": f"http://user:{PASSWORDS[0]}@127.0.0.1:9",
        "METQUAY_REDIS_PASSWORD_FILE": str(tmp_path / "redis"),
        "METQUAY_LISTEN": "127.0.0.1:0",
        "METQUAY_LOG_LEVEL": "debug",
        "METQUAY_LOG_FORMAT": "json",
        "METQUAY_MAX_WAIT": "1",
    }
    (tmp_path / "redis").write_text(PASSWORDS[1])
    (tmp_path / "redis").chmod(0o600)
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
                (200, "GET", "/-/", key),
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
            for words in (["settings"], ["settings", "--json"], ["check"], ["check", "--json"]):
                ended = await asyncio.to_thread(run, tmp_path, *words, **environment)
                assert 0 == ended.returncode, ended.stdout
                seen.extend([ended.stdout, ended.stderr])
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
    for secret in (ACCESS_KEY, SECRET_KEY, CLIENT_KEY, READING_KEY, *PASSWORDS, placeholder, *tokens):
        assert secret not in written
    assert ACCESS_KEY[-4:] in written
    for secret in (SECRET_KEY, CLIENT_KEY, READING_KEY, *PASSWORDS):
        assert secret[-4:] not in written


async def test_what_looks_wrong_about_refused_keys_is_told_everywhere(tmp_path: Path, sandbox: Sandbox) -> None:
    """At the start, in the log, in the answer to a tool and on the page, and never shows the key."""
    file = tmp_path / "secret"
    file.write_text(f"METQUAY_SECRET_KEY='{SECRET_KEY}'\n")
    file.chmod(0o600)
    environment = {"METQUAY_HOST": sandbox.url, "METQUAY_ACCESS_KEY": ACCESS_KEY, "METQUAY_LISTEN": "127.0.0.1:0"}
    doubt = (
        "METQUAY_SECRET_KEY contains a name, as in NAME=value: only the value belongs there; it has quotation marks, "
        "which are sent as a part of it: remove them (docker --env-file keeps them)"
    )
    seen = []
    with process(tmp_path, METQUAY_SECRET_KEY_FILE=str(file), **environment) as command:
        async with aiohttp.ClientSession(command.url) as session:
            async with session.get("/customers") as answer:
                assert 503 == answer.status
                seen.append((await answer.json())["message"])
            async with session.get("/-/status") as answer:
                seen.append((await answer.json())["token"]["last_error"])
            async with session.get("/-/events") as answer:
                seen.append((await answer.content.readline()).decode() + (await answer.content.readline()).decode())
        await asyncio.to_thread(command.stop)
    for text in seen:
        assert f"refused the key pair (status 400). {doubt}." in text
    warning, *lines = [line for line in command.output.splitlines() if "METQUAY_SECRET_KEY" in line]
    assert doubt in warning
    assert any(doubt in line for line in lines)
    assert SECRET_KEY not in command.output


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the program with only these METQUAY_ variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("METQUAY_")}
    return subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "metquay_proxy", *words],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def _body(path: str) -> bytes | None:
    if path == "/authenticate":
        return json.dumps({"accessKey": "any", "secretKey": CLIENT_KEY}).encode()
    return b'{"companyName": ""}' if path == "/customers" else None
