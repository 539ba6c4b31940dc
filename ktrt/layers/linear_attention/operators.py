"""The engine's operators for layers with a state, over torch's tensors.

All work on memory that stays: a state is written where it lies, and a recorder of steps gets a
function that reads the same tensors again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ktrt.engine.recording import active
from ktrt.engine.states import LinearAttention, SelectiveScan, ShortConv, TokenArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktrt.engine import Engine


def _array(tensor: torch.Tensor) -> TokenArray:
    """tensor [sequences, tokens, heads, size] or [sequences, tokens, size], whose numbers lie one
    after the other."""
    strides = tensor.stride()
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    head = strides[2] if tensor.ndim == 4 else 0
    return TokenArray(
        tensor.data_ptr(), extent, strides[0], strides[1], head, tensor.dtype == torch.float32
    )


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last numbers one after the other."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _run(
    shape: Sequence[int],
    dtype: torch.dtype,
    reads: Sequence[torch.Tensor | None],
    bind: Callable[[torch.Tensor], Callable[[], None]],
) -> torch.Tensor:
    """Returns what ``bind(out)()`` fills, now and whenever a recorded step runs."""
    held = [each for each in reads if each is not None]
    if (recorder := active()) is not None:
        # The recorder takes the dtype of the first one.
        first = next((each for each in held if each.dtype == dtype), None)
        if first is None:
            first = torch.empty(0, dtype=dtype)
        return recorder.call(shape, (first, *held), bind)
    out = torch.empty(*shape, dtype=dtype)
    bind(out)()
    return out


class Operators:
    """The operators of one engine, made once for each form."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._made: dict[Any, Any] = {}

    def _operator(self, kind: Any, **form: Any) -> Any:
        key = kind, *form.values()
        if key not in self._made:
            self._made[key] = kind(self._engine, **form)
        return self._made[key]

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
        **form: Any,
    ) -> torch.Tensor:
        """query, key [sequences, tokens, key heads, size], value [.., heads, value size], decay
        (its logarithm) [.., heads] or [.., heads, size], beta [.., heads]; changes ``state``
        [sequences, heads, size, value size]. Returns the shape of value."""
        per_key = decay.ndim == 4
        operator = self._operator(
            LinearAttention, heads=value.shape[2], key_heads=key.shape[2], key_size=key.shape[3],
            value_size=value.shape[3], decay_per_key=per_key, **form,
        )  # fmt: skip
        query, key, value = _dense(query), _dense(key), _dense(value)
        decay = _dense(decay) if per_key else decay[..., None]
        beta = None if beta is None else beta[..., None]
        sequences, tokens = value.shape[:2]

        def bind(out: torch.Tensor) -> Callable[[], None]:
            return partial(
                operator.forward, _array(query), _array(key), _array(value), _array(decay),
                None if beta is None else _array(beta), state.data_ptr(), _extent(state),
                state.stride(0), _array(out), sequences, tokens,
            )  # fmt: skip

        return _run(value.shape, dtype, (query, key, value, decay, beta, state), bind)

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor | None,
        *,
        silu: bool,
    ) -> torch.Tensor:
        """x [sequences, channels, tokens], weight [channels, taps], bias [channels], all of one
        dtype; changes ``state`` [sequences, channels, n]. Returns the shape of x."""
        rows = _dense(x.transpose(1, 2))
        sequences, tokens, channels = rows.shape
        operator = self._operator(ShortConv, channels=channels, taps=weight.shape[1], silu=silu)
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()

        def bind(out: torch.Tensor) -> Callable[[], None]:
            return partial(
                operator.forward, _array(rows), _array(weight[None]),
                None if bias is None else _array(bias[None, None]),
                None if state is None else _array(state), 0 if state is None else state.shape[2],
                _array(out), sequences, tokens,
            )  # fmt: skip

        return _run(rows.shape, rows.dtype, (rows, weight, bias, state), bind).transpose(1, 2)

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
        """x, dt, gate [sequences, tokens, channels], a [channels, size], b, c [sequences, tokens,
        size], bias, skip [channels]; changes ``state`` [sequences, channels, size]. Returns the
        shape of x."""
        out = self._scan(x, steps_of(dt, bias, softplus=softplus), a.float(), b, c, state)
        if skip is not None:
            out = out + x.float() * skip.float()
        return (out if gate is None else out * F.silu(gate.float())).to(dtype)

    def _scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        x, dt, b, c, a = _dense(x), _dense(dt), _dense(b), _dense(c), a.contiguous()
        sequences, tokens, channels = x.shape
        operator = self._operator(SelectiveScan, channels=channels, size=a.shape[1])

        def bind(out: torch.Tensor) -> Callable[[], None]:
            return partial(
                operator.forward, _array(x), _array(dt), _array(a[None]), _array(b), _array(c),
                state.data_ptr(), _extent(state), state.stride(0), _array(out), sequences, tokens,
            )  # fmt: skip

        return _run(x.shape, torch.float32, (x, dt, a, b, c, state), bind)


def steps_of(dt: torch.Tensor, bias: torch.Tensor | None, *, softplus: bool) -> torch.Tensor:
    """Mamba's time steps from their projection, float32."""
    steps = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(steps) if softplus else steps


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
