"""The tokens of many sequences in one forward, by a recorded step where all are decode rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.kv.static import CannotMixError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ktrt.generate.forwards import Forwards, Part
    from ktrt.generate.row_steps import RowSteps
    from ktrt.kv.static import StaticKv


class Mixed:
    """``rows``: the recorded steps; None: the model itself runs every step."""

    def __init__(self, forwards: Forwards, cache: StaticKv, rows: RowSteps | None) -> None:
        self._forwards, self._cache, self.rows = forwards, cache, rows
        # Whether the model has shown that its attention knows the step.
        self._proven = False

    @property
    def count(self) -> int:
        """Recordings that can be replayed."""
        return 0 if self.rows is None else self.rows.count

    def clear(self) -> None:
        """Forgets the recordings, which have seen other adapters."""
        if self.rows is not None:
            self.rows.clear()

    def run(self, parts: Sequence[Part], *, changed: bool) -> list[torch.Tensor]:
        """Returns the wanted logits of each part; ``changed``: the adapters have. A failed
        recording leaves other sequences as they were, and these as the forward leaves them.

        ``CannotMixError``: the model cannot run such forwards, and has computed nothing.
        """
        if len(parts) == 1:
            return self._ordered(parts, changed=changed)
        order = sorted(range(len(parts)), key=lambda at: not parts[at].is_row)
        logits = self._ordered([parts[at] for at in order], changed=changed)
        found = dict(zip(order, logits, strict=True))
        return [found[at] for at in range(len(parts))]

    def _ordered(self, parts: Sequence[Part], *, changed: bool) -> list[torch.Tensor]:
        logits = None if changed else self._recorded(parts)
        return self._many(parts) if logits is None else logits

    def _recorded(self, parts: Sequence[Part]) -> list[torch.Tensor] | None:
        rows = all(part.is_row and part.span.logits is None for part in parts)
        if self.rows is None or not rows or not self.rows.usable or not self._proven:
            return None
        if self.rows.proven:
            return self.rows.run(parts, self._forwards.latest)
        logits = self._many(parts)
        return logits if self.rows.prove(parts, logits) else None

    def _many(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        try:
            logits = self._forwards.many(parts, self._cache, proven=self._proven)
        except Exception as error:
            if self._proven:
                raise
            # Most likely an attention that takes other shapes; if not, the forwards one by one
            # fail as well.
            raise CannotMixError(str(error)) from error
        self._proven = True
        return logits
