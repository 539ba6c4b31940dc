"""Tests of ktrt.utils.patches and of what a loaded model leaves in transformers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ktrt.utils.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Sequence


class Thing:
    def __init__(self) -> None:
        self.stored = "before"

    @property
    def value(self) -> str:
        return self.stored

    @value.setter
    def value(self, value: str) -> None:
        self.stored = value

    def method(self) -> str:
        return "method"


def test_attributes_come_back() -> None:
    thing, bare = Thing(), SimpleNamespace()
    before = dict(vars(thing))
    with Patches() as patches:
        patches.set(thing, "value", "other")
        patches.set(thing, "method", lambda: "patched")
        patches.set(thing, "method", lambda: "again")
        patches.set(Thing, "new", 1)
        patches.set(bare, "name", None)
        assert (thing.value, thing.method(), bare.name) == ("other", "again", None)
    assert vars(thing) == before
    assert not hasattr(Thing, "new")
    assert not vars(bare)
    patches.undo()


def test_later_settings_of_others_stay() -> None:
    thing, table = Thing(), {"key": 1}
    with Patches() as patches:
        patches.set(thing, "stored", "ours")
        patches.entry(table, "key", 2)
        thing.stored, table["key"] = "theirs", 3
    assert thing.stored == "theirs"
    assert table == {"key": 3}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_entries_are_given_back_in_any_order(order: Sequence[int]) -> None:
    table: dict[str, Any] = {"old": "original"}
    models = [Patches() for _ in range(3)]
    for number, patches in enumerate(models):
        patches.entry(table, "old", number)
        patches.entry(table, "new", number)
    left = {0, 1, 2}
    for number in order:
        assert table == {"old": max(left), "new": max(left)}
        models[number].undo()
        left.remove(number)
    assert table == {"old": "original"}


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failure_keeps_no_other_patch(kind: type[BaseException]) -> None:
    thing, patches = Thing(), Patches()
    patches.set(thing, "stored", "ours")

    def fail() -> None:
        raise kind

    patches.add(fail)
    patches.set(thing, "extra", 1)
    with pytest.raises(kind):
        patches.undo()
    assert vars(thing) == {"stored": "before"}
