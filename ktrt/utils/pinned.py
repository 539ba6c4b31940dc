"""Pinned memory of the host as tensors of a GPU, which reads it over the bus at the address that
the host has for it (CUDA's unified addressing)."""

from __future__ import annotations

from typing import Any

import torch


def on_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns the same memory as a tensor of ``device``; ``host``, contiguous and pinned, lives as
    long. On the CPU itself."""
    if device.type != "cuda":
        return host
    found: torch.Tensor = torch.as_tensor(_DeviceArray(host), device=device)
    return found.view(host.dtype).view(host.shape)


class _DeviceArray:
    """Pinned memory as an array of bytes on the device, which torch takes without a copy and keeps
    (numba's CUDA array interface, version 3)."""

    def __init__(self, host: torch.Tensor) -> None:
        self._host = host
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (host.nbytes,),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }
