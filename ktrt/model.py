"""A transformers model whose routed experts run in ktrt's engine, with an adapter applied."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktrt.adapter import Audit, BaseModel, plan_adapter
from ktrt.checkpoint import Checkpoint, WeightNames, find_expert_weights
from ktrt.errors import CheckpointError
from ktrt.moe import (
    KTExperts,
    build_engine,
    experts_replaced,
    find_experts,
    new_layer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ktrt.adapter import AdapterPlan
    from ktrt.checkpoint import ExpertWeights
    from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
    from ktrt.moe import Engine, ExpertsSpec

logger = logging.getLogger(__name__)
