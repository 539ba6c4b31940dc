"""Ambiguous adapters are refused, and adapters that the engine cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter.test_adapter_every_layout import assert_same, plan
from helpers.adapter_layouts import (
    FUSED,
    WRITERS,
    Adapter,
    P,
    per_expert,
    random_adapter,
    write_a,
    write_c,
    write_c_bare,
    write_stacked,
)
from helpers.tiny_models import base_of, read_folder, save_model, write_adapter
from safetensors.torch import load_file, save_file

from ktrt.adapter.layouts.interface import (
    MAX_RANK,
    Part,
    check_magnitude,
    collect_layouts,
)
from ktrt.adapter.tensors import AdapterTensor
from ktrt.config import ExpertArgs
from ktrt.engine.build import build_engine
from ktrt.errors import AdapterError
from ktrt.experts import find_experts, new_layer

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.adapter import BaseModel
    from ktrt.adapter.files.settings import LoraSettings

PATH = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral", 96)


@pytest.fixture(scope="module")
def base(model: Path) -> BaseModel:
    return base_of(model)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Adapter:
    return random_adapter(model)


def refuse(folder: Path, base: BaseModel, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        plan(folder, base)


def test_one_tensor_for_all_and_one_for_each(
    adapter: Adapter, base: BaseModel, tmp_path: Path
) -> None:
    tensors, config = read_folder(write_a(tmp_path, adapter))
    tensors[f"{P}{PATH}.w1.lora_A.weight"] = tensors[f"{P}{PATH}.3.w1.lora_A.weight"].clone()
    folder = write_adapter(tmp_path, tensors, config)
    refuse(folder, base, r"experts\.w1\.lora_A.* is for all experts of .*\.w1\.lora_A.* for one")


def test_gate_up_and_gate(adapter: Adapter, base: BaseModel, tmp_path: Path) -> None:
    tensors, config = read_folder(write_stacked(tmp_path, adapter))
    both, _ = read_folder(WRITERS["gate_up"](tmp_path, adapter))
    refuse(write_adapter(tmp_path, tensors | both, config), base, "other LoRA of gate and up")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{P}{PATH}.w1.lora_B.weight", "w1.lora_B.* is shared by all experts, and .*lora_A"),
        (
            f"{P}{PATH}.w1.lora_A.weight",
            "w2.* share nothing, but by .*w1.lora_A.* share the outer matrix",
        ),
        (f"{P}{PATH}.w2.lora_B.weight", "w2.lora_B.* share the outer matrix, but by .* nothing"),
        (f"{P}{PATH}.w2.lora_A.weight", "w2.lora_A.* is shared by all experts, and .*lora_B"),
    ],
)
def test_one_matrix_that_lost_its_experts(
    adapter: Adapter, base: BaseModel, tmp_path: Path, key: str, message: str
) -> None:
    """One tensor is [1, …] in a file that shares nothing elsewhere."""
    tensors, config = read_folder(write_stacked(tmp_path, adapter))
    tensors[key] = tensors[key][:1].clone()
    refuse(write_adapter(tmp_path, tensors, config), base, message)


@pytest.mark.parametrize("layout", ["a", "b", "f", "stacked"])
def test_fused_file_and_another_layout(
    adapter: Adapter, base: BaseModel, tmp_path: Path, layout: str
) -> None:
    write_c_bare(tmp_path / "c", adapter)
    folder = WRITERS[layout](tmp_path / "other", adapter)
    (tmp_path / "c" / FUSED).rename(folder / FUSED)
    words = "one way|expected one layout for the LoRA of routed experts|for all experts"
    refuse(folder, base, words)


def test_two_names_of_one_expert(adapter: Adapter, base: BaseModel, tmp_path: Path) -> None:
    """Copies under the family's and the neutral name may be equal, not different."""
    tensors, config = read_folder(write_a(tmp_path / "a", adapter))
    both = tensors | per_expert(adapter, neutral=True)
    expected = plan(tmp_path / "a", base)
    assert_same(plan(write_adapter(tmp_path / "both", both, config), base), expected)
    key = f"{P}model.layers.1.mlp.experts.2.down_proj.lora_B.weight"
    both[key] = both[key] + 1
    refuse(write_adapter(tmp_path / "both", both, config), base, f"{key} .* and differ")


def test_file_that_the_manifest_does_not_list(
    adapter: Adapter, base: BaseModel, tmp_path: Path
) -> None:
    folder = write_c(tmp_path, adapter)
    save_file({"x": torch.ones(1)}, folder / "lora_experts.safetensors")
    refuse(folder, base, "does not list lora_experts.safetensors")


def test_fused_layer_that_the_base_lacks(adapter: Adapter, base: BaseModel, tmp_path: Path) -> None:
    folder = write_c_bare(tmp_path, adapter)
    tensors = load_file(folder / FUSED)
    tensors["layers.7.experts.up_lora_a"] = tensors["layers.1.experts.up_lora_a"].clone()
    save_file(tensors, folder / FUSED)
    refuse(folder, base, r"layers\.7\.experts\.up_lora_a is for .* layer 7, of which the base has")


