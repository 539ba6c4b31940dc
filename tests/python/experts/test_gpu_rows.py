"""Rows with separate adapters on the GPU's share of the experts, compared with the engine
running each row alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.expert_layers import LayerCase, error, run_engine

from ktrt._core import Engine
from ktrt.engine.step_rows import ACTIVE, BASE, IDLE, RunningStep, StepRows
from ktrt.experts.gpu import static
from ktrt.experts.gpu.residents import GpuExperts, GpuLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt._core import MoeLayer

SAME = 5e-4  # as in test_gpu_arithmetic
E, K = 7, 3
RANKS = {0: (8, 3, 17), 1: (4, 4, 4), 3: (0, 16, 0)}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2, max_qlen=64)
    yield engine
    engine.close()


class Model:
    """A layer that holds three adapters, and the GPU's share of it."""

    def __init__(self, engine: Engine, weight_format: str = "bf16", resident: int = E) -> None:
        self.case = LayerCase(E, K, 160, 176)
        self.layer: MoeLayer = self.case.build(engine, weight_format)
        for number, ranks in RANKS.items():
            self.layer.load_lora(number, **self.case.make_lora(ranks))
        self.layer.activate_loras([1], [1.0])
        self.running = RunningStep()
        self.gpu = GpuExperts({"0": self.layer}, torch.device("cpu"), running=self.running)
        self.share: GpuLayer = self.gpu.layers["0"]
        if resident:
            self.gpu.select(resident)

    def alone(self, arguments: tuple[torch.Tensor, ...], adapters: list[int]) -> torch.Tensor:
        """The engine's result, each row by itself; what is active stays so."""
        before = self.layer.active_loras
        states, ids, weights = arguments
        found = []
        for row, number in enumerate(adapters):
            if number != ACTIVE:
                self.layer.activate_loras([number] if number >= 0 else [], [1.0] * (number >= 0))
            at = slice(row, row + 1)
            found.append(run_engine(self.layer, states[at], ids[at], weights[at]))
            self.layer.activate_loras([n for n, _ in before], [w for _, w in before])
        self.gpu.refresh()
        return torch.cat(found)


def mixed(count: int) -> list[int]:
    return [(0, BASE, 3, 1, ACTIVE)[row % 5] for row in range(count)]


def ids_of(adapters: list[int]) -> torch.Tensor:
    return torch.tensor(adapters, dtype=torch.int32)


@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 40])
@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
def test_each_row_has_its_own_adapter(engine: Engine, weight_format: str, tokens: int) -> None:
    model = Model(engine, weight_format)
    arguments, adapters = model.case.inputs(tokens, outside=True), mixed(tokens)
    expected = model.alone(arguments, adapters)
    found = model.share.forward_resident(*arguments, ids_of(adapters))
    assert error(found, expected) < SAME
    assert error(model.share.forward_streamed(*arguments, ids_of(adapters)), expected) < SAME


@pytest.mark.parametrize("weights", [(0.5, -2.0), (1.0, 1.0), (0.0, 1.0)], ids=str)
def test_the_active_sum_beside_others(engine: Engine, weights: tuple[float, float]) -> None:
    model = Model(engine)
    model.layer.activate_loras([0, 3], list(weights))
    model.gpu.refresh()
    arguments, adapters = model.case.inputs(9), mixed(9)
    expected = model.alone(arguments, adapters)
    assert error(model.share.forward_resident(*arguments, ids_of(adapters)), expected) < SAME


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_base_rows_have_the_bits_of_a_base_without_adapters(engine: Engine, tokens: int) -> None:
    model, base = Model(engine), Model(engine)
    base.layer.activate_loras([], [])
    base.gpu.refresh()
    arguments = model.case.inputs(tokens)
    adapters = [BASE if row % 2 == 0 else 0 for row in range(tokens)]
    found = model.share.forward_resident(*arguments, ids_of(adapters))
    assert torch.equal(found[::2], base.share.forward_resident(*arguments)[::2])


def noted(calls: list[str], name: str, function: Any, *args: Any) -> Any:
    calls.append(name)
    return function(*args)


