"""Experts are found by what transformers' interface sets on them; other forms are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, __version__

from ktrt import _core
from ktrt.engine.activation import Activation
from ktrt.errors import CheckpointError
from ktrt.experts import ExpertsSpec, find_experts

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2}


def on_meta(model_type: str, **changes: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **changes)
        )
    return model


@pytest.mark.parametrize(
    ("model_type", "changes", "class_name", "path", "layers"),
    [
        (
            "deepseek_v2",
            {"n_routed_experts": 8, "moe_intermediate_size": 96, "first_k_dense_replace": 1},
            "DeepseekV2Experts",
            "model.layers.{}.mlp.experts",
            [1],
        ),
        (
            "qwen3_moe",
            {"num_experts": 8, "moe_intermediate_size": 96, "mlp_only_layers": [1]},
            "Qwen3MoeExperts",
            "model.layers.{}.mlp.experts",
            [0],
        ),
        (
            "mixtral",
            {"num_local_experts": 8, "intermediate_size": 96},
            "MixtralExperts",
            "model.layers.{}.mlp.experts",
            [0, 1],
        ),
    ],
)
def test_plain_experts_are_described(
    model_type: str, changes: dict[str, Any], class_name: str, path: str, layers: list[int]
) -> None:
    model = on_meta(model_type, **SMALL, **changes, num_experts_per_tok=3)
    assert find_experts(model) == [
        ExpertsSpec(path.format(layer), layer, class_name, 8, 64, 96, 3) for layer in layers
    ]


def test_weights_are_counted_without_padding() -> None:
    spec = ExpertsSpec(
        "experts", 0, "X", num_experts=4, hidden_size=6, intermediate_size=5, top_k=2
    )
    assert spec.num_weights == 4 * 3 * 6 * 5
    assert replace(spec, has_bias=True).num_weights == 4 * (3 * 6 * 5 + 2 * 5 + 6)
    assert replace(spec, has_gate=False, has_bias=True).num_weights == 4 * (2 * 6 * 5 + 5 + 6)


def test_dense_model_has_none() -> None:
    assert find_experts(on_meta("llama", num_hidden_layers=1)) == []


@pytest.mark.parametrize(
    ("model_type", "changes", "form"),
    [
        (
            "gpt_oss",
            {"num_hidden_layers": 1},
            {
                "has_bias": True,
                "is_transposed": True,
                "is_interleaved": True,
                "activation": Activation("silu", 1.702, 7.0, 7.0, 1.0),
            },
        ),
        (
            "nemotron_h",
            {"layers_block_type": ["moe"]},
            {"has_gate": False, "activation": Activation("relu2")},
        ),
        (
            "deepseek_v4",
            {"num_hidden_layers": 1, "swiglu_limit": 9.5},
            {"activation": Activation("silu", 1.0, 9.5, 9.5)},
        ),
        (
            "inkling2_text",
            {"num_hidden_layers": 1, "mlp_gate_softcap": 3.0},
            {"activation": Activation("softcap_silu", 1.0, 3.0, 25.0)},
        ),
        (
            "gemma4_text",
            {
                "num_hidden_layers": 1,
                "enable_moe_block": True,
                "num_experts": 16,
                "top_k_experts": 4,
                "moe_intermediate_size": 32,
            },
            {"top_k": 4, "num_experts": 16, "activation": Activation("gelu_tanh")},
        ),
        (
            "aria_text",
            {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4},
            {"is_transposed": True, "hidden_size": 64, "intermediate_size": 4096},
        ),
    ],
)
def test_other_forms_are_described(
    model_type: str, changes: dict[str, Any], form: dict[str, Any]
) -> None:
    specs = find_experts(on_meta(model_type, **changes)) if model_type in CONFIG_MAPPING else []
    if not specs:
        pytest.skip(f"transformers {__version__} has no {model_type} with the experts interface")
    spec = specs[0]
    plain = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_interleaved": False}
    for name, value in ({**plain, "activation": Activation()} | form).items():
        assert getattr(spec, name) == value, name


@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [
        ("silu", Activation()),
        ("gelu", Activation("gelu")),
        ("gelu_python", Activation("gelu")),
        ("gelu_new", Activation("gelu_tanh")),
        ("gelu_fast", Activation("gelu_tanh")),
        ("gelu_pytorch_tanh", Activation("gelu_tanh")),
        ("quick_gelu", Activation("silu", 1.702)),
        ("relu", Activation("relu")),
        ("relu2", Activation("relu2")),
    ],
)
def test_activations_are_recognised_by_what_they_compute(
    hidden_act: str, activation: Activation
) -> None:
    assert find_experts(on_meta("qwen3_moe", **SMALL, hidden_act=hidden_act))[0].activation == (
        activation
    )


@pytest.mark.parametrize(
    ("hidden_act", "name"),
    [("relu6", "ReLU6"), ("mish", "Mish"), ("tanh", "Tanh"), ("linear", "Linear"),
     ("gelu_10", "ClippedGELU"), ("leaky_relu", "LeakyReLU")],
)  # fmt: skip
def test_other_activations_are_refused_by_name(hidden_act: str, name: str) -> None:
    model = on_meta("qwen3_moe", **SMALL, hidden_act=hidden_act)
    with pytest.raises(CheckpointError, match=rf"layers\.0.*its activation \({name}.*is none of"):
        find_experts(model)


@pytest.mark.parametrize(
    "gate_up",
    [
        # Differs from deepseek_v4's where gate is above the limit, or up below minus it, only.
        lambda g, u: functional.silu(g) * u.clamp(-10, 10),
        lambda g, u: functional.silu(g.clamp(max=10)) * u.clamp(max=10),
        lambda g, u: functional.silu(g).clamp(max=10) * u.clamp(-10, 10),
        lambda g, u: functional.silu(g.clamp(max=10)) * (u.clamp(-10, 10) + 0.01),
        lambda g, u: (functional.silu(g) * u).unsqueeze(0).expand(2, -1, -1),
    ],
)
def test_own_gates_of_another_kind_are_refused(
    gate_up: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_meta("deepseek_v4", num_hidden_layers=1)
    experts = type(model.get_submodule("model.layers.0.mlp.experts"))
    assert find_experts(model)
    monkeypatch.setattr(experts, "_apply_gate", lambda _, both: gate_up(*both.chunk(2, dim=-1)))
    with pytest.raises(CheckpointError, match=r"\(DeepseekV4Experts\._apply_gate\) is none of"):
        find_experts(model)


def test_the_table_of_activations_is_what_the_engine_computes() -> None:
    engine = _core.Engine(num_threads=1, max_qlen=64)
    for activation in (
        Activation("gelu"), Activation("gelu_tanh"), Activation("relu"), Activation("relu2"),
        Activation("silu", 1.702, 0.5, 0.4, 1.0), Activation("softcap_silu", 1.0, 0.7, 0.9),
    ):  # fmt: skip
        layer = _core.MoeLayer(
            engine, num_experts=1, top_k=1, hidden_size=64, intermediate_size=64,
            weight_format="bf16", **activation.arguments(),
        )  # fmt: skip
        x = torch.linspace(-3, 3, 64 * 8).view(8, 64).to(torch.bfloat16).float()
        eye = torch.eye(64)
        layer.load_expert(0, eye, eye, eye)
        out = torch.empty_like(x)
        layer.forward(x, torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1), out)
        expected = activation(x, x).to(torch.bfloat16).float()
        assert torch.allclose(out, expected, rtol=1e-2, atol=1e-6), activation


def test_parameters_that_do_not_fit_are_refused() -> None:
    model = on_meta("qwen3_moe", **SMALL)
    (first, second) = (model.get_submodule(f"model.layers.{i}.mlp.experts") for i in range(2))
    second.register_parameter("norm", torch.nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(CheckpointError, match=r"layers\.1.*further parameters \['norm'\]"):
        find_experts(model)
    first.has_bias = True  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"layers\.0.*gate_up_proj_bias has shape \[\]"):
        find_experts(model)
    first.has_bias = False  # type: ignore[assignment]
    first.is_transposed = True  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"layers\.0.*gate_up_proj has shape"):
        find_experts(model)


def test_top_k_falls_back_to_the_number_of_experts() -> None:
    model = on_meta("qwen3_moe", **SMALL, num_experts=8)
    for layer in range(2):
        del model.get_submodule(f"model.layers.{layer}.mlp.gate").top_k
    model.config.num_experts_per_tok = 9  # type: ignore[union-attr]
    assert [spec.top_k for spec in find_experts(model)] == [8, 8]
