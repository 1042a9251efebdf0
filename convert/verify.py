"""Is a converted folder what its manifest says, and what its source says?

`verify` reads every file once, in chunks: file hashes and tensor hashes come out of the same pass. With the
source at hand it also hashes the source's tensors behind every verbatim copy, and measures the error of every
quantised tensor anew instead of believing the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.checkpoint.safetensors import TensorInfo, read_folder
from mlx_gptoss.convert.against_source import Comparison, compare_with_source
from mlx_gptoss.convert.finite import Watch
from mlx_gptoss.convert.gguf_source import gguf_files
from mlx_gptoss.convert.manifest import (
    MANIFEST_NAME,
    Action,
    FileEntry,
    Manifest,
    TensorEntry,
    read_manifest,
)
from mlx_gptoss.convert.sources import is_gguf
from mlx_gptoss.errors import CheckpointError, ConversionError, VerificationError
from mlx_gptoss.files import open_regular

CHUNK = 4 << 20  # bytes read at a time
CARD_NAME = "README.md"  # a share adds it, and a download brings it along

Progress = Callable[[int], None]
"""Called with a number of bytes just read."""


@dataclass(frozen=True)
class Problem:
    """Something that differs: `name` is the file or tensor, `detail` what was found and expected."""

    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


@dataclass(frozen=True)
class PartReport:
    """One part of the model (attention, experts ..): its tensors, bytes, actions and relative errors.

    `recorded` is the manifest's error, `measured` the one found against the source (None: no source given);
    each the root of the mean square over the part's tensors, weighted by their bytes.
    """

    part: str
    tensors: int
    bytes: int
    actions: tuple[Action, ...]
    recorded: float | None
    measured: float | None = None


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `copies` counts tensors found bit-identical to the source (None: no source).

    `notes` are remarks for the user that are no problem of the folder.
    """

    folder: Path
    manifest: Manifest
    files: int
    bytes: int
    parts: tuple[PartReport, ...]
    problems: tuple[Problem, ...]
    extra: tuple[str, ...] = ()
    source: Path | None = None
    copies: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def check(self) -> None:
        """Raise VerificationError naming the first ten problems, if there are any."""
        if self.problems:
            shown = "; ".join(str(p) for p in self.problems[:10])
            more = f"; and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
            raise VerificationError(
                f"{self.folder} does not verify: {shown}{more}; convert or download it again"
            )

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "source": None if self.source is None else str(self.source),
            "files": self.files,
            "bytes": self.bytes,
            "tensors": len(self.manifest.tensors),
            "identical_to_source": self.copies,
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "extra_files": list(self.extra),
            "notes": list(self.notes),
        }


