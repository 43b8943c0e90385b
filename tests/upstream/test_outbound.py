from __future__ import annotations

import os

import pytest

from metquay_proxy.rules.target import BaseURL
from metquay_proxy.upstream.dial import OutboundProxy
from metquay_proxy.upstream.outbound import DIRECT, goes_directly, parse_outbound_proxy, system_proxy

BASE = BaseURL.parse("lab.metquay.co")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://proxy.lab.example:3128", OutboundProxy("proxy.lab.example", 3128)),
        ("proxy.lab.example:3128", OutboundProxy("proxy.lab.example", 3128)),
        ("http://proxy.lab.example/", OutboundProxy("proxy.lab.example", 80)),
        ("http://[::1]:3128", OutboundProxy("::1", 3128)),
        ("http://jo%40lab:p%3Aw@proxy:1", OutboundProxy("proxy", 1, "jo@lab:p:w")),
        ("http://jo:a#b@proxy:1", OutboundProxy("proxy", 1, "jo:a#b")),
        ("http://jo:a@b@proxy:1", OutboundProxy("proxy", 1, "jo:a@b")),
        ("http://jo:a/b?c:d@proxy:1/", OutboundProxy("proxy", 1, "jo:a/b?c:d")),
        ("http://jo:a://b@proxy", OutboundProxy("proxy", 80, "jo:a://b")),
        ("http://jo:100%@proxy:1", OutboundProxy("proxy", 1, "jo:100%")),
        ("http://LAB\\jo: \u00fc[1]@[::1]:1", OutboundProxy("::1", 1, "LAB\\jo: \u00fc[1]")),
        ("jo@proxy:1", OutboundProxy("proxy", 1, "jo:")),
        ("HTTP://Proxy.Lab.Example.:1", OutboundProxy("proxy.lab.example.", 1)),
        *[(word, DIRECT) for word in ("none", "OFF", "direct", "no", "false")],
    ],
)
def test_an_address(text: str, expected: OutboundProxy) -> None:
    """User name and password are percent-decoded, and may hold what an address may not."""
    assert expected == parse_outbound_proxy(text)


@pytest.mark.parametrize(
    ("why", "texts"),
    [
        ("is a SOCKS proxy, which is not supported", ["socks5://u:hunter2@box", "SOCKS4A://u:hunter2#@box:1080/"]),
        ("is an https:// proxy", ["https://u:hunter2@box", "HTTPS://u:hunter2@box:443"]),
        (r"is a script \(PAC\) for browsers", ["http://hunter2/proxy.PAC", "http://wpad/wpad.dat"]),
        (
            "must be the address of an HTTP proxy",
            [
                *("http://u:hunter2@", "http://box:hunter2", "http://u:hunter2@box:99999", "http://u:hunter2@box:0"),
                *("ftp://u:hunter2@box", "http://box:1/?hunter2", "http://box:1/hunter2", "hunter2 hunter2"),
            ],
        ),
    ],
)
def test_an_address_that_cannot_be_used(why: str, texts: list[str]) -> None:
    """It is told what helps, and nothing of what was written."""
    for text in texts:
        with pytest.raises(ValueError, match=why) as caught:
            parse_outbound_proxy(text)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_the_systems_proxy(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The variables may be written in capitals or not; where NO_PROXY names the host it does not matter."""
    for known in list(os.environ):
        if known.upper().endswith("_PROXY"):
            monkeypatch.delenv(known)
    assert system_proxy(BASE) is None
    monkeypatch.setenv(name, "http://u:p#w@proxy:3128/")
    assert OutboundProxy("proxy", 3128, "u:p#w") == system_proxy(BASE)
    monkeypatch.setenv(name, "socks5h://proxy:1080")
    with pytest.raises(ValueError, match="SOCKS"):
        system_proxy(BASE)
    monkeypatch.setenv("no_proxy", "metquay.co")
    assert system_proxy(BASE) is None


LAB = "lab.metquay.co"


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "expected"),
    [
        *[(name, LAB, 443, True) for name in (LAB, "metquay.co", ".metquay.co", "*.metquay.co", "METQUAY.co.", "*")],
        *[(name, LAB, 8443, expected) for name, expected in (("*.metquay.co:8443", True), (f"{LAB}:443", False))],
        *[
            (name, LAB, 443, True)
            for name in (
                f"{LAB}:443",
                "localhost, *",
                "localhost,127.0.0.1 ,\t.metquay.co",
                "localhost 127.0.0.1 metquay.co",
            )
        ],
        *[(name, "10.1.2.3", 443, True) for name in ("10.0.0.0/8", "10.1.2.3", "10.1.2.3:443")],
        *[("10.0.0.0/8", "11.1.2.3", 443, False), ("10.1.2.3:8443", "10.1.2.3", 443, False)],
        ("10.1.2.0/24", LAB, 443, False),
        ("2001:db8::/32", "2001:db8::1", 443, True),
        ("2001:DB8:0::1", "2001:db8::1", 443, True),
        ("[2001:db8::1]", "2001:db8::1", 443, True),
        ("[2001:db8::1]:443", "2001:db8::1", 443, True),
        ("[2001:db8::1]:8443", "2001:db8::1", 443, False),
        *[(name, LAB, 443, False) for name in ("", ",, ", "quay.co", f"x{LAB}", f"{LAB}.evil.example")],
        *[(name, LAB, 443, False) for name in (f"http://{LAB}", "lab.*.co")],
    ],
)
def test_no_proxy(no_proxy: str, host: str, port: int, *, expected: bool) -> None:
    """NO_PROXY is read as curl and Go read it."""
    assert expected is goes_directly(no_proxy, host, port)
