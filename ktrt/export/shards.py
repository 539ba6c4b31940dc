"""Writes safetensors files tensor by tensor; memory holds one block of one tensor.

File format: https://github.com/huggingface/safetensors: the header's length (8 bytes, little
endian), a JSON header, the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16,
    "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
_ALIGNMENT = 8


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write. ``dtype`` in safetensors' words; ``blocks`` yields its values in order, in
    one or more blocks of that dtype. ``changed``: differs from the source."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]
    changed: bool = False

    @property
    def nbytes(self) -> int:
        """Returns the bytes in the file. Raises ``CheckpointError`` for an unknown dtype."""
        if self.dtype not in _BITS:
            raise CheckpointError(
                f"{self.name} has dtype {self.dtype}, expected one of {', '.join(_BITS)}."
            )
        return prod(self.shape) * _BITS[self.dtype] // 8


def write_shard(
    path: Path, tensors: Sequence[OutputTensor], advance: Callable[[float], object]
) -> None:
    """Writes one file and waits until it is on disk; calls ``advance`` with written bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide elements first, like safetensors itself, which keeps each one aligned.
    ordered = sorted(tensors, key=lambda tensor: -_BITS.get(tensor.dtype, 0))
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for block in tensor.blocks():
                written += file.write(_bytes(block))
                advance(block.nbytes)
            if written != tensor.nbytes:
                raise CheckpointError(
                    f"{tensor.name}: wrote {written} bytes, expected {tensor.nbytes} for "
                    f"{tensor.dtype} {list(tensor.shape)}. This is a defect in ktrt."
                )
        file.flush()
        os.fsync(file.fileno())


def write_index(path: Path, files: Mapping[str, Sequence[OutputTensor]]) -> None:
    """Writes the index of several files: tensor → file, and the total of bytes."""
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_synced(path, json.dumps(index, indent=2) + "\n")


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and waits until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _bytes(block: torch.Tensor) -> Any:
    """Returns the bytes as a buffer, without a copy."""
    return block.contiguous().reshape(-1).view(torch.uint8).numpy()
