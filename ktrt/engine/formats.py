"""The engine's weight formats. ``_core`` states their traits; Python reads them here.

Nothing else in Python lists the formats or tells them apart, but for two tables that tests compare
with these: the user's names (``ktrt.config``), and the errors that each format may make
(``ktrt.audit.verify``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt import _core
from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from ktrt._core import WeightFormat

_ALL: tuple[WeightFormat, ...] = tuple(_core.weight_formats())
FORMATS = tuple(each for each in _ALL if not each.coded)
# Rows of a strip, which is what one kernel call computes (csrc/layout/packed_layout.h).
STRIP_ROWS = 32


def format_of(kt_backend: str) -> WeightFormat:
    """The format that a kt_backend names. ``KtrtError``: none does."""
    return _find("kt_backend", kt_backend, {each.kt_backend: each for each in FORMATS})


def format_named(name: str) -> WeightFormat:
    """The format of this name: ``bf16``. ``KtrtError``: there is none."""
    return _find("weight format", name, {each.name: each for each in _ALL})


def _find(what: str, name: str, formats: dict[str, WeightFormat]) -> WeightFormat:
    if name not in formats:
        raise KtrtError(f"{what}: expected one of {', '.join(formats)}, found {name}")
    return formats[name]


def is_quantized(weight_format: WeightFormat) -> bool:
    """Whether codes have a scale per row; they are multiplied with INT8 codes of the inputs."""
    return weight_format.quantizes_rows


def padded_shape(weight_format: WeightFormat, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a packed matrix with its padding."""
    return round_up(rows, STRIP_ROWS), round_up(columns, weight_format.tile_columns)


def code_bytes(weight_format: WeightFormat, rows: int, columns: int) -> int:
    """Bytes of a packed matrix's codes, padding included."""
    return weight_format.code_bytes(rows, columns)


def round_up(value: int, unit: int) -> int:
    """The least multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit
