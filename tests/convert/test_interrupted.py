"""Conversions stopped, refused or disturbed: no half result under a final name, no byte different."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mlx_gptoss.convert import convert as module
from mlx_gptoss.convert import writer
from mlx_gptoss.convert.convert import Progress, convert
from mlx_gptoss.convert.journal import JOURNAL_NAME, Journal
from mlx_gptoss.convert.recipes import make_recipe
from mlx_gptoss.errors import CheckpointError, ConversionError, GptOssError
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(hidden=64, intermediate=64, experts=4, heads=4, head_dim=16, vocab=320)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_byte_tokenizer(write_checkpoint(tmp_path / "source", SHAPE))


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of an uninterrupted conversion of the same checkpoint."""
    root = tmp_path_factory.mktemp("uninterrupted")
    source = write_byte_tokenizer(write_checkpoint(root / "source", SHAPE))
    return files(convert(source, root / "made").folder)


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def at(share: float, action: Callable[[], None]) -> Callable[[Progress], None]:
    """A progress callback that acts once, when this share of the bytes is done."""
    done: list[bool] = []

    def tell(progress: Progress) -> None:
        if not done and progress.done >= share * progress.total:
            done.append(True)
            action()

    return tell


def interrupt() -> None:
    raise KeyboardInterrupt


