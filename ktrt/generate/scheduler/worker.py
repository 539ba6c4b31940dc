"""The thread that owns a model and steps its scheduler."""

from __future__ import annotations

import atexit
import logging
import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from ktrt.engine.torch_threads import set_torch_threads
from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ktrt.generate.scheduler.loop import Scheduler

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds for which the interpreter's end waits for a step.
_LAST_STEP = 30.0


class Worker:
    """Steps ``scheduler`` in a thread until ``close``, and sleeps while there is nothing to do."""

    def __init__(
        self,
        scheduler: Scheduler,
        owned: AbstractContextManager[object],
        torch_threads: int,
        begin: Callable[[], object] = lambda: None,
    ) -> None:
        """The thread holds ``owned`` all its life, and calls ``begin`` first. ``torch_threads``:
        torch's count there, which each thread has for itself."""
        self._scheduler, self._owned = scheduler, owned
        self._torch_threads, self._begin = torch_threads, begin
        # Its ``put`` is for any place, the collector's callbacks too, where an Event's lock may be
        # the one that is held.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._closing: KtrtError | None = None
        self._last: Callable[[], object] | None = None
        self._failed = False
        scheduler.on_wake(self._wake)
        # Not waited for to the last answer at the interpreter's end: nobody reads it any more.
        self._thread = threading.Thread(target=self._run, name="ktrt-scheduler", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread has not failed."""
        return not self._failed

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in this thread."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Starts the thread, which waits for ``owned``."""
        # Python ends threads within C++ at the interpreter's end, which aborts the process.
        atexit.register(self._leave)
        self._thread.start()

    def _wake(self) -> None:
        self._calls.put(None)

    def _leave(self) -> None:
        self._closing = KtrtError("the interpreter ends")
        self._wake()
        self._thread.join(_LAST_STEP)

    def call(self, function: Callable[[], T]) -> T:
        """Runs ``function`` in the thread, between two steps; returns or raises what it does."""
        if self.is_current:
            return function()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - the caller's
                future.set_exception(error)

        self._scheduler.do_between(run)
        return future.result()

    def close(self, reason: KtrtError, *, wait: bool = True) -> None:
        """Ends all requests with ``reason`` and waits for the end of the thread, unless it is the
        caller's. Without ``wait``: for callers that hold ``owned``."""
        self._closing = reason
        self._wake()
        atexit.unregister(self._leave)
        if wait and not self.is_current:
            self._thread.join()

    def abandon(self, reason: KtrtError, last: Callable[[], object]) -> None:
        """Like ``close``, but waits for nothing; the thread calls ``last`` at its end. For the
        collector, from any thread."""
        self._last = last
        self._closing = reason
        self._wake()

    def _run(self) -> None:
        with self._owned:
            reason = KtrtError("the scheduler's thread has failed; load the model again")
            try:
                set_torch_threads(self._torch_threads)
                if self._closing is None:  # or the model may be gone
                    self._begin()
                while self._closing is None:
                    while not self._calls.empty():
                        self._calls.get()
                    if not self._scheduler.step():
                        self._scheduler.rest()
                        self._calls.get()
                reason = self._closing
            except BaseException:
                self._failed = True
                logger.exception("The scheduler's thread has failed")
            self._scheduler.close(reason)
            if self._last is not None:
                atexit.unregister(self._leave)
                self._last()
