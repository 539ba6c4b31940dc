"""Sums in float32 and the one rounding that follows them."""

from __future__ import annotations

import torch

from ktrt.errors import CheckpointError

# safetensors' name → torch's dtype.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merged(weight: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
    """Returns W + ΔW in float32."""
    return weight.float() if delta is None else weight.float() + delta


def rounded(name: str, values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Converts ``values`` to one of ``FLOATS``. Raises ``CheckpointError`` if one becomes infinite,
    which happens to weights only in float16."""
    result = values.to(FLOATS[dtype])
    if dtype == "F16" and not bool(torch.equal(result.isfinite(), values.isfinite())):
        raise CheckpointError(
            f"{name} has values up to {float(values.abs().max()):g}, which float16 cannot hold; "
            "use --dtype bfloat16 or float32."
        )
    return result
