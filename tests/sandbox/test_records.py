from __future__ import annotations

from datetime import date

import pytest

from metquay_proxy.sandbox.records import (
    CATEGORIES,
    CUSTOMERS,
    INSTRUMENTS,
    WORKS,
    Records,
    Refusal,
    date_text,
    due_date,
    legacy,
    parse_date,
)

TODAY = date(2024, 1, 31)
EVERY_9999_YEARS = {"calibrationFrequency": "9999", "calibrationFrequencySpan": "YEAR"}
INSTRUMENT = {"name": "Caliper 150 mm", "companyId": "ACM", "instrumentCategoryName": "Caliper"}


@pytest.fixture
def records() -> Records:
    """One customer (10301, ACM), one category (1, Caliper), one instrument (8001) and one work (21401)."""
    records = Records(lambda: TODAY)
    records.create(CUSTOMERS, {"companyName": "Acme", "companyCode": "ACM"})
    records.create(CATEGORIES, {"name": "Caliper"})
    records.create(INSTRUMENTS, INSTRUMENT)
    records.create(WORKS, {"customerInstrumentId": 8001})
    return records


def test_ids_count_up_from_each_kinds_own(records: Records) -> None:
    """Ids look like the vendor's examples, and a deleted one is not given out again."""
    assert 10302 == records.create(CUSTOMERS, {"companyName": "Beta"})
    records.delete(CUSTOMERS, 10302)
    assert 10303 == records.create(CUSTOMERS, {"companyName": "Beta"})
    assert {CUSTOMERS: 2, CATEGORIES: 1, INSTRUMENTS: 1, WORKS: 1} == records.counts()


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("01-22-2024", date(2024, 1, 22)),
        ("01-22-2024 10:15:00", date(2024, 1, 22)),
        ("2024-01-22", date(2024, 1, 22)),
        ("2024-01-22T10:15", date(2024, 1, 22)),
        ("2024-01-22T10:15:00.123456", date(2024, 1, 22)),
        ("2024-01-22T23:30:00+05:30", date(2024, 1, 22)),
        ("2024-02-29T00:00:60z", date(2024, 2, 29)),
    ],
)
def test_a_date_is_read_in_both_forms(text: str, day: date) -> None:
    """The vendor's form and ISO, with and without time and zone, mean the day that is written."""
    assert day == parse_date(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "22-01-2024", "02-30-2024", "2024-1-2", "20240122", "01/22/2024"),
        *("2024-01-22T25:00:00", "\u0660\u0661-22-2024"),
    ],
)
def test_what_is_no_date_is_refused(text: str) -> None:
    """Other orders, other separators and days that don't exist are errors."""
    with pytest.raises(ValueError, match=r"day|month"):
        parse_date(text)


def test_dates_are_written_in_full() -> None:
    """Month, day and year keep their zeros."""
    assert "03-05-0987" == date_text(date(987, 3, 5))


@pytest.mark.parametrize(
    ("frequency", "span", "day"),
    [
        ("180", "DAY", date(2024, 7, 29)),
        ("2", "WEEK", date(2024, 2, 14)),
        ("1", "MONTH", date(2024, 2, 29)),
        ("11", "MONTH", date(2024, 12, 31)),
        ("1", "YEAR", date(2025, 1, 31)),
    ],
)
def test_due_dates_count_spans(frequency: str, span: str, day: date) -> None:
    """A month that is too short ends on its last day."""
    assert day == due_date(TODAY, frequency, span)


def test_an_instrument_is_due_one_frequency_after_its_calibration(records: Records) -> None:
    """Without a calibration date the day of creation counts; without frequency and span nothing is due."""
    row = records.create(INSTRUMENTS, INSTRUMENT | {"calibrationFrequency": "6", "calibrationFrequencySpan": "MONTH"})
    answer = records.answer(INSTRUMENTS, row)
    assert ("01-31-2024", "07-31-2024") == (answer["calibratedDate"], answer["dueDate"])
    records.replace(INSTRUMENTS, row, INSTRUMENT | {"calibrationFrequency": "6"})
    assert "dueDate" not in records.answer(INSTRUMENTS, row)


