"""A folder with a tiny base model and adapters of every kind that residents tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from helpers.tiny_models import (
    HIDDEN_SIZE,
    NUM_EXPERTS,
    VOCAB_SIZE,
    LoraPlan,
    read_folder,
    save_adapter,
    save_model,
    write_adapter,
)

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = "base_model.model.model.layers"
NAMES = ("a", "b", "attention", "router", "saved", "dora")


def save_residents(folder: Path) -> Path:
    """Saves "base" and a (layout a), b (layout b), attention, router, saved (lm_head), dora."""
    base = save_model(folder / "base", "deepseek_v2", 96)
    save_adapter(folder / "a", base, "a", LoraPlan(seed=1, experts=0.5))
    save_adapter(folder / "b", base, "b", LoraPlan(rank=6, alpha=9, seed=2, experts=0.5))
    tensors, config = read_folder(folder / "a")
    attention = {key: 2 * value for key, value in tensors.items() if "self_attn" in key}
    targets = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in attention})
    config = config | {"target_modules": targets, "use_rslora": True}
    write_adapter(folder / "attention", attention, config)
    generator = torch.Generator().manual_seed(9)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    router = {}
    for layer in (1, 2):
        router[f"{PREFIX}.{layer}.mlp.gate.lora_A.weight"] = noise(8, HIDDEN_SIZE) * 0.08
        router[f"{PREFIX}.{layer}.mlp.gate.lora_B.weight"] = noise(NUM_EXPERTS, 8)
    only_router = {"target_modules": None, "target_parameters": ["gate.weight"]}
    write_adapter(folder / "router", router, config | only_router | {"use_rslora": False})
    saved = {"base_model.model.lm_head.weight": noise(VOCAB_SIZE, HIDDEN_SIZE) * 0.08}
    write_adapter(folder / "saved", attention | saved, config | {"modules_to_save": ["lm_head"]})
    dora = dict(attention)
    for key, value in attention.items():
        if "lora_B" in key:
            name = key.replace("lora_B.weight", "lora_magnitude_vector")
            dora[name] = 1 + 0.3 * noise(value.shape[0]).abs()
    write_adapter(folder / "dora", dora, config | {"use_dora": True})
    return folder
