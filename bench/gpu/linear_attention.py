#!/usr/bin/env python3
"""Checks and times linear attention and short convolutions on a GPU, next to transformers' own.

    python bench/gpu/linear_attention.py [--layers 8] [--prompt 4096]

For each kind of function: the largest error against transformers' function in float32, relative to
the largest number, and milliseconds of both, for one token (in a CUDA graph) and for a prompt. Then
a decode step of whole models of published shapes, with a dense layer for each layer's experts,
which run on the CPU: launched by the host, and what its layers' functions take in a graph.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from ktrt.engine import Engine
from ktrt.kv.static import cache_argument
from ktrt.layers.linear_attention import accelerate_linear_attention
from ktrt.layers.linear_attention.functions import Functions
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def negative(*shape: int) -> torch.Tensor:
    return -0.1 * draw(*shape, dtype=torch.float32).abs()


def rule(tokens: int, *, per_key: bool) -> dict[str, Any]:
    """Qwen3-Next's shape, or Kimi Linear's."""
    heads, keys, size = 32, 32 if per_key else 16, 128
    return {
        "query": draw(1, tokens, keys, size), "key": draw(1, tokens, keys, size),
        "value": draw(1, tokens, heads, size), "beta": draw(1, tokens, heads).sigmoid(),
        "g": negative(1, tokens, heads, *([size] if per_key else [])),
        "initial_state": draw(1, heads, size, size, dtype=torch.float32),
        "output_final_state": True, "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip


def mamba(tokens: int) -> dict[str, Any]:
    """Jamba's shape."""
    channels, size = 8192, 16
    if tokens == 1:
        return {
            "state": draw(1, channels, size, dtype=torch.float32), "D": draw(channels),
            "hidden_states": draw(1, channels), "dt": draw(1, channels), "B": draw(1, size),
            "A": negative(channels, size), "C": draw(1, size), "z": draw(1, channels),
            "dt_bias": draw(channels).float(), "dt_softplus": True,
        }  # fmt: skip
    rows = 1, channels, tokens
    return {
        "hidden_states": draw(1, tokens, channels).transpose(1, 2), "dt": draw(*rows),
        "A": negative(channels, size), "B": draw(1, size, tokens), "C": draw(1, size, tokens),
        "D": draw(channels).float(), "z": draw(*rows), "delta_bias": draw(channels).float(),
        "delta_softplus": True, "return_last_state": True,
    }  # fmt: skip


def mamba2() -> dict[str, Any]:
    """Nemotron-H's shape, one token."""
    heads, groups, head, size = 128, 8, 64, 128
    return {
        "state": draw(1, heads, head, size, dtype=torch.float32), "dt_softplus": True,
        "hidden_states": draw(1, heads, head), "dt": draw(1, heads, 1).expand(-1, -1, head),
        "A": negative(heads)[:, None, None].expand(-1, head, size), "B": draw(1, groups, size),
        "C": draw(1, groups, size), "D": draw(heads)[:, None].expand(-1, head),
        "dt_bias": draw(heads)[:, None].expand(-1, head),
    }  # fmt: skip


def conv() -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 8192, 1), "conv_state": draw(1, 8192, 4),
        "weight": draw(8192, 4), "bias": None, "activation": "silu",
    }  # fmt: skip


def cases(prompt: int) -> dict[str, tuple[str, str, dict[str, Any]]]:
    step, chunk = "torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"
    kimi, kimi_chunk = "recurrent_kimi_delta_attention", "chunk_kimi_delta_attention"
    short = min(prompt, 512)  # the original makes tensors of 1 MB a token
    return {
        "convolution, 1": ("qwen3_next", "causal_conv1d_update", conv()),
        "delta rule, 1": ("qwen3_next", step, rule(1, per_key=False)),
        "kimi delta, 1": ("kimi_linear", kimi, rule(1, per_key=True)),
        "mamba, 1": ("jamba", "mamba_selective_state_update", mamba(1)),
        "mamba 2, 1": ("nemotron_h", "mamba2_selective_state_update", mamba2()),
        f"delta rule, {prompt}": ("qwen3_next", chunk, rule(prompt, per_key=False)),
        f"kimi delta, {short}": ("kimi_linear", kimi_chunk, rule(short, per_key=True)),
        f"mamba, {short}": ("jamba", "mamba_selective_scan", mamba(short)),
    }  # fmt: skip


