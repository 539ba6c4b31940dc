"""The tensors of a model folder as its readers see them: plain, quantised, or converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from ktrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ktrt.checkpoint.codes import Codes

FLOAT_DTYPES = ("F32", "F16", "BF16")
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredTensor(Protocol):
    """One logical tensor of a model folder, read on demand."""

    @property
    def file(self) -> Path:
        """The file, or one of the files, that hold it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """In safetensors' words, e.g. ``BF16``; ``F32`` if dequantised on reading."""

    @property
    def coded(self) -> str | None:
        """The engine's weight format that takes the tensor's codes; None if there is none."""

    @property
    def why_not_coded(self) -> str:
        """The reason if ``coded`` is None, for messages."""

    @property
    def transposed(self) -> bool:
        """Whether ``read`` returns matrices [in, out], the transposes of ``read_codes``."""

    @property
    def whole_blocks(self) -> bool:
        """Whether scales of FP8 codes are constant in blocks of 128 x 128 or multiples."""

    def read(self) -> torch.Tensor: ...

    def read_row(self, row: int) -> torch.Tensor:
        """Returns ``read()[row]`` without reading or dequantising the other rows."""

    def read_codes(self, row: int | None = None) -> Codes:
        """Returns the matrix, or matrix ``row`` of a stack, as shipped. Only if ``coded``."""


class _Uncoded:
    """Part of the classes below: a tensor that is no matrix of codes."""

    coded: str | None = None
    transposed = False
    whole_blocks = False

    def __init__(self, why_not_coded: str) -> None:
        self.why_not_coded = why_not_coded

    def read_codes(self, row: int | None = None) -> Codes:
        raise ValueError(f"not in codes: {self.why_not_coded}; row {row}")


class PlainTensor(_Uncoded):
    """A plain tensor of a safetensors file; ``handle`` is the open file."""

    def __init__(self, file: Path, handle: Any, name: str) -> None:
        self.file = file
        self._handle = handle
        self._name = name
        header = handle.get_slice(name)
        self.shape: tuple[int, ...] = tuple(header.get_shape())
        self.dtype = str(header.get_dtype())
        super().__init__(f"stored in {self.dtype}")

    def read(self) -> torch.Tensor:
        """Returns a view of the mapped file where possible."""
        tensor: torch.Tensor = self._handle.get_tensor(self._name)
        return tensor

    def read_row(self, row: int) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_slice(self._name)[row]
        return tensor


class ConvertedTensor(_Uncoded):
    """The result of transformers' own conversion of other tensors, always read whole."""

    def __init__(
        self, file: Path, dtype: str, shape: Sequence[int], convert: Callable[[], torch.Tensor]
    ) -> None:
        self.file, self.dtype, self.shape = file, dtype, tuple(shape)
        self._convert = convert
        super().__init__("transformers rearranges its numbers while loading")

    def read(self) -> torch.Tensor:
        return self._convert()

    def read_row(self, row: int) -> torch.Tensor:
        return self._convert()[row]


class TransposedTensor(ConvertedTensor):
    """transformers' transpose of a quantised ``source``, whose codes stay as they are."""

    def __init__(self, source: StoredTensor, made: ConvertedTensor) -> None:
        super().__init__(source.file, source.dtype, made.shape, made.read)
        self._source = source
        self.coded, self.why_not_coded = source.coded, source.why_not_coded
        self.transposed = not source.transposed
        self.whole_blocks = source.whole_blocks

    def read_row(self, row: int) -> torch.Tensor:
        return self._source.read_row(row).transpose(-1, -2)

    def read_codes(self, row: int | None = None) -> Codes:
        return self._source.read_codes(row)


class QuantizedTensor:
    """Base of the quantised tensors, which are read as float32 or as codes.

    ``why_not_coded``: why no weight format of the engine takes the codes; empty if ``coded``.
    """

    dtype = "F32"
    transposed = False
    whole_blocks = False

    def __init__(self, file: Path, shape: Sequence[int]) -> None:
        self.file = file
        self.shape = tuple(shape)
        self.coded: str | None = None
        self.why_not_coded = ""

    def read(self) -> torch.Tensor:
        raise NotImplementedError

    def read_row(self, row: int) -> torch.Tensor:
        return self.read()[row]

    def read_codes(self, row: int | None = None) -> Codes:
        raise NotImplementedError


def scale_groups(values: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Multiplies ``values`` [..., k] in place by ``scales`` [..., ⌈k / group⌉]; returns them."""
    k = values.shape[-1]
    if k % group:
        return values.mul_(scales.repeat_interleave(group, dim=-1)[..., :k])
    # Spread scales of float32 would cost eight times this multiplication.
    values.unflatten(-1, (-1, group)).mul_(scales[..., None])
    return values


def check_dtype(tensor: StoredTensor, name: str, expected: Sequence[str], advice: str = "") -> None:
    """Raises ``CheckpointError`` if the tensor's dtype is none of ``expected``."""
    if tensor.dtype not in expected:
        raise CheckpointError(
            f"{tensor.file}: {name} has dtype {tensor.dtype}, expected one of "
            f"{', '.join(expected)}.{advice}"
        )
