"""The KV cache of many sequences in memory that stays: what recorded steps and CUDA graphs need,
and cheap to crop.

transformers' own static cache attends to its whole capacity in every forward and cannot be cropped.
This one attends to a prefix: the exact length in a forward of one sequence, a ``window`` in a step
whose positions are read on the device, and in a forward of many sequences (``engine.step_rows``)
what the attention function reads there.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ktrt.engine.step_rows import StepRows
from ktrt.errors import KtrtError
from ktrt.kv.memory import ROWS_OF_PAGES, Region, ReservedRegion, TensorRegion, fits

logger = logging.getLogger(__name__)

# Tokens of the first allocation where memory moves; it doubles as a conversation grows.
MIN_CAPACITY = 2048


class CannotMixError(KtrtError):
    """The model asks the cache for something that sequences of one forward do not share."""


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
class _Sequence:
    """A forward of the tokens of one slot from position ``start`` on."""

    slot: int
    start: int


@dataclass
class _Window:
    """One token for each slot from ``first`` on: ``positions`` [rows, 1] int64 on the device, each
    < window. ``stored``: the layers that have stored theirs."""

    positions: torch.Tensor
    window: int
    first: int
    stored: int = 0


@dataclass
class _Many:
    """A forward of the tokens of many slots. ``most``: (slots, positions) that the arrays which it
    returns are cut to; None: whole arrays."""

    rows: StepRows
    most: tuple[int, int] | None
    # Where the decode rows are stored as one list of vectors, by the number of heads.
    places: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Shared:
    """The state that the layers of one cache share."""

    slots: int
    capacity: int
    reserved: bool
    layers: int
    place: _Sequence | _Window | _Many | None = None
    fitted: bool = False

    def fit(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Asks for fewer slots, and for fewer positions of the last one, where the process has no
        addresses for all layers."""
        if self.fitted or not self.reserved:
            return
        self.fitted = True
        wanted = self.slots, self.capacity
        one = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (key_states, value_states))
        while not fits(self.layers * self.slots * self.capacity * one):
            if self.slots > 1:
                self.slots //= 2
            elif self.capacity >= 2 * MIN_CAPACITY:
                self.capacity = self.capacity // 2 // ROWS_OF_PAGES * ROWS_OF_PAGES
            else:
                break
        if wanted != (self.slots, self.capacity):
            logger.warning(
                "The KV cache reserves addresses for %d slots of %d tokens, not for %d of %d: "
                "`ulimit -v` or vm.overcommit_memory leaves no more", self.slots, self.capacity,
                *wanted,
            )  # fmt: skip


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [slots, heads, capacity, head_dim] of one layer."""

    is_sliding, is_croppable = False, True

    def __init__(self, shared: _Shared) -> None:
        super().__init__()
        self._shared = shared
        self.regions: list[Region] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._shared.fit(key_states, value_states)
        self._take([self._new(key_states), self._new(value_states)])
        self.is_initialized = True

    def _take(self, regions: list[Region]) -> None:
        self.regions = regions
        self.keys, self.values = (region.tensor for region in regions)

    def _new(self, like: torch.Tensor) -> Region:
        shared = self._shared
        slots = shared.slots + shared.reserved  # the last one for rows that stand for nothing
        shape = slots, like.shape[1], shared.capacity, like.shape[3]
        kind = ReservedRegion if shared.reserved and like.device.type == "cpu" else TensorRegion
        return kind(shape, like)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new positions; returns views of all that the forward may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self._shared.place
        if isinstance(place, _Many):
            return self._update_many(place, key_states, value_states)
        if isinstance(place, _Window):
            rows = slice(place.first, place.first + len(place.positions))
            end = place.window
            self._store(self.keys[rows], key_states, place.positions)
            self._store(self.values[rows], value_states, place.positions)
            place.stored += 1
        elif place is not None:
            rows = slice(place.slot, place.slot + 1)
            end = place.start + key_states.shape[-2]
            if end > self._shared.capacity:
                raise KtrtError(
                    f"the KV cache holds {self._shared.capacity} positions, {end} are needed: "
                    "reserve comes first"
                )
            self.keys[rows, :, place.start : end] = key_states
            self.values[rows, :, place.start : end] = value_states
        else:
            raise KtrtError("the KV cache has many sequences: say first which one the forward is")
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    @staticmethod
    def _store(held: torch.Tensor, new: torch.Tensor, positions: torch.Tensor) -> None:
        if len(positions) == 1:
            # On the CPU `scatter_` takes 0.9 ms with an index that was expanded, this 7 µs.
            held.index_copy_(2, positions[0], new)
        else:
            held.scatter_(2, positions[:, :, None, None].expand_as(new), new)

    def _update_many(
        self, place: _Many, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            if place.rows.decode:
                self._store_rows(place, held, new)
            for span in place.rows.spans:
                tokens = slice(span.first, span.first + span.count)
                held[span.slot, :, span.start : span.start + span.count] = new[0, :, tokens]
        place.rows.stored += 1
        if place.most is None:
            return self.keys, self.values
        slots, end = place.most
        return self.keys[:slots, :, :end], self.values[:slots, :, :end]

    def _store_rows(self, place: _Many, held: torch.Tensor, new: torch.Tensor) -> None:
        rows, (heads, size) = place.rows, (held.shape[1], held.shape[3])
        if heads not in place.places:
            first = rows.slots[:, None] * heads + torch.arange(heads)
            # Rows that stand for nothing have length 0.
            positions = (rows.lengths - 1).clamp(min=0)
            places = first * self._shared.capacity + positions[:, None]
            place.places[heads] = places.view(-1).to(held.device)
        vectors = new[0, :, : rows.decode].transpose(0, 1).reshape(-1, size)
        held.view(-1, size).index_copy_(0, place.places[heads], vectors)

    def grow(self, slots: int, capacity: int, held: list[int]) -> None:
        """Moves the held positions of each slot into memory for ``slots`` of ``capacity``."""
        if not self.is_initialized:
            return
        before = self._shared.slots, self._shared.capacity
        self._shared.slots, self._shared.capacity = slots, capacity
        try:
            # One after the other: only one of them is ever held twice.
            for name in ("keys", "values"):
                old = getattr(self, name)
                region = self._new(old)
                for slot, length in enumerate(held):
                    region.tensor[slot, :, :length] = old[slot, :, :length]
                self.regions[0 if name == "keys" else 1] = region
                setattr(self, name, region.tensor)
        finally:
            self._shared.slots, self._shared.capacity = before

    def release(self) -> None:
        """Lets go of the memory."""
        self.regions = []
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False

    def get_seq_length(self) -> Any:
        place = self._shared.place
        if isinstance(place, _Many):
            raise CannotMixError("the model asks for the length of sequences that differ in length")
        if isinstance(place, _Window):
            if len(place.positions) != 1:
                raise CannotMixError(
                    "the model asks for one length of rows that may differ in length"
                )
            return place.positions[0, 0]
        return 0 if place is None else place.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        place = self._shared.place
        if isinstance(place, _Many):
            raise CannotMixError("the model makes an attention mask")
        if isinstance(place, _Window):
            return place.window, 0
        return (0 if place is None else place.start) + query_length, 0

    def get_max_length(self) -> int:
        return self._shared.capacity


class StaticKv(Cache):  # type: ignore[misc]
    """The cache of a model whose layers are all plain (see ``unusual_layers``).

    ``sequence``, ``window`` and ``many`` say what the forward within their block stores, and where.
    """

    def __init__(
        self, config: Any, slots: int = 1, capacity: int | None = None, *, reserved: bool = False
    ) -> None:
        """``reserved``: on the CPU, addresses for all slots and positions at once, which never
        move (``kv.memory``)."""
        capacity = MIN_CAPACITY if capacity is None else capacity
        if reserved:
            capacity = -(-capacity // ROWS_OF_PAGES) * ROWS_OF_PAGES
        count = len(DynamicCache(config=config).layers)
        self._shared = _Shared(slots, capacity, reserved, count)
        # For each slot, the end of what may have been stored.
        self.written = [0] * slots
        self._least = capacity, slots
        self._sizes: list[tuple[Region, int]] = []
        # Counts the moves of the memory, which end the graphs that were captured on it.
        self.moves = 0
        super().__init__(layers=[StaticLayer(self._shared) for _ in range(count)])

    @property
    def capacity(self) -> int:
        """Positions of a slot that fit without a new allocation."""
        return self._shared.capacity

    @property
    def slots(self) -> int:
        """Slots that fit without a new allocation."""
        return self._shared.slots

    def reserve(self, length: int, slots: int = 1) -> bool:
        """Makes room for ``length`` positions in each of ``slots``; True if the memory moved."""
        if length <= self.capacity and slots <= self.slots:
            return False
        capacity, count = self.capacity, self.slots
        while capacity < length:
            capacity *= 2
        while count < slots:
            count *= 2
        for layer in self.layers:
            layer.grow(count, capacity, self.written[: self.slots])
        # Last: after Ctrl-C in between, the next call starts over.
        self._shared.capacity, self._shared.slots = capacity, count
        self.written += [0] * (count - len(self.written))
        moved = any(layer.is_initialized for layer in self.layers)
        self.moves += moved
        self._sizes = []
        return moved

    def truncate(self, slot: int, length: int) -> None:
        """Forgets all of a slot but the first ``length`` positions; gives their memory back where
        it is reserved."""
        # Not only what is held: an interrupted forward may have stored more, perhaps NaN.
        written = self.written[slot]
        if written <= length:
            return
        for layer in self.layers:
            for region in layer.regions:
                region.clear(slot, length, written)
        self.written[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Gives ``target``, which is empty, the first ``length`` positions of ``source``."""
        self.written[target] = max(self.written[target], length)
        for layer in self.layers:
            for region in layer.regions:
                region.tensor[target, :, :length] = region.tensor[source, :, :length]

    def bytes_of(self, tokens: int) -> int:
        """Returns the memory of a slot of ``tokens``; 0 before the first forward."""
        if not self._sizes:
            # One array of each kind, and their number: every step asks for it.
            regions = [region for layer in self.layers for region in layer.regions]
            kinds = {region.tensor.shape: region for region in regions}
            shapes = Counter(region.tensor.shape for region in regions)
            self._sizes = [(kinds[shape], count) for shape, count in shapes.items()]
        return sum(count * region.bytes_of(tokens) for region, count in self._sizes)

    def shrink(self) -> None:
        """Lets go of memory that has grown, while no slot holds anything; graphs that were captured
        on it end."""
        self._shared.capacity, self._shared.slots = self._least
        self.written = [0] * self.slots
        for layer in self.layers:
            layer.release()
        self._sizes = []
        self.moves += 1

    @property
    def idle_slot(self) -> int:
        """The slot for rows that stand for nothing, in reserved memory."""
        return self._shared.slots

    def will_write(self, slot: int, end: int) -> None:
        """Must come before a forward that stores positions before ``end``."""
        self.written[slot] = max(self.written[slot], end)
        self.commit(slot, end)

    def commit(self, slot: int, end: int) -> None:
        """Gives a slot's positions before ``end`` memory: a forward may read or store them."""

    @contextmanager
    def sequence(self, slot: int, start: int, count: int) -> Iterator[None]:
        """Within the block the model takes the next ``count`` tokens of a slot that holds
        ``start``."""
        self.will_write(slot, start + count)
        with self._placed(_Sequence(slot, start)):
            yield

    @contextmanager
    def window(
        self, positions: torch.Tensor, window: int | None, first: int = 0
    ) -> Iterator[_Window]:
        """Within the block the model takes one token for each slot from ``first`` on, at
        ``positions`` [rows, 1] (int64, on the device), and attends to the first ``window`` (None:
        all); the caller masks later ones, and calls ``will_write``."""
        place = _Window(positions, window or self.capacity, first)
        with self._placed(place):
            yield place

    @contextmanager
    def many(self, rows: StepRows, most: tuple[int, int] | None = None) -> Iterator[None]:
        """Within the block the model takes the tokens of ``rows``, and ``update`` returns the whole
        arrays: the attention function knows what it reads of them. ``most``: cuts the arrays to
        these numbers of slots and positions, for a model whose attention may not know."""
        with self._placed(_Many(rows, most)):
            yield

    @contextmanager
    def _placed(self, place: _Sequence | _Window | _Many) -> Iterator[None]:
        self._shared.place = place
        try:
            yield
        finally:
            self._shared.place = None
