from __future__ import annotations

import base64
import hmac
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metquay_proxy.rules import gate
from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.gate import PLACEHOLDER_LIFETIME, Admission, ClientKey, Gate
from metquay_proxy.rules.headers import RequestHead
from metquay_proxy.rules.target import TargetRules

NOW = 1_800_000_000.0
HOST = "localhost:6387"
TOOLS = "https://tools.lab.example"

WRITER = "k-writer-0123456789:~"
READER = "k-reader-0123456789"
KEYS = (
    ClientKey.of("writer", WRITER),
    ClientKey.of("reader", READER, read_only=True),
    ClientKey.of("other", "k-other-0123456789"),
)
RULES = TargetRules("/api/v1", {("lab.metquay.co", 443), ("lab.metquay.co", 80)}, pass_through=("/FlexicalERP/",))

OPEN = Gate(
    upstream_host="lab.metquay.co",
    allowed_hosts=("proxy.lab.example",),
    allowed_origins=(TOOLS, "http://localhost:3000"),
)
PRIVATE = Gate(upstream_host="lab.metquay.co")
GUARDED = Gate(upstream_host="lab.metquay.co", keys=KEYS, allowed_origins=(TOOLS,))
READING = Gate(upstream_host="lab.metquay.co", read_only=True)
GUARDED_READING = Gate(upstream_host="lab.metquay.co", keys=KEYS, read_only=True)

Fields = dict[str, str]

WRITES = ["POST", "PUT", "PATCH", "DELETE", "MKCOL", "LOCK"]
READS = ["GET", "HEAD", "OPTIONS"]


def head_of(fields: Fields | list[tuple[str, str]]) -> RequestHead:
    """Return a head, values in latin-1 as the parser gives them."""
    pairs = fields.items() if isinstance(fields, dict) else fields
    return RequestHead([(name.encode(), value.encode("latin-1")) for name, value in pairs])


def admit(
    judge: Gate,
    fields: Fields | list[tuple[str, str]],
    method: str = "GET",
    path: str = "/customers",
    now: float = NOW,
) -> Admission:
    """Let the gate judge one request; ``Host: localhost:6387`` where ``fields`` name none."""
    if isinstance(fields, dict):
        fields = {"Host": HOST} | fields
    return judge.check(method, RULES.parse(method, path), head_of(fields), now)


def verdict(
    judge: Gate,
    fields: Fields | list[tuple[str, str]],
    method: str = "GET",
    path: str = "/customers",
    now: float = NOW,
) -> str:
    """Return the slug of the refusal, or ``admitted``."""
    try:
        admit(judge, fields, method, path, now)
    except ProxyError as error:
        return error.slug if error.sent == "no" else "refused, but sent"
    return "admitted"


def basic(password: str, user: str = "anyone") -> str:
    """Return Basic credentials."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class TestHost:
    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "localhost:6387",
            "LOCALHOST:6387",
            "localhost:",
            "localhost.",
            "localhost.:6387",
            "app.localhost",
            "a.b.LocalHost:1",
            "app.localhost.",
            "127.0.0.1",
            "127.0.0.1:6387",
            "127.0.0.1.",
            "192.168.1.20:6387",
            "0.0.0.0:6387",
            "[::1]",
            "[::1]:6387",
            "[::ffff:127.0.0.1]",
            "[::FFFF:127.0.0.1]:6387",
            "[fe80::1%eth0]:6387",
            "[fe80::1%25eth0]",
            "metquay-proxy",
            "metquay_proxy:6387",
            "2130706433",
            "proxy1",
            "proxy.lab.example",
            "PROXY.lab.example:6387",
            "proxy.lab.example.",
        ],
    )
    def test_known(self, host: str) -> None:
        """An address, a name that nobody can register, and a listed name are asked for by tools."""
        assert "admitted" == verdict(OPEN, {"Host": host})

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:6387",
            "localhost.evil.example",
            "localhost.evil.example.",
            "evil.localhost.example",
            "evillocalhost.example",
            "127.0.0.1.nip.io",
            "127-0-0-1.nip.io",
            "127.0.0.1.evil.example:6387",
            "0x7f.1",
            "0x7f.0.0.1",
            "127.1",
            "127.0.0.256",
            "127.0.0.01",
            "127.0.0.1..",
            "sub.proxy.lab.example",
            "proxy.lab.example.evil.example",
            "evilproxy.lab.example",
            "ai.",
            ".",
            "..",
            "",
            ":6387",
            "lab.metquay.co",
            "::1",
            "[::1",
            "[]",
            "[::1]x",
            "[::1]evil.example",
            "[::g]",
            "[1:2]",
            "[1:2.localhost]",
            "[fe80::1%]",
            "[fe80::1%a/b]",
            "localhost:port",
            "localhost:-1",
            "localhost:65536",
            "localhost:80:80",
            "localhost:80evil.example",
            "localhost@evil.example",
            "evil.example@localhost",
            "user:password@localhost",
            "localhost/evil.example",
            "localhost\\evil.example",
            "localhost#.evil.example",
            "localhost?x",
            "localhost,evil.example",
            "localhost evil.example",
            "local%68ost",
            "http://localhost",
            "localhost\x00",
            "localhost\x00.evil.example",
            "localhost\t",
            "l\xf6calhost",
            "127.0.0.\xb2",
            "*",
        ],
    )
    def test_unknown(self, host: str) -> None:
        """A name that somebody else can point at this machine, and what is no host at all, is refused."""
        assert "host-not-allowed" == verdict(OPEN, {"Host": host})

    def test_the_upstreams_own_name(self) -> None:
        """Metquay's name is that of an absolute-form target only: a tool may use us as its HTTP proxy."""
        for host in ("lab.metquay.co", "LAB.metquay.co.", "lab.metquay.co:443", "localhost"):
            assert "admitted" == verdict(OPEN, {"Host": host}, path="http://lab.metquay.co/api/v1/customers")
        assert "host-not-allowed" == verdict(OPEN, {"Host": "lab.metquay.co"})
        assert "host-not-allowed" == verdict(OPEN, {"Host": "evil.example"}, path="http://lab.metquay.co/customers")

    def test_a_dotless_name_has_no_final_dot(self) -> None:
        """A name with one may be a top-level domain's own."""
        assert "admitted" == verdict(OPEN, {"Host": "box:6387"})
        assert "host-not-allowed" == verdict(OPEN, {"Host": "box.:6387"})
        assert "admitted" == verdict(OPEN, {"Host": "localhost.:6387"})

    def test_two_hosts(self) -> None:
        """Nobody chooses between two hosts."""
        assert "host-not-allowed" == verdict(OPEN, [("Host", HOST), ("host", HOST)])

    def test_no_host(self) -> None:
        """HTTP/1.0 has none, and no browser speaks it."""
        assert "admitted" == verdict(OPEN, [])

    @pytest.mark.parametrize("path", ["/-/live", "/-/ready", "/-/", "/-/status", "/authenticate", "/FlexicalERP/x"])
    def test_every_path(self, path: str) -> None:
        """A rebound name is refused on the proxy's own pages too, probes included, before any key is looked at."""
        for method in ("GET", "POST"):
            assert "host-not-allowed" == verdict(GUARDED, {"Host": "evil.example", "X-Proxy-Key": WRITER}, method, path)


