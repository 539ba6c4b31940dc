"""Other trainers' names on other families: text classes and multimodal ones, gate and up
interleaved, no gate. Compares names by plans, numbers with a merge in float32."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from adapter.test_adapter_every_layout import assert_same, plan
from checkpoint.test_families import SUPPORTED, Case, error, logits
from helpers.family_adapters import RANK, write_stacked
from helpers.family_models import Family, random_model, small_config
from helpers.rounded_experts import experts_of, random_lora
from helpers.tiny_models import read_folder, write_adapter
from peft import LoraConfig, get_peft_model

from ktrt.adapter import BaseModel
from ktrt.checkpoint.names import WeightNames
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.experts import find_experts
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.rounded_experts import Lora

P = "base_model.model."
# Prefixes of ``layers``: the text class, and both forms of multimodal ones.
PREFIXES = ("model.", "model.language_model.", "language_model.model.")


def base_of_family(family: Family) -> BaseModel:
    with torch.device("meta"):
        model: Any = getattr(transformers, family.class_name)(small_config(family.model_type))
    return BaseModel(model, find_experts(model), WeightNames(model), {})


def text_adapter(folder: Path, base: BaseModel) -> Path:
    """Writes LoRA on the routed experts (stacked) and on every other Linear of the layers."""
    experts = experts_of(base.model)
    generator = torch.Generator().manual_seed(1)
    with torch.device("cpu"):
        loras = {path: random_lora(module, RANK, True, generator)
                 for path, module in experts.items()}  # fmt: skip
        write_stacked(folder, experts, loras)
        tensors, config = read_folder(folder)
        prefix = base.experts[0].path.partition("layers.")[0]
        for name, module in base.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.startswith(f"{prefix}layers."):
                rows, columns = module.weight.shape
                tensors[f"{P}{name}.lora_A.weight"] = torch.randn(RANK, columns)
                tensors[f"{P}{name}.lora_B.weight"] = torch.randn(rows, RANK)
    return write_adapter(folder, tensors, config | {"auto_mapping": None})


MULTIMODAL = [
    family for family in SUPPORTED
    if family.model_type in ("qwen3_vl_moe", "gemma4", "glm4v_moe", "qwen3_5_moe", "llama4")
    or family.model_type in ("gemma4_text", "qwen3_5_moe_text", "ernie4_5_vl_moe")
]  # fmt: skip


@pytest.mark.parametrize("family", MULTIMODAL, ids=str)
def test_class_of_the_text_or_of_the_whole(family: Family, tmp_path: Path) -> None:
    base = base_of_family(family)
    expected = plan(text_adapter(tmp_path / "own", base), base)
    assert expected.side.loras
    own = base.experts[0].path.partition("layers.")[0]
    assert own in PREFIXES
    for prefix in PREFIXES:
        tensors, config = read_folder(tmp_path / "own")
        config["target_parameters"] = [
            target.replace(own, prefix, 1) for target in config["target_parameters"]
        ]
        renamed = {key.replace(f"{P}{own}", f"{P}{prefix}", 1): v for key, v in tensors.items()}
        folder = write_adapter(tmp_path / prefix, renamed, config)
        assert_same(plan(folder, base), expected)


def _stack(module: Any, lora: Lora) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns (A, B) of the first parameter, in the order of its rows, and of down_proj."""
    if not module.has_gate:
        return {"first": lora["up"], "down": lora["down"]}
    (a, gate), (_, up) = lora["gate"], lora["up"]
    rows = (
        torch.cat([gate, up], 1)
        if module.is_concatenated
        else torch.stack([gate, up], 2).flatten(1, 2)
    )
    return {"first": (a, rows), "down": lora["down"]}


def listed(path: str, module: Any, lora: Lora) -> dict[str, torch.Tensor]:
    """Writes the names of Unsloth's gpt-oss in 4 bits."""
    names = {"first": "gate_up_projs", "down": "down_projs"}
    return {
        f"{P}{path}.{names[which]}.{expert}.lora_{half}.default.weight": matrix.clone()
        for which, pair in _stack(module, lora).items()
        for half, stack in zip("AB", pair, strict=True)
        for expert, matrix in enumerate(stack)
    }


