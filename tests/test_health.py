from __future__ import annotations

import os
import random
import socket
import ssl
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy import health, settings
from metquay_proxy.environment import find

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ALIVE = b"HTTP/1.1 200 OK\r\nServer: metquay-proxy\r\nContent-Length: 6\r\n\r\nalive\n"
NOT_READY = b"HTTP/1.1 503 Service Unavailable\r\nServer: metquay-proxy\r\nContent-Length: 10\r\n\r\nnot ready\n"
WAITING = "not ready: the proxy has no token for Metquay, or is being stopped; `metquay-proxy check` says why"
CLOSED = "{} closed the connection: if the proxy serves https, set METQUAY_TLS_CERT (--tls-cert) here too"
ANOTHER = "another program answers at {}: stop it, or give health the proxy's METQUAY_LISTEN (--listen)"


@contextmanager
def serving(listener: socket.socket, *answers: bytes, tls: ssl.SSLContext | None = None) -> Iterator[list[bytes]]:
    """Give one answer to each connection in turn, the last one again and again; yields what was asked."""
    listener.listen()
    left, asked = list(answers), list[bytes]()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the test has ended
            try:
                if tls:
                    connection = tls.wrap_socket(connection, server_side=True)
                asked.append(connection.recv(4096))
                connection.sendall(left.pop(0) if len(left) > 1 else left[0])
            except OSError as error:
                asked.append(str(error).encode())
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def loopback(host: str = "127.0.0.1") -> tuple[socket.socket, int]:
    """Return a socket bound to a free port, and that port."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    return listener, listener.getsockname()[1]


class Clock:
    """Time that passes only while one sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.slept.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:{}", "localhost:{}", "0.0.0.0:{}", "[::]:{}", "127.0.0.1:{},localhost:1"]
)
def test_a_living_proxy_is_found(listen: str) -> None:
    """Wildcard listeners are asked at a loopback address, and of several the first is asked."""
    listener, port = loopback()
    with serving(listener, ALIVE) as asked:
        assert health.check(listen.format(port)) is None
    assert [b"GET /-/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"] == asked


def test_a_proxy_on_ipv6_alone_is_found() -> None:
    """``localhost`` means either family."""
    try:
        listener, port = loopback("::1")
    except OSError:
        pytest.skip("this machine has no ::1")
    with serving(listener, ALIVE):
        assert [None] * 3 == [health.check(f"{host}:{port}") for host in ("localhost", "[::1]", "[::]")]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (NOT_READY, WAITING),
        (b"HTTP/1.1 400 Bad Request\r\nX-Metquay-Proxy-Error: bad-request\r\n\r\n{}", CLOSED),
        (b"HTTP/1.1 403 Forbidden\r\nX-Metquay-Proxy-Error: x\r\n\r\n{}", "the proxy at {} answers with status 403"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>Welcome to metquay-proxy", ANOTHER),
        (b"HTTP/1.1 503 Busy\r\n\r\nnot ready\n", ANOTHER),
        (b"HTTP/1.1 500 Oops\r\n\r\n\x1b[31mred", ANOTHER),
        (b"SSH-2.0-OpenSSH_9.2\r\n", ANOTHER),
        (b"", CLOSED),
    ],
)
def test_another_answer_is_told_in_one_clean_line(answer: bytes, why: str) -> None:
    """Why, and what to do; nothing of what a foreign program says gets there; ``--ready`` asks /-/ready."""
    listener, port = loopback()
    with serving(listener, answer) as asked:
        assert why.format(f"127.0.0.1:{port}") == health.check(f"127.0.0.1:{port}", ready=True)
    assert asked[0].startswith(b"GET /-/ready ")


def test_nobody_to_ask() -> None:
    """The first family's error is told; an address that can't be asked is a wrong setting, not a sick proxy."""
    listener, port = loopback()
    listener.close()
    refused = f"no answer at localhost:{port} (Connection refused): is the proxy running?"
    assert refused == health.check(f"localhost:{port}")
    assert "with --listen" in str(health.check("localhost:0"))
    with pytest.raises(ValueError, match="is not a host and a port"):
        health.check("nonsense")


