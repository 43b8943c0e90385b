"""What several tests of the whole program need: a simulated Metquay, and a browser."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.running import simulated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser

    from metquay_proxy.sandbox.server import Sandbox

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # the rebinding name: resolves to this machine, as an attacker's name server would answer
    "--host-resolver-rules=MAP rebound.example 127.0.0.1",
]


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """Run a simulated Metquay that counts what reaches it."""
    async with simulated() as made:
        yield made


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Run Debian's Chromium without a window."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    async with (
        playwright.async_playwright() as driver,
        await driver.chromium.launch(executable_path=path, args=FLAGS) as chromium,
    ):
        yield chromium
