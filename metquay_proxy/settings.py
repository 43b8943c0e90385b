"""The settings: each declared once, found in five places, and parsed into the values that the other modules take.

Owns part 2 of the contract. ``Settings`` says what a setting means and what it may be; ``load`` collects the texts
(flags, then environment, then ``.env``, then secret files). Must not act on a setting, and must never put the text of a
secret into an error, a warning or a repr.

Facts: systemd puts credentials into ``$CREDENTIALS_DIRECTORY`` (systemd.exec(5)), docker and podman into
``/run/secrets``. Kubernetes adds variables such as ``METQUAY_PROXY_SERVICE_HOST`` for each service of that name: those
are nobody's mistake. pydantic shows the input in its errors unless ``hide_input_in_errors`` is set.
"""

import contextlib
import importlib.util
import ipaddress
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import Field, PlainValidator, PrivateAttr, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from metquay_proxy.environment import ENV_FILE, PREFIX, Line, read_env_file, variables
from metquay_proxy.exchange.tokens import Credentials, oddities
from metquay_proxy.reload import read_file, serving_context
from metquay_proxy.rules.address import DEFAULT_LISTEN, Address, parse_listen
from metquay_proxy.rules.gate import ClientKey
from metquay_proxy.rules.quota import Rate, parse_rate
from metquay_proxy.rules.target import API_PREFIX, OWN_PREFIX, BaseURL, is_loopback
from metquay_proxy.upstream.pool import OutboundProxy

SECRETS_DIRECTORY: Final = Path("/run/secrets")
MAX_REPLAY_LIMIT: Final = 64 * 1024 * 1024
"""Bytes; what all kept bodies together may take."""

_KEY: Final = re.compile(r"[A-Za-z0-9._~-]{16,}")
_KEY_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_HOST_NAME: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?")
_PATH_PREFIX: Final = re.compile(r"(/(?!\.{1,2}/)[A-Za-z0-9._~!$&'()*+;=:@-]+)+/")
_SIZE: Final = re.compile(r"([0-9]+) *(b|kb|mb|gb|kib|mib|gib)?", re.IGNORECASE)
_UNIT: Final = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SERVICE_LINK: Final = re.compile(r"METQUAY_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_[0-9]+_\w+)")
_PEM_CERTIFICATE: Final = re.compile(
    rb"^-----BEGIN CERTIFICATE-----(?:[^-]*-----END CERTIFICATE-----|[^-]*)", re.MULTILINE
)
_DER: Final = rb"0(?:\x80|\x81.|\x82..|\x83...)"
_NOT_PEM: Final = {
    rb"\s*\Z": "is empty",
    rb"\xff\xfe|\xfe\xff": "is saved as UTF-16: save it as plain text (ASCII or UTF-8)",
    _DER + rb"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02": "is a PKCS #7 file (p7b) in binary form. Convert it: "
    "openssl pkcs7 -inform der -print_certs -in {0} -out ca.pem",
    rb".*-----BEGIN PKCS7-----": "is a PKCS #7 file (p7b). Convert it: openssl pkcs7 -print_certs -in {0} -out ca.pem",
    _DER + rb"\x02\x01\x03": "is a PKCS #12 file (pfx, p12). Convert it: openssl pkcs12 -nokeys -in {0} -out ca.pem",
    _DER: "is in binary (DER) form. Convert it: openssl x509 -inform der -in {0} -out ca.pem",
    rb".*-----BEGIN [A-Z ]*PRIVATE KEY-----": "holds a private key and no certificate: name the file of the CA's "
    "certificate, which begins with BEGIN CERTIFICATE",
    rb".*-----BEGIN [A-Z ]*CERTIFICATE REQUEST-----": "holds the request for a certificate, not the certificate",
    rb".*[^\n]-----BEGIN CERTIFICATE-----": "holds a certificate that does not begin at the "
    "beginning of a line: copy it again, each of its lines on a line of its own",
    rb"": "holds no certificate in PEM form (a text with BEGIN CERTIFICATE)",
}
"""What a file begins with that holds no certificate for OpenSSL, and what to tell its owner."""
_PROXY_URL: Final = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?:(?P<user>[^:]*)(?::(?P<password>.*))?@)?"
    r"(?P<host>\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(?::(?P<port>[0-9]{1,5}))?(?P<path>/[^@]*)?",
    re.IGNORECASE | re.DOTALL,
)
_LEFT_OUT: Final = (
    (r"(?i)(set|setx|setenv|declare)\s|\$env:", "that is a command of a shell"),
    (r"\W*\w+[\"']?\s*:", "it has a colon in the place of ="),
    (r"[^=]*=\s*[\"']", "its quotation mark is not closed, or something follows the closed one"),
    (r"[^=]*\S\s+[^\s=][^=]*=", "more than a name stands before ="),
    (r"[^=]*$", "it has no ="),
    (r"", "it cannot be read"),
)
"""What a line of ``.env`` looks like that is no ``NAME=value``, and what to say of it."""
_SHORT_KEY: Final = 16
_SHORT_SECRET: Final = 12
_PAIR: Final = ("access_key", "secret_key")
_REDIS_PORT: Final = 6379
_MAX_PORT: Final = 65535
_READABLE_BY_OTHERS: Final = 0o004
DIRECT: Final = OutboundProxy("", 0)
"""No corporate proxy, not even the system's."""


