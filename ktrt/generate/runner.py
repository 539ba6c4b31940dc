"""Runs the model: steps of many sequences on the slots of a KV pool, and one conversation's client.

Only this package calls the model for an answer.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.active_set import ActiveSet
from ktrt.engine.step_rows import RunningStep
from ktrt.errors import KtrtError
from ktrt.generate.forwards import Forwards, Part, why_not_mixed
from ktrt.generate.graphs import DecodeGraphs
from ktrt.generate.row_steps import RowSteps
from ktrt.generate.step import Span, Step
from ktrt.kv.pool import MOST_SLOTS, KvPool, Slot
from ktrt.kv.snapshots import continues
from ktrt.kv.static import CannotMixError, StaticKv, unusual_layers
from ktrt.kv.stores import OwnStore, PlainStore

if TYPE_CHECKING:
    from array import array
    from collections.abc import Hashable, Sequence

    from ktrt.experts import GpuExperts
    from ktrt.generate.graphs import GraphMaker

logger = logging.getLogger(__name__)

# Tokens per forward of a prompt: enough for efficient GEMMs, few enough that Ctrl-C acts soon and
# the attention's memory stays small.
PREFILL_CHUNK = 512
# With a GPU: the engine's maximum per call, since every forward reads all experts' weights.
GPU_PREFILL_CHUNK = 1024

# Makes the graphs that decode one sequence on a cache: the slot is the argument ``first``.
GraphsFor = Callable[..., DecodeGraphs]


class ModelRunner:
    """A model together with the slots of its KV cache; the only caller of the model for answers.

    Not for several threads. ``pool`` opens and closes the slots.
    """

    def __init__(
        self,
        model: Any,
        graphs: GraphsFor | None = None,
        gpu: GpuExperts | None = None,
        active_set: ActiveSet | None = None,
        *,
        running: RunningStep | None = None,
        maker: GraphMaker | None = None,
        slots: int = MOST_SLOTS,
        capacity: int | None = None,
        budget: int | None = None,
    ) -> None:
        """``graphs`` decode single sequences (None: the host launches every step). ``gpu``: the
        GPU's share of the model's routed experts; ``active_set``: its adapters'.

        ``running`` is the step that the model's layers look at; None: they do not, and sequences
        run one after the other. ``maker`` records the steps of many. ``capacity``: positions of a
        slot, reserved at once; None: memory grows as needed, and moves. ``budget``: bytes for keys
        and values.
        """
        self.model, self.gpu = model, gpu
        self.active_set = ActiveSet() if active_set is None else active_set
        self._forwards = Forwards(model, RunningStep() if running is None else running)
        self.device = self._forwards.device
        self.plain = not unusual_layers(model)
        self.cache: StaticKv | None = None
        reserved = capacity is not None and self.device.type == "cpu"
        if self.plain:
            self.cache = _static(model, slots, capacity, reserved=reserved)
            store: PlainStore | OwnStore = PlainStore(self.cache, None if reserved else slots)
        else:
            store = OwnStore(model, slots)
        self.pool = KvPool(store, continues=continues(model), budget=budget)
        self._why_alone = _why_alone(model, running, self.device)
        # Whether a model that may mix has shown that its attention knows the step.
        self._proven = False
        self._graphs_for = graphs
        self.graphs: dict[int, DecodeGraphs] = {}
        self.row_steps: RowSteps | None = None
        if self.cache is not None and maker is not None and self.mixes and reserved:
            self.row_steps = RowSteps(model, self.cache, self._forwards.running, maker)
        # The version of the GPU's memory, and the adapters, that the graphs were captured with.
        self._gpu_version = -1
        self._structure = self._structure_now()
        # Logits of the last plain forward; the first tokens of a prompt always are one.
        self._logits = torch.empty(0)

    @property
    def mixes(self) -> bool:
        """Whether tokens of several slots share a forward."""
        return self._why_alone is None

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps of single sequences are replayed."""
        count = 0 if self.row_steps is None else self.row_steps.count
        return count > 0 or any(graphs.count for graphs in self.graphs.values())

    def prefill_chunk(self, remaining: int) -> int:
        """Tokens of a prompt's next forward."""
        streamed = None if self.gpu is None else self.gpu.prefill_chunk(remaining)
        return streamed or (GPU_PREFILL_CHUNK if self.device.type == "cuda" else PREFILL_CHUNK)

    def run(self, step: Step) -> list[torch.Tensor]:
        """Runs the step; returns the wanted logits [wanted, vocab_size] of each span. The slots
        hold its tokens then.

        After ``KeyboardInterrupt`` they hold what they held before, where that is possible; after
        any other exception they are empty.
        """
        parts = [Part(span, span.slot.length) for span in step.spans]
        self._check(parts)
        held = [part.span.slot.take() for part in parts]
        self._intact = True
        try:
            logits = self._run(parts, held)
        except KeyboardInterrupt:
            # Some layers hold the new tokens by now and others do not.
            with suppress(Exception):
                self._restore(parts, held)
            raise
        except BaseException:
            for part in parts:
                self.pool.empty(part.span.slot)
            raise
        for part, tokens in zip(parts, held, strict=True):
            part.span.slot.put(tokens, part.span.ids)
            self.pool.touch(part.span.slot)
        return logits

    @staticmethod
    def _check(parts: Sequence[Part]) -> None:
        if not parts or any(not part.count for part in parts):
            raise KtrtError("a step needs a token of every sequence in it, and a sequence")
        if len({part.span.slot.index for part in parts}) < len(parts):
            raise KtrtError("a step has one span of a slot, and found two of one")

    def _restore(self, parts: Sequence[Part], held: Sequence[array[int]]) -> None:
        for part, tokens in zip(parts, held, strict=True):
            if self._intact:
                part.span.slot.put(tokens)
                self.pool.rollback(part.span.slot, part.start)
            else:
                self.pool.empty(part.span.slot)

    def _run(self, parts: Sequence[Part], held: Sequence[array[int]]) -> list[torch.Tensor]:
        changed = self._follow(parts)
        if self.cache is None:
            return [self._on_own_cache(part) for part in parts]
        if self.mixes:
            try:
                return self._mixed(parts, changed=changed)
            except CannotMixError as error:
                self._run_alone(str(error), parts)
        return [
            self._alone(part, tokens, changed=changed)
            for part, tokens in zip(parts, held, strict=True)
        ]

    def _run_alone(self, reason: str, parts: Sequence[Part]) -> None:
        """From now on sequences run one after the other; ``parts`` are as they were."""
        self._why_alone, self.row_steps = reason, None
        logger.info("Sequences run one after the other, not in one forward: %s", reason)
        assert self.cache is not None
        for part in parts:
            self.cache.truncate(part.span.slot.index, part.start)

    def _structure_now(self) -> Hashable:
        return self.active_set.structure

    def _follow(self, parts: Sequence[Part]) -> bool:
        """Drops the graphs whose memory or adapters have changed; whether adapters have, whose
        numbers the next forward must take, which a graph cannot while it is captured."""
        moved = False
        if self.cache is not None:
            slots = 1 + max(part.span.slot.index for part in parts)
            moved = self.cache.reserve(max(part.end for part in parts), slots)
        if self.gpu is not None:
            self.gpu.refresh()
            moved |= self.gpu.version != self._gpu_version
            self._gpu_version = self.gpu.version
        changed = self._structure != self._structure_now()
        self._structure = self._structure_now()
        if moved or changed:
            for graphs in self.graphs.values():
                graphs.clear()
            if self.row_steps is not None:
                self.row_steps.clear()
        return changed

    def _on_own_cache(self, part: Part) -> torch.Tensor:
        store = self.pool.store
        assert isinstance(store, OwnStore)
        slot = part.span.slot
        logits, cache = self._forwards.alone(part, store.cache(slot))
        store.caches[slot.index] = cache
        return logits

    def _mixed(self, parts: Sequence[Part], *, changed: bool) -> list[torch.Tensor]:
        """Runs all parts in one forward. ``CannotMixError``: the model cannot."""
        order = sorted(range(len(parts)), key=lambda at: not parts[at].is_row)
        ordered = [parts[at] for at in order]
        logits = self._recorded(ordered) if not changed else None
        if logits is None:
            logits = self._many(ordered)
        found = dict(zip(order, logits, strict=True))
        return [found[at] for at in range(len(parts))]

    def _many(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        assert self.cache is not None
        try:
            logits = self._forwards.many(parts, self.cache, proven=self._proven)
        except Exception as error:
            if self._proven:
                raise
            # Most likely an attention that takes other shapes; if not, the forwards one by one
            # fail as well.
            raise CannotMixError(str(error)) from error
        self._proven = True
        self._logits = next((each[-1] for each in logits if len(each)), self._logits)
        return logits

    def _recorded(self, parts: Sequence[Part]) -> list[torch.Tensor] | None:
        """Runs decode rows by a recorded step; None: there is none."""
        steps = self.row_steps
        rows = all(part.is_row and part.span.logits is None for part in parts)
        if steps is None or not rows or not steps.usable or not self._proven:
            return None
        if steps.proven:
            return steps.run(parts, self._logits)
        logits = self._many(parts)
        return logits if steps.prove(parts, logits) else None

    def _alone(self, part: Part, held: array[int], *, changed: bool) -> torch.Tensor:
        """Runs one sequence, by its graph if it is a decode step that has one."""
        index = part.span.slot.index
        graphs = self._graphs_of(index)
        if graphs is None or not part.is_row or part.span.logits is not None or changed:
            return self._plain(part)
        ids, lengths = part.span.ids, [part.start]
        found = graphs.step(ids, lengths)
        if found is None:
            found = graphs.capture(ids, lengths, self._logits)
        if found is not None:
            return found
        logits = self._plain(part)
        self._intact = False
        if not graphs.prepare(ids, lengths, logits):
            # It may have stored anything anywhere.
            logits = self._again(part, held)
        self._intact = True
        return logits

    def _again(self, part: Part, held: array[int]) -> torch.Tensor:
        """Computes everything that the slot held and the part's tokens once more."""
        assert self.cache is not None
        slot = part.span.slot
        self.cache.truncate(slot.index, 0)
        everything = [*held, *part.span.ids]
        for start in range(0, len(everything), PREFILL_CHUNK):
            ids = everything[start : start + PREFILL_CHUNK]
            again = Span(slot=slot, ids=ids, adapter=part.span.adapter)
            logits = self._plain(Part(again, start))
        return logits

    def _plain(self, part: Part) -> torch.Tensor:
        logits, _ = self._forwards.alone(part, self.cache)
        if len(logits):
            self._logits = logits[-1]
        return logits

    def _graphs_of(self, slot: int) -> DecodeGraphs | None:
        """Returns the graphs that decode a slot's sequence alone."""
        if self._graphs_for is None or self.cache is None:
            return None
        if slot not in self.graphs:
            place = {"first": slot} if slot else {}
            self.graphs[slot] = self._graphs_for(self.cache, **place)
        return self.graphs[slot]


def _static(model: Any, slots: int, capacity: int | None, *, reserved: bool) -> StaticKv:
    if not reserved:
        return StaticKv(model.config)
    return StaticKv(model.config, slots=slots, capacity=capacity, reserved=True)


def _why_alone(model: Any, running: RunningStep | None, device: torch.device) -> str | None:
    """Returns why sequences run one after the other; None: they may share a forward."""
    unusual = unusual_layers(model)
    if unusual:
        reason = f"the model's KV cache has layers that are not plain ({', '.join(unusual)})"
    elif running is None:
        return "the model's layers do not look at steps"
    elif device.type != "cpu":
        return "the model is on a GPU"
    else:
        return why_not_mixed(model)
    logger.info("Sequences run one after the other, not in one forward: %s", reason)
    return reason


class KvCache:
    """One conversation's client: a slot, opened when it is first needed."""

    def __init__(
        self,
        model: Any,
        graphs: GraphsFor | None = None,
        gpu: GpuExperts | None = None,
        active_set: ActiveSet | None = None,
        *,
        runner: ModelRunner | None = None,
    ) -> None:
        """On a pool of its own, or on that of ``runner``, which then knows all the rest."""
        self.runner = runner or ModelRunner(model, graphs, gpu, active_set, slots=1)
        self.model, self.device, self.plain = model, self.runner.device, self.runner.plain
        # Whether several tokens at once can follow the held ones.
        self.continues = self.runner.pool.continues
        self._slot: Slot | None = None

    @property
    def length(self) -> int:
        """How many tokens are held."""
        return 0 if self._slot is None else self._slot.length

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps have been captured, and replays are used."""
        return self.runner.has_graphs

    def capture_ahead(self, length: int) -> None:
        """Captures the decode steps for up to ``length`` positions, after a decode step whose graph
        was compared with the plain forward's; nothing where there are no graphs."""
        slot, cache = self._slot, self.runner.cache
        graphs = None if slot is None else self.runner.graphs.get(slot.index)
        if graphs is not None and graphs.count and cache is not None:
            graphs.capture_up_to(min(length, cache.capacity))

    def reuse(self, prompt_ids: Sequence[int]) -> int:
        """Keeps the longest usable prefix of the prompt; returns its length.

        It never includes the prompt's last token, whose logits are needed.
        """
        key = self._key()
        if self._slot is None or self._slot.key != key:
            self._drop()
            self._open(key, prompt_ids)
        else:
            self.runner.pool.reuse(self._slot, prompt_ids)
        return self.length

    def _key(self) -> Hashable:
        """Says what the keys and values are computed with."""
        return "version", self.runner.active_set.version

    def _open(self, key: Hashable, prompt_ids: Sequence[int]) -> Slot:
        pool = self.runner.pool
        self._slot = pool.open(key, prompt_ids)
        # Idle when this object goes.
        self._close = weakref.finalize(self, pool.close, self._slot)
        return self._slot

    def _drop(self) -> None:
        if self._slot is not None:
            self._close()
            self._slot = None

    def mark(self, *, replace: bool = False) -> None:
        """Saves a snapshot of the cache where cropping may be impossible later; ``replace``: in
        place of the latest snapshot."""
        if self._slot is not None:
            self.runner.pool.mark(self._slot, replace=replace)

    def prefill_chunk(self, remaining: int) -> int:
        """Tokens of a prompt's next forward."""
        return self.runner.prefill_chunk(remaining)

    def forward(self, ids: Sequence[int]) -> torch.Tensor:
        """Runs the model on the next ``ids``; returns the last position's logits [vocab_size]."""
        slot = self._slot or self._open(self._key(), ())
        return self.runner.run(Step((Span(slot=slot, ids=ids),)))[0][-1]
