"""A runner, a pool, adapters and a clock without a model, for tests of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ktrt.engine.active_set import AdapterChoice
from ktrt.engine.step_rows import BASE
from ktrt.generate.response import Response, TokenResponse
from ktrt.generate.scheduler import (
    CostFacts,
    CostModel,
    Handle,
    NewRequest,
    Scheduler,
    SchedulerLimits,
)
from ktrt.generate.scheduler.cost import StepSize

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from ktrt.generate.step import Step

BASE_CHOICE = AdapterChoice((), BASE, "base")


def row(number: int) -> AdapterChoice:
    """An adapter that rows of a step can choose."""
    return AdapterChoice(((f"a{number}", 1.0),), number, f"digest {number}")


def turn(name: str) -> AdapterChoice:
    """An adapter that all rows of a step have to share."""
    return AdapterChoice(((name, 1.0),), None, f"digest {name}")


@dataclass(eq=False)
class FakeSlot:
    key: Hashable
    ids: list[int] = field(default_factory=list)
    promised: int = 0

    @property
    def length(self) -> int:
        return len(self.ids)


class FakePool:
    """Slots of token ids; a byte for each token."""

    def __init__(self, budget: int = 10**9, most: int = 64) -> None:
        self.budget = budget
        self.budget_bytes: int | None = budget
        self.most, self.continues = most, True
        self.used: list[FakeSlot] = []
        self.idle: list[FakeSlot] = []

    def open(self, key: Hashable, prompt_ids: Sequence[int]) -> FakeSlot:
        assert len(self.used) < self.most
        found = FakeSlot(key)
        for slot in [*self.idle, *self.used]:
            if slot.key == key:
                pairs = zip(slot.ids, prompt_ids[:-1], strict=False)
                shared = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
                size = min(slot.length, len(prompt_ids[:-1])) if shared is None else shared
                found.ids = max(found.ids, slot.ids[:size], key=len)
        self.used.append(found)
        return found

    def close(self, slot: FakeSlot, *, keep: bool = True) -> None:
        self.used.remove(slot)
        if keep:
            self.idle.append(slot)

    def reserve(self, slot: FakeSlot, tokens: int) -> bool:
        slot.promised = tokens
        return True

    def room_for(self, tokens: int) -> bool:
        taken = sum(max(slot.promised, slot.length) for slot in self.used)
        return len(self.used) < self.most and taken + tokens <= self.budget

    def usage(self) -> tuple[int, int]:
        used = sum(max(slot.promised, slot.length) for slot in self.used)
        return used, sum(slot.length for slot in self.idle)

    def mark(self, slot: FakeSlot, *, replace: bool = False) -> None:
        pass

    def step_back(self, slot: FakeSlot) -> None:
        del slot.ids[-1:]


class FakeClock:
    """Stands still but for what steps take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Logits are the ids of the sequence; steps take what ``seconds`` says. ``fail``: raised in the
    next step. ``steps``: all so far, as (slot, number of ids, adapter). ``between``: called between
    the two layers of a step, in which prompts are watched."""

    def __init__(self, pool: FakePool, clock: FakeClock) -> None:
        self.pool, self._clock = pool, clock
        self.mixes = True
        self.chunk = 512
        self.seconds: Callable[[StepSize], float] = lambda size: 0.01
        self.fail: BaseException | None = None
        self.between: Callable[[], None] = lambda: None
        self.steps: list[list[tuple[FakeSlot, int, int]]] = []

    def run(self, step: Step) -> list[Any]:
        spans: Any = step.spans
        assert len({id(span.slot) for span in spans}) == len(spans) > 0
        assert all(span.slot in self.pool.used for span in spans)
        self.steps.append([(span.slot, len(span.ids), span.adapter) for span in spans])
        rows = sum(len(span.ids) == 1 for span in spans)
        prompt = sum(len(span.ids) for span in spans) - rows
        held = sum(span.slot.length for span in spans)
        self._clock.now += self.seconds(StepSize(rows, prompt, len(spans) - rows, held))
        self.between()
        for span in spans:
            if len(span.ids) > 1 and span.watch is not None:
                span.watch(1, 2)
        failure, self.fail = self.fail, None
        if failure is not None:
            raise failure
        for span in spans:
            span.slot.ids += span.ids
        return [self._logits(span) for span in spans]

    @staticmethod
    def _logits(span: Any) -> list[list[int]]:
        first = span.slot.length - len(span.ids)
        return [list(span.slot.ids[: first + index + 1]) for index in span.wanted]

    def prefill_chunk(self, remaining: int) -> int:
        return self.chunk


class FakeSets:
    """Keeps what acts; rows of different adapters never meet one that cannot share."""

    def __init__(self) -> None:
        self.renewals = 0
        self.acting: AdapterChoice = BASE_CHOICE
        self.switches = 0
        self.outdated: set[AdapterChoice] = set()

    def is_current(self, choice: AdapterChoice) -> bool:
        return choice not in self.outdated

    def prepare(self, choices: Iterable[AdapterChoice], *, by_row: bool = True) -> bool:
        one, *others = choices
        if others:
            assert by_row
            assert all(each.row is not None for each in (one, *others))
            return False
        self.switches += self.acting != one
        self.acting = one
        return True

    def restore(self) -> None:
        self.acting = BASE_CHOICE


def next_token(ids: Sequence[int]) -> int:
    """Returns the fake model's answer, which depends on all tokens before."""
    return hash(tuple(ids)) % 997