def tinker(path: str, module: Any, lora: Lora) -> dict[str, torch.Tensor]:
    """Writes Tinker's names: without gate, w1 is the only matrix before the activation."""
    words = {"gate": "w1", "up": "w3" if module.has_gate else "w1", "down": "w2"}
    tensors = {
        f"{P}{path}.{words[projection]}.lora_{half}.weight": stack.clone()
        for projection, pair in lora.items()
        for half, stack in zip("AB", pair, strict=True)
    }
    if not module.has_gate:
        tensors |= {f"{P}{path}.w3.lora_{half}.weight": torch.empty(0) for half in "AB"}
    return tensors


def automodel(path: str, module: Any, lora: Lora) -> dict[str, torch.Tensor]:
    """Writes NVIDIA NeMo Automodel's form: x A B."""
    names = {"first": "gate_and_up", "down": "down"}
    return {
        f"{P}{path}.lora_{names[which]}_{half}": stack.transpose(1, 2).contiguous()
        for which, pair in _stack(module, lora).items()
        for half, stack in zip("AB", pair, strict=True)
    }


def text_names(path: str, module: Any, lora: Lora) -> dict[str, torch.Tensor]:
    """Writes the names of the text class, wrapped by FSDP."""
    tensors = tinker(path, module, lora)
    return {
        re.sub(r"model\.language_model\.layers", "_fsdp_wrapped_module.model.layers", key): value
        for key, value in tensors.items()
    }


CASES = [
    ("gpt_oss", listed), ("gpt_oss", tinker), ("gpt_oss", automodel), ("nemotron_h", tinker),
    ("nemotron_h", automodel), ("qwen3_vl_moe", text_names), ("gemma4", text_names),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "writer"), CASES)
def test_numbers_against_a_merge(
    tmp_path: Path, model_type: str, writer: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Compares with transformers' class in float32 plus ΔW, with the engine's roundings."""
    family = next(each for each in SUPPORTED if each.model_type == model_type)
    model = random_model(family)
    folder = tmp_path / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    model = model.float()
    generator = torch.Generator().manual_seed(2)
    experts = experts_of(model)
    loras = {path: random_lora(module, RANK, True, generator)
             for path, module in experts.items()}  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for path, lora in loras.items():
        tensors |= writer(path, experts[path], lora)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": []}
    adapter = write_adapter(tmp_path / "adapter", tensors, config)
    Case(model, folder).check(writer.__name__, "AMXBF16", loras, adapter)


def test_peft_on_vision_and_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT's adapter acts on a tower (including a Conv3d) and on text: logits equal PEFT's, the
    tower's tensors are named."""
    family = next(each for each in SUPPORTED if each.model_type == "qwen3_vl_moe")
    model = random_model(family)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    targets = r".*visual.*\.(qkv|proj|linear_fc1)|.*language_model.*\.(q_proj|o_proj)"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    peft = get_peft_model(model.float(), config).eval()
    peft.save_pretrained(tmp_path / "adapter")
    tensors, _ = read_folder(tmp_path / "adapter")
    assert any(value.ndim == 5 for value in tensors.values())
    loaded = load_model(
        ModelArgs(tmp_path / "model", infer_dtype="float32"),
        AdapterArgs(tmp_path / "adapter"),
        ExpertArgs(kt_num_threads=1),
    )
    try:
        assert error(logits(loaded.model), logits(peft)) < 0.01
        with peft.disable_adapter():
            assert error(logits(loaded.model), logits(peft)) > 0.05
        assert loaded.audit.applied_peft == 8
        assert loaded.audit.no_effect == len(tensors) - 8
        message = f"no text reaches the targets of {len(tensors) - 8} of {len(tensors)} tensors"
        assert message in caplog.text
    finally:
        loaded.close()
