"""The layers of the static cache, one class for each kind of transformers' dynamic cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from ktrt.kv.positions import Positions
from ktrt.kv.states import States

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ktrt.kv.memory import Region
    from ktrt.kv.places import Shared

# transformers has states from 5.4 on, and layers that hold nothing from 5.18 on.
_States: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", object)
_Nothing: Any = getattr(cache_utils, "DummyLayer", object)


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer; ``window`` None: all."""

    is_croppable = True

    def __init__(self, shared: Shared, window: int | None = None) -> None:
        self._shared, self.positions = shared, Positions(shared, window)
        self.is_sliding = window is not None

    @property
    def regions(self) -> list[Region]:
        return self.positions.regions

    @property
    def is_initialized(self) -> bool:
        return bool(self.positions.regions)

    @property
    def keys(self) -> torch.Tensor | None:
        return self.positions.tensors[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        return self.positions.tensors[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.positions.initialize(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new positions; returns all that the forward may attend to."""
        if not self.is_initialized:
            StaticLayer.lazy_initialization(self, key_states, value_states)
        return self.positions.store(key_states, value_states)

    def get_seq_length(self) -> Any:
        return self._shared.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.positions.mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self._shared.capacity


class StateLayer(_States):  # type: ignore[misc]
    """States of one layer."""

    record_past = False

    def __init__(self, shared: Shared, count: int) -> None:
        # Not the base's own, which makes tensors of one sequence.
        self.states, self.number_of_states = States(shared), count

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return {index: self.states.follows(index) for index in range(self.number_of_states)}

    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:
        return {index: self.states.get("conv", index) for index in range(self.number_of_states)}

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        return {
            index: self.states.get("recurrent", index) for index in range(self.number_of_states)
        }

    def lazy_initialization(self, *_args: Any, **_kwargs: Any) -> None:
        """The first update does that."""

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None,
        **_kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        return self.states.update_conv(conv_states, state_idx, conv_kernel_size)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **_kwargs: Any
    ) -> torch.Tensor:
        return self.states.update_recurrent(recurrent_states, state_idx)


class HybridLayer(StateLayer, StaticLayer):
    """Keys and values, and states."""

    def __init__(self, shared: Shared, count: int, window: int | None = None) -> None:
        StaticLayer.__init__(self, shared, window)
        StateLayer.__init__(self, shared, count)


class NoLayer(_Nothing):  # type: ignore[misc]
    """Nothing: a layer without attention, or with the keys and values of another one."""


# By transformers' class: whether it holds positions (in a window), and states.
_KINDS: dict[str, Callable[[Shared, Any], Any]] = {
    "DynamicLayer": lambda shared, _: StaticLayer(shared),
    "DynamicSlidingWindowLayer": lambda shared, like: StaticLayer(shared, like.sliding_window),
    "LinearAttentionLayer": lambda shared, like: StateLayer(shared, like.number_of_states),
    "LinearAttentionAndFullAttentionLayer": lambda shared, like: HybridLayer(
        shared, like.number_of_states
    ),
    "LinearAttentionAndSlidingWindowAttentionLayer": lambda shared, like: HybridLayer(
        shared, like.number_of_states, like.sliding_window
    ),
    "DummyLayer": lambda _shared, _like: NoLayer(),
}


def kind_of(layer: Any) -> str | None:
    """Returns the name of the class of a layer of transformers' dynamic cache; None: this cache
    has none for it."""
    name = type(layer).__name__
    known = name in _KINDS and getattr(cache_utils, name, None) is type(layer)
    return name if known else None


def static_layer(shared: Shared, like: Any) -> Any:
    """Returns the layer for one of transformers' dynamic cache, whose kind is known."""
    return _KINDS[type(like).__name__](shared, like)
