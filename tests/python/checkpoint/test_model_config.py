"""config.json, index and generation settings of a model folder: any damage is one
``CheckpointError``, raised fast and in little memory. Also: the class that a config names."""

from __future__ import annotations

import json
import logging
import random
import resource
import time
from typing import TYPE_CHECKING, Any

import pytest
from helpers.config_damage import damaged
from helpers.real_models import NAMES, make, read_meta, shrunk
from helpers.tiny_models import save_model

from ktrt.checkpoint.config import read_model_config
from ktrt.checkpoint.folder import Checkpoint
from ktrt.checkpoint.skeleton import build_skeleton
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import CheckpointError
from ktrt.loading.model import load_model
from ktrt.loading.plan import open_base

if TYPE_CHECKING:
    from pathlib import Path

# Generous, since other processes may be running; each one takes 0.05 s alone.
_SECONDS, _KILOBYTES = 10, 1 << 20


def write(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_damaged_configs(name: str, tmp_path: Path) -> None:
    """Tries 24 damaged configs of each model, and 3 with two damages."""
    config, rng = shrunk(read_meta(name)), random.Random(name)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = []
    for number in range(27):
        what, bad = damaged(config, rng)
        if number >= 24:
            again, bad = damaged(bad, rng)
            what = f"{what}; {again}"
        start = time.monotonic()
        try:
            build_skeleton(write(tmp_path, bad), trust_remote_code=False)
            outcomes.append("builds")
        except CheckpointError as error:
            outcomes.append("refused" if "config.json" in str(error) else f"{what}: {error}")
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        assert time.monotonic() - start < _SECONDS, what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < _KILOBYTES
    assert set(outcomes) == {"builds", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, pytest.param(80, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["deepseek-v3-arch-other-depth", "moonlight-16b-a3b-instruct"])
def test_damaged_configs_load_or_are_refused(name: str, tmp_path: Path, count: int) -> None:
    model, rng = make(name), random.Random(name)
    folder = model.write(tmp_path / "model")
    for _ in range(count):
        what, bad = damaged(model.config, rng)
        write(folder, bad)
        try:
            load_model(ModelArgs(folder), AdapterArgs(None), ExpertArgs(kt_num_threads=1)).close()
        except CheckpointError:
            continue
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000"),
        ({"num_experts": 10**9}, "num_experts: found 1000000000"),
        ({"num_labels": 10**9}, "num_labels: found 1000000000"),
        ({"mlp_only_layers": [10**9]}, "mlp_only_layers: found 1000000000"),
        ({"moe_intermediate_size": 2**40}, "moe_intermediate_size: found 1099511627776"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers.*expected int.*four"),
        ({"rope_scaling": 5}, "config.json: transformers cannot build"),
        ({"model_type": 7}, "config.json: model_type: found 7, expected a valid string"),
        ({"model_type": None, "architectures": None}, "names no model_type"),
        ({"architectures": "Qwen3MoeForCausalLM"}, "architectures: found 'Qwen3MoeForCausalLM'"),
        ({"quantization_config": 3}, "quantization_config: found 3, expected an object"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weight_block_size: found",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
            "weight_block_size.*expected greater than 0|weight_block_size.*found 0",
        ),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights: found"),
    ],
)
def test_the_key_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = save_model(tmp_path / "model", "qwen3_moe", 96)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    write(folder, config | changes)
    with pytest.raises(CheckpointError, match=words):
        open_base(ModelArgs(folder))


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", "", "[" * 100_000, '{"a": ' * 900 + "1" + "}" * 900]
)
def test_no_config_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build_skeleton(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    "index",
    [
        [], {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}, {},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/model.safetensors"}}, {"weight_map": {"a": "config.json"}},
        {"weight_map": {"a": None}}, {"weight_map": {"a": "b.safetensors"}},
    ],
)  # fmt: skip
def test_damaged_index(tmp_path: Path, index: Any) -> None:
    folder = save_model(tmp_path / "model", "qwen3_moe", 96)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json|b\.safetensors is missing"):
        Checkpoint(folder)
    with pytest.raises(CheckpointError):
        open_base(ModelArgs(folder))


