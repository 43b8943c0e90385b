"""The settings: each declared once, found in five places, and parsed into the values that the other modules take.

Owns part 2 of the contract. ``Settings`` says what a setting means and what it may be; ``load`` has the texts found
(flags, then environment, then ``.env``, then secret files). Must not act on a setting, and must never put the text of a
secret into an error, a warning or a repr.

Facts: pydantic shows the input in its errors unless ``hide_input_in_errors`` is set. Its ``ByteSize`` reads "65,536" as
65 bytes.
"""

import contextlib
import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    PrivateAttr,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic_core.core_schema import CoreSchema, no_info_plain_validator_function
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from metquay_proxy.environment import ENV_FILE, Refused, variable
from metquay_proxy.listeners import serving_context
from metquay_proxy.redis_address import RedisAddress, parse_redis_url
from metquay_proxy.rules.address import DEFAULT_LISTEN, Address, parse_listen
from metquay_proxy.rules.credentials import Credentials, oddities
from metquay_proxy.rules.gate import ClientKey
from metquay_proxy.rules.quota import Rate, parse_rate
from metquay_proxy.rules.target import API_PREFIX, OWN_PREFIX, BaseURL, is_loopback
from metquay_proxy.sources import Found, place_of_env_file, read_file, read_secret
from metquay_proxy.upstream.bundle import trust
from metquay_proxy.upstream.dial import OutboundProxy, tls_context
from metquay_proxy.upstream.outbound import DIRECT, parse_outbound_proxy, system_proxy
from metquay_proxy.upstream.pool import Pool

SECRETS_DIRECTORY: Final = Path("/run/secrets")
MAX_REPLAY_LIMIT: Final = 64 * 1024 * 1024
"""Bytes; what all kept bodies together may take."""

_NAMED_KEY: Final = re.compile(r"([A-Za-z0-9_-]+):([A-Za-z0-9._~-]{16,})(:read-only)?")
_SHORT_KEY: Final = 16
_SHORT_SECRET: Final = 12
_REPLAY_LIMIT: Final = TypeAdapter(Annotated[ByteSize, Field(le=MAX_REPLAY_LIMIT)])
_WRONG: Final = {
    "bool_parsing": "is neither true nor false",
    **dict.fromkeys(("float_parsing", "finite_number"), "is not a number of seconds, such as 20 or 0.5"),
    "int_parsing": "is not a whole number from 0 to 999",
    "greater_than": "would make every request fail: write a number of seconds above 0",
    "greater_than_equal": "is less than 0, the minimum",
    "less_than_equal": "is more than 999, the maximum",
}
"""What to say in place of pydantic's words; the other ones do, with "is not" for "Input should be"."""


class Setting(NamedTuple):
    """One effective setting for people to read: secrets are masked, ``value`` is None where there is none."""

    variable: str
    value: str | None
    source: str


class SettingsError(Refused):
    """Settings that the proxy cannot run with: one line for each variable, without any secret."""

    def __init__(self, lines: Iterable[str], warnings: Iterable[str], sources: tuple[Setting, ...]) -> None:
        """``warnings`` and ``sources`` are those that ``Settings`` would have had."""
        self.lines, self.warnings, self.sources = tuple(lines), tuple(warnings), sources
        super().__init__(*(f"warning: {line}" for line in self.warnings), *self.lines)


class _Text(NamedTuple):
    """Parse a text; anything else is taken as the value itself (code that builds ``Settings`` passes values)."""

    parse: Callable[[str], object]

    def __get_pydantic_core_schema__(self, *_: object) -> CoreSchema:
        """Say so, and no more: pydantic's ``PlainValidator`` inspects the function and describes the type as well."""
        return no_info_plain_validator_function(self.validate)

    def validate(self, value: object) -> object:
        """Return what the value, or its text, means; raises what ``parse`` raises."""
        return self.parse(value) if isinstance(value, str) else value


