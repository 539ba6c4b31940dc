"""Attention of one token by torch's products, in float32 throughout."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ktrt.engine.torch_threads import set_torch_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt.layers.form import AttentionForm

# Keys and values together; two threads of a machine with 40 GB/s are no faster below.
_NUMBERS_OF_ONE_THREAD = 2 << 20
# Keys whose float32 copy fits into the second-level cache together with the values'.
_NUMBERS_OF_ONE_PRODUCT = 1 << 19


def added(mask: torch.Tensor) -> torch.Tensor:
    """A mask to be added for one of bool (True: seen)."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    form: AttentionForm,
) -> torch.Tensor:
    """query [rows, heads, 1, d]; key [rows, groups, tokens, d], value [rows, groups, tokens, dv],
    ``groups`` a divisor of ``heads``; mask None, or bool (True: seen) or to be added, [rows, 1, 1,
    tokens], which then says the form's window too. Returns [rows, 1, heads, dv] in the query's
    dtype."""
    if mask is None and (first := form.first_of(key.shape[2])) > 0:
        key, value = key[:, :, first:], value[:, :, first:]
    with torch_threads_for(key.numel() + value.numel()):
        return _products(query, key, value, mask, form)


@contextmanager
def torch_threads_for(numbers: int) -> Iterator[None]:
    """Little work is done by one thread of torch: to wake others takes longer (0.1 ms)."""
    threads = torch.get_num_threads()
    if threads == 1 or numbers > _NUMBERS_OF_ONE_THREAD:
        yield
        return
    set_torch_threads(1)
    try:
        yield
    finally:
        set_torch_threads(threads)


def _products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    form: AttentionForm,
) -> torch.Tensor:
    rows, heads, _, size = query.shape
    # The heads of a group share keys: they are the rows of one product. In float32, since oneDNN
    # would compile its BF16 products for every length, 0.7 ms each.
    grouped = query.reshape(rows, key.shape[1], -1, size).float() * form.scaling
    if mask is not None:
        mask = added(mask)
    sinks = None if form.sinks is None else form.sinks.float().view(1, key.shape[1], -1, 1)
    if key.numel() <= _NUMBERS_OF_ONE_PRODUCT:
        out = _attend(grouped, key, value, mask, form.softcap, sinks)
    else:
        # One group after the other: its float32 copies stay in the cache. Products of three
        # dimensions, as above: products of matrices go elsewhere within the model's forward
        # (``row_products``), and a recorded step would have other bits.
        parts = [
            _attend(
                grouped[row, group, None],
                key[row, group, None],
                value[row, group, None],
                _row(mask, row),
                form.softcap,
                None if sinks is None else sinks[:, group],
            )
            for row in range(rows)
            for group in range(key.shape[1])
        ]
        out = torch.stack(parts)
    return out.to(query.dtype).reshape(rows, 1, heads, -1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    softcap: float, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """query [..., n, d] float32, key [..., tokens, d], value [..., tokens, dv], sinks [..., n, 1];
    float32."""
    scores = query @ key.float().transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores += mask
    if sinks is None:
        return scores.softmax(dim=-1) @ value.float()
    scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(dim=-1)[..., :-1] @ value.float()


def _row(mask: torch.Tensor | None, row: int) -> torch.Tensor | None:
    return None if mask is None else mask[row if mask.shape[0] > 1 else 0, 0]
