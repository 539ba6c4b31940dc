"""Latent attention as a GPU computes it, with Triton's kernels interpreted, against float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.interpreted import interpreted
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ktrt.engine.active_set import ActiveSet
from ktrt.engine.rank_masks import RankMasks
from ktrt.engine.step_rows import ACTIVE, BASE, RunningStep, StepRows
from ktrt.layers.causal_mask import mask_of_last, mask_or_none
from ktrt.layers.cuda_linear import FusedLora
from ktrt.layers.form import AttentionForm
from ktrt.layers.gpu import latent as gpu_latent
from ktrt.layers.gpu.latent import AbsorbedLatents
from ktrt.layers.latent import HeldLatents, Latents, attention

if TYPE_CHECKING:
    from ktrt.utils.patches import Patches

HEADS, NOPE, ROPE, VALUE, RANK = 4, 16, 8, 12, 40


class Attention(nn.Module):
    """The part of DeepSeek's attention that expands latents."""

    kv_b_proj: Any
    kt_latent: Any

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.num_heads, self.qk_nope_head_dim, self.v_head_dim = HEADS, NOPE, VALUE
        self.kv_b_proj = nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=False)

    def expand_kv(
        self, latents: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.kv_b_proj(latents).view(latents.shape[0], -1, HEADS, NOPE + VALUE)
        key, value = both.transpose(1, 2).split([NOPE, VALUE], -1)
        return torch.cat([key, positions.expand(-1, HEADS, -1, -1)], -1), value


class Layer:
    """A layer with adapters 0 and 3 of different ranks, 3 active, and what its step reads."""

    def __init__(self, patches: Patches) -> None:
        torch.manual_seed(1)
        self.running, masks = RunningStep(), RankMasks(RunningStep())
        masks._running = self.running
        self.module: Any = Attention()
        model: Any = nn.Module()
        model.layer = self.module
        for name, rank in (("default", 4), ("adapter3", 7)):
            adapter = LoraConfig(
                r=rank, lora_alpha=8, target_modules=["kv_b_proj"], init_lora_weights=False
            )
            inject_adapter_in_model(adapter, model, name)
        model.requires_grad_(False)
        self.module.kv_b_proj.set_adapter("adapter3")
        model.requires_grad_(False)
        self.linears = FusedLora(model, ActiveSet(), patches, masks)
        self.latents = Latents(self.module.expand_kv, None, self.running)
        self.latents.absorbed = AbsorbedLatents(self.module)
        self.module.kt_latent = self.latents

    def attend(
        self, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        with torch.inference_mode():
            return attention(self.module, query, latents, positions, None, 0.3)[0]

    def exact(
        self, adapter: int, query: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """[n, heads, v] of one row, on keys and values that kv_b_proj expands by PEFT's layer."""
        peft, total = self.module.kv_b_proj, latents.shape[2]
        names = {0: ["default"], 3: ["adapter3"], ACTIVE: ["adapter3"], BASE: []}[adapter]
        weight = peft.get_base_layer().weight.clone()
        for name in names:
            weight += peft.get_delta_weight(name)
        both = (latents[0, 0] @ weight.T).view(total, HEADS, -1).transpose(0, 1)
        key = torch.cat([both[..., :NOPE], positions[0].expand(HEADS, -1, -1)], -1)
        mask = mask_of_last(query.shape[2], total, query.device)
        out = scaled_dot_product_attention(query[0], key, both[..., NOPE:], mask, scale=0.3)
        return out.transpose(0, 1)


@pytest.fixture
def layer(patches: Patches) -> Layer:
    interpreted()
    return Layer(patches)


def states(rows: int, tokens: int, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(rows, HEADS, tokens, NOPE + ROPE),
        torch.randn(rows, 1, total, RANK),
        torch.randn(rows, 1, total, ROPE),
    )


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("adapters", [None, [0, 3, BASE, ACTIVE]], ids=["active", "by-row"])
def test_rows_of_a_decode_step(layer: Layer, adapters: list[int] | None) -> None:
    query, latents, positions = states(4, 1, 100)
    lengths = torch.tensor([1, 64, 77, 100])
    for row, length in enumerate(lengths):
        latents[row, :, length:] = positions[row, :, length:] = torch.nan
    rows = StepRows(4, 0)
    rows.batch = True
    rows.adapters.copy_(torch.tensor(adapters or [ACTIVE] * 4))
    with layer.running.running(rows), layer.running.attending(lengths):
        found = layer.attend(query, latents, positions)
    for row, length in enumerate(lengths.tolist()):
        one = (each[row : row + 1, :, :length] for each in (latents, positions))
        expected = layer.exact(int(rows.adapters[row]), query[row : row + 1], *one)
        check(found[row], expected)


@pytest.mark.parametrize("tokens", [3, 30])
@pytest.mark.parametrize("adapter", [0, BASE, ACTIVE])
def test_the_last_tokens_of_a_sequence(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, tokens: int, adapter: int
) -> None:
    """A few on latents, many on keys and values of two heads at once."""
    monkeypatch.setattr(gpu_latent, "_EXPANDED_BYTES", 2 * 70 * (NOPE + VALUE) * 4)
    prompts, prompt = 0, AbsorbedLatents.prompt

    def count(*args: Any) -> torch.Tensor:
        nonlocal prompts
        prompts += 1
        return prompt(*args)

    monkeypatch.setattr(AbsorbedLatents, "prompt", count)
    parts = states(1, tokens, 70)
    rows = StepRows(tokens, 0)
    rows.adapters.fill_(adapter)
    with layer.running.running(rows):
        found = layer.attend(*parts)
    assert prompts == (tokens == 30)
    check(found[0], layer.exact(adapter, *parts))


@pytest.mark.parametrize("adapter", [3, BASE])
def test_a_slot_of_a_forward_of_many_sequences(layer: Layer, adapter: int) -> None:
    _, latents, positions = states(3, 1, 60)
    held = HeldLatents(layer.latents, latents, positions, VALUE, 0.3)
    rows = StepRows(40, 1)
    for tokens in (1, 20):
        query = torch.randn(1, HEADS, tokens, NOPE + ROPE)
        with torch.inference_mode(), layer.running.running(rows):
            found = held.last(query, 1, 50, adapter, AttentionForm(0.3))
        expected = layer.exact(adapter, query, latents[1:2, :, :50], positions[1:2, :, :50])
        check(found[0], expected)


def test_what_factors_cannot_say_is_expanded(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = states(1, 3, 40)
    peft = layer.module.kv_b_proj
    expected = layer.exact(ACTIVE, *parts)
    monkeypatch.setattr(AbsorbedLatents, "decode", None)
    peft.lora_B["adapter3"].bias = nn.Parameter(torch.zeros(peft.out_features))
    layer.linears.refresh()
    assert layer.latents.absorbed is not None
    assert layer.latents.absorbed.factors() is None
    mask = mask_of_last(3, 40, torch.device("cpu"))[None, None]
    with torch.inference_mode():
        module = layer.module
        monkeypatch.setattr(module, "is_causal", True, raising=False)
        found = attention(module, *parts, mask, 0.3)[0]
    check(found[0], expected)


def test_plain_masks_are_left_out_on_a_gpu() -> None:
    mask, cuda = mask_or_none(), torch.device("cuda")
    call = {"batch_size": 1, "q_length": 5, "kv_length": 9, "q_offset": 4, "kv_offset": 0}
    assert mask(**call, device=cuda) is None
    found = mask(**call, device=torch.device("cpu"))
    assert found is not None
    assert torch.equal(found[0, 0], mask_of_last(5, 9, torch.device("cpu")))
    padded = mask(**call, attention_mask=torch.ones(1, 9, dtype=torch.bool), device="cpu")
    assert padded is not None
