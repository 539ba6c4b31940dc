"""Sections of the GPU benches: a failing one does not stop the next ones."""

from __future__ import annotations

import sys
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Sections:
    """Runs named sections of a bench; flushes every line, in a pipe too."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        stream: Any = sys.stdout
        stream.reconfigure(line_buffering=True)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Prints an exception with its traceback; it ends this section only."""
        try:
            yield
        except Exception:  # noqa: BLE001 (the next section runs after any exception)
            self.failed.append(name)
            print(f"FAILED: {name}\n{traceback.format_exc()}", flush=True)

    def status(self) -> int:
        """Prints the failed sections; returns the exit status."""
        if self.failed:
            print(f"{len(self.failed)} sections failed: {', '.join(self.failed)}")
        return 1 if self.failed else 0
