"""The activation of an experts module, recognised by what it computes."""

from __future__ import annotations

import functools
import math
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from ktrt.engine.activation import Activation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from ktrt.engine.activation import Kind


def recognise_activation(module: nn.Module) -> Activation | None:
    """The activation of an experts module of transformers; None if it is none of the engine's.

    The module's own code is run on a grid of gate and up, and compared with each candidate. Limits
    and slopes are taken from the module's numbers, the grid reaches beyond every one of them.
    """
    numbers = tuple(sorted(set(_numbers(module))))
    gate, up = _grid(numbers)
    try:
        found = _evaluate(module, gate, up)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None  # code that wants more than numbers
    if found.shape != up.shape:
        return None
    return _matching(numbers, bool(module.has_gate), tuple(found.double().tolist()))


def _evaluate(module: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not module.has_gate:
        result: torch.Tensor = module.act_fn(up)
        return result
    # One intermediate value per row: concatenated and interleaved are the same then.
    gated: torch.Tensor = module._apply_gate(torch.stack([gate, up], dim=1))
    return gated[:, 0]


@functools.lru_cache(maxsize=64)
def _matching(
    numbers: tuple[float, ...], has_gate: bool, values: tuple[float, ...]
) -> Activation | None:
    gate, up = (part.double() for part in _grid(numbers))
    expected = torch.tensor(values, dtype=torch.float64)
    for candidate in _candidates(numbers, has_gate):
        result = candidate(gate if has_gate else None, up)
        # The module computed in float32; exact and tanh GELU differ by 5e-4.
        if torch.allclose(result, expected, rtol=2e-5, atol=2e-5):
            return candidate
    return None


def _candidates(numbers: tuple[float, ...], has_gate: bool) -> Iterator[Activation]:
    kinds: tuple[Kind, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
    slopes = (1.0, 1.702, *numbers)
    limits = (math.inf, *numbers) if has_gate else (math.inf,)
    for limit, offset, kind in product(limits, (0.0, 1.0), kinds):
        for slope in slopes if kind == "silu" else (1.0,):
            yield Activation(kind, slope, limit, limit, offset)
    for gate_cap, up_cap in product(numbers, numbers):
        yield Activation("softcap_silu", 1.0, gate_cap, up_cap)


def _numbers(module: nn.Module) -> Iterator[float]:
    """The positive numbers that the module and those inside it hold as attributes."""
    for part in module.modules():
        for value in vars(part).values():
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            if plain and math.isfinite(value) and value > 0:
                yield float(value)


def _grid(numbers: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of gate and up from 0 to beyond the numbers that may be limits, both signs."""
    limits = [value for value in numbers if value <= _LARGEST_LIMIT]
    points = [0.0, 0.01, 0.3, 1.0, 2.0, 3.7, 5.0, 8.0, 12.0]
    points += [value * factor for value in limits for factor in (0.9, 1.0, 1.1, 2.0)]
    both = sorted({sign * point for point in points for sign in (-1.0, 1.0)})
    line = torch.tensor(both, device="cpu")
    gate, up = torch.meshgrid(line, line, indexing="ij")
    return gate.reshape(-1), up.reshape(-1)


# Sizes of the model are numbers of the module too.
_LARGEST_LIMIT = 64.0
