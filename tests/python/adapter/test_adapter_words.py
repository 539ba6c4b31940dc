"""Adapters with new words: logits of PEFT's own loading, and an unchanged base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from helpers.tiny_models import VOCAB_SIZE, read_folder, save_model, token_ids, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.export.checkpoint import merge_checkpoint
from ktrt.loading.model import LoadedModel, load_model
from ktrt.loading.plan import base_of_adapters, open_adapter, open_base

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

NEW = VOCAB_SIZE + 3  # a word that only a resized vocabulary has
ROWS = VOCAB_SIZE + 64
BOTH = ["embed_tokens", "lm_head"]


class Base(NamedTuple):
    """A model folder and its logits in ktrt without an adapter."""

    folder: Path
    plain: torch.Tensor


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "qwen3_moe", 96, tie_word_embeddings=request.param)
    loaded = load(folder)
    plain = logits(loaded.model)
    loaded.close()
    return Base(folder, plain)


def library_model(model: Path, *, resized: bool) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if resized:
        torch.manual_seed(3)
        base.resize_token_embeddings(NEW + 1, pad_to_multiple_of=64, mean_resizing=False)
    return base


def save_trained(folder: Path, model: Path, *, resized: bool = False, **options: Any) -> Any:
    """Lets PEFT write an adapter with random numbers; returns PEFT's model."""
    base = library_model(model, resized=resized)
    peft = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad or (resized and parameter.shape[0] == ROWS):
                noise = torch.randn(parameter.shape, generator=generator)
                large = "lora_B" in name or "trainable_tokens" in name
                parameter.add_((0.5 if large else 0.05) * noise)
    peft.save_pretrained(folder)
    return PeftModel.from_pretrained(library_model(model, resized=resized), folder).eval()


def load(model: Path, *adapters: Path, dtype: Any = "float32") -> LoadedModel:
    args = AdapterArgs(adapters={path.name: path for path in adapters})
    return load_model(ModelArgs(model, infer_dtype=dtype), args, ExpertArgs(kt_num_threads=1))


def logits(model: Any, *, new: bool = False) -> torch.Tensor:
    ids = token_ids(2, 30)
    if new:
        ids[:, 7] = NEW
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.float()
    return found


def distance(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the median token's error, over all words or (÷ 10) of the worst word."""
    assert found.shape == reference.shape
    error = found - reference
    words = error.abs().flatten(0, -2).median(dim=0).values / reference.abs().mean()
    whole = (error.norm(dim=-1) / reference.norm(dim=-1)).median()
    return max(float(whole), float(words.max()) / 10)


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [3, 300, 5]},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7, 5, 9]}},
        {"trainable_token_indices": {"lm_head": [7, 9]}},
        {"trainable_token_indices": [3, 5], "ensure_weight_tying": True},
        {"resized": True},
        {"resized": True, "modules_to_save": BOTH},
        {"resized": True, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"resized": True, "trainable_token_indices": [3, NEW]},
    ],
    ids=lambda each: ", ".join(map(str, each.values())),
)
def test_same_logits_as_peft(model: Base, tmp_path: Path, options: dict[str, Any]) -> None:
    resized = "resized" in options
    peft = save_trained(tmp_path, model.folder, **options)
    tensors, config = read_folder(tmp_path)
    loaded = load(model.folder, write_adapter(tmp_path, without_copies(tensors), config))
    try:
        found = logits(loaded.model, new=resized)
        assert distance(found, logits(peft, new=resized)) <= 0.01
        assert found.shape[-1] == (ROWS if resized else VOCAB_SIZE)
        assert loaded.audit.not_applied == 0
        assert not torch.equal(logits(loaded.model)[..., :VOCAB_SIZE], model.plain)
        loaded.adapters.off()
        assert torch.equal(logits(loaded.model), model.plain)
        assert logits(loaded.model, new=resized).isfinite().all()
        loaded.adapters.on()
        assert torch.equal(logits(loaded.model, new=resized), found)
    finally:
        loaded.close()


def test_a_kept_cache_decodes_with_both_vocabularies(model: Base, tmp_path: Path) -> None:
    """The recorded steps of all caches of a model share the knowledge that recording works."""
    save_trained(tmp_path, model.folder, resized=True, modules_to_save=BOTH)
    loaded = load(model.folder, tmp_path, dtype="bfloat16")
    try:
        cache, prompt = loaded.new_cache(), token_ids(1, 9)[0].tolist()
        for switch, rows in ((loaded.adapters.on, ROWS), (loaded.adapters.off, VOCAB_SIZE)) * 2:
            switch()
            cache.forward(prompt[cache.reuse(prompt) :])
            found = [cache.forward([token]) for token in (3, 4, 5)]
            assert [len(each) for each in found] == [rows] * 3
            assert cache.has_graphs
    finally:
        loaded.close()


def without_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes PEFT's copies of the untrained tables."""
    saved = [key for key in tensors if ".modules_to_save." in key]
    copies = {key.replace("modules_to_save", "original_module") for key in saved}
    copies |= {key.replace(".modules_to_save", "") for key in saved}
    kept = {key: value for key, value in tensors.items() if key not in copies}
    return {key.replace(".modules_to_save", ""): value for key, value in kept.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [3, 300, 5]},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7, 5, 9]}},
        {"resized": True},
        {"resized": True, "modules_to_save": BOTH},
        {"resized": True, "trainable_token_indices": [3, NEW]},
    ],
    ids=lambda each: ", ".join(map(str, each.values())),
)
def test_export_equals_peft(model: Base, tmp_path: Path, options: dict[str, Any]) -> None:
    resized = "resized" in options
    peft = save_trained(tmp_path / "adapter", model.folder, **options)
    tensors, config = read_folder(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", without_copies(tensors), config)
    base = open_base(ModelArgs(model.folder))
    plan = open_adapter(AdapterArgs(tmp_path / "adapter"), base_of_adapters(base))
    merge_checkpoint(base, plan, tmp_path / "out", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.config.vocab_size == (ROWS if resized else VOCAB_SIZE)
    assert distance(logits(merged, new=resized), logits(peft, new=resized)) <= 1e-4
