"""The measuring instruments: programs and what they use of the machine, load, latency, streams.

Owns nothing that knows a contender. Must not judge a figure.

Facts: Linux gives every process a CPU clock in nanoseconds (clock_getcpuclockid(3): the id is made of the pid), while
utime and stime in /proc count in hundredths of a second. VmHWM is the peak of resident memory since 5 was written to
clear_refs (proc(5)). Lua writes whole numbers of up to 14 digits as such. Latency counts from when a request was due,
else a stalled program would hide its own stall.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import select
import signal
import socket
import statistics
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

PATH: Final = "/api/v1/customers?first=0&limit=50"
"""What is asked for: two kilobytes of JSON."""
LOCAL: Final = "127.0.0.1"
_HEADERS: Final = ("User-Agent: label-printer/2.1", "Accept: application/json")
MIB: Final = 1 << 20
BIG: Final = "/api/v1/big"
UPLOAD: Final = "/api/v1/uploads/body"
_PIECE: Final = 1 << 18
_BUSY: Final = 64
_PATIENCE: Final = 30.0
_SCRIPT: Final = """
function init(arguments)
  local number, size = tonumber(arguments[1]), tonumber(arguments[2])
  if size > 0 then
    wrk.method, wrk.body = "POST", string.rep("x", size)
  end
  if number > 0 then
    local before, after = wrk.format(nil, wrk.path .. "&number=@"):match("^(.-)@(.*)$")
    request = function()
      number = number + 1
      return before .. number .. after
    end
  end
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format('\\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


class Kind(NamedTuple):
    """What a load asks for."""

    path: str = PATH
    new_target: bool = False
    """Whether each request has a target of its own, which no request before had."""
    body: int = 0
    """Bytes of a POST's body; 0: it is a GET."""
    close: bool = False
    """Whether each request has a connection of its own."""


PLAIN: Final = Kind()
NEW_HEAD: Final = "/api/v1/new-head/customers?first=0&limit=50"
"""The same, and no two answers have the same head."""
PIECES: Final = "/api/v1/pieces?first=0&limit=50"
"""The same, which comes in three pieces."""


class Failed(Exception):
    """A contender could not be measured; the text says why."""


FAILURES: Final = (Failed, OSError, subprocess.SubprocessError, ValueError)
"""What one contender may do to its measurement, and must not do to the others': refuse, hang, die, talk nonsense."""


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        port: int = probe.getsockname()[1]
        return port


class Program:
    """A running program with all its descendants."""

    def __init__(self, command: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> None:
        """Start it in ``folder``, where its output goes to ``output.txt``."""
        base = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        folder.mkdir(parents=True, exist_ok=True)
        self._output = folder / "output.txt"
        self.began = time.perf_counter()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=folder, env=base | dict(environment), stdout=output, stderr=output, start_new_session=True
            )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def finish(self) -> float:
        """Wait for its end; return after how many seconds it came. Raises ``Failed`` where the program did."""
        descriptor = os.pidfd_open(self._process.pid)  # Popen.wait looks 50 ms apart when it has a time limit
        try:
            ended, _, _ = select.select([descriptor], [], [], _PATIENCE)
        finally:
            os.close(descriptor)
        seconds = time.perf_counter() - self.began
        if not ended or self._process.wait():
            raise Failed(f"it did not end well:\n{self.output}")
        return seconds

    @property
    def output(self) -> str:
        """What it has written so far, the last 2,000 characters."""
        return self._output.read_text(errors="replace")[-2000:]

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        found = [self._process.pid]
        for pid in found:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as children:  # noqa: PTH123 - no file
                found += map(int, children.read().split())
        return found

    def cpu(self) -> float:
        """Return the seconds of CPU time, user's and kernel's, that it has used."""
        total = 0.0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                total += time.clock_gettime(~pid << 3 | 2)
        return total

    def memory(self, field: str = "VmRSS") -> float:
        """Return the MiB that it keeps in memory; ``VmHWM``: the most since ``forget_peak``."""
        total = 0
        for pid in self.pids:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:  # noqa: PTH123 - no file
                total += sum(int(line.split()[1]) for line in status if line.startswith(field))
        return total / 1024

    def forget_peak(self) -> None:
        """Let the peak of its memory begin anew."""
        for pid in self.pids:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "w") as references:  # noqa: PTH123 - no file
                references.write("5")


