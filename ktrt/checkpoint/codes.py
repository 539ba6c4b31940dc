"""Quantised matrices as their files ship them, in the canonical form that the engine packs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ktrt.experts.spec import ExpertsSpec, Projection

# Columns that share a scale, by format; FP8 has blocks instead, see FP8_GRID.
GROUPS = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128, "mxfp4": 32}
# Rows and columns of one scale in the canonical grid of ``fp8``.
FP8_GRID = (32, 128)


@dataclass(frozen=True)
class Codes:
    """One matrix [n, k] in a weight format of the engine, with the numbers of its file.

    ``codes``: uint8 [n, k] (``fp8``, ``fp8_channel``: E4M3) or [n, k / 2] (column 2i in the low
    half; ``int4_g*``: two's complement, ``mxfp4``: E2M1). ``scales``: float32
    [⌈n / 32⌉, ⌈k / 128⌉] (``fp8``), float32 [n] (``fp8_channel``), bfloat16 [n, k / group]
    (``int4_g*``), or uint8 [n, k / 32] (``mxfp4``: 2^(byte - 127)). Rows may be strided views.
    """

    format: str
    codes: torch.Tensor
    scales: torch.Tensor

    def regrouped(self, weight_format: str) -> Codes:
        """Returns the same numbers in ``weight_format``, INT4 in groups that divide this one's."""
        if weight_format == self.format:
            return self
        times, rest = divmod(GROUPS[self.format], GROUPS[weight_format])
        assert not rest, (self.format, weight_format)
        return replace(
            self, format=weight_format, scales=self.scales.repeat_interleave(times, dim=1)
        )

    def split(self, spec: ExpertsSpec) -> dict[Projection, Codes]:
        """Returns the rows of an expert's first parameter by projection: views."""
        codes, scales = spec.split(self.codes, dim=0), spec.split(self.scales, dim=0)
        return {p: replace(self, codes=codes[p], scales=scales[p]) for p in codes}


def why_not_split(weight_format: str, spec: ExpertsSpec) -> str:
    """Returns why a joint tensor of gate and up cannot be split in this format; empty if it can."""
    if weight_format != "fp8" or not spec.has_gate:
        return ""
    if spec.is_interleaved:
        return "rows of gate and up alternate in blocks of FP8"
    if spec.intermediate_size % FP8_GRID[0]:
        return (
            f"gate and up share a block of FP8: {spec.intermediate_size} rows each, not a multiple "
            f"of {FP8_GRID[0]}"
        )
    return ""
