"""Decodes quantised numbers to float32 by the published descriptions of their formats.

FP8 E4M3 (OCP 8-bit floating point): sign, 4 bits of exponent with bias 7, 3 of fraction; no
infinity, all ones is NaN. E2M1 and E8M0 (OCP Microscaling Formats v1.0): 2^(s − 127) times one of
0, 0.5, 1, 1.5, 2, 3, 4, 6. INT4: a code minus its zero point, times the scale of its group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from ktrt.audit.reference.tensors import Float32

    Codes = npt.NDArray[Any]


def _e4m3() -> Float32:
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, (codes & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    size[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes & 0x80, -size, size).astype(np.float32)


_E4M3 = _e4m3()
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([*_SIZES, *(-size for size in _SIZES)], np.float32)
_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)


def e4m3(codes: Codes) -> Float32:
    """Returns the values of FP8 codes; NaN where a code is NaN."""
    return _E4M3[codes]


def e8m0(codes: Codes) -> Float32:
    """Returns powers of two; NaN for 255."""
    powers = np.ldexp(np.float64(1), codes.astype(np.int32) - 127)  # 2^-127 is below float32's
    values: Float32 = np.where(codes == 255, np.nan, powers).astype(np.float32)
    return values


def mxfp4(pairs: Codes, scales: Codes) -> Float32:
    """Returns bytes [..., k / 2], the first value in the low half, times E8M0 scales [..., k / 32],
    as [..., k]."""
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)
    return _E2M1[codes] * np.repeat(e8m0(scales), 32, axis=-1)


def nibbles(words: Codes) -> Codes:
    """Returns the eight 4-bit codes of int32 words [..., c], low bits first, as [..., 8 · c]."""
    unsigned = words.astype("<i4").view("<u4")
    codes = (unsigned[..., None] >> _SHIFTS) & 15
    return codes.astype(np.int32).reshape(*words.shape[:-1], -1)


def int4(words: Codes) -> Float32:
    """Returns the values −8 … 7 of codes that are stored with 8 added."""
    return (nibbles(words) - 8).astype(np.float32)


def fits(scales: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Returns whether scales of this shape are one scale, one for each output row of a tensor, or
    one for each ``block`` of rows and columns, which may end inside the last blocks."""
    *outer, rows, columns = shape
    per_row = ((*outer, rows), (*outer, rows, 1))
    return np.prod(scales) == 1 or scales in (*per_row, (*outer, *_blocks(rows, columns, block)))


def spread(scales: Float32, shape: tuple[int, ...], block: tuple[int, int]) -> Float32:
    """Returns fitting scales in a form that multiplies numbers of this shape."""
    *outer, rows, columns = shape
    if scales.size == 1:
        return scales.reshape((1,))
    if scales.shape == (*outer, *_blocks(rows, columns, block)):
        scales = np.repeat(scales, block[0], axis=-2)[..., :rows, :]
        return np.repeat(scales, block[1], axis=-1)[..., :columns]
    return scales.reshape(*outer, rows, 1)


def _blocks(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // block[0]), -(-columns // block[1])
