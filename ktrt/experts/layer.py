"""An engine layer for the routed experts of a model's layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktrt.engine import MoeLayer
from ktrt.engine.formats import format_of

if TYPE_CHECKING:
    from ktrt.engine import Engine
    from ktrt.experts.spec import ExpertsSpec


def new_layer(engine: Engine, spec: ExpertsSpec, kt_backend: str, down_slices: int = 1) -> MoeLayer:
    """An empty engine layer of the sizes of ``spec``, in the weight format of ``kt_backend``; it
    takes memory when experts are loaded."""
    return MoeLayer(
        engine,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        weight_format=format_of(kt_backend).name,
        down_slices=down_slices,
        has_gate=spec.has_gate,
        **spec.activation.arguments(),
    )