def verify(
    folder: str | Path,
    source: str | Path | None = None,
    *,
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a converted folder with its manifest, and with `source` (a local folder) when one is given.

    adapter: a folder with the adapter that is merged into the conversion.

    File hashes that the manifest does not hold yet are written into it once everything else agrees; a note
    tells where that cannot be done. Raises ConversionError when there is no usable manifest; every other
    finding is in the result.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConversionError(f"{root}: no such folder, expected one written by `mlx-gptoss convert`")
    manifest = read_manifest(root)
    problems: list[Problem] = []
    notes: list[str] = []
    tick = progress or (lambda _: None)
    tensors = _check_names(root, manifest, problems)
    hashed = dict(_check_files(root, manifest, tensors, problems, tick))
    extra = _extra_files(root, manifest, problems)
    against = None
    if source is not None and not problems:  # a folder that is broken in itself is not worth comparing
        against = compare_with_source(root, manifest, Path(source), tick, adapter)
        problems += [Problem(name, detail) for name, detail in against.problems]
    downloaded = (root / MANIFEST_NAME).is_symlink()  # the Hub's cache stays what was downloaded
    if not problems and not downloaded and any(entry.sha256 is None for entry in manifest.files.values()):
        manifest = dataclasses.replace(manifest, files=hashed)
        try:
            manifest.write(root)
        except ConversionError as error:
            notes.append(f"the hashes of the files were not stored: {error}")
    return Verification(
        folder=root,
        manifest=manifest,
        files=len(hashed),
        bytes=sum(entry.size for entry in hashed.values()),
        parts=part_reports(manifest.tensors, against),
        problems=tuple(problems),
        extra=tuple(extra),
        source=None if source is None else Path(source),
        copies=None if against is None else len(against.identical),
        notes=tuple(notes),
    )


def bytes_to_read(manifest: Manifest, source: Path | None = None) -> int:
    """About how many bytes `verify` will read, for a progress bar."""
    size = sum(entry.size for entry in manifest.files.values())
    if source is not None:
        weights = gguf_files(source) if is_gguf(source) else source.glob("[!.]*.safetensors")
        size += sum(path.stat().st_size for path in weights)
    return size


def _check_names(root: Path, manifest: Manifest, problems: list[Problem]) -> dict[str, TensorInfo]:
    """The tensors of the folder by its headers; their names, dtypes and shapes against the manifest."""
    try:
        found = read_folder(root)
    except CheckpointError as error:
        problems.append(Problem("weights", str(error)))
        return {}
    for name in sorted(manifest.tensors.keys() - found.keys()):
        problems.append(Problem(name, "missing from the weights"))
    for name in sorted(found.keys() - manifest.tensors.keys()):
        problems.append(Problem(name, "not in the manifest"))
    for name in sorted(found.keys() & manifest.tensors.keys()):
        info, entry = found[name], manifest.tensors[name]
        if (info.dtype, info.shape, info.nbytes) != (entry.dtype, entry.shape, entry.bytes):
            problems.append(
                Problem(name, f"{info.dtype} {list(info.shape)}, expected {entry.dtype} {list(entry.shape)}")
            )
    return found


def _check_files(
    root: Path, manifest: Manifest, tensors: dict[str, TensorInfo], problems: list[Problem], tick: Progress
) -> Iterator[tuple[str, FileEntry]]:
    """Size and hash of every file in the manifest, and the hashes of the tensors inside."""
    for name, expected in sorted(manifest.files.items()):
        path = root / name
        if not path.is_file():
            problems.append(Problem(name, "missing"))
            continue
        size = path.stat().st_size
        if size != expected.size:
            problems.append(Problem(name, f"{size:,} bytes, expected {expected.size:,}"))
        try:
            digest, seen = hash_file(path, [info for info in tensors.values() if info.path == path], tick)
        except OSError as error:
            problems.append(Problem(name, f"cannot be read ({error.strerror}); check its permissions"))
            continue
        yield name, FileEntry(size, digest)
        if expected.sha256 is not None and digest != expected.sha256 and size == expected.size:
            problems.append(Problem(name, f"sha256 is {digest[:12]}.., expected {expected.sha256[:12]}.."))
        for tensor, watch in seen.items():
            entry = manifest.tensors.get(tensor)
            if entry is not None and watch.sha256 != entry.sha256:
                problems.append(Problem(tensor, "its bytes differ from the manifest's hash"))
            if watch.found:
                problems.append(Problem(tensor, "holds NaN or infinity"))


def hash_file(path: Path, tensors: list[TensorInfo], tick: Progress) -> tuple[str, dict[str, Watch]]:
    """SHA-256 (hex) of a file, and a Watch that has seen the data of each of its tensors, in one pass.

    The whole and the tensors are hashed side by side: hashing is slower than reading, and lets other threads
    run. Raises OSError.
    """
    whole = hashlib.sha256()
    watches = {info.name: Watch(info.name, info.dtype) for info in tensors}

    def see(chunk: memoryview, start: int) -> None:
        for info in tensors:
            first, last = max(info.start, start), min(info.end, start + len(chunk))
            if first < last:
                watches[info.name].see(chunk[first - start : last - start])

    buffers = [bytearray(CHUNK), bytearray(CHUNK)]
    position = 0
    with open_regular(path) as stream, ThreadPoolExecutor(2) as pool:
        pending: list[Future[None]] = []
        while True:
            count = stream.readinto(buffers[0])
            for task in pending:
                task.result()
            if not count:
                return whole.hexdigest(), watches
            chunk = memoryview(buffers[0])[:count]
            pending = [pool.submit(whole.update, chunk), pool.submit(see, chunk, position)]
            position += count
            tick(count)
            buffers.reverse()


def _extra_files(root: Path, manifest: Manifest, problems: list[Problem]) -> list[str]:
    """Visible files beside the manifest's. Weights among them are a problem: a loader may take them."""
    extra = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if path.is_dir() or hidden or name in manifest.files or name in (MANIFEST_NAME, CARD_NAME):
            continue
        extra.append(name)
        if name.endswith((".safetensors", ".safetensors.index.json")):
            problems.append(Problem(name, "weights that the manifest does not know; remove them"))
    return extra


def part_reports(
    tensors: Mapping[str, TensorEntry], against: Comparison | None = None
) -> tuple[PartReport, ...]:
    """The report by part, in the order of their names."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, entry in tensors.items():
        groups[entry.part].append(name)
    errors = {} if against is None else dict.fromkeys(against.identical, 0.0) | against.errors
    reports = []
    for part, names in sorted(groups.items()):
        entries = [tensors[name] for name in names]
        reports.append(
            PartReport(
                part=part,
                tensors=len(entries),
                bytes=sum(e.bytes for e in entries),
                actions=tuple(sorted({e.action for e in entries})),
                recorded=_mean_error([(e.relative_error, e) for e in entries]),
                measured=_mean_error([(errors.get(name), tensors[name]) for name in names]),
            )
        )
    return tuple(reports)


def _mean_error(pairs: list[tuple[float | None, TensorEntry]]) -> float | None:
    """Root of the mean square of the errors that are known, weighted by the tensors' bytes."""
    known = [(error, entry.bytes) for error, entry in pairs if error is not None]
    total = sum(weight for _, weight in known)
    return math.sqrt(sum(e * e * w for e, w in known) / total) if total else None
