"""The static KV cache and the decode graphs on it, against transformers' dynamic cache."""

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_streams import FakeGraphs, dense_graphs
from helpers.tiny_chat import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, MistralConfig

from ktrt.engine.recording import RecordedSteps
from ktrt.errors import KtrtError
from ktrt.generate import alone
from ktrt.generate import graphs as decode_graph
from ktrt.generate.graphs import (
    CudaGraphs,
    DecodeGraphs,
    NoHandOff,
    window_of,
)
from ktrt.generate.runner import KvCache
from ktrt.kv import static as kv_cache
from ktrt.kv.positions import Positions
from ktrt.kv.static import StaticKv, cache_argument, unusual_layers

PROMPT = [5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512,
    "num_experts_per_tok": 2, "initializer_range": 0.1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 24},
    "deepseek_v2": {
        "n_routed_experts": 4, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": None,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip

# Without experts, which transformers' own modules choose by looking at numbers.
DENSE: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"head_dim": 24}, "olmo2": {}, "granite": {}, "cohere": {},
    "deepseek_v2": FAMILIES["deepseek_v2"] | {"first_k_dense_replace": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small steps, so that conversations of a few dozen tokens cross several."""
    monkeypatch.setattr(kv_cache, "MIN_CAPACITY", 16)
    monkeypatch.setattr(decode_graph, "MIN_WINDOW", 8)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(family: str, attention: str = "sdpa", **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **sizes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model(make_tokenizer())


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def store(model: Any, cache: StaticKv, slot: int, ids: list[int]) -> None:
    """Runs ``ids`` as the first ones of a slot."""
    with torch.no_grad(), cache.sequence(slot, 0, len(ids)):
        model(torch.tensor([ids]), **{cache_argument(model): cache})


def tokens(model: Any, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    rows = model.get_input_embeddings().weight.shape[0]
    found: list[int] = torch.randint(1, rows, (count,), generator=generator).tolist()
    return found


def whole(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits after all of ``ids``, without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_by_graphs(family: str, attention: str) -> None:
    """Chunks, windows 8 … 64, two growths; float32, so nothing but sums' order differs."""
    model, maker = make(family, attention), FakeGraphs()
    static, dynamic = KvCache(model, dense_graphs(model, maker)), KvCache(model)
    ids = tokens(model, 60)
    for part in [ids[:3], ids[3:5], *([each] for each in ids[5:])]:
        found, expected = static.forward(part), dynamic.forward(part)
        assert close(found, expected)
        assert found.argmax() == expected.argmax()
    # Growth from 16 to 32 and to 64 drops the graphs, so 32 and 64 are captured once each.
    assert maker.captures == 4
    assert maker.replays == 55


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DENSE)
def test_families_decode_by_recorded_steps(family: str, attention: str) -> None:
    """The same on the operations themselves, which then run without the model."""
    model, maker = make(family, attention, **DENSE[family]), RecordedSteps()
    static, dynamic = KvCache(model, dense_graphs(model, maker)), KvCache(model)
    ids = tokens(model, 60)
    for part in [ids[:3], ids[3:5], *([each] for each in ids[5:])]:
        found, expected = static.forward(part), dynamic.forward(part)
        assert close(found, expected)
        assert found.argmax() == expected.argmax()
    assert static.has_graphs
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model runs"))
    static.forward([7])
    hook.remove()


def test_a_step_that_cannot_be_recorded_changes_nothing(llama: Any) -> None:
    """The model goes on, on the cache as it is, and no later cache tries again."""
    maker = RecordedSteps()
    graphs = dense_graphs(llama, maker)
    norm = llama.model.norm
    hook = norm.register_forward_hook(lambda _m, _x, out: out * (1 + 0 * out.max().item()))
    try:
        cache = KvCache(llama, graphs)
        cache.forward(PROMPT)
        forwards = []
        seen = llama.register_forward_hook(lambda *_: forwards.append(1))
        for count in (1, 2):
            found = cache.forward([3])
            assert close(found, whole(llama, [*PROMPT, *[3] * count]))
    finally:
        hook.remove()
        seen.remove()
    assert not maker.usable
    assert not cache.has_graphs
    # The plain forward and the attempt, the next plain forward, and `whole` twice.
    assert len(forwards) == 4, "the prompt is not computed again"


def test_a_replay_is_a_replay(llama: Any) -> None:
    """Its results come from the static inputs: the captured callable takes no argument."""
    maker = FakeGraphs()
    cache = KvCache(llama, dense_graphs(llama, maker))
    cache.forward(PROMPT)
    first = cache.forward([3])
    held = first.clone()
    count = maker.replays
    second = cache.forward([4])
    assert maker.replays == count + 1
    assert torch.equal(first, held), "the result is a copy"
    assert close(second, whole(llama, [*PROMPT, 3, 4]))


