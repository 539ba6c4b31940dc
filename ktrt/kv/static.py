"""The KV cache of many sequences in memory that stays: what recorded steps and CUDA graphs need,
and cheap to crop.

transformers' own static cache attends to its whole capacity in every forward and cannot be cropped.
This one attends to a prefix: the exact length in a forward of one sequence, a ``window`` in a step
whose positions are read on the device, and in a forward of many sequences (``engine.step_rows``)
what the attention function reads there. Its layers hold all positions, the last ones in a ring
(``kv.positions``), states (``kv.states``), or both.
"""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import Cache, DynamicCache

from ktrt.kv.history import History
from ktrt.kv.layers import StateLayer, StaticLayer, kind_of, static_layer
from ktrt.kv.memory import ROWS_OF_PAGES
from ktrt.kv.places import (
    MIN_CAPACITY,
    CannotMixError,
    ManyPlace,
    Place,
    SequencePlace,
    Shared,
    WindowPlace,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from ktrt.engine.step_rows import StepRows
    from ktrt.kv.history import StaticMark
    from ktrt.kv.memory import Region
    from ktrt.kv.positions import Positions
    from ktrt.kv.states import Name, States

__all__ = [
    "CannotMixError", "StaticKv", "StaticLayer", "cache_argument", "keeps_states",
    "makes_own_cache", "unusual_layers",
]  # fmt: skip


def makes_own_cache(model: Any) -> bool:
    """Whether the model makes its own cache in its first forward, as a few do (MiniMax-01)."""
    return not getattr(model, "_supports_default_dynamic_cache", lambda: True)()


def cache_argument(model: Any) -> str:
    """The name of the KV cache in the model's forward and its output: ``cache`` from transformers
    5.24 on, which warns of the older name."""
    known = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def unusual_layers(model: Any) -> list[str]:
    """The classes of the layers of a model's cache that ``StaticKv`` has none for: layers of single
    models, and of sparse attention with an index."""
    if makes_own_cache(model):
        return [f"the layers of {type(model).__name__} itself"]
    layers = DynamicCache(config=model.config).layers
    return sorted({type(layer).__name__ for layer in layers if kind_of(layer) is None})


def keeps_states(model: Any) -> bool:
    """Whether layers of a model that has no unusual ones keep states."""
    layers = DynamicCache(config=model.config).layers
    return any("LinearAttention" in type(layer).__name__ for layer in layers)


class StaticKv(Cache):  # type: ignore[misc]
    """The cache of a model without ``unusual_layers``.

    ``sequence``, ``window`` and ``many`` say what the forward within their block stores, and where.
    """

    def __init__(
        self, config: Any, slots: int = 1, capacity: int | None = None, *, reserved: bool = False,
        driver: str | None = None,
    ) -> None:  # fmt: skip
        """``reserved``: addresses for all slots and positions at once, which never move: on the CPU
        (``kv.memory``), or on the GPU of ``driver`` (``kv.device``)."""
        capacity = MIN_CAPACITY if capacity is None else capacity
        if reserved:
            capacity = -(-capacity // ROWS_OF_PAGES) * ROWS_OF_PAGES
        wanted = DynamicCache(config=config).layers
        self._shared = Shared(slots, capacity, reserved, 0, driver=driver)
        super().__init__(layers=[static_layer(self._shared, layer) for layer in wanted])
        self._positions: list[Positions] = [
            layer.positions for layer in self.layers if isinstance(layer, StaticLayer)
        ]
        self._states = [layer.states for layer in self.layers if isinstance(layer, StateLayer)]
        self._shared.layers = sum(each.window is None for each in self._positions)
        rings: dict[int, list[Positions]] = {}
        for each in self._positions:
            if each.window is not None:
                rings.setdefault(each.window, []).append(each)
        self.history = History(rings, self._states, slots)
        # For each slot, the end of what may have been stored.
        self.written = [0] * slots
        self._least = capacity, slots
        self._sizes: list[tuple[Positions, int]] = []
        # Counts the moves of the memory, which end the graphs that were captured on it.
        self.moves = 0

    @property
    def capacity(self) -> int:
        """Positions of a slot that fit without a new allocation."""
        return self._shared.capacity

    @property
    def slots(self) -> int:
        """Slots that fit without a new allocation."""
        return self._shared.slots

    @property
    def has_states(self) -> bool:
        """Whether a step that is computed twice leaves something else than one computed once."""
        return bool(self._states)

    @property
    def regions(self) -> list[Region]:
        """The memory of all keys and values."""
        return [region for each in self._positions for region in each.regions]

    def reserve(self, length: int, slots: int = 1) -> bool:
        """Makes room for ``length`` positions in each of ``slots``; True if the memory moved."""
        if length <= self.capacity and slots <= self.slots:
            return False
        capacity, count = self.capacity, self.slots
        while capacity < length:
            capacity *= 2
        while count < slots:
            count *= 2
        for each in self._positions:
            each.grow(count, capacity, self.written[: self.slots])
        for states in self._states:
            states.grow(count, [slot for slot, end in enumerate(self.written) if end])
        # Last: after Ctrl-C in between, the next call starts over.
        self._shared.capacity, self._shared.slots = capacity, count
        self.written += [0] * (count - len(self.written))
        self._shared.room.clear()
        self.history.resize(count)
        moved = bool(self.regions) or any(each.arrays for each in self._states)
        self.moves += moved
        self._sizes = []
        return moved

    def truncate(self, slot: int, length: int) -> int:
        """Forgets all of a slot but the first ``length`` positions, or fewer where rings or states
        cannot go back there; returns how many it then holds. Gives their memory back where it is
        reserved."""
        mark = None
        if not self.history.stands(slot, length):
            mark = self.history.nearest(slot, length)
            length = 0 if mark is None else mark.length
        self._clear(slot, length)
        if mark is not None:
            self.commit(slot, length)
            self.history.restore(slot, mark)
        self.history.cut(slot, length)
        return length

    def _clear(self, slot: int, length: int) -> None:
        # Not only what is held: an interrupted forward may have stored more, perhaps NaN.
        written = self.written[slot]
        if written > length:
            for each in self._positions:
                each.clear(slot, length, written)
            self.written[slot] = length
        self._shared.room.pop(slot, None)
        self._shared.asked.pop(slot, None)
        if not length:
            for states in self._states:
                states.clear(slot)

    def copy(self, source: int, target: int, length: int) -> int:
        """Gives ``target``, which is empty, the first ``length`` positions of ``source``, or fewer
        as in ``truncate``; returns how many."""
        mark: StaticMark | None = None
        if not self.history.stands(source, length):
            mark = self.history.nearest(source, length)
            length = 0 if mark is None else mark.length
        if not length:
            return 0
        self.commit(target, length)
        for each in self._positions:
            each.copy(source, target, length, self.written[source])
        self.written[target] = max(self.written[target], length)
        self.history.copy(source, target, length)
        if mark is None:
            for states in self._states:
                states.copy(source, target)
        else:
            self.history.restore(target, mark)
        return length

    def mark(self, slot: int, length: int, *, replace: bool) -> None:
        """Makes it possible to go back to what a slot holds now, ``length`` positions; ``replace``:
        instead of to its latest mark."""
        self.history.mark(slot, length, replace=replace)

    def bytes_of(self, tokens: int) -> int:
        """Returns the memory of a slot of ``tokens``, without its marks; 0 before the first
        forward."""
        if not tokens:
            return 0
        sizes = self._sizes
        if not sizes:
            # One layer of each kind, and their number: every step asks for it.
            known = [each for each in self._positions if each.regions]
            shapes = [tuple(held.shape for held in each.tensors) for each in known]
            kinds = dict(zip(shapes, known, strict=True))
            sizes = [(kinds[shape], count) for shape, count in Counter(shapes).items()]
            self._sizes = sizes if len(known) == len(self._positions) else []
        states = sum(each.bytes_of() for each in self._states)
        return states + sum(count * each.bytes_of(tokens) for each, count in sizes)

    def bytes_in(self, slot: int) -> int:
        """Returns the memory that a slot takes now."""
        return self.bytes_of(self.written[slot]) + self.history.bytes_of(slot)

    def shrink(self) -> None:
        """Lets go of memory that has grown, while no slot holds anything; graphs that were captured
        on it end."""
        self._shared.capacity, self._shared.slots = self._least
        self.written = [0] * self.slots
        self.history.forget(self.slots)
        for layer in self._positions:
            layer.release()
        for states in self._states:
            states.release()
        self._shared.room.clear()
        self._shared.asked.clear()
        self._sizes = []
        self.moves += 1

    @property
    def place(self) -> Place | None:
        """The place of the running forward, for forwards that take turns."""
        return self._shared.place

    @place.setter
    def place(self, place: Place | None) -> None:
        self._shared.place = place

    @property
    def reserved(self) -> bool:
        """Whether memory never moves, and there is an ``idle_slot``."""
        return self._shared.reserved

    @property
    def idle_slot(self) -> int:
        """The slot for rows that stand for nothing, in reserved memory."""
        return self._shared.slots

    def will_write(self, slot: int, end: int) -> None:
        """Must come before a forward that stores positions before ``end``."""
        self.history.will_write(slot, end)
        self.written[slot] = max(self.written[slot], end)
        self.commit(slot, end)

    def commit(self, slot: int, end: int) -> None:
        """Gives a slot's states and positions before ``end`` memory where it does not come by
        writing: a forward may read or store them."""
        shared = self._shared
        if shared.driver is None:
            return
        shared.asked[slot] = max(shared.asked.get(slot, 0), end)
        if end <= shared.room.get(slot, 0):
            return
        for states in self._states:
            states.commit(slot)
        shared.room[slot] = min((each.commit(slot, end) for each in self._positions), default=0)

    def stored(self, slot: int, end: int) -> None:
        """Must come after a whole forward, as ``will_write`` came before it."""
        self.history.stored(slot, end)

    def rewinder(self, slots: Iterable[int]) -> Callable[[], None]:
        """Returns a function that puts the states of ``slots`` back to what they are now: a step
        that runs again must find what it found before."""
        kept: list[tuple[States, int, dict[Name, torch.Tensor]]] = []
        for slot in slots if self._states else ():
            self.commit(slot, 1)
            kept += [(each, slot, each.keep(slot)) for each in self._states]

        def rewind() -> None:
            for each, slot, states in kept:
                each.restore(slot, states)

        return rewind

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The rows of the forward that runs; None: nothing came before it."""
        found: torch.Tensor | None = self.layers[layer_idx].states.get("conv", state_idx)
        return found

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The rows of the forward that runs; None: nothing came before it."""
        found: torch.Tensor | None = self.layers[layer_idx].states.get("recurrent", state_idx)
        return found

    @contextmanager
    def sequence(self, slot: int, start: int, count: int) -> Iterator[None]:
        """Within the block the model takes the next ``count`` tokens of a slot that holds
        ``start``."""
        self.will_write(slot, start + count)
        with self._placed(SequencePlace(slot, start)):
            yield

    @contextmanager
    def window(
        self, positions: torch.Tensor, window: int | None, first: int = 0,
        slots: torch.Tensor | None = None, active: torch.Tensor | None = None,
    ) -> Iterator[WindowPlace]:  # fmt: skip
        """Within the block the model takes one token for each slot from ``first`` on, or for
        ``slots`` [rows], at ``positions`` [rows, 1] (int64, on the cache's device), and attends to
        the first ``window`` positions; the caller masks later ones, and calls ``will_write``. None:
        attention looks at the whole capacity, of which it reads what the rows hold; with ``slots``
        of all slots, of which it picks the rows'. ``active`` [rows] bool, on the device: the rows
        that stand for something; None: all. The others' slots hold nothing, or are no row's that
        does."""
        end = self.capacity if window is None else window
        place = WindowPlace(positions, end, first, slots, active, window is None)
        with self._placed(place):
            yield place
            place.finish()

    @contextmanager
    def many(self, rows: StepRows, most: tuple[int, int] | None = None) -> Iterator[None]:
        """Within the block the model takes the tokens of ``rows``, and ``update`` returns the whole
        arrays: the attention function knows what it reads of them. ``most``: cuts the arrays to
        these numbers of slots and positions, for a model whose attention may not know."""
        with self._placed(ManyPlace(rows, most)):
            yield

    @contextmanager
    def _placed(self, place: Place) -> Iterator[None]:
        self._shared.place = place
        try:
            yield
        finally:
            self._shared.place = None
