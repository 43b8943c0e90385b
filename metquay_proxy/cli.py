"""The commands: what is typed, what is printed about it, and exit codes.

Owns part 1 of the contract. Exit codes: 0 after a clean end, 2 for wrong flags and settings (one line each), 1 for
anything else that a person can put right (one line). Must not do the work itself, and imports what does it only when it
is wanted: ``health`` and ``--version`` must load nothing that is slow.

Facts: argparse echoes what was typed, and that may hold a secret: of an unknown flag only the name is repeated. Windows
has no ``loop.add_signal_handler``.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys

from metquay_proxy import __version__

TYPE_CHECKING = False  # to import `typing` costs `health` 8 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import ModuleType
    from typing import Final, NoReturn, TextIO

    from metquay_proxy.rules.address import Address
    from metquay_proxy.sandbox.server import Sandbox
    from metquay_proxy.settings import Setting, Settings, SettingsError

PROGRAM: Final = "metquay-proxy"
SANDBOX_LISTEN: Final = "localhost:6388"

_FAILED: Final = 1
_WRONG: Final = 2


class _UsageError(Exception):
    """What was typed makes no sense; the text says why."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's own, but of one width: to find out the terminal's costs `health` 4 ms."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=120)


class _Parser(argparse.ArgumentParser):
    """argparse, but for mistakes: one line, and the flag that was probably meant."""

    def __init__(self, command: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"{PROGRAM} {command}",
            usage=f"{PROGRAM} {'[serve]' if command == 'serve' else command} [flags]",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )

    def error(self, message: str) -> NoReturn:
        msg = f"{message}; see {self.prog} --help"
        raise _UsageError(msg)

    def parse(self, arguments: Sequence[str], secrets: Iterable[str] = ()) -> argparse.Namespace:
        """Return the values, or raise ``_UsageError``; ``secrets`` are settings that have no flag."""
        values, unknown = self.parse_known_args(arguments)
        if unknown:
            self._refuse(unknown, secrets)
        return values

    def _refuse(self, unknown: Sequence[str], secrets: Iterable[str]) -> NoReturn:
        name = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
        if not name.startswith("--"):
            name = name[:2]  # what follows is a value
        setting = name[2:].replace("-", "_")
        if setting in secrets:
            variable = f"METQUAY_{setting.upper()}"
            msg = f"there is no {name}, since every user can read a command line: set {variable}, or {variable}_FILE"
            raise _UsageError(msg)
        known = [flag for action in self._actions for flag in action.option_strings]
        self.error(f"unknown flag {name}{_nearest(name, known)}" if name else "it takes no words beside its flags")


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib  # noqa: PLC0415 - only a mistake pays for loading it

    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""


class _Stream:
    """A standard stream that never raises: what can't be written (the disk is full, the reader gone) is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: it was closed
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


def _mend_streams() -> None:
    """Give the program the streams that it was started without (by services, pythonw, ``>&-``).

    A descriptor that is closed would become a socket's, and what is printed would go to a client.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as we run
        if not isinstance(stream, _Stream):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Stream(stream))


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201 - this is what a command line prints to


def _print(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)  # noqa: T201 - see above


def _settings_parser(command: str, description: str) -> tuple[_Parser, tuple[str, ...]]:
    """Return the parser of a command that takes all settings, and the names of those that have no flag."""
    from metquay_proxy.settings import VARIABLES, default_text, flag, variable  # noqa: PLC0415 - slow

    secrets = tuple(name for name in VARIABLES if flag(name) is None)
    parser = _Parser(command, description, _without_flag(secrets))
    for name, field in VARIABLES.items():
        option, default = flag(name), default_text(name)
        if option is None:
            continue
        text = f"{field.description} [env: {variable(name)}]" + (f" (default: {default})" if default else "")
        if name == "host":
            text += " (required)"
        if field.title:
            parser.add_argument(option, dest=name, metavar=field.title, help=text.replace("%", "%%"))
        else:
            parser.add_argument(option, dest=name, action=argparse.BooleanOptionalAction, help=text.replace("%", "%%"))
    return parser, secrets


