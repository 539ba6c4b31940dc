"""Computes ‖ΔW‖ of every LoRA from A and B, without forming ΔW: ‖s·B·A‖² = s²·tr((BᵀB)(AAᵀ)).

The matrices have rank × rank numbers, so an adapter of 5,000 pairs takes well under a second.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ktrt.adapter.apply.side import TorchSide
    from ktrt.adapter.audit import AuditRow
    from ktrt.adapter.changes import ExpertNorms
    from ktrt.adapter.internal import ExpertLora, ExpertLoras

logger = logging.getLogger(__name__)


def expert_norms(lora: ExpertLora) -> torch.Tensor:
    """Returns ‖ΔW_e‖ of one projection, float64 [num_experts]; exactly 0 if A or B is zero."""
    return _norms(lora.a, lora.b).sqrt() * lora.scaling.double().abs()


def pair_norm(a: torch.Tensor, b: torch.Tensor, scaling: float) -> float:
    """Returns ‖scaling · b · a‖ of a [rank, in], b [out, rank]."""
    return float(_norms(a[None].float(), b[None].float()).sqrt()) * abs(scaling)


def _norms(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns tr((BᵀB)(AAᵀ)) of each expert; a or b may be shared by all."""
    gram_a = torch.bmm(a, a.transpose(1, 2))
    gram_b = torch.bmm(b.transpose(1, 2), b)
    return (gram_a.double() * gram_b.double()).sum((1, 2)).clamp(min=0)


def add_norms(rows: Iterable[AuditRow], experts: ExpertLoras, side: TorchSide) -> ExpertNorms:
    """Fills ``delta_norm`` of the rows; warns of single experts whose LoRA is zero. Returns the
    norms of the routed experts."""
    rows = list(rows)
    known = {name: _side_norm(side, name) for name in (*side.loras, *side.routers)}
    unchanged: list[str] = []
    found = {
        path: {p: expert_norms(lora) for p, lora in loras.items()}
        for path, loras in experts.items()
    }
    for path, by_projection in found.items():
        norms = {f"{name}_proj": each for name, each in by_projection.items()}
        for name, each in norms.items():
            known[f"{path}.{name}"] = float(each.norm())
            known |= {f"{path}.{e}.{name}": value for e, value in enumerate(each.tolist())}
            zero = [f"{path}.{e}.{name}" for e in (each == 0).nonzero().flatten().tolist()]
            if len(zero) < len(each):  # wholly zero tensors have been reported
                unchanged += zero
        both = [norms[name] for name in ("gate_proj", "up_proj") if name in norms]
        if len(both) == 2:
            together = torch.stack(both).norm(dim=0)
            known[f"{path}.gate_up_proj"] = float(together.norm())
            known |= {f"{path}.{e}.gate_up_proj": v for e, v in enumerate(together.tolist())}
    for row in rows:
        if row.part.startswith("lora_"):
            row.delta_norm = known.get(row.acts_on)
    named = {row.acts_on for row in rows}
    _warn(name for name in unchanged if name not in named)
    return found


def _warn(unchanged: Iterable[str]) -> None:
    names = list(unchanged)
    if names:
        logger.warning(
            "The LoRA of %d experts inside stacked tensors is all zero (first %s): this adapter "
            "changes nothing there", len(names), names[0],
        )  # fmt: skip


def _side_norm(side: TorchSide, name: str) -> float | None:
    """Returns ‖ΔW‖ of a module; None for DoRA, whose ΔW is not B·A alone."""
    group = side.loras.get(name) or side.routers[name]
    parts: Mapping[str, torch.Tensor] = {tensor.part: tensor.value for tensor in group}
    scaling = side.scales[name].scaling
    if "lora_magnitude_vector" in parts:
        return None
    if "lora_embedding_A" in parts:
        return pair_norm(parts["lora_embedding_A"], parts["lora_embedding_B"], scaling)
    return pair_norm(parts["lora_A"], parts["lora_B"], scaling)
