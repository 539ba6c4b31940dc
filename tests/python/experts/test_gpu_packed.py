"""Unpacking the engine's bytes with torch operations, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import packed_formats
from helpers.expert_layers import DEVICES, CodedCase
from helpers.packed_formats import GROUPS, PackedMatrix, dequantized, is_fp8, pack, random_matrix

from ktrt._core import Engine
from ktrt.engine.formats import format_named, padded_shape
from ktrt.experts.gpu import coded
from ktrt.experts.gpu.packed import unpack_weights, unpacked_dtype

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
    out = torch.zeros(2, *shape, dtype=unpacked_dtype(traits))
    unpack_weights(codes, None, traits, out)
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
        unpack_weights(torch.zeros(1, 2048, dtype=torch.uint8), None, format_named("bf16"), out)


def unpacked(
    matrices: list[PackedMatrix], weight_format: str, shape: tuple[int, int], device: str = "cpu"
) -> torch.Tensor:
    """Returns what torch makes of packed matrices that lie among other bytes, padding included."""
    traits = format_named(weight_format)

    def among_others(arrays: list[np.ndarray], before: int) -> torch.Tensor:
        rows = torch.from_numpy(np.stack(arrays)).to(device)
        size = rows.shape[1]
        whole = torch.ones(len(rows), before + size + before, dtype=rows.dtype, device=device)
        whole[:, before : before + size] = rows
        return whole[:, before : before + size]

    codes = among_others([each.codes for each in matrices], 64)
    scales = among_others([each.scales for each in matrices], 16)
    rows, columns = padded_shape(traits, *shape)
    out = torch.full((len(matrices), rows + 32, columns), 7.0, dtype=torch.bfloat16, device=device)
    unpack_weights(codes, scales if is_fp8(weight_format) else None, traits, out[:, 32:])
    assert (out[:, :32] == 7).all()
    return out[:, 32:].cpu()


def same_bits(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Whether ``found`` is ``expected``, float32, rounded once; 0 and -0 differ."""
    rounded = torch.from_numpy(expected).bfloat16()
    return torch.equal(found.contiguous().view(torch.int16), rounded.view(torch.int16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(32, 128), (70, 320), (33, 192), (96, 640)], ids=str)
@pytest.mark.parametrize("weight_format", GROUPS)
def test_codes_times_scales(weight_format: str, shape: tuple[int, int], device: str) -> None:
    sources = [random_matrix(weight_format, *shape, seed) for seed in range(3)]
    found = unpacked([pack(*each, weight_format) for each in sources], weight_format, shape, device)
    for each, matrix in zip(sources, found, strict=True):
        rows, columns = shape
        assert same_bits(matrix[:rows, :columns], dequantized(*each, weight_format))
        assert not matrix[rows:].any()
        assert not matrix[:, columns:].any()


@pytest.mark.parametrize("weight_format", GROUPS)
def test_few_matrices_at_a_time(weight_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [pack(*random_matrix(weight_format, 32, 128, n), weight_format) for n in range(5)]
    whole = unpacked(matrices, weight_format, (32, 128))
    for most in (1, 2 * 32 * 128):
        monkeypatch.setattr(coded, "_PIECE_WEIGHTS", most)
        assert torch.equal(unpacked(matrices, weight_format, (32, 128)), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_and_extreme_scales(device: str) -> None:
    """Codes and scales whose products, or whose values, are subnormal numbers of bfloat16."""
    bytes_ = np.arange(256, dtype=np.uint8)
    bytes_[bytes_ & 127 == 127] ^= 1
    eight, four = np.tile(bytes_, (32, 1)), np.tile(np.arange(256, dtype=np.uint8), (32, 1))
    rows = np.arange(32)
    cases: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "fp8_channel": (eight, (2.0 ** (-128.0 + 6 * rows)).astype(np.float32)),
        "fp8": (eight, np.array([[2.0**-131, 3e4]], np.float32)),
        "mxfp4": (four, np.resize(np.array([0, 1, 2, 127, 250], np.uint8), (32, 16))),
        "int4_g64": (four, np.resize(np.array([2.0**-133, 2.0**-126, 0, 2e30], np.float32)
                                     .view(np.uint32) >> 16 << 16, (32, 8)).view(np.float32)),
    }  # fmt: skip
    for weight_format, source in cases.items():
        columns = 256 if is_fp8(weight_format) else 512
        found = unpacked([pack(*source, weight_format)], weight_format, (32, columns), device)[0]
        assert same_bits(found, dequantized(*source, weight_format)), weight_format


def test_the_packers_inverse() -> None:
    for weight_format in GROUPS:
        source = random_matrix(weight_format, 45, 320)
        packed = pack(*source, weight_format)
        found = packed_formats.unpack(packed, weight_format, 45, 320)
        assert (found[:45, :320] == dequantized(*source, weight_format)).all()


# hidden and intermediate size: strips, tiles and blocks of FP8, tiles of INT4 and MXFP4 are ragged.
SIZES = {
    "fp8": (290, 170), "fp8_channel": (290, 170), "int4_g32": (288, 96), "int4_g64": (320, 192),
    "int4_g128": (256, 384), "mxfp4": (288, 96),
}  # fmt: skip


@pytest.mark.parametrize("weight_format", GROUPS)
def test_the_engine_packs_so(weight_format: str) -> None:
    """Byte for byte, padding of rows and tiles included."""
    engine = Engine(num_threads=1)
    case = CodedCase(2, 1, *SIZES[weight_format], coded=weight_format)
    layer: Any = case.build(engine, weight_format)
    for projection, sources in case.codes.items():
        for expert, source in enumerate(sources):
            packed = pack(*source, weight_format)
            assert layer.packed_codes(expert, projection) == packed.codes.tobytes()
            assert layer.packed_scales(expert, projection) == packed.scales.tobytes()
    engine.close()