class Setting(NamedTuple):
    """One effective setting for people to read: secrets are masked, ``value`` is None where there is none."""

    variable: str
    value: str | None
    source: str


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
        place = self.path or f"{Address(self.host, self.port)}/{self.database}"
        return f"{self.scheme}://{place}"


class SettingsError(Exception):
    """Settings that the proxy cannot run with: one line for each variable, without any secret."""

    def __init__(self, lines: Iterable[str], warnings: Iterable[str], sources: tuple[Setting, ...]) -> None:
        """``warnings`` and ``sources`` are those that ``Settings`` would have had."""
        self.lines = tuple(lines)
        self.warnings = tuple(warnings)
        self.sources = sources
        super().__init__("\n".join(self.lines))


class _Secret:
    """Marks a setting that has no flag and is never shown: every user of the machine can read a process list."""


def _text(parse: Callable[[str], object]) -> PlainValidator:
    """Parse a text; anything else is taken as the value itself (code that builds ``Settings`` passes values)."""

    def validate(value: object) -> object:
        if not isinstance(value, str):
            return value
        if not value.strip():
            msg = "is empty"
            raise ValueError(msg)
        return parse(value.strip())

    return PlainValidator(validate)


def _entries(text: str) -> list[str]:
    return [entry for entry in (part.strip() for part in re.split(r"[,\n]", text)) if entry]


def _key(text: str) -> SecretStr:
    if len(text.splitlines()) > 1:
        msg = "it is of several lines: put the key there alone, without a name and in one line"
        raise ValueError(msg)
    if not text.isprintable():
        msg = "it holds a character that is not seen, such as a tab or a no-break space: copy it again"
        raise ValueError(msg)
    return SecretStr(text)


def _client_key(text: str) -> ClientKey:
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        msg = "must be ASCII without spaces, since tools send it in a header"
        raise ValueError(msg)
    return ClientKey.of("default", text)


def _client_keys(text: str) -> tuple[ClientKey, ...]:
    keys: list[ClientKey] = []
    for number, entry in enumerate(_entries(text), start=1):
        name, key, *rest = [*entry.split(":"), ""]
        if not _KEY_NAME.fullmatch(name) or rest not in ([""], ["read-only", ""]):
            msg = f"entry {number} is not name:key or name:key:read-only, with a name of letters, digits, '_' and '-'"
            raise ValueError(msg)
        if not _KEY.fullmatch(key):
            msg = f"the key in entry {number} must have at least 16 characters out of letters, digits and . _ ~ -"
            raise ValueError(msg)
        keys.append(ClientKey.of(name, key, read_only=len(rest) > 1))
    return tuple(keys)


def _all_keys(single: ClientKey | None, named: tuple[ClientKey, ...]) -> tuple[ClientKey, ...]:
    keys = (single, *named) if single else named
    if len({key.name for key in keys}) < len(keys):
        msg = "names must be unique, and 'default' is the name of METQUAY_CLIENT_KEY"
        raise ValueError(msg)
    if len({key.digest for key in keys}) < len(keys):
        msg = "has a key twice; each name needs a key of its own"
        raise ValueError(msg)
    return keys


def _flag(text: str) -> bool:
    word = text.lower()
    if word not in {"true", "false", "yes", "no", "on", "off", "1", "0"}:
        msg = f"{text!r} is neither true nor false"
        raise ValueError(msg)
    return word in {"true", "yes", "on", "1"}


