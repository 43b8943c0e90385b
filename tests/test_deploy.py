"""The files in deploy/ and .github/: valid by their own tools, true to the program, and run without their engines.

Each validator is shown a broken twin of each file, which is the file with one thing changed, and must refuse it.
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
import venv
from importlib import metadata, resources
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from metquay_proxy.sandbox import ACCESS_KEY, SECRET_KEY
from metquay_proxy.settings import VARIABLES, default_text, flag, variable
from tests.running import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "deploy/compose.yaml"
PODS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
UNIT = ROOT / "deploy/systemd/metquay-proxy.service"
SCRIPTS = sorted((ROOT / "deploy/windows").glob("*.ps1"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

INSTALLED = "/opt/metquay-proxy/bin/metquay-proxy"
"""Where the unit's comment installs the program."""
EXPOSURE = 1.2
"""The worst score (0 is best, 10 worst) that `systemd-analyze security` may give; sockets alone make up most of it."""
CLIENT_KEY = "a-client-key-of-24-letters"

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
    (kubernetes_schema, "job.yaml", "exec: {command: [metquay-proxy, health]}", "exec: [metquay-proxy, health]"),
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
    (powershell_syntax, "run.ps1", "} while ($failed)", "} while ($failed"),
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


@pytest.mark.parametrize("path", [COMPOSE, *PODS, UNIT, *SCRIPTS], ids=lambda path: path.name)
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


def image_environment() -> dict[str, str]:
    """Return the variables of ours that the image sets."""
    return dict(re.findall(r"(METQUAY_\w+)=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8")))


def composed(service: str, client: str) -> Deployment:
    """Read a proxy, and who uses it, out of the compose file."""
    document = documents(COMPOSE)[0]
    proxy, user = document["services"][service], document["services"][client]
    secrets = {name: document["secrets"][name]["file"] for name in [*proxy["secrets"], *user.get("secrets", [])]}
    assert {name: f"secrets/{name}" for name in secrets} == secrets
    return Deployment(
        image_environment() | proxy["environment"],
        tuple(secrets),
        proxy["healthcheck"]["test"][1:],
        [word.replace("$$", "$") for word in user["command"]],
        float(proxy["stop_grace_period"].removesuffix("s")),
    )


