"""Residents that follow the routing, on the CPU device: every step is compared with the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.expert_layers import DEVICES, CodedCase, LayerCase, error, run_engine
from helpers.loras import apply_lora

from ktrt._core import Engine
from ktrt.engine.step_rows import BASE, RunningStep, StepRows
from ktrt.experts import KTExperts
from ktrt.experts.gpu import following, residents
from ktrt.experts.gpu.following import MOST_COPIES, Swap, UseRates, prompt_swaps
from ktrt.experts.gpu.residents import GpuExperts
from ktrt.experts.gpu.stream import HostLane
from ktrt.generate.forwards import set_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SAME = 2e-3  # as in test_gpu_residents, ONE_CODE
E, K = 9, 3


class LateLane(HostLane):
    """Runs a copy only when somebody looks for its end the second time: steps pass meanwhile."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._waiting: list[list[Any]] = []

    def run(self, work: Callable[[], None], _after: Any, /) -> Any:
        self._waiting.append([2, work])
        return self._waiting[-1]

    def done(self, event: Any, /) -> bool:
        if event is None:
            return True
        event[0] -= 1
        if event[0] == 0:
            event[1]()
        return bool(event[0] <= 0)

    def close(self) -> None:
        for each in self._waiting:
            if each[0] > 0:
                each[0] = 0
                each[1]()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=1, max_qlen=64)
    yield engine
    engine.close()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":
        monkeypatch.setattr(residents, "make_lane", lambda _device: LateLane())
    monkeypatch.setattr(following, "HALF_LIFE", 3)  # short conversations are enough
    return torch.device(request.param)


class Model:
    """Layers whose residents follow."""

    def __init__(
        self, engine: Engine, device: torch.device, weight_format: str = "bf16", **case: Any
    ) -> None:
        self.device = device
        kind: Any = CodedCase if "coded" in case else LayerCase
        sizes = (288, 96) if "coded" in case else (96, 64)
        self.cases = [kind(E, K, *sizes, seed=seed, **case) for seed in range(2)]
        self.layers = [each.build(engine, weight_format) for each in self.cases]
        self.running = RunningStep()
        self.gpu = GpuExperts(
            {f"layers.{i}": layer for i, layer in enumerate(self.layers)},
            device, running=self.running,
        )  # fmt: skip
        self.gpu.pin()
        self.gpu.select(3)
        self.following = self.gpu.follow()
        self.shares = list(self.gpu.layers.values())
        self.modules = []
        for layer, share in zip(self.layers, self.shares, strict=True):
            self.modules.append(module := KTExperts())
            module.attach(layer, engine.max_qlen, running=self.running)
            module.gpu = share

    def step(self, likely: Sequence[int], tokens: int = 1) -> None:
        """A step that chooses among ``likely``, compared with the engine; then residents move."""
        for case, layer, module in zip(self.cases, self.layers, self.modules, strict=True):
            states, _, weights = case.inputs(tokens)
            ids = torch.stack([torch.tensor(likely)[torch.randperm(len(likely))[:K]]] * tokens)
            found = module(*(each.to(self.device) for each in (states, ids, weights)))
            assert error(found, run_engine(layer, states, ids, weights)) < SAME
        self.following.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # as the host does, to sample

    def close(self) -> None:
        self.gpu.close()


# gpt-oss': clamped, with biases.
FORM = {"alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.5, "up_offset": 1.0}


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "mxfp4"])
def test_residents_follow_the_routing(
    engine: Engine, device: torch.device, weight_format: str
) -> None:
    """During the swaps too, no expert is computed twice or left out; with LoRA, biases, clamps."""
    coded = {"coded": weight_format} if weight_format == "mxfp4" else {}
    model = Model(engine, device, weight_format, ranks=(8, 3, 17), form=FORM, biased=True, **coded)
    version, address = model.gpu.version, model.shares[0].bank.down.data_ptr()
    for likely in ((3, 4, 5, 6), (8, 7, 6), (0, 2, 8)):
        for _ in range(16):
            model.step(likely)
        model.following.settle()
        assert all(set(share.experts) <= set(likely) for share in model.shares)
    # Captured graphs stay valid.
    assert (model.gpu.version, model.shares[0].bank.down.data_ptr()) == (version, address)
    numbers = model.following.numbers
    assert numbers.hits + numbers.misses == 2 * K * (3 * 16 - 1)  # counts come a step late
    assert numbers.hits > numbers.misses > 0
    assert (
        numbers.evictions
        == numbers.uploads
        == numbers.upload_bytes / model.gpu.layer_bytes("layers.0") * E
    )
    model.close()


