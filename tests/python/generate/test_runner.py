"""The runner: steps of many sequences against the same sequences alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.step_attention import step_attention
from helpers.tiny_chat import make_model, make_tokenizer

from ktrt.engine import recording
from ktrt.engine.recording import RecordedSteps
from ktrt.engine.step_rows import BASE, IDLE
from ktrt.errors import KtrtError
from ktrt.generate import row_steps
from ktrt.generate.runner import KvCache, ModelRunner
from ktrt.generate.step import Span, Step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ktrt.engine.step_rows import RunningStep
    from ktrt.kv.pool import Slot

pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTER = 3


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model(make_tokenizer())


@pytest.fixture
def running(llama: Any) -> Iterator[RunningStep]:
    with step_attention(llama) as running:
        yield running


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(1, 300, (count,), generator=generator).tolist()
    return found


def make(llama: Any, running: RunningStep | None, **options: Any) -> ModelRunner:
    given: dict[str, Any] = {"maker": RecordedSteps(), "capacity": 256, "slots": 8} | options
    return ModelRunner(llama, running=running, **given)


def whole(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The logits [tokens, vocab_size] without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def fill(runner: ModelRunner, *prompts: Sequence[int]) -> list[Slot]:
    slots = [runner.pool.open("key", ()) for _ in prompts]
    runner.run(Step(tuple(Span(slot=s, ids=ids) for s, ids in zip(slots, prompts, strict=True))))
    return slots


PROMPTS = [tokens(12, 1), tokens(5, 2), tokens(1, 3), tokens(30, 4)]


@pytest.mark.parametrize("mixed", [True, False])
def test_prompts_and_rows_in_one_step(llama: Any, running: RunningStep, mixed: bool) -> None:
    runner = make(llama, running if mixed else None)
    assert runner.mixes is mixed
    a, b = fill(runner, PROMPTS[0], PROMPTS[1])
    c = runner.pool.open("key", ())
    logits = runner.run(
        Step(
            (
                Span(slot=c, ids=PROMPTS[3], logits=(3, 29)),
                Span(slot=a, ids=[7]),
                Span(slot=b, ids=[8, 9, 10], logits=()),
            )
        )
    )
    assert close(logits[0], whole(llama, PROMPTS[3])[[3, 29]])
    assert close(logits[1], whole(llama, [*PROMPTS[0], 7])[-1:])
    assert logits[2].shape == (0, logits[0].shape[1])
    assert [c.ids, a.ids, b.ids] == [PROMPTS[3], [*PROMPTS[0], 7], [*PROMPTS[1], 8, 9, 10]]
    (last,) = runner.run(Step((Span(slot=b, ids=[11]),)))
    assert close(last, whole(llama, b.ids)[-1:])


def test_no_logits_are_wanted(llama: Any, running: RunningStep) -> None:
    runner = make(llama, running)
    slots = [runner.pool.open("key", ()) for _ in range(2)]
    spans = tuple(Span(slot=slot, ids=PROMPTS[0], logits=()) for slot in slots)
    assert [len(logits) for logits in runner.run(Step(spans))] == [0, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_recorded_rows_equal_rows_alone(
    llama: Any, running: RunningStep, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that join and leave, in slots in any order: the model itself runs only what a bucket's
    recording needs. The shortest sequence is in the last row, next to rows that stand for
    nothing."""
    monkeypatch.setattr(row_steps, "_BUCKETS", (1, 2, 4, 8))
    runner, eager = make(llama, running), make(llama, running, maker=None)
    prompts = [tokens(20 - 3 * n, n) for n in range(count)]
    slots, references = fill(runner, *prompts), fill(eager, *prompts)
    for step in range(4):
        order = list(range(count))[:: -1 if step % 2 else 1][: max(1, count - step // 2)]
        more = {at: 50 + 10 * step + at for at in order}
        found = runner.run(Step(tuple(Span(slot=slots[at], ids=[more[at]]) for at in order)))
        for at, logits in zip(order, found, strict=True):
            (alone,) = eager.run(Step((Span(slot=references[at], ids=[more[at]]),)))
            assert close(logits, alone)
    assert runner.has_graphs
    hook = llama.register_forward_pre_hook(lambda *_: pytest.fail("the model runs"))
    runner.run(Step(tuple(Span(slot=slots[at], ids=[9]) for at in order)))
    hook.remove()


def test_rows_that_stand_for_nothing(llama: Any, running: RunningStep) -> None:
    """They are idle, and what slots hold is not touched."""
    runner = make(llama, running)
    slots = fill(runner, *PROMPTS[:2], tokens(9, 8), tokens(6, 9), tokens(7, 10))
    runner.run(Step((Span(slot=slots[0], ids=[5]),)))
    seen = []
    hook = llama.register_forward_pre_hook(lambda *_: seen.append(running.rows))
    runner.run(Step(tuple(Span(slot=slot, ids=[5], adapter=BASE) for slot in slots)))
    hook.remove()
    (rows,) = seen
    assert rows is not None
    assert rows.adapters.tolist() == [BASE] * 5 + [IDLE]
    assert rows.lengths.tolist() == [14, 6, 10, 7, 8, 0]
    for slot in slots:
        (logits,) = runner.run(Step((Span(slot=slot, ids=[6]),)))
        assert close(logits, whole(llama, slot.ids)[-1:])


@pytest.mark.parametrize("mixed", [True, False])
def test_layers_see_each_tokens_adapter(llama: Any, running: RunningStep, mixed: bool) -> None:
    runner = make(llama, running)
    if not mixed:
        runner._mixed = None
    a, b = fill(runner, PROMPTS[0], PROMPTS[1])
    seen: list[tuple[list[int], list[int] | None]] = []

    def note(*_: Any) -> None:
        rows = running.rows
        assert rows is not None
        wanted = None if rows.logits is None else rows.logits.tolist()
        seen.append((rows.adapters.tolist(), wanted))

    hook = llama.model.layers[0].register_forward_pre_hook(note)
    spans = Span(slot=a, ids=[1, 2], adapter=ADAPTER), Span(slot=b, ids=[3], adapter=BASE)
    runner.run(Step(spans))
    hook.remove()
    whole_step: list[Any] = [([BASE, ADAPTER, ADAPTER], [0, 2])]
    assert seen == (whole_step if mixed else [([ADAPTER, ADAPTER], [1]), ([BASE], None)])


def test_an_attention_that_does_not_know_steps(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The answers are right from the first on; it is said once."""
    from ktrt.engine.step_rows import RunningStep

    caplog.set_level(logging.INFO, logger="ktrt.generate.runner")
    runner = make(llama, RunningStep())
    assert runner.mixes
    slots = fill(runner, *PROMPTS)
    assert not runner.mixes
    for _ in range(2):
        logits = runner.run(Step(tuple(Span(slot=slot, ids=[5]) for slot in slots)))
        for slot, found in zip(slots, logits, strict=True):
            assert close(found, whole(llama, slot.ids)[-1:])
    assert len([m for m in caplog.messages if "one after the other" in m]) == 1


def test_frequencies_of_the_longest_sequence_do_not_mix(
    llama: Any, running: RunningStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.model.rotary_emb, "rope_type", "dynamic")
    assert not make(llama, running).mixes


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("an expert failed")])
def test_after_an_exception(
    llama: Any, running: RunningStep, error: BaseException, mixed: bool
) -> None:
    runner = make(llama, running if mixed else None)
    a, b, untouched = fill(runner, *PROMPTS[:3])
    before = a.ids, b.ids

    def fail(*_: Any) -> None:
        raise error

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        runner.run(Step((Span(slot=a, ids=[1, 2]), Span(slot=b, ids=[3]))))
    hook.remove()
    kept = isinstance(error, KeyboardInterrupt)
    assert (a.ids, b.ids) == (before if kept else ([], []))
    for slot in (a, b, untouched):
        (logits,) = runner.run(Step((Span(slot=slot, ids=[5, 6]),)))
        assert close(logits, whole(llama, slot.ids)[-1:])


def test_bad_steps(llama: Any, running: RunningStep) -> None:
    runner = make(llama, running)
    (slot,) = fill(runner, PROMPTS[0])
    with pytest.raises(KtrtError, match="one span of a slot"):
        runner.run(Step((Span(slot=slot, ids=[1]), Span(slot=slot, ids=[2]))))
    for step in (Step(()), Step((Span(slot=slot, ids=[]),))):
        with pytest.raises(KtrtError, match="a token of every sequence"):
            runner.run(step)
    assert slot.ids == PROMPTS[0]


def test_another_structure_of_adapters_ends_the_recordings(
    llama: Any, running: RunningStep
) -> None:
    from ktrt.engine.active_set import ActiveSet

    active_set = ActiveSet()
    runner = make(llama, running, active_set=active_set)
    (slot,) = fill(runner, PROMPTS[0])
    runner.run(Step((Span(slot=slot, ids=[5]),)))
    assert runner.has_graphs
    active_set.renew()
    runner.run(Step((Span(slot=slot, ids=[6]),)))
    assert not runner.has_graphs
    runner.run(Step((Span(slot=slot, ids=[7]),)))
    assert runner.has_graphs


def test_rows_too_many_to_be_recorded_leave_the_others(
    llama: Any, running: RunningStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make(llama, running)
    slots = fill(runner, *PROMPTS)
    runner.run(Step((Span(slot=slots[0], ids=[5]),)))
    monkeypatch.setattr(recording, "_MOST_BYTES", 100)
    for token in (6, 7):
        logits = runner.run(Step(tuple(Span(slot=slot, ids=[token]) for slot in slots)))
        for slot, found in zip(slots, logits, strict=True):
            assert close(found, whole(llama, slot.ids)[-1:])
    hook = llama.register_forward_pre_hook(lambda *_: pytest.fail("the model runs"))
    runner.run(Step((Span(slot=slots[0], ids=[5]),)))
    hook.remove()


def test_conversations_share_a_runner(llama: Any, running: RunningStep) -> None:
    runner = make(llama, running)
    first, second = KvCache(llama, runner=runner), KvCache(llama, runner=runner)
    for cache in (first, second):
        cache.forward(PROMPTS[0][cache.reuse(PROMPTS[0]) :])
    assert close(first.forward([5]), whole(llama, [*PROMPTS[0], 5])[-1])
    assert close(second.forward([6]), whole(llama, [*PROMPTS[0], 6])[-1])
    assert runner.pool.slots_in_use == 2
    del first
    assert runner.pool.slots_in_use == 1
    third = KvCache(llama, runner=runner)
    assert third.reuse([*PROMPTS[0], 5, 9]) == len(PROMPTS[0]) + 1
