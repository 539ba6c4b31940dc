"""CUDA graphs of decode steps of many sequences: row i of a graph is slot ``first`` + i, and which
rows stand for something, their positions and their adapters are data.

Graphs have 1, 2, 4, … 32 rows, for slots of a block that starts at a multiple of their number. One
is captured for each block, kind of step (all rows with the active adapters, or not) and, where the
model's attention does not keep to lengths, window, when a step needs it first. A row that stands
for nothing stores its token after all that its slot holds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.step_rows import ACTIVE, IDLE, StepRows
from ktrt.generate.forwards import set_adapters
from ktrt.generate.graphs import (
    FAILURES,
    capture,
    check_logits,
    give_up,
    named,
    run_step,
    window_for,
)
from ktrt.generate.masks import attention_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ktrt.engine.step_rows import RunningStep
    from ktrt.generate.forwards import Part
    from ktrt.generate.graphs import GraphMaker, HandOff
    from ktrt.kv.static import StaticKv

logger = logging.getLogger(__name__)

MOST_ROWS = 32
# Graphs that are kept; one of V2-Lite has 3,000 kernels.
_MOST_GRAPHS = 64


@dataclass
class _Block:
    """The slots from ``first`` on that a graph decodes, and the memory that it reads: ids and
    positions ``inputs`` [2, rows, 1], the rows' adapters; and writes: ``logits``."""

    first: int
    rows: StepRows
    inputs: torch.Tensor
    logits: torch.Tensor
    # By window.
    graphs: dict[int | None, _Graph] = field(default_factory=dict)

    def places(self, parts: Sequence[Part]) -> list[int]:
        """The parts' rows."""
        return [part.span.slot.index - self.first for part in parts]


@dataclass
class _Graph:
    """``slots``: the hand-offs in it."""

    replay: Callable[[], None]
    slots: list[int]


