"""The independent reader's quantised formats, against torch, transformers and formulas for single
codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.coded_checkpoints import SCHEMES, code_folder, save_family
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ktrt.audit.reference import CannotVerifyError
from ktrt.audit.reference.checkpoint import RawCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
W = "model.layers.0.mlp.experts.0.up_proj.weight"
MODULE = W.removesuffix(".weight")
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True}


def integers(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + low)
    return torch.randint(low, high, shape, generator=generator)


def scales_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.rand(shape, generator=generator) + 0.5).to(dtype) / 16


def fp8(*shape: int) -> torch.Tensor:
    """Every code but NaN."""
    codes = integers(*shape).to(torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)


def words(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes 0 … 15 [n, k] into int32 [n, k / 8], the first in the low bits."""
    packed = sum(codes[:, i::8].to(torch.int64) << 4 * i for i in range(8))
    assert isinstance(packed, torch.Tensor)
    return packed.to(torch.uint32).view(torch.int32)


def read(folder: Path, tensors: Tensors, quantization: Any = None, name: str = W) -> Any:
    folder.mkdir(exist_ok=True)
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    config = {"num_hidden_layers": 1, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    checkpoint = RawCheckpoint(folder)
    values = checkpoint.read(name)
    assert checkpoint.shape(name) == values.shape
    return values


def blocks(scales: torch.Tensor, n: int, k: int, rows: int = 128, columns: int = 128) -> Any:
    return scales.float()[torch.arange(n) // rows][:, torch.arange(k) // columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (5, 7)])
def test_fp8_in_blocks(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    codes, scales = fp8(n, k), scales_of(-(-n // 128), -(-k // 128), dtype=dtype)
    found = read(tmp_path, {W: codes, f"{W}_scale_inv": scales})
    np.testing.assert_array_equal(found, (codes.float() * blocks(scales, n, k)).numpy())


@pytest.mark.parametrize(
    ("form", "leaf", "block"),
    [((), "_scale", None), ((1,), "_scale_inv", None), ((130, 1), "_scale", None),
     ((130,), "_scale", None), ((3, 5), "_scale_inv", [64, 64])],
)  # fmt: skip
def test_fp8_with_other_scales(tmp_path: Path, form: Any, leaf: str, block: Any) -> None:
    codes, scales = fp8(130, 300), scales_of(*form)
    found = read(tmp_path, {W: codes, W + leaf: scales}, {"weight_block_size": block})
    per_row = scales[:, None] if form == (130,) else scales
    expected = blocks(scales, 130, 300, 64, 64) if block else per_row
    np.testing.assert_array_equal(found, (codes.float() * expected).numpy())


def test_fp8_with_powers_of_two_and_of_several_experts(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes, scales = fp8(3, 140, 200), integers(3, 2, 2, low=110, high=130).to(torch.uint8)
    tensors = {name: codes, f"{name}_scale_inv": scales.view(torch.float8_e8m0fnu)}
    found = read(tmp_path, tensors, name=name)
    for expert in range(3):
        powers = torch.exp2(scales[expert].float() - 127)
        expected = codes[expert].float() * blocks(powers, 140, 200)
        np.testing.assert_array_equal(found[expert], expected.numpy())
        one = RawCheckpoint(tmp_path)._tensors[name].read(expert)
        np.testing.assert_array_equal(one, expected.numpy())


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_compressed_tensors_int4(tmp_path: Path, group: int) -> None:
    codes = integers(6, 256, high=16)
    scales = scales_of(6, 256 // group, dtype=torch.bfloat16)
    tensors = {
        f"{W}_packed": words(codes), f"{W}_scale": scales, f"{W}_shape": torch.tensor([6, 256])
    }  # fmt: skip
    found = read(tmp_path, tensors)
    for row, column in ((0, 0), (1, 9), (5, 255), (3, group - 1)):
        expected = (int(codes[row, column]) - 8) * float(scales[row, column // group])
        assert found[row, column] == expected
    assert found.shape == (6, 256)
    order = integers(256, high=256 // group).to(torch.int32)
    found = read(tmp_path, {**tensors, f"{W}_g_idx": order})
    np.testing.assert_array_equal(found, ((codes - 8) * scales.float()[:, order.long()]).numpy())


@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_gptq(tmp_path: Path, version: int) -> None:
    codes, scales = integers(16, 64, high=16), scales_of(2, 16, dtype=torch.float16)
    order = torch.arange(64, dtype=torch.int32) // 32
    zeros = torch.full((2, 2), {1: 0x77777777, 2: -0x77777778}[version], dtype=torch.int32)
    tensors = {
        f"{MODULE}.qweight": words(codes).T, f"{MODULE}.scales": scales,
        f"{MODULE}.qzeros": zeros, f"{MODULE}.g_idx": order,
    }  # fmt: skip
    settings = {**GPTQ, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    expected = ((codes - 8) * scales.float().T[:, order.long()]).numpy()
    np.testing.assert_array_equal(read(tmp_path, tensors, settings), expected)
    del tensors[f"{MODULE}.g_idx"]
    np.testing.assert_array_equal(read(tmp_path, tensors, settings), expected)
    tensors[f"{MODULE}.g_idx"] = order.flip(0)
    flipped = ((codes - 8) * scales.float().T[:, order.flip(0).long()]).numpy()
    np.testing.assert_array_equal(read(tmp_path, tensors, settings), flipped)
    np.testing.assert_array_equal(read(tmp_path, tensors, GPTQ), flipped)
    packed = RawCheckpoint(tmp_path)._tensors[W].read_packed
    assert packed is not None
    rounded = scales.bfloat16().float().T[:, order.flip(0).long()]
    np.testing.assert_array_equal(packed(None), ((codes - 8) * rounded).numpy())
    other = {**settings, "checkpoint_format": "gptq" if version == 2 else "gptq_v2"}
    with pytest.raises(CannotVerifyError, match="GPTQ with zero points"):
        read(tmp_path, tensors, other)


def test_mxfp4(tmp_path: Path) -> None:
    """gpt-oss's stacks, and DeepSeek-V4's single experts."""
    codes = integers(2, 6, 3, 16).to(torch.uint8)
    scales = integers(2, 6, 3, low=100, high=140).to(torch.uint8)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    expected = convert_moe_packed_tensors(codes, scales, dtype=torch.float32).transpose(1, 2)
    found = read(tmp_path, {f"{stack}_blocks": codes, f"{stack}_scales": scales}, name=stack)
    np.testing.assert_array_equal(found, expected.numpy())
    name = "layers.0.ffn.experts.1.w1.weight"
    tensors = {
        name: codes[1].reshape(6, 48).view(torch.int8),
        "layers.0.ffn.experts.1.w1.scale": scales[1].view(torch.float8_e8m0fnu),
    }
    np.testing.assert_array_equal(read(tmp_path, tensors, name=name), expected[1].numpy())
    tensors = {f"{W}_packed": codes[1].reshape(6, 48), f"{W}_scale": scales[1]}
    np.testing.assert_array_equal(read(tmp_path, tensors), expected[1].numpy())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole_models(tmp_path: Path, scheme: str) -> None:
    """Models as published. Blocks end inside 208 columns, which groups of 64 leave plain."""
    model = save_family(tmp_path / "model", "deepseek_v3", intermediate_size=208)
    folders = code_folder(model, tmp_path / "coded", scheme)
    coded, plain = RawCheckpoint(folders.coded), RawCheckpoint(folders.plain)
    assert folders.quantized
    for name in load_file(folders.plain / "model.safetensors"):
        np.testing.assert_array_equal(coded.read(name), plain.read(name), err_msg=name)
    experts = coded.experts(1)
    assert experts is not None
    assert coded.family(experts) == {"gptq": "int4"}.get(scheme[:4], scheme.partition("_")[0])


BYTES, ONES = integers(8, 16).to(torch.uint8), torch.ones(8, 4)
WORDS = integers(8, 4).to(torch.int32)
UNREADABLE: dict[str, Tensors] = {
    "NVFP4 (TensorRT Model Optimizer)": {
        W: BYTES, f"{W}_scale": ONES, f"{W}_scale_2": ONES[0, :1]
    },
    "NVFP4 (compressed-tensors)": {
        f"{W}_packed": BYTES, f"{W}_scale": ONES, f"{W}_global_scale": ONES[0, :1]
    },
    "compressed-tensors with zero points": {
        f"{W}_packed": WORDS, f"{W}_scale": ONES[:, :1], f"{W}_zero_point": WORDS
    },
    "compressed-tensors, not INT4 in words of 32 bits": {
        f"{W}_packed": WORDS.to(torch.int64), f"{W}_scale": ONES
    },
    "other than 4 bits of 16 columns": {
        f"{W}_packed": WORDS, f"{W}_scale": ONES[:, :1], f"{W}_shape": torch.tensor([8, 16])
    },
    "INT8 (compressed-tensors int-quantized)": {W: BYTES.view(torch.int8), f"{W}_scale": ONES},
    "bitsandbytes, 4 bits": {W: BYTES, f"{W}.absmax": ONES},
    "bitsandbytes, 8 bits": {W: BYTES.view(torch.int8), f"{MODULE}.SCB": ONES},
    "AWQ": {
        f"{MODULE}.qweight": WORDS, f"{MODULE}.qzeros": WORDS[:1],
        f"{MODULE}.scales": scales_of(1, 32),
    },
    "HQQ": {f"{MODULE}.W_q": BYTES},
    "FP8 E5M2": {W: torch.ones(4, 4).to(torch.float8_e5m2), f"{W}_scale": ONES[0, :1]},
    "FP8 with static activation scales": {
        W: fp8(4, 4), f"{W}_scale": ONES[0, :1], f"{MODULE}.input_scale": ONES[0, :1]
    },
    "FP8 without a scale": {W: fp8(4, 4)},
    "no blocks of 128 x 128": {W: fp8(4, 4), f"{W}_scale": ONES},
}  # fmt: skip


@pytest.mark.parametrize("scheme", UNREADABLE)
def test_other_schemes_are_named(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(CannotVerifyError) as raised:
        read(tmp_path, UNREADABLE[scheme])
    assert scheme in str(raised.value)
    assert "cannot be verified" in str(raised.value)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_is_refused(tmp_path: Path, code: int) -> None:
    codes = torch.full((4, 4), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(CannotVerifyError, match="no finite numbers"):
        read(tmp_path, {W: codes, f"{W}_scale": ONES[0, :1]})


def test_gpt_oss(tmp_path: Path) -> None:
    """Rows of gate and up alternate, in codes, floats and biases; a missing bias is refused."""
    model = save_family(tmp_path / "model", "gpt_oss")
    folders = code_folder(model, tmp_path / "coded", "mxfp4")
    checkpoint, twin = RawCheckpoint(folders.coded), RawCheckpoint(folders.plain)
    name = "model.layers.0.mlp.experts"
    found, expected = checkpoint.experts(0), twin.experts(0)
    assert found is not None
    assert expected is not None
    first = load_file(folders.plain / "model.safetensors")
    for experts, reader in ((found, checkpoint), (expected, twin)):
        weights, biases = reader.read_expert(experts, 5), reader.read_biases(experts, 5)
        for start, projection in enumerate(("gate", "up")):
            rows = first[f"{name}.gate_up_proj"][5, :, start::2].T.numpy()
            np.testing.assert_array_equal(weights[projection], rows)
            bias = first[f"{name}.gate_up_proj_bias"][5, start::2].float().numpy()
            np.testing.assert_array_equal(biases[projection], bias)
        down = first[f"{name}.down_proj"][5].T.numpy()
        np.testing.assert_array_equal(weights["down"], down)
    del first[f"{name}.down_proj_bias"]
    save_file(first, folders.plain / "model.safetensors")
    with pytest.raises(CannotVerifyError, match="2 stacked tensors, 1 biases"):
        RawCheckpoint(folders.plain).experts(0)
