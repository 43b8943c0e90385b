"""The login: one ``POST {base}/authenticate``, which buys a token for the key pair.

Owns the requests that the program makes by itself, and the bounds on their answers. Must not judge a login's answer
(``parse_login`` does) nor decide when to log in, and holds the keys no longer than the next ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin

from metquay_proxy.exchange.body import ReplayBudget, RequestBody, Stream
from metquay_proxy.rules.credentials import CredentialsRejected, LoginFailed, UpstreamDistrusted, parse_login
from metquay_proxy.rules.errors import UpstreamFailure
from metquay_proxy.rules.quota import retry_after_seconds
from metquay_proxy.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from metquay_proxy.rules.credentials import AccessToken, Credentials
    from metquay_proxy.rules.headers import ResponseHead
    from metquay_proxy.rules.target import BaseURL
    from metquay_proxy.upstream.pool import Pool

KEYS_TIMEOUT: Final = 5.0
"""Seconds that reading the files of keys may take."""
_ANSWER_LIMIT: Final = 64 * 1024
_TOO_MANY: Final = 429


class Login:
    """The source of tokens, with the keys read anew each time.

    Where they can't be read any more, those that were read before are used.
    """

    def __init__(
        self, pool: Pool, base: BaseURL, credentials: Callable[[], Credentials], clock: Callable[[], float]
    ) -> None:
        """``credentials`` may read files and raise ``OSError`` or ``ValueError``; ``clock`` is the token cache's."""
        self._pool = pool
        self._base = base
        self._credentials = credentials
        self._keys: Credentials | None = None
        self._clock = clock

    async def token(self) -> AccessToken:
        """Log in; raise ``LoginFailed``."""
        try:
            async with asyncio.timeout(KEYS_TIMEOUT):
                self._keys = await in_thread(self._credentials)
        except (OSError, ValueError) as error:
            if self._keys is None:
                msg = f"The keys could not be read: {error}." if str(error) else "The keys could not be read in time."
                raise LoginFailed(msg) from None
        keys = self._keys
        data = json.dumps({"accessKey": keys.access_key, "secretKey": keys.secret_key}).encode()
        fields = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        began = self._clock()
        try:
            head, answer = await ask(self._pool, self._base, "POST /authenticate", fields, data)
        except UpstreamFailure as error:
            failure = UpstreamDistrusted if error.slug == "upstream-tls" else LoginFailed
            raise failure(error.why) from None
        pause = retry_after_seconds(head.headers, answer if head.status == _TOO_MANY else b"", time.time())
        location = b"".join(value for name, value in head.headers if name.lower() == b"location").decode("latin-1")
        with contextlib.suppress(ValueError):  # it is judged as it came
            location = location and urljoin(f"{self._base}/authenticate", location)
        try:
            return parse_login(head.status, answer, began, pause=pause, location=location)
        except CredentialsRejected as refusal:
            raise CredentialsRejected(" ".join([str(refusal), *(f"{doubt}." for doubt in keys.doubts())])) from None


async def ask(pool: Pool, base: BaseURL, what: str, fields: str = "", data: bytes = b"") -> tuple[ResponseHead, bytes]:
    """Ask the upstream something of our own; return its answer's head and body.

    ``what`` is a method and a path below the base; ``fields`` are further ones, each with its CRLF. Raises
    ``UpstreamFailure``, and ``LoginFailed`` where the answer is far too long.
    """
    method, path = what.split()
    head = f"{method} {base.prefix}{path} HTTP/1.1\r\nHost: {base.authority}\r\nAccept: application/json\r\n"
    # a limit of 0: the keys' own bytes are never kept for a replay
    body = RequestBody(Stream.of(data), chunked=False, limit=0, budget=ReplayBudget(0), timeout=1.0)
    answer = b""
    connection = pool.take(method) or await pool.open()
    with contextlib.closing(connection.send(method, f"{head}{fields}\r\n".encode(), body)) as response:
        while piece := await response.read():
            answer += piece
            if len(answer) > _ANSWER_LIMIT:
                raise LoginFailed("The answer is far too long. Check METQUAY_HOST.")
    return response.head, answer
