from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metquay_proxy.rules.credentials import (
    AccessToken,
    Credentials,
    CredentialsRejected,
    LoginBusy,
    LoginFailed,
    oddities,
    parse_login,
)

KINDS = ("bearer", "Bearer", "BEARER", None)


def answer(**fields: object) -> bytes:
    """A login's good answer, but for ``fields``; None leaves one out."""
    fields = {"accessToken": "abc.def-_~+/==", "tokenType": "bearer", "expiresIn": 600, **fields}
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def test_a_good_answer() -> None:
    """The vendor's answer becomes a token that begins when it was asked for."""
    token = parse_login(200, answer(), 50.0)
    assert AccessToken("abc.def-_~+/==", 50.0, 600.0) == token
    assert b"Authorization: Bearer abc.def-_~+/==\r\n" == token.authorization


@pytest.mark.parametrize(
    ("statuses", "asked", "kind", "pause", "told"),
    [
        ((400, 401, 403), 5, CredentialsRejected, 60, "refused the key pair"),
        ((429, 500, 503, 599), None, LoginBusy, 0, r"\d\.$"),
        ((429, 500, 503, 599), 60, LoginBusy, 60, "to wait 60 s"),
        ((429, 500, 503, 599), 3600, LoginBusy, 300, "to wait 3600 s"),
        ((100, 199, 300, 302, 404, 422, 600), 5, LoginFailed, 0, "status"),
    ],
)
def test_what_a_status_means(
    statuses: tuple[int, ...], asked: float | None, kind: type[LoginFailed], pause: float, told: str
) -> None:
    """Whatever else the answer holds. The pause that a busy login asks for is believed up to 300 s."""
    for status in statuses:
        with pytest.raises(LoginFailed, match=told) as failed:
            parse_login(status, answer(), 0, pause=asked)
        assert (kind, pause) == (failed.type, failed.value.pause)
        assert f"status {status}" in str(failed.value)


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("https://eu.example/v1/authenticate", "authenticate. METQUAY_HOST should probably be https://eu.example/v1."),
        ("https://me:hunter2@eu.example/v1/authenticate?a=hunter2#hunter2", "probably be https://eu.example/v1."),
        ("http://eu.metquay.co/authenticate", "probably be https://eu.metquay.co."),
        ("http://127.0.0.1:8/authenticate", "probably be http://127.0.0.1:8."),
        ("https://eu.metquay.co/api/v1/authenticate/", "probably be https://eu.metquay.co/api/v1."),
        ("https://sso.lab.example/login;id=hunter2?to=hunter2", "to https://sso.lab.example. That is a web page"),
        ("https://sso.lab.example", "to https://sso.lab.example. That is a web page"),
        ("https://me:hunter/2@sso.lab.example/authenticate", "without a new address. Check METQUAY_HOST."),
        ("https://sso.lab.\u00fc\x1b2J.example", "to https://sso.lab.??2J.example. That"),
        ("https://" + "a" * 999, "to https://" + "a" * 192 + ". That"),
        ("", "without a new address. Check METQUAY_HOST."),
        ("https://[hunter2", "without a new address. Check METQUAY_HOST."),
    ],
)
def test_a_redirect(location: str, told: str) -> None:
    """Where it points is told, without anything that may be secret or unprintable, and what METQUAY_HOST may be."""
    with pytest.raises(LoginFailed) as failed:
        parse_login(302, answer(), 0, location=location)
    assert "(status 302) " in str(failed.value)
    assert told in str(failed.value)
    assert "hunter2" not in str(failed.value)
    assert str(failed.value).isascii()
    assert str(failed.value).isprintable()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html><body>Sign in to the hotel's network</body></html>", b"\xff\xfe\xfd", b"[" * 100_000),
        *(b"[]", b"null", b'"token"', b"{}"),
        b'{"accessToken": "abc", "expiresIn": ' + b"9" * 5000 + b"}",  # more digits than Python reads
        *(answer(accessToken=token) for token in (None, "", 5, ["abc"], "a b", "abc\n", "abc\x7f", "abc\r\nEvil: 1")),
        *(answer(accessToken=token) for token in ("t\u00f6ken", "a" * 16_385)),
        *(answer(tokenType=kind) for kind in ("mac", "", 1)),
    ],
)
def test_malformed_answers_fail(body: bytes) -> None:
    """What is not a bearer token that fits in a header is a failure that may pass, and its text quotes nothing."""
    with pytest.raises(LoginFailed) as failed:
        parse_login(200, body, 0)
    assert LoginFailed is failed.type
    assert "abc" not in str(failed.value)


@pytest.mark.parametrize("fields", [{"accessToken": "a" * 16_384}, *({"tokenType": kind} for kind in KINDS)])
def test_odd_answers_that_are_good(fields: dict[str, object]) -> None:
    """16 KiB of token; bearer in any case (RFC 6749), or no type at all."""
    assert 600.0 == parse_login(201, answer(**fields), 0).lifetime


