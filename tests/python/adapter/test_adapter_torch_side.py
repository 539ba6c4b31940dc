"""LoRA outside the routed experts: the same logits as PEFT's own loading."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_models import read_folder, save_model, token_ids, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ktrt.adapter.apply.torch_side import short_targets
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import AdapterError
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, "qwen3_moe", 96, attention_bias=True, tie_word_embeddings=True)


def save_trained(
    folder: Path, model: Path, save: dict[str, Any] | None = None, **options: Any
) -> torch.Tensor:
    """Lets PEFT write an adapter with random numbers (``save``: options); returns PEFT's logits."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                change = 0.5 * noise if "lora_B" in name or "embedding_B" in name else 0.1 * noise
                parameter.add_(change)
    peft.save_pretrained(folder, **(save or {}))
    fresh = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(fresh, folder).eval())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(token_ids(2, 40)).logits
    return found


def ktrt_logits(model: Path, adapter: Path | None) -> tuple[torch.Tensor, int]:
    loaded = load_model(
        ModelArgs(model, infer_dtype="float32"), AdapterArgs(adapter), ExpertArgs(kt_num_threads=1)
    )
    try:
        return logits(loaded.model), loaded.audit.applied_peft
    finally:
        loaded.close()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION},
        {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"k_proj": 2}},
        {"target_modules": ATTENTION, "use_dora": True},
        {"target_modules": ATTENTION, "lora_bias": True},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": r".*layers\.[02]\.self_attn\.(q|v)_proj"},
    ],
    ids=str,
)
def test_same_logits_as_peft(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    reference = save_trained(tmp_path, model, **options)
    found, applied = ktrt_logits(model, tmp_path)
    base, _ = ktrt_logits(model, None)
    assert applied == len(read_folder(tmp_path)[0])
    scale = reference.norm(dim=-1)
    assert ((found - reference).norm(dim=-1) / scale).median() <= 0.01
    assert ((base - reference).norm(dim=-1) / scale).median() >= 0.05, "the adapter must matter"


_BOTH: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "modules_to_save": ["embed_tokens", "lm_head"],
}


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (True, _BOTH),
        (False, _BOTH | {"ensure_weight_tying": True}),
        (True, _BOTH | {"ensure_weight_tying": True}),
        (True, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
        (True, {"target_modules": ["q_proj"], "ensure_weight_tying": True}),
    ],
    ids=str,
)
def test_embeddings_saved_along(
    model: Path, tmp_path: Path, tied: bool, options: dict[str, Any]
) -> None:
    """PEFT's save_embedding_layers writes modules_to_save three times: under the plain name, as
    modules_to_save and as original_module; ensure_weight_tying writes both ends of the model."""
    if not tied:
        model = save_model(tmp_path / "untied", "qwen3_moe", 96, attention_bias=True)
    reference = save_trained(
        tmp_path / "adapter", model, save={"save_embedding_layers": True}, **options
    )
    found, _ = ktrt_logits(model, tmp_path / "adapter")
    assert ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).median() <= 0.01
    keys = read_folder(tmp_path / "adapter")[0]
    assert any("original_module" in key for key in keys) == ("modules_to_save" in options)


def test_half_of_a_tied_pair_is_refused(model: Path, tmp_path: Path) -> None:
    save_trained(tmp_path, model, **_BOTH, ensure_weight_tying=True)
    tensors, config = read_folder(tmp_path)
    del tensors["base_model.model.lm_head.weight"]
    config["modules_to_save"] = ["embed_tokens"]
    with pytest.raises(AdapterError, match=r"changes model.embed_tokens and not lm_head.*tying"):
        ktrt_logits(model, write_adapter(tmp_path, tensors, config))


def test_embedding_lora(model: Path, tmp_path: Path) -> None:
    """PEFT puts LoRA on the embeddings only, not on the tied output layer."""
    reference = save_trained(
        tmp_path, model, target_modules=["embed_tokens", "q_proj"], exclude_modules=["lm_head"]
    )
    tensors, config = read_folder(tmp_path)
    kept = {key: value for key, value in tensors.items() if ".lora_" in key}
    found, applied = ktrt_logits(model, write_adapter(tmp_path, kept, config))
    assert applied == len(kept)
    assert ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).median() <= 0.01


def test_half_of_dora_is_refused(model: Path, tmp_path: Path) -> None:
    save_trained(tmp_path, model, target_modules=["q_proj"], use_dora=True)
    tensors, config = read_folder(tmp_path)
    key = next(key for key in tensors if "magnitude" in key)
    del tensors[key]
    with pytest.raises(AdapterError, match="use_dora True"):
        ktrt_logits(model, write_adapter(tmp_path, tensors, config))


def test_no_warnings_reach_the_user(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    save_trained(tmp_path, model, target_modules=ATTENTION)
    recwarn.clear()
    with caplog.at_level(logging.WARNING):
        ktrt_logits(model, tmp_path)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    assert not caplog.messages


def test_short_names_cannot_be_taken_for_routed_experts() -> None:
    names = [
        "layers.0.mlp.gate_proj",
        "layers.1.mlp.shared_experts.up_proj",
        "l.0.self_attn.q_proj",
    ]
    assert short_targets(dict.fromkeys(names)) == [
        "mlp.gate_proj",
        "q_proj",
        "shared_experts.up_proj",
    ]
