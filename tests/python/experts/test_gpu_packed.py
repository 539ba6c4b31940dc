"""Unpacking the engine's bytes with torch operations, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ktrt.engine.formats import format_named, padded_shape
from ktrt.experts.gpu.packed import code_dtype, unpack_codes

# n-block, k-block and tile in elements, values in a 4-byte word: kt_kernel 0.7.2's.
NUMBERS = {"bf16": (256, 1792, 32, 2), "int8": (64, 3584, 64, 4), "int4": (128, 3584, 128, 8)}


def packed_words(shape: tuple[int, int], weight_format: str) -> np.ndarray:
    """For every (row, 4-byte word of the row) its index in the packed words."""
    block_rows, block_k, tile_k, _ = NUMBERS[weight_format]
    rows, columns = shape
    words = np.empty((rows, columns * 16 // tile_k), np.int64)
    next_word = 0
    for n in range(0, rows, block_rows):
        for k in range(0, columns, block_k):
            for strip in range(n, min(n + block_rows, rows), 32):
                for tile in range(k, min(k + block_k, columns), tile_k):
                    for half in (0, 16):
                        for word in range(16):
                            at = slice(strip + half, strip + half + 16)
                            words[at, tile * 16 // tile_k + word] = np.arange(16) + next_word
                            next_word += 16
    return words


@pytest.mark.parametrize(
    "shape",
    [(32, 128), (288, 2048), (96, 3712), (32, 7296), (160, 1792), (320, 256)],
    ids=str,
)
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_equals_the_packing_loop(shape: tuple[int, int], weight_format: str) -> None:
    rng = np.random.default_rng(0)
    index = packed_words(shape, weight_format)
    row_words = rng.integers(0, 2**32, (2, *index.shape), dtype=np.uint32)
    packed = np.empty((2, index.size + 16), np.uint32)  # more than one matrix in a row
    packed[:, index] = row_words
    codes = torch.from_numpy(packed.view(np.uint8))[:, : index.size * 4]
    traits = format_named(weight_format)
    assert padded_shape(traits, *shape) == shape
    out = torch.zeros(2, *shape, dtype=code_dtype(traits))
    unpack_codes(codes, traits, out)
    if weight_format != "int4":
        assert (out.view(torch.int32).numpy().view(np.uint32) == row_words).all()
        return
    nibbles = row_words.view(np.uint8).reshape(2, shape[0], -1, 64)
    low, high = (nibbles & 15).astype(int), (nibbles >> 4).astype(int)
    values = np.stack([low, high], axis=3).reshape(2, *shape)
    signed = np.where(values > 7, values - 16, values)
    assert (out.numpy() == 16 * signed).all()


def test_padding_is_counted() -> None:
    assert padded_shape(format_named("bf16"), 176, 160) == (192, 160)
    assert padded_shape(format_named("int8"), 176, 160) == (192, 192)
    assert padded_shape(format_named("int4"), 176, 160) == (192, 256)


def test_sizes_must_agree() -> None:
    out = torch.empty(1, 32, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected 4096 bytes"):
        unpack_codes(torch.zeros(1, 2048, dtype=torch.uint8), format_named("bf16"), out)
