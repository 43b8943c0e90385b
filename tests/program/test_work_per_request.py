"""The work of one request, counted and never timed: a change that adds to it is seen at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("the benchmark needs Linux", allow_module_level=True)

from benchmarks.instructions import instructions

SAME_PYTHON = sys.version_info[:2] == (3, 11)
BYTE_CODE = {"GET": 1620, "GET with a client key": 2640, "PUT": 2075}
"""Instructions of byte code for each kind, on Python 3.11; ``python -m benchmarks.work`` prints them by module."""
MACHINE_CODE = {"uvloop": 114_000, "asyncio": 190_000}
"""Instructions of the processor for a GET on each loop; ``python -m benchmarks.instructions`` prints them.

They are those of a Python 3.11 without profile-guided optimization, as CI has it; with that it takes some 6 % fewer.
"""


@pytest.mark.parametrize("kind", BYTE_CODE)
def test_byte_code(kind: str) -> None:
    """One request through the running proxy takes no more instructions than it once took; other Pythons count anew."""
    words = [sys.executable, "-m", "benchmarks.work", "--json", kind]
    root = Path(__file__).parent.parent.parent
    output = subprocess.run(words, cwd=root, check=True, capture_output=True, text=True).stdout  # noqa: S603 - our own
    counts = json.loads(output)[kind]
    assert 0 < sum(counts.values()) <= (1.02 if SAME_PYTHON else 1.5) * BYTE_CODE[kind], counts


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.parametrize("loop", MACHINE_CODE)
def test_machine_code(loop: str) -> None:
    """Nor does it take more of the processor, whatever of that is hidden in one instruction of byte code."""
    assert 0 < instructions(loop) <= (1.03 if SAME_PYTHON else 2) * MACHINE_CODE[loop]
