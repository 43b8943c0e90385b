"""What is wrong with a request that was refused, in words for people.

Owns the texts about heads and bodies that are no HTTP/1.1, and what HTTP asks of the fields of a request. Must not read
messages: that is ``http1``'s, which asks here once it has refused one. No value of a field is ever quoted: it may be a
secret, or what is taken for a head may be a part of somebody's body.

Facts, RFC 9112 unless said otherwise: 2.2 (CR or LF alone), 3 (the request line), 3.2 (Host), 5.1 and 5.2 (no blank
before the colon, no folded lines), 6.1 and 6.3 (framing that two readers could take for two things); RFC 9110 section
9.1 (methods are case-sensitive). The methods are those that llhttp knows for HTTP.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.headers import NAMES, RequestFields
from metquay_proxy.rules.target import forbidden

if TYPE_CHECKING:
    from collections.abc import Mapping

METHODS: Final = (
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "ACL", "BIND", "CHECKOUT", "COPY", "LINK"),
    *("LOCK", "M-SEARCH", "MERGE", "MKACTIVITY", "MKCALENDAR", "MKCOL", "MOVE", "NOTIFY", "PROPFIND", "PROPPATCH"),
    *("PURGE", "QUERY", "REBIND", "REPORT", "SEARCH", "SOURCE", "SUBSCRIBE", "UNBIND", "UNLINK", "UNLOCK"),
    "UNSUBSCRIBE",
)
"""Those that may be forwarded, the usual ones first. CONNECT is known too, and always refused."""
BEGUN: Final = re.compile(rb"(?:%b|CONNECT) |[A-Za-z-]{0,20}+\Z" % "|".join(METHODS).encode())
"""How a request begins: what begins in another way is refused at once, since the end of a head may never come."""
FOUL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)|(?<!\r)\n")
"""What no head may hold, of a request or an answer: control characters, and CR or LF alone."""
TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"

_KNOWN: Final = frozenset({*METHODS, "CONNECT"})
_WORD: Final = re.compile(rb"[^ \r\n]*+")
_ASKED: Final = re.compile(rb"[^ ]++ ([^ ](?:.*?[^ ])??)(?: ++([A-Za-z]++/[0-9][^ ]*+) *+)?", re.DOTALL)
_NAMED: Final = re.compile(rb"(" + TOKEN + rb")([ \t]*+):(.*+)", re.DOTALL)
_LENGTH: Final = re.compile(rb"0|[1-9][0-9]{0,17}+")
_OTHER_PROTOCOLS: Final = (
    ((b"\x16",), "the tool uses https, but this proxy uses http. Write http:// in the tool's settings"),
    ((b"PRI ",), "the tool begins with HTTP/2, and this proxy speaks HTTP/1.1. Switch HTTP/2 off in the tool"),
    (
        (b"\x04", b"\x05"),
        "the tool uses this proxy as a SOCKS proxy. Enter it as the address of the API instead: http://host:port",
    ),
)
_FORM: Final = "its first line must be method, one space, address, one space, version, as in GET /customers HTTP/1.1"
CRLF: Final = b"\r\n"
BLANK_LINE: Final = b"\r\n\r\n"


def broken_body() -> ProxyError:
    """Return the refusal of a body that ended too soon, or whose chunks are malformed."""
    why = "The body of this request ended too early, or its chunks were not valid HTTP. Correct the tool, or try again."
    return ProxyError("bad-request", why)


def head_fault(  # noqa: PLR0911 - one return for each kind of error
    minor: int, judged: Mapping[bytes, bytes | None]
) -> ProxyError | None:
    """Return what speaks against the fields of an HTTP/1.``minor`` request whose lines are in order.

    ``judged`` is as in ``RequestFields``.
    """
    for name, value in judged.items():
        if value is None and name in NAMES.once:
            return _bad_request(f"it has more than one {name.decode().title()} field. Send only one")
    coding, length = judged.get(b"transfer-encoding"), judged.get(b"content-length")
    if coding is not None:
        if not minor:
            return _bad_request("Transfer-Encoding is not allowed in HTTP/1.0")
        if length is not None:
            return _bad_request("it has both Content-Length and Transfer-Encoding. Send one of them")
        if coding.lower() != b"chunked":
            why = "Only the transfer encoding chunked is supported, so nothing was sent."
            return ProxyError("not-supported", why)
    if length is not None and not _LENGTH.fullmatch(length):
        return _bad_request(
            "its Content-Length is not a plain number (at most 18 digits, without sign or leading zeros)"
        )
    if minor and b"host" not in judged:
        return _bad_request("it has no Host field, which HTTP/1.1 requires")
    return None


def request_fault(head: bytes, *, large: bool) -> ProxyError:
    """Return what is wrong with a head that was refused, or with as much of it as came, and how to mend it.

    ``large``: it goes beyond a bound. What comes first decides, so that it makes no difference in which pieces it came.
    """
    for starts, why in _OTHER_PROTOCOLS:
        if head.startswith(starts):
            return _bad_request(why)
    foul = FOUL.search(head)
    head = head if foul is None else head[: foul.end()]
    line, ended, rest = head.partition(CRLF)
    asked = _ASKED.fullmatch(line)
    method = _WORD.findall(head)[0].decode("latin-1")
    begun = BEGUN.match(head)
    if not begun and method and method not in _KNOWN and not method.startswith("/"):
        return _unknown_method(method)
    if foul is not None and foul[0] in CRLF:
        return _bad_request("one of its lines ends with only CR or only LF; it must end with CR LF")
    if begun and large and foul is None:
        bounds = "64 KiB for the first line, 128 KiB and 128 fields in all"
        why = f"The address and headers of this request are too large (at most {bounds}). Nothing was sent."
        return ProxyError("head-too-large", f"{why} Send fewer or shorter ones.")
    if not begun or asked is None:
        return _bad_request(_FORM)
    whole = head.endswith(BLANK_LINE)
    fault = _line_fault(asked, ended=bool(ended)) or _lines_fault(rest.split(CRLF), whole=whole)
    if fault is None and whole:
        fault = head_fault(int(asked[2] != b"HTTP/1.0"), RequestFields(head[len(line) : -len(BLANK_LINE)]).judged)
    if fault is None and method == "CONNECT":
        why = "This proxy opens no tunnels (CONNECT). Enter it in the tool as the address of the API, not as a proxy."
        fault = ProxyError("not-supported", why)
    return fault or _bad_request(_FORM)


def _line_fault(asked: re.Match[bytes], *, ended: bool) -> ProxyError | None:
    fault = forbidden(asked[1].decode("utf-8", "surrogateescape"))
    if fault is None and ended and asked[2] is None:
        return _bad_request(_FORM)
    if fault is None and ended and asked[2] not in {b"HTTP/1.0", b"HTTP/1.1"}:
        return _bad_request("this proxy supports only HTTP/1.1 and HTTP/1.0")
    return fault


def _lines_fault(lines: list[bytes], *, whole: bool) -> ProxyError | None:
    for number, text in enumerate(lines, 2):
        if text[:1] in {b" ", b"\t"}:
            return _bad_request(f"line {number} begins with a space or a tab, but each field must be on one line")
        field = _NAMED.fullmatch(text)
        if field is None:
            if text and (whole or text is not lines[-1] or not re.fullmatch(TOKEN, text)):
                return _bad_request(f"line {number} is not a field (a name without spaces, a colon and a value)")
        elif field[2]:
            return _bad_request(f"line {number} has a space before its colon")
        elif FOUL.search(field[3]):
            return _bad_request(f"the value in line {number} contains a control character")
    return None


def _bad_request(why: str) -> ProxyError:
    return ProxyError("bad-request", f"This is not a valid HTTP request: {why}. Nothing was sent.")


def _unknown_method(method: str) -> ProxyError:
    """Say so, and show nothing of what nobody knows: it may be a part of a body, and hold a secret."""
    why = (
        f"Methods are written in capitals ({method.upper()}), so nothing was sent. Correct the tool."
        if method.upper() in _KNOWN
        else "This request does not begin with a method that this proxy knows, so nothing was sent. Correct the tool. "
        "Was the body of the request before it longer than its Content-Length says?"
    )
    return ProxyError("not-supported", why)
