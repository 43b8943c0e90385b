from __future__ import annotations

import csv
import io
import json
import os
import re
import time
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.lists import (
    CONTENT_TYPES,
    DATES,
    FIELDS,
    MAX_PAGE,
    MAX_UNKNOWN,
    CsvWriter,
    JsonWriter,
    ListQuery,
    Number,
    Pager,
    Record,
    read_page,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

OPENAPI_FILE = os.environ.get("OPENAPI_FILE")
with_file = pytest.mark.skipif(OPENAPI_FILE is None, reason="OPENAPI_FILE is not set")

WORKS = ListQuery("works", "csv")
RESPONSES = {
    "customers": "CustomerResponse",
    "customer-instrument-details": "CustomerInstrumentResponse",
    "works": "WorkResponse",
}


class TestQuery:
    @pytest.mark.parametrize(
        ("query", "file", "asked"),
        [
            *[(ListQuery(name, "csv"), f"{name}.csv", None) for name in RESPONSES],
            *[(ListQuery(name, "json"), f"{name}.json", "") for name in RESPONSES],
            (ListQuery("works", "json", "&workspaceCode=a%20b+%C3%A9"), "works.json", "workspaceCode=a%20b+%C3%A9"),
            (ListQuery("works", "csv", "&workspaceCode="), "works.csv", "workspaceCode="),
            (ListQuery("works", "csv", "", ("dates=vendor",)), "works.csv", "dates=vendor"),
            (
                ListQuery("works", "csv", "&workspaceCode=a=b", ("formulas=keep", "dates=vendor")),
                "works.csv",
                "formulas=keep&workspaceCode=a=b&dates=vendor",
            ),
        ],
    )
    def test_accepted(self, query: ListQuery, file: str, asked: str | None) -> None:
        """A list is named by the path; workspaceCode stays byte for byte, and the rest is for the proxy."""
        assert query == ListQuery.parse(file, asked)

    @pytest.mark.parametrize(
        ("file", "asked"),
        [
            *[("works.csv", f"{option}=1") for option in ("first", "limit", "dates", "x", "workspacecode", "%66irst")],
            *[("works.csv", option) for option in ("workspaceCode", "formulas=guard", "dates=vendor=", "a&", "&")],
            *[("works.csv", "&".join([option] * 2)) for option in ("workspaceCode=a", "dates=vendor", "formulas=keep")],
            ("works.csv", "workspaceCode=a&dates=vendor&workspaceCode=b"),
            *[("works.json", option) for option in ("dates=vendor", "formulas=keep", "workspaceCode=a&limit=5")],
        ],
    )
    def test_refused(self, file: str, asked: str) -> None:
        """Anything else, or the same twice, is refused by a text that says what may be asked for."""
        with pytest.raises(ProxyError) as caught:
            ListQuery.parse(file, asked)
        assert ("bad-request", 400, "no") == (caught.value.slug, caught.value.status, caught.value.sent)
        for word in ("workspaceCode", "dates=vendor", "formulas=keep", "first", "limit"):
            assert word in caught.value.message

    @pytest.mark.parametrize(
        "file",
        [
            "",
            "works",
            ".csv",
            "works.",
            "works.xml",
            "works.CSV",
            "Works.csv",
            "works.csv.json",
            "a/works.csv",
            "x.json",
        ],
    )
    def test_no_such_list(self, file: str) -> None:
        """An unknown name or format is not found, and the text names those that there are."""
        with pytest.raises(ProxyError) as caught:
            ListQuery.parse(file, "first=1")
        assert ("no-such-page", 404) == (caught.value.slug, caught.value.status)
        for word in (*RESPONSES, ".csv", ".json"):
            assert word in caught.value.message

    def test_the_head_that_goes_with_it(self) -> None:
        """Its type says what it is, and in which charset."""
        json_type = "application/json; charset=utf-8"
        assert {"csv": "text/csv; charset=utf-8; header=present", "json": json_type} == CONTENT_TYPES

    @with_file
    def test_the_fields_are_those_of_the_vendor(self) -> None:
        """Columns stand in the order of the vendor's file, and those count as dates that it calls so."""
        schemas = json.loads(Path(OPENAPI_FILE or "").read_text(encoding="utf-8"))["components"]["schemas"]
        assert RESPONSES.keys() == FIELDS.keys()
        for name, response in RESPONSES.items():
            properties = schemas[response]["properties"]
            assert tuple(properties) == FIELDS[name]
            dates = [field for field, described in properties.items() if "date" in described.get("format", "")]
            assert dates == [field for field in properties if field.endswith(DATES)]

    def test_dates_that_only_live_answers_hold(self) -> None:
        """They are dates, too."""
        assert all(name.endswith(DATES) for name in ("warrantyExpiration", "createdDate", "modifiedDate"))


class TestPage:
    @pytest.mark.parametrize(
        ("texts", "body"),
        [
            ([], "[]"),
            ([], " \t\r\n[ \t\r\n] \t\r\n"),
            (['{"id":1}'], '[{"id":1}]'),
            (
                ['{ "name" : "\u00fc\\u00fc\\ud800, ]" ,"id":  10427 }', '{"id":-2,"a":[{},[]]}', '{"id":0}'],
                ' [ { "name" : "\u00fc\\u00fc\\ud800, ]" ,"id":  10427 }\r\n,\t{"id":-2,"a":[{},[]]}\n , {"id":0}\n]\n',
            ),
            (['{"id":999999999999999999}'], '[{"id":999999999999999999}]'),
            (['{"id":1,"x":' + "9" * 5000 + "}"], '[{"id":1,"x":' + "9" * 5000 + "}]"),
        ],
    )
    def test_read(self, texts: list[str], body: str) -> None:
        """Each record is kept as it came, under its id, in order."""
        page = read_page(body.encode())
        assert texts == [record.text for record in page.values()]
        assert [json.loads(text, parse_int=str)["id"] for text in texts] == [str(number) for number in page]

    @pytest.mark.parametrize("number", ["1.10", "1e400", "-0", "-0.0", "1E+2", "1" * 5000, "0.1000000000000000055"])
    def test_numbers(self, number: str) -> None:
        """A number stays as it was written, whatever its length and precision, and differs from a text."""
        fields = read_page(f'[{{"id":1,"x":{number},"y":"{number}"}}]'.encode())[1].fields
        assert (number, number) == (fields["x"], fields["y"])
        assert (Number, str) == (type(fields["x"]), type(fields["y"]))

    @pytest.mark.parametrize(
        "body",
        [
            *[b"", b" ", b"[", b"]", b"[]]", b"[]x", b"[ ,]", b"null", b"{}", b'{"id":1}', b'"[]"', b"<html>", b"[][]"],
            *[b'[{"id":1}', b'[{"id":1},]', b'[{"id":1},', b'[{"id":1} {"id":2}]', b'[{"id":1}]]', b'[{"id":1}]x'],
            *[b"[\x0b]", b"\xc2\xa0[]", b'[{"id":1}\x0c]', b'[{"id":1},\xc2\xa0{"id":2}]', b'[{"id":1}\x1f,{"id":2}]'],
            *[b"[null]", b"[1]", b"[[]]", b'["id"]', b'[{"id":1},null]', b'[{"id":1},2]', b'[{"id":1},{}]', b"[{}]"],
            *[
                b'[{"id":%b}]' % value
                for value in (b"true", b"null", b'"1"', b"1.0", b"1e2", b"[1]", b"{}", b"01", b"")
            ],
            *[b'[{"id":%b}]' % value for value in (b"1" * 19, b"-" + b"1" * 19, b"1" * 5000, b"-", b"+1", b"0x1")],
            *[b'[{"id":1,"x":%b}]' % value for value in (b"NaN", b"Infinity", b"-Infinity", b"1.", b".5", b"'a'")],
            *[b'[{"id":1,"x":"\n"}]', b'[{"id":1,"x":"\\x"}]', b'[{"id":1,"x":"\\u12"}]', b'[{"id":1,}]', b"[{id:1}]"],
            *[b'[{"id":1},{"id":1}]', b'[{"id":1},{"id":2},{"id":1}]', b'[{"id":0},{"id":-0}]'],
            *[b'[{"id":1,"x":"\xff"}]', b'[{"id":1,"x":"\xed\xa0\x80"}]', b"\xff\xfe[\0]\0", b"\xef\xbb\xbf[]"],
            *[b'[{"id":1,"x":' + opened * 100_000 for opened in (b"[", b'{"":')],
            b'[{"id":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        ],
    )
    def test_refused(self, body: bytes) -> None:
        """What is no array of objects with an integer id of their own is a fault of the upstream, whatever it is."""
        with pytest.raises(ProxyError) as caught:
            read_page(body)
        assert ("upstream-protocol", 502, "yes") == (caught.value.slug, caught.value.status, caught.value.sent)
        assert len(caught.value.message) < 250

    @given(st.binary(max_size=40) | st.text('[]{}",:\\ 1e-idtrue', max_size=40).map(str.encode))
    def test_any_bytes(self, body: bytes) -> None:
        """Whatever comes, it is read or refused, and what is read is JSON."""
        try:
            page = read_page(body)
        except ProxyError:
            return
        assert list(page) == [record["id"] for record in json.loads(body)]

    def test_time_is_linear(self) -> None:
        """A page of the largest size, made to be slow, is judged at once."""
        began = time.process_time()
        for filler in (b" ", b"[", b"9", b'"', b",", b'{"id":1} ', b"\\u0000"):
            body = b'[{"id":1,"x":1}' + filler * (MAX_PAGE // 4 // len(filler))
            with pytest.raises(ProxyError):
                read_page(body)
        assert time.process_time() - began < 2


def page_of(ids: Iterable[int]) -> bytes:
    """A page as Metquay sends it."""
    return json.dumps([{"id": number} for number in ids]).encode()


def ids_of(records: list[Record]) -> list[int]:
    """The ids of records, as numbers."""
    return [int(record.fields["id"]) for record in records]


LOST = "the place in the list is lost"
Steps = list[tuple[int, list[int], list[int] | str]]


class TestPager:
    @pytest.mark.parametrize(
        ("passed_on", "target"),
        [("", "/works?first=0&limit=500"), ("&workspaceCode=a%2Fb", "/works?first=0&limit=500&workspaceCode=a%2Fb")],
    )
    def test_target(self, passed_on: str, target: str) -> None:
        """The first page is asked for from 0, and each with what the client said for Metquay."""
        pager = Pager(ListQuery("works", "csv", passed_on))
        assert target == pager.target
        pager.feed(page_of([7, 8, 9]))
        assert target.replace("first=0", "first=2") == pager.target

    @pytest.mark.parametrize(
        "steps",
        [
            pytest.param([(0, [], [])], id="empty"),
            pytest.param(
                [(0, [5, 6, 7], [5, 6, 7]), (2, [7, 8], [8]), (3, [8], []), (4, [], [])],
                id="capped, and short by chance",
            ),
            pytest.param([(0, [5, 6], [5, 6]), (1, [6], []), (2, [], [])], id="one page"),
            pytest.param([(0, [5], [5]), (1, [], []), (0, [5], [])], id="one record"),
            pytest.param(
                [(0, [5, 6], [5, 6]), (1, [6], []), (2, [7], []), (1, [6, 7], [7]), (2, [7], []), (3, [], [])],
                id="another at the last moment",
            ),
            pytest.param(
                [(0, [5, 6], [5, 6]), (1, [6], []), (2, [7], []), (1, [6], []), (2, [7], LOST)], id="capped by bytes"
            ),
            pytest.param(
                [(0, [5], [5]), (1, [6], []), (0, [5, 6], [6]), (1, [6], []), (2, [], [])],
                id="one record, and a second in time",
            ),
            pytest.param(
                [(0, [5], [5]), (1, [], []), (0, [5, 6], [6]), (1, [6, 7], [7]), (2, [7], []), (3, [], [])],
                id="and a second late",
            ),
            pytest.param(
                [(0, [5], [5]), (1, [6], []), (0, [5], []), (1, [6], []), (0, [5], LOST)], id="one record at a time"
            ),
            pytest.param([(0, [5], [5]), (1, [5], []), (2, [], []), (1, [5], [])], id="one record, now behind another"),
            pytest.param(
                [(0, [5], [5]), (1, [], []), (0, [], []), (0, [], []), (0, [], LOST)], id="one record, deleted"
            ),
            pytest.param(
                [
                    (0, [5, 6, 7], [5, 6, 7]),
                    (2, [8, 9], []),
                    (0, [6, 7, 8], [8]),
                    (2, [8, 9], [9]),
                    (3, [9], []),
                    (4, [], []),
                ],
                id="one before it deleted",
            ),
            pytest.param(
                [(0, [5, 6, 7], [5, 6, 7]), (2, [], []), (0, [6, 7], []), (1, [7], []), (2, [], [])],
                id="one deleted, at the end",
            ),
            pytest.param(
                [(0, [1, 2, 3], [1, 2, 3]), (2, [3, 4, 5], [4, 5]), (4, [8], []), (2, [6, 7], []), (0, [4, 5, 6], [6])],
                id="a page of them deleted",
            ),
            pytest.param(
                [
                    (0, [1, 2, 3], [1, 2, 3]),
                    (2, [3, 4], [4]),
                    (3, [6], []),
                    (2, [5, 6], []),
                    (1, [3, 5], []),
                    (0, [3, 5], LOST),
                ],
                id="the last record sent deleted",
            ),
            pytest.param(
                [(0, [9, 8, 7], [9, 8, 7]), (2, [8, 7, 6], [6]), (4, [7, 6, 5], [5]), (6, [5], []), (7, [], [])],
                id="inserted at the front",
            ),
            pytest.param(
                [
                    (0, [9, 8, 7], [9, 8, 7]),
                    (2, [8, 7], []),
                    (3, [8, 7], []),
                    (4, [8, 7, 6], [6]),
                    (6, [6], []),
                    (7, [], []),
                ],
                id="inserted at the front, time after time",
            ),
            pytest.param(
                [
                    (0, [5, 6, 7], [5, 6, 7]),
                    (2, [8, 9, 7], []),
                    (0, [5, 6, 8], []),
                    (0, [5, 6, 8], []),
                    (0, [5, 6, 8], LOST),
                ],
                id="the last record sent moved to the end",
            ),
            pytest.param(
                [
                    (0, [5, 6, 7], [5, 6, 7]),
                    (2, [6, 8, 9], []),
                    (0, [7, 5, 6], []),
                    (0, [7, 5, 6], []),
                    (0, [7, 5, 6], LOST),
                ],
                id="the last record sent moved to the front",
            ),
            pytest.param(
                [
                    (0, [1, 2, 3], [1, 2, 3]),
                    (2, [3, 4], [4]),
                    (3, [4, 5], [5]),
                    (4, [3, 4, 5, 6], []),
                    (3, [4, 5, 6], [6]),
                ],
                id="only the last two pages' records are remembered",
            ),
            pytest.param(
                [(0, [5, 6], [5, 6]), (1, [5, 6], []), (2, [5, 6], []), (3, [5, 6], []), (4, [5, 6], LOST)],
                id="deaf to first",
            ),
        ],
    )
    def test_the_way(self, steps: Steps) -> None:
        """From where each page is asked for, and which of its records are new."""
        pager = Pager(WORKS)
        for first, ids, new in steps:
            assert f"/works?first={first}&limit=500" == pager.target
            if new == LOST:
                with pytest.raises(ProxyError, match="the place in it was lost") as caught:
                    pager.feed(page_of(ids))
                assert ("upstream-protocol", "yes") == (caught.value.slug, caught.value.sent)
            else:
                assert new == ids_of(pager.feed(page_of(ids)))
        ends = steps[-1][2] == []
        assert ends == pager.complete

    def test_what_no_page_is(self) -> None:
        """A page that can't be read breaks the transfer."""
        with pytest.raises(ProxyError, match="no integer id"):
            Pager(WORKS).feed(b'[{"name":"x"}]')


Change = tuple[str, int]


@dataclass
class Upstream:
    """A list that gives ``cap`` records at most; it is sorted by ids upwards, downwards or by another field."""

    cap: int
    order: str
    rows: list[tuple[int, int]]
    made: int = 0

    def insert(self, rank: int) -> None:
        """Make a record, which ``rank`` gives its place if the list is sorted by another field."""
        self.made += 1
        place = {"upwards": 0, "downwards": -self.made, "otherwise": rank}[self.order]
        self.rows = sorted([*self.rows, (place, self.made)])

    def delete(self, rank: int) -> None:
        """Delete one of the records, if there are any."""
        if self.rows:
            del self.rows[rank % len(self.rows)]

    def ids(self) -> list[int]:
        """Return the records as they stand."""
        return [number for _, number in self.rows]

    def answer(self, target: str) -> bytes:
        """Return the page that ``target`` asks for."""
        match = re.fullmatch(r"/works\?first=([0-9]+)&limit=500", target)
        assert match is not None
        first = int(match[1])
        return page_of(self.ids()[first : first + self.cap])


def transfer(upstream: Upstream, changes: Iterable[list[Change]]) -> list[int] | None:
    """Read the whole list while it changes after each page; None if the transfer breaks."""
    pager, got = Pager(WORKS), list[int]()
    for between in chain(changes, repeat(())):
        try:
            got += ids_of(pager.feed(upstream.answer(pager.target)))
        except ProxyError:
            return None
        if pager.complete:
            break
        for kind, rank in between:
            (upstream.insert if kind == "insert" else upstream.delete)(rank)
    return got


def upstream_of(size: int, cap: int, order: str) -> Upstream:
    """A list of so many records."""
    upstream = Upstream(cap, order, [])
    for number in range(size):
        upstream.insert(number * 37 % 100)
    return upstream


caps, orders = st.integers(1, 7), st.sampled_from(["upwards", "downwards", "otherwise"])
ranks = st.integers(0, 99)
any_change = st.tuples(st.sampled_from(["insert", "delete", "delete"]), ranks)


class TestWhole:
    @settings(max_examples=400, deadline=None)
    @given(st.integers(0, 16), caps, orders, st.lists(st.lists(any_change, max_size=4), max_size=16))
    @example(3, 1, "upwards", [[], [("delete", 0)]])
    @example(3, 2, "upwards", [[("delete", 0)]])
    @example(4, 2, "otherwise", [[("insert", 0)], [("delete", 0), ("delete", 0)]])
    def test_each_once_or_visibly_broken(self, size: int, cap: int, order: str, changes: list[list[Change]]) -> None:
        """What was there all the time comes exactly once, in order, nothing comes twice, or the transfer breaks."""
        upstream = upstream_of(size, cap, order)
        before = set(upstream.ids())
        got = transfer(upstream, changes)
        if got is not None:
            throughout = [number for number in upstream.ids() if number in before]
            assert throughout == [number for number in got if number in throughout]
            assert len(set(got)) == len(got)

    @pytest.mark.parametrize("order", ["upwards", "downwards", "otherwise"])
    @pytest.mark.parametrize("cap", range(1, 8))
    def test_a_list_that_stands_still(self, cap: int, order: str) -> None:
        """It comes whole, however many records a page holds; one at a time is refused as soon as there are two."""
        for size in range(20):
            upstream = upstream_of(size, cap, order)
            assert (None if cap == 1 < size else upstream.ids()) == transfer(upstream, [])

    @settings(deadline=None)
    @given(st.integers(0, 16), caps.filter(lambda cap: cap > 1), st.lists(st.lists(st.just(("insert", 0)), max_size=3)))
    def test_a_list_that_grows_at_its_end(self, size: int, cap: int, changes: list[list[Change]]) -> None:
        """It never breaks."""
        upstream = upstream_of(size, cap, "upwards")
        got = transfer(upstream, changes)
        assert upstream.ids() == got

    @settings(deadline=None)
    @given(st.integers(2, 30), st.integers(3, 7), st.data())
    def test_one_deleted_record_is_survived(self, size: int, cap: int, data: st.DataObject) -> None:
        """A list breaks only if just that record is deleted that was the last one sent, until it is found so."""
        upstream = upstream_of(size, cap, "upwards")
        pages = data.draw(st.integers(1, size))
        rank = data.draw(st.integers(0, size - 1))
        got = transfer(upstream, [*([[]] * (pages - 1)), [("delete", rank)]])
        last = min(size, 1 + pages * (cap - 1))
        in_time = len(upstream.ids()) < size
        found_last = 1 + (pages - 1) * (cap - 1) >= size
        assert (in_time and rank + 1 == last and not found_last) == (got is None)
        assert got is None or set(upstream.ids()) <= set(got)


def record(fields: str, number: int = 1) -> Record:
    """Read one record of these members, a text of JSON."""
    return read_page(f'[{{"id":{number}{"," if fields else ""}{fields}}}]'.encode())[number]


def rows_of(text: bytes) -> list[list[str]]:
    """Read CSV as a strict reader does."""
    return list(csv.reader(io.StringIO(text.decode("utf-8"), newline=""), strict=True))


def cell(value: str, column: str = "remarks", *options: str) -> str:
    """Return what a JSON value becomes in a column."""
    writer = CsvWriter(ListQuery("works", "csv", "", options))
    header, row = rows_of(writer.begin([record(f'"{column}":{value}')]))
    return row[header.index(column)]


simple = st.none() | st.booleans() | st.text(max_size=5)
values = simple | st.lists(simple, max_size=3) | st.dictionaries(st.text(max_size=2), simple, max_size=2)


class TestJson:
    def test_empty(self) -> None:
        """No records are an empty array."""
        writer = JsonWriter()
        assert b"[]" == writer.begin([]) + writer.end

    def test_records_as_they_came(self) -> None:
        """Records stand one on a line, byte for byte, and pages that bring nothing leave no trace."""
        writer = JsonWriter()
        one, two, three = record('"a": 1.10 ,"b":"\\ud800\u00fc"'), record('"d":"01-22-2024"', 2), record("", 3)
        text = writer.begin([one, two]) + writer.more([]) + writer.more([three]) + writer.more([]) + writer.end
        expected = '[{"id":1,"a": 1.10 ,"b":"\\ud800\u00fc"},\n{"id":2,"d":"01-22-2024"},\n{"id":3}]'
        assert expected.encode() == text

    @given(st.lists(st.dictionaries(st.text(max_size=3), values), max_size=8))
    def test_what_goes_in_comes_out(self, objects: list[dict[str, Any]]) -> None:
        """Whatever the records hold, and wherever pages end, the array is that of the upstream."""
        objects = [fields | {"id": number} for number, fields in enumerate(objects)]
        records = list(read_page(json.dumps(objects).encode()).values())
        writer = JsonWriter()
        text = writer.begin(records[:3]) + writer.more(records[3:5]) + writer.more(records[5:]) + writer.end
        assert objects == json.loads(text)


class TestCsv:
    @pytest.mark.parametrize("name", RESPONSES)
    def test_empty(self, name: str) -> None:
        """An empty list has a byte order mark and a header, of the vendor's fields in their order."""
        writer = CsvWriter(ListQuery(name, "csv"))
        assert ("\ufeff" + ",".join(FIELDS[name]) + "\r\n").encode() == writer.begin([]) + writer.end

    def test_columns(self) -> None:
        """Fields that the schema lacks follow it as the first page has them; what comes up later is left out."""
        writer = CsvWriter(ListQuery("customers", "csv"))
        first = [record('"zebra":"z","companyName":"C"'), record('"a,b":"x","zebra":"y"', 2)]
        text = writer.begin(first) + writer.more([record('"late":"l","email":"e","a,b":"x"', 3)]) + writer.more([])
        assert text.startswith(b"\xef\xbb\xbfid,parentCompanyCode,companyCode,")
        assert text.endswith(b"\r\n")
        assert text.count(b"\r\n") == text.count(b"\n") == 4
        header, *rows = rows_of(text.removeprefix(b"\xef\xbb\xbf"))
        assert [*FIELDS["customers"], "zebra", "a,b"] == header
        named = [{name: value for name, value in zip(header, row, strict=True) if value} for row in rows]
        assert [
            {"id": "1", "companyName": "C", "zebra": "z"},
            {"id": "2", "zebra": "y", "a,b": "x"},
            {"id": "3", "email": "e", "a,b": "x"},
        ] == named

    def test_columns_of_one_list_are_not_those_of_the_next(self) -> None:
        """Unknown fields of one transfer leave no trace in another."""
        CsvWriter(WORKS).begin([record('"x":1')])
        assert [*FIELDS["works"]] == rows_of(CsvWriter(WORKS).begin([]).removeprefix(b"\xef\xbb\xbf"))[0]

    def test_unknown_columns_are_bounded(self) -> None:
        """A page of nothing but different fields makes no file of all of them in every line."""
        fields = ",".join(f'"x{number}":1' for number in range(MAX_UNKNOWN + 1))
        header, row = rows_of(CsvWriter(WORKS).begin([record(fields)]))
        assert "x99" == header[-1]
        assert len(FIELDS["works"]) + MAX_UNKNOWN == len(header) == len(row)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("", "null"),
            ("", '""'),
            ("true", "true"),
            ("false", "false"),
            *[(number, number) for number in ("0", "-1", "1.10", "1e400", "-0.0", "1" * 5000)],
            ('caf\u00e9, "a"\nb', '"caf\u00e9, \\"a\\"\\nb"'),
            (" a ", '" a "'),
            ("'a", '"\'a"'),
            ("a; b, c", '["a","b, c"]'),
            ("a", '["a"]'),
            ("", "[]"),
            ('["a",1.10]', '["a", 1.10]'),
            ("[null]", "[ null ]"),
            ('[["a"],{}]', '[["a"], {}]'),
            (
                '{"b":[1.10,1e400,true,null],"a \\"\u00fc":{"c":"1 , 2"}}',
                '{ "b": [ 1.10, 1e400 , true,null ] , "a \\"\\u00fc":{"c":"1 , 2"}}',
            ),
            ("a\ufffdb\ufffd\tc\ufffd", '"a\\u0000b\\u001b\\tc\\u007f"'),
            ("\ufffd|\ufffd|\U0001f600", '"\\ud800|\\udc00|\\ud83d\\ude00"'),
            ('["\ufffd",1]', '["\\ud800",1]'),
        ],
    )
    def test_cells(self, text: str, value: str) -> None:
        """Text and numbers as they came, arrays of texts joined, what is nested as JSON, and nothing for null."""
        assert text == cell(value)
        assert text == cell(value, "unknown", "formulas=keep")

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("2024-01-22", "01-22-2024"),
            ("2024-02-29", "02-29-2024"),
            ("0999-12-31", "12-31-0999"),
            *[(text, text) for text in ("2024-01-22", "02-29-2023", "13-01-2024", "00-10-2024", "01-22-0000")],
            *[(text, text) for text in ("1-22-2024", "01-22-24", "01/22/2024", "01-22-2024 10:15:00", "01-22-2024\n")],
            *[(text, text) for text in (" 01-22-2024", "01-22-20240", "n/a", "", "\u0660\u0661-22-2024")],
        ],
    )
    def test_dates(self, text: str, value: str) -> None:
        """Dates become ISO 8601, unless they are kept; what is no real date of the vendor's form stays as it is."""
        for column in ("dueDate", "inDate", "modifiedDate", "warrantyExpiration"):
            assert text == cell(json.dumps(value), column)
            assert value == cell(json.dumps(value), column, "dates=vendor")
        assert value == cell(json.dumps(value), "remarks")

    @pytest.mark.parametrize(
        "text",
        [
            *("=1+1", "@SUM(A1)", "\tx", "\rx", "\nx", "=", "@", "\t", "+", "-")[:8],
            *("  =1", "\u00a0=1", " \t", "\x0b=1", " \n=1", "  @x"),
            *(
                "+a",
                "-a",
                "+1;2",
                "-1+1",
                "-1*1",
                "+1=1",
                " -x",
                "--x",
                "-1e5",
                "-1\n",
                "- 1\t",
                "-\u0661",
                "+A1",
                "-1 C",
            ),
        ],
    )
    def test_what_a_spreadsheet_would_run(self, text: str) -> None:
        """An apostrophe goes before it, in cells, joined texts and names of columns, unless formulas are kept."""
        shown = text.replace("\x0b", "\ufffd")
        assert f"'{shown}" == cell(json.dumps(text)) == cell(json.dumps(text), "dueDate") == cell(json.dumps([text]))
        assert shown == cell(json.dumps(text), "remarks", "formulas=keep")
        for expected, options in ((f"'{shown}", ()), (shown, ("formulas=keep",))):
            writer = CsvWriter(ListQuery("works", "csv", "", options))
            assert expected == rows_of(writer.begin([record(f"{json.dumps(text)}:1")]))[0][-1]

    @pytest.mark.parametrize(
        "text",
        [
            *("+", "-", "+1 (312) 555-0142", "-5", "-1,234.50", "+49 30/123", "--5", " -5", "- 5", "-(1)"),
            *("a=1", "a@b.example", "1=1", "'=1", "a\t", "x\n=1", "", " ", "\uff1d1"),
        ],
    )
    def test_what_a_spreadsheet_would_not_run(self, text: str) -> None:
        """Telephone numbers, amounts and plain text stay as they are."""
        assert text == cell(json.dumps(text))

    def test_numbers_are_no_text(self) -> None:
        """A negative number needs no apostrophe, whichever way it is written."""
        assert "-1.5e+10" == cell("-1.5e+10")
        assert "'-1.5e+10" == cell('"-1.5e+10"')

    def test_nested_too_deeply(self) -> None:
        """What was read, but can't be written, is the upstream's fault as well."""
        value: object = "x"
        for _ in range(100_000):
            value = [value]
        with pytest.raises(ProxyError, match="recursion") as caught:
            CsvWriter(WORKS).more([Record("", {"id": Number("1"), "remarks": value})])
        assert "upstream-protocol" == caught.value.slug
        while isinstance(value, list):
            value = value.pop()  # else the interpreter takes it apart by recursion

    @settings(deadline=None)
    @given(
        st.lists(
            st.dictionaries(
                st.sampled_from(["remarks", "dueDate"]) | st.text(max_size=3),
                values,
            ),
            min_size=1,
            max_size=5,
        ),
        st.sampled_from([(), ("dates=vendor",), ("formulas=keep",)]),
    )
    def test_any_text_is_borne(self, objects: list[dict[str, Any]], options: tuple[str, ...]) -> None:
        """Whatever the records hold, each is one line of as many cells as the header has."""
        objects = [fields | {"id": number} for number, fields in enumerate(objects)]
        records = list(read_page(json.dumps(objects).encode()).values())
        writer = CsvWriter(ListQuery("works", "csv", "", options))
        header, *rows = rows_of(writer.begin(records[:2]) + writer.more(records[2:]))
        assert len(objects) == len(rows)
        assert {len(header)} == {len(row) for row in rows}
        runs = re.compile(r"\s*[=@\t\r\n]")
        assert "formulas=keep" in options or not any(runs.match(text) for row in [header, *rows] for text in row)
