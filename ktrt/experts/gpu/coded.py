"""Packed FP8, grouped INT4 and MXFP4 weights as row-major bfloat16: code · scale, rounded once.

``csrc/layout/coded.h`` describes the bytes. Plain torch operations, so that they run on any device;
what they make on the way is bounded by taking a few experts at a time.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from ktrt.engine.formats import STRIP_ROWS

if TYPE_CHECKING:
    from ktrt.engine import WeightFormat

_HALVES = (2, 16)  # of a strip: its rows
_VECTORS = 16  # of 64 bytes in a half tile
_TILE_CODES = 2048  # bytes of a tile without its scales
# Weights that are unpacked at once: 4-bit codes take 4 bytes each on the way.
_PIECE_WEIGHTS = 16 << 20

_INT4 = (*range(8), *range(-8, 0))
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Values of 4-bit codes, by the kt_backend that all formats of these codes have.
_VALUES: dict[str, tuple[float, ...]] = {
    "RAWINT4": _INT4,
    "MXFP4": (*_MAGNITUDES, *(-value for value in _MAGNITUDES)),
}


def unpack_coded(
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    weight_format: WeightFormat,
    out: torch.Tensor,
) -> None:
    """Writes packed matrices row-major, padding included.

    codes: uint8 [n, bytes of one matrix]; scales: float32 [n, scales of one matrix], None where
    they lie in the tiles; out: bfloat16 [n, padded rows, padded columns], the last dimension
    contiguous.
    """
    step = max(1, _PIECE_WEIGHTS // (out.shape[1] * out.shape[2]))
    for first in range(0, out.shape[0], step):
        piece = slice(first, first + step)
        if scales is None:
            _unpack_nibbles(codes[piece], weight_format, out[piece])
        else:
            _unpack_e4m3(codes[piece], scales[piece], weight_format.group, out[piece])


def _unpack_e4m3(codes: torch.Tensor, scales: torch.Tensor, group: int, out: torch.Tensor) -> None:
    """Byte 8 h + 2 o + i of lane l in vector v: output 4 l + o of the half, k = 4 v + 2 h + i."""
    rows, columns = out.shape[1:]
    strips, tiles = rows // STRIP_ROWS, columns // 64
    packed = codes.view(torch.float8_e4m3fn).unflatten(1, (strips, tiles, 2, _VECTORS, 4, 2, 4, 2))
    # [n, strip, tile, half, v, l, h, o, i] → [n, strip, half, l, o, tile, v, h, i]
    target = out.unflatten(2, (tiles, _VECTORS, 2, 2)).unflatten(1, (strips, 2, 4, 4))
    target.copy_(packed.permute(0, 1, 3, 5, 7, 2, 4, 6, 8))
    if not group:
        out.mul_(scales[:, :, None])
        return
    spread = scales.unflatten(1, (strips, -1)).repeat_interleave(group, 2)[:, :, None, :columns]
    out.unflatten(1, (strips, STRIP_ROWS)).mul_(spread)


def _unpack_nibbles(codes: torch.Tensor, weight_format: WeightFormat, out: torch.Tensor) -> None:
    """Word o of vector v: output o of the half; nibble 2 p + q of its low 16 bits is
    k = 8 v + 4 p + 2 q, of its high ones k + 1. A tile's scales [group of k][row] follow it."""
    rows, columns = out.shape[1:]
    strips, tiles = rows // STRIP_ROWS, columns // 128
    groups, vectors = 128 // weight_format.group, _VECTORS * weight_format.group // 128
    packed = codes.unflatten(1, (strips, tiles, -1))
    # [n, strip, tile, half, v, o, byte] → [n, strip, half, o, tile, v, byte]
    words = packed[..., :_TILE_CODES].unflatten(3, (2, _VECTORS, 16, 4))
    index = words.permute(0, 1, 3, 5, 2, 4, 6).to(
        torch.int32, memory_format=torch.contiguous_format
    )
    pairs = _pairs(weight_format.kt_backend, codes.device).index_select(0, index.flatten())
    values = pairs.view(torch.bfloat16).view(-1, strips, *_HALVES, tiles, groups, vectors, 2, 2, 2)
    scales = _tile_scales(packed[..., _TILE_CODES:], weight_format).unflatten(3, (groups, *_HALVES))
    spread = scales.permute(0, 1, 4, 5, 2, 3)[..., None, None, None, None]
    target = out.unflatten(2, (tiles, groups, vectors, 2, 2, 2)).unflatten(1, (strips, *_HALVES))
    # [..., i, p, q] → [..., p, q, i]
    torch.mul(values.movedim(-3, -1), spread, out=target)


def _tile_scales(stored: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """The scales in tiles as bfloat16."""
    if weight_format.kt_backend != "MXFP4":
        return stored.contiguous().view(torch.bfloat16)
    # E8M0 bytes are bfloat16's exponents; the smallest, 2^-127, is a subnormal number there.
    return (stored.to(torch.int16) << 7).clamp_min_(0x40).view(torch.bfloat16)


@cache
@torch.inference_mode(mode=False)
def _pairs(kt_backend: str, device: torch.device) -> torch.Tensor:
    """For every byte the values of its low and of its high nibble: two bfloat16 as an int32."""
    values = torch.tensor(_VALUES[kt_backend], dtype=torch.bfloat16)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    return pairs.view(torch.int32).flatten().to(device)
