"""What `hosts check` finds out is measured on real sockets, and what is wrong is told in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_gptoss.cli import run
from mlx_gptoss.distributed import check, ssh
from mlx_gptoss.distributed.about import Facts, facts, parse_networks
from mlx_gptoss.distributed.check import Link, Report, address_of, candidates, check_hosts
from mlx_gptoss.distributed.hosts import Host, HostList, read_hosts
from mlx_gptoss.errors import RequestError
from tests.support.fake_ssh import FakeSsh

IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
en0: flags=8863<UP,BROADCAST> mtu 1500
\tinet6 fe80::1%en0 prefixlen 64 secured scopeid 0xb
\tinet 192.168.1.23 netmask 0xffffff00 broadcast 192.168.1.255
bridge0: flags=8863<UP> mtu 1500
\tinet 10.0.5.1 netmask 0xfffffffc broadcast 10.0.5.3
"""
MAC = Facts("1.0", "0.32.4", "3.12.1", "Apple M4 Max", 64 * 2**30, 48 * 2**30, ["ring"], [], "")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    for module in (ssh, check):
        monkeypatch.setattr(module, "is_here", lambda host: host.is_local)  # asks no resolver
    return FakeSsh(tmp_path, monkeypatch)


def test_addresses_are_read_from_macos_and_from_linux() -> None:
    assert parse_networks(IFCONFIG) == ["192.168.1.23/24", "10.0.5.1/30"]
    line = "2: eth0    inet 192.168.1.7/24 brd 192.168.1.255 scope global eth0\\ valid_lft forever"
    assert parse_networks(f"1: lo    inet 127.0.0.1/8 scope host lo\n{line}") == ["192.168.1.7/24"]


def test_two_hosts_are_measured_and_a_hostfile_is_written(
    fake: FakeSsh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "hosts.json"
    assert run(["hosts", "check", "localhost,mac2.test", "--write", str(target), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == [] and told["hosts"][1]["mlx"] == facts().mlx
    by_way = {link["way"]: link for link in told["links"]}
    assert set(by_way) == {"tcp", "ring"}
    assert all(link["latency"] > 0 and link["bandwidth"] > 0 for link in told["links"])
    hosts = read_hosts(target)
    assert [host.name for host in hosts.hosts] == ["localhost", "mac2.test"]
    assert hosts.hosts[1].ips == (by_way["tcp"]["address"],)


def test_a_host_that_is_down_is_a_problem(fake: FakeSsh, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hosts", "check", "localhost,down"]) == 1
    out, err = capsys.readouterr()
    assert "no answer" in out
    assert (
        err.count("\n") == 1 and "problem: down: ssh: connect to host down port 22: Connection refused" in err
    )


def test_a_plan_asks_the_hosts_what_room_they_have(fake: FakeSsh, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "demo", "--hosts", "localhost,mac2.test", "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["hosts"]
    assert [share["machine"] for share in shares] == ["localhost", "mac2.test"]
    assert all(share["room"] > 10**8 for share in shares)
    assert run(["inspect", "demo", "--hosts", "localhost,down"]) == 1
    assert "down: ssh: connect to host down" in capsys.readouterr().err


def test_the_first_host_must_be_this_machine(fake: FakeSsh) -> None:
    with pytest.raises(RequestError, match="mac1 is not this machine: rank 0 is where the command runs"):
        check_hosts(read_hosts("mac1,mac2"))


def report(*facts: Facts | str, links: tuple[Link, ...] = ()) -> Report:
    hosts = HostList(tuple(Host(f"mac{i + 1}") for i in range(len(facts))))
    return Report(hosts, facts, links)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(MAC, package="9.9"), "mac2 has gptoss-mlx 9.9, and mac1 1.0: install the same"),
        (replace(MAC, mlx="9.9"), "mac2 has mlx 9.9, and mac1 0.32.4: install the same"),
    ],
)
def test_another_version_is_a_problem(other: Facts, told: str) -> None:
    (problem,) = report(MAC, other).problems
    assert problem.startswith(told)
    assert report(MAC, replace(MAC, python="3.13.0")).problems == []


def test_a_link_that_fails_every_way_is_a_problem() -> None:
    dead, alive = (
        Link((0, 1), "tcp", "10.0.0.2", problem="no route"),
        Link((0, 1), "tcp", "10.0.0.3", 1.0, 1.0),
    )
    ring = Link((0, 1), "ring", "10.0.0.3", problem="refused")
    assert report(MAC, MAC, links=(dead,)).problems == ["no route"]
    assert report(MAC, MAC, links=(dead, ring)).problems == ["no route"]
    assert report(MAC, MAC, links=(alive, ring)).problems == []
    assert report(MAC, MAC, links=(dead, alive)).problems == []


def test_a_link_is_tried_over_every_network_that_both_are_in(fake: FakeSsh) -> None:
    hosts = HostList((Host("localhost"), Host("mac2")))
    mine = replace(MAC, networks=["192.168.1.23/24", "10.0.5.1/30"])
    theirs = replace(
        MAC,
        networks=["192.168.1.24/24", "10.0.5.2/30", "172.16.0.1/16"],
        ssh="192.168.1.23 5000 192.168.1.24 22",
    )
    assert candidates(hosts, [mine, theirs], 0, 1) == ["192.168.1.24", "10.0.5.2"]
    assert address_of(hosts, [mine, theirs], 0) == "192.168.1.23"
    by_bonjour = replace(theirs, ssh="fe80::1%en0 5000 fe80::2%en0 22")
    assert candidates(hosts, [mine, by_bonjour], 0, 1) == ["192.168.1.24", "10.0.5.2"]
    given = HostList((Host("localhost"), Host("mac2", ("10.9.9.9",))))
    assert candidates(given, [mine, theirs], 0, 1) == ["10.9.9.9"]
