"""A decode step of a layer with the gated delta rule on a GPU: three kernels between its
projections instead of thirty, which in a CUDA graph take 2 µs each, whatever they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.layers.linear_attention.gpu_operators import CHANNELS, COLUMNS, kernels, power_of_two

if TYPE_CHECKING:
    from collections.abc import Callable

_SILU = ("silu", "swish")


def has_step(module: Any) -> bool:
    """Whether a layer computes what ``DeltaRuleStep`` does."""
    norm = getattr(module, "norm", None)
    inputs = hasattr(module, "in_proj_qkvz") or hasattr(module, "in_proj_qkv")
    return (
        inputs
        and hasattr(module, "dt_bias")
        and type(norm).__name__.endswith("RMSNormGated")
        and getattr(norm, "activation", None) in _SILU
        and module.activation in _SILU
        and module.conv1d.weight.dtype == torch.bfloat16
    )


@dataclass(frozen=True)
class _Projected:
    """A token's projections [rows, …]: ``x`` for the convolution; gate, b and a of head h lie at
    its key head · the first stride + its number there · the second."""

    x: torch.Tensor
    gate: torch.Tensor
    gate_strides: tuple[int, int]
    b: torch.Tensor
    a: torch.Tensor
    strides: tuple[int, int]


class DeltaRuleStep:
    """The forward of such a layer: kernels for one token after a state, else ``plain``."""

    def __init__(self, module: Any, plain: Callable[..., torch.Tensor]) -> None:
        self._module, self._plain = module, plain
        self._heads, self._key_heads = module.num_v_heads, module.num_k_heads
        self._shares = self._heads // self._key_heads
        self._size, self._value_size = module.head_k_dim, module.head_v_dim
        self._places = self._find_places() if hasattr(module, "in_proj_qkvz") else None

    def _find_places(self) -> torch.Tensor:
        """Where the channels of the convolution, all queries, keys, values, lie among projections
        that belong together by key head."""
        size, values = self._size, self._shares * self._value_size
        group = 2 * size + 2 * values
        at = torch.arange(self._key_heads * group, dtype=torch.int32).view(self._key_heads, group)
        parts = at[:, :size], at[:, size : 2 * size], at[:, 2 * size : 2 * size + values]
        places = torch.cat([part.reshape(-1) for part in parts])
        return places.to(self._module.conv1d.weight.device)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        states = None
        if attention_mask is None and hidden_states.shape[1] == 1 and cache is not None:
            states = self._states(hidden_states, cache)
        if states is None:
            return self._plain(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        return self._step(hidden_states, *states)

    def _states(
        self, hidden_states: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The states to change in place; None: the kernels cannot."""
        index = self._module.layer_idx
        conv, recurrent = cache.get_conv_state(index), cache.get_recurrent_state(index)
        usable = (
            conv is not None
            and recurrent is not None
            and not cache.is_recording_past(index)
            and hidden_states.dtype == conv.dtype == torch.bfloat16
            and recurrent.dtype == torch.float32
            and conv[0].is_contiguous()
            and recurrent[0].is_contiguous()
        )
        return (conv, recurrent) if usable else None

    def _project(self, hidden_states: torch.Tensor) -> _Projected:
        module, size = self._module, self._value_size
        if self._places is None:
            x, gate, b, a = (
                getattr(module, f"in_proj_{name}")(hidden_states)[:, 0]
                for name in ("qkv", "z", "b", "a")
            )
            return _Projected(x, gate, (self._shares * size, size), b, a, (self._shares, 1))
        x, numbers = (
            getattr(module, f"in_proj_{name}")(hidden_states)[:, 0] for name in ("qkvz", "ba")
        )
        first = 2 * self._size + self._shares * size
        group = first + self._shares * size
        strides = 2 * self._shares, 1
        return _Projected(
            x, x[:, first:], (group, size), numbers, numbers[:, self._shares :], strides
        )

    def _step(
        self, hidden_states: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        module, run, rows = self._module, kernels(), len(hidden_states)
        given = self._project(hidden_states)
        weight, bias, channels = module.conv1d.weight, module.conv1d.bias, conv.shape[1]
        mixed = torch.empty(rows, channels, dtype=torch.bfloat16, device=conv.device)
        run.conv_kernel[-(-channels // CHANNELS), rows](
            given.x, given.x if self._places is None else self._places, weight,
            weight if bias is None else bias, conv, mixed, channels, given.x.stride(0), 1,
            conv.stride(0), HELD=conv.shape[2], TAPS=weight.shape[2], SILU=True,
            BIAS=bias is not None, PLACED=self._places is not None, BLOCK=CHANNELS,
        )  # fmt: skip
        heads, size, keys = self._heads, self._size, self._key_heads * self._size
        out = torch.empty(rows, heads, self._value_size, dtype=torch.float32, device=conv.device)
        run.state_kernel[rows * heads, -(-self._value_size // COLUMNS)](
            mixed, mixed[:, keys:], mixed[:, 2 * keys :], given.a, given.b, state, out, 1,
            size**-0.5, heads, self._shares, channels, 0, size, channels, 0, size, channels, 0,
            self._value_size, given.a.stride(0), 0, *given.strides, given.b.stride(0), 0,
            *given.strides, state.stride(0), module.A_log, module.dt_bias, module.dt_bias, DK=size,
            DV=self._value_size, BLOCK_K=power_of_two(size), BLOCK_V=COLUMNS, SUBTRACTS=True,
            UNIT=True, PER_KEY=False, BETA=True, TRANSPOSED=False, GATED=True, MAMBA=False,
            num_warps=1,
        )  # fmt: skip
        normed = torch.empty(
            rows, 1, heads * self._value_size, dtype=torch.bfloat16, device=conv.device
        )
        run.gated_norm_kernel[(rows * heads,)](
            out, given.gate, module.norm.weight, normed, heads, self._shares, given.gate.stride(0),
            *given.gate_strides, module.norm.variance_epsilon, SIZE=self._value_size,
            BLOCK=power_of_two(self._value_size), num_warps=1,
        )  # fmt: skip
        projected: torch.Tensor = module.out_proj(normed)
        return projected
