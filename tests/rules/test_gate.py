from __future__ import annotations

import base64
import hmac
import itertools
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.gate import PLACEHOLDER_LIFETIME, Admission, ClientKey, Gate
from metquay_proxy.rules.headers import RequestFields
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
AT_HOME = Gate(
    upstream_host="lab.metquay.co", allowed_hosts=("proxy.lab.example", "listed"), own_names=frozenset({"box"})
)
PRIVATE = Gate(upstream_host="lab.metquay.co")
GUARDED = Gate(upstream_host="lab.metquay.co", keys=KEYS, allowed_origins=(TOOLS,))
READING = Gate(upstream_host="lab.metquay.co", read_only=True)
GUARDED_READING = Gate(upstream_host="lab.metquay.co", keys=KEYS, read_only=True)

Fields = dict[str, str] | list[tuple[str, str]]

HTTPS = Gate(upstream_host="lab.metquay.co", scheme="https")

ANY = Admission()
NO_KEY, NO_HOST, NO_ORIGIN = "client-key-required", "host-not-allowed", "origin-not-allowed"
NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
LINK = {"Sec-Fetch-Site": "cross-site"} | NAVIGATION
PREFLIGHT = {"Origin": TOOLS, "Access-Control-Request-Method": "DELETE"}
W, R = {"X-Proxy-Key": WRITER}, {"X-Proxy-Key": READER}
PAGE = "http://intranet.example/"
EVERYWHERE = "GET,POST /-/live /-/ready /-/ /-/status /-/quit /authenticate /FlexicalERP/x"
UNASKED = "/ /- /favicon.ico /robots.txt /.well-known/x"
OVERRIDES = ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"]
WRITES = ["POST", "PUT", "PATCH", "DELETE", "MKCOL", "LOCK"]
READS = ["GET", "HEAD", "OPTIONS"]


def head_of(fields: Fields) -> RequestFields:
    """Return a head, values in latin-1 as the parser gives them."""
    pairs = fields.items() if isinstance(fields, dict) else fields
    return RequestFields("".join(f"\r\n{name}: {value}" for name, value in pairs).encode("latin-1"))


def admit(judge: Gate, fields: Fields, method: str = "GET", path: str = "/customers", now: float = NOW) -> Admission:
    """Let the gate judge one request; ``Host: localhost:6387`` where a dictionary of ``fields`` names none."""
    if isinstance(fields, dict):
        fields = {"Host": HOST} | fields
    target = RULES.parse(method, path)
    admission = judge.check(method, target, head_of(fields), now)
    judge.permit(method, target, admission)
    return admission


def outcome(judge: Gate, fields: Fields, method: str, path: str, now: float = NOW) -> Admission | str:
    """Return what the gate found out, or the slug of its refusal."""
    try:
        return admit(judge, fields, method, path, now)
    except ProxyError as error:
        return error.slug if error.sent == "no" else "refused, but sent"


def verdict(judge: Gate, fields: Fields, method: str = "GET", path: str = "/customers", now: float = NOW) -> str:
    """Return the slug of the refusal, or ``admitted``."""
    found = outcome(judge, fields, method, path, now)
    return found if isinstance(found, str) else "admitted"


