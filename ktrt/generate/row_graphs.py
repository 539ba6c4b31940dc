"""CUDA graphs of decode steps of many sequences: which slots the rows are of, which rows stand for
something, their positions and their adapters are data.

Graphs have 1, 2, 4, … 32 rows. One is captured for each number of rows, kind of step (all rows with
the active adapters, or not) and, where the model's attention does not keep to lengths, window, when
a step needs it first (at load: ``generate.warm_up``). A row that stands for nothing stores its
token where no row's sequence is.
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
    from collections.abc import Callable, Sequence

    from ktrt.engine.step_rows import RunningStep
    from ktrt.generate.forwards import Part
    from ktrt.generate.graphs import GraphMaker, HandOff
    from ktrt.kv.static import StaticKv

logger = logging.getLogger(__name__)

MOST_ROWS = 32
# Graphs that are kept; one of V2-Lite has 3,000 kernels.
_MOST_GRAPHS = 64


@dataclass
class _Rows:
    """Steps of a number of rows, and the memory that their graphs read: ids, positions and slots
    ``facts`` [3, rows, 1], the rows' adapters; and write: ``logits``."""

    rows: StepRows
    facts: torch.Tensor
    logits: torch.Tensor
    # The rows' adapters, as that memory has them.
    adapters: list[int] = field(default_factory=list)
    # By window.
    graphs: dict[int | None, _Graph] = field(default_factory=dict)


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
        # By their number, and whether they name adapters.
        self._rows: dict[tuple[int, bool], _Rows] = {}
        # Logits [vocab_size] of a forward since the last ``clear``.
        self._like = torch.empty(0)
        # Forwards that the host launched, to prepare captures.
        self.eager_forwards = 0

    @property
    def count(self) -> int:
        """Graphs that can be replayed."""
        return sum(len(rows.graphs) for rows in self._rows.values())

    @property
    def for_all(self) -> bool:
        """Whether a graph serves all slots and lengths."""
        return self.usable and self.proven and self._running.keeps_to_lengths

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
        self._rows.clear()
        self._maker.clear()
        self._running.keeps_to_lengths = False
        self._like = torch.empty(0)  # an adapter's vocabulary may be another

    def capacity_for(self, end: int) -> int:
        """The positions that a step needs which stores some before ``end``, with a place for what
        the rows that stand for nothing store: in another slot, where no slot is theirs."""
        if self._cache.reserved:
            return end
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
        rewinders = [self._cache.rewinder(_slots(parts))] if again else []
        if not (self.proven and self.usable):
            expected = [plain(part) for part in parts]
            if not self.usable:
                return expected
        if not len(self._like):
            self._like = expected[0][0] if expected else plain(parts[0])[0]
        for rewind in rewinders:
            rewind()
        try:
            at_once = range(0, len(parts), MOST_ROWS)
            found = [row for at in at_once for row in self._run_some(parts[at : at + MOST_ROWS])]
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

    def _run_some(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        rows = self._rows_for(parts)
        window = window_for(self._running, [part.start for part in parts])
        self._fill(rows, parts, window)
        graph = rows.graphs.get(window)
        if graph is None:
            self._forget_one(rows)
            # The host first: libraries allocate their workspaces, the hand-off its slots, LoRA
            # takes the adapters' numbers.
            rewind = self._cache.rewinder(_slots(parts))
            self._forward(rows, window)
            self.eager_forwards += 1
            if window is not None and self._running.keeps_to_lengths:
                # Kernels for the whole capacity may be others.
                window = None
                self._forward(rows, window)
            rewind()
            graph = rows.graphs[window] = self._capture(rows, window)
            rewind()
            # A replay that writes nothing must not pass by what was written before.
            rows.logits.fill_(torch.nan)
        with self._running.running(rows.rows), self._handoff.launching(graph.slots):
            graph.replay()
        return list(rows.logits[: len(parts)].clone().split(1))

    def _forget_one(self, keep: _Rows) -> None:
        """Makes room for a graph: all of the oldest other number of rows go."""
        oldest = next((key for key, rows in self._rows.items() if rows is not keep), None)
        if self.count >= _MOST_GRAPHS and oldest is not None:
            del self._rows[oldest]

    def _rows_for(self, parts: Sequence[Part]) -> _Rows:
        count = 1 << (len(parts) - 1).bit_length()
        key = count, any(part.span.adapter != ACTIVE for part in parts)
        if key not in self._rows:
            # Memory from before the capture, and no inference tensors, which only inference mode
            # could write to.
            with torch.inference_mode(False):
                rows = StepRows(count, 0, self._device)
                rows.batch = True
                facts = torch.zeros(3, count, 1, dtype=torch.int64, device=self._device)
                logits = self._like.new_empty(count, len(self._like))
                self._rows[key] = _Rows(rows, facts, logits)
        return self._rows[key]

    def _fill(self, rows: _Rows, parts: Sequence[Part], window: int | None) -> None:
        """Writes the step's facts into the memory that the graph reads, and sees to the memory of
        keys and values that it reads and writes."""
        cache, idle = self._cache, rows.rows.tokens - len(parts)
        for part in parts:
            cache.will_write(part.span.slot.index, part.end)
            cache.commit(part.span.slot.index, window or 0)
        facts = [(part.span.ids[0], part.start, part.span.slot.index) for part in parts]
        if idle:
            slot, position = self._idle_place(parts)
            cache.commit(slot, max(window or 0, position + 1))
            facts += [(0, position, slot)] * idle
        rows.facts.copy_(torch.tensor(facts).T.unsqueeze(-1))
        adapters = [part.span.adapter for part in parts] + [IDLE] * idle
        if adapters != rows.adapters:
            rows.adapters = adapters
            set_adapters(rows.rows, adapters)

    def _idle_place(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Returns the slot and position of what rows that stand for nothing store: after all that
        another slot holds, of which there is one: slots are a power of two, as full steps are."""
        if self._cache.reserved:
            return self._cache.idle_slot, 0
        taken = set(_slots(parts))
        slot = next(slot for slot in range(self._cache.slots) if slot not in taken)
        return slot, self._cache.written[slot]

    def _capture(self, rows: _Rows, window: int | None) -> _Graph:
        graph = _Graph(*capture(self._maker, self._handoff, lambda: self._forward(rows, window)))
        logger.debug(
            "Captured the decode step of %d rows, %s, %d hand-offs", rows.rows.tokens,
            named(window), len(graph.slots),
        )  # fmt: skip
        return graph

    def _forward(self, rows: _Rows, window: int | None) -> None:
        inputs, slots = rows.facts[:2], rows.facts[2, :, 0]
        mask = attention_mask(self._model, self._cache, inputs[1], window)
        active = rows.rows.on_device != IDLE if self._cache.has_states else None
        with self._running.running(rows.rows):
            logits = run_step(
                self._model, self._cache, self._running, inputs, mask, window, slots=slots,
                active=active,
            )  # fmt: skip
        rows.logits.copy_(logits)


def shares_a_graph(parts: Sequence[Part]) -> list[int]:
    """Returns the indices of the parts that a step's graphs decode."""
    return [at for at, part in enumerate(parts) if part.is_row and part.span.logits is None]


def _slots(parts: Sequence[Part]) -> list[int]:
    return [part.span.slot.index for part in parts]
