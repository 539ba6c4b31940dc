"""Tensors of an adapter folder, as its files name them and before a layout claims them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Hashable, MutableMapping
    from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of ``file``.

    ``key`` is its name there; ``module`` the adapted module's name as the base or its files have
    it; ``part`` is ``lora_A``, ``lora_B``, … or the parameter's own name for a weight saved whole.
    ``trained``: the module's name in training where that was another, which patterns of the
    configuration are for.
    """

    key: str
    module: str
    part: str
    value: torch.Tensor
    file: Path
    trained: str | None = None

    @property
    def trained_module(self) -> str:
        """The module's name in training."""
        return self.module if self.trained is None else self.trained

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.file}: {self.key}"


@dataclass(frozen=True)
class Idle:
    """A tensor that changes no text, and the reason."""

    tensor: AdapterTensor
    reason: str


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder as read: ``config`` is adapter_config.json; ``file`` holds ``tensors``, but
    for those in KTransformers' files beside it. ``idle``: what is not applied, with the reason.
    ``expert_format``: of the experts in training, where a manifest says so."""

    folder: Path
    file: Path
    config: dict[str, Any]
    tensors: list[AdapterTensor]
    idle: list[Idle] = field(default_factory=list)
    expert_format: str | None = None


def put_once(
    places: MutableMapping[Any, AdapterTensor], place: Hashable, tensor: AdapterTensor
) -> None:
    """Enters the tensor; an equal copy under another name is one tensor, others are refused."""
    first = places.setdefault(place, tensor)
    if first is tensor:
        return
    if not same_values(first.value, tensor.value):
        raise AdapterError(
            f"{first.where} and {tensor.where} are both {tensor.part} of {tensor.module} and "
            "differ; expected one of them."
        )
    logger.info("%s is a copy of %s", tensor.where, first.key)


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same numbers in the same shape, of whatever dtype."""
    return one.shape == other.shape and torch.equal(one.double(), other.double())
