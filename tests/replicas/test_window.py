"""The window that replicas share: the script in Redis and its likeness in Python, held against each other."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.window import Window
from metquay_proxy.replicas.share import Share
from metquay_proxy.rules.quota import QuotaExceeded, Rate, Ticket
from tests.redis_server import needs_redis, redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.redis_server import RedisServer

SCRIPT = (Path(__file__).parent.parent.parent / "metquay_proxy" / "replicas" / "quota.lua").read_text(encoding="utf-8")
CLOCK = "local time = redis.call('TIME')"
KEYS = ("state", "seen", "flight", "back", "line")
START = 1_700_000_000.0


class Script:
    """The script in a real Redis, on a clock of the test's."""

    def __init__(self, server: RedisServer) -> None:
        import redis  # noqa: PLC0415 - an optional extra

        assert 1 == SCRIPT.count(CLOCK)
        self._redis = redis.Redis(unix_socket_path=str(server.path))
        self._script = self._redis.register_script(SCRIPT.replace(CLOCK, "local time = {ARGV[2], 0}"))

    def clear(self) -> None:
        """Forget everything."""
        self._redis.flushall()

    def call(self, now: float, call: dict[str, Any]) -> dict[str, Any]:
        """Run it."""
        answer: dict[str, Any] = json.loads(self._script(keys=KEYS, args=[json.dumps(call), f"{now:.6f}"]))
        return answer

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    """Yield the script in a Redis of its own."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        found = Script(server)
        yield found
        found.close()


class Replicas:
    """Shares that call a window in invented time; what each of them did is told as a sequence of steps."""

    def __init__(self, call: Callable[[float, dict[str, Any]], dict[str, Any]], count: int, rate: Rate) -> None:
        self.call = call
        self.now = START
        self.shares = [Share(rate, f"replica-{number}", lambda: 0.5) for number in range(count)]
        self.tickets: list[list[Ticket]] = [[] for _ in range(count)]
        self.answers: list[dict[str, Any]] = []
        self.sent: list[float] = []
        self._fresh = 0

    def exchange(self, number: int) -> None:
        """Let one replica call."""
        share = self.shares[number]
        self._fresh += 1
        call = json.loads(json.dumps(share.report(self.now - START, f"window-{self._fresh}")))
        answer = self.call(self.now, call)
        self.answers.append(answer)
        share.replied(self.now - START, call, answer)

    def step(self, number: int, what: str, seconds: float) -> None:
        """Do one thing with one replica, ``seconds`` after the last."""
        self.now = round(self.now + seconds, 6)
        share, now = self.shares[number], self.now - START
        number %= len(self.shares)
        mine = self.tickets[number]
        if what in {"ask", "connect"}:
            with contextlib.suppress(QuotaExceeded):
                mine.append(share.ask(now, f"tool {len(mine) % 2}", 20.0))
        elif what == "close":
            share.close(now, None if seconds > 0.5 else 3.0)
        elif what in {"answer", "give back"}:
            for ticket in mine:
                if ticket.state == "sent" and what == "answer":
                    share.answered(ticket, now)
                    break
                if ticket.state in {"waiting", "granted"} and what == "give back":
                    share.cancel(ticket, now)
                    break
        self.exchange(number)
        for ticket in mine:
            if ticket.state == "granted" and what != "connect":
                share.sent(ticket)
                self.sent.append(self.now)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(
            [*["ask"] * 4, *["connect"] * 2, *["answer"] * 3, *["give back"] * 2, "beat", "close"],
        ),
        st.floats(0, 1, allow_nan=False).map(lambda seconds: round(seconds**3 * 3, 3)),
    ),
    min_size=1,
    max_size=120,
)


@pytest.mark.slow
@needs_redis
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, rate=st.sampled_from([Rate(4, 1.0), Rate(10, 10.0), Rate(300, 10.0)]))
def test_the_script_and_its_likeness_agree(script: Script, steps: list[tuple[int, str, float]], rate: Rate) -> None:
    """The same sequence of calls gets the same answers from both, and never more than the limit in any window."""
    script.clear()
    real, likeness = Replicas(script.call, 3, rate), Replicas(Window().call, 3, rate)
    for number, what, seconds in steps:
        for replicas in (real, likeness):
            replicas.step(number, what, seconds)
        expected, observed = likeness.answers[-1], real.answers[-1]
        assert expected.keys() == observed.keys()
        for name, value in expected.items():
            if name == "now":
                assert value == pytest.approx(float(observed[name]), abs=2e-6)
            else:
                assert value == pytest.approx(observed[name] or ([] if name == "returns" else 0), abs=1e-4), name
    assert likeness.sent == real.sent
    assert never_more_than(rate, real.sent)


def never_more_than(rate: Rate, moments: list[float]) -> bool:
    """Whether no window holds more than the limit."""
    return all(later - earlier >= rate.window for earlier, later in zip(moments, moments[rate.limit :], strict=False))
