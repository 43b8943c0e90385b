"""The strict reader of HTTP/1 answers, of a request's chunks and of plain reads: heads and framing, as bytes.

It also says what is wrong with a request's head that was refused.

Owns the judgement of what an upstream sent: which bytes are the head, which the body, whether the answer ended and
whether its connection may be used again. Must not do I/O, know asyncio or rewrite anything: fields are handed on in
their order, case and bytes. A doubtful answer is refused, never repaired, since whoever reads it next may repair it
another way (RFC 9112 sections 11.1 and 11.2).

Facts, RFC 9112 unless said otherwise:

* 2.2: lines end with CRLF. A recipient *may* take a bare LF, and must not let a bare CR pass: both are refused here,
  and so is an empty line before the status line, which only a server is asked to ignore.
* 2.3, 4: the version is case-sensitive; three digits of status; the reason may be empty, and its space be missing.
* 5.1, 5.2: no space before the colon; a proxy answers a folded line with 502. RFC 9110 5.1, 5.5, 5.6.2: names are
  tokens; CR, LF and NUL in a value are dangerous, and the other controls, but for HTAB, invalid.
* 6.1: Transfer-Encoding overrides Content-Length, may be an attack beside it, and is a fault in HTTP/1.0.
* 6.3: no body follows HEAD, 1xx, 204 and 304, whatever their fields say, nor a 2xx to CONNECT, whose framing fields
  must be ignored (also RFC 9110 9.3.6); an invalid Content-Length is answered with 502, and a list of equal values may
  be; with neither field the body lasts until the connection closes.
* 7.1: sizes are hexadecimal of any length, so that a reader must bound them; unknown extensions are ignored, in
  reasonable number; trailer fields may be dropped. RFC 9110 5.6.3: bad whitespace is parsed and dropped.
* 8: an answer that closes before its length, or before its last chunk, is incomplete.
* 7.1.1: old servers pad a chunk's size with blanks before its CRLF. RFC 2068 19.7.1: ``Keep-Alive: timeout=5`` is the
  time after which a server closes an idle connection; most servers still say it.
* 9.3, 9.6: what persists and what closes. RFC 9110 15.2: any number of interim answers may come before the final one,
  but HTTP/1.0 has none, and 101 is only for who asked for an upgrade, which this proxy never does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from metquay_proxy.rules.errors import ProxyError
from metquay_proxy.rules.target import bad_target, forbidden

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_LINE: Final = 64 * 1024
"""Bytes of a request's first line,"""
MAX_HEAD: Final = 128 * 1024
"""of its whole head,"""
MAX_FIELDS: Final = 128
"""and how many fields it may have."""

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_TEXT: Final = rb"[\t\x20-\x7e\x80-\xff]*+"
# Quantifiers of single characters are possessive: with backtracking a hostile line costs quadratic time. Those of
# groups are not, since CPython before 3.11.5 gets such wrong: no part of theirs can match in two ways, so that time
# stays linear.
_PLAIN_LINE: Final = re.compile(rb"(GET|HEAD) (/[\x21-\x7e]*+) HTTP/1\.1(?=\r\n)")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (" + _TEXT + rb"))?(?=\r\n)")
_FIELD: Final = re.compile(rb"\r\n(" + _TOKEN + rb"):[ \t]*+(" + _TEXT + rb")(?=\r\n)")
_TIDY_FIELD: Final = re.compile(_FIELD.pattern + rb"(?<![ \t])")
_FIELD_LINES: Final = re.compile(rb"(?:\r\n" + _TOKEN + rb":" + _TEXT + rb")*\r\n\r\n")
_NOTED: Final = re.compile(
    rb"\r\n(c(?:onnection|ontent-length|ache-control)|t(?:ransfer-encoding|e|railer)|location|x-request-id|"
    rb"www-authenticate|access-control-[^:]*+|keep-alive|upgrade|http2-settings|e(?:xpires|tag)|pragma|last-modified|"
    rb"proxy-(?:authenticate|authentication-info|connection)|retry-after):[ \t]*+([^\r]*+)"
)
_QUOTED: Final = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
_VALUE: Final = rb"[ \t]*+=[ \t]*+(?:" + _TOKEN + rb"|" + _QUOTED + rb")"
_EXTENSION: Final = rb"[ \t]*+;[ \t]*+" + _TOKEN + rb"(?:" + _VALUE + rb")?"
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15}+)(?:" + _EXTENSION + rb")*\r\n")
_PADDED_CHUNK_LINE: Final = re.compile(_CHUNK_LINE.pattern.replace(rb"\r\n", rb"[ \t]*+\r\n"))
"""Some old servers write blanks after the size. Of an answer they are read; whoever reads a request must be strict."""
_KEPT_FOR: Final = re.compile(rb"(?:\A|[,; \t])timeout[ \t]*+=[ \t]*+\"?([0-9]{1,9})(?![0-9])")
_FOUL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)|(?<!\r)\n")

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_ASKED: Final = re.compile(rb"[^ ]++ ([^ ](?:.*?[^ ])??)(?: ++([A-Za-z]++/[0-9][^ ]*+) *+)?", re.DOTALL)
_NAMED: Final = re.compile(rb"(" + _TOKEN + rb")([ \t]*+):(.*+)", re.DOTALL)
_LINE_END_ALONE: Final = re.compile(rb"\r(?!\n|\Z)|(?<!\r)\n")
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_REQUEST_LENGTH: Final = re.compile(rb"0|[1-9][0-9]{0,17}+")
_ONCE: Final = frozenset(
    b"host content-length transfer-encoding content-type user-agent content-location content-range etag max-forwards "
    b"server".split()
)
_OTHER_PROTOCOLS: Final = (
    ((b"\x16\x03",), "the tool speaks https where http is expected. Write http:// in the tool's settings"),
    ((b"PRI * HTTP/2",), "the tool begins with HTTP/2, and this proxy speaks HTTP/1.1. Switch HTTP/2 off in the tool"),
    ((b"\x04", b"\x05"), "the tool takes this for a SOCKS proxy. Enter it as the address of the API: http://host:port"),
)
_FORM: Final = "its first line must be method, one space, address, one space, version, as in GET /customers HTTP/1.1"

