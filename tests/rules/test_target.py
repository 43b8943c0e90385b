from __future__ import annotations

import time
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import BaseURL, Target, TargetRules, is_loopback, rewrite_location, split_authority

BASE = BaseURL.parse("lab.metquay.co")
ORIGIN = b"http://localhost:6387"
RULES = TargetRules("/api/v1", [("lab.metquay.co", 443), ("localhost", 6387)], pass_through=("/FlexicalERP/",))


@pytest.mark.parametrize(
    ("raw", "sent"),
    [
        *[
            (raw, "/api/v1/customers")
            for raw in (
                *("/customers", "/api/v1/customers", "/api/v1/api/v1/customers"),
                *("//customers", "/api/v1//customers", "///api/v1///customers"),
                *("http://lab.metquay.co:443/api/v1/customers", "https://lab.metquay.co./customers"),
                *("http://localhost:6387/customers", "http://localhost.:6387/customers"),
            )
        ],
        *[
            (raw, f"/api/v1{raw}")
            for raw in (
                *("/", "/customers/", "/customers//1", "/customers?", "/customers??a"),
                *("/a?b=../..&c=http://x", "/a.b/..."),
                *("/a%2Fb%2fc", "/%41%7E~;x=1+2", "/%zz%", '/[{|}]^"'),
                *("/api/v1customers", "/API/V1/customers", "/FlexicalERPx/rest"),
            )
        ],
        *[(raw, raw) for raw in ("/api/v1", "/api/v1/", "/api/v1?first=0", "/FlexicalERP/rest/x?y")],
        ("/api/v1/FlexicalERP/rest", "/api/v1/FlexicalERP/rest"),
        ("//FlexicalERP/rest", "/FlexicalERP/rest"),
        ("HTTPS://LAB.metquay.co/customers?x", "/api/v1/customers?x"),
        *[("https://lab.metquay.co", "/api/v1/"), ("https://lab.metquay.co?x", "/api/v1/?x")],
    ],
)
def test_canonical_form(raw: str, sent: str) -> None:
    """A target reaches the base once, and is otherwise untouched."""
    assert sent == RULES.parse("GET", raw).sent


