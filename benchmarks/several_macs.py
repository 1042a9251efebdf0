"""A model over several ranks of this machine: is it the same, what crosses the wire, what does a delay cost?

    python -m benchmarks.several_macs requests [--count 200]    2, 3, 4 ranks against one process
    python -m benchmarks.several_macs tensor [--count 200]      a part of every layer on 2, 3, 4 hosts
    python -m benchmarks.several_macs wire                      bytes a token; CPU of ranks that wait
    python -m benchmarks.several_macs delay                     1 and 10 ms away (Linux, as root)
    python -m benchmarks.several_macs whole DIR                 a model on two ranks: bytes, memory, output

The ranks share the machine's cores, so their speed says nothing of two Macs. Each exits 1 when something is
not as it should be.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.memory import gigabytes, plan_checkpoint, plan_experts
from mlx_gptoss.checkpoint.reader import Checkpoint, Portion, read_model
from mlx_gptoss.device import peak_rss
from mlx_gptoss.distributed.group import Group, Patience
from mlx_gptoss.distributed.hosts import Host
from mlx_gptoss.distributed.launch import Source, Spread, load_spread, spread
from mlx_gptoss.distributed.plan import Share, parse_split, plan_pipeline
from mlx_gptoss.distributed.runner import PipelineRunner
from mlx_gptoss.distributed.session import BEAT
from mlx_gptoss.engine.runner import LocalRunner, ModelRunner
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.speculate import PromptLookup
from tests.support.checkpoints import write_checkpoint
from tests.support.delayed_link import HERE, THERE, Delay, StarterThere, delayed
from tests.support.groups import PATIENT, pipeline, tensor
from tests.support.mixed_requests import Script
from tests.support.random_weights import Shape
from tests.support.scheduling import Client, prompt, run

# Of the model that is divided among up to four hosts, each with a KV head and a group of columns or more.
PARTED = Shape(layers=4, hidden=128, intermediate=160, experts=8, heads=8, kv_heads=4, window=16, vocab=320)
# Of the model that is slow enough for delays to be of its size: a row costs more than starting operations.
SHAPE = Shape(layers=4, hidden=768, intermediate=768, experts=16, vocab=2000)
DEMO = resolve("demo")
TOKENS = 100
BEAT_BYTES = 13  # a sign of life, which comes without tokens as well
FOUR = 4
# The prompt for the whole model, and how many tokens follow.
WHOLE = (prompt(5, 4, 2000), 3)


def local(folder: Path, dtype: str | None = None, *, unpacked: bool = True) -> LocalRunner:
    """The model in one process; unpacked: its matrices in memory as a group with much room has them."""
    checkpoint = Checkpoint(folder, dtype)
    if unpacked:
        checkpoint.unpacked = plan_experts(checkpoint, "all", 1 << 40, 0).unpacked
    return LocalRunner(read_model(checkpoint), interleaved=checkpoint.layout.interleaved)


def decode(runner: ModelRunner, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens after a prompt, and the seconds of each."""
    cache, fed, found, seconds = runner.make_cache(), tokens, list[int](), list[float]()
    for _ in range(count):
        started = time.perf_counter()
        logits = runner.forward(mx.array(fed, mx.int32), [(len(fed), cache)], [len(fed) - 1], awaited=True)
        assert logits is not None
        fed = np.array(mx.argmax(logits, axis=-1)).tolist()
        seconds.append(time.perf_counter() - started)
        found += fed
    return found, seconds[1:]


