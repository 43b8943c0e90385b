"""Whole lists, as tools get them from the whole proxy: of many pages, in bad weeks, and while others write."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults
from tests.running import FastTime, process, running, simulated
from tests.wire import eventually

LISTS = ("customers", "customer-instrument-details", "works")


async def read(url: str, file: str) -> bytes:
    """Read a list as a tool would; raise what aiohttp raises where it broke, and ``Refused`` where it did not begin."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/-/lists/{file}") as answer:
        body = await answer.read()
        if answer.status != 200:
            raise Refused(body)
        return body


class Refused(Exception):
    """The first page had another status than 200."""


def rows(body: bytes) -> list[dict[str, str]]:
    """Return the rows of a list in CSV, by their columns."""
    return list(csv.DictReader(io.StringIO(body.decode("utf-8-sig"), newline="")))


@pytest.mark.parametrize("cap", [pytest.param(None, marks=pytest.mark.slow), 100])
@pytest.mark.parametrize("name", LISTS)
async def test_each_record_once_and_in_order(name: str, cap: int | None) -> None:
    """1,234 records of each kind come whole, whatever a server gives at most on a page, as JSON and as CSV."""
    async with (
        simulated(records=1234, max_page=cap) as sandbox,
        running(sandbox.url, rate_limit="off") as (_, url),
    ):
        expected = sandbox.records.page(name, 0, 10_000)
        assert 1234 == len(expected)
        found = json.loads(await read(url, f"{name}.json"))
        assert [record["id"] for record in expected] == [record["id"] for record in found]
        assert json.loads(json.dumps(expected)) == found
        seen = rows(await read(url, f"{name}.csv?formulas=keep&dates=vendor"))
        assert [cells(record) for record in found] == [
            {column: cell for column, cell in row.items() if cell} for row in seen
        ]
        guarded = rows(await read(url, f"{name}.csv?dates=vendor"))
        different = [
            (cell, plain)
            for row, before in zip(guarded, seen, strict=True)
            for (cell, plain) in zip(row.values(), before.values(), strict=True)
            if cell != plain
        ]
        assert all(cell == f"'{plain}" and plain.lstrip()[0] in "=+-@" for cell, plain in different)


def cells(record: dict[str, Any]) -> dict[str, str]:
    """Return what a spreadsheet shows of a record as it came."""
    words = {True: "true", False: "false"}
    return {
        name: words[value]
        if isinstance(value, bool)
        else "; ".join(value)
        if isinstance(value, list)
        else value
        if isinstance(value, str)
        else json.dumps(value)
        for name, value in record.items()
        if value not in (None, "", [])
    }


