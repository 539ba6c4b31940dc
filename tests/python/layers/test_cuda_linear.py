"""Fused LoRA Linears against PEFT's own and a float32 merge."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close

from ktrt.layers.cuda_linear import FusedLora

SIZE_IN, SIZE_OUT = 96, 72


def make_model(*, rank: int = 6, bias: bool = False, dtype: torch.dtype, **config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"proj": nn.Linear(SIZE_IN, SIZE_OUT, bias=bias).to(dtype)})
    options = {"r": rank, "lora_alpha": 3 * rank, "target_modules": ["proj"], **config}
    for index, name in enumerate(("one", "two")):
        lora = LoraConfig(**{**options, "r": rank + index})
        model = inject_adapter_in_model(lora, model, name)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model["proj"].set_adapter("one")
    return model.eval().requires_grad_(False)


def merged(layer: Any, *names: str) -> torch.Tensor:
    weight: torch.Tensor = layer.base_layer.weight.float()
    for name in names:
        a, b = (part[name].weight.float() for part in (layer.lora_A, layer.lora_B))
        weight = weight + layer.scaling[name] * b @ a
    return weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 5), (1, 4)])
def test_equals_the_float32_merge(rows: tuple[int, ...], bias: bool) -> None:
    model = make_model(dtype=torch.float32, bias=bias)
    layer = model["proj"]
    x = torch.randn(*rows, SIZE_IN)
    expected = nn.functional.linear(x, merged(layer, "one"), layer.base_layer.bias)
    FusedLora(model)
    found = layer(x)
    assert found.is_contiguous()
    assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_rounds_no_worse_than_peft_in_bfloat16() -> None:
    model = make_model(dtype=torch.bfloat16)
    layer = model["proj"]
    x = torch.randn(40, SIZE_IN).bfloat16()
    expected = x.float() @ merged(layer, "one").T
    before = (layer(x).float() - expected).norm()
    FusedLora(model)
    for found in (layer(x), torch.cat([layer(row[None]) for row in x])):
        assert (found.float() - expected).norm() <= 1.02 * before


def test_follows_peft() -> None:
    model = make_model(dtype=torch.float32)
    layer, x = model["proj"], torch.randn(1, SIZE_IN)
    fused = FusedLora(model)

    def check(*names: str) -> None:
        fused.refresh()
        assert_close(layer(x), x @ merged(layer, *names).T, rtol=1e-5, atol=1e-4)

    check("one")
    layer.set_adapter("two")
    check("two")
    layer.set_adapter(["one", "two"])
    check("one", "two")
    layer.scaling["two"] *= 0.25
    check("one", "two")
    layer.enable_adapters(False)
    check()
    layer.enable_adapters(True)
    layer.set_adapter("one")
    check("one")


def test_the_weights_stay_peft_s_parameters() -> None:
    model = make_model(dtype=torch.float32)
    before = {name: value.clone() for name, value in model.named_parameters()}
    FusedLora(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_follows_weights_that_moved() -> None:
    model = make_model(dtype=torch.bfloat16)
    layer, x = model["proj"], torch.randn(2, SIZE_IN)
    fused = FusedLora(model)
    model.float()
    fused.refresh()
    assert_close(layer(x), x @ merged(layer, "one").T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_leaves_other_forms_to_peft(config: dict[str, Any]) -> None:
    model = make_model(dtype=torch.float32, **config)
    x = torch.randn(2, SIZE_IN)
    expected = model["proj"](x)
    FusedLora(model)
    assert torch.equal(model["proj"](x), expected)
