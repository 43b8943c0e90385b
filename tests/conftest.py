"""What pytest must know before it loads the tests: the wire bench, and which event loop to test with."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("tests.wire")

from tests.wire import bench  # noqa: E402, F401 - a fixture; its asserts are rewritten only if it is loaded after that call

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

if os.environ.get("WIRE_LOOP") == "uvloop":

    def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
        """Run every test on uvloop."""
        return {"uvloop": importlib.import_module("uvloop").new_event_loop}
