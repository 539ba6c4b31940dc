"""The independent reader of raw files: layouts, patterns, refusals, arithmetic."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import NUM_EXPERTS, read_folder, write_adapter
from helpers.verify_cases import Made, check
from safetensors.torch import load_file, save_file

from ktrt.audit.reference import CannotVerifyError, RawAdapter, RawCheckpoint
from ktrt.audit.reference.experts import Expert, expert_output, to_bf16

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def test_every_layout_reads_the_same(made: Made, tmp_path: Path) -> None:
    """Reads layout b as trained, and rewritten by hand as a, a′, c, d, f and b of an older PEFT."""
    model, adapter = made("deepseek_v2", "b")
    raw = RawCheckpoint(model).experts(1)
    assert raw is not None
    sizes = (raw.num_experts, raw.hidden_size, raw.intermediate_size)
    wanted = RawAdapter(adapter).experts(1, *sizes)
    assert len(wanted[0]) == 3
    tensors, config = read_folder(adapter)
    for name, rewrite in REWRITES.items():
        changed, settings = dict(tensors), dict(config)
        fused = rewrite(changed, settings)
        folder = write_adapter(tmp_path / name, changed, settings)
        if fused:
            save_file(fused, folder / "fused_expert_lora.safetensors")
        read = RawAdapter(folder)
        assert read.expert_layers == [1, 2], name
        for found, expected in zip(read.experts(1, *sizes), wanted, strict=True):
            for projection, lora in expected.items():
                delta = found[projection].scaling * found[projection].b @ found[projection].a
                np.testing.assert_allclose(
                    delta, lora.scaling * lora.b @ lora.a, atol=1e-5, err_msg=name
                )
        q = read.linears(1)["model.layers.1.self_attn.q_proj"]
        assert q.a.shape == (8, 160)


def per_expert(
    tensors: Tensors, config: dict[str, Any], prefix: str = "base_model.model.", infix: str = "."
) -> None:
    for layer in (1, 2):
        path = f"base_model.model.model.layers.{layer}.mlp.experts"
        for inner, leaves in ((".base_layer", ("gate_proj", "up_proj")), ("", ("down_proj",))):
            a, b = (tensors.pop(f"{path}{inner}.lora_{x}.weight") for x in "AB")
            for e in range(NUM_EXPERTS):
                rows = b[:, e::NUM_EXPERTS].chunk(len(leaves))
                for leaf, b_rows in zip(leaves, rows, strict=True):
                    key = f"{prefix}model.layers.{layer}.mlp{infix}experts.{e}.{leaf}"
                    tensors[f"{key}.lora_A.weight"] = a[e * 8 : (e + 1) * 8].clone()
                    tensors[f"{key}.lora_B.weight"] = b_rows.contiguous()
    config.pop("target_parameters")


def rename(tensors: Tensors, change: Callable[[str], str]) -> None:
    for key in list(tensors):
        tensors[change(key)] = tensors.pop(key)


def as_f(tensors: Tensors, config: dict[str, Any]) -> None:
    per_expert(tensors, config, prefix="")


def as_a_prime(tensors: Tensors, config: dict[str, Any]) -> None:
    per_expert(tensors, config, infix=".original_moe.")
    for key in [key for key in tensors if "shared_experts" in key]:
        tensors[key.replace("shared_experts", "original_moe.shared_experts")] = tensors[key].clone()


def with_infix(tensors: Tensors, config: dict[str, Any]) -> None:
    rename(tensors, lambda key: key.replace(".lora_", ".orig_module.lora_"))


def as_c(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    per_expert(tensors, config)
    fused = {}
    for layer in (1, 2):
        for part in ("gate", "up", "down"):
            for x in "AB":
                keys = [
                    f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{part}_proj.lora_{x}.weight"
                    for e in range(NUM_EXPERTS)
                ]
                stack = torch.stack([tensors.pop(key) for key in keys])
                fused[f"layers.{layer}.experts.{part}_lora_{x.lower()}"] = stack
    return fused


def as_stacks(tensors: Tensors, config: dict[str, Any]) -> None:
    """Rewrites to [E, …] under the projections' names; gate_up in one tensor."""
    for layer in (1, 2):
        path = f"base_model.model.model.layers.{layer}.mlp.experts"
        for inner, part in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            a, b = (tensors.pop(f"{path}{inner}.lora_{x}.weight") for x in "AB")
            tensors[f"{path}.{part}.lora_A.weight"] = a.view(NUM_EXPERTS, 8, -1).contiguous()
            stack = b.view(-1, 8, NUM_EXPERTS).permute(2, 0, 1)
            tensors[f"{path}.{part}.lora_B.weight"] = stack.contiguous()
    config.pop("target_parameters")


def older_peft(tensors: Tensors, config: dict[str, Any]) -> None:
    """Rewrites to A [E·r, d1], B [d2, r·E] of the transposed change."""
    for key in [key for key in tensors if ".experts." in key and ".lora_A." in key]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        stack_a = a.view(NUM_EXPERTS, 8, -1)
        stack_b = b.view(-1, 8, NUM_EXPERTS).permute(2, 0, 1)
        tensors[key] = stack_b.transpose(1, 2).reshape(NUM_EXPERTS * 8, -1).contiguous()
        new_b = stack_a.permute(2, 1, 0).reshape(a.shape[1], -1)
        tensors[key.replace("lora_A", "lora_B")] = new_b.contiguous()
    config["peft_version"] = "0.18.0"


