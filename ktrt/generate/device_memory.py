"""The memory of a GPU besides the KV cache: torch's, and what captured graphs read of experts and
LoRA."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ktrt.kv.device import has_device_memory

if TYPE_CHECKING:
    from ktrt.experts import GpuExperts


logger = logging.getLogger(__name__)

# Tokens of a forward whose memory is given back, and bytes from which on. A dozen allocations of
# the driver are no measurable part of a prompt of 8,192 tokens (0.107 s on an H200).
_LONG_FORWARD = 2048
_MOST_UNUSED = 256 << 20

# How users set torch's allocator; the first is the newer name.
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow(device: torch.device) -> None:
    """Makes torch extend its segments of GPU memory, unless the user has set its allocator: each
    chunk of a prompt needs a little more than the one before, and a segment that cannot grow is
    kept next to the larger one (5.2 GB used and 8.0 reserved with V2-Lite and 32,000 tokens)."""
    if device.type != "cuda" or any(name in os.environ for name in _SETTINGS):
        return
    if not has_device_memory(device):
        return
    try:
        _set_allocator("expandable_segments:True")
    except (AttributeError, RuntimeError, ValueError) as error:
        logger.info("torch's segments of GPU memory do not grow: %s", error)


def _set_allocator(settings: str) -> None:
    # torch 2.10 on; before, the other one.
    inner: Any = torch._C
    if hasattr(inner, "_accelerator_setAllocatorSettings"):
        inner._accelerator_setAllocatorSettings(settings)
    else:
        memory: Any = torch.cuda.memory
        memory._set_allocator_settings(settings)


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

    @staticmethod
    def give_back(tokens: int) -> None:
        """Gives back what a long forward of ``tokens`` has left unused in torch's allocator."""
        if tokens < _LONG_FORWARD:
            return
        if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > _MOST_UNUSED:
            torch.cuda.empty_cache()

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
