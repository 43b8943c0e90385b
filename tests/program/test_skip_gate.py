from __future__ import annotations

import pytest

from tests import skip_gate

pytest_plugins = ["pytester"]

LISTED = min(skip_gate._ALLOWED)


@pytest.mark.parametrize(
    ("code", "body"),
    [
        (0, "def test(): pass"),
        (0, f"import pytest\ndef test(): pytest.skip({LISTED!r})"),
        (1, "import pytest\ndef test(): pytest.skip('because')"),
        (1, "import pytest\n@pytest.mark.skipif(True, reason='because')\ndef test(): pass"),
        (1, "import pytest\n@pytest.mark.xfail(reason='because')\ndef test(): assert False"),
        (1, "import pytest\npytest.skip('because', allow_module_level=True)"),
        (1, "import pytest\npytest.importorskip('because')"),
    ],
)
def test_only_listed_reasons_may_skip(code: int, body: str, pytester: pytest.Pytester) -> None:
    """A skip, wherever it is said, fails the run unless skips.txt lists its reason; pytest's summary stays last."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makepyfile(test_first="def test(): pass", test_second=body)
    run = pytester.runpytest_inprocess("-p", "tests.skip_gate", "-p", "no:cov")
    assert code == run.ret
    assert (code == 1) == ("because" in run.stdout.str().partition("NOT LISTED")[2])
    assert " in " in run.outlines[-1]
