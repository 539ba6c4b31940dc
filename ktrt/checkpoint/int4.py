"""Symmetric INT4 matrices with a scale for each output row and group of columns.

Layouts: compressed-tensors' pack-quantized (``weight_packed``, ``weight_scale``,
``weight_shape``), and GPTQ (``qweight``, ``scales``, ``qzeros``, ``g_idx``) as AutoGPTQ, GPTQModel
and AutoRound write it. A word of 32 bits holds eight codes + 8, the first in its lowest bits:
consecutive columns of a row in the former, of the transposed matrix in the latter.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch

from ktrt.checkpoint.codes import GROUPS, Codes
from ktrt.checkpoint.stored import FLOAT_DTYPES, QuantizedTensor, check_dtype, scale_groups
from ktrt.errors import CheckpointError
from ktrt.folders.schemes import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ktrt.checkpoint.quantization import Quantization
    from ktrt.checkpoint.stored import StoredTensor

_PER_WORD = 8
# The engine's groups, the largest first.
_FORMATS = {group: name for name, group in sorted(GROUPS.items(), key=lambda each: -each[1])
            if name.startswith("int4")}  # fmt: skip
# Zero point 8 as GPTQ packs it: minus 1 in the first convention.
_ZEROS = {"gptq": 0x77, "gptq_v2": 0x88}


class Int4Tensor(QuantizedTensor):
    """A matrix [n, k] of INT4 codes and its scales, by ``group`` columns."""

    def __init__(
        self, name: str, codes: StoredTensor, n: int, k: int, scales: StoredTensor
    ) -> None:
        super().__init__(codes.file, (n, k))
        self._name, self._codes, self._scales = name, codes, scales
        self._group = 0

    def _settle_group(
        self, groups: int, scales_name: str, expected: str, claimed: Sequence[int]
    ) -> None:
        """Settles the columns of a group by the number of scales in a row. Several sizes fit where
        the last group is shorter: first the ``claimed`` ones, then the usual ones count."""
        k = self.shape[1]
        candidates = [size for size in (*claimed, *_FORMATS) if ceil(k / size) == groups]
        if groups and not k % groups:
            candidates.append(k // groups)
        if not candidates:
            raise CheckpointError(
                f"{self._scales.file}: {scales_name} has shape {list(self._scales.shape)}, "
                f"expected {expected} for {self._name}, which holds a matrix of "
                f"{list(self.shape)}, with groups of {' or '.join(map(str, claimed or _FORMATS))} "
                "columns."
            )
        self._group = candidates[0]
        self.coded = next((_FORMATS[size] for size in _FORMATS if not self._group % size), None)
        if self.coded is None:
            self.why_not_coded = (
                f"INT4 in groups of {self._group}: the engine takes multiples of "
                f"{', '.join(map(str, sorted(_FORMATS)))} columns"
            )

    @property
    def rounds_scales(self) -> bool:
        """Whether ``read_codes`` rounds the scales, once, since the engine keeps BF16."""
        return self.scale_dtype != "BF16"

    @property
    def scale_dtype(self) -> str:
        """In safetensors' words."""
        return self._scales.dtype

    def _read_pairs(self) -> torch.Tensor:
        """Returns uint8 [n, ⌈k / 2⌉], codes + 8, the first of two in the low half."""
        raise NotImplementedError

    def _read_scales(self) -> torch.Tensor:
        """Returns the scales [n, groups] in the file's dtype."""
        raise NotImplementedError

    def read(self) -> torch.Tensor:
        pairs, k = self._read_pairs(), self.shape[1]
        codes = torch.stack([pairs & 0x0F, pairs >> 4], dim=-1).flatten(1)[:, :k]
        values = codes.to(torch.float32).sub_(8)
        return scale_groups(values, self._read_scales().float(), self._group)

    def read_codes(self, row: int | None = None) -> Codes:
        assert row is None, "a matrix, not a stack"
        assert self.coded is not None, self.why_not_coded
        k, group = self.shape[1], GROUPS[self.coded]
        scales = self._read_scales().to(torch.bfloat16)
        scales = scales.repeat_interleave(self._group // group, dim=1)[:, : ceil(k / group)]
        # The highest bit alone differs between code + 8 and two's complement.
        codes = (self._read_pairs() ^ 0x88)[:, : ceil(k / 2)]
        return Codes(self.coded, codes.contiguous(), scales.contiguous())


class PackedInt4(Int4Tensor):
    """compressed-tensors' pack-quantized matrix; ``stem`` ends in "weight". ``shapes`` keeps what
    the first tensor of a packed shape says in ``weight_shape``; each is checked on reading."""

    def __init__(
        self,
        stem: str,
        stored: Mapping[str, StoredTensor],
        claims: Quantization,
        shapes: dict[tuple[int, ...], tuple[int, int]],
    ) -> None:
        name, scales = f"{stem}_packed", f"{stem}_scale"
        codes = stored[name]
        _require(name, codes, stored, (scales, f"{stem}_shape"))
        self._shape = stored[f"{stem}_shape"]
        self._shape_name = f"{stem}_shape"
        self._g_idx = stored.get(f"{stem}_g_idx")
        if codes.shape not in shapes:
            shapes[codes.shape] = self._read_shape(name, codes)
        n, k = shapes[codes.shape]
        super().__init__(name, codes, n, k, stored[scales])
        check_dtype(self._scales, scales, FLOAT_DTYPES)
        found = self._scales.shape
        self._settle_group(
            found[1] if len(found) == 2 and found[0] == n else 0, scales, f"[{n}, groups]",
            claims.group_sizes,
        )  # fmt: skip

    def _read_shape(self, name: str, codes: StoredTensor) -> tuple[int, int]:
        check_dtype(self._shape, self._shape_name, ("I32", "I64"))
        found = self._shape.read().flatten().tolist() if self._shape.shape == (2,) else []
        n, words = codes.shape if len(codes.shape) == 2 else (0, 0)
        if len(found) != 2 or found[0] != n or words < 1 or found[1] < 1:
            raise CheckpointError(
                f"{self._shape.file}: {self._shape_name} {list(self._shape.shape)} holds {found}, "
                f"expected [rows, columns] of {name} {list(codes.shape)}."
            )
        k = int(found[1])
        if ceil(k / _PER_WORD) != words:
            bits = next((b for b in range(1, 17) if ceil(k * b / 32) == words), None)
            if bits is None:
                raise CheckpointError(
                    f"{codes.file}: {name} has shape {list(codes.shape)}, expected "
                    f"[{n}, {ceil(k / _PER_WORD)}] by {self._shape_name} {found}."
                )
            scheme = f"compressed-tensors pack-quantized (INT{bits})"
            raise CheckpointError(refusal(codes.file, scheme, name, codes))
        return n, k

    def _read_pairs(self) -> torch.Tensor:
        if self._read_shape(self._name, self._codes) != self.shape:
            raise CheckpointError(
                f"{self._shape.file}: {self._shape_name} differs from the shape "
                f"{list(self.shape)} of other tensors of {list(self._codes.shape)} words."
            )
        if self._g_idx is not None:
            check_order(self._g_idx, self._name, self._group, self.shape[1], self._codes)
        return self._codes.read().view(torch.uint8)

    def _read_scales(self) -> torch.Tensor:
        return self._scales.read()


class GptqInt4(Int4Tensor):
    """GPTQ's matrix; ``module`` is its name with a dot at the end."""

    def __init__(
        self, module: str, stored: Mapping[str, StoredTensor], claims: Quantization
    ) -> None:
        name, scales = f"{module}qweight", f"{module}scales"
        codes = stored[name]
        _require(name, codes, stored, (scales, f"{module}qzeros"))
        self._zeros, self._zeros_name = stored[f"{module}qzeros"], f"{module}qzeros"
        self._g_idx = stored.get(f"{module}g_idx")
        self._convention = claims.checkpoint_format
        check_dtype(self._zeros, self._zeros_name, ("I32",))
        words, n = codes.shape if len(codes.shape) == 2 else (0, 0)
        self._check_bits(name, codes, n)
        super().__init__(name, codes, n, words * _PER_WORD, stored[scales])
        check_dtype(self._scales, scales, FLOAT_DTYPES)
        if self._g_idx is not None and self._g_idx.shape != self.shape[1:]:
            raise CheckpointError(
                f"{self._g_idx.file}: {module}g_idx has shape {list(self._g_idx.shape)}, expected "
                f"[{self.shape[1]}] for {name} {list(codes.shape)}."
            )
        found = self._scales.shape
        self._settle_group(
            found[0] if len(found) == 2 and found[1] == n else 0, scales, f"[groups, {n}]",
            claims.group_sizes,
        )  # fmt: skip
        if self._zeros.shape != (expected := (found[0], ceil(n / _PER_WORD))):
            raise CheckpointError(
                f"{self._zeros.file}: {self._zeros_name} has shape {list(self._zeros.shape)}, "
                f"expected {list(expected)} for {name} {list(codes.shape)}."
            )

    def _check_bits(self, name: str, codes: StoredTensor, n: int) -> None:
        """Refuses other numbers of bits, which the number of columns or of zero points tells."""
        bits = 4.0
        if self._g_idx is not None and self._g_idx.shape and self._g_idx.shape[0]:
            bits = 32 * codes.shape[0] / self._g_idx.shape[0]
        elif len(self._zeros.shape) == 2 and n:
            bits = 32 * self._zeros.shape[1] / n
        if bits in (2, 3, 8):
            raise CheckpointError(refusal(codes.file, f"GPTQ with {bits:.0f} bits", name, codes))

    def check(self) -> None:
        """Reads the zero points and the order of columns. ``CheckpointError``: other zero points
        than 8, or reordered columns."""
        zeros = self._zeros.read().view(torch.uint8)[:, : self.shape[0] // 2]
        found = {convention for convention, byte in _ZEROS.items() if bool((zeros == byte).all())}
        if self._convention in _ZEROS:
            found &= {self._convention}
        if not found:
            first = int(zeros.flatten()[0]) & 0x0F if zeros.numel() else "none"
            raise CheckpointError(
                refusal(
                    self._zeros.file,
                    f"asymmetric GPTQ (zero points other than 8: the first is stored as {first}, "
                    f"config.json's checkpoint_format is {self._convention or 'missing'})",
                    self._zeros_name,
                    self._zeros,
                )
            )
        if self._g_idx is not None:
            check_order(self._g_idx, self._name, self._group, self.shape[1], self._codes)

    def _read_pairs(self) -> torch.Tensor:
        self.check()
        n, k = self.shape
        # [words, n, 4 bytes] → [n, words, 4 bytes]: the codes of a row's columns, in order.
        words = self._codes.read().contiguous().view(torch.uint8).view(k // _PER_WORD, n, 4)
        return words.transpose(0, 1).reshape(n, k // 2)

    def _read_scales(self) -> torch.Tensor:
        return self._scales.read().T


def check_order(g_idx: StoredTensor, name: str, group: int, k: int, codes: StoredTensor) -> None:
    """Raises ``CheckpointError`` if the groups are not runs of consecutive columns."""
    order = g_idx.read().to(torch.int64)
    if order.shape != (k,) or not torch.equal(order, torch.arange(k) // group):
        scheme = (
            "INT4 with columns in an order of activations (desc_act or actorder: g_idx is not "
            f"0 … 0, 1 … 1, … in groups of {group})"
        )
        raise CheckpointError(refusal(g_idx.file, scheme, name, codes))


def _require(
    name: str, codes: StoredTensor, stored: Mapping[str, StoredTensor], others: Sequence[str]
) -> None:
    check_dtype(codes, name, ("I32",))
    for other in others:
        if other not in stored:
            raise CheckpointError(
                f"{codes.file}: {name} has no {other}. The folder is incomplete: download or copy "
                "it again."
            )
