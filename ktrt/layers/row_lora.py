"""PEFT's LoRA layers in dtypes that the engine's linears lack, for rows of different adapters.

Every row gets what PEFT's layer computes with the row's adapter alone, adapter by adapter.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.recording import active
from ktrt.engine.step_rows import ACTIVE
from ktrt.errors import KtrtError
from ktrt.layers.module_loras import is_usual

if TYPE_CHECKING:
    from collections.abc import Callable

    from ktrt.layers.forward import Shared


class RowLora:
    """The forward of one layer; without adapters by row, PEFT's own."""

    def __init__(self, module: Any, shared: Shared) -> None:
        self._module, self._shared, self._plain = module, shared, module.forward
        # PEFT's factors as trained; in PEFT's layer the active adapters' are weighted.
        self._trained: dict[int, tuple[str, float]] = {}
        self.load()

    def load(self) -> None:
        """Takes note of adapters that have come and gone."""
        known = dict(self._trained.values())
        self._trained = {
            self._shared.numbers[name]: (name, known.get(name, self._module.scaling[name]))
            for name in self._module.lora_A
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain, memo)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters = None
        if not args and not kwargs:
            adapters = self._shared.adapters(x.shape[:-1].numel())
        if adapters is None:
            plain: torch.Tensor = self._plain(x, *args, **kwargs)
            return plain
        base: torch.Tensor = self._module.base_layer(x)
        recorder = active()
        if recorder is None:
            return self._add(base, x, adapters)

        def bind(out: torch.Tensor) -> Callable[[], object]:
            return lambda: out.copy_(self._add(base, x, adapters))

        return recorder.call(base.shape, (base, x, adapters), bind)

    def _add(self, base: torch.Tensor, x: torch.Tensor, adapters: torch.Tensor) -> torch.Tensor:
        out, rows = base.flatten(0, -2).clone(), x.flatten(0, -2)
        # Replays run outside the model's forward.
        with self._shared.products:
            for number in sorted(set(adapters.tolist())):
                at = torch.nonzero(adapters == number)[:, 0]
                for name, scaling in self._parts(number):
                    a, b = self._module.lora_A[name], self._module.lora_B[name]
                    added = b(a(rows[at].to(a.weight.dtype))) * scaling
                    out[at] = (out[at] + added).to(out.dtype)
        return out.view_as(base)

    def _parts(self, number: int) -> list[tuple[str, float]]:
        """Returns PEFT's names of what acts on a row of this adapter, with their factors."""
        module = self._module
        parts = [self._trained[number]] if number in self._trained else []
        if number == ACTIVE and not (module.disable_adapters or module.merged):
            names = [name for name in module.active_adapters if name in module.lora_A]
            parts = [(name, module.scaling[name]) for name in names]
        if any(not is_usual(module, name) for name, _ in parts):
            raise KtrtError(
                f"a step has a row of adapter number {number} next to rows of others, which acts "
                "in a way that all rows of a step share (DoRA, a bias, dropout); run it in "
                "separate steps"
            )
        return parts
