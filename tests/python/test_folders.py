"""Tests of ktrt.folders: what a folder given as model or adapter is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ktrt.errors import AdapterError
from ktrt.folders import find_adapter_folder

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes files (with one byte each) below the test's folder, which it returns."""

    def make(*names: str, content: bytes = b"x") -> Path:
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return tmp_path

    return make


def adapter(folder: str, weights: str = "adapter_model.safetensors") -> tuple[str, str]:
    return f"{folder}/adapter_config.json", f"{folder}/{weights}"


class TestAdapters:
    @pytest.mark.parametrize(
        "weights",
        [
            "adapter_model.safetensors",
            "adapter_model.bin",
            "adapter_model.pt",
            "adapter_model-00001-of-00003.safetensors",
            "fused_expert_lora.safetensors",
            "lora_experts.safetensors",
        ],
    )
    def test_the_folder_itself_comes_first(self, make: Make, weights: str) -> None:
        root = make(weights, *adapter("checkpoint-7"))
        assert find_adapter_folder(root) == (root, None)

    def test_the_newest_checkpoint_by_number(self, make: Make) -> None:
        root = make("trainer_state.json", *adapter("checkpoint-20"), *adapter("checkpoint-100"))
        folder, note = find_adapter_folder(root)
        assert folder == root / "checkpoint-100"
        assert note is not None
        assert "newest checkpoint, checkpoint-100" in note

    def test_an_interrupted_save_is_passed_over(self, make: Make) -> None:
        root = make(*adapter("checkpoint-20"), "checkpoint-100/adapter_config.json")
        make(*adapter("checkpoint-40")[:1])
        make("checkpoint-40/adapter_model.safetensors", content=b"")
        folder, note = find_adapter_folder(root)
        assert folder == root / "checkpoint-20"
        assert note is not None
        assert "(incomplete: checkpoint-40, checkpoint-100)" in note

    def test_checkpoints_without_adapter_do_not_count(self, make: Make) -> None:
        root = make(*adapter("checkpoint-20"), "checkpoint-100/model.safetensors")
        assert find_adapter_folder(root)[0] == root / "checkpoint-20"

    def test_the_only_one_a_folder_deeper(self, make: Make) -> None:
        root = make("README.md", "logs/events.out", *adapter("lora_adapter"))
        folder, note = find_adapter_folder(root)
        assert folder == root / "lora_adapter"
        assert note is not None
        assert "lora_adapter" in note

    @pytest.mark.parametrize("other", ["reward", "checkpoint-20"])
    def test_several_are_listed(self, make: Make, other: str) -> None:
        root = make(*adapter("policy"), *adapter(other))
        with pytest.raises(AdapterError, match="2 folders with one") as caught:
            find_adapter_folder(root)
        assert str(root / "policy") in str(caught.value)
        assert str(root / other) in str(caught.value)

    def test_deeper_ones_are_named_and_not_taken(self, make: Make) -> None:
        root = make(*adapter("runs/monday/checkpoint-20"))
        with pytest.raises(AdapterError, match="runs/monday/checkpoint-20"):
            find_adapter_folder(root)

    def test_none(self, make: Make) -> None:
        root = make("config.json", "notes.txt")
        with pytest.raises(AdapterError, match=r"found .*notes\.txt"):
            find_adapter_folder(root)
        (root / "empty").mkdir()
        with pytest.raises(AdapterError, match="found an empty folder"):
            find_adapter_folder(root / "empty")
