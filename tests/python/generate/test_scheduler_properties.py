"""Any order of what callers do to a scheduler, on a runner without a model: every answer is that of
the request alone, and all that requests hold comes back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from helpers.fake_steps import (
    BASE_CHOICE,
    Bench,
    FakePool,
    FakeRunner,
    FakeSlot,
    expected_tokens,
    row,
    tokens_of,
    turn,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from ktrt.engine.step_rows import ACTIVE
from ktrt.generate.scheduler import CostFacts, Handle, Scheduler, State

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from ktrt.engine.active_set import AdapterChoice
    from ktrt.generate.step import Step

CHOICES = (BASE_CHOICE, row(0), row(1), turn("router"), turn("half"))
# Prompts that share beginnings of many lengths.
PROMPTS = [[*range(length)] for length in (1, 2, 9, 130)] + [
    [*range(shared), *range(500 + shared, 500 + shared + more)]
    for shared in (0, 5, 128)
    for more in (1, 3, 140)
]


class TaggedPool(FakePool):
    """Knows of each held token who computed it."""

    def __init__(self, budget: int, most: int) -> None:
        super().__init__(budget, most)
        self.tags: dict[int, list[Hashable]] = {}
        self._all: list[FakeSlot] = []  # so that no id comes again

    def open(self, key: Hashable, prompt_ids: Sequence[int]) -> FakeSlot:
        slot = super().open(key, prompt_ids)
        self._all.append(slot)
        self.tags[id(slot)] = [key] * slot.length
        return slot

    def step_back(self, slot: FakeSlot) -> None:
        super().step_back(slot)
        del self.tags[id(slot)][slot.length :]


class TaggedRunner(FakeRunner):
    """Finds a slot whose tokens were computed by an adapter of another key."""

    bench: Any

    def run(self, step: Step) -> list[Any]:
        logits = super().run(step)
        for span in step.spans:
            pool: Any = self.pool
            slot: Any = span.slot
            pool.tags[id(slot)] += [self._key(span.adapter)] * len(span.ids)
            assert set(pool.tags[id(slot)]) == {slot.key}
            assert len(pool.tags[id(slot)]) == slot.length
        return logits

    def _key(self, adapter: int) -> Hashable:
        if adapter == ACTIVE:
            acting: AdapterChoice = self.bench.sets.acting
            return acting.key
        return next(each.key for each in CHOICES if each.row == adapter)


@dataclass(eq=False)
class Asked:
    handle: Handle
    prompt: list[int]
    tokens: int
    cancelled: bool = False
    # Whether a step that the request may have been in has failed.
    failed: bool = False


class Callers(RuleBasedStateMachine):
    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        facts = CostFacts(other_bytes=1e8, expert_bytes=1e9, share=0.1, token_seconds=1e-3)
        self.bench = Bench(facts, rows=3, turn_steps=3, turn_seconds=0.5, prompt_seconds=0.2)
        bench = self.bench
        bench.pool = TaggedPool(budget=700, most=5)
        bench.runner = TaggedRunner(bench.pool, bench.clock)
        bench.runner.bench = bench
        bench.runner.chunk = 128
        bench.scheduler = Scheduler(
            bench.runner, bench.sets, bench.cost, bench.scheduler._choose_tokens,
            bench.scheduler.limits, clock=bench.clock,
        )  # fmt: skip
        self.all: list[Asked] = []

    @rule(
        target=asked,
        prompt=st.sampled_from(PROMPTS),
        tokens=st.integers(1, 9),
        choice=st.sampled_from(CHOICES),
        client=st.sampled_from("ab"),
        options=st.fixed_dictionaries(
            {name: st.booleans() for name in ("streams", "progress", "paused")}
        ),
    )
    def submit(
        self, prompt: list[int], tokens: int, choice: AdapterChoice, client: str,
        options: dict[str, bool],
    ) -> Asked:  # fmt: skip
        handle = self.bench.submit(prompt, tokens, choice, client=client, **options)
        self.all.append(Asked(handle, prompt, tokens))
        return self.all[-1]

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.bench.scheduler.step()

    @rule(one=consumes(asked))
    def cancel(self, one: Asked) -> None:
        ended = one.handle.state.ended
        slots = len(self.bench.pool.used)
        had_slot = one.handle.state in (State.PREFILL, State.DECODE)
        one.cancelled = not ended
        one.handle.cancel()
        self.bench.scheduler.tidy()
        assert one.handle.state.ended
        assert len(self.bench.pool.used) == slots - had_slot

    @rule(target=asked, one=consumes(asked), times=st.integers(1, 2))
    def pause(self, one: Asked, times: int) -> Any:
        for _ in range(times):
            one.handle.pause()
        before = tokens_of(one.handle)
        self.bench.scheduler.step()
        assert tokens_of(one.handle) == before
        return multiple(one)

    @rule(one=asked)
    def resume(self, one: Asked) -> None:
        one.handle.resume()

    @rule()
    def the_model_fails(self) -> None:
        self.bench.runner.fail = RuntimeError("out of order")
        before = len(self.bench.runner.steps)
        self.bench.scheduler.step()
        if len(self.bench.runner.steps) > before:
            for one in self.all:
                one.failed |= one.handle.state is State.FAILED
        self.bench.runner.fail = None

    @rule()
    def ctrl_c(self) -> None:
        """Nothing is lost: requests go on with the next step."""
        self.bench.runner.fail = KeyboardInterrupt()
        with suppress(KeyboardInterrupt):
            self.bench.scheduler.step()
        self.bench.runner.fail = None

    @invariant()
    def answers_are_those_of_requests_alone(self) -> None:
        for one in self.all:
            found = tokens_of(one.handle)
            expected = expected_tokens(one.prompt, one.tokens)
            assert found == expected[: len(found)]
            state = one.handle.state
            assert (state is State.FINISHED) == (len(found) == one.tokens)
            assert state is not State.FAILED or one.failed
            assert state is not State.CANCELLED or one.cancelled

    @invariant()
    def slots_belong_to_requests_that_run(self) -> None:
        running = [one for one in self.all if one.handle.state in (State.PREFILL, State.DECODE)]
        assert len(self.bench.pool.used) == len(running) == self.bench.scheduler.counts[0]

    def teardown(self) -> None:
        for one in self.all:
            one.handle.resume()
        self.bench.run()
        for one in self.all:
            assert one.handle.state.ended
            assert one.handle.state is not State.WAITING
        self.answers_are_those_of_requests_alone()
        assert not self.bench.pool.used
        assert self.bench.released == len(self.all)
        assert self.bench.scheduler.counts == (0, 0)
        assert self.bench.scheduler._blocked is None


def test_any_order() -> None:
    run_state_machine_as_test(
        Callers, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


@pytest.mark.long
def test_any_order_for_long() -> None:
    run_state_machine_as_test(
        Callers, settings=settings(max_examples=3000, stateful_step_count=80, deadline=None)
    )
