"""Routed experts: finding them in a model, and running them in the compiled engine.

The only package that imports ``ktrt._core``, but for ``ktrt.machine``, which measures.
"""

import ktrt
from ktrt.errors import KtrtError
from ktrt.moe.discovery import ExpertsSpec, find_experts

try:
    from ktrt import _core
    from ktrt._core import (
        DenseLinear,
        Engine,
        HeadArray,
        LatentAttention,
        MoeLayer,
        PackedLinear,
        RmsNorm,
        TokenAttention,
        release_file_pages,
    )
    from ktrt._core import isa as active_isa
except ImportError as error:
    raise KtrtError(
        f"the compiled engine ktrt._core cannot be imported ({error}). Build and install it with "
        "`pip install .` in the source folder of ktrt."
    ) from error
if _core.__version__ != ktrt.__version__:
    raise KtrtError(
        f"ktrt is version {ktrt.__version__}, but its compiled engine ktrt._core is version "
        f"{_core.__version__}. Install both together: `pip install .` in the source folder of ktrt."
    )

from ktrt.moe.engine import BACKENDS, build_engine, new_layer, num_threads, weight_format_of
from ktrt.moe.experts import KTExperts, experts_muted, experts_replaced
from ktrt.moe.gpu_experts import GpuExperts
from ktrt.moe.gpu_setup import build_gpu_experts
from ktrt.moe.handoff import HandOff, new_hand_off

__all__ = [
    "BACKENDS",
    "DenseLinear",
    "Engine",
    "ExpertsSpec",
    "GpuExperts",
    "HandOff",
    "HeadArray",
    "KTExperts",
    "LatentAttention",
    "MoeLayer",
    "PackedLinear",
    "RmsNorm",
    "TokenAttention",
    "active_isa",
    "build_engine",
    "build_gpu_experts",
    "experts_muted",
    "experts_replaced",
    "find_experts",
    "new_hand_off",
    "new_layer",
    "num_threads",
    "release_file_pages",
    "weight_format_of",
]
