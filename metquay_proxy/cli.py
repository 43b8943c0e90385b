"""The commands: what is typed, what is printed about it, and exit codes.

Owns part 1 of the contract. Exit codes: 0 after a clean end, 2 for wrong flags and settings (one line each), 1 for
anything else that a person can put right (one line). Must not do the work itself, and imports what does it only when it
is wanted: ``health`` and ``--version`` must load nothing that is slow.

Facts: argparse echoes what was typed, and that may hold a secret: of an unknown flag only the name is repeated. Windows
has no ``loop.add_signal_handler``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import re
import sys

from metquay_proxy import __version__
from metquay_proxy.environment import Refused, find, nearest, variable

TYPE_CHECKING = False  # to import `typing` costs `health` 8 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Final, NoReturn, TextIO

    from metquay_proxy.app import Proxy
    from metquay_proxy.rules.address import Address
    from metquay_proxy.settings import Setting, Settings

PROGRAM: Final = "metquay-proxy"
SANDBOX_LISTEN: Final = "localhost:6388"

_FORMATTER: Final = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=120)
"""argparse's own, but of one width: to find out the terminal's costs `health` 4 ms."""
_FAILED: Final = 1
_WRONG: Final = 2
_SECRETS: Final = """\
secrets, which have no flag (set the variable, or ..._FILE to the path of a file that contains the secret):{}

A setting is taken from the first of these that has it: flag, environment, .env in the current directory, secret file.
A secret file is one that a ..._FILE variable names, or one in $CREDENTIALS_DIRECTORY or /run/secrets that has the
variable's name. On Windows, the key pair can also be in Credential Manager.

metquay-proxyw.exe, the program for Windows that opens no window, writes its output to logs\\proxy.log in the current
directory. install.ps1 -ForMe makes that %LOCALAPPDATA%\\metquay-proxy, install.ps1 without it makes it
%ProgramFiles%\\metquay-proxy; .env is there too."""


class _Parser(argparse.ArgumentParser):
    """argparse, but for mistakes: one line, and the flag that was probably meant; ``secrets`` have no flag."""

    def __init__(self, command: str, description: str, epilog: str = "", secrets: Sequence[str] = ()) -> None:
        usage = f"{PROGRAM} {'[serve]' if command == 'serve' else command} [flags]"
        super().__init__(
            f"{PROGRAM} {command}", usage, description, epilog, formatter_class=_FORMATTER, allow_abbrev=False
        )
        self._secrets = secrets

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{PROGRAM}: {message}; see {self.prog} --help")

    def print_help(self, file: object = None) -> None:
        del file  # argparse gives none, and lets what can't be written fail
        _print(self.format_help().rstrip())

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the values, or raise ``Refused``."""
        values, unknown = self.parse_known_args(arguments)
        if unknown:
            name = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
            if not name.startswith("--"):
                name = name[:2]  # what follows is a value
            setting = name[2:].replace("-", "_")
            if setting in self._secrets:
                cure = f"set {variable(setting)}_FILE to the path of a file that contains it"
                raise Refused(f"{PROGRAM}: there is no {name}, since every user can read a command line: {cure}")
            flags = re.findall("--[a-z-]+", self.format_help())
            self.error(f"unknown flag {name}{_meant(name, flags)}" if name else "it accepts nothing but flags")
        return values


def _meant(word: str, known: Sequence[str]) -> str:
    return f", did you mean {near}?" if (near := nearest(word, known)) else ""


