"""Which ranks of a layer's LoRA, all adapters side by side, the tokens of a forward take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ktrt.experts.gpu.arithmetic import ALL_RANKS, LoraChoice

if TYPE_CHECKING:
    import torch

    from ktrt.engine.rank_masks import RankMasks, RankOwners
    from ktrt.experts.gpu.source import LayerSource


class RankChoice:
    """The choice of one layer, for the adapters that the engine holds."""

    def __init__(self, source: LayerSource, masks: RankMasks, device: torch.device) -> None:
        self._source, self._masks, self._device = source, masks, device
        # The owners of the ranks of the bank's input_a and down_a.
        self._owners: list[RankOwners | None] = []
        # The LoRA of a forward whose tokens all have the active adapters.
        self._uniform: Literal["nothing", "all ranks", "masked"] = "nothing"
        self.weigh()

    def weigh(self) -> bool:
        """Looks at the active adapters; returns whether captured graphs lack an operation for
        them, or read memory that is no longer theirs."""
        source, device = self._source, self._device
        before, stale = (self._owners, self._uniform), False
        self._owners = [
            self._masks.owners(owners, device) if owners else None
            for owners in (source.input_owners, source.down_owners)
        ]
        for each in self._owners:
            # Layers share these objects, and the first one has changed them for all.
            stale |= each is not None and each.weigh(source.active)
        held = {number for number, _ in (*source.input_owners, *source.down_owners)}
        weights = {number: weight for number, weight in source.active if number in held}
        self._uniform = "masked" if weights else "nothing"
        if weights and weights == dict.fromkeys(held, 1.0):
            self._uniform = "all ranks"
        return stale or before != (self._owners, self._uniform)

    def of(self, adapters: torch.Tensor | None = None) -> LoraChoice | None:
        """The ranks that each token takes; ``adapters`` as for ``GpuLayer.forward_resident``."""
        if adapters is None and self._uniform != "masked":
            return ALL_RANKS if self._uniform == "all ranks" else None
        of = self._masks.of
        return LoraChoice(*(None if each is None else of(each, adapters) for each in self._owners))
