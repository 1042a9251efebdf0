"""Convert a checkpoint: write in place with a journal, and give the result its name when it is whole.

Work happens in TARGET.partial: `journal.jsonl` beside `output/`, which is renamed to TARGET at the end. So
TARGET either does not exist or is complete, and a run that was stopped is taken up by the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gptoss.checkpoint.memory import gigabytes
from mlx_gptoss.checkpoint.safetensors import INDEX_NAME
from mlx_gptoss.convert.disk import sync_folder, write_file, writing
from mlx_gptoss.convert.finite import Watch, not_finite
from mlx_gptoss.convert.jobs import Chunk, Job, make_config, make_jobs
from mlx_gptoss.convert.journal import JOURNAL_NAME, Journal, Record
from mlx_gptoss.convert.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry, read_manifest
from mlx_gptoss.convert.merge import merged
from mlx_gptoss.convert.recipes import Recipe, make_recipe
from mlx_gptoss.convert.sidecars import find_sidecars
from mlx_gptoss.convert.sources import Source, is_gguf, open_source
from mlx_gptoss.convert.tensors import Extent
from mlx_gptoss.convert.writer import Shard, ShardLayout, ShardWriter, lay_out
from mlx_gptoss.errors import ConversionError

SHARD_SIZE = 5_000_000_000
SPARE_BYTES = 16 << 20  # free space wanted beside the weights, for the tokenizer and the like
MAX_WORKERS = 8
COPIERS = 3  # threads that copy: while one hashes, others write

Task = Callable[[], None]


@dataclass(frozen=True)
class Progress:
    """Where a conversion stands: bytes of the result written or found done, of how many; the step."""

    done: int
    total: int
    step: str


@dataclass(frozen=True)
class Converted:
    """A finished conversion. `resumed` counts bytes that an earlier run had written already."""

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]
    resumed: int = 0

    @property
    def nbytes(self) -> int:
        return sum(entry.size for entry in self.manifest.files.values())


def convert(
    source: str | Path,
    target: str | Path,
    recipe: Recipe | None = None,
    *,
    fast: bool = False,
    mxfp4_search: bool = False,
    for_streaming: bool = False,
    shard_size: int = SHARD_SIZE,
    tokenizer: str | Path | None = None,
    need_tokenizer: bool = True,
    restart: bool = False,
    revision: str | None = None,
    offline: bool = False,
    adapter: Path | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Converted:
    """Convert `source` (a folder, a GGUF file or a Hub id) into the new folder `target`.

    recipe: from `make_recipe` (default mxfp4-q4). fast: MLX's own affine quantiser, errors measured on one
    chunk in 32, and no file hashes (`verify` adds them). mxfp4_search: search the exponents of experts
    that are not MXFP4 yet. for_streaming: all that an expert has lies side by side, on whole pages, so that
    one read fetches it; only this package loads that. tokenizer: folder of tokenizer files, where the source
    has none; need_tokenizer=False goes without. restart: throw away an unfinished conversion instead of going
    on with it. adapter: a folder with an adapter to merge into the weights. progress is called from worker
    threads, one at a time.

    Raises ConversionError, ConfigError, CheckpointError, ModelNotFoundError or HubError; `target` does not
    exist then, and what was done is in TARGET.partial for the next run.
    """
    recipe = recipe or make_recipe()
    if shard_size < 1:
        raise ConversionError(f"shard size {shard_size} is not possible, expected bytes such as 5GB")
    opened = _open(source, revision, offline)
    if adapter is not None:
        opened = merged(opened, adapter, recipe)
    _require_outside(Path(target).expanduser(), opened)
    sidecars = find_sidecars(opened, None if tokenizer is None else Path(tokenizer), need=need_tokenizer)
    jobs = make_jobs(opened, recipe, search=not fast, mxfp4_search=mxfp4_search, for_streaming=for_streaming)
    layout = lay_out(jobs.outputs, shard_size)
    fingerprint = opened.fingerprint()
    identity = {
        "source": fingerprint,
        "tool version": version("gptoss-mlx"),
        "recipe": recipe.to_dict(),
        "options": {
            "fast": fast,
            "mxfp4_search": mxfp4_search,
            "for_streaming": for_streaming,
            "shard_size": shard_size,
            **_mark(adapter),
        },
        "tokenizer": {name: hashlib.sha256(content).hexdigest() for name, content in sidecars.items()},
    }
    small = {"config.json": _json(make_config(opened, jobs), indent=2), **sidecars}
    if layout.index is not None:
        small[INDEX_NAME] = _json(layout.index, indent=1)
    names = {*(shard.name for shard in layout.shards), *small, INDEX_NAME, MANIFEST_NAME}
    work = _Workplace(Path(target).expanduser(), names)
    if (finished := work.prepare(identity, restart=restart)) is not None:
        return Converted(work.target, finished, tuple(jobs.notes))
    with Journal(work.partial, identity, restart=restart) as journal:
        work.open_output(restart=restart)
        work.check_space(layout)
        run = _Run(jobs.all, journal, progress)
        with ShardWriter(work.output, layout, run.check_stop, past_cache=fast) as writer:
            run.all_jobs(writer, workers or min(os.cpu_count() or 1, MAX_WORKERS))
            opened.check_unchanged(fingerprint)
            writer.sync()
            files = {shard.name: FileEntry(shard.size) for shard in layout.shards}
            if not fast:
                files = run.hashed(writer, layout.shards)
        for name, content in small.items():
            write_file(work.output / name, content)
            files[name] = FileEntry.of(content)
        manifest = Manifest(
            tool_version=version("gptoss-mlx"),
            source=opened.entry(),
            recipe=recipe.to_dict(),
            tensors=dict(_entries(jobs.all, journal)),
            files=files,
        )
        manifest.write(work.output)
        work.publish()
    return Converted(work.target, manifest, tuple(jobs.notes), run.resumed)


def _mark(adapter: Path | None) -> dict[str, str]:
    """What tells conversions with different adapters apart."""
    if adapter is None:
        return {}
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("adapter*")):
        digest.update(path.read_bytes())
    return {"adapter": digest.hexdigest()}


def _json(content: dict[str, Any], indent: int) -> bytes:
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()


def _entries(jobs: list[Job], journal: Journal) -> Iterator[tuple[str, TensorEntry]]:
    """The manifest's tensors, out of the jobs and what the journal holds of them."""
    for job in jobs:
        record = journal.records[job.name]
        action = "relayout" if job.action == "cast" and record.squared_error == 0 else job.action
        error = 0.0 if action in ("copy", "relayout") else record.relative_error
        for output in job.outputs:
            packing = output.packing
            entry = TensorEntry(
                action=action,
                part=job.part,
                sources=job.sources,
                dtype=output.dtype,
                shape=output.shape,
                bytes=output.nbytes,
                sha256=record.digests[output.name],
                relative_error=error if output is job.outputs[0] else None,
                bits=None if packing is None else packing.bits,
                group_size=None if packing is None else packing.group_size,
            )
            yield output.name, entry


