"""Residents that follow the conversation: which experts the GPU holds changes with the routing.

The bank of a layer keeps its size and memory; a table on the device says which of its places an
expert has, and captured steps read it. Between two steps the table changes in stream order, so
that the engine leaves out exactly what the GPU computes. A place that changes hands belongs to no
expert until the copy has ended, which takes a step or two; the engine computes both meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ktrt.experts.gpu.arithmetic import ExpertBank
    from ktrt.experts.gpu.source import LayerSource
    from ktrt.experts.gpu.stream import WorkLane

    Numbers = NDArray[np.int64]
    Rates = NDArray[np.float64]

# Tokens after which a use counts half, and the uses per token that an expert must be ahead of the
# one it replaces. In simulated conversations of 64 experts, a quarter resident, 32 to 64 tokens
# and 0.05 to 0.1 find 0.71-0.73 of all uses (another text's most used: 0.31); with routing that
# has no pattern they copy 1 % of what the engine reads.
HALF_LIFE = 48
MARGIN = 0.1
# Most copies that a step starts: the host issues one in 0.3 ms, while the step runs.
MOST_COPIES = 4
# Forwards of more tokens are prompts, whose hits nobody counts.
_STEP_TOKENS = 32


class FollowedLayer(Protocol):
    """``ktrt.experts.gpu.residents.GpuLayer``, as far as it is used here."""

    source: LayerSource
    experts: tuple[int, ...]

    @property
    def bank(self) -> ExpertBank: ...
    def replace(self, place: int, expert: int) -> None: ...


class Swap(NamedTuple):
    """An expert that takes another one's place in the bank of a layer."""

    layer: int
    leaves: int
    enters: int


@dataclass
class ResidentCounts:
    """Numbers since the start. ``hits`` and ``misses``: chosen experts of decode steps that were
    and were not on the GPU. ``uploads``: experts copied there during steps, ``upload_bytes`` their
    size; ``adopted``: experts that stayed there after a streamed prompt. ``evictions``: experts
    that made room for both."""

    hits: int = 0
    misses: int = 0
    uploads: int = 0
    upload_bytes: int = 0
    adopted: int = 0

    @property
    def evictions(self) -> int:
        return self.uploads + self.adopted

    def __str__(self) -> str:
        share = self.hits / max(1, self.hits + self.misses)
        return (
            f"{share:.0%} of the chosen ones; {self.uploads:,} copied there "
            f"({self.upload_bytes / 1e9:.1f} GB), {self.adopted:,} kept after prompts"
        )


class UseRates:
    """How often a token uses each expert, of late: [layers, experts]; -1 where a layer has fewer
    experts."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.values: Rates = np.zeros((len(sizes), max(sizes)))
        for layer, size in enumerate(sizes):
            self.values[layer, size:] = -1

    def add(self, uses: Numbers, tokens: float, layers: slice = slice(None)) -> None:
        """Takes the ``uses`` [layers, experts] of the latest ``tokens``."""
        kept, before = 0.5 ** (tokens / HALF_LIFE), self.values[layers]
        mean = uses / max(tokens, 1)
        self.values[layers] = np.where(before < 0, -1, kept * before + (1 - kept) * mean)

    def swaps(self, resident: NDArray[np.bool_], most: int) -> list[Swap]:
        """The swaps that gain the most, at most one of a layer; ``resident`` [layers, experts]."""
        enters = np.where(resident, -1, self.values).argmax(1)
        leaves = np.where(resident, self.values, np.inf).argmin(1)
        layers = np.arange(len(enters))
        # A layer without residents, or without others, gains nothing.
        movable = resident[layers, leaves] & ~resident[layers, enters]
        gains = self.values[layers, enters] - self.values[layers, leaves]
        found = np.flatnonzero(movable & (gains > MARGIN))
        best = found[np.argsort(-gains[found], kind="stable")][:most]
        return [Swap(int(at), int(leaves[at]), int(enters[at])) for at in best]


def prompt_swaps(uses: Sequence[int], resident: Sequence[int]) -> list[tuple[int, int]]:
    """(leaves, enters) of a layer after a prompt of these ``uses`` by expert, after which its most
    used experts are ``resident``."""
    held = set(resident)
    order = sorted(range(len(uses)), key=lambda expert: (-uses[expert], expert not in held, expert))
    chosen = order[: len(held)]
    leaving = [expert for expert in order[len(held) :] if expert in held]
    return list(zip(reversed(leaving), [e for e in chosen if e not in held], strict=True))


@dataclass
class _Copy:
    """An expert that is on its way to ``place`` of a layer's bank."""

    layer: int
    expert: int
    place: int
    done: Any


