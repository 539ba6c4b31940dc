"""The scheduler's numbers and predictions, on a runner without a model."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.fake_steps import Bench, expected_tokens, row, tokens_of

from ktrt.generate.scheduler import CostFacts
from ktrt.generate.scheduler.stats import Counters


def test_counts_follow_the_requests() -> None:
    bench = Bench(CostFacts(other_bytes=1e6, experts=8))
    first, second = bench.submit(10, 4), bench.submit(12, 9)
    assert (bench.scheduler.stats().waiting, bench.scheduler.stats().running) == (2, 0)
    bench.scheduler.step()
    second.pause()
    stats = bench.scheduler.stats()
    assert (stats.waiting, stats.running, stats.paused) == (0, 2, 1)
    assert (stats.prompt_tokens, stats.generated_tokens) == (22, 2)
    assert stats.last_step_tokens == 22
    assert stats.last_step_seconds == pytest.approx(0.01)
    bench.run()
    second.cancel()
    bench.run()
    stats = bench.scheduler.stats()
    assert (stats.finished, stats.cancelled, stats.failed) == (1, 1, 0)
    assert (stats.running, stats.waiting, stats.paused) == (0, 0, 0)
    assert stats.generated_tokens == len(tokens_of(first)) + 1
    assert stats.steps == len(bench.runner.steps)
    assert stats.step_seconds == pytest.approx(0.01 * stats.steps)
    assert stats.read_bandwidth is not None
    bench.scheduler.rest()
    stats = bench.scheduler.stats()
    assert (stats.kv_tokens, stats.kv_bytes) == (0, 0)
    assert stats.kv_idle_bytes > 0
    assert stats.kv_budget_bytes == bench.pool.budget


def test_prefixes_are_counted() -> None:
    bench = Bench()
    for _ in range(2):
        bench.submit([*range(50)], 1, row(1))
        bench.run()
    stats = bench.scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (100, 49)


class Scores:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def push(self, start: int, logits: Any) -> None:
        self.seen.append((start, len(logits)))

    def whole(self) -> Any:
        return (None, *self.seen)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_scored_prompt_gives_all_its_logits_and_looks_for_no_prefix(tokens: int) -> None:
    bench = Bench()
    bench.runner.chunk = 2000
    prompt = [*range(700)]
    for scores in (None, Scores()):
        handle = bench.submit(prompt, tokens if scores else 3, scores=scores)
        bench.run()
    assert scores is not None
    assert scores.seen == [(0, 512), (512, 188)]
    assert handle.prompt_logprobs == (None, *scores.seen)
    assert tokens_of(handle) == expected_tokens(prompt, tokens)
    assert handle.result().generated_tokens == tokens
    assert bench.scheduler.stats().prefix_query_tokens == 700
    assert bench.scheduler.stats().prompt_tokens == 1400
    assert not bench.pool.used


class TestWait:
    def test_a_free_place_is_there_at_once(self) -> None:
        assert Counters().wait([(1, 5)], 2, 0) == 0.0
        assert Counters().wait([(1, 5), (1, 5)], 2, 0) is None, "no step was measured"

    def test_the_shortest_ends_first(self) -> None:
        counters = Counters()
        counters.stepped(0.5, 1e6, 1)
        assert counters.wait([(1, 9), (1, 4)], 2, 0) == pytest.approx(2.0)
        assert counters.wait([(1, 9), (1, 4)], 2, 1) == pytest.approx(4.5)
        assert counters.wait([(1, 9), (1, 4)], 2, 2) == pytest.approx(0.5 * (4 + 9))

    def test_answers_so_far_tell_how_long_they_are(self) -> None:
        counters = Counters()
        counters.stepped(1.0, 1e6, 1)
        counters.ended(20)
        assert counters.wait([(5, 1000)], 1, 0) == pytest.approx(15.0)
        assert counters.wait([(100, 1000)], 1, 0) == pytest.approx(5.0), "a quarter of 20"
        assert counters.wait([(5, 3)], 1, 0) == pytest.approx(3.0)

    def test_of_a_scheduler(self) -> None:
        bench = Bench(rows=2)
        for _ in range(3):
            bench.submit(10, 30)
        bench.scheduler.step()
        bench.scheduler.step()
        predicted = bench.scheduler.predicted_wait()
        assert predicted is not None
        # Two run with 28 tokens to come; one waits, so that the second place is the one.
        assert predicted == pytest.approx(28 * 0.01)