class RowGraphs:
    """The graphs of one model on one cache."""

    def __init__(
        self,
        model: Any,
        cache: StaticKv,
        running: RunningStep,
        handoff: HandOff,
        maker: GraphMaker,
    ) -> None:
        self._model, self._cache, self._running = model, cache, running
        self._handoff, self._maker = handoff, maker
        self._device = model.get_input_embeddings().weight.device
        # By first slot, rows, and whether rows name adapters.
        self._blocks: dict[tuple[int, int, bool], _Block] = {}
        # Logits [vocab_size] of a forward since the last ``clear``.
        self._like = torch.empty(0)
        # Forwards that the host launched, to prepare captures.
        self.eager_forwards = 0

    @property
    def count(self) -> int:
        """Graphs that can be replayed."""
        return sum(len(block.graphs) for block in self._blocks.values())

    @property
    def usable(self) -> bool:
        """Whether no capture has failed."""
        return self._maker.usable

    @property
    def proven(self) -> bool:
        """Whether a graph was compared with plain forwards."""
        return self._maker.proven

    def clear(self) -> None:
        """Forgets the graphs, whose memory has moved, or whose adapters have changed."""
        self._blocks.clear()
        self._maker.clear()
        self._running.keeps_to_lengths = False
        self._like = torch.empty(0)  # an adapter's vocabulary may be another

    def capacity_for(self, end: int) -> int:
        """The positions that a step needs which stores some before ``end``, with a place for what
        the rows that stand for nothing store."""
        return max(end, *(written + 1 for written in self._cache.written))

    @torch.inference_mode()
    def run(
        self, parts: Sequence[Part], plain: Callable[[Part], torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """Runs one token of each part; returns their logits [1, vocab_size]. ``plain`` runs a part
        without a graph: to compare with the first graph of a model, and where there can be none.

        None if that first graph failed, which is logged: the slots may hold anything, and there
        are no further attempts.
        """
        if not parts:
            return []
        expected = None
        # The graphs compute again what a plain forward has computed.
        again = self.usable and not (self.proven and len(self._like))
        rewinders = [self._cache.rewinder(p.span.slot.index) for p in parts] if again else []
        if not (self.proven and self.usable):
            expected = [plain(part) for part in parts]
            if not self.usable:
                return expected
        if not len(self._like):
            self._like = expected[0][0] if expected else plain(parts[0])[0]
        for rewind in rewinders:
            rewind()
        try:
            found = self._run_blocks(parts)
            if expected is not None:
                check_logits(torch.cat(found), torch.cat(expected))
        except FAILURES as error:
            if self.proven:
                raise
            self.clear()
            give_up(self._maker, error)
            return None
        self._maker.proven = True
        return found

    def _run_blocks(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for at in _blocks(parts):
            logits = self._run_block([parts[index] for index in at])
            found |= dict(zip(at, logits.split(1), strict=True))
        return [found[index] for index in range(len(parts))]

    def _run_block(self, parts: Sequence[Part]) -> torch.Tensor:
        block = self._block(parts)
        lengths = [part.start for part in parts]
        window = window_for(self._running, lengths)
        self._fill(block, parts, window)
        graph = block.graphs.get(window)
        if graph is None:
            self._forget_one(block)
            # The host first: libraries allocate their workspaces, the hand-off its slots, LoRA
            # takes the adapters' numbers.
            rewind = self._cache.rewinder(block.first, block.rows.tokens)
            self._forward(block, window)
            self.eager_forwards += 1
            if window is not None and self._running.keeps_to_lengths:
                # Kernels for the whole capacity may be others.
                window = None
                self._forward(block, window)
            rewind()
            graph = block.graphs[window] = self._capture(block, window)
            rewind()
            # A replay that writes nothing must not pass by what was written before.
            block.logits.fill_(torch.nan)
        with self._running.running(block.rows), self._handoff.launching(graph.slots):
            graph.replay()
        return block.logits[block.places(parts)]

    def _forget_one(self, keep: _Block) -> None:
        """Makes room for a graph: the oldest other block's go."""
        oldest = next((key for key, block in self._blocks.items() if block is not keep), None)
        if self.count >= _MOST_GRAPHS and oldest is not None:
            del self._blocks[oldest]

    def _block(self, parts: Sequence[Part]) -> _Block:
        first, count = _place([part.span.slot.index for part in parts])
        key = first, count, any(part.span.adapter != ACTIVE for part in parts)
        block = self._blocks.get(key)
        if block is None:
            # Memory from before the capture, and no inference tensors, which only inference mode
            # could write to.
            with torch.inference_mode(False):
                rows = StepRows(count, 0, self._device)
                rows.batch = True
                block = self._blocks[key] = _Block(
                    first,
                    rows,
                    torch.zeros(2, count, 1, dtype=torch.int64, device=self._device),
                    self._like.new_empty(count, len(self._like)),
                )
        return block

    def _fill(self, block: _Block, parts: Sequence[Part], window: int | None) -> None:
        """Writes the step's facts into the memory that the graph reads, and sees to the memory of
        keys and values that it reads and writes."""
        rows, written = block.rows, self._cache.written[block.first :]
        # Token 0, one position after what the slot may hold, for rows that stand for nothing.
        ids, positions = [0] * rows.tokens, written[: rows.tokens]
        adapters = [IDLE] * rows.tokens
        for row, part in zip(block.places(parts), parts, strict=True):
            ids[row], positions[row] = part.span.ids[0], part.start
            adapters[row] = part.span.adapter
            self._cache.will_write(part.span.slot.index, part.end)
        for row, position in enumerate(positions):
            self._cache.commit(block.first + row, max(window or 0, position + 1))
        block.inputs.copy_(torch.tensor([ids, positions]).unsqueeze(-1))
        set_adapters(rows, adapters)

    def _capture(self, block: _Block, window: int | None) -> _Graph:
        graph = _Graph(*capture(self._maker, self._handoff, lambda: self._forward(block, window)))
        logger.debug(
            "Captured the decode step of slots %d to %d, %s, %d hand-offs", block.first,
            block.first + block.rows.tokens - 1, named(window), len(graph.slots),
        )  # fmt: skip
        return graph

    def _forward(self, block: _Block, window: int | None) -> None:
        mask = attention_mask(self._model, self._cache, block.inputs[1], window)
        active = block.rows.on_device != IDLE if self._cache.has_states else None
        with self._running.running(block.rows):
            logits = run_step(
                self._model, self._cache, self._running, block.inputs, mask, window, block.first,
                active,
            )  # fmt: skip
        block.logits.copy_(logits)


def shares_a_graph(parts: Sequence[Part]) -> list[int]:
    """Returns the indices of the parts that a step's graphs decode; none where there is but one,
    with the active adapters, which has another graph."""
    rows = [at for at, part in enumerate(parts) if part.is_row and part.span.logits is None]
    alone = len(rows) == 1 and parts[rows[0]].span.adapter == ACTIVE
    return [] if alone else rows


def _place(slots: Sequence[int]) -> tuple[int, int]:
    """Returns the first slot and the number of slots of the smallest block that holds them all."""
    count = 1
    while min(slots) // count != max(slots) // count:
        count *= 2
    return min(slots) // count * count, count


def _blocks(parts: Sequence[Part]) -> Iterator[list[int]]:
    """Yields the indices of the parts that one graph can hold."""
    found: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        found.setdefault(part.span.slot.index // MOST_ROWS, []).append(index)
    yield from found.values()
