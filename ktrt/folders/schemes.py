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
# Last word of a tensor's name → scheme that writes it; the first entry that occurs counts.
_BY_NAME = {
    "weight_scale_2": "NVFP4 (TensorRT Model Optimizer)",
    "weight_global_scale": "NVFP4 (compressed-tensors, nvfp4-pack-quantized)",
    "absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes, 4 bits",
    "bitsandbytes__nf4": "bitsandbytes, 4 bits",
    "bitsandbytes__fp4": "bitsandbytes, 4 bits",
    "SCB": "bitsandbytes, 8 bits",
    "qweight": "GPTQ or AWQ",  # which: by the shapes
    "weight_packed": "compressed-tensors",  # which: by the dtypes
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "weight_scales": "EETQ",
    "biases": "MLX",
    "input_scale": "FP8 with static activation scales",
    "activation_scale": "FP8 with static activation scales",
}
_READS = "ktrt reads BF16, F16, F32, FP8 (E4M3) with scales by block, row or tensor, and MXFP4"


def named_scheme(names: Iterable[str]) -> tuple[str, str] | None:
    """Does the same as ``unread_scheme`` by names alone, which a model's parameters may share."""
    for name in names:
        if scheme := _BY_NAME.get(name.rpartition(".")[2]):
            return scheme, name
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
        if word == "qweight":
            return _gptq_or_awq(stored, name), name
        if word == "weight_packed":
            return _compressed(stored, name), name
        return scheme, name
    return None


def _same_module(stored: Mapping[str, Header], name: str) -> list[str]:
    """Returns the weights of the module; bitsandbytes' statistics are named after the weight."""
    module = name.rpartition(".")[0]
    known = ("weight", "qweight", "weight_packed", "W_q", "codes")
    return [n for n in (name, module, *(f"{module}.{word}" for word in known)) if n in stored]


def _is_coded(stored: Mapping[str, Header], name: str) -> bool:
    return stored[name].dtype in _PACKED_DTYPES


def _gptq_or_awq(stored: Mapping[str, Header], name: str) -> str:
    module = name.rpartition(".")[0]
    scales = stored.get(f"{module}.scales")
    if scales is None:
        return _BY_NAME["qweight"]
    # GPTQ packs inputs, so its columns are the outputs. AWQ packs outputs.
    columns = (stored[name].shape or (0,))[-1]
    packs_outputs = scales.shape and scales.shape[-1] != columns
    return "AWQ" if packs_outputs and f"{module}.g_idx" not in stored else "GPTQ"


def _compressed(stored: Mapping[str, Header], name: str) -> str:
    if stored[name].dtype != "I32":
        return "compressed-tensors (mxfp4-pack-quantized or nvfp4-pack-quantized)"
    scale = stored.get(f"{name.removesuffix('_packed')}_scale")
    shape = stored.get(f"{name.removesuffix('_packed')}_shape")
    group = ""
    if scale is not None and len(scale.shape) == len(stored[name].shape) == 2 and shape is not None:
        # A word holds eight 4-bit codes; pack-quantized rarely has 8 bits.
        group = f" in groups of {8 * stored[name].shape[1] // max(scale.shape[1], 1)}"
    return f"compressed-tensors pack-quantized (INT4{group}, or as many bits as config.json says)"


def _by_scales(stored: Mapping[str, Header]) -> tuple[str, str] | None:
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale")
        if scale is None or not re.search(r"weight$|_proj$", name):
            continue
        # With bytes as scales, two MXFP4 codes lie in each of the weight's.
        if tensor.dtype == "I8" and scale.dtype not in ("U8", "F8_E8M0"):
            return "compressed-tensors int-quantized (INT8)", name
    return None
