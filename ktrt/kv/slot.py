"""One sequence's place in a KV cache, and the tokens that it holds."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


class Slot:
    """One sequence's place. Only the pool and the runner change it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.key: Hashable = None
        # Whether somebody has opened it.
        self.in_use = False
        # Tokens that it may grow to, as promised by ``KvPool.reserve``.
        self.promised = 0
        # The pool's count at the latest use.
        self.used = 0
        self._tokens = array("q")
        self._prompted = 0

    @property
    def ids(self) -> list[int]:
        """Returns the tokens that are held, a copy."""
        return self._tokens.tolist()

    @property
    def length(self) -> int:
        """How many tokens are held."""
        return len(self._tokens)

    @property
    def prompted(self) -> int:
        """How many of the first tokens were computed in chunks of a prompt: keys and values of
        decode steps have other last bits."""
        return min(self._prompted, len(self._tokens))

    def shared(self, ids: np.ndarray) -> int:
        """Returns how many of the first ``ids`` [n] int64 are the first tokens held."""
        size = min(len(ids), len(self._tokens))
        differ = np.frombuffer(self._tokens, np.int64, size) != ids[:size] if size else ids[:0]
        return int(differ.argmax()) if differ.any() else size

    def take(self) -> array[int]:
        """Returns the tokens, and holds none while a forward runs that may leave anything."""
        taken, self._tokens = self._tokens, array("q")
        return taken

    def put(
        self,
        tokens: array[int],
        more: Sequence[int] = (),
        *,
        as_prompt: bool = False,
        prompted: int | None = None,
    ) -> None:
        """Holds ``tokens``, of which the first ``prompted`` were computed in chunks of a prompt
        (None: as many as before), and ``more``; ``as_prompt``: so were these."""
        known = self._prompted if prompted is None else prompted
        self._prompted = min(known, len(tokens))
        if as_prompt and self._prompted == len(tokens):
            self._prompted += len(more)
        tokens.extend(more)
        self._tokens = tokens
