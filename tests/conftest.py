"""What pytest must know before it loads the tests: the wire bench, which event loop to test with, what may block it."""

from __future__ import annotations

import importlib
import os
import signal
from typing import TYPE_CHECKING

import pytest
from blockbuster import blockbuster_ctx

pytest.register_assert_rewrite("tests.wire")
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the programs that tests start would ignore it

from tests.wire import bench  # noqa: E402, F401 - a fixture; its asserts are rewritten only if it is loaded after that call

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

MAY_BLOCK = {
    "threads.py": {"flush"},  # nobody is served yet, or any more
    "audit.py": {"open_log", "try_log"},  # done before anybody is served
    "check.py": {"probed"},  # a command that serves nobody
    "app.py": {"stop"},  # nobody is served any more
    "listeners.py": {"bind", "serving_context"},  # nobody is served yet
    "reload.py": {"__post_init__"},  # nobody is served yet
    "downstream/handler.py": {"_failed"},  # a traceback quotes the source
    "replicas/store.py": {"get_credentials"},  # one small file at each connection to Redis
    "settings.py": {"load", "validate"},  # done before there is a loop, but for tests
    "upstream/dial.py": {"tls_context"},  # the certificates at the start
}
"""The functions of each module under which a call may block the event loop."""


@pytest.fixture(autouse=True, scope="session")
def _nothing_blocks_the_loop() -> Iterator[None]:
    with blockbuster_ctx("metquay_proxy") as found:
        for call in found.functions.values():
            for name, functions in MAY_BLOCK.items():
                call.can_block_in(f"metquay_proxy/{name}", functions)
        yield


if os.environ.get("WIRE_LOOP") == "uvloop":

    def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
        """Run every test on uvloop."""
        return {"uvloop": importlib.import_module("uvloop").new_event_loop}
