"""Linear layers on the CPU through the engine: their forward, never their parameters.

For one token, torch's BF16 linear reaches about half of the memory's bandwidth on two cores, and on
processors without BF16 instructions far less; PEFT adds two more linears in float32, with casts.
The engine reads the same weights where they lie, and adds LoRA before the one rounding. BF16 is
therefore the dtype on every processor: its bytes bound decoding, float32 has twice as many.

INT8 (``quantization_bit: 8``) halves them again. The engine then has a packed copy of its own, and
the parameters in BF16 are what they were: where they are mapped from the checkpoint's files, pages
that nobody reads, which the kernel takes back.
"""

from __future__ import annotations

import copy
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.engine import DenseLinear, PackedLinear, active_isa
from ktrt.engine.recording import active
from ktrt.layers.int8 import is_int8

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ktrt.engine import Engine
    from ktrt.engine.recording import Recorder

logger = logging.getLogger(__name__)

# With AMX, torch computes from so many rows on: its tiles are ahead there, the engine has none for
# these layers. Elsewhere one kernel takes all rows, so a row's bits do not depend on the chunks.
_AMX_ROWS = 16
# Tokens in the KV cache up to which a decode step leaves torch one thread.
_SHORT_CONTEXT = 2048


def accelerate(model: nn.Module, engine: Engine, *, int8: bool = False) -> int:
    """Lets the engine compute the ``nn.Linear`` layers of ``model`` whose weights are BF16 on the
    CPU, and PEFT's LoRA layers on such; returns how many. Called again, it takes what is new.

    Parameters, names and ``peft_config`` stay as they are. What the engine does not do (DoRA, LoRA
    with a bias, dropout while training, gradients, other dtypes, per-sample adapters) takes the
    ordinary path, call by call. Works until the engine is closed.

    ``int8``: quantises the layers that ``layers.int8`` names, by their present numbers; LoRA stays
    exact, in PEFT's hands too. Gradients and other dtypes go through the parameters in BF16.
    ``ValueError``: NaN or infinity in a weight.
    """
    most = _AMX_ROWS if active_isa() == "amx" else None
    lora_linear = _peft_linear()
    count = 0
    each: Any
    for path, each in model.named_modules():
        is_lora = type(each) is lora_linear
        base = each.base_layer if is_lora else each
        if not _fits(base):
            continue
        inner = _forward_of(base)
        if inner is None:
            inner = DenseForward(base, engine, most, int8=int8 and is_int8(path, base))
            base.forward = inner
            count += 1
        if is_lora and _forward_of(each) is None:
            each.forward = LoraForward(each, inner)
    if count:
        logger.debug("%d BF16 linear layers run in the engine", count)
        _decode_on_one_thread(model)
    return count


def _decode_on_one_thread(model: nn.Module) -> None:
    """What is left to torch in a decode step is so small that waking its threads takes longer, and
    they would get in the way of the engine's. Long conversations have attention to share out."""
    weights = [
        m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.numel() > 1 << 20
    ]
    if not all(isinstance(m.__dict__.get("forward"), DenseForward) for m in weights):
        return
    threads: list[int] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        past = kwargs.get("cache", kwargs.get("past_key_values"))
        threads.append(torch.get_num_threads())
        one = ids is not None and ids.numel() == 1
        if active() is not None or (one and _length(past) < _SHORT_CONTEXT):
            torch.set_num_threads(1)

    def after(*_: object) -> None:
        torch.set_num_threads(threads.pop())

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)


def _length(cache: Any) -> int:
    """Tokens in a KV cache; of one that cannot tell (hybrids), as many as there could be."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        return sys.maxsize


def refresh(model: nn.Module) -> None:
    """Reads the LoRA of all layers again: after numbers of an adapter were changed in place.

    A change of the active adapters or of their scaling is noticed without it. KV caches that have
    recorded steps with the old numbers have to go.
    """
    for forward in _forwards(model):
        forward.refresh()


def int8_bytes(model: nn.Module) -> dict[int, int]:
    """By the id of its parameter in BF16: bytes of every weight that the engine has in INT8."""
    return {
        id(forward.base.weight): forward.packed_bytes
        for forward in _forwards(model)
        if forward.packed_bytes
    }


def _forwards(model: nn.Module) -> Iterator[DenseForward]:
    for module in model.modules():
        if (forward := _forward_of(module)) is not None:
            yield forward


def _forward_of(module: nn.Module) -> DenseForward | None:
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, DenseForward) else None


def _peft_linear() -> type | None:
    """PEFT's layer around a linear, if PEFT is in use at all (its import takes a while)."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    found: type | None = getattr(layer, "Linear", None)
    return found


def _fits(module: Any) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and module.weight.is_contiguous()
        and module.weight.numel() > 0
    )


