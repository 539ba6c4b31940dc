"""Base and adapter as one checkpoint: merged in float32, rounded once, written tensor by tensor."""

from ktrt.merge.checkpoint import DtypeName, Summary, merge_checkpoint
from ktrt.merge.packed import EXPERTS_FOLDER, merge_packed

__all__ = ["EXPERTS_FOLDER", "DtypeName", "Summary", "merge_checkpoint", "merge_packed"]