_START: Final = b"HTTP/1."
_CRLF: Final = b"\r\n"
_BLANK_LINE: Final = b"\r\n\r\n"
_SHORTEST_FIELD: Final = len(b"\r\na:")
_LAST_CHUNK: Final = b"0\r\n\r\n"
_MAX_CHUNK_LINE: Final = 4096
_MAX_LENGTH_DIGITS: Final = 18
_SWITCHING_PROTOCOLS: Final = 101
_SUCCESS: Final = range(200, 300)
_BODILESS: Final = frozenset({204, 304})
_NOTHING: Final[frozenset[bytes]] = frozenset()
_KEEP_ALIVE: Final = frozenset({b"keep-alive"})
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


class ProtocolError(Exception):
    """The upstream broke HTTP. The text is safe to show: of the answer it holds 16 bytes of the status line at most."""


class ClosedBeforeHead(ProtocolError):
    """The upstream closed before the first byte of an answer, as it does to a connection that idled too long."""


@dataclass(slots=True, repr=False)  # no repr, since field values can be secrets
class ResponseHead:
    """A final answer's head, and what it says about the body.

    ``lines`` holds its field lines as they came, each after its CRLF. ``noted`` are the fields of those names that
    somebody reads (``_NOTED``), names and values in lower case, in order. ``options`` are those of Connection.
    ``length`` is in bytes: None when chunked or until close, 0 without a body. ``no_body`` (HEAD, 204, 304, a 2xx to
    CONNECT): the framing fields are no statement about this body. ``keep_alive``: the connection may be used again
    after the body, unless the reader has seen surplus bytes.
    """

    status: int
    reason: bytes
    minor: int
    lines: bytes
    noted: list[tuple[bytes, bytes]]
    options: frozenset[bytes]
    length: int | None
    chunked: bool
    until_close: bool
    keep_alive: bool
    no_body: bool

    @classmethod
    def made(cls, status: int, reason: bytes, fields: list[tuple[bytes, bytes]], length: int | None) -> ResponseHead:
        """Make one that no upstream sent just now."""
        lines = b"".join(b"\r\n%b: %b" % field for field in fields)
        noted = noted_fields(lines)
        chunked = length is None
        return cls(status, reason, 1, lines, noted, _listed(noted), length, chunked, False, True, False)  # noqa: FBT003 - its fields in order

    @property
    def kept_for(self) -> float | None:
        """Seconds for which the upstream says that it keeps an idle connection (Keep-Alive)."""
        for name, value in self.noted:
            if name == b"keep-alive" and (timeout := _KEPT_FOR.search(value)):
                return float(timeout[1])
        return None

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Its fields, in order and case, values without the space around them."""
        return [(name, value.rstrip(b" \t")) for name, value in _FIELD.findall(self.lines + _CRLF)]


class ResponseReader:
    """Reads the one answer to a request of ``method`` from pieces of any size, in time linear in their bytes.

    ``head`` is None until the final head is whole. ``started``: some byte of an answer arrived. ``complete``: the
    answer ended cleanly. ``surplus``: bytes came after its end, so that the connection must never be used again.
    """

    __slots__ = (
        "_broken",
        "_buffer",
        "_interim",
        "_left",
        "_max_fields",
        "_max_head",
        "_method",
        "_trailers",
        "complete",
        "head",
        "started",
        "surplus",
    )

    def __init__(
        self, method: bytes | str, *, max_head: int = 131072, max_fields: int = 256, max_interim: int = 32
    ) -> None:
        """Set the bounds.

        ``max_head`` is for each head, and for the trailers, in bytes with the blank line; ``max_fields`` for the fields
        of each; ``max_interim`` for the 1xx answers before the final one.
        """
        self.head: ResponseHead | None = None
        self.started = False
        self.complete = False
        self.surplus = False
        self._buffer: bytearray | None = None
        self._left = 0
        self._trailers = False
        self._broken = False
        self._method = method.encode() if isinstance(method, str) else method
        self._max_head = max_head
        self._max_fields = max_fields
        self._interim = max_interim

    def feed(self, data: bytes) -> bytes:
        """Take the next piece, and return the bytes of the decoded body that it holds, maybe none.

        Bytes after the answer's end are ignored, and set ``surplus``. Raises ProtocolError for anything that breaks
        HTTP, and for every piece after that.
        """
        if not data:
            return b""
        self.started = True
        if self.complete:
            self.surplus = True
            return b""
        if self._broken:
            _refuse("the upstream's answer was refused already")
        self._broken = True  # stays so if the next line raises
        body = self._read_heads(data) if self.head is None else self._read_body(self.head, data, 0)
        self._broken = False
        return body

    def eof(self) -> None:
        """Note that the upstream closed, which completes a body that lasts until then.

        Raises ClosedBeforeHead when no byte of an answer had come, and ProtocolError when the answer was incomplete.
        """
        if self.complete:
            return
        if not self.started:
            text = "the upstream closed the connection before it answered"
            raise ClosedBeforeHead(text)
        if self.head is None:
            _refuse("the upstream closed the connection before the end of its answer's head")
        if self._broken or not self.head.until_close:
            _refuse("the upstream closed the connection before the end of its answer's body")
        self.complete = True

    def _read_heads(self, data: bytes) -> bytes:
        start = 0
        while True:
            block, start = self._take(data, start, _BLANK_LINE, self._max_head, "head")
            if not block:
                begun = bytes((self._buffer or b"")[:16])
                if not begun.startswith(_START[: len(begun)]):
                    _refuse(f"the upstream's answer is not HTTP/1: it begins with {begun!r}")
                return b""
            head = _parse_head(block, self._method, self._max_fields)
            if head is not None:
                self.head = head
                self._left = head.length or 0
                return self._read_body(head, data, start)
            if not self._interim:
                _refuse("the upstream sent too many interim answers")
            self._interim -= 1

    def _read_body(self, head: ResponseHead, data: bytes, start: int) -> bytes:
        if head.chunked:
            return self._read_chunks(data, start)
        if head.until_close:
            return data[start:]
        left = self._left - (len(data) - start)
        if left > 0:
            self._left = left
            return data[start:]
        self.complete = True
        if left == 0:
            return data[start:]
        self.surplus = True
        return data[start:left]

    def _read_chunks(self, data: bytes, start: int) -> bytes:
        pieces = []
        end = len(data)
        left = self._left  # of the chunk's data and of the CRLF after it
        while start < end:
            if left > len(_CRLF):
                piece = data[start : start + left - len(_CRLF)]
                pieces.append(piece)
                start += len(piece)
                left -= len(piece)
            elif left:
                if data[start] != _CRLF[-left]:
                    _refuse("the upstream's chunk does not end where its size says")
                start += 1
                left -= 1
            elif self._trailers:
                block, start = self._take(data, start, _BLANK_LINE, self._max_head, "trailer section")
                if block:
                    _check_fields(block, 0, self._max_fields)
                    self.complete = True
                    self.surplus = start < end
                    break
            elif data.startswith(_LAST_CHUNK, start) and self._buffer is None:
                self.complete = True
                self.surplus = start + len(_LAST_CHUNK) < end
                break
            else:
                size, start = self._read_size(data, start)
                left = size + len(_CRLF) if size else 0
        self._left = left
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_size(self, data: bytes, start: int) -> tuple[int, int]:
        """Return the next chunk's size in bytes, and where its line ends in ``data``; 0 also while it is not whole."""
        line = _PADDED_CHUNK_LINE.match(data, start, start + _MAX_CHUNK_LINE) if self._buffer is None else None
        if line is not None:
            start = line.end()
        else:
            text, start = self._take(data, start, _CRLF, _MAX_CHUNK_LINE, "chunk line")
            if not text:
                return 0, start
            line = _PADDED_CHUNK_LINE.match(text)
            if line is None:
                _refuse("a chunk size of the upstream's answer is malformed")
        size = int(line[1], 16)
        if not size:
            self._trailers = True
            # Trailers then look like fields after a status line, and none of them like a blank line.
            self._buffer = bytearray(_CRLF)
        return size, start

    def _take(self, data: bytes, start: int, mark: bytes, bound: int, what: str) -> tuple[bytes, int]:
        """Return the text that ends with ``mark``, and where that is in ``data``; ``b""`` while it is not whole."""
        buffer = self._buffer
        if buffer is None:
            end = data.find(mark, start, start + bound)
            if end >= 0:
                end += len(mark)
                return data[start:end], end
            buffer = self._buffer = bytearray()
        held = len(buffer)
        buffer += data[start : start + bound - held]
        end = buffer.find(mark, max(0, held - len(mark) + 1))
        if end >= 0:
            end += len(mark)
            self._buffer = None
            return bytes(buffer[:end]), start + end - held
        if len(buffer) >= bound:
            _refuse(f"the {what} of the upstream's answer is longer than {bound} bytes")
        # Else a line that ends wrongly would be waited for until a time-out.
        if _FOUL.search(buffer, max(0, held - 1)):
            _refuse(f"the {what} of the upstream's answer holds a control character, or a line that ends without CRLF")
        return b"", len(data)