def _entries(text: str) -> list[str]:
    return [entry for entry in (part.strip() for part in re.split(r"[,\n]", text)) if entry]


def _list_of(pattern: str, complaint: str, written: Callable[[str], str] = str) -> _Text:
    """Parse a list, each of whose entries, once it is ``written`` in one way, must match."""

    def parse(text: str) -> tuple[str, ...]:
        entries = tuple(written(entry) for entry in _entries(text))
        for entry in entries:
            if not re.fullmatch(pattern, entry):
                raise ValueError(complaint.format(entry))
        return entries

    return _Text(parse)


def _key(text: str) -> SecretStr:
    if len(text.splitlines()) > 1:
        raise ValueError("it has several lines: put the key there alone, without a name and in one line")
    if not text.isprintable():
        raise ValueError("it contains an invisible character, such as a tab or a no-break space: copy it again")
    return SecretStr(text)


def _client_key(text: str) -> ClientKey:
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("must be ASCII without spaces, since tools send it in a header")
    return ClientKey.of("default", text)


def _client_keys(text: str) -> tuple[ClientKey, ...]:
    keys = []
    for number, entry in enumerate(_entries(text), start=1):
        match = _NAMED_KEY.fullmatch(entry)
        if match is None:
            form = "name:key or name:key:read-only; a name is made of letters, digits, '_' and '-'"
            raise ValueError(f"entry {number} is not {form}; a key has at least 16 letters, digits or . _ ~ -")
        keys.append(ClientKey.of(match[1], match[2], read_only=bool(match[3])))
    if not keys:
        raise ValueError("contains no key")
    return tuple(keys)


def _all_keys(single: ClientKey | None, named: tuple[ClientKey, ...]) -> tuple[ClientKey, ...]:
    keys = (single, *named) if single else named
    if len({key.name for key in keys}) < len(keys):
        raise ValueError("names must be unique, and 'default' is the name of METQUAY_CLIENT_KEY")
    if len({key.digest for key in keys}) < len(keys):
        raise ValueError("contains the same key twice; each name needs a key of its own")
    return keys


def _replay_limit(text: str) -> int:
    with contextlib.suppress(ValidationError):
        if re.fullmatch(r"[0-9]+ *\w*", text):
            return int(_REPLAY_LIMIT.validate_python(text))
    raise ValueError(f"{text!r} is not a size up to 64 MiB, such as 65536, 64 KiB or 1 MiB")


def _socket_mode(text: str) -> int:
    match = re.fullmatch(r"(?:0o?)?([67][0-7]{2})", text)
    if match is None:
        raise ValueError(f"{text!r} is not a mode in octal that lets its owner in, such as 0600, 0660 or 0666")
    return int(match[1], 8)


def _as_path(text: str) -> str:
    """Return a path as it may be shown: in its place somebody may have put what the file holds, or that in base64."""
    return text if re.match(r"(?s)(?!.*-----BEGIN|.*://.*@)(/|~|[A-Za-z]:|.*[.\\])", text) else "***"


def _file(text: str) -> Path:
    path = Path(text)
    try:
        read_file(path)
    except OSError as error:
        why = error.strerror if _as_path(text) == text else "this is no path; save the text in a file"
        raise ValueError(f"cannot read {_as_path(text)}: {why}") from None
    return path


def _ca_bundle(text: str) -> Path:
    path = _file(text)
    trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path)
    return path


def _required(value: object, info: ValidationInfo) -> object:
    if value is None and not info.data.get("sandbox"):
        what, more = "write it", f", or name its file in {variable(str(info.field_name))}_FILE"
        if info.field_name == "host":
            what, more = "write your Metquay server, such as lab.metquay.co,", "; to try without one: serve --sandbox"
        raise ValueError(f"not set; {what} into the environment or {place_of_env_file()}{more}")
    return value


