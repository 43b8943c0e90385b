"""A reader of requests by the letter of RFC 9112, written apart from the proxy's: an oracle for it."""

from __future__ import annotations

import contextlib
import re

BLANK = b"\r\n\r\n"


def readings(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return method and body of each complete request in ``data``, up to the first fault."""
    found = []
    with contextlib.suppress(ValueError):
        while True:
            data = data.lstrip(b"\r\n")
            head, blank, data = data.partition(BLANK)
            line, *fields = head.split(b"\r\n")
            first = re.fullmatch(rb"([A-Z-]+) [\x21-\x7e]+ HTTP/1\.[01]", line)
            if not blank or first is None:
                return found
            length, coded = read_framing(fields)
            if coded:
                body, data = read_chunks(data)
            else:
                body, data = data[:length], data[length:]
                if len(body) < length:
                    return found
            found.append((first[1], body))
    return found


def read_framing(fields: list[bytes]) -> tuple[int, bool]:
    """Return a request's length, and whether it is chunked; raise ``ValueError``."""
    framing = []
    for text in fields:
        match = re.fullmatch(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*", text)
        if match is None:
            raise ValueError(text)
        if match[1].lower() in {b"content-length", b"transfer-encoding"}:
            framing.append((match[1].lower(), match[2].lower()))
    if not framing:
        return 0, False
    (name, value), *more = framing
    if more or not (value.isdigit() if name == b"content-length" else value == b"chunked"):
        raise ValueError(framing)
    return (int(value), False) if name == b"content-length" else (0, True)


def read_chunks(data: bytes) -> tuple[bytes, bytes]:
    """Return a chunked body and what follows it; raise ``ValueError``."""
    body = b""
    while True:
        line, end, data = data.partition(b"\r\n")
        if not end or not re.fullmatch(rb"[0-9A-Fa-f]+(;.*)?", line, re.DOTALL):
            raise ValueError(line)
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        if data[size : size + 2] != b"\r\n":
            raise ValueError(data)
        body += data[:size]
        data = data[size + 2 :]
    while True:
        line, end, data = data.partition(b"\r\n")
        if not end:
            raise ValueError(line)
        if not line:
            return body, data
