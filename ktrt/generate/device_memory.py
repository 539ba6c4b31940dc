"""The memory of a GPU that captured graphs read, besides the KV cache: experts and LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ktrt.experts import GpuExperts


class DeviceLora(Protocol):
    """LoRA of the model's linear layers."""

    # Changes when memory that graphs know has been replaced.
    version: int

    def follow(self) -> None:
        """Takes the active adapters."""


class DeviceMemory:
    """The memory of ``gpu``, the GPU's share of the routed experts, and of ``linears``, if they
    are there."""

    def __init__(self, gpu: GpuExperts | None, linears: DeviceLora | None) -> None:
        self._gpu, self._linears = gpu, linears
        self._versions: tuple[int, ...] = (-1,)

    def moved(self) -> bool:
        """Takes the adapters as they are now, which no graph can while it is captured; returns
        whether memory was replaced since the last call."""
        before, self._versions = self._versions, ()
        if self._gpu is not None:
            self._gpu.refresh()
            self._versions += (self._gpu.version,)
        if self._linears is not None:
            self._linears.follow()
            self._versions += (self._linears.version,)
        return before != self._versions
