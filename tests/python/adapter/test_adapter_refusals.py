"""Damaged adapters, and adapters that do not fit, are refused with tensor, finding, expectation."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_models import (
    Layout,
    base_of,
    read_folder,
    save_adapter,
    save_model,
    write_adapter,
)
from safetensors.torch import save_file

from ktrt.adapter import BaseModel, plan_adapter
from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable

Tensors = dict[str, torch.Tensor]
P = "base_model.model.model.layers"
EXPERT = f"{P}.1.mlp.experts.3.up_proj"
STACKED = f"{P}.1.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_model(folder / "model", "deepseek_v2", 96)


@pytest.fixture(scope="module")
def base(model: Path) -> BaseModel:
    return base_of(model)


@pytest.fixture(scope="module")
def originals(folder: Path, model: Path) -> dict[Layout, tuple[Tensors, dict[str, Any]]]:
    return {
        "a": read_folder(save_adapter(folder / "a", model, "a")),
        "b": read_folder(save_adapter(folder / "b", model, "b")),
    }


def refuse(folder: Path, base: BaseModel, *words: str) -> None:
    with pytest.raises(AdapterError) as error:
        plan_adapter(folder, base, lora_rank=None, lora_alpha=None)
    for word in words:
        assert word in str(error.value)


def drop(prefix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        dropped = [key for key in tensors if key.startswith(prefix)]
        assert dropped
        for key in dropped:
            del tensors[key]

    return change


def put(key: str, *shape: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key] = torch.ones(shape)

    return change


def poison(key: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key] = tensors[key].clone()
        tensors[key][1, 2] = value

    return change


DAMAGE: list[tuple[Layout, Callable[[Tensors], None], list[str]]] = [
    # Another base: sizes, experts, layers.
    ("a", put(f"{EXPERT}.lora_A.weight", 8, 128), [EXPERT, "[8, 128]", "[rank, 160]"]),
    ("a", put(f"{EXPERT}.lora_B.weight", 95, 8), [EXPERT, "[95, 8]", "[96, rank]"]),
    ("a", put(f"{EXPERT}.lora_A.weight", 8), [EXPERT, "[8]"]),
    ("a", put(f"{P}.1.mlp.experts.16.up_proj.lora_A.weight", 8, 160),
     ["expert 16", "16 experts"]),
    ("a", put(f"{P}.3.mlp.experts.0.up_proj.lora_A.weight", 8, 160),
     ["layers.3.mlp.experts.0.up_proj", "MoE layers 1 to 2"]),
    ("a", put(f"{P}.0.mlp.experts.0.up_proj.lora_A.weight", 8, 160), ["layers.0.mlp.experts.0"]),
    ("a", put(f"{P}.3.self_attn.q_proj.lora_A.weight", 8, 160), ["layers.3.self_attn.q_proj"]),
    ("a", put(f"{P}.0.self_attn.q_proj.lora_A.weight", 8, 128),
     ["layers.0.self_attn.q_proj.lora_A", "[8, 128]", "[rank, 160]"]),
    ("b", put(f"{STACKED}.lora_A.weight", 8 * 8, 96), ["[64, 96]", "[128, 96]", "16 experts"]),
    ("b", put(f"{STACKED}.base_layer.lora_B.weight", 192, 127), ["[192, 127]", "[192, 128]"]),
    ("b", put(f"{STACKED}.base_layer.lora_A.weight", 128, 128), ["[128, 128]", "[128, 160]"]),
    # Incomplete files.
    ("a", drop(f"{P}.2."), ["layers.2.", "incomplete"]),
    ("a", drop(f"{P}.2.mlp.experts."), ["layers.2.mlp.experts.0.gate_proj", "48 modules"]),
    ("a", drop(f"{P}.1.mlp.experts.3."), ["15 experts", "expected 16", "[3]"]),
    ("a", drop(f"{EXPERT}.lora_B"), [f"{EXPERT}.lora_A", "no lora_B"]),
    ("a", drop(f"{P}.1.self_attn.o_proj."), ["layers.1.self_attn.o_proj"]),
    ("a", drop(f"{P}.1.self_attn.o_proj.lora_A"), ["layers.1.self_attn.o_proj", "lora_B.weight"]),
    ("a", drop(f"{P}.1.mlp.shared_experts.up_proj."), ["shared_experts.up_proj"]),
    ("b", drop(f"{STACKED}."), ["layers.1.mlp.experts.gate_up_proj", "2 modules"]),
    ("b", drop(f"{STACKED}.lora_A"), ["half of a LoRA pair"]),
    # Foreign tensors.
    ("a", put("base_model.model.model.layers.0.self_attn.q_proj.weight", 192, 160),
     ["q_proj.weight", "unknown tensor"]),
    ("a", put(f"{P}.0.self_attn.q_proj.lora_C.weight", 8, 160), ["lora_C"]),
    ("a", put("foo", 3), ["foo"]),
    ("a", put(f"{P}.0.input_layernorm.lora_A.weight", 8, 160), ["input_layernorm"]),
    ("a", put(f"{EXPERT}.lora_magnitude_vector", 96), [EXPERT, "DoRA"]),
    ("b", put(f"{STACKED}.lora_magnitude_vector", 96), ["DoRA"]),
    # Ranks.
    ("a", put(f"{EXPERT}.lora_A.weight", 4, 160), [EXPERT, "rank 4", "rank 8"]),
    ("a", put(f"{P}.0.self_attn.q_proj.lora_B.weight", 192, 4), ["rank 4", "expected 8"]),
    # Numbers.
    ("a", poison(f"{EXPERT}.lora_A.weight", float("nan")), [EXPERT, "1 NaN or infinite"]),
    ("b", poison(f"{STACKED}.lora_B.weight", float("-inf")), [STACKED, "NaN or infinite"]),
    ("a", poison(f"{P}.0.self_attn.q_proj.lora_A.weight", float("inf")), ["q_proj.lora_A"]),
    # Extra experts.
    ("a", put(f"{P}.1.mlp.lora_experts.0.gate_proj.weight", 8, 160),
     ["layers.1.mlp.lora_experts.0.up_proj is missing"]),
    ("a", put(f"{P}.0.mlp.lora_experts.0.gate_proj.weight", 8, 160), ["which is no MoE block"]),
    ("a", put(f"{P}.1.mlp.lora_experts.0.gate_proj.weight", 8, 128), ["[8, 128]", "[8, 160]"]),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "words"), DAMAGE)
def test_damage_is_refused(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]],
    base: BaseModel,
    tmp_path: Path,
    layout: Layout,
    change: Callable[[Tensors], None],
    words: list[str],
) -> None:
    tensors, config = originals[layout]
    changed = dict(tensors)
    change(changed)
    refuse(write_adapter(tmp_path, changed, config), base, "adapter_model.safetensors", *words)


@pytest.mark.parametrize("layout", ["a", "b"])
def test_undamaged_is_accepted(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]],
    base: BaseModel,
    tmp_path: Path,
    layout: Layout,
) -> None:
    plan = plan_adapter(
        write_adapter(tmp_path, *originals[layout]), base, lora_rank=8, lora_alpha=16
    )
    assert plan.audit.found == len(originals[layout][0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 4}, ["rank 8", "says 4"]),
        ({"rank_pattern": {r"experts\.3\.up_proj": 16}}, [EXPERT, "rank 8", "says 16"]),
        ({"target_modules": ["lm_head", "q_proj"]}, ["lm_head"]),
    ],
)
def test_config_of_another_adapter(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]],
    base: BaseModel,
    tmp_path: Path,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    tensors, config = originals["a"]
    refuse(write_adapter(tmp_path, tensors, config | changes), base, *words)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_file(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]],
    base: BaseModel,
    tmp_path: Path,
    keep: int,
) -> None:
    file = write_adapter(tmp_path, *originals["a"]) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(tmp_path, base, str(file), "damaged or incomplete")


def test_missing_files(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]], base: BaseModel, tmp_path: Path
) -> None:
    refuse(tmp_path, base, "adapter_config.json is missing")
    write_adapter(tmp_path, *originals["a"])
    (tmp_path / "adapter_model.safetensors").unlink()
    refuse(tmp_path, base, "adapter_model.safetensors is missing")
    (tmp_path / "adapter_config.json").write_text("{", encoding="utf-8")
    refuse(tmp_path, base, "is no valid JSON")
    (tmp_path / "adapter_config.json").write_text("[]", encoding="utf-8")
    refuse(tmp_path, base, "expected an object")


def test_a_file_that_cannot_be_opened_is_not_called_a_link(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]],
    base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_adapter(tmp_path, *originals["a"])
    whole = Path.open

    def forbidden(self: Path, *args: Any, **options: Any) -> Any:
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return whole(self, *args, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    refuse(tmp_path, base, "adapter_model.safetensors cannot be read: Permission denied")


def test_pickle_files(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]], base: BaseModel, tmp_path: Path
) -> None:
    tensors, config = originals["a"]
    write_adapter(tmp_path, tensors, config)
    (tmp_path / "adapter_model.safetensors").unlink()
    file = tmp_path / "adapter_model.bin"
    torch.save(tensors, file)
    plan = plan_adapter(tmp_path, base, lora_rank=None, lora_alpha=None)
    assert plan.audit.found == len(tensors)
    whole = file.read_bytes()
    for keep in (0, 1, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        file.write_bytes(whole[:keep])
        refuse(tmp_path, base, str(file))
    torch.save({"x": Path("code that a pickle may run")}, file)
    with pytest.raises(AdapterError) as caught:
        plan_adapter(tmp_path, base, lora_rank=None, lora_alpha=None)
    text = str(caught.value)
    # torch advises, in several lines, to unpickle it anyway.
    assert "GLOBAL pathlib.PosixPath" in text
    assert "weights_only" not in text
    assert "\n" not in text
    file.write_bytes(pickle.dumps(Path("no file of torch")))
    refuse(tmp_path, base, "is not a plain file of tensors")
    torch.save([1, 2], file)
    refuse(tmp_path, base, "does not hold a dictionary of tensors")
    torch.save({1: torch.ones(1)}, file)
    refuse(tmp_path, base, "does not hold a dictionary of tensors")
    torch.save({"x": torch.eye(3).to_sparse()}, file)
    refuse(tmp_path, base, "x is no plain dense tensor")
    torch.save({"x": torch.ones(2, device="meta")}, file)
    refuse(tmp_path, base, "x is no plain dense tensor")
    torch.save({}, file)
    refuse(tmp_path, base, "holds no tensors")


def test_unknown_tensors_of_further_files(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]], base: BaseModel, tmp_path: Path
) -> None:
    write_adapter(tmp_path, *originals["a"])
    for name in ("lora_experts.safetensors", "fused_expert_lora.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
        refuse(tmp_path, base, name)


def test_zero_b_is_called_out(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]],
    base: BaseModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors, config = originals["a"]
    zeroed = tensors | {f"{EXPERT}.lora_B.weight": torch.zeros(96, 8)}
    plan_adapter(write_adapter(tmp_path, zeroed, config), base, lora_rank=None, lora_alpha=None)
    (message,) = caplog.messages
    assert f"1 of {len(tensors) // 2} lora_B tensors are all zero" in message
    assert EXPERT in message


def test_targeted_but_absent_routed_experts_are_called_out(
    originals: dict[Layout, tuple[Tensors, dict[str, Any]]],
    base: BaseModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors, config = originals["a"]
    rest = {key: value for key, value in tensors.items() if ".mlp.experts." not in key}
    with caplog.at_level(logging.WARNING):
        plan = plan_adapter(
            write_adapter(tmp_path, rest, config), base, lora_rank=None, lora_alpha=None
        )
    assert not plan.experts
    assert any("holds no LoRA for any" in message for message in caplog.messages)
