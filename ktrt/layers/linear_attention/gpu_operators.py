"""``operators.Operators`` on a GPU: a Triton kernel for each function, which takes a step's token
or all tokens of a prompt. On an H200 a layer of 32 heads of 128 × 128 takes 4 µs for one token and
0.7 ms for 512; chunks as products of matrices in torch took 6.6 ms for 4,096."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

# Columns of a state that one warp holds: 32 registers a thread with 128 rows.
COLUMNS = 8
CHANNELS = 128


@cache
def available() -> bool:
    """Whether Triton is there, which comes with torch for CUDA."""
    return find_spec("triton") is not None


def kernels() -> Any:
    """The module of kernels, which imports Triton."""
    from ktrt.layers.linear_attention import kernels as module

    return module


def power_of_two(number: int) -> int:
    """The next one that is no smaller."""
    return 1 << max(number - 1, 0).bit_length()


def _by_key_head(strides: Sequence[int], shares: int) -> tuple[int, int, int, int]:
    """Strides of sequences, tokens, key heads, and the heads that share one."""
    return strides[0], strides[1], strides[2] * shares, strides[2]


def _numbers_together(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class GpuOperators:
    """Operators that keep no memory."""

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor | None,
        state: torch.Tensor,
        *,
        dtype: torch.dtype,
        scaling: float,
        subtracts: bool,
        unit_keys: bool,
        transposed_state: bool,
    ) -> torch.Tensor:
        """As ``Operators.attention``."""
        per_key = decay.ndim == 4
        sequences, tokens, heads, size = value.shape
        query, key, value = (_numbers_together(each) for each in (query, key, value))
        decay = _numbers_together(decay) if per_key else decay
        out = torch.empty(sequences, tokens, heads, size, dtype=dtype, device=value.device)
        given = decay if beta is None else beta
        shares = heads // key.shape[2]
        kernels().state_kernel[sequences * heads, -(-size // COLUMNS)](
            query, key, value, decay, given, state, out, tokens, scaling, heads, shares,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            *_by_key_head(decay.stride(), shares), *_by_key_head(given.stride(), shares),
            state.stride(0), decay, decay, decay, DK=key.shape[3], DV=size,
            BLOCK_K=power_of_two(key.shape[3]), BLOCK_V=COLUMNS, SUBTRACTS=subtracts,
            UNIT=unit_keys, PER_KEY=per_key, BETA=beta is not None, TRANSPOSED=transposed_state,
            GATED=False, MAMBA=False, num_warps=1,
        )  # fmt: skip
        return out

    def mamba2_step(
        self,
        state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """x [rows, heads, head size], dt [rows, heads] before its softplus, a, skip, bias [heads],
        b, c [rows, groups, size]; changes ``state`` [rows, heads, head size, size]. Returns the
        shape of x."""
        x, b, c = (_numbers_together(each) for each in (x, b, c))
        rows, heads, size = x.shape
        shares, keys = heads // b.shape[1], b.shape[2]
        given = [each.contiguous() for each in (a, bias, skip)]
        out = torch.empty(rows, 1, heads, size, dtype=x.dtype, device=x.device)
        strides = dt.stride(0), 0, dt.stride(1) * shares, dt.stride(1)
        kernels().state_kernel[rows * heads, -(-size // COLUMNS)](
            c, b, x, dt, dt, state, out, 1, 1.0, heads, shares, c.stride(0), 0, c.stride(1),
            b.stride(0), 0, b.stride(1), x.stride(0), 0, x.stride(1), *strides, *strides,
            state.stride(0), *given, DK=keys, DV=size, BLOCK_K=power_of_two(keys), BLOCK_V=COLUMNS,
            SUBTRACTS=False, UNIT=False, PER_KEY=False, BETA=False, TRANSPOSED=True, GATED=False,
            MAMBA=True, num_warps=1,
        )  # fmt: skip
        return out[:, 0]

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor | None,
        *,
        silu: bool,
    ) -> torch.Tensor:
        """As ``Operators.conv``, of one token where there is a state."""
        if state is None:
            taps, tokens = weight.shape[1], x.shape[2]
            found = F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=x.shape[1])
            return F.silu(found[:, :, :tokens]) if silu else found[:, :, :tokens]
        sequences, channels = x.shape[:2]
        out = torch.empty(sequences, channels, 1, dtype=x.dtype, device=x.device)
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        grid = -(-channels // CHANNELS), sequences
        kernels().conv_kernel[grid](
            x, x, weight, weight if bias is None else bias, state, out, channels, *x.stride()[:2],
            state.stride(0), HELD=state.shape[2], TAPS=weight.shape[1], SILU=silu,
            BIAS=bias is not None, PLACED=False, BLOCK=CHANNELS,
        )  # fmt: skip
        return out

    def mamba(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        state: torch.Tensor,
        *,
        dtype: torch.dtype,
        softplus: bool,
        bias: torch.Tensor | None,
        skip: torch.Tensor | None,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """As ``Operators.mamba``."""
        sequences, tokens, channels = x.shape
        size, a = a.shape[1], a.float().contiguous()
        out = torch.empty(sequences, tokens, channels, dtype=dtype, device=x.device)
        block = CHANNELS // 4
        z = x if gate is None else gate
        kernels().scan_kernel[-(-channels // block), sequences](
            x, dt, a, b, c, z, a if bias is None else bias, a if skip is None else skip, state, out,
            tokens, channels, *x.stride(), *dt.stride(), *b.stride(), *c.stride(), *z.stride(),
            state.stride(0), SIZE=size, SOFTPLUS=softplus, BIAS=bias is not None,
            SKIP=skip is not None, GATE=gate is not None, BLOCK=block, BLOCK_N=power_of_two(size),
            num_warps=1,
        )  # fmt: skip
        return out
