"""Predicted bytes of KV caches and adapters, compared with what the process then holds."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.tiny_models import save_model

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.generate.step import Span, Step
from ktrt.loading.model import LoadedModel, load_model
from ktrt.loading.plan import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from ktrt.kv.size import KvSize

# A tiny model of keys and values of every head, and a larger one of latents.
MODELS = {
    "tiny": ("qwen3_moe", {}),
    "larger": ("deepseek_v2", {"hidden_size": 512, "kv_lora_rank": 512, "qk_rope_head_dim": 64}),
}
EXPERTS = ExpertArgs(kt_num_threads=1, ktrt_cache=False)


def resident(tensors: list[torch.Tensor]) -> int:
    """Returns the memory that the mappings of these tensors hold."""
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(each, 16) for each in found.groups())
            inside = any(start < high and low < end for start, end in ranges)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(scope="module", params=MODELS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Iterator[tuple[LoadedModel, KvSize]]:
    family, sizes = MODELS[request.param]
    folder = save_model(tmp_path_factory.mktemp("planned"), family, 96, **sizes)
    args = ModelArgs(folder), AdapterArgs(), EXPERTS
    ready = prepare(*args)
    ready.engine.close()
    model = load_model(*args)
    yield model, ready.inventory.kv
    model.close()


@pytest.mark.parametrize("slots", [1, 8, 32])
def test_kv_bytes(loaded: tuple[LoadedModel, KvSize], slots: int) -> None:
    model, size = loaded
    pool = model.runner.pool
    opened: list[Any] = []
    for number in range(slots):
        ids = [number, *(token % 300 for token in range(40 + 11 * number))]
        slot = pool.open(("row", slots, number), ids)
        model.runner.run(Step((Span(slot=slot, ids=ids),)))
        opened.append(slot)
    cache: Any = model.runner.cache
    tensors = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    planned = sum(size.slot_bytes(slot.length) for slot in opened)
    try:
        assert planned == pytest.approx(resident(tensors), rel=0.05)
        assert pool.committed_bytes == planned
        assert planned >= slots * len(tensors) * mmap.PAGESIZE
    finally:
        for slot in opened:
            pool.close(slot, keep=False)
    assert pool.committed_bytes == 0
    assert resident(tensors) == 0
