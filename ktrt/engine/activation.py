"""The function between the outputs of gate and up and the input of down."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from ktrt.engine import MoeLayer

Kind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "softcap_silu"]


@dataclass(frozen=True)
class Activation:
    """The function of the outputs of gate and up (of up alone without gate) in
    ``ktrt._core.MoeLayer``; the fields are its arguments and are documented there."""

    activation: Kind = "silu"
    alpha: float = 1.0
    gate_limit: float = math.inf
    up_limit: float = math.inf
    up_offset: float = 0.0

    @classmethod
    def of(cls, layer: MoeLayer) -> Activation:
        """The activation of an engine's layer."""
        return cls(**layer.activation)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``MoeLayer``."""
        return asdict(self)

    def __call__(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """The same by torch, elementwise, without operations that change nothing."""
        if gate is None:
            return self._function(up)
        if self.activation == "softcap_silu":
            up = self.up_limit * torch.tanh(up / self.up_limit)
        else:
            gate = gate if math.isinf(self.gate_limit) else gate.clamp(max=self.gate_limit)
            up = up if math.isinf(self.up_limit) else up.clamp(-self.up_limit, self.up_limit)
        return self._function(gate) * (up + self.up_offset if self.up_offset else up)

    def _function(self, x: torch.Tensor) -> torch.Tensor:
        match self.activation:
            case "silu":
                return functional.silu(x) if self.alpha == 1 else x * torch.sigmoid(self.alpha * x)
            case "gelu":
                return functional.gelu(x)
            case "gelu_tanh":
                return functional.gelu(x, approximate="tanh")
            case "relu":
                return functional.relu(x)
            case "relu2":
                return functional.relu(x).square()
            case "softcap_silu":
                return self.gate_limit * torch.tanh(x / self.gate_limit) * torch.sigmoid(x)
