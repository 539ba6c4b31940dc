"""Tensors of an adapter folder under their names in the files, before a layout claims them."""

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

    ``key`` is its name in the file; ``module`` the adapted module's name in the base or its files;
    ``part`` is ``lora_A``, ``lora_B``, … or the parameter's own name for a weight saved whole.
    ``trained``: the module's name in training, if different; the configuration's patterns match
    it.
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
    """The content of an adapter folder: ``config`` is adapter_config.json; ``file`` holds
    ``tensors``, except those that are in KTransformers' files. ``idle``: tensors that are not
    applied, with the reason. ``expert_format`` and ``base``: the experts' format and the base in
    training, by the manifest.
    """

    folder: Path
    file: Path
    config: dict[str, Any]
    tensors: list[AdapterTensor]
    idle: list[Idle] = field(default_factory=list)
    expert_format: str | None = None
    base: Any = None


def put_once(
    places: MutableMapping[Any, AdapterTensor], place: Hashable, tensor: AdapterTensor
) -> None:
    """Enters the tensor; ignores an equal copy under another name, refuses a different one."""
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
    """Returns whether both hold the same numbers in the same shape, in any dtype."""
    return one.shape == other.shape and torch.equal(one.double(), other.double())
