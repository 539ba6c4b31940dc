#!/usr/bin/env python3
"""Writes a random checkpoint of a published model's shape, with fewer layers.

    python bench/make_v2lite.py /tmp/v2lite --layers 4      # 1 dense and 3 MoE layers, 4.5 GB
    python bench/make_v2lite.py /tmp/next --layers 4 --shape qwen3_next           # 5.5 GB

DeepSeek-V2-Lite with all its 64 experts, or Qwen3-Next with 128 of its 512. One shard per layer,
written one after the other. The tokenizer is the demo's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Tensors are windows of one pool of random values: generating all would take longer than writing.
POOL = 64 << 20


def v2lite(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def qwen3_next(layers: int) -> dict[str, Any]:
    """Every fourth layer has attention; a token has 10 experts and a shared one."""
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_hidden_layers": layers,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 128,
        "num_experts_per_tok": 10,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def gpt_oss(layers: int) -> dict[str, Any]:
    """gpt-oss-20b: every other layer sees 128 positions, all have sinks and biases."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "torch_dtype": "bfloat16",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def qwen3_moe(layers: int) -> dict[str, Any]:
    """Qwen3-30B-A3B: 128 experts, 32 heads of 4 groups."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


SHAPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "v2lite": v2lite,
    "qwen3_next": qwen3_next,
    "gpt_oss": gpt_oss,
    "qwen3_moe": qwen3_moe,
}


def shapes_of(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns name on disk → shape: single routed experts, gpt-oss' stacked ones as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**values)
    experts = values.get("n_routed_experts") or values.get("num_experts")
    hidden, intermediate = values["hidden_size"], values.get("moe_intermediate_size", 0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.state_dict().items():  # with buffers that checkpoints hold
        prefix, found, _ = name.partition(".experts.")
        if not found or experts is None:
            shapes[name] = tuple(parameter.shape)
            continue
        for expert in range(experts):
            for projection in ("gate", "up", "down"):
                rows, columns = hidden, intermediate
                if projection != "down":
                    rows, columns = columns, rows
                key = f"{prefix}.experts.{expert}.{projection}_proj.weight"
                shapes[key] = (rows, columns)
    return shapes


def shards_of(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yields the names of each shard: tensors outside the layers, then layer after layer."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        words = name.split(".")
        groups.setdefault(words[2] if words[1] == "layers" else "", []).append(name)
    yield from groups.values()


def make_model(folder: Path, shape: str, layers: int) -> None:
    """Writes a checkpoint and the demo's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples/demo/model" / name, folder)
    values = SHAPES[shape](layers)
    (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    write(folder, shapes_of(values))


def write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards_of(shapes)):
        tensors = {}
        for name in names:
            shape = torch.Size(shapes[name])
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            values = pool.repeat(shape.numel() // POOL + 2)
            start = int(torch.randint(POOL, (1,), generator=generator))
            tensors[name] = (values[start : start + shape.numel()] * shape[-1] ** -0.5).view(shape)
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.nbytes for t in tensors.values())
        print(f"{file}: {len(names)} tensors, {total / 1e9:.2f} GB so far", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A random checkpoint of a published shape.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=27, help="with the dense one (1.1 GB each)")
    parser.add_argument("--shape", choices=SHAPES, default="v2lite")
    args = parser.parse_args(argv)
    make_model(args.folder, args.shape, args.layers)


if __name__ == "__main__":
    main()
