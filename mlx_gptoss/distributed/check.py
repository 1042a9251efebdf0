"""Find out whether hosts can run a model together: reach them, compare versions, measure every link."""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Interface
from itertools import combinations
from queue import Empty, Queue
from typing import Any

from mlx_gptoss.distributed.about import Facts
from mlx_gptoss.distributed.about import facts as facts_here
from mlx_gptoss.distributed.collective import collective_settings
from mlx_gptoss.distributed.hosts import Host, HostList
from mlx_gptoss.distributed.link import LIMIT
from mlx_gptoss.distributed.plan import Machine
from mlx_gptoss.distributed.ssh import HostProcess, is_here, printable, require_here
from mlx_gptoss.errors import HostError

LOOK = 0.2  # seconds between two looks at whether a process that should answer has ended
ANSWER = 30.0  # seconds for a host to tell of itself: Python starts, MLX is imported


@dataclass(frozen=True)
class Link:
    """What was measured between two ranks, or among all of them (`ranks`), by one way.

    latency: seconds, of a round trip over TCP, of an all_sum of a hidden state otherwise. bandwidth: bytes a
    second. problem: why there are none.
    """

    ranks: tuple[int, ...]
    way: str
    address: str
    latency: float | None = None
    bandwidth: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """hosts: as given, with the addresses that were found best. facts: of each, or why there are none."""

    hosts: HostList
    facts: tuple[Facts | str, ...]
    links: tuple[Link, ...]

    @property
    def problems(self) -> list[str]:
        """What keeps the hosts from running a model together, in one line each."""
        found = [fact for fact in self.facts if isinstance(fact, str)]
        known = [fact for fact in self.facts if isinstance(fact, Facts)]
        for name, host in zip(self.hosts.hosts, self.facts, strict=True):
            for what in ("package", "mlx"):
                if isinstance(host, Facts) and (theirs := getattr(host, what)) != getattr(known[0], what):
                    told = {"package": "gptoss-mlx", "mlx": "mlx"}[what]
                    found.append(
                        f"{name.name} has {told} {theirs}, and {self.hosts.hosts[0].name} "
                        f"{getattr(known[0], what)}: install the same version on all"
                    )
        between: dict[tuple[int, ...], list[Link]] = {}
        for link in self.links:
            if link.way == "tcp":  # the only way without which nothing runs
                between.setdefault(link.ranks, []).append(link)
        return found + [links[0].problem for links in between.values() if all(x.problem for x in links)]


def check_hosts(hosts: HostList) -> Report:
    """Ask every host and measure every link; takes some seconds a link. Raises RequestError, when the first
    host is not this machine.
    """
    require_here(hosts.hosts)
    facts = ask_all(hosts)
    found: Report = Report(hosts, tuple(facts), ())
    if any(isinstance(fact, str) for fact in facts):
        return found
    known = [fact for fact in facts if isinstance(fact, Facts)]
    links, best = [], [address_of(hosts, known, rank) for rank in range(len(known))]
    for first, second in combinations(range(len(known)), 2):
        measured = [
            _tcp(hosts, first, second, address) for address in candidates(hosts, known, first, second)
        ]
        links += measured
        if second == first + 1:  # the ring's own links
            best[second] = max(measured, key=lambda link: link.bandwidth or 0.0).address
            if first == 0:
                best[0] = _beside(best[1], known[0]) or best[0]
    given = replace(
        hosts, hosts=tuple(replace(h, ips=h.ips or (a,)) for h, a in zip(hosts.hosts, best, strict=True))
    )
    for backend in _collectives(given, known):
        links.append(_all_sums(given, backend))
    return Report(given, tuple(facts), tuple(links))


