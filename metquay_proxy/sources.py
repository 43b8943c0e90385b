"""Where settings are found: flags, environment, ``.env``, files of secrets; each text remembers its place.

Owns the precedence of part 2 of the contract, and what is odd about a place: names that are nobody's, lines of ``.env``
that were meant to be settings, files that are not used or that everybody can read. Must not know what a text means, and
must never put one into a warning.

Facts: Windows' Credential Manager is reached by the library keyring, an extra; the program without Python has it.
systemd puts credentials into ``$CREDENTIALS_DIRECTORY`` (systemd.exec(5)), docker and podman into
``/run/secrets``. Kubernetes adds variables such as ``METQUAY_PROXY_SERVICE_HOST`` for each service of that name: those
are nobody's mistake. Windows' editor adds .txt to a name, and its file manager does not show that.
"""

import errno
import importlib.util
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from dotenv.parser import Binding

from metquay_proxy.environment import ENV_FILE, PREFIX, nearest, read_env_file, variable, variables

PAIR: Final = ("access_key", "secret_key")
VAULT: Final = "metquay-proxy"
"""Under which name the Credential Manager holds the key pair; the user's name is the variable's."""

_SERVICE_LINK: Final = re.compile(r"METQUAY_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_[0-9]+_\w+)")
_NO_SETTING: Final = (
    "it is not of the form NAME=value (is there a word or a symbol before the name, a colon instead of =, no =, or an "
    "unclosed quotation mark?)"
)


class Text(NamedTuple):
    """What was found for a setting: ``origin`` is what ``settings`` shows, ``place`` is what a message names."""

    text: str
    origin: str
    place: str
    file: Path | None = None
    """The file that holds nothing else."""


