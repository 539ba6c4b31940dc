"""The kernel that writes the experts' inputs, interpreted or (KTRT_TEST_GPU=1) on a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers.expert_layers import DEVICES
from helpers.interpreted import interpreted

from ktrt.engine.step_rows import IDLE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (3, 4)])
def test_rows_are_written_and_filled(device: str, tokens: int, rows: int, by_row: bool) -> None:
    """Any integers, floats and strides are taken; missing rows have no expert."""
    if device == "cpu":
        interpreted()
    module = importlib.import_module("ktrt.experts.gpu.hand_over")
    size, count = 1060, 3
    states = torch.randn(tokens, size + 4, device=device).bfloat16()[:, 4:]
    index = torch.randint(0, 9, (count, tokens), device=device, dtype=torch.int32).T
    weights = torch.rand(tokens, count, device=device).bfloat16()
    adapters = torch.arange(tokens, device=device, dtype=torch.int32) if by_row else None
    written = [
        torch.full((rows, size), torch.nan, dtype=torch.bfloat16),
        torch.full((rows, count), 77), torch.full((rows, count), torch.nan),
        torch.full((rows,), 77, dtype=torch.int32),
    ]  # fmt: skip
    if device == "cuda":
        written = [each.pin_memory() for each in written]
    addresses = [each.data_ptr() for each in written]
    module.hand_over(rows, states, index, weights, adapters, addresses, IDLE)
    if device == "cuda":
        torch.cuda.synchronize()
    held = [states, index, weights] + ([] if adapters is None else [adapters])
    for found, expected in zip(written, held, strict=False):
        assert torch.equal(found[:tokens], expected.cpu().to(found.dtype))
    for found, filler in zip(written, (0, -1, 0, IDLE if by_row else 77), strict=True):
        assert bool((found[tokens:] == filler).all())
