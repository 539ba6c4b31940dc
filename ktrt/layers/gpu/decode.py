"""Attention of single tokens on a GPU, over keys and values as they lie in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ktrt.layers.form import AttentionForm


def keeps_to_lengths(_query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor) -> bool:
    """Whether ``decode_attention`` reads no position after ``lengths``, where memory may be
    missing; arguments as there."""
    return False


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    form: AttentionForm,
) -> torch.Tensor:
    """query [rows, heads, 1, d]; key [rows, groups, capacity, d] and value [rows, groups, capacity,
    dv], of which row i's first ``lengths[i]`` positions are read; ``lengths`` [rows] int64 on the
    device. Returns [rows, 1, heads, dv] in the query's dtype."""
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, size).float() * form.scaling
    scores = grouped @ key.float().transpose(-1, -2)
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    at = torch.arange(key.shape[2], device=key.device)
    seen = at < lengths[:, None]
    if form.window:
        seen &= at >= lengths[:, None] - form.window
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.float().view(1, key.shape[1], -1, 1).expand(rows, -1, -1, -1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    held = value.float().masked_fill(~seen[:, None, :, None], 0)
    return (weights @ held).to(query.dtype).reshape(rows, 1, heads, -1)
