"""A tiny model with several adapters on disk, and its sessions, for tests of many requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from helpers.tiny_chat import make_tokenizer
from helpers.tiny_models import (
    HIDDEN_SIZE,
    LoraPlan,
    read_folder,
    save_adapter,
    save_model,
    write_adapter,
)

import ktrt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ktrt.session import Session

# Different ranks.
PLANS = {
    "a": LoraPlan(rank=8, seed=1, experts=0.5),
    "b": LoraPlan(rank=5, alpha=9, seed=2, experts=0.5),
    "c": LoraPlan(rank=16, alpha=16, seed=3, experts=0.5),
}
# Adapters that no row of a step can choose for itself.
TURNS = ("router", "dora")
# Multiples of 32, as published models have them. torch computes the numbers of an array that do not
# fill its vectors in another way: with other sizes a row's last bits depend on its place.
EVEN_LATENT = {"intermediate_size": 224, "qk_rope_head_dim": 32, "n_routed_experts": 32}


def make_folder(folder: Path) -> Path:
    """Writes ``model`` and the adapters of ``PLANS`` and ``TURNS``; returns ``folder``."""
    save_model(folder / "model", "deepseek_v2", 96, **EVEN_LATENT)
    make_tokenizer(vocab_size=384).save_pretrained(folder / "model")
    for index, (name, plan) in enumerate(PLANS.items()):
        save_adapter(folder / name, folder / "model", "b" if index % 2 else "a", plan)
    tensors, config = read_folder(folder / "a")
    generator = torch.Generator().manual_seed(9)
    router = {}
    for name in [key for key in tensors if ".mlp.experts.0.gate_proj.lora_A" in key]:
        prefix = name.partition(".experts.")[0]
        a = torch.randn(8, HIDDEN_SIZE, generator=generator) * 0.08
        router[f"{prefix}.gate.lora_A.weight"] = a
        b = torch.randn(EVEN_LATENT["n_routed_experts"], 8, generator=generator)
        router[f"{prefix}.gate.lora_B.weight"] = b
    targets = {"target_modules": None, "target_parameters": ["gate.weight"]}
    write_adapter(folder / "router", router, config | targets)
    dora = {key: value for key, value in tensors.items() if "self_attn" in key}
    for key in [key for key in dora if "lora_B" in key]:
        scale = torch.randn(len(dora[key]), generator=generator).abs()
        dora[key.replace("lora_B.weight", "lora_magnitude_vector")] = 1 + 0.3 * scale
    leaves = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in dora})
    write_adapter(folder / "dora", dora, config | {"target_modules": leaves, "use_dora": True})
    return folder


def load(folder: Path, names: Sequence[str] = (*PLANS, *TURNS), **options: Any) -> Session:
    """Returns a session on one thread, greedy, with these adapters resident and none active. Its
    rows have the bits of each alone, also with AMX."""
    given = {
        "model_name_or_path": folder / "model", "template": "deepseek", "kt_num_threads": 1,
        "do_sample": False, "max_new_tokens": 8, "kt_fixed_kernels": True,
    }  # fmt: skip
    session = ktrt.load({**given, **options})
    for name in names:
        session.adapters.load(name, folder / name)
    return session


def forget(session: Session) -> None:
    """Empties the KV cache; nobody may be asking for anything."""
    pool = session._open().runner.pool
    assert not pool.slots_in_use
    for slot in pool.slots:
        pool.empty(slot)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
