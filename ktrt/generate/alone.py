"""Sequences that share no forward, on a static cache: prompts one after the other, decode steps by
graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ktrt.engine.step_rows import ACTIVE
from ktrt.generate.batch_graphs import BUCKETS, BatchGraphs
from ktrt.generate.forwards import Part
from ktrt.generate.step import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.generate.forwards import Forwards
    from ktrt.generate.graphs import DecodeGraphs
    from ktrt.kv.static import StaticKv

# Makes the graphs that decode on a cache, as ``DecodeGraphs`` with its keywords.
GraphsFor = Callable[..., "DecodeGraphs"]
# Tokens of a forward that computes again what a failed graph has spoiled.
_CHUNK = 512


class Alone:
    """``graphs``: makes graphs; None: the host launches every step. ``batched``: decode steps of
    several sequences are one graph."""

    def __init__(
        self, forwards: Forwards, cache: StaticKv, graphs: GraphsFor | None, *, batched: bool
    ) -> None:
        self._forwards, self.cache, self._graphs_for = forwards, cache, graphs
        # By slot.
        self.graphs: dict[int, DecodeGraphs] = {}
        self._batches: BatchGraphs | None = None
        if graphs is not None and batched:
            self._batches = BatchGraphs(cache, forwards.running, forwards.device, graphs)
        # Cleared while a graph may spoil what the slots hold.
        self.intact = True

    @property
    def count(self) -> int:
        """Graphs that can be replayed."""
        count = sum(graphs.count for graphs in self.graphs.values())
        return count + (self._batches.count if self._batches is not None else 0)

    def clear(self) -> None:
        """Forgets the graphs, whose memory has moved or whose adapters have changed."""
        for each in (*self.graphs.values(), self._batches):
            if each is not None:
                each.clear()

    def run(
        self, parts: Sequence[Part], held: Sequence[Sequence[int]], lengths: Sequence[int],
        *, changed: bool,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Returns the wanted logits of each part. ``held``: the tokens of its slot; ``lengths``: of
        all slots of the pool; ``changed``: the adapters have, whose numbers the next forward must
        take, which a graph cannot while it is captured."""
        self.intact = True
        rows = [at for at, part in enumerate(parts) if _is_decode(part)]
        found: dict[int, torch.Tensor] = {}
        most = max((parts[at].span.slot.index for at in rows), default=0)
        if self._batches is not None and len(rows) > 1 and not changed and most < BUCKETS[-1]:
            logits = self._batch(self._batches, [parts[at] for at in rows],
                                 [held[at] for at in rows], lengths)  # fmt: skip
            found = dict(zip(rows, logits, strict=True))
        for at, part in enumerate(parts):
            if at not in found:
                found[at] = self._one(part, held[at], changed=changed)
        return [found[at] for at in range(len(parts))]

    def _batch(
        self, batches: BatchGraphs, parts: Sequence[Part], held: Sequence[Sequence[int]],
        lengths: Sequence[int],
    ) -> list[torch.Tensor]:  # fmt: skip
        def plain() -> torch.Tensor:
            logits = torch.cat([self._plain(part) for part in parts])
            self.intact = False
            return logits

        logits, right = batches.run(parts, lengths, plain, self._forwards.latest)
        if not right:
            logits = torch.cat([self._again(p, ids) for p, ids in zip(parts, held, strict=True)])
        self.intact = True
        return list(logits.split(1))

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
        logits = self._plain(part)
        self.intact = False
        if not graphs.prepare(ids, lengths, logits):
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
        return self._forwards.alone(part, self.cache)[0]

    def _graphs_of(self, slot: int) -> DecodeGraphs | None:
        if self._graphs_for is not None and slot not in self.graphs:
            place = {"first": slot} if slot else {}
            self.graphs[slot] = self._graphs_for(self.cache, **place)
        return self.graphs.get(slot)


def _is_decode(part: Part) -> bool:
    return part.is_row and part.span.logits is None
