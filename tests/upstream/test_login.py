from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from metquay_proxy.rules.credentials import Credentials, CredentialsRejected, LoginFailed, UpstreamDistrusted
from metquay_proxy.rules.target import BaseURL
from metquay_proxy.upstream.login import Login
from tests.upstream.peers import certified, pool_to, speaking
from tests.wire import answered

if TYPE_CHECKING:
    import asyncio
    import ssl
    from collections.abc import Callable

    from metquay_proxy.rules.credentials import AccessToken

TOKEN = b'{"accessToken": "t", "tokenType": "bearer", "expiresIn": 900}'
KEYS = Credentials("a", "s")


class Far:
    """Answers each login with ``answer``; ``seen`` are the requests."""

    def __init__(self, answer: bytes) -> None:
        """Begin."""
        self.answer = answer
        self.seen: list[bytes] = []
        self.pools: list[tuple[int, int]] = []

    async def play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes on one connection."""
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            self.seen.append(head + await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r")[0])))
            writer.write(self.answer)

    async def token(
        self,
        *credentials: Callable[[], Credentials],
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | tuple[None, None] = (None, None),
    ) -> AccessToken:
        """Log in once with each, and return the last token."""
        async with speaking(self.play, tls[0]) as port:
            url = f"http{'s' if tls[0] else ''}://localhost:{port}"
            pool = pool_to(url, tls[1])
            left = list(credentials)

            def read() -> Credentials:
                return left.pop(0)()

            login = Login(pool, BaseURL.parse(url), read, lambda: 5.0)
            try:
                for _ in credentials:
                    token = await login.token()
                    self.pools.append(pool.connections)
            finally:
                pool.close()
        return token


def missing() -> Credentials:
    """Fail as a file that is not there does."""
    raise OSError("no such file")


async def test_a_login() -> None:
    """The keys are sent once, as JSON with a length; the connection is kept for others."""
    far = Far(answered(body=TOKEN))
    token = await far.token(lambda: KEYS)
    assert (b"Authorization: Bearer t\r\n", 900.0) == (token.authorization, token.lifetime)
    (request,) = far.seen
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /api/v1/authenticate HTTP/1.1\r\nHost: localhost:")
    assert b'{"accessKey": "a", "secretKey": "s"}' == body
    assert [(0, 1)] == far.pools


async def test_keys_that_cannot_be_read() -> None:
    """At first that is a failure like any other; later the keys that were read before are used."""
    far = Far(answered(body=TOKEN))
    with pytest.raises(LoginFailed, match="no such file"):
        await far.token(missing)
    assert b"Authorization: Bearer t\r\n" == (await far.token(lambda: KEYS, missing)).authorization
    assert far.seen[0].split(b"\r\n\r\n")[1] == far.seen[1].split(b"\r\n\r\n")[1]


@pytest.mark.parametrize(
    ("answer", "failure", "text"),
    [
        (answered(body=bytes(100_000)), LoginFailed, "too long"),
        (answered(status="401 No"), CredentialsRejected, "METQUAY_SECRET_KEY is followed by a comment"),
        (answered("Retry-After: 7", status="503 Busy"), LoginFailed, "503"),
        (answered("Location: /Elsewhere", status="302 Found"), LoginFailed, "That is a web page"),
        (answered("Location: //[", status="302 Found"), LoginFailed, "302"),
        (b"nonsense", LoginFailed, "not valid HTTP"),
    ],
)
async def test_answers_that_are_no_token(answer: bytes, failure: type[LoginFailed], text: str) -> None:
    """Each says why; refused keys also what is odd about them."""
    with pytest.raises(failure, match=text):
        await Far(answer).token(lambda: Credentials("a" * 8, "s # mine"))


async def test_how_long_to_stay_away() -> None:
    """A busy server's Retry-After reaches whoever decides when to log in next."""
    with pytest.raises(LoginFailed) as caught:
        await Far(answered("Retry-After: 7", status="429 Too Many Requests")).token(lambda: KEYS)
    assert 7.0 == getattr(caught.value, "pause", None)


async def test_a_server_that_is_not_trusted() -> None:
    """That is told apart from other failures: the keys were not sent."""
    server, _ = certified("localhost")
    _, stranger = certified("localhost")
    far = Far(b"")
    with pytest.raises(UpstreamDistrusted, match="was not accepted"):
        await far.token(lambda: KEYS, tls=(server, stranger))
    assert [] == far.seen
