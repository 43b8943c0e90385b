"""A slow link between two hosts of our own: network namespaces, joined with a round trip and a loss of our choosing.

Needs root on Linux. Where the kernel has netem, it delays and loses the packets of a veth pair; elsewhere this process
does, between two TUN devices. Either way real TCP stacks stand at both ends, so that handshakes, retransmissions and
congestion windows cost what they cost on a real network.

Facts: a TUN device hands whole IP packets to whoever opened it (Linux's networking/tuntap.rst). 198.18.0.0/15 is set
aside for measurements (RFC 2544, appendix C.2.2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.peers import Missing

if TYPE_CHECKING:
    from collections.abc import Iterator

NEAR: Final = "198.18.0.1"
FAR: Final = "198.18.0.2"
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_PACKET: Final = 65536


class Link(NamedTuple):
    """The words that start a program on either host, and what delays the packets between them."""

    near: tuple[str, ...]
    far: tuple[str, ...]
    how: str


@contextlib.contextmanager
def link(round_trip: float, loss: float) -> Iterator[Link]:
    """Join two new hosts, ``NEAR`` and ``FAR``.

    ``round_trip`` is in seconds; ``loss`` is the part of packets lost, each way. Raises ``Missing``.
    """
    if os.geteuid() != 0:
        raise Missing("it needs root, for network namespaces")
    names = [f"metquay-{end}-{os.getpid()}" for end in ("near", "far")]
    enter = [("ip", "netns", "exec", name) for name in names]
    with contextlib.ExitStack() as stack:
        for name, start in zip(names, enter, strict=True):
            _do("ip", "netns", "add", name)
            stack.callback(_do, "ip", "netns", "delete", name)
            _do(*start, "ip", "link", "set", "lo", "up")
        how = "netem"
        devices = _netem(names, round_trip, loss)
        if devices is None:
            how = "TUN"
            devices = stack.enter_context(_tunnel(names, round_trip / 2, loss))
        for start, device, address, peer in zip(enter, devices, (NEAR, FAR), (FAR, NEAR), strict=True):
            _do(*start, "ip", "address", "add", address, "peer", peer, "dev", device)
            _do(*start, "ip", "link", "set", device, "up")
        yield Link(enter[0], enter[1], how)


def _do(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise Missing(f"{' '.join(words)}: {error.stderr.strip()}") from None
    except FileNotFoundError:
        raise Missing(f"there is no {words[0]} on PATH (Debian: iproute2)") from None


def _netem(names: list[str], round_trip: float, loss: float) -> list[str] | None:
    """Join the hosts with a veth pair under netem; None where the kernel has none."""
    devices = ["metquay0", "metquay1"]
    _do(
        "ip",
        "link",
        "add",
        devices[0],
        "netns",
        names[0],
        "type",
        "veth",
        "peer",
        "name",
        devices[1],
        "netns",
        names[1],
    )
    for name, device in zip(names, devices, strict=True):
        delay = ("delay", f"{round_trip / 2 * 1e6:.0f}us", "loss", f"{loss:%}")
        try:
            _do("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", "netem", *delay)
        except Missing:
            _do("ip", "netns", "exec", name, "ip", "link", "delete", device)
            return None
    return devices


@contextlib.contextmanager
def _tunnel(names: list[str], delay: float, loss: float) -> Iterator[list[str]]:
    devices = [f"mq{end}-{os.getpid()}" for end in range(2)]
    ends = []
    for name, device in zip(names, devices, strict=True):
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN_NO_PI))
        _do("ip", "link", "set", device, "netns", name)
        ends.append(end)
    stop = threading.Event()
    carrier = threading.Thread(target=_carry, args=(ends, delay, loss, stop))
    carrier.start()
    try:
        yield devices
    finally:
        stop.set()
        carrier.join()
        for end in ends:
            os.close(end)


def _carry(ends: list[int], delay: float, loss: float, stop: threading.Event) -> None:
    """Carry packets from each end to the other, ``delay`` seconds later; not all of them."""
    chance = random.Random(1)  # noqa: S311 - the same packets are lost each time
    under_way: deque[tuple[float, int, bytes]] = deque()
    while not stop.is_set():
        left = under_way[0][0] - time.monotonic() if under_way else 0.1
        if left > 0:
            ready, _, _ = select.select(ends, [], [], left)
            for end in ready:
                other = ends[1 - ends.index(end)]
                with contextlib.suppress(BlockingIOError):
                    while True:
                        packet = os.read(end, _PACKET)
                        if chance.random() >= loss:
                            under_way.append((time.monotonic() + delay, other, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, packet = under_way.popleft()
            with contextlib.suppress(OSError):  # a full queue or a device that is down loses packets, as networks do
                os.write(end, packet)
