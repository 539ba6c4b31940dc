"""Quantised bases: what the adapter does not change stays byte for byte, the rest becomes BF16, and
config.json tells which is which."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from export.test_export import export
from helpers.coded_checkpoints import CodedFolders, code_folder, save_family
from helpers.tiny_models import read_folder, save_adapter, token_ids, write_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktrt.checkpoint.folder import Checkpoint
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import ConfigError
from ktrt.export.packed import merge_packed
from ktrt.export.quantization import with_exceptions
from ktrt.loading.model import load_model
from ktrt.loading.plan import open_base

if TYPE_CHECKING:
    from pathlib import Path

    from ktrt.config.args import KtBackend

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
    found: Tensors = load_file(folder / "model.safetensors")
    return found


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


def test_gpt_oss_by_layers(tmp_path: Path) -> None:
    """Stacked experts: one layer becomes plain, the other keeps its blocks."""
    model = save_family(tmp_path / "model", "gpt_oss")
    folders = code_folder(model, tmp_path / "coded", "mxfp4")
    stacks = {n: w.shape for n, w in weights(model).items() if "experts.down_proj" in n}
    (path, _), (other, _) = [(n.removesuffix(".down_proj"), s) for n, s in stacks.items()
                             if not n.endswith("_bias")]  # fmt: skip
    experts, size_in, size_out = stacks[f"{path}.down_proj"]
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator) / 8 for shape in
            ((experts * 4, size_in), (size_out, experts * 4)))  # fmt: skip
    key = f"base_model.model.{path}.lora_"
    adapter = write_adapter(
        tmp_path / "adapter", {f"{key}A.weight": a, f"{key}B.weight": b},
        {"peft_type": "LORA", "peft_version": "0.21.0", "r": 4, "lora_alpha": 8,
         "target_parameters": [f"{path}.down_proj"]},
    )  # fmt: skip
    export(folders.coded, adapter, tmp_path / "out")
    export(folders.coded, adapter, tmp_path / "bf16", "bfloat16")
    out, source = weights(tmp_path / "out"), weights(folders.coded)
    for leaf in ("gate_up_proj", "down_proj"):
        assert out[f"{path}.{leaf}"].dtype == torch.bfloat16
        assert f"{path}.{leaf}_blocks" not in out
        for part in ("blocks", "scales", "bias"):
            assert_same(out[f"{other}.{leaf}_{part}"], source[f"{other}.{leaf}_{part}"])
    claim = config_of(tmp_path / "out")["quantization_config"]
    assert claim["modules_to_not_convert"][-1] == path
    expected = library_weights(tmp_path / "bf16")
    for name, found in library_weights(tmp_path / "out").items():
        assert torch.equal(found.bfloat16(), expected[name].bfloat16()), name


def library_weights(folder: Path) -> Tensors:
    """Returns the parameters in plain transformers, which must find every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found: Tensors = model.state_dict()
    return found


