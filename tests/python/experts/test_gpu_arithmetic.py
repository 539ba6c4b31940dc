"""The experts' arithmetic in torch, compared with the engine's and with float32."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.expert_layers import CodedCase, LayerCase, error, run_engine
from helpers.loras import apply_lora, apply_no_lora

from ktrt._core import Engine
from ktrt.experts.gpu import grouping
from ktrt.experts.gpu.arithmetic import (
    expert_outputs,
    grouped_rows,
    integer_product,
    make_rows,
)
from ktrt.experts.gpu.grouping import Grouping
from ktrt.experts.gpu.source import LayerSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt._core import MoeLayer

# Against the engine only the order of float32 sums differs, which may turn a rounding to bfloat16
# of an intermediate value; against float32 all roundings count.
SAME = 5e-4
TOLERANCE = {"bf16": 0.01, "int8": 0.04, "int4": 0.3}
FORMATS = ("bf16", "int8", "int4")


@pytest.fixture(scope="module", params=[None, [[0], [0]]], ids=["one part", "two parts"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(num_threads=2, max_qlen=64, nodes=request.param)
    yield engine
    engine.close()


def on_torch(
    layer: MoeLayer, states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    source = LayerSource(layer)
    grouping = Grouping(ids, weights, layer.num_experts, layer.hidden_size)
    rows = grouped_rows([states], source.quantized)
    grouping.add(range(layer.num_experts), source.bank(source.arrays), rows)
    return grouping.total()


SHAPES = [(1, 1, 160, 96), (9, 9, 160, 176), (4, 2, 64, 96), (5, 3, 96, 160)]
RANKS = [(0, 0, 0), (1, 1, 1), (8, 8, 8), (64, 64, 64), (3, 0, 5), (0, 17, 0)]


@pytest.mark.parametrize(("shape", "ranks"), list(product(SHAPES, RANKS)), ids=str)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_equals_engine_and_float32(
    engine: Engine,
    weight_format: str,
    shape: tuple[int, int, int, int],
    ranks: tuple[int, int, int],
) -> None:
    case = LayerCase(*shape, ranks=ranks)
    layer = case.build(engine, weight_format)
    arguments = case.inputs(13, outside=True)
    found = on_torch(layer, *arguments)
    assert error(found, run_engine(layer, *arguments)) < SAME
    assert error(found, case.reference(*arguments)) < TOLERANCE[weight_format]


@pytest.mark.parametrize("weight_format", FORMATS)
def test_sizes_beyond_one_block_of_the_layout(engine: Engine, weight_format: str) -> None:
    case = LayerCase(2, 2, 3840, 352, ranks=(8, 8, 8))
    layer = case.build(engine, weight_format)
    arguments = case.inputs(5)
    found = on_torch(layer, *arguments)
    assert error(found, run_engine(layer, *arguments)) < SAME
    assert error(found, case.reference(*arguments)) < TOLERANCE[weight_format]


@pytest.mark.parametrize("weight_format", FORMATS)
def test_up_shares_gates_a(engine: Engine, weight_format: str) -> None:
    case = LayerCase(3, 2, 64, 96, ranks=(8, 8, 4), share_a=True)
    layer = case.build(engine, weight_format)
    arguments = case.inputs(9)
    found = on_torch(layer, *arguments)
    assert error(found, run_engine(layer, *arguments)) < SAME
    assert error(found, case.reference(*arguments)) < TOLERANCE[weight_format]


# hidden and intermediate size of whole groups; FP8 blocks, tiles and strips are ragged.
CODED = {
    "fp8": (288, 176), "fp8_channel": (288, 176), "int4_g32": (288, 96), "int4_g64": (320, 192),
    "int4_g128": (256, 384), "mxfp4": (288, 96),
}  # fmt: skip
# The engine's AVX and portable kernels multiply exact codes and scale the sums; here, and on AMX, a
# weight is rounded to bfloat16 once, which is exact for MXFP4.
ROUNDED_WEIGHTS = {"mxfp4": SAME}


@pytest.mark.parametrize("ranks", [(0, 0, 0), (8, 3, 17)], ids=str)
@pytest.mark.parametrize("weight_format", CODED)
def test_coded_experts(engine: Engine, weight_format: str, ranks: tuple[int, int, int]) -> None:
    """The same numbers as bfloat16 experts with the dequantised weights."""
    case = CodedCase(5, 2, *CODED[weight_format], ranks=ranks, coded=weight_format)
    layer = case.build(engine, weight_format)
    source = LayerSource(layer)
    bank = source.bank(source.arrays)
    gate_up = torch.cat([case.weights["gate"], case.weights["up"]], 1)
    inner = bank.gate_up.unflatten(1, (2, -1))[:, :, : case.inner].flatten(1, 2)
    assert torch.equal(inner.float(), gate_up)
    down = bank.down[:, : case.hidden, : case.inner]
    assert torch.equal(down.float(), case.weights["down"])
    arguments = case.inputs(13, outside=True)
    found = on_torch(layer, *arguments)
    assert error(found, run_engine(case.build(engine, "bf16"), *arguments)) < SAME
    limit = ROUNDED_WEIGHTS.get(weight_format, 6e-3)
    assert error(found, run_engine(layer, *arguments)) < limit
    assert error(found, case.reference(*arguments)) < TOLERANCE["bf16"]


FORMS: dict[str, dict[str, Any]] = {
    "gpt-oss": {"alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.5, "up_offset": 1.0},
    "clamped": {"gate_limit": 0.7, "up_limit": 0.5},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "relu2 without gate": {"activation": "relu2", "has_gate": False},
    "softcap": {"activation": "softcap_silu", "gate_limit": 0.9, "up_limit": 0.8},
}


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("form", FORMS)
def test_every_activation_and_biases(engine: Engine, form: str, biased: bool) -> None:
    for weight_format in ("bf16", "int8", "mxfp4"):
        case = LayerCase(5, 2, 96, 80, ranks=(4, 8, 4), form=FORMS[form], biased=biased)
        layer = case.build(engine, weight_format)
        arguments = case.inputs(13, outside=True)
        expected = run_engine(layer, *arguments)
        assert error(on_torch(layer, *arguments), expected) < SAME
        plain = LayerCase(5, 2, 96, 80, ranks=(4, 8, 4), form={"has_gate": "gate" in case.weights})
        assert error(run_engine(plain.build(engine, weight_format), *arguments), expected) > 0.02


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("terms", [96, 1024, 1025, 4096])
def test_long_int8_sums_are_exact(terms: int, rows: int) -> None:
    """Large codes of one sign: from 1,041 terms on, float32 cannot hold the sums on the way."""
    generator = torch.Generator().manual_seed(terms)
    left, right = (torch.randint(100, 128, (n, terms), generator=generator) for n in (rows, 56))
    expected = (left @ right.T).float()
    assert torch.equal(integer_product(left.bfloat16(), right.bfloat16()), expected)
    assert torch.equal(integer_product(left.to(torch.int8), right.to(torch.int8)), expected)


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
def test_rows_in_parts_are_the_same_rows(weight_format: str) -> None:
    states = torch.randn(40, 96)
    whole = grouped_rows([states], weight_format == "int8")
    parts = grouped_rows(list(states.split([7, 13, 20])), weight_format == "int8")
    for found, expected in ((parts.codes, whole.codes), (parts.scale, whole.scale)):
        assert (found is None) == (expected is None) == (weight_format == "bf16")
        assert found is None or expected is None or torch.equal(found, expected)
    assert torch.equal(parts.values, whole.values)


def test_int8_without_lora_gives_the_engines_bits(engine: Engine) -> None:
    case = LayerCase(6, 3, 160, 176)
    layer = case.build(engine, "int8")
    arguments = case.inputs(16, outside=True)
    found, expected = on_torch(layer, *arguments), run_engine(layer, *arguments)
    # SiLU is another polynomial, whose last bit seldom survives the rounding to bfloat16.
    assert float((found == expected).float().mean()) > 0.9
    assert error(found, expected) < SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_input_dtypes(engine: Engine, dtype: torch.dtype) -> None:
    case = LayerCase(4, 2, 64, 96, ranks=(4, 4, 4))
    layer = case.build(engine, "int8")
    states, ids, weights = case.inputs(7, dtype)
    found = on_torch(layer, states, ids, weights.to(dtype))
    assert error(found, run_engine(layer, states.float(), ids, weights.to(dtype))) < SAME


def test_special_rows_as_in_the_engine(engine: Engine) -> None:
    """Zeros, values too small to quantise, infinity and NaN, each among ordinary rows."""
    case = LayerCase(2, 1, 64, 64)
    for weight_format in FORMATS:
        layer = case.build(engine, weight_format)
        states, ids, weights = case.inputs(6)
        states[0] = 0
        states[1] = 1e-39
        states[2, 5] = torch.inf
        states[3, 6] = torch.nan
        found = on_torch(layer, states, ids, weights)
        expected = run_engine(layer, states, ids, weights)
        assert torch.equal(found.isfinite().all(1), expected.isfinite().all(1))
        assert found[2:4].isfinite().logical_not().any(1).all()
        keep = [0, 1, 4, 5]
        assert error(found[keep], expected[keep]) < SAME


def test_weights_of_slots_without_expert_do_not_count(engine: Engine) -> None:
    case = LayerCase(2, 2, 64, 64)
    layer = case.build(engine, "bf16")
    states, ids, weights = case.inputs(3)
    ids[:, 1] = -1
    weights[:, 1] = torch.nan
    assert error(on_torch(layer, states, ids, weights), run_engine(layer, states, ids, weights)) < (
        SAME
    )


@pytest.mark.parametrize("most", [1, 2, 5, 1000])
def test_rows_are_computed_in_pieces(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    case = LayerCase(4, 2, 64, 96, ranks=(8, 8, 8))
    layer = case.build(engine, "int8")
    arguments = case.inputs(11, outside=True)
    expected = on_torch(layer, *arguments)
    monkeypatch.setattr(grouping, "_MOST_ROWS", most)
    assert error(on_torch(layer, *arguments), expected) < SAME


def test_no_tokens(engine: Engine) -> None:
    case = LayerCase(2, 2, 64, 64)
    layer = case.build(engine, "int8")
    states, ids, weights = case.inputs(1)
    assert on_torch(layer, states[:0], ids[:0], weights[:0]).shape == (0, 64)


def test_several_experts_at_once_equal_each_alone(engine: Engine) -> None:
    case = LayerCase(5, 2, 64, 96, ranks=(8, 0, 8))
    for weight_format in FORMATS:
        source = LayerSource(case.build(engine, weight_format))
        bank = source.bank(source.arrays)
        rows = make_rows(case.inputs(3)[0], source.quantized)
        chosen = torch.tensor([4, 1, 4])
        together = expert_outputs(rows.take(torch.tensor([[0], [1], [2]])), bank.take(chosen))
        for at, expert in enumerate(chosen.tolist()):
            one = [(expert, slice(0, 1))]
            alone = expert_outputs(rows.take(torch.tensor([at])), bank, one)
            assert error(together[at], alone) < SAME


def test_views_outlive_the_engine() -> None:
    engine = Engine(num_threads=1)
    source = LayerSource(LayerCase(2, 1, 64, 64).build(engine, "bf16"))
    before = source.arrays["codes0"].clone()
    engine.close()
    assert torch.equal(source.arrays["codes0"], before)


def test_a_new_lora_is_noticed_and_the_old_one_stays() -> None:
    engine = Engine(num_threads=1)
    case = LayerCase(2, 1, 64, 64, ranks=(4, 4, 4))
    layer = case.build(engine, "bf16")
    source = LayerSource(layer)
    old = source.arrays["gate_b@0"].clone()
    apply_lora(layer, **case.make_lora((8, 8, 8)))
    assert source.stale
    assert torch.equal(source.arrays["gate_b@0"], old)
    assert source.refresh_lora()
    assert not source.stale
    assert source.arrays["gate_b@0"].shape[1] == 2 * old.shape[1]
    apply_no_lora(layer)
    assert source.stale
    assert not source.refresh_lora()  # it is held still
    layer.unload_lora(0)
    assert source.refresh_lora()
    assert set(source.arrays) == {"codes0"}
    engine.close()


def test_an_incomplete_layer_is_refused() -> None:
    engine = Engine(num_threads=1)
    case = LayerCase(2, 1, 64, 64)
    layer = case.build(engine, "bf16")
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.load_expert(1, *torch.full((3, 64, 64), torch.nan))
    with pytest.raises(ValueError, match="expert 1 has not been loaded"):
        LayerSource(layer)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        LayerSource(layer)
