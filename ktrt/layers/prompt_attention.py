"""Attention of a prompt's tokens on the CPU: in the engine where its kernel beats torch's, else by
torch in blocks of queries.

Blocks are cut at multiples of 256 positions, with keys up to the block's end and, with a window,
from the first that the block reaches: what torch computes for a query depends on the number of keys
and, below about 30, of queries (by one part in 300 of a bfloat16 result, in 10⁶ of a float32 one),
but not on which queries stand next to it. So the division of a prompt into chunks changes no bit.
Blocks of 256 take no longer than 512 queries at once (one thread, 16 heads of 192 numbers, 4,096
positions: 338 ms both; blocks of 128: 395 ms).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from ktrt.layers.engine_attention import EngineAttention
    from ktrt.layers.form import AttentionForm

# Positions of a block of queries; a shorter block is filled up to a multiple of _QUERIES.
_BLOCK = 256
_QUERIES = 32
# torch's fused kernel, which also returns the logarithm of each query's sum of exponentials.
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def first_key(start: int, form: AttentionForm) -> int:
    """Returns the first position that is read for queries from position ``start`` on."""
    if not form.window:
        return 0
    return form.first_of(start // _BLOCK * _BLOCK + 1) // _QUERIES * _QUERIES


def keys_end(end: int) -> int:
    """Returns how far keys are read for queries before position ``end``, where there are any."""
    return -(-end // _BLOCK) * _BLOCK


def attend_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AttentionForm,
    out: torch.Tensor, *, start: int, first: int = 0, engine: EngineAttention | None = None,
) -> None:  # fmt: skip
    """Fills ``out`` [1, n, heads, value size] with the attention of ``query`` [1, heads, n, size],
    positions ``start`` and on, over key and value [1, groups, …], positions ``first`` and on, of
    which each query sees those up to its own; ``engine`` None: by torch."""
    if engine is not None and engine.attend_prompt(
        query, key, value, form, out, start=start, first=first
    ):
        return
    # torch computes values of another width without its fused kernel, in float32 and with copies.
    value = pad(value, (0, max(0, key.shape[-1] - value.shape[-1])))
    at, end, held = start, start + query.shape[2], first + key.shape[2]
    while at < end:
        edge = (at // _BLOCK + 1) * _BLOCK
        low, high = max(first, first_key(at, form)), min(edge, held)
        begin, stop = at - start, min(edge, end) - start
        block = query[:, :, begin:stop]
        block = pad(block, (0, 0, 0, -block.shape[2] % _QUERIES))
        keys = slice(low - first, high - first)
        mask = hidden(
            at - low, block.shape[2], high - low, form.window, query.dtype, query.device
        )  # fmt: skip
        found = attend_block(block, key[:, :, keys], value[:, :, keys], mask, form)
        out[:, begin:stop] = found[:, :, : stop - begin, : out.shape[-1]].transpose(1, 2)
        at = edge


def attend_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    form: AttentionForm,
) -> torch.Tensor:  # fmt: skip
    """query [1, heads, n, size], key and value [1, groups, m, …], ``mask`` [n, m] added to the
    scores, which says the form's window; returns [1, heads, n, value size]."""
    if form.softcap or (form.sinks is not None and query.device.type != "cpu"):
        return _in_float32(query, key, value, mask, form)
    if form.sinks is None:
        return scaled_dot_product_attention(
            query, key, value, mask, scale=form.scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    whole = None if mask is None else mask[None, None]
    out, total = _fused(query, key, value, 0.0, False, attn_mask=whole, scale=form.scaling)
    # A sink is one more exponential in every sum.
    share = torch.sigmoid(total - form.sinks.float().view(1, -1, 1))
    found: torch.Tensor = (out * share[..., None]).to(out.dtype)
    return found


def _in_float32(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    form: AttentionForm,
) -> torch.Tensor:  # fmt: skip
    _, heads, count, size = query.shape
    groups = key.shape[1]
    # Heads of a group are rows of one product.
    grouped = query.reshape(groups, -1, size).float() * form.scaling
    scores = grouped @ key[0].float().transpose(-1, -2)
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = scores.view(heads, count, -1)
    if mask is not None:
        scores = scores + mask
    if form.sinks is not None:
        sinks = form.sinks.float().view(-1, 1, 1).expand(-1, count, -1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].reshape(groups, -1, key.shape[2])
    return (weights @ value[0].float()).view(1, heads, count, -1).to(query.dtype)


# The masks of a forward's blocks: every layer needs them again.
@functools.lru_cache(maxsize=16)
def hidden(
    first: int, queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Returns what is added to scores [queries, keys] of the positions from ``first`` on, so that
    each sees itself and what comes before it, ``window`` positions in all (0: any number)."""
    with torch.inference_mode(False):
        found = torch.full((queries, keys), float("-inf"), dtype=dtype, device=device)
        found = found.triu_(first + 1)
        if window:
            at = torch.arange(first, first + queries, device=device)[:, None]
            # Queries past the keys are nobody's: they see the last one, or their sums were empty.
            near = torch.arange(keys, device=device) > at.clamp(max=keys - 1) - window
            found = found.masked_fill_(~near, float("-inf"))
        return found
