"""Whole lists: what is asked for, page after page of it, and the records as JSON or CSV.

Owns the query of ``/-/lists/NAME.csv`` and ``.json``, the place in a list that goes on changing while it is read, and
what the rows look like. Must not do I/O, wait or know HTTP: a driver sends the target that ``Pager`` names, hands it
the answer's body, and passes on what a writer makes of the records that are new.

Facts:

* Metquay's lists take ``first`` (from 0), ``limit`` (50 by default, no maximum is documented) and ``workspaceCode``. An
  answer is a bare array, and says neither how many records there are nor where in the list it is. By which field a list
  is sorted is unknown.
* Its answers hold dates as MM-dd-yyyy, whatever the specification says, and fields that the specification lacks.
* RFC 8259: a number is text of any length and precision; a text may hold escaped surrogates without partner.
* RFC 4180: lines end with CRLF; a cell with a comma, quote or line end stands in quotes, and quotes in it are doubled.
* Excel reads a file as UTF-8 if it begins with a byte order mark. CWE-1236: a spreadsheet runs text that begins like a
  formula; after an apostrophe it does not.

Paging: each page after the first is asked for from where the last record sent was seen, so that the two overlap. A page
is one look at the list, without gaps: behind the last record sent stands what follows it, whatever was inserted,
deleted or changed meanwhile. So each record that is there all the time comes exactly once, in order, as long as such
records keep their order. Where the last record sent is not found, some before it were deleted, or it was itself: up to
three pages are read that begin earlier, and if it is in none, the transfer breaks. It counts as not found, too, where
it was moved itself, as can be seen if a record before it is none of the last two pages' new ones, or one behind it is.

The end: a server may give fewer than ``limit``, by number or by bytes, so a short page proves nothing, not even one
that holds the last record sent and no other: then the page behind that one is asked for, and only if it is empty the
list ends. As long as one record is all that came, it must also be found still first and alone after that. Whether a
longer list of a server that gives one record at a time came whole can't be proved by any means: the transfer breaks.
"""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import date
from typing import Any, Final, NamedTuple

from metquay_proxy.rules.errors import ProxyError

LIMIT: Final = 500
"""Records that a page is asked to hold,"""
MAX_PAGE: Final = 16 * 1024 * 1024
"""and bytes that it may have, of which whoever receives it takes care."""
MAX_FRUITLESS: Final = 3
"""So many pages in a row may bring nothing new, the last of all apart."""
MAX_UNKNOWN: Final = 100
"""Columns for fields that the vendor's schema lacks."""

_SCHEMA: Final = """
customers: id parentCompanyCode companyCode isInactive companyName email website paymentMethod phone mobile fax other
activateAlerts workspaceCode hasBillingAddress billingAddr1 billingAddr2 billingCity billingState billingZip
billingCountry billingPhone1 billingPhone2 hasShippingAddress shippingAddr1 shippingAddr2 shippingCity shippingState
shippingZip shippingCountry customerSpecificRequirements notes shortName isTaxable taxCode openingBalance
customer-instrument-details: id barcode companyName instrumentName instrumentCategory itemName make model range type
tolerance serialNo tagNo controlNo calibrationFrequency workspaceCode calibrationFrequencySpan calibratedDate dueDate
active parentTagNo departmentName verificationDueDate calibrationCost isCalibratedExternally calibrationVendor
remarks instrumentNotes isMobile isCalibrationRequired lastReceivedDate lastDeliveredDate calibrationStatus
receivedCondition auditedDate certificateUrl projectNames
works: id workNo customerInstrumentId inDate accreditation complianceRequired siteJob outsource
customerSpecificRequirements scope certificateAddress remarks workFlowType deliveryDate salesOrderNo workspaceCode
subConDetails customer instrumentName instrumentSerialNo instrumentTagNo instrumentBarcode instrumentCategoryName
itemDescription departmentName status reportType accreditationType procedure technician workDate dueDate revisionNo
certificateNo finishedDate finishedBy salesPerson recommendedDueDate calibratedDate workStartDate customerPoNo
soDescription workspace jobType"""
FIELDS: Final = {name: tuple(fields.split()) for name, fields in re.findall(r"(?m)^(\S+):([^:]+)$", _SCHEMA)}
"""The lists that there are, and the fields of their records in the order of the vendor's schema."""
DATES: Final = ("Date", "Expiration")
"""How the names of those fields end that hold dates by the schema, or in live answers."""