class Found:
    """What was found where. What is found first wins."""

    def __init__(self, names: Iterable[str] = (), directory: Path = Path()) -> None:
        """``names`` are all settings; a secret is one that has a ``_file``. ``directory`` holds mounted secrets."""
        self.texts: dict[str, Text] = {}
        self.warnings: list[str] = []
        self.remarks: list[str] = []
        """What is odd about where the key pair was found."""
        self.problems: dict[str, tuple[str, str]] = {}
        """What keeps a setting from being found: whose fault it is, and a sentence about that."""
        self._names = tuple(names)
        self._directories = [Path(path) for path in (os.environ.get("CREDENTIALS_DIRECTORY"), directory) if path]

    def search(self, flags: Mapping[str, str]) -> None:
        """Look everywhere, in order."""
        for name, text in flags.items():
            self._add(name, Text(text, "flag", "flag"))
        for name, text in variables(os.environ.items()).items():
            self._add(name, Text(text, "environment", "environment"))
        self._search_env_file()
        for name in self._names:
            if named := self.texts.get(f"{name}_file"):
                self._add_file(name, Path(named.text), named=True)
        for directory in self._directories:
            for path in self._secrets(directory):
                name = path.name[len(PREFIX) :].lower()
                if name in self._names:
                    self._add_file(name, path)
                else:
                    self._warn_unknown(name, str(directory))
        if sys.platform == "win32" and importlib.util.find_spec("keyring"):
            self._search_vault()

    def text(self, name: str) -> str:
        """Return what was found for a setting, without blanks around it."""
        return self.texts[name].text.strip() if name in self.texts else ""

    def file(self, name: str) -> Path | None:
        """Return the file that a setting came from, if it came from one that holds nothing else."""
        return self.texts[name].file if name in self.texts else None

    def _add(self, name: str, found: Text) -> None:
        if name not in self._names:
            self._warn_unknown(name, found.place, found.text)
        elif name not in self.texts:
            self.texts[name] = found
        elif name in PAIR and found.text.strip() != self.text(name):
            self._warn_unused(name, f"another one in {found.place}")

    def _search_env_file(self) -> None:
        try:
            lines = read_env_file(ENV_FILE)
        except OSError as error:
            self.problems[ENV_FILE] = (str(error.filename), f"cannot be read: {error.strerror}")
            return
        places = {}
        for line in lines:
            written, number = line.original
            number += written.removesuffix(written.lstrip()).count("\n")
            place = f"{Path(ENV_FILE).absolute()}, line {number}"
            places.update(dict.fromkeys(variables([(line.key, line.value)]), place))
            if _is_left_out(line):
                known = re.search("METQUAY_([A-Z_]+)", written.upper())
                name = known[0] if known and known[1].lower() in self._names else "NAME"
                self.warnings.append(f"{place}, is ignored: {_NO_SETTING}; write {name}=value")
        for name, text in variables((line.key, line.value) for line in lines).items():
            self._add(name, Text(text, ENV_FILE, places[name]))

    def _secrets(self, directory: Path) -> list[Path]:
        try:
            return sorted(path for path in directory.iterdir() if path.name.upper().startswith(PREFIX))
        except FileNotFoundError:
            return []
        except OSError as error:
            self.warnings.append(f"{directory} was not searched for secrets: {error.strerror}")
            return []

    def _search_vault(self) -> None:
        import keyring  # noqa: PLC0415 - an optional extra

        for name in (name for name in PAIR if name not in {*self.texts, *self.problems}):
            try:
                text = keyring.get_password(VAULT, variable(name))
            except Exception as error:  # noqa: BLE001 - the library passes on what Windows raises
                self.problems[name] = (name, f"cannot be read from the Credential Manager: {error}")
            else:
                if text:
                    self._add(name, Text(text, "Credential Manager", "the Credential Manager"))

    def _add_file(self, name: str, path: Path, *, named: bool = False) -> None:
        """Take a file for a setting; ``named`` by its ``..._FILE`` variable, else by its own name."""
        if name in self.texts:
            if named or (name in PAIR and path != self.file(name)):
                self._warn_unused(name, f"{variable(name)}_FILE" if named else str(path))
        elif named and not os.path.isfile(path):  # noqa: PTH113 - for what is no path at all, too
            cure = "write the path of a file that contains it"
            cure += "" if name == "redis_password" else f", or put the secret into {variable(name)}"
            hidden = "its value is not shown, since that may be the secret itself"
            self.problems[name] = (f"{name}_file", f"does not name an existing file ({hidden}): {cure}")
        elif name not in self.problems:
            try:
                self.texts[name] = Text(read_secret(path), f"file {path}", f"file {path}", path)
            except ValueError as error:
                self.problems[name] = (name, str(error))
                return
            mounted = path.parent in self._directories or sys.platform == "win32"
            if not mounted and path.stat().st_mode & stat.S_IROTH:
                who = f"{path}, which contains {variable(name)}, can be read by every user"
                self.warnings.append(f"{who}: chmod 600 {path}")

    def _warn_unused(self, name: str, what: str) -> None:
        told = f"{variable(name)} (from {self.texts[name].place}) is used, and {what} is not"
        (self.remarks if name in PAIR else self.warnings).append(told)

    def _warn_unknown(self, name: str, place: str, text: str = "") -> None:
        if not _SERVICE_LINK.fullmatch(variable(name)) and not text.startswith(("tcp://", "udp://")):
            hint = nearest(name, self._names)
            meant = f"; did you mean {variable(hint)}?" if hint else ""
            self.warnings.append(f"{variable(name)} (from {place}) is not a setting of this proxy{meant}")


def read_file(path: Path) -> tuple[bytes, os.stat_result]:
    """Return what an ordinary file holds, and what is known about it; waits for no pipe. Raises ``OSError``."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(), about


def read_secret(path: Path, *, whole: bool = False) -> str:
    """Return a file's text, without blanks around it unless the ``whole`` is asked for.

    Raises ``ValueError`` with a text for people.
    """
    try:
        text = read_file(path)[0].decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"the file {path} is empty")
    return text if whole else text.strip()


def place_of_env_file() -> str:
    """Return where ``.env`` is looked for, and what is there instead."""
    try:
        path = Path(ENV_FILE).absolute()
        if path.is_dir():
            return f"{path} (which is a folder: put a file in its place)"
        if path.exists():
            return str(path)
        near = [file.name for file in path.parent.iterdir() if re.fullmatch(r"(?i)[._]?env(\.txt)* *", file.name)]
    except OSError:  # the folder is gone, or not ours to look into
        return ENV_FILE
    hint = f"; rename {min(near)!r} if it is meant to be that" if near else ""
    return f"{path} (there is none{hint})"


def _is_left_out(line: Binding) -> bool:
    """Whether a line of ``.env`` is no ``NAME=value`` and is, or may be, for us."""
    name = line.key or ""
    taken = re.fullmatch(r"\w+", name) and (line.value is not None or name in os.environ)
    return line.error or ("METQUAY" in name.upper() and not taken)
