from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metquay_proxy.rules.faults import broken_body, head_fault, request_fault

H = b"\r\nHost: x"
END = b"\r\n\r\n"
FAULTS = [
    (
        "bad-request",
        "the tool uses https, but this proxy uses http",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ),
    ("bad-request", "begins with HTTP/2", b"PRI * HTTP/2.0\r\n\r\n"),
    ("bad-request", "SOCKS", b"\x05\x01\x00"),
    ("bad-request", "SOCKS", b"\x04\x01\x00\x50"),
    ("bad-request", "only CR or only LF", b"GET /x HTTP/1.1\nHost: x\n\n"),
    ("bad-request", "only CR or only LF", b"GET /x HTTP/1.1" + H + b"\r\nA: b\rC: d" + END),
    ("bad-target", "a space, which must be written %20", b"GET /customers?name=ACME Ltd HTTP/1.1" + H + END),
    ("bad-target", "a space, which must be written %20", b"GET /a b"),
    ("bad-target", "\xe9, which must be written %C3%A9", "GET /caf\xe9 HTTP/1.1\r\nHost: x\r\n\r\n".encode()),
    ("bad-target", "UTF-8 and percent-encoded (%C3%A9 for \xe9)", b"GET /caf\xe9 HTTP/1.1" + H + END),
    ("bad-target", "a control character, which must be written %0B", b"GET /\x0b HTTP/1.1" + H + END),
    ("bad-target", "a control character, which must be written %C2%9B", b"GET /\xc2\x9b HTTP/1.1" + H + END),
    ("bad-target", "a number sign (#), which must be written %23", b"GET /#1 HTTP/1.1" + H + END),
    ("bad-request", "method, one space, address", b"GET" + H + END),
    ("bad-request", "method, one space, address", b"GET /customers" + H + END),
    ("bad-request", "method, one space, address", b"GET  /customers HTTP/1.1" + H + END),
    ("bad-request", "method, one space, address", b"GET /customers  HTTP/1.1" + H + END),
    ("bad-request", "method, one space, address", b"GET /customers HTTP/1.1 " + H + END),
    ("bad-request", "method, one space, address", b"/customers HTTP/1.1" + H + END),
    ("bad-request", "method, one space, address", b" GET /customers HTTP/1.1" + H + END),
    ("bad-request", "this proxy supports only HTTP/1.1 and HTTP/1.0", b"GET / HTTP/1.2" + H + END),
    ("bad-request", "this proxy supports only HTTP/1.1 and HTTP/1.0", b"GET / http/1.1" + H + END),
    ("not-supported", "does not begin with a method that this proxy knows, so", b"BREW / HTTP/1.1" + H + END),
    ("not-supported", "Methods are written in capitals (GET)", b"get /"),
    ("not-supported", "does not begin with a method that this proxy knows", b"NONSENSE\r\n\r\n"),
    ("not-supported", "the request before it longer than its Content-Length", b"a-secretGET / HTTP/1.1" + H + END),
    ("bad-request", "line 3 has a space before its colon", b"GET / HTTP/1.1" + H + b"\r\na-secret : x" + END),
    ("not-supported", "longer than its Content-Length says?", b'{"secretKey":"a-secret-key-of-18"}'),
    ("not-supported", "does not begin with a method that this proxy knows", b"a-secret-key-of-18"),
    (
        "not-supported",
        "does not begin with a method that this proxy knows",
        b"a-secret-key-of-18 /x HTTP/1.1" + H + END,
    ),
    ("bad-request", "line 3 begins with a space or a tab", b"GET / HTTP/1.1" + H + b"\r\n folded" + END),
    ("bad-request", "line 3 is not a field", b"GET / HTTP/1.1" + H + b"\r\nSecret text" + END),
    ("bad-request", "line 3 is not a field", b"GET / HTTP/1.1" + H + b"\r\nSecret\x01text: y" + END),
    ("bad-request", "line 3 is not a field", b"GET / HTTP/1.1" + H + b"\r\n: y" + END),
    ("bad-request", "line 2 is not a field", b"GET / HTTP/1.1\r\nH(st"),
    ("bad-request", "line 3 has a space before its colon", b"GET / HTTP/1.1" + H + b"\r\nx-tool : y" + END),
    (
        "bad-request",
        "the value in line 3 contains a control character",
        b"GET / HTTP/1.1" + H + b"\r\nX-Tool: \0" + END,
    ),
    (
        "bad-request",
        "it has more than one Content-Type field",
        b"PUT / HTTP/1.1" + H + b"\r\nContent-Type: a" * 2 + END,
    ),
    ("bad-request", "it has more than one User-Agent field", b"GET / HTTP/1.1" + H + b"\r\nuser-agent: a" * 2 + END),
    ("bad-request", "it has more than one Host field", b"GET / HTTP/1.1" + H + H + END),
    ("bad-request", "method, one space, address", b""),
    ("bad-request", "no Host field", b"GET / HTTP/1.1" + END),
    ("bad-request", "no Host field", b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked" + END),
    ("bad-request", "not allowed in HTTP/1.0", b"PUT / HTTP/1.0\r\nTransfer-Encoding: chunked" + END),
    (
        "bad-request",
        "both Content-Length and Transfer-Encoding",
        b"PUT / HTTP/1.1" + H + b"\r\nContent-Length: 1\r\nTransfer-Encoding: chunked" + END,
    ),
    (
        "not-supported",
        "Only the transfer encoding chunked",
        b"PUT / HTTP/1.1" + H + b"\r\nTransfer-Encoding: gzip" + END,
    ),
    ("bad-request", "not a plain number", b"PUT / HTTP/1.1" + H + b"\r\nContent-Length: +1" + END),
    ("bad-request", "no Host field", b"CONNECT lab.metquay.co:443 HTTP/1.1" + END),
    ("not-supported", "no tunnels", b"CONNECT lab.metquay.co:443 HTTP/1.1" + H + END),
    ("bad-request", "method, one space, address", b"GET / HTTP/1.1" + H + END),
    ("not-supported", "a method that this proxy knows", b"BREW / HTTP/1.1" + H + b"\r\nHalf"),
]


@pytest.mark.parametrize(("slug", "text", "head"), FAULTS, ids=range(len(FAULTS)))
def test_what_is_wrong_with_a_request(slug: str, text: str, head: bytes) -> None:
    """Each fault of a head has a sentence of its own, which is true, and no value of a field stands in it."""
    fault = request_fault(head, large=False)
    assert (slug, "no") == (fault.slug, fault.sent)
    assert text in fault.message
    assert ("https" in fault.message) == head.startswith(b"\x16")
    assert "Secret" not in fault.message


@pytest.mark.parametrize(
    ("slug", "head"),
    [
        ("head-too-large", b"GET /aaaa"),
        ("head-too-large", b"GET /a b HTTP/1.1\r\n" + H + END),
        ("bad-request", b"GET / HTTP/1.1\r\nA: \0aaaa"),
        ("bad-request", b"GET / HTTP/1.1\nA: aaaa"),
        ("not-supported", b"BREW / HTTP/1.1"),
        ("bad-request", b"\x16"),
        ("bad-request", b"/"),
    ],
)
def test_too_large(slug: str, head: bytes) -> None:
    """A head beyond the bounds is told so, unless a fault that came before it shows that it is none."""
    fault = request_fault(head, large=True)
    assert slug == fault.slug
    assert ("64 KiB for the first line, 128 KiB and 128 fields" in fault.message) == (slug == "head-too-large")


def test_what_is_right() -> None:
    """Fields that HTTP allows have no fault."""
    for judged in ({b"host": b"x", b"content-length": b"0"}, {b"host": b"", b"transfer-encoding": b"CHUNKED"}):
        assert head_fault(1, judged) is None
    assert head_fault(0, {b"accept": None}) is None


def test_broken_body() -> None:
    """A body that breaks off or is malformed has one sentence, which says what to do."""
    assert ("bad-request", True) == (broken_body().slug, "Correct the tool" in broken_body().message)


@settings(deadline=None, max_examples=60)
@given(
    st.binary(max_size=200) | st.lists(st.sampled_from([head for *_, head in FAULTS if len(head) < 200]), max_size=3),
    st.booleans(),
)
def test_every_refused_head_has_a_sentence(head: bytes | list[bytes], large: bool) -> None:  # noqa: FBT001 - drawn
    """Whatever came, the sentence is short and has nothing in it that a terminal would obey."""
    message = request_fault(head if isinstance(head, bytes) else b"".join(head), large=large).message
    assert message.isprintable()
    assert len(message) < 400
