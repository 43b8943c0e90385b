from __future__ import annotations

import json
import re
from datetime import date, datetime
from typing import TYPE_CHECKING

import pytest

from metquay_proxy.sandbox.records import CATEGORIES, CUSTOMERS, INSTRUMENTS, KINDS, WORKS
from metquay_proxy.sandbox.seed import SeedError, load_seed, sample_records

if TYPE_CHECKING:
    from pathlib import Path

TODAY = date(2024, 5, 17)


def day(text: str) -> date:
    """The day in an answer."""
    return datetime.strptime(text, "%m-%d-%Y").date()  # noqa: DTZ007 - a day has no zone


def test_there_is_enough_to_work_with() -> None:
    """A laboratory with more than one page of everything."""
    counts = sample_records(TODAY).counts()
    assert counts[CUSTOMERS] >= 130
    assert counts[CATEGORIES] >= 12
    assert counts[INSTRUMENTS] >= 200
    assert counts[WORKS] >= 150


def test_the_same_day_has_the_same_records() -> None:
    """A test can rely on what it finds, and the next day is another one."""
    pages = [sample_records(when).page(INSTRUMENTS, 0, 999) for when in (TODAY, date(2024, 5, 18), TODAY)]
    assert pages[0] == pages[2]
    assert pages[0] != pages[1]


def test_the_ids_of_the_vendors_examples_exist() -> None:
    """Who copies a request out of the vendor's documentation finds its records."""
    records = sample_records(TODAY)
    assert "MCS-001" == records.answer(CUSTOMERS, 10427)["companyCode"]
    assert "Digital Multimeter" == records.answer(INSTRUMENTS, 8234)["instrumentCategory"]
    assert records.answer(WORKS, 21568)["workNo"].endswith("-021568")


def test_due_dates_are_alive() -> None:
    """Some instruments are overdue, some due within a month, most later; calibrations lie in the past."""
    instruments = sample_records(TODAY).page(INSTRUMENTS, 0, 999)
    left = [(day(row["dueDate"]) - TODAY).days for row in instruments]
    assert 10 < sum(days < 0 for days in left) < 80
    assert sum(0 <= days < 31 for days in left) > 10
    assert sum(days >= 31 for days in left) > 100
    assert all(day(row["createdDate"]) < day(row["calibratedDate"]) <= TODAY for row in instruments)


def test_works_are_in_all_states_and_in_order() -> None:
    """There are open, finished and cancelled works, none of them from the future, numbered as they came in."""
    works = sample_records(TODAY).page(WORKS, 0, 999)
    assert {"Open", "In Progress", "Awaiting Approval", "Finished", "Cancelled", "Closed"} == {
        w["status"] for w in works
    }
    arrivals = [day(work["inDate"]) for work in works]
    assert sorted(arrivals) == arrivals
    assert arrivals[-1] <= TODAY
    finished = [work for work in works if work["status"] == "Finished"]
    assert all(day(work["inDate"]) <= day(work["finishedDate"]) <= TODAY for work in finished)
    assert all(work["certificateNo"] for work in finished)


def test_not_everything_is_tidy() -> None:
    """Absent fields, inactive customers, customers without instruments, letters beyond ASCII, parents and children."""
    records = sample_records(TODAY)
    customers, instruments = records.page(CUSTOMERS, 0, 999), records.page(INSTRUMENTS, 0, 999)
    assert 0 < sum(row["isInactive"] for row in customers) < 30
    assert {row["companyName"] for row in customers} > {row["companyName"] for row in instruments}
    assert not all(row["companyName"].isascii() for row in customers)
    assert any("parentCompanyCode" in row for row in customers)
    assert 0 < sum("serialNo" not in row for row in instruments) < 50
    assert any("parentTagNo" in row for row in instruments)
    assert {"NA-HQ", "EU-LAB", "IN-SOUTH"} == {row["workspaceCode"] for row in customers}


def test_without_a_day_it_is_today() -> None:
    """The sandbox of a user has fresh dates."""
    records = sample_records()
    assert records.today() == datetime.now().astimezone().date()


@pytest.mark.parametrize("number", [0, 1, 100, 200, 260, 262, 1234])
def test_there_are_as_many_as_are_wanted(number: int) -> None:
    """Of each list exactly so many, and what a record names is there; the categories are always."""
    records = sample_records(TODAY, number)
    assert {CUSTOMERS: number, CATEGORIES: 17, INSTRUMENTS: number, WORKS: number} == records.counts()
    customers, instruments, works = (records.page(kind, 0, number + 1) for kind in (CUSTOMERS, INSTRUMENTS, WORKS))
    assert {row["companyName"] for row in instruments} <= {row["companyName"] for row in customers}
    assert {row["customerInstrumentId"] for row in works} <= {row["id"] for row in instruments}


def test_the_laboratory_comes_first() -> None:
    """A number changes what is at the end of a list, not its beginning; the further ones are the same each time."""
    whole, few, many = (sample_records(TODAY, number) for number in (None, 100, 1234))
    assert whole.page(CUSTOMERS, 0, 100) == few.page(CUSTOMERS, 0, 999)
    for kind, number in whole.counts().items():
        assert whole.page(kind, 0, 999) == many.page(kind, 0, number)
    assert many.page(CUSTOMERS, 0, 999) == sample_records(TODAY, 2000).page(CUSTOMERS, 0, 999)


