"""The inventory of bytes: what is planned from headers is what a loaded model has, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.coded_checkpoints import code_folder, save_family
from helpers.family_models import families, random_model
from helpers.one_token import decode_a_token
from helpers.tiny_models import LoraPlan, save_adapter, save_model, token_ids
from safetensors.torch import load_file
from torch import nn

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.engine.formats import format_of
from ktrt.experts import find_experts
from ktrt.kv.size import cached_tensors
from ktrt.kv.static import cache_argument
from ktrt.layers import embedding
from ktrt.loading.inventory import (
    ATTENTION,
    EXPERT_BIASES,
    EXPERT_LORA,
    EXPERTS,
    HEAD,
    LORA,
    MLP,
    TABLES,
    Inventory,
    Row,
    loaded_inventory,
    planned_inventory,
)
from ktrt.loading.model import load_model
from ktrt.loading.plan import prepare
from ktrt.loading.step_bytes import bytes_per_token

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.loading.model import LoadedModel

# Latent attention and shared experts; a dense layer; every layer sparse; a head that is the table.
FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral", "granitemoe")
BACKENDS = ("AMXBF16", "AMXInt8", "AMXInt4", "RAWINT4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inventory")


def rows_of(inventory: Inventory, kt_backend: str) -> dict[tuple[str, str], Row]:
    """By kind and form. Buffers are another number of bytes on the meta device."""
    rows = [*inventory.rows, inventory.experts[kt_backend]]
    return {(row.kind, row.form): row for row in rows if row.kind != "buffers"}


def both(
    model: Path, adapter: Path | None, kt_backend: Any, bits: int | None = None, **more: Any
) -> tuple[Inventory, Inventory, LoadedModel]:
    """Returns the planned and the loaded inventory, and the model, for the caller to close."""
    args = (
        ModelArgs(model, quantization_bit=bits, **more),
        AdapterArgs(adapter),
        ExpertArgs(kt_backend, kt_num_threads=1, ktrt_cache=False),
    )
    ready = prepare(*args)
    ready.engine.close()
    loaded = load_model(*args)
    workspace = loaded.engine.workspace_bytes
    if adapter is not None:
        decode_a_token(loaded)  # latent attention takes its copies of LoRA then
    found = loaded_inventory(loaded.model, ready.base.experts.specs, workspace=workspace)
    return ready.inventory, found, loaded


@pytest.mark.parametrize(
    ("kt_backend", "bits"), [(each, 8 if each == "AMXInt8" else None) for each in BACKENDS]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_rows_are_those_of_the_loaded_model(
    folder: Path, family: str, kt_backend: str, bits: int | None
) -> None:
    model = save_model(folder / family, family, 88)
    adapter = save_adapter(folder / f"{family}-adapter", model, "a", LoraPlan(rank=5))
    planned, found, loaded = both(model, adapter, kt_backend, bits)
    loaded.close()
    expected, there = rows_of(planned, kt_backend), rows_of(found, kt_backend)
    # The engine tells the bytes of its LoRA only. Granite's experts lie in one tensor: none here.
    lora = (EXPERT_LORA, "bfloat16")
    if lora in expected:
        assert expected[lora].values > 0
        expected[lora] = replace(expected[lora], values=0.0)
    assert {key: pytest.approx(vars(row)) for key, row in expected.items()} == {
        key: vars(row) for key, row in there.items()
    }
    kinds = {kind for kind, _ in there}
    assert {EXPERTS, ATTENTION, MLP, HEAD, LORA} <= kinds
    assert (EXPERT_LORA in kinds) == (family != "granitemoe")
    assert ("int8" in {form for kind, form in there if kind in (ATTENTION, HEAD)}) == (bits == 8)
    assert there[EXPERTS, format_of(kt_backend).name].share == 4 / 16


@pytest.mark.parametrize(
    ("scheme", "kt_backend", "only", "bits"),
    [
        ("fp8", "FP8", False, None),
        ("int4_g32", "RAWINT4", True, 8),
        ("mxfp4", "MXFP4", False, None),
    ],
)
def test_coded_weights_are_planned_as_loaded(
    folder: Path, scheme: str, kt_backend: str, only: bool, bits: int | None
) -> None:
    """The checkpoint's own bytes: of experts, and of other linear layers that are coded there."""
    original = save_family(folder / f"{scheme}-original", "deepseek_v3")
    coded = code_folder(original, folder / scheme, scheme, experts_only=only).coded
    adapter = save_adapter(folder / f"{scheme}-adapter", original, "a", LoraPlan(rank=5))
    planned, found, loaded = both(coded, adapter, "auto", bits)
    loaded.close()
    assert set(found.experts) == {kt_backend}
    expected, there = rows_of(planned, kt_backend), rows_of(found, kt_backend)
    lora = (EXPERT_LORA, "bfloat16")
    expected[lora] = replace(expected[lora], values=0.0)
    # Which pages are mapped is known by file when planned, by parameter when loaded.
    same = {"mapped": 0, "replaced": 0}
    assert {key: pytest.approx(vars(row) | same) for key, row in expected.items()} == {
        key: vars(row) | same for key, row in there.items()
    }
    assert ((ATTENTION, "fp8") in there) == (scheme == "fp8")
    stored = sum(
        tensor.nbytes
        for name, tensor in load_file(coded / "model.safetensors").items()
        if ".experts." in name and "shared" not in name and not name.endswith("_shape")
    )
    assert stored <= planned.experts[kt_backend].held <= 1.02 * stored + 3 * 4096


