"""Recorded steps: a replay computes what the step computes, also for other numbers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ktrt.engine.active_set import ActiveSet
from ktrt.engine.recording import VECTOR, RecordedSteps, Recorder, active
from ktrt.errors import KtrtError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    assert torch.get_num_threads() == 1, "a replay gives the threads back"
    torch.set_num_threads(before)


class Step:
    """``function`` of x [4] and a counter [1], recorded, into a result [n]."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.function = function
        self.x, self.count = torch.arange(4.0), torch.zeros(1, dtype=torch.int64)
        self.result = torch.zeros_like(function(self.x, self.count))
        self.recorder: Recorder | None = None
        self.replay = RecordedSteps().capture(self._run)

    def _run(self) -> None:
        self.recorder = active()
        assert self.recorder is not None
        self.recorder.describe([self.x, self.count], torch.zeros(0), None)
        self.result.copy_(self.function(self.x, self.count))

    @property
    def calls(self) -> int:
        assert self.recorder is not None
        return len(self.recorder.calls())

    def check(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for count in range(4):
            self.x.copy_(torch.randn(4, generator=generator))
            self.count.fill_(count)
            expected = self.function(self.x, self.count)
            self.result.fill_(torch.nan)
            self.replay()
            assert torch.equal(self.result, expected)


WEIGHT = torch.linspace(-1, 1, 16).view(4, 4)


def views(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    left, right = (x * 2).view(2, 2).t().chunk(2)
    return torch.cat([-right, left]).reshape(-1) + x[None].expand(2, 4).sum(0)


def in_place(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(4)
    buffer.index_copy_(0, count, x[:1])
    view = buffer[1:]
    view.mul_(3)
    return buffer + x


def several_results(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    values, indices = x.topk(2)
    return values + x.sort().values[indices]


def types(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return (x.to(torch.bfloat16) * count).float() + torch.polar(x, x).real


def chosen(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    seen = torch.arange(4) <= count
    return x.masked_fill(~seen, -1.0).softmax(-1) @ WEIGHT


@pytest.mark.parametrize("function", [views, in_place, several_results, types, chosen])
def test_runs_again_with_other_numbers(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    Step(function).check()


def test_what_depends_on_no_input_runs_once() -> None:
    """Views are not made again, and results that nobody reads are left out."""

    def function(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        (x + 1).exp()
        scaled = WEIGHT.double().float().t().contiguous()
        return (x.view(1, 4) @ scaled).view(4)

    step = Step(function)
    step.check()
    assert step.calls == 2, "the product and the copy of the result"


def test_memory_from_outside_is_written_to() -> None:
    held = torch.zeros(3)

    def function(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        held.index_copy_(0, count, x[1:2])
        return held * 1

    step = Step(function)
    for count in range(3):
        step.count.fill_(count)
        step.x.fill_(count + 5)
        step.replay()
    assert held.tolist() == [5, 6, 7]


def test_work_that_torch_does_not_see() -> None:
    def function(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        recorder = active()
        if recorder is None:
            return x * 2 * 3 + 1
        twice = x * 2

        def bind(out: torch.Tensor) -> Callable[[], object]:
            assert active() is None
            return lambda: torch.mul(twice, 3, out=out)

        return recorder.call((4,), (twice,), bind) + 1

    Step(function).check()


@pytest.mark.parametrize(
    ("what", "function"),
    [
        ("_local_scalar_dense", lambda x, _: x * x[0].item()),
        ("aten.index", lambda x, _: x[x > 1].sum()[None]),
        ("bernoulli", lambda x, _: torch.nn.functional.dropout(x, 0.5)),
    ],
)
def test_what_depends_on_numbers_is_refused(what: str, function: Any) -> None:
    with pytest.raises(KtrtError, match=f"cannot be recorded.*{what}"):
        Step(function)
    assert active() is None


def test_large_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktrt.engine.recording._MOST_BYTES", 1 << 20)
    with pytest.raises(KtrtError, match="more than 1 MiB"):
        Step(lambda x, _: x.repeat(1 << 17).view(-1, 4).sum(0))


def test_a_step_must_be_described() -> None:
    result = torch.zeros(4)
    with pytest.raises(KtrtError, match="not been described"):
        RecordedSteps().capture(partial(copy, result))


def copy(result: torch.Tensor) -> None:
    result.copy_(torch.ones(4))


def test_one_step_at_a_time() -> None:
    def inner() -> None:
        RecordedSteps().capture(lambda: None)

    with pytest.raises(KtrtError, match="being recorded"):
        RecordedSteps().capture(inner)
    assert active() is None


def test_shortcuts_stand_in() -> None:
    seen = []

    def shortcut(operation: Any, arguments: Any, results: Any) -> Any:
        if operation is not torch.ops.aten.exp.default:
            return None
        seen.append(arguments)
        return lambda: results[0].copy_(arguments[0].exp()).add_(1)

    x, result = torch.ones(2), torch.zeros(2)

    def step() -> None:
        recorder = active()
        assert recorder is not None
        recorder.describe([x], torch.zeros(0), None)
        result.copy_(x.exp())

    replay = RecordedSteps(shortcut).capture(step)
    x.fill_(0)
    replay()
    assert len(seen) == 1
    assert result.tolist() == [2, 2]


def test_a_changed_set_is_followed_once_before_a_run() -> None:
    active_set, seen = ActiveSet(), list[int]()
    result, x = torch.zeros(4), torch.zeros(4)

    def step() -> None:
        recorder = active()
        assert recorder is not None
        recorder.describe([x], torch.zeros(0), None)
        recorder.follow(active_set, lambda: seen.append(active_set.version))
        result.copy_(x + 1)

    replay = RecordedSteps().capture(step)
    replay()
    assert not seen
    active_set.become("a")
    replay()
    replay()
    assert len(seen) == 1
    # Another forward may have left the set and come back: its layers hold the other one's.
    active_set.become("b")
    active_set.become("a")
    replay()
    assert seen == [seen[0]] * 2


def test_the_engines_results_have_room_for_whole_vectors() -> None:
    x = torch.ones(3, 5)
    recorder = Recorder()
    with recorder.recording():
        out = recorder.call((3, 5), (x,), lambda out: lambda: out.fill_(2))
    assert out.is_contiguous()
    held = out.as_strided((VECTOR,), (1,))
    assert held.tolist() == [2.0] * 15 + [0.0] * (VECTOR - 15)
