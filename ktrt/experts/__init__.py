"""Routed experts as a torch module that runs in the engine, and the hand-off from a GPU."""

from ktrt.experts.gpu.residents import GpuExperts
from ktrt.experts.gpu.setup import build_gpu_experts
from ktrt.experts.handoff import HandOff, new_hand_off
from ktrt.experts.layer import new_layer
from ktrt.experts.module import KTExperts, chosen_share, experts_muted, experts_replaced
from ktrt.experts.spec import ExpertsSpec, find_experts

__all__ = [
    "ExpertsSpec",
    "GpuExperts",
    "HandOff",
    "KTExperts",
    "build_gpu_experts",
    "chosen_share",
    "experts_muted",
    "experts_replaced",
    "find_experts",
    "new_hand_off",
    "new_layer",
]
