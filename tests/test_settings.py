from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from pydantic import ValidationError

from metquay_proxy.redis_address import RedisAddress
from metquay_proxy.rules.address import Address
from metquay_proxy.rules.credentials import Credentials
from metquay_proxy.rules.gate import ClientKey
from metquay_proxy.rules.quota import Rate
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.settings import (
    VARIABLES,
    Setting,
    Settings,
    SettingsError,
    default_text,
    flag,
    load,
    meaning,
    outbound_proxy,
    variable,
)
from metquay_proxy.upstream.dial import OutboundProxy
from tests.unset import ACCOUNT, unset, write

if TYPE_CHECKING:
    from collections.abc import Callable

    Write = Callable[[str, str | bytes], Path]

KEY = "0123456789abcdef"
OTHER_KEY = "fedcba9876543210"

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")


@pytest.fixture(autouse=True)
def _account_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is required is set, and nothing else reaches a test from the machine that runs it."""
    unset(monkeypatch, tmp_path)
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(name="write")
def _write(tmp_path: Path) -> Write:
    """Return a function that writes a private file below the test's directory and returns its path."""
    return partial(write, tmp_path)


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set nothing at all."""
    for name in ACCOUNT:
        monkeypatch.delenv(name)


def problems(flags: dict[str, str] | None = None, *, sandbox: bool = False) -> tuple[str, ...]:
    """Return the lines with which loading fails."""
    with pytest.raises(SettingsError) as caught:
        load(flags, sandbox=sandbox)
    return caught.value.lines


class TestValues:
    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("host", "lab.metquay.co", BaseURL("https", "lab.metquay.co", 443, "/api/v1")),
            ("host", "http://127.0.0.1:8000/", BaseURL("http", "127.0.0.1", 8000, "/api/v1")),
            ("listen", "127.0.0.1:0, [::1]:0", (Address("127.0.0.1", 0), Address("::1", 0))),
            ("allowed_hosts", "Proxy.Lab.Example., other_host", ("proxy.lab.example", "other_host")),
            ("allowed_origins", "HTTPS://Tools.lab.example/, app://x", ("https://tools.lab.example", "app://x")),
            ("allowed_origins", "http://box:80,https://box:443", ("http://box", "https://box")),
            ("allowed_origins", "https://box:80, http://[::1]:8080", ("https://box:80", "http://[::1]:8080")),
            *[("read_only", *row) for row in (("true", True), ("1", True), ("OFF", False), ("no", False))],
            ("pass_through", "/FlexicalERP/, /a/b.c/", ("/FlexicalERP/", "/a/b.c/")),
            ("rate_limit", "5/second", Rate(5, 1)),
            ("rate_limit", "off", None),
            *[("max_wait", *row) for row in (("0", 0.0), (" 2.5 ", 2.5), ("1e3", 1000.0))],
            *[
                ("retries", "0", 0),
                ("connect_timeout", "0.1", 0.1),
                ("read_timeout", "30", 30.0),
                ("drain_timeout", "0", 0.0),
            ],
            *[("replay_limit", text, 65536) for text in ("65536", "64 KiB", "64kib")],
            *[("replay_limit", *row) for row in (("1MB", 1_000_000), ("64 MiB", 64 * 1024 * 1024), ("0", 0))],
            ("log_level", "WARNING", "warning"),
            ("log_format", "json", "json"),
            ("redis_url", "redis://localhost", RedisAddress("redis", "localhost", 6379)),
        ],
    )
    def test_a_text_becomes_the_value_that_the_program_uses(self, name: str, text: str, expected: object) -> None:
        """The same text means the same, in a flag and in a variable."""
        assert expected == getattr(load({name: text}), name)

    def test_the_defaults(self) -> None:
        """They are those of the contract."""
        settings = load()
        assert (Address("localhost", 6387),) == settings.listen
        assert Rate(100, 60) == settings.rate_limit
        times = [settings.max_wait, settings.connect_timeout, settings.read_timeout, settings.drain_timeout]
        assert ([20.0, 10.0, 60.0, 8.0], 2) == (times, settings.retries)
        assert 1024 * 1024 == settings.replay_limit
        assert ("info", "auto") == (settings.log_level, settings.log_format)
        assert [False] * 4 == [settings.read_only, settings.allow_quit, settings.trust_network, settings.sandbox]
        assert [()] * 4 == [settings.keys, settings.allowed_hosts, settings.allowed_origins, settings.pass_through]
        files = [settings.tls_cert, settings.tls_key, settings.ca_bundle, settings.audit_log]
        assert [None] * 5 == [settings.outbound_proxy, *files]

    def test_client_keys_have_names_and_may_be_read_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Commas and line ends separate them; the single key is called default."""
        monkeypatch.setenv("METQUAY_CLIENT_KEY", "any visible ASCII will do".replace(" ", ":"))
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", f"\nlims:{KEY}\n, sheet-1:{OTHER_KEY}:read-only,\n")
        assert (
            ClientKey.of("default", "any:visible:ASCII:will:do"),
            ClientKey.of("lims", KEY),
            ClientKey.of("sheet-1", OTHER_KEY, read_only=True),
        ) == load().keys

    def test_certificates(self, tmp_path: Path) -> None:
        """A bundle to trust, and a pair to serve with."""
        ca = trustme.CA()
        cert = ca.issue_cert("localhost")
        ca.cert_pem.write_to_path(tmp_path / "ca")
        cert.cert_chain_pems[0].write_to_path(tmp_path / "cert")
        cert.private_key_pem.write_to_path(tmp_path / "key")
        files = [tmp_path / name for name in ("ca", "cert", "key")]
        settings = load(dict(zip(("ca_bundle", "tls_cert", "tls_key"), map(str, files), strict=True)))
        assert files == [settings.ca_bundle, settings.tls_cert, settings.tls_key]

    @pytest.mark.usefixtures("no_account")
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

    def test_no_slip_passes(self) -> None:
        """What was checked stays so, and an unknown name in code does not look like a default."""
        with pytest.raises(ValidationError, match="frozen"):
            Settings(sandbox=True).max_wait = 3.0
        with pytest.raises(ValidationError, match="max_weight"):
            Settings(sandbox=True, max_weight=3)


