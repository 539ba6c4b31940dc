"""Where the pool's slots keep keys and values: all in one static cache, or each in a cache of
transformers, for models with layers that the static one has no kind for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._pytree import tree_iter
from transformers import DynamicCache

from ktrt.kv.snapshots import Mark, crop, needs_marks
from ktrt.kv.static import StaticKv, makes_own_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt.kv.slot import Slot

# Snapshots that a cache with windows or states keeps: three for each of two turns.
_MOST_MARKS = 6


class Store(Protocol):
    """The keys and values of all slots. Lengths are the callers'."""

    @property
    def slots(self) -> int:
        """The most slots there can be."""

    @property
    def knows_sizes(self) -> bool:
        """Whether ``bytes_of`` is right for any number of tokens."""

    @property
    def grows(self) -> bool:
        """Whether another slot takes other memory than a closed one's."""

    def reaches(self, slot: Slot, length: int) -> bool:
        """Returns whether a slot can be rolled back to exactly ``length`` positions."""

    def truncate(self, slot: Slot, length: int) -> int:
        """Rolls a slot back to ``length`` positions, or fewer where its cache cannot be cropped;
        returns how many it then holds. After an interrupted forward too."""

    def copy(self, source: Slot, target: Slot, length: int) -> int:
        """Gives the empty ``target`` the first ``length`` positions of ``source``, or fewer;
        returns how many."""

    def mark(self, slot: Slot, *, replace: bool) -> None:
        """Saves a snapshot of the slot where cropping may be impossible later."""

    def bytes_of(self, tokens: int) -> int:
        """Returns the memory of a slot of ``tokens``; 0 while it is not known."""

    def written_bytes(self, slot: Slot) -> int:
        """Returns the memory that the slot takes now."""

    def shrink(self) -> None:
        """Lets go of memory that has grown, while no slot holds anything."""


class PlainStore:
    """Slots of one static cache."""

    def __init__(self, cache: StaticKv, slots: int | None = None) -> None:
        """``slots``: the most that the cache may grow to; None: as many as it has."""
        self.cache, self._slots = cache, slots

    @property
    def slots(self) -> int:
        return self.cache.slots if self._slots is None else self._slots

    @property
    def knows_sizes(self) -> bool:
        return True

    @property
    def grows(self) -> bool:
        return self._slots is not None

    def reaches(self, slot: Slot, length: int) -> bool:
        return slot.index >= self.cache.slots or self.cache.history.stands(slot.index, length)

    def truncate(self, slot: Slot, length: int) -> int:
        if slot.index < self.cache.slots:
            return self.cache.truncate(slot.index, length)
        return length

    def copy(self, source: Slot, target: Slot, length: int) -> int:
        self.cache.reserve(length, target.index + 1)
        return self.cache.copy(source.index, target.index, length)

    def mark(self, slot: Slot, *, replace: bool) -> None:
        if slot.index < self.cache.slots:
            self.cache.mark(slot.index, slot.length, replace=replace)

    def bytes_of(self, tokens: int) -> int:
        return self.cache.bytes_of(tokens)

    def written_bytes(self, slot: Slot) -> int:
        if slot.index >= self.cache.slots:
            return 0
        return self.cache.bytes_in(slot.index)

    def shrink(self) -> None:
        if self._slots is not None:
            self.cache.shrink()


class OwnStore:
    """A cache of transformers for each slot, and the snapshots that it can return to."""

    def __init__(self, model: Any, slots: int) -> None:
        self._model, self._slots = model, slots
        self._own = makes_own_cache(model)
        # By slot; None where the model's next forward makes it.
        self.caches: dict[int, Any] = {}
        self._marks: dict[int, list[Mark]] = {}
        # Bytes and tokens of the largest cache so far.
        self._largest = 0, 1

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def knows_sizes(self) -> bool:
        return False

    @property
    def grows(self) -> bool:
        return True

    def cache(self, slot: Slot) -> Any:
        """Returns the slot's cache, a new one if it has none; None: the model makes it."""
        if slot.index not in self.caches and not self._own:
            self.caches[slot.index] = DynamicCache(config=self._model.config)
        return self.caches.get(slot.index)

    def reaches(self, slot: Slot, length: int) -> bool:
        return length == 0 and slot.index in self.caches

    def truncate(self, slot: Slot, length: int) -> int:
        cache = self.caches.get(slot.index)
        if cache is None or length == 0:
            return self._drop(slot)
        marks = [m for m in self._marks.get(slot.index, []) if m.length <= length]
        if not crop(cache, length):
            length = marks[-1].length if marks else 0
            if not marks or not marks[-1].restore(cache):
                return self._drop(slot)
        self._marks[slot.index] = marks
        return length

    def _drop(self, slot: Slot) -> int:
        self.caches.pop(slot.index, None)
        self._marks.pop(slot.index, None)
        return 0

    def copy(self, source: Slot, target: Slot, length: int) -> int:
        cache = self.caches.get(source.index)
        if cache is None:
            return 0
        self.caches[target.index] = copy.deepcopy(cache)
        self._marks[target.index] = list(self._marks.get(source.index, []))
        return self.truncate(target, length)

    def mark(self, slot: Slot, *, replace: bool) -> None:
        cache = self.caches.get(slot.index)
        if cache is None or not slot.length or not needs_marks(cache):
            return
        marks = self._marks.get(slot.index, [])
        if replace and marks:
            marks = marks[:-1]
        if all(mark.length != slot.length for mark in marks):
            marks = [*marks[1 - _MOST_MARKS :], Mark.of(cache, slot.length)]
        self._marks[slot.index] = marks

    def bytes_of(self, tokens: int) -> int:
        """Returns the share of the largest cache so far: windows and states do not grow with the
        tokens, so that a short cache takes more than its share, and a long one less."""
        size, count = self._largest
        return -(-size * tokens // count)

    def written_bytes(self, slot: Slot) -> int:
        cache = self.caches.get(slot.index)
        if cache is None:
            return 0
        kept = [vars(layer) for layer in cache.layers], getattr(cache, "linear_cache", None)
        marks = [mark.kept for mark in self._marks.get(slot.index, [])]
        # A mark shares what its cache has not replaced since.
        storages = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in _tensors((kept, marks))
        }
        size = sum(storages.values())
        if slot.length and size > self._largest[0]:
            self._largest = size, slot.length
        return size

    def shrink(self) -> None:
        """There is nothing: each slot has its own memory."""


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (each for each in tree_iter(tree) if isinstance(each, torch.Tensor))
