"""CPU and GPU share the experts of a streamed layer, on the CPU device and (KTRT_TEST_GPU=1) on a
GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.expert_layers import LayerCase, error, run_engine

from ktrt._core import Engine
from ktrt.experts.gpu.blocks import Call
from ktrt.experts.gpu.costs import measure_gpu, measure_rates, streaming_threshold
from ktrt.experts.gpu.residents import GpuExperts
from ktrt.experts.gpu.sharing import Lead, Rates, lead_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt._core import MoeLayer

# V2-Lite's INT8 layer on an H200 and 16 cores.
H200 = Rates(64, 6, copied=160e-6, token=0.95e-6, expert=35e-6, row=1e-6, most_tokens=4096)
E, K, TOKENS = 7, 3, 40
SAME = 2e-3


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2, max_qlen=64)
    yield engine
    engine.close()


class TestRates:
    def test_both_ends_finish_together(self) -> None:
        """Shares of the faster way alone."""
        for tokens, share in ((1024, 0.62), (2048, 0.7), (4096, 0.85)):
            seconds, streamed = H200.even(tokens)
            rows = tokens * 6 * (64 - streamed) / 64
            assert streamed * H200.copied == pytest.approx(seconds, rel=0.06)
            assert H200.engine(tokens, 64 - streamed, rows) == pytest.approx(seconds, rel=0.06)
            alone = min(64 * H200.copied, H200.engine(tokens, 64, tokens * 6))
            assert seconds < share * alone

    def test_the_busiest_are_streamed(self) -> None:
        rows = [9, 0, 400, 30, 5, 400, 300, 0]
        rates = Rates(8, 2, copied=100.0, token=0.0, expert=0.0, row=1.0, most_tokens=4096)
        assert rates.split(572, rows, range(8)) == [2, 5, 6]
        assert rates.split(572, rows, [0, 1, 3, 4, 7]) == []  # 44 on the CPU, a copy takes 100
        assert rates.split(572, [0] * 8, range(8)) == []

    def test_not_where_it_does_not_win(self) -> None:
        assert lead_of(H200, 1024) == Lead(8, 8)
        assert lead_of(H200, 4097) is None  # more than one engine call
        assert lead_of(replace(H200, row=1e-4), 4096) is None  # a slow CPU
        assert lead_of(replace(H200, other=4e-3), 4096) is None
        assert lead_of(replace(H200, copied=1e-6), 1024) is None  # a fast bus

    def test_the_threshold_counts_on_it(self) -> None:
        from ktrt.experts.gpu.costs import Line

        cpu, gpu = Line((512, 6e-3), (4096, 31e-3)), Line((256, 10.2e-3), (4096, 10.6e-3))
        alone = streaming_threshold(cpu, gpu, 4096)
        assert 1024 < alone < 1400
        assert streaming_threshold(cpu, gpu, 4096, H200) <= 512


class Model:
    def __init__(self, engine: Engine, device: torch.device, weight_format: str) -> None:
        self.cases = [LayerCase(E, K, 96, 64, ranks=(8, 3, 17), seed=seed) for seed in range(3)]
        self.layers = [case.build(engine, weight_format) for case in self.cases]
        layers = {str(index): layer for index, layer in enumerate(self.layers)}
        self.gpu, self.device = GpuExperts(layers, device), device
        # An expert is copied in the time of 20 rows: two or three are left to the engine.
        self.gpu.rates = Rates(E, K, 20.0, 0.0, 0.0, 1.0, most_tokens=TOKENS)

    def forward(self, index: int, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        share = list(self.gpu.layers.values())[index]
        return share.forward_streamed(*(each.to(self.device) for each in arguments))


def experts_of(layer: MoeLayer) -> int:
    return layer.last_experts


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
def test_shared_equals_the_engine(
    engine: Engine, device: torch.device, weight_format: str, resident: int
) -> None:
    model = Model(engine, device, weight_format)
    model.gpu.select(resident)
    for _ in range(2):
        for index, (case, layer) in enumerate(zip(model.cases, model.layers, strict=True)):
            arguments = case.inputs(TOKENS, outside=True)
            expected = run_engine(layer, *arguments)
            found = model.forward(index, arguments)
            assert 0 < experts_of(layer) < E - resident
            assert error(found, expected) < SAME
    model.gpu.close()


def test_shared_by_row_and_in_calls(engine: Engine, device: torch.device) -> None:
    model = Model(engine, device, "int8")
    states, ids, weights = model.cases[0].inputs(TOKENS)
    adapters = torch.tensor([-1, 0] * (TOKENS // 2), dtype=torch.int32)
    layer, share = model.layers[0], next(iter(model.gpu.layers.values()))
    expected = torch.empty_like(states)
    layer.forward(states, ids, weights, expected, adapters)
    arrays = [each.to(device).split([24, 16]) for each in (states, ids, weights, adapters)]
    found = share.streamed([Call(share, *part) for part in zip(*arrays, strict=True)])
    assert experts_of(layer) < E
    assert error(torch.cat(found).cpu(), expected) < SAME
    model.gpu.close()


def test_an_error_of_the_engine_is_raised(engine: Engine, device: torch.device) -> None:
    model = Model(engine, device, "bf16")
    states, ids, weights = model.cases[0].inputs(TOKENS)
    share = next(iter(model.gpu.layers.values()))
    nobody = torch.full((TOKENS,), 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="5"):
        share.streamed([Call(share, *(e.to(device) for e in (states, ids, weights, nobody)))])
    expected = run_engine(model.layers[0], states, ids, weights)
    assert error(model.forward(0, (states, ids, weights)), expected) < SAME
    model.gpu.close()


def test_rates_are_measured(engine: Engine, device: torch.device) -> None:
    model = Model(engine, device, "bf16")
    share, layer = next(iter(model.gpu.layers.values())), model.layers[0]
    line = measure_gpu(model.gpu, share, layer)
    rates = measure_rates(model.gpu, share, layer, line, 64)
    assert (rates.experts, rates.top_k, rates.most_tokens) == (E, K, 64)
    assert rates.copied > 0 <= min(rates.token, rates.expert, rates.row, rates.other)
    assert model.gpu.rates is not rates
    model.gpu.close()
