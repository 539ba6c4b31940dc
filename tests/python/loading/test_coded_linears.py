"""Linear layers outside the experts that stay as the checkpoint ships them: against transformers in
float32 on the dequantised weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.coded_checkpoints import code_folder, save_family
from helpers.merge import save_merged
from helpers.tiny_models import save_adapter, token_ids
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import CheckpointError
from ktrt.layers.coded import CodedLinear, coded_linears
from ktrt.loading.inventory import ATTENTION, HEAD, MLP, loaded_inventory
from ktrt.loading.model import load_model
from ktrt.loading.plan import prepare

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS = ExpertArgs("AMXBF16", kt_num_threads=2, ktrt_cache=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("v3"), "deepseek_v3")


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    loaded = load_model(
        ModelArgs(folder, infer_dtype="bfloat16"),
        AdapterArgs(adapter),
        EXPERTS,
    )
    with torch.inference_mode():
        found: torch.Tensor = loaded.model(token_ids(2, 9) % 96).logits.float()
    loaded.close()
    return found


def float32(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(token_ids(2, 9) % 96).logits
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("scheme", ["fp8", "fp8_channel", "int4_g32", "gptq_g64"])
def test_logits_equal_the_dequantised_models(plain: Path, tmp_path: Path, scheme: str) -> None:
    folders = code_folder(plain, tmp_path / "coded", scheme)
    adapter = save_adapter(tmp_path / "adapter", plain, "a")
    merged = save_merged(tmp_path / "merged", folders.plain, adapter)
    expected = float32(merged)
    coded, rounded = logits(folders.coded, adapter), logits(folders.plain, adapter)
    assert error(coded, expected) <= 1.5 * error(rounded, expected) < 0.05
    assert not torch.equal(coded, logits(folders.coded)), "the adapter changes nothing"


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.experts.3.down_proj"])
def test_a_code_that_is_nan_is_refused_with_its_place(
    plain: Path, tmp_path: Path, module: str
) -> None:
    folder = code_folder(plain, tmp_path / "coded", "fp8").coded
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.{module}.weight"].view(torch.uint8)[5, 9] = 0x7F
    save_file(tensors, folder / "model.safetensors")
    place = (
        rf"safetensors: model\.layers\.1\.{module.partition('.3')[0]}.*damaged\. Download or copy"
    )
    with pytest.raises(CheckpointError, match=place):
        logits(folder)


def test_which_layers_stay_coded(plain: Path, tmp_path: Path) -> None:
    folders = code_folder(plain, tmp_path / "coded", "fp8")
    loaded = load_model(ModelArgs(folders.coded, infer_dtype="bfloat16"), AdapterArgs(), EXPERTS)
    found = dict(coded_linears(loaded.model))
    leaves = {path.rpartition(".")[2] for path in found}
    assert {"q_a_proj", "o_proj", "gate_proj", "down_proj"} <= leaves
    assert not leaves & {"kv_b_proj", "gate", "lm_head"}
    for path, linear in found.items():
        forward: Any = linear.forward
        assert forward.weight_format == "fp8", path
        size = linear.in_features * linear.out_features
        assert size <= forward.packed_bytes <= 1.3 * size  # padded to strips and tiles
        assert "weight" not in dict(linear.named_parameters())
    loaded.close()


def test_float32_models_have_weights(plain: Path, tmp_path: Path) -> None:
    folders = code_folder(plain, tmp_path / "coded", "fp8")
    loaded = load_model(ModelArgs(folders.coded, infer_dtype="float32"), AdapterArgs(), EXPERTS)
    assert not list(coded_linears(loaded.model))
    loaded.close()


def test_as_linear_has_the_same_numbers(plain: Path, tmp_path: Path) -> None:
    """An adapter that replaces the weight (modules_to_save) gets a plain layer."""
    from ktrt.checkpoint.folder import Checkpoint

    folders = code_folder(plain, tmp_path / "coded", "int4_g32")
    checkpoint = Checkpoint(folders.coded)
    name = next(n for n in checkpoint.names() if n.endswith("q_a_proj.weight"))
    out, inner = checkpoint.shape(name)
    linear = CodedLinear(
        nn.Linear(inner, out, bias=True), lambda: checkpoint.read_codes(name), torch.bfloat16
    )
    x = torch.randn(3, inner, dtype=torch.bfloat16)
    expected = checkpoint.read(name).to(torch.bfloat16)
    same = linear.as_linear()
    assert torch.equal(same.weight, expected)
    linear.bias = same.bias = nn.Parameter(torch.ones(out, dtype=torch.bfloat16))
    assert torch.equal(linear(x), same(x))


@pytest.mark.parametrize("scheme", ["fp8", "int4_g64"])
def test_planned_bytes_are_those_held(plain: Path, tmp_path: Path, scheme: str) -> None:
    folders = code_folder(plain, tmp_path / "coded", scheme)
    adapter = save_adapter(tmp_path / "adapter", plain, "a")
    args = ModelArgs(folders.coded), AdapterArgs(adapter), EXPERTS
    ready = prepare(*args)
    ready.engine.close()
    planned = ready.inventory
    loaded = load_model(*args)
    found = loaded_inventory(loaded.model)
    loaded.close()
    for kind in (ATTENTION, MLP, HEAD):
        assert planned.held(kind) == found.held(kind), kind
        assert planned.read(kind) == pytest.approx(found.read(kind)), kind
    forms = {row.form for row in found.of(ATTENTION, MLP)}
    assert forms >= {scheme, "bfloat16"}
