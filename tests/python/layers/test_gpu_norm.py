"""RMSNorm as a GPU computes it, interpreted or (KTRT_TEST_GPU=1) there, against transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.expert_layers import DEVICES
from helpers.interpreted import interpreted
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ktrt.experts.handoff import Deferred
from ktrt.layers.gpu.norm import accelerate_norms_on
from ktrt.utils.patches import Patches

SIZE = 160


class HalvedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halved: torch.Tensor = super().forward(x) / 2
        return halved


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([
            LlamaRMSNorm(SIZE), GptOssRMSNorm(SIZE), Gemma3RMSNorm(SIZE), Gemma4RMSNorm(SIZE),
            Gemma4RMSNorm(SIZE, with_scale=False), HalvedRMSNorm(SIZE), nn.LayerNorm(SIZE),
        ])  # fmt: skip
        for parameter in self.parameters():
            nn.init.normal_(parameter)


@pytest.fixture(params=DEVICES)
def model(request: pytest.FixtureRequest) -> Norms:
    if request.param == "cpu":
        interpreted()
    torch.manual_seed(0)
    # The interpreter rounds no float32 to bfloat16, it cuts.
    dtype = torch.float16 if request.param == "cpu" else torch.bfloat16
    return Norms().to(request.param, dtype).requires_grad_(False).eval()


def place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = next(model.parameters())
    return weight.device, weight.dtype


def test_each_convention(model: Norms) -> None:
    """One kernel, within a unit of the layer's own rounding, and as close to float32."""
    (device, dtype), patches = place_of(model), Patches()
    assert accelerate_norms_on(model, device, patches) == 5
    x = (3 * torch.randn(5, 2, 2 * SIZE)).to(device, dtype)[..., 7 : 7 + SIZE]
    for norm in list(model.norms)[:5]:
        plain = type(norm).forward(norm, x)
        exact = type(norm).forward(copy.deepcopy(norm).float(), x.float())
        assert "forward" in vars(norm)
        for each in (x, x.transpose(0, 1)):
            found = norm(each).reshape(plain.shape) if each is x else norm(each).transpose(0, 1)
            assert found.dtype == x.dtype
            error, own = ((y.float() - exact).norm() / exact.norm() for y in (found, plain))
            assert error <= 1.01 * own
            assert ((found.float() - plain.float()).abs() <= plain.float().abs() / 127).all()
    patches.undo()
    assert not any("forward" in vars(norm) for norm in model.norms)


def test_what_the_kernel_does_not_take(model: Norms) -> None:
    device, _ = place_of(model)
    accelerate_norms_on(model, device, patches := Patches())
    norm: Any = model.norms[0]
    x = torch.randn(3, SIZE, device=device)
    assert torch.equal(norm(x), type(norm).forward(norm, x)), "other rows than weights"
    rows = x.to(place_of(model)[1])
    assert norm(rows.clone().requires_grad_()).requires_grad
    assert norm(rows[:0]).shape == (0, SIZE)
    assert copy.deepcopy(norm).forward.__func__ is LlamaRMSNorm.forward
    patches.undo()


def test_a_result_that_is_under_way_is_awaited(model: Norms) -> None:
    (device, dtype), awaited = place_of(model), list[int]()
    accelerate_norms_on(model, device, patches := Patches())
    x = torch.randn(3, SIZE, device=device).to(dtype)
    found = model.norms[3](Deferred(x, lambda: awaited.append(1)))
    assert torch.equal(found, model.norms[3](x))
    assert awaited
    patches.undo()