def basic(password: str, user: str = "anyone") -> str:
    """Return Basic credentials."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def twice(name: str, value: str, **more: str) -> list[tuple[str, str]]:
    """Return fields with one that comes twice; nobody may choose between two, not even between equal ones."""
    return [("Host", HOST), (name, value), (name.lower(), value), *more.items()]


@pytest.mark.parametrize(
    ("judge", "fields", "requests", "expected"),
    [
        # ordinary programs: no Origin, no key; HTTP/1.0 has no Host, and no browser speaks it
        (OPEN, {}, "POST,GET,DELETE /customers", ANY),
        (OPEN, [], "GET /customers", ANY),
        # Host: Metquay's name is that of an absolute-form target only (a tool may use us as its HTTP proxy)
        (OPEN, {"Host": "lab.metquay.co"}, "GET http://lab.metquay.co/api/v1/customers", ANY),
        (OPEN, {"Host": "LAB.metquay.co.:443"}, "GET http://lab.metquay.co/api/v1/customers", ANY),
        (OPEN, {}, "GET http://lab.metquay.co/api/v1/customers", ANY),
        (OPEN, {"Host": "evil.example"}, "GET http://lab.metquay.co/customers", NO_HOST),
        # a name without a dot has no final one either, which may be a top-level domain's own
        (OPEN, {"Host": "box:6387"}, "GET /customers", ANY),
        (OPEN, {"Host": "box.:6387"}, "GET /customers", NO_HOST),
        (OPEN, twice("Host", HOST), "GET /customers", NO_HOST),
        # every path, probes included, before any key or Origin is looked at: after DNS rebinding Host and Origin agree
        (GUARDED, {"Host": "evil.example"} | W, EVERYWHERE, NO_HOST),
        (OPEN, {"Host": "evil.example", "Origin": "http://evil.example"}, EVERYWHERE, NO_HOST),
        (GUARDED, PREFLIGHT | {"Host": "evil.example"}, "OPTIONS /customers", NO_HOST),
        # Origin: a foreign page may not even ask whether the proxy lives, with whatever key
        (GUARDED, {"Origin": "https://evil.example"} | W, EVERYWHERE, NO_ORIGIN),
        (OPEN, twice("Origin", TOOLS, **{"Sec-Fetch-Site": "same-origin"}), "GET /customers", NO_ORIGIN),
        # without a Host there is no origin of our own
        (PRIVATE, [("Origin", "http://localhost:6387")], "GET /customers", NO_ORIGIN),
        (PRIVATE, [("Origin", "http://none")], "GET /customers", NO_ORIGIN),
        (PRIVATE, [("Origin", "http://")], "GET /customers", NO_ORIGIN),
        # where the proxy serves TLS, its own pages have an https origin, and only those
        (HTTPS, {"Origin": "https://localhost:6387"}, "GET /customers", ANY),
        (HTTPS, {"Origin": "http://localhost:6387"}, "GET /customers", NO_ORIGIN),
        # Referer: a link carries that of the page on which it stands; what else the browser says counts more
        (OPEN, {"Referer": PAGE} | LINK, "GET /-/", ANY),
        (OPEN, {"Referer": PAGE, "Origin": TOOLS}, "GET /customers", ANY),
        (OPEN, twice("Referer", f"http://{HOST}/"), "GET /customers", NO_ORIGIN),
        # Sec-Fetch-Site: what our own page asks for, and what a person typed, is admitted everywhere
        (OPEN, {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, "GET /customers /-/ /-/status", ANY),
        (OPEN, {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "cors"}, "GET /customers /-/ /-/status", ANY),
        # the status page may be opened from anywhere, as a page of its own; a form of another page is no link
        (OPEN, LINK, "GET /-/ /-/?x=1 /api/v1/-/ / /-", ANY),
        (OPEN, LINK | {"Sec-Fetch-Site": "same-site"}, "GET /-/ /", ANY),
        (OPEN, LINK, "GET /favicon.ico /customers /-/status", NO_ORIGIN),
        (OPEN, LINK, "HEAD,POST,OPTIONS,PUT /-/", NO_ORIGIN),
        (OPEN, twice("Sec-Fetch-Mode", "navigate", **LINK), "GET /-/", NO_ORIGIN),
        (OPEN, twice("Sec-Fetch-Dest", "document", **LINK), "GET /-/", NO_ORIGIN),
        (OPEN, twice("Sec-Fetch-Site", "none"), "GET /customers", NO_ORIGIN),
        # a listed origin's preflight goes before the key check, since browsers send no key with it
        (GUARDED, PREFLIGHT, "OPTIONS /customers /-/status /-/quit *", Admission(preflight=True)),
        (GUARDED, PREFLIGHT | {"Origin": "https://evil.example"}, "OPTIONS /customers", NO_ORIGIN),
        (GUARDED, PREFLIGHT | {"Origin": "null"}, "OPTIONS /customers", NO_ORIGIN),
        (GUARDED, PREFLIGHT | {"Origin": "http://localhost:6387"}, "OPTIONS /customers", NO_KEY),
        (OPEN, PREFLIGHT | {"Origin": "http://localhost:6387"}, "OPTIONS /customers", ANY),
        (GUARDED, PREFLIGHT, "GET /customers", NO_KEY),
        (GUARDED, {"Origin": TOOLS}, "OPTIONS /customers", NO_KEY),
        (GUARDED, {"Access-Control-Request-Method": "PUT"}, "OPTIONS /customers", NO_KEY),
        # keys: a key's name is the client's; X-Proxy-Key goes first, being meant for us for certain
        (GUARDED, {"X-Proxy-Key": "k-other-0123456789"}, "GET,DELETE /customers", Admission("other")),
        (GUARDED, R | {"Authorization": f"Bearer {WRITER}"}, "GET /customers", Admission("reader", read_only=True)),
        (GUARDED, twice("X-Proxy-Key", WRITER), "GET /customers", NO_KEY),
        (GUARDED, twice("Authorization", f"Bearer {WRITER}"), "GET /customers", NO_KEY),
        # addresses end up in logs and histories
        (GUARDED, {}, f"GET /customers?X-Proxy-Key={WRITER}", NO_KEY),
        # a supervisor has no key, and a wrong one does no harm; only the two exact paths are open
        (GUARDED, {}, "GET,HEAD,POST /-/live /-/ready", ANY),
        (GUARDED, {"X-Proxy-Key": "wrong"}, "GET,HEAD,POST /-/live /-/ready", ANY),
        (GUARDED, {}, "GET /-/live/ /-/livex /-/Live /-//live /-/status /-/unknown /-/ready;x", NO_KEY),
        # a browser knows none yet when it asks for something by itself; Host and the rules against other sites hold
        (GUARDED, {"X-Proxy-Key": "wrong"}, f"POST {UNASKED}", ANY),
        (GUARDED, {"Host": "rebound.example"}, f"GET {UNASKED}", NO_HOST),
        (GUARDED, {"Origin": "https://evil.example"}, f"GET {UNASKED}", NO_ORIGIN),
        (GUARDED, {"Sec-Fetch-Site": "cross-site"}, f"GET {UNASKED}", NO_ORIGIN),
        # a login brings its key in the body, on both of its paths, and it alone
        (GUARDED, {}, "POST /authenticate /api/v1/authenticate /authenticate?x /authenticate/", ANY),
        (GUARDED, {}, "GET,PUT /authenticate /authenticate/x", NO_KEY),
        (GUARDED, {}, "POST /authenticate/x /-/", NO_KEY),
        # without keys any Authorization will do: it is replaced anyway
        *[(PRIVATE, {"Authorization": value}, "DELETE /x", ANY) for value in ("", "Bearer x", "Basic \xe9", "held-by")],
        # reading: GET, HEAD and OPTIONS pass, and stay marked, so that method overrides are removed
        (GUARDED, R, "GET,HEAD,OPTIONS /customers", Admission("reader", read_only=True)),
        (READING, {}, "GET,HEAD,OPTIONS /customers", Admission(read_only=True)),
        (GUARDED_READING, W, "GET,HEAD,OPTIONS /customers", Admission("writer", read_only=True)),
        (GUARDED, W, "DELETE /customers", Admission("writer")),
        (GUARDED_READING, {}, "DELETE /customers", NO_KEY),
        # the method of the request line is judged: a write dressed up as a read loses the dress, and vice versa
        *[(READING, {name: "DELETE"}, "GET /customers", Admission(read_only=True)) for name in OVERRIDES],
        *[(READING, {name: "GET"}, "POST /customers", "read-only") for name in OVERRIDES],
        # own pages: a read-only key never quits the proxy; METQUAY_READ_ONLY speaks of Metquay's records only
        (GUARDED, R, "POST /-/quit /-/status /-/unknown", "read-only"),
        (GUARDED_READING, R, "POST /-/quit /-/status /-/unknown", "read-only"),
        (GUARDED_READING, W, "POST /-/quit /-/status /-/unknown", Admission("writer", read_only=True)),
        (READING, {}, "POST /-/quit /-/status /-/unknown", Admission(read_only=True)),
        (GUARDED, R, "GET /-/quit /-/status /-/unknown", Admission("reader", read_only=True)),
        # to log in is no write
        (GUARDED_READING, {}, "POST /authenticate", ANY),
        (READING, {}, "POST /authenticate", Admission(read_only=True)),
        (GUARDED, R, "POST /authenticate", Admission("reader", read_only=True)),
        # TRACE where no token is attached has nothing to show
        (OPEN, {}, "TRACE /-/status /FlexicalERP/x", ANY),
        (GUARDED, {}, "TRACE /customers", NO_KEY),
        (READING, {}, "TRACE /customers", "read-only"),
    ],
)
def test_who_may_do_what(judge: Gate, fields: Fields, requests: str, expected: Admission | str) -> None:
    """Each request by each method gets what its line says; the comments say why."""
    methods, *paths = requests.split()
    for method, path in itertools.product(methods.split(","), paths):
        assert expected == outcome(judge, fields, method, path), (method, path)


KNOWN = """
localhost localhost:6387 LOCALHOST:6387 localhost: localhost. localhost.:6387 app.localhost a.b.LocalHost:1
app.localhost. 127.0.0.1 127.0.0.1:6387 127.0.0.1. 192.168.1.20:6387 0.0.0.0:6387 [::1] [::1]:6387 [::ffff:127.0.0.1]
[::FFFF:127.0.0.1]:6387 [fe80::1%eth0]:6387 [fe80::1%25eth0] proxy.lab.example PROXY.lab.example:6387 proxy.lab.example.
"""
DOTLESS = "metquay-proxy metquay_proxy:6387 2130706433 proxy1 Neighbour"
UNKNOWN = """
evil.example evil.example:6387 localhost.evil.example localhost.evil.example. evil.localhost.example
evillocalhost.example 127.0.0.1.nip.io 127-0-0-1.nip.io 127.0.0.1.evil.example:6387 0x7f.1 0x7f.0.0.1 127.1 127.0.0.256
127.0.0.01 127.0.0.1.. sub.proxy.lab.example proxy.lab.example.evil.example evilproxy.lab.example ai. . .. :6387
lab.metquay.co ::1 [::1 [] [::1]x [::1]evil.example [::g] [1:2] [1:2.localhost] [fe80::1%] [fe80::1%a/b] localhost:port
localhost:-1 localhost:65536 localhost:80:80 localhost:80evil.example localhost@evil.example evil.example@localhost
user:password@localhost localhost/evil.example localhost\\evil.example localhost#.evil.example localhost?x
localhost,evil.example local%68ost http://localhost l\xf6calhost 127.0.0.\xb2 *
"""
ODD = ["", "localhost evil.example", "localhost\x00", "localhost\x00.evil.example"]


class TestHost:
    @pytest.mark.parametrize("host", f"{KNOWN} {DOTLESS}".split())
    def test_known(self, host: str) -> None:
        """An address, a name that nobody can register, and a listed name are asked for by tools."""
        assert "admitted" == verdict(OPEN, {"Host": host})

    @pytest.mark.parametrize("host", [*UNKNOWN.split(), *ODD])
    def test_unknown(self, host: str) -> None:
        """A name that somebody else can point at this machine, and what is no host at all, is refused."""
        for judge in (OPEN, AT_HOME):
            assert "host-not-allowed" == verdict(judge, {"Host": host})

    @pytest.mark.parametrize("host", f"{KNOWN} box BOX:6387 box. listed".split())
    def test_at_home(self, host: str) -> None:
        """Where nobody but this machine may ask, its own name without a dot is known, and a listed one."""
        assert "admitted" == verdict(AT_HOME, {"Host": host})

    @pytest.mark.parametrize("host", f"{DOTLESS} boxx bo box.lan box.localdomain".split())
    def test_a_neighbours_name(self, host: str) -> None:
        """Any other can be a neighbour's, who makes it point to this machine: that is DNS rebinding."""
        fields = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert "host-not-allowed" == verdict(AT_HOME, fields)
        assert "host-not-allowed" == verdict(AT_HOME, {"Host": host}, path="/-/live")


FOREIGN = """
null * localhost:6387 https://localhost:6387 http://localhost http://localhost:63870 http://localhost:6387/
http://localhost:6387.evil.example http://localhost:6387@evil.example http://evil.example:6387 http://127.0.0.1:6387
HTTP://LOCALHOST:6387 http://LOCALHOST:6387 http://localhost:6387,http://evil.example https://tools.lab.example:443
https://tools.lab.example:8443 https://tools.lab.example/ https://tools.lab.example. https://TOOLS.lab.example
https://tools.lab.example.evil.example https://evil-tools.lab.example https://x.tools.lab.example
http://tools.lab.example https://tools.lab.exampl\xe9 chrome-extension://tools.lab.example file://
"""
TWO = ["http://localhost:6387 http://evil.example", "http://evil.example http://localhost:6387"]


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
    def test_own_or_listed(self, host: str, origin: str) -> None:
        """Our own pages and the listed ones may use the proxy; the origin decides alone."""
        for site in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "cross-site"}):
            assert "admitted" == verdict(OPEN, {"Host": host, "Origin": origin} | site, "POST")

    @pytest.mark.parametrize("origin", ["", *TWO, *FOREIGN.split()])
    def test_foreign(self, origin: str) -> None:
        """Any other is refused, near misses included, and no Sec-Fetch-Site makes up for it."""
        for extra in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
            for method in ("GET", "POST", "OPTIONS"):
                assert "origin-not-allowed" == verdict(OPEN, {"Origin": origin} | extra, method)

    def test_the_text_says_what_to_do(self) -> None:
        """Whoever owns the page learns which setting lets it in."""
        with pytest.raises(ProxyError, match="METQUAY_ALLOWED_ORIGINS"):
            admit(OPEN, {"Origin": "https://evil.example"})
        with pytest.raises(ProxyError, match="METQUAY_ALLOWED_HOSTS"):
            admit(OPEN, {"Host": "evil.example"})