def copied(values: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Returns the arguments with copies of their states."""
    found = {}
    for name, value in values.items():
        copy = isinstance(value, torch.Tensor) and "state" in name and name != "hidden_states"
        found[name] = value.clone() if copy else value
        if dtype is not None and isinstance(value, torch.Tensor):
            found[name] = value.to(dtype, copy=copy)
    return found


def outputs(function: Callable[..., Any], values: dict[str, Any]) -> list[torch.Tensor]:
    found = function(**values)
    states = [values[name] for name in ("state", "conv_state") if name in values]
    return [*(found if isinstance(found, tuple) else [found]), *states]


def seconds(call: Callable[[], object], *, graph: bool) -> float:
    """The median of ten calls, after two."""
    call()
    call()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(20):
                call()
        call = captured.replay
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[5] / (20 if graph else 1)


def compare(functions: Functions, prompt: int) -> None:
    print("| function, tokens | error | transformers, ms | here, ms |\n|---|---|---|---|")
    for case, (folder, name, values) in cases(prompt).items():
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        original = getattr(module, name)
        function = functions.function(name, original)
        expected = outputs(original, copied(values, torch.float32))
        found = outputs(function, copied(values))
        pairs = zip(found, expected, strict=True)
        error = max(float((a.float() - b.float()).abs().max() / b.abs().max()) for a, b in pairs)
        graph = case.endswith(", 1")
        times = [
            seconds(partial(each, **copied(values)), graph=graph) for each in (original, function)
        ]
        print(f"| {case} | {error:.1e} | {times[0] * 1e3:.3f} | {times[1] * 1e3:.3f} |", flush=True)


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2,
                   "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
                   "linear_key_head_dim": 128, "linear_value_head_dim": 128,
                   "linear_conv_kernel_dim": 4, "full_attention_interval": 4},
    "lfm2_moe": {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "conv_L_cache": 3, "num_dense_layers": 99},
    "jamba": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
              "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256,
              "attn_layer_period": 8, "attn_layer_offset": 4, "num_experts": 1},
}  # fmt: skip
_DENSE = {"intermediate_size": 4096, "moe_intermediate_size": 512, "num_experts": 4,
          "num_experts_per_tok": 2, "vocab_size": 32000, "decoder_sparse_step": 99,
          "max_position_embeddings": 4096}  # fmt: skip


def model_of(shape: str, layers: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**_DENSE, **SHAPES[shape], "num_hidden_layers": layers}
    if shape == "lfm2_moe":
        values["layer_types"] = ["full_attention" if i % 4 == 2 else "conv" for i in range(layers)]
    config = AutoConfig.for_model(shape, **values)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=BF16).eval()


def decode_ms(model: Any) -> tuple[float, torch.Tensor]:
    """Milliseconds of a step after 64 tokens, and the logits of the first one."""
    from transformers import DynamicCache

    options = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
    ids = torch.arange(64, device=DEVICE)[None] + 5
    model(input_ids=ids, **options)
    first = model(input_ids=ids[:, :1], **options).logits
    step = seconds(partial(model, input_ids=ids[:, :1], **options), graph=False)
    return step * 1e3, first.float()


def layer_ms(model: Any) -> float:
    """Milliseconds of a step of one layer with a state, in a CUDA graph."""
    from transformers import DynamicCache

    layer = next(
        m for m in model.modules() if hasattr(m, "conv1d") or hasattr(m, "conv_kernel_size")
    )
    cache = DynamicCache(config=model.config)
    hidden = draw(1, 8, model.config.hidden_size)
    layer(hidden, cache=cache)
    return seconds(partial(layer, hidden[:, :1], cache=cache), graph=True) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Linear attention on a GPU.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=4096)
    args = parser.parse_args()
    torch.manual_seed(0)
    engine = Engine(num_threads=1)
    with torch.inference_mode():
        compare(Functions(engine), args.prompt)
        print("\n| decode step, launched by the host | error | transformers, ms | here, ms |")
        print("|---|---|---|---|")
        layers = []
        for shape in SHAPES:
            model = model_of(shape, args.layers)
            before, expected = decode_ms(model)
            layer_before = layer_ms(model)
            with Patches() as patches:
                accelerate_linear_attention(model, engine, patches)
                after, found = decode_ms(model)
                layers.append((shape, layer_before, layer_ms(model)))
            error = float((found - expected).abs().max() / expected.abs().max())
            print(f"| {shape} | {error:.1e} | {before:.2f} | {after:.2f} |", flush=True)
            del model
            torch.cuda.empty_cache()
        print("\n| one layer's step in a CUDA graph | transformers, µs | here, µs |\n|---|---|---|")
        for shape, one, other in layers:
            print(f"| {shape} | {one * 1e3:.1f} | {other * 1e3:.1f} |")
    engine.close()


if __name__ == "__main__":
    main()
