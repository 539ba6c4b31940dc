"""The size of a model's KV cache, known before the model is loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import CheckpointError
from ktrt.kv.static import cache_argument
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

logger = logging.getLogger(__name__)


def kv_bytes_per_token(
    skeleton: nn.Module, expert_paths: Iterable[str], dtype: torch.dtype | None
) -> int:
    """Runs two tokens through the model on the meta device and returns the bytes of KV cache per
    token; 0, with a log line, for a model that cannot run there. ``dtype`` None: the model's."""
    from transformers import DynamicCache

    cache = DynamicCache(config=skeleton.config)
    tokens = 2
    try:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        with torch.no_grad(), Patches() as patches:
            for path in expert_paths:
                patches.set(skeleton.get_submodule(path), "forward", _without_experts)
            skeleton(input_ids=ids, use_cache=True, **{cache_argument(skeleton): cache})
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        logger.info("The size of the KV cache is not known beforehand (%s)", error)
        return 0
    except (LookupError, ArithmeticError) as error:  # not the meta device's fault
        raise CheckpointError(
            f"config.json describes a {type(skeleton).__name__} that cannot run: "
            f"{type(error).__name__}: {error}. Correct the file, or download it again."
        ) from error
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in cached_tensors(cache)) // tokens


def _without_experts(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def cached_tensors(cache: Any) -> list[torch.Tensor]:
    """Returns the tensors in a cache of transformers."""
    return [
        value
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    ]
