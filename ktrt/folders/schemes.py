"""Recognises quantisation schemes that ktrt does not read by tensor names and dtypes, whatever
config.json says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


class Header(Protocol):
    """A tensor's entry in a file's header."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


_PACKED_DTYPES = ("I8", "U8", "I32", "U32", "I16", "I64", "F4", "F8_E4M3", "F8_E5M2")
# Dtypes of scales that are powers of two, which MXFP4 has.
_POWERS = ("U8", "F8_E8M0")
_GPTQ, _PACKED = "qweight", "weight_packed"
# Last word of a tensor's name → scheme that writes it; the first entry that occurs counts.
_BY_NAME = {
    "weight_scale_2": "NVFP4 (TensorRT Model Optimizer)",
    "weight_global_scale": "NVFP4 (compressed-tensors, nvfp4-pack-quantized)",
    "absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes, 4 bits",
    "bitsandbytes__nf4": "bitsandbytes, 4 bits",
    "bitsandbytes__fp4": "bitsandbytes, 4 bits",
    "SCB": "bitsandbytes, 8 bits",
    "weight_zero_point": "compressed-tensors with zero points (asymmetric)",
    _GPTQ: "AWQ",  # or GPTQ, which is read: by the shapes
    _PACKED: "NVFP4 (compressed-tensors, nvfp4-pack-quantized)",  # or read: by the dtypes
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "weight_scales": "EETQ",
    "biases": "MLX",
    "input_scale": "FP8 with static activation scales",
    "activation_scale": "FP8 with static activation scales",
}
_READS = (
    "ktrt reads BF16, F16, F32, FP8 (E4M3) with scales by block, row or tensor, symmetric INT4 "
    "(compressed-tensors pack-quantized, GPTQ without desc_act), and MXFP4"
)


def named_scheme(names: Iterable[str], *, certain: bool = False) -> tuple[str, str] | None:
    """Does the same as ``unread_scheme`` by names alone, which a model's parameters may share.
    ``certain`` leaves out names that supported schemes share."""
    for name in names:
        word = name.rpartition(".")[2]
        if word in _BY_NAME and not (certain and word in (_GPTQ, _PACKED)):
            return _BY_NAME[word], name
    return None


def unread_scheme(stored: Mapping[str, Header]) -> tuple[str, str] | None:
    """Returns the unsupported scheme and a tensor that shows it; None if there is none."""
    return _by_name(stored) or _by_scales(stored)


def refusal(where: Path, scheme: str, name: str, tensor: Header | None) -> str:
    """Returns the message with the finding and advice."""
    form = "" if tensor is None else f" (dtype {tensor.dtype}, shape {list(tensor.shape)})"
    return (
        f"{where}: the weights are quantised as {scheme}: see {name}{form}. {_READS}. Use a BF16 "
        "checkpoint of this model: one that is published, or this one dequantised."
    )


def _by_name(stored: Mapping[str, Header]) -> tuple[str, str] | None:
    first: dict[str, str] = {}
    for name in stored:
        word = name.rpartition(".")[2]
        if word in _BY_NAME:
            first.setdefault(word, name)
    for word, scheme in _BY_NAME.items():
        if word not in first:
            continue
        name = first[word]
        # A model's parameter may have this name, but not with packed codes in the same module.
        if not any(_is_coded(stored, each) for each in _same_module(stored, name)):
            continue
        if (word == _GPTQ and not _is_awq(stored, name)) or (
            word == _PACKED and not _is_nvfp4(stored, name)
        ):
            continue
        return scheme, name
    return None


def _same_module(stored: Mapping[str, Header], name: str) -> list[str]:
    """Returns the weights of the module; bitsandbytes' statistics are named after the weight."""
    module = name.rpartition(".")[0]
    known = ("weight", "qweight", "weight_packed", "W_q", "codes")
    return [n for n in (name, module, *(f"{module}.{word}" for word in known)) if n in stored]


def _is_coded(stored: Mapping[str, Header], name: str) -> bool:
    return stored[name].dtype in _PACKED_DTYPES


def _is_awq(stored: Mapping[str, Header], name: str) -> bool:
    """GPTQ packs inputs, so its columns are the outputs. AWQ packs outputs."""
    module = name.rpartition(".")[0]
    scales = stored.get(f"{module}.scales")
    if scales is None or not scales.shape or f"{module}.g_idx" in stored:
        return False
    return scales.shape[-1] != (stored[name].shape or (0,))[-1]


def _is_nvfp4(stored: Mapping[str, Header], name: str) -> bool:
    scale = stored.get(f"{name.removesuffix('_packed')}_scale")
    return stored[name].dtype != "I32" and (scale is None or scale.dtype not in _POWERS)


def _by_scales(stored: Mapping[str, Header]) -> tuple[str, str] | None:
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale")
        if scale is None or not re.search(r"weight$|_proj$", name):
            continue
        # With bytes as scales, two MXFP4 codes lie in each of the weight's.
        if tensor.dtype == "I8" and scale.dtype not in _POWERS:
            return "compressed-tensors int-quantized (INT8)", name
    return None
