"""Builds folders with random weights from the metadata of published models (tests/data/real).

Each file holds a published config.json, the sizes to shrink so that a few layers fit into a test,
and the names and quantisation of the tensors on disk. The reference is transformers' class in
float32 with the dequantised values.
"""

from __future__ import annotations

import copy
import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers.tiny_models import write_adapter
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING
from transformers.initialization import no_init_weights
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]

DATA = Path(__file__).parents[2] / "data" / "real"
NAMES = sorted(path.stem for path in DATA.glob("*.json"))
VOCAB_SIZE = 320
_BLOCK = 128
# Further shrinking. transformers names the sizes of Kimi's tower differently from its config.json,
# and uses defaults instead.
_MOST_EXPERTS = 16
_MORE: dict[str, Any] = {
    "intermediate_size": {10944: 640, 2304: 640, 2736: 640, 2816: 640},
    "vision_config": {
        "kimi_k25": {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 128,
                     "num_attention_heads": 2, "projection_hidden_size": 96},
    },
}  # fmt: skip
_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
# BF16 tensors in FP8 checkpoints: tables, the head, norms, routers, and anything but matrices.
_NEVER_FP8 = re.compile(r"embed_tokens|lm_head|norm|(^|\.)gate\.weight|correction_bias")


@dataclass
class RealModel:
    """``stored``: the tensors on disk; ``plain``: their values by transformers' names, in BF16
    unless quantised; ``twin``: the tensors on disk without quantisation."""

    meta: dict[str, Any]
    config: dict[str, Any]
    plain: Tensors
    stored: Tensors
    twin: Tensors

    @property
    def quantised(self) -> bool:
        return "quant" in self.meta

    def write(self, folder: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
        """Writes ``tensors`` (default: ``stored``) as a model folder; ``changes`` its config."""
        folder.mkdir(parents=True)
        text = json.dumps(self.config | changes)
        (folder / "config.json").write_text(text, encoding="utf-8")
        stored = self.stored if tensors is None else tensors
        save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors")
        return folder

    def reference(self) -> Any:
        """Returns transformers' class in float32."""
        with no_init_weights():
            config = reference_config(self.meta, self.config)
            model = _reference_class(self.meta, self.config)(config)
        missing = model.load_state_dict({n: t.float() for n, t in self.plain.items()}, strict=False)
        assert not missing.missing_keys, missing.missing_keys
        assert not missing.unexpected_keys, missing.unexpected_keys
        return model.eval()


def read_meta(name: str) -> dict[str, Any]:
    """Reads the metadata of one of ``NAMES``."""
    meta: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text("utf-8"))
    return meta


