"""MLX's own group of ranks (ring over TCP, JACCL over RDMA): joined by what one JSON object says.

Its environment variables are those that `mlx.launch` sets
(https://ml-explore.github.io/mlx/build/html/usage/distributed.html).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_gptoss.distributed.hosts import RdmaDevices
from mlx_gptoss.errors import HostError


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
    environment = {"MLX_RANK": str(settings["rank"])}
    if backend == "ring":
        environment["MLX_HOSTFILE"] = _written([[address] for address in where])
    else:
        environment["MLX_IBV_DEVICES"] = _written(settings["rdma"])
        environment["MLX_JACCL_COORDINATOR"] = where[0]
        if backend == "jaccl-ring":
            environment["MLX_JACCL_RING"] = "1"
    os.environ.update(environment)
    try:
        group = mx.distributed.init(strict=True, backend=backend.partition("-")[0])
    except RuntimeError as error:
        raise HostError(f"rank {settings['rank']} cannot join the others by {backend}: {error}") from None
    if group.size() != len(where):
        raise HostError(f"the group has {group.size()} ranks, expected {len(where)}")
    return group


def _written(content: Any) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(content, file)
    return file.name