@pytest.mark.parametrize("layout", ["a", "b", "c bare", "stacked"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "DoRA on a routed expert.*Merge the adapter"),
        ({"lora_bias": True}, "a LoRA bias on a routed expert"),
        ({"modules_to_save": ["lm_head"]}, "no tensor for lm_head.weight"),
        ({"bias": "all"}, None),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern has '\(', which is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0, expected a positive"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "is nan, expected a positive number"),
        ({"r": float("inf")}, "r is inf, expected a positive number"),
        ({"target_modules": "("}, "PEFT|regular"),
        (
            {"target_parameters": "experts"},
            "target_parameters: found 'experts', expected a valid list",
        ),
    ],
    ids=str,
)
def test_configurations(
    adapter: Adapter,
    base: BaseModel,
    tmp_path: Path,
    layout: str,
    change: dict[str, Any],
    message: str | None,
) -> None:
    folder = WRITERS[layout](tmp_path, adapter)
    tensors, config = read_folder(folder)
    write_adapter(folder, tensors, config | change)
    if message is None:
        plan(folder, base)
    else:
        refuse(folder, base, message)


def test_saved_biases_must_be_there(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe", 96, attention_bias=True)
    folder, base = write_a(tmp_path / "a", random_adapter(model)), base_of(model)
    tensors, config = read_folder(folder)
    biases = {
        f"{P}{name}": torch.ones(parameter.shape)
        for name, parameter in base.model.named_parameters()
        if name.endswith(".bias")
    }
    assert plan(write_adapter(folder, tensors | biases, config | {"bias": "all"}), base)
    biases.popitem()
    write_adapter(folder, tensors | biases, config | {"bias": "all"})
    refuse(folder, base, r"no tensor for model\.layers\.2\.self_attn\.\w+\.bias.*bias 'all'")


def test_targets_of_single_layers_and_experts(
    adapter: Adapter, base: BaseModel, tmp_path: Path
) -> None:
    """layers_to_transform and exclude_modules leave out layers; the others must be complete."""
    tensors, config = read_folder(write_a(tmp_path, adapter))
    kept = {key: value for key, value in tensors.items() if ".layers.1." in key}
    for change in ({"layers_to_transform": [1]}, {"exclude_modules": r".*layers\.0\..*"}):
        found = plan(write_adapter(tmp_path, kept, config | change), base)
        assert set(found.experts) == {"model.layers.1.mlp.experts"}
    refuse(write_adapter(tmp_path, kept, config), base, "layers.0.*incomplete")


class Greedy:
    """A layout that claims every tensor."""

    PROVIDES = "anything"

    def __init__(self, title: str) -> None:
        self.TITLE = title

    def claim(self, tensor: AdapterTensor, base: BaseModel) -> str | None:
        return tensor.key

    def collect(self, claimed: Any, base: BaseModel, settings: LoraSettings) -> Part:
        return Part()


def test_a_tensor_that_two_layouts_claim(adapter: Adapter, base: BaseModel, tmp_path: Path) -> None:
    found = plan(write_a(tmp_path, adapter), base)
    tensors = found.files.tensors
    part, rest = collect_layouts([Greedy("one")], tensors, base, found.settings)
    assert part == Part(rows=[])
    assert not rest
    with pytest.raises(AdapterError, match="lora_A.* can be read as one or two"):
        collect_layouts([Greedy("one"), Greedy("two")], tensors, base, found.settings)


def test_single_byte_floats(adapter: Adapter, base: BaseModel, tmp_path: Path) -> None:
    """Adapters stored in FP8 are read, and their NaNs found."""
    tensors, config = read_folder(write_a(tmp_path, adapter))
    small = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}
    assert plan(write_adapter(tmp_path, small, config), base).experts
    key = f"{P}{PATH}.3.w1.lora_B.weight"
    small[key] = torch.full_like(tensors[key], float("nan")).to(torch.float8_e4m3fn)
    refuse(write_adapter(tmp_path, small, config), base, f"{key} holds .* NaN")


def test_largest_rank_is_that_of_the_engine(base: BaseModel) -> None:
    engine = build_engine(ExpertArgs(kt_num_threads=1))
    layer = new_layer(engine, find_experts(base.model)[0], "bf16")

    def load_lora(rank: int) -> None:
        shape = (layer.num_experts, rank, layer.hidden_size)
        a, b = torch.zeros(shape), torch.zeros(layer.num_experts, layer.intermediate_size, rank)
        layer.load_lora(0, gate_a=a, gate_b=b)

    load_lora(MAX_RANK)
    with pytest.raises(ValueError, match="rank"):
        load_lora(MAX_RANK + 1)
    engine.close()


def test_numbers_beyond_bfloat16(tmp_path: Path) -> None:
    tensor = AdapterTensor("x.lora_B", "x", "lora_B", torch.tensor([[-2.0]]), tmp_path)
    check_magnitude(tensor, MAX_RANK, 1e38)
    with pytest.raises(AdapterError, match="bfloat16"):
        check_magnitude(tensor, MAX_RANK, 2e38)
    with pytest.raises(AdapterError, match="rank 257"):
        check_magnitude(tensor, MAX_RANK + 1, 1.0)
