"""Quantised matrices as their files ship them, in the canonical form that the engine packs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ktrt.engine.formats import FORMATS, STRIP_ROWS, format_named

if TYPE_CHECKING:
    from ktrt.experts.spec import ExpertsSpec, Projection

# Columns that share a scale, by format; FP8 has blocks instead, see FP8_GRID.
GROUPS: dict[str, int] = {
    each.name: each.group for each in FORMATS if each.coded and each.bits == 4
}
# Rows and columns of one scale in the canonical grid of ``fp8``.
FP8_GRID = (STRIP_ROWS, format_named("fp8").group)

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The values of E2M1's codes, the sign in the highest bit.
E2M1 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


@dataclass(frozen=True)
class Codes:
    """One matrix [n, k] in a weight format of the engine, with the numbers of its file.

    ``codes``: uint8 [n, k] (``fp8``, ``fp8_channel``: E4M3) or [n, k / 2] (column 2i in the low
    half; ``int4_g*``: two's complement, ``mxfp4``: E2M1). ``scales``: float32
    [⌈n / 32⌉, ⌈k / 128⌉] (``fp8``), float32 [n] (``fp8_channel``), bfloat16 [n, ⌈k / group⌉]
    (``int4_g*``), or uint8 [n, k / 32] (``mxfp4``: 2^(byte - 127)). Rows may be strided views.
    """

    format: str
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scales), as the engine takes them."""
        return self.codes, self.scales

    def regrouped(self, weight_format: str) -> Codes:
        """Returns the same numbers in ``weight_format``, INT4 in groups that divide this one's."""
        if weight_format == self.format:
            return self
        times, rest = divmod(GROUPS[self.format], GROUPS[weight_format])
        assert not rest, (self.format, weight_format)
        groups = -(-2 * self.codes.shape[1] // GROUPS[weight_format])
        scales = self.scales.repeat_interleave(times, dim=1)[:, :groups]
        return replace(self, format=weight_format, scales=scales)

    def flipped(self) -> Codes:
        """Returns the transpose of ``fp8`` in blocks of whole 128 x 128."""
        assert self.format == "fp8", self.format
        rows, columns = FP8_GRID
        k = self.codes.shape[1]
        scales = self.scales.T.repeat_interleave(columns // rows, dim=0)[: -(-k // rows)]
        return Codes("fp8", self.codes.T.contiguous(), scales[:, :: columns // rows].contiguous())

    def to(self, device: torch.device) -> Codes:
        """Returns the same on another device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns code times scale [n, k], rounded to ``dtype`` once."""
        scales = self.scales
        if self.format in GROUPS:
            pairs = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(1)
            values = _nibbles(self.format, self.codes.device)[pairs.long()]
            if scales.dtype == torch.uint8:
                scales = torch.exp2(scales.float() - 127)
            scales = scales.float().repeat_interleave(GROUPS[self.format], dim=1)
        else:
            values = self.codes.view(torch.float8_e4m3fn).float()
            if scales.ndim == 1:
                scales = scales[:, None]
            else:
                scales = scales.repeat_interleave(FP8_GRID[0], dim=0)[: len(values)]
                scales = scales.repeat_interleave(FP8_GRID[1], dim=1)
        return (values * scales[:, : values.shape[1]]).to(dtype)

    def split(self, spec: ExpertsSpec) -> dict[Projection, Codes]:
        """Returns the rows of an expert's first parameter by projection: views."""
        codes = spec.split(self.codes, dim=0)
        if self.format == "fp8" and spec.is_interleaved:
            # Two strips of the joint rows hold one of gate and one of up.
            scales = dict.fromkeys(codes, self.scales[::2])
        else:
            scales = spec.split(self.scales, dim=0)
        return {p: replace(self, codes=codes[p], scales=scales[p]) for p in codes}


def _nibbles(weight_format: str, device: torch.device) -> torch.Tensor:
    """Returns the values of the 16 codes."""
    if weight_format == "mxfp4":
        return torch.tensor(E2M1, device=device)
    return torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32, device=device)


def why_not_split(weight_format: str, spec: ExpertsSpec, *, whole: bool) -> str:
    """Returns why a joint tensor of gate and up cannot be split in this format; empty if it can.
    ``whole``: FP8's blocks have multiples of 128 rows."""
    if weight_format != "fp8" or not spec.has_gate:
        return ""
    if spec.is_interleaved:
        return "" if whole else "rows of gate and up alternate in small blocks of FP8"
    if spec.intermediate_size % FP8_GRID[0]:
        return (
            f"gate and up share a block of FP8: {spec.intermediate_size} rows each, not a multiple "
            f"of {FP8_GRID[0]}"
        )
    return ""