CONTENT_TYPES: Final = {"csv": "text/csv; charset=utf-8; header=present", "json": "application/json; charset=utf-8"}
"""A list's format, as its path ends, to the value of Content-Type."""
_OPTIONS: Final = {"csv": {"dates=vendor", "formulas=keep"}, "json": set[str]()}

_BEGIN: Final = re.compile(r"[ \t\n\r]*+\[[ \t\n\r]*+(?:(?=\{)|(\])[ \t\n\r]*+\Z)")
_BETWEEN: Final = re.compile(r"[ \t\n\r]*+(?:,[ \t\n\r]*+(?=\{)|(\])[ \t\n\r]*+\Z)")
_ID: Final = re.compile(r"-?[0-9]{1,18}")
_VENDORS_DATE: Final = re.compile(r"([0-9]{2})-([0-9]{2})-([0-9]{4})")
_RUNS: Final = re.compile(r"[^\S\t\r\n]*+(?:[=@\t\r\n]|[+-](?![0-9 ().,/-]*+\Z))")
_WORDS: Final = {None: "", True: "true", False: "false"}
_UNBEARABLE: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class ListQuery(NamedTuple):
    """What is asked for: ``/-/lists/{name}.{format}``, and the ``options`` that its query holds for the proxy.

    ``passed_on`` is what the query holds for Metquay, byte for byte and with an ampersand before it.
    """

    name: str
    format: str
    passed_on: str = ""
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, file: str, query: str | None) -> ListQuery:
        """Read what follows ``/-/lists/`` in a path, and its query. ProxyError no-such-page or bad-request."""
        name, _, ending = file.rpartition(".")
        if name not in FIELDS or ending not in CONTENT_TYPES:
            message = f"There is no such list. Ask for /-/lists/NAME.csv or .json; NAME is one of {', '.join(FIELDS)}."
            raise ProxyError("no-such-page", message)
        asked = query.split("&") if query else []
        passed_on = [option for option in asked if option.startswith("workspaceCode=")]
        options = [option for option in asked if option not in passed_on]
        if len(passed_on) > 1 or len(set(options)) < len(options) or not _OPTIONS[ending].issuperset(options):
            may = "it may hold workspaceCode=... and, for .csv, dates=vendor and formulas=keep, each once"
            whole = "first and limit can't be chosen, because a list comes whole"
            raise ProxyError("bad-request", f"The query of this list was refused: {may}; {whole}. Nothing was sent.")
        return cls(name, ending, "".join(f"&{option}" for option in passed_on), tuple(options))


class Number(str):
    """A JSON number as it came: 1.10 stays 1.10, and 1e400 is not infinite."""

    __slots__ = ()


class Record(NamedTuple):
    """One record: its JSON as it came, and its fields."""

    text: str
    fields: dict[str, Any]


# NaN and Infinity, which are no JSON, are no numbers to int() either.
_DECODER: Final = json.JSONDecoder(parse_float=Number, parse_int=Number, parse_constant=int)


def _unreadable(why: object) -> ProxyError:
    message = f"Metquay's list can't be read: {why}. What came of it, if anything, is not whole. Ask for it again."
    return ProxyError("upstream-protocol", message, sent="yes")


def read_page(body: bytes) -> dict[int, Record]:
    """Return the records of a page by their ids, in order, in time linear in its bytes.

    ProxyError upstream-protocol for what is no UTF-8, no JSON, nested too deeply, or no array of objects, each with an
    integer ``id`` (of 18 digits at most) of its own.
    """
    records: dict[int, Record] = {}
    try:
        text = body.decode()
        mark = _BEGIN.match(text)
        while mark and not mark[1]:
            fields, end = _DECODER.raw_decode(text, mark.end())
            number = fields.get("id")
            if not isinstance(number, Number) or not _ID.fullmatch(number) or int(number) in records:
                raise ValueError(f"record {len(records) + 1} of a page has no integer id of its own")
            records[int(number)] = Record(text[mark.end() : end], fields)
            mark = _BETWEEN.match(text, end)
    except (ValueError, RecursionError) as why:
        raise _unreadable(why) from None
    if not mark:
        raise _unreadable("a page is no array of objects")
    return records


