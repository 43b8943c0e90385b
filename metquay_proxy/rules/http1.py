"""The strict reader of HTTP/1 messages: one grammar, and a reader for each side, as bytes.

Owns the judgement of what a client and an upstream sent: which bytes are the head, which the body, where the message
ends and whether its connection may be used again. Must not do I/O, know asyncio or rewrite anything: fields are handed
on in their order, case and bytes. A doubtful message is refused, never repaired, since whoever reads it next may repair
it another way (RFC 9112 sections 11.1 and 11.2). What is wrong with a request is told to people by ``faults``.

Facts, RFC 9112 unless said otherwise:

* 2.2: lines end with CRLF. A recipient *may* take a bare LF, and must not let a bare CR pass: both are refused here,
  and so is an empty line before the status line. A server should ignore some before a request line.
* 2.3, 3, 4: the version is case-sensitive; one space parts method, target and version; three digits of status; the
  reason may be empty, and its space be missing.
* 5.1, 5.2: no space before the colon; a proxy answers a folded line with 502, a server with 400. RFC 9110 5.1, 5.5,
  5.6.2: names are tokens; CR, LF and NUL in a value are dangerous, and the other controls, but for HTAB, invalid.
* 6.1: Transfer-Encoding overrides Content-Length, may be an attack beside it, and is a fault in HTTP/1.0.
* 6.3: no body follows HEAD, 1xx, 204 and 304, whatever their fields say, nor a 2xx to CONNECT, whose framing fields
  must be ignored (also RFC 9110 9.3.6); an invalid Content-Length is answered with 502, and a list of equal values may
  be; with neither field an answer's body lasts until the connection closes, and a request has none.
* 7.1: sizes are hexadecimal of any length, so that a reader must bound them; unknown extensions are ignored, in
  reasonable number; trailer fields may be dropped. RFC 9110 5.6.3: bad whitespace is parsed and dropped.
* 7.1.1: old servers pad a chunk's size with blanks before its CRLF. Of an answer all this is read; in a request, where
  a blank too much may be half of an attack, none is taken.
* 8: an answer that closes before its length, or before its last chunk, is incomplete.
* RFC 2068 19.7.1: ``Keep-Alive: timeout=5`` is the time after which a server closes an idle connection; most servers
  still say it.
* 9.3, 9.6: what persists and what closes. RFC 9110 15.2: any number of interim answers may come before the final one,
  but HTTP/1.0 has none, and 101 is only for who asked for an upgrade, which this proxy never does.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, TypeVar

from metquay_proxy.rules import faults
from metquay_proxy.rules.faults import BLANK_LINE, CRLF
from metquay_proxy.rules.headers import NAMES, RequestFields, ResponseHead, connection_options, read_fields

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T", "RequestHead", RequestFields, ResponseHead)

MAX_LINE: Final = 64 * 1024
"""Bytes of a request's first line,"""
MAX_HEAD: Final = 128 * 1024
"""of its whole head, and of its trailers,"""
MAX_FIELDS: Final = 128
"""and how many fields each of the two may have."""

# Quantifiers of single characters are possessive: with backtracking a hostile line costs quadratic time. Those of
# groups are not, since CPython before 3.11.5 gets such wrong: no part of theirs can match in two ways, so that time
# stays linear.
_TEXT: Final = rb"[\t\x20-\x7e\x80-\xff]*+"
_ASKED: Final = re.compile(rb"(%b) ([\x21-\x7e]++) HTTP/1\." % "|".join(faults.METHODS).encode())
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (" + _TEXT + rb"))?(?=\r\n|\Z)")
_FIELD_LINES: Final = re.compile(rb"(?:\r\n" + faults.TOKEN + rb":" + _TEXT + rb")*")
_KEPT_FOR: Final = re.compile(rb"(?:\A|[,; \t])timeout[ \t]*+=[ \t]*+\"?([0-9]{1,9})(?![0-9])")
_START: Final = b"HTTP/1."
_MINOR: Final = {b"1": 1, b"0": 0}
_MAX_CHUNK_LINE: Final = 4096
_MAX_LENGTH_DIGITS: Final = 18
_MAX_ANSWERED: Final = 256
"""Fields that an answer may have,"""
_MAX_INTERIM: Final = 32
"""and 1xx answers that may come before it."""
_MAX_EMPTY: Final = 8 * len(CRLF)
REMEMBERED: Final = 64
LONGEST_REMEMBERED: Final = 2048
_SWITCHING_PROTOCOLS: Final = 101
_SUCCESS: Final = range(200, 300)
_BODILESS: Final = frozenset({204, 304})
"""Final statuses whose answers have no body; nor has one to HEAD."""
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


