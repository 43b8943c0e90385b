# ruff: noqa: S104 - compared, not bound

from __future__ import annotations

import subprocess
import sys

import pytest

from metquay_proxy.rules.address import DEFAULT_LISTEN, Address, parse_listen

unix_only = pytest.mark.skipif(sys.platform == "win32", reason="Python has no unix sockets on Windows")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DEFAULT_LISTEN, [Address("localhost", 6387)]),
        ("LocalHost:0", [Address("localhost", 0)]),
        ("127.0.0.1:80, [::1]:80", [Address("127.0.0.1", 80), Address("::1", 80)]),
        ("[0:0:0:0:0:0:0:1]:65535", [Address("::1", 65535)]),
        ("proxy_1.lab-2.example:6387", [Address("proxy_1.lab-2.example", 6387)]),
        ("LOCALHOST.:6387", [Address("localhost", 6387)]),
        ("localhost:0,localhost:0", [Address("localhost", 0), Address("localhost", 0)]),
        pytest.param("unix:/run/metquay:1.sock", [Address("", 0, "/run/metquay:1.sock")], marks=unix_only),
    ],
)
def test_what_can_be_listened_on(text: str, expected: list[Address]) -> None:
    """Hosts, IP addresses of both families, several of them, and the path of a unix socket, colons included."""
    assert tuple(expected) == parse_listen(text)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ("6387 :6387 localhost localhost: localhost:65536 localhost:-1 localhost:٣", "{!r} is not a host and a port"),
        ("*:6387 ::1:6387 [localhost]:6387 1.2.3:6387 http://localhost:6387 -x:6387", "{!r} has no host name or IP"),
        (".:6387 localhost..:6387", "{!r} has no host name or IP"),
        ("localhost:1,", "'' is not a host and a port"),
        ("unix:proxy.sock", "{!r} needs a path that begins with a slash"),
        ("localhost:1,localhost.:1 localhost:1,localhost:1", "localhost:1 is listed twice"),
    ],
)
def test_what_cannot_be_listened_on_is_told(entries: str, complaint: str) -> None:
    """The text names the entry and what is wrong with it."""
    for text in entries.split():
        with pytest.raises(ValueError, match=r"write it like|twice") as caught:
            parse_listen(text)
        assert complaint.format(text) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["localhost:6387", "[::1]:0", "127.0.0.1:80", pytest.param("unix:/a", marks=unix_only)]
)
def test_an_address_reads_as_it_was_written(text: str) -> None:
    """What was parsed is shown in the same spelling."""
    assert text == str(parse_listen(text)[0])


@pytest.mark.parametrize(
    ("host", "hosts", "reach"),
    [
        ("localhost", ("127.0.0.1", "::1"), ("127.0.0.1", "::1")),
        ("::", ("0.0.0.0", "::"), ("127.0.0.1", "::1")),
        ("0.0.0.0", ("0.0.0.0",), ("127.0.0.1",)),
        ("::1", ("::1",), ("::1",)),
        ("192.0.2.1", ("192.0.2.1",), ("192.0.2.1",)),
        ("box.lab", ("box.lab",), ("box.lab",)),
    ],
)
def test_what_a_host_stands_for(host: str, hosts: tuple[str, ...], reach: tuple[str, ...]) -> None:
    """``localhost`` and ``[::]`` mean both families, and who listens everywhere is reached at loopback."""
    assert (hosts, reach) == (Address(host, 1).hosts, Address(host, 1).reach)


@pytest.mark.parametrize(
    ("asked", "listening", "expected"),
    [
        ("localhost:1", "localhost:1", True),
        ("localhost:1", "127.0.0.1:1", True),
        ("localhost:1", "[::1]:1", True),
        ("localhost:1", "0.0.0.0:1", True),
        ("0.0.0.0:1", "localhost:1", True),
        ("[::1]:1", "[::]:1", True),
        ("[::1]:1", "0.0.0.0:1", False),
        ("127.0.0.1:1", "[::1]:1", False),
        ("127.0.0.1:1", "192.0.2.1:1", False),
        ("localhost:1", "localhost:2", False),
        ("localhost:0", "localhost:0", False),
        pytest.param("unix:/a", "unix:/a", True, marks=unix_only),
        pytest.param("unix:/a", "unix:/b", False, marks=unix_only),
        pytest.param("localhost:1", "unix:/b", False, marks=unix_only),
    ],
)
def test_who_asks_reaches_who_listens(asked: str, listening: str, expected: bool) -> None:  # noqa: FBT001 - a table
    """Whether ``health`` finds a proxy that listens elsewhere than it asks."""
    assert expected is parse_listen(asked)[0].is_reached_at(parse_listen(listening)[0])


def test_windows_has_no_unix_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the setting is refused with a way out, not with a traceback at start."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="does not have on Windows; listen on localhost:6387"):
        parse_listen("unix:/run/metquay.sock")


def test_reading_an_address_loads_nothing_slow() -> None:
    """``health`` has 60 ms in all."""
    code = "import sys, metquay_proxy.rules.address as a; a.parse_listen(a.DEFAULT_LISTEN); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603 - our words
    assert set() == {"ipaddress", "typing", "dataclasses", "socket"} & set(run.stdout.split())
