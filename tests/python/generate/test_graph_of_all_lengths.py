"""One graph for all lengths, where every layer's attention reads the lengths on the device."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_streams import FakeGraphs
from helpers.tiny_chat import make_model, make_tokenizer
from transformers import AttentionInterface

from ktrt.engine.step_rows import RunningStep
from ktrt.generate import graphs as decode_graph
from ktrt.generate.graphs import DecodeGraphs, NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.generate.step import Span, Step
from ktrt.kv import static

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = [5, 7, 11, 13]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model(make_tokenizer())


@pytest.fixture
def running() -> RunningStep:
    return RunningStep()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "MIN_CAPACITY", 64)
    monkeypatch.setattr(decode_graph, "MIN_WINDOW", 8)


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch, running: RunningStep) -> Callable[[int], None]:
    """Call it with the number of layers whose attention keeps to the rows' lengths, as a GPU's
    does; the others look at the mask."""
    kept = [0]
    original = AttentionInterface._global_mapping["sdpa"]

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        lengths = running.lengths
        if lengths is None or module.layer_idx >= kept[0]:
            return original(module, query, key, value, mask, **options)
        running.attended += 1
        if running.slots is not None:
            key, value = key[running.slots], value[running.slots]
        end = int(lengths.max())
        seen = (torch.arange(end) < lengths[:, None])[:, None, None]
        return original(module, query, key[:, :, :end], value[:, :, :end], seen, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention)
    return lambda layers: kept.__setitem__(0, layers)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def decoded(model: Any, maker: FakeGraphs, running: RunningStep) -> KvCache:
    """Decodes 40 tokens and compares each step with the model's own cache."""

    def graphs(cache: Any, **place: Any) -> DecodeGraphs:
        return DecodeGraphs(model, cache, NoHandOff(), maker, running=running, **place)

    cache, plain = KvCache(model, graphs), KvCache(model)
    for part in [PROMPT, *([token] for token in range(20, 60))]:
        assert close(cache.forward(part), plain.forward(part))
    return cache


def test_one_graph_serves_all_lengths(
    llama: Any, running: RunningStep, keeping: Callable[[int], None]
) -> None:
    keeping(len(llama.model.layers))
    maker = FakeGraphs()
    cache = decoded(llama, maker, running)
    assert (maker.captures, maker.replays) == (1, 40)
    cache.capture_ahead(64)
    assert maker.captures == 1
    decoded(llama, maker, running)
    assert maker.captures == 2, "another cache: its graph at once, without a window"


@pytest.mark.parametrize("layers", [0, 1])
def test_a_layer_that_looks_at_a_mask_keeps_the_windows(
    llama: Any, running: RunningStep, keeping: Callable[[int], None], layers: int
) -> None:
    assert len(llama.model.layers) > 1
    keeping(layers)
    maker = FakeGraphs()
    decoded(llama, maker, running)
    assert maker.captures == 4  # 8, 16, 32, 64


def test_a_layer_that_changes_its_mind_goes_back_to_windows(
    llama: Any, running: RunningStep, keeping: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Another adapter's attention, say: nothing that was wrong is used."""
    keeping(len(llama.model.layers))
    maker = FakeGraphs()
    decoded(llama, maker, running)
    keeping(1)
    caplog.set_level(logging.DEBUG, logger=decode_graph.__name__)
    before = maker.captures
    decoded(llama, maker, running)
    assert "1 of 2 layers does not keep to the rows' lengths" in caplog.text
    assert maker.captures - before == 1 + 4
    assert maker.usable


@pytest.mark.parametrize(("kept", "captures"), [(2, 3), (0, 4)])
def test_graphs_of_rows(
    llama: Any, running: RunningStep, keeping: Callable[[int], None], kept: int, captures: int
) -> None:
    """Rows of different lengths and slots, and rows that stand for nothing; a single row has a
    graph for all slots, too. In memory that stays, and in memory that grows."""
    keeping(kept)
    maker = FakeGraphs()
    runner = ModelRunner(
        llama, running=running,
        row_graphs=lambda cache, step: RowGraphs(llama, cache, step, NoHandOff(), maker),
        capacity=64 if kept else None,
    )  # fmt: skip
    runner._on_cpu = False
    plain = [KvCache(llama) for _ in range(3)]
    slots = [runner.pool.open("key", ()) for _ in range(3)]
    for row, slot in enumerate(slots):
        ids = PROMPT[: 2 + row]
        runner.run(Step((Span(slot=slot, ids=ids),)))
        plain[row].forward(ids)
    for rows in [(0, 1)] * 6 + [(2, 0)] * 2 + [(0, 1, 2)] * 6 + [(2, 0, 1), (2,), (0,)]:
        found = runner.run(Step(tuple(Span(slot=slots[row], ids=[30 + row]) for row in rows)))
        for row, logits in zip(rows, found, strict=True):
            assert close(logits[-1], plain[row].forward([30 + row]))
    assert maker.captures == captures
