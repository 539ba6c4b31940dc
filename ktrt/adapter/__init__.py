"""Reads LoRA adapters of any layout: one internal form for the engine, other tensors for PEFT."""

from ktrt.adapter.apply.switches import Switch, TorchAdapters
from ktrt.adapter.apply.words import words_of
from ktrt.adapter.audit import Audit, AuditRow
from ktrt.adapter.internal import BaseModel, ExpertLora
from ktrt.adapter.plan import AdapterPlan, plan_adapter

__all__ = [
    "AdapterPlan",
    "Audit",
    "AuditRow",
    "BaseModel",
    "ExpertLora",
    "Switch",
    "TorchAdapters",
    "plan_adapter",
    "words_of",
]
