"""The place of the forward that runs in a static cache, and the other facts that its layers
share."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import KtrtError
from ktrt.kv import device
from ktrt.kv.memory import ROWS_OF_PAGES, fits

if TYPE_CHECKING:
    from ktrt.engine.step_rows import StepRows

logger = logging.getLogger(__name__)

# Tokens of the first allocation where memory moves; it doubles as a conversation grows.
MIN_CAPACITY = 2048


class CannotMixError(KtrtError):
    """The model asks the cache for something that sequences of one forward do not share."""


@dataclass(eq=False)
class SequencePlace:
    """A forward of the tokens of one slot from position ``start`` on."""

    slot: int
    start: int

    @property
    def rows(self) -> slice:
        return slice(self.slot, self.slot + 1)

    @property
    def follows(self) -> bool:
        """Whether the slot holds something."""
        return self.start > 0


@dataclass(eq=False)
class WindowPlace:
    """A step of one token per row: ``positions`` [rows, 1] int64 on the device, each < window.

    Without ``slots`` the rows' slots are those from ``first`` on. ``slots`` [rows] int64, on the
    device: the rows' own, which are data; ``active`` [rows] bool, there too: the rows that stand
    for something; None: all. ``whole``: attention picks the slots itself, of all. ``stored``: the
    layers that have stored theirs."""

    positions: torch.Tensor
    window: int
    first: int
    slots: torch.Tensor | None = None
    active: torch.Tensor | None = None
    whole: bool = False
    stored: int = 0
    follows = True
    # Positions in rings, by the rings' size.
    _in_rings: dict[int, torch.Tensor] = field(default_factory=dict)
    # By the memory of states: that memory, and a copy of the rows, which the model changes.
    _copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.positions))

    def places_in(self, size: int) -> torch.Tensor:
        """Returns where memory for ``size`` positions of a slot has the rows' own."""
        if self.window <= size:
            return self.positions
        if size not in self._in_rings:
            self._in_rings[size] = self.positions % size
        return self._in_rings[size]

    def states(self, held: torch.Tensor) -> torch.Tensor:
        """Returns the rows of ``held`` [slots, …] for the model to read and to change: where slots
        are data a copy, which ``finish`` stores."""
        if self.slots is None:
            return held[self.rows]
        key = held.data_ptr()
        if key not in self._copies:
            self._copies[key] = held, held[self.slots]
        return self._copies[key][1]

    def finish(self) -> None:
        """Stores the states of the rows that stand for something: a state takes no token twice."""
        for held, changed in self._copies.values():
            if self.active is not None:
                active = self.active.view(-1, *[1] * (held.ndim - 1))
                changed = torch.where(active, changed, held[self.slots])
            held[self.slots] = changed


@dataclass(eq=False)
class ManyPlace:
    """A forward of the tokens of many slots. ``most``: (slots, positions) that the arrays which it
    returns are cut to; None: whole arrays."""

    rows: StepRows
    most: tuple[int, int] | None
    # Where the decode rows are stored as one list of vectors, by heads and positions of a slot.
    places: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


Place = SequencePlace | WindowPlace | ManyPlace


@dataclass
class Shared:
    """The state that the layers of one cache share. ``layers``: those that hold all positions.
    ``driver``: of a GPU on which addresses are reserved; None: on the CPU."""

    slots: int
    capacity: int
    reserved: bool
    layers: int
    place: Place | None = None
    fitted: bool = False
    driver: str | None = None
    # By slot: positions that memory was asked for, and those that have some in every layer.
    asked: dict[int, int] = field(default_factory=dict)
    room: dict[int, int] = field(default_factory=dict)

    def fit(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Asks for fewer slots, and for fewer positions of the last one, where the process has no
        addresses for all layers."""
        if self.fitted or not self.reserved:
            return
        self.fitted = True
        wanted = self.slots, self.capacity
        one = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (key_states, value_states))
        while not self._fits(self.layers * self.slots * self.capacity * one):
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

    def _fits(self, size: int) -> bool:
        return fits(size) if self.driver is None else device.fits(size, self.driver)

    def known_place(self) -> Place:
        """Returns the place of the forward that runs; ``KtrtError`` without one."""
        if self.place is None:
            raise KtrtError("the KV cache has many sequences: say first which one the forward is")
        return self.place

    @property
    def length(self) -> Any:
        """The length of the sequence that the forward continues."""
        place = self.place
        if isinstance(place, ManyPlace):
            raise CannotMixError("the model asks for the length of sequences that differ in length")
        if isinstance(place, WindowPlace):
            if len(place.positions) != 1:
                raise CannotMixError(
                    "the model asks for one length of rows that may differ in length"
                )
            return place.positions[0, 0]
        return 0 if place is None else place.start