def in_pod(name: str) -> Deployment:
    """Read the proxy, and who uses it, out of a file's pod."""
    pod = documents(ROOT / "deploy/kubernetes" / name)[0]["spec"]["template"]["spec"]
    proxy = pod["initContainers"][0]
    return Deployment(
        image_environment() | {entry["name"]: entry["value"] for entry in proxy["env"]},
        ("METQUAY_ACCESS_KEY", "METQUAY_SECRET_KEY"),
        proxy["readinessProbe"]["exec"]["command"],
        pod["containers"][0]["command"],
        pod["terminationGracePeriodSeconds"],
    )


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
    "kubernetes-sidecar": lambda: in_pod("sidecar.yaml"),
    "kubernetes-job": lambda: in_pod("job.yaml"),
    "systemd": as_unit,
}


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a simulator."""
    (tmp_path / "upstream").mkdir()
    with process(tmp_path / "upstream", "sandbox", "--listen", "127.0.0.1:0") as simulator:
        yield simulator.url


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_runs(name: str, upstream: str, tmp_path: Path) -> None:
    """With a file's settings and its secrets as files, the proxy is ready, and the file's client is answered."""
    tool("curl")
    deployment = DEPLOYMENTS[name]()
    secrets, folder = tmp_path / "secrets", tmp_path / "proxy"
    folder.mkdir()
    secrets.mkdir(mode=0o700)
    values = {
        "METQUAY_ACCESS_KEY": ACCESS_KEY,
        "METQUAY_SECRET_KEY": SECRET_KEY,
        "METQUAY_CLIENT_KEYS": f"reports:{CLIENT_KEY}:read-only",
        "reports-key": CLIENT_KEY,
    }
    for secret in deployment.secrets:
        (secrets / secret).write_text(values[secret] + "\n", encoding="utf-8")
        (secrets / secret).chmod(0o440)
    environment = {  # the same, but for what only an engine can give
        key: re.sub("^/etc/metquay", str(secrets), value.replace(":6387", ":0"))
        for key, value in deployment.environment.items()
    } | {"METQUAY_HOST": upstream}
    if f"{min(deployment.secrets)}_FILE" not in environment:
        environment["CREDENTIALS_DIRECTORY"] = str(secrets)  # as good as /run/secrets, where a test can't write
    with process(folder, "serve", **environment) as proxy:
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
    assert {"sidecar", "metquay-proxy"} == proxies
    for name in services.keys() - proxies:
        (needed, how), *others = services[name]["depends_on"].items()
        assert [] == others
        assert needed in proxies
        assert "service_healthy" == how["condition"]
        assert services[needed]["profiles"] == services[name]["profiles"]
    told = set(re.findall(r"--profile (\w+)", COMPOSE.read_text(encoding="utf-8")))
    assert told == set(chain(*(service["profiles"] for service in services.values())))
    assert "service:sidecar" == services["application"]["network_mode"]
    assert ["127.0.0.1:6387:6387"] == list(chain(*(service.get("ports", []) for service in services.values())))
    for name in proxies:
        assert ["ALL"] == services[name]["cap_drop"]
        assert services[name]["read_only"]
        assert (COMPOSE.parent / services[name]["build"] / "Dockerfile").resolve() == ROOT / "Dockerfile"


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.name)
def test_a_pod_has_a_sidecar_that_is_asked_from_within(path: Path) -> None:
    """The proxy is a native sidecar, and each probe a command: httpGet can't reach a listener on localhost."""
    document = documents(path)[0]
    pod = document["spec"]["template"]["spec"]
    (proxy,) = pod["initContainers"]
    assert "Always" == proxy["restartPolicy"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert ["metquay-proxy", "health"] == proxy[probe]["exec"]["command"][:2]
    assert ["--ready"] == proxy["readinessProbe"]["exec"]["command"][2:]
    assert [] == proxy["livenessProbe"]["exec"]["command"][2:], "an outage of Metquay must not restart the proxy"
    assert ("Never" if document["kind"] == "Job" else None) == pod.get("restartPolicy")
    (volume,) = pod["volumes"]
    assert [volume["name"]] == [mount["name"] for mount in proxy["volumeMounts"]]
    assert (
        volume["secret"]["secretName"]
        == documents(PODS[0])[0]["spec"]["template"]["spec"]["volumes"][0]["secret"]["secretName"]
    )
    for container in (proxy, *pod["containers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert ["ALL"] == container["securityContext"]["capabilities"]["drop"]


def test_the_secret_that_the_comment_makes_is_the_one_that_is_read() -> None:
    """The command in a comment makes the very secret and files that the proxy is told of."""
    text = (ROOT / "deploy/kubernetes/sidecar.yaml").read_text(encoding="utf-8")
    command = re.search(r"kubectl create secret generic (\S+)(.*)", text)
    assert command is not None
    assert f"secretName: {command[1]}," in text
    for name in re.findall(r"--from-file=(\S+)", command[2]):
        assert f"{name}_FILE, value: /etc/metquay/{name}}}" in text


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
        assert (0, "") == output(*asked)
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
        "check": set(),
        "build": {"check"},
        "wheel": {"build"},
        "image": {"build"},
        "release": {"wheel", "image"},
    } == (needs)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit(path: Path) -> None:
    """A tag can be moved to other code; a commit can't."""
    uses = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    pinned = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\$/\.github/workflows/check\.yml")
    assert uses
    assert [] == [use for use in uses if not pinned.fullmatch(use)]


@posix_only
@pytest.mark.slow
def test_the_release_makes_a_bill_of_materials(tmp_path: Path) -> None:
    """The workflow's own command lists everything that the image installs, by version."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    wanted = [Requirement(line) for line in re.findall(r"^([\w.-]+==.*) \\$", lock, re.MULTILINE)]
    pinned = {
        one.name: str(one.specifier).removeprefix("==") for one in wanted if not one.marker or one.marker.evaluate()
    }
    assert {"aiohttp", "uvloop"} <= pinned.keys()
    (tmp_path / "sbom").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    venv.create(tmp_path / "installed", symlinks=True)
    (site_packages,) = (tmp_path / "installed/lib").glob("python*/site-packages")
    for name in pinned:  # what is installed here stands for an installation: the command reads nothing but this
        description = Path(str(metadata.distribution(name)._path))
        (site_packages / description.name).symlink_to(description)
    steps = documents(ROOT / ".github/workflows/release.yml")[0]["jobs"]["build"]["steps"]
    (script,) = (step["run"] for step in steps if "cyclonedx-py" in step.get("run", ""))
    path = os.pathsep.join([str(Path(tool("cyclonedx-py")).parent), os.environ["PATH"]])
    code, text = output(
        *("bash", "-euc", script[script.index("sed ") :]),
        env=os.environ | {"GITHUB_REF_NAME": "v1.2.3", "PATH": path},
        cwd=tmp_path,
    )
    assert 0 == code, text
    bill = json.loads((tmp_path / "sbom/metquay-proxy.cdx.json").read_text(encoding="utf-8"))
    assert "CycloneDX" == bill["bomFormat"]
    subject = bill["metadata"]["component"]
    assert ("metquay-proxy", "1.2.3") == (subject["name"], subject["version"])
    listed = {part["name"].replace("_", "-").lower(): part["version"] for part in bill["components"]}
    assert pinned == listed
