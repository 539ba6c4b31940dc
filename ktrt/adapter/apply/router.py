"""LoRA on a router's weight, which is a bare parameter and no Linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize


class RouterLora(nn.Module):
    """W → W + Σ weight · scaling · B · A over the adapters at work, computed in float32 and rounded
    once to W's dtype; W itself without any.

    By adapter: ``lora_A`` [rank, hidden_size], ``lora_B`` [num_experts, rank]. Acts wherever the
    router reads its weight, so that it changes which experts are chosen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.factors: dict[str, float] = {}

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.factors:
            return weight
        sum_ = weight.float()
        for name in self.lora_A:
            if name in self.factors:
                sum_ = sum_ + self.factors[name] * (self.lora_B[name] @ self.lora_A[name])
        return sum_.to(weight.dtype)


@dataclass
class RouterSwitch:
    """One adapter's part of a ``RouterLora``."""

    lora: RouterLora
    name: str
    scaling: float

    def weigh(self, weight: float) -> None:
        """Acts ``weight`` times; 0 is off."""
        self.lora.factors.pop(self.name, None)
        if weight:
            self.lora.factors[self.name] = self.scaling * weight

    def remove(self) -> None:
        """Frees the arrays."""
        self.weigh(0)
        del self.lora.lora_A[self.name], self.lora.lora_B[self.name]


def apply_router_lora(
    router: nn.Module, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, name: str
) -> RouterSwitch:
    """Puts LoRA on ``router.weight`` [num_experts, hidden_size]; it is off until it is weighed."""
    device = router.get_parameter("weight").device
    if not parametrize.is_parametrized(router, "weight"):
        parametrize.register_parametrization(router, "weight", RouterLora())
    lora = router.parametrizations["weight"][0]  # type: ignore[index]
    assert isinstance(lora, RouterLora)
    for arrays, value in ((lora.lora_A, lora_a), (lora.lora_B, lora_b)):
        arrays[name] = nn.Parameter(value.to(device).float(), requires_grad=False)
    return RouterSwitch(lora, name, scaling)