def shrunk(meta: dict[str, Any], vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """Returns the published config with small sizes and a small vocabulary; keeps all other
    keys."""
    config: dict[str, Any] = copy.deepcopy(meta["config"])
    sizes = dict(meta["shrink"])
    for inner, where in ((config, ""), (config.get("text_config", {}), "text_config.")):
        if "vocab_size" in inner:
            sizes[f"{where}vocab_size"] = vocab_size
            for key in ("pad_token_id", "bos_token_id"):
                if isinstance(inner.get(key), int):
                    sizes[f"{where}{key}"] = 0
    for key, value in sizes.items():
        *words, last = key.split(".")
        inner = config
        for name in words:
            inner = inner[name]
        if "experts" in last:
            value = min(value, _MOST_EXPERTS)
        inner[last] = value
        if (size := inner.get("intermediate_size")) in _MORE["intermediate_size"]:
            inner["intermediate_size"] = _MORE["intermediate_size"][size]
    if more := _MORE["vision_config"].get(config["model_type"]):
        config["vision_config"] |= more
    return config


def reference_config(meta: dict[str, Any], config: dict[str, Any]) -> Any:
    """Returns the config for transformers' class: a known model type, no quantisation."""
    values = copy.deepcopy(config)
    values.pop("quantization_config", None)
    for inner in (values, values.get("text_config", {})):
        inner.pop("dtype", None)
        inner.pop("torch_dtype", None)
    for key, value in meta.get("reference", {}).items():
        *words, last = key.split(".")
        inner = values
        for name in words:
            inner = inner[name]
        inner[last] = value
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def _reference_class(meta: dict[str, Any], config: dict[str, Any]) -> Any:
    return getattr(transformers, meta.get("class") or config["architectures"][0])


def make(name: str) -> RealModel:
    """Returns a model with random weights, equal for equal names."""
    meta = read_meta(name)
    config = shrunk(meta)
    with torch.device("meta"):
        shapes = _reference_class(meta, config)(reference_config(meta, config)).state_dict()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    plain: Tensors = {n: _random(n, tuple(s.shape), generator) for n, s in shapes.items()}
    stored: Tensors = {}
    twin: Tensors = {}
    for parameter, value in list(plain.items()):
        for disk, tensor in _on_disk(meta, parameter, value).items():
            twin[disk] = tensor
            stored |= _quantised(meta, disk, tensor, generator)
    if "quant" in meta:
        plain = _dequantised(meta, plain, stored)
    for tensors in (stored, twin):
        _add_extra(meta, tensors, generator)
    return RealModel(meta, config, plain, stored, twin)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        values = (1 + 15 * torch.rand(shape, generator=generator)).log()
    elif "norm" in name and len(shape) == 1:
        values = 1 + 0.1 * values
    elif len(shape) < 2:
        values = 0.1 * values
    elif "embed" not in name:
        values = values / math.sqrt(shape[-1])
    return values.to(torch.bfloat16)


def _on_disk(meta: dict[str, Any], parameter: str, value: torch.Tensor) -> Tensors:
    layout, match = meta["experts"]["layout"], _EXPERTS.fullmatch(parameter)
    tensors = {parameter: value}
    if match and layout == "fused_transposed":
        tensors = {parameter: value.transpose(-1, -2)}
    elif match and layout == "per_expert":
        gate, up, down = meta["experts"]["names"]
        stacks = {down: value}
        if match[2] == "gate_up_proj":
            stacks = dict(zip((gate, up), value.chunk(2, dim=1), strict=True))
        tensors = {
            f"{match[1]}.{expert}.{leaf}.weight": matrix
            for leaf, stack in stacks.items()
            for expert, matrix in enumerate(stack)
        }
    return {_renamed(meta, name): tensor for name, tensor in tensors.items()}


def _renamed(meta: dict[str, Any], name: str) -> str:
    for pattern, replacement in meta.get("rename", ()):
        name = re.sub(pattern, replacement, name)
    return name


def _quantised(
    meta: dict[str, Any], name: str, value: torch.Tensor, generator: torch.Generator
) -> Tensors:
    scheme = meta.get("quant", {}).get("format")
    if scheme == "fp8_block" and value.ndim == 2 and name.endswith(".weight"):
        skip = meta["quant"].get("skip")
        if not _NEVER_FP8.search(name) and not (skip and re.search(skip, name)):
            return fp8(name, value)
    if scheme == "mxfp4" and (match := _EXPERTS.fullmatch(name)):
        experts, inputs, outputs = value.shape
        blocks = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator
        )
        # Values up to 6, times about 1 / sqrt(inputs).
        scales = torch.randint(119, 122, blocks.shape[:3], dtype=torch.uint8, generator=generator)
        return {f"{match[0]}_blocks": blocks, f"{match[0]}_scales": scales}
    return {name: value}


