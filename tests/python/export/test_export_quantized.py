"""Quantised bases: what the adapter does not change stays byte for byte, the rest becomes BF16, and
config.json tells which is which."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from export.test_export import export
from helpers.coded_checkpoints import FAMILIES, CodedFolders, code_folder, save_family
from helpers.tiny_models import read_folder, save_adapter, write_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ktrt.checkpoint.folder import Checkpoint
from ktrt.config import ModelArgs
from ktrt.export.quantization import with_exceptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
SCHEMES = ("fp8", "fp8_channel", "int4_g32", "gptq_g64", "mxfp4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    return save_family(folder, "deepseek_v3", num_hidden_layers=3)


def coded(plain: Path, target: Path, scheme: str) -> CodedFolders:
    return code_folder(plain, target, scheme)


def part_of(adapter: Path, target: Path, wanted: str) -> Path:
    """Copies an adapter with the modules of matching names only."""
    tensors, config = read_folder(adapter)
    tensors = {key: tensor for key, tensor in tensors.items() if re.search(wanted, key)}
    return write_adapter(target, tensors, config | {"target_modules": sorted(modules(tensors))})


def modules(tensors: Tensors) -> set[str]:
    return {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text("utf-8"))


def weights(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "what", ["self_attn", r"layers\.1\..*experts", r"layers\.2\..*\.down_proj"]
)
def test_only_what_changes_is_dequantised(
    plain: Path, tmp_path: Path, scheme: str, what: str
) -> None:
    folders = coded(plain, tmp_path / "coded", scheme)
    adapter = part_of(save_adapter(tmp_path / "all", plain, "a"), tmp_path / "adapter", what)
    summary = export(folders.coded, adapter, tmp_path / "out")
    source, out = weights(folders.coded), weights(tmp_path / "out")
    checkpoint, before = Checkpoint(tmp_path / "out"), Checkpoint(folders.coded)
    changed = modules(read_folder(adapter)[0])
    layers = {m[1] for name in changed if (m := re.search(r"layers\.(\d+)\..*\.experts\.", name))}
    kept = 0
    for name in folders.quantized:
        module = name.removesuffix(".weight")
        routed = re.search(r"layers\.(\d+)\..*\.experts\.", name)
        if module in changed or (routed and routed[1] in layers):
            assert out[name].dtype == torch.bfloat16
            if module not in changed:
                assert torch.equal(out[name], before.read(name).bfloat16())
            assert not any(part in out for part in source if part.startswith(f"{module}.") and
                           part not in (name, f"{module}.bias"))  # fmt: skip
        else:
            kept += 1
            parts = [part for part in source if part.startswith(f"{module}.")]
            assert len(parts) >= 2
            for part in parts:
                assert_same(out[part], source[part])
            assert checkpoint.is_quantized(name)
    assert summary.quantized == kept > 0
    assert summary.merged == len(changed)
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"]


def test_transformers_reads_the_mixture(tmp_path: Path) -> None:
    """FP8 with some linears and one layer's experts plain; transformers dequantises the rest. It
    misreads blocks that do not divide a matrix, so all do."""
    plain = save_family(tmp_path / "plain", "deepseek_v3", qk_rope_head_dim=128)
    folders = code_folder(plain, tmp_path / "coded", "fp8")
    adapter = part_of(
        save_adapter(tmp_path / "all", plain, "a"), tmp_path / "adapter",
        r"o_proj|q_b_proj|layers\.1\..*\.experts\.",
    )  # fmt: skip
    export(folders.coded, adapter, tmp_path / "out")
    export(folders.coded, adapter, tmp_path / "float32", "float32")
    assert "quantization_config" not in config_of(tmp_path / "float32")
    claim = config_of(tmp_path / "out")["quantization_config"]
    plain_now = set(claim.pop("modules_to_not_convert"))
    assert claim == config_of(folders.coded)["quantization_config"]
    assert plain_now == {"model.layers.1.mlp.experts"} | {
        f"model.layers.{layer}.self_attn.{leaf}" for layer in range(2)
        for leaf in ("o_proj", "q_b_proj")
    }  # fmt: skip
    expected = library_weights(tmp_path / "float32")
    for name, found in library_weights(tmp_path / "out").items():
        # transformers dequantises to BF16.
        assert torch.allclose(found.float(), expected[name], rtol=2**-7, atol=2**-16), name


def library_weights(folder: Path) -> Tensors:
    """Returns the parameters in plain transformers, which must find every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found: Tensors = model.state_dict()
    return found
