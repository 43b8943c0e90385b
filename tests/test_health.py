from __future__ import annotations

import os
import random
import socket
import ssl
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy import health, settings
from metquay_proxy.rules.address import DEFAULT_LISTEN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ALIVE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nalive"
NOT_READY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 8\r\n\r\nno token"

unix_only = pytest.mark.skipif(sys.platform == "win32", reason="Python has no unix sockets on Windows")


class Server:
    """Gives one answer to each connection, in turn (the last one again and again), and keeps what it was asked."""

    def __init__(self, listener: socket.socket, *answers: bytes, tls: ssl.SSLContext | None = None) -> None:
        self.listener = listener
        self.answers = list(answers)
        self.asked: list[bytes] = []
        self.tls = tls

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.listener.getsockname()[1])

    def serve(self) -> None:
        """Answer until the listener is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return  # the test has ended
            try:
                if self.tls:
                    connection = self.tls.wrap_socket(connection, server_side=True)
                self.asked.append(connection.recv(4096))
                connection.sendall(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
            except OSError as error:
                self.asked.append(str(error).encode())
            connection.close()


@contextmanager
def serving(listener: socket.socket, *answers: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Run a ``Server`` in a thread."""
    listener.listen()
    server = Server(listener, *answers, tls=tls)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def loopback(host: str = "127.0.0.1") -> socket.socket:
    """Return a socket bound to a free port."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    return listener


class Clock:
    """Time that passes only while one sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
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
    with serving(loopback(), ALIVE) as server:
        assert health.check(listen.format(server.port)) is None
    assert [b"GET /-/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"] == server.asked


def test_a_proxy_on_ipv6_alone_is_found() -> None:
    """``localhost`` means either family."""
    try:
        listener = loopback("::1")
    except OSError:
        pytest.skip("this machine has no ::1")
    with serving(listener, ALIVE) as server:
        assert health.check(f"localhost:{server.port}") is None
        assert health.check(f"[::1]:{server.port}") is None
        assert health.check(f"[::]:{server.port}") is None


def test_readiness_is_another_question() -> None:
    """``--ready`` asks /-/ready, and tells what was answered."""
    with serving(loopback(), NOT_READY) as server:
        listen = f"127.0.0.1:{server.port}"
        assert f"{listen}/-/ready: status 503, no token" == health.check(listen, ready=True)
    assert server.asked[0].startswith(b"GET /-/ready ")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
        (b"HTTP/1.1 500 Oops\r\n\r\n\x1b[31mred", "status 500"),
        (b"HTTP/1.1 503 Busy\r\n\r\n" + b"x" * 9000, "status 503, " + "x" * 200),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP answer"),
        (b"HTTP/1.1 20", "no HTTP answer"),
        (b"", "closed without an answer; does it serve TLS? Then METQUAY_TLS_CERT must be set here too"),
    ],
)
def test_another_answer_is_told_in_one_clean_line(answer: bytes, why: str) -> None:
    """Whatever listens there can't write control characters or pages onto the terminal."""
    with serving(loopback(), answer) as server:
        listen = f"127.0.0.1:{server.port}"
        assert f"{listen}/-/live: {why}" == health.check(listen)


def test_nobody_listening_is_told() -> None:
    """The first family's error is the one that is told."""
    listener = loopback()
    port = listener.getsockname()[1]
    listener.close()
    assert f"localhost:{port}/-/live: Connection refused; is the proxy running?" == health.check(f"localhost:{port}")


def test_a_port_that_the_system_chose_must_be_given() -> None:
    """METQUAY_LISTEN alone does not say where such a proxy is."""
    assert "with --listen" in str(health.check("localhost:0"))


def test_a_malformed_address_is_the_callers_affair() -> None:
    """It is a wrong setting, not a sick proxy."""
    with pytest.raises(ValueError, match="is not a host and a port"):
        health.check("nonsense")


