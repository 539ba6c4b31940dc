"""Torch's thread count. No other module sets it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def set_torch_threads(count: int) -> int:
    """Sets how many threads run the operations that this thread calls; returns the count before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    return before


class TorchLimit:
    """An upper limit on torch's thread count that several models share. The last release restores
    the earlier count, unless somebody else has changed it since."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before = self._set = 0

    def hold(self, most: int) -> Callable[[], None]:
        """Lowers the count to ``most``; calling the result releases the limit."""
        with self._lock:
            now = torch.get_num_threads()
            if not self._holders:
                if most >= now:
                    return lambda: None
                self._before = now
            self._holders += 1
            if most < now:
                set_torch_threads(most)
            self._set = min(most, now)
        return self._release

    def _release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders and torch.get_num_threads() == self._set:
                set_torch_threads(self._before)


torch_limit = TorchLimit()
