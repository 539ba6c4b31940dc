"""What the device benches share: a part that fails does not take the next ones with it."""

from __future__ import annotations

import sys
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Sections:
    """Parts of a bench, by name; lines appear as they are printed, through a pipe too."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        stream: Any = sys.stdout
        stream.reconfigure(line_buffering=True)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """An exception inside is printed with its traceback, and ends the section only."""
        try:
            yield
        except Exception:  # noqa: BLE001 (whatever it is, the next section runs)
            self.failed.append(name)
            print(f"FAILED: {name}\n{traceback.format_exc()}", flush=True)

    def status(self) -> int:
        """Names what failed; the exit status."""
        if self.failed:
            print(f"{len(self.failed)} sections failed: {', '.join(self.failed)}")
        return 1 if self.failed else 0