def _unique(keys: tuple[ClientKey, ...], info: ValidationInfo) -> tuple[ClientKey, ...]:
    _all_keys(info.data.get("client_key"), keys)
    return keys


def _metrics_listen(text: str) -> tuple[Address, ...]:
    with contextlib.suppress(ValueError):
        addresses = parse_listen(text)
        if len(addresses) == 1 and not addresses[0].path:
            return addresses
    raise ValueError(f"{text!r} is not one host and port, such as 0.0.0.0:9187")


def _safe(addresses: tuple[Address, ...], info: ValidationInfo) -> tuple[Address, ...]:
    consent = any(info.data.get(name, True) for name in ("client_key", "client_keys", "trust_network", "sandbox"))
    for address in addresses:
        if not (consent or address.path or is_loopback(address.host)):
            raise ValueError(
                f"{address} can be reached by other machines, which could then use your keys: listen on localhost, "
                "or set METQUAY_CLIENT_KEY, or METQUAY_TRUST_NETWORK=true if all of them may"
            )
    return _not_metquay(addresses, info)


def _not_metquay(addresses: tuple[Address, ...], info: ValidationInfo) -> tuple[Address, ...]:
    base: BaseURL | None = info.data.get("host")
    for address in addresses:
        own = Address(base.host, base.port) if base and (base.host == address.host or is_loopback(base.host)) else None
        if own and own.is_reached_at(address):
            raise ValueError(f"{address} is METQUAY_HOST itself: the proxy would ask itself; choose another port")
    return addresses


def _beside(addresses: tuple[Address, ...], info: ValidationInfo) -> tuple[Address, ...]:
    for address in addresses:
        if any(address.is_reached_at(other) or other.is_reached_at(address) for other in info.data.get("listen", ())):
            raise ValueError(f"{address} is where METQUAY_LISTEN listens for tools: choose another port")
    return _not_metquay(addresses, info)


def _pair(key: Path | None, info: ValidationInfo) -> Path | None:
    cert: Path | None = info.data.get("tls_cert")
    if "tls_cert" in info.data and (key is None) != (cert is None):
        raise ValueError("METQUAY_TLS_CERT and METQUAY_TLS_KEY belong together: set both or neither")
    if key and cert:
        serving_context(cert, key)
    return key


