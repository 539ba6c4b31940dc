"""Train the demo's base model from scratch: a small DeepSeek-V2, saved in BF16 under its real tensor names."""

from __future__ import annotations

from pathlib import Path

import torch
from .training import Batches, Plan, run
from .train_tokenizer import CONTEXT
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

PLAN = Plan(epochs=110, learning_rate=2e-3, weight_decay=0.05, documents=100, seed=1)
EXPERTS_IMPLEMENTATION = (
    "grouped_mm"  # fastest of transformers' three on CPU: 0.22 s a step against 0.28 s and 9 s
)


def make_config(vocab_size: int, bos_id: int, eos_id: int, pad_id: int) -> DeepseekV2Config:
    """DeepSeek-V2-Lite in small: no query compression, one dense layer, then MoE layers."""
    return DeepseekV2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=480,
        moe_intermediate_size=88,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.04,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


def train_base(folder: Path, plan: Plan = PLAN) -> None:
    """Train on the tokenizer already in ``folder`` and write config and weights beside it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(plan.seed)
    config = make_config(
        len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    model = DeepseekV2ForCausalLM._from_config(
        config, experts_implementation=EXPERTS_IMPLEMENTATION
    )
    run(
        model,
        list(model.parameters()),
        Batches(tokenizer, "base", plan),
        plan,
        tokenizer.pad_token_id,
    )
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)
