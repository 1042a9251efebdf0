"""Time and memory of conversions, beside copying the files and beside `mlx_lm.convert -q`, in one run.

    python -m benchmarks.convert [--shape 20b] [--layers 4] [--folder DIR] [--only NAME ..] [--json FILE]

A random checkpoint of the true shape, cut in layers, is written once and kept in DIR. Every step runs in a
process of its own, on a source that has just been read once (so that no step pays for a cold disk), and is
measured from outside: wall and CPU seconds, and the peak of its resident memory. Copying and every conversion
end with the files on the disk (fsync), except mlx-lm's, which leaves that to the system.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_SOURCE = """
import sys
from dataclasses import replace
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES
folder, shape, layers = sys.argv[1:]
write_byte_tokenizer(write_checkpoint(folder, replace(SHAPES[shape], layers=int(layers))))
"""
_COPY = """
import os, shutil, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.mkdir()
for path in source.iterdir():
    shutil.copyfile(path, target / path.name)
    with open(target / path.name) as stream:
        os.fsync(stream.fileno())
"""
_OURS = """
import sys
from mlx_gptoss.convert.convert import convert
from mlx_gptoss.convert.recipes import make_recipe
convert(sys.argv[1], sys.argv[2], make_recipe({recipe!r}), fast={fast})
"""
_MLX_LM = """
import sys
from mlx_lm import convert
convert(sys.argv[1], mlx_path=sys.argv[2], quantize=True, q_group_size=64, q_bits=4)
"""
STEPS = {
    "copy the files": _COPY,
    "mxfp4 --fast": _OURS.format(recipe="mxfp4", fast=True),
    "mxfp4-q4 --fast": _OURS.format(recipe="mxfp4-q4", fast=True),
    "mlx_lm.convert -q": _MLX_LM,
    "mxfp4-q4": _OURS.format(recipe="mxfp4-q4", fast=False),
}


@dataclass(frozen=True)
class Measured:
    """One step: seconds by the clock and of CPU, peak resident memory and written bytes, load before it."""

    wall: float
    cpu: float
    peak_rss: int
    written: int
    load: float


def measure(code: str, source: Path, target: Path) -> Measured:
    """Run a step in a process of its own, and remove what it wrote."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(f"{target}.partial", ignore_errors=True)
    for path in source.iterdir():  # into the page cache
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    load, start = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(target)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"the step ended with status {status}")
    written = sum(p.stat().st_size for p in target.iterdir())
    shutil.rmtree(target)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, written, load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["20b", "120b"], default="20b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the source is kept and results are written")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.gettempdir()) / "mlx-gptoss-bench"
    source = folder / f"{args.shape}-{args.layers}"
    if not (source / "tokenizer.json").exists():
        # In another process: a child's peak memory counts what its parent held when it was started.
        subprocess.run([sys.executable, "-c", _SOURCE, str(source), args.shape, str(args.layers)], check=True)
    size = sum(p.stat().st_size for p in source.iterdir())
    print(f"{args.shape} shape, {args.layers} layers, {size / 1e9:.2f} GB, {os.cpu_count()} cores")
    found = {}
    for name in args.only:
        found[name] = m = measure(STEPS[name], source, folder / "result")
        print(
            f"{name:<18} {m.wall:7.1f} s  {m.cpu:7.1f} s CPU  {m.peak_rss / 1e6:7.0f} MB  "
            f"{m.written / 1e9:5.2f} GB  load {m.load:.1f}",
            flush=True,
        )
    for name, other, what in (
        ("mxfp4 --fast", "copy the files", "time of copying / time of the verbatim recipe"),
        ("mlx_lm.convert -q", "mxfp4-q4 --fast", "time without the search / mlx_lm.convert -q"),
        ("mlx_lm.convert -q", "mxfp4-q4", "time with the search / mlx_lm.convert -q"),
    ):
        if name in found and other in found:
            wall, cpu = (getattr(found[other], k) / getattr(found[name], k) for k in ("wall", "cpu"))
            print(f"{what}: {wall:.2f} by the clock, {cpu:.2f} in CPU time")
    if args.json:
        args.json.write_text(json.dumps({name: asdict(m) for name, m in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
