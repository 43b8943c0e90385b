"""`metquay-keys`: puts the key pair into the Credential Manager of Windows, where `metquay-proxy` finds it.

With `--remove` it takes both keys out again. Not built for other systems, which have no Credential Manager.
"""

from __future__ import annotations

import contextlib
import sys
from getpass import getpass

import keyring
from keyring.errors import PasswordDeleteError

from metquay_proxy.environment import variable
from metquay_proxy.sources import PAIR, VAULT


def ask(name: str) -> str:
    """Return what is typed, without showing it, or a line of standard input where that is no console."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().strip()
    return getpass(f"Paste {name}, then press Enter (Enter alone keeps the key that is there): ").strip()


def main() -> int:
    """Ask for both keys, or remove both; return the exit code."""
    for name in map(variable, PAIR):
        if sys.argv[1:] == ["--remove"]:
            with contextlib.suppress(PasswordDeleteError):  # there is none
                keyring.delete_password(VAULT, name)
        elif key := ask(name):
            keyring.set_password(VAULT, name, key)
            print(f"{name} is in the Credential Manager now.")
        elif not keyring.get_password(VAULT, name):
            print(f"There is no {name} in the Credential Manager yet. Run this again to add it.")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
