"""The size of a model's KV cache, known before the model is loaded."""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import CheckpointError
from ktrt.kv.layers import kind_of
from ktrt.kv.positions import ring_size
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

    ``rings``: the same for layers with a sliding window, and the positions of the ring; ``states``:
    the bytes of each state. ``others``: bytes per token of what is none of these, for caches that
    grow differently.
    """

    arrays: tuple[tuple[int, int], ...] = ()
    others: int = 0
    rings: tuple[tuple[int, int, int], ...] = ()
    states: tuple[int, ...] = ()

    @property
    def token_bytes(self) -> int:
        """Bytes of a token that comes after many, without the rest of its pages."""
        return sum(heads * row for heads, row in self.arrays) + self.others

    def bytes_of(self, tokens: int) -> int:
        """Returns the bytes of ``tokens``, without the rest of their pages."""
        rings = sum(heads * row * min(tokens, size) for heads, row, size in self.rings)
        return tokens * self.token_bytes + rings + (sum(self.states) if tokens else 0)

    def slot_bytes(self, tokens: int, page: int = mmap.PAGESIZE) -> int:
        """Returns the bytes of the pages that a slot of ``tokens`` holds where arrays are committed
        by writing, and every head begins with a page."""
        arrays = [(heads, tokens * row) for heads, row in self.arrays]
        arrays += [(heads, min(tokens, size) * row) for heads, row, size in self.rings]
        arrays += [(1, size) for size in self.states if tokens]
        pages = sum(heads * (-(-size // page) * page) for heads, size in arrays)
        return pages + tokens * self.others


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
    return _size(cache, tokens, dtype)


def _size(cache: Any, tokens: int, dtype: torch.dtype | None) -> KvSize:
    arrays, others, rings, states = [], 0, [], []
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None) if kind_of(layer) else None
        for each in _tensors(layer):
            item = (dtype or each.dtype).itemsize
            if each.ndim == 4 and each.shape[0] == 1 and each.shape[2] == tokens:
                found = each.shape[1], each.shape[3] * item
                if window:
                    rings.append((*found, ring_size(window)))
                else:
                    arrays.append(found)
            elif each.ndim:  # a window's size is a tensor without dimensions
                others += each.numel() * item // tokens
        for kind in ("conv_states", "recurrent_states"):
            kept = [each for each in getattr(layer, kind, {}).values() if each is not None]
            # Recurrent states have their own precision, whatever the model's.
            as_stored = None if kind == "recurrent_states" else dtype
            states += [each.numel() * (as_stored or each.dtype).itemsize for each in kept]
    return KvSize(tuple(arrays), others, tuple(rings), tuple(states))


def _without_experts(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def cached_tensors(cache: Any) -> list[torch.Tensor]:
    """Returns the tensors in a cache of transformers."""
    return [each for layer in cache.layers for each in _tensors(layer)]


def _tensors(layer: Any) -> list[torch.Tensor]:
    return [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
