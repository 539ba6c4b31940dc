"""A layer's packed experts, as the engine holds them, seen as tensors to copy to a GPU."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from ktrt.engine.activation import Activation
from ktrt.engine.formats import STRIP_ROWS, format_named, padded_shape, round_up
from ktrt.experts.gpu.arithmetic import ExpertBank
from ktrt.experts.gpu.packed import unpack_expand, unpack_shrink, unpack_weights, unpacked_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ktrt.engine import MoeLayer, PackedExpand, PackedLora, PackedMatrix, PackedMemory
    from ktrt.engine.rank_masks import Owners, Weights


Projection = Literal["gate", "up", "down"]

_NO_LORA: dict[str, Any] = dict.fromkeys(("input_a", "gate_b", "up_b", "down_a", "down_b"))


@dataclass(frozen=True)
class _Matrices:
    """Rows of some experts: weights [n, rows, columns], scales and bias [n, rows]."""

    weights: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None


class LayerSource:
    """``arrays``: every array of the layer by name, uint8 [num_experts, bytes of one expert] on the
    CPU, without a copy of the engine's memory; ``memories`` the same as address and size.

    The views keep the engine's memory alive: drop the source to free it. Biases are the ones that
    the layer has now.
    """

    def __init__(self, layer: MoeLayer) -> None:
        self.num_experts = layer.num_experts
        self.hidden_size = layer.hidden_size
        self.intermediate_size = layer.intermediate_size
        self.weight_format = format_named(layer.weight_format)
        self.has_gate = layer.has_gate
        self.activation = Activation.of(layer)
        self.quantized = self.weight_format.quantizes_rows
        self._layer = layer
        self._parts = layer.packed_parts()
        self._weight_memories = {f"codes{i}": part.codes for i, part in enumerate(self._parts)}
        for i, part in enumerate(self._parts):
            if part.scales is not None:
                self._weight_memories[f"scales{i}"] = part.scales
        for projection, biases in layer.bias_views().items():
            self._weight_memories[f"{projection}_bias"] = biases
        self._loras: dict[int, PackedLora] = {}
        self._resident_bytes: int | None = None
        self.memories: dict[str, PackedMemory] = {}
        self.refresh_lora()

    def refresh_lora(self) -> bool:
        """Takes the LoRAs that the engine holds now, and which of them are active. Returns whether
        ``arrays`` have changed."""
        self.lora_version = self._layer.lora_version
        self.active: Weights = tuple((n, w) for n, w in self._layer.active_loras if w)
        views = {number: self._layer.lora_view(number) for number in self._layer.loras}
        self._loras = {number: lora for number, lora in views.items() if lora is not None}
        before, self.memories = self.memories, self._weight_memories | self._lora_memories()
        if _places(before) == _places(self.memories):
            return False
        self._resident_bytes = None
        self.arrays = {
            name: _view(memory, self.num_experts) for name, memory in self.memories.items()
        }
        return True

    @property
    def input_owners(self) -> Owners:
        """The adapters of the ranks of ``ExpertBank.input_a``."""
        loras = self._loras.items()
        return (
            *((n, lora.gate.ranks) for n, lora in loras if lora.gate.b is not None),
            *((n, lora.up.ranks) for n, lora in loras if lora.up.b is not None),
        )

    @property
    def down_owners(self) -> Owners:
        """The adapters of the ranks of ``ExpertBank.down_a``."""
        loras = self._loras.items()
        return tuple((n, lora.down.ranks) for n, lora in loras if lora.down.b is not None)

    def release(self) -> None:
        """Lets go of the engine's memory."""
        self._parts, self._loras = [], {}
        self._weight_memories, self.memories, self.arrays = {}, {}, {}

    @property
    def stale(self) -> bool:
        """Whether the engine's LoRA is no longer the one in ``arrays``."""
        return self.lora_version != self._layer.lora_version

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert with its LoRA, as they are copied."""
        return sum(array.shape[1] for array in self.arrays.values())

    def resident_bytes(self) -> int:
        """Bytes of one expert as ``bank`` unpacks it."""
        if self._resident_bytes is None:
            one = {name: array[:1].to("meta") for name, array in self.arrays.items()}
            self._resident_bytes = self.bank(one).nbytes()
        return self._resident_bytes

    def _lora_memories(self) -> dict[str, PackedMemory]:
        found: dict[str, PackedMemory | None] = {}
        for number, lora in self._loras.items():
            found |= {
                f"input_a@{number}": lora.input.a, f"down_a@{number}": lora.intermediate.a,
                f"gate_b@{number}": lora.gate.b, f"up_b@{number}": lora.up.b,
                f"down_b@{number}": lora.down.b,
            }  # fmt: skip
        return {name: memory for name, memory in found.items() if memory is not None}

    def bank(self, arrays: Mapping[str, torch.Tensor]) -> ExpertBank:
        """Row-major weights of some experts, on the device of ``arrays``: the same names, uint8
        [n, bytes of one expert] each, n experts in any order."""
        inner = _up(self.intermediate_size)
        gate_up = self._matrices(arrays, ("gate", "up") if self.has_gate else ("up",))
        down = self._matrices(arrays, ("down",))
        bank = ExpertBank(
            gate_up=gate_up.weights[:, :, : self.hidden_size],
            down=down.weights[:, :, :inner],
            gate_up_scale=gate_up.scales,
            down_scale=down.scales,
            gate_up_bias=gate_up.bias,
            down_bias=down.bias,
            has_gate=self.has_gate,
            activation=self.activation,
        )
        return self.with_lora(bank, arrays)

    def with_lora(self, bank: ExpertBank, arrays: Mapping[str, torch.Tensor]) -> ExpertBank:
        """``bank``'s weights with the present LoRAs; ``arrays``: at least ``lora_arrays``, for the
        bank's experts."""
        return replace(bank, **_NO_LORA | self._lora_fields(arrays))

    @property
    def lora_arrays(self) -> dict[str, torch.Tensor]:
        """The LoRA among ``arrays``."""
        return {n: array for n, array in self.arrays.items() if n not in self._weight_memories}

    def _matrices(
        self, arrays: Mapping[str, torch.Tensor], projections: Sequence[Projection]
    ) -> _Matrices:
        """Projections that read the same inputs, one below the other."""
        count, device = arrays["codes0"].shape[0], arrays["codes0"].device
        first = getattr(self._parts[0], projections[0])
        total = self.hidden_size if projections[0] == "down" else self.intermediate_size
        rows, columns = padded_shape(self.weight_format, total, first.columns)
        shape = (count, len(projections), rows)
        dtype = unpacked_dtype(self.weight_format)
        weights = torch.empty(*shape, columns, dtype=dtype, device=device)
        scales = torch.empty(shape, device=device) if self.quantized else None
        for side, projection in enumerate(projections):
            for i, part in enumerate(self._parts):
                matrix: PackedMatrix = getattr(part, projection)
                at = slice(matrix.first_row, matrix.first_row + _up(matrix.rows))
                own = self._scales(arrays.get(f"scales{i}"), matrix)
                codes = self._codes(arrays[f"codes{i}"], matrix)
                unpack_weights(codes, own, self.weight_format, weights[:, side, at])
                if scales is not None and own is not None:
                    scales[:, side, at] = own
        biases = [arrays.get(f"{projection}_bias") for projection in projections]
        bias = None
        if any(each is not None for each in biases):
            bias = torch.zeros(shape, device=device)
            for side, each in enumerate(biases):
                if each is not None:
                    bias[:, side] = each.view(torch.float32)
        return _Matrices(
            weights.flatten(1, 2),
            None if scales is None else scales.flatten(1),
            None if bias is None else bias.flatten(1),
        )

    def _codes(self, codes: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        size = self.weight_format.code_bytes(matrix.rows, matrix.columns)
        return codes[:, matrix.code_offset : matrix.code_offset + size]

    def _scales(self, scales: torch.Tensor | None, matrix: PackedMatrix) -> torch.Tensor | None:
        if scales is None:
            return None
        count = self.weight_format.scale_bytes(matrix.rows, matrix.columns) // 4
        return scales.view(torch.float32)[:, matrix.scale_offset : matrix.scale_offset + count]

    def _lora_fields(self, arrays: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """All adapters side by side; A of gate and up apart, even if they are the same."""
        found: dict[str, list[torch.Tensor]] = {}

        def add(number: int, lora: PackedLora, projection: str) -> None:
            down = projection == "down"
            expand: PackedExpand = getattr(lora, projection)
            if expand.b is None:
                return
            name, shrink = ("down_a", lora.intermediate) if down else ("input_a", lora.input)
            size = _up(self.intermediate_size) if down else self.hidden_size
            a = unpack_shrink(arrays[f"{name}@{number}"], shrink.ranks, shrink.columns)
            ranks = slice(expand.first_rank, expand.first_rank + expand.ranks)
            found.setdefault(f"{projection}_a", []).append(a[:, ranks, :size])
            b = unpack_expand(arrays[f"{projection}_b@{number}"], expand.rows, expand.ranks)
            found.setdefault(f"{projection}_b", []).append(b)

        for number, lora in self._loras.items():
            for projection in ("gate", "up", "down"):
                add(number, lora, projection)
        fields: dict[str, Any] = {
            name: torch.cat(found[name], dim=2) for name in found if name.endswith("_b")
        }
        if both := [*found.get("gate_a", ()), *found.get("up_a", ())]:
            fields["input_a"] = torch.cat(both, dim=1)
        if "down_a" in found:
            fields["down_a"] = torch.cat(found["down_a"], dim=1)
        return {**fields, "up_first": sum(a.shape[1] for a in found.get("gate_a", ()))}


def _places(memories: Mapping[str, PackedMemory]) -> dict[str, tuple[int, int]]:
    return {name: (memory.address, memory.nbytes) for name, memory in memories.items()}


def _up(rows: int) -> int:
    return round_up(rows, STRIP_ROWS)


def _view(memory: PackedMemory, num_experts: int) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch has no read-only tensors; nothing here writes.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8).view(num_experts, -1)