@dataclass(frozen=True, slots=True)
class Door:
    """Where requests go: a port of this machine, with what a client must send and trust."""

    port: int
    tls: ssl.SSLContext | None = None
    headers: tuple[str, ...] = _HEADERS

    def connect(self) -> socket.socket:
        """Open a connection."""
        connection = socket.create_connection((LOCAL, self.port), timeout=_PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection if self.tls is None else self.tls.wrap_socket(connection, server_hostname=LOCAL)

    def head(self, method: str, path: str, *more: str) -> bytes:
        """Return the head of a request."""
        fields = (f"Host: {LOCAL}:{self.port}", *self.headers, *more)
        return "\r\n".join((f"{method} {path} HTTP/1.1", *fields, "", "")).encode()


def first_answer(program: Program, door: Door) -> float:
    """Ask until the program answers with 200; return after how many seconds of its life it did."""
    request = door.head("GET", PATH, "Connection: close")
    while time.perf_counter() < program.began + 4 * _PATIENCE:  # under valgrind a start takes half a minute
        with contextlib.suppress(OSError), door.connect() as connection:
            connection.sendall(request)
            if connection.recv(_PIECE).startswith(b"HTTP/1.1 200"):
                return time.perf_counter() - program.began
        if not program.alive:
            break
        time.sleep(0.002)
    raise Failed(f"it never answered:\n{program.output}")


class Wrk(NamedTuple):
    """The load generator: its program, what that needs of the environment, and the script that asks and reports."""

    path: Path
    environment: Mapping[str, str]
    script: Path

    @classmethod
    def of(cls, path: Path, environment: Mapping[str, str], folder: Path) -> Self:
        """Write the script into ``folder``."""
        script = folder / "load.lua"
        script.write_text(_SCRIPT)
        return cls(path, environment, script)


class Load(NamedTuple):
    """What ``load`` saw; latencies in microseconds."""

    requests: int
    seconds: float
    p50: float
    p99: float
    cpu: float
    """Microseconds of the program's CPU time for each request."""

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def load(  # noqa: PLR0913 - a load is made of these
    wrk: Wrk, door: Door, program: Program | None, *, connections: int, seconds: int, kind: Kind = PLAIN
) -> Load:
    """Keep ``connections`` busy, each sending its next request when the last one was answered.

    Raises ``Failed`` where one request in a thousand failed.
    """
    fields = [*door.headers]
    if kind.close:
        fields.append("Connection: close")
    if kind.body:
        fields.append("Content-Type: application/json")
    threads = 2 if connections > _BUSY else 1
    options = [
        f"-t{threads}",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        f"{_PATIENCE:.0f}s",
        "-s",
        str(wrk.script),
        *(word for field in fields for word in ("-H", field)),
        f"{'http' if door.tls is None else 'https'}://{LOCAL}:{door.port}{kind.path}",
        "--",
        str(time.monotonic_ns() // 1000 % 10**13 if kind.new_target else 0),  # requests count slower than this clock
        str(kind.body),
    ]
    before = 0.0 if program is None else program.cpu()
    output = subprocess.run(
        [str(wrk.path), *options],
        env=dict(wrk.environment),
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 2 * _PATIENCE,
    ).stdout
    after = 0.0 if program is None else program.cpu()
    seen = json.loads(output.rstrip().rpartition("\n")[2])
    if seen["errors"] * 1000 > seen["requests"] or not seen["requests"]:
        raise Failed(f"{seen['errors']} of {seen['requests']} requests failed at {connections} connections")
    cpu = (after - before) / max(1, seen["requests"]) * 1e6
    return Load(seen["requests"], seen["seconds"], seen["p50"], seen["p99"], cpu)


def at_rate(door: Door, rate: int, seconds: float) -> tuple[float, float]:
    """Send ``rate`` requests a second on one connection; return the median and the 99th percentile in microseconds."""
    request = door.head("GET", PATH)
    took = []
    with _no_collector(), door.connect() as connection:
        began = time.perf_counter() + 0.01
        for number in range(int(rate * seconds)):
            due = began + number / rate
            while (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            start = due if time.perf_counter() - due > 1 / rate else time.perf_counter()
            connection.sendall(request)
            _read_answer(connection)
            took.append(time.perf_counter() - start)
    cuts = statistics.quantiles(took, n=100)
    return cuts[49] * 1e6, cuts[98] * 1e6


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _read_answer(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise Failed(f"it answered {head[:40]!r}")
    length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
    while len(body) < int(length[1]) if length else not body.endswith(b"0\r\n\r\n"):
        body += _receive(connection)


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(_PIECE)
    if not data:
        raise Failed("it closed the connection in mid-answer")
    return data


class Stream(NamedTuple):
    """What it took to bring one large body through."""

    rate: float
    """MiB per second."""
    cpu: float
    """Milliseconds of the program's CPU time for each GiB."""
    growth: float
    """MiB by which the program's memory rose at most."""


def stream(door: Door, program: Program | None, *, size: int, up: bool) -> Stream:
    """Bring ``size`` bytes down, or up."""
    before = cpu = 0.0
    if program is not None:
        program.forget_peak()
        before, cpu = program.memory(), program.cpu()
    began = time.perf_counter()
    with door.connect() as connection:
        (_upload if up else _download)(connection, door, size)
    seconds = time.perf_counter() - began
    if program is None:
        return Stream(size / seconds / MIB, 0.0, 0.0)
    used = (program.cpu() - cpu) * 1000 * (1 << 30) / size
    return Stream(size / seconds / MIB, used, program.memory("VmHWM") - before)


def _download(connection: socket.socket, door: Door, size: int) -> None:
    connection.sendall(door.head("GET", BIG, "Connection: close"))
    received = 0
    buffer = bytearray(_PIECE)
    while count := connection.recv_into(buffer):
        received += count
    if received < size:
        raise Failed(f"a download ended after {received} bytes")


def _upload(connection: socket.socket, door: Door, size: int) -> None:
    connection.sendall(door.head("PUT", UPLOAD, f"Content-Length: {size}", "Connection: close"))
    piece = bytes(_PIECE)
    for _ in range(size // _PIECE):
        connection.sendall(piece)
    answer = connection.recv(_PIECE)
    if not re.match(rb"HTTP/1.1 20[0-9]", answer):
        raise Failed(f"an upload was answered {answer[:40]!r}")


@contextlib.contextmanager
def open_clients(door: Door, count: int) -> Iterator[None]:
    """Hold ``count`` connections open, each of which made one request."""
    request = door.head("GET", PATH)
    clients = []
    try:
        for _ in range(count):
            client = door.connect()
            clients.append(client)
            client.sendall(request)
            _read_answer(client)
        yield
    finally:
        for client in clients:
            client.close()
