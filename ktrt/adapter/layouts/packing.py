"""Decides how the columns of a stacked lora_B [out, rank·experts] are packed (layout b).

Rank-major, PEFT's packing: column j·E + e is rank j of expert e. Grouped by expert: column e·r + j;
Unsloth trained so from 2026-02 to 2026-09, with PEFT's names and shapes, and has written
``lora_B_layout`` into adapter_config.json since. A is expert-major in both.

The first of these decides: the option, adapter_config.json, exactly zero columns (an expert without
any routed token keeps all of its columns at zero), Unsloth's entry in auto_mapping.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ktrt.adapter.files.config import Packing
    from ktrt.adapter.files.settings import LoraSettings

logger = logging.getLogger(__name__)

_OPTION = "lora_B_layout: grouped_by_expert (or rank_major)"


@dataclass(frozen=True)
class StackedB:
    """A stacked lora_B with its lora_A, the sizes, and its name for messages."""

    where: str
    value: torch.Tensor
    a: torch.Tensor
    num_experts: int
    rank: int


def decide_packing(stacks: Sequence[StackedB], settings: LoraSettings) -> Packing:
    """Returns one packing for a whole adapter. If nothing in the files decides, warns with both
    readings and the option, and adds the warning to ``settings.notes``."""
    stacks = [each for each in stacks if each.num_experts > 1 and each.rank > 1]
    if not stacks:
        return "rank_major"  # with rank 1 or one expert both packings are equal
    said = settings.packing_option or settings.lora_b_layout
    shown = {packing for each in stacks if (packing := packing_by_zeros(each)) is not None}
    if said is not None:
        if shown and said not in shown:
            _note(
                settings,
                f"{stacks[0].where} is read as {said}, as lora_B_layout says, but columns that are "
                f"exactly zero look like {min(shown)}",
            )
        return said
    if len(shown) == 1:
        return shown.pop()
    if settings.packs_as_peft and not shown:
        return "rank_major"
    assumed: Packing = "grouped_by_expert" if settings.is_unsloth else "rank_major"
    mark = "Unsloth's mark, but no lora_B_layout" if settings.is_unsloth else "no lora_B_layout"
    _note(
        settings,
        f"{stacks[0].where}: the columns of lora_B may be rank-major (PEFT) or grouped by expert "
        f"(Unsloth before 2026-09); {settings.file} has {mark}. Assumed: {assumed}. If answers are "
        f"poor, set {_OPTION} in the YAML or in {settings.file.name}",
    )
    return assumed


def _note(settings: LoraSettings, text: str) -> None:
    logger.warning("%s", text)
    settings.notes.append(text)


def packing_by_zeros(stack: StackedB) -> Packing | None:
    """Returns the packing in which the exactly zero columns form whole experts, or whole ranks that
    are zero in A too (a smaller rank, padded); None if that holds for both or neither."""
    zero, count, rank = ~stack.value.any(0), stack.num_experts, stack.rank
    if zero.numel() != rank * count or stack.a.shape[:1] != (rank * count,):
        return None  # refused later, by shape
    if not zero.any() or zero.all():
        return None
    padded = ~stack.a.reshape(count, rank, -1).any(2).any(0)
    rank_major = _is_whole(zero.view(rank, count).T, padded)
    grouped = _is_whole(zero.view(count, rank), padded)
    if rank_major == grouped:
        return None
    return "rank_major" if rank_major else "grouped_by_expert"


def _is_whole(zero: torch.Tensor, padded: torch.Tensor) -> bool:
    """Returns whether the set entries [expert, rank] form whole experts, or padded ranks."""
    experts, ranks = zero.all(1), zero.all(0)
    if bool((experts == zero.any(1)).all()):
        return True
    return bool((ranks == zero.any(0)).all() and padded[ranks].all())


def to_rank_major(b: torch.Tensor, packing: Packing, num_experts: int) -> torch.Tensor:
    """Returns B with PEFT's order of columns."""
    if packing == "rank_major":
        return b
    return b.reshape(b.shape[0], num_experts, -1).transpose(1, 2).reshape(b.shape)


def check_option(option: Packing | None, settings: LoraSettings) -> None:
    """Raises ``AdapterError`` if the user's lora_B_layout contradicts the adapter's."""
    if option and settings.lora_b_layout and option != settings.lora_b_layout:
        raise AdapterError(
            f"lora_B_layout is {option} in the configuration, but {settings.file} says "
            f"{settings.lora_b_layout}: remove the wrong one."
        )
    settings.packing_option = option
