"""Base and adapter read a second time, from the raw files, and computed in NumPy.

``ktrt.audit --verify`` holds the loaded model against it. Nothing here comes from the code that
loads models: a mistake there must not be made here too. Where a file is beyond these simple rules,
the error says that it cannot be verified.
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
