"""The internal form of an adapter, and what the adapter code needs to know of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

Projection = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class ExpertLora:
    """LoRA of one projection of all experts of one layer: ΔW_e = scaling_e · b_e · a_e.

    a [num_experts, rank, in], b [num_experts, out, rank], scaling [num_experts], all float32.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor

    def scaled_b(self) -> torch.Tensor:
        """b with the scaling folded in, in float32."""
        return self.b * self.scaling[:, None, None]


# Experts module path → projection → its LoRA.
ExpertLoras = dict[str, dict[Projection, ExpertLora]]


def stack_experts(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], scaling: Sequence[float]
) -> ExpertLora:
    """One (A [r, in], B [out, r]) and scaling per expert → the stacked form.

    Smaller ranks are zero-padded to the largest, which changes no product.
    """
    rank = max(a.shape[0] for a, _ in pairs)
    return ExpertLora(
        a=torch.stack([F.pad(a.float(), (0, 0, 0, rank - a.shape[0])) for a, _ in pairs]),
        b=torch.stack([F.pad(b.float(), (0, rank - b.shape[1])) for _, b in pairs]),
        scaling=torch.tensor(scaling, dtype=torch.float32),
    )


def engine_arguments(lora: Mapping[Projection, ExpertLora]) -> dict[str, torch.Tensor | None]:
    """The keyword arguments of ``MoeLayer.set_lora``: A, and B with the scaling folded in.

    Where up has the same A as gate, ``up_a`` is None: one shrink then serves both.
    """
    arguments: dict[str, torch.Tensor | None] = {}
    for projection, part in lora.items():
        arguments[f"{projection}_a"] = part.a
        arguments[f"{projection}_b"] = part.scaled_b()
    if "gate" in lora and "up" in lora and torch.equal(lora["gate"].a, lora["up"].a):
        arguments["up_a"] = None
    return arguments


class ExpertsSite(Protocol):
    """The description of one experts module."""

    @property
    def path(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def has_gate(self) -> bool: ...
    @property
    def is_transposed(self) -> bool: ...
    @property
    def is_interleaved(self) -> bool: ...
    @property
    def first_parameter(self) -> str: ...


class Target(Protocol):
    """A parameter, or (``expert`` given) piece ``piece`` of ``pieces`` of one expert's rows."""

    @property
    def name(self) -> str: ...
    @property
    def expert(self) -> int | None: ...
    @property
    def piece(self) -> int: ...
    @property
    def pieces(self) -> int: ...


class Names(Protocol):
    """transformers' renaming of names as they are on disk."""

    def target(self, name: str) -> Target: ...


@dataclass(frozen=True)
class BaseModel:
    """The base as the adapter sees it.

    ``model`` is the plain model on the meta device, experts not replaced. ``expert_modules`` maps
    (experts path, expert, projection) to the name that one expert's Linear has on disk, which is
    what PEFT saw when every expert was a module of its own.
    """

    model: nn.Module
    experts: Sequence[ExpertsSite]
    names: Names
    expert_modules: Mapping[tuple[str, int, Projection], str]

    def site(self, path: str) -> ExpertsSite | None:
        """The experts module of this path, if it is one."""
        return next((site for site in self.experts if site.path == path), None)

    def summary(self) -> str:
        """The sizes that an adapter must fit, for error messages."""
        layers = [site.layer for site in self.experts]
        site = self.experts[0]
        return (
            f"the base has MoE layers {min(layers)} to {max(layers)} with {site.num_experts} "
            f"experts, hidden_size {site.hidden_size}, expert intermediate_size "
            f"{site.intermediate_size}"
        )


def projections(site: ExpertsSite) -> tuple[Projection, ...]:
    """The projections that an expert has."""
    return ("gate", "up", "down") if site.has_gate else ("up", "down")


def features(site: ExpertsSite, projection: Projection) -> tuple[int, int]:
    """(in, out) of one expert's projection."""
    if projection == "down":
        return site.intermediate_size, site.hidden_size
    return site.hidden_size, site.intermediate_size