class ChunkTracker:
    """Follows a chunked request body without decoding it, to find out where it ends.

    ``ended`` becomes true with the last byte of the body.
    """

    __slots__ = ("_left", "_line", "_max_fields", "_max_trailers", "_trailers", "ended")

    def __init__(self, *, max_trailers: int, max_fields: int) -> None:
        """``max_trailers`` bounds the trailer section in bytes, ``max_fields`` its fields."""
        self.ended = False
        self._left = 0  # of the chunk's data and of the CRLF after it
        self._line = b""
        self._trailers = False
        self._max_trailers = max_trailers
        self._max_fields = max_fields

    def scan(self, data: bytes, start: int) -> tuple[int, int]:
        """Follow the body from ``start``; return where its chunks end in ``data``, and where the scan ended.

        Between the two lie trailer fields and the CRLF that ends them. Takes time linear in ``data``. Raises
        ProtocolError.
        """
        upto = start
        while start < len(data) and not self.ended:
            if self._left:
                size = min(self._left, len(data) - start)
                self._left -= size
                start = upto = start + size
                continue
            end = data.find(b"\n", start, start + self._max_trailers) + 1
            if not end or self._line:
                self._line += data[start : end or len(data)]
                line = self._line
            else:
                line = data[start:end]
            if len(line) > (self._max_trailers if self._trailers else _MAX_CHUNK_LINE):
                _refuse("a chunk line or the trailers of the request are too long")
            start = end or len(data)
            if not self._trailers:
                upto = start
            if end:
                self._line = b""
                self._take_line(line)
        return upto, start

    def _take_line(self, line: bytes) -> None:
        if not self._trailers:
            size = _CHUNK_LINE.fullmatch(line)
            if size is None:
                _refuse("a chunk size of the request is malformed")
            self._left = int(size[1], 16)
            self._trailers = not self._left
            if self._left:
                self._left += len(_CRLF)
        elif line == _CRLF:
            self.ended = True
        else:
            self._max_fields -= 1
            self._max_trailers -= len(line)
            field = _FIELD.match(_CRLF + line)
            if self._max_fields < 0 or field is None or field.end() != len(line):
                _refuse("the request has malformed trailers, or too many")


