"""Interface of an adapter layout: claim tensors by name, then collect them.

A layout is a module with the members of ``Layout``; ``ktrt.adapter.plan`` lists them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ktrt.adapter.audit import AuditRow
    from ktrt.adapter.files.settings import LoraSettings
    from ktrt.adapter.internal import BaseModel, ExpertLoras
    from ktrt.adapter.tensors import AdapterTensor

logger = logging.getLogger(__name__)

# Largest rank that the engine takes.
MAX_RANK = 256
# gate [I, H], up [I, H], down [H, I] of one MLP.
Mlp = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """The collected tensors of a layout: LoRA by experts path, extra MLPs by the path of the MoE
    block, and an audit row for each tensor."""

    experts: ExpertLoras = field(default_factory=dict)
    extra: Mapping[str, Sequence[Mlp]] = field(default_factory=dict)
    rows: Sequence[AuditRow] = ()


class Layout(Protocol):
    """One layout of tensors for routed experts.

    ``TITLE`` completes "written as …". Layouts with the same ``PROVIDES`` exclude each other.
    """

    TITLE: str
    PROVIDES: str

    def claim(self, tensor: AdapterTensor, base: BaseModel) -> Any | None:
        """Returns the tensor's target, by its name alone; None if the layout does not claim it."""

    def collect(
        self, claimed: Sequence[tuple[AdapterTensor, Any]], base: BaseModel, settings: LoraSettings
    ) -> Part:
        """Returns the internal form of all claimed tensors. Raises ``AdapterError`` with tensor,
        finding and expectation if one does not fit the base or the configuration."""


def collect_layouts(
    layouts: Sequence[Layout],
    tensors: Sequence[AdapterTensor],
    base: BaseModel,
    settings: LoraSettings,
) -> tuple[Part, list[AdapterTensor]]:
    """Sorts the tensors by layout and collects each layout; returns the union and the unclaimed
    tensors. Raises ``AdapterError`` for a tensor that two layouts claim, and for two layouts that
    provide the same."""
    claims: list[list[tuple[AdapterTensor, Any]]] = [[] for _ in layouts]
    rest = []
    for tensor in tensors:
        found = [(i, what) for i, each in enumerate(layouts) if (what := each.claim(tensor, base))]
        if len(found) > 1:
            titles = " or ".join(layouts[i].TITLE for i, _ in found)
            raise AdapterError(f"{tensor.where} can be read as {titles}; expected one layout.")
        for i, what in found:
            claims[i].append((tensor, what))
        if not found:
            rest.append(tensor)
    used: dict[str, tuple[Layout, AdapterTensor]] = {}
    together = Part()
    for layout, claimed in zip(layouts, claims, strict=True):
        if not claimed:
            continue
        first = claimed[0][0]
        other, tensor = used.setdefault(layout.PROVIDES, (layout, first))
        if other is not layout:
            raise AdapterError(
                f"{tensor.where} is {other.TITLE}, {first.where} is {layout.TITLE}; expected one "
                f"layout for {layout.PROVIDES}."
            )
        part = layout.collect(claimed, base, settings)
        together = Part(
            together.experts | part.experts,
            {**together.extra, **part.extra},
            [*together.rows, *part.rows],
        )
    return together, rest


def check_expert_part(tensor: AdapterTensor, part: str, settings: LoraSettings) -> None:
    """Raises ``AdapterError`` unless the tensor is plain LoRA on routed experts: A or B, and no
    DoRA or bias in the configuration."""
    dora = settings.use_dora or part == "lora_magnitude_vector"
    bias = settings.lora_bias or part == "lora_B.bias"
    if part in ("lora_A", "lora_B") and not dora and not bias:
        return
    what = f"{part} on a routed expert"
    if dora:
        what = (
            f"DoRA on a routed expert (use_dora is {settings.use_dora}) scales every output row of "
            "W + ΔW, and the engine, which never changes the base, has no such factor"
        )
    elif bias:
        what = f"a LoRA bias on a routed expert (lora_bias is {settings.lora_bias})"
    raise AdapterError(
        f"{tensor.where}: {what}: ktrt cannot apply it. Merge the adapter into the base with PEFT "
        "(merge_and_unload, save_pretrained) and load the result without an adapter."
    )


def check_magnitude(tensor: AdapterTensor, rank: int, scaling: float) -> None:
    """Raises ``AdapterError`` if the engine cannot hold this rank, or the scaled B in bfloat16."""
    if rank > MAX_RANK:
        raise AdapterError(
            f"{tensor.where} has rank {rank}; the engine takes ranks up to {MAX_RANK}."
        )
    largest = float(tensor.value.abs().amax()) * scaling
    if largest > torch.finfo(torch.bfloat16).max:
        raise AdapterError(
            f"{tensor.where}: times alpha/r = {scaling:g} it reaches {largest:g}, which bfloat16 "
            "cannot hold; lora_alpha in adapter_config.json cannot be right."
        )
