"""MLX's own group of ranks (ring over TCP, JACCL over RDMA): joined by what one JSON object says.

Its environment variables are those that `mlx.launch` sets
(https://ml-explore.github.io/mlx/build/html/usage/distributed.html).
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Interface, ip_address
from typing import Any

import mlx.core as mx

from mlx_gptoss.distributed.hosts import Host, RdmaDevices
from mlx_gptoss.distributed.stage import PartStage
from mlx_gptoss.errors import HostError

# What is measured is the least of so many times: what the machines can do.
TIMES = 3


class Collective:
    """What adds up the parts of all ranks: a Total, once `join` has brought the ranks together.

    settings: see collective_settings.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._group: mx.distributed.Group | None = None

    def join(self) -> None:
        """Meet the others, once in a process. Waits for them without an end. Raises HostError."""
        self._group = join(self._settings)

    def __call__(self, x: mx.array) -> mx.array:
        return x if self._group is None else mx.distributed.all_sum(x, group=self._group)

    def measure(self, stage: PartStage) -> dict[str, float]:
        """Join, and tell the seconds that an all_sum in a token's forward takes and that the rest of it does.

        A chain of as many sums as a token needs, each after a product: what a GPU waits for its links and
        these for it is part of the price.
        """
        config, x = stage.config, mx.ones((1, stage.config.hidden_size), stage.dtype)
        step = _least(lambda: stage.forward(x, [[-1, 1]], None), lambda: stage.make(-1, 0))
        stage.free([-1], [], [])
        self.join()
        stage.retrace()
        sums = 2 * config.num_layers

        def chain() -> mx.array:
            y = x
            for _ in range(sums):
                y = self(y * 0.5)
            return y

        return {"step": step, "all_sum": _least(lambda: mx.eval(chain())) / sums}


def _least(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    taken = []
    for _ in range(TIMES):
        before()
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def ipv4_addresses(ranks: Sequence[tuple[Host, str, Sequence[str]]]) -> list[str]:
    """Where the ranks reach each other, by IPv4 as MLX wants it: the address that the hostfile gives, else
    that from which a rank reached rank 0, else one in a network that all are in.

    ranks: of each its host, that address, and its own addresses with their networks. Raises HostError.
    """
    seen = [ip_address(address.partition("%")[0]) for _, address, _ in ranks]
    if all(address.is_loopback for address in seen):
        return ["127.0.0.1"] * len(ranks)
    common = set.intersection(*({IPv4Interface(n).network for n in networks} for *_, networks in ranks))
    found = []
    for (host, _, networks), address in zip(ranks, seen, strict=True):
        own = [str(i.ip) for i in map(IPv4Interface, networks) if i.network in common]
        usable = address.version == 4 and not address.is_loopback
        known = [*host.ips[:1], *([str(address)] if usable else own)]
        if not known:
            raise HostError(
                f"{host.name} has no IPv4 address in a network that all hosts are in: give `ips` in a "
                "hostfile (mlx-gptoss hosts check --write)"
            )
        found.append(known[0])
    return found


def shared_addresses(networks: Sequence[str], others: Sequence[str]) -> list[str]:
    """A machine's own addresses in networks that another one is in too; both as about.networks gives them."""
    known = {IPv4Interface(network).network for network in others}
    return [str(own.ip) for own in map(IPv4Interface, networks) if own.network in known]


def collective_settings(
    backend: str,
    rank: int,
    addresses: Sequence[str],
    ports: Sequence[int],
    rdma: Sequence[Sequence[RdmaDevices]],
) -> dict[str, Any]:
    """What a rank is told in order to `join`. ports: a free one on each address."""
    where = [f"[{a}]:{p}" if ":" in a else f"{a}:{p}" for a, p in zip(addresses, ports, strict=True)]
    return {"backend": backend, "rank": rank, "where": where, "rdma": [list(devices) for devices in rdma]}


def join(settings: Mapping[str, Any]) -> mx.distributed.Group:
    """The group, once every rank is there. Once in a process: MLX has one group of each kind.

    Waits for the others without an end, so whoever calls it must be ended from outside. Raises HostError.
    """
    backend, where = str(settings["backend"]), settings["where"]
    environment, files = {"MLX_RANK": str(settings["rank"])}, {}
    if backend == "ring":
        files["MLX_HOSTFILE"] = [[address] for address in where]
    else:
        files["MLX_IBV_DEVICES"] = settings["rdma"]
        environment["MLX_JACCL_COORDINATOR"] = where[0]
        if backend == "jaccl-ring":
            environment["MLX_JACCL_RING"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = os.path.join(folder, name)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(content, file)
            environment[name] = path
        os.environ.update(environment)
        try:
            group = mx.distributed.init(strict=True, backend=backend.partition("-")[0])
        except RuntimeError as error:
            raise HostError(f"rank {settings['rank']} cannot join the others by {backend}: {error}") from None
    if group.size() != len(where):
        raise HostError(f"the group has {group.size()} ranks, expected {len(where)}")
    return group
