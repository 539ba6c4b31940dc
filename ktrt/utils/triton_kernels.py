"""Modules of Triton kernels, which comes with torch where there is CUDA."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

logger = logging.getLogger(__name__)


@functools.cache
def triton_kernels(name: str, otherwise: str) -> Any:
    """Returns a module of kernels; None where Triton cannot be imported, which is logged once with
    what happens ``otherwise``."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        logger.warning("%s: Triton cannot be imported (%s)", otherwise, error)
        return None


def runs_triton(kernel: Any, device: Any) -> bool:
    """Whether ``kernel`` takes tensors of a torch device: a GPU, or any in Triton's interpreter."""
    return device.type == "cuda" or type(kernel).__name__ == "InterpretedFunction"
