"""LoRA-Experts: whole MLPs added to the MoE block's output, with LoRA in any layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter.test_adapter_every_layout import plan
from helpers.adapter_layouts import (
    EXTRA,
    WRITERS,
    add_extra_experts,
    random_adapter,
)
from helpers.merge import save_merged
from helpers.tiny_models import base_of, read_folder, save_model, token_ids, write_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from ktrt.adapter.layouts.extra_experts import ExtraExperts, apply_extra_experts
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import AdapterError
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), request.param, 96)


def reference_logits(model: Path, adapter: Path | None, extra: dict[int, Any]) -> torch.Tensor:
    """Returns logits of transformers in float32 on merged weights; plain formulas change the
    blocks' outputs."""
    from transformers import AutoModelForCausalLM

    merged = save_merged(model.parent / "merged", model, adapter)
    reference = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    for layer, mlps in extra.items():
        block = reference.model.layers[layer].mlp

        def forward(x: torch.Tensor, before: Any = block.forward, mlps: Any = mlps) -> torch.Tensor:
            outputs = [
                (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
                for gate, up, down in mlps
            ]
            total: torch.Tensor = before(x) + sum(outputs) / len(outputs)
            return total

        block.forward = forward
    with torch.no_grad():
        logits: torch.Tensor = reference(token_ids(2, 40)).logits
    return logits


def ktrt_logits(model: Path, adapter: Path | None) -> torch.Tensor:
    loaded = load_model(
        ModelArgs(model, infer_dtype="float32"), AdapterArgs(adapter), ExpertArgs(kt_num_threads=1)
    )
    try:
        assert loaded.audit.not_applied == 0
        with torch.no_grad():
            logits: torch.Tensor = loaded.model(token_ids(2, 40)).logits
        return logits
    finally:
        loaded.close()


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("a", {}),
        ("a", {"names": "{}_proj"}),
        ("b", {"own_file": True}),
        ("c bare", {"own_file": True, "names": "{}_proj"}),
    ],
    ids=str,
)
def test_logits(model: Path, tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    adapter = random_adapter(model, extra_experts=3)
    plain = WRITERS["a"](tmp_path / "plain", adapter)
    folder = add_extra_experts(WRITERS[layout](tmp_path / "own", adapter), adapter, **options)
    reference = reference_logits(model, plain, adapter.extra)
    found, without = ktrt_logits(model, folder), ktrt_logits(model, plain)
    scale = reference.norm(dim=-1)
    assert ((found - reference).norm(dim=-1) / scale).median() <= 0.01
    assert ((without - reference).norm(dim=-1) / scale).median() >= 0.1, "they must matter"


def test_extra_experts_alone(model: Path, tmp_path: Path) -> None:
    """There is no LoRA, only the file of extra experts."""
    adapter = random_adapter(model, extra_experts=1)
    folder = write_adapter(tmp_path, {"x": torch.ones(1)}, adapter.config(target_modules=[]))
    add_extra_experts(folder, adapter, own_file=True)
    (folder / "adapter_model.safetensors").unlink()
    found, reference = ktrt_logits(model, folder), reference_logits(model, None, adapter.extra)
    assert ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).median() <= 0.01


def drop(word: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if word in key]:
            del tensors[key]

    return change


def widen(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if "le_down" in key)
    tensors[key] = torch.zeros(tensors[key].shape[0], 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("layers.1.mlp.lora_experts.0.le_up"), "mlp.lora_experts.0.up_proj is missing"),
        (drop("layers.1.mlp.lora_experts.1."), "layers.1.mlp.lora_experts.1.gate_proj is missing"),
        (drop("layers.1."), "layers.1.mlp.lora_experts.0.gate_proj is missing"),
        (widen, r"has shape \[24, 160\], expected \[32, 160\]: .* 32 as in .*le_down.weight"),
    ],
)
def test_incomplete_files(
    model: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    adapter = random_adapter(model, extra_experts=2)
    folder = add_extra_experts(WRITERS["a"](tmp_path, adapter), adapter, own_file=True)
    tensors = load_file(folder / EXTRA)
    change(tensors)
    save_file(tensors, folder / EXTRA)
    with pytest.raises(AdapterError, match=words):
        plan(folder, base_of(model))


def test_copies_in_both_files(model: Path, tmp_path: Path) -> None:
    adapter = random_adapter(model, extra_experts=1)
    folder = add_extra_experts(WRITERS["a"](tmp_path, adapter), adapter, names="{}_proj")
    add_extra_experts(folder, adapter, own_file=True)
    base = base_of(model)
    assert len(plan(folder, base).extra["model.layers.1.mlp"]) == 1
    tensors, config = read_folder(folder)
    key = next(key for key in tensors if "lora_experts" in key)
    tensors[key] = tensors[key] + 1
    with pytest.raises(AdapterError, match="and differ"):
        plan(write_adapter(folder, tensors, config), base)


class Block(nn.Module):
    """A MoE block that also returns its router's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 8)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        return 2 * hidden_states, "logits"

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def test_blocks_with_a_second_output() -> None:
    block, x = nn.ModuleDict({"mlp": Block()}), torch.randn(3, 8)
    block.get_input_embeddings = block["mlp"].get_input_embeddings
    mlp = (torch.randn(4, 8), torch.randn(4, 8), torch.randn(8, 4))
    apply_extra_experts({"mlp": [mlp]}, block)
    states, logits = block["mlp"](hidden_states=x)
    assert logits == "logits"
    extra = block["mlp"].lora_experts
    assert isinstance(extra, ExtraExperts)
    assert torch.equal(states, 2 * x + extra(x))
    extra.scale = 0.0
    assert torch.equal(block["mlp"](x)[0], 2 * x)
