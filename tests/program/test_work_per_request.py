"""The work of one request, counted in byte code and never in seconds: a change that adds to it is seen at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = 1.02 if sys.version_info[:2] == (3, 11) else 1.5
TODAY = {"GET": 1795, "GET with a client key": 2635, "PUT": 2280}
"""Instructions for one request of each kind, on Python 3.11; ``python -m benchmarks.work`` prints them by module."""


@pytest.mark.parametrize("kind", TODAY)
def test_bounded(kind: str) -> None:
    """One request through the running proxy takes no more instructions than it once took; other Pythons count anew."""
    words = [sys.executable, "-m", "benchmarks.work", "--json", kind]
    root = Path(__file__).parent.parent.parent
    output = subprocess.run(words, cwd=root, check=True, capture_output=True, text=True).stdout  # noqa: S603 - our own
    counts = json.loads(output)[kind]
    assert 0 < sum(counts.values()) <= ROOM * TODAY[kind], counts
