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
        entry = self._header[name]
        dtype = _BF16 if entry["dtype"] == "BF16" else _PLAIN.get(entry["dtype"])
        if dtype is None:
            raise CannotVerifyError(
                f"{self.file}: {name} has dtype {entry['dtype']}; only BF16, F16, F32 and F64 can "
                "be verified."
            )
        shape = self.shapes[name]
        offset = self._start + entry["data_offsets"][0]
        if row is not None:
            shape = shape[1:]
            offset += row * int(np.prod(shape)) * dtype.itemsize
        count = int(np.prod(shape))
        numbers = np.fromfile(self.file, dtype, count, offset=offset)
        if numbers.size != count:
            raise CannotVerifyError(f"{self.file} ends inside {name}.")
        if dtype == _BF16:  # the upper half of a float32
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        values: Float32 = numbers.astype(np.float32, copy=False).reshape(shape)
        return values
