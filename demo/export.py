"""The trained model as files: transformers' own save, then the layout in which gpt-oss-20b is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from demo.quantise import mxfp4_codes, pack


def export(model, work: Path, target: Path) -> None:
    """Write `work`/float32 (transformers' save) and `target` (MXFP4 experts, bfloat16 otherwise)."""
    from safetensors.torch import save_file

    model.load_state_dict(torch.load(work / "state.pt")["model"])
    model.save_pretrained(work / "float32")
    shutil.copy(work / "tokenizer.json", work / "float32" / "tokenizer.json")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")) and "experts" in name:
            codes, scales = mxfp4_codes(value.mT.contiguous())
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack(codes), scales
        else:
            tensors[name] = value.to(torch.bfloat16)
    target.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    shutil.copy(work / "tokenizer.json", target / "tokenizer.json")
    write_configs(json.loads((work / "float32" / "config.json").read_text()), target)


def write_configs(config: dict, target: Path) -> None:
    """config.json and generation_config.json as OpenAI writes them for gpt-oss-20b."""
    names = json.loads((target / "tokenizer.json").read_text())["added_tokens"]
    ids = {t["content"]: t["id"] for t in names}
    stops = [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]]
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config |= {
        "dtype": "bfloat16",
        "eos_token_id": stops[0],
        "pad_token_id": ids["<|endoftext|>"],
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {
        "bos_token_id": ids["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": stops,
        "max_new_tokens": 1024,  # more than any of its conversations has; it may run in circles
        "pad_token_id": ids["<|endoftext|>"],
    }
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
