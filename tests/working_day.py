"""A working day of a tool that knows nothing of tokens: it reads, creates, changes, deletes, and expects success."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable


class Tool:
    """Counts what it saw, so that a test can say that it saw nothing odd."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        """``url`` is the proxy's, with or without ``/api/v1``."""
        self._session = session
        self._url = url
        self.statuses: list[int] = []

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Make one request; return status and JSON (None where there is no body)."""
        async with self._session.request(method, self._url + path, json=body) as response:
            self.statuses.append(response.status)
            return response.status, await response.json(content_type=None) if await response.read() else None

    async def read_all(self, path: str) -> list[dict[str, Any]]:
        """Read a list to its end, by pages of 50."""
        records: list[dict[str, Any]] = []
        while True:
            status, page = await self.ask("GET", f"{path}?first={len(records)}&limit=50")
            assert 200 == status
            records += page
            if len(page) < 50:
                return records


async def work(url: str, enough: Callable[[], bool]) -> list[int]:
    """Spend a day, again and again until ``enough``; return every status that the tool saw."""
    async with aiohttp.ClientSession(headers={"User-Agent": "a tool of the laboratory"}) as session:
        tool = Tool(session, url)
        number = 0
        while not number or not enough():
            number += 1
            await _day(tool, number)
        return tool.statuses


async def _day(tool: Tool, number: int) -> None:
    customers = await tool.read_all("/customers")
    assert 130 <= len(customers)
    created = {}
    status, created["category"] = await tool.ask("POST", "/instrument-categories", {"name": f"Torque wrench {number}"})
    assert 201 == status
    status, created["customer"] = await tool.ask("POST", "/customers", {"companyName": f"Nordwind Metrology {number}"})
    assert 201 == status
    customer = created["customer"]["metquayId"]
    instrument = {
        "name": "Wrench",
        "companyId": str(customer),
        "instrumentCategoryName": f"Torque wrench {number}",
        "serialNo": f"SN-{number}",
        "calibrationFrequency": "180",
        "calibrationFrequencySpan": "DAY",
    }
    status, answer = await tool.ask("POST", "/customer-instrument-details", instrument)
    assert 201 == status
    wrench = answer["metquayId"]
    status, answer = await tool.ask("POST", "/customer-instrument-details", {**instrument, "serialNo": f"SP-{number}"})
    assert 201 == status
    spare = answer["metquayId"]
    status, answer = await tool.ask("POST", "/works", {"customerInstrumentId": wrench, "inDate": "2026-01-22T10:15:00"})
    assert 201 == status
    job = answer["metquayId"]

    assert (200, None) == await tool.ask("PUT", f"/customers/{customer}", {"companyName": f"Nordwind {number}"})
    changed = {**instrument, "make": "Stahl"}
    assert (200, None) == await tool.ask("PUT", f"/customer-instrument-details/{wrench}", changed)
    assert (200, None) == await tool.ask("PUT", f"/works/{job}", {"customerInstrumentId": wrench, "remarks": "urgent"})
    status, _ = await tool.ask("DELETE", f"/customers/{customer}")
    assert 409 == status, "a customer with instruments can't be deleted"
    status, _ = await tool.ask("DELETE", f"/customer-instrument-details/{wrench}")
    assert 409 == status, "an instrument with works can't be deleted"
    assert (200, None) == await tool.ask("DELETE", f"/customer-instrument-details/{spare}")
    names = {record["companyName"] for record in await tool.read_all("/customers")}
    assert f"Nordwind {number}" in names
