"""The simulator as a command: its flags, what it prints for whoever wants to use it, and its life until a signal.

Must not decide how it is listened, nor what goes to which stream: both are handed in.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY, Faults, Sandbox, load_seed

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from metquay_proxy.sandbox.server import Listen

_MOST: Final = 100_000
"""The most records of a kind that it can begin with, and the largest cap for a page."""

_FAULTS: Final[tuple[tuple[str, str, str, dict[str, Any]], ...]] = (
    ("--latency", "SECONDS", "seconds before each answer", {}),
    ("--jitter", "SECONDS", "up to that many seconds more, at random", {}),
    ("--retry-after", "on|off", "whether a 429 carries Retry-After (default: off)", {}),
    ("--lose-answer", "RATE", "share of requests (0 to 1) that are executed, but get no answer", {}),
    ("--reset", "RATE", "share of answers (0 to 1) whose connection is reset in mid-body", {}),
    ("--slow-body", "BYTES/S", "bytes a second at which the body of an answer comes", {}),
    ("--fail", "STATUS=RATE", "share of requests (0 to 1) that get this status; repeatable", {"action": "append"}),
    (
        "--login-outage",
        "SECONDS",
        "answer logins with 503, for so many seconds or until it is switched off",
        {"nargs": "?", "const": "on"},
    ),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all that ``simulator`` reads."""
    rates = "N/second, N/minute, N/hour or off (default: %(default)s)"
    parser.add_argument("--rate-limit", default="100/minute", metavar="RATE", help=rates)
    parser.add_argument("--token-lifetime", metavar="SECONDS", help="seconds that a token lives (default: 900)")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--seed-file", metavar="FILE", help="JSON file with the records to begin with")
    records = (
        f"begin with N customers, N instruments and N works, 0 to {_MOST} (default: a laboratory of 140 customers);"
        " a small N keeps its first customers, and only what belongs to them"
    )
    begin.add_argument("--records", metavar="N", help=records)
    max_page = "a page of a list has at most N records, whatever limit asks for (default: no cap)"
    parser.add_argument("--max-page", metavar="N", help=max_page)
    faults = parser.add_argument_group("faults, which POST /_sandbox/faults changes later")
    for flag, metavar, text, more in _FAULTS:
        faults.add_argument(flag, metavar=metavar, help=text, **more)


def simulator(values: dict[str, Any], parse_rate: Callable[[str], Any]) -> Sandbox:
    """Return one that is as the flags say; raise ``ValueError`` with a text for people."""
    rate_limit, seed_file = parse_rate(values.pop("rate_limit")), values.pop("seed_file")
    number, max_page = _number("records", 0, 1234, values), _number("max_page", 1, 100, values)
    faults = Faults().changed({name: value for name, value in values.items() if value is not None}, _as_flag)
    records = load_seed(seed_file) if seed_file else number
    return Sandbox(rate_limit=rate_limit, records=records, max_page=max_page, faults=faults)


def _number(name: str, least: int, example: int, values: dict[str, Any]) -> int | None:
    """Take a flag's whole number, at most ``_MOST``, out of the values."""
    text = values.pop(name)
    if text is None:
        return None
    if not (re.fullmatch("[0-9]{1,6}", text) and least <= int(text) <= _MOST):
        right = f"give a whole number from {least} to {_MOST}, as in {_as_flag(name, example)}"
        raise ValueError(f"{_as_flag(name, text)} is wrong: {right}")
    return int(text)


def _as_flag(name: str, value: Any) -> str:  # noqa: ANN401 - a flag's text, or an example in JSON
    """Return how a fault is written on the command line."""
    if isinstance(value, dict):
        value = [f"{status}={rate}" for status, rate in value.items()]
    texts = value if isinstance(value, list) else ["on" if value is True else value]
    return " ".join(f"--{name.replace('_', '-')} {text}" for text in texts)


async def run(made: Sandbox, host: str, port: int, listen: Listen, tell: Callable[..., None]) -> None:
    """Simulate until SIGINT or SIGTERM; ``tell`` prints lines. Raises ``OSError`` where it can't listen."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    await made.start(host, port, listen)
    try:
        login = f'{{\\"accessKey\\":\\"{ACCESS_KEY}\\",\\"secretKey\\":\\"{SECRET_KEY}\\"}}'
        tell(
            f"The Metquay simulator listens on {made.url}",
            f"METQUAY_HOST={made.url}",
            f"METQUAY_ACCESS_KEY={ACCESS_KEY}",
            f"METQUAY_SECRET_KEY={SECRET_KEY}",
            f'{"curl.exe" if sys.platform == "win32" else "curl"} -d "{login}" "{made.url}/authenticate"',
        )
        await stop.wait()
    finally:
        await made.stop()
