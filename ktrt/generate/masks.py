"""Attention masks of decode steps whose positions are read on the device: fixed sizes, one mask for
each kind of attention in the model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from ktrt.errors import KtrtError
from ktrt.generate.forwards import mask_of_many
from ktrt.kv.positions import ring_size

if TYPE_CHECKING:
    from ktrt.kv.static import StaticKv

# Kinds of attention in layers that keep states as well.
_HYBRID = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}


def attention_mask(model: Any, cache: StaticKv, positions: torch.Tensor, window: int | None) -> Any:
    """The mask [rows, 1, 1, window], in the form that the model's attention takes: the positions up
    to each row's own. For layers with a sliding window, or with attention in chunks, as many as
    their ring has, where it has fewer. ``window`` None: masks that nobody reads.

    Models in which kinds of attention differ take a mask by kind: a dict.
    """
    kinds = _kinds(model)
    if window is None:
        masks = dict.fromkeys(kinds, mask_of_many(positions.device))
    else:
        window = min(window, cache.capacity)
        masks = {
            kind: _formed(model, _seen(positions, window, size, in_chunks="chunked" in kind))
            for kind, size in kinds.items()
        }
    if len(set(kinds.values())) > 1:
        # Layers with states take masks of padding, of which there is none.
        return {"linear_attention": None, "conv": None, **masks}
    return next(iter(masks.values()))


def plain_mask(model: Any, mask: Any) -> torch.Tensor:
    """Returns the one of ``attention_mask``'s masks that hides the later positions and nothing
    else; a mask of nobody where there is none."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    elif None not in _kinds(model).values():
        mask = None
    return torch.empty(0) if mask is None else mask


def _kinds(model: Any) -> dict[str, int | None]:
    """Returns the model's kinds of attention: of each the window, None for all positions."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers
    names = getattr(config, "layer_types", None) or [None] * len(layers)
    found: dict[str, int | None] = {}
    for name, layer in zip(names, layers, strict=False):
        if not hasattr(layer, "get_mask_sizes"):
            continue  # states, or nothing
        size = getattr(layer, "sliding_window", None)
        kind = _HYBRID.get(name, name) or ("full_attention" if size is None else "sliding")
        if found.setdefault(kind, size) != size:
            raise KtrtError(
                f"layers of {kind} have windows of {found[kind]} and {size} positions: one mask "
                "cannot serve both"
            )
    return found or {"full_attention": None}


def _seen(
    positions: torch.Tensor, window: int, size: int | None, *, in_chunks: bool
) -> torch.Tensor:
    """Returns [rows, places] bool; ``size``: the sliding window, or the size of a chunk."""
    if size is None:
        return torch.arange(window, device=positions.device) <= positions
    ring = min(window, ring_size(size))
    places = torch.arange(ring, device=positions.device)
    # The latest position, up to the row's own, that lies there.
    held = positions - (positions - places) % ring
    if in_chunks:
        if positions.is_cuda:
            raise KtrtError("attention in chunks has no decode kernel on a GPU")
        return (held >= 0) & (held // size == positions // size)
    return (held >= 0) & (held > positions - size)


def _formed(model: Any, seen: torch.Tensor) -> torch.Tensor:
    seen = seen[:, None, None, :]
    implementation = model.config._attn_implementation
    if implementation == "sdpa" or _takes_sdpa_mask(implementation):
        return seen
    if implementation != "eager":
        raise KtrtError(f"attention {implementation} takes no mask of a fixed length")
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _takes_sdpa_mask(implementation: str) -> bool:
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return False
    # transformers may have wrapped sdpa_mask itself.
    found = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    return inspect.unwrap(found, stop=lambda each: each is sdpa_mask) is sdpa_mask
