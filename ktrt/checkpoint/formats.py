"""Finds the quantised tensors of a model folder: joins codes and scales to one logical tensor.

Formats: FP8 E4M3 (``ktrt.checkpoint.fp8``), MXFP4 (``ktrt.checkpoint.mxfp4``).
"""

from __future__ import annotations

from ktrt.checkpoint.fp8 import DTYPE as FP8
from ktrt.checkpoint.fp8 import Fp8Tensor, dequantize_fp8, fp8_scales
from ktrt.checkpoint.mxfp4 import SCALE_DTYPES, dequantize_mxfp4, packed_mxfp4, stacked_mxfp4
from ktrt.checkpoint.stored import QuantizedTensor, StoredTensor

__all__ = ["decoded", "dequantize_fp8", "dequantize_mxfp4", "is_dequantized"]

# Dtypes that hold two MXFP4 codes of DeepSeek-V4 in a byte.
_PAIRS = ("I8", "U8")


def decoded(stored: dict[str, StoredTensor], block: tuple[int, int]) -> dict[str, StoredTensor]:
    """Returns the logical tensors: each quantised one together with its scales, under one name.

    Raises ``CheckpointError`` for scales whose shape or dtype does not fit their tensor, and for
    MXFP4 blocks without scales. FP8 without scales stays unchanged.
    """
    result = dict(stored)
    for name, tensor in stored.items():
        if name.endswith("_blocks") and tensor.dtype == "U8":
            plain = name.removesuffix("_blocks")
            scales = f"{plain}_scales"
            result[plain] = stacked_mxfp4(name, tensor, scales, stored.get(scales))
            del result[name], result[scales]
        elif tensor.dtype == FP8 and (found := fp8_scales(name, stored)):
            result[name] = Fp8Tensor(name, tensor, found, stored[found], block)
            del result[found]
        elif (
            tensor.dtype in _PAIRS
            and (found := fp8_scales(name, stored))
            and stored[found].dtype in SCALE_DTYPES
        ):
            result[name] = packed_mxfp4(name, tensor, found, stored[found])
            del result[found]
    return result


def is_dequantized(tensor: StoredTensor) -> bool:
    """Returns whether reading dequantises."""
    return isinstance(tensor, QuantizedTensor)
