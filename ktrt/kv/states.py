"""States of one layer in place of earlier tokens: linear attention's, short convolutions'."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from ktrt.kv.device import device_arrays
from ktrt.kv.memory import Region, ReservedRegion, TensorRegion
from ktrt.kv.places import CannotMixError, ManyPlace, SequencePlace, Shared, WindowPlace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# A state by its kind ("conv" or "recurrent") and number within the layer.
Name = tuple[str, int]


class States:
    """Arrays [slots, …] in memory that stays; models write into their rows."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._regions: dict[Name, Region] = {}
        self.arrays: dict[Name, torch.Tensor] = {}
        # The forward that ``_begun`` is of, and the convolutions that it has updated.
        self._place: object = None
        self._begun: set[int] = set()

    def follows(self, index: int) -> bool:
        """Whether the model's forward follows something: a fact of its begin, until the layer has
        stored its convolution's new state."""
        place = self._at()
        if place is None:
            return False
        return place.follows or index in self._begun

    def get(self, kind: str, index: int) -> torch.Tensor | None:
        """Returns the rows of the forward that runs, to be changed in place; None: nothing came
        before it."""
        held = self.arrays.get((kind, index))
        return None if held is None or not self.follows(index) else self._rows(held)

    def update_conv(self, new: torch.Tensor, index: int, width: int | None) -> torch.Tensor:
        """Keeps the last ``width`` inputs of a convolution (None: as many as ``new`` [rows, …, n]
        has); returns those before and ``new``."""
        width = new.shape[-1] if width is None else width
        held = self._array(("conv", index), (*new.shape[1:-1], width), new)
        rows = self._rows(held)
        if self.follows(index):
            new = torch.cat([rows, new], dim=-1)
        else:
            new = pad(new, (max(0, held.shape[-1] - new.shape[-1]), 0))
        rows.copy_(new[..., -held.shape[-1] :])
        self._begun.add(index)
        return new

    def update_recurrent(self, new: torch.Tensor, index: int) -> torch.Tensor:
        """Keeps ``new`` [rows, …]."""
        rows = self._rows(self._array(("recurrent", index), new.shape[1:], new))
        if rows.data_ptr() != new.data_ptr() or rows.stride() != new.stride():
            rows.copy_(new)
        return rows

    def _at(self) -> SequencePlace | WindowPlace | None:
        place = self._shared.place
        if isinstance(place, ManyPlace):
            raise CannotMixError("the model keeps states, one row of tokens for each sequence")
        if place is not self._place:
            self._place, self._begun = place, set()
        return place

    def _rows(self, held: torch.Tensor) -> torch.Tensor:
        place = self._shared.known_place()
        if isinstance(place, WindowPlace):
            return place.states(held)
        assert not isinstance(place, ManyPlace)
        return held[place.rows]

    def _array(self, name: Name, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        self._at()
        if name not in self.arrays:
            self._allocate(name, shape, like, self._shared.slots)
        return self.arrays[name]

    def _allocate(self, name: Name, shape: Sequence[int], like: torch.Tensor, slots: int) -> None:
        slots += self._shared.reserved  # as for keys and values
        count = math.prod(shape)
        if self._shared.driver is not None:
            # One position, all of a slot's state.
            places = [(slots, 1, 1, count)]
            (region,) = device_arrays(places, (like,), self._shared.driver)
            for slot in self._shared.asked:
                region.commit(slot, 1)
        elif self._shared.reserved and like.device.type == "cpu":
            # Whole pages for a slot, to be given back.
            page = mmap.PAGESIZE // like.element_size()
            region = ReservedRegion((slots, 1, -(-count // page) * page, 1), like)
        else:
            region = TensorRegion((slots, 1, count, 1), like)
        self._regions[name] = region
        self.arrays[name] = region.tensor.view(slots, -1)[:, :count].unflatten(1, tuple(shape))

    def commit(self, slot: int) -> None:
        """Gives a slot's states memory, before a forward reads or stores them."""
        for region in self._regions.values():
            region.commit(slot, region.tensor.shape[2])

    def keep(self, slot: int) -> dict[Name, torch.Tensor]:
        """Returns copies of a slot's states."""
        return {name: held[slot].clone() for name, held in self.arrays.items()}

    def restore(self, slot: int, kept: dict[Name, torch.Tensor]) -> None:
        """Puts states back."""
        for name, values in kept.items():
            self.arrays[name][slot].copy_(values)

    def clear(self, slot: int) -> None:
        """Gives a slot's memory back; nobody reads it before it was written."""
        for region in self._regions.values():
            region.clear(slot, 0, region.tensor.shape[2])

    def copy(self, source: int, target: int) -> None:
        """Gives ``target`` the states of ``source``."""
        for held in self.arrays.values():
            held[target].copy_(held[source])

    def grow(self, slots: int, used: Iterable[int]) -> None:
        """Moves the states of ``used`` slots into memory for ``slots``."""
        for name, old in list(self.arrays.items()):
            if len(old) >= slots + self._shared.reserved:
                continue
            self._allocate(name, old.shape[1:], old, slots)
            for slot in used:
                self.arrays[name][slot].copy_(old[slot])

    def release(self) -> None:
        """Lets go of the memory."""
        self._regions, self.arrays = {}, {}

    def bytes_of(self) -> int:
        """Returns the memory of a slot."""
        return sum(r.bytes_of(r.tensor.shape[2]) for r in self._regions.values())
