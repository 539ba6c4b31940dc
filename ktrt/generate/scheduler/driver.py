"""Who steps a scheduler: the thread that reads an answer, or a thread for all."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch

from ktrt.errors import KtrtError
from ktrt.generate.scheduler.requests import State
from ktrt.generate.scheduler.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ktrt.generate.loop import OnPrefill
    from ktrt.generate.response import Response, TokenResponse
    from ktrt.generate.scheduler.loop import Scheduler
    from ktrt.generate.scheduler.requests import Begin, Handle, NewRequest

T = TypeVar("T")


class Driver:
    """Steps a model for the answers of one session.

    Until ``start``, the thread that reads an answer steps the model for that answer alone: another
    one waits in its slot meanwhile, and another thread gets a ``KtrtError``. From ``start`` on a
    worker thread owns the model and steps it for all.
    """

    def __init__(self, make: Callable[[], Scheduler], begin: Callable[[], object]) -> None:
        """``make``: called once, before the first step; ``begin``: first in the worker thread."""
        self._make, self._begin = make, begin
        # The engine's calls belong to one thread at a time. Reentrant: `on_prefill` may ask the
        # session for something.
        self._owned = threading.RLock()
        self._starting = threading.RLock()
        # The thread that runs the model without the worker. It keeps its turn where its callback
        # starts the worker, which waits for the turn's end.
        self._inline: int | None = None
        self._worker: Worker | None = None
        self._closed: KtrtError | None = None
        # Each thread has its own count; the worker takes the one of the thread that loaded.
        self._torch_threads = torch.get_num_threads()

    @cached_property
    def scheduler(self) -> Scheduler:
        """The scheduler of the model."""
        with self._starting:
            found = self.__dict__.get("scheduler")
            if found is None:
                found = self._make()
                found.on_wait(self._drive)
                # Within the lock: another thread must find it.
                self.__dict__["scheduler"] = found
            return found

    def begin(self) -> None:
        """Makes the scheduler, which the first request would wait for."""
        assert self.scheduler

    def start(self) -> None:
        """Starts the worker thread, if there is none."""
        if self._worker is not None:
            return
        with self._starting:
            if self._closed is not None:
                raise self._closed
            if self._worker is None:
                self._worker = Worker(self.scheduler, self._owned, self._torch_threads, self._begin)
                self._worker.start()

    def submit(self, new: NewRequest) -> Handle:
        """Hands a request to the scheduler."""
        try:
            return self.scheduler.submit(new)
        except BaseException:
            new.release()
            raise

    def between(self, call: Callable[[], T]) -> T:
        """Runs ``call`` between two steps, in the thread that may run the model."""
        with self._turn() as inline:
            if inline:
                return call()
        assert self._worker is not None
        return self._worker.call(call)

    def stream(self, begin: Begin, on_prefill: OnPrefill | None) -> Iterator[TokenResponse]:
        """Yields the tokens of one answer. ``on_prefill`` runs in the thread that reads them."""
        handle = self.submit(begin(paused=True, progress=on_prefill is not None))
        try:
            while (token := self._next(handle, on_prefill)) is not None:
                yield token
        finally:
            handle.cancel()
            self._settle()

    def batch(self, begins: Sequence[Begin]) -> list[Response]:
        """Returns the answers to all requests; the first failure ends them all."""
        handles: list[Handle] = []
        try:
            for begin in begins:
                handles.append(self.submit(begin(streams=False)))  # noqa: PERF401 - cancelled below
            with self._turn(start=True) as inline:
                while inline and not all(handle.state.ended for handle in handles):
                    if any(handle.state is State.FAILED for handle in handles):
                        break
                    self._step()
            failed = [handle for handle in handles if handle.state is State.FAILED]
            return [handle.result() for handle in [*failed, *handles]]
        finally:
            for handle in handles:
                handle.cancel()
            self._settle()

    def close(self, reason: KtrtError, close: Callable[[], object]) -> None:
        """Ends all requests with ``reason``, then the worker thread, then calls ``close``. Waits
        for another thread's step."""
        with self._starting:
            self._closed, worker = reason, self._worker
        inline = self._inline == threading.get_ident()
        if worker is not None:
            worker.close(reason, wait=not inline)
        with self._owned:
            if (worker is None or inline) and "scheduler" in self.__dict__:
                self.scheduler.close(reason)
            close()

    def abandon(self, reason: KtrtError, close: Callable[[], object]) -> None:
        """Like ``close`` without waiting, for the collector: the worker thread, if there is one,
        ends and calls ``close``."""
        if self._worker is not None and self._closed is None:
            self._closed = reason
            self._worker.abandon(reason, close)

    def _next(self, handle: Handle, on_prefill: OnPrefill | None) -> TokenResponse | None:
        handle.resume()
        with self._turn() as inline:
            try:
                while True:
                    for done in handle.take_progress():
                        if on_prefill is not None:
                            on_prefill(*done)
                    ended = handle.state.ended  # before the look for a token
                    if (token := handle.take()) is not None or ended:
                        return token
                    if inline:
                        self._step()
                    else:
                        handle.wait_for_event()
            finally:
                if inline:
                    handle.pause()

    @property
    def alive(self) -> bool:
        """Whether requests are still computed: until ``close``, or a failure of the worker
        thread."""
        return self._closed is None and (self._worker is None or self._worker.alive)

    def _drive(self) -> bool:
        """Runs a step if this thread runs the model, so that nobody else does while it waits."""
        if self._worker is not None and self._worker.is_current:
            raise KtrtError("the thread that computes an answer cannot wait for it")
        if self._inline != threading.get_ident():
            return False
        if self.scheduler.stepping:
            raise KtrtError("an answer cannot be waited for within a step of the model")
        self._step()
        return True

    def _step(self) -> None:
        if not self.scheduler.step():
            running, _ = self.scheduler.counts
            raise KtrtError(
                f"there is no slot for another answer: {running} are under way; end one of them"
            )

    def _settle(self) -> None:
        """Frees what ended requests held, unless somebody steps, who does so then."""
        if self._worker is None and self._owned.acquire(blocking=False):
            try:
                self.scheduler.tidy()
                self.scheduler.rest()
            finally:
                self._owned.release()

    @contextmanager
    def _turn(self, *, start: bool = False) -> Iterator[bool]:
        """Within the block this thread may run the model (True), or the worker thread does.
        Where another thread may, ``start`` starts the worker; without it that is a
        ``KtrtError``."""
        if self._closed is not None:
            raise self._closed
        outer, me = self._inline, threading.get_ident()
        if (self._worker is None or outer == me) and self._owned.acquire(blocking=False):
            self._inline = me
            try:
                yield True
            finally:
                self._inline = outer if outer == me else None
                self._owned.release()
            return
        if start:
            self.start()
        if self._worker is None:
            raise KtrtError(
                "another thread is using this session: one thread at a time may; use a lock, or "
                "session.submit, which takes requests of any thread"
            )
        yield False
