"""Quantised and sharded model folders: dequantised like transformers, loaded like plain ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from helpers.family_models import Family, random_model
from helpers.tiny_models import save_model, token_ids
from safetensors.torch import load_file, save_file
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ktrt.checkpoint.folder import Checkpoint
from ktrt.checkpoint.formats import dequantize_fp8, dequantize_mxfp4
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import CheckpointError
from ktrt.loading.model import load_model

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = (128, 128)
Tensors = dict[str, torch.Tensor]


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + low)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def random_fp8(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)


def scales_for(*shape: int) -> torch.Tensor:
    *outer, n, k = shape
    return torch.rand(*outer, -(-n // 128), -(-k // 128)) + 0.5


@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (5, 7), (3, 200, 140)])
def test_fp8_blocks_equal_transformers(shape: tuple[int, ...]) -> None:
    codes, scales = random_fp8(*shape), scales_for(*shape)
    if not hasattr(finegrained_fp8, "_dequantize_fp8_weight"):
        pytest.skip("this transformers cannot dequantise blocks that do not divide the matrix")
    expected = finegrained_fp8._dequantize_fp8_weight(codes, scales, list(BLOCK), torch.float32)
    assert torch.equal(dequantize_fp8(codes, scales, BLOCK), expected)


def test_fp8_scales_of_other_kinds() -> None:
    codes = random_fp8(40, 50)
    single = torch.tensor(0.25)
    assert torch.equal(dequantize_fp8(codes, single, BLOCK), codes.float() * 0.25)
    assert torch.equal(dequantize_fp8(codes, single[None], BLOCK), codes.float() * 0.25)
    # E8M0: powers of two, as bytes and in torch's dtype.
    powers = torch.tensor([[125]], dtype=torch.uint8)
    assert torch.equal(dequantize_fp8(codes, powers, BLOCK), codes.float() * 0.25)
    own = torch.tensor([[0.25]]).to(torch.float8_e8m0fnu)
    assert torch.equal(dequantize_fp8(codes, own, BLOCK), codes.float() * 0.25)


def test_mxfp4_equals_transformers() -> None:
    blocks, scales = random_bytes(3, 10, 4, 16), random_bytes(3, 10, 4, low=100, high=140)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(dequantize_mxfp4(blocks, scales).transpose(1, 2), expected)


def test_quantised_tensors_are_seen_as_plain_ones(tmp_path: Path) -> None:
    tensors: Tensors = {
        "a.weight": random_fp8(130, 150), "a.weight_scale_inv": scales_for(130, 150),
        "s.gate_up_proj": random_fp8(3, 140, 20),
        "s.gate_up_proj_scale_inv": scales_for(3, 140, 20),
        "b.weight": random_fp8(8, 9), "b.weight_scale": torch.tensor(0.5),
        "c.weight": random_fp8(8, 9), "c.scale": torch.ones(1, 1),
        "d.weight": random_fp8(8, 9), "d.qscale_weight": torch.tensor([2.0]),
        "x.down_proj_blocks": random_bytes(2, 6, 3, 16),
        "x.down_proj_scales": random_bytes(2, 6, 3),
        "plain.weight": torch.ones(3, dtype=torch.float16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    names = ["a.weight", "b.weight", "c.weight", "d.weight", "plain.weight", "s.gate_up_proj",
             "x.down_proj"]  # fmt: skip
    assert sorted(checkpoint.names()) == names
    assert checkpoint.is_quantized()
    assert not checkpoint.is_quantized("plain.weight")
    for name in names:
        whole = checkpoint.read(name)
        assert checkpoint.shape(name) == tuple(whole.shape), name
        assert checkpoint.dtype(name) == ("F16" if name == "plain.weight" else "F32")
        if whole.ndim == 3:
            assert torch.equal(checkpoint.read_row(name, 1), whole[1]), name
    assert torch.equal(checkpoint.read("d.weight"), tensors["d.weight"].float() * 2)
    assert checkpoint.shape("x.down_proj") == (2, 96, 6)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"a.weight": random_fp8(130, 150), "a.weight_scale_inv": torch.ones(2, 1)},
            r"a\.weight_scale_inv has shape \[2, 1\], expected one scale, or \[2, 2\]",
        ),
        (
            {"a.weight": random_fp8(8, 8), "a.weight_scale_inv": torch.ones(1, 1).to(torch.int32)},
            r"a\.weight_scale_inv has dtype I32",
        ),
        ({"x_blocks": random_bytes(2, 6, 3, 16)}, r"x_blocks has no x_scales\. The folder is inc"),
        (
            {"x_blocks": random_bytes(2, 6, 3, 16), "x_scales": random_bytes(2, 6, 2)},
            "are not MXFP4",
        ),
        ({"x_blocks": random_bytes(2, 6, 16), "x_scales": random_bytes(2, 6)}, "are not MXFP4"),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, tensors: Tensors, words: str) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(tmp_path)


def logits(folder: Path, infer_dtype: Any = "float32") -> torch.Tensor:
    loaded = load_model(
        ModelArgs(folder, infer_dtype=infer_dtype),
        AdapterArgs(None),
        ExpertArgs("AMXBF16", kt_num_threads=1),
    )
    with torch.no_grad():
        result: torch.Tensor = loaded.model(token_ids(1, 24) % 96).logits
    assert loaded.model.generation_config.eos_token_id == 1  # type: ignore[union-attr]
    loaded.close()
    return result


def rewrite(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> Path:
    """Copies the folder with other tensors."""
    copy = folder.with_name(f"{folder.name}-{'quantised' if quantization else 'plain'}")
    copy.mkdir()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"quantization_config": quantization} if quantization else {}
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    generation = folder / "generation_config.json"
    (copy / generation.name).write_text(generation.read_text("utf-8"), "utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              copy / "model.safetensors")  # fmt: skip
    return copy


_DEEPSEEK_FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}  # fmt: skip


def fp8_twins(folder: Path) -> tuple[Tensors, Tensors]:
    """Returns the model in FP8 and its dequantised twin. Embeddings, norms, router and head stay
    plain; the blocks do not divide the matrices of experts (96 × 160) and attention."""
    stored: Tensors = {}
    plain: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = plain[name] = weight
        kept = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight")
        if not name.endswith(kept):
            scales = scales_for(*weight.shape) / 400
            rows, columns = (torch.arange(size) // 128 for size in weight.shape)
            scale = scales[rows][:, columns]
            # Beyond ±448 the conversion gives NaN, not the nearest value.
            codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = codes, scales
            plain[name] = codes.float() * scale
    return stored, plain


def test_tensors_beyond_the_model_are_not_read_but_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V3's folders hold one more layer with experts, which transformers ignores."""
    folder = save_model(tmp_path / "model", "deepseek_v2", 96)
    stored, _ = fp8_twins(folder)
    one = logits(rewrite(folder, stored, _DEEPSEEK_FP8))
    extra = {name.replace("layers.2", "layers.9"): t.clone() for name, t in stored.items()}
    (tmp_path / "more").mkdir()
    more = folder.rename(tmp_path / "more" / "model")
    folder = rewrite(more, {**stored, **extra}, _DEEPSEEK_FP8)
    with pytest.raises(CheckpointError, match=r"unexpected keys .*model\.layers\.9\."):
        logits(folder)
    model_class = transformers.DeepseekV2ForCausalLM
    monkeypatch.setattr(model_class, "_keys_to_ignore_on_load_unexpected", [r"layers\.9\."])
    assert torch.equal(logits(folder), one)


