"""The sandbox's records: what Metquay keeps, and the rules by which it refuses.

Owns the four kinds of record, their fields, references, joins, computed dates and unique keys, and the vendor's texts.
Of a large laboratory most records are variants of a few, made when they are asked for: 300,000 take 45 MB, not 450.
Must not know HTTP libraries, sockets, tokens or the event loop: values in, values or a ``Refusal`` out.

Facts (vendor's specification 1.0.0-jgi, unless marked): PUT replaces the whole record, left-out fields are reset;
``companyName``, ``companyCode`` and a category's ``name`` are unique; ``companyId`` is text and holds an id or a code;
a due date is the calibration date plus frequency x span, the frequency being text; finished works cannot be changed;
answers carry dates as ``MM-dd-yyyy`` (seen live) and leave absent values out. Checks run in this order: types (400),
required (422), existence (404), references (422), uniqueness (409), dependencies (409).
"""

from __future__ import annotations

import calendar
import re
import sys
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import count, cycle, islice
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Row = dict[str, Any]
Keys = dict[Any, str]
"""What a record must have to itself, and what to call it."""
Form = str | tuple[str, ...]
"""What a field must hold: one of the six descriptions below, or the words that it allows."""

TEXT, FLAG, NUMBER = "a string", "true or false", "a number"
INTEGER, DATE, TEXTS = "an integer", "a date (MM-dd-yyyy or ISO 8601)", "a list of strings"

CUSTOMERS, CATEGORIES = "customers", "instrument-categories"
INSTRUMENTS, WORKS = "customer-instrument-details", "works"
"""The kinds of record, named as in the addresses."""

VENDOR_TEXTS: Final = {
    400: "The request contains invalid fields or missing required parameters",
    401: "Invalid or expired access token. Please re-authenticate.",
    403: "You don't have permission to access this resource",
    404: "The requested resource with ID {} does not exist",
    409: "Resource cannot be saved because it violates unique constraints.",
    422: "Cannot process request since one or more validation failed.",
    500: "An unexpected error occurred. Our team has been notified. Reference ID: ERR-12345-67890",
}
"""The vendor's example texts, which the sandbox answers with."""

_CLOSED: Final = ("finished", "cancelled", "closed")
_SPAN: Final = ("DAY", "WEEK", "MONTH", "YEAR")
_ID: Final = re.compile(r"[0-9]{1,18}")
_OWNER: Final = {INSTRUMENTS: "customer_id", WORKS: "customerInstrumentId"}
"""The column of a row that says what it belongs to."""
_FREQUENCY: Final = re.compile(r"[1-9][0-9]{0,4}")
_ISO: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[Tt ](?:[01]\d|2[0-3]):[0-5]\d(?::(?:[0-5]\d|60)(?:\.\d+)?)?"
    r"(?:[Zz]|[+-](?:[01]\d|2[0-3]):?[0-5]\d)?)?",
    re.ASCII,
)
_VENDOR: Final = re.compile(r"(\d\d-\d\d)-(\d{4})(.*)", re.ASCII)


class Refusal(Exception):
    """Metquay refuses: the HTTP ``status`` and the ``message`` of its ErrorResponse; ``detail`` is our part of it."""

    def __init__(self, status: int, message: str, detail: str = "") -> None:
        """Join the vendor's text and ours."""
        super().__init__(f"{message} {detail}".rstrip())
        self.status = status
        self.message = str(self)
        self.detail = detail or message


def refuse(detail: str) -> NoReturn:
    """Raise 400: a value of the wrong type, an unknown word, a bad number."""
    raise Refusal(400, f"{VENDOR_TEXTS[400]}:", detail)


def _invalid(detail: str) -> NoReturn:
    raise Refusal(422, VENDOR_TEXTS[422], detail)


def _fields(form: Form, names: str) -> dict[str, Form]:
    return dict.fromkeys(names.split(), form)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of record: ``asked`` are a request's fields, ``told`` those that only answers have."""

    noun: str
    first_id: int
    required: dict[str, str]
    asked: dict[str, Form]
    told: dict[str, Form] = field(default_factory=dict)
    unanswered: frozenset[str] = frozenset()
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> tuple[str, ...]:
        """The fields of an answer, in its order."""
        return ("id", *(name for name in self.asked if name not in self.unanswered), *self.told)


