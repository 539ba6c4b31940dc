"""The scheduler on a runner without a model: order, bounds, turns and ends."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_steps import (
    Bench,
    FakeAnswer,
    expected_tokens,
    row,
    tokens_of,
    turn,
)

from ktrt.engine.step_rows import ACTIVE, BASE
from ktrt.errors import ConfigError, KtrtError
from ktrt.generate.scheduler import CostFacts, SchedulerLimits, State
from ktrt.generate.scheduler.cost import StepSize
from ktrt.generate.scheduler.policy import share_prompts

PROMPTS = [[*range(base, base + 10 + base % 7)] for base in (100, 203, 306, 409)]


class TestSteps:
    def test_answers_are_those_of_requests_alone(self) -> None:
        bench = Bench()
        handles = [bench.submit(prompt, 6) for prompt in PROMPTS]
        bench.run()
        for handle, prompt in zip(handles, PROMPTS, strict=True):
            assert tokens_of(handle) == expected_tokens(prompt, 6)
            assert handle.state is State.FINISHED
            assert handle.result().text == "".join(f"{t} " for t in tokens_of(handle))
            assert [each.token for each in handle] == tokens_of(handle)
        assert not bench.pool.used
        assert bench.released == 4

    def test_rows_share_steps(self) -> None:
        bench = Bench()
        for prompt in PROMPTS:
            bench.submit(prompt, 6)
        # One for all prompts, which gives the first tokens, then one for each token.
        assert bench.run() == 6
        assert [len(step) for step in bench.runner.steps] == [4] * 6

    def test_rows_name_their_adapters(self) -> None:
        bench = Bench()
        bench.submit(PROMPTS[0], 3, row(2))
        bench.submit(PROMPTS[1], 2)
        bench.run()
        adapters = [{adapter for *_, adapter in step} for step in bench.runner.steps]
        assert adapters == [{2, BASE}, {2, BASE}, {ACTIVE}]

    def test_one_joins_while_another_decodes(self) -> None:
        bench = Bench()
        first = bench.submit(PROMPTS[0], 9)
        for _ in range(4):
            bench.scheduler.step()
        second = bench.submit(PROMPTS[1], 2)
        bench.scheduler.step()
        counts = [count for _, count, _ in bench.runner.steps[-1]]
        assert counts == [1, len(PROMPTS[1])], "the prompt rides in a decode step"
        bench.run()
        assert tokens_of(first) == expected_tokens(PROMPTS[0], 9)
        assert tokens_of(second) == expected_tokens(PROMPTS[1], 2)

    def test_a_prefix_is_reused_for_the_same_adapters_only(self) -> None:
        bench = Bench()
        again = [bench.submit(PROMPTS[0], 2, choice) for choice in (row(1), row(2), row(1))]
        bench.run()
        assert [h.result().reused_tokens for h in again] == [0, 0, 0], "they began together"
        late = [bench.submit(PROMPTS[0], 2, choice) for choice in (row(1), row(3))]
        bench.run()
        assert [h.result().reused_tokens for h in late] == [len(PROMPTS[0]) - 1, 0]
        assert tokens_of(late[0]) == tokens_of(again[0])

    def test_chunks_end_at_absolute_multiples(self) -> None:
        bench = Bench()
        bench.submit([*range(100)], 1)
        bench.run()
        bench.runner.steps.clear()
        bench.submit([*range(2000)], 1)
        bench.run()
        ends, held = [], 100
        for ((_, count, _),) in bench.runner.steps:
            held += count
            ends.append(held)
        assert ends == [512, 1024, 1536, 2000]

    def test_a_prompts_last_token_is_not_computed_alone(self) -> None:
        bench = Bench()
        bench.runner.chunk = 128
        prompt = [*range(129)]
        first = bench.submit(prompt, 2)
        bench.run()
        again = bench.submit(prompt, 2)
        bench.run()
        counts = [count for step in bench.runner.steps for _, count, _ in step]
        assert counts == [128, 2, 1, 2, 1]
        assert again.result().reused_tokens == 128
        assert tokens_of(first) == tokens_of(again) == expected_tokens(prompt, 2)

    @pytest.mark.parametrize("must", [False, True])
    def test_no_chunk_is_a_row(self, must: bool) -> None:
        """One token before a border, however little time there is."""
        prompt: Any = SimpleNamespace(held=127, left=1000)
        found = share_prompts([prompt], 512, lambda tokens, _: tokens, 2.0, must=must)
        assert [count for _, count in found] == ([129] if must else [])

    def test_prompts_that_cannot_be_divided(self) -> None:
        bench = Bench()
        bench.pool.continues = False
        bench.submit([*range(2000)], 2)
        bench.run()
        assert [count for ((_, count, _),) in bench.runner.steps] == [2000, 1]

    def test_progress(self) -> None:
        bench = Bench()
        handle = bench.submit([*range(1000)], 1, progress=True)
        seen = []
        while not handle.state.ended:
            bench.scheduler.step()
            seen.append(handle.take_progress())
        assert seen == [[(0, 1000)], [(256, 1000), (512, 1000)], [(756, 1000), (1000, 1000)]]


class TestEnds:
    def test_a_cancelled_request_frees_its_slot_within_one_step(self) -> None:
        bench = Bench()
        kept = bench.submit(PROMPTS[0], 9)
        for tokens, waits in ((50, False), (50, True)):
            other = bench.submit([*range(3000)], tokens, paused=waits)
            bench.scheduler.step()
            other.cancel()
            bench.scheduler.step()
            assert other.state is State.CANCELLED
            assert len(bench.pool.used) == 1
            assert list(other) == [] or not waits
            with pytest.raises(KtrtError, match="was cancelled"):
                other.result()
        bench.run()
        assert tokens_of(kept) == expected_tokens(PROMPTS[0], 9)
        assert bench.released == 3
        kept.cancel()
        bench.scheduler.step()
        assert kept.state is State.FINISHED

    def test_a_prompt_is_cancelled_within_a_step(self) -> None:
        bench = Bench()
        kept, other = bench.submit(PROMPTS[0], 9), bench.submit([*range(300)], 5)
        bench.runner.between = other.cancel
        bench.scheduler.step()
        assert not any(slot.ids for slot in bench.pool.used)
        bench.run()
        assert other.state is State.CANCELLED
        assert tokens_of(kept) == expected_tokens(PROMPTS[0], 9)

    def test_what_a_cancelled_request_computed_is_reused(self) -> None:
        bench = Bench()
        first = bench.submit(PROMPTS[0], 9)
        bench.scheduler.step()
        first.cancel()
        again = bench.submit(PROMPTS[0], 2)
        bench.run()
        assert again.result().reused_tokens == len(PROMPTS[0]) - 1

    def test_an_exception_fails_the_steps_requests_alone(self) -> None:
        bench = Bench(turn_steps=1)
        failing = [bench.submit(prompt, 9, turn("x")) for prompt in PROMPTS[:2]]
        other = bench.submit(PROMPTS[2], 4)
        while not bench.runner.steps or bench.sets.acting != turn("x"):
            bench.scheduler.step()
        bench.runner.fail = RuntimeError("broken")
        bench.run()
        late = bench.submit(PROMPTS[3], 3)
        bench.run()
        states = {handle.state for handle in failing}
        assert states == {State.FAILED} or other.state is State.FAILED
        assert late.state is State.FINISHED
        for handle in [*failing, other]:
            if handle.state is State.FAILED:
                with pytest.raises(RuntimeError, match="broken"):
                    handle.result()
        assert not bench.pool.used
        assert bench.released == 4

    def test_an_answer_that_cannot_be_chosen(self) -> None:
        bench = Bench()
        broken = FakeAnswer(PROMPTS[0], 5)
        broken.error = KtrtError("NaN")
        failed, other = bench.submit(PROMPTS[0], 5, answer=broken), bench.submit(PROMPTS[1], 5)
        bench.run()
        with pytest.raises(KtrtError, match="NaN"):
            list(failed)
        assert tokens_of(other) == expected_tokens(PROMPTS[1], 5)

    def test_ctrl_c_leaves_the_requests(self) -> None:
        bench = Bench()
        handles = [bench.submit(prompt, 5) for prompt in PROMPTS]
        bench.scheduler.step()
        bench.runner.fail = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            bench.scheduler.step()
        # The worst that the runner may leave: a slot that holds nothing.
        bench.pool.used[1].ids.clear()
        bench.run()
        for handle, prompt in zip(handles, PROMPTS, strict=True):
            assert tokens_of(handle) == expected_tokens(prompt, 5)

    def test_ctrl_c_while_a_slot_is_opened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = Bench()

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(bench.pool, "open", interrupted)
        handle = bench.submit(PROMPTS[0], 2)
        with pytest.raises(KeyboardInterrupt):
            bench.scheduler.step()
        assert handle.state is State.FAILED
        assert bench.released == 1
        assert bench.scheduler.counts == (0, 0)

    def test_closing(self) -> None:
        bench = Bench(rows=1)
        handles = [bench.submit(prompt, 5) for prompt in PROMPTS]
        bench.scheduler.step()
        bench.scheduler.close(KtrtError("closed"))
        for handle in handles:
            with pytest.raises(KtrtError, match="closed"):
                handle.result()
        assert not bench.pool.used
        assert bench.released == 4
        with pytest.raises(KtrtError, match="closed"):
            bench.submit(PROMPTS[0])

    def test_changed_numbers_end_the_answers_under_way(self) -> None:
        bench = Bench()
        handle = bench.submit(PROMPTS[0], 5)
        bench.scheduler.step()
        bench.sets.renewals += 1
        bench.scheduler.step()
        with pytest.raises(KtrtError, match="changed during the answer"):
            handle.result()

    def test_waiting_for_a_result(self) -> None:
        bench = Bench()
        handle = bench.submit(PROMPTS[0], 5)
        with pytest.raises(KtrtError, match=r"not complete after 0\.01 s"):
            handle.result(timeout=0.01)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(handle))
        thread.start()
        bench.run()
        thread.join(10)
        assert len(found) == 5


class TestPauses:
    def test_a_paused_request_keeps_what_it_holds(self) -> None:
        bench = Bench()
        first, second = (bench.submit(prompt, 8) for prompt in PROMPTS[:2])
        for _ in range(3):
            bench.scheduler.step()
        first.pause()
        slot = bench.pool.used[0]
        before = list(slot.ids)
        bench.run()
        assert second.state is State.FINISHED
        assert first.state is State.DECODE
        assert bench.pool.used == [slot]
        assert slot.ids == before
        bench.runner.steps.clear()
        first.resume()
        bench.run()
        assert tokens_of(first) == expected_tokens(PROMPTS[0], 8)
        assert [count for ((_, count, _),) in bench.runner.steps] == [1] * 5

    def test_a_paused_one_does_not_hold_up_the_queue(self) -> None:
        bench = Bench(rows=1)
        paused = bench.submit(PROMPTS[0], 2, paused=True)
        second = bench.submit(PROMPTS[1], 2)
        bench.run()
        assert (paused.state, second.state) == (State.WAITING, State.FINISHED)
        paused.resume()
        bench.run()
        assert paused.state is State.FINISHED


class TestFairness:
    def test_clients_get_the_same(self) -> None:
        """One with many requests does not delay one with few."""
        bench = Bench(rows=4)
        many = [bench.submit(20, 20, client="many") for _ in range(40)]
        for _ in range(30):
            bench.scheduler.step()
        few = [bench.submit(20, 20, client="few") for _ in range(4)]
        while not all(handle.state.ended for handle in few):
            bench.scheduler.step()
        done = sum(handle.state.ended for handle in many)
        assert done <= 20, "the others took about half of the slots meanwhile"
        bench.run()
        assert all(handle.state is State.FINISHED for handle in many)

    def test_adapters_of_one_client_get_the_same(self) -> None:
        bench = Bench(rows=2)
        for _ in range(10):
            bench.submit(20, 10, row(1), client="x")
        other = bench.submit(20, 10, row(2), client="x")
        bench.scheduler.step()
        assert other.state is State.DECODE, "the second slot goes to the second adapter"
        bench.run()

    def test_first_come_first_served_for_each(self) -> None:
        bench = Bench(rows=1)
        handles = [bench.submit(20, 3, client="x") for _ in range(5)]
        ended: list[Any] = []
        while len(ended) < 5:
            bench.scheduler.step()
            ended += [h for h in handles if h.state.ended and h not in ended]
        assert ended == handles

    def test_nobody_saves_up_tokens(self) -> None:
        bench = Bench(rows=1)
        for _ in range(20):
            bench.submit(20, 20, client="old")
        for _ in range(100):
            bench.scheduler.step()
        new = [bench.submit(20, 20, client="new") for _ in range(10)]
        for _ in range(200):
            bench.scheduler.step()
        assert sum(handle.state.ended for handle in new) <= 6
        bench.run()


class TestTurns:
    def test_what_cannot_mix_takes_turns(self) -> None:
        bench = Bench(turn_steps=4)
        choices = [turn("x"), row(1), turn("x"), turn("y"), row(2)]
        handles = [
            bench.submit([*range(n, n + 12)], 20, choice) for n, choice in enumerate(choices)
        ]
        bench.run()
        for number, handle in enumerate(handles):
            assert tokens_of(handle) == expected_tokens([*range(number, number + 12)], 20)
        for step in bench.runner.steps:
            keys = {slot.key for slot, *_ in step}
            assert keys in ({"digest x"}, {"digest y"}) or keys <= {"digest 1", "digest 2"}
            if "digest x" in keys or "digest y" in keys:
                assert {adapter for *_, adapter in step} == {ACTIVE}

    @pytest.mark.parametrize("exclusive_first", [True, False])
    def test_waiting_is_bounded_in_steps(self, exclusive_first: bool) -> None:
        bench = Bench(turn_steps=5, rows=2)
        first, second = (turn("x"), row(1)) if exclusive_first else (row(1), turn("x"))
        for _ in range(8):
            bench.submit(10, 100, first)
        for _ in range(3):
            bench.scheduler.step()
        other = bench.submit(10, 100, second)
        gap = longest = 0
        while not other.state.ended:
            before = len(tokens_of(other))
            bench.scheduler.step()
            gap = 0 if len(tokens_of(other)) > before else gap + 1
            longest = max(longest, gap)
        assert longest <= 5
        bench.run()

    def test_waiting_is_bounded_in_time(self) -> None:
        bench = Bench(turn_seconds=0.5, turn_steps=1000)
        bench.runner.seconds = lambda size: 0.1
        bench.submit(10, 100, turn("x"))
        bench.scheduler.step()
        other = bench.submit(10, 5)
        start = bench.clock.now
        while not tokens_of(other):
            bench.scheduler.step()
        assert bench.clock.now - start <= 0.71
        bench.run()

    def test_three_groups_all_get_turns(self) -> None:
        bench = Bench(turn_steps=3)
        handles = [bench.submit(10, 30, each) for each in (turn("x"), turn("y"), row(1))]
        gaps = [0, 0, 0]
        while not any(handle.state.ended for handle in handles):
            before = [len(tokens_of(handle)) for handle in handles]
            bench.scheduler.step()
            for n, handle in enumerate(handles):
                gaps[n] = 0 if len(tokens_of(handle)) > before[n] else gaps[n] + 1
            assert max(gaps) <= 6
        bench.run()

    def test_layers_without_rows(self) -> None:
        """Where layers do not take a row's adapter, all adapters take turns."""
        bench = Bench(turn_steps=2, by_row=False)
        handles = [bench.submit(PROMPTS[n], 6, row(n)) for n in range(3)]
        bench.run()
        for handle, prompt in zip(handles, PROMPTS, strict=False):
            assert tokens_of(handle) == expected_tokens(prompt, 6)
        assert {adapter for step in bench.runner.steps for *_, adapter in step} == {ACTIVE}

    def test_alone_there_is_no_switching(self) -> None:
        bench = Bench(turn_steps=2)
        bench.submit(10, 50, turn("x"))
        bench.run()
        assert bench.sets.switches == 1