def fp8(name: str, value: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    """Quantises to E4M3 codes in blocks of 128 × 128, the last ones cut off, like DeepSeek-V3."""
    rows, columns = (-(-size // _BLOCK) for size in value.shape)
    padded = torch.zeros(rows * _BLOCK, columns * _BLOCK)
    padded[: value.shape[0], : value.shape[1]] = value
    blocks = padded.view(rows, _BLOCK, columns, _BLOCK)
    scales = (blocks.abs().amax(dim=(1, 3)) / 400).to(scale_dtype)
    codes = (blocks / scales.float()[:, None, :, None]).view(padded.shape)
    codes = codes[: value.shape[0], : value.shape[1]].to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantises element by element, independently of ktrt."""
    rows, columns = (torch.arange(size) // _BLOCK for size in codes.shape)
    return codes.float() * scales.float()[rows][:, columns]


def _dequantised(meta: dict[str, Any], plain: Tensors, stored: Tensors) -> Tensors:
    result = {}
    for parameter, value in plain.items():
        if f"{parameter}_blocks" in stored:
            result[parameter] = convert_moe_packed_tensors(
                stored[f"{parameter}_blocks"], stored[f"{parameter}_scales"], dtype=torch.float32
            )
            continue
        matrices = [
            dequantised(stored[disk], stored[f"{disk}_scale_inv"])
            if f"{disk}_scale_inv" in stored
            else stored[disk].float()
            for disk in _on_disk(meta, parameter, value)
        ]
        result[parameter] = _joined(meta, parameter, matrices)
    return result


def _joined(meta: dict[str, Any], parameter: str, matrices: list[torch.Tensor]) -> torch.Tensor:
    match = _EXPERTS.fullmatch(parameter)
    if match is None or meta["experts"]["layout"] != "per_expert":
        return matrices[0]
    if match[2] == "down_proj":
        return torch.stack(matrices)
    half = len(matrices) // 2  # all gates, then all ups
    return torch.cat([torch.stack(matrices[:half]), torch.stack(matrices[half:])], dim=1)


def _add_extra(meta: dict[str, Any], tensors: Tensors, generator: torch.Generator) -> None:
    """Adds the layers that predict further tokens, which transformers does not know."""
    extra = meta.get("extra", {})
    for pattern, replacement in extra.get("copy", ()):
        for name in [name for name in tensors if re.search(pattern, name)]:
            tensors.setdefault(re.sub(pattern, replacement, name), tensors[name].clone())
    for name, shape in extra.get("new", {}).items():
        tensors[name] = _random(name, tuple(shape), generator)


def write_lora(folder: Path, model: RealModel, rank: int = 4) -> Path:
    """Writes LoRA on the routed experts and on attention's output, in the users' layout."""
    generator = torch.Generator().manual_seed(3)
    tensors: Tensors = {}
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "peft_version": "0.21.0",
        "target_modules": r".*\.self_attn\.o_proj",
    }  # fmt: skip
    if model.meta["experts"]["layout"] == "per_expert":
        leaves = "|".join(model.meta["experts"]["names"])
        config["target_modules"] += rf"|.*\.experts\.\d+\.({leaves})"

    def pair(key: str, size_in: int, size_out: int, count: int = 1) -> None:
        a = torch.randn(count * rank, size_in, generator=generator) / math.sqrt(size_in)
        b = torch.randn(size_out, count * rank, generator=generator) / math.sqrt(rank)
        tensors[f"base_model.model.{key}.lora_A.weight"] = a
        tensors[f"base_model.model.{key}.lora_B.weight"] = 0.5 * b

    for name, value in model.plain.items():
        match = _EXPERTS.fullmatch(name)
        if re.search(r"layers\.\d+\.self_attn\.o_proj\.weight", name):
            pair(name.removesuffix(".weight"), value.shape[1], value.shape[0])
        elif match and model.meta["experts"]["layout"] == "per_expert":
            for disk, matrix in _on_disk(model.meta, name, value).items():
                pair(disk.removesuffix(".weight"), matrix.shape[1], matrix.shape[0])
        elif match:
            experts, rows, columns = value.shape
            infix = ".base_layer" if match[2] == "gate_up_proj" else ""
            pair(f"{match[1]}{infix}", columns, rows, experts)
            config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return write_adapter(folder, tensors, config)
