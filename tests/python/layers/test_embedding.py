"""Which tables of embeddings a GPU's model keeps in RAM. That they are read from there:
test_gpu_model.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ktrt.experts import find_experts
from ktrt.layers import embedding
from ktrt.layers.embedding import tables_to_host
from ktrt.loading.inventory import planned_inventory
from ktrt.loading.memory import make_plan
from ktrt.machine.memory import Limit


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_LEAST_BYTES", 1 << 10)


def model(*, tied: bool) -> Any:
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        moe_intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_a_table_that_is_the_head_too_stays() -> None:
    assert list(embedding.host_tables(model(tied=False))) != []
    assert list(embedding.host_tables(model(tied=True))) == []


def test_small_shared_and_renormalised_tables() -> None:
    table = nn.Embedding(100, 16)
    shared = nn.Embedding(100, 16)
    shared.weight = table.weight
    modules = nn.ModuleList(
        [table, shared, nn.Embedding(4, 16), nn.Embedding(100, 16, max_norm=1.0)]
    )
    assert list(embedding.host_tables(modules)) == [table]


def test_on_the_cpu_nothing_moves() -> None:
    table = nn.Embedding(100, 16)
    before = table.weight.data_ptr()
    assert tables_to_host(table) == 0
    assert table.weight.data_ptr() == before


@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_puts_them_in_ram(tied: bool) -> None:
    skeleton = model(tied=tied)
    size = 96 * 32 * 2

    def plan(gpu: Limit | None) -> dict[str, tuple[int, int]]:
        inventory = planned_inventory(
            skeleton, find_experts(skeleton), {"AMXBF16": {}}, gpu=gpu is not None
        )
        made = make_plan(inventory, skeleton.config, "AMXBF16", gpu=gpu)
        return {item.name: (item.ram, item.gpu) for item in made.items}

    without, with_gpu = plan(None), plan(Limit(1 << 30, "a GPU"))
    others = without["other weights"][0]
    assert "tables of embeddings, pinned" not in without
    # Without a GPU the file's pages hold a table, and few of its rows are ever read.
    assert with_gpu["other weights"] == (0, others)
    if tied:
        assert "tables of embeddings, pinned" not in with_gpu
    else:
        assert with_gpu["tables of embeddings, pinned"] == (size, 0)
