"""Tables of embeddings of a model on a GPU, kept in pinned memory of the host.

A token reads one row of them. Over the bus that is 4 KB and some microseconds of a decode step; the
tables take 0.4 GB (DeepSeek-V2-Lite) to 1.9 GB (DeepSeek-V3) of the GPU's memory. The GPU reads
pinned memory at the address that the host has for it (CUDA's unified addressing), so a table stays
a parameter on the GPU for torch, transformers, PEFT and CUDA graphs.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

# Smaller tables (positions, token types) are not worth it.
_LEAST_BYTES = 16 << 20


def tables_to_host(model: nn.Module) -> int:
    """Moves the tables of ``host_tables`` that are on a GPU; returns their bytes. A table that
    cannot be pinned stays where it is, with a warning."""
    moved = 0
    for table in host_tables(model):
        weight = table.weight
        if weight.device.type != "cuda":
            continue
        try:
            weight.data = _pinned(weight.data)
        except RuntimeError as error:
            logger.warning(
                "A table of embeddings, %.2f GB, stays on the GPU: it cannot be pinned in RAM (%s)",
                weight.nbytes / 1e9, error,
            )  # fmt: skip
            continue
        moved += weight.nbytes
    if moved:
        torch.cuda.empty_cache()
        logger.info("Tables of embeddings, %.2f GB, are read from pinned RAM", moved / 1e9)
    return moved


def host_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    """Yields the embeddings of ``model`` that only look rows up: without tables that are the head's
    weight too, and without embeddings that write to theirs (``max_norm``)."""
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    seen = set()
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            continue
        weight = module.weight
        if weight.nbytes < _LEAST_BYTES or id(weight) in elsewhere or id(weight) in seen:
            continue
        seen.add(id(weight))
        yield module


def _pinned(table: torch.Tensor) -> torch.Tensor:
    """The same numbers in pinned memory, as a tensor of the same device."""
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    host.copy_(table)
    found: torch.Tensor = torch.as_tensor(_DeviceArray(host), device=table.device)
    return found.view(table.dtype).view(table.shape)


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