def _without_flag(secrets: Iterable[str]) -> str:
    from metquay_proxy.settings import VARIABLES, variable  # noqa: PLC0415 - slow

    lines = [f"  {variable(name):24}{VARIABLES[name].description}" for name in secrets]
    return "\n".join(
        [
            "secrets have no flag (set the variable, or name a file that holds it in ..._FILE):",
            *lines,
            "",
            "Flags win over the environment, that over .env in the current directory, and that over secret files: the",
            "..._FILE ones, and files named like a variable in $CREDENTIALS_DIRECTORY and /run/secrets.",
        ]
    )


def _load(values: argparse.Namespace, *, sandbox: bool = False) -> Settings:
    from metquay_proxy.settings import VARIABLES, load  # noqa: PLC0415 - slow

    given = {name: value for name, value in vars(values).items() if name in VARIABLES and value is not None}
    words = {True: "true", False: "false"}
    return load({name: words.get(value, value) for name, value in given.items()}, sandbox=sandbox)


def _refuse(error: SettingsError) -> int:
    _say(*(f"warning: {line}" for line in error.warnings), *error.lines)
    return _WRONG


def _serve(arguments: Sequence[str]) -> int:
    gc.disable()  # loading makes no garbage; the server enables it once it listens
    import signal  # noqa: PLC0415 - the other commands can do without

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server has its own: process 1 would miss it
    _survive(signal)
    from metquay_proxy.settings import SettingsError  # noqa: PLC0415 - slow

    parser, secrets = _settings_parser("serve", _overview())
    parser.add_argument("--sandbox", action="store_true", help="use the built-in Metquay simulator; no keys are needed")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    values = parser.parse(arguments, secrets)
    try:
        settings = _load(values, sandbox=values.sandbox)
    except SettingsError as error:
        return _refuse(error)
    from metquay_proxy import app  # noqa: PLC0415 - slow, and of no use with wrong settings

    try:
        return app.run(settings, sandbox=values.sandbox, warnings=_out_of_sight(values, settings))
    except SettingsError as error:  # what only the attempt can tell
        return _refuse(error)


def _survive(signal: ModuleType) -> None:
    """Ignore what would end the program by default, and say what SIGHUP is to mean, by its handler until the server's.

    ``default_int_handler``: end, since the terminal may be closed; another one: read files again, which are being read
    now anyway. Where it is ignored (nohup) that stays so.
    """
    if os.name == "nt":
        return
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        try:
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        except OSError:
            signal.signal(signal.SIGHUP, lambda *_: None)
        else:
            signal.signal(signal.SIGHUP, signal.default_int_handler)


def _out_of_sight(values: argparse.Namespace, settings: Settings) -> list[str]:
    """Return a warning for each flag that moves the proxy away from where ``health`` without flags looks for it."""
    from metquay_proxy import health  # noqa: PLC0415 - only `serve` wants both
    from metquay_proxy.rules.address import DEFAULT_LISTEN, parse_listen  # noqa: PLC0415 - as above

    asked = health.find("METQUAY_LISTEN", os.environ) or DEFAULT_LISTEN
    try:
        seen = any(parse_listen(asked)[0].is_reached_at(address) for address in settings.listen)
    except ValueError:  # the flag took the place of a wrong one
        seen = False
    moved = [("listen", values.listen)] if values.listen and not seen else []
    if values.tls_cert and not health.find("METQUAY_TLS_CERT", os.environ):
        moved.append(("tls-cert", values.tls_cert))
    warnings = []
    for flag, value in moved:
        variable = f"METQUAY_{flag.upper().replace('-', '_')}={value}"
        cure = f'Set {variable} in place of the flag (docker run -e "{variable}"), or give health the same flag.'
        if flag == "listen" and not (settings.listen[0].port or settings.listen[0].path):
            cure = "Give it the address that is printed here, with --listen."
        why = f"`metquay-proxy health` (a container's health check) does not see the flag --{flag}, and asks elsewhere"
        warnings.append(f"{why}: {asked}. {cure}" if flag == "listen" else f"{why}: in clear text. {cure}")
    return warnings


