"""A training run: from a model and a data set to an adapter in a folder, resumable at any moment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as opt
import numpy as np
from mlx.utils import tree_map

from mlx_gptoss.checkpoint.adapter import Adapter, write_adapter
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.memory import plan_checkpoint
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.device import available_memory, limit_memory
from mlx_gptoss.errors import TuneError
from mlx_gptoss.harmony import Conversation
from mlx_gptoss.model.low_rank import EXPERTS
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tune.base import Base, Tree, parts_of
from mlx_gptoss.tune.dataset import Encoded, encode, pack, read_data
from mlx_gptoss.tune.examples import Example, Preference, prompt_of
from mlx_gptoss.tune.gradient import Measured, gradient, measure, task_of
from mlx_gptoss.tune.memory import TuneMemory, plan_tune, require, trainable
from mlx_gptoss.tune.options import TuneOptions
from mlx_gptoss.tune.report import write_report
from mlx_gptoss.tune.sample import answer
from mlx_gptoss.tune.state import STATE_FILE, Progress, load_state, save_state

# How far the model may go from what it said of what is kept, nats a token, before a step counts as harm.
KEEP_LIMIT = 0.02
# Of the tokens of an epoch, the share that repeats what must not be forgotten.
REPLAY_SHARE = 0.6


@dataclass(frozen=True)
class Started:
    """A run begins, or goes on from `step`."""

    step: int
    total: int
    parameters: int
    examples: int
    validating: int
    left_out: int
    memory: TuneMemory


@dataclass(frozen=True)
class Step:
    """A step was taken. loss: a mean over its learned tokens; seconds: of this step."""

    step: int
    total: int
    loss: float
    tokens: int
    learned: int
    seconds: float
    lr: float


@dataclass(frozen=True)
class Check:
    """A validation. Losses are means, keep the mean divergence from the base, in nats a token; None for what
    there is nothing of. best: the adapter was written.
    """

    step: int
    valid: float | None
    keep: float | None
    won: float | None
    best: bool
    samples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The run is over: why, and which step's adapter lies in the folder."""

    folder: Path
    why: str
    best_step: int


Event = Started | Step | Check | Finished
Listener = Callable[[Event], object]


def tune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    options: TuneOptions | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    restart: bool = False,
    on_event: Listener = lambda event: None,
    progress: Callable[[int, int], None] | None = None,
) -> Finished:
    """Train an adapter for `model` on `data`, into the folder `out`, which then loads here and in mlx-lm.

    data: a jsonl file, a folder with train.jsonl, or a Hub data set's id; see examples.py for its rows. A run
    that was stopped goes on when it is started again, to the same bytes. restart: throw away what is there.
    on_event is told of the start, every step, every validation and the end; what it raises ends the run.

    Raises TuneError, MemoryLimitError, and what loading a model raises.
    """
    chosen = options or TuneOptions()
    folder = Path(out).expanduser()
    rows = read_data(str(data), chosen.valid, chosen.keep, chosen.seed)
    source = resolve(model, revision=revision, offline=offline)
    checkpoint = Checkpoint(source, dtype)
    chosen.layer_numbers(checkpoint.config)
    tokenizer = Tokenizer.from_folder(source)
    examples = encode(
        rows, tokenizer, chosen.tokens, skip_long=chosen.skip_long, preferences=chosen.method == "dpo"
    )
    memory = plan_checkpoint(checkpoint)
    planned = plan_tune(memory, chosen, max(map(len, [*examples.train, *examples.valid])))
    require(planned, available_memory(), checkpoint.config)
    limit_memory(memory.weights)
    mark = json.dumps(
        {
            "model": str(model),
            "data": rows.train.sha256,
            "validation data": None if rows.valid is None else rows.valid.sha256,
            **{k: v for k, v in asdict(chosen).items() if k not in ("samples", "stream")},
        }
    )
    if restart:
        (folder / STATE_FILE).unlink(missing_ok=True)
    saved = load_state(folder, mark)  # told before gigabytes are read
    base = Base(checkpoint, stream=chosen.stream, progress=progress)
    about = {
        "base": str(model),
        "data": Path(str(data)).name,
        "data_sha256": rows.train.sha256,
        "examples": len(examples.train),
    }
    run = _Run(base, tokenizer, examples, chosen, folder, mark, about, on_event)
    if saved is not None:
        # In the order that the tree was made in: the gradient's norm is a sum over it.
        run.tree = tree_map(lambda _, value: value, run.tree, saved[0])
        run.optimizer.state, run.progress = saved[1], saved[2]
    return run.to_end(planned)


