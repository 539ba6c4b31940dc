"""Model folders: lazily read, every damage named, every expert found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import NUM_EXPERTS, base_of, save_model, weight_shapes
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ktrt.checkpoint.experts import ExpertWeights, find_expert_weights
from ktrt.checkpoint.folder import Checkpoint
from ktrt.checkpoint.names import WeightNames, WeightTarget
from ktrt.errors import CheckpointError
from ktrt.experts import find_experts

LAYER = "model.layers.1.mlp.experts"
EXPERT = f"{LAYER}.3"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("deepseek"), "deepseek_v2", 96)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def find(folder: Path) -> dict[str, ExpertWeights]:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return find_expert_weights(Checkpoint(folder), WeightNames(skeleton), find_experts(skeleton))


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds, or (None) drops tensors of the single file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file)


def shard(folder: Path) -> Path:
    """Splits the single file into two shards with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return index


def test_names_shapes_and_rows(original: Path) -> None:
    checkpoint = Checkpoint(original)
    tensors = load_file(original / "model.safetensors")
    assert set(checkpoint.names()) == set(tensors)
    name = f"{EXPERT}.gate_proj.weight"
    assert checkpoint.shape(name) == (96, 160)
    assert checkpoint.dtype(name) == "BF16"
    assert torch.equal(checkpoint.read(name), tensors[name])
    assert torch.equal(checkpoint.read_row(name, 5), tensors[name][5])


def test_shards_give_the_same_experts(original: Path, model: Path) -> None:
    shard(model)
    whole, sharded = find(original)[LAYER], find(model)[LAYER]
    tensors = load_file(original / "model.safetensors")
    for expert in (0, 3, NUM_EXPERTS - 1):
        for a, b, projection in zip(
            whole.read(expert), sharded.read(expert), ("gate", "up", "down"), strict=True
        ):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)
            assert torch.equal(a, tensors[f"{LAYER}.{expert}.{projection}_proj.weight"])


def test_stacked_experts_are_read_one_by_one(tmp_path: Path) -> None:
    model = save_model(tmp_path, "granitemoe", 96)
    tensors = load_file(model / "model.safetensors")
    (name,) = (n for n in tensors if "layers.1." in n and "input_linear" in n)
    path = next(p for p in find(model) if ".1." in p)
    gate, up, down = find(model)[path].read(5)
    assert gate is not None
    assert torch.equal(torch.cat([gate, up]), tensors[name][5])
    assert torch.equal(down, tensors[name.replace("input", "output")][5])


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("deepseek_v2", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", ["w1", "w3", "w2"]),
        ("granitemoe", []),
    ],
)
def test_names_of_single_experts_on_disk(tmp_path: Path, model_type: str, names: list[str]) -> None:
    base = base_of(save_model(tmp_path, model_type, 96))
    found = {
        projection: name.rpartition(".")[2]
        for (_, expert, projection), name in base.expert_modules.items()
        if expert == 2
    }
    assert found == dict(zip(("gate", "up", "down"), names, strict=False))


def test_targets_of_names(original: Path) -> None:
    names = base_of(original).names
    gate_up = f"{LAYER}.gate_up_proj"
    assert names.target(f"{EXPERT}.gate_proj.weight") == WeightTarget(gate_up, 3, 0, 2)
    assert names.target(f"{EXPERT}.up_proj.weight") == WeightTarget(gate_up, 3, 1, 2)
    assert names.target(f"{EXPERT}.down_proj.weight") == WeightTarget(f"{LAYER}.down_proj", 3)
    assert names.target(gate_up) == WeightTarget(gate_up)
    assert names.target("lm_head.weight") == WeightTarget("lm_head.weight")
    assert names.target("no.such.thing") == WeightTarget("no.such.thing")


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)


def test_bin_only_folder_gets_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"python -c .*save_pretrained"):
        Checkpoint(tmp_path)


def test_missing_shard(model: Path) -> None:
    shard(model)
    (model / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        Checkpoint(model)


def test_index_that_names_a_tensor_its_shard_lacks(model: Path) -> None:
    index = shard(model)
    content = json.loads(index.read_text("utf-8"))
    content["weight_map"]["lm_head.extra"] = "model-0.safetensors"
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors does not hold lm_head\.extra"):
        Checkpoint(model)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"metadata": 1}'])
