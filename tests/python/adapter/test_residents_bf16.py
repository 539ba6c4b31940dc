"""Switching when the engine computes the other linears too (BF16 on the CPU): the same bits as the
adapter alone, including its biases and output layers."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.tiny_models import (
    HIDDEN_SIZE,
    VOCAB_SIZE,
    LoraPlan,
    read_folder,
    save_adapter,
    save_model,
    token_ids,
    write_adapter,
)
from peft import LoraConfig, inject_adapter_in_model

from ktrt.adapter.apply.switches import TorchAdapters
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.generate.runner import KvCache
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from pathlib import Path

IDS = token_ids(2, 20)
NAMES = ("a", "b", "bias", "head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    base = save_model(folder / "base", "qwen3_moe", 96, attention_bias=True)
    save_adapter(folder / "a", base, "a")
    save_adapter(folder / "b", base, "b")
    tensors, config = read_folder(folder / "a")
    query = {key: value for key, value in tensors.items() if "q_proj" in key}
    config = config | {"target_modules": ["q_proj"]}
    generator = torch.Generator().manual_seed(1)
    biases = {}
    for layer in range(3):
        for name, size in (("q", HIDDEN_SIZE), ("k", 80), ("v", 80), ("o", HIDDEN_SIZE)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.bias"
            biases[key] = torch.randn(size, generator=generator)
    write_adapter(folder / "bias", query | biases, config | {"bias": "all"})
    head = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    saved = {"base_model.model.lm_head.weight": head}
    write_adapter(folder / "head", query | saved, config | {"modules_to_save": ["lm_head"]})
    return folder


def load(folder: Path, *names: str) -> LoadedModel:
    adapters = AdapterArgs(adapters={name: folder / name for name in names})
    return load_model(ModelArgs(folder / "base"), adapters, ExpertArgs(kt_num_threads=1))


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded.model(IDS).logits
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("base", *NAMES):
        loaded = load(folder, *([] if name == "base" else [name]))
        found[name] = logits(loaded)
        loaded.close()
    return found


@pytest.mark.parametrize("first", NAMES)
def test_a_switch_gives_the_bits_of_the_adapter_alone(
    folder: Path, alone: dict[str, torch.Tensor], first: str
) -> None:
    loaded = load(folder, first, *(name for name in NAMES if name != first))
    for name in (first, *NAMES, first):
        loaded.adapters.activate(name)
        assert torch.equal(logits(loaded), alone[name]), name
        loaded.adapters.off()
        assert torch.equal(logits(loaded), alone["base"]), f"off after {name}"
    loaded.close()


def test_decoding_over_latents_follows_an_adapter_that_came_later(tmp_path: Path) -> None:
    """kv_b_proj becomes PEFT's when the adapter is loaded."""

    def decode(loaded: LoadedModel) -> torch.Tensor:
        cache, ids = KvCache(loaded.model), IDS[0].tolist()
        cache.forward(ids[:12])
        return torch.stack([cache.forward([each]) for each in ids[12:]])

    base = save_model(tmp_path / "base", "deepseek_v2", 96)
    save_adapter(tmp_path / "a", base, "a", LoraPlan(others=2.0))
    first, later = load(tmp_path, "a"), load(tmp_path)
    expected, plain = decode(first), decode(later)
    later.adapters.load("a", tmp_path / "a")
    assert torch.equal(decode(later), plain)
    later.adapters.activate("a")
    assert torch.equal(decode(later), expected)
    first.adapters.off()
    assert torch.equal(decode(first), plain)
    assert not torch.allclose(plain, expected, atol=0.1)
    first.close()
    later.close()


def test_recorded_steps_survive_a_load_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's layers stay where the adapter put them."""
    base = save_model(tmp_path / "base", "deepseek_v2", 96)
    save_adapter(tmp_path / "a", base, "a")
    loaded = load(tmp_path)
    cache, ids = loaded.new_cache(), IDS[0].tolist()

    def decode() -> torch.Tensor:
        cache.forward(ids[cache.reuse(ids) :])
        return torch.stack([cache.forward([each]) for each in ids[:5]])

    decode()  # the later ones reuse all of the prompt but its last token
    expected = decode()
    assert cache.has_graphs
    with monkeypatch.context() as patch:
        patch.setattr(loaded.adapters._sides, "load_experts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loaded.adapters.load("a", tmp_path / "a")
    assert torch.equal(decode(), expected)
    loaded.adapters.load("a", tmp_path / "a")
    assert torch.equal(decode(), expected)
    loaded.close()


def test_an_unloaded_adapter_is_freed(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "deepseek_v2", 96)
    save_adapter(tmp_path / "a", base, "a")
    loaded = load(tmp_path)
    for name in ("a", "again"):
        loaded.adapters.load(name, tmp_path / "a")
        lora = [weakref.ref(p) for n, p in loaded.model.named_parameters() if ".lora_" in n]
        loaded.adapters.unload(name)
        gc.collect()
        assert lora
        assert not any(each() is not None for each in lora)
    loaded.close()


@pytest.mark.parametrize(("rank", "reason"), [(256, None), (257, "has LoRA of rank 257")])
def test_ranks_beyond_the_engines_take_turns(rank: int, reason: str | None) -> None:
    base = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    model = torch.nn.Sequential(base)
    config = LoraConfig(r=rank, target_modules=["0"])
    inject_adapter_in_model(config, model, "default")
    adapters = TorchAdapters(model)
    adapters.add("default", list)
    assert adapters.row_reason("default") == reason
