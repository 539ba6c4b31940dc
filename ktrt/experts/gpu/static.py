"""The resident experts' sums for few tokens, in shapes that the routing does not change: for CUDA
graphs, and without a synchronisation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ktrt.experts.gpu.arithmetic import expert_outputs
from ktrt.utils.triton_kernels import triton_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.experts.gpu.arithmetic import ExpertBank, LoraChoice, Rows

# Experts of one product: bounds the memory of copies, which graphs keep (277 MB of V2-Lite's).
_PIECE = 16
# Cost of a weight of a chosen expert, compared with one of all residents, which nobody copies:
# the copy is written and read again. INT8 codes become BF16 either way.
_GATHER_COST, _GATHER_COST_INT8 = 3.0, 1.4
# Where Triton reads the chosen ones in place, and leaves out absent ones.
_READ_COST = 0.2


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
    if _chosen_product(slots.device) is not None:
        cost = _READ_COST
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
    """A row for each chosen expert, which is copied where Triton does not read it in place. Absent
    slots read the first one then, which costs bandwidth but keeps shapes."""
    tokens, width = slots.shape
    of_token = torch.arange(tokens, device=slots.device)[:, None].expand(-1, width).flatten()
    experts = slots.clamp_min(0).flatten()
    product = _chosen_product(slots.device)
    if product is not None:
        own = None if lora is None else lora.take(of_token[:, None])
        each = expert_outputs(
            rows.take(of_token[:, None]), bank.take_around(experts), lora=own,
            product=partial(product, places=slots.flatten()),
        )[:, 0]  # fmt: skip
    else:
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


def _chosen_product(device: torch.device) -> Callable[..., torch.Tensor] | None:
    """Triton's product; None where there is no GPU or no Triton."""
    if device.type != "cuda":
        return None
    found = triton_kernels(
        "ktrt.experts.gpu.chosen", "A token's experts on the GPU are copied before they are read"
    )
    return None if found is None else found.chosen_product
