"""Writes targets, ranks and alphas of modules for adapter_config.json."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence


@dataclass(frozen=True)
class ScaledName:
    """A module or parameter with LoRA, by the name that patterns match."""

    name: str
    rank: int
    alpha: float


def shortest_names(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """Returns the shortest suffixes that name each of ``chosen``, by PEFT's rule for targets, and
    none of ``others``; sorted, each once."""
    wrong = {suffix for name in others for suffix in _suffixes(name)}
    found = {
        next((suffix for suffix in _suffixes(name) if suffix not in wrong), name) for name in chosen
    }
    return sorted(found)


def _suffixes(name: str) -> Iterator[str]:
    """Yields the last word, the last two, …, all."""
    words = name.split(".")
    return (".".join(words[start:]) for start in range(len(words) - 1, -1, -1))


def scale_config(
    names: Sequence[ScaledName], default: tuple[int, float] | None = None
) -> dict[str, Any]:
    """Returns r, lora_alpha, rank_pattern and alpha_pattern for these names. ``default``: r and
    lora_alpha (None: the most frequent)."""
    ranks = Counter((each.rank, each.alpha) for each in names)
    rank, alpha = default or ranks.most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": plain(alpha),
        "rank_pattern": _pattern({each.name: each.rank for each in names}, rank),
        "alpha_pattern": _pattern({each.name: plain(each.alpha) for each in names}, alpha),
    }


def _pattern(values: dict[str, Any], default: float) -> dict[str, Any]:
    pattern = {}
    for value in sorted(set(values.values()) - {default}):
        chosen = [name for name, each in values.items() if each == value]
        others = [name for name, each in values.items() if each != value]
        pattern.update({re.escape(name): value for name in shortest_names(chosen, others)})
    return pattern


def plain(value: float) -> float:
    """Converts whole numbers to integers."""
    return int(value) if value == int(value) else value


def alpha_for(scaling: float, rank: int, use_rslora: bool) -> float:
    """Returns the alpha, with few digits if possible, that gives this ``scaling`` in float32.

    Raises ``AdapterError`` if there is none.
    """
    divisor = math.sqrt(rank) if use_rslora else rank
    exact = scaling * divisor
    candidates = [round(exact, digits) for digits in range(16)]
    candidates += [exact, math.nextafter(exact, 0), math.nextafter(exact, math.inf)]
    for alpha in candidates:
        if alpha > 0 and _float32(alpha / divisor) == _float32(scaling):
            return plain(alpha)
    raise AdapterError(
        f"no lora_alpha of rank {rank} gives a scaling of {scaling}; expected a normal number"
    )


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def target_config(
    modules: Collection[str],
    all_modules: Iterable[str],
    parameters: Collection[str],
    all_parameters: Iterable[str],
) -> dict[str, Any]:
    """Returns target_modules and target_parameters that name exactly these of all; they replace a
    writer's settings of layers and exclusions."""
    return {
        "target_modules": shortest_names(modules, set(all_modules) - set(modules)),
        "target_parameters": shortest_names(parameters, set(all_parameters) - set(parameters))
        or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
