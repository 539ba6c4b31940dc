"""Triton kernels of grouped experts: products of rows with their experts' matrices, and what comes
after them, so that no array of float32 is written but the last.

A tile is up to M rows of one expert: (its place in the order of rows, first row, rows). Quantised
rows and weights are INT8 codes with scales of their rows, sums int32; else both are bfloat16 and
sums float32. (Weights may be float32 too: Triton's interpreter multiplies no bfloat16.)
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

# float32 numbers up to 2^22 in magnitude lose their fraction when this is added, half to even.
_NO_FRACTION = tl.constexpr(12582912.0)


@triton.jit
def _tile(Tiles, first_tile, first_expert, M: tl.constexpr):
    """The expert's index in the bank, the rows, and which of the M rows there are."""
    place = Tiles + 3 * (first_tile + tl.program_id(1))
    at = tl.arange(0, M)
    expert = (tl.load(place) - first_expert).to(tl.int64)
    return expert, tl.load(place + 1) + at, at < tl.load(place + 2)


@triton.jit
def _finish(
    acc, x_scale, Scales, scale_at, Bias, bias_at, Shrunk, shrunk_at, B, b_at, ranks, live, inside,
    QUANTIZED: tl.constexpr, LORA: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Float32 outputs of integer or float sums: scales, then LoRA, then the bias."""
    if QUANTIZED:
        of_row = tl.load(x_scale, mask=live, other=0.0)
        of_column = tl.load(Scales + scale_at, mask=inside, other=0.0)
        y = (of_row[:, None] * of_column[None, :]) * acc.to(tl.float32)
    else:
        y = acc
    if LORA:
        r = tl.arange(0, 16)
        change = tl.zeros(y.shape, tl.float32)
        for at in range(0, ranks, 16):
            some = at + r < ranks
            s = tl.load(
                Shrunk + shrunk_at[:, None] + (at + r)[None, :],
                mask=live[:, None] & some[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                B + b_at[None, :] + (at + r)[:, None],
                mask=inside[None, :] & some[:, None], other=0.0,
            )  # fmt: skip
            change = tl.dot(s.to(b.dtype), b, change)
        y += change
    if BIASED:
        y += tl.load(Bias + bias_at, mask=inside, other=0.0)[None, :]
    return y


@triton.jit(do_not_specialize=["first_tile", "first_expert", "first_row"])
def gate_up_kernel(
    X, XScales, Tokens, Tiles, W, Scales, Bias, Shrunk, GateB, UpB, Out, first_tile, first_expert,
    first_row, x_row, w_expert, w_row, shrunk_row, gate_ranks, up_ranks, up_first, alpha,
    gate_limit, up_limit, up_offset, K: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, QUANTIZED: tl.constexpr,
    GATE_LORA: tl.constexpr, UP_LORA: tl.constexpr, BIASED: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """g · sigmoid(alpha · g) · (u + up_offset) of gate's and up's outputs g and u, in bfloat16:
    Out [rows, N], from X [tokens, K] at Tokens [rows] and W [experts, 2 N, K]. Shrunk [rows, ranks]
    and Out begin with ``first_row``."""
    expert, rows, live = _tile(Tiles, first_tile, first_expert, M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    token = tl.load(Tokens + rows, mask=live, other=0).to(tl.int64)
    kind: tl.constexpr = tl.int32 if QUANTIZED else tl.float32
    g, u = tl.zeros((M, BLOCK_N), kind), tl.zeros((M, BLOCK_N), kind)
    k = tl.arange(0, BLOCK_K)
    x_at = X + (token * x_row)[:, None] + k[None, :]
    g_at = W + (expert * w_expert + column * w_row)[None, :] + k[:, None]
    u_at = g_at + N * w_row
    for at in range(0, K, BLOCK_K):
        left, right = live[:, None], inside[None, :]
        if K % BLOCK_K:
            left = left & (at + k < K)[None, :]
            right = right & (at + k < K)[:, None]
        a = tl.load(x_at + at, mask=left, other=0)
        if QUANTIZED:
            g = tl.dot(a, tl.load(g_at + at, mask=right, other=0), g, out_dtype=tl.int32)
            u = tl.dot(a, tl.load(u_at + at, mask=right, other=0), u, out_dtype=tl.int32)
        else:
            a = a.to(W.dtype.element_ty)
            g = tl.dot(a, tl.load(g_at + at, mask=right, other=0), g)
            u = tl.dot(a, tl.load(u_at + at, mask=right, other=0), u)
    own = (rows - first_row).to(tl.int64)
    shrunk_at = own * shrunk_row
    at = expert * (2 * N) + column
    gate = _finish(
        g, XScales + token, Scales, at, Bias, at, Shrunk, shrunk_at, GateB,
        (expert * N + column) * gate_ranks, gate_ranks, live, inside, QUANTIZED, GATE_LORA, BIASED,
    )  # fmt: skip
    up = _finish(
        u, XScales + token, Scales, at + N, Bias, at + N, Shrunk, shrunk_at + up_first, UpB,
        (expert * N + column) * up_ranks, up_ranks, live, inside, QUANTIZED, UP_LORA, BIASED,
    )  # fmt: skip
    if LIMITED:
        # NaN passes, as in torch.
        gate = tl.where(gate > gate_limit, gate_limit, gate)
        up = tl.where(up > up_limit, up_limit, tl.where(up < -up_limit, -up_limit, up))
    y = gate / (1.0 + tl.exp(-alpha * gate)) * (up + up_offset)
    tl.store(
        Out + own[:, None] * N + column[None, :], y.to(tl.bfloat16),
        mask=live[:, None] & inside[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_tile", "first_expert", "first_row"])
def product_kernel(
    X, XScales, Tokens, Tiles, W, Scales, Bias, Shrunk, B, Weights, Out, first_tile, first_expert,
    first_row, x_row, w_expert, w_row, shrunk_row, ranks, K: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, QUANTIZED: tl.constexpr,
    LORA: tl.constexpr, BIASED: tl.constexpr, TAKEN: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Out [rows, N] in its dtype, from W [experts, N, K] and X: TAKEN: [tokens, K] at Tokens
    [rows], else [rows, K] from ``first_row`` on, where Out and Shrunk begin. WEIGHTED: times
    Weights [rows]."""
    expert, rows, live = _tile(Tiles, first_tile, first_expert, M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    own = (rows - first_row).to(tl.int64)
    source = own
    if TAKEN:
        source = tl.load(Tokens + rows, mask=live, other=0).to(tl.int64)
    acc = tl.zeros((M, BLOCK_N), tl.int32 if QUANTIZED else tl.float32)
    k = tl.arange(0, BLOCK_K)
    x_at = X + (source * x_row)[:, None] + k[None, :]
    w_at = W + (expert * w_expert + column * w_row)[None, :] + k[:, None]
    for at in range(0, K, BLOCK_K):
        left, right = live[:, None], inside[None, :]
        if K % BLOCK_K:
            left = left & (at + k < K)[None, :]
            right = right & (at + k < K)[:, None]
        a = tl.load(x_at + at, mask=left, other=0)
        b = tl.load(w_at + at, mask=right, other=0)
        if QUANTIZED:  # noqa: SIM108 (a constant: the other branch is not compiled)
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a.to(b.dtype), b, acc)
    at = expert * N + column
    y = _finish(
        acc, XScales + source, Scales, at, Bias, at, Shrunk, own * shrunk_row, B, at * ranks, ranks,
        live, inside, QUANTIZED, LORA, BIASED,
    )  # fmt: skip
    if WEIGHTED:
        y *= tl.load(Weights + rows, mask=live, other=0.0)[:, None]
    tl.store(
        Out + own[:, None] * N + column[None, :], y.to(Out.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )  # fmt: skip


@triton.jit
def quantize_kernel(X, Codes, Scales, reciprocal, K: tl.constexpr, BLOCK: tl.constexpr):
    """``arithmetic._quantize`` of one row of X [rows, K], bfloat16; without fused multiply-adds,
    which would not round the product."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(X + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 0) * reciprocal
    # A maximum may lose NaN.
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    scale = tl.where(broken, float("nan"), scale)
    inverse = tl.div_rn(1.0, scale)
    usable = (inverse > 0) & (inverse < float("inf"))
    codes = tl.where(usable, (x * inverse + _NO_FRACTION) - _NO_FRACTION, 0.0)
    tl.store(Codes + row * K + k, codes.to(tl.int8), mask=k < K)
    tl.store(Scales + row, tl.where(inverse == float("inf"), 0.0, scale))


@triton.jit(do_not_specialize=["first_row", "end"])
def sum_kernel(
    Rows, Places, Total, first_row, end, rows_row, N: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to a token's Total [tokens, N] the rows ``first_row`` … ``end`` - 1 that are its own, in
    the order of its slots: Places [tokens, SLOTS]; Rows [end - first_row, rows_row]."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total, any_row = tl.zeros((BLOCK,), tl.float32), 0
    for slot in range(SLOTS):
        place = tl.load(Places + token * SLOTS + slot)
        here = (place >= first_row) & (place < end)
        at = Rows + (place - first_row).to(tl.int64) * rows_row + n
        total += tl.load(at, mask=here & (n < N), other=0.0)
        any_row += here.to(tl.int32)
    held = Total + token * N + n
    mask = (n < N) & (any_row > 0)
    tl.store(held, tl.load(held, mask=mask, other=0.0) + total, mask=mask)
