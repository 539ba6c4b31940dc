"""Reads base and adapter a second time, from the raw files, and computes in NumPy.

``ktrt.audit --verify`` compares the loaded model with it. Nothing here is shared with the code that
loads models, so a mistake there is not repeated here. Files beyond these simple rules raise an
error: they cannot be verified.
"""

from ktrt.audit.reference.adapter import Lora, RawAdapter
from ktrt.audit.reference.checkpoint import RawCheckpoint, RawExperts
from ktrt.audit.reference.experts import Expert, WeightFormat, expert_output
from ktrt.audit.reference.tensors import CannotVerifyError

__all__ = [
    "CannotVerifyError",
    "Expert",
    "Lora",
    "RawAdapter",
    "RawCheckpoint",
    "RawExperts",
    "WeightFormat",
    "expert_output",
]