KINDS: Final[dict[str, Kind]] = {
    CUSTOMERS: Kind(
        "customer",
        10301,
        {"companyName": "Company name is required."},
        _fields(
            TEXT,
            "parentCompanyCode companyCode companyName email website paymentMethod phone mobile fax other workspaceCode"
            " billingAddr1 billingAddr2 billingCity billingState billingZip billingCountry billingPhone1 billingPhone2"
            " shippingAddr1 shippingAddr2 shippingCity shippingState shippingZip shippingCountry"
            " customerSpecificRequirements notes shortName taxCode",
        )
        | _fields(FLAG, "isInactive activateAlerts hasBillingAddress hasShippingAddress isTaxable")
        | _fields(NUMBER, "openingBalance"),
        _fields(FLAG, "isPerson")
        | _fields(
            TEXT,
            "phone2 phone3 billingAddr3 billingFax billingEmailId billingLocation shippingAddr3 shippingPhone1"
            " shippingPhone2 shippingFax shippingEmailId shippingLocation customerSpecificRequirement",
        ),
        defaults={"isTaxable": True}
        | dict.fromkeys(("isInactive", "activateAlerts", "hasBillingAddress", "hasShippingAddress", "isPerson"), False),
    ),
    CATEGORIES: Kind("instrument category", 1, {"name": "Name is required."}, _fields(TEXT, "name description")),
    INSTRUMENTS: Kind(
        "customer instrument",
        8001,
        {
            "name": "Instrument name is required.",
            "companyId": "Company ID is required.",
            "instrumentCategoryName": "Instrument category name is required.",
        },
        _fields(
            TEXT,
            "name companyId instrumentCategoryName serialNo tagNo make model range calibrationFrequency"
            " instrumentStatus workspaceCode",
        )
        | _fields(_SPAN, "calibrationFrequencySpan")
        | _fields(DATE, "lastReceivedDate lastDeliveredDate"),
        _fields(
            TEXT,
            "barcode companyName instrumentName instrumentCategory itemName type tolerance controlNo parentTagNo"
            " departmentName calibrationVendor remarks instrumentNotes calibrationStatus receivedCondition"
            " certificateUrl itemMake itemModel itemRange itemType warrantyCode",
        )
        | _fields(FLAG, "active isCalibratedExternally isMobile isCalibrationRequired")
        | _fields(NUMBER, "calibrationCost")
        | _fields(TEXTS, "projectNames")
        | _fields(
            DATE,
            "calibratedDate dueDate verificationDueDate auditedDate warrantyExpiration createdDate modifiedDate",
        ),
        unanswered=frozenset({"name", "companyId", "instrumentCategoryName", "instrumentStatus"}),
        defaults={"active": True, "isCalibratedExternally": False, "isMobile": False, "projectNames": []},
    ),
    WORKS: Kind(
        "work",
        21401,
        {"customerInstrumentId": "Customer instrument ID is required."},
        _fields(INTEGER, "customerInstrumentId")
        | _fields(FLAG, "accreditation complianceRequired siteJob outsource")
        | _fields(
            TEXT,
            "customerSpecificRequirements scope certificateAddress remarks salesOrderNo workspaceCode subConDetails",
        )
        | _fields(("Calibration", "Testing", "Evaluation"), "workFlowType")
        | _fields(DATE, "inDate deliveryDate"),
        _fields(
            TEXT,
            "workNo customer instrumentName instrumentSerialNo instrumentTagNo instrumentBarcode"
            " instrumentCategoryName itemDescription departmentName status reportType accreditationType procedure"
            " technician certificateNo finishedBy salesPerson customerPoNo soDescription workspace jobType",
        )
        | _fields(INTEGER, "revisionNo")
        | _fields(DATE, "workDate dueDate finishedDate recommendedDueDate calibratedDate workStartDate"),
        defaults={"workFlowType": "Calibration", "status": "Open", "reportType": "Certificate", "revisionNo": 1}
        | dict.fromkeys(("accreditation", "complianceRequired", "siteJob", "outsource"), False),
    ),
}


