"""What is set on the machine that runs the tests reaches none of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from metquay_proxy import settings

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

ACCOUNT = {
    "METQUAY_HOST": "lab.metquay.co",
    "METQUAY_ACCESS_KEY": "access-key-AAAA",
    "METQUAY_SECRET_KEY": "secret-key-SSSS",
}
"""What is required."""


def unset(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in ``current`` in a folder, in whose ``run-secrets`` secrets would be mounted, and with nothing set."""
    for name in list(os.environ):
        if name.upper().startswith("METQUAY_") or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr(settings, "SECRETS_DIRECTORY", folder / "run-secrets")
    (folder / "current").mkdir()
    monkeypatch.chdir(folder / "current")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """Write a private file below a folder, and return its path."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o600)
    return path
