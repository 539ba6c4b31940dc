"""Rank, alpha, scaling and targets, against what PEFT itself makes of the same configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ktrt.adapter.read import AdapterFiles
from ktrt.adapter.settings import LoraSettings
from ktrt.errors import AdapterError

NAMES = [
    f"model.layers.{n}.{m}"
    for n in range(11)
    for m in ("attn.q_proj", "attn.o_proj", "mlp.up_proj")
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({n: nn.Linear(64, 64, bias=False) for n in ("q_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(64, 64, bias=False)})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(11))})


def settings(**config: Any) -> LoraSettings:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]} | config
    return LoraSettings(AdapterFiles(Path("adapter"), Path("adapter/file"), config, []))


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["q_proj"], "use_rslora": True},
    {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 4, r"layers\.1": 2}},
    # The first key that matches counts; a key matches whole parts of the name, to its end.
    {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {r"layers\.1\.attn\.q_proj": 2, r"(1|2)\.attn\.\w+": 6, "_proj": 3},
        "alpha_pattern": {"o_proj": 7, ".*o_proj": 9, r"layers\.10\.mlp.*": 1},
        "use_rslora": True,
    },
    {"target_modules": r".*\.(3|4)\.attn\.(q|o)_proj", "alpha_pattern": {"q_proj": 64}},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 10]},
    {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r"layers\.\d\..*"},
    {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["1.attn.o_proj"]},
    {"target_modules": ["layers.1.attn.q_proj", "0.mlp.up_proj"]},
    {"target_modules": "all-linear"},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_targets_ranks_and_scalings_are_those_of_peft(config: dict[str, Any]) -> None:
    ours = settings(**config)
    model = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, **config), Model())
    peft = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert {name for name in NAMES if ours.targets_module(name)} == set(peft)
    assert peft
    for name, layer in peft.items():
        scale = ours.scale(name)
        assert scale.rank == layer.r["default"]
        assert scale.alpha == layer.lora_alpha["default"]
        assert math.isclose(scale.scaling, layer.scaling["default"], rel_tol=1e-12)


def test_parameters_are_matched_by_their_last_parts() -> None:
    ours = settings(target_modules=None, target_parameters=["mlp.experts.down_proj", "gate.weight"])
    assert ours.targets_parameter("model.layers.3.mlp.experts.down_proj")
    assert ours.targets_parameter("model.layers.3.mlp.gate.weight")
    assert not ours.targets_parameter("model.layers.3.mlp.experts.gate_up_proj")
    assert not ours.targets_parameter("model.layers.3.mlp.delegate.weight")
    assert not ours.targets_module("model.layers.3.self_attn.q_proj")


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (4, None, r"lora_rank is 4 .*adapter_config\.json says r 8"),
        (8, 32.0, r"lora_alpha is 32 .*says lora_alpha 16"),
    ],
)
def test_yaml_that_contradicts_the_adapter(
    rank: int | None, alpha: float | None, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        settings().check_against_yaml(rank, alpha)


def test_yaml_that_repeats_the_adapter_is_fine() -> None:
    settings().check_against_yaml(8, 16.0)
    settings().check_against_yaml(None, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16.*changed the base"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"some_future_option": {"x": 1}}, "some_future_option is {'x': 1}"),
        ({"r": 0}, "r is 0, expected a positive number"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 2.5}, "whole number"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"layers_pattern": "layers"}, "PEFT refuses this configuration"),
    ],
)
def test_what_cannot_be_computed_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        settings(**config)


def test_every_key_that_peft_writes_is_known() -> None:
    config = LoraConfig(target_modules=["q_proj"]).to_dict()
    assert settings(**{k: v for k, v in config.items() if k != "peft_type"}).rank == 8