def parse_seconds(text: str) -> float:
    """Read a finite number of seconds, 0 or more; raise ``ValueError`` with a text for people."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds >= 0 and math.isfinite(seconds)):
        msg = f"{text!r} is not a number of seconds, such as 20 or 0.5"
        raise ValueError(msg)
    return seconds


def _timeout(text: str) -> float:
    seconds = parse_seconds(text)
    if not seconds:
        msg = "0 would fail each request; give a number of seconds above 0"
        raise ValueError(msg)
    return seconds


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text):
        msg = f"{text!r} is not a whole number from 0 to 999"
        raise ValueError(msg)
    return int(text)


def parse_size(text: str) -> int:
    """Read a number of bytes such as ``65536``, ``64 KiB`` or ``1 MB``; raise ``ValueError`` with a text for people."""
    match = _SIZE.fullmatch(text)
    if match is None:
        msg = f"{text!r} is not a size, such as 65536, 64 KiB or 1 MiB"
        raise ValueError(msg)
    return int(match[1]) * _UNIT[(match[2] or "").lower()]


def _socket_mode(text: str) -> int:
    match = re.fullmatch(r"(?:0o?)?([0-7]{3})", text)
    mode = int(match[1], 8) if match else 0
    if mode & 0o600 != 0o600:  # noqa: PLR2004 - read and write for its owner
        msg = f"{text!r} is not a mode in octal that lets its owner in, such as 0600, 0660 or 0666"
        raise ValueError(msg)
    return mode


def _replay_limit(text: str) -> int:
    size = parse_size(text)
    if size > MAX_REPLAY_LIMIT:
        msg = f"{text} is more than 64 MiB, which is what all kept bodies together may take"
        raise ValueError(msg)
    return size


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            msg = f"{text!r} is none of {', '.join(words)}"
            raise ValueError(msg)
        return text.lower()

    return parse


def _allowed_hosts(text: str) -> tuple[str, ...]:
    names = [entry.lower().rstrip(".") for entry in _entries(text)]
    for name in names:
        if not _HOST_NAME.fullmatch(name):
            msg = f"{name!r} is not a host name; give names without scheme, port or *, such as proxy.lab.example"
            raise ValueError(msg)
    return tuple(names)


def _allowed_origins(text: str) -> tuple[str, ...]:
    origins = [_origin(entry.lower().removesuffix("/")) for entry in _entries(text)]
    return tuple(origins)


def _origin(text: str) -> str:
    if not _ORIGIN.fullmatch(text):
        msg = "holds something else than origins, which have a scheme, a host and no path: https://tools.lab.example"
        raise ValueError(msg)
    scheme, _, authority = text.partition("://")
    return f"{scheme}://{authority.removesuffix({'http': ':80', 'https': ':443'}.get(scheme, '/'))}"


def _pass_through(text: str) -> tuple[str, ...]:
    prefixes = _entries(text)
    for prefix in prefixes:
        if not _PATH_PREFIX.fullmatch(prefix):
            msg = f"{prefix!r} is not a path prefix that begins and ends with a slash, such as /FlexicalERP/"
            raise ValueError(msg)
    return tuple(prefixes)


def _file(text: str) -> Path:
    path = Path(text)
    try:
        read_file(path)
    except OSError as error:
        msg = f"cannot read {text}: {error.strerror}"
        raise ValueError(msg) from None
    return path


def _ca_bundle(text: str) -> Path:
    import ssl  # noqa: PLC0415 - only who sets it pays for loading it

    path = _file(text)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        data = path.read_bytes()
        blocks = list(_PEM_CERTIFICATE.finditer(data))
        for number, block in enumerate(blocks, start=1):
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=block[0].decode("ascii"))
            except (ssl.SSLError, ValueError):
                line = data.count(b"\n", 0, block.start()) + 1
                msg = (
                    f"certificate {number} of {len(blocks)} in {text} (beginning at line {line}) can't be read: "
                    "copy it again, from BEGIN CERTIFICATE to END CERTIFICATE"
                )
                raise ValueError(msg) from None
        what = next(what for pattern, what in _NOT_PEM.items() if re.match(pattern, data, re.DOTALL))
        msg = f"{text} {what.format(text)}"
        raise ValueError(msg) from None
    return path


def parse_outbound_proxy(text: str) -> OutboundProxy:
    """Read ``http://user:password@host:port`` (scheme, user and port may be left out), or ``none``: ``DIRECT``.

    In user and password any character may stand as it is, but for a colon in the user; ``%41`` is decoded. Raises
    ``ValueError`` with a text for people, without any of the setting's own.
    """
    if text.lower() in {"none", "off", "direct", "no", "false"}:
        return DIRECT
    parts = _PROXY_URL.fullmatch(text)
    scheme = ((parts and parts["scheme"]) or "http").lower()
    path = (parts and parts["path"]) or "/"
    port = int(parts["port"] or 80) if parts else 0
    if scheme.startswith("socks"):
        msg = (
            "is a SOCKS proxy, which can't be used: give the company's HTTP proxy, or let a program stand between that "
            "speaks HTTP on this side and SOCKS on the other, such as privoxy"
        )
    elif scheme == "https":
        msg = (
            "is a proxy that is itself spoken to over TLS (https://), which can't be used: most take http:// too, and "
            "what goes through it to Metquay is encrypted all the same"
        )
    elif path.lower().endswith((".pac", ".dat")):
        msg = "is a script (PAC) for browsers, which can't be used: look into it for the proxy's address, after PROXY"
    elif parts is None or scheme != "http" or path != "/" or not 0 < port <= _MAX_PORT:
        msg = "must be the address of an HTTP proxy, such as http://proxy.lab.example:3128, or none to go directly"
    else:
        user, password = (part and unquote(part) for part in (parts["user"], parts["password"]))
        return OutboundProxy.of(parts["host"].strip("[]").lower(), port, user, password)
    raise ValueError(msg)


def parse_redis_url(text: str) -> RedisAddress:
    """Read ``redis://``, ``rediss://`` (host, port, database, user) or ``unix:///path``; raise ``ValueError``."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port or _REDIS_PORT
    except ValueError:
        parts, host, port = urlsplit(""), "", 0
    if parts.password is not None:
        msg = "holds a password: put that into a file, alone, and name the file in METQUAY_REDIS_PASSWORD_FILE"
        raise ValueError(msg)
    database = re.fullmatch(r"/?([0-9]{0,4})", parts.path)
    unix = parts.scheme == "unix" and not parts.netloc and re.match("/.", parts.path)
    if parts.query or parts.fragment or not (unix or (parts.scheme in {"redis", "rediss"} and host and database)):
        msg = "is not of the form redis://host:6379/0, rediss://host:6379/0 (with TLS) or unix:///run/redis.sock"
        raise ValueError(msg)
    if importlib.util.find_spec("redis") is None:
        msg = "needs a library that is not installed: pip install 'metquay-proxy[redis]'"
        raise ValueError(msg)
    if unix:
        return RedisAddress("unix", path=parts.path)
    user = parts.username and unquote(parts.username)
    return RedisAddress(parts.scheme, host, port, "", int(database[1] or 0) if database else 0, user or None)


