"""The version of a model's active adapters, for everything that depends on them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


class ActiveSet:
    """The version of a model's active adapters.

    KV caches, recorded steps, graphs and the LoRA of linear layers keep the version of their
    creation and compare it; none of them looks into PEFT's layers to notice a change. ``adapters``
    writes it, after a change and before the next forward.
    """

    def __init__(self) -> None:
        # Equal versions mean equal numbers: a return to an earlier set returns to its version.
        self.version = 0
        # Counts changes, including returns: for memory that is rewritten at every change.
        self.changes = 0
        # Counts changes of an adapter's own numbers: anything made from them must be made again.
        self.renewals = 0
        # The engine's numbers of the resident adapters: a row of a step may name any of them.
        self.numbers: frozenset[int] = frozenset()
        # Whether rows of a batch have their own adapters: no step of one row can then be recorded.
        self.by_row = False
        self._versions: dict[Hashable, int] = {(): 0}
        self._last = 0
        self._on_modules: list[Callable[[], object]] = []

    def become(self, key: Hashable) -> None:
        """Takes the version of the set ``key``: the old one, if the set was active before."""
        before = self.version
        if key not in self._versions:
            self._last += 1
            self._versions[key] = self._last
        self.version = self._versions[key]
        self.changes += self.version != before

    def renew(self) -> None:
        """Outdates all versions: numbers have changed, with the same adapters and weights."""
        self._versions.clear()
        self._last += 1
        self.version = self._last
        self.changes += 1
        self.renewals += 1

    def add_modules(self) -> None:
        """Calls everybody who wraps modules: an adapter was loaded, and there may be new ones."""
        for call in list(self._on_modules):
            call()

    def on_modules(self, call: Callable[[], object]) -> Callable[[], None]:
        """Has ``add_modules`` call ``call``; the result of this takes it off the list again."""
        self._on_modules.append(call)
        return partial(self._on_modules.remove, call)
