"""Tests of ktrt.config.source: YAML files, models' folders, and what is neither."""

import re
from pathlib import Path

import pytest

from ktrt.config import load_config
from ktrt.errors import ConfigError


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A model and an adapter, by the names of their files."""
    for name in (
        "model/config.json", "model/model.safetensors", "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def refused(source: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value)


def test_a_models_folder(folders: Path) -> None:
    config = load_config(folders / "model", {"adapter_name_or_path": str(folders / "adapter")})
    assert config.model.model_name_or_path == folders / "model"
    assert config.adapter.adapter_name_or_path == folders / "adapter"
    with pytest.raises(
        ConfigError, match=f"^{folders}/model with overrides: temperature: expected"
    ):
        load_config(folders / "model", ["temperature=-1"])


def test_other_folders(folders: Path) -> None:
    expected = f"{folders}/adapter is an adapter's folder: expected its base model's folder"
    assert refused(folders / "adapter").startswith(expected)
    (folders / "chat.yaml").touch()
    assert refused(folders).endswith(f"without a model: did you mean {folders}/chat.yaml?")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "model/model.safetensors",
            "is a file of a model: .* the folder of a model: .*/model$",
        ),
        ("model/config.json", "is a file of a model: .* the folder of a model: .*/model$"),
        ("adapter/adapter_config.json", "is a file of an adapter: .* the folder of a model$"),
        ("adapter/adapter_model.bin", "is a file of an adapter"),
        ("some.gguf", "is a GGUF file: expected a YAML file, or a model's folder"),
        ("pytorch_model.bin", "is a file of a model: .* the folder of a model$"),
    ],
)
def test_files_that_are_no_yaml(folders: Path, name: str, expected: str) -> None:
    for file in ("model/config.json", "model/model.safetensors", name):
        (folders / file).write_text("{}")
    assert re.search(f"^{folders}/{name} {expected}", refused(folders / name))


def test_json_is_yaml(folders: Path) -> None:
    for name in ("config.json", "chat.JSON"):
        (folders / name).write_text('{"model_name_or_path": "model"}')
        assert load_config(folders / name).model.model_name_or_path == folders / "model"


def test_neither_file_nor_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    expected = "there is no file or folder {}: expected a YAML file or a model's folder"
    assert refused(Path("Qwen3-0.6B")) == expected.format("Qwen3-0.6B")
    assert refused(Path("Qwen/Qwen3-0.6B")) == expected.format("Qwen/Qwen3-0.6B") + (
        ". ktrt downloads nothing; if this is a Hugging Face id, run\n"
        "  huggingface-cli download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B\nand name Qwen3-0.6B"
    )
