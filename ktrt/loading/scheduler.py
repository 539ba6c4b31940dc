"""The scheduler of a loaded model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ktrt.errors import engine_errors
from ktrt.experts import KTExperts, chosen_share
from ktrt.generate.answer import next_tokens
from ktrt.generate.scheduler import CostModel, Scheduler
from ktrt.loading.step_bytes import cost_facts

if TYPE_CHECKING:
    from ktrt.generate.scheduler import SchedulerLimits
    from ktrt.loading.model import LoadedModel

# Tokens whose memory is asked for, to know a token's.
_SOME = 1024


@engine_errors()
def make_scheduler(loaded: LoadedModel, limits: SchedulerLimits | None) -> Scheduler:
    """Returns a scheduler for the model, which knows the bytes that its steps read."""
    runner = loaded.runner
    if limits is not None and limits.reproducible:
        runner.make_reproducible()
    facts = cost_facts(loaded.model, runner.pool.bytes_of(_SOME) / _SOME, mixes=runner.mixes)
    experts = [each for each in loaded.model.modules() if isinstance(each, KTExperts)]
    if experts:
        count = sum(each.layer.num_experts for each in experts)
        facts = replace(facts, experts=round(count / len(experts)))
    # Sequences that run one after the other: only the last one's would be known.
    union = partial(chosen_share, experts) if runner.mixes and experts else lambda: None
    return Scheduler(
        runner, loaded.adapters, CostModel(facts), next_tokens, limits, by_row=runner.by_row,
        union=union,
    )  # fmt: skip


def use_device(loaded: LoadedModel) -> None:
    """Makes the model's GPU, if it is on one, the calling thread's."""
    device = loaded.runner.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