def parse_date(text: str) -> date:
    """Read ``MM-dd-yyyy`` or ISO 8601, each with or without a time: the day as written, whatever its zone.

    Raises ValueError.
    """
    if vendor := _VENDOR.fullmatch(text):
        text = f"{vendor[2]}-{vendor[1]}{vendor[3]}"
    if (iso := _ISO.fullmatch(text)) is None:
        raise ValueError(f"not a day: {text!r}")
    return date.fromisoformat(iso[1])


def date_text(day: date) -> str:
    """Write a day as Metquay answers it: ``MM-dd-yyyy``."""
    return f"{day.month:02}-{day.day:02}-{day.year:04}"


def due_date(start: date, frequency: str, span: str) -> date:
    """Count ``frequency`` spans on, to the last day of a month too short. Raises ValueError, OverflowError."""
    count = int(frequency)
    if span in ("DAY", "WEEK"):
        return start + timedelta(days=count * (7 if span == "WEEK" else 1))
    year, month = divmod(start.year * 12 + start.month - 1 + count * (12 if span == "YEAR" else 1), 12)
    return date(year, month + 1, min(start.day, calendar.monthrange(year, month + 1)[1]))


def _value(name: str, form: Form, value: Any) -> Any:  # noqa: ANN401 - JSON in, a record's value out
    match value:
        case bool():
            if form == FLAG:
                return value
        case int() | float() if form == INTEGER and value == value // 1:
            return int(value)
        case int() | float() if form == NUMBER and abs(value) <= sys.float_info.max:
            return float(value)
        case str() if form == DATE:
            try:
                return parse_date(value)
            except ValueError:
                pass
        case str() if form == TEXT or (isinstance(form, tuple) and value in form):
            return value
        case list() if form == TEXTS and all(isinstance(text, str) for text in value):
            return value
    refuse(f"{name} must be {form if isinstance(form, str) else 'one of ' + ', '.join(form)}")


def _blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _fold(text: str) -> str:
    return text.strip().casefold()


def _checked(kind: Kind, body: object, *, seeding: bool = False) -> Row:
    """Return the known fields, typed (400) and complete (422); a seed may hold answer fields and an id as well."""
    if not isinstance(body, dict):
        refuse("the body must be a JSON object")
    forms = kind.asked | kind.told | {"id": INTEGER} if seeding else kind.asked
    if seeding and (unknown := next((name for name in body if name not in forms), None)):
        refuse(f"a {kind.noun} has no field {unknown!r}")
    given = {name: _value(name, form, body[name]) for name, form in forms.items() if name in body}
    if missing := [text for name, text in kind.required.items() if _blank(given.get(name))]:
        _invalid(" ".join(missing))
    return given


@dataclass(slots=True)
class _Table:
    next_id: int
    rows: dict[int, Row] = field(default_factory=dict)
    """In the order of creation; a variant, which is made anew whenever it is asked for, has the row that it varies."""
    owners: dict[Any, int] = field(default_factory=dict)
    """Whose each key is, but for those of variants."""
    varied_for: dict[int, int] = field(default_factory=dict)
    """A variant's id, and that of what it belongs to."""


def local_day() -> date:
    """Return the machine's day."""
    return datetime.now().astimezone().date()


