"""Writes adapters with other trainers' names and packing, from ``adapter_layouts``' numbers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from helpers.adapter_layouts import Adapter, P, Tensors, write_a, write_b
from helpers.tiny_models import read_folder, write_adapter
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

INDEX = "adapter_model.safetensors.index.json"
# auto_mapping of PEFT, and of Unsloth.
PLAIN: dict[str, Any] = {"auto_mapping": None}
UNSLOTH: dict[str, Any] = {
    "auto_mapping": {
        "base_model_class": "Qwen3MoeForCausalLM",
        "parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "unsloth_fixed": True,
    }
}


def change(folder: Path, rename: Callable[[str], str], **config: Any) -> Path:
    """Changes the keys and entries of the configuration of the adapter in ``folder``."""
    tensors, old = read_folder(folder)
    renamed = {rename(key): value for key, value in tensors.items()}
    assert len(renamed) == len(tensors)
    return write_adapter(folder, renamed, old | config)


def write_grouped(folder: Path, adapter: Adapter, **config: Any) -> Path:
    """Writes Unsloth's packing before 2026-09: B's columns e·r + j, ``B.view(out, E, r)``."""
    write_b(folder, adapter)
    tensors, old = read_folder(folder)
    for key, b in tensors.items():
        if re.search(r"experts(\.base_layer)?\.lora_B", key):
            by_rank = b.reshape(b.shape[0], adapter.rank, adapter.num_experts)
            tensors[key] = by_rank.transpose(1, 2).reshape(b.shape).contiguous()
    return write_adapter(folder, tensors, old | config)


def write_automodel(folder: Path, adapter: Adapter) -> Path:
    """Writes NVIDIA NeMo Automodel's names: y += scale · (x A) B, gate and up in one."""
    tensors = adapter.rest()
    for layer, loras in adapter.experts.items():
        path = f"{P}model.layers.{layer}.mlp.experts"
        (a, gate), (_, up) = loras["gate"], loras["up"]
        pairs = {"gate_and_up": (a, torch.cat([gate, up], 1)), "down": loras["down"]}
        for name, (first, second) in pairs.items():
            tensors[f"{path}.lora_{name}_A"] = first.transpose(1, 2).contiguous()
            tensors[f"{path}.lora_{name}_B"] = second.transpose(1, 2).contiguous()
    return write_adapter(folder, tensors, adapter.config())


def write_tinker(folder: Path, adapter: Adapter) -> Path:
    """Writes Tinker's raw files: w1, w3, w2 for any family, [E or 1, …], ``attn``; all-linear."""
    tensors = {key.replace("self_attn", "attn"): value for key, value in adapter.rest().items()}
    for layer, loras in adapter.experts.items():
        for word, projection in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            for half, stack in zip("AB", loras[projection], strict=True):  # type: ignore[index]
                own = stack[:1] if stack.stride(0) == 0 else stack
                key = f"{P}model.layers.{layer}.mlp.experts.{word}.lora_{half}.weight"
                tensors[key] = own.clone(memory_format=torch.contiguous_format)
    config = adapter.config(target_modules="all-linear", bias="none", fan_in_fan_out=False)
    return write_adapter(folder, tensors, config)


def write_listed(folder: Path, adapter: Adapter) -> Path:
    """Writes Unsloth's gpt-oss in 4 bits: lists of Linears, gate and up in one."""
    tensors = adapter.rest()
    for layer, loras in adapter.experts.items():
        (a, gate), (_, up) = loras["gate"], loras["up"]
        pairs = {"gate_up": (a, torch.cat([gate, up], 1)), "down": loras["down"]}
        for name, pair in pairs.items():
            for half, stack in zip("AB", pair, strict=True):
                for expert, matrix in enumerate(stack):
                    module = f"model.layers.{layer}.mlp.experts.{name}_projs.{expert}"
                    tensors[f"{P}{module}.lora_{half}.weight"] = matrix.clone()
    targets = [f"{name}_projs.{n}" for name in ("gate_up", "down") for n in range(2)]
    return write_adapter(folder, tensors, adapter.config(target_modules=["q_proj", *targets]))


def write_shards(folder: Path, adapter: Adapter, *, index: bool = True) -> Path:
    write_a(folder, adapter)
    tensors, config = read_folder(folder)
    (folder / "adapter_model.safetensors").unlink()
    shards: list[Tensors] = [{}, {}, {}]
    for number, (key, value) in enumerate(tensors.items()):
        shards[number % 3][key] = value
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"adapter_model-{number:05d}-of-00003.safetensors"
        save_file(shard, folder / name)
        where |= dict.fromkeys(shard, name)
    if index:
        content = {"metadata": {}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")
    del config
    return folder


def _inside(key: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        key = key.replace(old, new)
    return key


# Name changes by training wrappers and PEFT.
RENAMES: dict[str, Callable[[str], str]] = {
    "DDP": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace(P, f"{P}module."),
    "compile": lambda key: key.replace(P, f"{P}_orig_mod."),
    "compiled blocks": lambda key: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", key),
    "FSDP": lambda key: _inside(key, {"layers": "_fsdp_wrapped_module.layers",
                                      "mlp.": "_fsdp_wrapped_module.mlp."}),
    "checkpointing": lambda key: re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", key),
    "all at once": lambda key: "module._orig_mod." + re.sub(
        r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", key),
    "adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another name": lambda key: key.replace(".weight", ".my_run-3.weight"),
    "wrapped and named": lambda key: f"module.{key.replace('.weight', '.v2.weight')}",
    "no prefix": lambda key: key.removeprefix(P),
    "twice PEFT": lambda key: f"{P}{key}",
    "multimodal class": lambda key: key.replace("model.layers", "model.language_model.layers"),
    "older multimodal": lambda key: key.replace("model.layers", "language_model.model.layers"),
    "text tower": lambda key: key.replace("model.layers", "model.text_model.layers"),
    "bare layers": lambda key: key.replace(f"{P}model.", P),
}  # fmt: skip
WRITERS: dict[str, Callable[[Path, Adapter], Path]] = {
    "automodel": write_automodel,
    "tinker": write_tinker,
    "listed": write_listed,
    "shards": write_shards,
    "shards without index": lambda folder, adapter: write_shards(folder, adapter, index=False),
}