def _chunk_line(blanks: bytes) -> re.Pattern[bytes]:
    """Return the expression of the line before a chunk; ``blanks`` is what may stand around the parts of it."""
    quoted = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
    value = blanks + rb"=" + blanks + rb"(?:" + faults.TOKEN + rb"|" + quoted + rb")"
    extension = blanks + rb";" + blanks + faults.TOKEN + rb"(?:" + value + rb")?"
    return re.compile(rb"([0-9A-Fa-f]{1,15}+)(?:" + extension + rb")*" + blanks + rb"\r\n")


class ProtocolError(Exception):
    """The upstream broke HTTP. The text is safe to show: of the answer it holds 16 bytes of the status line at most."""


class _Reader:
    """What the readers of both sides have in common: text up to a mark, and bodies that say where they end."""

    _chunk_line: ClassVar[re.Pattern[bytes]]
    _trailers = False

    def __init__(self) -> None:
        self.complete = False
        self._buffer: bytearray | None = None
        self._left = 0
        self._refusal: Exception | None = None

    def _fault(self, why: str) -> Exception:
        """Return what to raise, now and for every later piece."""
        self._refusal = ProtocolError(why)
        return self._refusal

    def _take(self, data: bytes, start: int, mark: bytes, bound: int, what: str) -> tuple[bytes, int]:
        """Return the text that ends with ``mark``, and where that is in ``data``; ``b""`` while it is not whole."""
        if not self._buffer:
            end = data.find(mark, start, start + bound) + len(mark)
            if end >= len(mark):
                return data[start:end], end
            self._buffer = bytearray()
        buffer = self._buffer
        held = len(buffer)
        buffer += data[start : start + bound - held]
        end = buffer.find(mark, max(0, held - len(mark) + 1)) + len(mark)
        if end >= len(mark):
            self._buffer = None
            return bytes(buffer[:end]), start + end - held
        # Else a line that ends wrongly would be waited for until a time-out.
        if faults.FOUL.search(buffer, max(0, held - 1)):
            raise self._fault(f"the {what} holds a control character, or a line that ends without CRLF")
        if len(buffer) >= bound:
            raise self._fault(f"the {what} is longer than {bound} bytes")
        return b"", len(data)

    def _read_body(self, data: bytes, start: int, length: int | None) -> tuple[bytes, int]:
        """Read on in a body, chunked without a length; return its bytes, and where it or the data ends."""
        if length is None:
            return self._read_chunks(data, start)
        end = len(data)
        left = self._left - end + start
        if left < 0:
            end, left = end + left, 0
        self._left = left
        self.complete = not left
        return data[start:end], end

    def _read_chunks(self, data: bytes, start: int) -> tuple[bytes, int]:
        pieces = []
        end = len(data)
        left = self._left  # of the chunk's data and of the CRLF after it
        while start < end and not self.complete:
            if left > len(CRLF):
                piece = data[start : start + left - len(CRLF)]
                pieces.append(piece)
                start += len(piece)
                left -= len(piece)
            elif left:
                if data[start] != CRLF[-left]:
                    raise self._fault("a chunk does not end where its size says")
                start += 1
                left -= 1
            elif self._trailers:
                text, start = self._take(data, start, BLANK_LINE, MAX_HEAD, "trailer section")
                if text:
                    if not _well_formed(text.removesuffix(BLANK_LINE), 0, MAX_FIELDS):
                        raise self._fault("a trailer is malformed, or there are too many")
                    self._trailers = False
                    self.complete = True
            else:
                text, start = self._take(data, start, CRLF, _MAX_CHUNK_LINE, "chunk line")
                if text:
                    left = self._begin_chunk(text)
        self._left = left
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), start

    def _begin_chunk(self, text: bytes) -> int:
        """Return how many bytes follow a chunk's line: its data and a CRLF, or none but the trailers."""
        line = self._chunk_line.match(text)
        if line is None:
            raise self._fault("a chunk size is malformed")
        size = int(line[1], 16)
        if size:
            return size + len(CRLF)
        self._trailers = True
        # Trailers then look like fields after a first line, and none of them like a blank line.
        self._buffer = bytearray(CRLF)
        return 0


