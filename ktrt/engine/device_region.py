"""Addresses of a GPU that never move, of which only what is committed has memory."""

from ktrt._core import DeviceRegion

__all__ = ["DeviceRegion"]
