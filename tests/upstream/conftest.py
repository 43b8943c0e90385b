"""What several of these tests speak to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.wire import OK, Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def far() -> AsyncIterator[Upstream]:
    """An upstream that says OK."""
    made = Upstream()
    await made.start()
    made.plays(OK)
    yield made
    await made.stop()