class ResponseReader(_Reader):
    """Reads the one answer to a request of ``method`` from pieces of any size, in time linear in their bytes.

    ``head`` is None until the final head is whole. ``complete``: the answer ended cleanly. ``surplus``: bytes came
    after its end, so that the connection must never be used again.
    """

    _chunk_line = _chunk_line(rb"[ \t]*+")

    def __init__(self, method: str, memory: AnswersMemory | None = None) -> None:
        """Take the memory that the connections to one upstream share."""
        super().__init__()
        self._memories = (AnswersMemory() if memory is None else memory).of
        self._usual = self._memories[""]
        self.surplus = False
        self.next(method)

    def next(self, method: str) -> None:
        """Read another answer, that to a request of ``method``; the one before must have ended without ``surplus``."""
        self._memory = self._memories.get(method, self._usual)
        self.head: ResponseHead | None = None
        self.complete = False
        self._interim = 0

    def feed(self, data: bytes) -> bytes:
        """Take the next piece, and return the bytes of the decoded body that it holds, maybe none.

        Bytes after the answer's end are ignored, and set ``surplus``. Raises ProtocolError for anything that breaks
        HTTP, and for every piece after that.
        """
        head = self.head
        if head is None:
            block, mark, rest = data.partition(BLANK_LINE)
            if mark and not self._buffer and self._refusal is None:
                head = self._memory.get(block)
            if head is None:
                head, rest = self._read_heads(data)
                if head is None:
                    return b""
            self.head, self._left, data = head, head.left, rest
        if head.length is None and not head.until_close:
            if self._refusal is not None:
                raise self._refusal
            body, end = self._read_chunks(data, 0)
            self.surplus = self.surplus or end < len(data)
            return body
        self._left = left = self._left - len(data)
        if left > 0:
            return data
        self.complete = True
        if left < 0:
            self.surplus = True
            data, self._left = data[:left], 0
        return data

    @property
    def started(self) -> bool:
        """Whether some byte of an answer arrived."""
        return self.head is not None or bool(self._buffer) or self._interim > 0

    def eof(self) -> None:
        """Note that the upstream closed, which completes a body that lasts until then, and nothing else."""
        if self.head is not None and self.head.until_close:
            self.complete = True

    def _read_heads(self, data: bytes) -> tuple[ResponseHead | None, bytes]:
        """Return the final head, None while it is not whole, and what comes after it."""
        if self._refusal is not None:
            raise self._refusal
        while True:
            text, at = self._take(data, 0, BLANK_LINE, MAX_HEAD, "head")
            if not text:
                begun = bytes((self._buffer or b"")[:16])
                if not begun.startswith(_START[: len(begun)]):
                    raise self._fault("it does not begin as HTTP/1 does")
                return None, b""
            block, data = text.removesuffix(BLANK_LINE), data[at:]
            try:
                head = self._memory.get(block) or self._memory.judge(block)
            except ProtocolError as error:
                self._refusal = error
                raise
            if head is not None:
                return head, data
            self._interim += 1
            if self._interim > _MAX_INTERIM:
                raise self._fault("too many interim answers came before it")


def _parse_answer(method: str, block: bytes) -> ResponseHead | None:
    """Parse a head without its blank line that answers ``method``; None for an interim one. Raises ProtocolError."""
    line = _STATUS_LINE.match(block)
    if line is None:
        raise ProtocolError("its status line is malformed")
    if not _well_formed(block, line.end(), _MAX_ANSWERED):
        raise ProtocolError(f"a header field is malformed, or there are more than {_MAX_ANSWERED}")
    minor, status, reason = int(line[1]), int(line[2]), line[3] or b""
    if status < 200:  # noqa: PLR2004 - RFC 9110 section 15.2, the interim class
        if status == _SWITCHING_PROTOCOLS:
            raise ProtocolError("the upstream switched protocols, which nobody asked for")
        if not minor:
            raise ProtocolError("the upstream sent an interim answer, which HTTP/1.0 does not know")
        return None
    lines = block[line.end() :]
    noted, kept = read_fields(lines, NAMES.of_answers)
    length, until_close = (0, False) if method == "CONNECT" and status in _SUCCESS else _framing(noted, minor)
    bodiless = method == "HEAD" or status in _BODILESS
    if bodiless:
        length, until_close = 0, False
    options = connection_options(noted)
    keep_alive = _persists(minor, options) and not until_close
    said = b",".join([value for name, value in noted if name == b"keep-alive"]).lower()
    seconds = float(found[1]) if said and (found := _KEPT_FOR.search(said)) else None
    return ResponseHead(status, reason, lines, kept, noted, options, length, until_close, bodiless, keep_alive, seconds)