def read_plain(data: bytes) -> tuple[str, str, bytes] | None:
    """Return method, target and field lines where ``data`` may be the head of one HTTP/1.1 GET or HEAD, and only that.

    None for everything else, whatever that is: this reader judges nothing, and what the fields mean is not its affair.
    ``plain_fields`` says whether the lines are such that the answer holds.
    """
    line = _PLAIN_LINE.match(data)
    return None if line is None else (line[1].decode(), line[2].decode(), data[line.end() :])


def plain_fields(lines: bytes, max_fields: int) -> list[tuple[bytes, bytes]] | None:
    """Return the fields of lines in their tidiest form, from the CRLF before them to the blank line; else None."""
    fields: list[tuple[bytes, bytes]] = _TIDY_FIELD.findall(lines)
    # As many as line feeds means that every line is a field, and that the blank line is the only one.
    tidy = 0 < len(fields) == lines.count(b"\n") - 2 <= max_fields and lines.endswith(_BLANK_LINE)
    return fields if tidy else None


def _refuse(why: str) -> NoReturn:
    raise ProtocolError(why)


def noted_fields(lines: bytes) -> list[tuple[bytes, bytes]]:
    """Return the fields that somebody reads of lines that are valid, in lower case."""
    return _NOTED.findall(lines.lower())