class Pager:
    """The way through a list: send ``target`` and ``feed`` the answer's body, until it is ``complete``."""

    def __init__(self, query: ListQuery) -> None:
        self.complete = False
        self._query = query
        self._first = 0
        self._fruitless = 0
        self._behind = self._was_empty = False
        self._earlier: list[int] = []
        self._latest: list[int] = []

    @property
    def target(self) -> str:
        """The target of the next page, below the API's prefix."""
        return f"/{self._query.name}?first={self._first}&limit={LIMIT}{self._query.passed_on}"

    def feed(self, body: bytes) -> list[Record]:
        """Return the records of a page that are new, maybe none.

        ProxyError upstream-protocol if it can't be read (see ``read_page``), or if the place in the list is lost.
        """
        page = read_page(body)
        ids = list(page)
        recent = {*self._earlier, *self._latest}
        known = [number for number in ids if number in recent]
        lost = known != ids[: len(known)] or known[-1:] != self._latest[-1:]
        new = [] if lost else ids[len(known) :]
        self._fruitless = 0 if new else self._fruitless + 1
        if new:
            self._earlier, self._latest = self._latest, new
        if lost:
            self._first = max(0, self._first - (1 if self._behind else len(self._latest)))
            self.complete = self._behind and not ids and len(recent) > 1
        else:
            self._first += len(ids) - 1 or 1
            self.complete = not ids or (self._was_empty and len(ids) == 1)
        self._was_empty = self._behind and not ids
        self._behind = not (lost or len(ids) > 1)
        if self._fruitless > MAX_FRUITLESS and not self.complete:
            raise _unreadable("the place in it was lost, as records were deleted or moved, or come one at a time")
        return [page[number] for number in new]


class JsonWriter:
    """Makes a JSON array of the records as they came, one on a line."""

    end: Final = b"]"

    def begin(self, records: list[Record]) -> bytes:
        """Return the beginning, with the records of the first page. If there are none, ``end`` must follow."""
        return ("[" + ",\n".join(record.text for record in records)).encode()

    def more(self, records: list[Record]) -> bytes:
        """Return further records."""
        return "".join(f",\n{record.text}" for record in records).encode()


class CsvWriter:
    """Makes CSV with a column for each field of the vendor's schema, and for those that the first page has beside them.

    Fields that come up later are left out, since the header was sent by then. Control characters and surrogates without
    partner, which spreadsheets or UTF-8 do not bear, become U+FFFD.
    """

    end: Final = b""

    def __init__(self, query: ListQuery) -> None:
        self._columns = FIELDS[query.name]
        self._dates = () if "dates=vendor" in query.options else DATES
        self._guard = str if "formulas=keep" in query.options else _guarded

    def begin(self, records: list[Record]) -> bytes:
        """Return a byte order mark, the header and the records of the first page."""
        names = dict.fromkeys(name for record in records for name in record.fields)
        self._columns += tuple(name for name in names if name not in self._columns)[:MAX_UNKNOWN]
        return "\ufeff".encode() + _lines([[self._guard(column) for column in self._columns]]) + self.more(records)

    def more(self, records: list[Record]) -> bytes:
        """Return further records. ProxyError upstream-protocol where a value is nested too deeply to be written."""
        try:
            return _lines([[self._cell(name, record.fields.get(name)) for name in self._columns] for record in records])
        except RecursionError as why:
            raise _unreadable(why) from None

    def _cell(self, column: str, value: object) -> str:
        if isinstance(value, list) and all(type(part) is str for part in value):
            value = "; ".join(value)
        if type(value) is str:
            return self._guard(_iso(value) if column.endswith(self._dates) else value)
        return _WORDS[value] if value is None or isinstance(value, bool) else _compact(value)


def _lines(rows: list[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return _UNBEARABLE.sub("\ufffd", text.getvalue()).encode()


def _guarded(text: str) -> str:
    return f"'{text}" if _RUNS.match(text) else text


def _iso(text: str) -> str:
    match = _VENDORS_DATE.fullmatch(text)
    try:
        return date(int(match[3]), int(match[1]), int(match[2])).isoformat() if match else text
    except ValueError:
        return text


def _compact(value: object) -> str:
    """Return JSON without blanks, in which numbers are as they came: ``json.dumps`` would take them for text."""
    if isinstance(value, list):
        return "[" + ",".join(map(_compact, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_compact(name)}:{_compact(part)}" for name, part in value.items()) + "}"
    return value if isinstance(value, Number) else json.dumps(value, ensure_ascii=False)
