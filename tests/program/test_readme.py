"""The README can't rot: each of its blocks is run as it stands, or replayed where nothing here speaks its language.

Commands keep the README's own port: curl is told by its .curlrc where that is now. A block of a new kind fails until
this file knows what to do with it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY
from metquay_proxy.settings import VARIABLES, default_text, load, variable
from tests.running import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HERE = "http://localhost:6387"
"""Where the README has the proxy."""
SERVERS = {"serve", "sandbox"}
"""The commands that run until they are told to stop."""
CI = ("metquay-proxy serve --sandbox", "python -m pytest")
"""The ends of the two commands that .ci/run runs, each in a fresh clone."""

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source archive holds only a part of the repository"),
]


class Block(NamedTuple):
    """A fenced block: the line of the README where it begins, the word after the fence, and the text."""

    line: int
    language: str
    text: str


BLOCKS = [
    Block(README.count("\n", 0, match.start()) + 1, match[1], match[2])
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


class Running(NamedTuple):
    """A proxy under way in front of a simulator."""

    url: str
    environment: dict[str, str]
    """What a command needs to know of both, and no other METQUAY_ variable."""

    def get(self, url: str, *, method: str = "GET", body: str | None = None, **headers: str) -> bytes:
        """Send a request that the README has, to where the proxy is; raise ``HTTPError`` from 400 on."""
        request = urllib.request.Request(  # noqa: S310 - our own URL
            url.replace(HERE, self.url), method=method, data=body and body.encode(), headers=headers
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.read()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Run a proxy in front of a simulator."""
    folders = [tmp_path_factory.mktemp(name) for name in ("simulator", "proxy")]
    with process(folders[0], "sandbox", "--listen", "127.0.0.1:0", "--rate-limit", "off") as simulator:
        account = {
            "METQUAY_HOST": simulator.url,
            "METQUAY_ACCESS_KEY": ACCESS_KEY,
            "METQUAY_SECRET_KEY": SECRET_KEY,
        }
        with process(folders[1], "serve", "--listen", "localhost:0", "--rate-limit", "off", **account) as running:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("METQUAY_")}
            environment |= account | {"METQUAY_LISTEN": running.url.removeprefix("http://")}
            yield Running(running.url, environment)


# What is done with a block, by its kind.


def by_ci(block: Block, proxy: Running, folder: Path) -> None:
    """.ci/run finds it by its end, and runs it."""
    del proxy, folder
    assert 1 == len(block.text.splitlines())
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert 1 == sum(f"readme_command '{end}'" in script for end in CI if block.text.endswith(f"{end}\n"))


