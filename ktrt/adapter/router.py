"""LoRA on a router's weight, which is a bare parameter and no Linear."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize


class RouterLora(nn.Module):
    """W → W + scaling · B · A, computed in float32 and rounded once to W's dtype.

    ``lora_A`` [rank, hidden_size], ``lora_B`` [num_experts, rank]. Acts wherever the router reads
    its weight, so that it changes which experts are chosen.
    """

    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_a.float(), requires_grad=False)
        self.lora_B = nn.Parameter(lora_b.float(), requires_grad=False)
        self.scaling = scaling

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        delta = self.scaling * (self.lora_B @ self.lora_A)
        return (weight.float() + delta).to(weight.dtype)


def apply_router_lora(
    router: nn.Module, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
) -> None:
    """Puts LoRA on ``router.weight`` [num_experts, hidden_size]."""
    device = router.get_parameter("weight").device
    parametrize.register_parametrization(
        router, "weight", RouterLora(lora_a.to(device), lora_b.to(device), scaling)
    )