class TestReferer:
    """What tells a page where its browser says nothing else: under plain http and a name that is not localhost."""

    HOST = "metquay-proxy:6387"

    @pytest.mark.parametrize("referer", [f"http://{HOST}/-/", "http://METQUAY-PROXY:6387", f"{TOOLS}/a?b", ""])
    def test_own_or_listed(self, referer: str) -> None:
        """Our own pages and the listed ones may use the proxy, and so may who has none."""
        assert "admitted" == verdict(OPEN, {"Host": self.HOST, "Referer": referer})

    @pytest.mark.parametrize("start", ["http://evil.example", f"https://{HOST}", f"http://{HOST}.evil.example"])
    @pytest.mark.parametrize("path", ["/customers", "/-/status", "/-/", "/-/live"])
    def test_foreign(self, start: str, path: str) -> None:
        """Any other is a foreign page's, on every path; what is no page of ours for certain is another's."""
        for referer in (f"{start}/x", "http://metquay-proxy:6388/", f"//{self.HOST}/", "about:client", "\xe9"):
            assert "origin-not-allowed" == verdict(OPEN, {"Host": self.HOST, "Referer": referer}, path=path)


class TestFetchMetadata:
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

    @pytest.mark.parametrize(
        ("mode", "dest"),
        [("", "document"), ("navigate", ""), ("no-cors", "document"), ("cors", "empty"), ("", "")]
        + [("navigate", dest) for dest in ("iframe", "frame", "object", "Document")],
    )
    def test_the_status_page_in_a_foreign_page(self, mode: str, dest: str) -> None:
        """It may neither be framed nor fetched by another page."""
        said = {name: value for name, value in (("Sec-Fetch-Mode", mode), ("Sec-Fetch-Dest", dest)) if value}
        assert "origin-not-allowed" == verdict(OPEN, {"Sec-Fetch-Site": "cross-site"} | said, path="/-/")