@pytest.mark.parametrize(
    ("kind", "body", "status", "text"),
    [
        (CUSTOMERS, [], 400, "contains invalid fields or missing required parameters: the body must be a JSON object"),
        (CUSTOMERS, {"companyName": "B", "openingBalance": float("inf")}, 400, "openingBalance must be a number"),
        (CUSTOMERS, {"companyName": "B", "openingBalance": True}, 400, "openingBalance must be a number"),
        (CUSTOMERS, {"isTaxable": 1}, 400, "isTaxable must be true or false"),
        (CUSTOMERS, {}, 422, "one or more validation failed. Company name is required."),
        (CUSTOMERS, {"companyName": " aCME "}, 409, "A customer with this company name already exists."),
        (
            CUSTOMERS,
            {"companyName": "B", "companyCode": "acm"},
            409,
            "unique constraints. A customer with this company code",
        ),
        (CATEGORIES, {"name": "CALIPER"}, 409, "An instrument category with this name already exists."),
        (INSTRUMENTS, {"name": "A"}, 422, "Company ID is required. Instrument category name is required."),
        (INSTRUMENTS, INSTRUMENT | {"companyId": "X"}, 422, "Customer with ID or code X does not exist."),
        (INSTRUMENTS, INSTRUMENT | {"companyId": "10302"}, 422, "Customer with ID or code 10302 does not exist."),
        (INSTRUMENTS, INSTRUMENT | {"instrumentCategoryName": "X"}, 422, "Instrument category X does not exist."),
        (INSTRUMENTS, INSTRUMENT | {"calibrationFrequencySpan": "day"}, 400, "one of DAY, WEEK, MONTH, YEAR"),
        (INSTRUMENTS, INSTRUMENT | {"calibrationFrequency": "often"}, 422, "must be a whole number"),
        (INSTRUMENTS, INSTRUMENT | EVERY_9999_YEARS, 422, "after the year 9999"),
        (WORKS, {"customerInstrumentId": 1.5}, 400, "customerInstrumentId must be an integer"),
        (WORKS, {"customerInstrumentId": 8002}, 422, "Customer instrument with ID 8002 does not exist."),
        (WORKS, {"customerInstrumentId": 8001, "inDate": "soon"}, 400, "inDate must be a date"),
        (WORKS, {"customerInstrumentId": 8001, "workFlowType": "Repair"}, 400, "workFlowType must be one of"),
    ],
)
def test_a_rule_refuses_with_the_vendors_text(
    records: Records, kind: str, body: object, status: int, text: str
) -> None:
    """Each rule has its status, and a text that says which field; nothing is stored."""
    before = records.counts()
    with pytest.raises(Refusal) as refusal:
        records.create(kind, body)
    assert status == refusal.value.status
    assert text in refusal.value.message
    assert before == records.counts()


def test_checks_come_in_the_vendors_order(records: Records) -> None:
    """Types, then required, then existence, then references, then uniqueness, then dependencies."""
    with pytest.raises(Refusal, match="must be a string"):
        records.replace(INSTRUMENTS, 1, {"name": 1})
    with pytest.raises(Refusal, match="is required"):
        records.replace(INSTRUMENTS, 1, {"companyId": "X"})
    with pytest.raises(Refusal, match="The requested resource with ID 1 does not exist"):
        records.replace(INSTRUMENTS, 1, INSTRUMENT | {"companyId": "X"})
    records.create(CATEGORIES, {"name": "Balance"})
    with pytest.raises(Refusal, match="already exists"):
        records.replace(CATEGORIES, 1, {"name": "balance"})
    with pytest.raises(Refusal, match="has associated instruments"):
        records.replace(CATEGORIES, 1, {"name": "Calliper"})


