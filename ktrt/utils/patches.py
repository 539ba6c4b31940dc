"""Lists changes of other libraries' objects, so that ``close`` can undo them.

Attributes belong to the objects of one model. Entries belong to tables of the process, which
several models change at once and restore in any order.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, MutableMapping

_ABSENT: Any = object()
_LOCK = threading.RLock()


@dataclass
class _Entry:
    """One key of a table: its value before any patch, and the patches' values, newest last, each in
    a list that identifies it."""

    mapping: MutableMapping[Any, Any]
    key: Hashable
    original: Any
    values: list[list[Any]] = field(default_factory=list)

    def write(self) -> None:
        """Puts the newest value in place, or the original."""
        value = self.values[-1][0] if self.values else self.original
        if value is _ABSENT:
            self.mapping.pop(self.key, None)
        else:
            self.mapping[self.key] = value


# The patched entries of the whole process. A table lives as long as one of its entries is here.
_entries: dict[tuple[int, Hashable], _Entry] = {}


class Patches:
    """The patches of one model. ``undo``, also at the end of a ``with``, reverts all of them."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of an object, a class or a module. It is undone unless others have set
        it since."""
        before = vars(owner).get(name, _ABSENT)
        if isinstance(inspect.getattr_static(type(owner), name, None), property):
            before = getattr(owner, name)
        setattr(owner, name, value)
        # Weakly: an unloaded adapter's modules, and their forwards, must be freed before ``undo``.
        self._undo.append(partial(_reset, _weakly(owner), name, _weakly(value), before))

    def entry(self, mapping: MutableMapping[Any, Any], key: Hashable, value: Any) -> None:
        """Sets a key of a table of the whole process. The newest of the remaining values is in
        place, in any order of undoing; after the last one, the original is back."""
        place, mine = (id(mapping), key), [value]
        with _LOCK:
            entry = _entries.get(place) or _Entry(mapping, key, mapping.get(key, _ABSENT))
            entry.values.append(mine)
            _entries[place] = entry
            entry.write()

        def undo() -> None:
            with _LOCK:
                in_place = entry.values[-1][0]
                entry.values[:] = [each for each in entry.values if each is not mine]
                if mapping.get(key, _ABSENT) is in_place:
                    entry.write()
                if not entry.values:
                    _entries.pop(place, None)

        # Also when these patches are dropped without ``undo``. The table keeps neither them nor,
        # through them, the model.
        finalizer = weakref.finalize(self, undo)
        finalizer.atexit = False
        self._undo.append(finalizer)

    def add(self, undo: Callable[[], object]) -> None:
        """Adds a patch that is already made, such as a hook; ``undo`` reverts it."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Reverts everything, the newest first. Idempotent; a failure stops no other reversal."""
        failure: BaseException | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except BaseException as error:  # noqa: BLE001 - the others must be undone first
                failure = failure or error
        if failure is not None:
            raise failure


def _reset(
    owner_of: Callable[[], Any], name: str, value_of: Callable[[], Any], before: Any
) -> None:
    """Restores an attribute, unless its object has gone or others have set it since."""
    owner, value = owner_of(), value_of()
    if owner is None or getattr(owner, name, _ABSENT) is not value:
        return
    if before is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


def _weakly(thing: Any) -> Callable[[], Any]:
    """Returns a function that returns ``thing``, or None once it has gone."""
    try:
        return weakref.ref(thing)
    except TypeError:  # text, numbers, None
        return lambda: thing