CORS = (("Access-Control-Allow-Origin", TOOLS), ("Access-Control-Expose-Headers", "*"), ("Vary", "Origin"))


class TestCors:
    def test_the_fields(self) -> None:
        """A listed origin may read every answer, and caches learn that the answer is for that origin."""
        assert CORS == GUARDED.cors(head_of({"Origin": TOOLS}))

    @pytest.mark.parametrize(
        "origins", [[], ["null"], ["http://localhost:6387"], ["https://evil.example"], [TOOLS.upper()], [TOOLS, TOOLS]]
    )
    def test_no_fields_for_others(self, origins: list[str]) -> None:
        """No other page may read anything, and nothing is added for tools."""
        assert () == GUARDED.cors(head_of([("Origin", origin) for origin in origins]))

    def test_nothing_is_listed_by_default(self) -> None:
        """Without the setting no origin gets CORS answers."""
        assert () == PRIVATE.cors(head_of({"Origin": TOOLS}))


def ways(key: str) -> list[dict[str, str]]:
    """Return every way to present a key."""
    placeholder = str(GUARDED.login(None, key, NOW))
    values = [f"Bearer {key}", f"bearer  {key}", f"BEARER {key}", basic(key), basic(key, user="")]
    values += [basic(key).replace("Basic ", "BASIC  "), f"Bearer {placeholder}", basic(placeholder)]
    return [
        *({"Authorization": value} for value in values),
        {"X-Proxy-Key": key},
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

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("X-Proxy-Key", ["", WRITER[:-1], WRITER[1:], *(WRITER + end for end in ("x", "\xa0", "\x00"))]),
            ("X-Proxy-Key", [WRITER.upper(), "writer", f"{WRITER},{WRITER}", f"Bearer {WRITER}", "\xe9" * 20]),
            ("X-Proxy-Key", [KEYS[0].digest.hex()]),
            ("Authorization", ["", "Bearer", "Bearer ", WRITER, f"Bearer\t{WRITER}", f"Bearer:{WRITER}"]),
            ("Authorization", [f"Bearer {WRITER},", f"Bearer \xa0{WRITER}", f"Bearer {WRITER}\x0b", f"Token {WRITER}"]),
            ("Authorization", [f"Digest {WRITER}", "Bearer held-by-metquay-proxy", "Basic", "Basic "]),
            ("Authorization", [f"Basic ={basic(WRITER)[6:]}", basic(WRITER).rstrip("=") + "!", basic(WRITER) + "="]),
            ("Authorization", [f"Basic {WRITER}", basic("x" + WRITER), basic(f"x:{WRITER}"), basic("", user=WRITER)]),
            ("Authorization", [f"Basic {base64.b64encode(WRITER.replace(':', '').encode()).decode()}"]),
            ("Authorization", [f"Basic {base64.b64encode(bytes([97, 58, 255, 254, 0])).decode()}"]),
            ("Authorization", ["Basic " + "\xe9" * 4, basic("local.writer.9999999999." + "\u0661" * 64)]),
            ("Proxy-Authorization", [basic(WRITER)]),
            ("Cookie", [f"X-Proxy-Key={WRITER}"]),
            ("X-Proxy-Key2", [WRITER]),
            ("User-Agent", ["no key at all"]),
        ],
        ids=str,
    )
    def test_wrong(self, name: str, values: list[str]) -> None:
        """Missing, cut, prolonged, misplaced or malformed: 403, so that no tool asks a person for a password."""
        for value in values:
            for method, path in itertools.product(("GET", "POST"), ("/customers", "/-/status", "/-/quit")):
                with pytest.raises(ProxyError) as caught:
                    admit(GUARDED, {name: value}, method, path)
                error = caught.value
                assert (403, "client-key-required", ()) == (error.status, error.slug, error.headers), value
                assert WRITER not in error.message

    @pytest.mark.parametrize("method", READS)
    def test_the_status_page_asks_for_a_login(self, method: str) -> None:
        """A browser may log in there, with the key as password, and nowhere else."""
        for fields in ({}, {"Authorization": basic("wrong")}):
            with pytest.raises(ProxyError) as caught:
                admit(GUARDED, fields, method, "/-/")
            assert (401, "login-required") == (caught.value.status, caught.value.slug)
            assert (("WWW-Authenticate", 'Basic realm="metquay-proxy", charset="UTF-8"'),) == caught.value.headers
        assert "client-key-required" == verdict(GUARDED, {}, "POST", "/-/")

    @pytest.mark.parametrize("secret", [WRITER, READER, "k-other-0123456789", "wrong"])
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
        assert "ClientKey(name='reader', read_only=True)" == repr(KEYS[1])

    @given(st.binary(max_size=80), st.sampled_from([b"", b"Basic ", b"Bearer ", b"Basic YTpi", b"local.writer.9."]))
    @settings(deadline=None)
    def test_nothing_breaks_it(self, value: bytes, start: bytes) -> None:
        """Whatever bytes are presented, they are refused as a wrong key, and never crash the gate."""
        for name in (b"Authorization", b"X-Proxy-Key"):
            line = b"%b: %b%b" % (name, start, value.translate(None, b"\r\n"))  # of which none gets this far
            head = RequestFields(b"\r\nHost: %b\r\n%b" % (HOST.encode(), line))
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


