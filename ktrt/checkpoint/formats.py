"""Reads the stored tensors of a model folder, plain or quantised, as plain ones.

Formats: safetensors' floats; FP8 E4M3 with one scale per block of 128 × 128 (or per tensor), as
DeepSeek-V3 writes it (https://huggingface.co/deepseek-ai/DeepSeek-V3, "weight_scale_inv"); MXFP4
of the Open Compute Project (OCP Microscaling Formats v1.0), as gpt-oss writes it: ``_blocks`` and
``_scales``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

FLOAT_DTYPES = ("F32", "F16", "BF16")
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FP8 = "F8_E4M3"
_SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0", "U8")
# The values of an E2M1 code, sign in its highest bit.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MXFP4_BLOCK = 32


class StoredTensor(Protocol):
    """One logical tensor of a model folder, read on demand."""

    @property
    def file(self) -> Path:
        """The file, or one of the files, that hold it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """In safetensors' words, e.g. ``BF16``; ``F32`` if dequantised on reading."""

    def read(self) -> torch.Tensor: ...

    def read_row(self, row: int) -> torch.Tensor:
        """Returns ``read()[row]`` without reading or dequantising the other rows."""


class PlainTensor:
    """A plain tensor of a safetensors file; ``handle`` is the open file."""

    def __init__(self, file: Path, handle: Any, name: str) -> None:
        self.file = file
        self._handle = handle
        self._name = name
        header = handle.get_slice(name)
        self.shape = tuple(header.get_shape())
        self.dtype = str(header.get_dtype())

    def read(self) -> torch.Tensor:
        """Returns a view of the mapped file where possible."""
        tensor: torch.Tensor = self._handle.get_tensor(self._name)
        return tensor

    def read_row(self, row: int) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_slice(self._name)[row]
        return tensor


