"""CUDA graphs of decode steps of many sequences.

Row i of a graph is slot i, so that keys and values need no gathering; rows whose slot takes no part
are idle.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ktrt.engine.step_rows import IDLE, StepRows
from ktrt.generate.forwards import set_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from ktrt.engine.step_rows import RunningStep
    from ktrt.generate.forwards import Part
    from ktrt.generate.graphs import DecodeGraphs
    from ktrt.kv.static import StaticKv

# Rows of a graph; more sequences run one after the other.
BUCKETS = (2, 4, 8, 16, 32, 64)


class BatchGraphs:
    """The graphs of one model on one cache, by the number of rows, and by whether rows have
    adapters of their own, whose graph has other operations."""

    def __init__(
        self, cache: StaticKv, running: RunningStep, device: torch.device,
        graphs: Callable[..., DecodeGraphs],
    ) -> None:  # fmt: skip
        self._cache, self._running, self._device, self._make = cache, running, device, graphs
        self._made: dict[tuple[int, bool], tuple[DecodeGraphs, StepRows]] = {}

    @property
    def count(self) -> int:
        """Graphs that can be replayed."""
        return sum(graphs.count for graphs, _ in self._made.values())

    def clear(self) -> None:
        """Forgets the graphs, whose memory has moved or whose adapters have changed."""
        for graphs, _ in self._made.values():
            graphs.clear()

    def run(
        self,
        parts: Sequence[Part],
        held: Sequence[int],
        plain: Callable[[], torch.Tensor],
        like: torch.Tensor,
    ) -> tuple[torch.Tensor, bool]:
        """Runs one token of each part, each in its slot; ``held``: the tokens of each slot of the
        pool. Returns the logits [parts, vocab_size], and False if they may be wrong, as what the
        slots hold: the graph was no good.

        ``plain()`` computes the same without a graph; ``like``: logits [vocab_size] of an earlier
        forward. The cache must have room for one more token in each slot.
        """
        graphs, rows = self._graphs(parts)
        index = [part.span.slot.index for part in parts]
        count = rows.tokens
        ids = [parts[0].span.ids[0]] * count
        lengths = [*held, *[0] * count][:count]
        for part in parts:
            slot = part.span.slot.index
            ids[slot], lengths[slot] = part.span.ids[0], part.start
            self._cache.will_write(slot, part.end)
        found = graphs.step(ids, lengths)
        if found is None:
            found = graphs.capture(ids, lengths, like)
        if found is not None:
            return found[index], True
        expected = plain()
        every = expected.new_zeros(count, expected.shape[-1])
        every[index] = expected
        return expected, graphs.prepare(ids, lengths, every, index)

    def _graphs(self, parts: Sequence[Part]) -> tuple[DecodeGraphs, StepRows]:
        last = max(part.span.slot.index for part in parts)
        count = next(rows for rows in BUCKETS if rows > last)
        adapters = [IDLE] * count
        for part in parts:
            adapters[part.span.slot.index] = part.span.adapter
        rows = StepRows(count, 0, self._device)
        set_adapters(rows, adapters)
        key = count, rows.by_row
        if key not in self._made:
            running = partial(self._running.running, rows)
            self._made[key] = self._make(self._cache, rows=count, step=running), rows
        graphs, kept = self._made[key]
        # A graph reads the memory of the step that it was captured with.
        set_adapters(kept, adapters)
        return graphs, kept