FORGED = """
local.writer.{e}.{s} local.unknown.{e}.{s} local..{e}.{s} local.{n}.{later}.{s} local.{n}.0{e}.{cut} local.{n}.-{e}.{s}
local.{n}.{nines}.{s} local.{n}.{many}.{s} local.{n}.\u0661.{s} local.{n}..{s} local.{n}.{e}. local.{n}.{e}
local.{n}.{e}.{s}. local.{n}.{e}.{cut} local.{n}.{e}.{s}0 local.{n}.{e}.{upper} local.{n}.{e}.{zeros}
local.{n}.{e}.{back} Local.{n}.{e}.{s} x.{n}.{e}.{s} {n}.{e}.{s}
"""


class TestPlaceholder:
    def test_without_keys(self) -> None:
        """An SDK that insists on logging in gets one for any secret, and it is no secret."""
        assert "held-by-metquay-proxy" == PRIVATE.login(None, "anything", NOW)

    @pytest.mark.parametrize("secret", ["", "wrong", WRITER[:-1], WRITER + "\n", "\ud800", "k\u00e9y", "writer"])
    def test_a_wrong_secret_gets_none(self, secret: str) -> None:
        """Any text that JSON can spell may come, half surrogate pairs included."""
        assert GUARDED.login(None, secret, NOW) is None

    def test_no_placeholder_for_a_placeholder(self) -> None:
        """A login needs the key itself: else a placeholder could be renewed for ever, with its key withdrawn."""
        placeholder = GUARDED.login(None, WRITER, NOW)
        assert placeholder is not None
        assert GUARDED.login(None, placeholder, NOW) is None

    def test_it_counts_as_its_key(self) -> None:
        """The rights are the key's: what may only read stays so."""
        for key in KEYS:
            fields = {"Authorization": f"Bearer {GUARDED.login(key.name, '', NOW)}"}
            assert Admission(key.name, key.read_only) == admit(GUARDED, fields)
        assert "read-only" == verdict(
            GUARDED, {"Authorization": f"Bearer {GUARDED.login(KEYS[1].name, '', NOW)}"}, "POST"
        )

    def test_it_lives_as_long_as_the_login_says(self) -> None:
        """To the second, and no longer."""
        fields = {"Authorization": f"Bearer {GUARDED.login(None, WRITER, NOW)}"}
        for age in (-3600, 0, PLACEHOLDER_LIFETIME - 1):
            assert "admitted" == verdict(GUARDED, fields, now=NOW + age)
        for late in (0.0, 0.1, 3600.0):
            assert "client-key-required" == verdict(GUARDED, fields, now=NOW + PLACEHOLDER_LIFETIME + late)

    def test_it_outlives_a_restart_but_not_its_key(self) -> None:
        """Nothing is remembered: any proxy with the same key takes it, one with another key of that name doesn't."""
        fields = {"X-Proxy-Key": str(GUARDED.login(None, WRITER, NOW))}
        assert "admitted" == verdict(Gate(upstream_host="x", keys=KEYS[:1]), fields)
        for keys in (KEYS[1:], (ClientKey.of("writer", "k-renewed-0123456789"),)):
            assert "client-key-required" == verdict(Gate(upstream_host="x", keys=keys), fields)

    def test_it_is_bound_to_the_name(self) -> None:
        """Even where two names had one key, a placeholder of the lesser could not be turned into one of the other."""
        lesser, greater = ClientKey.of("a", WRITER, read_only=True), ClientKey.of("b", WRITER)
        token = str(Gate(upstream_host="lab.metquay.co", keys=(lesser,)).login("a", "", NOW)).replace(
            "local.a.", "local.b."
        )
        assert "client-key-required" == verdict(Gate(upstream_host="x", keys=(greater,)), {"X-Proxy-Key": token})

    def test_forged(self) -> None:
        """Another name, another expiry, a cut, prolonged, missing or respelled signature: no key."""
        _, name, expiry, signature = GUARDED.login(KEYS[1].name, "", NOW).split(".")
        parts = {
            "n": name,
            "e": expiry,
            "s": signature,
            "later": int(expiry) + 1,
            "nines": "9" * 16,
            "many": "9" * 5000,
        }
        parts |= {"cut": signature[:-1], "upper": signature.upper(), "zeros": "0" * 64, "back": signature[::-1]}
        for token in FORGED.format(**parts).split():
            assert "client-key-required" == verdict(GUARDED, {"Authorization": basic(token)}), token

    @given(st.integers(0, 140), st.characters(max_codepoint=255))
    @settings(deadline=None)
    def test_every_changed_character_is_noticed(self, index: int, character: str) -> None:
        """A placeholder with one character changed is none, unless it is still the same."""
        placeholder = GUARDED.login(KEYS[0].name, "", NOW)
        index %= len(placeholder)
        changed = placeholder[:index] + character + placeholder[index + 1 :]
        expected = "admitted" if changed == placeholder else "client-key-required"
        assert expected == verdict(GUARDED, {"X-Proxy-Key": changed})


