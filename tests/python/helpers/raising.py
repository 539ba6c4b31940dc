"""Functions that raise as if they were a module of ktrt: C++ functions have no frame there."""

from collections.abc import Callable
from types import FunctionType
from typing import Any


def raising_in(module: str, error: Exception) -> Callable[..., Any]:
    """Returns a function of ``module`` that takes any arguments and raises ``error``."""
    return FunctionType(_raise.__code__, {"__name__": module, "error": error})


def _raise(*_: Any, **__: Any) -> None:
    raise error  # type: ignore[name-defined] # noqa: F821
