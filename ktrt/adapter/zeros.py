"""Zeros in an adapter's matrices that training does not leave there."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from ktrt.adapter.read import AdapterTensor

logger = logging.getLogger(__name__)

_SECOND = re.compile(r"lora_B|lora_embedding_B|(?:gate|up|down)_lora_b")


def warn_of_zeros(file: Path, tensors: Sequence[AdapterTensor]) -> dict[str, int]:
    """LoRA starts with B = 0: where it still is, training never reached it. B of which half the
    rows or more are exactly zero was saved by one process of several (FSDP2). Warns of both;
    returns how many rows are zero, by key, for the latter."""
    second = [tensor for tensor in tensors if _SECOND.fullmatch(tensor.part)]
    zero = [tensor.key for tensor in second if not tensor.value.any()]
    if zero:
        logger.warning(
            "%s: %d of %d lora_B tensors are all zero (first %s): this adapter changes nothing "
            "there", file, len(zero), len(second), zero[0],
        )  # fmt: skip
    partly = {tensor.key: found for tensor in second if (found := _zero_rows(tensor.value))[0]}
    if partly:
        key, (count, rows) = next(iter(partly.items()))
        logger.warning(
            "%s: most rows of %d of %d lora_B tensors are exactly zero (first %s: %d of %d rows). "
            "Training does not do that; probably only one process of several saved its part "
            "(FSDP2). This adapter changes next to nothing there: save the full state again",
            file, len(partly), len(second), key, count, rows,
        )  # fmt: skip
    return {key: count for key, (count, _) in partly.items()}


def _zero_rows(value: torch.Tensor) -> tuple[int, int]:
    """(zero rows, rows) if half of them or more, but not all, are zero; else (0, rows). Of stacked
    experts only those with any number count: one that was never routed to stays zero."""
    if value.ndim > 2:
        value = value[value.flatten(1).any(1)]
    rows = value.any(-1)
    count = rows.numel() - int(rows.sum())
    suspect = rows.numel() <= 2 * count < 2 * rows.numel()
    return (count if suspect else 0), rows.numel()
