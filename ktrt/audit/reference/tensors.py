"""Reads safetensors files: 8 bytes with the header's length, JSON, then the numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Float32 = npt.NDArray[np.float32]

_PLAIN: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}
_BF16: np.dtype[Any] = np.dtype("<u2")
# Codes of quantised tensors. Formats of less than two bytes stay bytes.
_CODES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("U8", "I8", "F8_E4M3", "F8_E8M0", "F4"), np.dtype("u1")),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


class CannotVerifyError(KtrtError):
    """The independent check cannot read or compute this form of base or adapter."""


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ``CannotVerifyError`` if the file holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CannotVerifyError(f"{file} cannot be read ({error}).") from error
    if not isinstance(found, dict):
        raise CannotVerifyError(f"{file} holds no JSON object.")
    return found


class RawFile:
    """One safetensors file. ``shapes``: tensor name → shape."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except (OSError, ValueError, RecursionError) as error:
            raise CannotVerifyError(f"{file} is not a safetensors file ({error}).") from error
        if not isinstance(header, dict):
            raise CannotVerifyError(f"{file} is not a safetensors file (no header).")
        header.pop("__metadata__", None)
        self._header: dict[str, Any] = header
        self._start = 8 + length
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}

    def dtype(self, name: str) -> str:
        """Returns the dtype in safetensors' words."""
        return str(self._header[name]["dtype"])

    def read(self, name: str, row: int | None = None) -> Float32:
        """Returns the tensor, or ``tensor[row]`` without reading the rest, as a float32 copy."""
        dtype = _BF16 if self.dtype(name) == "BF16" else _PLAIN.get(self.dtype(name))
        if dtype is None:
            raise CannotVerifyError(
                f"{self.file}: {name} has dtype {self.dtype(name)}; only BF16, F16, F32 and F64 "
                "numbers, and codes with scales of known names, can be verified."
            )
        numbers = self._numbers(name, dtype, self.shapes[name], row)
        if dtype == _BF16:  # the upper half of a float32
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        values: Float32 = numbers.astype(np.float32, copy=False)
        return values

    def codes(self, name: str, row: int | None = None) -> npt.NDArray[Any]:
        """Returns the stored integers of the tensor, or of ``tensor[row]``. Raises
        ``CannotVerifyError`` for other numbers."""
        dtype = _CODES.get(self.dtype(name))
        if dtype is None:
            raise CannotVerifyError(
                f"{self.file}: {name} has dtype {self.dtype(name)}, expected one of "
                f"{', '.join(_CODES)}."
            )
        shape = self.shapes[name]
        if self.dtype(name) == "F4":  # two to a byte
            shape = (*shape[:-1], shape[-1] // 2)
        return self._numbers(name, dtype, shape, row)

    def _numbers(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], row: int | None
    ) -> npt.NDArray[Any]:
        offset = self._start + self._header[name]["data_offsets"][0]
        if row is not None:
            shape = shape[1:]
            offset += row * int(np.prod(shape)) * dtype.itemsize
        count = int(np.prod(shape))
        numbers = np.fromfile(self.file, dtype, count, offset=offset)
        if numbers.size != count:
            raise CannotVerifyError(f"{self.file} ends inside {name}.")
        return numbers.reshape(shape)


def gate_and_up(rows: Float32, interleaved: bool) -> dict[str, Float32]:
    """Returns rows [2I, …] of both by projection: gate's first, or alternating."""
    if interleaved:
        return {"gate": rows[0::2], "up": rows[1::2]}
    gate, up = np.split(rows, 2)
    return {"gate": gate, "up": up}
