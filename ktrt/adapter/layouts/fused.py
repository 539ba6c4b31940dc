"""Layout c: KTransformers' fused files, one tensor per layer and matrix.

``layers.L.experts.{gate,up,down}_lora_{a,b}`` in ``fused_expert_lora.safetensors``: a [E, r, in],
b [E, out, r]. The writer saves every MoE layer whole, with scaling alpha / r; rsLoRA and patterns
in adapter_config.json apply only to PEFT's tensors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ktrt.adapter.files.settings import LoraScale
from ktrt.adapter.layouts.pairs import Slot, collect_pairs
from ktrt.errors import AdapterError
from ktrt.experts.spec import PROJECTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.adapter.files.settings import LoraSettings
    from ktrt.adapter.internal import BaseModel
    from ktrt.adapter.layouts.interface import Part
    from ktrt.adapter.tensors import AdapterTensor

TITLE = "KTransformers' fused LoRA"
PROVIDES = "the LoRA of routed experts"

_KEY = re.compile(r"layers\.(?P<layer>\d+)\.experts\.(?P<projection>\w+?)_lora_(?P<part>[ab])")
_PARTS = {"a": "lora_A", "b": "lora_B"}


def claim(tensor: AdapterTensor, base: BaseModel) -> Slot | None:
    """Returns the projection of a layer, by KTransformers' names. Raises ``AdapterError`` if the
    base has no routed experts in that layer."""
    match = _KEY.fullmatch(f"{tensor.module}.{tensor.part}")
    if match is None:
        return None
    projection = next((p for p in PROJECTIONS if p == match["projection"]), None)
    if projection is None:
        return None
    sites = [site for site in base.experts if site.layer == int(match["layer"])]
    if len(sites) != 1:
        raise AdapterError(
            f"{tensor.where} is for the routed experts of layer {match['layer']}, of which the "
            f"base has {len(sites)}; {base.summary()}. The adapter was trained on another base "
            "model."
        )
    return Slot(sites[0].path, None, projection, _PARTS[match["part"]])


def collect(
    claimed: Sequence[tuple[AdapterTensor, Slot]], base: BaseModel, settings: LoraSettings
) -> Part:
    """Calls ``collect_pairs``. Raises ``AdapterError`` if a layer of the base or a matrix is
    missing."""
    found = {(slot.path, slot.projection, slot.part) for _, slot in claimed}
    for site in base.experts:
        for projection in site.projections:
            for letter, part in _PARTS.items():
                if (site.path, projection, part) not in found:
                    raise AdapterError(
                        f"{claimed[0][0].file}: layers.{site.layer}.experts.{projection}_lora_"
                        f"{letter} is missing; expected it for every MoE layer: {base.summary()}. "
                        "The file is incomplete."
                    )
    scale = LoraScale(settings.rank, settings.alpha, settings.alpha / settings.rank)
    return collect_pairs(claimed, base, settings, lambda _tensor: scale)
