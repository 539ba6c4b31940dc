"""The rest of a GPU's warm-up, on stand-ins: steps of many rows, torch's allocator."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_streams import FakeGraphs
from helpers.tiny_chat import make_model, make_tokenizer

from ktrt.engine.step_rows import RunningStep
from ktrt.generate import device_memory, warm_up
from ktrt.generate.device_memory import DeviceMemory, let_segments_grow
from ktrt.generate.graphs import DecodeGraphs, NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.generate.step import Span, Step

if TYPE_CHECKING:
    from collections.abc import Callable

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model(make_tokenizer())


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "_on_gpu", lambda _cache: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("rows", "adapters", "captures"),
    [(1, 0, 1), (2, 0, 1), (5, 0, 3), (32, 0, 5), (2, 1, 1 + 2), (4, 1, 2 + 3)],
)
def test_steps_of_rows_are_captured(llama: Any, rows: int, adapters: int, captures: int) -> None:
    """2, 4, 8 … rows, as many as the conversations that may run at once need, at least 2; by row
    (1, 2, 4 …) where adapters are resident. Nothing is held afterwards, and the graph of one
    conversation stays."""
    running, maker, one = RunningStep(), FakeGraphs(), FakeGraphs()
    runner = ModelRunner(
        llama, partial(DecodeGraphs, llama, handoff=NoHandOff(), maker=one), running=running,
        row_graphs=partial(RowGraphs, llama, handoff=NoHandOff(), maker=maker), capacity=64,
    )  # fmt: skip
    runner._on_cpu = False
    runner.active_set.numbers = frozenset(range(adapters))
    cache = KvCache(llama, runner=runner)
    warm_up.warm_up(cache, 64, rows)
    assert (maker.captures, one.captures > 0) == (captures, True)
    assert not any(slot.length for slot in runner.pool.slots)
    cache.close()
    assert not runner.pool.slots_in_use
    if rows == 32:
        slots = [runner.pool.open("later", ()) for _ in range(9)]
        for some in (slots[2:6], slots[7:], slots):
            runner.run(Step(tuple(Span(slot=slot, ids=[5]) for slot in some)))
        assert maker.captures == captures


class Memory:
    """torch.cuda.memory's settings."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.settings = error, list[str]()

    def _set_allocator_settings(self, settings: str) -> None:
        if self.error is not None:
            raise self.error
        self.settings.append(settings)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], Memory]:
    for name in device_memory._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device_memory, "has_device_memory", lambda _device: True)

    def put(error: Exception | None = None) -> Memory:
        made = Memory(error)
        monkeypatch.setattr(device_memory, "_set_allocator", made._set_allocator_settings)
        return made

    return put


def test_segments_grow(
    memory: Callable[..., Memory], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = memory()
    let_segments_grow(torch.device("cpu"))
    assert not made.settings
    let_segments_grow(CUDA)
    assert made.settings == ["expandable_segments:True"]
    caplog.set_level(logging.INFO)
    memory(RuntimeError("unknown setting"))
    let_segments_grow(CUDA)
    assert "segments of GPU memory do not grow: unknown setting" in caplog.text
    made = memory()
    monkeypatch.setattr(device_memory, "has_device_memory", lambda _device: False)
    let_segments_grow(CUDA)
    monkeypatch.setattr(device_memory, "has_device_memory", lambda _device: True)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    let_segments_grow(CUDA)
    assert not made.settings, "the user's setting, or no virtual memory"


def test_the_memory_of_a_long_forward_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1 << 30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(1))
    memory = DeviceMemory(None, None)
    memory.give_back(1024)
    assert not given
    memory.give_back(8192)
    assert given
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: (1 << 30) + 1)
    memory.give_back(8192)
    assert len(given) == 1
