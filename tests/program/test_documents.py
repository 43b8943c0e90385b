"""README and docs/ can't rot: each block is run as it stands, or replayed where nothing here speaks its language.

Commands keep the documents' own ports: curl is told by its .curlrc where these are now. A block of a new kind fails
until this file knows what to do with it.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import date
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from metquay_proxy import __version__
from metquay_proxy.rules.errors import STATUS
from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY
from metquay_proxy.settings import VARIABLES, load, variable
from tests import documents
from tests.running import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests/RULES.md"))
}
READ = {name: text for name, text in DOCUMENTS.items() if name == "README.md" or name.startswith("docs/")}
"""Those that users read."""
README = DOCUMENTS["README.md"]
MAIN = "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/metquay-proxy serve --sandbox"
HERE, SIMULATOR = "http://localhost:6387", "http://localhost:6388"
"""Where the documents have the proxy, and a simulator alone."""
SERVERS = {"serve", "sandbox"}
"""The commands that run until they are told to stop."""
CI = ("metquay-proxy serve --sandbox", "python -m pytest")
"""The ends of the two commands that .ci/run runs, each in a fresh clone."""

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source archive holds only a part of the repository"),
]


class Block(NamedTuple):
    """A fenced block: the document and the line where it begins, the word after the fence, and the text."""

    document: str
    line: int
    language: str
    text: str


BLOCKS = [
    Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2])
    for name, text in READ.items()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
PROSE = "".join(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL) for text in READ.values())


class Running(NamedTuple):
    """A proxy under way in front of a simulator."""

    url: str
    simulator: str
    environment: dict[str, str]
    """What a command needs to know of both, and no other METQUAY_ variable."""

    def get(self, url: str, *, method: str = "GET", body: str | None = None, **headers: str) -> bytes:
        """Send a request that the README has, to where the proxy is; raise ``HTTPError`` from 400 on."""
        request = urllib.request.Request(  # noqa: S310 - our own URL
            url.replace(HERE, self.url), method=method, data=body and body.encode(), headers=headers
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            assert headers.get("Prefer") == answer.headers.get("Preference-Applied")
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
            yield Running(running.url, simulator.url, environment)


def table(file: bytes) -> list[dict[str, str]]:
    """Return the records of a whole list; raise ``ValueError`` or ``AssertionError`` where it is none."""
    heads, *rows = csv.reader(io.StringIO(file.decode("utf-8-sig"), newline=""), strict=True)
    assert rows
    assert "id" == heads[0]
    return [dict(zip(heads, row, strict=True)) for row in rows]


# What is done with a block, by its kind.


def by_ci(block: Block, proxy: Running, folder: Path) -> None:
    """.ci/run finds it by its end, and runs it."""
    del proxy, folder
    assert 1 == len(block.text.splitlines())
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert 1 == sum(f"readme_command '{end}'" in script for end in CI if block.text.endswith(f"{end}\n"))


def shell(block: Block, proxy: Running, folder: Path) -> None:
    """Run as it stands; a status from 400 on counts as a failure of curl."""
    program = block.text.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    ports = [url.rpartition(":")[2] for url in (proxy.url, proxy.simulator)]
    (folder / ".curlrc").write_text(
        f'connect-to = "localhost:6387:localhost:{ports[0]}"\nconnect-to = "localhost:6388:127.0.0.1:{ports[1]}"\n'
        f'noproxy = "*"\n{"" if "--fail" in block.text else "fail-with-body"}\nsilent\nshow-error\n',
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
    if SIMULATOR in block.text:
        proxy.get(f"{proxy.simulator}/_sandbox/faults", method="DELETE")
    assert 0 == run.returncode, run.stdout
    if saved := re.search(r" -o (\S+)", block.text):
        assert table((folder / saved[1]).read_bytes())
    elif block.text.startswith("curl"):
        json.loads(run.stdout.rpartition("\n")[2])


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
    told = [
        line
        for line in run.stderr.splitlines()
        if not line.endswith("seems to be a placeholder: replace it with the key")
    ]
    assert (0, []) == (run.returncode, told)
    found = {name for name, setting in json.loads(run.stdout).items() if setting["source"] == ".env"}
    assert {line.partition("=")[0] for line in block.text.splitlines()} == found


def python(block: Block, proxy: Running, folder: Path) -> None:
    """Run as it stands, with the port of the day, and with what the public SDK and pandas would ask in their place."""
    del folder
    if "import requests" in block.text:
        pytest.importorskip("requests", reason="requests is not installed")
    host = HERE.removeprefix("http://")
    text = block.text.replace(HERE, proxy.url).replace(f'"{host}"', f'"{proxy.url.removeprefix("http://")}"')
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins(proxy).items():
            patch.setitem(sys.modules, name, module)
        exec(compile(text, f"{block.document}:{block.line}", "exec"), names)  # noqa: S102 - our own text
    assert isinstance(answer := names.get("customers", names.get("instruments")), list)
    assert answer


def stand_ins(proxy: Running) -> dict[str, ModuleType]:
    """Return what stands in for pandas and the public SDK's two modules: they make the same requests, in clear text."""

    def read_csv(address: str, dtype: type, parse_dates: list[str]) -> list[dict[str, str]]:
        assert dtype is str
        records = table(proxy.get(address))
        for name in parse_dates:
            assert [date.fromisoformat(record[name]) for record in records if record[name]]
        return records

    def configuration(host: str, access_token: str) -> dict[str, str]:
        return {"host": host, "token": access_token}

    def asked(client: dict[str, str], limit: int) -> object:
        bearer = {"Authorization": f"Bearer {client['token']}"}
        return json.loads(proxy.get(f"{client['host']}/customers?limit={limit}", **bearer))

    def logged_in(access_key: str, secret_key: str, host: str) -> SimpleNamespace:
        base, body = f"http://{host}/api/v1", json.dumps({"accessKey": access_key, "secretKey": secret_key})
        token = json.loads(proxy.get(f"{base}/authenticate", method="POST", body=body))["accessToken"]
        return SimpleNamespace(list_customers=partial(asked, {"host": base, "token": token}))

    generated, wrapper, pandas = ModuleType("openapi_client"), ModuleType("pymetquay"), ModuleType("pandas")
    vars(generated).update(
        Configuration=configuration,
        ApiClient=dict,
        CustomersApi=lambda client: SimpleNamespace(get_customers=partial(asked, client)),
    )
    vars(wrapper).update(MetquayClient=logged_in)
    vars(pandas).update(read_csv=read_csv)
    return {"openapi_client": generated, "pymetquay": wrapper, "pandas": pandas}


