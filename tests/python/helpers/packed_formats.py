"""The packed order of FP8, grouped INT4 and MXFP4 matrices, by its description, in NumPy.

A matrix is strips of 32 output rows; a strip is tiles in ascending k; a tile is two halves of 16
rows, each sixteen vectors of 64 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRIP, HALF = 32, 16
TILE_CODES = 2048  # bytes
# Columns that share a scale; 0: all of a row. FP8 blocks: 32 rows (a strip) share it too.
GROUPS = {"fp8": 128, "fp8_channel": 0, "int4_g32": 32, "int4_g64": 64, "int4_g128": 128,
          "mxfp4": 32}  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class PackedMatrix:
    """``codes``: uint8, with the scales of a tile after its codes; ``scales``: float32, the scales
    of FP8, which lie apart, else empty."""

    codes: np.ndarray
    scales: np.ndarray


def is_fp8(weight_format: str) -> bool:
    return weight_format.startswith("fp8")


def tile_columns(weight_format: str) -> int:
    return 64 if is_fp8(weight_format) else 128


def scale_size(weight_format: str) -> int:
    """Returns the bytes of one scale."""
    return 4 if is_fp8(weight_format) else 1 if weight_format == "mxfp4" else 2


def tile_bytes(weight_format: str) -> int:
    if is_fp8(weight_format):
        return TILE_CODES
    return TILE_CODES + 128 // GROUPS[weight_format] * STRIP * scale_size(weight_format)


def padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def padded_shape(weight_format: str, rows: int, columns: int) -> tuple[int, int]:
    return padded(rows, STRIP), padded(columns, tile_columns(weight_format))


def code_places(weight_format: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for every (row, column) of a padded matrix the byte of its code and the code's first
    bit in it."""
    n, k = np.arange(rows)[:, None], np.arange(columns)[None]
    tile = n // STRIP * (columns // tile_columns(weight_format)) + k // tile_columns(weight_format)
    start = tile * tile_bytes(weight_format) + n % STRIP // HALF * (TILE_CODES // 2)
    output = n % HALF
    if is_fp8(weight_format):
        lane, o = output // 4, output % 4
        vector, h, i = k % 64 // 4, k % 4 // 2, k % 2
        return start + 64 * vector + 16 * lane + 8 * h + 2 * o + i, 0 * tile
    vector, pair, high_word = k % 128 // 8, k % 8 // 2, k % 2
    bit = 16 * high_word + 4 * pair
    return start + 64 * vector + 4 * output + bit // 8, bit % 8 + 0 * n