class Records:
    """All records of one laboratory, in memory; ``version`` grows with each write.

    Every method that takes a request's body raises ``Refusal`` exactly where Metquay would answer an error.
    """

    def __init__(self, today: Callable[[], date] = local_day) -> None:
        """Start empty; ``today`` gives the laboratory's day."""
        self.version = 0
        self.today = today
        self._tables = {name: _Table(kind.first_id) for name, kind in KINDS.items()}
        self._vary: Callable[[str, Row, int], Row] = lambda _kind, row, _row_id: row
        self._build = {
            CUSTOMERS: self._customer,
            CATEGORIES: self._category,
            INSTRUMENTS: self._instrument,
            WORKS: self._work,
        }

    def copy(self, today: Callable[[], date]) -> Records:
        """Return records that change independently; rows are shared, because none is ever changed in place."""
        twin = Records(today)
        twin._vary = self._vary
        for kind, table in self._tables.items():
            twin._tables[kind] = _Table(table.next_id, dict(table.rows), dict(table.owners), dict(table.varied_for))
        return twin

    def fill(self, number: int, vary: Callable[[str, Row, int], Row]) -> None:
        """Add variants of the customers, instruments and works that are there, until there are ``number`` of each.

        They take the memory of their ids: each is made anew whenever it is asked for, until a write makes it a record
        of its own. ``vary`` takes a kind, a row and the variant's id, and returns what differs; that includes whatever
        must be unique, with the id in it. A customer's variant has variants of its instruments, and these of its works.
        """
        self._vary = vary
        for kind in (CUSTOMERS, INSTRUMENTS, WORKS):
            table = self._tables[kind]
            variants = islice(self._variants(kind), max(0, number - len(table.rows)))
            for row_id, (row, owner_id) in zip(count(table.next_id), variants, strict=False):
                table.rows[row_id] = row
                table.next_id = row_id + 1
                if kind in _OWNER:
                    table.varied_for[row_id] = owner_id

    def _variants(self, kind: str) -> Iterator[tuple[Row, int]]:
        """Yield, without end, a row to vary and the id of what the variant belongs to."""
        rows = [row for row in self._tables[kind].rows.values() if "parent_id" not in row]
        if kind == CUSTOMERS:
            yield from ((row, 0) for row in cycle(rows))
            return
        belongings: dict[int, list[Row]] = {}
        for row in rows:
            belongings.setdefault(row[_OWNER[kind]], []).append(row)
        owners = self._tables[CUSTOMERS if kind == INSTRUMENTS else INSTRUMENTS].rows.items()
        # variants come first, since they have nothing yet
        for owner_id, owner in cycle(sorted(owners, key=lambda item: item[0] == item[1]["id"])) if rows else ():
            yield from ((row, owner_id) for row in belongings.get(owner["id"], ()))

    def create(self, kind: str, body: object) -> int:
        """POST: the new record's id."""
        return self._insert(kind, _checked(KINDS[kind], body))

    def load(self, kind: str, entry: object) -> int:
        """Take a record of a seed: as ``create``, but answer-only fields and ``id`` may be set too."""
        given = _checked(KINDS[kind], entry, seeding=True)
        row_id = given.get("id", 1)
        if row_id < 1 or ("id" in given and row_id in self._tables[kind].rows):
            refuse(f"id {row_id} is below 1 or used twice")
        return self._insert(kind, given)

    def replace(self, kind: str, row_id: int, body: object) -> None:
        """PUT: fields that the body leaves out are reset; what only the laboratory sets stays."""
        given = _checked(KINDS[kind], body)
        old = self._row(kind, row_id)
        if kind == WORKS and old["status"].casefold().startswith(_CLOSED):
            _invalid(f"Work {old['workNo']} is {old['status'].lower()} and cannot be modified.")
        kept = {name: old[name] for name in old if name not in KINDS[kind].asked}
        row = self._build[kind]({**KINDS[kind].defaults, **kept, **given}, old)
        self._check_unique(kind, row)
        if kind == CATEGORIES and self._users("category_id", row_id):
            raise Refusal(409, "Resource cannot be updated because the category has associated instruments.")
        self._store(kind, row)

    def delete(self, kind: str, row_id: int) -> None:
        """DELETE: refused with 409 while other records depend on this one."""
        self._row(kind, row_id)
        for column, dependents in _DEPENDENTS[kind].items():
            if self._users(column, row_id):
                text = f"Resource cannot be deleted because the {KINDS[kind].noun} has associated {dependents}."
                raise Refusal(409, text)
        self._forget(kind, row_id)
        del self._tables[kind].rows[row_id]
        self.version += 1

    def page(self, kind: str, first: int = 0, limit: int = 50, workspace: str = "") -> list[Row]:
        """GET: ``limit`` answers from the ``first`` (from 0) on, in the order of creation; "" means every workspace."""
        rows = self._tables[kind].rows
        ids = (row_id for row_id, row in rows.items() if row.get("workspaceCode") == workspace) if workspace else rows
        return [self.answer(kind, row_id) for row_id in islice(ids, first, first + limit)]

    def answer(self, kind: str, row_id: int) -> Row:
        """One record as lists show it (the API itself has no such operation). Raises ``Refusal`` 404."""
        return self._answer(kind, self._row(kind, row_id))

    def counts(self) -> dict[str, int]:
        """How many records there are of each kind."""
        return {kind: len(table.rows) for kind, table in self._tables.items()}

    def _insert(self, kind: str, given: Row) -> int:
        table = self._tables[kind]
        row_id: int = given.setdefault("id", table.next_id)
        row = self._build[kind]({**KINDS[kind].defaults, **given}, None)
        self._check_unique(kind, row)
        self._store(kind, row)
        table.next_id = max(table.next_id, row_id + 1)
        return row_id

    def _row(self, kind: str, row_id: int) -> Row:
        table = self._tables[kind]
        try:
            row = table.rows[row_id]
        except KeyError:
            raise Refusal(404, VENDOR_TEXTS[404].format(row_id)) from None
        if row["id"] == row_id:
            return row
        belongs = {_OWNER[kind]: table.varied_for[row_id]} if kind in _OWNER else {}
        return {**row, "id": row_id, **belongs, **self._vary(kind, row, row_id)}

    def _users(self, column: str, row_id: int) -> bool:
        table = self._tables[WORKS if column == "customerInstrumentId" else INSTRUMENTS]
        varied_for = table.varied_for if column in _OWNER.values() else {}
        return any(varied_for.get(user, row.get(column)) == row_id for user, row in table.rows.items())

    def _owner(self, kind: str, key: object) -> int | None:
        """Return the id of the record that has this key; a variant's key has its id in it, and need not be kept."""
        table = self._tables[kind]
        if key in table.owners:
            return table.owners[key]
        ids = (row_id for row_id in map(int, _ID.findall(str(key))) if row_id in table.rows)
        return next((row_id for row_id in ids if key in _keys(kind, self._row(kind, row_id))), None)

    def _check_unique(self, kind: str, row: Row) -> None:
        for key, name in _keys(kind, row).items():
            if self._owner(kind, key) not in (None, row["id"]):
                noun = KINDS[kind].noun
                detail = f"{'An' if noun[0] in 'aeiou' else 'A'} {noun} with this {name} already exists."
                raise Refusal(409, VENDOR_TEXTS[409], detail)

    def _store(self, kind: str, row: Row) -> None:
        table = self._tables[kind]
        if row["id"] in table.rows:
            self._forget(kind, row["id"])
        table.rows[row["id"]] = row
        table.owners.update(dict.fromkeys(_keys(kind, row), row["id"]))
        self.version += 1

    def _forget(self, kind: str, row_id: int) -> None:
        """Give back what a record has to itself."""
        table = self._tables[kind]
        for key in _keys(kind, self._row(kind, row_id)):
            table.owners.pop(key, None)
        table.varied_for.pop(row_id, None)

    def _customer(self, row: Row, old: Row | None) -> Row:
        code = row.get("companyCode", "").strip()
        if old is not None:
            if code not in ("", old["companyCode"].strip()):
                _invalid("Company code cannot be changed.")
            row["companyCode"] = old["companyCode"]
        elif not code:
            row["companyCode"] = f"C-{row['id']}"
            while self._owner(CUSTOMERS, ("code", _fold(row["companyCode"]))) is not None:
                row["companyCode"] += "-1"
        return row

    def _category(self, row: Row, _old: Row | None) -> Row:
        return row

    def _instrument(self, row: Row, old: Row | None) -> Row:
        company, category = row["companyId"].strip(), row["instrumentCategoryName"].strip()
        customer_id = self._owner(CUSTOMERS, ("code", _fold(company)))
        if customer_id is None and _ID.fullmatch(company):
            customer_id = int(company)
        known = customer_id in self._tables[CUSTOMERS].rows
        problems = [] if known else [f"Customer with ID or code {company} does not exist."]
        if (category_id := self._owner(CATEGORIES, _fold(category))) is None:
            problems.append(f"Instrument category {category} does not exist.")
        if problems:
            _invalid(" ".join(problems))
        today = self.today()
        row |= {"instrumentName": row["name"], "customer_id": customer_id, "category_id": category_id}
        if old is not None or "modifiedDate" not in row:
            row["modifiedDate"] = today
        created = row.setdefault("createdDate", today)
        row.setdefault("calibratedDate", created)
        row.setdefault("barcode", f"MQ-{created.year}-{row['id']:05}")
        self._schedule(row, old)
        if (tag := row.pop("parentTagNo", None)) is not None:
            instruments = (self._row(INSTRUMENTS, row_id) for row_id in self._tables[INSTRUMENTS].rows)
            family = [i for i in instruments if i["customer_id"] == customer_id]
            row["parent_id"] = next((i["id"] for i in family if i.get("tagNo") == tag), None)
            if row["parent_id"] is None:
                _invalid(f"The customer has no instrument with tag {tag}.")
        return row

    def _schedule(self, row: Row, old: Row | None) -> None:
        frequency, span = row.get("calibrationFrequency", "").strip(), row.get("calibrationFrequencySpan")
        if frequency and not _FREQUENCY.fullmatch(frequency):
            _invalid("Calibration frequency must be a whole number from 1 to 99999.")
        row["isCalibrationRequired"] = bool(frequency and span)
        if frequency and span:
            try:
                row["dueDate"] = due_date(row["calibratedDate"], frequency, span)
            except (ValueError, OverflowError):
                _invalid("Calibration frequency leads to a due date after the year 9999.")
        elif old is not None:
            row.pop("dueDate", None)

    def _work(self, row: Row, old: Row | None) -> Row:
        if row["customerInstrumentId"] not in self._tables[INSTRUMENTS].rows:
            _invalid(f"Customer instrument with ID {row['customerInstrumentId']} does not exist.")
        if old is None:
            arrived = row.setdefault("inDate", self.today())
            row.setdefault("workDate", arrived)
            row.setdefault("workNo", f"CAL-{arrived.year}-{row['id']:06}")
        row["jobType"] = "At Customers Place" if row["siteJob"] else "Subcon" if row["outsource"] else "At Lab"
        row["accreditationType"] = "Accredited" if row["accreditation"] else "Non-Accredited"
        return row

    def _answer(self, kind: str, row: Row) -> Row:
        wire = row if kind in (CUSTOMERS, CATEGORIES) else {**row, **self._joined(kind, row)}
        return {
            name: date_text(value) if isinstance(value, date) else value
            for name in _ANSWERED[kind]
            if (value := wire.get(name)) is not None
        }

    def _joined(self, kind: str, row: Row) -> Row:
        instrument = row if kind == INSTRUMENTS else self._row(INSTRUMENTS, row["customerInstrumentId"])
        customer = self._row(CUSTOMERS, instrument["customer_id"])["companyName"]
        category = self._row(CATEGORIES, instrument["category_id"])["name"]
        if kind == INSTRUMENTS:
            parent = self._row(INSTRUMENTS, row["parent_id"]) if "parent_id" in row else {}
            return {"companyName": customer, "instrumentCategory": category, "parentTagNo": parent.get("tagNo")}
        return {
            "customer": customer,
            "instrumentCategoryName": category,
            "instrumentName": instrument["instrumentName"],
            "instrumentSerialNo": instrument.get("serialNo"),
            "instrumentTagNo": instrument.get("tagNo"),
            "instrumentBarcode": instrument["barcode"],
            "itemDescription": row.get("itemDescription", instrument.get("itemName")),
            "departmentName": row.get("departmentName", instrument.get("departmentName")),
            "dueDate": row.get("dueDate", row.get("deliveryDate")),
            "workspace": row.get("workspace", row.get("workspaceCode")),
        }