def test_replacing_resets_what_is_left_out(records: Records) -> None:
    """PUT is a full replacement: texts go, flags return to their defaults, the code stays."""
    row = records.create(CUSTOMERS, {"companyName": "B", "phone": "1", "isTaxable": False, "openingBalance": 2})
    assert {"phone": "1", "isTaxable": False, "openingBalance": 2.0}.items() <= records.answer(CUSTOMERS, row).items()
    records.replace(CUSTOMERS, row, {"companyName": "Beta"})
    answer = records.answer(CUSTOMERS, row)
    assert {"companyName": "Beta", "companyCode": "C-10302", "isTaxable": True}.items() <= answer.items()
    assert {"phone", "openingBalance"}.isdisjoint(answer)


def test_a_company_code_is_made_once_and_never_changes(records: Records) -> None:
    """A code that is taken is avoided; another value in a PUT is a 422, the same one is not."""
    records.create(CUSTOMERS, {"companyName": "B", "companyCode": "c-10303"})
    row = records.create(CUSTOMERS, {"companyName": "C", "companyCode": " "})
    assert "C-10303-1" == records.answer(CUSTOMERS, row)["companyCode"]
    records.replace(CUSTOMERS, row, {"companyName": "C", "companyCode": "C-10303-1"})
    with pytest.raises(Refusal, match="Company code cannot be changed") as refusal:
        records.replace(CUSTOMERS, row, {"companyName": "C", "companyCode": "C"})
    assert 422 == refusal.value.status


def test_a_name_is_free_again_once_its_owner_changed(records: Records) -> None:
    """Renaming and deleting give a unique value back."""
    records.replace(CUSTOMERS, 10301, {"companyName": "Acme Two"})
    records.create(CUSTOMERS, {"companyName": "Acme"})
    records.delete(CUSTOMERS, 10302)
    records.create(CUSTOMERS, {"companyName": "Acme"})
    records.replace(CUSTOMERS, 10301, {"companyName": "ACME TWO"})


def test_a_serial_and_tag_pair_is_unique_within_a_customer(records: Records) -> None:
    """Both equal is a 409, half of it or another customer is not."""
    records.create(CUSTOMERS, {"companyName": "B", "companyCode": "B"})
    pair = {"serialNo": "S1", "tagNo": "T1"}
    records.create(INSTRUMENTS, INSTRUMENT | pair)
    records.create(INSTRUMENTS, INSTRUMENT | pair | {"companyId": "B"})
    records.create(INSTRUMENTS, INSTRUMENT | {"serialNo": "S1"})
    records.create(INSTRUMENTS, INSTRUMENT | {"serialNo": "S1"})
    with pytest.raises(Refusal, match="serial and tag number"):
        records.create(INSTRUMENTS, INSTRUMENT | {"serialNo": "s1", "tagNo": "t1"})


def test_a_customer_is_addressed_by_code_or_id(records: Records) -> None:
    """The company ID of an instrument is text, and a code that looks like an id comes first."""
    records.replace(INSTRUMENTS, 8001, INSTRUMENT | {"companyId": "10301"})
    assert "Acme" == records.answer(INSTRUMENTS, 8001)["companyName"]
    records.create(CUSTOMERS, {"companyName": "Trickster", "companyCode": "10301"})
    records.replace(INSTRUMENTS, 8001, INSTRUMENT | {"companyId": "10301"})
    assert "Trickster" == records.answer(INSTRUMENTS, 8001)["companyName"]


@pytest.mark.parametrize(
    ("kind", "row", "text"),
    [
        (CUSTOMERS, 10301, "the customer has associated instruments or works"),
        (CATEGORIES, 1, "the instrument category has associated instruments"),
        (INSTRUMENTS, 8001, "the customer instrument has associated works"),
    ],
)
def test_what_others_depend_on_is_not_deleted(records: Records, kind: str, row: int, text: str) -> None:
    """A deletion that would leave orphans is a 409."""
    with pytest.raises(Refusal, match=text) as refusal:
        records.delete(kind, row)
    assert 409 == refusal.value.status


