"""``--verify`` reads every layout for itself, and agrees with what was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.adapter_layouts import WRITERS, random_adapter
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
