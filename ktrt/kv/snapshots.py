"""Rolls transformers' caches back: by cropping, or to a mark where layers cannot be cropped.

A cache holds the same positions in every layer, in one of three ways. *Full* layers hold each of
them and can be cropped. *Windows* hold the last ones, and can be cropped as long as they have
dropped none. *States* (linear attention, convolutions, compressors) hold a summary and cannot be
cropped at all. A mark keeps the windows and states of one position, which is little memory, so that
the whole cache can return there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache, cache_utils

from ktrt.kv.static import makes_own_cache


def _classes(*names: str) -> tuple[type, ...]:
    """The classes of these names that this version of transformers has."""
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


_FULL = _classes("DynamicLayer", "DynamicIndexedLayer")
_WINDOW = _classes("DynamicSlidingWindowLayer")
_BOTH = _classes("LinearAttentionAndFullAttentionLayer")
_STATES = _classes("LinearAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer") + _BOTH
_NOTHING = _classes("DummyLayer")
# Layers and caches of single models that behave as windows and states do.
_OF_MODELS = {"DeepseekV4HCACache", "DeepseekV4CSACache"}
_MODELS_WITH_OWN_CACHE = {"minimax"}
# Their linear attention restarts from nothing when several tokens follow a state (5.23).
_RESTARTING_MODELS = {"jamba"}
# Where several tokens after a state were checked with every other model; before, some restarted.
_CHECKED_VERSION = (5, 23)

# The attributes of a window or state that a mark keeps. An update replaces tensors directly in a
# layer, which may be shared with the mark; it may write to tensors in a dict or list.
_KEPT = (
    "keys", "values", "cumulative_length", "is_initialized",
    "conv_states", "recurrent_states", "has_previous_state", "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "buffer_kv", "buffer_gate", "compressed_kv", "entry_count", "overlap_kv", "overlap_gate",
    "linear_cache",
)  # fmt: skip


def continues(model: Any) -> bool:
    """Whether several tokens at once can follow what the model's cache holds: chunks of a prompt,
    or a new turn. If not, every prompt is one forward."""
    config = model.config.get_text_config()
    names = {str(model.config.model_type), str(config.model_type)}
    if makes_own_cache(model):
        return bool(names & _MODELS_WITH_OWN_CACHE)
    if names & _RESTARTING_MODELS:
        return False
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    known = {*_FULL, *_WINDOW, *_STATES, *_NOTHING}
    if any(kind not in known and kind.__name__ not in _OF_MODELS for kind in kinds):
        return False
    return not kinds & {*_STATES} or _version() >= _CHECKED_VERSION


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


@dataclass(frozen=True)
class Mark:
    """The windows and states of a cache after ``length`` positions."""

    length: int
    kept: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, cache: Any, length: int) -> "Mark":
        return cls(length, tuple(_keep(part) for part in _parts(cache)))

    def restore(self, cache: Any) -> bool:
        """Rolls the cache back; False if that is impossible: the cache is then unusable."""
        for part, kept in zip(_parts(cache), self.kept, strict=True):
            for name, value in kept.items():
                setattr(part, name, _copied(value))
        full = [layer for layer in cache.layers if _holds_all(layer)]
        return _crop_all(full, self.length)


def crop(cache: Any, length: int) -> bool:
    """Makes every layer hold exactly the first ``length`` positions; False, with nothing changed,
    if one of them cannot. After an interrupted forward too, when layers differ in what they hold.
    """
    if isinstance(getattr(cache, "linear_cache", None), list):
        return False
    return all(_is_croppable(layer) for layer in cache.layers) and _crop_all(cache.layers, length)


def needs_marks(cache: Any) -> bool:
    """Whether ``crop`` may be impossible."""
    return any(_parts(cache))


def _parts(cache: Any) -> list[Any]:
    """The layers that a mark has to keep something of, and the cache itself if it holds states."""
    parts = [layer for layer in cache.layers if not _is_croppable(layer) or _is_window(layer)]
    return [*parts, cache] if hasattr(cache, "linear_cache") else parts


def _keep(part: Any) -> dict[str, Any]:
    skipped = ("keys", "values") if _holds_all(part) else ()
    names = (name for name in _KEPT if name not in skipped and name in vars(part))
    return {name: _copied(getattr(part, name)) for name in names}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cloned(each) for key, each in value.items()}
    return [_cloned(each) for each in value] if isinstance(value, list) else value


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_window(layer: Any) -> bool:
    return type(layer) in _WINDOW


def _is_croppable(layer: Any) -> bool:
    return type(layer) in (*_FULL, *_WINDOW, *_NOTHING)


def _holds_all(part: Any) -> bool:
    """Whether it has keys and values of all positions, with states or without."""
    return type(part) in (*_FULL, *_BOTH)


def _crop_all(layers: Iterable[Any], length: int) -> bool:
    layers = [layer for layer in layers if layer.is_initialized and layer.keys is not None]
    if not all(_reaches(layer, length) for layer in layers):
        return False
    for layer in layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        if _is_window(layer):
            layer.cumulative_length = length
        if getattr(layer, "indexer_keys", None) is not None:
            layer.indexer_keys = layer.indexer_keys[:, :length]
        if getattr(layer, "indexer_position_ids", None) is not None:
            layer.indexer_position_ids = layer.indexer_position_ids[..., :length]
    return True


def _reaches(layer: Any, length: int) -> bool:
    """Whether a layer holds all of the first ``length`` positions."""
    held: int = min(layer.keys.shape[-2], layer.values.shape[-2])
    dropped = _is_window(layer) and layer.cumulative_length > held
    return held >= length and not dropped
