#!/usr/bin/env python3
"""Writes a random checkpoint of DeepSeek-V2-Lite's shape: all 64 experts, `--layers` layers.

    python bench/make_v2lite.py /tmp/v2lite --layers 4      # 1 dense and 3 MoE layers, 4.5 GB

One shard per layer, written one after the other. The tokenizer is the demo's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
EXPERTS, HIDDEN, INTERMEDIATE = 64, 2048, 1408
# Tensors are windows of one pool of random values: generating all would take longer than writing.
POOL = 64 << 20


def config_of(layers: int) -> dict[str, object]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
        "hidden_size": HIDDEN,
        "intermediate_size": 10944,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": EXPERTS,
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


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Returns name on disk → shape, with single routed experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**config_of(layers))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        prefix, found, _ = name.partition(".experts.")
        if not found:
            shapes[name] = tuple(parameter.shape)
            continue
        for expert in range(EXPERTS):
            for projection in ("gate", "up", "down"):
                rows, columns = HIDDEN, INTERMEDIATE
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


def write(folder: Path, layers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    shapes = shapes_of(layers)
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
    parser = argparse.ArgumentParser(description="A random checkpoint of DeepSeek-V2-Lite's shape.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=27, help="with the dense one (1.1 GB each)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples/demo/model" / name, args.folder)
    config = json.dumps(config_of(args.layers), indent=1)
    (args.folder / "config.json").write_text(config, encoding="utf-8")
    write(args.folder, args.layers)


if __name__ == "__main__":
    main()
