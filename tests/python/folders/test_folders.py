"""Tests of ktrt.folders: classifying a folder given as model or adapter."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ktrt.errors import AdapterError, CheckpointError
from ktrt.folders import check_model_folder, find_adapter_folder, tokenizer_advice

Make = Callable[..., Path]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 4994520\n"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Creates one-byte files below the test's folder; returns that folder."""

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

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_no_regular_file(self, make: Make, name: str) -> None:
        """Reading a pipe would block."""
        root = make(*adapter("."))
        (root / name).unlink()
        os.mkfifo(root / name)
        with pytest.raises(AdapterError, match=f"{name} is no regular file"):
            find_adapter_folder(root)

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
        root = make("notes.txt")
        with pytest.raises(AdapterError, match=r"found .*notes\.txt"):
            find_adapter_folder(root)
        (root / "empty").mkdir()
        with pytest.raises(AdapterError, match="found an empty folder"):
            find_adapter_folder(root / "empty")

    def test_a_pointer_or_a_link_to_nothing(self, make: Make) -> None:
        root = make("pointer/adapter_config.json", "link/adapter_config.json")
        make("pointer/adapter_model.safetensors", content=POINTER)
        (root / "link" / "adapter_model.safetensors").symlink_to("../blobs/12ab")
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: Git LFS pointers"):
            find_adapter_folder(root / "pointer")
        with pytest.raises(AdapterError, match="a link to nothing"):
            find_adapter_folder(root / "link")

    def test_a_model_given_as_adapter(self, make: Make) -> None:
        root = make("model.safetensors")
        make("config.json", content=b'{"architectures": ["MixtralForCausalLM"]}')
        with pytest.raises(AdapterError, match=r"found a model folder \(MixtralForCausalLM\)"):
            find_adapter_folder(root)


def model(folder: str = "m") -> list[str]:
    return [f"{folder}/config.json", f"{folder}/model.safetensors", f"{folder}/tokenizer.json"]


HASH = "0123456789abcdef0123456789abcdef01234567"


