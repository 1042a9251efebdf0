"""Share an adapter on the Hub: its two files and a card that says what it is for and what was measured.

The rest of a run's folder stays here: its state, and its report with samples of the data.
"""

from __future__ import annotations

from pathlib import Path

from mlx_gptoss.checkpoint.adapter import CONFIG_FILE, MLX_FILE, PEFT_FILE, Adapter, read_about
from mlx_gptoss.checkpoint.hub import is_repo_id
from mlx_gptoss.convert.card import OPENAI_LICENSE
from mlx_gptoss.convert.manifest import FileEntry
from mlx_gptoss.convert.share import SharePlan
from mlx_gptoss.convert.verify import CARD_NAME
from mlx_gptoss.errors import AdapterError, ConversionError
from mlx_gptoss.tune.state import STATE_FILE, Progress, read_progress


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG_FILE).is_file() and any((folder / n).is_file() for n in (MLX_FILE, PEFT_FILE))


def plan_adapter(
    folder: Path,
    repo_id: str,
    *,
    public: bool = False,
    license: str | None = None,
    base_model: str | None = None,
) -> SharePlan:
    """What would be sent of the adapter in a folder; `share.upload` sends it. Touches no network.

    Raises AdapterError for a folder without one, ConversionError for an id that isn't NAMESPACE/NAME, a base
    model that is not known to be on the Hub, or an unknown license.
    """
    if not is_repo_id(repo_id):
        raise ConversionError(f"{repo_id!r} is no Hub id, expected NAMESPACE/NAME such as 'someone/sql'")
    if not is_adapter(folder):
        raise AdapterError(f"{folder}: no adapter there")
    adapter = read_about(folder)
    base = base_model or adapter.about.get("base")
    if not isinstance(base, str) or not is_repo_id(base):
        raise ConversionError(
            f"the base model is {base!r}, expected a Hub id: give it with --base-model openai/gpt-oss-20b"
        )
    license = license or (OPENAI_LICENSE if base.startswith("openai/") else None)
    if license is None:
        raise ConversionError(
            f"the license of {base!r} is not known here; give it, e.g. --license apache-2.0"
        )
    progress = read_progress(folder) if (folder / STATE_FILE).is_file() else None
    card = adapter_card(adapter, progress, repo_id, base, license)
    names = [n for n in (MLX_FILE, PEFT_FILE, CONFIG_FILE) if (folder / n).is_file()]
    files = {name: FileEntry.of((folder / name).read_bytes()) for name in names}
    files[CARD_NAME] = FileEntry.of(card.encode())
    rest = sorted(p.name for p in folder.iterdir() if p.name not in files)
    return SharePlan(folder, repo_id, public, files, card, tuple(rest))


def adapter_card(adapter: Adapter, progress: Progress | None, repo_id: str, base: str, license: str) -> str:
    """README.md of an adapter. Nothing is claimed that its files do not say."""
    about = adapter.about
    front = ["---", f"license: {license}", f"base_model: {base}", "base_model_relation: adapter"]
    front += [
        "library_name: mlx",
        "pipeline_tag: text-generation",
        "tags:",
        "- mlx",
        "- gpt-oss",
        "- lora",
        "---",
    ]
    lines = [*front, "", f"# {repo_id.split('/')[-1]}", ""]
    lines.append(f"A low-rank adapter (scale {adapter.scale:g}) for [{base}](https://huggingface.co/{base}).")
    if about.get("data_sha256"):
        lines += [
            "",
            f"Trained on {about.get('examples')} examples of its author's own data (not part of this "
            f"repository; SHA-256 `{about['data_sha256']}`), {about.get('step')} steps, method "
            f"`{about.get('method')}`.",
        ]
    if progress is not None and progress.best is not None and progress.checks:
        before, after = (
            progress.checks[0],
            next(c for c in progress.checks if c["step"] == progress.best_step),
        )
        lines += ["", "| | base | with the adapter |", "|---|---:|---:|"]
        for key, title in (("valid", "loss on validation data"), ("keep", "loss on what should be kept")):
            if before.get(key) is not None:
                lines.append(f"| {title} | {before[key]:.4f} | {after[key]:.4f} |")
    lines += [
        "",
        "## Use it",
        "",
        "```",
        "pip install gptoss-mlx",
        f"mlx-gptoss chat {base} --adapter {repo_id}",
        "```",
        "",
        f"License: {license}, that of the base model.",
    ]
    return "\n".join(lines) + "\n"
