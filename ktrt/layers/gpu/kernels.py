"""Triton kernels of attention: flash-decoding, which splits the context, and prefill.

A key is a part of ``D`` numbers and one of ``D2`` (0: none) from another place: head sizes that are
no power of two, or positions next to latents. ``SHARED``: the keys' first part is the values too.
Position p lies at row p, or at row p % ring. Exponentials are powers of two, scores and sums
float32.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, places, seen, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Loads rows ``places`` [n], SIZE numbers each, as [n, BLOCK]; zeros where not ``seen``."""
    at = tl.arange(0, BLOCK)
    wanted = seen[:, None]
    if SIZE != BLOCK:
        wanted = wanted & (at < SIZE)[None, :]
    return tl.load(pointer + places[:, None] * stride + at[None, :], mask=wanted, other=0.0)


@triton.jit
def _over_keys(
    acc, best, total, q, q2, K, K2, V, k_at, k2_at, v_at, begin, stop, ends, scaling, softcap,
    window, ring, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_V: tl.constexpr, SHARED: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds positions ``begin`` … ``stop`` - 1 to the sums of queries that see those before their
    ``ends``. Without MASKED all of them are seen, in whole blocks."""
    for at in range(begin, stop, N):
        n = at + tl.arange(0, N)
        held = n < stop
        places = (n % ring if RING else n).to(tl.int64)
        k = _tile(K, places, held, k_at, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if D2 > 0:
            k2 = _tile(K2, places, held, k2_at, D2, BLOCK_D2)
            s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
        s *= scaling
        if SOFTCAP:
            s = (softcap * _LOG2E) * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))
        if MASKED:
            seen = held[None, :] & (n[None, :] < ends[:, None])
            if WINDOW:
                seen = seen & (n[None, :] >= (ends - window)[:, None])
            s = tl.where(seen, s, float("-inf"))
        after = tl.maximum(best, tl.max(s, 1))
        base = tl.where(after == float("-inf"), 0.0, after)
        p = tl.exp2(s - base[:, None])
        factor = tl.exp2(best - base)
        total = total * factor + tl.sum(p, 1)
        v = k if SHARED else _tile(V, places, held, v_at, DV, BLOCK_V)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
        best = after
    return acc, best, total


# Arguments that differ from call to call make no further variants.
@triton.jit(do_not_specialize=["window", "ring", "tokens", "splits"])
def decode_kernel(
    Q, Q2, K, K2, V, Lengths, Slots, Sinks, Out, Partial, Sums, scaling, softcap, window, ring,
    tokens, heads, groups, splits, q_row, q_head, q_token, q2_row, q2_head, q2_token, k_row,
    k_group, k_at, k2_row, k2_group, k2_at, v_row, v_group, v_at, D: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, BLOCK_V: tl.constexpr, SHARED: tl.constexpr, SINGLE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """One split of the context of one row and group, for M of its tokens · heads. Keys and values
    lie at its row or, PICKED, at its ``Slots`` [rows].

    Writes ``Out`` [rows, tokens, groups · heads, DV] where there is one split; else its share,
    normalised, to ``Partial`` [rows, tokens, groups · heads, splits, DV] and the logarithm of its
    weight to ``Sums``: -inf, and no share, where the row is too short for the split.
    """
    row, group = (tl.program_id(2) // groups).to(tl.int64), tl.program_id(2) % groups
    length, split = tl.load(Lengths + row).to(tl.int32), tl.program_id(1)
    m = tl.program_id(0) * M + tl.arange(0, M)
    token, head = m // heads, m % heads
    real = m < tokens * heads
    ends = length - tokens + 1 + token
    start = 0
    if WINDOW:
        start = tl.maximum(length - tokens + 1 + tl.program_id(0) * M // heads - window, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(length - start, 0), splits), N) * N
    begin = start + split * share
    stop = tl.minimum(begin + share, length)
    places = (row * tokens + token) * groups * heads + group * heads + head
    if not SINGLE:  # noqa: SIM102 (Triton compiles no `and` of a constant and a number)
        if begin >= stop:
            nothing = tl.full((M,), float("-inf"), tl.float32)
            tl.store(Sums + places * splits + split, nothing, mask=real)
            return
    group = group.to(tl.int64)
    slot = tl.load(Slots + row).to(tl.int64) if PICKED else row
    heads_of = group * heads + head
    q = _tile(Q + row * q_row, heads_of * q_head + token * q_token, real, 1, D, BLOCK_D)
    q2 = q
    if D2 > 0:
        at = heads_of * q2_head + token * q2_token
        q2 = _tile(Q2 + row * q2_row, at, real, 1, D2, BLOCK_D2)
    acc, best, total = _over_keys(
        tl.zeros((M, BLOCK_V), tl.float32), tl.full((M,), float("-inf"), tl.float32),
        tl.zeros((M,), tl.float32), q, q2, K + slot * k_row + group * k_group,
        K2 + slot * k2_row + group * k2_group, V + slot * v_row + group * v_group, k_at, k2_at,
        v_at, begin, stop, ends, scaling, softcap, window, ring, D, D2, DV, N, BLOCK_D, BLOCK_D2,
        BLOCK_V, SHARED, SOFTCAP, WINDOW, RING, True, PRECISION,
    )  # fmt: skip
    if SINGLE:
        if SINKS:
            best, total, acc = _with_sinks(Sinks, heads_of, real, best, total, acc)
    else:
        tl.store(Sums + places * splits + split, best + tl.log2(total), mask=real)
        Out, places = Partial, places * splits + split
    _store(Out, places, real, DV, acc, total, DV, BLOCK_V)


@triton.jit
def _with_sinks(Sinks, heads, real, best, total, acc):
    """Adds a score without a value for each head."""
    sinks = tl.load(Sinks + heads, mask=real, other=float("-inf")).to(tl.float32) * _LOG2E
    after = tl.maximum(best, sinks)
    base = tl.where(after == float("-inf"), 0.0, after)
    factor = tl.exp2(best - base)
    return after, total * factor + tl.exp2(sinks - base), acc * factor[:, None]


@triton.jit
def _store(Out, places, real, stride, acc, total, DV: tl.constexpr, BLOCK_V: tl.constexpr):
    """Stores normalised sums at rows ``places``; zeros for a query that has seen nothing."""
    at = tl.arange(0, BLOCK_V)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    wanted = real[:, None] & (at < DV)[None, :]
    where = Out + places.to(tl.int64)[:, None] * stride + at[None, :]
    tl.store(where, out.to(Out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    Partial, Sums, Sinks, Out, splits, heads, DV: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merges the splits' shares of one query's head, BLOCK of its values."""
    query = tl.program_id(0).to(tl.int64)
    split, at = tl.arange(0, SPLITS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(Sums + query * splits + split, mask=split < splits, other=float("-inf"))
    best = tl.max(sums, 0)
    sink = float("-inf")
    if SINKS:
        sink = tl.load(Sinks + query % heads).to(tl.float32) * _LOG2E
        best = tl.maximum(best, sink)
    base = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp2(sums - base)
    total = tl.sum(weights, 0)
    if SINKS:
        total += tl.exp2(sink - base)
    wanted = (sums > float("-inf"))[:, None] & (at < DV)[None, :]
    where = Partial + (query * splits + split)[:, None] * DV + at[None, :]
    out = tl.sum(tl.load(where, mask=wanted, other=0.0) * weights[:, None], 0)
    out = out / tl.where(total > 0, total, 1.0)
    tl.store(Out + query * DV + at, out.to(Out.dtype.element_ty), mask=at < DV)


@triton.jit(do_not_specialize=["window", "queries", "keys"])
def prefill_kernel(
    Q, Q2, K, K2, V, Sinks, Out, scaling, softcap, window, queries, keys, heads, q_row,
    q_head, q_token, q2_row, q2_head, q2_token, k_row, k_group, k_at, k2_row, k2_group, k2_at,
    v_row, v_group, v_at, o_row, o_head, o_token, D: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M queries of one head, which are among the last ``queries`` of ``keys`` positions; the
    longest ones start first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = head // heads
    m = tile * M + tl.arange(0, M)
    real, ends = m < queries, keys - queries + 1 + m
    q = _tile(Q + row * q_row + head * q_head, m.to(tl.int64), real, q_token, D, BLOCK_D)
    q2 = q
    if D2 > 0:
        q2 = _tile(Q2 + row * q2_row + head * q2_head, m.to(tl.int64), real, q2_token, D2, BLOCK_D2)
    k, k2 = K + row * k_row + group * k_group, K2 + row * k2_row + group * k2_group
    v = V + row * v_row + group * v_group
    # Blocks that every query sees whole need no mask; those around a window's edges do.
    first = keys - queries + tile * M
    stop, begin, inner = tl.minimum(first + M, keys), 0, 0
    whole = (first + 1) // N * N
    if WINDOW:
        begin = tl.maximum(first + 1 - window, 0) // N * N
        inner = tl.minimum(tl.cdiv(tl.maximum(first + M - window, 0), N) * N, stop)
        whole = tl.maximum(whole, inner)
    acc, best = tl.zeros((M, BLOCK_V), tl.float32), tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for phase in tl.static_range(0 if WINDOW else 1, 3):
        low = begin if phase == 0 else (inner if phase == 1 else whole)
        high = inner if phase == 0 else (whole if phase == 1 else stop)
        acc, best, total = _over_keys(
            acc, best, total, q, q2, k, k2, v, k_at, k2_at, v_at, low, high, ends, scaling, softcap,
            window, 0, D, D2, DV, N, BLOCK_D, BLOCK_D2, BLOCK_V, False, SOFTCAP, WINDOW, False,
            phase != 1, PRECISION,
        )  # fmt: skip
    if SINKS:
        heads_of = head + tl.zeros((M,), tl.int64)
        best, total, acc = _with_sinks(Sinks, heads_of, real, best, total, acc)
    _store(Out + row * o_row + head * o_head, m, real, o_token, acc, total, DV, BLOCK_V)
