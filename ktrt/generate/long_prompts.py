"""Long prompts with a GPU, whose routed experts are copied to it once for all of a prompt's
tokens (``experts.gpu.blocks``)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ktrt.generate.forwards import Part

if TYPE_CHECKING:
    from ktrt.engine.step_rows import StepRows
    from ktrt.experts import GpuExperts
    from ktrt.generate.forwards import Forwards
    from ktrt.kv.static import StaticKv


class LongPrompts:
    """Runs prompts in blocks, where ``gpu`` streams their experts."""

    def __init__(self, forwards: Forwards, gpu: GpuExperts) -> None:
        self._forwards, self._gpu = forwards, gpu

    def take(self, tokens: int) -> bool:
        """Whether a prompt of this length is more than one block."""
        return 0 < self._gpu.threshold <= tokens and len(self._gpu.block_lengths(tokens)) > 1

    def run(self, part: Part, cache: StaticKv) -> torch.Tensor:
        """Returns the wanted logits [wanted, vocab_size], as ``Forwards.alone`` does."""
        running = self._forwards.running
        # Before any block stores something: rings lose what marks then keep.
        cache.will_write(part.span.slot.index, part.end)

        def held() -> tuple[Any, StepRows | None]:
            return cache.place, running.rows

        def put(state: tuple[Any, StepRows | None]) -> None:
            cache.place, rows = state
            running.switch(rows)

        forwards = [partial(self._forwards.alone, each, cache) for each in self._divided(part)]
        watch, layers = part.span.watch, len(self._gpu.layers)
        found = self._gpu.blocks.run(
            forwards, held, put, None if watch is None else lambda done: watch(done, layers)
        )
        return torch.cat([logits for logits, _ in found])

    def _divided(self, part: Part) -> list[Part]:
        """The blocks; those before the last have logits only if some are wanted there."""
        blocks, first, wanted = [], 0, part.span.wanted
        for count in self._gpu.block_lengths(part.count):
            end = first + count
            own = wanted[bisect_left(wanted, first) : bisect_left(wanted, end)]
            span = replace(
                part.span, ids=part.span.ids[first:end], logits=[at - first for at in own]
            )
            blocks.append(Part(span, part.start + first))
            first = end
        return blocks
