"""Finds zeros in an adapter's matrices that training does not leave."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from ktrt.adapter.tensors import AdapterTensor

logger = logging.getLogger(__name__)

_SECOND = re.compile(r"lora_B|lora_embedding_B|(?:gate|up|down)_lora_b")


def warn_of_zeros(file: Path, tensors: Sequence[AdapterTensor]) -> dict[str, int]:
    """Warns of B that is zero or mostly zero; returns the number of zero rows of the latter, by
    key.

    LoRA starts with B = 0: training never reached a zero B. If half the rows or more are exactly
    zero, only one process of several saved its shard (FSDP2).
    """
    second = [tensor for tensor in tensors if _SECOND.fullmatch(tensor.part)]
    counts = {tensor.key: _zero_rows(tensor.value) for tensor in second}
    zero = [key for key, (count, rows) in counts.items() if count == rows]
    if zero:
        logger.warning(
            "%s: %d of %d lora_B tensors are all zero (first %s): this adapter changes nothing "
            "there", file, len(zero), len(second), zero[0],
        )  # fmt: skip
    partly = {
        key: found for key, found in counts.items() if found[1] <= 2 * found[0] < 2 * found[1]
    }
    if partly:
        key, (count, rows) = next(iter(partly.items()))
        logger.warning(
            "%s: most rows of %d of %d lora_B tensors are exactly zero (first %s: %d of %d rows). "
            "Training does not do that; probably only one process of several saved its shard "
            "(FSDP2). This adapter changes next to nothing there: save the full state again",
            file, len(partly), len(second), key, count, rows,
        )  # fmt: skip
    return {key: count for key, (count, _) in partly.items()}


def _zero_rows(value: torch.Tensor) -> tuple[int, int]:
    """Returns (zero rows, rows). Stacked experts that are all zero do not count, unless all are:
    an expert without any routed token stays zero."""
    rows = value.any(-1)
    if value.ndim > 2:
        used = rows.flatten(1).any(1)
        rows = rows[used] if bool(used.any()) else rows
    return rows.numel() - int(rows.sum()), rows.numel()
