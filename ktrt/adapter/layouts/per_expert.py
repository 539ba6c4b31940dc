"""Layout a: LoRA named by expert and projection; PEFT's layout when every expert was a module.

Keys ``…experts.E.{gate,up,down}_proj.lora_{A,B}.weight`` or the family's names on disk (Mixtral
``w1``, ``w3``, ``w2``); A [r, in], B [out, r]. kt_kernel's converter for sglang writes the same
without ``base_model.model.`` (f).

Without the number, ``…experts.{gate,up,down,gate_up}_proj…``, a tensor is for all experts: stacked
[E, …] by Megatron-Bridge and Tinker, or shared, [1, …] or two-dimensional, in SGLang's shared-outer
adapters.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, get_args

from ktrt.adapter.layouts.pairs import AnyProjection, Slot, collect_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.adapter.files.settings import LoraSettings
    from ktrt.adapter.internal import BaseModel
    from ktrt.adapter.layouts.interface import Part
    from ktrt.adapter.tensors import AdapterTensor

TITLE = "LoRA for each expert and projection"
PROVIDES = "the LoRA of routed experts"

_LEAF = re.compile(r"(?P<path>.+?)(?:\.(?P<expert>\d+))?\.(?P<leaf>[A-Za-z]\w*)")


def claim(tensor: AdapterTensor, base: BaseModel) -> Slot | None:
    """Returns the tensor's expert and projection; None for other tensors."""
    if not tensor.part.startswith("lora_"):
        return None
    if slot := _by_library(tensor, tensor.module, base):
        return slot
    match = _LEAF.fullmatch(tensor.module)
    if match is None:
        return None
    expert = None if match["expert"] is None else int(match["expert"])
    projection = next((p for p in get_args(AnyProjection) if match["leaf"] == f"{p}_proj"), None)
    if projection is None and expert is not None:
        return None
    path = _renamed(match["path"], base)
    if base.site(path) is None:
        return None
    if projection is not None:
        return Slot(path, expert, projection, tensor.part)
    # The family's names, looked up for the first expert.
    first = _by_library(tensor, f"{match['path']}.0.{match['leaf']}", base)
    return first and Slot(path, None, first.projection, tensor.part)


def _by_library(tensor: AdapterTensor, module: str, base: BaseModel) -> Slot | None:
    """Returns the target that transformers gives one expert's weight of this name."""
    target: Any = base.names.target(f"{module}.weight")
    path, _, parameter = target.name.rpartition(".")
    site = base.site(path)
    if target.expert is None or site is None:
        return None
    if parameter == "down_proj":
        return Slot(path, target.expert, "down", tensor.part)
    if target.pieces == 2 or not site.has_gate:
        first = target.pieces == 2 and target.piece == 0
        return Slot(path, target.expert, "gate" if first else "up", tensor.part)
    return None


def _renamed(path: str, base: BaseModel) -> str:
    """Returns the experts module in the model's names."""
    renamed = base.names.target(f"{path}.down_proj").name.removesuffix(".down_proj")
    return renamed if base.site(path) is None else path


def collect(
    claimed: Sequence[tuple[AdapterTensor, Slot]], base: BaseModel, settings: LoraSettings
) -> Part:
    """Calls ``collect_pairs``; rank and alpha patterns apply to the names in the file."""
    return collect_pairs(
        claimed, base, settings, lambda tensor: settings.scale(tensor.trained_module)
    )
