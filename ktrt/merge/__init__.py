"""Base and adapter as one checkpoint: merged in float32, rounded once, written tensor by tensor."""

from ktrt.merge.checkpoint import DtypeName, Summary, merge_checkpoint
from ktrt.merge.packed import EXPERTS_FOLDER, merge_packed
from ktrt.merge.side_files import copy_words

__all__ = [
    "EXPERTS_FOLDER",
    "DtypeName",
    "Summary",
    "copy_words",
    "merge_checkpoint",
    "merge_packed",
]
