"""Adapters on disk: mlx-lm's files and PEFT's, read and written.

mlx-lm: `adapters.safetensors` with a [inputs, r], b [r, outputs] (experts a [E, r, inputs], b [E, outputs,
r], gate and up apart) and a scale. PEFT: `adapter_model.safetensors` with lora_A [r, inputs], lora_B
[outputs, r] and alpha / r; experts as wrapped parameters (ranks of all experts in one matrix: in A the
experts are outermost, in B innermost), or one module an expert, as Unsloth's 4-bit loader has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.finite import not_finite
from mlx_gptoss.errors import AdapterError
from mlx_gptoss.files import read_limited
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.low_rank import ATTENTION, EXPERTS, PARTS, ROUTER, Pair, part_sizes

MLX_FILE, PEFT_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_model.safetensors", "adapter_config.json"
FORMATS = ("mlx-lm", "peft")
MAX_CONFIG = 1 << 20

_PATHS = {
    **{name: f"self_attn.{name}" for name in ATTENTION},
    ROUTER: "mlp.router",
    **{name: f"mlp.experts.{name}" for name in EXPERTS},
}
_NAMES = {path: name for name, path in _PATHS.items()}
_HALVES = ("gate_proj", "up_proj")
_MLX_KEY = re.compile(r"(?:model\.)?layers\.(\d+)\.([\w.]+)\.lora_(a|b)")
_PEFT_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d+)\.([\w.]+?)\.lora_(A|B)(?:\.default)?(?:\.weight)?"
)
_PER_EXPERT = re.compile(r"mlp\.experts\.(gate_up|down)_projs\.(\d+)")
# PEFT nests a wrapper for each parameter of the experts; either may be the outer one.
_WRAPPED = ("mlp.experts", "mlp.experts.base_layer")

Parts = dict[int, dict[str, Pair]]


@dataclass(frozen=True)
class Adapter:
    """Low-rank parts by layer and name (see low_rank.PARTS), and their scale: y += scale * x @ a.T @ b.T.

    about: what the file says of itself: `base` (the model it was made for), and what made it.
    """

    parts: Parts
    scale: float
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a part."""
        return max(pair.rank for _, _, pair in self.pairs())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts that it has in any layer."""
        return tuple(n for n in PARTS if any(n in parts for parts in self.parts.values()))

    @property
    def parameters(self) -> int:
        return sum(pair.a.size + pair.b.size for _, _, pair in self.pairs())

    @property
    def nbytes(self) -> int:
        return sum(pair.a.nbytes + pair.b.nbytes for _, _, pair in self.pairs())

    def digest(self) -> str:
        """SHA-256 (hex) of what it does: its parts and the scale, whatever file they came from."""
        digest = hashlib.sha256(f"{self.scale!r}".encode())
        for layer, name, pair in self.pairs():
            for array in (pair.a, pair.b):
                digest.update(f"{layer} {name} {array.shape}".encode())
                digest.update(np.ascontiguousarray(np.asarray(array.astype(mx.float32))).data)
        return digest.hexdigest()

    def pairs(self) -> Iterator[tuple[int, str, Pair]]:
        """Layer, name and pair of every part, in order."""
        for layer in sorted(self.parts):
            for name in PARTS:
                if name in self.parts[layer]:
                    yield layer, name, self.parts[layer][name]


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """The adapter in a folder, of either format, checked against the model's shape.

    Raises AdapterError when it is none, of a kind that is not known here, or of another model.
    """
    peft = (folder / PEFT_FILE).is_file()
    if not peft and not (folder / MLX_FILE).is_file():
        raise AdapterError(f"{folder}: no adapter there: expected {MLX_FILE} (mlx-lm) or {PEFT_FILE} (PEFT)")
    about = _read_config(folder / CONFIG_FILE)
    file = folder / (PEFT_FILE if peft else MLX_FILE)
    try:
        tensors = mx.load(str(file), format="safetensors")
    except RuntimeError as error:
        raise AdapterError(f"{file}: not readable ({error}): download or copy it again") from None
    assert isinstance(tensors, dict)
    mx.eval(list(tensors.values()))
    adapter = (_from_peft if peft else _from_mlx)(file, tensors, about, config)
    check_shapes(adapter, config, str(file))
    if bad := not_finite(list(tensors.items())):
        raise AdapterError(
            f"{file}: {bad} holds NaN or infinity: the training failed, or the file is corrupt"
        )
    mx.eval([[pair.a, pair.b] for _, _, pair in adapter.pairs()])
    return adapter


def read_about(folder: Path) -> Adapter:
    """What an adapter says of itself, without its parts. Raises AdapterError."""
    about = _read_config(folder / CONFIG_FILE)
    if (folder / PEFT_FILE).is_file():
        return Adapter({}, _peft_scale(about, folder / CONFIG_FILE), _said(about, "base_model_name_or_path"))
    return Adapter({}, _mlx_scale(about, folder / CONFIG_FILE), _said(about, "model"))


def check_shapes(adapter: Adapter, config: ModelConfig, where: str) -> None:
    """Raise AdapterError unless every part fits the model's matrices."""
    if not adapter.parts:
        raise AdapterError(f"{where}: holds no low-rank parts")
    sizes = part_sizes(config)
    highest = max(adapter.parts)
    if highest >= config.num_layers:
        raise AdapterError(
            f"{where}: has parts for layer {highest}, and the model has {config.num_layers} layers: the "
            "adapter is for another model"
        )
    for layer, name, pair in adapter.pairs():
        outputs, inputs = sizes[name]
        lead = (config.num_experts,) if name in EXPERTS else ()
        wanted = ((*lead, pair.rank, inputs), (*lead, outputs, pair.rank))
        if (pair.a.shape, pair.b.shape) != wanted or not pair.rank:
            raise AdapterError(
                f"{where}: layers.{layer}.{name} is a {list(pair.a.shape)}, b {list(pair.b.shape)}: expected "
                f"{list(wanted[0])} and {list(wanted[1])}: the adapter is for another model"
            )