def _require_outside(target: Path, source: Source) -> None:
    """The result must not lie among the files that it is made of. Raises ConversionError."""
    folder = source.folder.resolve()
    if source.kind != "gguf" and target.resolve().is_relative_to(folder):
        raise ConversionError(f"{target} lies inside the source {folder}: name a folder beside it")


def _open(source: str | Path, revision: str | None, offline: bool) -> Source:
    path = Path(source).expanduser()
    if path.exists() and is_gguf(path):
        return open_source(path)
    from mlx_gptoss.checkpoint.hub import is_repo_id, resolve
    from mlx_gptoss.checkpoint.names import expand

    folder = resolve(source, revision=revision, offline=offline, gguf=True)
    name = expand(source)
    hub_id = name if not path.exists() and is_repo_id(name) else None
    return open_source(folder, id=hub_id)


class _Workplace:
    """TARGET, and TARGET.partial where it is built; `names` are the files that TARGET may hold."""

    def __init__(self, target: Path, names: set[str]) -> None:
        if target.name in ("", "..") or target.is_mount():
            raise ConversionError(f"{str(target)!r}: cannot be replaced; name a new folder inside it")
        self.target, self.names = target, names
        self.partial = target.with_name(target.name + ".partial")
        self.output = self.partial / "output"

    def prepare(self, identity: dict[str, Any], *, restart: bool) -> Manifest | None:
        """Make TARGET.partial. The manifest, if an earlier run was stopped between its last two steps."""
        self._check_partial()
        occupied = self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir()))
        if occupied:
            begun = (self.partial / JOURNAL_NAME).exists() and not self.output.exists()
            if begun and not restart and (self.target / MANIFEST_NAME).exists():
                with Journal(self.partial, identity):  # refuses if that was another conversion
                    self._forget()
                return read_manifest(self.target)
            raise ConversionError(
                f"{self.target}: is not an empty folder; choose a new one, nothing was written"
            )
        with writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
        return None

    def open_output(self, *, restart: bool) -> None:
        """Make the output folder, or take up the one that is there. Needs the journal's lock."""
        with writing(self.output):
            if restart and self.output.exists() and not self.output.is_symlink():
                shutil.rmtree(self.output)
            self.output.mkdir(exist_ok=True)
            self.check_output()

    def check_output(self) -> None:
        """Raise ConversionError for anything in the output folder that is not a file of this conversion.

        Hidden files are allowed: macOS creates them on its own.
        """
        there = [self.output] if self.output.is_symlink() else sorted(self.output.iterdir())
        for path in there:
            known = path.name in self.names or path.name.startswith(".")
            if not known or path.is_symlink() or not path.is_file():
                raise ConversionError(
                    f"{path}: is not of this conversion, nothing was published; "
                    "move it away and run the same command again"
                )

    def _check_partial(self) -> None:
        """Refuse a TARGET.partial that is neither empty nor has a journal: no conversion made it."""
        journal = self.partial / JOURNAL_NAME
        with writing(self.partial):
            folder = self.partial.is_dir() and not self.partial.is_symlink()
            noted = journal.is_file() and not journal.is_symlink()
            ours = folder and (noted or not any(self.partial.iterdir()))
        if os.path.lexists(self.partial) and not ours:
            raise ConversionError(
                f"{self.partial}: was not made by a conversion, expected a folder with a {JOURNAL_NAME}; "
                "move it away or choose another target"
            )

    def check_space(self, layout: ShardLayout) -> None:
        """Refuse before the first byte when the disk cannot hold what is still to be written."""
        there = 0
        for shard in layout.shards:
            with suppress(FileNotFoundError):
                there += os.stat(self.output / shard.name).st_blocks * 512
        needed = layout.nbytes - there + SPARE_BYTES
        free = shutil.disk_usage(self.output).free
        if needed > free:
            raise ConversionError(
                f"{self.target}: needs {gigabytes(needed)} more, {gigabytes(free)} are free; "
                "free some space or choose a target on another disk"
            )

    def publish(self) -> None:
        """Give the finished folder its name, then forget the journal."""
        self.check_output()
        sync_folder(self.output)
        with writing(self.target):
            if self.target.exists():
                self.target.rmdir()
            os.rename(self.output, self.target)
        sync_folder(self.target.parent)
        self._forget()

    def _forget(self) -> None:
        """Remove the journal and its folder, unless something else lies in it: then that stays."""
        with suppress(OSError):
            (self.partial / JOURNAL_NAME).unlink()
            self.partial.rmdir()


