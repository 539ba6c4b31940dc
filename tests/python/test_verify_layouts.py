"""``--verify`` reads every layout for itself, and agrees with what was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.adapter_layouts import WRITERS, random_adapter, write_a
from helpers.adapter_names import RENAMES, change
from helpers.adapter_names import WRITERS as OTHER_WRITERS
from helpers.tiny_models import save_model
from helpers.verify_cases import check

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
    """LoRA on other modules too, which are looked up by name."""
    folder = change(write_a(tmp_path / "adapter", random_adapter(model)), RENAMES[rename])
    (report,) = check((model, folder))
    assert report.passed, report.failures
    assert len(report.checks) > 3