def test_reuse_crops_and_hides_what_was_there(llama: Any) -> None:
    cache = KvCache(llama, dense_graphs(llama))
    ids = tokens(llama, 40)
    for part in (ids[:10], *([each] for each in ids[10:])):
        cache.forward(part)
    changed = [*ids[:7], 60, 61]
    assert cache.reuse(changed) == 7
    cache.forward([60])
    assert close(cache.forward([61]), whole(llama, changed))


def test_nan_of_another_conversation_is_gone(llama: Any) -> None:
    """A masked value still takes part in a sum, times 0."""
    cache = KvCache(llama, dense_graphs(llama))
    cache.forward(PROMPT)
    assert cache.runner.cache is not None
    for layer in cache.runner.cache.layers:
        layer.keys[:, :, 5:12].fill_(torch.nan)
        layer.values[:, :, 5:12].fill_(torch.nan)
    assert cache.reuse([*PROMPT[:5], 60, 61]) == 5
    cache.forward([60])
    assert close(cache.forward([61]), whole(llama, [*PROMPT[:5], 60, 61]))
    assert cache.has_graphs


def test_growth_ends_the_graphs_of_the_old_memory(llama: Any) -> None:
    cache = KvCache(llama, dense_graphs(llama))
    cache.forward(PROMPT)
    assert not cache.has_graphs
    cache.forward([3])
    assert cache.has_graphs
    cache.forward([4, 5])
    assert cache.has_graphs
    cache.forward([6, 7])
    assert not cache.has_graphs


