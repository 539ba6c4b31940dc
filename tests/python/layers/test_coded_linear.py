"""Layers whose weights stay as shipped, with PEFT's adapters fused as on a GPU, here on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close

from ktrt.checkpoint.codes import Codes
from ktrt.engine.active_set import ActiveSet
from ktrt.engine.rank_masks import RankMasks
from ktrt.engine.step_rows import BASE, RunningStep, StepRows
from ktrt.layers.coded import CodedLinear
from ktrt.layers.cuda_linear import FusedLora

IN, OUT, ROWS = 256, 96, 5
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def make_codes(weight_format: str) -> tuple[Codes, torch.Tensor]:
    """Returns random codes [OUT, IN], and what they stand for by the formats' descriptions."""
    torch.manual_seed(1)
    if weight_format == "fp8":
        codes = torch.randn(OUT, IN).to(torch.float8_e4m3fn)
        scales = torch.rand(OUT // 32, IN // 128)
        weight = codes.float() * scales.repeat_interleave(32, 0).repeat_interleave(128, 1)
        return Codes("fp8", codes.view(torch.uint8), scales), weight
    nibbles = torch.randint(0, 16, (OUT, IN), dtype=torch.uint8)
    pairs = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    if weight_format == "mxfp4":
        exponents = torch.randint(120, 126, (OUT, IN // 32), dtype=torch.uint8)
        values = E2M1[(nibbles & 7).long()] * torch.where(nibbles < 8, 1, -1)
        weight = values * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
        return Codes("mxfp4", pairs, exponents), weight
    bf16 = (torch.rand(OUT, IN // 64) / 8).bfloat16()
    values = torch.where(nibbles < 8, nibbles.int(), nibbles.int() - 16).float()
    return Codes("int4_g64", pairs, bf16), values * bf16.float().repeat_interleave(64, 1)


def make_model(codes: Codes, ranks: dict[str, int]) -> Any:
    linear = CodedLinear(nn.Linear(IN, OUT, bias=False), lambda: codes, torch.float32)
    # PEFT looks for the device of some parameter.
    model: Any = nn.ModuleDict({"proj": linear, "other": nn.Linear(1, 1)})
    for name, rank in ranks.items():
        lora = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["proj"])
        model = inject_adapter_in_model(lora, model, name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model["proj"].set_adapter(next(iter(ranks)))
    return model.eval().requires_grad_(False)


def tuned(layer: Any, weight: torch.Tensor, name: str) -> torch.Tensor:
    a, b = (part[name].weight for part in (layer.lora_A, layer.lora_B))
    merged: torch.Tensor = weight + layer.scaling[name] * b @ a
    return merged


@pytest.mark.parametrize("weight_format", ["fp8", "int4_g64", "mxfp4"])
def test_active_adapters(weight_format: str) -> None:
    codes, weight = make_codes(weight_format)
    model = make_model(codes, {"one": 6, "two": 7})
    layer = model["proj"]
    assert torch.equal(layer.base_layer.weight, weight)
    fused = FusedLora(model)
    x = torch.randn(ROWS, IN)
    for name in ("one", "two", "one"):
        layer.set_adapter(name)
        fused.refresh()
        assert_close(layer(x), x @ tuned(layer, weight, name).T, rtol=1e-5, atol=1e-4)
        assert_close(layer(x[:1]), x[:1] @ tuned(layer, weight, name).T, rtol=1e-5, atol=1e-4)


def test_rows_with_adapters_of_their_own() -> None:
    codes, weight = make_codes("fp8")
    model = make_model(codes, {"default": 6, "adapter1": 8})
    running = RunningStep()
    FusedLora(model, ActiveSet(), masks=RankMasks(running))
    layer, x = model["proj"], torch.randn(ROWS, IN)
    rows = StepRows(ROWS, 0, x.device)
    rows.adapters[:] = torch.tensor([0, 1, BASE, 1, 0], dtype=torch.int32)
    with running.running(rows):
        found = layer(x)
    names = ["default", "adapter1", "", "adapter1", "default"]
    for row, name in enumerate(names):
        wanted = tuned(layer, weight, name) if name else weight
        assert_close(found[row], wanted @ x[row], rtol=1e-5, atol=1e-4)
    assert torch.equal(found[2], layer.base_layer(x)[2])
