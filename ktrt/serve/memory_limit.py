"""The speed of the server as a share of what this machine's memory allows."""

from __future__ import annotations

import threading


class MemoryLimit:
    """The read bandwidth of this machine, measured once, in the first quiet moment: about half a
    second in which all cores read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tried = False
        self._bandwidth: float | None = None

    @property
    def is_known(self) -> bool:
        """Whether it was measured, or cannot be."""
        return self._tried

    def measure(self) -> None:
        """Measures, unless another thread does or did."""
        from ktrt.engine.probes import read_bandwidth

        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._tried:
                self._bandwidth = read_bandwidth(passes=3)
        except MemoryError:
            self._bandwidth = None
        finally:
            self._tried = True
            self._lock.release()

    def share(self, read: float | None) -> float | None:
        """Returns the share that ``read`` bytes per second are; None if one is unknown."""
        return read / self._bandwidth if read and self._bandwidth else None
