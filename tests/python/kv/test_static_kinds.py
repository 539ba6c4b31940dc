"""Sliding windows in rings and states at fixed addresses, against forwards without any cache.

Dense models, whose operations can all be recorded: a recorded step runs without the model, so that
nothing which the host decided can have gone unnoticed.
"""

from __future__ import annotations

import functools
import mmap
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.fake_streams import FakeGraphs, dense_graphs
from transformers import AutoConfig, AutoModelForCausalLM

from ktrt.engine.recording import RecordedSteps
from ktrt.engine.step_rows import RunningStep
from ktrt.generate import graphs as decode_graph
from ktrt.generate.graphs import NoHandOff
from ktrt.generate.row_graphs import RowGraphs
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.generate.step import Span, Step
from ktrt.kv import positions
from ktrt.kv.size import kv_size
from ktrt.kv.static import keeps_states, unusual_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.kv.pool import Slot
    from ktrt.kv.static import StaticKv

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 512,
    "initializer_range": 0.2, "sliding_window": 8, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
# Windows alone; windows and all positions; states; convolutions; states and positions in one layer.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_5_text": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of 12 positions for windows of 8, and windows of graphs that conversations cross."""
    monkeypatch.setattr(positions, "SLACK", 4)
    monkeypatch.setattr(positions, "_BLOCK", 4)
    monkeypatch.setattr(decode_graph, "MIN_WINDOW", 8)


@functools.cache
def make(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    assert not unusual_layers(model)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, 90, (count,), generator=generator).tolist()
    return found


