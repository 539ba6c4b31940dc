"""Rotary positions as a GPU computes them, interpreted or (KTRT_TEST_GPU=1) there, against
transformers' functions."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from helpers.expert_layers import DEVICES
from helpers.interpreted import interpreted
from torch import nn

from ktrt.layers.gpu import rotary
from ktrt.layers.gpu.rotary import use_rotary_kernel
from ktrt.utils.patches import Patches

# Family: the class of its attention, and the part of a head of 48 numbers that it rotates.
FAMILIES = {
    "qwen3_moe": ("Qwen3MoeAttention", 48), "glm4_moe": ("Glm4MoeAttention", 32),
    "gpt_oss": ("GptOssAttention", 48), "gemma4": ("Gemma4TextAttention", 48),
    "deepseek_v2": ("DeepseekV2Attention", 48),
}  # fmt: skip
HEADS, SIZE, ROWS, TOKENS = 3, 48, 2, 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotates_as_the_family_does(
    family: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        interpreted()
    module: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name, rotated = FAMILIES[family]
    attention = getattr(module, name).__new__(getattr(module, name))
    nn.Module.__init__(attention)
    function = "apply_rotary_emb" if family == "deepseek_v2" else "apply_rotary_pos_emb"
    plain = getattr(module, function)
    with Patches() as patches:
        assert use_rotary_kernel(attention, torch.device(device), patches) == 1
        fused = getattr(module, function)
        monkeypatch.setattr(fused, "kt_plain", None)  # the kernel runs, or nothing does
        for dtype in (torch.float32, torch.bfloat16):
            check(family, plain, fused, rotated, torch.device(device), dtype)
    assert getattr(module, function) is plain


def check(
    family: str, plain: Any, fused: Any, rotated: int, device: torch.device, dtype: torch.dtype
) -> None:
    width = rotated // 2 if family in ("gpt_oss", "deepseek_v2") else rotated
    angles = torch.randn(ROWS, TOKENS, width, device=device)
    numbers = [angles.cos().to(dtype), angles.sin().to(dtype)]
    if family == "deepseek_v2":
        numbers = [torch.polar(torch.ones_like(angles), angles)]
    # Heads lie after tokens; queries are part of longer vectors.
    query = torch.randn(ROWS, TOKENS, HEADS, SIZE + 8, device=device).to(dtype)[..., 8:]
    key = torch.randn(ROWS, TOKENS, 1, SIZE, device=device).to(dtype)
    vectors = [query] if family == "gemma4" else [query, key]
    turned = [each.transpose(1, 2) for each in vectors]
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for made, options in ((turned, {}), (vectors, {"unsqueeze_dim": 2})):
        if options and family == "deepseek_v2":
            continue
        found, expected = fused(*made, *numbers, **options), plain(*made, *numbers, **options)
        if family == "gemma4":
            found, expected = (found,), (expected,)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            assert torch.allclose(one.float(), other.float(), rtol=limit, atol=limit)
    if dtype == torch.bfloat16 and device.type == "cpu":
        assert found[0].stride(-1) == 1


def test_what_the_kernel_does_not_take() -> None:
    form = rotary.Form(2, whole=True)
    assert form.rotated(48, 48) == (48, 24)
    assert form.rotated(48, 32) is form.rotated(48, 24) is None
    assert rotary.Form(2, half=True).rotated(48, 24) == (48, 0)
    called = rotary._Rotary(lambda *args, **options: (args, options), form)
    assert called(1, 2, 3, unsqueeze_dim=2) == ((1, 2, 3), {"unsqueeze_dim": 2})
