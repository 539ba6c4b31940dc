"""The size of a model's KV cache, known before the model is loaded."""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import CheckpointError
from ktrt.kv.static import cache_argument
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KvSize:
    """The arrays [slots, heads, positions, size] of a KV cache, two for each plain layer: of each
    the heads, and the bytes of one position of one head.

    ``others``: bytes per token of what is no such array, for caches that grow differently.
    """

    arrays: tuple[tuple[int, int], ...] = ()
    others: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, without the rest of its pages."""
        return sum(heads * row for heads, row in self.arrays) + self.others

    def slot_bytes(self, tokens: int, page: int = mmap.PAGESIZE) -> int:
        """Returns the bytes of the pages that a slot of ``tokens`` holds where arrays are committed
        by writing, and every head begins with a page."""
        heads = sum(count * (-(-tokens * row // page) * page) for count, row in self.arrays)
        return heads + tokens * self.others


def kv_size(skeleton: nn.Module, expert_paths: Iterable[str], dtype: torch.dtype | None) -> KvSize:
    """Runs two tokens through the model on the meta device and returns the size of their cache;
    nothing, with a log line, for a model that cannot run there. ``dtype`` None: the model's."""
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
        return KvSize()
    except (LookupError, ArithmeticError) as error:  # not the meta device's fault
        raise CheckpointError(
            f"config.json describes a {type(skeleton).__name__} that cannot run: "
            f"{type(error).__name__}: {error}. Correct the file, or download it again."
        ) from error
    arrays, others = [], 0
    for each in cached_tensors(cache):
        item = (dtype or each.dtype).itemsize
        if each.ndim == 4 and each.shape[0] == 1 and each.shape[2] == tokens:
            arrays.append((each.shape[1], each.shape[3] * item))
        else:
            others += each.numel() * item // tokens
    return KvSize(tuple(arrays), others)


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
