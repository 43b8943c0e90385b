"""What stands in for the library keyring and, behind it, for the Credential Manager of Windows."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from metquay_proxy.sources import VAULT

if TYPE_CHECKING:
    import pytest


class PasswordDeleteError(Exception):
    """There is nothing to delete."""


def install_vault(monkeypatch: pytest.MonkeyPatch, held: dict[str, str], error: Exception | None = None) -> None:
    """Have keyring imported from here. ``held``: name of a user to the password; ``error``: what reading raises."""

    def get_password(service: str, name: str) -> str | None:
        assert VAULT == service
        if error:
            raise error
        return held.get(name)

    def set_password(service: str, name: str, key: str) -> None:
        assert VAULT == service
        held[name] = key

    def delete_password(service: str, name: str) -> None:
        assert VAULT == service
        if name not in held:
            raise PasswordDeleteError
        del held[name]

    vault, errors = ModuleType("keyring"), ModuleType("keyring.errors")
    vault.__spec__ = ModuleSpec("keyring", None)
    vars(vault).update(get_password=get_password, set_password=set_password, delete_password=delete_password)
    vars(errors).update(PasswordDeleteError=PasswordDeleteError)
    monkeypatch.setitem(sys.modules, "keyring", vault)
    monkeypatch.setitem(sys.modules, "keyring.errors", errors)
