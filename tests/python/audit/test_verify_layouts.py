"""``--verify`` reads every layout independently, and agrees with the loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from helpers.adapter_layouts import WRITERS, random_adapter, write_a
from helpers.adapter_names import RENAMES, change
from helpers.adapter_names import WRITERS as OTHER_WRITERS
from helpers.tiny_models import (
    read_folder,
    save_adapter,
    save_model,
    weight_shapes,
    write_adapter,
)
from helpers.verify_cases import check

from ktrt.audit.report import verification

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral", 96)


@pytest.mark.parametrize("shared", [False, True], ids=["by expert", "shared outer"])
@pytest.mark.parametrize("layout", sorted(set(WRITERS) - {"bin"}))
def test_every_layout(model: Path, tmp_path: Path, layout: str, shared: bool) -> None:
    adapter = random_adapter(model, sharing="outer" if shared else "nothing")
    (report,) = check((model, WRITERS[layout](tmp_path / "adapter", adapter)))
    assert report.passed, report.failures
    assert report.checks[0].apart > 1


@pytest.mark.parametrize("writer", OTHER_WRITERS)
def test_other_writers(model: Path, tmp_path: Path, writer: str) -> None:
    (report,) = check((model, OTHER_WRITERS[writer](tmp_path / "adapter", random_adapter(model))))
    assert report.passed, report.failures
    assert report.checks[0].apart > 1


@pytest.mark.parametrize("rename", ["all at once", "wrapped and named"])
def test_other_names(model: Path, tmp_path: Path, rename: str) -> None:
    """LoRA also acts on other modules, which are looked up by name."""
    folder = change(write_a(tmp_path / "adapter", random_adapter(model)), RENAMES[rename])
    (report,) = check((model, folder))
    assert report.passed, report.failures
    assert len(report.checks) > 3


def test_tensors_outside_the_layers_are_said_to_be_unchecked(model: Path, tmp_path: Path) -> None:
    """Whole tables are outside the layers: "verified" must not seem to include them."""
    folder = save_adapter(tmp_path / "adapter", model, "b")
    tensors, config = read_folder(folder)
    head = weight_shapes(model)["lm_head.weight"]
    tensors["base_model.model.lm_head.weight"] = torch.zeros(head)
    write_adapter(folder, tensors, config | {"modules_to_save": ["lm_head"]})
    reports = check((model, folder))
    assert reports[0].passed
    text = "\n".join(str(line) for line in verification(reports))
    assert "not checked, outside the layers: lm_head.weight" in text.replace(
        "base_model.model.", ""
    )
    (plain,) = check((model, save_adapter(tmp_path / "plain", model, "b")))
    assert "not checked" not in "\n".join(str(line) for line in verification([plain]))
