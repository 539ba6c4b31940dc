"""Model folders built from published metadata: ktrt's logits equal transformers' in float32, and
``--verify`` can read them.

The metadata are published config.json files with every key; see helpers/real_models.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from helpers.real_models import NAMES, RealModel, make, write_lora

from ktrt.audit.verify.model import verify
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.loading.model import load_model
from ktrt.loading.plan import plan_memory

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS = ExpertArgs(kt_num_threads=1)
NO_ADAPTER = AdapterArgs(None)
TOKENS = torch.randint(2, 300, (1, 12), generator=torch.Generator().manual_seed(5))


# The reader of --verify gets one of these, whose tensors are named alike, in a usual run.
ALIKE = {
    "deepseek-v2-lite-chat", "deepseek-v3-arch-other-depth", "deepseek-v3-fp8", "glm-4.5-air",
    "minimax-m2.5-fp8", "moonlight-16b-a3b-instruct", "qwen3-next-80b-a3b-instruct",
    "qwen3-vl-30b-a3b",
}  # fmt: skip
TO_VERIFY = [pytest.param(n, marks=pytest.mark.long if n in ALIKE else ()) for n in NAMES]


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> RealModel:
    return make(request.param)


def logits(folder: Path) -> torch.Tensor:
    loaded = load_model(ModelArgs(folder, infer_dtype="float32"), NO_ADAPTER, EXPERTS)
    with torch.no_grad():
        result: torch.Tensor = loaded.model(TOKENS).logits
    loaded.close()
    return result


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("real", NAMES, indirect=True)
def test_logits_are_transformers(real: RealModel, tmp_path: Path) -> None:
    """Loads the folder as published, quantised or not."""
    with torch.no_grad():
        expected = real.reference()(TOKENS).logits
    # The engine's experts round to BF16; everything else is float32 in both.
    assert error(logits(real.write(tmp_path / "shipped")), expected) < 0.02


@pytest.mark.parametrize("real", TO_VERIFY, indirect=True)
def test_verify_reads_the_names(real: RealModel, tmp_path: Path) -> None:
    if real.meta["experts"]["layout"] == "fused" and real.meta.get("transposed_parameters"):
        pytest.skip("experts with biases are not verified yet")
    folder, adapter = real.write(tmp_path / "cast", real.twin), tmp_path / "adapter"
    write_lora(adapter, real)
    model, args = ModelArgs(folder), AdapterArgs(adapter)
    reports = verify(model, args, EXPERTS, everything=False)
    assert reports
    for report in reports:
        assert report.passed, report.failures
        assert "experts in BF16" in report.what
    if real.quantised:
        shipped = ModelArgs(real.write(tmp_path / "shipped"))
        for report in verify(shipped, args, EXPERTS, everything=False):
            assert report.passed, report.failures
            assert "experts in FP8" in report.what


def test_plan_needs_no_weights_read(tmp_path: Path) -> None:
    """Kimi-K2: transformers does not know the model type, but the architecture."""
    folder = make("kimi-k2-fp8").write(tmp_path / "model")
    plan = plan_memory(ModelArgs(folder), NO_ADAPTER, EXPERTS)
    assert plan.items
