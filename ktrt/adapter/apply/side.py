"""The validated tensors of an adapter outside the routed experts, as plans hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter.files.settings import LoraScale
    from ktrt.adapter.tensors import AdapterTensor


@dataclass(frozen=True)
class TokenRows:
    """New rows of a table: row i of ``tensor`` is that of token ``indices[i]``. ``tied``: the table
    is the output layer's too, and so are its new rows."""

    tensor: AdapterTensor
    indices: tuple[int, ...]
    tied: bool


@dataclass
class TorchSide:
    """The validated tensors outside the routed experts, by the module (model's name) they act on.

    ``loras`` are PEFT's, ``routers`` go on bare weights, ``whole`` are modules_to_save, ``base``
    replaces numbers of the base itself: biases trained with LoRA, and the embeddings that PEFT
    saves too when they are a target or were resized. ``rows`` replace single tokens'; ``tables``
    has the sizes of the base's embeddings and output layer.
    """

    file: Path
    loras: dict[str, list[AdapterTensor]] = field(default_factory=dict)
    routers: dict[str, list[AdapterTensor]] = field(default_factory=dict)
    whole: dict[str, list[AdapterTensor]] = field(default_factory=dict)
    base: dict[str, list[AdapterTensor]] = field(default_factory=dict)
    rows: dict[str, TokenRows] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)
    input_table: str = ""
    scales: dict[str, LoraScale] = field(default_factory=dict)

    def tensors(self) -> list[tuple[str, AdapterTensor]]:
        """(module, tensor) of all of them."""
        groups = (self.loras, self.routers, self.whole, self.base)
        found = [
            (m, tensor) for group in groups for m, tensors in group.items() for tensor in tensors
        ]
        return found + [(module, rows.tensor) for module, rows in self.rows.items()]
