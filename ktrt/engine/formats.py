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
    from collections.abc import Iterable

    from ktrt._core import WeightFormat

FORMATS: tuple[WeightFormat, ...] = tuple(_core.weight_formats())
# No format of the engine's: each layer as the checkpoint stores it.
AUTO = "auto"
PLAIN = "bf16"
# Rows of a strip, which is what one kernel call computes (csrc/layout/packed_layout.h).
STRIP_ROWS = 32


def formats_of(kt_backend: str) -> list[WeightFormat]:
    """The formats that a kt_backend names; of several, the checkpoint has one. ``KtrtError``: the
    engine has none."""
    backends = dict.fromkeys(each.kt_backend for each in FORMATS)
    if kt_backend not in backends:
        raise KtrtError(f"kt_backend: expected one of {', '.join(backends)}, found {kt_backend}")
    return [each for each in FORMATS if each.kt_backend == kt_backend]


def format_of(kt_backend: str) -> WeightFormat:
    """The format of a kt_backend that weights in floats are packed in. ``KtrtError``: none is."""
    return formats_of(kt_backend)[0]


def format_named(name: str) -> WeightFormat:
    """The format of this name: ``bf16``. ``KtrtError``: there is none."""
    formats = {each.name: each for each in FORMATS}
    if name not in formats:
        raise KtrtError(f"weight format: expected one of {', '.join(formats)}, found {name}")
    return formats[name]


def backend_of(names: Iterable[str]) -> str:
    """The kt_backend of layers in these formats: the only one apart from BF16, or ``AUTO``."""
    backends = {format_named(name).kt_backend for name in names if name != PLAIN}
    if not backends:
        return format_named(PLAIN).kt_backend
    return backends.pop() if len(backends) == 1 else AUTO


def joined(names: Iterable[str]) -> str:
    """The formats of a model's layers as one word: ``bf16+fp8``."""
    return "+".join(sorted(set(names)))


def kt_name(kt_backend: str) -> str:
    """A kt_backend in KTransformers' words for kt_expert_weight_format: ``int8``."""
    return kt_backend.lower().removeprefix("amx")


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
