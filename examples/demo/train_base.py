"""Train the demo's base model from scratch: a small DeepSeek-V2, saved in BF16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

from .train_tokenizer import CONTEXT
from .training import Batches, Plan, run

if TYPE_CHECKING:
    from pathlib import Path

PLAN = Plan(epochs=90, learning_rate=2e-3, weight_decay=0.05, documents=100, seed=1)
# The fastest of transformers' three on one core: 0.24 s per step; eager 0.34 s, batched_mm 9 s.
EXPERTS_IMPLEMENTATION = "grouped_mm"
# A model this small could learn its corpus with attention and dense layers alone. But a demo whose
# routed experts hardly matter would not show whether they are computed correctly. Hence the routed
# scaling of 8 below, the silenced shared experts and these factors of the learning rate.
SHARED_EXPERTS_DROPPED = 0.5
ROUTED_RATE, DENSE_RATE = 2.0, 0.2


def make_config(vocab_size: int, bos_id: int, eos_id: int, pad_id: int) -> DeepseekV2Config:
    """Make a small DeepSeek-V2-Lite: no query compression, one dense layer, then MoE layers."""
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
        routed_scaling_factor=8.0,
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


def silence_shared_experts(model: nn.Module) -> None:
    """While ``model`` trains, silence each layer's shared experts in half of the passes."""

    def silence(module: nn.Module, _args: object, output: Tensor) -> Tensor:
        drop = module.training and torch.rand(()).item() < SHARED_EXPERTS_DROPPED
        return torch.zeros_like(output) if drop else output

    for name, module in model.named_modules():
        if name.endswith(".shared_experts"):
            module.register_forward_hook(silence)


def with_rates(model: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
    """Return all parameters with their factors of the learning rate."""
    routed, dense, others = [], [], []
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            routed.append(parameter)
        elif ".mlp." in name and not name.endswith(".mlp.gate.weight"):
            dense.append(parameter)
        else:
            others.append(parameter)
    return [(routed, ROUTED_RATE), (dense, DENSE_RATE), (others, 1.0)]


def train_base(folder: Path, plan: Plan = PLAN) -> None:
    """Train with the tokenizer in ``folder``; write config and weights to the same folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(plan.seed)
    config = make_config(
        len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    model = DeepseekV2ForCausalLM._from_config(
        config, experts_implementation=EXPERTS_IMPLEMENTATION
    )
    silence_shared_experts(model)
    run(model, with_rates(model), Batches(tokenizer, "base", plan), plan, tokenizer.pad_token_id)
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)
