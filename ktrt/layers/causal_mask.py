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
    def mask(**call: Any) -> torch.Tensor | None:
        device = torch.device(call.get("device", "cpu"))
        function = call.get("mask_function", causal_mask_function)
        # Some releases name the queries' positions in other ways: those get a mask.
        end = call.get("q_offset"), call.get("q_length"), call.get("kv_offset", 0)
        at_the_end = isinstance(end[0], int) and sum(end) == call["kv_length"] and end[2] == 0
        plain = function is causal_mask_function and call.get("attention_mask") is None
        may_skip = call.get("allow_is_causal_skip", True)
        if device.type == "cuda" and at_the_end and plain and may_skip:
            return None
        found: torch.Tensor | None = sdpa_mask(**call)
        return found

    return mask


def mask_of_last(tokens: int, total: int, device: torch.device) -> torch.Tensor:
    """Returns the mask [tokens, total] (True: seen) of the last ``tokens`` of ``total`` positions,
    each of which sees itself and what comes before it."""
    return torch.ones(tokens, total, dtype=torch.bool, device=device).tril(total - tokens)