def _keys(kind: str, row: Row) -> Keys:
    if kind == CUSTOMERS:
        name, code = _fold(row["companyName"]), _fold(row["companyCode"])
        return {("name", name): "company name", ("code", code): "company code"}
    if kind == INSTRUMENTS:
        pair = (_fold(row.get("serialNo") or ""), _fold(row.get("tagNo") or ""))
        return {(row["customer_id"], *pair): "serial and tag number"} if all(pair) else {}
    return {_fold(row["workNo"]): "work number"} if kind == WORKS else {_fold(row["name"]): "name"}


_ANSWERED: Final = {name: kind.answered for name, kind in KINDS.items()}

_DEPENDENTS: Final[dict[str, dict[str, str]]] = {
    CUSTOMERS: {"customer_id": "instruments or works"},
    CATEGORIES: {"category_id": "instruments"},
    INSTRUMENTS: {"customerInstrumentId": "works", "parent_id": "child instruments"},
    WORKS: {},
}


def _pairs(text: str) -> dict[str, str]:
    pairs = (pair.partition(":") for pair in text.split())
    return {old: new or old for old, _, new in pairs}


_LEGACY: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "customer": (
        CUSTOMERS,
        _pairs(
            "companyName companyCode companyPhone1:phone companyPhone2:mobile companyFax:fax companyEmail:email website"
            " addressField1:billingAddr1 addressField2:billingAddr2 city:billingCity state:billingState"
            " postalCode:billingZip country:billingCountry"
        ),
    ),
    "customerInstrument": (
        INSTRUMENTS,
        _pairs(
            "customerInstrumentName:name serialNo tagNo instrumentMake:make instrumentModel:model instrumentRange:range"
        ),
    ),
    "work": (
        WORKS,
        _pairs(
            "accreditation complianceRequired siteJob outsource salesOrderNo customerSpecificRequirements scope"
            " certificateAddress remarks taskType:workFlowType"
        ),
    ),
}
"""The older interface's names for a kind of record and its fields."""

