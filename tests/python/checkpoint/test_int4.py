"""INT4 of compressed-tensors and of GPTQ: read as packed by their descriptions, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoint.test_codes import decode
from helpers.coded_checkpoints import gptq, mxfp4, pack_quantized
from safetensors.torch import save_file

from ktrt.checkpoint.folder import Checkpoint
from ktrt.checkpoint.quantization import Quantization
from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]


def matrix(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))


def open_with(folder: Path, tensors: Tensors, **claims: Any) -> Checkpoint:
    """Opens a folder with the tensors of a module "a"."""
    save_file({f"a.{n}": t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder, Quantization(**claims))


@pytest.mark.parametrize(
    ("n", "k", "group", "claimed", "coded"),
    [
        (10, 96, 32, (), "int4_g32"),
        (10, 128, 64, (), "int4_g64"),
        (5, 256, 128, (), "int4_g128"),
        # The claims of a mixed model, or of another folder.
        (5, 256, 64, (128, 64), "int4_g64"),
        (5, 256, 64, (48,), "int4_g64"),
        # By rows, and other groups that are multiples: scales are repeated.
        (5, 160, 160, (), "int4_g32"),
        (5, 512, 256, (), "int4_g128"),
        # A last group that is shorter.
        (5, 192, 128, (), "int4_g128"),
        (5, 192, 96, (96,), "int4_g32"),
        (5, 100, 32, (), "int4_g32"),
        (5, 97, 64, (), "int4_g64"),
        (5, 96, 16, (), None),
    ],
)
def test_pack_quantized(
    tmp_path: Path, n: int, k: int, group: int, claimed: tuple[int, ...], coded: str | None
) -> None:
    tensors, plain = pack_quantized(matrix(n, k), group)
    checkpoint = open_with(tmp_path, tensors, group_sizes=claimed)
    assert list(checkpoint.names()) == ["a.weight"]
    assert checkpoint.shape("a.weight") == (n, k)
    assert checkpoint.dtype("a.weight") == "F32"
    assert torch.equal(checkpoint.read("a.weight"), plain)
    assert torch.equal(checkpoint.read_row("a.weight", 3), plain[3])
    assert checkpoint.coded("a.weight") == coded
    if coded is None:
        assert f"INT4 in groups of {group}:" in checkpoint.why_not_coded("a.weight")
        return
    codes = checkpoint.read_codes("a.weight")
    assert codes.format == coded
    assert torch.equal(decode(codes)[:, :k], plain)
    assert torch.equal(decode(codes.regrouped("int4_g32"))[:, :k], plain)


def test_all_sixteen_codes(tmp_path: Path) -> None:
    """Kimi's codes are -7 … 7, others' include -8."""
    words = torch.tensor([[0x76543210, 0xFEDCBA98 - (1 << 32)] * 2], dtype=torch.int32)
    tensors = {
        "weight_packed": words, "weight_scale": torch.ones(1, 1, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 32]),
    }  # fmt: skip
    checkpoint = open_with(tmp_path, tensors)
    expected = torch.arange(-8, 8).float().repeat(2)[None]
    assert torch.equal(checkpoint.read("a.weight"), expected)
    assert torch.equal(decode(checkpoint.read_codes("a.weight")), expected)


@pytest.mark.parametrize("zeros", [7, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_gptq(tmp_path: Path, group: int, zeros: int) -> None:
    tensors, plain = gptq(matrix(24, 128), group, torch.bfloat16, zeros)
    if group == 64:
        del tensors["g_idx"]  # AutoRound writes none.
    checkpoint = open_with(tmp_path, tensors)
    assert list(checkpoint.names()) == ["a.weight"]
    assert torch.equal(checkpoint.read("a.weight"), plain)
    codes = checkpoint.read_codes("a.weight")
    assert codes.format == f"int4_g{group}"
    assert torch.equal(decode(codes), plain)


def test_scales_in_float16_are_rounded_once_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, plain = gptq(matrix(24, 128), 32)
    with caplog.at_level("INFO"):
        checkpoint = open_with(tmp_path, tensors)
    assert "INT4 scales are stored in F16" in caplog.text
    assert torch.equal(checkpoint.read("a.weight"), plain)
    found = decode(checkpoint.read_codes("a.weight"))
    assert ((found - plain).abs() <= 2.0**-8 * plain.abs()).all()


def test_mxfp4_pack_quantized(tmp_path: Path) -> None:
    encoded, plain = mxfp4(matrix(10, 96))
    tensors = {"weight_packed": encoded["codes"], "weight_scale": encoded["scales"]}
    checkpoint = open_with(tmp_path, tensors)
    assert torch.equal(checkpoint.read("a.weight"), plain)
    assert torch.equal(decode(checkpoint.read_codes("a.weight")), plain)


_PACKED = pack_quantized(matrix(10, 96), 32)[0]
_GPTQ = gptq(matrix(24, 128), 32)[0]
_MXFP4 = mxfp4(matrix(10, 96))[0]
_TWICE = torch.tensor(np.full((4, 3), 0x77777777, np.int32))


@pytest.mark.parametrize(
    ("tensors", "change", "words"),
    [
        (_PACKED, {"weight_scale": None}, r"a\.weight_packed has no a\.weight_scale"),
        (_PACKED, {"weight_shape": None}, r"a\.weight_packed has no a\.weight_shape"),
        (_PACKED, {"weight_scale": torch.ones(10, 7)}, r"\[10, 7\], expected \[n, groups\]|10, gr"),
        (_PACKED, {"weight_scale": torch.ones(9, 3)}, r"\[9, 3\], expected \[10, groups\]"),
        (_PACKED, {"weight_scale": torch.ones(10, 3).int()}, "weight_scale has dtype I32"),
        (_PACKED, {"weight_shape": torch.tensor([9, 96])}, r"holds \[9, 96\], expected"),
        (_PACKED, {"weight_shape": torch.tensor([10.0, 96.0])}, "weight_shape has dtype F32"),
        (_GPTQ, {"qzeros": _TWICE.float()}, "qzeros has dtype F32"),
        (_PACKED, {"weight_shape": torch.tensor([10])}, r"weight_shape \[1\] holds"),
        (_PACKED, {"weight_shape": torch.tensor([10, 13])}, r"expected \[10, 2\] by"),
        (_PACKED, {"weight_shape": torch.tensor([10, 48])}, r"pack-quantized \(INT8\)"),
        (_PACKED, {"weight_zero_point": torch.zeros(2, 3).int()}, "zero points"),
        (_PACKED, {"weight_packed": _MXFP4["codes"]}, "NVFP4"),
        (_GPTQ, {"scales": None}, r"a\.qweight has no a\.scales"),
        (_GPTQ, {"qzeros": None}, r"a\.qweight has no a\.qzeros"),
        (_GPTQ, {"scales": torch.ones(4, 23)}, r"\[4, 23\], expected \[groups, 24\]"),
        (_GPTQ, {"qzeros": _TWICE[:3]}, r"qzeros has shape \[3, 3\], expected \[4, 3\]"),
        (_GPTQ, {"qzeros": _TWICE - 1}, "asymmetric GPTQ.*first is stored as 6"),
        (_GPTQ, {"g_idx": torch.arange(128).flip(0) // 32}, "desc_act"),
        (_GPTQ, {"g_idx": torch.arange(64) // 32}, "GPTQ with 8 bits"),
        (_GPTQ, {"g_idx": torch.arange(100) // 32}, r"g_idx has shape \[100\], expected \[128\]"),
        (_GPTQ, {"g_idx": None, "qzeros": torch.zeros(4, 6).int()}, "GPTQ with 8 bits"),
        ({"weight": _MXFP4["codes"], "scale": _MXFP4["scales"]}, {"scale": _MXFP4["scales"][:9]},
         r"are not MXFP4; .*\[10, 3\]"),
    ],
)  # fmt: skip
def test_damaged_and_unsupported_ones(
    tmp_path: Path, tensors: Tensors, change: dict[str, torch.Tensor | None], words: str
) -> None:
    changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=words):
        open_with(tmp_path, changed)


def test_a_later_tensor_that_differs_is_refused_on_reading(tmp_path: Path) -> None:
    """Only the first tensor's shape, zero points and order are read on opening."""
    stored: Tensors = {}
    for module, damage in (
        ("a", {}), ("b", {"weight_shape": torch.tensor([10, 95])}),
        ("c", {"qzeros": _TWICE - 1}), ("d", {"g_idx": torch.arange(128).flip(0) // 32}),
    ):  # fmt: skip
        for tensors in (_PACKED, _GPTQ):
            kept = {f"{module}.{len(tensors)}.{n}": t for n, t in {**tensors, **damage}.items()
                    if n in tensors}  # fmt: skip
            stored |= {name: tensor.clone() for name, tensor in kept.items()}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("a.3.weight")
    for name, words in (
        ("b.3", "differs from the shape"), ("c.4", "asymmetric"), ("d.4", "desc_act")
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            checkpoint.read_codes(f"{name}.weight")


def test_a_convention_that_contradicts_config_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"zero points other than 8.*gptq_v2"):
        open_with(tmp_path, _GPTQ, checkpoint_format="gptq_v2")


def test_experts_that_cannot_be_read_do_not_matter_with_kt_weight_path(tmp_path: Path) -> None:
    stored = {f"m.experts.0.{name}": t.clone() for name, t in _GPTQ.items()}
    stored |= {"m.experts.0.qzeros": _TWICE - 1, "m.q.weight": torch.ones(3)}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="asymmetric"):
        Checkpoint(tmp_path)
    assert list(Checkpoint(tmp_path, experts_elsewhere=True).names()) == ["m.q.weight"]