def _framing(noted: list[tuple[bytes, bytes]], minor: int) -> tuple[int | None, bool]:
    """Return the body's length in bytes, None where no field says it, and whether it lasts until the close."""
    match [field for field in noted if field[0] in _FRAMING]:
        case []:
            return None, True
        case [(b"content-length", value)] if value.isdigit() and len(value) <= _MAX_LENGTH_DIGITS:
            return int(value), False
        case [(b"transfer-encoding", value)] if value.lower() == b"chunked" and minor:
            return None, False
    raise ProtocolError("its Content-Length and Transfer-Encoding do not say for certain how long its body is")


class _Memory(dict[bytes, T]):
    """What was found out about a head, or a part of it: both sides send the same ones again and again.

    A few are remembered, none of them long and none with a secret. One memory serves all connections of a side.
    """

    def __init__(self, judge: Callable[[bytes], T | None]) -> None:
        """``judge`` finds it out; nothing but the text may make a difference to it."""
        self._judge: Callable[[bytes], T | None] = judge

    def judge(self, text: bytes) -> T | None:
        """Find it out for a text that ``get`` does not find; None is remembered of none."""
        found = self._judge(text)
        if found is not None and not found.secret and len(text) <= LONGEST_REMEMBERED:
            if len(self) >= REMEMBERED:
                self.clear()
            self[text] = found
        return found


class AnswersMemory:
    """The heads of answers, without their blank lines; None stands for an interim one.

    ``of`` parts them by the method that they answer, since the same bytes may mean another thing to others; that of
    all methods which it does not name is empty.
    """

    def __init__(self) -> None:
        self.of = {method: _Memory(functools.partial(_parse_answer, method)) for method in ("HEAD", "CONNECT", "")}


class RequestHead(NamedTuple):
    """One request's head; ``target`` is as in the request line, ``size`` in bytes."""

    method: str
    target: str
    fields: RequestFields
    size: int

    @property
    def secret(self) -> bool:
        """Whether it holds what nobody may remember."""
        return self.fields.secret


def _parse_fields(block: bytes) -> RequestFields | None:
    """Judge the text from the last digit of a request's version on; None where it is refused."""
    minor = _MINOR.get(block[:1])
    if minor is None or not _well_formed(block, 1, MAX_FIELDS):
        return None
    fields = RequestFields(block[1:])
    if faults.head_fault(minor, fields.judged) is not None:
        return None
    fields.minor = minor
    fields.length = None if b"transfer-encoding" in fields.judged else int(fields.judged.get(b"content-length") or 0)
    fields.keep_alive = _persists(minor, fields.options)
    return fields


class RequestsMemory:
    """The heads of requests: tools ask for the same again, and for one thing after another with the same fields."""

    def __init__(self) -> None:
        self.heads = _Memory(self._parse)
        """Whole heads, each with its blank line."""
        self.fields = _Memory(_parse_fields)
        """What comes after method, target and version, from the version's last digit on."""

    def _parse(self, text: bytes) -> RequestHead | None:
        """Judge a head, which ends with its blank line; None where it is refused."""
        asked = _ASKED.match(text)
        if asked is None or asked.end() >= MAX_LINE:
            return None
        block = text[asked.end() : -len(BLANK_LINE)]
        fields = self.fields.get(block) or self.fields.judge(block)
        if fields is None:
            return None
        return RequestHead(asked[1].decode(), asked[2].decode(), fields, len(text) - len(BLANK_LINE))


