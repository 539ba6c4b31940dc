"""The scheduler: requests of many callers become steps of one model."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from ktrt.engine.step_rows import ACTIVE
from ktrt.errors import KtrtError, engine_errors
from ktrt.generate.scheduler.cost import StepSize
from ktrt.generate.scheduler.policy import (
    FairQueue,
    Pace,
    SchedulerLimits,
    Turns,
    share_prompts,
)
from ktrt.generate.scheduler.requests import Handle, NewRequest, Request, State
from ktrt.generate.step import Span, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from ktrt.engine.active_set import AdapterChoice
    from ktrt.generate.response import TokenResponse
    from ktrt.generate.scheduler.cost import CostModel

logger = logging.getLogger(__name__)


class Pool(Protocol):
    """The slots, as ``ktrt.kv.pool.KvPool`` has them."""

    continues: bool

    def open(self, key: Hashable, prompt_ids: Sequence[int]) -> Any: ...
    def close(self, slot: Any, *, keep: bool = True) -> None: ...
    def reserve(self, slot: Any, tokens: int) -> bool: ...
    def room_for(self, tokens: int) -> bool: ...
    def mark(self, slot: Any, *, replace: bool = False) -> None: ...
    def step_back(self, slot: Any) -> None: ...


class Runner(Protocol):
    """``ktrt.generate.runner.ModelRunner``, as far as it is used here."""

    @property
    def pool(self) -> Pool: ...
    def run(self, step: Step) -> list[Any]: ...
    def prefill_chunk(self, remaining: int) -> int: ...


class AdapterSets(Protocol):
    """The model's adapters, as ``ktrt.adapter.residents.Adapters`` has them."""

    @property
    def renewals(self) -> int: ...
    def is_current(self, choice: AdapterChoice) -> bool: ...
    def prepare(self, choices: Iterable[AdapterChoice], *, by_row: bool = True) -> bool: ...
    def restore(self) -> None: ...


