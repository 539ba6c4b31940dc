"""Tells an event loop's tasks that the engine's thread has something for them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Wakes:
    """Runs calls of other threads in the event loop, all of one moment with one wake-up.

    A wake-up writes to the loop's pipe; a step gives up to 32 answers their tokens.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], object]] = deque()
        self._posted = False

    def post(self, call: Callable[[], object]) -> None:
        """Has the loop call ``call``. For any thread. ``RuntimeError``: the loop is closed."""
        self._calls.append(call)
        if not self._posted:
            self._posted = True
            self.loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        # Before the look at the queue: what comes after it posts again.
        self._posted = False
        while self._calls:
            self._calls.popleft()()
