"""Train the demo's LoRA adapter with PEFT on every linear of the base model except router and head.

transformers 5 keeps the routed experts of a layer as two stacked parameters, so PEFT reaches them
through ``target_parameters``. The same key is used for the dense MLP and the shared experts: as
``target_modules`` PEFT 0.21 would take their names (``gate_proj`` …) for the routed experts' and
drop them (``_convert_peft_config_moe`` in ``peft/utils/transformers_weight_conversion.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, DeepseekV2ForCausalLM

from .train_base import EXPERTS_IMPLEMENTATION
from .training import Batches, Plan, run

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import DeepseekV2Config

PLAN = Plan(epochs=45, learning_rate=4e-3, weight_decay=0.0, documents=0, seed=2)
RANK = 8
ALPHA = 16
# Slower learning outside the routed experts leaves more of the change to the experts' LoRA.
OTHERS_RATE = 0.3
ATTENTION = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# B starts at exactly zero; a trained one has a norm of 0.3 and more.
MIN_B_NORM = 1e-3


def make_lora_config() -> LoraConfig:
    """Rank 8, alpha 16 on attention, dense MLP, shared experts and routed experts."""
    linears = [f"{owner}.{name}.weight" for owner in ("mlp", "shared_experts") for name in MLP]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(ATTENTION),
        target_parameters=["experts.gate_up_proj", "experts.down_proj", *linears],
    )


def expected_pairs(config: DeepseekV2Config) -> int:
    """Count the expected LoRA pairs: 4 per attention, 3 per dense MLP, 3 + 2 per MoE layer."""
    dense: int = config.first_k_dense_replace
    layers: int = config.num_hidden_layers
    return len(ATTENTION) * layers + len(MLP) * dense + (len(MLP) + 2) * (layers - dense)


def check_trained(model: nn.Module, expected: int) -> None:
    """Raise ValueError unless exactly ``expected`` LoRA pairs exist and every B has left zero."""
    norms = {name: p.norm().item() for name, p in model.named_parameters() if ".lora_B." in name}
    untrained = [name for name, norm in norms.items() if not norm > MIN_B_NORM]
    if len(norms) != expected or untrained:
        raise ValueError(
            f"expected {expected} trained LoRA pairs, found {len(norms)}; untrained: {untrained}"
        )


def train_adapter(base: Path, folder: Path, plan: Plan = PLAN) -> None:
    """Train on the model in folder ``base``; write PEFT's own files (layout b) to ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(plan.seed)
    core = DeepseekV2ForCausalLM.from_pretrained(
        base, dtype=torch.float32, experts_implementation=EXPERTS_IMPLEMENTATION
    )
    model = get_peft_model(core, make_lora_config())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    routed = [p for name, p in trainable.items() if ".mlp.experts." in name]
    others = [p for name, p in trainable.items() if ".mlp.experts." not in name]
    parameters = [(routed, 1.0), (others, OTHERS_RATE)]
    run(core, parameters, Batches(tokenizer, "adapter", plan), plan, tokenizer.pad_token_id)
    check_trained(model, expected_pairs(core.config))
    model.peft_config["default"].base_model_name_or_path = "examples/demo/model"
    model.save_pretrained(folder)
