from __future__ import annotations

import os
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from pydantic import ValidationError

from metquay_proxy import settings as module
from metquay_proxy.exchange.tokens import Credentials
from metquay_proxy.rules.address import Address
from metquay_proxy.rules.gate import ClientKey
from metquay_proxy.rules.quota import Rate
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.settings import (
    DIRECT,
    VARIABLES,
    RedisAddress,
    Setting,
    Settings,
    SettingsError,
    default_text,
    flag,
    goes_directly,
    load,
    outbound_proxy,
    variable,
)
from metquay_proxy.upstream.pool import OutboundProxy

if TYPE_CHECKING:
    from collections.abc import Callable

    Write = Callable[[str, str | bytes], Path]

PEM = """\
-----BEGIN CERTIFICATE-----
MIIBgjCCASegAwIBAgIUP6rCyrGNbrQI/WQgLUl+6QzLzWMwCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKbGFib3JhdG9yeTAgFw0yNjExMjgwNTQ5MzNaGA8yMTI2MTEw
NDA1NDkzM1owFTETMBEGA1UEAwwKbGFib3JhdG9yeTBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABAWpJC4XqVnHRJlJ1/KQ1k0P5mkemoiol51HaJ9k4G7eUu8DeXC5
NRIQZkRWRDj9S/vNzZ91ApiX+3wBdWC5lkyjUzBRMB0GA1UdDgQWBBQXngSvEX40
n2zz3oM8kfs06yGwsTAfBgNVHSMEGDAWgBQXngSvEX40n2zz3oM8kfs06yGwsTAP
BgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0kAMEYCIQDI1hIewYkeTIN4Tdln
gpgaTU1AJM9hwSW9HhDJz8xnKAIhAOWnrH6odV32xmabJww/tDbX6tXCHXvRfPse
1MT3HVwO
-----END CERTIFICATE-----
"""
CERTIFICATE = PEM.encode().splitlines()
KEY = "0123456789abcdef"
OTHER_KEY = "fedcba9876543210"
ACCOUNT = {
    "METQUAY_HOST": "lab.metquay.co",
    "METQUAY_ACCESS_KEY": "access-key-AAAA",
    "METQUAY_SECRET_KEY": "secret-key-SSSS",
}

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting reaches a test from the machine that runs it."""
    for name in os.environ:
        if name.upper().startswith("METQUAY_") or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr(module, "SECRETS_DIRECTORY", tmp_path / "run-secrets")
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a private file below the test's directory and returns its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(0o600)
        return path

    return write


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what is required."""
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)


def problems(flags: dict[str, str] | None = None, *, sandbox: bool = False) -> tuple[str, ...]:
    """Return the lines with which loading fails."""
    with pytest.raises(SettingsError) as caught:
        load(flags, sandbox=sandbox)
    return caught.value.lines


def source(settings: Settings, name: str) -> Setting:
    """Return one setting as ``metquay-proxy settings`` shows it."""
    return next(setting for setting in settings.sources() if setting.variable == name)


