"""Two network namespaces with a delay between them: Linux, as root. Where the kernel has no netem, too.

What one side's TUN device takes in comes out of the other's so much later, by a process that copies packets.
"""

from __future__ import annotations

import fcntl
import heapq
import multiprocessing
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import TypeAlias

from mlx_gptoss.distributed.starter import Handle, LocalStarter

HERE, THERE = "10.99.0.1", "10.99.0.2"
SPACE = "gptoss-there"
DEVICES = ("gptoss0", "gptoss1")
Delay: TypeAlias = "Synchronized[float]"
_TUNSETIFF, _TUN, _NO_HEADER = 0x400454CA, 0x0001, 0x1000


class StarterThere:
    """Starts ranks in the other namespace, which they reach this one from by HERE."""

    def start(self, rank: int, arguments: Sequence[str], secret: bytes) -> Handle:
        """As Starter."""
        into = f"['ip', 'netns', 'exec', {SPACE!r}, sys.executable, *sys.argv[1:]]"
        entered = f"import os, sys; os.execvp('ip', {into})"
        return LocalStarter().start(rank, ["-c", entered, *arguments], secret)


@contextmanager
def delayed(seconds: float) -> Iterator[Delay]:
    """While it lasts, THERE is so far away, each way; as far as its `value` says then."""
    spawned = multiprocessing.get_context("spawn")
    ready, delay = spawned.Event(), spawned.Value("d", seconds)
    process = spawned.Process(target=_copy, args=(delay, ready), daemon=True)
    try:
        process.start()
        if not ready.wait(60):
            raise RuntimeError("the link cannot be set up: it needs root, and /dev/net/tun")
        yield delay
    finally:
        process.kill()
        process.join()
        subprocess.run(["ip", "netns", "del", SPACE], check=False)


def _copy(delay: Delay, ready: Event) -> None:
    here, there = (_open(name) for name in DEVICES)
    for line in (
        f"ip netns add {SPACE}",
        f"ip link set {DEVICES[1]} netns {SPACE}",
        f"ip addr add {HERE} peer {THERE} dev {DEVICES[0]}",
        f"ip link set {DEVICES[0]} up",
        f"ip netns exec {SPACE} ip link set lo up",
        f"ip netns exec {SPACE} ip addr add {THERE} peer {HERE} dev {DEVICES[1]}",
        f"ip netns exec {SPACE} ip link set {DEVICES[1]} up",
    ):
        subprocess.run(line.split(), check=True, stdout=sys.stderr)
    ready.set()
    waiting: list[tuple[float, int, int, bytes]] = []
    numbers = count()
    while True:
        rest = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([here, there], [], [], rest)
        due = time.monotonic() + delay.value
        for device in readable:
            other = there if device == here else here
            heapq.heappush(waiting, (due, next(numbers), other, os.read(device, 1 << 16)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(waiting)
            os.write(device, packet)


def _open(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _TUN | _NO_HEADER))
    return device
