"""Keys of the scheduler, and of kernels that make answers independent of each other."""

from pathlib import Path

import pytest

from ktrt.config import Config, load_config
from ktrt.errors import ConfigError

DEMO = Path(__file__).resolve().parents[3] / "examples/demo/model"


def test_many_answers_at_once(tmp_path: Path) -> None:
    def load(text: str) -> Config:
        (tmp_path / "config.yaml").write_text(f"model_name_or_path: {DEMO}\n{text}", "utf-8")
        return load_config(tmp_path / "config.yaml")

    config = load("max_num_seqs: 4\nmin_tokens_per_second: 0\nkt_fixed_kernels: true")
    assert config.scheduler.max_num_seqs == 4
    assert config.scheduler.min_tokens_per_second == 0
    assert config.experts.kt_fixed_kernels is True
    assert not config.scheduler.reproducible
    assert load("reproducible: true").scheduler.reproducible
    for text, message in (
        ("max_num_seqs: 0", "max_num_seqs: expected at least 1, found 0"),
        ("min_tokens_per_second: -1", "expected 0 \\(off\\) or more, found -1"),
        ("max_concurrent: 3", "did you mean 'max_num_seqs'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(text)