def test_deepseek_style_fp8_loads_as_its_plain_twin(tmp_path: Path) -> None:
    """In BF16 the dense layers keep their codes, so the weights are not rounded; in FP32 they are
    dequantised."""
    folder = save_model(tmp_path / "model", "deepseek_v2", 96)
    stored, values = fp8_twins(folder)
    coded, plain = rewrite(folder, stored, _DEEPSEEK_FP8), rewrite(folder, values, None)
    expected = logits(plain)
    difference = (logits(coded) - expected).norm()
    quantised = logits(coded, "auto")
    assert quantised.dtype == torch.bfloat16
    error = (quantised.float() - expected).norm()
    yardstick = (logits(plain, "auto").float() - expected).norm()
    assert difference <= 0.5 * yardstick
    assert error <= 1.5 * yardstick


def test_gpt_oss_style_mxfp4_loads_as_its_plain_twin(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = {"hidden_size": 96, "intermediate_size": 64}
    model = random_model(Family("gpt_oss", "gpt_oss", "GptOssForCausalLM"), changes=config)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    stored: Tensors = {}
    for name, weight in list(plain.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        blocks = random_bytes(experts, outputs, inputs // 32, 16)
        scales = random_bytes(experts, outputs, inputs // 32, low=121, high=125)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    quantised = logits(rewrite(folder, stored, {"quant_method": "mxfp4"}))
    assert torch.equal(quantised, logits(rewrite(folder, plain, None)))
    reference = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path / "model-plain", dtype=torch.float32
    )
    with torch.no_grad():
        expected = reference(token_ids(1, 24) % 96).logits
    assert (quantised - expected).norm() / expected.norm() < 0.02


def test_shards_and_halves_load_like_one_file(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen3_moe", 96)
    one = logits(folder)
    shards = tmp_path / "shards"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(shards, max_shard_size="300KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert torch.equal(logits(shards), one)
    # BF16 weights of this size, except the smallest, are exact in FP16 and FP32: states differ by
    # 1e-6, which now and then rounds an input of the experts to the next BF16 number.
    for dtype in (torch.float16, torch.float32):
        other = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(other)
        assert (logits(other) - one).norm() < 5e-3 * one.norm()