def write_adapter(folder: Path, adapter: Adapter, config: ModelConfig, *, format: str = "mlx-lm") -> None:
    """Write an adapter's two files into a folder, each whole or not at all. Raises AdapterError, OSError."""
    if format not in FORMATS:
        raise AdapterError(f"format is {format!r}: expected {' or '.join(FORMATS)}")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, about = (_to_mlx if format == "mlx-lm" else _to_peft)(adapter, config)
    tensors = {name: mx.contiguous(array) for name, array in tensors.items()}
    metadata = {"format": "pt" if format == "peft" else "mlx"}
    file = folder / (MLX_FILE if format == "mlx-lm" else PEFT_FILE)
    write_whole(file, lambda path: mx.save_safetensors(str(path), tensors, metadata))
    text = json.dumps(about, indent=2) + "\n"
    write_whole(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, and put it in its place once it is on the disk."""
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except RuntimeError as error:  # MLX's word for an OSError
        raise OSError(None, f"cannot be written ({error}): is the disk full?", str(path)) from None
    finally:
        with suppress(OSError):
            partial.unlink()


# --- mlx-lm


def _from_mlx(file: Path, tensors: Mapping[str, mx.array], about: dict[str, Any], c: ModelConfig) -> Adapter:
    kind = about.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError(f"{file.parent}: fine_tune_type is {kind!r}: expected 'lora'")
    scale = _mlx_scale(about, file.parent / CONFIG_FILE)
    found: dict[tuple[int, str], dict[str, mx.array]] = {}
    for key, array in tensors.items():
        match = _MLX_KEY.fullmatch(key)
        path = match[2] if match else ""
        name = path.rpartition(".")[2]
        of_experts = path.startswith("mlp.experts.") and name in (*_HALVES, "down_proj")
        if match is None or not (of_experts or _NAMES.get(path) in (*ATTENTION, ROUTER)):
            raise AdapterError(f"{file}: {key} is not a low-rank part of gpt-oss")
        if array.ndim != (3 if of_experts else 2):
            raise AdapterError(
                f"{file}: {key} has shape {list(array.shape)}: the adapter is for another model"
            )
        found.setdefault((int(match[1]), name), {})[match[3]] = array if of_experts else array.T
    pairs = _complete(file, found)
    parts: Parts = {}
    for layer, name in pairs:
        if name == "gate_proj" or (name == "up_proj" and (layer, "gate_proj") not in pairs):
            gate, up = pairs.get((layer, "gate_proj")), pairs.get((layer, "up_proj"))
            parts.setdefault(layer, {})["gate_up_proj"] = _interleaved(gate, up)
        elif name != "up_proj":
            parts.setdefault(layer, {})[name] = pairs[layer, name]
    return Adapter(parts, scale, _said(about, "model"))


def _interleaved(gate: Pair | None, up: Pair | None) -> Pair:
    """Gate's and up's pairs as one for rows gate, up, gate, up: ranks side by side, unless a is the same."""
    one = gate or up
    assert one is not None
    if gate is not None and up is not None and gate.a.shape == up.a.shape:
        same = mx.array_equal(gate.a, up.a).item()
    else:
        same = False
    nothing = Pair(one.a[:, :0], one.b[:, :, :0])
    gate, up = gate or nothing, up or nothing
    if same:
        rows, a = [gate.b, up.b], one.a
    else:
        a = mx.concatenate([gate.a, up.a], axis=1)
        rows = [
            mx.concatenate([gate.b, mx.zeros((*gate.b.shape[:2], up.rank), one.b.dtype)], axis=-1),
            mx.concatenate([mx.zeros((*up.b.shape[:2], gate.rank), one.b.dtype), up.b], axis=-1),
        ]
    return Pair(a, mx.stack(rows, axis=2).flatten(1, 2))


def _to_mlx(adapter: Adapter, config: ModelConfig) -> tuple[dict[str, mx.array], dict[str, Any]]:
    tensors: dict[str, mx.array] = {}
    keys = set()
    for layer, name, pair in adapter.pairs():
        paths = [_PATHS[name]]
        values = [pair]
        if name == "gate_up_proj":
            paths = [f"mlp.experts.{half}" for half in _HALVES]
            values = [Pair(pair.a, pair.b[:, start::2]) for start in (0, 1)]
        for path, value in zip(paths, values, strict=True):
            keys.add(path)
            a, b = (value.a, value.b) if name in EXPERTS else (value.a.T, value.b.T)
            tensors[f"model.layers.{layer}.{path}.lora_a"] = a
            tensors[f"model.layers.{layer}.{path}.lora_b"] = b
    about = {
        "fine_tune_type": "lora",
        "model": adapter.about.get("base"),
        "num_layers": config.num_layers - min(adapter.parts),  # mlx-lm counts from the end
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
        "mlx_gptoss": {k: v for k, v in adapter.about.items() if k != "base"},
    }
    return tensors, about


# --- PEFT


def _from_peft(file: Path, tensors: Mapping[str, mx.array], about: dict[str, Any], c: ModelConfig) -> Adapter:
    where = file.parent / CONFIG_FILE
    if about.get("peft_type", "LORA") != "LORA":
        raise AdapterError(f"{where}: peft_type is {about['peft_type']!r}: expected 'LORA'")
    for key in ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern"):
        if about.get(key):
            raise AdapterError(f"{where}: {key} is {about[key]!r:.80}: only plain LoRA parts can be read")
    if about.get("bias", "none") != "none":
        raise AdapterError(f"{where}: bias is {about['bias']!r}: only plain LoRA parts can be read")
    scale = _peft_scale(about, where)
    found: dict[tuple[int, str], dict[str, mx.array]] = {}
    alone: dict[tuple[int, str, str], dict[int, mx.array]] = {}
    wrapped: dict[tuple[int, str], dict[str, mx.array]] = {}
    for key, array in tensors.items():
        match = _PEFT_KEY.fullmatch(key)
        if match is None or array.ndim != 2:
            raise AdapterError(f"{file}: {key} is not a low-rank part of gpt-oss")
        layer, path, side = int(match[1]), match[2], match[3].lower()
        name = _NAMES.get(path)
        if one := _PER_EXPERT.fullmatch(path):
            alone.setdefault((layer, f"{one[1]}_proj", side), {})[int(one[2])] = array
        elif path in _WRAPPED:
            wrapped.setdefault((layer, path), {})[side] = _apart(array, side, c.num_experts, file, key)
        elif name in (*ATTENTION, ROUTER):
            found.setdefault((layer, name), {})[side] = array
        else:
            raise AdapterError(f"{file}: {key}: {path} is no part of gpt-oss that can be adapted")
    for (layer, name, side), of_expert in alone.items():
        if sorted(of_expert) != list(range(c.num_experts)):
            raise AdapterError(
                f"{file}: layers.{layer}.{name} has parts of {len(of_expert)} experts, the model "
                f"{c.num_experts}: the adapter is for another model"
            )
        found.setdefault((layer, name), {})[side] = mx.stack([of_expert[e] for e in range(c.num_experts)])
    pairs = _complete(file, found)
    for (layer, _), pair in _complete(file, wrapped).items():
        sizes = (pair.b.shape[1], pair.a.shape[2])
        name = "gate_up_proj" if sizes == part_sizes(c)["gate_up_proj"] else "down_proj"
        pairs[layer, name] = pair
    parts: Parts = {}
    for (layer, name), pair in pairs.items():
        parts.setdefault(layer, {})[name] = pair
    return Adapter(parts, scale, _said(about, "base_model_name_or_path"))


def _apart(array: mx.array, side: str, experts: int, file: Path, key: str) -> mx.array:
    """The experts' matrices out of PEFT's one."""
    if array.shape[0 if side == "a" else 1] % experts:
        raise AdapterError(
            f"{file}: {key} has shape {list(array.shape)}, which {experts} experts do not share: the adapter "
            "is for another model"
        )
    if side == "a":
        return array.reshape(experts, -1, array.shape[1])
    return array.reshape(array.shape[0], -1, experts).transpose(2, 0, 1)


def _to_peft(adapter: Adapter, config: ModelConfig) -> tuple[dict[str, mx.array], dict[str, Any]]:
    rank = adapter.rank  # of all: smaller parts get zeros, which change nothing
    tensors: dict[str, mx.array] = {}
    for layer, name, pair in adapter.pairs():
        prefix = f"base_model.model.model.layers.{layer}."
        widths = [(0, 0)] * (pair.a.ndim - 2)
        a = mx.pad(pair.a, [*widths, (0, rank - pair.rank), (0, 0)])
        b = mx.pad(pair.b, [*widths, (0, 0), (0, rank - pair.rank)])
        path = _PATHS[name]
        if name in EXPERTS:
            inner = name == "gate_up_proj" and "down_proj" in adapter.parts[layer]
            path = _WRAPPED[inner]
            a, b = a.flatten(0, 1), b.transpose(1, 2, 0).flatten(1, 2)
        tensors[f"{prefix}{path}.lora_A.weight"], tensors[f"{prefix}{path}.lora_B.weight"] = a, b
    names = adapter.names
    parameters = [f"mlp.experts.{n}" for n in EXPERTS if n in names]
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.about.get("base"),
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": [n for n in ATTENTION if n in names],
        "target_parameters": parameters + (["mlp.router.weight"] if ROUTER in names else []) or None,
        "layers_to_transform": sorted(adapter.parts),
        "inference_mode": True,
        "mlx_gptoss": {k: v for k, v in adapter.about.items() if k != "base"},
    }
    return tensors, about


# --- both


def _complete(file: Path, found: Mapping[Any, dict[str, mx.array]]) -> dict[Any, Pair]:
    for (layer, name), sides in found.items():
        if set(sides) != {"a", "b"}:
            raise AdapterError(f"{file}: layers.{layer}.{name} has one of its two matrices only")
    return {key: Pair(sides["a"], sides["b"]) for key, sides in found.items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(read_limited(path, MAX_CONFIG))
    except FileNotFoundError:
        raise AdapterError(f"{path}: not there: an adapter needs it beside its weights") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not JSON ({error})") from None
    if not isinstance(about, dict):
        raise AdapterError(f"{path}: expected an object")
    return about


def _number(about: object, key: str, where: str) -> float:
    value = about.get(key) if isinstance(about, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise AdapterError(f"{where}: {key} is {value!r}: expected a number above 0")
    return float(value)


def _mlx_scale(about: dict[str, Any], where: Path) -> float:
    return _number(about.get("lora_parameters"), "scale", f"{where}: lora_parameters")


def _peft_scale(about: dict[str, Any], where: Path) -> float:
    rank, alpha = _number(about, "r", str(where)), _number(about, "lora_alpha", str(where))
    return alpha / (rank**0.5 if about.get("use_rslora") else rank)


def _said(about: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Adapter.about out of adapter_config.json, where the base model stands under `base`."""
    own = about.get("mlx_gptoss")
    return {"base": about.get(base), **(own if isinstance(own, dict) else {})}