@pytest.mark.parametrize(
    ("expires_in", "lifetime"),
    [
        *((text, float(text)) for text in ("1", "3", "899.5", "86400")),
        *((text, 900.0) for text in ("null", "0", "0.5", "-1", "86401", "1e400", "1" + "0" * 400, "NaN")),
        *((text, 900.0) for text in ("Infinity", '"600"', "true", "[600]")),
    ],
)
def test_lifetimes(expires_in: str, lifetime: float) -> None:
    """A lifetime between a second and a day is believed, any other taken for the documented 900 s."""
    body = f'{{"accessToken": "abc", "tokenType": "bearer", "expiresIn": {expires_in}}}'.encode()
    assert lifetime == parse_login(200, body, 0).lifetime


@settings(max_examples=50, deadline=None)
@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("bearer"),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["accessToken", "tokenType", "expiresIn"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
@pytest.mark.slow
def test_any_answer(body: bytes) -> None:
    """Whatever comes, it is a token that a header can hold with a sane lifetime, or a failure."""
    try:
        token = parse_login(200, body, 0)
    except LoginFailed:
        return
    assert 1 <= token.lifetime <= 86_400
    assert len(token.authorization.split()) == 3


def test_nothing_prints_secrets() -> None:
    """Neither the keys nor the token show in a repr, a text or a list of them."""
    shown = f"{Credentials('ACCESS', 'SECRET', ('REMARK',))} {[AccessToken('TOKEN', 5.0, 900.0)]}"
    assert "[AccessToken(obtained_at=5.0, lifetime=900.0)]" in shown
    assert not re.search("ACCESS|SECRET|TOKEN", shown)


@pytest.mark.parametrize(("now", "usable"), [(99.9, False), (100.0, True), (399.9, True), (400.0, False), (1e9, False)])
def test_a_token_lives_from_its_grant_to_its_end(now: float, usable: bool) -> None:  # noqa: FBT001 - a column
    """Before its grant (a clock that was set back) its age is unknown; its end is no part of its life."""
    assert usable is AccessToken("T", 100.0, 300.0).usable(now)


def test_grants_are_told_apart() -> None:
    """The same text granted again is another token: a late 401 for the old one says nothing about it."""
    assert AccessToken("T", 5.0, 900.0) != AccessToken("T", 6.0, 900.0)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        *((key, "") for key in ("access-key-AAAA", "s3cr3t/with+signs==", "a#b", "Ab.~_-:;!$%&9", "key==")),
        *((key, "has quotation marks") for key in ('"4711"', "'4711'", "“4711”", "„4711“", "«4711»", "`4711`")),
        *((key, "has quotation marks") for key in ('"4711', "4711'", "4711”", '""4711""')),
        *((key, "is followed by a comment") for key in ("4711 # production", "4711\t#2")),
        *((key, "contains a name") for key in ("METQUAY_SECRET_KEY=4711", "export SECRET_KEY=4711", "secretKey: 4711")),
        *((key, "contains a name") for key in ("$env:METQUAY_ACCESS_KEY=4711", "set ACCESS_KEY=4711")),
        *((key, "contains a space") for key in ("47 11", "47\t11")),
        *((key, "contains an accent") for key in ("47é11", "47–11", "47\u200b11")),  # noqa: RUF001
        *(
            (key, "seems to be a placeholder")
            for key in ("...", "…", "***", "xxx", "XX-XX", "your-key-here", "your_key_x")
        ),
        *(
            (key, "seems to be a placeholder")
            for key in ("<access key>", "[key]", "{{ .Values.k }}", "$KEY", "${KEY:-}", "%K%")
        ),
        *(
            (key, "seems to be a placeholder")
            for key in ("changeme", "CHANGE-ME", "choose-a-long-key", "access-key", "put your key here", "null")
        ),
    ],
)
def test_what_looks_wrong_about_a_key_is_said_without_it(key: str, words: str) -> None:
    """As people copy it: with its quotation marks, its line, or not at all."""
    said = oddities(key)
    assert words == said[: len(words)]
    assert bool(words) == bool(said)
    assert "4711" not in said


def test_all_that_looks_wrong_about_a_key_is_said() -> None:
    """What one fault explains does not count as another."""
    said = oddities("SECRET_KEY='4711' # why")
    assert ["followed", "contains", "quotation"] == re.findall("followed|contains|space|quotation", said)


def test_what_looks_wrong_about_a_pair_is_said() -> None:
    """Each key by its variable, then whether both are the same; where they were found stands first."""
    assert () == Credentials("access-4711", "secret-4711").doubts()
    pair = Credentials("<key>", "secret-4711'", ("it is found twice",))
    found, access_key, secret_key = pair.doubts()
    assert "it is found twice" == found
    assert "METQUAY_ACCESS_KEY seems to be a placeholder: replace it with the key" == access_key
    assert secret_key.startswith("METQUAY_SECRET_KEY has quotation marks")
    assert 2 == len(Credentials("<key>", "<key>").doubts())
    (same,) = Credentials("secret-4711", "secret-4711").doubts()
    assert same.startswith("METQUAY_ACCESS_KEY and METQUAY_SECRET_KEY are the same key")
    assert "secret-4711" not in f"{pair!r}{same}"
