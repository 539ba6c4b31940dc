"""RMSNorm on the CPU through the engine: its forward, never its parameters.

torch computes it in six operations, 34 µs for 2048 numbers where the engine's kernel takes 2; a
decode step has 50 to 200 of them. The kernel takes any number of rows: a row has the same bits
alone and next to others.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.engine import RmsNorm
from ktrt.engine.recording import active
from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine import Engine

# Where the models keep eps.
_EPS = ("variance_epsilon", "eps")
# (rounds_twice, offset): Llama's, gpt_oss's, Gemma's.
_CONVENTIONS = ((True, 0.0), (False, 0.0), (False, 1.0))


def accelerate_norms(
    model: nn.Module, patches: Patches | None = None, engine: Engine | None = None
) -> int:
    """Runs rows of bfloat16 through the engine's kernels in the RMSNorm layers of ``model`` whose
    weights are bfloat16 or float32 on the CPU; returns how many. ``engine``: shares many rows among
    its threads. A second call takes the layers added since.

    A layer is taken if it computes what the engine does in one of its conventions: a probe with
    random weights and rows decides, names only choose what is probed.
    """
    count = 0
    patches = Patches() if patches is None else patches
    each: Any
    for each in model.modules():
        if _may_be(each) and not isinstance(each.__dict__.get("forward"), NormForward):
            found = _convention(each)
            if found is not None:
                patches.set(each, "forward", NormForward(each, *found, engine))
                count += 1
    return count


def _may_be(module: Any) -> bool:
    weight = module._parameters.get("weight")
    return type(module).__name__.endswith("RMSNorm") and _is_weight(weight)


def _is_weight(weight: Any) -> bool:
    return (
        weight is not None
        and weight.ndim == 1
        and weight.numel() > 0
        and weight.dtype in (torch.bfloat16, torch.float32)
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )


def _convention(module: Any) -> tuple[float, bool, float] | None:
    """eps, rounds_twice and offset with which the engine computes the same; None: with none."""
    eps = next((e for name in _EPS if isinstance(e := getattr(module, name, None), float)), None)
    if eps is None or eps < 0 or (module.training and getattr(module, "dropout", None)):
        return None
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[1.0], [30.0], [eps**0.5 if eps > 0 else 1e-3]])
    size = weight.numel()
    x = (torch.randn(3, size, generator=generator) * scales).to(torch.bfloat16)
    probe = torch.randn(size, generator=generator).to(weight.dtype)
    try:
        with torch.no_grad():
            expected = torch.func.functional_call(module, {"weight": probe}, (x,))
    except (TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(expected, torch.Tensor) or expected.dtype != x.dtype:
        return None
    for rounds_twice, offset in _CONVENTIONS:
        found = torch.empty_like(x)
        norm = RmsNorm(probe, eps, rounds_twice=rounds_twice, offset=offset)
        norm.forward(x.data_ptr(), x.numel(), 3, size, found.data_ptr(), found.numel())
        if expected.shape == found.shape and _same(found, expected):
            return eps, rounds_twice, offset
    return None


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within one unit in the last place, and equal but for sums that were rounded otherwise: the
    conventions differ by a unit too, in every fourth number."""
    units = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    return int(units.max()) <= 1 and float((units > 0).float().mean()) < 0.02


class NormForward:
    """The engine's forward of one RMSNorm, in place of torch's."""

    def __init__(
        self, module: Any, eps: float, rounds_twice: bool, offset: float, engine: Engine | None
    ) -> None:
        self._module, self._engine = module, engine
        self._plain = module.forward
        self._how = eps, rounds_twice, offset
        self._bind()

    def _bind(self) -> None:
        """Takes the present weight: an adapter may have replaced it."""
        eps, rounds_twice, offset = self._how
        self._weight = self._module.weight
        self._address = self._weight.data_ptr()
        self._norm = RmsNorm(
            self._weight.detach(), eps, rounds_twice=rounds_twice, offset=offset,
            engine=self._engine,
        )  # fmt: skip
        self.size = self._norm.size

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module has a weight elsewhere: torch computes it."""
        return copy.deepcopy(self._plain, memo)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self._takes(x):
            plain: torch.Tensor = self._plain(x, *args, **kwargs)
            return plain
        stride = _row_stride(x)
        if stride is None:
            x, stride = x.contiguous(), self.size
        if (recorder := active()) is not None:
            return recorder.call(x.shape, (x,), partial(self.bind, x))
        out = torch.empty(x.shape, dtype=torch.bfloat16)
        count = x.numel()
        rows = count // self.size
        extent = (rows - 1) * stride + self.size
        self._norm.forward(x.data_ptr(), extent, rows, stride, out.data_ptr(), count)
        return out

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = norm of x [..., size], whose rows are equally far apart; out is contiguous, and may
        be x. Both bfloat16. ``ValueError``: dtypes, shapes, layouts."""
        self.bind(x, out)()

    def bind(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        """``into`` as a function without arguments, of what x holds when it is called. The tensors,
        and the module's weight, must stay where they are. ``ValueError``: as ``into``."""
        stride = _row_stride(x)
        if x.dtype != torch.bfloat16 or stride is None or x.shape[-1] != self.size:
            raise ValueError(
                f"x is {x.dtype} {[*x.shape]} with strides {x.stride()}, expected bfloat16 rows of "
                f"{self.size}, equally far apart"
            )
        if out.dtype != torch.bfloat16 or out.shape != x.shape or not out.is_contiguous():
            raise ValueError(
                f"out is {out.dtype} {[*out.shape]}, expected bfloat16 {[*x.shape]}, contiguous"
            )
        rows = out.numel() // self.size
        count = max(rows - 1, 0) * stride + self.size
        forward = self._norm.forward
        arguments = x.data_ptr(), count, rows, stride, out.data_ptr(), out.numel()

        def norm(_kept: object = (x, out)) -> None:
            forward(*arguments)

        return norm

    def _follows(self) -> bool:
        """Whether the weight is one that can be read; looks whether it is another one."""
        weight = self._module._parameters.get("weight")
        if weight is not self._weight:
            if not _is_weight(weight) or weight.numel() != self.size:
                return False
            self._bind()
        return bool(weight.data_ptr() == self._address)

    def _takes(self, x: torch.Tensor) -> bool:
        return (
            x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and x.shape[-1] == self.size
            and x.numel() > 0
            and self._follows()
            and not (torch.is_grad_enabled() and (x.requires_grad or self._weight.requires_grad))
        )


def _row_stride(x: torch.Tensor) -> int | None:
    """Elements from each row of x [..., size] to the next; None if that differs."""
    if x.ndim == 0 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return None
    if x.is_contiguous():
        return x.shape[-1]
    outer = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    return outer[0] if len(outer) == 1 else None
