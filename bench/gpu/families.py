#!/usr/bin/env python3
"""Decode steps of published families on a GPU, loaded as the chat loads them.

    python bench/gpu/families.py [SHAPE …] [--layers 8] [--lengths 1024,8192] [--keep DIR] [--json]

Each shape has a family's published sizes with fewer layers and experts (a token reads as many as it
does there), random weights and INT8 experts. The bound of a step is the bytes of its experts over
the read bandwidth of the same run. "Error": the logits of a step by the graph, relative to the
plain forward's logits of the same token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from make_v2lite import SHAPES, shapes_of, write

from ktrt import _core
from ktrt.config import load_config
from ktrt.loading.inventory import loaded_inventory
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROBE_BYTES = 1 << 30
COMMON = {
    "torch_dtype": "bfloat16", "max_position_embeddings": 65536, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6,
}  # fmt: skip


def _windows(layers: int, period: int, *, last: bool = False) -> list[str]:
    """Every ``period``-th layer sees everything, and the last one if ``last``."""
    return [
        "full_attention" if i % period == period - 1 or (last and i == layers - 1)
        else "sliding_attention"
        for i in range(layers)
    ]  # fmt: skip


def gpt_oss(layers: int) -> dict[str, Any]:
    return COMMON | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": layers,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
        "num_local_experts": 8, "num_experts_per_tok": 4, "layer_types": _windows(layers, 2),
        "hidden_act": "silu",
    }  # fmt: skip


def qwen3_moe(layers: int) -> dict[str, Any]:
    return COMMON | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 32, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "hidden_act": "silu",
    }  # fmt: skip


def gemma4(layers: int) -> dict[str, Any]:
    return COMMON | {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "vocab_size": 262144,
        "hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 2,
        "sliding_window": 1024, "layer_types": _windows(layers, 6, last=True),
        "enable_moe_block": True, "num_experts": 32, "top_k_experts": 8,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "pad_token_id": 0,
    }  # fmt: skip


def mimo(layers: int) -> dict[str, Any]:
    return COMMON | {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash",
        "vocab_size": 152576, "hidden_size": 4096, "intermediate_size": 16384,
        "moe_intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128, "sliding_window": 128,
        "layer_types": _windows(layers, 6, last=True),
        "n_routed_experts": 8, "num_experts": 8, "num_experts_per_tok": 8, "hidden_act": "silu",
    }  # fmt: skip


def qwen3_5_moe(layers: int) -> dict[str, Any]:
    values = SHAPES["qwen3_next"](layers) | COMMON
    kinds = ["linear_attention" if i % 4 != 3 else "full_attention" for i in range(layers)]
    return values | {
        "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
        "num_experts": 32, "num_experts_per_tok": 8, "layer_types": kinds,
        "vocab_size": 248320,
    }  # fmt: skip


def deepseek_v3(layers: int) -> dict[str, Any]:
    return COMMON | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "hidden_act": "silu",
    }  # fmt: skip


def qwen3_next(layers: int) -> dict[str, Any]:
    return SHAPES["qwen3_next"](layers) | COMMON | {"num_experts": 32}


# Whether a published folder has its experts one by one.
FAMILIES: dict[str, tuple[Callable[[int], dict[str, Any]], bool]] = {
    "gpt_oss": (gpt_oss, False), "qwen3_next": (qwen3_next, True),
    "qwen3_5_moe": (qwen3_5_moe, False), "gemma4": (gemma4, False), "mimo_v2_flash": (mimo, True),
    "qwen3_moe": (qwen3_moe, True), "deepseek_v3": (deepseek_v3, True),
}  # fmt: skip


def make(folder: Path, shape: str, layers: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values, single = FAMILIES[shape][0](layers), FAMILIES[shape][1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    if single:
        write(folder, shapes_of(values))
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    write(folder, {name: tuple(each.shape) for name, each in model.state_dict().items()})


def measure(folder: Path, lengths: Sequence[int], steps: int) -> dict[str, Any]:
    config = load_config({"model_name_or_path": str(folder), "kt_backend": "AMXInt8"})
    loaded = load_model(config.model, config.adapter, config.experts)
    try:
        experts = sum(row.read for row in loaded_inventory(loaded.model).experts.values())
        probe = _core.ReadProbe(PROBE_BYTES)
        rate = probe.nbytes / statistics.median(probe.seconds(loaded.engine) for _ in range(5))
        found: dict[str, Any] = {"bound_ms": experts / rate * 1e3, "gb_per_s": rate / 1e9}
        for length in lengths:
            cache = loaded.new_cache()
            ids = [100 + i * 7 % 900 for i in range(length)]
            cache.reuse(ids)
            begin = time.perf_counter()
            while cache.length < length:
                cache.forward(ids[cache.length :][: cache.prefill_chunk(length - cache.length)])
            found[f"prompt {length}"] = time.perf_counter() - begin
            times = []
            for token in range(steps):
                begin = time.perf_counter()
                cache.forward([50 + token]).argmax().item()
                times.append((time.perf_counter() - begin) * 1e3)
            found[f"ms {length}"] = statistics.median(times[4:])
            found[f"longest {length}"] = max(times[4:])
        found["graphs"] = bool(loaded.runner.has_graphs)
        found["error"] = error_of(loaded)
    finally:
        loaded.close()
    return found


def error_of(loaded: Any) -> float:
    """Returns the relative difference of a graph's logits from the plain forward's."""
    ids, token = [100 + i * 3 % 700 for i in range(300)], [77]
    logits = []
    for graph in (True, False):
        cache = loaded.new_cache()
        cache.reuse(ids)
        cache.forward(ids)
        if graph:
            cache.forward([33])
            cache.forward([44])
            logits.append(cache.forward(token))
        else:
            # Two tokens at once have no graph; their last logits are the same token's.
            cache.forward([33])
            logits.append(cache.forward([44, *token]))
    return float((logits[0].float() - logits[1].float()).norm() / logits[1].float().norm())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode steps of published families on a GPU.")
    parser.add_argument("shapes", nargs="*", default=[], metavar="SHAPE", help=", ".join(FAMILIES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lengths", default="1024,8192")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    lengths = [int(each) for each in args.lengths.split(",")]
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for shape in args.shapes or FAMILIES:
            folder = (args.keep or Path(temporary)) / f"{shape}-{args.layers}"
            if not (folder / "model.safetensors.index.json").exists():
                make(folder, shape, args.layers)
            try:
                results[shape] = measure(folder, lengths, args.steps)
            except Exception as error:  # noqa: BLE001 - the other families are measured all the same
                results[shape] = {"failed": f"{type(error).__name__}: {error}"}
            if not args.json:
                print(shape, json.dumps(results[shape]), flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