class TestOrigin:
    @pytest.mark.parametrize(
        ("host", "origin"),
        [
            (HOST, "http://localhost:6387"),
            ("LOCALHOST:6387", "http://localhost:6387"),
            ("127.0.0.1:6387", "http://127.0.0.1:6387"),
            ("[::1]:6387", "http://[::1]:6387"),
            ("metquay-proxy", "http://metquay-proxy"),
            (HOST, TOOLS),
            (HOST, "http://localhost:3000"),
        ],
    )
    @pytest.mark.parametrize("site", [None, "same-origin", "cross-site"])
    def test_own_or_listed(self, host: str, origin: str, site: str | None) -> None:
        """Our own pages and the listed ones may use the proxy; the origin decides alone."""
        fields = {"Host": host, "Origin": origin} | ({} if site is None else {"Sec-Fetch-Site": site})
        assert "admitted" == verdict(OPEN, fields, "POST")

    @pytest.mark.parametrize(
        "origin",
        [
            "null",
            "",
            "*",
            "localhost:6387",
            "https://localhost:6387",
            "http://localhost",
            "http://localhost:63870",
            "http://localhost:6387/",
            "http://localhost:6387.evil.example",
            "http://localhost:6387@evil.example",
            "http://evil.example:6387",
            "http://127.0.0.1:6387",
            "HTTP://LOCALHOST:6387",
            "http://LOCALHOST:6387",
            "http://localhost:6387 http://evil.example",
            "http://localhost:6387,http://evil.example",
            "http://evil.example http://localhost:6387",
            "https://tools.lab.example:443",
            "https://tools.lab.example:8443",
            "https://tools.lab.example/",
            "https://tools.lab.example.",
            "https://tools.lab.example.evil.example",
            "https://evil-tools.lab.example",
            "https://x.tools.lab.example",
            "http://tools.lab.example",
            "https://TOOLS.lab.example",
            "https://tools.lab.exampl\xe9",
            "chrome-extension://tools.lab.example",
            "file://",
        ],
    )
    def test_foreign(self, origin: str) -> None:
        """Any other is refused, near misses included, and no Sec-Fetch-Site makes up for it."""
        for extra in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
            for method in ("GET", "POST", "OPTIONS"):
                assert "origin-not-allowed" == verdict(OPEN, {"Origin": origin} | extra, method)

    def test_two_origins(self) -> None:
        """Nobody chooses between two origins."""
        fields = [("Host", HOST), ("Origin", TOOLS), ("Origin", TOOLS), ("Sec-Fetch-Site", "same-origin")]
        assert "origin-not-allowed" == verdict(OPEN, fields)

    def test_no_host_no_own_origin(self) -> None:
        """Without a Host there is no origin of our own."""
        for origin in ("http://localhost:6387", "http://none", "http://"):
            assert "origin-not-allowed" == verdict(PRIVATE, [("Origin", origin)])

    def test_https(self) -> None:
        """Where the proxy serves TLS, its own pages have an https origin, and only those."""
        judge = Gate(upstream_host="lab.metquay.co", scheme="https")
        assert "admitted" == verdict(judge, {"Origin": "https://localhost:6387"})
        assert "origin-not-allowed" == verdict(judge, {"Origin": "http://localhost:6387"})

    def test_a_rebound_page_is_not_its_own_origin(self) -> None:
        """After DNS rebinding Origin and Host agree, which is why Host is judged first."""
        fields = {"Host": "evil.example:6387", "Origin": "http://evil.example:6387", "Sec-Fetch-Site": "same-origin"}
        assert "host-not-allowed" == verdict(OPEN, fields)

    @pytest.mark.parametrize("path", ["/-/live", "/-/", "/-/quit", "/authenticate", "/FlexicalERP/x"])
    def test_every_path(self, path: str) -> None:
        """A foreign page may not even ask whether the proxy lives, with whatever key."""
        fields = {"Origin": "https://evil.example", "X-Proxy-Key": WRITER}
        for method in ("GET", "POST"):
            assert "origin-not-allowed" == verdict(GUARDED, fields, method, path)

    def test_the_text_says_what_to_do(self) -> None:
        """Whoever owns the page learns which setting lets it in."""
        with pytest.raises(ProxyError, match="METQUAY_ALLOWED_ORIGINS"):
            admit(OPEN, {"Origin": "https://evil.example"})
        with pytest.raises(ProxyError, match="METQUAY_ALLOWED_HOSTS"):
            admit(OPEN, {"Host": "evil.example"})


NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


class TestReferer:
    """What tells a page where its browser says nothing else: under plain http and a name that is not localhost."""

    HOST = "metquay-proxy:6387"

    @pytest.mark.parametrize(
        "referer", ["http://metquay-proxy:6387/-/", "http://METQUAY-PROXY:6387", f"{TOOLS}/a?b", ""]
    )
    def test_own_or_listed(self, referer: str) -> None:
        """Our own pages and the listed ones may use the proxy, and so may who has none."""
        assert "admitted" == verdict(OPEN, {"Host": self.HOST, "Referer": referer})

    @pytest.mark.parametrize(
        "referer",
        [
            "http://evil.example/",
            "https://metquay-proxy:6387/",
            "http://metquay-proxy:6387.evil.example/",
            "http://metquay-proxy:6388/",
            "//metquay-proxy:6387/",
            "about:client",
            "\xe9",
        ],
    )
    @pytest.mark.parametrize("path", ["/customers", "/-/status", "/-/", "/-/live"])
    def test_foreign(self, referer: str, path: str) -> None:
        """Any other is a foreign page's, on every path."""
        assert "origin-not-allowed" == verdict(OPEN, {"Host": self.HOST, "Referer": referer}, path=path)

    def test_two(self) -> None:
        """Nobody may choose between two."""
        own = ("Referer", f"http://{self.HOST}/")
        assert "origin-not-allowed" == verdict(OPEN, [("Host", self.HOST), own, own])

    def test_what_the_browser_says_counts_more(self) -> None:
        """A link to the status page carries the address of the page that it stands on."""
        fields = {"Referer": "http://intranet.example/", "Sec-Fetch-Site": "cross-site"} | NAVIGATION
        assert "admitted" == verdict(OPEN, fields, path="/-/")
        assert "admitted" == verdict(OPEN, {"Referer": "http://intranet.example/", "Origin": TOOLS})


