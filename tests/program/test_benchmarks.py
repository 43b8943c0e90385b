"""The benchmark measures in hours of its own; here stands what it makes of figures, and what the documents tell."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("the benchmark needs Linux", allow_module_level=True)

from benchmarks import __main__ as command
from benchmarks import page, targets
from benchmarks.legacy import ALONE, EACH, FIFTY, PROXY, Job, summary
from benchmarks.replicas import Outcome

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / page.PICTURES
RESULTS = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", page.DOCUMENTS)
def test_the_documents_tell_what_was_measured(name: str) -> None:
    """What stands between the marks is made of the results that lie in the repository, and of nothing else."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == page.put(text, page.DOCUMENTS[name](RESULTS)), "run: python -m benchmarks.page"


def test_the_pictures_are_there_and_small() -> None:
    """Each picture of the page is in the repository, and a clone does not grow by much."""
    names = re.findall(rf"\(\.\./{page.PICTURES}/(\w+\.png)\)", page.of(RESULTS))
    assert names
    assert dict.fromkeys(names, True) == {name: 0 < (FOLDER / name).stat().st_size < 100_000 for name in names}
    assert (FOLDER / "results.json").stat().st_size < 100_000


@pytest.mark.parametrize("text", ["", page.BEGIN, f"{page.END}\n{page.BEGIN}"])
def test_a_document_without_marks_is_left_alone(text: str) -> None:
    """The page is not put where nobody said so."""
    with pytest.raises(ValueError, match="there is no"):
        page.put(text, "page")


def test_a_part_that_was_not_measured_is_left_out() -> None:
    """A run of which nothing came says so in each row of the targets."""
    nothing = {name: RESULTS[name] for name in ("machine", "plan")}
    assert {"not measured"} == {row.verdict for row in targets.of(nothing)}
    assert ["## Targets"] == re.findall("^#.*", page.of(nothing), re.MULTILINE)


@pytest.mark.parametrize(
    ("values", "least", "text", "met"),
    [
        ([2.0, 1.0], False, "2.00 / 1.00 x", True),
        ([2.001, 1.0], False, "**2.00** / 1.00 x", False),
        ([2.0, 1.0], True, "2.00 / **1.00** x", False),
        ([2.0, None], True, "2.00 / - x", None),
        ([3.0, None], False, "**3.00** / - x", False),
        ([None], False, "- x", None),
    ],
)
def test_a_bound_is_judged_before_it_is_rounded(
    values: list[float | None],
    least: bool,  # noqa: FBT001 - a value of the table
    text: str,
    met: bool | None,  # noqa: FBT001 - as above
) -> None:
    """What is beyond its bound is in bold, and missed; what is not known is neither."""
    bound = targets.Bound(values, 2.0, "{} x", least=least)
    assert (text, met) == (bound.text(), bound.met)


def test_a_row_is_reached_when_all_its_bounds_are() -> None:
    """One figure beyond its bound is a miss, whatever the others say."""
    good, bad, unknown = (targets.Bound([value], 1.0, "{}") for value in (1.0, 2.0, None))
    told = targets.Bound([9.0], targets.REPORTED, "{}")
    rows = ([good], [good, told], [told], [good, unknown], [unknown, bad])
    verdicts = [targets.Target("", "", bounds).verdict for bounds in rows]
    assert ["reached", "reached", "reported", "not measured", "missed"] == verdicts


def test_the_proxy_is_set_beside_each_peer() -> None:
    """Ratios are ours to theirs; an added latency is counted from that without any proxy."""
    rows = {"metquay-proxy": 30.0, "nginx": 20.0, "HAProxy": 18.0, "Envoy": 60.0, "Caddy": 50.0, "direct": 10.0}
    medians = {
        scheme: {name: {"cpu_16": value, "p50_1": value} for name, value in rows.items()}
        for scheme in ("http", "https")
    }
    found = {row.figure: row.measured for row in targets.of({"medians": medians})}
    assert "1.50 / 1.50 x nginx" == found["CPU of a request, 16 connections"]
    added = "**2.50** / **2.50** x HAProxy; 0.40 / 0.40 x Envoy; 0.50 / 0.50 x Caddy"
    assert added == found["median latency added, 1 connection"]


def test_the_proxy_is_set_beside_what_it_can_not_do_without() -> None:
    """Start and memory are told as more than the bare imports of the same run."""
    row = {"idle_mib": 50.0, "import_mib": 45.0, "loaded_mib": 52.0, "start_ms": 300.0, "import_ms": 250.0}
    found = {row.figure: row.measured for row in targets.of({"medians": {"http": {"metquay-proxy": row}}})}
    assert "1.20 / - x; - / - x" == found["start to first answer; the command health"]
    grown = "**5.0** / - MiB more; 2.0 / - MiB; - / - MiB"
    assert grown == found["memory when idle; grown after load, and after a long one"]


def test_a_single_row_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """A developer asks for the row that a change is about; what there is not is refused with what there is."""
    quick = command.options_of(["--quick", "post", "shared"])
    assert (["post"], ["post", "shared"], 1) == (quick.rows, quick.what, quick.rounds)
    whole = command.options_of([])
    assert ([*command.ROWS], list(command.PARTS), 3) == (whole.rows, [*whole.what], whole.rounds)
    with pytest.raises(SystemExit):
        command.options_of(["put"])
    assert "there is no part or row put, of compare, legacy" in capsys.readouterr().err


def test_the_legacy_job_is_judged_by_its_medians() -> None:
    """One slow round does not decide, and a way that never came to an end leaves its row unmeasured."""
    jobs = [Job(ALONE, way, total, 0.25, 8.0) for way in (EACH, FIFTY) for total in (48.0, 24.0, 90.0)]
    assert {ALONE: {EACH: (48.0, 0.25), FIFTY: (48.0, 0.25)}} == summary(jobs)
    verdicts = {row.figure: row.verdict for row in targets.of({"legacy": jobs})}
    assert "not measured" == verdicts["its first call"]
    jobs += [Job(ALONE, PROXY, 8.0, 0.04, 8.0)]
    verdicts = {row.figure: row.verdict for row in targets.of({"legacy": jobs})}
    assert {"reached"} == {verdicts["its first call"], verdicts["the legacy job, 40 ms from Metquay"]}


@pytest.mark.parametrize(
    ("served", "fairness", "fairest"), [([5, 5], 1.0, 1.0), ([2, 0, 0, 0], 0.25, 0.5), ([2, 1], 0.9, 0.9)]
)
def test_fairness_knows_what_was_possible(served: list[int], fairness: float, fairest: float) -> None:
    """Two requests can't be spread over four replicas: half of what is perfect is the best that there is."""
    outcome = Outcome(len(served), 60.0, served, [], [], 0, 0, 100, 60.0)
    assert (fairness, fairest) == pytest.approx((outcome.fairness, outcome.fairest))
