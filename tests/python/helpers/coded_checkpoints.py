"""Turns tiny model folders into the quantised formats that big models ship in.

Written from the formats' descriptions, independently of ktrt: names, dtypes and config.json as
published. Each quantised folder comes with its twin of dequantised float32 weights.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from helpers.family_models import Family, random_model
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, torch.Tensor]

SCHEMES = (
    "fp8", "fp8_channel", "int4_g32", "int4_g64", "int4_g128", "gptq_g32", "gptq_g64", "gptq_g128",
    "mxfp4",
)  # fmt: skip
# Tables, norms, routers and the head are plain in every published checkpoint.
_PLAIN = re.compile(
    r"embed_tokens|lm_head|norm|(^|\.)gate\.weight|router|correction_bias|gate_up_proj_bias"
)
_STACK = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Sizes that every group divides; other sizes are left plain where a group does not divide them.
_SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_attention_heads": 4, "head_dim": 64, "kv_lora_rank": 128, "q_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM", "minimax_m2": "MiniMaxM2ForCausalLM",
}  # fmt: skip
FAMILIES = tuple(_CLASSES)


@dataclass(frozen=True)
class CodedFolders:
    """``coded``: the quantised model; ``plain``: its dequantised twin in float32; ``quantized``:
    the names on disk, before quantisation, of the quantised tensors."""

    coded: Path
    plain: Path
    quantized: frozenset[str]


def save_family(folder: Path, family: str, **sizes: Any) -> Path:
    """Saves a tiny random model of one of ``FAMILIES`` in the library's names on disk. ``sizes``
    override the config, whose sizes are multiples of 128 where a format has groups."""
    model_type = "deepseek_v3" if family == "kimi_k2" else family
    changes = {**_SIZES, **({"head_dim": 32} if model_type == "deepseek_v3" else {}), **sizes}
    if family in ("gpt_oss", "minimax_m2"):
        changes.setdefault("rotary_dim", 32)
        changes["intermediate_size"] = sizes.get("intermediate_size", 128)
    model = random_model(Family(model_type, model_type, _CLASSES[family]), changes=changes)
    model.to(torch.bfloat16).save_pretrained(folder)
    if family == "kimi_k2":
        _edit_config(folder, {"model_type": "kimi_k2"})
    return folder


def code_folder(
    model: Path,
    target: Path,
    scheme: str,
    *,
    experts_only: bool = False,
    **options: Any,
) -> CodedFolders:
    """Writes ``target`` (quantised by one of ``SCHEMES``) and ``target``-plain from a folder with a
    single file. ``experts_only`` leaves other linears plain, as Kimi-K2-Thinking does (MXFP4 always
    does); stacked experts, as gpt-oss's, are quantised in MXFP4 and FP8. Options of ``encode``:
    ``block``, ``scale_dtype``, ``zeros``."""
    stored: Tensors = {}
    plain: Tensors = {}
    quantized = set()
    for name, weight in load_file(model / "model.safetensors").items():
        value = weight.float()
        routed = ".experts." in name
        wanted = not _PLAIN.search(name) and (routed or not (experts_only or scheme == "mxfp4"))
        coded = _encode_named(name, value, scheme, options) if wanted else None
        if coded is None:
            stored[name], plain[name] = weight, value
            continue
        tensors, plain[name] = coded
        stored |= tensors
        quantized.add(name)
    twin = target.with_name(f"{target.name}-plain")
    ignored = sorted({n.removesuffix(".weight") for n in stored if n in plain and n not in quantized
                      and n.endswith("_proj.weight")})  # fmt: skip
    for folder, tensors in ((target, stored), (twin, plain)):
        folder.mkdir(parents=True)
        for file in model.glob("*.json"):
            shutil.copy(file, folder)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    _edit_config(target, {"quantization_config": quantization_config(scheme, ignored, **options)})
    _edit_config(twin, {"dtype": "float32", "torch_dtype": "float32"})
    return CodedFolders(target, twin, frozenset(quantized))


def _encode_named(
    name: str, value: torch.Tensor, scheme: str, options: dict[str, Any]
) -> tuple[Tensors, torch.Tensor] | None:
    """Returns (tensors by name, dequantised), or None for what the format leaves plain."""
    if scheme == "mxfp4" and _STACK.fullmatch(name) and value.ndim == 3:
        encoded, plain = mxfp4(value.transpose(1, 2))
        blocks = encoded["codes"].unflatten(-1, (-1, 16))
        stack = {f"{name}_blocks": blocks, f"{name}_scales": encoded["scales"]}
        return stack, plain.transpose(1, 2)
    if scheme == "fp8" and value.ndim == 3 and _STACK.fullmatch(name):
        pairs = [fp8_block(matrix, **options) for matrix in value]
        stack = {name: "weight", f"{name}_scale_inv": "weight_scale_inv"}
        return (
            {key: torch.stack([tensors[word] for tensors, _ in pairs])
             for key, word in stack.items()},
            torch.stack([plain for _, plain in pairs]),
        )  # fmt: skip
    if value.ndim != 2 or not name.endswith(".weight"):
        return None
    group = group_of(scheme)
    if group and value.shape[1] % group:
        return None
    tensors, plain = encode(value, scheme, **options)
    stem = name.removesuffix("weight")
    return {f"{stem}{suffix}": tensor for suffix, tensor in tensors.items()}, plain


def group_of(scheme: str) -> int:
    """Returns the columns of one scale; 0 for FP8."""
    number = re.search(r"_g(\d+)$", scheme)
    return 32 if scheme == "mxfp4" else int(number[1]) if number else 0


def encode(weight: torch.Tensor, scheme: str, **options: Any) -> tuple[Tensors, torch.Tensor]:
    """Quantises float32 [n, k]. Returns the tensors by the last word of their published names, and
    the dequantised matrix in float32."""
    encoders: dict[str, Callable[..., tuple[Tensors, torch.Tensor]]] = {
        "fp8": fp8_block, "fp8_channel": fp8_channel, "mxfp4": _mxfp4_matrix,
    }  # fmt: skip
    if scheme in encoders:
        return encoders[scheme](weight, **options)
    make = gptq if scheme.startswith("gptq") else pack_quantized
    return make(weight, group_of(scheme), **options)


def fp8_block(
    weight: torch.Tensor,
    block: tuple[int, int] = (128, 128),
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek-V3's FP8; the last blocks may be cut off."""
    n, k = weight.shape
    rows, columns = torch.arange(n) // block[0], torch.arange(k) // block[1]
    scales = torch.zeros(-(-n // block[0]), -(-k // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            scales[i, j] = weight[rows == i][:, columns == j].abs().max() / 400
    scales = scales.to(scale_dtype)
    full = scales.float()[rows][:, columns]
    codes = (weight / full).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * full


def fp8_channel(
    weight: torch.Tensor, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' float-quantized with strategy channel, as GLM-4.5-FP8."""
    scales = (weight.abs().amax(1, keepdim=True) / 400).to(scale_dtype)
    codes = (weight / scales.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def _int4(
    weight: torch.Tensor, group: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns codes -7 … 7 [n, k], scales [n, ⌈k / group⌉], dequantised."""
    columns = torch.arange(weight.shape[1]) // group
    scales = torch.stack(
        [weight[:, columns == j].abs().amax(1) / 7 for j in range(int(columns[-1]) + 1)], dim=1
    ).to(scale_dtype)
    full = scales.float()[:, columns]
    codes = (weight / full).round().clamp(-7, 7)
    return codes.to(torch.int64), scales, codes * full


def pack_quantized(
    weight: torch.Tensor, group: int, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' pack-quantized: nibble i of word c is column 8c + i, plus 8."""
    codes, scales, plain = _int4(weight, group, scale_dtype)
    n, k = codes.shape
    padded = torch.zeros(n, -(-k // 8) * 8, dtype=torch.int64)
    padded[:, :k] = codes + 8
    return {
        "weight_packed": _words(padded.view(n, -1, 8)),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k], dtype=torch.int32),
    }, plain


def gptq(
    weight: torch.Tensor,
    group: int,
    scale_dtype: torch.dtype = torch.float16,
    zeros: int = 7,
) -> tuple[Tensors, torch.Tensor]:
    """Symmetric GPTQ: nibble i of word row r is row 8r + i of the transpose. ``zeros``: 7 in the
    first convention (zero point - 1), 8 in gptq_v2."""
    codes, scales, plain = _int4(weight, group, scale_dtype)
    n, k = codes.shape
    words = _words((codes + 8).T.reshape(k // 8, 8, n).transpose(1, 2))
    zero_points = torch.full((scales.shape[1], n // 8, 8), zeros, dtype=torch.int64)
    return {
        "qweight": words,
        "qzeros": _words(zero_points),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(k) // group).to(torch.int32),
    }, plain


def _words(nibbles: torch.Tensor) -> torch.Tensor:
    """Packs the last dimension, 8 nibbles from the lowest, to int32."""
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """OCP MXFP4 of [..., n, k]: codes [..., n, k / 2] (first in the low half), scales uint8
    [..., n, k / 32], and the dequantised values."""
    blocks = weight.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1).clamp_min(2.0**-60)
    # The largest power of two that leaves the largest value at 4 … 8; 6 … 8 saturates.
    exponents = torch.floor(torch.log2(largest)) - 2
    scaled = blocks / torch.exp2(exponents)[..., None]
    nearest = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8).flatten(-2)
    values = _E2M1[nearest] * torch.where(scaled < 0, -1.0, 1.0) * torch.exp2(exponents)[..., None]
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {"codes": packed, "scales": (exponents + 127).to(torch.uint8)}, values.flatten(-2)


def _mxfp4_matrix(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek-V4's experts: int8 with two codes, scales in E8M0."""
    encoded, plain = mxfp4(weight)
    return {
        "weight": encoded["codes"].view(torch.int8),
        "scale": encoded["scales"].view(torch.float8_e8m0fnu),
    }, plain


def quantization_config(scheme: str, ignored: list[str], **options: Any) -> dict[str, Any]:
    """Returns config.json's description as published checkpoints have it."""
    if scheme == "fp8":
        return {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": list(options.get("block", (128, 128))),
        }  # fmt: skip
    if scheme == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", *ignored]}
    if scheme.startswith("gptq"):
        v2 = options.get("zeros", 7) == 8
        return {
            "quant_method": "gptq", "bits": 4, "group_size": group_of(scheme), "sym": True,
            "desc_act": False, "checkpoint_format": "gptq_v2" if v2 else "gptq",
        }  # fmt: skip
    group = group_of(scheme)
    weights = {
        "num_bits": 4 if group else 8, "type": "int" if group else "float", "symmetric": True,
        "strategy": "group" if group else "channel", "group_size": group or None,
        "actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": "pack-quantized" if group else "float-quantized", "kv_cache_scheme": None,
        "config_groups": {"group_0": {
            "input_activations": None, "output_activations": None, "targets": ["Linear"],
            "weights": weights}},
        "ignore": ["lm_head", *ignored],
    }  # fmt: skip


def _edit_config(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(values | changes), "utf-8")
