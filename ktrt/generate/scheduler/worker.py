"""The thread that owns a model and steps its scheduler."""

from __future__ import annotations

import atexit
import logging
import threading
from concurrent.futures import Future
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
        self._awake = threading.Event()
        self._closing: KtrtError | None = None
        scheduler.on_wake(self._awake.set)
        # Not waited for to the last answer at the interpreter's end: nobody reads it any more.
        self._thread = threading.Thread(target=self._run, name="ktrt-scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread, which waits for ``owned``."""
        # Python ends threads within C++ at the interpreter's end, which aborts the process.
        atexit.register(self._leave)
        self._thread.start()

    def _leave(self) -> None:
        self._closing = KtrtError("the interpreter ends")
        self._awake.set()
        self._thread.join(_LAST_STEP)

    def call(self, function: Callable[[], T]) -> T:
        """Runs ``function`` in the thread, between two steps; returns or raises what it does."""
        if threading.current_thread() is self._thread:
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
        self._awake.set()
        atexit.unregister(self._leave)
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        with self._owned:
            reason = KtrtError("the scheduler's thread has failed; load the model again")
            try:
                set_torch_threads(self._torch_threads)
                if self._closing is None:  # or the model may be gone
                    self._begin()
                while self._closing is None:
                    self._awake.clear()
                    if not self._scheduler.step():
                        self._scheduler.rest()
                        self._awake.wait()
                reason = self._closing
            except BaseException:
                logger.exception("The scheduler's thread has failed")
            self._scheduler.close(reason)
