"""ktrt._core from Python: experts with biases, other activations, or without a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from ktrt import _core

SIZES: dict[str, Any] = {
    "num_experts": 3, "top_k": 2, "hidden_size": 70, "intermediate_size": 50,
    "weight_format": "bf16",
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> _core.Engine:
    return _core.Engine(num_threads=1, max_qlen=16)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values that bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) / 8).to(torch.bfloat16).float()


def run(layer: _core.MoeLayer, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    layer.forward(x, torch.tensor([[1, 2]] * len(x)), torch.tensor([[0.5, 0.25]] * len(x)), out)
    return out


def test_biases_and_no_gate(engine: _core.Engine) -> None:
    layer = _core.MoeLayer(engine, **SIZES, has_gate=False, activation="relu2")
    up, down = random(3, 50, 70), random(3, 70, 50, seed=1)
    for expert in range(3):
        layer.load_expert(expert, None, up[expert], down[expert])
    x, up_bias, down_bias = random(5, 70), random(3, 50), random(3, 70)
    expected = torch.zeros(5, 70)
    without = torch.zeros(5, 70)
    for expert, weight in ((1, 0.5), (2, 0.25)):
        act = functional.relu(functional.linear(x, up[expert])).square()
        without += weight * functional.linear(act.to(torch.bfloat16).float(), down[expert])
        act = functional.relu(functional.linear(x, up[expert], up_bias[expert])).square()
        act = act.to(torch.bfloat16).float()
        expected += weight * functional.linear(act, down[expert], down_bias[expert])
    assert torch.allclose(run(layer, x), without, rtol=1e-2, atol=1e-3)
    layer.set_biases(up=up_bias, down=down_bias)
    assert torch.allclose(run(layer, x), expected, rtol=1e-2, atol=1e-3)
    # Absent ones are dropped.
    layer.set_biases()
    assert torch.allclose(run(layer, x), without, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"activation": "mish"}, "activation is 'mish', expected one of 'silu', 'gelu', "),
        ({"gate_limit": 0.0}, "gate_limit 0.*expected limits above 0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"activation": "softcap_silu"}, "the softcaps of the activation are infinite"),
    ],
)
def test_wrong_activations(engine: _core.Engine, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _core.MoeLayer(engine, **SIZES, **arguments)


def test_wrong_arrays(engine: _core.Engine) -> None:
    layer = _core.MoeLayer(engine, **SIZES)
    with pytest.raises(ValueError, match="gate is missing, but the experts have one"):
        layer.load_expert(0, None, random(50, 70), random(70, 50))
    with pytest.raises(ValueError, match=r"up has shape \[3, 49\], expected \[3, 50\]"):
        layer.set_biases(up=random(3, 49))
    with pytest.raises(ValueError, match="down is bfloat16, expected float32"):
        layer.set_biases(down=random(3, 70).to(torch.bfloat16))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        layer.set_biases(down=torch.full((3, 70), float("inf")))
    layer = _core.MoeLayer(engine, **SIZES, has_gate=False)
    with pytest.raises(ValueError, match="gate is given, but the experts have no gate"):
        layer.set_biases(gate=random(3, 50))
    with pytest.raises(ValueError, match="gate is given, but the experts have none"):
        layer.load_expert(0, random(50, 70), random(50, 70), random(70, 50))