def _setting(metavar: str, description: str, default: str | tuple[()] | None = None) -> Any:  # noqa: ANN401 - typed like pydantic's Field
    """Declare a setting: the name of its value, meaning and unit, and the default as one writes it."""
    return Field(default=default, title=metavar, description=description)


_Flag = Annotated[bool, _text(_flag)]
_File = Annotated[Path | None, _text(Path)]
_ReadableFile = Annotated[Path | None, _text(_file)]
_Seconds = Annotated[float, _text(parse_seconds)]
_Timeout = Annotated[float, _text(_timeout)]


class Settings(BaseSettings):
    """Everything that can be set; frozen. ``load`` makes one from the places where settings are found."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
    )

    sandbox: _Flag = _setting(
        "", "use the built-in Metquay simulator as the upstream: no host and no keys are needed", "false"
    )

    host: Annotated[BaseURL | None, _text(BaseURL.parse)] = _setting(
        "HOST",
        "your Metquay server: lab.metquay.co, or https://lab.metquay.co/api/v1; http:// within this machine only",
    )
    access_key: Annotated[SecretStr | None, _text(_key), _Secret] = _setting("KEY", "access key of the API client")
    access_key_file: _File = _setting("FILE", "file that holds the access key; read again at each login")
    secret_key: Annotated[SecretStr | None, _text(_key), _Secret] = _setting("KEY", "secret key of the API client")
    secret_key_file: _File = _setting("FILE", "file that holds the secret key; read again at each login")

    client_key: Annotated[ClientKey | None, _text(_client_key), _Secret] = _setting(
        "KEY", "key that local tools must present"
    )
    client_key_file: _File = _setting("FILE", "file that holds the client key")
    client_keys: Annotated[tuple[ClientKey, ...], _text(_client_keys), _Secret] = _setting(
        "KEYS", "named client keys, name:key[:read-only], with commas or one a line", ()
    )
    client_keys_file: _File = _setting("FILE", "file that holds the named client keys")
    trust_network: _Flag = _setting("", "listen beyond this machine without any client key", "false")

    listen: Annotated[tuple[Address, ...], _text(parse_listen)] = _setting(
        "ADDRESS",
        "where to listen: host:port (port 0: any free one) or unix:/path; several with commas",
        DEFAULT_LISTEN,
    )
    socket_mode: Annotated[int, _text(_socket_mode)] = _setting(
        "MODE", "who may open a unix socket, in octal: 0660 lets its group in too", "0600"
    )
    tls_cert: _ReadableFile = _setting("FILE", "PEM certificate chain, to serve https")
    tls_key: _ReadableFile = _setting("FILE", "PEM private key of that certificate, without a password")
    allowed_hosts: Annotated[tuple[str, ...], _text(_allowed_hosts)] = _setting(
        "NAMES", "further host names under which tools reach the proxy; several with commas", ()
    )
    allowed_origins: Annotated[tuple[str, ...], _text(_allowed_origins)] = _setting(
        "ORIGINS", "web pages that may use the proxy, such as https://tools.lab.example; several with commas", ()
    )
    read_only: _Flag = _setting("", "forward GET, HEAD and OPTIONS only", "false")
    pass_through: Annotated[tuple[str, ...], _text(_pass_through)] = _setting(
        "PATHS",
        "path prefixes sent to the server's root without a token, such as /FlexicalERP/; several with commas",
        (),
    )

    rate_limit: Annotated[Rate | None, _text(parse_rate)] = _setting(
        "RATE", "quota of the key pair: N/second, N/minute, N/hour, or off", "100/minute"
    )
    max_wait: _Seconds = _setting(
        "SECONDS", "seconds that a request may wait in all: for token and quota, between and in failed attempts", "20"
    )
    retries: Annotated[int, _text(_count)] = _setting("N", "further attempts for requests that are safe to repeat", "2")
    replay_limit: Annotated[int, _text(_replay_limit)] = _setting(
        "SIZE", "largest body kept for another attempt: bytes, KiB or MiB, up to 64 MiB", "1 MiB"
    )
    connect_timeout: _Timeout = _setting("SECONDS", "seconds to connect to Metquay", "10")
    read_timeout: _Timeout = _setting("SECONDS", "seconds of silence between bytes; the whole has no limit", "60")
    ca_bundle: Annotated[Path | None, _text(_ca_bundle)] = _setting(
        "FILE", "PEM certificates trusted beside the operating system's; the CA that issued the server's will do"
    )
    outbound_proxy: Annotated[OutboundProxy | None, _text(parse_outbound_proxy), _Secret] = _setting(
        "URL", "corporate proxy on the way to Metquay, in place of the system's: http://host:port; none: go directly"
    )
    outbound_proxy_file: _File = _setting("FILE", "file that holds the corporate proxy's URL")

    redis_password: Annotated[SecretStr | None, _text(_key), _Secret] = _setting(
        "PASSWORD", "Redis's password; only from a file"
    )
    redis_password_file: _File = _setting("FILE", "file that holds Redis's password; read again at each connection")
    redis_url: Annotated[RedisAddress | None, _text(parse_redis_url)] = _setting(
        "URL",
        "Redis through which replicas share quota and Idempotency-Keys: redis://, rediss:// (TLS) or unix:///path",
    )

    drain_timeout: _Seconds = _setting("SECONDS", "seconds for requests in flight when the proxy is told to stop", "8")
    audit_log: _File = _setting("FILE", "file that gets one JSON line for each write")
    allow_quit: _Flag = _setting("", "let POST /-/quit end the proxy", "false")
    log_level: Annotated[str, _text(_one_of("debug", "info", "warning", "error"))] = _setting(
        "LEVEL", "debug, info, warning or error", "info"
    )
    log_format: Annotated[str, _text(_one_of("auto", "console", "json"))] = _setting(
        "FORMAT", "console, json, or auto: console on a terminal, else json", "auto"
    )

    _sources: tuple[Setting, ...] = ()
    _warnings: tuple[str, ...] = ()
    _doubts: tuple[str, ...] = ()
    _remarks: tuple[str, ...] = ()
    _files: dict[str, Path] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is passed, and nothing else: ``load`` collects, since it remembers what it found where."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    @field_validator("host", "access_key", "secret_key")
    @classmethod
    def _required(cls, value: object, info: ValidationInfo) -> object:
        if value is None and not info.data.get("sandbox"):
            if info.field_name == "host":
                msg = (
                    "is missing: give your Metquay server, such as lab.metquay.co, in the environment or in "
                    f"{_env_file()}; to try without one: serve --sandbox"
                )
            else:
                file = f"{variable(str(info.field_name))}_FILE"
                msg = f"is missing: set it in the environment or in {_env_file()}, or name its file in {file}"
            raise ValueError(msg)
        return value

    @field_validator("client_keys")
    @classmethod
    def _unique(cls, keys: tuple[ClientKey, ...], info: ValidationInfo) -> tuple[ClientKey, ...]:
        _all_keys(info.data.get("client_key"), keys)
        return keys

    @field_validator("listen")
    @classmethod
    def _safe(cls, addresses: tuple[Address, ...], info: ValidationInfo) -> tuple[Address, ...]:
        data = info.data
        guarded = data.get("client_key", True) or data.get("client_keys", True)
        for address in addresses:
            if not (guarded or is_local(address) or data.get("trust_network", True) or data["sandbox"]):
                msg = (
                    f"{address} can be reached by other machines, which could then use your keys: listen on localhost, "
                    "or set METQUAY_CLIENT_KEY, or METQUAY_TRUST_NETWORK=true if all of them may"
                )
                raise ValueError(msg)
            if _is_upstream(address, data.get("host")):
                msg = f"{address} is where METQUAY_HOST points to: the proxy would forward to itself"
                raise ValueError(msg)
        return addresses

    @field_validator("tls_key")
    @classmethod
    def _pair(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_cert" not in info.data:
            return key
        cert: Path | None = info.data["tls_cert"]
        if (key is None) != (cert is None):
            msg = "METQUAY_TLS_CERT and METQUAY_TLS_KEY belong together: set both or neither"
            raise ValueError(msg)
        if key and cert:
            serving_context(cert, key)
        return key

    @field_validator("pass_through")
    @classmethod
    def _outside(cls, prefixes: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        base: BaseURL | None = info.data.get("host")
        for prefix in prefixes:
            for taken in ((base.prefix if base else API_PREFIX) + "/", OWN_PREFIX):
                if prefix.startswith(taken) or taken.startswith(prefix):
                    msg = f"{prefix} overlaps {taken}, which the proxy answers or forwards with a token"
                    raise ValueError(msg)
        return prefixes

    @field_validator("redis_url")
    @classmethod
    def _private(cls, address: RedisAddress | None, info: ValidationInfo) -> RedisAddress | None:
        if address is None or address.local:
            return address
        if address.scheme != "rediss" or not info.data.get("redis_password", True):
            msg = (
                f"{address} is beyond this machine, and recorded answers lie there: use rediss:// (TLS) with a "
                "password in METQUAY_REDIS_PASSWORD_FILE, or a Redis on localhost or unix:///path"
            )
            raise ValueError(msg)
        return address

    @property
    def keys(self) -> tuple[ClientKey, ...]:
        """All client keys; METQUAY_CLIENT_KEY is called ``default``."""
        return _all_keys(self.client_key, self.client_keys)

    def current_keys(self, held: tuple[ClientKey, ...]) -> tuple[ClientKey, ...]:
        """Return all client keys, at least one, read again where they came from files; raises as ``credentials``.

        ``held`` are those in force. What may have been cut off while it was written gives no key and no right.
        """
        single, named = self.client_key, self.client_keys
        if path := self._files.get("client_key"):
            text = _read(path)
            single = _client_key(text)
            if len(text) < _SHORT_KEY and single not in held:
                msg = f"{path} holds fewer than {_SHORT_KEY} characters, as though it were half-written"
                raise ValueError(msg)
        if path := self._files.get("client_keys"):
            named = _client_keys(text := _read(path, whole=True))
            if not named:
                msg = f"{path} holds no key"
                raise ValueError(msg)
            if named[-1] not in held and not text.endswith("\n"):
                msg = f"{path} may be half-written: its last entry is new, and no line break follows; add one"
                raise ValueError(msg)
        return _all_keys(single, named)

    def current_ca_bundle(self) -> Path | None:
        """Return the CA bundle's file once more found good; raises ``OSError``, or ``ValueError`` where it is not."""
        return self.ca_bundle and _ca_bundle(str(self.ca_bundle))

    def secret_files(self, *names: str) -> list[Path]:
        """Return the files that those of these settings came from which came from files."""
        return [self._files[name] for name in names if name in self._files]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the settings but no error: one line each, without secrets."""
        return (*self._warnings, *self._doubts)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What looked wrong about the key pair when it was found; ``warnings`` holds it too."""
        return self._doubts

    def sources(self) -> tuple[Setting, ...]:
        """Return each variable's effective value, masked, and where it was found; empty unless ``load`` made this."""
        return self._sources

    def credentials(self) -> Credentials:
        """Return the key pair, read again where it came from files, so that rotated keys need no restart.

        Blocks while it reads two small files. Raises ``ValueError``, with a text for people, where there is no key (any
        more).
        """
        return Credentials(self._current("access_key"), self._current("secret_key"), self._remarks)

    def redis_secret(self) -> str | None:
        """Return Redis's password, read again from its file; None where there is none. Raises as ``credentials``."""
        return None if self.redis_password is None else self._current("redis_password")

    def _current(self, name: str) -> str:
        path = self._files.get(name)
        try:
            key: SecretStr | None = _key(_read(path)) if path else getattr(self, name)
        except OSError as error:
            msg = f"{error.filename}: {error.strerror}"
            raise ValueError(msg) from None
        if key is None:
            msg = f"{variable(name)} is not set"
            raise ValueError(msg)
        return key.get_secret_value()


