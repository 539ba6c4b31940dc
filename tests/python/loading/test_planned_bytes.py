"""Predicted bytes of KV caches and adapters, compared with what the process then holds."""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.one_token import decode_a_token
from helpers.tiny_models import LoraPlan, save_adapter, save_model

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.generate.step import Span, Step
from ktrt.loading.inventory import EXPERT_LORA, LINEAR_LORA, LORA, loaded_inventory
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
    for region in (each for layer in cache.layers for each in layer.regions):
        # The kernel lists neighbours of one kind, other models' too, as one mapping.
        region._map.madvise(mmap.MADV_DONTFORK)
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


KINDS = (EXPERT_LORA, LINEAR_LORA, LORA)


def private_bytes() -> int:
    """Returns the memory that is this process's alone and no file's."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", MODELS)
def test_lora_bytes(tmp_path: Path, name: str, bits: int | None, one_thread: None) -> None:
    """One adapter and three: planned from their headers, then counted by who holds them, and in the
    larger model by the kernel."""
    family, sizes = MODELS[name]
    if name == "larger":
        sizes = {**sizes, "n_routed_experts": 64}
    folder = save_model(tmp_path / "model", family, 512 if name == "larger" else 96, **sizes)
    ranks = {f"r{rank}": rank for rank in (8, 16, 5)}
    paths = {
        each: save_adapter(tmp_path / each, folder, "a", LoraPlan(rank=rank, seed=rank))
        for each, rank in ranks.items()
    }
    args = ModelArgs(folder, quantization_bit=bits)

    def planned(names: list[str]) -> dict[str, int]:
        adapters = AdapterArgs(adapters={each: paths[each] for each in names})
        ready = prepare(args, adapters, EXPERTS)
        ready.engine.close()
        return {kind: ready.inventory.held(kind) for kind in KINDS}

    loaded = load_model(args, AdapterArgs(adapters={"r8": paths["r8"]}), EXPERTS)
    try:
        decode_a_token(loaded)  # latent attention takes its copies then
        held = loaded_inventory(loaded.model)
        one = planned(["r8"])
        assert {kind: held.held(kind) for kind in KINDS} == one
        assert all(one.values())
        loaded.adapters.load("again", paths["r8"])  # what the first load of all makes stays
        before = private_bytes()
        for each in ("r16", "r5"):
            loaded.adapters.load(each, paths[each])
        after = private_bytes()
        three, held = planned(list(paths)), loaded_inventory(loaded.model)
        again = {kind: three[kind] + one[kind] for kind in KINDS}
        assert {kind: held.held(kind) for kind in KINDS} == again
        if name == "larger":
            more = sum(three.values()) - sum(one.values())
            assert more == pytest.approx(after - before, rel=0.05)
    finally:
        loaded.close()