def _parse_head(block: bytes, method: bytes, max_fields: int) -> ResponseHead | None:
    """Parse the text of one head up to its blank line; None for an interim one."""
    line = _STATUS_LINE.match(block)
    if line is None:
        _refuse(f"the status line of the upstream's answer is malformed: it begins with {block[:16]!r}")
    start = line.end()
    _check_fields(block, start, max_fields)
    minor, status = int(line[1]), int(line[2])
    if status < 200:  # noqa: PLR2004 - RFC 9110 section 15.2, the interim class
        if status == _SWITCHING_PROTOCOLS:
            _refuse("the upstream switched protocols, which nobody asked for")
        if not minor:
            _refuse("the upstream sent an interim answer, which HTTP/1.0 does not know")
        return None
    lines = block[start : -len(_BLANK_LINE)]
    noted = noted_fields(lines)
    tunnel = method == b"CONNECT" and status in _SUCCESS
    length, chunked = (None, False) if tunnel else _parse_framing(noted, minor)
    no_body = tunnel or method == b"HEAD" or status in _BODILESS
    if no_body:
        length, chunked = 0, False
    until_close = length is None and not chunked
    options = _listed(noted)
    persists = b"close" not in options and (minor == 1 or b"keep-alive" in options)
    keep_alive = persists and not until_close
    reason = line[3] or b""
    return ResponseHead(status, reason, minor, lines, noted, options, length, chunked, until_close, keep_alive, no_body)


