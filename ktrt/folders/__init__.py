"""Classifies a folder given as model or adapter, before tokenizer and weights are read.

A leaf: imports neither torch nor transformers.
"""

from ktrt.folders.adapters import find_adapter_folder
from ktrt.folders.kinds import cached_snapshots, describe_folder, holds_adapter, holds_model
from ktrt.folders.models import check_model_folder, tokenizer_advice

__all__ = [
    "cached_snapshots",
    "check_model_folder",
    "describe_folder",
    "find_adapter_folder",
    "holds_adapter",
    "holds_model",
    "tokenizer_advice",
]