@pytest.mark.slow
async def test_in_a_bad_week() -> None:
    """With outages, resets, refusals and tokens that end, a list is whole or visibly broken, and never short."""
    quick = FastTime(60)
    faults = Faults(fail={503: 0.08, 429: 0.03}, reset=0.03, lose_answer=0.03)
    outcomes: Counter[str] = Counter()
    async with (
        simulated(
            records=600, max_page=50, token_lifetime=4, clock=quick.now, sleep=quick.sleep, faults=faults
        ) as sandbox,
        running(sandbox.url, time_=quick, rate_limit="off", read_timeout="1") as (proxy, url),
    ):
        await eventually(proxy.ready)
        expected = [record["id"] for record in sandbox.records.page("works", 0, 10_000)]
        for _ in range(40):
            try:
                found = [record["id"] for record in json.loads(await read(url, "works.json"))]
                outcomes["whole" if expected == found else "short"] += 1
            except aiohttp.ClientError:
                outcomes["broken"] += 1
            except Refused:
                outcomes["refused"] += 1
        assert sandbox.logins > 3
    assert 0 == outcomes["short"]
    assert 0 < outcomes["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_while_others_write(seed: int) -> None:
    """Records come, change and go meanwhile: who was there throughout is there once, or the transfer is broken."""
    dice = random.Random(seed)  # noqa: S311 - a sequence, no secret
    async with (
        simulated(records=300, max_page=20, faults=Faults(latency=0.002)) as sandbox,
        running(sandbox.url, rate_limit="off") as (_, url),
        aiohttp.ClientSession() as tool,
    ):
        before = {record["id"] for record in sandbox.records.page("works", 0, 10_000)}
        gone: set[int] = set()

        async def write() -> None:
            for number in range(10_000):
                kind = dice.choice(["customers", "customers", "customer-instrument-details"])
                one = dice.choice(sandbox.records.page(kind, 0, 10_000))
                if dice.random() < 0.5:
                    body = {"companyName": f"New {seed} {number}", "companyCode": f"N{number}"}
                    await (await tool.post(f"{url}/customers", json=body)).read()
                else:
                    gone.add(one["id"])  # or perhaps not
                    await (await tool.delete(f"{url}/{kind}/{one['id']}")).read()

        outcomes: Counter[str] = Counter()
        for _ in range(12):
            before = {record["id"] for record in sandbox.records.page("customers", 0, 10_000)}
            writing = asyncio.ensure_future(write())
            try:
                found = [record["id"] for record in json.loads(await read(url, "customers.json"))]
            except aiohttp.ClientError:
                outcomes["broken"] += 1
            else:
                outcomes["whole"] += 1
                assert len(found) == len(set(found))
                assert before - gone <= set(found)
            finally:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
        assert outcomes["whole"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to read a process's memory")
def test_a_hundred_thousand_records_in_constant_memory(tmp_path: Path) -> None:
    """The first row comes before the second page was asked for, and memory grows by less than 8 MiB."""
    (tmp_path / "upstream").mkdir()
    with process(
        tmp_path / "upstream", "sandbox", "--listen", "127.0.0.1:0", "--rate-limit", "off", "--records", "100000"
    ) as (metquay):
        account = {
            "METQUAY_HOST": metquay.url,
            "METQUAY_ACCESS_KEY": ACCESS_KEY,
            "METQUAY_SECRET_KEY": SECRET_KEY,
            "METQUAY_RATE_LIMIT": "off",
            "METQUAY_LISTEN": "127.0.0.1:0",
        }
        with process(tmp_path, "serve", **account) as proxy:
            name = "customer-instrument-details"
            for _ in range(2):  # what the first ones of their kind load stays
                asyncio.run(begin(proxy.url, f"{name}.csv", 3000))
            before = resident(proxy.popen.pid)
            assert 100_000 == len(rows(asyncio.run(read(proxy.url, f"{name}.csv"))))
            assert resident(proxy.popen.pid) - before < 8.0


async def begin(url: str, file: str, lines: int) -> None:
    """Read the beginning of a list, and leave."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/-/lists/{file}") as answer:
        assert 200 == answer.status
        for _ in range(lines):
            assert await answer.content.readline()


def resident(pid: int) -> float:
    """Return the memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


@pytest.fixture(scope="module")
def spreadsheet() -> str:
    """Return the spreadsheet program's command."""
    return shutil.which("soffice") or shutil.which("localc") or pytest.skip("LibreOffice is not installed")


@pytest.mark.slow
def test_a_spreadsheet_reads_it(spreadsheet: str, tmp_path: Path) -> None:
    """LibreOffice reads the CSV as Excel would, and what it shows equals the JSON, guarded cells apart."""

    async def fetch() -> tuple[bytes, list[dict[str, Any]]]:
        async with simulated(records=300) as sandbox, running(sandbox.url, rate_limit="off") as (_, url):
            return await read(url, "customers.csv?dates=vendor"), json.loads(await read(url, "customers.json"))

    body, records = asyncio.run(fetch())
    (tmp_path / "customers.csv").write_bytes(body)
    # comma, quotes, UTF-8, from line 1, all columns as text, quoted cells as text, nothing detected, and again as CSV
    options = "44,34,76,1,{}"
    columns = "/".join(f"{number}/2" for number in range(1, 60))
    subprocess.run(  # noqa: S603 - a program of the machine's own
        [
            *(spreadsheet, f"-env:UserInstallation=file://{tmp_path}/profile", "--headless"),
            *("--infilter=CSV:" + options.format(columns) + ",0,true,false,true",),
            *(
                "--convert-to",
                "csv:Text - txt - csv (StarCalc):44,34,76,1,,0,false,true,false",
                "--outdir",
                str(tmp_path / "out"),
            ),
            str(tmp_path / "customers.csv"),
        ],
        check=True,
        capture_output=True,
        timeout=180,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    seen = rows((tmp_path / "out" / "customers.csv").read_bytes())
    expected = [
        {name: text.replace("\r\n", "\n") for name, text in cells(record).items()}  # it has line ends of its own
        for record in records
    ]
    assert expected == [{column: cell.removeprefix("'") for column, cell in row.items() if cell} for row in seen]
