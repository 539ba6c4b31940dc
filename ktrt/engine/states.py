"""The engine's operators for layers that keep a state: linear attention, selective scans, short
convolutions."""

from ktrt._core import LinearAttention, SelectiveScan, ShortConv, TokenArray

__all__ = ["LinearAttention", "SelectiveScan", "ShortConv", "TokenArray"]