@pytest.mark.parametrize("resident", [7, 60])
def test_both_static_forms(engine: Engine, monkeypatch: pytest.MonkeyPatch, resident: int) -> None:
    """Few tokens copy their experts, many read all residents; each form in pieces."""
    monkeypatch.setattr(static, "_PIECE", 4)
    case = LayerCase(60, K, 64, 96, ranks=(4, 4, 4))
    layer = case.build(engine, "bf16")
    gpu = GpuExperts({"0": layer}, torch.device("cpu"))
    gpu.select(resident)
    forms: list[str] = []
    for name in ("_of_chosen", "_of_all"):
        monkeypatch.setattr(static, name, partial(noted, forms, name, getattr(static, name)))
    for tokens in (1, 5, 30):
        states, ids, weights = case.inputs(tokens, outside=True)
        found = gpu.layers["0"].forward_resident(states, ids, weights)
        assert error(found, run_engine(layer, states, ids.where(ids < resident, -1), weights)) < (
            SAME
        )
    few = "_of_chosen" if resident == 60 else "_of_all"
    assert forms == ["_of_chosen", few, "_of_all"]


def test_what_is_not_a_number_stays_in_its_row(engine: Engine) -> None:
    model = Model(engine)
    states, ids, weights = model.case.inputs(9)
    adapters = ids_of(mixed(9))
    expected = model.share.forward_resident(states, ids, weights, adapters)
    states[1], ids[2] = torch.nan, -1
    weights[2] = torch.nan
    found = model.share.forward_resident(states, ids, weights, adapters)
    assert found[1].isnan().all()
    assert not found[2].any()
    rest = [0, 3, 4, 5, 6, 7, 8]
    assert torch.equal(found[rest], expected[rest])


def test_ids_change_in_place_as_in_a_captured_graph(engine: Engine) -> None:
    model = Model(engine)
    arguments, adapters = model.case.inputs(5), ids_of([0, 1, BASE, 3, IDLE])
    model.share.forward_resident(*arguments, adapters)
    adapters.copy_(ids_of([3, BASE, 0, 1, 0]))
    expected = model.alone(arguments, adapters.tolist())
    assert error(model.share.forward_resident(*arguments, adapters), expected) < SAME


def test_a_switch_of_adapters_leaves_the_memory(engine: Engine) -> None:
    """Graphs go on with other active adapters; they end with loading and unloading."""
    model = Model(engine)
    bank = model.share._bank
    assert bank is not None
    memory = {name: tensor.data_ptr() for name, tensor in bank.tensors().items()}

    def stale(ids: list[int], weights: list[float]) -> bool:
        version = model.gpu.version
        model.layer.activate_loras(ids, weights)
        model.gpu.refresh()
        return model.gpu.version != version

    assert not stale([0], [1.0])
    assert not stale([3, 1], [1.0, 1.0])
    assert stale([3], [0.5])  # one more operation
    assert not stale([0], [0.25])
    assert stale([], [])
    assert {name: t.data_ptr() for name, t in bank.tensors().items()} == memory
    version = model.gpu.version
    model.layer.unload_lora(3)
    model.gpu.refresh()
    assert model.gpu.version > version
    arguments = model.case.inputs(4)
    expected = model.alone(arguments, [0, 1, BASE, 0])
    found = model.share.forward_resident(*arguments, ids_of([0, 1, BASE, 0]))
    assert error(found, expected) < SAME


def test_decode_steps_are_never_streamed(engine: Engine) -> None:
    model = Model(engine)
    model.gpu.threshold = 1
    assert model.share.streams(4)
    assert not model.share.streams(1)
    batch = StepRows(4, 0)
    batch.batch = True
    for rows, streams in ((StepRows(4, 4), False), (StepRows(4, 2), True), (batch, False)):
        with model.running.running(rows):
            assert model.share.streams(4) == streams


def test_rows_that_stand_for_nothing(engine: Engine) -> None:
    """They are counted for no expert, and the GPU adds nothing."""
    model = Model(engine, resident=3)
    states, ids, weights = model.case.inputs(3)
    rows = StepRows(3, 0)
    rows.batch = True
    rows.adapters.copy_(ids_of([0, IDLE, BASE]))
    with model.running.running(rows):
        left = model.share.cpu_ids(ids)
        found = model.share.forward_resident(states, ids, weights, rows.adapters)
    assert (left[[0, 2]] == ids[[0, 2]].where(ids[[0, 2]] >= 3, -1)).all()
    assert sum(model.share.counts()) == 2 * K
    assert not found[1].any()
