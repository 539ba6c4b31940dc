"""The resident experts' sums for few tokens, in shapes that the routing does not change: for CUDA
graphs, and without a synchronisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ktrt.experts.gpu.arithmetic import expert_outputs

if TYPE_CHECKING:
    from ktrt.experts.gpu.arithmetic import ExpertBank, LoraChoice, Rows

# Experts of one product: bounds the memory of copies, which graphs keep (277 MB of V2-Lite's).
_PIECE = 16
# Cost of a weight of a chosen expert, compared with one of all residents, which nobody copies:
# the copy is written and read again. INT8 codes become BF16 either way.
_GATHER_COST, _GATHER_COST_INT8 = 3.0, 1.4


def static_sums(
    bank: ExpertBank,
    rows: Rows,
    slots: torch.Tensor,
    weights: torch.Tensor,
    lora: LoraChoice | None,
) -> torch.Tensor:
    """The weighted sums [tokens, h] of the bank's experts, float32; ``slots`` and ``weights``
    [tokens, k]: indices into the bank, -1 for none. ``lora`` as for ``expert_outputs``."""
    tokens, width = slots.shape
    cost = _GATHER_COST if bank.down_scale is None else _GATHER_COST_INT8
    if tokens == 1 or cost * tokens * width < bank.down.shape[0]:
        return _of_chosen(bank, rows, slots, weights, lora)
    return _of_all(bank, rows, slots, weights, lora)


def _of_chosen(
    bank: ExpertBank,
    rows: Rows,
    slots: torch.Tensor,
    weights: torch.Tensor,
    lora: LoraChoice | None,
) -> torch.Tensor:
    """Copies the chosen experts, a row for each. Absent slots read the first one, which costs
    bandwidth but keeps shapes."""
    tokens, width = slots.shape
    of_token = torch.arange(tokens, device=slots.device)[:, None].expand(-1, width).flatten()
    experts = slots.clamp_min(0).flatten()
    outputs = []
    for index, token in zip(experts.split(_PIECE), of_token.split(_PIECE), strict=True):
        own = None if lora is None else lora.take(token[:, None])
        out = expert_outputs(rows.take(token[:, None]), bank.take(index), lora=own)
        outputs.append(out[:, 0])
    each = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    weighted = each.unflatten(0, (tokens, width)) * weights.unsqueeze(-1)
    return torch.where((slots >= 0).unsqueeze(-1), weighted, 0.0).sum(1)


def _of_all(
    bank: ExpertBank,
    rows: Rows,
    slots: torch.Tensor,
    weights: torch.Tensor,
    lora: LoraChoice | None,
) -> torch.Tensor:
    """Every resident expert for every token: from some tokens on most are chosen, and reading all
    where they lie costs less than copying each token's."""
    tokens, count = slots.shape[0], bank.down.shape[0]
    places = torch.where(slots < 0, count, slots)
    share = weights.new_zeros(tokens, count + 1).scatter_add_(1, places, weights)
    chosen = torch.zeros_like(share, dtype=torch.bool).scatter_(1, places, value=True)
    total = weights.new_zeros(tokens, bank.down.shape[1])
    for first in range(0, count, _PIECE):
        experts = slice(first, min(first + _PIECE, count))
        some = bank.part(experts)
        out = expert_outputs(rows.for_each(some.down.shape[0]), some, lora=lora)
        weighted = out * share.T[experts, :, None]
        total += torch.where(chosen.T[experts, :, None], weighted, 0.0).sum(0)
    return total
