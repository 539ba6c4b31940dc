"""A step of the model: the next tokens of one sequence or of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.engine.step_rows import ACTIVE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ktrt.kv.pool import Slot


class StepStopped(Exception):  # noqa: N818 - nothing went wrong
    """Ends a step whose results nobody wants: raised by the ``watch`` of one of its spans."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """The next tokens ``ids`` of the sequence in ``slot``, one or more, with one adapter
    (``engine.step_rows``). ``logits``: the indices into ``ids``, ascending, of the tokens whose
    logits are wanted; None: the last one's. ``watch``: called between the layers of a long prompt,
    with how many of how many layers are done."""

    slot: Slot
    ids: Sequence[int]
    adapter: int = ACTIVE
    logits: Sequence[int] | None = None
    watch: Callable[[int, int], None] | None = None

    @property
    def wanted(self) -> Sequence[int]:
        """Returns ``logits``, with None spelled out."""
        return (len(self.ids) - 1,) if self.logits is None else self.logits


@dataclass(frozen=True)
class Step:
    """Spans of different slots."""

    spans: tuple[Span, ...]
