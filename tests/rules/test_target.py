from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import Target, TargetRules, split_authority

RULES = TargetRules("/api/v1", [("lab.metquay.co", 443), ("localhost", 6387)], pass_through=("/FlexicalERP/",))


@pytest.mark.parametrize(
    ("raw", "sent"),
    [
        ("/customers", "/api/v1/customers"),
        ("/api/v1/customers", "/api/v1/customers"),
        ("/api/v1/api/v1/customers", "/api/v1/customers"),
        ("//customers", "/api/v1/customers"),
        ("/api/v1//customers", "/api/v1/customers"),
        ("///api/v1///customers", "/api/v1/customers"),
        ("/customers//1", "/api/v1/customers//1"),
        ("/customers/", "/api/v1/customers/"),
        ("/", "/api/v1/"),
        ("/api/v1", "/api/v1"),
        ("/api/v1/", "/api/v1/"),
        ("/api/v1customers", "/api/v1/api/v1customers"),
        ("/API/V1/customers", "/api/v1/API/V1/customers"),
        ("/api/v1?first=0", "/api/v1?first=0"),
        ("/customers?", "/api/v1/customers?"),
        ("/customers??a", "/api/v1/customers??a"),
        ("/a%2Fb%2fc", "/api/v1/a%2Fb%2fc"),
        ("/%41%7E~;x=1+2", "/api/v1/%41%7E~;x=1+2"),
        ("/a?b=../..&c=http://x", "/api/v1/a?b=../..&c=http://x"),
        ("/a.b/...", "/api/v1/a.b/..."),
        ("/%zz%", "/api/v1/%zz%"),
        ('/[{|}]^"', '/api/v1/[{|}]^"'),
        ("/FlexicalERP/rest/x?y", "/FlexicalERP/rest/x?y"),
        ("//FlexicalERP/rest", "/FlexicalERP/rest"),
        ("/FlexicalERPx/rest", "/api/v1/FlexicalERPx/rest"),
        ("/api/v1/FlexicalERP/rest", "/api/v1/FlexicalERP/rest"),
        ("http://lab.metquay.co:443/api/v1/customers", "/api/v1/customers"),
        ("HTTPS://LAB.metquay.co/customers?x", "/api/v1/customers?x"),
        ("https://lab.metquay.co", "/api/v1/"),
        ("https://lab.metquay.co?x", "/api/v1/?x"),
        ("http://localhost:6387/customers", "/api/v1/customers"),
        ("https://lab.metquay.co./customers", "/api/v1/customers"),
        ("http://localhost.:6387/customers", "/api/v1/customers"),
    ],
)
def test_canonical_form(raw: str, sent: str) -> None:
    """A target reaches the base once, and is otherwise untouched."""
    assert sent == RULES.parse("GET", raw).sent


@pytest.mark.parametrize(
    "raw",
    [
        "/..",
        "/.",
        "/a/../b",
        "/api/v1/../x",
        "/api/v1/./x",
        "/%2e%2e/x",
        "/.%2E/x",
        "/%2E",
        "/..;a=b/x",
        "/%2e%2e;/x",
        "/%252e%252e/x",
        "/a%2F..%2Fb",
        "/a%5C..%5Cb",
        "/%" + "25" * 8 + "2e",
        "/%2525252525252525252525252541",
        "/FlexicalERP/../api/v1/x",
        "/FlexicalERP/%2e%2e/api/v1/x",
        "/a\\b",
        "/a?b\\c",
        "/a#b",
        "/a?b#c",
        "/a\x00",
        "/a\tb",
        "/a b",
        "/a\x7f",
        "/a\r\nX: y",
        "/a\xe9",
        "/a\udce9",
        "*",
        "",
        "customers",
        "http://evil.example/customers",
        "http://lab.metquay.co:8080/customers",
        "http://lab.metquay.co/customers",
        "https://user@lab.metquay.co/customers",
        "https://lab.metquay.co@evil.example/customers",
        "https://lab.metquay.co:443:443/customers",
        "https://lab.metquay.co:99999/customers",
        "https://lab.metquay.co:4x/customers",
        "https://lab.metquay.co\u2100/customers",
        "https:///customers",
        "https://./customers",
        "https://lab.metquay.co../customers",
        "https:/customers",
        "ftp://lab.metquay.co/customers",
        "lab.metquay.co:443",
    ],
)
def test_refused(raw: str) -> None:
    """What could leave the API's path or Metquay's host is refused with bad-target."""
    with pytest.raises(ProxyError) as caught:
        RULES.parse("GET", raw)
    assert (400, "bad-target", "no") == (caught.value.status, caught.value.slug, caught.value.sent)


def test_asterisk() -> None:
    """OPTIONS * asks about the server as a whole, in both of its forms, and no other method may."""
    assert "*" == RULES.parse("OPTIONS", "*").sent
    assert Target("*", "*", None, absolute=True) == RULES.parse("OPTIONS", "https://lab.metquay.co")
    assert "/api/v1/" == RULES.parse("OPTIONS", "https://lab.metquay.co/").sent


