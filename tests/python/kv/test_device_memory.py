"""A GPU's memory for keys, values and states, on the stand-in for the CUDA driver, whose addresses
the CPU can read where they have memory, and nowhere else."""

from __future__ import annotations

import ctypes
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_cuda import FakeCuda, build
from helpers.fake_streams import FakeGraphs, dense_graphs
from transformers import AutoConfig, AutoModelForCausalLM

from ktrt.engine.step_rows import RunningStep, StepRows, TokenSpan
from ktrt.errors import KtrtError
from ktrt.generate import graphs as decode_graph
from ktrt.generate import runner
from ktrt.generate.graphs import NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.generate.step import Span, Step
from ktrt.kv import device
from ktrt.kv.device import device_arrays, has_device_memory
from ktrt.kv.static import StaticKv

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ktrt.kv.memory import Region

GRANULE = 1 << 16
CAPACITY = 4096
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "deepseek_v2": {
        "first_k_dense_replace": 2, "kv_lora_rank": 24, "q_lora_rank": None, "n_routed_experts": 2,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "norm_eps": 1e-5},
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    library = build(tmp_path_factory.mktemp("fake"))
    if library is None:
        pytest.skip("no C++ compiler")
    return FakeCuda(library)


@pytest.fixture
def driver(library: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    def bytes_of(region: Any, device: torch.device) -> torch.Tensor:
        assert device.type == "cpu"
        kept.append(region)  # as torch keeps it
        with torch.inference_mode(False):
            data = (ctypes.c_byte * region.nbytes).from_address(region.address)
            return torch.frombuffer(data, dtype=torch.uint8)

    kept: list[Any] = []
    library.make_current(True)
    monkeypatch.setattr(device, "bytes_of", bytes_of)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(decode_graph, "MIN_WINDOW", 8)
    yield library
    kept.clear()


@pytest.fixture
def on_device(driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners keep their cache there."""
    monkeypatch.setattr(
        runner, "_static",
        lambda model, *_: StaticKv(
            model.config, slots=4, capacity=CAPACITY, reserved=True, driver=driver.path
        ),
    )  # fmt: skip


def make(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@torch.no_grad()
def whole(model: Any, text: list[int]) -> torch.Tensor:
    """The logits [tokens, vocab_size] without a cache."""
    logits: torch.Tensor = model(torch.tensor([text])).logits[0]
    return logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, 64, (count,), generator=generator).tolist()
    return found


def granules(driver: FakeCuda) -> int:
    return int(driver._library.fake_cuda_granules())


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_on_memory_that_stays(family: str, driver: FakeCuda) -> None:
    """Chunks, decode steps by graphs, a longer prompt, and another one after half of it."""
    model = make(family)
    held = KvCache(model, dense_graphs(model))
    text = ids(1500)
    cache = held.runner.cache
    assert cache is not None
    expected = whole(model, text)
    at = 0
    for end in (3, 5, 6, 7, 8, 9, 700, 701, 1500):
        assert close(held.forward(text[at:end]), expected[end - 1])
        at = end
    tensors = [region.tensor.data_ptr() for region in cache.regions]
    before = granules(driver)
    assert held.reuse([*text[:200], 3, 4]) <= 200
    assert granules(driver) <= before
    more = [*text[:200], *ids(5, seed=1)]
    last = held.forward(more[held.length :])
    assert close(last, whole(model, more)[-1])
    assert [region.tensor.data_ptr() for region in cache.regions] == tensors
    assert cache.moves == 0


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_rows_by_graphs(family: str) -> None:
    """Three sequences in blocks of four slots, one of which nobody has opened; a copied prefix."""
    model, running, maker = make(family), RunningStep(), FakeGraphs()
    held = ModelRunner(
        model, running=running,
        row_graphs=lambda cache, step: RowGraphs(model, cache, step, NoHandOff(), maker),
    )  # fmt: skip
    held._on_cpu = False
    texts, slots = [ids(20), ids(9, seed=1), [*ids(20), 5]], []
    for text in texts:
        slot = held.pool.open("key", text)
        held.run(Step((Span(slot=slot, ids=text[slot.length :]),)))
        slots.append(slot)
    for token in range(20, 26):
        spans = tuple(Span(slot=slot, ids=[token]) for slot in slots)
        for text, logits in zip(texts, held.run(Step(spans)), strict=True):
            text.append(token)
            assert close(logits[-1], whole(model, text)[-1])
    assert maker.replays


@pytest.mark.usefixtures("on_device")
def test_a_mixed_step(driver: FakeCuda) -> None:
    """Decode rows are stored with all heads next to each other."""
    model = make("llama")
    cache = StaticKv(model.config, slots=2, capacity=CAPACITY, reserved=True, driver=driver.path)
    layer = cache.layers[0]
    new = torch.randn(1, 1, 3, 16)
    for slot, length in ((0, 3), (1, 2)):
        with cache.sequence(slot, 0, length):
            layer.update(torch.zeros(1, 1, length, 16), torch.zeros(1, 1, length, 16))
    rows = StepRows(3, 2, spans=(TokenSpan(1, 2, 3, 1),))
    rows.slots.copy_(torch.tensor([0, 1]))
    rows.lengths.copy_(torch.tensor([4, 3]))
    cache.will_write(0, 4)
    cache.will_write(1, 4)
    with cache.many(rows):
        keys, values = layer.update(new, 2 * new)
    assert torch.equal(keys[0, :, 3], new[0, :, 0])
    assert torch.equal(keys[1, :, 2:4], new[0, :, 1:3])
    assert torch.equal(values[1, :, 2:4], 2 * new[0, :, 1:3])


def arrays(driver: FakeCuda) -> list[Region]:
    """Keys of 2 heads of 16 and values of 1 head of 4, float32: 144 bytes a position, of which a
    granule has 455."""
    likes = [torch.zeros(1)] * 2
    return device_arrays([(3, 2, 1000, 16), (3, 1, 1000, 4)], likes, driver.path)


def test_memory_follows_the_tokens(driver: FakeCuda) -> None:
    first = granules(driver)
    keys, values = arrays(driver)
    assert granules(driver) == first + 1, "torch asks whose the first bytes are"
    assert keys.tensor.shape == (3, 2, 1000, 16)
    assert values.tensor.stride()[2:] == keys.tensor.stride()[2:] == (36, 1)
    assert keys.commit(1, 455) == GRANULE // 144
    assert values.commit(1, 455) == GRANULE // 144
    assert values.commit(1, 456) == 2 * GRANULE // 144
    assert keys.commit(1, 1000) > 1000
    assert granules(driver) == first + 4
    keys.tensor[1], values.tensor[1] = 1, 2
    assert keys.bytes_of(455) + values.bytes_of(455) in (GRANULE - 1, GRANULE)
    for each in (keys, values):
        each.clear(1, 300, 1000)
    assert granules(driver) == first + 2
    assert keys.tensor[1, :, :300].eq(1).all()
    assert not keys.tensor[1, :, 300:455].any()
    assert not values.tensor[1, :, 300:455].any()
    keys.commit(1, 1000)
    assert not keys.tensor[1, :, 300:].any()
    assert not values.tensor[1, :, 300:].any()


def test_no_memory_left_is_named(driver: FakeCuda) -> None:
    keys, _ = arrays(driver)
    driver.set("granules", granules(driver))
    with pytest.raises(KtrtError, match="no memory left for keys and values .*OUT_OF_MEMORY"):
        keys.commit(2, 1)
    driver.set("granules", 1 << 20)
    keys.commit(2, 1)


def test_fewer_addresses_are_asked_for_where_there_are_few(
    driver: FakeCuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "fits", lambda size, _driver: size < 3_000_000)
    cache = StaticKv(
        make("llama").config, slots=8, capacity=CAPACITY, reserved=True, driver=driver.path
    )
    cache.will_write(0, 1)
    with cache.sequence(0, 0, 1):
        cache.layers[0].update(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16))
    assert cache.slots == 2
    assert "reserves addresses for 2 slots" in caplog.text


def test_a_driver_without_virtual_memory(
    driver: FakeCuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    caplog.set_level(logging.INFO)
    cpu = torch.device("cpu")
    assert has_device_memory(cpu, driver.path)
    driver.set("virtual_memory", 0)
    assert not has_device_memory(cpu, driver.path)
    driver.set("virtual_memory", 1)
    assert not has_device_memory(cpu, "/no/such.so")
    assert "has no virtual memory management" in caplog.text
    assert "/no/such.so cannot be opened" in caplog.text