def _outside(prefixes: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    base: BaseURL | None = info.data.get("host")
    for taken in ((base.prefix if base else API_PREFIX) + "/", OWN_PREFIX):
        for prefix in prefixes:
            if prefix.startswith(taken) or taken.startswith(prefix):
                raise ValueError(f"{prefix} overlaps {taken}, which the proxy answers or forwards with a token")
    return prefixes


def _private(address: RedisAddress | None, info: ValidationInfo) -> RedisAddress | None:
    guarded = address and address.scheme == "rediss" and info.data.get("redis_password", True)
    if not (address is None or address.local or guarded):
        raise ValueError(
            f"{address} is on another machine, and the proxy keeps answers there: use rediss:// (TLS) with a "
            "password in METQUAY_REDIS_PASSWORD_FILE, or a Redis on localhost or unix:///path"
        )
    return address


_ReadableFile = Annotated[Path | None, _Text(_file)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Timeout = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_LOWER: Final = BeforeValidator(lambda text: text.lower())
_HOSTS: Final = _list_of(
    r"[a-z0-9_-]+(\.[a-z0-9_-]+)*",
    "{!r} is not a host name; give names without scheme, port or *, such as proxy.lab.example",
    lambda name: name.lower().rstrip("."),
)
_ORIGINS: Final = _list_of(
    r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?",
    "contains something other than origins, which have a scheme, a host and no path: https://tools.lab.example",
    lambda origin: re.sub(r"(?<=^http)(://.*):80$|(?<=^https)(://.*):443$", r"\1\2", origin.lower().removesuffix("/")),
)
_PREFIXES: Final = _list_of(
    r"(/(?!\.{1,2}/)[A-Za-z0-9._~!$&'()*+;=:@-]+)+/",
    "{!r} is not a path prefix, which is more than a slash and begins and ends with one, such as /FlexicalERP/",
)


class Settings(BaseSettings):
    """Everything that can be set; frozen. ``load`` makes one from the places where settings are found.

    What each means, and in brackets what its value is called, is its help on the command line, below these headings:

    sandbox: use the built-in Metquay simulator as the upstream: no host and no keys are needed
    Metquay:
    host (HOST): your Metquay server: lab.metquay.co, or https://lab.metquay.co/api/v1; http:// within this machine only
    access_key: access key of the API client
    access_key_file (FILE): file that holds the access key; read again at each login
    secret_key: secret key of the API client
    secret_key_file (FILE): file that holds the secret key; read again at each login
    client keys:
    client_key: key that local tools must present
    client_key_file (FILE): file that holds the client key
    client_keys: named client keys, name:key[:read-only], separated by commas, or one on each line
    client_keys_file (FILE): file that holds the named client keys
    trust_network: listen beyond this machine without any client key
    listening:
    listen (ADDRESS): where to listen: host:port (port 0: any free one) or unix:/path; separate several with commas
    metrics_listen (ADDRESS): host:port where anybody may read /-/live, /-/ready and /-/metrics, and nothing else
    socket_mode (MODE): who may open a unix socket, in octal: 0660 lets its group in too
    tls_cert (FILE): PEM certificate chain, to serve https
    tls_key (FILE): PEM private key of that certificate, without a password
    guard:
    allowed_hosts (NAMES): further host names under which tools reach the proxy; separate several with commas
    allowed_origins (ORIGINS): web pages that may use the proxy, such as https://tools.lab.example;
        separate several with commas
    read_only: forward GET, HEAD and OPTIONS only
    pass_through (PATHS): path prefixes sent to the server's root without a token, such as /FlexicalERP/;
        separate several with commas
    limits:
    rate_limit (RATE): quota of the key pair: N/second, N/minute, N/hour, or off
    max_wait (SECONDS): seconds that a request may wait in all: for token and quota, between attempts and in failed ones
    retries (N): further attempts for requests that are safe to repeat
    replay_limit (SIZE): largest body kept for another attempt: bytes, KiB or MiB, up to 64 MiB
    connection to Metquay:
    connect_timeout (SECONDS): seconds to connect to Metquay
    read_timeout (SECONDS): seconds without a single byte before it is given up; there is no limit on the whole
    ca_bundle (FILE): PEM certificates to trust besides the operating system's; the issuer of the server's is enough
    outbound_proxy: corporate proxy on the way to Metquay, in place of the system's: http://host:port;
        none: connect directly
    outbound_proxy_file (FILE): file that holds the corporate proxy's URL
    several proxies:
    redis_password: Redis's password; only from a file
    redis_password_file (FILE): file that holds Redis's password; read again at each connection
    redis_url (URL): Redis through which replicas share quota and Idempotency-Keys: redis://, rediss:// (TLS)
        or unix:///path
    running and logging:
    drain_timeout (SECONDS): seconds that requests in flight have to finish when the proxy is told to stop
    audit_log (FILE): file that gets one JSON line for each write
    allow_quit: let POST /-/quit end the proxy
    log_level (LEVEL): debug, info, warning or error
    log_format (FORMAT): console, json, or auto: console on a terminal, else json
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True)

    sandbox: bool = False

    host: Annotated[BaseURL | None, _Text(BaseURL.parse), AfterValidator(_required)] = None
    access_key: Annotated[SecretStr | None, _Text(_key), AfterValidator(_required)] = None
    access_key_file: Path | None = None
    secret_key: Annotated[SecretStr | None, _Text(_key), AfterValidator(_required)] = None
    secret_key_file: Path | None = None

    client_key: Annotated[ClientKey | None, _Text(_client_key)] = None
    client_key_file: Path | None = None
    client_keys: Annotated[tuple[ClientKey, ...], _Text(_client_keys), AfterValidator(_unique)] = ()
    client_keys_file: Path | None = None
    trust_network: bool = False

    listen: Annotated[tuple[Address, ...], _Text(parse_listen), AfterValidator(_safe)] = Field(
        DEFAULT_LISTEN, validate_default=True
    )
    metrics_listen: Annotated[tuple[Address, ...], _Text(_metrics_listen), AfterValidator(_beside)] = ()
    socket_mode: Annotated[int, _Text(_socket_mode)] = Field("0600", validate_default=True)
    tls_cert: _ReadableFile = None
    tls_key: Annotated[_ReadableFile, AfterValidator(_pair)] = None
    allowed_hosts: Annotated[tuple[str, ...], _HOSTS] = ()
    allowed_origins: Annotated[tuple[str, ...], _ORIGINS] = ()
    read_only: bool = False
    pass_through: Annotated[tuple[str, ...], _PREFIXES, AfterValidator(_outside)] = ()

    rate_limit: Annotated[Rate | None, _Text(parse_rate)] = Field("100/minute", validate_default=True)
    max_wait: _Seconds = 20
    retries: int = Field(2, ge=0, le=999)
    replay_limit: Annotated[int, _Text(_replay_limit)] = Field("1 MiB", validate_default=True)
    connect_timeout: _Timeout = 10
    read_timeout: _Timeout = 60
    ca_bundle: Annotated[Path | None, _Text(_ca_bundle)] = None
    outbound_proxy: Annotated[OutboundProxy | None, _Text(parse_outbound_proxy)] = None
    outbound_proxy_file: Path | None = None

    redis_password: Annotated[SecretStr | None, _Text(_key)] = None
    redis_password_file: Path | None = None
    redis_url: Annotated[RedisAddress | None, _Text(parse_redis_url), AfterValidator(_private)] = None

    drain_timeout: _Seconds = 8
    audit_log: Path | None = None
    allow_quit: bool = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _LOWER] = "info"
    log_format: Annotated[Literal["auto", "console", "json"], _LOWER] = "auto"

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: object, **_more: object
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is passed, and nothing else: ``Found`` looks for it, since it remembers what it found where."""
        del settings_cls
        return (init_settings,)

    _found: Found = PrivateAttr(default_factory=Found)
    _sources: tuple[Setting, ...] = ()

    @property
    def keys(self) -> tuple[ClientKey, ...]:
        """All client keys; METQUAY_CLIENT_KEY is called ``default``."""
        return _all_keys(self.client_key, self.client_keys)

    def current_keys(self, held: tuple[ClientKey, ...]) -> tuple[ClientKey, ...]:
        """Return all client keys, at least one, read again where they came from files; raises as ``credentials``.

        ``held`` are those in force. What may have been cut off while it was written gives no key and no right.
        """
        single, named = self.client_key, self.client_keys
        if path := self._found.file("client_key"):
            text = read_secret(path)
            single = _client_key(text)
            if len(text) < _SHORT_KEY and single not in held:
                raise ValueError(f"{path} holds fewer than {_SHORT_KEY} characters, so it may be half-written")
        if path := self._found.file("client_keys"):
            text = read_secret(path, whole=True)
            named = _client_keys(text)
            if named[-1] not in held and not text.endswith("\n"):
                why = "its last entry is new, and no line break follows; add one"
                raise ValueError(f"{path} may be half-written: {why}")
        return _all_keys(single, named)

    def secret_files(self, *names: str) -> list[Path]:
        """Return the files that those of these settings came from which came from files."""
        return [path for name in names if (path := self._found.file(name))]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the settings but no error: one line each, without secrets."""
        return tuple(self._found.warnings)

    def sources(self) -> tuple[Setting, ...]:
        """Return each variable's effective value, masked, and where it was found; empty unless ``load`` made this."""
        return self._sources

    def credentials(self) -> Credentials:
        """Return the key pair, read again where it came from files, so that rotated keys need no restart.

        Blocks while it reads two small files. Raises ``ValueError``, with a text for people, where there is no key (any
        more).
        """
        return Credentials(self._current("access_key"), self._current("secret_key"), tuple(self._found.remarks))

    def redis_secret(self) -> str | None:
        """Return Redis's password, read again from its file; None where there is none. Raises as ``credentials``."""
        return None if self.redis_password is None else self._current("redis_password")

    def _current(self, name: str) -> str:
        path = self._found.file(name)
        key: SecretStr | None = _key(read_secret(path)) if path else getattr(self, name)
        if key is None:
            raise ValueError(f"{variable(name)} is not set")
        return key.get_secret_value()


_DOCUMENTED: Final = re.compile(r"^( *)(\w+)(?: \((\w+)\))?: (.+(?:\n\1 +\S.*)*)$", re.MULTILINE)
_MEANINGS: Final = {
    name: (called, " ".join(words.split())) for _, name, called, words in _DOCUMENTED.findall(Settings.__doc__ or "")
}
HEADINGS: Final = {name: head for head, name in re.findall(r"(?m)^ +([\w ]+):\n +(\w+)", Settings.__doc__ or "")}
"""Name of the first setting of each group to its heading."""
VARIABLES: Final = {name: field for name, field in Settings.model_fields.items() if name != "sandbox"}
"""Name (as in ``Settings``) to pydantic's description of it, for each setting that has a variable."""


def flag(name: str) -> str | None:
    """Return the command-line flag of a setting; None for secrets."""
    return None if _is_secret(name) else "--" + name.replace("_", "-")


def meaning(name: str) -> tuple[str, str]:
    """Return what a setting's value is called, and what the setting means; nothing where Python strips docstrings."""
    return _MEANINGS.get(name, ("", ""))


def default_text(name: str) -> str | None:
    """Return the default of a setting as one would write it; None where there is none."""
    default = VARIABLES[name].default
    return str(default).lower() if isinstance(default, bool) else None if default in (None, ()) else str(default)


def outbound_proxy(settings: Settings, base: BaseURL, warn: Callable[[str], object] = str) -> OutboundProxy | None:
    """Return the corporate proxy on the way to ``base``: the setting's, else the system's; none to this machine itself.

    A system's that can't be used counts as none: ``load`` has had a warning of it.
    """
    if base.scheme != "https":
        return None
    try:
        proxy = settings.outbound_proxy or system_proxy(base)
    except ValueError as error:
        cure = "The proxy connects to Metquay directly; set METQUAY_OUTBOUND_PROXY to change that"
        warn(f"HTTPS_PROXY, or the system's proxy setting, {error}. {cure}")
        return None
    return None if proxy == DIRECT else proxy


def pool_to(base: BaseURL, settings: Settings, **more: Any) -> Pool:  # noqa: ANN401 - the pool's own
    """Return the connections to ``base`` that these settings ask for; ``more`` is what no setting says."""
    return Pool(
        base,
        ssl_context=tls_context(settings.ca_bundle) if base.scheme == "https" else None,
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
        outbound_proxy=outbound_proxy(settings, base),
        **more,
    )


def load(flags: Mapping[str, str] | None = None, *, sandbox: bool = False) -> Settings:
    """Find and parse the settings; ``flags`` are texts by the settings' names. Raises ``SettingsError``."""
    found = Found(VARIABLES, SECRETS_DIRECTORY)
    found.search(flags or {})
    key = found.text("client_key")
    if words := oddities(key):
        found.warnings.append(f"METQUAY_CLIENT_KEY {words}")
    if "client_key" in found.texts and len(key) < _SHORT_KEY:
        found.warnings.append(f"METQUAY_CLIENT_KEY is short: make it {_SHORT_KEY} random characters or more")
    pair = Credentials(found.text("access_key"), found.text("secret_key"), tuple(found.remarks))
    found.warnings += () if sandbox else pair.doubts()
    sources = tuple(_shown(found, name) for name in VARIABLES)
    problems = {name: _line(found, *problem) for name, problem in found.problems.items()}
    problems |= {name: _line(found, name, "is empty") for name in found.texts if not found.text(name)}
    if "redis_password" in found.texts and found.file("redis_password") is None:
        what = "is read only from a file: put the file's path into METQUAY_REDIS_PASSWORD_FILE"
        problems["redis_password"] = _line(found, "redis_password", what)
    try:
        settings = Settings.model_validate({**{name: found.text(name) for name in found.texts}, "sandbox": sandbox})
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False, include_input=False):
            name = str(item["loc"][0])
            if name in found.texts or ENV_FILE not in problems:  # that it is missing has a cause, which is told
                problems.setdefault(name, _line(found, name, _complaint(found.text(name), item["type"], item["msg"])))
    if problems:
        raise SettingsError(problems.values(), found.warnings, sources)
    if settings.host is not None:
        outbound_proxy(settings, settings.host, found.warnings.append)
    settings._found, settings._sources = found, sources  # noqa: SLF001 - what only the finder knows
    return settings


def _complaint(text: str, kind: str, words: str) -> str:
    """Return what is wrong with a setting, from pydantic's words for it."""
    if kind == "value_error":
        return words.removeprefix("Value error, ")
    return f"{text!r} {_WRONG.get(kind) or words.replace('Input should be', 'is not')}"


def _line(found: Found, name: str, words: str) -> str:
    """Return the one line that tells what is wrong with a setting."""
    if name not in VARIABLES:
        return f"{name} {words}"
    place = found.texts[name].place if name in found.texts else "flag"
    hints = ", ".join(filter(None, (flag(name), "" if place == "flag" else f"found in {place}")))
    if re.match("[\"']", found.text(name)):
        words += "; remove its quotation marks (docker --env-file keeps them)"
    words = re.sub(r"""(?<=['"]).*@(?=\S*['"])""", "***@", words)
    if not words.isprintable():
        words = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in words)
        words += "; in .env, write a path without double quotation marks, between which a backslash is an escape"
    return f"{variable(name)}{hints and f' ({hints})'}: {words}"


