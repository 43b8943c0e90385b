"""Inputs that once did harm, or nearly: the fuzz run begins with them. Add what it finds."""

from __future__ import annotations

REQUESTS: list[list[bytes]] = [
    # HTTP/2's preface: aiohttp's parser takes a whole head and waits for more
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    # the last trailer field became a field of the next request
    [
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 5\r\n\r\n",
        b"GET /y HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    # the largest length that the parser knows means "no length" inside it
    [b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551615\r\n\r\nabc"],
    # read as HTTP/1.0
    [b"GET /x RTSP/1.0\r\nHost: a\r\n\r\n", b"SOURCE /x ICE/1.0\r\nHost: a\r\n\r\n"],
    # a good request and a bad one in one segment: the error took both
    [b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n\x00\r\n\r\n"],
    # the bytes after an ignored upgrade are lost inside the parser
    [
        b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nGET /y HT",
        b"TP/1.1\r\nHost: a\r\n\r\n",
    ],
    # an error in mid-body never reached who read the body
    [b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"zz\r\n"],
    [b"\r", b"\n", b"\r\n\r\n", b"GET /x HTTP/1.1\r\nHost: a\r\n\r", b"\nGET"],
]

ANSWERS: list[bytes] = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
    b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r",
    b"\x15\x03\x01\x00\x02\x02\x46",
]
