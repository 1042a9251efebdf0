"""MLX's limits of a command buffer are in the environment before MLX is loaded, however the package is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_gptoss.command_buffers import LIMITS, generation

# Runs first in the processes below. It plays a Mac to the one module that asks, and notes what the
# environment holds whenever MLX is about to be loaded.
SITE = """
import ctypes, json, os, sys

REAL = sys.platform


class Finder:
    def find_spec(self, name, path=None, target=None):
        sys.platform = os.environ["PLAYED"] if name == "mlx_gptoss.command_buffers" else REAL
        if name == "mlx.core":
            note("mlx.core")
        return None


def note(when):
    with open(os.environ["NOTES"], "a") as notes:
        held = {k: v for k, v in os.environ.items() if k.startswith("MLX_MAX_")}
        notes.write(json.dumps([when, held]) + "\\n")


class Mac(ctypes.CDLL):
    def __getattr__(self, name):
        if name != "sysctlbyname":
            return super().__getattr__(name)
        return self.tell

    def tell(self, key, value, size, new, length):
        assert key == b"machdep.cpu.brand_string"
        value.value = os.environ["CHIP"].encode()
        return 0 if os.environ["CHIP"] else -1


ctypes.CDLL = Mac
sys.meta_path.insert(0, Finder())
"""

WAYS = {
    "the package": ["-c", "import mlx_gptoss; mlx_gptoss.load"],
    "a module deep inside": ["-c", "import mlx_gptoss.model.graph"],
    "a module run as a script": ["-m", "mlx_gptoss.model.cache"],
    "a conversion": ["-c", "import mlx_gptoss.convert.convert"],
    "a process it started": [
        "-c",
        "import mlx_gptoss, subprocess, sys; subprocess.run([sys.executable, '-c', 'import mlx.core'])",
    ],
}


def notes(
    tmp_path: Path, *arguments: str, chip: str = "Apple M2 Ultra", platform: str = "darwin", **extra: str
) -> list[tuple[str, dict[str, str]]]:
    """What the environment held each time that MLX was loaded."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    told = tmp_path / "notes"
    told.touch()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLX_MAX_")}
    played = {"PYTHONPATH": str(tmp_path), "NOTES": str(told), "CHIP": chip, "PLAYED": platform}
    done = subprocess.run(
        [sys.executable, *arguments], env=kept | played | extra, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [(when, held) for when, held in map(json.loads, told.read_text().splitlines())]


@pytest.mark.parametrize("way", WAYS)
def test_the_limits_are_raised_before_mlx_is_loaded(tmp_path: Path, way: str) -> None:
    told = notes(tmp_path, *WAYS[way])
    assert told
    assert all(held == LIMITS for _, held in told)


def test_the_command_raises_them_before_it_runs(tmp_path: Path) -> None:
    """Help loads no MLX; a command that does comes later still."""
    code = "import runpy, sys; sys.argv = ['mlx-gptoss', '--help']\n"
    code += "try: runpy.run_module('mlx_gptoss', run_name='__main__')\nexcept SystemExit: import mlx.core"
    assert [held for _, held in notes(tmp_path, "-c", code)] == [LIMITS]


def test_the_users_import_of_mlx_first_does_not_keep_them_from_being_raised(tmp_path: Path) -> None:
    """MLX reads them when it opens the device, at the first computation."""
    code = "import mlx.core, os, mlx_gptoss, json; print(1)\n"
    code += f"assert {LIMITS!r}.items() <= os.environ.items()"
    assert [held for _, held in notes(tmp_path, "-c", code)] == [{}]


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    told = notes(tmp_path, *WAYS["the package"], MLX_MAX_OPS_PER_BUFFER="7")
    assert [held for _, held in told] == [{**LIMITS, "MLX_MAX_OPS_PER_BUFFER": "7"}]


@pytest.mark.parametrize(
    ("chip", "platform"),
    [
        ("Apple M2 Ultra", "linux"),
        ("Apple M5 Max", "darwin"),
        ("Apple M10", "darwin"),
        ("Intel(R) Core(TM) i9", "darwin"),
        ("", "darwin"),
    ],
)
def test_elsewhere_and_on_chips_not_measured_nothing_changes(
    tmp_path: Path, chip: str, platform: str
) -> None:
    assert [held for _, held in notes(tmp_path, *WAYS["the package"], chip=chip, platform=platform)] == [{}]


def test_a_chips_generation_is_in_its_name() -> None:
    assert [generation(c) for c in ("Apple M1", "Apple M4 Pro", "Apple M12 Max")] == [1, 4, 12]
    assert generation("Apple M") is generation("Apple A18") is generation("VirtualApple @ 2.50GHz") is None
