"""The files in deploy/ and .github/: valid by their own tools, true to the program, and run without their engines.

Each validator is shown a broken twin of each file, which is the file with one thing changed, and must refuse it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from metquay_proxy.redis_address import parse_redis_url
from metquay_proxy.rules.idempotency import MAX_ANSWERS, MAX_RECORDS
from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY
from metquay_proxy.settings import VARIABLES, default_text, flag, variable
from tests.running import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent.parent
COMPOSE = ROOT / "deploy/compose.yaml"
PODS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
UNIT = ROOT / "deploy/systemd/metquay-proxy.service"
REPLICAS = ROOT / "deploy/kubernetes/replicas.yaml"
SCRIPTS = sorted((ROOT / "deploy/windows").glob("*.ps1"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

INSTALLED = "/opt/metquay-proxy/bin/metquay-proxy"
"""Where the unit's comment installs the program."""
EXPOSURE = 1.2
"""The worst score (0 is best, 10 worst) that `systemd-analyze security` may give; sockets alone make up most of it."""
CLIENT_KEY = "a-client-key-of-24-letters"
WRITING_KEY = "another-key-of-26-letters"
KUBECTL = """
kubectl() {
  shift 4
  for word; do
    word=${word#--from-file=}
    if [[ $word == *=* ]]; then cp "${word#*=}" "${word%%=*}"; else test -e "$word"; fi
  done
}
"""
"""Stands for kubectl where a comment makes a secret: its files lie beside one another."""

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="a source archive holds only a part of the repository"
)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")


def tool(name: str) -> str:
    """Return the path of a program, out of this Python's environment if it is there; skip where it is missing."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def output(*words: str, **more: Any) -> tuple[int, str]:  # noqa: ANN401 - subprocess's own
    """Run a tool; return its exit code and all that it printed."""
    run = subprocess.run(  # noqa: S603 - our own words
        words, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, **more
    )
    return run.returncode, run.stdout


def documents(path: Path) -> list[Any]:
    """Return a YAML file's documents; a key that is there twice is an error."""
    yaml = pytest.importorskip("ruamel.yaml", reason="ruamel.yaml is not installed")
    return list(yaml.YAML(typ="safe", pure=True).load_all(path.read_text(encoding="utf-8")))


# The validators: each returns what is wrong with a file, or nothing.


def compose_schema(path: Path) -> str:
    """The Compose specification's schema."""
    return against_schema(path, "compose-spec")


def workflow_schema(path: Path) -> str:
    """The schema of GitHub's workflows."""
    return against_schema(path, "github-workflows")


def against_schema(path: Path, name: str) -> str:
    """Hold a file against a schema that check-jsonschema carries; in this process, since loading it takes seconds."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    vendor = pytest.importorskip("check_jsonschema.builtin_schemas.vendor", reason="check-jsonschema is not installed")
    schema = json.loads((resources.files(vendor) / f"{name}.json").read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    return "\n".join(f"{error.json_path}: {error.message}" for error in validator.iter_errors(documents(path)[0]))


def kubernetes_schema(path: Path) -> str:
    """Kubernetes' own schemas, strictly: those of the first version that has sidecars, and of a new one."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    faults = []
    for document in documents(path):
        for version in ("1.29", "1.37"):
            try:
                kubernetes.validate(document, version, strict=True)
            except kubernetes.ValidationError as error:
                faults.append(f"{version}: {error.message}")
    return "\n".join(faults)


def workflow_audit(path: Path) -> str:
    """What zizmor finds, small smells included; offline."""
    code, text = output(
        tool("zizmor"), "--offline", "--no-progress", "--quiet", "--persona=auditor", "--strict-collection", str(path)
    )
    return text if code else ""


def unit_syntax(path: Path) -> str:
    """What systemd has to say, warnings too: it ignores a misspelt key with no more than one."""
    installed = path.with_suffix(".installed.service")
    installed.write_text(path.read_text(encoding="utf-8").replace(INSTALLED, sys.executable), encoding="utf-8")
    code, text = output(tool("systemd-analyze"), "verify", "--recursive-errors=no", str(installed))
    return text or str(code or "")


def unit_exposure(path: Path) -> str:
    """Systemd's score for how much a service could do to the machine."""
    limit = f"--threshold={EXPOSURE * 10:.0f}"
    code, text = output(tool("systemd-analyze"), "security", "--no-pager", "--offline=yes", limit, str(path))
    return text if code else ""