def shell(block: Block, proxy: Running, folder: Path) -> None:
    """Run as it stands; a status from 400 on counts as a failure of curl."""
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    port = proxy.url.rpartition(":")[2]
    (folder / ".curlrc").write_text(
        f'connect-to = "localhost:6387:localhost:{port}"\nnoproxy = "*"\nfail-with-body\nsilent\nshow-error\n',
        encoding="utf-8",
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), proxy.environment["PATH"]])
    run = subprocess.run(  # noqa: S603 - our own README
        ["bash", "-euo", "pipefail", "-c", block.text],  # noqa: S607 - whichever bash the machine has
        env=proxy.environment | {"CURL_HOME": str(folder), "PATH": path},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert 0 == run.returncode, run.stdout
    if block.text.startswith("curl"):
        json.loads(run.stdout)


def docker(block: Block, proxy: Running, folder: Path) -> None:
    """.ci/image builds and runs the image; what these commands add to it is tried with the program itself."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    image = dict(re.findall(r"(METQUAY_\w+)=(\S+)", dockerfile))
    port = re.findall(r"^EXPOSE (\d+)$", dockerfile, re.MULTILINE)
    build, run = (shlex.split(line) for line in block.text.splitlines())
    assert ["docker", "build", "-t", run[-1], "."] == build
    assert ["docker", "run", "--rm"] == run[:3]
    options = list(zip(run[3:-1:2], run[4:-1:2], strict=True))
    assert {"-p", "-e", "--env-file"} == {name for name, _ in options}
    (published,) = (value for name, value in options if name == "-p")
    assert [f"127.0.0.1:6387:{port[0]}"] == [published]
    assert image["METQUAY_LISTEN"] == f"0.0.0.0:{port[0]}"
    assert [".env"] == [value for name, value in options if name == "--env-file"]
    given = dict(value.split("=") for name, value in options if name == "-e")
    account = {name: value for name, value in proxy.environment.items() if name.startswith("METQUAY_")}
    with process(folder, "serve", **account | image | given | {"METQUAY_LISTEN": "0.0.0.0:0"}) as contained:
        address = f"http://127.0.0.1:{contained.url.rpartition(':')[2]}/customers?limit=2"
        assert 2 == len(json.loads(proxy.get(address, **{"X-Proxy-Key": given["METQUAY_CLIENT_KEY"]})))
        with pytest.raises(urllib.error.HTTPError, match="403"):
            proxy.get(address)


def settings(block: Block, proxy: Running, folder: Path) -> None:
    """A .env file that the program takes."""
    (folder / ".env").write_text(block.text, encoding="utf-8")
    clean = {name: value for name, value in proxy.environment.items() if not name.startswith("METQUAY_")}
    words = [sys.executable, "-m", "metquay_proxy", "settings", "--json"]
    run = subprocess.run(words, env=clean, cwd=folder, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - our own words
    told = [line for line in run.stderr.splitlines() if not line.endswith("is a placeholder: put the key in its place")]
    assert (0, []) == (run.returncode, told)
    found = {name for name, setting in json.loads(run.stdout).items() if setting["source"] == ".env"}
    assert {line.partition("=")[0] for line in block.text.splitlines()} == found


def python(block: Block, proxy: Running, folder: Path) -> None:
    """Run as it stands, with the port of the day; ``client`` is the SDK's object, of which one attribute is set."""
    del folder
    if "import requests" in block.text:
        pytest.importorskip("requests", reason="requests is not installed")
    configuration = SimpleNamespace(host="")
    names = {"client": SimpleNamespace(_configuration=configuration)}
    exec(compile(block.text.replace(HERE, proxy.url), f"README.md:{block.line}", "exec"), names)  # noqa: S102 - our own text
    if configuration.host:
        assert json.loads(proxy.get(f"{configuration.host}/customers?limit=1"))
    for answer in (value for name, value in names.items() if name not in {"client", "__builtins__"}):
        assert answer
        assert not (isinstance(answer, dict) and "code" in answer), answer


def powershell(block: Block, proxy: Running, folder: Path) -> None:
    """Replay each Invoke-RestMethod."""
    del folder
    for line in block.text.splitlines():
        call = re.fullmatch(
            r"Invoke-RestMethod '([^']+)'(?: -Method (\w+) -ContentType '([^']+)' -Body '([^']+)')?", line
        )
        assert call, line
        headers = {"Content-Type": call[3]} if call[3] else {}
        assert json.loads(proxy.get(call[1], method=(call[2] or "Get").upper(), body=call[4], **headers))


def visual_basic(block: Block, proxy: Running, folder: Path) -> None:
    """Replay each request that is opened."""
    del folder
    calls = re.findall(r'\.Open "(GET)", "([^"]+)", False', block.text)
    assert calls
    for method, url in calls:
        assert json.loads(proxy.get(url, method=method))


def power_query(block: Block, proxy: Running, folder: Path) -> None:
    """Replay its pages: from 0 until one is empty, as the expression goes."""
    del folder
    call = re.search(
        r'Web\.Contents\("([^"]+)",\s*\[RelativePath = "([^"]+)", Query = \[first = [^,]+, limit = "(\d+)"\]\]\)',
        block.text,
    )
    assert call
    size, first, pages = int(call[3]), 0, []
    while not pages or pages[-1]:
        query = urllib.parse.urlencode({"first": first, "limit": size})
        pages.append(json.loads(proxy.get(f"{call[1]}/{call[2]}?{query}")))
        first += size
    assert len(pages) > 1


def kind(block: Block) -> Callable[[Block, Running, Path], None]:
    """Choose what is done with a block; raise ``LookupError`` for one that nothing is known of."""
    if block.language == "sh" and block.text.rstrip().endswith(CI):
        return by_ci
    if block.language == "sh":
        return docker if block.text.startswith("docker build") else shell
    if block.language == "" and "Web.Contents" in block.text:
        return power_query
    if block.language == "" and re.fullmatch(r"(METQUAY_\w+=.*\n)+", block.text):
        return settings
    return {"powershell": powershell, "vb": visual_basic, "python": python}[block.language]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line-{block.line}-{block.language}")
def test_a_block_works(block: Block, proxy: Running, tmp_path: Path) -> None:
    """What a reader copies out of the README does what it should."""
    kind(block)(block, proxy, tmp_path)


BROKEN = {
    shell: ("customer", "customr"),
    docker: ("127.0.0.1:", ""),
    settings: ("METQUAY_HOST", "METQUAY_HOTS"),
    python: (HERE, f"{HERE}/nowhere"),
    powershell: ("-Body", "-Boby"),
    visual_basic: ("customers", "customrs"),
    power_query: ("customers", "customrs"),
}
"""What makes a block of each kind wrong."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if kind(block) in BROKEN], ids=lambda block: f"{block.line}"
)
def test_a_broken_block_is_noticed(block: Block, proxy: Running, tmp_path: Path) -> None:
    """The same block with a mistake in it fails: that it works means something."""
    attempt = kind(block)
    right, wrong = BROKEN[attempt]
    assert right in block.text
    with pytest.raises((AssertionError, urllib.error.HTTPError, ValueError)):
        attempt(block._replace(text=block.text.replace(right, wrong)), proxy, tmp_path)


def test_a_block_of_an_unknown_kind_is_noticed() -> None:
    """A block that nothing here can try does not slip through."""
    assert {by_ci, *BROKEN} == {kind(block) for block in BLOCKS}
    with pytest.raises(LookupError):
        kind(Block(1, "ruby", "puts 1\n"))
    assert README.count("\n```") == 2 * len(BLOCKS), "a fence that no block was made of"


COMMANDS = sorted(set(re.findall(r"`(metquay-proxy(?: [^`]+)?)`", PROSE)))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_text_works(command: str, proxy: Running, tmp_path: Path) -> None:
    """A command that is named in a sentence exists: it ends with 0, or serves until SIGTERM and then does."""
    words = [sys.executable, "-m", "metquay_proxy", *shlex.split(command)[1:]]
    serves = len(words) == 3 or words[3] in SERVERS
    popen = subprocess.Popen(  # noqa: S603 - our own words
        [*words, *(("--listen", "localhost:0") if serves else ())],
        env=proxy.environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert popen.stdout is not None
        printed = popen.stdout.readline()
        if serves:
            while not re.search(r"listens on|\"started\"", printed):
                printed = popen.stdout.readline()
                assert printed
            popen.send_signal(signal.SIGTERM)
        printed += popen.stdout.read()
        assert 0 == popen.wait(30), printed
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


def test_a_url_in_the_text_answers(proxy: Running) -> None:
    """An address that is named in a sentence is there."""
    urls = set(re.findall(rf"`({HERE}/[^`]+)`", PROSE))
    assert urls
    for url in urls:
        assert proxy.get(url)


def test_the_table_of_settings_is_the_program_s() -> None:
    """Each setting has its row, with the default that the program has, and no row is of another."""
    rows = re.findall(r"^\| (`METQUAY_.*?) \| (.*?) \|", README, re.MULTILINE)
    documented: dict[str, str] = {}
    for names, defaults in rows:
        variables = re.findall(r"`(METQUAY_\w+)`", names)
        values = re.findall(r"`([^`]+)`", defaults) or [""]
        documented |= dict(zip(variables, values * len(variables) if len(values) == 1 else values, strict=True))
    assert {variable(name): default_text(name) or "" for name in VARIABLES if not name.endswith("_file")} == documented


def test_the_default_port_is_the_one_in_the_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who starts the proxy without a word about it finds it where the README has it."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("METQUAY_"):
            monkeypatch.delenv(name)
    assert f"{load(sandbox=True).listen[0]}" == HERE.removeprefix("http://")
