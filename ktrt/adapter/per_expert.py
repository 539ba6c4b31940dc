"""Layout a: one LoRA per expert and projection, as PEFT wrote when every expert was a module.

Keys ``…experts.E.{gate,up,down}_proj.lora_{A,B}.weight`` or the names the family has on disk
(Mixtral ``w1``, ``w3``, ``w2``); A [r, in], B [out, r]. The same without ``base_model.model.``
comes from kt_kernel's converter for sglang.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ktrt.adapter.audit import AuditRow
from ktrt.adapter.base import (
    ExpertLora,
    ExpertsSite,
    Projection,
    features,
    projections,
    stack_experts,
)
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ktrt.adapter.base import BaseModel, ExpertLoras
    from ktrt.adapter.read import AdapterTensor
    from ktrt.adapter.settings import LoraScale, LoraSettings

_NEUTRAL_NAME = re.compile(r"(?P<path>.+)\.(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj")


@dataclass(frozen=True)
class Slot:
    path: str
    expert: int
    projection: Projection


def claim(tensor: AdapterTensor, base: BaseModel) -> Slot | None:
    """The expert and projection that the tensor is for, None if it is for none."""
    target = base.names.target(f"{tensor.module}.weight")
    path, _, parameter = target.name.rpartition(".")
    site = base.site(path)
    if target.expert is not None and site is not None:
        if parameter == "down_proj":
            return Slot(path, target.expert, "down")
        if target.pieces == 2 or not site.has_gate:
            first = target.pieces == 2 and target.piece == 0
            return Slot(path, target.expert, "gate" if first else "up")
    match = _NEUTRAL_NAME.fullmatch(tensor.module)
    if match and base.site(match["path"]) is not None:
        projection = next(p for p in get_args(Projection) if p == match["projection"])
        return Slot(match["path"], int(match["expert"]), projection)
    return None


def collect(
    file: Path,
    tensors: Iterable[tuple[AdapterTensor, Slot]],
    base: BaseModel,
    settings: LoraSettings,
) -> tuple[ExpertLoras, list[AuditRow]]:
    """Stacks the tensors by layer and projection; an audit row for each tensor.

    Raises ``AdapterError`` naming the tensor, what was found and expected: an expert the base
    lacks, a wrong shape, half a pair, a rank that adapter_config.json contradicts, an expert
    without LoRA beside experts with it, DoRA.
    """
    found: dict[Slot, dict[str, AdapterTensor]] = defaultdict(dict)
    rows = []
    for tensor, slot in tensors:
        site = _check_tensor(file, tensor, slot, base)
        found[slot][tensor.part] = tensor
        acts_on = f"{slot.path}.{slot.expert}.{slot.projection}_proj"
        scale = settings.scale(tensor.module)
        rows.append(
            AuditRow(tensor.key, acts_on, tensor.part, site.layer, scale.rank, scale.scaling)
        )
    grouped: dict[tuple[str, Projection], dict[int, dict[str, AdapterTensor]]] = defaultdict(dict)
    for slot, parts in found.items():
        _check_pair(file, parts)
        grouped[slot.path, slot.projection][slot.expert] = parts
    loras: ExpertLoras = defaultdict(dict)
    for (path, projection), experts in grouped.items():
        loras[path][projection] = _stack(file, base, path, projection, experts, settings)
    return dict(loras), rows


def _check_tensor(file: Path, tensor: AdapterTensor, slot: Slot, base: BaseModel) -> ExpertsSite:
    site = base.site(slot.path)
    assert site is not None
    if slot.expert >= site.num_experts:
        raise AdapterError(
            f"{file}: {tensor.key} is for expert {slot.expert}, but {base.summary()}. The adapter "
            "was trained on another base model."
        )
    if slot.projection not in projections(site):
        raise AdapterError(
            f"{file}: {tensor.key} adapts {slot.projection}, but the experts of {site.path} have "
            f"only {' and '.join(projections(site))}. The adapter was trained on another base "
            "model."
        )
    if tensor.part not in ("lora_A", "lora_B"):
        raise AdapterError(
            f"{file}: {tensor.key}: {tensor.part} on a routed expert (DoRA or a LoRA bias) is not "
            "computed by the engine."
        )
    size_in, size_out = features(site, slot.projection)
    dim, size = (1, size_in) if tensor.part == "lora_A" else (0, size_out)
    shape = tuple(tensor.value.shape)
    if len(shape) != 2 or shape[dim] != size:
        expected = f"[rank, {size}]" if dim else f"[{size}, rank]"
        raise AdapterError(
            f"{file}: {tensor.key} has shape {list(shape)}, expected {expected}: {base.summary()}."
        )
    return site


def _check_pair(file: Path, parts: dict[str, AdapterTensor]) -> None:
    only = next(iter(parts.values()))
    if len(parts) != 2:
        other = "lora_B" if only.part == "lora_A" else "lora_A"
        raise AdapterError(f"{file}: {only.key} has no {other} beside it; the file is incomplete.")
    rank_a, rank_b = parts["lora_A"].value.shape[0], parts["lora_B"].value.shape[1]
    if rank_a != rank_b:
        raise AdapterError(
            f"{file}: {parts['lora_A'].key} has rank {rank_a}, {parts['lora_B'].key} rank {rank_b};"
            " expected the same."
        )


def _stack(
    file: Path,
    base: BaseModel,
    path: str,
    projection: Projection,
    experts: dict[int, dict[str, AdapterTensor]],
    settings: LoraSettings,
) -> ExpertLora:
    site = base.site(path)
    assert site is not None  # claim() looked it up
    missing = sorted(set(range(site.num_experts)) - set(experts))
    if missing:
        example = next(iter(experts.values()))["lora_A"].key
        raise AdapterError(
            f"{file}: {site.path}, {projection}: LoRA for {len(experts)} experts (e.g. {example}), "
            f"expected {site.num_experts}; missing experts {missing[:8]}"
            f"{'…' if len(missing) > 8 else ''}. Wrong base model, or an incomplete file."
        )
    ordered = [experts[expert] for expert in range(site.num_experts)]
    scales = [
        check_rank(file, parts["lora_A"], parts["lora_A"].module, settings) for parts in ordered
    ]
    return stack_experts(
        [(parts["lora_A"].value, parts["lora_B"].value) for parts in ordered],
        [scale.scaling for scale in scales],
    )


def check_rank(file: Path, lora_a: AdapterTensor, target: str, settings: LoraSettings) -> LoraScale:
    """The scale of ``target``; ``AdapterError`` if its A has another rank than the config says."""
    scale = settings.scale(target)
    if lora_a.value.shape[0] != scale.rank:
        raise AdapterError(
            f"{file}: {lora_a.key} has rank {lora_a.value.shape[0]}, but {settings.file} says "
            f"{scale.rank} for it (r, rank_pattern)."
        )
    return scale
