"""FP8 E4M3 matrices: one scale per block, per output row, or per tensor.

Blocks as DeepSeek-V3 writes them (https://huggingface.co/deepseek-ai/DeepSeek-V3,
"weight_scale_inv"), rows as compressed-tensors' float-quantized does ("weight_scale" [n, 1]).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ktrt.checkpoint.codes import FP8_GRID, Codes
from ktrt.checkpoint.stored import FLOAT_DTYPES, QuantizedTensor, check_dtype, scale_groups
from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ktrt.checkpoint.stored import StoredTensor

DTYPE = "F8_E4M3"
_SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0", "U8")


class Fp8Tensor(QuantizedTensor):
    """FP8 codes [..., n, k] and their scales: [..., ⌈n / block⌉, ⌈k / block⌉], [..., n] or
    [..., n, 1] (by rows), or one.

    Raises ``CheckpointError`` for scales of another shape or dtype.
    """

    def __init__(
        self,
        name: str,
        codes: StoredTensor,
        scales_name: str,
        scales: StoredTensor,
        block: tuple[int, int],
    ) -> None:
        super().__init__(codes.file, codes.shape)
        self._codes, self._scales = codes, scales
        check_dtype(scales, scales_name, _SCALE_DTYPES)
        self._single = scales.shape in ((), (1,))
        self._block = block
        self._rows = False
        if not self._single:
            self._fit(name, scales_name)
        self.coded, self.why_not_coded = self._engine_format()
        self.whole_blocks = self._single or (not self._rows and not block[0] % 128)

    def _fit(self, name: str, scales_name: str) -> None:
        """Settles whether the scales are by blocks or by rows."""
        found, block = self._scales.shape, self._block
        expected: tuple[int, ...] = (1,)
        if len(self.shape) > 1:
            *outer, n, k = self.shape
            expected = (*outer, -(-n // block[0]), -(-k // block[1]))
            if found == expected:
                return
            self._rows = found in ((*outer, n), (*outer, n, 1))
        if not self._rows:
            raise CheckpointError(
                f"{self._scales.file}: {scales_name} has shape {list(found)}, expected one scale, "
                f"or {list(expected)} for {name} {list(self.shape)} in blocks of {block[0]} x "
                f"{block[1]} (weight_block_size in config.json), or one scale for each row."
            )

    def _engine_format(self) -> tuple[str | None, str]:
        if len(self.shape) not in (2, 3):
            return None, f"FP8 of {len(self.shape)} dimensions"
        if self._rows:
            return "fp8_channel", ""
        if not self._single and any(
            size % grid for size, grid in zip(self._block, FP8_GRID, strict=True)
        ):
            return None, (
                f"FP8 in blocks of {self._block[0]} x {self._block[1]}: the engine takes multiples "
                f"of {FP8_GRID[0]} x {FP8_GRID[1]}, and scales for each row or tensor"
            )
        return "fp8", ""

    def read(self) -> torch.Tensor:
        return self._dequantize(self._codes.read(), self._scales.read())

    def read_row(self, row: int) -> torch.Tensor:
        if len(self.shape) < 3:
            return self.read()[row]
        scales = self._scales.read() if self._single else self._scales.read_row(row)
        return self._dequantize(self._codes.read_row(row), scales)

    def _dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        if self._rows:
            return codes.to(torch.float32) * as_float(scales).reshape(*codes.shape[:-1], 1)
        return dequantize_fp8(codes, scales, self._block)

    def read_codes(self, row: int | None = None) -> Codes:
        assert self.coded is not None, self.why_not_coded
        codes = self._codes.read() if row is None else self._codes.read_row(row)
        whole = row is None or self._single
        scales = as_float(self._scales.read() if whole else self._scales.read_row(row or 0))
        n, k = codes.shape
        scales = scales.reshape(n).contiguous() if self._rows else self._grid(scales, n, k)
        return Codes(self.coded, codes.view(torch.uint8), scales)

    def _grid(self, scales: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """Returns the scales in the engine's grid."""
        rows, columns = -(-n // FP8_GRID[0]), -(-k // FP8_GRID[1])
        if self._single:
            return scales.reshape(1, 1).repeat(rows, columns)
        scales = scales.repeat_interleave(self._block[0] // FP8_GRID[0], dim=0)[:rows]
        return scales.repeat_interleave(self._block[1] // FP8_GRID[1], dim=1)[
            :, :columns
        ].contiguous()


def as_float(scales: torch.Tensor) -> torch.Tensor:
    """Returns scales in float32; bytes are E8M0, 2^(byte - 127)."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.to(torch.float32) - 127)
    return scales.to(torch.float32)


def dequantize_fp8(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """Returns codes [..., n, k] in float8_e4m3fn times their scales, in float32. Scales are floats,
    or powers of two as bytes (E8M0: 2^(byte - 127)). The matrix may end inside the last blocks."""
    scales = as_float(scales)
    values = codes.to(torch.float32)
    if scales.numel() == 1 and scales.ndim < 2:
        return values.mul_(scales)
    rows = scales.repeat_interleave(block[0], dim=-2)[..., : values.shape[-2], :]
    return scale_groups(values, rows, block[1])


def fp8_scales(name: str, stored: Mapping[str, StoredTensor]) -> str | None:
    """Returns the name of an FP8 tensor's scales. In order: DeepSeek-V3's and most others', stacked
    ones' and compressed-tensors', DeepSeek-V4's, Mistral's."""
    stem = name.removesuffix("weight")
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    candidates += [f"{stem}scale", f"{stem}qscale_weight"] if stem != name else []
    return next((candidate for candidate in candidates if candidate in stored), None)