def test_damaged_index(model: Path, content: str) -> None:
    shard(model).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint(model)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_file(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete"):
        Checkpoint(model)


def test_a_file_that_cannot_be_opened_is_not_called_incomplete(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors reports "No such file" without read permission. Simulated: root may read all."""

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    checkpoint = Checkpoint(model)
    monkeypatch.setattr(Path, "open", forbidden)
    checkpoint._handles.clear()
    with pytest.raises(CheckpointError, match="safetensors cannot be read: Permission denied"):
        checkpoint._open(model / "model.safetensors")


def test_missing_expert_tensor(model: Path) -> None:
    rewrite(model, {f"{EXPERT}.up_proj.weight": None})
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.gate_up_proj, expert 3 \(up\)"):
        find(model)


def test_missing_layer(model: Path) -> None:
    names = [n for n in weight_shapes(model) if n.startswith(f"{LAYER}.")]
    rewrite(model, dict.fromkeys(names))
    with pytest.raises(
        CheckpointError, match=rf"{LAYER}\.gate_up_proj, expert 0 .*found 0 tensors"
    ):
        find(model)


def test_wrong_shape_names_found_and_expected(model: Path) -> None:
    rewrite(model, {f"{EXPERT}.down_proj.weight": torch.zeros(96, 160)})
    with pytest.raises(CheckpointError, match=r"shape \[96, 160\], expected \[160, 96\]"):
        find(model)


def test_surplus_expert(model: Path) -> None:
    rewrite(model, {f"{LAYER}.{NUM_EXPERTS}.down_proj.weight": torch.zeros(160, 96)})
    with pytest.raises(CheckpointError, match=r"expert 16, but config\.json says 16 experts"):
        find(model)


def test_two_tensors_for_the_same_weights(model: Path) -> None:
    # The same expert stacked and alone.
    rewrite(model, {f"{LAYER}.down_proj": torch.zeros(NUM_EXPERTS, 160, 96)})
    with pytest.raises(CheckpointError, match=r"repeats weights of model\.layers\.1\.mlp\.experts"):
        find(model)
    rewrite(
        model, {f"{LAYER}.down_proj": None, f"{LAYER}.03.down_proj.weight": torch.zeros(160, 96)}
    )
    with pytest.raises(CheckpointError, match="are the same weights"):
        find(model)


def test_quantised_experts_are_refused(model: Path) -> None:
    quantised = torch.zeros(160, 96, dtype=torch.float8_e4m3fn)
    rewrite(model, {f"{EXPERT}.down_proj.weight": quantised})
    with pytest.raises(CheckpointError, match=r"F8_E4M3, expected one of F32, F16, BF16"):
        find(model)


def transposing(
    tmp_path: Path, hidden: int = 32, intermediate: int = 24
) -> tuple[torch.nn.Module, str, dict[str, torch.Tensor]]:
    """Returns a model whose experts transformers transposes while loading; writes its folder."""
    text = {
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
        "num_experts": 4,
        "num_hidden_layers": 1,
    }
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model("qwen3_vl_moe", text_config=text)
        )
    path = find_experts(skeleton)[0].path
    tensors = {
        f"{path}.gate_up_proj": torch.randn(4, hidden, 2 * intermediate),
        f"{path}.down_proj": torch.randn(4, intermediate, hidden),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return skeleton, path, tensors


def test_experts_that_the_library_transposes(tmp_path: Path) -> None:
    skeleton, path, tensors = transposing(tmp_path)
    found = find_expert_weights(Checkpoint(tmp_path), WeightNames(skeleton), find_experts(skeleton))
    for expert in (2, 0):
        gate, up, down = found[path].read(expert)
        assert gate is not None
        both = tensors[f"{path}.gate_up_proj"][expert].T
        assert torch.equal(torch.cat([gate, up]), both)
        assert torch.equal(down, tensors[f"{path}.down_proj"][expert].T)


def test_tensors_that_the_library_cannot_convert(tmp_path: Path) -> None:
    skeleton, path, tensors = transposing(tmp_path)
    tensors[f"{path}.gate_up_proj"] = torch.zeros(4, 32, 40)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \[4, 40, 32\], expected \[4, 48, 32\]"):
        find_expert_weights(Checkpoint(tmp_path), WeightNames(skeleton), find_experts(skeleton))
    tensors[f"{path}.gate_up_proj"] = torch.zeros(4, 32, 48, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has dtype I8, expected one of F32, F16, BF16"):
        find_expert_weights(Checkpoint(tmp_path), WeightNames(skeleton), find_experts(skeleton))
