"""The table of weight formats that the engine gives Python, against what its layers do."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from ktrt import _core

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
