"""Keys and values of one layer: of all positions of a slot, or of its last ones in a ring.

A sliding-window layer attends to the last ``window`` positions, its own included. Its ring holds
position p at p % size, with room for ``SLACK`` more positions than the window needs: a slot can be
rolled back that far, and a chunk of a prompt finds everything in the ring. Where the capacity is no
larger than a ring, the ring is flat: nothing is ever lost.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import torch

from ktrt.errors import KtrtError
from ktrt.kv.device import device_arrays
from ktrt.kv.memory import Region, ReservedRegion, TensorRegion
from ktrt.kv.places import CannotMixError, ManyPlace, Place, SequencePlace, Shared, WindowPlace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SLACK = 1024
# A ring has a multiple of this number of positions: whole blocks for attention.
_BLOCK = 256


def ring_size(window: int) -> int:
    """Returns the positions of a ring for a window."""
    return -(-(window + SLACK) // _BLOCK) * _BLOCK


class Positions:
    """``window`` None: all positions."""

    def __init__(self, shared: Shared, window: int | None = None) -> None:
        self._shared, self.window = shared, window
        self.regions: list[Region] = []

    @property
    def size(self) -> int:
        """Positions of a slot that have memory."""
        return self._size(self._shared.capacity)

    def _size(self, capacity: int) -> int:
        return capacity if self.window is None else min(ring_size(self.window), capacity)

    @property
    def is_ring(self) -> bool:
        """Whether positions are lost when others take their place."""
        return self.size < self._shared.capacity

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Keys and values [slots, heads, size, head_dim]."""
        return [region.tensor for region in self.regions]

    def initialize(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.window is None:
            self._shared.fit(keys, values)
        self.regions = self._new((keys, values), self._shared.slots, self._shared.capacity)
        for slot, end in self._shared.asked.items():
            self.commit(slot, end)

    def _new(self, likes: Sequence[torch.Tensor], slots: int, capacity: int) -> list[Region]:
        # The last slot of reserved memory is for rows that stand for nothing.
        slots, size = slots + self._shared.reserved, self._size(capacity)
        shapes = [(slots, like.shape[1], size, like.shape[3]) for like in likes]
        if self._shared.driver is not None:
            return device_arrays(shapes, likes, self._shared.driver)
        found: list[Region] = []
        for shape, like in zip(shapes, likes, strict=True):
            pages = shape[2] * shape[3] * like.element_size() % mmap.PAGESIZE == 0
            reserved = self._shared.reserved and like.device.type == "cpu"
            kind = ReservedRegion if reserved and (pages or self.window is None) else TensorRegion
            found.append(kind(shape, like))
        return found

    def commit(self, slot: int, end: int) -> int:
        """Gives a slot's positions before ``end`` memory; returns how many have some: where all do,
        more than there can be."""
        return min((r.commit(slot, min(end, r.tensor.shape[2])) for r in self.regions), default=0)

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new positions of the forward that runs; returns all that it may attend to.

        A sequence gets its positions in order, of a ring the last window - 1 and the new ones. A
        step and a forward of many sequences get views of the memory as it lies.
        """
        place = self._shared.known_place()
        found = [
            self._store(place, *each) for each in zip(self.tensors, (keys, values), strict=True)
        ]
        if isinstance(place, ManyPlace):
            place.rows.stored += 1
        elif isinstance(place, WindowPlace):
            place.stored += 1
        return found[0], found[1]

    def _store(self, place: Place, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if isinstance(place, SequencePlace):
            return self._store_sequence(place, held, new)
        if isinstance(place, ManyPlace):
            return self._store_many(place, held, new)
        places = place.places_in(held.shape[2])
        if place.slots is None:
            rows = held[place.rows]
            _store_tokens(rows, new, places)
            return rows[:, :, : place.window]
        held[place.slots, :, places[:, 0]] = new[:, :, 0]
        seen = held[:, :, : place.window]
        return seen if place.whole else seen[place.slots]

    def _store_sequence(
        self, place: SequencePlace, held: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        start, end = place.start, place.start + new.shape[-2]
        if end > self._shared.capacity:
            raise KtrtError(
                f"the KV cache holds {self._shared.capacity} positions, {end} are needed: "
                "reserve comes first"
            )
        first = start - self.before(start)
        row, size = held[place.slot], held.shape[2]
        fits = first // size == (end - 1) // size
        # Before the new positions take the place of these.
        earlier = None if fits else self.read(row, first, start)
        kept = max(start, end - size)
        for piece, at in _pieces(kept, end, size):
            row[:, at] = new[0, :, piece.start - start : piece.stop - start]
        if earlier is None:
            return held[place.rows, :, first % size : (end - 1) % size + 1]
        return torch.cat([earlier[None], new], dim=-2)

    def before(self, length: int) -> int:
        """Returns how many of the first ``length`` positions the next one attends to."""
        return length if self.window is None else min(length, self.window - 1)

    @staticmethod
    def read(row: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Returns positions ``first`` … ``end`` - 1 of a slot's ``row`` [heads, size, head_dim], a
        copy."""
        pieces = [row[:, at] for _, at in _pieces(first, end, row.shape[1])]
        return torch.cat(pieces, dim=1) if pieces else row[:, :0].clone()

    @staticmethod
    def write(row: torch.Tensor, first: int, values: torch.Tensor) -> None:
        """Stores ``values`` [heads, n, head_dim] as the positions from ``first`` on."""
        for piece, at in _pieces(first, first + values.shape[1], row.shape[1]):
            row[:, at] = values[:, piece.start - first : piece.stop - first]

    def mask_sizes(self, queries: int) -> tuple[int, int]:
        """Returns how many positions ``store`` returns for ``queries`` new ones, and the first."""
        place = self._shared.place
        if isinstance(place, ManyPlace):
            raise CannotMixError("the model makes an attention mask")
        if isinstance(place, WindowPlace):
            if self.window is not None:
                raise CannotMixError("the model asks for the order of positions in a ring")
            return min(place.window, self.size), 0
        start = 0 if place is None else place.start
        before = self.before(start)
        return before + queries, start - before

    def _store_many(self, place: ManyPlace, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if place.rows.decode:
            self._store_rows(place, held, new)
        for span in place.rows.spans:
            if self.before(span.start) + span.count > held.shape[2]:
                raise KtrtError(
                    f"{span.count} tokens of a sequence in one forward with others, a window of "
                    f"{self.window} positions leaves room for {held.shape[2] - (self.window or 0)}"
                )
            tokens = new[0, :, span.first : span.first + span.count]
            self.write(held[span.slot], span.start, tokens)
        if place.most is None:
            return held
        slots, end = place.most
        return held[:slots, :, :end]

    def _store_rows(self, place: ManyPlace, held: torch.Tensor, new: torch.Tensor) -> None:
        rows, (heads, size, width) = place.rows, held.shape[1:]
        if self._shared.driver is not None:
            self._store_on_device(place, held, new)
            return
        if (heads, size) not in place.places:
            first = rows.slots[:, None] * heads + torch.arange(heads)
            # Rows that stand for nothing have length 0.
            positions = (rows.lengths - 1).clamp(min=0)
            if self.is_ring:
                positions = positions % size
            places = first * size + positions[:, None]
            place.places[heads, size] = places.view(-1).to(held.device)
        vectors = new[0, :, : rows.decode].transpose(0, 1).reshape(-1, width)
        held.view(-1, width).index_copy_(0, place.places[heads, size], vectors)

    def _store_on_device(self, place: ManyPlace, held: torch.Tensor, new: torch.Tensor) -> None:
        """Stores the decode rows where a slot's heads lie next to each other."""
        rows, size = place.rows, held.shape[2]
        if (0, size) not in place.places:
            positions = rows.lengths - 1
            both = torch.stack([rows.slots, positions % size if self.is_ring else positions])
            place.places[0, size] = both.to(held.device)
        slots, positions = place.places[0, size]
        held[slots, :, positions] = new[0, :, : rows.decode].transpose(0, 1)

    def clear(self, slot: int, length: int, written: int) -> None:
        """Makes positions ``length`` … ``written`` - 1 of a slot zero again, or gives their memory
        back."""
        for region in self.regions:
            size = region.tensor.shape[2]
            if written <= size:
                region.clear(slot, length, written)
            elif written - length >= size:
                region.clear(slot, 0, size)
            else:
                # Earlier positions lie after these, perhaps in the same page.
                for _, at in _pieces(length, written, size):
                    region.tensor[slot, :, at].zero_()

    def copy(self, source: int, target: int, length: int, written: int) -> None:
        """Gives ``target`` the first ``length`` of the ``written`` positions of ``source``, as far
        as a ring holds them."""
        for held in self.tensors:
            end = length if written <= held.shape[2] else held.shape[2]
            self.commit(target, end)
            held[target, :, :end] = held[source, :, :end]
        if self.regions and written > self.regions[0].tensor.shape[2]:
            self.clear(target, length, written)

    def grow(self, slots: int, capacity: int, written: list[int]) -> None:
        """Moves what each slot holds into memory for ``slots`` of ``capacity`` positions."""
        # One after the other: only one of them is ever held twice.
        for at, old in enumerate(self.tensors):
            if old.shape[2] == self._size(capacity) and slots == self._shared.slots:
                continue
            (region,) = self._new((old,), slots, capacity)
            for slot, count in enumerate(written):
                end = min(count, old.shape[2])
                region.commit(slot, end)
                region.tensor[slot, :, :end] = old[slot, :, :end]
            self.regions[at] = region

    def release(self) -> None:
        """Lets go of the memory."""
        self.regions = []

    def bytes_of(self, tokens: int) -> int:
        """Returns the memory of a slot of ``tokens``."""
        return sum(r.bytes_of(min(tokens, r.tensor.shape[2])) for r in self.regions)


def _store_tokens(rows: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> None:
    if len(places) == 1:
        # On the CPU `scatter_` takes 0.9 ms with an index that was expanded, this 7 µs.
        rows.index_copy_(2, places[0], new)
    else:
        rows.scatter_(2, places[:, :, None, None].expand_as(new), new)


def _pieces(first: int, end: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yields positions ``first`` … ``end`` - 1, ``size`` at most, in order, and where in a ring
    they lie."""
    while first < end:
        stop = min(end, (first // size + 1) * size)
        yield slice(first, stop), slice(first % size, (stop - 1) % size + 1)
        first = stop
