"""What a training step will take, before anything is loaded: from the headers and the settings."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_gptoss.checkpoint.memory import MemoryPlan, gigabytes, runtime_bytes
from mlx_gptoss.errors import MemoryLimitError
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.low_rank import EXPERTS, part_sizes
from mlx_gptoss.tune.gradient import HEAD_VALUES
from mlx_gptoss.tune.options import TuneOptions

# Copies of a row of logits that the loss and its gradient hold, in float32.
HEAD_COPIES = 4
# Copies of a trainable parameter: itself, the gradient of a step and of a pack, two moments, a checkpoint.
STATES = 6
# Scores of full attention that the backward holds, of each head.
SCORES = 3


@dataclass(frozen=True)
class TuneMemory:
    """Bytes of a step: what is always there, and what its tokens take."""

    weights: int
    adapter: int
    head: int
    by_token: float
    tokens: int
    scores: int
    streamed: bool

    @property
    def total(self) -> int:
        return self.fixed + round(self.by_token * self.tokens) + self.scores

    @property
    def fixed(self) -> int:
        return self.weights + self.adapter + self.head + runtime_bytes()


def plan_tune(memory: MemoryPlan, options: TuneOptions, longest: int) -> TuneMemory:
    """The plan for a checkpoint. longest: tokens of the longest example."""
    config, width = memory.config, memory.dtype.size
    weights = memory.weights
    if options.stream:
        of_layers = sum(p.loaded for p in memory.parts if p.name not in ("embedding", "head"))
        # The layer in use, the one before it until it is freed, and what is cast while reading.
        weights = weights - of_layers + 2 * of_layers // config.num_layers + memory.transient
    pairs = 2 if options.method == "dpo" else 1
    return TuneMemory(
        weights=weights,
        adapter=4 * STATES * trainable(config, options),
        head=4 * HEAD_COPIES * max(HEAD_VALUES, 16 * config.vocab_size),
        by_token=pairs * width * (activations(config) + (config.num_layers + 4) * config.hidden_size),
        tokens=options.tokens,
        scores=SCORES * width * config.num_attention_heads * longest**2,
        streamed=options.stream,
    )


def trainable(config: ModelConfig, options: TuneOptions) -> int:
    """How many parameters the adapter has."""
    sizes, total = part_sizes(config), 0
    for name in options.part_names():
        outputs, inputs = sizes[name]
        total += options.rank * (outputs + inputs) * (config.num_experts if name in EXPERTS else 1)
    return total * len(options.layer_numbers(config))


def activations(config: ModelConfig) -> int:
    """Values a token that one layer's forward and backward hold at the same time.

    Counted from the graph: residual stream and norms; q, k, v, rotated, attended, and their gradients; for
    each expert of a token its input, the two products, the activation and its halves, and their gradients.
    """
    d, f, k = config.hidden_size, config.intermediate_size, config.experts_per_token
    q = config.num_attention_heads * config.head_dim
    qkv = q + 2 * config.num_kv_heads * config.head_dim
    return 10 * d + 6 * qkv + 4 * q + k * (4 * d + 12 * f)


def require(plan: TuneMemory, available: int, config: ModelConfig) -> None:
    """Raise MemoryLimitError, with the numbers and what would fit, when the step does not."""
    if plan.total <= available:
        return
    cures = []
    fitting = int((available - plan.fixed - plan.scores) / plan.by_token) // 64 * 64
    if fitting >= 64:
        cures.append(f"--tokens {min(fitting, plan.tokens)}")
    if not plan.streamed:
        cures.append("--stream to read layers from disk")
    cure = f"use {', or '.join(cures)}" if cures else "use a smaller or more strongly quantised model"
    raise MemoryLimitError(
        f"a step of {plan.tokens:,} tokens takes {gigabytes(plan.total)} (weights {gigabytes(plan.weights)}, "
        f"tokens {gigabytes(plan.by_token * plan.tokens + plan.scores)}) and {gigabytes(available)} are "
        f"free: {cure}",
        needed=plan.total,
        available=available,
    )