@pytest.mark.skipif(sys.platform == "win32", reason="Python has no unix sockets on Windows")
def test_a_unix_socket_is_asked(tmp_path: Path) -> None:
    """Its path stands in METQUAY_LISTEN; an owner that accepts nobody is not waited for."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    with serving(listener, ALIVE):
        assert health.check(f"unix:{tmp_path}/s") is None
    there, none = f"unix:{tmp_path}/full", f"unix:{tmp_path}/t"
    assert f"no answer at {none} (No such file or directory): is the proxy running?" == health.check(none)
    with socket.socket(socket.AF_UNIX) as full, ExitStack() as waiting:
        full.bind(str(tmp_path / "full"))
        full.listen(0)
        for client in [waiting.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]:
            client.setblocking(False)  # noqa: FBT003 - the standard library's own
            client.connect_ex(str(tmp_path / "full"))
        assert "is the proxy running?" in str(health.check(there))


def test_the_proxys_own_tls_is_spoken_but_not_judged() -> None:
    """The certificate names the tools' host, and may be the lab's own; set on one side alone, it is told in a line."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("proxy.lab.example").configure_cert(context)
    listener, port = loopback()
    with serving(listener, ALIVE, tls=context):
        assert health.check(f"127.0.0.1:{port}", tls=True) is None
        assert CLOSED.format(f"127.0.0.1:{port}") == health.check(f"127.0.0.1:{port}")
    listener, port = loopback()
    with serving(listener, ALIVE):
        why = "METQUAY_TLS_CERT (--tls-cert) is set here. Is it for the proxy too?"
        assert f"no https at 127.0.0.1:{port}: {why}" == health.check(f"127.0.0.1:{port}", tls=True)


@pytest.mark.parametrize(
    ("answers", "wait", "why", "slept"),
    [
        ([NOT_READY, NOT_READY, ALIVE], 30, None, [0.1, 0.1]),
        ([NOT_READY], 0.25, WAITING, [0.1, 0.1, 0.05]),
    ],
)
def test_waiting(answers: list[bytes], wait: float, why: str | None, slept: list[float]) -> None:
    """``--wait`` asks every tenth of a second, and ends as soon as it is so, or at its time with the last reason."""
    clock = Clock()
    listener, port = loopback()
    with serving(listener, *answers):
        told = health.check(f"127.0.0.1:{port}", ready=True, wait=wait, clock=clock)
    assert why == told
    assert pytest.approx(slept) == clock.slept


@pytest.mark.parametrize("drips", [False, True])
def test_a_proxy_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, drips: bool) -> None:  # noqa: FBT001 - a table
    """A hanging process is not alive, nor is one that sends a byte now and then."""
    monkeypatch.setattr(health, "TIMEOUT", 0.2)
    listener, port = loopback()
    listener.listen()

    def drip() -> None:
        client, _ = listener.accept()
        with suppress(OSError):
            while True:
                client.send(b"x")
                time.sleep(0.01)
        client.close()

    thread = threading.Thread(target=drip if drips else listener.fileno)
    thread.start()
    with listener:
        assert ("another program" if drips else "timed out") in str(health.check(f"127.0.0.1:{port}"))
        thread.join()


@pytest.mark.slow
def test_serve_and_health_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 3,000 environments and .env files made by chance, whatever the case of names, quotes and empty values."""
    chance = random.Random(13)  # noqa: S311 - no secret
    names = ["METQUAY_LISTEN", "metquay_listen", "Metquay_Listen", "METQUAY_TLS_CERT", "OUTER"]
    values = ["", " ", "box:1", "'box:2'", '"box:3"', "box:4 # why", "'open", "# why", "${OUTER}"]
    values.append("${METQUAY_LISTEN:-box:5}")
    equals = ["=", " = ", ":", ""]
    heads = ["", "", "export ", "set ", "#", "$env:", "\ufeff"]
    ends = ["\n", "\r\n", "\n\n", " \n", "'\n", '"\n']
    monkeypatch.setattr(settings, "SECRETS_DIRECTORY", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    for _ in range(3000):
        statements = ["".join(map(chance.choice, (heads, names, equals, values, ends))) for _ in range(4)]
        (tmp_path / ".env").write_bytes("".join(statements).encode())
        environ = {chance.choice(names): chance.choice(values) for _ in range(chance.randrange(2))}
        monkeypatch.setattr(os, "environ", environ)
        try:
            found = settings.load(sandbox=True).sources()
        except settings.SettingsError as error:
            found = error.sources
        expected = {variable: value for variable, value, source in found if source != "default"}
        for variable in ("METQUAY_LISTEN", "METQUAY_TLS_CERT"):
            shown, seen = expected.get(variable), find().get(variable.removeprefix("METQUAY_").lower())
            assert shown == seen or (shown == "***" and seen is not None), (  # it looks like no path
                environ,
                statements,
            )


def test_files_of_secrets_do_not_say_where_the_proxy_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy takes any setting from there; ``health`` knows flag, environment and .env alone (README)."""
    (tmp_path / "METQUAY_LISTEN").write_text("box:1")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ("box", 1, "") == settings.load(sandbox=True).listen[0]
    assert "listen" not in find()
