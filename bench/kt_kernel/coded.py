"""Weights in the formats that big models ship in, for compare.py: the same bytes for both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engines import Weights

PROJECTIONS = ("gate", "up", "down")
# Format → kt_kernel's class, as its NativeMoEWrapper chooses it, bits and columns of a group.
KT_CLASSES = {
    "fp8": ("AMXFP8_MOE", 8, 128),
    "int4_g32": ("AMXInt4_KGroup_MOE", 4, 32),
    "mxfp4": ("AMXFP4_KGroup_MOE", 4, 32),
}
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@dataclass
class Coded:
    """One projection of all experts: ``codes`` and ``scales`` as ktrt takes them, ``kt_codes`` and
    ``kt_scales`` as kt_kernel does."""

    codes: torch.Tensor
    scales: torch.Tensor
    kt_codes: torch.Tensor
    kt_scales: torch.Tensor


def code_weights(weights: Weights, dtype: str) -> tuple[Weights, dict[str, Coded]]:
    """Returns the weights that the codes stand for, in float32, and the codes."""
    found, values = {}, {}
    for name in PROJECTIONS:
        pairs = [_ENCODERS[dtype](matrix.float()) for matrix in getattr(weights, name)]
        coded = [pair[0] for pair in pairs]
        fields = ("codes", "scales", "kt_codes", "kt_scales")
        found[name] = Coded(*(torch.stack([getattr(c, field) for c in coded]) for field in fields))
        values[name] = torch.stack([pair[1] for pair in pairs])
    gate, up, down = (values[name] for name in PROJECTIONS)
    return replace(weights, gate=gate, up=up, down=down), found


def _fp8(weight: torch.Tensor) -> tuple[Coded, torch.Tensor]:
    n, k = weight.shape
    blocks = weight.view(n // 128, 128, k // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn)
    values = codes.float().view(blocks.shape) * scales[:, None, :, None]
    raw = codes.view(torch.uint8)
    return Coded(raw, scales.repeat_interleave(4, 0), raw, scales), values.view(n, k)


def _int4(weight: torch.Tensor) -> tuple[Coded, torch.Tensor]:
    groups = weight.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
    codes = (groups / scales.float()).round().clamp(-7, 7).to(torch.int8)
    values = codes.float() * scales.float()
    flat = codes.flatten(1)
    coded = Coded(
        _pairs(flat & 15), scales.squeeze(-1), _pairs(flat + 8), scales.squeeze(-1).contiguous()
    )
    return coded, values.flatten(1)


def _mxfp4(weight: torch.Tensor) -> tuple[Coded, torch.Tensor]:
    groups = weight.unflatten(1, (-1, 32))
    exponents = groups.abs().amax(-1, keepdim=True).log2().floor().clamp(-100, 100) - 2
    scaled = groups / exponents.exp2()
    middles = (_E2M1[1:] + _E2M1[:-1]) / 2
    index = torch.bucketize(scaled.abs().contiguous(), middles)
    values = _E2M1[index] * scaled.sign() * exponents.exp2()
    codes = (index + 8 * (scaled < 0)).flatten(1).to(torch.uint8)
    scales = (exponents.squeeze(-1) + 127).to(torch.uint8)
    powers = exponents.squeeze(-1).exp2().bfloat16().contiguous()
    return Coded(_pairs(codes), scales, _pairs(codes), powers), values.flatten(1)


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    """Returns two codes a byte, the first in the low half."""
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


_ENCODERS = {"fp8": _fp8, "int4_g32": _int4, "mxfp4": _mxfp4}