def powershell(block: Block, proxy: Running, folder: Path) -> None:
    """Replay each request; it must not be given up while it may still wait."""
    del folder
    lines = block.text.replace("`\n", "").splitlines()
    variables = dict(re.findall(r"^(\$\w+) = '([^']+)'$", "\n".join(lines), re.MULTILINE))
    calls = 0
    for line in lines:
        if re.fullmatch(r"\$\w+ = '[^']+'", line):
            continue
        call = re.fullmatch(
            r'Invoke-RestMethod "([^"]+)"(?: -Method (\w+) -Body (\$\w+) +-ContentType "([^"]+)")?'
            r'(?: -Headers @\{ Prefer = "wait=(\d+)" \} -TimeoutSec (\d+))?',
            line,
        )
        assert call, line
        headers = {"Content-Type": call[4]} if call[4] else {}
        if call[5]:
            assert int(call[5]) < int(call[6])
            headers["Prefer"] = f"wait={call[5]}"
        body = variables[call[3]] if call[3] else None
        assert json.loads(proxy.get(call[1], method=(call[2] or "Get").upper(), body=body, **headers))
        calls += 1
    assert calls


ARCHIVE = f"metquay-proxy-{__version__}-windows-amd64.zip"
"""What .ci/program.py calls the program for Windows."""


def installing(block: Block, proxy: Running, folder: Path) -> None:
    """The archive is called so, and its script takes these words; there is no Windows here to run it."""
    del proxy, folder
    assert '"metquay-proxy-{version}-{system}-{platform' in (ROOT / ".ci/program.py").read_text(encoding="utf-8")
    for line in block.text.splitlines():
        command, *words = line.split()
        if command == "powershell":
            name = words[words.index("-File") + 1]
            script = (ROOT / "deploy/windows" / name.rpartition("\\")[2]).read_text(encoding="utf-8")
            taken = re.findall(
                r"^    (?:\[Parameter\(Mandatory\)\] )?\[(?:string|switch)\] \$(\w+)", script, re.MULTILINE
            )
            given = [word for word in words[words.index(name) + 1 :] if word.startswith("-")]
            assert set(given) <= {f"-{one}" for one in taken}
        else:
            assert command in {"Get-FileHash", "Unblock-File", "Expand-Archive"}
            assert [ARCHIVE] == fnmatch.filter([ARCHIVE], next(word for word in words if word.endswith(".zip")))