def _check_fields(block: bytes, start: int, max_fields: int) -> None:
    """Refuse what is not fields from the CRLF at ``start`` to the blank line that ends ``block``."""
    if len(block) > _SHORTEST_FIELD * max_fields and block.count(b"\n", start) - 2 > max_fields:
        _refuse(f"the upstream's answer has more than {max_fields} header fields")
    if _FIELD_LINES.fullmatch(block, start) is None:
        _refuse("a header field of the upstream's answer is malformed")


def _listed(noted: list[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Return the options of every Connection field."""
    options = _NOTHING
    for name, value in noted:
        if name == b"connection":
            options |= _KEEP_ALIVE if value == b"keep-alive" else {option.strip(b" \t") for option in value.split(b",")}
    return options


def _parse_framing(noted: list[tuple[bytes, bytes]], minor: int) -> tuple[int | None, bool]:
    """Return the body's length in bytes, None when no field says it, and whether the body is chunked."""
    framing = None
    for field in noted:
        if field[0] in _FRAMING:
            if framing is not None:
                _refuse("the upstream's answer says more than once how long its body is")
            framing = field
    if framing is None:
        return None, False
    value = framing[1].rstrip(b" \t")
    if framing[0] == b"content-length":
        if not value.isdigit() or len(value) > _MAX_LENGTH_DIGITS:
            _refuse("the Content-Length of the upstream's answer is not a number")
        return int(value), False
    if value != b"chunked":
        _refuse("the upstream's answer has a Transfer-Encoding other than chunked")
    if not minor:
        _refuse("the upstream's answer has a Transfer-Encoding, which HTTP/1.0 does not know")
    return None, True


def request_fault(head: bytes) -> ProxyError:
    """Return what is wrong with a request that the parser refused, and how to mend it.

    ``head`` is its head, or as much of it as came. No value of a field is quoted.
    """
    for starts, why in _OTHER_PROTOCOLS:
        if head.startswith(starts):
            return _bad_request(why)
    whole = head.endswith(_BLANK_LINE)
    line, ended, rest = head.partition(_CRLF)
    lines = [text for text in rest.split(_CRLF) if text]
    if len(line) > MAX_LINE or len(lines) > MAX_FIELDS or (len(head) >= MAX_HEAD and not whole):
        return ProxyError(
            "head-too-large",
            "The head of this request is too large: 64 KiB for the first line, 128 KiB and 128 fields in all. Nothing "
            "was sent.",
        )
    if _LINE_END_ALONE.search(head):
        return _bad_request("one of its lines ends in CR or LF alone, where both must stand (CR LF)")
    method = line.partition(b" ")[0].decode("latin-1")
    asked = _ASKED.fullmatch(line)
    fault = _line_fault(line, method, asked, bool(ended)) or _fields_fault(lines, whole)
    if fault is None and whole and asked is not None:
        fault = head_fault(method, int(asked[2] != b"HTTP/1.0"), _judged(lines))
    if fault is None and asked is not None and not asked[1].lower().startswith((b"/", b"http://", b"https://")):
        fault = bad_target("it must begin with a slash")
    return fault or (_bad_request(_FORM) if method in _METHODS else _unknown_method(method, asked))


def _line_fault(line: bytes, method: str, asked: re.Match[bytes] | None, ended: bool) -> ProxyError | None:  # noqa: FBT001 - a fact
    if method and method not in _METHODS and (not ended or re.fullmatch(_TOKEN, line)):
        return _unknown_method(method, asked)
    if asked is None:
        return _bad_request(_FORM)
    fault = forbidden(asked[1].decode("utf-8", "surrogateescape"))
    if fault is None and ended and asked[2] is None:
        return _bad_request(_FORM)
    if fault is None and ended and asked[2] not in {b"HTTP/1.0", b"HTTP/1.1"}:
        return _bad_request("its version is none that this proxy knows, which are HTTP/1.1 and HTTP/1.0")
    return fault


def _fields_fault(lines: list[bytes], whole: bool) -> ProxyError | None:  # noqa: FBT001 - a fact
    for number, text in enumerate(lines, 2):
        if text[:1] in {b" ", b"\t"}:
            return _bad_request(f"line {number} begins with a blank, but each field must stand in one line")
        field = _NAMED.fullmatch(text)
        if field is None:
            if whole or text is not lines[-1] or not re.fullmatch(_TOKEN, text):
                return _bad_request(f"line {number} is no field, which is a name without blanks, a colon and a value")
        elif field[2]:
            return _bad_request(f"there is a blank between {_shown(field[1])} and its colon")
        elif _CONTROL.search(field[3]):
            return _bad_request(f"the value of {_shown(field[1])} holds a control character")
    return None


def _judged(lines: list[bytes]) -> dict[bytes, bytes | None]:
    judged: dict[bytes, bytes | None] = {}
    for text in lines:
        name, _, value = text.lower().partition(b":")
        judged[name] = None if name in judged else value.strip(b" \t")
    return judged


def head_fault(  # noqa: PLR0911 - one return for each kind of error
    method: str, minor: int, judged: Mapping[bytes, bytes | None]
) -> ProxyError | None:
    """Return what speaks against the head of an HTTP/1.``minor`` request whose lines are in order.

    ``judged`` maps names in lower case to values, None where a name came more than once.
    """
    twice = [name for name, value in judged.items() if value is None and name in _ONCE]
    if twice:
        return _bad_request(f"{_shown(twice[0])} stands in it more than once. Send it once")
    coding, length = judged.get(b"transfer-encoding"), judged.get(b"content-length")
    if coding is not None:
        if not minor:
            return _bad_request("Transfer-Encoding is not allowed in HTTP/1.0")
        if length is not None:
            return _bad_request("it has both Content-Length and Transfer-Encoding. Send one of them")
        if coding.lower() != b"chunked":
            msg = "Only the transfer encoding chunked is supported, so that nothing was sent."
            return ProxyError("not-supported", msg)
    if length is not None and not _REQUEST_LENGTH.fullmatch(length):
        return _bad_request(
            "its Content-Length is not a plain number (at most 18 digits, without sign or leading zeros)"
        )
    if minor and b"host" not in judged:
        return _bad_request("it has no Host field, which HTTP/1.1 asks for")
    if method == "CONNECT":
        msg = "This proxy makes no tunnels. Send plain http:// requests to it; it speaks TLS to Metquay by itself."
        return ProxyError("not-supported", msg)
    return None


def _bad_request(why: str) -> ProxyError:
    return ProxyError("bad-request", f"This is no valid HTTP/1.1 request: {why}. Nothing was sent.")


def _unknown_method(method: str, asked: re.Match[bytes] | None) -> ProxyError:
    """Say so; the method is shown only where it is one: it may also be a part of a body, and hold a secret."""
    whole = asked is not None and asked[2] is not None and re.fullmatch("[A-Za-z-]{1,20}", method)
    if whole or method.upper() in _METHODS:
        capitals = f" (methods are written in capitals: {method.upper()})" if method.upper() in _METHODS else ""
        msg = f"The method {method} is none that HTTP knows{capitals}, so that nothing was sent."
    else:
        msg = (
            "This request begins with no method that HTTP knows, so that nothing was sent. Was the body of the one "
            "before it longer than its Content-Length says?"
        )
    return ProxyError("not-supported", msg)


def _shown(name: bytes) -> str:
    return name[:40].decode("ascii").title()
