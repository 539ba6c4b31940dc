"""Stand-ins for transformers' functions: the engine's operators on the CPU, Triton's on a GPU, and
the original for everything else. They take and return what the originals do, but a state that is
given and asked for is changed where it lies, as the caller's cache would do next.
"""

from __future__ import annotations

from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ktrt.layers.linear_attention import gpu_operators
from ktrt.layers.linear_attention.gpu_operators import GpuOperators
from ktrt.layers.linear_attention.operators import Operators, steps_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine import Engine

_SILU = ("silu", "swish")
_DTYPES = (torch.bfloat16, torch.float32)
# The engine's limits, see csrc/linear_attention.
_MOST_NUMBERS, _MOST_TAPS = 256, 16


class Functions:
    """The stand-ins for one engine."""

    def __init__(self, engine: Engine) -> None:
        self.operators: dict[str, Operators | GpuOperators] = {
            "cpu": Operators(engine), "cuda": GpuOperators(),
        }  # fmt: skip
        self._functions: dict[str, Callable[..., Any]] = {
            "causal_conv1d_fn": self._conv,
            "causal_conv1d_update": self._conv_update,
            "torch_chunk_gated_delta_rule": self._delta_rule,
            "torch_recurrent_gated_delta_rule": self._delta_rule,
            "chunk_kimi_delta_attention": self._delta_rule,
            "recurrent_kimi_delta_attention": self._delta_rule,
            "mamba_selective_scan": self._mamba_scan,
            "mamba_selective_state_update": self._mamba_update,
            "mamba2_chunk_scan": self._mamba2_scan,
            "mamba2_selective_state_update": self._mamba2_update,
        }

    def function(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the stand-in for the function of this name."""
        return partial(self._functions[name], original)

    def _conv(
        self,
        original: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        where = _device(hidden_states, weight, bias)
        usual = kwargs.get("seq_idx") is None and _is_conv(hidden_states, weight, bias, activation)
        if where is not None and usual:
            return self.operators[where].conv(
                hidden_states, weight, bias, None, silu=activation is not None
            )
        found: torch.Tensor = original(hidden_states, weight, bias, activation=activation, **kwargs)
        return found

    def _conv_update(
        self,
        original: Any,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        where = _device(hidden_states, conv_state, weight, bias)
        if (
            where is not None
            and (where == "cpu" or hidden_states.shape[2] == 1)
            and _is_conv(hidden_states, weight, bias, activation)
            and conv_state.dtype == hidden_states.dtype
            and conv_state[0].is_contiguous()
            and weight.shape[1] - 1 <= conv_state.shape[2] <= _MOST_TAPS
        ):
            return self.operators[where].conv(
                hidden_states, weight, bias, conv_state, silu=activation is not None
            )
        found: torch.Tensor = original(hidden_states, conv_state, weight, bias, activation)
        return found

    def _delta_rule(
        self,
        original: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *args: Any,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        size, value_size = key.shape[-1], value.shape[-1]
        where = _device(query, key, value, g, beta, initial_state)
        if (
            where is None
            or args
            or kwargs.get("cu_seqlens") is not None
            or max(size, value_size) > _MOST_NUMBERS
            or (where == "cuda" and query.shape[1] > 1 and _has_fla())
        ):
            found: tuple[torch.Tensor, torch.Tensor | None] = original(
                query, key, value, g, beta, *args, initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
            return found
        shape = value.shape[0], value.shape[2], size, value_size
        state = _state(initial_state, shape, query.device, keep=output_final_state)
        out = self.operators[where].attention(
            query, key, value, g, beta, state, dtype=query.dtype, scaling=size**-0.5,
            subtracts=True, unit_keys=use_qk_l2norm_in_kernel, transposed_state=False,
        )  # fmt: skip
        return out, state if output_final_state else None

    def _mamba_scan(
        self,
        original: Any,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        *,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        where = _device(hidden_states, dt, A, B, C, D, z, delta_bias)
        if where is None or B.ndim != 3:
            return original(
                hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias,
                delta_softplus=delta_softplus, return_last_state=return_last_state, **kwargs,
            )  # fmt: skip
        x = hidden_states.transpose(1, 2)
        state = torch.zeros(x.shape[0], *A.shape, dtype=torch.float32, device=x.device)
        out = self.operators[where].mamba(
            x, dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), state,
            dtype=torch.float32, softplus=delta_softplus, bias=delta_bias, skip=D,
            gate=None if z is None else z.transpose(1, 2),
        ).transpose(1, 2)  # fmt: skip
        return (out, state) if return_last_state else out

    def _mamba_update(
        self,
        original: Any,
        state: torch.Tensor,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        *,
        dt_softplus: bool = False,
        z: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        where = _device(state, hidden_states, dt, A, B, C, D, dt_bias, z)
        if where is None or not _is_state(state):
            found: torch.Tensor = original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus,
                z=z, **kwargs,
            )  # fmt: skip
            return found
        out = self.operators[where].mamba(
            hidden_states[:, None], dt[:, None], A, B[:, None], C[:, None], state,
            dtype=hidden_states.dtype, softplus=dt_softplus, bias=dt_bias, skip=D,
            gate=None if z is None else z[:, None],
        )  # fmt: skip
        return out[:, 0]

    def _mamba2_scan(
        self,
        original: Any,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        *,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        where = _device(hidden_states, dt, A, B, C, D, dt_bias, initial_states)
        sizes = hidden_states.shape[-1], B.shape[-1]
        unusual = kwargs.get("z") is not None or kwargs.get("seq_idx") is not None
        # The original has no loop over tokens: on a GPU it is left to prompts.
        if unusual or where != "cpu" or max(sizes) > _MOST_NUMBERS:
            return original(
                hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias,
                initial_states=initial_states, dt_softplus=dt_softplus, dt_limit=dt_limit,
                return_final_states=return_final_states, **kwargs,
            )  # fmt: skip
        steps = steps_of(dt, dt_bias, softplus=dt_softplus).clamp(*dt_limit)
        shape = hidden_states.shape[0], *hidden_states.shape[2:], sizes[1]
        state = _state(initial_states, shape, hidden_states.device, keep=return_final_states)
        out = self._state_space(hidden_states, steps, A, B, C, D, state)
        return (out, state) if return_final_states else out

    def _mamba2_update(
        self,
        original: Any,
        state: torch.Tensor,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        *,
        dt_softplus: bool = False,
        z: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # One number per head, repeated by `expand`.
        by_head = [(dt, 2), (A, 1), *((each, 1) for each in (D, dt_bias) if each is not None)]
        repeated = all(not any(each.stride()[first:]) for each, first in by_head)
        where = _device(state, hidden_states, dt, A, B, C, D, dt_bias)
        if z is not None or not repeated or where is None or not _is_state(state):
            found: torch.Tensor = original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus,
                z=z, **kwargs,
            )  # fmt: skip
            return found
        operators = self.operators[where]
        if isinstance(operators, GpuOperators) and dt_softplus and D is not None:
            biases = dt_bias[:, 0] if dt_bias is not None else torch.zeros_like(A[:, 0, 0])
            return operators.mamba2_step(
                state, hidden_states, dt[..., 0], A[:, 0, 0], B, C, D[:, 0], biases
            )
        bias = None if dt_bias is None else dt_bias[:, 0]
        steps = steps_of(dt[..., 0], bias, softplus=dt_softplus)
        skip = None if D is None else D[:, 0]
        one = hidden_states[:, None]
        out = self._state_space(
            one, steps[:, None], A[:, 0, 0], B[:, None], C[:, None], skip, state
        )
        return out[:, 0].to(hidden_states.dtype)

    def _state_space(
        self,
        x: torch.Tensor,
        steps: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor | None,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """Mamba 2 as linear attention: x are values, b keys, c queries; float32."""
        out = self.operators[x.device.type].attention(
            c, b, x, steps * a.float(), steps, state, dtype=torch.float32, scaling=1.0,
            subtracts=False, unit_keys=False, transposed_state=True,
        )  # fmt: skip
        return out if skip is None else out + x.float() * skip.float()[:, None]


def _is_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> bool:
    return (
        (activation is None or activation in _SILU)
        and all(each is None or each.dtype == x.dtype for each in (weight, bias))
        and weight.shape[1] <= _MOST_TAPS
    )


def _device(*tensors: torch.Tensor | None) -> str | None:
    """The kind of device whose operators read these tensors; None: the original has to."""
    given = [each for each in tensors if each is not None]
    gradients = torch.is_grad_enabled()
    if any(each.dtype not in _DTYPES or (gradients and each.requires_grad) for each in given):
        return None
    devices = {each.device for each in given}
    kind = devices.pop().type
    if devices or (kind == "cuda" and not gpu_operators.available()):
        return None
    return kind if kind in ("cpu", "cuda") else None


@cache
def _has_fla() -> bool:
    """Whether transformers' functions are flash-linear-attention's."""
    return find_spec("fla") is not None


def _is_state(state: torch.Tensor) -> bool:
    """Whether operators can write to a state [sequences, …] where it lies."""
    return state.dtype == torch.float32 and state.shape[0] > 0 and state[0].is_contiguous()


def _state(
    given: torch.Tensor | None, shape: tuple[int, ...], device: torch.device, *, keep: bool
) -> torch.Tensor:
    """The state to change: the given one, or a copy where the caller keeps it as it is (``keep``
    false) or its memory is of another kind."""
    if given is None:
        return torch.zeros(shape, dtype=torch.float32, device=device)
    if keep and _is_state(given):
        return given
    return given.float().contiguous().clone()
