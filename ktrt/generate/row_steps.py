"""Recorded decode steps of many sequences on the CPU: one recording per number of rows, in which
slots, lengths and adapters are data.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.recording import active
from ktrt.engine.step_rows import IDLE, StepRows
from ktrt.errors import KtrtError
from ktrt.generate.forwards import check_attended, mask_of_many
from ktrt.generate.graphs import FAILURES, check_logits, give_up
from ktrt.kv.static import StaticKv, cache_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktrt.engine.step_rows import RunningStep
    from ktrt.generate.forwards import Part
    from ktrt.generate.graphs import GraphMaker

logger = logging.getLogger(__name__)

# Numbers of rows that have a recording, whose results take memory for good: 5 MB a row for 27
# layers of 2048, 0.5 GB for all. Larger steps take so long that the Python between operations does
# not matter.
_BUCKETS = (1, 2, 4, 8, 16, 24, 32)


@dataclass
class _Recording:
    """A recorded step of ``rows``: its inputs [2, 1, rows] (ids, positions) and its results."""

    rows: StepRows
    inputs: torch.Tensor
    logits: torch.Tensor
    replay: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        rows = self.rows
        # By numpy, which writes a few numbers faster than torch: 1 µs instead of 5 each.
        self._ids, self._positions = self.inputs.numpy()[:, 0]
        self._lengths, self._slots = rows.lengths.numpy(), rows.slots.numpy()
        self._adapters = rows.adapters.numpy()

    def fill(self, parts: Sequence[Part], idle_slot: int) -> None:
        """Writes the facts of a step into the memory that the recording reads."""
        for row, part in enumerate(parts):
            span = part.span
            self._ids[row], self._positions[row] = span.ids[0], part.start
            self._lengths[row], self._slots[row] = part.end, span.slot.index
            self._adapters[row] = span.adapter
        if (count := len(parts)) < self.rows.tokens:
            self._ids[count:], self._positions[count:] = parts[0].span.ids[0], 0
            self._lengths[count:], self._slots[count:] = 0, idle_slot
            self._adapters[count:] = IDLE


class RowSteps:
    """The recordings of one model on one cache."""

    def __init__(
        self, model: Any, cache: StaticKv, running: RunningStep, maker: GraphMaker
    ) -> None:
        self._model, self._cache, self._running, self._maker = model, cache, running, maker
        self._argument = cache_argument(model)
        self._recorded: dict[int, _Recording] = {}
        # Numbers of rows whose results took too much memory, say, after others were recorded.
        self._refused: set[int] = set()

    @property
    def count(self) -> int:
        """Recordings that can be replayed."""
        return len(self._recorded)

    @property
    def usable(self) -> bool:
        """Whether recording has not failed."""
        return self._maker.usable

    @property
    def proven(self) -> bool:
        """Whether a recording was compared with the plain forward."""
        return self._maker.proven

    def clear(self) -> None:
        """Forgets the recordings: what they have seen has changed."""
        self._recorded.clear()
        self._refused.clear()

    def run(self, parts: Sequence[Part], like: torch.Tensor) -> list[torch.Tensor] | None:
        """Runs one token of each part; returns their logits [1, vocab_size]. ``like``: logits
        [vocab_size] of an earlier forward. None, with what the slots hold unchanged, where there is
        no recording and none can be made."""
        bucket = _bucket(len(parts))
        if bucket is None or bucket in self._refused or not self._maker.usable:
            return None
        for part in parts:
            self._cache.will_write(part.span.slot.index, part.end)
        known = self._recorded.get(bucket)
        if known is not None:
            self._replay(known, parts)
        else:
            # Recording computes the step as well.
            known = self._record(bucket, parts, like)
        if known is None:
            return None
        logits = known.logits.clone()
        return [logits] if bucket == 1 else list(logits[: len(parts)].split(1))

    def prove(self, parts: Sequence[Part], expected: Sequence[torch.Tensor]) -> bool:
        """Makes the first recording, after a plain forward of the same step gave ``expected``.

        False if it computes something else, which is logged: the plain forward must run again, and
        nothing is recorded any more.
        """
        bucket = _bucket(len(parts))
        if bucket is None or not self._maker.usable:
            return True
        made = self._record(bucket, parts, expected[0][0])
        if made is None:
            return True
        # A replay that writes nothing must not pass by what the recording has written.
        made.logits.fill_(torch.nan)
        try:
            self._replay(made, parts)
            check_logits(made.logits[: len(parts)], torch.cat(list(expected)))
        except FAILURES as error:
            self._fail(error)
            return False
        self._maker.proven = True
        return True

    def _record(self, bucket: int, parts: Sequence[Part], like: torch.Tensor) -> _Recording | None:
        made = self._new(bucket, like)
        made.fill(parts, self._cache.idle_slot)
        try:
            made.replay = self._maker.capture(lambda: self._run(made))
        except FAILURES as error:
            if self._maker.proven:
                self._refused.add(bucket)
                logger.debug("No %s of %d rows: %s", self._maker.what, bucket, error)
            else:
                self._fail(error)
            return None
        self._recorded[bucket] = made
        logger.debug("Recorded the decode step of %d rows", bucket)
        return made

    def _fail(self, error: Exception) -> None:
        self.clear()
        give_up(self._maker, error)

    @staticmethod
    def _new(bucket: int, like: torch.Tensor) -> _Recording:
        # Memory from before the recording, and no inference tensors, which only inference mode
        # could write to.
        with torch.inference_mode(False):
            return _Recording(
                StepRows(bucket, bucket),
                torch.zeros(2, 1, bucket, dtype=torch.int64),
                like.new_empty(bucket, like.shape[-1]),
            )

    def _replay(self, made: _Recording, parts: Sequence[Part]) -> None:
        assert made.replay is not None
        made.fill(parts, self._cache.idle_slot)
        # A recorded layer may ask for the adapters of the step that runs.
        with torch.inference_mode(), self._running.running(made.rows):
            made.replay()

    def _run(self, made: _Recording) -> None:
        ids, positions = made.inputs
        rows, mask = made.rows, mask_of_many(torch.device("cpu"))
        recorder = active()
        if recorder is None:
            raise KtrtError("the step is not being recorded")
        inputs = [made.inputs, rows.adapters, rows.slots, rows.lengths]
        recorder.describe(inputs, mask, None)
        rows.stored = rows.attended = 0
        with self._cache.many(rows), self._running.running(rows):
            output = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=0,
                **{self._argument: self._cache},
            )
        check_attended(rows)
        made.logits.copy_(output.logits[0])


def _bucket(rows: int) -> int | None:
    return next((count for count in _BUCKETS if count >= rows), None)
