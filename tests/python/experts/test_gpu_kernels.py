"""The kernels of grouped experts, interpreted or (KTRT_TEST_GPU=1) on a GPU, against the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.expert_layers import LayerCase, error, run_engine
from helpers.interpreted import interpreted

from ktrt._core import Engine
from ktrt.experts.gpu import fused
from ktrt.experts.gpu.arithmetic import LoraChoice, make_rows
from ktrt.experts.gpu.grouping import Grouping
from ktrt.experts.gpu.source import LayerSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt._core import MoeLayer
    from ktrt.experts.gpu.arithmetic import ExpertBank

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cuts numbers to bfloat16 instead of rounding them.
SAME = 2e-3 if DEVICE.type == "cuda" else 0.02
GPT_OSS = {"alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.5, "up_offset": 1.0}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=1, max_qlen=512)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        interpreted()
        monkeypatch.setattr(fused, "on_device", lambda tensor: True)
        monkeypatch.setattr(fused, "TILE_ROWS", 16)


def on_device(bank: ExpertBank) -> ExpertBank:
    """The interpreter multiplies no bfloat16."""
    if DEVICE.type == "cuda":
        return bank
    return bank._map(lambda each: each.float() if each.dtype == torch.bfloat16 else each)


def fused_sums(
    layer: MoeLayer, arguments: tuple[torch.Tensor, ...], order: list[int] | None = None,
    lora: LoraChoice | None = None,
) -> torch.Tensor:  # fmt: skip
    """In pieces of two experts."""
    states, ids, weights = (each.to(DEVICE) for each in arguments)
    source = LayerSource(layer)
    order = order or list(range(layer.num_experts))
    grouping = Grouping(ids, weights, layer.num_experts, layer.hidden_size, order)
    rows = make_rows(states, source.quantized, torch.int8)
    for at in range(0, len(order), 2):
        piece = order[at : at + 2]
        arrays = {name: array[piece].to(DEVICE) for name, array in source.arrays.items()}
        grouping.add(piece, on_device(source.bank(arrays)), rows, lora or LoraChoice())
    return grouping.total().cpu()


CASES: dict[str, dict[str, Any]] = {
    "bf16": {"ranks": (8, 3, 17)},
    "int8": {"ranks": (0, 24, 0), "form": GPT_OSS, "biased": True},
    "int4": {"ranks": (8, 0, 8)},
}


@pytest.mark.parametrize("weight_format", CASES)
def test_equals_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, weight_format: str
) -> None:
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 1)  # a tile at a time
    case = LayerCase(3, 2, 96, 64, **CASES[weight_format])
    layer = case.build(engine, weight_format)
    arguments = case.inputs(25, outside=True)
    found = fused_sums(layer, arguments, order=[2, 0, 1])
    assert error(found, run_engine(layer, *arguments)) < SAME


def test_rows_are_quantized_to_the_same_codes() -> None:
    rows = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows[0], rows[1], rows[2, 5], rows[3, 6] = 0, 1e-39, torch.inf, torch.nan
    expected = make_rows(rows, quantized=True, codes=torch.int8)
    codes, scale = fused.quantize(rows.to(DEVICE))
    assert expected.codes is not None
    assert torch.equal(codes.cpu(), expected.codes)
    torch.testing.assert_close(scale.cpu(), expected.scale, rtol=0, atol=0, equal_nan=True)
