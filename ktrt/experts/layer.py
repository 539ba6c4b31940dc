"""An engine layer for the routed experts of a model's layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.engine import MoeLayer
from ktrt.engine.formats import format_named

if TYPE_CHECKING:
    from ktrt.engine import Engine
    from ktrt.experts.spec import ExpertsSpec


def new_layer(
    engine: Engine, spec: ExpertsSpec, weight_format: str, down_slices: int = 1
) -> MoeLayer:
    """An empty engine layer of the sizes of ``spec``; it takes memory when experts are loaded."""
    return MoeLayer(
        engine,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        weight_format=format_named(weight_format).name,
        down_slices=down_slices,
        has_gate=spec.has_gate,
        **spec.activation.arguments(),
    )
