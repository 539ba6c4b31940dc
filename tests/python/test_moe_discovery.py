"""Experts are found by what transformers' interface sets on them; other forms are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ktrt.errors import CheckpointError
from ktrt.moe import ExpertsSpec, find_experts

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


def test_dense_model_has_none() -> None:
    assert find_experts(on_meta("llama", num_hidden_layers=1)) == []


@pytest.mark.parametrize(
    ("model_type", "changes", "reasons"),
    [
        ("gpt_oss", {"num_hidden_layers": 1}, ["has_bias", "is_transposed", "interleaved"]),
        ("nemotron_h", {"layers_block_type": ["moe"]}, ["has_gate is false"]),
        ("deepseek_v4", {"num_hidden_layers": 1}, ["_apply_gate"]),
        ("qwen3_moe", {**SMALL, "hidden_act": "gelu"}, ["activation is GELU", "not SiLU"]),
    ],
)
def test_other_forms_are_refused_with_the_reason(
    model_type: str, changes: dict[str, Any], reasons: list[str]
) -> None:
    model = on_meta(model_type, **changes)
    with pytest.raises(CheckpointError) as error:
        find_experts(model)
    for reason in reasons:
        assert reason in str(error.value)


def test_post_expert_norm_and_further_parameters_are_refused() -> None:
    model = on_meta("qwen3_moe", **SMALL)
    (first, second) = (model.get_submodule(f"model.layers.{i}.mlp.experts") for i in range(2))
    second.register_parameter("norm", torch.nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(CheckpointError, match=r"layers\.1.*further parameters \['norm'\]"):
        find_experts(model)
    first.has_post_expert_norm = True  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"layers\.0.*a norm follows each expert"):
        find_experts(model)


def test_top_k_falls_back_to_the_number_of_experts() -> None:
    model = on_meta("qwen3_moe", **SMALL, num_experts=8)
    for layer in range(2):
        del model.get_submodule(f"model.layers.{layer}.mlp.gate").top_k
    model.config.num_experts_per_tok = 9  # type: ignore[union-attr]
    assert [spec.top_k for spec in find_experts(model)] == [8, 8]