@pytest.mark.parametrize("settings", [[], {"temperature": {}}, {"eos_token_id": "x"}])
def test_damaged_generation_settings(tmp_path: Path, settings: Any) -> None:
    """They are refused by name if transformers refuses them; never another exception."""
    folder = save_model(tmp_path / "model", "qwen3_moe", 96)
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    try:
        load_model(ModelArgs(folder), AdapterArgs(None), ExpertArgs(kt_num_threads=1)).close()
    except CheckpointError as error:
        assert "generation_config.json" in str(error)  # noqa: PT017


def small(name: str, tmp_path: Path, **changes: Any) -> Path:
    return write(tmp_path, shrunk(read_meta(name)) | changes)


def test_the_architecture_decides_where_the_type_is_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = small("kimi-k2-fp8", tmp_path)
    with caplog.at_level(logging.INFO):
        for trust in (False, True):
            built = build_skeleton(folder, trust_remote_code=trust)
            assert type(built.model).__name__ == "DeepseekV3ForCausalLM"
            assert built.trust is False
    assert "does not know the model type 'kimi_k2'" in caplog.text
    # Any other unknown type, and none, with an architecture that is known.
    for model_type in ("my_moe", None):
        other = small("qwen3-30b-a3b", tmp_path, model_type=model_type)
        assert read_model_config(other).model_type == "qwen3_moe"


@pytest.mark.parametrize(
    "spelling", ["KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"]
)
def test_classes_match_in_other_spellings(tmp_path: Path, spelling: str) -> None:
    folder = small("kimi-k2.5-bf16", tmp_path, architectures=[spelling])
    built = build_skeleton(folder, trust_remote_code=False)
    assert type(built.model).__name__ == "Kimi_K25ForConditionalGeneration"
    config: Any = built.model.config
    assert config.text_config.model_type == "deepseek_v3"


def test_a_class_for_the_text_alone_does_not_take_the_whole_folder(tmp_path: Path) -> None:
    """Holds without architectures too: Llama 4's class for causal LM knows no vision tower."""
    config = {"model_type": "llama4", "text_config": {"num_hidden_layers": 2}}
    built = build_skeleton(write(tmp_path, config), trust_remote_code=False)
    assert type(built.model).__name__ == "Llama4ForConditionalGeneration"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "bailing_moe_v2", "architectures": ["BailingMoeV2ForCausalLM"],
             "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"}},
            "no class for model type bailing_moe_v2, architectures BailingMoeV2ForCausalLM.*"
            "trust_remote_code: true runs.*update transformers",
        ),
        (
            {"model_type": "brand_new", "architectures": ["BrandNewForCausalLM"]},
            "no class for model type brand_new, architectures BrandNewForCausalLM.*update",
        ),
        (
            {"model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"]},
            "no class that generates text for model type step3p5, architectures Step3p5For",
        ),
    ],
)  # fmt: skip
def test_models_that_transformers_has_no_class_for(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        build_skeleton(write(tmp_path, config), trust_remote_code=False)
    assert "language models" not in str(error.value)
    assert "Checkout" not in str(error.value)


def test_code_that_the_folder_lacks(tmp_path: Path) -> None:
    maps = {"AutoConfig": "configuration_new.NewConfig"}
    config = {"model_type": "brand_new", "architectures": ["BrandNew"], "auto_map": maps}
    with pytest.raises(CheckpointError, match="auto_map names configuration_new.py") as error:
        build_skeleton(write(tmp_path, config), trust_remote_code=True)
    assert "Checkout" not in str(error.value)


def test_a_contradiction_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small("qwen3-30b-a3b", tmp_path, architectures=["MixtralForCausalLM"])
    assert read_model_config(tmp_path).model_type == "qwen3_moe"
    assert "architectures names MixtralForCausalLM, a class of mixtral" in caplog.text
