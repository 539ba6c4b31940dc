"""LoRA adapters: any layout on disk → one internal form for the engine, the rest for PEFT."""

from ktrt.adapter.audit import Audit, AuditRow
from ktrt.adapter.base import BaseModel, ExpertLora, Projection
from ktrt.adapter.plan import AdapterPlan, plan_adapter
from ktrt.adapter.switches import Switch, TorchAdapters
from ktrt.adapter.words import words_of

__all__ = [
    "AdapterPlan",
    "Audit",
    "AuditRow",
    "BaseModel",
    "ExpertLora",
    "Projection",
    "Switch",
    "TorchAdapters",
    "plan_adapter",
    "words_of",
]
