"""Requests of many callers as steps of one model: who runs, in which step, and when."""

from ktrt.generate.scheduler.cost import CostFacts, CostModel
from ktrt.generate.scheduler.driver import Driver
from ktrt.generate.scheduler.loop import Scheduler
from ktrt.generate.scheduler.policy import SchedulerLimits
from ktrt.generate.scheduler.requests import Begin, Handle, NewRequest, State
from ktrt.generate.scheduler.stats import SchedulerStats

__all__ = [
    "Begin",
    "CostFacts",
    "CostModel",
    "Driver",
    "Handle",
    "NewRequest",
    "Scheduler",
    "SchedulerLimits",
    "SchedulerStats",
    "State",
]
