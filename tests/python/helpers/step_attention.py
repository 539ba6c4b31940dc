"""Attention of a step of many sequences by torch alone, for models on the CPU without an engine."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ktrt.engine.recording import active
from ktrt.engine.step_rows import RunningStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktrt.engine.step_rows import StepRows

NAME = "step_attention"


@contextmanager
def step_attention(model: Any) -> Iterator[RunningStep]:
    """Within the block ``model`` attends by steps, and otherwise as with sdpa; yields the step."""
    running, before = RunningStep(), model.config._attn_implementation
    table, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, scaling: float | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        rows = running.rows
        if rows is None or not (rows.decode or rows.spans):
            return sdpa_attention_forward(
                module, query, key, value, mask, scaling=scaling, **options
            )
        rows.attended += 1
        return _attend(rows, query, key, value, scaling), None

    table[NAME], masks[NAME] = attention, sdpa_mask
    model.config._attn_implementation = NAME
    try:
        yield running
    finally:
        model.config._attn_implementation = before
        del table[NAME], masks[NAME]


def _attend(
    rows: StepRows, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    def bind(out: torch.Tensor) -> Callable[[], None]:
        return lambda: _fill(rows, out, query, key, value, scaling)

    shape = 1, query.shape[2], query.shape[1], value.shape[-1]
    if (recorder := active()) is not None:
        return recorder.call(shape, (query, key, value), bind)
    out = query.new_empty(shape)
    bind(out)()
    return out


def _fill(
    rows: StepRows, out: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, scaling: float | None,
) -> None:  # fmt: skip
    places = [
        (at, 1, int(slot), int(length) - 1)
        for at, (slot, length) in enumerate(zip(rows.slots, rows.lengths, strict=True))
    ]
    places += [(span.first, span.count, span.slot, span.start) for span in rows.spans]
    with torch.inference_mode():
        for first, count, slot, start in places:
            # Query by query: the same bits whatever the span.
            for at in range(first, first + count):
                end = start + 1 + at - first
                if end <= 0:
                    out[0, at] = 0
                    continue
                groups = query.shape[1] // key.shape[1]
                keys = key[slot, :, :end].repeat_interleave(groups, 0)
                values = value[slot, :, :end].repeat_interleave(groups, 0)
                factor = query.shape[-1] ** -0.5 if scaling is None else scaling
                scores = (keys.float() @ query[0, :, at, :, None].float()) * factor
                out[0, at] = (scores.softmax(1) * values.float()).sum(1)
