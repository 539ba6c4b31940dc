"""A KV cache in fixed memory: what a CUDA graph of a decode step needs, and cheap to crop.

transformers' own static cache attends to its whole capacity in every forward and cannot be cropped;
this one attends to a prefix: the exact length in a plain forward, a ``window`` in a step whose
positions are read on the device.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ktrt.errors import KtrtError

# Tokens of the first allocation; it doubles as the conversation grows.
MIN_CAPACITY = 2048


def makes_own_cache(model: Any) -> bool:
    """Whether the model makes its own cache in its first forward, as a few do (MiniMax-01)."""
    return not getattr(model, "_supports_default_dynamic_cache", lambda: True)()


def cache_argument(model: Any) -> str:
    """The name of the KV cache in the model's forward and its output: ``cache`` from transformers
    5.24 on, which warns of the older name."""
    known = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def unusual_layers(model: Any) -> list[str]:
    """The classes of the layers of a model's cache that are not plain.

    Only the plain layer can be cropped, and continued by several tokens at once: a sliding window
    forgets, and some linear-attention layers restart from nothing (transformers 5.23).
    """
    if makes_own_cache(model):
        return [f"the layers of {type(model).__name__} itself"]
    layers = DynamicCache(config=model.config).layers
    return sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})


@dataclass
class _Step:
    """A step of one token per row: ``positions`` [rows, 1] int64 on the device, each < window."""

    positions: torch.Tensor
    window: int


@dataclass
class _Shared:
    """The state that the layers of one cache share."""

    capacity: int
    step: _Step | None = None


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [rows, heads, capacity, head_dim] of one layer, of which the first ``length``
    positions are held."""

    is_sliding = False
    is_croppable = True

    def __init__(self, shared: _Shared) -> None:
        super().__init__()
        self._shared = shared
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = self._shared.capacity
        self.keys, self.values = self._new(key_states, capacity), self._new(value_states, capacity)
        self.is_initialized = True

    def _new(self, like: torch.Tensor, capacity: int) -> torch.Tensor:
        # Zeros: what is masked is still multiplied by 0, which makes NaN of an arbitrary value. No
        # inference tensors, which could not be changed outside of inference mode.
        rows, heads, _, size = like.shape
        with torch.inference_mode(False):
            return like.new_zeros(rows, heads, capacity, size)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new positions; returns views of all that the forward may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if (step := self._shared.step) is not None:
            end = step.window
            self._store(self.keys, key_states, step.positions)
            self._store(self.values, value_states, step.positions)
        else:
            end = self.length + key_states.shape[-2]
            if end > self._shared.capacity:
                raise KtrtError(
                    f"the KV cache holds {self._shared.capacity} positions, {end} are needed: "
                    "reserve comes first"
                )
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
            self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @staticmethod
    def _store(held: torch.Tensor, new: torch.Tensor, positions: torch.Tensor) -> None:
        if len(positions) == 1:
            # On the CPU `scatter_` takes 0.9 ms with an index that was expanded, this 7 µs.
            held.index_copy_(2, positions[0], new)
        else:
            held.scatter_(2, positions[:, :, None, None].expand_as(new), new)

    def grow(self, capacity: int) -> None:
        """Moves the held positions into memory for ``capacity``."""
        if not self.is_initialized:
            return
        # One after the other: only one of them is ever held twice.
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._new(old, capacity)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last positions, of which this is the negative count."""
        self.truncate(self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        """Forgets everything."""
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Forgets all but the first ``length`` positions."""
        self.length = length
        if self.is_initialized:
            # Not only what is counted: an interrupted forward may have stored more, perhaps NaN.
            self.keys[:, :, length:].zero_()
            self.values[:, :, length:].zero_()

    def get_seq_length(self) -> Any:
        step = self._shared.step
        if step is None:
            return self.length
        if step.positions.shape[0] != 1:
            raise KtrtError("the model asks for one length of rows that may differ in length")
        return step.positions[0, 0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        step = self._shared.step
        return (self.length + query_length if step is None else step.window), 0

    def get_max_length(self) -> int:
        return self._shared.capacity


class StaticKv(Cache):  # type: ignore[misc]
    """The cache of a model whose layers are all plain (see ``unusual_layers``).

    A plain forward appends like transformers' dynamic cache. Inside ``step`` the model stores and
    attends by device-side positions, so that the same kernels serve every later token.
    """

    def __init__(self, config: Any) -> None:
        self._shared = _Shared(MIN_CAPACITY)
        count = len(DynamicCache(config=config).layers)
        super().__init__(layers=[StaticLayer(self._shared) for _ in range(count)])

    @property
    def capacity(self) -> int:
        """Positions that fit without a new allocation."""
        return self._shared.capacity

    def reserve(self, length: int) -> bool:
        """Makes room for ``length`` positions; True if the memory moved, which ends the graphs that
        were captured on it."""
        if length <= self.capacity:
            return False
        capacity = self.capacity
        while capacity < length:
            capacity *= 2
        for layer in self.layers:
            layer.grow(capacity)
        # Last: after Ctrl-C in between, the next call starts over.
        self._shared.capacity = capacity
        return any(layer.is_initialized for layer in self.layers)

    def set_length(self, length: int) -> None:
        """How many positions are held, after steps that only the device counted."""
        for layer in self.layers:
            layer.length = length

    @contextmanager
    def step(self, positions: torch.Tensor, window: int) -> Iterator[None]:
        """Within the block the model takes one token per row, at ``positions`` [rows, 1] (int64, on
        the cache's device), and attends to the first ``window`` positions; the caller masks
        later ones. Lengths do not change."""
        self._shared.step = _Step(positions, window)
        try:
            yield
        finally:
            self._shared.step = None