def test_a_parent_is_not_deleted_before_its_children(records: Records) -> None:
    """Child instruments name their parent's tag, and hold it."""
    parent = records.load(INSTRUMENTS, INSTRUMENT | {"tagNo": "RIG"})
    child = records.load(INSTRUMENTS, INSTRUMENT | {"parentTagNo": "RIG"})
    assert "RIG" == records.answer(INSTRUMENTS, child)["parentTagNo"]
    with pytest.raises(Refusal, match="child instruments"):
        records.delete(INSTRUMENTS, parent)
    records.delete(INSTRUMENTS, child)
    records.delete(INSTRUMENTS, parent)
    with pytest.raises(Refusal, match="no instrument with tag RIG"):
        records.load(INSTRUMENTS, INSTRUMENT | {"parentTagNo": "RIG"})


def test_renaming_a_category_takes_the_vendors_detour(records: Records) -> None:
    """Reassign, rename, reassign back."""
    records.create(CATEGORIES, {"name": "Shelf"})
    records.replace(INSTRUMENTS, 8001, INSTRUMENT | {"instrumentCategoryName": "shelf"})
    records.replace(CATEGORIES, 1, {"name": "Vernier"})
    records.replace(INSTRUMENTS, 8001, INSTRUMENT | {"instrumentCategoryName": "Vernier"})
    assert "Vernier" == records.answer(WORKS, 21401)["instrumentCategoryName"]


def test_works_and_instruments_move(records: Records) -> None:
    """A work follows its instrument's customer, and another instrument may take the work."""
    records.create(CUSTOMERS, {"companyName": "Beta", "companyCode": "B"})
    records.replace(INSTRUMENTS, 8001, INSTRUMENT | {"companyId": "B", "serialNo": "S"})
    work = records.answer(WORKS, 21401)
    assert ("Beta", "S", "Caliper 150 mm") == (work["customer"], work["instrumentSerialNo"], work["instrumentName"])
    other = records.create(INSTRUMENTS, INSTRUMENT)
    records.replace(WORKS, 21401, {"customerInstrumentId": other})
    moved = records.answer(WORKS, 21401)
    assert (other, "Acme", work["workNo"]) == (moved["customerInstrumentId"], moved["customer"], moved["workNo"])


def test_a_work_is_numbered_and_described(records: Records) -> None:
    """What the server adds to a work follows from the request."""
    row = records.create(
        WORKS, {"customerInstrumentId": 8001, "siteJob": True, "accreditation": True, "deliveryDate": "2024-02-14"}
    )
    expected = {
        "workNo": "CAL-2024-021402",
        "status": "Open",
        "jobType": "At Customers Place",
        "accreditationType": "Accredited",
        "workFlowType": "Calibration",
        "inDate": "01-31-2024",
        "dueDate": "02-14-2024",
    }
    assert expected.items() <= records.answer(WORKS, row).items()


@pytest.mark.parametrize("status", ["Finished", "Cancelled", "Closed"])
def test_a_work_that_is_over_stays_as_it_is(records: Records, status: str) -> None:
    """Finished and cancelled works are a 422, before their references are looked at."""
    row = records.load(WORKS, {"customerInstrumentId": 8001, "status": status})
    with pytest.raises(Refusal, match=f"is {status.lower()} and cannot be modified") as refusal:
        records.replace(WORKS, row, {"customerInstrumentId": 1})
    assert 422 == refusal.value.status


def test_a_copy_lives_its_own_life(records: Records) -> None:
    """Writes to a copy leave the original and its unique values alone."""
    twin = records.copy(lambda: TODAY)
    twin.create(CUSTOMERS, {"companyName": "Beta"})
    twin.replace(CUSTOMERS, 10301, {"companyName": "Other"})
    assert "Acme" == records.answer(CUSTOMERS, 10301)["companyName"]
    assert 10302 == records.create(CUSTOMERS, {"companyName": "Beta"})


