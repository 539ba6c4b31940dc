"""The pool's slots: memory that comes with writing and goes, and prefixes that are used again."""

from __future__ import annotations

import gc
import mmap
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_chat import make_model, make_tokenizer
from transformers import LlamaConfig

from ktrt.errors import KtrtError
from ktrt.generate.runner import ModelRunner
from ktrt.generate.step import Span, Step
from ktrt.kv import memory, places
from ktrt.kv.memory import ReservedRegion, TensorRegion
from ktrt.kv.pool import KvPool, Slot
from ktrt.kv.static import StaticKv
from ktrt.kv.stores import PlainStore

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = mmap.PAGESIZE
HEADS, SIZE, LAYERS = 2, 64, 3


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model(make_tokenizer())


def config() -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=LAYERS)


class Filled:
    """A pool whose slots are filled without a model: each position holds its token's number."""

    def __init__(self, slots: int = 4, budget: int | None = None) -> None:
        gc.collect()  # the kernel may join neighbouring mappings: others must not go later
        self.cache = StaticKv(config(), slots=slots, capacity=4096, reserved=True)
        self.pool = KvPool(PlainStore(self.cache), budget=budget)
        self.write(Slot(0), [])  # shapes become known
        self.before = mapped(self.cache)

    @property
    def resident(self) -> int:
        """The bytes that the kernel has given out since."""
        return mapped(self.cache) - self.before

    def write(self, slot: Slot, ids: Sequence[int]) -> Slot:
        start = slot.length
        new = torch.tensor([*ids], dtype=torch.bfloat16).view(1, 1, -1, 1)
        new = new.expand(1, HEADS, -1, SIZE).contiguous()
        with self.cache.sequence(slot.index, start, len(ids)):
            for layer in self.cache.layers:
                layer.update(new, -new)
        slot.put(slot.take(), ids)
        return slot

    def held(self, slot: Slot) -> list[int]:
        """Returns layer 1's numbers at the slot's positions."""
        layer = self.cache.layers[1]
        keys = layer.keys[slot.index, :, : slot.length]
        assert torch.equal(layer.values[slot.index, :, : slot.length], -keys)
        assert torch.equal(keys, keys[:1, :, :1].expand_as(keys))
        found: list[int] = keys[0, :, 0].int().tolist()
        return found