def requests(count: int) -> bool:
    """Mixed requests, one forward at a time and one on every rank, each against itself alone."""
    one, right = local(DEMO), True
    for ranks in (2, 3, 4):
        for drafters in (None, PromptLookup):
            options = {"budget": 4 << 20, "chunk": 64, "max_running": 6, "drafters": drafters}
            with pipeline(DEMO, ranks) as runner:
                made = Scheduler(runner, **options)  # type: ignore[arg-type]
                clients = Script(made, ranks).run(count // 2)
                counts = made.counters
            same = sum(_same(one, client) for client in clients)
            right &= same == len(clients)
            print(
                f"{ranks} ranks, {'drafts' if drafters else 'plain'}: {same} of {len(clients)} requests as "
                f"alone; {counts.forwards} forwards, {counts.cached_tokens} tokens from prefixes, "
                f"{counts.preempted} preempted, {counts.cancelled} cancelled, "
                f"{counts.accepted_tokens} guesses right"
            )
    return right


def tensor_parts(count: int) -> bool:
    """A part of every layer on each host: logits, mixed requests, and the CPU of parts that wait."""
    right = True
    with tempfile.TemporaryDirectory() as made_up:
        random = write_checkpoint(Path(made_up), PARTED)
        for hosts in (2, 3, 4):
            worst = max(_difference(folder, hosts) for folder in (DEMO, random))
            # More parts than cores spin against each other.
            same, asked, idle = _mixed_parts(hosts, count if hosts == 2 else count // 10)
            right &= same == asked and worst <= 1e-5 and idle < 0.02
            print(
                f"{hosts} hosts: {same} of {asked} requests as alone; logits of the demo and of a random "
                f"model differ by {worst:.1e} of their scale at most; waiting: {100 * idle:.2f} % of a core"
            )
    return right


def _difference(folder: Path, hosts: int) -> float:
    """The largest difference of logits from one process, relative to their scale."""
    one = local(folder)
    tokens = prompt(hosts, 60, one.vocab_size)
    with tensor(folder, hosts) as runner:
        found = _logits(runner, tokens)
    wanted = _logits(one, tokens)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _mixed_parts(hosts: int, count: int) -> tuple[int, int, float]:
    """How many of mixed requests get the tokens that they get alone, of how many; a waiting part's CPU."""
    with tensor(DEMO, hosts) as runner:
        made = Scheduler(runner, budget=4 << 20, chunk=64, max_running=6)
        clients = Script(made, hosts).run(count)
        pids = [int(member.facts["pid"]) for member in runner.session.members]
        before, seconds = sum(map(_cpu, pids)), 10.0
        time.sleep(seconds)
        idle = (sum(map(_cpu, pids)) - before) / seconds / hosts
    one = local(DEMO)
    return sum(_same(one, client) for client in clients), len(clients), idle


def _logits(runner: ModelRunner, tokens: list[int]) -> np.ndarray:
    """Those of a prompt at once, and of its last tokens one by one after a rewind."""
    cache = runner.make_cache()
    found = [runner.forward(mx.array(tokens), [(len(tokens), cache)])]
    at = cache.rewind(len(tokens) - 8)
    found += [runner.forward(mx.array(tokens[i : i + 1]), [(1, cache)]) for i in range(at, len(tokens))]
    return np.concatenate([np.array(logits) for logits in found if logits is not None])


def _same(one: LocalRunner, client: Client) -> bool:
    asked = client.request
    alone = Scheduler(one, budget=1 << 28, chunk=64, max_running=1)
    again = Client(
        alone, asked.prompt, asked.max_tokens, asked.params, asked.stop_ids, constraint=asked.constraint
    )
    run(alone)
    whole = client.done.finish_reason != "cancelled"
    return client.tokens == (again.tokens if whole else again.tokens[: len(client.tokens)])


def wire() -> bool:
    """Bytes that a decoded token sends, and the CPU that waiting ranks use."""
    with pipeline(DEMO, 2) as runner:
        session = runner.session
        decode(runner, prompt(1, 20, 2000), 2)
        member = session.members[0]
        assert session.back is not None
        before = (session.onward[0].sent, session.back.received, member.channel.sent)
        started = time.monotonic()
        decode(runner, prompt(2, 20, 2000)[:1], 1 + TOKENS)
        beats = BEAT_BYTES * (time.monotonic() - started) / BEAT
        after = (session.onward[0].sent, session.back.received, member.channel.sent)
        there, back, control = ((b - a) / (1 + TOKENS) for a, b in zip(before, after, strict=True))
        hops = 2 * Checkpoint(DEMO).config.hidden_size * mx.float32.size
        total = there + back + control - beats / (1 + TOKENS)
        print(
            f"a token: {there:.0f} bytes to rank 1, {back:.0f} back, {control:.0f} of orders; "
            f"{total / hops:.3f} times two hops of a hidden state ({hops} bytes)"
        )
        pid, seconds = int(member.facts["pid"]), 10.0
        used = _cpu(pid)
        time.sleep(seconds)
        idle = (_cpu(pid) - used) / seconds
        print(f"waiting: {100 * idle:.2f} % of a core")
    return total <= 1.1 * hops and idle < 0.02


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def away(folder: Path, seconds: float) -> Iterator[tuple[PipelineRunner, Delay]]:
    """Two ranks with a core each, the other one so far away, each way, or as far as is said then."""
    checkpoint = Checkpoint(folder)
    hosts = [Host("localhost", (HERE,)), Host(THERE, (THERE,))]
    with delayed(seconds) as far, closing(Group(hosts, lambda host: StarterThere(), PATIENT)) as group:
        plan = spread(checkpoint, group.gather(), 1 << 26, 0, None)
        source = Source.of(str(folder), folder, offline=True)
        runner = load_spread(lambda job: job(), group, checkpoint, plan, source, (None, None))
        for process, core in ((os.getpid(), 0), (int(group.members[0].facts["pid"]), 1)):
            for thread in Path(f"/proc/{process}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {core})
        yield runner, far


def delay() -> bool:
    """What a delay costs a token; and four sequences with a forward on each rank against one at a time."""
    right, tokens = True, prompt(3, 20, SHAPE.vocab)
    with tempfile.TemporaryDirectory() as made:
        folder = write_checkpoint(made, SHAPE)
        expected = decode(local(folder), tokens, TOKENS)[0]
        for seconds in (0.0, 0.001, 0.01):
            with away(folder, seconds) as (runner, far):
                decode(runner, tokens, 10)
                right &= decode(runner, tokens, TOKENS)[0] == expected
                chosen = runner.depth
                each, lost = _lost(runner, far, tokens)
                rates = {n: statistics.median(_rate(runner, n) for _ in range(3)) for n in (1, 2, FOUR)}
            gain = max(rates[2], rates[FOUR]) / rates[1]
            print(
                f"{1000 * seconds:g} ms away: {1000 * each:.2f} ms a token, {1000 * lost:.2f} more than at 0 "
                f"(two hops: {2000 * seconds:g}). {FOUR} sequences, {chosen} forwards at a time if left "
                f"alone; with {', '.join(f'{n}: {rate:.0f}' for n, rate in rates.items())} tokens/s, "
                f"{gain:.2f} times",
                flush=True,
            )
    return right


def _lost(runner: PipelineRunner, far: Delay, tokens: list[int]) -> tuple[float, float]:
    """Seconds of a token at this distance, and how many more these are than at none: in turns, as the
    machine's own speed changes by more than a hop of a millisecond.
    """
    distance, taken = far.value, dict[float, list[float]]()
    for _ in range(10):
        for far.value in (distance, 0.0):
            taken.setdefault(far.value, []).extend(decode(runner, tokens, TOKENS // 5)[1][5:])
    far.value = distance
    each = statistics.median(taken[distance])
    return each, each - statistics.median(taken[0.0])


def _rate(runner: PipelineRunner, depth: int) -> float:
    runner.hold_depth(depth)
    made = Scheduler(runner, budget=1 << 28, chunk=64, max_running=FOUR)
    for i in range(FOUR):
        Client(made, prompt(i, 4, SHAPE.vocab), TOKENS)
    for _ in range(3 * FOUR):
        made.step()
    before, started = made.counters.generated_tokens, time.perf_counter()
    run(made)
    return (made.counters.generated_tokens - before) / (time.perf_counter() - started)


def whole(folder: Path, dtype: str | None, split: Sequence[int] | None) -> bool:
    """A whole model on two ranks, after it ran in one process: bytes opened, peak memory, the output."""
    command = [sys.executable, "-m", "benchmarks.several_macs", "alone", str(folder)]
    command += [] if dtype is None else ["--dtype", dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = [int(token) for token in out.split()]
    checkpoint = Checkpoint(folder, dtype)
    sizes = {t.path: t.path.stat().st_size for t in checkpoint.tensors.values()}
    with closing(Group([Host("localhost")] * 2, patience=Patience(silence=60.0))) as group:
        shares = plan_pipeline(checkpoint, group.gather(), 1 << 27, 1 << 26, split)
        plan = Spread(shares, plan_checkpoint(checkpoint), 1 << 27)
        source = Source.of(str(folder), folder, offline=True)
        runner = load_spread(lambda job: job(), group, checkpoint, plan, source, (None, None))
        found, seconds = decode(runner, *WHOLE)
        time.sleep(2 * BEAT)  # until the other has told of itself
        facts, share = group.members[0].facts, plan.shares[1]
        opened = [int(facts["opened"]), sum(sizes[p] for p in _files(checkpoint, plan.shares[0]))]
        right = found == expected
        for rank, peak in ((1, int(facts["peak_rss"])), (0, peak_rss())):
            share, needed = plan.shares[rank], plan.loading(plan.shares[rank])
            right &= peak <= 1.05 * needed
            print(
                f"rank {rank}: layers {share.layers.start} to {share.layers.stop - 1}, files of "
                f"{gigabytes(opened[1 - rank])} of {gigabytes(sum(sizes.values()))}, peak {gigabytes(peak)}, "
                f"planned {gigabytes(needed)}: {peak / needed:.3f}"
            )
    same = "the same as in one process" if found == expected else f"{found}, alone {expected}"
    print(f"{statistics.median(seconds):.2f} s a token; output: {same}")
    return right


def _files(checkpoint: Checkpoint, share: Share) -> set[Path]:
    portion = Portion(share.layers, ends=share.rank == 0)
    return {t.path for name, t in checkpoint.tensors.items() if portion.has(checkpoint.specs[name])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["requests", "tensor", "wire", "delay", "whole", "alone"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--split")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    if args.what == "alone":  # in a process of its own, for `whole`
        print(*decode(local(args.folder, args.dtype, unpacked=False), *WHOLE)[0])
        return
    split = None if args.split is None else parse_split(args.split)
    runs: dict[str, Callable[[], bool]] = {
        "requests": lambda: requests(args.count),
        "tensor": lambda: tensor_parts(args.count),
        "wire": wire,
        "delay": delay,
        "whole": lambda: whole(args.folder, args.dtype, split),
    }
    sys.exit(0 if runs[args.what]() else 1)


if __name__ == "__main__":
    main()