class TestKeysThatEnd:
    def test_who_was_admitted_by_one(self) -> None:
        """That one may ask for nothing more, also where another key has its name now; others, and nobody, may."""
        gate = Gate(upstream_host="lab.metquay.co", keys=KEYS)
        admissions = [admit(gate, {"X-Proxy-Key": key}) for key in (WRITER, READER)]
        for admission in (*admissions, Admission()):
            gate.demand(admission)
        ended = KEYS[0].name
        gate.replace_keys((ClientKey.of(ended, "another-key-of-24-letters"), *KEYS[1:]))
        verdicts = []
        for admission in (*admissions, Admission()):
            try:
                gate.demand(admission)
                verdicts.append("admitted")
            except ProxyError as error:
                verdicts.append(error.slug)
        expected = [
            "client-key-required" if each.client == ended else "admitted" for each in (*admissions, Admission())
        ]
        assert expected == verdicts
        assert "client-key-required" in verdicts


class TestReadOnly:
    @pytest.mark.parametrize("method", WRITES)
    @pytest.mark.parametrize("path", ["/customers", "/FlexicalERP/x", "/authenticate/x", "/-x"])
    def test_writes(self, method: str, path: str) -> None:
        """Any other method is refused, pass-through included, and the text says which rule did it."""
        for judge, fields, why in (
            (GUARDED, {"X-Proxy-Key": READER}, 'the client key "reader" may only read'),
            (READING, {}, "METQUAY_READ_ONLY is set"),
            (GUARDED_READING, {"X-Proxy-Key": WRITER}, "METQUAY_READ_ONLY is set"),
        ):
            with pytest.raises(ProxyError, match=f"^{method} was refused, because {why}") as caught:
                admit(judge, fields, method, path)
            assert (403, "read-only") == (caught.value.status, caught.value.slug)


