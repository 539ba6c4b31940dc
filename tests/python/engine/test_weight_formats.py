"""The table of weight formats that the engine gives Python, against what its layers do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import pytest
import torch

from ktrt import _core
from ktrt.loading.pack_manifest import INT4_SEARCH

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, INTERMEDIATE = 160, 96


def up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@pytest.mark.parametrize("row", _core.weight_formats(), ids=lambda row: row.name)
def test_a_layer_takes_what_its_row_says(row: _core.WeightFormat) -> None:
    engine = _core.Engine(num_threads=1)
    layer = _core.MoeLayer(
        engine,
        num_experts=1,
        top_k=1,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        weight_format=row.name,
    )
    assert layer.weight_format == row.name
    wide, tall = torch.randn(INTERMEDIATE, HIDDEN), torch.randn(HIDDEN, INTERMEDIATE)
    layer.load_expert(0, wide, wide, tall)
    codes = scales = 0
    for rows, columns in (wide.shape, wide.shape, tall.shape):
        strips, tiles = up(rows, 32) // 32, up(columns, row.tile_columns) // row.tile_columns
        codes += strips * tiles * (2048 + row.tile_scale_bytes)
        if row.name == "fp8":
            scales += 4 * strips * (up(columns, 128) // 128)
        elif row.name != "bf16" and not row.tile_scale_bytes:
            scales += 4 * strips * 32
    names: tuple[Literal["gate", "up", "down"], ...] = ("gate", "up", "down")
    assert sum(len(layer.packed_codes(0, name)) for name in names) == codes
    assert sum(len(layer.packed_scales(0, name)) for name in names) == scales
    assert layer.packed_bytes == codes + scales
    assert layer.image_bytes == [
        up(codes, 4096) + up(scales, 4096) + up(scales * row.quantizes_rows, 4096)
    ]
    engine.close()


def test_rows_are_told_apart_and_cannot_be_written() -> None:
    rows = _core.weight_formats()
    assert [row.name for row in rows] == [
        "bf16", "int8", "int4", "fp8", "fp8_channel", "int4_g32", "int4_g64", "int4_g128", "mxfp4",
    ]  # fmt: skip
    assert [row.kt_backend for row in rows] == [
        "AMXBF16", "AMXInt8", "AMXInt4", "FP8", "FP8", *["RAWINT4"] * 3, "MXFP4",
    ]  # fmt: skip
    for row in rows:
        assert row.kernel_family in _core.kernels()
        assert row.block_columns % row.tile_columns == 0
        with pytest.raises(AttributeError):
            row.bits = 3  # type: ignore[misc]


LARGEST = {"fp8": 448.0, "fp8_channel": 448.0, "mxfp4": 6.0}


@pytest.mark.parametrize(
    "row", [r for r in _core.weight_formats() if r.coded], ids=lambda r: r.name
)
def test_scales_whose_products_are_not_finite_are_refused(row: _core.WeightFormat) -> None:
    """The largest power of two that is accepted gives the largest code a finite value."""
    engine = _core.Engine(num_threads=1)
    layer = _core.MoeLayer(
        engine, num_experts=1, top_k=1, hidden_size=128, intermediate_size=128,
        weight_format=row.name,
    )  # fmt: skip
    codes = torch.zeros(128, 128 * row.bits // 8, dtype=torch.uint8)

    def load(exponent: float) -> None:
        shape = {"fp8": (4, 1), "fp8_channel": (128,)}.get(row.name, (128, 128 // (row.group or 1)))
        scales = torch.ones(shape)
        scales[-1] = 2.0**exponent if exponent < 128 else float("nan")
        if row.name == "mxfp4":
            stored = torch.full(shape, 127, dtype=torch.uint8)
            stored[-1] = int(exponent) + 127
            scales = stored
        elif row.bits == 4:
            scales = scales.bfloat16()
        plain = (codes, torch.full_like(scales, 1 if row.name != "mxfp4" else 127))
        layer.load_coded_expert(0, plain, plain, (codes, scales))

    last = math.floor(math.log2(torch.finfo(torch.float32).max / LARGEST.get(row.name, 8.0)))
    load(last)
    for bad in (last + 1, 127, 128):
        with pytest.raises(ValueError, match="down codes of expert 0: a code is NaN, or a scale"):
            load(bad)
    engine.close()


def test_caches_know_the_search_of_int4_scales(tmp_path: Path) -> None:
    """The scales that the search finds for fixed weights. If they change on purpose, raise
    ``INT4_SEARCH``: caches of the last search must not be used."""
    assert INT4_SEARCH == 1
    engine = _core.Engine(num_threads=1)
    layer = _core.MoeLayer(
        engine, num_experts=1, top_k=1, hidden_size=128, intermediate_size=128,
        weight_format="int4_g32",
    )  # fmt: skip
    steps = torch.arange(128 * 128, dtype=torch.int64).view(128, 128)
    weights = (steps * 7919 % 1009 - 504).float() ** 3 / 2**24
    layer.load_expert(0, weights, weights, weights)
    with (tmp_path / "image").open("wb") as file:
        assert layer.write_image(0, file.fileno()) == 11031906133039061136
    engine.close()