def _sandbox(arguments: Sequence[str]) -> int:
    import signal  # noqa: PLC0415 - the other commands can do without

    _survive(signal)
    parser = _Parser("sandbox", "Run the Metquay simulator alone, as an upstream for anything.")
    parser.add_argument("--listen", default=SANDBOX_LISTEN, metavar="ADDRESS", help="host:port (default: %(default)s)")
    parser.add_argument(
        "--rate-limit",
        default="100/minute",
        metavar="RATE",
        help="N/second, N/minute, N/hour or off (default: %(default)s)",
    )
    parser.add_argument("--token-lifetime", metavar="SECONDS", help="seconds that a token lives (default: 900)")
    parser.add_argument("--seed-file", metavar="FILE", help="JSON file with the records to begin with")
    faults = parser.add_argument_group("faults, which POST /_sandbox/faults changes later")
    for flag, metavar, text in _FAULTS:
        faults.add_argument(flag, metavar=metavar, help=text, default=argparse.SUPPRESS)
    faults.add_argument(
        "--fail",
        metavar="STATUS=RATE",
        action="append",
        help="requests that get that status; repeatable",
        default=argparse.SUPPRESS,
    )
    faults.add_argument(
        "--login-outage",
        metavar="SECONDS",
        nargs="?",
        const="on",
        help="answer logins with 503",
        default=argparse.SUPPRESS,
    )
    values = vars(parser.parse(arguments))

    import asyncio  # noqa: PLC0415 - slow

    from metquay_proxy.rules.address import parse_listen  # noqa: PLC0415 - slow
    from metquay_proxy.rules.quota import parse_rate  # noqa: PLC0415 - slow
    from metquay_proxy.sandbox.server import Faults, Sandbox, load_seed  # noqa: PLC0415 - slow

    try:
        address, *more = parse_listen(values.pop("listen"))
        if more or address.path:
            parser.error("--listen takes one host and port here")
        rate_limit = parse_rate(values.pop("rate_limit"))
        seed_file = values.pop("seed_file")
        simulator = Sandbox(
            rate_limit=rate_limit,
            records=load_seed(seed_file) if seed_file else None,
            faults=Faults().changed({name: value for name, value in values.items() if value is not None}),
        )
    except ValueError as error:
        parser.error(str(error))
    from metquay_proxy.listeners import CannotListen  # noqa: PLC0415 - slow

    try:
        asyncio.run(_simulate(simulator, address))
    except CannotListen as error:
        _say(f"{PROGRAM}: {error.cause} Choose another place with --listen.")
        return _FAILED
    return 0


_FAULTS: Final = (
    ("--latency", "SECONDS", "seconds before each answer"),
    ("--jitter", "SECONDS", "up to so many seconds more, by chance"),
    ("--retry-after", "on|off", "whether a 429 carries Retry-After (default: off)"),
    ("--lose-answer", "RATE", "requests (0 to 1) that are executed and then dropped without an answer"),
    ("--reset", "RATE", "answers (0 to 1) whose connection is reset in mid-body"),
    ("--slow-body", "BYTES/S", "bytes a second of an answer's body"),
)


async def _simulate(simulator: Sandbox, address: Address) -> None:
    import asyncio  # noqa: PLC0415 - slow
    import signal  # noqa: PLC0415 - the other commands can do without

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    from metquay_proxy.listeners import listen  # noqa: PLC0415 - slow

    listens = listen(
        lambda why: _say(f"no new clients are let in: {why}" if why else "new clients are let in again"), 0
    )
    await simulator.start(address.host, address.port, listens)
    try:
        from metquay_proxy.sandbox.server import ACCESS_KEY, SECRET_KEY  # noqa: PLC0415 - slow

        login = f'{{\\"accessKey\\":\\"{ACCESS_KEY}\\",\\"secretKey\\":\\"{SECRET_KEY}\\"}}'
        _print(
            f"The Metquay simulator listens on {simulator.url}",
            f"METQUAY_HOST={simulator.url}",
            f"METQUAY_ACCESS_KEY={ACCESS_KEY}",
            f"METQUAY_SECRET_KEY={SECRET_KEY}",
            f'{"curl.exe" if sys.platform == "win32" else "curl"} -d "{login}" "{simulator.url}/authenticate"',
        )
        await stop.wait()
    finally:
        await simulator.stop()


