"""The form of an attention, as the call of transformers' attention interface says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

# Arguments that change a result in ways that ``AttentionForm`` does not know, unless they are
# nothing.
_OTHERS = (
    "dropout", "position_bias", "cache", "output_attentions", "indices", "block_indices",
)  # fmt: skip


@dataclass(frozen=True)
class AttentionForm:
    """``softmax(cap(scaling · q · k))``, over the last ``window`` positions (0: all), its own
    included; ``cap(s) = softcap · tanh(s / softcap)`` where softcap is not 0; ``sinks`` [heads]: a
    score without a value for each head."""

    scaling: float
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def first_of(self, end: int) -> int:
        """Returns the first position that position ``end`` - 1 attends to."""
        return max(0, end - self.window) if self.window else 0


def is_nothing(value: object) -> bool:
    """Whether an argument of an attention changes nothing."""
    return value is None or value is False or (isinstance(value, int | float) and value == 0)


def form_of(
    query: torch.Tensor, scaling: float | None, options: Mapping[str, Any]
) -> AttentionForm | None:
    """Returns the form of a call of transformers' attention interface with ``query`` [..., size]
    and ``options``; None: it changes the result in another way."""
    if any(not is_nothing(options.get(name)) for name in _OTHERS):
        return None
    return AttentionForm(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        options.get("sliding_window") or 0,
        options.get("softcap") or 0.0,
        options.get("s_aux"),
    )
