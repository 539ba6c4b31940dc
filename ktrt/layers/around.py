"""A module's forward within a context."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


class Around:
    """Calls a forward within ``context(args, kwargs)``, the arguments of the call.

    Hooks would not do: after an interrupt torch calls none, and a context would stay. A copy of the
    module has the plain forward.
    """

    def __init__(
        self,
        plain: Callable[..., Any],
        context: Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[object]],
    ) -> None:
        functools.update_wrapper(self, plain)
        self._plain, self._context = plain, context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._context(args, kwargs):
            return self._plain(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain, memo)
