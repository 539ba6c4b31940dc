"""The scheduler: requests of many callers become steps of one model."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from ktrt.errors import KtrtError, engine_errors
from ktrt.generate.scheduler.callers import Callers
from ktrt.generate.scheduler.cost import StepSize
from ktrt.generate.scheduler.policy import Pace, SchedulerLimits, Turns, share_prompts
from ktrt.generate.scheduler.requests import State
from ktrt.generate.scheduler.steps import SCORED_TOKENS, for_callers, make_step
from ktrt.generate.step import StepStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from ktrt.generate.response import TokenResponse
    from ktrt.generate.scheduler.cost import CostModel
    from ktrt.generate.scheduler.interfaces import AdapterSets, Runner
    from ktrt.generate.scheduler.requests import Request

logger = logging.getLogger(__name__)

# Seconds between two counts of the keys' and values' memory.
_COUNTED = 0.2


class Scheduler(Callers):
    """Steps a model for requests that come and go.

    A step holds one token of every request that decodes, and as much of the prompts as ``limits``
    have time for by ``cost``'s predictions. ``choose(answers, logits)`` returns a token for each
    answer, or why it has none.
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
        super().__init__(runner.pool, adapters, limits or SchedulerLimits(), by_row=by_row)
        self._runner, self._cost, self._choose_tokens = runner, cost, choose
        self._clock, self._union = clock, union
        self._counted = float("-inf")
        self._turns = Turns(self.limits.turn_steps, self.limits.turn_seconds)
        self._pace = Pace(self.limits.step_seconds)

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
                self._tell_changes()
                ready = [r for r in self._running if r.group == group and not r.paused]
                if ready:
                    self._turns.stepped(group, now)
                    self._run(ready, now)
                    return True
        finally:
            self._end_step()
        return False

    def rest(self) -> None:
        """Has the active adapters act in the model again, as callers of the model expect where no
        answer is under way. Nothing within a step."""
        if not self._stepping:
            self._adapters.restore()
            self._count_memory()

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
                if not isinstance(error, Exception):
                    self._end(request, State.FAILED, error)
                    raise
                self._end(request, State.FAILED, for_callers(error, request))
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
        # Whoever wants the logits of all tokens has nothing of a prefix.
        looked_for = () if request.scores_prompt else request.ids
        request.slot = self._pool.open(request.new.choice.key, looked_for)
        self._running.append(request)
        self._pool.reserve(request.slot, request.total)
        request.reused, request.served = request.held, now
        self._queue.charge(request, request.left)
        self._counters.prefix_query_tokens += len(looked_for)
        self._counters.prefix_hit_tokens += request.reused
        request.new.answer.begin(request.reused)
        request.handle.enter(State.PREFILL)
        if request.new.progress:
            request.handle.report(0, request.left)
        return request.new.progress

    # ---- a step

    def _run(self, ready: Sequence[Request], now: float) -> None:
        """Runs a step of requests of one group."""
        chosen: list[tuple[Request, int]] = []
        try:
            chosen = self._choose(ready, now)
            done = self._compute(chosen, ready, now)
        except StepStopped:
            return  # whoever was cancelled ends before the next step
        except Exception as error:  # noqa: BLE001 - whatever it is, others go on
            logger.debug("A step of %d requests failed: %s", len(chosen), error)
            self._counters.failed_steps += 1
            for request in [each for each, _ in chosen] or ready:
                if not request.handle.state.ended:
                    self._end(request, State.FAILED, for_callers(error, request))
            return
        if done:
            self._answer(done)
        self._count_memory(now)

    def _compute(
        self, chosen: Sequence[tuple[Request, int]], ready: Sequence[Request], now: float
    ) -> list[tuple[Request, Any]]:
        """Returns the requests whose next token can be chosen, with its logits."""
        step, size = make_step(chosen, self._adapters, by_row=self._by_row)
        self._counters.predicted_step_seconds = self._cost.seconds(size)
        with engine_errors():
            logits = self._runner.run(step)
        seconds, union = self._clock() - now, self._union()
        self._counters.stepped(seconds, self._cost.bytes_of(size, union), size.rows + size.prompt)
        self._cost.observe(size, seconds, union)
        self._counters.distinct_experts = None if union is None else union * self._cost.experts
        self._counters.read_bandwidth = self._cost.measured_bandwidth
        streams = any(r.new.streams for r in ready if r.handle.state is State.DECODE)
        self._pace.stepped(seconds, streams=streams)
        return [
            (request, found)
            for (request, count), found in zip(chosen, logits, strict=True)
            if self._computed(request, count, found)
        ]

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

        most = self._runner.prefill_chunk(sum(r.left for r in prompts))
        if any(r.scores_prompt for r in prompts):
            most = min(most, SCORED_TOKENS)
        parts = share_prompts(
            prompts,
            most,
            predict,
            self._pace.allowance(streams=streams),
            must=not rows or late,
            whole=not self._pool.continues,
            # Where sequences run one after the other, bits depend on a chunk's borders.
            alike=self.limits.reproducible and not self._runner.mixes,
        )
        for request, _ in parts:
            request.served = now
        return [*rows, *parts]

    def _computed(self, request: Request, count: int, logits: Any) -> bool:
        """Follows ``count`` computed tokens of a request; returns whether its next one can be
        chosen."""
        if request.handle.state is State.PREFILL:
            prompt, held = len(request.new.prompt_ids), request.held
            # Marks stay at the prompt's end, and before the last chunk for the same prompt again.
            first = held - count <= request.reused
            self._pool.mark(request.slot, replace=not first and held < prompt)
            if request.scores_prompt and not self._score(request, held - count, logits):
                return False
            if not request.left:
                self._counters.prompt_tokens += prompt
            if request.new.progress:
                request.handle.report(held - request.reused, prompt - request.reused)
        return not request.left

    def _score(self, request: Request, start: int, logits: Any) -> bool:
        """Scores computed tokens of a prompt; returns whether the request goes on."""
        scores = request.new.scores
        assert scores is not None
        try:
            scores.push(start, logits)
            if request.left:
                return True
            request.scores_prompt = False
            ends = not request.new.most_tokens
            whole = request.new.answer.without_tokens() if ends else None
            request.handle.put_scores(scores.whole(), whole)
        except Exception as error:  # noqa: BLE001 - belongs to this request alone
            self._end(request, State.FAILED, for_callers(error, request))
            return False
        if ends:
            self._counters.prompt_tokens += len(request.new.prompt_ids)
            self._end(request, State.FINISHED)
        return not ends

    def _count_memory(self, now: float | None = None) -> None:
        """Counts the tokens and bytes of the slots, at ``now`` only after a while."""
        if now is not None and now - self._counted < _COUNTED:
            return
        self._counted = self._clock()
        counters = self._counters
        counters.kv_tokens = sum(request.held for request in self._running)
        counters.kv_bytes, counters.kv_idle_bytes = self._pool.usage()

    def _answer(self, done: Sequence[tuple[Request, Any]]) -> None:
        """Gives the requests their next tokens."""
        answers = [request.new.answer for request, _ in done]
        try:
            tokens = self._choose_tokens(answers, [found[-1:] for _, found in done])
        except Exception as error:  # noqa: BLE001 - as an exception of the model
            tokens = [error] * len(done)
        for (request, logits), token in zip(done, tokens, strict=True):
            try:
                if isinstance(token, Exception):
                    raise token
                self._put(request, request.new.answer.push(token, logits[-1]))
            except Exception as error:  # noqa: BLE001 - belongs to this request alone
                self._end(request, State.FAILED, for_callers(error, request))

    def _put(self, request: Request, token: TokenResponse) -> None:
        request.ids.append(token.token)
        self._counters.generated_tokens += 1
        self._queue.charge(request, 1)
        if request.handle.state is State.PREFILL:
            request.handle.enter(State.DECODE)
        request.handle.put(token)
        if token.finish_reason is not None:
            self._end(request, State.FINISHED)
