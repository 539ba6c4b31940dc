"""Converts LoRA pairs of routed experts to the internal form, for layouts that name a projection.

A half of a pair (A or B of one projection of one layer) is one tensor per expert, one tensor
[E, …] for all, or a tensor that all experts share: [1, …], or without that dimension. A file shares
nothing, the outer matrices (A of gate and up, B of down), or both matrices. Any other mixture is
refused, since it can only come from a damaged file.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ktrt.adapter.audit import AuditRow
from ktrt.adapter.internal import split_first, stack_experts
from ktrt.adapter.layouts.interface import Part, check_expert_part, check_magnitude
from ktrt.adapter.tensors import put_once
from ktrt.errors import AdapterError
from ktrt.experts.spec import Projection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from ktrt.adapter.files.settings import LoraScale, LoraSettings
    from ktrt.adapter.internal import BaseModel, ExpertLora, ExpertLoras
    from ktrt.adapter.tensors import AdapterTensor
    from ktrt.experts.spec import ExpertsSpec

AnyProjection = Literal[Projection, "gate_up"]


@dataclass(frozen=True)
class Slot:
    """A tensor's target; ``part`` is lora_A, lora_B or a word that is refused later. Without
    ``expert`` it is for all experts of the layer."""

    path: str
    expert: int | None
    projection: AnyProjection
    part: str

    @property
    def acts_on(self) -> str:
        expert = "" if self.expert is None else f".{self.expert}"
        return f"{self.path}{expert}.{self.projection}_proj"


@dataclass(frozen=True)
class _Half:
    """A or B of one projection: per expert, the tensor of the file and the matrix in it (the same
    object for all if ``shared``)."""

    tensors: list[AdapterTensor]
    matrices: list[torch.Tensor]
    shared: bool


def collect_pairs(
    claimed: Sequence[tuple[AdapterTensor, Slot]],
    base: BaseModel,
    settings: LoraSettings,
    scale_of: Callable[[AdapterTensor], LoraScale],
) -> Part:
    """Stacks the tensors by layer and projection; makes an audit row for each tensor.

    Raises ``AdapterError`` with tensor, finding and expectation for: an expert the base lacks, a
    wrong shape, half a pair, a rank that contradicts the configuration, LoRA on only some of the
    experts, two tensors for one place, DoRA.
    """
    rows = []
    halves: dict[tuple[str, AnyProjection], dict[str, dict[int | None, AdapterTensor]]] = {}
    for tensor, slot in claimed:
        site = _check_tensor(tensor, slot, base, settings)
        parts = halves.setdefault((slot.path, slot.projection), {"lora_A": {}, "lora_B": {}})
        put_once(parts[slot.part], slot.expert, tensor)
        scale = scale_of(tensor)
        rows.append(
            AuditRow(tensor.key, slot.acts_on, slot.part, site.layer, scale.rank, scale.scaling)
        )
    loras: ExpertLoras = defaultdict(dict)
    sharing: dict[str, AdapterTensor] = {}
    for (path, projection), parts in halves.items():
        site = base.require_site(path)
        _check_both(parts)
        a = _half(parts["lora_A"], site, projection)
        b = _half(parts["lora_B"], site, projection)
        _check_sharing(sharing, projection, a, b)
        lora = _stack(a, b, scale_of, settings)
        found: Mapping[Projection, ExpertLora] = (
            split_first(site, lora) if projection == "gate_up" else {projection: lora}
        )
        _check_once(loras[path], found, a.tensors[0])
        loras[path].update(found)
    return Part(dict(loras), rows=rows)


def _check_tensor(
    tensor: AdapterTensor, slot: Slot, base: BaseModel, settings: LoraSettings
) -> ExpertsSpec:
    site = base.require_site(slot.path)
    if slot.expert is not None and slot.expert >= site.num_experts:
        raise AdapterError(
            f"{tensor.where} is for expert {slot.expert}, but {base.summary()}. The adapter was "
            "trained on another base model."
        )
    known = site.projections
    if slot.projection not in known and not (slot.projection == "gate_up" and "gate" in known):
        raise AdapterError(
            f"{tensor.where} adapts {slot.projection}, but the experts of {site.path} have only "
            f"{' and '.join(known)}. The adapter was trained on experts of another form."
        )
    check_expert_part(tensor, slot.part, settings)
    size_in, size_out = _features(site, slot.projection)
    dim, size = (-1, size_in) if slot.part == "lora_A" else (-2, size_out)
    shape = tuple(tensor.value.shape)
    fits = len(shape) in ((2,) if slot.expert is not None else (2, 3)) and shape[dim] == size
    if not fits or (len(shape) == 3 and shape[0] not in (1, site.num_experts)):
        expected = f"rank, {size}" if dim == -1 else f"{size}, rank"
        stacked = "" if slot.expert is not None else f" or [{site.num_experts} or 1, {expected}]"
        raise AdapterError(
            f"{tensor.where} has shape {list(shape)}, expected [{expected}]{stacked}: "
            f"{base.summary()}."
        )
    return site


def _features(site: ExpertsSpec, projection: AnyProjection) -> tuple[int, int]:
    if projection == "gate_up":
        size_out, size_in = site.parameters[site.first_parameter]
        return size_in, size_out
    return site.features(projection)


def _check_both(parts: dict[str, dict[int | None, AdapterTensor]]) -> None:
    """Checks that both halves exist, for the projection and for every expert with a matrix."""
    for part, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        here, there = parts[part], parts[other]
        alone = [tensor for expert, tensor in here.items() if expert not in there]
        one_for_all = there and (None in here or None in there)
        if alone and not one_for_all:
            raise AdapterError(f"{alone[0].where} has no {other}; the file is incomplete.")


def _half(
    tensors: dict[int | None, AdapterTensor],
    site: ExpertsSpec,
    projection: AnyProjection,
) -> _Half:
    whole = tensors.get(None)
    if whole is not None and len(tensors) > 1:
        other = next(tensor for expert, tensor in tensors.items() if expert is not None)
        raise AdapterError(
            f"{whole.where} is for all experts of {site.path}, and {other.key} for one of them; "
            "expected one of the two."
        )
    if whole is not None:
        value, count = whole.value, site.num_experts
        if value.ndim == 3 and value.shape[0] == count:
            return _Half([whole] * count, list(value.unbind()), False)
        matrix = value[0] if value.ndim == 3 else value
        return _Half([whole] * count, [matrix] * count, count > 1)
    missing = sorted(set(range(site.num_experts)) - set(tensors))
    if missing:
        example = next(iter(tensors.values()))
        raise AdapterError(
            f"{example.file}: {site.path}, {projection}: LoRA for {len(tensors)} experts (e.g. "
            f"{example.key}), expected {site.num_experts}; missing experts {missing[:8]}"
            f"{'…' if len(missing) > 8 else ''}. Wrong base model, or an incomplete file."
        )
    ordered = [tensors[expert] for expert in range(site.num_experts)]
    return _Half(ordered, [tensor.value for tensor in ordered], False)


def _check_sharing(
    seen: dict[str, AdapterTensor], projection: AnyProjection, a: _Half, b: _Half
) -> None:
    """Checks that all pairs of a file share in one way; ``seen`` keeps the first of each way."""
    outer, inner = (b, a) if projection == "down" else (a, b)
    words = {(False, False): "share nothing", (True, False): "share the outer matrix",
             (True, True): "share both matrices"}  # fmt: skip
    way = words.get((outer.shared, inner.shared))
    if way is None:
        raise AdapterError(
            f"{inner.tensors[0].where} is shared by all experts, and {outer.tensors[0].key} is not;"
            " experts may share A of gate and up, B of down, or both."
        )
    seen.setdefault(way, (outer if outer.shared else inner).tensors[0])
    if len(seen) > 1:
        (first, one), (second, two) = seen.items()
        raise AdapterError(
            f"{two.where}: with it the experts {second}, but by {one.key} they {first}; expected "
            "one way for the whole adapter. The file is damaged."
        )


def _stack(
    a: _Half, b: _Half, scale_of: Callable[[AdapterTensor], LoraScale], settings: LoraSettings
) -> ExpertLora:
    scaling = []
    largest: dict[str, tuple[AdapterTensor, float]] = {}
    for tensor_a, matrix_a, tensor_b, matrix_b in zip(
        a.tensors, a.matrices, b.tensors, b.matrices, strict=True
    ):
        rank_a, rank_b = matrix_a.shape[0], matrix_b.shape[1]
        if rank_a != rank_b:
            raise AdapterError(
                f"{tensor_a.where} has rank {rank_a}, {tensor_b.key} rank {rank_b}; expected the "
                "same."
            )
        # A pattern in the configuration may name experts: use the tensor whose name does.
        scale = scale_of(tensor_b if a.shared else tensor_a)
        if rank_a != scale.rank:
            raise AdapterError(
                f"{tensor_a.where} has rank {rank_a}, but {settings.file} says "
                f"{scale.rank} for it (r, rank_pattern)."
            )
        _, before = largest.get(tensor_b.key, (tensor_b, 0.0))
        largest[tensor_b.key] = (tensor_b, max(before, scale.scaling))
        scaling.append(scale.scaling)
    for tensor, factor in largest.values():
        check_magnitude(tensor, a.matrices[0].shape[0], factor)
    return stack_experts(list(zip(a.matrices, b.matrices, strict=True)), scaling)


def _check_once(
    present: Mapping[Projection, ExpertLora],
    found: Mapping[Projection, ExpertLora],
    tensor: AdapterTensor,
) -> None:
    """Refuses gate_up together with gate or up."""
    if twice := sorted(set(present) & set(found)):
        raise AdapterError(
            f"{tensor.where}: the same layer has other LoRA of {' and '.join(twice)}; "
            "expected gate_up_proj, or gate_proj and up_proj."
        )
