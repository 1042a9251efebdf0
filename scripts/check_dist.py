"""Build the source archive, and from it the wheel, and check that both hold every file they should.

python scripts/check_dist.py [FOLDER]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> set[str]:
    """The files under version control, those aside that only the repository's host reads."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name for name in done.stdout.splitlines() if not name.startswith(".")}


def in_archive(path: Path) -> set[str]:
    """The source archive's files by their names in the repository."""
    with tarfile.open(path) as archive:
        return {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}


def in_wheel(path: Path) -> set[str]:
    """The wheel's files by their names in the repository, where convert/ lies at the top."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    return {name.removeprefix("mlx_gptoss/") if "/convert/" in name else name for name in names}


def differences(folder: Path) -> list[str]:
    """What the archives in `folder` lack, or hold beyond what is under version control."""
    wanted = tracked()
    installed = {name for name in wanted if name.startswith(("mlx_gptoss/", "convert/"))}
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    made = {name for name in in_archive(archive) if name in {"PKG-INFO", "setup.cfg"} or ".egg-info/" in name}
    found = []
    for path, holds, should in (
        (archive, in_archive(archive) - made, wanted),
        (wheel, in_wheel(wheel), installed),
    ):
        found += [f"{path.name} lacks {name}" for name in sorted(should - holds)]
        found += [f"{path.name} should not hold {name}" for name in sorted(holds - should)]
    return found


def main(folder: Path) -> int:
    """Build into `folder`, which is emptied first, and check: the exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout, done.stderr, file=sys.stderr)
        return done.returncode
    archives = sorted(map(str, folder.iterdir()))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *archives], check=True)
    found = differences(folder)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "dist"))
