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

    from ktrt.engine import MoeLayer, PackedMatrix, PackedMemory


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
        self.refresh_lora()

    def refresh_lora(self) -> None:
        """Takes the LoRA that the engine has now."""
        self.lora_version = self._layer.lora_version
        self._lora = self._layer.packed_lora()
        self.memories = self._weight_memories | self._lora_memories()
        self.arrays = {
            name: _view(memory, self.num_experts) for name, memory in self.memories.items()
        }

    def release(self) -> None:
        """Lets go of the engine's memory."""
        self._parts, self._lora = [], None
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
        if (lora := self._lora) is None:
            return {}
        shrinks = {"input_a": lora.input.a, "down_a": lora.intermediate.a}
        expands = {"gate_b": lora.gate.b, "up_b": lora.up.b, "down_b": lora.down.b}
        found = (shrinks | expands).items()
        return {name: memory for name, memory in found if memory is not None}

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
        """``bank``'s weights with the present LoRA; ``arrays``: at least ``lora_arrays``, for the
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
        if (lora := self._lora) is None:
            return {}
        shrinks = {"input_a": lora.input, "down_a": lora.intermediate}
        expands = {"gate_b": lora.gate, "up_b": lora.up, "down_b": lora.down}
        sizes = {"input_a": self.hidden_size, "down_a": _up(self.intermediate_size)}
        tensors = {
            name: unpack_shrink(arrays[name], shrink.ranks, shrink.columns)[:, :, : sizes[name]]
            for name, shrink in shrinks.items()
            if name in arrays
        }
        tensors |= {
            name: unpack_expand(arrays[name], expand.rows, expand.ranks)
            for name, expand in expands.items()
            if name in arrays
        }
        for name, shrink in (("input", lora.input), ("down", lora.intermediate)):
            if shrink.factors is not None and f"{name}_a" in tensors:
                a = tensors[f"{name}_a"]
                row = torch.tensor(shrink.factors, device=a.device)
                tensors[f"{name}_factor"] = row.repeat(a.shape[0], 1, 1)
        return {**tensors, "gate_first": lora.gate.first_rank, "up_first": lora.up.first_rank}


def _padded_rows(matrix: PackedMatrix) -> int:
    return _up(matrix.rows)


def _up(rows: int) -> int:
    return round_up(rows, STRIP_ROWS)


def _scales(scales: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    first = matrix.row_offset
    return scales.view(torch.float32)[:, first : first + _padded_rows(matrix)]


def _view(memory: PackedMemory, num_experts: int) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch has no read-only tensors; nothing here writes.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8).view(num_experts, -1)