def whole(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The logits after each of ``ids``, without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_chunks_and_recorded_steps(family: str) -> None:
    model, maker = make(family), RecordedSteps()
    cache, ids = KvCache(model, dense_graphs(model, maker)), tokens(53)
    expected = whole(model, ids)
    at = 0
    for count in (3, 5, 20, *[1] * 24):
        at += count
        assert close(cache.forward(ids[at - count : at]), expected[at - 1]), at
    assert maker.proven
    assert cache.has_graphs
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model runs"))
    try:
        assert close(cache.forward(ids[52:]), expected[52])
    finally:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_that_cannot_be_recorded_takes_no_token_twice(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make(family), tokens(16)
    expected = whole(model, ids)
    monkeypatch.setattr(torch.nn.Linear, "forward", _looks_at_numbers(torch.nn.Linear.forward))
    cache = KvCache(model, dense_graphs(model, RecordedSteps()))
    cache.forward(ids[:10])
    for at in range(10, 16):
        assert close(cache.forward(ids[at : at + 1]), expected[at])
    assert not cache.has_graphs


def _looks_at_numbers(forward: Any) -> Any:
    """A forward of the output layer that asks for a number."""

    def looking(self: Any, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = forward(self, states)
        if found.shape[-1] == SIZES["vocab_size"]:
            found[0, 0, 0].item()
        return found

    return looking


class Talks:
    """Conversations on one runner, compared with forwards without a cache."""

    def __init__(self, family: str, *, rows: bool = False) -> None:
        self.model = make(family)
        made = partial(RowGraphs, self.model, handoff=NoHandOff(), maker=FakeGraphs())
        self.runner = ModelRunner(
            self.model, running=RunningStep(), slots=8, row_graphs=made if rows else None
        )
        self.runner._mixed = None  # as on a GPU
        self.held: dict[Slot, list[int]] = {}

    def open(self, key: object, ids: Sequence[int] = ()) -> Slot:
        slot = self.runner.pool.open(key, ids)
        self.held[slot] = slot.ids
        return slot

    def step(self, *parts: tuple[Slot, Sequence[int]]) -> None:
        found = self.runner.run(Step(tuple(Span(slot=slot, ids=ids) for slot, ids in parts)))
        for (slot, ids), logits in zip(parts, found, strict=True):
            self.held[slot] += ids
            assert self.held[slot] == slot.ids
            assert close(logits[-1], whole(self.model, slot.ids)[-1])

    def rollback(self, slot: Slot, length: int) -> int:
        self.runner.pool.rollback(slot, length)
        self.held[slot] = slot.ids
        return slot.length


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_stand_for_nothing_keep_what_they_hold(family: str) -> None:
    talks = Talks(family, rows=True)
    a, b, c = (talks.open(key) for key in "abc")
    for slot, count in ((a, 9), (b, 20), (c, 5)):
        talks.step((slot, tokens(count, count)))
    talks.step((a, [3]), (b, [4]), (c, [5]))
    for token in range(6, 16):
        talks.step((a, [token]), (c, [token + 1]))
    talks.step((b, [7]))
    talks.step((a, [8]), (b, [9]), (c, [10]))


@pytest.mark.parametrize("family", FAMILIES)
def test_back_to_marks_and_within_a_ring(family: str) -> None:
    talks = Talks(family)
    slot = talks.open("x")
    states = keeps_states(talks.model)
    talks.step((slot, tokens(10)))
    talks.runner.pool.mark(slot)
    talks.step((slot, tokens(2, 1)))
    # Three positions more than the window are held.
    assert talks.rollback(slot, 11) == (10 if states else 11)
    talks.step((slot, tokens(7, 2)))
    talks.runner.pool.mark(slot)
    for token in range(3, 30):
        talks.step((slot, [token]))
    # 18 or 17 positions at the mark, then 27 more.
    assert talks.rollback(slot, slot.length - 1) == (17 if states else 44)
    talks.step((slot, [5, 6, 7]))
    assert talks.rollback(slot, 17) == (17 if states else 10)
    talks.step((slot, tokens(30, 3)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_goes_from_slot_to_slot(family: str) -> None:
    talks = Talks(family)
    first = talks.open("x")
    prompt = tokens(21)
    talks.step((first, prompt))
    talks.runner.pool.mark(first)
    talks.step((first, tokens(15, 1)))
    second = talks.open("x", [*prompt, 2, 3])
    assert second is not first
    assert second.ids == prompt
    talks.step((second, [2, 3]), (first, [4]))
    third = talks.open("x", [*first.ids, 5])
    assert third.ids == first.ids
    talks.step((third, [6, 7]), (first, [5]), (second, [8]))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_prompt_goes_on_from_the_last_mark(family: str) -> None:
    talks = Talks(family)
    slot = talks.open("x")
    talks.step((slot, tokens(14)))
    talks.runner.pool.mark(slot)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = talks.model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talks.step((slot, tokens(30, 1)))
    hook.remove()
    talks.held[slot] = slot.ids
    assert slot.length == 14
    talks.step((slot, tokens(6, 2)))


def resident_bytes(cache: StaticKv) -> int:
    """Returns the bytes of the cache's pages that the process has, by Linux's own count."""
    states = [state for each in cache._states for state in each.arrays.values()]
    arrays = [*(region.tensor for region in cache.regions), *states]
    storages = {s.data_ptr(): s.nbytes() for s in (each.untyped_storage() for each in arrays)}
    found = 0
    with Path("/proc/self/pagemap").open("rb") as pages:
        for first, size in storages.items():
            pages.seek(first // mmap.PAGESIZE * 8)
            facts = array("Q", pages.read(-(-size // mmap.PAGESIZE) * 8))
            found += sum(fact >> 63 for fact in facts) * mmap.PAGESIZE
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_planned_and_counted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "_BLOCK", 256)
    model = make(family)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    planned = kv_size(skeleton, (), torch.float32)
    runner = ModelRunner(model, slots=2, capacity=2048)
    pool = runner.pool
    assert pool.bytes_of(5) == 0
    slot = pool.open("x", ())
    runner.run(Step((Span(slot=slot, ids=tokens(30)),)))
    held = runner.cache
    assert held is not None
    assert pool.committed_bytes == held.bytes_of(30) == resident_bytes(held) > 0
    for count in (1, 30, 2000):
        assert held.bytes_of(count) == planned.slot_bytes(count)
        assert 0 < planned.bytes_of(count) <= held.bytes_of(count)
    assert (held.bytes_of(2000) > held.bytes_of(256)) == (family != "mistral")
    before = pool.committed_bytes
    pool.mark(slot)
    assert (pool.committed_bytes > before) == keeps_states(model)
    pool.close(slot, keep=False)
    assert pool.committed_bytes == 0
