"""Finds the quantised tensors of a model folder: joins codes and scales to one logical tensor.

Formats: FP8 E4M3 (``ktrt.checkpoint.fp8``), INT4 (``ktrt.checkpoint.int4``), MXFP4
(``ktrt.checkpoint.mxfp4``). The tensors tell which; config.json fills in what they cannot tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.checkpoint.fp8 import DTYPE as FP8
from ktrt.checkpoint.fp8 import Fp8Tensor, dequantize_fp8, fp8_scales
from ktrt.checkpoint.int4 import GptqInt4, PackedInt4
from ktrt.checkpoint.mxfp4 import SCALE_DTYPES, dequantize_mxfp4, packed_mxfp4, stacked_mxfp4
from ktrt.checkpoint.stored import QuantizedTensor, StoredTensor

if TYPE_CHECKING:
    from ktrt.checkpoint.quantization import Quantization

__all__ = ["decoded", "dequantize_fp8", "dequantize_mxfp4", "is_dequantized"]

# Dtypes that hold two of DeepSeek-V4's MXFP4 codes in a byte.
_PAIRS = ("I8", "U8")
# Ends of names: of the codes, and of everything that belongs to them.
_PACKED, _PACKED_PARTS = "weight_packed", ("packed", "scale", "shape", "g_idx")
_GPTQ, _GPTQ_PARTS = "qweight", ("qweight", "scales", "qzeros", "g_idx")


def decoded(stored: dict[str, StoredTensor], claims: Quantization) -> dict[str, StoredTensor]:
    """Returns the logical tensors: each quantised one together with its scales, under one name.

    Raises ``CheckpointError`` for scales whose shape or dtype does not fit their tensor, for codes
    without scales, and for INT4 that is asymmetric or of another number of bits. FP8 without scales
    stays unchanged.
    """
    result = dict(stored)
    shapes: dict[tuple[int, ...], tuple[int, int]] = {}
    checked = False
    for name, tensor in stored.items():
        if name.endswith("_blocks") and tensor.dtype == "U8":
            plain = name.removesuffix("_blocks")
            scales = f"{plain}_scales"
            result[plain] = stacked_mxfp4(name, tensor, scales, stored.get(scales))
            _drop(result, name, scales)
        elif tensor.dtype == FP8 and (found := fp8_scales(name, stored)):
            result[name] = Fp8Tensor(name, tensor, found, stored[found], claims.block)
            _drop(result, found)
        elif (
            tensor.dtype in _PAIRS
            and (found := fp8_scales(name, stored))
            and stored[found].dtype in SCALE_DTYPES
        ):
            result[name] = packed_mxfp4(name, tensor, found, stored[found])
            _drop(result, found)
        elif name.rpartition(".")[2] == _PACKED:
            stem = name.removesuffix("_packed")
            if tensor.dtype == "U8" and f"{stem}_scale" in stored:
                result[stem] = packed_mxfp4(name, tensor, f"{stem}_scale", stored[f"{stem}_scale"])
            else:
                result[stem] = PackedInt4(stem, stored, claims, shapes)
            _drop(result, *(f"{stem}_{part}" for part in _PACKED_PARTS))
        elif name.rpartition(".")[2] == _GPTQ:
            module = name.removesuffix(_GPTQ)
            result[f"{module}weight"] = made = GptqInt4(module, stored, claims)
            if not checked:
                # One of them at once: others are alike, and checked when they are read.
                made.check()
                checked = True
            _drop(result, *(f"{module}{part}" for part in _GPTQ_PARTS))
    return result


def is_dequantized(tensor: StoredTensor) -> bool:
    """Returns whether reading dequantises."""
    return isinstance(tensor, QuantizedTensor)


def _drop(tensors: dict[str, StoredTensor], *names: str) -> None:
    for name in names:
        tensors.pop(name, None)
