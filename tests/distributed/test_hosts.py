"""Hosts are read from a list or from mlx.launch's hostfile; every mistake ends in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mlx._distributed_utils.common import Hostfile

from mlx_gptoss.distributed.hosts import Host, HostList, read_hosts
from mlx_gptoss.errors import RequestError

LAUNCH = {
    "backend": "jaccl",
    "envs": ["MLX_METAL_FAST_SYNCH=1", "EMPTY="],
    "hosts": [
        {"ssh": "mac1", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2", ["rdma_en3", "rdma_en4"]]},
        {"ssh": "me@mac2", "ips": ["10.0.0.2", "fe80::1"], "rdma": ["rdma_en2", None, "rdma_en3"]},
        {"ssh": "192.168.0.3", "ips": [], "rdma": ["rdma_en2", "rdma_en3", None]},
    ],
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "hosts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_list_of_names_is_a_list_of_hosts() -> None:
    wanted = HostList((Host("mac1"), Host("me@mac2.local"), Host("10.0.0.3")))
    assert read_hosts("mac1, me@mac2.local,10.0.0.3") == wanted
    assert read_hosts(["mac1", "me@mac2.local", "10.0.0.3"]) == wanted


def test_this_machine_may_stand_for_several() -> None:
    assert [host.is_local for host in read_hosts("localhost,localhost").hosts] == [True, True]
    assert [host.is_local for host in read_hosts("localhost,mac2").hosts] == [True, False]


@pytest.mark.parametrize("given", [str, Path], ids=["text", "path"])
def test_the_hostfile_of_mlx_launch_is_read(tmp_path: Path, given: type[str] | type[Path]) -> None:
    hosts = read_hosts(given(written(tmp_path, LAUNCH)))
    assert hosts.backend == "jaccl"
    assert hosts.environment == {"MLX_METAL_FAST_SYNCH": "1", "EMPTY": ""}
    assert [host.name for host in hosts.hosts] == ["mac1", "me@mac2", "192.168.0.3"]
    assert hosts.hosts[0].rdma == (None, "rdma_en2", ("rdma_en3", "rdma_en4"))
    assert hosts.hosts[1].ips == ("10.0.0.2", "fe80::1")


def test_a_bare_list_is_a_hostfile_too(tmp_path: Path) -> None:
    hosts = read_hosts(written(tmp_path, [{"ssh": "mac1"}, {"ssh": "mac2", "ips": ["10.0.0.2"]}]))
    assert hosts == HostList((Host("mac1"), Host("mac2", ("10.0.0.2",))))


def test_what_is_written_is_read_alike_here_and_by_mlx_launch(tmp_path: Path) -> None:
    hosts = read_hosts(written(tmp_path, LAUNCH))
    path = written(tmp_path, hosts.to_json())
    assert read_hosts(path) == hosts
    theirs = Hostfile.from_file(path)
    assert (theirs.backend, theirs.envs) == ("jaccl", LAUNCH["envs"])
    assert [host.ssh_hostname for host in theirs.hosts] == [host.name for host in hosts.hosts]
    assert [host.rdma for host in theirs.hosts] == [host["rdma"] for host in LAUNCH["hosts"]]  # type: ignore[index]


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        ("", "hosts: '' is no host; expected a name or address for ssh"),
        ("mac1", "hosts: 1 host; expected two or more"),
        ("mac1,,mac2", "'' is no host"),
        ("mac1,-oProxyCommand=x", "'-oProxyCommand=x' is no host"),
        ("mac1,-oProxyCommand=x@mac2", "is no host"),
        ("mac1,mac 2", "'mac 2' is no host"),
        ("mac1,mac2;ls", "'mac2;ls' is no host"),
        ("mac1,$(ls)", "is no host"),
        ("mac1,mac2,mac1", "mac1 is given twice; expected each once"),
        ("mac1,localhost", "this machine is not the first; expected localhost first"),
        ("nowhere/hosts.json", "nowhere/hosts.json: No such file or directory; expected a hostfile"),
        ("hosts.json", "hosts.json: No such file or directory"),
    ],
)
def test_a_wrong_list_is_told_in_one_line(hosts: str, told: str) -> None:
    with pytest.raises(RequestError, match=re.escape(told)) as caught:
        read_hosts(hosts)
    assert caught.value.field == "hosts" and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "hosts.json: not JSON"),
        ("[" * 5000, "hosts.json: not JSON"),
        ("7", "hosts is 7; expected a list of hosts"),
        ({"backend": "ring"}, "hosts is None; expected a list of hosts"),
        ({"backend": "mpi", "hosts": []}, "backend is 'mpi'; expected one of ring, jaccl, jaccl-ring"),
        ([{"ssh": "mac1"}, "mac2"], "hosts[1] is 'mac2'; expected an object"),
        ([{"ssh": "mac1"}, {"ips": []}], "hosts[1].ssh: None is no host"),
        ([{"ssh": "mac1"}, {"ssh": "-x"}], "hosts[1].ssh: '-x' is no host"),
        ([{"ssh": "a", "ips": "10.0.0.1"}, {"ssh": "b"}], "hosts[0].ips is '10.0.0.1'; expected a list"),
        ([{"ssh": "mac1", "ips": ["mac1"]}, {"ssh": "mac2"}], "hosts[0].ips holds 'mac1'; expected IP"),
        ([{"ssh": "mac1", "ips": [1]}, {"ssh": "mac2"}], "hosts[0].ips holds 1; expected IP"),
        ([{"ssh": "mac1", "rdma": [None]}, {"ssh": "mac2"}], "hosts[0].rdma is [None]; expected a list of 2"),
        ([{"ssh": "mac1", "rdma": [None, 5]}, {"ssh": "mac2"}], "hosts[0].rdma holds 5; expected names"),
        ([{"ssh": "mac1", "rdma": ["a", "b"]}, {"ssh": "mac2"}], "hosts[0].rdma[0] is 'a'; expected null"),
        ({"envs": "A=1", "hosts": []}, "envs is 'A=1'; expected a list"),
        ({"envs": ["A B=1"], "hosts": []}, "envs holds 'A B=1'; expected \"NAME=value\""),
        ({"envs": ["A"], "hosts": []}, "envs holds 'A'"),
        ([{"ssh": "mac1"}], "1 host; expected two or more"),
    ],
)
def test_a_wrong_hostfile_is_told_in_one_line(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(RequestError, match=re.escape(told)) as caught:
        read_hosts(written(tmp_path, content))
    assert "\n" not in str(caught.value)
