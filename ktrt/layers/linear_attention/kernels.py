"""Triton kernels of layers with a state, for the tokens of a step or a prompt: each program holds
its block of the state in registers while the tokens pass. All sums are float32."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _unit(x):
    return x / tl.sqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _decay(place, Rates, Biases, head, GATED: tl.constexpr, MAMBA: tl.constexpr):
    """The factor of a head's state, and Mamba's time step."""
    step = tl.load(place).to(tl.float32)
    if GATED or MAMBA:
        step = _softplus(step + tl.load(Biases + head).to(tl.float32))
        rate = tl.load(Rates + head).to(tl.float32)
        factor = tl.exp(rate * step) if MAMBA else tl.exp(-tl.exp(rate) * step)
    else:
        factor = tl.exp(step)
    return factor, step


@triton.jit(do_not_specialize=["tokens"])
def state_kernel(
    Q, K, V, G, Beta, State, Out, tokens, scaling, heads, shares, q_s, q_t, q_h, k_s, k_t, k_h,
    v_s, v_t, v_h, g_s, g_t, g_k, g_h, b_s, b_t, b_k, b_h, s_s, Rates, Biases, Skips,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SUBTRACTS: tl.constexpr, UNIT: tl.constexpr, PER_KEY: tl.constexpr, BETA: tl.constexpr,
    TRANSPOSED: tl.constexpr, GATED: tl.constexpr, MAMBA: tl.constexpr,
):  # fmt: skip
    """S = e^g · S; S += k ⊗ beta · (v - kᵀ S); out = scaling · qᵀ S, for BLOCK_V columns of the
    state [DK, DV] of one head. Out: [sequences, tokens, heads, DV]. A head's g and beta lie at its
    key head · g_k + its number there · g_h. GATED: g and beta are what they are computed from, and
    of Rates and Biases [heads]. MAMBA: g is the projection of time steps, which are also beta; the
    values times Skips [heads] are added to out."""
    sequence, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    key_head = head // shares
    share = head - key_head * shares
    row, column = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows, columns = row < DK, column < DV
    if TRANSPOSED:
        place = column[None, :] * DK + row[:, None]
    else:
        place = row[:, None] * DV + column[None, :]
    inside = rows[:, None] & columns[None, :]
    held = State + sequence * s_s + head * DK * DV + place
    state = tl.load(held, mask=inside, other=0.0)
    for t in range(tokens):
        q = tl.load(Q + sequence * q_s + t * q_t + key_head * q_h + row, mask=rows, other=0.0)
        k = tl.load(K + sequence * k_s + t * k_t + key_head * k_h + row, mask=rows, other=0.0)
        v = tl.load(V + sequence * v_s + t * v_t + head * v_h + column, mask=columns, other=0.0)
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        if UNIT:
            q, k = _unit(q), _unit(k)
        decay = G + sequence * g_s + t * g_t + key_head * g_k + share * g_h
        if PER_KEY:
            state *= tl.exp(tl.load(decay + row, mask=rows, other=0.0).to(tl.float32))[:, None]
        else:
            factor, step = _decay(decay, Rates, Biases, head, GATED, MAMBA)
            state *= factor
            if MAMBA:
                skipped = v * tl.load(Skips + head).to(tl.float32)
                v *= step
        if SUBTRACTS:
            v -= tl.sum(state * k[:, None], 0)
        if BETA:
            beta = Beta + sequence * b_s + t * b_t + key_head * b_k + share * b_h
            factor = tl.load(beta).to(tl.float32)
            v *= 1.0 / (1.0 + tl.exp(-factor)) if GATED else factor
        state += k[:, None] * v[None, :]
        out = tl.sum(state * (q * scaling)[:, None], 0)
        if MAMBA:
            out += skipped
        at = ((sequence * tokens + t) * heads + head) * DV + column
        tl.store(Out + at, out.to(Out.dtype.element_ty), mask=columns)
    tl.store(held, state, mask=inside)


@triton.jit
def conv_kernel(
    X, Places, Weight, Bias, State, Out, channels, x_s, x_c, s_s, HELD: tl.constexpr,
    TAPS: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token [sequences, channels] after the HELD last ones in State [sequences][channels,
    HELD], which moves on by one. PLACED: a channel's number lies at Places [channels]. Out:
    [sequences, channels]."""
    sequence = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    place = channel * x_c
    if PLACED:
        place = tl.load(Places + channel, mask=real, other=0)
    x = tl.load(X + sequence * x_s + place, mask=real, other=0.0)
    acc = tl.zeros((BLOCK,), tl.float32)
    if BIAS:
        acc += tl.load(Bias + channel, mask=real, other=0.0).to(tl.float32)
    state = State + sequence * s_s + channel * HELD
    # The tokens of the window, oldest first; the state drops its first one.
    for j in tl.static_range(TAPS - 1 - HELD, TAPS):
        value = x
        if j < TAPS - 1:
            value = tl.load(state + (j + 1 + HELD - TAPS), mask=real, other=0.0)
        if j >= 0:
            weight = tl.load(Weight + channel * TAPS + j, mask=real, other=0.0)
            acc += weight.to(tl.float32) * value.to(tl.float32)
        # No thread may write what another one has yet to read.
        tl.debug_barrier()
        if j >= TAPS - HELD:
            tl.store(state + (j - TAPS + HELD), value, mask=real)
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc))
    tl.store(Out + sequence * channels + channel, acc.to(Out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def scan_kernel(
    X, Dt, A, B, C, Z, Bias, Skip, State, Out, tokens, channels, x_s, x_t, x_c, d_s, d_t, d_c, b_s,
    b_t, b_n, c_s, c_t, c_n, z_s, z_t, z_c, s_s, SIZE: tl.constexpr, SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """S[n] = e^(dt · a[n]) · S[n] + dt · x · b[n]; out = (Σ S[n] · c[n] + skip · x) · SiLU(z), for
    BLOCK channels. Out: [sequences, tokens, channels]."""
    sequence = tl.program_id(1).to(tl.int64)
    channel, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    real, sizes = channel < channels, n < SIZE
    inside = real[:, None] & sizes[None, :]
    place = channel[:, None] * SIZE + n[None, :]
    a = tl.load(A + place, mask=inside, other=0.0)
    held = State + sequence * s_s + place
    state = tl.load(held, mask=inside, other=0.0)
    bias = tl.zeros((BLOCK,), tl.float32)
    if BIAS:
        bias += tl.load(Bias + channel, mask=real, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK,), tl.float32)
    if SKIP:
        skip += tl.load(Skip + channel, mask=real, other=0.0).to(tl.float32)
    for t in range(tokens):
        x = tl.load(X + sequence * x_s + t * x_t + channel * x_c, mask=real, other=0.0)
        dt = tl.load(Dt + sequence * d_s + t * d_t + channel * d_c, mask=real, other=0.0)
        b = tl.load(B + sequence * b_s + t * b_t + n * b_n, mask=sizes, other=0.0).to(tl.float32)
        c = tl.load(C + sequence * c_s + t * c_t + n * c_n, mask=sizes, other=0.0).to(tl.float32)
        x, dt = x.to(tl.float32), dt.to(tl.float32) + bias
        if SOFTPLUS:
            dt = _softplus(dt)
        state = tl.exp(dt[:, None] * a) * state + (dt * x)[:, None] * b[None, :]
        out = tl.sum(state * c[None, :], 1) + skip * x
        if GATE:
            z = tl.load(Z + sequence * z_s + t * z_t + channel * z_c, mask=real, other=0.0)
            z = z.to(tl.float32)
            out *= z / (1.0 + tl.exp(-z))
        at = (sequence * tokens + t) * channels + channel
        tl.store(Out + at, out.to(Out.dtype.element_ty), mask=real)
    tl.store(held, state, mask=inside)


@triton.jit
def gated_norm_kernel(
    X, Gate, Weight, Out, heads, shares, g_s, g_k, g_h, eps, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm of X [sequences, heads, SIZE] times SiLU of its gate, which has the strides of
    ``state_kernel``'s g. Out: as X."""
    sequence, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    key_head, i = head // shares, tl.arange(0, BLOCK)
    real = i < SIZE
    at = (sequence * heads + head) * SIZE + i
    x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    gate = Gate + sequence * g_s + key_head * g_k + (head - key_head * shares) * g_h
    gate = tl.load(gate + i, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(Weight + i, mask=real, other=0.0).to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, 0) / SIZE + eps) * weight * gate / (1.0 + tl.exp(-gate))
    tl.store(Out + at, x.to(Out.dtype.element_ty), mask=real)