class OneRowProducts:
    """Products of one row with a BF16 matrix that is no ``nn.Linear`` (routers), for recorded
    steps: torch's take 70 µs for a router of 64 × 2048, the engine's 10."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self, operation: Any, arguments: tuple[Any, ...], results: Sequence[torch.Tensor]
    ) -> Callable[[], object] | None:
        if operation is not torch.ops.aten.mm.default:
            return None
        x, matrix = arguments[0], arguments[1].t()
        fits = all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (x, matrix, *results))
        if not fits or x.shape[0] != 1:
            return None
        linear, out = DenseLinear(self._engine, matrix.detach()), results[0]
        return partial(linear.forward, x.data_ptr(), x.numel(), out.data_ptr(), out.numel())


Linear = DenseLinear | PackedLinear
# A [rank, in] and B [out, rank].
Lora = tuple[torch.Tensor, torch.Tensor]
# Sets of adapters, with their scaling, that each layer remembers.
_REMEMBERED = 4


class DenseForward:
    """What stands in for the forward of one linear."""

    # A [rank, in] and B [out, rank] of the active adapters in float32, the scaling in B.
    lora: Lora | None = None

    def __init__(
        self, base: nn.Linear, engine: Engine, most_rows: int | None, *, int8: bool = False
    ) -> None:
        """``most_rows``: so many and more take the ordinary path, but for INT8, whose kernels have
        tiles of their own."""
        self._engine = engine
        self._module: Any = base
        self.base = base
        self._plain = base.forward
        self._rows = sys.maxsize if int8 else most_rows or sys.maxsize
        self._int8 = int8
        self._in, self._out = base.in_features, base.out_features
        self._bind()

    def _bind(self) -> None:
        """Takes the base's parameters of now: adapters may put others in their place."""
        self._take_parameters()
        kind = PackedLinear if self._int8 else DenseLinear
        bias = None if self._bias is None else self._bias.detach()
        self._linear: Linear = kind(self._engine, self._weight.detach(), bias)

    def _take_parameters(self) -> None:
        self._weight, self._bias = self.base.weight, self.base.bias
        # An adapter's output layer may have more words.
        self._out = len(self._weight)
        self._address = self._weight.data_ptr()

    def new_linear(self) -> Linear:
        """Another one with the base's parameters of now, without LoRA."""
        self._update()
        if isinstance(self._linear, PackedLinear):
            return self._linear.share()
        bias = None if self._bias is None else self._bias.detach()
        return DenseLinear(self._engine, self._weight.detach(), bias)

    @property
    def weight_format(self) -> str:
        """``bf16`` or ``int8``."""
        return "int8" if self._int8 else "bf16"

    @property
    def packed_bytes(self) -> int:
        """Of the INT8 weight; 0 for BF16, which has no copy."""
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
        """Whether the engine computes it; the layer as it is now."""
        self._update()
        return self.usual and self._takes(x)

    def _update(self) -> None:
        held = self.base._parameters
        if held["weight"] is not self._weight or held["bias"] is not self._bias:
            self._bind()

    def _run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        x = x.contiguous()
        self._linear.forward(x.data_ptr(), x.numel(), out.data_ptr(), out.numel())

    @property
    def usual(self) -> bool:
        """Whether ``lora`` is all that the active adapters do; looks at what PEFT has switched."""
        return True

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
        """Takes what PEFT's layer holds, anew."""


class LoraForward(DenseForward):
    """The same for PEFT's layer around a linear."""

    def __init__(self, module: Any, inner: DenseForward) -> None:
        """``inner``: what stands in for the linear's own forward."""
        self._inner = inner
        self._module = module
        self.base = inner.base
        self._plain = module.forward
        self._rows, self._int8 = inner._rows, inner._int8
        self._in, self._out = inner._in, inner._out
        self._usual = True
        self._state: tuple[object, ...] | None = None
        # Made before, by what was active: a switch back costs nothing.
        self._made: dict[object, tuple[Linear, Lora | None, bool]] = {}
        self._bind()

    def _bind(self) -> None:
        self._take_parameters()
        self.refresh()

    @property
    def usual(self) -> bool:
        if self._state != self._lora_state():
            self._follow()
        return self._usual

    def _lora_state(self) -> tuple[object, ...]:
        """What PEFT changes to switch adapters."""
        module = self._module
        return (
            module.merged,
            module.disable_adapters,
            tuple(module.active_adapters),
            tuple(module.scaling.values()),
        )

    def refresh(self) -> None:
        self._made.clear()
        self._follow()

    def _follow(self) -> None:
        """Takes A and B of the active adapters, the scaling folded into B."""
        module, before = self._module, self._state
        self._state = self._lora_state()
        if self._int8 and before is not None and before[0] != self._state[0]:
            # PEFT has added B A to the parameters, or taken it out again.
            self._inner._bind()
            self._made.clear()
        active = [name for name in module.active_adapters if name in module.lora_A]
        if module.disable_adapters or module.merged:
            active = []
        key = tuple((name, module.scaling[name]) for name in active)
        if key not in self._made:
            if len(self._made) == _REMEMBERED:
                del self._made[next(iter(self._made))]
            self._made[key] = self._make(active)
        self._linear, self.lora, self._usual = self._made[key]

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
        linear.load_lora(0, *lora)
        linear.activate_loras([0], [1.0])
        return linear, lora, usual
