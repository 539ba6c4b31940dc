"""Weight formats: the engine's traits, and the Python tables that must name the same formats."""

from __future__ import annotations

from typing import get_args

import pytest

from ktrt import _core
from ktrt.audit.verify.model import LIMITS
from ktrt.config.args import WEIGHT_FORMATS, KtBackend
from ktrt.engine import formats
from ktrt.engine.formats import (
    FORMATS,
    backend_of,
    code_bytes,
    format_named,
    format_of,
    joined,
    kt_name,
)
from ktrt.errors import KtrtError


def test_the_configuration_names_the_engines_formats() -> None:
    assert {each.kt_backend: kt_name(each.kt_backend) for each in FORMATS} == WEIGHT_FORMATS
    assert get_args(KtBackend) == (formats.AUTO, *WEIGHT_FORMATS)


def test_verification_has_limits_for_every_format() -> None:
    assert set(LIMITS) == {each.name for each in FORMATS}


def test_the_kernels_of_every_format_are_known() -> None:
    assert {each.kernel_family for each in FORMATS} <= set(_core.kernels())


@pytest.mark.parametrize("name", [each.name for each in _core.weight_formats()])
def test_sizes_are_those_of_the_engine(name: str) -> None:
    """One expert of odd sizes: codes, a scale per row, and in its image the sums of codes too."""
    rows, columns = 88, 160
    traits = format_named(name)
    layer = _core.MoeLayer(
        _core.Engine(num_threads=1, max_qlen=1), num_experts=1, top_k=1, hidden_size=columns,
        intermediate_size=rows, weight_format=traits.name,
    )  # fmt: skip
    shapes = [(rows, columns), (rows, columns), (columns, rows)]
    codes = sum(code_bytes(traits, *shape) for shape in shapes)
    scales = sum(traits.scale_bytes(*shape) for shape in shapes)
    assert layer.packed_bytes == codes + scales
    image = codes + scales + sum(traits.sum_bytes(*shape) for shape in shapes)
    assert image <= sum(layer.image_bytes) < image + 3 * 4096


def test_only_quantised_formats_have_scales() -> None:
    assert [each.name for each in FORMATS if formats.is_quantized(each)] == ["int8", "int4"]


@pytest.mark.parametrize(
    ("names", "backend"),
    [
        (["bf16"], "AMXBF16"),
        (["int8", "int8"], "AMXInt8"),
        (["bf16", "fp8"], "FP8"),
        (["fp8", "fp8_channel"], "FP8"),
        (["int4_g128", "int4_g32"], "RAWINT4"),
        (["fp8", "int4_g32", "bf16"], "auto"),
    ],
)
def test_layers_of_several_formats_have_one_name(names: list[str], backend: str) -> None:
    assert backend_of(names) == backend
    assert joined(names) == "+".join(sorted(set(names)))


def test_unknown_names() -> None:
    with pytest.raises(KtrtError, match="kt_backend: expected one of AMXBF16, .*, found bf16"):
        format_of("bf16")
    with pytest.raises(KtrtError, match="weight format: expected one of bf16, .*, found int2"):
        format_named("int2")