class RequestReader(_Reader):
    """Reads one request after the other from pieces of any size, in time linear in their bytes.

    ``head`` is that of the request being read, None between requests; ``complete``: head and body have been read to
    the end. What came after that end waits for ``next``. ``feed`` and ``next`` raise ProxyError where a request is
    refused, and every later ``feed`` raises it again: the connection must be closed after the answer.
    """

    _chunk_line = _chunk_line(b"")

    def __init__(self, memory: RequestsMemory | None = None) -> None:
        """Take the memory that the connections of a server share."""
        super().__init__()
        self._memory = RequestsMemory() if memory is None else memory
        self.head: RequestHead | None = None
        self._empty = 0
        self._data, self._at = b"", 0  # what came with the end of this request, and where that was
        self._rest = bytearray()  # what came later

    @property
    def begun(self) -> bool:
        """Whether some bytes of a head have come that is not whole yet."""
        return self.head is None and bool(self._buffer)

    @property
    def held(self) -> int:
        """How many bytes wait behind the current, complete request."""
        return len(self._data) - self._at + len(self._rest)

    def rest(self) -> bool:
        """Be ready for the next request, unless bytes of it wait: they are for ``next``; return whether none do."""
        if self._data or self._rest:
            return False
        self.head, self.complete = None, False
        return True

    def next(self) -> bytes:
        """Begin the next request with what waits, and return as ``feed`` does."""
        self.head = None
        self.complete = False
        body = b""
        if self._data:
            data, at, self._data, self._at = self._data, self._at, b"", 0
            body = self.feed(data, at)
        if self._rest and not self.complete:
            rest, self._rest = bytes(self._rest), bytearray()
            body += self.feed(rest)
        return body

    def feed(self, data: bytes, start: int = 0) -> bytes:
        """Take the next piece, and return the bytes of the current request's decoded body that it holds, maybe none."""
        if self.complete:
            self._rest += data
            return b""
        if self._refusal is not None:
            raise self._refusal
        head = self.head
        if head is None:
            if not start and not self._buffer:
                head = self._memory.heads.get(data)
            if head is not None:
                start = len(data)
            else:
                head, start = self._gather(data, start)
                if head is None:
                    return b""
            self.head, self._empty = head, 0
            length = head.fields.length
            if length:
                self._left = length
            self.complete = length == 0
        body = b""
        if not self.complete:
            body, start = self._read_body(data, start, head.fields.length)
        if start < len(data):
            self._data, self._at = data, start
        return body

    def _gather(self, data: bytes, start: int) -> tuple[RequestHead | None, int]:
        """Read on in a head, maybe after empty lines; return it, None while it is not whole, and where it ends."""
        if not self._buffer and data[start : start + 1] in CRLF:
            start = self._skip(data, start)
        text, start = self._take(data, start, BLANK_LINE, MAX_HEAD, "head")
        head = (self._memory.heads.get(text) or self._memory.heads.judge(text)) if text else None
        if head is None and (text or not faults.BEGUN.match(self._buffer or b"")):
            raise self._fault("no request looks like this", text)
        return head, start

    def _skip(self, data: bytes, start: int) -> int:
        """Return where the empty lines before a request end (RFC 9112 section 2.2)."""
        while start < len(data) and data[start] in CRLF:
            start += 1
            self._empty += 1
            if self._empty > _MAX_EMPTY:
                raise self._fault("too many empty lines")
        return start

    def _fault(self, _why: str, head: bytes = b"") -> Exception:
        head = head or bytes(self._buffer or b"")
        line, _, rest = head.partition(CRLF)
        whole = head.endswith(BLANK_LINE)
        large = len(line) > MAX_LINE or rest.count(CRLF) - whole > MAX_FIELDS or (len(head) >= MAX_HEAD and not whole)
        self._refusal = faults.broken_body() if self.head else faults.request_fault(head, large=large)
        return self._refusal


def _persists(minor: int, options: frozenset[bytes]) -> bool:
    return b"close" not in options and (minor == 1 or b"keep-alive" in options)


def _well_formed(block: bytes, start: int, max_fields: int) -> bool:
    """Whether there are fields, and not too many, from the CRLF at ``start`` to the end of ``block``."""
    return block.count(b"\n", start) <= max_fields and _FIELD_LINES.fullmatch(block, start) is not None
