"""Models whose experts are shared between the engine, through a hand-off, and a GPU; decoded by
graphs. On the CPU device, over stand-in streams."""

from __future__ import annotations

import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_streams import FakeCore, FakeGraphs, fake_hand_off
from helpers.loras import apply_lora, enable_lora
from helpers.tiny_chat import make_tokenizer
from helpers.tiny_models import save_adapter, save_model, token_ids

import ktrt.loading.model
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs, SamplingArgs, TemplateArgs
from ktrt.engine.build import MAX_QLEN
from ktrt.engine.step_rows import ACTIVE, BASE
from ktrt.experts import GpuExperts, KTExperts
from ktrt.experts.gpu import residents
from ktrt.generate.runner import PREFILL_CHUNK, KvCache
from ktrt.generate.step import Span, Step
from ktrt.loading.model import LoadedModel, load_model
from ktrt.prompt.template.load import load_template
from ktrt.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from ktrt._core import Engine

IDS = token_ids(1, 40)[0].tolist()
EXPERTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "deepseek_v2", "deepseek_v2", 96)
    save_adapter(folder / "lora", folder / "deepseek_v2", "a")
    return folder


def load(folder: Path) -> LoadedModel:
    return load_model(
        ModelArgs(folder / "deepseek_v2", infer_dtype="float32"),
        AdapterArgs(folder / "lora"),
        ExpertArgs(kt_num_threads=1),
    )