class TestTrace:
    def test_trace_is_never_sent(self) -> None:
        """Its answer repeats the request's head, and would show the tool the token."""
        for judge, fields in ((OPEN, {}), (GUARDED, {"X-Proxy-Key": WRITER})):
            with pytest.raises(ProxyError, match="TRACE") as caught:
                admit(judge, fields, "TRACE")
            assert (405, "method-not-allowed", "no") == (caught.value.status, caught.value.slug, caught.value.sent)
            assert (("Allow", "GET, HEAD, OPTIONS, POST, PUT, PATCH, DELETE"),) == caught.value.headers


class TestIsOurs:
    def test_ours(self) -> None:
        """A key or placeholder, live or not, in whatever place, never leaves the machine with a pass-through."""
        gone = ClientKey.of("gone", "k-gone-0123456789")
        before = Gate(upstream_host="lab.metquay.co", keys=(gone,))
        placeholders = [GUARDED.login(None, WRITER, NOW - age) for age in (0, 5000)] + [before.login("gone", "", NOW)]
        for secret in (WRITER, READER, "held-by-metquay-proxy", *placeholders):
            for value in (secret, f"Bearer {secret}", f"bearer   {secret}", f"anything {secret}", basic(secret)):
                assert GUARDED.is_ours(value, NOW), value
        assert GUARDED.is_ours(basic("", user=READER), NOW)
        assert GUARDED.is_ours(basic("x", user=READER), NOW)

    def test_the_tools_own(self) -> None:
        """Anything else is the tool's own, for the server behind the pass-through."""
        token, password = "Bearer eyJhbGciOiJIUzI1NiJ9.e30.x", basic("password", user="local.admin")
        for value in (None, "", "Bearer", token, "Bearer local.machine", password, "Basic \xe9", "Negotiate YII="):
            assert not GUARDED.is_ours(value, NOW), value
        assert not GUARDED.is_ours(basic(f"x:{WRITER}"), NOW)

    def test_without_keys(self) -> None:
        """Placeholders of earlier days are known by their shape; keys that are none are not."""
        assert PRIVATE.is_ours("Bearer held-by-metquay-proxy", NOW)
        assert PRIVATE.is_ours(f"Bearer {GUARDED.login(KEYS[0].name, '', NOW)}", NOW)
        assert not PRIVATE.is_ours(f"Bearer {WRITER}", NOW)


