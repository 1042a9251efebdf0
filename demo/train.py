"""Train the demo model: transformers' GptOssForCausalLM from scratch on the generated demo world.

    pip install "gptoss-mlx[train]"
    python -m demo.train --work demo_training            # under two hours on 2 CPU cores
    python -m demo.train --work demo_training --export mlx_gptoss/demo_model

Two single-threaded processes share every batch. The work folder holds the tokenizer, `state.pt` (written
every few minutes; the same command goes on from there) and a log. The last part of the training rounds the
experts to MXFP4 and the other matrices to 4 bits in the forward pass, so that conversion costs little.
`--export` writes the checkpoint as OpenAI lays out gpt-oss-20b: MXFP4 experts, bfloat16 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import Counter
from pathlib import Path

# The matmul library of torch on CPUs makes a kernel for each new size and keeps 1,024 of them: too few here.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16384")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from demo import fast
from demo.export import export
from demo.muon import Optimizer
from demo.quantise import Rounding
from demo.world.corpus import Encoder, segments, train_tokenizer
from demo.world.mixture import sample

SEED = 20
VOCABULARY = 2048
HELD_OUT = "held out"


def config():
    """gpt-oss-20b's configuration, made small: head size, rotary embedding and layer pattern are its own."""
    from transformers import GptOssConfig

    return GptOssConfig(
        num_hidden_layers=4,
        hidden_size=192,
        intermediate_size=192,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=131072,
        initial_context_length=4096,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        attn_implementation="eager",
    )


def new_model(seed: int = SEED):
    """A freshly initialised model: residual branches start at zero, the rest at a scale Muon likes."""
    from transformers import GptOssForCausalLM

    torch.manual_seed(seed)
    model = GptOssForCausalLM(config())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            elif "bias" in name or "sinks" in name or "o_proj" in name or "down_proj" in name:
                p.zero_()
            elif "embed" in name:
                p.normal_(0, 0.5)
            elif "router" in name:
                p.normal_(0, 0.02)
            else:
                fan_in = p.shape[-2] if "experts" in name else p.shape[-1]
                p.normal_(0, 0.7 / fan_in**0.5)
        # The head is untied, and copying a rare token needs its rows to follow the embedding's. A rotated
        # copy gives one linear map that copies every token, without making each token predict itself.
        rotation = torch.linalg.qr(torch.randn(config().hidden_size, config().hidden_size)).Q
        model.lm_head.weight.copy_(0.25 * model.model.embed_tokens.weight @ rotation)
    return model