class Shared:
    """The same model twice: ``plain``, and with a hand-off, graphs and a GPU's share."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.plain = load(folder)
        self.in_graph = False
        self.core: FakeCore
        self.maker: FakeGraphs
        self.gpu: GpuExperts

        def new_hand_off(engine: Engine, _device: torch.device) -> Any:
            hand_off, self.core = fake_hand_off(engine.max_qlen)
            self.maker = FakeGraphs(self.core)
            patch.setattr(self.maker, "capture", partial(self._capture, self.maker.capture))
            return hand_off

        def build(
            modules: Mapping[str, KTExperts], device: torch.device, _args: ExpertArgs, _most: int,
            *step: Any,
        ) -> GpuExperts:  # fmt: skip
            layers = {path: module.layer for path, module in modules.items()}
            self.gpu = GpuExperts(layers, device, running=step[0], masks=step[1])
            patch.setattr(self.gpu, "refresh", partial(self._refresh, self.gpu.refresh))
            for path, module in modules.items():
                module.gpu = self.gpu.layers[path]
            return self.gpu

        patch.setattr(ktrt.loading.model, "new_hand_off", new_hand_off)
        patch.setattr(ktrt.loading.model, "CudaGraphs", lambda: self.maker)
        patch.setattr(ktrt.loading.model, "build_gpu_experts", build)
        self.loaded = load(folder)
        self.loaded.runner._mixed = None  # as on a GPU
        self.ours = self.loaded.new_cache()
        self.reference = KvCache(self.plain.model)

    def _capture(self, capture: Any, step: Callable[[], None]) -> Any:
        def marked() -> None:
            self.in_graph = True
            try:
                step()
            finally:
                self.in_graph = False

        return capture(marked)

    def _refresh(self, refresh: Callable[[], None]) -> None:
        assert not self.in_graph, "a graph cannot take another LoRA"
        refresh()

    def compare(self, ids: list[int]) -> None:
        found, expected = self.ours.forward(ids), self.reference.forward(ids)
        # A real GPU's experts round otherwise, and what follows is in bfloat16.
        limit = 2e-2 if torch.cuda.is_available() else 2e-3
        assert (found - expected).norm() <= limit * expected.norm()

    def set_lora(self, *, enabled: bool) -> None:
        for loaded in (self.plain, self.loaded):
            for module in loaded.model.modules():
                if isinstance(module, KTExperts):
                    enable_lora(module.layer, enabled=enabled)


@pytest.fixture
def shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shared]:
    monkeypatch.setattr(ktrt.loading.model, "_device", lambda: torch.device("cpu"))
    shared = Shared(folder, monkeypatch)
    yield shared
    shared.loaded.close()
    shared.plain.close()


@pytest.mark.parametrize("number", [1, 3, 100])
def test_decoding_with_resident_experts(shared: Shared, number: int) -> None:
    shared.gpu.select(number)
    shared.compare(IDS[:21])
    shared.core.log.clear()
    for each in IDS[21:]:
        shared.compare([each])
    assert (shared.maker.captures, shared.maker.replays) == (1, 19)
    complete = all(share.complete for share in shared.gpu.layers.values())
    assert complete == (number == 100)
    assert bool(shared.core.log) != complete
    if not complete:
        assert {slot[3] for slot in shared.core.slots} == {torch.float32}


def test_a_graph_ends_with_the_memory_it_knows(shared: Shared) -> None:
    shared.gpu.select(2)
    shared.compare(IDS[:9])
    shared.compare([5])
    shared.gpu.select(2, {path: list(range(len(n))) for path, n in shared.gpu.counts().items()})
    shared.compare([6])
    assert shared.maker.captures == 1
    shared.gpu.select(3)
    shared.compare([7])
    shared.compare([8])
    assert shared.maker.captures == 2


def test_replays_take_another_lora(shared: Shared) -> None:
    shared.gpu.select(100)
    shared.compare(IDS[:9])
    for captures, enabled in enumerate((True, False, True), start=1):
        shared.set_lora(enabled=enabled)
        for each in (5, 6):
            shared.compare([each])
        assert shared.maker.captures == captures


def test_a_lora_of_the_same_shape_is_taken_by_the_same_graph(shared: Shared) -> None:
    shared.gpu.select(100)
    shared.compare(IDS[:9])
    shared.compare([5])
    generator = torch.Generator().manual_seed(0)
    for path in shared.gpu.layers:
        models: list[Any] = [shared.plain.model, shared.loaded.model]
        layers = [model.get_submodule(path).layer for model in models]
        experts, hidden, inner = (
            layers[0].num_experts, layers[0].hidden_size, layers[0].intermediate_size,
        )  # fmt: skip
        rank = shared.gpu.source(path)._loras[0].down.ranks
        sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        lora = {}
        for name, (out, into) in sizes.items():
            lora[f"{name}_a"] = torch.randn(experts, rank, into, generator=generator) / into**0.5
            lora[f"{name}_b"] = torch.randn(experts, out, rank, generator=generator) / rank**0.5
        for layer in layers:
            apply_lora(layer, **lora)
    shared.compare([6])
    assert shared.maker.captures == 1


def test_long_prompts_stream_and_decoding_does_not(shared: Shared) -> None:
    shared.gpu.select(2)
    shared.gpu.threshold = 2
    shared.compare(IDS[:30])
    assert shared.core.log == []
    for each in IDS[30:]:
        shared.compare([each])
    assert shared.maker.replays == 10
    assert shared.core.log


@pytest.fixture
def in_blocks(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """Prompts are divided into blocks of 10 tokens, of which one run takes 30."""
    monkeypatch.setattr(residents, "BLOCK_TOKENS", 10)
    shared.gpu.select(2)
    shared.gpu.threshold, shared.gpu.most_tokens = 5, 30
    return shared


def test_a_long_prompt_passes_the_bus_once(
    in_blocks: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, layers = in_blocks, list[int]()
    pieces = shared.gpu.stream.pieces

    def noted(layer: int) -> Any:
        layers.append(layer)
        return pieces(layer)

    monkeypatch.setattr(shared.gpu.stream, "pieces", noted)
    sizes: list[int] = []
    shared.loaded.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    before = {path: sum(counts) for path, counts in shared.gpu.counts().items()}
    assert shared.ours.prefill_chunk(37) == 30
    shared.compare(IDS[:25])
    count = len(shared.gpu.layers)
    assert (sizes, layers) == ([8, 8, 9], list(range(count)))
    routed = {path: sum(counts) for path, counts in shared.gpu.counts().items()}
    top_k = next(iter(shared.gpu.layers.values())).source._layer.top_k
    assert routed == {path: number + 25 * top_k for path, number in before.items()}
    # A second part of the prompt, in blocks that begin at what is held, and then a step.
    shared.compare(IDS[25:37])
    assert (sizes[3:], layers) == ([6, 6], [*range(count)] * 2)
    shared.compare([7])


@pytest.mark.parametrize("adapter", [ACTIVE, BASE])
def test_a_span_chooses_adapter_and_logits(in_blocks: Shared, adapter: int) -> None:
    logits = []
    for loaded in (in_blocks.loaded, in_blocks.plain):
        slot = loaded.runner.pool.open("key", ())
        span = Span(slot=slot, ids=IDS[:25], adapter=adapter, logits=[2, 7, 24])
        logits.append(loaded.runner.run(Step((span,)))[0])
        assert slot.length == 25
    found, expected = logits
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_blocks_end_together(
    in_blocks: Shared, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Whatever ends a block, or the experts of all: no thread is left, and what the slot held
    serves the next forward."""
    shared, running = in_blocks, in_blocks.loaded.runner._forwards.running
    shared.compare(IDS[:4])
    threads, cache = set(threading.enumerate()), shared.ours.runner.cache
    assert cache is not None
    share = list(shared.gpu.layers.values())[-1]
    layer: Any = shared.loaded.model.model.layers[-1]  # type: ignore[union-attr, index]

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    for broken, name in ((share, "streamed"), (layer.self_attn, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(broken, name, fail)
            with pytest.raises(error):
                shared.ours.forward(IDS[4:30])
        assert set(threading.enumerate()) <= threads
        assert not shared.gpu.blocks.running
        assert running.rows is None
        assert cache.place is None
        if shared.ours.length == 0:  # not after an interrupt
            shared.ours.forward(IDS[:4])
    shared.compare(IDS[4:30])


def test_a_signal_ends_blocks(in_blocks: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python interrupts the main thread, which waits for a block."""
    layer: Any = in_blocks.loaded.model.model.layers[-1]  # type: ignore[union-attr, index]
    plain, ended = layer.self_attn.forward, list[str]()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.05)  # until the main thread has been interrupted
        ended.append("attention")
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer.self_attn, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            in_blocks.ours.forward(IDS[:30])
    assert ended == ["attention"]  # of one block, which came to its end
    in_blocks.compare(IDS[:30])


def test_a_gpu_gets_prompts_in_chunks_of_an_engine_call(shared: Shared) -> None:
    assert shared.ours.prefill_chunk(3000) == PREFILL_CHUNK
    shared.ours.runner.device = torch.device("cuda")
    assert shared.ours.prefill_chunk(3000) == MAX_QLEN
    shared.gpu.threshold = 2000
    assert shared.ours.prefill_chunk(1999) == MAX_QLEN
    assert shared.ours.prefill_chunk(3000) == 3000


def test_shared_experts_run_before_the_sum_is_awaited(shared: Shared) -> None:
    shared.gpu.select(2)
    block: Any = shared.loaded.model.model.layers[1].mlp  # type: ignore[union-attr, index]
    block.shared_experts.register_forward_hook(lambda *_: shared.core.log.append("shared experts"))
    block.experts.gpu.forward_resident = logged(
        shared.core.log, "resident", block.experts.gpu.forward_resident
    )
    with torch.no_grad():
        block(torch.randn(1, 3, block.experts.layer.hidden_size))
    assert shared.core.log == ["submit", "resident", "shared experts", "joined"]


def logged(log: list[str], name: str, function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        log.append(name)
        return function(*arguments)

    return call


def test_a_session_goes_on_with_other_adapters(shared: Shared) -> None:
    """The tokens of a set are found again after another one; no graph has to be captured."""
    tokenizer, adapters = make_tokenizer(vocab_size=380), shared.loaded.adapters
    template = load_template(TemplateArgs("default"), tokenizer)
    sampling = SamplingArgs(do_sample=False, max_new_tokens=4)
    session = Session(shared.loaded, tokenizer, template, sampling)

    def reused() -> int:
        question = [{"role": "user", "content": "hello, who are you?"}]
        return list(session.stream_responses(question))[-1].reused_tokens

    assert (reused(), shared.maker.captures) == (0, 1)
    assert reused() > 0
    changes: tuple[tuple[Callable[[], None], bool], ...] = (
        (adapters.off, False), (adapters.on, True), (lambda: adapters.scale(0.5), False),
    )  # fmt: skip
    for change, known in changes:
        change()
        assert (reused() > 0) == known
        assert reused() > 0