def mapped(cache: StaticKv) -> int:
    """The bytes in memory of the mappings that hold the cache, and perhaps neighbours."""
    tensors = [region.tensor for layer in cache.layers for region in layer.regions]
    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(each, 16) for each in found.groups())
            inside = any(first < end and last > start for start, end in ranges)
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("count", [1, 8, 32])
def test_predicted_bytes_are_those_that_are_taken(count: int) -> None:
    filled = Filled(slots=32)
    lengths = [random.Random(n).randint(1, 300) for n in range(count)]
    slots = [filled.write(filled.pool.open(n, ()), range(size)) for n, size in enumerate(lengths)]
    predicted = sum(filled.pool.bytes_of(size) for size in lengths)
    assert filled.pool.committed_bytes == predicted
    row = SIZE * 2
    assert predicted == sum(
        2 * LAYERS * HEADS * (-(-size * row // PAGE) * PAGE) for size in lengths
    )
    assert filled.resident == predicted
    for slot in slots:
        filled.pool.close(slot, keep=False)
    assert filled.pool.committed_bytes == filled.resident == 0
    assert filled.pool.slots_in_use == 0


def test_cropping_gives_pages_back_and_leaves_zeros() -> None:
    filled = Filled()
    slot = filled.write(filled.pool.open("a", ()), range(1, 201))
    filled.pool.rollback(slot, 70)
    assert filled.held(slot) == list(range(1, 71))
    assert not filled.cache.layers[0].keys[slot.index, :, 70:].any()
    assert filled.pool.committed_bytes == filled.resident == filled.pool.bytes_of(70)


def test_regions_clear_what_is_asked() -> None:
    """Whole pages, parts of one, rows across pages; other slots and heads stay."""
    like = torch.empty(0, dtype=torch.bfloat16)
    for size in (24, 64, 2048, 3000):
        for start, end in ((0, 1), (0, 300), (5, 6), (33, 200), (100, 300), (171, 172)):
            shape = 2, 2, memory.ROWS_OF_PAGES, size
            plain, reserved = TensorRegion(shape, like), ReservedRegion(shape, like)
            for region in (plain, reserved):
                region.tensor[:, :, :end] = 1
                region.clear(1, start, end)
            assert torch.equal(plain.tensor[:, :, :400], reserved.tensor[:, :, :400]), (size, start)
            assert not reserved.tensor[1, :, start:end].any()


def test_a_region_that_ends_within_a_page_is_refused() -> None:
    with pytest.raises(KtrtError, match="end within a page"):
        ReservedRegion((1, 1, 100, 3), torch.empty(0, dtype=torch.bfloat16))


def test_fewer_slots_where_addresses_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = 2 * LAYERS * HEADS * 4096 * SIZE * 2
    monkeypatch.setattr(places, "fits", lambda size: size <= 5 * one)
    filled = Filled(slots=16)
    assert filled.cache.slots == filled.pool.most_slots == 4
    assert "4 slots of 4096 tokens, not for 16" in caplog.text
    for n in range(4):
        filled.pool.open(n, ())
    with pytest.raises(KtrtError, match="all 4 slots"):
        filled.pool.open(4, ())


def test_the_longest_prefix_of_the_same_key_is_copied() -> None:
    filled = Filled()
    a = filled.write(filled.pool.open("x", ()), range(1, 101))
    filled.write(filled.pool.open("x", ()), [*range(1, 51), 99])
    filled.write(filled.pool.open("y", ()), range(1, 200))
    d = filled.pool.open("x", [*range(1, 81), 7, 8, 9])
    assert d.ids == filled.held(d) == list(range(1, 81))
    assert a.ids == filled.held(a) == list(range(1, 101))


def test_the_last_token_of_the_prompt_is_never_held() -> None:
    filled = Filled()
    a = filled.write(filled.pool.open("x", ()), range(1, 11))
    assert filled.pool.open("x", range(1, 11)).ids == list(range(1, 10))
    filled.pool.close(a)
    b = filled.pool.open("x", range(1, 11))
    assert b is a
    assert b.ids == filled.held(b) == list(range(1, 10))


def test_another_key_reuses_nothing() -> None:
    """Equal tokens under other adapters have other keys and values."""
    filled = Filled()
    filled.pool.close(filled.write(filled.pool.open("x", ()), range(1, 11)))
    assert filled.pool.open("y", range(1, 20)).ids == []


def test_the_beginning_of_a_long_idle_sequence_is_copied() -> None:
    """Whoever continues the long one finds it again."""
    filled = Filled()
    filled.pool.close(filled.write(filled.pool.open("x", ()), range(1, 101)))
    b = filled.pool.open("x", [*range(1, 21), 3, 4])
    assert b.ids == filled.held(b) == list(range(1, 21))
    assert filled.pool.open("x", range(1, 150)).ids == list(range(1, 101))


def test_the_slot_that_was_idle_for_longest_goes() -> None:
    filled = Filled()
    slots = [filled.write(filled.pool.open(n, ()), range(1, 11)) for n in range(4)]
    for n in (2, 0, 3, 1):
        filled.pool.close(slots[n])
    assert filled.pool.open("x", range(5)) is slots[2]
    assert filled.pool.open("x", range(5)) is slots[0]
    assert filled.pool.open(3, range(1, 12)).length == 10


def test_a_budget_gives_up_idle_slots_and_keeps_promises() -> None:
    filled = Filled()
    one = filled.pool.bytes_of(100)
    filled.pool.budget_bytes = 2 * one
    a = filled.write(filled.pool.open("a", ()), range(1, 101))
    b = filled.pool.open("b", ())
    assert filled.pool.reserve(b, 100)
    assert not filled.pool.room_for(1)
    assert not filled.pool.reserve(b, 101 + PAGE // (2 * SIZE))
    filled.pool.close(a)
    assert filled.pool.room_for(100)
    assert a.length == 0, "given up for the room"
    c = filled.pool.open("c", ())
    assert filled.pool.reserve(c, 100)
    filled.write(b, range(100))
    filled.write(c, range(100))
    assert filled.pool.committed_bytes <= filled.pool.budget_bytes


def test_growth_gives_up_idle_slots() -> None:
    filled = Filled()
    a, b, c = (filled.write(filled.pool.open(key, ()), range(100)) for key in "abc")
    filled.pool.budget_bytes = filled.pool.committed_bytes
    filled.pool.close(a)
    filled.pool.close(b)
    filled.pool.make_room([c], [101])
    assert (a.length, b.length) == (100, 100), "the page is there"
    filled.pool.make_room([c], [200])
    assert (a.length, b.length, c.length) == (0, 100, 100)
    filled.pool.make_room([c], [4000])
    assert (b.length, c.length) == (0, 100)


def test_a_copy_for_which_there_is_no_room_is_not_made() -> None:
    filled = Filled()
    a = filled.write(filled.pool.open("x", ()), range(1, 101))
    filled.pool.budget_bytes = filled.pool.committed_bytes
    assert filled.pool.open("x", range(1, 90)).length == 0
    assert filled.held(a) == list(range(1, 101))


def test_copied_prefixes_compute_what_recomputed_ones_do(llama: Any) -> None:
    runner = ModelRunner(llama, capacity=256, slots=3)
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(1, 300, (60,), generator=generator).tolist()
    first = runner.pool.open("x", ids)
    for part in (ids[:40], ids[40:]):
        runner.run(Step((Span(slot=first, ids=part),)))
    copied, fresh = runner.pool.open("x", [*ids[:40], 7]), runner.pool.open("y", ids)
    assert copied.length == 40
    runner.run(Step((Span(slot=fresh, ids=ids[:40]),)))
    found, expected = (
        runner.run(Step((Span(slot=slot, ids=[7, 8]),)))[0] for slot in (copied, fresh)
    )
    assert torch.equal(found, expected)


def test_memory_that_grew_goes_with_the_last_sequence(llama: Any) -> None:
    runner = ModelRunner(llama)
    assert runner.cache is not None
    slots = [runner.pool.open(n, ()) for n in range(3)]
    for slot in slots:
        runner.run(Step((Span(slot=slot, ids=[5, 6, 7]),)))
    assert runner.cache.slots == 4
    for slot in slots:
        runner.pool.close(slot, keep=False)
    assert runner.cache.slots == 1
    assert runner.cache.bytes_of(1) == 0
    slot = runner.pool.open("x", ())
    runner.run(Step((Span(slot=slot, ids=[5, 6, 7]),)))
    assert slot.length == 3
