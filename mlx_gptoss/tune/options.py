"""What a training run may be told, with defaults that work."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlx_gptoss.errors import TuneError
from mlx_gptoss.files import read_limited
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.low_rank import ATTENTION, PARTS, ROUTER

OPTIMIZERS = ("adamw", "muon")
METHODS = ("sft", "dpo")
MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class TuneOptions:
    """How an adapter is trained.

    rank, scale: of the low-rank parts; what they add is multiplied by `scale`. parts: "attention",
    "attention+router", "all" (experts too) or names such as "q_proj,v_proj". layers: "all", "last:N", or
    numbers such as "4,5,8-11". tokens: in one forward and backward, at most. accumulate: forwards a step.
    epochs, steps: how long; steps, when given, counts alone. lr: the highest, after `warmup` (a share of the
    steps), falling as a cosine. valid: a file, a share such as "5%" or "none"; every: steps from one
    validation to the next (default: a tenth of all, at least 5). patience: validations without gain before it
    stops, 0 for never. keep: a file of examples that must not be forgotten. method: "sft" learns the
    assistant's messages, "dpo" to prefer one answer to another, `beta` times as much as the base; `anchor`:
    how much the preferred one's own likelihood counts beside that, 0 for plain DPO. stream: read each layer
    from disk when it is needed. skip_long: leave out examples longer than `tokens`. samples: answers to write
    at each validation.
    """

    rank: int = 16
    scale: float = 2.0
    parts: str = "attention"
    layers: str = "all"
    tokens: int = 2048
    accumulate: int = 1
    lr: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    epochs: float = 2
    steps: int | None = None
    valid: str | None = None
    every: int | None = None
    patience: int = 3
    keep: str | None = None
    seed: int = 0
    method: str = "sft"
    beta: float = 0.1
    anchor: float = 0.2
    stream: bool = False
    skip_long: bool = False
    samples: int = 2

    def __post_init__(self) -> None:
        whole: Mapping[str, int] = {
            "rank": 1,
            "tokens": 8,
            "accumulate": 1,
            "patience": 0,
            "seed": 0,
            "samples": 0,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            self._check(name, isinstance(value, int) and value >= least, f"a whole number >= {least}")
        for name in ("steps", "every"):
            value = getattr(self, name)
            self._check(name, value is None or (isinstance(value, int) and value >= 1), "a whole number >= 1")
        positive = ("scale", "lr", "epochs", "beta", "clip")
        for name in positive:
            self._check(name, 0 < getattr(self, name) < 1e6, "a number above 0")
        self._check("anchor", 0 <= self.anchor < 1e6, "a number, 0 or above")
        self._check("warmup", 0 <= self.warmup < 1, "a share from 0 to 1")
        self._check("weight_decay", 0 <= self.weight_decay < 1, "a number from 0 to 1")
        self._check("optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS))
        self._check("method", self.method in METHODS, " or ".join(METHODS))
        self.part_names()

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise TuneError(f"{name} is {getattr(self, name)!r}: expected {expected}")

    def part_names(self) -> tuple[str, ...]:
        """The parts to adapt, in order. Raises TuneError for an unknown one."""
        groups = {"attention": ATTENTION, "attention+router": (*ATTENTION, ROUTER), "all": PARTS}
        names = groups.get(self.parts) or tuple(re.split(r"[,\s]+", self.parts.strip()))
        for name in names:
            if name not in PARTS:
                raise TuneError(
                    f"parts is {self.parts!r}: expected attention, attention+router, all, or some of "
                    f"{', '.join(PARTS)}"
                )
        return tuple(name for name in PARTS if name in names)

    def layer_numbers(self, config: ModelConfig) -> list[int]:
        """The layers to adapt. Raises TuneError for what the model does not have."""
        count, chosen = config.num_layers, set[int]()
        if self.layers == "all":
            return list(range(count))
        if found := re.fullmatch(r"last:(\d+)", self.layers):
            chosen = set(range(max(0, count - int(found[1])), count))
        elif re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", self.layers):
            for span in self.layers.split(","):
                first, _, last = span.partition("-")
                chosen.update(range(int(first), min(int(last or first), count) + 1))
        if not chosen or max(chosen) >= count:
            raise TuneError(
                f"layers is {self.layers!r}: expected all, last:N, or numbers from 0 to {count - 1} such as "
                f"4,5,8-11"
            )
        return sorted(chosen)


def _keys(value: Any) -> str:
    return ",".join(dict.fromkeys(_PART_OF_KEY.get(key, key.rpartition(".")[2]) for key in value))


_PART_OF_KEY = {f"mlp.experts.{half}_proj": "gate_up_proj" for half in ("gate", "up")}
# mlx-lm's names of settings -> ours, and how their values are read.
_MLX_LM: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "iters": ("steps", int),
    "learning_rate": ("lr", float),
    "num_layers": ("layers", lambda n: "all" if n in (-1, None) else f"last:{n}"),
    "steps_per_eval": ("every", int),
    "grad_accumulation_steps": ("accumulate", int),
    "seed": ("seed", int),
    "optimizer": ("optimizer", lambda name: "adamw" if name == "adam" else name),
}
_OTHER = ("model", "data", "adapter_path")
# What mlx-lm's files also say and what needs nothing here.
_IGNORED = {
    *("train", "test", "fine_tune_type", "mask_prompt", "grad_checkpoint", "steps_per_report", "save_every"),
    *(
        "val_batches",
        "test_batches",
        "resume_adapter_file",
        "config",
        "lr_schedule",
        "report_to",
        "project_name",
    ),
}


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file of settings, ours or mlx-lm's: (fields of TuneOptions, model, data and adapter_path).

    Raises TuneError for an unknown key, or for what mlx-lm's tuner does and this one does not.
    """
    import yaml

    try:
        content = yaml.safe_load(read_limited(path, MAX_CONFIG))
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TuneError(f"{path}: not YAML ({error})") from None
    if not isinstance(content, dict):
        raise TuneError(f"{path}: expected settings, a line each, such as `rank: 16`")
    own, settings, other = {f.name for f in fields(TuneOptions)}, dict[str, Any](), dict[str, str]()
    if content.get("fine_tune_type", "lora") != "lora":
        raise TuneError(f"{path}: fine_tune_type is {content['fine_tune_type']!r}: expected lora")
    for key, value in content.items():
        try:
            if key in _MLX_LM:
                name, read = _MLX_LM[key]
                settings[name] = read(value)
            elif key in own:
                settings[key] = value
            elif key in _OTHER:
                other[key] = str(value)
            elif key == "lora_parameters":
                settings |= {name: value[name] for name in ("rank", "scale") if name in value}
                if value.get("keys"):
                    settings["parts"] = _keys(value["keys"])
                if value.get("dropout"):
                    raise TuneError(
                        f"{path}: dropout is {value['dropout']!r}: there is none here, expected 0"
                    )
            elif key == "max_seq_length":
                settings["tokens"] = int(value) * int(content.get("batch_size", 1))
            elif key not in _IGNORED and key != "batch_size":
                raise TuneError(f"{path}: unknown setting {key!r}: expected {', '.join(sorted(own))}")
        except (TypeError, ValueError, AttributeError):
            raise TuneError(f"{path}: {key} is {value!r:.80}, which cannot be used") from None
    return settings, other
