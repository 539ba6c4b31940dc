"""Attention of a prompt's tokens on a GPU, in memory that does not grow with the context."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from ktrt.layers.gpu.decode import (
    Blocks,
    Operands,
    attend,
    device_facts,
    form_arguments,
    kernels,
    runs_kernels,
    tile_size,
)

if TYPE_CHECKING:
    from ktrt.layers.form import AttentionForm

# Queries of a group's heads up to which the context is split instead: too few to fill a GPU.
_FEW = 64
# Windows of which a larger tile would see less than it computes.
_NARROW = 512
# Scores that torch may hold at once, where there are no kernels.
_SCORES = 1 << 26


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm
) -> torch.Tensor:
    """query [rows, heads, n, d]; key [rows, groups, positions, d] and value [rows, groups,
    positions, dv] in the order of positions, of which the last n are the queries' own: each sees
    itself and what comes before it. Returns [rows, n, heads, dv] in the query's dtype."""
    return attend_prompt(Operands(query, key, value), form)


def attend_prompt(
    operands: Operands, form: AttentionForm, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``prefill_attention`` of operands in parts, into ``out`` if there is one."""
    query, key, wide = operands.query, operands.key, operands.value.shape[-1]
    (rows, heads, tokens, _), groups = query.shape, key.shape[1]
    if out is None:
        out = query.new_empty(rows, tokens, heads, wide)
    plain = form.sinks is None and not (form.window or form.softcap)
    if plain and operands.query_rest is None and tokens == key.shape[2] and query.is_cuda:
        # torch's own kernels, of newer instructions: 0.91 ms for 8,192 tokens, 32 heads of 128,
        # where the one below takes 1.21.
        found = scaled_dot_product_attention(
            query, key, operands.value, is_causal=True, scale=form.scaling, enable_gqa=True
        )
        return out.copy_(found.transpose(1, 2))
    if tokens * heads // groups <= _FEW or not runs_kernels(query):
        return out.copy_(_by_decode(operands, form))
    operands = operands.halved()
    blocks = _blocks(operands, form)
    arrays, strides = operands.arguments()
    scalars, constants = form_arguments(form)
    kernels().prefill_kernel[-(-tokens // blocks.m), heads, rows](
        *arrays, out if form.sinks is None else form.sinks, out, *scalars, tokens, key.shape[2],
        heads // groups, *strides, out.stride(0), out.stride(2), out.stride(1), M=blocks.m,
        N=blocks.n, num_warps=blocks.warps, num_stages=blocks.stages, **operands.constants(),
        **constants,
    )  # fmt: skip
    return out


def _blocks(operands: Operands, form: AttentionForm) -> Blocks:
    """Chooses tiles. On an H200, 2,048 tokens after 30,720 run at 512 TFLOP/s with 128 numbers and
    128 positions a tile (64 positions: 445), at 445 with keys of 192 and 64 positions; a window of
    128 takes 0.21 ms for 8,192 tokens with tiles of 64 by 32 (128 by 64: 0.27)."""
    size, rest, wide = (tile_size(n) if n else 0 for n in operands.sizes)
    bytes_of = operands.query.element_size()
    _, room = device_facts(operands.query.device)
    wanted = [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
    if size + rest > 128:
        del wanted[0]
    if bytes_of == 4:  # products of float32 need more registers
        return Blocks(32, 32 if size + rest <= 128 else 16, 4, 2)
    if 0 < form.window <= _NARROW:
        wanted[:0] = [(64, 32, 4, 3)]
    for m, n, warps, stages in wanted:
        if (m * (size + rest) + stages * n * (size + rest + wide)) * bytes_of <= room:
            return Blocks(m, n, warps, stages)
    return Blocks(16, 16, 4, 1)


def _by_decode(operands: Operands, form: AttentionForm) -> torch.Tensor:
    """Few queries at a time, over a context that is split."""
    query, total = operands.query, operands.key.shape[2]
    rows, heads, tokens, _ = query.shape
    at_once = tokens if runs_kernels(query) else max(1, _SCORES // (rows * heads * total))
    found = []
    for first in range(0, tokens, at_once):
        last = min(first + at_once, tokens)
        rest = None if operands.query_rest is None else operands.query_rest[:, :, first:last]
        part = Operands(
            query[:, :, first:last], operands.key, operands.value, rest, operands.key_rest
        )
        lengths = torch.full((rows,), total - tokens + last, device=query.device)
        found.append(attend(part, lengths, form))
    return torch.cat(found, 1) if len(found) > 1 else found[0]
