"""The model card (README.md) of a converted folder, written from its manifest alone.

Nothing is claimed that was not recorded there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlx_gptoss.checkpoint.hub import is_repo_id
from mlx_gptoss.checkpoint.layouts import PARTS
from mlx_gptoss.checkpoint.memory import gigabytes
from mlx_gptoss.convert.manifest import Action, Manifest, Quality
from mlx_gptoss.convert.verify import part_reports
from mlx_gptoss.errors import ConversionError

OPENAI_LICENSE = "apache-2.0"  # both published checkpoints

_FORMATS: dict[Action, str] = {
    "copy": "the source's bytes, unchanged",
    "relayout": "the source's values, reordered",
    "cast": "rounded to bfloat16",
    "affine": "affine groups",
    "affine-search": "affine groups, scale and bias searched",
    "mxfp4": "MXFP4",
    "mxfp4-search": "MXFP4, scales searched",
}


def model_card(
    manifest: Manifest, repo_id: str, *, license: str | None = None, base_model: str | None = None
) -> str:
    """README.md for `repo_id`: what it is, sizes, errors, quality, how to run it, license.

    license: an identifier of the Hub; needed unless the base model is OpenAI's own. base_model: the Hub id it
    was made from; by default the manifest's source where that is a Hub id. Raises ConversionError.
    """
    base = base_model or (manifest.source.id if is_repo_id(manifest.source.id) else None)
    if base is not None and not is_repo_id(base):
        raise ConversionError(f"the base model is {base!r}, expected a Hub id like 'openai/gpt-oss-20b'")
    license = license or (OPENAI_LICENSE if base is not None and base.startswith("openai/") else None)
    if license is None:
        raise ConversionError(
            f"the license of {base or _source_name(manifest)!r} is not known here; "
            "give the Hub's name of it, e.g. --license apache-2.0"
        )
    sections = [
        _front_matter(license, base),
        f"# {repo_id.split('/')[-1]}\n",
        _what_it_is(manifest, base),
        "## What is in it\n\n" + _parts_table(manifest),
        _quality_section(manifest.quality),
        _how_to_run(repo_id, any(name.endswith(".records") for name in manifest.tensors)),
        _provenance(manifest, license),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(license: str, base: str | None) -> str:
    lines = ["---", f"license: {license}", "library_name: mlx", "pipeline_tag: text-generation"]
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    return "\n".join([*lines, "tags:", "- mlx", "- gpt-oss", "---\n"])


def _what_it_is(manifest: Manifest, base: str | None) -> str:
    source = f"[{base}](https://huggingface.co/{base})" if base else _source_name(manifest)
    if base == manifest.source.id and manifest.source.revision:
        source += f" at revision `{manifest.source.revision}`"
    total = sum(entry.bytes for entry in manifest.tensors.values())
    recipe = manifest.recipe.get("name", "custom")
    copied = {e.action for e in manifest.tensors.values() if e.part == "experts"} == {"copy"}
    experts = " The experts are the source's own MXFP4 bytes, unchanged." if copied else ""
    return (
        f"{source} for [MLX](https://github.com/ml-explore/mlx) on Apple Silicon: recipe `{recipe}`, "
        f"{gigabytes(total)} of weights.{experts}\n"
    )


def _source_name(manifest: Manifest) -> str:
    """The source's name: its Hub id, or a local folder's last part (the rest of the path is private)."""
    name = manifest.source.id
    return name if is_repo_id(name) else Path(name).name


def _parts_table(manifest: Manifest) -> str:
    """One row a part: how it is stored, its bits a weight and weights a group, size and relative error."""
    rows = [("part", "stored as", "bits", "group", "size", "relative error")]
    reports = {report.part: report for report in part_reports(manifest.tensors)}
    for part in [p for p in PARTS if p in reports] + sorted(reports.keys() - set(PARTS)):
        report = reports[part]
        formats = ", ".join(_FORMATS[action] for action in report.actions)
        error = f"{report.recorded:.2%}" if report.recorded else "exact"
        rows.append((part, formats, *_packing(manifest, part), gigabytes(report.bytes), error))
    return _table(rows) + (
        "\nThe relative error is that of the weights: root of the squared error over the squared norm.\n"
    )


def _packing(manifest: Manifest, part: str) -> tuple[str, str]:
    """Bits and group size of a part's packed weights, "4, 8" where they differ; of one without any, 16."""
    entries = [entry for entry in manifest.tensors.values() if entry.part == part]
    bits, groups = ({getattr(e, key) for e in entries} - {None} for key in ("bits", "group_size"))
    if {entry.dtype for entry in entries} == {"BF16"}:
        bits = {16}
    return ", ".join(map(str, sorted(bits))), ", ".join(map(str, sorted(groups)))


def _quality_section(quality: Quality | None) -> str:
    if quality is None:
        return ""
    rows = [
        ("measure", "value"),
        ("KL divergence, mean", f"{quality.kl:.4f} nats"),
        ("KL divergence, 99th percentile", f"{quality.kl_p99:.4f} nats"),
        ("same likeliest token", f"{quality.top1:.1%}"),
        ("perplexity, source", f"{quality.perplexity_source:.3f}"),
        ("perplexity, this model", f"{quality.perplexity:.3f}"),
    ]
    return (
        f"## Quality\n\nAgainst the source's own weights, in float32, over {quality.tokens:,} tokens of "
        f"{quality.text}:\n\n{_table(rows)}"
    )


def _how_to_run(repo_id: str, for_streaming: bool) -> str:
    command = f'mlx_lm.generate --model {repo_id} --prompt "Why is the sky blue?"'
    elsewhere = f"It also loads in mlx-lm, unchanged: `{command}`"
    if for_streaming:
        elsewhere = (
            "Each expert lies in one run of bytes, so that a Mac with less memory than the model takes reads "
            "it from its SSD when a token needs it. Only mlx-gptoss loads this form."
        )
    return f"""## Run it

```
pip install gptoss-mlx
mlx-gptoss chat {repo_id}
```

```python
import mlx_gptoss

llm = mlx_gptoss.load("{repo_id}")
print(llm.respond("Why is the sky blue?", reasoning_effort="low").text)
```

{elsewhere}
"""


def _provenance(manifest: Manifest, license: str) -> str:
    return (
        f"## Check it\n\nConverted with {manifest.tool} {manifest.tool_version}. `manifest.json` holds the "
        "SHA-256 of every file and tensor; `mlx-gptoss verify FOLDER` compares them, with `--source` the "
        f"source's bytes too.\n\nLicense: {license}, that of the base model.\n"
    )


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *body]) + "\n"