def test_the_further_records_keep_the_rules() -> None:
    """What a list shows of a customer or an instrument can be put back: types, references, unique values are right."""
    records = sample_records(TODAY, 1500)
    for row in records.page(CUSTOMERS, 140, 2000):
        records.replace(CUSTOMERS, row["id"], {name: row[name] for name in KINDS[CUSTOMERS].asked if name in row})
        assert row == records.answer(CUSTOMERS, row["id"])
    codes = {row["companyName"]: row["companyCode"] for row in records.page(CUSTOMERS, 0, 2000)}
    for row in records.page(INSTRUMENTS, 260, 2000):
        asked = {name: row[name] for name in KINDS[INSTRUMENTS].asked if name in row}
        names = {"name": row["instrumentName"], "instrumentCategoryName": row["instrumentCategory"]}
        records.replace(INSTRUMENTS, row["id"], asked | names | {"companyId": codes[row["companyName"]]})
        assert row == {**records.answer(INSTRUMENTS, row["id"]), "modifiedDate": row["modifiedDate"]}
    assert 1500 == len({row["workNo"] for row in records.page(WORKS, 0, 2000)})


def test_the_further_records_are_awkward() -> None:
    """Each list has what tools stumble over: signs, line breaks, what looks like a formula, empty and absent fields."""
    records = sample_records(TODAY, 1500)
    for kind, first in ((CUSTOMERS, 140), (INSTRUMENTS, 260), (WORKS, 270)):
        rows = records.page(kind, first, 2000)
        texts = [value for row in rows for value in row.values() if isinstance(value, str)]
        assert {*"µ°±\",;'\n"} <= {sign for text in texts for sign in text}, kind
        assert any(text.startswith("=") for text in texts), kind
        assert "" in texts, kind
        assert len({frozenset(row) for row in rows}) > 3, kind
        assert all(re.fullmatch(r"\d\d-\d\d-\d{4}", row[name]) for row in rows for name in row if "Date" in name), kind
    phones = {row["phone"] for row in records.page(CUSTOMERS, 140, 2000) if "phone" in row}
    assert any(re.fullmatch(r"\+49 \(0\) 30-\d+", phone) for phone in phones)


def test_a_seed_file_replaces_the_laboratory(tmp_path: Path) -> None:
    """One's own records, in the form of the module's documentation, with answer fields and ids of one's own."""
    seed = {
        "customers": [{"companyName": "Acme", "companyCode": "ACM", "phone2": "5"}],
        "categories": [{"name": "Caliper"}],
        "instruments": [
            {
                "id": 7,
                "name": "Caliper 150 mm",
                "companyId": "ACM",
                "instrumentCategoryName": "Caliper",
                "calibratedDate": "01-22-2024",
                "calibrationFrequency": "1",
                "calibrationFrequencySpan": "YEAR",
            },
            {"name": "Gauge", "companyId": "ACM", "instrumentCategoryName": "Caliper", "dueDate": "2024-03-01"},
        ],
        "works": [{"customerInstrumentId": 7, "status": "Finished"}],
    }
    path = tmp_path / "seed.json"
    path.write_text(json.dumps(seed), encoding="utf-8")
    records = load_seed(path)
    assert {CUSTOMERS: 1, CATEGORIES: 1, INSTRUMENTS: 2, WORKS: 1} == records.counts()
    assert "5" == records.page(CUSTOMERS)[0]["phone2"]
    assert ["01-22-2025", "03-01-2024"] == [row["dueDate"] for row in records.page(INSTRUMENTS)]
    assert [7, 8001] == [row["id"] for row in records.page(INSTRUMENTS)]
    assert "Finished" == records.page(WORKS)[0]["status"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON in UTF-8: "),
        ("[" * 100_000, "not JSON in UTF-8: "),
        ("[]", "must be one JSON object with lists named customers, categories, instruments, works"),
        ('{"customers": {}}', "must be one JSON object with lists named"),
        ('{"clients": []}', "there is no list 'clients'; the lists are customers, categories, instruments, works"),
        ('{"customers": [{"companyName": "A"}, 1]}', "customers[1]: the body must be a JSON object"),
        ('{"customers": [{"compnyName": "A"}]}', "customers[0]: a customer has no field 'compnyName'"),
        ('{"customers": [{}]}', "customers[0]: Company name is required."),
        ('{"customers": [{"companyName": "A", "id": 0}]}', "customers[0]: id 0 is below 1 or used twice"),
        (
            '{"customers": [{"companyName": "A", "id": 5}, {"companyName": "B", "id": 5}]}',
            "customers[1]: id 5 is below 1 or used twice",
        ),
        ('{"works": [{"customerInstrumentId": 9}]}', "works[0]: Customer instrument with ID 9 does not exist."),
    ],
)
def test_an_error_in_a_seed_file_is_one_clear_line(tmp_path: Path, text: str, reason: str) -> None:
    """The file, the entry and what is wrong with it."""
    path = tmp_path / "seed.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SeedError) as error:
        load_seed(path)
    assert str(error.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(error.value)


def test_a_seed_file_that_is_missing_is_named(tmp_path: Path) -> None:
    """The operating system's words, after the path."""
    with pytest.raises(SeedError, match=r"none\.json: No such file"):
        load_seed(tmp_path / "none.json")