def _mend_streams() -> None:
    """Give the program the streams that it was started without (by services, pythonw, ``>&-``).

    A descriptor that is closed would become a socket's, and what is printed would go to a client.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)  # it takes the lowest that is free, but not on Windows
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as we run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def _print(*lines: str, to: TextIO | None = None) -> None:
    stream = to or sys.stdout
    try:
        print(*[line + "\n" for line in lines], sep="", end="", file=stream, flush=True)
    except OSError:  # the disk is full, or the reader is gone: what is still held must not fail again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(*lines: str, to: TextIO | None = None) -> None:
    """Print from within a loop, which must not wait: where a pipe is full, because nobody reads it, nothing is told."""
    import select  # noqa: PLC0415 - the other commands can do without

    # a pipe that takes anything takes 512 bytes and more at once (POSIX: PIPE_BUF); Linux 4,096
    if os.name == "nt" or select.select([], [to or sys.stdout], [], 0)[1]:
        _print(*lines, to=to)


def _settings_parser(command: str, description: str) -> _Parser:
    """Return the parser of a command that takes all settings."""
    from metquay_proxy.settings import HEADINGS, VARIABLES, default_text, flag, meaning  # noqa: PLC0415 - slow

    secrets = [name for name in VARIABLES if flag(name) is None]
    meanings = "".join(f"\n  {variable(name):24}{meaning(name)[1]}" for name in secrets)
    parser = _Parser(command, description, _SECRETS.format(meanings), secrets)
    add = parser.add_argument
    for name, field in VARIABLES.items():
        if name in HEADINGS:
            add = parser.add_argument_group(HEADINGS[name]).add_argument
        option, default, (called, words) = flag(name), default_text(name), meaning(name)
        if option is not None:
            needed = " (required)" if name == "host" else f" (default: {default})" if default else ""
            more = {"action": argparse.BooleanOptionalAction} if field.annotation is bool else {"metavar": called}
            add(option, dest=name, help=f"{words} [env: {variable(name)}]{needed}".replace("%", "%%"), **more)
    return parser


def _load(values: argparse.Namespace, *, sandbox: bool = False) -> Settings:
    from metquay_proxy.settings import VARIABLES, load  # noqa: PLC0415 - slow

    words = {True: "true", False: "false"}
    given = {name: words.get(value, value) for name, value in vars(values).items() if value is not None}
    return load({name: value for name, value in given.items() if name in VARIABLES}, sandbox=sandbox)


def _serve(arguments: Sequence[str]) -> int:
    usual = gc.get_threshold()
    gc.set_threshold(10_000, 1_000)  # loading makes little garbage, half a MiB in all: few looks are enough
    _survive()
    commands = "".join(f"\n  {name:10}{summary}" for name, (_, summary) in COMMANDS.items())
    overview = f"A local authenticating reverse proxy for the Metquay API.\n\ncommands:{commands}"
    parser = _settings_parser("serve", overview)
    parser.add_argument("--sandbox", action="store_true", help="use the built-in Metquay simulator; no keys are needed")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    values = parser.parse(arguments)
    settings = _load(values, sandbox=values.sandbox)
    with _no_certificates():
        from metquay_proxy import app  # noqa: PLC0415 - slow, and of no use with wrong settings

    def listens(proxy: Proxy) -> None:
        _welcome(proxy, settings)
        gc.freeze()  # what the program consists of never becomes garbage: collections need not look at it again
        gc.set_threshold(*usual)

    return app.run(settings, listens, warnings=_out_of_sight(values, settings))


@contextlib.contextmanager
def _no_certificates() -> Iterator[None]:
    """Have OpenSSL find none of the system's certificates meanwhile.

    aiohttp reads them all, twice, for the client that comes along with its server, as soon as it is loaded: 40 of 250
    ms and 2 MiB, and nothing here uses that client.
    """
    names = ("SSL_CERT_FILE", "SSL_CERT_DIR")
    set_before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, os.devnull))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(set_before)


def _survive() -> None:
    """End at once where the program is told to stop while it loads, and ignore what would end it by default.

    An exception would not do: a library in C or Rust that it meets turns it into another one, or into nothing. Until
    the server's handlers are there, SIGHUP's says what it is to mean: SIGTERM's, to end, since the terminal may be
    closed; another one, to read files again, which are being read now anyway. Where it is ignored (nohup) that stays.
    """
    import signal  # noqa: PLC0415 - the other commands can do without

    def leave(*_: object) -> None:
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGBREAK", signal.SIGTERM)):
        signal.signal(number, leave)
    if os.name == "nt":
        return
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
        with contextlib.suppress(OSError):  # there is no terminal
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
            signal.signal(signal.SIGHUP, leave)


def _welcome(proxy: Proxy, settings: Settings) -> None:
    """Print where it listens and for whom; all of it can be pasted, and works with these settings."""
    import json  # noqa: PLC0415 - the other commands can do without
    import shlex  # noqa: PLC0415 - as above

    from metquay_proxy.log import output  # noqa: PLC0415 - as above

    whom = f"{proxy.base.authority} with key {proxy.key}"
    if settings.sandbox:
        whom = "the built-in sandbox (made-up data, no account needed)"
    urls = list(dict.fromkeys([_url(proxy, address) for address in proxy.listening]))
    root = next((url for url in urls if not url.startswith("unix:")), None)
    # Windows PowerShell has another curl; the certificate may be anybody's, and for another name.
    curl = ("curl.exe" if sys.platform == "win32" else "curl") + (" --insecure" if settings.tls_cert else "")
    if root is None:
        curl += f" --unix-socket {shlex.quote(proxy.listening[0].path)}"
    test = f'{curl} "{root or f"{proxy.scheme}://localhost"}{"/-/ready" if settings.keys else "/customers?limit=2"}"'
    page = root and f"{root}/-/"
    watched = [f"http://{address}/-/metrics" for address in proxy.watched]
    if output.as_json:
        told = {"version": __version__, "addresses": urls, "upstream": whom, "status_page": page, "try": test}
        _tell(json.dumps({"event": "started", **told} | ({"metrics": watched} if watched else {})))
        return
    lines = [f"metquay-proxy {__version__} listens on {', '.join(urls)}", f"for {whom}"]
    if any(address.hosts != address.reach for address in proxy.listening):
        lines.append("other computers can reach it too, at this one's addresses")
    if page:
        lines.append(f"status page: {page}")
    lines += [f"probes and metrics only: {url}" for url in watched]
    if settings.keys:
        lines.append("each tool must send a client key, for instance in a header X-Proxy-Key")
    _tell(*lines, f"try: {test}")


def _url(proxy: Proxy, address: Address) -> str:
    """Return where a program of this machine reaches us."""
    if address.path:
        return str(address)
    host = address.host if address.hosts == address.reach else address.reach[0]
    return f"{proxy.scheme}://{address._replace(host=host)}"


def _out_of_sight(values: argparse.Namespace, settings: Settings) -> list[str]:
    """Return a warning for each flag that moves the proxy away from where ``health`` without flags looks for it."""
    from metquay_proxy.rules.address import DEFAULT_LISTEN, parse_listen  # noqa: PLC0415 - slow

    found = find()
    asked, moved, seen = found.get("listen", DEFAULT_LISTEN), {}, False
    with contextlib.suppress(ValueError):  # the flag took the place of a wrong one
        seen = any(parse_listen(asked)[0].is_reached_at(address) for address in settings.listen)
    if values.listen and not seen:
        moved["listen"] = f"elsewhere: {asked}"
    if values.tls_cert and "tls_cert" not in found:
        moved["tls_cert"] = "in clear text"
    return [
        f"`metquay-proxy health` (a container's health check) does not know the flag --{name.replace('_', '-')}, and "
        f'asks {how}. Set the variable instead of the flag (docker run -e "{variable(name)}={getattr(values, name)}"), '
        "or give health the same flag; for a port 0, with the port that is printed here."
        for name, how in moved.items()
    ]


def _sandbox(arguments: Sequence[str]) -> int:
    _survive()
    import asyncio  # noqa: PLC0415 - slow

    from metquay_proxy import listeners  # noqa: PLC0415 - slow
    from metquay_proxy.rules.address import parse_listen  # noqa: PLC0415 - slow
    from metquay_proxy.rules.quota import parse_rate  # noqa: PLC0415 - slow
    from metquay_proxy.sandbox import command  # noqa: PLC0415 - slow

    def report(why: str | None) -> None:
        _tell(f"no new clients are accepted: {why}" if why else "new clients are accepted again", to=sys.stderr)

    parser = _Parser("sandbox", "Run the Metquay simulator alone, as an upstream for anything.")
    parser.add_argument("--listen", default=SANDBOX_LISTEN, metavar="ADDRESS", help="host:port (default: %(default)s)")
    command.add_flags(parser)
    values = vars(parser.parse(arguments))
    try:
        address, *more = parse_listen(values.pop("listen"))
        simulator = command.simulator(values, parse_rate)
    except ValueError as error:
        parser.error(str(error))
    if more or address.path:
        parser.error("--listen takes one host and port here")
    try:
        listen = functools.partial(listeners.listen, report)
        asyncio.run(command.run(simulator, address.host, address.port, listen, _tell))
    except listeners.CannotListen as error:
        raise OSError(0, f"{error.cause} Choose another place with --listen.") from None
    return 0


def _settings(arguments: Sequence[str]) -> int:
    from metquay_proxy.settings import SettingsError  # noqa: PLC0415 - slow

    parser = _settings_parser("settings", "Print the settings in force, each with its source; secrets are masked.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parser.parse(arguments)
    try:
        settings = _load(values)
    except SettingsError as error:
        _print_settings(error.sources, as_json=values.json)
        raise
    _print_settings(settings.sources(), as_json=values.json)
    _print(*(f"warning: {line}" for line in settings.warnings), to=sys.stderr)
    return 0


def _print_settings(sources: Sequence[Setting], *, as_json: bool) -> None:
    if as_json:
        import json  # noqa: PLC0415 - only this case pays for loading it

        _print(json.dumps({name: {"value": value, "source": source} for name, value, source in sources}, indent=2))
        return
    rows = [(name, "-" if value is None else value.replace("\n", ","), source) for name, value, source in sources]
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    _print(*(f"{name:{names}}  {value:{values}}  {source}" for name, value, source in rows))


def _check(arguments: Sequence[str]) -> int:
    from metquay_proxy import check  # noqa: PLC0415 - slow

    parser = _settings_parser("check", "Try, step by step, what lies between this machine and Metquay.")
    parser.add_argument("--sandbox", action="store_true", help="try it on the built-in Metquay simulator")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parser.parse(arguments)
    return check.run(lambda: _load(values, sandbox=values.sandbox), _print, as_json=values.json)


def _health(arguments: Sequence[str]) -> int:
    from metquay_proxy import health  # noqa: PLC0415 - the other commands can do without
    from metquay_proxy.rules.address import DEFAULT_LISTEN  # noqa: PLC0415 - the other commands can do without

    parser = _Parser("health", "Ask the proxy whether it is alive: exit 0 if so, else 1.")
    parser.add_argument("--ready", action="store_true", help="ask whether it is ready, that is, has a usable token")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="keep asking, for at most this long")
    where = f"where it listens; of several the first is asked [env: METQUAY_LISTEN] (default: {DEFAULT_LISTEN})"
    parser.add_argument("--listen", metavar="ADDRESS", help=where)
    parser.add_argument("--tls-cert", metavar="FILE", help="set if the proxy serves https [env: METQUAY_TLS_CERT]")
    values = parser.parse(arguments)
    if not 0 <= values.wait < float("inf"):
        parser.error("argument --wait: give a number of seconds, 0 or more")
    found = {"listen": DEFAULT_LISTEN, "tls_cert": "", **find()}
    listen, tls = values.listen or found["listen"], bool(values.tls_cert or found["tls_cert"])
    try:
        why = health.check(listen, ready=values.ready, tls=tls, wait=values.wait)
    except ValueError as error:
        raise Refused(f"METQUAY_LISTEN (--listen): {error}") from None
    _print(why or ("ready" if values.ready else "alive"), to=sys.stderr if why else sys.stdout)
    return _FAILED if why else 0


COMMANDS: Final[dict[str, tuple[Callable[[Sequence[str]], int], str]]] = {
    "serve": (_serve, "run the proxy; the default"),
    "sandbox": (_sandbox, "run the Metquay simulator alone"),
    "health": (_health, "ask a running proxy whether it is alive, or ready"),
    "check": (_check, "find out what is wrong, and what to do about it"),
    "settings": (_settings, "print the effective settings and where each comes from"),
}
"""Name to what runs it (arguments to exit code), and what it does."""


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
            raise Refused(f"{PROGRAM}: unknown command {command}{_meant(command, [*COMMANDS])}; see {PROGRAM} --help")
        return COMMANDS[command][0](words)
    except Refused as error:
        _print(*error.args, to=sys.stderr)
        return _WRONG
    except KeyboardInterrupt:
        return _FAILED if command == "health" else 0
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _print(f"{PROGRAM}: {error.strerror or error}{where}", to=sys.stderr)
        return _FAILED
    finally:
        _print()  # what argparse wrote, too