class TestVariants:
    @pytest.fixture
    def made(self) -> list[int]:
        """Ids of the variants that were made, one for each time."""
        return []

    @pytest.fixture
    def filled(self, records: Records, made: list[int]) -> Records:
        """Three variants of each of the records."""

        def vary(kind: str, row: dict[str, object], row_id: int) -> dict[str, object]:
            made.append(row_id)
            names = {
                CUSTOMERS: ("companyName", "companyCode"),
                INSTRUMENTS: ("serialNo", "tagNo"),
                WORKS: ("workNo", "remarks"),
            }
            return dict.fromkeys(names[kind], f"{row['id']} varied as {row_id}")

        records.fill(4, vary)
        return records

    def test_there_are_as_many_as_are_wanted(self, filled: Records) -> None:
        """Of each kind but the categories, which no list shows; the next record has the next id."""
        assert {CUSTOMERS: 4, CATEGORIES: 1, INSTRUMENTS: 4, WORKS: 4} == filled.counts()
        assert [10301, 10302, 10303, 10304] == [row["id"] for row in filled.page(CUSTOMERS)]
        assert 10305 == filled.create(CUSTOMERS, {"companyName": "B"})
        assert 10305 == filled.page(CUSTOMERS, 4)[0]["id"]

    def test_they_belong_to_variants(self, filled: Records) -> None:
        """A customer's variant has one of its instruments, and that one of its works."""
        owners = ["Acme", *(f"10301 varied as {row_id}" for row_id in (10302, 10303, 10304))]
        assert owners == [row["companyName"] for row in filled.page(INSTRUMENTS)]
        assert owners == [row["customer"] for row in filled.page(WORKS)]
        assert [8001, 8002, 8003, 8004] == [row["customerInstrumentId"] for row in filled.page(WORKS)]

    def test_where_variants_have_nothing_the_originals_have_more(self, records: Records) -> None:
        """Two works on one instrument, when there is no second one that could have any."""
        records.create(INSTRUMENTS, INSTRUMENT)
        records.fill(2, lambda *_: {"workNo": "W-21402"})
        assert [8001, 8001] == [row["customerInstrumentId"] for row in records.page(WORKS)]

    def test_nothing_is_varied_where_nothing_is(self) -> None:
        """A laboratory without instruments gets none, and an empty one stays empty."""
        for number in (0, 1):
            records = Records(lambda: TODAY)
            for _ in range(number):
                records.create(CUSTOMERS, {"companyName": "Acme"})
            records.fill(5, lambda *_: {})
            assert {CUSTOMERS: 5 * number, CATEGORIES: 0, INSTRUMENTS: 0, WORKS: 0} == records.counts()

    def test_parts_of_instruments_are_not_varied(self, records: Records) -> None:
        """A variant belongs to another customer than the instrument of which it would be a part."""
        records.load(INSTRUMENTS, INSTRUMENT | {"tagNo": "RIG"})
        records.load(INSTRUMENTS, INSTRUMENT | {"parentTagNo": "RIG"})
        records.fill(9, lambda kind, _row, row_id: {"companyName": f"{row_id}"} if kind == CUSTOMERS else {})
        parents = [row["companyName"] for row in records.page(INSTRUMENTS) if "parentTagNo" in row]
        assert (["Acme"], 9) == (parents, records.counts()[INSTRUMENTS])

    def test_only_what_is_asked_for_is_made(self, filled: Records, made: list[int]) -> None:
        """However many there are, a page makes its own records, and what these name."""
        assert [] == made
        filled.page(CUSTOMERS, 2, 1)
        assert [10303] == made
        filled.page(WORKS, 3, 1)
        assert [10303, 21404, 8004, 10304] == made

    @pytest.mark.parametrize(
        ("kind", "entry", "text"),
        [
            (CUSTOMERS, {"companyName": "10301 VARIED as 10303 "}, "this company name already exists"),
            (CUSTOMERS, {"companyName": "B", "companyCode": "10301 varied as 10303"}, "this company code already"),
            (
                INSTRUMENTS,
                INSTRUMENT | {"companyId": "10303"} | dict.fromkeys(("serialNo", "tagNo"), "8001 varied as 8003"),
                "this serial and tag number already exists",
            ),
            (
                WORKS,
                {"customerInstrumentId": 8001, "workNo": "21401 varied as 21403"},
                "this work number already exists",
            ),
        ],
    )
    def test_what_is_theirs_is_taken(self, filled: Records, kind: str, entry: dict[str, object], text: str) -> None:
        """A name, code, pair or number of a variant is a 409, and free once that is deleted."""
        with pytest.raises(Refusal, match=text) as refusal:
            filled.load(kind, entry)
        assert 409 == refusal.value.status
        for varied, row_id in ((WORKS, 21403), (INSTRUMENTS, 8003), (CUSTOMERS, 10303)):
            if kind in (varied, CUSTOMERS):
                filled.delete(varied, row_id)
            elif varied == WORKS:
                filled.replace(WORKS, row_id, {"customerInstrumentId": 8001})
        filled.load(kind, entry)

    def test_one_that_is_replaced_stays_where_it_is(self, filled: Records) -> None:
        """In the list and with its instrument; its old name is free, and its code still its own."""
        filled.replace(CUSTOMERS, 10303, {"companyName": "Beta"})
        filled.create(CUSTOMERS, {"companyName": "10301 varied as 10303"})
        assert "Beta" == filled.page(CUSTOMERS, 2, 1)[0]["companyName"]
        assert ("10301 varied as 10303", "Beta") == (
            filled.answer(CUSTOMERS, 10303)["companyCode"],
            filled.answer(INSTRUMENTS, 8003)["companyName"],
        )
        with pytest.raises(Refusal, match="instruments or works"):
            filled.delete(CUSTOMERS, 10303)

    def test_they_do_not_change_with_the_original(self, filled: Records) -> None:
        """A record that was varied goes its own way; what belongs to its variants does not hold it."""
        filled.replace(CUSTOMERS, 10301, {"companyName": "Other", "phone": "5"})
        assert "phone" not in filled.answer(CUSTOMERS, 10302)
        filled.replace(INSTRUMENTS, 8001, INSTRUMENT | {"companyId": "10302", "make": "M"})
        assert "make" not in filled.answer(INSTRUMENTS, 8002)
        filled.delete(CUSTOMERS, 10301)
        assert "10301 varied as 10302" == filled.answer(CUSTOMERS, 10302)["companyName"]

    def test_dependencies_are_their_own(self, filled: Records) -> None:
        """What has none can be deleted, from the works up; a category that variants use cannot."""
        with pytest.raises(Refusal, match="associated works"):
            filled.delete(INSTRUMENTS, 8004)
        filled.replace(WORKS, 21404, {"customerInstrumentId": 8001})
        with pytest.raises(Refusal, match="instruments or works"):
            filled.delete(CUSTOMERS, 10304)
        filled.delete(INSTRUMENTS, 8004)
        filled.delete(CUSTOMERS, 10304)
        filled.create(CATEGORIES, {"name": "Shelf"})
        filled.replace(INSTRUMENTS, 8001, INSTRUMENT | {"instrumentCategoryName": "Shelf"})
        with pytest.raises(Refusal, match="associated instruments"):
            filled.delete(CATEGORIES, 1)

    def test_an_instrument_can_be_for_one(self, filled: Records) -> None:
        """By its code or its id, and be a part of one that it has."""
        for company in ("10301 VARIED as 10303", "10303"):
            row = filled.create(INSTRUMENTS, INSTRUMENT | {"companyId": company})
            assert "10301 varied as 10303" == filled.answer(INSTRUMENTS, row)["companyName"]
        part = INSTRUMENT | {"companyId": "10303", "parentTagNo": "8001 varied as 8003"}
        assert part["parentTagNo"] == filled.answer(INSTRUMENTS, filled.load(INSTRUMENTS, part))["parentTagNo"]

    def test_a_copy_has_them_too(self, filled: Records) -> None:
        """And leaves those of the original alone."""
        twin = filled.copy(lambda: TODAY)
        assert filled.page(WORKS) == twin.page(WORKS)
        twin.replace(WORKS, 21404, {"customerInstrumentId": 8001})
        assert 8004 == filled.answer(WORKS, 21404)["customerInstrumentId"]