@pytest.mark.parametrize("scheme", ["fp8", "int4_g32"])
def test_nothing_changes_without_an_adapter(plain: Path, tmp_path: Path, scheme: str) -> None:
    """Codes and scales lie in different shards, as at a shard's end."""
    folders = code_folder(plain, tmp_path / "coded", scheme)
    file = folders.coded / "model.safetensors"
    source = load_file(file)
    file.unlink()
    shards = {f"model-{i + 1:05}-of-00002.safetensors": list(source)[i::2] for i in range(2)}
    for name, held in shards.items():
        save_file({n: source[n] for n in held}, folders.coded / name)
    index = {"metadata": {}, "weight_map": {n: f for f, held in shards.items() for n in held}}
    (folders.coded / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    summary = export(folders.coded, None, tmp_path / "out")
    assert (summary.merged, summary.quantized) == (0, len(folders.quantized))
    assert config_of(tmp_path / "out") == config_of(folders.coded)
    for name, held in shards.items():
        out = load_file(tmp_path / "out" / name)
        assert set(out) == set(held)
        for each in held:
            assert_same(out[each], source[each])


def test_a_dtype_makes_everything_plain(plain: Path, tmp_path: Path) -> None:
    folders = code_folder(plain, tmp_path / "coded", "gptq_g32")
    summary = export(folders.coded, None, tmp_path / "out", "bfloat16")
    assert summary.quantized == 0
    assert "quantization_config" not in config_of(tmp_path / "out")
    out = weights(tmp_path / "out")
    for name, expected in weights(folders.plain).items():
        assert out[name].dtype == torch.bfloat16
        assert torch.equal(out[name], expected.bfloat16()), name  # ±0 are equal


def test_the_rest_of_packed_experts_stays(plain: Path, tmp_path: Path) -> None:
    """--format kt packs the FP8 experts as INT8; the other linears stay FP8."""
    folders = code_folder(plain, tmp_path / "coded", "fp8")
    experts = ExpertArgs("AMXInt8", kt_num_threads=1)
    summary = merge_packed(open_base(ModelArgs(folders.coded)), None, tmp_path / "kt", experts)
    source, out = weights(folders.coded), weights(tmp_path / "kt")
    assert set(out) == {name for name in source if ".experts." not in name}
    for name, tensor in out.items():
        assert_same(tensor, source[name])
    assert summary.quantized == sum(".experts." not in name for name in folders.quantized)
    claim = config_of(tmp_path / "kt")["quantization_config"]
    assert claim == config_of(folders.coded)["quantization_config"]
    packed = replace(experts, kt_weight_path=tmp_path / "kt" / "experts")
    ids = token_ids(1, 24) % 96
    assert torch.equal(logits(tmp_path / "kt", packed, ids), logits(folders.coded, experts, ids))


@pytest.mark.parametrize("backend", ["auto", "FP8"])
def test_there_are_no_packed_files_of_codes(
    plain: Path, tmp_path: Path, backend: KtBackend
) -> None:
    base = open_base(ModelArgs(code_folder(plain, tmp_path / "coded", "fp8").coded))
    with pytest.raises(ConfigError, match=r"no files of FP8 experts.*hf, which keeps quantised"):
        merge_packed(base, None, tmp_path / "kt", ExpertArgs(backend))
    assert not (tmp_path / "kt").exists()


def logits(folder: Path, experts: ExpertArgs, ids: torch.Tensor) -> torch.Tensor:
    loaded = load_model(ModelArgs(folder), AdapterArgs(), experts)
    with torch.no_grad():
        found: torch.Tensor = loaded.model(ids).logits
    loaded.close()
    return found


def test_every_method_names_exceptions_in_its_own_way() -> None:
    modules = ["model.layers.1.mlp.experts", "model.layers.10.self_attn.o_proj"]
    experts = r"model\.layers\.1\.mlp\.experts(\..*)?$"
    fp8 = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", modules[1]]}
    assert with_exceptions(fp8, modules)["modules_to_not_convert"] == [
        "lm_head", modules[1], modules[0]
    ]  # fmt: skip
    ignored = with_exceptions({"quant_method": "fp8", "ignored_layers": ["a"]}, modules)
    assert ignored["ignored_layers"] == ["a", *modules]
    packed = {"quant_method": "compressed-tensors", "ignore": ["re:.*self_attn.*"], "format": "f"}
    assert with_exceptions(packed, modules) == packed | {
        "ignore": ["re:.*self_attn.*", f"re:{experts}", modules[1]]
    }
    gptq = with_exceptions({"quant_method": "gptq", "dynamic": {"+:x": {"bits": 8}}}, modules)
    assert gptq["dynamic"]["+:x"] == {"bits": 8}
    patterns = [key.removeprefix("-:") for key in gptq["dynamic"] if key.startswith("-:")]
    for name, is_plain in (
        ("model.layers.1.mlp.experts.3.up_proj", True), ("model.layers.1.mlp.experts", True),
        ("model.layers.1.mlp.shared_experts.up_proj", False), (modules[1], True),
        ("model.layers.11.mlp.experts.3.up_proj", False),
    ):  # fmt: skip
        assert any(re.match(pattern, name) for pattern in patterns) == is_plain, name
    rounds = with_exceptions({"quant_method": "auto-round"}, modules)
    assert {key: value["bits"] for key, value in rounds["extra_config"].items()} == {
        experts: 16, modules[1]: 16
    }  # fmt: skip