def visual_basic(block: Block, proxy: Running, folder: Path) -> None:
    """Replay each request that is opened, with its headers, or what a QueryTable fetches, and reads as it is told."""
    del folder
    if address := re.search(r'\.QueryTables\.Add\("TEXT;([^"]+)", ActiveSheet\.Range\("A1"\)\)\n', block.text):
        said = {" ".join(line.split()) for line in block.text.splitlines()}
        assert {".TextFilePlatform = 65001", ".TextFileCommaDelimiter = True", "End With"} < said
        assert ".Refresh BackgroundQuery:=False" in said
        assert table(proxy.get(address[1]))
        return
    calls = re.findall(r'\.Open "(GET)", "([^"]+)", False', block.text)
    assert calls
    headers = dict(re.findall(r'\.SetRequestHeader "([^"]+)", "([^"]+)"', block.text))
    assert ("Header" in block.text) == bool(headers)
    for method, url in calls:
        answer = proxy.get(url, method=method, **headers)
        assert table(answer) if ".csv" in url else json.loads(answer)


def power_query(block: Block, proxy: Running, folder: Path) -> None:
    """Replay its request, with its header, and read the table as it does."""
    del folder
    text = " ".join(block.text.split())
    call = re.search(
        r'Web\.Contents\("([^"]+)", \[RelativePath = "([^"]+)"(?:, Headers = \[#"([^"]+)" = "([^"]+)"\])?\]\)', text
    )
    assert call
    assert "Csv.Document(" in text
    assert '[Delimiter = ",", Encoding = 65001, QuoteStyle = QuoteStyle.Csv])' in text
    assert "Table.PromoteHeaders(" in text
    assert table(proxy.get(f"{call[1]}/{call[2]}", **({call[3]: call[4]} if call[3] else {})))


def prometheus(block: Block, proxy: Running, folder: Path) -> None:
    """Scrape as it says."""
    del folder
    path, target = (re.findall(pattern, block.text) for pattern in (r"metrics_path: (\S+)", r'targets: \["([^"]+)"\]'))
    assert b"metquay_proxy_requests_total" in proxy.get(f"http://{target[0]}{path[0]}")


def windows(block: Block, proxy: Running, folder: Path) -> None:
    """The same as the command for other systems, in the words of Windows; there is none here to run it."""
    del proxy, folder
    elsewhere = MAIN.replace("python3", "py").replace(".venv/bin/", ".venv\\Scripts\\").split(" && ")
    assert elsewhere == block.text.splitlines()


def drawing(block: Block, proxy: Running, folder: Path) -> None:
    """Each room that is drawn is there."""
    del proxy, folder
    rooms = {path.stem for path in ROOT.glob("metquay_proxy/**/*.py")}
    floors = {path.name for path in ROOT.glob("metquay_proxy/*/")}
    assert set(re.findall(r"┌─ (\w+) ─", block.text)) <= floors
    drawn = set(re.findall(r"│ (\w+) {2}", block.text))
    assert len(drawn) > 10
    assert drawn <= rooms


def kind(block: Block) -> Callable[[Block, Running, Path], None]:
    """Choose what is done with a block; raise ``LookupError`` for one that nothing is known of."""
    if block.language == "sh" and block.text.rstrip().endswith(CI):
        return by_ci
    if block.language == "sh":
        return docker if block.text.startswith("docker build") else shell
    if block.language == "powershell" and re.search(r"\.(zip|ps1)", block.text):
        return installing
    if block.language == "" and "Web.Contents" in block.text:
        return power_query
    if block.language == "" and re.fullmatch(r"(METQUAY_\w+=.*\n)+", block.text):
        return settings
    kinds = {"powershell": powershell, "vb": visual_basic, "python": python, "bat": windows, "text": drawing}
    return (kinds | {"yaml": prometheus})[block.language]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.document}-{block.line}-{block.language}")
def test_a_block_works(block: Block, proxy: Running, tmp_path: Path) -> None:
    """What a reader copies out of a document does what it should."""
    kind(block)(block, proxy, tmp_path)


BROKEN = {
    shell: [("customer", "customr"), ("latency", "latenzy"), ("-newkey ec", "-newkey ecc")],
    docker: [("127.0.0.1:", "")],
    settings: [("METQUAY_HOST", "METQUAY_HOTS")],
    python: [("formulas=keep", "dates=vendor"), (HERE, f"{HERE}/nowhere"), ('secret_key="any"', "secret_key=5")],
    powershell: [("-Body", "-Boby"), ("-TimeoutSec 180", "-TimeoutSec 18"), ("customers?", "customrs?")],
    installing: [("amd64", "arm64"), ("-ForMe", "-ForUs"), ("-File", "-Fill")],
    visual_basic: [("65001", "1252"), ("customers", "customrs")],
    power_query: [("customers", "customrs")],
    prometheus: [("/-/metrics", "/-/metric")],
    windows: [("-q", "-Q")],
    drawing: [("│ pool ", "│ pond ")],
}
"""What makes a block of each kind wrong: the first of these that it has."""