# 64 experts, of which a token reads 6; 1 s for all bytes.
FACTS = CostFacts(other_bytes=2e9, expert_bytes=18e9, share=6 / 64, bandwidth=20e9)


class TestFloor:
    def bench(self, floor: float, **limits: Any) -> Bench:
        bench = Bench(FACTS, min_tokens_per_second=floor, **limits)
        real = CostFacts(**{**vars(FACTS), "token_seconds": 5e-4})
        model = type(bench.cost)(real)
        bench.runner.seconds = model.seconds
        return bench

    def test_a_stream_is_admitted_only_if_all_keep_the_floor(self) -> None:
        most = 0
        for floor in (4.0, 2.0, 0.0):
            bench = self.bench(floor)
            for _ in range(16):
                bench.submit(10, 30)
            running = 0
            while bench.scheduler.step():
                running = max(running, bench.scheduler.counts[0])
                rows = sum(count == 1 for _, count, _ in bench.runner.steps[-1])
                took = bench.cost.seconds(StepSize(rows))
                if floor and rows == len(bench.runner.steps[-1]):
                    assert took <= 1 / floor + 1e-9
            assert running > most
            most = running
        assert most == 16

    def test_the_first_one_always_runs(self) -> None:
        bench = self.bench(1000.0)
        handles = [bench.submit(10, 3) for _ in range(3)]
        bench.run()
        assert all(handle.state is State.FINISHED for handle in handles)
        assert max(map(len, bench.runner.steps)) == 1

    def test_requests_that_nobody_watches_have_no_floor(self) -> None:
        bench = self.bench(4.0)
        for _ in range(16):
            bench.submit(10, 3, streams=False)
        bench.run()
        assert max(map(len, bench.runner.steps)) == 16

    def test_streams_keep_the_floor_next_to_a_long_prompt(self) -> None:
        """On average: a chunk takes longer than a step may, and waits until enough was saved."""
        floor = 2.0
        bench = self.bench(floor, prompt_seconds=30.0)
        stream = bench.submit(10, 400)
        for _ in range(40):  # measures the bandwidth
            bench.scheduler.step()
        start, before = bench.clock.now, len(tokens_of(stream))
        prompt = bench.submit([*range(4000)], 1)
        while not prompt.state.ended:
            bench.scheduler.step()
        seconds = bench.clock.now - start
        assert (len(tokens_of(stream)) - before) / seconds >= 0.9 * floor
        chunks = [n for step in bench.runner.steps for _, n, _ in step if n > 1]
        assert max(chunks) > 128, "small chunks cost as much as large ones"

    def test_a_prompt_is_not_starved_by_the_floor(self) -> None:
        bench = self.bench(3.0, prompt_seconds=2.0)
        bench.submit(10, 1000)
        for _ in range(10):
            bench.scheduler.step()
        prompt = bench.submit([*range(1500)], 1, streams=False)
        start = bench.clock.now
        while not prompt.state.ended:
            bench.scheduler.step()
        assert bench.clock.now - start < 1500 / 128 * 4

    def test_without_streams_prompts_take_whole_chunks(self) -> None:
        bench = self.bench(4.0)
        bench.submit([*range(1200)], 1)
        bench.run()
        assert [n for step in bench.runner.steps for _, n, _ in step] == [512, 512, 176]


