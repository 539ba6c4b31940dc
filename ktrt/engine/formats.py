"""The engine's weight formats: rows of its table, by name and by kt_backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt import _core

if TYPE_CHECKING:
    from ktrt._core import WeightFormat

FORMATS: dict[str, WeightFormat] = {row.name: row for row in _core.weight_formats()}
BACKENDS: dict[str, WeightFormat] = {row.kt_backend: row for row in FORMATS.values()}
