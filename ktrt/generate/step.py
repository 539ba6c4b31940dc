"""A step of the model: the next tokens of one sequence or of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktrt.engine.step_rows import ACTIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.kv.pool import Slot


@dataclass(frozen=True, kw_only=True)
class Span:
    """The next tokens ``ids`` of the sequence in ``slot``, one or more, with one adapter
    (``engine.step_rows``). ``logits``: the indices into ``ids``, ascending, of the tokens whose
    logits are wanted; None: the last one's."""

    slot: Slot
    ids: Sequence[int]
    adapter: int = ACTIVE
    logits: Sequence[int] | None = None

    @property
    def wanted(self) -> Sequence[int]:
        """Returns ``logits``, with None spelled out."""
        return (len(self.ids) - 1,) if self.logits is None else self.logits


@dataclass(frozen=True)
class Step:
    """Spans of different slots."""

    spans: tuple[Span, ...]
