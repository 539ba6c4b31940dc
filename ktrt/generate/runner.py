"""Runs the model: steps of many sequences on the slots of a KV pool, and one conversation's client.

Only this package calls the model for an answer.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ktrt.engine.active_set import ActiveSet
from ktrt.engine.step_rows import RunningStep
from ktrt.errors import KtrtError
from ktrt.generate.alone import Alone
from ktrt.generate.device_memory import DeviceMemory
from ktrt.generate.forwards import Forwards, Part, why_alone
from ktrt.generate.long_prompts import LongPrompts
from ktrt.generate.mixed import Mixed
from ktrt.generate.row_steps import RowSteps
from ktrt.generate.step import Span, Step, StepStopped
from ktrt.kv.device import DRIVER, has_device_memory
from ktrt.kv.pool import MOST_SLOTS, KvPool, Slot
from ktrt.kv.snapshots import continues
from ktrt.kv.static import CannotMixError, StaticKv, unusual_layers
from ktrt.kv.stores import OwnStore, PlainStore

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Hashable, Sequence

    import torch

    from ktrt.experts import GpuExperts
    from ktrt.generate.alone import GraphsFor
    from ktrt.generate.device_memory import DeviceLora
    from ktrt.generate.graphs import GraphMaker
    from ktrt.generate.row_graphs import RowGraphs

logger = logging.getLogger(__name__)

# Tokens per forward of a prompt: enough for efficient GEMMs, few enough that Ctrl-C acts soon and
# the attention's memory stays small.
PREFILL_CHUNK = 512
# With a GPU: the engine's maximum per call, since every forward reads all experts' weights.
GPU_PREFILL_CHUNK = 1024


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
        row_graphs: Callable[[StaticKv, RunningStep], RowGraphs] | None = None,
        linears: DeviceLora | None = None,
        slots: int = MOST_SLOTS,
        capacity: int | None = None,
        budget: int | None = None,
    ) -> None:
        """``graphs`` decode single sequences (None: the host launches every step). ``gpu``: the
        GPU's share of the model's routed experts; ``active_set``: its adapters'.

        ``running`` is the step that the model's layers look at; None: they do not, and sequences
        run one after the other. ``maker`` records the steps of many, ``row_graphs`` captures them
        on a GPU, where ``linears`` keeps LoRA. ``capacity``: positions of a slot, reserved at once
        (where a GPU's driver can); None: memory grows as needed, and moves. ``budget``: bytes for
        keys and values.
        """
        self.model, self.gpu = model, gpu
        self.active_set = ActiveSet() if active_set is None else active_set
        self._forwards = Forwards(model, RunningStep() if running is None else running)
        self.device = self._forwards.device
        self.plain = not unusual_layers(model)
        self.cache: StaticKv | None = None
        self._on_cpu = self.device.type == "cpu"
        driver = None if capacity is None or self._on_cpu else _driver(self.device)
        reserved = capacity is not None and (self._on_cpu or driver is not None)
        # Whether growing conversations end no graph.
        self.memory_stays = self.plain and reserved
        if self.plain:
            self.cache = _static(model, slots, capacity if reserved else None, driver)
            store: PlainStore | OwnStore = PlainStore(self.cache, None if reserved else slots)
        else:
            store = OwnStore(model, slots)
        self.pool = KvPool(store, continues=continues(model), budget=budget)
        self._alone: Alone | None = None
        self._mixed: Mixed | None = None
        self._prompts: LongPrompts | None = None
        if self.cache is not None:
            rows = row_graphs and row_graphs(self.cache, self._forwards.running)
            if gpu is not None and self.pool.continues:
                self._prompts = LongPrompts(self._forwards, gpu)
            self._alone = Alone(self._forwards, self.cache, graphs, rows, self._prompts)
        reason = why_alone(model, running)
        if self.cache is not None and reason is None:
            steps = None
            if maker is not None and reserved and self._on_cpu:
                steps = RowSteps(model, self.cache, self._forwards.running, maker)
            self._mixed = Mixed(self._forwards, self.cache, steps)
        # Whether the model's layers take the adapter that a span names.
        self.by_row = running is not None
        self._memory = DeviceMemory(gpu, linears)
        # The adapters that the graphs were captured with.
        self._structure = self.active_set.structure
        self._moves = 0

    @property
    def mixes(self) -> bool:
        """Whether tokens of several slots share a forward."""
        return self._mixed is not None

    def make_reproducible(self) -> None:
        """Has nothing of earlier answers change a bit of a later one: prompts reuse what chunks of
        a prompt computed, or nothing where the bits depend on a chunk's begin. That all prompts are
        divided alike is then the caller's part."""
        self.pool.reuse_of = "prompts" if self.mixes else "none"

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps of single sequences are replayed."""
        return any(each.count for each in (self._alone, self._mixed) if each is not None)

    def capture_ahead(self, slot: int, length: int) -> None:
        """Captures a slot's decode steps for up to ``length`` positions, after a step whose graph
        was compared with the plain forward's."""
        graphs = None if self._alone is None else self._alone.graphs.get(slot)
        if graphs is not None and graphs.count and self.cache is not None:
            graphs.capture_up_to(min(length, self.cache.capacity))

    def prefill_chunk(self, remaining: int) -> int:
        """Tokens of a prompt's next forward."""
        streamed = None
        if self.gpu is not None:
            streamed = self.gpu.prefill_chunk(remaining, divides=self._prompts is not None)
        return streamed or (GPU_PREFILL_CHUNK if self.device.type == "cuda" else PREFILL_CHUNK)

    def run(self, step: Step) -> list[torch.Tensor]:
        """Runs the step; returns the wanted logits [wanted, vocab_size] of each span. The slots
        hold its tokens then.

        After ``KeyboardInterrupt`` and ``StepStopped`` they hold what they held before, where that
        is possible; after any other exception they are empty.
        """
        parts = [Part(span, span.slot.length) for span in step.spans]
        self._check(parts)
        self.pool.make_room([p.span.slot for p in parts], [p.end for p in parts])
        held = [part.span.slot.take() for part in parts]
        try:
            logits = self._run(parts, held)
        except (KeyboardInterrupt, StepStopped):
            # Some layers hold the new tokens by now and others do not.
            with suppress(Exception):
                self._restore(parts, held)
            raise
        except BaseException:
            for part in parts:
                self.pool.empty(part.span.slot)
            raise
        for part, tokens in zip(parts, held, strict=True):
            part.span.slot.put(tokens, part.span.ids, as_prompt=not part.is_row)
            if self.cache is not None:
                self.cache.stored(part.span.slot.index, part.end)
            self.pool.touch(part.span.slot)
        if not self._on_cpu:
            self._memory.give_back(sum(part.count for part in parts))
        return logits

    @staticmethod
    def _check(parts: Sequence[Part]) -> None:
        if not parts or any(not part.count for part in parts):
            raise KtrtError("a step needs a token of every sequence in it, and a sequence")
        if len(parts) > 1 and len({part.span.slot.index for part in parts}) < len(parts):
            raise KtrtError("a step has one span of a slot, and found two of one")

    def _restore(self, parts: Sequence[Part], held: Sequence[array[int]]) -> None:
        for part, tokens in zip(parts, held, strict=True):
            if self._alone is None or self._alone.intact:
                part.span.slot.put(tokens)
                self.pool.rollback(part.span.slot, part.start)
            else:
                self.pool.empty(part.span.slot)

    def _run(self, parts: Sequence[Part], held: Sequence[array[int]]) -> list[torch.Tensor]:
        changed = self._follow(parts)
        if self.cache is None:
            return [self._on_own_cache(part) for part in parts]
        assert self._alone is not None
        reason = ""
        if self._mixed is not None and self._shares(parts):
            try:
                return self._mixed.run(parts, changed=changed)
            except CannotMixError as error:
                reason = str(error)
            for part in parts:
                self.cache.truncate(part.span.slot.index, part.start)
        logits = self._alone.run(parts, held, changed=changed)
        if reason:
            # Only now: what also fails one by one has another reason.
            self._mixed = None
            if self.pool.reuse_of == "prompts":
                self.make_reproducible()
            logger.info("Sequences run one after the other, not in one forward: %s", reason)
        return logits

    def _shares(self, parts: Sequence[Part]) -> bool:
        """Whether the step is one forward: on the CPU always, so that bits do not depend on
        company; on a GPU decode rows have graphs, a prompt alone is as before, and long prompts
        run in blocks."""
        if self._on_cpu:
            return True
        tokens = sum(part.count for part in parts if not part.is_row)
        long = self._prompts is not None and self._prompts.take(tokens)
        return len(parts) > 1 and tokens > 0 and not long

    def _follow(self, parts: Sequence[Part]) -> bool:
        """Drops the graphs whose memory or adapters have changed; whether adapters have, whose
        numbers the next forward must take, which a graph cannot while it is captured."""
        moved = False
        if self.cache is not None:
            assert self._alone is not None
            end = max(part.end for part in parts)
            if self._alone.rows is not None:
                end = self._alone.rows.capacity_for(end)
            self.cache.reserve(end, 1 + max(part.span.slot.index for part in parts))
            moved, self._moves = self._moves != self.cache.moves, self.cache.moves
        moved |= self._memory.moved()
        changed = self._structure != self.active_set.structure
        self._structure = self.active_set.structure
        if moved or changed:
            for kept in (self._alone, self._mixed):
                if kept is not None:
                    kept.clear()
        return changed

    def _on_own_cache(self, part: Part) -> torch.Tensor:
        store = self.pool.store
        assert isinstance(store, OwnStore)
        slot = part.span.slot
        logits, cache = self._forwards.alone(part, store.cache(slot))
        store.caches[slot.index] = cache
        return logits


def _driver(device: torch.device) -> str | None:
    return DRIVER if has_device_memory(device) else None


def _static(model: Any, slots: int, capacity: int | None, driver: str | None) -> StaticKv:
    if capacity is None:
        return StaticKv(model.config)
    return StaticKv(model.config, slots=slots, capacity=capacity, reserved=True, driver=driver)


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
        """On a new pool, or on the pool of ``runner``, which then knows all the rest."""
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
        if self._slot is not None:
            self.runner.capture_ahead(self._slot.index, length)

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

    def close(self) -> None:
        """Gives the slot back; the next forward opens another one."""
        self._drop()

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
