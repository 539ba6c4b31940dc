"""The engine's forward of a linear layer, and of PEFT's LoRA layer around one."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.engine import DenseLinear, PackedLinear, active_isa
from ktrt.engine.recording import active

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.engine import Engine, LatentAttention
    from ktrt.engine.active_set import ActiveSet
    from ktrt.engine.recording import Recorder

# With AMX, torch computes from this many rows on: it has tiles for BF16, the engine's linears have
# none. Elsewhere one kernel takes all rows, so a row's bits do not depend on the chunks.
_AMX_ROWS = 16

Linear = DenseLinear | PackedLinear
# A [rank, in] and B [out, rank].
Lora = tuple[torch.Tensor, torch.Tensor]
# Sets of adapters, with their scaling, that each layer remembers.
_REMEMBERED = 4


def give_lora(operator: Linear | LatentAttention, lora: Lora | None) -> None:
    """Makes ``lora`` the one that an operator of the engine adds; None: it adds none."""
    if lora is None:
        operator.activate_loras([], [])
    else:
        operator.load_lora(0, *lora)
        operator.activate_loras([0], [1.0])


class Shared:
    """The engine and settings that the layers of one model share."""

    def __init__(self, engine: Engine, active_set: ActiveSet) -> None:
        self.engine = engine
        self.active_set = active_set
        # From how many rows on torch computes; INT8 kernels have tiles and take all rows.
        self.most_rows = _AMX_ROWS if active_isa() == "amx" else sys.maxsize


class DenseForward:
    """The engine's forward of one linear, in place of torch's."""

    # A [rank, in] and B [out, rank] of the active adapters in float32, the scaling in B.
    lora: Lora | None = None
    # Whether ``lora`` is all that the active adapters do.
    usual = True

    def __init__(self, base: nn.Linear, shared: Shared, *, int8: bool = False) -> None:
        self._shared, self._active_set = shared, shared.active_set
        self._module: Any = base
        self.base = base
        self._plain = base.forward
        self._rows = sys.maxsize if int8 else shared.most_rows
        self._int8 = int8
        self._in, self._out = base.in_features, base.out_features
        self._bind()

    def _bind(self) -> None:
        """Takes the base's present parameters: an adapter may have replaced them."""
        self._take_parameters()
        self._version = self._active_set.version
        kind = PackedLinear if self._int8 else DenseLinear
        bias = None if self._bias is None else self._bias.detach()
        self._linear: Linear = kind(self._shared.engine, self._weight.detach(), bias)

    def _take_parameters(self) -> None:
        self._weight, self._bias = self.base.weight, self.base.bias
        # An adapter's output layer may have more words.
        self._out = len(self._weight)
        self._address = self._weight.data_ptr()

    def new_linear(self) -> Linear:
        """Returns another one with the base's present parameters, without LoRA."""
        self.update()
        if isinstance(self._linear, PackedLinear):
            return self._linear.share()
        bias = None if self._bias is None else self._bias.detach()
        return DenseLinear(self._shared.engine, self._weight.detach(), bias)

    @property
    def weight_format(self) -> str:
        """``bf16`` or ``int8``."""
        return "int8" if self._int8 else "bf16"

    @property
    def packed_bytes(self) -> int:
        """Bytes of the INT8 weight; 0 for BF16, which has no copy."""
        return self._linear.packed_bytes if isinstance(self._linear, PackedLinear) else 0

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self._ready(x):
            plain: torch.Tensor = self._plain(x, *args, **kwargs)
            return plain
        if (recorder := active()) is not None:
            return self._record(recorder, x.contiguous())
        out = x.new_empty((*x.shape[:-1], self._out))
        self._run(x, out)
        return out

    def _record(self, recorder: Recorder, x: torch.Tensor) -> torch.Tensor:
        def bind(out: torch.Tensor) -> Callable[[], None]:
            places = x.data_ptr(), x.numel(), out.data_ptr(), out.numel()
            return partial(self._linear.forward, *places)

        return recorder.call((*x.shape[:-1], self._out), (x,), bind)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes what calling it with ``x`` gives to ``out``: that shape, contiguous, BF16. Without
        allocations where the engine computes it; elsewhere a copy."""
        if self._ready(x) and out.dtype == torch.bfloat16 and out.is_contiguous():
            self._run(x, out)
        else:
            out.copy_(self(x))

    def _ready(self, x: torch.Tensor) -> bool:
        """Whether the engine computes it, after a look at the version of the active adapters."""
        self.follow()
        return self.usual and self._takes(x)

    def follow(self) -> None:
        """Makes ``lora`` and ``usual`` true for the active adapters; costs one comparison."""
        if self._version != self._active_set.version:
            self.update()

    def update(self) -> None:
        """Reads the active adapters, which may have replaced parameters of the base."""
        self._version = self._active_set.version
        held = self.base._parameters
        if held["weight"] is not self._weight or held["bias"] is not self._bias:
            self._bind()

    def _run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        x = x.contiguous()
        self._linear.forward(x.data_ptr(), x.numel(), out.data_ptr(), out.numel())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module has weights elsewhere: torch computes it."""
        return copy.deepcopy(self._plain, memo)

    def _takes(self, x: torch.Tensor) -> bool:
        return (
            x.dtype == torch.bfloat16
            and x.shape[-1] == self._in
            and x.device.type == "cpu"
            and x.numel() < self._rows * self._in
            and self.base.weight.data_ptr() == self._address
            and not (torch.is_grad_enabled() and (x.requires_grad or self._module.training))
        )

    def refresh(self) -> None:
        """Reads everything again that may have changed without a new version."""
        self.update()


