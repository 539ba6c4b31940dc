"""Experts of tiny models in the shipped formats: found under published names, handed over in codes
or dequantised."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoint.test_checkpoint_folder import transposing
from checkpoint.test_codes import decode
from helpers.coded_checkpoints import (
    FAMILIES,
    SCHEMES,
    CodedFolders,
    code_folder,
    fp8_block,
    save_family,
)  # fmt: skip
from safetensors.torch import load_file, save_file

from ktrt.checkpoint.contents import check_contents
from ktrt.checkpoint.experts import find_expert_weights
from ktrt.checkpoint.folder import Checkpoint
from ktrt.checkpoint.names import WeightNames
from ktrt.config import ModelArgs
from ktrt.experts import find_experts
from ktrt.loading.plan import open_base

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.checkpoint.experts import ExpertWeights

# Each family in the formats that it is published in, and the other schemes once.
CASES = [
    ("deepseek_v3", "fp8"), ("qwen3_moe", "fp8"), ("qwen3_moe", "gptq_g128"),
    ("qwen3_moe", "int4_g64"), ("glm4_moe", "fp8_channel"), ("kimi_k2", "int4_g32"),
    ("gpt_oss", "mxfp4"), ("gpt_oss", "fp8"), ("minimax_m2", "fp8"), ("minimax_m2", "mxfp4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save_family(root / family, family)
    return root


def coded(models: Path, folder: Path, family: str, scheme: str, **options: Any) -> CodedFolders:
    assert family in FAMILIES
    assert scheme in SCHEMES
    return code_folder(models / family, folder / "model", scheme, **options)


def experts(folder: Path) -> ExpertWeights:
    base = open_base(ModelArgs(folder))
    check_contents(base.experts.checkpoint, base.names, base.built.config)
    return next(iter(base.experts.weights.values()))


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_experts_come_in_codes(models: Path, tmp_path: Path, family: str, scheme: str) -> None:
    folders = coded(models, tmp_path, family, scheme, experts_only=family == "kimi_k2")
    weights, plain = experts(folders.coded), experts(folders.plain)
    expected = scheme.replace("gptq", "int4")
    assert weights.coded == expected, weights.why_not_coded
    assert plain.coded is None
    assert "stored in F32" in plain.why_not_coded
    for expert in (0, 5):
        for codes, read, value in zip(
            weights.read_codes(expert), weights.read(expert), plain.read(expert), strict=True
        ):
            assert codes is not None
            assert read is not None
            assert value is not None
            assert codes.format == expected
            assert torch.equal(read, value)
            if not scheme.startswith("gptq"):  # whose scales are rounded to BF16
                assert torch.equal(decode(codes), value)


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(file), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


def test_experts_of_several_formats_are_dequantised_with_the_reason(
    models: Path, tmp_path: Path
) -> None:
    folders = coded(models, tmp_path, "qwen3_moe", "fp8")
    stem = "model.layers.0.mlp.experts.3.down_proj.weight"
    plain = load_file(folders.plain / "model.safetensors")[stem]
    change(folders.coded, {stem: plain.bfloat16(), f"{stem}_scale_inv": None})
    weights = experts(folders.coded)
    assert weights.coded is None
    assert weights.why_not_coded == f"{stem}: stored in BF16"
    assert torch.equal(weights.read(3)[2], plain.bfloat16())


def test_int4_of_several_groups_has_the_smallest(models: Path, tmp_path: Path) -> None:
    one = coded(models, tmp_path / "a", "qwen3_moe", "int4_g128")
    other = coded(models, tmp_path / "b", "qwen3_moe", "int4_g32")
    stem = "model.layers.0.mlp.experts.3.down_proj.weight"
    source = load_file(other.coded / "model.safetensors")
    change(one.coded, {f"{stem}_scale": source[f"{stem}_scale"],
                       f"{stem}_packed": source[f"{stem}_packed"]})  # fmt: skip
    weights = experts(one.coded)
    assert weights.coded == "int4_g32"
    for expert in (2, 3):
        for codes, value in zip(weights.read_codes(expert), weights.read(expert), strict=True):
            assert codes is not None
            assert value is not None
            assert codes.format == "int4_g32"
            assert torch.equal(decode(codes), value)


def test_shards_hold_a_tensor_and_its_scales_apart(models: Path, tmp_path: Path) -> None:
    folders = coded(models, tmp_path, "kimi_k2", "int4_g32", experts_only=True)
    whole = experts(folders.coded).read_codes(1)
    tensors = load_file(folders.coded / "model.safetensors")
    (folders.coded / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + name.endswith('_scale')}-of-00002.safetensors"
             for name in tensors}  # fmt: skip
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folders.coded / file)
    (folders.coded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    weights = experts(folders.coded)
    assert weights.coded == "int4_g32"
    for a, b in zip(whole, weights.read_codes(1), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("intermediate", [96, 24])
def test_stacks_that_the_library_transposes_keep_their_codes(
    tmp_path: Path, intermediate: int
) -> None:
    """Qwen3-VL's FP8 experts lie transposed on disk, in blocks; gate and up share a block here."""
    skeleton, path, tensors = transposing(tmp_path, 160, intermediate)
    stored, plain = {}, {}
    for name, stack in tensors.items():
        coded = [fp8_block(matrix) for matrix in stack]
        stored[name] = torch.stack([one["weight"] for one, _ in coded])
        stored[f"{name}_scale_inv"] = torch.stack([one["weight_scale_inv"] for one, _ in coded])
        plain[name] = [value.T for _, value in coded]
    save_file(stored, tmp_path / "model.safetensors")
    found = find_expert_weights(Checkpoint(tmp_path), WeightNames(skeleton), find_experts(skeleton))
    weights = found[path]
    gate, up, down = weights.read(2)
    assert gate is not None
    assert torch.equal(torch.cat([gate, up]), plain[f"{path}.gate_up_proj"][2])
    assert torch.equal(down, plain[f"{path}.down_proj"][2])
    if intermediate == 24:
        # No whole strip of 32 rows.
        assert weights.coded is None
        assert "gate and up share a block of FP8: 24 rows each" in weights.why_not_coded
        return
    assert weights.coded == "fp8", weights.why_not_coded
    for codes, value in zip(weights.read_codes(2), (gate, up, down), strict=True):
        assert codes is not None
        assert torch.equal(decode(codes), value)
