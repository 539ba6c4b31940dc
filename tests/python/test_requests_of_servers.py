"""The interface of a session for servers: prompts of ids, one prefill for several answers, calls on
change, numbers, bounds and ends."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from helpers.tiny_chat import make_loaded, make_model, make_session, make_tokenizer

import ktrt
from ktrt.config import SamplingArgs, TemplateArgs
from ktrt.errors import AdapterError, ConfigError, EngineError, KtrtError
from ktrt.generate.scheduler import State
from ktrt.prompt.template.load import load_template
from ktrt.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("one_thread")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


HELLO = ask("hello, who are you?")


@pytest.fixture
def session() -> Iterator[Session]:
    with make_session() as session:
        yield session


def until(holds: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


class TestPrompts:
    def test_ids_are_the_messages(self, session: Session) -> None:
        expected = session.chat(HELLO)
        ids = session.render(HELLO)
        assert len(ids) == expected.prompt_tokens == session.count_tokens(HELLO)
        found = session.submit(prompt_ids=tuple(ids)).result(60)
        assert found.token_ids == expected.token_ids

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({}, "messages or prompt_ids, and not both"),
            ({"messages": HELLO, "prompt_ids": [1]}, "messages or prompt_ids, and not both"),
            ({"prompt_ids": []}, "one token id at least"),
            ({"prompt_ids": "12"}, "expected a list of token ids, found '12'"),
            ({"prompt_ids": 5}, "expected a list of token ids, found 5"),
            ({"prompt_ids": [3, -1]}, r"prompt_ids\[1\]: expected a token id, 0 or more, found -1"),
            ({"prompt_ids": [True]}, r"prompt_ids\[0\].*found True"),
            ({"prompt_ids": [3, 1.0]}, r"prompt_ids\[1\].*found 1.0"),
            ({"prompt_ids": [3, 10**6]}, "token id 1000000, the model has"),
            ({"prompt_ids": [3] * 2048}, "has 2048 tokens, the model's context holds 2048"),
            ({"prompt_ids": [3], "tools": [{}]}, "tools and thinking belong to messages"),
            ({"prompt_ids": [3], "thinking": False}, "tools and thinking belong to messages"),
            ({"messages": HELLO, "thinking": True}, "cannot switch thinking"),
            ({"messages": HELLO, "logit_bias": {10**6: 1}}, "logit_bias: expected token ids below"),
            ({"messages": HELLO, "logit_bias": {5: 101}}, "logit_bias: expected -100 … 100"),
            ({"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias: a key: expected an integer"),
            ({"messages": HELLO, "logit_bias": [5]}, "logit_bias: expected a mapping"),
        ],
    )
    def test_wrong_ones_are_refused_at_once(
        self, session: Session, given: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ConfigError, match=words):
            session.submit(**given)
        assert session.stats().waiting == 0

    def test_thinking_of_one_answer(self) -> None:
        special = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
        tokenizer = make_tokenizer(special)
        template = load_template(TemplateArgs("qwen3"), tokenizer)
        model = make_loaded(make_model(tokenizer))
        with Session(model, tokenizer, template, SamplingArgs(max_new_tokens=4)) as session:
            on, off = (session.render(HELLO, thinking=each) for each in (True, False))
            assert on == session.render(HELLO) != off
            assert session.template.thinking
            found = session.submit(HELLO, thinking=False).result(60)
            assert found.prompt_tokens == len(off)

    def test_bias_by_text_of_an_id(self, session: Session) -> None:
        bias: Any = {"33": 100}
        found = session.submit(HELLO, logit_bias=bias, max_new_tokens=3).result(60)
        assert found.token_ids == (33, 33, 33)


class TestChanges:
    def test_every_token_and_the_end_are_told(self, session: Session) -> None:
        seen: list[tuple[State, int]] = []
        box: list[Any] = []
        ready = threading.Event()

        def changed() -> None:
            ready.wait(10)
            seen.append((box[0].state, len(box[0]._tokens)))

        box.append(session.submit(HELLO, max_new_tokens=5, on_change=changed))
        ready.set()
        box[0].result(60)
        until(lambda: seen[-1][0] is State.FINISHED)
        assert {count for _, count in seen} >= {0, 1, 2, 3, 4, 5}
        assert seen[0] == (State.PREFILL, 0)
        with pytest.raises(KtrtError, match="cannot wait for it"):
            session._steps.between(lambda: session.submit(HELLO).result(1))

    def test_a_call_that_fails_harms_nobody(self, session: Session) -> None:
        def changed() -> None:
            raise RuntimeError("the loop is closed")

        found = session.submit(HELLO, on_change=changed).result(60)
        assert found.generated_tokens == 40


class TestEnds:
    def test_waiting_in_on_prefill(self, session: Session) -> None:
        """The thread that waits is the one that runs the model: it steps meanwhile."""
        expected = [session.chat(ask(text)).text for text in ("one", "two")]
        found: list[str] = []

        def on_prefill(done: int, total: int) -> None:
            if not found:
                handle = session.submit(ask("two"))
                found.append(handle.result(30).text)
                found.append("".join(each.text for each in session.submit(ask("two"))))

        assert session.chat(ask("one"), on_prefill=on_prefill).text == expected[0]
        assert found == [expected[1]] * 2

    def test_a_time_limit_in_on_prefill(self, session: Session) -> None:
        def on_prefill(done: int, total: int) -> None:
            handle = session.submit(ask("two"), max_new_tokens=2000)
            with pytest.raises(KtrtError, match="not complete after 0.0001 s"):
                handle.result(0.0001)
            handle.cancel()

        session.chat(ask("one"), on_prefill=on_prefill)
        until(lambda: session._open().runner.pool.slots_in_use == 0)

    def test_any_error_of_a_step_is_an_engine_error(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = session.submit(HELLO).result(60)

        def broken(*_: Any, **__: Any) -> None:
            raise IndexError("out of range")

        with monkeypatch.context() as patch:
            patch.setattr(session.model, "forward", broken)
            with pytest.raises(EngineError, match="a step of the model failed: IndexError: out of"):
                session.submit(HELLO).result(60)
        pool = session._open().runner.pool
        for place in ("mark", "step_back", "open"):
            session.submit(HELLO).result(60)
            with monkeypatch.context() as patch:
                patch.setattr(pool, place, broken)
                with pytest.raises(EngineError, match="failed: IndexError: out of range"):
                    session.submit(HELLO).result(60)
        assert session.alive
        assert session.submit(HELLO).result(60).token_ids == expected.token_ids
        stats = session.stats()
        assert (stats.running, stats.failed, stats.failed_steps) == (0, 4, 2), (
            "two fail before their step"
        )
        assert pool.slots_in_use == 0

    def test_a_failed_thread_says_so(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handle = session.submit(HELLO, max_new_tokens=2000)
        next(handle)
        assert session.alive

        def broken() -> None:
            raise MemoryError

        monkeypatch.setattr(session._steps.scheduler, "tidy", broken)
        with pytest.raises(KtrtError, match="the scheduler's thread has failed"):
            handle.result(60)
        until(lambda: not session.alive)
        with pytest.raises(KtrtError, match="the scheduler's thread has failed"):
            session.submit(HELLO)

    def test_a_cancelled_request_frees_its_slot(self, session: Session) -> None:
        handle = session.submit(HELLO, max_new_tokens=2000)
        next(handle)
        steps = session.stats().steps
        handle.cancel()
        until(lambda: handle.state.ended)
        assert session.stats().steps <= steps + 2
        assert session._open().runner.pool.slots_in_use == 0
        assert session.stats().cancelled == 1

    @pytest.mark.parametrize("asked", [False, True])
    def test_a_dropped_session_is_collected(self, asked: bool) -> None:
        closed = threading.Event()
        before = threading.active_count()
        session = make_session(close=closed.set)
        handle = session.submit(HELLO, max_new_tokens=200) if asked else None
        gone = weakref.ref(session)
        del session
        if handle is not None:
            assert handle.result(60).generated_tokens == 200, "an answer under way goes on"
        gc.collect()
        until(lambda: gone() is None)
        if asked:
            assert closed.wait(30)
            until(lambda: threading.active_count() == before)

    def test_a_stream_keeps_its_session(self) -> None:
        pieces = make_session().stream(HELLO)
        gc.collect()
        assert "".join(pieces)


class TestMemory:
    def test_an_answer_is_bounded_by_the_room_that_there_is(self, session: Session) -> None:
        session.chat(HELLO, max_new_tokens=1)
        pool = session._open().runner.pool
        pool.budget_bytes = pool.bytes_of(100)
        assert pool.most_tokens(2048) == 100
        prompt = session.render(HELLO)
        found = session.submit(HELLO, max_new_tokens=2000).result(60)
        assert found.finish_reason == "length"
        assert found.generated_tokens == 100 - len(prompt)
        with pytest.raises(ConfigError, match="100 tokens, the memory for keys and values holds 1"):
            session.submit(prompt_ids=[5] * 100)
        assert pool.usage()[0] == 0

    def test_without_a_budget_the_context_bounds_it(self, session: Session) -> None:
        pool = session._open().runner.pool
        assert pool.budget_bytes is None
        assert pool.most_tokens(2048) == 2048


class TestStats:
    def test_what_is_counted(self, session: Session) -> None:
        assert session.stats() == type(session.stats())()
        assert session.predicted_wait() == 0.0
        handles = [session.submit(HELLO, max_new_tokens=n) for n in (3, 5)]
        tokens = [len(handle.result(60).token_ids) for handle in handles]
        again = session.submit(HELLO, max_new_tokens=1).result(60)
        stats = session.stats()
        prompt = again.prompt_tokens
        assert (stats.finished, stats.generated_tokens) == (3, sum(tokens) + 1)
        assert stats.prompt_tokens == stats.prefix_query_tokens == 3 * prompt
        assert stats.prefix_hit_tokens >= again.reused_tokens == prompt - 1
        assert stats.steps >= 6
        assert stats.step_seconds > 0
        assert stats.last_step_seconds
        assert stats.predicted_step_seconds
        until(lambda: session.stats().kv_bytes == 0 < session.stats().kv_idle_bytes)
        session.close()
        with pytest.raises(KtrtError, match="closed"):
            session.stats()
        assert not session.alive

    def test_while_something_runs(self, session: Session) -> None:
        handles = [session.submit(HELLO, max_new_tokens=1500) for _ in range(3)]
        handles[0].pause()
        for handle in handles[1:]:
            next(handle)
        errors: list[BaseException] = []
        stop = threading.Event()

        def look() -> None:
            try:
                while not stop.is_set():
                    stats = session.stats()
                    assert stats.running <= 3
                    wait = session.predicted_wait()
                    assert wait is None or wait >= 0
            except BaseException as error:  # noqa: BLE001 - for the assertion
                errors.append(error)

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: session.stats().kv_tokens > 50)
        assert session.stats().kv_bytes > 0
        for handle in handles:
            handle.cancel()
        until(lambda: session.stats().cancelled == 3)
        stop.set()
        for thread in threads:
            thread.join(10)
        assert not errors

    def test_names(self) -> None:
        assert ktrt.Handle.__name__ == "Handle"
        with pytest.raises(AdapterError), make_session() as session:
            session.submit(HELLO, adapter="x")