class Fp8Tensor:
    """FP8 codes [..., n, k] and their scales [..., ⌈n / block⌉, ⌈k / block⌉], or one scale."""

    dtype = "F32"

    def __init__(self, codes: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> None:
        self.file, self.shape = codes.file, codes.shape
        self._codes, self._scales, self._block = codes, scales, block
        self.single = len(scales.shape) < 2 and scales.shape in ((), (1,))

    def expected_scales(self) -> tuple[int, ...]:
        """Returns the shape that scales by blocks must have."""
        *outer, n, k = self.shape
        return (*outer, -(-n // self._block[0]), -(-k // self._block[1]))

    def read(self) -> torch.Tensor:
        return dequantize_fp8(self._codes.read(), self._scales.read(), self._block)

    def read_row(self, row: int) -> torch.Tensor:
        scales = self._scales.read() if self.single else self._scales.read_row(row)
        return dequantize_fp8(self._codes.read_row(row), scales, self._block)


class Mxfp4Tensor:
    """MXFP4 blocks [E, rows, groups, 16 bytes] and scales [E, rows, groups], read as
    [E, 32 · groups, rows]: transformers keeps these parameters with the outputs last."""

    dtype = "F32"

    def __init__(self, blocks: StoredTensor, scales: StoredTensor) -> None:
        self.file = blocks.file
        experts, rows, groups = blocks.shape[:3]
        self.shape = (experts, _MXFP4_BLOCK * groups, rows)
        self._blocks, self._scales = blocks, scales

    def read(self) -> torch.Tensor:
        return dequantize_mxfp4(self._blocks.read(), self._scales.read()).transpose(-1, -2)

    def read_row(self, row: int) -> torch.Tensor:
        values = dequantize_mxfp4(self._blocks.read_row(row), self._scales.read_row(row))
        return values.transpose(-1, -2)


class ConvertedTensor:
    """The result of transformers' own conversion of other tensors, always read whole."""

    def __init__(
        self, file: Path, dtype: str, shape: Sequence[int], convert: Callable[[], torch.Tensor]
    ) -> None:
        self.file, self.dtype, self.shape = file, dtype, tuple(shape)
        self._convert = convert

    def read(self) -> torch.Tensor:
        return self._convert()

    def read_row(self, row: int) -> torch.Tensor:
        return self._convert()[row]


def dequantize_fp8(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """Returns codes [..., n, k] in float8_e4m3fn times their scales, in float32. Scales are floats,
    or powers of two as bytes (E8M0: 2^(byte - 127)). The matrix may end inside the last blocks."""
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.to(torch.float32) - 127)
    scales = scales.to(torch.float32)
    values = codes.to(torch.float32)
    if scales.numel() > 1 or scales.ndim > 1:
        n, k = values.shape[-2:]
        scales = scales.repeat_interleave(block[0], dim=-2)[..., :n, :]
        scales = scales.repeat_interleave(block[1], dim=-1)[..., :k]
    return values * scales


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns blocks [..., groups, 16] times scales [..., groups], both uint8, as
    [..., 32 · groups] in float32, exact. A byte holds two values, the first in its low half; a
    scale is 2^(byte - 127)."""
    table = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.float32)
    codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(-2)
    values = table[codes.to(torch.int32)]
    return torch.ldexp(values, scales.to(torch.int32)[..., None] - 127).flatten(-2)


def decoded(stored: dict[str, StoredTensor], block: tuple[int, int]) -> dict[str, StoredTensor]:
    """Returns the logical tensors: each quantised one together with its scales, under one name.

    Raises ``CheckpointError`` for scales whose shape or dtype does not fit their tensor, and for
    MXFP4 blocks without scales. FP8 without scales stays unchanged.
    """
    result = dict(stored)
    for name, tensor in stored.items():
        if name.endswith("_blocks") and tensor.dtype == "U8":
            plain = name.removesuffix("_blocks")
            result[plain] = _mxfp4(name, tensor, f"{plain}_scales", stored)
            del result[name], result[f"{plain}_scales"]
        elif tensor.dtype == _FP8 and (scales := _fp8_scales(name, stored)):
            result[name] = _fp8(name, tensor, scales, stored[scales], block)
            del result[scales]
    return result


def is_dequantized(tensor: StoredTensor) -> bool:
    """Returns whether reading dequantises."""
    return isinstance(tensor, (Fp8Tensor, Mxfp4Tensor))


def _fp8_scales(name: str, stored: dict[str, StoredTensor]) -> str | None:
    """Returns the name of an FP8 tensor's scales. In order: DeepSeek-V3's and most others', stacked
    ones', DeepSeek-V4's, Mistral's."""
    stem = name.removesuffix("weight")
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    candidates += [f"{stem}scale", f"{stem}qscale_weight"] if stem != name else []
    return next((candidate for candidate in candidates if candidate in stored), None)


def _fp8(
    name: str, codes: StoredTensor, scales_name: str, scales: StoredTensor, block: tuple[int, int]
) -> Fp8Tensor:
    tensor = Fp8Tensor(codes, scales, block)
    if not tensor.single and (len(codes.shape) < 2 or scales.shape != tensor.expected_scales()):
        raise CheckpointError(
            f"{scales.file}: {scales_name} has shape {list(scales.shape)}, expected one scale, or "
            f"{list(tensor.expected_scales()) if len(codes.shape) > 1 else '[1]'} for {name} "
            f"{list(codes.shape)} in blocks of {block[0]} x {block[1]} (weight_block_size in "
            "config.json)."
        )
    if scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scales.file}: {scales_name} has dtype {scales.dtype}, expected one of "
            f"{', '.join(_SCALE_DTYPES)}."
        )
    return tensor


def _mxfp4(
    name: str, blocks: StoredTensor, scales_name: str, stored: dict[str, StoredTensor]
) -> Mxfp4Tensor:
    scales = stored.get(scales_name)
    if scales is None:
        raise CheckpointError(f"{blocks.file}: {name} has no {scales_name}.")
    fits = len(blocks.shape) == 4 and blocks.shape[3] == _MXFP4_BLOCK // 2
    if not fits or scales.shape != blocks.shape[:3] or scales.dtype != "U8":
        raise CheckpointError(
            f"{blocks.file}: {name} {list(blocks.shape)} and {scales_name} {list(scales.shape)} "
            f"({scales.dtype}) are not MXFP4; expected [E, rows, groups, 16] and [E, rows, groups] "
            "in U8."
        )
    return Mxfp4Tensor(blocks, scales)