LEGACY_CALLS: Final = frozenset(
    f"{noun}/{verb}{noun[0].upper()}{noun[1:]}"
    for noun in _LEGACY
    for verb in (("createOrUpdate",) if noun == "work" else ("create", "update", "delete"))
)
"""The paths of the older interface below ``/FlexicalERP/rest/``."""


def legacy(records: Records, call: str, body: Row) -> Row:
    """One of ``LEGACY_CALLS`` on the same records: the answer's body, failure and success alike being HTTP 200.

    Success is ``responseCode`` "700" in the body; the codes of its failures are unpublished, so they are our statuses.
    """
    try:
        row_id = _legacy_write(records, call, body)
    except Refusal as refusal:
        return legacy_failure(refusal.status, refusal.message)
    response: Row = {"calibrId": row_id}
    if call.startswith("work/"):
        response["workNo"] = records.answer(WORKS, row_id)["workNo"]
    text = "The record has been saved"
    return {"responseCode": "700", "shortMessage": "Success", "longMessage": text, "response": response}


def legacy_failure(status: int, message: str) -> Row:
    """The body of a failed call."""
    return {"responseCode": str(status), "shortMessage": "Failure", "longMessage": message, "response": {}}


def _legacy_write(records: Records, call: str, body: Row) -> int:
    noun, _, action = call.partition("/")
    kind, names = _LEGACY[noun]
    match body.get(f"northlab{noun[0].upper()}{noun[1:]}"):
        case [dict() as old, *_]:
            pass
        case _:
            refuse("the model must be a list of one object")
    match old.get("companyAddress"):
        case [dict() as address, *_]:
            old = address | old
    row_id = _legacy_id(old, "calibrId")
    if action.startswith("delete"):
        records.delete(kind, row_id)
        return row_id
    new = {names[name]: value for name, value in old.items() if name in names and value not in _LEGACY_EMPTY}
    if kind == INSTRUMENTS:
        category = records.answer(CATEGORIES, _legacy_id(old, "instrumentCategoryCalibrId"))["name"]
        new |= {"companyId": str(_legacy_id(old, "companyCalibrId")), "instrumentCategoryName": category}
        if old.get("calibrationFrequency") not in _LEGACY_EMPTY:
            new |= {"calibrationFrequency": str(old["calibrationFrequency"]), "calibrationFrequencySpan": "DAY"}
    if kind == WORKS:
        new["customerInstrumentId"] = _legacy_id(old, "customerInstrumentCalibrId")
    if row_id == 0:
        return records.create(kind, new)
    records.replace(kind, row_id, new)
    return row_id


_LEGACY_EMPTY: Final = (None, "", "None", "False")
"""What the add-on sends for a field without a value."""


def _legacy_id(old: Row, name: str) -> int:
    text = str(old.get(name))
    return int(text) if _ID.fullmatch(text) else 0