@pytest.mark.parametrize(
    "raw",
    [
        *("/..", "/.", "/a/../b", "/api/v1/../x", "/api/v1/./x"),
        *("/FlexicalERP/../api/v1/x", "/FlexicalERP/%2e%2e/api/v1/x"),
        *["/%2e%2e/x", "/.%2E/x", "/%2E", "/..;a=b/x", "/%2e%2e;/x", "/%252e%252e/x", "/a%2F..%2Fb", "/a%5C..%5Cb"],
        *("/%" + "25" * 8 + "2e", "/%2525252525252525252525252541"),
        *("/a\\b", "/a?b\\c", "/a#b", "/a?b#c", "/a\xe9", "/a\udce9"),
        *("/a\x00", "/a\tb", "/a b", "/a\x7f", "/a\r\nX: y"),
        *("*", "", "customers", "lab.metquay.co:443", "http://evil.example/customers"),
        *("http://lab.metquay.co:8080/customers", "http://lab.metquay.co/customers"),
        *("https:///customers", "https://./customers", "https:/customers", "ftp://lab.metquay.co/customers"),
        "https://user@lab.metquay.co/customers",
        *(
            f"https://lab.metquay.co{more}/customers"
            for more in ("@evil.example", ":443:443", ":99999", ":4x", "\u2100", "..")
        ),
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
    assert Target("*", "*", None, absolute=True, path="*") == RULES.parse("OPTIONS", "https://lab.metquay.co")
    assert "/api/v1/" == RULES.parse("OPTIONS", "https://lab.metquay.co/").sent


@pytest.mark.parametrize(
    ("own", "raws"),
    [
        (True, "/-/live /api/v1/-/live //-/ /FlexicalERP /flexicalerp/x /%46lexicalERP/x /api/v1/FlexicalERP/x"),
        (True, "/authenticate /api/v1/authenticate?x /authenticate/ /authenticate;x=1 /%61uthenticate /AUTHENTICATE"),
        (True, "/authenticate%20 /authenticate%2f /authenticate%00"),
        (False, "/authenticated /authenticate/x /--/x /-x /x/-/ /FlexicalERPs/x /FlexicalERP/x"),
    ],
)
def test_own(own: bool, raws: str) -> None:  # noqa: FBT001 - a column of the table
    """What the proxy answers itself is told by the canonical path, also in a spelling that a server may read as it is.

    The older interface is, unless it passes through.
    """
    for raw in raws.split():
        target = RULES.parse("GET", raw)
        assert (own, False) == (target.own, target.unasked), raw
        assert "FlexicalERP/" not in raw or TargetRules("/api/v1", []).parse("GET", raw).own


@pytest.mark.parametrize(
    ("unasked", "raws"),
    [
        (
            True,
            "/ /?utm=1 // /api/v1 /api/v1/ http://localhost:6387/ https://lab.metquay.co /- /favicon.ico /robots.txt",
        ),
        (True, "/apple-touch-icon.png /apple-touch-icon-120x120-precomposed.png"),
        (True, "/.well-known/appspecific/com.chrome.devtools.json"),
        (False, "/.well-known /favicon.ico/ /favicon_ico /x/favicon.ico /Robots.txt /customers"),
    ],
)
def test_what_browsers_ask_for_by_themselves(unasked: bool, raws: str) -> None:  # noqa: FBT001 - a column of the table
    """These never go upstream, in whatever form they are asked for; the API's root is one of them."""
    for raw in raws.split():
        target = RULES.parse("GET", raw)
        assert (unasked, unasked) == (target.own, target.unasked), raw


def test_a_path_that_is_passed_through_is_asked_for() -> None:
    """Where the settings send such a path to the server, it needs a client key like any other."""
    target = TargetRules("/api/v1", [], pass_through=("/.well-known/",)).parse("GET", "/.well-known/x")
    assert (True, False, False) == (target.pass_through, target.own, target.unasked)


def test_fields() -> None:
    """Local path, query and form are told apart."""
    sent = "/api/v1/customers?a=1"
    assert Target(sent, "/customers", "a=1", path=sent) == RULES.parse("GET", sent)
    assert Target("/api/v1/x?", "/x", "", path="/api/v1/x?") == RULES.parse("GET", "/x?")
    older = "/FlexicalERP/x"
    assert Target(older, older, None, pass_through=True, path=older) == RULES.parse("GET", older)
    assert RULES.parse("GET", "https://lab.metquay.co/x").absolute


@pytest.mark.parametrize("query", ["", "x" * 2000])
def test_what_people_are_told(query: str) -> None:
    """What was sent, or the proxy's own path; never more than 1,024 characters of it, since a client chooses it."""
    for raw, path in (("/x?", "/api/v1/x?"), ("/-/live?", "/-/live"), ("/authenticate?", "/authenticate")):
        told = RULES.parse("GET", raw + query).path
        assert (path + query * ("?" in path))[:1024] == told


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
    """However many paths are asked for, long ones among them, each is judged right; of long ones none is kept."""
    rules = TargetRules("/api/v1", [])
    paths = [f"/works/{number}" for number in range(1000)] + [f"/works/{number}{'x' * 2000}" for number in range(3)]
    for path in [*paths, *paths]:
        assert f"/api/v1{path}" == rules.parse("GET", path).sent
    assert [False, True] == [rules.parse("GET", path) is rules.parse("GET", path) for path in (paths[-1], "/works/1")]
    for _ in range(2):
        with pytest.raises(ProxyError):
            rules.parse("GET", "/works/../1")


class TestBaseURL:
    @pytest.mark.parametrize(
        ("text", "base"),
        [
            *[
                (text, BaseURL("https", "lab.metquay.co", 443, "/api/v1"))
                for text in (
                    *(
                        "lab.metquay.co",
                        "  lab.metquay.co\n",
                        "LAB.Metquay.CO",
                        "lab.metquay.co/",
                        "HTTPS://lab.metquay.co",
                    ),
                    *("https://lab.metquay.co/api/v1", "https://lab.metquay.co/api/v1//"),
                )
            ],
            ("lab.metquay.co:8443", BaseURL("https", "lab.metquay.co", 8443, "/api/v1")),
            ("lab.metquay.co.", BaseURL("https", "lab.metquay.co", 443, "/api/v1", rooted=True)),
            ("https://LAB.metquay.co.:8443/", BaseURL("https", "lab.metquay.co", 8443, "/api/v1", rooted=True)),
            ("http://localhost.:4010", BaseURL("http", "localhost", 4010, "/api/v1")),
            ("192.0.2.1.", BaseURL("https", "192.0.2.1", 443, "/api/v1")),
            ("metquay_1", BaseURL("https", "metquay_1", 443, "/api/v1")),
            ("https://lab.metquay.co//metquay//api/v2", BaseURL("https", "lab.metquay.co", 443, "/metquay/api/v2")),
            ("https://m\u00fcller.example", BaseURL("https", "xn--mller-kva.example", 443, "/api/v1")),
            ("https://192.0.2.1", BaseURL("https", "192.0.2.1", 443, "/api/v1")),
            ("https://[2001:DB8:0::1]:8443/x", BaseURL("https", "2001:db8::1", 8443, "/x")),
            ("http://localhost:4010", BaseURL("http", "localhost", 4010, "/api/v1")),
            ("http://127.0.0.2", BaseURL("http", "127.0.0.2", 80, "/api/v1")),
            ("http://[::1]/", BaseURL("http", "::1", 80, "/api/v1")),
        ],
    )
    def test_accepted(self, text: str, base: BaseURL) -> None:
        """A bare host is https; no path, or a slash, is the API's usual one."""
        assert base == BaseURL.parse(text)

    def test_a_final_dot_is_for_the_look_up_alone(self) -> None:
        """It means an absolute name to a name server, and the same host to everybody else."""
        base = BaseURL.parse("lab.metquay.co.")
        assert ("lab.metquay.co.", "lab.metquay.co") == (base.name, base.authority)
        assert "https://lab.metquay.co/api/v1" == str(base)
        assert {("lab.metquay.co", 443), ("lab.metquay.co", 80)} == BASE.authorities == base.authorities
        assert {("lab.metquay.co", 8443)} == BaseURL.parse("lab.metquay.co:8443").authorities
        assert "lab.metquay.co" == BaseURL.parse("lab.metquay.co").name

    @pytest.mark.parametrize(
        ("why", "texts"),
        [
            ("needs a host name", ["", "https://", "https:///api/v1", ":443", "2001:db8::1", "https:/lab.metquay.co"]),
            ("needs a host name", ["lab.metquay.co:0", "lab.metquay.co:65536", "lab.metquay.co:https"]),
            ("not a valid address", ["https://[::1", "https://lab\u2100.example"]),
            ("not a valid address|IPv6", ["https://[::g]"]),
            ("IPv6", ["https://[v1.a:b]"]),
            ("begins with https://", ["ftp://lab.metquay.co", "://lab.metquay.co"]),
            ("user name or password", ["https://user:hunter2@lab.metquay.co", "hunter2@lab.metquay.co"]),
            ("question mark", ["lab.metquay.co?x", "https://lab.metquay.co/api/v1#top"]),
            ("characters", ["https://lab metquay.co", "https://lab\\evil.example", "https://-lab.metquay.co"]),
            ("characters", ["https://lab..metquay.co", "https://*.metquay.co", "https://" + "a" * 64 + ".co"]),
            ("path", [f"https://lab.metquay.co/{path}" for path in ("api/../v1", "api/./v1", "api%2Fv1", "a b")]),
            (
                "clear-text|http://",
                [f"http://{host}" for host in ("lab.metquay.co", "10.0.0.1", "localhost.evil.example")],
            ),
        ],
    )
    def test_refused(self, why: str, texts: list[str]) -> None:
        """What is no plain https address is refused with a text for people, which never repeats a password."""
        for text in texts:
            with pytest.raises(ValueError, match=why) as caught:
                BaseURL.parse(text)
            assert "hunter2" not in str(caught.value)
            assert str(caught.value).startswith(("it", "its", "the address", "http://"))

    @pytest.mark.parametrize(
        ("text", "authority"),
        [
            ("lab.metquay.co:443", "lab.metquay.co"),
            ("lab.metquay.co:80", "lab.metquay.co:80"),
            ("http://localhost:80", "localhost"),
            ("http://localhost:443", "localhost:443"),
            ("https://[2001:db8::1]", "[2001:db8::1]"),
            ("http://[::1]:4010", "[::1]:4010"),
        ],
    )
    def test_authority(self, text: str, authority: str) -> None:
        """Host holds the port only where it is not the scheme's own, and an IPv6 address in brackets."""
        assert authority == BaseURL.parse(text).authority

    @settings(deadline=None)
    @given(
        st.sampled_from(["lab.metquay.co", "localhost", "127.0.0.1", "[::1]", "m\u00fcller.example"]),
        st.sampled_from(["", ":80", ":443", ":8443"]),
        st.lists(st.text("aB9.~-:@", min_size=1, max_size=5).filter(lambda text: text not in {".", ".."}), max_size=3),
    )
    def test_the_written_form_means_the_same(self, host: str, port: str, segments: list[str]) -> None:
        """What people are shown can be given back as the setting."""
        base = BaseURL.parse(f"https://{host}{port}/{'/'.join(segments)}")
        assert base == BaseURL.parse(str(base))

    def test_is_loopback(self) -> None:
        """Only what no name server can point elsewhere is this machine."""
        assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.255.255.254", "::1")))
        others = ("0.0.0.0", "128.0.0.1", "localhost.evil.example", "127.0.0.1.nip.io", "0x7f.1", "")  # noqa: S104 - judged
        assert not any(map(is_loopback, others))


class TestLocation:
    @pytest.mark.parametrize(
        ("value", "path"),
        [
            *[
                (b"https://lab.metquay.co" + path, path)
                for path in (
                    *(b"/api/v1", b"/api/v1/", b"/api/v1?first=0", b"/api/v1#top", b"/api/v1/a?b=/../c#/../d"),
                    *(b"/api/v1/..a/b..", b"/api/v1//evil.example/x", b"/api/v1/%2F\xc3\xa9"),
                )
            ],
            (b"HTTPS://LAB.Metquay.CO:443/api/v1/a", b"/api/v1/a"),
            (b"https://lab.metquay.co:/api/v1/a", b"/api/v1/a"),
            (b"//lab.metquay.co/api/v1/a", b"/api/v1/a"),
            (b"https://lab.metquay.co./api/v1/a", b"/api/v1/a"),
            (b"//lab.metquay.co.:443/api/v1/a", b"/api/v1/a"),
        ],
    )
    def test_under_the_base(self, value: bytes, path: bytes) -> None:
        """Every spelling of the base's origin gets the client's own; path, query and fragment stay byte for byte."""
        for base in (BASE, BaseURL.parse("lab.metquay.co.")):
            assert ORIGIN + path == rewrite_location(value, base, ORIGIN)

    @pytest.mark.parametrize(
        "value",
        [
            *(b"", b"/api/v1/a", b"a", b"?first=0"),
            *[
                b"https://lab.metquay.co" + rest
                for rest in (
                    *(b"", b"/", b"/login", b"/api/v10", b"/API/v1/a", b"/FlexicalERP/a", b"?/api/v1/a", b"#/api/v1/a"),
                    *(b"/api/v1/../a", b"/api/v1/a/..", b"/api/v1/.", b"/api/v1/%2e%2E/a", b"/api/v1/.%2e;x/a"),
                    *(b"/api/v1/a\\..\\b", b":8443/api/v1/a", b":44 3/api/v1/a", b".evil.example/api/v1/a"),
                    *(b"../api/v1/a", b"@evil.example/api/v1/a", b"\\@evil.example/api/v1/a"),
                )
            ],
            b"https://evil.example/https://lab.metquay.co/api/v1/a",
            *(b"https://user@lab.metquay.co/api/v1/a", b"https://evil.example\\@lab.metquay.co/api/v1/a"),
            *(b"https://l\xe1b.metquay.co/api/v1/a", b"https:///lab.metquay.co/api/v1/a"),
            *(b"https:/lab.metquay.co/api/v1/a", b"///lab.metquay.co/api/v1/a", b"\\\\lab.metquay.co/api/v1/a"),
            *[start + b"://lab.metquay.co/api/v1/a" for start in (b"http", b" https", b"ftp", b"javascript")],
        ],
    )
    def test_any_other(self, value: bytes) -> None:
        """What is not certainly under the base is not touched."""
        assert value == rewrite_location(value, BASE, ORIGIN)

    def test_other_bases(self) -> None:
        """Port, scheme, path and address form of the base count."""
        base = BaseURL.parse("http://[::1]:4010/metquay/api")
        assert b"http://h/metquay/api/x" == rewrite_location(b"http://[::1]:4010/metquay/api/x", base, b"http://h")
        assert b"http://h/metquay/api/x" == rewrite_location(b"//[::1]:4010/metquay/api/x", base, b"http://h")
        for other in (b"http://[::1]/metquay/api/x", b"http://[::1]:4010/api/v1/x", b"https://[::1]:4010/metquay/api"):
            assert other == rewrite_location(other, base, b"http://h")

    @settings(deadline=None)
    @given(
        st.builds(
            lambda *parts: "".join(parts).encode("latin-1"),
            st.sampled_from(["https:", "http:", "HTTPS:", "", "x:"]),
            st.sampled_from(["//", "/", "\\\\", "///", ""]),
            st.sampled_from(["", "lab.metquay.co", "user@", "evil.example", "LAB.metquay.co", "[::1]"]),
            st.sampled_from(["", ":443", ":80", "@evil.example", ".evil.example", "\\"]),
            st.sampled_from(["", "/api/v1", "/api/v1/", "/api/v1x"]),
            st.text(st.characters(max_codepoint=255), max_size=12),
        )
        | st.binary(max_size=60)
    )
    @example(b"https://lab.metquay.co/api/v1/\n//evil.example")
    def test_never_another_host(self, value: bytes) -> None:
        """A Location is either untouched, or leads to the authority that the client used."""
        written = rewrite_location(value, BASE, ORIGIN)
        if written != value:
            assert written.startswith(ORIGIN + b"/api/v1")
            parts = urlsplit(written.decode("latin-1"))
            assert ("http", "localhost:6387") == (parts.scheme, parts.netloc)
            assert value.lower().startswith((b"https://lab.metquay.co", b"//lab.metquay.co"))

    def test_long_values_cost_linear_time(self) -> None:
        """A hostile Location of the largest size is read at once."""
        began = time.process_time()
        for filler in (b"/", b"%2e", b":", b"/.", b"a", b"//"):
            for prefix in (b"https://", b"https://lab.metquay.co/api/v1/", b"//"):
                rewrite_location(prefix + filler * 20_000 + b"\n", BASE, ORIGIN)
        assert time.process_time() - began < 1