def test_another_dtype_is_planned(folder: Path) -> None:
    model = save_model(folder / "float32", "qwen3_moe", 96)
    planned, found, loaded = both(model, None, "AMXInt8", infer_dtype="float32")
    loaded.close()
    expected, there = rows_of(planned, "AMXInt8"), rows_of(found, "AMXInt8")
    assert expected.keys() == there.keys()
    assert {form for kind, form in expected if kind == ATTENTION} == {"float32"}
    for key, row in expected.items():
        # Once it is loaded, nobody knows that a dtype was changed.
        assert replace(row, mapped=there[key].mapped) == there[key]
        assert row.kind == EXPERTS or row.mapped == 0


def padded(rows: int) -> int:
    return -(-rows // 32) * 32


def test_biases_of_experts(folder: Path) -> None:
    family = next(each for each in families() if each.model_type == "gpt_oss")
    model = random_model(family).to(torch.bfloat16)
    model.save_pretrained(folder / "gpt_oss")
    planned, found, loaded = both(folder / "gpt_oss", None, "AMXBF16")
    loaded.close()
    (row,) = planned.of(EXPERT_BIASES)
    specs = find_experts(model)
    each = sum(2 * padded(s.intermediate_size) + padded(s.hidden_size) for s in specs)
    assert row.held == 4 * 8 * each
    assert row.read == 4 * 3 * each
    expected, there = rows_of(planned, "AMXBF16"), rows_of(found, "AMXBF16")
    del expected[EXPERT_BIASES, "float32"]
    assert expected == there


def test_large_tables_are_looked_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_LEAST_BYTES", 1 << 10)
    model = save_model(folder / "tables", "deepseek_v2", 96)
    planned, found, loaded = both(model, None, "AMXBF16")
    loaded.close()
    (row,) = planned.of(TABLES)
    assert (row,) == tuple(found.of(TABLES))
    assert (row.held, row.mapped, row.read, row.gpu) == (384 * 160 * 2, row.held, 160 * 2, False)


def test_on_a_gpu_everything_but_experts_and_tables_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_LEAST_BYTES", 1 << 10)
    skeleton = prepare(
        ModelArgs(save_model(folder / "gpu", "deepseek_v2", 96)),
        AdapterArgs(),
        ExpertArgs(kt_num_threads=1),
    ).base.built.model
    inventory = planned_inventory(skeleton, find_experts(skeleton), {}, gpu=True)
    assert {row.kind for row in inventory.rows if not row.gpu} == {TABLES}
    assert {row.mapped for row in inventory.rows} == {0, inventory.held(TABLES)} - {
        inventory.held(TABLES)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kv_cache_of_a_token(folder: Path, family: str) -> None:
    from transformers import DynamicCache

    model = save_model(folder / f"{family}-kv", family, 96)
    planned, _, loaded = both(model, None, "AMXBF16")
    cache = DynamicCache(config=loaded.model.config)
    with torch.inference_mode():
        loaded.model(token_ids(1, 7), use_cache=True, **{cache_argument(loaded.model): cache})
    loaded.close()
    assert planned.kv.token_bytes * 7 == sum(each.nbytes for each in cached_tensors(cache))


def test_what_a_token_reads_is_the_sum_of_the_rows(folder: Path) -> None:
    model = save_model(folder / "sum", "deepseek_v2", 96)
    adapter = save_adapter(folder / "sum-adapter", model, "a")
    planned, found, loaded = both(model, adapter, "AMXInt8", 8)
    try:
        rows = [*found.rows, *found.experts.values()]
        assert bytes_per_token(loaded.model) == round(sum(row.read for row in rows))
        loaded.adapters.off()
        base = [row for row in rows if row.kind not in (LORA, EXPERT_LORA)]
        assert bytes_per_token(loaded.model) == round(sum(row.read for row in base))
        experts = planned.experts["AMXInt8"]
        assert found.experts["AMXInt8"] == experts
    finally:
        loaded.close()


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64, dtype=torch.bfloat16)
        self.head = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_a_table_that_is_the_head_too_is_counted_once() -> None:
    (row,) = loaded_inventory(Tied()).rows
    assert (row.kind, row.held, row.read, row.values) == (HEAD, 64 * 64 * 2, 64 * 64 * 2, 64 * 64)
