"""Layouts of expert LoRA give one internal form: equal numbers from any writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import (
    NUM_EXPERTS,
    LoraPlan,
    base_of,
    read_folder,
    save_adapter,
    save_model,
    write_adapter,
)

from ktrt.adapter import AdapterPlan, BaseModel, plan_adapter
from ktrt.adapter.internal import ExpertLora, engine_arguments, stack_experts
from ktrt.audit.reference import RawAdapter
from ktrt.errors import AdapterError

# 2 · 80 = hidden_size 160: gate_up_proj is square.
SQUARE, ODD = 80, 96
PATH = "model.layers.1.mlp.experts"
Tensors = dict[str, torch.Tensor]
Bases = Callable[[str, int], tuple[Path, BaseModel]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    made: dict[tuple[str, int], tuple[Path, BaseModel]] = {}

    def get(family: str, size: int) -> tuple[Path, BaseModel]:
        if (family, size) not in made:
            folder = save_model(tmp_path_factory.mktemp(family), family, size)
            made[family, size] = (folder, base_of(folder))
        return made[family, size]

    return get


def plan(folder: Path, base: BaseModel) -> AdapterPlan:
    return plan_adapter(folder, base, lora_rank=None, lora_alpha=None)


def expert(
    tensors: Tensors, path: str, leaf: str, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = f"base_model.model.{path}.{number}.{leaf}"
    return tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]


@pytest.mark.parametrize(
    ("family", "on_disk", "leaves"),
    [
        ("deepseek_v2", PATH, ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "model.layers.1.block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_one_lora_for_each_expert(
    bases: Bases, tmp_path: Path, family: str, on_disk: str, leaves: tuple[str, ...]
) -> None:
    model, base = bases(family, ODD)
    folder = save_adapter(tmp_path, model, "a", LoraPlan(rank=4, alpha=12))
    tensors, _ = read_folder(folder)
    loras = plan(folder, base).experts[PATH]
    for projection, leaf in zip(("gate", "up", "down"), leaves, strict=True):
        lora = loras[projection]  # type: ignore[index]
        assert lora.scaling.tolist() == [3.0] * NUM_EXPERTS
        for number in range(NUM_EXPERTS):
            a, b = expert(tensors, on_disk, leaf, number)
            assert torch.equal(lora.a[number], a)
            assert torch.equal(lora.b[number], b)


def test_names_without_peft_prefix(bases: Bases, tmp_path: Path) -> None:
    """kt_kernel's converter for sglang omits base_model.model."""
    model, base = bases("deepseek_v2", ODD)
    folder = save_adapter(tmp_path, model, "a")
    expected = plan(folder, base)
    tensors, config = read_folder(folder)
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    found = plan(write_adapter(folder, bare, config), base)
    assert torch.equal(found.experts[PATH]["up"].b, expected.experts[PATH]["up"].b)
    assert found.audit.found == expected.audit.found


def test_original_moe_infix_and_copies(bases: Bases, tmp_path: Path) -> None:
    model, base = bases("deepseek_v2", ODD)
    folder = save_adapter(tmp_path, model, "a")
    expected = plan(folder, base)
    tensors, config = read_folder(folder)
    infixed = {
        key.replace(".mlp.experts.", ".mlp.original_moe.experts."): value
        for key, value in tensors.items()
    }
    shared = "base_model.model.model.layers.1.mlp.shared_experts.up_proj.lora_A.weight"
    copy = shared.replace(".shared", ".original_moe.shared")
    infixed[copy] = infixed[shared].clone()
    found = plan(write_adapter(folder, infixed, config), base)
    assert torch.equal(found.experts[PATH]["down"].a, expected.experts[PATH]["down"].a)
    infixed[copy] = infixed[copy] + 1
    with pytest.raises(AdapterError, match="are both lora_A of .* and differ"):
        plan(write_adapter(folder, infixed, config), base)


