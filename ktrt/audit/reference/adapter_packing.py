"""Decides again, independently, if columns of stacked lora_B are grouped by expert or by rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ktrt.audit.reference.tensors import CannotVerifyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ktrt.audit.reference.tensors import Float32

_NAMES = {"grouped_by_expert": True, "rank_major": False}


class Grouping(NamedTuple):
    """``assumed``: description of an assumption that the files do not state; else empty."""

    by_expert: bool
    assumed: str = ""


def find_grouping(
    config: Mapping[str, Any],
    option: str | None,
    stacks: Iterable[tuple[Float32, Float32]],
    count: int,
) -> Grouping:
    """Decides for all stacked A [count · rank, in], B [out, rank · count] of an adapter."""
    said = option or config.get("lora_B_layout")
    if said is not None:
        if said not in _NAMES:
            raise CannotVerifyError(f"lora_B_layout is {said!r}; expected one of {list(_NAMES)}.")
        return Grouping(_NAMES[said])
    stacks = [(a, b) for a, b in stacks if count > 1 and b.shape[1] > count]
    if not stacks:
        return Grouping(False)
    answers = {answer for a, b in stacks if (answer := _by_zeros(a, b, count)) is not None}
    if len(answers) == 1:
        return Grouping(answers.pop())
    mapping = config.get("auto_mapping")
    by_expert = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    if not by_expert and not answers and "auto_mapping" in config:
        return Grouping(False)  # PEFT wrote this configuration, and packs by rank
    word = "grouped by expert" if by_expert else "rank-major"
    return Grouping(by_expert, f"the columns of lora_B are {word} (lora_B_layout is not set)")


def _by_zeros(a: Float32, b: Float32, count: int) -> bool | None:
    """Decides by zero columns, which belong to experts without any routed token. In the right
    reading they form whole experts, or whole ranks that A lacks too."""
    columns = {int(c) for c in np.flatnonzero(~b.any(axis=0))}
    if not columns or len(columns) == b.shape[1] or len(a) != b.shape[1]:
        return None
    rank = b.shape[1] // count
    lacking = {j for j in range(rank) if not a[j::rank].any()}
    by_rank = [(c % count, c // count) for c in range(b.shape[1])]
    by_expert = [(c // rank, c % rank) for c in range(b.shape[1])]
    fits = [_makes_whole(columns, places, lacking) for places in (by_rank, by_expert)]
    return None if fits[0] == fits[1] else fits[1]


def _makes_whole(columns: set[int], places: list[tuple[int, int]], lacking: set[int]) -> bool:
    """Returns whether the columns form whole experts, or whole ranks in ``lacking``."""
    for which in (0, 1):
        chosen = {places[c][which] for c in columns}
        if which == 1 and not chosen <= lacking:
            return False
        if columns == {c for c, place in enumerate(places) if place[which] in chosen}:
            return True
    return False
