"""What a machine says of itself to the others: `python -m mlx_gptoss.distributed.about` prints it as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from ipaddress import IPv4Interface

import mlx.core as mx

from mlx_gptoss.device import available_memory, describe, total_memory

BACKENDS = ("ring", "jaccl")


@dataclass(frozen=True)
class Facts:
    """memory, room: bytes in all, and those a model may take. networks: its addresses with their networks,
    such as 10.0.0.1/24. ssh: the addresses of both ends, as SSH_CONNECTION tells them.
    """

    package: str
    mlx: str
    python: str
    chip: str
    memory: int
    room: int
    backends: list[str]
    networks: list[str]
    ssh: str


def facts() -> Facts:
    """Those of this machine."""
    return Facts(
        package=version("gptoss-mlx"),
        mlx=version("mlx"),
        python=platform.python_version(),
        chip=describe()["chip"],
        memory=total_memory(),
        room=available_memory(),
        backends=[name for name in BACKENDS if mx.distributed.is_available(name)],
        networks=networks(),
        ssh=os.environ.get("SSH_CONNECTION", ""),
    )


def networks() -> list[str]:
    """The addresses of the interfaces that are up, loopback aside; [] where the system's tool is missing."""
    command = ["ifconfig", "-a", "-u"] if sys.platform == "darwin" else ["ip", "-o", "-4", "addr"]
    with suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
        return parse_networks(told)
    return []


def parse_networks(told: str) -> list[str]:
    """The addresses in what macOS's ifconfig or Linux's ip prints."""
    found = []
    for address, mask, length in re.findall(
        r"\binet (\d+\.\d+\.\d+\.\d+)(?: netmask 0x([0-9a-f]{8})|/(\d+))", told
    ):
        bits = int(length) if length else int(mask, 16).bit_count()
        if not IPv4Interface(f"{address}/{bits}").is_loopback:
            found.append(f"{address}/{bits}")
    return found


def main() -> None:
    """Print the facts."""
    print(json.dumps(asdict(facts())), flush=True)


if __name__ == "__main__":
    main()