def stacked(tensors: Tensors, infix: str) -> tuple[str, str]:
    prefix = f"base_model.model.{PATH}{infix}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def test_stacked_experts(bases: Bases, tmp_path: Path) -> None:
    model, base = bases("deepseek_v2", ODD)
    folder = save_adapter(tmp_path, model, "b", LoraPlan(rank=4))
    tensors, _ = read_folder(folder)
    loras = plan(folder, base).experts[PATH]
    key_a, key_b = stacked(tensors, ".base_layer")
    for number in range(NUM_EXPERTS):
        a = tensors[key_a][number * 4 : (number + 1) * 4]
        b = tensors[key_b][:, number::NUM_EXPERTS]
        assert torch.equal(loras["gate"].a[number], a)
        assert torch.equal(loras["up"].a[number], a)
        assert torch.equal(loras["gate"].b[number], b[:ODD])
        assert torch.equal(loras["up"].b[number], b[ODD:])
    key_a, key_b = stacked(tensors, "")
    assert torch.equal(loras["down"].a[5], tensors[key_a][20:24])
    assert torch.equal(loras["down"].b[5], tensors[key_b][:, 5::NUM_EXPERTS])


def as_old_peft_wrote(tensors: Tensors, rank: int) -> Tensors:
    """Rewrites to PEFT before 0.19.1, with the same ΔW: its A is our Bᵀ, its B our Aᵀ."""
    old = dict(tensors)
    for infix in (".base_layer", ""):
        for layer in (1, 2):
            keys = [k.replace("layers.1", f"layers.{layer}") for k in stacked(tensors, infix)]
            a = tensors[keys[0]].reshape(NUM_EXPERTS, rank, -1)
            b = tensors[keys[1]].reshape(-1, rank, NUM_EXPERTS)
            old[keys[0]] = b.permute(2, 1, 0).reshape(NUM_EXPERTS * rank, -1).contiguous()
            old[keys[1]] = a.permute(2, 1, 0).reshape(-1, rank * NUM_EXPERTS).contiguous()
    return old


@pytest.mark.parametrize("size", [ODD, SQUARE])
def test_old_peft_is_read_transposed(bases: Bases, tmp_path: Path, size: int) -> None:
    model, base = bases("deepseek_v2", size)
    folder = save_adapter(tmp_path, model, "b", LoraPlan(rank=4))
    new = plan(folder, base).experts[PATH]
    tensors, config = read_folder(folder)
    config["peft_version"] = "0.18.1"
    write_adapter(folder, as_old_peft_wrote(tensors, 4), config)
    old = plan(folder, base).experts[PATH]
    for projection in ("gate", "up", "down"):
        ours, theirs = new[projection], old[projection]
        assert torch.equal(ours.b @ ours.a, theirs.b @ theirs.a)


@pytest.mark.parametrize(
    ("version", "swapped"),
    [("0.17.0", False), ("0.19.0", False), ("0.19.1", True), ("0.20.1.dev0@abc", True)],
)
def test_square_parameters_are_read_by_version(
    bases: Bases, tmp_path: Path, version: str, swapped: bool
) -> None:
    model, base = bases("deepseek_v2", SQUARE)
    folder = save_adapter(tmp_path, model, "b", LoraPlan(rank=4))
    tensors, config = gate_up_alone(folder)
    write_adapter(folder, tensors, config | {"peft_version": version})
    lora = plan(folder, base).experts[PATH]["gate"]
    a = tensors[stacked(tensors, "")[0]][:4]
    assert torch.equal(lora.a[0], a) == swapped


