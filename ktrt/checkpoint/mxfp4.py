"""MXFP4 matrices (OCP Microscaling Formats v1.0): E2M1 codes in blocks of 32 columns, each with a
power of two (E8M0).

Layouts: gpt-oss's stacks ``_blocks`` and ``_scales``; DeepSeek-V4's ``weight`` and ``scale``;
compressed-tensors' mxfp4-pack-quantized ``weight_packed`` and ``weight_scale``. All hold the
first of two codes in a byte's low half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ktrt.checkpoint.codes import E2M1, GROUPS, Codes
from ktrt.checkpoint.stored import QuantizedTensor
from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.checkpoint.stored import StoredTensor

_BLOCK = GROUPS["mxfp4"]
_VALUES = torch.tensor(E2M1, dtype=torch.float32)
# Byte → its two values, in half the time of two look-ups.
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=1)
# E8M0 is a byte; torch and safetensors also have a dtype for it.
SCALE_DTYPES = ("U8", "F8_E8M0")


class Mxfp4Tensor(QuantizedTensor):
    """MXFP4 codes of matrices [..., n, k]; ``codes`` [..., n, k / 2] or in blocks
    [..., n, k / 32, 16], ``scales`` [..., n, k / 32].

    ``transposed``: read as [..., k, n], as transformers keeps gpt-oss's parameters.
    """

    def __init__(
        self, codes: StoredTensor, scales: StoredTensor, *, transposed: bool = False
    ) -> None:
        *outer, n, groups = scales.shape
        k = _BLOCK * groups
        super().__init__(codes.file, (*outer, k, n) if transposed else (*outer, n, k))
        self._codes, self._scales = codes, scales
        self.transposed = transposed
        self.coded = "mxfp4"

    def read(self) -> torch.Tensor:
        return self._dequantize(self._codes.read(), self._scales.read())

    def read_row(self, row: int) -> torch.Tensor:
        if len(self.shape) < 3:
            return self.read()[row]
        return self._dequantize(self._codes.read_row(row), self._scales.read_row(row))

    def _dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        blocks = codes.view(torch.uint8).reshape(*scales.shape, _BLOCK // 2)
        values = dequantize_mxfp4(blocks, scales.view(torch.uint8))
        return values.transpose(-1, -2) if self.transposed else values

    def read_codes(self, row: int | None = None) -> Codes:
        codes = self._codes.read() if row is None else self._codes.read_row(row)
        scales = self._scales.read() if row is None else self._scales.read_row(row)
        return Codes(
            "mxfp4",
            codes.view(torch.uint8).reshape(scales.shape[0], -1),
            scales.view(torch.uint8),
        )


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns blocks [..., groups, 16] times scales [..., groups], both uint8, as
    [..., 32 · groups] in float32, exact. A byte holds two values, the first in its low half; a
    scale is 2^(byte - 127)."""
    values = _PAIRS.index_select(0, blocks.flatten().to(torch.int32)).view(*scales.shape, _BLOCK)
    return torch.ldexp(values, scales.to(torch.int32)[..., None] - 127).flatten(-2)


def stacked_mxfp4(
    name: str, blocks: StoredTensor, scales_name: str, scales: StoredTensor | None
) -> Mxfp4Tensor:
    """Returns gpt-oss's ``_blocks`` and ``_scales`` as one tensor. ``CheckpointError``: they do
    not fit, or there are no scales."""
    if scales is None:
        raise CheckpointError(
            f"{blocks.file}: {name} has no {scales_name}. The folder is incomplete: download or "
            "copy it again."
        )
    fits = len(blocks.shape) == 4 and blocks.shape[3] == _BLOCK // 2
    if not fits or scales.shape != blocks.shape[:3] or scales.dtype != "U8":
        raise CheckpointError(
            f"{blocks.file}: {name} {list(blocks.shape)} and {scales_name} {list(scales.shape)} "
            f"({scales.dtype}) are not MXFP4; expected [E, rows, groups, 16] and [E, rows, groups] "
            "in U8."
        )
    return Mxfp4Tensor(blocks, scales, transposed=True)


def packed_mxfp4(
    name: str, codes: StoredTensor, scales_name: str, scales: StoredTensor
) -> Mxfp4Tensor:
    """Returns codes [..., n, k / 2] and scales [..., n, k / 32] as one tensor.
    ``CheckpointError``: they do not fit."""
    if not fits_mxfp4(codes.shape, scales.shape) or scales.dtype not in SCALE_DTYPES:
        expected = [*codes.shape[:-1], 2 * codes.shape[-1] // _BLOCK if codes.shape else 0]
        raise CheckpointError(
            f"{codes.file}: {name} {list(codes.shape)} ({codes.dtype}) and {scales_name} "
            f"{list(scales.shape)} ({scales.dtype}) are not MXFP4; expected two codes in a byte "
            f"and a scale for {_BLOCK} of them: {expected} in {' or '.join(SCALE_DTYPES)}."
        )
    return Mxfp4Tensor(codes, scales)


def fits_mxfp4(codes: Sequence[int], scales: Sequence[int]) -> bool:
    """Returns whether the shapes are two codes in a byte and a scale for each block."""
    return (
        len(codes) >= 2
        and tuple(codes[:-1]) == tuple(scales[:-1])
        and codes[-1] * 2 == scales[-1] * _BLOCK
    )
