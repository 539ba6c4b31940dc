"""Counts the bytes that a step of a loaded model reads from the CPU's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.experts import KTExperts
from ktrt.generate.scheduler.cost import CostFacts
from ktrt.loading.inventory import EXPERT_LORA, loaded_inventory

if TYPE_CHECKING:
    from torch import nn


def bytes_per_token(model: nn.Module) -> int | None:
    """Returns the bytes of weights that a token reads from the CPU's memory, with LoRA as it is
    switched now and without the KV cache. None if some experts are on a GPU: the router then
    decides how many of the others a token needs."""
    for module in model.modules():
        if isinstance(module, KTExperts) and module.gpu is not None and module.gpu.resident:
            return None
    found = loaded_inventory(model)
    return round(sum(row.read for row in (*found.rows, *found.experts.values()) if not row.gpu))


def cost_facts(model: nn.Module, kv_token_bytes: float, *, mixes: bool) -> CostFacts:
    """Returns the bytes that a step reads from the CPU's memory, with LoRA as it is switched
    now."""
    found = loaded_inventory(model)
    rows = [row for row in found.rows if not row.gpu]
    experts = [*found.experts.values(), *(row for row in rows if row.kind == EXPERT_LORA)]
    share = next((row.share for row in found.experts.values()), 1.0)
    return CostFacts(
        other_bytes=sum(row.read for row in rows if row.kind != EXPERT_LORA),
        expert_bytes=sum(row.read for row in experts) / (share or 1.0),
        share=share or 1.0,
        kv_token_bytes=kv_token_bytes,
        mixes=mixes,
    )