def one_line(error: pytest.ExceptionInfo[GptOssError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# Forks a fresh converter for every moment it kills one at; prints how far each had come.
KILLER = """
import os, random, signal, sys
from pathlib import Path
from mlx_gptoss.convert import convert as module
from mlx_gptoss.convert.convert import convert

source, target = Path(sys.argv[1]), Path(sys.argv[2])
random.seed(int(sys.argv[3]))
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

def until(share):
    def tell(progress):
        if progress.done >= share * progress.total:
            die()
    return tell

def before(holder, name):
    def run():
        setattr(holder, name, die)
        convert(source, target)
    return run

def after(holder, name):
    original = getattr(holder, name)
    def late(*args, **options):
        original(*args, **options)
        die()
    def run():
        setattr(holder, name, late)
        convert(source, target)
    return run

shares = sorted(random.random() for _ in range(20))
moments = [
    lambda share=share, workers=1 + n % 3: convert(source, target, progress=until(share), workers=workers)
    for n, share in enumerate(shares)
]
moments += [before(module.ShardWriter, "sync"), before(module, "write_file")]
moments += [before(module.Manifest, "write"), after(module.Manifest, "write")]
moments += [before(module.os, "rename"), after(module.os, "rename")]
for moment in moments:
    child = os.fork()
    if child == 0:
        try:
            moment()
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    journal = target.with_name(target.name + ".partial") / "journal.jsonl"
    print(os.WTERMSIG(status), journal.read_text().count("job") if journal.exists() else 0, target.exists())
"""


def test_killed_at_any_moment_the_next_run_ends_with_the_same_bytes(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    target = tmp_path / "made"
    command = [sys.executable, "-c", KILLER, str(source), str(target), "1"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    rounds = [line.split() for line in told]
    assert [signal for signal, _, _ in rounds] == ["9"] * 26
    assert [exists for _, _, exists in rounds] == ["False"] * 25 + ["True"]
    jobs = [int(count) for _, count, _ in rounds]
    assert jobs == sorted(jobs) and len(set(jobs)) > 3  # the work went on, it did not start over
    convert(source, target)  # the last kill came between the rename and the end of the cleaning up
    assert files(target) == expected and not target.with_name("made.partial").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_ctrl_c_leaves_work_that_is_taken_up(
    source: Path, expected: dict[str, str], tmp_path: Path, share: float
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made", progress=at(share, interrupt))
    assert not (tmp_path / "made").exists()
    made = convert(source, tmp_path / "made")
    assert files(made.folder) == expected
    assert made.resumed > 0 or share < 0.3


def test_finished_work_is_checked_before_it_is_believed(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made", progress=at(1.0, interrupt), workers=1)
    [shard] = (tmp_path / "made.partial" / "output").glob("*.safetensors")
    size = shard.stat().st_size
    with open(shard, "r+b") as stream:  # what a power cut leaves: the journal is there, the data is not
        stream.seek(size // 2)
        stream.write(bytes(size // 4))
    made = convert(source, tmp_path / "made")
    assert files(made.folder) == expected and 0 < made.resumed < size * 0.8


def test_half_a_line_at_the_end_of_the_journal_is_forgotten(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made", progress=at(0.5, interrupt))
    with open(tmp_path / "made.partial" / JOURNAL_NAME, "a") as stream:
        stream.write('{"job": "lm_head.weight", "dig')
    assert files(convert(source, tmp_path / "made").folder) == expected


@pytest.mark.parametrize("content", ["[1]\n{}\n", "not JSON\n", '{"source": {}}\n[]\n'])
def test_a_broken_journal_is_told_and_can_be_thrown_away(
    source: Path, expected: dict[str, str], tmp_path: Path, content: str
) -> None:
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / JOURNAL_NAME).write_text(content)
    with pytest.raises(ConversionError, match="--restart") as error:
        convert(source, tmp_path / "made")
    one_line(error)
    assert files(convert(source, tmp_path / "made", restart=True).folder) == expected


def test_work_of_another_recipe_or_source_is_not_mixed_in(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made", progress=at(0.5, interrupt))
    with pytest.raises(ConversionError, match="another recipe"):
        convert(source, tmp_path / "made", make_recipe("mxfp4-q8"))
    with pytest.raises(ConversionError, match="another options"):
        convert(source, tmp_path / "made", fast=True)
    other = write_byte_tokenizer(write_checkpoint(tmp_path / "other", SHAPE, seed=1))
    with pytest.raises(ConversionError, match="another source"):
        convert(other, tmp_path / "made")
    assert files(convert(source, tmp_path / "made").folder) == expected


def test_two_conversions_cannot_write_to_one_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "made.partial").mkdir()
    with (
        Journal(tmp_path / "made.partial", {}),
        pytest.raises(ConversionError, match="another conversion is writing") as error,
    ):
        convert(source, tmp_path / "made")
    one_line(error)


# --- the disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_fills_up_stops_with_one_line_and_a_journal(
    source: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    original, calls = writer._write_at, []

    def full(*args: object) -> None:
        calls.append(1)
        if len(calls) > 12:
            raise OSError(code, os.strerror(code))
        original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_at", full)
        with pytest.raises(ConversionError, match="run the same command again") as error:
            convert(source, tmp_path / "made")
    assert ("the disk is full" in one_line(error)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert not (tmp_path / "made").exists() and (tmp_path / "made.partial" / JOURNAL_NAME).exists()
    assert files(convert(source, tmp_path / "made").folder) == expected


def test_a_true_limit_on_file_size_is_one_line(source: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from mlx_gptoss import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(cli.run(['convert', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "made")]
    measured = {
        name for name in os.environ if name.startswith("COVERAGE_")
    }  # its file would hit the limit, too
    environment = {name: value for name, value in os.environ.items() if name not in measured}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["write_file", "Manifest.write", "os.rename"])
def test_failing_at_the_last_steps_leaves_nothing_under_the_final_name(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuse_kindly(*_: object) -> None:
        raise ConversionError("refused")

    with monkeypatch.context() as patch:
        holder: object = module
        for part in name.split(".")[:-1]:
            holder = getattr(holder, part)
        patch.setattr(holder, name.split(".")[-1], refuse if name == "os.rename" else refuse_kindly)
        with pytest.raises(ConversionError) as error:
            convert(source, tmp_path / "made")
    one_line(error)
    assert not (tmp_path / "made").exists()
    made = convert(source, tmp_path / "made")
    assert files(made.folder) == expected and made.resumed > 0


def test_a_target_that_cannot_be_written_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConversionError, match="choose another target") as error:
        convert(source, tmp_path / "made")
    one_line(error)
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_one_line(source: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o555)
    with pytest.raises(ConversionError, match="cannot be written"):
        convert(source, parent / "made")


def test_too_little_space_is_said_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConversionError, match="more, 1.0 kB are free") as error:
        convert(source, tmp_path / "made")
    one_line(error)
    assert not any((tmp_path / "made.partial" / "output").iterdir())


# --- the source


def test_a_source_that_cannot_be_read_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, broken = os.preadv, {path.stat().st_ino for path in source.glob("*.safetensors")}

    def fail(descriptor: int, into: Sequence[memoryview], offset: int) -> int:
        if os.fstat(descriptor).st_ino in broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, into, offset)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ConversionError, match="cannot be read any more") as error:
        convert(source, tmp_path / "made")
    one_line(error)


@pytest.mark.parametrize("change", ["touch", "append", "truncate", "remove"])
def test_a_source_that_changes_underneath_finishes_nothing(source: Path, tmp_path: Path, change: str) -> None:
    victim = sorted(source.glob("*.safetensors"))[-1]

    def disturb() -> None:
        if change == "touch":
            os.utime(victim, ns=(1, 1))
        elif change == "append":
            with open(victim, "ab") as stream:
                stream.write(b"more")
        elif change == "truncate":
            os.truncate(victim, 1000)
        else:
            victim.unlink()

    with pytest.raises((ConversionError, CheckpointError)) as error:
        convert(source, tmp_path / "made", progress=at(0.2, disturb))
    one_line(error)
    assert not (tmp_path / "made").exists()


def test_after_a_change_only_a_restart_converts(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="changed while it was being converted"):
        convert(source, tmp_path / "made", progress=at(0.2, lambda: touch_all(source)))
    with pytest.raises(ConversionError, match="another source"):
        convert(source, tmp_path / "made")
    fresh = convert(source, tmp_path / "fresh")
    assert files(convert(source, tmp_path / "made", restart=True).folder) == files(fresh.folder)


def touch_all(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(1, 1))


# --- the target


def test_an_empty_folder_is_a_fine_target(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert files(convert(source, tmp_path / "made").folder) == expected


@pytest.mark.parametrize("kind", ["file", "full folder", "finished conversion", "the source itself"])
def test_nothing_that_exists_is_overwritten(source: Path, tmp_path: Path, kind: str) -> None:
    target = source if kind == "the source itself" else tmp_path / "made"
    if kind == "file":
        target.write_text("precious")
    elif kind == "full folder":
        target.mkdir()
        (target / "precious").touch()
    elif kind == "finished conversion":
        convert(source, target)
    before = target.read_text() if target.is_file() else files(target)
    with pytest.raises(ConversionError, match="not an empty folder|inside the source") as error:
        convert(source, target)
    one_line(error)
    assert (target.read_text() if target.is_file() else files(target)) == before


@pytest.mark.parametrize("target", ["/", "..", ""])
def test_a_target_that_is_no_name_is_refused(source: Path, target: str) -> None:
    with pytest.raises(ConversionError):
        convert(source, target)


# --- what lies beside the target and is not ours


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, with its content or where it points."""
    return {
        p.relative_to(folder).as_posix(): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "linked journal", "journal folder"])
def test_a_partial_that_no_conversion_made_is_left_as_it_is(
    source: Path, tmp_path: Path, kind: str, restart: bool
) -> None:
    partial, home = tmp_path / "made.partial", tmp_path / "home"
    home.mkdir()
    (home / JOURNAL_NAME).write_text("precious")
    if kind == "file":
        partial.write_text("precious")
    elif kind == "link":
        partial.symlink_to(home)
    else:
        partial.mkdir()
        (partial / "notes.txt").write_text("precious")
        if kind == "linked journal":
            (partial / JOURNAL_NAME).symlink_to(home / JOURNAL_NAME)
        elif kind == "journal folder":
            (partial / JOURNAL_NAME).mkdir()
    before = tree(tmp_path)
    with pytest.raises(ConversionError, match="was not made by a conversion") as error:
        convert(source, tmp_path / "made", restart=restart)
    one_line(error)
    assert tree(tmp_path) == before and not (tmp_path / "made").exists()


def test_what_somebody_put_beside_a_journal_stays(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made", progress=at(0.5, interrupt))
    (tmp_path / "made.partial" / "notes.txt").write_text("precious")
    assert files(convert(source, tmp_path / "made", restart=True).folder) == expected
    assert tree(tmp_path / "made.partial") == {"notes.txt": b"precious"}


def test_an_empty_partial_is_taken(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "made.partial").mkdir()
    assert files(convert(source, tmp_path / "made").folder) == expected
    assert not (tmp_path / "made.partial").exists()


def test_a_restart_does_not_touch_the_work_of_a_running_conversion(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "made.partial" / "output"
    output.mkdir(parents=True)
    (output / "model.safetensors").write_text("half done")
    with Journal(tmp_path / "made.partial", {}):
        before = tree(tmp_path / "made.partial")
        with pytest.raises(ConversionError, match="another conversion is writing"):
            convert(source, tmp_path / "made", restart=True)
        assert tree(tmp_path / "made.partial") == before


@pytest.mark.parametrize("kind", ["file", "folder", "link in place of the weights", "output is a link"])
def test_nothing_foreign_is_published_and_no_link_followed(
    source: Path, expected: dict[str, str], tmp_path: Path, kind: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made", progress=at(0.5, interrupt))
    output, home = tmp_path / "made.partial" / "output", tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("precious")
    if kind == "file":
        stray = output / "other.safetensors"
        stray.touch()
    elif kind == "folder":
        stray = output / "config.json"
        stray.mkdir()
    elif kind == "output is a link":
        stray = output
        shutil.rmtree(output)
        output.symlink_to(home)
    else:
        stray = output / "model.safetensors"
        stray.unlink()
        stray.symlink_to(home / "precious")
    with pytest.raises(ConversionError, match="is not of this conversion") as error:
        convert(source, tmp_path / "made")
    assert str(stray) in one_line(error)
    assert tree(home) == {"precious": b"precious"} and not (tmp_path / "made").exists()
    stray.rmdir() if stray.is_dir() and not stray.is_symlink() else stray.unlink()
    assert files(convert(source, tmp_path / "made").folder) == expected


def test_a_stray_that_appears_at_the_end_is_not_published(source: Path, tmp_path: Path) -> None:
    stray = tmp_path / "made.partial" / "output" / "other.safetensors"
    with pytest.raises(ConversionError, match="is not of this conversion"):
        convert(source, tmp_path / "made", progress=at(1.0, stray.touch))
    assert not (tmp_path / "made").exists()


def test_a_restart_that_cannot_remove_the_old_work_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made", progress=at(0.5, interrupt))

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(ConversionError, match="choose another target") as error:
        convert(source, tmp_path / "made", restart=True)
    one_line(error)
