"""Several adapters in one model: switching, weights, sums, rows, loading and unloading."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.merge import merged
from helpers.tiny_models import (
    LoraPlan,
    read_folder,
    save_adapter,
    save_model,
    token_ids,
    write_adapter,
)

from ktrt.adapters import Adapters
from ktrt.config import AdapterArgs, ExpertArgs, ModelArgs
from ktrt.errors import AdapterError, KtrtError
from ktrt.model import LoadedModel, load_model
