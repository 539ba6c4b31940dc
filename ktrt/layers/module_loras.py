"""The adapters of PEFT's layer around a linear, in the engine's operators that compute the linear.

Every resident adapter is loaded once, at its trained scaling; which of them act is a list of
numbers and weights, and a token of a step may name one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.engine.active_set import ActiveSet

_NUMBERED = re.compile(r"adapter(\d+)")
# Far above any number of ``Adapters``.
_FIRST_OTHER = 1 << 30


class Operator(Protocol):
    """Computes the linear, or a part of it."""

    max_rank: int

    @property
    def lora_bytes(self) -> int: ...
    def load_lora(self, number: int, a: Any = None, b: Any = None) -> None: ...
    def unload_lora(self, number: int) -> None: ...
    def activate_loras(self, ids: Sequence[int], weights: Sequence[float]) -> None: ...


class Numbers:
    """The engine's numbers of PEFT's names: ``default`` is 0 and ``adapter7`` 7, as ``Adapters``
    names them; other names get numbers that nobody else has."""

    def __init__(self) -> None:
        self._others: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name == "default":
            return 0
        if found := _NUMBERED.fullmatch(name):
            return int(found[1])
        return self._others.setdefault(name, _FIRST_OTHER + len(self._others))


# Parameters A and B that an operator has loaded, and the factor in B; None: an adapter without LoRA
# here, whose rows are the base's.
_Source = tuple[Any, Any, float] | None


class ModuleLoras:
    """The adapters of one PEFT layer in some operators, which all hold the same."""

    def __init__(self, module: Any, numbers: Numbers, active_set: ActiveSet) -> None:
        self._module, self._numbers, self._active_set = module, numbers, active_set
        # Each with what it holds.
        self._operators: list[tuple[Operator, dict[int, _Source]]] = []
        self._held: dict[int, _Source] = {}
        self._active: tuple[list[int], list[float]] = [], []
        self._renewals = active_set.renewals
        # Whether the operators compute everything that the active adapters do.
        self.usual = True

    def add(self, operator: Operator) -> None:
        """Loads the adapters into one more operator, which follows from now on."""
        self._operators.append((operator, {}))
        self.read()

    @property
    def bytes_held(self) -> int:
        """The engine's memory of all adapters, in all operators."""
        return sum(operator.lora_bytes for operator, _ in self._operators)

    @property
    def renewed(self) -> bool:
        """Whether an adapter's numbers may have changed since they were read."""
        return self._renewals != self._active_set.renewals

    def knows(self, number: int) -> bool:
        """Whether a row may name this adapter."""
        return number < 0 or number in self._held

    def discard(self, operator: Operator) -> None:
        """Forgets an operator, and what it holds."""
        self._operators = [each for each in self._operators if each[0] is not operator]

    def read(self, *, again: bool = False) -> None:
        """Loads and unloads what has come and gone; ``again``: loads everything once more, since
        numbers may have changed in place."""
        again = again or self.renewed
        self._renewals = self._active_set.renewals
        self._held = self._wanted()
        if not self._held.keys() >= set(self._active[0]):
            self._activate([], [])
        for operator, held in self._operators:
            for number in held.keys() - self._held.keys():
                operator.unload_lora(number)
                del held[number]
            for number, source in self._held.items():
                if again or number not in held or not _same(held[number], source):
                    _load(operator, number, source)
                    held[number] = source
        self.choose()

    def _wanted(self) -> dict[int, _Source]:
        """Returns what the operators should hold: not what they cannot compute."""
        module = self._module
        named = {self._numbers[name]: name for name in module.lora_A}
        wanted: dict[int, _Source] = dict.fromkeys(self._active_set.numbers - named.keys())
        for number, name in named.items():
            if not self._is_usual(name):
                continue
            source = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
            before = self._held.get(number)
            # The scaling may be a weighted one by now; the first was as trained.
            known = before is not None and before[0] is source[0] and before[1] is source[1]
            source = before if known and before is not None else source
            wanted[number] = source if source[2] else None
        return wanted

    def choose(self) -> None:
        """Has the operators add the active adapters' sum."""
        module = self._module
        names = [name for name in module.active_adapters if name in module.lora_A]
        if module.disable_adapters or module.merged:
            names = []
        self.usual = all(map(self._is_usual, names))
        if not self.usual:
            names = []
        numbers = [self._numbers[name] for name in names]
        if not self._held.keys() >= set(numbers):
            self.read()
            return
        weights = []
        for name, number in zip(names, numbers, strict=True):
            source = self._held[number]
            weights.append(0.0 if source is None else module.scaling[name] / source[2])
        self._activate(numbers, weights)

    def _activate(self, numbers: list[int], weights: list[float]) -> None:
        self._active = numbers, weights
        for operator, _ in self._operators:
            operator.activate_loras(numbers, weights)

    def _is_usual(self, name: str) -> bool:
        rank = self._module.lora_A[name].weight.shape[0]
        fits = all(rank <= operator.max_rank for operator, _ in self._operators)
        return fits and is_usual(self._module, name)


def is_usual(module: Any, name: str) -> bool:
    """Whether an adapter of PEFT's layer adds B A x times a factor, and nothing else."""
    return (
        name not in module.lora_variant
        and not module.lora_bias.get(name)
        and isinstance(module.lora_dropout[name], nn.Identity)
        and not getattr(module, "fan_in_fan_out", False)
    )


def _load(operator: Operator, number: int, source: _Source) -> None:
    if source is None:
        operator.load_lora(number)
        return
    a, b, scaling = source
    with torch.no_grad():
        operator.load_lora(number, a.float().detach(), (b.float() * scaling).detach().contiguous())


def _same(first: _Source, second: _Source) -> bool:
    if first is None or second is None:
        return first is second
    return first[0] is second[0] and first[1] is second[1]