def machines_of(hosts: HostList) -> list[Machine]:
    """The hosts with the bytes that a model may take on each. Raises HostError, RequestError."""
    require_here(hosts.hosts)
    machines = []
    for host, fact in zip(hosts.hosts, ask_all(hosts), strict=True):
        if isinstance(fact, str):
            raise HostError(fact)
        # Ranks that share a machine share its memory.
        machines.append(Machine(host.name, fact.room // hosts.hosts.count(host)))
    return machines


def ask_all(hosts: HostList) -> list[Facts | str]:
    """What each host tells of itself, all at once; or in one line why it does not."""

    def ask(host: Host) -> Facts | str:
        try:
            if is_here(host):
                return facts_here()
            return Facts(**_asked(host, hosts, "about", None, ANSWER))
        except (HostError, TypeError) as error:
            return (
                str(error) if isinstance(error, HostError) else f"{host.name}: has another version ({error})"
            )

    with ThreadPoolExecutor(len(hosts.hosts)) as threads:
        return list(threads.map(ask, hosts.hosts))


def address_of(hosts: HostList, facts: Sequence[Facts], rank: int) -> str:
    """Where the others reach a rank: as given, or the way that ssh went."""
    host = hosts.hosts[rank]
    if host.ips:
        return host.ips[0]
    if all(is_here(h) for h in hosts.hosts):
        return "127.0.0.1"
    ways = [fact.ssh.split() for fact in facts if len(fact.ssh.split()) == 4]
    if is_here(host):
        return ways[0][0] if ways else "127.0.0.1"
    way = facts[rank].ssh.split()
    return way[2] if len(way) == 4 else host.name.rpartition("@")[2]


def candidates(hosts: HostList, facts: Sequence[Facts], first: int, second: int) -> list[str]:
    """The addresses of a rank that another one may reach: those given, else that of ssh and those in a
    network that both are in.
    """
    if hosts.hosts[second].ips:
        return list(hosts.hosts[second].ips)
    found = [address_of(hosts, facts, second)]
    if is_here(hosts.hosts[first]) and is_here(hosts.hosts[second]):
        return found
    mine = [IPv4Interface(network) for network in facts[first].networks]
    for network in map(IPv4Interface, facts[second].networks):
        if any(one.network == network.network and one.ip != network.ip for one in mine):
            found.append(str(network.ip))
    plain = [address for address in found if ":" not in address]  # MLX's backends take IPv4 alone
    return list(dict.fromkeys(plain or found))


def _beside(address: str, facts: Facts) -> str | None:
    """A machine's own address in the network of another's."""
    networks = [IPv4Interface(network) for network in facts.networks]
    return next(
        (str(n.ip) for n in networks if ":" not in address and IPv4Address(address) in n.network), None
    )


def _collectives(hosts: HostList, facts: Sequence[Facts]) -> Iterator[str]:
    """The backends of MLX that all hosts can use."""
    for backend in ("ring", "jaccl-ring" if hosts.backend == "jaccl-ring" else "jaccl"):
        wired = backend == "ring" or all(host.rdma for host in hosts.hosts)
        if wired and all(backend.partition("-")[0] in fact.backends for fact in facts):
            yield backend


def _tcp(hosts: HostList, first: int, second: int, address: str) -> Link:
    """Measure from one rank to an address of another."""
    link = partial(Link, (first, second), "tcp", address)
    token = secrets.token_hex(32)
    asked = {"way": "listen", "host": address, "token": token}
    try:
        with ExitStack() as stack:
            listening = _Asked(hosts.hosts[second], hosts.variables(), "link", asked)
            stack.callback(listening.end)
            port = listening.answer(ANSWER)["port"]
            way = {"way": "measure", "host": address, "port": port, "token": token}
            told = _asked(hosts.hosts[first], hosts, "link", way, LIMIT)
            return link(told["latency"], told["bandwidth"])
    except HostError as error:
        return link(problem=str(error))


def _all_sums(hosts: HostList, backend: str) -> Link:
    """Measure a backend of MLX among all ranks at once."""
    addresses = [host.ips[0] for host in hosts.hosts]
    link = partial(Link, tuple(range(len(addresses))), backend, ", ".join(dict.fromkeys(addresses)))
    ports = random.sample(range(20000, 32000), len(addresses))
    rdma = [host.rdma for host in hosts.hosts]
    with ExitStack() as stack:
        asked = []
        try:
            for rank, host in enumerate(hosts.hosts):
                settings = collective_settings(backend, rank, addresses, ports, rdma)
                settings = {"way": "all_sums", **settings}
                asked.append(_Asked(host, hosts.variables(backend), "link", settings))
                stack.callback(asked[-1].end)
            told = [one.answer(LIMIT) for one in asked]
        except HostError as error:
            return link(problem=str(error))
    return link(max(one["latency"] for one in told), min(one["bandwidth"] for one in told))


class _Asked:
    """A module of this room at work on a host."""

    def __init__(
        self, host: Host, variables: Mapping[str, str], module: str, asked: dict[str, Any] | None
    ) -> None:
        self._name, self._lines = host.name, Queue[str]()
        arguments = ["-m", f"mlx_gptoss.distributed.{module}"]
        self._process = HostProcess(host, arguments, variables, self._lines.put)
        if asked is not None:
            self._process.write(json.dumps(asked).encode() + b"\n")

    def answer(self, timeout: float) -> dict[str, Any]:
        """The JSON object that it prints next. Raises HostError, also for a problem that it tells."""
        deadline = time.monotonic() + timeout
        while True:
            with suppress(Empty):
                line = self._lines.get(timeout=LOOK)
                break
            if self._process.poll() is not None and self._lines.empty():
                raise HostError(f"{self._name}: {self._process.last or 'it ended without an answer'}")
            if time.monotonic() > deadline:
                raise HostError(f"{self._name}: no answer within {timeout:g} s")
        try:
            told: dict[str, Any] = json.loads(line)
        except ValueError:
            raise HostError(f"{self._name}: answered {line!r:.80}") from None
        if "problem" in told:
            raise HostError(f"{self._name}: {printable(str(told['problem']))}")
        return {name: printable(value) if isinstance(value, str) else value for name, value in told.items()}

    def end(self) -> None:
        self._process.end()


def _asked(
    host: Host, hosts: HostList, module: str, asked: dict[str, Any] | None, timeout: float
) -> dict[str, Any]:
    """The one answer of a module."""
    one = _Asked(host, hosts.variables(), module, asked)
    try:
        return one.answer(timeout)
    finally:
        one.end()
