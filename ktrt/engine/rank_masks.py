"""Which ranks of LoRAs that lie side by side each token of a GPU's step multiplies.

The rows of a step on a GPU share one matrix product with the A of all resident adapters; a mask
then clears the ranks of every adapter but the row's own. It is made of tensors on the device only,
so that a captured graph serves whatever ids are copied in before its replay.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ktrt.engine.step_rows import ACTIVE

if TYPE_CHECKING:
    from torch import nn

    from ktrt.engine.step_rows import RunningStep, StepRows
    from ktrt.utils.patches import Patches

# The owner of ranks that only pad a matrix.
NOBODY = -4

# (number of an adapter, or NOBODY, and how many ranks of it follow), in the order of the ranks.
Owners = tuple[tuple[int, int], ...]
# (number, weight) of the adapters in the active sum.
Weights = tuple[tuple[int, float], ...]


class RankOwners:
    """The owner of each rank, on the device: made before a capture, which may not copy from the
    host, and weighed in place, so that captured graphs follow a change of the active sum."""

    def __init__(self, owners: Owners, device: torch.device) -> None:
        self._list = [number for number, ranks in owners for _ in range(ranks)]
        self._numbers = torch.tensor(self._list, dtype=torch.int32, device=device)
        self._active = torch.zeros(len(self._list), dtype=torch.bool, device=device)
        self._factors = torch.ones(len(self._list), dtype=torch.float32, device=device)
        self.all_active = torch.full((1,), ACTIVE, dtype=torch.int32, device=device)
        self._weights: Weights = ()
        # Whether a weight of the active sum is neither 0 nor 1.
        self._weighed = False

    def weigh(self, active: Weights) -> bool:
        """Takes the active sum; returns whether captured graphs lack an operation for it. Not
        during a capture."""
        if active == self._weights:
            return False
        self._weights, known = active, dict(active)
        factors = torch.tensor([known.get(number, 0.0) for number in self._list])
        self._active.copy_(factors != 0)
        self._factors.copy_(factors)
        before, self._weighed = self._weighed, any(w not in (0, 1) for _, w in active)
        return before != self._weighed

    def mask(self, adapters: torch.Tensor) -> RankMask:
        """The mask of tokens with these ``adapters`` [tokens]."""
        ids = adapters[:, None]
        of_active = ids == ACTIVE
        present = (ids == self._numbers) | (of_active & self._active)
        if not self._weighed:
            return RankMask(present)
        return RankMask(present, torch.where(of_active, self._factors, 1.0))


@dataclass(frozen=True)
class RankMask:
    """``present`` [tokens, ranks]: whether the token's adapter owns the rank; ``factors`` (float32)
    what a shrunk value is multiplied by there."""

    present: torch.Tensor
    factors: torch.Tensor | None = None

    def __call__(self, shrunk: torch.Tensor) -> torch.Tensor:
        """``shrunk`` [tokens, ranks] with zeros where a rank is another adapter's. Not a product
        with 0, which would keep NaN."""
        if self.factors is not None:
            shrunk = (shrunk.float() * self.factors).to(shrunk.dtype)
        return torch.where(self.present, shrunk, 0.0)

    def of_sequences(self) -> RankMask:
        """The mask of [sequences, tokens, ranks] with a row of this one for each sequence."""
        factors = None if self.factors is None else self.factors[:, None]
        return RankMask(self.present[:, None], factors)

    def take(self, index: torch.Tensor) -> RankMask:
        """The mask of the tokens at ``index`` (integers of any shape); one row stands for all."""
        if self.present.shape[0] == 1:
            return self
        return RankMask(self.present[index], None if self.factors is None else self.factors[index])


class RankMasks:
    """The masks of one model's running step. Layers with the same owners share one, which is made
    once per forward."""

    def __init__(self, running: RunningStep) -> None:
        self._running = running
        self._owners: weakref.WeakValueDictionary[object, RankOwners] = (
            weakref.WeakValueDictionary()
        )
        # The masks of the forward between its hooks; None outside of one, where nothing is kept.
        self._made: dict[RankOwners, RankMask] | None = None
        # The step that the forward began with, and what ``rows`` is for it; a layer may compute
        # other tokens than the step's in between.
        self._begun: StepRows | None = None
        self._by_row: StepRows | None = None

    def watch(self, model: nn.Module, patches: Patches) -> None:
        """Makes each forward of ``model`` one step, until ``patches`` are undone."""
        patches.add(model.register_forward_pre_hook(lambda *_: self._begin()).remove)
        patches.add(model.register_forward_hook(lambda *_: self._end(), always_call=True).remove)

    def owners(self, owners: Owners, device: torch.device) -> RankOwners:
        """The one object for these arguments. Not during a capture."""
        key = (owners, device)
        found = self._owners.get(key)
        if found is None:
            # No inference tensors: later forwards may run without that mode.
            with torch.inference_mode(False):
                found = self._owners[key] = RankOwners(owners, device)
        return found

    @property
    def rows(self) -> StepRows | None:
        """The running step if its tokens may differ in their adapters; None: all of them have the
        active ones. Asks the host's copy of the ids, once per forward."""
        rows = self._running.rows
        if self._made is not None and rows is self._begun:
            return self._by_row
        return _differing(rows)

    def of(self, owners: RankOwners, adapters: torch.Tensor | None) -> RankMask:
        """The mask of tokens with these ``adapters`` [tokens] on the device, such as
        ``StepRows.on_device``; None: of one token with the active ones, for all."""
        if adapters is None:
            return owners.mask(owners.all_active)
        if self._made is None or self._begun is None or adapters is not self._begun.on_device:
            return owners.mask(adapters)
        if owners not in self._made:
            self._made[owners] = owners.mask(adapters)
        return self._made[owners]

    def _begin(self) -> None:
        # Never what an earlier forward has left: a graph must compute its own.
        self._made, self._begun = {}, self._running.rows
        self._by_row = _differing(self._begun)

    def _end(self) -> None:
        self._made = self._begun = self._by_row = None


def _differing(rows: StepRows | None) -> StepRows | None:
    return rows if rows is not None and rows.by_row else None