class LoraForward(DenseForward):
    """The same for PEFT's layer around a linear."""

    def __init__(self, module: Any, inner: DenseForward) -> None:
        """``inner``: the forward of the linear itself."""
        self._inner = inner
        self._shared, self._active_set = inner._shared, inner._active_set
        self._module = module
        self.base = inner.base
        self._plain = module.forward
        self._rows, self._int8 = inner._rows, inner._int8
        self._in, self._out = inner._in, inner._out
        self._merged = module.merged
        # By the active adapters with their scaling: a switch back costs nothing.
        self._made: dict[object, tuple[Linear, Lora | None, bool]] = {}
        self._bind()

    def _bind(self) -> None:
        self._take_parameters()
        self._made.clear()
        self._renewals = self._active_set.renewals
        self._choose()

    def update(self) -> None:
        held = self.base._parameters
        moved = held["weight"] is not self._weight or held["bias"] is not self._bias
        if moved or self._renewals != self._active_set.renewals:
            self._bind()
        else:
            self._choose()

    def refresh(self) -> None:
        self._made.clear()
        self.update()

    def _choose(self) -> None:
        """Takes A and B of the active adapters, the scaling folded into B."""
        module = self._module
        self._version = self._active_set.version
        if self._int8 and self._merged != module.merged:
            # PEFT has added B A to the parameters, or taken it out again.
            self._inner._bind()
            self._made.clear()
        self._merged = module.merged
        active = [name for name in module.active_adapters if name in module.lora_A]
        if module.disable_adapters or module.merged:
            active = []
        key = tuple((name, module.scaling[name]) for name in active)
        if key not in self._made:
            if len(self._made) == _REMEMBERED:
                del self._made[next(iter(self._made))]
            self._made[key] = self._make(active)
        self._linear, self.lora, self.usual = self._made[key]

    def _make(self, active: list[str]) -> tuple[Linear, Lora | None, bool]:
        module, linear = self._module, self._inner.new_linear()
        ranks = sum(module.lora_A[name].weight.shape[0] for name in active)
        usual = (
            not any(
                name in module.lora_variant
                or module.lora_bias.get(name)
                or not isinstance(module.lora_dropout[name], nn.Identity)
                for name in active
            )
            and not getattr(module, "fan_in_fan_out", False)
            and ranks <= linear.max_rank
        )
        if not active or not usual:
            return linear, None, usual
        with torch.no_grad():
            a = [module.lora_A[name].weight.float() for name in active]
            b = [module.lora_B[name].weight.float() * module.scaling[name] for name in active]
            lora = torch.cat(a), torch.cat(b, dim=1).contiguous()
        give_lora(linear, lora)
        return linear, lora, usual
