from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from metquay_proxy.exchange.exchange import Exchange
from metquay_proxy.telemetry import Telemetry
from tests.test_telemetry import STATUS

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
ALERTS = (DEPLOY / "alerts.yaml").read_text(encoding="utf-8")
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
OF_PROMETHEUS = {"up"}
OF_LINUX = {"process_cpu_seconds_total", "process_resident_memory_bytes"}

_NAME = re.compile(r"\b(metquay_proxy_\w+|process_\w+|up)\b")
_LABELS = re.compile(r"(metquay_proxy_\w+)\{([^}]*)\}")
_BY = re.compile(r"sum by \(([^)]*)\) \((?:\w+\()?(\w+)")


def exposed() -> dict[str, set[str]]:
    """Return the name of each sample of ``/-/metrics`` with the names of its labels."""
    telemetry = Telemetry()
    telemetry.closed(Exchange("GET", path="/api/v1/customers"))
    status = {**STATUS, "redis": {"shared": True, "replicas": 2, "failures": 0}}
    status["audit"] = {"waiting": 0, "lost": 0}
    families = text_string_to_metric_families(telemetry.exposition(status)().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def expressions() -> list[str]:
    """Return every query of the alerts and the dashboard."""
    alerts = re.findall(r"^        expr: (?:>-\n((?:          .*\n)+)|(.*)\n)", ALERTS, re.MULTILINE)
    assert ALERTS.count("- alert: ") == len(alerts)
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return ["".join(alert) for alert in alerts] + panels


@pytest.mark.parametrize("expression", expressions())
def test_every_query_asks_for_what_there_is(expression: str) -> None:
    """A metric or a label that was renamed leaves no dead alert and no empty panel behind."""
    known = exposed()
    names = set(_NAME.findall(expression))
    assert names
    assert set() == names - set(known) - OF_PROMETHEUS - OF_LINUX
    for name, matchers in _LABELS.findall(expression):
        asked = set(re.findall(r"(\w+)(?:=|!)", matchers))
        assert set() == asked - known[name] - {"instance", "job"}
    for labels, name in _BY.findall(expression):
        assert set() == set(labels.split(", ")) - known[name] - {"instance", "job"}


def test_every_metric_is_on_the_dashboard() -> None:
    """What is measured can be seen."""
    shown = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed() if name.startswith("metquay_")}
    assert set() == {family for family in families if family not in shown}


def test_panels_have_places_of_their_own() -> None:
    """Panels have ids and do not overlap; each has a title and a unit, and takes the chosen data source."""
    panels = DASHBOARD["panels"]
    assert len(panels) == len({panel["id"] for panel in panels})
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert "${datasource}" == panel["datasource"]["uid"]


def test_alerts_say_what_to_do() -> None:
    """Each alert has a severity, a summary and a description; where promtool is there, it agrees with the file."""
    alerts = ALERTS.split("- alert: ")[1:]
    for alert in alerts:
        assert re.search(r"labels: \{severity: (critical|warning|info)\}", alert)
        assert re.search(r"summary: \S", alert)
        assert re.search(r"description: \S", alert)
    promtool = shutil.which("promtool")
    if promtool is not None:
        found = subprocess.run(  # noqa: S603 - Prometheus's own tool
            [promtool, "check", "rules", DEPLOY / "alerts.yaml"], capture_output=True, text=True, check=False
        )
        assert 0 == found.returncode, found.stderr
        assert f"SUCCESS: {len(alerts)} rules found" in found.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_a_replica_alone_is_told_of_after_five_minutes(tmp_path: Path) -> None:
    """One that shares again in time is not told of, nor one that has no Redis."""
    series = {
        'metquay_proxy_redis_shared{instance="alone"}': "0x9",
        'metquay_proxy_redis_shared{instance="back"}': "0x4 1x5",
        'metquay_proxy_redis_shared{instance="shares"}': "1x9",
        'metquay_proxy_ready{instance="has-none"}': "1x9",
    }
    told = {"severity": "warning", "instance": "alone"}
    summary = "alone goes on without Redis"
    (description,) = re.findall(rf"{summary.replace('alone', '.*')}\"?\n *description: (.*)", ALERTS)
    annotations = {"summary": summary, "description": description}
    test = {
        "rule_files": [str(DEPLOY / "alerts.yaml")],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [
                    {"alertname": "MetquayQuotaNotShared", "eval_time": "4m", "exp_alerts": []},
                    {
                        "alertname": "MetquayQuotaNotShared",
                        "eval_time": "6m",
                        "exp_alerts": [{"exp_labels": told, "exp_annotations": annotations}],
                    },
                ],
            }
        ],
    }
    path = tmp_path / "alone.yaml"
    path.write_text(json.dumps(test), encoding="utf-8")
    found = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, check=False)  # noqa: S603, S607 - Prometheus's own tool
    assert 0 == found.returncode, found.stdout + found.stderr