class TestMemory:
    def test_requests_wait_for_room(self) -> None:
        bench = Bench(budget=100)
        handles = [bench.submit(20, 20) for _ in range(5)]
        while bench.scheduler.step():
            assert sum(slot.promised for slot in bench.pool.used) <= 100
        assert all(handle.state is State.FINISHED for handle in handles)

    def test_nobody_overtakes_one_that_found_no_room(self) -> None:
        bench = Bench(budget=100, turn_steps=2)
        bench.submit(20, 40)
        large = bench.submit(50, 40, client="large")
        for _ in range(100):
            small = bench.submit(15, 15, turn("x"))
            bench.scheduler.step()
        assert large.state is State.FINISHED
        bench.run()
        assert small.state is State.FINISHED

    def test_adapters_that_changed_while_it_waits(self) -> None:
        bench = Bench()
        old = bench.submit(10, 5, row(1), paused=True)
        other = bench.submit(10, 5)
        bench.sets.outdated.add(row(1))
        old.resume()
        bench.run()
        with pytest.raises(KtrtError, match="changed before the answer began"):
            old.result()
        assert (other.state, bench.released) == (State.FINISHED, 2)
        assert not bench.pool.used

    def test_who_found_no_memory_comes_before_a_payer_with_less(self) -> None:
        """Who found no memory comes next, though another payer got fewer tokens since: neither
        would begin else."""
        bench = Bench(budget=100)
        first = bench.submit(10, 60, client="x")
        bench.scheduler.step()
        blocked = bench.submit(10, 60, client="x")
        bench.scheduler.step()
        other = bench.submit(10, 60, client="y")
        bench.run()
        assert [h.state for h in (first, blocked, other)] == [State.FINISHED] * 3

    def test_one_alone_may_try_more_than_the_budget(self) -> None:
        bench = Bench(budget=10)
        handle = bench.submit(20, 5)
        bench.run()
        assert handle.state is State.FINISHED


