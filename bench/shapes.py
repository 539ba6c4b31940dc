"""Published sizes of models that benchmarks make with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

COMMON: dict[str, Any] = {
    "torch_dtype": "bfloat16", "max_position_embeddings": 65536, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6,
}  # fmt: skip


def v2lite(_layers: int) -> dict[str, Any]:
    """DeepSeek-V2-Lite, its first layer dense."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "greedy",
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "hidden_act": "silu",
    }  # fmt: skip


def deepseek_v3(_layers: int) -> dict[str, Any]:
    """DeepSeek-V3 with one dense layer: 128 heads over latents of 512."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "hidden_act": "silu",
    }  # fmt: skip


def qwen3_moe(_layers: int) -> dict[str, Any]:
    """Qwen3-30B-A3B: 32 heads of 4 groups."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "decoder_sparse_step": 1, "norm_topk_prob": True,
        "hidden_act": "silu",
    }  # fmt: skip


def qwen3_next(_layers: int) -> dict[str, Any]:
    """Qwen3-Next-80B-A3B with 128 of its 512 experts: every fourth layer has attention, a token has
    10 experts and a shared one."""
    return {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "full_attention_interval": 4,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 128,
        "num_experts_per_tok": 10, "decoder_sparse_step": 1, "norm_topk_prob": True,
        "hidden_act": "silu",
    }  # fmt: skip


def qwen3_5_moe(layers: int) -> dict[str, Any]:
    """Qwen3.5-35B-A3B with 128 of its 256 experts."""
    kinds = ["linear_attention" if i % 4 != 3 else "full_attention" for i in range(layers)]
    return qwen3_next(layers) | {
        "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
        "vocab_size": 248320, "num_experts_per_tok": 8, "layer_types": kinds,
    }  # fmt: skip


def gpt_oss(layers: int) -> dict[str, Any]:
    """gpt-oss-20b: every other layer sees 128 positions, all have sinks and biases."""
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_local_experts": 32,
        "num_experts_per_tok": 4, "layer_types": _windows(layers, 2), "pad_token_id": 0,
    }  # fmt: skip


def gemma4(layers: int) -> dict[str, Any]:
    """Gemma 4 26B-A4B: five layers of six see 1,024 positions, the others have wider heads."""
    return {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "vocab_size": 262144,
        "hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "global_head_dim": 512, "num_global_key_value_heads": 2, "sliding_window": 1024,
        "layer_types": _windows(layers, 6), "enable_moe_block": True, "num_experts": 128,
        "top_k_experts": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "pad_token_id": 0,
    }  # fmt: skip


def mimo_v2_flash(layers: int) -> dict[str, Any]:
    """MiMo-V2-Flash with 32 of its 256 experts: keys of 192 and values of 128 numbers, windows of
    128 with sinks."""
    return {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash",
        "vocab_size": 152576, "hidden_size": 4096, "intermediate_size": 16384,
        "moe_intermediate_size": 2048, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 192, "v_head_dim": 128, "sliding_window": 128,
        "layer_types": _windows(layers, 6), "n_routed_experts": 32, "num_experts": 32,
        "num_experts_per_tok": 8, "hidden_act": "silu",
    }  # fmt: skip


def _windows(layers: int, period: int) -> list[str]:
    """Every ``period``-th layer and the last one see everything."""
    return [
        "full_attention" if (i + 1) % period == 0 or i == layers - 1 else "sliding_attention"
        for i in range(layers)
    ]


SHAPES: dict[str, Callable[[int], dict[str, Any]]] = {
    each.__name__: each
    for each in (
        v2lite, deepseek_v3, qwen3_moe, qwen3_next, qwen3_5_moe, gpt_oss, gemma4, mimo_v2_flash,
    )
}  # fmt: skip
# Whose folders hold a layer's experts as one tensor.
STACKED = {"gpt_oss", "gemma4_text", "qwen3_5_moe_text"}
_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")


def shape(name: str, layers: int, experts: int | None = None) -> dict[str, Any]:
    """Returns config.json's keys; ``experts``: of a layer, at least as many as a token has."""
    values = COMMON | SHAPES[name](layers) | {"num_hidden_layers": layers}
    if experts is not None:
        values |= {key: experts for key in _COUNTS if key in values}
    return values


def experts_of(values: dict[str, Any]) -> int:
    """Returns the number of experts of a layer."""
    return next(int(values[key]) for key in _COUNTS if key in values)
