"""Compares arrays bit by bit, and lists of measurements by their medians."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A row of measurements is flagged from here on, in either direction.
TOLERANCE = 0.03


@dataclass(frozen=True)
class BitsRow:
    """One format and adapter on one ISA; ``difference`` is None where all bits are equal."""

    isa: str
    format: str
    adapter: str
    difference: str | None


def bits_rows(
    isa: str, old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]
) -> list[BitsRow]:
    """Compares logits with keys "format/adapter/forward", one row per format and adapter."""
    rows: dict[tuple[str, str], list[str]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        label, adapter, forward = key.split("/")
        found = rows.setdefault((label, adapter), [])
        if key not in old or key not in new:
            found.append(f"{forward}: only in the {'new' if key in new else 'old'} commit")
        elif difference := first_difference(old[key], new[key]):
            found.append(f"{forward}, {difference}")
    return [BitsRow(isa, *key, "; ".join(found) or None) for key, found in rows.items()]


def first_difference(old: np.ndarray, new: np.ndarray) -> str | None:
    """Describes the first value with other bits (−0 and 0 differ, equal NaNs do not)."""
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"{old.dtype}{list(old.shape)} became {new.dtype}{list(new.shape)}"
    integer = f"u{old.dtype.itemsize}"
    differs = np.ascontiguousarray(old).view(integer) != np.ascontiguousarray(new).view(integer)
    count = int(differs.sum())
    if count == 0:
        return None
    token, *rest = (int(i) for i in np.argwhere(differs)[0])
    first = (token, *rest)
    largest = float(np.abs(old[differs].astype(float) - new[differs].astype(float)).max())
    return (
        f"token {token}, id {', '.join(map(str, rest))}: {old[first]!s} became {new[first]!s} "
        f"({count} of {differs.size} values, by up to {largest:.3g})"
    )


@dataclass(frozen=True)
class SpeedRow:
    """A measurement of both commits; times in ms, ``ratio`` of the medians, new to old."""

    name: str
    old: float
    new: float
    ratio: float
    rounds: int

    @property
    def flagged(self) -> bool:
        return not 1 - TOLERANCE <= self.ratio <= 1 + TOLERANCE


def speed_rows(
    old: Sequence[Mapping[str, float]], new: Sequence[Mapping[str, float]]
) -> list[SpeedRow]:
    """Rows of the names that every round of both commits measured."""
    shared = [name for name in old[0] if all(name in each for each in [*old, *new])]
    rows = []
    for name in shared:
        before, after = (statistics.median(each[name] for each in runs) for runs in (old, new))
        rows.append(SpeedRow(name, before, after, after / before, len(old)))
    return rows


def missing_names(
    old: Sequence[Mapping[str, float]], new: Sequence[Mapping[str, float]]
) -> list[str]:
    """Names that only some rounds measured."""
    rounds = [*old, *new]
    names = dict.fromkeys(name for each in rounds for name in each)
    return [name for name in names if not all(name in each for each in rounds)]
