"""How far the slots of a static cache can be rolled back: what rings have lost, and marks.

Rings hold the last positions, states a summary of all. A mark keeps a slot's states after some
length; of a ring it keeps the window only once others are about to take its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from ktrt.kv.positions import Positions
    from ktrt.kv.states import Name, States

# Marks that a slot keeps: three for each of two turns.
MOST_MARKS = 6


@dataclass(eq=False)
class StaticMark:
    """Holds what a slot needs to go back to its first ``length`` positions: states, by layer, and
    the windows that rings have lost since, by window and array."""

    length: int
    states: tuple[dict[Name, torch.Tensor], ...]
    windows: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Every step asks for it.
        self.bytes = _bytes(each for kept in self.states for each in kept.values())

    def keep(self, window: int, kept: list[torch.Tensor]) -> None:
        """Takes what the rings of a window are about to lose."""
        self.windows[window] = kept
        self.bytes += _bytes(kept)


class History:
    """Keeps the facts of one cache's slots. ``rings``: by window the layers that have it."""

    def __init__(
        self, rings: Mapping[int, Sequence[Positions]], states: Sequence[States], slots: int
    ) -> None:
        self._rings, self._states = rings, states
        # The first position that the rings of a window surely hold, by window and slot.
        self._held_from = {window: [0] * slots for window in rings}
        # The length that a slot's states stand at; None: a forward was interrupted.
        self._standing: list[int | None] = [0] * slots
        self._marks: dict[int, list[StaticMark]] = {}

    @property
    def needs_marks(self) -> bool:
        """Whether a slot cannot be rolled back to any length without one."""
        return bool(self._states) or any(ring[0].is_ring for ring in self._rings.values())

    def resize(self, slots: int) -> None:
        """Makes room for ``slots``."""
        more = slots - len(self._standing)
        self._standing += [0] * more
        for each in self._held_from.values():
            each += [0] * more

    def forget(self, slots: int) -> None:
        """Starts over with ``slots`` empty ones."""
        self._held_from = {window: [0] * slots for window in self._rings}
        self._standing, self._marks = [0] * slots, {}

    def will_write(self, slot: int, end: int) -> None:
        """Must come before a forward that stores positions before ``end``."""
        if self._states:
            self._standing[slot] = None
        for window, layers in self._rings.items():
            # One more may be lost: a row that stands for nothing stores a token after these.
            first = end + 1 - layers[0].size
            if layers[0].is_ring and first > self._held_from[window][slot]:
                for mark in self._marks.get(slot, ()):
                    if _first(mark.length, window) < first:
                        self._save(mark, window, slot)
                self._held_from[window][slot] = first

    def _save(self, mark: StaticMark, window: int, slot: int) -> None:
        if window not in mark.windows:
            places = _first(mark.length, window), mark.length
            layers = self._rings[window]
            kept = [layer.read(held[slot], *places) for layer in layers for held in layer.tensors]
            mark.keep(window, kept)

    def stored(self, slot: int, end: int) -> None:
        """Must come after a whole forward whose last position is ``end`` - 1."""
        self._standing[slot] = end

    def holds(self, slot: int, length: int, windows: Mapping[int, object] | None = None) -> bool:
        """Returns whether the rings hold what follows ``length`` positions, ``windows`` aside."""
        return length == 0 or all(
            _first(length, window) >= held[slot]
            for window, held in self._held_from.items()
            if windows is None or window not in windows
        )

    def stands(self, slot: int, length: int) -> bool:
        """Returns whether a slot can be cut to ``length`` positions as it is."""
        return length == 0 or (
            self.holds(slot, length) and (not self._states or self._standing[slot] == length)
        )

    def nearest(self, slot: int, length: int) -> StaticMark | None:
        """Returns the last mark of a slot up to ``length``; None: there is none."""
        marks = [mark for mark in self._marks.get(slot, ()) if mark.length <= length]
        return marks[-1] if marks else None

    def mark(self, slot: int, length: int, *, replace: bool) -> None:
        """Makes it possible to go back to what a slot holds now: ``length`` positions."""
        if not length or not self.needs_marks:
            return
        marks = self._marks.get(slot, [])
        if replace and marks:
            marks = marks[:-1]
        if all(mark.length != length for mark in marks):
            kept = tuple(each.keep(slot) for each in self._states)
            marks = [*marks[1 - MOST_MARKS :], StaticMark(length, kept)]
        self._marks[slot] = marks

    def cut(self, slot: int, length: int) -> None:
        """Forgets the marks after ``length``; at 0 everything."""
        if length:
            kept = [mark for mark in self._marks.get(slot, ()) if mark.length <= length]
            self._marks[slot] = kept
        else:
            self._marks.pop(slot, None)
            for held in self._held_from.values():
                held[slot] = 0
        if self._states:
            self._standing[slot] = length

    def restore(self, slot: int, mark: StaticMark) -> None:
        """Puts the states and the lost windows of a mark into a slot."""
        for each, kept in zip(self._states, mark.states, strict=True):
            each.restore(slot, kept)
        for window, kept_windows in mark.windows.items():
            first, values = _first(mark.length, window), iter(kept_windows)
            for layer in self._rings[window]:
                for held in layer.tensors:
                    layer.write(held[slot], first, next(values))
            self._held_from[window][slot] = first

    def copy(self, source: int, target: int, length: int) -> None:
        """Gives ``target``, whose rings are copies of the rings of ``source``, its marks up to
        ``length``."""
        for held in self._held_from.values():
            held[target] = held[source]
        self._marks[target] = [m for m in self._marks.get(source, ()) if m.length <= length]
        self._standing[target] = length

    def bytes_of(self, slot: int) -> int:
        """Returns the memory of a slot's marks."""
        return sum(mark.bytes for mark in self._marks.get(slot, ()))


def _first(length: int, window: int) -> int:
    """The first position that the one after ``length`` positions attends to."""
    return max(0, length + 1 - window)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