VARIABLES: Final = {name: field for name, field in Settings.model_fields.items() if name != "sandbox"}
"""Name (as in ``Settings``) to pydantic's description of it, for each setting that has a variable."""


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def flag(name: str) -> str | None:
    """Return the command-line flag of a setting; None for secrets."""
    return None if _is_secret(name) else "--" + name.replace("_", "-")


def default_text(name: str) -> str | None:
    """Return the default of a setting as one would write it; None where there is none."""
    return VARIABLES[name].default or None


def _is_upstream(address: Address, base: BaseURL | None) -> bool:
    if base is None or address.path or address.port != base.port:
        return False
    hosts = {address.host, base.host}
    return (
        len(hosts) == 1
        or ("localhost" in hosts and not hosts.isdisjoint({"127.0.0.1", "::1"}))
        or (address.host in {"0.0.0.0", "::"} and is_loopback(base.host))  # noqa: S104 - compared, not bound
    )


def outbound_proxy(settings: Settings, base: BaseURL) -> OutboundProxy | None:
    """Return the corporate proxy on the way to ``base``: the setting's, else the system's; none to this machine itself.

    A system's that can't be used counts as none; ``load`` has warned of it.
    """
    if base.scheme != "https":
        return None
    try:
        proxy = settings.outbound_proxy or _system_proxy(base)
    except ValueError:
        return None
    return None if proxy == DIRECT else proxy


