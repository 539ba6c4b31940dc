"""What a folder given as model or adapter is, found out before tokenizer or weights are read.

A leaf: imports neither torch nor transformers.
"""

from ktrt.folders.adapters import find_adapter_folder, holds_adapter
from ktrt.folders.kinds import describe_folder

__all__ = ["describe_folder", "find_adapter_folder", "holds_adapter"]