@pytest.mark.slow
def test_the_certificate_of_the_recipe(proxy: Running, tmp_path: Path) -> None:
    """What the recipe makes serves https, and a client that trusts that file alone is served, login included."""
    (block,) = (block for block in BLOCKS if block.text.startswith("openssl"))
    shell(block, proxy, tmp_path)
    account = {name: value for name, value in proxy.environment.items() if name.startswith("METQUAY_")}
    pair = {"METQUAY_TLS_CERT": "localhost.crt", "METQUAY_TLS_KEY": "localhost.key", "METQUAY_LISTEN": "localhost:0"}
    with process(tmp_path, "serve", **account | pair) as secure:
        trust = ssl.create_default_context(cafile=str(tmp_path / "localhost.crt"))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        )
        base = f"https://localhost:{secure.url.rpartition(':')[2]}/api/v1"
        with opener.open(f"{base}/authenticate", b'{"accessKey": "any", "secretKey": "any"}', timeout=20) as answer:
            token = json.load(answer)["accessToken"]
        read = urllib.request.Request(f"{base}/customers?limit=1", headers={"Authorization": f"Bearer {token}"})  # noqa: S310 - our own URL
        with opener.open(read, timeout=20) as answer:
            assert 1 == len(json.load(answer))


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if kind(block) in BROKEN], ids=lambda block: f"{block.document}-{block.line}"
)
def test_a_broken_block_is_noticed(block: Block, proxy: Running, tmp_path: Path) -> None:
    """The same block with a mistake in it fails: that it works means something."""
    attempt = kind(block)
    right, wrong = next(pair for pair in BROKEN[attempt] if pair[0] in block.text)
    with pytest.raises((AssertionError, urllib.error.HTTPError, ValueError)):
        attempt(block._replace(text=block.text.replace(right, wrong)), proxy, tmp_path)


def test_a_block_of_an_unknown_kind_is_noticed() -> None:
    """A block that nothing here can try does not slip through."""
    assert {by_ci, *BROKEN} == {kind(block) for block in BLOCKS}
    with pytest.raises(LookupError):
        kind(Block("README.md", 1, "ruby", "puts 1\n"))
    fences = sum(text.count("```") for text in READ.values())
    assert fences == 2 * len(BLOCKS), "a fence that no block was made of"


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


def test_the_settings_are_the_program_s() -> None:
    """All of them stand in their table, and the README's own rows have the same defaults."""
    text = DOCUMENTS["docs/settings.md"]
    assert text == documents.with_settings(text), "run: python -m tests.documents"
    told = dict(re.findall(r"^\| `(METQUAY_\w+)` \| .*? \| (.*?) \|", text, re.MULTILINE))
    rows = re.findall(r"^\| (`METQUAY_.*?) \| (.*?) \|", README, re.MULTILINE)
    named = [(variable, default) for names, default in rows for variable in re.findall(r"\w+", names)]
    assert len(named) == 8
    assert set(named) <= set(told.items())


def test_each_variable_in_the_text_exists() -> None:
    """What a reader sets because a document says so is a setting."""
    known = {variable(name) for name in VARIABLES}
    for name, text in READ.items():
        assert known >= set(re.findall(r"METQUAY_[A-Z_]*[A-Z]", text)), name


def test_each_error_is_explained() -> None:
    """Whoever looks up a word of X-Metquay-Proxy-Error, or a sentence of ``check``, finds it."""
    text = DOCUMENTS["docs/troubleshooting.md"]
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \| [^|]{20,} \| [^|]{20,} \|$", text, re.MULTILINE)
    assert STATUS == {slug: int(status) for slug, status in rows}
    plain = " ".join(text.replace("`", "").split())
    said = {sentence.replace("`", "") for sentence in documents.said_by_check()}
    assert len(said) > 30
    assert set() == {sentence for sentence in said if sentence not in plain}


def test_each_link_leads_somewhere() -> None:
    """To a file of the repository and, where it names one, to a heading in it; others are addresses of the web."""
    for name, text in DOCUMENTS.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if not re.match(r"https://[a-z]+\.", link):
                target = (ROOT / name).parent / path if path else ROOT / name
                assert target.exists(), (name, link)
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
                assert not anchor or anchor in {_anchor(head) for head in heads}, (name, link)


def _anchor(head: str) -> str:
    return re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")


def test_the_documents_are_of_a_readable_size() -> None:
    """The README is read in one sitting, and an editor shows each line whole, but for tables."""
    assert len(README.splitlines()) <= 150
    for name, text in READ.items():
        assert [] == [line for line in text.splitlines() if len(line) > 120 and line[:1] != "|"], name


def test_the_default_port_is_the_one_in_the_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who starts the proxy without a word about it finds it where the README has it."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("METQUAY_"):
            monkeypatch.delenv(name)
    assert f"{load(sandbox=True).listen[0]}" == HERE.removeprefix("http://")
