"""Attention of one token on the CPU: over the keys and values as they lie, one product each.

torch's fused kernel gives a head's query of one token to one thread and multiplies without tiles:
on two cores it takes 1.4 to 6 ms per layer at 600 tokens, several times as long as reading keys and
values. What stands here computes the same sums, in float32 throughout, in 0.2 to 1 ms.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_MARK = "kt_one_token_attention"
_SDPA = "sdpa"
# Keys and values together; two threads of a machine with 40 GB/s are no faster below.
_NUMBERS_OF_ONE_THREAD = 2 << 20
# Keys whose float32 copy the second-level cache holds beside that of the values.
_NUMBERS_OF_ONE_PRODUCT = 1 << 19


def accelerate_attention(model: nn.Module) -> int:
    """Lets the attention layers of ``model``, where transformers runs them by ``sdpa``, take the
    short way when one token is decoded on the CPU; returns how many there are.

    transformers keeps its attention functions in one table for all models: the entry for ``sdpa``
    is replaced by one that looks at the layer, and leaves the layers of other models alone.
    """
    config: Any = model.config
    if config.get_text_config()._attn_implementation != _SDPA:
        return 0
    _replace_sdpa()
    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            setattr(module, _MARK, True)
            count += 1
    return count


@cache
def _replace_sdpa() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS[_SDPA]

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, **arguments: Any,
    ) -> Any:  # fmt: skip
        if getattr(module, _MARK, False) and _is_plain(query, key, attention_mask, arguments):
            return one_token(query, key, value, attention_mask, arguments.get("scaling")), None
        return original(module, query, key, value, attention_mask, **arguments)

    ALL_ATTENTION_FUNCTIONS.register(_SDPA, attention)


# Arguments that change nothing here where they are None, False or 0.
_CHANGES = ("dropout", "position_bias", "cache", "softcap", "output_attentions", "s_aux")


def _is_plain(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, arguments: dict[str, Any]
) -> bool:
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and not torch.is_grad_enabled()
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.ndim == 4 and mask.shape[1:3] == (1, 1)))
        and all(_is_nothing(arguments.get(name)) for name in _CHANGES)
    )


def _is_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, int | float) and value == 0)


def one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """query [rows, heads, 1, d]; key [rows, groups, tokens, d], value [rows, groups, tokens, dv],
    ``groups`` a divisor of ``heads``; mask None, or bool (True: seen) or to be added, [rows, 1, 1,
    tokens]. Returns [rows, 1, heads, dv] in the query's dtype."""
    with _threads_for(key.numel() + value.numel()):
        return _products(query, key, value, mask, scaling)


@contextmanager
def _threads_for(numbers: int) -> Iterator[None]:
    """Little work is done by one thread of torch: to wake others takes longer (0.1 ms)."""
    threads = torch.get_num_threads()
    if threads == 1 or numbers > _NUMBERS_OF_ONE_THREAD:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    rows, heads, _, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    # The heads of a group share keys: they are the rows of one product. In float32, since oneDNN
    # would compile its BF16 products anew for every length, 0.7 ms each.
    grouped = query.reshape(rows, key.shape[1], -1, size).float() * scaling
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    if key.numel() <= _NUMBERS_OF_ONE_PRODUCT:
        out = _attend(grouped, key, value, mask)
    else:
        # One group after the other: its float32 copies stay in the cache.
        parts = [
            _attend(grouped[row, group], key[row, group], value[row, group], _row(mask, row))
            for row in range(rows)
            for group in range(key.shape[1])
        ]
        out = torch.stack(parts)
    return out.to(query.dtype).reshape(rows, 1, heads, -1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """query [..., n, d] float32, key [..., tokens, d], value [..., tokens, dv]; float32."""
    scores = query @ key.float().transpose(-1, -2)
    if mask is not None:
        scores += mask
    return scores.softmax(dim=-1) @ value.float()


def _row(mask: torch.Tensor | None, row: int) -> torch.Tensor | None:
    return None if mask is None else mask[row if mask.shape[0] > 1 else 0, 0]