def gate_up_alone(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """Removes down_proj, which has the unprefixed name, from an adapter in layout b."""
    tensors, config = read_folder(folder)
    kept = {k: v for k, v in tensors.items() if ".experts.lora" not in k}
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    return {k.replace("experts.base_layer", "experts"): v for k, v in kept.items()}, config


@pytest.mark.parametrize("version", ["0.18.0", "0.21.0", None])
@pytest.mark.parametrize("old", [False, True])
def test_the_other_parameter_says_how_a_square_one_is_read(
    bases: Bases, tmp_path: Path, version: str | None, old: bool
) -> None:
    """Holds for any peft_version: another PEFT or writer may have saved the folder again."""
    model, base = bases("deepseek_v2", SQUARE)
    folder = save_adapter(tmp_path, model, "b", LoraPlan(rank=4))
    expected = plan(folder, base).experts[PATH]
    tensors, config = read_folder(folder)
    config["peft_version"] = version
    write_adapter(folder, as_old_peft_wrote(tensors, 4) if old else tensors, config)
    found = plan(folder, base).experts[PATH]
    raw = RawAdapter(folder).experts(1, NUM_EXPERTS, 160, SQUARE)[3]
    for name in ("gate", "up", "down"):
        delta = expected[name].b @ expected[name].a
        assert torch.equal(found[name].b @ found[name].a, delta)
        assert np.allclose(raw[name].b @ raw[name].a, delta[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", [None, "unknown"])
def test_ambiguous_stacked_lora_asks_for_the_version(
    bases: Bases, tmp_path: Path, version: str | None
) -> None:
    model, base = bases("deepseek_v2", SQUARE)
    tensors, config = gate_up_alone(save_adapter(tmp_path / "both", model, "b"))
    folder = tmp_path / "one"
    with pytest.raises(AdapterError, match="read in two ways.*Add peft_version"):
        plan(write_adapter(folder, tensors, config | {"peft_version": version}), base)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "names 2 of gate_up_proj"),
        ([], "names 0 of gate_up_proj"),
    ],
)
def test_single_stacked_lora_needs_a_single_target(
    bases: Bases, tmp_path: Path, targets: list[str], message: str
) -> None:
    model, base = bases("deepseek_v2", ODD)
    folder = save_adapter(tmp_path, model, "b")
    tensors, config = read_folder(folder)
    kept = {k: v for k, v in tensors.items() if ".experts.base_layer." not in k}
    with pytest.raises(AdapterError, match=message):
        plan(write_adapter(folder, kept, config | {"target_parameters": targets}), base)


def test_two_layouts_in_one_file_are_refused(bases: Bases, tmp_path: Path) -> None:
    model, base = bases("deepseek_v2", ODD)
    single, _ = read_folder(save_adapter(tmp_path / "a", model, "a"))
    both, config = read_folder(save_adapter(tmp_path / "b", model, "b"))
    with pytest.raises(AdapterError, match="expected one layout"):
        plan(write_adapter(tmp_path / "both", single | both, config), base)


def random_lora(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 5, generator=generator), torch.randn(7, rank, generator=generator)


def test_mixed_ranks_are_padded_with_zeros() -> None:
    pairs = [random_lora(rank, rank) for rank in (3, 1, 2)]
    lora = stack_experts(pairs, [1.0, 2.0, 0.5])
    assert lora.a.shape == (3, 3, 5)
    assert lora.b.shape == (3, 7, 3)
    for number, (a, b) in enumerate(pairs):
        assert torch.allclose(lora.b[number] @ lora.a[number], b @ a)
        assert not lora.a[number, a.shape[0] :].any()


def test_scaling_is_folded_into_b_in_float32() -> None:
    a, b = random_lora(2, 0)
    lora = stack_experts([(a.bfloat16(), b.bfloat16()), (a, b)], [1 / 3, 2.0])
    folded = lora.scaled_b()
    assert folded.dtype == torch.float32
    assert torch.equal(folded[0], b.bfloat16().float() * torch.tensor(1 / 3))
    assert torch.equal(folded[1], b * 2)


def test_up_shares_the_a_of_gate_only_if_they_are_equal() -> None:
    def lora(seed: int) -> ExpertLora:
        return stack_experts([random_lora(2, seed)], [1.0])

    shared: dict[Any, ExpertLora] = {"gate": lora(0), "up": lora(0), "down": lora(1)}
    arguments = engine_arguments(shared)
    assert arguments["up_a"] is None
    assert arguments["gate_a"] is not None
    assert arguments["down_a"] is not None
    assert engine_arguments(shared | {"up": lora(2)})["up_a"] is not None
    assert engine_arguments({}) == {}