class TestValues:
    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("host", "lab.metquay.co", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("host", "http://127.0.0.1:8000/", BaseURL("http", "127.0.0.1", 8000, "/api/v1")),
            ("listen", "127.0.0.1:0, [::1]:0", (Address("127.0.0.1", 0), Address("::1", 0))),
            ("allowed_hosts", "Proxy.Lab.Example., other_host", ("proxy.lab.example", "other_host")),
            (
                "allowed_origins",
                "HTTPS://Tools.lab.example/, http://box:80,https://box:443,https://box:80, app://x, http://[::1]:8080",
                (
                    "https://tools.lab.example",
                    "http://box",
                    "https://box",
                    "https://box:80",
                    "app://x",
                    "http://[::1]:8080",
                ),
            ),
            ("read_only", "true", True),
            ("read_only", "OFF", False),
            ("trust_network", "1", True),
            ("allow_quit", "no", False),
            ("pass_through", "/FlexicalERP/, /a/b.c/", ("/FlexicalERP/", "/a/b.c/")),
            ("rate_limit", "5/second", Rate(5, 1)),
            ("rate_limit", "off", None),
            ("max_wait", "0", 0.0),
            ("max_wait", " 2.5 ", 2.5),
            ("retries", "0", 0),
            ("connect_timeout", "0.1", 0.1),
            ("read_timeout", "1e3", 1000.0),
            ("drain_timeout", "0", 0.0),
            ("replay_limit", "65536", 65536),
            ("replay_limit", "64 KiB", 65536),
            ("replay_limit", "64kib", 65536),
            ("replay_limit", "1MB", 1_000_000),
            ("replay_limit", "64 MiB", 64 * 1024 * 1024),
            ("replay_limit", "0", 0),
            ("log_level", "WARNING", "warning"),
            ("log_format", "json", "json"),
            ("redis_url", "redis://localhost", RedisAddress("redis", "localhost", 6379)),
            ("redis_url", "redis://[::1]:7000/3", RedisAddress("redis", "::1", 7000, database=3)),
            ("redis_url", "redis://lab%40x@127.0.0.1/", RedisAddress("redis", "127.0.0.1", 6379, user="lab@x")),
            ("redis_url", "unix:///run/redis.sock", RedisAddress("unix", path="/run/redis.sock")),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_a_text_becomes_the_value_that_the_program_uses(self, name: str, text: str, expected: object) -> None:
        """The same text means the same, in a flag and in a variable."""
        assert expected == getattr(load({name: text}), name)

    @pytest.mark.usefixtures("account")
    def test_the_defaults(self) -> None:
        """They are those of the contract."""
        settings = load()
        assert (Address("localhost", 6387),) == settings.listen
        assert Rate(100, 60) == settings.rate_limit
        assert (20.0, 2, 10.0, 60.0, 8.0) == (
            settings.max_wait,
            settings.retries,
            settings.connect_timeout,
            settings.read_timeout,
            settings.drain_timeout,
        )
        assert 1024 * 1024 == settings.replay_limit
        assert ("info", "auto") == (settings.log_level, settings.log_format)
        assert [False] * 4 == [settings.read_only, settings.allow_quit, settings.trust_network, settings.sandbox]
        assert [()] * 4 == [settings.keys, settings.allowed_hosts, settings.allowed_origins, settings.pass_through]
        files = [settings.tls_cert, settings.tls_key, settings.ca_bundle, settings.audit_log]
        assert [None] * 5 == [settings.outbound_proxy, *files]

    @pytest.mark.usefixtures("account")
    def test_client_keys_have_names_and_may_be_read_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Commas and line ends separate them; the single key is called default."""
        monkeypatch.setenv("METQUAY_CLIENT_KEY", "any visible ASCII will do".replace(" ", ":"))
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", f"\nlims:{KEY}\n, sheet-1:{OTHER_KEY}:read-only,\n")
        assert (
            ClientKey.of("default", "any:visible:ASCII:will:do"),
            ClientKey.of("lims", KEY),
            ClientKey.of("sheet-1", OTHER_KEY, read_only=True),
        ) == load().keys

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("http://proxy.lab.example:3128", OutboundProxy("proxy.lab.example", 3128)),
            ("proxy.lab.example:3128", OutboundProxy("proxy.lab.example", 3128)),
            ("http://proxy.lab.example/", OutboundProxy("proxy.lab.example", 80)),
            ("http://[::1]:3128", OutboundProxy("::1", 3128)),
            ("http://jo%40lab:p%3Aw@proxy:1", OutboundProxy.of("proxy", 1, "jo@lab", "p:w")),
            ("http://jo:a#b@proxy:1", OutboundProxy.of("proxy", 1, "jo", "a#b")),
            ("http://jo:a@b@proxy:1", OutboundProxy.of("proxy", 1, "jo", "a@b")),
            ("http://jo:a/b?c:d@proxy:1/", OutboundProxy.of("proxy", 1, "jo", "a/b?c:d")),
            ("http://jo:a://b@proxy", OutboundProxy.of("proxy", 80, "jo", "a://b")),
            ("http://jo:100%@proxy:1", OutboundProxy.of("proxy", 1, "jo", "100%")),
            ("http://LAB\\jo: \u00fc[1]@[::1]:1", OutboundProxy.of("::1", 1, "LAB\\jo", " \u00fc[1]")),
            ("jo@proxy:1", OutboundProxy.of("proxy", 1, "jo", None)),
            ("HTTP://Proxy.Lab.Example.:1", OutboundProxy("proxy.lab.example.", 1)),
            ("none", DIRECT),
            ("OFF", DIRECT),
            ("direct", DIRECT),
            ("no", DIRECT),
            ("false", DIRECT),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_a_corporate_proxy(self, monkeypatch: pytest.MonkeyPatch, text: str, expected: OutboundProxy) -> None:
        """User name and password are percent-decoded, and may hold what an address may not."""
        monkeypatch.setenv("METQUAY_OUTBOUND_PROXY", text)
        assert expected == load().outbound_proxy

    @pytest.mark.usefixtures("account")
    def test_certificates(self, tmp_path: Path) -> None:
        """A bundle to trust, and a pair to serve with."""
        ca = trustme.CA()
        cert = ca.issue_cert("localhost")
        ca.cert_pem.write_to_path(tmp_path / "ca")
        cert.cert_chain_pems[0].write_to_path(tmp_path / "cert")
        cert.private_key_pem.write_to_path(tmp_path / "key")
        settings = load(
            {
                name: str(tmp_path / file)
                for name, file in (("ca_bundle", "ca"), ("tls_cert", "cert"), ("tls_key", "key"))
            }
        )
        assert (tmp_path / "ca", tmp_path / "cert", tmp_path / "key") == (
            settings.ca_bundle,
            settings.tls_cert,
            settings.tls_key,
        )

    def test_the_sandbox_needs_no_account(self) -> None:
        """And may listen beyond this machine, since there is nothing to protect."""
        settings = load({"listen": "0.0.0.0:0"}, sandbox=True)
        assert settings.sandbox
        assert settings.host is None

    def test_code_may_pass_values_instead_of_texts(self) -> None:
        """No environment is looked at."""
        settings = Settings(host=BaseURL("http", "localhost", 1, ""), access_key="a", secret_key="s", max_wait=3.0)  # noqa: S106
        assert 3.0 == settings.max_wait
        assert Credentials("a", "s") == settings.credentials()
        assert () == settings.sources() == settings.warnings

    def test_settings_are_frozen(self) -> None:
        """What was checked stays so."""
        with pytest.raises(ValidationError, match="frozen"):
            Settings(sandbox=True).max_wait = 3.0

    def test_an_unknown_name_in_code_is_a_mistake(self) -> None:
        """A typing error must not look like a default."""
        with pytest.raises(ValidationError, match="max_weight"):
            Settings(sandbox=True, max_weight=3)


class TestSources:
    def test_the_order_of_precedence(self, monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path) -> None:
        """Flags, environment, .env, files named by a variable, credentials directory, /run/secrets."""
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
        layers: list[tuple[str, Callable[[], object]]] = [
            (
                f"file {tmp_path / 'run-secrets' / 'METQUAY_SECRET_KEY'}",
                lambda: write("run-secrets/METQUAY_SECRET_KEY", "key-1"),
            ),
            (
                f"file {tmp_path / 'credentials' / 'metquay_secret_key'}",
                lambda: write("credentials/metquay_secret_key", "key-2"),
            ),
            (
                f"file {tmp_path / 'mine'}",
                lambda: (write("mine", "key-3"), monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(tmp_path / "mine"))),
            ),
            (".env", lambda: write("current/.env", "METQUAY_SECRET_KEY=key-4\n")),
            ("environment", lambda: monkeypatch.setenv("METQUAY_SECRET_KEY", "key-5")),
        ]
        for number, (expected, add) in enumerate(layers, start=1):
            add()
            settings = load({"host": "lab.metquay.co"}, sandbox=True)
            assert settings.secret_key is not None
            assert f"key-{number}" == settings.secret_key.get_secret_value()
            assert expected == source(settings, "METQUAY_SECRET_KEY").source

    @pytest.mark.usefixtures("account")
    def test_a_flag_wins_over_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And is shown as such."""
        monkeypatch.setenv("METQUAY_RETRIES", "7")
        settings = load({"retries": "9"})
        assert 9 == settings.retries
        assert Setting("METQUAY_RETRIES", "9", "flag") == source(settings, "METQUAY_RETRIES")

    @pytest.mark.usefixtures("account")
    def test_an_empty_variable_is_absent(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """Compose files and CI set variables to nothing."""
        monkeypatch.setenv("METQUAY_RETRIES", "")
        write("current/.env", "METQUAY_RETRIES=4\nMETQUAY_MAX_WAIT=\n")
        settings = load()
        assert (4, 20.0) == (settings.retries, settings.max_wait)

    def test_the_sdks_env_file_works_as_it_is(self, write: Write) -> None:
        """Names in any case, other variables beside them, a byte order mark from Windows' editor."""
        lines = [f"{name.lower()}='{value}'" for name, value in ACCOUNT.items()]
        write("current/.env", "\ufeff" + "\r\n".join(["DEBUG=1", *lines]))
        settings = load()
        assert Credentials("access-key-AAAA", "secret-key-SSSS") == settings.credentials()
        assert () == settings.warnings

    @pytest.mark.usefixtures("account")
    def test_any_setting_may_come_from_a_secrets_directory(self, write: Write) -> None:
        """Docker's configs are mounted there too."""
        write("run-secrets/metquay_client_keys", f"lims:{KEY}\nsheet:{OTHER_KEY}\n")
        write("run-secrets/METQUAY_RETRIES", "5\n")
        write("run-secrets/other", "x")
        settings = load()
        assert ["lims", "sheet"] == [key.name for key in settings.keys]
        assert 5 == settings.retries
        assert () == settings.warnings

    def test_keys_in_files_are_read_again_at_each_login(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """Rotated keys need no restart, and a half-written file is told."""
        monkeypatch.setenv("METQUAY_HOST", "lab.metquay.co")
        monkeypatch.setenv("METQUAY_ACCESS_KEY", "access-key-AAAA")
        file = write("key", "secret-1\r\n")
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file))
        settings = load()
        assert Credentials("access-key-AAAA", "secret-1") == settings.credentials()
        file.write_text("secret-2")
        assert Credentials("access-key-AAAA", "secret-2") == settings.credentials()
        file.write_text("\n")
        with pytest.raises(ValueError, match="key is empty"):
            settings.credentials()
        file.write_text("secret\x00-3")
        with pytest.raises(ValueError, match="holds a character that is not seen"):
            settings.credentials()
        file.write_text("METQUAY_ACCESS_KEY=access-key-AAAA\nMETQUAY_SECRET_KEY=secret-4\n")
        with pytest.raises(ValueError, match="several lines: put the key there alone"):
            settings.credentials()
        file.unlink()
        with pytest.raises(ValueError, match="key: No such file or directory"):
            settings.credentials()

    @pytest.mark.usefixtures("account")
    def test_client_keys_in_files_can_be_read_again(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """Those from elsewhere stay as they are; a file without a key, or with one that was cut off, is an error."""
        monkeypatch.setenv("METQUAY_CLIENT_KEY", "single-key-0123456789")
        file = write("keys", "lims:key-0123456789012\n")
        monkeypatch.setenv("METQUAY_CLIENT_KEYS_FILE", str(file))
        settings = load()
        assert [file] == settings.secret_files("client_key", "client_keys")
        assert settings.keys == settings.current_keys(settings.keys)
        file.write_text("sheet:key-9876543210987:read-only\n")
        assert ["default", "sheet"] == [key.name for key in settings.current_keys(settings.keys)]
        assert ["default", "lims"] == [key.name for key in settings.keys]
        for text, why in (
            (" ", "keys is empty"),
            (",", "keys holds no key"),
            ("sheet:key-98765", "at least 16 characters"),
            ("default:key-9876543210987", "names must be unique"),
            ("sheet:single-key-0123456789", "has a key twice"),
        ):
            file.write_text(f"{text}\n")
            with pytest.raises(ValueError, match=why):
                settings.current_keys(settings.keys)
        file.unlink()
        with pytest.raises(FileNotFoundError):
            settings.current_keys(settings.keys)

    @pytest.mark.usefixtures("account")
    def test_a_right_is_not_won_by_a_file_that_was_cut_off(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """No key and no right is got by the last entry of a list, unless its line has an end."""
        file = write("keys", "lims:key-0123456789012,sheet:key-9876543210987:read-only")
        monkeypatch.setenv("METQUAY_CLIENT_KEYS_FILE", str(file))
        settings = load()
        assert settings.keys == settings.current_keys(settings.keys)
        for last in ("sheet:key-9876543210987", "sheet:new-9876543210987", "new:new-9876543210987:read-only"):
            file.write_text(f"lims:key-0123456789012\n{last}")
            with pytest.raises(ValueError, match="may be half-written: its last entry is new, and no line break"):
                settings.current_keys(settings.keys)
        file.write_text("new:new-0123456789012,sheet:key-9876543210987:read-only")
        assert ["new", "sheet"] == [key.name for key in settings.current_keys(settings.keys)]
        file.write_text("lims:key-0123456789012,sheet:key-9876543210987\n")
        assert not settings.current_keys(settings.keys)[-1].read_only
        file.write_text("lims:key-0123456789012")
        assert settings.keys[:1] == settings.current_keys(settings.keys)

    @pytest.mark.usefixtures("account")
    def test_a_client_key_in_a_file_can_be_read_again(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """One that is shorter than a key should be was cut off, unless it was so from the start."""
        file = write("key", "short")
        monkeypatch.setenv("METQUAY_CLIENT_KEY_FILE", str(file))
        settings = load()
        assert settings.keys == settings.current_keys(settings.keys)
        file.write_text("shor")
        with pytest.raises(ValueError, match="key holds fewer than 16 characters, as though it were half-written"):
            settings.current_keys(settings.keys)
        file.write_text("long-enough-0123456789")
        assert (ClientKey.of("default", "long-enough-0123456789"),) == settings.current_keys(settings.keys)

    def test_the_sandbox_has_no_credentials_of_ours(self) -> None:
        """Asking for them is a mistake with a name."""
        with pytest.raises(ValueError, match="METQUAY_ACCESS_KEY is not set"):
            load(sandbox=True).credentials()

    def test_each_setting_has_a_variable_a_description_and_a_flag_unless_secret(self) -> None:
        """Secrets have none, so that no process list shows them."""
        secrets = {name for name in VARIABLES if flag(name) is None}
        assert {"access_key", "secret_key", "client_key", "client_keys", "outbound_proxy", "redis_password"} == secrets
        assert all(f"{name}_file" in VARIABLES for name in secrets)
        assert all(field.description for field in VARIABLES.values())
        assert "METQUAY_MAX_WAIT" == variable("max_wait")
        assert "--max-wait" == flag("max_wait")
        assert ("20", None) == (default_text("max_wait"), default_text("host"))


class TestProblems:
    def test_what_is_missing_is_told_together(self) -> None:
        """One line for each variable, with what to do."""
        host, access_key, secret_key = problems()
        env = f"{Path.cwd() / '.env'} (there is none)"
        assert host == (
            "METQUAY_HOST (--host): is missing: give your Metquay server, such as lab.metquay.co, in the environment "
            f"or in {env}; to try without one: serve --sandbox"
        )
        for name, line in (("METQUAY_ACCESS_KEY", access_key), ("METQUAY_SECRET_KEY", secret_key)):
            where = f"set it in the environment or in {env}, or name its file in {name}_FILE"
            assert f"{name}: is missing: {where}" == line

    @pytest.mark.parametrize("name", [".env.txt", "env.txt", "ENV", ".env.txt.txt", ".env ", "_env"])
    def test_a_file_that_is_nearly_env_is_named_where_something_is_missing(self, write: Write, name: str) -> None:
        """Windows' editor adds .txt, and its file manager does not show that."""
        write(f"current/{name}", "METQUAY_HOST=lab.metquay.co\n")
        write("current/environment.txt", "")
        assert f"/.env (there is none; rename {name!r} if it is meant to be that)" in problems()[0]

    def test_a_folder_in_the_place_of_env_is_told_where_something_is_missing(self) -> None:
        """Docker makes one of a file that it is to mount and that is not there."""
        Path(".env").mkdir()
        assert f"{Path.cwd() / '.env'} (which is a folder: put a file in its place)" in problems()[0]

    @posix_only
    def test_in_a_folder_that_is_gone_the_missing_settings_are_told(self) -> None:
        """A service manager may start the program there."""
        Path.cwd().rmdir()
        assert "in the environment or in .env; to try without one" in problems()[0]

    def test_a_message_about_a_value_in_env_names_folder_and_line(self, write: Write) -> None:
        """There are many files of that name, and it may not be the one that was edited."""
        file = write("current/.env", "# ours\nMETQUAY_RETRIES=many\n")
        (line,) = problems(sandbox=True)
        assert f"METQUAY_RETRIES (--retries, found in {file}, line 2): 'many' is not a whole number" in line

    def test_a_path_whose_backslashes_became_escapes_is_told_as_it_was_written(self, write: Write) -> None:
        """So python-dotenv reads double quotation marks, and people on Windows write paths."""
        write("current/.env", 'METQUAY_CA_BUNDLE="C:\\temp\\new"\n')
        (line,) = problems(sandbox=True)
        assert "C:\\temp\\new: No such file or directory; in .env, write a path without double quotation marks" in line

    @pytest.mark.parametrize(("name", "text"), [("METQUAY_HOST", '"lab.metquay.co"'), ("METQUAY_LISTEN", "'box:1'")])
    @pytest.mark.usefixtures("account")
    def test_quotation_marks_around_a_wrong_value_are_told(
        self, monkeypatch: pytest.MonkeyPatch, name: str, text: str
    ) -> None:
        """They are not seen where docker gets an --env-file with them."""
        monkeypatch.setenv(name, text)
        (line,) = problems()
        assert line.endswith("; take its quotation marks away (docker --env-file keeps them)")

    @pytest.mark.parametrize(
        ("name", "text", "complaint"),
        [
            ("host", "http://lab.metquay.co", "http:// would show the keys to the network"),
            ("host", "https://u:hunter2@lab.metquay.co", "must not hold a user name or password"),
            ("host", "", "is empty"),
            ("listen", "6387", "'6387' is not a host and a port from 0 to 65535; write it like localhost:6387"),
            ("allowed_hosts", "https://box", "'https://box' is not a host name"),
            ("allowed_hosts", "box:80", "'box:80' is not a host name"),
            ("allowed_hosts", "*.lab.example", "'*.lab.example' is not a host name"),
            ("allowed_origins", "null", "holds something else than origins"),
            ("allowed_origins", "*", "holds something else than origins"),
            ("allowed_origins", "https://u:hunter2@box", "holds something else than origins"),
            ("allowed_origins", "https://box/app", "holds something else than origins"),
            ("read_only", "maybe", "'maybe' is neither true nor false"),
            ("pass_through", "/FlexicalERP", "'/FlexicalERP' is not a path prefix that begins and ends with a slash"),
            ("pass_through", "FlexicalERP/", "is not a path prefix"),
            ("pass_through", "/", "'/' is not a path prefix"),
            ("pass_through", "/a/../b/", "is not a path prefix"),
            ("pass_through", "/a%2f/", "is not a path prefix"),
            ("pass_through", "/a//b/", "is not a path prefix"),
            ("pass_through", "/-/status/", "/-/status/ overlaps /-/"),
            ("pass_through", "/api/", "/api/ overlaps /api/v1/"),
            ("pass_through", "/api/v1/works/", "/api/v1/works/ overlaps /api/v1/"),
            ("rate_limit", "fast", "'fast' is not a rate"),
            ("max_wait", "soon", "'soon' is not a number of seconds, such as 20 or 0.5"),
            ("max_wait", "-1", "'-1' is not a number of seconds"),
            ("max_wait", "nan", "'nan' is not a number of seconds"),
            ("drain_timeout", "inf", "'inf' is not a number of seconds"),
            ("connect_timeout", "0", "0 would fail each request; give a number of seconds above 0"),
            ("read_timeout", "0.0", "0 would fail each request"),
            ("retries", "1.5", "'1.5' is not a whole number from 0 to 999"),
            ("retries", "-1", "'-1' is not a whole number from 0 to 999"),
            ("replay_limit", "big", "'big' is not a size, such as 65536, 64 KiB or 1 MiB"),
            ("replay_limit", "65 MiB", "65 MiB is more than 64 MiB"),
            ("ca_bundle", "none.pem", "cannot read none.pem: No such file or directory"),
            ("tls_cert", "none.pem", "cannot read none.pem: No such file or directory"),
            ("log_level", "loud", "'loud' is none of debug, info, warning, error"),
            ("log_format", "xml", "'xml' is none of auto, console, json"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_a_wrong_value_is_told_in_one_line(self, name: str, text: str, complaint: str) -> None:
        """It names the variable, its flag and what would be right."""
        (line,) = problems({name: text})
        assert line.startswith(f"{variable(name)} ({flag(name)}): ")
        assert complaint in line
        assert "\n" not in line
        assert "hunter2" not in line

    @pytest.mark.parametrize(
        ("name", "text", "complaint"),
        [
            (
                "METQUAY_ACCESS_KEY",
                "hunter2\x01",
                "it holds a character that is not seen, such as a tab",
            ),
            ("METQUAY_CLIENT_KEY", "hunter2 hunter2", "must be ASCII without spaces"),
            ("METQUAY_CLIENT_KEYS", "hunter2hunter2hunter2", "entry 1 is not name:key or name:key:read-only"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY},b:hunter2", "the key in entry 2 must have at least 16 characters"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY}:hunter2", "entry 1 is not name:key"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY}:read-only:hunter2", "entry 1 is not name:key"),
            ("METQUAY_CLIENT_KEYS", f"hunter2 hunter2:{KEY}", "entry 1 is not name:key"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY},a:{OTHER_KEY}", "names must be unique"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY},b:{KEY}", "has a key twice"),
            ("METQUAY_OUTBOUND_PROXY", "socks5://u:hunter2@box", "is a SOCKS proxy, which can't be used"),
            ("METQUAY_OUTBOUND_PROXY", "SOCKS4A://u:hunter2#@box:1080/", "is a SOCKS proxy, which can't be used"),
            ("METQUAY_OUTBOUND_PROXY", "https://u:hunter2@box", "is a proxy that is itself spoken to over TLS"),
            ("METQUAY_OUTBOUND_PROXY", "http://hunter2/proxy.PAC", "is a script (PAC) for browsers"),
            ("METQUAY_OUTBOUND_PROXY", "http://u:hunter2@", "must be the address of an HTTP proxy"),
            ("METQUAY_OUTBOUND_PROXY", "http://box:hunter2", "must be the address of an HTTP proxy"),
            ("METQUAY_OUTBOUND_PROXY", "http://u:hunter2@box:99999", "must be the address of an HTTP proxy"),
            ("METQUAY_OUTBOUND_PROXY", "http://u:hunter2@box:0", "must be the address of an HTTP proxy"),
            ("METQUAY_OUTBOUND_PROXY", "ftp://u:hunter2@box", "must be the address of an HTTP proxy"),
            ("METQUAY_OUTBOUND_PROXY", "http://box:1/?hunter2", "must be the address of an HTTP proxy"),
            ("METQUAY_OUTBOUND_PROXY", "http://box:1/hunter2", "must be the address of an HTTP proxy"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_a_wrong_secret_is_told_without_showing_it(
        self, monkeypatch: pytest.MonkeyPatch, name: str, text: str, complaint: str
    ) -> None:
        """Errors land in logs and tickets."""
        monkeypatch.setenv(name, text)
        with pytest.raises(SettingsError) as caught:
            load()
        (line,) = caught.value.lines
        assert line.startswith(f"{name} (found in environment): ")
        assert complaint in line
        assert "hunter2" not in f"{caught.value!r} {caught.value} {caught.value.__cause__} {caught.value.__context__!r}"
        assert KEY not in f"{caught.value.sources} {caught.value.__context__}"

    @pytest.mark.usefixtures("account")
    def test_the_single_client_key_is_named_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No other may be, and none may be equal to it."""
        monkeypatch.setenv("METQUAY_CLIENT_KEY", KEY)
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", f"default:{OTHER_KEY}")
        assert "names must be unique, and 'default' is the name of METQUAY_CLIENT_KEY" in problems()[0]
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", f"other:{KEY}")
        assert "has a key twice" in problems()[0]

    @pytest.mark.parametrize(
        "listen", ["0.0.0.0:6387", "[::]:6387", "192.0.2.1:6387", "box:6387", "localhost:1,box:6387"]
    )
    @pytest.mark.usefixtures("account")
    def test_listening_beyond_this_machine_needs_a_key_or_consent(
        self, monkeypatch: pytest.MonkeyPatch, listen: str
    ) -> None:
        """The error says the three ways out, and each of them is one."""
        (line,) = problems({"listen": listen})
        assert line.startswith("METQUAY_LISTEN (--listen): ")
        assert "listen on localhost, or set METQUAY_CLIENT_KEY, or METQUAY_TRUST_NETWORK=true" in line
        assert load({"listen": listen, "trust_network": "true"}).trust_network
        monkeypatch.setenv("METQUAY_CLIENT_KEY", KEY)
        assert load({"listen": listen}).keys
        monkeypatch.delenv("METQUAY_CLIENT_KEY")
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", f"lims:{KEY}")
        assert load({"listen": listen}).keys

    @pytest.mark.parametrize(
        "listen",
        [
            "localhost:1",
            "127.0.0.1:1",
            "127.9.9.9:1",
            "[::1]:1",
            pytest.param("unix:/run/metquay.sock", marks=posix_only),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_this_machine_alone_needs_neither(self, listen: str) -> None:
        """Unix sockets have file permissions."""
        assert load({"listen": listen}).listen

    @pytest.mark.usefixtures("account")
    def test_one_mistake_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A malformed client key is not told a second time as a missing one."""
        monkeypatch.setenv("METQUAY_CLIENT_KEY", "a b")
        assert 1 == len(problems({"listen": "0.0.0.0:1"}))
        assert 2 == len(problems({"listen": "0.0.0.0:1", "trust_network": "perhaps"}))

    @pytest.mark.parametrize(
        ("host", "listen"),
        [
            ("http://localhost:6387", "localhost:6387"),
            ("http://127.0.0.1:6387", "localhost:6387"),
            ("http://localhost:6387", "127.0.0.1:1,[::1]:6387"),
            ("http://127.0.0.1:6387", "0.0.0.0:6387"),
            ("https://box:6387", "box:6387"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_the_proxy_is_not_its_own_upstream(self, host: str, listen: str) -> None:
        """Each request would come back until all connections are gone."""
        (line,) = problems({"host": host, "listen": listen, "trust_network": "yes"})
        assert "is where METQUAY_HOST points to: the proxy would forward to itself" in line

    @pytest.mark.parametrize(
        ("host", "listen"),
        [
            ("http://localhost:6388", "localhost:6387"),
            ("http://127.0.0.1:1", "127.0.0.2:1"),
            ("lab.metquay.co", "localhost:443"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_another_port_or_host_is_another_server(self, host: str, listen: str) -> None:
        """The simulator listens on the same machine."""
        assert load({"host": host, "listen": listen}).host

    @pytest.mark.usefixtures("account")
    def test_certificate_and_key_belong_together(self, tmp_path: Path) -> None:
        """Half a pair, a pair that does not fit, and what is no PEM."""
        ca = trustme.CA()
        for name in ("one", "two"):
            cert = ca.issue_cert("localhost")
            cert.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
            cert.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        (tmp_path / "empty").touch()
        pem, key = str(tmp_path / "one.pem"), str(tmp_path / "one.key")
        both = "METQUAY_TLS_KEY (--tls-key): METQUAY_TLS_CERT and METQUAY_TLS_KEY belong together: set both or neither"
        assert (both,) == problems({"tls_cert": pem}) == problems({"tls_key": key})
        for cert, wrong in ((pem, "two.key"), (pem, "empty"), (pem, "one.pem")):
            (line,) = problems({"tls_cert": cert, "tls_key": str(tmp_path / wrong)})
            assert "is not the private key, in PEM form and without a password, of the certificate in" in line
        (line,) = problems({"tls_cert": str(tmp_path / "none"), "tls_key": key})
        assert line.startswith("METQUAY_TLS_CERT (--tls-cert): cannot read ")

    @pytest.mark.parametrize(("damaged", "line"), [(0, 1), (1, 12), (2, 23)])
    @pytest.mark.parametrize("how", ["changed", "cut short", "copied by halves"])
    @pytest.mark.usefixtures("account")
    def test_one_bad_certificate_among_good_ones(self, write: Write, damaged: int, line: int, how: str) -> None:
        """It is said which one, and where it begins, since the others are in order."""
        certificates = [b"\n".join(CERTIFICATE) + b"\n"] * 3
        lines = list(CERTIFICATE)
        if how == "changed":
            lines[2] = lines[2][:-4] + b"!" + lines[2][-3:]
        elif how == "cut short":
            lines[5:-1] = []
        else:
            lines[5:] = []
        certificates[damaged] = b"\n".join(lines) + b"\n"
        path = write("bundle.pem", b"".join(certificates))
        (problem,) = problems({"ca_bundle": str(path)})
        expected = f"certificate {damaged + 1} of 3 in {path} (beginning at line {line}) can't be read"
        assert expected in problem

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"", "is empty"),
            (b"\n \n", "is empty"),
            (PEM, "is saved as UTF-16"),
            (
                b"-----BEGIN PKCS7-----\nMIIB\n-----END PKCS7-----\n",
                "(p7b). Convert it: openssl pkcs7 -print_certs -in",
            ),
            (b"\x30\x82\x01\x00\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02\xa0", "openssl pkcs7 -inform der"),
            (b"\x30\x80\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02\xa0", "openssl pkcs7 -inform der"),
            (b"\x30\x82\x0a\x0a\x02\x01\x03\x30", "openssl pkcs12 -nokeys -in"),
            (ssl.PEM_cert_to_DER_cert(PEM), "is in binary (DER) form. Convert it: openssl x509 -inform der -in"),
            (
                b"-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n",
                "holds a private key and no certificate",
            ),
            (b"-----BEGIN EC PRIVATE KEY-----\nMIIB\n", "holds a private key and no certificate"),
            (b"-----BEGIN NEW CERTIFICATE REQUEST-----\nMIIB\n", "holds the request for a certificate"),
            (b"\n  ".join([b"ca: |", *CERTIFICATE]), "does not begin at the beginning of a line"),
            (b" ".join(CERTIFICATE), "certificate 1 of 1"),
            (b"0815", "holds no certificate in PEM form (a text with BEGIN CERTIFICATE)"),
            (b"<html>", "holds no certificate in PEM form (a text with BEGIN CERTIFICATE)"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_a_file_without_certificates(self, write: Write, content: bytes | str, complaint: str) -> None:
        """It is said what it looks like, and how to convert it."""
        path = write("bundle", content if isinstance(content, bytes) else content.encode("utf-16"))
        (problem,) = problems({"ca_bundle": str(path)})
        assert problem.startswith("METQUAY_CA_BUNDLE (--ca-bundle): ")
        assert complaint in problem
        assert str(path) in problem

    @pytest.mark.parametrize(
        "content",
        [b"\r\n".join(CERTIFICATE), b"# M\xfcller\n" + PEM.encode() * 2, b"\xef\xbb\xbf" + PEM.encode()],
        ids=["Windows lines", "comments", "byte order mark"],
    )
    @pytest.mark.usefixtures("account")
    def test_what_openssl_reads(self, write: Write, content: bytes) -> None:
        """Line ends, comments and a mark do no harm."""
        path = write("bundle", content)
        assert path == load({"ca_bundle": str(path)}).ca_bundle

    @pytest.mark.usefixtures("account")
    def test_a_key_with_a_password_is_refused_instead_of_asking(self, tmp_path: Path) -> None:
        """OpenSSL would wait for somebody to type it."""
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - needed here alone

        cert = trustme.CA().issue_cert("localhost")
        cert.cert_chain_pems[0].write_to_path(tmp_path / "cert")
        key = serialization.load_pem_private_key(cert.private_key_pem.bytes(), None)
        (tmp_path / "key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"password"),
            )
        )
        (line,) = problems({"tls_cert": str(tmp_path / "cert"), "tls_key": str(tmp_path / "key")})
        assert "without a password" in line

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"", "the file FILE is empty"),
            (b" \r\n", "the file FILE is empty"),
            (b"\xff\xfeh\x00", "FILE is not UTF-8 text; save it as UTF-8"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_an_unusable_secret_file_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, write: Write, content: bytes, complaint: str
    ) -> None:
        """It is not told a second time as a missing key."""
        monkeypatch.delenv("METQUAY_SECRET_KEY")
        file = write("key", content)
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file))
        assert (f"METQUAY_SECRET_KEY: {complaint.replace('FILE', str(file))}",) == problems()

    @pytest.mark.usefixtures("account")
    def test_a_missing_secret_file_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not shown: who mistook the one setting for the other has put the key itself there."""
        monkeypatch.delenv("METQUAY_SECRET_KEY")
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", "bad-secret-0123456789")
        monkeypatch.setenv("METQUAY_CLIENT_KEYS_FILE", "anna:bad-secret-0123456789")
        with pytest.raises(SettingsError) as caught:
            load({})
        lines = sorted(caught.value.lines)
        assert ["METQUAY_CLIENT_KEYS_FILE", "METQUAY_SECRET_KEY_FILE"] == [line.partition(" ")[0] for line in lines]
        assert all("names no file that is there" in line for line in lines)
        assert "bad-secret" not in f"{lines}{caught.value.warnings}{caught.value.sources}"

    def test_a_key_is_not_taken_for_another_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who follows a wrong hint puts a secret where it is shown."""
        monkeypatch.setenv("METQUAY_KEY", "bad-secret-0123456789")
        (warning,) = load({}, sandbox=True).warnings
        assert "METQUAY_KEY (from environment) is no setting of this proxy" == warning

    @pytest.mark.usefixtures("account")
    def test_an_unusable_env_file_is_one_line(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        """PowerShell writes UTF-16 unless told otherwise."""
        file = write("current/.env", "METQUAY_RETRIES=1".encode("utf-16"))
        monkeypatch.delenv("METQUAY_HOST")  # that it is missing has a cause, which is told
        why = "it is UTF-16 text, as PowerShell 5 writes it; save it as UTF-8"
        assert (f"{file} cannot be read: {why}",) == problems()

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(file))

        monkeypatch.setattr("builtins.open", refuse)
        assert (f"{file} cannot be read: Permission denied",) == problems()


class TestMasking:
    @pytest.mark.parametrize(
        ("name", "text", "shown"),
        [
            ("METQUAY_ACCESS_KEY", "access-key-4F2A", "...4F2A"),
            ("METQUAY_ACCESS_KEY", "short-key", "***"),
            ("METQUAY_ACCESS_KEY", '{"accessKey": "A", "secretKey": "B-of-4F2A"}', "***"),
            ("METQUAY_SECRET_KEY", "secret-key-4F2A", "***"),
            ("METQUAY_CLIENT_KEY", KEY, "***"),
            ("METQUAY_CLIENT_KEYS", f"lims:{KEY},sheet:{OTHER_KEY}:read-only", "lims:***,sheet:***:read-only"),
            ("METQUAY_REDIS_PASSWORD", "open-sesame-4F2A", "***"),
            ("METQUAY_REDIS_URL", "rediss://lab:open-sesame@box", "rediss://***@box"),
            ("METQUAY_CLIENT_KEYS", KEY, "***"),
            ("METQUAY_OUTBOUND_PROXY", "http://u:p%2F@box:1", "http://***@box:1"),
            ("METQUAY_OUTBOUND_PROXY", "u:secret@box", "http://***@box:80"),
            ("METQUAY_OUTBOUND_PROXY", "http://u:se/cr#t@box", "http://***@box:80"),
            ("METQUAY_OUTBOUND_PROXY", "socks5://u:secret@box", "***"),
            ("METQUAY_OUTBOUND_PROXY", "none", "none"),
            ("METQUAY_OUTBOUND_PROXY", "u:se cret@box", "http://***@box:80"),
            ("METQUAY_OUTBOUND_PROXY", "u:secret", "***"),
            ("METQUAY_HOST", "https://u:p@lab.metquay.co", "https://***@lab.metquay.co"),
            ("METQUAY_CA_BUNDLE", "/etc/a@b.pem", "/etc/a@b.pem"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_of_secrets_only_the_access_keys_last_letters_are_shown(
        self, monkeypatch: pytest.MonkeyPatch, name: str, text: str, shown: str
    ) -> None:
        """Enough to tell two accounts apart; wrong values too, since people look there when something is wrong."""
        monkeypatch.setenv(name, text)
        try:
            sources = load().sources()
        except SettingsError as error:
            sources = error.sources
        assert Setting(name, shown, "environment") in sources

    @pytest.mark.usefixtures("account")
    def test_no_form_of_the_settings_shows_a_secret(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither repr nor what was found."""
        monkeypatch.setenv("METQUAY_CLIENT_KEY", KEY)
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", f"lims:{OTHER_KEY}")
        monkeypatch.setenv("METQUAY_OUTBOUND_PROXY", "http://user:hunter2@box:1")
        settings = load()
        shown = f"{settings!r} {settings} {settings.sources()} {settings.credentials()} {vars(settings)}"
        for secret in ("access-key", "secret-key", KEY, OTHER_KEY, "hunter2"):
            assert secret not in shown


class TestWarnings:
    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("METQUAY_HSOT", "; did you mean METQUAY_HOST?"),
            ("METQUAY_SECRETKEY", "; did you mean METQUAY_SECRET_KEY?"),
            ("METQUAY_SANDBOX", ""),
            ("METQUAY_PORT", ""),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_an_unknown_variable_is_told_with_the_nearest_known(
        self, monkeypatch: pytest.MonkeyPatch, name: str, hint: str
    ) -> None:
        """Its value, which may be a secret, is not."""
        monkeypatch.setenv(name, "hunter2")
        (warning,) = load().warnings
        assert f"{name} (from environment) is no setting of this proxy{hint}" == warning

    def test_it_is_told_beside_the_error_that_it_causes(self, write: Write) -> None:
        """The misspelled variable is why the other one is missing."""
        write("current/.env", "METQUAY_HSOT=lab.metquay.co\n")
        write("run-secrets/METQUAY_SECRETKEY", "hunter2")
        with pytest.raises(SettingsError) as caught:
            load()
        misspelled, file = caught.value.warnings
        place = f"{Path.cwd() / '.env'}, line 1"
        assert f"METQUAY_HSOT (from {place}) is no setting of this proxy; did you mean METQUAY_HOST?" == misspelled
        assert file.endswith("run-secrets) is no setting of this proxy; did you mean METQUAY_SECRET_KEY?")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("METQUAY_PROXY_SERVICE_HOST", "10.0.0.1"),
            ("METQUAY_PROXY_SERVICE_PORT_HTTP", "6387"),
            ("METQUAY_SERVICE_PORT", "6387"),
            ("METQUAY_PROXY_PORT", "tcp://10.0.0.1:6387"),
            ("METQUAY_PROXY_PORT_6387_TCP_ADDR", "10.0.0.1"),
            ("METQUAY_PORT_6387_TCP", "tcp://10.0.0.1:6387"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_variables_that_kubernetes_makes_are_nobodys_mistake(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        """It adds them for each service in the namespace."""
        monkeypatch.setenv(name, value)
        assert () == load().warnings

    @posix_only
    def test_a_secret_file_that_everyone_can_read_is_told(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """Not for those that an engine mounts: their modes are its own."""
        monkeypatch.setenv("METQUAY_HOST", "lab.metquay.co")
        file = write("key", "secret-key-SSSS")
        write("run-secrets/metquay_access_key", "access-key-AAAA").chmod(0o444)
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file))
        assert () == load().warnings
        file.chmod(0o644)
        assert (
            f"{file}, which holds METQUAY_SECRET_KEY, can be read by every user: chmod 600 {file}",
        ) == load().warnings

    @pytest.mark.usefixtures("account")
    def test_a_file_that_is_not_used_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else a rotated key seems to have no effect."""
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", "key")
        assert ("METQUAY_SECRET_KEY (from environment) is used, and METQUAY_SECRET_KEY_FILE is not",) == load().warnings

    @pytest.mark.usefixtures("account")
    def test_a_second_key_that_is_not_used_is_told(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """In .env, where it differs, and in a directory of secrets; the pair of a login remembers it."""
        env = write("current/.env", "METQUAY_ACCESS_KEY=access-key-AAAA\nMETQUAY_SECRET_KEY=another-one\n")
        file = write("run-secrets/METQUAY_SECRET_KEY", "another-one")
        settings = load()
        assert (
            f"METQUAY_SECRET_KEY (from environment) is used, and another one in {env}, line 2 is not",
            f"METQUAY_SECRET_KEY (from environment) is used, and {file} is not",
        ) == settings.warnings
        assert settings.warnings == settings.doubts == settings.credentials().doubts()
        monkeypatch.delenv("METQUAY_SECRET_KEY")
        env.unlink()
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file))
        assert () == load().warnings

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            ("set METQUAY_HOST=hunter2", "that is a command of a shell; write METQUAY_HOST=value"),
            ("SETX METQUAY_SECRET_KEY hunter2", "that is a command of a shell; write METQUAY_SECRET_KEY=value"),
            ('$env:METQUAY_SECRET_KEY="hunter2"', "that is a command of a shell; write METQUAY_SECRET_KEY=value"),
            ("METQUAY_HOST: hunter2", "it has a colon in the place of =; write METQUAY_HOST=value"),
            ("METQUAY_SECRET_KEY:hunter2==", "it has a colon in the place of =; write METQUAY_SECRET_KEY=value"),
            ('"METQUAY_HOST": "hunter2",', "it has a colon in the place of =; write METQUAY_HOST=value"),
            ("METQUAY_HOST hunter2", "it has no =; write METQUAY_HOST=value"),
            ("metquay_max_wait", "it has no =; write METQUAY_MAX_WAIT=value"),
            ("METQUAY RETRIES=hunter2", "more than a name stands before =; write NAME=value"),
            ("- METQUAY_HOST=hunter2", "more than a name stands before =; write METQUAY_HOST=value"),
            ("METQUAY-HOST=hunter2", "it cannot be read; write NAME=value"),
            ('"METQUAY_HOST"=hunter2', "it cannot be read; write METQUAY_HOST=value"),
            (
                'METQUAY_SECRET_KEY="hunter2',
                "its quotation mark is not closed, or something follows the closed one; write METQUAY_SECRET_KEY=value",
            ),
            (
                "METQUAY_SECRET_KEY='hunter2'2",
                "its quotation mark is not closed, or something follows the closed one; write METQUAY_SECRET_KEY=value",
            ),
            ("if [ -f hunter2 ]; then", "it has no =; write NAME=value"),
            ("export OTHER=hunter2", ""),
            ("OTHER", ""),
            ("my-other.name=hunter2", ""),
            ("METQUAY_MAX_WAIT=", ""),
            ("METQUAY_ACCESS_KEY", ""),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_a_line_of_env_that_is_no_setting_is_told(self, write: Write, line: str, why: str) -> None:
        """With folder, number and what it should be, never with its value; a bare name takes the environment's."""
        file = write("current/.env", f"\n# ours\n{line}\n")
        expected = (f"{file}, line 3, is left out: {why}",) if why else ()
        assert expected == load().warnings

    def test_no_library_speaks_of_env(self, write: Write, caplog: pytest.LogCaptureFixture) -> None:
        """What is wrong with a line is told once, in our words."""
        write("current/.env", "set A=1\n")
        assert 1 == len(load(sandbox=True).warnings)
        assert [] == caplog.records

    @pytest.mark.usefixtures("account")
    def test_keys_that_look_wrong_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beside errors too, but not where nothing is logged in to."""
        monkeypatch.setenv("METQUAY_ACCESS_KEY", "'access-key-AAAA'")
        marks = "has quotation marks, which are sent as a part of it: take them away (docker --env-file keeps them)"
        settings = load()
        assert (f"METQUAY_ACCESS_KEY {marks}",) == settings.warnings == settings.credentials().doubts()
        assert () == load(sandbox=True).warnings
        monkeypatch.setenv("METQUAY_SECRET_KEY", "")
        with pytest.raises(SettingsError) as caught:
            load()
        assert (f"METQUAY_ACCESS_KEY {marks}",) == caught.value.warnings
        monkeypatch.setenv("METQUAY_CLIENT_KEY", f'"{KEY}"')
        assert (f"METQUAY_CLIENT_KEY {marks}",) == load(sandbox=True).warnings

    @pytest.mark.usefixtures("account")
    def test_what_looks_wrong_is_judged_with_each_pair(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """A file may have been written again since the start."""
        monkeypatch.delenv("METQUAY_SECRET_KEY")
        file = write("key", "METQUAY_SECRET_KEY=secret-key-SSSS\n")
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file))
        settings = load()
        (doubt,) = settings.credentials().doubts()
        assert "METQUAY_SECRET_KEY holds a name, as in NAME=value: only the value belongs there" == doubt
        file.write_text("secret-key-SSSS\n")
        assert () == settings.credentials().doubts()

    @pytest.mark.usefixtures("account")
    def test_a_short_client_key_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It works, but can be guessed."""
        monkeypatch.setenv("METQUAY_CLIENT_KEY", "secret")
        assert ("METQUAY_CLIENT_KEY is short: make it 16 random characters or more",) == load().warnings

    @pytest.mark.usefixtures("account")
    def test_a_secrets_directory_that_cannot_be_listed_is_told(self, write: Write) -> None:
        """The proxy may have all it needs without it."""
        file = write("run-secrets", "no directory")
        assert load().warnings[0].startswith(f"{file} was not searched for secrets: ")


@pytest.mark.usefixtures("account")
class TestRedis:
    """Where recorded answers may lie, and how the password gets there."""

    @pytest.mark.parametrize(
        "text",
        [
            "localhost:6379",
            "http://localhost",
            "redis://",
            "redis://localhost/first",
            "redis://localhost:99999",
            "redis://localhost?password=open-sesame",
            "redis://localhost/0#x",
            "redis+tls://localhost",
            "unix:run/redis.sock",
            "unix://host/run/redis.sock",
            "redis://[::1",
        ],
    )
    def test_what_is_no_address(self, text: str) -> None:
        """It is told in one line that shows the forms there are, and nothing of what was written."""
        (line,) = problems({"redis_url": text})
        assert line.startswith("METQUAY_REDIS_URL")
        assert "redis://host:6379/0" in line
        assert "open-sesame" not in line

    def test_a_password_in_the_address_is_refused_and_not_shown(self) -> None:
        """An address is seen in process lists and logs."""
        (line,) = problems({"redis_url": "rediss://lab:open-sesame@redis.example"})
        assert "METQUAY_REDIS_PASSWORD_FILE" in line
        assert "open-sesame" not in line

    def test_a_password_in_the_environment_is_refused_and_not_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It comes from a file alone."""
        monkeypatch.setenv("METQUAY_REDIS_PASSWORD", "open-sesame")
        (line,) = problems()
        assert "METQUAY_REDIS_PASSWORD_FILE" in line
        assert "open-sesame" not in line

    @pytest.mark.parametrize(
        ("url", "password"),
        [("redis://redis.example", False), ("redis://redis.example", True), ("rediss://10.0.0.7:6380", False)],
    )
    def test_beyond_this_machine_it_needs_tls_and_a_password(self, write: Write, url: str, *, password: bool) -> None:
        """Bodies of answers lie there: with only one of the two the proxy does not start."""
        flags = {"redis_password_file": str(write("word", "open-sesame\n"))} if password else {}
        (line,) = problems({"redis_url": url} | flags)
        assert f"{url}" in line
        assert "rediss://" in line
        assert "METQUAY_REDIS_PASSWORD_FILE" in line

    @pytest.mark.parametrize("url", ["rediss://redis.example:6379/0", "redis://127.0.0.1:6379/0", "unix:///x.sock"])
    def test_with_both_or_within_this_machine_it_starts(self, write: Write, url: str) -> None:
        """And no form of the settings shows the password, which is read again whenever it is asked for."""
        word = write("word", "open-sesame\n")
        settings = load({"redis_url": url, "redis_password_file": str(word)})
        assert url == str(settings.redis_url)
        assert "open-sesame" == settings.redis_secret()
        assert "open-sesame" not in repr(settings)
        assert "open-sesame" not in str(settings.sources())
        word.write_text("xyzzy")
        assert "xyzzy" == settings.redis_secret()

    def test_without_a_password(self) -> None:
        """On this machine a Redis may have none."""
        assert load({"redis_url": "redis://localhost"}).redis_secret() is None

    def test_without_the_library_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is an extra that most do not need."""
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "redis" else pytest.fail(name))
        (line,) = problems({"redis_url": "redis://localhost"})
        assert "pip install 'metquay-proxy[redis]'" in line


class TestSystemProxy:
    """Which corporate proxy is taken, the setting's or the system's."""

    @pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
    @pytest.mark.usefixtures("account")
    def test_the_systems_is_taken(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """The variables may be written in capitals or not."""
        monkeypatch.setenv(name, "http://u:p#w@proxy:3128/")
        settings = load()
        assert settings.host is not None
        assert OutboundProxy.of("proxy", 3128, "u", "p#w") == outbound_proxy(settings, settings.host)
        assert () == settings.warnings

    @pytest.mark.parametrize(("setting", "expected"), [("none", None), ("other:1", OutboundProxy("other", 1))])
    @pytest.mark.usefixtures("account")
    def test_the_setting_goes_before_it(
        self, monkeypatch: pytest.MonkeyPatch, setting: str, expected: OutboundProxy | None
    ) -> None:
        """It takes the system's place, whatever NO_PROXY says; and none means none, not even the system's."""
        monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy")
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("METQUAY_OUTBOUND_PROXY", setting)
        settings = load()
        assert settings.host is not None
        assert expected == outbound_proxy(settings, settings.host)
        assert () == settings.warnings

    @pytest.mark.parametrize(
        ("url", "why"),
        [
            ("socks5h://u:hunter2@proxy:1080", "is a SOCKS proxy"),
            ("https://u:hunter2@proxy:443", "is a proxy that is itself spoken to over TLS"),
            ("http://wpad/wpad.dat", "is a script (PAC)"),
            ("hunter2 hunter2", "must be the address of an HTTP proxy"),
        ],
    )
    @pytest.mark.usefixtures("account")
    def test_one_that_cannot_be_used_is_told(self, monkeypatch: pytest.MonkeyPatch, url: str, why: str) -> None:
        """In one line, without its password; then the way is a direct one. Behind NO_PROXY it does not matter."""
        monkeypatch.setenv("HTTPS_PROXY", url)
        settings = load()
        assert settings.host is not None
        assert None is outbound_proxy(settings, settings.host)
        (warning,) = settings.warnings
        assert warning.startswith(f"HTTPS_PROXY, or the system's proxy setting, {why}")
        assert "Metquay is asked directly; METQUAY_OUTBOUND_PROXY takes its place" in warning
        assert "hunter2" not in warning
        monkeypatch.setenv("no_proxy", "metquay.co")
        assert () == load().warnings

    def test_not_within_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clear text stays on this machine."""
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
        monkeypatch.setenv("ALL_PROXY", "http://proxy:3128")
        settings = Settings(host="http://localhost:1", access_key="a", secret_key="s", outbound_proxy="proxy:1")  # noqa: S106 - nobody's
        assert settings.host is not None
        assert None is outbound_proxy(settings, settings.host)

    @pytest.mark.parametrize(
        ("no_proxy", "host", "port", "expected"),
        [
            ("lab.metquay.co", "lab.metquay.co", 443, True),
            ("metquay.co", "lab.metquay.co", 443, True),
            (".metquay.co", "lab.metquay.co", 443, True),
            ("*.metquay.co", "lab.metquay.co", 443, True),
            ("METQUAY.co.", "lab.metquay.co", 443, True),
            ("lab.metquay.co:443", "lab.metquay.co", 443, True),
            ("*.metquay.co:8443", "lab.metquay.co", 8443, True),
            ("lab.metquay.co:443", "lab.metquay.co", 8443, False),
            ("*", "lab.metquay.co", 443, True),
            ("localhost, *", "lab.metquay.co", 443, True),
            ("localhost,127.0.0.1 ,\t.metquay.co", "lab.metquay.co", 443, True),
            ("localhost 127.0.0.1 metquay.co", "lab.metquay.co", 443, True),
            ("10.0.0.0/8", "10.1.2.3", 443, True),
            ("10.0.0.0/8", "11.1.2.3", 443, False),
            ("10.1.2.3", "10.1.2.3", 443, True),
            ("10.1.2.3:8443", "10.1.2.3", 443, False),
            ("10.1.2.3:443", "10.1.2.3", 443, True),
            ("10.1.2.0/24", "lab.metquay.co", 443, False),
            ("2001:db8::/32", "2001:db8::1", 443, True),
            ("2001:DB8:0::1", "2001:db8::1", 443, True),
            ("[2001:db8::1]", "2001:db8::1", 443, True),
            ("[2001:db8::1]:443", "2001:db8::1", 443, True),
            ("[2001:db8::1]:8443", "2001:db8::1", 443, False),
            ("", "lab.metquay.co", 443, False),
            (",, ", "lab.metquay.co", 443, False),
            ("quay.co", "lab.metquay.co", 443, False),
            ("xlab.metquay.co", "lab.metquay.co", 443, False),
            ("lab.metquay.co.evil.example", "lab.metquay.co", 443, False),
            ("http://lab.metquay.co", "lab.metquay.co", 443, False),
            ("lab.*.co", "lab.metquay.co", 443, False),
        ],
    )
    def test_no_proxy(self, no_proxy: str, host: str, port: int, *, expected: bool) -> None:
        """NO_PROXY is read as curl and Go read it."""
        assert expected is goes_directly(no_proxy, host, port)