class TestCost:
    def test_small_chunks_read_nearly_all_experts(self) -> None:
        cost = Bench(FACTS).cost
        assert cost.union(8) == pytest.approx(34.9 / 64, abs=0.01)
        assert 0.95 < cost.union(32) < 0.97
        assert cost.seconds(StepSize(0, 512, 1)) < 1.05 * cost.seconds(StepSize(0, 32, 1))
        assert cost.seconds(StepSize(1)) == pytest.approx((2 + 18 * 6 / 64) / 20)

    def test_learns_bandwidth_and_arithmetic(self) -> None:
        cost = Bench(FACTS).cost
        for _ in range(20):
            cost.observe(StepSize(1), 2 * (2 + 18 * 6 / 64) / 20)
        assert cost.bandwidth == pytest.approx(1e10)
        cost.observe(StepSize(1), 1e3)
        assert cost.bandwidth == pytest.approx(1e10), "one slow step changes nothing"
        for _ in range(5):
            cost.observe(StepSize(0, 512, 1), 2 * 20 / 20 + 0.512)
        assert cost.token_seconds == pytest.approx(1e-3, rel=0.01)

    def test_learns_the_union(self) -> None:
        cost = Bench(FACTS).cost
        before = cost.seconds(StepSize(8))
        for _ in range(20):
            cost.observe(StepSize(8), 0.5, union=0.3)
        assert cost.union(8) == pytest.approx(0.3)
        assert cost.union(1) == FACTS.share
        assert cost.bytes_of(StepSize(8)) == pytest.approx(2e9 + 0.3 * 18e9)
        assert before > 0

    def test_sequences_that_do_not_mix(self) -> None:
        cost = Bench(CostFacts(**{**vars(FACTS), "mixes": False})).cost
        assert cost.seconds(StepSize(4)) == pytest.approx(4 * cost.seconds(StepSize(1)))


@pytest.mark.parametrize(
    "limits", [{"rows": 0}, {"turn_steps": 0}, {"min_tokens_per_second": -1.0}]
)
def test_limits_are_checked(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        SchedulerLimits(**limits)
