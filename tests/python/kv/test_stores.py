"""Slots of caches that are not plain: copies, memory, and models that run one after the other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.family_models import FIRST_SPECIAL, families, random_model

from ktrt.engine.step_rows import RunningStep
from ktrt.generate.runner import ModelRunner
from ktrt.generate.step import Span, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktrt.kv.pool import Slot

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, FIRST_SPECIAL, (count,), generator=generator).tolist()
    return found


@pytest.fixture(params=["qwen3_next", "gpt_oss", "minimax"])
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(next(each for each in families() if each.model_type == request.param))


def run(runner: ModelRunner, slot: Slot, tokens: Sequence[int]) -> torch.Tensor:
    return runner.run(Step((Span(slot=slot, ids=tokens),)))[0][0]


def test_many_sequences(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of all of them give what each gives alone, and it is said once that they do not
    mix."""
    caplog.set_level(logging.INFO, logger="ktrt.generate.forwards")
    caplog.set_level(logging.INFO, logger="ktrt.generate.runner")
    runner, alone = (ModelRunner(model, running=RunningStep()) for _ in range(2))
    prompts = [ids(20, 1), ids(5, 2), ids(40, 3)]
    slots = [runner.pool.open(n, ()) for n in range(3)]
    steps = [prompts, [[3], [4], [5]], [[6], [7], [8]]]
    for step in steps:
        spans = tuple(Span(slot=slot, ids=part) for slot, part in zip(slots, step, strict=True))
        found = runner.run(Step(spans))
    assert not runner.mixes
    for at, logits in enumerate(found):
        slot = alone.pool.open(at, ())
        for step in steps:
            expected = run(alone, slot, step[at])
        assert torch.equal(logits[0], expected)
    said = [m for m in caplog.messages if "one after the other" in m]
    assert len(said) == 2, "once for each runner"


def test_a_prefix_is_copied_where_a_mark_allows_it(model: Any) -> None:
    """The new slot computes what a fresh one does, and the old one goes on as before."""
    runner = ModelRunner(model)
    if not runner.pool.continues:
        pytest.skip("nothing can follow a mark: transformers is older than 5.23")
    first = runner.pool.open("x", ())
    prompt, more = ids(20, 1), ids(9, 2)
    run(runner, first, prompt)
    runner.pool.mark(first)
    run(runner, first, more)
    second = runner.pool.open("x", [*prompt, 3, 4])
    assert second is not first
    assert second.ids == prompt
    fresh = runner.pool.open("y", ())
    run(runner, fresh, prompt)
    assert torch.equal(run(runner, second, [3, 4]), run(runner, fresh, [3, 4]))
    assert first.ids == [*prompt, *more]
    other = runner.pool.open("z", ())
    for part in (prompt, more):
        run(runner, other, part)
    assert torch.equal(run(runner, first, [5]), run(runner, other, [5]))


def test_memory_is_counted_and_freed(model: Any) -> None:
    runner = ModelRunner(model)
    slot = runner.pool.open("x", ())
    run(runner, slot, ids(20, 1))
    taken = runner.pool.committed_bytes
    assert taken > 0
    assert runner.pool.bytes_of(20) == taken
    runner.pool.mark(slot)
    run(runner, slot, ids(20, 2))
    assert runner.pool.committed_bytes > taken
    runner.pool.close(slot, keep=False)
    assert runner.pool.committed_bytes == 0
