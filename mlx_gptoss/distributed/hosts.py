"""The machines a model runs on: a comma list, or the hostfile of `mlx.launch`.

That file is a JSON list of hosts, or an object with `hosts`, `backend` and `envs`; a host is
{"ssh": name, "ips": [addresses that the others reach it by], "rdma": [the device towards each rank]}
(https://ml-explore.github.io/mlx/build/html/usage/distributed.html).
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_gptoss.errors import RequestError
from mlx_gptoss.files import read_limited

LOCAL = ("localhost", "127.0.0.1", "::1")
BACKENDS = ("", "ring", "jaccl", "jaccl-ring")
MAX_FILE_BYTES = 2**20
# What ssh takes as a destination; one that began with "-" would be an option to it.
_NAME = re.compile(r"(?:\w[\w.-]*@)?[A-Za-z0-9_\[][\w.:%\]-]*", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

RdmaDevices = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Host:
    """name: as ssh is told it. ips: its addresses to the others. rdma: its devices towards each rank."""

    name: str
    ips: tuple[str, ...] = ()
    rdma: tuple[RdmaDevices, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether it is this machine, which needs no ssh."""
        return self.name in LOCAL


@dataclass(frozen=True)
class HostList:
    """The hosts in the order of their ranks. backend: "" where the file leaves it open."""

    hosts: tuple[Host, ...]
    backend: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def collective(self) -> str:
        """MLX's backend for sums: as given, else RDMA where every host has devices for it."""
        return self.backend or ("jaccl" if all(host.rdma for host in self.hosts) else "ring")

    def variables(self, backend: str = "") -> dict[str, str]:
        """What the processes on the hosts find in their environment, those that sum by a backend of MLX."""
        # Without it each crossing between GPU and CPU takes longer than a sum (mlx #4438).
        fast = {"MLX_METAL_FAST_SYNCH": "1"} if backend.startswith("jaccl") else {}
        return {**fast, **self.environment}

    def to_json(self) -> str:
        """As `mlx.launch` reads it."""
        hosts = [{"ssh": h.name, "ips": list(h.ips), "rdma": list(h.rdma)} for h in self.hosts]
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return json.dumps({"backend": self.backend, "envs": variables, "hosts": hosts}, indent=2) + "\n"


def read_hosts(hosts: str | Path | Sequence[str]) -> HostList:
    """Hosts from "mac1,mac2", from names one by one, or from a hostfile. Raises RequestError."""
    if isinstance(hosts, Path) or (isinstance(hosts, str) and _names_a_file(hosts)):
        return _read_file(Path(hosts).expanduser())
    names = hosts.split(",") if isinstance(hosts, str) else list(hosts)
    return _checked([_host(name.strip(), "hosts") for name in names], "hosts")


def _names_a_file(text: str) -> bool:
    return text.endswith(".json") or ("/" in text and "," not in text)


def _read_file(path: Path) -> HostList:
    where = str(path)
    try:
        raw = json.loads(read_limited(path, MAX_FILE_BYTES))
    except OSError as error:
        raise _wrong(f"{where}: {error.strerror or error}", "a hostfile as `mlx.launch` reads it") from None
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{where}: not JSON ({error})", "a hostfile as `mlx.launch` reads it") from None
    given = raw if isinstance(raw, dict) else {"hosts": raw}
    entries = given.get("hosts")
    if not isinstance(entries, list):
        raise _wrong(f"{where}: hosts is {entries!r:.80}", "a list of hosts, or an object with `hosts`")
    backend = given.get("backend", "")
    if backend not in BACKENDS:
        raise _wrong(f"{where}: backend is {backend!r:.80}", f"one of {', '.join(filter(None, BACKENDS))}")
    found = [_entry(entry, f"{where}: hosts[{i}]", len(entries)) for i, entry in enumerate(entries)]
    for i, host in enumerate(found):
        if host.rdma and host.rdma[i] is not None:
            raise _wrong(f"{where}: hosts[{i}].rdma[{i}] is {host.rdma[i]!r}", "null: a host towards itself")
    return _checked(found, where, backend, _environment(given.get("envs", []), where))


def _entry(entry: Any, where: str, count: int) -> Host:
    if not isinstance(entry, dict):
        raise _wrong(f"{where} is {entry!r:.80}", 'an object such as {"ssh": "mac1", "ips": ["10.0.0.1"]}')
    ips, rdma = entry.get("ips", []), entry.get("rdma", [])
    if not isinstance(ips, list):
        raise _wrong(f"{where}.ips is {ips!r:.80}", "a list of IP addresses")
    for ip in ips:
        try:
            ipaddress.ip_address(ip if isinstance(ip, str) else "")
        except ValueError:
            raise _wrong(f"{where}.ips holds {ip!r:.80}", "IP addresses") from None
    if not isinstance(rdma, list) or len(rdma) not in (0, count):
        raise _wrong(f"{where}.rdma is {rdma!r:.80}", f"a list of {count} devices, null for the host itself")
    devices: list[RdmaDevices] = []
    for device in rdma:
        several = isinstance(device, list) and bool(device) and all(isinstance(d, str) for d in device)
        if not (device is None or isinstance(device, str) or several):
            raise _wrong(f"{where}.rdma holds {device!r:.80}", "names of devices, lists of them, or null")
        devices.append(tuple(device) if isinstance(device, list) else device)
    name = entry.get("ssh")
    return Host(_host(name, f"{where}.ssh").name, tuple(ips), tuple(devices))


def _host(name: Any, where: str) -> Host:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(
            f"{where}: {name!r:.80} is no host", "a name or address for ssh, such as mac1 or me@10.0.0.2"
        )
    return Host(name)


def _environment(given: Any, where: str) -> dict[str, str]:
    if not isinstance(given, list):
        raise _wrong(f"{where}: envs is {given!r:.80}", 'a list of "NAME=value"')
    found = {}
    for item in given:
        name, mark, value = item.partition("=") if isinstance(item, str) else ("", "", "")
        if not mark or not _VARIABLE.fullmatch(name) or "\n" in value:
            raise _wrong(f"{where}: envs holds {item!r:.80}", '"NAME=value"')
        found[name] = value
    return found


def _checked(
    hosts: list[Host], where: str, backend: str = "", environment: Mapping[str, str] | None = None
) -> HostList:
    if len(hosts) < 2:
        raise _wrong(f"{where}: {len(hosts)} host{'s' * (len(hosts) != 1)}", "two or more")
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1 and name not in LOCAL:
            raise _wrong(f"{where}: {name} is given twice", "each once; localhost may repeat, for trials")
    if any(h.is_local for h in hosts[1:]) and not all(h.is_local for h in hosts):
        raise _wrong(
            f"{where}: this machine is not the first", "localhost first: rank 0 is where the command runs"
        )
    return HostList(tuple(hosts), backend, environment or {})


def _wrong(what: str, expected: str) -> RequestError:
    return RequestError(f"{what}; expected {expected}", "hosts")