@pytest.mark.parametrize(
    ("raw", "own"),
    [
        ("/-/live", True),
        ("/api/v1/-/live", True),
        ("//-/", True),
        ("/authenticate", True),
        ("/api/v1/authenticate?x", True),
        ("/authenticate/", True),
        ("/authenticate;x=1", True),
        ("/%61uthenticate", True),
        ("/AUTHENTICATE", True),
        ("/authenticate%20", True),
        ("/authenticate%2f", True),
        ("/authenticate%00", True),
        ("/authenticated", False),
        ("/authenticate/x", False),
        ("/--/x", False),
        ("/-x", False),
        ("/x/-/", False),
        ("/FlexicalERP", True),
        ("/flexicalerp/x", True),
        ("/%46lexicalERP/x", True),
        ("/FlexicalERPs/x", False),
        ("/FlexicalERP/x", False),
        ("/api/v1/FlexicalERP/x", True),
    ],
)
def test_own(raw: str, own: bool) -> None:  # noqa: FBT001 - a column of the table
    """What the proxy answers itself is told by the canonical path, also in a spelling that a server may read as it is.

    The older interface is, unless it passes through.
    """
    target = RULES.parse("GET", raw)
    assert (own, False) == (target.own, target.unasked)
    assert "FlexicalERP/" not in raw or TargetRules("/api/v1", []).parse("GET", raw).own


@pytest.mark.parametrize(
    ("raw", "unasked"),
    [
        ("/", True),
        ("/?utm=1", True),
        ("//", True),
        ("/api/v1", True),
        ("/api/v1/", True),
        ("http://localhost:6387/", True),
        ("https://lab.metquay.co", True),
        ("/-", True),
        ("/favicon.ico", True),
        ("/robots.txt", True),
        ("/apple-touch-icon.png", True),
        ("/apple-touch-icon-120x120-precomposed.png", True),
        ("/.well-known/appspecific/com.chrome.devtools.json", True),
        ("/.well-known", False),
        ("/favicon.ico/", False),
        ("/favicon_ico", False),
        ("/x/favicon.ico", False),
        ("/Robots.txt", False),
        ("/customers", False),
    ],
)
def test_what_browsers_ask_for_by_themselves(raw: str, unasked: bool) -> None:  # noqa: FBT001 - a column of the table
    """These never go upstream, in whatever form they are asked for; the API's root is one of them."""
    target = RULES.parse("GET", raw)
    assert (unasked, unasked) == (target.own, target.unasked)


def test_a_path_that_is_passed_through_is_asked_for() -> None:
    """Where the settings send such a path to the server, it needs a client key like any other."""
    target = TargetRules("/api/v1", [], pass_through=("/.well-known/",)).parse("GET", "/.well-known/x")
    assert (True, False, False) == (target.pass_through, target.own, target.unasked)


def test_fields() -> None:
    """Local path, query and form are told apart."""
    assert Target("/api/v1/customers?a=1", "/customers", "a=1") == RULES.parse("GET", "/api/v1/customers?a=1")
    assert Target("/api/v1/x?", "/x", "") == RULES.parse("GET", "/x?")
    assert Target("/FlexicalERP/x", "/FlexicalERP/x", None, pass_through=True) == RULES.parse("GET", "/FlexicalERP/x")
    assert RULES.parse("GET", "https://lab.metquay.co/x").absolute


def test_longer_base() -> None:
    """A base with a path of its own takes both spellings of the local path."""
    rules = TargetRules("/metquay/api/v1", [])
    for raw in ("/x", "/api/v1/x", "/metquay/api/v1/x", "/metquay/api/v1//x"):
        assert "/metquay/api/v1/x" == rules.parse("GET", raw).sent


@pytest.mark.parametrize(
    ("authority", "split"),
    [
        ("Lab.metquay.co", ("lab.metquay.co", 443)),
        ("lab:", ("lab", 443)),
        ("[::1]:6387", ("::1", 6387)),
        ("[::1]", ("::1", 443)),
        ("::1", None),
        (":80", None),
        ("a@b", None),
        ("a:-1", None),
        ("a:\u0661", None),
    ],
)
def test_split_authority(authority: str, split: tuple[str, int] | None) -> None:
    """Host and port of an authority."""
    assert split == split_authority(authority, "https")


@given(st.text(alphabet="/.%2eE;abv1pi-?#\\", max_size=40))
def test_canonical_is_idempotent_and_stays_below(path: str) -> None:
    """Whatever is accepted stays below the prefix, and its canonical form is a fixed point."""
    try:
        target = RULES.parse("GET", "/" + path)
    except ProxyError:
        return
    assert target.sent.startswith("/api/v1")
    assert target == RULES.parse("GET", target.sent)


def test_few_targets_are_remembered() -> None:
    """However many paths are asked for, long ones among them, each is judged right, and memory stays bounded."""
    rules = TargetRules("/api/v1", [])
    paths = [f"/works/{number}" for number in range(1000)] + [f"/works/{number}{'x' * 2000}" for number in range(3)]
    for path in [*paths, *paths]:
        assert f"/api/v1{path}" == rules.parse("GET", path).sent
    assert len(rules._remembered) <= 256
    assert max(map(len, rules._remembered)) <= 1024
    with pytest.raises(ProxyError):
        rules.parse("GET", "/works/../1")
    assert "/works/../1" not in rules._remembered
