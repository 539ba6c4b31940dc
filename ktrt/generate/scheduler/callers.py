"""The scheduler's side towards its callers: requests come, wait, are cancelled and end."""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ktrt.errors import KtrtError
from ktrt.generate.scheduler.policy import FairQueue
from ktrt.generate.scheduler.requests import Handle, NewRequest, Request, State, call_quietly
from ktrt.generate.scheduler.stats import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktrt.generate.scheduler.interfaces import AdapterSets, Pool
    from ktrt.generate.scheduler.policy import SchedulerLimits
    from ktrt.generate.scheduler.stats import SchedulerStats


logger = logging.getLogger(__name__)


class Callers:
    """The requests of a scheduler, from ``submit`` to their ends.

    ``submit``, ``do_between``, ``wake``, ``stats``, ``predicted_wait`` and the handles are for any
    thread, everything else for the thread that owns the model.
    """

    def __init__(
        self, pool: Pool, adapters: AdapterSets, limits: SchedulerLimits, *, by_row: bool
    ) -> None:
        self._pool, self._adapters, self.limits, self._by_row = pool, adapters, limits, by_row
        self._lock = threading.Lock()
        self._inbox: deque[Request | Callable[[], object]] = deque()
        self._woken: Callable[[], None] = lambda: None
        self._drive: Callable[[], bool] = lambda: False
        self._counters = Counters()
        self._queue: FairQueue[Request] = FairQueue()
        self._running: list[Request] = []
        self._renewals = adapters.renewals
        self._stepping = False
        # Called after the step: a caller's thread that wakes within it would take turns with this
        # one for every token.
        self._changes: dict[Callable[[], None], None] = {}
        self._closed: KtrtError | None = None
        # The first request that found no memory: nobody may overtake it.
        self._blocked: Request | None = None

    # ---- any thread

    def submit(self, new: NewRequest) -> Handle:
        """Takes a request; returns the handle of its answer. ``KtrtError``: the scheduler is
        closed."""
        tell = None if new.on_change is None else partial(self._tell, new.on_change)
        handle = Handle(self.wake, self._drive, tell)
        handle.paused = new.paused
        mixes = self._by_row and new.choice.row is not None
        group = None if mixes else new.choice.weights
        self._post(Request(new, handle, group))
        return handle

    def do_between(self, call: Callable[[], object]) -> None:
        """Has the owner's thread call ``call``, which raises nothing, between two steps."""
        self._post(call)

    def _post(self, item: Request | Callable[[], object]) -> None:
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._inbox.append(item)
        self.wake()

    def wake(self) -> None:
        """Tells the owner's thread that there may be something to do."""
        self._woken()

    def on_wake(self, call: Callable[[], None]) -> None:
        """Has ``wake`` call ``call``, in any thread."""
        self._woken = call

    def on_wait(self, call: Callable[[], bool]) -> None:
        """Has handles whose callers wait call ``call``, which steps for those that cannot; see
        ``Handle``."""
        self._drive = call

    def stats(self) -> SchedulerStats:
        """Returns what was done so far and what is going on."""
        running = list(self._running)
        return self._counters.stats(
            running=len(running),
            paused=sum(request.paused for request in running),
            waiting=len(self._queue) + len(self._inbox),
            kv_budget_bytes=self._pool.budget_bytes,
        )

    def predicted_wait(self) -> float | None:
        """Predicts the seconds until one more request would get a slot; None: nothing is known
        yet."""
        running = [(r.generated, r.new.most_tokens - r.generated) for r in list(self._running)]
        ahead = len(self._queue) + len(self._inbox)
        return self._counters.wait(running, self.limits.rows, ahead)

    # ---- the owner's thread

    @property
    def stepping(self) -> bool:
        """Whether a step is under way, within which no other can begin."""
        return self._stepping

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that have a slot, and that wait for one."""
        return len(self._running), len(self._queue) + len(self._inbox)

    def _tell(self, change: Callable[[], None]) -> None:
        """Calls an ``on_change``, within a step at its end."""
        if self._stepping:
            self._changes[change] = None
        else:
            change()

    def _end_step(self) -> None:
        self._stepping = False
        self._tell_changes()

    def _tell_changes(self) -> None:
        while self._changes:
            change = next(iter(self._changes))
            del self._changes[change]
            call_quietly(change)

    def tidy(self) -> None:
        """Takes in what came, and frees the slots of cancelled requests. Nothing within a step."""
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._inbox:
                item = self._inbox.popleft()
                if isinstance(item, Request):
                    self._queue.add(item)
                else:
                    item()
        finally:
            self._end_step()
        for request in [r for r in self._running if r.handle.wants_cancel]:
            self._end(request, State.CANCELLED)
        for request in [r for r in self._queue if r.handle.wants_cancel]:
            self._end(request, State.CANCELLED)
        if self._renewals != self._adapters.renewals:
            self._renewals = self._adapters.renewals
            for request in list(self._running):
                error = KtrtError("the adapters were changed during the answer; ask again")
                self._end(request, State.FAILED, error)

    def close(self, reason: KtrtError) -> None:
        """Ends all requests with ``reason``, which later ones get, too."""
        with self._lock:
            self._closed = reason
        # Whatever else has failed: nobody waits for ever.
        with _reported("The requests' last changes"):
            self.tidy()
        for item in self._inbox:
            if isinstance(item, Request):
                self._queue.add(item)
        for request in [*self._running, *self._queue]:
            with _reported("The end of a request"):
                self._end(request, State.FAILED, reason)
            if not request.handle.state.ended:
                request.handle.enter(State.FAILED, reason)

    def _end(self, request: Request, state: State, error: BaseException | None = None) -> None:
        if request.slot is None:
            if request in self._queue:
                self._queue.take(request)
        else:
            self._running.remove(request)
            self._pool.close(request.slot, keep=not isinstance(error, MemoryError))
            request.slot = None
        if self._blocked is request:
            self._blocked = None
        self._queue.leave(request)
        if state is State.FINISHED:
            self._counters.ended(request.generated)
        else:
            self._counters.cancelled += state is State.CANCELLED
            self._counters.failed += state is State.FAILED
        request.new.release()
        request.handle.enter(state, error)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Logs an exception of the block and goes on."""
    try:
        yield
    except Exception:
        logger.exception("%s failed while the scheduler closed", what)