class _Run:
    """A run: what it is about, and how far it is."""

    def __init__(
        self,
        base: Base,
        tokenizer: Tokenizer,
        data: Encoded,
        options: TuneOptions,
        folder: Path,
        mark: str,
        about: dict[str, Any],
        tell: Listener,
    ) -> None:
        self.base, self.tokenizer, self.data, self.options = base, tokenizer, data, options
        self.folder, self.mark, self.about, self.tell = folder, mark, about, tell
        self.progress = Progress()
        self.group = mx.distributed.init()
        names, layers = options.part_names(), options.layer_numbers(base.config)
        self.tree = base.new_parameters(layers, names, options.rank, options.seed)
        self.total = options.steps or self._steps_of_epochs()
        self.every = options.every or max(5, self.total // 10)
        self.optimizer = make_optimizer(options, self.total)
        self.optimizer.init(self.tree)

    def to_end(self, memory: TuneMemory) -> Finished:
        """Take the steps that are left."""
        progress, options = self.progress, self.options
        self._require_together()
        self.folder.mkdir(parents=True, exist_ok=True)
        parameters = trainable(self.base.config, options)
        self.tell(
            Started(
                progress.step, self.total, parameters, len(self.data.train), len(self.data.valid),
                self.data.left_out, memory,
            )
        )  # fmt: skip
        if not progress.step and not progress.checks:
            self._check()
        if not progress.finished:
            progress.finished = self._steps() or f"all {self.total} steps are taken"
            self._save()
        return self._finish()

    def _require_together(self) -> None:
        """Raise TuneError unless all machines that train together go on from the same step."""
        if self.group.size() > 1:
            steps = np.array(mx.distributed.all_gather(mx.array([self.progress.step]))).tolist()
            if len(set(steps)) > 1:
                told = " and ".join(map(str, steps))
                raise TuneError(
                    f"{self.folder}: the machines are at steps {told}: let --out be a folder that all of "
                    "them share, or --restart"
                )

    def _steps(self) -> str | None:
        """Step after step; why it ended early, or None."""
        progress, options = self.progress, self.options
        for packs in self._batches(progress.step):
            self._step(packs)
            last = progress.step == self.total
            if progress.step % self.every == 0 or last:
                self._check()
                if options.patience and progress.stale >= options.patience and self.data.valid:
                    return f"no gain in {progress.stale} validations, stopped at step {progress.step}"
                self._save()
            if last:
                return None
        return None

    def _step(self, packs: Sequence[Sequence[Example] | Sequence[Preference]]) -> None:
        started, progress, options = time.perf_counter(), self.progress, self.options
        total, summed = Measured(0.0, 0, 0), None
        for items in packs:
            measured, grads = gradient(self.base, self.tree, options.scale, self._task(items))
            total = total + measured
            summed = grads if summed is None else tree_map(mx.add, summed, grads)
            mx.eval(summed)
        total, summed = self._over_ranks(total, summed)
        if not math.isfinite(total.loss):
            raise TuneError(
                f"the loss is {total.loss} at step {progress.step + 1}: lower --lr (it is {options.lr:g}); "
                f"{self.folder} keeps the best adapter so far, of step {progress.best_step}"
            )
        grads = tree_map(lambda g: g / max(1, total.count + total.kept), summed)
        grads, _ = opt.clip_grad_norm(grads, options.clip)
        # In one order of axes: another, after a state is read, would round products otherwise.
        self.tree = tree_map(mx.contiguous, self.optimizer.apply_gradients(grads, self.tree))
        mx.eval(self.tree, self.optimizer.state)
        progress.step += 1
        progress.losses.append(total.mean)
        progress.learned += total.count
        progress.tokens += total.tokens
        seconds = time.perf_counter() - started
        lr = float(np.asarray(self.optimizer.learning_rate))
        self.tell(Step(progress.step, self.total, total.mean, total.tokens, total.count, seconds, lr))

    def _over_ranks(self, total: Measured, grads: Tree | None) -> tuple[Measured, Tree]:
        """Sums over the machines that train together: losses, counts and gradients."""
        if self.group.size() > 1:
            if grads is None:  # this one's share of the last packs was empty
                grads = tree_map(mx.zeros_like, self.tree)
            grads = tree_map(mx.distributed.all_sum, grads)
            sums = np.array(mx.distributed.all_sum(mx.array(astuple(total)))).tolist()
            total = Measured(*(type(was)(now) for was, now in zip(astuple(total), sums, strict=True)))
        assert grads is not None
        return total, grads

    def _task(self, items: Sequence[Example] | Sequence[Preference]) -> Any:
        return task_of(items, self.base, self.options.beta, self.options.anchor)

    # --- the data's order

    def _packs(self, epoch: int) -> list[list[Any]]:
        """The packs of an epoch, of this machine and all others: the seed alone decides."""
        rng = np.random.default_rng([self.options.seed, epoch])
        items: list[Any] = list(self.data.train)
        replay = list(self.data.replay)
        if replay and self.options.method == "sft":
            room = REPLAY_SHARE / (1 - REPLAY_SHARE) * sum(map(len, items))
            while room > 0:
                items.append(replay[int(rng.integers(len(replay)))])
                room -= len(items[-1])
        return pack(items, self.options.tokens, rng)

    def _steps_of_epochs(self) -> int:
        each = self.options.accumulate * self.group.size()
        whole = math.ceil(self.options.epochs)
        steps = sum(math.ceil(len(self._packs(epoch)) / each) for epoch in range(whole))
        return max(1, round(steps * self.options.epochs / whole))

    def _batches(self, start: int) -> Iterator[list[Any]]:
        """This machine's packs of each step, from step `start` on."""
        each, ranks, rank = self.options.accumulate, self.group.size(), self.group.rank()
        step = epoch = 0
        while True:
            packs = self._packs(epoch)
            for at in range(0, len(packs), each * ranks):
                if step >= start:
                    yield packs[at : at + each * ranks][rank::ranks]
                step += 1
            epoch += 1

    # --- validation

    def _mean(self, items: Sequence[Any]) -> Measured | None:
        """What some examples come to, in packs of their own."""
        if not items:
            return None
        total = Measured(0.0, 0, 0)
        for some in pack(items, self.options.tokens, np.random.default_rng(0)):
            total = total + measure(self.base, self.tree, self.options.scale, self._task(some))
        return total

    def _check(self) -> None:
        progress = self.progress
        valid, keep = self._mean(self.data.valid), self._mean(self.data.keep)
        kept = None if keep is None else keep.mean_strayed
        reached = None if valid is None else valid.mean
        better = progress.step > 0 and (kept is None or kept <= KEEP_LIMIT)
        if better and reached is not None and progress.best is not None:
            better = reached < progress.best
        if better:
            progress.best, progress.best_step, progress.stale = reached, progress.step, 0
            if self.group.rank() == 0:
                write_adapter(self.folder, self._adapter(), self.base.config)
        elif progress.step:
            progress.stale += 1
        won = None if valid is None or self.options.method == "sft" else valid.won / max(1, valid.count)
        check = Check(progress.step, reached, kept, won, better, self._samples())
        progress.checks.append(asdict(check))
        self.tell(check)

    def _samples(self) -> tuple[tuple[str, str], ...]:
        rows = self.data.sample_rows[: self.options.samples]
        if self.base.streamed or not rows:
            return ()
        model = self.base.with_adapter(self._adapter())
        found = []
        for row in rows:
            conversation = prompt_of(row)
            found.append((_asked(conversation), answer(model, self.tokenizer, conversation)))
        return tuple(found)

    # --- what is written

    def _adapter(self) -> Adapter:
        about = {**self.about, "step": self.progress.step, "method": self.options.method}
        return Adapter(parts_of(self.tree), self.options.scale, about)

    def _save(self) -> None:
        if self.group.rank() == 0:
            save_state(self.folder, self.tree, self.optimizer.state, self.progress, self.mark)

    def _finish(self) -> Finished:
        progress = self.progress
        if not progress.best_step:
            raise TuneError(
                f"{self.folder}: no adapter: at every validation the model was further than {KEEP_LIMIT} "
                "nats a token from what it says of --keep without it; lower --lr, or give more to keep"
            )
        if self.group.rank() == 0:
            settings = {**self.about, **asdict(self.options)}
            write_report(self.folder, self.folder.name, settings, progress)
        finished = Finished(self.folder, progress.finished, progress.best_step)
        self.tell(finished)
        return finished


def make_optimizer(options: TuneOptions, total: int) -> opt.Optimizer:
    """AdamW, or Muon for matrices and AdamW for stacks of them; a linear start, then a cosine."""
    first = min(total - 1, max(1, round(options.warmup * total))) if options.warmup else 0
    rate: Any = opt.cosine_decay(options.lr, max(1, total - first), options.lr / 20)
    if first > 0:
        rate = opt.join_schedules(
            [opt.linear_schedule(options.lr / (first + 1), options.lr, first), rate], [first]
        )
    adam = opt.AdamW(learning_rate=rate, weight_decay=options.weight_decay, bias_correction=True)
    if options.optimizer == "adamw":
        return adam
    muon = opt.Muon(learning_rate=rate, weight_decay=options.weight_decay)
    return opt.MultiOptimizer([muon, adam], [lambda path, _: not any(name in path for name in EXPERTS)])


def _asked(conversation: Conversation) -> str:
    return next((m.content for m in reversed(conversation.messages) if m.role == "user"), "")
