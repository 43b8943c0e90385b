"""The shared window of ``quota.lua``, run by a Lua interpreter in this process, on a clock of invented time.

The simulation needs it, since a thousand replicas make more calls than can be awaited. ``redis.lua`` stands in for
Redis; ``tests/replicas/test_share.py`` holds it against a real one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any, Final

import metquay_proxy

QUOTA: Final = (Path(metquay_proxy.__file__).parent / "replicas" / "quota.lua").read_text(encoding="utf-8")
KEYS: Final = ("state", "seen", "flight", "back", "line")


def interpreter() -> Any:  # noqa: ANN401 - lupa is an extra
    """Return a Lua 5.1, as Redis has it, the quickest that is there; ImportError, which says what to do, if none is."""
    for name in ("lupa.luajit21", "lupa.lua51"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).LuaRuntime()
    raise ImportError("this runs quota.lua, which needs a Lua interpreter: pip install '.[test]'")


class Script:
    """What lies in Redis; ``call`` is one run of the script."""

    def __init__(self) -> None:
        self._lua = interpreter()
        names: Any = self._lua.globals()
        names.clock = self._lua.eval("function() return now, 0 end")
        names.KEYS = self._lua.table_from(KEYS)
        names.cjson = self._lua.table_from({"decode": self._decode, "encode": self._encode})
        self._names = names
        self._lua.execute(Path(__file__).with_name("redis.lua").read_text(encoding="utf-8"))
        self._run = self._lua.compile(QUOTA)
        self.calls = 0
        self.ahead = 0.0
        """Seconds by which Redis's clock was set since."""

    def call(self, now: float, call: dict[str, Any]) -> bytes:
        """Carry out a call at ``now``; return its answer, JSON."""
        self.calls += 1
        self._names.now = now + self.ahead
        self._names.ARGV = self._lua.table_from([call])
        return str(self._run()).encode()

    def redis(self, *command: str | float) -> Any:  # noqa: ANN401 - what the command returns
        """Run a command of Redis."""
        return self._names.redis.call(*command)

    def clear(self) -> None:
        """Lose everything, as a flush does."""
        self.redis("DEL", *KEYS)

    def _decode(self, call: dict[str, Any]) -> Any:  # noqa: ANN401 - a table
        return self._lua.table_from({name: value for name, value in call.items() if value is not None}, recursive=True)

    def _encode(self, answer: Any) -> str:  # noqa: ANN401 - a table
        told = dict(answer)
        if "returns" in told:
            told["returns"] = list(told["returns"].values())
        return json.dumps({name: float(f"{v:.14g}") if isinstance(v, float) else v for name, v in told.items()})
