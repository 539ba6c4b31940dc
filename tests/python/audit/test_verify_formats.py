"""``--verify`` on quantised bases: an honest engine passes, a wrong scale fails."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_models import save_adapter, save_model
from helpers.verify_cases import Backend, Folders, check
from safetensors.torch import load_file, save_file

from ktrt.checkpoint.experts import ExpertWeights

if TYPE_CHECKING:
    from pathlib import Path


def quantise(folder: Path) -> None:
    """Rewrites all projections as FP8 in blocks of 128, which end inside the matrices."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scales = torch.rand(*(-(-size // 128) for size in weight.shape)) / 100 + 0.01
        rows, columns = (torch.arange(size) // 128 for size in weight.shape)
        codes = (weight / scales[rows][:, columns]).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("fp8")
    model = save_model(folder / "model", "deepseek_v3", 160)
    adapter = save_adapter(folder / "adapter", model, "b")
    quantise(model)
    return model, adapter


@pytest.mark.parametrize("backend", ["AMXBF16", "AMXInt8"])
def test_a_quantised_base_passes(fp8: Folders, backend: Backend) -> None:
    (report,) = check(fp8, backend)
    assert report.passed, report.failures
    assert {"each expert", "self_attn.o_proj"} <= {each.name for each in report.checks}
    assert all(each.undecided == 0 for each in report.checks)


def test_another_scale_fails(fp8: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ExpertWeights.read

    def spoiled(self: ExpertWeights, expert: int) -> Any:
        gate, up, down = original(self, expert)
        if expert == 3:
            down[128:] *= 1.05
        return gate, up, down

    monkeypatch.setattr(ExpertWeights, "read", spoiled)
    (report,) = check(fp8)
    assert report.failures
    assert all("expert 3," in text for text in report.failures if "(expert" in text)
