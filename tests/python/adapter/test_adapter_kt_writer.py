"""Layouts c, e and f from kt_kernel's own writer and converter; its reader judges our test
writer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter.test_adapter_every_layout import assert_same, plan
from helpers import kt_adapter_writer
from helpers.adapter_layouts import (
    FUSED,
    PROJECTIONS,
    Adapter,
    random_adapter,
    write_a,
    write_c,
    write_manifest,
)
from helpers.tiny_models import base_of, save_model
from safetensors.torch import load_file, save_file

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter import BaseModel

_REASON = kt_adapter_writer.why_unavailable()
pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(_REASON is not None, reason=_REASON or ""),
]
FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module", params=FAMILIES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Adapter, BaseModel]:
    model = save_model(tmp_path_factory.mktemp("model"), request.param, 96)
    return random_adapter(model, extra_experts=2), base_of(model)


def save_by_kt(folder: Path, adapter: Adapter, *, extra: bool = False) -> Path:
    write_c(folder, adapter)
    (folder / "kt_adapter_manifest.json").unlink()
    if extra:
        tensors = {
            f"layers.{layer}.{i}.{projection}": matrix
            for layer, mlps in adapter.extra.items()
            for i, mlp in enumerate(mlps)
            for projection, matrix in zip(PROJECTIONS, mlp, strict=True)
        }
        save_file(tensors, folder / kt_adapter_writer.EXTRA_INPUT)
    kt_adapter_writer.run_kt("save", folder, adapter.rank, adapter.alpha)
    return folder


def test_written_by_kt_kernel(case: tuple[Adapter, BaseModel], tmp_path: Path) -> None:
    adapter, base = case
    folder = save_by_kt(tmp_path / "c", adapter)
    expected = plan(write_a(tmp_path / "a", adapter), base)
    assert_same(plan(folder, base), expected)
    kt_adapter_writer.run_kt("convert", folder, adapter.rank, adapter.alpha, tmp_path / "f")
    assert_same(plan(tmp_path / "f", base), expected)


def test_extra_experts_written_by_kt_kernel(
    case: tuple[Adapter, BaseModel], tmp_path: Path
) -> None:
    adapter, base = case
    found = plan(save_by_kt(tmp_path, adapter, extra=True), base)
    assert found.audit.found == len(found.files.tensors)
    for layer, mlps in adapter.extra.items():
        for mlp, matrices in zip(found.extra[f"model.layers.{layer}.mlp"], mlps, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mlp, matrices, strict=True))


def test_kt_kernel_accepts_our_writers_files(
    case: tuple[Adapter, BaseModel], tmp_path: Path
) -> None:
    adapter, _ = case
    ours = write_c(tmp_path / "ours", adapter)
    manifest = json.loads((ours / "kt_adapter_manifest.json").read_text("utf-8"))
    theirs = save_by_kt(tmp_path / "theirs", adapter)
    expected = json.loads((theirs / "kt_adapter_manifest.json").read_text("utf-8"))
    assert manifest == expected
    kt_adapter_writer.run_kt("load", ours, adapter.rank, adapter.alpha)


CHANGES: list[dict[str, Any]] = [
    {"version": 2},
    {"status": "writing"},
    {"lora": {"rank": 8, "alpha": 8.0}},
    {"artifacts": {}},
]


@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_manifests_that_kt_kernel_refuses(
    case: tuple[Adapter, BaseModel], tmp_path: Path, change: dict[str, Any]
) -> None:
    adapter, base = case
    folder = write_c(tmp_path, adapter)
    write_manifest(folder, adapter, **change)
    with pytest.raises(AssertionError, match="KTArtifactError"):
        kt_adapter_writer.run_kt("load", folder, adapter.rank, adapter.alpha)
    with pytest.raises(AdapterError, match="kt_adapter_manifest"):
        plan(folder, base)
    assert load_file(folder / FUSED)
