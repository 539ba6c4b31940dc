"""Quantised tensors in the engine's canonical form: the numbers of the files, nothing rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from checkpoint.test_checkpoint_formats import random_bytes, random_fp8, scales_for
from safetensors.torch import save_file

from ktrt.checkpoint.codes import GROUPS, Codes
from ktrt.checkpoint.folder import Checkpoint
from ktrt.checkpoint.quantization import Quantization

if TYPE_CHECKING:
    from pathlib import Path

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def open_with(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def decode(codes: Codes) -> torch.Tensor:
    """Dequantises the canonical form from its description, element by element."""
    raw = codes.codes.numpy()
    if codes.format.startswith("fp8"):
        values = codes.codes.contiguous().view(torch.float8_e4m3fn).float().numpy()
        scales = codes.scales.numpy()
        n, k = values.shape
        if codes.format == "fp8_channel":
            return torch.from_numpy(values * scales[:, None])
        assert scales.shape == (-(-n // 32), -(-k // 128))
        return torch.from_numpy(values * scales[np.arange(n) // 32][:, np.arange(k) // 128])
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
    columns = np.arange(nibbles.shape[1]) // GROUPS[codes.format]
    if codes.format == "mxfp4":
        powers = np.exp2(codes.scales.numpy().astype(np.float32) - 127)
        return torch.from_numpy(_E2M1[nibbles] * powers[:, columns])
    signed = np.where(nibbles > 7, nibbles.astype(np.int8) - 16, nibbles)
    assert codes.scales.dtype == torch.bfloat16
    return torch.from_numpy(signed.astype(np.float32) * codes.scales.float().numpy()[:, columns])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (5, 7)])
def test_fp8_in_blocks(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = {"a.weight": random_fp8(*shape), "a.weight_scale_inv": scales_for(*shape).to(dtype)}
    checkpoint = open_with(tmp_path, tensors)
    assert checkpoint.coded("a.weight") == "fp8"
    codes = checkpoint.read_codes("a.weight")
    assert codes.codes.dtype == torch.uint8
    assert codes.scales.dtype == torch.float32
    assert torch.equal(decode(codes), checkpoint.read("a.weight"))


def test_fp8_by_rows_by_tensor_and_in_stacks(tmp_path: Path) -> None:
    tensors = {
        "r.weight": random_fp8(40, 70), "r.weight_scale": torch.rand(40, 1).bfloat16(),
        "t.weight": random_fp8(40, 170), "t.weight_scale": torch.tensor(0.25),
        "s": random_fp8(3, 140, 200), "s_scale_inv": scales_for(3, 140, 200),
        "e.weight": random_fp8(130, 140), "e.scale": random_bytes(2, 2, low=120, high=130),
    }  # fmt: skip
    checkpoint = open_with(tmp_path, tensors)
    formats = {name: checkpoint.coded(name) for name in checkpoint.names()}
    assert formats == {
        "r.weight": "fp8_channel", "t.weight": "fp8", "s": "fp8", "e.weight": "fp8"
    }  # fmt: skip
    rows = tensors["r.weight"].float() * tensors["r.weight_scale"].float()
    assert torch.equal(checkpoint.read("r.weight"), rows)
    for name in ("r.weight", "t.weight", "e.weight"):
        assert torch.equal(decode(checkpoint.read_codes(name)), checkpoint.read(name)), name
    for row in range(3):
        assert torch.equal(decode(checkpoint.read_codes("s", row)), checkpoint.read_row("s", row))


@pytest.mark.parametrize(("block", "coded"), [((64, 256), True), ((1, 32), False)])
def test_fp8_in_other_blocks(tmp_path: Path, block: tuple[int, int], coded: bool) -> None:
    codes = random_fp8(130, 300)
    scales = torch.rand(-(-130 // block[0]), -(-300 // block[1]))
    save_file({"a.weight": codes, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, Quantization(block=block))
    rows, columns = torch.arange(130) // block[0], torch.arange(300) // block[1]
    expected = codes.float() * scales[rows][:, columns]
    assert torch.equal(checkpoint.read("a.weight"), expected)
    if coded:
        assert torch.equal(decode(checkpoint.read_codes("a.weight")), expected)
    else:
        assert checkpoint.coded("a.weight") is None
        assert "FP8 in blocks of 1 x 32" in checkpoint.why_not_coded("a.weight")


def test_mxfp4_of_gpt_oss_and_deepseek(tmp_path: Path) -> None:
    """gpt-oss's parameters hold the transposes of the stored matrices; codes stay as stored."""
    scales = random_bytes(10, 3, low=100, high=140)
    tensors = {
        "x_blocks": random_bytes(2, 6, 3, 16), "x_scales": random_bytes(2, 6, 3, low=90, high=140),
        "w1.weight": random_bytes(10, 48).view(torch.int8), "w1.scale": scales.view(
            torch.float8_e8m0fnu),
    }  # fmt: skip
    checkpoint = open_with(tmp_path, tensors)
    assert checkpoint.shape("x") == (2, 96, 6)
    assert checkpoint.shape("w1.weight") == (10, 96)
    assert checkpoint.tensor("x").transposed
    for row in range(2):
        codes = checkpoint.read_codes("x", row)
        assert codes.format == "mxfp4"
        assert torch.equal(decode(codes).T, checkpoint.read_row("x", row))
    codes = checkpoint.read_codes("w1.weight")
    assert torch.equal(codes.scales, scales)
    assert torch.equal(decode(codes), checkpoint.read("w1.weight"))