def _system_proxy(base: BaseURL) -> OutboundProxy | None:
    """Return the proxy of HTTPS_PROXY, ALL_PROXY or the system's settings; raise ``ValueError`` if it can't be used."""
    from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415 - other commands need not load it

    found = getproxies()
    url = (found.get("https") or found.get("all") or "").strip()
    if not url or goes_directly(found.get("no", ""), base.host, base.port) or proxy_bypass(base.host):
        return None
    return parse_outbound_proxy(url)


def goes_directly(no_proxy: str, host: str, port: int) -> bool:
    """Whether NO_PROXY names a host (no brackets), as curl and Go's ``httpproxy`` read it.

    A name means also what is below it, with or without ``*.`` or a dot before it; a port, an address, a network
    (``10.0.0.0/8``) and ``*`` alone may stand there too, with commas or blanks between.
    """
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        match = re.fullmatch(r"\[?(\*|[^\[\]:]+|[0-9a-f:.]+:[0-9a-f:.]*(?:/[0-9]+)?)\]?(?::([0-9]+))?", entry)
        if match is None or int(match[2] or port) != port:
            continue
        name = match[1].removeprefix("*").strip(".")
        if not name or f".{host}".endswith(f".{name}"):
            return True
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False):
                return True
    return False


def is_local(address: Address) -> bool:
    """Whether only this machine can reach the address."""
    return bool(address.path) or is_loopback(address.host)


