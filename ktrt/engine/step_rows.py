"""The facts of one forward that differ by token: each token's LoRA and its place in the cache.

A forward may hold tokens of many sequences: first the *decode rows*, one token each, then *spans*
of several tokens of one sequence. ``generate.runner`` fills a ``StepRows`` for each forward, and
the layers read it during that forward. Only a recorded step keeps it, and reads the same memory
again whenever it runs.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# A token's LoRA is the engine's number of a resident adapter, at weight 1, or one of these.
BASE = -1
# The adapters that are active in the model, with their weights.
ACTIVE = -2
# None, for a row that stands for nothing: nobody reads its results, and no expert is read for it.
IDLE = -3


@dataclass(frozen=True)
class TokenSpan:
    """Tokens ``first`` … ``first + count - 1`` of a forward: positions ``start`` and on of the
    sequence in ``slot``, whose keys and values before ``start`` are held."""

    slot: int
    first: int
    start: int
    count: int


class StepRows:
    """The tokens of one forward [1, tokens]: ``decode`` single ones, then the tokens of ``spans``.

    On the CPU, contiguous, in memory that stays: ``adapters`` [tokens] int32, each token's LoRA;
    for the decode rows ``slots`` and ``lengths`` [decode] int64: the slot, and how many positions
    of it the token attends to, its own included; 0 for a row that stands for nothing, whose results
    nobody reads and whose adapter is ``IDLE``. ``device_adapters``: a copy of ``adapters`` on the
    model's GPU; None without one.

    ``logits``: the tokens [wanted] int64 that the output layer computes, whose input has no others;
    None: all. A forward of one sequence whose place the cache itself knows has neither decode rows
    nor spans, and adapters all the same.
    """

    def __init__(
        self, tokens: int, decode: int, device: torch.device | None = None,
        spans: tuple[TokenSpan, ...] = (),
    ) -> None:  # fmt: skip
        self.tokens, self.decode, self.spans = tokens, decode, spans
        self.adapters = torch.full((tokens,), BASE, dtype=torch.int32)
        self.slots = torch.zeros(decode, dtype=torch.int64)
        self.lengths = torch.zeros(decode, dtype=torch.int64)
        self.logits: torch.Tensor | None = None
        # A decode step [tokens, 1] of a GPU's graph, whose places the cache knows: no decode rows.
        self.batch = False
        # Layers whose cache has stored the tokens by these facts, and whose attention has read
        # them: a model in which the counts differ cannot run such a forward.
        self.stored = self.attended = 0
        self.device_adapters: torch.Tensor | None = None
        if device is not None and device.type != "cpu":
            self.device_adapters = self.adapters.to(device)

    @property
    def on_device(self) -> torch.Tensor:
        """``adapters`` where the model is."""
        return self.adapters if self.device_adapters is None else self.device_adapters

    @property
    def by_row(self) -> bool:
        """Whether any token has something other than the active adapters. A captured graph of a
        step that had not serves no step that has."""
        return not bool(((self.adapters == ACTIVE) | (self.adapters == IDLE)).all())


class RunningStep:
    """The step that a model runs now, for its layers. One per model; only ``generate.runner``
    writes it."""

    def __init__(self) -> None:
        # None: a forward of somebody else, whose tokens all have the active adapters and whose
        # cache knows its own places.
        self.rows: StepRows | None = None
        # How many positions each row of a decode step [rows, 1] attends to, its own included,
        # [rows] int64 where the model is, if the cache knows the rows' places. A captured graph
        # reads the same memory again whenever it runs. None: no such step.
        self.lengths: torch.Tensor | None = None
        # The slot of each of these rows, [rows] int64 where the model is, where attention is given
        # the keys and values of all slots; None: row i's are the i-th.
        self.slots: torch.Tensor | None = None
        # Layers of that step whose attention has read ``lengths``, and nothing of a row after them:
        # a model in which all do needs one graph for all lengths.
        self.attended = 0
        # Whether all layers of the latest such step did that (``generate.graphs.run_step``).
        self.keeps_to_lengths = False
        # Counts the beginnings and ends of steps: for what layers know of one step's tokens.
        self.changes = 0

    @contextmanager
    def running(self, rows: StepRows) -> Iterator[None]:
        """Within the block, the model's forward is that of ``rows``, or a part of it."""
        before, self.rows = self.rows, rows
        self.changes += 1
        try:
            yield
        finally:
            self.rows = before
            self.changes += 1

    def switch(self, rows: StepRows | None) -> None:
        """Goes on with another of the forwards that take turns."""
        self.rows = rows
        self.changes += 1

    @contextmanager
    def attending(self, lengths: torch.Tensor, slots: torch.Tensor | None = None) -> Iterator[None]:
        """Within the block, the model's forward is a decode step whose rows attend to the first
        ``lengths`` positions of their ``slots``."""
        self.lengths, self.slots, self.attended = lengths, slots, 0
        try:
            yield
        finally:
            self.lengths = self.slots = None
