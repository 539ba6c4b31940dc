"""A Triton kernel of rotary positions."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _rotate(
    x, out, cos, sin, cos_at, second, SIZE: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotates the first ROTATED numbers of a head, copies the others."""
    HALF: tl.constexpr = ROTATED // 2
    at = tl.arange(0, BLOCK)
    rotated = at < HALF
    first = 2 * at if PAIRS else at
    other = first + 1 if PAIRS else first + HALF
    a = tl.load(x + first, mask=rotated, other=0.0).to(tl.float32)
    b = tl.load(x + other, mask=rotated, other=0.0).to(tl.float32)
    c = tl.load(cos + at * cos_at, mask=rotated, other=0.0).to(tl.float32)
    s = tl.load(sin + at * cos_at, mask=rotated, other=0.0).to(tl.float32)
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=rotated)
    c = tl.load(cos + second + at * cos_at, mask=rotated, other=0.0).to(tl.float32)
    s = tl.load(sin + second + at * cos_at, mask=rotated, other=0.0).to(tl.float32)
    tl.store(out + other, (b * c + a * s).to(out.dtype.element_ty), mask=rotated)
    for begin in tl.static_range(ROTATED, SIZE, BLOCK):
        rest = begin + at < SIZE
        tl.store(out + begin + at, tl.load(x + begin + at, mask=rest), mask=rest)


@triton.jit(do_not_specialize=["tokens"])
def rotary_kernel(
    X, Y, OutX, OutY, Cos, Sin, tokens, heads, x_row, x_head, x_token, y_row, y_head, y_token,
    ox_row, ox_head, ox_token, oy_row, oy_head, oy_token, cos_row, cos_token, cos_at, second,
    SIZE: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One head of a token: the first ``heads`` are X's, the others Y's. ``second``: from the first
    half's cosines to the second's."""
    row, token = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens
    head = tl.program_id(1)
    at = row * cos_row + token * cos_token
    if head < heads:
        _rotate(
            X + row * x_row + head * x_head + token * x_token,
            OutX + row * ox_row + head * ox_head + token * ox_token, Cos + at, Sin + at, cos_at,
            second, SIZE, ROTATED, BLOCK, PAIRS,
        )  # fmt: skip
    else:
        head -= heads
        _rotate(
            Y + row * y_row + head * y_head + token * y_token,
            OutY + row * oy_row + head * oy_head + token * oy_token, Cos + at, Sin + at, cos_at,
            second, SIZE, ROTATED, BLOCK, PAIRS,
        )  # fmt: skip
