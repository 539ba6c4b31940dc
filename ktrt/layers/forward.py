"""The engine's forward of a linear layer, and of PEFT's LoRA layer around one."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine import DenseLinear, PackedLinear
from ktrt.engine.recording import active
from ktrt.engine.step_rows import ACTIVE, BASE, RunningStep
from ktrt.errors import KtrtError
from ktrt.layers.coded import CodedLinear
from ktrt.layers.module_loras import ModuleLoras, Numbers
from ktrt.layers.row_products import FixedProducts, has_one_thread, torch_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ktrt.engine import Engine
    from ktrt.engine.active_set import ActiveSet
    from ktrt.engine.recording import Recorder
    from ktrt.engine.step_rows import StepRows

Linear = DenseLinear | PackedLinear


class Shared:
    """The engine and settings that the layers of one model share, and the step that runs."""

    def __init__(self, engine: Engine, active_set: ActiveSet, running: RunningStep) -> None:
        self.engine, self.active_set, self.running = engine, active_set, running
        self.numbers = Numbers()
        self.products = FixedProducts(engine)
        # INT8 kernels have tiles and take all rows.
        self.most_rows = torch_rows(engine)
        # The adapter that all tokens of the step have, and the step's count.
        self._common: tuple[int, int | None] = -1, None

    def adapters(self, rows: int) -> torch.Tensor | None:
        """Returns the adapter of each of ``rows`` rows, int32; None: the active ones for all.

        The rows are the step's tokens, or the tokens whose logits are wanted.
        ``KtrtError``: the rows are neither.
        """
        step = self.running.rows
        if step is None:
            return None
        if active() is None and (common := self._common_of(step)) is not None:
            return None if common == ACTIVE else _all(common, rows)
        wanted = step.logits
        if rows == step.tokens and (wanted is None or len(wanted) != rows or _in_order(wanted)):
            return step.adapters
        if wanted is not None and rows == len(wanted) != step.tokens:
            return step.adapters[wanted]
        if step.batch and rows % step.tokens == 0:  # whole sequences: latents
            return step.adapters.repeat_interleave(rows // step.tokens)
        known = "" if wanted is None else f" or the {len(wanted)} whose logits are wanted"
        raise KtrtError(
            f"a layer has {rows} rows in a step of {step.tokens} tokens: expected these{known}, in "
            "their order, so that each row's adapter is known"
        )

    def _common_of(self, step: StepRows) -> int | None:
        """Returns the adapter that all tokens have; None: they differ."""
        if self._common[0] != self.running.changes:
            first = int(step.adapters[0])
            same = bool((step.adapters == first).all())
            self._common = self.running.changes, first if same else None
        return self._common[1]


def _all(adapter: int, rows: int) -> torch.Tensor:
    return torch.full((rows,), adapter, dtype=torch.int32)


def _in_order(wanted: torch.Tensor) -> bool:
    return torch.equal(wanted.cpu(), torch.arange(len(wanted)))


class DenseForward:
    """The engine's forward of one linear, in place of torch's."""

    # Whether the engine computes all that the active adapters do.
    usual = True

    def __init__(self, base: nn.Linear, shared: Shared, *, int8: bool = False) -> None:
        self._shared, self.active_set = shared, shared.active_set
        self._module: Any = base
        self.base = base
        self._plain = base.forward
        self._int8 = int8 and not isinstance(base, CodedLinear)
        packed = int8 or isinstance(base, CodedLinear)
        self._rows = sys.maxsize if packed else shared.most_rows
        self._in, self._out = base.in_features, base.out_features
        # Whether PEFT's layer around the linear has its LoRA in the same engine linear.
        self.wrapped = False
        self._bind()

    _weight: torch.Tensor | None
    _address: int | None
    _format: str

    def _bind(self) -> None:
        """Takes the base's present parameters: an adapter may have replaced them."""
        self._take_parameters()
        self._version = self.active_set.version
        engine = self._shared.engine
        bias = None if self._bias is None else self._bias.detach()
        self.linear: Linear
        if isinstance(self.base, CodedLinear):
            codes: Any = self.base.read_codes()
            self._format = codes.format
            self.linear = PackedLinear.of_codes(
                engine, codes.format, codes.codes, codes.scales, self._in, bias
            )
            return
        assert self._weight is not None
        self._format = "int8" if self._int8 else "bf16"
        kind = PackedLinear if self._int8 else DenseLinear
        self.linear = kind(engine, self._weight.detach(), bias)

    def _take_parameters(self) -> None:
        self._bias = self.base.bias
        self._weight, self._address = None, None
        if isinstance(self.base, CodedLinear):
            return
        weight = self._weight = self.base.weight
        # An adapter's output layer may have more words.
        self._out = len(weight)
        self._address = weight.data_ptr()

    @property
    def weight_format(self) -> str:
        """The engine's name: ``bf16``, ``int8`` or a coded format."""
        return self._format

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight; 0 for BF16, which has no copy."""
        return self.linear.packed_bytes if isinstance(self.linear, PackedLinear) else 0

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.follow()
        adapters = self._adapters(x)
        if args or kwargs or not self._ready(x, adapters):
            plain: torch.Tensor = self._plain(x, *args, **kwargs)
            return plain
        if (recorder := active()) is not None:
            return self._record(recorder, x.contiguous(), adapters)
        out = x.new_empty((*x.shape[:-1], self._out))
        self._run(x, out, adapters)
        return out

    def _record(
        self, recorder: Recorder, x: torch.Tensor, adapters: torch.Tensor | None
    ) -> torch.Tensor:
        def bind(out: torch.Tensor) -> Callable[[], None]:
            places = x.data_ptr(), x.numel(), out.data_ptr(), out.numel(), *_place(adapters)
            return partial(self.linear.forward, *places)

        reads = (x,) if adapters is None else (x, adapters)
        return recorder.call((*x.shape[:-1], self._out), reads, bind)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes what calling it with ``x`` gives to ``out``: that shape, contiguous, BF16. Without
        allocations where the engine computes it; elsewhere a copy."""
        self.follow()
        adapters = self._adapters(x)
        if self._ready(x, adapters) and out.dtype == torch.bfloat16 and out.is_contiguous():
            self._run(x, out, adapters)
        else:
            out.copy_(self(x))

    def _adapters(self, x: torch.Tensor) -> torch.Tensor | None:
        """Returns each row's adapter; None: the active ones."""
        # A linear within PEFT's layer is the base alone, whatever acts.
        return _all(BASE, x.numel() // self._in) if self.wrapped else None

    def _ready(self, x: torch.Tensor, _adapters: torch.Tensor | None) -> bool:
        """Whether the engine computes it."""
        few = x.numel() < self._rows * self._in or has_one_thread()
        return few and self._takes(x)

    def follow(self) -> None:
        """Takes the active adapters; costs one comparison while they are the same."""
        if self._version != self.active_set.version:
            self.update()

    def update(self) -> None:
        """Reads the active adapters, which may have replaced parameters of the base."""
        self._version = self.active_set.version
        if self._moved():
            self._bind()

    def _moved(self) -> bool:
        held = self.base._parameters
        return held.get("weight") is not self._weight or held["bias"] is not self._bias

    def _run(self, x: torch.Tensor, out: torch.Tensor, adapters: torch.Tensor | None) -> None:
        x = x.contiguous()
        places = x.data_ptr(), x.numel(), out.data_ptr(), out.numel()
        self.linear.forward(*places, *_place(adapters))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module has weights elsewhere: torch computes it."""
        return copy.deepcopy(self._plain, memo)

    def _takes(self, x: torch.Tensor) -> bool:
        return (
            x.dtype == torch.bfloat16
            and x.shape[-1] == self._in
            and x.device.type == "cpu"
            and (self._address is None or self.base.weight.data_ptr() == self._address)
            and not (torch.is_grad_enabled() and (x.requires_grad or self._module.training))
        )

    def load(self) -> None:
        """Loads and unloads adapters that have come and gone."""

    def refresh(self) -> None:
        """Reads everything again that may have changed without a new version."""
        self.update()


def _place(adapters: torch.Tensor | None) -> tuple[int, ...]:
    return () if adapters is None else (adapters.data_ptr(), adapters.numel())


class LoraForward(DenseForward):
    """The same for PEFT's layer around a linear, in the linear's own engine linear."""

    def __init__(self, module: Any, inner: DenseForward) -> None:
        """``inner``: the forward of the linear itself."""
        self._inner = inner
        self._shared, self.active_set = inner._shared, inner.active_set
        self._module = module
        self.base = inner.base
        self._plain = module.forward
        self._rows, self._int8 = inner._rows, inner._int8
        self._in, self._out = inner._in, inner._out
        self.wrapped = False
        self._merged = module.merged
        # Also of others that compute the linear or a part of it.
        self.loras = ModuleLoras(module, self._shared.numbers, self.active_set)
        self._bind()

    def _bind(self) -> None:
        self._version = self.active_set.version
        self._inner.wrapped = True
        self._take_parameters()
        self.linear, self._format = self._inner.linear, self._inner._format
        self.loras.add(self.linear)

    @property
    def usual(self) -> bool:  # type: ignore[override]
        """Whether the engine computes all that the active adapters do."""
        return self.loras.usual

    def update(self) -> None:
        self._version = self.active_set.version
        if self._int8 and self._merged != self._module.merged:
            # PEFT has added B A to the parameters, or taken it out again.
            self._inner._bind()
        self._merged = self._module.merged
        self._inner.update()
        if self.linear is not self._inner.linear:
            self.loras.discard(self.linear)
            self._bind()
        elif self.loras.renewed:
            self.loras.read()
        else:
            self.loras.choose()

    def _record(
        self, recorder: Recorder, x: torch.Tensor, adapters: torch.Tensor | None
    ) -> torch.Tensor:
        # A recorded step does not call the module: the active sum changes before the step.
        recorder.follow(self.active_set, self._follow_recorded)
        return super()._record(recorder, x, adapters)

    def _follow_recorded(self) -> None:
        self.follow()
        if not self.usual:
            raise KtrtError(
                "a recorded step has adapters of a kind or rank that the engine does not compute; "
                "it was recorded with others"
            )

    def load(self) -> None:
        self.loras.read()
        # It took what acts now, between two steps: another set than the version's, perhaps, which
        # may act again by the next forward.
        self._version = -1

    def refresh(self) -> None:
        self.loras.read(again=True)
        self.update()

    def _adapters(self, x: torch.Tensor) -> torch.Tensor | None:
        return self._shared.adapters(x.numel() // self._in)

    def _ready(self, x: torch.Tensor, adapters: torch.Tensor | None) -> bool:
        if adapters is None:
            return self.usual and super()._ready(x, None)
        # Nobody else computes rows of different adapters.
        if not self.usual and bool((adapters == ACTIVE).any()):
            raise KtrtError(
                "a step has rows of other adapters next to the active ones, which act in a way "
                "that all rows of a step share; run them in separate steps"
            )
        if not self._takes(x):
            raise KtrtError(
                f"a step has rows of different adapters, and a layer's input is {x.dtype} "
                f"{[*x.shape]} on {x.device}: expected bfloat16 on the CPU, without gradients"
            )
        return True

    def _run(self, x: torch.Tensor, out: torch.Tensor, adapters: torch.Tensor | None) -> None:
        try:
            super()._run(x, out, adapters)
        except ValueError as error:
            for number in [] if adapters is None else adapters.tolist():
                if not self.loras.knows(number):
                    raise KtrtError(
                        f"a step has a row of adapter number {number}, which is not resident or "
                        "acts in a way that all rows of a step share (DoRA, a bias, dropout); run "
                        "it in separate steps"
                    ) from error
            raise