class FakeAnswer:
    def __init__(self, prompt: Sequence[int], tokens: int) -> None:
        self._prompt, self._tokens = prompt, tokens
        self._count = self._reused = 0
        self.error: Exception | None = None

    def begin(self, reused: int) -> None:
        self._reused = reused

    def push(self, token: int, logits: list[int]) -> TokenResponse:
        if self.error is not None:
            raise self.error
        self._count += 1
        return TokenResponse(
            text=f"{token} ", token=token, prompt_tokens=len(self._prompt),
            finish_reason="length" if self._count == self._tokens else None,
            reused_tokens=self._reused, generated_tokens=self._count, prefill_seconds=0.0,
            decode_seconds=0.0,
        )  # fmt: skip

    def without_tokens(self) -> Response:
        return Response(
            text="", token_ids=(), finish_reason="length", prompt_tokens=len(self._prompt),
            reused_tokens=0, generated_tokens=0, prefill_seconds=0.0, decode_seconds=0.0,
        )  # fmt: skip


def choose(
    answers: Sequence[FakeAnswer], logits: Sequence[list[list[int]]]
) -> list[int | Exception]:
    """Chooses the tokens of all rows of a step."""
    return [next_token(ids) for (ids,) in logits]


def expected_tokens(prompt: Sequence[int], tokens: int) -> list[int]:
    """The answer to a prompt that runs alone."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class Bench:
    """A scheduler on fakes."""

    def __init__(
        self,
        facts: CostFacts | None = None,
        *,
        budget: int = 10**9,
        by_row: bool = True,
        **limits: Any,
    ) -> None:
        self.clock = FakeClock()
        self.pool = FakePool(budget)
        self.runner = FakeRunner(self.pool, self.clock)
        self.sets = FakeSets()
        self.cost = CostModel(facts or CostFacts(other_bytes=1e6))
        self.scheduler = Scheduler(
            self.runner, self.sets, self.cost, choose, SchedulerLimits(**limits),
            by_row=by_row, clock=self.clock,
        )  # fmt: skip
        self.released = 0

    def submit(
        self, prompt: Sequence[int] | int = 10, tokens: int = 5,
        choice: AdapterChoice = BASE_CHOICE, **options: Any,
    ) -> Handle:  # fmt: skip
        """Submits a prompt (a number: that many new ids) for an answer of ``tokens``."""
        ids = prompt
        if isinstance(ids, int):
            start = 1000 * self.released + 7 * len(self.runner.steps) + id(options) % 1000
            ids = [start + n for n in range(ids)]

        def release() -> None:
            self.released += 1

        answer = options.pop("answer", None) or FakeAnswer(ids, tokens)
        return self.scheduler.submit(
            NewRequest(
                prompt_ids=ids, answer=answer, choice=choice, most_tokens=tokens, release=release,
                **options,
            )
        )  # fmt: skip

    def run(self, most: int = 10_000) -> int:
        """Steps until there is nothing to do; returns the number of steps."""
        for count in range(most):
            if not self.scheduler.step():
                return count
        raise AssertionError(f"still busy after {most} steps")


def tokens_of(handle: Handle) -> list[int]:
    """The tokens that came so far."""
    return [each.token for each in handle._tokens]