def test_the_gate_remembers_no_more_than_it_must() -> None:
    """Hosts that were read are remembered, few of them and none that is long."""
    tracemalloc.start()
    try:
        for number in range(300):
            verdict(PRIVATE, {"Host": f"{number}{'x' * 290}"})
            verdict(PRIVATE, {"Host": f"{number}{'x' * 9000}"})
        assert tracemalloc.get_traced_memory()[0] < 150_000
    finally:
        tracemalloc.stop()


def test_other_keys() -> None:
    """A key that is gone, or is another one under the same name, ends with its placeholder; the others go on."""
    kept, gone, changed = (ClientKey.of(name, f"key-of-{name}-0123456789") for name in ("kept", "gone", "changed"))
    gate = Gate(upstream_host="lab.metquay.co", keys=(kept, gone, changed), read_only=True)
    placeholders = {key.name: gate.login(key.name, "", NOW) for key in (kept, gone, changed)}
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
    a, b = (admit(gate, {"X-Proxy-Key": key}) for key in (WRITER, READER))
    assert a.scope not in {None, b.scope}
    assert admit(PRIVATE, {}).scope is None
    gate.replace_keys((ClientKey.of("a", "another-key-0123456789"),))
    assert a.scope != admit(gate, {"X-Proxy-Key": "another-key-0123456789"}).scope
    assert WRITER not in (a.scope or "")
    assert "scope" not in repr(a)
