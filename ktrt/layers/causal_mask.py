"""Attention masks of transformers that are left out, where an attention function needs none."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@functools.cache
def mask_or_none() -> Callable[..., torch.Tensor | None]:
    """Returns a mask function of transformers: ``sdpa_mask``, and on a GPU None where each query
    sees itself and every position before it, and the last query is the last position. 8,192 tokens
    after 24,576 others would have a mask of 268 MB."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    @functools.wraps(sdpa_mask)
    def mask(
        batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0,
        mask_function: Callable[..., bool] = causal_mask_function,
        attention_mask: torch.Tensor | None = None, **options: Any,
    ) -> torch.Tensor | None:  # fmt: skip
        plain = mask_function is causal_mask_function and attention_mask is None
        on_gpu = torch.device(options.get("device", "cpu")).type == "cuda"
        if plain and on_gpu and isinstance(q_offset, int):
            at_the_end = kv_offset == 0 and q_offset + q_length == kv_length
            if at_the_end and options.get("allow_is_causal_skip", True):
                return None
        found: torch.Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            **options,
        )  # fmt: skip
        return found

    return mask


def mask_of_last(tokens: int, total: int, device: torch.device) -> torch.Tensor:
    """Returns the mask [tokens, total] (True: seen) of the last ``tokens`` of ``total`` positions,
    each of which sees itself and what comes before it."""
    return torch.ones(tokens, total, dtype=torch.bool, device=device).tril(total - tokens)
