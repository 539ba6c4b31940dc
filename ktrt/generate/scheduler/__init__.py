"""Requests of many callers as steps of one model: who runs, in which step, and when."""

from ktrt.generate.scheduler.cost import CostFacts, CostModel
from ktrt.generate.scheduler.loop import Scheduler
from ktrt.generate.scheduler.policy import SchedulerLimits
from ktrt.generate.scheduler.requests import Handle, NewRequest, State

__all__ = [
    "CostFacts",
    "CostModel",
    "Handle",
    "NewRequest",
    "Scheduler",
    "SchedulerLimits",
    "State",
]