def _settings(arguments: Sequence[str]) -> int:
    from metquay_proxy.settings import SettingsError  # noqa: PLC0415 - slow

    parser, secrets = _settings_parser(
        "settings", "Print the settings in force, each with its source; secrets are masked."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parser.parse(arguments, secrets)
    try:
        settings = _load(values)
    except SettingsError as error:
        _print_settings(error.sources, as_json=values.json)
        return _refuse(error)
    _print_settings(settings.sources(), as_json=values.json)
    _say(*(f"warning: {line}" for line in settings.warnings))
    return 0


def _print_settings(sources: Iterable[Setting], *, as_json: bool) -> None:
    if as_json:
        import json  # noqa: PLC0415 - only this case pays for loading it

        _print(json.dumps({name: {"value": value, "source": source} for name, value, source in sources}, indent=2))
        return
    rows = [(name, "-" if value is None else value.replace("\n", ","), source) for name, value, source in sources]
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    _print(*(f"{name:{names}}  {value:{values}}  {source}" for name, value, source in rows))


def _check(arguments: Sequence[str]) -> int:
    from metquay_proxy import check  # noqa: PLC0415 - slow

    parser, secrets = _settings_parser("check", "Try, step by step, what lies between this machine and Metquay.")
    parser.add_argument("--sandbox", action="store_true", help="try it on the built-in Metquay simulator")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parser.parse(arguments, secrets)
    return check.run(lambda: _load(values, sandbox=values.sandbox), sandbox=values.sandbox, as_json=values.json)


def _health(arguments: Sequence[str]) -> int:
    from metquay_proxy import health  # noqa: PLC0415 - the other commands can do without
    from metquay_proxy.rules.address import DEFAULT_LISTEN  # noqa: PLC0415 - the other commands can do without

    parser = _Parser("health", "Ask the proxy whether it is alive: exit 0 if so, else 1.")
    parser.add_argument("--ready", action="store_true", help="ask whether it is ready: whether it has a usable token")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="ask until it is so, at most so long")
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        help=f"where it listens; of several the first is asked [env: METQUAY_LISTEN] (default: {DEFAULT_LISTEN})",
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="set if the proxy serves https [env: METQUAY_TLS_CERT]")
    values = parser.parse(arguments)
    if not 0 <= values.wait < float("inf"):
        parser.error("argument --wait: give a number of seconds, 0 or more")
    listen = values.listen or health.find("METQUAY_LISTEN", os.environ) or DEFAULT_LISTEN
    tls = bool(values.tls_cert or health.find("METQUAY_TLS_CERT", os.environ))
    try:
        why = health.check(listen, ready=values.ready, tls=tls, wait=values.wait)
    except ValueError as error:
        _say(f"METQUAY_LISTEN (--listen): {error}")
        return _WRONG
    if why is not None:
        _say(why)
        return _FAILED
    _print("ready" if values.ready else "alive")
    return 0


COMMANDS: Final[dict[str, tuple[Callable[[Sequence[str]], int], str]]] = {
    "serve": (_serve, "run the proxy; the default"),
    "sandbox": (_sandbox, "run the Metquay simulator alone"),
    "health": (_health, "ask a running proxy whether it is alive, or ready"),
    "check": (_check, "find out what is wrong, and what to do about it"),
    "settings": (_settings, "print the effective settings and where each comes from"),
}
"""Name to what runs it (arguments to exit code), and what it does."""


def _overview() -> str:
    lines = [f"  {name:10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["A local authenticating reverse proxy for the Metquay API.", "", "commands:", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``arguments`` are those after the program's name."""
    _mend_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        _print(f"{PROGRAM} {__version__}")
        return 0
    command = words.pop(0) if words and not words[0].startswith("-") else "serve"
    try:
        if command not in COMMANDS:
            msg = f"unknown command {command}{_nearest(command, COMMANDS)}; see {PROGRAM} --help"
            raise _UsageError(msg)
        return COMMANDS[command][0](words)
    except _UsageError as error:
        _say(f"{PROGRAM}: {error}")
        return _WRONG
    except KeyboardInterrupt:
        return _FAILED if command == "health" else 0
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _say(f"{PROGRAM}: {error.strerror or error}{where}")
        return _FAILED
