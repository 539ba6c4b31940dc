"""The internal form of an adapter, and the adapter's view of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F

from ktrt.engine.formats import STRIP_ROWS, round_up
from ktrt.experts.spec import Projection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from ktrt.experts.spec import ExpertsSpec
_BLOCK_RANKS = 16


@dataclass(frozen=True)
class ExpertLora:
    """LoRA of one projection of all experts of one layer: ΔW_e = scaling_e · b_e · a_e.

    a [num_experts, rank, in], b [num_experts, out, rank], scaling [num_experts], all float32. A
    matrix that the experts share is stored once, as an ``expand`` view with first stride 0.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor

    def scaled_b(self) -> torch.Tensor:
        """Returns b times the scaling, in float32; still one copy if the experts share it."""
        if is_shared(self.b) and bool((self.scaling == self.scaling[0]).all()):
            return (self.b[:1] * self.scaling[0]).expand_as(self.b)
        return self.b * self.scaling[:, None, None]


# Experts module path → projection → its LoRA.
ExpertLoras = dict[str, dict[Projection, ExpertLora]]


def is_shared(stack: torch.Tensor) -> bool:
    """Returns whether the experts of this stack [num_experts, …] share one memory."""
    return stack.shape[0] > 1 and stack.stride(0) == 0


def stack_experts(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], scaling: Sequence[float]
) -> ExpertLora:
    """Stacks one (A [r, in], B [out, r]) and scaling per expert.

    Pads smaller ranks with zeros to the largest, which changes no product. Stores a tensor object
    that is the same for every expert once.
    """
    rank = max(a.shape[0] for a, _ in pairs)

    def stack(matrices: list[torch.Tensor], size: Callable[[torch.Tensor], list[int]]) -> Any:
        shared = all(matrix is matrices[0] for matrix in matrices)
        each = [F.pad(m.float(), size(m)) for m in matrices[: 1 if shared else None]]
        return each[0].expand(len(matrices), -1, -1) if shared else torch.stack(each)

    return ExpertLora(
        a=stack([a for a, _ in pairs], lambda a: [0, 0, 0, rank - a.shape[0]]),
        b=stack([b for _, b in pairs], lambda b: [0, rank - b.shape[1]]),
        scaling=torch.tensor(scaling, dtype=torch.float32),
    )


def split_first(site: ExpertsSpec, lora: ExpertLora) -> dict[Projection, ExpertLora]:
    """Splits LoRA of the first parameter, b [num_experts, rows, rank] in the order of its rows,
    into LoRA of its projections with one A."""
    parts = site.split(lora.b, dim=1)
    return {projection: ExpertLora(lora.a, b, lora.scaling) for projection, b in parts.items()}


def _up_reads_gates_a(lora: Mapping[Projection, ExpertLora]) -> bool:
    return "gate" in lora and "up" in lora and torch.equal(lora["gate"].a, lora["up"].a)


def engine_arguments(lora: Mapping[Projection, ExpertLora]) -> dict[str, torch.Tensor | None]:
    """Returns the keyword arguments of ``MoeLayer.load_lora``: A, and B times the scaling.

    If up has the same A as gate, ``up_a`` is None: one shrink then serves both. A matrix that the
    experts share has stride 0; the engine packs a copy for each expert.
    """
    arguments: dict[str, torch.Tensor | None] = {}
    for projection, pair in lora.items():
        arguments[f"{projection}_a"] = pair.a
        arguments[f"{projection}_b"] = pair.scaled_b()
    if _up_reads_gates_a(lora):
        arguments["up_a"] = None
    return arguments


def engine_numel(lora: Mapping[Projection, ExpertLora]) -> int:
    """Returns the count of numbers that the engine keeps of a layer's LoRA, without padding."""
    shared = lora["up"].a.numel() if _up_reads_gates_a(lora) else 0
    return sum(pair.a.numel() + pair.b.numel() for pair in lora.values()) - shared


def engine_bytes(lora: Mapping[Projection, ExpertLora]) -> int:
    """Returns the engine's bytes for a layer's LoRA, in the layout of csrc/lora/expert_lora.h: A in
    blocks of 16 ranks, gate's and up's together, B in strips of 32 rows and pairs of ranks."""
    shrinks: dict[str, tuple[int, int]] = {}  # by input: ranks and columns
    numbers = 0
    for projection, pair in lora.items():
        experts, rank, columns = pair.a.shape
        own = 0 if projection == "up" and _up_reads_gates_a(lora) else rank
        source = "down" if projection == "down" else "input"
        shrinks[source] = shrinks.get(source, (0, 0))[0] + own, columns
        numbers += experts * round_up(pair.b.shape[1], STRIP_ROWS) * round_up(rank, 2)
    for ranks, columns in shrinks.values():
        numbers += experts * round_up(ranks, _BLOCK_RANKS) * round_up(columns, STRIP_ROWS)
    return 2 * numbers


class Target(Protocol):
    """A parameter, or (with ``expert``) piece ``piece`` of ``pieces`` of one expert's rows."""

    @property
    def name(self) -> str: ...
    @property
    def expert(self) -> int | None: ...
    @property
    def piece(self) -> int: ...
    @property
    def pieces(self) -> int: ...


class Names(Protocol):
    """transformers' renaming of names on disk."""

    def target(self, name: str) -> Target: ...


@dataclass(frozen=True)
class BaseModel:
    """The adapter's view of the base.

    ``model`` is the plain model on the meta device, with transformers' experts. ``expert_modules``
    maps (experts path, expert, projection) to the name of one expert's Linear on disk, which was
    PEFT's name when every expert was a separate module. ``folder`` holds the model's files.
    """

    model: nn.Module
    experts: Sequence[ExpertsSpec]
    names: Names
    expert_modules: Mapping[tuple[str, int, Projection], str]
    folder: Path | None = None

    def site(self, path: str) -> ExpertsSpec | None:
        """Returns the experts module of this path, if it is one."""
        return self._sites.get(path)

    @cached_property
    def _sites(self) -> dict[str, ExpertsSpec]:
        """By path: looked up for every tensor, up to 140,000 of them (Kimi-K2)."""
        return {site.path: site for site in self.experts}

    def require_site(self, path: str) -> ExpertsSpec:
        """Returns the experts module of a path that came from ``site``."""
        site = self.site(path)
        assert site is not None, f"{path} is no experts module"
        return site

    def summary(self) -> str:
        """Returns the sizes that an adapter must fit, for error messages."""
        layers = [site.layer for site in self.experts]
        site = self.experts[0]
        return (
            f"the base has MoE layers {min(layers)} to {max(layers)} with {site.num_experts} "
            f"experts, hidden_size {site.hidden_size}, expert intermediate_size "
            f"{site.intermediate_size}"
        )
