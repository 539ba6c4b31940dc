"""A layer's packed experts, as the engine holds them, seen as tensors to copy to a GPU."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.formats import (
    STRIP_ROWS,
    code_bytes,
    format_named,
    is_quantized,
    padded_shape,
    round_up,
)
from ktrt.experts.gpu.arithmetic import ExpertBank
from ktrt.experts.gpu.packed import code_dtype, unpack_codes, unpack_expand, unpack_shrink

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ktrt.engine import MoeLayer, PackedExpand, PackedLora, PackedMatrix, PackedMemory
    from ktrt.engine.rank_masks import Owners, Weights


class LayerSource:
    """``arrays``: every array of the layer by name, uint8 [num_experts, bytes of one expert] on the
    CPU, without a copy of the engine's memory; ``memories`` the same as address and size.

    The views keep the engine's memory alive: drop the source to free it.
    """

    def __init__(self, layer: MoeLayer) -> None:
        self.num_experts = layer.num_experts
        self.hidden_size = layer.hidden_size
        self.intermediate_size = layer.intermediate_size
        self.weight_format = format_named(layer.weight_format)
        self.quantized = is_quantized(self.weight_format)
        self._layer = layer
        self._parts = layer.packed_parts()
        self._weight_memories = {f"codes{i}": part.codes for i, part in enumerate(self._parts)}
        for i, part in enumerate(self._parts):
            if part.scales is not None:
                self._weight_memories[f"scales{i}"] = part.scales
        self._loras: dict[int, PackedLora] = {}
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
        return self.bank({name: array[:1] for name, array in self.arrays.items()}).nbytes()

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
        count, device = arrays["codes0"].shape[0], arrays["codes0"].device
        dtype = code_dtype(self.weight_format)
        inner, columns = padded_shape(self.weight_format, self.intermediate_size, self.hidden_size)
        outer, depth = padded_shape(self.weight_format, self.hidden_size, self.intermediate_size)
        gate_up = torch.empty(count, 2, inner, columns, dtype=dtype, device=device)
        down = torch.empty(count, outer, depth, dtype=dtype, device=device)
        gate_up_scale = torch.empty(count, 2, inner, device=device)
        down_scale = torch.empty(count, outer, device=device)
        for i, part in enumerate(self._parts):
            for matrix, codes, scale in (
                (part.gate, gate_up[:, 0], gate_up_scale[:, 0]),
                (part.up, gate_up[:, 1], gate_up_scale[:, 1]),
                (part.down, down, down_scale),
            ):
                rows = slice(matrix.first_row, matrix.first_row + _padded_rows(matrix))
                self._unpack(arrays[f"codes{i}"], matrix, codes[:, rows])
                if self.quantized:
                    scale[:, rows] = _scales(arrays[f"scales{i}"], matrix)
        return ExpertBank(
            gate_up=gate_up.flatten(1, 2)[:, :, : self.hidden_size],
            down=down[:, :, :inner],
            gate_up_scale=gate_up_scale.flatten(1) if self.quantized else None,
            down_scale=down_scale if self.quantized else None,
            **self._lora_fields(arrays),
        )

    def with_lora(self, bank: ExpertBank, arrays: Mapping[str, torch.Tensor]) -> ExpertBank:
        """``bank``'s weights with the present LoRAs; ``arrays``: at least ``lora_arrays``, for the
        bank's experts."""
        return ExpertBank(
            gate_up=bank.gate_up,
            down=bank.down,
            gate_up_scale=bank.gate_up_scale,
            down_scale=bank.down_scale,
            **self._lora_fields(arrays),
        )

    @property
    def lora_arrays(self) -> dict[str, torch.Tensor]:
        """The LoRA among ``arrays``."""
        return {n: array for n, array in self.arrays.items() if n not in self._weight_memories}

    def _unpack(self, codes: torch.Tensor, matrix: PackedMatrix, out: torch.Tensor) -> None:
        size = code_bytes(self.weight_format, *out.shape[1:])
        unpack_codes(
            codes[:, matrix.code_offset : matrix.code_offset + size], self.weight_format, out
        )

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


def _padded_rows(matrix: PackedMatrix) -> int:
    return _up(matrix.rows)


def _up(rows: int) -> int:
    return round_up(rows, STRIP_ROWS)


def _scales(scales: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    first = matrix.scale_offset
    return scales.view(torch.float32)[:, first : first + _padded_rows(matrix)]


def _view(memory: PackedMemory, num_experts: int) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch has no read-only tensors; nothing here writes.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8).view(num_experts, -1)
