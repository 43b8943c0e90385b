"""`metquay-keys`: stores the key pair in Credential Manager of Windows, where `metquay-proxy` finds it.

With `--remove` it takes both keys out again. Not built for other systems, which have no Credential Manager.

Facts: in the older console windows, Ctrl-V types the character 0x16 where what is typed is not shown.
"""

from __future__ import annotations

import contextlib
import re
import sys
from getpass import getpass

import keyring
from keyring.errors import PasswordDeleteError

from metquay_proxy.environment import variable
from metquay_proxy.sources import PAIR, VAULT


def typed(name: str) -> str:
    """Return a key that is typed, without showing it, or one line of standard input if that is no console."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().strip()
    while True:
        print(f"Paste {name} by a right click (not by Ctrl+V), then press Enter. The key is not shown.")
        key = getpass("To keep the key that is stored, press only Enter: ").strip()
        if re.fullmatch("[!-~]*", key):
            return key
        print("That is no key: it contains a character that is not a letter, a digit or a common sign. Try again.")


def main() -> int:
    """Ask for both keys, or remove both; return the exit code."""
    for name in map(variable, PAIR):
        if sys.argv[1:] == ["--remove"]:
            with contextlib.suppress(PasswordDeleteError):  # there is none
                keyring.delete_password(VAULT, name)
        elif key := typed(name):
            keyring.set_password(VAULT, name, key)
            print(f"{name} is stored in Credential Manager.")
        elif not keyring.get_password(VAULT, name):
            print(f"No {name} is stored in Credential Manager yet. Start again, and paste it.")
            return 1
        else:
            print(f"{name} stays as it is.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
