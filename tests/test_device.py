"""How much memory there is, where Linux's control groups allow less than the machine has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlx_gptoss import device
from mlx_gptoss.device import (
    available_memory,
    identity,
    kernel_mode,
    left_to_groups,
    memory_is_short,
    total_memory,
)
from mlx_gptoss.errors import RequestError

OLD = {"limit": "memory.limit_in_bytes", "usage": "memory.usage_in_bytes"}
NEW = {"limit": "memory.max", "usage": "memory.current"}


def group(folder: Path, names: dict[str, str], limit: object, usage: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names["limit"]).write_text(f"{limit}\n")
    (folder / names["usage"]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


def test_what_a_group_holds_of_files_is_free(tmp_path: Path) -> None:
    group(tmp_path / "app.slice/job", NEW, 1000, 700, "anon 300\nfile 400\n")
    assert left_to_groups("0::/app.slice/job\n", tmp_path) == 700
    group(tmp_path / "memory/job", OLD, 2000, 900, "cache 1\ntotal_active_file 100\ntotal_inactive_file 50\n")
    assert left_to_groups("3:cpu,cpuacct:/other\n5:memory,pids:/job\n", tmp_path) == 1250


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    """A container's own group is its root; the path outside is not to be seen in it."""
    group(tmp_path, NEW, 500, 450, "file 0\n")
    assert left_to_groups("0::/outside/of/here\n", tmp_path) == 50
    group(tmp_path / "inner", NEW, 500, 490, "file 0\n")
    assert left_to_groups("0::/inner\n", tmp_path) == 10
    group(tmp_path / "inner", NEW, 500, 600, "file 0\n")
    assert left_to_groups("0::/inner\n", tmp_path) == 0


@pytest.mark.parametrize("limit", ["max", ""])
def test_a_group_without_a_limit_allows_everything(tmp_path: Path, limit: str) -> None:
    group(tmp_path, NEW, limit, 100, "file 0\n")
    assert left_to_groups("0::/\n", tmp_path) == sys.maxsize
    assert left_to_groups("0::/\n", tmp_path / "nowhere") == sys.maxsize


def test_this_machine_has_some_memory_left() -> None:
    assert 0 < available_memory() <= total_memory()
    assert memory_is_short() in (True, False)


@pytest.mark.parametrize(
    ("value", "mode"), [(None, "verify"), ("", "verify"), ("on", "on"), ("off", "off"), ("verify", "verify")]
)
def test_kernels_are_asked_for_by_the_environment_and_there_with_metal_alone(
    monkeypatch: pytest.MonkeyPatch, value: str | None, mode: str
) -> None:
    environment = {} if value is None else {"GPTOSS_KERNELS": value}
    monkeypatch.setattr(device, "on_metal", lambda: True)
    assert kernel_mode(environment) == mode
    monkeypatch.setattr(device, "on_metal", lambda: False)
    assert kernel_mode(environment) == "off"


def test_another_value_is_refused_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for metal in (True, False):
        monkeypatch.setattr(device, "on_metal", lambda metal=metal: metal)
        with pytest.raises(RequestError, match="^GPTOSS_KERNELS is 'yes': expected off, on or verify$"):
            kernel_mode({"GPTOSS_KERNELS": "yes"})


def test_a_machine_is_its_chip_its_system_and_mlx() -> None:
    from importlib.metadata import version

    assert identity() == identity() and identity().endswith(f"MLX {version('mlx')}")