def _shown(found: Found, name: str) -> Setting:
    if name not in found.texts:
        return Setting(variable(name), default_text(name), "default")
    return Setting(variable(name), _masked(name, found.texts[name].text), found.texts[name].origin)


def _is_secret(name: str) -> bool:
    return f"{name}_file" in VARIABLES


def _masked(name: str, text: str) -> str:
    if name == "access_key":
        return last_four(text)
    with contextlib.suppress(ValueError):
        if name == "outbound_proxy":
            proxy = parse_outbound_proxy(text)
            return "none" if proxy == DIRECT else f"http://{'***@' if proxy.login else ''}{proxy}"
        if name == "client_keys":
            return shown_keys(_client_keys(text))
    if _is_secret(name) or (name.endswith("_file") and not os.path.isfile(text)):  # noqa: PTH113 - it may be the secret
        return "***"
    if VARIABLES[name].annotation == Path | None:
        return _as_path(text)
    return re.sub(r"^([a-z]+://)?.*@", r"\1***@", text, flags=re.DOTALL)


def shown_keys(keys: Iterable[ClientKey]) -> str:
    """Return METQUAY_CLIENT_KEYS without the keys."""
    return ",".join(f"{key.name}:***" + ":read-only" * key.read_only for key in keys)


def last_four(access_key: str) -> str:
    """Return what may be shown of the access key: its last four characters, of a short or an odd one nothing."""
    return "***" if len(access_key) < _SHORT_SECRET or oddities(access_key) else f"...{access_key[-4:]}"
