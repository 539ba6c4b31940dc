"""A Triton kernel that multiplies rows with experts where these lie in the bank. (Copying the
chosen ones first, as torch must, takes 0.4 ms a layer of V2-Lite on an H200.)"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from ktrt.experts.gpu.arithmetic import Rows

_BLOCK_N, _BLOCK_K = 16, 512


@triton.jit
def _product(
    X, XScale, W, WScale, Places, Out, w_e, w_n, N, K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Out [rows, N] = X [rows, K] · W[place]ᵀ, with the scales of rows and weights for CODES, whose
    sums are exact. Nothing is read or written for a place below 0."""
    row = tl.program_id(0)
    place = tl.load(Places + row)
    if place >= 0:
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        begin = W + place * w_e + n[:, None] * w_n
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.int32 if CODES else tl.float32)
        for first in range(0, K, BLOCK_K):
            inside = first + k < K
            x = tl.load(X + row * K + first + k, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(begin + (first + k)[None, :], mask=inside[None, :], other=0)
            if CODES:
                acc += w.to(tl.int32) * x.to(tl.int32)[None, :]
            else:
                acc += w.to(tl.float32) * x[None, :]
        total = tl.sum(acc, 1).to(tl.float32)
        if CODES:
            total *= tl.load(XScale + row) * tl.load(WScale + place * N + n)
        tl.store(Out + row * N + n, total)


def chosen_product(
    rows: Rows, weights: torch.Tensor, scale: torch.Tensor | None, places: torch.Tensor
) -> torch.Tensor:
    """Returns rows [m, 1, k] times the experts at ``places`` [m] of ``weights`` [n, outputs, k],
    float32 [m, 1, outputs]; whatever memory held for a place of -1."""
    coded = rows.codes is not None and rows.scale is not None and scale is not None
    values = rows.codes if coded else rows.values
    assert values is not None
    count, outputs = len(places), weights.shape[1]
    out = torch.empty(count, 1, outputs, device=weights.device)
    _product[count, outputs // _BLOCK_N](
        values.contiguous(), rows.scale if coded else out, weights, scale if coded else out,
        places, out, weights.stride(0), weights.stride(1), outputs, weights.shape[2], _BLOCK_N,
        _BLOCK_K, coded, num_warps=4,
    )  # fmt: skip
    return out
