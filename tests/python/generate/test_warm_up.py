"""Work done at load, so that the first answer does not wait for it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_streams import FakeGraphs, dense_graphs
from helpers.tiny_chat import make_model, make_session, make_tokenizer
from helpers.tiny_models import save_model
from torch import nn

import ktrt.loading.model
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.engine.recording import RecordedSteps
from ktrt.errors import KtrtError
from ktrt.experts import KTExperts, experts_muted
from ktrt.generate import graphs as decode_graph
from ktrt.generate import warm_up
from ktrt.generate.graphs import DecodeGraphs
from ktrt.generate.runner import KvCache
from ktrt.kv import static
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = [5, 7, 11, 13]


@pytest.fixture
def llama() -> Any:
    return make_model(make_tokenizer())


@pytest.fixture
def forwards(llama: Any) -> list[int]:
    """Tokens of every forward of the model since."""
    seen: list[int] = []
    llama.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("maker", [FakeGraphs, RecordedSteps])
def test_the_first_answer_captures_nothing(llama: Any, maker: Any) -> None:
    graphs = dense_graphs(llama, maker())
    warm, cold = KvCache(llama, graphs), KvCache(llama)
    warm_up.warm_up(warm, 512)
    assert warm.has_graphs
    assert warm.runner._alone is not None
    captured = warm.runner._alone.count
    for ids in (PROMPT, [3], [4]):
        assert torch.allclose(warm.forward(ids), cold.forward(ids), rtol=1e-3, atol=1e-3)
    assert warm.runner._alone.count == captured


def test_a_graph_of_a_proven_kind_needs_no_plain_step(
    llama: Any, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a growth, and on a new cache: the capture and the replay, both fake, are all."""
    monkeypatch.setattr(static, "MIN_CAPACITY", 16)
    monkeypatch.setattr(decode_graph, "MIN_WINDOW", 8)
    maker = FakeGraphs()
    graphs = dense_graphs(llama, maker)
    warm_up.warm_up(KvCache(llama, graphs), 16)
    assert maker.proven
    cache, cold = KvCache(llama, graphs), KvCache(llama)
    cache.forward(PROMPT)
    cold.forward(PROMPT)
    for length in range(len(PROMPT), 20):
        captures = maker.captures
        forwards.clear()
        found = cache.forward([length])
        assert len(forwards) == 1 + (maker.captures > captures), length
        assert torch.allclose(found, cold.forward([length]), rtol=1e-3, atol=1e-3)


def test_a_capture_that_fails_without_a_plain_step_is_made_with_one(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = FakeGraphs()
    graphs = dense_graphs(llama, maker)
    warm_up.warm_up(KvCache(llama, graphs), 64)
    cache, cold = KvCache(llama, graphs), KvCache(llama)
    real, calls = maker.capture, iter([RuntimeError("not while a kernel is loaded")])

    def capture(step: Any) -> Any:
        if (error := next(calls, None)) is not None:
            raise error
        return real(step)

    monkeypatch.setattr(maker, "capture", capture)
    for ids in (PROMPT, [3], [4]):
        assert torch.allclose(cache.forward(ids), cold.forward(ids), rtol=1e-3, atol=1e-3)
    assert maker.usable
    assert cache.has_graphs


def test_windows_are_captured_ahead(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "MIN_CAPACITY", 64)
    monkeypatch.setattr(decode_graph, "MIN_WINDOW", 8)
    maker = FakeGraphs()
    cache = KvCache(llama, dense_graphs(llama, maker))
    cache.forward([5, 7])
    cache.capture_ahead(64)  # nothing has been compared yet
    assert maker.captures == 0
    cache.forward([11])
    cache.capture_ahead(40)
    assert maker.captures == 4  # 8, 16, 32, 64
    cache.capture_ahead(1000)  # as far as the memory goes
    assert maker.captures == 4


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 45, 46, 50])
def test_short_contexts(llama: Any, limit: int, forwards: list[int]) -> None:
    cache = KvCache(llama)
    warm_up.warm_up(cache, limit)
    assert sum(forwards) <= limit
    assert torch.allclose(cache.forward(PROMPT), KvCache(llama).forward(PROMPT))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KtrtError("an expert failed")])