class TestSources:
    def test_keys_in_files_are_read_again_at_each_login(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """Rotated keys need no restart, and a half-written file is told."""
        monkeypatch.delenv("METQUAY_SECRET_KEY")
        file = write("key", "secret-1\r\n")
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file))
        settings = load()
        assert Credentials("access-key-AAAA", "secret-1") == settings.credentials()
        file.write_text("secret-2")
        assert Credentials("access-key-AAAA", "secret-2") == settings.credentials()
        for text, why in (
            ("\n", "key is empty"),
            ("secret\x00-3", "contains an invisible character"),
            ("METQUAY_ACCESS_KEY=A\nMETQUAY_SECRET_KEY=secret-4\n", "several lines: put the key there alone"),
        ):
            file.write_text(text)
            with pytest.raises(ValueError, match=why):
                settings.credentials()
        file.unlink()
        with pytest.raises(ValueError, match="key: No such file or directory"):
            settings.credentials()

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
            (",", "contains no key"),
            ("sheet:key-98765", "a key has at least 16 letters"),
            ("default:key-9876543210987", "names must be unique"),
            ("sheet:single-key-0123456789", "contains the same key twice"),
        ):
            file.write_text(f"{text}\n")
            with pytest.raises(ValueError, match=why):
                settings.current_keys(settings.keys)
        file.unlink()
        with pytest.raises(ValueError, match="keys: No such file or directory"):
            settings.current_keys(settings.keys)

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

    def test_a_client_key_in_a_file_can_be_read_again(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """One that is shorter than a key should be was cut off, unless it was so from the start."""
        file = write("key", "short")
        monkeypatch.setenv("METQUAY_CLIENT_KEY_FILE", str(file))
        settings = load()
        assert settings.keys == settings.current_keys(settings.keys)
        file.write_text("shor")
        with pytest.raises(ValueError, match="key holds fewer than 16 characters, so it may be half-written"):
            settings.current_keys(settings.keys)
        file.write_text("long-enough-0123456789")
        assert (ClientKey.of("default", "long-enough-0123456789"),) == settings.current_keys(settings.keys)

    @pytest.mark.usefixtures("no_account")
    def test_the_sandbox_has_no_credentials_of_ours(self) -> None:
        """Asking for them is a mistake with a name."""
        with pytest.raises(ValueError, match="METQUAY_ACCESS_KEY is not set"):
            load(sandbox=True).credentials()

    def test_each_setting_has_a_variable_a_description_and_a_flag_unless_secret(self) -> None:
        """Secrets have none, so that no process list shows them."""
        secrets = {name for name in VARIABLES if flag(name) is None}
        assert {"access_key", "secret_key", "client_key", "client_keys", "outbound_proxy", "redis_password"} == secrets
        assert all(f"{name}_file" in VARIABLES for name in secrets)
        assert all(meaning(name)[1] for name in VARIABLES)
        assert ("URL", "or unix:///path") == (meaning("redis_url")[0], meaning("redis_url")[1][-15:])
        assert all(meaning(name)[0] for name, field in VARIABLES.items() if flag(name) and field.annotation is not bool)
        assert "METQUAY_MAX_WAIT" == variable("max_wait")
        assert "--max-wait" == flag("max_wait")
        assert ("20", None) == (default_text("max_wait"), default_text("host"))


class TestProblems:
    @pytest.mark.usefixtures("no_account")
    def test_what_is_missing_is_told_together(self) -> None:
        """One line for each variable, with what to do."""
        host, access_key, secret_key = problems()
        env = f"{Path.cwd() / '.env'} (there is none)"
        assert host == (
            "METQUAY_HOST (--host): not set; write your Metquay server, such as lab.metquay.co, into the environment "
            f"or {env}; to try without one: serve --sandbox"
        )
        for name, line in (("METQUAY_ACCESS_KEY", access_key), ("METQUAY_SECRET_KEY", secret_key)):
            where = f"write it into the environment or {env}, or name its file in {name}_FILE"
            assert f"{name}: not set; {where}" == line

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
    def test_quotation_marks_around_a_wrong_value_are_told(
        self, monkeypatch: pytest.MonkeyPatch, name: str, text: str
    ) -> None:
        """They are not seen where docker gets an --env-file with them."""
        monkeypatch.setenv(name, text)
        (line,) = problems()
        assert line.endswith("; remove its quotation marks (docker --env-file keeps them)")

    @pytest.mark.parametrize(
        ("name", "text", "complaint"),
        [
            ("host", "http://lab.metquay.co", "http:// would show the keys to the network"),
            ("host", "https://u:hunter2@lab.metquay.co", "must not contain a user name or password"),
            ("host", "", "is empty"),
            ("listen", "6387", "'6387' is not a host and a port from 0 to 65535; write it like localhost:6387"),
            *[
                ("allowed_hosts", text, f"{text!r} is not a host name")
                for text in ("https://box", "box:80", "*.lab.example")
            ],
            *[
                ("allowed_origins", text, "contains something other than origins")
                for text in ("null", "*", "https://u:hunter2@box", "https://box/app")
            ],
            ("read_only", "maybe", "'maybe' is neither true nor false"),
            *[
                ("pass_through", text, f"{text!r} is not a path prefix")
                for text in ("/FlexicalERP", "FlexicalERP/", "/", "/a/../b/", "/a%2f/", "/a//b/")
            ],
            ("pass_through", "/-/status/", "/-/status/ overlaps /-/"),
            ("pass_through", "/api/", "/api/ overlaps /api/v1/"),
            ("pass_through", "/api/v1/works/", "/api/v1/works/ overlaps /api/v1/"),
            ("rate_limit", "fast", "'fast' is not a rate"),
            ("max_wait", "soon", "'soon' is not a number of seconds, such as 20 or 0.5"),
            *[
                ("max_wait", "-1", "'-1' is less than 0"),
                ("max_wait", "nan", "'nan' is not a number of seconds"),
            ],
            *[(name, "0", "'0' would make every request fail") for name in ("connect_timeout", "read_timeout")],
            ("drain_timeout", "inf", "'inf' is not a number of seconds"),
            *[
                ("retries", "1.5", "'1.5' is not a whole number"),
                ("retries", "1000", "'1000' is more than 999"),
            ],
            *[
                ("replay_limit", text, f"{text!r} is not a size up to 64 MiB, such as 65536, 64 KiB or")
                for text in ("big", "65 MiB")
            ],
            ("ca_bundle", "none.pem", "cannot read none.pem: No such file or directory"),
            ("tls_cert", "none.pem", "cannot read none.pem: No such file or directory"),
            ("log_level", "loud", "'loud' is not 'debug', 'info', 'warning' or 'error'"),
            ("log_format", "xml", "'xml' is not 'auto', 'console' or 'json'"),
        ],
    )
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
            ("METQUAY_ACCESS_KEY", "hunter2\x01", "it contains an invisible character, such as a tab"),
            ("METQUAY_CLIENT_KEY", "hunter2 hunter2", "must be ASCII without spaces"),
            ("METQUAY_CLIENT_KEYS", "hunter2hunter2hunter2", "entry 1 is not name:key or name:key:read-only"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY},b:hunter2", "entry 2 is not name:key or name:key:read-only"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY}:hunter2", "entry 1 is not name:key"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY}:read-only:hunter2", "entry 1 is not name:key"),
            ("METQUAY_CLIENT_KEYS", f"hunter2 hunter2:{KEY}", "entry 1 is not name:key"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY},a:{OTHER_KEY}", "names must be unique"),
            ("METQUAY_CLIENT_KEYS", f"a:{KEY},b:{KEY}", "contains the same key twice"),
            ("METQUAY_OUTBOUND_PROXY", "socks5://u:hunter2@box", "is a SOCKS proxy, which is not supported"),
            ("METQUAY_OUTBOUND_PROXY", "http://box:1/hunter2", "must be the address of an HTTP proxy"),
            ("METQUAY_CLIENT_KEYS", " ", "is empty"),
            ("METQUAY_CLIENT_KEYS", ",", "contains no key"),
            (
                "METQUAY_TLS_KEY",
                "-----BEGIN PRIVATE KEY-----\nhunter2",
                "cannot read ***: this is no path; save the text in a file",
            ),
            (
                "METQUAY_TLS_CERT",
                "hunter2/LS0tLS1CRUdJTg==",
                "cannot read ***: this is no path; save the text in a file",
            ),
            (
                "METQUAY_CA_BUNDLE",
                "https://me:hunter2@box",
                "cannot read ***: this is no path; save the text in a file",
            ),
            ("METQUAY_ALLOWED_HOSTS", "https://me:hunter2@box", "'***@box' is not a host name"),
            ("METQUAY_ALLOWED_HOSTS", "me:hunter2@box", "'***@box' is not a host name"),
            ("METQUAY_LISTEN", "http://me:hun'ter/hunter2@box:1", "***@box:1"),
        ],
    )
    def test_a_wrong_secret_is_told_without_showing_it(
        self, monkeypatch: pytest.MonkeyPatch, name: str, text: str, complaint: str
    ) -> None:
        """Errors land in logs and tickets."""
        monkeypatch.setenv(name, text)
        with pytest.raises(SettingsError) as caught:
            load()
        (line,) = caught.value.lines
        assert re.match(rf"{name} \((--[a-z-]+, )?found in environment\): ", line)
        assert complaint in line
        assert "hunter2" not in f"{caught.value!r} {caught.value} {caught.value.__cause__} {caught.value.__context__!r}"
        assert not re.search(f"{KEY}|hunter2", f"{caught.value.sources} {caught.value.__context__}")

    def test_the_single_client_key_is_named_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No other may be, and none may be equal to it."""
        monkeypatch.setenv("METQUAY_CLIENT_KEY", KEY)
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", f"default:{OTHER_KEY}")
        assert "names must be unique, and 'default' is the name of METQUAY_CLIENT_KEY" in problems()[0]
        monkeypatch.setenv("METQUAY_CLIENT_KEYS", f"other:{KEY}")
        assert "contains the same key twice" in problems()[0]

    @pytest.mark.parametrize(
        "listen", ["0.0.0.0:6387", "[::]:6387", "192.0.2.1:6387", "box:6387", "localhost:1,box:6387"]
    )
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

    @pytest.mark.parametrize("listen", ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "unix:/run/m.sock"])
    @posix_only
    def test_this_machine_alone_needs_neither(self, listen: str) -> None:
        """Unix sockets have file permissions."""
        assert load({"listen": listen}).listen

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
    def test_the_proxy_is_not_its_own_upstream(self, host: str, listen: str) -> None:
        """Each request would come back until all connections are gone."""
        (line,) = problems({"host": host, "listen": listen, "trust_network": "yes"})
        assert "is METQUAY_HOST itself: the proxy would ask itself" in line

    @pytest.mark.parametrize(
        ("host", "listen"),
        [
            ("http://localhost:6388", "localhost:6387"),
            ("http://127.0.0.1:1", "127.0.0.2:1"),
            ("lab.metquay.co", "localhost:443"),
            ("lab.metquay.co", "0.0.0.0:443"),
        ],
    )
    def test_another_port_or_host_is_another_server(self, host: str, listen: str) -> None:
        """The simulator listens on the same machine."""
        assert load({"host": host, "listen": listen, "trust_network": "yes"}).host

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

    def test_a_missing_secret_file_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not shown: who mistook the one setting for the other has put the key itself there."""
        monkeypatch.delenv("METQUAY_SECRET_KEY")
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", "bad-secret-0123456789")
        monkeypatch.setenv("METQUAY_CLIENT_KEYS_FILE", "anna:bad-secret-0123456789")
        with pytest.raises(SettingsError) as caught:
            load({})
        lines = sorted(caught.value.lines)
        assert ["METQUAY_CLIENT_KEYS_FILE", "METQUAY_SECRET_KEY_FILE"] == [line.partition(" ")[0] for line in lines]
        assert all("does not name an existing file" in line for line in lines)
        assert "bad-secret" not in f"{lines}{caught.value.warnings}{caught.value.sources}"

    @pytest.mark.usefixtures("no_account")
    def test_an_unusable_env_file_is_one_line(self, write: Write) -> None:
        """That something is missing then has a cause, which is told."""
        file = write("current/.env", "METQUAY_RETRIES=1".encode("utf-16"))
        why = "it is not UTF-8 text (PowerShell 5 writes UTF-16); save it as UTF-8"
        assert (f"{file} cannot be read: {why}",) == problems()


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
    @pytest.mark.usefixtures("no_account")
    def test_it_is_told_beside_the_error_that_it_causes(self, write: Write) -> None:
        """The misspelled variable is why the other one is missing."""
        write("current/.env", "METQUAY_HSOT=lab.metquay.co\n")
        with pytest.raises(SettingsError) as caught:
            load()
        place = f"{Path.cwd() / '.env'}, line 1"
        told = f"METQUAY_HSOT (from {place}) is not a setting of this proxy; did you mean METQUAY_HOST?"
        assert (told,) == caught.value.warnings

    def test_a_second_key_that_is_not_used_is_told(self, write: Write) -> None:
        """The pair of a login remembers it."""
        file = write("run-secrets/METQUAY_SECRET_KEY", "another-one")
        settings = load()
        assert (f"METQUAY_SECRET_KEY (from environment) is used, and {file} is not",) == settings.warnings
        assert settings.warnings == settings.credentials().doubts()

    def test_keys_that_look_wrong_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beside errors too, but not where nothing is logged in to."""
        monkeypatch.setenv("METQUAY_ACCESS_KEY", "'access-key-AAAA'")
        marks = "has quotation marks, which are sent as a part of it: remove them (docker --env-file keeps them)"
        settings = load()
        assert (f"METQUAY_ACCESS_KEY {marks}",) == settings.warnings == settings.credentials().doubts()
        assert () == load(sandbox=True).warnings
        monkeypatch.setenv("METQUAY_SECRET_KEY", "")
        with pytest.raises(SettingsError) as caught:
            load()
        assert (f"METQUAY_ACCESS_KEY {marks}",) == caught.value.warnings
        monkeypatch.setenv("METQUAY_CLIENT_KEY", f'"{KEY}"')
        assert (f"METQUAY_CLIENT_KEY {marks}",) == load(sandbox=True).warnings

    def test_what_looks_wrong_is_judged_with_each_pair(self, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
        """A file may have been written again since the start."""
        monkeypatch.delenv("METQUAY_SECRET_KEY")
        file = write("key", "METQUAY_SECRET_KEY=secret-key-SSSS\n")
        monkeypatch.setenv("METQUAY_SECRET_KEY_FILE", str(file))
        settings = load()
        (doubt,) = settings.credentials().doubts()
        assert "METQUAY_SECRET_KEY contains a name, as in NAME=value: only the value belongs there" == doubt
        file.write_text("secret-key-SSSS\n")
        assert () == settings.credentials().doubts()


class TestRedis:
    """Where recorded answers may lie, and how the password gets there."""

    def test_what_is_no_address(self) -> None:
        """It is told in one line that shows the forms there are, and nothing of what was written."""
        (line,) = problems({"redis_url": "redis://localhost?password=open-sesame"})
        assert line.startswith("METQUAY_REDIS_URL")
        assert "redis://host:6379/0" in line
        assert "open-sesame" not in line

    def test_a_password_beside_a_file_is_refused_and_not_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An address is seen in process lists and logs, and so is the environment."""
        (address,) = problems({"redis_url": "rediss://lab:open-sesame@redis.example"})
        monkeypatch.setenv("METQUAY_REDIS_PASSWORD", "open-sesame")
        (password,) = problems()
        for line in (address, password):
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


class TestSystemProxy:
    """Which corporate proxy is taken, the setting's or the system's."""

    @pytest.mark.parametrize(("setting", "expected"), [("none", None), ("other:1", OutboundProxy("other", 1))])
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

    def test_one_that_cannot_be_used_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In one line, without its password; then the way is a direct one. Behind NO_PROXY it does not matter."""
        monkeypatch.setenv("HTTPS_PROXY", "socks5h://u:hunter2@proxy:1080")
        settings = load()
        assert settings.host is not None
        assert None is outbound_proxy(settings, settings.host)
        (warning,) = settings.warnings
        assert warning.startswith("HTTPS_PROXY, or the system's proxy setting, is a SOCKS proxy")
        assert "The proxy connects to Metquay directly; set METQUAY_OUTBOUND_PROXY" in warning
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
