"""Where Redis is, as text (``METQUAY_REDIS_URL``) and as a value.

Owns that spelling alone. A password is no part of it: process lists and `.env` are read by many.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Final, NamedTuple
from urllib.parse import unquote

from metquay_proxy.rules.address import MAX_PORT, Address
from metquay_proxy.rules.target import is_loopback

_REDIS_URL: Final = re.compile(
    r"unix://(?P<path>/[^?#]+)|(?P<scheme>rediss?)://(?:(?P<user>[^:/?#@]*)@)?(?P<host>\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)"
    r"(?::(?P<port>[0-9]{1,5}))?/?(?P<database>[0-9]{0,4})",
    re.IGNORECASE,
)


class RedisAddress(NamedTuple):
    """Where Redis is: ``scheme`` is redis, rediss (TLS) or unix (then ``path`` is its socket)."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    database: int = 0
    user: str | None = None

    @property
    def local(self) -> bool:
        """Whether what is sent there stays in this machine."""
        return self.scheme == "unix" or is_loopback(self.host)

    def __str__(self) -> str:
        """Return it as people write it."""
        return f"{self.scheme}://{self.path or f'{Address(self.host, self.port)}/{self.database}'}"


def parse_redis_url(text: str) -> RedisAddress:
    """Read ``redis://``, ``rediss://`` (host, port, database, user) or ``unix:///path``; raise ``ValueError``."""
    if re.match(r"\w+://[^:]*:.*@", text):
        raise ValueError(
            "contains a password: put that alone into a file, and the file's path into METQUAY_REDIS_PASSWORD_FILE"
        )
    parts = _REDIS_URL.fullmatch(text)
    if parts is None or int(parts["port"] or 0) > MAX_PORT:
        forms = "redis://host:6379/0, rediss://host:6379/0 (with TLS) or unix:///run/redis.sock"
        raise ValueError(f"is not of the form {forms}")
    if importlib.util.find_spec("redis") is None:
        raise ValueError("needs a library that is not installed: install the proxy with it, pip install '.[redis]'")
    if parts["path"]:
        return RedisAddress("unix", path=parts["path"])
    host, port, database = parts["host"].strip("[]").lower(), int(parts["port"] or 6379), int(parts["database"] or 0)
    return RedisAddress(parts["scheme"].lower(), host, port, "", database, unquote(parts["user"] or "") or None)