def load(flags: Mapping[str, str] | None = None, *, sandbox: bool = False) -> Settings:
    """Find and parse the settings; ``flags`` are texts by the settings' names. Raises ``SettingsError``."""
    found = _Found()
    found.add("flag", flags or {})
    found.add("environment", variables(os.environ.items()))
    found.add_env_file()
    found.add_secret_files()
    found.look_at_client_key()
    problems = found.problems
    if found.origins.get("redis_password") in {"environment", ENV_FILE}:
        msg = "is taken from a file alone: name that in METQUAY_REDIS_PASSWORD_FILE"
        problems["redis_password"] = found.line("redis_password", msg)
    try:
        settings = Settings.model_validate({**found.texts, "sandbox": sandbox})
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False, include_input=False):
            name = str(item["loc"][0])
            if ENV_FILE in problems and name not in found.texts:
                continue  # that it is missing has a cause, which is told
            problems.setdefault(name, found.line(name, item["msg"].removeprefix("Value error, ")))
    keys = Credentials(found.text("access_key"), found.text("secret_key"), tuple(found.remarks))
    doubts = () if sandbox else keys.doubts()
    if problems:
        raise SettingsError(problems.values(), (*found.warnings, *doubts), found.sources())
    if settings.host is not None and settings.host.scheme == "https" and settings.outbound_proxy is None:
        try:
            _system_proxy(settings.host)
        except ValueError as error:
            cure = "Metquay is asked directly; METQUAY_OUTBOUND_PROXY takes its place"
            found.warnings.append(f"HTTPS_PROXY, or the system's proxy setting, {error}. {cure}")
    settings._sources = found.sources()  # noqa: SLF001 - what only the finder knows
    settings._warnings, settings._doubts = tuple(found.warnings), doubts  # noqa: SLF001 - see above
    settings._files, settings._remarks = found.files, keys.remarks  # noqa: SLF001 - see above
    return settings


