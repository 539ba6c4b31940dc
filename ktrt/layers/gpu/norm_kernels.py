"""A Triton kernel of RMSNorm."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    X, Weight, Out, stride, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
    TWICE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Normalises one row of SIZE numbers, ``stride`` from the one before; TWICE: also rounds before
    the product with the weight."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    held = at < SIZE
    x = tl.load(X + row * stride + at, mask=held, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    if WEIGHTED:
        if TWICE:
            x = x.to(Out.dtype.element_ty).to(tl.float32)
        x *= tl.load(Weight + at, mask=held, other=0.0).to(tl.float32) + OFFSET
    tl.store(Out + row * SIZE + at, x.to(Out.dtype.element_ty), mask=held)