def scale_places(weight_format: str, rows: int, columns: int) -> np.ndarray:
    """Returns for every (row, group of columns) the byte of its scale: among the codes, or (FP8)
    among the separate scales."""
    n, group = np.arange(rows)[:, None], GROUPS[weight_format]
    if weight_format == "fp8_channel":
        return 4 * n
    g = np.arange(padded(columns, group) // group)[None]
    if weight_format == "fp8":
        return 4 * (n // STRIP * g.size + g)
    tile = n // STRIP * (columns // 128) + g * group // 128
    at = g % (128 // group) * STRIP + n % STRIP
    return tile * tile_bytes(weight_format) + TILE_CODES + at * scale_size(weight_format)


def split_nibbles(codes: np.ndarray) -> np.ndarray:
    """Returns one code per byte: column 2i of a row is the low half of byte i."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Returns the upper halves of float32 values that bfloat16 holds exactly."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def pack(codes: np.ndarray, scales: np.ndarray, weight_format: str) -> PackedMatrix:
    """Packs one matrix as the engine takes it: codes uint8 [n, k] (FP8) or [n, k/2] (column 2i in
    the low half); scales float32 (fp8: [⌈n/32⌉, ⌈k/128⌉]; fp8_channel: [n]; int4: [n, k/group],
    values of bfloat16) or (mxfp4) uint8 [n, k/32]."""
    single = codes if is_fp8(weight_format) else split_nibbles(codes)
    rows, columns = padded_shape(weight_format, *single.shape)
    tiles = rows // STRIP * columns // tile_columns(weight_format)
    out = np.zeros(tiles * tile_bytes(weight_format), np.uint8)
    whole = np.zeros((rows, columns), np.uint8)
    whole[: single.shape[0], : single.shape[1]] = single
    byte, bit = code_places(weight_format, rows, columns)
    np.bitwise_or.at(out, byte, whole << bit.astype(np.uint8))
    places = scale_places(weight_format, rows, columns)
    if is_fp8(weight_format):
        apart = np.zeros(places.max() // 4 + 1, np.float32)
        given = np.repeat(scales, STRIP, 0) if weight_format == "fp8" else scales[:, None]
        filled = np.zeros(places.shape, np.float32)
        filled[: given.shape[0], : given.shape[1]] = given[:rows]
        apart[places // 4] = filled
        return PackedMatrix(out, apart)
    padding = 127 if weight_format == "mxfp4" else 0
    given = scales if weight_format == "mxfp4" else bf16_bits(scales)
    stored = np.full(places.shape, padding, given.dtype)
    stored[: given.shape[0], : given.shape[1]] = given
    for i in range(scale_size(weight_format)):
        out[places + i] = stored >> (8 * i) & 255
    return PackedMatrix(out, np.empty(0, np.float32))


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Returns the values of E4M3 codes (sign, 4 bits of exponent with bias 7, 3 of mantissa)."""
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(int)
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    value = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    value[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -value, value).astype(np.float32)


def code_values(codes: np.ndarray, weight_format: str) -> np.ndarray:
    """Returns the values of codes, one per byte, without their scale."""
    if is_fp8(weight_format):
        return e4m3(codes)
    if weight_format == "mxfp4":
        return np.take(np.array([*E2M1, *(-v for v in E2M1)], np.float32), codes)
    return np.where(codes > 7, codes.astype(int) - 16, codes).astype(np.float32)


def dequantized(codes: np.ndarray, scales: np.ndarray, weight_format: str) -> np.ndarray:
    """Returns code · scale in float32, [n, k], of what ``pack`` takes."""
    single = codes if is_fp8(weight_format) else split_nibbles(codes)
    rows, columns = single.shape
    if weight_format == "fp8":
        scales = np.repeat(scales, STRIP, 0)[:rows]
    elif weight_format == "fp8_channel":
        scales = scales[:, None]
    elif weight_format == "mxfp4":
        scales = np.ldexp(np.float32(1), scales.astype(int) - 127)
    group = GROUPS[weight_format] or columns
    spread = np.repeat(scales, group, 1)[:, :columns]
    return code_values(single, weight_format) * spread.astype(np.float32)


def unpack(packed: PackedMatrix, weight_format: str, rows: int, columns: int) -> np.ndarray:
    """Returns code · scale in float32, [padded rows, padded columns], of packed bytes."""
    rows, columns = padded_shape(weight_format, rows, columns)
    byte, bit = code_places(weight_format, rows, columns)
    codes = packed.codes[byte] if is_fp8(weight_format) else packed.codes[byte] >> bit & 15
    places = scale_places(weight_format, rows, columns)
    if is_fp8(weight_format):
        scales = packed.scales[places // 4]
    elif weight_format == "mxfp4":
        scales = np.ldexp(np.float32(1), packed.codes[places].astype(int) - 127)
    else:
        bits = packed.codes[places].astype(np.uint32) | packed.codes[places + 1].astype(
            np.uint32
        ) << np.uint32(8)
        scales = (bits << np.uint32(16)).view(np.float32)
    group = GROUPS[weight_format] or columns
    return code_values(codes.astype(np.uint8), weight_format) * np.repeat(scales, group, 1)[
        :, :columns
    ].astype(np.float32)


def random_matrix(
    weight_format: str, rows: int, columns: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes and scales as ``pack`` takes them: every code but NaN, scales of all sizes that
    weights of about 1/√columns have."""
    rng = np.random.default_rng(seed)
    size = columns**-0.5
    if is_fp8(weight_format):
        codes = rng.integers(0, 256, (rows, columns), np.uint8)
        codes[codes & 127 == 127] ^= 1
        shape = (padded(rows, STRIP) // STRIP, padded(columns, 128) // 128)
        factors = rng.uniform(0.5, 2, shape if weight_format == "fp8" else rows)
        return codes, (factors * size / 120).astype(np.float32)
    codes = rng.integers(0, 256, (rows, columns // 2), np.uint8)
    shape = (rows, padded(columns, GROUPS[weight_format]) // GROUPS[weight_format])
    if weight_format == "mxfp4":
        exponent = round(float(np.log2(size))) + 126
        return codes, rng.integers(exponent, exponent + 3, shape, np.uint8)
    factors = (rng.uniform(0.5, 2, shape) * size / 5).astype(np.float32)
    rounded = (factors.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return codes, rounded