class TestFetchMetadata:
    @pytest.mark.parametrize("site", ["same-origin", "none"])
    def test_own_pages_and_typed_addresses(self, site: str) -> None:
        """What our own page asks for, and what a person typed, is admitted everywhere."""
        for path in ("/customers", "/-/", "/-/status"):
            assert "admitted" == verdict(OPEN, {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors"}, path=path)

    @pytest.mark.parametrize(
        "site", ["cross-site", "same-site", "", "Same-Origin", "same-origin;x", "\xe9", "none, none"]
    )
    def test_other_pages(self, site: str) -> None:
        """Any other value is a foreign page's, same-site included: every port of localhost is one site."""
        for extra in ({}, NAVIGATION, {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}):
            fields = {"Sec-Fetch-Site": site} | extra
            for method in ("GET", "HEAD", "POST"):
                assert "origin-not-allowed" == verdict(OPEN, fields, method)
            assert "origin-not-allowed" == verdict(OPEN, fields, path="/-/status")

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    def test_a_link_to_the_status_page(self, site: str) -> None:
        """The status page may be opened from anywhere, as a page of its own."""
        for path in ("/-/", "/-/?x=1", "/api/v1/-/", "/", "/-"):
            assert "admitted" == verdict(OPEN, {"Sec-Fetch-Site": site} | NAVIGATION, path=path)
        assert "origin-not-allowed" == verdict(OPEN, {"Sec-Fetch-Site": site} | NAVIGATION, path="/favicon.ico")

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"Sec-Fetch-Mode": "navigate"},
            {"Sec-Fetch-Dest": "document"},
            {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
            {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "frame"},
            {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "object"},
            {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "Document"},
            {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "document"},
            {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"},
        ],
    )
    def test_the_status_page_in_a_foreign_page(self, fields: Fields) -> None:
        """It may neither be framed nor fetched by another page."""
        assert "origin-not-allowed" == verdict(OPEN, {"Sec-Fetch-Site": "cross-site"} | fields, path="/-/")

    @pytest.mark.parametrize("method", ["HEAD", "POST", "OPTIONS", "PUT"])
    def test_only_get_navigates(self, method: str) -> None:
        """A form of another page is no link."""
        assert "origin-not-allowed" == verdict(OPEN, {"Sec-Fetch-Site": "cross-site"} | NAVIGATION, method, "/-/")

    @pytest.mark.parametrize("name", ["Sec-Fetch-Mode", "Sec-Fetch-Dest"])
    def test_doubles(self, name: str) -> None:
        """Nobody chooses between two values."""
        fields = {"Sec-Fetch-Site": "cross-site"} | NAVIGATION
        assert "origin-not-allowed" == verdict(
            OPEN, [("Host", HOST), *fields.items(), (name, fields[name])], path="/-/"
        )
        twice = [("Host", HOST), ("Sec-Fetch-Site", "none"), ("Sec-Fetch-Site", "none")]
        assert "origin-not-allowed" == verdict(OPEN, twice)

    def test_tools_send_none(self) -> None:
        """No program but a browser sends these fields: an ordinary request may do everything, under no name."""
        admission = admit(OPEN, {}, "POST")
        assert (None, False, False) == (admission.client, admission.read_only, admission.preflight)


PREFLIGHT = {"Origin": TOOLS, "Access-Control-Request-Method": "DELETE"}
CORS = (
    ("Access-Control-Allow-Origin", TOOLS),
    ("Access-Control-Expose-Headers", "*"),
    ("Vary", "Origin"),
)


class TestCors:
    @pytest.mark.parametrize("path", ["/customers", "/-/status", "/-/quit", "*"])
    def test_a_listed_origins_preflight(self, path: str) -> None:
        """It is answered before the key check, since browsers send no key with it."""
        assert Admission(preflight=True) == admit(GUARDED, PREFLIGHT, "OPTIONS", path)

    @pytest.mark.parametrize("origin", ["http://localhost:6387", "https://evil.example", "null"])
    def test_any_others_preflight(self, origin: str) -> None:
        """A foreign page gets none, and our own needs none."""
        assert "admitted" != verdict(GUARDED, PREFLIGHT | {"Origin": origin}, "OPTIONS")
        if origin == "http://localhost:6387":
            assert Admission() == admit(OPEN, PREFLIGHT | {"Origin": origin}, "OPTIONS")

    def test_what_is_no_preflight(self) -> None:
        """Without the method that is asked for, or with another method than OPTIONS, it is a request like any other."""
        assert "client-key-required" == verdict(GUARDED, {"Origin": TOOLS}, "OPTIONS")
        assert "client-key-required" == verdict(GUARDED, PREFLIGHT, "GET")
        assert "client-key-required" == verdict(GUARDED, {"Access-Control-Request-Method": "PUT"}, "OPTIONS")

    def test_a_preflight_passes_no_rebound_host(self) -> None:
        """Host is judged first here too."""
        assert "host-not-allowed" == verdict(GUARDED, PREFLIGHT | {"Host": "evil.example"}, "OPTIONS")

    def test_the_fields(self) -> None:
        """A listed origin may read every answer, and caches learn that the answer is for that origin."""
        assert CORS == GUARDED.cors(head_of({"Origin": TOOLS}))

    @pytest.mark.parametrize(
        "fields",
        [
            [],
            [("Origin", "null")],
            [("Origin", "http://localhost:6387")],
            [("Origin", "https://evil.example")],
            [("Origin", TOOLS.upper())],
            [("Origin", TOOLS), ("Origin", TOOLS)],
        ],
    )
    def test_no_fields_for_others(self, fields: list[tuple[str, str]]) -> None:
        """No other page may read anything, and nothing is added for tools."""
        assert () == GUARDED.cors(head_of(fields))

    def test_nothing_is_listed_by_default(self) -> None:
        """Without the setting no origin gets CORS answers."""
        assert () == PRIVATE.cors(head_of({"Origin": TOOLS}))


def ways(key: str) -> list[Fields]:
    """Return every way to present a key."""
    placeholder = GUARDED.login(key, NOW)
    assert placeholder is not None
    return [
        {"X-Proxy-Key": key},
        {"Authorization": f"Bearer {key}"},
        {"Authorization": f"bearer  {key}"},
        {"Authorization": f"BEARER {key}"},
        {"Authorization": basic(key)},
        {"Authorization": basic(key, user="")},
        {"Authorization": basic(key).replace("Basic ", "BASIC  ")},
        {"Authorization": f"Bearer {placeholder}"},
        {"Authorization": basic(placeholder)},
        {"X-Proxy-Key": placeholder},
        {"X-Proxy-Key": "wrong", "Authorization": f"Bearer {key}"},
        {"X-Proxy-Key": key, "Authorization": "Bearer wrong"},
    ]


class TestKey:
    @pytest.mark.parametrize("fields", ways(WRITER), ids=str)
    def test_every_way_to_present_it(self, fields: Fields) -> None:
        """Header, bearer, Basic password and placeholder count alike, schemes in any case."""
        for path in ("/customers", "/-/", "/-/status", "/-/quit", "/authenticate", "/FlexicalERP/x"):
            assert Admission("writer") == admit(GUARDED, fields, "POST", path)

    def test_each_key_has_its_name(self) -> None:
        """The name of the key is the client's, for the log and the queue."""
        assert Admission("other") == admit(GUARDED, {"X-Proxy-Key": "k-other-0123456789"})
        assert Admission("reader", read_only=True) == admit(GUARDED, {"X-Proxy-Key": READER})

    def test_the_header_goes_first(self) -> None:
        """X-Proxy-Key is meant for us for certain."""
        fields = {"X-Proxy-Key": READER, "Authorization": f"Bearer {WRITER}"}
        assert Admission("reader", read_only=True) == admit(GUARDED, fields)

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"X-Proxy-Key": ""},
            {"X-Proxy-Key": WRITER[:-1]},
            {"X-Proxy-Key": WRITER[1:]},
            {"X-Proxy-Key": WRITER + "x"},
            {"X-Proxy-Key": WRITER + " "},
            {"X-Proxy-Key": WRITER + "\xa0"},
            {"X-Proxy-Key": WRITER + "\x00"},
            {"X-Proxy-Key": WRITER.upper()},
            {"X-Proxy-Key": "writer"},
            {"X-Proxy-Key": f"{WRITER},{WRITER}"},
            {"X-Proxy-Key": f"Bearer {WRITER}"},
            {"X-Proxy-Key": "\xe9" * 20},
            {"X-Proxy-Key": KEYS[0].digest.hex()},
            {"Authorization": ""},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer "},
            {"Authorization": WRITER},
            {"Authorization": f"Bearer\t{WRITER}"},
            {"Authorization": f"Bearer:{WRITER}"},
            {"Authorization": f"Bearer {WRITER},"},
            {"Authorization": f"Bearer \xa0{WRITER}"},
            {"Authorization": f"Bearer {WRITER}\x0b"},
            {"Authorization": f"Token {WRITER}"},
            {"Authorization": f"Digest {WRITER}"},
            {"Authorization": "Bearer held-by-metquay-proxy"},
            {"Authorization": "Basic"},
            {"Authorization": "Basic "},
            {"Authorization": f"Basic {WRITER}"},
            {"Authorization": "Basic =" + basic(WRITER)[6:]},
            {"Authorization": basic(WRITER).rstrip("=") + "!"},
            {"Authorization": basic(WRITER) + "="},
            {"Authorization": basic("x" + WRITER)},
            {"Authorization": basic(f"x:{WRITER}")},
            {"Authorization": basic("", user=WRITER)},
            {"Authorization": "Basic " + base64.b64encode(WRITER.replace(":", "").encode()).decode()},
            {"Authorization": "Basic \xe9\xe9\xe9\xe9"},
            {"Authorization": "Basic " + base64.b64encode(b"a:\xff\xfe\x00").decode()},
            {"Authorization": basic("local.writer.9999999999." + "\u0661" * 64)},
            {"Proxy-Authorization": basic(WRITER)},
            {"Cookie": f"X-Proxy-Key={WRITER}"},
            {"X-Proxy-Key2": WRITER},
        ],
        ids=str,
    )
    def test_wrong(self, fields: Fields) -> None:
        """Missing, cut, prolonged, misplaced or malformed: 403, so that no tool asks a person for a password."""
        for method, path in (("GET", "/customers"), ("POST", "/customers"), ("GET", "/-/status"), ("POST", "/-/quit")):
            with pytest.raises(ProxyError) as caught:
                admit(GUARDED, fields, method, path)
            assert (403, "client-key-required", ()) == (
                caught.value.status,
                caught.value.slug,
                caught.value.headers,
            )
            assert WRITER not in caught.value.message

    @pytest.mark.parametrize("name", ["X-Proxy-Key", "Authorization"])
    def test_doubles(self, name: str) -> None:
        """Nobody chooses between two keys, not even between equal ones."""
        value = WRITER if name == "X-Proxy-Key" else f"Bearer {WRITER}"
        assert "client-key-required" == verdict(GUARDED, [("Host", HOST), (name, value), (name.lower(), value)])

    def test_a_key_in_the_query_is_none(self) -> None:
        """Addresses end up in logs and histories."""
        assert "client-key-required" == verdict(GUARDED, {}, path=f"/customers?X-Proxy-Key={WRITER}")

    @pytest.mark.parametrize("path", ["/-/live", "/-/ready"])
    def test_probes_need_none(self, path: str) -> None:
        """A supervisor has no key; a wrong one does no harm either."""
        for fields in ({}, {"X-Proxy-Key": "wrong"}):
            for method in ("GET", "HEAD", "POST"):
                assert Admission() == admit(GUARDED, fields, method, path)

    @pytest.mark.parametrize("path", ["/", "/-", "/favicon.ico", "/robots.txt", "/.well-known/x"])
    def test_what_browsers_ask_for_by_themselves_needs_none(self, path: str) -> None:
        """A browser knows none yet; but Host and the rules against other sites hold."""
        assert Admission() == admit(GUARDED, {"X-Proxy-Key": "wrong"}, "POST", path)
        assert "host-not-allowed" == verdict(GUARDED, {"Host": "rebound.example"}, path=path)
        assert "origin-not-allowed" == verdict(GUARDED, {"Origin": "https://evil.example"}, path=path)
        assert "origin-not-allowed" == verdict(GUARDED, {"Sec-Fetch-Site": "cross-site"}, path=path)

    @pytest.mark.parametrize(
        "path", ["/-/live/", "/-/livex", "/-/Live", "/-//live", "/-/status", "/-/unknown", "/-/ready;x"]
    )
    def test_nothing_else_is_a_probe(self, path: str) -> None:
        """Only the two exact paths are open."""
        assert "client-key-required" == verdict(GUARDED, {}, path=path)

    @pytest.mark.parametrize("method", READS)
    def test_the_status_page_asks_for_a_login(self, method: str) -> None:
        """A browser may log in there, with the key as password, and nowhere else."""
        for fields in ({}, {"Authorization": basic("wrong")}):
            with pytest.raises(ProxyError) as caught:
                admit(GUARDED, fields, method, "/-/")
            assert (401, "login-required") == (caught.value.status, caught.value.slug)
            assert (("WWW-Authenticate", 'Basic realm="metquay-proxy", charset="UTF-8"'),) == caught.value.headers
        assert "client-key-required" == verdict(GUARDED, {}, "POST", "/-/")

    def test_a_login_brings_its_key_in_the_body(self) -> None:
        """POST /authenticate is let in without a key, on both of its paths, and it alone."""
        for path in ("/authenticate", "/api/v1/authenticate", "/authenticate?x", "/authenticate/"):
            assert Admission() == admit(GUARDED, {}, "POST", path)
        for method, path in (("GET", "/authenticate"), ("PUT", "/authenticate"), ("POST", "/authenticate/x")):
            assert "client-key-required" == verdict(GUARDED, {}, method, path)

    def test_without_keys_every_tool_is_let_in(self) -> None:
        """Any Authorization will do: it is replaced anyway."""
        for value in ("", "Bearer x", "Basic \xe9", "held-by-metquay-proxy"):
            assert Admission() == admit(PRIVATE, {"Authorization": value}, "DELETE")

    @pytest.mark.parametrize("secret", [WRITER, READER, "k-other-0123456789", "wrong", ""])
    def test_comparison_takes_the_same_time(self, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Digests of equal length are compared in constant time, and with all keys, whichever one matches."""
        compared: list[tuple[bytes, bytes]] = []

        def compare(ours: bytes, theirs: bytes) -> bool:
            compared.append((ours, theirs))
            return ours == theirs

        monkeypatch.setattr(hmac, "compare_digest", compare)
        verdict(GUARDED, {"X-Proxy-Key": secret})
        assert [key.digest for key in KEYS] == [ours for ours, _ in compared]
        assert {32} == {len(theirs) for _, theirs in compared}

    def test_keys_are_not_shown(self) -> None:
        """Neither a key nor its digest is in a repr."""
        assert "ClientKey('reader', read_only=True)" == repr(KEYS[1])
        assert "ClientKey('x', read_only=False)" == repr(ClientKey("x", b""))
        assert "(ClientKey('writer', read_only=False),)" == repr(KEYS[:1])

    @given(st.binary(max_size=80), st.sampled_from([b"", b"Basic ", b"Bearer ", b"Basic YTpi", b"local.writer.9."]))
    @settings(deadline=None)
    def test_nothing_breaks_it(self, value: bytes, start: bytes) -> None:
        """Whatever bytes are presented, they are refused as a wrong key, and never crash the gate."""
        for name in (b"Authorization", b"X-Proxy-Key"):
            head = RequestHead([(b"Host", HOST.encode()), (name, start + value)])
            with pytest.raises(ProxyError, match="client key"):
                GUARDED.check("GET", RULES.parse("GET", "/customers"), head, NOW)
        assert not GUARDED.is_ours((start + value).decode("latin-1"), NOW)

    def test_long_values_cost_linear_time(self) -> None:
        """Values of the largest size that is let in, built to be slow, are judged at once."""
        began = time.process_time()
        for filler in ("a", ".", ":", "local.", "0", "1.", "[", "%", " ", "=", "::"):
            text = filler * (60_000 // len(filler))
            for fields in (
                {"Host": text},
                {"Host": f"[{text}]"},
                {"Origin": text},
                {"X-Proxy-Key": text},
                {"Authorization": f"Bearer {text}"},
                {"Authorization": f"Basic {text}"},
                {"Authorization": f"Bearer local.writer.{text}"},
            ):
                assert "admitted" != verdict(GUARDED, fields)
            GUARDED.is_ours(f"Basic {text}", NOW)
        assert time.process_time() - began < 1


class TestPlaceholder:
    def test_without_keys(self) -> None:
        """An SDK that insists on logging in gets one for any secret, and it is no secret."""
        assert "held-by-metquay-proxy" == PRIVATE.login("anything", NOW)

    @pytest.mark.parametrize("secret", ["", "wrong", WRITER[:-1], WRITER + "\n", "\ud800", "k\u00e9y", "writer"])
    def test_a_wrong_secret_gets_none(self, secret: str) -> None:
        """Any text that JSON can spell may come, half surrogate pairs included."""
        assert GUARDED.login(secret, NOW) is None

    def test_no_placeholder_for_a_placeholder(self) -> None:
        """A login needs the key itself: else a placeholder could be renewed for ever, with its key withdrawn."""
        placeholder = GUARDED.login(WRITER, NOW)
        assert placeholder is not None
        assert GUARDED.login(placeholder, NOW) is None

    def test_it_counts_as_its_key(self) -> None:
        """The rights are the key's: what may only read stays so."""
        for key in KEYS:
            fields = {"Authorization": f"Bearer {GUARDED.placeholder(key, NOW)}"}
            assert Admission(key.name, key.read_only) == admit(GUARDED, fields)
        assert "read-only" == verdict(GUARDED, {"Authorization": f"Bearer {GUARDED.placeholder(KEYS[1], NOW)}"}, "POST")

    def test_it_lives_as_long_as_the_login_says(self) -> None:
        """To the second, and no longer."""
        fields = {"Authorization": f"Bearer {GUARDED.login(WRITER, NOW)}"}
        for age in (-3600, 0, PLACEHOLDER_LIFETIME - 1):
            assert "admitted" == verdict(GUARDED, fields, now=NOW + age)
        for late in (0.0, 0.1, 3600.0):
            assert "client-key-required" == verdict(GUARDED, fields, now=NOW + PLACEHOLDER_LIFETIME + late)

    def test_it_outlives_a_restart_but_not_its_key(self) -> None:
        """Nothing is remembered: any proxy with the same key takes it, one with another key of that name doesn't."""
        fields = {"X-Proxy-Key": str(GUARDED.login(WRITER, NOW))}
        assert "admitted" == verdict(Gate(upstream_host="x", keys=KEYS[:1]), fields)
        for keys in (KEYS[1:], (ClientKey.of("writer", "k-renewed-0123456789"),)):
            assert "client-key-required" == verdict(Gate(upstream_host="x", keys=keys), fields)

    def test_it_is_bound_to_the_name(self) -> None:
        """Even where two names had one key, a placeholder of the lesser could not be turned into one of the other."""
        lesser, greater = ClientKey.of("a", WRITER, read_only=True), ClientKey.of("b", WRITER)
        token = GUARDED.placeholder(lesser, NOW).replace("local.a.", "local.b.")
        assert "client-key-required" == verdict(Gate(upstream_host="x", keys=(greater,)), {"X-Proxy-Key": token})

    def test_forged(self) -> None:
        """Another name, another expiry, a cut, prolonged, missing or respelled signature: no key."""
        _, name, expiry, signature = GUARDED.placeholder(KEYS[1], NOW).split(".")
        later = int(expiry) + 1
        for token in (
            f"local.writer.{expiry}.{signature}",
            f"local.unknown.{expiry}.{signature}",
            f"local..{expiry}.{signature}",
            f"local.{name}.{later}.{signature}",
            f"local.{name}.0{expiry}.{signature[:-1]}",
            f"local.{name}.-{expiry}.{signature}",
            f"local.{name}.{'9' * 16}.{signature}",
            f"local.{name}.{'9' * 5000}.{signature}",
            f"local.{name}.\u0661.{signature}",
            f"local.{name}..{signature}",
            f"local.{name}.{expiry}.",
            f"local.{name}.{expiry}",
            f"local.{name}.{expiry}.{signature}.",
            f"local.{name}.{expiry}.{signature[:-1]}",
            f"local.{name}.{expiry}.{signature}0",
            f"local.{name}.{expiry}.{signature.upper()}",
            f"local.{name}.{expiry}.{'0' * 64}",
            f"local.{name}.{expiry}.{signature[::-1]}",
            f"Local.{name}.{expiry}.{signature}",
            f"x.{name}.{expiry}.{signature}",
            f"{name}.{expiry}.{signature}",
        ):
            assert "client-key-required" == verdict(GUARDED, {"Authorization": basic(token)}), token

    @given(st.integers(0, 140), st.characters(max_codepoint=255))
    @settings(deadline=None)
    def test_every_changed_character_is_noticed(self, index: int, character: str) -> None:
        """A placeholder with one character changed is none, unless it is still the same."""
        placeholder = GUARDED.placeholder(KEYS[0], NOW)
        index %= len(placeholder)
        changed = placeholder[:index] + character + placeholder[index + 1 :]
        expected = "admitted" if changed == placeholder else "client-key-required"
        assert expected == verdict(GUARDED, {"X-Proxy-Key": changed})


class TestReadOnly:
    @pytest.mark.parametrize("method", READS)
    def test_reads(self, method: str) -> None:
        """GET, HEAD and OPTIONS pass, and stay marked, so that method overrides are removed."""
        assert Admission("reader", read_only=True) == admit(GUARDED, {"X-Proxy-Key": READER}, method)
        assert Admission(read_only=True) == admit(READING, {}, method)
        assert Admission("writer", read_only=True) == admit(GUARDED_READING, {"X-Proxy-Key": WRITER}, method)

    @pytest.mark.parametrize("method", WRITES)
    @pytest.mark.parametrize("path", ["/customers", "/FlexicalERP/x", "/authenticate/x", "/-x"])
    def test_writes(self, method: str, path: str) -> None:
        """Any other method is refused, pass-through included, and the text says which rule did it."""
        for judge, fields, why in (
            (GUARDED, {"X-Proxy-Key": READER}, "the client key reader may only read"),
            (READING, {}, "METQUAY_READ_ONLY is set"),
            (GUARDED_READING, {"X-Proxy-Key": WRITER}, "METQUAY_READ_ONLY is set"),
        ):
            with pytest.raises(ProxyError, match=f"^{method} was refused, because {why}") as caught:
                admit(judge, fields, method, path)
            assert (403, "read-only") == (caught.value.status, caught.value.slug)

    @pytest.mark.parametrize("name", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
    def test_overrides_change_no_verdict(self, name: str) -> None:
        """The method of the request line is judged: a write dressed up as a read loses the dress, and vice versa."""
        assert Admission(read_only=True) == admit(READING, {name: "DELETE"})
        assert "read-only" == verdict(READING, {name: "GET"}, "POST")

    def test_the_other_keys_may_write(self) -> None:
        """A key without the mark is not limited by one with it."""
        assert Admission("writer") == admit(GUARDED, {"X-Proxy-Key": WRITER}, "DELETE")

    @pytest.mark.parametrize("path", ["/-/quit", "/-/status", "/-/unknown"])
    def test_own_pages(self, path: str) -> None:
        """A read-only key never quits the proxy; METQUAY_READ_ONLY speaks of Metquay's records only."""
        assert "read-only" == verdict(GUARDED, {"X-Proxy-Key": READER}, "POST", path)
        assert "read-only" == verdict(GUARDED_READING, {"X-Proxy-Key": READER}, "POST", path)
        assert "admitted" == verdict(GUARDED_READING, {"X-Proxy-Key": WRITER}, "POST", path)
        assert "admitted" == verdict(READING, {}, "POST", path)
        assert "admitted" == verdict(GUARDED, {"X-Proxy-Key": READER}, "GET", path)

    def test_logging_in_is_no_write(self) -> None:
        """A tool that may only read can log in, with and without its key in the head."""
        for fields in ({}, {"X-Proxy-Key": READER}, {"X-Proxy-Key": WRITER}):
            for judge in (GUARDED, READING, GUARDED_READING):
                assert "admitted" == verdict(judge, fields, "POST", "/authenticate")

    def test_the_key_is_asked_for_first(self) -> None:
        """Whoever has no key does not learn what a key may do."""
        assert "client-key-required" == verdict(GUARDED_READING, {}, "DELETE")


class TestTrace:
    def test_trace_is_never_sent(self) -> None:
        """Its answer repeats the request's head, and would show the tool the token."""
        for judge, fields in ((OPEN, {}), (GUARDED, {"X-Proxy-Key": WRITER})):
            with pytest.raises(ProxyError, match="TRACE") as caught:
                admit(judge, fields, "TRACE")
            assert (405, "method-not-allowed", "no") == (caught.value.status, caught.value.slug, caught.value.sent)
            assert (("Allow", "GET, HEAD, OPTIONS, POST, PUT, PATCH, DELETE"),) == caught.value.headers
        assert "client-key-required" == verdict(GUARDED, {}, "TRACE")
        assert "read-only" == verdict(READING, {}, "TRACE")

    def test_trace_without_a_token(self) -> None:
        """Where no token is attached there is nothing to show."""
        for path in ("/-/status", "/FlexicalERP/x"):
            assert "admitted" == verdict(OPEN, {}, "TRACE", path)


class TestIsOurs:
    @pytest.mark.parametrize(
        "value",
        [
            f"Bearer {WRITER}",
            f"bearer   {WRITER}",
            f"Token {READER}",
            f"anything {READER}",
            WRITER,
            basic(WRITER),
            basic("", user=READER),
            basic("x", user=READER),
            f"Bearer {GUARDED.placeholder(KEYS[0], NOW)}",
            f"Bearer {GUARDED.placeholder(KEYS[0], NOW - 5000)}",
            f"Bearer {GUARDED.placeholder(ClientKey.of('gone', 'k-gone-0123456789'), NOW)}",
            basic(GUARDED.placeholder(KEYS[0], NOW)),
            GUARDED.placeholder(KEYS[0], NOW),
            "Bearer held-by-metquay-proxy",
            basic("held-by-metquay-proxy"),
        ],
    )
    def test_ours(self, value: str) -> None:
        """A key or placeholder, live or not, in whatever place, never leaves the machine with a pass-through."""
        assert GUARDED.is_ours(value, NOW)

    @pytest.mark.parametrize(
        "value",
        [
            None,
            "",
            "Bearer",
            "Bearer eyJhbGciOiJIUzI1NiJ9.e30.x",
            "Bearer local.machine",
            basic("password", user="local.admin"),
            basic(f"x:{WRITER}"),
            "Basic \xe9",
            "Negotiate YII=",
        ],
    )
    def test_the_tools_own(self, value: str | None) -> None:
        """Anything else is the tool's own, for the server behind the pass-through."""
        assert not GUARDED.is_ours(value, NOW)

    def test_without_keys(self) -> None:
        """Placeholders of earlier days are known by their shape; keys that are none are not."""
        assert PRIVATE.is_ours("Bearer held-by-metquay-proxy", NOW)
        assert PRIVATE.is_ours(f"Bearer {GUARDED.placeholder(KEYS[0], NOW)}", NOW)
        assert not PRIVATE.is_ours(f"Bearer {WRITER}", NOW)


def test_key_of() -> None:
    """A key is found by its name; no client, no key."""
    assert KEYS[1] == GUARDED.key_of("reader")
    assert GUARDED.key_of("nobody") is None
    assert GUARDED.key_of(None) is None


def test_the_gate_remembers_no_more_than_it_must() -> None:
    """Hosts that were read are remembered, few of them and none that is long."""
    size = gate._read_host.cache_info().maxsize
    for number in range(200):
        verdict(PRIVATE, {"Host": f"{number}.evil.example"})
        verdict(PRIVATE, {"Host": "x" * 301 + str(number)})
    assert gate._read_host.cache_info().currsize == size == 64
    before = gate._read_host.cache_info().misses
    assert "host-not-allowed" == verdict(PRIVATE, {"Host": "x" * 301})
    assert "admitted" == verdict(PRIVATE, {"Host": "xx" * 150})
    before += 1
    assert before == gate._read_host.cache_info().misses


def test_other_keys() -> None:
    """A key that is gone, or is another one under the same name, ends with its placeholder; the others go on."""
    kept, gone, changed = (ClientKey.of(name, f"key-of-{name}-0123456789") for name in ("kept", "gone", "changed"))
    gate = Gate(upstream_host="lab.metquay.co", keys=(kept, gone, changed), read_only=True)
    placeholders = {key.name: gate.placeholder(key, NOW) for key in (kept, gone, changed)}
    other = ClientKey.of("changed", "another-key-0123456789")
    assert {"gone", "changed"} == gate.replace_keys((kept, other))

    def admitted(secret: str) -> bool:
        return verdict(gate, {"X-Proxy-Key": secret}) == "admitted"

    assert admitted("key-of-kept-0123456789")
    assert admitted("another-key-0123456789")
    assert admitted(placeholders["kept"])
    for ended in ("key-of-gone-0123456789", "key-of-changed-0123456789", placeholders["gone"], placeholders["changed"]):
        assert not admitted(ended)
    assert frozenset() == gate.replace_keys((other, kept))
    assert (other, kept) == gate.keys


def test_a_key_that_may_only_read_from_now_on() -> None:
    """The same key with another right is another one."""
    gate = Gate(upstream_host="lab.metquay.co", keys=(ClientKey.of("k", WRITER),))
    assert {"k"} == gate.replace_keys((ClientKey.of("k", WRITER, read_only=True),))
    assert "read-only" == verdict(gate, {"X-Proxy-Key": WRITER}, "POST")


@pytest.mark.parametrize(("keys", "others"), [(KEYS, ()), ((), KEYS)])
def test_a_gate_is_never_opened(keys: tuple[ClientKey, ...], others: tuple[ClientKey, ...]) -> None:
    """Where a key is needed one is needed for ever; and no key can begin to be needed."""
    gate = Gate(upstream_host="lab.metquay.co", keys=keys)
    with pytest.raises(ValueError, match="does not begin or cease"):
        gate.replace_keys(others)


def test_what_is_remembered_of_a_key_is_not_another_ones() -> None:
    """The scope is the very key's: neither another name's nor, with another key, the same name's."""
    gate = Gate(upstream_host="lab.metquay.co", keys=(ClientKey.of("a", WRITER), ClientKey.of("b", READER)))
    before = gate.scope("a")
    assert None is gate.scope(None)
    assert before not in {None, gate.scope("b")}
    gate.replace_keys((ClientKey.of("a", "another-key-0123456789"),))
    assert before != gate.scope("a")
    assert WRITER not in (before or "")
