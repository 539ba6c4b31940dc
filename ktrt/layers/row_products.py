"""Operations on rows whose bits do not depend on the number of rows, on the CPU.

torch chooses its kernels and their blocks by the number of rows, so a token's last bits would
depend on the tokens next to it. The products that no engine linear computes (routers, models in
float32) run in the engine too: in float32 sums of one order. float16 stays torch's.

Functions such as SiLU are torch's, whose vectors and whose single numbers at the end of a thread's
share differ in the last bit; here no share ends within a vector.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
)

from ktrt.engine import RowProducts
from ktrt.engine.recording import VECTOR, active
from ktrt.layers.around import Around

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from ktrt.engine import Engine
    from ktrt.utils.patches import Patches

# With AMX, torch computes from this many rows on where it has all threads and all rows the same
# adapter: its tiles need no copy of the rows. Elsewhere, and with fixed kernels, one
# kernel takes all rows, so a row's bits do not depend on the others.
_AMX_ROWS = 16

_LINEAR = torch.nn.functional.linear
_MATMUL: set[Any] = {
    torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__,
}  # fmt: skip


# Functions of single numbers that vectors compute in another way.
_FUNCTIONS: set[Any] = {
    torch.nn.functional.silu, torch.nn.functional.gelu, torch.nn.functional.softplus,
    torch.sigmoid, torch.Tensor.sigmoid, torch.tanh, torch.Tensor.tanh, torch.exp, torch.Tensor.exp,
    torch.cos, torch.Tensor.cos, torch.sin, torch.Tensor.sin,
}  # fmt: skip
# Numbers that torch leaves to one thread. More are shared by as many threads as then have this many
# each; GELU's by all threads.
_GRAIN = 32768
_GELU_GRAIN = 16384


def torch_rows(engine: Engine) -> int:
    """Returns the number of rows from which on torch computes BF16 products."""
    return sys.maxsize if engine.fixed_kernels else _AMX_ROWS


def has_one_thread() -> bool:
    """Returns whether torch computes on one thread, as in decode steps: the engine, on all of
    them, is faster for any number of rows then."""
    return active() is not None or torch.get_num_threads() == 1


def use_row_products(model: nn.Module, engine: Engine, patches: Patches) -> None:
    """Has the forwards of ``model``, on the CPU, compute their products by ``FixedProducts``."""
    products = FixedProducts(engine)

    @contextmanager
    def within(*_: object) -> Iterator[None]:
        # An interrupt within the mode's own enter or exit leaves it on the stack, from where it
        # must go too.
        outer = len(_get_current_function_mode_stack())
        try:
            with products:
                yield
        finally:
            while len(_get_current_function_mode_stack()) > outer:
                _pop_mode()

    patches.set(model, "forward", Around(model.forward, within))
    # Others may have wrapped this forward and call it for ever: without the engine from now on.
    patches.add(products.end)


class FixedProducts(TorchFunctionMode):
    """Within the block, the engine computes x · Wᵀ + bias of BF16 and float32 tensors on the CPU
    without gradients, where W is a matrix."""

    def __init__(self, engine: Engine) -> None:
        self._products = RowProducts(engine)
        self._bf16_rows = torch_rows(engine)
        self._ended = False

    def end(self) -> None:
        """Leaves all operations to torch: the engine closes."""
        self._ended = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._ended:
            found = None
        elif func is _LINEAR:
            given = dict(kwargs or {})
            first = (given.pop("input"),) if "input" in given else ()
            found = self._linear(*first, *args, **given)
        elif func in _MATMUL and not kwargs and len(args) == 2:
            found = self._matmul(*args)
        elif func in _FUNCTIONS and len(args) == 1:
            found = _in_whole_steps(func, args[0], kwargs or {})
        else:
            found = None
        return func(*args, **(kwargs or {})) if found is None else found

    def _linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        return self._multiply(x, weight, bias) if weight.dim() == 2 else None

    def _matmul(self, x: Any, matrix: Any) -> torch.Tensor | None:
        if not isinstance(x, torch.Tensor) or not isinstance(matrix, torch.Tensor):
            return None
        if x.dim() < 2 or matrix.dim() != 2:
            return None
        return self._multiply(x, matrix.t(), None)

    def _multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        if not self._takes(x, weight, bias):
            return None
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        shape = *x.shape[:-1], len(weight)
        recorder = active()
        if recorder is not None:
            reads = (x, weight) if bias is None else (x, weight, bias)
            return recorder.call(shape, reads, partial(self._bind, x, weight, bias))
        out = x.new_empty(shape)
        self._bind(x, weight, bias, out)()
        return out

    def _takes(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        tensors = (x, weight) if bias is None else (x, weight, bias)
        return (
            x.dtype in (torch.float32, torch.bfloat16)
            and all(each.dtype == x.dtype and each.device.type == "cpu" for each in tensors)
            and 0 < x.shape[-1] == weight.shape[1]
            and len(weight) > 0
            and (bias is None or bias.shape == weight.shape[:1])
            and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
            and (
                x.dtype == torch.float32
                or x.numel() < self._bf16_rows * x.shape[-1]
                or has_one_thread()
            )
        )

    def _bind(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> Callable[[], None]:
        products = self._products
        multiply = products.multiply_f32 if x.dtype == torch.float32 else products.multiply_bf16
        return partial(
            multiply, x.data_ptr(), x.numel(), weight.data_ptr(), weight.numel(),
            0 if bias is None else bias.data_ptr(), out.data_ptr(), out.numel(), weight.shape[1],
        )  # fmt: skip


def _in_whole_steps(
    func: Callable[..., torch.Tensor], x: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor | None:
    """Returns ``func(x)`` from calls in which every thread's share is a multiple of ``VECTOR``;
    None: x is none of the model's rows."""
    learns = torch.is_grad_enabled() and x.requires_grad
    if x.device.type != "cpu" or not x.is_floating_point() or learns or options.get("inplace"):
        return None
    count, threads = x.numel(), torch.get_num_threads()
    if count > (_GELU_GRAIN if func is torch.nn.functional.gelu else _GRAIN * threads):
        head = count // (VECTOR * threads) * (VECTOR * threads)
    else:
        head = 0 if func is torch.nn.functional.gelu else count // _GRAIN * _GRAIN
    flat = x.reshape(-1)
    rest = flat[head:]
    if not len(rest) or (not head and len(rest) % VECTOR == 0):
        return func(flat, **options).view(x.shape)
    if not head and (more := _with_room(flat)) is not None:
        return func(more, **options)[:count].view(x.shape)
    padded = flat.new_zeros(-(-len(rest) // VECTOR) * VECTOR)
    padded[: len(rest)] = rest
    last = func(padded, **options)[: len(rest)]
    whole = last if not head else torch.cat([func(flat[:head], **options), last])
    return whole.view(x.shape)


def _with_room(flat: torch.Tensor) -> torch.Tensor | None:
    """Returns ``flat`` with whatever follows it in its memory, up to a whole vector; None: there is
    not enough. The results of a recorded step have room, so that it copies none."""
    count = -(-len(flat) // VECTOR) * VECTOR
    held = flat.untyped_storage().nbytes() // flat.element_size() - flat.storage_offset()
    if active() is None or held < count or not flat.is_contiguous():
        return None
    return flat.as_strided((count,), (1,))