REWRITES: dict[str, Callable[[Tensors, dict[str, Any]], Tensors | None]] = {
    "a": per_expert, "a prime": as_a_prime, "c": as_c, "d": with_infix, "f": as_f,
    "b of PEFT 0.18": older_peft, "stacks": as_stacks,
}  # fmt: skip


def test_matrices_that_experts_share(made: Made, tmp_path: Path) -> None:
    """All experts share gate's A, once as a matrix and once as [1, …]; each has its B."""
    _, adapter = made("deepseek_v2", "a")
    tensors, settings = read_folder(adapter)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    key = f"{prefix}.3.gate_proj.lora_A.weight"
    shared = tensors[key]
    for e in range(NUM_EXPERTS):
        del tensors[f"{prefix}.{e}.gate_proj.lora_A.weight"]
    for value in (shared, shared[None]):
        tensors[f"{prefix}.gate_proj.lora_A.weight"] = value.clone()
        found = RawAdapter(write_adapter(tmp_path, tensors, settings)).experts(1, 16, 160, 96)
        for e, each in enumerate(found):
            np.testing.assert_array_equal(each["gate"].a, shared.numpy())
            b = tensors[f"{prefix}.{e}.gate_proj.lora_B.weight"]
            np.testing.assert_array_equal(each["gate"].b, b.numpy())
    del tensors[f"{prefix}.gate_proj.lora_A.weight"]
    with pytest.raises(CannotVerifyError, match="no lora_A for gate of expert 0"):
        RawAdapter(write_adapter(tmp_path, tensors, settings)).experts(1, 16, 160, 96)


def test_rslora_and_patterns(made: Made, tmp_path: Path) -> None:
    model, adapter = made("deepseek_v2", "a")
    tensors, config = read_folder(adapter)
    config |= {"use_rslora": True, "alpha_pattern": {r"experts\.7\.down_proj": 40, "q_proj": 4}}
    read = RawAdapter(write_adapter(tmp_path, tensors, config))
    experts = read.experts(1, NUM_EXPERTS, 160, 96)
    assert experts[7]["down"].scaling == pytest.approx(40 / 8**0.5)
    assert experts[7]["up"].scaling == pytest.approx(16 / 8**0.5)
    q = read.linears(1)["model.layers.1.self_attn.q_proj"]
    assert q.scaling == pytest.approx(4 / 8**0.5)
    (report,) = check((model, tmp_path))
    assert report.passed, report.failures


@pytest.mark.parametrize("damage", ["names", "dtype", "activation", "form", "not LoRA"])
def test_forms_that_cannot_be_verified_are_refused(made: Made, tmp_path: Path, damage: str) -> None:
    model, adapter = made("mixtral", "a")
    copy = tmp_path / "model"
    copy.mkdir()
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text("utf-8"))
    loras, settings = read_folder(adapter)
    if damage == "names":
        rename(tensors, lambda key: key.replace(".w1.", ".first."))
    elif damage == "dtype":
        tensors = {k: t.to(torch.float8_e4m3fn) if ".w1." in k else t for k, t in tensors.items()}
    elif damage == "activation":
        config["hidden_act"] = "gelu"
    elif damage == "form":
        tensors = {k: t for k, t in tensors.items() if ".w1." not in k}
    else:
        loras["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(160)
    save_file(tensors, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = write_adapter(tmp_path / "adapter", loras, settings)
    with pytest.raises(CannotVerifyError, match="verified|lacks"):
        read_all(copy, folder)


def read_all(model: Path, adapter: Path) -> None:
    base, lora = RawCheckpoint(model), RawAdapter(adapter)
    raw = base.experts(0)
    assert raw is not None
    lora.experts(0, raw.num_experts, raw.hidden_size, raw.intermediate_size)
    base.read_expert(raw, 0)
    check((model, adapter))


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-3
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    x = torch.cat([values, ties])
    np.testing.assert_array_equal(to_bf16(x.numpy()), x.bfloat16().float().numpy())


def test_numpy_agrees_with_torch_in_float32() -> None:
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32) / np.float32(8)
        for name, shape in {"gate": (48, 64), "up": (48, 64), "down": (64, 48)}.items()
    }
    x = rng.standard_normal((5, 64), np.float32)
    w = {name: torch.from_numpy(value) for name, value in weights.items()}
    states = torch.from_numpy(x)
    inner = torch.nn.functional.silu(states @ w["gate"].T) * (states @ w["up"].T)
    found = expert_output(Expert(weights, "float32"), x, {})
    np.testing.assert_allclose(found, (inner @ w["down"].T).numpy(), rtol=1e-5, atol=1e-5)


def test_pickles_are_not_verified(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CannotVerifyError, match=r"but adapter_model.bin\. Load and save it"):
        RawAdapter(tmp_path)
