"""Sequences that share no forward, on a static cache: prompts one after the other, decode steps by
graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ktrt.engine.step_rows import ACTIVE
from ktrt.generate.forwards import Part
from ktrt.generate.row_graphs import shares_a_graph
from ktrt.generate.step import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ktrt.generate.forwards import Forwards
    from ktrt.generate.graphs import DecodeGraphs
    from ktrt.generate.long_prompts import LongPrompts
    from ktrt.generate.row_graphs import RowGraphs
    from ktrt.kv.static import StaticKv

# Makes the graphs that decode on a cache, as ``DecodeGraphs`` with its keywords.
GraphsFor = Callable[..., "DecodeGraphs"]
# Tokens of a forward that computes again what a failed graph has spoiled.
_CHUNK = 512


class Alone:
    """``graphs``: makes the graphs of one sequence; None: the host launches every step. ``rows``:
    the graphs of many; ``prompts`` runs long ones."""

    def __init__(
        self, forwards: Forwards, cache: StaticKv, graphs: GraphsFor | None,
        rows: RowGraphs | None, prompts: LongPrompts | None = None,
    ) -> None:  # fmt: skip
        self._forwards, self.cache, self._graphs_for = forwards, cache, graphs
        self._prompts = prompts
        # By slot.
        self.graphs: dict[int, DecodeGraphs] = {}
        self.rows = rows
        # Cleared while a graph may spoil what the slots hold.
        self.intact = True

    @property
    def count(self) -> int:
        """Graphs that can be replayed."""
        count = sum(graphs.count for graphs in self.graphs.values())
        return count + (0 if self.rows is None else self.rows.count)

    def clear(self) -> None:
        """Forgets the graphs, whose memory has moved or whose adapters have changed."""
        for each in (*self.graphs.values(), self.rows):
            if each is not None:
                each.clear()

    def run(
        self, parts: Sequence[Part], held: Sequence[Sequence[int]], *, changed: bool
    ) -> list[torch.Tensor]:
        """Returns the wanted logits of each part. ``held``: the tokens of its slot; ``changed``:
        the adapters have, whose numbers the next forward must take, which a graph cannot while it
        is captured."""
        self.intact = True
        found = self._rows(self.rows, parts, held) if self.rows is not None else {}
        return [
            found[at] if at in found else self._one(part, held[at], changed=changed)
            for at, part in enumerate(parts)
        ]

    def _rows(
        self, graphs: RowGraphs, parts: Sequence[Part], held: Sequence[Sequence[int]]
    ) -> dict[int, torch.Tensor]:
        """Runs the decode rows of a step that share a graph; returns their logits. A single one
        with the active adapters has its slot's own until a graph serves all slots."""
        at = shares_a_graph(parts)
        if len(at) == 1 and parts[at[0]].span.adapter == ACTIVE and not graphs.for_all:
            return {}
        self.intact = graphs.proven
        found = graphs.run([parts[index] for index in at], self._plain)
        if found is None:  # the slots may hold anything
            found = [self._again(parts[index], held[index]) for index in at]
        self.intact = True
        return dict(zip(at, found, strict=True))

    def _one(self, part: Part, held: Sequence[int], *, changed: bool) -> torch.Tensor:
        graphs = self._graphs_of(part.span.slot.index)
        if graphs is None or changed or not _is_decode(part) or part.span.adapter != ACTIVE:
            return self._plain(part)
        ids, lengths = part.span.ids, [part.start]
        self.cache.will_write(part.span.slot.index, part.end)
        found = graphs.step(ids, lengths)
        if found is None:
            found = graphs.capture(ids, lengths, self._forwards.latest)
        if found is not None:
            return found
        if not graphs.usable:
            return self._plain(part)
        rewind = self.cache.rewinder([part.span.slot.index])
        logits = self._plain(part)
        self.intact = False
        if not graphs.prepare(ids, lengths, logits, rewind):
            # It may have stored anything anywhere.
            logits = self._again(part, held)
        self.intact = True
        return logits

    def _again(self, part: Part, held: Sequence[int]) -> torch.Tensor:
        """Computes everything that the slot held and the part's tokens once more."""
        slot = part.span.slot
        self.cache.truncate(slot.index, 0)
        everything = [*held, *part.span.ids]
        for start in range(0, len(everything), _CHUNK):
            ids = everything[start : start + _CHUNK]
            again = Span(slot=slot, ids=ids, adapter=part.span.adapter)
            logits = self._plain(Part(again, start))
        return logits

    def _plain(self, part: Part) -> torch.Tensor:
        if self._prompts is not None and self._prompts.take(part.count):
            return self._prompts.run(part, self.cache)
        return self._forwards.alone(part, self.cache)[0]

    def _graphs_of(self, slot: int) -> DecodeGraphs | None:
        if self._graphs_for is not None and slot not in self.graphs:
            place = {"first": slot} if slot else {}
            self.graphs[slot] = self._graphs_for(self.cache, **place)
        return self.graphs.get(slot)


def _is_decode(part: Part) -> bool:
    return part.is_row and part.span.logits is None
