"""Turning adapters on, off and to other weights outside the routed experts, by references and
factors only: no number of the base is ever written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


# The engine's INT8 linears take no more.
_MOST_RANKS = 256


class Switch(Protocol):
    """Something of one adapter in the model."""

    def weigh(self, weight: float) -> None:
        """Sets the factor from the next forward on; 0 is off."""

    def remove(self) -> None:
        """Frees it; it is off."""


@dataclass
class ParameterSwap:
    """A parameter whose place the adapter's own takes: all of it, or nothing. ``where`` names the
    module."""

    where: str
    holder: nn.Module
    name: str
    base: nn.Parameter
    own: nn.Parameter

    def weigh(self, weight: float) -> None:
        # Not by setattr, which walks through all parts of a module.
        self.holder._parameters[self.name] = self.own if weight else self.base

    def remove(self) -> None:
        self.weigh(0)


def swap_parameter(
    model: nn.Module, where: str, name: str, value: torch.Tensor, *, tied: bool
) -> list[ParameterSwap]:
    """Prepares ``value`` to take the place of a parameter of the module ``where``: wherever the
    model uses the same parameter if ``tied``, else there only. Nothing if it is what the base
    has."""
    module: Any = model.get_submodule(where)
    plain = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    base: nn.Parameter = plain.get_parameter(name)
    # Embeddings of another vocabulary have another size.
    own = nn.Parameter(base.new_empty(value.shape).copy_(value), requires_grad=False)
    if torch.equal(own, base):
        return []
    places = [(plain, name)]
    if tied:
        places = [
            (each, n) for each in model.modules() for n, p in each._parameters.items() if p is base
        ]
    return [ParameterSwap(where, holder, place, base, own) for holder, place in places]


class TorchAdapters:
    """The torch side of all adapters in one model, by name: PEFT's layers, and switches."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._switches: dict[str, Sequence[Switch]] = {}
        self._layers: list[Any] = []
        # PEFT's own factor of each layer that an adapter has LoRA on.
        self._trained: dict[str, list[tuple[Any, float]]] = {}

    def add(self, name: str, apply: Callable[[], Iterable[Switch]]) -> None:
        """Lets ``apply`` put an adapter into the model, under PEFT's name ``name``. Everything is
        off afterwards; what ``apply`` left when it raised is taken out again."""
        self.weigh({})
        self._switches[name] = []
        try:
            self._switches[name] = list(apply())
            self._find_layers()
        except BaseException:
            self._find_layers()
            self.remove(name)
            raise
        self.weigh({})

    def remove(self, name: str) -> None:
        """Takes an adapter out of the model. Everything is off afterwards."""
        self.weigh({})
        for layer, _ in self._trained.pop(name, []):
            layer.delete_adapter(name)
        for switch in self._switches.pop(name, []):
            switch.remove()
        getattr(self._model, "peft_config", {}).pop(name, None)

    def weigh(self, weights: Mapping[str, float]) -> None:
        """These adapters act from the next forward on, the others do not."""
        active = {name: weight for name, weight in weights.items() if weight}
        for layer in self._layers:
            layer._active_adapter = [name for name in layer.scaling if name in active]
        for name, weight in active.items():
            for layer, scaling in self._trained.get(name, []):
                layer.scaling[name] = scaling * weight
        # Switch off first: two adapters may replace the same parameter.
        for name in sorted(self._switches, key=active.__contains__):
            for switch in self._switches[name]:
                switch.weigh(active.get(name, 0.0))

    def replaced(self, name: str) -> str | None:
        """A module of the base whose numbers the adapter replaces, if it does."""
        swaps = (each for each in self._switches[name] if isinstance(each, ParameterSwap))
        return next((swap.where for swap in swaps), None)

    def row_reason(self, name: str) -> str | None:
        """Why PEFT computes the adapter's LoRA on some linear for all rows alike; None: it does
        not. The engine's linears, and PEFT's on a GPU, know each row's adapter; the engine has BF16
        ones, and LoRA up to a rank."""
        for layer, _ in self._trained.get(name, []):
            weight = layer.get_base_layer().weight
            if weight.device.type != "cpu":
                continue
            if weight.dtype != torch.bfloat16:
                return f"has LoRA on {str(weight.dtype).removeprefix('torch.')} linears"
            rank = len(layer.lora_A[name].weight) if name in layer.lora_A else 0
            if rank > _MOST_RANKS:
                return f"has LoRA of rank {rank}"
        return None

    @property
    def layers(self) -> Sequence[Any]:
        """PEFT's layers."""
        return self._layers

    def _find_layers(self) -> None:
        from peft.tuners.lora import LoraLayer

        self._layers = [each for each in self._model.modules() if isinstance(each, LoraLayer)]
        for name in self._switches:
            if name not in self._trained:
                found = [
                    (each, each.scaling[name]) for each in self._layers if name in each.scaling
                ]
                self._trained[name] = found