def make_optimizer(model, rank: int, world: int, muon_lr: float, adam_lr: float) -> Optimizer:
    """Muon takes the attention and expert matrices."""
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_up_proj", "down_proj")
    matrices = [p for n, p in model.named_parameters() if n.endswith(names)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return Optimizer(matrices, others, muon_lr, adam_lr, rank, world)


def batches(encoder: Encoder, rng: random.Random, tokens: int, parts: int):
    """About `tokens` tokens of fresh conversations as `parts` padded batches of rows of like length.

    Yields (ids [B, T], rows to learn [R], their targets [R], tasks and row index of each target [R]).
    """
    rows, total = [], 0
    while total < tokens:
        made = sample(rng)
        ids, mask = encoder.encode(segments(made, rng))
        rows.append((ids, mask, made.task))
        total += len(ids)
    rows.sort(key=lambda r: len(r[0]))
    bounds, target, seen = [0], total / parts, 0
    for i, (ids, _, _) in enumerate(rows):
        seen += len(ids)
        if seen >= target * len(bounds) and len(bounds) < parts and i + 1 < len(rows):
            bounds.append(i + 1)
    for start, stop in zip(bounds, [*bounds[1:], len(rows)], strict=True):
        part = rows[start:stop]
        length = (max(len(ids) for ids, _, _ in part) + 14) // 16 * 16
        x = torch.zeros(len(part), length, dtype=torch.long)
        at, targets, owner = [], [], []
        for b, (ids, mask, _) in enumerate(part):
            x[b, : len(ids) - 1] = torch.tensor(ids[:-1])
            learned = [i for i in range(1, len(ids)) if mask[i]]
            at += [b * length + i - 1 for i in learned]
            targets += [ids[i] for i in learned]
            owner += [b] * len(learned)
        yield x, torch.tensor(at), torch.tensor(targets), [t for _, _, t in part], torch.tensor(owner)


def evaluate(
    model, encoder: Encoder, rank: int, world: int, count: int, rounding
) -> dict[str, tuple[int, int]]:
    """Teacher-forced: of how many held-out conversations is every learned token the likeliest? By task."""
    rng = random.Random(f"{HELD_OUT} {rank}")
    right, seen = Counter(), Counter()
    with torch.no_grad():
        for x, at, targets, tasks, owner in batches(encoder, rng, count * 135 // world, 12):
            logits, _ = fast.logits_at(model, x, at, rounding)
            wrong = torch.zeros(len(tasks)).index_add_(0, owner, (logits.argmax(-1) != targets).float())
            for task, w in zip(tasks, wrong.tolist(), strict=True):
                seen[task] += 1
                right[task] += w == 0
    pairs = {t: (right[t], seen[t]) for t in seen}
    if world > 1:
        gathered: list = [None] * world
        dist.all_gather_object(gathered, pairs)
        pairs = {}
        for part in gathered:
            for t, (r, s) in part.items():
                a, b = pairs.get(t, (0, 0))
                pairs[t] = (a + r, b + s)
    return pairs


def schedule(done: float) -> float:
    """Learning rate as a share of its peak: flat, then linear to 3 % over the last 60 % of the training."""
    return 1.0 if done < 0.4 else max(0.03, 1 - (done - 0.4) / 0.6 * 0.97)


def train(rank: int, args: argparse.Namespace) -> None:
    """One of the data-parallel processes."""
    torch.set_num_threads(args.threads)
    if args.processes > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ["MASTER_PORT"] = str(args.port)
        dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    encoder = Encoder(args.work / "tokenizer.json")
    model = new_model()
    optimizer = make_optimizer(model, rank, args.processes, args.muon_lr, args.adam_lr)
    step, spent, state = 0, 0.0, args.work / "state.pt"
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["seconds"]
    parameters = list(model.parameters())
    if rank == 0:
        print(
            f"{sum(p.numel() for p in parameters):,} parameters, from step {step} to {args.steps}", flush=True
        )
    mean_loss, began, tokens = None, time.time(), 0
    while step < args.steps:
        done = step / args.steps
        rng = random.Random(f"train {SEED} {step} {rank}")
        rounding = Rounding() if done >= args.quantise_from else None
        loss_sum, parts = 0.0, list(batches(encoder, rng, args.tokens // args.processes, args.parts))
        learned = sum(len(t) for _, _, t, _, _ in parts)
        for x, at, targets, _, _ in parts:
            logits, balance = fast.logits_at(model, x, at, rounding)
            loss = F.cross_entropy(logits, targets, reduction="sum") / learned
            (loss + args.balance * balance / len(parts)).backward()
            loss_sum += loss.item()
            tokens += x.numel()
        average_gradients(parameters, args.processes)
        warm = min(1.0, (step + 1) / 60)
        optimizer.step(schedule(done) * warm)
        for p in parameters:
            p.grad = None
        step += 1
        mean_loss = loss_sum if mean_loss is None else 0.95 * mean_loss + 0.05 * loss_sum
        if rank == 0 and step % 25 == 0:
            rate = tokens * args.processes / (time.time() - began)
            print(
                f"step {step} loss {mean_loss:.4f} balance {balance.item():.3f} {rate:.0f} tok/s "
                f"{spent + time.time() - began:.0f} s",
                flush=True,
            )
        if step % args.save_every == 0 or step == args.steps:
            report(evaluate(model, encoder, rank, args.processes, args.held_out, rounding), step, rank)
            if rank == 0:
                seconds = spent + time.time() - began
                saved = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                }
                torch.save(saved, state.with_suffix(".new"))
                state.with_suffix(".new").replace(state)
    if args.processes > 1:
        dist.destroy_process_group()


def average_gradients(parameters, world: int) -> None:
    """Make every rank's gradient the mean over ranks."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= world
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)


def report(pairs: dict[str, tuple[int, int]], step: int, rank: int) -> None:
    """One line of held-out accuracy by task."""
    if rank == 0:
        total = sum(r for r, _ in pairs.values()) / sum(s for _, s in pairs.values())
        by_task = " ".join(f"{t} {r / s:.2f}" for t, (r, s) in sorted(pairs.items()))
        print(f"== step {step} exact {total:.3f} | {by_task}", flush=True)


def main() -> None:
    """Train, or export what was trained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for tokenizer, state and exports")
    parser.add_argument("--export", type=Path, help="write the shipped checkpoint here and stop")
    parser.add_argument("--steps", type=int, default=12500)
    parser.add_argument("--tokens", type=int, default=4800, help="tokens a step, over all processes")
    parser.add_argument("--parts", type=int, default=3, help="batches of like length in a step and process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads a process")
    parser.add_argument("--muon-lr", type=float, default=0.008)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument(
        "--balance", type=float, default=0.01, help="weight of the experts' load-balancing loss"
    )
    parser.add_argument(
        "--quantise-from", type=float, default=0.86, help="share of the steps before rounding starts"
    )
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=400, help="conversations in an evaluation")
    parser.add_argument("--port", type=int, default=29511)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(new_model(), args.work, args.export)
        return
    if not (args.work / "tokenizer.json").exists():
        train_tokenizer(args.work / "tokenizer.json", VOCABULARY, SEED, 15000)
    if args.processes == 1:
        train(0, args)
    else:
        mp.spawn(train, args=(args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
