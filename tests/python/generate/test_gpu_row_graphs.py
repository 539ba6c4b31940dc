"""Decode steps of many rows whose experts are shared between the engine, through a hand-off, and a
GPU. On the CPU device, over stand-in streams and graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_streams import FakeCore, FakeGraphs, fake_hand_off
from helpers.tiny_models import LoraPlan, save_adapter, save_model, token_ids

import ktrt.loading.model
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.engine.step_rows import BASE
from ktrt.experts import GpuExperts, KTExperts
from ktrt.generate.step import Span, Step
from ktrt.loading.model import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ktrt._core import Engine
    from ktrt.generate.row_graphs import RowGraphs
    from ktrt.generate.runner import ModelRunner
    from ktrt.kv.pool import Slot

IDS = [ids.tolist() for ids in token_ids(4, 40)]
LENGTHS = (5, 9, 7, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "model", "deepseek_v2", 96)
    for number, rank in enumerate((4, 8, 3)):
        save_adapter(folder / f"lora{number}", folder / "model", "a", LoraPlan(rank=rank))
    return folder


def load(folder: Path) -> LoadedModel:
    loaded = load_model(
        ModelArgs(folder / "model", infer_dtype="float32"),
        AdapterArgs(folder / "lora0"),
        ExpertArgs(kt_num_threads=1),
    )
    for number in (1, 2):
        loaded.adapters.load(f"lora{number}", folder / f"lora{number}")
    # As on a GPU.
    loaded.runner._mixed = None
    return loaded


class Pair:
    """The model with a hand-off and graphs, and without, with the same sequences in the slots."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, resident: int) -> None:
        self.plain = load(folder)
        self.core: FakeCore
        self.maker: FakeGraphs

        def new_hand_off(engine: Engine, _device: torch.device) -> Any:
            hand_off, self.core = fake_hand_off(engine.max_qlen)
            self.maker = FakeGraphs(self.core)
            return hand_off

        def build(
            modules: Mapping[str, KTExperts], device: torch.device, _args: ExpertArgs, _most: int,
            *step: Any,
        ) -> GpuExperts | None:  # fmt: skip
            if not resident:
                return None
            layers = {path: module.layer for path, module in modules.items()}
            gpu = GpuExperts(layers, device, running=step[0], masks=step[1])
            gpu.select(resident)
            for path, module in modules.items():
                module.gpu = gpu.layers[path]
            return gpu

        patch.setattr(ktrt.loading.model, "new_hand_off", new_hand_off)
        patch.setattr(ktrt.loading.model, "CudaGraphs", lambda: self.maker)
        patch.setattr(ktrt.loading.model, "build_gpu_experts", build)
        self.loaded = load(folder)
        self.runners: list[ModelRunner] = [self.loaded.runner, self.plain.runner]
        self.slots: list[list[Slot]] = [
            [runner.pool.open(row, ids[:1]) for row, ids in enumerate(IDS)]
            for runner in self.runners
        ]

    @property
    def graphs(self) -> RowGraphs:
        alone = self.loaded.runner._alone
        assert alone is not None
        assert alone.rows is not None
        return alone.rows

    def spans(self, which: int, adapters: Sequence[int], counts: Sequence[int]) -> list[Span]:
        found = []
        for slot, ids, adapter, count in zip(self.slots[which], IDS, adapters, counts, strict=True):
            new = ids[slot.length : slot.length + count]
            if new:
                found.append(Span(slot=slot, ids=new, adapter=adapter))
        return found

    def compare(self, adapters: Sequence[int], counts: Sequence[int] = (1, 1, 1, 1)) -> None:
        """The next tokens: in one step, and one sequence after the other."""
        found = torch.cat(self.runners[0].run(Step(tuple(self.spans(0, adapters, counts)))))
        alone = [self.runners[1].run(Step((span,)))[0] for span in self.spans(1, adapters, counts)]
        expected = torch.cat(alone)
        assert (found - expected).norm() <= 2e-3 * expected.norm()


@pytest.fixture(params=[0, 2, 100], ids=["hand-off", "two residents", "all on the GPU"])
def pair(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Pair]:
    monkeypatch.setattr(ktrt.loading.model, "_device", lambda: torch.device("cpu"))
    pair = Pair(folder, monkeypatch, request.param)
    yield pair
    pair.loaded.close()
    pair.plain.close()


def test_four_rows_with_their_own_adapters_are_one_graph(pair: Pair) -> None:
    pair.compare([0, BASE, 2, 1], LENGTHS)
    pair.compare([0, BASE, 2, 1])
    assert (pair.maker.captures, pair.graphs.count) == (1, 1)
    forwards: list[int] = []
    pair.loaded.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for adapters in ([0, BASE, 2, 1], [BASE, 1, BASE, 0], [2, 2, 2, 2]):
        pair.compare(adapters)
    assert pair.maker.captures == 1
    assert len(forwards) == 3  # the stand-in's replays


def test_rows_that_do_not_take_part(pair: Pair) -> None:
    pair.compare([0, BASE, 2, 1], LENGTHS)
    pair.compare([0, BASE, 2, 1])
    for counts in ([1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]):
        pair.compare([0, BASE, 2, 1], counts)
    assert pair.maker.captures <= 3


def test_an_adapter_that_is_loaded_later(pair: Pair, folder: Path) -> None:
    """Graphs end with it, and the rows of the others stay as they were."""
    pair.compare([0, BASE, 2, 1], LENGTHS)
    pair.compare([0, BASE, 2, 1])
    for loaded in (pair.loaded, pair.plain):
        loaded.adapters.load("later", folder / "lora1")
    pair.compare([0, 3, 2, 1])
    assert pair.maker.captures == 2
