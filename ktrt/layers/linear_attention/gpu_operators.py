"""``operators.Operators`` on a GPU: a Triton kernel for each function of a step, products of
matrices for prompts."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from ktrt.layers.linear_attention.chunks import CHUNK, chunked_delta_rule

# Columns of a state that one warp holds: 32 registers a thread with 128 rows.
_COLUMNS = 8
_CHANNELS = 128


@cache
def available() -> bool:
    """Whether Triton is there, which comes with torch for CUDA."""
    return find_spec("triton") is not None


def _kernels() -> Any:
    from ktrt.layers.linear_attention import kernels

    return kernels


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


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
        per_key, plain = decay.ndim == 4, subtracts and beta is not None
        sequences, tokens, heads, size = value.shape
        if tokens > CHUNK and plain and not per_key and not transposed_state:
            assert beta is not None
            return chunked_delta_rule(
                query, key, value, decay, beta, state, scaling=scaling, unit_keys=unit_keys
            ).to(dtype)
        query, key, value = (_numbers_together(each) for each in (query, key, value))
        decay = _numbers_together(decay) if per_key else decay
        out = torch.empty(sequences, tokens, heads, size, dtype=dtype, device=value.device)
        given = decay if beta is None else beta
        grid = sequences * heads, -(-size // _COLUMNS)
        _kernels().state_kernel[grid](
            query, key, value, decay, given, state, out, tokens, scaling, heads,
            heads // key.shape[2], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            *decay.stride()[:3], *given.stride()[:3], state.stride(0), DK=key.shape[3], DV=size,
            BLOCK_K=_power_of_two(key.shape[3]), BLOCK_V=_COLUMNS, SUBTRACTS=subtracts,
            UNIT=unit_keys, PER_KEY=per_key, BETA=beta is not None, TRANSPOSED=transposed_state,
            num_warps=1,
        )  # fmt: skip
        return out

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor | None,
        *,
        silu: bool,
    ) -> torch.Tensor:
        """As ``Operators.conv``, for one token and with a state."""
        assert state is not None
        sequences, channels = x.shape[:2]
        out = torch.empty(sequences, channels, 1, dtype=x.dtype, device=x.device)
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        grid = -(-channels // _CHANNELS), sequences
        _kernels().conv_kernel[grid](
            x, weight, weight if bias is None else bias, state, out, channels, *x.stride()[:2],
            state.stride(0), HELD=state.shape[2], TAPS=weight.shape[1], SILU=silu,
            BIAS=bias is not None, BLOCK=_CHANNELS,
        )  # fmt: skip
        return out

    def scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """As ``Operators.scan``."""
        sequences, tokens, channels = x.shape
        size, a = a.shape[1], a.contiguous()
        out = torch.empty(sequences, tokens, channels, dtype=torch.float32, device=x.device)
        block = _CHANNELS // 4
        grid = -(-channels // block), sequences
        _kernels().scan_kernel[grid](
            x, dt, a, b, c, state, out, tokens, channels, *x.stride()[:2], *dt.stride()[:2],
            *b.stride()[:2], *c.stride()[:2], state.stride(0), x.stride(2), dt.stride(2),
            b.stride(2), c.stride(2), SIZE=size, BLOCK=block, BLOCK_N=_power_of_two(size),
            num_warps=1,
        )  # fmt: skip
        return out
