"""The engine's packed memory as row-major tensors: views, permutations and copies on any device.

``csrc/layout/packed_layout.h`` and ``csrc/lora/expert_lora.h`` describe the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ktrt.engine.formats import STRIP_ROWS
from ktrt.experts.gpu.coded import unpack_coded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt.engine import WeightFormat

_HALF_ROWS = 16
_TILE_WORDS = 512  # 4-byte words of a tile: 32 rows of 16
_ROW_WORDS = 16  # of one row in a tile
_BLOCK_RANKS = 16


def unpacked_dtype(weight_format: WeightFormat) -> torch.dtype:
    """The dtype that ``unpack_weights`` gives: int8 codes, where the engine multiplies those, or
    bfloat16."""
    return torch.int8 if weight_format.quantizes_rows else torch.bfloat16


def unpack_weights(
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    weight_format: WeightFormat,
    out: torch.Tensor,
) -> None:
    """Writes packed matrices row-major, padding included: INT8 codes (of INT4 the ones that the
    engine's kernels multiply: 16 times its own), or bfloat16, the scales applied.

    codes: uint8 [n, bytes of one matrix], the last dimension contiguous; scales: float32
    [n, scales of one matrix], None where there are none outside of the tiles; out: [n, padded rows,
    padded columns] of ``unpacked_dtype``, the last dimension contiguous.
    """
    count, rows, columns = out.shape
    size = weight_format.code_bytes(rows, columns)
    if codes.shape != (count, size) or out.dtype != unpacked_dtype(weight_format):
        raise ValueError(
            f"codes {tuple(codes.shape)} and out {tuple(out.shape)} {out.dtype} are not the same "
            f"{weight_format.name} matrices; expected {size} bytes each"
        )
    if weight_format.coded:
        unpack_coded(codes, scales, weight_format, out)
    elif weight_format.bits == 4:
        packed = torch.empty(count, rows, columns // 2, dtype=torch.uint8, device=out.device)
        _unpack_words(codes, weight_format, packed.view(torch.int32))
        _split_nibbles(packed, out)
    else:
        _unpack_words(codes, weight_format, out.view(torch.int32))


def _unpack_words(codes: torch.Tensor, weight_format: WeightFormat, out: torch.Tensor) -> None:
    """Every half tile is the transpose of 16 rows of 16 words, whatever the element type."""
    words = codes.view(torch.int32)
    tiles = out.shape[2] // _ROW_WORDS
    block_strips = weight_format.block_rows // STRIP_ROWS
    block_tiles = weight_format.block_columns // weight_format.tile_columns
    for first, strips, blocks in _blocks(out.shape[1] // STRIP_ROWS, block_strips):
        block_words = strips * tiles * _TILE_WORDS
        start = first * tiles * _TILE_WORDS
        source = words[:, start : start + blocks * block_words].unflatten(1, (blocks, block_words))
        rows = out[:, first * STRIP_ROWS : (first + blocks * strips) * STRIP_ROWS]
        target = rows.unflatten(2, (tiles, _ROW_WORDS)).unflatten(
            1, (blocks, strips, 2, _HALF_ROWS)
        )
        for tile in range(0, tiles, block_tiles):
            end = min(tile + block_tiles, tiles)
            piece = source[:, :, tile * strips * _TILE_WORDS : end * strips * _TILE_WORDS]
            # [n, block, strip, tile, half, word, row] → [n, block, strip, half, row, tile, word]
            shaped = piece.unflatten(2, (strips, end - tile, 2, _ROW_WORDS, _HALF_ROWS))
            target[..., tile:end, :] = shaped.permute(0, 1, 2, 4, 6, 3, 5)


def _blocks(strips: int, block_strips: int) -> Iterator[tuple[int, int, int]]:
    """(first strip, strips of a block, number of blocks): the full blocks, then the rest."""
    full = strips // block_strips
    if full:
        yield 0, block_strips, full
    if rest := strips % block_strips:
        yield full * block_strips, rest, 1


def _split_nibbles(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Unpacks 128 columns: the low nibbles are the first 64, the high ones the rest."""
    both = packed.unflatten(2, (-1, 64)).view(torch.int8)
    target = out.unflatten(2, (-1, 2, 64))
    target[..., 0, :] = both << 4
    target[..., 1, :] = both & -16


def unpack_shrink(a: torch.Tensor, ranks: int, columns: int) -> torch.Tensor:
    """A of some experts, bfloat16 [n, ranks, columns]; ``a`` is uint8 [n, bytes of one expert]."""
    shape = (ranks // _BLOCK_RANKS, columns // 2, _BLOCK_RANKS, 2)
    blocks = a.view(torch.bfloat16).unflatten(1, shape)
    unpacked: torch.Tensor = blocks.permute(0, 1, 3, 2, 4).reshape(-1, ranks, columns)
    return unpacked


def unpack_expand(b: torch.Tensor, rows: int, ranks: int) -> torch.Tensor:
    """B of some experts, bfloat16 [n, rows, ranks]; ``b`` is uint8 [n, bytes of one expert]."""
    shape = (rows // STRIP_ROWS, ranks // 2, 2, _HALF_ROWS, 2)
    strips = b.view(torch.bfloat16).unflatten(1, shape)
    unpacked: torch.Tensor = strips.permute(0, 1, 3, 4, 2, 5).reshape(-1, rows, ranks)
    return unpacked
