"""Damaged files: the inputs that once failed, and a few new ones with a fixed seed."""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING

import pytest
from helpers.file_fuzz import Kind, make_kinds, mutate

if TYPE_CHECKING:
    from pathlib import Path

NAMES = (
    "config", "weights", "adapter_config", "adapter_weights", "settings", "conversation",
    "manifest",
)  # fmt: skip
# One check of a model takes 50 ms, of an adapter 20.
COUNTS = {"config": 15, "weights": 15, "adapter_config": 20, "adapter_weights": 20}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return {kind.name: kind for kind in make_kinds(tmp_path_factory.mktemp("files"))}


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused(kinds: dict[str, Kind], name: str) -> None:
    kind = kinds[name]
    assert kind.run(kind.whole) is None
    for data in kind.inputs():
        kind.run(data)
    rng, refused = random.Random(zlib.crc32(name.encode())), 0
    for _ in range(COUNTS.get(name, 200)):
        refused += kind.run(mutate(kind, kind.whole, rng)) is not None
    assert refused, "nothing was damaged"


def test_every_kind_is_tried(kinds: dict[str, Kind], tmp_path: Path) -> None:
    assert tuple(kinds) == NAMES
