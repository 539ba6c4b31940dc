"""Both sides of all adapters in one model: LoRA of the routed experts in the engine, the rest in
torch's modules."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from ktrt.adapter.apply.switches import TorchAdapters
from ktrt.adapter.resident import Resident
from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from ktrt.adapter.plan import AdapterPlan
    from ktrt.experts import KTExperts

    # Runs a change while no forward runs.
    Between = Callable[[Callable[[], object]], object]

logger = logging.getLogger(__name__)


class Sides:
    """Adds, removes and weighs adapters in engine and torch, by number; the engine's numbers and
    PEFT's names follow from it."""

    def __init__(self, model: nn.Module | None, experts: Mapping[str, KTExperts]) -> None:
        """``experts``: the model's attached experts modules by path."""
        self.model, self.experts = model, dict(experts)
        self.torch = TorchAdapters(model) if model is not None else None

    def require(self) -> tuple[nn.Module, TorchAdapters]:
        """Returns the model and its torch side. ``KtrtError``: there is no model."""
        if self.model is None or self.torch is None:
            raise KtrtError("this session has no model that an adapter could be loaded into")
        return self.model, self.torch

    def apply(self, number: int, plan: AdapterPlan) -> None:
        """Adds the torch side, off; everything else is off there afterwards too."""
        model, torch = self.require()
        name = torch_name(number)
        torch.add(name, lambda: plan.apply_to_torch(model, name))

    def load_experts(self, number: int, plan: AdapterPlan, between: Between) -> None:
        """Gives every layer the LoRA, an empty one where the adapter has none, so that all layers
        know its number. Layer by layer: packing the LoRA of one takes 0.01 s to 0.3 s."""
        for path, module in self.experts.items():
            arguments: dict[str, Any] = plan.engine_arguments(path)
            between(partial(module.layer.load_lora, number, **arguments))
            if arguments:
                plan.mark_experts(path)

    def settle(self) -> None:
        """Has parameters that came with an adapter run as the base's do."""
        model, _ = self.require()
        model.eval().requires_grad_(False)

    def resident(self, number: int, plan: AdapterPlan) -> Resident:
        """Describes an adapter that both sides have."""
        _, torch = self.require()
        name = torch_name(number)
        replaced = torch.replaced(name)
        whole = f"replaces {replaced} of the base model" if replaced else None
        whole = "is a DoRA" if plan.settings.use_dora else whole
        row_reason = whole or plan.row_reason or torch.row_reason(name)
        return Resident(
            number, plan.audit, plan.digest, whole, row_reason, plan.files.folder, plan.norms
        )

    def remove(self, number: int) -> None:
        """Removes the adapter from both sides, even if it was loaded only in part; leaves all
        adapters inactive in torch."""
        for module in self.experts.values():
            try:
                module.layer.unload_lora(number)
            except ValueError:
                logger.debug("LoRA %d had not reached every layer", number)
                break
        if self.torch is not None:
            self.torch.remove(torch_name(number))

    def weigh(self, weights: Iterable[tuple[int, float]]) -> None:
        """Has these adapters act from the next forward on, and no others."""
        pairs = list(weights)
        numbers, values = [number for number, _ in pairs], [weight for _, weight in pairs]
        for module in self.experts.values():
            module.layer.activate_loras(numbers, values)
        if self.torch is not None:
            self.torch.weigh({torch_name(number): weight for number, weight in pairs})


def torch_name(number: int) -> str:
    """Returns PEFT's name of the adapter with the engine's ``number``."""
    return "default" if number == 0 else f"adapter{number}"
