"""Chat, ``--verify`` and export agree on a model folder: which files, which tensors, which
numbers."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.real_models import fp8, make
from helpers.tiny_models import save_adapter, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktrt.audit.reference import RawCheckpoint
from ktrt.audit.verify.model import verify
from ktrt.checkpoint.config import read_model_config
from ktrt.checkpoint.folder import Checkpoint
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import CheckpointError
from ktrt.export.checkpoint import merge_checkpoint
from ktrt.loading.model import load_model
from ktrt.loading.plan import (
    base_of_adapters,
    open_adapter,
    open_base,
    open_checkpoint,
)

EXPERTS = ExpertArgs(kt_num_threads=1)
TOKENS = torch.randint(2, 300, (1, 12), generator=torch.Generator().manual_seed(5))
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), "qwen3_moe", 96)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def logits(folder: Path) -> torch.Tensor:
    args = ModelArgs(folder, infer_dtype="float32")
    loaded = load_model(args, AdapterArgs(None), EXPERTS)
    with torch.no_grad():
        result: torch.Tensor = loaded.model(TOKENS).logits
    loaded.close()
    return result


def theirs(folder: Path) -> torch.Tensor:
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        result: torch.Tensor = library(TOKENS).logits
    return result


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() < 0.02 * expected.norm())


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps(config), encoding="utf-8")


def edit_weights(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, seed: int | None = None) -> Tensors:
    """Adds two shards and an index next to the single file, with its tensors or (with a seed)
    random ones."""
    tensors: Tensors = load_file(folder / "model.safetensors")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            n: torch.randn(t.shape, generator=generator).to(t.dtype) / 10
            for n, t in tensors.items()
        }
    weight_map: dict[str, str] = {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        names = sorted(tensors)[number::2]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tensors


def export(folder: Path, out: Path) -> Path:
    merge_checkpoint(open_base(ModelArgs(folder)), None, out)
    return out


# Which file


def test_the_single_file_goes_before_a_stale_index(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = theirs(model)
    shard(model, seed=3)
    assert torch.equal(theirs(model), expected)
    assert close(logits(model), expected)
    (warning,) = (r for r in caplog.records if "ignored: model-00001" in r.getMessage())
    assert warning.levelno == logging.WARNING
    assert "model.safetensors.index.json" in warning.getMessage()
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    assert all(r.passed for r in verify(ModelArgs(model), AdapterArgs(adapter), EXPERTS))
    out = export(model, tmp_path / "out")
    assert sorted(p.name for p in out.glob("*.safetensors*")) == ["model.safetensors"]
    assert close(logits(out), expected)


def test_the_index_decides_which_tensors_of_a_shard_count(model: Path, tmp_path: Path) -> None:
    """The shards also hold tensors that the index does not name, and copies of others."""
    expected = theirs(model)
    shard(model)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    (model / "model.safetensors").unlink()
    for number in (1, 2):
        file = model / f"model-0000{number}-of-00002.safetensors"
        held = load_file(file)
        held[f"model.layers.{number}.something.weight"] = torch.ones(3)
        other = load_file(model / f"model-0000{3 - number}-of-00002.safetensors")
        held |= {n: torch.zeros_like(t) for n, t in other.items() if n not in held}
        save_file(held, file)
    save_file({"lm_head.weight": torch.ones(2)}, model / "model-00003-of-00003.safetensors")
    assert close(logits(model), expected)
    assert all(r.passed for r in verify(ModelArgs(model), AdapterArgs(adapter), EXPERTS))
    out = export(model, tmp_path / "out")
    assert close(theirs(out), expected)
    assert not (out / "model-00003-of-00003.safetensors").exists()


def test_copies_and_variants_are_left_alone(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = theirs(model)
    other = {n: torch.zeros_like(t) for n, t in load_file(model / "model.safetensors").items()}
    (model / "original").mkdir()
    for name in ("consolidated", "model.fp16", "original/model"):
        save_file(other, model / f"{name}.safetensors")
    with caplog.at_level(logging.INFO):
        assert close(logits(model), expected)
    assert "ignored: consolidated.safetensors, model.fp16.safetensors, original/" in caplog.text
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*but consolidated"):
        Checkpoint(model)


def test_the_file_that_config_json_names(model: Path, tmp_path: Path) -> None:
    expected = theirs(model)
    (model / "model.safetensors").rename(model / "weights.safetensors")
    edit_config(model, transformers_weights="weights.safetensors")
    other = {n: torch.zeros_like(t) for n, t in load_file(model / "weights.safetensors").items()}
    save_file(other, model / "model.safetensors")
    assert close(theirs(model), expected)
    assert close(logits(model), expected)
    assert close(theirs(export(model, tmp_path / "out")), expected)
    assert "weights" in str(RawCheckpoint(model).file("lm_head.weight"))
    (model / "model.safetensors").unlink()
    assert close(logits(model), expected)


def test_a_link_that_leads_nowhere(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../blobs/0123")
    with pytest.raises(CheckpointError, match=r"link to \.\./blobs/0123, which is not there"):
        open_base(ModelArgs(model))


# Which numbers


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight",
     "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.experts.1.up_proj.weight"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16])
def test_integers_where_floats_belong(model: Path, name: str, dtype: torch.dtype) -> None:
    """Labels the same bytes with another dtype: transformers converts the integers."""
    weight = load_file(model / "model.safetensors")[name]
    edit_weights(model, {name: weight.view(dtype)})
    with pytest.raises(CheckpointError, match=rf"{name} has dtype [IU]16, expected one of F32"):
        open_base(ModelArgs(model))


def test_fp8_without_scales(model: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = load_file(model / "model.safetensors")[name]
    edit_weights(model, {name: weight.to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=f"{name} has dtype F8_E4M3.*scales"):
        open_base(ModelArgs(model))


def test_scales_in_bfloat16(model: Path, tmp_path: Path) -> None:
    """Some FP8 checkpoints have BF16 scales; MXFP4's are bytes."""
    stored: Tensors = {}
    plain: Tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        stored[name] = plain[name] = weight
        if "proj" in name:
            stored |= fp8(name, weight, torch.bfloat16)
            codes, scales = stored[name], stored[f"{name}_scale_inv"].float()
            rows, columns = (torch.arange(size) // 128 for size in codes.shape)
            plain[name] = codes.float() * scales[rows][:, columns]
    twin = Path(shutil.copytree(model, tmp_path / "twin"))
    save_file(stored, model / "model.safetensors")
    save_file(plain, twin / "model.safetensors")
    assert close(logits(model), theirs(twin))


def test_shapes_are_checked_before_anything_is_loaded(model: Path) -> None:
    edit_weights(model, {"lm_head.weight": torch.zeros(8, 8)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[8, 8\], expected \["):
        open_base(ModelArgs(model))


# Which tensors


def test_unexpected_keys_are_listed_once_each(tmp_path: Path) -> None:
    """Experts by themselves are one parameter."""
    edit_config(save_model(tmp_path, "qwen3_moe", 40), num_hidden_layers=2, mlp_only_layers=[1])
    edit_weights(tmp_path, {f"model.layers.2.mlp.experts.{e}.up_proj.weight": torch.zeros(8, 8)
                            for e in range(5)})  # fmt: skip
    with pytest.raises(CheckpointError, match="unexpected keys") as error:
        open_base(ModelArgs(tmp_path))
    names = re.findall(r"model\.layers\.\d\.[\w.]+", str(error.value))
    assert len(names) == len(set(names)) > 1


def test_tensors_of_another_model_are_refused_everywhere(model: Path) -> None:
    edit_config(model, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"unexpected keys .*model\.layers\.2\."):
        open_base(ModelArgs(model))
    # Not even if config.json announces a layer that predicts: this one joins nothing.
    edit_config(model, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match=r"unexpected keys .*model\.layers\.2\."):
        open_base(ModelArgs(model))


@pytest.mark.parametrize(
    ("extra", "announced"),
    [
        (["model.layers.3.eh_proj.weight", "model.layers.3.enorm.weight"], 1),
        (["model.layers.7.eh_proj.weight"], 0),
        (["model.layers.3.input_fusion.weight"], 1),
        (["mtp.fc.weight"], 0),
        (["model.mtp_block.0.mlp.experts.0.up_proj.weight", "model.mtp_emb_norm.0.weight"], 0),
    ],
)
def test_layers_that_predict_further_tokens(
    model: Path, tmp_path: Path, extra: list[str], announced: int
) -> None:
    """They follow the last layer, or lie under mtp; with copies of an ordinary layer."""
    expected = theirs(model)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    tensors = load_file(model / "model.safetensors")
    hidden = tensors["model.norm.weight"].numel()
    added: dict[str, torch.Tensor | None] = {n: torch.randn(hidden, 2 * hidden) for n in extra}
    if extra[0].startswith(("model.layers", "mtp")):
        start = ".".join(extra[0].split(".")[:3]) if "layers" in extra[0] else "mtp.layers.0"
        added |= {
            n.replace("model.layers.1", start): 5 * t
            for n, t in tensors.items()
            if n.startswith("model.layers.1.")
        }
    edit_weights(model, added)
    edit_config(model, num_nextn_predict_layers=announced)
    assert close(logits(model), expected)
    assert all(r.passed for r in verify(ModelArgs(model), AdapterArgs(adapter), EXPERTS))
    out = export(model, tmp_path / "out")
    assert set(extra) <= set(load_file(out / "model.safetensors"))


# Which scheme


def test_claims_of_config_json_are_no_quantisation(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """KTransformers' cast scripts copy config.json; the tensors are BF16."""
    expected = theirs(model)
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    for number, claim in enumerate(
        [
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
            {"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"},
            {"quant_method": "mxfp4"}, {"quant_algo": "NVFP4"},
        ]
    ):  # fmt: skip
        edit_config(model, quantization_config=claim)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert close(logits(model), expected)
        assert "no tensor is quantised" in caplog.text
        args = AdapterArgs(adapter)
        assert all(r.passed for r in verify(ModelArgs(model), args, EXPERTS))
        (model / "hf_quant_config.json").write_text("{}", encoding="utf-8")
        out = export(model, tmp_path / f"out{number}")
        assert "quantization_config" not in json.loads((out / "config.json").read_text("utf-8"))
        assert not (out / "hf_quant_config.json").exists()
        assert close(theirs(out), expected)


def _bytes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


_INT = torch.int32
_FP8 = torch.ones(160, 96).to(torch.float8_e4m3fn)
_ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("words", "tensors"),
    [
        (
            "NVFP4",
            {"weight": _bytes(160, 48), "weight_scale": _FP8[:, :6].clone(),
             "weight_scale_2": _ONE, "input_scale": _ONE},
        ),
        (
            "NVFP4.*compressed",
            {"weight_packed": _bytes(160, 48), "weight_global_scale": torch.ones(1)},
        ),
        (
            "zero points",
            {"weight_packed": _bytes(160, 12, dtype=_INT), "weight_scale": torch.ones(160, 3),
             "weight_shape": _bytes(2, dtype=_INT),
             "weight_zero_point": _bytes(20, 3, dtype=_INT)},
        ),
        (
            "NVFP4.*compressed",
            {"weight_packed": _bytes(160, 48), "weight_scale": _FP8[:, :6].clone()},
        ),
        ("static activation", {"weight": _FP8, "weight_scale": _ONE, "input_scale": _ONE}),
        ("INT8", {"weight": _bytes(160, 96, dtype=torch.int8), "weight_scale": torch.ones(160, 1)}),
        (
            "asymmetric GPTQ",
            {"qweight": _bytes(12, 160, dtype=_INT), "scales": torch.ones(3, 160),
             "qzeros": _bytes(3, 20, dtype=_INT), "g_idx": _bytes(96, dtype=_INT)},
        ),
        (
            "AWQ",
            {"qweight": _bytes(96, 20, dtype=_INT), "scales": torch.ones(3, 160),
             "qzeros": _bytes(3, 20, dtype=_INT)},
        ),
        (
            "bitsandbytes, 4",
            {"weight": _bytes(7680, 1), "weight.absmax": _bytes(240),
             "weight.quant_map": torch.ones(16),
             "weight.quant_state.bitsandbytes__nf4": _bytes(90)},
        ),
        (
            "bitsandbytes, 8",
            {"weight": _bytes(160, 96, dtype=torch.int8), "SCB": torch.ones(160)},
        ),
        ("HQQ", {"W_q": _bytes(80, 96), "meta": torch.ones(3)}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("claimed", [True, False])
def test_schemes_that_are_not_read_are_refused_by_name(
    model: Path, words: str, tensors: Tensors, claimed: bool
) -> None:
    module = "model.layers.1.self_attn.q_proj"
    edit_weights(model, {f"{module}.weight": None})
    edit_weights(model, {f"{module}.{name}": value.clone() for name, value in tensors.items()})
    if claimed:
        edit_config(model, quantization_config={"quant_method": "some"})
    with pytest.raises(CheckpointError, match=f"quantised as .*{words}.*Use a BF16 checkpoint"):
        open_base(ModelArgs(model))


def test_verify_reads_a_quantised_base_whose_config_claims_nothing(tmp_path: Path) -> None:
    real = make("kimi-k2-fp8")
    real.config.pop("quantization_config")
    folder = real.write(tmp_path / "model")
    checkpoint, raw = Checkpoint(folder), RawCheckpoint(folder)
    name = next(n for n in checkpoint.names() if checkpoint.is_quantized(n) and "q_a_proj" in n)
    found, _ = raw.linear(name.removesuffix(".weight"))
    assert torch.equal(torch.from_numpy(found), checkpoint.read(name))


def test_an_adapter_merges_into_a_model_whose_config_claims_fp8(
    model: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", model, "a")
    edit_config(model, quantization_config={"quant_method": "fp8"})
    base = open_base(ModelArgs(model))
    plan = open_adapter(AdapterArgs(adapter), base_of_adapters(base))
    summary = merge_checkpoint(base, plan, tmp_path / "out")
    assert summary.merged > 0
    assert summary.dtype == "BF16"


@pytest.mark.parametrize(
    "claim",
    [
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 64]}},
        {"text_config": {"quantization_config": {"weight_block_size": [32, 64]}}},
        {
            "compression_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"block_structure": [32, 64]}}},
            }
        },
    ],
)
def test_config_json_gives_the_block_of_scales(tmp_path: Path, claim: dict[str, Any]) -> None:
    """The scales must fit: they are refused for blocks of 128 x 128."""
    codes = torch.randn(70, 130).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3)
    save_file({"a.weight": codes, "a.weight_scale": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe"} | claim), encoding="utf-8"
    )
    checkpoint = open_checkpoint(read_model_config(tmp_path))
    rows, columns = torch.arange(70) // 32, torch.arange(130) // 64
    expected = codes.float() * scales[rows][:, columns]
    assert torch.equal(checkpoint.read("a.weight"), expected)

    with pytest.raises(CheckpointError, match=r"a\.weight_scale has shape \[3, 3\].*128 x 128"):
        Checkpoint(tmp_path)


def test_experts_of_an_unread_scheme_with_kt_weight_path(model: Path) -> None:
    """KTransformers' converted experts replace INT4 ones; attention is BF16."""
    tensors = load_file(model / "model.safetensors")
    change: dict[str, torch.Tensor | None] = {}
    for name, weight in tensors.items():
        if ".experts." in name:
            change[name] = None
            stem = name.removesuffix(".weight")
            change[f"{stem}.weight_packed"] = _bytes(len(weight), 12, dtype=_INT)
            change[f"{stem}.weight_zero_point"] = torch.ones(len(weight), 3)
    edit_weights(model, change)
    with pytest.raises(CheckpointError, match="zero points"):
        open_base(ModelArgs(model))
    base = open_base(ModelArgs(model), model / "kt")
    assert base.experts.weights == {}
