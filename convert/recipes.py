"""Recipes: how many bits each part of the model gets. A recipe is a row of data; no code knows its name.

The command line imports this for its help: nothing heavy may be imported here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_gptoss.errors import ConversionError
from mlx_gptoss.model.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES

KEEP = None
"""Bits of a part that stays as the source holds it (bfloat16 in a published checkpoint)."""


@dataclass(frozen=True)
class Recipe:
    """Bits of the affine groups a part is quantised to, or KEEP; experts are "mxfp4" or "bf16".

    `group_size` weights share a scale and a bias in bfloat16: 4 bits at 64 cost 4.5 bits a weight.
    """

    name: str
    summary: str
    embedding: int | None
    attention: int | None
    head: int | None
    router: int | None = KEEP
    group_size: int = 64
    experts: str = "mxfp4"

    def bits(self, part: str) -> int | None:
        """Bits of a part of the model: embedding, attention, head or router."""
        bits: int | None = getattr(self, part)
        return bits

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"experts": self.experts, **dataclasses.asdict(self)}


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "mxfp4-q4",
            "experts verbatim, attention, embedding and head in 4 bits: the smallest and the fastest",
            embedding=4,
            attention=4,
            head=4,
        ),
        Recipe(
            "mxfp4-q8",
            "experts verbatim, attention, embedding and head in 8 bits: close to the source",
            embedding=8,
            attention=8,
            head=8,
        ),
        Recipe("mxfp4", "lossless: every value of the source", embedding=KEEP, attention=KEEP, head=KEEP),
    )
}
DEFAULT_RECIPE = "mxfp4-q4"
# Of `adapter merge` alone: nothing else is worth four times the bytes.
BFLOAT16 = Recipe(
    "bf16", "everything in bfloat16, experts too", embedding=KEEP, attention=KEEP, head=KEEP, experts="bf16"
)


def make_recipe(
    name: str = DEFAULT_RECIPE,
    *,
    embedding: int | None = None,
    attention: int | None = None,
    head: int | None = None,
    group_size: int | None = None,
) -> Recipe:
    """A recipe of the table with some values replaced, which its name says; 16 bits keeps a part as it is.

    Raises ConversionError for a name, bits or group size that does not exist.
    """
    if name not in RECIPES:
        raise ConversionError(f"recipe {name!r} does not exist, expected one of {', '.join(RECIPES)}")
    base = RECIPES[name]
    changes: dict[str, Any] = {}
    for part, bits in (("head", head), ("attention", attention), ("embedding", embedding)):
        if bits is None:
            continue
        if bits not in (*AFFINE_BITS, 16):
            choices = ", ".join(map(str, AFFINE_BITS))
            raise ConversionError(f"{part} at {bits!r} bits is not possible, expected {choices} or 16")
        changes[part] = KEEP if bits == 16 else bits
    if group_size is not None:
        if group_size not in AFFINE_GROUP_SIZES:
            raise ConversionError(f"group size {group_size!r} is not possible, expected 32, 64 or 128")
        changes["group_size"] = group_size
    changes = {key: value for key, value in changes.items() if value != getattr(base, key)}
    if not changes:
        return base
    words = [f"{key.removesuffix('_size')} {'bf16' if n is KEEP else n}" for key, n in changes.items()]
    changed = dataclasses.replace(base, name=", ".join([name, *words]), **changes)
    return dataclasses.replace(changed, summary=_summary(changed))


def _summary(recipe: Recipe) -> str:
    parts = [
        f"{part} {'as in the source' if (bits := recipe.bits(part)) is KEEP else f'in {bits} bits'}"
        for part in ("attention", "embedding", "head")
    ]
    return f"experts verbatim, {', '.join(parts)}, groups of {recipe.group_size}"