@unix_only
def test_a_unix_socket_is_asked(tmp_path: Path) -> None:
    """Its path stands in METQUAY_LISTEN."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    with serving(listener, ALIVE):
        assert health.check(f"unix:{tmp_path}/s") is None
    assert f"unix:{tmp_path}/t/-/live: No such file or directory; is the proxy running?" == health.check(
        f"unix:{tmp_path}/t"
    )


def test_the_proxys_own_tls_is_spoken_but_not_judged() -> None:
    """The certificate names the tools' host, and may be the lab's own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("proxy.lab.example").configure_cert(context)
    with serving(loopback(), ALIVE, tls=context) as server:
        listen = f"127.0.0.1:{server.port}"
        assert health.check(listen, tls=True) is None
        assert f"{listen}/-/live: closed without an answer" in str(health.check(listen))


def test_tls_to_a_plain_proxy_fails_with_a_line() -> None:
    """METQUAY_TLS_CERT is set here and not there."""
    with serving(loopback(), ALIVE) as server:
        assert "is the proxy running?" in str(health.check(f"127.0.0.1:{server.port}", tls=True))


def test_waiting_ends_as_soon_as_it_is_so() -> None:
    """``--wait`` asks every tenth of a second."""
    clock = Clock()
    with serving(loopback(), NOT_READY, NOT_READY, ALIVE) as server:
        listen = f"127.0.0.1:{server.port}"
        assert health.check(listen, ready=True, wait=30, clock=clock, sleep=clock.sleep) is None
    assert [0.1, 0.1] == clock.slept


def test_waiting_ends_at_its_time() -> None:
    """The last reason is told."""
    clock = Clock()
    with serving(loopback(), NOT_READY) as server:
        listen = f"127.0.0.1:{server.port}"
        why = health.check(listen, ready=True, wait=0.25, clock=clock, sleep=clock.sleep)
    assert f"{listen}/-/ready: status 503, no token" == why
    assert pytest.approx([0.1, 0.1, 0.05]) == clock.slept


def test_a_proxy_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging process is not alive."""
    monkeypatch.setattr(health, "TIMEOUT", 0.05)
    listener = loopback()
    listener.listen()
    with listener:
        assert "timed out" in str(health.check(f"127.0.0.1:{listener.getsockname()[1]}"))


@pytest.mark.parametrize(
    ("environ", "file", "expected"),
    [
        ({}, None, None),
        ({"METQUAY_LISTEN": "a:1"}, "METQUAY_LISTEN=b:2", "a:1"),
        ({"METQUAY_LISTEN": ""}, "METQUAY_LISTEN=b:2", "b:2"),
        ({"metquay_listen": "a:1"}, None, "a:1"),
        ({}, "metquay_listen=b:2", "b:2"),
        ({}, "METQUAY_LISTEN=", None),
    ],
)
def test_where_the_proxy_listens_is_found(
    tmp_path: Path, environ: dict[str, str], file: str | None, expected: str | None
) -> None:
    """The environment wins over .env, and what is empty is absent: as for the proxy itself."""
    if file is not None:
        (tmp_path / ".env").write_text(file)
    assert expected == health.find("METQUAY_LISTEN", environ, str(tmp_path / ".env"))


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
            assert expected.get(variable) == health.find(variable, environ), (environ, statements)


def test_files_of_secrets_do_not_say_where_the_proxy_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy takes any setting from there; ``health`` knows flag, environment and .env alone (README)."""
    (tmp_path / "METQUAY_LISTEN").write_text("box:1")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ("box", 1, "") == settings.load(sandbox=True).listen[0]
    assert health.find("METQUAY_LISTEN", os.environ) is None


def test_an_unreadable_env_file_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessing the default instead would ask the wrong proxy."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", ".env")

    (tmp_path / ".env").touch()
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError):
        health.find("METQUAY_LISTEN", {}, str(tmp_path / ".env"))


def test_the_default_is_the_proxys_own() -> None:
    """Both take it from one place."""
    assert "localhost:6387" == DEFAULT_LISTEN