def powershell_syntax(path: Path) -> str:
    """The parser that editors use; PowerShell itself is not to be had here."""
    tree_sitter = pytest.importorskip("tree_sitter", reason="tree-sitter is not installed")
    grammar = pytest.importorskip("tree_sitter_powershell", reason="tree-sitter-powershell is not installed")
    root = tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse(path.read_bytes()).root_node
    return f"{path.name} has a syntax error" if root.has_error else ""


GOOD: list[tuple[Callable[[Path], str], Path]] = [
    (compose_schema, COMPOSE),
    *((kubernetes_schema, path) for path in PODS),
    *((workflow_schema, path) for path in WORKFLOWS),
    *((workflow_audit, path) for path in WORKFLOWS),
    (unit_syntax, UNIT),
    (unit_exposure, UNIT),
    *((powershell_syntax, path) for path in SCRIPTS),
]
"""Each file, and what must accept it."""

BROKEN: list[tuple[Callable[[Path], str], str, str, str]] = [
    (compose_schema, "compose.yaml", "depends_on:", "depend_on:"),
    (compose_schema, "compose.yaml", "condition: service_healthy", "condition: healthy"),
    (compose_schema, "compose.yaml", "pids_limit: 64", "pids_limit: [64]"),
    (kubernetes_schema, "sidecar.yaml", "restartPolicy: Always", "restartPolcy: Always"),
    (kubernetes_schema, "sidecar.yaml", "defaultMode: 288", 'defaultMode: "0440"'),
    (kubernetes_schema, "job.yaml", "terminationGracePeriodSeconds: 20", "terminationGracePeriodSeconds: 20s"),
    (kubernetes_schema, "job.yaml", "httpGet: {path: /-/live, port", "httpGet: {path: /-/live, ports"),
    (kubernetes_schema, "replicas.yaml", "strategy: {type: Recreate}", "strategy: Recreate"),
    (kubernetes_schema, "replicas.yaml", "        - podSelector:\n", "        - podsSelector:\n"),
    (kubernetes_schema, "replicas.yaml", "items: [{key: users.acl, path", "items: [{keys: users.acl, path"),
    (workflow_schema, "check.yml", "runs-on:", "runs_on:"),
    (workflow_schema, "release.yml", "id-token: write", "id-token: yes, please"),
    (workflow_audit, "check.yml", "@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2", "@v6"),
    (workflow_audit, "check.yml", "persist-credentials: false", "persist-credentials: true"),
    (workflow_audit, "release.yml", '"$GITHUB_REF_NAME" --verify-tag', "${{ github.ref_name }} --verify-tag"),
    (workflow_audit, "release.yml", "permissions: {}", "permissions: write-all"),
    (unit_syntax, UNIT.name, "DynamicUser=yes", "DynamicUsers=yes"),
    (unit_syntax, UNIT.name, "Restart=on-failure", "Restart=on-faliure"),
    (unit_syntax, UNIT.name, "ExecStart=/opt", "ExecStart=opt"),
    (unit_exposure, UNIT.name, "SystemCallFilter=~@privileged @resources\n", ""),
    (unit_exposure, UNIT.name, "CapabilityBoundingSet=\n", ""),
    (powershell_syntax, "install.ps1", "    throw 'Run this", "    throw Run this'"),
    (powershell_syntax, "uninstall.ps1", "    [switch] $ForMe\n)", "    [switch] $ForMe\n"),
]
"""What must refuse a file's broken twin, in which the third text is replaced by the fourth."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("validator", "path"), GOOD, ids=[f"{validator.__name__}-{path.name}" for validator, path in GOOD]
)
def test_a_file_is_valid(validator: Callable[[Path], str], path: Path, tmp_path: Path) -> None:
    """The field's own tool accepts the file."""
    assert "" == validator(Path(shutil.copy(path, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("validator", "name", "right", "wrong"), BROKEN, ids=[f"{row[0].__name__}-{row[3].strip()[:30]}" for row in BROKEN]
)
def test_a_broken_twin_is_refused(
    validator: Callable[[Path], str], name: str, right: str, wrong: str, tmp_path: Path
) -> None:
    """The same tool refuses the file with one thing changed: that it accepts the file means something."""
    (good,) = {path for _, path in GOOD if path.name == name}
    text = good.read_text(encoding="utf-8")
    assert right in text
    twin = tmp_path / name
    twin.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    assert "" != validator(twin)


def test_every_file_has_a_validator_with_a_broken_twin() -> None:
    """A file that is added is checked by something that can fail."""
    assert {path.name for _, path in GOOD} == {name for _, name, _, _ in BROKEN}
    assert {validator for validator, _ in GOOD} == {validator for validator, *_ in BROKEN}


@pytest.mark.parametrize("path", [COMPOSE, *PODS, UNIT, SCRIPTS[0]], ids=lambda path: path.name)
def test_every_variable_is_a_setting(path: Path) -> None:
    """What a file sets or mentions is known to the program: a misspelt variable would only be warned of."""
    known = {variable(name) for name in VARIABLES}
    found = set(re.findall(r"METQUAY_[A-Z_]+", path.read_text(encoding="utf-8")))
    assert found
    assert set() == found - known


class Deployment(NamedTuple):
    """How a file runs the proxy, whatever runs it."""

    environment: dict[str, str]
    secrets: tuple[str, ...]
    """Files with secrets that the proxy finds by their names."""
    ready: list[str]
    """The command that says that the proxy is ready."""
    client: list[str]
    """A command of the file that uses the proxy."""
    grace: float
    """Seconds from the signal to the end."""
    redis: tuple[str, ...] = ()
    """The command that runs the Redis of the file, if it has one."""
    making: str = ""
    """The commands that make the secrets, as the file's comment has them."""


def image_environment() -> dict[str, str]:
    """Return the variables of ours that the image sets."""
    return dict(re.findall(r"(METQUAY_\w+)=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8")))


def composed(service: str, client: str) -> Deployment:
    """Read a proxy, and who uses it, out of the compose file."""
    document = documents(COMPOSE)[0]
    proxy, user = document["services"][service], document["services"][client]
    redis = [document["services"][name] for name in proxy.get("depends_on", [])]
    secrets = {name: document["secrets"][name]["file"] for name in [*proxy["secrets"], *user.get("secrets", [])]}
    assert {name: f"secrets/{name}" for name in secrets} == secrets
    return Deployment(
        image_environment() | proxy["environment"],
        tuple(secrets),
        proxy["healthcheck"]["test"][1:],
        [word.replace("$$", "$") for word in user["command"]],
        float(proxy["stop_grace_period"].removesuffix("s")),
        tuple(chain(*(one["entrypoint"] + one["command"] for one in redis))),
    )


def in_pod(name: str) -> Deployment:
    """Read the proxy, and who uses it, out of a file's pod."""
    path = ROOT / "deploy/kubernetes" / name
    specs = [document["spec"] for document in documents(path)]
    pod, *others = [spec["template"]["spec"] for spec in specs if "template" in spec]
    redis = [container for other in others for container in other["containers"]]
    proxy = pod["initContainers"][0]
    (port,) = proxy["ports"]
    assert {"name": "METQUAY_METRICS_LISTEN", "value": f"0.0.0.0:{port['containerPort']}"} in proxy["env"]
    for probe, page in (("livenessProbe", "/-/live"), ("readinessProbe", "/-/ready")):
        assert {"path": page, "port": port["name"]} == proxy[probe]["httpGet"], "an outage must not restart the proxy"
    return Deployment(
        image_environment() | {entry["name"]: entry["value"] for entry in proxy["env"]},
        ("METQUAY_ACCESS_KEY", "METQUAY_SECRET_KEY"),
        ["metquay-proxy", "health", "--ready"],
        pod["containers"][0]["command"],
        pod["terminationGracePeriodSeconds"],
        tuple(chain(*(container["command"] + container["args"] for container in redis))),
        "\n".join(re.findall(r"^#   (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)),
    )


def redis_pod() -> Any:  # noqa: ANN401 - YAML
    """Return what runs in the pod of Redis."""
    return documents(REPLICAS)[1]["spec"]["template"]["spec"]


def as_unit() -> Deployment:
    """Read the unit; whoever uses it is not its business."""
    unit = re.findall(r"^(\w+)=(.*)", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    values = dict(unit)
    return Deployment(
        {"METQUAY_HOST": "lab.metquay.co"},
        tuple(value.partition(":")[0] for key, value in unit if key == "LoadCredential"),
        shlex.split(values["ExecStartPost"].replace(INSTALLED, "metquay-proxy")),
        shlex.split('curl --fail-with-body "http://localhost:6387/customers?limit=2"'),
        float(values["TimeoutStopSec"]),
    )


DEPLOYMENTS: dict[str, Callable[[], Deployment]] = {
    "compose-sidecar": lambda: composed("sidecar", "application"),
    "compose-shared": lambda: composed("metquay-proxy", "reports"),
    "compose-replicas": lambda: composed("replicas", "calibrations"),
    "kubernetes-sidecar": lambda: in_pod("sidecar.yaml"),
    "kubernetes-job": lambda: in_pod("job.yaml"),
    "kubernetes-replicas": lambda: in_pod("replicas.yaml"),
    "systemd": as_unit,
}
WITH_REDIS = ["compose-replicas", "kubernetes-replicas"]


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a simulator."""
    (tmp_path / "upstream").mkdir()
    with process(tmp_path / "upstream", "sandbox", "--listen", "127.0.0.1:0") as simulator:
        yield simulator.url


@contextlib.contextmanager
def prepared(deployment: Deployment, upstream: str, folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Make a file's secrets and run its Redis; yield the secrets' folder and the proxy's environment.

    All is as the file has it, but for what only an engine can give: paths, names of hosts, ports.
    """
    secrets = folder / "secrets"
    secrets.mkdir(mode=0o700)
    values = {
        "METQUAY_ACCESS_KEY": ACCESS_KEY,
        "METQUAY_SECRET_KEY": SECRET_KEY,
        "METQUAY_CLIENT_KEYS": f"reports:{CLIENT_KEY}:read-only\ntests:{WRITING_KEY}",
        "reports-key": CLIENT_KEY,
    }
    for secret in deployment.secrets:
        (secrets / secret).write_text(values[secret] + "\n", encoding="utf-8")
    if deployment.making:
        tool("openssl")
        making = KUBECTL + deployment.making.replace("DNS:metquay-redis", "DNS:localhost")
        code, text = output(tool("bash"), "-euc", making, cwd=secrets)
        assert 0 == code, text
    for path in secrets.iterdir():
        path.chmod(0o440)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {
        "/etc/metquay": str(secrets),
        "/etc/redis": str(secrets),
        "/run/redis": str(folder),
        "metquay-redis:6379": f"localhost:{port}",
        "6379": port,
        ":6387": ":0",
        ":9187": ":0",
    }

    def here(text: str) -> str:
        return re.sub("|".join(places), lambda found: places[found[0]], text)

    environment = {key: here(value) for key, value in deployment.environment.items()} | {"METQUAY_HOST": upstream}
    if f"{min(deployment.secrets)}_FILE" not in environment:
        environment["CREDENTIALS_DIRECTORY"] = str(secrets)  # as good as /run/secrets, where a test can't write
    with contextlib.ExitStack() as stack:
        if deployment.redis:
            program, *words = deployment.redis
            assert "valkey-server" == program
            command = [tool("redis-server"), *map(here, words)]  # Valkey takes its words
            popen = stack.enter_context(subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True))  # noqa: S603 - the file's
            stack.callback(popen.kill)
            assert popen.stdout is not None
            assert any("ready to accept connections" in line.lower() for line in popen.stdout), (
                "Redis refuses its words"
            )
        yield secrets, environment


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_runs(name: str, upstream: str, tmp_path: Path) -> None:
    """With a file's settings and its secrets as files, the proxy is ready, and the file's client is answered."""
    tool("curl")
    deployment, folder = DEPLOYMENTS[name](), tmp_path / "proxy"
    folder.mkdir()
    with (
        prepared(deployment, upstream, tmp_path) as (secrets, environment),
        process(folder, "serve", **environment) as proxy,
    ):
        port = proxy.url.rpartition(":")[2]
        listen = environment.get("METQUAY_LISTEN", "localhost:0").replace(":0", f":{port}")
        program, *arguments = deployment.ready
        assert "metquay-proxy" == program
        code, text = output(
            *(sys.executable, "-m", "metquay_proxy", *arguments),
            *(() if "--wait" in arguments else ("--wait", "20")),  # an engine asks again and again
            env=os.environ | environment | {"METQUAY_LISTEN": listen},
            cwd=folder,
        )
        assert 0 == code, text
        (folder / ".curlrc").write_text(f'connect-to = "::127.0.0.1:{port}"\nnoproxy = "*"\n', encoding="utf-8")
        command = [
            word.replace("/run/secrets", str(secrets)).replace("sleep 60", "exit 0") for word in deployment.client
        ]
        code, text = output(*command, env=os.environ | {"CURL_HOME": str(folder)}, cwd=folder)
        assert 0 == code, text
        assert 2 == len(json.loads(text[text.index("[") : text.rindex("]") + 1])) or "limit=50" in command[-1]
        assert 0 == proxy.stop()
    assert "warning" not in proxy.output


def asked(method: str, url: str, **headers: str) -> Any:  # noqa: ANN401 - JSON
    """Ask for JSON with the client key that may write, and with a made-up body where one belongs."""
    body = b'{"name": "Pressure gauges of a replica"}' if method == "POST" else None
    headers |= {"X-Proxy-Key": WRITING_KEY, "Content-Type": "application/json"}
    request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310 - http, as we made it
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as response:
        return json.load(response)


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_REDIS)
def test_replicas_share_through_the_redis_of_their_file(name: str, upstream: str, tmp_path: Path) -> None:
    """Two proxies count each other, and one answers what the other executed: Redis lets them do all that they need."""
    folders = [tmp_path / "one", tmp_path / "two"]
    with contextlib.ExitStack() as stack:
        _, environment = stack.enter_context(prepared(DEPLOYMENTS[name](), upstream, tmp_path))
        proxies = []
        for folder in folders:
            folder.mkdir()
            proxies.append(stack.enter_context(process(folder, "serve", **environment)))
        urls = [f"http://127.0.0.1:{proxy.url.rpartition(':')[2]}" for proxy in proxies]
        key = {"Idempotency-Key": "deploy-1"}
        first, second = (asked("POST", f"{url}/instrument-categories", **key) for url in urls)
        assert first == second
        assert 1 == asked("GET", f"{upstream}/_sandbox/books")["requests"]
        status = asked("GET", f"{urls[1]}/-/status")["redis"]
        assert (True, 2, 0) == (status["shared"], status["replicas"], status["failures"])


def words_of(redis: tuple[str, ...]) -> dict[str, str]:
    """Return a Redis's options with their values."""
    return dict(zip(redis[1::2], redis[2::2], strict=True))


@pytest.mark.parametrize("name", WITH_REDIS)
def test_redis_keeps_what_it_must_and_nothing_on_disk(name: str) -> None:
    """It writes no file and throws nothing out, and as many answers as proxies record fit in, also in its container."""
    options = words_of(DEPLOYMENTS[name]().redis)
    assert ("", "no") == (options["--save"], options["--appendonly"])
    assert "noeviction" == options["--maxmemory-policy"]
    held = int(options["--maxmemory"].removesuffix("mb")) << 20
    assert held > 1.5 * (MAX_ANSWERS + 400 * MAX_RECORDS), "each has a name, and two places in an order"
    limits = {
        "compose-replicas": lambda: documents(COMPOSE)[0]["services"]["redis"]["mem_limit"].removesuffix("m"),
        "kubernetes-replicas": lambda: redis_pod()["containers"][0]["resources"]["limits"]["memory"].removesuffix("Mi"),
    }
    assert int(limits[name]()) << 20 > held * 1.2


@pytest.mark.parametrize("name", WITH_REDIS)
def test_nobody_else_reaches_redis(name: str) -> None:
    """It has a socket in a folder of the image's user and no network, or TLS, a password and a policy for it."""
    deployment = DEPLOYMENTS[name]()
    address = parse_redis_url(deployment.environment["METQUAY_REDIS_URL"])
    options = words_of(deployment.redis)
    assert "0" == options["--port"]
    if name == "compose-replicas":
        document = documents(COMPOSE)[0]
        redis, proxies = document["services"]["redis"], document["services"]["replicas"]
        assert (address.path, "700") == (options["--unixsocket"], options["--unixsocketperm"])
        assert "none" == redis["network_mode"]
        assert ["redis:/run/redis"] == redis["volumes"] == proxies["volumes"]
        assert "uid=65532,gid=65532,mode=0700" in document["volumes"]["redis"]["driver_opts"]["o"]
        assert "65532:65532" == redis["user"]
        return
    assert ("rediss", options["--tls-port"]) == (address.scheme, str(address.port))
    assert {"METQUAY_REDIS_PASSWORD_FILE", "METQUAY_CA_BUNDLE"} <= deployment.environment.keys()
    assert "nopass" not in deployment.making
    assert "CA:FALSE" in deployment.making  # what METQUAY_CA_BUNDLE holds could else vouch for a false Metquay
    application, redis, service, policy = documents(REPLICAS)
    assert address.host == service["metadata"]["name"]
    labels = redis["spec"]["template"]["metadata"]["labels"]
    assert labels == service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"]
    (rule,) = policy["spec"]["ingress"]
    assert [{"podSelector": application["spec"]["selector"]}] == rule["from"]
    assert "egress" not in policy["spec"]
    assert ["Ingress", "Egress"] == policy["spec"]["policyTypes"]
    assert (1, "Recreate") == (redis["spec"]["replicas"], redis["spec"]["strategy"]["type"])


@posix_only
@pytest.mark.slow
def test_the_probe_of_redis_fails_only_without_it(tmp_path: Path) -> None:
    """The command that Kubernetes runs beside Redis holds no password: a refusal is an answer, silence is none."""
    program, *words = redis_pod()["containers"][0]["livenessProbe"]["exec"]["command"]
    assert "valkey-cli" == program
    with prepared(in_pod("replicas.yaml"), "", tmp_path) as (_, environment):
        port = environment["METQUAY_REDIS_URL"].rpartition(":")[2].removesuffix("/0")
        probe = [tool("redis-cli"), *(word.replace("6379", port) for word in words)]
        assert (0, "NOAUTH Authentication required.\n\n") == output(*probe)
    assert 1 == output(*probe)[0]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_gives_time_to_drain(name: str) -> None:
    """What runs the proxy kills it later than the proxy gives up on requests in flight."""
    drain = float(default_text("drain_timeout") or 0)
    deployment = DEPLOYMENTS[name]()
    assert deployment.grace > float(deployment.environment.get("METQUAY_DRAIN_TIMEOUT", drain)) + 5


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_lets_nobody_in(name: str) -> None:
    """The proxy listens on localhost, or its clients present keys; no file holds a secret itself."""
    deployment = DEPLOYMENTS[name]()
    listen = deployment.environment.get("METQUAY_LISTEN", default_text("listen"))
    assert "localhost:6387" == listen or "METQUAY_CLIENT_KEYS" in deployment.secrets
    assert set() == set(deployment.environment) & {variable(secret) for secret in VARIABLES if flag(secret) is None}
    assert "METQUAY_TRUST_NETWORK" not in deployment.environment


def test_compose_waits_shares_and_publishes_as_it_says() -> None:
    """Whoever joins a proxy's network waits until it is ready; ports are published to this machine alone."""
    services = documents(COMPOSE)[0]["services"]
    proxies = {name for name, service in services.items() if service["image"] == "metquay-proxy"}
    assert {"sidecar", "metquay-proxy", "replicas"} == proxies
    for name in services.keys() - proxies - {"redis"}:
        (needed, how), *others = services[name]["depends_on"].items()
        assert [] == others
        assert needed in proxies
        assert "service_healthy" == how["condition"]
        assert services[needed]["profiles"] == services[name]["profiles"]
    told = set(re.findall(r"--profile (\w+)", COMPOSE.read_text(encoding="utf-8")))
    assert told == set(chain(*(service["profiles"] for service in services.values())))
    assert "service:sidecar" == services["application"]["network_mode"]
    assert ["127.0.0.1:6387:6387"] == list(chain(*(service.get("ports", []) for service in services.values())))
    assert ["metquay-proxy"] == services["replicas"]["networks"]["default"]["aliases"]
    for name in (*proxies, "redis"):
        assert ["ALL"] == services[name]["cap_drop"]
        assert services[name]["read_only"]
    for name in proxies:
        assert (COMPOSE.parent / services[name]["build"] / "Dockerfile").resolve() == ROOT / "Dockerfile"


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.name)
def test_a_pod_has_a_sidecar(path: Path) -> None:
    """The proxy is a native sidecar; its start is asked for from within, all else at the listener for figures."""
    document = documents(path)[0]
    pod = document["spec"]["template"]["spec"]
    (proxy,) = pod["initContainers"]
    assert "Always" == proxy["restartPolicy"]
    assert ["metquay-proxy", "health"] == proxy["startupProbe"]["exec"]["command"][:2]
    annotations = document["spec"]["template"].get("metadata", {}).get("annotations", {})
    port = str(proxy["ports"][0]["containerPort"])
    told = {"prometheus.io/scrape": "true", "prometheus.io/port": port, "prometheus.io/path": "/-/metrics"}
    assert ({} if document["kind"] == "Job" else told) == annotations
    assert ("Never" if document["kind"] == "Job" else None) == pod.get("restartPolicy")
    (volume,) = pod["volumes"]
    assert [volume["name"]] == [mount["name"] for mount in proxy["volumeMounts"]]
    for container in (proxy, *pod["containers"]):
        locked_down(pod, container)


def test_redis_is_locked_down_too() -> None:
    """Its pod has no more rights than the others, and holds nothing that only proxies need."""
    pod = redis_pod()
    (container,) = pod["containers"]
    locked_down(pod, container)
    assert {"users.acl", "tls.crt", "tls.key"} == files_of(pod).keys()


def locked_down(pod: Any, container: Any) -> None:  # noqa: ANN401 - YAML
    """Check what a container may do: it is nobody, writes nowhere, and has no way to become more."""
    assert (True, 65532) == (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"])
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert ["ALL"] == container["securityContext"]["capabilities"]["drop"]


def test_replicas_are_the_sidecar_with_redis() -> None:
    """The application is the same in both files but for their number, three variables and where its files come from."""
    alone, many = (documents(REPLICAS.with_name(name))[0] for name in ("sidecar.yaml", "replicas.yaml"))
    assert (1, 20) == (alone["spec"].pop("replicas"), many["spec"].pop("replicas"))
    pods = [document["spec"]["template"]["spec"] for document in (alone, many)]
    for pod in pods:
        assert ["metquay"] == [volume["name"] for volume in pod.pop("volumes")]
    more = [pod["initContainers"][0].pop("env") for pod in pods]
    assert ["REDIS_URL", "REDIS_PASSWORD_FILE", "CA_BUNDLE"] == [
        entry["name"].removeprefix("METQUAY_") for entry in more[1] if entry not in more[0]
    ]
    assert alone == many


def made_secrets() -> dict[str, set[str]]:
    """Return the secrets that the comments make, each with the names of its files."""
    text = "".join(path.read_text(encoding="utf-8") for path in PODS)
    made = re.findall(r"kubectl create secret generic (\S+)(.*)", text)
    return {name: set(re.findall(r"--from-file=([^\s=]+)", files)) for name, files in made}


def files_of(pod: Any) -> dict[str, str]:  # noqa: ANN401 - YAML
    """Return the files of a pod's one volume, each with the secret that it comes from."""
    (volume,) = pod["volumes"]
    if "secret" in volume:
        name = volume["secret"]["secretName"]
        return dict.fromkeys(made_secrets()[name], name)
    files = {}
    for source in volume["projected"]["sources"]:
        name = source["secret"]["name"]
        items = source["secret"].get("items") or [{"key": file, "path": file} for file in made_secrets()[name]]
        assert {item["key"] for item in items} <= made_secrets()[name]
        files |= {item["path"]: name for item in items}
    return files


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.name)
def test_the_secrets_that_the_comments_make_are_those_that_are_read(path: Path) -> None:
    """The commands in the comments make the very secrets and files that the proxy is told of, and it sees no others."""
    pod = documents(path)[0]["spec"]["template"]["spec"]
    (proxy,) = pod["initContainers"]
    told = {entry["value"] for entry in proxy["env"] if entry["value"].startswith("/")}
    assert told == {f"/etc/metquay/{file}" for file in files_of(pod)}


# What the unit forbids, held against what the proxy does.


def system_calls() -> dict[str, set[str]]:
    """Return systemd's sets of system calls, each with the sets that it holds spelt out."""
    code, text = output(tool("systemd-analyze"), "--no-pager", "syscall-filter")
    assert 0 == code, text
    sets: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("@"):
            current = sets.setdefault(line.strip(), set())
        elif line.startswith("#"):
            current = set()  # those that belong to no set
        elif line.strip() and not line.strip().startswith("#"):
            current.add(line.strip())

    def spelt_out(name: str) -> set[str]:
        return set(chain(*(spelt_out(word) if word.startswith("@") else {word} for word in sets[name])))

    return {name: spelt_out(name) for name in sets}


@posix_only
@pytest.mark.slow
def test_the_unit_forbids_nothing_that_the_proxy_does(tmp_path: Path) -> None:
    """Seen by strace: system calls and socket families that are allowed, no memory that is written and executed."""
    unit = re.findall(r"^(\w+)=(.*)", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    allowed, forbidden = (value for key, value in unit if key == "SystemCallFilter")
    sets = system_calls()
    permitted = sets[allowed] - set(chain(*(sets[name] for name in forbidden.removeprefix("~").split())))
    trace = tmp_path / "trace"
    words = [sys.executable, "-m", "metquay_proxy", "serve", "--sandbox", "--listen", "localhost:0"]
    popen = subprocess.Popen(  # noqa: S603 - our own words
        [tool("strace"), "-f", "-qq", "-o", str(trace), *words],
        env={name: value for name, value in os.environ.items() if not name.startswith("METQUAY_")},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert popen.stdout is not None
        address = re.search(r"localhost:\d+", popen.stdout.readline())
        assert address is not None
        asked = [*words[:3], "health", "--ready", "--wait", "20", "--listen", address[0]]
        assert (0, "ready\n") == output(*asked)
        url = f"http://{address[0]}/customers"
        assert 0 == output(tool("curl"), "--silent", "--fail-with-body", "--noproxy", "*", url)[0]
        os.kill(int(trace.read_text(encoding="utf-8").split(maxsplit=1)[0]), signal.SIGTERM)
        assert 0 == popen.wait(30)
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()
    text = trace.read_text(encoding="utf-8", errors="replace")
    calls = set(re.findall(r"^\d+ +([a-z_0-9]+)\(", text, re.MULTILINE))
    assert {"accept4", "epoll_ctl"} & calls
    assert set() == calls - permitted
    families = set(re.findall(r" socket\((AF_\w+)", text))
    assert families <= set(dict(unit)["RestrictAddressFamilies"].split())
    assert [] == re.findall(r"(?:mmap|mprotect|pkey_mprotect)\([^)]*PROT_WRITE\|PROT_EXEC.*", text)
    assert [] == re.findall(r"mprotect\([^)]*PROT_EXEC.*", text)


# The workflows.


def test_ci_and_the_release_run_everything() -> None:
    """Each push runs .ci/run, and nothing is published without it."""
    check, release = (documents(path)[0] for path in WORKFLOWS)
    assert "bash .ci/run" in [step.get("run") for step in check["jobs"]["check"]["steps"]]
    assert "$/.github/workflows/check.yml" == release["jobs"]["check"]["uses"]
    needs = {name: set(re.findall(r"\w+", str(job.get("needs", "")))) for name, job in release["jobs"].items()}
    assert {
        "tag": set(),
        "check": {"tag"},
        "build": {"check"},
        "wheel": {"build"},
        "image": {"build"},
        "program": {"build"},
        "statement": {"program"},
        "release": {"wheel", "image", "statement"},
    } == (needs)


def test_a_person_approves_what_is_published() -> None:
    """Wheel and image wait for an approval, are of a commit of main, and the image's origin is signed."""
    release = documents(ROOT / ".github/workflows/release.yml")[0]["jobs"]
    environments = {name: job["environment"] for name, job in release.items() if "environment" in job}
    assert {"wheel": "package-index", "image": "image-registry", "statement": "windows-program"} == environments
    writes = {name for name, job in release.items() if {"packages", "id-token"} & set(job["permissions"])}
    assert environments.keys() == writes
    assert "--is-ancestor" in release["tag"]["steps"][-1]["run"]
    for name in ("image", "statement"):
        assert "attest-build-provenance" in release[name]["steps"][-1]["uses"]
    assert "sha256sum" in release["release"]["steps"][-1]["run"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit(path: Path) -> None:
    """A tag can be moved to other code; a commit can't."""
    uses = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    pinned = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\$/\.github/workflows/check\.yml")
    assert uses
    assert [] == [use for use in uses if not pinned.fullmatch(use)]


def test_a_release_is_made_as_ci_makes_it() -> None:
    """Packages, program and SBOMs come from scripts that .ci/run runs too, and it tries what they make."""
    release = documents(ROOT / ".github/workflows/release.yml")[0]["jobs"]
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for job, scripts in {"build": ["dist"], "program": ["program.py", "smoke_program.py"]}.items():
        steps = "\n".join(step.get("run", "") for step in release[job]["steps"])
        assert scripts == re.findall(r"\.ci/([\w.]+)", steps)
        for script in scripts:
            assert f".ci/{script}" in run
    assert "windows" in release["program"]["runs-on"]
    for script in (".ci/dist", ".ci/program.py"):
        assert ".ci/sbom.py" in (ROOT / script).read_text(encoding="utf-8")