def test_a_failure_is_a_warning(
    llama: Any, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise error

    cache = KvCache(llama)
    hook = llama.register_forward_pre_hook(fail)
    warm_up.warm_up(cache, 512)
    hook.remove()
    assert str(error) in caplog.text
    assert torch.allclose(cache.forward(PROMPT), KvCache(llama).forward(PROMPT))


def test_a_warm_session_holds_nothing() -> None:
    with make_session() as session:
        session.warm_up()
        pool = session._open().runner.pool
        assert pool.slots_in_use == 0
        answer = list(session.stream_responses([{"role": "user", "content": "?"}]))
        assert answer[-1].reused_tokens == 0
        assert pool.slots_in_use == 0


class TestMuted:
    @pytest.fixture
    def loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        monkeypatch.setattr(ktrt.loading.model, "_device", lambda: torch.device("cpu"))
        args = ModelArgs(save_model(tmp_path / "model", "qwen3_moe", 32), infer_dtype="float32")
        loaded = load_model(args, AdapterArgs(), ExpertArgs(kt_num_threads=1, ktrt_cache=False))
        yield loaded
        loaded.close()

    def test_the_experts_add_nothing(self, loaded: Any) -> None:
        module = next(m for m in loaded.model.modules() if isinstance(m, KTExperts))
        states = torch.randn(3, module.layer.hidden_size)
        index, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
        with experts_muted(loaded.model):
            assert not module(states, index, weights).any()
        assert module(states, index, weights).any()

    def test_counts_of_a_gpu_are_forgotten(self, loaded: Any) -> None:
        module = next(m for m in loaded.model.modules() if isinstance(m, KTExperts))
        forgotten: list[bool] = []
        module.gpu = SimpleNamespace(  # type: ignore[assignment]
            streams=lambda _tokens: True, resident=False,
            forget_counts=lambda: forgotten.append(True),
        )  # fmt: skip
        states = torch.randn(2, module.layer.hidden_size)
        with experts_muted(loaded.model):
            module(states, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
        assert forgotten == [True]

    def test_experts_need_not_be_loaded(self) -> None:
        module = KTExperts()
        model = nn.ModuleList([module])
        states = torch.randn(2, 8)
        with experts_muted(model):
            assert not module(states, torch.zeros(2, 1), torch.zeros(2, 1)).any()
        with pytest.raises(KtrtError, match="never loaded"):
            module(states, torch.zeros(2, 1), torch.zeros(2, 1))


def test_beside_a_load_on_the_cpu_nothing_runs(llama: Any, forwards: list[int]) -> None:
    with warm_up.kernels_loaded_beside(llama, 512):
        pass
    assert not forwards


def test_what_fails_beside_a_load_is_left_to_the_first_answer(
    llama: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, logger="ktrt.generate.warm_up")

    def fail(_device: torch.device) -> None:
        raise ValueError("no such device")

    monkeypatch.setattr(torch.cuda, "device", fail)
    warm_up._load_kernels(llama, torch.device("cpu"), 10)
    assert "no such device" in caplog.text


def test_kernels_of_prompts_and_steps_are_loaded(
    llama: Any,
    forwards: list[int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the thread does it, on the CPU; the steps in the form that graphs capture, too."""
    caplog.set_level(logging.DEBUG, logger="ktrt.generate.warm_up")
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    in_steps: list[int] = []
    run = DecodeGraphs._run

    def watched(self: DecodeGraphs, window: int) -> None:
        in_steps.append(window)
        run(self, window)

    monkeypatch.setattr(DecodeGraphs, "_run", watched)
    warm_up._load_kernels(llama, torch.device("cpu"), 100)
    assert "failed" not in caplog.text
    assert [n for n in forwards if n > 1] == [48, 20, 24, 20, 12, 20, 6, 20]
    assert in_steps == [512] * 3  # ahead of the capture, in it, and as its replay


def test_steps_that_fail_beside_a_load_are_no_warning(
    llama: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished model's graph fails for the same reason, and says so."""

    def fail(_self: DecodeGraphs, _window: int) -> None:
        raise KtrtError("attention x takes no mask of a fixed length")

    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=bool))
    monkeypatch.setattr(DecodeGraphs, "_run", fail)
    caplog.set_level(logging.DEBUG, logger="ktrt.generate.graphs")
    warm_up._load_kernels(llama, torch.device("cpu"), 100)
    assert "takes no mask" in caplog.text
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
