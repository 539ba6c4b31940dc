"""Runs the model: a KV cache together with its token ids, and the forward that extends both.

Only this module and ``generate.graphs`` call the model for an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ktrt.engine.active_set import ActiveSet
from ktrt.generate.graphs import DecodeGraphs
from ktrt.kv.snapshots import Mark, continues, crop, needs_marks
from ktrt.kv.static import StaticKv, cache_argument, makes_own_cache, unusual_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.experts import GpuExperts

# Tokens per forward of a prompt: enough for efficient GEMMs, few enough that Ctrl-C acts soon and
# the attention's memory stays small.
PREFILL_CHUNK = 512
# With a GPU: the engine's maximum per call, since every forward reads all experts' weights.
GPU_PREFILL_CHUNK = 1024
# Snapshots that a cache with windows or states keeps: three for each of two turns.
_MOST_MARKS = 6

# Makes the graphs that decode on a cache.
GraphsFor = Callable[[StaticKv], DecodeGraphs]


class KvCache:
    """A model's KV cache and the token ids that it holds."""

    def __init__(
        self,
        model: Any,
        graphs: GraphsFor | None = None,
        gpu: GpuExperts | None = None,
        active_set: ActiveSet | None = None,
    ) -> None:
        """Without ``graphs``, and where the cache is not ``plain``, the host launches each step.
        ``gpu``: the GPU's share of the model's routed experts; ``active_set``: its adapters'."""
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self._gpu = gpu
        # The version of the GPU's memory that the graphs were captured with.
        self._gpu_version = -1
        # The adapters that the keys and values, and the graphs, were made with.
        self._active_set = ActiveSet() if active_set is None else active_set
        self._version, self._changes = self._active_set.version, self._active_set.changes
        self._intact = True
        self._own_cache = makes_own_cache(model)
        self._argument = cache_argument(model)
        self.plain = not unusual_layers(model)
        # Whether several tokens at once can follow the held ones.
        self.continues = continues(model)
        self._graphs: DecodeGraphs | None = None
        # Logits of the last plain forward; the first tokens of a prompt always are one.
        self._logits = torch.empty(0)
        self._cache: Any = None
        if graphs is not None and self.plain:
            self._cache = StaticKv(model.config)
            self._graphs = graphs(self._cache)
        self._reset()

    @property
    def length(self) -> int:
        """How many tokens are held."""
        return len(self._ids)

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps have been captured, and replays are used."""
        return self._graphs is not None and self._graphs.count > 0

    def capture_ahead(self, length: int) -> None:
        """Captures the decode steps for up to ``length`` positions, after a decode step whose graph
        was compared with the plain forward's; nothing where there are no graphs."""
        if self._graphs is not None and self.has_graphs:
            self._graphs.capture_up_to(min(length, self._cache.capacity))

    def _reset(self) -> None:
        self._ids: list[int] = []
        self._marks: list[Mark] = []
        if self._graphs is not None:
            self._cache.reset()
        else:
            self._cache = None if self._own_cache else DynamicCache(config=self.model.config)

    def reuse(self, prompt_ids: Sequence[int]) -> int:
        """Keeps the longest usable prefix of the prompt; returns its length.

        It never includes the prompt's last token, whose logits are needed.
        """
        if self._version != self._active_set.version:
            self._reset()
            self._version = self._active_set.version
        pairs = zip(self._ids, prompt_ids[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if shared == 0 or not self.continues:
            self._reset()
        elif shared < len(self._ids):
            self._go_back(self._ids, shared)
        self.mark()
        return len(self._ids)

    def mark(self, *, replace: bool = False) -> None:
        """Saves a snapshot of the cache where cropping may be impossible later; ``replace``: in
        place of the latest snapshot."""
        if not self._ids or not self.continues or not needs_marks(self._cache):
            return
        if replace and self._marks:
            self._marks.pop()
        if all(mark.length != len(self._ids) for mark in self._marks):
            self._marks = [*self._marks[1 - _MOST_MARKS :], Mark.of(self._cache, len(self._ids))]

    def _go_back(self, ids: Sequence[int], length: int) -> None:
        """Rolls the cache back to at most ``length`` tokens of ``ids``; an interrupted forward may
        have left extra ones."""
        self._ids = []  # an exception in here leaves nothing that is trusted
        marks = [mark for mark in self._marks if mark.length <= length]
        if not crop(self._cache, length):
            length = marks[-1].length if marks else 0
            if not marks or not marks[-1].restore(self._cache):
                self._reset()
                return
        self._marks = marks
        self._ids = list(ids[:length])

    def prefill_chunk(self, remaining: int) -> int:
        """Tokens of a prompt's next forward."""
        streamed: int | None = None
        if self._gpu is not None:
            streamed = self._gpu.prefill_chunk(remaining)
        return streamed or (GPU_PREFILL_CHUNK if self.device.type == "cuda" else PREFILL_CHUNK)

    def forward(self, ids: Sequence[int]) -> torch.Tensor:
        """Runs the model on the next ``ids``; returns the last position's logits [vocab_size]."""
        held, self._ids = self._ids, []
        self._intact = True
        try:
            if self._graphs is None:
                logits = self._plain_forward(ids)
            else:
                logits = self._graph_forward(self._graphs, held, ids)
        except KeyboardInterrupt:
            # Some layers hold the new tokens by now and others do not.
            if self._intact and self._cache is not None:
                with suppress(Exception):
                    self._go_back(held, len(held))
            raise
        # Only now: after any other exception nothing is trusted, and without ids the next `reuse`
        # starts from an empty cache.
        held.extend(ids)
        self._ids = held
        return logits

    def _graph_forward(
        self, graphs: DecodeGraphs, held: Sequence[int], ids: Sequence[int]
    ) -> torch.Tensor:
        moved = self._cache.reserve(len(held) + len(ids))
        if self._gpu is not None:
            self._gpu.refresh()
            moved |= self._gpu.version != self._gpu_version
            self._gpu_version = self._gpu.version
        # The next forward must be the model's own: it takes the adapters' numbers, which a graph
        # cannot while it is captured.
        changed = self._changes != self._active_set.changes
        self._changes = self._active_set.changes
        if moved or changed:
            graphs.clear()
        if len(ids) > 1 or changed:
            return self._plain_forward(ids)
        found = graphs.step(ids, [len(held)])
        if found is None:
            found = graphs.capture(ids, [len(held)], self._logits)
        if found is not None:
            self._cache.set_length(len(held) + 1)
            return found[0]
        logits = self._plain_forward(ids)
        self._intact = False
        if not graphs.prepare(ids, [len(held)], logits.unsqueeze(0)):
            # It may have stored anything anywhere.
            self._cache.reset()
            everything = [*held, *ids]
            for start in range(0, len(everything), PREFILL_CHUNK):
                logits = self._plain_forward(everything[start : start + PREFILL_CHUNK])
        return logits

    def _plain_forward(self, ids: Sequence[int]) -> torch.Tensor:
        inputs = torch.tensor([list(ids)], device=self.device)
        with torch.inference_mode():
            held = {self._argument: self._cache}
            output = self.model(input_ids=inputs, use_cache=True, logits_to_keep=1, **held)
        if self._cache is None:
            self._cache = getattr(output, self._argument)
        self._logits = output.logits[0, -1]
        return self._logits
