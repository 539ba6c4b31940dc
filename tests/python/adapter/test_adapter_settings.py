"""Compares rank, alpha, scaling and targets with PEFT's own for the same configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ktrt.adapter.files.settings import LoraSettings
from ktrt.adapter.tensors import AdapterFiles
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
    # The first matching key counts; a key matches whole words of the name, up to its end.
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
def test_targets_ranks_and_scalings_equal_peft(config: dict[str, Any]) -> None:
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


def test_parameters_are_matched_by_suffix() -> None:
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
        ({"some_future_option": {"x": 1}}, "some_future_option is {'x': 1}"),
        ({"r": 0}, "r is 0, expected a positive number"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 2.5}, "whole number"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"layers_pattern": "layers"}, "PEFT refuses this configuration"),
    ],
)
def test_options_that_cannot_be_computed_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        settings(**config)


def test_every_key_that_peft_writes_is_known(tmp_path: Path) -> None:
    LoraConfig(target_modules=["q_proj"], target_parameters=["x"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    found = settings(**config | {"peft_type": "LORA"})
    assert found.rank == 8
    assert found.packs_as_peft


@pytest.mark.parametrize("value", [None, False, {}, [], "", 0])
def test_unknown_keys_without_a_value_pass(value: Any) -> None:
    """A new PEFT writes new keys into every adapter."""
    assert settings(some_future_option=value).rank == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_rslora": "false"}, "use_rslora: found 'false', expected a valid boolean"),
        ({"use_dora": "true"}, "use_dora: found 'true'"),
        ({"lora_bias": 1}, "lora_bias: found 1"),
        ({"fan_in_fan_out": "false"}, "fan_in_fan_out: found 'false'"),
        ({"bias": "some"}, "bias: found 'some'"),
        ({"r": 10**400}, "r is 1000"),
        ({"lora_alpha": 1e300}, "too large"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "no regular expression"),
        ({"target_modules": "*_proj"}, "target_modules has .* no regular expression"),
        ({"target_modules": [["q_proj"]]}, r"target_modules"),
        ({"layers_to_transform": "0-3"}, "layers_to_transform: found '0-3'"),
        ({"lora_B_layout": "columns"}, "lora_B_layout: found 'columns'"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"init_lora_weights": "lora_ga"}, "changed the base"),
    ],
)
def test_values_of_the_wrong_kind_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        settings(**config)


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "orthogonal"},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"qalora_group_size": 32},
        {"fan_in_fan_out": True},
        {"lora_B_layout": "rank_major"},
    ],
)
def test_values_that_change_no_number_pass(config: dict[str, Any]) -> None:
    assert settings(**config).rank == 8
