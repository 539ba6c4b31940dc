"""The GPU's share of linear attention, on the CPU: Triton's kernels in its interpreter, against
transformers' own functions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.family_models import families, random_model
from helpers.interpreted import interpreted
from helpers.linear_attention import CASES, KIMI, RULE, Draw, copied, delta_rule, mamba, results
from transformers import DynamicCache

from ktrt.engine import Engine
from ktrt.layers.linear_attention.functions import Functions
from ktrt.layers.linear_attention.gpu_operators import GpuOperators
from ktrt.layers.linear_attention.gpu_step import DeltaRuleStep, has_step

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def interpreter() -> None:
    pytest.importorskip("triton")
    interpreted()


def function_of(folder: str, name: str) -> tuple[Any, Callable[..., Any]]:
    """Returns transformers' function and its stand-in with the GPU's operators."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} fell back to transformers")

    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    with_engine = Engine(num_threads=1)
    functions = Functions(with_engine)
    with_engine.close()
    functions.operators["cpu"] = GpuOperators()
    return getattr(module, name), functions.function(name, refused)


# The interpreter takes 10 ms for a program of the grid.
KERNELS: dict[str, tuple[str, str, Callable[[Draw], dict[str, Any]]]] = {
    "delta rule": ("qwen3_next", RULE.format("recurrent"),
                   lambda d: delta_rule(d, 2, 1, per_key=False, value_size=12)),
    "kimi": ("kimi_linear", KIMI.format("recurrent"),
             lambda d: delta_rule(d, 1, 3, per_key=True, value_size=12)),
    "mamba": ("jamba", "mamba_selective_scan", lambda d: mamba(d, 2, 3)),
    **{case: CASES[case] for case in (
        "mamba, step", "mamba 2, step", "conv, step", "conv, short state", "conv, linear")},
}  # fmt: skip


@pytest.mark.parametrize("case", KERNELS)
def test_a_kernel_equals_transformers(case: str) -> None:
    folder, name, make = KERNELS[case]
    arguments = make(Draw(torch.float32))
    reference, function = function_of(folder, name)
    expected = results(reference, copied(arguments))
    found = results(function, copied(arguments))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_a_layers_step_equals_transformers(model_type: str) -> None:
    family = next(each for each in families() if each.model_type == model_type)
    changes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    model = random_model(family, changes=changes).bfloat16()
    layer: Any = next(each for each in model.modules() if hasattr(each, "dt_bias"))
    assert has_step(layer)
    step = DeltaRuleStep(layer, layer.forward)
    prompt, token = torch.randn(2, 5, 112).bfloat16(), torch.randn(2, 1, 112).bfloat16()
    found = []
    with torch.no_grad():
        for forward, dtype in ((layer.float().forward, torch.float32), (step, torch.bfloat16)):
            layer.to(dtype)
            cache = DynamicCache(config=model.config)
            layer(prompt.to(dtype), cache=cache)
            outs = [forward(token.to(dtype), cache=cache).float() for _ in range(2)]
            state = cache.get_recurrent_state(layer.layer_idx)
            found.append([*outs, state, cache.get_conv_state(layer.layer_idx).float()])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 0.02 * one.abs().max()