class _Stopped(Exception):
    """Another worker has failed, or Ctrl-C was pressed: leave quietly."""


class _Pending:
    """A job whose chunks are being made: how many are left, and the sums so far, by chunk."""

    def __init__(self, chunks: int) -> None:
        self.left = chunks
        self.sums: dict[int, tuple[float, float]] = {}
        self.lock = threading.Lock()

    def finish(self, first: int, chunk: Chunk) -> bool:
        """Note a chunk; whether it was the last."""
        with self.lock:
            self.sums[first] = (chunk.squared_error, chunk.squared_norm)
            self.left -= 1
            return self.left == 0

    def totals(self) -> tuple[float, float]:
        """Summed in the order of the rows, so that the result does not depend on the threads."""
        ordered = [self.sums[first] for first in sorted(self.sums)]
        return sum(e for e, _ in ordered), sum(n for _, n in ordered)


class _Run:
    """The work itself: jobs over a pool of threads, progress, the journal."""

    def __init__(
        self, jobs: list[Job], journal: Journal, progress: Callable[[Progress], None] | None
    ) -> None:
        self.jobs, self.journal = jobs, journal
        self.resumed = 0
        self._progress = progress or (lambda _: None)
        self._total = sum(job.nbytes for job in jobs)
        self._done = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def all_jobs(self, writer: ShardWriter, workers: int) -> None:
        """Every job that the journal does not already hold.

        Copying waits for the disk and computing for the cores: they go on side by side.
        """
        copies = [job.extent is not None for job in self.jobs]
        with (
            ThreadPoolExecutor(min(workers, COPIERS), thread_name_prefix="copy") as copying,
            ThreadPoolExecutor(workers, thread_name_prefix="convert") as computing,
        ):
            futures = [
                (copying if copied else computing).submit(task)
                for job, copied in zip(self.jobs, copies, strict=True)
                for task in self._tasks(writer, job)
            ]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                for pool in (copying, computing):
                    pool.shutdown(cancel_futures=True)
        self._stop.clear()
        for future in futures:
            failure = None if future.cancelled() else future.exception()
            if failure is not None and not isinstance(failure, _Stopped):
                raise failure

    def hashed(self, writer: ShardWriter, shards: Sequence[Shard]) -> dict[str, FileEntry]:
        """Size and hash of the shards."""
        self._tell(0, "hashing files")
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            digests = pool.map(writer.shard_digest, shards)
            return {s.name: FileEntry(s.size, digest) for s, digest in zip(shards, digests, strict=True)}

    def _tasks(self, writer: ShardWriter, job: Job) -> list[Task]:
        tasks: list[Task]
        if job.extent is not None:
            tasks = [partial(self._copy, writer, job, job.extent)]
        elif job.in_order:
            tasks = [partial(self._in_order, writer, job)]
        else:
            starts = range(0, job.rows, job.chunk_rows)
            pending = _Pending(len(starts))
            tasks = [partial(self._chunk, writer, job, pending, first) for first in starts]
        return [partial(self._check_done, writer, job, tasks)] if job.name in self.journal.records else tasks

    def _check_done(self, writer: ShardWriter, job: Job, tasks: list[Task]) -> None:
        """A job the journal calls finished: believe it only if its bytes still have their hashes."""
        self.check_stop()
        digests = self.journal.records[job.name].digests
        if all(writer.read_back(output.name).sha256 == digests[output.name] for output in job.outputs):
            with self._lock:
                self.resumed += job.nbytes
            self._tell(job.nbytes, job.name)
        else:
            for task in tasks:
                task()

    def _copy(self, writer: ShardWriter, job: Job, extent: Extent) -> None:
        self.check_stop()
        seen = writer.copy(job.name, extent, lambda count: self._tell(count, job.name))
        self._note(job, [seen], 0.0, 0.0)

    def _in_order(self, writer: ShardWriter, job: Job) -> None:
        """All chunks of a job with one output, one after the other."""
        assert job.compute is not None
        (output,) = job.outputs
        watch, error, norm = Watch(output.name, output.dtype), 0.0, 0.0
        for first in range(0, job.rows, job.chunk_rows):
            self.check_stop()
            chunk = job.compute(first, min(first + job.chunk_rows, job.rows))
            (rows,) = chunk.arrays
            watch.see(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
            writer.write_rows(output.name, first, rows)
            self._tell(rows.nbytes, job.name)
            error += chunk.squared_error
            norm += chunk.squared_norm
        self._note(job, [watch], error, norm)

    def _chunk(self, writer: ShardWriter, job: Job, pending: _Pending, first: int) -> None:
        self.check_stop()
        assert job.compute is not None
        chunk = job.compute(first, min(first + job.chunk_rows, job.rows))
        for output, rows in zip(job.outputs, chunk.arrays, strict=True):
            writer.write_rows(output.name, first, rows)
        self._tell(sum(rows.nbytes for rows in chunk.arrays), job.name)
        if pending.finish(first, chunk):
            # Written in any order, by several threads: the bytes are small, and read once more in theirs.
            self._note(job, [writer.read_back(output.name) for output in job.outputs], *pending.totals())

    def _note(self, job: Job, seen: list[Watch], squared_error: float, squared_norm: float) -> None:
        if any(watch.found for watch in seen):
            raise not_finite(job.sources)
        digests = {o.name: watch.sha256 for o, watch in zip(job.outputs, seen, strict=True)}
        with self._lock:
            self.journal.add(job.name, Record(digests, squared_error, squared_norm))

    def _tell(self, count: int, step: str) -> None:
        with self._lock:
            self._done += count
            self._progress(Progress(self._done, self._total, step))