class TestLegacy:
    def test_a_customer_is_created_changed_and_deleted(self, records: Records) -> None:
        """The same records in other words: calibrId 0 is new, and "False" or "None" is nothing."""
        model = {
            "calibrId": 0,
            "companyName": "Odoo SA",
            "companyCode": "False",
            "companyPhone1": "None",
            "companyAddress": [{"addressField1": "Calle 1", "city": "León", "calibrId": 99}],
        }
        answer = legacy(records, "customer/createCustomer", {"northlabCustomer": [model]})
        assert ("700", {"calibrId": 10302}) == (answer["responseCode"], answer["response"])
        customer = records.answer(CUSTOMERS, 10302)
        assert {"companyCode": "C-10302", "billingAddr1": "Calle 1", "billingCity": "León"}.items() <= customer.items()
        assert "phone" not in customer
        model |= {"calibrId": "10302", "companyPhone1": "5"}
        legacy(records, "customer/updateCustomer", {"northlabCustomer": [model]})
        assert "5" == records.answer(CUSTOMERS, 10302)["phone"]
        answer = legacy(records, "customer/deleteCustomer", {"northlabCustomer": [model]})
        assert ("700", 1) == (answer["responseCode"], records.counts()[CUSTOMERS])

    def test_an_instrument_and_its_work_refer_by_id(self, records: Records) -> None:
        """Categories have ids here, frequencies are days, and a work's number is answered."""
        model = {
            "calibrId": 0,
            "customerInstrumentName": "Balance",
            "companyCalibrId": 10301,
            "instrumentCategoryCalibrId": 1,
            "calibrationFrequency": 365,
        }
        answer = legacy(records, "customerInstrument/createCustomerInstrument", {"northlabCustomerInstrument": [model]})
        row = answer["response"]["calibrId"]
        assert {"companyName": "Acme", "dueDate": "01-30-2025"}.items() <= records.answer(INSTRUMENTS, row).items()
        work = {"calibrId": 0, "customerInstrumentCalibrId": str(row), "taskType": "Testing", "siteJob": False}
        answer = legacy(records, "work/createOrUpdateWork", {"northlabWork": [work]})
        assert {"calibrId": 21402, "workNo": "CAL-2024-021402"} == answer["response"]
        assert "Testing" == records.answer(WORKS, 21402)["workFlowType"]

    @pytest.mark.parametrize(
        ("call", "body", "code"),
        [
            ("customer/createCustomer", {}, "400"),
            ("customer/createCustomer", {"northlabCustomer": [{}]}, "422"),
            ("customer/createCustomer", {"northlabCustomer": [{"companyName": "Acme"}]}, "409"),
            ("customer/deleteCustomer", {"northlabCustomer": [{"calibrId": "None"}]}, "404"),
            ("customerInstrument/createCustomerInstrument", {"northlabCustomerInstrument": [{}]}, "404"),
        ],
    )
    def test_a_failure_is_in_the_body(self, records: Records, call: str, body: dict[str, object], code: str) -> None:
        """The add-on reads the code and the long message."""
        answer = legacy(records, call, body)
        assert (code, {}) == (answer["responseCode"], answer["response"])
        assert answer["longMessage"]