class _Found:
    """What was found where. What is added first wins."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.origins: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        self.warnings: list[str] = []
        self.remarks: list[str] = []
        """What is odd about where the key pair was found."""
        self.problems: dict[str, str] = {}
        self._numbers: dict[str, int] = {}

    def add(self, origin: str, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            if name not in VARIABLES:
                self._warn_unknown(self._place(origin, name), name, text)
            elif name not in self.texts:
                self.texts[name] = text
                self.origins[name] = origin
            elif name in _PAIR and text.strip() != self.text(name):
                self._warn_unused(name, f"another one in {self._place(origin, name)}")

    def text(self, name: str) -> str:
        """Return what was found for a setting, without blanks around it."""
        return self.texts.get(name, "").strip()

    def add_env_file(self) -> None:
        """Read ``.env``, and warn of lines in it that look as if they were meant to be settings."""
        try:
            lines = read_env_file(ENV_FILE, os.environ)
        except OSError as error:
            self.problems[ENV_FILE] = f"{error.filename} cannot be read: {error.strerror}"
            return
        for line in lines:
            self._numbers.update(dict.fromkeys(variables([(line.name, line.value)]), line.number))
            if _is_left_out(line):
                known = re.search("METQUAY_[A-Z_]+", line.text.upper())
                name = known[0] if known and known[0].removeprefix(PREFIX).lower() in VARIABLES else "NAME"
                why = next(words for pattern, words in _LEFT_OUT if re.match(pattern, line.text))
                place = f"{Path(ENV_FILE).absolute()}, line {line.number}"
                self.warnings.append(f"{place}, is left out: {why}; write {name}=value")
        self.add(ENV_FILE, variables((line.name, line.value) for line in lines))

    def add_secret_files(self) -> None:
        """Read the files that ``..._FILE`` variables name, then those that are named like a variable."""
        directories = [Path(os.environ["CREDENTIALS_DIRECTORY"])] if os.environ.get("CREDENTIALS_DIRECTORY") else []
        directories.append(SECRETS_DIRECTORY)
        named = {name: self.texts.get(f"{name}_file") for name in VARIABLES if _is_secret(name)}
        for name, file in named.items():
            if file and name in self.texts:
                self._warn_unused(name, f"{variable(name)}_FILE")
            elif file and not _is_file(file):
                msg = (
                    "names no file that is there (its value is not shown, since that may be the secret itself): give "
                    f"the path of a file that holds it, or put the secret into {variable(name)}"
                )
                self.problems[name] = self.line(f"{name}_file", msg)
            elif file:
                self._read(name, Path(file), private=Path(file).parent not in directories)
        for directory in directories:
            for path in self._list(directory):
                name = path.name.lower().removeprefix(PREFIX.lower())
                if name not in VARIABLES:
                    self._warn_unknown(str(directory), name, "")
                elif name not in self.texts and name not in self.problems:
                    self._read(name, path, private=False)
                elif name in _PAIR and name in self.texts and path != self.files.get(name):
                    self._warn_unused(name, str(path))

    def look_at_client_key(self) -> None:
        """Warn of one that is probably not meant so."""
        if words := oddities(self.text("client_key")):
            self.warnings.append(f"METQUAY_CLIENT_KEY {words}")
        if len(self.texts.get("client_key", "long enough to pass")) < _SHORT_KEY:
            self.warnings.append(f"METQUAY_CLIENT_KEY is short: make it {_SHORT_KEY} random characters or more")

    def line(self, name: str, text: str) -> str:
        """Return the one line that tells what is wrong with a setting."""
        origin = self._place(self.origins.get(name, "flag"), name)
        hints = ", ".join(filter(None, (flag(name), "" if origin == "flag" else f"found in {origin}")))
        if re.match("[\"']", self.text(name)):
            text += "; take its quotation marks away (docker --env-file keeps them)"
        if not text.isprintable():
            text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
            text += "; in .env, write a path without double quotation marks, between which a backslash is an escape"
        return f"{variable(name)}{hints and f' ({hints})'}: {text}"

    def sources(self) -> tuple[Setting, ...]:
        """Return everything that was found, or is the default, masked."""
        return tuple(
            Setting(
                variable(name),
                _masked(name, self.texts[name]) if name in self.texts else default_text(name),
                self.origins.get(name, "default"),
            )
            for name in VARIABLES
        )

    def _place(self, origin: str, name: str) -> str:
        return f"{Path(ENV_FILE).absolute()}, line {self._numbers[name]}" if origin == ENV_FILE else origin

    def _list(self, directory: Path) -> list[Path]:
        try:
            return [path for path in sorted(directory.iterdir()) if path.name.upper().startswith(PREFIX)]
        except FileNotFoundError:
            return []
        except OSError as error:
            self.warnings.append(f"{directory} was not searched for secrets: {error.strerror}")
            return []

    def _read(self, name: str, path: Path, *, private: bool) -> None:
        try:
            self.texts[name] = _read(path)
            self.files[name] = path
            self.origins[name] = f"file {path}"
            if private and sys.platform != "win32" and path.stat().st_mode & _READABLE_BY_OTHERS:
                self.warnings.append(
                    f"{path}, which holds {variable(name)}, can be read by every user: chmod 600 {path}"
                )
        except (OSError, ValueError) as error:
            self.problems[name] = self.line(name, _why(error))

    def _warn_unused(self, name: str, what: str) -> None:
        place = self._place(self.origins[name], name)
        (self.remarks if name in _PAIR else self.warnings).append(
            f"{variable(name)} (from {place}) is used, and {what} is not"
        )

    def _warn_unknown(self, origin: str, name: str, text: str) -> None:
        if _SERVICE_LINK.fullmatch(variable(name)) or text.startswith(("tcp://", "udp://")):
            return
        import difflib  # noqa: PLC0415 - only a mistake pays for loading it

        nearest = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.7)
        hint = f"; did you mean {variable(nearest[0])}?" if nearest else ""
        self.warnings.append(f"{variable(name)} (from {origin}) is no setting of this proxy{hint}")


def _is_left_out(line: Line) -> bool:
    """Whether a line of ``.env`` is no ``NAME=value`` and is, or may be, for us."""
    if line.name is None:
        return True
    ours = "METQUAY" in line.name.upper()
    return ours and (not re.fullmatch(r"\w+", line.name) or (line.value is None and line.name not in os.environ))


def _env_file() -> str:
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


def _is_secret(name: str) -> bool:
    return _Secret in Settings.model_fields[name].metadata


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # no path at all
        return False


def _read(path: Path, *, whole: bool = False) -> str:
    """Return a file's text, without blanks around it unless the ``whole`` is asked for."""
    try:
        text = read_file(path)[0].decode("utf-8-sig")
    except UnicodeDecodeError:
        msg = f"{path} is not UTF-8 text; save it as UTF-8"
        raise ValueError(msg) from None
    if not text.strip():
        msg = f"the file {path} is empty"
        raise ValueError(msg)
    return text if whole else text.strip()


def _why(error: Exception) -> str:
    return f"cannot read {error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _masked(name: str, text: str) -> str:
    try:
        if name == "outbound_proxy":
            proxy = parse_outbound_proxy(text)
            shown = f"http://{'***@' if proxy.authorization else ''}{Address(proxy.host, proxy.port)}"
            return "none" if proxy == DIRECT else shown
        if name == "client_keys":
            _client_keys(text)
            keys = (entry.split(":") for entry in _entries(text))
            return ",".join(":".join((name, "***", *rest)) for name, _, *rest in keys)
    except ValueError:
        return "***"
    if _is_secret(name):
        return last_four(text) if name == "access_key" else "***"
    if name.endswith("_file") and not _is_file(text):
        return "***"  # it may be the secret itself
    return text if VARIABLES[name].title == "FILE" else re.sub(r"^([a-z]+://)?.*@", r"\1***@", text, flags=re.DOTALL)


def last_four(access_key: str) -> str:
    """Return what may be shown of the access key: its last four characters, of a short or an odd one nothing."""
    return "***" if len(access_key) < _SHORT_SECRET or oddities(access_key) else f"...{access_key[-4:]}"