def test_lora_changes_during_a_swap(engine: Engine, device: torch.device) -> None:
    model = Model(engine, device, ranks=(8, 3, 17))
    for step in range(30):
        if step % 4 == 3:
            for case, layer in zip(model.cases, model.layers, strict=True):
                case.seed += 1
                apply_lora(layer, **case.make_lora((8, 3, 17) if step % 8 == 3 else (4, 4, 4)))
        model.step((5, 6, 7, 8))
    assert model.following.numbers.uploads >= 6
    model.gpu.select(4)  # another bank
    for _ in range(12):
        model.step((1, 7, 8))
    model.gpu.stay()
    assert set(model.shares[0].experts) >= {1, 7, 8}
    model.step((1, 7, 8))
    model.close()


def test_rows_with_separate_adapters(engine: Engine, device: torch.device) -> None:
    model = Model(engine, device, ranks=(8, 3, 17))
    rows = StepRows(3, 3, device)
    set_adapters(rows, [0, BASE, 0])
    for step in range(16):
        for case, layer, module in zip(model.cases, model.layers, model.modules, strict=True):
            states, _, weights = case.inputs(3)
            ids = torch.tensor([[4, 5, 6], [5, 6, 7], [7, 6, 4]])
            with model.running.running(rows):
                found = module(*(each.to(device) for each in (states, ids, weights)))
            out = torch.empty_like(states)
            layer.forward(states, ids, weights, out, rows.adapters)
            assert error(found, out) < SAME, step
        model.following.step()
    assert model.following.numbers.uploads
    model.close()


def test_a_streamed_prompt_leaves_its_experts(engine: Engine, device: torch.device) -> None:
    model = Model(engine, device, "int8", ranks=(8, 3, 17))
    model.gpu.threshold = 2
    model.gpu.stream._piece_bytes = 2 * model.gpu.source("layers.0").expert_bytes
    for likely in ((8, 1, 6), (6, 2, 3, 4), (0, 1, 2)):
        for _ in range(9):  # a copy may be on its way
            model.step((5, 7, 8))
        model.step(likely[:3], tokens=11)
        model.following.settle()
        assert all(set(share.experts) <= set(likely) for share in model.shares)
        assert model.shares[1].experts == tuple(
            int(each) for each in model.gpu.places[1].argsort()[-3:]
        )
        model.step(likely[:3])
    numbers = model.following.numbers
    assert numbers.adopted >= 6
    assert numbers.evictions == numbers.adopted + numbers.uploads
    model.close()


def test_use_rates() -> None:
    rates = UseRates([4, 3])
    assert rates.swaps(np.zeros((2, 4), bool), 9) == []
    resident = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
    rates.add(np.array([[0, 20, 30, 50], [50, 0, 0, 50]]), 50)
    # The most gained first; the third layer's fourth expert is none.
    assert rates.swaps(resident, MOST_COPIES) == [Swap(0, 0, 3)]
    rates.add(np.array([[0, 20, 30, 50], [10, 0, 40, 0]]), 50)
    assert rates.swaps(resident, MOST_COPIES) == [Swap(0, 0, 3), Swap(1, 1, 2)]
    assert rates.swaps(resident, 1) == [Swap(0, 0, 3)]
    # Too little to gain.
    assert rates.swaps(np.array([[0, 0, 1, 1], [1, 0, 1, 0]], bool), MOST_COPIES) == []
    for _ in range(100):
        rates.add(np.array([[1, 1, 0, 0], [1, 1, 0, 0]]), 1)
    assert rates.swaps(resident, MOST_COPIES) == []


def test_prompt_swaps() -> None:
    assert prompt_swaps([5, 0, 3, 9, 0], [0, 1]) == [(1, 3)]
    assert prompt_swaps([5, 0, 3, 9, 0], [3, 0]) == []
    assert prompt_swaps([1, 1, 1, 1], [3, 1]) == []  # nothing gained
    assert prompt_swaps([0, 0, 7, 8], [0, 1]) == [(1, 3), (0, 2)]
