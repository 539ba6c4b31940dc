"""The GPU's share of the routed experts: whole layers streamed for long prompts, often used experts
resident."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ktrt.engine.rank_masks import RankMasks
from ktrt.engine.step_rows import IDLE, RunningStep
from ktrt.errors import KtrtError
from ktrt.experts.gpu.arithmetic import grouped_rows, make_rows, warm_up
from ktrt.experts.gpu.blocks import Blocks, Call
from ktrt.experts.gpu.following import Following
from ktrt.experts.gpu.grouping import Grouping
from ktrt.experts.gpu.rank_choice import RankChoice
from ktrt.experts.gpu.source import LayerSource
from ktrt.experts.gpu.static import static_sums
from ktrt.experts.gpu.stream import (
    ExpertStream,
    Pinning,
    make_lane,
    make_pinning,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ktrt.engine import MoeLayer
    from ktrt.experts.gpu.arithmetic import ExpertBank, LoraChoice
    from ktrt.experts.gpu.stream import Lane

# Tokens of a block of a streamed prompt: everything but the routed experts is computed block by
# block.
BLOCK_TOKENS = 8192
# Tokens whose routed experts are computed together, where memory allows: 16 blocks.
MOST_TOKENS = 131072


class GpuLayer:
    """The GPU's share of one layer. Tensors come and go on the GPU."""

    # Up to this many tokens, the largest step that is captured, ``forward_resident`` has static
    # shapes and no synchronisation.
    CAPTURABLE_TOKENS = 32

    @torch.inference_mode(mode=False)  # what is made here is written in and out of it
    def __init__(self, owner: GpuExperts, index: int, source: LayerSource) -> None:
        self._owner = owner
        self._index = index
        self.source = source
        self._bank: ExpertBank | None = None
        self.experts: tuple[int, ...] = ()  # resident, in the bank's order
        # Each expert's place in the bank, and its uses; the last column is for ids that are none.
        self._slots, self._counts = owner.places[index], owner.uses[index]
        self._ranks = RankChoice(source, owner.masks, owner.device)

    @property
    def resident(self) -> bool:
        """Some experts of this layer live on the GPU."""
        return bool(self.experts)

    @property
    def complete(self) -> bool:
        """All experts of this layer live on the GPU: the engine has nothing to do."""
        return len(self.experts) == self.source.num_experts

    @property
    def bank(self) -> ExpertBank:
        """The resident experts. ``KtrtError``: there are none."""
        if self._bank is None:
            raise KtrtError("no expert of this layer lives on the GPU")
        return self._bank

    @property
    def nbytes(self) -> int:
        """GPU memory of this layer's resident experts."""
        return self._bank.nbytes() if self._bank is not None else 0

    def streams(self, tokens: int) -> bool:
        """Whether a forward of ``tokens`` tokens belongs to ``forward_streamed``: never a decode
        step, which a graph may capture."""
        if self._owner.blocks.running:
            return True
        rows = self._owner.running.rows
        decodes = tokens == 1 or (rows is not None and (rows.batch or rows.decode == tokens))
        return not decodes and 0 < self._owner.threshold <= tokens

    def counts(self) -> list[int]:
        """Routed (token, slot) pairs of every expert so far."""
        counts: list[int] = self._counts[: self.source.num_experts].tolist()
        return counts

    def forget_counts(self) -> None:
        """Resets the counts."""
        self._counts.zero_()

    def cpu_ids(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """The ids that are left to the engine: int64, -1 where the GPU computes the slot. Counts
        the routed tokens: call it once per forward. Can be captured in a graph."""
        self._refresh()
        keys = self._keys(top_k_index)
        self._count(keys)
        return torch.where(self._slots[keys] >= 0, -1, top_k_index.to(torch.int64)).contiguous()

    def forward_resident(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sums over the slots of resident experts, float32 [tokens, hidden_size].

        hidden_states [tokens, hidden_size] float, top_k_index and top_k_weights [tokens, k];
        ``adapters`` [tokens] int32, on the device: each token's LoRA (``engine.step_rows``), None:
        the active ones for all. Beyond ``CAPTURABLE_TOKENS`` it synchronises with the host once.
        """
        slots = self._slots[self._keys(top_k_index)]
        lora = self.lora(adapters)
        count, hidden = len(self.experts), self.source.hidden_size
        if slots.shape[0] <= self.CAPTURABLE_TOKENS:
            rows = make_rows(hidden_states, self.source.quantized)
            return static_sums(self.bank, rows, slots, top_k_weights.float(), lora)[:, :hidden]
        rows = grouped_rows([hidden_states], self.source.quantized)
        grouping = Grouping(slots, top_k_weights, count, hidden)
        grouping.add(range(count), self.bank, rows, lora)
        return grouping.total()

    def forward_streamed(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All experts on the GPU, those that are not resident streamed there: shape, dtype and
        device of hidden_states. ``adapters`` as for ``forward_resident``."""
        call = Call(self, hidden_states, top_k_index, top_k_weights, adapters)
        blocks = self._owner.blocks
        return blocks.meet(call) if blocks.running else self.streamed([call])[0]

    def streamed(self, calls: Sequence[Call]) -> list[torch.Tensor]:
        """``forward_streamed`` of all calls, with one copy of the experts."""
        self._refresh()
        stream, following = self._owner.stream, self._owner.following
        if following is not None:
            following.settle()
        stream.start(self._index)
        index = torch.cat([call.index for call in calls])
        weights = torch.cat([call.weights for call in calls])
        adapters = [call.adapters for call in calls if call.adapters is not None]
        lora = self.lora(torch.cat(adapters) if adapters else None)
        self._count(self._keys(index))
        rows = grouped_rows([call.states for call in calls], self.source.quantized)
        others = [e for e in range(self.source.num_experts) if e not in self.experts]
        order = [*self.experts, *others] if self.experts else None
        grouping = Grouping(index, weights, self.source.num_experts, self.source.hidden_size, order)
        if self._bank is not None:
            grouping.add(self.experts, self._bank, rows, lora)
        adoption = None if following is None else following.adopt(self._index, grouping.sizes())
        for experts, arrays in stream.pieces(self._index):
            bank = self.source.bank(arrays)
            grouping.add(experts, bank, rows, lora)
            if adoption is not None:
                adoption.take(experts, bank)
        if adoption is not None:
            adoption.end()
        sums = grouping.total().split([len(call.states) for call in calls])
        return [each.to(call.states.dtype) for each, call in zip(sums, calls, strict=True)]

    @torch.inference_mode(mode=False)
    def load(self, experts: Sequence[int]) -> bool:
        """Makes these experts (ascending ids) the resident ones, with the present LoRAs. Returns
        whether memory that a captured graph knows has been replaced."""
        self.experts = tuple(experts)
        slots = torch.full_like(self._slots, -1, device="cpu")
        slots[list(experts)] = torch.arange(len(experts))
        self._slots.copy_(slots)
        old, self._bank = self._bank, None
        if not experts:
            return old is not None
        return self._keep(old, self.source.bank(self._fetch(self.source.arrays)))

    def replace(self, place: int, expert: int) -> None:
        """Notes that ``expert`` gets this place in the bank."""
        self.experts = (*self.experts[:place], expert, *self.experts[place + 1 :])
        self._owner.stream.skip(self._index, self.experts)

    @torch.inference_mode(mode=False)
    def refresh_lora(self) -> tuple[bool, bool]:
        """Takes the LoRAs that the engine holds now, and the active ones; returns whether the
        source's arrays have changed, and whether captured graphs are stale."""
        changed = self.source.refresh_lora()
        stale = self._ranks.weigh()
        if self._bank is None:
            return changed, False
        if changed:
            arrays = self._fetch(self.source.lora_arrays)
            stale |= self._keep(self._bank, self.source.with_lora(self._bank, arrays))
        return changed, stale

    def lora(self, adapters: torch.Tensor | None = None) -> LoraChoice | None:
        """The ranks of the bank that each token takes; ``adapters`` as for ``forward_resident``."""
        return self._ranks.of(adapters)

    def _fetch(self, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        index = torch.tensor(self.experts)
        return {name: array[index].to(self._slots.device) for name, array in arrays.items()}

    def _keep(self, old: ExpertBank | None, bank: ExpertBank) -> bool:
        """Copies ``bank`` into the memory of ``old`` where it fits; else ``bank`` takes over."""
        self._bank = bank
        if old is None or not old.accepts(bank):
            return True
        kept = old.tensors()
        for name, tensor in bank.tensors().items():
            if tensor is not kept[name]:
                kept[name].copy_(tensor)
        self._bank = old
        return False

    def release(self) -> None:
        """Leaves everything to the engine and lets go of its memory."""
        self.load(())
        self.source.release()

    def _refresh(self) -> None:
        if self.source.stale:
            self._owner.refresh()

    def _keys(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids``, or one more than the last expert where there is none: as for all ids of rows
        that stand for nothing."""
        count, rows = self.source.num_experts, self._owner.running.rows
        inside = (ids >= 0) & (ids < count)
        if rows is not None and rows.batch and rows.tokens == len(ids):
            inside &= (rows.on_device != IDLE)[:, None]
        return torch.where(inside, ids, count).to(torch.int64)

    def _count(self, keys: torch.Tensor) -> None:
        flat = keys.flatten()
        self._counts.index_add_(0, flat, torch.ones_like(flat))


class GpuExperts:
    """The GPU's share of all layers of a model."""

    def __init__(
        self,
        layers: Mapping[str, MoeLayer],
        device: torch.device,
        *,
        lane: Lane | None = None,
        pinning: Pinning | None = None,
        running: RunningStep | None = None,
        masks: RankMasks | None = None,
    ) -> None:
        """``layers``: the engine's layers by experts path, in the order of a forward, all experts
        loaded. Nothing is on the GPU at first: ``select`` and ``threshold`` change that.
        ``running``: the model's step; ``masks``: its masks, which other layers may share."""
        self.device = torch.empty(0, device=device).device  # with its index
        warm_up(self.device)
        self.running = RunningStep() if running is None else running
        self.masks = RankMasks(self.running) if masks is None else masks
        # The fewest tokens of a streamed forward; 0: none is streamed.
        self.threshold = 0
        # The most tokens of a prompt whose experts are streamed once.
        self.most_tokens = BLOCK_TOKENS
        self.blocks = Blocks(self.device)
        # Changes when memory that a captured graph knows has been replaced: capture it again.
        self.version = 0
        self._sources = [LayerSource(layer) for layer in layers.values()]
        shape = len(layers), 1 + max(layer.num_experts for layer in layers.values())
        with torch.inference_mode(False):  # written in and out of it
            self.places = torch.full(shape, -1, dtype=torch.int64, device=self.device)
            self.uses = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._top_k = max(layer.top_k for layer in layers.values())
        self.following: Following | None = None  # None: the residents stay
        self._by_path = dict(zip(layers, self._sources, strict=True))
        self._pinning = pinning or make_pinning(self.device)
        self.stream = ExpertStream(self._sources, lane or make_lane(self.device))
        self.layers = {
            path: GpuLayer(self, index, source)
            for index, (path, source) in enumerate(zip(layers, self._sources, strict=True))
        }

    def source(self, path: str) -> LayerSource:
        """The engine's memory of one layer."""
        return self._by_path[path]

    def layer_bytes(self, path: str) -> int:
        """Bytes that streaming this layer copies when none of its experts is resident."""
        source = self._by_path[path]
        return source.num_experts * source.expert_bytes

    @property
    def resident_bytes(self) -> int:
        """GPU memory of the resident experts."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def pinned_bytes(self) -> int:
        """Memory of the engine that the GPU reads directly."""
        return self._pinning.nbytes

    @property
    def unpinned_bytes(self) -> int:
        """Memory that was to be pinned and could not be."""
        return self._pinning.failed_bytes

    def counts(self) -> dict[str, list[int]]:
        """How often the router chose each expert, by experts path; ``select`` takes them. Plain
        numbers, to be kept as JSON say."""
        return {path: layer.counts() for path, layer in self.layers.items()}

    def select(self, number: int, counts: Mapping[str, Sequence[int]] | None = None) -> None:
        """Puts ``number`` experts of every layer on the GPU, those with the largest ``counts``, the
        first ones where counts are equal or missing. Call it between answers.

        ``KtrtError``: a layer's counts are missing or of another length.
        """
        for index, (path, layer) in enumerate(self.layers.items()):
            total = self._sources[index].num_experts
            uses = list(counts.get(path, ())) if counts is not None else [0] * total
            if len(uses) != total:
                raise KtrtError(
                    f"counts of {path}: found {len(uses)} numbers, expected one for each of its "
                    f"{total} experts"
                )
            chosen = sorted(range(total), key=lambda expert: (-uses[expert], expert))[:number]
            self._load(index, layer, sorted(chosen))

    def follow(self) -> Following:
        """Has the residents, from pinned memory, follow the routing: call ``step`` after steps."""
        layers, lane = list(self.layers.values()), make_lane(self.device)
        self.following = new = Following(layers, self.places, self.uses, self._top_k, lane)
        return new

    def stay(self) -> None:
        """Ends ``follow``."""
        if self.following is not None:
            self.following.settle()
        self.following = None

    def refresh(self) -> None:
        """Takes the LoRAs that the engine holds now, and the active ones. Cheap if there is no
        change; must not happen in a graph capture if there is one."""
        stale = [index for index, source in enumerate(self._sources) if source.stale]
        if not stale:
            return
        if self.following is not None:
            self.following.settle()
        layers = list(self.layers.values())
        found = [layers[index].refresh_lora() for index in stale]
        if any(changed for changed, _ in found):
            self.stream.reset()
            if self._pinning.active:
                self.pin()
        self.version += any(replaced for _, replaced in found)

    def prefill_chunk(self, remaining: int, *, divides: bool = True) -> int | None:
        """Tokens of a prompt that the next forward should take, where streaming decides it;
        ``divides``: the caller runs it in ``block_lengths``."""
        if 0 < self.threshold <= remaining:
            return min(remaining, self.most_tokens if divides else BLOCK_TOKENS)
        return None

    def block_lengths(self, tokens: int) -> list[int]:
        """The blocks of a streamed prompt of ``tokens``, of nearly the same lengths."""
        count = -(-tokens // BLOCK_TOKENS)
        ends = [tokens * at // count for at in range(count + 1)]
        return [end - first for first, end in pairwise(ends)]

    def pin(self, layers: int | None = None) -> None:
        """Lets the GPU copy from the engine's memory directly: of all layers, or the first."""
        sources = self._sources[:layers]
        self._pinning.update([m for source in sources for m in source.memories.values()])

    def unpin(self) -> None:
        """The engine's memory is ordinary memory again."""
        self._pinning.update([])

    def close(self) -> None:
        """Frees the GPU's memory and lets go of the engine's; call it before ``Engine.close``."""
        self.threshold = 0
        self.stay()
        self.stream.close()
        self._pinning.close()
        for layer in self.layers.values():
            layer.release()

    def _load(self, index: int, layer: GpuLayer, experts: Sequence[int]) -> None:
        if self.following is not None:
            self.following.restart(index, experts)
        if layer.load(experts):
            self.version += 1
        self.stream.skip(index, experts)