class TestModels:
    def refused(self, folder: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            check_model_folder(folder)
        assert str(caught.value).startswith(str(folder))
        return str(caught.value)

    def test_models_pass(self, make: Make) -> None:
        root = make(*model(), "s/config.json", "s/model-00001-of-00002.safetensors")
        make(
            "s/model-00002-of-00002.safetensors", "m/model.gguf", "m/snapshots/x", "m/a.incomplete"
        )
        index(root / "s", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        check_model_folder(root / "m")
        check_model_folder(root / "s")

    @pytest.mark.parametrize(
        ("names", "found"),
        [
            ([], ["is an empty folder"]),
            (["notes.txt"], ["not a model folder", "found notes.txt", "config.json"]),
            (
                [f"snapshots/{HASH}/config.json", "refs/main", "blobs/12"],
                ["cache folder of the Hugging Face hub", f"snapshots/{HASH}"],
            ),
            (
                [f"models--a--b/snapshots/{HASH}/config.json", "models--c--d/refs/main"],
                ["cache folder of the Hugging Face hub", f"models--a--b/snapshots/{HASH}"],
            ),
            ([f"{HASH}/config.json"], ["a folder of snapshots", HASH]),
            (
                ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
                ["is a LoRA adapter", "adapter_name_or_path"],
            ),
            (["adapter_config.json", "adapter_model.safetensors", "config.json"], ["LoRA adapter"]),
            (["model-Q4_K_M.gguf", "config.json"], ["GGUF files (model-Q4_K_M.gguf)"]),
            (
                ["checkpoint-9/config.json", "checkpoint-9/model.safetensors",
                 "checkpoint-10/config.json", "checkpoint-10/model.safetensors", "trainer.json"],
                ["output folder of a training", "checkpoint-9, checkpoint-10", "/checkpoint-10."],
            ),
            (
                ["checkpoint-10/adapter_config.json", "checkpoint-10/adapter_model.safetensors"],
                ["output folder of a training", "They hold adapters", "checkpoint-10 as adapter"],
            ),
            (["pytorch_model-00001-of-00002.bin", "config.json"], ["pickled", "save_pretrained"]),
            (["model_index.json", "unet/config.json"], ["diffusers"]),
            (["model.onnx", "config.json"], ["ONNX"]),
            (["tf_model.h5", "config.json"], ["TensorFlow"]),
            (["params.json", "consolidated.00.pth", "tokenizer.model"], ["its maker's own format"]),
            (["zero_to_fp32.py", "global_step9/x.pt"], ["DeepSpeed", "zero_to_fp32.py"]),
            (["__0_0.distcp", ".metadata"], ["distributed training checkpoint"]),
            (["DeepSeek-V2-Lite/config.json"], ["Name the one with the model", "V2-Lite"]),
            (["config.json", "tokenizer.json"], ["without weights", "no *.safetensors"]),
            (["config.json", "model.safetensors.incomplete"], ["A download did not end (model.sa"]),
            (["model.safetensors", "tokenizer.json"], ["no config.json"]),
            (["consolidated.safetensors", "config.json"], ["(1): model.safetensors"]),
        ],
    )  # fmt: skip
    def test_other_folders(self, make: Make, names: list[str], found: list[str]) -> None:
        root = make("m/x")
        (root / "m" / "x").unlink()
        make(*(f"m/{name}" for name in names))
        message = self.refused(root / "m")
        assert all(each in message for each in found), message

    def test_the_snapshot_of_the_branch_main(self, make: Make) -> None:
        root = make(f"snapshots/{HASH}/config.json", f"snapshots/{HASH[::-1]}/config.json")
        make("refs/main", content=HASH.encode())
        assert f"Name the model's snapshot: {root}/snapshots/{HASH}." in self.refused(root)

    def test_an_adapters_base_is_named(self, make: Make) -> None:
        root = make("adapter_model.safetensors")
        make("adapter_config.json", content=b'{"base_model_name_or_path": "Qwen/Qwen3-30B-A3B"}')
        assert "trained on Qwen/Qwen3-30B-A3B" in self.refused(root)

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.model"])
    def test_pointers_of_git_lfs(self, make: Make, file: str) -> None:
        root = make(*model())
        make(f"m/{file}", content=POINTER)
        assert f"{file}: Git LFS pointers" in self.refused(root / "m")

    def test_shards_that_the_index_names(self, make: Make) -> None:
        root = make("config.json", "model-00001-of-00003.safetensors")
        names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        index(root, *names)
        (root / names[1]).symlink_to("../../blobs/12ab")
        make(".cache/huggingface/download/x.incomplete", "y/snapshots/x", "y/blobs/1.incomplete")
        message = self.refused(root)
        assert f"files of the model are missing or empty (2): {names[1]}, {names[2]}" in message
        assert f"{names[1]} is a link to ../../blobs/12ab, which is not there" in message
        assert "A download did not end (x.incomplete)" in message

    def test_shards_without_an_index(self, make: Make) -> None:
        root = make("config.json", "model-00001-of-00002.safetensors")
        message = self.refused(root)
        assert "model.safetensors.index.json, model-00002-of-00002.safetensors" in message

    def test_an_empty_or_dangling_single_file(self, make: Make) -> None:
        root = make(*model("a"), *model("b"))
        make("a/model.safetensors", content=b"")
        (root / "b/model.safetensors").unlink()
        (root / "b/model.safetensors").symlink_to("gone")
        assert "missing or empty (1): model.safetensors" in self.refused(root / "a")
        assert "is a link to gone" in self.refused(root / "b")

    def test_an_index_next_to_the_single_file_does_not_count(self, make: Make) -> None:
        root = make(*model())
        index(root / "m", "model-00001-of-00002.safetensors")
        check_model_folder(root / "m")

    @pytest.mark.parametrize(
        ("tensor", "scheme"),
        [
            ("model.layers.0.mlp.experts.0.up_proj.weight_scale_2", "NVFP4"),
            ("model.layers.0.mlp.experts.0.up_proj.weight_zero_point", "compressed-tensors"),
            ("model.layers.0.q_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
            ("model.layers.0.q_proj.SCB", "bitsandbytes"),
            ("model.layers.0.q_proj.W_q", "HQQ"),
            ("model.layers.0.q_proj.biases", "MLX"),
        ],
    )
    def test_schemes_that_the_tensors_tell(self, make: Make, tensor: str, scheme: str) -> None:
        root = make(*model("a"), "b/config.json", "b/model-00001-of-00001.safetensors")
        header = json.dumps({tensor: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})
        size = len(header).to_bytes(8, "little")
        make("a/model.safetensors", content=size + header.encode())
        index(root / "b", "model-00001-of-00001.safetensors", tensor=tensor)
        for name in ("a", "b"):
            message = self.refused(root / name)
            assert scheme in message
            assert tensor in message
        if ".experts." in tensor:
            check_model_folder(root / "a", experts_elsewhere=True)

    def test_a_config_that_claims_a_scheme_decides_nothing(self, make: Make) -> None:
        root = make(*model())
        make("m/config.json", content=b'{"quantization_config": {"quant_method": "gptq"}}')
        check_model_folder(root / "m")

    @pytest.mark.parametrize(
        ("names", "advice"),
        [
            (["tokenizer.json"], ""),
            (["tokenizer.model"], "pip install sentencepiece"),
            (["tiktoken.model"], "pip install tiktoken"),
            (["qwen.tiktoken"], "pip install tiktoken"),
            (["tekken.json"], "Mistral"),
            (["config.json"], "holds no tokenizer"),
        ],
    )
    def test_tokenizers(self, make: Make, names: list[str], advice: str) -> None:
        found = tokenizer_advice(make(*names))
        assert advice in found
        assert bool(found) == bool(advice)


def index(folder: Path, *files: str, tensor: str = "w") -> None:
    weight_map = {f"{tensor}{i or ''}": file for i, file in enumerate(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("what", [os.mkfifo, os.mkdir])
def test_files_of_a_model_that_are_none(
    tmp_path: Path, name: str, what: Callable[..., None]
) -> None:
    for each in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / each).write_text("{}")
    (tmp_path / "tokenizer").mkdir()  # a folder whose name is no file's
    (tmp_path / name).unlink()
    what(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        check_model_folder(tmp_path)