class Following:
    """Moves the residents of all layers. ``step`` is for decoding, ``adopt`` for streamed
    prompts."""

    @torch.inference_mode(mode=False)
    def __init__(
        self,
        layers: Sequence[FollowedLayer],
        table: torch.Tensor,
        counts: torch.Tensor,
        top_k: int,
        lane: WorkLane,
    ) -> None:
        """``table`` and ``counts`` [layers, experts + 1] int64 on the device: each expert's place,
        -1 for none, and its uses; the last column belongs to ids that are none. ``lane``:
        for these copies alone."""
        self._layers, self._lane = layers, lane
        self._table, self._counts = table, counts
        self._places: Numbers = table.cpu().numpy().copy()
        self._rates = UseRates([layer.source.num_experts for layer in layers])
        self._copies: list[_Copy] = []
        # The device's counts after an earlier step, once they are there, and who was resident.
        self._arriving = torch.zeros_like(counts, device="cpu")
        if table.is_cuda:
            self._arriving = self._arriving.pin_memory()
        self._asked, self._arrived = False, None
        self._was_resident = self._places[:, :-1] >= 0
        self._seen: Numbers = counts.cpu().numpy()[:, :-1].copy()
        self._top_k = top_k
        self.numbers = ResidentCounts()

    @torch.inference_mode(mode=False)
    def step(self) -> None:
        """Moves residents, given what the router chose up to the last step: call it when a step
        has been issued and before the host waits for it. Takes 0.1 ms and 0.3 ms a copy."""
        if self._asked:
            if not self._lane.done(self._arrived):
                return
            self._look()
        was_resident = self._places[:, :-1] >= 0
        changed = self._place([copy for copy in self._copies if self._lane.done(copy.done)])
        resident = self._places[:, :-1] >= 0
        resident[[copy.layer for copy in self._copies]] = False  # one at a time
        swaps = self._rates.swaps(resident, MOST_COPIES)
        vacant = [self._leave(swap.layer, swap.leaves, swap.enters) for swap in swaps]
        if changed or swaps:
            self._write_table()
        self._arriving.copy_(self._counts, non_blocking=True)
        self._asked, self._arrived = True, self._lane.mark()
        self._was_resident = was_resident
        for swap, place in zip(swaps, vacant, strict=True):
            self._upload(swap.layer, swap.enters, place)

    def settle(self) -> None:
        """Waits for all copies; every place then belongs to an expert."""
        if self._copies:
            self._lane.close()
            self._place(list(self._copies))
            self._write_table()

    def restart(self, index: int, experts: Sequence[int]) -> None:
        """Expects that these experts, in this order, become a layer's residents."""
        self.settle()
        self._places[index] = -1
        self._places[index, list(experts)] = np.arange(len(experts))

    @torch.inference_mode(mode=False)
    def adopt(self, index: int, uses: Sequence[int]) -> Adoption:
        """Begins to keep the experts of a layer that a streamed prompt uses most."""
        # Known from now on; counts that are on their way do not hold them yet.
        padded = np.zeros((1, self._seen.shape[1]), np.int64)
        padded[0, : len(uses)] = uses
        self._rates.add(padded, sum(uses) / self._top_k, slice(index, index + 1))
        self._seen[index] += padded[0]
        self._asked = False
        return Adoption(self, index, prompt_swaps(uses, self._layers[index].experts))

    def keep(
        self, index: int, leaving: Sequence[int], bank: ExpertBank, rows: Sequence[int]
    ) -> None:
        """Copies ``rows`` of a piece to the places of experts that leave, once all that was issued
        has read those."""
        places = [int(place) for place in self._places[index, list(leaving)]]
        _put(self._layers[index].bank, places, bank, rows)

    def enter(self, index: int, swaps: Sequence[tuple[int, int]]) -> None:
        """Gives experts, whose copies are there, the places of others: (leaves, enters)."""
        for leaves, enters in swaps:
            self._places[index, enters] = self._leave(index, leaves, enters)
        self.numbers.adopted += len(swaps)
        if swaps:
            self._write_table()

    def _look(self) -> None:
        """Takes the counts that have arrived."""
        now = self._arriving.numpy()[:, :-1]
        uses = np.where(self._rates.values < 0, 0, now - self._seen)
        self._seen = now.copy()
        if (uses < 0).any():  # the counts were forgotten
            return
        tokens = float(uses[0].sum()) / self._top_k
        if tokens <= 0:
            return
        self._rates.add(uses, tokens)
        if tokens <= _STEP_TOKENS:
            hits = int(uses[self._was_resident].sum())
            self.numbers.hits += hits
            self.numbers.misses += int(uses.sum()) - hits

    def _leave(self, index: int, leaves: int, enters: int) -> int:
        """Takes its place from an expert, for another one; returns it."""
        place = int(self._places[index, leaves])
        self._places[index, leaves] = -1
        self._layers[index].replace(place, enters)
        return place

    def _upload(self, index: int, expert: int, place: int) -> None:
        layer, device = self._layers[index], self._table.device

        def copy() -> None:
            one = slice(expert, expert + 1)
            arrays = layer.source.arrays.items()
            fetched = {name: each[one].to(device, non_blocking=True) for name, each in arrays}
            _put(layer.bank, [place], layer.source.bank(fetched), [0])

        done = self._lane.run(copy, self._lane.mark())
        self._copies.append(_Copy(index, expert, place, done))
        self.numbers.uploads += 1
        self.numbers.upload_bytes += layer.source.expert_bytes

    def _place(self, copies: Sequence[_Copy]) -> bool:
        """Gives the experts that have come their places; whether there are any."""
        for copy in copies:
            self._lane.wait(copy.done)
            self._places[copy.layer, copy.expert] = copy.place
            self._copies.remove(copy)
        return bool(copies)

    def _write_table(self) -> None:
        """Has later steps read the places as they are now."""
        places = torch.from_numpy(self._places)
        # Another copy, which torch keeps until it was read.
        places = places.pin_memory() if self._table.is_cuda else places
        self._table.copy_(places, non_blocking=True)


class Adoption:
    """The experts of a layer that stay after a streamed prompt; ``swaps``: who would leave and
    enter."""

    def __init__(self, following: Following, index: int, swaps: Sequence[tuple[int, int]]) -> None:
        self._following, self._index = following, index
        self._leaving = {enters: leaves for leaves, enters in swaps}
        self._taken: list[int] = []

    def take(self, experts: Sequence[int], bank: ExpertBank) -> None:
        """Keeps what is wanted of a piece, whose ``experts`` are in the order of ``bank``."""
        rows = [row for row, expert in enumerate(experts) if expert in self._leaving]
        if rows:
            entering = [experts[row] for row in rows]
            leaving = [self._leaving[expert] for expert in entering]
            self._following.keep(self._index, leaving, bank, rows)
            self._taken += entering

    def end(self) -> None:
        """Has later forwards find them there."""
        self._following.enter(self._index, [(self._leaving[each], each) for each in self._taken])


def _put(bank: ExpertBank, places: Sequence[int], others: ExpertBank, rows: Sequence[int]) -> None:
    """Copies ``rows`` of other experts to these places."""
    held = bank.tensors()
    for name, tensor in others.tensors().items():
        for place, row in zip(places, rows, strict=True):
            held[name][place].copy_(tensor[row])