class Scheduler:
    """Steps a model for requests that come and go.

    ``submit``, ``do_between`` and the handles are for any thread, everything else for the thread
    that owns the model. A step holds one token of every request that decodes, and as much of the
    prompts as ``limits`` have time for by ``cost``'s predictions. ``choose(answers, logits)``
    returns a token for each answer, or why it has none.
    """

    def __init__(
        self,
        runner: Runner,
        adapters: AdapterSets,
        cost: CostModel,
        choose: Callable[[Any, Any], Sequence[int | Exception]],
        limits: SchedulerLimits | None = None,
        *,
        by_row: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        union: Callable[[], float | None] = lambda: None,
    ) -> None:
        """``by_row``: the model's layers take the adapter that a row names; if not, requests of
        different adapters take turns. ``union``: the share of the experts that the last step chose,
        if it was counted."""
        self._runner, self._pool = runner, runner.pool
        self._adapters, self._cost, self._choose_tokens = adapters, cost, choose
        self.limits = limits or SchedulerLimits()
        self._by_row, self._clock, self._union = by_row, clock, union
        self._lock = threading.Lock()
        self._inbox: deque[Request | Callable[[], object]] = deque()
        self._woken: Callable[[], None] = lambda: None
        self._queue: FairQueue[Request] = FairQueue()
        self._running: list[Request] = []
        self._turns = Turns(self.limits.turn_steps, self.limits.turn_seconds)
        self._pace = Pace(self.limits.step_seconds)
        self._renewals = adapters.renewals
        self._stepping = False
        self._closed: KtrtError | None = None
        # The first request that found no memory: nobody may overtake it.
        self._blocked: Request | None = None

    # ---- any thread

    def submit(self, new: NewRequest) -> Handle:
        """Takes a request; returns the handle of its answer. ``KtrtError``: the scheduler is
        closed."""
        handle = Handle(self.wake)
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

    # ---- the owner's thread

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that have a slot, and that wait for one."""
        return len(self._running), len(self._queue) + len(self._inbox)

    def step(self) -> bool:
        """Runs one step; False: there was nothing to do.

        An exception of the model ends the requests of its step, and the scheduler goes on. Only
        Ctrl-C and its like come out of here; the requests can then be stepped again.
        """
        self.tidy()
        now = self._clock()
        self._stepping = True
        try:
            for group in self._turns.order(self._groups(), now):
                if self._admit(group, now):
                    return True  # callers hear that their prompts begin
                ready = [r for r in self._running if r.group == group and not r.paused]
                if ready:
                    self._turns.stepped(group, now)
                    self._run(ready, now)
                    return True
        finally:
            self._stepping = False
        return False

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
            self._stepping = False
        for request in [r for r in self._running if r.handle.wants_cancel]:
            self._end(request, State.CANCELLED)
        for request in [r for r in self._queue if r.handle.wants_cancel]:
            self._end(request, State.CANCELLED)
        if self._renewals != self._adapters.renewals:
            self._renewals = self._adapters.renewals
            for request in list(self._running):
                error = KtrtError("the adapters were changed during the answer; ask again")
                self._end(request, State.FAILED, error)

    def rest(self) -> None:
        """Has the active adapters act in the model again, as callers of the model expect where no
        answer is under way. Nothing within a step."""
        if not self._stepping:
            self._adapters.restore()

    def close(self, reason: KtrtError) -> None:
        """Ends all requests with ``reason``, which later ones get, too."""
        with self._lock:
            self._closed = reason
        self.tidy()
        for request in [*self._running, *self._queue]:
            self._end(request, State.FAILED, reason)

    def _groups(self) -> list[Hashable]:
        groups = [request.group for request in self._running if not request.paused]
        return groups + self._queue.groups() if self._queue else groups

    # ---- admission

    def _admit(self, group: Hashable, now: float) -> bool:
        """Gives waiting requests of the group slots; returns whether a caller has to hear of it."""
        told = False
        while self._queue and (request := self._first(group)) is not None:
            if not self._may_start(request):
                break
            self._queue.take(request)
            try:
                told |= self._start(request, now)
            except BaseException as error:  # belongs to this request alone
                self._end(request, State.FAILED, error)
                if not isinstance(error, Exception):
                    raise
                told = True
        return told

    def _first(self, group: Hashable) -> Request | None:
        """Returns the next request of a group: the one that found no memory before any other. Else
        it and another payer's, who got less meanwhile, would wait for each other."""
        blocked = self._blocked
        if blocked is not None and blocked.group == group and not blocked.paused:
            return blocked
        return self._queue.first(group)

    def _may_start(self, request: Request) -> bool:
        beside = [r for r in self._running if r.group == request.group and not r.paused]
        if len(beside) >= self.limits.rows or not self._keeps_floor(request, beside):
            return False
        if self._blocked is not None and self._blocked.paused:
            self._blocked = None
        if self._blocked not in (None, request):
            return False
        # A request that is alone may try: there is no more memory to wait for.
        if self._pool.room_for(request.total) or not self._running:
            self._blocked = None
            return True
        self._blocked = request
        return False

    def _keeps_floor(self, request: Request, beside: Sequence[Request]) -> bool:
        """Returns whether streams keep their floor with one more row, by predictions."""
        if not beside or not (request.new.streams or any(r.new.streams for r in beside)):
            return True
        held = len(request.ids) + sum(r.held for r in beside)
        predicted = self._cost.seconds(StepSize(len(beside) + 1, held=held))
        return predicted <= self.limits.step_seconds

    def _start(self, request: Request, now: float) -> bool:
        if not self._adapters.is_current(request.new.choice):
            raise KtrtError("the adapters were changed before the answer began; ask again")
        request.slot = self._pool.open(request.new.choice.key, request.ids)
        self._running.append(request)
        self._pool.reserve(request.slot, request.total)
        request.reused, request.served = request.held, now
        self._queue.charge(request, request.left)
        request.new.answer.begin(request.reused)
        request.handle.enter(State.PREFILL)
        if request.new.progress:
            request.handle.report(0, request.left)
        return request.new.progress

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
        request.new.release()
        request.handle.enter(state, error)

    # ---- a step

    def _run(self, ready: Sequence[Request], now: float) -> None:
        """Runs a step of requests of one group."""
        chosen = self._choose(ready, now)
        try:
            step, size = self._make(chosen)
            with engine_errors():
                logits = self._runner.run(step)
        except Exception as error:  # noqa: BLE001 - whatever it is, others go on
            logger.debug("A step of %d requests failed: %s", len(chosen), error)
            for request, _ in chosen:
                self._end(request, State.FAILED, error)
            return
        seconds = self._clock() - now
        self._cost.observe(size, seconds, self._union())
        streams = any(r.new.streams for r in ready if r.handle.state is State.DECODE)
        self._pace.stepped(seconds, streams=streams)
        done = [
            (request, found)
            for (request, count), found in zip(chosen, logits, strict=True)
            if self._computed(request, count)
        ]
        if done:
            self._answer(done)

    def _choose(self, ready: Sequence[Request], now: float) -> list[tuple[Request, int]]:
        """Returns the requests of the step with how many tokens each computes."""
        for request in ready:
            # A prompt's last token is never computed alone, as an answer's is, by another order of
            # sums: its bits must not depend on where chunks ended or on what was held.
            if request.left == 1 and request.handle.state is State.PREFILL:
                self._pool.step_back(request.slot)
        rows = [(request, 1) for request in ready if request.left == 1]
        prompts = [request for request in ready if request.left > 1]
        if not prompts:
            return rows
        prompts.sort(key=self._queue.served)
        streams = any(r.new.streams for r, _ in rows)
        late = now - min(r.served for r in prompts) >= self.limits.prompt_seconds
        held = sum(r.held for r, _ in rows) + prompts[0].held

        def predict(tokens: int, count: int) -> float:
            return self._cost.seconds(StepSize(len(rows), tokens, count, held))

        parts = share_prompts(
            prompts,
            self._runner.prefill_chunk(sum(r.left for r in prompts)),
            predict,
            self._pace.allowance(streams=streams),
            must=not rows or late,
            whole=not self._pool.continues,
        )
        for request, _ in parts:
            request.served = now
        return [*rows, *parts]

    def _make(self, chosen: Sequence[tuple[Request, int]]) -> tuple[Step, StepSize]:
        first = chosen[0][0].new.choice
        choices = [first]
        if any(request.new.choice != first for request, _ in chosen):
            choices = list(dict.fromkeys(request.new.choice for request, _ in chosen))
        shared = self._adapters.prepare(choices, by_row=self._by_row)
        spans, rows, prompt, held = [], 0, 0, 0
        for request, count in chosen:
            start, row = request.held, request.new.choice.row
            ids = request.ids[start : start + count]
            span = Span(
                slot=request.slot,
                ids=ids,
                adapter=ACTIVE if shared or row is None else row,
                logits=None if start + count == len(request.ids) else (),
            )
            spans.append(span)
            held += start
            rows += count == 1
            prompt += count if count > 1 else 0
        return Step(tuple(spans)), StepSize(rows, prompt, len(chosen) - rows, held)

    def _computed(self, request: Request, count: int) -> bool:
        """Follows ``count`` computed tokens of a request; returns whether its next one can be
        chosen."""
        if request.handle.state is State.PREFILL:
            prompt, held = len(request.new.prompt_ids), request.held
            # Marks stay at the prompt's end, and before the last chunk for the same prompt again.
            first = held - count <= request.reused
            self._pool.mark(request.slot, replace=not first and held < prompt)
            if request.new.progress:
                request.handle.report(held - request.reused, prompt - request.reused)
        return not request.left

    def _answer(self, done: Sequence[tuple[Request, Any]]) -> None:
        """Gives the requests their next tokens."""
        answers = [request.new.answer for request, _ in done]
        try:
            tokens = self._choose_tokens(answers, [found for _, found in done])
        except Exception as error:  # noqa: BLE001 - as an exception of the model
            tokens = [error] * len(done)
        for (request, logits), token in zip(done, tokens, strict=True):
            try:
                if isinstance(token, Exception):
                    raise token
                self._put(request, request.new.answer.push(token, logits[0]))
            except Exception as error:  # noqa: BLE001 - belongs to this request alone
                self._end(request, State.FAILED, error)

    def _put(self, request: Request, token: TokenResponse) -> None:
        request.ids.append(token.token)
        self._queue.charge(request, 1)
        if request.handle.state is State.PREFILL:
            request.handle.enter(State.DECODE)
        request.handle.put(token)
        if token.finish_reason is not None:
            self._end(request, State.FINISHED)