def test_after_an_exception_what_was_held_before_is_kept(llama: Any) -> None:
    maker = FakeGraphs()
    cache = KvCache(llama, dense_graphs(llama, maker))
    cache.forward(PROMPT)
    cache.forward([3])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with (
        llama.model.layers[1].register_forward_pre_hook(interrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        cache.forward([4])
    assert cache.reuse([*PROMPT, 3, 4, 5]) == len(PROMPT) + 1
    assert close(cache.forward([5]), whole(llama, [*PROMPT, 3, 5]))


def test_plain_forwards_attend_to_no_more_than_is_held(llama: Any) -> None:
    cache = StaticKv(llama.config)
    store(llama, cache, 0, PROMPT[:5])
    with cache.sequence(0, 5, 1):
        keys, _ = cache.layers[0].update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
        assert cache.get_seq_length() == 5
    assert keys.shape == (1, 2, 6, 8)
    with (
        cache.sequence(0, 6, 11),
        pytest.raises(KtrtError, match="holds 16 positions, 17 are needed"),
    ):
        cache.layers[0].update(torch.ones(1, 2, 11, 8), torch.ones(1, 2, 11, 8))


def test_a_forward_whose_slot_is_not_known_is_refused(llama: Any) -> None:
    cache = StaticKv(llama.config)
    with torch.no_grad(), pytest.raises(KtrtError, match="say first which one"):
        llama(torch.tensor([PROMPT[:5]]), **{cache_argument(llama): cache})


def test_reserve_doubles_and_keeps(llama: Any) -> None:
    cache = StaticKv(llama.config)
    assert not cache.reserve(17), "nothing was there to move"
    assert cache.capacity == 32
    store(llama, cache, 0, PROMPT)
    before = cache.layers[1].values[:, :, :12].clone()
    assert not cache.reserve(32)
    assert cache.reserve(65)
    assert cache.capacity == 128
    assert torch.equal(cache.layers[1].values[:, :, :12], before)
    assert not cache.layers[1].values[:, :, 12:].any()


def test_an_interrupted_growth_is_repeated(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KvCache(llama, dense_graphs(llama))
    cache.forward(PROMPT)
    grow, left = Positions.grow, [1]

    def interrupted(layer: Any, *sizes: Any) -> None:
        grow(layer, *sizes)
        if left:
            left.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr(Positions, "grow", interrupted)
    more = tokens(llama, 9)
    with pytest.raises(KeyboardInterrupt):
        cache.forward(more)
    assert cache.reuse(PROMPT + more) == len(PROMPT)
    assert close(cache.forward(more), whole(llama, PROMPT + more))


def test_rows_of_different_lengths() -> None:
    """Row 1 holds 8 tokens, followed by the rubbish of 4 others."""
    model = make("deepseek_v2")
    ids = [tokens(model, 14), tokens(model, 10, seed=1)]
    cache = StaticKv(model.config, slots=3)
    graphs = DecodeGraphs(model, cache, NoHandOff(), FakeGraphs(), rows=2, first=1)
    store(model, cache, 1, ids[0][:12])
    store(model, cache, 2, [*ids[1][:8], 9, 9, 9, 9])
    steps = [([row[at] for row, at in zip(ids, lengths, strict=True)], lengths)
             for lengths in ([12, 8], [13, 9])]  # fmt: skip
    expected = [torch.stack([whole(model, row[:end]) for row, end in zip(ids, ends, strict=True)])
                for ends in ([13, 9], [14, 10])]  # fmt: skip
    assert graphs.step(*steps[0]) is None
    assert graphs.prepare(*steps[0], expected[0])
    for step, reference in zip(steps, expected, strict=True):
        found = graphs.step(*step)
        assert found is not None
        assert close(found, reference)


def test_one_length_of_many_rows_is_refused() -> None:
    cache = StaticKv(make("llama").config)
    with cache.window(torch.tensor([[3]]), 8):
        assert int(cache.get_seq_length()) == 3
    with cache.window(torch.tensor([[3], [4]]), 8), pytest.raises(KtrtError, match="one length"):
        cache.get_seq_length()


@pytest.mark.parametrize(
    "failure", [RuntimeError("operation not permitted"), KtrtError("no hand-off of 1 tokens")]
)
def test_a_failed_capture_is_a_warning(
    llama: Any, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    maker = FakeGraphs()
    maker.fail = failure
    cache = KvCache(llama, dense_graphs(llama, maker))
    cache.forward(PROMPT)
    with caplog.at_level(logging.WARNING):
        for length, token in enumerate((3, 4, 5), start=1):
            assert close(cache.forward([token]), whole(llama, [*PROMPT, 3, 4, 5][: 12 + length]))
    (message,) = caplog.messages
    assert "No CUDA graph" in message
    assert str(failure) in message


def test_ctrl_c_in_a_capture_is_no_failure(llama: Any) -> None:
    maker = FakeGraphs()
    maker.fail = KeyboardInterrupt()
    cache = KvCache(llama, dense_graphs(llama, maker))
    cache.forward(PROMPT)
    with pytest.raises(KeyboardInterrupt):
        cache.forward([3])
    maker.fail = None
    assert cache.reuse(PROMPT) == 0
    cache.forward(PROMPT)
    assert close(cache.forward([3]), whole(llama, [*PROMPT, 3]))
    assert maker.captures == 1


class TorchGraph:
    """torch.cuda.graph, whose end fails where something in it failed, and which then leaves its
    stream current."""

    stream = "main"

    def __init__(self, _graph: Any, **options: Any) -> None:
        assert options == {"pool": "pool", "capture_error_mode": "thread_local"}

    def __enter__(self) -> None:
        TorchGraph.stream = "capture"

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            raise RuntimeError("capture_end: the capture was invalidated")
        TorchGraph.stream = "main"


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt(), ValueError("the reason")])
def test_a_capture_by_torch(failure: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph", TorchGraph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: TorchGraph.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda s: setattr(TorchGraph, "stream", s))

    def step() -> None:
        assert TorchGraph.stream == "capture"
        if failure is not None:
            raise failure

    if failure is None:
        assert CudaGraphs().capture(step) == "replay"  # type: ignore[comparison-overlap]
    else:
        with pytest.raises(type(failure)):
            CudaGraphs().capture(step)
    assert TorchGraph.stream == "main"


def broken_mask(model: Any, cache: Any, positions: torch.Tensor, window: int) -> torch.Tensor:
    return torch.arange(window)[None, None, None, :] < 2


def broken_positions(model: Any, cache: Any, positions: torch.Tensor, window: int) -> torch.Tensor:
    positions.fill_(1)
    return torch.arange(window)[None, None, None, :] <= 12


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("broken", [broken_mask, broken_positions])
def test_a_graph_that_computes_something_else_is_not_used(
    llama: Any, broken: Callable[..., Any], chunk: int, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(decode_graph, "attention_mask", broken)
    monkeypatch.setattr(alone, "_CHUNK", chunk)
    cache = KvCache(llama, dense_graphs(llama))
    cache.forward(PROMPT)
    assert close(cache.forward([3]), whole(llama, [*PROMPT, 3]))
    assert "differ from the plain forward's" in caplog.text
    assert close(cache.forward([4]), whole(llama, [*PROMPT, 3, 4]))


def test_attention_without_a_mask_of_its_own(
    llama: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = DecodeGraphs(llama, StaticKv(llama.config), NoHandOff(), FakeGraphs())
    monkeypatch.setattr(llama.config, "_attn_implementation_internal", "flash_attention_2")
    assert not graphs.prepare([3], [0], torch.ones(1, 3))
    assert "flash_attention_2 takes no mask" in caplog.text


def test_windows() -> None:
    assert [window_of([n]) for n in (0, 7, 8, 15, 16)] == [8, 8, 16, 16, 32]
    assert window_of([3, 20]) == 32


def test_unusual_layers_are_named() -> None:
    assert unusual_layers(make("deepseek_v2")) == []
    sliding = MistralConfig(num_hidden_layers=2, sliding_window=8)
    assert unusual_layers(SimpleNamespace(config=sliding)) == []
    indexed = AutoConfig.for_model("deepseek_v32", num_hidden_layers=2)
    assert unusual_layers(SimpleNamespace(config=indexed)) == ["DynamicIndexedLayer"]
    own = SimpleNamespace(config=sliding, _supports_default_dynamic_cache=lambda: False)
    assert unusual_layers(own) == ["the layers of SimpleNamespace itself"]
    assert len(DynamicCache(config=sliding).layers) == 2
